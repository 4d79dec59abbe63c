"""Train without labels: images in, an unconditional diffusion (flow) model out.

Reads   images: procedural `shapes`, a torchvision set, a folder, or uint8 arrays (`data.source`)
Writes  runs/<run>/config.yaml, data/{train,test}/ and diffusion/<name>/ (checkpoint.pt, metrics.jsonl, samples/)
Time    t = 0 is noise, t = 1 is data, everywhere in this project: x_t = alpha(t) x + sigma(t) z.

    python train_diffusion.py configs/shapes.yaml                           # CPU, about four minutes
    python train_diffusion.py configs/cifar10.yaml                          # one GPU
    torchrun --nproc_per_node=8 train_diffusion.py configs/cifar10.yaml     # eight GPUs, the same global batch
    python train_diffusion.py configs/imagenet256-adm.yaml                  # published weights as diffusion/<name>
    python train_diffusion.py configs/imagenet256-adm.yaml --prepare        # the data alone, for later stages

The same command again resumes. The later stages import this file. README.md says in which order to read.
"""
import copy
import dataclasses
import itertools
import json
import math
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from configs.data import (as_input, check_source, decode, input_shape, load_data, open_autoencoder, prepare_data,
                          row_shape)
from configs.run import (Model, UserError, ahead, atomic, autocast, bar, cli, draw, fill, finished, key, locked,
                         read_json, read_torch, reading, require, save_grid, save_torch, seed_of, seeded, start,
                         to_uint8, weights_hash, wide, write_json)


@dataclass
class Training:
    """Keys shared by the two training stages. Durations are images seen; batches are global, over all processes."""
    images: int = key(20_000_000, "images seen in all; more may be asked for later", low=1)
    batch: int = key(128, "images per update over all processes", low=1)
    micro: int = key(0, "at most so many images per forward pass and process; 0 = no gradient accumulation. Not of the "
                        "labeller's pass with sk_grad=backbone", low=0)
    path: Literal["cv", "vp", "vp-sd", "vp-sde"] = key("cv", "constant velocity; variance preserving: linear betas, "
                                                             "Stable Diffusion's, score SDE")
    predict: Literal["v", "eps", "x"] = key("v", "what the network predicts")
    optimizer: Literal["adamw", "muon"] = key("adamw", "muon: orthogonalised updates of the hidden weights; several "
                                                       "times faster in short trainings")
    lr: float = key(2e-4, "never rescaled by batch or processes", above=0)
    weight_decay: float = key(0.0, "of matrices and convolutions, decoupled", low=0)
    warmup: int = key(10_000, "images over which lr rises linearly", low=0)
    clip: float = key(1.0, "gradient norm limit; 0 = none", low=0)
    ema: int = key(500_000, "half-life, in images, of the averaged weights", low=1)
    ema_ramp: float = key(0.05, "but never longer than this share of the images seen so far", above=0)
    flip: bool = key(True, "mirror images at random")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "auto = bf16 where the hardware has it")
    compile: bool = key(False, "torch.compile the network")
    recompute: bool = key(False, "keep the inputs of blocks only and compute the rest again in backward: less memory, "
                                 "a third more work")
    log_every: int = key(10_000, "images between lines of metrics.jsonl", low=1)
    save_every: int = key(500_000, "images between checkpoints", low=1)
    grid_every: int = key(500_000, "images between sample grids (fixed noise, averaged weights)", low=1)
    seed: int = key(0, "of weights, order, noise, times and flips")
    overwrite: bool = key(False, "throw away results that another recipe left under this name")


@dataclass
class TrainDiffusion(Training):
    """Section `train_diffusion`."""
    name: str = key("base", "results go to diffusion/<name>")
    imported: str = key("", "adm:FILE or uvit:FILE: only write these published weights, of section `model`, "
                            "as diffusion/<name>")


# ---------------------------------------------------------------------------------------------------------------------
# Noise paths: x_t = alpha(t) x + sigma(t) z with t = 0 noise, t = 1 data

class NoisePath:
    """A new path: a subclass with alpha(t), sigma(t), rates(t) = (dalpha/dt, dsigma/dt); its name in PATHS and the key.

    t is a tensor that multiplies x and z, as [B, 1, 1, 1]. The last four methods are for samplers, which solve dy/ds =
    slope with y = x_t / scale(t), s = to_s(t). Here simply y = x_t, s = t, slope = v = dx_t/dt; VP, whose dx_t/dt is
    infinite at the data, has y, s, slope and v of its own.
    """

    def v_target(self, x, z, t):
        """What a network that predicts v learns."""
        alpha_rate, sigma_rate = self.rates(t)
        return alpha_rate * x + sigma_rate * z

    def from_v(self, v, x_t, t):
        """(x_hat, z_hat) from a predicted v: the solution of x_t = alpha x + sigma z, v = alpha' x + sigma' z."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        alpha_rate, sigma_rate = self.rates(t)
        determinant = alpha * sigma_rate - sigma * alpha_rate                    # -1 on the straight path
        return (sigma_rate * x_t - sigma * v) / determinant, (alpha * v - alpha_rate * x_t) / determinant

    def to_s(self, t):
        """The ODE's time s of t."""
        return t

    def to_t(self, s):
        """The inverse of `to_s`."""
        return s

    def scale(self, t):
        """x_t = scale(t) y."""
        return torch.ones_like(t)

    def slope(self, x_hat, z_hat, t):
        """dy/ds where the network estimates x_hat and z_hat."""
        return self.v_target(x_hat, z_hat, t)


class ConstantVelocity(NoisePath):
    """The straight path (arXiv 2312.08825): alpha = t, sigma = 1 - c t, velocity x - c z, with c = 1 - 1e-4."""
    c = 1 - 1e-4                                          # noise of deviation 1e-4 is left at t = 1

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - self.c * t

    def rates(self, t):
        return 1.0, -self.c


class VariancePreserving(NoisePath):
    """alpha^2 + sigma^2 = 1, from a table of ln alpha^2 after 0, 1, ..., 1000 steps, where step k is t = 1 - k / 1000.

    The velocity in t is singular at the data end; the ODE is solved as dy/drho = z_hat with y = x_t / alpha and
    rho = sigma / alpha, in which an Euler step is exactly DDIM (eta = 0). It needs no `rates`: v is another one here.
    """

    def __init__(self, table):
        self.table = table                                # float64 [1001]
        self.copies = {}                                  # by device: copied once, since a copy makes a GPU wait

    def on(self, device):
        """The table there."""
        if device not in self.copies:
            self.copies[device] = self.table.to(device)
        return self.copies[device]

    def log_abar(self, t):
        """ln alpha^2, interpolated between the 1000 steps. t: [...] -> same shape, float64."""
        u = (1000 * (1 - t.double())).clamp(0, 1000)
        k = u.floor().clamp(max=999).long()
        table = self.on(t.device)
        low, high = table.take(k), table.take(k + 1)      # table[k] of a single k would make a GPU wait
        return low + (u - k) * (high - low)

    def alpha(self, t):
        return (0.5 * self.log_abar(t)).exp().to(t.dtype)

    def sigma(self, t):
        return (-torch.expm1(self.log_abar(t))).sqrt().to(t.dtype)

    def v_target(self, x, z, t):
        """v = alpha z - sigma x (Salimans and Ho, arXiv 2202.00512): towards noise, and not dx_t/dt."""
        return self.alpha(t) * z - self.sigma(t) * x

    def from_v(self, v, x_t, t):
        alpha, sigma = self.alpha(t), self.sigma(t)
        return alpha * x_t - sigma * v, sigma * x_t + alpha * v

    def to_s(self, t):
        """rho = sigma / alpha, falling from 157 (linear betas) at t = 0 to 0 at t = 1."""
        return torch.expm1(-self.log_abar(t)).sqrt().to(t.dtype)

    def to_t(self, s):
        """ln alpha^2 = -ln(1 + rho^2), looked up in the (falling) table."""
        table = self.on(s.device)
        y = -torch.log1p(s.double() ** 2)
        k = (torch.searchsorted(-table, -y) - 1).clamp(0, 999)
        step = k + (y - table[k]) / (table[k + 1] - table[k])
        return (1 - step / 1000).clamp(0, 1).to(s.dtype)

    def scale(self, t):
        return self.alpha(t)

    def slope(self, x_hat, z_hat, t):
        return z_hat


def table_of_betas(first, last, power=1):
    """ln prod (1 - beta) after 0, 1, ..., 1000 steps, of betas whose `power`-th roots rise in even steps."""
    betas = torch.linspace(first ** (1 / power), last ** (1 / power), 1000, dtype=torch.float64) ** power
    return F.pad(torch.log1p(-betas).cumsum(0), (1, 0))


STEPS = torch.arange(1001, dtype=torch.float64) / 1000
PATHS = {
    "cv": ConstantVelocity(),
    "vp": VariancePreserving(table_of_betas(1e-4, 0.02)),                        # DDPM
    "vp-sd": VariancePreserving(table_of_betas(0.00085, 0.012, power=2)),        # Stable Diffusion
    "vp-sde": VariancePreserving(-(0.1 * STEPS + 9.95 * STEPS ** 2)),            # arXiv 2011.13456
}


def diffuse(path, x, z, t):
    """x_t = alpha(t) x + sigma(t) z. x, z: [B, C, H, W]; t: [B]."""
    t = wide(t)                                           # [B, 1, 1, 1]
    return path.alpha(t) * x + path.sigma(t) * z


def to_x_and_z(path, predict, out, x_t, t):
    """(x_hat, z_hat) from the network's output. Affine in `out`, so guidance may mix outputs first. t: [B]."""
    out, t = out.to(x_t.dtype), wide(t)
    if predict == "v":
        return path.from_v(out, x_t, t)
    # near an end of the path one part is hardly determined: limits keep the network's error from blowing up
    alpha, sigma = path.alpha(t), path.sigma(t)
    if predict == "eps":
        return (x_t - sigma * out) / alpha.clamp(min=0.005), out                 # straight path: VP's is 0.006 or more
    return out, (x_t - alpha * out) / sigma.clamp(min=0.02)                      # the last step or two before the data


def loss_per_image(net, path, predict, x, z, t, **condition):
    """Mean squared error of the network's prediction, [B]. x, z: [B, C, H, W]; t: [B]; the network is told 1000 t."""
    target = {"v": path.v_target(x, z, wide(t)), "eps": z, "x": x}[predict]
    out = net(diffuse(path, x, z, t), 1000 * t, **condition).float()
    return (out - target).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks. forward(x [B, C, H, W], time [B] = 1000 t, label [B], vector [B, D], layout [B, L, H, W]) -> [B, C', H, W].
# Module names are those of the published weights

def time_embedding(time, width, clock=(0, 1000)):
    """time [B] = 1000 t -> [B, width]: cosines and sines of a + b t, (a, b) = clock, which published weights set."""
    steps = torch.arange(width // 2, device=time.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10_000) * steps / (width // 2))                  # from 1 towards 1e-4
    angles = (clock[0] + clock[1] / 1000 * time.float())[:, None] * freqs           # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], 1)


def zeroed(module):
    """Start a residual branch at zero, so that a fresh block is the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels):
    """ADM's 32 groups; fewer below 128 channels, so that each has four or more: a group of one loses its mean."""
    groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 4), 1)
    return nn.GroupNorm(groups, channels)


def again(f, *args):
    """f(*args), of which the backward pass keeps the arguments only and computes the rest once more."""
    if not torch.is_grad_enabled():
        return f(*args)
    return torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)


def recompute(net):
    """Let a network keep the inputs of its blocks only: activation checkpointing."""
    for m in net.modules():
        if isinstance(m, (Layers, Block)):
            m.forward = partial(again, m.forward)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, [B, heads, L, d] each: PyTorch's fused operation, which keeps no scores for backward.

    In bfloat16 on CPUs it takes up to four times as long as these products and their recomputation (64 positions).
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < 500
    if slow and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(lambda q, k, v: (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v, q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class ConditionalNet(nn.Module):
    """A network that may be told label, vector and layout. What it is not told is null: the label `num_labels`, a zero
    vector, a zero layout."""

    def add_conditions(self, num_labels, vector_dim, layout_channels, width):
        """Label rows are N(0, 1), as published, the last one null; vectors have no bias, so that zero is null."""
        self.num_labels, self.vector_dim, self.layout_channels = num_labels, vector_dim, layout_channels
        if num_labels:
            self.label_emb = nn.Embedding(num_labels + 1, width)
        if vector_dim:
            self.vector_emb = nn.Linear(vector_dim, width, bias=False)

    def embedded(self, x, label, vector):
        """What label and vector say of images x, [B, width]; 0 of a network that knows neither."""
        out = 0
        if self.num_labels:
            null = torch.full((len(x),), self.num_labels, device=x.device)
            out = out + self.label_emb(null if label is None else label)
        if self.vector_dim:
            out = out + self.vector_emb(x.new_zeros(len(x), self.vector_dim) if vector is None else vector)
        return out

    def layout_or_null(self, x, layout):
        """The layout [B, L, H, W] as it is; of images x [B, C, H, W] without one, zeros."""
        return x.new_zeros(len(x), self.layout_channels, *x.shape[2:]) if layout is None else layout


class ResBlock(nn.Module):
    """ADM's residual block: norm, SiLU, conv, twice; the embedding scales and shifts the second norm."""

    def __init__(self, c_in, c_out, width, dropout=0.0, resample=None):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * c_out))
        self.out_layers = nn.Sequential(group_norm(c_out), nn.SiLU(), nn.Dropout(dropout),
                                        zeroed(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def resized(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x, emb):                            # x: [B, C, H, W], emb: [B, width]
        norm, act, conv = self.in_layers
        norm2, act2, dropout, conv2 = self.out_layers
        h = conv(self.resized(act(norm(x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)        # [B, C', 1, 1] each
        h = torch.addcmul(shift, norm2(h), 1 + scale)     # norm2(h) (1 + scale) + shift
        return self.skip_connection(self.resized(x)) + conv2(dropout(act2(h)))


class AttentionBlock(nn.Module):
    """ADM self-attention over all positions of a map, with a residual connection."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)   # per head, its q, k and v lie together
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):                                 # [B, C, H, W]
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).reshape(B, C, H * W))                        # [B, 3C, HW]
        qkv = qkv.reshape(B, self.heads, 3, C // self.heads, H * W)
        # the copy makes the last axis dense: else the fused operation keeps all scores for backward
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(2)                     # [B, heads, HW, C / heads] each
        a = attention(q, k, v)
        return x + self.proj_out(a.transpose(2, 3).reshape(B, C, H * W)).reshape(B, C, H, W)


class Layers(nn.Sequential):
    """One block of the U-Net: layers, of which residual blocks are shown the embedding, too."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(ConditionalNet):
    """The ADM U-Net (arXiv 2105.05233): scale-shift residual blocks, residual resampling, attention at chosen sizes.

    A label row or a vector is added to the time embedding; a layout is concatenated to the input.
    """
    ends = ("input_blocks.0.", "out.")                    # layers that touch pixels

    def __init__(self, size, in_channels, out_channels, channels, mult, blocks, attention, head_channels, dropout=0.0,
                 stem=1, num_labels=0, vector_dim=0, layout_channels=0, heads=0, clock=(0, 1000)):
        super().__init__()
        self.channels, self.stem, self.clock = channels, stem, clock
        levels = [int(m * channels) for m in mult]        # channels of each, from the finest
        width = 4 * channels                              # of the embedding
        size = size // stem

        def block(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, width, dropout, resample)

        def attend(c):
            return AttentionBlock(c, max(1, c // head_channels) if head_channels else heads)

        self.time_embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.add_conditions(num_labels, vector_dim, layout_channels, width)
        if vector_dim:
            nn.init.normal_(self.vector_emb.weight)       # a unit vector then weighs as much as a label row
        c = levels[0]                                     # channels so far
        first = nn.Conv2d((in_channels + layout_channels) * stem ** 2, c, 3, padding=1)
        self.input_blocks = nn.ModuleList([Layers(first)])
        self.output_blocks = nn.ModuleList()
        skips = [c]
        for level, c_out in enumerate(levels):
            for _ in range(blocks):
                self.input_blocks.append(Layers(block(c, c_out)))
                c = c_out
                if size in attention:
                    self.input_blocks[-1].append(attend(c))
                skips.append(c)
            if level < len(levels) - 1:
                self.input_blocks.append(Layers(block(c, c, "down")))
                skips.append(c)
                size //= 2
        self.middle_block = Layers(block(c, c), attend(c), block(c, c))
        for level, c_out in reversed(list(enumerate(levels))):
            for i in range(blocks + 1):
                self.output_blocks.append(Layers(block(c + skips.pop(), c_out)))
                c = c_out
                if size in attention:
                    self.output_blocks[-1].append(attend(c))
                if level and i == blocks:                 # the level's last; the finest level has nowhere to go
                    self.output_blocks[-1].append(block(c, c, "up"))
                    size *= 2
        last = zeroed(nn.Conv2d(c, out_channels * stem ** 2, 3, padding=1))
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), last)

    def forward(self, x, time, label=None, vector=None, layout=None):
        emb = self.time_embed(time_embedding(time, self.channels, self.clock))   # [B, width]
        emb = emb + self.embedded(x, label, vector)
        if self.layout_channels:
            x = torch.cat([x, self.layout_or_null(x, layout)], 1)
        x = F.pixel_unshuffle(x, self.stem)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        return F.pixel_shuffle(self.out(x), self.stem)


class Attention(nn.Module):
    """Self-attention of the U-ViT, without bias in q, k and v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                 # [B, L, D]
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)              # [B, heads, L, D / heads] each
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Pre-norm transformer block; in the second half of the network it first merges the tokens of its mirror block."""

    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):                      # [B, L, D]
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, patch, channels, dim, bias=True):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch, bias=bias)

    def forward(self, x):                                 # [B, C, H, W] -> [B, L, D]
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(ConditionalNet):
    """U-ViT (arXiv 2209.12152): tokens of condition, time and patches, long skips from the first to the second half.

    Label row and vector share the condition token; a layout is embedded per patch and added to the patch tokens.
    """
    ends = ("decoder_pred", "final_layer")                # layers that touch pixels, besides embeddings

    def __init__(self, size, in_channels, out_channels, channels, patch, depth, heads, final_conv=True, num_labels=0,
                 vector_dim=0, layout_channels=0, clock=(0, 1000)):
        super().__init__()
        self.channels, self.patch, self.clock = channels, patch, clock
        self.grid = size // patch
        self.patch_embed = PatchEmbed(patch, in_channels, channels)
        self.add_conditions(num_labels, vector_dim, layout_channels, channels)
        if layout_channels:
            self.layout_embed = PatchEmbed(patch, layout_channels, channels, bias=False)
        self.extras = 1 + bool(num_labels or vector_dim)  # tokens before those of patches: perhaps a condition, time
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.grid ** 2, channels))
        self.in_blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth // 2))
        self.mid_block = Block(channels, heads)
        self.out_blocks = nn.ModuleList(Block(channels, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(channels)
        self.decoder_pred = nn.Linear(channels, patch ** 2 * out_channels)
        self.final_layer = nn.Conv2d(out_channels, out_channels, 3, padding=1) if final_conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if vector_dim:
            nn.init.normal_(self.vector_emb.weight)

    def forward(self, x, time, label=None, vector=None, layout=None):
        tokens = self.patch_embed(x)                      # [B, L, D]
        if self.layout_channels:
            tokens = tokens + self.layout_embed(self.layout_or_null(x, layout))
        front = [time_embedding(time, self.channels, self.clock).to(tokens.dtype)]
        if self.extras == 2:
            front.insert(0, self.embedded(x, label, vector))
        x = torch.cat([torch.stack(front, 1), tokens], 1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x)[:, self.extras:])                     # [B, L, patch * patch * C]
        x = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.grid, self.grid))
        x = x.permute(0, 5, 1, 3, 2, 4)                   # [B, C, grid, patch, grid, patch]
        return self.final_layer(x.flatten(4, 5).flatten(2, 3))


def build_model(model, size, in_channels=3, num_labels=0, vector_dim=0, layout_channels=0, seed=0):
    """The network that section `model` describes, with weights drawn from `seed`."""
    check_model(model, size)
    known = dict(num_labels=num_labels, vector_dim=vector_dim, layout_channels=layout_channels)
    with seeded(seed, "weights"):
        if model.backbone == "uvit":
            return UViT(size, in_channels, in_channels, model.channels, model.patch, model.depth, model.heads,
                        model.final_conv, clock=model.clock, **known)
        return UNet(size, in_channels, in_channels, model.channels, model.mult, model.blocks, model.attention,
                    model.head_channels, model.dropout, model.stem, heads=model.heads, clock=model.clock, **known)


def check_model(model, size):
    """A UserError for what would fail late, or be left out without a word."""
    require(model.channels % 2 == 0, model, "channels", "must be even: time is told in sines and cosines")
    if model.backbone == "uvit":
        fits = size % model.patch == 0 and model.depth % 2 == 0
        require(fits, model, "patch depth", f"size {size} must be a multiple of patch, depth even")
        fits = model.channels % model.heads == 0
        return require(fits, model, "channels heads", "channels must be a multiple of heads")
    require(model.mult, model, "mult", "name at least one level")
    step = model.stem * 2 ** (len(model.mult) - 1)
    require(size % step == 0, model, "stem mult", f"size {size} must be a multiple of {step}")
    sizes = [size // model.stem >> level for level in range(len(model.mult))]
    require(set(sizes).issuperset(model.attention), model, "attention", f"the levels have maps of size {sizes}")
    for m, side in zip(model.mult, sizes):
        c, per_head = int(m * model.channels), model.head_channels
        fits = c % (per_head or model.heads) == 0 or c < per_head                # below: one head
        attends = side in model.attention or side == sizes[-1]
        require(c and (fits or not attends), model, "channels mult head_channels heads",
                f"a level of {c} channels cannot be divided into heads")


def say_network(run, net, channels, size):
    """Print parameters and operations of one forward pass, counted on a copy without data: for --dry-run."""
    blank = torch.empty(1, channels, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(net).to("meta")(blank, torch.empty(1, device="meta"))
    run.say(f"network: {sum(p.numel() for p in net.parameters()):,} parameters, "
            f"{counter.get_total_flops() / 1e9:,.3f} GFLOP forward an image")


# ---------------------------------------------------------------------------------------------------------------------
# Conditions: what the network is told of an image

def layout_of(maps, channels, size):
    """Maps [B, h, w] of 0 ... channels -> one-hot float [B, channels, size, size]; `channels` is null, all zeros."""
    onehot = torch.zeros(len(maps), channels + 1, *maps.shape[1:], device=maps.device)
    onehot.scatter_(1, maps.long()[:, None], 1)
    return F.interpolate(onehot[:, :channels], size=(size, size), mode="nearest")


def with_null(rows, null):
    """A table [n, ...] -> [n + 1, ...]: a last row is added whose values are all `null`."""
    return torch.cat([rows, torch.full_like(rows[:1], null)])


class Condition:
    """A table of n things to tell the network, and a last row, number `null` = n, that tells nothing: the null label K,
    a zero vector, or a map that is `channels` everywhere. A table lists all labels (n = K, row k is label k), or has a
    row for each training image (n images, row i is that of image i).

    kind   label: table int64 [n + 1]; vector: [n + 1, D]; map: [n + 1, h, w] with values 0 ... channels, shown one-hot
           at `size` x `size`, perhaps with labels int64 [n + 1] beside
    """

    def __init__(self, kind, table, channels=0, size=0, labels=None):
        self.kind, self.table, self.labels = kind, table, labels
        self.channels, self.size = channels, size
        self.null = len(table) - 1

    def __call__(self, rows, dropped=None, flip=None):
        """Keyword arguments for the network. rows: int64 [B]; bool [B]: dropped (null instead), flip (mirror maps)."""
        if dropped is not None:
            rows = torch.where(dropped, self.null, rows)
        told = self.table[rows]
        if self.kind == "label":
            return dict(label=told)
        if self.kind == "vector":
            return dict(vector=told.float())
        if flip is not None:
            told = torch.where(flip[:, None, None], told.flip(-1), told)
        layout = dict(layout=layout_of(told, self.channels, self.size))
        return layout if self.labels is None else layout | dict(label=self.labels[rows])

    def bank(self, seed, most=2000):
        """Up to `most` of its rows, drawn at random, to sample with: a checkpoint cannot hold one per image."""
        order = np.random.default_rng(seed_of(seed, "bank")).permutation(self.null)
        rows = torch.from_numpy(np.append(order[:most], self.null))
        labels = None if self.labels is None else self.labels[rows]
        return Condition(self.kind, self.table[rows], self.channels, self.size, labels)

    def to(self, device):
        self.table = self.table.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def state(self):
        """What a checkpoint holds of it."""
        labels = None if self.labels is None else self.labels.cpu()
        return dict(kind=self.kind, table=self.table.cpu(), channels=self.channels, size=self.size, labels=labels)


def load_condition(state, device):
    """The condition to sample a checkpoint's model with; None if it is unconditional.

    Samples ask for its rows, 0 ... null - 1, as often as the checkpoint's `marginal` says.
    """
    if "bank" in state:
        return Condition(**state["bank"]).to(device)
    if state["known"].get("layout_channels"):
        raise UserError(f"{state['file']}: its layouts are known after the training only; train it to its end")
    if state.get("condition") == "prototype":
        prototypes = F.normalize(state["conditioner_ema"]["prototypes"], dim=1)
        return Condition("vector", with_null(prototypes, 0)).to(device)
    K = state["known"].get("num_labels", 0)
    return Condition("label", torch.arange(K + 1)).to(device) if K else None


class Conditioner(nn.Module):
    """What a training tells its network of images. Here nothing; `GivenLabels` tells labels of a file, `Labeller`
    (train_guided.py) labels that it finds.

    `fit` saves such a module beside the network, trains its parameters and logs its report. ema: the averaged network;
    conditioner_ema: the average of this module.
    """
    spare = 0, 0                                          # random numbers that `step` needs besides: uniforms, noises

    def begin(self, run, data, context):
        """Called once before the first step."""

    def step(self, net, ema, conditioner_ema, batch):
        """(a loss of its own or None, keyword arguments of the network for a `Batch`)."""
        return None, {}

    def wanted(self, seen):
        """The norm that the gradient of its loss is to have in the network; None = whatever it is."""

    def after(self, conditioner_ema, beta, norm):
        """Called after an update, to move the average as far as that of the network. norm: of the network's gradient"""

    def report(self, ema, conditioner_ema):
        """What joins a line of the log, a dict."""
        return {}

    def grid(self, ema, conditioner_ema):
        """Keyword arguments of the network for the sample grid, rows of ten; {} = nothing."""
        return {}


class GivenLabels(Conditioner):
    """Labels of a file. of_images: row i is the condition of training image i; of_samples: row k is that of label k, or
    the k-th entry of the `bank`. drop: the probability that the network is told nothing (arXiv 2207.12598).
    """

    def __init__(self, of_images, of_samples, drop):
        super().__init__()
        self.of_images, self.of_samples, self.drop = of_images, of_samples, drop

    def step(self, net, ema, conditioner_ema, batch):
        return None, self.of_images(batch.rows, batch.coin < self.drop, batch.flip)

    def grid(self, ema, conditioner_ema):
        return self.of_samples(ten_of_each(self.of_samples.null).to(self.of_samples.table.device))


def ten_of_each(n, most=12):
    """Up to `most` of the ids 0 ... n - 1, evenly chosen, ten times each."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long().repeat_interleave(10)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

def orthogonalised(m, iterations=5):
    """m [N, rows, columns] = U S V^T -> U V^T, roughly: every singular value moves to between 0.7 and 1.2.

    Newton-Schulz: x -> (a + b G + c G^2) x with G = x x^T acts on each singular value alone. All factors are
    polynomials of the first G, so only small matrices are multiplied until the end. Needs all digits of float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m if m.shape[1] <= m.shape[2] else m.mT           # [N, short, long]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)                    # all singular values in [0, 1]
    gram, product = x @ x.mT, None
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)           # a + b G + c G^2
        product = factor if i == 0 else factor @ product
        if i < iterations - 1:
            gram = factor @ (factor @ gram)
    x = product @ x
    return x if m.shape[1] <= m.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024; arXiv 2502.16982) for parameter groups with `muon=True`, AdamW for the others.

    A hidden weight moves by its orthogonalised momentum, so that all directions in which it can act learn at one
    speed. Convolutions are matrices [out, in * k * k]. With 0.2 sqrt(max(out, in)) updates are as large as AdamW's.
    """
    momentum = 0.95                                       # Nesterov's

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["muon"]:
                continue
            alike = {}                                    # shape of the matrix: weights of that shape, one batch
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), weights in alike.items():
                matrices = torch.stack([self.nesterov(p).flatten(1) for p in weights])              # [N, rows, columns]
                for p, update in zip(weights, orthogonalised(matrices)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-0.2 * group["lr"] * math.sqrt(max(rows, columns)))
                    p.grad = None                         # AdamW passes over what has no gradient
        super().step()

    def nesterov(self, p):
        """Take the gradient of p into its momentum; the gradient that Nesterov's momentum looks ahead to."""
        state = self.state[p]
        if not state:                                     # AdamW expects a step in every state that it loads
            state |= dict(momentum=torch.zeros_like(p), step=torch.tensor(0.0))
        state["momentum"].mul_(self.momentum).add_(p.grad)
        return p.grad.add(state["momentum"], alpha=self.momentum)


def hidden_weights(net):
    """Weights between hidden activations: not the first and last layers, nor embeddings of time and conditions. With
    these, small networks cost nearly twice as much, and no loss was lower."""
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d
    return [m.weight for name, m in net.named_modules()
            if isinstance(m, kinds) and "emb" not in name and not name.startswith(net.ends)]


def build_optimizer(cfg, net, more=()):
    """AdamW, or Muon for hidden weights, of a network and `more` parameters. Norms and biases: no weight decay."""
    hidden = hidden_weights(net) if cfg.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    others = [p for p in [*net.parameters(), *more] if id(p) not in taken]
    groups = [dict(params=[p for p in others if p.dim() > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in others if p.dim() <= 1], weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    first = dict(params=hidden, weight_decay=cfg.weight_decay, muon=True)
    return Muon([first, *(g | dict(muon=False) for g in groups)], lr=cfg.lr)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def fit(run, cfg, net, folder, data, state, conditioner=None):
    """The training loop of both training stages; returns the finished checkpoint.

    net       on the device, at its start; a checkpoint in `folder` takes precedence (resume)
    data      Split to train on
    state     what the checkpoint says besides weights, see `new_state`
    conditioner  decides what the network is told of the images; None = nothing
    """
    path, folder, conditioner = PATHS[cfg.path], Path(folder), conditioner or Conditioner()
    context, dtype, why = autocast(run, cfg.precision)

    # what learns, and averages of it; the same command again resumes
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    learns = list(conditioner.parameters())
    conditioner_ema = copy.deepcopy(conditioner).eval().requires_grad_(False) if learns else conditioner
    optimizer = build_optimizer(cfg, net, learns)
    scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)          # else it does nothing
    saved = dict(net=net, ema=ema, conditioner=conditioner, conditioner_ema=conditioner_ema, optimizer=optimizer,
                 scaler=scaler)
    seen = resume(run, cfg, folder, state, saved)
    if seen >= cfg.images:
        run.say(f"{folder}: done already ({seen:,} images seen)")
        return load_checkpoint(run, str(folder))
    run.say(f"{'resuming at' if seen else 'starting, at'} {seen:,} of {cfg.images:,} images; {len(data):,} training "
            f"images; {why}")
    say_epochs(run, cfg, len(data))
    model = distributed(run, cfg, net.train())
    weights, averages = list(net.parameters()), list(ema.parameters())
    conditioner.begin(run, data, context)
    open_autoencoder(run)                                 # for the sample grids
    local, micro = cfg.batch // run.world, micro_batch(run, cfg)                 # images here: per update, per pass
    loader = batches(run, cfg, data, seen, *conditioner.spare)
    log = Log(run, folder, seen)

    with bar(run, cfg.images, f"{run.stage} {cfg.name}") as progress:
        progress.update(seen)
        while seen < cfg.images:
            # a batch of images, and what the network is told of them
            batch = next(loader)
            if state["model"]["dropout"]:                 # what it drops: a function of (seed, rank, images seen)
                torch.manual_seed(seed_of(cfg.seed, f"dropout {run.rank}", seen))
            own_loss, told = conditioner.step(net, ema, conditioner_ema, batch)

            # gradients. The labeller's loss goes first, through `net`, unseen by DDP: its gradients wait in .grad, and
            # the last pass of `model` makes DDP average the sum; `take_step` averages those of its own parameters
            if own_loss is not None:
                scaler.scale(own_loss).backward()
            labeller_norm = pull(run, weights, scaler.get_scale(), conditioner.wanted(seen))
            losses = []
            for i in range(0, local, micro):
                part = slice(i, i + micro)
                waits = run.world > 1 and i + micro < local                      # DDP exchanges gradients at the last
                with model.no_sync() if waits else nullcontext(), context():
                    loss = loss_per_image(model, path, cfg.predict, batch.x[part], batch.z[part], batch.t[part],
                                          **{name: v[part] for name, v in told.items()})
                    scaler.scale(loss.mean() * micro / local).backward()         # the passes add up to the mean
                losses.append(loss.detach())

            # one update, and the averages
            lr = cfg.lr * min(1.0, (seen + cfg.batch) / max(cfg.warmup, 1))
            norm = take_step(run, cfg, optimizer, scaler, lr, weights, learns)
            log.add(torch.cat(losses), norm, labeller_norm)
            seen += cfg.batch
            half_life = max(min(cfg.ema, cfg.ema_ramp * seen), 1e-9)             # in images; short while few are seen
            beta = 0.5 ** (cfg.batch / half_life)
            get_ema_multi_avg_fn(beta)(averages, weights, None)                  # beta averages + (1 - beta) weights
            conditioner.after(conditioner_ema, beta, norm)
            progress.update(cfg.batch)

            # a line of the log, a picture, a checkpoint, each at its own interval
            saves = due(cfg, seen, cfg.save_every)
            if saves or due(cfg, seen, cfg.log_every):    # an error if the loss is not finite: no broken checkpoint
                log.write(seen, lr, conditioner.report(ema, conditioner_ema), progress)
            if due(cfg, seen, cfg.grid_every):            # before the checkpoint: a kill in between repeats it
                save_pictures(run, cfg, folder, ema, conditioner.grid(ema, conditioner_ema), data, seen, context)
            if saves:
                learned = {name: holder.state_dict() for name, holder in saved.items()}
                save_checkpoint(run, folder, state | learned | dict(seen=seen))
    loader.close()
    return load_checkpoint(run, str(folder))


def take_step(run, cfg, optimizer, scaler, lr, weights, learns):
    """One step of the optimizer; returns the gradient norm of the network's weights. learns: the labeller's."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for p in learns:                                      # DDP knows the network only
        if p.grad is not None:
            run.total(p.grad).div_(run.world)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(weights, cfg.clip or math.inf)
    nn.utils.clip_grad_norm_(learns, cfg.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else norm             # float16 skips a step that overflows


def pull(run, weights, scale, wanted):
    """The norm of the gradient that the labeller's loss has in the network, of all processes' images together, after it
    was brought to `wanted` (None = left as it is); 0 unless sk_grad=backbone. scale: of float16's losses."""
    gradients = [p.grad for p in weights if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=weights[0].device)
    for g in gradients:                                   # DDP then averages what is the same everywhere
        run.total(g).div_(run.world)
    norm = nn.utils.get_total_norm(gradients) / scale
    if wanted is not None:
        for g in gradients:
            g.mul_(wanted / norm.clamp(min=1e-12))
        norm = wanted
    return norm.nan_to_num(0, 0, 0)


def due(cfg, seen, every):
    """Whether the last update passed a multiple of `every` images, or was the last of all."""
    return seen // every > (seen - cfg.batch) // every or seen >= cfg.images


def micro_batch(run, cfg):
    """Images per forward pass of this process: its share of the batch, or `micro` where that is less."""
    local = cfg.batch // run.world
    return min(cfg.micro or local, local)


def check_training(run, cfg):
    """A UserError where a batch cannot be divided among processes and passes."""
    require(cfg.batch % run.world == 0, cfg, "batch", f"must be a multiple of the {run.world} processes")
    local = cfg.batch // run.world
    require(local % micro_batch(run, cfg) == 0, cfg, "micro", f"must divide the {local} images per process and update")


def distributed(run, cfg, net):
    """The network as the loop calls it: over all processes; if asked for, recomputed, compiled."""
    if cfg.recompute:
        recompute(net)
    model = net
    if run.world > 1:                                     # the view: else every gradient is held twice
        devices = [run.device.index] if run.device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)
    if cfg.compile:                                       # around DDP: one graph for each of its buckets, so that late
        torch._dynamo.config.optimize_ddp = not cfg.recompute                    # gradients travel early; PyTorch 2.6
        model = torch.compile(model)                      # cannot split blocks that run again: one graph
    return model


@dataclass
class Batch:
    """This process's part of one update, on the device. Random numbers are a function of (seed, stage, how many images
    came before)."""
    rows: torch.Tensor                                    # int64 [b]: which images
    x: torch.Tensor                                       # [b, C, H, W], mirrored already
    z: torch.Tensor                                       # [b, C, H, W]: the path's noise
    t: torch.Tensor                                       # [b]: times, uniform
    flip: torch.Tensor                                    # bool [b]: mirrored
    coin: torch.Tensor                                    # [b], uniform: decides who is told nothing
    spare_u: torch.Tensor                                 # [b, uniforms]: for the labeller
    spare_z: torch.Tensor                                 # [b, noises, C, H, W]: for the labeller
    seen: int                                             # images before this update


def image_order(seed, purpose, seen, n):
    """Endless dataset rows from image number `seen` on: every epoch a permutation by (seed, purpose, epoch)."""
    epoch, position = divmod(seen, n)
    while True:
        order = np.random.default_rng(seed_of(seed, f"{purpose} order", epoch)).permutation(n)
        yield from order[position:].tolist()
        epoch, position = epoch + 1, 0


def batches(run, cfg, data, seen, uniforms=0, noises=0):
    """Endless `Batch`es from image number `seen` on. A thread prepares the next ones while the network works.

    Of latents, one more noise draws the latent from its distribution.
    """
    images, local = data.inputs, cfg.batch // run.world
    latent = data.latents is not None
    first = run.rank * local                              # of this process, in every batch
    order = image_order(cfg.seed, run.stage, seen, len(images))

    def prepared(number):
        rows = torch.tensor([next(order) for _ in range(cfg.batch)][first:first + local])
        mine = range(number + first, number + first + local)                     # counted as `seen` is
        # u: t, flip, coin, then spare_u. z: the path's noise, then spare_z, then the latent's
        u, z = draw(cfg.seed, run.stage, mine, (1 + noises + latent, *row_shape(images)), 3 + uniforms)
        item = [rows, torch.from_numpy(images[rows.numpy()]), z, u]
        if run.device.type == "cuda":
            item = [v.pin_memory() for v in item]
        return number, item

    for number, item in ahead(prepared, itertools.count(seen, cfg.batch), depth=4):
        rows, x, z, u = (v.to(run.device, non_blocking=True) for v in item)
        flip = (u[:, 1] < 0.5) & cfg.flip
        x = as_input(x, flip, z[:, -1] if latent else None)
        yield Batch(rows, x, z=z[:, 0], t=u[:, 0], flip=flip, coin=u[:, 2], spare_u=u[:, 3:],
                    spare_z=z[:, 1:1 + noises], seen=number)


class Log:
    """Lines of metrics.jsonl. What happens between two stays on the device, so that nobody waits for it."""

    def __init__(self, run, folder, seen):
        self.run, self.folder = run, folder
        self.updates, self.since, self.start = [], seen, time.time()

    def add(self, losses, norm, labeller_norm):
        """An update: losses [n] of its images, the norm of the network's gradient, and of the labeller's part in it."""
        self.updates.append(torch.stack([losses.mean(), norm, labeller_norm]).double())

    def write(self, seen, lr, more, progress):
        """A line with `more` from the labeller, on the screen as well; a UserError unless the loss is finite."""
        loss, norm, labeller_norm = map(float, self.run.total(torch.stack(self.updates).mean(0)) / self.run.world)
        if not math.isfinite(loss + norm + more.get("sk_loss", 0)):
            raise UserError(f"{self.folder}: the loss is not finite after {seen:,} images; the last checkpoint is "
                            "kept. Lower lr, or use precision=fp32")
        seconds = time.time() - self.start
        speed = (seen - self.since) / seconds
        if labeller_norm:
            more["pull"] = labeller_norm / max(norm, 1e-12)
        line = dict(images=seen, loss=loss, grad_norm=norm, lr=lr, seconds=seconds, images_per_second=speed) | more
        if self.run.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        progress.set_postfix(loss=f"{loss:.4f}")
        if progress.disable:
            self.run.say(f"{seen:>12,} images  loss {loss:.4f}  {speed:.0f} images/s",
                         *(f" {name} {value:.3g}" for name, value in more.items() if isinstance(value, float)))
        if "warning" in more:
            self.run.say(f"WARNING: {more['warning']}")
        self.updates, self.since, self.start = [], seen, time.time()


@torch.no_grad()
def preview(net, path, predict, z, steps=25, **condition):
    """Quick pictures by DDIM: x = alpha(end) x_hat + sigma(end) z_hat in even steps of t."""
    x = z
    for t, end in itertools.pairwise(torch.linspace(0, 1, steps + 1)):
        t = t.expand(len(x)).to(x)
        x_hat, z_hat = to_x_and_z(path, predict, net(x, 1000 * t, **condition), x, t)
        x = path.alpha(end).to(x) * x_hat + path.sigma(end).to(x) * z_hat
    return x


def save_pictures(run, cfg, folder, ema, told, data, seen, context):
    """samples/<images seen>.png: previews by the averaged network, no more at once than in training."""
    if run.rank == 0:
        n = len(next(iter(told.values()))) if told else 64
        noise = draw(cfg.seed, "grid", range(n), row_shape(data.inputs)).to(run.device)
        micro, drawn = micro_batch(run, cfg), []
        for i in range(0, n, micro):
            part = slice(i, i + micro)
            with context():
                drawn.append(preview(ema, PATHS[cfg.path], cfg.predict, noise[part],
                                     **{name: v[part] for name, v in told.items()}))
        pictures = to_uint8(decode(run.vae, torch.cat(drawn))).cpu().numpy()
        save_grid(folder / "samples" / f"{seen:010d}.png", pictures, 10 if told else 8,
                  head=f"{run.stage} {cfg.name}: {seen:,} images, averaged weights")
    run.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain types only, so that weights_only=True reads them and they rebuild the model alone

FORMAT = 3                                                # raised when older checkpoints can no longer be read
REQUIRED = dict(net=dict, ema=dict, model=dict, known=dict, config=dict, size=int, channels=int, num_labels=int,
             seen=int, path=str, predict=str, weights=str)                       # what every checkpoint has
MAY_CHANGE = {"name", "images", "log_every", "save_every", "grid_every", "overwrite", "micro", "compile", "recompute"}


def new_state(run, kind, data, size, channels, **more):
    """What a checkpoint says besides weights. known: what the network can be told, as keywords of `build_model`;
    marginal: how common each id is."""
    cfg = run.cfg
    return dict(format=FORMAT, kind=kind, model=dataclasses.asdict(run.model), size=size, channels=channels,
                known={}, num_labels=0, marginal=None, path=cfg.path, predict=cfg.predict,
                data=data.info["fingerprint"],
                config={k: run.sections[k] for k in ("data", "model", run.stage)}) | more


def save_checkpoint(run, folder, state):
    """checkpoint.pt and .json in `folder`, by the first process; the old ones stay until the new are there."""
    if run.rank == 0:
        file = Path(folder) / "checkpoint.pt"
        state = state | dict(weights=weights_hash(state["ema"], state["model"]))
        save_torch(file, state)
        names = "kind", "seen", "weights", "num_labels", "path", "predict", "data", "model", "config"
        write_json(file.with_suffix(".json"), {name: state[name] for name in names})
    run.wait()


def load_checkpoint(run, name):
    """Checkpoint `name`, a folder of the run such as diffusion/base or a path to a .pt, as a dict on the CPU."""
    places = run.dir / name / "checkpoint.pt", Path(name) / "checkpoint.pt", Path(name)
    file = next((p for p in places if p.is_file()), None)
    if file is None:                                      # a link that leads nowhere, a folder: the place itself
        file = next((p for p in places[:2] if p.is_symlink() or p.exists()), places[0])
        raise UserError(f"{file}: no such checkpoint; train it first (published weights: train_diffusion.py "
                        "imported=adm:FILE)")
    hint = "made by train_diffusion.py and train_guided.py: train again (published weights: imported=adm:FILE)"
    with reading(file, hint):
        state = read_torch(file, hint)
        if state.get("format") != FORMAT:
            raise ValueError(f"checkpoint format {state.get('format')}, this code reads {FORMAT}")
        wrong = [name for name, kind in REQUIRED.items() if not isinstance(state.get(name), kind)]
        if wrong:
            raise ValueError(f"no {', '.join(wrong)}")
        if state["path"] not in PATHS or state["predict"] not in ("v", "eps", "x"):
            raise UserError(f"{file}: this code knows no path={state['path']}, predict={state['predict']}")
        return state | {"file": str(file)}


def load_model(run, name):
    """(network in eval mode on the run's device, checkpoint) from the checkpoint alone, averaged weights. To be called
    by all processes."""
    state = load_checkpoint(run, name)
    if len(set(run.gather(state["weights"]))) > 1:
        raise UserError(f"{state['file']}: was replaced while it was read; give the command again")
    with reading(state["file"], "train again"):
        model = fill("model", Model, state["model"])
        net = build_model(model, state["size"], state["channels"], **state["known"])
        net.load_state_dict(state["ema"])
    return net.eval().requires_grad_(False).to(run.device), state


def resume(run, cfg, folder, state, saved):
    """Load the checkpoint in `folder`, if any, into `saved`; its images seen. Another recipe: refused, overwritten."""
    seen, file = 0, folder / "checkpoint.pt"
    if run.agreed(lambda: file.exists() or file.is_symlink()):                   # of a disk that is not there now
        old = load_checkpoint(run, str(folder))
        with reading(old["file"], "train again"):
            other = differences(run, cfg, old, state)
        if other and not cfg.overwrite:
            raise UserError(f"{folder}: was made with {'; '.join(other[:3])}. Choose another name=, or overwrite=true "
                            "to start again")
        if not other:
            seen = old["seen"]
            with reading(old["file"], "train again"):
                for name, holder in saved.items():
                    holder.load_state_dict(old[name])
        elif run.rank == 0:                               # else a kill would leave it with another training's log
            file.with_suffix(".json").unlink(missing_ok=True)
            file.unlink()
    if run.rank == 0 and seen < cfg.images:
        forget(folder, seen)
    return seen


def differences(run, cfg, old, state):
    """In what two checkpoints of one name differ that decides about the result, in words."""
    out = []
    for section, cls in (("model", Model), (run.stage, type(cfg))):
        was = dataclasses.asdict(cls()) | old["config"].get(section, {})
        for name, value in state["config"][section].items():
            if was.get(name) != value and name not in MAY_CHANGE:
                out.append(f"{section}.{name}={was.get(name)}, now {value}")
    names = dict(data="images", labels_hash="labels", layout_hash="layouts", init="initial weights")
    return out + [f"other {what}" for name, what in names.items() if old.get(name) != state.get(name)]


def forget(folder, seen):
    """Remove log lines and pictures of more than `seen` images, which a run left that was killed or is replaced."""
    for half in folder.glob(".*.tmp"):                    # of a save that was killed: as large as a checkpoint
        half.unlink()
    log = folder / "metrics.jsonl"
    with reading(log, "delete it"), atomic(log) as f:
        for line in log.read_text().splitlines() if log.exists() else []:
            if line.endswith("}") and json.loads(line)["images"] <= seen:        # a kill may have cut the last one
                f.write(f"{line}\n".encode())
    (folder / "labels.npz").unlink(missing_ok=True)       # found by earlier weights
    for picture in (folder / "samples").glob("*.png"):
        if picture.stem > f"{seen:010d}":
            picture.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Published weights, written once as an ordinary checkpoint

def import_published(run, cfg):
    """Write the weights that imported= names as the checkpoint diffusion/<name>, as if it had been trained here.

    adm: U-Nets of guided-diffusion (arXiv 2105.05233); uvit: U-ViTs (arXiv 2209.12152). Section `model` is theirs.
    """
    kind, _, file = cfg.imported.partition(":")
    require(kind in ("adm", "uvit"), cfg, "imported", "must be adm:FILE or uvit:FILE")
    channels, size = input_shape(run)
    path, clock = "vp", [999.0, -1000.0]                  # of ADM. All of them predict eps
    if kind == "uvit":                                    # the H models, without a last convolution, count 1000 steps
        path, clock = ("vp-sde", [999.0, -999.0]) if run.model.final_conv else ("vp-sd", [1000.0, -1000.0])
    model = dataclasses.replace(run.model, clock=clock)
    null = kind == "uvit" and channels == 4               # on latents their last class is the null label
    hint = (f"imported= takes the weights of a published {kind} model that section `model` describes; checkpoints of "
            "train_diffusion.py are named by checkpoint= or init= of later stages")
    with reading(file, hint):
        w = {k: v.float() for k, v in read_torch(file, hint).items()}
        if kind == "adm":                                 # the second half is a variance, which an ODE does not need
            w |= {k: w[k][:channels] for k in ("out.2.weight", "out.2.bias")}
        if kind == "adm" and model.mult == [1, 2, 3, 4]:  # no tensor tells that
            raise ValueError("ImageNet 64 x 64: has cosine betas and another order of q, k and v")
        table = w.get("label_emb.weight")                 # [K or K + 1, width]
        if table is not None and not null:                # the mean of all classes is the nearest thing to no class
            w["label_emb.weight"] = table = torch.cat([table, table.mean(0, keepdim=True)])
        K = 0 if table is None else len(table) - 1
        with torch.device("meta"):
            net = build_model(model, size, channels, num_labels=K)
        net.load_state_dict(w, assign=True)               # names and shapes must fit
    folder = run.dir / "diffusion" / cfg.name
    state = dict(format=FORMAT, kind=f"published {kind}", net=w, ema=w, model=dataclasses.asdict(model), size=size,
                 channels=channels, known=dict(num_labels=K), num_labels=K, marginal=None, null=null, path=path,
                 predict="eps", data=None, config=dict(model=dataclasses.asdict(model)), seen=0)
    if K:
        run.say(f"note: {file} was trained with {K} classes: what is found in its features is not free of annotation")
        state |= dict(marginal=torch.full((K,), 1 / K, dtype=torch.float64), labels="published", condition="label",
                      label_file="published classes")
    if run.dry_run:
        return run.say(f"would be written to {folder}")
    with locked(run, "diffusion", cfg.name):
        done = dict(weights=weights_hash(w, state["model"]), path=path)
        if not run.agreed(lambda: finished(run, folder / "checkpoint.json", done, [folder / "checkpoint.pt"])):
            if run.rank == 0:
                forget(folder, 0)                         # the log of a training of this name
            save_checkpoint(run, folder, state)
    run.next(f"extract_features.py checkpoint=diffusion/{cfg.name}", "reads it, after train_diffusion.py --prepare")


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def main():
    """Train without labels, from the command line."""
    run = start("train_diffusion", TrainDiffusion, __doc__, needs_data=lambda cfg: False,
                flags={"--prepare": "only turn the source into data/"})
    cfg = run.cfg
    if "--prepare" in run.flags:                          # the data alone
        run.agreed(lambda: check_source(run))
        return run.say(f"would prepare the images in {run.dir / 'data'}") if run.dry_run else prepare_data(run)
    if cfg.imported:
        return import_published(run, cfg)
    check_training(run, cfg)
    folder = run.dir / "diffusion" / cfg.name

    # network
    channels, size = input_shape(run)
    net = build_model(run.model, size, channels, seed=cfg.seed)
    if run.dry_run:
        run.agreed(lambda: check_source(run))
        return say_training(run, cfg, net, channels, size, folder)

    # data: any source becomes arrays, row i is image i from here on
    prepare_data(run)
    data = load_data(run, "train")

    # train; the checkpoint alone rebuilds the model
    state = new_state(run, "diffusion", data, size, channels)
    with locked(run, "diffusion", cfg.name):
        fit(run, cfg, net.to(run.device), folder, data, state)

    # close
    run.say(f"model in {folder}, sample grids in {folder / 'samples'}")
    name = "" if cfg.name == "base" else f" checkpoint=diffusion/{cfg.name}"
    run.next("probe.py" + name, "finds the block and time whose features cluster best")


def say_training(run, cfg, net, channels, size, folder):
    """What a training would do, for --dry-run."""
    say_network(run, net, channels, size)
    megabytes = 16 * sum(p.numel() for p in net.parameters()) / 1e6              # weights, averages, two moments
    run.say(f"{math.ceil(cfg.images / cfg.batch):,} updates of {cfg.batch} images; {megabytes:.0f} MB in {folder}")
    about = run.dir / "data" / "train" / "info.json"
    if about.exists():                                    # the number of images is known when they are prepared
        say_epochs(run, cfg, read_json(about, "prepare the images again")["count"])


def say_epochs(run, cfg, n):
    """Warn of a length that was meant for many more than the n training images."""
    epochs = cfg.images / n
    if epochs > 1000:
        run.say(f"note: {run.stage}.images={cfg.images:,} are {epochs:,.0f} epochs of {n:,} training images, which the "
                f"model may learn by heart: try images={200 * n} (200 epochs), or use more images")


if __name__ == "__main__":
    cli(main)

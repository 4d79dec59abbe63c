"""Train without labels: images in, an unconditional diffusion (flow) model out.

Reads   images: procedural `shapes`, a torchvision set, a folder, or uint8 arrays (`data.source`)
Writes  runs/<run>/config.yaml, data/{train,test}/ (uint8 arrays) and diffusion/<name>/ (checkpoint.pt, metrics.jsonl, samples/)
Time    t = 0 is noise, t = 1 is data, everywhere in this project: x_t = alpha(t) x + sigma(t) z.

    python train_diffusion.py configs/shapes.yaml                                # CPU, about three minutes
    python train_diffusion.py configs/cifar10.yaml                               # one GPU
    torchrun --nproc_per_node=8 train_diffusion.py configs/cifar10.yaml          # eight GPUs, the same global batch
    python train_diffusion.py configs/imagenet256-adm.yaml                       # published weights as diffusion/<name>
    python train_diffusion.py configs/imagenet256-adm.yaml --prepare             # the data alone, for later stages

The same command again resumes. To learn the method, read `ConstantVelocity`, `loss_per_image`, `UNet`, `Muon`, `fit` and `main`; settings, run
folder and files are in configs/run.py, images in configs/data.py. The later stages import this file.
"""
import copy
import dataclasses
import itertools
import json
import math
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
import torch.distributed as dist
from torch.nn import functional as F
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

from configs.data import (as_input, decode, input_shape, load_data, open_autoencoder, prepare_data, require_shape,
                          row_shape, source_counts)
from configs.run import (Model, UserError, ahead, atomic, autocast, bar, cli, draw, fill, finished, key, locked,
                         read_torch, reading, require, save_grid, seed_of, seeded, start, to_uint8, weights_hash, wide,
                         write_json)


FORMAT = 1                                                # of checkpoints; raised when older ones can no longer be read


@dataclass
class Training:
    """Keys shared by the two training stages. Durations are images seen; batches are global, whatever the number of processes."""
    images: int = key(20_000_000, "images seen in all; more may be asked for later")
    batch: int = key(128, "images per update over all processes")
    micro: int = key(0, "at most so many images per forward pass and process; 0 = no gradient accumulation")
    path: Literal["cv", "vp", "vp-cosine", "vp-sd", "vp-sde"] = key("cv",
        "constant velocity; variance preserving: linear, cosine, Stable Diffusion's betas, score SDE")
    predict: Literal["v", "eps", "x"] = key("v", "what the network predicts")
    times: Literal["uniform", "logit_normal"] = key("uniform", "how t is drawn")
    min_snr: float = key(0.0, "> 0: min-SNR loss weighting with this gamma")
    optimizer: Literal["adamw", "muon"] = key("adamw",
                                              "muon: orthogonalised updates of the hidden weights; several times "
                                              "faster in short trainings")
    lr: float = key(2e-4, "never rescaled by batch or processes")
    weight_decay: float = key(0.0, "of matrices and convolutions, decoupled")
    warmup: int = key(10_000, "images over which lr rises linearly")
    clip: float = key(1.0, "gradient norm limit; 0 = none")
    ema: int = key(500_000, "half-life, in images, of the averaged weights")
    ema_ramp: float = key(0.05, "but never longer than this share of the images seen so far")
    flip: bool = key(True, "mirror images at random")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "auto = bf16 where the hardware has it")
    compile: bool = key(False, "torch.compile the network")
    recompute: bool = key(False,
                          "keep the inputs of blocks only and compute the rest again when going back: less memory, a "
                          "third more work")
    log_every: int = key(10_000, "images between lines of metrics.jsonl")
    save_every: int = key(500_000, "images between checkpoints")
    grid_every: int = key(500_000, "images between sample grids (fixed noise, averaged weights)")
    seed: int = key(0, "of weights, order, noise, times and flips")
    overwrite: bool = key(False, "throw away results that another recipe left under this name")


@dataclass
class TrainDiffusion(Training):
    """Section `train_diffusion`."""
    name: str = key("base", "results go to diffusion/<name>")
    imported: str = key("", "adm:FILE or uvit:FILE: only write these published weights as diffusion/<name>")


RESUMABLE = {"images", "log_every", "save_every", "grid_every", "overwrite", "micro", "compile", "recompute"}   # may change on resume


# ---------------------------------------------------------------------------------------------------------------------
# Noise paths: x_t = alpha(t) x + sigma(t) z with t = 0 noise, t = 1 data

class ConstantVelocity:
    """Straight path of constant velocity (arXiv 2312.08825): alpha = t, sigma = 1 - c t, dx_t/dt = x - c z, with c = 1 - 1e-4."""
    c = 1 - 1e-4

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - self.c * t

    def v_target(self, x, z, t):
        """What a v-prediction learns: here the velocity itself."""
        return x - self.c * z

    def from_v(self, v, x_t, t):
        """(x_hat, z_hat) from a predicted v; exact identities."""
        z = x_t - t * v
        return v + self.c * z, z

    # The ODE is dy/ds = slope in the variables (y, s): here simply y = x_t, s = t
    def clock(self, t):
        return t

    def time(self, s):
        return s

    def scale(self, t):
        """x_t = scale(t) * y."""
        return torch.ones_like(t)

    def slope(self, x_hat, z_hat):
        return x_hat - self.c * z_hat


class VariancePreserving:
    """DDPM's linear betas (1e-4 ... 0.02, 1000 steps) read on the clock t_ddpm = 1000 (1 - t); alpha^2 + sigma^2 = 1.

    Its velocity in t is singular at the data end; the ODE is solved as dy/drho = z_hat with y = x_t / alpha and rho = sigma / alpha,
    in which an Euler step is exactly DDIM (eta = 0).
    """

    def __init__(self, schedule="linear"):
        """Other schedules on the same clock: cosine (arXiv 2102.09672), sd (Stable Diffusion: even steps in sqrt(beta)), sde (2011.13456: beta from 0.1 to 20)."""
        u, self.copies = torch.arange(1001, dtype=torch.float64) / 1000, {}
        if schedule == "sde":
            self.table = -(0.1 * u + 9.95 * u ** 2)       # ln abar after 0, 1, ..., 1000 steps
            return
        falling = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = {"linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), "sd": torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2,
                 "cosine": (1 - falling[1:] / falling[:-1]).clamp(max=0.999)}[schedule]
        self.table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])

    def on(self, device):
        """The table there; copied once, since a copy makes a GPU wait."""
        if device not in self.copies:
            self.copies[device] = self.table.to(device)
        return self.copies[device]

    def log_abar(self, t):
        """ln of the product of (1 - beta), interpolated between the 1000 steps. t: [...] -> same shape, float64."""
        u = (1000 * (1 - t.double())).clamp(0, 1000)
        k = u.floor().clamp(max=999).long()
        low, high = (self.on(t.device).take(i) for i in (k, k + 1))            # table[k] of a single k would make a GPU wait
        return low + (u - k) * (high - low)

    def alpha(self, t):
        return (0.5 * self.log_abar(t)).exp().to(t.dtype)

    def sigma(self, t):
        return (-torch.expm1(self.log_abar(t))).sqrt().to(t.dtype)

    def v_target(self, x, z, t):
        """Angular velocity alpha z - sigma x (Salimans and Ho, arXiv 2202.00512)."""
        return self.alpha(t) * z - self.sigma(t) * x

    def from_v(self, v, x_t, t):
        a, s = self.alpha(t), self.sigma(t)
        return a * x_t - s * v, s * x_t + a * v

    def clock(self, t):
        """rho = sigma / alpha, falling from 157 at t = 0 to 0 at t = 1."""
        return torch.expm1(-self.log_abar(t)).sqrt().to(t.dtype)

    def time(self, s):
        """Inverse of `clock`: ln abar = -ln(1 + rho^2), looked up in the (falling) table."""
        table, y = self.on(s.device), -torch.log1p(s.double() ** 2)
        k = (torch.searchsorted(-table, -y) - 1).clamp(0, 999)
        return (1 - (k + (y - table[k]) / (table[k + 1] - table[k])) / 1000).clamp(0, 1).to(s.dtype)

    def scale(self, t):
        return self.alpha(t)

    def slope(self, x_hat, z_hat):
        return z_hat


PATHS = {"cv": ConstantVelocity(), "vp": VariancePreserving(), **{f"vp-{s}": VariancePreserving(s) for s in ("cosine", "sd", "sde")}}


def diffuse(path, x, z, t):
    """x_t = alpha(t) x + sigma(t) z. x, z: [B, C, H, W]; t: [B]."""
    return wide(path.alpha(t)) * x + wide(path.sigma(t)) * z


def estimates(path, predict, out, x_t, t):
    """(x_hat, z_hat) from what the network predicts. Affine in `out`, so guidance may mix outputs first. x_t: [B, C, H, W]; t: [B]."""
    out, t = out.to(x_t.dtype), wide(t)
    if predict == "v":
        return path.from_v(out, x_t, t)
    a, s = path.alpha(t), path.sigma(t)                   # at an end of the path the other part is not determined: do not divide the network's error by nothing
    return ((x_t - s * out) / a.clamp(min=0.005), out) if predict == "eps" else (out, (x_t - a * out) / s.clamp(min=0.02))


def loss_per_image(net, path, predict, x, z, t, min_snr=0.0, **condition):
    """Mean squared error of the network's prediction, [B]; optionally weighted by min(SNR, gamma) (arXiv 2303.09556)."""
    target = {"v": path.v_target, "eps": lambda x, z, t: z, "x": lambda x, z, t: x}[predict](x, z, wide(t))
    error = (net(diffuse(path, x, z, t), 1000 * t, **condition).float() - target).square().flatten(1).mean(1)
    if min_snr:                                           # an error d of x_hat is d / sigma in v and d alpha / sigma in eps, on both paths
        snr = (path.alpha(t) / path.sigma(t)).square().clamp(1e-8, 1e8)
        error = error * snr.clamp(max=min_snr) * {"v": path.sigma(t).square(), "eps": 1 / snr, "x": torch.ones_like(t)}[predict]
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Backbones. forward(x [B, C, H, W], time [B] = 1000 t, label [B], vector [B, D], layout [B, L, H, W]) -> [B, C', H, W].
# Conditions may be absent; null is: label num_labels, vector of zeros, layout of zeros. Module names are those of the published weights.

def time_embedding(t, width, clock=(0, 1000), closed=False):
    """Sinusoidal embedding of network time. t: [B] in 0 ... 1000 -> [B, width], cosines first, as published for ADM and U-ViT.

    clock: (a, b), the time as it is embedded is a + b t / 1000. Frequencies fall from 1 towards 1e-4; `closed`: and reach it, as published for DDPM.
    """
    if tuple(clock) != (0, 1000):
        t = clock[0] + clock[1] / 1000 * t.float()
    freqs = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2 - closed))
    angles = t.float()[:, None] * freqs                                          # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], 1)


def zeroed(module):
    """Start a residual branch at zero, so that a fresh block is the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels, eps=1e-5):
    """ADM's 32 groups; fewer below 128 channels, where groups of one channel would erase what the channel says."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps)


class ResBlock(nn.Module):
    """ADM residual block: norm, SiLU, conv, twice; the embedding scales and shifts the second norm, or is `added` before it; optional 2x resampling inside."""

    def __init__(self, c_in, c_out, width, dropout=0.0, resample=None, added=False, eps=1e-5):
        super().__init__()
        self.resample, self.added = resample, added       # None, "down" or "up"
        self.in_layers = nn.Sequential(group_norm(c_in, eps), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, c_out if added else 2 * c_out))
        self.out_layers = nn.Sequential(group_norm(c_out, eps), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def resized(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x, emb):                            # x: [B, C, H, W], emb: [B, width]
        (norm, act, conv), (norm2, act2, dropout, conv2) = self.in_layers, self.out_layers
        h, e = conv(self.resized(act(norm(x)))), self.emb_layers(emb)[:, :, None, None]
        if self.added:                                    # e: [B, C', 1, 1]
            h = norm2(h + e)
        else:
            scale, shift = e.chunk(2, 1)                  # [B, C', 1, 1] each
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        return self.skip_connection(self.resized(x)) + conv2(dropout(act2(h)))


class Resample(nn.Module):
    """A convolution that halves maps, or that follows when they are doubled: what DDPM has in place of resampling residual blocks."""

    def __init__(self, channels, resample, behind=False):
        super().__init__()
        self.resample, self.behind = resample, behind     # "down" or "up"; behind: zeros right and below only, else around
        self.op = nn.Conv2d(channels, channels, 3, *(2, 0 if behind else 1) if resample == "down" else (1, 1))

    def forward(self, x):                                 # [B, C, H, W]
        if self.resample == "up":
            return self.op(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.behind else x)


def again(f, *args):
    """f(*args), of which the backward pass keeps the arguments only and computes the rest once more."""
    return torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False) if torch.is_grad_enabled() else f(*args)


def plainly(f, *args):
    """f(*args): what `again` is instead of."""
    return f(*args)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, [B, heads, L, d] each. The backward pass keeps no scores.

    PyTorch's fused operation, but for training in bfloat16 on CPUs, where it takes up to four times as long as these products and their recomputation
    (64 positions; 1.5 times at 257, as long at 500: `python tests/bench_attention.py`).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < 500 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(lambda q, k, v: (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v, q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(nn.Module):
    """ADM self-attention over all positions of a map, with a residual connection."""

    def __init__(self, channels, heads, eps=1e-5):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)   # per head, its q, k and v lie together
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):                                 # [B, C, H, W]
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).reshape(B, C, H * W))                        # [B, 3C, HW]
        qkv = qkv.reshape(B, self.heads, 3, C // self.heads, H * W).transpose(3, 4).contiguous()                 # else the scores of all pairs would be kept
        q, k, v = qkv.unbind(2)                                                  # [B, heads, HW, C / heads] each
        a = attention(q, k, v)                                                   # [B, heads, HW, C / heads]
        return x + self.proj_out(a.transpose(2, 3).reshape(B, C, H * W)).reshape(B, C, H, W)


class UNet(nn.Module):
    """The ADM U-Net (arXiv 2105.05233): scale-shift residual blocks, residual resampling, attention at chosen map sizes.

    A label row or a vector is added to the time embedding; a layout is concatenated to the input. `style` ddpm and `resample` conv make it DDPM's,
    ddae differs from that in eps, padding and the groups of the last norm.
    """
    run_block = staticmethod(plainly)                     # or `again`: activation checkpointing, block by block
    ends = ("input_blocks.0.", "out.", "vector_emb")      # layers that touch pixels or conditions

    def __init__(self, size, in_channels, out_channels, channels, mult, blocks, attention, head_channels, dropout=0.0, stem=1,
                 num_labels=0, vector_dim=0, layout_channels=0, heads=0, clock=(0, 1000), style="adm", resample="block"):
        super().__init__()
        self.channels, self.stem, self.num_labels, self.layout_channels, self.clock = channels, stem, num_labels, layout_channels, clock
        self.vector_dim, self.added = vector_dim, style != "adm"
        mult, eps = [int(m * channels) for m in mult], 1e-6 if style == "ddpm" else 1e-5
        width, size, c = 4 * channels, size // stem, channels if self.added else mult[0]
        block = lambda c_in, c_out, way=None: ResBlock(c_in, c_out, width, dropout, way, self.added, eps)
        moved = lambda c, way: block(c, c, way) if resample == "block" else Resample(c, way, behind=style == "ddpm")
        attend = lambda c: AttentionBlock(c, heads or max(1, c // head_channels), eps)
        self.time_embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        if num_labels:
            self.label_emb = nn.Embedding(num_labels + 1, width)                 # rows N(0, 1), as published; the last is the null label
        if vector_dim:
            self.vector_emb = nn.Linear(vector_dim, width, bias=False)           # without bias, so that the zero vector is null
            nn.init.normal_(self.vector_emb.weight)                              # a unit vector then weighs as much as a label row
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d((in_channels + layout_channels) * stem ** 2, c, 3, padding=1)])])
        self.output_blocks, skips = nn.ModuleList(), [c]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList([block(c, m)]))
                c = m
                if size in attention:
                    self.input_blocks[-1].append(attend(c))
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([moved(c, "down")]))
                skips.append(c)
                size //= 2
        self.middle_block = nn.ModuleList([block(c, c), attend(c), block(c, c)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                self.output_blocks.append(nn.ModuleList([block(c + skips.pop(), m)]))
                c = m
                if size in attention:
                    self.output_blocks[-1].append(attend(c))
                if level and i == blocks:
                    self.output_blocks[-1].append(moved(c, "up"))
                    size *= 2
        self.out = nn.Sequential(nn.GroupNorm(8, c) if style == "ddae" else group_norm(c, eps), nn.SiLU(), zeroed(nn.Conv2d(c, out_channels * stem ** 2, 3, padding=1)))

    def forward(self, x, time, label=None, vector=None, layout=None):
        emb = self.time_embed(time_embedding(time, self.channels, self.clock, self.added))               # [B, width]
        if self.num_labels:
            emb = emb + self.label_emb(label if label is not None else time.new_full((len(x),), self.num_labels, dtype=torch.long))
        if self.vector_dim:                               # what is not given is null
            emb = emb + self.vector_emb(vector if vector is not None else emb.new_zeros(len(x), self.vector_dim))
        if self.layout_channels:
            x = torch.cat([x, layout if layout is not None else x.new_zeros(len(x), self.layout_channels, *x.shape[2:])], 1)

        def layers(block, x, emb):
            for layer in block:
                x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
            return x

        x, skips = F.pixel_unshuffle(x, self.stem), []
        for block in self.input_blocks:
            x = self.run_block(layers, block, x, emb)
            skips.append(x)
        x = self.run_block(layers, self.middle_block, x, emb)
        for block in self.output_blocks:
            x = self.run_block(layers, block, torch.cat([x, skips.pop()], 1), emb)
        return F.pixel_shuffle(self.out(x), self.stem)


class Attention(nn.Module):
    """Self-attention of the U-ViT, without bias in q, k and v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):                                 # [B, L, D]
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)       # [B, heads, L, D / heads] each
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    """Feed-forward part of a transformer block."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; in the second half of the network it first merges the tokens of its mirror block."""

    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim), Mlp(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):
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


class UViT(nn.Module):
    """U-ViT (arXiv 2209.12152): condition token, time token and patch tokens, with long skips from the first to the second half.

    Label row and vector share the condition token; a layout is embedded per patch and added to the patch tokens. Behind condition and time there may be
    registers: tokens that are the same for all inputs, a row of pos_embed each.
    """
    run_block = staticmethod(plainly)                     # or `again`: activation checkpointing, block by block
    ends = ("patch_embed", "layout_embed", "vector_emb", "decoder_pred", "final_layer")       # layers that touch pixels or conditions

    def __init__(self, size, in_channels, out_channels, channels, patch, depth, heads, final_conv=True, num_labels=0, vector_dim=0, layout_channels=0,
                 clock=(0, 1000), registers=0):
        super().__init__()
        self.registers, self.vector_dim, self.layout_channels = registers, vector_dim, layout_channels
        self.clock, self.channels, self.patch, self.num_labels, self.out_channels, self.grid = clock, channels, patch, num_labels, out_channels, size // patch
        self.patch_embed = PatchEmbed(patch, in_channels, channels)
        if num_labels:
            self.label_emb = nn.Embedding(num_labels + 1, channels)
        if vector_dim:
            self.vector_emb = nn.Linear(vector_dim, channels, bias=False)
        if layout_channels:
            self.layout_embed = PatchEmbed(patch, layout_channels, channels, bias=False)
        self.extras = 1 + registers + bool(num_labels or vector_dim)             # time, registers, and perhaps a condition
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
        tokens = self.patch_embed(x)                                             # [B, L, D]
        if self.layout_channels:                          # what is not given is null
            tokens = tokens + self.layout_embed(layout if layout is not None else x.new_zeros(len(x), self.layout_channels, *x.shape[2:]))
        front = [time_embedding(time, self.channels, self.clock).to(tokens.dtype)]
        front += [torch.zeros_like(front[0])] * self.registers
        if self.extras > len(front):
            cond = torch.zeros_like(front[0])
            if self.num_labels:
                cond = cond + self.label_emb(label if label is not None else time.new_full((len(x),), self.num_labels, dtype=torch.long))
            if self.vector_dim:
                cond = cond + self.vector_emb(vector if vector is not None else cond.new_zeros(len(x), self.vector_dim))
            front.insert(0, cond)
        x = torch.cat([torch.stack(front, 1), tokens], 1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self.run_block(block, x)
            skips.append(x)
        x = self.run_block(self.mid_block, x)
        for block in self.out_blocks:
            x = self.run_block(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x)[:, self.extras:])                     # [B, L, patch * patch * C]
        x = x.reshape(len(x), self.grid, self.grid, self.patch, self.patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(x.reshape(len(x), self.out_channels, self.grid * self.patch, self.grid * self.patch))


def build_model(model, size, in_channels=3, num_labels=0, vector_dim=0, layout_channels=0, seed=0):
    """The network that section `model` describes, with weights drawn from `seed`; impossible combinations are UserErrors."""
    condition = dict(num_labels=num_labels, vector_dim=vector_dim, layout_channels=layout_channels, clock=model.clock)
    require(len(model.clock) == 2, model, "clock", "two numbers a, b: the network is told a + b t")
    with seeded(seed, "weights"):
        if model.backbone == "uvit":
            if size % model.patch or model.channels % model.heads or model.depth % 2 or model.channels % 2:
                raise UserError(f"model: size {size} must be a multiple of patch={model.patch}, channels={model.channels} of heads={model.heads}; "
                                f"channels and depth={model.depth} even")
            return UViT(size, in_channels, in_channels, model.channels, model.patch, model.depth, model.heads, model.final_conv, **condition)
        if size % (step := model.stem * 2 ** (len(model.mult) - 1)):
            raise UserError(f"model: size {size} must be a multiple of {step} (stem={model.stem}, {len(model.mult)} levels in mult)")
        widths, per_head = [m * model.channels for m in model.mult], f"head_channels={model.head_channels}" if model.head_channels else f"heads={model.heads}"
        if model.channels % 8 or any(c <= 0 or c % 8 or c % (min(c, model.head_channels) or model.heads or 1) for c in widths):
            raise UserError(f"model: channels={model.channels} must be a multiple of 8, and of {per_head} at every level")
        sizes = [size // model.stem // 2 ** level for level in range(len(model.mult))]
        if stray := [a for a in model.attention if a not in sizes]:
            raise UserError(f"model: attention={','.join(map(str, stray))}: no level has maps of that size; here they have {', '.join(map(str, sizes))}")
        return UNet(size, in_channels, in_channels, model.channels, model.mult, model.blocks, model.attention, model.head_channels,
                    model.dropout, model.stem, heads=0 if model.head_channels else model.heads, **condition)


def hidden_weights(net):
    """Weights of linear and convolutional layers between hidden activations: not those of the first and the last layer, nor embeddings of conditions."""
    return [m.weight for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and not name.startswith(net.ends)]


def placed(net, device, compiled=False):
    """`net` on the device, in the memory layout that suits it: U-Nets that a GPU runs compiled are channels-last.

    Not compiled they are not, since PyTorch's own group normalisation knows one layout on GPUs; on CPUs channels-last was measured to be slower.
    """
    net.to(device)
    return net.to(memory_format=torch.channels_last) if isinstance(net, UNet) and compiled and torch.device(device).type == "cuda" else net


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain types only, so that weights_only=True reads them and they rebuild the model alone

def save_checkpoint(run, folder, state):
    """checkpoint.pt and checkpoint.json in `folder`, from the first process, atomically; the previous one stays until the new one is complete."""
    if run.rank == 0:
        path = Path(folder) / "checkpoint.pt"
        try:
            with atomic(path) as f:
                torch.save(state, f)
        except RuntimeError as e:                         # torch reports a full disk as a RuntimeError
            raise UserError(f"{path}: could not be written ({str(e).splitlines()[0]}); is the disk full? the previous checkpoint is kept") from None
        write_json(path.with_suffix(".json"), dict(
            what=f"{state['kind']} model, {state['seen']:,} images seen; 'ema' holds the averaged weights that samples and features use",
            seen=state["seen"], parameters=sum(v.numel() for v in state["net"].values()), weights=state["weights"], num_labels=state["num_labels"],
            path=state["path"], predict=state["predict"], data=state["data"], model=state["model"], config=state["config"]))
    run.wait()


PUBLISHED = {}                                            # prefix: function (run, file) -> checkpoint dict; extract_features.py reads other people's weights


def checkpoint_file(run, name):
    """The file that checkpoint `name` means; None if it is not there."""
    kind, _, file = name.partition(":")
    places = [file] if kind in PUBLISHED else [run.dir / name / "checkpoint.pt", Path(name) / "checkpoint.pt", name]
    return next((Path(p) for p in places if Path(p).is_file()), None)


def missing(run, name):
    """Whether --dry-run has to count without checkpoint `name`, a folder of the run or published weights that will be there later, and says so."""
    later = name.partition(":")[0] in PUBLISHED if ":" in name else not name.endswith(".pt")
    if not (run.dry_run and later and checkpoint_file(run, name) is None):
        return False
    run.say(f"{name} is not there yet; counted for the network of section model")
    return True


def load_checkpoint(run, name):
    """Checkpoint `name` (a folder of the run such as diffusion/base, a path to a .pt, or published weights: adm:, ddpm:, uvit:, sgfm:FILE) as a dict on the CPU."""
    kind, _, file = name.partition(":")
    if kind in PUBLISHED:
        return PUBLISHED[kind](run, file)
    path = checkpoint_file(run, name)
    if path is None:
        raise UserError(f"{run.dir / name / 'checkpoint.pt'}: no such checkpoint; train it first"
                        + (f" (published weights: {', '.join(PUBLISHED)})" if file else ""))
    state = read_torch(path)
    if not isinstance(state, dict) or not {"format", "kind", "net", "ema", "model"} <= set(state):
        what = f"keys: {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: a torch file, but not a checkpoint of this project ({what}); published weights are named adm:FILE, ddpm:FILE, uvit:FILE or sgfm:FILE")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {state['format']}, this code reads {FORMAT}")
    return state | {"file": str(path)}


def load_model(run, name, weights="ema", compiled=False):
    """(network in eval mode on the run's device, checkpoint dict) from the checkpoint alone. For --dry-run before it is there: as section `model` has it."""
    if missing(run, name):
        (channels, size), K = input_shape(run), int(name.startswith("guided/") and not name.endswith("/unconditional"))
        return placed(build_model(run.model, size, channels, num_labels=K).eval().requires_grad_(False), run.device, compiled), dict(
            file=name, channels=channels, size=size, path="cv", predict="v", num_labels=K, weights="", kind="", conditions={}, planned=True)
    state = load_checkpoint(run, name)
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], **state["conditions"])
    try:
        net.load_state_dict(state[weights])
    except RuntimeError as e:
        raise UserError(f"{state['file']}: the weights do not fit the architecture it names: {str(e).splitlines()[1].strip()[:160]}") from None
    return placed(net.eval().requires_grad_(False), run.device, compiled), state


# ---------------------------------------------------------------------------------------------------------------------
# Training

RESIDENT = 4e9                                            # bytes of a training set, as the network sees it, up to which a GPU keeps it


def image_order(seed, purpose, seen, n):
    """Endless dataset rows from image number `seen` on: a new permutation for every epoch, a function of (seed, purpose, epoch)."""
    epoch, position = divmod(seen, n)
    while True:
        yield from np.random.default_rng(seed_of(seed, f"{purpose} order", epoch)).permutation(n)[position:].tolist()
        epoch, position = epoch + 1, 0


def feed(run, cfg, images, seen, uniforms=0, noises=0):
    """This rank's part of every batch from image `seen` on: (rows int64 [b], images uint8, noise [b, 1 + noises, C, H, W], uniforms [b, 3 + uniforms]) on the device.

    The first three uniforms decide time, flip and condition of each image. images: uint8 [N, C, H, W], or latents.

    Noise and uniforms belong to the stage and the running number of the image, so neither restarts nor the number of processes change them. A thread
    prepares the next batches while the network works. Small sets are kept on the device.
    """
    share = cfg.batch // run.world
    pin = run.device.type == "cuda"
    resident = torch.from_numpy(np.array(images, order="C")).to(run.device) if pin and images.nbytes < RESIDENT else None
    order = image_order(cfg.seed, run.stage, seen, len(images))

    def prepared(number):
        rows = torch.tensor([next(order) for _ in range(cfg.batch)][run.rank * share:(run.rank + 1) * share])
        mine = range(number + run.rank * share, number + (run.rank + 1) * share)
        u, z = draw(cfg.seed, run.stage, mine, (1 + noises, *row_shape(images)), 3 + uniforms)
        x = torch.from_numpy(images[rows.numpy()]) if resident is None else None
        return [v.pin_memory() if pin and v is not None else v for v in (rows, x, z, u)]

    for item in ahead(prepared, itertools.count(seen, cfg.batch), depth=4):
        rows, x, z, u = (v.to(run.device, non_blocking=True) if v is not None else None for v in item)
        yield rows, resident[rows] if x is None else x, z, u


@torch.no_grad()
def preview(net, path, predict, z, steps=25, **condition):
    """Quick pictures while training: x_s = alpha(s) x_hat + sigma(s) z_hat on an even grid (Euler on the straight path, DDIM on VP)."""
    x = z
    for t, s in itertools.pairwise(torch.linspace(0, 1, steps + 1)):
        t = t.expand(len(x)).to(x)
        x_hat, z_hat = estimates(path, predict, net(x, 1000 * t, **condition), x, t)
        x = path.alpha(s).to(x) * x_hat + path.sigma(s).to(x) * z_hat
    return x


def footprint(net, channels, size):
    """(operations of one forward pass of one image, bytes that it keeps for the backward pass in float32, the same when blocks are run `again`), counted on a
    copy without data."""
    net, kept, counter, inputs, inside = copy.deepcopy(net).to("meta").train(), {}, FlopCounterMode(display=False), {}, []
    own = {p.untyped_storage()._cdata for p in net.parameters()}

    def keep(x):                                          # views share their storage
        if (storage := x.untyped_storage())._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return x

    def watched(f, *args):                                # what a block keeps, and the inputs that would be kept in its place
        before = sum(kept.values())
        out = f(*args)
        inside.append(sum(kept.values()) - before)
        inputs.update({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in args if isinstance(x, torch.Tensor)})
        return out

    net.run_block = watched
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = net(torch.empty(1, channels, size, size, device="meta"), torch.empty(1, device="meta"))
    del out
    total = sum(kept.values())
    return counter.get_total_flops(), total, total - sum(inside) + sum(inputs.values()) + max(inside)


ENCODE = 4.17e6                                           # operations a pixel of Stable Diffusion's autoencoder, counted on its layers without data
DECODE = 9.49e6


def cost(run, what, flops, precision="bf16"):
    """Say what a number of operations is made of and how long GPUs take for it, for --dry-run. what: the factors, in words."""
    run.say(f"work: {what} = {flops:.2e} FLOP")
    for card, rates in (("H100", dict(bf16=989e12, tf32=494e12, fp32=67e12)), ("RTX 4090", dict(bf16=165e12, tf32=83e12, fp32=83e12))):
        seconds = flops / (0.4 * rates[precision])
        run.say(f"  at 40 % of the {rates[precision] / 1e12:.0f} TFLOP/s that an {card} does in {precision}: "
                + (f"{seconds / 3600:,.1f} GPU-hours" if seconds >= 360 else f"{seconds:,.0f} GPU-seconds"))


def announce(run, cfg, net, folder):
    """What a training would do and cost, with the arithmetic: for --dry-run."""
    parameters, (channels, size) = sum(p.numel() for p in net.parameters()), input_shape(run)
    run.say(f"parameters {parameters:,}; {math.ceil(cfg.images / cfg.batch):,} updates of {cfg.batch} images; "
            f"checkpoint {(12 if cfg.optimizer == 'muon' else 16) * parameters / 1e6:.0f} MB in {folder}")
    flops, kept, kept_again = footprint(net, channels, size)
    kept = kept_again if cfg.recompute else kept
    passes, micro = 4 if cfg.recompute else 3, micro_batch(run, cfg)
    cost(run, f"{flops / 1e9:,.1f} GFLOP forward an image x {passes} (forward, twice that backward{', forward again' if cfg.recompute else ''}) "
         f"x {cfg.images:,} images", passes * flops * cfg.images)
    share, why = (0.5, "half of those in float32") if cfg.compile or isinstance(net, UViT) else (5 / 6, "5/6 of those in float32, in which norms work that are not compiled")
    train, test = source_counts(run)
    row = (8 if run.data.latents else 1) * channels * size ** 2                  # bytes of an image as the network sees it
    resident = train * row if train * row < RESIDENT else 0
    muon = cfg.optimizer == "muon"
    held = (18 if muon else 22) * parameters
    run.say(f"memory: {held / 1e9:.1f} GB (4 bytes each for weights, average, gradients, {'one of Muon' if muon else 'two of AdamW'}; 2 for weights in bf16) + "
            f"{micro} images x {share * kept / 1e6:,.0f} MB of activations ({why}{'; of one block, and the inputs of all' if cfg.recompute else ''}) + "
            f"{resident / 1e9:.1f} GB of training images that a GPU keeps (of sets below {RESIDENT / 1e9:.0f} GB) = "
            f"{(held + share * micro * kept + resident) / 1e9:.1f} GB in bf16; lower it by micro={'' if cfg.recompute else ', recompute=true'}")
    if run.data.latents and run.stage == "train_diffusion":
        each = ENCODE * run.data.size ** 2
        cost(run, f"encoding, once: {each / 1e9:,.0f} GFLOP (as Stable Diffusion's autoencoder) x 2 (mirror images) x " +
             (f"{train + test:,} images" if train + test else "a million images (counted where data.root is there)"), 2 * each * (train + test or 1_000_000), "tf32")
    each = 3 * run.data.size ** 2 + (8 * channels * size ** 2 if run.data.latents else 0)
    run.say(f"disk: {each:,} bytes an image (uint8 pixels" + (", float16 mean and std of latents, twice for the mirror image)" if run.data.latents else ")")
            + (f" x {train + test:,} = {each * (train + test) / 1e9:.1f} GB" if train + test else f": {each / 1e3:,.1f} GB a million; counted where data.root is there"))


def micro_batch(run, cfg):
    """Images per forward pass of this process: its share of the batch, or `micro` where that is less."""
    share = cfg.batch // run.world
    return min(cfg.micro or share, share)


def check_training(run, cfg):
    """Combinations of training keys that cannot work."""
    if cfg.batch < 1 or cfg.batch % run.world:
        raise UserError(f"batch={cfg.batch} must be a multiple of the {run.world} processes")
    if cfg.micro < 0 or (cfg.batch // run.world) % micro_batch(run, cfg):
        raise UserError(f"micro={cfg.micro} must divide the {cfg.batch // run.world} images per process and update")
    for key in ("images", "log_every", "save_every", "grid_every", "ema"):
        require(getattr(cfg, key) >= 1, cfg, key, "must be at least 1")
    if cfg.precision == "fp16" and run.device.type != "cuda":
        raise UserError("precision=fp16 needs a GPU; use bf16 or fp32")


def resume(run, cfg, folder, state, parts):
    """Load the checkpoint in `folder` into `parts` (name in the file -> object with load_state_dict); returns the images seen, 0 to start.

    A checkpoint of another recipe is a UserError unless overwrite=true. Log lines and pictures later than the checkpoint are removed:
    they belong to a run that was killed.
    """
    seen, log, pictures = 0, Path(folder) / "metrics.jsonl", Path(folder) / "samples"
    if run.agreed((Path(folder) / "checkpoint.pt").exists):
        old = load_checkpoint(run, str(folder))
        was = {section: dataclasses.asdict(cls()) | old["config"].get(section, {}) for section, cls in (("model", Model), (run.stage, type(cfg)))}
        other = [f"{section}.{key}={was[section].get(key)}, now {value}" for section in was
                 for key, value in state["config"][section].items() if was[section].get(key) != value and key not in RESUMABLE]
        names = dict(data="images", labels="labels", layout="layouts", init="initial weights")
        other += [f"other {what}" for key, what in names.items() if old.get(key) != state.get(key)]
        if other and not cfg.overwrite:
            raise UserError(f"{folder}: was made with {'; '.join(other[:3])}. Choose another name=, or overwrite=true to start again")
        if not other:
            seen = old["seen"]
            for name, part in parts.items():
                part.load_state_dict(old[name])
    if run.rank == 0 and seen < cfg.images:
        pictures.mkdir(parents=True, exist_ok=True)
        lines = log.read_text().splitlines() if seen and log.exists() else []
        with atomic(log) as f:
            f.write("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["images"] <= seen).encode())
        for picture in pictures.glob("*.png"):
            if picture.stem.isdigit() and int(picture.stem) > seen:
                picture.unlink()
    return seen


def orthogonalised(m, iterations=5):
    """U V^T of m = U S V^T, roughly: the same singular vectors, every singular value moved to between 0.7 and 1.2. m: [N, rows, columns].

    Newton-Schulz: x -> (a + b G + c G^2) x with G = x x^T acts on each singular value alone. With these coefficients (Jordan 2024) small values grow
    3.4 times an iteration and none passes 1.2. All factors are polynomials of the first G, so they are multiplied among themselves, which
    takes a third of the time since x is several times as long as it is wide, and meet x once, in the end. Needs all digits of float32.
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

    A hidden weight moves by its orthogonalised momentum, so that all directions in which it can act learn at one speed, not only the few that
    dominate the gradient. Convolutions are matrices [out, in * k * k]. With the factor 0.2 sqrt(max(out, in)) an update is
    as large as AdamW's usually are, whose learning rate and weight decay therefore carry over.
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
                update = orthogonalised(torch.stack([self.ahead(p).flatten(1) for p in weights]))               # [N, rows, columns]
                for p, u in zip(weights, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.view_as(p), alpha=-0.2 * group["lr"] * math.sqrt(max(rows, columns)))
                    p.grad = None                         # AdamW passes over what has no gradient
        super().step()

    def ahead(self, p):
        """Take the gradient of p into its momentum; the gradient that Nesterov's momentum looks ahead to."""
        state = self.state[p]
        if not state:
            state |= dict(momentum=torch.zeros_like(p), step=torch.tensor(0.0))           # AdamW expects a step in every state that it loads
        state["momentum"].mul_(self.momentum).add_(p.grad)
        return p.grad.add(state["momentum"], alpha=self.momentum)


def build_optimizer(cfg, net, beside=()):
    """The optimizer of a network and of parameters beside it. Norms, biases and embeddings of all kinds keep clear of Muon and, the embeddings apart, of weight decay."""
    hidden = hidden_weights(net) if cfg.optimizer == "muon" else []
    others = [p for p in [*net.parameters(), *beside] if not any(p is h for h in hidden)]
    groups = [dict(params=[p for p in others if p.dim() > 1], weight_decay=cfg.weight_decay), dict(params=[p for p in others if p.dim() <= 1], weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    return Muon([dict(params=hidden, weight_decay=cfg.weight_decay, muon=True), *(g | dict(muon=False) for g in groups)], lr=cfg.lr)


class Meter:
    """What happened since the last line of metrics.jsonl: loss by tenth of t, gradient norm, time. Sums stay on the device."""

    def __init__(self, device, seen):
        self.bins = torch.zeros(2, 10, device=device, dtype=torch.float64)       # sum of losses and number of images
        self.norms, self.updates = torch.zeros((), device=device), 0
        self.clock, self.since, self.waited = time.time(), seen, 0.0

    def add(self, t, loss):
        slot = (t * 10).long().clamp(0, 9)
        self.bins[0].index_add_(0, slot, loss.detach().double())
        self.bins[1].index_add_(0, slot, torch.ones_like(loss, dtype=torch.float64))

    def sums(self):
        """(losses by tenth, images by tenth) over all processes."""
        every = self.bins.clone()
        if dist.is_initialized():
            dist.all_reduce(every)
        return every.tolist()

    def healthy(self, fp16):
        """Whether all losses so far were finite (and gradients, where no scaler skips those that are not)."""
        return all(map(math.isfinite, self.sums()[0])) and (fp16 or math.isfinite(float(self.norms)))

    def line(self, seen, lr):
        total, count = self.sums()
        seconds, images = time.time() - self.clock, seen - self.since
        return dict(images=seen, loss=sum(total) / max(sum(count), 1), loss_by_t=[round(a / b, 5) if b else None for a, b in zip(total, count)],
                    grad_norm=float(self.norms) / max(self.updates, 1), lr=lr, seconds=round(seconds, 3), images_per_second=round(images / seconds, 1),
                    waiting=round(self.waited / seconds, 4), memory_mb=round(torch.cuda.max_memory_allocated() / 2 ** 20) if torch.cuda.is_available() else None)


def fit(run, cfg, net, folder, data, state, condition=None, grid=None, side=None, columns=8):
    """The training loop of both training stages; returns the finished checkpoint state.

    net        raw module on the device, freshly initialised; a checkpoint in `folder` takes precedence (resume)
    data       Split to train on
    state      what the checkpoint carries besides weights: kind, model, size, channels, conditions, num_labels, path, predict, data, config, ...
    condition  (rows [b], uniforms [b, 3] of time, flip and condition) -> dict of conditions for the network, or None
    grid       dict of conditions for the images of the sample grid (fixed noise, averaged weights; `columns` per row), or None
    side       a module trained and averaged beside the network, or None. `side.step` gives a loss of its own and the condition, `side.report` joins the log
    """
    path, share, folder, latent = PATHS[cfg.path], cfg.batch // run.world, Path(folder), data.latents is not None
    micro = micro_batch(run, cfg)
    context, kind, why = autocast(run, cfg.precision)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.run_block = again if cfg.recompute else plainly
    parts, weights, averages = dict(net=net, ema=ema), list(net.parameters()), list(ema.parameters())
    beside, looks = list(side.parameters()) if side else [], side.noises if side else 0
    if side:
        side_ema = copy.deepcopy(side, {id(side.inputs): side.inputs}).eval().requires_grad_(False)          # not the images
        parts |= dict(side=side, side_ema=side_ema)
    opt = build_optimizer(cfg, net, beside)
    scaler = torch.amp.GradScaler(run.device.type, enabled=kind == torch.float16)
    parts |= dict(optimizer=opt, scaler=scaler)

    # resume: the same command again
    seen = resume(run, cfg, folder, state, parts)
    for p, s in opt.state.items():                        # moments come back in the memory layout of the run that wrote them, which may have been compiled
        s |= {k: torch.empty_like(p).copy_(v) for k, v in s.items() if v.shape == p.shape}
    if seen >= cfg.images:
        run.say(f"{folder}: done already ({seen:,} images seen)")
        return load_checkpoint(run, str(folder))
    run.say(f"{'resuming at' if seen else 'starting, at'} {seen:,} of {cfg.images:,} images; {len(data):,} training images; "
            f"{sum(p.numel() for p in weights) / 1e6:.2f} M parameters; batch {cfg.batch} = {run.world} process(es) x {share // micro} x {micro}; {why}")
    model = net
    if run.world > 1:
        model = nn.parallel.DistributedDataParallel(net, device_ids=[run.device.index] if run.device.type == "cuda" else None,
                                                    gradient_as_bucket_view=True)         # else every gradient is held twice
    if cfg.compile:                                       # around DDP: one graph for each of its buckets, so that late gradients travel while early ones are computed
        torch._dynamo.config.optimize_ddp = not cfg.recompute                    # PyTorch 2.6 cannot split blocks that run again: one graph
        model = torch.compile(model)
    net.train()
    open_autoencoder(run)                                 # for the sample grids
    crossed = lambda every: seen // every > (seen - cfg.batch) // every or seen >= cfg.images
    meter, batches = Meter(run.device, seen), feed(run, cfg, data.inputs, seen, side.uniforms if side else 0, looks + latent)
    with bar(run, cfg.images, f"{run.stage} {cfg.name}") as progress:
        progress.update(seen)
        while seen < cfg.images:
            # a batch: images, noise, times, conditions
            tick = time.time()
            rows, x, z, u = next(batches)
            meter.waited += time.time() - tick
            x = as_input(x, u[:, 1] < 0.5 if cfg.flip else None, z[:, -1] if latent else None)                   # [b, C, H, W]; the last noise draws the latent
            t = u[:, 0] if cfg.times == "uniform" else torch.special.ndtri(u[:, 0].clamp(1e-6, 1 - 1e-6)).sigmoid()
            if state["model"]["dropout"]:                                        # masks come from the global generator: a function of (seed, rank, images seen)
                torch.manual_seed(seed_of(cfg.seed, f"dropout {run.rank}", seen))
            if side:                                                             # its backward comes before that of DDP, which then averages the sum
                loss, cond = side.step(net, ema, side_ema, rows, x, z[:, 1:1 + looks], u, seen, context)
                scaler.scale(loss).backward()
            else:
                cond = condition(rows, u) if condition else {}
            z = z[:, 0]                                   # the first is that of the path

            # one update
            lr = cfg.lr * min(1.0, (seen + cfg.batch) / max(cfg.warmup, 1))
            for group in opt.param_groups:
                group["lr"] = lr
            for i in range(0, share, micro):
                part = slice(i, i + micro)
                with (nullcontext() if i + micro >= share or run.world == 1 else model.no_sync()), context():
                    loss = loss_per_image(model, path, cfg.predict, x[part], z[part], t[part], cfg.min_snr, **{k: v[part] for k, v in cond.items()})
                    scaler.scale(loss.mean() * micro / share).backward()
                meter.add(t[part], loss)
            for p in beside if run.world > 1 else ():                            # DDP knows the network only
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= run.world
            scaler.unscale_(opt)
            norm = nn.utils.clip_grad_norm_(weights, cfg.clip or math.inf)
            meter.norms += norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else norm           # updates that the scaler skips do not count
            meter.updates += 1
            if beside:
                nn.utils.clip_grad_norm_(beside, cfg.clip or math.inf)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)
            seen += cfg.batch
            beta = 0.5 ** (cfg.batch / max(min(cfg.ema, cfg.ema_ramp * seen), 1e-9))
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - beta)
                if side:
                    side.after(side_ema, 1 - beta)
            progress.update(cfg.batch)

            # what the loop says: one line, a picture, a checkpoint, each at its own interval
            if (crossed(cfg.log_every) or crossed(cfg.save_every)) and not meter.healthy(scaler.is_enabled()):
                raise UserError(f"{folder}: the loss is not finite after {seen:,} images; the last checkpoint is kept. Lower lr, or use precision=fp32 or bf16")
            if crossed(cfg.log_every):
                line = meter.line(seen, lr) | (dict(scale=scaler.get_scale()) if scaler.is_enabled() else {}) | (side.report(ema, side_ema, seen, context) if side else {})
                meter = Meter(run.device, seen)
                if run.rank == 0:
                    with open(folder / "metrics.jsonl", "a") as f:
                        f.write(json.dumps(line) + "\n")
                progress.set_postfix(loss=f"{line['loss']:.4f}")
                if progress.disable:
                    run.say(f"{seen:>12,} images  loss {line['loss']:.4f}  {line['images_per_second']:.0f} images/s{side.words(line) if side else ''}")
            if crossed(cfg.save_every):
                dicts = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(run, folder, state | dict(format=FORMAT, seen=seen, weights=weights_hash(dicts["ema"])) | dicts)
            if crossed(cfg.grid_every):
                if run.rank == 0:
                    shown = side.grid(ema, side_ema, context) if side else grid or {}
                    noise = draw(cfg.seed, "grid", range(len(next(iter(shown.values()))) if shown else 64), row_shape(data.inputs)).to(run.device)
                    with context():                       # no more at once than in training
                        drawn = torch.cat([preview(ema, path, cfg.predict, noise[i:i + micro], **{k: v[i:i + micro] for k, v in shown.items()})
                                              for i in range(0, len(noise), micro)])
                    pictures = to_uint8(decode(run.vae, drawn)).cpu().numpy()
                    save_grid(folder / "samples" / f"{seen:010d}.png", pictures, columns, head=f"{run.stage} {cfg.name}: {seen:,} images, averaged weights")
                run.wait()
    batches.close()
    return load_checkpoint(run, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Published weights, written once as an ordinary checkpoint. Tensors tell the architecture; the tables tell the rest

# How many heads, where they are not of 64 channels each: by channel multiples, and by width
ADM_HEADS = {(1, 1, 2, 3, 4): 4}                          # ImageNet 128 x 128
UVIT_HEADS = {1152: 16}


def read_adm(w):
    """A U-Net of guided-diffusion (arXiv 2105.05233): (Model, size, input channels, path, null row there?)."""
    channels = w["time_embed.0.weight"].shape[1]
    count = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("input_blocks."))
    levels = 1 + sum(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", k) is not None for k in w)
    blocks = count // levels - 1                          # a level has them, and the first convolution or a downsampler
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    mult = [w[f"{f}.0.in_layers.2.weight"].shape[0] / channels for f in first]
    size = 8 * 2 ** (levels - 1)
    attention = [size >> level for level in range(levels) if f"{first[level]}.1.qkv.weight" in w]
    if mult == [1, 2, 3, 4]:                              # no tensor tells that
        raise ValueError("ImageNet 64 x 64: has cosine betas and another order of q, k and v")
    if min(mult) * channels < 128:
        raise ValueError("below 128 channels our group norms have fewer groups")
    for k in ("out.2.weight", "out.2.bias"):              # the second half is a variance, which an ODE does not need
        w[k] = w[k][:3]
    heads = ADM_HEADS.get(tuple(mult))
    model = Model("unet", channels, mult, blocks, attention, head_channels=0 if heads else 64, heads=heads or 8,
                  clock=[999.0, -1000.0])
    return model, size, 3, "vp", False


def read_uvit(w):
    """A U-ViT (arXiv 2209.12152), as `read_adm`. On latents its last class is the null label."""
    _, positions, width = w["pos_embed"].shape
    _, channels, patch, _ = w["patch_embed.proj.weight"].shape
    size = patch * math.isqrt(positions - 1 - ("label_emb.weight" in w))         # tokens of time and class stand before
    depth = 2 * sum(re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", k) is not None for k in w)
    continuous = "final_layer.weight" in w                # the H models, without it, count 1000 steps
    path, clock = ("vp-sde", [999.0, -999.0]) if continuous else ("vp-sd", [1000.0, -1000.0])
    model = Model("uvit", width, patch=patch, depth=depth, heads=UVIT_HEADS.get(width, width // 64),
                  final_conv=continuous, clock=clock)
    return model, size, channels, path, channels == 4


def import_published(run, cfg):
    """Write the weights that imported= names as the checkpoint diffusion/<name>, as if it had been trained here."""
    kind, _, file = cfg.imported.partition(":")
    require(kind in ("adm", "uvit"), cfg, "imported", "must be adm:FILE or uvit:FILE")
    with reading(file, f"name the weights of a published {kind} model"):
        w = {k: v.float() for k, v in read_torch(file).items()}
        model, size, channels, path, null = (read_adm if kind == "adm" else read_uvit)(w)
        table = w.get("label_emb.weight")                 # [K or K + 1, width]
        if table is not None and not null:                # the mean of all classes is the nearest thing to no class
            w["label_emb.weight"] = table = torch.cat([table, table.mean(0, keepdim=True)])
        K = 0 if table is None else len(table) - 1
        with torch.device("meta"):
            net = build_model(model, size, channels, num_labels=K)
        net.load_state_dict(w, assign=True)               # names and shapes must fit
    require_shape(run, dict(file=file, channels=channels, size=size))
    if K:
        run.say(f"note: {file} was trained with {K} classes: what is found in its features is not free of annotation")
    run.say(f"model: {json.dumps(dataclasses.asdict(model))}\npath: {path}, predict: eps")
    folder, weights = run.dir / "diffusion" / cfg.name, weights_hash(w)
    if run.dry_run:
        return run.say(f"would be written to {folder}")
    state = dict(format=FORMAT, kind=f"published {kind}", net=w, ema=w, model=dataclasses.asdict(model), size=size,
                 channels=channels, conditions=dict(num_labels=K) if K else {}, num_labels=K,
                 marginal=torch.full((K,), 1 / K, dtype=torch.float64) if K else None, null=null,
                 labels="published" if K else None, condition="label", label_file="published classes" if K else None,
                 path=path, predict="eps", data=None, config=dict(model=dataclasses.asdict(model)), seen=0,
                 weights=weights)
    with locked(run, "diffusion", cfg.name):
        if not run.agreed(lambda: finished(run, folder / "checkpoint.json", dict(weights=weights))):
            save_checkpoint(run, folder, state)
    run.next(f"extract_features.py checkpoint=diffusion/{cfg.name}", "reads it, after train_diffusion.py --prepare")


def main():
    """Train without labels, from the command line."""
    run = start("train_diffusion", TrainDiffusion, __doc__, flags={"--prepare": "only turn the source into data/ (and latents)"})
    cfg = run.cfg
    if "--prepare" in run.flags:                          # the data alone: for runs that start from published weights
        return run.say(f"would prepare the images in {run.dir / 'data'}") if run.dry_run else prepare_data(run)
    if cfg.imported:
        return import_published(run, cfg)
    check_training(run, cfg)
    channels, size = input_shape(run)
    net = build_model(run.model, size, channels, seed=cfg.seed)
    folder = run.dir / "diffusion" / cfg.name
    if run.dry_run:
        return announce(run, cfg, net, folder)

    # data: any source becomes arrays, row i is image i from here on
    prepare_data(run)
    data = load_data(run, "train")

    # train; the checkpoint alone rebuilds the model
    state = dict(kind="diffusion", model=dataclasses.asdict(run.model), size=size, channels=channels, conditions={}, num_labels=0, path=cfg.path,
                 predict=cfg.predict, data=data.info["fingerprint"], config={k: run.sections[k] for k in ("data", "model", run.stage)})
    fit(run, cfg, placed(net, run.device, cfg.compile), folder, data, state)

    # close
    run.say(f"model in {folder}, sample grids in {folder / 'samples'}")
    run.next("probe.py" + ("" if cfg.name == "base" else f" checkpoint=diffusion/{cfg.name}"), "finds the block and time whose features cluster best")


if __name__ == "__main__":
    cli(main)

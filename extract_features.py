"""Extract features: a trained model and images in, its hidden activations at chosen places and noise times out.

Reads   runs/<run>/{diffusion,guided}/<name>/checkpoint.pt and data/{train,test}/images.npy
Writes  features/<name>/{train,test}-<activation>-t<time>.npy, one row per image in dataset order, and info.json
Time    t = 0 is noise, t = 1 is data: the network sees x_t = alpha(t) x + sigma(t) z with noise z that belongs to the image.

    python extract_features.py configs/shapes.yaml                               # CPU, seconds
    python extract_features.py configs/cifar10.yaml activations='mid*-out,up-level0*-out' t=0.6,0.9      # one GPU, several at once
    torchrun --nproc_per_node=8 extract_features.py configs/cifar10.yaml         # eight GPUs, the same file
    python extract_features.py configs/shapes.yaml --list                        # every activation: kind, stage, channels, size, cost share
    python extract_features.py configs/shapes.yaml --pca activations='*-res-out' t=0.3,0.6,0.9           # a look at them: one sheet of PCA maps as RGB
    python extract_features.py configs/cifar10.yaml model=diffusers:google/ddpm-cifar10-32 name=ddpm activations='mid*-res-out' t=0.95    # others' model
    python extract_features.py configs/cifar10.yaml model=hub:facebookresearch/dino:main/dino_vits16 name=dino        # an encoder of clean images

Activations are named stage-level-repeat-kind: `up-level0-repeat1-res-out` is the output of the second residual block of the
up-path's lowest resolution. They are read by plain forward hooks; the forward stops after the deepest one that is asked for.
"""
import copy
import dataclasses
import difflib
import fnmatch
import functools
import inspect
import itertools
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.data import as_input, file_of, load_data, require_shape, row_shape, torchvision_datasets
from configs.run import (Model, UserError, ahead, autocast, bar, cli, create_rows, digest, draw, finished, key,
                         read_json, read_torch, require, save_grid, start, to_uint8, weights_hash, write_json, write_rows)
from train_diffusion import (FORMAT, PATHS, AttentionBlock, Block, ResBlock, UNet, VariancePreserving, build_model, diffuse,
                             load_model, say_network)


@dataclass
class ExtractFeatures:
    """Section `extract_features`."""
    name: str = key("base", "results go to features/<name>")
    checkpoint: str = key("diffusion/base",
                          "whose activations: a folder of the run, a .pt file, or published weights: adm:, ddpm:, "
                          "uvit:, sgfm:FILE")
    weights: Literal["ema", "net"] = key("ema", "averaged or raw")
    model: str = key("",
                     "in place of checkpoint: diffusers:PATH_OR_ID, hub:REPO/NAME (or a local directory), FILE.pt "
                     "(TorchScript)")
    embedding: str = key("", "model=diffusers with text: a .npy [tokens, D] to condition on; empty = the empty prompt")
    resize: int = key(0, "model: images become so large for it; 0 = the size it was made for (torch.hub: 224)")
    activations: list[str] = key(["auto"], "names and globs; auto = the label-free choice in probe/<choice>.json")
    t: list[float] = key([], "noise times; empty with activations=auto = the label-free choice")
    choice: str = key("sweep", "which probe result `auto` reads")
    pool: str = key("mean", "mean, none, or a number g: average over a grid of g x g")
    draws: int = key(1, "noise draws to average")
    splits: list[str] = key(["train", "test"], "parts of the data")
    dtype: Literal["float32", "float16"] = key("float32", "on disk")
    batch: int = key(256, "images per forward pass and process")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network")
    compile: bool = key(False,
                        "torch.compile the network up to what is read: a minute or so that pays where there are many "
                        "batches")
    shown: list[int] = key([0, 1, 2, 3], "--pca: which test images")
    seed: int = key(0, "of the noise")
    overwrite: bool = key(False, "replace features that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue: every activation by a stable name, in the order in which the forward pass produces them

def parts(net):
    """Yield (name prefix, module) of every block of the network in forward order. Levels of the up-path count from the lowest resolution."""
    if isinstance(net, UNet):
        yield "unet-after-conv-in", net.input_blocks[0][0]
        for stage, blocks in (("down", net.input_blocks[1:]), ("mid", [[m] for m in net.middle_block]), ("up", net.output_blocks)):
            level = repeat = 0
            for block in blocks:
                moved = False
                for m in block:
                    if getattr(m, "resample", None):
                        yield f"{stage}-level{level}-{stage}sampler-out", m
                        moved = True
                    else:
                        place = f"repeat{(repeat + 1) // 2}" if stage == "mid" else f"level{level}-repeat{repeat}"       # mid: ResBlock, attention, ResBlock
                        yield f"{stage}-{place}", m
                level, repeat = (level + 1, 0) if moved else (level, repeat + 1)
    else:
        yield "vit-after-embed", net.patch_embed
        for stage, blocks in (("down", net.in_blocks), ("mid", [net.mid_block]), ("up", net.out_blocks)):
            for i, block in enumerate(blocks):
                yield f"{stage}-vit-block{i}", block
    yield "unet-out", net


def attended(q, k):
    """How much queries [B, heads, L, d] look at keys [B, heads, M, d]: float32 [B, heads, L, M], rows sum to one."""
    with torch.autocast(q.device.type, enabled=False):    # hooks run under the network's precision, in which products may overflow
        return (q.float() / math.sqrt(q.shape[3]) @ k.float().transpose(2, 3)).softmax(3)


def catalogue(net):
    """Ordered dict: name -> (module to hook, function from its output and inputs to a map [B, C, H, W]).

    Increments are what a branch adds (res-increment, self-out, ffn-out); self-residual is the sum after attention. A skip is what arrives from the mirrored
    place of the way down: in the U-Net the raw channels, in the U-ViT the merged tokens. self-map has a channel for every head and key, at each query.
    """
    if isinstance(net, Foreign):
        return net.found
    found, extras, width = {}, getattr(net, "extras", 0), 0

    def square(x, _=()):                                  # [B, C, L] -> [B, C, H, W]
        return x.reshape(*x.shape[:2], math.isqrt(x.shape[2]), -1)

    def tokens(x, _=()):                                  # [B, extras + L, D] -> [B, D, H, W]
        return square(x[:, extras:].transpose(1, 2))

    def score_map(q, k):                                  # [B, heads, extras + L, d] each -> [B, heads * (extras + L), H, W]
        return square(attended(q[:, :, extras:], k).transpose(2, 3).flatten(1, 2))

    plain = lambda x, _: x
    for prefix, m in parts(net):
        if isinstance(m, ResBlock) and not m.resample:
            if prefix.startswith("up"):
                found[f"{prefix}-skip"] = m.in_layers[0], lambda x, inputs, c=width: inputs[0][:, c:]
            found[f"{prefix}-res-increment"] = m.out_layers[-1], plain
            found[f"{prefix}-res-out"] = m, plain
            width = m.in_layers[2].out_channels
        elif isinstance(m, AttentionBlock):
            split = lambda x, h=m.heads: x.reshape(len(x), h, 3, -1, x.shape[2])                                # qkv is [B, heads * 3 * d, L]
            for i, letter in enumerate("qkv"):
                found[f"{prefix}-vit-block0-self-{letter}"] = m.qkv, lambda x, _, i=i, split=split: square(split(x)[:, :, i].flatten(1, 2))
            found[f"{prefix}-vit-block0-self-map"] = m.qkv, lambda x, _, split=split: score_map(*split(x)[:, :, :2].transpose(3, 4).unbind(2))
            found[f"{prefix}-vit-block0-self-out"] = m.proj_out, square
            found[f"{prefix}-vit-out"] = m, plain
        elif isinstance(m, Block):
            if m.skip_linear is not None:
                found[f"{prefix}-skip"] = m.skip_linear, tokens
            for i, letter in enumerate("qkv"):            # qkv is [B, L, 3 * D]
                found[f"{prefix}-self-{letter}"] = m.attn.qkv, lambda x, _, i=i: tokens(x.chunk(3, -1)[i])
            found[f"{prefix}-self-map"] = m.attn.qkv, lambda x, _, h=m.attn.heads: score_map(*x.unflatten(2, (3, h, -1)).permute(2, 0, 3, 1, 4)[:2])
            found[f"{prefix}-self-out"] = m.attn.proj, tokens
            found[f"{prefix}-self-residual"] = m.norm2, lambda x, inputs: tokens(inputs[0])
            found[f"{prefix}-ffn-inner"] = m.mlp.fc1, tokens
            found[f"{prefix}-ffn-out"] = m.mlp.fc2, tokens
            found[f"{prefix}-out"] = m, tokens
        elif prefix == "vit-after-embed":
            found["unet-in"] = m, lambda x, inputs: inputs[0]
            found[prefix] = m, lambda x, _: square(x.transpose(1, 2))
        else:                                             # resamplers, first convolution, prediction
            if prefix == "unet-after-conv-in":
                found["unet-in"] = m, lambda x, inputs: inputs[0]
            found[prefix] = m, plain
    return found


def describe(name):
    """(kind, stage) of an activation's name: up-level0-repeat1-res-out -> res-out, up; the ends of the network have stage end, blocks of plain transformers flat."""
    stage = re.match(r"down|mid|up(?!\w)|block", name)
    kind = re.sub(r"^(unet|vit|block\d+|(down|mid|up)(-level\d+)?(-repeat\d+)?(-vit-block\d+)?)-", "", name)
    return kind, {"block": "flat"}.get(stage[0], stage[0]) if stage else "end"                   # plain transformers have no levels


@torch.no_grad()
def cost_shares(net, x, t):
    """Share of the operations of one forward pass (matrix products, convolutions, attention) that are done when each activation is there."""
    done, counter = {}, FlopCounterMode(display=False)
    hooks = [m.register_forward_hook(lambda *_, n=n: done.__setitem__(n, counter.get_total_flops())) for n, (m, _) in catalogue(net).items()]
    x = encoded(net, x)
    with counter:
        net(x, 1000 * t)
    for h in hooks:
        h.remove()
    return {n: v / max(counter.get_total_flops(), 1) for n, v in done.items()}


def pca_rgb(x):
    """Maps [N, C, H, W] -> uint8 [N, 3, H, W]: the three principal components over all positions of all N, each from its least to its greatest value."""
    flat = x.permute(0, 2, 3, 1).flatten(0, 2).double()                          # [NHW, C]
    flat = flat - flat.mean(0)
    v = torch.linalg.eigh(flat.T @ flat)[1].flip(1)[:, :3]                       # [C, 3], greatest first
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()                  # a component's sign is arbitrary: let its greatest loading be positive
    y = F.pad(flat @ v, (0, 3 - v.shape[1]))
    y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)).clamp(min=1e-9)
    return to_uint8(y.reshape(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2) * 2 - 1)


def matching(net, patterns):
    """Names that match any of the names or globs, in forward order; a pattern without a match is an error with the nearest names."""
    names, chosen = list(catalogue(net)), set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, 3, 0.3)
            raise UserError(f"activations={pattern}: no such activation; nearest: {', '.join(near) or 'none'}; --list shows all")
        chosen |= set(hits)
    if not chosen:
        raise UserError("activations=: name at least one; --list shows all")
    return [n for n in names if n in chosen]


class _Enough(Exception):
    """Raised by a hook when nothing deeper is wanted."""


def tap(net, names, stop, then):
    """Put hooks on `net` whose calls then fill a dict name -> then(map [B, C, H, W]), and stop after the deepest name by raising _Enough, or go on: (dict, hooks).

    `then` is called at once, while the map is in the cache, so that no more maps are kept than it keeps.
    """
    known, got, hooks = catalogue(net), {}, []
    deepest = max(names, key=list(known).index)

    def hook(name, pick):
        def take(module, args, output):
            got[name] = then(pick(output, args))
            if stop and name == deepest:
                raise _Enough
        return take

    for name in sorted(names, key=list(known).index):     # hooks of one module fire in the order of registration
        module, pick = known[name]
        if hasattr(pick, "before"):                       # it needs another module's output, too
            hooks.append(pick.before[0].register_forward_hook(pick.before[1]))
        hooks.append(module.register_forward_hook(hook(name, pick)))
    return got, hooks


@contextmanager
def tapped(net, names, stop=False, then=lambda x: x):
    """Within this context, calls of `net` fill the yielded dict as `tap` says."""
    got, hooks = tap(net, names, stop, then)
    try:
        yield got
    finally:
        for h in hooks:
            h.remove()


def pooled(x, pool):
    """Map [B, C, H, W] -> float32 [B, C] (mean), [B, C * g * g] (grid) or the map itself (none)."""
    if pool == "none":
        return x.float()
    return x.float().mean((2, 3)) if pool == "mean" else F.adaptive_avg_pool2d(x.float(), int(pool)).flatten(1)


def reader(net, names, pool="mean", compiled=False):
    """A function (x_t [B, C, H, W], t [B]) -> [activation of each name, pooled]: one forward pass that ends at the deepest, condition null, with gradients where enabled.

    compiled: by torch.compile for each shape. It leaves out what the activations do not need, so that nothing has to stop the pass. Training or evaluation mode
    stays what it is now.
    """
    then = lambda x: pooled(x, pool)

    def read(x, t):
        with tapped(net, names, True, then) as got:
            try:
                net(x, 1000 * t)
            except _Enough:
                pass
        if silent := [n for n in names if n not in got]:
            like = [n for n in got if describe(n)[1] == describe(silent[0])[1]] or list(got)
            raise UserError(f"activations={silent[0]}: the network has it, but a forward pass never computes it" + (f"; computed are {', '.join(like[:5])}" if like else ""))
        return [got[n] for n in names]

    if not compiled:
        return read
    twin = copy.deepcopy(net, {id(v): v for v in [*net.parameters(), *net.buffers()]})               # the same weights under hooks of their own, which stay
    got, _ = tap(twin, names, False, then)

    def whole(x, t):
        twin(x, 1000 * t)
        return [got.pop(name) for name in names]
    return torch.compile(whole, dynamic=False)


@torch.no_grad()
def stream(net, state, images, rows, names, times, *, device, context, pool="mean", draws=1, seed=0, purpose="features train", batch=256, compiled=False):
    """Yield (rows of this batch, {(name, t): float32 tensor}) over `rows` of uint8 images [N, 3, H, W], or of latents (their means); condition: null.

    One forward pass per (batch, time, draw) serves all names. The noise is a function of (seed, purpose, draw, row), so neither
    batch size nor number of processes changes the result.
    """
    path, shape, read = PATHS[state["path"]], None if isinstance(net, Foreign) else row_shape(images), reader(net, names, pool, compiled)

    def prepared(part):                                   # what other models see of an image only they know
        noise = [draw(seed, f"{purpose} {d}", part, shape) for d in range(draws)] if shape else None
        return part, torch.from_numpy(np.ascontiguousarray(images[part])), noise

    for part, x, noise in ahead(prepared, (rows[i:i + batch] for i in range(0, len(rows), batch))):
        x, out = encoded(net, as_input(x.to(device))), {}
        for d in range(draws):
            z = (noise[d] if shape else draw(seed, f"{purpose} {d}", part, x.shape[1:])).to(device)
            for t in times:
                tt = torch.full((len(x),), t, device=device)
                x_t = diffuse(path, x, z, tt)
                if compiled and len(x) < batch:           # fill the last batch up: another shape would be compiled anew
                    x_t, tt = (torch.cat([v, v[:1].expand(batch - len(x), *v.shape[1:])]) for v in (x_t, tt))
                with context():
                    values = read(x_t, tt)
                for name, value in zip(names, values):
                    value = value[:len(x)] / draws if draws > 1 else value[:len(x)]
                    out[name, t] = out[name, t] + value if d else value
        yield part, out


# ---------------------------------------------------------------------------------------------------------------------
# Published weights as checkpoints of ours

IDDPM = dict(heads=4, head_channels=0, path="vp-cosine", clock=[999.75, -1000.0])         # 4000 steps, which the network counts in quarters; with classes in ones
ADM_SETTINGS = {                                          # by resampling and channel multiples: what differs from 64 channels per head, rows of qkv by head, linear betas
    ("block", 1, 2, 3, 4): dict(order="qkv", path="vp-cosine"),                  # ImageNet 64 x 64
    ("block", 1, 1, 2, 3, 4): dict(heads=4, head_channels=0),                    # ImageNet 128 x 128
    ("conv", 1, 2, 3, 4): IDDPM,                          # ImageNet 64 x 64 of improved-diffusion (arXiv 2102.09672)
    ("conv", 1, 2, 2, 2): IDDPM | dict(size=32),          # its CIFAR-10
}


def require_groups(channels):
    """A UserError for fewer channels than those of all published networks: `group_norm` would have fewer groups than theirs."""
    if channels < 128:
        raise UserError("has fewer than 128 channels; with the 32 groups of these networks such layers are not supported")


def read_adm(w, given):
    """guided-diffusion's U-Net (arXiv 2105.05233), or its predecessor's, from its tensors: (Model, settings, channels of the input, tensors by the names of our `UNet`)."""
    w = {re.sub(r"^(output_blocks\.\d+\.[12]\.)conv\.", r"\1op.", k): v for k, v in w.items()}
    channels, count = w["time_embed.0.weight"].shape[1], 1 + max(int(k.split(".")[1]) for k in w if k.startswith("input_blocks."))
    levels = 1 + sum(re.fullmatch(r"output_blocks\.\d+\.[12]\.(in_layers\.2|op)\.weight", k) is not None for k in w)       # one upsampler between two levels
    resample = "conv" if any(".op." in k for k in w) else "block"
    blocks = count // levels - 1                          # each level has so many residual blocks and a downsampler, or at the start the first convolution
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    mult = [w[f"{f}.0.in_layers.2.weight"].shape[0] / channels for f in firsts]
    require_groups(min(mult) * channels)
    if resample == "conv" and (resample, *mult) not in ADM_SETTINGS and not given.get("heads"):
        raise UserError("is of improved-diffusion, whose heads no tensor tells; set published.heads (and path, clock), as it was trained")
    s = dict(size=8 * 2 ** (levels - 1), heads=8, head_channels=64, order="heads", path="vp", clock=[999.0, -1000.0], predict="eps", null_row="none")
    s |= ADM_SETTINGS.get((resample, *mult), {}) | (dict(head_channels=0) if given.get("heads") else {})
    s |= (dict(clock=[3999.0, -4000.0]) if resample == "conv" and "label_emb.weight" in w else {}) | given
    model = Model("unet", channels, mult, blocks, [s["size"] >> level for level, f in enumerate(firsts) if f"{f}.1.qkv.weight" in w], s["head_channels"],
                  heads=s["heads"], clock=s["clock"], resample=resample)
    if s["order"] == "qkv":                               # ours are by head: the same function with its rows in another order
        for k in (k for k in w if ".qkv." in k):
            h = s["heads"] if not s["head_channels"] else max(1, len(w[k]) // 3 // s["head_channels"])
            w[k] = w[k].unflatten(0, (3, h, -1)).transpose(0, 1).flatten(0, 2)
    if len(w["out.2.weight"]) == 6:                       # the second half parametrises a variance, which an ODE does not need
        w |= {k: w[k][:3] for k in ("out.2.weight", "out.2.bias")}
    return model, s, 3, w


DDPM_NAMES = {                                            # of modules outside the two ways, then inside blocks: pesser/pytorch_diffusion's, DDAE's
    "temb.dense.0": "time_embed.0", "temb.dense.1": "time_embed.2", "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2", "mid.block_1": "middle_block.0",
    "mid.attn_1": "middle_block.1", "mid.block_2": "middle_block.2", "time_emb.lin1": "time_embed.0", "time_emb.lin2": "time_embed.2", "image_proj": "input_blocks.0.0",
    "norm": "out.0", "final": "out.2", "middle.res1": "middle_block.0", "middle.attn": "middle_block.1", "middle.res2": "middle_block.2",
}
DDPM_PARTS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "temb_proj": "emb_layers.1", "conv2": "out_layers.3", "nin_shortcut": "skip_connection",
              "time_emb.1": "emb_layers.1", "conv2.1": "out_layers.3", "shortcut": "skip_connection", "projection": "qkv", "output": "proj_out"}


def read_ddpm(w, given):
    """DDPM's U-Net (arXiv 2006.11239) as pesser/pytorch_diffusion converted it to PyTorch, or DDAE's (2303.09769; FutureXiang/ddae), as `read_adm`.

    DDAE's networks for EDM look the same but want another input, which no tensor tells: of its files those of DDPM are meant.
    """
    if ddae := "image_proj.weight" in w:                  # one list down and one up, in which resamplers are entries, too
        entries = {int(k.split(".")[1]) for k in w if k.startswith("down.")}
        blocks = min(n for n in entries if f"down.{n}.res.conv1.weight" not in w)
        levels, first, attention = len(entries) // (blocks + 1) + 1, "down.{}.res.conv1.weight", "down.{}.attn.norm.weight"
        places = [level * (blocks + 1) for level in range(levels)]
    else:
        levels, blocks = (1 + max(int(k.split(".")[i]) for k in w if k.startswith(start)) for start, i in (("down.", 1), ("down.0.block.", 3)))
        first, attention, places = "down.{}.block.0.conv1.weight", "down.{}.attn.0.norm.weight", range(levels)
    has_attention = [attention.format(n) in w for n in places]                   # by level
    there = dict(DDPM_NAMES)                              # prefix in the file -> our prefix
    for level, b in itertools.product(range(levels), range(blocks + 1)):
        n, back = level * (blocks + 1) + b, levels - 1 - level                   # on the way up levels are counted from the other end
        down, up = f"input_blocks.{1 + n}", f"output_blocks.{n}"
        upsampler = f"{up}.{1 + has_attention[back]}"
        if ddae:                                          # the last entry of a level resamples, by a convolution (conv) or a residual block (op)
            there |= {f"down.{n}.res": f"{down}.0", f"down.{n}.attn": f"{down}.1", f"down.{n}.conv": f"{down}.0.op", f"down.{n}.op": f"{down}.0",
                      f"up.{n + level}.res": f"{up}.0", f"up.{n + level}.attn": f"{up}.1", f"up.{n + level + 1}.conv": f"{upsampler}.op", f"up.{n + level + 1}.op": upsampler}
        else:
            there |= {f"down.{level}.block.{b}": f"{down}.0", f"down.{level}.attn.{b}": f"{down}.1", f"down.{level}.downsample.conv": f"{down}.0.op",
                      f"up.{back}.block.{b}": f"{up}.0", f"up.{back}.attn.{b}": f"{up}.1", f"up.{back}.upsample.conv": f"{upsampler}.op"}
    longest = sorted(there, key=len, reverse=True)

    def ours(name):
        """Our name of a tensor; q, k and v stay apart."""
        prefix = next((p for p in longest if name.startswith(f"{p}.")), "")
        return f"{there[prefix]}.{inner(name[len(prefix) + 1:])}" if prefix else name

    def inner(name):
        module, _, leaf = name.rpartition(".")
        return f"{DDPM_PARTS.get(module, module)}.{leaf}".removeprefix(".")

    mult = [w[first.format(n)].shape[0] / len(w["image_proj.bias" if ddae else "conv_in.bias"]) for n in places]
    w, channels = {ours(k): v for k, v in w.items()}, len(w["image_proj.bias" if ddae else "conv_in.bias"])
    require_groups(min(1, *mult) * channels)
    for k in [k for k in w if k.endswith((".q.weight", ".q.bias"))]:             # one head: its q, k and v lie together, as ours do
        w[k.replace(".q.", ".qkv.")] = torch.cat([w.pop(k.replace(".q.", f".{x}.")) for x in "qkv"])
    w = {k: v.flatten(1)[..., None] if k.endswith(("qkv.weight", "proj_out.weight")) else v for k, v in w.items()}         # convolutions of one pixel, or linear
    w["time_embed.0.weight"] = w["time_embed.0.weight"].roll(channels // 2, 1)   # sines come first there
    s = dict(size=32 if levels < 5 else 8 * 2 ** (levels - 1), heads=1, path="vp", clock=[1.0, -1.0] if ddae else [999.0, -1000.0], predict="eps", null_row="none") | given
    model = Model("unet", channels, mult, blocks, [s["size"] >> level for level in range(levels) if has_attention[level]], head_channels=0, heads=s["heads"], clock=s["clock"],
                  style="ddae" if ddae else "ddpm", resample="conv" if any(".op." in k for k in w) else "block")
    return model, s, 3, w


def read_uvit(w, given):
    """U-ViT (arXiv 2209.12152) from its tensors: (Model, settings, channels of the input, tensors)."""
    (_, tokens, width), (_, channels, patch, _) = w["pos_embed"].shape, w["patch_embed.proj.weight"].shape
    depth, conv = 2 * sum(re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", k) is not None for k in w), "final_layer.weight" in w
    s = dict(size=patch * math.isqrt(tokens - 1 - ("label_emb.weight" in w)), heads=16 if width == 1152 else max(1, width // 64), predict="eps")
    s |= dict(null_row="last" if channels == 4 else "none")                      # on latents the last class is the null label
    s |= dict(path="vp-sde", clock=[999.0, -999.0]) if conv else dict(path="vp-sd", clock=[1000.0, -1000.0])    # the H models, without it, count 1000 steps
    s |= given
    return Model("uvit", width, patch=patch, depth=depth, heads=s["heads"], final_conv=conv, clock=s["clock"]), s, channels, w


def read_sgfm(w, given):
    """U-ViT trained with labels found online (arXiv 2312.08825; nnet.pth, nnet_ema.pth in the folder of a step) from its tensors, as `read_uvit`.

    Its tokens are class, time, condition, patches; with labels of patches: class, time, patches, and the condition is added to each patch. It is a prototype,
    `null_cfg_embed` for none, or `unconditional_embed`, which stands in its place until training uses labels, and whenever labels are looked for. The class
    token becomes a register, and so does a condition that is always the same (that of patches joins their positions). The head that finds labels is not read.
    """
    classes, null, alone = (w.pop(k)[0] for k in ("cls_token", "null_cfg_embed", "unconditional_embed"))         # [1, D] each
    c, pos, labelled = w.pop("prototypes.weight"), w["pos_embed"][0], given.get("null_row") != "none"
    if not w["projection_head.1.num_batches_tracked"]:    # averaging begins where training starts to use labels
        raise UserError("holds averages from before averaging began, the initial weights; name the nnet.pth beside it, with published.null_row=none")
    w, first, note = {k: v for k, v in w.items() if not k.startswith("projection_head.")}, [pos[1:2], pos[:1] + classes], "its tensors are read without labels"
    if math.isqrt(len(pos) - 2) ** 2 == len(pos) - 2:     # labels of patches
        pos = torch.cat([*first, pos[2:] + (null if labelled else alone)])
    elif labelled:
        pos, w["label_emb.weight"] = torch.cat([pos[2:3], *first, pos[3:]]), torch.cat([c, null])
        note = f"is read with its {len(c)} prototypes as labels; published.null_row=none reads it without, as it was before training used them"
    else:
        pos = torch.cat([*first, pos[2:3] + alone, pos[3:]])
    model, s, channels, w = read_uvit(w | {"pos_embed": pos[None]}, dict(path="cv", predict="v", clock=[0.0, 1.0], null_row="last") | given)
    note += "; by default such models start from weights trained with classes: if so, what is found in its features is not free of annotation"
    registers = len(pos) - (s["size"] // model.patch) ** 2 - 1 - ("label_emb.weight" in w)
    return dataclasses.replace(model, registers=registers), s | dict(note=note), channels, w


READERS = {"adm": read_adm, "ddpm": read_ddpm, "uvit": read_uvit, "sgfm": read_sgfm}


def load_published(run, kind, file):
    """Published weights as a checkpoint dict: the architecture from the tensors, the rest as published or as section `published` says."""
    path, given = Path(file), {k: v for k, v in dataclasses.asdict(run.published).items() if v}
    if not path.is_file():
        raise UserError(f"{path}: no such file of published weights")
    w = read_torch(path)
    if kind == "ddpm" and isinstance(w, dict) and isinstance(w.get("EMA"), dict):           # a training of DDAE
        w = {k.removeprefix("ema_model.nn_model."): v for k, v in w["EMA"].items() if str(k).startswith("ema_model.nn_model.")} or w
    if not isinstance(w, dict) or not w or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in w.items()):
        what = f"a dict of {', '.join(map(str, list(w)[:5]))}" if isinstance(w, dict) else type(w).__name__
        raise UserError(f"{path}: expected a dict of tensors as published, found {what}")
    try:
        model, s, channels, w = READERS[kind](dict(w), given)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as e:
        raise UserError(f"{path}: not the weights of a published {kind} model ({type(e).__name__}: {str(e)[:100]}); "
                        f"its first keys: {', '.join(sorted(w)[:3])}") from None
    K, size = 0, s["size"]
    if "label_emb.weight" in w:
        if s["null_row"] == "none":                       # no row was trained as null: the mean of all classes is the nearest thing to no class
            w["label_emb.weight"] = torch.cat([w["label_emb.weight"], w["label_emb.weight"].mean(0, keepdim=True)])
        K = len(w["label_emb.weight"]) - 1
        s.setdefault("note", f"was trained with {K} classes: what is found in its features is not free of annotation")
    if note := s.pop("note", ""):
        run.say(f"note: {path} {note}")
    w = {k: v.float() for k, v in w.items()}
    try:
        with torch.device("meta"):
            own = build_model(model, size, channels, num_labels=K).state_dict()
    except UserError as e:
        raise UserError(f"{path}: {e}; heads and size may be set in section published") from None
    bad = [f"{k} is missing" for k in own if k not in w] + [f"{k} is unknown" for k in w if k not in own]
    bad += [f"{k} is {list(w[k].shape)}, expected {list(own[k].shape)}" for k in own if k in w and own[k].shape != w[k].shape]
    if bad:
        raise UserError(f"{path}: does not fit the {kind} model that it resembles: {'; '.join(bad[:3])}" + (f"; and {len(bad) - 3} more" if len(bad) > 3 else ""))
    require_shape(run, dict(file=path, channels=channels, size=size),
                  "set data.size or data.latents in another run=" + " (or published.size: this network takes any size)" * (kind in ("adm", "ddpm")))
    return dict(format=FORMAT, kind=f"published {kind}", net=w, ema=w, model=dataclasses.asdict(model), size=size, channels=channels,
                conditions=dict(num_labels=K) if K else {}, num_labels=K, marginal=torch.full((K,), 1 / K, dtype=torch.float64) if K else None,
                null=s["null_row"] == "last", labels="published" if K else None, condition="label",
                label_file=f"published {'prototypes' if kind == 'sgfm' else 'classes'}" if K else None,
                path=s["path"], predict=s["predict"], data=None, config={}, seen=0, weights=digest(weights_hash(w), s), file=str(path))




# ---------------------------------------------------------------------------------------------------------------------
# Models that we did not train, called like ours

class Foreign(nn.Module):
    """Another program's network as ours are called: net(x_t, 1000 t). encode(images in [-1, 1]) -> what is noised; call(network, x_t, 1000 t) -> its output."""

    def __init__(self, net, encode, call, end, size, device):
        super().__init__()
        self.net, self.encode, self.call, self.found = net.eval().to(device), encode, call, {}
        for p in net.parameters():
            p.requires_grad_(False)
        if not isinstance(net, torch.jit.ScriptModule):   # scripted modules call no hooks
            self.found = discover(self, torch.zeros(2, 3, size, size, device=device))
        self.found[end] = self, as_map

    def forward(self, x, time):
        return self.call(self.net, x, time)


def encoded(net, x):
    """Images [B, 3, H, W] in [-1, 1] as the network wants them: other models may resize them or have an autoencoder."""
    return net.encode(x) if isinstance(net, Foreign) else x


def as_map(out, _=()):
    """A module's output as a map [B, C, H, W]: tokens [B, L, C] form a square behind up to 8 extra ones, a vector [B, C] is one position; None for all else.

    Of several outputs the first.
    """
    out = out[0] if isinstance(out, (tuple, list)) and out else getattr(out, "sample", out)
    if not torch.is_tensor(out) or out.dim() not in (2, 3, 4):
        return None
    if out.dim() == 3:
        side = math.isqrt(out.shape[1])
        return out[:, -side ** 2:].transpose(1, 2).unflatten(2, (side, side)) if side and out.shape[1] - side ** 2 <= 8 else None
    return out if out.dim() == 4 else out[:, :, None, None]


def channels_first(out, _=()):
    """As `as_map`, of maps [B, H, W, C]."""
    return out.permute(0, 3, 1, 2)


SPELLINGS = [(r"\.", "-"), (r"^(down|up)_blocks-(\d+)", r"\1-level\2"), ("^mid_block", "mid"), (r"resnets-(\d+)-conv2$", r"repeat\1-res-increment"),
             (r"resnets-(\d+)$", r"repeat\1-res-out"), (r"resnets-(\d+)", r"repeat\1-res"), (r"attentions-(\d+)$", r"repeat\1-vit-out"),
             (r"attentions-(\d+)-(?!transformer)", r"repeat\1-vit-block0-"), (r"attentions-(\d+)-transformer_blocks-(\d+)", r"repeat\1-vit-block\2"),
             (r"^transformer_blocks-(\d+)", r"vit-block\1"), (r"(vit-block\d+)$", r"\1-out"), (r"(attn1-|(?<=\d-)attn-)?to_([qkv])$", r"self-\2"),
             (r"attn1$|(?<=vit-block\d-)attn$|(?<=vit-block\d\d-)attn$", "self-out"),
             ("attn2-self-q$", "cross-q"), ("attn2$", "cross-out"), ("ff-net-0$", "ffn-inner"), ("ff$", "ffn-out"), (r"(down|up)samplers-0$", r"\1sampler-out"),
             ("^conv_in$", "unet-after-conv-in")]             # module paths of diffusers -> our names; what matches nothing keeps its path


def spelled(path):
    """Our name of a module path of diffusers."""
    for pattern, ours in SPELLINGS:
        path = re.sub(pattern, ours, path)
    return path


def scores_of(attention):
    """Function for a hook on to_k of an attention of diffusers -> where each position looks, [B, heads * keys, H, W]; the query is noted by a hook before it."""
    noted, head = [], lambda x, norm: (norm or (lambda v: v))(x.unflatten(2, (attention.heads, -1)).transpose(1, 2))        # [B, heads, L, d]
    pick = lambda k, _: as_map(attended(head(noted.pop(), attention.norm_q), head(k, attention.norm_k)).transpose(1, 2).flatten(2))
    pick.before = attention.to_q, lambda _, args, out: noted.append(out)
    return pick


OF_TEXT = re.compile(r"(^|\.)(context_embedder|caption_projection|add_[qkv]_proj|norm_added_[qk]|to_add_out|ff_context|norm[12]_context)(\.|$)")


@torch.no_grad()
def discover(net, images):
    """Catalogue of a network that we know nothing about: every module that returns a map or tokens, once, in the order of a pass over two images.

    Of networks of diffusers also where attention looks (but not for attention to image and text together, or to texts with padding), and what skips
    bring to the way up. Modules that see the text alone are left out. Some networks (Swin, ConvNeXt) have maps [B, H, W, C]: layers that work on the last
    dimension tell, and of other modules the last such layer before them whose output had their shape.
    """
    fired, hooks, last = [], [], {}

    def note(m, _, out, path):
        pick = (lambda out, _=(): as_map(out[1])) if type(m).__name__ == "JointTransformerBlock" else as_map             # (text, image)
        if torch.is_tensor(out) and out.dim() == 4:
            last[out.shape] = type(m) in (nn.Linear, nn.LayerNorm) or last.get(out.shape, False) and not isinstance(m, nn.Conv2d)
            pick = channels_first if last[out.shape] else pick
        fired.append((path, m, getattr(pick(out), "shape", [0]), pick))

    for path, m in net.net.named_modules():
        if path and not isinstance(m, (nn.Dropout, nn.Identity)) and not OF_TEXT.search(path):                   # these two repeat what comes before
            hooks.append(m.register_forward_hook(functools.partial(note, path=path)))
    net(x := net.encode(images), torch.full((2,), 500.0, device=x.device))
    for h in hooks:
        h.remove()
    found, count, width = {}, [id(m) for _, m, *_ in fired], 0
    for path, m, shape, pick in fired:
        above, once, second = net.net.get_submodule(path.rpartition(".")[0]), count.count(id(m)) == 1, re.match(r".*\.attn2(?=\.|$)", path)
        text = bool(second) and getattr(net.net.get_submodule(second[0]), "is_cross_attention", True)
        name = spelled(path if text else path.replace(".attn2", ".attn_second"))  # in some blocks of SD3.5 the second attention is one of the image, too
        if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+\.norm1", path):        # it sees what comes from below and the skip, side by side
            found[name.replace("res-norm1", "skip")] = m, lambda _, args, c=width: args[0][:, c:]
        width = m.out_channels if re.search(r"resnets\.\d+$", path) else width
        key = path.endswith(".to_k") and hasattr(above, "norm_k")
        if shape[0] == 2 and shape[-1] > 1 and once and not (text and re.search(r"\.to_[kv]$", path)):          # keys and values of a text have no place in the image
            found[name] = m, pick
        if key and once and getattr(above, "add_q_proj", None) is None and not (text and hasattr(net.net, "caption_projection")):
            found[re.sub("(self|cross)-k$", r"\1-map", name.replace("attn2-self-k", "cross-k"))] = m, scores_of(above)
    return found


class Tabulated(VariancePreserving):
    """The variance-preserving path of another program's 1000 steps: abar [1000]."""

    def __init__(self, abar):
        self.table, self.copies = torch.cat([torch.zeros(1, dtype=torch.float64), abar.double().clamp(min=1e-12).log()]), {}


class Clean:
    """No noise at all: the path of encoders."""

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return torch.zeros_like(t)


def complain(cfg, e):
    """A UserError out of what another program said about model=."""
    text = " ".join(str(e).split()) or type(e).__name__
    return UserError(f"model={cfg.model}: cannot be loaded ({text[:160]})")


TEXT = {"UNet2DConditionModel": "cross_attention_dim", "PixArtTransformer2DModel": "caption_channels", "SD3Transformer2DModel": "joint_attention_dim"}      # its width


def open_diffusers(cfg, device):
    """(network, encode, call, path, image size, tensors that besides the network's decide what features are) of a pipeline folder, a model folder, or an id of
    the hub: U-Nets with and without text, DiT, PixArt, SD3."""
    where = cfg.model.partition(":")[2]
    torchvision_datasets()                                # diffusers imports torchvision, which beside a CPU-only torch takes some care
    try:
        import diffusers
    except ImportError:
        raise UserError(f"model={cfg.model}: needs the package diffusers (pip install diffusers)") from None
    try:
        if (Path(where) / "config.json").is_file() and not (Path(where) / "model_index.json").is_file():         # older pipelines of one network have both
            kind = getattr(diffusers, read_json(Path(where) / "config.json", "a folder that save_pretrained wrote").get("_class_name", "none"))
            pipe, parts = None, dict(unet=kind.from_pretrained(where, torch_dtype=torch.float32))
        else:
            given = [k for k in diffusers.DiffusionPipeline.load_config(where) if re.match("text_encoder|tokenizer", k)] if cfg.embedding else []
            pipe = diffusers.DiffusionPipeline.from_pretrained(where, torch_dtype=torch.float32, **dict.fromkeys(given))       # a given text needs no encoder
            parts = pipe.components
    except UserError:
        raise
    except Exception as e:                                # missing files, packages, connections, classes: all are the user's to know
        raise complain(cfg, e) from None
    net, vae, plan = parts.get("unet") or parts.get("transformer"), parts.get("vae") or parts.get("vqvae"), parts.get("scheduler") or diffusers.DDPMScheduler()
    kind, abar, flow = type(net).__name__, getattr(plan, "alphas_cumprod", None), "FlowMatch" in type(plan).__name__
    asks = lambda what: getattr(net.config, what, None) or getattr(getattr(pipe, "config", None), what, None)    # the last two: SDXL's refiner, Kolors
    further = (getattr(net, "class_embedding", None) is not None or asks("addition_embed_type") not in (None, "text_time")
               or asks("requires_aesthetics_score") or asks("encoder_hid_dim_type"))
    if kind not in ("UNet2DModel", "DiTTransformer2DModel", *TEXT) or further:
        raise UserError(f"model={cfg.model}: is a {kind}{' with further conditions' * bool(further)}; what can be read is UNet2DModel, {', '.join(TEXT)} (without classes or "
                        "further conditions) and DiTTransformer2DModel")
    if not flow and (abar is None or len(abar) != 1000):
        raise UserError(f"model={cfg.model}: its scheduler {type(plan).__name__} is no flow and has no 1000 values of alphas_cumprod")
    channels = net.config.in_channels
    if vae is None and channels != 3:
        raise UserError(f"model={cfg.model}: has {channels} input channels and no autoencoder; name the folder of the whole pipeline")
    side = net.config.sample_size if isinstance(net.config.sample_size, int) else 64 if vae else 32
    side = cfg.resize or side * (2 ** (len(vae.config.block_out_channels) - 1) if vae else 1)
    told = conditions(cfg, pipe, net, side)
    if vae:
        vae.eval().requires_grad_(False).to(device)

    def encode(x):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if vae is None:
            return x
        code = vae.encode(x)
        code = code.latent_dist.mean if hasattr(code, "latent_dist") else code.latents
        return (code - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor

    def call(net, x, time):                               # a flow's clock is the share of noise; step i of the others, from 0, is t_ddpm = i + 1 = 1000 - time
        every = lambda v: {k: every(u) for k, u in v.items()} if isinstance(v, dict) else v.to(x.device).expand(len(x), *v.shape[1:])
        return net(x, timestep=1000 - time if flow else (999 - time).clamp(min=0), return_dict=False, **every(told))[0]
    more = {f"vae.{k}": v for k, v in vae.state_dict().items()} if vae else {}
    more |= {"vae.scale": torch.tensor([vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0])} if vae else {}
    texts = {k: v.float() for k, v in (told | told.get("added_cond_kwargs", {})).items() if torch.is_tensor(v)}
    more |= {k: (1000 * v).round() for k, v in texts.items()}                    # the last digits of a computed text depend on the machine
    return net, encode, call, PATHS["cv"] if flow else Tabulated(abar.cpu()), side, more


def conditions(cfg, pipe, net, side):
    """What a network of diffusers asks for besides image and time, one row each: the null label; the text, its summary or mask; that the image is square and whole."""
    kind, c, more = type(net).__name__, net.config, {}
    if kind == "DiTTransformer2DModel":
        return dict(class_labels=torch.tensor([c.num_embeds_ada_norm]))
    if kind not in TEXT:
        return {}
    text, mask, summary = text_embedding(cfg, pipe, getattr(c, TEXT[kind]), kind)
    if kind == "SD3Transformer2DModel":
        more = dict(pooled_projections=torch.zeros(1, c.pooled_projection_dim) if summary is None else summary)
    if kind == "PixArtTransformer2DModel":
        more = dict(encoder_attention_mask=mask, added_cond_kwargs=dict(resolution=torch.tensor([[float(side)] * 2]), aspect_ratio=torch.ones(1, 1)))
    if getattr(c, "addition_embed_type", None):           # SDXL: size, corner of the crop, size aimed at
        summary = torch.zeros(1, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim) if summary is None else summary
        more = dict(added_cond_kwargs=dict(text_embeds=summary, time_ids=torch.tensor([[side, side, 0, 0, side, side]])))
    return dict(encoder_hidden_states=text) | more


def text_embedding(cfg, pipe, width, kind):
    """What a network with text attends to: (float32 [1, tokens, width], mask [1, tokens], the text's summary [1, D] or None), of the given array, whose summary
    is not known, or of the empty prompt by the pipeline's own text encoders."""
    if cfg.embedding:
        try:
            e = torch.from_numpy(np.load(cfg.embedding, allow_pickle=False)).float()
        except (OSError, ValueError) as err:
            raise UserError(f"embedding={cfg.embedding}: cannot be read ({err})") from None
        if e.dim() != 2 or e.shape[1] != width:
            raise UserError(f"embedding={cfg.embedding}: is {list(e.shape)}, must be [tokens, {width}]")
        return e[None], torch.ones(1, len(e)), None
    if getattr(pipe, "text_encoder", None) is None:
        raise UserError(f"model={cfg.model}: attends to a text, and there is no text encoder; name the whole pipeline (needs the package transformers), "
                        "or embedding=FILE.npy")
    try:
        empty = {k: "" for k in inspect.signature(pipe.encode_prompt).parameters if re.fullmatch(r"prompt(_[23])?", k)}
        with torch.no_grad():
            text, *rest = pipe.encode_prompt(**empty, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    except Exception as e:                                # pipelines differ
        raise UserError(f"model={cfg.model}: its text encoders do not take the empty prompt ({str(e)[:160]}); name embedding=FILE.npy") from None
    pixart = kind == "PixArtTransformer2DModel"
    return text.float(), rest[0] if pixart else torch.ones(text.shape[:2]), rest[1].float() if len(rest) == 3 and not pixart else None


def open_encoder(cfg, device):
    """As `open_diffusers`, of an encoder: torch.hub's get ImageNet-normalised images, TorchScript files uint8 ones, as evaluators do."""
    try:
        if cfg.model.startswith("hub:"):
            repo, _, name = cfg.model[4:].rpartition("/")
            source = "local" if Path(repo).is_dir() else "github"
            net = torch.hub.load(repo, name, source=source, trust_repo=True, verbose=False)          # its code runs here: the user named it
        else:
            net = torch.jit.load(cfg.model, map_location="cpu")
    except Exception as e:                                # code of others may fail in any way
        raise complain(cfg, e) from None
    side, (mean, std) = cfg.resize or 224, (torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = lambda x, side: F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    if cfg.model.startswith("hub:"):
        return net, lambda x: (resized(x, side) / 2 + 0.5 - mean) / std, lambda net, x, time: net(x), Clean(), side, {}
    file = torch.from_numpy(np.fromfile(cfg.model, np.uint8))                    # a script's code decides, too
    return net, lambda x: resized(x, cfg.resize) if cfg.resize else x, lambda net, x, time: net(to_uint8(x)), Clean(), cfg.resize, dict(file=file)


def open_foreign(run, cfg):
    """(network, state) of model=, to be used like those of `load_model`. To be called by all processes."""
    diffusion = cfg.model.startswith("diffusers:")
    for mine in run.turns():
        if mine:
            net, encode, call, PATHS[cfg.model], side, more = (open_diffusers if diffusion else open_encoder)(cfg, run.device)
    side = side or run.data.size
    try:
        net = Foreign(net, encode, call, "unet-out" if diffusion else "out", side, run.device)
        if as_map(net(net.encode(torch.zeros(2, 3, side, side, device=run.device)), torch.full((2,), 500.0, device=run.device))) is None:
            raise ValueError("its output is no vector, map or tokens")
    except Exception as e:
        raise complain(cfg, e) from None
    return net, dict(path=cfg.model, size=run.data.size, channels=3, weights=weights_hash(net.state_dict() | more), file=cfg.model, encoder=not diffusion)


def noise_level(path, t):
    """The noise time in the terms of other papers: t, rho = sigma / alpha and log-SNR."""
    t = torch.tensor(t, dtype=torch.float64)
    rho = float(PATHS[path].sigma(t) / PATHS[path].alpha(t).clamp(min=1e-12))
    return dict(t=float(t), rho=rho, log_snr=-2 * math.log(max(rho, 1e-12)))




def list_activations(run, net, state, context):
    """Print every activation of the network: name, kind, stage, channels, size of its map, share of the forward pass until it is there."""
    every = list(catalogue(net))
    x, t = torch.zeros(1, state["channels"], state["size"], state["size"], device=run.device), torch.full((1,), 0.5, device=run.device)
    with torch.no_grad(), context(), tapped(net, every, then=lambda m: m.shape[1:]) as sizes:      # no map is kept: those of scores are large
        net(encoded(net, x), 1000 * t)
    share = cost_shares(net, x, t)
    run.say(f"{'name':44} {'kind':18} {'stage':5} {'channels':>8}  {'size':9} cost")
    for name in every:
        kind, where = describe(name)
        c, h, w = sizes[name]
        run.say(f"{name:44} {kind:18} {where:5} {c:8}  {f'{h} x {w}':9} {share[name]:4.0%}")


def pca_sheet(run, cfg, net, state, context, names, times, inputs):
    """Write features/<name>-pca.png: test images `shown`, and the first three principal components of their maps as colours."""
    test, file, n = load_data(run, "test"), run.dir / "features" / f"{cfg.name}-pca.png", len(cfg.shown)
    require(n and all(0 <= i < len(test) for i in cfg.shown), cfg, "shown", f"name test images, 0 to {len(test) - 1}")
    out, sheet, size = {}, [np.tile(test.images[cfg.shown], (len(times), 1, 1, 1))], test.images.shape[2:]
    for _, one in stream(net, state, inputs(test), np.array(cfg.shown), names, times, device=run.device, context=context, pool="none", draws=cfg.draws,
                         seed=cfg.seed, purpose="features test", batch=n):
        out |= one
    sheet += [F.interpolate(pca_rgb(out[name, t].cpu()), size).numpy() for name in names for t in times]
    if run.rank == 0:
        head = "first three principal components; columns: t = " + ", ".join(map(str, times))
        save_grid(file, np.concatenate(sheet), n * len(times), rows=["image", *names], head=head)
    run.say(f"maps of {len(names)} activation(s) x {len(times)} time(s) x {n} image(s) in {file}")


def main():
    """Extract features, from the command line."""
    run = start("extract_features", ExtractFeatures, __doc__, flags={"--list": "every activation: kind, stage, channels, size, cost share", "--pca": "one sheet of PCA maps of test images (shown=)"})
    cfg = run.cfg
    net, state = open_foreign(run, cfg) if cfg.model else load_model(run, cfg.checkpoint, cfg.weights, cfg.compile)
    context, _, why = autocast(run, cfg.precision)
    if "--list" in run.flags:
        return list_activations(run, net, state, context)
    if not cfg.model:
        require_shape(run, state)

    # what to read, and where
    times = cfg.t
    inputs = lambda data: data.images if cfg.model else data.inputs               # models of others see images, even where ours see latents
    if cfg.model and cfg.activations == ["auto"]:
        cfg.activations = ["out"] if state["encoder"] else []
    if cfg.model and state["encoder"]:
        times = cfg.t or [1.0]
        require(times == [1.0], cfg, "model t", "an encoder sees clean images: t=1")
    if cfg.activations == ["auto"]:
        probed = read_json(run.dir / "probe" / f"{cfg.choice}.json", "run probe.py first, or name activations= and t=")
        if probed.get("protocol") not in ("sweep", "boxes") or probed["hash"] != state["weights"] or probed["recipe"].get("weights", "ema") != cfg.weights:
            raise UserError(f"probe/{cfg.choice}.json is no sweep of {state['file']} ({state['weights']}, {cfg.weights}) but of {probed.get('checkpoint')} ({probed.get('hash')}, {probed['recipe'].get('weights')}); "
                            "run probe.py on this checkpoint (overwrite=true, or another name= and choice=), or name activations= and t=")
        if probed["recipe"].get("transfer"):
            raise UserError(f"probe/{cfg.choice}.json looked at other images (transfer=); name another choice=, or activations= and t=")
        choice = probed["label_free"]
        names, times = matching(net, [choice["activation"]]), times or [choice["t"]]
    else:
        names = matching(net, cfg.activations)
    if not times or not all(0 <= t <= 1 for t in times) or len({f"{t:g}" for t in times}) < len(times):
        raise UserError(f"t={times}: name one or more noise times between 0 and 1 that differ within six digits")
    if "--pca" in run.flags and not run.dry_run:
        return pca_sheet(run, cfg, net, state, context, names, times, inputs)
    if cfg.pool not in ("mean", "none") and not (cfg.pool.isdecimal() and int(cfg.pool)):
        raise UserError(f"pool={cfg.pool}: must be mean, none or a number")
    require(not (cfg.model and cfg.compile), cfg, "model compile", "other people's models are run as they are: compile=false")
    require(min(cfg.draws, cfg.batch, len(cfg.splits)) >= 1, cfg, "draws batch splits", "must be at least 1")
    folder, aside = run.dir / "features" / cfg.name, run.dir / "features" / f".{cfg.name}.tmp"
    data = {split: load_data(run, split) for split in cfg.splits}
    weights = state["weights"] if cfg.weights == "ema" or cfg.model else f"raw beside {state['weights']}"
    recipe = dict(checkpoint=cfg.model or cfg.checkpoint, weights=cfg.weights, hash=weights, pool=cfg.pool,
                  draws=cfg.draws, seed=cfg.seed, dtype=cfg.dtype, precision=cfg.precision, data={k: d.info["fingerprint"] for k, d in data.items()},
                  arrays=[dict(activation=n, **noise_level(state["path"], t)) for n in names for t in times])
    recipe |= dict(resize=cfg.resize, embedding=cfg.embedding and digest(np.fromfile(cfg.embedding, np.uint8))) if cfg.model else {}
    if run.dry_run:
        blank = np.zeros((1, state["channels"], state["size"], state["size"]), np.uint8)
        _, one = next(stream(net, state, blank, np.arange(1), names, times, device=run.device, context=context, pool=cfg.pool))
        size = np.dtype(cfg.dtype).itemsize * sum(map(len, data.values())) * sum(v.numel() for v in one.values())
        run.say(f"{len(names)} activation(s) x {len(times)} time(s): {', '.join(names)}; {size / 1e6:,.0f} MB in {folder}")
        if not cfg.model:
            say_network(run, net, state["channels"], state["size"])
        return
    if run.agreed(lambda: finished(run, folder / "info.json", recipe)):
        return

    # extract: every rank fills its own rows of the same arrays
    run.say(f"{len(names)} activation(s) x {len(times)} time(s): {', '.join(names)} at t = {', '.join(map(str, times))}; {why}")
    if run.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    run.wait()
    shapes = {}
    for split, part in data.items():
        rows = run.share(len(part))
        _, one = next(stream(net, state, inputs(part), np.arange(1), names, times, device=run.device, context=context, pool=cfg.pool))
        files = {}
        for key, value in one.items():
            shape = (len(part), *value.shape[1:])
            shapes[key] = list(value.shape[1:])
            files[key] = aside / file_of(split, *key)
            if run.rank == 0:
                create_rows(files[key], cfg.dtype, shape)
        run.wait()
        with bar(run, len(part), f"features of {split} images") as progress:
            for part_rows, out in stream(net, state, inputs(part), rows, names, times, device=run.device, context=context, pool=cfg.pool,
                                         draws=cfg.draws, seed=cfg.seed, purpose=f"features {split}", batch=cfg.batch, compiled=cfg.compile):
                for key, value in out.items():
                    value = value.cpu().to(getattr(torch, cfg.dtype))
                    if not torch.isfinite(value).all():
                        raise UserError(f"{key[0]} at t={key[1]}: non-finite features; is {state['file']} a healthy model? (or too large for dtype={cfg.dtype})")
                    write_rows(files[key], part_rows[0], value.numpy())
                progress.update(len(part_rows) * run.world)
    run.wait()
    if run.rank == 0:
        write_json(aside / "info.json", recipe | dict(shapes=[shapes[n, t] for n in names for t in times]))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    run.wait()
    run.say(f"features in {folder}: " + ", ".join(f"{n} t={t:g} {shapes[n, t]}" for n in names for t in times))
    run.next("self_label.py" + ("" if cfg.name == "base" else f" features={cfg.name}"), "groups the images by these features")


if __name__ == "__main__":
    cli(main)

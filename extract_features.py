"""Extract features: a trained model and images in, its hidden activations at chosen places and noise times out.

Reads   runs/<run>/{diffusion,guided}/<name>/checkpoint.pt and data/{train,test}/ (images, or latents)
Writes  features/<name>/{train,test}-<activation>-t<time>.npy, whose row i is image i, and info.json
Time    t = 0 is noise, t = 1 is data: the network sees x_t = alpha(t) x + sigma(t) z, z the noise of this image.

    python extract_features.py configs/shapes.yaml                               # CPU, seconds
    python extract_features.py configs/cifar10.yaml activations='mid*-out,up-level0*-out' t=0.6,0.9      # one GPU
    torchrun --nproc_per_node=8 extract_features.py configs/cifar10.yaml         # eight GPUs, the same files
    python extract_features.py configs/shapes.yaml --list                        # every activation and its size
    python extract_features.py configs/shapes.yaml --pca activations='*-res-out' t=0.3,0.6,0.9          # a look at them
    python extract_features.py configs/cifar10.yaml name=dino model=hub:facebookresearch/dino:main/dino_vits16
    python extract_features.py configs/cifar10.yaml name=ddpm model=diffusers:google/ddpm-cifar10-32 \\
        activations='mid*-res-out' t=0.95

Activations are named stage-level-repeat-kind: `up-level0-repeat1-res-out` is the output of the second residual block of
the way up at its lowest resolution. Increments are what a branch adds (res-increment, self-out, ffn-out); self-residual
is the sum after attention. A skip is what arrives from the mirrored place of the way down: the raw channels in the
U-Net, the merged tokens in the U-ViT. self-map has a channel for every head and key, at each query.

Read first `catalogue`, `tapped`, `reader` and `stream`. Skip "Models of other programs": Stable Diffusion, SDXL, DiT
and DDPM from diffusers, and encoders from torch.hub, which are given the same names and the same way of being read.
"""
import difflib
import fnmatch
import math
import re
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.data import as_input, file_of, load_data, require_shape, row_shape, torchvision_datasets
from configs.run import (UserError, ahead, autocast, bar, check_name, cli, create_rows, digest, draw, finished, key,
                         making, read_json, reading, require, save_grid, start, to_uint8, weights_hash, write_json,
                         write_rows)
from train_diffusion import PATHS, UNet, VariancePreserving, diffuse, load_model


@dataclass
class ExtractFeatures:
    """Section `extract_features`."""
    name: str = key("base", "results go to features/<name>")
    checkpoint: str = key("diffusion/base", "whose activations: a folder of the run, or a .pt file")
    weights: Literal["ema", "net"] = key("ema", "averaged or raw")
    model: str = key("", "in place of checkpoint: diffusers:FOLDER_OR_ID, or hub:REPO/NAME (REPO may be a folder)")
    embedding: str = key("", "model=diffusers with text: a .npy [tokens, D] to condition on; empty = the empty prompt")
    resize: int = key(0, "model: images become so large for it; 0 = what it was made for (torch.hub: 224)", low=0)
    activations: list[str] = key(["auto"], "names, globs, or blocks = the output of every block; "
                                           "auto = the label-free choice in probe/<choice>.json")
    t: list[float] = key([], "noise times; empty with activations=auto = the label-free choice", low=0, high=1)
    choice: str = key("sweep", "which probe result `auto` reads")
    pool: str = key("mean", "mean, none, or a number g: average over a grid of g x g")
    draws: int = key(1, "noise draws to average", low=1)
    splits: list[Literal["train", "test"]] = key(["train", "test"], "parts of the data")
    dtype: Literal["float32", "float16"] = key("float32", "on disk")
    batch: int = key(256, "images per forward pass and process", low=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network")
    shown: list[int] = key([0, 1, 2, 3], "--pca: which test images", low=0)
    seed: int = key(0, "of the noise")
    overwrite: bool = key(False, "replace features that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Readers: what the output (or the inputs) of a hooked module say, as a map [B, C, H, W]

def square(x):
    """Positions in a row, [B, C, L], as a map [B, C, H, W]."""
    return x.unflatten(2, (math.isqrt(x.shape[2]), -1))


def output_map(net, block, output, inputs):
    """A module's output, which is a map [B, C, H, W]."""
    return output


def input_map(net, block, output, inputs):
    """A module's input, which is a map [B, C, H, W]."""
    return inputs[0]


def positions(net, block, output, inputs):
    """The output of a U-Net's attention, channels by position, as a map."""
    return square(output)                                 # [B, C, L]


def patches(net, block, output, inputs):
    """The output of a patch embedding as a map."""
    return square(output.transpose(1, 2))                 # [B, L, D]


def tokens(net, block, output, inputs):
    """[B, extras + L, D]: the tokens of time and condition stand before those of patches."""
    return patches(net, block, output[:, net.extras:], inputs)


def input_tokens(net, block, output, inputs):
    """The tokens that a module is given, as a map."""
    return tokens(net, block, inputs[0], inputs)


def unet_skip(net, block, output, inputs):
    """Of what a block of the way up is given, [from below, skip], the second part."""
    blocks = [net.middle_block[-1], *(layers[0] for layers in net.output_blocks)]
    below = blocks[blocks.index(block) - 1]
    return inputs[0][:, below.out_layers[-1].out_channels:]


def heads(net, block, output):
    """The output of a qkv layer as q, k and v: [3, B, heads, L, d]."""
    if isinstance(net, UNet):                             # [B, heads * 3 * d, L]
        return output.unflatten(1, (block.heads, 3, -1)).permute(2, 0, 1, 4, 3)
    return output.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)           # [B, L, 3 * heads * d]


def one_of_qkv(net, block, output, inputs, letter):
    """Queries, keys or values of all heads side by side, as a map [B, heads d, H, W]."""
    x = heads(net, block, output)["qkv".index(letter)]                           # [B, heads, extras + L, d]
    return square(x[:, :, getattr(net, "extras", 0):].transpose(2, 3).flatten(1, 2))


def score_map(net, block, output, inputs):
    """Where each position looks: [B, heads * (extras + L), H, W]."""
    q, k, _ = heads(net, block, output)
    scores = attended(q[:, :, getattr(net, "extras", 0):], k)                    # [B, heads, L, extras + L]
    return square(scores.transpose(2, 3).flatten(1, 2))


def attended(q, k):
    """How much queries [B, heads, L, d] look at keys [B, heads, M, d]: float32 [B, heads, L, M], rows sum to one."""
    with torch.autocast(q.device.type, enabled=False):    # in the network's precision products may overflow
        return (q.float() / math.sqrt(q.shape[3]) @ k.float().transpose(2, 3)).softmax(3)


read_q, read_k, read_v = (partial(one_of_qkv, letter=letter) for letter in "qkv")


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue: every activation by a stable name, in the order in which the forward pass computes them

BLOCKS = {                                                # kind of block -> ending of the name: (submodule, reader)
    "ResBlock": {
        "skip": ("in_layers.0", unet_skip),
        "res-increment": ("out_layers.3", output_map),
        "res-out": ("", output_map),
    },
    "resampler": {
        "out": ("", output_map),
    },
    "AttentionBlock": {
        "vit-block0-self-q": ("qkv", read_q),
        "vit-block0-self-k": ("qkv", read_k),
        "vit-block0-self-v": ("qkv", read_v),
        "vit-block0-self-map": ("qkv", score_map),
        "vit-block0-self-out": ("proj_out", positions),
        "vit-out": ("", output_map),
    },
    "Block": {
        "skip": ("skip_linear", tokens),
        "self-q": ("attn.qkv", read_q),
        "self-k": ("attn.qkv", read_k),
        "self-v": ("attn.qkv", read_v),
        "self-map": ("attn.qkv", score_map),
        "self-out": ("attn.proj", tokens),
        "self-residual": ("norm2", input_tokens),
        "ffn-inner": ("mlp.fc1", tokens),
        "ffn-out": ("mlp.fc2", tokens),
        "out": ("", tokens),
    },
}


def unet_way(stage, blocks):
    """Yield (prefix of names, layer) of the U-Net's way down or up; levels of the way up count from the lowest size."""
    level = repeat = 0
    for block in blocks:
        for layer in block:
            resampler = getattr(layer, "resample", None)
            yield f"{stage}-level{level}-" + (f"{stage}sampler" if resampler else f"repeat{repeat}"), layer
        level, repeat = (level + 1, 0) if resampler else (level, repeat + 1)     # resamplers end a level


def parts(net):
    """Yield (prefix of names, block) of a network of ours, in forward order."""
    if isinstance(net, UNet):
        yield from unet_way("down", net.input_blocks[1:])
        yield from zip(("mid-repeat0", "mid-repeat1", "mid-repeat1"), net.middle_block)    # attention is the second
        yield from unet_way("up", net.output_blocks)
    else:
        for stage, blocks in (("down", net.in_blocks), ("mid", [net.mid_block]), ("up", net.out_blocks)):
            for i, block in enumerate(blocks):
                yield f"{stage}-vit-block{i}", block


def catalogue(net):
    """Ordered dict: name -> (module to hook, function from its output and inputs to a map [B, C, H, W])."""
    if isinstance(net, Foreign):
        return net.found
    unet = isinstance(net, UNet)
    first = net.input_blocks[0][0] if unet else net.patch_embed
    found = {"unet-in": (first, partial(input_map, net, first))}
    if unet:
        found["unet-after-conv-in"] = first, partial(output_map, net, first)
    else:
        found["vit-after-embed"] = first, partial(patches, net, first)
    for prefix, block in parts(net):
        kind = "resampler" if getattr(block, "resample", None) else type(block).__name__
        for ending, (submodule, read) in BLOCKS[kind].items():
            if ending != "skip" or prefix.startswith("up"):
                found[f"{prefix}-{ending}"] = block.get_submodule(submodule), partial(read, net, block)
    found["unet-out"] = net, partial(output_map, net, net)
    return found


def block_outputs(net):
    """Names of the catalogue that are the output of a whole block (between modules, not inside them)."""
    return [n for n in catalogue(net) if n.endswith("-out") and "self" not in n and "ffn" not in n and n != "unet-out"]


def describe(name):
    """(kind, stage) of a name: up-level0-repeat1-res-out -> res-out, up. The ends of the network have stage end, blocks
    of transformers without levels flat."""
    stage = re.match(r"(down|mid|up)-|(vit-)?block", name)
    kind = re.sub(r"^((down|mid|up)(-level\d+)?(-repeat\d+)?(-vit-block\d+)?|(vit-)?block\d+|unet|vit)-", "", name)
    return kind, "end" if stage is None else stage[1] or "flat"


def matching(net, patterns):
    """Names that match any of the names, globs or `blocks`, in forward order; a pattern without a match is an error."""
    names, chosen = list(catalogue(net)), set()
    for pattern in patterns:
        hits = block_outputs(net) if pattern == "blocks" else fnmatch.filter(names, pattern)
        if not hits:
            near = ", ".join(difflib.get_close_matches(pattern, names, 3, 0.3)) or "none"
            raise UserError(f"activations={pattern}: no such activation; nearest: {near}; "
                            "extract_features.py --list shows all")
        chosen |= set(hits)
    if not chosen:
        raise UserError("activations=: name at least one; extract_features.py --list shows all")
    return [n for n in names if n in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Hooks, and the stream of features

class Enough(Exception):
    """Raised by a hook when nothing deeper is wanted."""


@contextmanager
def tapped(net, names, stop=False, then=lambda x: x):
    """Within this context, calls of `net` fill the yielded dict: name -> then(map [B, C, H, W]).

    `then` is called at once, so that no more is kept than it returns. stop: a call ends at the deepest name, by raising
    `Enough`.
    """
    known = catalogue(net)
    got, hooks = {}, []
    names = sorted(names, key=list(known).index)          # hooks of one module fire in the order of registration

    def hook(name, pick):
        def take(module, inputs, output):
            got[name] = then(pick(output, inputs))
            if stop and name == names[-1]:
                raise Enough
        return take

    try:
        for name in names:
            module, pick = known[name]
            if isinstance(pick, Scores):                  # it needs another module's output, too
                hooks.append(pick.attention.to_q.register_forward_hook(pick.note))
            hooks.append(module.register_forward_hook(hook(name, pick)))
        yield got
    finally:
        for h in hooks:
            h.remove()


def pooled(x, pool):
    """Map [B, C, H, W] -> float32 [B, C] (mean), [B, C * g * g] (grid) or the map itself (none)."""
    x = x.float()
    if pool == "none":
        return x
    return x.mean((2, 3)) if pool == "mean" else F.adaptive_avg_pool2d(x, int(pool)).flatten(1)


def reader(net, names, pool="mean"):
    """A function (x_t [B, C, H, W], t [B]) -> [activation of each name, pooled].

    It is one forward pass that ends at the deepest name; the condition is null; gradients flow where they are enabled.
    """
    def read(x, t):
        with tapped(net, names, stop=True, then=lambda x: pooled(x, pool)) as got, suppress(Enough):
            net(x, 1000 * t)
        if silent := [n for n in names if n not in got]:
            raise UserError(f"activations={silent[0]}: the network has it, but a forward pass never computes it")
        return [got[n] for n in names]
    return read


@torch.no_grad()
def stream(net, state, images, rows, names, times, *, device, context, pool="mean", draws=1, seed=0,
           purpose="features train", batch=256):
    """Yield (rows of this batch, {(name, t): float32 tensor}) over `rows` of uint8 images [N, 3, H, W] or of latents.

    One forward pass per (batch, time, draw) serves all names; the condition is null. The noise is a function of
    (seed, purpose, draw, row), so neither batch size nor number of processes changes the result. Encoders see no noise.
    """
    path, read = path_of(state["path"]), reader(net, names, pool)
    clean = isinstance(path, Clean)
    draws = 1 if clean else draws
    shape = net.shape if isinstance(net, Foreign) else row_shape(images)

    def prepared(part):
        noise = [] if clean else [draw(seed, f"{purpose} {d}", part, shape) for d in range(draws)]
        return part, torch.from_numpy(np.ascontiguousarray(images[part])), noise

    for part, x, noise in ahead(prepared, (rows[i:i + batch] for i in range(0, len(rows), batch))):
        x, out = encoded(net, as_input(x.to(device))), {}                        # [B, C, H, W]
        for d in range(draws):
            z = None if clean else noise[d].to(device)
            for t in times:
                time = torch.full((len(x),), t, device=device)
                x_t = x if clean else diffuse(path, x, z, time)
                with context():
                    values = read(x_t, time)
                for name, value in zip(names, values):
                    value = value / draws
                    out[name, t] = out[name, t] + value if d else value
        yield part, out


def path_of(path):
    """A noise path by its name; models of other programs bring their own."""
    return PATHS.get(path, path)


def noise_level(path, t):
    """The noise time in the terms of other papers: t, rho = sigma / alpha and log-SNR."""
    path, t = path_of(path), torch.tensor(t, dtype=torch.float64)
    rho = float(path.sigma(t) / path.alpha(t).clamp(min=1e-12))
    return dict(t=float(t), rho=rho, log_snr=-2 * math.log(max(rho, 1e-12)))


# ---------------------------------------------------------------------------------------------------------------------
# Models of other programs, called and read like ours

class Foreign(nn.Module):
    """A network of another program, called as ours are: net(x_t, 1000 t).

    encode: images [B, 3, H, W] in [-1, 1] -> what is noised; call: (network, x_t, 1000 t) -> its output, whose name in
    the catalogue is `end`; side: how large an image is to find out what there is.
    """

    def __init__(self, net, encode, call, end, side, device):
        super().__init__()
        self.net = net.eval().requires_grad_(False).to(device)
        self.encode, self.call = encode, call
        with torch.no_grad():
            x = encode(torch.zeros(2, 3, side, side, device=device))
        self.shape = x.shape[1:]
        self.found = discover(self, x) | {end: (self, as_map)}

    def forward(self, x, time):
        return self.call(self.net, x, time)


def encoded(net, x):
    """Images [B, 3, H, W] in [-1, 1] as the network wants them: other models resize them or have an autoencoder."""
    return net.encode(x) if isinstance(net, Foreign) else x


def as_map(out, inputs=()):
    """A module's output (the first of several) as a map [B, C, H, W], None if it is nothing of that kind.

    Tokens [B, L, C] form a square behind up to 8 extra ones; a vector [B, C] is one position.
    """
    out = out[0] if isinstance(out, (tuple, list)) and out else getattr(out, "sample", out)
    if not torch.is_tensor(out) or out.dim() not in (2, 3, 4):
        return None
    if out.dim() != 3:
        return out if out.dim() == 4 else out[:, :, None, None]
    side = math.isqrt(out.shape[1])
    if not side or out.shape[1] - side ** 2 > 8:
        return None
    return square(out[:, -side ** 2:].transpose(1, 2))


SPELLINGS = [                                             # parts of module paths of diffusers -> our names
    (r"\.", "-"),
    (r"^(down|up)_blocks-(\d+)", r"\1-level\2"),
    (r"^mid_block", "mid"),
    (r"^conv_in$", "unet-after-conv-in"),
    (r"(down|up)samplers-0$", r"\1sampler-out"),
    (r"resnets-(\d+)-conv2$", r"repeat\1-res-increment"),
    (r"resnets-(\d+)$", r"repeat\1-res-out"),
    (r"resnets-(\d+)", r"repeat\1-res"),
    (r"attentions-(\d+)$", r"repeat\1-vit-out"),
    (r"attentions-(\d+)-transformer_blocks-(\d+)", r"repeat\1-vit-block\2"),
    (r"attentions-(\d+)-", r"repeat\1-vit-block0-"),
    (r"^transformer_blocks-(\d+)", r"vit-block\1"),
    (r"(vit-block\d+)$", r"\1-out"),
    (r"attn2-to_([qkv])$", r"cross-\1"),
    (r"(attn1-)?to_([qkv])$", r"self-\2"),
    (r"attn1$", "self-out"),
    (r"attn2$", "cross-out"),
    (r"ff-net-0$", "ffn-inner"),
    (r"ff$", "ffn-out"),
]


def spelled(path):
    """Our name of a module path of diffusers."""
    for pattern, ours in SPELLINGS:
        path = re.sub(pattern, ours, path)
    return path


class Scores:
    """Where each position looks in an attention of diffusers: read when `to_k` is called, with the queries of `to_q`
    noted before."""

    def __init__(self, attention):
        self.attention, self.q = attention, None

    def note(self, module, inputs, output):
        self.q = self.heads(output, self.attention.norm_q)

    def heads(self, x, norm):
        x = x.unflatten(2, (self.attention.heads, -1)).transpose(1, 2)           # [B, heads, L, d]
        return x if norm is None else norm(x)

    def __call__(self, output, inputs):
        q, self.q = self.q, None
        scores = attended(q, self.heads(output, self.attention.norm_k))          # [B, heads, L, M]
        return square(scores.transpose(2, 3).flatten(1, 2))


def resnet_skip(net, block, output, inputs):
    """As `unet_skip`, of a residual block of diffusers."""
    blocks = [*net.mid_block.resnets, *(resnet for level in net.up_blocks for resnet in level.resnets)]
    below = blocks[blocks.index(block) - 1]
    return inputs[0][:, below.out_channels:]


@torch.no_grad()
def discover(net, x):
    """Catalogue of a network that we know nothing about: all modules that return a map or tokens, in forward order.

    x: two encoded images. Of networks of diffusers also where attention looks, and the skips. Channels are taken to
    come second in maps, last in tokens.
    """
    fired, hooks = [], []

    def note(path):
        return lambda module, inputs, output: fired.append((path, module, getattr(as_map(output), "shape", None)))

    for path, module in net.net.named_modules():
        if path and not isinstance(module, (nn.Dropout, nn.Identity)):           # these repeat what comes before them
            hooks.append(module.register_forward_hook(note(path)))
    if as_map(net(x, torch.full((2,), 500.0, device=x.device))) is None:
        raise ValueError("its output is no vector, map or tokens")
    for h in hooks:
        h.remove()

    found, calls = {}, Counter(path for path, _, _ in fired)
    for path, module, shape in fired:
        name, parent = spelled(path), net.net.get_submodule(path.rpartition(".")[0])
        of_text = name.endswith(("cross-k", "cross-v"))   # these have no place in the image
        if calls[path] > 1:                               # which of its calls would be meant?
            continue
        if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+\.norm1", path):
            found[name.replace("res-norm1", "skip")] = module, partial(resnet_skip, net.net, parent)
        if shape and shape[0] == 2 and shape[3] > 1 and not of_text:
            found[name] = module, as_map
        if path.endswith(".to_k") and hasattr(parent, "norm_k"):
            found[f"{name[:-1]}map"] = module, Scores(parent)
    return found


class Tabulated(VariancePreserving):
    """The variance-preserving path of another program's 1000 steps: abar [1000]."""

    def __init__(self, abar):
        self.table = torch.cat([torch.zeros(1, dtype=torch.float64), abar.double().clamp(min=1e-12).log()])
        self.copies = {}


class Clean:
    """No noise at all: the path of encoders."""

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return torch.zeros_like(t)


@contextmanager
def loading(cfg):
    """Whatever another program says while model= is opened becomes one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:                                # files, packages, connections, code of others
        text = " ".join(str(e).split())[:160] or type(e).__name__
        raise UserError(f"model={cfg.model}: cannot be loaded ({text})") from None


def open_foreign(run, cfg):
    """(network, state) of model=, to be used like those of `load_model`. To be called by all processes."""
    kind = cfg.model.partition(":")[0]
    require(kind in ("diffusers", "hub"), cfg, "model", "must be diffusers:FOLDER_OR_ID or hub:REPO/NAME")
    open_it, end = (open_diffusers, "unet-out") if kind == "diffusers" else (open_encoder, "out")
    with loading(cfg):
        for mine in run.turns():
            if mine:
                net, encode, call, path, side, others = open_it(cfg, run.device)
        net = Foreign(net, encode, call, end, side, run.device)
    weights = weights_hash(net.state_dict() | others)
    clean = isinstance(path, Clean)
    return net, dict(path=path, size=run.data.size, channels=3, weights=weights, file=cfg.model, encoder=clean)


def open_encoder(cfg, device):
    """(network, encode, call, path, side, no other tensors) of torch.hub: it sees ImageNet-normalised images."""
    repo, _, name = cfg.model.removeprefix("hub:").rpartition("/")
    source = "local" if Path(repo).is_dir() else "github"
    net = torch.hub.load(repo, name, source=source, trust_repo=True, verbose=False)        # runs its code
    side = cfg.resize or 224
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def encode(x):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        return (x / 2 + 0.5 - mean) / std
    return net, encode, lambda net, x, time: net(x), Clean(), side, {}


def open_diffusers(cfg, device):
    """As `open_encoder`, of diffusers: UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel.

    The other tensors are those that besides the network's decide what features are.
    """
    pipe, net, vae, abar = load_pipeline(cfg)
    kind = type(net).__name__
    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1
    side = cfg.resize or factor * net.config.sample_size
    if kind == "UNet2DModel":                             # DDPM
        told = {}
    elif kind == "DiTTransformer2DModel":                 # the null label
        told = dict(class_labels=torch.tensor([net.config.num_embeds_ada_norm]))
    elif kind == "UNet2DConditionModel":                  # Stable Diffusion, SDXL
        told = text_conditions(cfg, pipe, net, side)
    else:
        raise UserError(f"model={cfg.model}: is a {kind}, must be a UNet2DModel, UNet2DConditionModel or "
                        "DiTTransformer2DModel")
    if vae:
        vae.eval().requires_grad_(False).to(device)
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0

    def encode(x):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if vae is None:
            return x
        return (vae.encode(x).latent_dist.mean - shift) * scale

    def repeated(value, n):
        if isinstance(value, dict):
            return {k: repeated(v, n) for k, v in value.items()}
        return value.to(device).expand(n, *value.shape[1:])

    def call(net, x, time):                               # step i of 1000, from 0, is t_ddpm = i + 1 = 1000 - time
        return net(x, timestep=(999 - time).clamp(min=0), return_dict=False, **repeated(told, len(x)))[0]

    others = {}
    if vae:
        others = {f"vae.{k}": v for k, v in vae.state_dict().items()} | {"vae.scale": torch.tensor([scale, shift])}
    for name, value in (told | told.get("added_cond_kwargs", {})).items():
        if torch.is_tensor(value):                        # the last digits depend on the machine
            others[name] = (1000 * value.float()).round()
    return net, encode, call, Tabulated(abar.cpu()), side, others


def load_pipeline(cfg):
    """(pipeline or None, network, autoencoder or None, abar [1000]) of a pipeline, a model in a folder, or an id."""
    where = cfg.model.removeprefix("diffusers:")
    torchvision_datasets()                                # diffusers imports torchvision: make sure that this works
    try:
        import diffusers
    except ImportError:
        raise UserError(f"model={cfg.model}: needs the package diffusers (pip install diffusers)") from None
    one = Path(where) / "config.json"                     # old pipelines of one network have both files
    if one.is_file() and not (Path(where) / "model_index.json").is_file():
        kind = getattr(diffusers, read_json(one, "name a folder that save_pretrained wrote").get("_class_name", "none"))
        pipe, found = None, dict(unet=kind.from_pretrained(where, torch_dtype=torch.float32))
    else:
        config = diffusers.DiffusionPipeline.load_config(where) if cfg.embedding else ()
        unused = [k for k in config if re.match("text_encoder|tokenizer", k)]    # a given text needs no encoder
        pipe = diffusers.DiffusionPipeline.from_pretrained(where, torch_dtype=torch.float32, **dict.fromkeys(unused))
        found = pipe.components
    net, vae = found.get("unet") or found.get("transformer"), found.get("vae")
    if vae is None and (net.config.in_channels != 3 or found.get("vqvae")):
        raise UserError(f"model={cfg.model}: sees latents, and has no AutoencoderKL; name a whole pipeline")
    scheduler = found.get("scheduler") or diffusers.DDPMScheduler()
    abar = getattr(scheduler, "alphas_cumprod", ())
    if len(abar) != 1000:
        raise UserError(f"model={cfg.model}: its {type(scheduler).__name__} has no 1000 values of alphas_cumprod")
    return pipe, net, vae, abar


def text_conditions(cfg, pipe, net, side):
    """What a U-Net with text is told, one row each: the text; of SDXL its summary, too, and that the image is whole."""
    c = net.config
    text, summary = text_embedding(cfg, pipe, c.cross_attention_dim)
    if not getattr(c, "addition_embed_type", None):
        return dict(encoder_hidden_states=text)
    if summary is None:
        summary = torch.zeros(1, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim)
    sizes = torch.tensor([[side, side, 0, 0, side, side]])                # size, crop, size aimed at
    return dict(encoder_hidden_states=text, added_cond_kwargs=dict(text_embeds=summary, time_ids=sizes))


def text_embedding(cfg, pipe, width):
    """(text float32 [1, tokens, width], its summary [1, D] or None): of embedding=, or the empty prompt as the pipeline
    encodes it."""
    if cfg.embedding:
        with reading(cfg.embedding, "name a .npy file of numbers [tokens, D]"):
            text = torch.from_numpy(np.load(cfg.embedding, allow_pickle=False)).float()
        require(text.dim() == 2 and text.shape[1] == width, cfg, "embedding",
                f"is {list(text.shape)}, must be [tokens, {width}]")
        return text[None], None
    if getattr(pipe, "text_encoder", None) is None:
        raise UserError(f"model={cfg.model}: attends to a text, and there is no text encoder; name the whole pipeline "
                        "(needs the package transformers), or embedding=FILE.npy")
    with torch.no_grad():
        text, *rest = pipe.encode_prompt(prompt="", device="cpu", num_images_per_prompt=1,
                                         do_classifier_free_guidance=False)
    return text.float(), rest[1].float() if len(rest) == 3 else None


# ---------------------------------------------------------------------------------------------------------------------
# A look at the activations

@torch.no_grad()
def cost_shares(net, x, t):
    """Share of a forward pass (products, convolutions, attention) that is done when each activation is there."""
    counter, done = FlopCounterMode(display=False), {}

    def note(name):
        return lambda *_: done.update({name: counter.get_total_flops()})

    hooks = [module.register_forward_hook(note(name)) for name, (module, _) in catalogue(net).items()]
    x = encoded(net, x)
    with counter:
        net(x, 1000 * t)
    for h in hooks:
        h.remove()
    return {name: flops / max(counter.get_total_flops(), 1) for name, flops in done.items()}


def list_activations(run, net, state, context):
    """Print every activation: name, kind, stage, channels, size of its map, share of the pass until it is there."""
    x = torch.zeros(1, state["channels"], state["size"], state["size"], device=run.device)
    t = torch.full((1,), 0.5, device=run.device)
    names = list(catalogue(net))
    with torch.no_grad(), context(), tapped(net, names, then=lambda m: m.shape[1:]) as sizes:
        net(encoded(net, x), 1000 * t)
    share = cost_shares(net, x, t)
    run.say(f"{'name':44} {'kind':18} {'stage':5} {'channels':>8}  {'size':9} cost")
    for name in names:
        kind, stage = describe(name)
        c, h, w = sizes[name]
        run.say(f"{name:44} {kind:18} {stage:5} {c:8}  {f'{h} x {w}':9} {share[name]:4.0%}")


def pca_rgb(x):
    """Maps [N, C, H, W] -> uint8 [N, 3, H, W]: three principal components over all positions of all maps, each from its
    least to its greatest value."""
    flat = x.permute(0, 2, 3, 1).flatten(0, 2).double()                          # [NHW, C]
    flat = flat - flat.mean(0)
    v = torch.linalg.eigh(flat.T @ flat)[1].flip(1)[:, :3]                       # [C, 3], greatest first
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()                  # let the greatest loading be positive
    y = F.pad(flat @ v, (0, 3 - v.shape[1]))
    y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)).clamp(min=1e-9)
    return to_uint8(y.reshape(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2) * 2 - 1)


def pca_sheet(run, cfg, features, names, times):
    """Write features/<name>-pca.png: test images `shown`, and their maps as colours, a row for each activation."""
    test = load_data(run, "test")
    require(cfg.shown and max(cfg.shown) < len(test), cfg, "shown", f"name test images, 0 to {len(test) - 1}")
    images = test.images[cfg.shown]                                              # [N, 3, H, W]
    options = dict(pool="none", draws=cfg.draws, seed=cfg.seed, purpose="features test", batch=len(images))
    _, maps = next(features(seen_of(cfg, test), np.array(cfg.shown), **options))
    sheet = [images] * len(times)
    for name in names:
        sheet += [F.interpolate(pca_rgb(maps[name, t].cpu()), images.shape[2:]).numpy() for t in times]
    file = run.dir / "features" / f"{cfg.name}-pca.png"
    if run.rank == 0:
        head = "first three principal components; columns: t = " + ", ".join(map(str, times))
        save_grid(file, np.concatenate(sheet), len(images) * len(times), rows=["image", *names], head=head)
    run.say(f"maps of {len(names)} activation(s) x {len(times)} time(s) x {len(images)} image(s) in {file}")


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def seen_of(cfg, data):
    """What the network is shown: models of other programs see images, even where ours see latents."""
    return data.images if cfg.model else data.inputs


def label_free(run, cfg, state):
    """What probe.py chose without labels for this model: a dict with activation and t."""
    check_name("extract_features.choice", cfg.choice)
    path, or_else = run.dir / "probe" / f"{cfg.choice}.json", "or name activations= and t="
    probed = read_json(path, f"run probe.py first, {or_else}")
    with reading(path, f"run probe.py again, {or_else}"):
        made_with = probed["hash"], probed["recipe"].get("weights", "ema")
        if probed.get("protocol") not in ("sweep", "boxes") or made_with != (state["weights"], cfg.weights):
            raise UserError(f"{path}: is no sweep of {state['file']} with weights={cfg.weights}; run probe.py on it "
                            f"(overwrite=true, or another name= and choice=), {or_else}")
        if probed["recipe"].get("transfer"):
            raise UserError(f"{path}: looked at other images (transfer=); name another choice=, {or_else}")
        return probed["label_free"]


def wanted(run, cfg, net, state):
    """(names, times) to read, as activations= and t= say."""
    names, times = cfg.activations, cfg.t
    if state.get("encoder"):
        names, times = ["out"] if names == ["auto"] else names, times or [1.0]
        require(times == [1.0], cfg, "model t", "an encoder sees clean images: t=1")
    elif names == ["auto"] and not cfg.model:
        choice = label_free(run, cfg, state)
        names, times = [choice["activation"]], times or [choice["t"]]
    names = matching(net, names)
    if not times or len({f"{t:g}" for t in times}) < len(times):                 # they name files
        raise UserError(f"t={times}: name one or more noise times that differ within six digits")
    return names, times


def recipe_of(cfg, state, data, names, times):
    """All that decides what the features are; info.json keeps it."""
    raw = cfg.weights == "net" and not cfg.model
    recipe = dict(
        checkpoint=cfg.model or cfg.checkpoint,
        weights=cfg.weights,
        hash=f"raw beside {state['weights']}" if raw else state["weights"],
        pool=cfg.pool,
        draws=cfg.draws,
        seed=cfg.seed,
        dtype=cfg.dtype,
        precision=cfg.precision,
        data={split: part.info["fingerprint"] for split, part in data.items()},
        arrays=[dict(activation=name, **noise_level(state["path"], t)) for name in names for t in times])
    if cfg.model:
        recipe["resize"] = cfg.resize
        recipe["embedding"] = cfg.embedding and digest(np.fromfile(cfg.embedding, np.uint8))
    return recipe


def extract(run, cfg, features, data, shapes, recipe):
    """Write features/<name>: every process fills its own rows of the same arrays. shapes: (name, t) -> of a row."""
    options = dict(pool=cfg.pool, draws=cfg.draws, seed=cfg.seed, batch=cfg.batch)
    with making(run, "features", cfg.name, "info.json") as folder:
        for split, part in data.items():
            files = {place: folder / file_of(split, *place) for place in shapes}
            if run.rank == 0:
                for place, file in files.items():
                    create_rows(file, cfg.dtype, (len(part), *shapes[place]))
            run.wait()
            batches = features(seen_of(cfg, part), run.share(len(part)), purpose=f"features {split}", **options)
            with bar(run, len(part), f"features of {split} images") as progress:
                for rows, out in batches:
                    for (name, t), value in out.items():
                        value = value.cpu().to(getattr(torch, cfg.dtype))
                        if not torch.isfinite(value).all():
                            raise UserError(f"{name} at t={t}: not finite, or too large for dtype={cfg.dtype}")
                        write_rows(files[name, t], rows[0], value.numpy())
                    progress.update(len(rows) * run.world)
        run.wait()
        if run.rank == 0:
            write_json(folder / "info.json", recipe | dict(shapes=[list(shape) for shape in shapes.values()]))


def main():
    """Extract features, from the command line."""
    run = start("extract_features", ExtractFeatures, __doc__, flags={
        "--list": "every activation: kind, stage, channels, size, share of the cost",
        "--pca": "one sheet of PCA maps of test images (shown=)"})
    cfg = run.cfg

    # the model
    if cfg.model:
        net, state = open_foreign(run, cfg)
    else:
        if not cfg.checkpoint.endswith(".pt"):
            check_name("extract_features.checkpoint", cfg.checkpoint, parts=2)
        net, state = load_model(run, cfg.checkpoint, cfg.weights)
    context, _, why = autocast(run, cfg.precision)
    if "--list" in run.flags:
        return list_activations(run, net, state, context)
    if not cfg.model:
        require_shape(run, state)

    # what to read, and where it goes
    names, times = wanted(run, cfg, net, state)
    features = partial(stream, net, state, names=names, times=times, device=run.device, context=context)
    if "--pca" in run.flags and not run.dry_run:
        return pca_sheet(run, cfg, features, names, times)
    if cfg.pool not in ("mean", "none") and not (cfg.pool.isdecimal() and int(cfg.pool)):
        raise UserError(f"pool={cfg.pool}: must be mean, none or a number")
    require(cfg.splits, cfg, "splits", "name train, test or both")
    folder = run.dir / "features" / cfg.name
    data = {split: load_data(run, split) for split in cfg.splits}
    recipe = recipe_of(cfg, state, data, names, times)
    with FlopCounterMode(display=False) as counter:       # one image tells the shapes
        _, one = next(features(seen_of(cfg, data[cfg.splits[0]]), np.arange(1), pool=cfg.pool))
    shapes = {(name, t): tuple(one[name, t].shape[1:]) for name in names for t in times}
    run.say(f"{len(names)} activation(s) x {len(times)} time(s): {', '.join(names)} at t = "
            f"{', '.join(map(str, times))}; {why}")
    if run.dry_run:
        parameters = sum(p.numel() for p in net.parameters())
        flops = counter.get_total_flops() / len(times)
        numbers = sum(map(len, data.values())) * sum(map(math.prod, shapes.values()))
        run.say(f"{parameters:,} parameters; {flops:.2e} FLOP a forward pass of an image, as far as is read")
        return run.say(f"{numbers * np.dtype(cfg.dtype).itemsize / 1e6:,.1f} MB in {folder}")
    made = [folder / file_of(split, name, t) for split in data for name in names for t in times]
    if run.agreed(lambda: finished(run, folder / "info.json", recipe, made)):
        return

    # extract
    extract(run, cfg, features, data, shapes, recipe)

    # close
    run.say(f"features in {folder}: " + ", ".join(f"{n} t={t:g} {list(s)}" for (n, t), s in shapes.items()))
    run.next("self_label.py" + ("" if cfg.name == "base" else f" features={cfg.name}"),
             "groups the images by these features")


if __name__ == "__main__":
    cli(main)

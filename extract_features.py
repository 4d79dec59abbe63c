"""Extract features: a trained model and images in, its hidden activations at chosen places and noise times out.

Reads   {diffusion,guided}/<name>/checkpoint.pt, probe/<choice>.json (activations=auto), data/{train,test}/
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
is the sum after attention. A skip is a U-ViT's tokens merged with those of the mirrored block of the way down (what a
U-Net concatenates there is that block's output). self-map has a channel for every head and key, at each query.

Models of other programs (Stable Diffusion, SDXL, DiT and DDPM from diffusers, encoders from torch.hub) are given the
same names and the same way of being read.
"""
import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from configs.data import (SPLITS, as_input, file_of, load_data, require_shape, row_shape, scale_and_shift, to_latents,
                          torchvision_datasets)
from configs.run import (UserError, ahead, autocast, bar, cli, create_rows, draw, finished, key, making,
                         read_json, reading, require, save_grid, start, to_uint8, weights_hash, write_json, write_rows)
from train_diffusion import PATHS, UNet, VariancePreserving, diffuse, load_model, say_network


@dataclass
class ExtractFeatures:
    """Section `extract_features`."""
    name: str = key("base", "results go to features/<name>")
    checkpoint: str = key("diffusion/base", "whose activations: a folder of the run, or a .pt file")
    model: str = key("", "in place of checkpoint: diffusers:FOLDER_OR_ID, or hub:REPO/NAME (REPO may be a folder)")
    resize: int = key(0, "model: images become so large for it; 0 = what it was made for (torch.hub: 224)", low=0)
    activations: list[str] = key(["auto"], "names, globs, or blocks = the output of every block; "
                                           "auto = the label-free choice in probe/<choice>.json")
    t: list[float] = key([], "noise times (hub: always 1); empty with activations=auto = the choice", low=0, high=1)
    choice: str = key("sweep", "which probe result `auto` reads")
    pool: str = key("mean", "mean, none, or a number g: average over a grid of g x g")
    draws: int = key(1, "noise draws to average", low=1)
    dtype: Literal["float32", "float16"] = key("float32", "on disk")
    batch: int = key(256, "images per forward pass and process", low=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network")
    seed: int = key(0, "of the noise")
    overwrite: bool = key(False, "replace features that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Readers (net, block, inputs, output of the hooked module, which is the block or lies in it) -> map [B, C, H, W]

def as_map(out):
    """A module's output (the first of several, named or not) as a map [B, C, H, W]; None if it is nothing of that kind.

    Tokens [B, L, C] form a square behind up to 8 extra ones, such as those of time and class; a vector [B, C] is one
    position.
    """
    if isinstance(out, (tuple, list, Mapping)) and out:
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    if not torch.is_tensor(out) or out.dim() not in (2, 3, 4):
        return None
    if out.dim() == 4:
        return out
    if out.dim() == 2:
        return out[:, :, None, None]
    side = math.isqrt(out.shape[1])
    if not side or out.shape[1] - side ** 2 > 8:
        return None
    return out[:, -side ** 2:].transpose(1, 2).unflatten(2, (side, side))


def output_map(net, block, inputs, output):
    """What a module returns."""
    return as_map(output)


def input_map(net, block, inputs, output):
    """What a module is given."""
    return as_map(inputs[0])


def channels_first(net, block, inputs, output):
    """What a Conv1d over positions returns, [B, C, L]."""
    return as_map(output.transpose(1, 2))


def of_qkv(net, block, inputs, output, what):
    """Queries, keys or values of all heads side by side, or what each position looks at, of a qkv layer's output.

    map: [B, heads L, H, W] for L keys, those of extra tokens among them; over L it sums to one.
    """
    if isinstance(net, UNet):                             # [B, heads * 3 * d, L]
        q, k, v = output.unflatten(1, (block.heads, 3, -1)).permute(2, 0, 1, 4, 3)         # [B, heads, L, d] each
    else:                                                 # [B, L, 3 * heads * d]
        q, k, v = output.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    if what == "map":
        q = q[:, :, getattr(net, "extras", 0):].float() / math.sqrt(q.shape[3])
        with torch.autocast(q.device.type, enabled=False):                       # in 16 bits products may overflow
            x = (q @ k.float().transpose(2, 3)).softmax(3)                       # [B, heads, H W, L]
    else:
        x = dict(q=q, k=k, v=v)[what]
    return as_map(x.transpose(1, 2).flatten(2))


read_q, read_k, read_v, read_map = (partial(of_qkv, what=what) for what in ("q", "k", "v", "map"))


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue: every activation by a stable name, in the order in which the forward pass computes them

BLOCKS = {                                                # kind of block -> ending of the name: (submodule, reader)
    "ResBlock": {
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
        "vit-block0-self-map": ("qkv", read_map),
        "vit-block0-self-out": ("proj_out", channels_first),
        "vit-out": ("", output_map),
    },
    "Block": {
        "skip": ("skip_linear", output_map),
        "self-q": ("attn.qkv", read_q),
        "self-k": ("attn.qkv", read_k),
        "self-v": ("attn.qkv", read_v),
        "self-map": ("attn.qkv", read_map),
        "self-out": ("attn.proj", output_map),
        "self-residual": ("norm2", input_map),
        "ffn-inner": ("mlp.fc1", output_map),
        "ffn-out": ("mlp.fc2", output_map),
        "out": ("", output_map),
    },
}


def unet_way(stage, blocks):
    """Yield (prefix of names, layer) of the U-Net's way down or up; levels of the way up count from the lowest size."""
    level = repeat = 0
    for block in blocks:
        for layer in block:
            resampler = getattr(layer, "resample", None)
            place = f"{stage}sampler" if resampler else f"repeat{repeat}"
            yield f"{stage}-level{level}-{place}", layer
        repeat += 1
        if resampler:                                     # of the block's last layer: a level ends
            level, repeat = level + 1, 0


def parts(net):
    """Yield (prefix of names, block) of a network of ours, in forward order."""
    if isinstance(net, UNet):
        yield from unet_way("down", net.input_blocks[1:])
        # residual, attention, residual: an attention bears the number of the residual block behind it
        yield from zip(("mid-repeat0", "mid-repeat1", "mid-repeat1"), net.middle_block)
        yield from unet_way("up", net.output_blocks)
    else:
        for stage, blocks in (("down", net.in_blocks), ("mid", [net.mid_block]), ("up", net.out_blocks)):
            for i, block in enumerate(blocks):
                yield f"{stage}-vit-block{i}", block


def catalogue(net):
    """Ordered dict: name -> (module to hook, function from its inputs and output to a map [B, C, H, W])."""
    if isinstance(net, Foreign):
        return net.found
    if isinstance(net, UNet):
        first, name = net.input_blocks[0][0], "unet-after-conv-in"
    else:
        first, name = net.patch_embed, "vit-after-embed"
    found = {"unet-in": (first, partial(input_map, net, first))}
    found[name] = first, partial(output_map, net, first)
    for prefix, block in parts(net):
        kind = "resampler" if getattr(block, "resample", None) else type(block).__name__
        for ending, (submodule, read) in BLOCKS[kind].items():
            if ending != "skip" or prefix.startswith("up"):
                found[f"{prefix}-{ending}"] = block.get_submodule(submodule), partial(read, net, block)
    found["unet-out"] = net, partial(output_map, net, net)
    return found


def block_outputs(net):
    """Names of the catalogue that are the output of a whole block (between modules, not inside them)."""
    inside = re.compile("self|cross|ffn|^unet-out")
    return [name for name in catalogue(net) if name.endswith("-out") and not inside.search(name)]


def matching(net, patterns, key="activations"):
    """Names that match any of the names, globs or `blocks`, in forward order; a pattern without a match is an error
    that names the key."""
    names, chosen = list(catalogue(net)), set()
    for pattern in patterns or [""]:
        hits = block_outputs(net) if pattern == "blocks" else fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, 3, 0.3)
            raise UserError(f"{key}={pattern}: no such activation (extract_features.py --list shows all)"
                            + f"; nearest: {', '.join(near)}" * bool(near))
        chosen |= set(hits)
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
    entries, got = catalogue(net), {}
    names = sorted(names, key=list(entries).index)        # deepest last; hooks of one module fire as registered

    def hook(name, to_map):
        def take(module, inputs, output):
            got[name] = then(to_map(inputs, output))
            if stop and name == names[-1]:
                raise Enough
        return take

    with ExitStack() as hooks:
        for name in names:
            module, to_map = entries[name]
            hooks.callback(module.register_forward_hook(hook(name, to_map)).remove)            # removed at the end
        yield got


def check_pool(cfg, name):
    """A UserError unless the setting `name` is something for `pooled`."""
    fits = re.fullmatch("mean|none|[1-9][0-9]*", getattr(cfg, name))
    require(fits, cfg, name, "must be mean, none or a number")


def pooled(x, pool):
    """Map [B, C, H, W] -> float32 [B, C] (mean), [B, C * g * g] (grid) or the map itself (none)."""
    x = x.float()
    if pool == "none":
        return x
    if pool != "mean" and int(pool) > min(x.shape[2:]):
        raise UserError(f"pool={pool}: a map has {x.shape[2]} x {x.shape[3]} positions")
    return x.mean((2, 3)) if pool == "mean" else F.adaptive_avg_pool2d(x, int(pool)).flatten(1)


def reader(net, names, pool="mean"):
    """A function (x_t [B, C, H, W], t [B]) -> [activation of each name, pooled].

    It is one forward pass that ends at the deepest name; the condition is null; gradients flow where they are enabled.
    """
    def read(x, t):
        with tapped(net, names, stop=True, then=partial(pooled, pool=pool)) as got, suppress(Enough):
            net(x, 1000 * t)
        return [got[n] for n in names]
    return read


@torch.no_grad()
def stream(net, state, images, rows, names, times, *, device, context, pool="mean", draws=1, seed=0,
           purpose="features train", batch=256):
    """Yield (rows of this batch, {(name, t): float32 tensor}) over `rows` of uint8 images [N, 3, H, W] or of latents.

    One forward pass per (batch, time, draw) serves all names; the condition is null. The noise is a function of
    (seed, purpose, draw, row), so neither batch size nor number of processes changes the result.
    """
    foreign, read = isinstance(net, Foreign), reader(net, names, pool)           # Foreign: a model of another program
    path = state["path"] if foreign else PATHS[state["path"]]
    shape = net.shape if foreign else row_shape(images)   # (C, H, W) of the noise

    def prepared(part):
        noise = [draw(seed, f"{purpose} {d}", part, shape) for d in range(draws)]
        return part, torch.from_numpy(np.ascontiguousarray(images[part])), noise

    for part, x, noise in ahead(prepared, (rows[i:i + batch] for i in range(0, len(rows), batch))):
        x, out = as_input(x.to(device)), {}               # [B, C, H, W]; part: the numbers of these images
        x = net.encode(x) if foreign else x
        for d, z in enumerate(noise):
            z = z.to(device)
            for t in times:
                at = torch.full((len(x),), t, device=device)
                x_t = diffuse(path, x, z, at)
                with context():
                    values = read(x_t, at)                # which shows the network 1000 t
                for name, value in zip(names, values):    # their mean over the draws
                    out[name, t] = (out[name, t] if d else 0) + value / draws
        yield part, out


def noise_level(path, t):
    """The noise time in the terms of other papers: t, rho = sigma / alpha and log-SNR."""
    path, t = PATHS.get(path, path), torch.tensor(t, dtype=torch.float64)
    rho = abs(float(path.sigma(t) / path.alpha(t).clamp(min=1e-12)))             # abs: of a -0
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
        self.shape = x.shape[1:]                          # of the noise
        self.found = discover(self, x) | {end: (self, partial(output_map, self, self))}

    def forward(self, x, time):
        return self.call(self.net, x, time)


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


@torch.no_grad()
def discover(net, x):
    """Catalogue of a network that we know nothing about: all modules that return a map or tokens, in forward order.

    x: two encoded images. Channels are taken to come second in maps, last in tokens.
    """
    names = {}
    for path, module in net.net.named_modules():
        for pattern, ours in SPELLINGS:
            path = re.sub(pattern, ours, path)
        of_text = path.endswith(("cross-k", "cross-v"))   # these have no place in the image
        if path and not of_text and not isinstance(module, (nn.Dropout, nn.Identity)):     # the last say nothing new
            names[module] = path
    fired = []

    def note(module, inputs, output):
        fired.append((module, getattr(as_map(output), "shape", None)))

    hook = register_module_forward_hook(note)
    net(x, torch.full((2,), 500.0, device=x.device))
    hook.remove()
    calls, found = Counter(module for module, _ in fired), {}
    for module, shape in fired:
        once = calls[module] == 1                         # else, which of its calls would be meant?
        if module in names and once and shape and shape[0] == 2 and shape[3] > 1:
            found[names[module]] = module, partial(output_map, net, module)
    return found


def open_foreign(run, cfg):
    """(network, state) of model=, to be used like those of `load_model`. To be called by all processes."""
    kind = cfg.model.partition(":")[0]
    require(kind in ("diffusers", "hub"), cfg, "model", "must be diffusers:FOLDER_OR_ID or hub:REPO/NAME")
    for mine in run.turns():
        if mine:
            try:
                net, path, others = (open_encoder if kind == "hub" else open_diffusers)(cfg, run.device)
            except Exception as e:                        # files, packages, connections, code of others
                text = " ".join(str(e).split())[:160] or type(e).__name__
                raise UserError(f"model={cfg.model}: cannot be loaded ({text})") from None
    weights = weights_hash(net.state_dict() | others)
    return net, dict(path=path, size=run.data.size, channels=3, weights=weights, file=cfg.model)


def open_encoder(cfg, device):
    """(network, its path, no other tensors) of torch.hub: it sees ImageNet-normalised images."""
    repo, _, name = cfg.model.removeprefix("hub:").rpartition("/")
    source = "local" if Path(repo).is_dir() else "github"
    net = torch.hub.load(repo, name, source=source, trust_repo=True, verbose=False)        # runs its code
    side = cfg.resize or 224
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def encode(x):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        return (x / 2 + 0.5 - mean) / std

    net = Foreign(net, encode, lambda net, x, time: net(x), "out", side, device)
    net.shape = (1, 1, 1)                                 # of the noise: its weight is 0
    return net, VariancePreserving(torch.zeros(1001, dtype=torch.float64)), {}


def open_diffusers(cfg, device):
    """As `open_encoder`, a pipeline of diffusers: DDPM, DiT, Stable Diffusion or SDXL, with null label or empty prompt.

    The other tensors are those that besides the network's decide what features are.
    """
    torchvision_datasets()                                # diffusers imports torchvision: make sure that this works
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(cfg.model.removeprefix("diffusers:"), torch_dtype=torch.float32)
    net = pipe.components.get("unet") or pipe.components["transformer"]
    vae, abar = pipe.components.get("vae"), pipe.scheduler.alphas_cumprod        # [1000]
    if len(abar) != 1000 or vae is None and (net.config.in_channels != 3 or "vqvae" in pipe.components):
        raise ValueError("must see images, or latents of an AutoencoderKL, and know 1000 steps of noise")

    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1
    side = cfg.resize or factor * net.config.sample_size
    told, added = conditions_of(pipe, net, side)
    others = {name: (1000 * value.float()).round() for name, value in (told | added).items()}      # but the last digits
    if vae:
        vae.eval().requires_grad_(False).to(device)
        others |= {f"vae.{k}": v for k, v in vae.state_dict().items()}
        others["vae.scale"] = torch.tensor(scale_and_shift(vae))

    def encode(x):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        return to_latents(vae, x).chunk(2, 1)[0] if vae else x

    def rows(tensors, n):
        return {name: value.to(device).expand(n, *value.shape[1:]) for name, value in tensors.items()}

    def call(net, x, time):                               # step i of 1000, from 0, is t_ddpm = i + 1 = 1000 - time
        arguments = rows(told, len(x))
        if added:
            arguments["added_cond_kwargs"] = rows(added, len(x))
        return net(x, timestep=(999 - time).clamp(min=0), return_dict=False, **arguments)[0]

    table = torch.cat([torch.zeros(1, dtype=torch.float64), abar.double().clamp(min=1e-12).log()])
    return Foreign(net, encode, call, "unet-out", side, device), VariancePreserving(table.cpu()), others


@torch.no_grad()
def conditions_of(pipe, net, side):
    """What a network of diffusers is told, {argument: float [1, ...]}: (by itself, within added_cond_kwargs)."""
    kind, c = type(net).__name__, net.config
    if kind == "UNet2DModel":                             # DDPM
        return {}, {}
    if kind == "DiTTransformer2DModel":
        return dict(class_labels=torch.tensor([c.num_embeds_ada_norm])), {}      # the null label
    text, *rest = pipe.encode_prompt(prompt="", device="cpu", num_images_per_prompt=1,
                                     do_classifier_free_guidance=False)
    told = dict(encoder_hidden_states=text.float())       # Stable Diffusion
    if not c.addition_embed_type:
        return told, {}
    sizes = torch.tensor([[side, side, 0, 0, side, side]])                       # SDXL: size, crop, size aimed at
    return told, dict(text_embeds=rest[1].float(), time_ids=sizes)


# ---------------------------------------------------------------------------------------------------------------------
# A look at the activations

def list_activations(run, net, state, context):
    """Print every activation and the size of its map."""
    image = np.zeros((1, state["channels"], state["size"], state["size"]), np.uint8)
    names = list(catalogue(net))
    read = stream(net, state, image, np.arange(1), names, [0.5], device=run.device, context=context, pool="none")
    _, maps = next(read)
    for name in names:
        run.say(f"{name:44} " + " x ".join(map(str, maps[name, 0.5].shape[1:])))


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
    """Write features/<name>-pca.png: four test images, and their maps as colours, a row for each activation."""
    test = load_data(run, "test")
    images = test.images[:4]                                                     # [N, 3, H, W]
    batches = [out for _, out in features(test, np.arange(len(images)), pool="none", purpose="features test")]
    maps = {place: torch.cat([out[place] for out in batches]) for place in batches[0]}
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

def label_free(run, cfg, state):
    """What probe.py chose without labels for this model: a dict with activation and t."""
    file, hint = run.dir / "probe" / f"{cfg.choice}.json", "run probe.py first, or name activations= and t="
    probed = read_json(file, hint)
    with reading(file, hint):
        if probed["protocol"] not in ("sweep", "boxes") or probed["hash"] != state["weights"]:
            raise UserError(f"{file}: is no sweep of {state['file']} as it is now; {hint}")
        return probed["label_free"]


def wanted(run, cfg, net, state):
    """(names, times) to read, as activations= and t= say."""
    names, times = cfg.activations, cfg.t
    if cfg.model.startswith("hub:"):                      # encoders see clean images
        names, times = ["out"] if names == ["auto"] else names, [1.0]
    elif names == ["auto"]:
        choice = label_free(run, cfg, state)
        names, times = [choice["activation"]], times or [choice["t"]]
    names = matching(net, names)
    if not times or len({f"{t:g}" for t in times}) < len(times):                 # they name files
        raise UserError(f"t={times}: name one or more noise times that differ within six digits")
    return names, times


def recipe_of(cfg, state, data, names, times):
    """All that decides what the features are, but for what precision=auto is on this machine; info.json keeps it."""
    recipe = {k: getattr(cfg, k) for k in ("pool", "draws", "seed", "dtype", "precision")}
    recipe |= dict(checkpoint=cfg.model or cfg.checkpoint, hash=state["weights"])
    recipe["data"] = {split: part.info["fingerprint"] for split, part in data.items()}
    recipe["arrays"] = [dict(activation=name, **noise_level(state["path"], t)) for name in names for t in times]
    if cfg.model:
        recipe["resize"] = cfg.resize
    return recipe


def extract(run, cfg, features, data, shapes, recipe, done):
    """Write features/<name>: every process fills its own rows of the same arrays. shapes: (name, t) -> of a row."""
    with making(run, "features", cfg.name, "info.json", done) as folder:
        for split, part in data.items():
            files = {place: folder / file_of(split, *place) for place in shapes}
            for place, file in files.items():
                create_rows(run, file, cfg.dtype, (len(part), *shapes[place]))
            batches = features(part, run.share(len(part)), pool=cfg.pool, purpose=f"features {split}")
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
        "--list": "every activation and its size",
        "--pca": "one sheet of PCA maps of test images"})
    cfg = run.cfg
    check_pool(cfg, "pool")

    # the model
    net, state = open_foreign(run, cfg) if cfg.model else load_model(run, cfg.checkpoint)
    context, _, why = autocast(run, cfg.precision)
    if "--list" in run.flags:
        return list_activations(run, net, state, context)
    if not cfg.model:
        require_shape(run, state)

    # what to read, and where it goes
    names, times = wanted(run, cfg, net, state)

    def features(data, rows, **options):
        images = data.images if cfg.model else data.inputs                       # other programs' models see no latents
        return stream(net, state, images, rows, names, times, device=run.device, context=context, draws=cfg.draws,
                      seed=cfg.seed, batch=cfg.batch, **options)

    folder = run.dir / "features" / cfg.name
    if "--pca" in run.flags:
        return run.say(f"a sheet {folder}-pca.png") if run.dry_run else pca_sheet(run, cfg, features, names, times)
    data = {split: load_data(run, split) for split in SPLITS}
    _, one = next(features(data["train"], np.arange(1), pool=cfg.pool))          # one image tells the shapes
    shapes = {(name, t): tuple(one[name, t].shape[1:]) for name in names for t in times}
    run.say(f"{len(names)} activation(s) x {len(times)} time(s): {', '.join(names)} at t = "
            f"{', '.join(map(str, times))}; {why}")
    if run.dry_run:
        if not cfg.model:
            say_network(run, net, state["channels"], state["size"])
        numbers = sum(map(len, data.values())) * sum(map(math.prod, shapes.values()))
        return run.say(f"{numbers * np.dtype(cfg.dtype).itemsize / 1e6:,.1f} MB in {folder}")
    recipe = recipe_of(cfg, state, data, names, times)
    made = [folder / file_of(split, *place) for split in data for place in shapes]
    done = lambda: finished(run, folder / "info.json", recipe, made)
    if run.agreed(done):
        return

    # extract
    extract(run, cfg, features, data, shapes, recipe, done)

    # close
    run.say(f"features in {folder}: " + ", ".join(f"{n} t={t:g} {list(s)}" for (n, t), s in shapes.items()))
    method = " method=lost" if cfg.pool == "none" else ""
    run.next("self_label.py" + method + ("" if cfg.name == "base" else f" features={cfg.name}"),
             "groups the images by these features")


if __name__ == "__main__":
    cli(main)

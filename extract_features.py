"""Extract features: a trained model and images in, its hidden activations at chosen places and noise times out.

Reads   runs/<run>/{diffusion,guided}/<name>/checkpoint.pt and data/{train,test}/images.npy
Writes  features/<name>/{train,test}-<activation>-t<time>.npy, one row per image in dataset order, and info.json
Time    t = 0 is noise, t = 1 is data: the network sees x_t = alpha(t) x + sigma(t) z with noise z that belongs to the image.

    python extract_features.py configs/shapes.yaml                               # CPU, seconds
    python extract_features.py configs/cifar10.yaml activations='mid*-out,up-level0*-out' t=0.6,0.9      # one GPU, several at once
    torchrun --nproc_per_node=8 extract_features.py configs/cifar10.yaml         # eight GPUs, the same file
    python extract_features.py configs/shapes.yaml --list                        # every activation with its shape

Activations are named stage-level-repeat-kind: `up-level0-repeat1-res-out` is the output of the second residual block of the
up-path's lowest resolution. They are read by plain forward hooks; the forward stops after the deepest one that is asked for.
"""
import difflib
import fnmatch
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from train_diffusion import (PATHS, AttentionBlock, Block, ResBlock, UNet, UserError, autocast, bar, cli, create_rows, diffuse, draw, finished,
                             load_data, load_model, read_json, require, start, write_json, write_rows)


@dataclass
class ExtractFeatures:
    """Section `extract_features`."""
    name: str = "base"                                    # results go to features/<name>
    checkpoint: str = "diffusion/base"                    # whose activations: a folder of the run, or a .pt file
    weights: Literal["ema", "net"] = "ema"                # averaged or raw
    activations: list[str] = field(default_factory=lambda: ["auto"])      # names and globs; auto = the label-free choice in probe/<choice>.json
    t: list[float] = field(default_factory=list)          # noise times; empty with activations=auto = the label-free choice
    choice: str = "sweep"                                 # which probe result `auto` reads
    pool: str = "mean"                                    # mean, none, or a number g: average over a grid of g x g
    draws: int = 1                                        # noise draws to average
    splits: list[str] = field(default_factory=lambda: ["train", "test"])  # parts of the data
    dtype: Literal["float32", "float16"] = "float32"      # on disk
    batch: int = 256                                      # images per forward pass and process
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"     # of the network
    seed: int = 0                                         # of the noise
    overwrite: bool = False                               # replace features that another recipe left under this name


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
                    if isinstance(m, ResBlock) and m.resample:
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


def catalogue(net):
    """Ordered dict: name -> (module to hook, function from its output to a map [B, C, H, W])."""
    found, extras = {}, getattr(net, "extras", 0)

    def square(x):                                        # [B, C, L] -> [B, C, H, W]
        return x.reshape(*x.shape[:2], math.isqrt(x.shape[2]), -1)

    def tokens(x):                                        # [B, extras + L, D] -> [B, D, H, W]
        return square(x[:, extras:].transpose(1, 2))

    for prefix, m in parts(net):
        if isinstance(m, ResBlock) and not m.resample:
            found[f"{prefix}-res-increment"] = m.out_layers[-1], lambda x: x
            found[f"{prefix}-res-out"] = m, lambda x: x
        elif isinstance(m, AttentionBlock):
            for i, letter in enumerate("qkv"):            # qkv is [B, heads * 3 * d, L]
                found[f"{prefix}-vit-block0-self-{letter}"] = m.qkv, lambda x, i=i, h=m.heads: square(x.reshape(len(x), h, 3, -1, x.shape[2])[:, :, i].flatten(1, 2))
            found[f"{prefix}-vit-block0-self-out"] = m.proj_out, square
            found[f"{prefix}-vit-out"] = m, lambda x: x
        elif isinstance(m, Block):
            if m.skip_linear is not None:
                found[f"{prefix}-skip"] = m.skip_linear, tokens
            for i, letter in enumerate("qkv"):            # qkv is [B, L, 3 * D]
                found[f"{prefix}-self-{letter}"] = m.attn.qkv, lambda x, i=i: tokens(x.chunk(3, -1)[i])
            found[f"{prefix}-self-out"] = m.attn.proj, tokens
            found[f"{prefix}-ffn-inner"] = m.mlp.fc1, tokens
            found[f"{prefix}-ffn-out"] = m.mlp.fc2, tokens
            found[f"{prefix}-out"] = m, tokens
        elif prefix == "vit-after-embed":
            found[prefix] = m, lambda x: square(x.transpose(1, 2))
        else:                                             # resamplers, first convolution, prediction
            found[prefix] = m, lambda x: x
    return found


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
    """Raised by the deepest hook: the rest of the forward pass is not needed."""


@contextmanager
def tapped(net, names):
    """Within this context, calls of `net` fill the yielded dict name -> map [B, C, H, W] and stop after the deepest name."""
    known, got, hooks = catalogue(net), {}, []
    deepest = max(names, key=list(known).index)

    def hook(name, pick):
        def take(module, args, output):
            got[name] = pick(output)
            if name == deepest:
                raise _Enough
        return take

    try:
        for name in sorted(names, key=list(known).index):  # hooks of one module fire in the order of registration
            module, pick = known[name]
            hooks.append(module.register_forward_hook(hook(name, pick)))
        yield got
    finally:
        for h in hooks:
            h.remove()


def pooled(x, pool):
    """Map [B, C, H, W] -> float32 [B, C] (mean), [B, C * g * g] (grid) or the map itself (none)."""
    if pool == "none":
        return x.float()
    return x.float().mean((2, 3)) if pool == "mean" else F.adaptive_avg_pool2d(x.float(), int(pool)).flatten(1)


def feature(net, name, x_t, t, pool="mean"):
    """One activation of noised images x_t [B, C, H, W] at times t [B], with gradients where they are enabled; condition: null."""
    with tapped(net, [name]) as got:
        try:
            net(x_t, 1000 * t)
        except _Enough:
            pass
    return pooled(got[name], pool)


@torch.no_grad()
def stream(net, state, images, rows, names, times, *, device, context, pool="mean", draws=1, seed=0, purpose="features train", batch=256):
    """Yield (rows of this batch, {(name, t): float32 tensor}) over `rows` of uint8 images [N, 3, H, W]; condition: null.

    One forward pass per (batch, time, draw) serves all names. The noise is a function of (seed, purpose, draw, row), so neither
    batch size nor number of processes changes the result.
    """
    path = PATHS[state["path"]]
    with tapped(net, names) as got:
        for i in range(0, len(rows), batch):
            part = rows[i:i + batch]
            x = torch.from_numpy(np.ascontiguousarray(images[part])).to(device).float() / 127.5 - 1
            out = {}
            for d in range(draws):
                z = draw(seed, f"{purpose} {d}", part, images.shape[1:]).to(device)
                for t in times:
                    tt = torch.full((len(x),), t, device=device)
                    try:
                        with context():
                            net(diffuse(path, x, z, tt), 1000 * tt)
                    except _Enough:
                        pass
                    for name in names:
                        value = pooled(got[name], pool) / draws
                        out[name, t] = out[name, t] + value if d else value
                    got.clear()
            yield part, out


def noise_level(path, t):
    """The noise time in the terms of other papers: t, rho = sigma / alpha and log-SNR."""
    t = torch.tensor(t, dtype=torch.float64)
    rho = float(PATHS[path].sigma(t) / PATHS[path].alpha(t).clamp(min=1e-12))
    return dict(t=float(t), rho=rho, log_snr=-2 * math.log(max(rho, 1e-12)))


def file_of(split, name, t):
    """File name of one feature array."""
    return f"{split}-{name}-t{t:g}.npy"


def load_features(run, name, split):
    """(list of float arrays [N, ...] as memory maps, info) of features/<name>, checked against the run's data."""
    folder = run.dir / "features" / name
    info, data, arrays = read_json(folder / "info.json", "run extract_features.py first"), load_data(run, split), []
    if info["data"].get(split) != data.info["fingerprint"]:
        raise UserError(f"{folder}: extracted from {split} images {info['data'].get(split)}, the run's are {data.info['fingerprint']}; extract again")
    for entry in info["arrays"]:
        file = folder / file_of(split, entry["activation"], entry["t"])
        try:
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as e:
            raise UserError(f"{file}: cannot be read ({e}); delete the folder and extract again") from None
        if len(arrays[-1]) != len(data):
            raise UserError(f"{file} has {len(arrays[-1])} rows, the data {len(data)}; delete the folder and extract again")
    return arrays, info


def main():
    """Extract features, from the command line."""
    run = start("extract_features", ExtractFeatures, __doc__, flags=("--list",))
    cfg = run.cfg
    net, state = load_model(run, cfg.checkpoint, cfg.weights)
    context, _, why = autocast(run, cfg.precision)

    # --list
    if "--list" in run.flags:
        every = list(catalogue(net))
        _, out = next(stream(net, state, np.zeros((1, state["channels"], state["size"], state["size"]), np.uint8), np.arange(1), every, [0.5],
                             device=run.device, context=context, pool="none"))
        for name in every:
            run.say(f"{name:44} {' x '.join(map(str, out[name, 0.5].shape[1:]))}")
        return

    # what to read, and where
    times = cfg.t
    if cfg.activations == ["auto"]:
        probed = read_json(run.dir / "probe" / f"{cfg.choice}.json", "run probe.py first, or name activations= and t=")
        if probed.get("protocol") != "sweep" or probed["hash"] != state["weights"]:
            raise UserError(f"probe/{cfg.choice}.json is no sweep of {state['file']} ({state['weights']}) but of {probed.get('checkpoint')} ({probed.get('hash')}); run "
                            " probe.py on this checkpoint (overwrite=true, or another name= and choice=), or name activations= and t=")
        choice = probed["label_free"]
        names, times = matching(net, [choice["activation"]]), times or [choice["t"]]
    else:
        names = matching(net, cfg.activations)
    if not times or not all(0 <= t <= 1 for t in times):
        raise UserError(f"t={times}: name one or more noise times between 0 and 1")
    if cfg.pool not in ("mean", "none") and not cfg.pool.isdigit() or cfg.pool == "0":
        raise UserError(f"pool={cfg.pool}: must be mean, none or a number")
    require(min(cfg.draws, cfg.batch) >= 1, cfg, "draws batch", "must be at least 1")
    folder, aside = run.dir / "features" / cfg.name, run.dir / "features" / f".{cfg.name}.tmp"
    data = {split: load_data(run, split) for split in cfg.splits}
    recipe = dict(checkpoint=cfg.checkpoint, weights=cfg.weights, hash=state["weights"] if cfg.weights == "ema" else f"raw beside {state['weights']}", pool=cfg.pool,
                  draws=cfg.draws, seed=cfg.seed, dtype=cfg.dtype, data={k: d.info["fingerprint"] for k, d in data.items()},
                  arrays=[dict(activation=n, **noise_level(state["path"], t)) for n in names for t in times])
    if run.dry_run:
        _, one = next(stream(net, state, np.zeros((1, state["channels"], state["size"], state["size"]), np.uint8), np.arange(1), names, times,
                             device=run.device, context=context, pool=cfg.pool))
        size = np.dtype(cfg.dtype).itemsize * sum(map(len, data.values())) * sum(v.numel() for v in one.values())
        run.say(f"{len(names)} activation(s) x {len(times)} time(s): {', '.join(names)}; {size / 1e6:,.0f} MB in {folder}")
        return
    if run.agreed(finished(run, folder / "info.json", recipe)):
        return

    # extract: every rank fills its own rows of the same arrays
    run.say(f"{len(names)} activation(s) x {len(times)} time(s): {', '.join(names)} at t = {', '.join(map(str, times))}; {why}")
    if run.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    run.wait()
    shapes = {}
    for split, part in data.items():
        bounds = [len(part) * r // run.world for r in range(run.world + 1)]
        rows = np.arange(bounds[run.rank], bounds[run.rank + 1])
        _, one = next(stream(net, state, part.images, np.arange(1), names, times, device=run.device, context=context, pool=cfg.pool))
        files = {}
        for key, value in one.items():
            shape = (len(part), *value.shape[1:])
            shapes[key] = list(value.shape[1:])
            files[key] = aside / file_of(split, *key)
            if run.rank == 0:
                create_rows(files[key], cfg.dtype, shape)
        run.wait()
        with bar(run, len(part), f"features of {split} images") as progress:
            for part_rows, out in stream(net, state, part.images, rows, names, times, device=run.device, context=context, pool=cfg.pool,
                                         draws=cfg.draws, seed=cfg.seed, purpose=f"features {split}", batch=cfg.batch):
                for key, value in out.items():
                    if not torch.isfinite(value).all():
                        raise UserError(f"{key[0]} at t={key[1]}: non-finite features; is {state['file']} a healthy model?")
                    write_rows(files[key], part_rows[0], value.cpu().numpy())
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

"""How much more than the bare network sampling and feature extraction cost. Prints ratios, at the end one line of JSON.

    python tests/bench_sampling.py               # about half a minute on two CPU cores; timings of busy machines mean nothing

sampling     generate() with Heun steps, from noise to uint8 images, against the network calls it needs        goal: at most 1.05
             (on a GPU: networks of configs/cifar10.yaml and configs/imagenet256.yaml, compiled, bf16)
extraction   a forward pass that stops at the middle block against a whole one, both through stream()          goal: at most 0.60
             and the whole one against the bare network
Both sides of a ratio run in turns, so that a slow moment hits both; the ratio is that of the medians.
"""
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extract_features import catalogue, stream                                   # noqa: E402
from sample_ode import SampleOde, generate                                       # noqa: E402
from train_diffusion import Model, build_model, fill, placed                     # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"


def seconds(f):
    """Wall time of one call."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    tick = time.perf_counter()
    f()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - tick


def ratio(what, goal, repeats, **sides):
    """Time the two sides in turns; print and return median(first) / median(second)."""
    times = {name: [] for name in sides}
    for f in sides.values():
        f()                                               # warm up: allocations, choice of kernels
    for _ in range(repeats):
        for name, f in sides.items():
            times[name].append(seconds(f))
    first, second = (statistics.median(v) for v in times.values())
    names = " / ".join(f"{n} {statistics.median(v) * 1000:.0f} ms" for n, v in times.items())
    print(f"{what:44} {first / second:.3f}  (goal {goal:.2f} {'met' if first / second <= goal else 'MISSED'}; {names})", flush=True)
    return round(first / second, 4)


def sampling(model, size, batch, steps, labels, w, channels=3):
    """generate() against the bare forward passes on batches of the same size."""
    net = placed(build_model(model, size, channels, num_labels=labels).eval().requires_grad_(False), DEVICE, compiled=GPU)
    net, context = (torch.compile(net, dynamic=False), lambda: torch.autocast("cuda", torch.bfloat16)) if GPU else (net, nullcontext)
    cfg, run = SampleOde(batch=batch, steps=steps, solver="heun"), SimpleNamespace(rank=0, world=1, device=DEVICE, vae=None)
    state = dict(path="cv", predict="v", channels=channels, size=size, num_labels=labels, marginal=torch.full((max(labels, 1),), 1 / max(labels, 1)))
    many = batch * (2 if labels and w not in (0, 1) else 1)                      # guidance doubles the batch
    x, t, label = torch.randn(many, channels, size, size, device=DEVICE), torch.full((many,), 500.0, device=DEVICE), torch.zeros(many, dtype=torch.long, device=DEVICE)

    @torch.no_grad()
    def bare():
        for _ in range(2 * steps):
            with context():
                net(x, t, label) if labels else net(x, t)
    return dict(generate=lambda: generate(run, cfg, (net, None), state, batch, w=w, context=context), network=bare)


def extraction(model, size, batch):
    """{middle, whole, bare}: stream() up to the last middle block and up to the output, and the network alone."""
    net = placed(build_model(model, size).eval().requires_grad_(False), DEVICE)
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
    middle = [n for n in catalogue(net) if n.startswith("mid") and n.endswith("-out")][-1]

    x, t = torch.randn(batch, 3, size, size, device=DEVICE), torch.full((batch,), 500.0, device=DEVICE)
    bare = torch.no_grad()(lambda: net(x, t))

    def read(name):
        return lambda: list(stream(net, dict(path="cv"), images, np.arange(batch), [name], [0.5], device=DEVICE, context=nullcontext, batch=batch))
    return dict(middle=read(middle), whole=read("unet-out"), bare=bare)


def main():
    config = lambda name: fill("model", Model, yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"])
    shapes = config("shapes")
    unet = Model(channels=64, mult=[1, 2, 2], blocks=2, attention=[8], head_channels=32)
    uvit = Model("uvit", channels=192, depth=12, heads=3, patch=4)
    few, big = (5, 1) if not GPU else (10, 8)
    results = {"sampling, shapes": ratio("sampling, shapes.yaml", 1.05, few, **sampling(shapes, 32, 100 * big, 4, 0, 1.0)),
               "sampling, shapes, guided": ratio("sampling, shapes.yaml, guided", 1.05, few, **sampling(shapes, 32, 50 * big, 4, 20, 2.0)),
               "sampling, unet": ratio("sampling, U-Net of 64 channels", 1.05, few, **sampling(unet, 32, 8 * big, 2, 0, 1.0))}
    for name, model, channels, batch in (("cifar10", config("cifar10"), 3, 500), ("imagenet256", config("imagenet256"), 4, 128)) if GPU else ():
        for w in (1.0, 2.0):
            results[f"sampling, {name}, w = {w:g}"] = ratio(f"sampling, {name}.yaml, w = {w:g}", 1.05, 3, **sampling(model, 32, batch, 10, 100, w, channels))
    for name, model, batch in (("shapes", shapes, 100), ("unet", unet, 16), ("uvit", uvit, 32)):
        sides = extraction(model, 32, batch * big)
        results[f"extraction, {name}"] = ratio(f"extraction up to the middle, {name}", 0.6, few, **{k: sides[k] for k in ("middle", "whole")})
        results[f"extraction / network, {name}"] = ratio(f"extraction, {name}", 1.1, few, **{k: sides[k] for k in ("whole", "bare")})
    print(json.dumps(dict(device=str(DEVICE), threads=torch.get_num_threads(), torch=torch.__version__, **results)))


if __name__ == "__main__":
    main()

"""How much more than the bare network sampling and feature extraction cost. Prints ratios, at the end one line of JSON.

    python tests/bench_sampling.py               # two minutes on two CPU cores; timings of busy machines mean nothing

sampling     generate() with Heun steps, from noise to uint8 images, against the network calls it needs        goal: at most 1.05
             (on a GPU: networks of configs/cifar10.yaml and configs/imagenet256.yaml, compiled, bf16; and what CUDA graphs would save)
extraction   a forward pass that stops at the middle block against a whole one, both through stream()          goal: at most 0.60
             and the whole one against the bare network; compiled up to the middle against not compiled, bf16   goal: at most 1
Both sides of a ratio run in turns, so that a slow moment hits both; the ratio is that of the medians.
"""
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extract_features import catalogue, reader, stream                           # noqa: E402
from sample_ode import SampleOde, Sampler, generate                              # noqa: E402
from configs.run import Model, Processes, fill, gpu_flags     # noqa: E402
from train_diffusion import build_model, placed                # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
FILE = Path(tempfile.gettempdir()) / "bench_sampling.npy"


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


def sampling(model, size, batch, steps, labels, w, channels=3, path="cv", solver="heun", interval=(0.0, 1.0)):
    """generate() against the bare forward passes on batches of the same size: doubled by guidance, which an interval leaves out at some steps."""
    torch._dynamo.reset()                                 # all networks share their code, of which so many versions are compiled and no more
    net = placed(build_model(model, size, channels, num_labels=labels).eval().requires_grad_(False), DEVICE, compiled=GPU)
    net, context = (torch.compile(net, dynamic=False), lambda: torch.autocast("cuda", torch.bfloat16)) if GPU else (net, nullcontext)
    cfg, run = SampleOde(batch=batch, steps=steps, solver=solver, interval=list(interval)), Processes()
    run.device, run.vae = DEVICE, None
    state = dict(path=path, predict="v", channels=channels, size=size, num_labels=labels, marginal=torch.full((max(labels, 1),), 1 / max(labels, 1)))
    grid = torch.linspace(0, 1, steps + 1).tolist()       # Heun looks at both ends of a step, DDIM at the first
    times = [t for ends in zip(grid[:-1], grid[1:]) for t in ends[:2 if solver == "heun" else 1]]
    many = [batch * (2 if labels and w not in (0, 1) and interval[0] <= t <= interval[1] else 1) for t in times]
    most = max(many)
    x, t, label = torch.randn(most, channels, size, size, device=DEVICE), torch.full((most,), 500.0, device=DEVICE), torch.zeros(most, dtype=torch.long, device=DEVICE)

    @torch.no_grad()
    def bare():
        for n in many:
            with context():
                net(x[:n], t[:n], label[:n]) if labels else net(x[:n], t[:n])
    turns = 8 if GPU else 1                               # batches: the next one's noise is drawn while this one is computed
    return dict(generate=lambda: generate(run, replace(cfg, n=turns * batch), Sampler(net, state, None, context), w, FILE), network=lambda: [bare() for _ in range(turns)])


def extraction(model, size, batch):
    """{middle, whole, bare, compiled, plain}: stream() up to the last middle block and up to the output, the network alone, and reading the middle block in bf16."""
    torch._dynamo.reset()
    net = placed(build_model(model, size).eval().requires_grad_(False), DEVICE)
    turns = 8 if GPU else 1
    images = np.random.default_rng(0).integers(0, 256, (turns * batch, 3, size, size), dtype=np.uint8)
    middle = [n for n in catalogue(net) if n.startswith("mid") and n.endswith("-out")][-1]

    x, t = torch.randn(batch, 3, size, size, device=DEVICE), torch.full((batch,), 500.0, device=DEVICE)
    bare = torch.no_grad()(lambda: [net(x, t) for _ in range(turns)])

    def read(name):
        return lambda: list(stream(net, dict(path="cv"), images, np.arange(len(images)), [name], [0.5], device=DEVICE, context=nullcontext, batch=batch))
    laid = placed(build_model(model, size).eval().requires_grad_(False), DEVICE, True)                           # channels-last, as load_model has it
    readers = dict(compiled=reader(laid, [middle], compiled=True), plain=reader(net, [middle]))
    short = {k: torch.no_grad()(torch.autocast(DEVICE.type, torch.bfloat16)(lambda r=r: [r(x, t / 1000) for _ in range(turns)])) for k, r in readers.items()}
    return dict(middle=read(middle), whole=read("unet-out"), bare=bare) | short


def main():
    gpu_flags(training=False)                             # as in the stages
    torch._dynamo.config.fail_on_cache_limit_hit = True                      # rather than compare eager networks without a word
    config = lambda name: fill("model", Model, yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"])
    shapes = config("shapes")
    unet = Model(channels=64, mult=[1, 2, 2], blocks=2, attention=[8], head_channels=32)
    uvit = Model("uvit", channels=192, depth=12, heads=3, patch=4)
    few, big = (5, 1) if not GPU else (10, 8)
    results = {"sampling, shapes": ratio("sampling, shapes.yaml", 1.05, few, **sampling(shapes, 32, 100 * big, 4, 0, 1.0)),
               "sampling, shapes, guided": ratio("sampling, shapes.yaml, guided", 1.05, few, **sampling(shapes, 32, 50 * big, 4, 20, 2.0)),
               "sampling, shapes, guided within 0.25 ... 0.75": ratio("sampling, shapes.yaml, guided within 0.25 ... 0.75", 1.05, few,
                                                                      **sampling(shapes, 32, 50 * big, 4, 20, 2.0, interval=(0.25, 0.75))),
               "sampling, shapes, guided DDIM on VP": ratio("sampling, shapes.yaml, guided DDIM on VP", 1.05, few, **sampling(shapes, 32, 50 * big, 8, 20, 2.0, path="vp", solver="ddim")),
               "sampling, unet": ratio("sampling, U-Net of 64 channels", 1.05, few, **sampling(unet, 32, 8 * big, 2, 0, 1.0))}
    for name, model, channels, batch in (("cifar10", config("cifar10"), 3, 500), ("imagenet256", config("imagenet256"), 4, 128)) if GPU else ():
        for w in (1.0, 2.0):
            results[f"sampling, {name}, w = {w:g}"] = ratio(f"sampling, {name}.yaml, w = {w:g}", 1.05, 3, **sampling(model, 32, batch, 10, 100, w, channels))
    for name, model in (("shapes", shapes), ("cifar10", config("cifar10"))) if GPU else ():                      # few images at once: the gaps between kernels weigh most
        for batch in (16, 256):
            torch._dynamo.reset()
            nets = {how: torch.compile(placed(build_model(model, 32).eval().requires_grad_(False), DEVICE, True), dynamic=False, **keys)
                    for how, keys in (("graphs", dict(mode="reduce-overhead")), ("plain", {}))}
            x, t = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.full((batch,), 500.0, device=DEVICE)
            call = lambda net, x=x, t=t: torch.no_grad()(torch.autocast("cuda", torch.bfloat16)(lambda: [net(x, t) for _ in range(20)]))
            results[f"CUDA graphs, {name}, batch {batch}"] = ratio(f"CUDA graphs, {name}.yaml, batch {batch}", 1.0, few, **{k: call(net) for k, net in nets.items()})
    for name, model, batch in (("shapes", shapes, 100), ("unet", unet, 16), ("uvit", uvit, 32)):
        sides = extraction(model, 32, batch * big)
        results[f"extraction, {name}"] = ratio(f"extraction up to the middle, {name}", 0.6, few, **{k: sides[k] for k in ("middle", "whole")})
        results[f"extraction / network, {name}"] = ratio(f"extraction, {name}", 1.1, few, **{k: sides[k] for k in ("whole", "bare")})
        results[f"extraction compiled / plain, {name}"] = ratio(f"extraction, {name}, bf16", 1.0, few, **{k: sides[k] for k in ("compiled", "plain")})
    print(json.dumps(dict(device=str(DEVICE), threads=torch.get_num_threads(), torch=torch.__version__, **results)))


if __name__ == "__main__":
    main()

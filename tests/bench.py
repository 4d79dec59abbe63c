"""The speed goals that are claimed, measured: a line for each with what was measured, the goal, and whether it is met.

    python tests/bench.py                            # all, half an hour on two CPU cores that do nothing else
    python tests/bench.py training --device cuda     # only this; on a GPU, where sizes are the papers'

They go to results/bench-<device>.json, by name; those of benchmarks that are not run now stay. Nearly all numbers are
ratios of two times, taken in turns within one run, medians of several; timings of a busy machine mean nothing. A
benchmark is a function bench_<name>(device) -> dict(measured={label: number}, goal={label: "<= 1.05"}), or a sentence
that says why there is nothing to measure here. With small=True sizes are those of a test.
"""
import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
# ruff: noqa: E402
import sample_ode
import train_guided
from configs.data import as_input
from configs.run import ALONE, Data, Model, Run, autocast, fill, gpu_flags, reuse_memory, write_json
from configs.shapes import draw_shapes
from extract_features import catalogue, matching, stream, tapped
from probe import SWEEP, accuracy, logistic, standardise
from self_label import assign, lloyd, sinkhorn
from train_diffusion import (PATHS, Condition, TrainDiffusion, attention, build_model, build_optimizer, loss_per_image)

TINY = dict(backbone="unet", channels=16, mult=[1, 2], blocks=1, attention=[], head_channels=16, stem=4)


def seconds(f, device):
    """Wall time of one call, with what it left for a GPU to do."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    tick = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - tick


def in_turns(device, repeats, *sides):
    """Median seconds of each side, called in turns, so that a slow moment hits all."""
    for f in sides:                                       # allocations, choice of kernels
        f()
    times = [[seconds(f, device) for f in sides] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def ratio(device, repeats, first, second):
    """Time of the first side, in times of the second."""
    a, b = in_turns(device, repeats, first, second)
    return a / b


def matrix_rate(device, kind, small):
    """Operations a second of large square matrix products of this type."""
    n = 256 if small else 8192 if device.type == "cuda" else 3072
    a, b = torch.randn(2, n, n, device=device).to(kind).unbind()
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def read_config(name, small=False):
    """The sections of configs/<name>.yaml; small: with a tiny network."""
    sections = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    return sections | dict(model=TINY) if small else sections


def network(model, device, channels=3, **conditions):
    """The network of a section `model`, with random weights in evaluation mode, for images of 32 pixels."""
    net = build_model(fill("model", Model, model), 32, channels, **conditions)
    return net.eval().requires_grad_(False).to(device)


def make_run(stage, cfg, device):
    """A Run without a command line."""
    return Run(stage, Path("."), cfg, Data(), Model(), {}, False, set(), device=device)


def call_stage(script, *words):
    """The main of a script, in this process, silently."""
    with mock.patch.object(sys, "argv", [script, *map(str, words)]), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(script).main()


def prepare(folder, data):
    """Prepare the images of a section `data` in a run folder."""
    folder.mkdir(exist_ok=True)
    (folder / "bench.yaml").write_text(yaml.safe_dump(dict(data=data)))
    call_stage("train_diffusion", folder / "bench.yaml", f"run={folder}", "--prepare")


def train(folder, sections, script, name, *words):
    """Train by the command line in a run folder; the lines of metrics.jsonl as dicts."""
    kind = "diffusion" if script == "train_diffusion" else "guided"
    (folder / "bench.yaml").write_text(yaml.safe_dump(sections))
    call_stage(script, folder / "bench.yaml", f"run={folder}", f"{script}.name={name}", *words)
    return [json.loads(line) for line in (folder / kind / name / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# What is claimed

def bench_training(device, small=False):
    """Operations that a network needs in training (three forward passes), as a share of the rate of large products."""
    gpu, measured, goal = device.type == "cuda", {}, {}
    uvit = dict(backbone="uvit", channels=1024, depth=20, heads=16, patch=2)     # U-ViT-L/2; its 256 tokens are pixels
    on_gpu = {"CIFAR-10": ("cifar10", {}, 512, 20), "U-ViT-L/2": ("cifar10", uvit, 256, 20)}
    cases = on_gpu if gpu else {"shapes": ("shapes", {}, 32, 192), "CIFAR-10": ("cifar10-cpu", {}, 64, 6)}
    peak = matrix_rate(device, autocast(make_run("train_diffusion", None, device), "auto")[1], small)
    for name, (config, keys, batch, updates) in cases.items():
        batch, updates, count = (4, 1, 20) if small else (batch, updates, 5000)
        images = 4 * updates * batch
        sections = read_config(config, small) | dict(data=dict(source="shapes", train=count, test=10))
        sections["model"] = sections["model"] | keys
        sections["train_diffusion"] |= dict(batch=batch, images=images, save_every=images, grid_every=images,
                                            log_every=images // 4, compile=gpu)
        with tempfile.TemporaryDirectory() as folder:
            lines = train(Path(folder), sections, "train_diffusion", "base")[1:]             # the first one warms up
        blank = torch.empty(1, 3, 32, 32, device="meta")
        with FlopCounterMode(display=False) as counter:
            network(sections["model"], blank.device)(blank, blank[:, 0, 0, 0])
        speed = max(line["images_per_second"] for line in lines)
        measured[f"{name}, images/s"] = speed
        measured[f"{name}, share of the matrix rate"] = 3 * counter.get_total_flops() * speed / peak
    goal |= {"CIFAR-10, images/s": ">= 8000", "U-ViT-L/2, share of the matrix rate": ">= 0.5"} if gpu else {}
    return dict(measured=measured, goal=goal)


def training_step(config, device, small=False, **keys):
    """A function that does one update of a configuration on images at hand, as `fit` does: step, clipping, average."""
    sections = read_config(config, small)
    cfg = fill("train_diffusion", TrainDiffusion, sections["train_diffusion"] | keys)
    gpu_flags(training=True, exact=cfg.optimizer == "muon")
    net = build_model(fill("model", Model, sections["model"]), 32).to(device).train()
    weights = list(net.parameters())
    averages, average = [p.detach().clone() for p in weights], get_ema_multi_avg_fn(0.9)
    optimizer = build_optimizer(cfg, net)
    context = autocast(make_run("train_diffusion", cfg, device), cfg.precision)[0]
    n = 4 if small else cfg.batch
    x, z = torch.randn(2, n, 3, 32, 32, device=device).unbind()
    t = torch.rand(n, device=device)

    def step():
        with context():
            loss = loss_per_image(net, PATHS[cfg.path], cfg.predict, x, z, t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            average(averages, weights, 0)
    return step


def bench_muon(device, small=False):
    """A whole training step with Muon, in steps with AdamW."""
    measured = {}
    for config in ("shapes", "cifar10-cpu"):
        sides = (training_step(config, device, small, optimizer=name) for name in ("muon", "adamw"))
        measured[f"Muon / AdamW, step of {config}"] = ratio(device, 2 if small else 40, *sides)
    return dict(measured=measured, goal=dict.fromkeys(measured, "<= 1.05"))


def bench_memory(device, small=False):
    """A training step of a process that keeps freed memory (mallopt), in those of one that does not."""
    if device.type == "cuda":
        return "the C library's memory matters where the CPU computes"
    step = f"b.training_step('cifar10-cpu', b.torch.device('cpu'), {small})"
    code = f"print(*b.in_turns(b.torch.device('cpu'), {2 if small else 15}, {step}))"
    kept, returned = [], []
    for times, first in [(kept, "b.reuse_memory()"), (returned, "")] * (1 if small else 4):
        command = [sys.executable, "-c", f"import bench as b\n{first}\n{code}"]
        out = subprocess.run(command, cwd=ROOT / "tests", stdout=subprocess.PIPE, check=True)
        times.append(float(out.stdout))
    measured = {"freed memory kept / returned, step": statistics.median(kept) / statistics.median(returned)}
    return dict(measured=measured, goal=dict.fromkeys(measured, "<= 0.9"))


def bench_attention(device, small=False):
    """Attention of training in bfloat16 on a CPU, forth and back, in times of PyTorch's fused operation."""
    if device.type == "cuda":
        return "on a GPU attention is PyTorch's fused operation"
    measured = {}
    for B, H, L, D in ((128, 2, 64, 32), (32, 8, 65, 48), (8, 8, 257, 64), (2, 4, 1024, 64)):
        x = torch.randn(1 if small else B, L, 3, H, D).bfloat16().requires_grad_()
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)      # [B, H, L, D] each

        def forth_and_back(f):
            y = f(q, k, v)
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        sides = [lambda f=f: forth_and_back(f) for f in (attention, F.scaled_dot_product_attention)]
        measured[f"attention / fused, {B} x {H} heads, {L} positions"] = ratio(device, 1 if small else 12, *sides)
    return dict(measured=measured, goal=dict.fromkeys(measured, "<= 1.05"))


def bench_online(device, small=False):
    """Training that finds its labels, in times of unconditional training of equal length (model and keys of shapes).

    An unconditional run stands before and after every other. There are 26 % as many images as the training sees, and a
    report for 19,000 of them. Pictures, and labels of all in the end, do not count.
    """
    images, turns = (256, 1) if small else (4096, 5)
    half = [f"switch={images // 2}", f"sk_until={images // 2}"]
    variants = {"settled": half, "patch maps": ["condition=patch"]}
    variants |= {} if small else {"moving": [], "moving, middle block": ["sk_activation=mid*-out"],
                                  "settled, gradient in the backbone": ["sk_grad=backbone", *half]}
    sections = read_config("shapes", small) | dict(data=dict(train=images * 26 // 100, test=10))
    sections["train_guided"] |= dict(images=images, log_every=images, save_every=images, grid_every=images, init="",
                                     switch=0, sk_until=0, sk_freeze=images // 8, sk_activation="up-level1-repeat1-*")
    reports, report, number = [], train_guided.Labeller.report, itertools.count()

    def timed_report(*arguments):
        tick = time.perf_counter()
        line = report(*arguments)
        reports.append(time.perf_counter() - tick)
        return line

    with tempfile.TemporaryDirectory() as name, mock.patch.object(train_guided.Labeller, "report", timed_report):
        folder = Path(name)

        def trained(labels, *more):
            reports.clear()
            lines = train(folder, sections, "train_guided", f"n{next(number)}", f"labels={labels}", *more)
            return sum(line["seconds"] for line in lines) + sum(reports) * images / 19_000

        prepare(folder, sections["data"])
        ratios, before = {name: [] for name in variants}, trained("none")
        for name, more in [*variants.items()] * turns:
            took, after = trained("online", *more), trained("none")
            ratios[name].append(2 * took / (before + after))
            before = after
    measured = {f"online labels, {name} / none": statistics.median(v) for name, v in ratios.items()}
    return dict(measured=measured, goal=dict.fromkeys(measured, "<= 1.25"))


def bench_preparation(device, small=False):
    """Preparing a folder of JPEG files, in times of a plain loop that opens, crops, resizes and saves them."""
    n, size = (12, 32) if small else (2400, 64)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        for i, x in enumerate(draw_shapes(0, np.arange(n), 160)[0]):
            Image.fromarray(x.transpose(1, 2, 0)).crop((0, 0, 160, 120)).save(root / f"{i:06d}.jpg")
        number, data = itertools.count(), dict(source="folder", root=str(root), size=size)

        def plain():
            images = (Image.open(file).convert("RGB").crop((20, 0, 140, 120)) for file in sorted(root.iterdir()))
            rows = [np.asarray(x.resize((size, size), Image.BICUBIC)).transpose(2, 0, 1) for x in images]
            np.save(Path(folder) / "plain.npy", np.stack(rows))
        label = "preparing JPEG files / a plain loop"
        ours = lambda: prepare(Path(folder) / str(next(number)), data)
        return dict(measured={label: ratio(device, 1 if small else 3, ours, plain)}, goal={label: "<= 1.1"})


def bench_extraction(device, small=False):
    """What hooks cost: extraction in times of forward passes of the same images."""
    repeats, batch = (1, 4) if small else (7, 256)
    uvit = dict(backbone="uvit", channels=192, depth=2 if small else 12, heads=3, patch=4)
    images = draw_shapes(0, np.arange(2 * batch))[0]
    x, t = as_input(torch.from_numpy(images[:batch])).to(device), torch.full((batch,), 500.0, device=device)
    measured, goal = {}, {}
    for what, model in (("shapes", read_config("shapes", small)["model"]), ("U-ViT", uvit)):
        net = network(model, device)
        blocks = matching(net, ["blocks"])
        middle = [name for name in blocks if name.startswith("mid")][-1]

        @torch.no_grad()
        def forward(passes=1):
            for _ in range(passes):
                net(x, t)

        def hooked():
            with tapped(net, [blocks[-1]]):
                forward()

        def read(names, times, n=2 * batch):
            for _ in stream(net, dict(path="cv"), images, np.arange(n), names, times, device=device,
                            context=nullcontext, batch=batch):
                pass
        whole, to_middle = lambda: read([[*catalogue(net)][-1]], [0.5]), lambda: read([middle], [0.5])
        surface = lambda: read(blocks, [k / 10 for k in range(1, 9)], batch)
        for label, most, *sides in (("a hook / none", 1.02, hooked, forward),
                                    ("extraction / forward passes", 1.1, whole, lambda: forward(2)),
                                    ("up to the middle block / whole pass", 0.6, to_middle, whole),
                                    ("all blocks at 8 times / forward pass", 8.5, surface, forward)):
            measured[f"{label}, {what}"] = ratio(device, repeats, *sides)
            goal[f"{label}, {what}"] = f"<= {most}"
    return dict(measured=measured, goal=goal)


def bench_clustering(device, small=False):
    """k-means from equal starts in times of scikit-learn's; Sinkhorn in times of two logsumexps an iteration."""
    from sklearn.cluster import KMeans
    n, d, K = (500, 16, 20) if small else (50_000, 512, 1_000)
    repeats, g = 1 if small else 3, torch.Generator().manual_seed(0)
    x = torch.randn(200, d, generator=g)[torch.randint(200, (n,), generator=g)] + 0.8 * torch.randn(n, d, generator=g)
    start, found, on = x[torch.randperm(n, generator=g)[:K]], {}, x.to(device)

    def ours():
        found["ours"] = lloyd(on, start.to(device), "euclidean", 10, ALONE)[0]

    def theirs():
        model = KMeans(K, init=start.numpy(), n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(x.numpy())
        found["theirs"] = torch.from_numpy(model.cluster_centers_).to(device)

    def plain():
        L = scores / 0.05
        v = torch.zeros(K, device=device)
        for _ in range(20):
            u = -(L + v).logsumexp(1, keepdim=True)
            v = -(L + u).logsumexp(0)
        return (L + u + v).exp()
    warnings.simplefilter("ignore")                       # scikit-learn says that it has not converged
    speed = ratio(device, repeats, ours, theirs)
    inertia = [float((on - c.float()[assign(on, c, "euclidean")]).square().sum()) for c in found.values()]
    scores = F.normalize(on[:, :64]) @ F.normalize(torch.randn(K, min(d, 64), generator=g)).T.to(device)     # [n, K]
    measured = {"k-means / scikit-learn": speed, "k-means, inertia / scikit-learn": inertia[0] / inertia[1],
                "Sinkhorn / plain": ratio(device, repeats, lambda: sinkhorn(scores, 0.05, 20), plain)}
    goal = dict(zip(measured, ("<= 1", "<= 1.001", "<= 0.333")))
    if device.type == "cuda" and not small:               # an iteration at ImageNet's size, without what happens once
        x, label = torch.randn(1_280_000, 1024, device=device), "k-means, 1.28 M x 1,024, K = 5,000, s an iteration"
        run = lambda n: lloyd(x, x[:5000], "euclidean", n, ALONE)
        few, many = in_turns(device, 1, lambda: run(1), lambda: run(5))
        measured[label], goal[label] = (many - few) / 4, "<= 3"
    return dict(measured=measured, goal=goal)


def sampling_sides(folder, device, model, batch, steps=4, channels=3, labels=20, path="cv", interval=(0.0, 1.0)):
    """(generate() to images, its network calls alone): Heun on path cv, else DDIM; w = 2 where there are labels."""
    gpu = device.type == "cuda"
    net = network(model, device, channels, num_labels=labels)
    net = torch.compile(net, dynamic=False) if gpu else net
    context = (lambda: torch.autocast("cuda", torch.bfloat16)) if gpu else nullcontext
    solver, ends = ("heun", 2) if path == "cv" else ("euler", 1)                 # Heun looks at both ends of a step
    cfg = sample_ode.SampleOde(n=batch, batch=batch, steps=steps, solver=solver)
    state = dict(path=path, predict="v", channels=channels, size=32, num_labels=labels, marginal=torch.ones(labels))
    condition = Condition("label", torch.arange(labels + 1)).to(device) if labels else None
    field = sample_ode.Field(net, PATHS[path], "v", interval=interval, context=context, batch=batch,
                             condition=condition)
    times = [(i + end) / steps for i in range(steps) for end in range(ends)]
    guided = [bool(labels) and interval[0] <= t <= interval[1] for t in times]
    x, t = torch.randn(2 * batch, channels, 32, 32, device=device), torch.full((2 * batch,), 500.0, device=device)
    label = torch.zeros(2 * batch, dtype=torch.long, device=device)

    @torch.no_grad()
    def bare():
        for twice in guided:                              # with and without the label in one call
            n = batch * (1 + twice)
            with context():
                net(x[:n], t[:n], **(dict(label=label[:n]) if labels else {}))
    run, w, file = make_run("sample_ode", cfg, device), 2.0 if labels else 1.0, Path(folder) / "images.npy"
    return lambda: sample_ode.generate(run, cfg, field, state, w, file), bare


def bench_sampling(device, small=False):
    """Sampling, from noise to uint8 images, in times of its network calls."""
    gpu = device.type == "cuda"
    gpu_flags(training=False)
    shapes, batch = read_config("shapes", small)["model"], 2 if small else 800 if gpu else 100
    cases = {"plain": dict(labels=0), "guided": {}, "guided at 0.25 to 0.75": dict(interval=(0.25, 0.75)),
             "guided DDIM on VP": dict(path="vp", steps=8)}
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: sampling_sides(folder, device, shapes, batch, **keys) for name, keys in cases.items()}
        if gpu and not small:
            large = read_config("imagenet256")["model"]
            sides["guided, imagenet256"] = sampling_sides(folder, device, large, 128, 10, 4)
        measured = {f"sampling / network calls, {k}": ratio(device, 1 if small else 5, *v) for k, v in sides.items()}
    return dict(measured=measured, goal=dict.fromkeys(measured, "<= 1.05"))


def bench_evaluation(device, small=False):
    """Resizing for Inception, in times of clean-fid's own, image by image on the processor."""
    from cleanfid.resize import build_resizer
    theirs, measured = build_resizer("clean"), {}
    for size in (32, 256):
        x = draw_shapes(0, np.arange(4 if small else 200), size)[0]
        ours = lambda: [sample_ode.inception_resize(part.to(device)) for part in torch.from_numpy(x).split(100)]
        peer = lambda: [theirs(image) for image in x.transpose(0, 2, 3, 1)]
        measured[f"resizing / clean-fid, from {size}"] = ratio(device, 1 if small else 5, ours, peer)
    return dict(measured=measured, goal=dict.fromkeys(measured, "<= 1"))


def bench_probes(device, small=False):
    """The sweep's logistic regressions of all block outputs, in times of scikit-learn's one at a time."""
    from sklearn.linear_model import LogisticRegression
    n, m = (150, 50) if small else (2000, 1000)           # rows to fit and to score
    net = network(read_config("shapes", small)["model"], device)
    for p in net.parameters():                            # branches that start at zero would show nothing
        p += 0.05 * torch.randn(p.shape, device=device)
    images, classes = draw_shapes(0, np.arange(n + m))[:2]
    names, y = matching(net, ["blocks"])[:2 if small else None], torch.from_numpy(classes)
    parts = [out for _, out in stream(net, dict(path="cv"), images, np.arange(n + m), names, [0.5], device=device,
                                      context=nullcontext, batch=500)]
    seconds_of, right = torch.zeros(2), torch.zeros(2)
    for name in names:
        x = torch.cat([part[name, 0.5].cpu() for part in parts])
        fit, test = standardise(x[:n], x[n:])
        tick = time.perf_counter()
        ours = accuracy(logistic(fit, y[:n], int(y.max()) + 1, 1e-3, tolerance=SWEEP), test, y[n:])
        tock = time.perf_counter()
        model = LogisticRegression(C=1 / (1e-3 * n), max_iter=1000).fit(fit.numpy(), y[:n].numpy())
        theirs = model.score(test.numpy(), y[n:].numpy())
        seconds_of += torch.tensor([tock - tick, time.perf_counter() - tock])
        right += torch.tensor([ours, theirs]) / len(names)
    measured = {"probes of all blocks / scikit-learn": float(seconds_of[0] / seconds_of[1]),
                "probes of all blocks, accuracy below scikit-learn's": float(right[1] - right[0])}
    return dict(measured=measured, goal=dict(zip(measured, ("<= 0.1", "<= 0.003"))))


BENCHMARKS = {f.__name__.removeprefix("bench_"): f for f in (
    bench_training, bench_muon, bench_memory, bench_attention, bench_online, bench_preparation, bench_extraction,
    bench_clustering, bench_sampling, bench_evaluation, bench_probes)}


def machine(device):
    """The processor, or the GPU, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "model name : CPU"
    return f"{os.cpu_count()} x {re.search('model name.*: (.*)', info)[1]}" + ", bf16" * ("avx512_bf16" in info)


def report(name, result):
    """Print what a benchmark measured, a line for each number; what is not measured here says why."""
    if isinstance(result, str):
        return print(f"{name}: skipped, {result}", flush=True)
    for label, value in result["measured"].items():
        goal, verdict = result["goal"].get(label, ""), ""
        if goal:
            sign, limit = goal.split()                    # <= 1.05, or >= 0.5
            verdict = "met" if (value <= float(limit) if sign == "<=" else value >= float(limit)) else "MISSED"
        print(f"{name}: {label:66} {value:9.4g}   {goal:8} {verdict}".rstrip(), flush=True)


def keep(file, name, result, device):
    """Put the numbers of a benchmark into the file, by its name; those of benchmarks that are no more leave it."""
    known = json.loads(file.read_text()) if file.exists() else {}
    known = {k: v for k, v in known.items() if k in BENCHMARKS}
    about = dict(machine=machine(device), threads=torch.get_num_threads(), torch=torch.__version__)
    about["measured"] = {k: float(f"{v:.4g}") for k, v in result["measured"].items()}
    write_json(file, known | {name: about | dict(goal=result["goal"])})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU, where there is one")
    asked = parser.parse_args()
    if not set(asked.names) <= set(BENCHMARKS):
        parser.error(f"there are {', '.join(BENCHMARKS)}")
    if asked.device == "cpu":                             # the stages take a GPU where they see one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.device not in (None, device.type):
        parser.error(f"--device {asked.device}: there is none")
    where = machine(device).lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    file = ROOT / "results" / f"bench-{where}.json"
    reuse_memory()                                        # as in every stage
    for name in asked.names:
        result = BENCHMARKS[name](device)
        report(name, result)
        if isinstance(result, dict):
            keep(file, name, result, device)
    print(f"numbers in {file}")


if __name__ == "__main__":
    main()

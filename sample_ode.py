"""Sample: a model in, images along the ODE out, and how good they are.

Reads   {diffusion,guided}/<name>/checkpoint.pt; for evaluation also data/{train,test}
Writes  samples/<name>/: images.npy uint8 [n, 3, H, W], labels.npy, grid.png, metrics.json; guidance.png of several w; with sweep=nfe nfe.png and straightness.png
Time    t = 0 is noise, t = 1 is data; sampling runs from 0 to 1, direction=encode from 1 to 0.
Scale   v = v_null + w (v_cond - v_null): w = 0 unconditional, w = 1 conditional, w > 1 guided. Papers that write v_c + s (v_c - v_0) have s = w - 1.

    python sample_ode.py configs/shapes.yaml checkpoint=guided/kmeans name=kmeans-w guidance=1,1.5,2,3   # picks w on other samples than it reports
    python sample_ode.py configs/cifar10.yaml checkpoint=guided/kmeans n=50k evaluator=inception       # one GPU; FID proper (the YAML compares with train)
    torchrun --nproc_per_node=8 sample_ode.py configs/cifar10.yaml checkpoint=guided/kmeans n=50k      # the same images, eight GPUs
    python sample_ode.py configs/shapes.yaml checkpoint=diffusion/base name=base-nfe sweep=nfe              # distance against network evaluations
    python sample_ode.py configs/shapes.yaml --table                                                   # all results of the run side by side
"""
import copy
import itertools
import math
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.data import as_input, decode, load_data, load_labels, open_autoencoder
from configs.run import (UserError, ahead, atomic, autocast, bar, cli, create_rows, digest, draw, fill,
                         finished, key, read_json, require, save_grid, seed_of, seeded, start, to_uint8, weights_hash,
                         wide, write_json, write_rows)
from train_diffusion import PATHS, estimates, load_checkpoint, load_model
from extract_features import matching, noise_level, pooled, tapped
from train_guided import TrainGuided, conditioned, draw_boxes, layout_maps


@dataclass
class SampleOde:
    """Section `sample_ode`."""
    name: str = key("base", "results go to samples/<name>")
    checkpoint: str = key("diffusion/base",
                          "a folder of the run, a .pt file, or published weights: adm:, ddpm:, uvit:, sgfm:FILE")
    weights: Literal["ema", "net"] = key("ema", "averaged or raw")
    n: int = key(10_000, "samples")
    solver: Literal["euler", "midpoint", "heun", "rk4", "dopri5", "ddim"] = key("heun",
        "dopri5 adapts its steps to tol")
    steps: int = key(12, "of the fixed-step solvers")
    tol: float = key(1e-4, "dopri5: relative and absolute tolerance")
    guidance: list[float] = key([1.0], "w; several: the best on `select` other samples is taken")
    select: int = key(1_000, "samples per candidate when several w are given; from another seed than the report")
    interval: list[float] = key([0.0, 1.0], "guide only while t is inside; outside w = 1")
    autoguide: str = key("",
                         "checkpoint of a weaker model: v = v_weak + w (v - v_weak), both with the label if they know"
                         " labels")
    labels: list[str] = key(["marginal"],
                            "marginal (of the training labels), uniform, or ids (places in the bank, if any)")
    boxes: list[list[float]] = key([],
                                   "models with box conditions: draw this layout, [[x0, y0, x1, y1, label], ...] in "
                                   "pixels")
    mask: str = key("", "models with mask conditions: a PNG whose pixel values are the ids")
    layouts: Literal["train", "test"] = key("train",
                                            "models with box or mask conditions: layouts of the bank in the "
                                            "checkpoint, or of the test images")
    direction: Literal["generate", "encode"] = key("generate", "encode: test images back to noise and forth again")
    evaluate: bool = key(True, "compare with real images")
    evaluator: str = key("judge",
                         "judge (small CNN on the run's classes), pixels (their principal components: no labels), "
                         "inception (FID proper), or a TorchScript file")
    reference: Literal["train", "test"] = key("test", "real images to compare with")
    neighbours: int = key(5, "k of precision, recall, density, coverage")
    sweep: Literal["", "nfe", "guidance"] = key("", "draw the distance against network evaluations, or against w")
    against: list[str] = key([],
                             "nfe sweep: further checkpoints to draw into the same figures, such as one of the other "
                             "path")
    sweep_steps: list[int] = key([2, 3, 5, 8, 12, 20, 32],
                                 "of the nfe sweep, up to 64 evaluations; dopri5 varies its tolerance instead")
    sweep_solvers: list[Literal["euler", "midpoint", "heun", "rk4", "dopri5", "ddim"]] = key(["euler", "midpoint", "heun", "dopri5"],
        "of the nfe sweep")
    features: list[str] = key([], "also save these activations of the network, names and globs, while it samples")
    features_at: list[int] = key([0], "at these evaluations of a fixed-step solver, from 0")
    features_pool: str = key("mean", "mean, none, or a number g: average over a grid of g x g")
    batch: int = key(250, "images per network call and process")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network; the ODE state is float32 always")
    compile: bool = key(False, "torch.compile the network: a minute or so that pays where n is many batches")
    seed: int = key(0, "sample i is a function of (seed, i)")
    overwrite: bool = key(False, "replace samples that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Solvers of dy/ds = f(y, s). Every row of y is its own problem with its own s, so results do not depend on the batch.

TABLEAUS = {                                              # Butcher tableaus: nodes c, matrix a, weights b
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "rk4": ([0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
DOPRI5 = (                                                # Dormand and Prince 1980: the last stage is the slope at the step's end
    [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1],
    [[], [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9], [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
     [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656], [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0])
DOPRI5_ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]       # 5th minus 4th order weights


def mix(ks, weights):
    """Weighted sum of stage slopes, skipping zeros."""
    return sum(w * k for w, k in zip(weights, ks) if w)


def column(v, y):
    """[B] -> [B, 1, ...], to multiply rows of y."""
    return v.reshape(-1, *[1] * (y.dim() - 1))


def solve_fixed(f, y, grid, solver):
    """Explicit Runge-Kutta steps over a grid. f(y [B, ...], s: a number, the same for all rows) -> slope; grid: [steps + 1] -> y at grid[-1]."""
    c, a, b = TABLEAUS[solver]
    for s0, s1 in itertools.pairwise(grid.tolist()):
        h, ks = s1 - s0, []
        for node, row in zip(c, a):
            ks.append(f(y + h * mix(ks, row) if row else y, s0 + node * h))
        y = y + h * mix(ks, b)
    return y


def solve_dopri5(f, y, s0, s1, tol, max_steps=10_000):
    """Adaptive Dormand-Prince 5(4) from s0 to s1 (either direction), each row with its own steps; atol = rtol = tol.

    f(y [A, ...], s [A], rows [A]) is called for the rows that still move. Step control as in Hairer, Norsett and Wanner, section II.4.
    Returns (y, calls per row [B]).
    """
    B, sign = len(y), 1.0 if s1 > s0 else -1.0
    norm = lambda e: e.flatten(1).double().square().mean(1).sqrt()               # [A] root mean square
    c, a, _ = DOPRI5
    rows, s = torch.arange(B, device=y.device), torch.full((B,), float(s0), dtype=torch.float64, device=y.device)
    k1, calls = f(y, s.to(y), rows), torch.full((B,), 2, device=y.device)
    # first step: one Euler trial step tells how fast the slope changes
    scale = tol + tol * y.abs()
    d0, d1 = norm(y / scale), norm(k1 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1).clamp(max=abs(s1 - s0))
    d2 = norm((f(y + column(sign * h0, y).to(y) * k1, (s + sign * h0).to(y), rows) - k1) / scale) / h0
    h1 = torch.where(torch.maximum(d1, d2) <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / torch.maximum(d1, d2)) ** 0.2)
    h = torch.minimum(100 * h0, h1)                                              # [B] positive
    y, k1 = y.clone(), k1.clone()
    for _ in range(max_steps):
        left = (s1 - s) * sign
        rows = (left > 1e-12 * max(abs(s1), abs(s0), 1)).nonzero().flatten()
        if len(rows) == 0:
            return y, calls
        step = torch.minimum(h[rows], left[rows])
        if not torch.isfinite(step).all():
            raise UserError("solver=dopri5: the network returned a non-finite velocity")
        stuck = ((step < 1e-9 * abs(s1 - s0)) & (step < left[rows])).nonzero().flatten()         # only the last step may be tiny
        if len(stuck):
            raise UserError(f"solver=dopri5: the step shrank to {float(step[stuck[0]]):.1e} at {float(s[rows[stuck[0]]]):.6f}; "
                            "raise tol, or use a fixed-step solver")
        yr, hs, ks = y[rows], column(sign * step, y).to(y), [k1[rows]]
        for node, row in zip(c[1:], a[1:]):
            stage = yr + hs * mix(ks, row)
            ks.append(f(stage, (s[rows] + sign * node * step).to(y), rows))
        calls[rows] += 6
        new = stage                                                              # the last stage's argument is the 5th order solution
        error = norm(hs * mix(ks, DOPRI5_ERROR) / (tol + tol * torch.maximum(yr.abs(), new.abs())))
        if not torch.isfinite(error).all():
            raise UserError("solver=dopri5: the network returned a non-finite velocity")
        good = error <= 1
        y[rows], k1[rows] = torch.where(column(good, y), new, yr), torch.where(column(good, y), ks[-1], ks[0])
        s[rows] = torch.where(good, torch.where(step >= left[rows], s1, s[rows] + sign * step), s[rows])
        factor = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10)
        h[rows] = step * torch.where(good, factor.clamp(min=1), factor.clamp(max=1))
    raise UserError(f"solver=dopri5: more than {max_steps} steps; raise tol, or use a fixed-step solver")


# ---------------------------------------------------------------------------------------------------------------------
# The field: the network's velocity, guided

def every_row(t, x):
    """A time of all rows of x [B, ...], given as a number or as [B], as a tensor [B] beside x."""
    return t if torch.is_tensor(t) else x.new_full((len(x),), t)


class Field:
    """Slope of the probability-flow ODE in the path's variables (y, s), with guidance; counts its network calls.

    Guidance and autoguidance mix outputs of networks; the estimates of x and z are affine in them, so velocities are mixed alike.
    """

    def __init__(self, net, path, predict, w=1.0, interval=(0.0, 1.0), weak=None, context=None):
        self.net, self.path, self.predict, self.w, self.interval, self.weak, self.context = net, path, predict, w, interval, weak, context
        self.null, self.images, self.watch = getattr(net, "num_labels", 0), 0, None

    def call(self, net, x, t, label):
        """One network call, counted."""
        self.images += len(x)
        with self.context() if self.context else nullcontext():
            return net(x.float(), 1000 * t.float(), **({} if label is None else dict(label=label))).to(x.dtype)

    def output(self, x, t, label):
        """The network's prediction, guided. x: [B, C, H, W]; t: a number or, if rows differ, [B]; label: [B] or None."""
        low, high = self.interval[0] - 1e-6, self.interval[1] + 1e-6             # an evaluation at an end counts as inside, however its time is rounded
        w, some, every = self.w, True, True               # some, every: of the rows, are to be guided
        if not torch.is_tensor(t):
            some = every = low <= t <= high
        elif low > 0 or high < 1:                         # [B]; asking a tensor makes a GPU wait, a number does not
            inside = (t >= low) & (t <= high)
            w, some, every = torch.where(inside, self.w, 1.0), bool(inside.any()), bool(inside.all())
        t = every_row(t, x)
        if self.w == 1 or not some or (self.weak is None and label is None):
            return self.call(self.net, x, t, label)
        if self.weak is not None:
            good, bad = self.call(self.net, x, t, label), self.call(self.weak, x, t, label if getattr(self.weak, "num_labels", 0) else None)
        elif self.w == 0 and every:
            return self.call(self.net, x, t, torch.full_like(label, self.null))
        else:                                             # conditional and unconditional in one batch
            good, bad = self.call(self.net, torch.cat([x, x]), torch.cat([t, t]), torch.cat([label, torch.full_like(label, self.null)])).chunk(2)
        return torch.lerp(bad, good, wide(w).to(x) if torch.is_tensor(w) else w)

    def estimate(self, x, t, label):
        """(x_hat, z_hat), guided."""
        out, t = self.output(x, t, label), every_row(t, x)
        if self.watch:                                    # somebody wants the activations of this evaluation
            self.watch(t)
        return estimates(self.path, self.predict, out, x, t)

    def slope(self, y, s, label):
        """dy/ds for states y [B, C, H, W] at s, a number or [B]."""
        t = self.path.time(s) if torch.is_tensor(s) else float(self.path.time(torch.tensor(s, dtype=torch.float64)))
        return self.path.slope(*self.estimate(y * wide(self.path.scale(every_row(t, y))), t, label))


ROUNDED = dict(cuda=16)                                   # dopri5 rounds the number of rows that still move up to a multiple of so many, by copies of the last


@torch.no_grad()
def integrate(field, x, label, solver, steps, tol, reverse=False):
    """Move images from noise (t = 0) to data (t = 1), or back. x: float32 [B, C, H, W] -> (the same, field evaluations per row)."""
    path = field.path
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)                  # on the host, which decides by it where guidance applies
    grid = grid.flip(0) if reverse else grid
    if solver == "ddim":                                  # the formula itself; on VP the same as an Euler step in rho
        for t, s in itertools.pairwise(grid):
            x_hat, z_hat = field.estimate(x, float(t), label)
            x = float(path.alpha(s)) * x_hat + float(path.sigma(s)) * z_hat
        return x, torch.full((len(x),), steps)
    y, clock = x / float(path.scale(grid[0])), path.clock(grid)
    if solver == "dopri5":                                # ever smaller batches: trying out the kernels for each would take longer than it saves
        step = ROUNDED.get(x.device.type, 1)              # and GPUs prepare kernels for every new size

        def slope(y, s, rows):
            pick = torch.arange(-(-len(y) // step) * step, device=y.device).clamp(max=len(y) - 1)
            return field.slope(y[pick], s[pick], None if label is None else label[rows[pick]])[:len(y)]
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            y, calls = solve_dopri5(slope, y, float(clock[0]), float(clock[-1]), tol)
    else:
        y = solve_fixed(lambda y, s: field.slope(y, s, label), y, clock, solver)
        calls = torch.full((len(x),), steps * len(TABLEAUS[solver][0]))
    return y * float(path.scale(grid[-1])), calls.cpu()


@torch.no_grad()
def straightness(velocity, x, label, steps=32):
    """How far sampling paths from noise x [B, C, H, W] are from straight lines: (times [steps], deviation [steps], mean).

    The deviation at t is |dx/dt - (x(1) - x(0))|^2 / |x(1) - x(0)|^2, averaged over images; 0 everywhere means that one Euler step is exact.
    """
    path, t = velocity.path, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    clock, y, points = path.clock(t), x / float(path.scale(t[0])), [x]
    for i in range(steps):
        y = solve_fixed(lambda y, s: velocity.slope(y, s, label), y, clock[i:i + 2], "midpoint")
        points.append(y * float(path.scale(t[i + 1])))
    points = torch.stack(points).flatten(2).double()                             # [steps + 1, B, D]
    chord = points[-1] - points[0]
    deviation = (((points[1:] - points[:-1]) * steps - chord).square().sum(2) / chord.square().sum(1)).mean(1)
    return ((t[1:] + t[:-1]) / 2).tolist(), deviation.tolist(), float(deviation.mean())


def kinds_of(state):
    """How many labels the model of a checkpoint knows: not the size of its bank of maps or sets, whose positions are what samples are labelled with."""
    given, kind = state.get("conditions") or {}, state.get("condition", "label")
    return given.get({"set": "vector_dim", "patch": "layout_channels"}.get(kind, "num_labels")) or state["num_labels"]


def sample_labels(cfg, state, indices, seed):
    """Label of each sample, int64 [B], or None for an unconditional model: a function of (seed, index)."""
    K = state["num_labels"]
    if not K:
        return None
    if cfg.labels == ["marginal"] and state["marginal"] is None:
        raise UserError(f"{state['file']}: its training is not finished, so how common its labels are is not known yet; use labels=uniform or ids")
    if cfg.labels in (["marginal"], ["uniform"]):
        p = state["marginal"].double() if cfg.labels == ["marginal"] else torch.full((K,), 1 / K, dtype=torch.float64)
        u, _ = draw(seed, "sample label", indices, (0,), 1)
        return torch.searchsorted(p.cumsum(0), u[:, 0].double() * p.sum(), right=True).clamp(max=K - 1)      # right: never a label that has no mass
    try:
        ids = [int(v) for v in cfg.labels]
    except ValueError:
        raise UserError(f"labels={','.join(cfg.labels)}: must be marginal, uniform, or label ids") from None
    if not ids or min(ids) < 0 or max(ids) > K:
        raise UserError(f"labels={','.join(cfg.labels)}: ids must be in 0 ... {K - 1} ({K} is the null label)")
    return torch.tensor([ids[i % len(ids)] for i in indices])


def generate(run, cfg, models, state, n, *, w, solver=None, steps=None, tol=None, seed=None, context=None, what="sampling", seen=None):
    """n samples, the share of this process: (indices, uint8 [b, C, H, W], labels or None, report). Sample i is a function of (seed, i).

    A dict `seen` is filled with the activations features= at the evaluations features_at=, {(name, evaluation, t): [arrays]}; of guided ones, the conditional.
    """
    seed = cfg.seed if seed is None else seed
    mine = run.share(n)
    velocity = Field(models[0], PATHS[state["path"]], state["predict"], w, cfg.interval, models[1], context)
    images, labels, evaluations, tick = [], [], 0, time.time()
    net = getattr(models[0], "net", models[0])
    names = [] if seen is None else matching(net, cfg.features)
    with bar(run, n, what) as progress, tapped(net, names) if names else nullcontext() as got:
        shape = (state["channels"], state["size"], state["size"])
        noise = lambda part: (part, draw(seed, "sample noise", part, shape))
        for part, z in ahead(noise, (mine[i:i + cfg.batch] for i in range(0, len(mine), cfg.batch))):
            count = itertools.count()

            def watch(t):
                if (number := next(count)) in cfg.features_at:
                    for name in names:                    # the conditional half comes first
                        seen.setdefault((name, number, float(t[0])), []).append(pooled(got[name][:len(t)], cfg.features_pool).cpu().numpy())
            velocity.watch = watch if names else None
            label = sample_labels(cfg, state, part, seed)
            x, calls = integrate(velocity, z.to(run.device), None if label is None else label.to(run.device), solver or cfg.solver, steps or cfg.steps, tol or cfg.tol)
            if not torch.isfinite(x).all():
                raise UserError(f"{state.get('file', 'the model')}: samples are not finite; is it a healthy model? (precision=fp32 may help)")
            images.append(to_uint8(decode(run.vae, x)).cpu().numpy())
            labels.append(label)
            evaluations += int(calls.sum())
            progress.update(len(part) * run.world)
    seconds = time.time() - tick
    shape = (0, 3, *[state["size"] if run.vae is None else run.data.size] * 2)
    images = np.concatenate(images) if images else np.zeros(shape, np.uint8)
    labels = torch.cat(labels).numpy() if state["num_labels"] and len(mine) else None
    counts = torch.tensor([evaluations, velocity.images], dtype=torch.float64)
    if run.world > 1:
        dist.all_reduce(counts)
    return mine, images, labels, dict(nfe=float(counts[0]) / n, network_calls=float(counts[1]) / n, seconds_per_image=seconds / max(len(mine), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: features of an evaluator, then distances between sets of features

class Judge(nn.Module):
    """A small CNN trained on the run's own classes; its last hidden layer measures sets for which ImageNet features mean nothing."""

    def __init__(self, classes):
        super().__init__()
        conv = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU())
        self.body = nn.Sequential(conv(3, 32, 2), conv(32, 64, 1), conv(64, 64, 2), conv(64, 128, 1), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                  nn.Linear(2048, 64), nn.SiLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):                                 # uint8 [B, 3, H, W] -> features [B, 64]
        return self.body(x.float() / 127.5 - 1)


def train_judge(run, epochs=2, batch=128):
    """The judge of this run, from judge.pt in the run folder or trained now (rank 0) on data/train with its ground-truth classes."""
    path, data = run.dir / "samples" / ".judge.pt", load_data(run, "train")
    known = np.flatnonzero(np.asarray(data.classes) >= 0)
    if len(known) < batch:
        raise UserError(f"evaluator=judge needs classes, and this data has {len(known)} labelled images; use evaluator=pixels, inception, or a TorchScript file")
    with seeded(0, "judge"):
        net = Judge(int(np.max(data.classes)) + 1)
    if run.rank == 0 and (not path.exists() or torch.load(path, map_location="cpu", weights_only=True)["data"] != data.info["fingerprint"]):
        net, test = net.to(run.device).train(), load_data(run, "test")
        counts = np.bincount(data.classes[known], minlength=len(net.head.bias))
        weight = torch.tensor(len(known) / counts.clip(1) / (counts > 0).sum(), dtype=torch.float32, device=run.device)
        weight = weight if run.data.imbalance > 1 else None         # without weights, rare classes would not be seen
        opt, steps, per_epoch = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05), epochs * len(known) // batch, len(known) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, max(steps, 2))
        with bar(run, steps, "training the judge", "step") as progress:
            for step in range(steps):
                if step % per_epoch == 0:
                    order = np.random.default_rng(seed_of(0, "judge order", step)).permutation(known)
                rows = np.sort(order[step % per_epoch * batch:][:batch])
                x, y = torch.tensor(data.images[rows]).to(run.device), torch.tensor(data.classes[rows]).to(run.device)
                loss = F.cross_entropy(net.head(net(x)), y, weight)
                opt.zero_grad()
                loss.backward()
                opt.step()
                schedule.step()
                progress.update(1)
        net.eval()
        with torch.no_grad():
            guess = lambda i: net.head(net(torch.tensor(test.images[i:i + 500]).to(run.device))).argmax(1).cpu().numpy()
            right = [guess(i) == test.classes[i:i + 500] for i in range(0, len(test), 500)]
        with atomic(path) as f:
            torch.save(dict(net=net.state_dict(), data=data.info["fingerprint"], test_accuracy=float(np.concatenate(right).mean())), f)
    run.wait()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(saved["net"])
    return net.to(run.device).eval(), f"judge {weights_hash(saved['net'])[:6]} (small CNN on this run's classes, test accuracy {saved['test_accuracy']:.3f})"


def pixel_components(images, side=16, count=64):
    """The principal components of training images uint8 [N, 3, H, W], averaged to side x side: a function uint8 [B, 3, H, W] -> float32 [B, count].

    An evaluator that no class and no other program has shaped: it sees colours and the layout of what is large, and nothing of what is fine.
    """
    small = lambda x: F.adaptive_avg_pool2d(x.float() / 127.5 - 1, min(side, x.shape[-1])).flatten(1)            # [B, 3 side^2]
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), 10_000)).astype(int))
    x = torch.cat([small(torch.from_numpy(np.ascontiguousarray(images[r]))) for r in np.array_split(rows, math.ceil(len(rows) / 500))]).double()
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T @ (x - mean))[1].flip(1)[:, :count]    # [3 side^2, count], greatest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()      # the same signs on every process
    mean, axes = mean.float(), axes.float()
    return lambda x: (small(x) - mean.to(x.device)) @ axes.to(x.device)


def inception_resize(x):
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in 0 ... 255: clean-fid's clean resizing (Pillow's antialiased bicubic, not rounded) to about 0.01 grey levels, on x's device."""
    return F.interpolate(x.float(), (299, 299), mode="bicubic", antialias=True).clamp(0, 255)


def open_evaluator(run, name):
    """(uint8 [B, 3, H, W] -> features float32 [B, D], description, name of the distance)."""
    if name == "judge":
        net, text = train_judge(run)
        return net, text, "frechet"
    if name == "pixels":
        data = load_data(run, "train")
        return pixel_components(data.images), f"pixels (64 principal components of training images {data.info['fingerprint'][:6]})", "frechet"
    if name == "inception":
        from configs.data import torchvision_datasets
        torchvision_datasets()                            # clean-fid imports torchvision: make sure that this works beside a CPU-only torch
        from cleanfid.inception_torchscript import InceptionV3W
        folder = Path(os.environ.get("INCEPTION_DIR", Path.home() / ".cache" / "clean-fid"))
        folder.mkdir(parents=True, exist_ok=True)
        for mine in run.turns():
            if mine:
                try:
                    net = InceptionV3W(str(folder), download=True).to(run.device).eval()
                except (OSError, RuntimeError) as e:
                    raise UserError(f"evaluator=inception: no weights in {folder} and they could not be downloaded ({str(e).splitlines()[0]}); "
                                    "put inception-2015-12-05.pt there (or set INCEPTION_DIR), or use another evaluator") from None
        return lambda x: net(inception_resize(x)), "clean-fid Inception, clean resizing by PyTorch", "fid"
    try:
        net = torch.jit.load(name, map_location=run.device).eval()
    except (RuntimeError, ValueError, OSError):
        raise UserError(f"evaluator={name}: must be judge, pixels, inception, or a readable TorchScript file") from None
    return net, f"TorchScript {Path(name).name} {digest(np.fromfile(name, np.uint8))[:6]}", "frechet"


@torch.no_grad()
def features_of(run, evaluator, images, rows, what):
    """Yield evaluator features of uint8 images[rows], 100 at a time, float32 [n, D]. The next images are read meanwhile."""
    with bar(run, len(rows) * run.world, what) as progress:
        feed = ahead if isinstance(images, np.ndarray) else map                   # what has to be decoded first does so on the GPU, which is busy
        for x in feed(lambda i: torch.from_numpy(np.ascontiguousarray(images[rows[i:i + 100]])), range(0, len(rows), 100)):
            out = evaluator(x.to(run.device)).float().cpu()
            if not torch.isfinite(out).all():
                raise UserError(f"{what}: the evaluator returned non-finite features")
            yield out
            progress.update(len(out) * run.world)


def chunks_of(x, device="cpu", size=20_000):
    """Rows of features [N, D], a tensor or a memory-mapped array, in chunks, float64 on the device."""
    for i in range(0, len(x), size):
        part = x[i:i + size]
        yield (torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part).to(device).double()


def moments(x, device="cpu"):
    """Mean [D] and covariance [D, D] of features [N, D], float64; memory does not grow with N."""
    mean = sum(c.sum(0) for c in chunks_of(x, device)) / len(x)
    return mean.cpu(), (sum((c - mean).T @ (c - mean) for c in chunks_of(x, device)) / (len(x) - 1)).cpu()


def frechet(a, b):
    """Frechet distance between Gaussians fitted to features a [N, D], b [M, D], or given as their moments: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64."""
    (m1, c1), (m2, c2) = [x if isinstance(x, tuple) else moments(x) for x in (a, b)]
    e, u = torch.linalg.eigh(c1)
    root = (u * e.clamp(min=0).sqrt()) @ u.T              # symmetric square root of C1
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross)


def kernel_distance(a, b, limit=5000):
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (arXiv 1801.01401), on at most `limit` rows of each."""
    a, b = a[:limit].double(), b[:limit].double()
    k = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    off = lambda m: (m.sum() - m.trace()) / (len(m) * (len(m) - 1))
    return float(off(k(a, a)) + off(k(b, b)) - 2 * k(a, b).mean())


def manifold(fake, real, k=5, limit=10_000):
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) by k-nearest-neighbour balls."""
    fake, real = (fake[:limit].double(), real[:limit].double())                  # float64: the fast formula for distances cancels
    k = min(k, len(fake) - 1, len(real) - 1)
    radius = lambda x: torch.cat([torch.cdist(c, x).kthvalue(k + 1, 1).values for c in x.split(1000)])           # the nearest is the point itself
    r_real, r_fake = radius(real), radius(fake)
    d = torch.cat([torch.cdist(c, real) for c in fake.split(1000)])                                              # [fake, real]
    return dict(precision=float((d < r_real).any(1).float().mean()), recall=float((d < r_fake[:, None]).any(0).float().mean()),
                density=float((d < r_real).sum(1).float().mean() / k), coverage=float((d.min(0).values < r_real).float().mean()))


def nearest(x, train, device="cpu"):
    """Distance of each row of x to its nearest row of train, [N]; train may be a memory-mapped array."""
    x, best = x.to(device).double(), torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
    for part in chunks_of(train, device):                 # float64, since the fast formula for distances cancels
        best = torch.minimum(best, torch.cat([torch.cdist(c, part).amin(1) for c in x.split(500)]))
    return best.float().cpu()


class Decoded:
    """Images as the autoencoder gives them back, uint8, decoded when they are looked at."""

    def __init__(self, run, inputs, rows):
        self.run, self.inputs, self.rows = run, inputs, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return to_uint8(decode(self.run.vae, as_input(torch.from_numpy(self.inputs[self.rows[i]])).to(self.run.device))).cpu().numpy()


class Evaluation:
    """Real images seen by one evaluator; scores sets of samples against them. The first process holds the features and compares, all get the numbers."""

    def __init__(self, run, cfg):
        self.run, self.cfg = run, cfg
        self.net, self.text, self.kind = open_evaluator(run, cfg.evaluator)
        self.groups = head_and_tail(load_data(run, "train").classes) if cfg.evaluator == "judge" and run.data.imbalance > 1 else {}
        self.sets, self.known, some, self.decoded = {}, {}, {}, None
        for split in ("train", "test"):
            data = load_data(run, split)
            order = np.random.default_rng(seed_of(0, f"reference {split}")).permutation(len(data))[:10_000]        # some scores look at so many rows only
            self.sets[split] = self.cached(data.images, f"evaluator on {split} images", data.info["fingerprint"])
            some[split] = torch.from_numpy(self.sets[split][order]) if run.rank == 0 else None
        self.real, self.some = self.sets[cfg.reference], some[cfg.reference]
        if run.vae is not None:                           # what the autoencoder alone costs: up to 10,000 reference images there and back, against all of them
            data = load_data(run, cfg.reference)
            order = np.random.default_rng(seed_of(0, "decoded")).permutation(len(data))[:10_000]
            features = self.cached(Decoded(run, data.inputs, np.sort(order)), "evaluator on decoded images", data.info["fingerprint"], run.data.latents)
            if run.rank == 0:
                self.decoded = frechet(moments(features, run.device), self.reference())
                run.say(f"{self.kind} of decoded {cfg.reference} images against the images themselves: {self.decoded:.3f}")
        if run.rank == 0:
            self.to_train = nearest(some["test"][:2000], self.sets["train"], run.device)

    def cached(self, images, what, *key):
        """Evaluator features [N, D] of images as a memory map, computed once, by all processes, and kept in the run folder; None beside the first process."""
        run, file = self.run, self.run.dir / "samples" / ".reference" / f"{digest(self.cfg.evaluator, self.text, *key)}.npy"
        if not run.agreed(file.exists):
            rows, aside = run.share(len(images)), file.with_name(f".{file.name}.tmp")
            width = next(features_of(run, self.net, images, np.arange(1), what)).shape[1]
            if run.rank == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                create_rows(aside, np.float32, (len(images), width))
            run.wait()
            at = rows[0] if len(rows) else 0
            for out in features_of(run, self.net, images, rows, what):
                write_rows(aside, at, out.numpy())
                at += len(out)
            run.wait()
            if run.rank == 0:
                os.replace(aside, file)
        return np.load(file, mmap_mode="r", allow_pickle=False) if run.rank == 0 else None

    def reference(self, unreported=False):
        """Moments of the reference, or of the real images that the report does not use; computed when first asked for."""
        split = self.cfg.reference if not unreported else "train" if self.cfg.reference == "test" else "test"
        if split not in self.known:
            self.known[split] = moments(self.sets[split], self.run.device)
        return self.known[split]

    def of_samples(self, images):
        """Features of the samples of all ranks, each of which passes its own, on the first process; None elsewhere."""
        run, out = self.run, list(features_of(self.run, self.net, images, np.arange(len(images)), "evaluator on samples"))
        every = [None] * run.world if run.rank == 0 else None
        if run.world > 1:
            dist.gather_object(out, every)
        return torch.cat([part for parts in every for part in parts] if run.world > 1 else out) if run.rank == 0 else None

    def distance(self, images, unreported=False):
        """Frechet distance alone (every rank passes its own samples), to the reference or to the real images that the report does not use."""
        fake = self.of_samples(images)
        return self.run.agreed(lambda: frechet(moments(fake, self.run.device), self.reference(unreported)))

    def scores(self, images):
        """All scores of a set of samples, with what they were measured with."""
        fake = self.of_samples(images)
        return self.run.agreed(lambda: self.compare(fake))

    def compare(self, fake):
        """Scores of evaluator features [n, D]."""
        close, ours, theirs = nearest(fake[:2000], self.sets["train"], self.run.device), fake.to(self.run.device), self.some.to(self.run.device)
        return self.apart(fake) | {self.kind: frechet(moments(fake, self.run.device), self.reference()), "kernel": kernel_distance(ours, theirs),
                **manifold(ours, theirs, self.cfg.neighbours),
                "memorisation": float(close.median() / self.to_train.median()),
                "copies": float((close < self.to_train.quantile(0.01)).float().mean()),
                **({} if self.decoded is None else {"decoded": self.decoded}),
                "evaluator": self.text, "reference": f"{self.cfg.reference}, {len(self.real):,} images", "samples": len(fake)}

    @torch.no_grad()
    def apart(self, fake):
        """Of long-tailed data, {head, tail: the distance between samples and real images of these classes, and how many there are of each}.

        The judge says which class a sample and a real image are of, so that its errors fall on both sides alike. No distance with too few of either
        for a covariance: as many as features.
        """
        guess = lambda x: self.net.head(x.to(self.run.device)).argmax(1).cpu()
        out, every = {}, torch.from_numpy(np.array(self.real)) if self.groups else None
        ours, real = (guess(fake), guess(every)) if self.groups else (None, None)
        for name, classes in self.groups.items():
            a, b = (x[torch.isin(c, torch.tensor(classes))] for x, c in ((fake, ours), (every, real)))
            enough = min(len(a), len(b)) > fake.shape[1]
            out[name] = dict(classes=classes, samples=len(a), reference=len(b), share=len(a) / len(fake), reference_share=len(b) / len(every))
            out[name] |= {self.kind: frechet(a, b)} if enough else {}
        return out


def head_and_tail(classes):
    """The third of the classes with the most training images, and that with the fewest: {head, tail: class ids}."""
    counts = np.bincount(classes[classes >= 0])
    order, n = np.argsort(-counts, kind="stable").tolist(), max(1, len(counts) // 3)
    return dict(head=order[:n], tail=order[-n:])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tables

def plot(path, curves, title, x_label, y_label, log_x=False, log_y=False, size=(760, 480)):
    """Line chart as PNG with Pillow. curves: {name: [(x, y), ...]}."""
    w, h, left, right, top, low = *size, 70, 20, 40, 50
    colours = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f"]
    fx, fy = (math.log10 if log_x else float), (math.log10 if log_y else float)
    xs, ys = [fx(x) for c in curves.values() for x, _ in c], [fy(y) for c in curves.values() for _, y in c]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    place = lambda x, y: (left + (fx(x) - x0) / (x1 - x0) * (w - left - right), h - low - (fy(y) - y0) / (y1 - y0) * (h - top - low))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(6):
        gx, gy = x0 + i / 5 * (x1 - x0), y0 + i / 5 * (y1 - y0)
        vx, vy = 10 ** gx if log_x else gx, 10 ** gy if log_y else gy
        (px, _), (_, py) = place(vx, 10 ** y0 if log_y else y0), place(10 ** x0 if log_x else x0, vy)
        pen.line([(px, top), (px, h - low)], "#e6e6e6"), pen.line([(left, py), (w - right, py)], "#e6e6e6")
        pen.text((px - 10, h - low + 6), f"{vx:.3g}", "black"), pen.text((8, py - 6), f"{vy:.3g}", "black")
    pen.text((left, 12), title, "black"), pen.text((w // 2 - 40, h - 22), x_label, "black"), pen.text((8, 22), y_label, "black")
    for i, (name, curve) in enumerate(curves.items()):
        points, colour = [place(x, y) for x, y in sorted(curve)], colours[i % len(colours)]
        if len(points) > 1:
            pen.line(points, colour, 2)
        for px, py in points:
            pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        pen.text((w - right - 150, top + 6 + 14 * i), f"- {name}", colour)
    with atomic(path) as f:
        sheet.save(f, "PNG")


COLUMNS = {                                               # of the table: what it shows of metrics.json
    "K": lambda m: m.get("K", m["num_labels"]) or None,
    "NMI": lambda m: (m.get("label_scores") or {}).get("nmi"),
    "distance w=1": lambda m: m.get("scores_w1", m["scores"] if m["w"] == 1 else {}).get(kind_of(m)),
    "chosen w": lambda m: m["w"] if m["num_labels"] else None,
    "distance": lambda m: m["scores"][kind_of(m)],
    **{k: lambda m, k=k: m["scores"].get(k) for k in ("precision", "recall", "coverage", "memorisation")},
    **{k: lambda m, k=k: m["scores"].get(k, {}).get(kind_of(m)) for k in ("head", "tail")},
    "network calls": lambda m: m["network_calls"],
    "training images": lambda m: m["total_seen"],
}


def kind_of(m):
    """Name of the distance in a metrics.json."""
    return "fid" if "fid" in m["scores"] else "frechet"


def cell(v):
    """A number of the table as text."""
    if v is None:
        return "-"
    return f"{v:,.0f}" if abs(v) >= 100 or float(v).is_integer() else f"{v:.{3 if abs(v) < 2 else 2}f}"


def table(run):
    """Print every samples/*/metrics.json of the run side by side, and write samples/table.md and table.json."""
    found = {}
    for path in sorted((run.dir / "samples").glob("*/metrics.json")):
        m = read_json(path, "delete it")
        if "scores" in m and not m["recipe"]["sweep"]:    # a sweep is a picture, not a row
            found[path.parent.name] = m
    if not found:
        raise UserError(f"{run.dir / 'samples'}: no evaluated samples yet")
    text, evaluator = "", lambda m: m["scores"]["evaluator"].split()[0]
    for name in sorted({evaluator(m) for m in found.values()}):                  # distances of different evaluators do not compare
        some = {k: m for k, m in found.items() if evaluator(m) == name}
        order = sorted(some, key=lambda k: -some[k]["scores"][kind_of(some[k])])
        cells = [["samples", *COLUMNS], *([k, *(cell(show(some[k])) for show in COLUMNS.values())] for k in order)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        said = dict(distance={kind_of(m) for m in some.values()}, solver={f"{m['solver']} {m['steps']}" for m in some.values()}, weights={m["weights"] for m in some.values()})
        said |= {k: {str(m["scores"][k]) for m in some.values()} for k in ("evaluator", "reference", "samples")}
        text += "\n".join(lines) + "\n\n" + "; ".join(f"{k}: {', '.join(sorted(v))}" for k, v in said.items()) + "\n\n"
    with atomic(run.dir / "samples" / "table.md") as f:
        f.write(text.encode())
    write_json(run.dir / "samples" / "table.json", {k: {c: show(m) for c, show in COLUMNS.items()} for k, m in found.items()})
    run.say(text)


def read_layouts(run, cfg, state):
    """Put the layouts that `boxes`, `mask` or `layouts` ask for in place of the bank in `state`.

    In training a layout never stands without a label. Boxes without one take all labels, as often as in training; a mask those of the training masks in
    which the same object is the largest.
    """
    size, kind = state["size"], state.get("condition", "label")
    if cfg.boxes and kind != "box" or cfg.mask and kind != "mask" or cfg.layouts != "train" and kind not in ("box", "mask"):
        raise UserError(f"{state['file']} was trained with condition={kind}: boxes= needs box, mask= needs mask, layouts= either")
    K, bank, kinds = int(state["bank_labels"][-1]), state["bank_labels"][:-1].numpy(), state["map_labels"]
    if cfg.boxes:
        for b in cfg.boxes:
            if len(b) not in (4, 5) or not (0 <= b[0] < b[2] <= size and 0 <= b[1] < b[3] <= size) or len(b) == 5 and not 0 <= b[4] < K:
                raise UserError(f"boxes={b}: expected x0, y0, x1, y1 with 0 <= x0 < x1 <= {size}, 0 <= y0 < y1 <= {size}, "
                                f"and perhaps a label in 0 ... {K - 1}")
        if len({b[4] for b in cfg.boxes if len(b) == 5}) > 1:
            raise UserError(f"boxes={cfg.boxes}: an image has one label; name the same in every box, or in one")
        maps, named = draw_boxes(np.array([[b[:4] for b in cfg.boxes]]), size), [int(b[4]) for b in cfg.boxes if len(b) == 5]
        labels = named[:1] or bank
    elif cfg.mask:
        try:
            picture = Image.open(cfg.mask)
            ids = np.asarray(picture if picture.mode in ("L", "P") else picture.convert("L"))
        except OSError as e:
            raise UserError(f"mask={cfg.mask}: cannot be read ({e})") from None
        if ids.shape != (size, size) or ids.max() > kinds:
            raise UserError(f"mask={cfg.mask}: is {ids.shape[1]}x{ids.shape[0]} with values up to {ids.max()}; "
                            f"expected {size}x{size}, ids 0 ... {kinds - 1} as in the label file's masks (0 = no object), {kinds} = whatever")

        def largest(m):                                   # object of a mask; 0 = there is none
            return np.append(0.5, np.bincount(m[m < kinds].astype(int), minlength=2)[1:]).argmax()

        maps, alike = ids[None].astype(np.uint8), np.array([largest(m) == largest(ids) for m in state["maps"][:-1].numpy()])
        labels = bank[alike] if alike.any() else bank
    else:
        then = fill("train_guided", TrainGuided, state["config"]["train_guided"])
        arrays, info = load_labels(run, then.labels)
        if digest(arrays["train"]) != state["labels"]:
            raise UserError(f"layouts=test: labels/{then.labels}.npz is not what {state['file']} was trained with; train again, or use layouts=train")
        maps, _ = layout_maps(run, then, arrays, info, "test", kinds)
        labels = arrays["test"]
    share = np.full(len(labels), 1 / len(labels))
    if len(maps) == 1:                                    # one layout, once with each of its labels
        labels, share = np.unique(labels, return_counts=True)
        maps, share = maps.repeat(len(labels), 0), share / share.sum()
    null = np.full_like(maps[:1], kinds)
    state |= dict(maps=torch.from_numpy(np.concatenate([maps, null])), bank_labels=torch.tensor([*map(int, labels), K]), num_labels=len(maps),
                  marginal=torch.from_numpy(share))


def encode(run, cfg, models, state, context, folder):
    """Test images to noise and back: writes noise.npy and a picture, returns the round trip's error."""
    data = load_data(run, "test")
    n, velocity = min(cfg.n, len(data)), Field(models[0], PATHS[state["path"]], state["predict"], 0.0, cfg.interval, None, context)
    x = as_input(torch.from_numpy(np.array(data.inputs[:n])))
    label = torch.full((n,), state["num_labels"]) if state["num_labels"] else None     # the null label
    noise, back = [], []
    with bar(run, n, "encoding") as progress:
        for i in range(0, n, cfg.batch):
            part = None if label is None else label[i:i + cfg.batch].to(run.device)
            z, _ = integrate(velocity, x[i:i + cfg.batch].to(run.device), part, cfg.solver, cfg.steps, cfg.tol, reverse=True)
            noise.append(z.cpu()), back.append(integrate(velocity, z, part, cfg.solver, cfg.steps, cfg.tol)[0].cpu())
            progress.update(len(z))
    noise, back = torch.cat(noise), torch.cat(back)
    np.save(folder / "noise.npy", noise.numpy())
    if run.vae is None:
        save_grid(folder / "grid.png", to_uint8(torch.cat([x[:10], noise[:10] / 3, back[:10]])).numpy(), 10, ["image", "noise", "back"])
    else:                                                 # the noise is none of pixels
        x, back = (torch.cat([decode(run.vae, part.to(run.device)).cpu() for part in v.split(100)]) for v in (x, back))
        save_grid(folder / "grid.png", to_uint8(torch.cat([x[:10], back[:10]])).numpy(), 10, ["decoded", "back"])
    error = (back - x).square().mean()
    return dict(noise_mean=float(noise.mean()), noise_std=float(noise.std()), round_trip_psnr=float(10 * torch.log10(4 / error)), images=n)


def layout_sheet(path, run, cfg, models, state, w, context, rows=10, columns=9):
    """A picture: each row one layout of the bank, drawn on the left; each column one noise."""
    shape, n = (state["channels"], state["size"], state["size"]), min(rows, state["num_labels"])
    z = draw(cfg.seed, "sample noise", range(columns), shape).repeat(n, 1, 1, 1).to(run.device)
    label = torch.arange(n).repeat_interleave(columns).to(run.device)
    field = Field(models[0], PATHS[state["path"]], state["predict"], w, cfg.interval, models[1], context)
    x = torch.cat([integrate(field, *part, cfg.solver, cfg.steps, cfg.tol)[0] for part in zip(z.split(cfg.batch), label.split(cfg.batch))])
    images, kinds = to_uint8(decode(run.vae, x)).cpu().numpy(), state["map_labels"]
    zoom = images.shape[2] // state["maps"].shape[1]
    colours = np.concatenate([np.random.default_rng(3).integers(60, 256, (kinds, 3)), np.zeros((1, 3), int)]).astype(np.uint8)   # black where nothing is asked for
    maps = colours[state["maps"][:n].long().numpy().repeat(zoom, 1).repeat(zoom, 2)].transpose(0, 3, 1, 2)                         # [n, 3, H, W]
    cells = [v for i in range(n) for v in (maps[i], *images[i * columns:(i + 1) * columns])]
    save_grid(path, np.stack(cells), columns + 1, head=f"{cfg.name}: w = {w:g}; rows: one layout, columns: one noise")


def write_share(run, file, n, rows, values):
    """One array of n rows as a .npy, of which every process writes its `rows`."""
    if run.rank == 0:
        create_rows(file, values.dtype, (n, *values.shape[1:]))
    run.wait()
    write_rows(file, rows[0], values)
    run.wait()


def save_features(run, cfg, state, folder, rows, seen):
    """Activations seen while sampling as features-<activation>-at<evaluation>.npy, row i is sample i; what they are, for metrics.json."""
    about = []
    for name, number, t in run.agreed(lambda: list(seen)):
        values, file = np.concatenate(seen[name, number, t]), folder / f"features-{name}-at{number}.npy"
        write_share(run, file, cfg.n, rows, values.astype(np.float32))
        about.append(dict(file=file.name, activation=name, evaluation=number, **noise_level(state["path"], t), pool=cfg.features_pool,
                          shape=list(values.shape[1:])))
    return about


def choose_w(run, cfg, models, state, context, judge, folder):
    """(best of the candidate w, what was measured): on samples of another seed, against the real images that the report does not use; draws guidance.png."""
    curve = []
    for w in cfg.guidance:
        _, images, _, _ = generate(run, cfg, models, state, cfg.select, w=w, seed=cfg.seed + 1, context=context, what=f"w = {w:g}")
        curve.append((w, judge.distance(images, unreported=True)))
        run.say(f"  w = {w:<5g} {judge.kind} {curve[-1][1]:.3f} on {cfg.select:,} samples of seed {cfg.seed + 1}")
    if run.rank == 0:
        plot(folder / "guidance.png", {cfg.checkpoint: curve}, f"{judge.kind} against w, {cfg.select:,} samples", "w", judge.kind)
    return min(curve, key=lambda p: p[1])[0], dict(seed=cfg.seed + 1, samples=cfg.select, curve=curve)


def nfe_sweep(run, cfg, every, w, context, judge, folder):
    """Distance against network evaluations for each solver, and the straightness of the paths; draws nfe.png and straightness.png.

    every: {checkpoint: ((network, weaker network or None), state)}; w is used for models with labels.
    """
    curves, bends, means = {}, {}, {}
    for checkpoint, (models, state) in every.items():
        w_here, prefix = w if state["num_labels"] or models[1] else 1.0, f"{checkpoint} " if len(every) > 1 else ""
        for solver in cfg.sweep_solvers:
            settings = [(s, cfg.tol) for s in cfg.sweep_steps] if solver != "dopri5" else [(1, tol) for tol in (1e-1, 3e-2, 1e-2, 1e-3)]
            for steps, tol in settings:
                if solver != "dopri5" and steps * len(TABLEAUS.get(solver, [[0]])[0]) > 64:
                    continue
                _, images, _, report = generate(run, cfg, models, state, cfg.select, w=w_here, solver=solver, steps=steps, tol=tol, seed=cfg.seed + 1,
                                                context=context, what=f"{solver} {steps}")
                curves.setdefault(prefix + solver, []).append((report["nfe"], judge.distance(images)))
                run.say(f"  {prefix}{solver:9} NFE {report['nfe']:6.1f}  {judge.kind} {curves[prefix + solver][-1][1]:.3f}")
        rows = np.arange(min(64, cfg.select))
        z = draw(cfg.seed + 1, "sample noise", rows, (state["channels"], state["size"], state["size"])).to(run.device)
        label = sample_labels(cfg, state, rows, cfg.seed + 1)
        velocity = Field(models[0], PATHS[state["path"]], state["predict"], w_here, cfg.interval, models[1], context)
        parts = [straightness(velocity, z[i:i + cfg.batch], None if label is None else label[i:i + cfg.batch].to(run.device)) for i in range(0, len(z), cfg.batch)]
        times, share = parts[0][0], [len(part) for part in z.split(cfg.batch)]
        deviation, means[checkpoint] = (np.average([part[i] for part in parts], 0, share).tolist() for i in (1, 2))
        bends[f"{checkpoint} ({state['path']})"] = list(zip(times, deviation))
        run.say(f"  {checkpoint}: paths deviate from straight lines by {means[checkpoint]:.3f} (0 = straight), mean over t and {len(rows)} images")
    if run.rank == 0:
        plot(folder / "nfe.png", curves, f"{judge.kind} against network evaluations ({', '.join(every)}; {cfg.select:,} samples)", "evaluations (NFE)",
             judge.kind, log_x=True, log_y=True)
        plot(folder / "straightness.png", bends, "deviation of the path's velocity from the straight line, by time", "t", "deviation")
    return dict(seed=cfg.seed + 1, samples=cfg.select, curves=curves, straightness=means, deviation=bends)


def plan(run, cfg, net, state, folder):
    """What sampling would do, for --dry-run."""
    example = torch.zeros(1, state["channels"], state["size"], state["size"], device="meta")
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).to("meta")(example, torch.zeros(1, device="meta"))
    size = run.data.size if run.data.latents else state["size"]
    run.say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {counter.get_total_flops() / 1e9:,.1f} GFLOP a forward pass of one image")
    run.say(f"{cfg.n:,} samples from {state['file']} into {folder}: {cfg.n * 3 * size ** 2 / 1e6:,.0f} MB")


def sample_sheet(folder, run, cfg, models, state, w, context):
    """Write grid.png of a folder of samples: a row for each label or layout."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    if state.get("map_labels"):
        layout_sheet(folder / "grid.png", run, cfg, models, state, w, context)
    elif state["num_labels"]:
        labels = np.load(folder / "labels.npy")
        keep = [k for k in np.unique(labels)[:20] if (labels == k).sum() >= 10]
        order = [i for k in keep for i in np.flatnonzero(labels == k)[:10]] or list(range(min(100, cfg.n)))
        save_grid(folder / "grid.png", images[order], 10, [str(k) for k in keep] or None, head=f"{cfg.name}: w = {w:g}, one row per label")
    else:
        save_grid(folder / "grid.png", images[:100], 10, head=cfg.name)


def main():
    """Sample, from the command line."""
    run = start("sample_ode", SampleOde, __doc__, flags={"--table": "all results of the run side by side"})
    cfg = run.cfg
    if "--table" in run.flags:
        return table(run)
    require(cfg.n >= max(2, run.world) and min(cfg.steps, cfg.batch, cfg.neighbours) >= 1 and cfg.tol > 0 and cfg.guidance, cfg,
            "n steps batch neighbours tol guidance", "n must be at least 2, and one for every process, the others positive")
    require(len(cfg.interval) == 2 and cfg.interval[0] <= cfg.interval[1], cfg, "interval", "two times in order")
    require(cfg.select >= 2 and (cfg.evaluate or not cfg.sweep and len(cfg.guidance) == 1), cfg, "sweep guidance select evaluate",
            "sweeps and a choice of w need evaluate=true and at least two samples")
    net, state = load_model(run, cfg.checkpoint, cfg.weights)
    weak, other = load_model(run, cfg.autoguide, cfg.weights) if cfg.autoguide else (None, None)
    if other and any(other[k] != state[k] for k in ("path", "predict", "size")):
        raise UserError(f"autoguide={cfg.autoguide}: its path, prediction or size differs from that of {cfg.checkpoint}")
    if other and other["num_labels"] and any(other.get(k) != state.get(k) for k in ("num_labels", "labels", "layout", "label_digest", "condition")):
        raise UserError(f"autoguide={cfg.autoguide}: was trained with other labels than {cfg.checkpoint}")
    context, _, why = autocast(run, cfg.precision)
    if not run.dry_run:
        open_autoencoder(run)
    if not (state.get("null", True) or cfg.autoguide or cfg.guidance == [1.0]) and state["num_labels"]:
        raise UserError(f"guidance={cfg.guidance}: {state['file']} has no null label to guide with; use guidance=1, or autoguide= an unconditional model")
    if not state["num_labels"] and not cfg.autoguide:
        cfg.guidance = [1.0]                              # nothing to guide with
    if cfg.boxes or cfg.mask or cfg.layouts != "train":
        read_layouts(run, cfg, state)
    if other and other["num_labels"]:                     # both networks are shown the same
        other |= {k: state[k] for k in ("maps", "bank_labels", "sets", "num_labels", "marginal") if k in state}
    if cfg.features:
        matching(net, cfg.features)
        last = cfg.steps * len(TABLEAUS.get(cfg.solver, [[0]])[0]) - 1
        require(cfg.solver != "dopri5" and cfg.features_at and all(0 <= i <= last for i in cfg.features_at) and cfg.direction == "generate", cfg,
                "solver direction features_at", f"activations are kept at evaluations 0 to {last} of a fixed-step solver, while generating")
        require(cfg.features_pool in ("mean", "none") or cfg.features_pool.isdecimal() and int(cfg.features_pool), cfg, "features_pool",
                "must be mean, none or a number")
        require(not cfg.compile, cfg, "features compile", "activations are read from the network as it is: compile=false")
    ready = lambda net, state: conditioned(torch.compile(net) if cfg.compile else net, state)
    models = ready(net, state), ready(weak, other) if weak else None
    sample_labels(cfg, state, [0], cfg.seed)              # complain about labels before the work
    folder, aside = run.dir / "samples" / cfg.name, run.dir / "samples" / f".{cfg.name}.tmp"
    recipe = {k: v for k, v in run.sections[run.stage].items() if k not in ("overwrite", "batch") and (cfg.features or not k.startswith("features"))}
    recipe |= dict(hash=state["weights"], guidance=cfg.guidance, weak=other["weights"] if other else None)
    recipe |= dict(bank=digest(state["maps"].numpy())) if cfg.mask or cfg.layouts != "train" else {}
    recipe |= dict(others=[load_checkpoint(run, name)["weights"] for name in cfg.against]) if cfg.against and not run.dry_run else {}
    if run.dry_run:
        return plan(run, cfg, net, state, folder)
    if run.agreed(lambda: finished(run, folder / "metrics.json", recipe)):
        return
    if run.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    run.wait()
    run.say(f"sampling from {state['file']} ({state['kind']}, {state['seen']:,} images seen, {cfg.weights} weights); {why}")
    metrics = dict(recipe=recipe, checkpoint=cfg.checkpoint, weights=cfg.weights, hash=state["weights"], seen=state["seen"], num_labels=state["num_labels"],
                   total_seen=state["seen"] + (state.get("init") or {}).get("seen", 0),      # with the training that the initial weights come from
                   K=kinds_of(state), label_file=state.get("label_file"), label_scores=state.get("label_scores"),
                   solver=cfg.solver, steps=cfg.steps, seed=cfg.seed, world=run.world)
    judge = Evaluation(run, cfg) if cfg.evaluate and cfg.direction == "generate" else None

    if cfg.direction == "encode":
        if run.rank == 0:
            metrics |= encode(run, cfg, models, state, context, aside)
            run.say(f"noise of {metrics['images']} test images: mean {metrics['noise_mean']:.3f}, std {metrics['noise_std']:.3f}; "
                    f"round trip {metrics['round_trip_psnr']:.1f} dB")
    else:
        w = cfg.guidance[0]
        if len(cfg.guidance) > 1 or cfg.sweep == "guidance":
            w, metrics["selection"] = choose_w(run, cfg, models, state, context, judge, aside)
        if cfg.sweep == "nfe":
            others = {name: load_model(run, name, cfg.weights) for name in cfg.against}
            every = {cfg.checkpoint: (models, state)} | {name: ((ready(*pair), None), pair[1]) for name, pair in others.items()}
            metrics["nfe_sweep"] = nfe_sweep(run, cfg, every, w, context, judge, aside)

        # the samples that are reported
        seen = {} if cfg.features else None
        rows, images, labels, report = generate(run, cfg, models, state, cfg.n, w=w, context=context, seen=seen)
        metrics |= dict(w=w) | report
        if cfg.features:
            metrics["features"] = save_features(run, cfg, state, aside, rows, seen)
        write_share(run, aside / "images.npy", cfg.n, rows, images)
        if state["num_labels"]:
            write_share(run, aside / "labels.npy", cfg.n, rows, labels)
        if judge:
            metrics["scores"] = judge.scores(images)
            if w != 1 and len(cfg.guidance) > 1:          # the gain of guidance apart from that of labels: the same at w = 1
                metrics["scores_w1"] = judge.scores(generate(run, cfg, models, state, cfg.n, w=1.0, context=context, what="w = 1")[1])
        if run.rank == 0:
            sample_sheet(aside, run, cfg, models, state, w, context)

    # close: the finished folder replaces the previous one at once
    if run.rank == 0:
        write_json(aside / "metrics.json", metrics)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    run.wait()
    if "scores" in metrics:
        s = metrics["scores"]
        run.say(f"{judge.kind} {s[judge.kind]:.3f}  " + "  ".join(f"{k} {s[k]:.3f}" for k in ("kernel", "precision", "recall", "coverage", "memorisation")) +
                f" (1 = typically as far from the training images as test images are)  copies {s['copies']:.1%}  w {metrics['w']:g}  NFE {metrics['nfe']:.1f}  "
                f"network calls {metrics['network_calls']:.1f}  {metrics['seconds_per_image'] * 1000:.1f} ms/image; {s['evaluator']}; reference {s['reference']}")
    run.say(f"samples in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


if __name__ == "__main__":
    cli(main)

"""Sample: a model in, images along the ODE out, and how good they are.

Reads   {diffusion,guided}/<name>/checkpoint.pt; for scores also data/{train,test}
Writes  samples/<name>/: images.npy uint8 [n, 3, H, W], labels.npy, grid.png, metrics.json; guidance.png where w was
        chosen; with sweep=nfe nfe.png and straightness.png
Time    t = 0 is noise, t = 1 is data; sampling runs from 0 to 1, direction=encode from 1 to 0 and back.
Scale   v = v_null + w (v_cond - v_null): w = 0 unconditional, w = 1 conditional, w > 1 guided. Papers that write
        v_c + s (v_c - v_0) have s = w - 1.

    python sample_ode.py configs/shapes.yaml checkpoint=guided/kmeans name=kmeans-w guidance=1,1.5,2,3
    torchrun --nproc_per_node=8 sample_ode.py configs/cifar10.yaml checkpoint=guided/kmeans n=50k
    python sample_ode.py configs/shapes.yaml checkpoint=diffusion/base name=base-nfe sweep=nfe
    python sample_ode.py configs/shapes.yaml --table           # all results of the run side by side

Several w: the best on other samples, against other real images, than the report uses. Several processes: the same
images. The method is in `solve_fixed`, `solve_dopri5`, `Field` and `integrate`, then `generate`; evaluators,
distances and pictures behind them can be skipped.
"""
import itertools
import math
import os
import time
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from configs.data import as_input, decode, load_data, load_labels, open_autoencoder, row_shape, torchvision_datasets
from configs.run import (UserError, ahead, atomic, autocast, bar, cli, create_rows, digest, draw, finished, key,
                         making, read_json, reading, require, save_grid, seed_of, seeded, start, to_uint8,
                         weights_hash, write_json, write_rows)
from train_diffusion import PATHS, Condition, load_checkpoint, load_condition, load_model, say_network, to_x_and_z

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5", "ddim"]


@dataclass
class SampleOde:
    """Section `sample_ode`."""
    name: str = key("base", "results go to samples/<name>")
    checkpoint: str = key("diffusion/base", "a folder of the run, or a .pt file")
    weights: Literal["ema", "net"] = key("ema", "averaged or raw")
    n: int = key(10_000, "samples", low=2)
    solver: Solver = key("heun", "dopri5 adapts its steps to tol")
    steps: int = key(12, "of the fixed-step solvers", low=1)
    tol: float = key(1e-4, "dopri5: relative and absolute tolerance", above=0)
    guidance: list[float] = key([1.0], "w; several: the best on `select` other samples is taken")
    select: int = key(1_000, "samples per candidate w; from another seed than those of the report", low=2)
    interval: list[float] = key([0.0, 1.0], "guide only while t is inside; outside w = 1", count=2)
    autoguide: str = key("", "checkpoint of a weaker model: v = v_weak + w (v - v_weak), both with the label if they "
                             "know labels")
    labels: list[str] = key(["marginal"], "marginal (of the training labels), uniform over those that training images "
                                          "had, or ids (places in the bank, if any)")
    boxes: list[list[float]] = key([], "models with box conditions: draw this layout, [[x0, y0, x1, y1, label], ...] "
                                       "in pixels")
    mask: str = key("", "models with mask conditions: a PNG whose pixel values are the ids")
    layouts: Literal["train", "test"] = key("train", "models with box or mask conditions: layouts of the bank in the "
                                                     "checkpoint, or of the test images")
    direction: Literal["generate", "encode"] = key("generate", "encode: test images to noise and back")
    evaluate: bool = key(True, "compare with real images")
    evaluator: str = key("judge", "judge: small CNN on the run's classes; pixels: principal components of training "
                                  "images; inception: FID proper; or a TorchScript file, which runs as code")
    reference: Literal["train", "test"] = key("test", "real images to compare with")
    neighbours: int = key(5, "k of precision, recall, density, coverage", low=1)
    sweep: Literal["", "nfe", "guidance"] = key("", "draw the distance against network evaluations, or against w")
    against: list[str] = key([], "nfe sweep: further checkpoints to draw into the same figures")
    sweep_steps: list[int] = key([2, 3, 5, 8, 12, 20, 32], "of the nfe sweep, up to 64 evaluations; dopri5 varies its "
                                                           "tolerance instead", low=1)
    sweep_solvers: list[Solver] = key(["euler", "midpoint", "heun", "dopri5"], "of the nfe sweep")
    features: list[str] = key([], "also save these activations of the network, names and globs, while it samples")
    features_at: list[int] = key([0], "at these evaluations of a fixed-step solver, from 0", low=0)
    features_pool: str = key("mean", "mean, none, or a number g: average over a grid of g x g")
    batch: int = key(250, "images per network call and process", low=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network; the ODE state is float32 always")
    compile: bool = key(False, "torch.compile the network: a minute or so that pays where n is many batches")
    seed: int = key(0, "sample i is a function of (seed, i)")
    overwrite: bool = key(False, "replace samples that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Solvers of dy/ds = f(y, s) for a batch y [B, ...] and a number s

TABLEAUS = {                                              # Butcher tableaus: nodes c, matrix a, weights b
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "rk4": ([0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
FIFTH_ORDER = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
DOPRI5 = (                                                # Dormand and Prince 1980; the last stage is the step's end
    [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1],
    [[], [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
     [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
     [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656], FIFTH_ORDER],
    [*FIFTH_ORDER, 0])
DOPRI5_ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]     # 5th minus 4th order
BLOCK = 64                                                # consecutive samples that share the steps of dopri5


def mix(slopes, weights):
    """Weighted sum of stage slopes, skipping zeros."""
    return sum(w * k for w, k in zip(weights, slopes) if w)


def solve_fixed(f, y, grid, solver):
    """Explicit Runge-Kutta steps from y [B, ...] at grid[0] over the numbers in grid -> y at grid[-1]."""
    nodes, matrix, weights = TABLEAUS[solver]
    for s0, s1 in itertools.pairwise(grid):
        h, slopes = s1 - s0, []
        for node, row in zip(nodes, matrix):
            slopes.append(f(y + h * mix(slopes, row) if row else y, s0 + node * h))
        y = y + h * mix(slopes, weights)
    return y


def worst(e):
    """Root mean square of each row of e [B, ...]; the largest of them."""
    size = float(e.flatten(1).double().square().mean(1).sqrt().max())
    if not math.isfinite(size):
        raise UserError("solver=dopri5: the network returned a non-finite velocity")
    return size


def first_step(f, y, slope, s0, s1, tol):
    """A first step size: an Euler step tells how fast the slope changes (Hairer, Norsett and Wanner, section II.4)."""
    scale, sign = tol + tol * y.abs(), math.copysign(1, s1 - s0)
    d0, d1 = worst(y / scale), worst(slope / scale)
    h = min(1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1, abs(s1 - s0))
    d2 = worst((f(y + sign * h * slope, s0 + sign * h) - slope) / scale) / h
    d = max(d1, d2)
    return min(100 * h, max(1e-6, 1e-3 * h) if d <= 1e-15 else (0.01 / d) ** 0.2)


def solve_dopri5(f, y, s0, s1, tol, max_steps=10_000):
    """Adaptive Dormand-Prince 5(4) from s0 to s1, in either direction, with one step size for all rows of y [B, ...].

    atol = rtol = tol. The worst row decides about a step: in an average over rows, easy ones would hide the error of a
    hard one. Returns (y at s1, calls of f).
    """
    nodes, matrix, _ = DOPRI5
    slope, s, sign = f(y, s0), s0, math.copysign(1, s1 - s0)
    h, calls = first_step(f, y, slope, s0, s1, tol), 2
    for _ in range(max_steps):
        left = abs(s1 - s)
        step = h if h < (1 - 1e-9) * left else left       # reach the end where that is all but so
        if step < min(left, 1e-9 * abs(s1 - s0)):         # the last one may be tiny
            raise UserError(f"solver=dopri5: the step shrank to {step:.1e} at {s:.6f}; "
                            "raise tol, or use a fixed-step solver")
        slopes = [slope]
        for node, row in zip(nodes[1:], matrix[1:]):
            stage = y + sign * step * mix(slopes, row)
            slopes.append(f(stage, s + sign * node * step))
        calls += 6
        error = worst(sign * step * mix(slopes, DOPRI5_ERROR) / (tol + tol * torch.maximum(y.abs(), stage.abs())))
        factor = min(10, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        if error > 1:
            h = step * min(factor, 1)
            continue
        y, slope = stage, slopes[-1]                      # the last stage is the solution
        s, h = s + sign * step, step * max(factor, 1)
        if step == left:
            return y, calls
    raise UserError(f"solver=dopri5: more than {max_steps} steps; raise tol, or use a fixed-step solver")


# ---------------------------------------------------------------------------------------------------------------------
# The field: the network's velocity, guided

class Field:
    """Slope of the probability-flow ODE in the path's variables (y, s), with guidance; counts the images networks see.

    Guidance and autoguidance mix outputs of networks. Estimates of x and z are affine in them: velocities mix alike.
    """

    def __init__(self, net, path, predict, w=1.0, interval=(0.0, 1.0), weak=None, context=nullcontext, batch=10 ** 9,
                 condition=None, weak_condition=None):
        """predict: what networks predict (v, eps, x); weak: a weaker network, or None; batch: rows they see at once.

        condition, weak_condition: a `Condition`, or None where the network knows no labels.
        """
        self.net, self.path, self.predict, self.context = net, path, predict, context
        self.w, self.interval, self.weak = w, interval, weak
        self.condition, self.weak_condition = condition, weak_condition
        self.batch, self.images = batch, 0
        self.evaluations, self.watch = 0, None            # of the present integration; called after each of them

    def call(self, net, condition, x, t, ids):
        """One network's prediction; counted."""
        self.images += len(x)
        time = 1000 * torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        told = {} if condition is None or ids is None else condition(ids)
        with self.context():
            return net(x.float(), time, **told).to(x.dtype)

    def output(self, x, t, ids):
        """The prediction, guided. x: [B, C, H, W]; t: a number; ids: int64 [B], or None without labels."""
        low, high = self.interval
        inside = low - 1e-6 <= t <= high + 1e-6           # the ends count as inside, however they are rounded
        model = self.net, self.condition
        guided = inside and self.w != 1 and (self.weak is not None or ids is not None)
        if not guided:
            return self.call(*model, x, t, ids)
        if self.weak is not None:
            strong = self.call(*model, x, t, ids)
            return torch.lerp(self.call(self.weak, self.weak_condition, x, t, ids), strong, self.w)
        null = torch.full_like(ids, self.condition.null)
        if self.w == 0:
            return self.call(*model, x, t, null)
        both = self.call(*model, torch.cat([x, x]), t, torch.cat([ids, null]))   # conditional, unconditional
        cond, uncond = both.chunk(2)
        return torch.lerp(uncond, cond, self.w)

    def estimate(self, x, t, ids):
        """(x_hat, z_hat), guided."""
        parts = itertools.repeat(None) if ids is None else ids.split(self.batch)
        out = torch.cat([self.output(part, t, told) for part, told in zip(x.split(self.batch), parts)])
        if self.watch:                                    # somebody wants the activations of this evaluation
            self.watch(self.evaluations, t)
        self.evaluations += 1
        return to_x_and_z(self.path, self.predict, out, x, x.new_full((len(x),), t))

    def slope(self, y, s, ids):
        """dy/ds for states y [B, C, H, W] at the number s."""
        t = float(self.path.to_t(torch.tensor(s, dtype=torch.float64)))
        at = y.new_full((1, 1, 1, 1), t)
        x_hat, z_hat = self.estimate(y * self.path.scale(at), t, ids)
        return self.path.slope(x_hat, z_hat, at)


@torch.no_grad()
def integrate(field, x, ids, solver, steps, tol, reverse=False):
    """Move images from noise (t = 0) to data (t = 1), or back. x: float32 [B, C, H, W] -> (the same, evaluations)."""
    path, field.evaluations = field.path, 0
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid = grid.flip(0) if reverse else grid
    if solver == "ddim":                                  # the formula itself; on VP the same as an Euler step in rho
        for t, s in itertools.pairwise(grid):
            x_hat, z_hat = field.estimate(x, float(t), ids)
            x = float(path.alpha(s)) * x_hat + float(path.sigma(s)) * z_hat
        return x, steps
    y, times = x / float(path.scale(grid[0])), path.to_s(grid).tolist()
    slope = lambda y, s: field.slope(y, s, ids)
    if solver == "dopri5":
        y, calls = solve_dopri5(slope, y, times[0], times[-1], tol)
    else:
        y, calls = solve_fixed(slope, y, times, solver), steps * len(TABLEAUS[solver][0])
    return y * float(path.scale(grid[-1])), calls


# ---------------------------------------------------------------------------------------------------------------------
# What samples are drawn from: networks and their conditions

@dataclass
class Sampler:
    """A network in eval mode, its checkpoint and condition, and perhaps a weaker network to guide by."""
    net: nn.Module
    state: dict
    condition: Condition | None = None                    # ids 0 ... null - 1 are what samples are drawn for
    marginal: torch.Tensor | None = None                  # float64 [null]: how common each id is; None = not known yet
    weak: nn.Module | None = None
    weak_condition: Condition | None = None
    context: Callable = nullcontext

    def field(self, cfg, w):
        path, predict = PATHS[self.state["path"]], self.state["predict"]
        return Field(self.net, path, predict, w, cfg.interval, self.weak, self.context, cfg.batch, self.condition,
                     self.weak_condition)


def open_sampler(run, cfg, context=nullcontext):
    """The Sampler that the settings name; a weaker model that does not fit it is a UserError."""
    net, state = load_model(run, cfg.checkpoint, cfg.weights)
    condition, marginal = load_condition(state, run.device), state["marginal"]
    if cfg.boxes or cfg.mask or cfg.layouts != "train":
        condition, marginal = asked_layouts(run, cfg, state, condition)
    weak = weak_condition = None
    if cfg.autoguide:
        weak, other = load_model(run, cfg.autoguide, cfg.weights)
        same = lambda *names: all(other.get(k) == state.get(k) for k in names)
        if not same("path", "predict", "size"):
            raise UserError(f"autoguide={cfg.autoguide}: not the path, prediction or size of {cfg.checkpoint}")
        if other["num_labels"] and not same("num_labels", "labels", "layout", "label_digest", "condition"):
            raise UserError(f"autoguide={cfg.autoguide}: was trained with other labels than {cfg.checkpoint}")
        own = other["num_labels"] == 0 or state["condition"] == "prototype"      # else both are shown the same
        weak_condition = load_condition(other, run.device) if own else condition
        weak = compiled(weak, cfg)
    return Sampler(compiled(net, cfg), state, condition, marginal, weak, weak_condition, context)


def compiled(net, cfg):
    """The network, compiled if the settings say so."""
    return torch.compile(net) if cfg.compile else net


def sample_labels(cfg, sampler, indices, seed):
    """Id of each sample, int64 [B], or None for an unconditional model: a function of (seed, index)."""
    if sampler.condition is None:
        return None
    n, marginal = sampler.condition.null, sampler.marginal
    if cfg.labels == ["marginal"] and marginal is None:
        raise UserError(f"{sampler.state['file']}: its training is not finished, so how common its labels are is not "
                        "known; use labels=uniform or ids")
    if cfg.labels in (["marginal"], ["uniform"]):
        p = torch.ones(n, dtype=torch.float64) if marginal is None else marginal.double()
        if cfg.labels == ["uniform"]:                     # over labels that the network has seen
            p = (p > 0).double() / (p > 0).sum()
        u, _ = draw(seed, "sample label", indices, (0,), 1)
        place = u[:, 0].double() * p.sum()
        return torch.searchsorted(p.cumsum(0), place, right=True).clamp(max=n - 1)       # right: never one without mass
    if not cfg.labels or not all(v.isdecimal() and int(v) <= n for v in cfg.labels):
        raise UserError(f"labels={','.join(cfg.labels)}: must be marginal, uniform, or ids in 0 ... {n - 1} "
                        f"({n} is the null label)")
    return torch.tensor([int(cfg.labels[i % len(cfg.labels)]) for i in indices])


def asked_layouts(run, cfg, state, condition):
    """(condition, marginal) of the layouts that `boxes`, `mask` or `layouts` ask for, in place of the training images'.

    In training a layout never stands without a label. Boxes without one take all labels, as often as in training; a
    mask those of the training masks in which the same object is the largest.
    """
    kind = state.get("condition", "label")
    if cfg.boxes and kind != "box" or cfg.mask and kind != "mask" or kind not in ("box", "mask"):
        raise UserError(f"{state['file']} was trained with condition={kind}: boxes= needs box, mask= needs mask, "
                        "layouts= either")
    if cfg.boxes:
        maps, labels = drawn_boxes(cfg.boxes, condition)
    elif cfg.mask:
        maps, labels = drawn_mask(cfg.mask, condition)
    else:
        maps, labels = layouts_of_test(run, state, condition)
    share = np.full(len(labels), 1 / len(labels))
    if len(maps) == 1:                                    # one layout, once with each of its labels
        labels, count = np.unique(labels, return_counts=True)
        maps, share = maps.repeat(len(labels), 0), count / count.sum()
    null = np.full_like(maps[:1], condition.kinds)
    table = torch.from_numpy(np.concatenate([maps, null]))
    labels = torch.tensor([*map(int, labels), int(condition.labels[-1])])
    condition = Condition("map", table, condition.kinds, condition.size, labels)
    return condition.to(run.device), torch.from_numpy(share)


def drawn_boxes(boxes, condition):
    """(map uint8 [1, H, W], labels) of boxes [x0, y0, x1, y1] in pixels, perhaps with one label for all as a fifth."""
    from train_guided import draw_boxes
    size, K = condition.size, int(condition.labels[-1])
    for b in boxes:
        inside = len(b) in (4, 5) and 0 <= b[0] < b[2] <= size and 0 <= b[1] < b[3] <= size
        if not inside or len(b) == 5 and not 0 <= b[4] < K:
            raise UserError(f"boxes={b}: expected x0, y0, x1, y1 with 0 <= x0 < x1 <= {size}, 0 <= y0 < y1 <= {size}, "
                            f"and perhaps a label in 0 ... {K - 1}")
    named = sorted({int(b[4]) for b in boxes if len(b) == 5})
    if len(named) > 1:
        raise UserError(f"boxes={boxes}: an image has one label; name the same in every box, or in one")
    return draw_boxes(np.array([[b[:4] for b in boxes]]), size), named or condition.labels[:-1].cpu().numpy()


def drawn_mask(file, condition):
    """(map uint8 [1, H, W], labels) of a picture of ids."""
    size, kinds, bank = condition.size, condition.kinds, condition.labels[:-1].cpu().numpy()
    try:
        picture = Image.open(file)
        ids = np.asarray(picture if picture.mode in ("L", "P") else picture.convert("L"))
    except OSError as e:
        raise UserError(f"mask={file}: cannot be read ({e})") from None
    if ids.shape != (size, size) or ids.max() > kinds:
        raise UserError(f"mask={file}: is {ids.shape[1]}x{ids.shape[0]} with values up to {ids.max()}; expected "
                        f"{size}x{size}, ids 0 ... {kinds - 1} as in the label file's masks (0 = no object), "
                        f"{kinds} = whatever")

    def largest(m):                                       # object of a mask; 0 = there is none
        return np.append(0.5, np.bincount(m[m < kinds].astype(int), minlength=2)[1:]).argmax()

    alike = np.array([largest(m) == largest(ids) for m in condition.table[:-1].cpu().numpy()])
    return ids[None].astype(np.uint8), bank[alike] if alike.any() else bank


def layouts_of_test(run, state, condition):
    """(maps uint8 [N, H, W], labels) of the test images, by the label file that the model was trained with."""
    from train_guided import TrainGuided, layout_maps
    then = state["config"]["train_guided"]
    then = TrainGuided(labels=then["labels"], condition=then["condition"])
    arrays, info = load_labels(run, then.labels)
    if digest(arrays["train"]) != state["labels"]:
        raise UserError(f"layouts=test: labels/{then.labels}.npz is not what {state['file']} was trained with; "
                        "train again, or use layouts=train")
    maps, _ = layout_maps(run, then, arrays, info, "test", condition.kinds)
    return maps, arrays["test"]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: pictures and activations go to disk while they are made

def batches(rows, cfg):
    """Sample indices in batches; with dopri5 in whole blocks of 64, wherever the share of a process begins and ends."""
    if cfg.solver != "dopri5" or not len(rows):
        return [rows[i:i + cfg.batch] for i in range(0, len(rows), cfg.batch)]
    return [np.arange(b * BLOCK, (b + 1) * BLOCK) for b in range(rows[0] // BLOCK, rows[-1] // BLOCK + 1)]


def noise_and_labels(run, cfg, sampler, indices):
    """(noise [B, C, H, W], ids int64 [B] or None) of samples, on the device: functions of (seed, index)."""
    channels, size = sampler.state["channels"], sampler.state["size"]
    z = draw(cfg.seed, "sample noise", indices, (channels, size, size))
    label = sample_labels(cfg, sampler, indices, cfg.seed)
    return z.to(run.device), None if label is None else label.to(run.device)


def generate(run, cfg, sampler, w, file, what="sampling", record=False):
    """Write cfg.n samples into the .npy `file`, uint8 [n, 3, H, W], each process its share; returns what it took.

    Sample i is a function of (cfg.seed, i). record: also write the activations that `features` names beside it.
    """
    state, field, rows = sampler.state, sampler.field(cfg, w), run.share(cfg.n)
    side = run.data.size if run.vae is not None else state["size"]
    if run.rank == 0:
        create_rows(file, np.uint8, (cfg.n, 3, side, side))
    run.wait()
    evaluations, integrated, tick = 0, 0, time.time()
    recording = recorded(cfg, sampler.net, field) if record else nullcontext({})
    with bar(run, cfg.n, what) as progress, recording as seen:
        drawn = lambda part: (part, *noise_and_labels(run, cfg, sampler, part))
        for part, z, label in ahead(drawn, batches(rows, cfg)):
            x, calls = integrate(field, z, label, cfg.solver, cfg.steps, cfg.tol)
            if not torch.isfinite(x).all():
                raise UserError(f"{state['file']}: samples are not finite; is it a healthy model? "
                                "(precision=fp32 may help)")
            own = (part >= rows[0]) & (part <= rows[-1])  # of a block
            pictures = to_uint8(decode(run.vae, x[torch.from_numpy(own)]))
            write_rows(file, part[own][0], pictures.cpu().numpy())
            write_activations(run, cfg, seen, part, part[0] == rows[0], file.parent)
            evaluations += calls * len(part)
            integrated += len(part)
            progress.update(own.sum() * run.world)
    seconds = time.time() - tick
    counts = torch.tensor([evaluations, field.images, integrated], dtype=torch.float64)
    evaluations, images, integrated = run.total(counts).tolist()
    about = dict(features=about_activations(cfg, state, seen)) if record else {}
    return about | dict(nfe=evaluations / integrated, network_calls=images / integrated,
                        seconds_per_image=seconds / max(len(rows), 1))


@contextmanager
def recorded(cfg, net, field):
    """Within this context `integrate` leaves activations of the evaluations features_at in the yielded dict.

    {(name, evaluation, t): pooled [B, ...]}, where guidance doubles the batch the conditional half first.
    """
    from extract_features import matching, pooled, tapped
    seen = {}
    names = matching(net, cfg.features)
    with tapped(net, names, then=lambda x: pooled(x, cfg.features_pool)) as maps:
        def keep(number, t):
            if number in cfg.features_at:
                seen.update({(name, number, t): maps[name].cpu().numpy() for name in names})
        field.watch = keep
        yield seen


def write_activations(run, cfg, seen, part, first, folder):
    """Put the activations of the samples `part` into features-<activation>-at<evaluation>.npy; row i is sample i."""
    for (name, number, _), maps in seen.items():
        file = folder / f"features-{name}-at{number}.npy"
        if first:                                         # now it is known how large they are
            if run.rank == 0:
                create_rows(file, np.float32, (cfg.n, *maps.shape[1:]))
            run.wait()
        write_rows(file, part[0], maps[:len(part)])


def about_activations(cfg, state, seen):
    """What was written, for metrics.json."""
    from extract_features import noise_level
    return [dict(file=f"features-{name}-at{number}.npy", activation=name, evaluation=number, pool=cfg.features_pool,
                 shape=list(maps.shape[1:]), **noise_level(state["path"], t))
            for (name, number, t), maps in seen.items()]


@torch.no_grad()
def encode(run, cfg, sampler, folder):
    """Test images to noise and back, without guidance: noise.npy, a picture, and the error of the round trip."""
    data, field, condition = load_data(run, "test"), sampler.field(cfg, 1.0), sampler.condition
    n, file = min(cfg.n, len(data)), folder / "noise.npy"
    create_rows(file, np.float32, (n, *row_shape(data.inputs)))
    shown, error = [], 0.0
    with bar(run, n, "encoding") as progress:
        for part in batches(np.arange(n), cfg):
            part = part[part < len(data)]
            x = as_input(torch.from_numpy(np.array(data.inputs[part]))).to(run.device)
            label = torch.full((len(x),), condition.null, device=run.device) if condition else None
            z, _ = integrate(field, x, label, cfg.solver, cfg.steps, cfg.tol, reverse=True)
            back, _ = integrate(field, z, label, cfg.solver, cfg.steps, cfg.tol)
            own = (part < n).sum()                        # of a block
            write_rows(file, part[0], z[:own].cpu().numpy())
            pair = torch.stack([decode(run.vae, v[:own]) for v in (x, back)]).cpu()              # [2, B, 3, H, W]
            error += float((pair[1] - pair[0]).double().square().flatten(1).mean(1).sum())
            if part[0] < 10:
                shown.append(pair)
            progress.update(own)
    noise, (image, back) = np.load(file, mmap_mode="r"), torch.cat(shown, 1)[:, :10]
    rows = dict(image=image, noise=torch.from_numpy(noise[:10] / 3), back=back)
    if run.vae is not None:                               # the noise is none of pixels
        del rows["noise"]
    save_grid(folder / "grid.png", to_uint8(torch.cat(list(rows.values()))).numpy(), len(image), list(rows))
    mean, std = noise.mean(dtype=np.float64), noise.std(dtype=np.float64, ddof=1)
    return dict(noise_mean=float(mean), noise_std=float(std), images=n,
                round_trip_psnr=10 * math.log10(4 * n / max(error, 1e-30)))


# ---------------------------------------------------------------------------------------------------------------------
# Which w, how many evaluations

@torch.no_grad()
def straightness(run, cfg, sampler, w, steps=32, paths=64):
    """How far sampling paths are from straight lines: (times [steps], deviation [steps]), averaged over 64 paths.

    The deviation at t is |dx/dt - (x(1) - x(0))|^2 / |x(1) - x(0)|^2; 0 everywhere means that one Euler step is exact.
    """
    field, (x, label) = sampler.field(cfg, w), noise_and_labels(run, cfg, sampler, range(paths))
    path, t = field.path, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid, y, points = path.to_s(t).tolist(), x / float(path.scale(t[0])), [x]
    for i in range(steps):
        y = solve_fixed(lambda y, s: field.slope(y, s, label), y, grid[i:i + 2], "midpoint")
        points.append(y * float(path.scale(t[i + 1])))
    points = torch.stack(points).flatten(2).double()                             # [steps + 1, paths, D]
    chord = points[-1] - points[0]
    off = (points[1:] - points[:-1]) * steps - chord                             # [steps, paths, D]
    deviation = (off.square().sum(2) / chord.square().sum(1)).mean(1)
    return ((t[1:] + t[:-1]) / 2).tolist(), deviation.tolist()


def choose_w(run, cfg, sampler, judge, folder):
    """(best w of `guidance`, what was measured): on samples of another seed, against real images of the other split."""
    other, file, curve = replace(cfg, n=cfg.select, seed=cfg.seed + 1), folder / "candidates.npy", []
    for w in cfg.guidance:
        generate(run, other, sampler, w, file, f"w = {w:g}")
        curve.append((w, judge.distance(file, judge.unreported)))
        run.say(f"  w = {w:<5g} {judge.kind} {curve[-1][1]:.3f} on {cfg.select:,} samples of seed {other.seed}")
    few = min(cfg.select, len(judge.data[judge.unreported])) <= judge.width
    if few:
        run.say(f"warning: fewer samples or {judge.unreported} images than the evaluator's {judge.width} features: "
                "such a distance prefers samples that are too much alike; raise select, or give one w")
    if run.rank == 0:
        file.unlink()
        title = f"{judge.kind} against w, {cfg.select:,} samples"
        plot(folder / "guidance.png", {cfg.checkpoint: curve}, title, "w", judge.kind)
    best = min(curve, key=lambda point: point[1])[0]
    return best, dict(seed=other.seed, samples=cfg.select, curve=curve, fewer_than_features=few)


def sweep_nfe(run, cfg, sampler, w, judge, folder):
    """Distance against network evaluations for each solver, and the straightness of the paths; draws both."""
    samplers = {cfg.checkpoint: sampler}
    for name in cfg.against:
        alone = replace(cfg, checkpoint=name, autoguide="", boxes=[], mask="", layouts="train")
        samplers[name] = open_sampler(run, alone, sampler.context)
    curves, bends, means, file = {}, {}, {}, folder / "candidates.npy"
    for name, sampler in samplers.items():
        w_here = w if sampler.condition or sampler.weak else 1.0
        prefix = f"{name} " if len(samplers) > 1 else ""
        for other in settings_of(cfg):
            report = generate(run, other, sampler, w_here, file, f"{other.solver} {other.steps}")
            distance, curve = judge.distance(file), prefix + other.solver
            curves.setdefault(curve, []).append((report["nfe"], distance))
            run.say(f"  {prefix}{other.solver:9} NFE {report['nfe']:6.1f}  {judge.kind} {distance:.3f}")
        times, deviation = straightness(run, replace(cfg, seed=cfg.seed + 1), sampler, w_here)
        bends[f"{name} ({sampler.state['path']})"] = list(zip(times, deviation))
        means[name] = float(np.mean(deviation))
        run.say(f"  {name}: paths deviate from straight lines by {means[name]:.3f} (0 = straight), mean over t")
    if run.rank == 0:
        file.unlink()
        title = f"{judge.kind} against network evaluations ({', '.join(samplers)}; {cfg.select:,} samples)"
        plot(folder / "nfe.png", curves, title, "evaluations (NFE)", judge.kind, log=True)
        title = "deviation of the path's velocity from the straight line, by time"
        plot(folder / "straightness.png", bends, title, "t", "deviation")
    return dict(seed=cfg.seed + 1, samples=cfg.select, curves=curves, straightness=means, deviation=bends)


def settings_of(cfg):
    """The settings of every point of an nfe sweep: up to 64 evaluations; dopri5 at four tolerances."""
    cfg = replace(cfg, n=cfg.select, seed=cfg.seed + 1)
    for solver in cfg.sweep_solvers:
        if solver == "dopri5":
            yield from (replace(cfg, solver=solver, steps=1, tol=tol) for tol in (1e-1, 3e-2, 1e-2, 1e-3))
            continue
        stages = len(TABLEAUS[solver][0]) if solver in TABLEAUS else 1
        yield from (replace(cfg, solver=solver, steps=steps) for steps in cfg.sweep_steps if steps * stages <= 64)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators: uint8 images [B, 3, H, W] -> features float32 [B, D]

JUDGE_BATCH, JUDGE_UPDATES = 128, 10                      # a judge needs so many updates an epoch
UNSCORED = "or only sample: evaluate=false guidance=W"


class Judge(nn.Module):
    """A small CNN trained on the run's own classes, for sets for which ImageNet features mean nothing."""

    def __init__(self, classes):
        super().__init__()

        def conv(before, after, stride):
            return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU())
        self.body = nn.Sequential(conv(3, 32, 2), conv(32, 64, 1), conv(64, 64, 2), conv(64, 128, 1),
                                  nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 64), nn.SiLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):                                 # its last hidden layer, [B, 64]
        return self.body(x.float() / 127.5 - 1)


def open_judge(run):
    """(the judge of this run, its description); trained by the first process where it is not there yet."""
    path, data = run.dir / "samples" / ".judge.pt", load_data(run, "train")
    known = np.flatnonzero(np.asarray(data.classes) >= 0)
    if len(known) < JUDGE_BATCH * JUDGE_UPDATES:
        raise UserError(f"evaluator=judge: {len(known)} training images with a class are too few to train it (at least "
                        f"{JUDGE_BATCH * JUDGE_UPDATES}); use evaluator=pixels or inception, {UNSCORED}")
    with seeded(0, "judge"):
        net = Judge(int(np.max(data.classes)) + 1).to(run.device)

    def saved():
        """What the file holds, or None if it is not there or of other images."""
        with reading(path, "delete it"):
            there = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"data": None}
            return there if there["data"] == data.info["fingerprint"] else None

    if run.rank == 0 and saved() is None:
        accuracy = train_judge(run, net, data, known)
        if saved() is None:                               # another command may have been faster
            with atomic(path) as f:
                torch.save(dict(net=net.state_dict(), data=data.info["fingerprint"], test_accuracy=accuracy), f)
    run.wait()
    there = run.agreed(saved)
    net.load_state_dict(there["net"])
    name, accuracy = weights_hash(there["net"])[:6], there["test_accuracy"]
    return net.eval(), f"judge {name} (small CNN on this run's classes, test accuracy {accuracy:.3f})"


def train_judge(run, net, data, known, epochs=2):
    """Two epochs over the training images at rows `known`; the share of test images whose class it then tells."""
    counts, weight = np.bincount(data.classes[known], minlength=len(net.head.bias)), None
    if run.data.imbalance > 1:                            # without weights, rare classes would not be seen
        weight = len(known) / counts.clip(1) / (counts > 0).sum()
        weight = torch.tensor(weight, dtype=torch.float32, device=run.device)
    steps, per_epoch = epochs * len(known) // JUDGE_BATCH, len(known) // JUDGE_BATCH
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps)
    guess = lambda images: net.head(net(torch.tensor(images).to(run.device)))    # [B, classes]
    with bar(run, steps, "training the judge", "step") as progress:
        for step in range(steps):
            if step % per_epoch == 0:
                order = np.random.default_rng(seed_of(0, "judge order", step)).permutation(known)
            rows = np.sort(order[step % per_epoch * JUDGE_BATCH:][:JUDGE_BATCH])
            loss = F.cross_entropy(guess(data.images[rows]), torch.tensor(data.classes[rows]).to(run.device), weight)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            progress.update(1)
    test = load_data(run, "test")
    with torch.no_grad():
        told = [guess(test.images[i:i + 500]).argmax(1).cpu().numpy() for i in range(0, len(test), 500)]
    return float((np.concatenate(told) == test.classes).mean())


def pixel_components(images, side=16, count=64):
    """The principal components of training images uint8 [N, 3, H, W], averaged to side x side, as an evaluator.

    No class and no other program has shaped it: it sees colours and the layout of what is large, and nothing fine.
    """
    def small(x):                                         # [B, 3, H, W] -> [B, 3 side^2]
        return F.adaptive_avg_pool2d(x.float() / 127.5 - 1, min(side, x.shape[-1])).flatten(1)

    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), 10_000)).astype(int))
    parts = np.array_split(rows, math.ceil(len(rows) / 500))
    x = torch.cat([small(torch.from_numpy(np.ascontiguousarray(images[r]))) for r in parts]).double()
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T @ (x - mean))[1].flip(1)[:, :count]    # [3 side^2, count], greatest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()      # the same signs on every process
    mean, axes = mean.float(), axes.float()
    return lambda x: (small(x) - mean.to(x.device)) @ axes.to(x.device)


def inception_resize(x):
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in 0 ... 255, on x's device: clean-fid's clean resizing (Pillow's
    antialiased bicubic, not rounded) to about 0.01 grey levels."""
    return F.interpolate(x.float(), (299, 299), mode="bicubic", antialias=True).clamp(0, 255)


def open_inception(run):
    """clean-fid's Inception on resized images; its weights are downloaded where they are not there."""
    torchvision_datasets()                                # clean-fid imports torchvision: beside a CPU-only torch, too
    from cleanfid.inception_torchscript import InceptionV3W
    folder = Path(os.environ.get("INCEPTION_DIR", Path.home() / ".cache" / "clean-fid"))
    folder.mkdir(parents=True, exist_ok=True)
    for mine in run.turns():
        if mine:
            try:
                net = InceptionV3W(str(folder), download=True).to(run.device).eval()
            except (OSError, RuntimeError) as e:
                why = str(e).splitlines()[0]
                raise UserError(f"evaluator=inception: no weights in {folder}, and they could not be downloaded "
                                f"({why}); put inception-2015-12-05.pt there (or set INCEPTION_DIR), "
                                f"use another evaluator, {UNSCORED}") from None
    return lambda x: net(inception_resize(x))


def open_evaluator(run, name):
    """(evaluator, description, name of its distance)."""
    if name == "judge":
        return *open_judge(run), "frechet"
    if name == "pixels":
        data = load_data(run, "train")
        text = f"pixels (64 principal components of training images {data.info['fingerprint'][:6]})"
        return pixel_components(data.images), text, "frechet"
    if name == "inception":
        return open_inception(run), "clean-fid Inception, clean resizing by PyTorch", "fid"
    try:
        net = torch.jit.load(name, map_location=run.device).eval()               # uint8 images -> features
    except (RuntimeError, ValueError, OSError):
        raise UserError(f"evaluator={name}: not judge, pixels, inception, or a readable TorchScript file") from None
    return net, f"TorchScript {Path(name).name} {digest(np.fromfile(name, np.uint8))[:6]}", "frechet"


def thumbnail(x):
    """Colours on a grid of 8 x 8: uint8 [B, 3, H, W] -> float32 [B, 192]."""
    return F.adaptive_avg_pool2d(x.float(), 8).flatten(1)


@torch.no_grad()
def features_of(run, evaluator, images, rows, what):
    """Yield evaluator features of uint8 images[rows], 100 at a time, float32 [n, D]; the next are read meanwhile."""
    read = lambda i: torch.from_numpy(np.ascontiguousarray(images[rows[i:i + 100]]))
    with bar(run, len(rows) * run.world, what) as progress:
        for x in ahead(read, range(0, len(rows), 100)):
            out = evaluator(x.to(run.device)).float().cpu()
            if not torch.isfinite(out).all():
                raise UserError(f"{what}: the evaluator returned non-finite features")
            yield out
            progress.update(len(out) * run.world)


def write_features(run, evaluator, images, file, what):
    """Evaluator features of images into a .npy, float32 [N, D]; every process writes its share."""
    rows = run.share(len(images))
    if run.rank == 0:
        width = next(features_of(run, evaluator, images, np.arange(1), what)).shape[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        create_rows(file, np.float32, (len(images), width))
    run.wait()
    done = 0
    for out in features_of(run, evaluator, images, rows, what):
        write_rows(file, rows[done], out.numpy())
        done += len(out)
    run.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features

def chunks_of(x, device="cpu", size=20_000):
    """Rows of features [N, D], a tensor or a memory-mapped array, in chunks, float64 on the device."""
    for i in range(0, len(x), size):
        part = x[i:i + size]
        yield (torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part).to(device).double()


def moments(x, device="cpu"):
    """Mean [D] and covariance [D, D] of features [N, D], float64; memory does not grow with N."""
    mean = sum(part.sum(0) for part in chunks_of(x, device)) / len(x)
    covariance = sum((part - mean).T @ (part - mean) for part in chunks_of(x, device)) / (len(x) - 1)
    return mean.cpu(), covariance.cpu()


def frechet(a, b):
    """Frechet distance between Gaussians fitted to features a [N, D], b [M, D], or given as their moments, float64:
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    (m1, c1), (m2, c2) = [x if isinstance(x, tuple) else moments(x) for x in (a, b)]
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T                    # symmetric square root of C1
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross)


def kernel_distance(a, b, limit=5000):
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (arXiv 1801.01401), on at most `limit` rows of each."""
    a, b = a[:limit].double(), b[:limit].double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(m):
        return (m.sum() - m.trace()) / (len(m) * (len(m) - 1))
    return float(off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())


def manifold(fake, real, k=5, limit=10_000):
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) by k-nearest-neighbour balls."""
    fake, real = fake[:limit].double(), real[:limit].double()                    # torch.cdist cancels in float32
    k = min(k, len(fake) - 1, len(real) - 1)

    def radius(x):                                        # the nearest is the point itself
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1, 1).values for part in x.split(1000)])

    r_real, r_fake = radius(real), radius(fake)
    d = torch.cat([torch.cdist(part, real) for part in fake.split(1000)])        # [fake, real]
    inside = d < r_real
    return dict(precision=float(inside.any(1).float().mean()),
                recall=float((d < r_fake[:, None]).any(0).float().mean()),
                density=float(inside.sum(1).float().mean() / k),
                coverage=float((d.min(0).values < r_real).float().mean()))


def nearest(x, train, device="cpu"):
    """Distance of each row of x to its nearest row of train, [N]; train may be a memory-mapped array."""
    x = x.to(device).double()                             # the fast formula for distances cancels
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
    for part in chunks_of(train, device):
        best = torch.minimum(best, torch.cat([torch.cdist(rows, part).amin(1) for rows in x.split(500)]))
    return best.float().cpu()


def shifted_distance(images, train, thumbnails, shift=2, candidates=10):
    """Smallest mean squared difference of images uint8 [n, 3, H, W] to training images moved by up to 2 pixels, [n].

    It is looked for among those training images whose thumbnails [N, 192] are nearest.
    """
    small = thumbnail(torch.from_numpy(images)).double()
    d = torch.cat([torch.cdist(small, part).float() for part in chunks_of(thumbnails)], 1)       # [n, N]
    near = d.topk(min(candidates, len(train)), largest=False).indices.numpy()
    best = []
    for x, rows in zip(images, near):
        middle = x[:, shift:-shift, shift:-shift]
        moved = np.lib.stride_tricks.sliding_window_view(train[np.sort(rows)], middle.shape, (1, 2, 3))
        best.append(np.square(moved - middle.astype(np.float32)).mean((-3, -2, -1)).min())
    return np.array(best)


class Evaluation:
    """Real images as one evaluator sees them, against which sets of samples are scored.

    All processes compute features. The first one compares, for it alone reads them again, and tells the others.
    """

    def __init__(self, run, cfg):
        self.run, self.cfg, self.moments_of = run, cfg, {}
        self.unreported = "train" if cfg.reference == "test" else "test"         # the split that reports do not use
        self.data = {split: load_data(run, split) for split in ("train", "test")}
        for split, data in self.data.items():
            if len(data) < 2:
                raise UserError(f"evaluate=true: {len(data)} {split} images are too few to compare with; "
                                "evaluate=false guidance=W only samples")
        self.net, self.text, self.kind = open_evaluator(run, cfg.evaluator)
        self.sets, self.thumbnails = {}, {}
        for split, data in self.data.items():
            name = digest(cfg.evaluator, self.text, data.info["fingerprint"])
            self.sets[split] = self.cached(name, self.net, data.images, f"evaluator on {split} images")
        name = digest("thumbnails", self.data["train"].info["fingerprint"])
        self.thumbnails = self.cached(name, thumbnail, self.data["train"].images, "thumbnails of train images")
        self.width = run.agreed(lambda: self.sets["train"].shape[1])
        tailed = cfg.evaluator == "judge" and run.data.imbalance > 1
        self.groups = head_and_tail(self.data["train"].classes) if tailed else {}
        self.decoded = self.distance_of_decoded() if run.vae is not None else None

    def cached(self, name, evaluator, images, what):
        """Evaluator features [N, D] of images as a memory map, computed once by all processes and kept in the run
        folder; None beside the first process."""
        run, file = self.run, self.run.dir / "samples" / ".reference" / f"{name}.npy"
        if not run.agreed(file.exists):
            aside = run.agreed(lambda: file.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp"))
            write_features(run, evaluator, images, aside, what)
            if run.rank == 0 and not file.exists():       # another command may have been faster
                os.replace(aside, file)
            elif run.rank == 0:
                aside.unlink()
        if run.rank:
            return None
        with reading(file, "delete it"):
            found = np.load(file, mmap_mode="r", allow_pickle=False)
            if found.ndim != 2 or len(found) != len(images):
                raise ValueError(f"{found.shape} for {len(images)} images")
        return found

    def rows(self, split, purpose, limit=10_000):
        """Up to so many rows of a split in random order, the same at all times."""
        order = np.random.default_rng(seed_of(0, purpose)).permutation(len(self.data[split]))
        return order[:limit]

    def some(self, split, limit=10_000):
        """Features of up to so many images of a split; some scores look at no more."""
        return torch.from_numpy(self.sets[split][self.rows(split, f"reference {split}", limit)])

    def gaussian(self, split):
        """Moments of a split, computed when first asked for."""
        if split not in self.moments_of:
            self.moments_of[split] = moments(self.sets[split], self.run.device)
        return self.moments_of[split]

    def distance_of_decoded(self):
        """What the autoencoder alone costs: up to 10,000 reference images there and back, against all of them."""
        run, split = self.run, self.cfg.reference
        latents = self.data[split].inputs[np.sort(self.rows(split, "decoded"))]
        see = lambda rows: self.net(to_uint8(decode(run.vae, as_input(rows))))
        name = digest(self.cfg.evaluator, self.text, self.data[split].info["fingerprint"], run.data.latents)
        features = self.cached(name, see, latents, "evaluator on decoded images")
        distance = run.agreed(lambda: frechet(moments(features, run.device), self.gaussian(split)))
        run.say(f"{self.kind} of decoded {split} images against the images themselves: {distance:.3f}")
        return distance

    def of_samples(self, file):
        """Features [n, D] of the samples in a .npy on the first process; None elsewhere."""
        run, aside = self.run, Path(file).with_suffix(".features.npy")
        write_features(run, self.net, np.load(file, mmap_mode="r"), aside, "evaluator on samples")
        if run.rank:
            return None
        features = torch.from_numpy(np.load(aside))
        aside.unlink()
        return features

    def distance(self, file, split=None):
        """Frechet distance alone, of the samples in a .npy to a split, or to the reference."""
        fake, split = self.of_samples(file), split or self.cfg.reference
        return self.run.agreed(lambda: frechet(moments(fake, self.run.device), self.gaussian(split)))

    def scores(self, file):
        """All scores of the samples in a .npy, with what they were measured with."""
        fake = self.of_samples(file)
        return self.run.agreed(lambda: self.compare(fake, np.load(file, mmap_mode="r")))

    def compare(self, fake, images):
        """Scores of samples: evaluator features [n, D], and the images."""
        run, reference = self.run, self.cfg.reference
        some = self.some(reference).to(run.device)
        out = self.tail_scores(fake, np.asarray(self.sets[reference])) if self.groups else {}
        out[self.kind] = frechet(moments(fake, run.device), self.gaussian(reference))
        out["kernel"] = kernel_distance(fake.to(run.device), some)
        out |= manifold(fake.to(run.device), some, self.cfg.neighbours)
        close, usual = nearest(fake[:2000], self.sets["train"], run.device), self.test_distances
        out["memorisation"] = float(close.median() / usual.median())
        out["copies"] = float((close < usual.quantile(0.01)).float().mean())
        pixels = shifted_distance(np.array(images[:500]), self.data["train"].images, self.thumbnails)
        out["copies_pixels"] = float((pixels < np.quantile(self.test_pixel_distances, 0.01)).mean())
        if self.decoded is not None:
            out["decoded"] = self.decoded
        text = f"{reference}, {len(self.data[reference]):,} images"
        return out | dict(evaluator=self.text, reference=text, samples=len(fake))

    @cached_property
    def test_distances(self):
        """How far test images are from training images in features."""
        return nearest(self.some("test", 2000), self.sets["train"], self.run.device)

    @cached_property
    def test_pixel_distances(self):
        """How far test images are from training images in pixels."""
        rows = np.sort(self.rows("test", "reference test", 500))
        return shifted_distance(self.data["test"].images[rows], self.data["train"].images, self.thumbnails)

    def real_scores(self, n):
        """What n real images of the other split score in place of samples; nothing if there are fewer."""
        def real_against_real():
            rows = self.rows(self.unreported, "limits", n)
            if len(rows) < n:
                return {}
            real, reference = torch.from_numpy(self.sets[self.unreported][rows]), self.cfg.reference
            pair = real.to(self.run.device), self.some(reference).to(self.run.device)
            return dict(distance_floor=frechet(moments(real, self.run.device), self.gaussian(reference)),
                        coverage_ceiling=manifold(*pair, self.cfg.neighbours)["coverage"])
        return self.run.agreed(real_against_real)

    @torch.no_grad()
    def tail_scores(self, fake, real):
        """Scores of the most and the least frequent classes, from features of samples [n, D] and real images [N, D].

        The judge says which class either is of, so that its errors fall on both sides alike. There is no distance with
        fewer of either than a covariance needs: as many as features.
        """
        real, out = torch.from_numpy(np.array(real)), {}
        guess = lambda x: self.net.head(x.to(self.run.device)).argmax(1).cpu()
        fake_class, real_class = guess(fake), guess(real)
        for name, classes in self.groups.items():
            a = fake[torch.isin(fake_class, torch.tensor(classes))]
            b = real[torch.isin(real_class, torch.tensor(classes))]
            out[name] = dict(classes=classes, samples=len(a), reference=len(b),
                             share=len(a) / len(fake), reference_share=len(b) / len(real))
            if min(len(a), len(b)) > fake.shape[1]:
                out[name][self.kind] = frechet(a, b)
        return out


def head_and_tail(classes):
    """The third of the classes with the most training images, and that with the fewest: {head, tail: class ids}."""
    counts = np.bincount(classes[classes >= 0])
    order, n = np.argsort(-counts, kind="stable").tolist(), max(1, len(counts) // 3)
    return dict(head=order[:n], tail=order[-n:])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tables

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f"]


def plot(path, curves, title, x_label, y_label, log=False, size=(760, 480)):
    """Line chart as PNG with Pillow. curves: {name: [(x, y), ...]}; log: both axes."""
    (w, h), left, right, top, low = size, 70, 20, 40, 50
    scale, back = (math.log10, lambda v: 10 ** v) if log else (float, float)
    points = {name: [(scale(x), scale(y)) for x, y in sorted(curve)] for name, curve in curves.items()}
    xs, ys = zip(*itertools.chain(*points.values()))
    (x0, x1), (y0, y1) = [(min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys)]

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (w - left - right), h - low - (y - y0) / (y1 - y0) * (h - top - low)

    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(6):                                    # grid lines with numbers
        x, y = x0 + i / 5 * (x1 - x0), y0 + i / 5 * (y1 - y0)
        px, py = place(x, y)
        pen.line([(px, top), (px, h - low)], "#e6e6e6")
        pen.line([(left, py), (w - right, py)], "#e6e6e6")
        pen.text((px - 10, h - low + 6), f"{back(x):.3g}", "black")
        pen.text((8, py - 6), f"{back(y):.3g}", "black")
    for at, text in (((left, 12), title), ((w // 2 - 40, h - 22), x_label), ((8, 22), y_label)):
        pen.text(at, text, "black")
    for i, (name, curve) in enumerate(points.items()):
        colour, line = COLOURS[i % len(COLOURS)], [place(*point) for point in curve]
        pen.line(line, colour, 2)
        for px, py in line:
            pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        pen.text((w - right - 150, top + 6 + 14 * i), f"- {name}", colour)
    with atomic(path) as f:
        sheet.save(f, "PNG")


def sample_sheet(run, cfg, sampler, w, folder):
    """Write grid.png: a row for each label, or a hundred samples."""
    images, order, names, head = np.load(folder / "images.npy", mmap_mode="r"), np.arange(min(100, cfg.n)), None, ""
    if sampler.condition:
        labels, head = np.load(folder / "labels.npy"), f": w = {w:g}"
        often = [k for k in np.unique(labels) if (labels == k).sum() >= 10][:20]
        if often:
            order = np.concatenate([np.flatnonzero(labels == k)[:10] for k in often])
            names, head = [str(k) for k in often], f"{head}, a row for each label with ten samples"
    save_grid(folder / "grid.png", images[order], 10, names, head=cfg.name + head)


def layout_sheet(run, cfg, sampler, w, folder, rows=10, columns=9):
    """Write grid.png: each row one layout of the bank, drawn on the left; each column one noise."""
    state, field = sampler.state, sampler.field(cfg, w)
    kinds, n = sampler.condition.kinds, min(rows, sampler.condition.null)
    z = draw(cfg.seed, "sample noise", range(columns), (state["channels"], state["size"], state["size"]))
    z, label = z.repeat(n, 1, 1, 1).to(run.device), torch.arange(n, device=run.device).repeat_interleave(columns)
    parts = zip(z.split(BLOCK), label.split(BLOCK))
    x = torch.cat([integrate(field, *part, cfg.solver, cfg.steps, cfg.tol)[0] for part in parts])
    images = to_uint8(decode(run.vae, x)).cpu().numpy()
    images = images.reshape(n, columns, *images.shape[1:])
    colours = np.random.default_rng(3).integers(60, 256, (kinds, 3))
    colours = np.concatenate([colours, np.zeros((1, 3))]).astype(np.uint8)       # black where nothing is asked for
    table = sampler.condition.table[:n].long().cpu()
    maps = torch.from_numpy(colours)[table].permute(0, 3, 1, 2)                  # [n, 3, h, w]
    maps = F.interpolate(maps, size=images.shape[3:], mode="nearest").numpy()
    cells = np.concatenate([maps[:, None], images], 1)                           # [n, 1 + columns, 3, H, W]
    save_grid(folder / "grid.png", cells.reshape(-1, *images.shape[2:]), columns + 1,
              head=f"{cfg.name}: w = {w:g}; rows: one layout, columns: one noise")


def kind_of(scores):
    """The name of the distance among scores."""
    return "fid" if "fid" in scores else "frechet"


def row_of(m):
    """What the table shows of a metrics.json."""
    scores, kind = m["scores"], kind_of(m["scores"])
    plain = m.get("scores_w1", scores if m["w"] == 1 else {})
    row = {"K": m.get("K", m["num_labels"]) or None, "NMI": (m.get("label_scores") or {}).get("nmi"),
           "distance w=1": plain.get(kind), "chosen w": m["w"] if m["num_labels"] else None, "distance": scores[kind]}
    row |= {k: scores[k] for k in ("precision", "recall", "coverage", "memorisation")}
    row |= {k: scores.get(k, {}).get(kind) for k in ("head", "tail")}
    return row | {"network calls": m["network_calls"], "training images": m["total_seen"]}


def cell(v):
    """A number of the table as text."""
    if v is None:
        return "-"
    return f"{v:,.0f}" if abs(v) >= 100 or float(v).is_integer() else f"{v:.{3 if abs(v) < 2 else 2}f}"


def as_text(metrics):
    """{name: metrics.json} as a table, the largest distance first, and what these scores were measured with."""
    shown = {name: row_of(m) for name, m in metrics.items()}
    order = sorted(shown, key=lambda name: -shown[name]["distance"])
    rows = [["samples", *shown[order[0]]], *([name, *map(cell, shown[name].values())] for name in order)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [[row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:]))] for row in rows]
    rows.insert(1, ["-" * w for w in widths])
    said = {k: {str(m["scores"][k]) for m in metrics.values()} for k in ("evaluator", "reference", "samples")}
    said["solver"] = {f"{m['solver']} {m['steps']}" for m in metrics.values()}
    notes = "; ".join(f"{k}: {', '.join(sorted(v))}" for k, v in said.items())
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{notes}\n\n"


def table(run):
    """Print every samples/*/metrics.json of the run side by side, and write samples/table.md and table.json."""
    folder, groups = run.dir / "samples", {}
    for path in sorted(folder.glob("*/metrics.json")):
        m = read_json(path, "delete it")
        if "scores" in m and not m["recipe"]["sweep"]:    # a sweep is a picture, not a row
            evaluator = m["scores"]["evaluator"].split()[0]                      # distances of two do not compare
            groups.setdefault(evaluator, {})[path.parent.name] = m
    if not groups:
        raise UserError(f"{folder}: no evaluated samples yet")
    text = "".join(as_text(groups[name]) for name in sorted(groups))
    with atomic(folder / "table.md") as f:
        f.write(text.encode())
    write_json(folder / "table.json", {name: row_of(m) for group in groups.values() for name, m in group.items()})
    run.say(text)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def check_request(run, cfg, sampler):
    """Combinations of settings that cannot work, before anything is computed."""
    state = sampler.state
    if not sampler.condition and not cfg.autoguide and cfg.guidance != [1.0]:
        cfg.guidance = [1.0]
        run.say("note: a model without labels, which nothing can guide: w = 1")
    several = len(cfg.guidance) > 1 or cfg.sweep
    require(cfg.guidance, cfg, "guidance", "name at least one w")
    require(cfg.interval[0] <= cfg.interval[1], cfg, "interval", "two times in order")
    require(cfg.sweep != "nfe" or list(settings_of(cfg)), cfg, "sweep_steps sweep_solvers",
            "no setting takes at most 64 evaluations")
    require(cfg.evaluate or not several, cfg, "sweep guidance evaluate",
            "sweeps and a choice of w need evaluate=true; with evaluate=false give one, such as guidance=2")
    if sampler.condition and not state.get("null", True) and not cfg.autoguide and cfg.guidance != [1.0]:
        raise UserError(f"guidance={cfg.guidance}: {state['file']} has no null label to guide with; use guidance=1, "
                        "or autoguide= an unconditional model")
    sample_labels(cfg, sampler, [0], cfg.seed)            # complains about labels
    if cfg.features:
        from extract_features import matching
        matching(sampler.net, cfg.features)               # complains about names
        last = cfg.steps * len(TABLEAUS.get(cfg.solver, [[0]])[0]) - 1
        fits = cfg.solver != "dopri5" and cfg.direction == "generate" and cfg.features_at
        require(fits and max(cfg.features_at) <= last, cfg, "solver direction features_at",
                f"activations are kept at evaluations 0 to {last} of a fixed-step solver, while generating")
        pool = cfg.features_pool
        require(pool in ("mean", "none") or pool.isdecimal() and int(pool), cfg, "features_pool",
                "must be mean, none or a number")
        require(not cfg.compile, cfg, "features compile", "activations are read from the network as it is")


def recipe_of(run, cfg, sampler):
    """What decides about the results: settings that are in use, and hashes of the files they name."""
    state, nfe, chosen = sampler.state, cfg.sweep == "nfe", len(cfg.guidance) > 1 or cfg.sweep
    unused = {"overwrite": True, "batch": True, "steps": cfg.solver == "dopri5", "tol": cfg.solver != "dopri5",
              "select": not chosen, "against": not nfe, "sweep_steps": not nfe, "sweep_solvers": not nfe}
    unused |= {k: not cfg.features for k in ("features", "features_at", "features_pool")}
    unused |= {k: not cfg.evaluate for k in ("evaluator", "reference", "neighbours")}
    recipe = {k: v for k, v in run.sections[run.stage].items() if not unused.get(k)}
    weak = load_checkpoint(run, cfg.autoguide)["weights"] if cfg.autoguide else None
    recipe |= dict(hash=state["weights"], guidance=cfg.guidance, weak=weak)
    if cfg.mask or cfg.layouts != "train":
        recipe["bank"] = digest(sampler.condition.table.cpu().numpy())
    if cfg.against:
        recipe["others"] = [load_checkpoint(run, name)["weights"] for name in cfg.against]
    return recipe


def plan(run, cfg, sampler, folder):
    """What sampling would do, for --dry-run."""
    state = sampler.state
    say_network(run, sampler.net, state["channels"], state["size"])
    size = run.data.size if run.data.latents else state["size"]
    run.say(f"{cfg.n:,} samples from {state['file']} into {folder}: {cfg.n * 3 * size ** 2 / 1e6:,.0f} MB")


def sample(run, cfg, sampler, folder):
    """Choose w, draw the sweep, write and score the samples; what was measured, for metrics.json."""
    judge, metrics, w = Evaluation(run, cfg) if cfg.evaluate else None, {}, cfg.guidance[0]
    if len(cfg.guidance) > 1 or cfg.sweep == "guidance":
        w, metrics["selection"] = choose_w(run, cfg, sampler, judge, folder)
    if cfg.sweep == "nfe":
        metrics["nfe_sweep"] = sweep_nfe(run, cfg, sampler, w, judge, folder)

    # the samples that are reported
    file = folder / "images.npy"
    metrics |= dict(w=w) | generate(run, cfg, sampler, w, file, record=bool(cfg.features))
    if run.rank == 0:
        if sampler.condition:
            np.save(folder / "labels.npy", sample_labels(cfg, sampler, range(cfg.n), cfg.seed).numpy())
        sheet = layout_sheet if sampler.condition and sampler.condition.kind == "map" else sample_sheet
        sheet(run, cfg, sampler, w, folder)
    if judge:
        metrics["scores"] = judge.scores(file) | judge.real_scores(cfg.n)
        if w != 1 and len(cfg.guidance) > 1:              # the gain of guidance apart from that of labels
            plain = folder / "plain.npy"
            generate(run, cfg, sampler, 1.0, plain, "w = 1")
            metrics["scores_w1"] = judge.scores(plain)
            if run.rank == 0:
                plain.unlink()
    return metrics


def report(run, metrics):
    """Print what was measured."""
    if "round_trip_psnr" in metrics:
        run.say(f"noise of {metrics['images']} test images: mean {metrics['noise_mean']:.3f}, "
                f"std {metrics['noise_std']:.3f}; round trip {metrics['round_trip_psnr']:.1f} dB")
    if "scores" not in metrics:
        return
    s, kind = metrics["scores"], kind_of(metrics["scores"])
    words = [f"{k} {s[k]:.3f}" for k in (kind, "kernel", "precision", "recall", "coverage")]
    run.say("  ".join(words))
    if "distance_floor" in s:
        run.say(f"as many other real images: {kind} {s['distance_floor']:.3f}, coverage {s['coverage_ceiling']:.3f}")
    run.say(f"memorisation {s['memorisation']:.3f} (1 = typically as far from the training images as test images are), "
            f"copies {s['copies']:.1%}, in pixels {s['copies_pixels']:.1%} (1 % of test images are as close)")
    run.say(f"w {metrics['w']:g}  NFE {metrics['nfe']:.1f}  network calls {metrics['network_calls']:.1f}  "
            f"{metrics['seconds_per_image'] * 1000:.1f} ms/image; {s['evaluator']}; reference {s['reference']}")


def main():
    """Sample, from the command line."""
    run = start("sample_ode", SampleOde, __doc__, flags={"--table": "all results of the run side by side"})
    cfg, folder = run.cfg, run.dir / "samples" / run.cfg.name
    if "--table" in run.flags:
        return table(run)

    # what to sample from, and whether that can be done
    require(cfg.n >= run.world, cfg, "n", "at least one sample for every process")
    context, _, why = autocast(run, cfg.precision)
    sampler = open_sampler(run, cfg, context)
    check_request(run, cfg, sampler)
    recipe, state = recipe_of(run, cfg, sampler), sampler.state
    if run.dry_run:
        return plan(run, cfg, sampler, folder)
    made = folder / ("images.npy" if cfg.direction == "generate" else "noise.npy")
    if run.agreed(lambda: finished(run, folder / "metrics.json", recipe, [made])):
        return
    open_autoencoder(run)
    run.say(f"sampling from {state['file']} ({state['kind']}, {state['seen']:,} images seen, "
            f"{cfg.weights} weights); {why}")

    # sample, in a folder that takes the place of an earlier one when it is complete
    metrics = dict(recipe=recipe, checkpoint=cfg.checkpoint, weights=cfg.weights, hash=state["weights"],
                   seen=state["seen"], num_labels=state["num_labels"], K=state["num_labels"],
                   total_seen=state["seen"] + (state.get("init") or {}).get("seen", 0),       # with those of its start
                   label_file=state.get("label_file"), label_scores=state.get("label_scores"),
                   solver=cfg.solver, steps=cfg.steps, seed=cfg.seed, world=run.world)
    with making(run, "samples", cfg.name, "metrics.json") as aside:
        if cfg.direction == "generate":
            metrics |= sample(run, cfg, sampler, aside)
        elif run.rank == 0:
            metrics |= encode(run, cfg, sampler, aside)
        if run.rank == 0:
            write_json(aside / "metrics.json", metrics)
    report(run, metrics)
    run.say(f"samples in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


if __name__ == "__main__":
    cli(main)

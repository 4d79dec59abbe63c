"""Sample: a model in, images along the ODE out, and how good they are.

Reads   {diffusion,guided}/<name>/checkpoint.pt; for scores also data/{train,test}
Writes  samples/<name>/: images.npy uint8 [n, 3, H, W], labels.npy, grid.png, metrics.json; guidance.png (several w),
        nfe.png (sweep); with direction=encode noise.npy in place of images. Caches: samples/.reference/, and
        samples/.judge.pt, without which another judge is trained, whose scores do not compare
Time    t = 0 is noise, t = 1 is data; sampling runs from 0 to 1, direction=encode from 1 to 0 and back.
Scale   v = v_null + w (v_cond - v_null): w = 0 unconditional, w = 1 conditional, w > 1 guided. Papers that write
        v_cond + s (v_cond - v_null) have s = w - 1.

    python sample_ode.py configs/shapes.yaml checkpoint=guided/kmeans name=kmeans guidance=1,1.5,2,3
    torchrun --nproc_per_node=8 sample_ode.py configs/cifar10.yaml checkpoint=guided/kmeans name=kmeans
    python sample_ode.py configs/shapes.yaml --table           # all results of the run side by side
    python sample_ode.py configs/shapes.yaml name=nfe sweep=euler,midpoint,heun,dopri5       # nfe.png

Of several w the best is taken: on other samples, against other real images, than the report uses. Several evaluators
score the same samples; the first chooses w. The method ends with `generate`; what measures and draws comes after it.
"""
import itertools
import json
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from configs.data import as_input, decode, load_data, open_autoencoder, require_shape, torchvision_datasets
from configs.run import (UserError, ahead, atomic, autocast, bar, cli, create_rows, digest, draw, finished, key, making,
                         read_torch, reading, require, save_grid, save_torch, seed_of, seeded, start, to_uint8,
                         weights_hash, write_json, write_rows)
from train_diffusion import PATHS, Condition, NoisePath, load_condition, load_model, say_network, to_x_and_z, with_null

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]           # the keys of TABLEAUS, and dopri5


@dataclass
class SampleOde:
    """Section `sample_ode`."""
    name: str = key("base", "results go to samples/<name>")
    checkpoint: str = key("diffusion/base", "a folder of the run, or a .pt file")
    n: int = key(10_000, "samples", low=2)
    solver: Solver = key("midpoint", "euler is DDIM, on all paths here; dopri5 is adaptive")
    steps: int = key(12, "of the fixed-step solvers", low=1)
    tol: float = key(1e-4, "dopri5: relative and absolute tolerance, above float32's rounding", low=1e-6)
    guidance: list[float] = key([1.0], "w; several: the best on `select` other samples is taken")
    select: int = key(1_000, "samples per candidate w, of another seed", low=2)
    interval: list[float] = key([0.0, 1.0], "guide only while t is inside; outside w = 1", count=2)
    autoguide: str = key("", "guide by a weaker model, such as an early state of the training, in place of the null "
                             "label: v = v_weak + w (v - v_weak) (arXiv 2406.02507); labels if it knows them")
    labels: list[str] = key(["marginal"], "marginal (as in training), uniform, or ids: labels; of a model of boxes, "
                                          "masks, sets or patches numbers of stored layouts")
    boxes: list[list[float]] = key([], "of a model with box conditions: draw [[x0, y0, x1, y1, label], ...] in pixels")
    direction: Literal["generate", "encode"] = key("generate", "encode: test images to noise and back")
    evaluate: bool = key(True, "compare with real images; false: a checkpoint is enough, there need be no run")
    evaluator: list[str] = key(["judge"], "judge (a CNN trained on the run's classes), pixels (principal components), "
                                          "inception (FID), or a TorchScript file, which runs as code")
    reference: Literal["train", "test"] = key("test", "real images to compare with")
    sweep: list[Solver] = key([], "draw the distance against network evaluations (NFE) for these solvers")
    sweep_steps: list[int] = key([2, 3, 5, 8, 12, 20, 32], "of the sweep; dopri5 varies its tolerance", low=1)
    features: list[str] = key([], "also save these activations of the network, names and globs, while it samples")
    features_at: list[int] = key([0], "at these evaluations of a fixed-step solver, from 0", low=0)
    features_pool: str = key("mean", "mean, none, or a number g: average over a grid of g x g")
    batch: int = key(250, "images at once and process; a guided network call sees each twice", low=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network; the ODE state is float32 always")
    compile: bool = key(False, "torch.compile the network: pays where n is many batches")
    seed: int = key(0, "sample i is a function of (seed, i), up to rounding")
    overwrite: bool = key(False, "replace samples that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Solvers of dy/ds = f(y, s) for a batch y [B, ...] and a number s

TABLEAUS = {                                              # Butcher tableaus: nodes c, matrix a, weights b. See `Solver`
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
    """Weighted sum of stage slopes, skipping zeros; 0 of none."""
    return sum(w * k for w, k in zip(weights, slopes) if w)


def solve_fixed(f, y, times, solver):
    """Explicit Runge-Kutta steps from y [B, ...] at times[0] over all times (of the ODE) -> y at times[-1]."""
    nodes, matrix, weights = TABLEAUS[solver]
    for s, end in itertools.pairwise(times):
        h = end - s
        slopes = []
        for node, row in zip(nodes, matrix):
            slopes.append(f(y + h * mix(slopes, row), s + node * h))
        y = y + h * mix(slopes, weights)
    return y


def solve_dopri5(f, y, s, end, tol, most=2000):
    """Adaptive Dormand-Prince 5(4) of y [B, ...] from s to end, in either direction -> y at end; atol = rtol = tol. All
    rows take the same steps, and the worst one decides: in an average, easy rows would hide the error of a hard one."""
    nodes, matrix, _ = DOPRI5
    slope = f(y, s)
    h = (end - s) / 20                                    # the control below soon finds a better one
    for _ in range(most):
        last = abs(h) >= abs(end - s)
        if last:
            h = end - s
        slopes = [slope]
        for node, row in zip(nodes[1:], matrix[1:]):
            stage = y + h * mix(slopes, row)
            slopes.append(f(stage, s + node * h))
        scale = tol + tol * torch.maximum(y.abs(), stage.abs())
        errors = h * mix(slopes, DOPRI5_ERROR) / scale
        error = float(errors.flatten(1).double().square().mean(1).sqrt().max())
        if not math.isfinite(error):
            raise UserError("solver=dopri5: the network returned a non-finite velocity")
        accepted = error <= 1
        if accepted:
            y, slope, s = stage, slopes[-1], s + h        # the last stage is the solution
            if last:
                return y
        least = 1 if accepted else 0.2
        h *= min(10, max(least, 0.9 * max(error, 1e-10) ** -0.2))
    raise UserError(f"solver=dopri5: more than {most} steps; raise tol, or use a fixed-step solver")


# ---------------------------------------------------------------------------------------------------------------------
# The field: the network's velocity, guided

@dataclass
class Field:
    """Slope of the probability-flow ODE in the path's variables (y, s); guidance mixes the outputs of networks."""
    net: Callable
    path: NoisePath
    predict: str                                          # what networks predict: v, eps or x
    w: float = 1.0
    interval: tuple = (0.0, 1.0)
    weak: Callable | None = None                          # a weaker network
    context: Callable = nullcontext                       # of autocast
    batch: int = 10 ** 9                                  # images at once, guided ones twice
    condition: Condition | None = None                    # None where the network knows no labels
    weak_condition: Condition | None = None
    calls: int = 0                                        # images that passed a network; guided ones count twice
    evaluations: int = 0                                  # of the slope, in the present integration
    watch: Callable | None = None                         # called after each of them: watch(number, t)

    def call(self, x, t, ids, weak=False):
        """The prediction of one network; counted."""
        net, condition = (self.weak, self.weak_condition) if weak else (self.net, self.condition)
        self.calls += len(x)
        time = 1000 * torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        told = {} if condition is None or ids is None else condition(ids)
        with self.context():
            return net(x.float(), time, **told).to(x.dtype)

    def output(self, x, t, ids):
        """The prediction, guided. x: [B, C, H, W]; t: a number; ids: int64 [B], rows of `condition`, or None."""
        low, high = self.interval
        inside = low - 1e-6 <= t <= high + 1e-6           # the ends count as inside, however they are rounded
        if self.w == 1 or not inside or (self.weak is None and ids is None):     # nothing to mix
            return self.call(x, t, ids)
        if self.weak is not None:
            strong = self.call(x, t, ids)
            weak = self.call(x, t, ids, weak=True)
            return torch.lerp(weak, strong, self.w)       # weak + w (strong - weak)
        null = torch.full_like(ids, self.condition.null)
        if self.w == 0:
            return self.call(x, t, null)
        conditional, unconditional = self.call(torch.cat([x, x]), t, torch.cat([ids, null])).chunk(2)
        return torch.lerp(unconditional, conditional, self.w)                    # v_null + w (v_cond - v_null)

    def estimate(self, x, t, ids):
        """(x_hat, z_hat), guided."""
        ids_of = itertools.repeat(None) if ids is None else ids.split(self.batch)
        out = torch.cat([self.output(part, t, some) for part, some in zip(x.split(self.batch), ids_of)])
        if self.watch:
            self.watch(self.evaluations, t)
        self.evaluations += 1
        return to_x_and_z(self.path, self.predict, out, x, x.new_full((len(x),), t))

    def slope(self, y, s, ids):
        """dy/ds for states y [B, C, H, W] at the number s, by way of (x_hat, z_hat), so that every path and prediction
        is solved alike. On the straight path, of a network that predicts v, this is v again."""
        t = float(self.path.to_t(torch.tensor(s, dtype=torch.float64)))
        at = y.new_full((1, 1, 1, 1), t)
        x_hat, z_hat = self.estimate(y * self.path.scale(at), t, ids)
        return self.path.slope(x_hat, z_hat, at)


@torch.no_grad()
def integrate(field, x, ids, solver, steps, tol, reverse=False):
    """Move images from noise (t = 0) to data (t = 1), or back. x: float32 [B, C, H, W] -> (x there, evaluations).

    On all paths here an Euler step from t to t' is one of DDIM (eta = 0): it ends in alpha(t') x_hat + sigma(t') z_hat.
    """
    field.evaluations = 0
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    t = t.new_tensor([0, 0.99, 1]) if solver == "dopri5" else t                  # it adapts up to 0.99: see the end
    t = t.flip(0) if reverse else t
    times = field.path.to_s(t).tolist()                   # s, of the ODE: t itself, or rho on VP
    y = x / float(field.path.scale(t[0]))
    slope = lambda y, s: field.slope(y, s, ids)

    def solve(y, times):
        if solver == "dopri5":
            return solve_dopri5(slope, y, times[0], times[-1], tol)
        return solve_fixed(slope, y, times, solver)

    # some solvers ask at a step's end (node 1). At t = 1 hardly any noise is left to estimate: their last is midpoint's
    nodes, _, _ = TABLEAUS.get(solver, DOPRI5)
    if reverse or 1 not in nodes:
        y = solve(y, times)
    else:
        y = solve(y, times[:-1])
        y = solve_fixed(slope, y, times[-2:], "midpoint")
    return y * float(field.path.scale(t[-1])), field.evaluations


# ---------------------------------------------------------------------------------------------------------------------
# Networks, their conditions and labels

def open_model(run, cfg, context=nullcontext):
    """(Field at w = 1, checkpoint) that the settings name; a weaker model that does not fit is a UserError.

    Of the checkpoint, `marginal` says how common each id is, float64 [null] (None: not known yet), and `weak` is the
    hash of the weaker network.
    """
    net, state = load_model(run, cfg.checkpoint)
    field = Field(net, PATHS[state["path"]], state["predict"], interval=cfg.interval, context=context, batch=cfg.batch,
                  condition=load_condition(state, run.device))
    if cfg.boxes:
        field.condition = drawn_layout(cfg, state, field.condition, run.device)
        state["marginal"] = torch.ones(1)
    if cfg.autoguide:
        field.weak, weak = load_model(run, cfg.autoguide)
        state["weak"] = weak["weights"]
        shared = ["path", "predict", "size", "channels"]
        if weak["num_labels"]:
            shared += ["num_labels", "labels_hash", "layout_hash", "found_hash", "condition"]
        other = [name for name in shared if weak.get(name) != state.get(name)]
        require(not other, cfg, "autoguide checkpoint", f"were trained with another {' '.join(other)}")
        own = weak["num_labels"] == 0 or state["condition"] == "prototype"       # other ids mean the same to both
        field.weak_condition = load_condition(weak, run.device) if own else field.condition
    if cfg.compile:
        field.net = torch.compile(field.net)
        field.weak = field.weak and torch.compile(field.weak)
    return field, state


def drawn_layout(cfg, state, condition, device):
    """The condition that knows one layout, the `boxes` with their label, in place of those of the training images."""
    from self_label import filled
    require(state.get("condition") == "box", cfg, "boxes", f"{state['file']} was not trained with condition=box")
    null, label = int(condition.labels[-1]), (cfg.boxes[0] or [None])[-1]
    fits = all(len(b) == 5 and b[0] < b[2] and b[1] < b[3] and b[4] == label for b in cfg.boxes)
    require(fits and label in range(null), cfg, "boxes",
            f"expected [x0, y0, x1, y1, label] with x0 < x1, y0 < y1, and one label below {null} for all")
    each = filled(np.array(cfg.boxes)[:, :4], condition.size)                    # [boxes, H, W]
    require(each.any((1, 2)).all(), cfg, "boxes", f"one covers no pixel of the {condition.size} x {condition.size}")
    layout = torch.from_numpy(np.uint8(~each.any(0, keepdims=True)))             # [1, H, W]
    table = with_null(layout, condition.channels)
    return Condition("map", table, condition.channels, condition.size, torch.tensor([int(label), null])).to(device)


def sample_labels(cfg, field, state, indices):
    """Id of each sample, int64 [B], or None for an unconditional model: a function of (seed, index)."""
    if field.condition is None:
        return None
    null, common = field.condition.null, state["marginal"]
    if cfg.labels not in (["marginal"], ["uniform"]):
        if not cfg.labels or not all(v.isdecimal() and int(v) <= null for v in cfg.labels):
            raise UserError(f"labels={','.join(cfg.labels)}: must be marginal, uniform, or ids up to {null} (null)")
        return torch.tensor([int(cfg.labels[i % len(cfg.labels)]) for i in indices])
    if common is None:
        raise UserError("labels: how common they are is known after the training only; name ids, such as labels=0,1")
    if cfg.labels == ["uniform"]:                         # over labels that the network has seen
        common = (common > 0) / (common > 0).sum()
    upto = common.double().cumsum(0)
    uniform, _ = draw(cfg.seed, "sample label", indices, (0,), 1)
    point = uniform[:, 0].double() * common.double().sum()
    return torch.searchsorted(upto, point, right=True).clamp(max=null - 1)       # right: never one of probability 0


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: pictures and activations go to disk while they are made

def index_batches(rows, cfg):
    """Sample indices in batches; with dopri5 in whole blocks of 64, wherever the share of a process begins and ends."""
    if cfg.solver != "dopri5":
        return [rows[i:i + cfg.batch] for i in range(0, len(rows), cfg.batch)]
    return [np.arange(b * BLOCK, (b + 1) * BLOCK) for b in range(rows[0] // BLOCK, rows[-1] // BLOCK + 1)]


def put(run, file, n, part, values):
    """Write rows `part` of a .npy of n rows, which is made when the first batch shows how large a row is."""
    if part[0] == run.share(n)[0]:
        create_rows(run, file, values.dtype, (n, *values.shape[1:]))
    write_rows(file, part[0], values)


def generate(run, cfg, field, state, w, file):
    """Write cfg.n samples into the .npy `file`, uint8 [n, 3, H, W], each process its share, and the activations that
    `features` names beside it. Returns per sample NFE and network calls (guidance makes two of one)."""
    field = replace(field, w=w)
    rows = run.share(cfg.n)
    parts = index_batches(rows, cfg)

    def drawn(part):
        z = draw(cfg.seed, "sample noise", part, (state["channels"], state["size"], state["size"]))
        ids = sample_labels(cfg, field, state, part)
        return part, z.to(run.device), None if ids is None else ids.to(run.device)

    recording = recorded(cfg, field) if cfg.features else nullcontext({})
    evaluated = calls = 0
    with bar(run, cfg.n, "sampling") as progress, recording as kept:
        for part, z, ids in ahead(drawn, parts):
            field.calls = 0
            x, evaluations = integrate(field, z, ids, cfg.solver, cfg.steps, cfg.tol)
            if not torch.isfinite(x).all():
                raise UserError(f"{state['file']}: samples are not finite (precision=fp32 may help)")
            own = np.isin(part, rows)                     # a block of dopri5 may hold others' rows
            evaluated += evaluations * own.sum()
            calls += field.calls * own.mean()
            pictures = to_uint8(decode(run.vae, x[torch.from_numpy(own)]))
            put(run, file, cfg.n, part[own], pictures.cpu().numpy())
            for name, (_, maps) in kept.items():
                put(run, file.with_name(name), cfg.n, part, maps[:len(part)])
            progress.update(own.sum() * run.world)
    evaluated, calls = run.total(torch.tensor([evaluated, calls], dtype=torch.float64)).tolist()
    about = [about | dict(file=name, shape=list(maps.shape[1:])) for name, (about, maps) in kept.items()]
    return dict(nfe=evaluated / cfg.n, network_calls=calls / cfg.n, features=about)


@contextmanager
def recorded(cfg, field):
    """Within this context `integrate` leaves activations in the yielded dict: {file name: (what, pooled [B, ...])}.
    Where guidance doubles the batch, the conditional half comes first."""
    from extract_features import pooled, tapped
    kept = {}
    with tapped(field.net, cfg.features, then=lambda x: pooled(x, cfg.features_pool)) as maps:
        def keep(number, t):
            if number in cfg.features_at:
                for name in cfg.features:
                    about = dict(activation=name, evaluation=number, t=t)
                    kept[f"features-{name}-at{number}.npy"] = about, maps[name].cpu().numpy()
        field.watch = keep
        yield kept


@torch.no_grad()
def encode(run, cfg, field, folder):
    """Test images to noise and back, without labels: noise.npy, a picture, and the error of the round trip."""
    data = load_data(run, "test")
    n = min(cfg.n, len(data))
    noise, images, back = [], [], []
    for part in index_batches(np.arange(n), cfg):
        x = as_input(torch.from_numpy(data.inputs[part[part < len(data)]])).to(run.device)
        z, _ = integrate(field, x, None, cfg.solver, cfg.steps, cfg.tol, reverse=True)
        again, _ = integrate(field, z, None, cfg.solver, cfg.steps, cfg.tol)
        noise.append(z.cpu())
        images.append(decode(run.vae, x).cpu())
        back.append(decode(run.vae, again).cpu())
    noise, images, back = (torch.cat(parts)[:n] for parts in (noise, images, back))
    np.save(folder / "noise.npy", noise.numpy())
    pictures = to_uint8(torch.cat([images[:10], back[:10]])).numpy()
    save_grid(folder / "grid.png", pictures, len(images[:10]), ["image", "back"])
    error = float((back - images).double().square().mean())
    return dict(noise_mean=float(noise.double().mean()), noise_std=float(noise.double().std()), images=n,
                round_trip_psnr=10 * math.log10(4 / max(error, 1e-30)))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators: uint8 images [B, 3, H, W] -> features float32 [B, D]. The first process alone measures.

JUDGE_BATCH, JUDGE_UPDATES = 128, 10                      # a judge needs so many updates an epoch
thumbnail = lambda x: F.adaptive_avg_pool2d(x.float(), 8).flatten(1)         # [B, 192]: colours on a grid of 8 x 8
OTHER = dict(train="test", test="train")                  # the split that is not reported on


class Judge(nn.Module):
    """A small CNN trained on the run's own classes, for sets for which ImageNet features mean nothing."""

    def __init__(self, classes):
        super().__init__()
        conv = lambda before, after, stride: nn.Sequential(nn.Conv2d(before, after, 3, stride, 1),
                                                           nn.GroupNorm(8, after), nn.SiLU())
        self.body = nn.Sequential(conv(3, 32, 2), conv(32, 64, 1), conv(64, 64, 2), conv(64, 128, 1),
                                  nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 64), nn.SiLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):                                 # its last hidden layer, [B, 64]
        return self.body(x.float() / 127.5 - 1)


def open_judge(run):
    """(the judge of this run, its description); trained where it is not there yet."""
    path = run.dir / "samples" / ".judge.pt"
    data = load_data(run, "train")
    known, of = np.flatnonzero(data.classes >= 0), digest(data.info["fingerprint"], np.asarray(data.classes))
    kinds = len(np.unique(data.classes[known]))
    if len(known) < JUDGE_BATCH * JUDGE_UPDATES or kinds < 2:
        raise UserError(f"evaluator=judge: {len(known)} training images of {kinds} known classes are too few to train "
                        "it; use evaluator=pixels or inception, or only sample: evaluate=false guidance=W")
    with seeded(0, "judge"):
        net = Judge(int(np.max(data.classes)) + 1).to(run.device)
    if not path.exists():
        accuracy = train_judge(run, net, data, known)
        if not path.exists():                             # another command's, meanwhile: one judge for all
            save_torch(path, dict(net=net.state_dict(), data=of, test_accuracy=accuracy))
    with reading(path, "delete it"):
        there = read_torch(path, "delete it")
        if there["data"] not in (of, data.info["fingerprint"]):                  # earlier versions kept the latter
            raise ValueError("trained on other images, or classes")
        net.load_state_dict(there["net"])
    told = "not measured" if math.isnan(there["test_accuracy"]) else f"{there['test_accuracy']:.3f}"
    return net.eval(), f"judge {weights_hash(there['net'])[:6]} (small CNN on this run's classes, test accuracy {told})"


def train_judge(run, net, data, known):
    """Two epochs over the training images at rows `known`; the share of test images whose class it then tells, or nan
    where none is known."""
    weight = None
    if run.data.imbalance > 1:                            # without weights, rare classes would not be seen
        counts = torch.from_numpy(np.bincount(data.classes[known])).float()
        weight = (len(known) / counts.clamp(min=1) / (counts > 0).sum()).to(run.device)
    guess = lambda images: net.head(net(torch.tensor(images).to(run.device)))    # [B, classes]
    per_epoch, steps = len(known) // JUDGE_BATCH, 2 * len(known) // JUDGE_BATCH
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps)
    for step in range(steps):
        if step % per_epoch == 0:
            order = np.random.default_rng(seed_of(0, "judge order", step)).permutation(known)
        rows = np.sort(order[step % per_epoch * JUDGE_BATCH:][:JUDGE_BATCH])
        loss = F.cross_entropy(guess(data.images[rows]), torch.tensor(data.classes[rows]).to(run.device), weight)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    test = load_data(run, "test")
    with torch.no_grad():
        told = [guess(test.images[i:i + 500]).argmax(1).cpu().numpy() for i in range(0, len(test), 500)]
    right = (np.concatenate(told) == test.classes)[test.classes >= 0]
    return float(right.mean()) if len(right) else math.nan


def pixel_components(images, side=16, count=64):
    """The principal components of training images uint8 [N, 3, H, W], averaged to side x side, as an evaluator."""
    small = lambda x: F.adaptive_avg_pool2d(x.float() / 127.5 - 1, min(side, x.shape[-1])).flatten(1)    # [B, 3 side^2]
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), 10_000)).astype(int))
    x = torch.cat([small(torch.tensor(images[i:i + 1])) for i in rows]).double()
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T @ (x - mean))[1].flip(1)[:, :count]    # [3 side^2, count], greatest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()      # the same signs everywhere
    mean, axes = mean.float(), axes.float()
    return lambda x: (small(x) - mean.to(x.device)) @ axes.to(x.device)


def inception_resize(x):
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in 0 ... 255, as by clean-fid to about 0.01 grey levels."""
    return F.interpolate(x.float(), (299, 299), mode="bicubic", antialias=True).clamp(0, 255)


def open_inception(run):
    """(evaluator, description): the network of FID; its weights are downloaded where they are not there."""
    torchvision_datasets()                                # clean-fid imports torchvision: beside a CPU-only torch, too
    from cleanfid.inception_torchscript import InceptionV3W
    folder = Path(os.environ.get("INCEPTION_DIR", Path.home() / ".cache" / "clean-fid"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        net = InceptionV3W(str(folder), download=True).to(run.device).eval()
    except (OSError, RuntimeError) as e:
        raise UserError(f"evaluator=inception: could not be downloaded ({str(e).splitlines()[0]}); put "
                        f"inception-2015-12-05.pt into {folder}, set INCEPTION_DIR, use evaluator=pixels, or only "
                        "sample: evaluate=false guidance=W") from None
    return lambda x: net(inception_resize(x)), "clean-fid Inception, clean resizing by PyTorch"


def open_network(run, name):
    """(evaluator, description) by name."""
    if name == "judge":
        return open_judge(run)
    if name == "inception":
        return open_inception(run)
    if name == "pixels":
        data = load_data(run, "train")
        text = f"pixels {data.info['fingerprint'][:6]} (64 principal components of these training images)"
        return pixel_components(data.images), text
    with reading(name, "evaluator= takes judge, pixels, inception, or a TorchScript file"):
        net = torch.jit.load(name, map_location=run.device).eval()
        net = torch.jit.optimize_for_inference(net)       # folds norms into convolutions: several times faster on CPUs
        return net, f"TorchScript {Path(name).name} {digest(np.fromfile(name, np.uint8))[:6]}"


@torch.no_grad()
def features_of(run, net, images):
    """Features float32 [N, D] of uint8 images [N, 3, H, W], an array or a memory map, on the device."""
    found = []
    with bar(run, len(images), "evaluator") as progress:
        for i in range(0, len(images), 100):
            x = torch.tensor(images[i:i + 100])
            f = net(x.to(run.device))
            if not isinstance(f, torch.Tensor) or f.shape[:-1] != x.shape[:1] or not torch.isfinite(f).all():
                raise UserError("evaluator: must return one row of finite numbers for each image [B, 3, H, W] of uint8")
            found.append(f.float().cpu())
            progress.update(len(x))
    return torch.cat(found).to(run.device)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of samples, by distances between sets of features [N, D]

def chunks_of(x, device="cpu", size=20_000):
    """Rows of features [N, D], a tensor or a memory-mapped array, in chunks, float64 on the device."""
    for i in range(0, len(x), size):
        yield torch.as_tensor(x[i:i + size]).to(device).double()


def moments(x, device="cpu"):
    """Mean [D] and covariance [D, D] of features [N, D], float64; memory does not grow with N."""
    mean = sum(part.sum(0) for part in chunks_of(x, device)) / len(x)
    covariance = sum((part - mean).T @ (part - mean) for part in chunks_of(x, device)) / (len(x) - 1)
    return mean.cpu(), covariance.cpu()


def frechet(a, b):
    """Frechet distance between Gaussians fitted to features a [N, D], b [M, D], or given as their moments, float64:
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    (m1, c1), (m2, c2) = [x if isinstance(x, tuple) else moments(x, x.device) for x in (a, b)]
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T                    # symmetric square root of C1
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross)


def manifold(fake, real, k=5, limit=10_000):
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) by k-nearest-neighbour balls."""
    fake, real = fake[:limit].double(), real[:limit].double()                    # torch.cdist cancels in float32
    k = min(k, len(fake) - 1, len(real) - 1)
    radius = lambda x: torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(1000)])    # 1: itself
    distance = torch.cdist(fake, real)
    in_real = distance < radius(real)                     # [fake, real]: the sample lies in the ball of the real image
    in_fake = distance < radius(fake)[:, None]
    share = dict(precision=in_real.any(1), recall=in_fake.any(0), density=in_real.sum(1) / k, coverage=in_real.any(0))
    return {name: float(v.float().mean()) for name, v in share.items()}


def nearest(x, train, device="cpu"):
    """Distance of each row of x to its nearest row of train, [N]; train may be a memory-mapped array."""
    x = x.to(device).double()                             # the fast formula for distances cancels
    best = [torch.cat([torch.cdist(rows, part).amin(1) for rows in x.split(500)]) for part in chunks_of(train, device)]
    return torch.stack(best).amin(0).float().cpu()


def copying(fake, test, train, device="cpu"):
    """How much nearer samples are to training images, or mirrored ones, than test images are, as thumbnails [N, 192],
    which tell near copies, too: the ratio of median distances (1 is right), and the share as near as only 1 % of the
    test images."""
    mirrored = lambda x: x.view(-1, 3, 8, 8).flip(3).flatten(1)
    either = lambda x: torch.minimum(nearest(x, train, device), nearest(mirrored(x), train, device))
    near, usual = either(fake), either(test)
    return dict(memorisation=float(near.median() / usual.median()),
                copies=float((near < usual.quantile(0.01)).float().mean()))


@torch.no_grad()
def tail_scores(head, counts, fake, real):
    """Scores of the third of the classes with the most training images (counts [classes]), and of that with the fewest.
    The class of a row of fake [n, D] and real [N, D] is what the judge's last layer, head, says; of real images, too,
    so that its errors are the same on both sides."""
    order = np.argsort(-np.array(counts), kind="stable").tolist()
    third = max(1, len(counts) // 3)
    fake_class, real_class = head(fake).argmax(1), head(real).argmax(1)
    out = {}
    for name, classes in dict(head=order[:third], tail=order[-third:]).items():
        wanted = torch.tensor(classes, device=fake.device)
        a, b = fake[torch.isin(fake_class, wanted)], real[torch.isin(real_class, wanted)]
        out[name] = dict(classes=classes, samples=len(a), reference=len(b))
        if min(len(a), len(b)) > fake.shape[1]:           # else there is no covariance
            out[name]["frechet"] = frechet(a, b)
    return out


class Evaluator:
    """A network that sees images, and the real images that samples are compared with, of one split or both."""

    def __init__(self, run, name, compared=("train", "test")):
        self.run = run
        self.net, self.text = open_network(run, name)
        self.kind = "fid" if name == "inception" else "frechet"                  # what its distance is called
        self.data = {split: load_data(run, split) for split in ("train", "test")}
        self.features, self.thumbnails, self.moments = {}, {}, {}
        for split in self.data:
            if len(self.data[split]) < 2:
                raise UserError(f"{run.dir / 'data' / split}: one image has no covariance to compare samples with; use "
                                "evaluate=false guidance=W, or another run with a larger data.test_fraction")
            self.thumbnails[split] = self.stored(split, thumbnail, "thumbnails")
        for split in compared:
            self.features[split] = self.stored(split, self.net, name, self.text)
            self.moments[split] = moments(self.features[split], run.device)

    def stored(self, split, net, *recipe):
        """Features [N, D] of real images as a memory map, kept in the run folder."""
        data = self.data[split]
        file = self.run.dir / "samples" / ".reference" / f"{digest(*recipe, data.info['fingerprint'])}.npy"
        if not file.exists():
            with atomic(file) as f:
                np.save(f, features_of(self.run, net, data.images).cpu().numpy())
        with reading(file, "delete it"):
            known = np.load(file, mmap_mode="c", allow_pickle=False)             # c: PyTorch wants writable ones
            if known.ndim != 2 or len(known) != len(data) or known.dtype != np.float32:
                raise ValueError(f"{known.dtype} of shape {known.shape} for {len(data)} images")
            return known

    def some(self, split, purpose, limit):
        """Features of up to so many real images, drawn at random, always the same."""
        rows = np.random.default_rng(seed_of(0, purpose)).permutation(len(self.data[split]))[:limit]
        if split not in self.features:                    # a slow network need not see all others
            return features_of(self.run, self.net, self.data[split].images[rows])
        return torch.from_numpy(self.features[split][rows]).to(self.run.device)

    def distance(self, file, split):
        """Frechet distance of the samples in `file`, uint8 [n, 3, H, W], to the real images of a split."""
        return frechet(features_of(self.run, self.net, np.load(file, mmap_mode="r")), self.moments[split])

    def scores(self, file, split):
        """All scores of the samples in `file` against a split, with what they were measured with."""
        images, other = np.load(file, mmap_mode="r"), OTHER[split]
        fake = features_of(self.run, self.net, images)
        real = self.some(split, f"reference {split}", 10_000)
        out = {self.kind: frechet(fake, self.moments[split])} | manifold(fake, real)
        rows = np.random.default_rng(seed_of(0, "thumbnails")).permutation(len(self.thumbnails["test"]))[:2000]
        usual = torch.from_numpy(self.thumbnails["test"][rows])
        out |= copying(thumbnail(torch.tensor(images[:2000])), usual, self.thumbnails["train"], self.run.device)
        if isinstance(self.net, Judge) and self.run.data.imbalance > 1:
            counts = self.data["train"].info["class_counts"]
            out |= tail_scores(self.net.head, counts, fake, self.some(split, "all", None))
        if len(self.data[other]) >= len(fake):            # what as many real images would score
            as_many = self.some(other, "limits", len(fake))
            out["distance_floor"] = frechet(as_many, self.moments[split])
            out["coverage_ceiling"] = manifold(as_many, real)["coverage"]
        out["reference"] = f"{split}, {len(self.data[split]):,} images"
        few = min(len(fake), len(self.data[split])) <= fake.shape[1]             # the covariance is then singular
        return out | dict(evaluator=self.text, evaluator_features=fake.shape[1], samples=len(fake), singular=few)


def trial(run, cfg, field, state, w, evaluator, file):
    """(NFE, distance) of samples that no report is about: of another seed, against the real images of the other split.
    Their pictures are left in `file`."""
    cfg = replace(cfg, n=cfg.select, seed=cfg.seed + 1, features=[])
    nfe = generate(run, cfg, field, state, w, file)["nfe"]

    def measure():                                        # the first process alone has an evaluator
        distance = evaluator.distance(file, OTHER[cfg.reference])
        run.say(f"  w = {w:<5g} {cfg.solver:9} NFE {nfe:6.1f}  {evaluator.kind} {distance:.3f} on {cfg.n:,} samples of "
                f"seed {cfg.seed}")
        return distance

    return nfe, run.agreed(measure)


def choose_w(run, cfg, field, state, evaluator, file):
    """(best w of `guidance`, what was measured); draws guidance.png."""
    curve, shown = [], []
    for w in cfg.guidance:
        _, distance = trial(run, cfg, field, state, w, evaluator, file)
        curve.append((w, distance))
        if run.rank == 0:
            shown.append(np.load(file, mmap_mode="r")[:10].copy())               # the next w overwrites the file
    if run.rank == 0:
        captions = [f"w = {w:g}: {distance:.3g}" for w, distance in curve]
        save_grid(file.with_name("guidance.png"), np.concatenate(shown), len(shown[0]), captions,
                  head=f"{evaluator.kind} by w")
        split = OTHER[cfg.reference]
        if min(cfg.select, len(evaluator.data[split])) <= evaluator.features[split].shape[1]:
            run.say("warning: a distance of fewer images than the evaluator has features prefers samples that are too "
                    "much alike; raise select, or give one w")
    best, _ = min(curve, key=lambda point: point[1])
    return best, dict(seed=cfg.seed + 1, samples=cfg.select, curve=curve)


def sweep_nfe(run, cfg, field, state, w, evaluator, file):
    """Distance against network evaluations of each solver, {solver: [(NFE, distance), ...]}; draws nfe.png."""
    curves = {}
    for solver in cfg.sweep:
        points = [dict(steps=steps) for steps in cfg.sweep_steps]
        if solver == "dopri5":
            points = [dict(tol=tol) for tol in (1e-1, 3e-2, 1e-2, 1e-3)]
        curves[solver] = [trial(run, replace(cfg, solver=solver, **point), field, state, w, evaluator, file)
                          for point in points]
    if run.rank == 0:
        plot(file.with_name("nfe.png"), curves,
             f"{evaluator.kind} ({cfg.select:,} samples) against network evaluations")
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tables

def plot(path, curves, title):
    """Curves {name: [(x, y), ...]} of positive numbers as a PNG, on logarithmic axes."""
    width, height, edge = 760, 480, 60
    points = np.array([point for curve in curves.values() for point in curve])   # [n, 2]
    (left, low), (right, high) = points.min(0) * 0.9, points.max(0) * 1.1

    def place(x, y):
        return (np.interp(math.log(x), np.log([left, right]), [edge, width - edge]),
                np.interp(math.log(y), np.log([low, high]), [height - edge, edge]))

    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((edge, 12), title, "black")
    for x, y in zip(np.geomspace(left, right, 6), np.geomspace(low, high, 6)):
        pen.line([place(x, low), place(x, high)], "#e6e6e6")
        pen.text((place(x, low)[0] - 6, height - edge + 8), f"{x:.3g}", "black")
        pen.line([place(left, y), place(right, y)], "#e6e6e6")
        pen.text((12, place(left, y)[1] - 6), f"{y:.3g}", "black")
    for i, (name, curve) in enumerate(curves.items()):
        colour = f"hsl({97 * i % 360}, 80%, 40%)"
        pen.line([place(*point) for point in sorted(curve)], colour, 2)
        pen.text((width - edge - 70, edge + 14 * i), name, colour)
    with atomic(path) as f:
        sheet.save(f, "PNG")


def sample_sheet(cfg, condition, labels, w, folder):
    """Write grid.png: samples of the 20 most frequent labels, a row each; or layouts, each beside its sample."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    columns, names = 10, None
    if condition is None:
        cells = images[:100]
    elif condition.kind == "map":
        colours = np.random.default_rng(3).integers(60, 256, (condition.channels + 1, 3)).astype(np.uint8)
        colours[-1] = 0                                   # where nothing is asked for
        maps = torch.from_numpy(colours)[condition.table.cpu()[labels[:50]].long()].permute(0, 3, 1, 2)
        maps = F.interpolate(maps, images.shape[2:]).numpy()                     # [n, 3, H, W]
        cells = np.stack([maps, images[:50]], 1).reshape(-1, *maps.shape[1:])
    else:
        ids, counts = np.unique(labels, return_counts=True)
        names = sorted(ids[np.argsort(-counts, kind="stable")][:20].tolist())
        cells = np.full((len(names) * columns, *images.shape[1:]), 255, np.uint8)                # white: no more there
        for i, name in enumerate(names):
            found = images[np.flatnonzero(labels == name)[:columns]]
            cells[i * columns:][:len(found)] = found
    captions = names and [str(name) for name in names]
    head = f"{cfg.name}: w = {w:g}" + ", a row for each id" * bool(names)
    save_grid(folder / "grid.png", cells, columns, captions, head=head)


def row_of(name, metrics):
    """What the table shows of a metrics.json."""
    scores = metrics["scores"]
    kind = "fid" if "fid" in scores else "frechet"
    plain = scores if metrics["w"] == 1 else metrics.get("scores_w1", {})
    row = {"name": name, "evaluator": scores["evaluator"].split(" (")[0], "samples": scores["samples"],
           "reference": scores["reference"], "K": metrics["num_labels"],
           "NMI": (metrics["label_scores"] or {}).get("nmi"),
           "distance w=1": plain.get(kind), "w": metrics["w"], "distance": float(scores[kind])}
    row |= {name: scores[name] for name in ("precision", "recall", "coverage", "memorisation")}
    return row | {"network calls": metrics["network_calls"], "training images": metrics["total_seen"]}


def table(run):
    """Print every samples/*/metrics.json side by side, by its first evaluator, the largest distance first."""
    rows = []
    for path in run.dir.glob("samples/[!.]*/metrics.json"):
        with reading(path, "delete it"):
            metrics = json.loads(path.read_text())
            if "scores" in metrics:
                rows.append(row_of(path.parent.name, metrics))
    if not rows:
        raise UserError(f"{run.dir / 'samples'}: no evaluated samples yet")
    rows.sort(key=lambda row: (row["evaluator"], row["reference"], -row["distance"]))
    text_of = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v or "-")
    shown = [list(rows[0]), *([text_of(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown)]
    for line in shown:
        run.say("| " + " | ".join(map(str.rjust, line, widths)) + " |")


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def settle_request(run, cfg, field, state):
    """Settings that cannot work together, before anything is computed."""
    require(cfg.guidance and cfg.evaluator, cfg, "guidance evaluator", "name at least one of each")
    if cfg.direction == "encode":
        require(not cfg.features and not cfg.sweep, cfg, "direction features sweep", "are for direction=generate")
        cfg.guidance, cfg.evaluate = [1.0], False         # whatever the YAML says
    require(cfg.sweep_steps or not cfg.sweep, cfg, "sweep_steps", "name at least one")
    if not field.condition and not cfg.autoguide and cfg.guidance != [1.0]:
        run.say("note: nothing can guide a model without labels: w = 1")
        cfg.guidance = [1.0]
    if cfg.autoguide and cfg.guidance == [1.0]:
        run.say("note: autoguide= changes nothing at guidance=1; name other w")
    require(cfg.interval[0] <= cfg.interval[1], cfg, "interval", "two times in order")
    require(cfg.evaluate or len(cfg.guidance) == 1 and not cfg.sweep, cfg, "guidance sweep evaluate",
            "to choose w, or to sweep, needs evaluate=true; without it name one w, guidance=W")
    null = state.get("null", True) and state["config"].get("train_guided", {}).get("drop", 1) > 0
    can_guide = null or not field.condition or cfg.autoguide or cfg.guidance == [1.0]
    require(can_guide, cfg, "guidance", "no null label to guide with; use guidance=1, or autoguide= another model")
    sample_labels(cfg, field, state, [0])                      # complains about labels
    if cfg.evaluate or cfg.direction == "encode":
        require_shape(run, state)
    made_of = state["config"].get("data", dict(latents=state["channels"] != 3))     # published: no data
    kind = "latents: name their" if made_of["latents"] else "pixels: name no"
    require(bool(made_of["latents"]) == bool(run.data.latents), run.data, "latents",
            f"{state['file']} makes {kind} autoencoder")
    if cfg.features:
        require(not cfg.compile, cfg, "features compile", "hooks need the plain network: use compile=false")
        from extract_features import check_pool, matching
        check_pool(cfg, "features_pool")
        cfg.features = matching(field.net, cfg.features)
        require(cfg.solver != "dopri5", cfg, "features solver", "use a fixed-step solver")
        stages = len(TABLEAUS[cfg.solver][0])
        evaluations = stages * (cfg.steps - 1) + min(stages, 2)                  # see `integrate`
        fits = cfg.features_at and max(cfg.features_at) < evaluations
        require(fits, cfg, "features_at", f"name some of the {evaluations} evaluations, from 0")


def recipe_of(run, cfg, field, state):
    """What decides about the results: settings that are in use, and hashes of the weights."""
    guides = cfg.guidance != [1.0]
    in_use = dict.fromkeys(["name", "overwrite", "batch", "compile"], False)
    in_use |= dict(steps=cfg.solver != "dopri5", tol=cfg.solver == "dopri5")
    told = cfg.direction == "generate" and field.condition is not None
    in_use |= dict(select=cfg.sweep or len(cfg.guidance) > 1, labels=told)
    in_use |= dict.fromkeys(["interval", "autoguide"], guides)
    in_use |= dict.fromkeys(["sweep", "sweep_steps"], cfg.sweep)
    in_use |= dict.fromkeys(["features", "features_at", "features_pool"], cfg.features)
    in_use |= dict.fromkeys(["evaluator", "reference"], cfg.evaluate)
    recipe = {name: value for name, value in run.sections[run.stage].items() if in_use.get(name, True)}
    recipe |= dict(hash=state["weights"], guidance=cfg.guidance, weak=state.get("weak") if guides else None)
    files = [digest(np.fromfile(name, np.uint8)) for name in cfg.evaluator if Path(name).is_file()]
    if cfg.evaluate and files:
        recipe["evaluators"] = files
    if cfg.evaluate or cfg.direction == "encode":         # these images take part
        recipe["images"] = [load_data(run, split).info["fingerprint"] for split in ("train", "test")]
    return recipe


def sample(run, cfg, field, state, folder):
    """Choose w, write and score the samples; what was measured, for metrics.json."""
    file, spare = folder / "images.npy", folder / "spare.npy"                    # spare: samples that are not kept
    measures = cfg.evaluate and run.rank == 0
    names, chooses = cfg.evaluator if measures else [], cfg.sweep or len(cfg.guidance) > 1
    compared = lambda name: [cfg.reference, OTHER[cfg.reference]][:1 + bool(chooses and name == names[0])]
    evaluators = {name: Evaluator(run, name, compared(name)) for name in names}
    first = evaluators[names[0]] if names else None       # it chooses w, by the other split
    metrics, w = {}, cfg.guidance[0]
    if len(cfg.guidance) > 1:
        w, metrics["selection"] = choose_w(run, cfg, field, state, first, spare)
    if cfg.sweep:
        metrics["nfe_sweep"] = sweep_nfe(run, cfg, field, state, w, first, spare)

    metrics |= dict(w=w) | generate(run, cfg, field, state, w, file)
    if run.rank == 0:
        labels = sample_labels(cfg, field, state, range(cfg.n))
        if labels is not None:
            np.save(folder / "labels.npy", labels.numpy())
        sample_sheet(cfg, field.condition, labels, w, folder)
    scored = {name: {"scores": evaluator.scores(file, cfg.reference)} for name, evaluator in evaluators.items()}

    if w != 1 and len(cfg.guidance) > 1:                  # the gain of guidance apart from that of labels
        generate(run, replace(cfg, features=[]), field, state, 1.0, spare)
        for name, evaluator in evaluators.items():
            scored[name]["scores_w1"] = evaluator.scores(spare, cfg.reference)
    if run.rank == 0:
        spare.unlink(missing_ok=True)
    if scored:
        metrics |= scored.pop(cfg.evaluator[0]) | dict(others=scored)
    return metrics


def main():
    """Sample, from the command line."""
    run = start("sample_ode", SampleOde, __doc__, needs_data=lambda cfg: cfg.evaluate or cfg.direction == "encode",
                otherwise=", or only sample with evaluate=false",
                flags={"--table": "all results of the run side by side, by their first evaluator"})
    cfg, folder = run.cfg, run.dir / "samples" / run.cfg.name
    if "--table" in run.flags:
        return table(run)

    # what to sample from, and whether that can be done
    require(min(cfg.n, cfg.select) >= run.world, cfg, "n select", "at least one sample for every process")
    context, _, why = autocast(run, cfg.precision)
    field, state = open_model(run, cfg, context)
    settle_request(run, cfg, field, state)
    recipe = recipe_of(run, cfg, field, state)
    if run.dry_run:
        say_network(run, field.net, state["channels"], state["size"])
        size = run.data.size if run.data.latents else state["size"]
        return run.say(f"{cfg.n:,} samples into {folder}: {cfg.n * 3 * size ** 2 / 1e6:,.0f} MB")
    made = folder / ("images.npy" if cfg.direction == "generate" else "noise.npy")
    done = lambda: finished(run, folder / "metrics.json", recipe, [made])
    if run.agreed(done):
        return
    open_autoencoder(run)
    run.say(f"sampling from {state['file']} ({state['seen']:,} images seen, averaged weights); {why}")

    # sample, in a folder that takes the place of an earlier one when it is complete
    metrics = {name: state.get(name) for name in ("seen", "num_labels", "label_file", "label_scores")}
    metrics |= dict(recipe=recipe, checkpoint=cfg.checkpoint, hash=state["weights"],
                    solver=cfg.solver, steps=cfg.steps, seed=cfg.seed, world=run.world)
    metrics["total_seen"] = state["seen"] + (state.get("init") or {}).get("seen", 0)     # with those of its start
    with making(run, "samples", cfg.name, "metrics.json", done) as aside:
        if cfg.direction == "generate":
            metrics |= sample(run, cfg, field, state, aside)
        elif run.rank == 0:
            metrics |= encode(run, cfg, field, aside)
        if run.rank == 0:
            write_json(aside / "metrics.json", metrics)
    scores = metrics.get("scores", {})
    run.say("  ".join(f"{k} {v:.3f}" for k, v in (metrics | scores).items() if isinstance(v, float)))
    if scores:
        run.say(f"{scores['evaluator']}; floor, ceiling: as many other real images; test images memorise 1, copy 1 %")
        for s in (m["scores"] for m in (metrics, *metrics["others"].values()) if m["scores"]["singular"]):
            run.say(f"note: {s['evaluator'].split()[0]}: of {s['samples']:,} samples (reference: {s['reference']}) in "
                    f"{s['evaluator_features']:,} features. With no more of either than features a covariance is "
                    "singular, and the distance means little: raise n, or compare with more images")
    run.say(f"samples in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


if __name__ == "__main__":
    cli(main)

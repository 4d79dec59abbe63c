"""Probe: how discriminative a model's features are; and, after train_diffusion.py, which block and time the next stages use.

Reads   {diffusion,guided}/<name>/checkpoint.pt and data/{train,test}
Writes  probe/<name>.json and probe/<name>.png; protocol=select also probe/<name>.yaml
Time    t = 0 is noise, t = 1 is data.

    python probe.py configs/shapes.yaml                                          # protocol=sweep: block x time, CPU, under a minute
    python probe.py configs/cifar10.yaml protocol=linear name=linear             # one GPU: linear probe and kNN of one activation, with controls
    python probe.py configs/cifar10.yaml protocol=head head=difformer activations=mid-repeat1-res-out,up-level?-repeat1-res-out t=0.7,0.8,0.95 labels_share=0.1
    python probe.py configs/cifar10.yaml protocol=select activations='*' t=0.6,0.8,0.95             # which kinds of activation are worth reading
    python probe.py configs/shapes.yaml protocol=boxes                           # which activation and time to find boxes and masks with
    torchrun --nproc_per_node=8 probe.py configs/cifar10.yaml                    # eight GPUs share the times of the sweep

sweep   scores every block x time by NMI of k-means (on the images it clusters), kNN and a linear probe (on a validation part of the training images), and by
        criteria that need no labels; no features are stored. `label_free` is what extract_features.py reads; `oracle`, the choice made with labels, is only
        reported beside it.
boxes   finds a box in `boxed` training images by every block x time; those that agree with the boxes of all others and of other noise are best. No labels.
linear  (of one activation, or several side by side) trains on the training images outside the validation part, selects on that part, reports the test
        images once; with raw pixels, the same network with random weights and a supervised network of the same size beside it.
head    trains a head on the fly: fresh noise for every image seen, flips and crops if asked for; linear, MLP, CNN, attention (arXiv 2307.08702), DifFormer and
        DifFeed (2311.17921). Learning rate and l2 are selected on the validation part, the test images are reported once; several seeds; controls beside it.
        Of several activations and times linear, MLP and DifFormer read all, the others the best one (ridge classifier, validation part).
select  measures noise sensitivity, granularity and locality of activations, filters them by the rules of 2410.03558, ranks the rest with a linear probe.
segment semantic segmentation from frozen maps by head=linear, uper, or ensemble (pixel MLPs from few masks, with uncertainty: arXiv 2112.03126); mean IoU.
correspond  nearest neighbours between an image and its known warp, and between objects of one class: parts known to `shapes`, else places in their boxes; PCK.
detect  objects by torchvision's Mask R-CNN, or where only boxes are known Faster R-CNN, on a pyramid of frozen maps; average precision.
cka     how alike activations are, across blocks, times and models (against=), and how they spread: alignment and uniformity. Needs no labels.
"""
import copy
import dataclasses
import functools
import itertools
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from torch import nn

from configs.data import as_input, load_data, load_features, prepare_data, require_shape, row_shape
from configs.run import (Data, Model, UserError, atomic, autocast, bar, cli, draw, fill, finished, key, read_json, require,
                         save_grid, seed_of, seeded, start, write_json)
from configs.shapes import shape_parts
from train_diffusion import PATHS, Block, UViT, build_model, diffuse, load_checkpoint, load_model, say_network
from extract_features import catalogue, cost_shares, matching, noise_level, reader, stream
from self_label import assign, bounds, corloc, find_objects, iou, kmeans, largest_component, nmi

FIT_KEYS = {"width", "images", "head_batch", "lr", "l2", "flip", "crop", "seeds"}
KEYS = dict(head=FIT_KEYS | {"head", "labels_share", "per_class", "depth", "heads", "side", "grid", "hidden", "finetune"},       # that only these protocols read
            select={"measured", "noisy", "fine", "local"}, segment=FIT_KEYS | {"head", "masks", "members"}, correspond={"pairs", "points"},
            detect=FIT_KEYS | {"masks"}, cka={"grid", "against", "compared"}, boxes={"boxed"})


@dataclass
class Probe:
    """Section `probe`."""
    name: str = key("", "results go to probe/<name>.json; empty = the protocol")
    protocol: Literal["sweep", "boxes", "linear", "head", "select", "segment", "correspond", "detect", "cka"] = key("sweep",
        "what is measured: see above")
    checkpoint: str = key("diffusion/base",
                          "a folder of the run, a .pt file, or published weights: adm:, ddpm:, uvit:, sgfm:FILE")
    weights: Literal["ema", "net"] = key("ema", "averaged or raw")
    activations: list[str] = key(["blocks"],
                                 "names and globs; blocks = every block output, for linear and head the label-free "
                                 "choice")
    features: str = key("",
                        "linear, head: stored features/<name>, of any model that extract_features.py reads, in place "
                        "of the checkpoint")
    t: list[float] = key([], "noise times; empty = 0.4,0.5,...,0.9, for linear and head the label-free choice")
    choice: str = key("sweep",
                      "linear, head, segment, detect: which sweep to take the default activation and time from")
    fit: int = key(2_000, "sweep, select: training images to fit on")
    validation: int = key(1_000, "training images held out for selection")
    K: int = key(30, "sweep: clusters of k-means")
    boxed: int = key(128, "boxes: images in which boxes are found")
    neighbours: int = key(20, "sweep: k of kNN (cosine); linear tries 1, 5, 20, 50")
    draws: int = key(3, "noise draws; linear: each probed alone, head: each tested: mean and spread")
    controls: list[Literal["pixels", "random", "supervised"]] = key(["pixels", "random", "supervised"],
        "linear, head, segment, detect, correspond: rows to compare with")
    supervised_images: int = key(100_000, "images that the supervised control is trained on")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network")
    batch: int = key(500, "images per forward pass and process")
    transfer: str = key("",
                        "YAML whose `data:` section is probed in place of the run's images: do features carry over?")
    seed: int = key(0, "of noise, k-means, controls")
    overwrite: bool = key(False, "replace a result of another recipe under this name")
    head: Literal["linear", "mlp", "cnn", "attention", "difformer", "diffeed", "uper", "ensemble"] = key("attention",
        "segment: linear, last two; head: the others")
    labels_share: float = key(1.0, "head: share of the labels of each class, of training and of validation images")
    per_class: int = key(0, "head: or so many of each class, of both")
    width: int = key(256,
                     "head, segment, detect: channels of the head; cnn, attention, difformer, diffeed (papers: 1024),"
                     " uper, Mask R-CNN")
    depth: int = key(2, "head: transformer blocks of attention, difformer, diffeed")
    heads: int = key(8, "head: attention heads of these")
    side: int = key(16, "head: larger maps are averaged to so many positions per side before they become tokens")
    grid: int = key(2, "head, cka: linear and mlp and the comparison see averages over a grid of g x g")
    hidden: list[int] = key([512], "head: hidden sizes of mlp")
    images: int = key(100_000, "head, segment, detect: images that every head sees")
    head_batch: int = key(128, "head, segment, detect: images per update")
    lr: list[float] = key([3e-4, 1e-3, 3e-3],
                          "head, segment, detect: AdamW, one cycle; selected on the validation part")
    l2: list[float] = key([0.0, 0.05], "head, segment, detect: weight decay; selected with lr")
    finetune: float = key(0.0, "head: above 0, the network is trained, too, at so many times the head's lr")
    flip: bool = key(False, "head, segment: mirror images at random")
    crop: int = key(0, "head, segment: shift images by up to so many pixels")
    seeds: list[int] = key([0, 1, 2], "head, segment, detect: of labelled subset, weights, order, noise")
    measured: int = key(64, "select: images whose maps are measured")
    noisy: float = key(1.0,
                       "select: keep up to so many times the median noise sensitivity of the block outputs at that "
                       "time")
    fine: float = key(0.5,
                      "select: keep from so many times the median granularity of the block outputs of that map size")
    local: float = key(1.25,
                       "select: keep up to so many times the median locality of the block outputs of that map size")
    masks: int = key(0,
                     "segment, detect: training images whose masks are used (and at most so many to validate); 0 = "
                     "all")
    members: int = key(10, "segment: networks of the ensemble")
    pairs: int = key(200, "correspond: pairs of images, to choose from and again to report")
    points: int = key(8, "correspond: points per pair")
    against: list[str] = key([], "cka: further checkpoints, or random, for the same network with random weights")
    compared: int = key(2_000, "cka: test images")


def probed(run, split):
    """One part of the images that are probed: the run's own, or those of transfer=."""
    return load_data(replace(run, dir=run.dir / "transfer" / Path(run.cfg.transfer).stem) if run.cfg.transfer else run, split)


def prepare_transfer(run, size):
    """Prepare the images that the YAML transfer= names, at the model's size, below transfer/; the fingerprints of both parts."""
    file, folder = Path(run.cfg.transfer), run.dir / "transfer" / Path(run.cfg.transfer).stem
    try:
        section = (yaml.safe_load(file.read_text()) or {}).get("data") or {}
    except (OSError, yaml.YAMLError, AttributeError, UnicodeDecodeError) as e:
        raise UserError(f"transfer={file}: not a readable YAML with sections ({str(e).splitlines()[0]})") from None
    data = fill("data", Data, section | dict(size=size, latents=""))
    described, there = {k: v for k, v in dataclasses.asdict(data).items() if k not in ("root", "download")}, folder / "data.json"
    if there.exists() and read_json(there, f"delete {folder}") != described:
        raise UserError(f"{folder}: was prepared from another data section than that of {file}; rename the YAML, or delete the folder")
    if run.dry_run:
        return None
    if run.rank == 0:
        write_json(there, described)
    prepare_data(replace(run, dir=folder, data=data))
    return {split: probed(run, split).info["fingerprint"] for split in ("train", "test")}


def mean_std(values):
    """Mean and standard deviation (n - 1 in the denominator, as in sample_ode.py --table), None of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def plus_minus(std, digits=4):
    """A standard deviation as text, or nothing."""
    return "" if std is None else f" +- {std:.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------
# Scores of features with labels: linear probe and kNN

def standardise(fit, *others):
    """Zero mean and unit variance by the statistics of `fit`; all [N, D]."""
    m, s = fit.mean(0), fit.std(0).clamp(min=1e-6)
    return [(x - m) / s for x in (fit, *others)]


def ridge(x, y, classes, l2):
    """Least-squares classifier on one-hot targets, closed form. x [N, D], y [N] -> weights [D + 1, classes]; ridge l2 per sample, bias free."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    penalty = torch.full((x.shape[1],), l2 * len(x), dtype=torch.float64)
    penalty[-1] = 0
    return torch.linalg.solve(x.T @ x + torch.diag(penalty), x.T @ F.one_hot(y, classes).double()).float()


SWEEP = 3e-4                                              # tolerance of the many probes of a sweep: their accuracy is within 0.3 points of converged ones


def logistic(x, y, classes, l2, start=None, tolerance=1e-5, iterations=1000):
    """Multinomial logistic regression. x [N, D], y [N] -> weights [D + 1, classes]; l2 on the weights, not the bias; start: weights to begin with.

    Solved for u, where w = u C^-1 and CC' = X'X / 2N + l2. The Hessian of each class is nowhere above CC' (Boehning 1992), so that of u is nowhere above 1.
    First by accelerated steps, restarted when they point uphill (arXiv 1204.3982): two products with X each, in the layout [classes, N], in which a softmax
    is cheap. They are enough unless l2 is small; then L-BFGS goes on.
    """
    x = torch.cat([x, torch.ones(len(x), 1)], 1).T.contiguous()                  # [D + 1, N]
    penalty = torch.full((len(x),), l2, dtype=torch.float64)
    penalty[-1] = 0
    gram = sum((part := v.double()) @ part.T for v in x.split(4096, 1))          # in float32 it may have eigenvalues below zero
    C = torch.linalg.cholesky(gram / (2 * len(y)) + torch.diag(penalty + 1e-6))
    back = torch.linalg.solve_triangular(C, torch.eye(len(C), dtype=C.dtype), upper=False).float()
    target, penalty = F.one_hot(y, classes).T.float(), penalty.float()

    def slope(w, p):                                      # p: probabilities [classes, N]
        return ((p - target) @ x.T / len(y) + penalty * w) @ back.T

    u = ahead = torch.zeros(classes, len(x)) if start is None else (start.T.double() @ C).float()
    momentum = 1.0
    for _ in range(min(100, iterations)):
        w = ahead @ back
        g = slope(w, torch.softmax(w @ x, 0))
        if g.abs().max() < tolerance:
            return w.T
        new = ahead - g
        momentum = 1.0 if (g * (new - u)).sum() > 0 else momentum
        following = (1 + math.sqrt(1 + 4 * momentum ** 2)) / 2
        ahead, u, momentum = new + (momentum - 1) / following * (new - u), new, following
    u = u.clone().requires_grad_()
    solver = torch.optim.LBFGS([u], max_iter=iterations, history_size=10, tolerance_grad=tolerance, tolerance_change=1e-8, line_search_fn="strong_wolfe")

    @torch.no_grad()
    def closure():
        w = u @ back
        z = w @ x                                         # [classes, N]
        norm = z.logsumexp(0)
        u.grad = slope(w, (z - norm).exp())
        return (norm - (z * target).sum(0)).mean() + 0.5 * (penalty * w.square()).sum()

    solver.step(closure)
    return (u.detach() @ back).T


def accuracy(w, x, y):
    """Share of rows that the linear classifier w [D + 1, classes] gets right."""
    return float(((x @ w[:-1] + w[-1]).argmax(1) == y).float().mean())


def knn(fit, y, x, truth, k, classes):
    """Accuracy of the majority vote of the k nearest rows of `fit` (cosine; ties to the nearer class sum)."""
    fit, right = F.normalize(fit, dim=1), 0
    for i in range(0, len(x), 1000):
        near = (F.normalize(x[i:i + 1000], dim=1) @ fit.T).topk(min(k, len(fit)), 1)                             # [b, k]
        votes = torch.zeros(len(near.indices), classes).scatter_add_(1, y[near.indices], 1 + 1e-3 * near.values)
        right += int((votes.argmax(1) == truth[i:i + 1000]).sum())
    return right / len(x)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of features without labels

def label_free_scores(a, b, K, seed):
    """Scores that see no label, of features a [N, D] and, unless b is None, the same images under other noise: (dict of numbers, cluster ids int64 [N] of a).

    silhouette  mean simplified silhouette (distance to own centroid against the next one), cosine
    stability   with b: NMI between k-means of a and k-means of b, started from a's centroids: clusters that are about the image survive other noise
    """
    c, _, _ = kmeans(a, K, metric="cosine", seed=seed)
    d, ids = (1 - F.normalize(a, dim=1) @ c.T).clamp(min=0).topk(2, 1, largest=False).values, assign(a, c, "cosine")[0].numpy()       # d [N, 2]: own, next
    scores = dict(silhouette=float((1 - d[:, 0] / d[:, 1].clamp(min=1e-9)).mean()))
    if b is not None:
        scores["stability"] = nmi(ids, assign(b, kmeans(b, K, metric="cosine", start=c)[0], "cosine")[0].numpy())
    return scores, ids


def consensus(ids):
    """Mean NMI of each clustering with all the others, [n] from int64 [n][N].

    Over the blocks of one network at one noise time, this is high where every depth finds the same groups. With ever less noise all blocks see
    the same image and agree more and more, so of times that agree about equally the noisiest is taken. (How well this and the other criteria
    follow true classes is measured in the README; none does everywhere.)
    """
    m = np.array([[nmi(a, b) if i < j else 0.0 for j, b in enumerate(ids)] for i, a in enumerate(ids)])
    return (m + m.T).sum(1) / max(len(ids) - 1, 1)


def rank_correlation(a, b):
    """Spearman's rho of two lists; equal values share a rank, and a constant list correlates with nothing."""
    def ranks(v):
        _, at, n = np.unique(v, return_inverse=True, return_counts=True)
        return (n.cumsum() - n / 2)[at]
    ra, rb = ranks(a), ranks(b)
    return float(np.corrcoef(ra, rb)[0, 1]) if np.ptp(ra) and np.ptp(rb) else 0.0


def heat_map(path, values, rows, columns, title, marks=()):
    """Matrix as PNG with Pillow: values [R][C] (None = blank), captions, `marks` [(row, column, letter)]. Colours alone where there are many columns."""
    many = len(columns) > 30
    cell_w, cell_h, left, top = 18 if many else 62, 18, 8 + 7 * max(map(len, rows)), 46
    sheet = Image.new("RGB", (left + cell_w * len(columns) + 12, top + cell_h * len(rows) + 12), "white")
    pen, flat = ImageDraw.Draw(sheet), [v for r in values for v in r if v is not None]
    lo, hi = min(flat), max(flat)
    pen.text((8, 8), title, "black")
    for c, name in enumerate(columns):
        pen.text((left + c * cell_w + (2 if many else 12), top - 16), name, "black")
    for r, name in enumerate(rows):
        pen.text((6, top + r * cell_h + 3), name, "black")
        for c, v in enumerate(values[r]):
            if v is None:
                continue
            q = (v - lo) / max(hi - lo, 1e-9)
            colour = tuple(int(255 * (a + (b - a) * q)) for a, b in zip((0.97, 0.98, 1.0), (0.03, 0.25, 0.50)))
            box = [left + c * cell_w, top + r * cell_h, left + (c + 1) * cell_w - 2, top + (r + 1) * cell_h - 2]
            pen.rectangle(box, fill=colour)
            mark = "".join(f" {m}" for i, j, m in marks if (i, j) == (r, c))
            if not many:
                pen.text((box[0] + 8, box[1] + 2), f"{v:.3f}{mark}", "white" if q > 0.5 else "black")
    with atomic(path) as f:
        sheet.save(f, "PNG")


def block_outputs(net):
    """Names of the catalogue that are the output of a whole block (between modules, not inside them)."""
    return matching(net, ["blocks"])


def vectors(net, state, images, rows, names, times, **options):
    """Pooled features of `rows`, {(name, t): float32 [len(rows), D]}, on the CPU; options as of `stream`."""
    parts = {}
    for _, out in stream(net, state, images, rows, names, times, **options):
        for key, value in out.items():
            parts.setdefault(key, []).append(value.cpu())
    return {key: torch.cat(v) for key, v in parts.items()}


def sweep(run, cfg, net, state, context):
    """Score every (activation, t); returns the result dict and draws the heat-map."""
    data = probed(run, "train")
    names = block_outputs(net) if cfg.activations == ["blocks"] else matching(net, cfg.activations)
    classes = np.asarray(data.classes)
    order = np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(len(data))
    fit_rows, val_rows = np.sort(order[:cfg.fit]), np.sort(order[cfg.fit:cfg.fit + cfg.validation])
    if len(val_rows) < 10:
        raise UserError(f"fit={cfg.fit} and validation={cfg.validation}: the run has only {len(data)} training images")
    known, count, K = (classes >= 0).all(), int(classes.max()) + 1, cfg.K
    if K >= len(fit_rows):
        raise UserError(f"K={K}: must be below fit={len(fit_rows)}")
    y_fit, y_val = torch.from_numpy(classes[fit_rows]), torch.from_numpy(classes[val_rows])
    table, mine, few = [], cfg.t[run.rank::run.world], len(names) <= 2           # one or two activations have nothing to agree with: the most stable is chosen
    criterion = "stability" if few else "consensus"

    def read(rows, t, draw_number):                       # {name: [N, D]} for all names from one pass
        out = vectors(net, state, data.inputs, rows, names, [t], device=run.device, context=context, seed=cfg.seed, purpose=f"probe {draw_number}", batch=cfg.batch)
        return {n: v for (n, _), v in out.items()}

    with bar(run, len(mine) * len(names), "sweep", "cell") as progress:
        for t in mine:
            a, b, v = read(fit_rows, t, 0), read(fit_rows, t, 1) if few else {}, read(val_rows, t, 0)
            rows, clusters = [], []
            for n in names:
                mean = a[n].mean(0)                       # centred: activations share a large common direction
                free, ids = label_free_scores(a[n] - mean, b[n] - mean if few else None, K, cfg.seed)
                rows.append(dict(activation=n, **noise_level(state["path"], t), **free))
                clusters.append(ids)
                if known:
                    fa, fv = standardise(a[n], v[n])
                    rows[-1] |= dict(nmi=nmi(ids, y_fit.numpy()), linear=accuracy(logistic(fa, y_fit, count, 1e-3, tolerance=SWEEP), fv, y_val),
                                     knn=knn(a[n] - mean, y_fit, v[n] - mean, y_val, cfg.neighbours, count))
                progress.update(1)
            table += [r | dict(consensus=float(c)) for r, c in zip(rows, consensus(clusters))]
    table = sorted(itertools.chain(*run.gather(table)), key=lambda r: (names.index(r["activation"]), r["t"]))
    pick = lambda key: {k: max(table, key=lambda r: r[key])[k] for k in ("activation", "t", "rho", "log_snr", key)}
    # the noisiest time at which the blocks still agree about as well as anywhere, and there the block that agrees most
    best = {t: max(r["consensus"] for r in table if r["t"] == t) for t in cfg.t}
    noisiest = min(t for t in best if best[t] >= 0.97 * max(best.values()))
    chosen = max((r for r in table if few or r["t"] == noisiest), key=lambda r: r[criterion])
    result = dict(K=K, fit=len(fit_rows), validation=len(val_rows), criterion=criterion + ", noisiest time within 3 %" * (not few),
                  label_free={k: chosen[k] for k in ("activation", "t", "rho", "log_snr", criterion)})
    if known:
        result |= dict(label_free_scores={k: chosen[k] for k in ("nmi", "knn", "linear")}, oracle={k: pick(k) for k in ("nmi", "knn", "linear")},
                       tracks_nmi={k: rank_correlation([r[k] for r in table], [r["nmi"] for r in table]) for k in (criterion, "silhouette")})
    result["table"] = table
    if run.rank == 0:
        shown = "nmi" if known else criterion
        times, cell = sorted(cfg.t), {(r["activation"], r["t"]): r for r in table}
        surface = lambda key: [[cell[n, t][key] for t in times] for n in names]
        where = lambda c, m: (names.index(c["activation"]), times.index(c["t"]), m)
        marks = [where(result["label_free"], "F")] + ([where(result["oracle"]["nmi"], "O")] if known else [])
        heat_map(run.dir / "probe" / f"{cfg.name}.png", surface(shown), names, [f"t={t:g}" for t in times],
                 f"{shown} of k-means (K={K}) by block and time; F = label-free choice" + (", O = best with labels" if known else ""), marks)
        if known:
            heat_map(run.dir / "probe" / f"{cfg.name}-linear.png", surface("linear"), names, [f"t={t:g}" for t in times],
                     "validation accuracy of a linear probe by block and time; F = label-free choice, O = best", [marks[0], where(result["oracle"]["linear"], "O")])
    run.say(f"label-free choice: {chosen['activation']} at t={chosen['t']:g} ({criterion} {chosen[criterion]:.3f})" + (
        f"; NMI {chosen['nmi']:.3f}, linear probe {chosen['linear']:.3f}; with labels one would take {result['oracle']['nmi']['activation']} "
        f"at t={result['oracle']['nmi']['t']:g} (NMI {result['oracle']['nmi']['nmi']:.3f}); rank correlation of {criterion} with NMI "
        f"{result['tracks_nmi'][criterion]:.2f}" if known else ""))
    return result


def box_agreement(a, b):
    """Mean IoU of two sets of boxes [N, 4] of the same images, less that of boxes of different images: a box that is always in the same place agrees with nobody."""
    return float(iou(a, b).mean() - iou(a, np.roll(b, 1, 0)).mean())


def boxes(run, cfg, net, state, context):
    """Score every (activation, t) by the boxes found with it (LOST), without labels; returns the result dict and draws the heat-map.

    stability  agreement of the boxes under two noise draws. consensus: mean agreement with the boxes of all other activations and times. Stability alone would
    take the least noise, consensus alone the coarse middle of the network, where boxes are loose: the choice is the greatest sum.
    """
    data = probed(run, "train")
    names, times = block_outputs(net) if cfg.activations == ["blocks"] else matching(net, cfg.activations), sorted(set(cfg.t))
    rows = np.sort(np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(len(data))[:cfg.boxed])
    if len(names) * len(times) < 2 or len(rows) < 2:
        raise UserError(f"protocol=boxes compares activations and times, on at least two images; got {len(names)} x {len(times)} on {len(rows)}")
    size, mine = data.images.shape[2:], {}
    with bar(run, len(times), "boxes", "time") as progress:
        for t in times[run.rank::run.world]:
            for noise in range(2):
                for part, out in stream(net, state, data.inputs, rows, names, [t], device=run.device, context=context, pool="none", seed=cfg.seed,
                                        purpose=f"probe {noise}", batch=min(cfg.batch, 64)):
                    for name in names:
                        x = out[name, t]
                        if min(x.shape[2:]) >= 2:
                            got = find_objects(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]), size, "lost")["boxes"][:, 0]
                            mine.setdefault((name, t), [[], []])[noise].append(got.cpu().numpy())
            progress.update(1)
    found = {k: [np.concatenate(v) for v in pair] for some in run.gather(mine) for k, pair in some.items()}
    found = {(n, t): found[n, t] for n in names for t in times if (n, t) in found}
    truth = None if data.boxes is None else np.asarray(data.boxes[rows]).reshape(len(rows), -1, 4)
    mutual, table = np.array([[box_agreement(a[0], b[0]) for b in found.values()] for a in found.values()]), []
    for i, ((name, t), (a, b)) in enumerate(found.items()):
        free = dict(stability=box_agreement(a, b), consensus=float(np.delete(mutual[i], i).mean()))
        table.append(dict(activation=name, **noise_level(state["path"], t), **free, agreement=sum(free.values())))
        if truth is not None:
            table[-1] |= dict(corloc=corloc(a[:, None], truth), iou=float(iou(a[:, None], truth).max(1).mean()))
    chosen = max(table, key=lambda r: r["agreement"])
    result = dict(images=len(rows), method="lost", criterion="stability + consensus",
                  label_free={k: chosen[k] for k in ("activation", "t", "rho", "log_snr", "agreement", "stability", "consensus")})
    if truth is not None:
        best = max(table, key=lambda r: r["iou"])
        tracks = {k: {s: rank_correlation([r[k] for r in table], [r[s] for r in table]) for s in ("corloc", "iou")}
                  for k in ("agreement", "stability", "consensus")}
        result |= dict(label_free_scores={k: chosen[k] for k in ("corloc", "iou")}, oracle={k: best[k] for k in ("activation", "t", "corloc", "iou")}, tracks=tracks)
    result["table"], shown = table, "agreement" if truth is None else "iou"
    if run.rank == 0:
        values = {(r["activation"], r["t"]): r[shown] for r in table}
        rows_shown = [n for n in names if any((n, t) in values for t in times)]
        where = lambda c, m: (rows_shown.index(c["activation"]), times.index(c["t"]), m)
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[values.get((n, t)) for t in times] for n in rows_shown], rows_shown, [f"t={t:g}" for t in times],
                 f"{shown} of boxes by block and time; F = label-free choice" + (", O = best with true boxes" if truth is not None else ""),
                 [where(chosen, "F")] + ([where(result["oracle"], "O")] if truth is not None else []))
    run.say(f"label-free choice: {chosen['activation']} at t={chosen['t']:g} (agreement {chosen['agreement']:.3f})" + (
        f"; CorLoc {chosen['corloc']:.3f}, IoU {chosen['iou']:.3f}; with true boxes one would take {best['activation']} at t={best['t']:g} "
        f"(CorLoc {best['corloc']:.3f}, IoU {best['iou']:.3f}); rank correlation of agreement with IoU "
        f"{tracks['agreement']['iou']:.2f}" if truth is not None else ""))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Linear probe and kNN with controls

def train_supervised(run, cfg, state, data, name, classes):
    """A network of the same architecture and size, trained with labels on clean images up to activation `name`: what labels would give."""
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], seed=cfg.seed).to(run.device).eval()   # no dropout
    read, one = reader(net, [name]), torch.ones(1, device=run.device)
    with torch.no_grad():
        size = read(torch.zeros(1, state["channels"], state["size"], state["size"], device=run.device), one)[0].shape[1]
    with seeded(cfg.seed, "supervised head"):
        head = nn.Linear(size, classes).to(run.device)
    context, batch = autocast(run, "auto" if cfg.precision == "fp16" else cfg.precision)[0], 128         # fp16 would need scaled gradients
    steps = max(1, cfg.supervised_images // batch)
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps + 1)
    train_rows = data["rows"]
    with bar(run, steps, "supervised control", "step") as progress:
        for step in range(steps):
            rows = np.sort(np.random.default_rng(seed_of(cfg.seed, "supervised rows", step)).choice(train_rows, batch))
            x = as_input(torch.from_numpy(np.asarray(data["images"][rows])).to(run.device))
            with context():
                loss = F.cross_entropy(head(read(x, one.expand(batch))[0]).float(), data["y"][rows].to(run.device))
            loss.backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
            progress.update(1)
    return net.requires_grad_(False)


def random_network(run, cfg, state):
    """The same network with random weights."""
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], seed=cfg.seed + 1).to(run.device).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed_of(cfg.seed, "random weights"))
    for p in net.parameters():                            # zero-initialised branches would make it blind
        if not p.any() and p.dim() > 1:
            p.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=g))
    return net


def one_activation(run, cfg, net):
    """The label-free choice of a sweep, (activation, time); at another time if one is named."""
    choice = read_json(run.dir / "probe" / f"{cfg.choice}.json", "run probe.py protocol=sweep first, or name activations= and t=")
    if "label_free" not in choice:
        raise UserError(f"choice={cfg.choice}: probe/{cfg.choice}.json is no sweep")
    return matching(net, [choice["label_free"]["activation"]])[0], cfg.t[0] if len(cfg.t) == 1 else choice["label_free"]["t"]    # several times are the sweep's grid


def split_rows(cfg, n):
    """(training rows to learn from, rows to select on), a fifth of the n rows at most; a function of the seed."""
    require(n >= 5, cfg, "validation", f"there are only {n} training images, too few to select on some")
    order, held = np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(n), min(cfg.validation, n // 5)
    return order[held:], order[:held]


def unlearnt(y, y_test):
    """The classes of the test part that the training part lacks, as text, or nothing. Below 0 = void."""
    new = np.setdiff1d(y_test[y_test >= 0], y)
    return ", ".join(map(str, new[:10])) + ", ..." * (len(new) > 10)


def known_classes(run, protocol):
    """Training and test part of the data with their classes as tensors; a missing class is a UserError."""
    parts = [probed(run, split) for split in ("train", "test")]
    y = [torch.from_numpy(np.array(p.classes)) for p in parts]
    if any((c < 0).any() for c in y):
        raise UserError(f"protocol={protocol} needs the class of every image, and this data lacks some")
    if protocol != "select" and (new := unlearnt(*y)):    # it reads the training part alone
        raise UserError(f"protocol={protocol}: the test images have class {new}, the training images do not; keep the same classes in both (data.classes, data.train)")
    return *parts, *y                                     # two Splits, two int64 [N]


def linear(run, cfg, net, state, context):
    """Linear probe and kNN of one activation, or of stored ones side by side: select on the validation part, report the test part once; controls beside it."""
    train, test, y, y_test = known_classes(run, "linear")
    names, times = ([], []) if cfg.features else places(run, cfg, net)
    require(times or cfg.features, cfg, "t", "name one or more noise times")
    classes, (fit, val) = int(y.max()) + 1, map(np.sort, split_rows(cfg, len(train)))

    def read(model, split, d, levels):                    # features [N, D] of one noise draw, all side by side
        images = (train if split == "train" else test).inputs
        out = vectors(model, state, images, np.arange(len(images)), names, levels, device=run.device, context=context, seed=cfg.seed,
                      purpose=f"linear {split} {d}", batch=cfg.batch)
        return torch.cat([out[key] for key in itertools.product(names, levels)], 1)

    def score(a, b):                                      # a: train features, b: test features -> accuracies and what was selected
        f, v, te = standardise(a[fit], a[val], b)
        fits, w = {}, None
        for l2 in (1e-2, 1e-3, 1e-4, 1e-5):               # each starts where the last one ended
            fits[l2] = w = logistic(f, y[fit], classes, l2, start=w)
        best = max(fits, key=lambda l2: accuracy(fits[l2], v, y[val]))
        k = max((1, 5, 20, 50), key=lambda k: knn(f, y[fit], v, y[val], k, classes))
        return dict(linear=accuracy(fits[best], te, y_test), knn=knn(f, y[fit], te, y_test, k, classes), l2=best, k=k)

    def stored(split):                                    # the same from features/<name>
        part = Stored(run, cfg.features, split)
        return torch.cat([part.pooled(n, t, np.arange(len(part.maps[0][0]))) for n, t in itertools.product(part.names, part.times)], 1), part

    rows, sources = {}, {} if cfg.features else {"features": (net, times)}
    if cfg.features:
        (a, part), (b, _) = stored("train"), stored("test")
        rows["features"] = score(a, b) | dict(activation=part.names, t=part.times, passes=len(part.times) * part.info["draws"], parameters=(a.shape[1] + 1) * classes)
        run.say(f"{'features':24} linear {rows['features']['linear']:.4f}             kNN {rows['features']['knn']:.4f}")
    elif "random" in cfg.controls:
        sources["random weights"] = random_network(run, cfg, state), times
    if "supervised" in cfg.controls and not cfg.features:
        sources["supervised, same size"] = train_supervised(run, cfg, state, dict(images=train.inputs, y=y, rows=fit), names[-1], classes), [1.0]
    for what, (model, levels) in sources.items():
        scores, noisy = [], levels != [1.0]
        for d in range(cfg.draws if noisy else 1):
            a, b = (read(model, split, d, levels) for split in ("train", "test"))
            scores.append(score(a, b))
        row = rows[what] = dict(activation=names, t=levels, passes=len(levels), parameters=(a.shape[1] + 1) * classes, draws=len(scores))
        for k in ("linear", "knn"):
            row[k], row[f"{k}_std"] = mean_std([s[k] for s in scores])
        row |= dict(l2=scores[0]["l2"], k=scores[0]["k"])
        run.say(f"{what:24} linear {row['linear']:.4f}{plus_minus(row['linear_std']):10}   kNN {row['knn']:.4f}{plus_minus(row['knn_std'])}")
    if "pixels" in cfg.controls:
        side = min(32, train.images.shape[2])             # larger images are averaged: many columns cost much and tell little
        flat = lambda d: torch.cat([F.adaptive_avg_pool2d(scaled(d.images, slice(i, i + 1000), "cpu"), side).flatten(1) for i in range(0, len(d), 1000)])
        rows["raw pixels"] = score(flat(train), flat(test)) | dict(side=side, passes=0, parameters=(3 * side ** 2 + 1) * classes)
        run.say(f"{'raw pixels':24} linear {rows['raw pixels']['linear']:.4f}             kNN {rows['raw pixels']['knn']:.4f}")
    if run.rank == 0:
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[r["linear"], r["knn"]] for r in rows.values()], list(rows), ["linear", "kNN"],
                 "test accuracy, " + (f"features/{cfg.features}" if cfg.features else f"{', '.join(names)} at t = {', '.join(map(str, times))}"))
    return dict(train_images=len(fit), validation_images=len(val), test_images=len(test), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Heads. All are called as head(maps, x_t, t) with maps [T][n] of [B, C, H, W] -> logits [B, classes]

class Single(nn.Sequential):
    """Layers that read one map, the first."""

    def forward(self, maps, *_):
        return super().forward(maps[0][0])


class PooledHead(nn.Sequential):
    """Linear probe or MLP on averages over a grid (arXiv 2307.08702: 2 x 2) of all maps side by side, normalised per feature. shapes: (C, H, W) of all maps.

    The grid is no finer than a map.
    """

    def __init__(self, shapes, classes, grid, hidden=()):
        sizes = [sum(c * min(grid, h) * min(grid, w) for c, h, w in shapes), *hidden, classes]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(nn.BatchNorm1d(sizes[0], affine=False), *layers[:-1])
        self.grid = grid

    def forward(self, maps, *_):
        grids = [F.adaptive_avg_pool2d(m, (min(self.grid, m.shape[2]), min(self.grid, m.shape[3]))) for blocks in maps for m in blocks]
        return super().forward(torch.cat([g.flatten(1) for g in grids], 1))


def cnn_head(channels, classes, width):
    """Twice 3x3 convolution, norm, ReLU; average; linear. (The paper's exact shape is not published.)"""
    layer = lambda a: [nn.Conv2d(a, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return Single(*layer(channels), *layer(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class DifFormer(nn.Module):
    """DifFormer (arXiv 2311.17921): maps of several blocks become tokens of one transformer, once per time; its CLS vectors of all times are concatenated.

    With one block and one time this is the attention head of 2307.08702. Papers: width 1024, depth 2, heads 8, side 16; no positions.
    shapes: (C, H, W) of each block; hidden: width of the feed-forward parts, 0 = 4 x width.
    """

    def __init__(self, shapes, times, classes, width, depth, heads, side=16, hidden=0):
        super().__init__()
        token = lambda c, h, w: nn.Sequential(nn.AdaptiveAvgPool2d((h, w)), nn.LayerNorm([c, h, w]), nn.Conv2d(c, width, 1))
        self.tokens = nn.ModuleList(token(c, min(h, side), min(w, side)) for c, h, w in shapes)              # shared by all times
        self.cls, self.blocks = nn.Parameter(torch.zeros(1, 1, width)), nn.ModuleList(Block(width, heads) for _ in range(depth))
        for b in self.blocks if hidden else ():
            b.mlp.fc1, b.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.out = nn.Linear(times * width, classes)

    def forward(self, maps, *_):
        seen = []
        for blocks in maps:                               # times do not attend to each other
            tokens = [f(m).flatten(2).transpose(1, 2) for f, m in zip(self.tokens, blocks)]                  # [B, h * w, width] of each block
            x = torch.cat([self.cls.expand(len(blocks[0]), -1, -1), *tokens], 1)                             # [B, 1 + L, width]
            for b in self.blocks:
                x = b(x)
            seen.append(x[:, 0])
        return self.out(torch.cat(seen, 1))


def mirrors(net):
    """DifFeed's pairs (name of a decoder output, module of the mirrored encoder output it is added to), one per level: the first residual block there.

    In ADM's numbering 38 - b <- b (method of arXiv 2311.17921). Channels and size of the two are equal in every U-Net that build_model makes.
    U-ViT (ours): every pair of blocks that a long skip joins.
    """
    names = {id(m): n for n, (m, _) in catalogue(net).items()}
    if isinstance(net, UViT):
        return [(names[id(b)], a) for a, b in zip(net.in_blocks, reversed(net.out_blocks))]
    down = net.input_blocks
    first = [i for i in range(1, len(down)) if i == 1 or down[i - 1][0].resample]
    return [(names[id(net.output_blocks[len(down) - 1 - i][-1])], down[i][-1]) for i in first]


def fed(out, g):
    """Feedback g [B, C, H, W] added to a map, or to the patch tokens, which come last, of [B, L, C]."""
    return out + g if out.dim() == 4 else out + F.pad(g.flatten(2).transpose(1, 2), (0, 0, out.shape[1] - g[0, 0].numel(), 0))


class DifFeed(nn.Module):
    """DifFeed (arXiv 2311.17921): a second pass of the same x_t, to which decoder maps of the first are added in the encoder; attention head on `name`.

    The network stays frozen, but gradients go through it to the feedback layers. shapes: (C, H, W) of the decoder maps; shape: of `name`.
    """

    def __init__(self, net, name, shapes, shape, classes, width, depth, heads, side=16, context=nullcontext):
        super().__init__()
        self.frozen = net, name, [m for _, m in mirrors(net)], context           # in a tuple: no part of what is trained
        self.back = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()) for c, _, _ in shapes)
        self.head = DifFormer([shape], 1, classes, width, depth, heads, side)

    def forward(self, maps, x_t, t):                      # maps [1][levels]: decoder outputs of the first pass
        net, name, targets, context = self.frozen
        hooks = [m.register_forward_hook(lambda _, args, out, g=f(x): fed(out, g.to(out.dtype))) for m, f, x in zip(targets, self.back, maps[0])]
        try:                                              # the skip connections carry the sums, too
            with context():
                second = reader(net, [name], "none")(x_t, t)
        finally:
            for h in hooks:
                h.remove()
        return self.head([second])


class Tuned(nn.Module):
    """A head and its own copy of the network that it reads, trained together: fine-tuning."""

    def __init__(self, head, r, context):
        super().__init__()
        self.head, self.net, self.names, self.context = head, copy.deepcopy(r.net).requires_grad_(True), r.names, context

    def train(self, mode=True):                           # without the network's dropout, whose numbers belong to no seed
        self.head.train(mode)
        return self

    def forward(self, maps, x_t, t):
        with self.context():
            maps = reader(self.net, self.names, "none")(x_t, t)
        return self.head([maps])


@dataclass
class Reading:
    """A kind of head and what it reads: names x times of a frozen network, maps averaged over noise draws; without a network raw pixels, or stored maps."""
    kind: str
    net: nn.Module | None
    names: list
    times: list
    draws: int = 1
    hidden: int = 0                                       # of the transformer's feed-forward parts; 0 = 4 x width
    tuned: float = 0.0                                    # above 0: the head trains a copy of the network with itself, at so many times its lr
    stored: bool = False                                  # the maps come from a file

    @property
    def passes(self):                                     # of the network, per image
        return (self.net is not None or self.stored) * len(self.times) * self.draws * (1 + (self.kind == "diffeed"))

    @torch.no_grad()
    def views(self, path, x, z, context):
        """Images x [B, 3, H, W], noises z, one [B, 3, H, W] per draw -> what heads are called with: maps [T][n] of [B, C, h, w], the last x_t, its t [B].

        Stored maps stand in place of images.
        """
        if self.stored:
            return x, None, None
        if self.net is None:
            return [[x]], x, None
        if self.tuned:                                    # the head makes the pass
            t = torch.full((len(x),), self.times[0], device=x.device)
            return None, diffuse(path, x, z[0], t), t
        maps, taps = [], [n for n, _ in mirrors(self.net)] if self.kind == "diffeed" else self.names
        for level in self.times:
            t = torch.full((len(x),), level, device=x.device)
            with context():
                parts = [reader(self.net, taps, "none")(x_t := diffuse(path, x, e, t), t) for e in z]
            maps.append([sum(p) / len(p) for p in zip(*parts)])
        return maps, x_t, t


class Stored:
    """features/<name> of one part of the data, read by row like images: what heads see in place of passes through a network."""

    def __init__(self, run, name, split):
        arrays, self.info = load_features(run, name, split)
        entries, grid = self.info["arrays"], int(self.info["pool"]) if self.info["pool"].isdigit() else 1
        self.names, self.times = (list(dict.fromkeys(e[k] for e in entries)) for k in ("activation", "t"))
        maps = [a if a.ndim == 4 else a.reshape(len(a), -1, grid, grid) for a in arrays]
        self.maps = [[m for m, e in zip(maps, entries) if e["t"] == t] for t in self.times]                  # [T][n] of [N, C, h, w]

    def only(self, names, times):
        """These names and times alone."""
        part = copy.copy(self)
        part.names, part.times = names, times
        part.maps = [[self.maps[self.times.index(t)][self.names.index(n)] for n in names] for t in times]
        return part

    def pooled(self, name, t, rows):
        """Rows of one activation as vectors, float32 [len(rows), D]: whole maps are averaged over positions."""
        m = self.maps[self.times.index(t)][self.names.index(name)]
        read = lambda part: torch.from_numpy(np.asarray(m[part], np.float32)).flatten(2)
        return torch.cat([v.mean(2) if self.info["pool"] == "none" else v.flatten(1) for v in map(read, np.array_split(rows, math.ceil(len(rows) / 4096)))])


def build_head(cfg, r, path, images, classes, seed, device="cpu", context=nullcontext):
    """A fresh head for reading `r` of such images, or latents, or stored maps."""
    x = scaled(images, np.arange(1), device)
    size = None if r.stored else x.shape[2]
    shapes, common = [m.shape[1:] for m in replace(r, tuned=0).views(path, x, [x], nullcontext)[0][0]], (classes, cfg.width, cfg.depth, cfg.heads, cfg.side)
    with seeded(seed, "head"):
        if r.kind in ("linear", "mlp"):
            h = PooledHead(len(r.times) * shapes, classes, cfg.grid if r.net or r.stored else size, cfg.hidden if r.kind == "mlp" else ())
        elif r.kind in ("segment", "uper"):
            h = (UPer if r.kind == "uper" else LinearMap)(shapes, len(r.times), classes, size, cfg.width)
        elif r.kind == "ensemble":
            h = PixelMlps(len(r.times) * sum(c for c, _, _ in shapes), classes, size, cfg.members)
        elif r.kind == "cnn":
            h = cnn_head(shapes[0][0], classes, cfg.width)
        elif r.kind == "diffeed":
            with torch.no_grad():
                shape = reader(r.net, r.names, "none")(x, torch.zeros(1, device=device))[0].shape[1:]
            h = DifFeed(r.net, r.names[0], shapes, shape, *common, context)
        else:
            h = DifFormer(shapes, len(r.times), *common, r.hidden)
    return (Tuned(h, r, context) if r.tuned else h).to(device)


def augmented(x, flip, crop, g):
    """Images [B, C, H, W], mirrored at random, shifted by up to `crop` pixels over mirrored edges."""
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g).to(x.device) < 0.5, x.flip(-1), x)
    if crop:
        h, w, at = *x.shape[2:], torch.randint(2 * crop + 1, (len(x), 2), generator=g).tolist()
        x = torch.stack([p[:, i:i + h, j:j + w] for p, (i, j) in zip(F.pad(x, [crop] * 4, mode="reflect"), at)])
    return x


def scaled(images, rows, device):
    """Rows of uint8 images as float [B, C, H, W] in [-1, 1], or means of latents; of stored maps [T][n] of [B, C, h, w]."""
    if isinstance(images, Stored):
        return [[torch.from_numpy(np.asarray(m[rows], np.float32)).to(device) for m in maps] for maps in images.maps]
    return as_input(torch.from_numpy(np.array(images[rows], order="C")).to(device))               # a copy: what is mapped cannot be written


@torch.no_grad()
def evaluate(heads, r, path, images, y, rows, batch, seed, purpose, device="cpu", context=nullcontext):
    """[(accuracy, or mean IoU of masks, -loss)] of each head over `rows`, in eval mode; noise belongs to the image. y: [N], or masks [N, H, W]; -100 = void."""
    score, tables = torch.zeros(len(heads), 2), [0] * len(heads)
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        z = [draw(seed, f"{purpose} {d}", part, row_shape(images)).to(device) for d in range(r.draws)] if r.net else []
        seen, target = r.views(path, scaled(images, part, device), z, context), y[part].to(device).long()
        for j, h in enumerate(heads):
            out = h.eval()(*seen)
            score[j] += torch.stack([(out.argmax(1) == target).sum(), -F.cross_entropy(out, target, reduction="sum")]).cpu()
            if y.dim() > 1:                               # masks: mean IoU in place of accuracy
                tables[j] += confusion_matrix(out.argmax(1), target, out.shape[1]).cpu()
    if y.dim() > 1:
        score[:, 0] = torch.tensor([mean_iou(t) * len(rows) for t in tables])
    return [tuple(s) for s in (score / len(rows)).nan_to_num(nan=-math.inf).tolist()]


def fit_head(cfg, r, path, images, y, fit, val, seed, device="cpu", context=nullcontext, tick=lambda: None):
    """A head for every (lr, l2), trained side by side on the same frozen passes with fresh noise: (the best on rows `val`, its lr and l2, its accuracy there).

    AdamW with one cycle. (2307.08702 and 2311.17921: SGD without momentum, lr 1e-2 or 5e-2, times 0.1 every 7 of 28 epochs.)
    """
    trials, batch = list(itertools.product(cfg.lr, cfg.l2)), min(cfg.head_batch, len(fit))
    steps, heads = max(1, cfg.images // batch), [build_head(cfg, r, path, images, int(y.max()) + 1, seed, device, context) for _ in trials]
    groups = lambda h, lr: [dict(params=[*m.parameters()], lr=v) for m, v in ([(h.head, lr), (h.net, r.tuned * lr)] if r.tuned else [(h, lr)])]
    opts = [torch.optim.AdamW(groups(h, lr), lr, weight_decay=l2) for h, (lr, l2) in zip(heads, trials)]
    plans = [torch.optim.lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], steps + 1) for o in opts]
    for step in range(steps):
        rows = np.sort(np.random.default_rng(seed_of(seed, "head rows", step)).choice(fit, batch, replace=False))
        g = torch.Generator().manual_seed(seed_of(seed, "head noise", step))
        x, target = scaled(images, rows, device), y[rows].to(device).long()
        if y.dim() > 1:                                   # masks move with their images
            both = augmented(torch.cat([x, target[:, None]], 1), cfg.flip, cfg.crop, g)
            x, target = both[:, :-1], both[:, -1].long()
        elif not r.stored:
            x = augmented(x, cfg.flip, cfg.crop, g)
        seen = r.views(path, x, torch.randn(r.draws, *x.shape, generator=g).to(device) if r.net else [], context)
        for h, o, p in zip(heads, opts, plans):
            F.cross_entropy(h.train()(*seen), target).backward()
            if not step:                                  # parts of a network behind the activation are not trained
                for q in h.parameters():
                    q.requires_grad_(q.grad is not None)
            o.step()
            o.zero_grad()
            p.step()
        tick()
    scores = evaluate(heads, r, path, images, y, val, cfg.batch, seed, "head validation", device, context)
    best = max(range(len(trials)), key=lambda i: scores[i])
    return heads[best], trials[best], scores[best][0]


def labelled(y, rows, share, per_class, seed):
    """The rows whose labels may be used: a share of each class, at least one, or up to so many of each; of one seed, smaller sets lie inside larger ones."""
    rows, keep = np.random.default_rng(seed_of(seed, "labelled rows")).permutation(rows), []
    for k in np.unique(y[rows]):
        of = rows[y[rows] == k]
        keep.append(of[:per_class or max(1, round(share * len(of)))])
    return np.sort(np.concatenate(keep))


def places(run, cfg, net):
    """(names, times) that the protocols linear, head, segment and detect read."""
    if cfg.activations == ["blocks"]:
        name, t = one_activation(run, cfg, net)
        return [name], cfg.t if cfg.head == "difformer" and cfg.protocol == "head" and len(cfg.t) > 1 else [t]
    return matching(net, cfg.activations), cfg.t


def check_head(cfg, latents, size):
    """UserErrors for impossible settings of the protocols that train heads, on images or latents of this size."""
    require(0 < cfg.labels_share <= 1 and cfg.per_class >= 0 and (cfg.labels_share == 1 or not cfg.per_class), cfg, "labels_share per_class",
            "a share above 0 and up to 1, or a number of images per class, not both")
    require(min(cfg.width, cfg.depth, cfg.heads, cfg.side, cfg.grid, cfg.images, *cfg.hidden) >= 1 and cfg.width % cfg.heads == 0, cfg,
            "width depth heads side grid images hidden", "must be at least 1, and width a multiple of heads")
    require(cfg.lr and cfg.l2 and cfg.seeds and min(cfg.lr) > 0 and min(cfg.l2) >= 0, cfg, "lr l2 seeds", "at least one of each; lr is positive, l2 not negative")
    require((cfg.head in ("linear", "uper", "ensemble")) if cfg.protocol == "segment" else cfg.head not in ("uper", "ensemble"), cfg, "protocol head",
            "segment takes head=linear, uper or ensemble; head all but these two last")
    require(cfg.masks >= 0 and cfg.members >= 1 and (cfg.head != "ensemble" or cfg.masks), cfg, "head masks members",
            "an ensemble learns from few masks: name their number")
    require(not cfg.finetune or cfg.protocol == "head" and cfg.finetune > 0 and cfg.head in ("linear", "mlp", "cnn", "attention"), cfg,
            "protocol head finetune", "head=linear, mlp, cnn or attention can be fine-tuned, at a positive multiple of lr")
    require(cfg.head != "diffeed" and not cfg.finetune or cfg.precision != "fp16", cfg, "head finetune precision",
            "gradients go through the network here: use bf16 or fp32")
    require(cfg.head_batch >= 2 and 0 <= cfg.crop < size, cfg, "head_batch crop", f"head_batch is at least 2, crop at least 0 and below the image size, {size}")
    require(not (latents and (cfg.flip or cfg.crop)), cfg, "flip crop", "belong to pixels: latents are not mirrored and shifted with their images (data.latents)")


def ridge_ranking(run, cfg, net, state, context, images, y, fit, val, names, times):
    """{(name, t): validation accuracy of a ridge classifier on the pooled activation}, of images or of stored features."""
    if not isinstance(images, Stored):
        a, b = (vectors(net, state, images, rows, names, times, device=run.device, context=context, seed=cfg.seed, purpose="ranking", batch=cfg.batch)
                for rows in (fit, val))
    score = {}
    for key in itertools.product(names, times):
        pair = [images.pooled(*key, rows) for rows in (fit, val)] if isinstance(images, Stored) else [a[key], b[key]]
        fa, fb = standardise(*pair)
        score[key] = accuracy(ridge(fa, y[fit], int(y.max()) + 1, 1e-3), fb, y[val])
    return score


def raw(run, cfg):
    """The control that reads no features: {what: Reading}, or nothing."""
    what = "latents" if run.data.latents else "pixels"
    return {f"raw {what}": Reading("attention" if cfg.head in ("difformer", "diffeed") else cfg.head, None, [what], [1.0])} if "pixels" in cfg.controls else {}


def readings(run, cfg, net, state, context, names, times, images, y, fit, val):
    """The head that was asked for, and its controls: {what: Reading}, for the seed cfg.seed. A ridge classifier finds the best single place, on rows `val`.

    Of stored features (images: a Stored) there are only the controls that need no further pass.
    """
    path, classes, fused, stored = PATHS.get(state.get("path")), int(y.max()) + 1, cfg.head in ("difformer", "diffeed"), isinstance(images, Stored)
    source = dict(stored=True, draws=images.info["draws"]) if stored else {}
    read = lambda kind, names, times, **more: Reading(kind, net, names, times, **(source | more))
    count = lambda r: sum(p.numel() for p in build_head(cfg, r, path, images.only(r.names, r.times) if stored else images, classes, 0, run.device).parameters())
    score = ridge_ranking(run, cfg, net, state, context, images, y, fit, val, names, times) if len(names) * len(times) > 1 else {(names[0], times[0]): 0}
    name, t = max(score, key=score.get)
    together = cfg.head == "difformer" or (cfg.head in ("linear", "mlp") and not cfg.finetune)      # the other heads read one map
    where, plain = (names, times) if together else ([name], [t]), "attention" if fused else cfg.head
    out = {cfg.head: read(cfg.head, *where, tuned=cfg.finetune)}
    if cfg.finetune:
        out["frozen network"] = read(cfg.head, *where)
    if fused:
        one, spare = read(plain, [name], [t]), cfg.depth * (2 * cfg.width + 1)                      # spare: parameters of one more hidden unit in every block
        out["best single (block, t)"] = one
        if cfg.head == "difformer":
            out["side by side, linear"] = read("linear", *where)
        if not stored:
            out["equal passes, averaged"] = read(plain, [name], [t], draws=out[cfg.head].passes)
        out["equal parameters"] = read(plain, [name], [t], hidden=4 * cfg.width + round((count(out[cfg.head]) - count(one)) / spare))
    if "random" in cfg.controls:
        out["random weights"] = replace(out[cfg.head], net=random_network(run, cfg, state))
    if "supervised" in cfg.controls:
        out["supervised, same size"] = Reading(plain, train_supervised(run, cfg, state, dict(images=images, y=y, rows=fit), name, classes), [name], [1.0])
    return out | raw(run, cfg)


def head(run, cfg, net, state, context):
    """Train heads on the fly, or on stored features: select on the validation part, report the test part once per seed; controls beside it."""
    train, test, y, y_test = known_classes(run, "head")
    stored = {split: Stored(run, cfg.features, split) for split in ("train", "test")} if cfg.features else {}
    names, times = (stored["train"].names, stored["train"].times) if stored else places(run, cfg, net)
    require(times, cfg, "t", "name one or more noise times")
    require(cfg.head != "difformer" or len(names) * len(times) > 1, cfg, "head activations t", "needs more than one activation or time")
    require(cfg.head != "diffeed" or all(n.startswith(("mid", "up")) for n in names) and mirrors(net), cfg, "head activations", "reads the middle or the way up")
    path, parts, rows, where = PATHS[state["path"]] if net else None, split_rows(cfg, len(train)), {}, dict(device=run.device, context=context)
    for seed in cfg.seeds:
        fit, val = (labelled(y.numpy(), part, cfg.labels_share, cfg.per_class, seed) for part in parts)
        few = int(np.unique(y[fit].numpy(), return_counts=True)[1].min())
        require(few >= max(1, cfg.per_class) and len(fit) >= 2, cfg, "per_class labels_share", f"a class has only {few} images to learn from")
        own = replace(cfg, seed=seed)
        for what, r in readings(run, own, net, state, context, names, times, stored.get("train", train.inputs), y, fit, val).items():
            seen, unseen = (stored[split].only(r.names, r.times) for split in ("train", "test")) if r.stored else (train.inputs, test.inputs)
            with bar(run, max(1, cfg.images // min(cfg.head_batch, len(fit))), f"{what}, seed {seed}", "step") as progress:
                best, (lr, l2), score = fit_head(own, r, path, seen, y, fit, val, seed, tick=lambda: progress.update(1), **where)
            draws = cfg.draws if r.net and r.times != [1.0] else 1               # without noise all draws are equal
            tested = [evaluate([best], r, path, unseen, y_test, np.arange(len(test)), cfg.batch, seed, f"head test {d}", **where)[0][0] for d in range(draws)]
            row = rows.setdefault(what, dict(head=r.kind, passes=r.passes, results=[],
                                             parameters=sum(p.numel() for p in best.parameters() if p.requires_grad)))
            row["results"].append(dict(seed=seed, activations=r.names, t=r.times, lr=lr, l2=l2, validation=score, test=tested))
    for what, row in rows.items():
        means, spreads = zip(*(mean_std(s["test"]) for s in row["results"]))
        row["accuracy"], row["std"] = mean_std(means)
        row["noise_std"] = noise = None if None in spreads else float(np.mean(spreads))              # one draw tells nothing
        run.say(f"{what:24} {row['accuracy']:.4f}{plus_minus(row['std'])} over {len(means)} seed(s){plus_minus(noise) and f',{plus_minus(noise)} over noise'}; "
                f"{row['parameters']:,} trained parameters, {row['passes']} pass(es) per image")
    if run.rank == 0:
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[r["accuracy"]] for r in rows.values()], list(rows), ["test"], f"test accuracy, {cfg.head} head")
    return dict(head=cfg.head, seeds=cfg.seeds, fresh_noise=not stored, train_images=len(fit), validation_images=len(val), test_images=len(test), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Properties of activations (arXiv 2410.03558 sees them in pictures and defines no number; these are ours) and the selection by them

def noise_sensitivity(a, b):
    """Distance between two noise draws of one image over distance between images; maps a, b [N, C, H, W]: 0 = deterministic, 1 = nothing but noise."""
    return float((a - b).flatten(1).norm(dim=1).mean() / (a - b.roll(1, 0)).flatten(1).norm(dim=1).mean().clamp(min=1e-9))


def granularity(a, size):
    """Length at which the spatial autocorrelation of maps [N, C, H, W], averaged over channels, falls to 1/e, in pixels of the size x size image.

    The mean of each map is taken away, so that what is equal all over an image does not count as coarse; lengths of half a map and more come out too small.
    """
    whole, a = a.square().mean((0, 2, 3)), a - a.mean((2, 3), keepdim=True)
    power = a.square().mean((0, 2, 3))                    # of each channel
    if not (live := power > 1e-10 * whole).any():         # nothing but rounding is left where a channel is the same all over
        return float(size)
    a, before = a[:, live] / power[live, None, None].sqrt(), 1.0
    for d in range(1, a.shape[3]):
        r = float((a[..., d:] * a[..., :-d]).mean() + (a[..., d:, :] * a[..., :-d, :]).mean()) / 2
        if r < 1 / math.e:
            return (d - 1 + (before - 1 / math.e) / (before - r)) * size / a.shape[3]
        before = r
    return float(size)                                    # it does not fall within the map


def locality(a):
    """How much the resemblance of two positions is a matter of their distance: minus the correlation of cosine similarity with distance, over all pairs of
    positions of maps [N, C, H, W] (at most 16 x 16 of them)."""
    a = a[..., ::math.ceil(a.shape[2] / 16), ::math.ceil(a.shape[3] / 16)]
    f = F.normalize(a - a.mean((0, 2, 3), keepdim=True), dim=1).flatten(2)       # [N, C, L]
    place = torch.cartesian_prod(torch.arange(a.shape[2]), torch.arange(a.shape[3])).float()
    i, j = torch.triu_indices(len(place), len(place), 1)
    similarity, distance = (f.transpose(1, 2) @ f)[:, i, j], (place[i] - place[j]).norm(dim=1).expand(len(a), -1)
    return -float(torch.corrcoef(torch.stack([similarity.flatten(), distance.flatten()]))[0, 1].nan_to_num())


def measure(net, state, images, rows, names, times, device="cpu", context=nullcontext, seed=0):
    """{(name, t): dict of the three properties and the map's size}, over `rows` of the images, a few at a time."""
    out = {}
    for part in np.array_split(rows, math.ceil(len(rows) / 16)):
        for t in times:                                   # one after the other: whole maps of all activations are held at once
            a, b = (next(stream(net, state, images, part, names, [t], device=device, context=context, pool="none", seed=seed, purpose=f"select {d}"))[1]
                    for d in (0, 1))
            for key in a:
                x, z, total = a[key].cpu(), b[key].cpu(), out.setdefault(key, dict(size=a[key].shape[3], sensitivity=0.0, granularity=0.0, locality=0.0))
                for k, v in dict(sensitivity=noise_sensitivity(x, z), granularity=granularity(x, state["size"]), locality=locality(x)).items():
                    total[k] += v * len(part) / len(rows)
    return out


def verdicts(table, blocks, noisy, fine, local):
    """In the spirit of the filtering rules of 2410.03558 (section 4), in numbers, at one time. table: {name: properties} in forward order -> {name: why it is dropped, or ""}.

    The paper keeps the clean half of the way up, without increments and without self-attention, and of the noisy half only self-attention's q and k. Here:
    noisy activations go, wherever they are (increments among them); maps much finer than the block outputs of their size go (over-refined ends of a level);
    activations more local than those go, unless the output of their own block is noisy.
    """
    names, out = list(table), {}
    limit = noisy * np.median([table[b]["sensitivity"] for b in blocks])
    for i, n in enumerate(names):
        peers, own = [b for b in blocks if table[b]["size"] == table[n]["size"]] or blocks, next((b for b in names[i:] if b in blocks), n)
        median = lambda key: np.median([table[b][key] for b in peers])
        out[n] = ("noisy" if table[n]["sensitivity"] > limit else "fine" if table[n]["granularity"] < fine * median("granularity") else
                  "local" if table[n]["locality"] > local * max(median("locality"), 0) and table[own]["sensitivity"] <= limit and n not in blocks else "")
    return out


def select(run, cfg, net, state, context):
    """Measure activations, filter them, rank the rest by a linear probe on the validation part; write the best of every map size, at one time, as YAML."""
    train, _, y, _ = known_classes(run, "select")
    names = matching(net, ["*"] if cfg.activations == ["blocks"] else cfg.activations)
    blocks, order = [n for n in block_outputs(net) if n in names], np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(len(train))
    fit, val = np.sort(order[:cfg.fit]), np.sort(order[cfg.fit:cfg.fit + cfg.validation])
    require(blocks, cfg, "activations", "name some block outputs, too: they are what the others are compared with")
    require(cfg.measured >= 2 and len(val) >= 10, cfg, "measured fit validation", f"at least 2 images to measure, 10 to validate, of {len(train)} training images")
    props = measure(net, state, train.inputs, fit[:cfg.measured], names, cfg.t, run.device, context, cfg.seed)
    table = []
    for t in cfg.t:
        why = verdicts({n: props[n, t] for n in names}, blocks, cfg.noisy, cfg.fine, cfg.local)
        left = [n for n in names if not why[n]]
        score = ridge_ranking(run, cfg, net, state, context, train.inputs, y, fit, val, left, [t]) if left else {}
        table += [dict(activation=n, **noise_level(state["path"], t), **props[n, t], dropped=why[n], linear=score.get((n, t))) for n in names]
    rest = sorted((r for r in table if not r["dropped"]), key=lambda r: -r["linear"])
    require(rest, cfg, "noisy fine local", "no activation passes; loosen them")
    best = {r["size"]: r for r in reversed(rest) if r["t"] == rest[0]["t"]}     # of each size the best comes last
    chosen = dict(activations=[n for n in names if n in {r["activation"] for r in best.values()}], t=[rest[0]["t"]])
    gone = ", ".join(f"{sum(r['dropped'] == w for r in table)} {w}" for w in ("noisy", "fine", "local"))
    found = ", ".join(f"{r['activation']} ({r['size']} x {r['size']}, {r['linear']:.3f})" for r in best.values())
    run.say(f"{len(rest)} of {len(table)} (activation, t) pass; dropped: {gone}; chosen: {found} at t={rest[0]['t']:g}")
    if run.rank == 0:
        whose = dict(checkpoint=cfg.checkpoint, weights=cfg.weights)
        keep = {k: v for k, v in run.sections.get("probe", {}).items() if k in ("precision", "batch", "draws", "validation", "seed")}
        sections = run.sections | dict(extract_features=run.sections.get("extract_features", {}) | chosen | whose | dict(name=cfg.name), probe=keep | chosen | whose)
        with atomic(run.dir / "probe" / f"{cfg.name}.yaml") as f:
            f.write(yaml.safe_dump(sections, sort_keys=False).encode())
        shown, times = [n for n in names if any(r["activation"] == n for r in rest)], sorted(set(cfg.t))
        cell = {(r["activation"], r["t"]): r["linear"] for r in table}
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[cell[n, t] for t in times] for n in shown], shown, [f"t={t:g}" for t in times],
                 "validation accuracy of a linear probe; activations that pass", [(shown.index(r["activation"]), times.index(r["t"]), "*") for r in best.values()])
    return dict(measured=min(cfg.measured, len(fit)), chosen=chosen, table=table)


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation from frozen maps

def confusion_matrix(found, truth, classes):
    """Pixels by true and found class, int64 [classes, classes]; ids of one shape, truth below 0 = void."""
    known = truth >= 0
    return torch.bincount(classes * truth[known] + found[known], minlength=classes ** 2).view(classes, classes)


def mean_iou(table):
    """Intersection over union, averaged over the classes that occur in truth or prediction; table [classes, classes]."""
    both = table.diag()
    union = table.sum(0) + table.sum(1) - both
    return float((both / union)[union > 0].mean())


class LinearMap(nn.Module):
    """Linear segmentation: each map [B, C, h, w] is normalised per channel and classified; bilinear interpolation commutes with that and comes last."""

    def __init__(self, shapes, times, classes, size, width=0):
        super().__init__()
        self.size, self.maps = size, nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c, affine=False), nn.Conv2d(c, classes, 1)) for c, _, _ in shapes * times)

    def forward(self, maps, *_):                          # -> [B, classes, size, size]
        return sum(enlarged(f(m), self.size) for f, m in zip(self.maps, itertools.chain(*maps)))


class UPer(nn.Module):
    """UPerNet's decoder (arXiv 1807.10221): pooled views of the coarsest map, sums from coarse to fine, all levels side by side; one level per activation."""

    def __init__(self, shapes, times, classes, size, width):
        super().__init__()
        conv = lambda a, b, k: nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.size, self.order = size, sorted(range(len(shapes)), key=lambda i: shapes[i][1])                  # coarse to fine
        self.sides = nn.ModuleList(conv(times * shapes[i][0], width, 1) for i in self.order)
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(s), nn.Conv2d(width, width, 1), nn.ReLU()) for s in (1, 2, 3, 6))
        self.smooth, self.pooled = nn.ModuleList(conv(width, width, 3) for _ in shapes), conv(5 * width, width, 3)
        self.out = nn.Sequential(conv(len(shapes) * width, width, 3), nn.Conv2d(width, classes, 1))

    def forward(self, maps, *_):                          # -> [B, classes, size, size]
        x = [f(torch.cat([blocks[i] for blocks in maps], 1)) for f, i in zip(self.sides, self.order)]
        x[0] = self.pooled(torch.cat([x[0], *(enlarged(f(x[0]), x[0].shape[2]) for f in self.pools)], 1))
        for i in range(1, len(x)):
            x[i] = x[i] + enlarged(x[i - 1], x[i].shape[2])
        return enlarged(self.out(torch.cat([enlarged(f(v), x[-1].shape[2]) for f, v in zip(self.smooth, x)], 1)), self.size)


class PixelMlps(nn.Sequential):
    """Ensemble of pixel classifiers (arXiv 2112.03126): channels -> 128 -> 32 -> classes (from 30 classes on 256 -> 128), as groups of one convolution."""

    def __init__(self, channels, classes, size, members):
        sizes = [channels, *((256, 128) if classes >= 30 else (128, 32)), classes]
        super().__init__(*[f for a, b in itertools.pairwise(sizes) for f in (nn.Conv1d(members * a, members * b, 1, groups=members), nn.ReLU(),
                                                                             nn.BatchNorm1d(members * b))][:-2])
        self.size, self.members = size, members
        for f in list(self)[::3]:
            nn.init.normal_(f.weight, 0, 0.02)

    def pixels(self, maps):                               # -> [B, size, size, C]
        return torch.cat([enlarged(m, self.size) for m in itertools.chain(*maps)], 1).permute(0, 2, 3, 1)

    def of_pixels(self, x):                               # [members, n, C], or [1, n, C] for the same pixels for all -> logits [members, n, classes]
        first, *rest = self
        y = F.conv1d(x.transpose(1, 2).reshape(1, -1, x.shape[1]), first.weight, first.bias, groups=len(x))
        for f in rest:
            y = f(y)
        return y.unflatten(1, (self.members, -1))[0].transpose(1, 2)

    def forward(self, maps, *_):                          # -> [members, B, classes, size, size]
        x = self.pixels(maps)
        return self.of_pixels(x.flatten(0, 2)[None]).unflatten(1, x.shape[:3]).movedim(4, 2)


def enlarged(x, size):
    """Maps [B, C, h, w] at size x size, bilinear."""
    return x if x.shape[2] == size else F.interpolate(x, (size, size), mode="bilinear")


def vote(logits):
    """logits [members, B, classes, H, W] -> (majority [B, H, W], Jensen-Shannon divergence of the members [B, H, W] in nats).

    The divergence is the entropy of the mean minus the mean entropy.
    """
    p, entropy = logits.softmax(2), lambda p: -torch.xlogy(p, p).sum(-3)
    ballots = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)                # [B, H, W, classes]; ties go to the class of greater mean probability
    return (ballots + 0.5 * p.mean(0).movedim(1, 3)).argmax(3), entropy(p.mean(0)) - entropy(p).mean(0)


def fit_ensemble(cfg, r, path, images, y, rows, seed, device="cpu", context=nullcontext, epochs=100, batch=64):
    """PixelMlps trained on all pixels of `rows` under one noise draw per image, as published (arXiv 2112.03126): Adam 1e-3, 64 pixels per update, up to 100 epochs,
    stopped when from epoch 5 on the loss has not fallen for 50 updates. Ours: all members stop together, each image has its own noise, pixels are drawn with
    replacement, and rare classes stay in.
    """
    net, chunk = build_head(cfg, r, path, images, int(y.max()) + 1, seed, device), chunk_of(images)
    noise = lambda part: [draw(seed, f"ensemble {d}", part, images.shape[1:]).to(device) for d in range(r.draws)]
    with torch.no_grad():
        seen = [r.views(path, scaled(images, part, device), noise(part), context)[0] for part in np.array_split(rows, math.ceil(len(rows) / chunk))]
        x = torch.cat([net.pixels(maps) for maps in seen]).flatten(0, 2)         # [N H W, C]
    target = y[rows].flatten().long().to(device)
    x, target, g = x[target >= 0], target[target >= 0], torch.Generator().manual_seed(seed_of(seed, "ensemble pixels"))
    opt, best, stale = torch.optim.Adam(net.train().parameters(), 1e-3), math.inf, 0
    for step in range(epochs * (per_epoch := math.ceil(len(x) / batch))):
        at = torch.randint(len(x), (cfg.members, batch), generator=g).to(device)
        loss = F.cross_entropy(net.of_pixels(x[at]).flatten(0, 1), target[at].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step >= 5 * per_epoch:
            best, stale = (loss.item(), 0) if loss.item() < best else (best, stale + 1)
            if stale > 50:
                break
    return net.eval()


def chunk_of(images):
    """Images per pass where maps are enlarged to the images' size."""
    return max(1, 2 ** 14 // images.shape[2] ** 2)


def known_masks(run, protocol):
    """Training and test part with their masks, int16 [N, H, W], void -100."""
    parts = [probed(run, split) for split in ("train", "test")]
    if any(p.masks is None or p.masks.shape[1:] != p.images.shape[2:] for p in parts):
        raise UserError(f"protocol={protocol} needs a mask for every image, and this data has none (data.source=shapes, or arrays with masks)")
    y = [np.array(p.masks).astype(np.int16) for p in parts]
    y = [torch.from_numpy(np.where(m == 255, np.int16(-100), m)) for m in y]
    if any((m < 0).all() for m in y):
        raise UserError(f"protocol={protocol}: the masks of the training or of the test images are void (255) everywhere")
    if new := unlearnt(*y):
        run.say(f"note: class {new} is in test masks, but in none of training: it cannot be found, and counts as such")
    return *parts, *y


def overlay(images, masks, classes):
    """Images uint8 [N, 3, H, W] under the colours of their masks [N, H, W]; class 0 and void stay as they are."""
    colours = np.random.default_rng(3).integers(40, 256, (classes, 3))
    painted = (images / 2 + colours[masks.clip(0)].transpose(0, 3, 1, 2) / 2).astype(np.uint8)
    return np.where(masks[:, None] > 0, painted, images)


def dense_readings(run, cfg, net, state, kind, names, times, train, rows):
    """The maps that were asked for and the same of the controls, the supervised one taught on `rows`: {what: Reading}."""
    out = {cfg.head if cfg.protocol == "segment" else cfg.protocol: Reading(kind, net, names, times)}
    if "random" in cfg.controls:
        out["random weights"] = Reading(kind, random_network(run, cfg, state), names, times)
    if "supervised" in cfg.controls and (train.classes >= 0).all():
        y = torch.from_numpy(np.array(train.classes))
        taught = train_supervised(run, cfg, state, dict(images=train.images, y=y, rows=rows), names[-1], int(y.max()) + 1)
        out["supervised, same size"] = Reading(kind, taught, names, [1.0])
    if "pixels" in cfg.controls:
        out["raw pixels"] = Reading(kind, None, ["pixels"], [1.0])
    return out


def segment(run, cfg, net, state, context):
    """Semantic segmentation from frozen maps: selected on the validation part, the test part reported once per seed; controls beside it."""
    train, test, y, y_test = known_masks(run, "segment")
    names, times = places(run, cfg, net)
    require(times, cfg, "t", "name one or more noise times")
    path, classes, where = PATHS[state["path"]], 1 + int(max(y.max(), y_test.max())), dict(device=run.device, context=context)
    parts, rows, few, chunk = split_rows(cfg, len(train)), {}, cfg.masks or None, chunk_of(train.images)
    kind, uncertain = "segment" if cfg.head == "linear" else cfg.head, [[], []]
    for what, r in dense_readings(run, cfg, net, state, kind, names, times, train, parts[0]).items():
        results = []
        for seed in cfg.seeds:
            fit, val = (np.sort(np.random.default_rng(seed_of(seed, "masks")).permutation(part)[:few]) for part in parts)
            if kind == "ensemble":
                best, chosen = fit_ensemble(cfg, r, path, train.images, y, fit, seed, **where), {}
            else:
                with bar(run, max(1, cfg.images // min(cfg.head_batch, len(fit))), f"{what}, seed {seed}", "step") as progress:
                    own = replace(cfg, seed=seed, batch=chunk)
                    best, (lr, l2), score = fit_head(own, r, path, train.images, y, fit, val, seed, tick=lambda: progress.update(1), **where)
                chosen = dict(lr=lr, l2=l2, validation=score)
            table, shown = torch.zeros(classes, classes, dtype=torch.long), []
            for part in np.array_split(np.arange(len(test)), math.ceil(len(test) / chunk)):
                z = [draw(seed, "segment test", part, test.images.shape[1:]).to(run.device)]
                with torch.no_grad():
                    out = best.eval()(*r.views(path, scaled(test.images, part, run.device), z, context))
                found, spread = (v.cpu() for v in vote(out if out.dim() == 5 else out[None]))
                table += confusion_matrix(found, y_test[part].long(), classes)
                shown += [(found, spread)] if len(shown) * chunk < 10 else []
                if not rows and kind == "ensemble":       # where do members disagree?
                    for wrong, values in enumerate(uncertain):
                        values.append(spread[(y_test[part] >= 0) & ((found != y_test[part]) == bool(wrong))])
            results.append(dict(seed=seed, **chosen, miou=mean_iou(table), pixel_accuracy=float(table.trace() / table.sum())))
            if not rows and seed == cfg.seeds[0] and run.rank == 0:
                found, spread = (torch.cat(v)[:10].numpy() for v in zip(*shown))
                n, paint = len(found), lambda m: overlay(np.asarray(test.images[:len(m)]), m, classes)
                grey = np.repeat((255 * spread / max(spread.max(), 1e-9))[:, None], 3, 1).astype(np.uint8)
                sheet = [test.images[:n], paint(y_test[:n].numpy()), paint(found)] + [grey] * (kind == "ensemble")
                save_grid(run.dir / "probe" / f"{cfg.name}.png", np.concatenate(sheet), n, ["image", "truth", "found", "uncertainty"][:len(sheet)])
        miou, std = mean_std([s["miou"] for s in results])
        rows[what] = dict(head=cfg.head, activations=r.names, t=r.times, passes=r.passes, parameters=sum(p.numel() for p in best.parameters()),
                          miou=miou, std=std, results=results)
        run.say(f"{what:24} mIoU {miou:.4f}{plus_minus(std)} over {len(results)} seed(s); {rows[what]['parameters']:,} trained parameters")
    result = dict(head=cfg.head, classes=classes, train_images=len(fit), validation_images=0 if kind == "ensemble" else len(val), test_images=len(test), rows=rows)
    if kind == "ensemble":                                # mean divergence of the members at pixels that are found rightly and wrongly
        result["uncertainty"] = {k: float(torch.cat(v).mean().nan_to_num()) for k, v in zip(("right", "wrong"), uncertain)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Correspondence by nearest neighbours

def warps(n, size, seed, turn=0.5, zoom=0.25, shift=0.2, bend=0.06):
    """Random smooth maps from positions of a warped image to those of its source, [n, size, size, 2] (x, y in [-1, 1]): a similarity plus a slow bend."""
    g = torch.Generator().manual_seed(seed_of(seed, "warps"))
    a, s, *move = (torch.rand(4, n, generator=g) * 2 - 1) * torch.tensor([turn, zoom, shift, shift])[:, None]
    cos, sin = a.cos() * s.exp(), a.sin() * s.exp()
    theta = torch.stack([cos, -sin, move[0], sin, cos, move[1]], 1).view(n, 2, 3)
    bends = F.interpolate(bend * torch.randn(n, 2, 4, 4, generator=g), (size, size), mode="bicubic", align_corners=True)
    return F.affine_grid(theta, (n, 1, size, size), align_corners=False) + bends.permute(0, 2, 3, 1)


def pick_points(valid, points, seed):
    """Positions int64 [N, points] among the true pixels of valid [N, H, W], and whether an image has any, bool [N]."""
    weights = valid.flatten(1).float()
    some = weights.any(1)
    return torch.multinomial(weights + ~some[:, None], points, replacement=True, generator=torch.Generator().manual_seed(seed_of(seed, "points"))), some


def centres(at, size):
    """Pixels of size x size images, counted row by row, as (x, y) of their centres; at int64 [N, P] -> [N, P, 2]."""
    return torch.stack([at % size, at // size], 2) + 0.5


def warped_pairs(images, masks, points, seed):
    """Pairs with known correspondence: (source, target uint8 [N, 3, H, W], points of the source [N, P, 2] in [-1, 1], goal [N, P, 2] in target pixels, limit [N]).

    The target is the source warped; points lie on objects (mask above 0, not void) where there are masks. limit: the image's side.
    """
    size, x = images.shape[2], torch.from_numpy(np.ascontiguousarray(images)).float()
    grid = warps(len(x), size, seed)
    target = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False).round().to(torch.uint8).numpy()
    valid = (grid.abs() < 1).all(3)
    if masks is not None:
        seen = F.grid_sample(torch.from_numpy(np.array(masks))[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
        valid &= (seen > 0) & (seen < 255)
    at, some = pick_points(valid, points, seed)
    source = grid.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, 2))
    goal = centres(at, size)
    return images[some.numpy()], target[some.numpy()], source[some], goal[some], torch.full((int(some.sum()),), float(size))


def class_pairs(data, rows, points, seed, parts=None):
    """The same for two images of one class: a point of an object, and the same part of the other's. limit: the longer side of the target's box.

    parts (origin [N, 2], axes [N, 2, 2]): of each image's object, as of `shape_parts`. Where they are not known: the same place relative to the box.
    """
    boxes = data.boxes.reshape(len(data), -1, 4)[:, 0]    # of several objects the first
    last, order, size = {}, [], data.images.shape[2]
    for i in np.random.default_rng(seed_of(seed, "class pairs")).permutation(rows[boxes[rows][:, 2] > boxes[rows][:, 0]]):
        k = int(data.classes[i])
        order += [(i, last[k])] if k in last else []      # the previous image of the same class is the partner
        last[k] = i
    if not order:
        raise UserError(f"pairs={len(rows)}: no two of these test images have a class in common; ask for more")
    a, b = np.array(order).T
    box, other = (torch.from_numpy(boxes[v]) for v in (a, b))
    centre = torch.arange(size) + 0.5
    inside = lambda lo, hi: (centre > lo[:, None]) & (centre < hi[:, None])       # [N, size]
    valid = inside(box[:, 1], box[:, 3])[:, :, None] & inside(box[:, 0], box[:, 2])[:, None]
    if data.masks is not None:
        valid &= torch.from_numpy((data.masks[a] > 0) & (data.masks[a] < 255))
    at, some = pick_points(valid, points, seed)
    p, (origin, axes) = centres(at, size), parts or (boxes[:, :2], np.einsum("nd,de->nde", boxes[:, 2:] - boxes[:, :2], np.eye(2)))
    origin, axes = (torch.tensor(v, dtype=torch.float32) for v in (origin, axes))
    goal = origin[b][:, None] + torch.linalg.solve(axes[a], (p - origin[a][:, None]).mT).mT @ axes[b].mT
    limit = (other[:, 2:] - other[:, :2]).amax(1)
    keep = some.numpy()
    return data.images[a[keep]], data.images[b[keep]], (2 * p / size - 1)[some], goal[some], limit[some]


def similarity(source, target, points, size):
    """Cosine similarity of points [N, P, 2] in [-1, 1] of maps source [N, C, h, w] with every pixel of target [N, C, h, w], [N, P, size * size].

    Maps are centred per pair, since activations share a large common direction.
    """
    mean = (source.mean((2, 3), keepdim=True) + target.mean((2, 3), keepdim=True)) / 2
    a = F.grid_sample(source - mean, points[:, :, None], padding_mode="border", align_corners=False)[..., 0]     # [N, C, P]
    return F.normalize(a, dim=1).transpose(1, 2) @ F.normalize(enlarged(target - mean, size), dim=1).flatten(2)


def matches(net, state, pairs, names, times, device="cpu", context=nullcontext, seed=0):
    """Found positions [N, P, 2] in target pixels by nearest neighbour, for every (name, t), and for all of them together under the key "together"."""
    source, target, points = pairs[:3]
    size, found = source.shape[2], {}
    for part in np.array_split(np.arange(len(source)), math.ceil(len(source) / min(32, chunk_of(source)))):
        total = 0
        for t in times:                                   # one after the other: whole maps are held
            a, b = (next(stream(net, state, images, part, names, [t], device=device, context=context, pool="none", seed=seed, purpose=purpose))[1]
                    for images, purpose in ((source, "source"), (target, "target")))
            for key in a:
                s = similarity(a[key], b[key], points[part].to(device), size)
                total = total + s
                found.setdefault(key, []).append(s.argmax(2).cpu())
        found.setdefault("together", []).append(total.argmax(2).cpu())
    return {key: centres(torch.cat(parts), size) for key, parts in found.items()}


def pck(found, goal, limit, share):
    """Percentage of correct keypoints, as a share of 1: found within `share` of limit [N] of the goal; found, goal [N, P, 2]."""
    return float(((found - goal).norm(dim=2) <= share * limit[:, None]).float().mean())


def draw_matches(path, pairs, found, n=6, zoom=4):
    """Pairs side by side, a line from each point to where it was found: green within 0.1 of the limit, else red."""
    source, target, points, goal, limit = pairs
    size, n = source.shape[2], min(n, len(source))
    sheet = Image.new("RGB", (2 * size * zoom, n * (size * zoom + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(n):
        for side, image in enumerate((source[i], target[i])):
            tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((size * zoom, size * zoom))
            sheet.paste(tile, (side * size * zoom, i * (size * zoom + 2)))
        for a, b, c in zip((points[i] + 1) * size / 2, found[i], goal[i]):
            (x0, y0), (x1, y1) = (a * zoom).tolist(), (b * zoom).tolist()
            top = i * (size * zoom + 2)
            pen.line([x0, top + y0, x1 + size * zoom, top + y1], "lime" if (b - c).norm() <= 0.1 * limit[i] else "red")
    with atomic(path) as f:
        sheet.save(f, "PNG")


def correspond(run, cfg, net, state, context):
    """PCK of every (activation, t) on warped training images; the best and all together on test images, warped and paired by class; controls beside it: random
    weights at the place that is best for them, the supervised network at the same activation without noise. Nothing is trained (2410.03558 trains a convolution)."""
    train, test = (probed(run, split) for split in ("train", "test"))
    names = block_outputs(net) if cfg.activations == ["blocks"] else matching(net, cfg.activations)
    options, shares = dict(device=run.device, context=context, seed=cfg.seed), (0.05, 0.1, 0.2)
    rows = lambda data: np.sort(np.random.default_rng(seed_of(cfg.seed, "pairs")).permutation(len(data))[:min(cfg.pairs, max(1, len(data) // 2))])
    warped = lambda data, r, part: warped_pairs(data.images[r], None if data.masks is None else data.masks[r], cfg.points, seed_of(cfg.seed, f"warps {part}"))
    known = warped(train, rows(train), "train")
    if not len(known[0]):
        raise UserError("protocol=correspond: no training image has an object to take points from (masks above 0)")

    def best_place(model, times):                         # ((activation, t), PCK of all on warped training images)
        score = {k: pck(v, *known[3:], 0.1) for k, v in matches(model, state, known, names, times, **options).items() if k != "together"}
        return max(score, key=score.get), score

    (name, t), grid = best_place(net, cfg.t)
    tasks, scores, others = {"warps": warped(test, rows(test), "test")}, {}, {}
    if run.data.source == "shapes" and not cfg.transfer:
        drawn = shape_parts(seed_of(run.data.seed, "test"), np.arange(len(test)), run.data.size, run.data.two_objects)
        tasks["parts"] = class_pairs(test, rows(test), cfg.points, cfg.seed, drawn)
    elif test.boxes is not None and (test.classes >= 0).all():
        tasks["boxes"] = class_pairs(test, rows(test), cfg.points, cfg.seed)
    if "random" in cfg.controls:
        others["random weights"] = (model := random_network(run, cfg, state)), best_place(model, cfg.t)[0]
    if "supervised" in cfg.controls and (train.classes >= 0).all():
        data = dict(images=train.images, y=torch.from_numpy(np.array(train.classes)), rows=np.setdiff1d(np.arange(len(train)), rows(train)))
        model = train_supervised(run, cfg, state, data, name, int(data["y"].max()) + 1)        # parts behind `name` stay untrained
        others["supervised, same size"] = model, (name, 1.0)
    for task, pairs in tasks.items():
        if not len(pairs[0]):
            raise UserError(f"protocol=correspond: no test image has an object to take points from ({task}: masks above 0)")
        size, every = pairs[0].shape[2], matches(net, state, pairs, names, cfg.t, **options)
        ways = {f"{name}, t={t:g}": every[name, t], f"all {len(names)} x {len(cfg.t)} together": every["together"]}
        for what, (other, place) in others.items():
            ways[what] = matches(other, state, pairs, [place[0]], [place[1]], **options)[place]
        if "pixels" in cfg.controls:
            a, b = (scaled(v, slice(None), "cpu") for v in pairs[:2])
            at = torch.cat([similarity(a[i:i + 32], b[i:i + 32], pairs[2][i:i + 32], size).argmax(2) for i in range(0, len(a), 32)])
            ways["raw pixels"] = centres(at, size)
        ways["the same place"] = (pairs[2] + 1) * size / 2
        for what, v in ways.items():
            scores.setdefault(what, {})[task] = {f"pck@{a:g}": pck(v, *pairs[3:], a) for a in shares}
            run.say(f"{task:8} {what:40} " + "  ".join(f"PCK@{a:g} {pck(v, *pairs[3:], a):.3f}" for a in shares))
        if run.rank == 0:
            draw_matches(run.dir / "probe" / f"{cfg.name}-{task}.png", pairs, every[name, t])
    if run.rank == 0:
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[grid[n, s] for s in cfg.t] for n in names], names, [f"t={s:g}" for s in cfg.t],
                 "PCK@0.1 on warped training images; * = chosen", [(names.index(name), cfg.t.index(t), "*")])
    return dict(chosen=dict(activation=name, t=t), pairs={k: len(v[0]) for k, v in tasks.items()}, points=cfg.points, scores=scores,
                controls={what: dict(activation=n, t=s) for what, (_, (n, s)) in others.items()}, table=[dict(activation=n, t=s, pck=v) for (n, s), v in grid.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Objects from frozen maps: torchvision's Mask R-CNN and Faster R-CNN

def instances(mask, least=4):
    """Objects of a mask int [H, W]: the 4-connected pieces of every class above 0 with at least so many pixels, as torchvision's targets:
    dict(labels int64 [n], masks uint8 [n, H, W], boxes float32 [n, 4])."""
    labels, pieces, left = [], [], (mask > 0) & (mask < 255)
    for k in mask[left].unique().tolist():
        rest = mask == k
        while rest.any():
            piece = largest_component(rest.view(1, -1), mask.shape).view(mask.shape)
            rest = rest & ~piece
            if piece.sum() >= least:
                labels, pieces = [*labels, k], [*pieces, piece]
    pieces = torch.stack(pieces) if pieces else torch.zeros(0, *mask.shape, dtype=torch.bool)
    return dict(labels=torch.tensor(labels, dtype=torch.long), masks=pieces.to(torch.uint8), boxes=bounds(pieces) if len(labels) else torch.zeros(0, 4))


def known_objects(run):
    """(training part, test part, function from a part and a row to its true objects, number of classes with the background, are there masks).

    The objects are the pieces of the masks; without masks they are the boxes, all of the image's class."""
    parts = [probed(run, split) for split in ("train", "test")]
    if all(p.masks is not None and p.masks.shape[1:] == p.images.shape[2:] for p in parts):
        train, test, y, _ = known_masks(run, "detect")
        return train, test, lambda part, i: instances(torch.from_numpy(np.array(part.masks[i]))), int(y.max()) + 1, True
    if any(p.boxes is None for p in parts):
        raise UserError("protocol=detect needs masks or boxes, and this data has none (data.source=shapes, or arrays with masks or boxes)")
    train, test, y, _ = known_classes(run, "detect")

    def boxed(part, i):
        boxes = torch.from_numpy(np.array(part.boxes[i], np.float32)).view(-1, 4)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]                      # empty ones fill up images with fewer objects
        return dict(labels=torch.full((len(boxes),), 1 + int(part.classes[i])), boxes=boxes)
    return train, test, boxed, int(y.max()) + 2, False


class Pyramid(nn.Module):
    """Frozen maps as a feature pyramid (arXiv 1612.03144): each to `width` channels, added from coarse to fine; `noise` [B, 3, H, W] is set before a call."""

    def __init__(self, r, path, shapes, width, context):
        super().__init__()
        self.frozen, self.out_channels, self.noise = (r, path, context), width, None
        self.order = sorted(range(len(shapes)), key=lambda i: -shapes[i][1])                                  # fine to coarse
        self.sides = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(shapes[i][0], affine=False), nn.Conv2d(shapes[i][0], width, 1)) for i in self.order)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in shapes)

    def forward(self, x):                                 # [B, 3, H, W] in [-1, 1] -> {level: [B, width, h, w]}
        r, path, context = self.frozen
        maps = r.views(path, x, [self.noise], context)[0][0]
        levels = [f(maps[i]) for f, i in zip(self.sides, self.order)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + enlarged(levels[i + 1], levels[i].shape[2])
        return {str(i): f(v) for i, (f, v) in enumerate(zip(self.smooth, levels))}


def detector(cfg, r, path, size, classes, masked, seed, device, context):
    """Mask R-CNN (arXiv 1703.06870), or without masks Faster R-CNN (1506.01497), for size x size images on the maps of `r`; classes counts the background."""
    try:
        from torchvision.extension import _has_ops
        from torchvision.models.detection import FasterRCNN, MaskRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.ops import MultiScaleRoIAlign
        there = _has_ops()
    except (ImportError, RuntimeError):
        there = False
    if not there:
        raise UserError("protocol=detect: torchvision's compiled operators do not load beside this PyTorch; install the torchvision that was built for it")
    x, w = torch.zeros(1, 3, size, size, device=device), cfg.width
    shapes = [m.shape[1:] for m in r.views(path, x, [x], nullcontext)[0][0]]
    strides = sorted(size / h for _, h, _ in shapes)
    if any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise UserError(f"protocol=detect: activations={r.names} have maps of {sorted({h for _, h, _ in shapes})} positions a side; "
                        "name one activation per size, each size twice the one before")
    pool = lambda n: MultiScaleRoIAlign([str(i) for i in range(len(shapes))], n, 2, canonical_scale=size, canonical_level=round(math.log2(strides[-1])))
    with seeded(seed, "detector"):
        anchors = AnchorGenerator(tuple((4 * s, 6 * s) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
        common = dict(min_size=size, max_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, size_divisible=1, rpn_anchor_generator=anchors, box_roi_pool=pool(7),
                      box_head=TwoMLPHead(49 * w, w), box_predictor=FastRCNNPredictor(w, classes), box_detections_per_img=20, box_batch_size_per_image=64,
                      rpn_pre_nms_top_n_train=500, rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100)
        if masked:
            common |= dict(mask_roi_pool=pool(14), mask_head=MaskRCNNHeads(w, (w, w), 1), mask_predictor=MaskRCNNPredictor(w, w, classes))
        net = (MaskRCNN if masked else FasterRCNN)(Pyramid(r, path, shapes, w, context), **common)
    return net.to(device)


def fit_detector(cfg, r, path, images, objects, classes, masked, rows, lr, l2, seed, device, context, tick):
    """A detector trained on `rows` with its own losses, fresh noise for every image; AdamW, one cycle. objects: from a row to the true objects there."""
    net, batch = detector(cfg, r, path, images.shape[2], classes, masked, seed, device, context).train(), min(cfg.head_batch, len(rows))
    steps, opt = max(1, cfg.images // batch), torch.optim.AdamW(net.parameters(), lr, weight_decay=l2)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps + 1)
    for step in range(steps):
        part = np.sort(np.random.default_rng(seed_of(seed, "head rows", step)).choice(rows, batch, replace=False))
        targets = [objects(i) for i in part]
        some = [i for i, t in enumerate(targets) if len(t["labels"])]
        x, g = (scaled(images, part[some], device) + 1) / 2, torch.Generator().manual_seed(seed_of(seed, "head noise", step))
        if some:
            net.backbone.noise = torch.randn(x.shape, generator=g).to(device)
            with torch.random.fork_rng():                 # torchvision samples proposals by the global generator
                torch.manual_seed(seed_of(seed, "proposals", step))
                losses = net(list(x), [{k: v.to(device) for k, v in targets[i].items()} for i in some])
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        plan.step()
        tick()
    return net.eval()


@torch.no_grad()
def detections(net, images, rows, batch, seed, purpose, device):
    """Found objects of each image: [dict(labels, scores, boxes, of Mask R-CNN masks bool [n, H, W])], on the CPU."""
    out = []
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        net.backbone.noise = draw(seed, purpose, part, images.shape[1:]).to(device)
        out += [{k: (v[:, 0] > 0.5 if k == "masks" else v).cpu() for k, v in f.items()} for f in net(list((scaled(images, part, device) + 1) / 2))]
    return out


def box_overlap(found, truth):
    """IoU of boxes, [found, truth]."""
    return iou(found["boxes"].numpy()[:, None], truth["boxes"].numpy()[None])


def mask_overlap(found, truth):
    """IoU of masks, [found, truth]."""
    a, b = (v["masks"].flatten(1).float() for v in (found, truth))
    both = a @ b.T
    return (both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)).numpy()


def coco_ap(found, truth, overlap, thresholds=np.linspace(0.5, 0.95, 10)):
    """COCO's average precision, by threshold of IoU: mean over the classes of truth of the precision, made monotone, at 101 recalls. [thresholds]

    found, truth: a dict for each image, as of `detections` and `instances`. In order of score a detection takes the true object, of those of its class
    still free, that it overlaps most; it is right if the overlap reaches the threshold.
    """
    overlaps, out = [overlap(f, t) for f, t in zip(found, truth)], []
    for k in torch.cat([t["labels"] for t in truth]).unique():
        scores, right, total = [], [], 0
        for f, t, o in zip(found, truth, overlaps):
            order = torch.argsort(-f["scores"], stable=True).numpy()
            mine, theirs = order[(f["labels"] == k).numpy()[order]], (t["labels"] == k).numpy()
            hit, total = np.zeros((len(thresholds), len(mine)), bool), total + theirs.sum()
            for i, threshold in enumerate(thresholds):
                free = theirs.copy()
                for j, d in enumerate(mine if theirs.any() else ()):
                    best = np.where(free, o[d], -1).argmax()
                    hit[i, j] = free[best] and o[d, best] >= threshold
                    free[best] &= not hit[i, j]
            scores.append(f["scores"].numpy()[mine]), right.append(hit)
        ranked = np.concatenate(right, 1)[:, np.argsort(-np.concatenate(scores), kind="stable")].cumsum(1)       # right ones so far
        precision = np.maximum.accumulate((ranked / np.arange(1, ranked.shape[1] + 1))[:, ::-1], 1)[:, ::-1]
        at = [np.searchsorted(r / total, np.linspace(0, 1, 101)) for r in ranked]
        out.append([np.append(p, 0)[a].mean() for p, a in zip(precision, at)])
    return np.mean(out, 0) if out else np.zeros(len(thresholds))


def detect(run, cfg, net, state, context):
    """Boxes, and masks where they are known, on a frozen pyramid: lr and l2 selected on the validation part, AP of the test part once per seed; controls beside it."""
    train, test, objects, classes, masked = known_objects(run)
    names, times = places(run, cfg, net)
    require(len(times) == 1 and not cfg.flip and not cfg.crop, cfg, "t flip crop", "detect reads one time and does not augment")
    path, parts, rows, few, here = PATHS[state["path"]], split_rows(cfg, len(train)), {}, cfg.masks or None, functools.lru_cache(10 ** 9 // (4 * train.images[0, 0].size))(lambda i: objects(train, i))
    truth, overlaps = [objects(test, i) for i in range(len(test))], dict(boxes=box_overlap) | (dict(masks=mask_overlap) if masked else {})
    summary = lambda ap: dict(ap=float(ap.mean()), ap50=float(ap[0]), ap75=float(ap[5]))
    for what, r in dense_readings(run, cfg, net, state, "detect", names, times, train, parts[0]).items():
        results = []
        for seed in cfg.seeds:
            fit, val = (np.sort(np.random.default_rng(seed_of(seed, "masks")).permutation(part)[:few]) for part in parts)
            trials, best = list(itertools.product(cfg.lr, cfg.l2)), (-1.0, None, None)
            with bar(run, len(trials) * max(1, cfg.images // min(cfg.head_batch, len(fit))), f"{what}, seed {seed}", "step") as progress:
                for trial in trials:
                    model = fit_detector(cfg, r, path, train.images, here, classes, masked, fit, *trial, seed, run.device, context, lambda: progress.update(1))
                    score = 0.0
                    if len(trials) > 1:
                        tried = detections(model, train.images, val, min(cfg.batch, 64), seed, "detect validation", run.device)
                        score = coco_ap(tried, [here(i) for i in val], box_overlap).mean()
                    best = max(best, (score, trial, model), key=lambda v: v[0])
            _, (lr, l2), best = best
            found = detections(best, test.images, np.arange(len(test)), min(cfg.batch, 64), seed, "detect test", run.device)
            results.append(dict(seed=seed, lr=lr, l2=l2, **{k: summary(coco_ap(found, truth, overlap)) for k, overlap in overlaps.items()}))
            if not rows and seed == cfg.seeds[0] and run.rank == 0:
                draw_objects(run.dir / "probe" / f"{cfg.name}.png", test.images, truth, found)
        rows[what] = row = dict(activations=r.names, t=r.times, passes=r.passes, parameters=sum(p.numel() for p in best.parameters()), results=results)
        for k, m in itertools.product(overlaps, ("ap", "ap50")):
            row[f"{k}_{m}"], row[f"{k}_{m}_std"] = mean_std([s[k][m] for s in results])
        run.say(f"{what:24} " + ", ".join(f"AP of {k} {row[f'{k}_ap']:.3f}{plus_minus(row[f'{k}_ap_std'], 3)} (AP50 {row[f'{k}_ap50']:.3f})" for k in overlaps)
                + f"; {row['parameters']:,} trained parameters")
    return dict(seeds=cfg.seeds, train_images=len(fit), validation_images=len(val), test_images=len(test),
                objects=sum(len(t["labels"]) for t in truth), rows=rows)


def draw_objects(path, images, truth, found, n=12, zoom=4):
    """The first images with true boxes in white and found ones (score above 0.5) in red, their masks, if any, tinted."""
    tiles = []
    for i in range(min(n, len(images))):
        sure = found[i]["scores"] > 0.5
        tint = images[i]
        if "masks" in found[i]:
            tint = (found[i]["masks"][sure].any(0).numpy() * np.array([255, 0, 0])[:, None, None] // 2 + images[i] // 2).astype(np.uint8)
        tile = Image.fromarray(np.ascontiguousarray(tint.transpose(1, 2, 0))).resize([images.shape[3] * zoom] * 2, Image.NEAREST)
        pen = ImageDraw.Draw(tile)
        for boxes, colour in ((truth[i]["boxes"], "white"), (found[i]["boxes"][sure], "red")):
            for b in boxes.tolist():
                pen.rectangle([v * zoom for v in b], outline=colour)
        tiles.append(np.asarray(tile).transpose(2, 0, 1))
    save_grid(path, np.stack(tiles), 6, zoom=1)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing representations, without labels

def hsic(features):
    """Unbiased estimates of the Hilbert-Schmidt independence criterion, linear kernel, between all of `features`, m arrays [n, D] over the same images: [m, m].

    HSIC_1 of Song et al. (JMLR 2012, equation 5): (tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n (n-3)) with Gram matrices K, L of zero diagonal.
    Its expectation does not depend on n, so that mini-batches may be averaged; for linear kernels it is |cov(x, y)|_F^2.
    """
    n = len(features[0])
    K = torch.stack([(c := (x - x.mean(0)).double()) @ c.T for x in features])   # a shift changes nothing but rounding
    K.diagonal(dim1=1, dim2=2).zero_()
    rows, flat = K.sum(2), K.flatten(1)                                          # [m, n], [m, n n]
    total = rows.sum(1)
    return (flat @ flat.T + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def alignment(a, b):
    """Mean squared distance between unit features of two noise draws of one image; a, b [n, D] (arXiv 2005.10242)."""
    return float((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean())


def gaussian_potential(a):
    """Mean of exp(-2 |x - y|^2) over the pairs of different rows of a [n, D], as unit vectors; its logarithm is the uniformity (arXiv 2005.10242)."""
    return float((-2 * torch.pdist(F.normalize(a, dim=1)).square()).exp().mean())


def cka(run, cfg, net, state, context):
    """Linear CKA between all (model, activation, t), from mini-batches (arXiv 2010.15327), and alignment and uniformity of each."""
    data, models = probed(run, "test"), {cfg.checkpoint: (net, state)}
    for name in cfg.against:
        models[name] = (random_network(run, cfg, state), state) if name == "random" else load_model(run, name, cfg.weights)
    places = {m: block_outputs(n) if cfg.activations == ["blocks"] else matching(n, cfg.activations) for m, (n, _) in models.items()}
    keys, rows = [(m, n, t) for m in models for t in cfg.t for n in places[m]], np.arange(min(cfg.compared, len(data)))
    for name, (_, s) in models.items():
        require_shape(run, s) if not cfg.transfer else require((s["channels"], s["size"]) == (state["channels"], state["size"]), cfg, "against", f"{name} sees other sizes")
    require(len(rows) >= 8 and len(keys) > 1, cfg, "compared activations t", f"at least 8 images (of {len(data)}), and two things to compare")
    total, spread, batches = 0, np.zeros((len(keys), 2)), np.array_split(rows, math.ceil(len(rows) / 128))
    with bar(run, len(rows), "comparing") as progress:
        for part in batches:
            seen = [{}, {}]                               # of two noise draws
            for draw_number, out in enumerate(seen):
                for m, (model, s) in models.items():
                    got = next(stream(model, s, data.inputs, part, places[m], cfg.t, device=run.device, context=context, pool=str(cfg.grid), seed=cfg.seed,
                                      purpose=f"cka {draw_number}", batch=len(part)))[1]
                    out |= {(m, *k): v.flatten(1) for k, v in got.items()}
            total = total + hsic([seen[0][k] for k in keys]) * len(part) / len(rows)
            spread += np.array([[alignment(seen[0][k], seen[1][k]), gaussian_potential(seen[0][k])] for k in keys]) * len(part) / len(rows)
            progress.update(len(part))
    scale = total.diag().clamp(min=1e-30).sqrt()
    matrix = (total / torch.outer(scale, scale)).cpu().tolist()
    table = [dict(model=m, activation=n, t=t, alignment=float(a), uniformity=float(np.log(max(u, 1e-300)))) for (m, n, t), (a, u) in zip(keys, spread)]
    if run.rank == 0:
        label = lambda i: f"{i} " + (f"{keys[i][0]} " if len(models) > 1 else "") + f"{keys[i][1]} t={keys[i][2]:g}"
        heat_map(run.dir / "probe" / f"{cfg.name}.png", matrix, [label(i) for i in range(len(keys))], [str(i) for i in range(len(keys))], "linear CKA")
    for r in table:
        run.say(f"{r['model']:20} {r['activation']:36} t={r['t']:<5g} alignment {r['alignment']:.4f}  uniformity {r['uniformity']:.3f}")
    return dict(images=len(rows), table=table, cka=matrix)


def images_read(cfg, times, n, m):
    """How many passes of single images a protocol makes, for --dry-run, at so many noise times; n, m: training and test images."""
    val, few = min(cfg.validation, n // 5), min(cfg.fit + cfg.validation, n)
    if cfg.protocol in ("head", "segment", "detect"):
        passes = 2 if cfg.head == "diffeed" else times if cfg.protocol == "segment" or cfg.head in ("linear", "mlp", "difformer") else 1
        again = len(cfg.lr) * len(cfg.l2) if cfg.protocol == "detect" else 1     # trials of a head share their passes
        return len(cfg.seeds) * passes * (again * (cfg.images + val) + m * (cfg.draws if cfg.protocol == "head" else 1))
    return times * dict(sweep=few, boxes=2 * min(cfg.boxed, n), select=2 * cfg.measured + few, correspond=6 * cfg.pairs, cka=2 * min(cfg.compared, m),
                        linear=cfg.draws * (n + m))[cfg.protocol]


def main():
    """Probe, from the command line."""
    run = start("probe", Probe, __doc__)
    cfg = run.cfg
    cfg.name = cfg.name or cfg.protocol
    if cfg.features:
        require(cfg.protocol == "linear" or cfg.protocol == "head" and cfg.head != "diffeed", cfg, "features protocol head",
                "stored features serve protocol=linear, and head with any head but diffeed")
        require(not (cfg.transfer or cfg.finetune or cfg.flip or cfg.crop or cfg.activations != ["blocks"]), cfg,
                "features activations transfer finetune flip crop", "what is stored cannot be changed, and all of it is read")
        info = load_features(run, cfg.features, "train")[1]
        net, state, cfg.checkpoint = None, dict(file=f"features/{cfg.features}", weights=info["hash"], seen=None), info["checkpoint"]
        if set(cfg.controls) - {"pixels"}:
            run.say("controls: with features= there is no network for random and supervised; probe the checkpoint itself for these")
            cfg.controls = [c for c in cfg.controls if c == "pixels"]
    else:
        net, state = load_model(run, cfg.checkpoint, cfg.weights)
        if not cfg.transfer:
            require_shape(run, state)
        require(not cfg.transfer or state["channels"] == 3, cfg, "transfer", "other images are probed as pixels, at the model's size; this model sees latents")
    context = autocast(run, cfg.precision)[0]
    if cfg.protocol in ("sweep", "boxes", "select", "correspond", "cka") and not cfg.t:
        cfg.t = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    require(all(0 <= t <= 1 for t in cfg.t) and cfg.boxed >= 2 and cfg.K >= 2
            and min(cfg.grid, cfg.draws, cfg.batch, cfg.neighbours, cfg.pairs, cfg.points, cfg.fit, cfg.validation, cfg.supervised_images) >= 1,
            cfg, "t boxed K grid draws batch neighbours pairs points fit validation supervised_images",
            "times lie between 0 and 1, boxed and K are at least 2, the others at least 1")
    require(len({f"{t:g}" for t in cfg.t}) == len(cfg.t), cfg, "t", "times must differ within six digits")
    require(not (run.data.latents and cfg.protocol in ("segment", "correspond", "detect")), cfg, "protocol", "is defined on pixels, not with data.latents")
    require(not (run.data.latents and cfg.transfer), cfg, "transfer", "other images are probed as pixels; this run's models (data.latents) see latents")
    path, other = run.dir / "probe" / f"{cfg.name}.json", set().union(*KEYS.values()) - KEYS.get(cfg.protocol, set())
    recipe = {k: v for k, v in run.sections[run.stage].items() if k not in {"name", "overwrite", "batch", "transfer", "features"} | other}
    recipe |= dict(hash=state["weights"], checkpoint=cfg.checkpoint)
    recipe["transfer"] = prepare_transfer(run, state["size"]) if cfg.transfer else None
    if cfg.protocol == "cka" and not run.dry_run:                           # models of the same name may have been trained anew
        recipe["hashes"] = {name: load_checkpoint(run, name)["weights"] for name in cfg.against if name != "random"} or None
    if cfg.protocol in ("head", "segment", "detect"):
        check_head(cfg, run.data.latents, state.get("size", math.inf))
    if cfg.protocol in ("linear", "head", "segment", "detect"):
        recipe["reads"] = info if cfg.features else list(places(run, cfg, net))
        if not cfg.features and cfg.activations == ["blocks"] and len(cfg.t) > len(recipe["reads"][1]):
            run.say(f"reads t={recipe['reads'][1][0]:g}, the label-free choice: several times in t= are the sweep's; name activations= to read them")
    if run.world > 1 and cfg.protocol not in ("sweep", "boxes"):
        run.say(f"note: protocol={cfg.protocol} does not divide its work; one process is as fast")
    if run.dry_run:
        run.say(f"{cfg.protocol} of {state['file']} into {path}")
        if net:
            say_network(run, net, state["channels"], state["size"])
        return
    if run.agreed(lambda: finished(run, path, recipe)):
        return
    protocols = dict(sweep=sweep, boxes=boxes, linear=linear, head=head, select=select, segment=segment, correspond=correspond, detect=detect, cka=cka)
    tick = time.time()
    result = protocols[cfg.protocol](run, cfg, net, state, context)
    if run.rank == 0:
        what = dict(protocol=cfg.protocol, checkpoint=cfg.checkpoint, hash=state["weights"], seen=state["seen"], seed=cfg.seed)
        write_json(path, what | result | dict(seconds=round(time.time() - tick, 1), recipe=recipe))
    run.wait()
    run.say(f"result in {path}, picture in {path.with_suffix('.png')}")
    if cfg.protocol == "select":
        run.say(f"next: python extract_features.py {path.with_suffix('.yaml')} run={run.dir}")
    if cfg.protocol in ("sweep", "boxes"):
        dense = "" if cfg.protocol == "sweep" else " name=dense pool=none"
        named = ("" if cfg.checkpoint == "diffusion/base" else f" checkpoint={cfg.checkpoint}") + ("" if cfg.name == "sweep" else f" choice={cfg.name}")
        run.next(f"extract_features.py{dense}{named}", "extracts the label-free choice")


if __name__ == "__main__":
    cli(main)

"""Probe: how discriminative a model's features are; and, after train_diffusion.py, which block and time the next stages
read.

Reads   {diffusion,guided}/<name>/checkpoint.pt and data/{train,test}, or features/<name>, or samples/<name>
Writes  probe/<name>.json and probe/<name>.png; protocol=select also probe/<name>.yaml
Time    t = 0 is noise, t = 1 is data.

    python probe.py configs/shapes.yaml                                  # protocol=sweep: CPU, under a minute
    python probe.py configs/cifar10.yaml protocol=linear                 # one GPU: linear probe and kNN, with controls
    torchrun --nproc_per_node=8 probe.py configs/cifar10.yaml            # eight GPUs share the times of the sweep
    python probe.py configs/cifar10.yaml protocol=head head=difformer labels_share=0.1 t=0.7,0.8,0.95 \
        activations='mid-repeat1-res-out,up-level?-repeat1-res-out'

sweep       scores every block x time by criteria that need no labels, and beside them by labels: NMI of k-means on the
            images it clusters, kNN and linear probe on a validation part of the training images. `label_free` is what
            extract_features.py reads; `oracle`, the choice made with labels, is only reported.
boxes       finds a box in `boxed` training images by every block x time; those that agree with the boxes of all others
            and of other noise are best. No labels.
linear      linear probe and kNN of one activation, or several side by side: trained on the training images outside the
            validation part, selected on that part; the test images are reported once.
head        a head trained on the fly, with fresh noise for every image seen: linear, MLP, CNN, attention
            (arXiv 2307.08702), DifFormer and DifFeed (2311.17921). Selected on the validation part, several seeds.
select      measures noise sensitivity, granularity and locality of activations, filters them by the rules of
            2410.03558, ranks the rest with a linear probe.
segment     semantic segmentation from frozen maps by head=linear, uper, or ensemble (pixel MLPs from few masks, with
            uncertainty: 2112.03126); mean IoU.
correspond  nearest neighbours between an image and its known warp, and between objects of one class; PCK.
detect      objects by torchvision's Mask R-CNN, or where only boxes are known Faster R-CNN; average precision.
cka         how alike activations are, across blocks, times and models (against=), and how they spread. No labels.
layout      how well the images of samples/<samples>/ keep to the boxes or masks that they were asked for.

linear, head, segment, detect and correspond have controls beside them: the same network with random weights, a
supervised network of the same size, raw pixels.

Read first: `label_free_scores`, `consensus` and `sweep`; then `DifFormer` and `DifFeed`. Skip what is not your task:
dense tasks, representations and layouts do not need each other.
"""
import functools
import itertools
import math
import time
import typing
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from scipy.stats import spearmanr
from torch import nn

from configs.data import (as_input, load_data, load_features, load_labels, prepare_data, require_shape, row_shape,
                          torchvision_datasets)
from configs.run import (ALONE, Data, Model, UserError, atomic, autocast, bar, check_name, cli, digest, draw, fill,
                         finished, key, locked, read_json, read_yaml, reading, require, save_grid, seed_of, seeded,
                         start, write_json)
from configs.shapes import shape_parts
from train_diffusion import (PATHS, Block, UViT, build_model, diffuse, load_checkpoint, load_condition, load_model,
                             say_network)
from extract_features import catalogue, matching, noise_level, reader, stream
from self_label import assign, bounds, corloc, find_objects, iou, joined, kmeans, largest_component, nmi


@dataclass
class Probe:
    """Section `probe`."""
    name: str = key("", "results go to probe/<name>; empty = the protocol")
    protocol: Literal["sweep", "boxes", "linear", "head", "select", "segment", "correspond", "detect", "cka",
                      "layout"] = key("sweep", "what is measured: see above")
    checkpoint: str = key("diffusion/base", "a folder of the run, or a .pt file")
    weights: Literal["ema", "net"] = key("ema", "averaged or raw")
    activations: list[str] = key(["blocks"], "names and globs; blocks = every block output, for linear, head, segment "
                                             "and detect the label-free choice")
    t: list[float] = key([], "noise times; empty = 0.4,0.5,...,0.9, where activations=blocks is the label-free choice "
                             "its time", low=0, high=1)
    choice: str = key("sweep", "which result of sweep or boxes the label-free choice is taken from")
    features: str = key("", "linear, head: stored features/<name> of any model, in place of the checkpoint")
    transfer: str = key("", "YAML whose `data:` section is probed in place of the run's images")
    # sweep, boxes, select
    fit: int = key(2_000, "sweep, select: training images to fit on; small sets give fewer", low=1)
    validation: int = key(1_000, "training images held out for selection, at most a fifth of them", low=1)
    K: int = key(30, "sweep: clusters of k-means", low=2)
    neighbours: int = key(20, "sweep: k of kNN (cosine); linear tries 1, 5, 20, 50", low=1)
    boxed: int = key(128, "boxes: images in which boxes are found", low=2)
    measured: int = key(64, "select: images whose maps are measured", low=2)
    noisy: float = key(1.0, "select: keep up to so many times the median noise sensitivity of block outputs", low=0)
    fine: float = key(0.5, "select: keep from so many times the median granularity of block outputs that size", low=0)
    local: float = key(1.25, "select: keep up to so many times the median locality of block outputs that size", low=0)
    # controls
    controls: list[Literal["pixels", "random", "supervised"]] = key(["pixels", "random", "supervised"],
        "linear, head, segment, detect, correspond: what to compare with")
    supervised_images: int = key(100_000, "images that the supervised control is trained on", low=1)
    draws: int = key(3, "linear, head: noise draws, each probed or tested alone: mean and spread", low=1)
    # heads
    head: str = key("attention", "linear, mlp, cnn, attention, difformer, diffeed; segment: linear, uper, ensemble")
    labels_share: float = key(1.0, "head: share of the labels of each class, to learn and to select", above=0, high=1)
    per_class: int = key(0, "head: or so many labels of each class, of both", low=0)
    width: int = key(256, "head, segment, detect: channels of the head (papers: 1024)", low=1)
    depth: int = key(2, "head: transformer blocks of attention, difformer, diffeed", low=1)
    heads: int = key(8, "head: attention heads of these", low=1)
    side: int = key(16, "head: larger maps are averaged to so many positions per side before they become tokens", low=1)
    grid: int = key(2, "head, cka: linear, mlp and the comparison see averages over a grid of g x g", low=1)
    hidden: list[int] = key([512], "head: hidden sizes of mlp", low=1)
    images: int = key(100_000, "head, segment, detect: images that every head sees", low=1)
    head_batch: int = key(128, "head, segment, detect: images per update", low=2)
    lr: list[float] = key([3e-4, 1e-3, 3e-3], "head, segment, detect: of AdamW, one cycle; selected", above=0)
    l2: list[float] = key([0.0, 0.05], "head, segment, detect: weight decay; selected with lr", low=0)
    flip: bool = key(False, "head, segment: mirror images at random")
    crop: int = key(0, "head, segment: shift images by up to so many pixels", low=0)
    seeds: list[int] = key([0, 1, 2], "head, segment, detect: of labelled subset, weights, order, noise")
    # dense tasks, representations, layouts
    masks: int = key(0, "segment, detect: training images whose masks are used, as many to validate; 0 = all", low=0)
    members: int = key(10, "segment: networks of the ensemble", low=1)
    pairs: int = key(200, "correspond: pairs of images, to choose from and again to report", low=1)
    points: int = key(8, "correspond: points per pair", low=1)
    against: list[str] = key([], "cka: further checkpoints, or random, for the same network with random weights")
    compared: int = key(2_000, "cka: test images", low=8)
    samples: str = key("base", "layout: which samples/<samples>")
    finder: str = key("", "layout: labels/<finder>, whose method looks for objects in samples; empty = the model's own")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network")
    batch: int = key(500, "images per forward pass and process", low=1)
    seed: int = key(0, "of noise, k-means, controls")
    overwrite: bool = key(False, "replace a result of another recipe under this name")


COMMON_KEYS = {"protocol", "weights", "activations", "t", "precision", "seed"}   # every recipe has them
CONTROL_KEYS = {"controls", "supervised_images", "validation"}
TRAIN_KEYS = {"width", "images", "head_batch", "lr", "l2", "seeds"} | CONTROL_KEYS


# ---------------------------------------------------------------------------------------------------------------------
# The label-free choice of a block and a time

def label_free_scores(a, b, K, seed):
    """(scores that see no label, cluster ids int64 [N]) of features a [N, D]; b: the same images under other noise.

    silhouette  mean simplified silhouette (distance to own centroid against the next one), cosine
    stability   with b: NMI of k-means of a and k-means of b, started from a's centroids: clusters that are about the
                image survive other noise
    """
    c, _, _ = kmeans(a, K, metric="cosine", seed=seed)
    distance = (1 - F.normalize(a, dim=1) @ c.T).clamp(min=0)                    # [N, K]
    own, following = distance.topk(2, 1, largest=False).values.unbind(1)
    scores = dict(silhouette=float((1 - own / following.clamp(min=1e-9)).mean()))
    ids = assign(a, c, "cosine")[0].numpy()
    if b is not None:
        c_b = kmeans(b, K, metric="cosine", start=c)[0]
        scores["stability"] = nmi(ids, assign(b, c_b, "cosine")[0].numpy())
    return scores, ids


def consensus(ids):
    """Mean NMI of each clustering with all the others, [n] from int64 [n][N].

    Over the blocks of one network at one time, this is high where every depth finds the same groups. With ever less
    noise all blocks see the same image and agree more and more, so of times that agree about equally the noisiest is
    taken. (How well the criteria follow true classes is measured in results/; none does everywhere.)
    """
    m = np.zeros((len(ids), len(ids)))
    for i, j in itertools.combinations(range(len(ids)), 2):
        m[i, j] = nmi(ids[i], ids[j])
    return (m + m.T).sum(1) / max(len(ids) - 1, 1)


def score_time(source, cfg, data, fit, val, K):
    """A row of scores for every activation at source.times[0]: without labels, and where all classes are known with."""
    a, v = (source.vectors(data.inputs, rows, "probe 0") for rows in (fit, val))
    few = len(source.names) <= 2                          # they have nothing to agree with: the most stable is chosen
    b = source.vectors(data.inputs, fit, "probe 1") if few else None
    y = classes_of(data)
    classes, known = int(y.max()) + 1, bool((y >= 0).all())
    y_fit, y_val = (y[rows].to(source.device) for rows in (fit, val))
    rows, clusters = [], []
    for name in source.names:
        place = name, source.times[0]
        mean = a[place].mean(0)                           # activations share a large common direction
        free, ids = label_free_scores(a[place] - mean, b[place] - mean if few else None, K, cfg.seed)
        row = dict(activation=name, **noise_level(source.state["path"], source.times[0]), **free)
        if known:
            x, x_val = (u.to(source.device) for u in standardise(a[place], v[place]))
            row["nmi"] = nmi(ids, y_fit.cpu().numpy())
            row["linear"] = accuracy(logistic(x, y_fit, classes, 1e-3, tolerance=SWEEP), x_val, y_val)
            near, far = ((u - mean).to(source.device) for u in (a[place], v[place]))
            row["knn"] = knn(near, y_fit, far, y_val, cfg.neighbours, classes)
        rows.append(row)
        clusters.append(ids)
    return [row | dict(consensus=float(c)) for row, c in zip(rows, consensus(clusters))]


def label_free_choice(table, criterion):
    """The row of a sweep's table that is chosen: by stability the best; by consensus the block that agrees most at the
    noisiest time at which blocks still agree about as well as anywhere (within 3 %)."""
    if criterion == "consensus":
        best = {t: max(r["consensus"] for r in table if r["t"] == t) for t in {r["t"] for r in table}}
        noisiest = min(t for t in best if best[t] >= 0.97 * max(best.values()))
        table = [r for r in table if r["t"] == noisiest]
    return max(table, key=lambda r: r[criterion])


SWEEP_KEYS = {"fit", "validation", "K", "neighbours"}


def sweep(run, cfg, source):
    """Score every (activation, t) and choose one without labels."""
    data = probed(run, "train")
    fit, val = fit_and_validation(run, cfg, len(data))
    K = min(cfg.K, max(2, len(fit) // 4))                 # clusters of four images at least
    if K < cfg.K:
        run.say(f"K={K} clusters in place of {cfg.K}: only {len(fit)} images are clustered")
    mine, table = source.times[run.rank::run.world], []
    with bar(run, len(mine), "sweep", "time") as progress:
        for t in mine:
            table += score_time(replace(source, times=[t]), cfg, data, fit, val, K)
            progress.update(1)
    table = sorted(itertools.chain(*run.gather(table)), key=lambda r: (source.names.index(r["activation"]), r["t"]))
    criterion = "stability" if len(source.names) <= 2 else "consensus"
    how = criterion + ", noisiest time within 3 %" * (criterion == "consensus")
    chosen = label_free_choice(table, criterion)
    return dict(K=K, fit=len(fit), validation=len(val), criterion=how) | report_choice(
        run, table, chosen, [criterion], ["nmi", "linear", "knn"])


def report_choice(run, table, chosen, criteria, truth):
    """What is known of the row of a table that was chosen without labels; beside it, where labels gave the scores
    `truth`, the choices by these and how the criteria follow them. Draws the surfaces of the first two."""
    def about(row, *keys):
        return {k: row[k] for k in ("activation", "t", "rho", "log_snr", *keys)}

    result = dict(label_free=about(chosen, *criteria))
    if truth[0] not in chosen:
        draw_surface(run, "", table, criteria[0], "F = label-free choice", [("F", chosen)])
        run.say(f"label-free choice: {about_line(chosen, criteria[0])}")
        return result | dict(table=table)
    best = {k: max(table, key=lambda r: r[k]) for k in truth}
    for k, suffix in zip(truth, ("", f"-{truth[1]}")):
        marks = [("F", chosen), ("O", best[k])]
        draw_surface(run, suffix, table, k, "F = label-free choice, O = the best by labels", marks)
    tracks = {c: {k: rank_correlation(table, c, k) for k in truth} for c in criteria}
    run.say(f"label-free choice: {about_line(chosen, criteria[0], *truth)}; with labels one would take "
            f"{about_line(best[truth[0]], truth[0])}; rank correlation of {criteria[0]} with {truth[0]} "
            f"{tracks[criteria[0]][truth[0]]:.2f}")
    return result | dict(label_free_scores={k: chosen[k] for k in truth}, tracks=tracks,
                         oracle={k: about(row, k) for k, row in best.items()}, table=table)


def about_line(row, *keys):
    """Place and scores of a row as text."""
    return f"{row['activation']} at t={row['t']:g} ({', '.join(f'{k} {row[k]:.3f}' for k in keys)})"


def rank_correlation(table, a, b):
    """Spearman's rho of two columns; one that is constant correlates with nothing."""
    return float(np.nan_to_num(spearmanr([r[a] for r in table], [r[b] for r in table]).statistic))


def box_agreement(a, b):
    """Mean IoU of two sets of boxes [N, 4] of the same images, less that of boxes of different images: a box that is
    always in the same place agrees with nobody."""
    return float(iou(a, b).mean() - iou(a, np.roll(b, 1, 0)).mean())


def first_boxes(source, data, rows):
    """{(name, t): boxes float32 [2, len(rows), 4]} of the first object, found by LOST under two noise draws."""
    size, found = data.images.shape[2:], {}
    for noise in range(2):
        for _, out in source.stream(data.inputs, rows, f"probe {noise}", pool="none", batch=min(source.batch, 64)):
            for place, x in out.items():
                if min(x.shape[2:]) >= 2:
                    patches = x.flatten(2).transpose(1, 2)                       # [B, h * w, C]
                    boxes = find_objects(patches, tuple(x.shape[2:]), size, "lost")["boxes"][:, 0]
                    found.setdefault(place, [[], []])[noise].append(boxes.cpu().numpy())
    return {place: [np.concatenate(v) for v in pair] for place, pair in found.items()}


BOXES_KEYS = {"boxed"}


def boxes(run, cfg, source):
    """Score every (activation, t) by the boxes found with it, without labels.

    stability: agreement of the boxes under two noise draws. consensus: mean agreement with the boxes of all other
    activations and times. Stability alone would take the least noise, consensus alone the coarse middle of the network,
    where boxes are loose: the choice is the greatest sum.
    """
    data = probed(run, "train")
    rows = some_rows(len(data), cfg.seed, "probe rows", cfg.boxed)
    if len(source.names) * len(source.times) < 2 or len(rows) < 2:
        raise UserError("protocol=boxes compares activations and times, on at least two images")
    mine, times = {}, sorted(source.times)
    with bar(run, len(times), "boxes", "time") as progress:
        for t in times[run.rank::run.world]:
            mine |= first_boxes(replace(source, times=[t]), data, rows)
            progress.update(1)
    found = {place: pair for some in run.gather(mine) for place, pair in some.items()}
    found = {place: found[place] for place in itertools.product(source.names, times) if place in found}
    mutual = np.array([[box_agreement(a[0], b[0]) for b in found.values()] for a in found.values()])
    truth = None if data.boxes is None else np.asarray(data.boxes[rows]).reshape(len(rows), -1, 4)
    table = []
    for i, ((name, t), (a, b)) in enumerate(found.items()):
        scores = dict(stability=box_agreement(a, b), consensus=float(np.delete(mutual[i], i).mean()))
        scores["agreement"] = scores["stability"] + scores["consensus"]
        if truth is not None:
            scores |= dict(corloc=corloc(a[:, None], truth), iou=float(iou(a[:, None], truth).max(1).mean()))
        table.append(dict(activation=name, **noise_level(source.state["path"], t), **scores))
    chosen = max(table, key=lambda r: r["agreement"])
    return dict(images=len(rows), method="lost", criterion="stability + consensus") | report_choice(
        run, table, chosen, ["agreement", "stability", "consensus"], ["iou", "corloc"])


# ---------------------------------------------------------------------------------------------------------------------
# What is read: activations of a frozen network, at noise times

@dataclass
class Source:
    """Activations `names` at noise `times` of a frozen network. net=None: only the images, or stored features."""
    net: nn.Module | None
    state: dict                                           # its checkpoint
    names: list
    times: list
    head: str = ""                                        # the kind of head that reads it
    task: str = "head"                                    # the protocol of that head
    draws: int = 1                                        # noise draws that maps are averaged over
    hidden: int = 0                                       # of the head's feed-forward parts; 0 = 4 x width
    stored: bool = False                                  # the maps come from a file
    device: typing.Any = "cpu"
    context: typing.Callable = nullcontext                # of forward passes: autocast
    seed: int = 0                                         # of the noise, and of controls
    batch: int = 500

    @property
    def noisy(self):
        """Whether two readings differ: not without a network, and not of clean images."""
        return self.net is not None and self.times != [1.0]

    @property
    def passes(self):
        """Passes of the network per image."""
        once = 2 if self.head == "diffeed" else 1
        return once * len(self.times) * self.draws if self.net or self.stored else 0

    def stream(self, images, rows, purpose, **options):
        """Yield (rows of a batch, {(name, t): activation on the device}); noise belongs to the image."""
        options = dict(batch=self.batch) | options
        return stream(self.net, self.state, images, rows, self.names, self.times, device=self.device,
                      context=self.context, seed=self.seed, purpose=purpose, **options)

    def maps(self, images, rows, purpose, pool="none"):
        """The activations of a few rows in one go, {(name, t): [n, C, H, W]}."""
        return next(self.stream(images, rows, purpose, pool=pool, batch=len(rows)))[1]

    def vectors(self, images, rows, purpose):
        """Pooled activations of all rows, {(name, t): float32 [len(rows), D]}, on the CPU. images: or a `Stored`."""
        if self.stored:
            return {place: images.pooled(place, rows) for place in itertools.product(self.names, self.times)}
        parts = {}
        for _, out in self.stream(images, rows, purpose):
            for place, value in out.items():
                parts.setdefault(place, []).append(value.cpu())
        return {place: torch.cat(v) for place, v in parts.items()}

    def shown(self, images, rows):
        """Rows of uint8 images as float [n, C, H, W] in [-1, 1], or means of latents; of a `Stored` its maps."""
        if self.stored:
            return images.maps(self.names, self.times, rows, self.device)
        x = torch.from_numpy(np.array(images[rows], order="C"))                  # a copy: what is mapped is read-only
        return as_input(x.to(self.device))

    @torch.no_grad()
    def views(self, x, noises):
        """What heads are called with: maps [times][names] of [B, C, h, w], the last x_t [B, C, H, W], its t [B].

        x: what `shown` gave; noises: one [B, C, H, W] per draw.
        """
        if self.stored:
            return x, None, None
        if self.net is None:
            return [[x]], x, None
        taps = [name for name, _ in mirrors(self.net)] if self.head == "diffeed" else self.names
        read, path, maps = reader(self.net, taps, "none"), PATHS[self.state["path"]], []
        for level in self.times:
            t = torch.full((len(x),), level, device=x.device)
            parts = []
            for z in noises:
                x_t = diffuse(path, x, z, t)
                with self.context():
                    parts.append(read(x_t, t))
            maps.append([sum(p) / len(p) for p in zip(*parts)])
        return maps, x_t, t

    def batches(self, images, rows, seed, purposes):
        """Yield (rows of a batch, what heads are called with) in order; purposes: of the noise draws."""
        for i in range(0, len(rows), self.batch):
            part, noises = rows[i:i + self.batch], []
            if self.net is not None:
                noises = [draw(seed, purpose, part, row_shape(images)).to(self.device) for purpose in purposes]
            yield part, self.views(self.shown(images, part), noises)


class Stored:
    """features/<name> of one part of the data, read by row like images."""

    def __init__(self, run, name, split):
        arrays, self.info = load_features(run, name, split)
        self.pool = self.info["pool"]
        grid = int(self.pool) if self.pool.isdigit() else 1
        self.arrays = {}                                  # (name, t): [N, C, h, w]
        for a, entry in zip(arrays, self.info["arrays"]):
            place = entry["activation"], entry["t"]
            self.arrays[place] = a if a.ndim == 4 else a.reshape(len(a), -1, grid, grid)
        self.names, self.times = (list(dict.fromkeys(v)) for v in zip(*self.arrays))

    def maps(self, names, times, rows, device):
        """Maps [times][names] of float32 [n, C, h, w]."""
        def read(place):
            return torch.from_numpy(np.asarray(self.arrays[place][rows], np.float32)).to(device)
        return [[read((name, t)) for name in names] for t in times]

    def pooled(self, place, rows):
        """Rows of one activation as vectors, float32 [len(rows), D]: whole maps are averaged over positions."""
        out = []
        for part in np.array_split(rows, math.ceil(len(rows) / 4096)):
            x = torch.from_numpy(np.asarray(self.arrays[place][part], np.float32)).flatten(2)
            out.append(x.mean(2) if self.pool == "none" else x.flatten(1))
        return torch.cat(out)


def classes_of(data):
    """Classes int64 [N]; -1 = not known."""
    return torch.from_numpy(np.array(data.classes))


def probed(run, split):
    """One part of the images that are probed: the run's own, or those of transfer=."""
    if not run.cfg.transfer:
        return load_data(run, split)
    return load_data(replace(run, dir=run.dir / "transfer" / Path(run.cfg.transfer).stem), split)


def shuffled(cfg, n):
    """Training rows in a random order, a function of the seed."""
    return np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(n)


def fit_and_validation(run, cfg, n):
    """(rows to fit on, rows to select on) of n training images, sorted: the validation part is a fifth at most."""
    if n < 20:
        raise UserError(f"the run has only {n} training images, too few to fit on some and select on others")
    held = min(cfg.validation, n // 5)
    fit = min(cfg.fit, n - held)
    if (fit, held) != (cfg.fit, cfg.validation):
        run.say(f"{n} training images: fit={fit} and validation={held} in place of {cfg.fit} and {cfg.validation}")
    order = shuffled(cfg, n)
    return np.sort(order[:fit]), np.sort(order[fit:fit + held])


def some_rows(rows, seed, purpose, n):
    """Up to n of the rows, or of range(rows), drawn by a seed; sorted."""
    return np.sort(np.random.default_rng(seed_of(seed, purpose)).permutation(rows)[:n])


def split_rows(cfg, n):
    """(training rows to learn from, rows to select on), a fifth of the n rows at most."""
    if n < 5:
        raise UserError(f"there are only {n} training images, too few to select on some")
    order, held = shuffled(cfg, n), min(cfg.validation, n // 5)
    return order[held:], order[:held]


# ---------------------------------------------------------------------------------------------------------------------
# Linear classifiers and nearest neighbours

def standardise(fit, *others):
    """Zero mean and unit variance by the statistics of `fit`; all [N, D]."""
    mean, std = fit.mean(0), fit.std(0).clamp(min=1e-6)
    return [(x - mean) / std for x in (fit, *others)]


def ridge(x, y, classes, l2):
    """Least-squares classifier on one-hot targets, closed form: x [N, D], y [N] -> weights [D + 1, classes].

    l2 is per sample; the bias is free.
    """
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    penalty = torch.full((x.shape[1],), l2 * len(x), dtype=torch.float64)
    penalty[-1] = 0
    return torch.linalg.solve(x.T @ x + torch.diag(penalty), x.T @ F.one_hot(y, classes).double()).float()


SWEEP = 3e-4                                              # tolerance of sweeps: accurate within 0.3 points


def logistic(x, y, classes, l2, start=None, tolerance=1e-5, iterations=1000):
    """Multinomial logistic regression where x is: x [N, D], y [N] -> weights [D + 1, classes].

    l2 on the weights, not the bias; start: weights to begin with. Solved for u, where w = u C^-1 and CC' = X'X / 2N +
    l2: the Hessian of each class is nowhere above CC' (Boehning 1992), so that of u is nowhere above 1. First by
    accelerated steps, restarted when they point uphill (arXiv 1204.3982), in the layout [classes, N], whose softmax is
    cheap. They are enough unless l2 is small; then L-BFGS goes on.
    """
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).T.contiguous()                  # [D + 1, N]
    target = F.one_hot(y, classes).T.float()                                     # [classes, N]
    penalty = torch.full((len(x),), l2, dtype=torch.float64, device=x.device)
    penalty[-1] = 0
    gram = 0                                              # in float32 it may have eigenvalues below zero
    for part in x.split(4096, 1):
        gram = gram + part.double() @ part.double().T
    C = torch.linalg.cholesky(gram / (2 * len(y)) + torch.diag(penalty + 1e-6))
    back = torch.linalg.solve_triangular(C, torch.eye(len(C), dtype=C.dtype, device=C.device), upper=False).float()
    penalty = penalty.float()

    def slope(w, p):                                      # p: probabilities [classes, N]
        return ((p - target) @ x.T / len(y) + penalty * w) @ back.T

    u = x.new_zeros(classes, len(x)) if start is None else (start.T.double() @ C).float()
    ahead, momentum = u, 1.0
    for _ in range(min(100, iterations)):
        w = ahead @ back
        g = slope(w, torch.softmax(w @ x, 0))
        if g.abs().max() < tolerance:
            return w.T
        new = ahead - g
        if (g * (new - u)).sum() > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum ** 2)) / 2
        ahead = new + (momentum - 1) / following * (new - u)
        u, momentum = new, following
    u = u.clone().requires_grad_()
    solver = torch.optim.LBFGS([u], max_iter=iterations, history_size=10, tolerance_grad=tolerance,
                               tolerance_change=1e-8, line_search_fn="strong_wolfe")

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
    for rows, target in zip(x.split(1000), truth.split(1000)):
        near = (F.normalize(rows, dim=1) @ fit.T).topk(min(k, len(fit)), 1)      # [b, k]
        votes = x.new_zeros(len(rows), classes).scatter_add_(1, y[near.indices], 1 + 1e-3 * near.values)
        right += int((votes.argmax(1) == target).sum())
    return right / len(x)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing sources: what was asked for, and controls

def mean_std(values):
    """Mean and standard deviation (n - 1 in the denominator), None of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def plus_minus(std):
    """A standard deviation as text, or nothing."""
    return "" if std is None else f" +- {std:.4f}"


def compare(run, sources, measure, seeds, scores, title="", unit="seed"):
    """A row for each source: what it is, what was measured with every seed, mean and spread of `scores`; says them.

    sources: seed -> {what: Source}; measure(what, source, seed) -> dict of results, one of them `parameters`.
    title: of a picture of the means.
    """
    rows = {}
    for seed in seeds:
        for what, source in sources(seed).items():
            got = measure(what, source, seed)
            about = dict(head=source.head, passes=source.passes, parameters=got.pop("parameters"), results=[])
            place = {unit: seed, "activations": source.names, "t": source.times}
            rows.setdefault(what, about)["results"].append(place | got)
    for what, row in rows.items():
        said = []
        for k in scores:
            mean, std = row[k], row[f"{k}_std"] = mean_std([r[k] for r in row["results"]])
            said.append(f"{k} {mean:.4f}{plus_minus(std)}")
        run.say(f"{what:24} {', '.join(said)} over {len(row['results'])} {unit}(s); {row['parameters']:,} trained "
                f"parameters, {row['passes']} pass(es) per image")
    if title and run.rank == 0:
        means = [[row[k] for k in scores] for row in rows.values()]
        heat_map(picture(run), means, list(rows), scores, title)
    return rows


def controls(run, cfg, asked, single, images, y, rows):
    """What to compare with, {what: Source}: random weights in place of those of `asked`; in place of those of `single`
    a network taught the classes y of `rows` of the images; and the raw pixels."""
    out = {}
    if "random" in cfg.controls:
        out["random weights"] = replace(asked, net=random_network(asked))
    if "supervised" in cfg.controls and (y >= 0).all():
        taught = train_supervised(run, cfg, single, images, y, rows)
        out["supervised, same size"] = replace(single, net=taught, times=[1.0])
    if "pixels" in cfg.controls:
        what = "latents" if run.data.latents and cfg.protocol != "linear" else "pixels"
        out[f"raw {what}"] = replace(single, net=None, stored=False, names=[what], times=[1.0])
    return out


class OneCycle:
    """AdamW with one cycle of the learning rate, up to lr."""

    def __init__(self, modules, lr, l2, steps):
        params = [p for m in modules for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(params, lr, weight_decay=l2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, steps + 1)

    def step(self, loss, clip=math.inf):
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def same_network(source, seed):
    """A new network of the same architecture."""
    s = source.state
    net = build_model(fill("model", Model, s["model"]), s["size"], s["channels"], seed=seed)
    return net.to(source.device).eval()                   # no dropout


def random_network(source):
    """The same network with random weights."""
    net = same_network(source, source.seed + 1).requires_grad_(False)
    g = torch.Generator().manual_seed(seed_of(source.seed, "random weights"))
    for p in net.parameters():                            # zero-initialised branches would make it blind
        if not p.any() and p.dim() > 1:
            p.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=g))
    return net


def train_supervised(run, cfg, source, images, y, rows, batch=128):
    """A network of the same architecture, trained on `rows` of clean images and their classes up to the last of
    source.names: what labels would give."""
    net = same_network(source, source.seed)
    read, one = reader(net, source.names[-1:]), torch.ones(1, device=source.device)
    with torch.no_grad():
        width = read(source.shown(images, rows[:1]), one)[0].shape[1]
    with seeded(source.seed, "supervised head"):
        head = nn.Linear(width, int(y.max()) + 1).to(source.device)
    precision = "auto" if cfg.precision == "fp16" else cfg.precision             # fp16 would need scaled gradients
    context = autocast(run, precision)[0]
    steps = max(1, cfg.supervised_images // batch)
    opt = OneCycle([net, head], 2e-3, 0.05, steps)
    with bar(run, steps, "supervised control", "step") as progress:
        for step in range(steps):
            generator = np.random.default_rng(seed_of(source.seed, "supervised rows", step))
            part = np.sort(generator.choice(rows, batch))
            with context():
                logits = head(read(source.shown(images, part), one.expand(batch))[0])
                loss = F.cross_entropy(logits.float(), y[part].to(source.device))
            opt.step(loss)
            progress.update(1)
    return net.requires_grad_(False)


def choice_or_named(run, cfg, net):
    """(names, times) that linear, head, segment and detect read: those named, or the label-free choice."""
    if cfg.activations != ["blocks"]:
        require(cfg.t, cfg, "t", "name one or more noise times")
        return matching(net, cfg.activations), cfg.t
    path = run.dir / "probe" / f"{cfg.choice}.json"
    with reading(path, "run probe.py protocol=sweep first, or name activations= and t="):
        probed = read_json(path, "run probe.py protocol=sweep first, or name activations= and t=")
        choice = probed["label_free"]
        if probed["checkpoint"] != cfg.checkpoint:
            run.say(f"note: {path} chose for {probed['checkpoint']}, and is used for {cfg.checkpoint}")
        names, t = matching(net, [choice["activation"]]), choice["t"]
    if len(cfg.t) == 1 or len(cfg.t) > 1 and (cfg.protocol, cfg.head) == ("head", "difformer"):
        return names, cfg.t
    if cfg.t:
        run.say(f"reads t={t:g}, the label-free choice: several times in t= are the sweep's")
    return names, [t]


def unlearnt(y, y_test):
    """The classes of the test part that the training part lacks, as text, or nothing. Below 0 = void."""
    new = np.setdiff1d(y_test[y_test >= 0], y)
    return ", ".join(map(str, new[:10])) + ", ..." * (len(new) > 10)


def known_classes(run, protocol):
    """Training and test part of the data with their classes, int64 [N]; a missing class is a UserError."""
    train, test = (probed(run, split) for split in ("train", "test"))
    y, y_test = (classes_of(part) for part in (train, test))
    if (y < 0).any() or (y_test < 0).any():
        raise UserError(f"protocol={protocol} needs the class of every image, and this data lacks some")
    if protocol != "select" and (new := unlearnt(y, y_test)):                    # it reads the training part alone
        raise UserError(f"protocol={protocol}: the test images have class {new}, the training images do not; keep the "
                        "same classes in both (data.classes, data.train)")
    return train, test, y, y_test


def probe_vectors(x, y, fit, val, x_test, y_test, classes):
    """Linear probe and kNN of vectors x [N, D], selected on rows `val`: test accuracies, and what was selected."""
    a, v, b = standardise(x[fit], x[val], x_test)
    weights, w = {}, None
    for l2 in (1e-2, 1e-3, 1e-4, 1e-5):                   # each starts where the last one ended
        weights[l2] = w = logistic(a, y[fit], classes, l2, start=w)
    l2 = max(weights, key=lambda l2: accuracy(weights[l2], v, y[val]))
    k = max((1, 5, 20, 50), key=lambda k: knn(a, y[fit], v, y[val], k, classes))
    return dict(linear=accuracy(weights[l2], b, y_test), knn=knn(a, y[fit], b, y_test, k, classes), l2=l2, k=k,
                parameters=(x.shape[1] + 1) * classes)


LINEAR_KEYS = CONTROL_KEYS | {"draws"}


def linear(run, cfg, source):
    """Linear probe and kNN of one activation, or several side by side, selected on the validation part; the test part
    is reported once for every noise draw; controls beside it."""
    train, test, y, y_test = known_classes(run, "linear")
    fit, val = map(np.sort, split_rows(cfg, len(train)))

    def vectors(s, split, number):                        # float32 [N, D]
        data = train if split == "train" else test
        if s.net is None and not s.stored:                # larger images are averaged: many columns tell little
            side, chunks = min(32, data.images.shape[2]), range(0, len(data), 1000)
            small = [F.adaptive_avg_pool2d(s.shown(data.images, slice(i, i + 1000)), side) for i in chunks]
            return torch.cat(small).flatten(1)
        images = Stored(run, cfg.features, split) if s.stored else data.inputs
        out = s.vectors(images, np.arange(len(data)), f"linear {split} {number}")
        return torch.cat([out[p] for p in itertools.product(s.names, s.times)], 1)

    def measure(what, s, number):
        x, x_test = (vectors(s, split, number).to(run.device) for split in ("train", "test"))
        return probe_vectors(x, y.to(run.device), fit, val, x_test, y_test.to(run.device), int(y.max()) + 1)

    every = {"features": source} | controls(run, cfg, source, source, train.inputs, y, fit)

    def sources(number):                                  # what reads no noise is measured once
        return {what: s for what, s in every.items() if s.noisy or number == 0}

    rows = compare(run, sources, measure, range(cfg.draws), ["linear", "knn"], "test accuracy", unit="draw")
    return dict(train_images=len(fit), validation_images=len(val), test_images=len(test), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Heads, called as head(maps, x_t, t) with maps [times][names] of [B, C, H, W] -> logits [B, classes]

class OneMap(nn.Sequential):
    """Layers that read one map, the first."""

    def forward(self, maps, *_):
        return super().forward(maps[0][0])


class PooledHead(nn.Sequential):
    """Linear probe or MLP on averages over a grid (arXiv 2307.08702: 2 x 2) of all maps side by side, normalised.

    shapes: (C, H, W) of all maps; the grid is no finer than a map.
    """

    def __init__(self, shapes, classes, grid, hidden=()):
        sizes = [sum(c * min(grid, h) * min(grid, w) for c, h, w in shapes), *hidden, classes]
        layers = [nn.BatchNorm1d(sizes[0], affine=False)]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.grid = grid

    def forward(self, maps, *_):
        pooled = []
        for m in itertools.chain(*maps):
            side = min(self.grid, m.shape[2]), min(self.grid, m.shape[3])
            pooled.append(F.adaptive_avg_pool2d(m, side).flatten(1))
        return super().forward(torch.cat(pooled, 1))


def cnn_head(channels, classes, width):
    """Twice 3x3 convolution, norm, ReLU; average; linear. (The paper's exact shape is not published.)"""
    def layer(c):
        return nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    return OneMap(*layer(channels), *layer(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class DifFormer(nn.Module):
    """DifFormer (arXiv 2311.17921): maps of several blocks become tokens of one transformer, once per time; its CLS
    vectors of all times are concatenated.

    With one block and one time this is the attention head of 2307.08702. Papers: width 1024, depth 2, heads 8, side 16;
    no positions. shapes: (C, H, W) of each block; hidden: width of the feed-forward parts, 0 = 4 x width.
    """

    def __init__(self, shapes, times, classes, width, depth, heads, side=16, hidden=0):
        super().__init__()
        self.tokens = nn.ModuleList()                     # of each block, shared by all times
        for c, h, w in shapes:
            h, w = min(h, side), min(w, side)
            to_tokens = nn.AdaptiveAvgPool2d((h, w)), nn.LayerNorm([c, h, w]), nn.Conv2d(c, width, 1)
            self.tokens.append(nn.Sequential(*to_tokens))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        if hidden:
            for b in self.blocks:
                b.mlp.fc1, b.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.out = nn.Linear(times * width, classes)

    def forward(self, maps, *_):
        seen = []
        for blocks in maps:                               # times do not attend to each other
            tokens = [f(m).flatten(2).transpose(1, 2) for f, m in zip(self.tokens, blocks)]      # [B, h * w, width]
            x = torch.cat([self.cls.expand(len(blocks[0]), -1, -1), *tokens], 1)                 # [B, 1 + L, width]
            for b in self.blocks:
                x = b(x)
            seen.append(x[:, 0])
        return self.out(torch.cat(seen, 1))


def mirrors(net):
    """DifFeed's pairs (name of a decoder output, module of the mirrored encoder output it is added to), one per level:
    the first residual block there.

    In ADM's numbering 38 - b <- b (method of arXiv 2311.17921); channels and size of the two are equal in every U-Net
    that build_model makes. U-ViT (ours): every pair of blocks that a long skip joins.
    """
    names = {id(module): name for name, (module, _) in catalogue(net).items()}
    if isinstance(net, UViT):
        return [(names[id(up)], down) for down, up in zip(net.in_blocks, reversed(net.out_blocks))]
    down = net.input_blocks
    first = [i for i in range(1, len(down)) if i == 1 or down[i - 1][0].resample]
    return [(names[id(net.output_blocks[len(down) - 1 - i][-1])], down[i][-1]) for i in first]


class DifFeed(nn.Module):
    """DifFeed (arXiv 2311.17921): a second pass of the same x_t, to which decoder maps of the first are added in the
    encoder; attention head on `name`.

    The network stays frozen, but gradients go through it to the feedback layers. shapes: (C, H, W) of the decoder maps;
    shape: of `name`.
    """

    def __init__(self, net, name, shapes, shape, classes, width, depth, heads, side=16, context=nullcontext):
        super().__init__()
        self.frozen = net, name, [m for _, m in mirrors(net)], context           # a tuple: not to be trained
        self.back = nn.ModuleList()
        for c, _, _ in shapes:
            self.back.append(nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()))
        self.head = DifFormer([shape], 1, classes, width, depth, heads, side)

    def forward(self, maps, x_t, t):                      # maps [1][levels]: decoder outputs of the first pass
        net, name, targets, context = self.frozen

        def adding(g):                                    # a hook that adds g [B, C, H, W] to a map, or to patch tokens
            def add(module, args, out):                   # tokens [B, extras + L, C]: patches come last
                if out.dim() == 4:
                    return out + g.to(out.dtype)
                tokens = g.to(out.dtype).flatten(2).transpose(1, 2)
                return out + F.pad(tokens, (0, 0, out.shape[1] - tokens.shape[1], 0))
            return add

        hooks = [m.register_forward_hook(adding(f(x))) for m, f, x in zip(targets, self.back, maps[0])]
        try:                                              # the skip connections carry the sums, too
            with context():
                second = reader(net, [name], "none")(x_t, t)
        finally:
            for h in hooks:
                h.remove()
        return self.head([second])


@dataclass
class Inputs:
    """What a head is built for: maps of these shapes."""
    source: Source
    shapes: list                                          # (C, H, W) of each activation
    times: int
    image: torch.Tensor | None                            # [1, C, H, W]; of stored maps there is none

    @property
    def side(self):
        return self.image.shape[2]

    @property
    def every(self):                                      # of all times
        return self.times * self.shapes


def pooled_head(cfg, inputs, classes, hidden=()):
    """A linear head or an MLP on maps averaged over a grid."""
    raw = inputs.source.net is None and not inputs.source.stored
    return PooledHead(inputs.every, classes, inputs.side if raw else cfg.grid, hidden)   # of pixels it sees all


def transformer_head(cfg, inputs, classes):
    """DifFormer on all maps and times; of one map the attention head."""
    size = cfg.width, cfg.depth, cfg.heads, cfg.side
    return DifFormer(inputs.shapes, inputs.times, classes, *size, inputs.source.hidden)


def feedback_head(cfg, inputs, classes):
    """DifFeed, whose shapes are found by a pass over a blank image."""
    s = inputs.source
    with torch.no_grad():
        shape = reader(s.net, s.names, "none")(inputs.image, torch.zeros(1, device=s.device))[0].shape[1:]
    size = cfg.width, cfg.depth, cfg.heads, cfg.side
    return DifFeed(s.net, s.names[0], inputs.shapes, shape, classes, *size, s.context)


ALL, BEST = "all", "best"                                 # activations and times that a head reads
HEADS = {                                                 # (protocol, name): (constructor, which it reads)
    ("head", "linear"): (pooled_head, ALL),
    ("head", "mlp"): (lambda cfg, m, classes: pooled_head(cfg, m, classes, cfg.hidden), ALL),
    ("head", "cnn"): (lambda cfg, m, classes: cnn_head(m.shapes[0][0], classes, cfg.width), BEST),
    ("head", "attention"): (transformer_head, BEST),
    ("head", "difformer"): (transformer_head, ALL),
    ("head", "diffeed"): (feedback_head, BEST),
    ("segment", "linear"): (lambda cfg, m, classes: LinearMap(m.every, classes, m.side), ALL),
    ("segment", "uper"): (lambda cfg, m, classes: UPer(m.shapes, m.times, classes, m.side, cfg.width), ALL),
    ("segment", "ensemble"): (lambda cfg, m, classes: PixelMlps(m.every, classes, m.side, cfg.members), ALL),
}


def build_head(cfg, source, images, classes, seed):
    """A fresh head of the kind source.head for what `source` reads of such images, latents or stored maps."""
    x = source.shown(images, np.arange(1))
    maps = source.views(x, [x])[0]
    inputs = Inputs(source, [m.shape[1:] for m in maps[0]], len(source.times), None if source.stored else x)
    with seeded(seed, "head"):
        return HEADS[source.task, source.head][0](cfg, inputs, classes).to(source.device)


def count(module):
    """Trained parameters."""
    return sum(p.numel() for p in module.parameters())


def augmented(x, flip, crop, g):
    """Images [B, C, H, W], mirrored at random, shifted by up to `crop` pixels over mirrored edges."""
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g).to(x.device) < 0.5, x.flip(-1), x)
    if crop:
        h, w = x.shape[2:]
        corners = torch.randint(2 * crop + 1, (len(x), 2), generator=g).tolist()
        wide = F.pad(x, [crop] * 4, mode="reflect")
        x = torch.stack([image[:, i:i + h, j:j + w] for image, (i, j) in zip(wide, corners)])
    return x


@torch.no_grad()
def evaluate(heads, source, images, y, rows, seed, purpose):
    """[(accuracy, or mean IoU of masks, -loss)] of each head over `rows`, in eval mode; noise belongs to the image.

    y: int64 [N], or masks [N, H, W]; -100 = void.
    """
    score, tables = torch.zeros(len(heads), 2), [0] * len(heads)
    for part, seen in source.batches(images, rows, seed, [f"{purpose} {d}" for d in range(source.draws)]):
        target = y[part].to(source.device).long()
        for j, h in enumerate(heads):
            out = h.eval()(*seen)
            found = out.argmax(1)
            loss = F.cross_entropy(out, target, reduction="sum")
            score[j] += torch.stack([(found == target).sum(), -loss]).cpu()
            if y.dim() > 1:
                tables[j] += confusion_matrix(found, target, out.shape[1]).cpu()
    if y.dim() > 1:
        score[:, 0] = torch.tensor([mean_iou(t) * len(rows) for t in tables])
    return [tuple(s) for s in (score / len(rows)).nan_to_num(nan=-math.inf).tolist()]


def fit_head(cfg, source, images, y, fit, val, seed, run=ALONE, what="head"):
    """(head, what was selected): heads for every (lr, l2), trained side by side on the same frozen passes with fresh
    noise on rows `fit`; the best on rows `val`.

    AdamW with one cycle. (2307.08702 and 2311.17921: SGD without momentum, lr 1e-2 or 5e-2, times 0.1 every 7 of 28
    epochs.)
    """
    trials, batch = list(itertools.product(cfg.lr, cfg.l2)), min(cfg.head_batch, len(fit))
    steps, classes = max(1, cfg.images // batch), int(y.max()) + 1
    heads = [build_head(cfg, source, images, classes, seed) for _ in trials]
    opts = [OneCycle([h], lr, l2, steps) for h, (lr, l2) in zip(heads, trials)]
    with bar(run, steps, f"{what}, seed {seed}", "step") as progress:
        for step in range(steps):
            rows = batch_rows(fit, batch, seed, step)
            g = torch.Generator().manual_seed(seed_of(seed, "head noise", step))
            x, target = source.shown(images, rows), y[rows].to(source.device).long()
            if y.dim() > 1:                               # masks move with their images
                both = augmented(torch.cat([x, target[:, None]], 1), cfg.flip, cfg.crop, g)
                x, target = both[:, :-1], both[:, -1].long()
            elif not source.stored:
                x = augmented(x, cfg.flip, cfg.crop, g)
            noises = [] if source.net is None else torch.randn(source.draws, *x.shape, generator=g).to(source.device)
            seen = source.views(x, noises)
            for h, opt in zip(heads, opts):
                opt.step(F.cross_entropy(h.train()(*seen), target))
            progress.update(1)
    scores = evaluate(heads, source, images, y, val, seed, "head validation")
    best = max(range(len(trials)), key=lambda i: scores[i])
    return heads[best], dict(lr=trials[best][0], l2=trials[best][1], validation=scores[best][0])


def batch_rows(rows, batch, seed, step):
    """Rows of one update, sorted, none twice."""
    return np.sort(np.random.default_rng(seed_of(seed, "head rows", step)).choice(rows, batch, replace=False))


def labelled(y, rows, share, per_class, seed):
    """The rows whose labels may be used: a share of each class, at least one, or up to so many of each; of one seed,
    smaller sets lie inside larger ones."""
    rows, keep = np.random.default_rng(seed_of(seed, "labelled rows")).permutation(rows), []
    for k in np.unique(y[rows]):
        of = rows[y[rows] == k]
        keep.append(of[:per_class or max(1, round(share * len(of)))])
    return np.sort(np.concatenate(keep))


def ranking(source, images, y, fit, val):
    """{(name, t): validation accuracy of a ridge classifier on the pooled activation}, of images or stored features."""
    score, (a, v) = {}, (source.vectors(images, rows, "ranking") for rows in (fit, val))
    for place in itertools.product(source.names, source.times):
        x, x_val = standardise(a[place], v[place])
        score[place] = accuracy(ridge(x, y[fit], int(y.max()) + 1, 1e-3), x_val, y[val])
    return score


def readings(cfg, source, images, y, fit, val):
    """({what: Source} of the head that was asked for and of what tells why it is better, the best single place).

    A ridge classifier finds the best single place, on rows `val`. images: or a Stored.
    """
    name, t = source.names[0], source.times[0]
    if len(source.names) * len(source.times) > 1:
        score = ranking(source, images, y, fit, val)
        name, t = max(score, key=score.get)
    fused = cfg.head in ("difformer", "diffeed")
    single = replace(source, head="attention" if fused else cfg.head, names=[name], times=[t])
    asked = replace(source if HEADS["head", cfg.head][1] == ALL else single, head=cfg.head)
    out = {cfg.head: asked}
    if fused:
        out["best single (block, t)"] = single
        if cfg.head == "difformer":
            out["side by side, linear"] = replace(asked, head="linear")
        if not source.stored:                             # of which no further pass can be made
            out["equal passes, averaged"] = replace(single, draws=asked.passes)
        more, one = (count(build_head(cfg, s, images, int(y.max()) + 1, 0)) for s in (asked, single))
        unit = cfg.depth * (2 * cfg.width + 1)            # parameters of one more hidden unit in every block
        out["equal parameters"] = replace(single, hidden=4 * cfg.width + round((more - one) / unit))
    return out, single


HEAD_KEYS = TRAIN_KEYS | {"head", "labels_share", "per_class", "depth", "heads", "side", "grid", "hidden", "draws",
                          "flip", "crop"}


def head(run, cfg, source):
    """Train heads on the fly, or on stored features: selected on the validation part, the test part reported once per
    seed; controls beside it."""
    train, test, y, y_test = known_classes(run, "head")
    parts, images = split_rows(cfg, len(train)), {False: (train.inputs, test.inputs)}
    if source.stored:
        images[True] = [Stored(run, cfg.features, split) for split in ("train", "test")]
    require(cfg.head != "difformer" or len(source.names) * len(source.times) > 1, cfg, "head activations t",
            "needs more than one activation or time")
    upwards = all(n.startswith(("mid", "up")) for n in source.names)
    require(cfg.head != "diffeed" or upwards and mirrors(source.net), cfg, "head activations",
            "reads the middle or the way up")

    def rows_of(seed):
        return [labelled(y.numpy(), part, cfg.labels_share, cfg.per_class, seed) for part in parts]

    def sources(seed):
        fit, val = rows_of(seed)
        few = int(np.unique(y[fit].numpy(), return_counts=True)[1].min())
        require(few >= max(1, cfg.per_class) and len(fit) >= 2, cfg, "per_class labels_share",
                f"a class has only {few} images to learn from")
        own, seen = replace(source, seed=seed), images[source.stored][0]
        out, single = readings(cfg, own, seen, y, fit, val)
        return out | controls(run, cfg, out[cfg.head], single, train.inputs, y, fit)

    def measure(what, s, seed):
        seen, unseen = images[s.stored]
        best, chosen = fit_head(cfg, s, seen, y, *rows_of(seed), seed, run, what)
        tested = []
        for d in range(cfg.draws if s.noisy else 1):
            (score, _), = evaluate([best], s, unseen, y_test, np.arange(len(test)), seed, f"head test {d}")
            tested.append(score)
        mean, std = mean_std(tested)
        return chosen | dict(test=tested, accuracy=mean, noise_std=std, parameters=count(best))

    rows = compare(run, sources, measure, cfg.seeds, ["accuracy"], f"test accuracy, {cfg.head} head")
    fit, val = rows_of(cfg.seeds[-1])
    return dict(head=cfg.head, seeds=cfg.seeds, fresh_noise=not source.stored, train_images=len(fit),
                validation_images=len(val), test_images=len(test), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Properties of activations (arXiv 2410.03558 sees them in pictures and defines no number; these are ours), and the
# selection by them

def noise_sensitivity(a, b):
    """Distance between two noise draws of one image over distance between images; maps a, b [N, C, H, W]: 0 =
    deterministic, 1 = nothing but noise."""
    def distance(x, y):
        return (x - y).flatten(1).norm(dim=1).mean()
    return float(distance(a, b) / distance(a, b.roll(1, 0)).clamp(min=1e-9))


def granularity(a, size):
    """Length at which the spatial autocorrelation of maps [N, C, H, W], averaged over channels, falls to 1/e, in pixels
    of the size x size image.

    The mean of each map is taken away, so that what is equal all over an image does not count as coarse; lengths of
    half a map and more come out too small.
    """
    whole, a = a.square().mean((0, 2, 3)), a - a.mean((2, 3), keepdim=True)
    power = a.square().mean((0, 2, 3))                    # [C]
    live = power > 1e-10 * whole                          # nothing but rounding is left where a channel is all the same
    if not live.any():
        return float(size)
    a, before = a[:, live] / power[live, None, None].sqrt(), 1.0
    for d in range(1, a.shape[3]):
        r = float((a[..., d:] * a[..., :-d]).mean() + (a[..., d:, :] * a[..., :-d, :]).mean()) / 2
        if r < 1 / math.e:
            return (d - 1 + (before - 1 / math.e) / (before - r)) * size / a.shape[3]
        before = r
    return float(size)                                    # it does not fall within the map


def locality(a):
    """How much the resemblance of two positions is a matter of their distance: minus the correlation of cosine
    similarity with distance, over all pairs of positions of maps [N, C, H, W] (at most 16 x 16 of them)."""
    a = a[..., ::math.ceil(a.shape[2] / 16), ::math.ceil(a.shape[3] / 16)]
    f = F.normalize(a - a.mean((0, 2, 3), keepdim=True), dim=1).flatten(2)       # [N, C, L]
    place = torch.cartesian_prod(torch.arange(a.shape[2]), torch.arange(a.shape[3])).float()
    i, j = torch.triu_indices(len(place), len(place), 1)
    similar = (f.transpose(1, 2) @ f)[:, i, j]            # [N, pairs]
    distance = (place[i] - place[j]).norm(dim=1).expand(len(a), -1)
    return -float(torch.corrcoef(torch.stack([similar.flatten(), distance.flatten()]))[0, 1].nan_to_num())


def measure_maps(source, images, rows):
    """{(name, t): dict of the three properties and the map's size}, over `rows` of the images, a few at a time."""
    out = {}
    for part in np.array_split(rows, math.ceil(len(rows) / 16)):
        for t in source.times:                            # one after the other: whole maps are held at once
            one = replace(source, times=[t])
            a, b = (one.maps(images, part, f"select {d}") for d in (0, 1))
            for place in a:
                x, z = a[place].cpu(), b[place].cpu()
                now = dict(sensitivity=noise_sensitivity(x, z), granularity=granularity(x, source.state["size"]),
                           locality=locality(x))
                total = out.setdefault(place, dict(size=x.shape[3]) | dict.fromkeys(now, 0.0))
                for k, v in now.items():
                    total[k] += v * len(part) / len(rows)
    return out


def verdicts(table, blocks, noisy, fine, local):
    """Why activations are dropped at one time, {name: "noisy", "fine", "local", or ""}: in the spirit of the rules of
    2410.03558 (section 4), in numbers. table: {name: properties} in forward order; blocks: names of block outputs.

    The paper keeps the clean half of the way up, without increments and self-attention, and of the noisy half only
    self-attention's q and k. Here: noisy activations go, wherever they are; maps much finer than block outputs of their
    size go (over-refined ends of a level); activations more local than those go, unless their own block's output is
    noisy.
    """
    names, out = list(table), {}
    limit = noisy * np.median([table[b]["sensitivity"] for b in blocks])
    for i, n in enumerate(names):
        peers = [b for b in blocks if table[b]["size"] == table[n]["size"]] or blocks
        own = next((b for b in names[i:] if b in blocks), n)
        coarse = np.median([table[b]["granularity"] for b in peers])
        usual = max(np.median([table[b]["locality"] for b in peers]), 0)
        out[n] = ""
        if table[n]["sensitivity"] > limit:
            out[n] = "noisy"
        elif table[n]["granularity"] < fine * coarse:
            out[n] = "fine"
        elif table[n]["locality"] > local * usual and table[own]["sensitivity"] <= limit and n not in blocks:
            out[n] = "local"
    return out


SELECT_KEYS = {"measured", "noisy", "fine", "local", "fit", "validation"}


def select(run, cfg, source):
    """Measure activations, filter them, rank the rest by a linear probe on the validation part; write the best of every
    map size, at one time, as YAML."""
    train, _, y, _ = known_classes(run, "select")
    blocks = [n for n in matching(source.net, ["blocks"]) if n in source.names]
    require(blocks, cfg, "activations", "name some block outputs, too: they are what the others are compared with")
    fit, val = fit_and_validation(run, cfg, len(train))
    properties, table = measure_maps(source, train.inputs, fit[:cfg.measured]), []
    for t in source.times:
        why = verdicts({n: properties[n, t] for n in source.names}, blocks, cfg.noisy, cfg.fine, cfg.local)
        left = replace(source, times=[t], names=[n for n in source.names if not why[n]])
        score = ranking(left, train.inputs, y, fit, val) if left.names else {}
        for n in source.names:
            place = dict(activation=n, **noise_level(source.state["path"], t))
            table.append(place | properties[n, t] | dict(dropped=why[n], linear=score.get((n, t))))
    rest = sorted((r for r in table if not r["dropped"]), key=lambda r: -r["linear"])
    require(rest, cfg, "noisy fine local", "no activation passes; loosen them")
    best = {r["size"]: r for r in reversed(rest) if r["t"] == rest[0]["t"]}      # of each size the best comes last
    names = [r["activation"] for r in best.values()]
    chosen = dict(activations=[n for n in source.names if n in names], t=[rest[0]["t"]])
    gone = ", ".join(f"{sum(r['dropped'] == w for r in table)} {w}" for w in ("noisy", "fine", "local"))
    found = ", ".join(f"{r['activation']} ({r['size']} x {r['size']}, {r['linear']:.3f})" for r in best.values())
    run.say(f"{len(rest)} of {len(table)} (activation, t) pass; dropped: {gone}; chosen at t={rest[0]['t']:g}: {found}")
    if run.rank == 0:
        write_selection(run, cfg, chosen)
    shown = {r["activation"] for r in rest}
    draw_surface(run, "", [r for r in table if r["activation"] in shown], "linear",
                 "validation accuracy, of activations that pass", [("*", r) for r in best.values()])
    return dict(measured=min(cfg.measured, len(fit)), chosen=chosen, table=table)


def write_selection(run, cfg, chosen):
    """probe/<name>.yaml: this run's configuration, with which extract_features.py and probe.py read what was chosen."""
    whose = chosen | dict(checkpoint=cfg.checkpoint, weights=cfg.weights)
    own = run.sections["probe"]
    keep = {k: own[k] for k in ("precision", "batch", "draws", "validation", "seed")}
    extract = run.sections.get("extract_features", {}) | whose | dict(name=cfg.name)
    sections = run.sections | dict(extract_features=extract, probe=keep | whose)
    with atomic(run.dir / "probe" / f"{cfg.name}.yaml") as f:
        f.write(yaml.safe_dump(sections, sort_keys=False).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation from frozen maps

def confusion_matrix(found, truth, classes):
    """Pixels by true and found class, int64 [classes, classes]; ids of one shape, truth below 0 = void."""
    known = truth >= 0
    return torch.bincount(classes * truth[known] + found[known], minlength=classes ** 2).view(classes, classes)


def mean_iou(table):
    """Intersection over union, averaged over the classes that occur in truth or prediction."""
    both = table.diag()
    union = table.sum(0) + table.sum(1) - both
    return float((both / union)[union > 0].mean())


def enlarged(x, size):
    """Maps [B, C, h, w] at size x size, bilinear."""
    return x if x.shape[2] == size else F.interpolate(x, (size, size), mode="bilinear")


class LinearMap(nn.Module):
    """Linear segmentation: each map [B, C, h, w] is normalised per channel and classified; bilinear interpolation
    commutes with that and comes last. shapes: (C, H, W) of all maps."""

    def __init__(self, shapes, classes, size):
        super().__init__()
        self.size, self.maps = size, nn.ModuleList()
        for c, _, _ in shapes:
            self.maps.append(nn.Sequential(nn.BatchNorm2d(c, affine=False), nn.Conv2d(c, classes, 1)))

    def forward(self, maps, *_):                          # -> [B, classes, size, size]
        return sum(enlarged(f(m), self.size) for f, m in zip(self.maps, itertools.chain(*maps)))


class UPer(nn.Module):
    """UPerNet's decoder (arXiv 1807.10221): pooled views of the coarsest map, sums from coarse to fine, all levels side
    by side; one level per activation, whose maps of all times are concatenated."""

    def __init__(self, shapes, times, classes, size, width):
        super().__init__()

        def conv(a, b, k):
            return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        def pool(side):
            return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Conv2d(width, width, 1), nn.ReLU())

        self.size = size
        self.order = sorted(range(len(shapes)), key=lambda i: shapes[i][1])      # coarse to fine
        self.sides = nn.ModuleList(conv(times * shapes[i][0], width, 1) for i in self.order)
        self.pools = nn.ModuleList(pool(side) for side in (1, 2, 3, 6))
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in shapes)
        self.pooled = conv(5 * width, width, 3)
        self.out = nn.Sequential(conv(len(shapes) * width, width, 3), nn.Conv2d(width, classes, 1))

    def forward(self, maps, *_):                          # -> [B, classes, size, size]
        x = [f(torch.cat([blocks[i] for blocks in maps], 1)) for f, i in zip(self.sides, self.order)]
        x[0] = self.pooled(torch.cat([x[0], *(enlarged(f(x[0]), x[0].shape[2]) for f in self.pools)], 1))
        for i in range(1, len(x)):
            x[i] = x[i] + enlarged(x[i - 1], x[i].shape[2])
        levels = [enlarged(f(v), x[-1].shape[2]) for f, v in zip(self.smooth, x)]
        return enlarged(self.out(torch.cat(levels, 1)), self.size)


class PixelMlps(nn.Sequential):
    """Ensemble of pixel classifiers (arXiv 2112.03126): channels -> 128 -> 32 -> classes (from 30 classes on 256 ->
    128), as groups of one convolution."""

    def __init__(self, shapes, classes, size, members):
        sizes, layers = [sum(c for c, _, _ in shapes), *((256, 128) if classes >= 30 else (128, 32)), classes], []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Conv1d(members * a, members * b, 1, groups=members), nn.ReLU(), nn.BatchNorm1d(members * b)]
        super().__init__(*layers[:-2])
        self.size, self.members = size, members
        for f in list(self)[::3]:
            nn.init.normal_(f.weight, 0, 0.02)

    def pixels(self, maps):                               # -> [B, size, size, C]
        return torch.cat([enlarged(m, self.size) for m in itertools.chain(*maps)], 1).permute(0, 2, 3, 1)

    def of_pixels(self, x):
        """Logits [members, n, classes] of pixels [members, n, C], or [1, n, C], the same for all members."""
        first, *rest = self
        y = F.conv1d(x.transpose(1, 2).reshape(1, -1, x.shape[1]), first.weight, first.bias, groups=len(x))
        for f in rest:
            y = f(y)
        return y.unflatten(1, (self.members, -1))[0].transpose(1, 2)

    def forward(self, maps, *_):                          # -> [members, B, classes, size, size]
        x = self.pixels(maps)
        return self.of_pixels(x.flatten(0, 2)[None]).unflatten(1, x.shape[:3]).movedim(4, 2)


def vote(logits):
    """logits [members, B, classes, H, W] -> (majority [B, H, W], Jensen-Shannon divergence of the members [B, H, W]).

    The divergence, in nats, is the entropy of the mean minus the mean entropy. Ties go to the class of greater mean
    probability.
    """
    def entropy(p):
        return -torch.xlogy(p, p).sum(-3)
    p = logits.softmax(2)
    ballots = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)                # [B, H, W, classes]
    found = (ballots + 0.5 * p.mean(0).movedim(1, 3)).argmax(3)
    return found, entropy(p.mean(0)) - entropy(p).mean(0)


def fit_ensemble(cfg, source, images, y, rows, seed, epochs=100, batch=64):
    """PixelMlps trained on all pixels of `rows` under one noise draw per image, as published (arXiv 2112.03126): Adam
    1e-3, 64 pixels per update, up to 100 epochs, stopped when from epoch 5 on the loss has not fallen for 50 updates.

    Ours: all members stop together, each image has its own noise, pixels are drawn with replacement, rare classes stay.
    """
    net = build_head(cfg, source, images, int(y.max()) + 1, seed)
    with torch.no_grad():
        x = [net.pixels(seen[0]) for _, seen in source.batches(images, rows, seed, ["ensemble 0"])]
    x, target = torch.cat(x).flatten(0, 2), y[rows].flatten().long().to(source.device)           # [pixels, C], [pixels]
    x, target = x[target >= 0], target[target >= 0]
    g = torch.Generator().manual_seed(seed_of(seed, "ensemble pixels"))
    opt, best, stale = torch.optim.Adam(net.train().parameters(), 1e-3), math.inf, 0
    per_epoch = math.ceil(len(x) / batch)
    for step in range(epochs * per_epoch):
        some = torch.randint(len(x), (cfg.members, batch), generator=g).to(source.device)
        loss = F.cross_entropy(net.of_pixels(x[some]).flatten(0, 1), target[some].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step >= 5 * per_epoch:
            stale = 0 if loss.item() < best else stale + 1
            best = min(best, loss.item())
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
        raise UserError(f"protocol={protocol} needs a mask for every image, and this data has none")
    y = [torch.from_numpy(np.array(p.masks).astype(np.int16)) for p in parts]
    for m in y:
        m[m == 255] = -100
        if (m < 0).all():
            raise UserError(f"protocol={protocol}: masks of training or test images are void (255) everywhere")
    if new := unlearnt(*y):
        run.say(f"note: class {new} is in test masks, but in none of training: it cannot be found, and counts as such")
    return *parts, *y


def few_rows(cfg, parts, seed):
    """(rows to learn from, rows to select on): `masks` of each part, or all."""
    return [some_rows(part, seed, "masks", cfg.masks or None) for part in parts]


@torch.no_grad()
def segmented(head, source, images, seed):
    """Yield (rows, found classes [b, H, W], divergence of an ensemble's members [b, H, W]) of all images; CPU."""
    for part, seen in source.batches(images, np.arange(len(images)), seed, ["segment test"]):
        out = head.eval()(*seen)
        found, spread = vote(out if out.dim() == 5 else out[None])
        yield part, found.cpu(), spread.cpu()


SEGMENT_KEYS = TRAIN_KEYS | {"head", "masks", "members", "flip", "crop"}


def segment(run, cfg, source):
    """Semantic segmentation from frozen maps: selected on the validation part, the test part reported once per seed;
    controls beside it."""
    train, test, y, y_test = known_masks(run, "segment")
    classes, parts = 1 + int(max(y.max(), y_test.max())), split_rows(cfg, len(train))
    source = replace(source, task="segment", head=cfg.head, batch=chunk_of(train.images))
    every = {cfg.head: source} | controls(run, cfg, source, source, train.images, classes_of(train), parts[0])
    doubts = dict(right=[], wrong=[])                     # divergence at pixels that are found rightly and wrongly

    def measure(what, s, seed):
        fit, val = few_rows(cfg, parts, seed)
        if cfg.head == "ensemble":
            best, chosen = fit_ensemble(cfg, s, train.images, y, fit, seed), {}
        else:
            best, chosen = fit_head(cfg, s, train.images, y, fit, val, seed, run, what)
        table, shown = torch.zeros(classes, classes, dtype=torch.long), []
        for part, found, spread in segmented(best, s, test.images, seed):
            truth = y_test[part].long()
            table += confusion_matrix(found, truth, classes)
            shown.append((part, found, spread))
            if what == cfg.head == "ensemble":
                doubts["right"].append(spread[(truth >= 0) & (found == truth)])
                doubts["wrong"].append(spread[(truth >= 0) & (found != truth)])
        if what == cfg.head and seed == cfg.seeds[0] and run.rank == 0:
            draw_segments(picture(run), test.images, y_test, shown, cfg.head == "ensemble")
        pixels = float(table.trace() / table.sum())
        return chosen | dict(miou=mean_iou(table), pixel_accuracy=pixels, parameters=count(best))

    rows = compare(run, lambda seed: every, measure, cfg.seeds, ["miou"])
    fit, val = few_rows(cfg, parts, cfg.seeds[-1])
    result = dict(head=cfg.head, classes=classes, train_images=len(fit), test_images=len(test), rows=rows,
                  validation_images=0 if cfg.head == "ensemble" else len(val))
    if cfg.head == "ensemble":
        result["uncertainty"] = {k: float(torch.cat(v).mean().nan_to_num()) for k, v in doubts.items()}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Correspondence by nearest neighbours

class Pairs(typing.NamedTuple):
    """Images with points that correspond."""
    source: np.ndarray                                    # uint8 [N, 3, H, W]
    target: np.ndarray
    points: torch.Tensor                                  # [N, P, 2] (x, y) of the source, in [-1, 1]
    goal: torch.Tensor                                    # [N, P, 2] in pixels of the target
    limit: torch.Tensor                                   # [N] what distances are measured by, in pixels


def warps(n, size, seed, turn=0.5, zoom=0.25, shift=0.2, bend=0.06):
    """Random smooth maps from positions of a warped image to those of its source, [n, size, size, 2] (x, y in [-1, 1]):
    a similarity plus a slow bend."""
    g = torch.Generator().manual_seed(seed_of(seed, "warps"))
    a, s, x, y = (torch.rand(4, n, generator=g) * 2 - 1) * torch.tensor([turn, zoom, shift, shift])[:, None]
    cos, sin = a.cos() * s.exp(), a.sin() * s.exp()
    theta = torch.stack([cos, -sin, x, sin, cos, y], 1).view(n, 2, 3)
    bends = bend * torch.randn(n, 2, 4, 4, generator=g)
    bends = F.interpolate(bends, (size, size), mode="bicubic", align_corners=True)
    return F.affine_grid(theta, (n, 1, size, size), align_corners=False) + bends.permute(0, 2, 3, 1)


def pick_points(valid, points, seed):
    """Positions int64 [N, points] among the true pixels of valid [N, H, W], and whether an image has any, bool [N]."""
    weights = valid.flatten(1).float()
    some = weights.any(1)
    g = torch.Generator().manual_seed(seed_of(seed, "points"))
    return torch.multinomial(weights + ~some[:, None], points, replacement=True, generator=g), some


def centres(at, size):
    """Pixels of size x size images, counted row by row, as (x, y) of their centres; at int64 [N, P] -> [N, P, 2]."""
    return torch.stack([at % size, at // size], 2) + 0.5


def warped_pairs(images, masks, points, seed):
    """Pairs of an image and its known warp; points lie on objects (mask above 0, not void) where there are masks.

    limit: the image's side.
    """
    size, x = images.shape[2], torch.from_numpy(np.ascontiguousarray(images)).float()
    grid = warps(len(x), size, seed)
    target = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False).round().to(torch.uint8).numpy()
    valid = (grid.abs() < 1).all(3)
    if masks is not None:
        masks = torch.from_numpy(np.array(masks))[:, None].float()
        seen = F.grid_sample(masks, grid, mode="nearest", align_corners=False)[:, 0]
        valid &= (seen > 0) & (seen < 255)
    position, some = pick_points(valid, points, seed)
    source = grid.flatten(1, 2).gather(1, position[..., None].expand(-1, -1, 2))
    keep = some.numpy()
    limit = torch.full((int(some.sum()),), float(size))
    return Pairs(images[keep], target[keep], source[some], centres(position, size)[some], limit)


def class_pairs(data, rows, points, seed, parts=None):
    """Pairs of two images of one class: a point of an object, and the same part of the other's.

    parts (origin [N, 2], axes [N, 2, 2]): of each image's object, as of `shape_parts`. Where they are not known: the
    same place relative to the box. limit: the longer side of the target's box.
    """
    boxes = data.boxes.reshape(len(data), -1, 4)[:, 0]    # of several objects the first
    last, order, size = {}, [], data.images.shape[2]
    there = rows[boxes[rows][:, 2] > boxes[rows][:, 0]]
    for i in np.random.default_rng(seed_of(seed, "class pairs")).permutation(there):
        k = int(data.classes[i])
        if k in last:
            order.append((i, last[k]))                    # the previous image of the same class is the partner
        last[k] = i
    if not order:
        raise UserError(f"pairs={len(rows)}: no two of these test images have a class in common; ask for more")
    a, b = np.array(order).T
    valid = torch.from_numpy(filled(boxes[a][:, None], size))
    if data.masks is not None:
        valid &= torch.from_numpy((data.masks[a] > 0) & (data.masks[a] < 255))
    position, some = pick_points(valid, points, seed)
    if parts is None:
        parts = boxes[:, :2], np.einsum("nd,de->nde", boxes[:, 2:] - boxes[:, :2], np.eye(2))
    origin, axes = (torch.tensor(v, dtype=torch.float32) for v in parts)
    p = centres(position, size)
    local = torch.linalg.solve(axes[a], (p - origin[a][:, None]).mT).mT          # [N, P, 2] in the object's own axes
    goal = origin[b][:, None] + local @ axes[b].mT
    limit = torch.from_numpy(boxes[b][:, 2:] - boxes[b][:, :2]).amax(1)
    keep = some.numpy()
    return Pairs(data.images[a[keep]], data.images[b[keep]], (2 * p / size - 1)[some], goal[some], limit[some])


def similarity(source, target, points, size):
    """Cosine similarity of points [N, P, 2] in [-1, 1] of maps source [N, C, h, w] with every pixel of target
    [N, C, h, w], [N, P, size * size]. Maps are centred per pair, since activations share a large common direction."""
    mean = (source.mean((2, 3), keepdim=True) + target.mean((2, 3), keepdim=True)) / 2
    a = F.grid_sample(source - mean, points[:, :, None], padding_mode="border", align_corners=False)
    b = F.normalize(enlarged(target - mean, size), dim=1).flatten(2)             # [N, C, size * size]
    return F.normalize(a[..., 0], dim=1).transpose(1, 2) @ b


def matches(source, pairs):
    """Found positions [N, P, 2] in target pixels by nearest neighbour, for every (name, t) that the source reads, and
    for all of them together under the key "together"."""
    size, found = pairs.source.shape[2], {}
    chunk = min(32, chunk_of(pairs.source))
    for part in np.array_split(np.arange(len(pairs.source)), math.ceil(len(pairs.source) / chunk)):
        total, points = 0, pairs.points[part].to(source.device)
        for t in source.times:                            # one after the other: whole maps are held
            if source.net is None:
                a, b = ({("pixels", t): source.shown(v, part)} for v in (pairs.source, pairs.target))
            else:
                one = replace(source, times=[t])
                a, b = one.maps(pairs.source, part, "source"), one.maps(pairs.target, part, "target")
            for place in a:
                s = similarity(a[place], b[place], points, size)
                total = total + s
                found.setdefault(place, []).append(s.argmax(2).cpu())
        found.setdefault("together", []).append(total.argmax(2).cpu())
    return {place: centres(torch.cat(parts), size) for place, parts in found.items()}


def pck(found, pairs, share):
    """Percentage of correct keypoints, as a share of 1: found [N, P, 2] within `share` of the limit of the goal."""
    return float(((found - pairs.goal).norm(dim=2) <= share * pairs.limit[:, None]).float().mean())


CORRESPOND_KEYS = CONTROL_KEYS - {"validation"} | {"pairs", "points"}


def correspond_pairs(run, cfg):
    """(pairs to choose a place by, {task: pairs to report}, training images, rows of them that make pairs): warped
    training images; warped test images, and test images paired by class."""
    data = {split: probed(run, split) for split in ("train", "test")}
    rows, warped = {}, {}
    for split, part in data.items():
        n = min(cfg.pairs, max(1, len(part) // 2))        # half at most, so that the supervised control has others
        r = rows[split] = some_rows(len(part), cfg.seed, "pairs", n)
        masks = None if part.masks is None else part.masks[r]
        warped[split] = warped_pairs(part.images[r], masks, cfg.points, seed_of(cfg.seed, f"warps {split}"))
    test, tasks = data["test"], dict(warps=warped["test"])
    if run.data.source == "shapes" and not cfg.transfer:
        where = shape_parts(seed_of(run.data.seed, "test"), np.arange(len(test)), run.data.size, run.data.two_objects)
        tasks["parts"] = class_pairs(test, rows["test"], cfg.points, cfg.seed, where)
    elif test.boxes is not None and (test.classes >= 0).all():
        tasks["boxes"] = class_pairs(test, rows["test"], cfg.points, cfg.seed)
    if not all(len(pairs.source) for pairs in (warped["train"], *tasks.values())):
        raise UserError("protocol=correspond: no training or no test image has an object to take points from")
    return warped["train"], tasks, data["train"], rows["train"]


def correspond(run, cfg, source):
    """PCK of every (activation, t) on warped training images; of the best, and of all together, on test images; beside
    it random weights at the place that is best for them, the supervised network at the same activation without
    noise. Nothing is trained (2410.03558 trains a convolution)."""
    known, tasks, train, rows = correspond_pairs(run, cfg)

    def best_place(s):                                    # (the source at its best place, PCK of every place)
        score = {place: pck(found, known, 0.1) for place, found in matches(s, known).items() if place != "together"}
        name, t = max(score, key=score.get)
        return replace(s, names=[name], times=[t]), score

    chosen, score = best_place(source)
    others = np.setdiff1d(np.arange(len(train)), rows)
    compared = controls(run, cfg, source, chosen, train.images, classes_of(train), others)
    if "random weights" in compared:
        compared["random weights"] = best_place(compared["random weights"])[0]
    scores, (name, t) = {}, (chosen.names[0], chosen.times[0])
    for task, pairs in tasks.items():
        every, size = matches(source, pairs), pairs.source.shape[2]
        ways = {f"{name}, t={t:g}": every[name, t],
                f"all {len(source.names)} x {len(source.times)} together": every["together"]}
        ways |= {what: matches(s, pairs)["together"] for what, s in compared.items()}
        ways["the same place"] = (pairs.points + 1) * size / 2
        for what, found in ways.items():
            got = {f"pck@{share:g}": pck(found, pairs, share) for share in (0.05, 0.1, 0.2)}
            scores.setdefault(what, {})[task] = got
            run.say(f"{task:8} {what:40} " + "  ".join(f"{k} {v:.3f}" for k, v in got.items()))
        if run.rank == 0:
            draw_matches(picture(run, f"-{task}"), pairs, every[name, t])
    table = [dict(activation=n, t=s, pck=v) for (n, s), v in score.items()]
    best = dict(activation=name, t=t)
    draw_surface(run, "", table, "pck", "at 0.1 on warped training images; * = chosen", [("*", best)])
    places = {what: dict(activation=s.names[0], t=s.times[0]) for what, s in compared.items() if s.net is not None}
    return dict(chosen=best, pairs={k: len(v.source) for k, v in tasks.items()}, points=cfg.points, scores=scores,
                controls=places, table=table)


# ---------------------------------------------------------------------------------------------------------------------
# Objects from frozen maps: torchvision's Mask R-CNN and Faster R-CNN

def instances(mask, least=4):
    """Objects of a mask int [H, W], as torchvision's targets: dict(labels int64 [n], masks uint8 [n, H, W], boxes
    float32 [n, 4]). They are the 4-connected pieces of every class above 0 with at least so many pixels."""
    labels, pieces = [], []
    for k in mask[(mask > 0) & (mask < 255)].unique().tolist():
        rest = mask == k
        while rest.any():
            piece = largest_component(rest.view(1, -1), mask.shape).view(mask.shape)
            rest = rest & ~piece
            if piece.sum() >= least:
                labels.append(k)
                pieces.append(piece)
    masks = torch.stack(pieces) if pieces else torch.zeros(0, *mask.shape, dtype=torch.bool)
    boxes = bounds(masks) if pieces else torch.zeros(0, 4)
    return dict(labels=torch.tensor(labels, dtype=torch.long), masks=masks.to(torch.uint8), boxes=boxes)


def known_objects(run):
    """(training part, test part, function from a part and a row to its true objects, number of classes with the
    background, are there masks). Objects are the pieces of the masks; without masks the boxes, of the image's class."""
    parts = [probed(run, split) for split in ("train", "test")]
    if all(p.masks is not None and p.masks.shape[1:] == p.images.shape[2:] for p in parts):
        train, test, y, _ = known_masks(run, "detect")
        return train, test, lambda part, i: instances(torch.from_numpy(np.array(part.masks[i]))), int(y.max()) + 1, True
    if any(p.boxes is None for p in parts):
        raise UserError("protocol=detect needs masks or boxes, and this data has none")
    train, test, y, _ = known_classes(run, "detect")

    def boxed(part, i):
        boxes = torch.from_numpy(np.array(part.boxes[i], np.float32)).view(-1, 4)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]                      # the others fill up
        return dict(labels=torch.full((len(boxes),), 1 + int(part.classes[i])), boxes=boxes)
    return train, test, boxed, int(y.max()) + 2, False


class FrozenPyramid(nn.Module):
    """Frozen maps, normalised, as a feature pyramid (arXiv 1612.03144); `noise` [B, 3, H, W] is set before a call."""

    def __init__(self, source, shapes, width):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork
        self.source = (source,)                           # in a tuple: no part of what is trained
        self.out_channels, self.noise = width, None
        self.order = sorted(range(len(shapes)), key=lambda i: -shapes[i][1])     # fine to coarse
        channels = [shapes[i][0] for i in self.order]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)
        self.pyramid = FeaturePyramidNetwork(channels, width)

    def forward(self, x):                                 # [B, 3, H, W] in [-1, 1] -> {level: [B, width, h, w]}
        maps = self.source[0].views(x, [self.noise])[0][0]
        return self.pyramid({str(j): f(maps[i]) for j, (f, i) in enumerate(zip(self.norms, self.order))})


def detector(cfg, source, images, classes, masked, seed):
    """Mask R-CNN (arXiv 1703.06870), or without masks Faster R-CNN (1506.01497), on what `source` reads of such images;
    classes counts the background."""
    torchvision_datasets()                                # torchvision then imports beside a CPU-only torch, too
    try:
        from torchvision.models.detection import FasterRCNN, MaskRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.ops import MultiScaleRoIAlign, nms
        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError):
        raise UserError("protocol=detect: torchvision's compiled operators do not load; install the one that was built "
                        "for this PyTorch") from None
    size, width, x = images.shape[2], cfg.width, source.shown(images, np.arange(1))
    shapes = [m.shape[1:] for m in source.views(x, [x])[0][0]]
    strides = sorted(size / h for _, h, _ in shapes)
    if any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise UserError(f"protocol=detect: activations={source.names} have maps of {sorted({h for _, h, _ in shapes})} "
                        "positions a side; name one activation per size, each size twice the one before")

    def pool(side):
        levels = [str(i) for i in range(len(shapes))]
        return MultiScaleRoIAlign(levels, side, 2, canonical_scale=size, canonical_level=round(math.log2(strides[-1])))

    with seeded(seed, "detector"):
        anchors = AnchorGenerator(tuple((4 * s, 6 * s) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
        about = dict(
            min_size=size, max_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, size_divisible=1,
            rpn_anchor_generator=anchors, rpn_pre_nms_top_n_train=500, rpn_pre_nms_top_n_test=500,
            rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100, box_roi_pool=pool(7),
            box_head=TwoMLPHead(49 * width, width), box_predictor=FastRCNNPredictor(width, classes),
            box_detections_per_img=20, box_batch_size_per_image=64)
        if masked:
            about |= dict(mask_roi_pool=pool(14), mask_head=MaskRCNNHeads(width, (width, width), 1),
                          mask_predictor=MaskRCNNPredictor(width, width, classes))
        net = (MaskRCNN if masked else FasterRCNN)(FrozenPyramid(source, shapes, width), **about)
    return net.to(source.device)


def fit_detector(cfg, net, source, images, objects, rows, lr, l2, seed, progress):
    """Train a detector on `rows` with its own losses, fresh noise for every image; AdamW, one cycle.

    objects: from a row to the true objects there.
    """
    net, batch = net.train(), min(cfg.head_batch, len(rows))
    steps = max(1, cfg.images // batch)
    opt = OneCycle([net], lr, l2, steps)
    for step in range(steps):
        part = batch_rows(rows, batch, seed, step)
        part = np.array([i for i in part if len(objects(i)["labels"])], int)
        if len(part):
            x = (source.shown(images, part) + 1) / 2      # torchvision normalises itself
            g = torch.Generator().manual_seed(seed_of(seed, "head noise", step))
            net.backbone.noise = torch.randn(x.shape, generator=g).to(source.device)
            targets = [{k: v.to(source.device) for k, v in objects(i).items()} for i in part]
            with torch.random.fork_rng():                 # torchvision samples proposals by the global generator
                torch.manual_seed(seed_of(seed, "proposals", step))
                losses = net(list(x), targets)
            opt.step(sum(losses.values()), clip=1.0)
        progress.update(1)
    return net.eval()


@torch.no_grad()
def detections(net, source, images, rows, seed, purpose):
    """Found objects of each image: [dict(labels, scores, boxes, of Mask R-CNN masks bool [n, H, W])], on the CPU."""
    out, batch = [], min(source.batch, 64)
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        net.backbone.noise = draw(seed, purpose, part, images.shape[1:]).to(source.device)
        for found in net(list((source.shown(images, part) + 1) / 2)):
            out.append({k: (v[:, 0] > 0.5 if k == "masks" else v).cpu() for k, v in found.items()})
    return out


def box_overlap(found, truth):
    """IoU of boxes, [found, truth]."""
    return iou(found["boxes"].numpy()[:, None], truth["boxes"].numpy()[None])


def mask_overlap(found, truth):
    """IoU of masks, [found, truth]."""
    a, b = (v["masks"].flatten(1).float() for v in (found, truth))
    both = a @ b.T
    return (both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)).numpy()


def hits(overlaps, wanted, thresholds):
    """Which detections are right, by threshold: bool [thresholds, found]. overlaps [found, truth], detections in order
    of score; wanted: bool [truth]. A detection takes the object, of those still free, that it overlaps most."""
    right = np.zeros((len(thresholds), len(overlaps)), bool)
    for i, threshold in enumerate(thresholds):
        free = wanted.copy()
        for j, row in enumerate(overlaps if wanted.any() else ()):
            best = np.where(free, row, -1).argmax()
            right[i, j] = free[best] and row[best] >= threshold
            free[best] &= not right[i, j]
    return right


def coco_ap(found, truth, overlap, thresholds=np.linspace(0.5, 0.95, 10)):
    """COCO's average precision, by threshold of IoU: mean over the classes of truth of the precision, made monotone, at
    101 recalls. [thresholds]. found, truth: a dict for each image, as of `detections` and `instances`."""
    overlaps, out = [overlap(f, t) for f, t in zip(found, truth)], []
    for k in torch.cat([t["labels"] for t in truth]).unique():
        scores, right, total = [], [], 0
        for f, t, o in zip(found, truth, overlaps):
            order = torch.argsort(-f["scores"], stable=True).numpy()
            mine, wanted = order[(f["labels"] == k).numpy()[order]], (t["labels"] == k).numpy()
            right.append(hits(o[mine], wanted, thresholds))
            scores.append(f["scores"].numpy()[mine])
            total += wanted.sum()
        order = np.argsort(-np.concatenate(scores), kind="stable")
        ranked = np.concatenate(right, 1)[:, order].cumsum(1)                    # right ones so far
        precision = ranked / np.arange(1, ranked.shape[1] + 1)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        places = [np.searchsorted(r / total, np.linspace(0, 1, 101)) for r in ranked]
        out.append([np.append(p, 0)[i].mean() for p, i in zip(precision, places)])
    return np.mean(out, 0) if out else np.zeros(len(thresholds))


DETECT_KEYS = TRAIN_KEYS | {"masks"}


def detect(run, cfg, source):
    """Boxes, and masks where they are known, on a frozen pyramid: lr and l2 selected on the validation part, AP of the
    test part once per seed; controls beside it."""
    train, test, objects, classes, masked = known_objects(run)
    require(len(source.times) == 1, cfg, "t", "detect reads one time")
    parts, trials, n = split_rows(cfg, len(train)), list(itertools.product(cfg.lr, cfg.l2)), len(train.images[0, 0])
    known = functools.lru_cache(10 ** 9 // (4 * n * n))(lambda i: objects(train, i))             # a gigabyte of them
    truth = [objects(test, i) for i in range(len(test))]
    kinds = dict(boxes=box_overlap, masks=mask_overlap) if masked else dict(boxes=box_overlap)
    every = {"detect": source} | controls(run, cfg, source, source, train.images, classes_of(train), parts[0])

    def measure(what, s, seed):
        fit, val = few_rows(cfg, parts, seed)
        steps, best = max(1, cfg.images // min(cfg.head_batch, len(fit))), (-1.0,)
        with bar(run, len(trials) * steps, f"{what}, seed {seed}", "step") as progress:
            for lr, l2 in trials:
                net = detector(cfg, s, train.images, classes, masked, seed)
                fit_detector(cfg, net, s, train.images, known, fit, lr, l2, seed, progress)
                score = 0.0
                if len(trials) > 1:
                    tried = detections(net, s, train.images, val, seed, "detect validation")
                    score = coco_ap(tried, [known(i) for i in val], box_overlap).mean()
                best = max(best, (score, lr, l2, net), key=lambda b: b[0])
        _, lr, l2, net = best
        found = detections(net, s, test.images, np.arange(len(test)), seed, "detect test")
        if what == "detect" and seed == cfg.seeds[0] and run.rank == 0:
            draw_objects(picture(run), test.images, truth, found)
        got = dict(lr=lr, l2=l2, parameters=count(net))
        for kind, overlap in kinds.items():
            ap = coco_ap(found, truth, overlap)
            got |= {f"{kind}_ap": float(ap.mean()), f"{kind}_ap50": float(ap[0]), f"{kind}_ap75": float(ap[5])}
        return got

    scores = [f"{kind}_{score}" for kind in kinds for score in ("ap", "ap50")]
    rows = compare(run, lambda seed: every, measure, cfg.seeds, scores)
    fit, val = few_rows(cfg, parts, cfg.seeds[-1])
    return dict(seeds=cfg.seeds, train_images=len(fit), validation_images=len(val), test_images=len(test),
                objects=sum(len(t["labels"]) for t in truth), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing representations, without labels

def hsic(features):
    """Unbiased estimates of the Hilbert-Schmidt independence criterion, linear kernel, between all of `features`, m
    arrays [n, D] over the same images: [m, m].

    HSIC_1 of Song et al. (JMLR 2012, equation 5): (tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n (n-3)) with
    Gram matrices K, L of zero diagonal. Its expectation does not depend on n, so that mini-batches may be averaged; for
    linear kernels it is |cov(x, y)|_F^2.
    """
    n, grams = len(features[0]), []
    for x in features:
        x = (x - x.mean(0)).double()                      # a shift changes nothing but rounding
        grams.append(x @ x.T)
    K = torch.stack(grams)                                # [m, n, n]
    K.diagonal(dim1=1, dim2=2).zero_()
    rows, flat = K.sum(2), K.flatten(1)                   # [m, n], [m, n n]
    total = rows.sum(1)
    middle = torch.outer(total, total) / ((n - 1) * (n - 2))
    return (flat @ flat.T + middle - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def alignment(a, b):
    """Mean squared distance between unit features of two noise draws of one image; a, b [n, D] (arXiv 2005.10242)."""
    return float((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean())


def gaussian_potential(a):
    """Mean of exp(-2 |x - y|^2) over the pairs of different rows of a [n, D], as unit vectors; its logarithm is the
    uniformity (arXiv 2005.10242)."""
    return float((-2 * torch.pdist(F.normalize(a, dim=1)).square()).exp().mean())


CKA_KEYS = {"grid", "against", "compared"}


def compared_models(run, cfg, source):
    """{name: Source} of the model and of those that against= names."""
    models = {cfg.checkpoint: source}
    for name in cfg.against:
        if name == "random":
            models[name] = replace(source, net=random_network(source))
            continue
        net, state = load_model(run, name, cfg.weights)
        if any(state[k] != source.state[k] for k in ("channels", "size")):
            raise UserError(f"against={name}: sees images of another size")
        models[name] = replace(source, net=net, state=state, names=named(cfg, net))
    return models


def cka(run, cfg, source):
    """Linear CKA between all (model, activation, t), from mini-batches (arXiv 2010.15327), and alignment and uniformity
    of each."""
    data, models = probed(run, "test"), compared_models(run, cfg, source)
    keys = [(m, n, t) for m, s in models.items() for t in s.times for n in s.names]
    rows = np.arange(min(cfg.compared, len(data)))
    require(len(rows) >= 8 and len(keys) > 1, cfg, "compared activations t",
            f"at least 8 images (of {len(data)}), and two things to compare")
    total, spread = 0, np.zeros((len(keys), 2))
    with bar(run, len(rows), "comparing") as progress:
        for part in np.array_split(rows, math.ceil(len(rows) / 128)):
            seen, share = [{}, {}], len(part) / len(rows)                        # of two noise draws
            for number, (m, s) in itertools.product(range(2), models.items()):
                for place, v in s.maps(data.inputs, part, f"cka {number}", pool=str(cfg.grid)).items():
                    seen[number][m, *place] = v.flatten(1)
            a, b = ([one[k] for k in keys] for one in seen)
            total = total + hsic(a) * share
            spread += np.array([[alignment(x, z), gaussian_potential(x)] for x, z in zip(a, b)]) * share
            progress.update(len(part))
    scale = total.diag().clamp(min=1e-30).sqrt()
    matrix, table = (total / torch.outer(scale, scale)).cpu().tolist(), []
    for (m, n, t), (near, potential) in zip(keys, spread):
        uniformity = float(np.log(max(potential, 1e-300)))
        table.append(dict(model=m, activation=n, t=t, alignment=float(near), uniformity=uniformity))
        run.say(f"{m:20} {n:36} t={t:<5g} alignment {near:.4f}  uniformity {uniformity:.3f}")
    if run.rank == 0:
        captions = [f"{i} {m if len(models) > 1 else ''} {n} t={t:g}" for i, (m, n, t) in enumerate(keys)]
        columns = [str(i) for i in range(len(keys))]
        heat_map(picture(run), matrix, captions, columns, "linear CKA")
    return dict(images=len(rows), table=table, cka=matrix)


# ---------------------------------------------------------------------------------------------------------------------
# How samples keep to the layouts that they were asked for

def filled(boxes, size):
    """Pixels whose centre is in any of boxes [N, objects, 4] (x0 y0 x1 y1, negative = none): bool [N, size, size]."""
    centre = np.arange(size) + 0.5
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes, np.float32), -1, 0)[..., None]                # [N, objects, 1] each
    rows, columns = (centre >= y0) & (centre < y1), (centre >= x0) & (centre < x1)
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def warm(images):
    """Exact masks bool [n, H, W] of `shapes` [n, 3, H, W]: objects have more red than blue, by 92 on average, the
    ground has less, by 51."""
    return images[:, 0].astype(np.int16) - images[:, 2] > 20


def open_samples(run, cfg, how):
    """The model that samples/<samples> are of, as (Source without a network, what the samples add to the recipe)."""
    check_name("samples", cfg.samples)
    file = run.dir / "samples" / cfg.samples / "metrics.json"
    made = read_json(file, "make the samples with sample_ode.py")
    with reading(file, "sample again"):
        cfg.checkpoint, hash_then, recipe = made["checkpoint"], made["hash"], digest(made["recipe"])
    state = load_checkpoint(run, cfg.checkpoint)
    require(state["weights"] == hash_then, cfg, "samples", f"were made by an earlier state of {cfg.checkpoint}")
    require(state.get("condition") in ("box", "mask"), cfg, "samples", "were asked for no boxes or masks")
    return Source(None, state, [], [], **how), dict(samples=recipe)


def asked_for(run, state, recipe, labels):
    """Areas bool [n, H, W] that samples with these labels, rows of a bank of layouts, were to fill: inside the boxes,
    on the masks. The bank is the checkpoint's, or what the samples' recipe put in its place."""
    condition = load_condition(state, "cpu")
    if recipe.get("boxes"):
        from sample_ode import SampleOde, drawn_layout    # only here: another layout than those of training
        condition = drawn_layout(SampleOde(boxes=recipe["boxes"]), state, condition, "cpu")
    maps = condition.table.cpu().numpy()[labels]          # boxes: 0 = inside; masks: 0 = none, kinds = whatever
    return maps == 0 if state["condition"] == "box" else (maps > 0) & (maps < condition.kinds)


def made_by(run, name):
    """(name, recipe) of the labels that labels/<name> come from: of shuffled ones (method=random) those of their
    reference. No recipe: made by another program, or gone."""
    while True:
        file = run.dir / "labels" / f"{name}.json"
        how = read_json(file, "make the labels again").get("recipe", {}) if file.exists() else {}
        if how.get("method") != "random":
            return name, how
        name = how["reference"]


def open_finder(run, cfg, label_file):
    """What finds objects in samples as those of the labels were found: (Source, what labels/<name>.json says)."""
    name, how = made_by(run, cfg.finder or label_file)
    if how.get("foreground" if how.get("method") == "masks" else "method") not in ("lost", "ncut"):
        raise UserError(f"finder={name}: these labels were not found as objects (method=lost, ncut or masks)")
    info = load_labels(run, name)[1]
    of = info["features"]
    net, state = load_model(run, of["checkpoint"], of["weights"])
    if of["weights"] == "ema" and state["weights"] != of["hash"]:
        raise UserError(f"finder={name}: {of['checkpoint']} has changed since; make features and labels again")
    names, times = (list(dict.fromkeys(a[k] for a in of["arrays"])) for k in ("activation", "t"))
    context = autocast(run, cfg.precision)[0]
    return Source(net, state, names, times, device=run.device, context=context, seed=of["seed"]), info


def find_layouts(source, info, images, rows, as_boxes):
    """Where the finder sees objects in these rows of uint8 images: bool [n, H, W], masks or filled boxes."""
    how, of, size, out = info["recipe"], info["features"], images.shape[2:], []
    method = how["foreground"] if how["method"] == "masks" else how["method"]
    read = source.stream(images, rows, "features samples", pool=of["pool"], draws=of["draws"], batch=64)
    for part, got in read:
        maps = [got[a["activation"], a["t"]] for a in of["arrays"]]
        if of["pool"] != "none":
            maps = [m.unflatten(1, (-1, int(of["pool"]), int(of["pool"]))) for m in maps]
        shown = torch.from_numpy(np.array(images[part])).to(source.device) if how["guide"] else None
        found = find_objects(joined(maps, info["grid"], info["scales"]), tuple(info["grid"]), size, method,
                             how["objects"], how.get("tau", 0.2), how["contrast"], how["refine"], shown)
        out.append(filled(found["boxes"].cpu().numpy(), size[0]) if as_boxes else found["masks"].cpu().numpy() > 0)
    return np.concatenate(out) if out else np.zeros((0, *size), bool)


def exact_layouts(images, as_boxes):
    """What `find_layouts` would see in `shapes` if it were never wrong: of boxes that of the largest object."""
    exact = torch.from_numpy(warm(images))
    if as_boxes:
        exact = largest_component(exact.flatten(1), exact.shape[1:]).view_as(exact)
        return filled(bounds(exact)[:, None].numpy(), images.shape[2])
    return exact.numpy()


def overlap_of(asked, found):
    """IoU of areas bool [n, H, W], image by image; where nothing was asked for and nothing is, 1."""
    either = (asked | found).sum((1, 2))
    return np.where(either > 0, (asked & found).sum((1, 2)) / np.maximum(either, 1), 1.0)


LAYOUT_KEYS = {"finder"}


def layout(run, cfg, source):
    """How well samples keep to the boxes or masks they were asked for: mean IoU of areas; of boxes the filled boxes.

    layout_iou: with what the finder sees in the samples. exact_iou: with exact masks on `shapes`, where layouts mean
    objects there: not for segments of all patches, nor for boxes of several objects.
    """
    folder, state = run.dir / "samples" / cfg.samples, source.state
    with reading(folder, "make the samples with sample_ode.py"):
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        recipe = read_json(folder / "metrics.json", "sample again")["recipe"]
        asked = asked_for(run, state, recipe, labels)
    rows, as_boxes, found = run.share(len(images)), state["condition"] == "box", {}
    how = made_by(run, state["label_file"])[1]
    segments = how.get("method") == "masks" and how.get("foreground") == "none"
    several = as_boxes and how.get("objects", 1) > 1
    if run.data.source == "shapes" and not segments and not several:
        found["exact_iou"] = exact_layouts(images[rows], as_boxes)
    try:
        found["layout_iou"] = find_layouts(*open_finder(run, cfg, state["label_file"]), images, rows, as_boxes)
    except UserError as e:
        if cfg.finder or not found:
            raise
        run.say(f"note: {e}; no layout_iou")
    scores = {k: float(np.concatenate(run.gather(overlap_of(asked[rows], v))).mean()) for k, v in found.items()}
    run.say("; ".join(f"{k} {v:.3f}" for k, v in scores.items()) + f" over {len(images):,} samples")
    if run.rank == 0:
        parts = [asked[rows], *found.values()]
        sheet = [tinted(images[i], v[i]) for v in parts for i in range(min(10, len(rows)))]
        names = ["asked for", *("exact" if k == "exact_iou" else "found" for k in found)]
        save_grid(picture(run), np.stack(sheet), min(10, len(rows)), names)
    return dict(samples=cfg.samples, images=len(images), **scores)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def picture(run, suffix=""):
    """Where a picture goes."""
    return run.dir / "probe" / f"{run.cfg.name}{suffix}.png"


def heat_map(path, values, rows, columns, title, marks=()):
    """A matrix as PNG: values [R][C] (None = blank), captions, marks [(row, column, letter)]; with many columns colours
    alone."""
    many = len(columns) > 30
    width, height, left, top = 18 if many else 62, 18, 8 + 7 * max(map(len, rows)), 46
    sheet = Image.new("RGB", (left + width * len(columns) + 12, top + height * len(rows) + 12), "white")
    pen, flat = ImageDraw.Draw(sheet), [v for r in values for v in r if v is not None]
    low, high = min(flat), max(flat)
    pen.text((8, 8), title, "black")
    for c, name in enumerate(columns):
        pen.text((left + c * width + (2 if many else 12), top - 16), name, "black")
    for r, name in enumerate(rows):
        pen.text((6, top + r * height + 3), name, "black")
        for c, v in enumerate(values[r]):
            if v is None:
                continue
            share = (v - low) / max(high - low, 1e-9)
            colour = tuple(int(255 * (a + (b - a) * share)) for a, b in ((0.97, 0.03), (0.98, 0.25), (1.0, 0.50)))
            x, y = left + c * width, top + r * height
            pen.rectangle([x, y, x + width - 2, y + height - 2], fill=colour)
            if not many:
                letters = "".join(f" {m}" for i, j, m in marks if (i, j) == (r, c))
                pen.text((x + 8, y + 2), f"{v:.3f}{letters}", "white" if share > 0.5 else "black")
    with atomic(path) as f:
        sheet.save(f, "PNG")


def draw_surface(run, suffix, table, score, title, marks):
    """probe/<name><suffix>.png: a score of every (activation, t) of a table; marks: (letter, row of the table)."""
    names = list(dict.fromkeys(r["activation"] for r in table))
    times = sorted({r["t"] for r in table})
    cells = {(r["activation"], r["t"]): r[score] for r in table}
    values = [[cells.get((n, t)) for t in times] for n in names]
    marks = [(names.index(r["activation"]), times.index(r["t"]), letter) for letter, r in marks]
    if run.rank == 0:
        heat_map(picture(run, suffix), values, names, [f"t={t:g}" for t in times], f"{score}; {title}", marks)


def torchvision_utils():
    """torchvision's functions that draw, also beside a CPU-only torch."""
    torchvision_datasets()
    from torchvision import utils
    return utils


def tinted(image, masks):
    """An image uint8 [3, H, W] under the colours of masks bool [n, H, W], or of one mask [H, W]."""
    image, masks = torch.from_numpy(np.array(image)), torch.as_tensor(masks)
    colours = "red" if masks.dim() == 2 else None         # else one for each mask
    return torchvision_utils().draw_segmentation_masks(image, masks, 0.5, colours).numpy()


def draw_segments(path, images, truth, shown, uncertain, n=10):
    """Images, true and found classes in colours (not class 0 and void), and where members of an ensemble differ.

    shown: what `segmented` yielded, [(rows, found, divergence)].
    """
    _, found, spread = (torch.cat([torch.as_tensor(v) for v in some])[:n] for some in zip(*shown))
    n, kinds = len(found), range(1, max(2, 1 + int(max(truth[:n].max(), found.max()))))

    def painted(masks):
        return [tinted(image, torch.stack([m == k for k in kinds])) for image, m in zip(images, masks)]

    sheet = [*images[:n], *painted(truth[:n]), *painted(found)]
    if uncertain:
        grey = (255 * spread / spread.max().clamp(min=1e-9)).to(torch.uint8)
        sheet += list(grey[:, None].expand(-1, 3, -1, -1).numpy())
    save_grid(path, np.stack(sheet), n, ["image", "truth", "found", "uncertainty"][:len(sheet) // n])


def enlarged_image(image, zoom):
    """An image uint8 [3, H, W] with larger pixels, for torchvision to draw on."""
    return torch.from_numpy(np.array(image)).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def draw_matches(path, pairs, found, n=6, zoom=4):
    """Pairs side by side, a line from each point to where it was found: green within 0.1 of the limit, else red."""
    size, tiles = pairs.source.shape[2], []
    ends = (pairs.points + 1) * size / 2, found + torch.tensor([size, 0.0])
    lines = zoom * torch.stack(ends, 2)                   # [N, P, 2, 2]
    right = (found - pairs.goal).norm(dim=2) <= 0.1 * pairs.limit[:, None]
    for i in range(min(n, len(lines))):
        tile = enlarged_image(np.concatenate([pairs.source[i], pairs.target[i]], 2), zoom)
        tile = Image.fromarray(tile.permute(1, 2, 0).numpy())
        pen = ImageDraw.Draw(tile)
        for line, good in zip(lines[i].flatten(1).tolist(), right[i].tolist()):
            pen.line(line, "lime" if good else "red", 1)
        tiles.append(np.asarray(tile).transpose(2, 0, 1))
    save_grid(path, np.stack(tiles), 1, zoom=1, head="green: found within a tenth; red: not")


def draw_objects(path, images, truth, found, n=12, zoom=4):
    """The first images with true boxes in white, found ones (score above 0.5) in red, and found masks, if any."""
    tiles = []
    for image, t, f in list(zip(images, truth, found))[:n]:
        sure = f["scores"] > 0.5
        if "masks" in f and sure.any():
            image = tinted(image, f["masks"][sure].any(0))
        tile = enlarged_image(image, zoom)
        for boxes, colour in ((t["boxes"], "white"), (f["boxes"][sure], "red")):
            if len(boxes):
                tile = torchvision_utils().draw_bounding_boxes(tile, boxes * zoom, colors=colour)
        tiles.append(tile.numpy())
    save_grid(path, np.stack(tiles), 6, zoom=1)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

PROTOCOLS = dict(                                         # (function, settings that it reads beside COMMON_KEYS)
    sweep=(sweep, SWEEP_KEYS), boxes=(boxes, BOXES_KEYS), linear=(linear, LINEAR_KEYS), head=(head, HEAD_KEYS),
    select=(select, SELECT_KEYS), segment=(segment, SEGMENT_KEYS), correspond=(correspond, CORRESPOND_KEYS),
    detect=(detect, DETECT_KEYS), cka=(cka, CKA_KEYS), layout=(layout, LAYOUT_KEYS))


def prepare_transfer(run, size):
    """Prepare the images that the YAML transfer= names, at the model's size, below transfer/; the fingerprints of both
    parts."""
    file = Path(run.cfg.transfer)
    folder = run.dir / "transfer" / file.stem
    data = fill("data", Data, read_yaml(file).get("data", {}) | dict(size=size, latents=""))
    described, there = {k: v for k, v in asdict(data).items() if k not in ("root", "download")}, folder / "data.json"
    if there.exists() and read_json(there, f"delete {folder}") != described:
        raise UserError(f"{folder}: was prepared from another data section than that of {file}; rename the YAML, or "
                        "delete the folder")
    if run.dry_run:
        return None
    if run.rank == 0:
        write_json(there, described)
    prepare_data(replace(run, dir=folder, data=data))
    return {split: probed(run, split).info["fingerprint"] for split in ("train", "test")}


def check_settings(run, cfg):
    """UserErrors for settings that do not fit each other."""
    protocol, kinds = cfg.protocol, [name for task, name in HEADS if task == cfg.protocol]
    require(not kinds or cfg.head in kinds, cfg, "head", f"{protocol} takes {', '.join(kinds)}")
    if run.data.latents:
        require(protocol not in ("segment", "correspond", "detect", "layout"), cfg, "protocol", "is defined on pixels")
        require(not (cfg.transfer or cfg.flip or cfg.crop), cfg, "transfer flip crop", "are for pixels, not latents")
    if protocol in ("head", "segment", "detect"):
        require(cfg.labels_share == 1 or not cfg.per_class, cfg, "labels_share per_class", "not both")
        require(cfg.width % cfg.heads == 0 or cfg.head not in ("attention", "difformer", "diffeed"), cfg, "width heads",
                "width must be a multiple of heads")
        require(protocol != "segment" or cfg.head != "ensemble" or cfg.masks, cfg, "head masks",
                "an ensemble learns from few masks: name their number")
        require(protocol != "head" or cfg.head != "diffeed" or cfg.precision != "fp16", cfg, "head precision",
                "gradients go through the network here: use bf16 or fp32")
    if cfg.features:
        require(protocol == "linear" or protocol == "head" and cfg.head != "diffeed", cfg, "features protocol head",
                "stored features serve protocol=linear, and head with any head but diffeed")
        require(not (cfg.transfer or cfg.flip or cfg.crop or cfg.activations != ["blocks"]), cfg,
                "features activations transfer flip crop", "what is stored cannot be changed, and all of it is read")


def named(cfg, net):
    """Names of the activations that a protocol compares."""
    if cfg.activations != ["blocks"]:
        return matching(net, cfg.activations)
    return matching(net, ["*"]) if cfg.protocol == "select" else matching(net, ["blocks"])


def open_features(run, cfg, how):
    """Stored features as (Source, what they add to the recipe)."""
    part = Stored(run, cfg.features, "train")
    cfg.checkpoint = part.info["checkpoint"]
    cfg.controls = [c for c in cfg.controls if c == "pixels"]                    # there is no network for the others
    state = dict(file=f"features/{cfg.features}", weights=part.info["hash"], seen=None)
    source = Source(None, state, part.names, part.times, stored=True, draws=part.info["draws"], **how)
    return source, dict(reads=part.info)


def open_source(run, cfg):
    """(what is probed, as a Source; what that adds to the recipe)."""
    how = dict(device=run.device, context=autocast(run, cfg.precision)[0], seed=cfg.seed, batch=cfg.batch)
    if cfg.features:
        return open_features(run, cfg, how)
    if cfg.protocol == "layout":
        return open_samples(run, cfg, how)
    net, state = load_model(run, cfg.checkpoint, cfg.weights)
    if cfg.transfer:
        require(state["channels"] == 3, cfg, "transfer", "other images are probed as pixels; this model sees latents")
    else:
        require_shape(run, state)
    extra = dict(transfer=prepare_transfer(run, state["size"]) if cfg.transfer else None)
    if cfg.protocol in ("linear", "head", "segment", "detect"):
        names, times = choice_or_named(run, cfg, net)
        return Source(net, state, names, times, **how), extra | dict(reads=[names, times])
    if cfg.protocol == "cka":                             # models of the same name may have been trained anew
        hashes = {name: load_checkpoint(run, name)["weights"] for name in cfg.against if name != "random"}
        extra["hashes"] = hashes or None
    return Source(net, state, named(cfg, net), cfg.t or [0.4, 0.5, 0.6, 0.7, 0.8, 0.9], **how), extra


def say_plan(run, cfg, source, path):
    """What --dry-run says."""
    run.say(f"{cfg.protocol} of {source.state['file']} into {path}")
    if source.net:
        say_network(run, source.net, source.state["channels"], source.state["size"])
        run.say(f"reads {len(source.names)} activations at {len(source.times)} times")


def main():
    """Probe, from the command line."""
    run = start("probe", Probe, __doc__)
    cfg = run.cfg
    cfg.name = cfg.name or cfg.protocol
    check_settings(run, cfg)

    # what is probed, and the recipe: the settings that decide the result, and what they stand for
    protocol, keys = PROTOCOLS[cfg.protocol]
    source, extra = open_source(run, cfg)
    recipe = {k: v for k, v in run.sections["probe"].items() if k in COMMON_KEYS | keys}
    recipe |= dict(hash=source.state["weights"], checkpoint=cfg.checkpoint) | extra
    path = run.dir / "probe" / f"{cfg.name}.json"
    if run.dry_run:
        return say_plan(run, cfg, source, path)
    if run.agreed(lambda: finished(run, path, recipe)):
        return
    if run.world > 1 and cfg.protocol not in ("sweep", "boxes", "layout"):
        run.say(f"note: protocol={cfg.protocol} does not divide its work; one process is as fast")

    # measure, write
    with locked(run, "probe", cfg.name):
        tick = time.time()
        result = protocol(run, cfg, source)
        what = dict(protocol=cfg.protocol, checkpoint=cfg.checkpoint, hash=source.state["weights"],
                    seen=source.state["seen"], seed=cfg.seed)
        if run.rank == 0:
            write_json(path, what | result | dict(seconds=round(time.time() - tick, 1), recipe=recipe))
        run.wait()

    # say where it is, and what comes next
    run.say(f"result in {path}, picture in {path.with_suffix('.png')}")
    if cfg.protocol == "select":
        run.say(f"next: python extract_features.py {path.with_suffix('.yaml')} run={run.dir}")
    if cfg.protocol in ("sweep", "boxes"):
        dense = "" if cfg.protocol == "sweep" else " name=dense pool=none"
        other = "" if cfg.checkpoint == "diffusion/base" else f" checkpoint={cfg.checkpoint}"
        choice = "" if cfg.name == "sweep" else f" choice={cfg.name}"
        run.next(f"extract_features.py{dense}{other}{choice}", "extracts the label-free choice")


if __name__ == "__main__":
    cli(main)

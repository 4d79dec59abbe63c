"""Probe: how discriminative a model's features are; and, after train_diffusion.py, which block and time the next stages
read.

Reads   {diffusion,guided}/<name>/checkpoint.pt and data/{train,test}, or features/<name>, or samples/<name>
Writes  probe/<name>.json, and of most protocols probe/<name>.png
Time    t = 0 is noise, t = 1 is data.

    python probe.py configs/shapes.yaml                                  # protocol=sweep: CPU, under a minute
    python probe.py configs/cifar10.yaml protocol=linear                 # one GPU: linear probe and kNN, with controls
    torchrun --nproc_per_node=8 probe.py configs/cifar10.yaml            # eight GPUs share the times of the sweep
    python probe.py configs/cifar10.yaml protocol=head head=difformer labels_share=0.1 t=0.7,0.8,0.95 \\
        activations='mid-repeat1-res-out,up-level?-repeat1-res-out'

sweep       clusters every block x time: do the clusters agree with those of the other blocks? Beside that scores by
            labels. `label_free` is what extract_features.py reads; `oracle`, the choice by labels, is only reported.
boxes       finds a box in `boxed` training images by every block x time: the best agree with themselves under other
            noise, and with the boxes of all others.
linear      linear probe and kNN of all that is named, side by side, or of features=: stored ones of any model.
head        linear, MLP, CNN, attention (arXiv 2307.08702), DifFormer, DifFeed (2311.17921), with fresh noise.
select      noise sensitivity, granularity and locality of activations; filters by them, by rules of ours after
            2410.03558, then ranks.
segment     semantic segmentation from frozen maps: linear, UPerNet's decoder, an ensemble of pixel MLPs; mean IoU.
correspond  nearest neighbours between an image and its known warp, and between objects of one class; PCK.
cka         how alike activations are, across blocks, times and models (against=). No labels.
layout      how well the images of samples/<samples>/ keep to the boxes or masks that they were asked for.

What is selected is selected on a validation part of the training images; test images are reported once.
linear, head, segment and correspond have controls beside them: the same network with random weights, a
supervised network of the same size, raw pixels. Only sweep, boxes and layout divide their work between processes.
"""
import itertools
import math
import time
import typing
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from configs.data import as_input, load_data, load_features, load_labels, require_shape, row_shape
from configs.run import (Model, UserError, autocast, bar, check_name, chunks, cli, digest, draw, fill, finished, key,
                         locked, read_json, reading, require, save_grid, seed_of, seeded, start, unknown,
                         write_json)
from configs.shapes import shape_parts
from train_diffusion import PATHS, Block, build_model, diffuse, load_checkpoint, load_condition, load_model, say_network
from extract_features import catalogue, label_free, matching, noise_level, reader, stream
from self_label import assign, bounds, draw_masks, filled, find_objects, iou, kmeans, largest_component, nmi


@dataclass
class Probe:
    """Section `probe`."""
    name: str = key("", "results go to probe/<name>; empty = the protocol")
    protocol: Literal["sweep", "boxes", "linear", "head", "select", "segment", "correspond", "cka",
                      "layout"] = key("sweep", "what is measured: see above")
    checkpoint: str = key("diffusion/base", "a folder of the run, or a .pt file")
    activations: list[str] = key(["blocks"], "names and globs; blocks = all block outputs (select: everything; linear, "
                                             "head, segment: the label-free choice, at its time or one t)")
    t: list[float] = key([], "noise times; empty = 0.4,0.5,...,0.9", low=0, high=1)
    choice: str = key("sweep", "which result of sweep or boxes the label-free choice is taken from")
    features: str = key("", "linear: stored features/<name> of any model, in place of the checkpoint")
    # sweep, boxes, select
    fit: int = key(2_000, "sweep, select: training images to fit on; small sets give fewer", low=2)
    validation: int = key(1_000, "training images held out for selection, at most a fifth of them", low=1)
    K: int = key(30, "sweep: clusters of k-means", low=2)
    boxed: int = key(128, "boxes: images in which boxes are found", low=2)
    # linear, heads, dense tasks
    controls: list[Literal["pixels", "random", "supervised"]] = key(["pixels", "random", "supervised"],
        "linear, head, segment, correspond: what to compare with")
    supervised_images: int = key(100_000, "images that the supervised control is trained on", low=1)
    draws: int = key(3, "linear: noise draws, each probed alone: mean and spread", low=1)
    head: str = key("attention", "linear, mlp, cnn, attention, difformer, diffeed; segment: linear, uper, ensemble")
    labels_share: float = key(1.0, "head: share of the labels of each class, to learn and to select", above=0, high=1)
    width: int = key(256, "head, segment: channels of the head (papers: 1024)", low=1)
    depth: int = key(2, "head: transformer blocks of attention, difformer, diffeed", low=1)
    grid: int = key(2, "head: linear and mlp see averages over a grid of g x g", low=1)
    images: int = key(100_000, "head, segment: images that every head sees", low=1)
    head_batch: int = key(128, "head, segment: images per update", low=2)
    lr: list[float] = key([3e-4, 1e-3, 3e-3], "head, segment: of AdamW, one cycle; selected", above=0)
    l2: list[float] = key([0.0, 0.05], "head, segment: weight decay; selected with lr", low=0)
    flip: bool = key(False, "head, segment: mirror images at random")
    seeds: list[int] = key([0, 1, 2], "head, segment: of labelled subset, weights, order, noise")
    masks: int = key(0, "segment: training images whose masks are used, as many to validate; 0 = all", low=0)
    pairs: int = key(200, "correspond: pairs of images, to choose from and again to report", low=1)
    against: list[str] = key([], "cka: further checkpoints, or random, for the same network with random weights")
    samples: str = key("base", "layout: which samples/<samples>")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "of the network")
    batch: int = key(500, "images per forward pass and process", low=1)
    seed: int = key(0, "of noise, k-means, controls")
    overwrite: bool = key(False, "replace a result of another recipe under this name")

# ---------------------------------------------------------------------------------------------------------------------
# The label-free choice of a block and a time

def cluster_and_silhouette(features, K, seed):
    """(cluster ids int64 [N] of features [N, D], their silhouette: mean of 1 - (cosine distance to the own centroid) /
    (that to the second nearest), which is only reported)."""
    centroids, _, _ = kmeans(features, K, metric="cosine", seed=seed)
    distance = (1 - F.normalize(features, dim=1) @ centroids.T).clamp(min=0)     # [N, K]
    own, second = distance.topk(2, 1, largest=False).values.unbind(1)            # [N] each
    ids = assign(features, centroids).numpy()
    return ids, float((1 - own / second.clamp(min=1e-9)).mean())


def consensus(clusterings):
    """Mean NMI of each clustering with all the others: a list of n int64 [N] -> [n].

    Over the blocks of one network at one time, this is high where every depth finds the same groups. (How well that
    follows true classes is measured in results/; not everywhere. Agreement of one block under two noise draws would be
    no criterion: it only grows with t.) All blocks see the same noise, about which they agree, too: on pure noise, t =
    0, this was still 0.47 of 0.53 on CIFAR-10. So a sweep begins at t = 0.3.
    """
    n = len(clusterings)
    agreement = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        agreement[i, j] = agreement[j, i] = nmi(clusterings[i], clusterings[j])
    return agreement.sum(1) / max(n - 1, 1)


def score_time(source, cfg, train, fit_rows, val_rows, K):
    """One table row per activation at source.times[0]: label-free scores; scores by labels if all classes are known."""
    features, held_out = (source.vectors(train.inputs, rows, "probe 0") for rows in (fit_rows, val_rows))
    y, table, clusterings = classes_of(train), [], []
    for place in source.places:                           # (activation, t)
        mean = features[place].mean(0)                    # activations share a large common direction
        x, x_val = features[place] - mean, held_out[place] - mean
        ids, silhouette = cluster_and_silhouette(x, K, cfg.seed)
        row = source.row(*place) | dict(silhouette=silhouette)
        if (y >= 0).all():
            y_fit, y_val = y[fit_rows], y[val_rows]
            row["nmi"] = nmi(ids, y_fit.numpy())
            row["linear"] = linear_accuracy(features[place], held_out[place], y_fit, y_val, source.device)
            row["knn"] = knn(x, y_fit, x_val, y_val, 20, source.device)
        table.append(row)
        clusterings.append(ids)
    return [row | dict(consensus=float(score)) for row, score in zip(table, consensus(clusterings))]


def label_free_choice(table):
    """The row of a sweep's table with the highest consensus among those of one time.

    With ever less noise all blocks see the same image, and agree more and more for that reason alone. So the time is
    the noisiest at which the best consensus is within 3 % of the highest of all times (a rule of thumb).
    """
    best = {t: max(row["consensus"] for row in table if row["t"] == t) for t in {row["t"] for row in table}}
    noisiest = min(t for t in best if best[t] >= 0.97 * max(best.values()))      # t = 0 is noise
    return max((row for row in table if row["t"] == noisiest), key=lambda row: row["consensus"])


def sweep(run, cfg, source, train, test):
    """Score every (activation, t) and choose one without labels."""
    require(len(source.names) > 2, cfg, "activations", "name three or more: the choice is by their agreement")
    if min(source.times) < 0.3:
        run.say("note: below t = 0.3 blocks agree about the noise that they share: it may be chosen for that")
    fit, val = fit_and_validation(cfg, len(train), cfg.fit)
    K = min(cfg.K, max(2, len(fit) // 4))                 # clusters of four images at least
    mine = []
    for t in source.times[run.rank::run.world]:
        mine += score_time(replace(source, times=[t]), cfg, train, fit, val, K)
    table = list(itertools.chain(*run.gather(mine)))
    table.sort(key=lambda row: (source.names.index(row["activation"]), row["t"]))
    about = dict(K=K, fit=len(fit), validation=len(val))
    return about | report_choice(run, table, label_free_choice(table), ["consensus"], ["nmi", "linear", "knn"])


def box_agreement(a, b):
    """Mean IoU of two sets of boxes [N, 4] of the same images, less that of boxes of different images: a box that is
    always in the same place agrees with nobody."""
    return float(iou(a, b).mean() - iou(a, np.roll(b, 1, 0)).mean())


def objects_in(source, inputs, rows, purpose, what, size, images=None, **settings):
    """The objects of these rows by each activation alone, {(name, t): array [len(rows), ...]}.

    what: "boxes" or "masks", of `find_objects`, to which settings go; size: (H, W) of the images; images uint8: those
    whose edges refined outlines follow, if any.
    """
    found = {}
    for part, out in source.stream(inputs, rows, purpose, pool="none"):
        shown = None if images is None else torch.tensor(images[part]).to(source.device)
        for place, maps in out.items():
            grid = tuple(maps.shape[2:])
            if grid[1] > 1:
                patches = maps.flatten(2).transpose(1, 2)                        # [B, h * w, C]
                batch = find_objects(patches, grid, size, images=shown, **settings)[what]
                found.setdefault(place, []).append(batch.cpu().numpy())
    return {place: np.concatenate(batches) for place, batches in found.items()}


def boxes(run, cfg, source, train, test):
    """Score every (activation, t) by the boxes found with it, without labels.

    stability: agreement of the boxes under two noise draws. consensus: mean agreement with the boxes of all other
    activations and times. Stability alone would take the least noise, consensus alone the coarse middle of the network,
    where boxes are loose: the choice is the greatest sum.
    """
    require(len(source.places) > 1, cfg, "activations t", "boxes compares at least two")
    rows, times = some_rows(len(train), cfg.seed, "probe rows", cfg.boxed), sorted(source.times)
    draws = []                                            # of two noise draws: {(name, t): boxes [N, 4]}
    for purpose in ("probe 0", "probe 1"):
        mine = {}
        for t in times[run.rank::run.world]:              # one after the other: whole maps are held
            one = replace(source, times=[t], batch=min(source.batch, 64))
            mine |= objects_in(one, train.inputs, rows, purpose, "boxes", train.images.shape[2:])
        draws.append({place: found[:, 0] for part in run.gather(mine) for place, found in part.items()})
    found, again = draws
    places, table = [place for place in itertools.product(source.names, times) if place in found], []
    require(len(places) > 1, cfg, "activations t", "boxes compares at least two places with maps")
    for place in places:
        stability = box_agreement(found[place], again[place])
        mutual = float(np.mean([box_agreement(found[place], found[other]) for other in places if other != place]))
        row = source.row(*place) | dict(agreement=stability + mutual, stability=stability, consensus=mutual)
        if train.boxes is not None:
            row["iou"] = float(iou(found[place], train.boxes[rows]).mean())
        table.append(row)
    chosen = max(table, key=lambda row: row["agreement"])
    return dict(images=len(rows)) | report_choice(run, table, chosen, ["agreement", "stability", "consensus"], ["iou"])


def report_choice(run, table, chosen, criteria, truth):
    """What is known of the row that was chosen without labels; where there are scores `truth`, the rows they choose."""
    def about(row, *scores):
        return {k: row[k] for k in ("activation", "t", "rho", "log_snr", *scores)}

    shown, marks = criteria[0], [("F", chosen)]
    result = dict(label_free=about(chosen, *criteria))
    run.say(f"label-free choice: {as_text(chosen, shown)}")
    if truth[0] in chosen:
        best = {score: max(table, key=lambda row: row[score]) for score in truth}
        result["oracle"] = {score: about(row, score) for score, row in best.items()}
        shown = truth[0]
        marks.append(("O", best[shown]))
        run.say(f"it has {as_text(chosen, *truth)}; with labels one would take {as_text(best[shown], shown)}")
    draw_surface(run, table, shown, "F = label-free choice, O = the best by labels", marks)
    return result | dict(table=table)


def as_text(row, *scores):
    """Place and scores of a row."""
    return f"{row['activation']} at t={row['t']:g} ({', '.join(f'{k} {row[k]:.3f}' for k in scores)})"


# ---------------------------------------------------------------------------------------------------------------------
# What is read: activations of a frozen network, at noise times

@dataclass
class Source:
    """Activations `names` at noise `times` of a frozen network; net=None: the images (or latents) as they are."""
    net: nn.Module | None
    state: dict                                           # its checkpoint
    names: list
    times: list
    head: str = ""                                        # the kind of head that reads it
    device: typing.Any = "cpu"
    context: typing.Callable = nullcontext                # of forward passes: autocast
    seed: int = 0                                         # of the noise, and of controls
    batch: int = 500

    @property
    def places(self):
        """All (activation, t)."""
        return list(itertools.product(self.names, self.times))

    @property
    def passes(self):
        """Passes of the network per image."""
        if self.net is None:
            return self.state.get("passes", 0)
        return len(self.times) * (2 if self.head == "diffeed" else 1)

    def row(self, name, t):
        """The beginning of a table's row: activation and t, the latter in the terms of other papers, too."""
        return dict(activation=name) | noise_level(self.state["path"], t)

    def stream(self, images, rows, purpose, pool="mean"):
        """Yield (rows of a batch, {(name, t): activation on the device}); noise belongs to the image."""
        return stream(self.net, self.state, images, rows, self.names, self.times, device=self.device,
                      context=self.context, pool=pool, seed=self.seed, purpose=purpose, batch=self.batch)

    def vectors(self, images, rows, purpose):
        """Activations of all rows averaged over positions, {(name, t): float32 [len(rows), D]}, on the CPU; images as
        they are become 32 x 32 at most."""
        parts = {place: [] for place in self.places}
        if self.net is None:
            for part in chunks(rows, 1000):
                x = self.shown(images, part)
                small = F.adaptive_avg_pool2d(x, min(32, x.shape[2]))
                parts[self.places[0]].append(small.flatten(1).cpu())
        else:
            for _, out in self.stream(images, rows, purpose):
                for place, value in out.items():
                    parts[place].append(value.cpu())
        return {place: torch.cat(values) for place, values in parts.items()}

    def shown(self, images, rows, flip=None):
        """Rows as float [n, C, H, W]: images in [-1, 1], or means of latents. flip: bool [n], those to be mirrored."""
        x = torch.from_numpy(np.array(images[rows], order="C"))                  # a copy: what is mapped is read-only
        return as_input(x.to(self.device), None if flip is None else flip.to(self.device))

    @torch.no_grad()
    def views(self, x, z):
        """What heads are called with: maps [times][names] of [B, C, h, w], the last x_t [B, C, H, W], its t [B].

        x: what `shown` gave; z: noise [B, C, H, W].
        """
        if self.net is None:
            return [[x]], x, None
        names = [name for name, _ in mirrors(self.net)] if self.head == "diffeed" else self.names
        read, maps = reader(self.net, names, "none"), []
        for level in self.times:
            t = torch.full((len(x),), level, device=x.device)
            x_t = diffuse(PATHS[self.state["path"]], x, z, t)
            with self.context():
                maps.append(read(x_t, t))
        return maps, x_t, t

    def views_of(self, images, rows, seed, purpose):
        """`views` of these rows; noise belongs to the image."""
        z = draw(seed, purpose, rows, row_shape(images)).to(self.device)
        return self.views(self.shown(images, rows), z)

    def maps(self, images, rows, purpose):
        """{(name, t): map [n, C, h, w]} of these rows."""
        views, _, _ = self.views_of(images, rows, self.seed, purpose)
        return {(name, t): x for t, maps in zip(self.times, views) for name, x in zip(self.names, maps)}


def classes_of(part):
    """Classes int64 [N]; -1 = not known."""
    return torch.from_numpy(np.array(part.classes))


def known_classes(train, test):
    """Classes int64 [N] of the training and of the test images, all of which must be known."""
    y, y_test = classes_of(train), classes_of(test)
    if (y < 0).any() or (y_test < 0).any():
        raise UserError("this protocol needs the class of every image, and this data lacks some")
    if len(new := np.setdiff1d(y_test, y)):
        raise UserError(f"no training image has the classes {new[:10].tolist()}, but test images have")
    return y, y_test


def known_masks(train, test):
    """Masks int16 [N, H, W] of the training and of the test images, void -100."""
    if train.masks is None or test.masks is None:
        raise UserError("this protocol needs a mask for every image, and this data has none")
    masks = [torch.from_numpy(np.array(part.masks).astype(np.int16)) for part in (train, test)]
    if any(not ((m > 0) & (m < 255)).any() for m in masks):
        raise UserError("no pixel of the training or of the test masks has a class above 0")
    return [torch.where(m == 255, -100, m) for m in masks]


def generator(seed, purpose, index=0):
    """Random numbers of PyTorch, different for every (seed, purpose, index)."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))


def shuffled(rows, seed, purpose):
    """Rows [n], or range(rows), in an order drawn by the seed."""
    return np.random.default_rng(seed_of(seed, purpose)).permutation(rows)


def some_rows(rows, seed, purpose, n):
    """Up to n of the rows, or of range(rows), drawn by the seed; sorted."""
    return np.sort(shuffled(rows, seed, purpose)[:n])


def fit_and_validation(cfg, n, most=0):
    """(rows to learn from, rows to select on: at most a fifth) of n training images; of the former at most so many."""
    if n < 20:
        raise UserError(f"the run has only {n} training images, too few to fit on some and select on others")
    order, held = shuffled(n, cfg.seed, "probe rows"), min(cfg.validation, n // 5)
    if not most:
        return order[held:], order[:held]
    most = min(most, n - held)
    return np.sort(order[:most]), np.sort(order[most:most + held])


# ---------------------------------------------------------------------------------------------------------------------
# Linear classifiers and nearest neighbours

def standardise(fit, *others):
    """Zero mean and unit variance by the statistics of `fit`; all [N, D]."""
    mean, std = fit.mean(0), fit.std(0).clamp(min=1e-6)
    return [(x - mean) / std for x in (fit, *others)]


SWEEP = 3e-4                                              # tolerance of sweeps: accurate within 0.3 points


def logistic(x, y, classes, l2, start=None, tolerance=1e-5, iterations=300):
    """Multinomial logistic regression of y [N] on x [N, D], on x's device: weights [D + 1, classes], bias last.

    l2 is on the weights, not the bias; start: weights to begin with. Steps are taken in u, where the weights are w = u
    C^-1 and CC' = X'X / 2N + l2: there the Hessian is at most 1 (Boehning 1992), so that steps as long as the gradient
    descend. They are accelerated, and restarted when they point uphill (arXiv 1204.3982).
    """
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).T.contiguous()                  # [D + 1, N]
    target = F.one_hot(y, classes).T.float()              # [classes, N], a layout whose softmax is cheap
    penalty = torch.full((len(x),), l2, dtype=torch.float64, device=x.device)
    penalty[-1] = 0
    gram = sum(part.double() @ part.double().T for part in x.split(4096, 1))     # float32 may make eigenvalues below 0
    C = torch.linalg.cholesky(gram / (2 * len(y)) + torch.diag(penalty + 1e-6))
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    inverse = torch.linalg.solve_triangular(C, eye, upper=False).float()
    penalty = penalty.float()
    u = x.new_zeros(classes, len(x)) if start is None else (start.T.double() @ C).float()
    ahead, momentum = u, 1.0                              # slopes are taken ahead of u
    for _ in range(iterations):
        w = ahead @ inverse
        error = torch.softmax(w @ x, 0) - target          # [classes, N]
        slope = (error @ x.T / len(y) + penalty * w) @ inverse.T
        if slope.abs().max() < tolerance:
            break
        new = ahead - slope
        if (slope * (new - u)).sum() > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum ** 2)) / 2
        ahead = new + (momentum - 1) / following * (new - u)
        u, momentum = new, following
    return (ahead @ inverse).T


def accuracy(w, x, y):
    """Share of rows x [N, D] whose class y [N] the linear classifier w [D + 1, classes] finds."""
    return float(((x @ w[:-1] + w[-1]).argmax(1) == y).float().mean())


def linear_accuracy(x, x_val, y, y_val, device):
    """Accuracy on x_val of a quick linear probe of x [N, D]."""
    x, x_val = (v.to(device) for v in standardise(x, x_val))
    classes = int(max(y.max(), y_val.max())) + 1
    w = logistic(x, y.to(device), classes, 1e-3, tolerance=SWEEP)
    return accuracy(w, x_val, y_val.to(device))


def knn(fit, y, x, truth, k, device="cpu"):
    """Accuracy of the majority vote of the k nearest rows of `fit` (cosine; ties to the nearer class sum)."""
    fit, y = F.normalize(fit, dim=1).to(device), y.to(device)
    classes, right = int(y.max()) + 1, 0
    for rows, target in zip(x.split(1000), truth.split(1000)):
        closeness = F.normalize(rows, dim=1).to(device) @ fit.T
        near = closeness.topk(min(k, len(fit)), 1)        # [b, k]
        votes = fit.new_zeros(len(rows), classes)
        votes.scatter_add_(1, y[near.indices], 1 + 1e-3 * near.values)
        right += int((votes.argmax(1).cpu() == target.cpu()).sum())
    return right / len(x)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing sources: what was asked for, and controls

def compare(run, sources, measure, seeds, scores, over="seed"):
    """A row for each source: what it is, what was measured with every seed, mean and spread of `scores`; says them.
    over: what seeds are.

    sources: seed -> {what: Source}; measure(what, source, seed) -> dict of results, one of them `parameters`.
    """
    rows = {}
    for seed in seeds:
        for what, source in sources(seed).items():
            got = measure(what, source, seed)
            about = dict(head=source.head, passes=got.pop("passes", source.passes), results=[])
            about["parameters"] = got.pop("parameters")
            place = dict(seed=seed, activations=source.names, t=source.times)
            rows.setdefault(what, about)["results"].append(place | got)
    for what, row in rows.items():
        said = []
        for score in scores:
            values = [result[score] for result in row["results"]]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row |= {score: float(np.mean(values)), f"{score}_std": spread}
            said.append(f"{score} {row[score]:.4f}" + (f" +- {spread:.4f}" if len(values) > 1 else ""))
        run.say(f"{what:24} {', '.join(said)} over {len(row['results'])} {over}(s); {row['parameters']:,} trained "
                f"parameters, {row['passes']} pass(es) per image")
    return rows


def controls(run, cfg, source, train, rows):
    """What to compare with, {what: Source}: the network with random weights; one of its size that was taught the
    classes of `rows` of the training images, read at t = 1; the raw pixels."""
    single = replace(source, head="attention") if source.head == "diffeed" else source         # feeds nothing back
    out, y = {}, classes_of(train)
    if "random" in cfg.controls:
        out["random weights"] = replace(source, net=random_network(source))
    if "supervised" in cfg.controls and not (y >= 0).all():
        run.say("note: no supervised control where classes are not known")
    elif "supervised" in cfg.controls:
        taught = train_supervised(cfg, single, train.inputs, y, rows)
        out["supervised, same size"] = replace(single, net=taught, times=[1.0])
    if "pixels" in cfg.controls:
        what = "latents" if run.data.latents else "pixels"
        out[f"raw {what}"] = replace(single, net=None, state={}, names=[what], times=[1.0])
    return out


class OneCycle:
    """AdamW with one cycle of the learning rate, up to lr."""

    def __init__(self, modules, lr, l2, steps):
        params = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(params, lr, weight_decay=l2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, steps + 1)

    def step(self, loss):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def same_network(source, seed):
    """A new network of the same architecture."""
    state = source.state
    model = fill("model", Model, state["model"])
    net = build_model(model, state["size"], state["channels"], seed=seed)
    return net.to(source.device).eval()                   # no dropout


def random_network(source):
    """The same network with random weights."""
    net = same_network(source, source.seed + 1).requires_grad_(False)
    numbers = generator(source.seed, "random weights")
    for p in net.parameters():                            # zero-initialised branches would make it blind
        if not p.any() and p.dim() > 1:
            p.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=numbers))
    return net


def train_supervised(cfg, source, images, y, rows):
    """The same architecture up to the last of source.names, taught the classes y of `rows` of clean images."""
    net, batch = same_network(source, source.seed), 128
    read, t = reader(net, source.names[-1:]), torch.ones(batch, device=source.device)
    with torch.no_grad():
        width = read(source.shown(images, rows[:1]), t[:1])[0].shape[1]
    with seeded(source.seed, "supervised head"):
        head = nn.Linear(width, int(y.max()) + 1).to(source.device)
    steps = max(1, cfg.supervised_images // batch)
    optimizer = OneCycle([net, head], 2e-3, 0.05, steps)
    for step in range(steps):
        chooser = np.random.default_rng(seed_of(source.seed, "supervised rows", step))
        part = np.sort(chooser.choice(rows, batch))
        with source.context():
            logits = head(read(source.shown(images, part), t)[0])
        optimizer.step(F.cross_entropy(logits.float(), y[part].to(source.device)))
    return net.requires_grad_(False)


def stored_vectors(run, name, part):
    """features/<name> of the training or test images, side by side, float32 [N, D]; maps are averaged."""
    columns = []
    for array in load_features(run, name, part)[0]:
        parts = [torch.from_numpy(np.array(part, np.float32)) for part in chunks(array, 4096)]
        columns.append(torch.cat([x.mean((2, 3)) if x.dim() == 4 else x for x in parts]))
    return torch.cat(columns, 1)


def linear(run, cfg, source, train, test):
    """Linear probe and kNN of all activations side by side, for every noise draw."""
    y, y_test = known_classes(train, test)
    fit, val = map(np.sort, fit_and_validation(cfg, len(train)))
    classes = int(y.max()) + 1
    y_fit, y_val, y_test = (v.to(run.device) for v in (y[fit], y[val], y_test))

    def vectors(what, source, name, part, number):        # float32 [N, D]
        if what == "features" and cfg.features:
            return stored_vectors(run, cfg.features, name).to(source.device)
        out = source.vectors(part.inputs, np.arange(len(part)), f"linear {name} {number}")
        return torch.cat([out[place] for place in source.places], 1).to(source.device)

    def measure(what, source, number):
        x = vectors(what, source, "train", train, number)
        x_test = vectors(what, source, "test", test, number)
        x, x_val, x_test = standardise(x[fit], x[val], x_test)
        weights, w = {}, None
        for l2 in (1e-2, 1e-3, 1e-4, 1e-5):               # each starts where the last one ended
            weights[l2] = w = logistic(x, y_fit, classes, l2, start=w)
        l2 = max(weights, key=lambda l2: accuracy(weights[l2], x_val, y_val))
        k = max((1, 5, 20, 50), key=lambda k: knn(x, y_fit, x_val, y_val, k, source.device))
        return dict(linear=accuracy(weights[l2], x_test, y_test),
                    knn=knn(x, y_fit, x_test, y_test, k, source.device), l2=l2, k=k, parameters=w.numel())

    every = {"features": source} | controls(run, cfg, source, train, fit)

    def sources(number):                                  # what reads no noise is measured once
        return {what: s for what, s in every.items() if number == 0 or s.net is not None and s.times != [1.0]}

    rows = compare(run, sources, measure, range(cfg.draws), ["linear", "knn"], over="noise draw")
    return dict(train_images=len(fit), validation_images=len(val), test_images=len(test), rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Heads, called as head(maps, x_t, t) with maps [times][names] of [B, C, H, W] -> logits [B, classes]

class PooledHead(nn.Sequential):
    """Linear probe or MLP on averages over a grid (arXiv 2307.08702: 2 x 2) of all maps, of shapes (C, H, W), side by
    side, normalised."""

    def __init__(self, shapes, classes, grid, hidden=0):
        width = sum(c * min(grid, h) ** 2 for c, h, _ in shapes)
        layers = [nn.BatchNorm1d(width, affine=False)]
        if hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden or width, classes))
        self.grid = grid

    def forward(self, maps, *_):
        pooled = []
        for x in itertools.chain(*maps):
            pooled.append(F.adaptive_avg_pool2d(x, min(self.grid, x.shape[2])).flatten(1))
        return super().forward(torch.cat(pooled, 1))


def convolution(channels, width, side):
    """A side x side convolution, norm, ReLU."""
    conv = nn.Conv2d(channels, width, side, padding=side // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Cnn(nn.Sequential):
    """Of one map two 3x3 convolutions; average; linear. (The paper's exact shape is not published.)"""

    def __init__(self, channels, classes, width):
        super().__init__(convolution(channels, width, 3), convolution(width, width, 3),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, maps, *_):
        return super().forward(maps[0][0])


class DifFormer(nn.Module):
    """DifFormer (arXiv 2311.17921): maps of several blocks become tokens of one transformer, once per time; its CLS
    vectors of all times are concatenated.

    With one block and one time this is the attention head of 2307.08702. Papers: width 1024, depth 2, heads 8, side 16;
    no positions. shapes: (C, H, W) of each block.
    """

    def __init__(self, shapes, times, classes, width=1024, depth=2, heads=8, side=16):
        super().__init__()
        self.tokens = nn.ModuleList()                     # of each block, shared by all times
        for c, h, _ in shapes:
            h = min(h, side)
            self.tokens.append(nn.Sequential(nn.AdaptiveAvgPool2d(h), nn.LayerNorm([c, h, h]), nn.Conv2d(c, width, 1)))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Linear(times * width, classes)

    def forward(self, maps, *_):                          # maps [times][blocks] of [B, C, h, w] -> logits [B, classes]
        summaries = []
        for of_time in maps:                              # times do not attend to each other
            tokens = [self.cls.expand(len(of_time[0]), -1, -1)]
            for to_tokens, x in zip(self.tokens, of_time):
                tokens.append(to_tokens(x).flatten(2).transpose(1, 2))           # [B, h * w, width]
            x = torch.cat(tokens, 1)
            for block in self.blocks:
                x = block(x)
            summaries.append(x[:, 0])
        return self.out(torch.cat(summaries, 1))


def mirrors(net):
    """DifFeed's pairs of a U-Net, one per level: (name of a decoder output, the encoder module to whose output it is
    added).

    The encoder module is the first residual block of the level, the decoder output its mirror image: in ADM's numbering
    38 - b <- b (method of arXiv 2311.17921). Their shapes are equal in every U-Net that build_model makes.
    """
    names = {id(module): name for name, (module, _) in catalogue(net).items()}
    down = net.input_blocks
    first = [i for i in range(1, len(down)) if i == 1 or down[i - 1][0].resample]
    return [(names[id(net.output_blocks[len(down) - 1 - i][-1])], down[i][-1]) for i in first]


class DifFeed(nn.Module):
    """DifFeed (arXiv 2311.17921): decoder maps of a first pass go through feedback layers and are added in the encoder,
    in a second pass of the same x_t, from which an attention head reads source.names[0].

    The network stays frozen, but gradients go through it to the feedback layers. shapes: (C, H, W) of the decoder maps;
    shape: of what the head reads.
    """

    def __init__(self, source, shapes, shape, classes, width=1024, depth=2):
        super().__init__()
        self.frozen = (source,)                           # in a tuple: no part of what is trained
        self.targets = [module for _, module in mirrors(source.net)]
        self.back = nn.ModuleList(convolution(channels, channels, 1) for channels, _, _ in shapes)
        self.head = DifFormer([shape], 1, classes, width, depth)

    def forward(self, maps, x_t, t):                      # maps [1][levels]: decoder outputs of the first pass
        def adding(feedback):                             # a hook that adds feedback [B, C, H, W] to a module's output
            return lambda module, args, out: out + feedback.to(out.dtype)

        source, = self.frozen
        with ExitStack() as hooks, source.context():      # the skip connections carry the sums, too
            for target, layers, x in zip(self.targets, self.back, maps[0]):
                hooks.callback(target.register_forward_hook(adding(layers(x))).remove)
            second = reader(source.net, source.names[:1], "none")(x_t, t)
        return self.head([second])


# ---------------------------------------------------------------------------------------------------------------------
# Heads of segmentation: -> logits [B, classes, size, size]

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

    def forward(self, maps, *_):
        return sum(enlarged(layers(x), self.size) for layers, x in zip(self.maps, itertools.chain(*maps)))


class UPer(nn.Module):
    """UPerNet's decoder (arXiv 1807.10221): pooled views of the coarsest map, sums from coarse to fine, all levels side
    by side; one level per activation, whose maps of all times are concatenated."""

    def __init__(self, shapes, times, classes, size, width):
        super().__init__()
        self.size = size
        self.order = sorted(range(len(shapes)), key=lambda i: shapes[i][1])      # coarse to fine
        self.sides = nn.ModuleList(convolution(times * shapes[i][0], width, 1) for i in self.order)
        self.pools = nn.ModuleList()
        for side in (1, 2, 3, 6):
            self.pools.append(nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Conv2d(width, width, 1), nn.ReLU()))
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in shapes)
        self.pooled = convolution(5 * width, width, 3)
        self.out = nn.Sequential(convolution(len(shapes) * width, width, 3), nn.Conv2d(width, classes, 1))

    def forward(self, maps, *_):
        levels = []
        for side, i in zip(self.sides, self.order):
            x = side(torch.cat([of_time[i] for of_time in maps], 1))             # [B, width, h, w]
            if levels:
                x = x + enlarged(levels[-1], x.shape[2])
            else:
                x = self.pooled(torch.cat([x, *(enlarged(pool(x), x.shape[2]) for pool in self.pools)], 1))
            levels.append(x)
        finest = [enlarged(smooth(level), x.shape[2]) for smooth, level in zip(self.smooth, levels)]
        return enlarged(self.out(torch.cat(finest, 1)), self.size)


class PixelMlps(nn.Module):
    """Ensemble of pixel classifiers for few masks (after arXiv 2112.03126): channels -> 128 -> 32 -> classes. In
    training the logits of all members, one after the other [members * B, ...]; else their votes."""

    def __init__(self, shapes, classes, size, members=10):
        super().__init__()
        self.size, self.classes, self.members = size, classes, nn.ModuleList()
        channels = sum(c for c, _, _ in shapes)
        for _ in range(members):
            self.members.append(nn.Sequential(
                nn.BatchNorm2d(channels), nn.Conv2d(channels, 128, 1), nn.ReLU(),
                nn.BatchNorm2d(128), nn.Conv2d(128, 32, 1), nn.ReLU(), nn.Conv2d(32, classes, 1)))

    def forward(self, maps, *_):
        x = torch.cat([enlarged(x, self.size) for x in itertools.chain(*maps)], 1)
        logits = [member(x) for member in self.members]
        if self.training:
            return torch.cat(logits)
        return sum(F.one_hot(member.argmax(1), self.classes) for member in logits).movedim(3, 1).float()


# ---------------------------------------------------------------------------------------------------------------------
# What there is to choose from: a head is a class and an entry here

HEADS = {                                                 # (protocol, name): from what `build_head` knows to the head
    ("head", "linear"): lambda m: PooledHead(m.all_shapes, m.classes, m.grid),
    ("head", "mlp"): lambda m: PooledHead(m.all_shapes, m.classes, m.grid, 512),
    ("head", "cnn"): lambda m: Cnn(m.shapes[0][0], m.classes, m.width),
    ("head", "attention"): lambda m: DifFormer(m.shapes, m.times, m.classes, m.width, m.depth),
    ("head", "difformer"): lambda m: DifFormer(m.shapes, m.times, m.classes, m.width, m.depth),
    ("head", "diffeed"): lambda m: DifFeed(m.source, m.shapes, m.feedback, m.classes, m.width, m.depth),
    ("segment", "linear"): lambda m: LinearMap(m.all_shapes, m.classes, m.size),
    ("segment", "uper"): lambda m: UPer(m.shapes, m.times, m.classes, m.size, m.width),
    ("segment", "ensemble"): lambda m: PixelMlps(m.all_shapes, m.classes, m.size),
}


def shapes_of(source, x):
    """Shapes (C, H, W) of the maps that `source` reads at one time of such inputs x [B, C, H, W]."""
    maps, _, _ = source.views(x, x)
    return [m.shape[1:] for m in maps[0]]


def build_head(cfg, source, images, classes, seed):
    """A fresh head of the kind source.head for what `source` reads of such images or latents."""
    x, times = source.shown(images, np.arange(1)), len(source.times)
    shapes = shapes_of(source, x)
    known = SimpleNamespace(
        source=source, size=x.shape[2], times=times, shapes=shapes,              # of the maps at one time
        all_shapes=times * shapes,                        # of those at all times, one after the other
        feedback=shapes_of(replace(source, head=""), x)[0],                      # in place of what feedback reads
        classes=classes, width=cfg.width, depth=cfg.depth,
        grid=cfg.grid if source.net else x.shape[2])      # of pixels linear and MLP see all
    with seeded(seed, "head"):
        return HEADS[cfg.protocol, source.head](known).to(source.device)


# ---------------------------------------------------------------------------------------------------------------------
# Training heads

def confusion_matrix(found, truth, classes):
    """Pixels by true and found class, int64 [classes, classes]; ids of one shape, truth below 0 = void."""
    known = truth >= 0
    return torch.bincount(classes * truth[known] + found[known], minlength=classes ** 2).view(classes, classes)


def mean_iou(table):
    """Intersection over union, averaged over the classes that occur in truth or prediction."""
    both = table.diag()
    union = table.sum(0) + table.sum(1) - both
    return float((both / union)[union > 0].mean())


@torch.no_grad()
def evaluate(heads, source, images, y, rows, seed, purpose):
    """[(accuracy, or mean IoU of masks, -loss)] of each head over `rows`, in eval mode; noise belongs to the image.

    y: int64 [N], or masks [N, H, W]; -100 = void.
    """
    tables, losses = [0] * len(heads), [0.0] * len(heads)
    for part in chunks(rows, source.batch):
        views = source.views_of(images, part, seed, purpose)
        target = y[part].to(source.device).long()
        for i, head in enumerate(heads):
            logits = head.eval()(*views)
            tables[i] += confusion_matrix(logits.argmax(1), target, logits.shape[1]).cpu()
            losses[i] += float(F.cross_entropy(logits, target, reduction="sum"))
    score = mean_iou if y.dim() > 1 else lambda table: float(table.trace() / len(rows))
    return [(score(table), -loss / len(rows)) for table, loss in zip(tables, losses)]


def rows_of_update(rows, batch, seed, step):
    """Rows of one update, sorted, none twice."""
    chooser = np.random.default_rng(seed_of(seed, "head rows", step))
    return np.sort(chooser.choice(rows, batch, replace=False))


def training_batch(cfg, source, images, y, rows, seed, step):
    """(what heads are called with, targets) of one update on `rows`: mirrored at random with flip, with fresh noise."""
    numbers, target = generator(seed, "head noise", step), y[rows].long()
    flip = None
    if cfg.flip:
        flip = torch.rand(len(rows), generator=numbers) < 0.5
        if y.dim() > 1:                                   # masks are mirrored with their images
            target = torch.where(flip[:, None, None], target.flip(-1), target)
    x = source.shown(images, rows, flip)
    z = torch.randn(x.shape, generator=numbers).to(x.device)
    return source.views(x, z), target.to(x.device)


def fit_head(run, cfg, source, images, y, classes, fit, val, seed):
    """(head, what was selected): heads for every (lr, l2), trained side by side on the same frozen passes with fresh
    noise on rows `fit`; the best on rows `val`. y: classes int64 [N], or masks [N, H, W].

    AdamW with one cycle. (2307.08702 and 2311.17921: SGD without momentum, lr 1e-2 or 5e-2, times 0.1 every 7 of 28
    epochs.)
    """
    trials, batch = list(itertools.product(cfg.lr, cfg.l2)), min(cfg.head_batch, len(fit))
    steps = max(1, cfg.images // batch)
    heads = [build_head(cfg, source, images, classes, seed) for _ in trials]
    optimizers = [OneCycle([head], lr, l2, steps) for head, (lr, l2) in zip(heads, trials)]
    with bar(run, steps, f"{source.head}, seed {seed}", "step") as progress:
        for step in range(steps):
            rows = rows_of_update(fit, batch, seed, step)
            views, target = training_batch(cfg, source, images, y, rows, seed, step)
            for head, optimizer in zip(heads, optimizers):
                members = head.train()(*views).split(batch)                      # several of an ensemble
                optimizer.step(sum(F.cross_entropy(logits, target) for logits in members))
            progress.update(1)
    scores = evaluate(heads, source, images, y, val, seed, "head validation 0")
    best = scores.index(max(scores))
    lr, l2 = trials[best]
    return heads[best], dict(lr=lr, l2=l2, validation=scores[best][0])


def labelled(y, rows, share, seed):
    """A share of the rows of each class, at least one; of one seed, smaller sets lie inside larger ones."""
    rows, keep = shuffled(rows, seed, "labelled rows"), []
    for k in np.unique(y[rows]):
        of_class = rows[y[rows] == k]
        keep.append(of_class[:max(1, round(share * len(of_class)))])
    return np.sort(np.concatenate(keep))


def compare_heads(run, cfg, source, train, test, y, y_test, rows_of, score, purpose):
    """(result, the first head): heads cfg.head trained on `source` and its controls, and tested.

    y, y_test: classes int64 [N], or masks [N, H, W]; rows_of: seed -> (rows to learn from, rows to select on); score:
    what `evaluate` then measures; purpose: of the noise of test images.
    """
    classes, first = 1 + int(max(y.max(), y_test.max())), []

    def sources(seed):
        own = replace(source, head=cfg.head, seed=seed)
        return {cfg.head: own} | controls(run, cfg, own, train, rows_of(seed)[0])

    def measure(what, source, seed):
        head, chosen = fit_head(run, cfg, source, train.inputs, y, classes, *rows_of(seed), seed)
        (reached, _), = evaluate([head], source, test.inputs, y_test, np.arange(len(test)), seed, purpose)
        if not first:                                     # on `source`: controls come after it
            first.append(head)
        return chosen | {score: reached, "parameters": sum(p.numel() for p in head.parameters())}

    rows = compare(run, sources, measure, cfg.seeds, [score])
    fit, val = rows_of(cfg.seeds[-1])
    result = dict(head=cfg.head, seeds=cfg.seeds, train_images=len(fit), validation_images=len(val),
                  test_images=len(test), rows=rows)
    return result, first[0]


def head(run, cfg, source, train, test):
    """Train heads to tell classes, of a frozen network's maps."""
    y, y_test = known_classes(train, test)
    require(len(source.places) == 1 or cfg.head not in ("cnn", "diffeed"), cfg, "head activations t", "reads one place")
    eighths = cfg.width % 8 == 0 or cfg.head not in ("attention", "difformer", "diffeed")
    require(eighths, cfg, "head width", "width must be a multiple of the 8 attention heads")
    upwards = all(name.startswith(("mid-repeat", "up-level")) for name in source.names)
    require(cfg.head != "diffeed" or upwards, cfg, "head activations", "reads the middle or the way up of a U-Net")
    parts = fit_and_validation(cfg, len(train))

    def rows_of(seed):
        return [labelled(y.numpy(), part, cfg.labels_share, seed) for part in parts]

    return compare_heads(run, cfg, source, train, test, y, y_test, rows_of, "accuracy", "head test 0 0")[0]


def segment(run, cfg, source, train, test):
    """Train heads to tell the class of every pixel, of a frozen network's maps."""
    y, y_test = known_masks(train, test)
    parts, purpose, seed = fit_and_validation(cfg, len(train)), "segment test", cfg.seeds[0]
    source = replace(source, batch=max(1, 2 ** 14 // train.images.shape[2] ** 2))              # maps become large

    def rows_of(seed):
        return [some_rows(part, seed, "masks", cfg.masks or None) for part in parts]

    result, first = compare_heads(run, cfg, source, train, test, y, y_test, rows_of, "miou", purpose)
    if run.rank == 0:
        few = np.arange(min(10, len(test)))
        with torch.no_grad():
            found = first(*source.views_of(test.images, few, seed, purpose)).argmax(1).cpu()
        nothing = torch.zeros_like(found)
        sheet = [draw_masks(test.images[i], v[i].numpy()) for v in (nothing, y_test, found) for i in few]
        save_grid(picture(run), np.stack(sheet), len(few), ["image", "truth", "found"])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Properties of activations (arXiv 2410.03558 sees them in pictures and defines no number; these are ours), and the
# selection by them

def noise_sensitivity(a, b):
    """Distance between two noise draws of one image over distance between images; maps a, b [N, C, H, W]: 0 =
    deterministic, 1 = nothing but noise."""
    def distance(x, y):
        return (x - y).flatten(1).norm(dim=1).mean()
    return float(distance(a, b) / distance(a, b.roll(1, 0)).clamp(min=1e-9))


def granularity(maps, size):
    """Length at which the spatial autocorrelation of maps [N, C, H, W], averaged over channels, falls to 1/e, in pixels
    of the size x size image.

    The mean of each map is taken away, so that what is equal all over an image does not count as coarse; lengths of
    half a map and more come out too small.
    """
    x, side = maps - maps.mean((2, 3), keepdim=True), maps.shape[3]
    x = x / x.square().mean((0, 2, 3)).clamp(min=1e-9).sqrt()[:, None, None]     # every channel counts alike
    variance, limit = max(float(x.square().mean()), 1e-9), 1 / math.e
    before = 1.0                                          # correlation at the distance before
    for distance in range(1, side):
        across = (x[..., distance:] * x[..., :-distance]).mean()
        down = (x[..., distance:, :] * x[..., :-distance, :]).mean()
        correlation = float(across + down) / 2 / variance
        if correlation < limit:                           # in between, on a line
            return (distance - 1 + (before - limit) / (before - correlation)) * size / side
        before = correlation
    return float(size)                                    # it does not fall within the map


def locality(maps):
    """How much the resemblance of two positions is a matter of their distance: minus the correlation of cosine
    similarity with distance, over all pairs of positions of maps [N, C, H, W] (at most 16 x 16 of them)."""
    step = math.ceil(maps.shape[3] / 16)
    maps = maps[..., ::step, ::step]
    x = F.normalize(maps - maps.mean((0, 2, 3), keepdim=True), dim=1).flatten(2)                 # [N, C, L]
    side = torch.arange(maps.shape[3])
    place = torch.cartesian_prod(side, side).float()      # [L, 2]
    i, j = torch.triu_indices(len(place), len(place), 1)
    similar = (x.transpose(1, 2) @ x)[:, i, j]            # [N, pairs]
    distance = (place[i] - place[j]).norm(dim=1).expand_as(similar)
    both = torch.stack([similar.flatten(), distance.flatten()])
    return -float(torch.corrcoef(both)[0, 1].nan_to_num())


def properties(source, images, rows):
    """{name: dict of the three and the map's size} at source.times[0]: means over `rows`, a few at a time."""
    kinds, measured = ("size", "sensitivity", "granularity", "locality"), {name: [] for name in source.names}
    parts = np.array_split(rows, math.ceil(len(rows) / 16))
    for part in parts:
        a, b = (source.maps(images, part, f"select {number} 0") for number in (0, 1))
        for name, t in a:
            x, again = a[name, t].cpu(), b[name, t].cpu()
            size = source.state["size"]
            measured[name].append([x.shape[3], noise_sensitivity(x, again), granularity(x, size), locality(x)])
    weights = [len(part) for part in parts]
    return {name: dict(zip(kinds, np.average(values, 0, weights).tolist())) for name, values in measured.items()}


def why_dropped(i, rows, outputs):
    """Why activation i is no candidate, or "": in the spirit of 2410.03558 (section 4), in numbers. rows: of all
    activations at one time, in forward order; outputs: those of them that are block outputs.

    The paper keeps the clean half of the way up, without increments and self-attention, and of the noisy half only
    self-attention's q and k. Here what is noisier than the median block output goes, wherever it is; what is much finer
    than block outputs of its size (over-refined ends of a level); and what is more local than those, unless its own
    block's output is noisy.
    """
    def median(some, score):
        return np.median([row[score] for row in some])

    row, limit = rows[i], median(outputs, "sensitivity")
    peers = [other for other in outputs if other["size"] == row["size"]] or outputs
    own = next((other for other in rows[i:] if other in outputs), row)           # the output of its block
    if row["sensitivity"] > limit:
        return "noisy"
    if row["granularity"] < 0.5 * median(peers, "granularity"):
        return "fine"
    local = row["locality"] > 1.25 * max(0.0, median(peers, "locality"))
    return "local" if local and own["sensitivity"] <= limit and row is not own else ""


def select(run, cfg, source, train, test):
    """Measure activations, filter them, rank the rest by a linear probe; the best of each map size are chosen."""
    y, _ = known_classes(train, test)
    blocks = [name for name in matching(source.net, ["blocks"]) if name in source.names]
    require(blocks, cfg, "activations", "name some block outputs, too: they are what the others are compared with")
    fit, val = fit_and_validation(cfg, len(train), cfg.fit)
    table = []
    for t in source.times:
        one = replace(source, times=[t])
        measured = properties(one, train.inputs, some_rows(fit, cfg.seed, "properties", 64))
        rows = [source.row(name, t) | measured[name] for name in source.names]
        outputs = [row for row in rows if row["activation"] in blocks]
        dropped = [why_dropped(i, rows, outputs) for i in range(len(rows))]
        x, x_val = (one.vectors(train.inputs, part, "ranking") for part in (fit, val))
        for row, why in zip(rows, dropped):
            place = row["activation"], t
            row |= dict(dropped=why, linear=None)
            if not why:
                row["linear"] = linear_accuracy(x[place], x_val[place], y[fit], y[val], source.device)
        table += rows
    passed = sorted((row for row in table if not row["dropped"]), key=lambda row: -row["linear"])
    require(passed, cfg, "activations t", "the rules drop all of these; name more")
    t, best = passed[0]["t"], {}                          # best: a row for each size of map
    for row in passed:
        if row["t"] == t:
            best.setdefault(row["size"], row)
    run.say("; ".join(f"{size:g} x {size:g}: {as_text(row, 'linear')}" for size, row in best.items()))
    names = [row["activation"] for row in best.values()]
    return dict(chosen=dict(activations=[name for name in source.names if name in names], t=[t]), table=table)


# ---------------------------------------------------------------------------------------------------------------------
# Correspondence by nearest neighbours

class Pairs(typing.NamedTuple):
    """Images with points that correspond."""
    source: np.ndarray                                    # uint8 [N, 3, H, W]
    target: np.ndarray
    points: torch.Tensor                                  # [N, P, 2] (x, y) of the source, in [-1, 1]
    goal: torch.Tensor                                    # [N, P, 2] in pixels of the target
    limit: torch.Tensor                                   # [N] what distances are measured by, in pixels


def warps(n, size, seed):
    """Random smooth maps from positions of a warped image to those of its source, [n, size, size, 2] (x, y in [-1, 1]):
    a similarity plus a slow bend."""
    numbers = generator(seed, "warps")
    largest = torch.tensor([0.5, 0.25, 0.2, 0.2])[:, None]
    angle, log_zoom, x, y = (torch.rand(4, n, generator=numbers) * 2 - 1) * largest            # [n] each
    cos, sin = angle.cos() * log_zoom.exp(), angle.sin() * log_zoom.exp()
    similarities = torch.stack([cos, -sin, x, sin, cos, y], 1).view(n, 2, 3)
    grid = F.affine_grid(similarities, (n, 1, size, size), align_corners=False)
    bends = 0.06 * torch.randn(n, 2, 4, 4, generator=numbers)
    bends = F.interpolate(bends, (size, size), mode="bicubic", align_corners=True)
    return grid + bends.permute(0, 2, 3, 1)


def pick_points(valid, seed):
    """Positions int64 [N, 8] among the true pixels of valid [N, H, W]; where there are none, among all."""
    weights = valid.flatten(1).float()
    weights = weights + ~weights.any(1, keepdim=True)
    return torch.multinomial(weights, 8, replacement=True, generator=generator(seed, "points"))


def centres(at, size):
    """Pixels of size x size images, counted row by row, as (x, y) of their centres; at int64 [N, P] -> [N, P, 2]."""
    return torch.stack([at % size, at // size], 2) + 0.5


def warped_pairs(images, masks, seed):
    """Pairs of an image and its known warp; points lie on objects (mask above 0, not void) where there are masks."""
    size, x = images.shape[2], torch.from_numpy(np.array(images)).float()
    grid = warps(len(x), size, seed)                      # [N, H, W, 2]
    target = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False).round().to(torch.uint8)
    valid = (grid.abs() < 1).all(3)
    if masks is not None:
        masks = torch.from_numpy(np.array(masks))[:, None].float()
        warped = F.grid_sample(masks, grid, mode="nearest", align_corners=False)[:, 0]
        valid &= (warped > 0) & (warped < 255)
    at = pick_points(valid, seed)
    points = grid.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, 2))
    return Pairs(images, target.numpy(), points, centres(at, size), torch.full((len(x),), float(size)))


def partners(rows, classes, seed):
    """Pairs of rows of one class, two int64 [n]: in an order drawn by the seed, each with the one before it."""
    before, pairs = {}, []                                # before: class -> row
    for i in shuffled(rows[classes[rows] >= 0], seed, "class pairs"):            # -1: of no known class
        k = int(classes[i])
        if k in before:
            pairs.append((i, before[k]))
        before[k] = i
    if not pairs:
        raise UserError(f"pairs: no two of {len(rows)} test images with an object are of one known class; raise pairs= "
                        "or data.test=, or give classes")
    return np.array(pairs).T


def class_pairs(data, rows, seed, origin, axes):
    """Pairs of images of one class: points of one's object, and the same parts of the other's. origin [N, 2], axes
    [N, 2, 2]: of each image's object, as of `shape_parts`; distances are measured by the longer side of its box."""
    size, corners = data.images.shape[2], data.boxes[rows]
    has_box = (corners[:, 2:] > corners[:, :2]).all(1)
    a, b = partners(rows[has_box], data.classes, seed)
    valid = torch.from_numpy(filled(data.boxes[a], size))
    if data.masks is not None:
        valid &= torch.from_numpy((data.masks[a] > 0) & (data.masks[a] < 255))
    points = centres(pick_points(valid, seed), size)
    origin, axes = (torch.from_numpy(np.array(v, np.float32)) for v in (origin, axes))
    local = torch.linalg.solve(axes[a], (points - origin[a][:, None]).mT).mT     # [N, P, 2] in the object's own axes
    goal = origin[b][:, None] + local @ axes[b].mT
    limit = torch.from_numpy(data.boxes[b][:, 2:] - data.boxes[b][:, :2]).amax(1)
    return Pairs(data.images[a], data.images[b], 2 * points / size - 1, goal, limit)


def similarity(source, target, points, size):
    """Cosine similarity of points [N, P, 2] in [-1, 1] of maps source [N, C, h, w] with every pixel of target
    [N, C, h, w], [N, P, size * size]. Maps are centred per pair, since activations share a large common direction."""
    mean = (source.mean((2, 3), keepdim=True) + target.mean((2, 3), keepdim=True)) / 2
    a = F.grid_sample(source - mean, points[:, :, None], padding_mode="border", align_corners=False)
    a = F.normalize(a[..., 0], dim=1)                     # [N, C, P]
    b = F.normalize(enlarged(target - mean, size), dim=1).flatten(2)             # [N, C, size * size]
    return a.transpose(1, 2) @ b


def matches(source, pairs, step=32):
    """{(name, t): found positions [N, P, 2] in target pixels} by nearest neighbour, `step` pairs at once."""
    size, found = pairs.source.shape[2], {}
    for part in chunks(np.arange(len(pairs.source)), min(step, max(1, 2 ** 14 // size ** 2))):
        points = pairs.points[part].to(source.device)
        for t in source.times:                            # one after the other: whole maps are held
            one = replace(source, times=[t])
            a, b = one.maps(pairs.source, part, "source 0"), one.maps(pairs.target, part, "target 0")
            for place in a:
                best = similarity(a[place], b[place], points, size).argmax(2).cpu()
                found.setdefault(place, []).append(best)
    return {place: centres(torch.cat(parts), size) for place, parts in found.items()}


def pck(found, pairs, share):
    """Percentage of correct keypoints, as a share of 1: found [N, P, 2] within `share` of the limit of the goal."""
    error = (found - pairs.goal).norm(dim=2)
    return float((error <= share * pairs.limit[:, None]).float().mean())


def correspond(run, cfg, source, train, test):
    """PCK on test images, warped and paired by class, of the (activation, t) that is best on warped training images.
    Nothing is trained (2410.03558 trains a convolution)."""
    def warped(part, name):                               # (rows that are used, pairs)
        n = min(cfg.pairs, len(part) if part is test else max(1, len(part) // 2))
        rows = some_rows(len(part), cfg.seed, "pairs", n)
        masks = None if part.masks is None else part.masks[rows]
        return rows, warped_pairs(part.images[rows], masks, seed_of(cfg.seed, f"warps {name}"))

    (used, known), (rows, pairs) = warped(train, "train"), warped(test, "test")
    tasks = dict(warps=pairs)
    if run.data.source == "shapes" and not run.data.classes:     # row i is drawing i
        where = shape_parts(seed_of(run.data.seed, "test"), np.arange(len(test)), run.data.size, run.data.two_objects)
        tasks["parts"] = class_pairs(test, rows, cfg.seed, *where)
    elif test.boxes is not None and test.classes.max() >= 0:     # the same place in the box
        sides = test.boxes[:, 2:] - test.boxes[:, :2]
        tasks["boxes"] = class_pairs(test, rows, cfg.seed, test.boxes[:, :2], sides[:, None] * np.eye(2))

    def measure(what, source, seed):
        score = {place: pck(found, known, 0.1) for place, found in matches(source, known).items()}
        table = [dict(activation=name, t=t, pck=value) for (name, t), value in score.items()]
        name, t = max(score, key=score.get)
        got = dict(parameters=0, passes=min(source.passes, 1), best=[name, t], table=table)
        for task, pairs in tasks.items():
            found = matches(replace(source, names=[name], times=[t]), pairs)[name, t]
            got |= {f"{task}_{share:g}": pck(found, pairs, share) for share in (0.05, 0.1, 0.2)}
            if what == "features" and run.rank == 0:
                draw_matches(picture(run, f"-{task}"), pairs, found)
        return got

    others = np.setdiff1d(np.arange(len(train)), used)    # half at least, for the supervised control
    every = {"features": source} | controls(run, cfg, source, train, others)
    found = compare(run, lambda seed: every, measure, [cfg.seed], [f"{task}_0.1" for task in tasks])
    return dict(pairs={task: len(pairs.source) for task, pairs in tasks.items()}, rows=found)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing representations, without labels

def centred_gram(x):
    """Gram matrix K of rows x [n, D], U-centred: its rows sum to 0 without the diagonal, which is 0.

    <K, L> / (n (n - 3)) of two of them is HSIC_1 of Song et al. (JMLR 2012, equation 5), the unbiased estimate of the
    Hilbert-Schmidt independence criterion: for linear kernels, of |cov(x, y)|_F^2.
    """
    x = (x - x.mean(0)).double()                          # a shift changes nothing but rounding
    n, K = len(x), (x @ x.T).fill_diagonal_(0)
    means = K.sum(1, keepdim=True) / (n - 2)
    return (K - means - means.T + means.sum() / (n - 1)).fill_diagonal_(0)


def cka(run, cfg, source, train, test):
    """Linear CKA (arXiv 1905.00414) between all (model, activation, t), on up to 1,000 test images."""
    models = {cfg.checkpoint: source}
    require(len(test) >= 4, run.data, "test", "cka needs four test images or more")
    for name in cfg.against:
        if name == "random":
            net, state = random_network(source), source.state
        else:
            net, state = load_model(run, name)
            require_shape(run, state)
        models[name] = replace(source, net=net, state=state, names=matching(net, cfg.activations))
    rows, grams = some_rows(len(test), cfg.seed, "cka", 1000), {}                # (model, t, name): [n n], of length 1
    for model, one in models.items():
        for (name, t), x in one.vectors(test.inputs, rows, "cka").items():
            grams[model, t, name] = F.normalize(centred_gram(x).flatten(), dim=0).float()
    K = torch.stack(list(grams.values()))
    matrix = (K @ K.T).tolist()
    if run.rank == 0:
        captions = [f"{i} {model} {name} t={t:g}" for i, (model, t, name) in enumerate(grams)]
        heat_map(picture(run), np.array(matrix), captions, "linear CKA; columns as rows")
    table = [dict(model=model, activation=name, t=t) for model, t, name in grams]
    return dict(images=len(rows), table=table, cka=matrix)


# ---------------------------------------------------------------------------------------------------------------------
# How samples keep to the layouts that they were asked for

def objects_of_shapes(images):
    """Where objects of `shapes` are in images [n, 3, H, W], bool [n, H, W]: they have more red than blue, by 92 on
    average, the ground has less, by 51."""
    return images[:, 0].astype(np.int16) - images[:, 2] > 20


def found_objects(run, info, images, rows):
    """Masks bool [n, H, W] of objects, found as those of the labels (info) were: the same place, equal settings."""
    of, labelled = info["features"], info["recipe"]
    net, state = load_model(run, of["checkpoint"])
    if state["weights"] != of["hash"]:
        raise UserError(f"{of['checkpoint']} has changed since the labels were made; make features and labels again")
    plain = len(of["arrays"]) == of["draws"] == 1 and of["pool"] == "none"
    require(plain, run.cfg, "samples", "have labels of several activations or draws, or of a pool: not supported here")
    place, context = of["arrays"][0], autocast(run, run.cfg.precision)[0]
    source = Source(net, state, [place["activation"]], [place["t"]], device=run.device, context=context, batch=64)
    settings = {k: labelled[k] for k in ("objects", "contrast", "refine")}
    found = objects_in(source, images, rows, "samples", "masks", images.shape[2:], images, **settings)
    return found[source.places[0]] > 0


def in_boxes(masks):
    """Masks bool [n, H, W] become the filled boxes around the largest piece of each."""
    masks = torch.from_numpy(masks)
    largest = largest_component(masks.flatten(1), masks.shape[1:]).view_as(masks)
    return filled(bounds(largest), masks.shape[2])


def overlap_of(asked, found):
    """IoU of areas bool [n, H, W], image by image; where nothing was asked for and nothing is, 1."""
    either = (asked | found).sum((1, 2))
    return np.where(either > 0, (asked & found).sum((1, 2)) / np.maximum(either, 1), 1.0)


def layout(run, cfg, source, train, test):
    """Mean IoU of the boxes or masks that samples were asked for with the objects in them, found as those of the labels
    were (layout_iou) or, on `shapes`, known exactly (exact_iou)."""
    folder, state = run.dir / "samples" / cfg.samples, source.state
    condition = state.get("condition")
    require(condition in ("box", "mask"), cfg, "samples", "are of a model without boxes and masks: train one with "
            "train_guided.py condition=box or mask")
    made = read_json(folder / "metrics.json", "make the samples with sample_ode.py")
    require(made["hash"] == state["weights"], cfg, "samples", f"were made by an earlier state of {cfg.checkpoint}")
    labels, info = load_labels(run, state["label_file"])
    same = state.get("label_file_hash", info.get("hash")) == info.get("hash")
    require(same and digest(labels["train"]) == state["labels_hash"], cfg, "samples",
            f"are of a model trained with other labels than labels/{state['label_file']}.npz holds now")
    labelled = info["recipe"]
    method = labelled["method"]
    objects = labels.get("boxes_train")
    one_box = condition == "box" and (objects is None or objects[0].size == 4)
    drawn = made["recipe"].get("boxes") or (objects is None and "masks_train" in labels)         # segments
    require((one_box or condition == "mask") and not drawn, cfg, "samples",
            "were asked for something else than one box, or the objects' masks, of training images")

    images, ids = (np.load(folder / f"{k}.npy", mmap_mode="r", allow_pickle=False) for k in ("images", "labels"))
    rows, bank, found = run.share(len(images)), load_condition(state, "cpu"), {}
    maps = bank.table.numpy()[ids[rows]]                  # boxes: 0 = inside; masks: 0 = none, null = whatever
    asked = maps == 0 if one_box else (maps > 0) & (maps < bank.channels)
    if run.data.source == "shapes":
        found["exact_iou"] = objects_of_shapes(images[rows])
    if method in ("lost", "masks"):
        found["layout_iou"] = found_objects(run, info, images, rows)
    require(found, cfg, "samples", f"labels of method={method} do not tell how to find objects")
    if one_box:
        found = {score: in_boxes(areas) for score, areas in found.items()}
    scores = {}
    for score, areas in found.items():
        scores[score] = float(np.concatenate(run.gather(overlap_of(asked, areas))).mean())
    run.say(", ".join(f"{k} {v:.3f}" for k, v in scores.items()) + f" over {len(images):,} samples")
    if run.rank == 0:
        few = range(min(10, len(rows)))
        sheet = [draw_masks(images[i], areas[i]) for areas in (asked, *found.values()) for i in few]
        save_grid(picture(run), np.stack(sheet), len(few), ["asked for", *found])
    return dict(samples=cfg.samples, images=len(images), **scores)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def picture(run, suffix=""):
    """Where a picture goes."""
    return run.dir / "probe" / f"{run.cfg.name}{suffix}.png"


def heat_map(path, values, rows, title, marks=None):
    """A matrix [R, C] as PNG with captions of rows and marks, as many letters; colours stretch over its range."""
    low, high, tiles = values.min(), values.max(), []
    for value, mark in zip(values.flat, marks or [""] * values.size):
        share = (value - low) / max(high - low, 1e-9)
        colour = tuple(int(255 * (1 - c * share)) for c in (0.97, 0.75, 0.5))
        tile = Image.new("RGB", (62, 18), colour)
        ImageDraw.Draw(tile).text((6, 3), f"{value:.3f} {mark}", "white" if share > 0.5 else "black")
        tiles.append(np.asarray(tile).transpose(2, 0, 1))
    head = f"{low:.3f} (light) to {high:.3f} (dark): {title}"
    save_grid(path, np.stack(tiles), values.shape[1], rows, zoom=1, head=head)


def draw_surface(run, table, score, title, marks):
    """probe/<name>.png: a score of a table whose rows are all (activation, t) in order; marks: (letter, row of it)."""
    names = list(dict.fromkeys(row["activation"] for row in table))
    values = np.reshape([row[score] for row in table], (len(names), -1))
    times = ", ".join(str(row["t"]) for row in table[:values.shape[1]])
    letters = ["".join(letter for letter, marked in marks if marked is row) for row in table]
    if run.rank == 0:
        heat_map(picture(run), values, names, f"{score}; {title}; columns: t = {times}", letters)


def draw_matches(path, pairs, found):
    """Pairs side by side, a line from each point to where it was found: green within 0.1 of the limit, else red."""
    size, zoom, tiles = pairs.source.shape[2], 4, []
    starts, ends = (pairs.points + 1) * size / 2, found + torch.tensor([size, 0.0])
    lines = torch.cat([starts, ends], 2) * zoom           # [N, P, 4]
    right = (found - pairs.goal).norm(dim=2) <= 0.1 * pairs.limit[:, None]
    for i in range(min(6, len(lines))):
        both = np.concatenate([pairs.source[i], pairs.target[i]], 2).transpose(1, 2, 0)
        tile = Image.fromarray(both).resize((2 * size * zoom, size * zoom), Image.NEAREST)
        for line, good in zip(lines[i].tolist(), right[i]):
            ImageDraw.Draw(tile).line(line, "lime" if good else "red")
        tiles.append(np.asarray(tile).transpose(2, 0, 1))
    save_grid(path, np.stack(tiles), 1, zoom=1, head="green: found within a tenth; red: not")


# ---------------------------------------------------------------------------------------------------------------------
# The stage

ALWAYS = "protocol precision seed"           # and what is read, where
FITTED = "controls supervised_images validation width images head_batch lr l2 seeds"
PROTOCOLS = dict(                                         # (function, settings that its result depends on)
    sweep=(sweep, "fit validation K"),
    boxes=(boxes, "boxed"),
    linear=(linear, "controls supervised_images validation draws"),
    head=(head, f"{FITTED} head labels_share depth grid flip"),
    segment=(segment, f"{FITTED} head masks flip"),
    select=(select, "fit validation"),
    correspond=(correspond, "controls supervised_images pairs"),
    cka=(cka, "against activations"),
    layout=(layout, ""),
)


def stored_source(run, cfg):
    """`open_source` of features=: no network, only what is known of the one that made them."""
    info = load_features(run, cfg.features, "train")[1]
    cfg.checkpoint = info.get("checkpoint", "")           # others' features may not say
    cfg.controls = [name for name in cfg.controls if name == "pixels"]           # the others need a network
    names, times = (list(dict.fromkeys(array[k] for array in info["arrays"])) for k in ("activation", "t"))
    passes = len(times) * info.get("draws", 1)
    state = dict(file=f"features/{cfg.features}", weights=info.get("hash", ""), seen=None, passes=passes)
    return Source(None, state, names, times), dict(stored=info)


def open_source(run, cfg):
    """(what is probed, as a Source; what that adds to the recipe)."""
    if cfg.protocol == "layout":
        check_name("samples", cfg.samples)
        samples = run.dir / "samples" / cfg.samples / "metrics.json"
        with reading(samples, "make the samples with sample_ode.py"):
            made = read_json(samples, "make the samples with sample_ode.py")
            cfg.checkpoint, recipe = made["checkpoint"], dict(made=digest(made["recipe"], made["hash"]))
        net, state = load_model(run, cfg.checkpoint)
        return Source(net, state, [], []), recipe         # features are read where labels were
    net, state = load_model(run, cfg.checkpoint)
    names, times = cfg.activations, cfg.t or [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    if names == ["blocks"] and cfg.protocol == "select":
        names = ["*"]
    if names == ["blocks"] and cfg.protocol in ("linear", "head", "segment"):
        choice = label_free(run, cfg, state)
        names, times = [choice["activation"]], cfg.t if len(cfg.t) == 1 else [choice["t"]]
        if len(cfg.t) > 1:                                # as YAMLs give to the sweep
            run.say("note: the label-free choice is read at its own t; to read it at several, name activations=, too")
    names = matching(net, names)
    run.say(f"reads {len(names)} activation(s), {names[0]} ..., at t = {', '.join(map(str, times))}")
    require(len(set(times)) == len(times), cfg, "t", "name each once")
    extra = dict(reads=[names, times])
    if cfg.protocol == "cka":
        extra["hashes"] = [load_checkpoint(run, name)["weights"] for name in cfg.against if name != "random"]
    return Source(net, state, names, times), extra


def main():
    """Probe, from the command line."""
    run = start("probe", Probe, __doc__)
    cfg = run.cfg
    cfg.name = cfg.name or cfg.protocol
    require(cfg.activations and cfg.lr and cfg.l2 and cfg.seeds, cfg, "activations lr l2 seeds", "name at least one")
    require(len(set(cfg.seeds)) == len(cfg.seeds), cfg, "seeds", "name each once")
    kinds = [name for protocol, name in HEADS if protocol == cfg.protocol]
    require(not kinds or cfg.head in kinds, cfg, "head", unknown(cfg.head, kinds))
    require(cfg.protocol == "linear" or not cfg.features, cfg, "features", "are for protocol=linear")
    pixels = cfg.protocol in ("segment", "correspond", "layout")
    require(not pixels or not run.data.latents, cfg, "protocol", "is defined on pixels, not on latents")

    # what is probed, of which images
    source, extra = stored_source(run, cfg) if cfg.features else open_source(run, cfg)
    context, _, _ = autocast(run, cfg.precision)
    source = replace(source, device=run.device, context=context, seed=cfg.seed, batch=cfg.batch)
    state, path = source.state, run.dir / "probe" / f"{cfg.name}.json"
    if run.dry_run:
        run.say(f"{cfg.protocol} of {state['file']} into {path}")
        return source.net and say_network(run, source.net, state["channels"], state["size"])
    if source.net:
        require_shape(run, state)
    train, test = (load_data(run, part) for part in ("train", "test"))

    # the recipe: the settings that decide, and what they stand for
    protocol, settings = PROTOCOLS[cfg.protocol]
    recipe = {k: run.sections["probe"][k] for k in f"{ALWAYS} {settings}".split()} | extra
    what = dict(checkpoint=cfg.checkpoint, hash=state["weights"])
    recipe |= what | dict(images=[part.info["fingerprint"] for part in (train, test)])
    truth = [part[key] for part in (vars(train), vars(test)) for key in ("classes", "boxes", "masks")]
    recipe["truth"] = digest(*(np.asarray(known) for known in truth if known is not None))

    # measure, write
    with locked(run, "probe", cfg.name):
        if run.agreed(lambda: finished(run, path, recipe)):
            return
        tick = time.time()
        result = protocol(run, cfg, source, train, test)
        if cfg.features and load_features(run, cfg.features, "train")[1] != extra["stored"]:
            raise UserError(f"features/{cfg.features}: was replaced meanwhile; give the command again")
        what |= dict(protocol=cfg.protocol, seen=state["seen"], seed=cfg.seed) | result
        if run.rank == 0:
            write_json(path, what | dict(seconds=round(time.time() - tick, 1), recipe=recipe))
        run.wait()

    # say where it is, and what comes next
    run.say(f"result in {path}")
    words = f"extract_features.py checkpoint={cfg.checkpoint}"
    pinned = {"activations", "t"} & set(run.sections.get("extract_features", {}))         # in the YAML file
    if cfg.protocol in ("sweep", "boxes"):
        dense = " name=dense pool=none" if cfg.protocol == "boxes" else ""
        dense += " activations=auto t=" * bool(pinned)
        run.next(f"{words} choice={cfg.name}{dense}", "extracts the label-free choice")
    if cfg.protocol == "select":
        names, (t,) = ",".join(result["chosen"]["activations"]), result["chosen"]["t"]
        run.next(f"{words} name={cfg.name} activations={names} t={t:g}", "extracts what was chosen")


if __name__ == "__main__":
    cli(main)

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
linear  trains on the training images outside the validation part, selects on that part, reports the test images once; with raw pixels, the same network with
        random weights and a supervised network of the same size beside it.
head    trains a head on the fly: fresh noise for every image seen, flips and crops if asked for; linear, MLP, CNN, attention (arXiv 2307.08702), DifFormer and
        DifFeed (2311.17921). Learning rate and l2 are selected on the validation part, the test images are reported once; several seeds; controls beside it.
select  measures noise sensitivity, granularity and locality of activations, filters them by the rules of 2410.03558, ranks the rest with a linear probe.
"""
import itertools
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from torch import nn

from extract_features import catalogue, matching, noise_level, stream, tapped, _Enough
from self_label import alone, assign, corloc, find_objects, gather, iou, kmeans, nmi
from train_diffusion import (PATHS, Block, Model, UNet, UserError, as_input, atomic, autocast, bar, build_model, cli, diffuse, draw, fill, finished, load_data, load_model,
                             read_json, require, row_shape, seed_of, start, write_json)

HEAD_KEYS = {"head", "labels_share", "per_class", "width", "depth", "heads", "side", "grid", "hidden", "images", "head_batch", "lr", "l2", "flip", "crop", "seeds"}
BOXES_KEYS = {"boxed"}
SELECT_KEYS = {"measured", "noisy", "fine", "local"}


@dataclass
class Probe:
    """Section `probe`."""
    name: str = ""                                        # results go to probe/<name>.json; empty = the protocol
    protocol: Literal["sweep", "boxes", "linear", "head", "select"] = "sweep"      # what is measured; see above
    checkpoint: str = "diffusion/base"                    # a folder of the run, a .pt file, or published weights: adm:FILE, uvit:FILE
    weights: Literal["ema", "net"] = "ema"                # averaged or raw
    activations: list[str] = field(default_factory=lambda: ["blocks"])    # names and globs; blocks = every block output. linear: default the label-free choice
    t: list[float] = field(default_factory=list)          # noise times; empty = 0.4,0.5,...,0.9 for sweep and select, else the label-free choice for linear
    choice: str = "sweep"                                 # linear: which sweep to take the default activation and time from
    fit: int = 2_000                                      # sweep: training images to fit on
    validation: int = 1_000                               # training images held out for selection
    K: int = 30                                           # sweep: clusters of k-means
    boxed: int = 128                                      # boxes: images in which boxes are found
    neighbours: int = 20                                  # k of kNN (cosine)
    draws: int = 3                                        # noise draws; linear: each probed alone, head: each tested: mean and spread
    controls: list[Literal["pixels", "random", "supervised"]] = field(default_factory=lambda: ["pixels", "random", "supervised"])      # linear, head
    supervised_images: int = 100_000                      # linear, head: images that the supervised control is trained on
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"     # of the network
    batch: int = 500                                      # images per forward pass and process
    seed: int = 0                                         # of noise, k-means, controls
    overwrite: bool = False                               # replace a result of another recipe under this name
    head: Literal["linear", "mlp", "cnn", "attention", "difformer", "diffeed"] = "attention"        # head: what is trained on the activations
    labels_share: float = 1.0                             # head: share of the labels of each class, of training and of validation images
    per_class: int = 0                                    # head: or so many of each class, of both
    width: int = 256                                      # head: channels of cnn, attention, difformer, diffeed (papers: 1024)
    depth: int = 2                                        # head: transformer blocks of attention, difformer, diffeed
    heads: int = 8                                        # head: attention heads of these
    side: int = 16                                        # head: larger maps are averaged to so many positions per side before they become tokens
    grid: int = 2                                         # head: linear and mlp see averages over a grid of g x g
    hidden: list[int] = field(default_factory=lambda: [512])        # head: hidden sizes of mlp
    images: int = 100_000                                 # head: images that every head sees
    head_batch: int = 128                                 # head: images per update
    lr: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])   # head: AdamW, one cycle; selected on the validation part
    l2: list[float] = field(default_factory=lambda: [0.0, 0.05])          # head: weight decay; selected with lr
    flip: bool = False                                    # head: mirror images at random
    crop: int = 0                                         # head: shift images by up to so many pixels
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])     # head: of labelled subset, weights, order, noise
    measured: int = 64                                    # select: images whose maps are measured
    noisy: float = 1.0                                    # select: keep up to so many times the median noise sensitivity of the block outputs at that time
    fine: float = 0.5                                     # select: keep from so many times the median granularity of the block outputs of that map size
    local: float = 1.25                                   # select: keep up to so many times the median locality of the block outputs of that map size


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


def logistic(x, y, classes, l2, iterations=100):
    """Multinomial logistic regression by L-BFGS. x [N, D], y [N] -> weights [D + 1, classes]; l2 on the weights, not the bias."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-5)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ w, y) + 0.5 * l2 * w[:-1].square().sum()
        loss.backward()
        return loss
    opt.step(closure)
    return w.detach()


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
    """Scores that see no label, from two noise draws a, b [N, D] of the same images: (dict of numbers, cluster ids int64 [N] under draw a).

    stability   NMI between k-means of draw a and k-means of draw b, started from a's centroids: clusters that are about the image survive other noise
    silhouette  mean simplified silhouette (distance to own centroid against the next one), cosine
    """
    c, _, _ = kmeans(a, K, metric="cosine", seed=seed)
    ids, other = assign(a, c, "cosine")[0], assign(b, kmeans(b, K, metric="cosine", start=c)[0], "cosine")[0]
    d = (1 - F.normalize(a, dim=1) @ c.T).clamp(min=0).topk(2, 1, largest=False).values                          # [N, 2] own, next
    return dict(stability=nmi(ids.numpy(), other.numpy()), silhouette=float((1 - d[:, 0] / d[:, 1].clamp(min=1e-9)).mean())), ids.numpy()


def consensus(ids):
    """Mean NMI of each clustering with all the others, [n] from int64 [n][N].

    Over the blocks of one network at one noise time, this is high where every depth finds the same groups. It tracks agreement with true
    classes where stability and silhouette do not: those favour little noise, at which clusters are about hue or position and survive anything.
    With ever less noise all blocks see the same image and agree more and more, so of times that agree about equally the noisiest is taken.
    """
    m = np.array([[nmi(a, b) if i < j else 0.0 for j, b in enumerate(ids)] for i, a in enumerate(ids)])
    return (m + m.T).sum(1) / max(len(ids) - 1, 1)


def rank_correlation(a, b):
    """Spearman's rho of two lists."""
    ra, rb = (np.argsort(np.argsort(v)).astype(float) for v in (a, b))
    return float(np.corrcoef(ra, rb)[0, 1])


def heat_map(path, values, rows, columns, title, marks=()):
    """Matrix as PNG with Pillow: values [R][C] (None = blank), captions, `marks` [(row, column, letter)]."""
    cell_w, cell_h, left, top = 62, 18, 8 + 7 * max(map(len, rows)), 46
    sheet = Image.new("RGB", (left + cell_w * len(columns) + 12, top + cell_h * len(rows) + 12), "white")
    pen, flat = ImageDraw.Draw(sheet), [v for r in values for v in r if v is not None]
    lo, hi = min(flat), max(flat)
    pen.text((8, 8), title, "black")
    for c, name in enumerate(columns):
        pen.text((left + c * cell_w + 12, top - 16), name, "black")
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
            pen.text((box[0] + 8, box[1] + 2), f"{v:.3f}{mark}", "white" if q > 0.5 else "black")
    with atomic(path) as f:
        sheet.save(f, "PNG")


def block_outputs(net):
    """Names of the catalogue that are the output of a whole block (between modules, not inside them)."""
    return [n for n in catalogue(net) if n.endswith("-out") and "self" not in n and "ffn" not in n and n != "unet-out"]


def sweep(run, cfg, net, state, context):
    """Score every (activation, t); returns the result dict and draws the heat-map."""
    data = load_data(run, "train")
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
    table, mine = [], cfg.t[run.rank::run.world]

    def read(rows, t, draw_number):                       # {name: [N, D]} for all names from one pass
        parts = {n: [] for n in names}
        for _, out in stream(net, state, data.inputs, rows, names, [t], device=run.device, context=context, seed=cfg.seed, purpose=f"probe {draw_number}",
                             batch=cfg.batch):
            for n in names:
                parts[n].append(out[n, t].cpu())
        return {n: torch.cat(p) for n, p in parts.items()}

    with bar(run, len(mine) * len(names), "sweep", "cell") as progress:
        for t in mine:
            a, b, v = read(fit_rows, t, 0), read(fit_rows, t, 1), read(val_rows, t, 0)
            rows, clusters = [], []
            for n in names:
                mean = a[n].mean(0)                       # centred: activations share a large common direction
                with alone():
                    free, ids = label_free_scores(a[n] - mean, b[n] - mean, K, cfg.seed)
                rows.append(dict(activation=n, **noise_level(state["path"], t), **free))
                clusters.append(ids)
                if known:
                    fa, fv = standardise(a[n], v[n])
                    rows[-1] |= dict(nmi=nmi(ids, y_fit.numpy()), linear=accuracy(ridge(fa, y_fit, count, 1e-3), fv, y_val),
                                     knn=knn(a[n] - mean, y_fit, v[n] - mean, y_val, cfg.neighbours, count))
                progress.update(1)
            table += [r | dict(consensus=float(c)) for r, c in zip(rows, consensus(clusters))]
    table = sorted(itertools.chain(*gather(run, table)), key=lambda r: (names.index(r["activation"]), r["t"]))
    pick = lambda key: {k: max(table, key=lambda r: r[key])[k] for k in ("activation", "t", "rho", "log_snr", key)}
    # the noisiest time at which the blocks still agree about as well as anywhere, and there the block that agrees most
    # (one or two activations have nothing to agree with: then the most stable under new noise)
    best = {t: max(r["consensus"] for r in table if r["t"] == t) for t in cfg.t}
    noisiest = min(t for t in best if best[t] >= 0.97 * max(best.values()))
    chosen = max((r for r in table if r["t"] == noisiest), key=lambda r: r["consensus"]) if len(names) > 2 else max(table, key=lambda r: r["stability"])
    result = dict(protocol="sweep", checkpoint=cfg.checkpoint, hash=state["weights"], seen=state["seen"], K=K, fit=len(fit_rows), validation=len(val_rows),
                  seed=cfg.seed, criterion="consensus of blocks, noisiest time within 3 %" if len(names) > 2 else "stability",
                  label_free={k: chosen[k] for k in ("activation", "t", "rho", "log_snr", "consensus", "stability")})
    if known:
        result |= dict(label_free_scores={k: chosen[k] for k in ("nmi", "knn", "linear")}, oracle={k: pick(k) for k in ("nmi", "knn", "linear")},
                       tracks_nmi={k: rank_correlation([r[k] for r in table], [r["nmi"] for r in table]) for k in ("consensus", "stability", "silhouette")})
    result["table"] = table
    if run.rank == 0:
        shown = "nmi" if known else "consensus"
        grid = [[next((r[shown] for r in table if r["activation"] == n and r["t"] == t), None) for t in sorted(set(cfg.t))] for n in names]
        where = lambda c, m: (names.index(c["activation"]), sorted(set(cfg.t)).index(c["t"]), m)
        marks = [where(result["label_free"], "F")] + ([where(result["oracle"]["nmi"], "O")] if known else [])
        heat_map(run.dir / "probe" / f"{cfg.name}.png", grid, names, [f"t={t:g}" for t in sorted(set(cfg.t))],
                 f"{shown} of k-means (K={K}) by block and time; F = label-free choice" + (", O = best with labels" if known else ""), marks)
    run.say(f"label-free choice: {chosen['activation']} at t={chosen['t']:g} (consensus {chosen['consensus']:.3f})" + (
        f"; NMI {chosen['nmi']:.3f}, linear probe {chosen['linear']:.3f}; with labels one would take {result['oracle']['nmi']['activation']} "
        f"at t={result['oracle']['nmi']['t']:g} (NMI {result['oracle']['nmi']['nmi']:.3f}); rank correlation of consensus with NMI {result['tracks_nmi']['consensus']:.2f}" if known else ""))
    return result


def box_agreement(a, b):
    """Mean IoU of two sets of boxes [N, 4] of the same images, less that of boxes of different images: a box that is always in the same place agrees with nobody."""
    return float(iou(a, b).mean() - iou(a, np.roll(b, 1, 0)).mean())


def boxes(run, cfg, net, state, context):
    """Score every (activation, t) by the boxes found with it (LOST), without labels; returns the result dict and draws the heat-map.

    stability  agreement of the boxes under two noise draws. consensus: mean agreement with the boxes of all other activations and times. Stability alone would
    take the least noise, consensus alone the coarse middle of the network, where boxes are loose: the choice is the greatest sum.
    """
    data = load_data(run, "train")
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
    found = {k: [np.concatenate(v) for v in pair] for some in gather(run, mine) for k, pair in some.items()}
    found = {(n, t): found[n, t] for n in names for t in times if (n, t) in found}
    truth = None if data.boxes is None else np.asarray(data.boxes[rows]).reshape(len(rows), -1, 4)
    mutual, table = np.array([[box_agreement(a[0], b[0]) for b in found.values()] for a in found.values()]), []
    for i, ((name, t), (a, b)) in enumerate(found.items()):
        free = dict(stability=box_agreement(a, b), consensus=float(np.delete(mutual[i], i).mean()))
        table.append(dict(activation=name, **noise_level(state["path"], t), **free, agreement=sum(free.values())))
        if truth is not None:
            table[-1] |= dict(corloc=corloc(a[:, None], truth), iou=float(iou(a[:, None], truth).max(1).mean()))
    chosen = max(table, key=lambda r: r["agreement"])
    result = dict(protocol="boxes", checkpoint=cfg.checkpoint, hash=state["weights"], seen=state["seen"], seed=cfg.seed, images=len(rows), method="lost",
                  criterion="stability + consensus", label_free={k: chosen[k] for k in ("activation", "t", "rho", "log_snr", "agreement", "stability", "consensus")})
    if truth is not None:
        best = max(table, key=lambda r: r["iou"])
        tracks = {k: {s: rank_correlation([r[k] for r in table], [r[s] for r in table]) for s in ("corloc", "iou")} for k in ("agreement", "stability", "consensus")}
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
        f"(CorLoc {best['corloc']:.3f}, IoU {best['iou']:.3f}); rank correlation of agreement with IoU {tracks['agreement']['iou']:.2f}" if truth is not None else ""))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Linear probe and kNN with controls

def train_supervised(run, cfg, state, data, name, classes):
    """A network of the same architecture and size, trained with labels on clean images up to activation `name`: what labels would give."""
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], seed=cfg.seed).to(run.device)
    with tapped(net, [name]) as got:
        size = 0
        try:
            net(torch.zeros(1, state["channels"], state["size"], state["size"], device=run.device), torch.full((1,), 1000.0, device=run.device))
        except _Enough:
            size = got[name].shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(cfg.seed, "supervised head"))
            head = nn.Linear(size, classes).to(run.device)
        context, batch = autocast(run, cfg.precision)[0], 128
        steps = max(1, cfg.supervised_images // batch)
        opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], 1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps + 1)
        train_rows = data["rows"]
        with bar(run, steps, "supervised control", "step") as progress:
            for step in range(steps):
                rows = np.sort(np.random.default_rng(seed_of(cfg.seed, "supervised rows", step)).choice(train_rows, batch))
                x = as_input(torch.from_numpy(np.asarray(data["images"][rows])).to(run.device))
                with context():
                    try:
                        net(x, torch.full((batch,), 1000.0, device=run.device))
                    except _Enough:
                        loss = F.cross_entropy(head(got[name].float().mean((2, 3))).float(), data["y"][rows].to(run.device))
                loss.backward()
                opt.step()
                opt.zero_grad()
                schedule.step()
                progress.update(1)
    return net.eval().requires_grad_(False)


def random_network(run, cfg, state):
    """The same network with random weights."""
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], seed=cfg.seed + 1).to(run.device).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed_of(cfg.seed, "random weights"))
    for p in net.parameters():                            # zero-initialised branches would make it blind
        if not p.any() and p.dim() > 1:
            p.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=g))
    return net


def one_activation(run, cfg, net):
    """The (activation, time) that protocol=linear reads: the label-free choice of a sweep, or what was named."""
    if cfg.activations == ["blocks"]:
        choice = read_json(run.dir / "probe" / f"{cfg.choice}.json", "run probe.py protocol=sweep first, or name activations= and t=")
        if "label_free" not in choice:
            raise UserError(f"choice={cfg.choice}: probe/{cfg.choice}.json is no sweep")
        return choice["label_free"]["activation"], cfg.t[0] if cfg.t else choice["label_free"]["t"]
    names = matching(net, cfg.activations)
    if len(names) != 1 or len(cfg.t) != 1:
        raise UserError(f"protocol=linear reads one activation at one time; got {len(names)} and t={cfg.t}")
    return names[0], cfg.t[0]


def known_classes(run, protocol):
    """Training and test part of the data with their classes as tensors; a missing class is a UserError."""
    parts = [load_data(run, split) for split in ("train", "test")]
    y = [torch.from_numpy(np.array(p.classes)) for p in parts]
    if any((c < 0).any() for c in y):
        raise UserError(f"protocol={protocol} needs the class of every image, and this data lacks some")
    return *parts, *y                                     # two Splits, two int64 [N]


def linear(run, cfg, net, state, context):
    """Linear probe and kNN of one activation: select on the validation part, report the test part once; controls beside it."""
    train, test, y, y_test = known_classes(run, "linear")
    name, t = one_activation(run, cfg, net)
    classes, order = int(y.max()) + 1, np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(len(train))
    val, fit = np.sort(order[:min(cfg.validation, len(order) // 5)]), np.sort(order[min(cfg.validation, len(order) // 5):])

    def read(model, split, d, level):                     # features [N, D] of one noise draw
        images = (train if split == "train" else test).inputs
        parts = [out[name, level].cpu() for _, out in stream(model, state, images, np.arange(len(images)), [name], [level], device=run.device, context=context,
                                                             seed=cfg.seed, purpose=f"linear {split} {d}", batch=cfg.batch)]
        return torch.cat(parts)

    def score(a, b):                                      # a: train features, b: test features -> accuracies and what was selected
        f, v, te = standardise(a[fit], a[val], b)
        best = max((1e-5, 1e-4, 1e-3, 1e-2), key=lambda l2: accuracy(logistic(f, y[fit], classes, l2), v, y[val]))
        k = max((1, 5, 20, 50), key=lambda k: knn(f, y[fit], v, y[val], k, classes))
        return dict(linear=accuracy(logistic(f, y[fit], classes, best), te, y_test), knn=knn(f, y[fit], te, y_test, k, classes), l2=best, k=k)

    rows, tick = {}, time.time()
    sources = {"features": (net, t)}
    if "random" in cfg.controls:
        sources["random weights"] = random_network(run, cfg, state), t
    if "supervised" in cfg.controls:
        sources["supervised, same size"] = train_supervised(run, cfg, state, dict(images=train.inputs, y=y, rows=fit), name, classes), 1.0
    for what, (model, level) in sources.items():
        scores = [score(read(model, "train", d, level), read(model, "test", d, level)) for d in range(cfg.draws if level < 1 else 1)]
        rows[what] = dict(activation=name, t=level, draws=len(scores), **{k: float(np.mean([s[k] for s in scores])) for k in ("linear", "knn")},
                          **{f"{k}_std": float(np.std([s[k] for s in scores])) for k in ("linear", "knn")}, l2=scores[0]["l2"], k=scores[0]["k"])
        run.say(f"{what:24} linear {rows[what]['linear']:.4f} +- {rows[what]['linear_std']:.4f}   kNN {rows[what]['knn']:.4f} +- {rows[what]['knn_std']:.4f}")
    if "pixels" in cfg.controls:
        flat = lambda d: torch.from_numpy(np.ascontiguousarray(d.images)).flatten(1).float() / 127.5 - 1
        rows["raw pixels"] = score(flat(train), flat(test))
        run.say(f"{'raw pixels':24} linear {rows['raw pixels']['linear']:.4f}             kNN {rows['raw pixels']['knn']:.4f}")
    if run.rank == 0:
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[r["linear"], r["knn"]] for r in rows.values()], list(rows), ["linear", "kNN"],
                 f"test accuracy, {name} at t={t:g}")
    return dict(protocol="linear", checkpoint=cfg.checkpoint, hash=state["weights"], seen=state["seen"], seed=cfg.seed, activation=name, t=t,
                parameters_trained="(D + 1) x classes", train_images=len(fit), validation_images=len(val), test_images=len(test), rows=rows, seconds=round(time.time() - tick, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Heads. All are called as head(maps, x_t, t) with maps [T][n] of [B, C, H, W] -> logits [B, classes]

class Single(nn.Sequential):
    """Layers that read one map, the first."""

    def forward(self, maps, *_):
        return super().forward(maps[0][0])


def pooled_head(channels, classes, grid, hidden=()):
    """Linear probe or MLP on averages over a grid (arXiv 2307.08702: 2 x 2), normalised per feature."""
    sizes = [channels * grid ** 2, *hidden, classes]
    layers = [nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.BatchNorm1d(sizes[0], affine=False)]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return Single(*layers[:-1])


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
    """
    if not isinstance(net, UNet):
        raise UserError("head=diffeed: needs a U-Net, whose decoder mirrors its encoder")
    names, down = {id(m): n for n, (m, _) in catalogue(net).items()}, net.input_blocks
    first = [i for i in range(1, len(down)) if i == 1 or down[i - 1][0].resample]
    return [(names[id(net.output_blocks[len(down) - 1 - i][-1])], down[i][-1]) for i in first]


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
        hooks = [m.register_forward_hook(lambda _, args, out, g=f(x): out + g.to(out.dtype)) for m, f, x in zip(targets, self.back, maps[0])]
        try:                                              # the skip connections carry the sums, too
            with context():
                second = look(net, [name], x_t, t)
        finally:
            for h in hooks:
                h.remove()
        return self.head([second])


def look(net, names, x_t, t):
    """Maps [B, C, H, W] of one pass over x_t [B, 3, H, W] at times t [B], with gradients where they are enabled."""
    with tapped(net, names) as got:
        try:
            net(x_t, 1000 * t)
        except _Enough:
            pass
    return [got[n].float() for n in names]


@dataclass
class Reading:
    """A kind of head and what it reads: names x times of a frozen network, maps averaged over noise draws; raw pixels if there is no network."""
    kind: str
    net: nn.Module | None
    names: list
    times: list
    draws: int = 1
    hidden: int = 0                                       # of the transformer's feed-forward parts; 0 = 4 x width

    @property
    def passes(self):                                     # of the network, per image
        return (self.net is not None) * len(self.times) * self.draws * (1 + (self.kind == "diffeed"))

    @torch.no_grad()
    def views(self, path, x, z, context):
        """Images x [B, 3, H, W], noises z, one [B, 3, H, W] per draw -> what heads are called with: maps [T][n] of [B, C, h, w], the last x_t, its t [B]."""
        if self.net is None:
            return [[x]], x, None
        maps, taps = [], [n for n, _ in mirrors(self.net)] if self.kind == "diffeed" else self.names
        for level in self.times:
            t = torch.full((len(x),), level, device=x.device)
            with context():
                parts = [look(self.net, taps, x_t := diffuse(path, x, e, t), t) for e in z]
            maps.append([sum(p) / len(p) for p in zip(*parts)])
        return maps, x_t, t


def build_head(cfg, r, path, size, classes, seed, device="cpu", context=nullcontext):
    """A fresh head for reading `r` of size x size images."""
    x = torch.zeros(1, 3, size, size, device=device)
    shapes, common = [m.shape[1:] for m in r.views(path, x, [x], nullcontext)[0][0]], (classes, cfg.width, cfg.depth, cfg.heads, cfg.side)
    with torch.random.fork_rng(devices=[]):               # module constructors know only the global generator
        torch.manual_seed(seed_of(seed, "head"))
        if r.kind in ("linear", "mlp"):
            h = pooled_head(shapes[0][0], classes, cfg.grid if r.net else size, cfg.hidden if r.kind == "mlp" else ())
        elif r.kind == "cnn":
            h = cnn_head(shapes[0][0], classes, cfg.width)
        elif r.kind == "diffeed":
            with torch.no_grad():
                shape = look(r.net, r.names, x, torch.zeros(1, device=device))[0].shape[1:]
            h = DifFeed(r.net, r.names[0], shapes, shape, *common, context)
        else:
            h = DifFormer(shapes, len(r.times), *common, r.hidden)
    return h.to(device)


def augmented(x, flip, crop, g):
    """Images [B, C, H, W], mirrored at random, shifted by up to `crop` pixels over mirrored edges."""
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g).to(x.device) < 0.5, x.flip(-1), x)
    if crop:
        h, w, at = *x.shape[2:], torch.randint(2 * crop + 1, (len(x), 2), generator=g).tolist()
        x = torch.stack([p[:, i:i + h, j:j + w] for p, (i, j) in zip(F.pad(x, [crop] * 4, mode="reflect"), at)])
    return x


def scaled(images, rows, device):
    """Rows of uint8 images as float [B, C, H, W] in [-1, 1], or means of latents."""
    return as_input(torch.from_numpy(np.ascontiguousarray(images[rows])).to(device))


@torch.no_grad()
def evaluate(heads, r, path, images, y, rows, batch, seed, purpose, device="cpu", context=nullcontext):
    """[(accuracy, -loss)] of each head over `rows`, in eval mode; noise belongs to the image."""
    score = torch.zeros(len(heads), 2)
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        z = [draw(seed, f"{purpose} {d}", part, row_shape(images)).to(device) for d in range(r.draws)]
        seen, target = r.views(path, scaled(images, part, device), z, context), y[part].to(device)
        for j, h in enumerate(heads):
            out = h.eval()(*seen)
            score[j] += torch.stack([(out.argmax(1) == target).sum(), -F.cross_entropy(out, target, reduction="sum")]).cpu()
    return [tuple(s) for s in (score / len(rows)).nan_to_num(nan=-math.inf).tolist()]


def fit_head(cfg, r, path, images, y, fit, val, seed, device="cpu", context=nullcontext, tick=lambda: None):
    """A head for every (lr, l2), trained side by side on the same frozen passes with fresh noise: (the best on rows `val`, its lr and l2, its accuracy there).

    AdamW with one cycle. (2307.08702 and 2311.17921: SGD without momentum, lr 1e-2 or 5e-2, times 0.1 every 7 of 28 epochs.)
    """
    trials, batch = list(itertools.product(cfg.lr, cfg.l2)), min(cfg.head_batch, len(fit))
    steps, heads = max(1, cfg.images // batch), [build_head(cfg, r, path, row_shape(images)[1], int(y.max()) + 1, seed, device, context) for _ in trials]
    opts = [torch.optim.AdamW(h.parameters(), lr, weight_decay=l2) for h, (lr, l2) in zip(heads, trials)]
    plans = [torch.optim.lr_scheduler.OneCycleLR(o, lr, steps + 1) for o, (lr, _) in zip(opts, trials)]
    for step in range(steps):
        rows = np.sort(np.random.default_rng(seed_of(seed, "head rows", step)).choice(fit, batch, replace=False))
        g = torch.Generator().manual_seed(seed_of(seed, "head noise", step))
        x = augmented(scaled(images, rows, device), cfg.flip, cfg.crop, g)
        seen = r.views(path, x, torch.randn(r.draws, *x.shape, generator=g).to(device), context)
        for h, o, p in zip(heads, opts, plans):
            F.cross_entropy(h.train()(*seen), y[rows].to(device)).backward()
            o.step()
            o.zero_grad()
            p.step()
        tick()
    scores = evaluate(heads, r, path, images, y, val, cfg.batch, seed, "head validation", device, context)
    best = max(range(len(trials)), key=lambda i: scores[i])
    return heads[best], trials[best], scores[best][0]


def labelled(y, rows, share, per_class, seed):
    """The rows whose labels may be used: a share of each class, at least one, or so many of each; of one seed, smaller sets lie inside larger ones."""
    rows, keep = np.random.default_rng(seed_of(seed, "labelled rows")).permutation(rows), []
    for k in np.unique(y[rows]):
        of = rows[y[rows] == k]
        if len(of) < per_class:
            raise UserError(f"per_class={per_class}: class {k} has only {len(of)} images to take from")
        keep.append(of[:per_class or max(1, round(share * len(of)))])
    return np.sort(np.concatenate(keep))


def places(run, cfg, net):
    """(names, times) that protocol=head reads."""
    if cfg.activations == ["blocks"]:
        name, t = one_activation(run, cfg, net)
        return [name], cfg.t or [t]
    return matching(net, cfg.activations), cfg.t


def check_head(cfg):
    """UserErrors for impossible settings of protocol=head."""
    require(0 < cfg.labels_share <= 1 and cfg.per_class >= 0 and (cfg.labels_share == 1 or not cfg.per_class), cfg, "labels_share per_class",
            "a share above 0 and up to 1, or a number of images per class, not both")
    require(min(cfg.width, cfg.depth, cfg.heads, cfg.side, cfg.grid, cfg.images, *cfg.hidden) >= 1 and cfg.width % cfg.heads == 0, cfg,
            "width depth heads side grid images hidden", "must be at least 1, and width a multiple of heads")
    require(cfg.lr and cfg.l2 and cfg.seeds and min(cfg.lr) > 0 and min(cfg.l2) >= 0, cfg, "lr l2 seeds", "at least one of each; lr is positive, l2 not negative")
    require(cfg.head != "diffeed" or cfg.precision != "fp16", cfg, "head precision", "gradients go through the network here: use bf16 or fp32")
    require(cfg.head_batch >= 2 and cfg.crop >= 0, cfg, "head_batch crop", "head_batch is at least 2, crop at least 0")


def ridge_ranking(run, cfg, net, state, context, images, y, fit, val, names, times):
    """{(name, t): validation accuracy of a ridge classifier on the pooled activation}."""
    a, b = ([out for _, out in stream(net, state, images, rows, names, times, device=run.device, context=context, seed=cfg.seed, purpose="ranking", batch=cfg.batch)]
            for rows in (fit, val))
    score = {}
    for key in itertools.product(names, times):
        fa, fb = standardise(*(torch.cat([out[key] for out in part]).cpu() for part in (a, b)))
        score[key] = accuracy(ridge(fa, y[fit], int(y.max()) + 1, 1e-3), fb, y[val])
    return score


def readings(run, cfg, net, state, context, names, times, images, y, fit, val):
    """The head that was asked for, and its controls: {what: Reading}, for the seed cfg.seed. A ridge classifier finds the best single place, on rows `val`."""
    path, size, classes, fused = PATHS[state["path"]], state["size"], int(y.max()) + 1, cfg.head in ("difformer", "diffeed")
    count = lambda r: sum(p.numel() for p in build_head(cfg, r, path, size, classes, 0, run.device).parameters())
    score = ridge_ranking(run, cfg, net, state, context, images, y, fit, val, names, times) if len(names) * len(times) > 1 else {(names[0], times[0]): 0}
    name, t = max(score, key=score.get)
    where, plain = (names, times) if cfg.head == "difformer" else ([name], [t]), "attention" if fused else cfg.head
    out = {cfg.head: Reading(cfg.head, net, *where)}
    if fused:
        one, spare = Reading(plain, net, [name], [t]), cfg.depth * (2 * cfg.width + 1)       # spare: parameters of one more hidden unit in every block
        out["best single (block, t)"] = one
        out["equal passes, averaged"] = Reading(plain, net, [name], [t], draws=out[cfg.head].passes)
        out["equal parameters"] = Reading(plain, net, [name], [t], hidden=4 * cfg.width + round((count(out[cfg.head]) - count(one)) / spare))
    if "random" in cfg.controls:
        out["random weights"] = Reading(cfg.head, random_network(run, cfg, state), *where)
    if "supervised" in cfg.controls:
        out["supervised, same size"] = Reading(plain, train_supervised(run, cfg, state, dict(images=images, y=y, rows=fit), name, classes), [name], [1.0])
    if "pixels" in cfg.controls:
        out["raw pixels"] = Reading(plain, None, ["pixels"], [1.0])
    return out


def head(run, cfg, net, state, context):
    """Train heads on the fly: select on the validation part, report the test part once per seed; controls beside it."""
    train, test, y, y_test = known_classes(run, "head")
    names, times = places(run, cfg, net)
    require(times, cfg, "t", "name one or more noise times")
    require(cfg.head != "difformer" or len(names) * len(times) > 1, cfg, "head activations t", "needs more than one activation or time")
    require(cfg.head != "diffeed" or all(n.startswith(("mid", "up")) for n in names) and mirrors(net), cfg, "head activations", "reads the middle or the way up")
    path, order, rows, tick = PATHS[state["path"]], np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(len(train)), {}, time.time()
    held, where = min(cfg.validation, len(order) // 5), dict(device=run.device, context=context)
    for seed in cfg.seeds:
        fit, val = (labelled(y.numpy(), part, cfg.labels_share, cfg.per_class, seed) for part in (order[held:], order[:held]))
        own = replace(cfg, seed=seed)
        for what, r in readings(run, own, net, state, context, names, times, train.inputs, y, fit, val).items():
            with bar(run, max(1, cfg.images // min(cfg.head_batch, len(fit))), f"{what}, seed {seed}", "step") as progress:
                best, (lr, l2), score = fit_head(own, r, path, train.inputs, y, fit, val, seed, tick=lambda: progress.update(1), **where)
            draws = cfg.draws if r.net and r.times != [1.0] else 1               # without noise all draws are equal
            tested = [evaluate([best], r, path, test.inputs, y_test, np.arange(len(test)), cfg.batch, seed, f"head test {d}", **where)[0][0] for d in range(draws)]
            row = rows.setdefault(what, dict(head=r.kind, passes=r.passes, parameters=sum(p.numel() for p in best.parameters()), results=[]))
            row["results"].append(dict(seed=seed, activations=r.names, t=r.times, lr=lr, l2=l2, validation=score, test=tested))
    for what, row in rows.items():
        means = [np.mean(s["test"]) for s in row["results"]]
        row |= dict(accuracy=float(np.mean(means)), std=float(np.std(means)), noise_std=float(np.mean([np.std(s["test"]) for s in row["results"]])))
        run.say(f"{what:24} {row['accuracy']:.4f} +- {row['std']:.4f} over {len(means)} seed(s), +- {row['noise_std']:.4f} over noise; "
                f"{row['parameters']:,} trained parameters, {row['passes']} pass(es) per image")
    if run.rank == 0:
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[r["accuracy"]] for r in rows.values()], list(rows), ["test"], f"test accuracy, {cfg.head} head")
    return dict(protocol="head", checkpoint=cfg.checkpoint, hash=state["weights"], seen=state["seen"], head=cfg.head, seeds=cfg.seeds, fresh_noise=True,
                train_images=len(fit), validation_images=len(val), test_images=len(test), rows=rows, seconds=round(time.time() - tick, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Properties of activations (arXiv 2410.03558 sees them in pictures and defines no number; these are ours) and the selection by them

def noise_sensitivity(a, b):
    """Distance between two noise draws of one image over distance between images; maps a, b [N, C, H, W]: 0 = deterministic, 1 = nothing but noise."""
    return float((a - b).flatten(1).norm(dim=1).mean() / (a - b.roll(1, 0)).flatten(1).norm(dim=1).mean().clamp(min=1e-9))


def granularity(a, size):
    """Length at which the spatial autocorrelation of maps [N, C, H, W], averaged over channels, falls to 1/e, in pixels of the size x size image."""
    a = a - a.mean((0, 2, 3), keepdim=True)
    a, before = a / a.square().mean((0, 2, 3), keepdim=True).sqrt().clamp(min=1e-9), 1.0
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
        a, b = (next(stream(net, state, images, part, names, times, device=device, context=context, pool="none", seed=seed, purpose=f"select {d}"))[1]
                for d in (0, 1))
        for key in a:
            x, z, total = a[key].cpu(), b[key].cpu(), out.setdefault(key, dict(size=a[key].shape[3], sensitivity=0.0, granularity=0.0, locality=0.0))
            for k, v in dict(sensitivity=noise_sensitivity(x, z), granularity=granularity(x, state["size"]), locality=locality(x)).items():
                total[k] += v * len(part) / len(rows)
    return out


def verdicts(table, blocks, noisy, fine, local):
    """The filtering rules of 2410.03558 (section 4) in numbers, at one time. table: {name: properties} in forward order -> {name: why it is dropped, or ""}.

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
        sections = run.sections | dict(extract_features=run.sections.get("extract_features", {}) | chosen | dict(name="select"), probe=chosen)
        with atomic(run.dir / "probe" / f"{cfg.name}.yaml") as f:
            f.write(yaml.safe_dump(sections, sort_keys=False).encode())
        shown, times = [n for n in names if any(r["activation"] == n for r in rest)], sorted(set(cfg.t))
        cell = {(r["activation"], r["t"]): r["linear"] for r in table}
        heat_map(run.dir / "probe" / f"{cfg.name}.png", [[cell[n, t] for t in times] for n in shown], shown, [f"t={t:g}" for t in times],
                 "validation accuracy of a linear probe; activations that pass", [(shown.index(r["activation"]), times.index(r["t"]), "*") for r in best.values()])
    return dict(protocol="select", checkpoint=cfg.checkpoint, hash=state["weights"], seen=state["seen"], seed=cfg.seed, measured=min(cfg.measured, len(fit)),
                chosen=chosen, table=table)


def main():
    """Probe, from the command line."""
    run = start("probe", Probe, __doc__)
    cfg = run.cfg
    cfg.name = cfg.name or cfg.protocol
    net, state = load_model(run, cfg.checkpoint, cfg.weights)
    context, _, why = autocast(run, cfg.precision)
    if cfg.protocol in ("sweep", "boxes", "select") and not cfg.t:
        cfg.t = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    require(all(0 <= t <= 1 for t in cfg.t) and cfg.boxed >= 2 and min(cfg.draws, cfg.batch, cfg.neighbours) >= 1 and cfg.K >= 2,
            cfg, "t boxed draws batch neighbours K", "times lie between 0 and 1, boxed and K are at least 2, the others at least 1")
    path, other = run.dir / "probe" / f"{cfg.name}.json", (HEAD_KEYS if cfg.protocol != "head" else set()) | (SELECT_KEYS if cfg.protocol != "select" else set())
    other |= BOXES_KEYS if cfg.protocol != "boxes" else set()
    recipe = {k: v for k, v in run.sections[run.stage].items() if k not in {"name", "overwrite", "batch"} | other} | dict(hash=state["weights"])
    if cfg.protocol == "linear":
        recipe["reads"] = list(one_activation(run, cfg, net))
    if cfg.protocol == "head":
        check_head(cfg)
        recipe["reads"] = list(places(run, cfg, net))
    if run.dry_run:
        run.say(f"{cfg.protocol} of {state['file']} into {path}")
        return
    if run.agreed(finished(run, path, recipe)):
        return
    result = dict(sweep=sweep, boxes=boxes, linear=linear, head=head, select=select)[cfg.protocol](run, cfg, net, state, context)
    if run.rank == 0:
        write_json(path, result | dict(recipe=recipe))
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

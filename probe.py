"""Probe: how discriminative a model's features are; and, after train_diffusion.py, which block and time the next stages use.

Reads   {diffusion,guided}/<name>/checkpoint.pt and data/{train,test}
Writes  probe/<name>.json and probe/<name>.png
Time    t = 0 is noise, t = 1 is data.

    python probe.py configs/shapes.yaml                                          # protocol=sweep: block x time, CPU, under a minute
    python probe.py configs/cifar10.yaml protocol=linear name=linear             # one GPU: linear probe and kNN of one activation, with controls
    torchrun --nproc_per_node=8 probe.py configs/cifar10.yaml                    # eight GPUs share the times of the sweep

sweep   scores every block x time by NMI of k-means (on the images it clusters), kNN and a linear probe (on a validation part of the training images), and by
        criteria that need no labels; no features are stored. `label_free` is what extract_features.py reads; `oracle`, the choice made with labels, is only
        reported beside it.
linear  trains on the training images outside the validation part, selects on that part, reports the test images once; with raw pixels, the same network with
        random weights and a supervised network of the same size beside it.
"""
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from extract_features import catalogue, matching, noise_level, stream, tapped, _Enough
from self_label import alone, assign, gather, kmeans, nmi
from train_diffusion import (Model, UserError, atomic, autocast, bar, build_model, cli, fill, finished, load_data, load_model, read_json, require, seed_of, start,
                             write_json)


@dataclass
class Probe:
    """Section `probe`."""
    name: str = ""                                        # results go to probe/<name>.json; empty = the protocol
    protocol: Literal["sweep", "linear"] = "sweep"        # sweep = block x time; linear = linear probe and kNN of one activation with controls
    checkpoint: str = "diffusion/base"                    # a folder of the run, or a .pt file
    weights: Literal["ema", "net"] = "ema"                # averaged or raw
    activations: list[str] = field(default_factory=lambda: ["blocks"])    # names and globs; blocks = every block output. linear: default the label-free choice
    t: list[float] = field(default_factory=list)          # noise times; empty = 0.4,0.5,...,0.9 for sweep, the label-free choice for linear
    choice: str = "sweep"                                 # linear: which sweep to take the default activation and time from
    fit: int = 2_000                                      # sweep: training images to fit on
    validation: int = 1_000                               # training images held out for selection
    K: int = 30                                           # sweep: clusters of k-means
    neighbours: int = 20                                  # k of kNN (cosine)
    draws: int = 3                                        # linear: noise draws, each probed alone: mean and spread
    controls: list[Literal["pixels", "random", "supervised"]] = field(default_factory=lambda: ["pixels", "random", "supervised"])      # linear: what to compare with
    supervised_images: int = 100_000                      # linear: images that the supervised control is trained on
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"     # of the network
    batch: int = 500                                      # images per forward pass and process
    seed: int = 0                                         # of noise, k-means, controls
    overwrite: bool = False                               # replace a result of another recipe under this name


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
        for _, out in stream(net, state, data.images, rows, names, [t], device=run.device, context=context, seed=cfg.seed, purpose=f"probe {draw_number}",
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
                x = torch.from_numpy(np.asarray(data["images"][rows])).to(run.device).float() / 127.5 - 1
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


def linear(run, cfg, net, state, context):
    """Linear probe and kNN of one activation: select on the validation part, report the test part once; controls beside it."""
    train, test = load_data(run, "train"), load_data(run, "test")
    y, y_test = torch.from_numpy(np.asarray(train.classes)), torch.from_numpy(np.asarray(test.classes))
    if (y < 0).any() or (y_test < 0).any():
        raise UserError("protocol=linear needs the class of every image, and this data lacks some")
    name, t = one_activation(run, cfg, net)
    classes, order = int(y.max()) + 1, np.random.default_rng(seed_of(cfg.seed, "probe rows")).permutation(len(train))
    val, fit = np.sort(order[:min(cfg.validation, len(order) // 5)]), np.sort(order[min(cfg.validation, len(order) // 5):])

    def read(model, split, d, level):                     # features [N, D] of one noise draw
        images = (train if split == "train" else test).images
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
        fresh = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], seed=cfg.seed + 1)
        sources["random weights"] = fresh.to(run.device).eval().requires_grad_(False), t
        g = torch.Generator().manual_seed(seed_of(cfg.seed, "random weights"))
        for p in sources["random weights"][0].parameters():                      # zero-initialised branches would make it blind
            if not p.any() and p.dim() > 1:
                p.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=g))
    if "supervised" in cfg.controls:
        sources["supervised, same size"] = train_supervised(run, cfg, state, dict(images=train.images, y=y, rows=fit), name, classes), 1.0
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


def main():
    """Probe, from the command line."""
    run = start("probe", Probe, __doc__)
    cfg = run.cfg
    cfg.name = cfg.name or cfg.protocol
    net, state = load_model(run, cfg.checkpoint, cfg.weights)
    context, _, why = autocast(run, cfg.precision)
    if cfg.protocol == "sweep" and not cfg.t:
        cfg.t = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    require(all(0 <= t <= 1 for t in cfg.t) and min(cfg.draws, cfg.batch, cfg.neighbours) >= 1 and cfg.K >= 2,
            cfg, "t draws batch neighbours K", "times lie between 0 and 1, K is at least 2, the others at least 1")
    path = run.dir / "probe" / f"{cfg.name}.json"
    recipe = {k: v for k, v in run.sections[run.stage].items() if k not in ("name", "overwrite", "batch")} | dict(hash=state["weights"])
    if cfg.protocol == "linear":
        recipe["reads"] = list(one_activation(run, cfg, net))
    if run.dry_run:
        run.say(f"{cfg.protocol} of {state['file']} into {path}")
        return
    if run.agreed(finished(run, path, recipe)):
        return
    result = (sweep if cfg.protocol == "sweep" else linear)(run, cfg, net, state, context)
    if run.rank == 0:
        write_json(path, result | dict(recipe=recipe))
    run.wait()
    run.say(f"result in {path}, picture in {path.with_suffix('.png')}")
    if cfg.protocol == "sweep":
        named = ("" if cfg.checkpoint == "diffusion/base" else f" checkpoint={cfg.checkpoint}") + ("" if cfg.name == "sweep" else f" choice={cfg.name}")
        run.next(f"extract_features.py{named}", "extracts the label-free choice")


if __name__ == "__main__":
    cli(main)

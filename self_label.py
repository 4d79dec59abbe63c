"""Label: activations in, self-labels out: each image gets the id of its cluster, on demand also boxes and masks.

Reads   features/<features>/ (extract_features.py); for control labels only data/
Writes  labels/<name>.npz (train int64 [N], test int64 [N'], num_labels, centroids), .json (recipe and scores), .png (contact sheet)
        lost, ncut, masks with a foreground: also boxes_<split> float32 [N, objects, 4] (x0 y0 x1 y1 in pixels, right and bottom exclusive; -1 = none),
        confidence_<split> [N, objects], ids_<split> int64 [N, objects] (cluster of each box, -1 = none);
        lost, ncut, masks: masks_<split> uint8 [N, H, W] (lost, ncut: object 1 ...; masks: cluster 1 ... K of the object; 0 = none; without a foreground: segment id)

    python self_label.py configs/shapes.yaml method=kmeans                       # CPU, seconds
    python self_label.py configs/cifar10.yaml method=sinkhorn K=100              # one GPU
    torchrun --nproc_per_node=8 self_label.py configs/cifar10.yaml               # eight GPUs, the same labels
    python self_label.py configs/shapes.yaml method=random reference=kmeans      # control: the same marginal, nothing about the image
    python self_label.py configs/shapes.yaml method=ncut features=dense objects=2         # boxes; first extract_features.py name=dense pool=none

kmeans      clusters of any size. sinkhorn: clusters of equal size, by optimal transport (arXiv 1911.05371, 2006.09882).
lost, ncut  boxes of objects by patch degrees (arXiv 2109.14279) or normalised cut (2202.11539), and clusters of the boxed regions.
masks       the objects that `foreground` finds, each with the id of its cluster: 0 = none, 1 ... K. foreground=none: clusters of all patches of all images,
            smoothed: every pixel gets one of `segments` ids; image ids then cluster mean features.
controls    classes (ground truth), random (permuted reference labels), subgroups (each class split at random into `groups` parts).
"""
import math
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from configs.data import load_data, load_features, load_labels
from configs.run import (UserError, atomic, cli, create_rows, digest, finished, key, read_json, require, save_grid,
                         seed_of, start, write_json, write_rows)


@dataclass
class SelfLabel:
    """Section `self_label`."""
    name: str = key("", "results go to labels/<name>.npz; empty = the method")
    method: Literal["kmeans", "sinkhorn", "lost", "ncut", "masks", "classes", "random", "subgroups"] = key("kmeans",
        "the last three are controls")
    features: str = key("base", "which features/<features> to cluster")
    K: int = key(100, "clusters")
    metric: Literal["cosine", "euclidean"] = key("cosine", "kmeans: spherical or plain")
    center: bool = key(True, "subtract the mean feature first")
    pca: int = key(0, "keep this many principal components; 0 = all")
    whiten: bool = key(False, "scale principal components to unit variance")
    iterations: int = key(30, "kmeans: at most")
    restarts: int = key(3, "kmeans: keep the best of so many starts")
    batch: int = key(16_384, "kmeans: mini-batch size above `full` rows (at least 4 times K)")
    full: int = key(500_000, "kmeans: up to so many rows, every iteration is a full pass (Lloyd)")
    eps: float = key(0.05, "sinkhorn: entropic regularisation; larger = softer")
    sk_iterations: int = key(20, "sinkhorn: balancing iterations per round")
    rounds: int = key(20, "sinkhorn: alternations of assignment and prototypes")
    objects: int = key(1, "lost, ncut, masks: at most so many boxes per image")
    contrast: float = key(0.5,
                          "the same: a further object differs from the rest (squared) by at least this share of what "
                          "the first does")
    tau: float = key(0.2, "ncut (also as foreground): patches of at least this cosine are joined")
    refine: bool = key(True, "lost, ncut, masks: outline in pixels from upsampled features, not in patches")
    guide: bool = key(True, "lost, ncut, masks: the refined outline follows the edges of the image")
    cells: int = key(4,
                     "lost, ncut, masks: what is clustered is a region's features on a grid of so many cells a side; "
                     "1 = their mean")
    foreground: Literal["lost", "ncut", "none"] = key("lost",
                                                      "masks: what finds the objects; none = cluster all patches")
    segments: int = key(21, "masks with foreground=none: clusters of patches, background included")
    smooth: float = key(0.3, "masks with foreground=none: weight of a patch's 3 x 3 neighbourhood; 0 = none")
    by: Literal["kmeans", "sinkhorn"] = key("kmeans", "lost, ncut, masks: how regions and patches are clustered")
    reference: str = key("kmeans", "random: whose marginal to keep")
    groups: int = key(5, "subgroups: parts per class")
    seed: int = key(0, "of starts, permutations, splits")
    overwrite: bool = key(False, "replace labels that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of features: streamed in chunks, split over ranks. Every rank passes its own slice; sums run over all ranks.

def rows_of(features, rows, metric, device="cpu"):
    """features[rows] as float32 [n, D] on the device, of unit length under the cosine metric. features: tensor or (memory-mapped) array [N, D]."""
    x = features[rows]
    x = torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x
    x = x.to(device).float()                              # in this order fewer bytes cross the bus
    return F.normalize(x, dim=1) if metric == "cosine" else x


_alone = False


@contextmanager
def alone():
    """Within this context a process clusters data of its own, whatever other ranks do."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def together():
    """Whether the rows of all ranks belong together."""
    return dist.is_initialized() and not _alone


def over_ranks(x, op="SUM"):
    """all_reduce in place where there are several ranks; returns x."""
    if together():
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def gather(value):
    """Every rank's value, in order of rank."""
    if not together():
        return [value]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def offsets(n):
    """(first global row of this rank's slice, rows of all slices together)."""
    counts = gather(n)
    return sum(counts[:dist.get_rank()]) if together() else 0, sum(counts)


def pick_rows(features, chosen, metric, device):
    """The rows with global numbers `chosen` (sorted, distinct), [len(chosen), D], equal on every rank however the rows are split."""
    first, _ = offsets(len(features))
    mine = chosen[(chosen >= first) & (chosen < first + len(features))] - first
    return torch.cat(gather(rows_of(features, mine, metric, device).cpu())).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# k-means

def assign(features, centroids, metric="cosine", chunk=4096):
    """Nearest centroid of every row: (ids int64 [N], similarity float32 [N]: cosine, or minus half the squared distance). CPU tensors."""
    c = F.normalize(centroids, dim=1) if metric == "cosine" else centroids
    half, ids, best = 0.5 * c.square().sum(1), [], []
    for i in range(0, len(features), chunk):
        x = rows_of(features, slice(i, i + chunk), metric, c.device)
        v, k = torch.addmm(-half, x, c.T).max(1)                                 # x.c - |c|^2 / 2 orders centroids as the distance does
        ids.append(k.cpu())
        best.append((v + 0.5 if metric == "cosine" else v - 0.5 * x.square().sum(1)).cpu())
    return (torch.cat(ids), torch.cat(best)) if ids else (torch.zeros(0, dtype=torch.long), torch.zeros(0))


def plus_plus(x, K, generator):
    """k-means++ centroids [K, D] from rows x [M, D]: each is drawn with probability proportional to the squared distance to those chosen,
    the best of 2 + ln K candidates (Arthur and Vassilvitskii 2007)."""
    trials, norms = 2 + int(math.log(K)), x.square().sum(1)
    chosen = [int(generator.integers(len(x)))]
    d = (norms + norms[chosen[0]] - 2 * (x @ x[chosen[0]])).clamp(min=0)         # [M]
    for _ in range(1, K):
        mass = d.double().cumsum(0)
        u = torch.from_numpy(generator.random(trials)).to(mass) * mass[-1]
        tries = torch.searchsorted(mass, u).clamp(max=len(x) - 1)
        left = torch.minimum(d, torch.addmm(norms + norms[tries, None], x[tries], x.T, alpha=-2).clamp(min=0))   # [trials, M]
        best = int(left.sum(1).argmin())
        chosen.append(int(tries[best]))
        d = left[best]
    return x[chosen]


def kmeans(features, K, *, metric="cosine", iterations=30, restarts=1, seed=0, batch=0, chunk=4096, start=None, device="cpu"):
    """k-means on stored features: (centroids float32 [K, D], inertia, facts). Rows are streamed; memory never grows with N x K.

    features  tensor or (memory-mapped) array [N, D]; under torch.distributed every rank passes its slice and all get the same centroids
    metric    euclidean (Lloyd), or cosine (spherical k-means: rows and centroids of unit length; inertia is the sum of 2 - 2 cos)
    batch     > 0: mini-batch k-means (Sculley 2010) with so many rows per step, `iterations` passes' worth of steps
    start     centroids to start from instead of k-means++ (on a random subset of at most max(10,000, 20 K) rows)
    Raises UserError for non-finite features or K out of range.
    """
    _, N = offsets(len(features))
    if not 1 <= K <= N:
        raise UserError(f"K={K}: must be between 1 and the {N} rows")
    best = None
    for attempt in range(restarts if start is None else 1):
        generator = np.random.default_rng(seed_of(seed, "k-means", attempt))
        subset = pick_rows(features, np.sort(generator.choice(N, min(N, max(10_000, 20 * K)), replace=False)), metric, device)
        if not torch.isfinite(subset).all():
            raise UserError("features are not finite; extract them again")
        c = plus_plus(subset, K, generator) if start is None else start.to(device, torch.float32).clone()
        if together():
            dist.broadcast(c, 0)                          # equal arithmetic on every rank is likely, but not promised on GPUs
        if batch:
            c = mini_batches(features, c, metric, batch, iterations * math.ceil(N / batch), generator, device)
        result = lloyd(features, c, metric, 1 if batch else iterations, chunk)
        if best is None or result[1] < best[1]:
            best = *result[:2], dict(iterations=result[2], repaired=result[3], restarts=restarts)
    return best


def lloyd(features, c, metric, iterations, chunk):
    """Alternate assignment and means from centroids c [K, D] until no row moves: (centroids, inertia, iterations used, empty clusters repaired).

    The inertia is that of the last assignment to the means it led to, |x|^2 - 2 x.c + |c|^2 summed from the sums that the means need anyway.
    """
    K, repaired, ids, power = len(c), 0, torch.zeros(len(features), dtype=torch.int64, device=c.device), None
    one = torch.ones(min(chunk, len(features)), device=c.device)
    room = torch.empty(min(chunk, len(features)), K, device=c.device)            # fresh memory for every chunk would cost a tenth of the time
    for step in range(1, iterations + 1):
        sums, counts, totals = torch.zeros_like(c), torch.zeros(K, device=c.device), torch.zeros(2, dtype=torch.float64, device=c.device)
        half = 0.5 * c.square().sum(1)
        for i in range(0, len(features), chunk):
            x = rows_of(features, slice(i, i + chunk), metric, c.device)
            score, k = torch.addmm(-half, x, c.T, out=room[:len(x)]), ids[i:i + chunk]           # x.c - |c|^2 / 2 orders centroids as the distance does
            if step > 1 and not x.is_cuda:                # on a CPU the position of a maximum costs far more than its value: only for rows that move
                go = (score.gather(1, k[:, None])[:, 0] < score.amax(1)).nonzero()[:, 0]
                k[go], changed = score[go].argmax(1), len(go)
            else:                                         # a GPU would have to wait to hear which ones those are
                new = score.argmax(1)
                changed = (new != k).sum() if step > 1 else len(x)
                k.copy_(new)
            totals[0] += changed
            if step == 1:
                totals[1] += x.square().sum(dtype=torch.float64)
            sums.index_add_(0, k, x)
            counts += torch.zeros_like(counts).index_add_(0, k, one[:len(x)])    # bincount would make a GPU wait; a float32 cannot count one by one for ever
        over_ranks(sums), over_ranks(counts)
        moved, first = over_ranks(totals).tolist()
        power = first if power is None else power
        if not math.isfinite(power):
            raise UserError("features are not finite; extract them again")
        empty = (counts == 0).nonzero().flatten()
        c = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], c)
        c = F.normalize(c, dim=1) if metric == "cosine" else c
        inertia = power - 2 * float((c * sums).sum(dtype=torch.float64)) + float((counts * c.square().sum(1)).sum(dtype=torch.float64))
        if len(empty) and step < iterations:
            rows = farthest(features, c, len(empty), metric, chunk)              # fewer if the data has fewer distinct rows
            c[empty[:len(rows)]], repaired = rows, repaired + len(rows)
            moved += len(rows)
        if not moved:
            break
    return c, max(inertia, 0.0), step, repaired


def farthest(features, c, n, metric, chunk):
    """Up to n different rows [n', D] that are farthest from their nearest centroid, over all ranks: what empty clusters take over."""
    found = []
    for i in range(0, len(features), chunk):
        x = rows_of(features, slice(i, i + chunk), metric, c.device)
        d = x.square().sum(1) - 2 * torch.addmm(-0.5 * c.square().sum(1), x, c.T).amax(1)        # [n] squared distance
        top = d.topk(min(n, len(d)))
        found.append(torch.cat([top.values[:, None], x[top.indices]], 1))
        if len(found) > 16:
            every = torch.cat(found)
            found = [every[every[:, 0].topk(min(n, len(every))).indices]]
    found = torch.cat(found).cpu() if found else torch.zeros(0, c.shape[1] + 1)
    found = torch.cat(gather(found))
    found = found[found[:, 0].argsort(descending=True, stable=True)]
    found = found[found[:, 0] > 1e-6 * found[:1, 0].abs()][:, 1:]
    keep = np.sort(np.unique(found.numpy(), axis=0, return_index=True)[1])[:n]   # a row twice would leave one cluster empty again
    return found[torch.from_numpy(keep)].to(c.device)


def mini_batches(features, c, metric, batch, steps, generator, device):
    """Mini-batch k-means: each centroid moves towards the mean of its rows in the batch by their share of all rows it has seen."""
    seen, first, N = torch.zeros(len(c), device=device), *offsets(len(features))
    for _ in range(steps):
        chosen = np.unique(generator.integers(N, size=batch))
        x = rows_of(features, chosen[(chosen >= first) & (chosen < first + len(features))] - first, metric, device)
        k = torch.addmm(-0.5 * c.square().sum(1), x, c.T).argmax(1)
        sums, counts = over_ranks(torch.zeros_like(c).index_add_(0, k, x)), over_ranks(torch.bincount(k, minlength=len(c)).float())
        seen += counts
        c = c + (sums - counts[:, None] * c) / seen.clamp(min=1)[:, None]
        c = F.normalize(c, dim=1) if metric == "cosine" else c
    return c


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn-Knopp: assignments Q [N, K] whose rows sum to 1 and whose columns sum to N / K (arXiv 1306.0895; for clustering 1911.05371)

def column_logsumexp(L):
    """ln of the column sums of exp(L) over the rows of all ranks. L: [n, K] -> [K]."""
    local = L.logsumexp(0)
    top = over_ranks(local.clone(), "MAX")
    return top + over_ranks((local - top).exp()).log() if together() else local


def prices(blocks, eps, iterations):
    """Price g [K] of every cluster after so many Sinkhorn iterations; Q = softmax(S / eps - g) then has rows of mass 1 and columns of about N / K.

    An iteration divides every column of Q by its sum (over all ranks), then every row by its sum. In logarithms, Q = exp(S / eps - g - f):
    f is the row's logsumexp, which a softmax supplies, and as sum_i Q_ik = exp(g'_k - g_k) for the next prices g', only g is kept.
    blocks: a function that yields the scores S anew for each pass, in blocks [n, K] that stay in the processor's cache.
    """
    g = column_logsumexp(torch.stack([(S / eps).logsumexp(0) for S in blocks()]))
    for _ in range(iterations - 1):
        mass = over_ranks(sum(torch.softmax(torch.add(-g, S, alpha=1 / eps), 1).sum(0) for S in blocks()))
        g = g + mass.clamp(min=1e-30).log()
    return g


def in_blocks(scores):
    """Scores [N, K] for `prices`, in blocks that stay in a CPU's cache; for a GPU, to which every block is a few short operations, in large ones."""
    return lambda: scores.split(2 ** 16 if scores.is_cuda else 512)


def sinkhorn(scores, eps=0.05, iterations=3):
    """Balanced soft assignments Q [N, K] from scores S [N, K] (cosines), in logarithms and float32, so that small eps stays finite.

    Rows sum to exactly 1, columns to about N / K (exactly before the last rows were normalised).
    """
    scores = scores.float()
    return torch.softmax(scores / eps - prices(in_blocks(scores), eps, iterations), 1)


def sinkhorn_stream(features, c, eps, iterations, chunk=2048):
    """The same for rows that do not fit N x K: (prices g [K], Q-weighted sums of rows [K, D], columns' mass [K])."""
    def rows():                                           # at least one block: a rank may have no rows
        return (rows_of(features, slice(i, i + chunk), "cosine", c.device) for i in range(0, max(len(features), 1), chunk))
    g = prices(lambda: (x @ c.T for x in rows()), eps, iterations)
    sums, mass = torch.zeros_like(c), torch.zeros(len(c), device=c.device)
    for x in rows():
        Q = torch.softmax(torch.add(-g, x @ c.T, alpha=1 / eps), 1)
        mass += Q.sum(0)
        sums.addmm_(Q.T, x)
    return g, over_ranks(sums), over_ranks(mass)


def sinkhorn_cluster(features, K, *, eps=0.05, iterations=20, rounds=20, seed=0, chunk=8192, device="cpu"):
    """Clusters of equal size: (prototypes [K, D] of unit length, prices g [K], facts).

    Starts from spherical k-means and alternates Sinkhorn-Knopp with Q-weighted means. A row, also of other images, belongs to
    argmax_k (s_k / eps - g_k).
    """
    c, _, _ = kmeans(features, K, metric="cosine", iterations=10, seed=seed, device=device)
    for step in range(1, rounds + 1):
        g, sums, mass = sinkhorn_stream(features, c, eps, iterations, chunk)
        new = F.normalize(sums, dim=1)
        shift, c = float((new * c).sum(1).min()), new
        if shift > 1 - 1e-5:                              # every prototype has come to rest
            break
    g, _, mass = sinkhorn_stream(features, c, eps, iterations, chunk)
    return c, g, dict(rounds=step, mass_spread=float(mass.max() / mass.min().clamp(min=1e-12)))


def balanced_assign(features, c, g, eps, chunk=8192):
    """(ids int64 [N], probability float32 [N]) of each row's best cluster under prices g. CPU tensors."""
    out = [torch.softmax(rows_of(features, slice(i, i + chunk), "cosine", c.device) @ c.T / eps - g, 1).max(1) for i in range(0, max(len(features), 1), chunk)]
    return torch.cat([o.indices for o in out]).cpu(), torch.cat([o.values for o in out]).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Scores of labels a [N] against classes b [N]: monitors only

def contingency(a, b):
    """Counts [labels, classes], without empty rows and columns."""
    (_, a), (_, b) = np.unique(a, return_inverse=True), np.unique(b, return_inverse=True)
    return np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1)).reshape(a.max() + 1, b.max() + 1).astype(np.float64)


def entropy(counts):
    """Entropy in nats of counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def mutual_information(t):
    """Mutual information in nats of a contingency table."""
    n = t.sum()
    i, j = np.nonzero(t)
    return max(0.0, float((t[i, j] / n * np.log(t[i, j] * n / (t.sum(1)[i] * t.sum(0)[j]))).sum()))


def nmi(a, b):
    """Normalised mutual information, arithmetic mean of the entropies."""
    t = contingency(a, b)
    mean = (entropy(t.sum(1)) + entropy(t.sum(0))) / 2
    return mutual_information(t) / mean if mean > 0 else 1.0


def ari(a, b):
    """Adjusted Rand index."""
    t = contingency(a, b)
    pairs = lambda v: float((v * (v - 1) / 2).sum())
    same, rows, cols, every = pairs(t), pairs(t.sum(1)), pairs(t.sum(0)), pairs(t.sum(keepdims=True))
    chance, top = rows * cols / every if every else 0.0, (rows + cols) / 2
    return (same - chance) / (top - chance) if top != chance else 1.0


def hungarian_accuracy(a, b):
    """Share of images that are right when labels are matched to classes one to one as well as possible."""
    t = contingency(a, b)
    return float(t[linear_sum_assignment(t, maximize=True)].sum() / t.sum())


def size_entropy(sizes):
    """Entropy of cluster sizes as a share of ln K: 1 = all equal."""
    return entropy(np.asarray(sizes, float)) / math.log(len(sizes)) if len(sizes) > 1 else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Boxes: the object of an image from its patch features, all images of a batch at once. `left` bool [n, P]: patches that no object took yet.

def lost(similarity, left):
    """LOST: (object patches bool [n, P], of which `find_objects` takes the largest component; seed int64 [n]) from cosines [n, P, P]. Objects are smaller than the background: fewer patches resemble theirs."""
    n, P = left.shape
    alike = (similarity >= 0) & left[:, :, None] & left[:, None]
    degree = alike.sum(2, dtype=torch.int32).masked_fill(~left, P + 1)
    seed = degree.argmin(1)
    low = degree <= degree.kthvalue(max(1, P // 7), 1, keepdim=True).values      # the paper's 100 patches, scaled with the grid; all of equal degree count
    similar = (low & alike[torch.arange(n, device=left.device), seed]).float()   # low degree and like the seed
    return (torch.bmm(similar[:, None], similarity)[:, 0] >= 0) & left, seed


def second_eigenvector(A):
    """(second largest eigenvalue [n], its unit eigenvector z [n, P]) of D^-1/2 A D^-1/2 for symmetric A >= 0 [n, P, P], D = diag(row sums).

    y = D^-1/2 z is then the relaxed normalised cut, (D - A) y = (1 - eigenvalue) D y (Shi and Malik 2000). The largest eigenvalue is 1, of
    D^1/2 1: it is moved to the other end. Nodes with empty rows stay 0.
    """
    degree = A.sum(2)                                     # [n, P]
    root = torch.where(degree > 0, degree.clamp(min=1e-30).rsqrt(), 0)
    first = F.normalize(degree.sqrt(), dim=1)
    values, vectors = torch.linalg.eigh(A * root[:, :, None] * root[:, None] - 3 * first[:, :, None] * first[:, None])
    return values[:, -1], vectors[:, :, -1] * (degree > 0)


def ncut(similarity, left, grid, tau=0.2):
    """Normalised cut of the graph that joins patches of cosine >= tau (TokenCut): (object patches bool [n, P], seed int64 [n])."""
    pair = left[:, :, None] & left[:, None]
    A = torch.where(similarity >= tau, 1.0, 0.1 / left.shape[1]) * pair          # a little everywhere tells parts that nothing joins apart (the paper's: 1e-5)
    y = second_eigenvector(A)[1] * A.sum(2).clamp(min=1e-30).rsqrt()
    y = (y - (y * left).sum(1, keepdim=True) / left.sum(1, keepdim=True)) * left
    extreme = lambda v: (v >= 0.99 * v.amax(1, keepdim=True)).float().argmax(1)  # patches that equal but for rounding must not depend on it: the first
    y = y * y.gather(1, extreme(y.abs())[:, None]).sign()                        # the object is the side of the extreme
    corners = [0, grid[1] - 1, -grid[1], -1]
    y = torch.where((y[:, corners] > 0).sum(1, keepdim=True) >= 3, -y, y)        # but no object lies in three corners
    return y > 0, extreme(y)


def largest_component(mask, grid):
    """The largest 4-connected component of bool masks [n, P] on the grid; of equal ones the first. Empty masks stay empty."""
    largest = np.zeros((len(mask), *grid), bool)
    for m, out in zip(mask.view(-1, *grid).cpu().numpy(), largest):
        number, _ = ndimage.label(m)                      # 0 outside, 1, 2, ... for the components
        sizes = np.bincount(number[m])
        if len(sizes):
            out[:] = number == sizes.argmax()
    return torch.from_numpy(largest).view_as(mask).to(mask.device)


def guided_filter(p, image, radius, eps=1e-3):
    """Maps p [n, 1, H, W] smoothed so that their edges become those of image float32 [n, C, H, W] in 0 ... 1.

    In every window of 2 radius + 1 pixels p is fitted by a linear function of the colour (He, Sun and Tang 2010); a pixel takes the mean of its windows' fits.
    """
    mean = lambda v: F.avg_pool2d(v, 2 * radius + 1, 1, radius, count_include_pad=False)                         # of each pixel's window

    (m, q), C = (mean(image), mean(p)), image.shape[1]
    spread = mean((image[:, :, None] * image[:, None]).flatten(1, 2)).unflatten(1, (C, C)) - m[:, :, None] * m[:, None]          # [n, C, C, H, W]
    common = mean(image * p) - m * q                                                                                             # [n, C, H, W]
    a = torch.linalg.solve(spread.permute(0, 3, 4, 1, 2) + eps * torch.eye(C, device=p.device), common.permute(0, 2, 3, 1)[..., None])
    a = a[..., 0].permute(0, 3, 1, 2)
    return (mean(a) * image).sum(1, keepdim=True) + mean(q - (a * m).sum(1, keepdim=True))


def bounds(masks):
    """Smallest boxes float32 [n, 4] around bool masks [n, H, W]: x0 y0 x1 y1, right and bottom exclusive; -1 where there is nothing."""
    cols, rows, (H, W) = masks.any(1).float(), masks.any(2).float(), masks.shape[1:]
    box = torch.stack([cols.argmax(1), rows.argmax(1), W - cols.flip(1).argmax(1), H - rows.flip(1).argmax(1)], 1).float()
    return torch.where(masks.flatten(1).any(1)[:, None], box, -1.0)


def crop(maps, boxes, cells):
    """Features [n, D * cells^2] of maps [n, D, h, w] at the centres of cells x cells cells of boxes [n, 4] (in shares of the image), bilinear."""
    at = (torch.arange(cells, device=maps.device) + 0.5) / cells
    x, y = (2 * (boxes[:, i:i + 1] + at * (boxes[:, i + 2:i + 3] - boxes[:, i:i + 1])) - 1 for i in (0, 1))                      # [n, cells]
    points = torch.stack([x[:, None].expand(-1, cells, -1), y[:, :, None].expand(-1, -1, cells)], 3)
    return F.grid_sample(maps, points, padding_mode="border", align_corners=False).flatten(1)


def find_objects(x, grid, size, method="ncut", objects=1, tau=0.2, contrast=0.5, refine=True, images=None, cells=1):
    """Objects of images from patch features x float32 [n, P, D] on the grid (h, w), size = (H, W) pixels. A dict of

    boxes [n, objects, 4] in pixels, confidence [n, objects] (share of the image's feature variance between object and rest), masks uint8 [n, H, W]
    (0, or 1 + object; the first keeps its pixels), regions [n, objects, D * cells^2] (the box's mean feature, or its features cell by cell). An image without
    contrast has none: boxes -1, the region is the image. An object is one connected region, the largest; further ones are sought among the patches that
    are left, and their mean must lie as far from that of the rest, squared, as `contrast` times the first's.
    With images uint8 [n, 3, H, W] the refined outlines follow their edges.
    """
    n, P, D = x.shape
    mean = lambda of: (of.to(x)[:, None] @ x)[:, 0] / of.sum(1, keepdim=True).clamp(min=1)       # of bool [n, P] -> [n, D]
    spread = (x - mean(torch.ones_like(x[:, :, 0], dtype=torch.bool))[:, None]).square().sum((1, 2))
    first, left, found = None, torch.ones(n, P, dtype=torch.bool, device=x.device), spread > 1e-6 * x.square().sum((1, 2))
    out = dict(boxes=x.new_empty(n, objects, 4), confidence=x.new_zeros(n, objects), regions=x.new_empty(n, objects, D * cells ** 2),
               masks=x.new_zeros(n, *size, dtype=torch.uint8))
    zoom = lambda v, mode: F.interpolate(v.to(x).unflatten(1, (1, *grid)), size, mode=mode)[:, 0]
    for j in range(objects):
        f = F.normalize(x - mean(left)[:, None], dim=2) * left[:, :, None]       # centred per image: else all patches resemble each other
        similarity = torch.bmm(f, f.transpose(1, 2))
        m, _ = lost(similarity, left) if method == "lost" else ncut(similarity, left, grid, tau)
        m = largest_component(m, grid)                    # parts of one cut that do not touch are not one object
        a, b, inside, rest = m.sum(1), (left & ~m).sum(1), mean(m), mean(left & ~m)
        apart = (inside - rest).square().sum(1)
        share, first = a * b / (a + b).clamp(min=1) * apart / spread.clamp(min=1e-30), apart if j == 0 else first
        found = found & (a > 0) & (b > 0) & (apart >= contrast * first * (j > 0))                # by size, halves of a plain ground would be objects
        m = m & found[:, None]
        pixels = zoom(m, "nearest") > 0
        if refine:                                        # nearer to the object's mean than to the rest's: linear in x, so upsampling this upsamples x
            nearer = ((x - (inside + rest)[:, None] / 2) * (inside - rest)[:, None]).sum(2)
            reach = F.max_pool2d(m.to(x).unflatten(1, (1, *grid)), 3, 1, 1).flatten(1)           # up to one patch beyond, but not into other objects
            near = zoom(nearer, "bilinear")
            if images is not None:                        # windows of three patches: an edge of the image within one patch of that of the object is found
                scale = 2 / apart.clamp(min=1e-30)       # -1 = the rest's mean, 1 = the object's
                near = guided_filter((near * scale[:, None, None]).clamp(-1, 1)[:, None], images / 255, max(1, 3 * size[0] // (2 * grid[0])))[:, 0]
            fine = (near > 0) & (zoom((reach > 0) & (m | (nearer <= 0)), "nearest") > 0)
            fine = largest_component(fine.flatten(1), size).unflatten(1, size)   # neighbouring patches may be of objects that do not touch
            pixels = torch.where(fine.flatten(1).any(1)[:, None, None], fine, pixels)
        out["boxes"][:, j], out["confidence"][:, j] = bounds(pixels), share * found
        out["masks"][pixels & (out["masks"] == 0)] = j + 1
        g, box = m.unflatten(1, grid), out["boxes"][:, j] / torch.tensor([size[1], size[0], size[1], size[0]], device=x.device)
        if cells == 1:
            out["regions"][:, j] = mean((g.any(1)[:, None] & g.any(2)[:, :, None]).flatten(1) | ~found[:, None])
        else:
            out["regions"][:, j] = crop(x.transpose(1, 2).unflatten(2, grid), torch.where(found[:, None], box, box.new_tensor([0, 0, 1, 1])), cells)
        left = left & ~m
    return out


def segment(x, grid, size, c, g=None, metric="cosine", eps=0.05, smooth=0.3):
    """Segment ids uint8 [n, H, W] of patch features [n, P, d]: each pixel's best of the centroids c [K, d] (under prices g), by upsampled, smoothed scores."""
    x = rows_of(x.reshape(-1, x.shape[-1]), slice(None), metric if g is None else "cosine", c.device)       # prices belong to cosines
    score = x @ c.T - (0.5 * c.square().sum(1) if g is None else eps * g)        # its argmax is that of `assign` and `balanced_assign`
    score = score.T.reshape(len(c), -1, *grid).transpose(0, 1)                   # [n, K, h, w]
    score = (1 - smooth) * score + smooth * F.avg_pool2d(score, 3, 1, 1, count_include_pad=False)
    return (score if tuple(grid) == tuple(size) else F.interpolate(score, size, mode="bilinear")).argmax(1).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of boxes and masks against the ground truth: monitors only. Boxes with -1 do not exist.

def iou(a, b):
    """Intersection over union of boxes [..., 4], arrays that broadcast."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = sides.clip(0).prod(-1)
    return both / np.maximum((a[..., 2:] - a[..., :2]).clip(0).prod(-1) + (b[..., 2:] - b[..., :2]).clip(0).prod(-1) - both, 1e-9)


def corloc(boxes, truth, threshold=0.5):
    """Share of the images with an object whose first box [N, objects, 4] overlaps a true one [N, M, 4]."""
    known = (truth[..., 2] > truth[..., 0]).any(1)
    return float((iou(boxes[:, :1], truth).max(1) >= threshold)[known].mean()) if known.any() else 0.0


def confusion(masks, truth, chunk=256):
    """Pixels by segment and class [K, C] of uint8 masks [N, H, W] and their truth (255 = void), which are read in chunks."""
    t = np.zeros(256 * 256, np.int64)
    for i in range(0, len(masks), chunk):
        t += np.bincount(256 * masks[i:i + chunk].astype(np.int64).ravel() + truth[i:i + chunk].ravel(), minlength=len(t))
    t = t.reshape(256, 256)[:, :255]
    return t[:t.any(1).nonzero()[0].max(initial=0) + 1, :t.any(0).nonzero()[0].max(initial=0) + 1]


def segmentation_scores(t):
    """Mean IoU over the classes of a table [K, C], segments and classes matched one to one for the largest sum of IoUs, and accuracy of pixels so;
    miou_many: segments of one class count as one, whichever class is their most frequent."""
    union = t.sum(1, keepdims=True) + t.sum(0) - t
    overlap = t / np.maximum(union, 1)
    rows, cols = linear_sum_assignment(overlap, maximize=True)
    many = np.zeros((t.shape[1], t.shape[1]))
    np.add.at(many, t.argmax(1), t)                       # every segment stands for its most frequent class
    merged = many.diagonal() / np.maximum(many.sum(1) + many.sum(0) - many.diagonal(), 1)
    return dict(miou=float(overlap[rows, cols].sum() / max((t.sum(0) > 0).sum(), 1)), pixel_accuracy=float(t[rows, cols].sum() / max(t.sum(), 1)),
                miou_many=float(merged.sum() / max((t.sum(0) > 0).sum(), 1)))


def score_layouts(found, data):
    """Scores of dict(boxes, confidence, masks, segments) of a split where data/ has the truth; masks count objects, segments (or masks alone) bear ids."""
    scores = {}
    if data.boxes is not None and "boxes" in found:
        truth = np.asarray(data.boxes).reshape(len(data.boxes), -1, 4)
        known = (truth[..., 2] > truth[..., 0]).any(1)
        scores = dict(iou=float(iou(found["boxes"][known, :1], truth[known]).max(1).mean()) if known.any() else 0.0, corloc=corloc(found["boxes"], truth))
    if data.masks is not None and data.masks.shape == found["masks"].shape:
        if "boxes" in found:                              # object or not, whichever
            t = confusion(found["masks"], data.masks)
            both, neither, every = t[1:, 1:].sum(), t[0, 0], t.sum()
            scores |= dict(foreground_iou=float(both / max(every - neither, 1)), pixel_accuracy=float((neither + both) / max(every, 1)))
        if "segments" in found or "boxes" not in found:
            scores |= segmentation_scores(confusion(found.get("segments", found["masks"]), data.masks))
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Label files

def score_labels(labels, classes):
    """Agreement of labels [N] with ground-truth classes [N] (-1 = not known): a monitor, never used to make labels."""
    known = classes >= 0
    if not known.any():
        return {}
    a, b = labels[known], classes[known]
    return dict(nmi=nmi(a, b), ari=ari(a, b), hungarian_accuracy=hungarian_accuracy(a, b))


def contact_sheet(path, images, labels, typicality, head, seed, rows=40, columns=8, paint=None):
    """One row per label (at most `rows`, evenly chosen): its most typical members, then random ones; paint(image, i) draws onto image i."""
    ids, tiles, captions = np.unique(labels), [], []
    for k in ids[np.unique(np.linspace(0, len(ids) - 1, min(rows, len(ids))).round().astype(int))]:
        members = np.flatnonzero(labels == k)
        best = members[np.argsort(-typicality[members], kind="stable")[:columns]]
        some = np.random.default_rng(seed_of(seed, "sheet", int(k))).choice(members, min(columns, len(members)), replace=False)
        blank = np.full(images.shape[1:], 255, np.uint8)
        for part in (best, some):
            tiles += [paint(images[i], i) if paint else images[i] for i in part] + [blank] * (columns - len(part))
        captions.append(f"{k}: {len(members)}")
    save_grid(path, np.stack(tiles), 2 * columns, captions, head=head)


def save_labels(run, name, data, labels, K, typical, recipe, arrays, about, seed, more=None, paint=None):
    """labels/<name>.npz, .json and .png from {split: int64 [N]}, by the first process; returns the scores (a monitor, never used for training or selection).

    data: {split: Split}; typical: float [N], how typical a training image is of its label; arrays go into the .npz, about into the .json,
    more to the scores; paint(image, i) draws onto the contact sheet.
    """
    path, sizes = run.dir / "labels" / f"{name}.npz", np.bincount(labels["train"], minlength=K)
    classes = {split: np.asarray(d.classes) for split, d in data.items()}
    scores = dict(size_entropy=size_entropy(sizes), used=int((sizes > 0).sum()), smallest=int(sizes.min()), largest=int(sizes.max()),
                  **score_labels(labels["train"], classes["train"]), **{f"test_{k}": v for k, v in score_labels(labels["test"], classes["test"]).items()},
                  **(more or {}))
    if run.rank == 0:
        with atomic(path) as f:
            np.savez(f, train=labels["train"].astype(np.int64), test=labels["test"].astype(np.int64), num_labels=K, **arrays)
        contact_sheet(path.with_suffix(".png"), data["train"].images, labels["train"], typical,
                      f"{name}: K = {K}; each row a label: most typical, then random members", seed, paint=paint)
        write_json(path.with_suffix(".json"), dict(kind="image", num_labels=K, data={k: d.info["fingerprint"] for k, d in data.items()}, recipe=recipe,
                                                   scores=scores, sizes=sizes.tolist() if K <= 1000 else None, **about))
    run.wait()
    run.say(f"{name}: K = {K}, sizes {scores['smallest']} ... {scores['largest']}, entropy {scores['size_entropy']:.3f} of ln K" + (
        f"; agreement with the classes (monitor): NMI {scores['nmi']:.3f}, ARI {scores['ari']:.3f}, "
        f"accuracy {scores['hungarian_accuracy']:.3f}" if "nmi" in scores else ""))
    run.say(f"labels in {path}, contact sheet {path.with_suffix('.png')}")
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# From feature files to labels

def stored(run, cfg, split, dense=False):
    """(read, (h, w), info): read(i, j) is float32 [n, h * w, D], the activations of images i ... j - 1 side by side, scaled to unit mean norm where there are several.

    h = w = 1, or with dense=True the grid of the largest map, to which the others are resized.
    """
    folder = f"features/{cfg.features}"

    def spread(a, entry):                                 # [N, C, h, w]
        if dense and a.ndim == 2 and info["pool"].isdigit():
            return a.reshape(len(a), -1, int(info["pool"]), int(info["pool"]))
        if a.ndim != (4 if dense else 2):
            raise UserError(f"{folder}: {entry['activation']} " + ("was averaged over space; extract with pool=none or a number" if dense else
                                                                   f"holds maps {list(a.shape[1:])}; extract with pool=mean or a number"))
        return a if dense else a[:, :, None, None]

    arrays, info = load_features(run, cfg.features, split)
    arrays, train = ([spread(a, e) for a, e in zip(x, info["arrays"])] for x in (arrays, load_features(run, cfg.features, "train")[0]))
    grid = max(a.shape[2:] for a in arrays)
    if dense and min(grid) < 2:
        raise UserError(f"{folder}: boxes and masks need at least 2 x 2 positions; extract with pool=none or a larger number")
    few = 1000 if dense else 20_000
    scales = [1 / max(float(np.linalg.norm(a[:few].astype(np.float32), axis=1).mean()), 1e-9) if len(train) > 1 else 1.0 for a in train]

    def read(i, j):
        parts = [torch.from_numpy(a[i:j].astype(np.float32)) for a in arrays]
        if bad := (~torch.stack([torch.isfinite(x).flatten(1).all(1) for x in parts]).all(0)).nonzero().flatten().tolist():
            raise UserError(f"{folder}: row {i + bad[0]} of {split} is not finite; extract again")
        return joined(parts, grid, scales)
    return read, grid, info | dict(scales=scales)


def joined(parts, grid, scales):
    """Maps [n, C_i, h_i, w_i], scaled, side by side on the grid (h, w): [n, h * w, D]."""
    parts = [x if x.shape[2:] == tuple(grid) else F.interpolate(x, tuple(grid), mode="bilinear") for x in parts]
    return torch.cat([x * s for x, s in zip(parts, scales)], 1).flatten(2).transpose(1, 2)


def prepare(run, cfg, folder, what, read, sizes):
    """The features to cluster as float32 memory maps [N * P, d], {split: map}: centred, perhaps projected.

    read: {split: function (i, j) -> float32 [n, P, D]} for images i ... j - 1, of sizes[split] images; P rows (patches, objects) per image.
    Centring comes first because activations share a large common direction, beside which the differences between images hardly turn the
    vectors. The maps are files in `folder`, so that features larger than memory can be clustered; every rank opens the same files.
    """
    files = {split: folder / f"{what}-{split}.npy" for split in read}
    if run.rank == 0:
        P = read["train"](0, 1).shape[1]
        step = max(1, 8192 // P)                          # images at a time
        mean, projection = fit_projection((read["train"](i, i + step).flatten(0, 1) for i in range(0, sizes["train"], step)), cfg.pca, cfg.whiten)
        mean = mean if cfg.center else torch.zeros_like(mean)
        for split, n in sizes.items():
            out = np.lib.format.open_memmap(files[split], "w+", "f4", (n * P, projection.shape[1] if projection is not None else len(mean)))
            for i in range(0, n, step):
                x = read[split](i, i + step).flatten(0, 1) - mean
                out[i * P:i * P + len(x)] = (x @ projection if projection is not None else x).numpy()
            out.flush()
    run.wait()
    return {split: np.load(f, mmap_mode="r") for split, f in files.items()}


def fit_projection(chunks, components, white):
    """Mean [D] and, if asked for, PCA projection [D, d] (whitened: unit variances), from an iterator of float chunks [n, D]."""
    n, total, outer = 0, 0, 0
    for x in chunks:
        x = x.double()
        n, total = n + len(x), total + x.sum(0)
        outer = outer + x.T @ x if components or white else 0
    mean = total / n
    if not components and not white:
        return mean.float(), None
    e, u = torch.linalg.eigh(outer / n - mean[:, None] * mean)
    keep = (e > 1e-9 * e[-1]).nonzero().flatten().flip(0)[:components or None]     # largest first; flat directions carry nothing
    u = u[:, keep] * torch.sign(u[u.abs().argmax(0), torch.arange(len(u))][keep])  # eigenvectors have no sign of their own
    return mean.float(), (u / e[keep].sqrt() if white else u).float()


def fit_clusters(run, cfg, x, method, K):
    """Centroids [K, d] (sinkhorn: and prices [K]) of the rows of a map [N, d], of which every rank takes its slice: (arrays, facts)."""
    n = len(x)
    mine = x[n * run.rank // run.world:n * (run.rank + 1) // run.world]          # a slice, which a memory map does not read
    zero = [int(i) for i in np.flatnonzero(~np.any(x[:100_000], axis=1))[:1]] if cfg.metric == "cosine" or method == "sinkhorn" else []
    if zero:
        raise UserError(f"features/{cfg.features}: row {zero[0]} is all zeros, which has no direction; use metric=euclidean or another activation")
    if run.device.type == "cuda" and 2 * mine.nbytes < torch.cuda.mem_get_info(run.device)[0]:
        mine = torch.from_numpy(np.array(mine)).to(run.device)                   # read often: once over the bus, not at every iteration
    if method == "kmeans":
        c, inertia, facts = kmeans(mine, K, metric=cfg.metric, iterations=cfg.iterations, restarts=cfg.restarts, seed=cfg.seed,
                                   batch=max(cfg.batch, 4 * K) if n > cfg.full else 0, device=run.device)
        return dict(centroids=c.cpu().numpy()), dict(inertia=inertia) | facts
    c, g, facts = sinkhorn_cluster(mine, K, eps=cfg.eps, iterations=cfg.sk_iterations, rounds=cfg.rounds, seed=cfg.seed, device=run.device)
    return dict(centroids=c.cpu().numpy(), prices=g.cpu().numpy()), facts


def cluster(run, cfg, maps, method):
    """Cluster the prepared features: ({split: ids}, typicality of training images, arrays and facts to store)."""
    arrays, facts = fit_clusters(run, cfg, maps["train"], method, cfg.K)
    c, *g = (torch.from_numpy(a).to(run.device) for a in arrays.values())
    out = {split: balanced_assign(x, c, *g, cfg.eps) if g else assign(x, c, cfg.metric) for split, x in maps.items()}
    return {split: ids.numpy() for split, (ids, _) in out.items()}, out["train"][1].numpy(), arrays, facts


def painter(found, all_ids):
    """paint(image uint8 [3, H, W], i): masks as colours (id 0 only with all_ids), boxes as frames."""
    palette = (127.5 + 127.5 * np.cos(2 * np.pi * (0.618 * np.arange(256)[:, None] + np.arange(3) / 3))).astype(np.uint8)       # [256, 3], neighbours differ

    def paint(image, i):
        mask = found["masks"][i]
        image = np.where((mask > 0) | all_ids, image // 2 + palette[mask].transpose(2, 0, 1) // 2, image)
        for k, (x0, y0, x1, y1) in enumerate(found["boxes"][i].astype(int) if "boxes" in found else ()):
            if x1 > x0:
                image[:, [y0, y1 - 1], x0:x1] = image[:, y0:y1, [x0, x1 - 1]] = palette[k + 1][:, None, None]
        return image
    return paint


def layouts(run, cfg, data, folder):
    """Boxes or masks, and image-level labels: ({split: ids}, typicality, arrays, about, scores, paint). Every rank fills its rows of files in `folder`."""
    boxed, sizes = cfg.method != "masks" or cfg.foreground != "none", {split: len(d) for split, d in data.items()}
    method = cfg.foreground if cfg.method == "masks" else cfg.method
    dense = {split: stored(run, cfg, split, dense=True) for split in data}
    (one, grid, info), found, facts = dense["train"], {}, {}
    read, (P, D) = {split: r[0] for split, r in dense.items()}, one(0, 1).shape[1:]
    if not boxed:
        patches = prepare(run, cfg, folder, "patches", read, sizes)
        arrays, facts = fit_clusters(run, cfg, patches["train"], cfg.by, cfg.segments)
        best = {("c" if k == "centroids" else "g"): torch.from_numpy(a).to(run.device) for k, a in arrays.items()}
    for split, d in data.items():
        n, size = len(d), d.images.shape[2:]
        shapes = dict(masks=("u1", (n, *size)), regions=("f4", (n, cfg.objects, D * cfg.cells ** 2) if boxed else (n, 1, D)))
        shapes |= dict(boxes=("f4", (n, cfg.objects, 4)), confidence=("f4", (n, cfg.objects))) if boxed else {}
        files = {k: folder / f"{k}-{split}.npy" for k in shapes}
        if run.rank == 0:
            for k, (dtype, shape) in shapes.items():
                create_rows(files[k], dtype, shape)
        run.wait()
        first, last = n * run.rank // run.world, n * (run.rank + 1) // run.world
        pixels = size[0] * size[1]                        # batches whose tables stay near the cache
        step = max(1, min(2 ** 22 // (P * P), 2 ** 22 // pixels if cfg.guide else 2 ** 22) if boxed else 2 ** 24 // (cfg.segments * pixels))
        for i in range(first, last, step):
            j = min(i + step, last)
            x = read[split](i, j).to(run.device)
            if boxed:
                shown = torch.from_numpy(np.array(d.images[i:j])).to(run.device) if cfg.guide else None
                out = find_objects(x, grid, size, method, cfg.objects, cfg.tau, cfg.contrast, cfg.refine, shown, cfg.cells)
            else:
                rows = torch.from_numpy(np.array(patches[split][i * P:j * P])).view(j - i, P, -1)
                out = dict(masks=segment(rows, grid, size, **best, metric=cfg.metric, eps=cfg.eps, smooth=cfg.smooth), regions=x.mean(1, keepdim=True))
            for k, v in out.items():
                write_rows(files[k], i, v.cpu().numpy())
        run.wait()
        found[split] = {k: np.load(f, mmap_mode="r") for k, f in files.items()}

    # clusters of the regions: a missing object has no id and takes no part, but every image has a first region, if only the whole image
    regions = {split: f["regions"].reshape(-1, f["regions"].shape[2]) for split, f in found.items()}
    rows = {split: np.arange(len(r)) for split, r in regions.items()}
    if boxed:
        rows = {split: np.flatnonzero((v % cfg.objects == 0) | (found[split]["boxes"][..., 0].ravel() >= 0)) for split, v in rows.items()}
    read = {split: lambda i, j, r=r, at=rows[split]: torch.from_numpy(np.array(r[at[i:j]]))[:, None] for split, r in regions.items()}
    some, near, extra, more = cluster(run, cfg, prepare(run, cfg, folder, "rows", read, {split: len(v) for split, v in rows.items()}), cfg.by)
    ids, typical = {split: np.full(len(r), -1) for split, r in regions.items()}, np.zeros(len(regions["train"]))
    typical[rows["train"]] = near
    for split, v in rows.items():
        ids[split][v] = some[split]
    ids = {split: a.reshape(sizes[split], -1) for split, a in ids.items()}
    if boxed and cfg.method == "masks":                   # an object's pixels bear its cluster
        for split, f in found.items():
            table = np.pad(ids[split] + 1, ((0, 0), (1, 0))).astype(np.uint8)
            f["segments"] = np.take_along_axis(table, f["masks"].reshape(sizes[split], -1).astype(np.int64), 1).reshape(f["masks"].shape)
    scores = {("" if split == "train" else "test_") + k: v for split, f in found.items() for k, v in score_layouts(f, data[split]).items()}
    for f in found.values():
        f["masks"] = f.pop("segments", f["masks"])
    if boxed:
        scores |= dict(boxes_per_image=float((found["train"]["boxes"][..., 0] >= 0).sum(1).mean()))
        extra |= {f"ids_{split}": np.where(found[split]["boxes"][..., 0] >= 0, a, -1) for split, a in ids.items()}
    else:
        extra |= {f"segment_{k}": a for k, a in arrays.items()}
    extra |= {f"{k}_{split}": np.asarray(a) for split, f in found.items() for k, a in f.items() if k != "regions"}
    about = more | ({} if boxed else dict(segments=cfg.segments, patches=facts)) | dict(grid=list(grid), scales=info["scales"])
    return {split: a[:, 0] for split, a in ids.items()}, typical.reshape(sizes["train"], -1)[:, 0], extra, about, scores, painter(found["train"], not boxed)


def main():
    """Label, from the command line."""
    run = start("self_label", SelfLabel, __doc__)
    cfg = run.cfg
    cfg.name = run.sections[run.stage]["name"] = cfg.name or cfg.method
    folder = run.dir / "labels"
    path, data = folder / f"{cfg.name}.npz", {split: load_data(run, split) for split in ("train", "test")}
    recipe = {k: v for k, v in run.sections[run.stage].items() if k != "overwrite"} | dict(data={k: d.info["fingerprint"] for k, d in data.items()})
    require(min(cfg.restarts, cfg.rounds, cfg.sk_iterations, cfg.groups, cfg.iterations) >= 1 and cfg.eps > 0 and cfg.pca >= 0,
            cfg, "restarts rounds sk_iterations iterations groups eps pca", "must be positive")
    require(cfg.method != "masks" or cfg.foreground == "none" or cfg.K <= 254, cfg, "method foreground K", "masks hold ids up to 255, so K is at most 254")
    require(1 <= cfg.objects <= 254 and cfg.cells >= 1 and 2 <= cfg.segments <= 255 and 0 <= cfg.smooth <= 1 and -1 <= cfg.tau <= 1 and 0 <= cfg.contrast <= 1,
            cfg, "objects cells segments smooth tau contrast",
            "1 ... 254 objects, at least 1 cell, 2 ... 255 segments, smooth and contrast in 0 ... 1, tau a cosine")
    spatial = cfg.method in ("lost", "ncut", "masks")
    if spatial or cfg.method in ("kmeans", "sinkhorn"):
        stored(run, cfg, "train", spatial)                # complains about features that do not fit before anything is done
        features = load_features(run, cfg.features, "train")[1]
        now = run.dir / features["checkpoint"] / "checkpoint.json"
        if features["weights"] == "ema" and now.exists() and read_json(now, "train it again")["weights"] != features["hash"]:
            run.say(f"note: features/{cfg.features} are of an earlier state of {features['checkpoint']}; extract_features.py with overwrite=true reads the present one")
        recipe["features_hash"] = digest({k: features[k] for k in ("hash", "pool", "draws", "seed", "arrays", "dtype", "resize", "embedding") if k in features})
        if not 1 <= cfg.K <= len(data["train"]):
            raise UserError(f"K={cfg.K}: must be between 1 and the number of training images, {len(data['train'])}")
    if cfg.method == "random":
        reference, there = load_labels(run, cfg.reference)
        recipe["reference_hash"] = digest(*(reference[k] for k in sorted(reference) if np.ndim(reference[k])))
    if run.dry_run:
        run.say(f"{cfg.method} labels of {len(data['train']):,} + {len(data['test']):,} images into {path}")
        return
    if run.agreed(lambda: path.exists() and finished(run, path.with_suffix(".json"), recipe)):
        return

    # labels: from features, or a control that makes the evidence honest
    classes = {split: np.asarray(d.classes) for split, d in data.items()}
    generator, tick, extra, about, more, paint = np.random.default_rng(seed_of(cfg.seed, cfg.method)), time.time(), {}, {}, None, None
    if spatial or cfg.method in ("kmeans", "sinkhorn"):
        aside = folder / f".{cfg.name}.tmp"
        if run.rank == 0:
            aside.mkdir(parents=True, exist_ok=True)
        run.wait()
        try:
            if spatial:
                labels, typical, extra, about, more, paint = layouts(run, cfg, data, aside)
            else:
                read = {split: stored(run, cfg, split)[0] for split in data}
                maps = prepare(run, cfg, aside, "rows", read, {split: len(d) for split, d in data.items()})
                labels, typical, extra, about = cluster(run, cfg, maps, cfg.method)
            run.wait()
        finally:
            if run.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)  # what is mapped stays readable
        about["features"] = {k: features[k] for k in ("checkpoint", "weights", "hash", "pool", "draws", "seed", "arrays")}
        K = cfg.K
    elif cfg.method == "random":                          # a permutation: the same marginal, nothing about the image
        order, K = {split: generator.permutation(len(d)) for split, d in data.items()}, there["num_labels"]
        labels = {split: reference[split][order[split]] for split in data}
        extra = {k: v[order[k.rsplit("_", 1)[1]]] for k, v in reference.items() if k.startswith(("boxes_", "masks_", "ids_", "confidence_"))}
    else:
        if any((c < 0).any() for c in classes.values()):
            raise UserError(f"method={cfg.method} needs the class of every image, and data/ lacks some")
        labels, K = classes, int(max(c.max() for c in classes.values())) + 1
        if cfg.method == "subgroups":                     # each class split at random: tests whether merely more labels help
            labels = {split: c * cfg.groups + generator.integers(cfg.groups, size=len(c)) for split, c in classes.items()}
            K *= cfg.groups
    if cfg.method in ("classes", "random", "subgroups"):
        typical = generator.random(len(labels["train"]))

    # write
    save_labels(run, cfg.name, data, labels, K, typical, recipe, extra, about | dict(seconds=round(time.time() - tick, 2)), cfg.seed, more, paint)
    if more:
        run.say("against the truth (monitor): " + ", ".join(f"{k} {v:.3f}" for k, v in more.items()))
    run.next(f"train_guided.py labels={cfg.name}")


if __name__ == "__main__":
    cli(main)

"""Label: features in, self-labels out. Every image gets the id of its cluster, with some methods also boxes and masks.

Reads   data/, features/<features>/ (extract_features.py); random: labels/<reference>; file: ids
Writes  labels/<name>.npz   train int64 [N], test int64 [N'], num_labels; centroids [K, D], potentials
                            of objects, for each split: boxes_<split> float32 [N, objects, 4] (x0 y0 x1 y1 in pixels,
                            right and bottom exclusive; -1 = none), ids_<split> int64 [N, objects] (cluster of each
                            box; -1 = none), masks_<split> uint8 [N, H, W]
                            of segments: segment_centroids
        labels/<name>.json  recipe, scores, and the hash of the arrays, by which the .npz is known to be its own
        labels/<name>.png   contact sheet

    python self_label.py configs/shapes.yaml method=kmeans                                # CPU, seconds
    torchrun --nproc_per_node=8 self_label.py configs/cifar10.yaml method=sinkhorn K=100  # eight GPUs, same labels
    python self_label.py configs/shapes.yaml method=lost features=dense objects=2         # boxes, of maps (pool=none)

kmeans      clusters of any size
sinkhorn    clusters of about equal size, by optimal transport (arXiv 1911.05371, 2006.09882)
lost        objects by patch degrees (arXiv 2109.14279), and clusters of their regions; masks: 1 + number of the object,
            0 = none
masks       the same objects; masks: 1 + cluster of the object, 0 = none
segments    clusters of all patches; masks: segment of every pixel; an image's id is the cluster of its mean feature
file        ids that anything else found, for comparison: `ids`, one per training image
controls    colours (k-means on mean and deviation of each channel), pixels (on images averaged to pool x pool),
            classes (ground truth), random (permuted labels of `reference`), subgroups (each class split at random)

`METHODS` is the one place where a method is added. Each process holds its share of the rows in memory.
"""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.stats import entropy
from scipy.stats.contingency import crosstab

from configs.data import arrays_hash, load_data, load_features, load_labels, torchvision_datasets
from configs.run import (ALONE, UserError, atomic, chunks, cli, digest, finished, key, locked, read_json, reading,
                         require, save_grid, seed_of, start, unknown, write_json)


@dataclass
class SelfLabel:
    """Section `self_label`."""
    name: str = key("", "results go to labels/<name>.npz; empty = the method")
    method: str = key("kmeans", "where labels come from: see the list above")
    features: str = key("base", "which features/<features> to cluster")
    K: int = key(100, "clusters", low=1)
    metric: Literal["cosine", "euclidean"] = key("cosine", "k-means, in all methods that cluster but sinkhorn: "
                                                           "spherical or plain")
    center: bool = key(True, "subtract the mean feature first")
    iterations: int = key(30, "k-means: at most", low=1)
    restarts: int = key(3, "k-means: keep the best of so many starts", low=1)
    sk_eps: float = key(0.05, "sinkhorn: entropic regularisation; larger = softer", low=1e-4)
    sk_iterations: int = key(20, "sinkhorn: balancing iterations per round", low=1)
    rounds: int = key(20, "sinkhorn: alternations of assignment and prototypes", low=1)
    objects: int = key(1, "lost, masks: at most so many boxes per image", low=1, high=254)
    contrast: float = key(0.5, "lost, masks: share of the first object's distance to the rest (squared) that further "
                               "ones must reach", low=0, high=1)
    refine: bool = key(True, "lost, masks: outline in pixels from upsampled features, along the image's edges, not in "
                             "patches")
    cells: int = key(4, "lost, masks: a region's features are read in so many cells a side", low=1)
    segments: int = key(21, "segments: clusters of patches, background included", low=2, high=255)
    smooth: float = key(0.3, "segments: weight of a patch's 3 x 3 neighbourhood", low=0, high=1)
    pool: int = key(8, "pixels: images are averaged to so many pixels a side", low=1)
    ids: str = key("", "file: .npy of one whole number per training image, in their order")
    reference: str = key("kmeans", "random: whose marginal to keep")
    groups: int = key(5, "subgroups: parts per class", low=1, high=10_000)
    seed: int = key(0, "of starts, permutations, splits")
    overwrite: bool = key(False, "replace labels that another recipe left under this name")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of features [N, D]; over several processes each passes its own share of them.

def rows_of(x, metric, device):
    """Rows as float32 on the device; of unit length under the cosine metric."""
    x = x.to(device).float()
    return F.normalize(x, dim=1) if metric == "cosine" else x


def in_chunks(features, metric, device, chunk=4096):
    """All rows, as `rows_of` gives them, in chunks: so memory does not grow with rows x clusters."""
    return (rows_of(x, metric, device) for x in features.split(chunk))


def assign(features, centroids, metric="cosine", offset=None):
    """Cluster of every row, int64 [N] on the CPU.

    A row x belongs to the centroid c_k with the largest x.c_k - offset_k. offset [K]: None = |c|^2 / 2, so the nearest
    (k-means); eps g for clusters of equal size (Sinkhorn-Knopp).
    """
    offset = centroids.square().sum(1) / 2 if offset is None else offset
    parts = in_chunks(features, metric, centroids.device)
    return torch.cat([torch.addmm(-offset, x, centroids.T).argmax(1).cpu() for x in parts])


# ---------------------------------------------------------------------------------------------------------------------
# k-means

def kmeans(features, K, *, metric="cosine", iterations=30, restarts=1, seed=0, device="cpu", ranks=ALONE):
    """k-means of rows [N, D]: (centroids float32 [K, D], inertia, facts: iterations, repaired clusters).

    metric  euclidean, or cosine: rows and centroids of unit length (spherical k-means)
    ranks   the processes whose shares of the rows belong together; all get the same centroids
    """
    lengths = ranks.gather(len(features))
    N, first = sum(lengths), sum(lengths[:ranks.rank])
    if not 1 <= K <= N:
        raise UserError(f"K={K}: must be between 1 and the {N} rows")
    attempts = []
    for attempt in range(restarts):
        generator = np.random.default_rng(seed_of(seed, "k-means", attempt))
        sample = np.sort(generator.choice(N, min(N, max(10_000, 20 * K)), replace=False))
        here = sample[(sample >= first) & (sample < first + len(features))] - first            # held by this process
        x = torch.cat(ranks.gather(rows_of(features[here], metric, "cpu"))).to(device)
        c = plus_plus(x, K, generator)
        c = ranks.total(c if ranks.rank == 0 else torch.zeros_like(c))           # rank 0's: GPUs round differently
        attempts.append(lloyd(features, c, metric, iterations, ranks))
    return min(attempts, key=lambda attempt: attempt[1])  # least inertia; the first of equal ones


def plus_plus(x, K, generator):
    """k-means++ centroids [K, D] from rows x [M, D] (Arthur and Vassilvitskii 2007).

    Candidates for the next one are 2 + ln K draws, with probability proportional to the squared distance to the nearest
    so far; the one that leaves the least sum of squared distances is taken.
    """
    chosen = [int(generator.integers(len(x)))]
    distance = (x - x[chosen]).square().sum(1)            # [M], squared, to the nearest centroid
    for _ in range(1, K):
        p = np.fmax(distance.double().cpu().numpy(), 1e-30)                      # rows may all be equal
        draws = generator.choice(len(x), 2 + int(math.log(K)), p=p / p.sum())
        after = torch.minimum(distance, torch.cdist(x[draws], x).square())       # [draws, M]
        best = int(after.sum(1).argmin())
        chosen.append(int(draws[best]))
        distance = after[best]
    return x[chosen]


def lloyd(features, c, metric, iterations, ranks):
    """Lloyd's iterations from centroids c [K, D] until the inertia stays: (centroids, their inertia, facts)."""
    before, repaired = math.inf, 0
    for step in range(iterations + 1):
        sums, counts, inertia = sums_of_nearest(features, c, metric, ranks)
        if not math.isfinite(inertia):
            raise UserError("features are not finite; extract them again")
        empty = int((counts == 0).sum())
        settled = inertia >= before * (1 - 1e-6) and not empty                   # an empty cluster is repaired first
        if step == iterations or settled:
            break
        c = torch.where(counts > 0, sums / counts.clamp(min=1), c)
        c = split_largest(c, counts)
        c = F.normalize(c, dim=1) if metric == "cosine" else c
        before, repaired = inertia, repaired + empty
    return c, max(inertia, 0.0), dict(iterations=step, repaired=repaired)


def sums_of_nearest(features, c, metric, ranks):
    """One pass over the rows: (sum [K, D] and count [K, 1] of those nearest to each centroid of c [K, D]; inertia =
    sum |x - c|^2 over all)."""
    half = c.square().sum(1) / 2
    sums = torch.zeros_like(c)
    counts = torch.zeros(len(c), 1, dtype=torch.float64, device=c.device)
    inertia = torch.zeros(1, dtype=torch.float64, device=c.device)
    for x in in_chunks(features, metric, c.device):
        score, ids = torch.addmm(-half, x, c.T).max(1)    # x.c - |c|^2 / 2 is largest where the distance is smallest
        sums.index_add_(0, ids, x)
        counts.index_add_(0, ids, counts.new_ones(len(x), 1))
        lengths = torch.linalg.vector_norm(x, dim=1)
        inertia += (lengths.double().square() - 2 * score.double()).sum()
    return ranks.total(sums), ranks.total(counts).float(), float(ranks.total(inertia))


def split_largest(c, counts):
    """Centroids in which every empty cluster takes half of the largest one, as in faiss: both lie a little apart."""
    c, counts = c.clone(), counts[:, 0].clone()
    apart = 1 + (-1.0) ** torch.arange(c.shape[1], device=c.device) / 1024       # [D]: 1 + 1/1024, 1 - 1/1024, ...
    for k in (counts == 0).nonzero()[:, 0].tolist():
        largest = int(counts.argmax())
        c[k], c[largest] = c[largest] * apart, c[largest] * (2 - apart)
        counts[k] = counts[largest] = counts[largest] / 2
    return c


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn-Knopp: soft assignments Q [N, K] whose rows sum to 1 and whose columns sum to N / K (arXiv 1306.0895; of
# clusters 1911.05371)

def potentials(blocks, eps, iterations, ranks=ALONE):
    """Dual potentials g [K] with which the columns of Q = softmax(S / eps - g) have about equal mass.

    The first iteration gives g_k = ln sum_i exp(S_ik / eps), each further one g_k <- g_k + ln mass_k, mass_k = sum_i
    Q_ik: a column that holds too much is lowered (to subtract ln(N / K), the wanted mass, would shift all g alike,
    which softmax ignores). blocks() yields the scores S anew for each pass, in blocks [n, K]: never held as a whole.
    """
    local = torch.stack([(S / eps).logsumexp(0) for S in blocks()]).logsumexp(0)
    every = local.new_zeros(ranks.world, len(local))
    every[ranks.rank] = local
    g = ranks.total(every).logsumexp(0)                   # over the samples of all processes
    for _ in range(iterations - 1):                       # torch.add(...) = S / eps - g in one operation
        mass = sum(torch.softmax(torch.add(-g, S, alpha=1 / eps), 1).sum(0) for S in blocks())
        g = g + ranks.total(mass).clamp(min=1e-30).log()
    return g


def sinkhorn(scores, eps=0.05, iterations=3, ranks=ALONE):
    """Balanced assignments Q [N, K] from scores S [N, K] (cosines). Rows sum to exactly 1, columns to about N / K."""
    scores, rows = scores.float(), 2 ** 16 if scores.is_cuda else 512            # blocks that stay in a CPU's cache
    return torch.softmax(scores / eps - potentials(lambda: scores.split(rows), eps, iterations, ranks), 1)


def balanced_sums(features, c, eps, iterations, chunk=8192, ranks=ALONE):
    """As `sinkhorn`, Q never held: (potentials g [K], Q-weighted sums of rows [K, D], mass of each column [K])."""
    chunks = partial(in_chunks, features, "cosine", c.device, chunk)
    g = potentials(lambda: (x @ c.T for x in chunks()), eps, iterations, ranks)
    sums = torch.zeros_like(c)
    mass = c.new_zeros(len(c))
    for x in chunks():
        Q = torch.softmax(x @ c.T / eps - g, 1)           # [n, K]
        mass += Q.sum(0)
        sums.addmm_(Q.T, x)
    return g, ranks.total(sums), ranks.total(mass)


def sinkhorn_cluster(features, K, *, eps=0.05, iterations=20, rounds=20, seed=0, device="cpu", ranks=ALONE):
    """Clusters of equal size: (prototypes c [K, D] of unit length, potentials g [K], facts: rounds, max / min mass).

    Starts from spherical k-means; alternates Sinkhorn-Knopp with Q-weighted means. A row x, also of other images,
    belongs to argmax_k (x.c_k / eps - g_k).
    """
    c, _, _ = kmeans(features, K, metric="cosine", iterations=10, seed=seed, device=device, ranks=ranks)
    for step in range(1, rounds + 1):
        _, sums, _ = balanced_sums(features, c, eps, iterations, ranks=ranks)
        before, c = c, F.normalize(sums, dim=1)
        if float((before * c).sum(1).min()) > 1 - 1e-5:   # every prototype has come to rest
            break
    g, _, mass = balanced_sums(features, c, eps, iterations, ranks=ranks)        # of the last c
    return c, g, dict(rounds=step, mass_spread=float(mass.max() / mass.min().clamp(min=1e-12)))


# ---------------------------------------------------------------------------------------------------------------------
# Objects of an image from its patch features x float32 [n, P, D] on a grid (h, w), P = h w; all images of a batch at
# once. `left` bool [n, P]: patches that no object has taken yet.

def find_objects(x, grid, size, objects=1, contrast=0.5, refine=True, images=None, cells=1):
    """Objects of images of size = (H, W) pixels, as a dict:

    boxes    [n, objects, 4], in pixels; -1 where there is none
    masks    uint8 [n, H, W]: 1 + object, 0 = none; an earlier object keeps its pixels
    regions  [n, objects, D * cells^2]: features of the object (of the image where there is none)

    An object is one connected region. A further one is sought among the patches that are left, and its mean must lie as
    far from theirs, squared, as `contrast` times the first's. A plain image has none. With images uint8 [n, 3, H, W]
    the refined outlines follow their edges.
    """
    n, P, D = x.shape
    left = torch.ones(n, P, dtype=torch.bool, device=x.device)
    spread = (x - mean_over(x, left)[:, None]).square().sum((1, 2))
    exists = spread > 1e-6 * x.square().sum((1, 2))
    boxes, regions, masks = [], [], x.new_zeros(n, *size, dtype=torch.uint8)
    for j in range(objects):
        patches = cut(x, left, grid)
        others = left & ~patches
        mean_inside, mean_rest = mean_over(x, patches), mean_over(x, others)
        apart = (mean_inside - mean_rest).square().sum(1)
        if j == 0:
            first = apart                                 # the measure for further objects
        exists = exists & patches.any(1) & others.any(1) & (apart >= contrast * first)
        patches = patches & exists[:, None]
        pixels = enlarge(patches, grid, size, "nearest") > 0
        if refine:
            fine = outline(x, patches, mean_inside, mean_rest, grid, size, images)
            pixels = torch.where(fine.flatten(1).any(1)[:, None, None], fine, pixels)
        boxes.append(bounds(pixels))
        regions.append(region(x, boxes[-1], grid, size, cells))
        masks[pixels & (masks == 0)] = j + 1
        left = left & ~patches
    return dict(boxes=torch.stack(boxes, 1), masks=masks, regions=torch.stack(regions, 1))


def mean_over(x, patches):
    """Mean feature [n, D] of x [n, P, D] over patches bool [n, P]; 0 where there are none."""
    return (patches.to(x)[:, None] @ x)[:, 0] / patches.sum(1, keepdim=True).clamp(min=1)


def enlarge(v, grid, size, mode):
    """Values of patches [n, P] as maps [n, H, W]."""
    return F.interpolate(v.float().unflatten(1, (1, *grid)), size, mode=mode)[:, 0]


def cut(x, left, grid):
    """Patches bool [n, P] of one object among those that are left, by LOST: one connected region."""
    f = F.normalize(x - mean_over(x, left)[:, None], dim=2) * left[:, :, None]   # centred: else all patches are alike
    similarity = torch.bmm(f, f.transpose(1, 2))          # cosines [n, P, P]
    return largest_component(lost(similarity, left), grid)                       # what does not touch is not one object


def lost(similarity, left):
    """LOST: object patches bool [n, P] from cosines [n, P, P].

    Objects are smaller than the background, so fewer patches resemble theirs: the seed has the lowest degree. The
    object is what resembles, on average, the patches of low degree that resemble the seed. Of its parts `cut` keeps the
    largest (the paper: the one with the seed).
    """
    n, P = left.shape
    alike = (similarity >= 0) & left[:, :, None] & left[:, None]
    degree = alike.sum(2, dtype=torch.int32).masked_fill(~left, P + 1)
    seed = degree.argmin(1)
    few = max(1, P // 7)                                  # the paper's 100 patches, scaled with the grid
    low = degree <= degree.kthvalue(few, 1, keepdim=True).values                 # and all others of equal degree
    similar = (low & alike[torch.arange(n, device=left.device), seed]).float()
    return (torch.bmm(similar[:, None], similarity)[:, 0] >= 0) & left


def largest_component(mask, grid):
    """The largest 4-connected component of bool masks [n, P] on the grid; of equal ones the first; none of none."""
    largest = np.zeros((len(mask), *grid), bool)
    for m, out in zip(mask.view(-1, *grid).cpu().numpy(), largest):
        number, _ = ndimage.label(m)                      # 0 outside, 1, 2, ... for the components
        sizes = np.bincount(number[m])
        if len(sizes):
            out[:] = number == sizes.argmax()
    return torch.from_numpy(largest).view_as(mask).to(mask.device)


def outline(x, patches, mean_inside, mean_rest, grid, size, images=None):
    """Pixels bool [n, H, W] of the object in these patches [n, P]: those nearer to its mean feature than to the rest's.

    The two means are [n, D]. The difference of distances is linear in x, so upsampling it upsamples x.
    """
    n, gap = len(x), mean_inside - mean_rest
    nearer = ((x - (mean_inside + mean_rest)[:, None] / 2) * gap[:, None]).sum(2)                    # [n, P]
    near = enlarge(nearer, grid, size, "bilinear")
    if images is not None:
        scale = 2 / gap.square().sum(1).clamp(min=1e-30)
        near = (near * scale[:, None, None]).clamp(-1, 1)                        # -1 = rest's mean, 1 = object's
        # windows of three patches: they find an edge of the image within one patch of the object's
        radius = max(1, 3 * size[0] // (2 * grid[0]))
        near = guided_filter(near[:, None], images / 255, radius)[:, 0]
    # the object and the ring of patches around it, but none that resembles the object: that is another part
    reach = F.max_pool2d(patches.to(x).unflatten(1, (1, *grid)), 3, 1, 1).flatten(1) > 0
    allowed = enlarge(reach & (patches | (nearer <= 0)), grid, size, "nearest") > 0
    return largest_component(((near > 0) & allowed).flatten(1), size).view(n, *size)


def guided_filter(p, image, radius, eps=1e-3):
    """Maps p [n, 1, H, W], smoothed so that their edges become those of image float32 [n, C, H, W] in 0 ... 1.

    In every window of 2 radius + 1 pixels p is fitted by a linear function of the colour, p = a.I + b; a pixel takes
    the mean of its windows' fits (He, Sun and Tang 2010).
    """
    def mean(v):                                          # of each pixel's window
        return F.avg_pool2d(v, 2 * radius + 1, 1, radius, count_include_pad=False)

    C = image.shape[1]
    m, q = mean(image), mean(p)
    square = mean((image[:, :, None] * image[:, None]).flatten(1, 2)).unflatten(1, (C, C))           # [n, C, C, H, W]
    spread = square - m[:, :, None] * m[:, None]
    common = mean(image * p) - m * q                      # [n, C, H, W]
    regularised = spread.permute(0, 3, 4, 1, 2) + eps * torch.eye(C, device=p.device)
    a = torch.linalg.solve(regularised, common.permute(0, 2, 3, 1)[..., None])
    a = a[..., 0].permute(0, 3, 1, 2)                     # [n, C, H, W]
    b = q - (a * m).sum(1, keepdim=True)
    return (mean(a) * image).sum(1, keepdim=True) + mean(b)


def bounds(masks):
    """Smallest boxes float32 [n, 4] around masks bool [n, H, W]: x0 y0 x1 y1, right and bottom exclusive; -1 = none."""
    H, W = masks.shape[1:]
    cols, rows = masks.any(1).float(), masks.any(2).float()
    x0, x1 = cols.argmax(1), W - cols.flip(1).argmax(1)
    y0, y1 = rows.argmax(1), H - rows.flip(1).argmax(1)
    box = torch.stack([x0, y0, x1, y1], 1).float()
    return torch.where(masks.flatten(1).any(1)[:, None], box, -1.0)


def filled(boxes, size):
    """Pixels whose centre is in boxes [..., 4] (x0 y0 x1 y1, negative = none): bool [..., size, size]."""
    centre = np.arange(size) + 0.5
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes, np.float32), -1, 0)[..., None]                # [..., 1] each
    rows, columns = (centre >= y0) & (centre < y1), (centre >= x0) & (centre < x1)
    return rows[..., None] & columns[..., None, :]


def region(x, boxes, grid, size, cells):
    """Features [n, D * cells^2] of x [n, P, D] in the middles of cells x cells cells of boxes [n, 4], bilinear.

    Boxes are in pixels; where there is none, the image is the box.
    """
    shares = boxes / torch.tensor([size[1], size[0], size[1], size[0]], device=x.device)
    shares = torch.where(boxes[:, :1] < 0, shares.new_tensor([0, 0, 1, 1]), shares)
    corner, side = shares[:, :2, None], shares[:, 2:, None] - shares[:, :2, None]
    at = (torch.arange(cells, device=x.device) + 0.5) / cells
    across, down = (2 * (corner + at * side) - 1).unbind(1)                      # [n, cells] each, in -1 ... 1
    points = torch.stack([across[:, None].expand(-1, cells, -1), down[:, :, None].expand(-1, -1, cells)], 3)
    maps = x.transpose(1, 2).unflatten(2, grid)
    return F.grid_sample(maps, points, padding_mode="border", align_corners=False).flatten(1)


def segment(x, grid, size, centroids, metric="cosine", offset=None, smooth=0.3):
    """Segments uint8 [n, H, W] of patch features [n, P, D]: each pixel's cluster, as in `assign`, by upsampled scores.

    smooth: weight of the mean over a patch's 3 x 3 neighbourhood in its scores.
    """
    rows = rows_of(x.flatten(0, 1), metric, centroids.device)
    offset = centroids.square().sum(1) / 2 if offset is None else offset
    score = (rows @ centroids.T - offset).T.reshape(len(centroids), -1, *grid).transpose(0, 1)       # [n, K, h, w]
    score = (1 - smooth) * score + smooth * F.avg_pool2d(score, 3, 1, 1, count_include_pad=False)
    if tuple(grid) != tuple(size):
        score = F.interpolate(score, size, mode="bilinear")
    return score.argmax(1).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# From files of features to rows that can be clustered

def open_features(run, name, split, dense=False):
    """(read, about) of features/<name>: read(rows) is float32 [n, h * w, D], all activations side by side.

    about: grid (h, w), with dense=True that of the largest map, else h = w = 1; scales, which give several activations
    unit mean norm over some training images.
    """
    arrays, info = load_features(run, name, split)
    pool = info["pool"]
    if pool == ("mean" if dense else "none"):
        raise UserError(f"features/{name}: pool={pool} does not fit this method; extract with "
                        f"pool={'none' if dense else 'mean'} or a number")

    def as_maps(a):                                       # [N, C, h, w]
        side = int(pool) if dense and pool != "none" else 1
        return a if a.ndim == 4 else a.reshape(len(a), -1, side, side)

    def scale(a):
        rows = np.linspace(0, len(a) - 1, min(len(a), 1000 if dense else 20_000)).astype(int)    # folders are sorted
        few = as_maps(a)[rows].astype(np.float32)
        return 1 / max(float(np.linalg.norm(few, axis=1).mean()), 1e-9)

    maps = [as_maps(a) for a in arrays]
    grid = max(a.shape[2:] for a in maps)
    if dense and math.prod(grid) == 1:
        raise UserError(f"features/{name}: one position per image, nowhere to look for objects; extract maps")
    scales = [scale(a) for a in load_features(run, name, "train")[0]] if len(maps) > 1 else [1.0]

    def read(rows):
        parts = [torch.from_numpy(a[rows].astype(np.float32)) for a in maps]     # [n, C_i, h_i, w_i]
        parts = [x if x.shape[2:] == grid else F.interpolate(x, grid, mode="bilinear") for x in parts]
        return torch.cat([x * s for x, s in zip(parts, scales)], 1).flatten(2).transpose(1, 2)     # [n, h * w, D]
    return read, dict(grid=grid, scales=scales)


def gathered(run, x):
    """A tensor's rows of all processes, as one array."""
    return np.concatenate(run.gather(x.cpu().numpy()))


def centred(run, cfg, rows):
    """Rows {split: float32 [n, D]} of this process, less the mean of all training rows.

    Activations share a large direction, beside which differences between images hardly count.
    """
    if not cfg.center:
        return rows
    n = run.total(torch.tensor([len(rows["train"])]))
    mean = (run.total(rows["train"].sum(0, dtype=torch.float64)) / n).float()
    return {split: x - mean for split, x in rows.items()}


def fit_clusters(run, cfg, x, K):
    """K clusters of rows [N, d], of which every process has its share, by k-means or Sinkhorn-Knopp.

    Returns ((centroids [K, d], metric, offset [K]) for `assign`, arrays for the label file, facts for it).
    """
    if run.device.type == "cuda" and 2 * x.nbytes < torch.cuda.mem_get_info(run.device)[0]:
        x = x.to(run.device)                              # once over the bus, not in every pass
    how = dict(seed=cfg.seed, device=run.device, ranks=run)
    if cfg.method == "sinkhorn":
        c, g, facts = sinkhorn_cluster(x, K, eps=cfg.sk_eps, iterations=cfg.sk_iterations, rounds=cfg.rounds, **how)
        return (c, "cosine", cfg.sk_eps * g), dict(centroids=c.cpu().numpy(), potentials=g.cpu().numpy()), facts
    c, inertia, facts = kmeans(x, K, metric=cfg.metric, iterations=cfg.iterations, restarts=cfg.restarts, **how)
    return (c, cfg.metric, None), dict(centroids=c.cpu().numpy()), dict(inertia=inertia) | facts


# ---------------------------------------------------------------------------------------------------------------------
# Methods: every one a function (run, cfg, data) -> Labels. data: {split: Split}

@dataclass
class Labels:
    """Labels of all images of each split, on every process alike (see `gathered`), and what is stored with them."""
    ids: dict                                             # {split: int64 [N]}, below K
    K: int
    arrays: dict = dataclasses.field(default_factory=dict)                       # more for the .npz
    about: dict = dataclasses.field(default_factory=dict)                        # more for the .json
    scores: dict = dataclasses.field(default_factory=dict)                       # monitors besides those of the ids


def cluster(run, cfg, rows):
    """Labels of rows {split: float32 [n, D]} of this process: their clusters."""
    rows = centred(run, cfg, rows)
    clusters, arrays, facts = fit_clusters(run, cfg, rows["train"], cfg.K)       # clusters: centroids, metric, offset
    return Labels({split: gathered(run, assign(x, *clusters)) for split, x in rows.items()}, cfg.K, arrays, facts)


def cluster_features(run, cfg, data):
    """kmeans, sinkhorn: clusters of stored features."""
    rows = {}                                             # of this process's images, {split: float32 [n, D]}
    for split, d in data.items():
        read, _ = open_features(run, cfg.features, split)
        rows[split] = read(run.share(len(d))).flatten(0, 1)
    return cluster(run, cfg, rows)


def cluster_images(run, cfg, data, numbers):
    """Control: k-means on numbers(x) [n, D] of images x float32 [n, 3, H, W] in 0 ... 1."""
    rows = {}
    for split, d in data.items():
        parts = [numbers(torch.from_numpy(d.images[part]).float() / 255) for part in chunks(run.share(len(d)), 1024)]
        rows[split] = torch.cat(parts)
    return cluster(run, cfg, rows)


def colours(run, cfg, data):
    """Control without a network and without positions: mean and standard deviation of every channel."""
    return cluster_images(run, cfg, data, lambda x: torch.cat([x.mean((2, 3)), x.std((2, 3))], 1))


def pixels(run, cfg, data):
    """Control without a network, with positions: images averaged to pool x pool pixels."""
    require(cfg.pool <= run.data.size, cfg, "pool", f"images have {run.data.size} pixels a side")
    return cluster_images(run, cfg, data, lambda x: F.adaptive_avg_pool2d(x, cfg.pool).flatten(1))


def search(run, cfg, split, images):
    """Objects of images [N, 3, H, W] by `find_objects`: (layout, regions, about).

    layout: boxes [N, objects, 4], masks [N, H, W], has_region bool [N, objects]. regions [n, D] are those of this
    process's images; about is that of `open_features`.
    """
    read, about = open_features(run, cfg.features, split, dense=True)
    size, P, parts = images.shape[2:], math.prod(about["grid"]), []
    step = max(1, 2 ** 22 // max(P * P, math.prod(size)))                        # tables stay near the cache
    for rows in chunks(run.share(len(images)), step):
        found = find_objects(read(rows).to(run.device), about["grid"], size, cfg.objects, cfg.contrast, cfg.refine,
                             torch.from_numpy(images[rows]).to(run.device), cfg.cells)
        parts.append([found[k].cpu() for k in ("boxes", "masks", "regions")])
    boxes, masks, regions = map(torch.cat, zip(*parts))
    has_region = boxes[..., 0] >= 0
    has_region[:, 0] = True                               # every image has a first region, if only the whole image
    return [gathered(run, v) for v in (boxes, masks, has_region)], regions[has_region], about


def label_objects(run, cfg, data):
    """lost, masks: objects, each with the cluster of its region's features; an image bears that of its first."""
    require(cfg.method != "masks" or cfg.K <= 254, cfg, "method K", "masks hold ids up to 255, so K is at most 254")
    layouts, regions = {}, {}
    for split, d in data.items():
        layouts[split], regions[split], about = search(run, cfg, split, d.images)
    out = cluster(run, cfg, regions)
    out.about |= about
    clustered = cfg.method == "masks"
    for split, d in data.items():
        boxes, masks, has_region = layouts[split]
        ids = np.full(has_region.shape, -1)
        ids[has_region] = out.ids[split]
        out.ids[split] = ids[:, 0]
        ids = np.where(boxes[..., 0] >= 0, ids, -1)
        if clustered:                                     # 1 + the object's cluster, in place of 1 + the object
            table = np.pad(ids + 1, ((0, 0), (1, 0))).astype(np.uint8)           # [N, 1 + objects]
            masks = np.take_along_axis(table, masks.reshape(len(masks), -1).astype(np.int64), 1).reshape(masks.shape)
        out.scores |= score_layouts(split, d, masks, boxes, clustered)
        out.arrays |= {f"boxes_{split}": boxes, f"masks_{split}": masks, f"ids_{split}": ids}
    return out


def label_segments(run, cfg, data):
    """segments: clusters of the patches of all images; an image bears the cluster of its mean."""
    patches, means = {}, {}
    for split, d in data.items():
        read, about = open_features(run, cfg.features, split, dense=True)
        x = read(run.share(len(d)))                       # [n, P, D]
        patches[split], means[split] = x.flatten(0, 1), x.mean(1)
    patches = centred(run, cfg, patches)
    clusters, arrays, facts = fit_clusters(run, cfg, patches["train"], cfg.segments)
    out = cluster(run, cfg, means)
    out.arrays |= {f"segment_{k}": a for k, a in arrays.items()}
    out.about |= about | dict(segments=cfg.segments, patches=facts)
    grid, size = about["grid"], data["train"].images.shape[2:]
    for split, d in data.items():
        x = patches[split].unflatten(0, (-1, math.prod(grid)))
        step = max(1, 2 ** 24 // (cfg.segments * math.prod(size)))
        parts = [segment(part, grid, size, *clusters, cfg.smooth) for part in x.split(step)]
        masks = gathered(run, torch.cat(parts))
        out.arrays[f"masks_{split}"] = masks
        out.scores |= score_layouts(split, d, masks)
    return out


def ids_in_file(cfg, data):
    """The array of whole numbers [N] in the file `ids`."""
    with reading(cfg.ids, "ids= must be a .npy file of one whole number, 0 or more, per training image"):
        ids = np.load(cfg.ids, allow_pickle=False)
        if ids.dtype.kind not in "iu" or ids.shape != (len(data["train"]),) or ids.min() < 0:
            raise ValueError(f"{ids.dtype} {ids.shape}, from {ids.min()} on, for {len(data['train'])} images")
    return ids


def from_file(run, cfg, data):
    """file: what anything else made of the training images. Test images have no label (-1)."""
    values, ids = np.unique(ids_in_file(cfg, data), return_inverse=True)
    if values[-1] >= len(values):
        run.say("note: ids have gaps, so they were renumbered; file_ids in the .json are those of the file, in order")
    ids = dict(train=ids, test=np.full(len(data["test"]), -1))
    return Labels(ids, len(values), about=dict(file_ids=values.tolist()))


def classes(run, cfg, data):
    """Control: the ground truth."""
    ids = {split: np.asarray(d.classes) for split, d in data.items()}
    if min(c.min() for c in ids.values()) < 0:
        raise UserError(f"{run.dir / 'data'}: some images have no class, and method={cfg.method} needs all")
    return Labels(ids, int(max(c.max() for c in ids.values())) + 1)


def subgroups(run, cfg, data):
    """Control: each class split at random, which tests whether merely more labels help."""
    out = classes(run, cfg, data)
    generator = np.random.default_rng(seed_of(cfg.seed, "subgroups"))
    ids = {split: c * cfg.groups + generator.integers(cfg.groups, size=len(c)) for split, c in out.ids.items()}
    return Labels(ids, out.K * cfg.groups)


def permuted(run, cfg, data):
    """Control: the reference labels (and layouts) of other images: the same marginal, nothing about the image."""
    reference, info = load_labels(run, cfg.reference)
    generator = np.random.default_rng(seed_of(cfg.seed, "random"))
    order = {split: generator.permutation(len(d)) for split, d in data.items()}
    layouts = [k for k in reference if k.startswith(("boxes_", "masks_", "ids_"))]
    arrays = {k: reference[k][order[k.rsplit("_", 1)[1]]] for k in layouts}
    return Labels({split: reference[split][order[split]] for split in data}, info["num_labels"], arrays=arrays)


ROWS = "K center seed"
KMEANS = f"{ROWS} metric iterations restarts"
OBJECTS = f"features {KMEANS} objects contrast refine cells"
METHODS = {                                               # name: (function, the settings that it reads)
    "kmeans": (cluster_features, f"features {KMEANS}"),
    "sinkhorn": (cluster_features, f"features {ROWS} sk_eps sk_iterations rounds"),
    "lost": (label_objects, OBJECTS),
    "masks": (label_objects, OBJECTS),
    "segments": (label_segments, f"features {KMEANS} segments smooth"),
    "file": (from_file, "ids"),
    "colours": (colours, KMEANS),
    "pixels": (pixels, f"{KMEANS} pool"),
    "classes": (classes, ""),
    "random": (permuted, "reference seed"),
    "subgroups": (subgroups, "groups seed"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Scores of labels a [N] against classes b [N]: monitors only

def nmi(a, b):
    """Normalised mutual information, arithmetic mean of the entropies."""
    t = crosstab(a, b).count                              # [labels, classes]
    h = entropy(t.sum(1)) + entropy(t.sum(0))
    return float(max(0.0, h - entropy(t, axis=None)) / (h / 2)) if h > 0 else 1.0


def hungarian_accuracy(a, b):
    """Share of images that are right when labels are matched to classes one to one as well as possible."""
    t = crosstab(a, b).count
    return float(t[linear_sum_assignment(t, maximize=True)].sum() / t.sum())


def size_entropy(sizes):
    """Entropy of cluster sizes as a share of ln K: 1 = all equal."""
    return float(entropy(sizes)) / math.log(len(sizes)) if len(sizes) > 1 else 1.0


def score_labels(labels, classes):
    """Agreement of labels [N] with ground-truth classes [N], -1 = not known: a monitor, never used to make labels."""
    known = (classes >= 0) & (labels >= 0)
    if not known.any():
        return {}
    a, b = labels[known], classes[known]
    return dict(nmi=nmi(a, b), hungarian_accuracy=hungarian_accuracy(a, b))


# ---------------------------------------------------------------------------------------------------------------------
# Scores of boxes and masks against the ground truth: monitors only. Boxes with -1 do not exist.

def iou(a, b):
    """Intersection over union of boxes [..., 4], arrays that broadcast."""
    def area(corner, end):
        return (end - corner).clip(0).prod(-1)
    both = area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    either = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    return both / np.maximum(either, 1e-9)


def confusion(masks, truth, chunk=256):
    """Pixels by segment and class [256, 255] of uint8 masks [N, H, W] and their truth (255 = void), read in chunks."""
    t = np.zeros(256 * 256, np.int64)
    for i in range(0, len(masks), chunk):
        pairs = 256 * masks[i:i + chunk].astype(np.int64) + truth[i:i + chunk]
        t += np.bincount(pairs.ravel(), minlength=len(t))
    return t.reshape(256, 256)[:, :255]


def segmentation_scores(t):
    """Scores of a table of pixels by segment and class, which are matched one to one for the largest sum of IoUs."""
    overlap = t / np.maximum(t.sum(1, keepdims=True) + t.sum(0) - t, 1)
    pairs = linear_sum_assignment(overlap, maximize=True)
    return dict(miou=float(overlap[pairs].sum() / (t.sum(0) > 0).sum()), pixel_accuracy=float(t[pairs].sum() / t.sum()))


def score_layouts(split, data, masks, boxes=None, clustered=True):
    """Scores of a split where data/ has the truth: of masks uint8 [N, H, W], and of objects' boxes [N, objects, 4].

    clustered: values of masks are comparable between images. Without boxes 0 is a segment, too.
    """
    scores = {}
    if boxes is not None and data.boxes is not None:
        known = data.boxes[:, 2] > data.boxes[:, 0]       # images with a box
        overlap = iou(boxes[known, 0], data.boxes[known])
        scores |= dict(iou=float(overlap.mean()), corloc=float((overlap >= 0.5).mean())) if known.any() else {}
    t = confusion(masks, data.masks) if data.masks is not None else np.zeros(1)
    if t.any():                                           # something else than void
        if boxes is not None:
            scores["foreground_iou"] = float(t[1:, 1:].sum() / max(t.sum() - t[0, 0], 1))
        if clustered:
            scores |= segmentation_scores(t)
    return prefixed(split, scores)


def prefixed(split, scores):
    """The scores of the test split bear its name."""
    return scores if split == "train" else {f"{split}_{k}": v for k, v in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files

def draw_masks(image, mask):
    """Image uint8 [3, H, W] with its mask [H, W] in colours; 0 and below = none."""
    torchvision_datasets()                                # makes sure that torchvision loads
    from torchvision.utils import draw_segmentation_masks
    ids = np.unique(mask[mask > 0]).astype(int)
    if not len(ids):
        return np.array(image)
    masks = torch.from_numpy(mask == ids[:, None, None])
    colours = [f"hsl({137 * k % 360}, 90%, 55%)" for k in ids.tolist()]
    return draw_segmentation_masks(torch.from_numpy(np.array(image)), masks, 0.5, colours).numpy()


def contact_sheet(path, images, labels, arrays, head):
    """One row per label (at most 40): 16 of its members, with their masks."""
    masks, tiles, captions = arrays.get("masks_train"), [], []
    shift = "boxes_train" not in arrays                   # without objects 0 is a segment, too
    for k in np.unique(labels)[:40]:
        members = np.flatnonzero(labels == k)
        some = members[np.linspace(0, len(members) - 1, 16).astype(int)]
        tiles += [images[i] if masks is None else draw_masks(images[i], masks[i] + shift) for i in some]
        captions.append(f"{k}: {len(members)}")
    save_grid(path, np.stack(tiles), 16, captions, head=head)


def save_labels(run, name, data, labels, recipe):
    """labels/<name>.npz, .png, .json from `Labels`, by the first process. data: {split: Split}."""
    path, ids, K = run.dir / "labels" / f"{name}.npz", labels.ids, labels.K
    sizes = np.bincount(ids["train"], minlength=K)
    monitors = dict(size_entropy=size_entropy(sizes))
    for split, d in data.items():
        monitors |= prefixed(split, score_labels(ids[split], np.asarray(d.classes)))
    monitors |= labels.scores
    if run.rank == 0:
        arrays = {split: v.astype(np.int64) for split, v in ids.items()} | dict(num_labels=np.array(K)) | labels.arrays
        head = f"{name}: K = {K}; each row a label"
        contact_sheet(path.with_suffix(".png"), data["train"].images, ids["train"], arrays, head)
        write_json(path.with_suffix(".json"), dict(       # first: a kill after it leaves what `are_made` makes anew
            num_labels=K, data={k: d.info["fingerprint"] for k, d in data.items()}, recipe=recipe, scores=monitors,
            sizes=sizes.tolist(), hash=arrays_hash(arrays), **labels.about))
        with atomic(path) as f:
            np.savez(f, **arrays)
    run.wait()
    run.say(f"labels in {path}, contact sheet {path.with_suffix('.png')}")
    run.say(f"K = {K}, sizes {sizes.min()} ... {sizes.max()}; monitors: "
            + ", ".join(f"{k} {v:.3f}" for k, v in monitors.items()))
    if sizes.min() < 3 or K > sizes.sum() / 10:
        run.say(f"note: {(sizes < 3).sum()} labels hold fewer than 3 images, and all {sizes.mean():.1f} on average; "
                "a smaller K gives each more")


def are_made(run, path, recipe):
    """Whether labels of this recipe are there. Those that a kill left beside another description are made again."""
    note = path.with_suffix(".json")
    if not path.exists():
        return False
    if not note.exists():
        raise UserError(f"{path}: has no {note.name}, so it is not ours to replace; "
                        "move it away or choose another name=")
    with reading(path, "delete it"), np.load(path, allow_pickle=False) as f:
        whole = read_json(note, "delete it").get("hash") in (None, arrays_hash(f))
    return finished(run, note, recipe, whole=whole)


def recipe_of(run, cfg, data):
    """(what decides the labels: method, its settings, data, features, reference; where features come from, or {})."""
    names, about = METHODS[cfg.method][1].split(), {}
    recipe = {k: getattr(cfg, k) for k in ["method", *names]}
    recipe["data"] = {split: d.info["fingerprint"] for split, d in data.items()}
    if "features" in names:
        info = load_features(run, cfg.features, "train")[1]
        decisive = ("hash", "pool", "draws", "seed", "arrays", "dtype", "precision", "resize")
        recipe["features_hash"] = digest({k: info[k] for k in decisive if k in info})
        model = run.dir / info["checkpoint"] / "checkpoint.json"
        if model.exists() and read_json(model, "delete it").get("weights") != info["hash"]:
            run.say(f"note: features/{cfg.features} were made by an earlier state of {info['checkpoint']}")
        told = ("checkpoint", "hash", "pool", "draws", "seed", "arrays")
        about["features"] = {k: info[k] for k in told if k in info}
    if cfg.method in ("classes", "subgroups"):            # the fingerprint is of the images alone
        recipe["classes"] = digest(*(np.asarray(d.classes) for d in data.values()))
    if "ids" in names:
        recipe["ids"] = digest(ids_in_file(cfg, data))    # wherever they lie
    if "reference" in names:
        reference, _ = load_labels(run, cfg.reference)
        recipe["reference_hash"] = digest(*(reference[k] for k in sorted(reference) if np.ndim(reference[k])))
    return recipe, about


def main():
    """Label, from the command line."""
    run = start("self_label", SelfLabel, __doc__)
    cfg = run.cfg
    if cfg.method not in METHODS:
        raise UserError(f"method={cfg.method}: {unknown(cfg.method, list(METHODS))}")
    cfg.name = cfg.name or cfg.method
    require(cfg.name not in ("none", "online"), cfg, "name", "train_guided.py means something else by that")
    path = run.dir / "labels" / f"{cfg.name}.npz"
    data = {split: load_data(run, split) for split in ("train", "test")}
    recipe, about = recipe_of(run, cfg, data)
    if run.dry_run:
        return run.say(f"{cfg.method} labels of {len(data['train']):,} + {len(data['test']):,} images into {path}")

    with locked(run, "labels", cfg.name):
        if run.agreed(lambda: are_made(run, path, recipe)):
            return
        labels = METHODS[cfg.method][0](run, cfg, data)
        if run.agreed(lambda: recipe_of(run, cfg, data)[0] != recipe):
            raise UserError(f"{path}: what it is made of was replaced meanwhile; the same command again reads it anew")
        labels.about |= about
        save_labels(run, cfg.name, data, labels, recipe)
    run.next(f"train_guided.py labels={cfg.name}")


if __name__ == "__main__":
    cli(main)

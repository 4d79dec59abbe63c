"""Boxes and masks: LOST and normalised cut on drawn examples, degenerate images, scores against brute force and scikit-learn, the stage by 1 and 2 ranks."""
import json
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from conftest import stage

import self_label
from self_label import (assign, balanced_assign, bounds, confusion, corloc, find_objects, iou, largest_component, second_eigenvector,
                        segment, segmentation_scores)
from configs.run import Data
from configs.shapes import draw_shapes

METHODS = ("lost", "ncut")


def drawn(boxes, h=8, D=32, noise=0.02, seed=0):
    """Patch features [1, h * h, D] of a plain image with rectangles (x0 y0 x1 y1 in patches), each of a feature of its own."""
    g = torch.Generator().manual_seed(seed)
    kinds, x = torch.randn(len(boxes) + 1, D, generator=g), torch.zeros(h, h, D)
    x[:] = kinds[0]
    for kind, (x0, y0, x1, y1) in zip(kinds[1:], boxes):
        x[y0:y1, x0:x1] = kind
    return (x + noise * torch.randn(h, h, D, generator=g)).view(1, h * h, D)


# ---------------------------------------------------------------------------------------------------------------------
# Drawn examples

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("box", [(2, 3, 5, 6), (0, 0, 3, 3), (5, 0, 8, 8), (7, 4, 8, 5), (1, 1, 7, 4)])
def test_one_object(method, box):
    """Also at the border, in a corner, along a whole side, and of a single patch; 4 pixels per patch."""
    for seed in range(3):
        out = find_objects(drawn([box], seed=seed), (8, 8), (32, 32), method, refine=False)
        assert out["boxes"][0, 0].tolist() == [4 * v for v in box] and out["confidence"] > 0.5
        assert bounds(out["masks"] == 1).tolist() == [[4 * v for v in box]]
        fine = find_objects(drawn([box], seed=seed), (8, 8), (32, 32), method)["boxes"][0, 0]
        assert (fine - 4 * torch.tensor(box)).abs().max() <= 2                   # half a patch


@pytest.mark.parametrize("method", METHODS)
def test_several_objects(method):
    boxes = [(0, 0, 3, 3), (5, 4, 8, 8)]
    x = drawn(boxes, h=10)
    out = find_objects(x, (10, 10), (10, 10), method, objects=3, refine=False)
    assert sorted(out["boxes"][0, :2].tolist()) == [list(map(float, b)) for b in boxes]
    assert out["boxes"][0, 2].tolist() == [-1] * 4 and out["confidence"][0, 2] == 0       # the plain rest holds no third
    assert out["masks"].unique().tolist() == [0, 1, 2]
    for j in range(2):                                    # the region's feature is that of its patches
        x0, y0, x1, y1 = out["boxes"][0, j].int().tolist()
        assert torch.allclose(out["regions"][0, j], x.view(10, 10, -1)[y0:y1, x0:x1].mean((0, 1)), atol=1e-5)
    assert torch.allclose(out["regions"][0, 2], x[0].mean(0), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refine", [False, True])
def test_uniform_images_have_none(method, refine):
    """A plain image, one that is all foreground, all zeros: there is nothing to tell apart."""
    for x in (drawn([], noise=0), drawn([(0, 0, 8, 8)], noise=0), torch.zeros(1, 64, 32)):
        out = find_objects(x, (8, 8), (32, 32), method, objects=2, refine=refine)
        assert (out["boxes"] == -1).all() and not out["masks"].any() and not out["confidence"].any() and torch.allclose(out["regions"][0], x[0].mean(0), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_nearly_all_foreground(method):
    """An object that leaves one column: the smaller side is called the object, as no object fills three corners."""
    assert find_objects(drawn([(0, 0, 7, 8)]), (8, 8), (8, 8), method, refine=False)["boxes"][0, 0].tolist() == [7, 0, 8, 8]


@pytest.mark.parametrize("method", METHODS)
def test_noise_stays_finite_and_batches_change_nothing(method):
    x = torch.cat([drawn([(1, 1, 4, 4), (5, 5, 7, 8)], noise=0.3, seed=s) for s in range(9)] + [drawn([], noise=1), drawn([], noise=0)])
    every = find_objects(x, (8, 8), (32, 32), method, objects=2)
    for i in range(len(x)):
        for k, v in find_objects(x[i:i + 1], (8, 8), (32, 32), method, objects=2).items():
            assert torch.isfinite(v).all() and torch.allclose(v[0].float(), every[k][i].float(), atol=1e-4), (k, i)


def test_largest_component():
    m = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool).flatten()
    got = largest_component(torch.stack([m, torch.zeros_like(m), ~m]), (4, 4)).view(3, 4, 4).int()
    assert got[0].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0] * 4, [0] * 4] and not got[1].any()
    assert got[2].tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    snake = torch.zeros(9, 9, dtype=torch.bool)           # long and winding
    snake[::2], snake[1::4, -1], snake[3::4, 0] = True, True, True
    assert torch.equal(largest_component(snake.view(1, -1), (9, 9))[0], snake.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# The eigen-solver

@pytest.mark.parametrize("P, kind", [(64, "binary"), (100, "positive"), (64, "dead"), (4, "positive"), (49, "blocks")])
def test_second_eigenvector_against_dense(P, kind):
    g = torch.Generator().manual_seed(P)
    f = F.normalize(torch.randn(12, P, 8, generator=g), dim=2)
    A = f @ f.transpose(1, 2)
    A = A.clamp(min=0) if kind == "positive" else torch.where(A > 0.2, 1.0, 1e-5)
    if kind == "blocks":                                  # three groups: eigenvalues of 1 - 1e-5 and so, and a Krylov space of three vectors
        A = torch.where(torch.arange(P)[:, None] % 3 == torch.arange(P) % 3, 1.0, 1e-5).expand(12, P, P).clone()
    left = torch.rand(12, P, generator=g) > (0.4 if kind == "dead" else 0)
    A = A * left[:, :, None] * left[:, None]
    value, z = second_eigenvector(A)
    for i in range(12):
        M = A[i][left[i]][:, left[i]].double()
        root = M.sum(1).rsqrt()
        e, u = torch.linalg.eigh(M * root[:, None] * root)
        assert abs(value[i] - e[-2]) < 1e-3 and not z[i][~left[i]].any()
        mine = z[i][left[i]].double()
        if min(e[-1] - e[-2], e[-2] - e[-3]) > 1e-2:                          # else the eigenvector is not determined
            assert (mine * torch.sign(mine @ u[:, -2]) - u[:, -2]).abs().max() < 1e-3
        y = mine * root                                   # the relaxed cut's own equation, (D - A) y = (1 - value) D y
        assert ((torch.diag(M.sum(1)) - M) @ y - (1 - value[i]) * M.sum(1) * y).abs().max() < 1e-3 * M.sum(1).max().sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Masks

def test_segments_are_assignments_at_patch_resolution():
    g = torch.Generator().manual_seed(0)
    x, c, prices = torch.randn(5, 36, 8, generator=g), torch.randn(4, 8, generator=g), torch.randn(4, generator=g)
    unit = F.normalize(c, dim=1)
    same = lambda ids, got: torch.equal(ids.view(5, 6, 6), got.long())
    assert same(assign(x.flatten(0, 1), unit)[0], segment(x, (6, 6), (6, 6), unit, smooth=0))
    assert same(assign(x.flatten(0, 1), c, "euclidean")[0], segment(x, (6, 6), (6, 6), c, metric="euclidean", smooth=0))
    assert same(balanced_assign(x.flatten(0, 1), unit, prices, 0.1)[0], segment(x, (6, 6), (6, 6), unit, prices, eps=0.1, smooth=0))
    x = torch.zeros(36, 2) + torch.tensor([1.0, 0])
    x[14] = torch.tensor([0.5, 0.6])                      # one patch that leans to the other side by itself, not with its neighbours
    assert segment(x[None], (6, 6), (6, 6), torch.eye(2), smooth=0).sum() == 1 and not segment(x[None], (6, 6), (12, 12), torch.eye(2), smooth=0.5).any()


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def some_boxes(n, m, g):
    """Random integer boxes [n, m, 4] in 12 x 12 pixels, a fifth of them none."""
    corner = g.integers(0, 8, size=(n, m, 2))
    b = np.concatenate([corner, corner + g.integers(1, 6, size=(n, m, 2))], 2).astype(np.float32)
    b[g.random((n, m)) < 0.2] = -1
    return b


def test_iou_and_corloc_by_counting_pixels():
    g = np.random.default_rng(0)
    a, b = some_boxes(80, 1, g), some_boxes(80, 3, g)
    def painted(box):
        p = np.zeros((16, 16), bool)
        if box[0] >= 0:
            p[int(box[1]):int(box[3]), int(box[0]):int(box[2])] = True
        return p
    slow = np.array([[(painted(u) & painted(v)).sum() / max((painted(u) | painted(v)).sum(), 1) for v in row] for (u,), row in zip(a, b)])
    assert np.allclose(iou(a, b), slow)
    known = (b[..., 0] >= 0).any(1)
    assert corloc(a, b, 0.3) == pytest.approx((slow.max(1) >= 0.3)[known].mean()) and corloc(b, b[:, :1]) == 1 and corloc(a, np.full_like(b, -1)) == 0


@pytest.mark.parametrize("K", [3, 5, 9])
def test_segmentation_scores(K):
    g = np.random.default_rng(K)
    truth = g.integers(5, size=(7, 12, 12)).astype(np.uint8)
    perm = g.permutation(K)
    masks = np.where(g.random(truth.shape) < 0.7, perm[truth % K], g.integers(K, size=truth.shape)).astype(np.uint8)
    t = confusion(masks, truth, chunk=2)
    assert np.array_equal(t, sklearn.metrics.confusion_matrix(masks.ravel(), truth.ravel(), labels=range(max(K, 5)))[:K, :5])
    got = segmentation_scores(t)
    if K == 5:                                            # the matching is known: undo it, and let scikit-learn score
        back = np.argsort(perm)[masks].ravel()
        assert got["miou"] == pytest.approx(sklearn.metrics.jaccard_score(truth.ravel(), back, average="macro"))
        assert got["pixel_accuracy"] == pytest.approx((back == truth.ravel()).mean())
    assert 0 < got["miou"] <= got["pixel_accuracy"] <= 1
    truth[:, :6] = 255                                    # void
    assert confusion(masks, truth).sum() == truth.size // 2 and segmentation_scores(confusion(truth[:, 6:], truth[:, 6:])) == dict(miou=1, pixel_accuracy=1, miou_many=1)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run folder of `shapes` whose dense features are drawn from the true masks: a map of 8 x 8 (pool=none) and one of 4 x 4, and a pooled one."""
    folder, g = tmp_path_factory.mktemp("layouts"), np.random.default_rng(0)
    (folder / "config.yaml").write_text(tiny.read_text())
    kinds, dense, pooled = g.normal(size=(11, 24)).astype(np.float32), {}, {}
    for split, n in (("train", 512), ("test", 256)):
        images, classes, boxes, masks = draw_shapes(int(split == "test"), np.arange(n), two=0)
        (folder / "data" / split).mkdir(parents=True)
        for k, v in dict(images=images, classes=classes, boxes=boxes, masks=masks).items():
            np.save(folder / "data" / split / f"{k}.npy", v)
        info = dict(count=n, size=32, arrays=["boxes", "classes", "images", "masks"], fingerprint=split)
        (folder / "data" / split / "info.json").write_text(json.dumps(info))
        x = torch.from_numpy(kinds[masks]).permute(0, 3, 1, 2)
        dense[split] = [F.avg_pool2d(x, k).numpy() + 0.1 * g.normal(size=(n, 24, 32 // k, 32 // k)).astype(np.float32) for k in (4, 8)]
        pooled[split] = [dense[split][0].reshape(n, -1)]
    for name, pool, arrays in (("dense", "none", dense), ("grid", "8", pooled), ("flat", "mean", {k: [v[0].mean((2, 3))] for k, v in dense.items()})):
        (folder / "features" / name).mkdir(parents=True)
        entries = [dict(activation=f"a{i}", t=0.5) for i in range(len(arrays["train"]))]
        for split, parts in arrays.items():
            for e, a in zip(entries, parts):
                np.save(folder / "features" / name / f"{split}-{e['activation']}-t0.5.npy", a)
        (folder / "features" / name / "info.json").write_text(json.dumps(dict(
            checkpoint="x", weights="ema", hash="x", pool=pool, draws=1, seed=0, data=dict(train="train", test="test"), arrays=entries)))
    return folder


def label(run, tiny, monkeypatch, *words):
    """Run the stage in this process; (arrays, json) of the labels named in the words."""
    monkeypatch.setattr(sys, "argv", ["self_label.py", str(tiny), f"run={run}", *words])
    self_label.main()
    name = next(w[5:] for w in words if w.startswith("name="))
    return dict(np.load(run / "labels" / f"{name}.npz")), json.loads((run / "labels" / f"{name}.json").read_text())


@pytest.mark.parametrize("words", [("method=ncut", "features=dense", "objects=2"), ("method=lost", "features=grid", "by=sinkhorn")])
def test_boxes_of_shapes(run, tiny, monkeypatch, words):
    name = words[0][7:]
    out, info = label(run, tiny, monkeypatch, *words, "K=10", f"name={name}")
    objects = 1 + ("objects=2" in words)
    assert out["train"].shape == (512,) and out["boxes_test"].shape == (256, objects, 4) and out["boxes_train"].dtype == np.float32
    assert out["masks_train"].shape == (512, 32, 32) and out["masks_train"].dtype == np.uint8 and np.array_equal(out["ids_train"][:, 0], out["train"])
    assert np.array_equal(out["ids_train"] < 0, out["boxes_train"][..., 0] < 0)
    scores = info["scores"]
    assert scores["corloc"] > 0.9 and scores["foreground_iou"] > 0.7 and scores["nmi"] > 0.8, scores
    assert (run / "labels" / f"{name}.png").exists() and not list((run / "labels").glob(".*"))
    assert len(self_label.load_labels(type("R", (), dict(dir=run, data=Data(), dry_run=False)), name)[0]["train"]) == 512


def test_masks_of_shapes(run, tiny, monkeypatch):
    out, info = label(run, tiny, monkeypatch, "method=masks", "foreground=none", "features=dense", "segments=16", "metric=euclidean", "restarts=3", "name=masks")
    assert out["masks_test"].shape == (256, 32, 32) and out["masks_test"].dtype == np.uint8 and out["train"].max() < 6
    assert info["scores"]["miou"] > 0.6 and info["scores"]["test_pixel_accuracy"] > 0.6, info["scores"]


def test_two_ranks_write_the_same(run, tiny, monkeypatch):
    words = ["features=dense", "method=masks", "foreground=none", "segments=11", "K=10"]
    one, _ = label(run, tiny, monkeypatch, *words, "name=one")
    stage("self_label", tiny, f"run={run}", *words, "name=two", ranks=2)
    two = np.load(run / "labels" / "two.npz")
    assert all((one[k] == two[k]).mean() > 0.999 for k in ("masks_train", "masks_test", "train", "test"))


def test_bad_input(run, tiny, refuse):
    assert "pool=none" in refuse("self_label", tiny, f"run={run}", "method=ncut", "features=flat")
    assert "pool=mean" in refuse("self_label", tiny, f"run={run}", "method=kmeans", "features=dense")
    assert "objects=0" in refuse("self_label", tiny, f"run={run}", "method=lost", "features=dense", "objects=0")
    assert "segments=300" in refuse("self_label", tiny, f"run={run}", "method=masks", "features=dense", "segments=300")

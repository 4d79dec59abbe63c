"""Objects: LOST and normalised cut on drawn examples, outlines, segments, scores by brute force, the stage."""
import itertools
import os
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_self_label import label, write_features, write_run

import self_label
from configs.run import Data
from configs.shapes import draw_shapes
from self_label import (assign, bounds, confusion, draw_masks, find_objects, guided_filter, iou,
                        largest_component, region, score_layouts, segment, segmentation_scores)


def drawn(boxes, h=8, D=32, noise=0.02, seed=0):
    """Patch features [1, h * h, D] of a plain image with rectangles (x0 y0 x1 y1 in patches), each of one feature."""
    g = torch.Generator().manual_seed(seed)
    kinds, x = torch.randn(len(boxes) + 1, D, generator=g), torch.zeros(h, h, D)
    x[:] = kinds[0]
    for kind, (x0, y0, x1, y1) in zip(kinds[1:], boxes):
        x[y0:y1, x0:x1] = kind
    return (x + noise * torch.randn(h, h, D, generator=g)).view(1, h * h, D)


def truth_features(masks, k=2, noise=0.1, seed=0):
    """Features [N, P, 24] of masks, averaged over k x k pixels."""
    g = np.random.default_rng(seed)
    kinds = g.normal(size=(11, 24)).astype(np.float32)
    x = F.avg_pool2d(torch.from_numpy(kinds[masks]).permute(0, 3, 1, 2), k)
    return (x + noise * torch.from_numpy(g.normal(size=x.shape).astype(np.float32))).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Drawn examples

@pytest.mark.parametrize("box", [(2, 3, 5, 6), (0, 0, 3, 3), (5, 0, 8, 8), (7, 4, 8, 5), (1, 1, 7, 4)])
def test_one_object(box):
    """Also at the border, in a corner, along a whole side, and of a single patch; 4 pixels per patch."""
    exact = [4 * v for v in box]
    for seed in range(3):
        x = drawn([box], seed=seed)
        out = find_objects(x, (8, 8), (32, 32), refine=False)
        assert out["boxes"][0, 0].tolist() == exact
        assert bounds(out["masks"] == 1).tolist() == [exact]
        fine = find_objects(x, (8, 8), (32, 32))["boxes"][0, 0]
        assert (fine - torch.tensor(exact)).abs().max() <= 2                     # half a patch


def test_several_objects():
    boxes = [(0, 0, 3, 3), (5, 4, 8, 8)]
    x = drawn(boxes, h=10)
    out = find_objects(x, (10, 10), (10, 10), objects=3, refine=False)
    assert sorted(out["boxes"][0, :2].tolist()) == [list(map(float, b)) for b in boxes]
    assert out["boxes"][0, 2].tolist() == [-1] * 4        # nothing in the plain rest
    assert out["masks"].unique().tolist() == [0, 1, 2]
    for j in range(2):                                    # the region's feature is that in its middle
        x0, y0, x1, y1 = out["boxes"][0, j].int().tolist()
        mean = x.view(10, 10, -1)[y0:y1, x0:x1].mean((0, 1))
        assert torch.allclose(out["regions"][0, j], mean, atol=0.1)


def test_uniform_images_have_none():
    """A plain image, one that is all foreground, all zeros: there is nothing to tell apart."""
    plain = drawn([], noise=0), drawn([(0, 0, 8, 8)], noise=0), torch.zeros(1, 64, 32)
    for x, refine in itertools.product(plain, (False, True)):
        out = find_objects(x, (8, 8), (32, 32), objects=2, refine=refine)
        assert (out["boxes"] == -1).all() and not out["masks"].any()
        assert torch.allclose(out["regions"][0], x[0].mean(0), atol=1e-5)


def test_nearly_all_foreground():
    """An object that leaves one column: the smaller side is called the object, as no object fills three corners."""
    out = find_objects(drawn([(0, 0, 7, 8)]), (8, 8), (8, 8), refine=False)
    assert out["boxes"][0, 0].tolist() == [7, 0, 8, 8]


def test_noise_stays_finite_and_batches_change_nothing():
    x = [drawn([(1, 1, 4, 4), (5, 5, 7, 8)], noise=0.3, seed=s) for s in range(9)]
    x = torch.cat([*x, drawn([], noise=1), drawn([], noise=0)])
    every = find_objects(x, (8, 8), (32, 32), objects=2)
    for i in range(len(x)):
        for k, v in find_objects(x[i:i + 1], (8, 8), (32, 32), objects=2).items():
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
# Outlines and regions

def test_guided_filter_by_windows():
    """Against a least-squares fit in every window, written out."""
    g = torch.Generator().manual_seed(0)
    image, p, r, eps = torch.rand(1, 3, 7, 6, generator=g), torch.rand(1, 1, 7, 6, generator=g), 1, 1e-2
    fit = {}
    for y, x in np.ndindex(7, 6):
        ys, xs = slice(max(0, y - r), y + r + 1), slice(max(0, x - r), x + r + 1)
        I, q = image[0, :, ys, xs].flatten(1).T.double(), p[0, 0, ys, xs].flatten().double()
        common = ((I - I.mean(0)) * (q - q.mean())[:, None]).mean(0)
        a = torch.linalg.solve(torch.cov(I.T, correction=0) + eps * torch.eye(3), common)
        fit[y, x] = a, q.mean() - a @ I.mean(0)
    got = guided_filter(p, image, r, eps)
    for y, x in np.ndindex(7, 6):
        colour = image[0, :, y, x].double()
        near = [fit[v, u] for v, u in fit if abs(v - y) <= r and abs(u - x) <= r]
        assert got[0, 0, y, x] == pytest.approx(float(torch.stack([a @ colour + b for a, b in near]).mean()), abs=1e-4)


def test_regions_are_read_in_the_middle_of_cells():
    maps = torch.arange(64.).view(1, 64, 1) + torch.tensor([0, 100.]).view(2, 1, 1)        # patch (x, y) is 8 y + x
    got = region(maps, torch.tensor([[-1.0] * 4, [8, 4, 12, 8]]), (8, 8), (16, 16), 2).view(2, 2, 2)
    assert got[0].tolist() == [[13.5, 17.5], [45.5, 49.5]]                       # without a box of the whole image
    assert got[1].tolist() == [[120, 121], [128, 129]]


def test_outlines_follow_edges():
    images, _, boxes, masks = draw_shapes(0, np.arange(60), two=0)
    x, score = truth_features(masks, 4), {}
    for guide in (False, True):
        out = find_objects(x, (8, 8), (32, 32), images=torch.from_numpy(images) if guide else None)
        found = {k: v.numpy() for k, v in out.items()}
        truth = SimpleNamespace(boxes=boxes, masks=masks)
        score[guide] = score_layouts("train", truth, found["masks"], found["boxes"], False)
    assert score[True]["foreground_iou"] > max(0.9, score[False]["foreground_iou"] + 0.1), score
    assert score[True]["iou"] > score[False]["iou"] + 0.05, score
    nothing = SimpleNamespace(boxes=np.full_like(boxes, -1), masks=np.full_like(masks, 255))     # is known
    assert score_layouts("train", nothing, found["masks"], found["boxes"]) == {}


def test_the_larger_of_two_comes_first_and_alone():
    """Two objects of one feature: one cut, two boxes, the larger first, however they lie."""
    images, _, boxes, masks = draw_shapes(1, np.arange(60), two=1)
    out = find_objects(truth_features(masks), (16, 16), (32, 32), objects=2, images=torch.from_numpy(images))
    found = out["boxes"].numpy()
    # but for pairs that nearly touch, and the smallest
    assert (iou(found[:, 0], boxes) >= 0.7).mean() > 0.85 and (found[:, 1, 0] >= 0).mean() > 0.6
    area = (found[..., 2:] - found[..., :2]).prod(2)
    assert (area[:, 0] >= area[:, 1]).mean() > 0.9


def test_segments_are_assignments_at_patch_resolution():
    g = torch.Generator().manual_seed(0)
    x, c, offset = torch.randn(5, 36, 8, generator=g), torch.randn(4, 8, generator=g), torch.randn(4, generator=g)
    for metric, shift in (("cosine", None), ("euclidean", None), ("cosine", offset)):
        ids = assign(x.flatten(0, 1), c, metric, shift).view(5, 6, 6)
        assert torch.equal(ids, segment(x, (6, 6), (6, 6), c, metric, shift, smooth=0).long())
    x = torch.zeros(36, 2) + torch.tensor([1.0, 0])
    x[14] = torch.tensor([0.5, 0.6])                      # one patch that leans to the other side by itself
    assert segment(x[None], (6, 6), (6, 6), torch.eye(2), smooth=0).sum() == 1
    assert not segment(x[None], (6, 6), (12, 12), torch.eye(2), smooth=0.5).any()


def test_masks_are_drawn():
    image, mask = np.zeros((3, 16, 16), np.uint8), np.zeros((16, 16), np.uint8)
    mask[2:5, 3:9] = 2
    shown = draw_masks(image, mask)
    assert np.array_equal(shown.any(0), mask > 0) and not image.any() and not draw_masks(image, 0 * mask).any()


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def some_boxes(n, m, g):
    """Random integer boxes [n, m, 4] in 12 x 12 pixels, a fifth of them none."""
    corner = g.integers(0, 8, size=(n, m, 2))
    b = np.concatenate([corner, corner + g.integers(1, 6, size=(n, m, 2))], 2).astype(np.float32)
    b[g.random((n, m)) < 0.2] = -1
    return b


def painted(box):
    """The pixels of a box."""
    p = np.zeros((16, 16), bool)
    if box[0] >= 0:
        p[int(box[1]):int(box[3]), int(box[0]):int(box[2])] = True
    return p


def test_iou_by_counting_pixels():
    g = np.random.default_rng(0)
    a, b = some_boxes(80, 1, g), some_boxes(80, 3, g)
    slow = np.array([[(painted(u) & painted(v)).sum() / max((painted(u) | painted(v)).sum(), 1) for v in row]
                     for (u,), row in zip(a, b)])
    assert np.allclose(iou(a, b), slow)


@pytest.mark.parametrize("K", [3, 5, 9])
def test_segmentation_scores(K):
    g = np.random.default_rng(K)
    truth = g.integers(5, size=(7, 12, 12)).astype(np.uint8)
    perm = g.permutation(K)
    masks = np.where(g.random(truth.shape) < 0.7, perm[truth % K], g.integers(K, size=truth.shape)).astype(np.uint8)
    t = confusion(masks, truth, chunk=2)
    theirs = sklearn.metrics.confusion_matrix(masks.ravel(), truth.ravel(), labels=range(max(K, 5)))
    assert np.array_equal(t[:K, :5], theirs[:K, :5]) and t.sum() == theirs.sum()
    got = segmentation_scores(t)
    if K == 5:                                            # the matching is known: undo it, and let scikit-learn score
        back = np.argsort(perm)[masks].ravel()
        assert got["miou"] == pytest.approx(sklearn.metrics.jaccard_score(truth.ravel(), back, average="macro"))
        assert got["pixel_accuracy"] == pytest.approx((back == truth.ravel()).mean())
    assert 0 < got["miou"] <= got["pixel_accuracy"] <= 1
    truth[:, :6] = 255                                    # void
    assert confusion(masks, truth).sum() == truth.size // 2
    assert set(segmentation_scores(confusion(truth[:, 6:], truth[:, 6:])).values()) == {1}


# ---------------------------------------------------------------------------------------------------------------------
# The stage

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run whose features are drawn from the true masks: maps of 8 x 8, also of 4 x 4, and pooled to 8 x 8."""
    folder = tmp_path_factory.mktemp("layouts")
    data = write_run(folder, tiny, dict(train=320, test=120), two=0.3)
    maps = {split: [truth_features(masks, k).transpose(1, 2).unflatten(2, (32 // k, 32 // k)).numpy() for k in (4, 8)]
            for split, (_, _, _, masks) in data.items()}
    write_features(folder, "dense", "none", {split: m[:1] for split, m in maps.items()})
    write_features(folder, "two", "none", maps)
    write_features(folder, "grid", "8", {split: [m[0].reshape(len(m[0]), -1)] for split, m in maps.items()})
    return folder


@pytest.mark.parametrize("words", [("method=lost", "features=two", "objects=2", "name=two"),
                                   ("method=lost", "features=grid")])
def test_boxes(run, tiny, monkeypatch, words):
    out, info = label(run, tiny, monkeypatch, *words, "K=10", "restarts=3")
    objects = 1 + ("objects=2" in words)
    assert out["train"].shape == (320,) and out["boxes_test"].shape == (120, objects, 4)
    assert out["masks_train"].shape == (320, 32, 32) and out["masks_train"].dtype == np.uint8
    assert out["boxes_train"].dtype == np.float32 and 1 <= out["masks_train"].max() <= objects
    exists = out["boxes_train"][..., 0] >= 0
    assert np.array_equal(out["ids_train"] >= 0, exists)
    assert np.array_equal(out["ids_train"][exists[:, 0], 0], out["train"][exists[:, 0]])
    scores = info["scores"]
    assert scores["corloc"] > 0.9 and scores["foreground_iou"] > 0.7 and scores["nmi"] > 0.75, scores
    assert len(info["scales"]) == len(info["features"]["arrays"]) and info["grid"] == [8, 8]
    some = SimpleNamespace(dir=run, data=Data(), dry_run=False)
    name = "two" if objects == 2 else "lost"
    assert len(self_label.load_labels(some, name)[0]["train"]) == 320
    assert not list((run / "labels").glob(".*"))


def one_of_two(rank, port, words):
    """The stage as torchrun starts it, in a forked process."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    sys.argv = ["self_label.py", *words]
    self_label.main()
    dist.destroy_process_group()


def equal_on_two_ranks(run, tiny, words, one, *names):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    words = [str(tiny), f"run={run}", *words, "name=ranks", "overwrite=true"]
    mp.start_processes(one_of_two, (port, words), 2, start_method="fork")
    two = np.load(run / "labels/ranks.npz")
    assert all((one[k] == two[k]).mean() > 0.999 for k in names)


def test_masks_bear_the_cluster_of_their_object(run, tiny, monkeypatch):
    words = ("method=masks", "features=dense", "objects=2", "K=10", "restarts=4")
    out, info = label(run, tiny, monkeypatch, *words)
    assert out["masks_train"].dtype == np.uint8 and out["masks_train"].max() <= 10
    for i in range(40):                                   # ids in the mask are those of the boxes, and of the image
        ids = out["ids_train"][i]
        assert set(np.unique(out["masks_train"][i])) == {0, *(ids[ids >= 0] + 1)}
        assert out["train"][i] == ids[0] and (ids[1] >= 0) == (out["boxes_train"][i, 1, 0] >= 0)
    scores = info["scores"]
    assert scores["miou"] > 0.7 and scores["corloc"] > 0.95 and scores["nmi"] > 0.8, scores
    equal_on_two_ranks(run, tiny, words, out, "masks_train", "masks_test", "train", "test", "boxes_train")


def test_segments_of_all_patches(run, tiny, monkeypatch):
    words = ("method=segments", "features=two", "segments=16", "metric=euclidean", "restarts=3")
    out, info = label(run, tiny, monkeypatch, *words)
    assert out["masks_test"].shape == (120, 32, 32) and out["masks_test"].dtype == np.uint8 and out["train"].max() < 6
    assert out["segment_centroids"].shape == (16, 48) and "boxes_train" not in out
    assert info["scores"]["miou"] > 0.5 and info["scores"]["test_pixel_accuracy"] > 0.6, info["scores"]
    equal_on_two_ranks(run, tiny, words, out, "masks_train", "masks_test", "train", "test")


def test_shuffled_layouts_stay_together(run, tiny, monkeypatch):
    of, _ = label(run, tiny, monkeypatch, "method=lost", "features=grid", "K=4", "name=whole", "refine=false")
    out, _ = label(run, tiny, monkeypatch, "method=random", "reference=whole")
    rows = {(a.tobytes(), b.tobytes(), int(c)) for a, b, c in zip(of["boxes_train"], of["masks_train"], of["train"])}
    assert all((a.tobytes(), b.tobytes(), int(c)) in rows
               for a, b, c in zip(out["boxes_train"], out["masks_train"], out["train"]))
    assert (of["train"] != out["train"]).any()


def test_bad_input(run, tiny, refuse):
    for words in ("method=lost objects=0", "method=lost cells=0", "method=masks segments=300", "method=masks K=300"):
        assert words.split()[-1] in refuse("self_label", tiny, f"run={run}", "features=dense", "name=x", *words.split())
    assert "pool=mean" in refuse("self_label", tiny, f"run={run}", "method=kmeans", "features=dense", "name=x")
    single = {split: [np.ones((n, 5), np.float32)] for split, n in (("train", 320), ("test", 120))}
    write_features(run, "single", "1", single)
    for method in ("lost", "masks", "segments"):
        said = refuse("self_label", tiny, f"run={run}", f"method={method}", "features=single", "name=x")
        assert "one position per image" in said


def test_no_image_has_no_objects():
    """A process may have none of a split."""
    none = find_objects(torch.zeros(0, 64, 8), (8, 8), (32, 32), 2, images=torch.zeros(0, 3, 32, 32), cells=4)
    assert {k: tuple(v.shape) for k, v in none.items()} == dict(boxes=(0, 2, 4), masks=(0, 32, 32), regions=(0, 2, 128))

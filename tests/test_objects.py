"""Objects: outlines along the edges of images, features cell by cell, masks that bear the cluster of their object."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import stage

import self_label
from self_label import corloc, crop, find_objects, guided_filter, score_layouts, segmentation_scores
from configs.shapes import draw_shapes


def test_guided_filter_by_windows():
    """Against a least-squares fit in every window, written out."""
    g = torch.Generator().manual_seed(0)
    image, p, r, eps = torch.rand(1, 3, 7, 6, generator=g), torch.rand(1, 1, 7, 6, generator=g), 1, 1e-2
    fit = {}
    for y, x in np.ndindex(7, 6):
        ys, xs = slice(max(0, y - r), y + r + 1), slice(max(0, x - r), x + r + 1)
        I, q = image[0, :, ys, xs].flatten(1).T.double(), p[0, 0, ys, xs].flatten().double()
        a = torch.linalg.solve(torch.cov(I.T, correction=0) + eps * torch.eye(3), ((I - I.mean(0)) * (q - q.mean())[:, None]).mean(0))
        fit[y, x] = a, q.mean() - a @ I.mean(0)
    got = guided_filter(p, image, r, eps)
    for y, x in np.ndindex(7, 6):
        near = [fit[v, u] for v in range(max(0, y - r), min(7, y + r + 1)) for u in range(max(0, x - r), min(6, x + r + 1))]
        assert got[0, 0, y, x] == pytest.approx(float(torch.stack([a @ image[0, :, y, x].double() + b for a, b in near]).mean()), abs=1e-4)


def test_crop_reads_the_middle_of_cells():
    maps = torch.arange(64.).view(1, 1, 8, 8) + torch.tensor([0, 100.]).view(2, 1, 1, 1)
    got = crop(maps, torch.tensor([[0, 0, 1, 1], [0.5, 0.25, 0.75, 0.5]]), 2).view(2, 2, 2)
    assert got[0].tolist() == [[13.5, 17.5], [45.5, 49.5]] and got[1].tolist() == [[120, 121], [128, 129]]        # pixel (x, y) is 8 y + x


def truth_features(masks, k=2, noise=0.1, seed=0):
    """Features [N, P, 24] of masks, averaged over k x k pixels."""
    g = np.random.default_rng(seed)
    kinds = g.normal(size=(11, 24)).astype(np.float32)
    x = F.avg_pool2d(torch.from_numpy(kinds[masks]).permute(0, 3, 1, 2), k)
    return (x + noise * torch.from_numpy(g.normal(size=x.shape).astype(np.float32))).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("method", ["lost", "ncut"])
def test_outlines_follow_edges(method):
    images, classes, boxes, masks = draw_shapes(0, np.arange(60), two=0)
    x, score = truth_features(masks, 4), {}
    for guide in (False, True):
        out = {k: v.numpy() for k, v in find_objects(x, (8, 8), (32, 32), method, images=torch.from_numpy(images) if guide else None).items()}
        score[guide] = score_layouts(out, type("D", (), dict(boxes=boxes, masks=masks)))
    assert score[True]["foreground_iou"] > max(0.9, score[False]["foreground_iou"] + 0.1) and score[True]["iou"] > score[False]["iou"] + 0.05, score


def test_the_larger_of_two_comes_first_and_alone():
    """Two objects of one feature: one cut, two boxes, the larger first, however they lie."""
    images, classes, boxes, masks = draw_shapes(1, np.arange(60), two=1)
    out = {k: v.numpy() for k, v in find_objects(truth_features(masks), (16, 16), (32, 32), "lost", objects=2, images=torch.from_numpy(images)).items()}
    assert corloc(out["boxes"], boxes[:, None], 0.7) > 0.85 and (out["boxes"][:, 1, 0] >= 0).mean() > 0.6        # but for pairs that nearly touch, and the smallest
    area = (out["boxes"][..., 2:] - out["boxes"][..., :2]).prod(2)
    assert (area[:, 0] >= area[:, 1]).mean() > 0.9


def test_segments_of_one_class_count_as_one():
    t = np.array([[50, 0, 0], [0, 20, 0], [0, 20, 0], [0, 0, 10]])
    got = segmentation_scores(t)
    assert got["miou"] == pytest.approx((1 + 0.5 + 1) / 3) and got["miou_many"] == 1
    t = np.array([[50, 2, 8], [0, 20, 0]])                # no segment stands for the third class
    assert segmentation_scores(t)["miou_many"] == pytest.approx((50 / 60 + 20 / 22 + 0) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run folder of `shapes` with two objects in many images, and dense features drawn from the true masks."""
    folder = tmp_path_factory.mktemp("objects")
    (folder / "config.yaml").write_text(tiny.read_text())
    (folder / "features" / "dense").mkdir(parents=True)
    for split, n in (("train", 512), ("test", 256)):
        images, classes, boxes, masks = draw_shapes(int(split == "test"), np.arange(n), two=0.4)
        (folder / "data" / split).mkdir(parents=True)
        for k, v in dict(images=images, classes=classes, boxes=boxes, masks=masks).items():
            np.save(folder / "data" / split / f"{k}.npy", v)
        info = dict(count=n, size=32, arrays=["boxes", "classes", "images", "masks"], fingerprint=split)
        (folder / "data" / split / "info.json").write_text(json.dumps(info))
        np.save(folder / "features/dense" / f"{split}-a-t0.5.npy", truth_features(masks, 4).transpose(1, 2).unflatten(2, (8, 8)).numpy())
    (folder / "features/dense/info.json").write_text(json.dumps(dict(
        checkpoint="x", weights="ema", hash="x", pool="none", draws=1, seed=0, data=dict(train="train", test="test"), arrays=[dict(activation="a", t=0.5)])))
    return folder


WORDS = ("method=masks", "features=dense", "objects=2", "K=10", "restarts=4")


def test_masks_bear_the_cluster_of_their_object(run, tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["self_label.py", str(tiny), f"run={run}", *WORDS])
    self_label.main()
    out, info = dict(np.load(run / "labels/masks.npz")), json.loads((run / "labels/masks.json").read_text())
    assert out["masks_train"].dtype == np.uint8 and out["masks_train"].max() <= 10
    for i in range(40):                                   # ids in the mask are those of the boxes, and of the image
        ids = out["ids_train"][i]
        assert set(np.unique(out["masks_train"][i])) == {0, *(ids[ids >= 0] + 1)} and out["train"][i] == ids[0] and (ids[1] >= 0) == (out["boxes_train"][i, 1, 0] >= 0)
    scores = info["scores"]
    assert scores["miou"] > 0.75 and scores["corloc"] > 0.95 and scores["nmi"] > 0.85, scores


def test_two_ranks_write_the_same(run, tiny):
    stage("self_label", tiny, f"run={run}", *WORDS, "name=two", ranks=2)
    stage("self_label", tiny, f"run={run}", *WORDS, "name=one")
    one, two = (np.load(run / "labels" / f"{name}.npz") for name in ("one", "two"))
    assert all((one[k] == two[k]).mean() > 0.999 for k in ("masks_train", "masks_test", "train", "test", "boxes_train"))


def test_bad_input(run, tiny, refuse):
    assert "K=300" in refuse("self_label", tiny, f"run={run}", "method=masks", "features=dense", "K=300")
    assert "cells=0" in refuse("self_label", tiny, f"run={run}", "method=lost", "features=dense", "cells=0")

"""Dense tasks on frozen maps: segmentation, correspondence, layouts; their scores against independent
implementations."""
import itertools
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import stage
from test_features import network
from test_probe_heads import called, run, tiny  # noqa: F401, F811

import extract_features
import probe
import self_label
from configs.data import Split, load_data
from configs.run import ALONE, Data, UserError, digest
from configs.shapes import draw_shapes, shape_parts
from probe import (LinearMap, PixelMlps, Probe, Source, UPer, centred_gram, confusion_matrix, fit_head, matches,
                   mean_iou, pck, pick_points, similarity, warped_pairs, warps)
from self_label import filled
from train_diffusion import Condition

noise = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
NAMES = ["mid-repeat1-res-out", "up-level1-repeat0-res-out"]


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation

def test_mean_iou_against_scikit_learn():
    from sklearn.metrics import jaccard_score
    g = torch.Generator().manual_seed(0)
    truth, found = torch.randint(0, 5, (7, 9, 9), generator=g), torch.randint(0, 5, (7, 9, 9), generator=g)
    truth[0, :3] = -100
    other = jaccard_score(truth[truth >= 0], found[truth >= 0], average="macro")
    table = confusion_matrix(found, truth, 5)
    assert mean_iou(table) == pytest.approx(float(other), abs=1e-6) and table.sum() == (truth >= 0).sum()
    assert table[1, 2] == ((truth == 1) & (found == 2)).sum()
    # a class that occurs nowhere does not count
    assert mean_iou(torch.diag(torch.tensor([3, 0, 4]))) == 1
    # one that is never found counts as 0
    assert mean_iou(torch.tensor([[3, 0, 0], [0, 4, 0], [2, 0, 0]])) == pytest.approx((3 / 5 + 1 + 0) / 3)


def test_linear_map_is_the_linear_classifier_of_enlarged_maps():
    maps = [[noise(2, 4, 3, 3), noise(2, 6, 8, 8, seed=1)], [noise(2, 4, 3, 3, seed=2), noise(2, 6, 8, 8, seed=3)]]
    head, want = LinearMap(2 * [(4, 3, 3), (6, 8, 8)], 5, 12).eval(), 0
    for f, m in zip(head.maps, [m for blocks in maps for m in blocks]):
        want = want + torch.einsum("oc,bchw->bohw", f[1].weight[:, :, 0, 0],
                                   F.interpolate(m, (12, 12),
                                                 mode="bilinear") / math.sqrt(1 + 1e-5)) + f[1].bias.view(-1, 1, 1)
    assert torch.allclose(head(maps), want, atol=1e-5)


def test_members_of_an_ensemble_vote():
    net, maps = PixelMlps([(2, 5, 5), (4, 3, 3)], 4, 5, members=3), [[noise(2, 2, 5, 5), noise(2, 4, 3, 3, seed=1)]]
    alone = net.train()(maps)                             # every member by itself: it learns by its own loss
    assert alone.shape == (6, 4, 5, 5) and not torch.equal(alone[:2], alone[2:4])
    votes = net.eval()(maps)
    assert votes.shape == (2, 4, 5, 5) and (votes.sum(1) == 3).all()
    found = torch.stack([member(torch.cat([maps[0][0], F.interpolate(maps[0][1], (5, 5), mode="bilinear")], 1))
                         for member in net.members]).argmax(2)
    assert torch.equal(votes[:, 2], (found == 2).sum(0).float())


@pytest.mark.parametrize("kind", ["linear", "uper", "ensemble"])
def test_shapes_are_segmented(kind):
    """Trained on few images, each head finds the object's pixels on others, with activations of a random network; void
    pixels are not learnt from."""
    images, _, _, masks = draw_shapes(0, np.arange(60), 16)
    y = torch.from_numpy((masks > 0).astype(np.int16))
    y[:, 0] = -100
    r = Source(network("stem"), dict(path="cv"), ["unet-in", *NAMES], [0.95], kind)
    cfg = Probe(protocol="segment", width=16, images=1_000 if kind == "ensemble" else 3_000, head_batch=20, lr=[1e-2],
                l2=[0.0])
    head = fit_head(ALONE, cfg, r, images, y, 2, np.arange(40), np.arange(40, 50), 0)[0]
    with torch.no_grad():
        found = head.eval()(*r.views(r.shown(images, np.arange(50, 60)), noise(10, 3, 16, 16))).argmax(1)
    assert mean_iou(confusion_matrix(found, y[50:].long(), 2)) > 0.75


def test_uper_reads_every_level_and_time():
    shapes = [(8, 4, 4), (4, 16, 16), (6, 8, 8)]
    head, maps = UPer(shapes, 2, 3, 16, 12), [[noise(2, *s, seed=t).requires_grad_() for s in shapes] for t in (0, 1)]
    out = head(maps)
    out.square().sum().backward()
    assert out.shape == (2, 3, 16, 16) and all(m.grad.any() for blocks in maps for m in blocks)
    assert all(p.grad is not None for p in head.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Correspondence

def test_warp_is_known_and_found():
    """A source point of a warped pair has the target's colour; exact descriptors find every point; PCK counts as
    written out."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    smooth = torch.stack([128 + 100 * torch.sin(x / 5), 128 + 100 * torch.cos(y / 6), 4 * x + 4 * y])[None].expand(5,
        -1, -1, -1).numpy().astype(np.uint8)
    source, target, points, goal, limit = warped_pairs(smooth, None, 3)
    at = goal.long()
    seen = F.grid_sample(torch.from_numpy(source).float(), points[:, :, None], align_corners=False,
                         padding_mode="reflection")[..., 0]
    there = torch.stack([torch.from_numpy(t).float()[:, a[:, 1], a[:, 0]] for t, a in zip(target, at)])
    assert (seen - there).abs().max() < 1 and not np.array_equal(source, target)
    place = torch.stack([torch.cos(x / 8), torch.sin(x / 8), torch.cos(y / 8), torch.sin(y / 8)])[None].expand(5, -1,
        -1, -1)
    same = (goal / 32 * 2 - 1)
    best = similarity(place, place, same, 32).argmax(2)
    assert torch.equal(torch.stack([best % 32, best // 32], 2) + 0.5, goal)
    found = goal + torch.tensor([3.0, 4.0]) * torch.linspace(0, 1, 8)[:, None]   # distances 0 ... 5
    pairs = probe.Pairs(source, target, points, goal, limit)
    assert pck(found, pairs, 2.51 / 32) == 0.5 and pck(found, pairs, 5.01 / 32) == 1
    masks = np.full((5, 32, 32), 255, np.uint8)           # void, but for one object
    masks[:, 10:22, 8:24] = 1
    on = (warped_pairs(smooth, masks, 3)[2] + 1) * 16
    assert on.shape == (5, 8, 2) and (on >= torch.tensor([8, 10])).all() and (on <= torch.tensor([24, 22])).all()
    grid = warps(64, 32, 0)
    # nothing is folded over
    assert grid.shape == (64, 32, 32, 2) and (grid.diff(dim=2)[..., 0] > 0).float().mean() > 0.95


def test_points_lie_where_they_may():
    valid = torch.zeros(3, 6, 6, dtype=torch.bool)
    valid[0, 2, 3] = valid[2, 4:] = True
    at = pick_points(valid, 0)
    assert at.shape == (3, 8) and (at[0] == 15).all() and (at[2] >= 24).all()


def test_matches_do_not_depend_on_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)
    pairs, names = warped_pairs(images, None, 0), ["unet-in", *NAMES]
    source = Source(network("stem"), dict(path="cv"), names, [0.9, 1.0])
    a, b = matches(source, pairs, 7), matches(source, pairs, 3)
    assert set(a) == {(n, t) for n in names for t in (0.9, 1.0)}
    # enlarged small maps have plateaus: there rounding decides
    assert all(torch.equal(a["unet-in", t], b["unet-in", t]) for t in (0.9, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# The protocols, from the command line

def result(run, name):
    return json.loads((run / f"probe/{name}.json").read_text())


WORDS = ["t=0.8", "activations=mid-repeat1-res-out,up-level1-repeat0-res-out", "images=60", "head_batch=20",
         "width=16", "lr=1e-3", "l2=0"]


@pytest.mark.parametrize("head, more", [("uper", ["seeds=0,1"]),
                                        ("linear", ["flip=true", "controls=", "masks=9", "seeds=0"])])
def test_protocol_segment(monkeypatch, tiny, run, head, more):
    teach, taught = probe.train_supervised, []
    monkeypatch.setattr(probe, "train_supervised", lambda *a: taught.append(len(a[-1])) or teach(*a))
    called(monkeypatch, probe, tiny, f"run={run}", "protocol=segment", f"head={head}", f"name={head}", *WORDS, *more)
    got = result(run, head)
    controls = {"random weights", "raw pixels", "supervised, same size"} if head == "uper" else set()
    assert set(got["rows"]) == {head} | controls and (run / f"probe/{head}.png").exists()
    assert all(0 <= r["miou"] <= 1 and r["parameters"] > 0 for r in got["rows"].values())
    assert got["train_images"] == (128 if head == "uper" else 9)
    assert taught == [128] * (2 * (head == "uper"))       # nor does a control see the validation part


def test_protocol_correspond(monkeypatch, tiny, run):
    called(monkeypatch, probe, tiny, f"run={run}", "protocol=correspond", "pairs=300", "t=0.8,0.95",
           "activations=unet-in,mid-repeat1-res-out")
    got = result(run, "correspond")
    assert got["pairs"]["warps"] == 40 and 5 < got["pairs"]["parts"] < 40
    assert set(got["rows"]) == {"features", "random weights", "raw pixels", "supervised, same size"}
    for row in got["rows"].values():                      # each at its own best place
        best, = row["results"]
        chosen = max(best["table"], key=lambda r: r["pck"])
        assert best["best"] == [chosen["activation"], chosen["t"]] and best["warps_0.05"] <= best["warps_0.2"]
    assert len(got["rows"]["features"]["results"][0]["table"]) == 4
    assert all((run / f"probe/correspond{e}.png").exists() for e in ("-warps", "-parts"))


def test_parts_are_known_of_the_whole_set_only(monkeypatch, tiny, run, tmp_path):
    """With data.classes row i is not drawing i: pairs then go by boxes."""
    words = [tiny, f"run={tmp_path}/run", "data.classes=ring,star", "data.train=40", "data.test=40"]
    stage("train_diffusion", *words, "--prepare")
    called(monkeypatch, probe, *words, f"checkpoint={run}/diffusion/base/checkpoint.pt", "protocol=correspond",
           "activations=unet-in", "t=0.8", "pairs=20", "controls=")
    assert set(result(tmp_path / "run", "correspond")["pairs"]) == {"warps", "boxes"}


def test_pairs_of_one_class_need_known_classes(monkeypatch, tiny, run, tmp_path):
    images, _, boxes, _ = draw_shapes(0, np.arange(40))
    boxes[:30, 3] = boxes[:30, 1]                         # of no height: no boxes
    some = dict(images=images.transpose(0, 2, 3, 1), boxes=boxes)
    np.savez(tmp_path / "some.npz", **some, **{f"test_{k}": v for k, v in some.items()})
    words = [tiny, f"run={tmp_path}/run", "data.source=arrays", f"data.root={tmp_path}/some.npz", "data.train=0",
             "data.test=0"]
    stage("train_diffusion", *words, "--prepare")
    called(monkeypatch, probe, *words, f"checkpoint={run}/diffusion/base/checkpoint.pt", "protocol=correspond",
           "activations=unet-in", "t=0.8,0.9", "pairs=40", "controls=")
    got = result(tmp_path / "run", "correspond")
    assert got["pairs"] == dict(warps=40) and got["rows"]["features"]["passes"] == 1     # of the place that was chosen
    masks = np.zeros((2, 4, 4), np.uint8)
    for masks[0, 0, 0] in (0, 255):                       # nothing, and void
        with pytest.raises(UserError, match="no pixel of the training"):
            probe.known_masks(*2 * [Split(None, None, None, masks, {})])
    flat = Split(images, np.zeros(40, int), boxes, None, {})
    with pytest.raises(UserError, match="no two of 1 test images"):
        probe.class_pairs(flat, np.arange(31), 0, np.zeros((40, 2)), np.zeros((40, 2, 2)))
    with pytest.raises(UserError, match="no two of 3 test images"):
        probe.partners(np.arange(3), np.array([0, -1, -1]), 0)


def test_class_pairs_share_a_class_and_the_place_in_the_box(tiny, run):
    class Here:
        dir, data, dry_run = run, Data(), False
    data = load_data(Here, "test")
    masks = np.array(data.masks)
    masks[:, :, ::2] = 255                                # void
    data = replace(data, masks=masks)
    axes = (data.boxes[:, 2:] - data.boxes[:, :2])[:, None] * np.eye(2)
    source, target, points, goal, limit = probe.class_pairs(data, np.arange(40), 0, data.boxes[:, :2], axes)
    where = {x.tobytes(): i for i, x in enumerate(np.asarray(data.images))}
    for s, t, p, q, l in zip(source, target, points, goal, limit):
        i, j = where[s.tobytes()], where[t.tobytes()]
        a, b, p = torch.tensor(data.boxes[i]), torch.tensor(data.boxes[j]), (p + 1) * 16
        assert data.classes[i] == data.classes[j] and i != j and l == (b[2:] - b[:2]).max()
        assert torch.allclose((p - a[:2]) / (a[2:] - a[:2]), (q - b[:2]) / (b[2:] - b[:2]), atol=1e-4)
        assert all(0 < masks[i][int(y), int(x)] < 255 for x, y in p)


@pytest.mark.parametrize("size", [32, 64])
def test_parts_of_shapes(size):
    """The mask of one object, moved by its parts, is that of the other; the goals of pairs are moved in the same
    way."""
    images, classes, boxes, masks = draw_shapes(5, np.arange(300), size, two=0)
    origin, axes = shape_parts(5, np.arange(300), size, two=0)
    for k in range(10):
        i, j = np.flatnonzero(classes == k)[:2]
        y, x = np.mgrid[:size, :size] + 0.5
        # of every pixel of j, where it is in i
        at = (np.stack([x, y], -1) - origin[j]) @ np.linalg.inv(axes[j]).T @ axes[i].T + origin[i]
        col, row = np.floor(at).astype(int).clip(0, size - 1).transpose(2, 0, 1)
        moved, there = masks[i][row, col] > 0, masks[j] > 0
        assert (moved & there).sum() / (moved | there).sum() > (0.8 if size == 32 else 0.9)
    data = Split(images, classes, boxes, masks, {}, None)
    source, target, points, goal, limit = probe.class_pairs(data, np.arange(300), 0, origin, axes)
    where = {x.tobytes(): i for i, x in enumerate(images)}
    for s, t, p, q in zip(source, target, points, goal):
        i, j = where[s.tobytes()], where[t.tobytes()]
        local = [np.linalg.solve(a, v.double().numpy().T - o[:, None]) for v, o,
                 a in (((p + 1) * size / 2, origin[i], axes[i]), (q, origin[j], axes[j]))]
        assert classes[i] == classes[j] and np.allclose(*local, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes without labels; layouts

def test_agreement_of_boxes():
    a = np.array([[0, 0, 4, 4], [4, 4, 8, 8], [0, 4, 4, 8]], float)
    assert probe.box_agreement(a, a) == 1
    assert probe.box_agreement(np.tile(a[:1], (3, 1)), np.tile(a[:1], (3, 1))) == 0


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_layout_of_the_truth_and_of_others(kind):
    images, _, boxes, masks = draw_shapes(4, np.arange(50), two=0)
    asked, exact = masks > 0, probe.objects_of_shapes(images)
    if kind == "box":
        asked, exact = filled(boxes, 32), probe.in_boxes(exact)
    assert probe.overlap_of(asked, exact).mean() > 0.93
    assert probe.overlap_of(np.roll(asked, 1, 0), exact).mean() < (0.65 if kind == "box" else 0.5)
    asked[:25] = False                                    # nothing asked for, where something is
    assert 0.45 < probe.overlap_of(asked, exact).mean() < 0.5
    nothing = np.zeros((1, 4, 4), bool)
    assert probe.overlap_of(nothing, nothing) == 1


@pytest.fixture(scope="module")
def lost(run, tiny):  # noqa: F811
    """Labels with boxes, made as a user would: choice of a place for boxes, dense features, LOST."""
    with pytest.MonkeyPatch.context() as patch:
        called(patch, probe, tiny, f"run={run}", "protocol=boxes", "boxed=12", "t=0.5,0.8", "activations=mid*-out")
        called(patch, extract_features, tiny, f"run={run}", "name=dense", "pool=none", "choice=boxes")
        called(patch, self_label, tiny, f"run={run}", "method=lost", "features=dense", "K=4", "restarts=1")
        called(patch, self_label, tiny, f"run={run}", "method=random", "reference=lost")
        called(patch, self_label, tiny, f"run={run}", "method=classes")
    return run


def test_boxes_are_chosen_without_labels(lost):
    got = result(lost, "boxes")
    best = max(got["table"], key=lambda r: r["stability"] + r["consensus"])
    assert best["activation"] == got["label_free"]["activation"] and best["t"] == got["label_free"]["t"]
    assert "iou" in best and set(got["oracle"]) == {"iou"}
    assert all(-1 <= r["consensus"] <= 1 for r in got["table"]) and (lost / "probe/boxes.png").exists()
    read = json.loads((lost / "features/dense/info.json").read_text())["arrays"][0]
    assert [read["activation"], read["t"]] == [got["label_free"]["activation"], got["label_free"]["t"]]


def test_protocol_layout(monkeypatch, refuse, capsys, tiny, lost):
    """Training images as samples of a model whose bank holds their true boxes: nothing else decides the scores."""
    images, boxes = (np.load(lost / f"data/train/{k}.npy")[:60] for k in ("images", "boxes"))
    state = torch.load(lost / "diffusion/base/checkpoint.pt", weights_only=True)
    maps = np.concatenate([1 - filled(boxes, 32), np.ones((1, 32, 32))]).astype(np.uint8)
    words, layout = [tiny, f"run={lost}", "protocol=layout"], {}
    for labels in ("lost", "classes"):
        (lost / f"guided/{labels}").mkdir(parents=True)
        bank = Condition("map", torch.from_numpy(maps), 1, 32, torch.zeros(61, dtype=torch.long)).state()
        made_of = np.load(lost / f"labels/{labels}.npz")["train"]
        torch.save(state | dict(condition="box", label_file=labels, labels_hash=digest(made_of), bank=bank),
                   lost / f"guided/{labels}/checkpoint.pt")
        (lost / f"samples/{labels}").mkdir(parents=True)
        np.save(lost / f"samples/{labels}/images.npy", images)
        np.save(lost / f"samples/{labels}/labels.npy", np.arange(60))
        about = dict(checkpoint=f"guided/{labels}", hash=state["weights"], recipe=dict(boxes=[]))
        (lost / f"samples/{labels}/metrics.json").write_text(json.dumps(about))
        called(monkeypatch, probe, *words, f"samples={labels}", f"name={labels}")
        layout[labels] = result(lost, labels)
    assert all(r["exact_iou"] > 0.9 and r["images"] == 60 for r in layout.values())
    assert 0 <= layout["lost"]["layout_iou"] < 1 and "layout_iou" not in layout["classes"]
    assert (lost / "probe/lost.png").exists()
    note = lost / "labels/lost.json"
    before = json.loads(note.read_text())
    for change in (dict(draws=2), dict(pool="4")):        # such features are not read here
        note.write_text(json.dumps(before | dict(features=before["features"] | change)))
        assert "several activations or draws" in refuse("probe", *words, "samples=lost", "name=no")
    note.write_text(json.dumps(before))
    np.save(lost / "samples/lost/labels.npy", np.roll(np.arange(60), 1))
    called(monkeypatch, probe, *words, "samples=lost", "name=rolled")
    assert result(lost, "rolled")["exact_iou"] < 0.7
    drawn = dict(recipe=dict(boxes=[[1, 1, 9, 9, 0]]))
    plain = dict(checkpoint="diffusion/base")
    for change, said in ((drawn, "something else"), (dict(hash="other"), "earlier state"), (plain, "without boxes")):
        (lost / "samples/lost/metrics.json").write_text(json.dumps(about | change))
        assert said in refuse("probe", *words, "samples=lost", "name=bad")
    (lost / "samples/lost/metrics.json").write_text(json.dumps(about | dict(checkpoint="guided/lost")))
    made_of = digest(np.load(lost / "labels/lost.npz")["train"])
    for other in (dict(labels_hash="x"), dict(labels_hash=made_of, label_file_hash="x")):
        torch.save(state | dict(condition="box", label_file="lost", bank=bank) | other,
                   lost / "guided/lost/checkpoint.pt")
        assert "other labels than" in refuse("probe", *words, "samples=lost", "name=bad")


def test_objects_in_samples_are_found_as_those_of_the_labels(monkeypatch, tiny, lost):
    """The samples are the training images, the noise is that of the labels: so are their objects, in every setting."""
    images, masks = (np.load(file)[k][:40] if k else np.load(file)[:40] for file, k in
                     ((lost / "data/train/images.npy", ""), (lost / "labels/lost.npz", "masks_train")))
    info = json.loads((lost / "labels/lost.json").read_text())
    read = probe.Source.stream
    monkeypatch.setattr(probe.Source, "stream", lambda self, images, rows, purpose, **k:
                        read(replace(self, seed=0), images, rows, "features train", **k))
    monkeypatch.setattr(sys, "argv", ["probe.py", str(tiny), f"run={lost}"])
    run = probe.start("probe", probe.Probe, "")
    found = probe.found_objects(run, info, images, np.arange(40))
    assert (found == (masks > 0)).mean() > 0.995


# ---------------------------------------------------------------------------------------------------------------------
# Representations; other images

def precise(*shape, seed=0):
    return noise(*shape, seed=seed).double()


def hsic(x, y):
    return float((centred_gram(x) * centred_gram(y)).sum() / (len(x) * (len(x) - 3)))


def test_hsic_is_the_u_statistic():
    """The definition, an average over all ordered quadruples of different samples, written out; a shift and a rotation
    change nothing."""
    x, y = precise(7, 3), precise(7, 2, seed=1) + precise(7, 3)[:, :2]
    K, L = x @ x.T, y @ y.T
    want = np.mean([float(K[i, j] * (L[i, j] + L[k, l] - 2 * L[i, k])) for i, j, k,
                    l in itertools.permutations(range(7), 4)])
    got = hsic(x, y)
    assert got == pytest.approx(want, rel=1e-9)
    assert hsic(x + 5, y - 3) == pytest.approx(got)
    q = torch.linalg.qr(precise(3, 3, seed=2))[0]
    assert hsic(x @ q, y) == pytest.approx(got)


def test_hsic_has_no_bias():
    """For x ~ N(0, I) and y = x A + noise, HSIC is |A|_F^2 however few the samples; the usual estimator is far off."""
    A = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.0, 0.0]]).double()
    x = precise(30_000, 3)
    y = x @ A + 0.5 * precise(30_000, 2, seed=1)
    parts = list(zip(x.split(10), y.split(10)))
    assert np.mean([hsic(a, b) for a, b in parts]) == pytest.approx(float(A.square().sum()), rel=0.05)
    assert np.mean([hsic(a, a) for a, _ in parts]) == pytest.approx(3, rel=0.05)
    centre = lambda v: v - v.mean(0)
    biased = np.mean([float((centre(a).T @ centre(b)).square().sum() / 81) for a, b in parts])
    assert biased > 1.2 * float(A.square().sum())


def test_protocol_cka(monkeypatch, capsys, refuse, tiny, run):
    words = [tiny, f"run={run}", "protocol=cka", "activations=mid-repeat?-res-out,unet-in", "t=0.5,1"]
    called(monkeypatch, probe, *words, "against=random")
    got = result(run, "cka")
    m, where = np.array(got["cka"]), {(r["model"], r["activation"], r["t"]): i for i, r in enumerate(got["table"])}
    assert m.shape == (12, 12) and np.allclose(m, m.T) and np.allclose(np.diag(m), 1)
    assert (run / "probe/cka.png").exists()
    # the same images, the same noise
    assert m[where["diffusion/base", "unet-in", 1.0], where["random", "unet-in", 1.0]] == pytest.approx(1, abs=1e-6)
    called(monkeypatch, probe, *words, "against=random")
    assert "done already" in capsys.readouterr().out
    shutil.copytree(run / "diffusion/base", run / "diffusion/other")
    called(monkeypatch, probe, *words, "against=diffusion/other", "name=other")
    torch.save(torch.load(file := run / "diffusion/other/checkpoint.pt", weights_only=True) | dict(weights="new"), file)
    # trained anew under the same name
    assert "hashes" in refuse("probe", *words, "against=diffusion/other", "name=other")
    assert "no such checkpoint" in refuse("probe", *words, "name=bad", "against=diffusion/none")


@pytest.mark.parametrize("words, said", [
    (["protocol=segment", "head=mlp"], "known: linear, uper"), (["protocol=head", "head=uper"], "known: linear, mlp"),
    (["protocol=cka", "grid=0"], "grid=0")])
def test_bad_input(refuse, tiny, run, words, said):
    assert said in refuse("probe", tiny, f"run={run}", "name=bad", *WORDS, *words)

"""Conditions of images: labels and layouts dropped and mirrored with them, banks; layouts sampled and drawn by hand."""
import json

import numpy as np
import pytest
import torch
from conftest import inside

import sample_ode
from self_label import filled
from train_diffusion import Batch, Condition, GivenLabels, layout_of


def test_boxes_become_pixels():
    none = [-1, -1, -1, -1]
    areas = filled(np.array([[[1, 2, 3, 4], none], [[0, 0, 4, 1], [3, 3, 4, 4]], [none, none]]), 4).any(1)
    assert np.array_equal(areas[0], np.pad(np.ones((2, 2), bool), ((2, 0), (1, 1))))
    assert areas[1].sum() == 5 and areas[1][3, 3] and not areas[2].any()


def map_condition(maps, kinds, labels=None, size=8):
    """The condition of maps [N, h, w], with null as the last row."""
    table = torch.from_numpy(np.concatenate([maps, np.full_like(maps[:1], kinds)]))
    return Condition("map", table, kinds, size, None if labels is None else torch.from_numpy(labels))


def test_layouts_flip_and_drop_with_their_image():
    g = np.random.default_rng(0)
    maps = g.integers(0, 4, (50, 8, 8)).astype(np.uint8)  # 3 = nothing there
    labels = np.append(g.integers(0, 5, 50), 5)
    condition = map_condition(maps, 3, labels)
    u = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(50), None, None, None, u[:, 0] < 0.5, u[:, 1], None, None, 0)
    out = GivenLabels(condition, None, 0.3).step(None, None, None, batch)[1]
    assert out["layout"].shape == (50, 3, 8, 8)
    for i in range(50):
        expected = np.stack([maps[i] == k for k in range(3)])
        expected = expected[..., ::-1] if u[i, 0] < 0.5 else expected
        dropped = u[i, 1] < 0.3
        assert int(out["label"][i]) == (5 if dropped else labels[i])
        assert np.array_equal(out["layout"][i].numpy(), 0 * expected if dropped else expected)
    still = condition(torch.arange(50))
    assert np.array_equal(still["layout"].argmax(1)[maps < 3], maps[maps < 3])


def test_labels_are_dropped_image_by_image():
    labels = torch.arange(1000) % 7
    condition = Condition("label", torch.cat([labels, torch.tensor([7])]))
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(1000), None, None, None, torch.zeros(1000, dtype=bool), u, None, None, 0)
    out = GivenLabels(condition, None, 0.25).step(None, None, None, batch)[1]["label"]
    dropped = u < 0.25                              # a share of the images, not whole batches
    assert torch.equal(out == 7, dropped) and 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(out[~dropped], labels[~dropped])


def test_layouts_are_one_hot_with_a_null():
    out = layout_of(torch.tensor([[[0, 2], [3, 1]]]), 3, 4)
    assert out.shape == (1, 3, 4, 4)
    assert torch.equal(out.sum(1)[0], torch.tensor([[1., 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]))
    assert out[0, 2, 0, 3] == 1 and out[0, 1, 3, 3] == 1


def test_a_bank_of_some_conditions_ends_in_null():
    maps = np.arange(12, dtype=np.uint8).reshape(3, 2, 2) % 4
    bank = map_condition(maps, 4, np.array([5, 6, 7, 9]), 2).bank(0)
    assert bank.null == 3 and (bank.table[-1] == 4).all() and bank.labels[-1] == 9
    for row, label in zip(bank.table[:3], bank.labels):   # maps keep their labels
        assert (row.numpy() == maps[int(label) - 5]).all()
    assert len(map_condition(np.zeros((50, 2, 2), np.uint8), 1).bank(0, 20).table) == 21
    again = Condition(**bank.state())
    told = again(torch.tensor([1, 3]))
    assert torch.equal(told["layout"], bank(torch.tensor([1, 3]))["layout"]) and not told["layout"][1].any()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Ground-truth boxes and masks as conditions: the folder."""
    folder = tmp_path_factory.mktemp("layouts") / "run"
    inside("train_diffusion", tiny, f"run={folder}", "images=64")
    inside("self_label", tiny, f"run={folder}", "method=classes")
    for kind in ("box", "mask"):
        words = ["labels=classes", f"condition={kind}", f"name={kind}", "images=64"]
        inside("train_guided", tiny, f"run={folder}", *words)
    return folder


@pytest.mark.parametrize("kind, channels", [("box", 1), ("mask", 11)])
def test_layout_models_train_and_sample(run, tiny, kind, channels):
    state = torch.load(run / f"guided/{kind}/checkpoint.pt", weights_only=True)
    assert state["known"] == dict(num_labels=10, layout_channels=channels) and state["num_labels"] == 10
    assert state["bank"]["table"].shape == (513, 32, 32) and state["marginal"].shape == (512,)
    words = [tiny, f"run={run}", f"checkpoint=guided/{kind}", "guidance=2", "n=12"]
    inside("sample_ode", *words, f"name={kind}")
    assert (run / f"samples/{kind}/grid.png").stat().st_size > 500


def test_the_unconditional_row_of_the_same_configuration(run, tiny):
    """A YAML that says condition=box serves labels=none, too."""
    inside("train_guided", tiny, f"run={run}", "labels=none", "condition=box", "images=64")
    inside("sample_ode", tiny, f"run={run}", "checkpoint=guided/unconditional", "n=2", "name=plain", "evaluate=false")


def test_hand_drawn_layouts(run, tiny):
    boxes = "boxes=[[4,4,20,28,3],[22,2,30,9,3]]"
    inside("sample_ode", tiny, f"run={run}", "guidance=2", "n=4", "evaluate=false", "checkpoint=guided/box",
          "name=drawn", boxes)
    assert (np.load(run / "samples/drawn/labels.npy") == 0).all()                # one layout
    condition = map_condition(np.ones((2, 8, 8), np.uint8), 1, np.array([0, 1, 5]))
    cfg = sample_ode.SampleOde(boxes=[[1, 1, 4, 6, 3], [5, 5, 8, 8, 3]])
    told = sample_ode.drawn_layout(cfg, dict(condition="box", file="x"), condition, "cpu")
    assert told.labels.tolist() == [3, 5] and told.null == 1 and (told.table[1] == 1).all()
    assert (told.table[0] == 0).sum() == 3 * 5 + 3 * 3 and not told.table[0, 1:6, 1:4].any()


@pytest.mark.parametrize("model, words", [
    ("guided/box", "boxes=[[20,4,4,28,0]]"), ("guided/box", "boxes=[[4,4,8,8]]"),
    ("guided/box", "boxes=[[]]"), ("guided/box", "boxes=[[4,4,9,9,1],[40,40,50,50,1]]"),
    ("guided/box", "boxes=[[5.6,5.6,6.4,6.4,0]]"),
    ("guided/box", "boxes=[[4,4,8,8,77]]"), ("guided/box", "boxes=[[4,4,8,8,1],[9,9,12,12,2]]"),
    ("guided/mask", "boxes=[[4,4,8,8,1]]")])
def test_impossible_layouts_are_refused(run, tiny, refuse, model, words):
    assert "boxes=[" in refuse("sample_ode", tiny, f"run={run}", "n=2", "name=no", f"checkpoint={model}", words)


def test_conditions_need_what_they_name(run, tiny, refuse):
    inside("self_label", tiny, f"run={run}", "method=random", "reference=classes")
    words = [tiny, f"run={run}", "name=no"]
    assert "has no boxes" in refuse("train_guided", *words, "labels=random", "condition=box")
    assert "online only" in refuse("train_guided", *words, "labels=classes", "condition=prototype")
    said = refuse("train_guided", *words, "labels=classes", "init=guided/box")
    assert "condition=box" in said and "start from an unconditional model" in said
    with np.load(run / "labels/random.npz") as f:         # of somebody else, with too few boxes
        np.savez(run / "labels/short.npz", **f, boxes_train=np.zeros((511, 1, 4), np.float32))
    about = json.loads((run / "labels/random.json").read_text())
    (run / "labels/short.json").write_text(json.dumps({k: v for k, v in about.items() if k != "hash"}))
    assert "boxes_train must have" in refuse("train_guided", *words, "labels=short", "condition=box")
    assert "come from a label file" in refuse("train_guided", *words, "labels=online", "condition=set")

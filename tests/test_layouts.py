"""Boxes and masks as conditions: rasterised, mirrored and dropped with their image, sampled from the bank, from test images, and by hand."""
import numpy as np
import pytest
import torch
from conftest import complaint, stage
from PIL import Image

import sample_ode
from train_guided import TrainGuided, bank_of, draw_boxes, layout_condition


def test_boxes_become_pixels():
    maps = draw_boxes(np.array([[[1, 2, 3, 4], [-1, -1, -1, -1]], [[0, 0, 4, 1], [3, 3, 4, 4]], [[-1, -1, -1, -1]] * 2]), 4)
    assert maps.dtype == np.uint8 and np.array_equal(maps[0] == 0, np.pad(np.ones((2, 2), bool), ((2, 0), (1, 1))))
    assert (maps[1] == 0).sum() == 5 and maps[1][3, 3] == 0 and (maps[2] == 1).all()                             # no box: nothing there


def test_layouts_flip_and_drop_with_their_image():
    g = np.random.default_rng(0)
    maps, labels = g.integers(0, 4, (50, 8, 8)).astype(np.uint8), g.integers(0, 5, 50)                           # 3 = nothing there
    u = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    out = layout_condition(labels, maps, 5, 3, TrainGuided(drop=0.3), torch.device("cpu"))(torch.arange(50), u)
    assert out["layout"].shape == (50, 3, 8, 8)
    for i in range(50):
        expected = np.stack([maps[i] == k for k in range(3)])
        expected = expected[..., ::-1] if u[i, 1] < 0.5 else expected
        dropped = u[i, 2] < 0.3
        assert int(out["label"][i]) == (5 if dropped else labels[i])
        assert np.array_equal(out["layout"][i].numpy(), 0 * expected if dropped else expected)
    still = layout_condition(labels, maps, 5, 3, TrainGuided(drop=0.0, flip=False), torch.device("cpu"))(torch.arange(50), u)
    assert np.array_equal(still["layout"].argmax(1)[maps < 3], maps[maps < 3])


def test_bank_ends_in_null():
    bank = bank_of(np.arange(12, dtype=np.uint8).reshape(3, 2, 2) % 4, 4, 0, np.array([5, 6, 7]), 9)
    assert bank["num_labels"] == 3 and (bank["maps"][-1] == 4).all() and bank["bank_labels"][-1] == 9 and len(bank["marginal"]) == 3
    assert len(bank_of(np.zeros((50, 2, 2), np.uint8), 1, 0, size=20)["maps"]) == 21


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Ground-truth boxes and masks as conditions: the folder."""
    folder = tmp_path_factory.mktemp("layouts") / "run"
    stage("train_diffusion", tiny, f"run={folder}", "images=64")
    stage("self_label", tiny, f"run={folder}", "method=classes")
    for kind in ("box", "mask"):
        stage("train_guided", tiny, f"run={folder}", "labels=classes", f"condition={kind}", f"name={kind}")
    return folder


@pytest.mark.parametrize("kind, channels", [("box", 1), ("mask", 11)])
def test_layout_models_train_and_sample(run, tiny, kind, channels):
    state = torch.load(run / f"guided/{kind}/checkpoint.pt", weights_only=True)
    assert state["conditions"] == dict(num_labels=10, layout_channels=channels) and state["maps"].shape == (513, 32, 32)
    words = [tiny, f"run={run}", f"checkpoint=guided/{kind}", "guidance=2", "n=12"]
    stage("sample_ode", *words, f"name={kind}")
    stage("sample_ode", *words, f"name={kind}-test", "layouts=test", "evaluate=false")
    assert all((run / f"samples/{kind}{end}/grid.png").stat().st_size > 500 for end in ("", "-test"))


def test_the_unconditional_row_of_the_same_configuration(run, tiny):
    """A YAML that says condition=box serves labels=none, too."""
    stage("train_guided", tiny, f"run={run}", "labels=none", "condition=box", "images=64")
    stage("sample_ode", tiny, f"run={run}", "checkpoint=guided/unconditional", "n=2", "name=plain", "evaluate=false")


def test_hand_drawn_layouts(run, tiny, tmp_path):
    stage("sample_ode", tiny, f"run={run}", "checkpoint=guided/box", "guidance=2", "n=4", "name=drawn", "boxes=[[4,4,20,28,3],[22,2,30,9]]", "evaluate=false")
    assert (np.load(run / "samples/drawn/labels.npy") == 0).all()                # one layout
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 2
    Image.fromarray(mask).save(tmp_path / "mask.png")
    stage("sample_ode", tiny, f"run={run}", "checkpoint=guided/mask", "guidance=2", "n=4", "name=painted", f"mask={tmp_path / 'mask.png'}", "evaluate=false")


def test_a_drawn_layout_never_stands_without_a_label(run, tmp_path):
    """In training both are dropped together: the null label beside a layout would be a condition that the network has never seen."""
    bank = np.zeros((4, 8, 8), np.uint8)
    bank[0, :4], bank[1, :4], bank[2, 2:6], bank[3] = 1, 2, 2, 3                  # the last is null: kinds = 3
    state = lambda condition, maps: dict(size=8, condition=condition, file="x", map_labels=3 if condition == "mask" else 1, maps=torch.from_numpy(maps.copy()),
                                         bank_labels=torch.tensor([4, 2, 2, 5]))
    mask = np.zeros((8, 8), np.uint8)
    mask[5:, 5:] = 2
    Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = state("mask", bank)
    sample_ode.read_layouts(None, sample_ode.SampleOde(mask=str(tmp_path / "mask.png")), asked)
    assert asked["bank_labels"].tolist() == [2, 5] and (asked["maps"][0].numpy() == mask).all() and (asked["maps"][-1] == 3).all()
    asked = state("box", np.minimum(bank, 1))
    sample_ode.read_layouts(None, sample_ode.SampleOde(boxes=[[1, 1, 4, 6]]), asked)
    assert asked["bank_labels"].tolist() == [2, 4, 5] and asked["marginal"].tolist() == [2 / 3, 1 / 3] and asked["num_labels"] == 2
    asked = state("box", np.minimum(bank, 1))
    sample_ode.read_layouts(None, sample_ode.SampleOde(boxes=[[1, 1, 4, 6, 3], [5, 5, 8, 8]]), asked)
    assert asked["bank_labels"].tolist() == [3, 5] and asked["num_labels"] == 1


@pytest.mark.parametrize("words, part", [
    (["checkpoint=guided/box", "boxes=[[4,4,40,28]]"], "boxes=[4"), (["checkpoint=guided/box", "boxes=[[20,4,4,28]]"], "x0 < x1"), (["checkpoint=guided/box", "boxes=[[4,4,8,8,77]]"], "label"),
    (["checkpoint=guided/box", "boxes=[[4,4,8,8,1],[9,9,12,12,2]]"], "one label"),
    (["checkpoint=guided/mask", "boxes=[[4,4,8,8]]"], "needs box"), (["checkpoint=guided/mask", "mask=/nowhere.png"], "cannot be read"), (["checkpoint=diffusion/base", "layouts=test"], "condition=label")],
    ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_impossible_layouts_are_refused(run, tiny, capsys, monkeypatch, words, part):
    assert part in complaint(capsys, monkeypatch, "sample_ode", tiny, f"run={run}", "n=2", "name=no", *words)


def test_conditions_need_what_they_name(run, tiny, capsys, monkeypatch):
    stage("self_label", tiny, f"run={run}", "method=random", "reference=classes")
    assert "has no boxes" in complaint(capsys, monkeypatch, "train_guided", tiny, f"run={run}", "labels=random", "condition=box", "name=no")
    assert "online only" in complaint(capsys, monkeypatch, "train_guided", tiny, f"run={run}", "labels=classes", "condition=prototype", "name=no")

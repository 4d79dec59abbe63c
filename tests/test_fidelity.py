"""How samples keep to layouts, sets of labels as a condition, long-tailed data and scores of its head and tail; the chain on a long-tailed run."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import extract_features
import probe
import sample_ode
import self_label
import train_diffusion
import train_guided
from sample_ode import Evaluation, frechet, head_and_tail, layout_fidelity, warm
from configs.data import long_tail
from configs.run import UserError, fill, seed_of
from configs.shapes import draw_shapes
from train_diffusion import Condition, build_model
from train_guided import draw_boxes, label_sets

TAIL = "data.imbalance=8"


# ---------------------------------------------------------------------------------------------------------------------
# Layouts

def test_exact_masks_of_shapes():
    images, _, _, masks = draw_shapes(3, np.arange(300))
    got = warm(images)
    assert ((masks > 0) & got).sum() / ((masks > 0) | got).sum() > 0.95


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_fidelity_of_the_truth_and_of_others(kind, tmp_path):
    images, _, boxes, masks = draw_shapes(4, np.arange(50), two=0)
    maps = draw_boxes(boxes[:, None], 32) if kind == "box" else masks
    state = dict(condition=kind, label_file="none", maps=torch.from_numpy(maps), map_labels=1 if kind == "box" else 11, size=32)
    run = SimpleNamespace(dir=tmp_path, world=1, gather=lambda v: [v], data=SimpleNamespace(source="shapes"))
    fidelity = lambda labels: layout_fidelity(run, None, state, images, np.arange(50), labels, None)
    assert fidelity(np.arange(50))["exact_iou"] > 0.93 and fidelity(np.roll(np.arange(50), 1))["exact_iou"] < (0.65 if kind == "box" else 0.5)
    state["maps"][:25] = 1 if kind == "box" else 0        # nothing asked for, where something is
    assert 0.45 < fidelity(np.arange(50))["exact_iou"] < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Sets

def test_sets_add_embeddings_and_drop_to_null(tiny):
    labels = dict(train=np.array([2, 0, 1]), ids_train=np.array([[2, 0, -1], [0, -1, -1], [1, 1, 2]]))
    sets = label_sets(labels, 4, "x")
    assert sets.tolist() == [[True, False, True, False], [True, False, False, False], [False, True, True, False]]
    condition = Condition("vector", torch.from_numpy(np.pad(sets, ((0, 1), (0, 0)))))
    vector = condition(torch.arange(3), torch.tensor([False, True, False]))["vector"]
    assert torch.equal(vector, torch.tensor([[1., 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]))
    model = fill("model", train_diffusion.Model, dict(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16, stem=4))
    net = build_model(model, 32, seed=0, vector_dim=4).eval()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)             # networks start with zeros at the end of every branch, which would hide all
    weight = net.vector_emb.weight                        # [width, 4]
    assert torch.allclose(net.vector_emb(vector)[0], weight[:, 0] + weight[:, 2]) and not net.vector_emb(vector)[1].any()
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([300., 700.])
    with torch.no_grad():
        assert torch.equal(net(x, t, **condition(torch.tensor([3, 3]))), net(x, t))              # null: exactly nothing
        assert not torch.equal(net(x, t, **condition(torch.tensor([0, 2]))), net(x, t))


def test_sets_need_several_labels():
    with pytest.raises(UserError, match="no ids_train"):
        label_sets(dict(train=np.zeros(3, int)), 4, "kmeans")


# ---------------------------------------------------------------------------------------------------------------------
# Long tails

@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_long_tail_counts(ratio):
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    rows = long_tail(classes, ratio, 0)
    assert np.array_equal(np.bincount(classes[rows]), [int(500 * ratio ** (-k / 9) + 1e-9) for k in range(10)]) and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, long_tail(classes, ratio, 0)) and (ratio == 1 or not np.array_equal(rows, long_tail(classes, ratio, 1)))


def test_head_and_tail_scores():
    assert head_and_tail(np.repeat(np.arange(6), [5, 50, 10, 40, 1, 3])) == dict(head=[1, 3], tail=[5, 4])
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(400, 4, generator=g), torch.randn(200, 4, generator=g) + 0.2
    net = SimpleNamespace(head=lambda x: torch.stack([x[:, 0], -x[:, 0], torch.full_like(x[:, 0], -9)], 1))     # class 0 where the first feature is positive
    judge = SimpleNamespace(net=net, run=SimpleNamespace(device="cpu"), groups=dict(head=[0], tail=[2]), real=real.numpy(), kind="frechet")
    out = Evaluation.apart(judge, fake)
    assert out["head"]["frechet"] == pytest.approx(frechet(fake[fake[:, 0] > 0], real[real[:, 0] > 0])) and out["head"]["samples"] == (fake[:, 0] > 0).sum()
    assert "frechet" not in out["tail"] and out["tail"]["samples"] == 0          # nothing to fit a Gaussian to


# ---------------------------------------------------------------------------------------------------------------------
# The chain

@pytest.fixture(scope="module")
def call(tiny, tmp_path_factory):
    """call(module, *words): run a stage in this process on a long-tailed run; call.dir is the folder."""
    folder = tmp_path_factory.mktemp("tail") / "run"

    def stage(module, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{module.__name__}.py", str(tiny), f"run={folder}", TAIL, *words])
            module.main()
    stage.dir = folder
    stage(train_diffusion, "images=64")
    stage(probe, "protocol=boxes", "boxed=16", "t=0.5,0.8")
    stage(extract_features, "name=dense", "pool=none", "choice=boxes")
    stage(self_label, "method=lost", "features=dense", "objects=2")
    stage(self_label, "method=random", "reference=lost")
    return stage


def test_long_tailed_data(call):
    train, test = (json.loads((call.dir / f"data/{s}/info.json").read_text()) for s in ("train", "test"))
    classes = draw_shapes(seed_of(0, "train"), np.arange(512))[1]
    full = np.bincount(classes)
    assert train["class_counts"] == [min(full[k], max(1, int(full.max() * 8 ** (-k / 9) + 1e-9))) for k in range(10)] and sum(train["class_counts"]) == train["count"]
    assert test["count"] == 256 and all(len(np.load(call.dir / f"data/train/{k}.npy")) == train["count"] for k in train["arrays"])
    images, masks = (np.load(call.dir / f"data/train/{k}.npy") for k in ("images", "masks"))
    assert ((masks > 0) & warm(images)).sum() / ((masks > 0) | warm(images)).sum() > 0.95              # rows still belong together


def test_layout_models_report_fidelity_and_tails(call, capsys):
    for labels in ("lost", "random"):                     # random: the same boxes, of other images, found by the same labeller
        call(train_guided, f"labels={labels}", "condition=box", "images=64")
        call(sample_ode, f"checkpoint=guided/{labels}", f"name={labels}", "guidance=2", "n=40")
        m = json.loads((call.dir / f"samples/{labels}/metrics.json").read_text())
        assert 0 <= m["layout"]["layout_iou"] <= 1 and "exact_iou" not in m["layout"]        # the data tell one box, these labels up to two
        assert {"head", "tail"} <= set(m["scores"]) and m["scores"]["head"]["classes"] == [0, 1, 2][:len(m["scores"]["head"]["classes"])]
    call(sample_ode, "--table")
    assert "layout IoU" in capsys.readouterr().out


def test_sets_train_and_sample(call):
    call(train_guided, "labels=lost", "condition=set", "name=sets", "images=64")
    call(sample_ode, "checkpoint=guided/sets", "name=sets", "guidance=2", "n=12", "evaluate=false")
    state = torch.load(call.dir / "guided/sets/checkpoint.pt", weights_only=True)
    sets = state["bank"]["table"]
    assert state["conditions"] == dict(vector_dim=6) and not sets[-1].any() and sets[:-1].any(1).all()


def test_bad_input(call, tiny, refuse):
    words = [tiny, f"run={call.dir}", TAIL]
    assert "imbalance=0.5" in refuse("train_diffusion", tiny, f"run={call.dir}-x", "data.imbalance=0.5")
    call(self_label, "method=classes")
    assert "no ids_train" in refuse("train_guided", *words, "labels=classes", "condition=set", "name=no")
    call(train_guided, "labels=classes", "condition=box", "name=truth", "images=64")
    assert "finder=classes" in refuse("sample_ode", *words, "checkpoint=guided/truth", "finder=classes", "n=4", "name=no", "evaluate=false")

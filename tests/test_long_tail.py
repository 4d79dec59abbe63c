"""Sets of labels as a condition; long-tailed data, and scores of its frequent and rare classes."""
import json
import sys

import numpy as np
import pytest
import torch

import extract_features
import probe
import sample_ode
import self_label
import train_diffusion
import train_guided
from sample_ode import frechet, tail_scores
from configs.data import long_tail
from configs.run import UserError, fill, seed_of
from configs.shapes import draw_shapes
from train_diffusion import Condition, build_model
from train_guided import label_sets

TAIL = "data.imbalance=8"


# ---------------------------------------------------------------------------------------------------------------------
# Sets

def test_sets_add_embeddings_and_drop_to_null(tiny):
    labels = dict(train=np.array([2, 0, 1]), ids_train=np.array([[2, 0, -1], [0, -1, -1], [1, 1, 2]]))
    sets = label_sets(labels, 4, "x")
    assert sets.tolist() == [[True, False, True, False], [True, False, False, False], [False, True, True, False]]
    condition = Condition("vector", torch.from_numpy(np.pad(sets, ((0, 1), (0, 0)))))
    vector = condition(torch.arange(3), torch.tensor([False, True, False]))["vector"]
    assert torch.equal(vector, torch.tensor([[1., 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]))
    model = fill("model", train_diffusion.Model,
                 dict(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16, stem=4))
    net = build_model(model, 32, seed=0, vector_dim=4).eval()
    for p in net.parameters():
        if not p.any():
            # networks start with zeros at the end of every branch, which would hide all
            torch.nn.init.normal_(p, std=0.1)
    weight = net.vector_emb.weight                        # [width, 4]
    assert torch.allclose(net.vector_emb(vector)[0], weight[:, 0] + weight[:, 2])
    assert not net.vector_emb(vector)[1].any()
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
    assert (
        np.array_equal(np.bincount(classes[rows]), [int(500 * ratio ** (-k / 9) + 1e-9) for k in range(10)])
        and (np.diff(rows) > 0).all()
    )
    assert np.array_equal(rows, long_tail(classes, ratio, 0)) and (
        ratio == 1 or not np.array_equal(rows, long_tail(classes, ratio, 1))
    )


def test_head_and_tail_scores():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(400, 4, generator=g), torch.randn(200, 4, generator=g) + 0.2
    # class 1 where the first feature is positive, else class 3, never another
    head = lambda x: torch.stack([x[:, 0] * 0 - 9, x[:, 0], x[:, 0] * 0 - 9, -x[:, 0]], 1)
    out = tail_scores(head, [5, 50, 1, 10], fake, real)
    assert out["head"]["classes"] == [1] and out["tail"]["classes"] == [2]
    assert out["head"]["frechet"] == pytest.approx(frechet(fake[fake[:, 0] > 0], real[real[:, 0] > 0]))
    assert out["head"]["samples"] == (fake[:, 0] > 0).sum()
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
    assert (
        train["class_counts"] == [min(full[k], max(1, int(full.max() * 8 ** (-k / 9) + 1e-9))) for k in range(10)]
        and sum(train["class_counts"]) == train["count"]
    )
    assert test["count"] == 256 and all(
        len(np.load(call.dir / f"data/train/{k}.npy")) == train["count"] for k in train["arrays"]
    )
    images, masks = (np.load(call.dir / f"data/train/{k}.npy") for k in ("images", "masks"))
    warm = images[:, 0].astype(int) - images[:, 2] > 20   # as objects of shapes are
    assert ((masks > 0) & warm).sum() / ((masks > 0) | warm).sum() > 0.95        # rows still belong together


def test_long_tailed_models_report_head_and_tail(call, capsys):
    call(train_guided, "labels=lost", "condition=box", "images=64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ode, "JUDGE_UPDATES", 1)     # which it would refuse
        call(sample_ode, "checkpoint=guided/lost", "name=lost", "guidance=2", "n=40", "evaluator=judge")
    m = json.loads((call.dir / "samples/lost/metrics.json").read_text())
    assert {"head", "tail"} <= set(m["scores"]) and m["scores"]["head"]["classes"] == [0, 1, 2][
        : len(m["scores"]["head"]["classes"])
    ]


def test_sets_train_and_sample(call):
    call(train_guided, "labels=lost", "condition=set", "name=sets", "images=64")
    call(sample_ode, "checkpoint=guided/sets", "name=sets", "guidance=2", "n=12", "evaluate=false")
    state = torch.load(call.dir / "guided/sets/checkpoint.pt", weights_only=True)
    table = state["bank"]["table"]
    assert state["known"] == dict(vector_dim=6) and not table[-1].any() and table[:-1].any(1).all()


def test_bad_input(call, tiny, refuse):
    words = [tiny, f"run={call.dir}", TAIL]
    assert "imbalance=0.5" in refuse("train_diffusion", tiny, f"run={call.dir}-x", "data.imbalance=0.5")
    assert "boxed=1" in refuse("probe", *words, "protocol=boxes", "boxed=1", "name=no")
    call(self_label, "method=classes")
    assert "no ids_train" in refuse("train_guided", *words, "labels=classes", "condition=set", "name=no")

"""Heads trained on the fly: sizes, gradients, feedback, protocols; properties of activations and the selection by
them."""
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, stage
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from test_features import inputs, network

import extract_features
import probe
from configs.run import ALONE, Data, Model, UserError
from extract_features import catalogue, reader
from probe import (DifFeed, DifFormer, Probe, Source, accuracy, build_head, controls, evaluate, fit_head, granularity,
                   labelled, locality, logistic, mirrors, noise_sensitivity, properties, why_dropped)
from train_diffusion import UNet, build_model, time_embedding

HEADS = ["linear", "mlp", "cnn", "attention", "difformer", "diffeed"]
SMALL = Probe(protocol="head", width=32, depth=1, images=2_000, head_batch=50, lr=[1e-5, 1e-2], l2=[0.0], batch=64)
NAMES = ["mid-repeat1-res-out", "up-level0-repeat1-res-out", "up-level1-repeat0-res-out"]
size = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())


def source(net, head, **options):
    """What a head of this kind reads here."""
    several = head == "difformer"
    about = dict(names=NAMES if several else NAMES[1:2], times=[0.7, 0.95] if several else [0.9], batch=64) | options
    return Source(net, dict(path="cv", size=16, channels=3), head=head, **about)


# ---------------------------------------------------------------------------------------------------------------------
# Heads

def test_sizes_at_the_shapes_of_the_papers():
    """Trained parameters as the released code implies: attention 27.8 M, DifFormer 31.8 M, feedback 2.76 M; pairs b ->
    38 - b of the 37 blocks."""
    b19, b24, b30 = (1024, 8, 8), (1024, 16, 16), (512, 64, 64)
    with torch.device("meta"):
        attention, fused = DifFormer([b24], 1, 1000), DifFormer([b19, b24, b30], 3, 1000)
        net = UNet(256, 3, 6, 256, [1, 1, 2, 2, 4, 4], 2, [32, 16, 8], 64)
    assert round(size(attention) / 1e6, 1) == 27.8 and round(size(fused) / 1e6, 1) == 31.8
    assert len(net.input_blocks) == len(net.output_blocks) == 18
    pairs, names = mirrors(net), {n: m for n, (m, _) in catalogue(net).items()}
    assert [next(i for i, b in enumerate(net.input_blocks) if b[-1] is m) + 1 for _, m in pairs] == [2, 5, 8, 11, 14,
        17]
    assert [next(i for i, b in enumerate(net.output_blocks) if b[-1] is names[n]) + 20 for n, _ in pairs] == [36, 33,
        30, 27, 24, 21]
    with torch.device("meta"):
        shapes = [(c, 1, 1) for c in (256, 256, 512, 512, 1024, 1024)]
        feedback = DifFeed(Source(net, {}, [""], [0.9]), shapes, b24, 1000)
    assert round(size(feedback.back) / 1e6, 2) == 2.76 and size(feedback) == size(attention) + size(feedback.back)


@pytest.mark.parametrize("kind", HEADS)
def test_shapes_and_reach_of_gradients(kind):
    """Every parameter that is trained gets a gradient, the network none, in DifFeed although gradients go through
    it."""
    net, (x, _) = network("unet"), inputs()
    r = source(net, kind)
    head = build_head(SMALL, r, np.zeros((1, 3, 16, 16), np.uint8), 5, seed=0)
    out = head(*r.views(x, torch.randn(x.shape)))
    assert out.shape == (3, 5) and r.passes == {"difformer": 2, "diffeed": 2}.get(kind, 1)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert not {id(p) for p in head.parameters()} & {id(p) for p in net.parameters()}
    assert not any(m._forward_hooks for m in net.modules())


def test_attention_head_by_hand():
    """CLS and tokens of one map through pre-norm blocks: DifFormer of one block and one time."""
    head, x, cfg = DifFormer([(8, 6, 6)], 1, 5, 16, 2, 4, side=3), torch.randn(2, 8, 6, 6), torch.nn.functional
    norm, conv = head.tokens[0][1:]
    y = cfg.layer_norm(x.unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5)), (8, 3, 3), norm.weight, norm.bias)
    y = torch.cat([torch.zeros(2, 1, 16),
                   torch.einsum("bchw,dc->bhwd", y, conv.weight[:, :, 0, 0]).flatten(1, 2) + conv.bias], 1)
    for b in head.blocks:
        q, k, v = (u.unflatten(2, (4, 4)).transpose(1, 2) for u in b.attn.qkv(b.norm1(y)).chunk(3, -1))
        y = y + b.attn.proj(((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y + b.mlp.fc2(cfg.gelu(b.mlp.fc1(b.norm2(y))))
    assert torch.allclose(head([[x]]), head.out(y[:, 0]), atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "stem"])
def test_feedback(kind):
    """Zeroed feedback is the plain pass bit for bit; otherwise the sums go on through the encoder and the skips, as in
    a pass written by hand."""
    net, (x, t) = network(kind), inputs()
    name, (sources, targets) = "up-level0-repeat1-res-out", zip(*mirrors(net))
    kept = reader(net, sources, "none")(x, t / 1000)
    named = reader(net, [name], "none")(x, t / 1000)[0].shape[1:]
    head = DifFeed(Source(net, {}, [name], [0.9]), [k.shape[1:] for k in kept], named, 5, 32, 1).eval()
    for g in head.back:
        torch.nn.init.zeros_(g[1].weight)
    assert torch.equal(head([kept], x, t / 1000), head.head([reader(net, [name], "none")(x, t / 1000)]))
    for g in head.back:
        torch.nn.init.ones_(g[1].weight)
    added, skips, h = {id(m): g(k) for m, g,
                       k in zip(targets, head.back, kept)}, [], torch.nn.functional.pixel_unshuffle(x, net.stem)
    emb = net.time_embed(time_embedding(t, net.channels))
    through = lambda m, h: m(h, emb) if hasattr(m, "emb_layers") else m(h)
    for block in net.input_blocks:
        for m in block:
            h = through(m, h) + added.get(id(m), 0)
        skips.append(h)
    for m in net.middle_block:
        h = through(m, h)
    for i in (0, 1):
        h = torch.cat([h, skips.pop()], 1)
        for m in net.output_blocks[i][:1] if i else net.output_blocks[i]:
            h = through(m, h)
    assert torch.allclose(head([kept], x, t / 1000), head.head([[h]]), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Training them

def toy(n, seed=0):
    """Images uint8 [n, 3, 16, 16] of four classes: colour and direction of stripes, at random phases."""
    g = np.random.default_rng(seed)
    y, phase, wave = g.integers(0, 4, n), g.integers(0, 4, (n, 1, 1)), np.arange(16)
    stripes = ((wave[None, :, None] + 0 * wave + phase) // 2 % 2 * 255)
    images = np.full((n, 3, 16, 16), 60)
    images[np.arange(n), y % 2] = np.where((y < 2)[:, None, None], stripes, stripes.transpose(0, 2, 1))
    return (images * 0.7 + g.integers(0, 40, images.shape)).astype(np.uint8), torch.from_numpy(y)


@pytest.mark.parametrize("kind", HEADS)
def test_toy_set_is_learnt(kind):
    """The better learning rate is selected on validation rows, and the head is right on images it has not seen."""
    net, (images, y) = network("stem"), toy(400)
    several = kind == "difformer"
    r = source(net, kind, names=NAMES[:2] if several else NAMES[:1], times=[0.8, 1.0] if several else [0.95])
    head, chosen = fit_head(ALONE, SMALL, r, images, y, 4, np.arange(300), np.arange(300, 350), 0)
    accuracy, = evaluate([head], r, images, y, np.arange(350, 400), 0, "test")
    assert chosen["lr"] == 1e-2 and chosen["validation"] > 0.85 and accuracy[0] > 0.85


def test_scores_depend_on_seed_and_image_alone():
    net, (images, y) = network("stem"), toy(40)
    r, rows = source(net, "attention", names=NAMES[:1]), np.arange(40)
    cfg = replace(SMALL, images=40, head_batch=20, lr=[1e-3])
    heads = [fit_head(ALONE, cfg, r, images, y, 4, rows, rows, seed)[0] for seed in (0, 0, 1)]
    a, b, c = (torch.cat([p.flatten() for p in h.parameters()]) for h in heads)
    assert torch.equal(a, b) and not torch.allclose(a, c)
    loss = [evaluate(heads[:1], replace(r, batch=batch), images, y, rows, 0, purpose)[0][1]
            for batch, purpose in ((40, "p"), (7, "p"), (40, "q"))]
    assert loss[0] == pytest.approx(loss[1], abs=1e-4) and abs(loss[0] - loss[2]) > 1e-5
    # of answers
    shares = [evaluate(heads[:1], r, images, torch.full_like(y, k), rows, 0, "p")[0][0] for k in range(4)]
    assert sum(shares) == pytest.approx(1) and shares[0] < 1


def test_heads_read_latents():
    """As many channels as the latents have, raw ones too, which are not called pixels; mirrored ones of their own."""
    net = build_model(Model(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16), 8,
                      4).eval().requires_grad_(False)
    rows, y, latents = np.arange(40), torch.arange(40) % 3, np.random.default_rng(0).normal(size=(40, 2, 8, 8,
        8)).astype(np.float16)
    cfg = replace(SMALL, images=100, lr=[1e-3], controls=["pixels"], flip=True)
    here, fit, val = SimpleNamespace(data=Data(latents="x")), rows[:30], rows[30:]
    whole = Source(net, dict(path="cv", size=8, channels=4), NAMES[:2], [0.5, 0.9], "difformer")
    train = SimpleNamespace(inputs=latents, classes=y.numpy())
    found = {"difformer": whole} | controls(here, cfg, whole, train, fit)
    assert set(found) == {"difformer", "raw latents"}
    assert all(0 <= fit_head(ALONE, cfg, s, latents, y, 3, fit, val, 0)[1]["validation"] <= 1 for s in found.values())
    once, mirrored = (whole.shown(latents, rows, torch.full((40,), flip)) for flip in (False, True))
    assert torch.equal(mirrored, torch.from_numpy(latents[:, 1, :4]).float()) and not torch.equal(once, mirrored)


def test_labelled_subsets():
    y, rows = np.repeat([0, 1, 2], [100, 50, 10]), np.arange(10, 160)
    assert np.array_equal(labelled(y, rows, 1.0, 0), rows)
    sets = [labelled(y, rows, share, 0) for share in (0.01, 0.1, 0.5)]
    assert [np.bincount(y[s]).tolist() for s in sets] == [[1, 1, 1], [9, 5, 1], [45, 25, 5]]
    assert all(set(a) <= set(b) <= set(rows) for a, b in pairwise(sets))
    assert set(sets[1]) != set(labelled(y, rows, 0.1, 1))


@pytest.mark.parametrize("N, D, K, l2, spread",
                         [(600, 20, 5, 1e-3, 1.0), (300, 40, 3, 1e-2, 0.3), (400, 10, 2, 1e-5, 3.0),
                          (50, 80, 4, 1e-3, 1.0), (600, 300, 10, 1e-5, 1.0)])
def test_logistic_regression(N, D, K, l2, spread):
    """Loss and answers of scikit-learn's solver; overlapping, separable and under-determined classes."""
    g = torch.Generator().manual_seed(N)
    y = torch.randint(K, (N,), generator=g)
    x = spread * torch.randn(K, D, generator=g)[y] / math.sqrt(D / 4) + torch.randn(N, D, generator=g)
    w, oracle = logistic(x, y, K, l2), LogisticRegression(C=1 / (l2 * N), max_iter=5000, tol=1e-8).fit(x.numpy(),
        y.numpy())
    coef, bias = ((torch.from_numpy(v).float() for v in (oracle.coef_, oracle.intercept_)) if K > 2 else
                  # two classes: one row there
                  (torch.from_numpy(np.concatenate([-v, v])).float() / 2 for v in (oracle.coef_, oracle.intercept_)))
    theirs = torch.cat([coef.T, bias[None]])
    loss = lambda w: float(F.cross_entropy(x @ w[:-1] + w[-1], y) + 0.5 * l2 * w[:-1].square().sum())
    assert loss(w) < loss(theirs) + 2e-4 and abs(accuracy(w, x, y) - oracle.score(x.numpy(), y.numpy())) < 0.01
    # from the answer of another l2: the same minimum
    again = logistic(x, y, K, l2, start=logistic(x, y, K, 10 * l2))
    assert abs(loss(again) - loss(w)) < 2e-4


def test_nearest_neighbours_against_scikit_learn():
    g = np.random.default_rng(0)
    x, y, new, truth = (torch.from_numpy(v)
                        for v in (g.normal(size=(300, 7)).astype(np.float32), g.integers(4, size=300),
                                  g.normal(size=(90, 7)).astype(np.float32), g.integers(4, size=90)))
    # ties are broken otherwise there: odd votes of four classes may tie
    for k in (1, 5, 300):
        votes = KNeighborsClassifier(k, metric="cosine", weights=lambda d: 1 + 1e-3 * (1 - d)).fit(x, y).score(new,
            truth)
        assert abs(probe.knn(x, y, new, truth, k) - votes) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Properties

def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_properties_of_known_fields():
    """Additive noise; white, blocky and first-order autoregressive fields, whose autocorrelation falls to 1/e where the
    formula says; positions shuffled."""
    for s in (0.0, 0.5, 2.0):
        a, b = (noise(200, 8, 8, 8) + s * noise(200, 8, 8, 8, seed=seed) for seed in (1, 2))
        assert noise_sensitivity(a, b) == pytest.approx(math.sqrt(s ** 2 / (1 + s ** 2)), abs=0.02)
    white, fall = noise(32, 8, 16, 16), 1 - 1 / math.e
    assert granularity(white, 16) == pytest.approx(fall, rel=0.02)
    assert granularity(white, 64) == pytest.approx(4 * fall, rel=0.02)
    assert granularity(white.repeat_interleave(4, 2).repeat_interleave(4, 3), 64) == pytest.approx(4 * fall, rel=0.05)
    each = noise(32, 8, 4, 4)
    # a constant per image
    assert granularity(each + 5 * noise(32, 8, 1, 1, seed=3),
                       32) == pytest.approx(granularity(each, 32)) == pytest.approx(8 * fall, rel=0.1)
    ar = noise(64, 8, 64, 64)
    for axis in (2, 3):
        for i in range(1, 64):
            ar.select(axis, i).mul_(math.sqrt(1 - 0.8 ** 2)).add_(ar.select(axis, i - 1), alpha=0.8)
    assert granularity(ar, 64) == pytest.approx(-1 / math.log(0.8), rel=0.05)
    shuffled = ar.flatten(2)[..., torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))].reshape(ar.shape)
    ramp = torch.stack([f(0.1 * torch.arange(16.0)).expand(16, 16) for f in (torch.sin, torch.cos)] * 2)
    ramp[2:] = ramp[2:].transpose(1, 2).clone()
    assert abs(locality(white)) < 0.02 and abs(locality(shuffled)) < 0.02 < locality(ar[..., :16, :16])
    assert locality(ramp[None]) > 0.8
    # channels that are the same everywhere have no length, and count for nothing
    still = torch.full_like(ar, 0.37)
    assert granularity(torch.cat([ar, still, 0 * still], 1), 64) == pytest.approx(granularity(ar, 64), rel=1e-4)
    assert locality(torch.zeros(2, 3, 4, 4)) == 0 and math.isfinite(granularity(torch.zeros(2, 3, 4, 4), 4))


def test_measuring_a_network():
    names = ["unet-in", "mid-repeat1-vit-block0-self-q", "mid-repeat1-res-out"]
    noisy, clean = (properties(Source(network("stem"), dict(path="cv", size=16), names, [t]), toy(20)[0], np.arange(20))
                    for t in (0.05, 1.0))
    # c < 1 leaves a little noise at t = 1
    assert noisy["unet-in"]["sensitivity"] > 0.9 and all(clean[n]["sensitivity"] < 0.05 for n in names)
    assert clean["mid-repeat1-res-out"]["size"] == 2 and clean["unet-in"]["size"] == 8


def test_rules():
    def row(sensitivity, granularity=4.0, locality=0.4, name=""):
        return dict(name=name, sensitivity=sensitivity, granularity=granularity, locality=locality, size=8)
    rows = [row(0.9), row(0.3, locality=0.8), out := row(0.2), row(0.3, locality=0.8), noisy := row(0.8),
            row(0.2, granularity=1.0), last := row(0.4)]
    dropped = [why_dropped(i, rows, [out, noisy, last]) for i in range(len(rows))]
    assert dropped == ["noisy", "local", "", "", "noisy", "fine", ""]


# ---------------------------------------------------------------------------------------------------------------------
# The protocols, from the command line

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny YAML with the 160 + 40 images of `small_run`."""
    path = tmp_path_factory.mktemp("small") / "tiny.yaml"
    path.write_text(TINY.replace("train: 512, test: 256", "train: 160, test: 40"))
    return path


@pytest.fixture(scope="module")
def run(small_run):
    return small_run


def called(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


@pytest.mark.parametrize("kind, more", [("mlp", {"random weights", "raw pixels", "supervised, same size"}),
                                        ("difformer", set()), ("diffeed", {"random weights"})])
def test_protocol_head(monkeypatch, tiny, run, kind, more):
    where = "mid-repeat?-res-out" if kind == "difformer" else "mid-repeat1-res-out"
    chosen = {"mlp": "pixels,random,supervised", "difformer": "", "diffeed": "random"}[kind]
    called(monkeypatch, probe, tiny, f"run={run}", "protocol=head", f"head={kind}", f"name={kind}",
           f"activations={where}", "t=0.8", "images=100", "labels_share=0.3", "width=16", "depth=1", "lr=1e-3", "l2=0",
           "seeds=0,1", f"controls={chosen}", "flip=true")
    found = json.loads((run / f"probe/{kind}.json").read_text())
    rows = found["rows"]
    assert set(rows) == {kind} | more and 30 <= found["train_images"] <= 50
    assert all(r["parameters"] > 0 and len(r["results"]) == 2 and 0 <= r["accuracy"] <= 1 and "accuracy_std" in r
               for r in rows.values())
    assert rows[kind]["passes"] == (2 if kind == "diffeed" else 1)
    assert kind != "mlp" or rows["raw pixels"]["passes"] == 0


@pytest.mark.parametrize("pool", ["none", "2"])
def test_stored_features_score_as_the_network_does(monkeypatch, tiny, run, pool):
    """At t = 1 nothing is random: linear probes of stored maps equal those on the fly; grids have more columns."""
    at = ["activations=mid-repeat?-res-out", "t=1"]
    called(monkeypatch, extract_features, tiny, f"run={run}", f"pool={pool}", f"name=clean-{pool}", *at)
    rows = []
    for name, source in (("passes", at), ("stored", [f"features=clean-{pool}"])):
        called(monkeypatch, probe, tiny, f"run={run}", "protocol=linear", f"name={name}-{pool}", "draws=1", "controls=",
               *source)
        rows.append(json.loads((run / f"probe/{name}-{pool}.json").read_text())["rows"])
    a, b = (r["features"] for r in rows)
    assert a["passes"] == b["passes"] == 1
    assert b["parameters"] == ((256 if pool == "2" else 64) + 1) * 10
    assert pool == "2" or abs(a["linear"] - b["linear"]) < 0.01 and abs(a["knn"] - b["knn"]) < 0.01


def test_features_that_are_not_there(refuse, tiny, run):
    for words, said in ((["protocol=sweep", "features=four"], "protocol=linear"),
                        (["protocol=linear", "features=none"], "features/none")):
        assert said in refuse("probe", tiny, f"run={run}", "name=bad", *words)


@pytest.mark.parametrize("words", [["protocol=linear", "draws=1", "controls="],
                                   ["protocol=head", "head=linear", "seeds=0", "lr=1e-3,1e-1", "l2=0,0.5", "controls="],
                                   ["protocol=head", "head=difformer", "width=16", "seeds=0", "lr=1e-3,1e-2", "l2=0",
                                    "controls="]])
def test_labels_of_test_images_decide_nothing(monkeypatch, tiny, run, words):
    """With other labels for the test images accuracies differ, but not what was selected, nor the scores on the
    validation part."""
    known, results = probe.known_classes, []
    for name, shift in (("right", 0), ("wrong", 3)):
        def shifted(train, test, shift=shift):
            y, y_test = known(train, test)
            return y, (y_test + shift) % 10
        monkeypatch.setattr(probe, "known_classes", shifted)
        called(monkeypatch, probe, tiny, f"run={run}", "activations=mid-repeat?-res-out", "t=0.8", "images=200",
               f"name={name}", "overwrite=true", *words)
        results.append(json.loads((run / f"probe/{name}.json").read_text())["rows"])
    chosen = [[[{k: v for k, v in r.items() if k not in ("linear", "knn", "accuracy")}
                for r in row["results"]] for row in rows.values()] for rows in results]
    scores = [[row.get("linear", row.get("accuracy")) for row in rows.values()] for rows in results]
    assert chosen[0] == chosen[1] and scores[0] != scores[1]


def test_sweep_reads_images_once(monkeypatch, tiny, run, refuse):
    seen, read = [], probe.stream
    monkeypatch.setattr(probe, "stream", lambda net, state, images, rows, *a,
                        **k: seen.append(len(rows)) or read(net, state, images, rows, *a, **k))
    words = [tiny, f"run={run}", "t=0.5,0.8", "fit=100", "validation=30", "name=sweep-once"]
    called(monkeypatch, probe, *words, "activations=mid*-out")
    got = json.loads((run / "probe/sweep-once.json").read_text())
    assert sum(seen) == 2 * (100 + 30)
    best = max((r for r in got["table"] if r["t"] == got["label_free"]["t"]), key=lambda r: r["consensus"])
    assert got["label_free"] == {k: best[k] for k in ("activation", "t", "rho", "log_snr", "consensus")}
    assert "three or more" in refuse("probe", *words[:-1], "name=two", "activations=mid-repeat?-res-out")


def test_small_sets_have_small_parts():
    """A few hundred images are fitted and validated on."""
    fit, val = probe.fit_and_validation(Probe(), 179, 2000)
    assert len(fit) == 144 and len(val) == 35 and not set(fit) & set(val)
    assert [len(v) for v in probe.fit_and_validation(Probe(), 5000, 2000)] == [2000, 1000]
    fit, val = probe.fit_and_validation(Probe(), 5000)
    assert len(fit) == 4000 and len(val) == 1000 and not set(fit) & set(val)
    with pytest.raises(UserError, match="only 12 training images"):
        probe.fit_and_validation(Probe(), 12)


def test_linear_probe_of_several_activations(monkeypatch, tiny, run):
    called(monkeypatch, probe, tiny, f"run={run}", "protocol=linear", "activations=mid-repeat?-res-out", "t=0.5,0.8",
           "controls=random", "draws=2", "name=wide")
    rows = json.loads((run / "probe/wide.json").read_text())["rows"]
    assert all(r["parameters"] == (4 * 32 + 1) * 10 and r["passes"] == 2 and len(r["results"]) == 2
               for r in (rows["features"], rows["random weights"]))


def test_raw_pixels_of_large_images_are_averaged():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    raw = Source(None, {}, ["pixels"], [1.0]).vectors(images, np.arange(5), "")["pixels", 1.0]
    means = images.reshape(5, 3, 32, 2, 32, 2).mean((3, 5)) / 127.5 - 1
    assert np.allclose(raw, means.reshape(5, -1), atol=1e-6)


def test_class_numbers_may_have_gaps(monkeypatch, tiny, tmp_path):
    g, y = np.random.default_rng(0), np.repeat([1, 3, 7], 20)
    np.savez(tmp_path / "gaps.npz", images=g.integers(256, size=(60, 16, 16, 3), dtype=np.uint8), classes=y,
             test_images=g.integers(256, size=(6, 16, 16, 3), dtype=np.uint8), test_classes=y[::10])
    words = [tiny, f"run={tmp_path}/run", "data.source=arrays", f"data.root={tmp_path}/gaps.npz", "data.size=16",
             "model.attention="]
    stage("train_diffusion", *words, "images=64")
    called(monkeypatch, probe, *words, "protocol=head", "head=linear", "activations=mid-repeat1-res-out", "t=0.5",
           "images=100", "validation=12", "seeds=0", "controls=", "draws=1")
    assert json.loads((tmp_path / "run/probe/head.json").read_text())["rows"]["linear"]["accuracy"] >= 0


def test_protocol_select(monkeypatch, capsys, tiny, run):
    called(monkeypatch, probe, tiny, f"run={run}", "protocol=select", "t=0.5,0.9", "name=chosen")
    found = json.loads((run / "probe/chosen.json").read_text())
    kept, chosen = [r for r in found["table"] if not r["dropped"]], found["chosen"]
    assert 0 < len(kept) < len(found["table"]) and all(r["linear"] is None for r in found["table"] if r["dropped"])
    best = max(kept, key=lambda r: r["linear"])
    assert best["activation"] in chosen["activations"] and chosen["t"] == [best["t"]]
    words = capsys.readouterr().out.splitlines()[-1].split("  ")[0].split()[3:]  # of the command that it names
    called(monkeypatch, extract_features, *words)
    info = json.loads((run / "features/chosen/info.json").read_text())
    assert [a["activation"] for a in info["arrays"]] == chosen["activations"]


def test_models_of_another_size_are_refused(refuse, tiny, run, tmp_path):
    words = [tiny, f"run={tmp_path / 'small'}", "data.size=16", f"checkpoint={run / 'diffusion/base/checkpoint.pt'}",
             "activations=mid*res-out", "t=0.5", "name=bad"]
    stage("train_diffusion", *words[:3], "--prepare")
    for name in ("extract_features", "probe"):
        assert "inputs of 3 x 32 x 32, this run's are 3 x 16 x 16" in refuse(name, *words)


def test_other_models_of_cka_are_of_the_same_size(refuse, tiny, run, tmp_path):
    folder = tmp_path / "small"
    stage("train_diffusion", tiny, f"run={folder}", "data.size=16", "model.attention=", "images=32", "batch=32")
    said = refuse("probe", tiny, f"run={run}", "protocol=cka", "activations=mid-repeat0-res-out", "t=0.5", "name=bad",
                  f"against={folder / 'diffusion/base/checkpoint.pt'}")
    assert "inputs of 3 x 16 x 16" in said
    words = ["protocol=cka", "activations=mid-repeat0-res-out", "t=0.5", "name=bad"]
    stage("train_diffusion", tiny, f"run={tmp_path}/few", "data.test=3", "images=32", "batch=32")
    assert "four test images" in refuse("probe", tiny, f"run={tmp_path}/few", "data.test=3", *words)


def test_the_next_command_reads_the_choice(monkeypatch, capsys, tiny, run, tmp_path):
    """Also where the YAML file names a place."""
    pinned = tmp_path / "pinned.yaml"
    named = "extract_features: {activations: mid-repeat0-res-out, t: 0.3, "
    pinned.write_text(tiny.read_text().replace("extract_features: {", named))
    words = [f"run={run}", "fit=60", "validation=30", "K=3", "t=0.8", "activations=up*-out", "name=pinned"]
    called(monkeypatch, probe, pinned, *words)
    following = capsys.readouterr().out.splitlines()[-1].split("   #")[0].split()[3:]
    called(monkeypatch, extract_features, *following, "name=pinned")
    read, = json.loads((run / "features/pinned/info.json").read_text())["arrays"]
    assert read["t"] == 0.8 and read["activation"].startswith("up")


def test_a_recipe_holds_what_decides(monkeypatch, refuse, capsys, tiny, run):
    """Classes do, which are no part of the fingerprint of images; of t only what is read."""
    words = [tiny, f"run={run}", "protocol=linear", "controls=", "name=what"]
    words += ["activations=mid-repeat0-res-out", "t=0.5"]
    called(monkeypatch, probe, *words)
    file = run / "data/test/classes.npy"
    before = np.load(file)
    np.save(file, before[::-1])
    assert "truth=" in refuse("probe", *words)
    np.save(file, before)
    called(monkeypatch, probe, tiny, f"run={run}", "fit=60", "validation=30", "K=3", "t=0.8", "activations=mid*-out")
    words = [tiny, f"run={run}", "protocol=linear", "controls=", "name=choice", "validation=30"]
    called(monkeypatch, probe, *words)
    capsys.readouterr()
    called(monkeypatch, probe, *words, "t=0.5,0.7")       # the choice is read at its own
    assert "done already" in capsys.readouterr().out
    (run / "probe/sweep.json").unlink()                   # other tests want none


def test_features_tell_their_precision(monkeypatch, refuse, tiny, run):
    words = [tiny, f"run={run}", "name=precise", "activations=mid-repeat1-res-out", "t=0.5"]
    called(monkeypatch, extract_features, *words)
    assert "overwrite=true" in refuse("extract_features", *words, "precision=bf16")
    assert "pool=00" in refuse("extract_features", *words[:2], "name=bad", *words[3:5], "pool=00")


def test_a_sweep_of_one_model_is_not_one_of_another(monkeypatch, refuse, tiny, run):
    words = [tiny, f"run={run}"]
    stage("train_diffusion", *words, "name=second", "images=64", "seed=9")
    called(monkeypatch, probe, *words, "checkpoint=diffusion/second", "name=second", "t=0.8", "activations=mid*-out",
           "fit=60", "validation=30", "K=3")
    assert (run / "probe/second.png").exists()
    assert "no sweep" in refuse("extract_features", *words, "choice=second", "name=second")
    called(monkeypatch, extract_features, *words, "choice=second", "name=second", "checkpoint=diffusion/second")


@pytest.mark.parametrize("words, said", [
    (["seeds=1,1"], "seeds=[1, 1]: name each once"), (["t=0.5,0.5"], "name each once"),
    (["labels_share=0"], "labels_share=0"), (["head=difformr"], "did you mean difformer"), (["t=2"], "t=2"),
    (["head=difformer", "width=20"], "multiple of the 8"),
    (["head=cnn", "t=0.5,0.8"], "one place"), (["head=diffeed", "activations=down-level0-repeat0-res-out"], "way up"),
    (["protocol=select", "activations=mid*self-q"], "block outputs")])
def test_bad_input(refuse, tiny, run, words, said):
    assert said in refuse("probe", tiny, f"run={run}", "protocol=head", "activations=mid-repeat1-res-out", "t=0.5",
                          "name=bad", *words)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_the_images(monkeypatch, tiny, run, tmp_path):
    """Extraction holds neither the images nor the features: 120 MB are read and 160 MB written within 80 MB of what the
    first batches need (the allocator alone wanders by some 35)."""
    np.savez(tmp_path / "many.npz", images=np.random.default_rng(0).integers(256, size=(40_000, 32, 32, 3),
        dtype=np.uint8), test_images=np.zeros((2, 32, 32, 3), np.uint8))
    words, anonymous, write = [tiny, f"run={tmp_path}/run", "data.source=arrays", f"data.root={tmp_path}/many.npz",
                               "data.train=0"], [], extract_features.write_rows
    stage("train_diffusion", *words, "--prepare")

    def watched(*a):
        write(*a)
        anonymous.append(int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000)
    monkeypatch.setattr(extract_features, "write_rows", watched)
    called(monkeypatch, extract_features, *words, f"checkpoint={run}/diffusion/base/checkpoint.pt",
           "activations=unet-after-conv-in", "t=0.5", "pool=none")
    file = next((tmp_path / "run/features/base").glob("train-*.npy"))
    assert file.stat().st_size > 160e6 and len(anonymous) > 100 and max(anonymous) < max(anonymous[:10]) + 80

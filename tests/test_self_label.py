"""Clustering and its scores against scikit-learn, POT and SciPy; streaming, processes, degenerate input; the stage."""
import json
import sys

import numpy as np
import ot
import pytest
import scipy.optimize
import sklearn.cluster
import sklearn.metrics
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import self_label
from configs.run import ALONE, Processes, UserError, locked
from configs.shapes import draw_shapes
from self_label import (assign, hungarian_accuracy, kmeans, lloyd, nmi, sinkhorn, sinkhorn_cluster,
                        balanced_sums, size_entropy)


def blobs(n=2000, d=16, groups=8, spread=0.6, seed=0):
    """Rows around `groups` random centres: (float32 [n, d], group of each row)."""
    g = np.random.default_rng(seed)
    centres, y = g.normal(size=(groups, d)), g.integers(groups, size=n)
    return torch.from_numpy((centres[y] + spread * g.normal(size=(n, d))).astype(np.float32)), y


# ---------------------------------------------------------------------------------------------------------------------
# k-means

@pytest.mark.parametrize("K", [2, 8, 50])
def test_inertia_is_that_of_scikit_learn_from_equal_starts(K):
    x, _ = blobs()
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(K))[:K]].clone()
    theirs = sklearn.cluster.KMeans(K, init=start.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd")
    c, inertia, _ = lloyd(x, start, "euclidean", 100, ALONE)
    assert inertia <= theirs.fit(x.numpy()).inertia_ * 1.0005
    squared = ((x - c[assign(x, c, "euclidean")]) ** 2).sum(1)
    assert inertia == pytest.approx(float(squared.sum()), rel=1e-4)


def test_plus_plus_and_restarts_find_the_groups():
    x, y = blobs(spread=0.2)
    _, one, _ = kmeans(x, 8, metric="euclidean", seed=3)
    c, best, _ = kmeans(x, 8, metric="euclidean", seed=3, restarts=5)
    assert best <= one and nmi(assign(x, c, "euclidean").numpy(), y) > 0.99
    assert best <= sklearn.cluster.KMeans(8, n_init=5, random_state=0).fit(x.numpy()).inertia_ * 1.001


def test_cosine_is_spherical():
    x, y = blobs(spread=0.3)
    scaled = x * torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    a, inertia, _ = kmeans(x, 8, seed=1)
    b, other, _ = kmeans(scaled, 8, seed=1)               # the length of a row says nothing
    assert torch.allclose(a, b, atol=1e-4) and inertia == pytest.approx(other, rel=1e-4)
    assert torch.allclose(a.norm(dim=1), torch.ones(8), atol=1e-5) and nmi(assign(x, a).numpy(), y) > 0.95
    unit = F.normalize(x, dim=1)
    assert inertia == pytest.approx(float((2 - 2 * (unit @ a.T).max(1).values).sum()), rel=1e-4)


def far_start(x):
    """Eight centroids, three of which nobody is near to."""
    return torch.cat([x[:5], torch.full((3, 16), 100.0) + torch.arange(3)[:, None]])


def test_empty_clusters_are_repaired():
    x, _ = blobs(500)
    c, _, facts = lloyd(x, far_start(x), "euclidean", 30, ALONE)
    assert facts["repaired"] >= 3 and len(np.unique(assign(x, c, "euclidean"))) == 8
    same = torch.ones(50, 4)                              # nothing to distinguish: must end, and stay finite
    assert torch.isfinite(kmeans(same, 3, metric="euclidean")[0]).all()


def test_impossible_requests():
    x, _ = blobs(20)
    for K in (0, 21):
        with pytest.raises(UserError, match="K="):
            kmeans(x, K)
    x[7, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        kmeans(x, 4, metric="euclidean")


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn-Knopp

def scores(n=300, K=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, prototypes = torch.randn(n, 32, generator=g), torch.randn(K, 32, generator=g)
    return F.normalize(rows, dim=1) @ F.normalize(prototypes, dim=1).T


def as_in_the_paper(S, eps, iterations):
    """method.md: L <- L - logsumexp over samples; L <- L - logsumexp over prototypes."""
    L = S / eps
    for _ in range(iterations):
        L = L - L.logsumexp(0, keepdim=True)
        L = L - L.logsumexp(1, keepdim=True)
    return L.exp()


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_that_of_the_paper(iterations):
    assert torch.allclose(sinkhorn(scores(), 0.05, iterations), as_in_the_paper(scores(), 0.05, iterations), atol=1e-5)


def test_marginals():
    q = sinkhorn(scores(), 0.05, 100)
    assert torch.allclose(q.sum(1), torch.ones(300), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((20,), 15.0), rtol=1e-3)
    q = sinkhorn(scores(), 0.05, 3)
    assert torch.allclose(q.sum(1), torch.ones(300), atol=1e-5) and (q.sum(0) / 15 - 1).abs().max() < 0.3
    q = sinkhorn(scores(), 0.002, 50)                     # a small eps stays finite
    assert torch.isfinite(q).all() and torch.allclose(q.sum(1), torch.ones(300), atol=1e-4)


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_plan_is_that_of_optimal_transport(eps):
    s = scores().double()
    plan = ot.sinkhorn(np.full(300, 1 / 300), np.full(20, 1 / 20), -s.numpy(), eps, method="sinkhorn_log",
                       numItermax=5000, stopThr=1e-12)
    assert np.allclose(sinkhorn(s, eps, 2000).numpy() / 300, plan, atol=2e-6)


def test_constants_of_rows_and_columns_do_not_matter():
    s, g = scores(), torch.Generator().manual_seed(1)
    q = sinkhorn(s, 0.05, 200)
    assert torch.allclose(q, sinkhorn(s + torch.randn(300, 1, generator=g), 0.05, 200), atol=1e-3)
    assert torch.allclose(q, sinkhorn(s + 0.3 * torch.randn(1, 20, generator=g), 0.05, 500), atol=1e-3)


@pytest.mark.parametrize("iterations", [1, 20])
def test_streaming_equals_the_dense_iteration(iterations):
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(500, 32, generator=g), F.normalize(torch.randn(12, 32, generator=g), dim=1)
    unit = F.normalize(x, dim=1)
    q = sinkhorn(unit @ c.T, 0.05, iterations)
    g, sums, mass = balanced_sums(x, c, 0.05, iterations, chunk=64)
    assert torch.allclose(torch.softmax(unit @ c.T / 0.05 - g, 1), q, atol=1e-4)
    assert torch.allclose(sums, q.T @ unit, atol=1e-2) and torch.allclose(mass, q.sum(0), rtol=1e-3)


def test_equal_clusters_of_unequal_groups():
    """Groups of 80 and 20 %: k-means keeps them, Sinkhorn splits the large one."""
    g = np.random.default_rng(0)
    y = (g.random(2000) < 0.2).astype(int)
    x = torch.from_numpy((np.eye(2, 8)[y] * 3 + 0.5 * g.normal(size=(2000, 8))).astype(np.float32))
    c, potentials, facts = sinkhorn_cluster(x, 5, eps=0.01, iterations=500, rounds=3)
    ids = assign(x, c, "cosine", 0.01 * potentials).numpy()
    assert np.array_equal(ids, (F.normalize(x, dim=1) @ c.T / 0.01 - potentials).argmax(1))
    sizes = np.bincount(ids, minlength=5)
    assert sizes.min() > 0.6 * 400 and sizes.max() < 1.4 * 400 and facts["mass_spread"] < 1.05
    assert sklearn.metrics.cluster.contingency_matrix(ids, y).max(1).sum() > 0.95 * 2000


# ---------------------------------------------------------------------------------------------------------------------
# Processes

def ranks_job(rank, world, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    ranks = Processes()
    ranks.rank, ranks.world = rank, world
    x, s = blobs(1001)[0], scores()
    mine = x[ranks.share(len(x))]
    c, inertia, _ = kmeans(mine, 8, seed=5, ranks=ranks)
    repaired = lloyd(mine, far_start(x), "euclidean", 30, ranks)
    prototypes, g, _ = sinkhorn_cluster(mine, 8, rounds=3, ranks=ranks)
    q = sinkhorn(s[ranks.share(len(s))], 0.05, 5, ranks)
    cfg = self_label.SelfLabel(center=True)
    rest = self_label.centred(ranks, cfg, dict(train=mine, test=x[:9]))["test"]
    by_myself = kmeans(blobs(200)[0], 8, seed=1)[1] if rank == 0 else 0          # without ranks nobody waits
    torch.save(dict(c=c, inertia=inertia, repaired=repaired[1], prototypes=prototypes, g=g, q=q, rest=rest,
                    by_myself=by_myself), f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(ranks_job, (2, tmp_path / "meet", tmp_path / "out"), 2, start_method="fork")
    ranks_job(0, 1, tmp_path / "alone", tmp_path / "single")
    a, b, one = (torch.load(tmp_path / f) for f in ("out.0", "out.1", "single.0"))
    for k in ("c", "prototypes", "g", "rest"):
        assert torch.equal(a[k], b[k]) and torch.allclose(a[k], one[k], atol=1e-3), k
    assert a["inertia"] == b["inertia"] == pytest.approx(one["inertia"], rel=1e-4)
    assert a["repaired"] == pytest.approx(one["repaired"], rel=0.05)
    assert torch.allclose(torch.cat([a["q"], b["q"]]), one["q"], atol=1e-5)
    assert a["by_myself"] == one["by_myself"]


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def labelings():
    """Pairs of labels and classes: unrelated, related, equal, constant, all different, tiny."""
    g = np.random.default_rng(0)
    y = g.integers(7, size=3000)
    yield g.integers(5, size=3000), y
    yield np.where(g.random(3000) < 0.6, y * 3, g.integers(30, size=3000)), y
    yield y, y
    yield np.zeros(3000, int), y
    yield np.zeros(9, int), np.zeros(9, int)
    yield np.arange(3000), y
    yield np.arange(4), np.array([0, 0, 1, 1])


@pytest.mark.parametrize("a, b", list(labelings()))
def test_scores_against_scikit_learn(a, b):
    assert nmi(a, b) == pytest.approx(sklearn.metrics.normalized_mutual_info_score(b, a), abs=1e-9)
    t = sklearn.metrics.cluster.contingency_matrix(a, b)
    pairs = scipy.optimize.linear_sum_assignment(-t)
    assert hungarian_accuracy(a, b) == pytest.approx(t[pairs].sum() / t.sum())


def test_size_entropy():
    assert size_entropy([5, 5, 5]) == pytest.approx(1) and size_entropy([15, 0, 0]) == 0
    assert 0 < size_entropy([10, 4, 1]) < 1


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def write_run(folder, tiny, counts, two=0.0):
    """A run folder of `shapes` without a model; {split: (images, classes, boxes, masks)}."""
    out = {}
    (folder / "config.yaml").write_text(tiny.read_text())
    for split, n in counts.items():
        out[split] = draw_shapes(int(split == "test"), np.arange(n), two=two)
        (folder / "data" / split).mkdir(parents=True)
        for k, v in zip(("images", "classes", "boxes", "masks"), out[split]):
            np.save(folder / "data" / split / f"{k}.npy", v)
        info = dict(count=n, size=32, arrays=["boxes", "classes", "images", "masks"], fingerprint=split)
        (folder / "data" / split / "info.json").write_text(json.dumps(info))
    return out


def write_features(folder, name, pool, arrays):
    """features/<name> of {split: [array [N, ...] of each activation]}."""
    path = folder / "features" / name
    path.mkdir(parents=True)
    entries = [dict(activation=f"a{i}", t=0.5) for i in range(len(arrays["train"]))]
    for split, parts in arrays.items():
        for entry, a in zip(entries, parts):
            np.save(path / f"{split}-{entry['activation']}-t0.5.npy", a)
    (path / "info.json").write_text(json.dumps(dict(
        checkpoint="x", weights="ema", hash="x", pool=pool, draws=1, seed=0, data=dict(train="train", test="test"),
        arrays=entries)))


def label(folder, tiny, monkeypatch, *words):
    """Run the stage in this process; (arrays, json) of the labels named in the words."""
    monkeypatch.setattr(sys, "argv", ["self_label.py", str(tiny), f"run={folder}", *words])
    self_label.main()
    given = dict(w.split("=") for w in words)
    path = folder / "labels" / f"{given.get('name', given['method'])}.npz"
    return dict(np.load(path)), json.loads(path.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with features that tell the classes."""
    folder = tmp_path_factory.mktemp("labels")
    data = write_run(folder, tiny, dict(train=200, test=80))
    g = np.random.default_rng(0)
    kinds = g.normal(size=(10, 12))
    write_features(folder, "base", "mean", {split: [(kinds[y] + 0.5 * g.normal(size=(len(y), 12))).astype(np.float32)]
                                            for split, (_, y, _, _) in data.items()})
    return folder


@pytest.mark.parametrize("method", ["kmeans", "sinkhorn"])
def test_clusters_of_features(run, tiny, monkeypatch, capsys, method):
    out, info = label(run, tiny, monkeypatch, f"method={method}", "K=10", "restarts=3")
    assert out["train"].shape == (200,) and out["test"].shape == (80,) and out["centroids"].shape == (10, 12)
    assert info["scores"]["nmi"] > 0.85 and info["scores"]["test_nmi"] > 0.8, info["scores"]
    assert "note" not in capsys.readouterr().out
    assert ("potentials" in out) == (method == "sinkhorn") and info["features"]["hash"] == "x"
    assert (run / f"labels/{method}.png").exists() and not list((run / "labels").glob(".*"))


def test_controls_without_a_network(run, tiny, monkeypatch):
    images = np.load(run / "data/train/images.npy") / 255
    out, info = label(run, tiny, monkeypatch, "method=colours", "K=5", "center=false", "metric=euclidean")
    statistics = np.concatenate([images.mean((2, 3)), images.std((2, 3), ddof=1)], 1)
    nearest = ((statistics[:, None] - out["centroids"]) ** 2).sum(2).argmin(1)
    assert out["centroids"].shape == (5, 6) and (nearest == out["train"]).mean() > 0.98 and "features" not in info
    out, _ = label(run, tiny, monkeypatch, "method=pixels", "K=5", "pool=4", "center=false", "metric=euclidean")
    means = images.reshape(200, 3, 4, 8, 4, 8).mean((3, 5)).reshape(200, 48)
    nearest = ((means[:, None] - out["centroids"]) ** 2).sum(2).argmin(1)
    assert out["centroids"].shape == (5, 48) and (nearest == out["train"]).mean() > 0.98


def test_controls_of_classes(run, tiny, monkeypatch):
    truth = np.load(run / "data/train/classes.npy")
    out, info = label(run, tiny, monkeypatch, "method=classes")
    assert np.array_equal(out["train"], truth) and info["num_labels"] == 10
    out, info = label(run, tiny, monkeypatch, "method=subgroups", "groups=3")
    assert np.array_equal(out["train"] // 3, truth) and info["num_labels"] == 30
    out, _ = label(run, tiny, monkeypatch, "method=random", "reference=classes")
    assert np.array_equal(np.bincount(out["train"]), np.bincount(truth)) and (out["train"] == truth).mean() < 0.3


def test_ids_of_others(run, tiny, monkeypatch, refuse, tmp_path, capsys):
    truth = np.load(run / "data/train/classes.npy")
    np.save(tmp_path / "ids.npy", (100 - 7 * truth).astype(np.int16))
    words = ("method=file", f"ids={tmp_path}/ids.npy")
    out, info = label(run, tiny, monkeypatch, *words)
    assert np.array_equal(out["train"], 9 - truth) and (out["test"] == -1).all() and info["num_labels"] == 10
    assert info["file_ids"] == list(range(37, 101, 7)) and "they were renumbered" in capsys.readouterr().out
    assert info["scores"]["nmi"] > 0.999 and "test_nmi" not in info["scores"] and str(tmp_path) not in str(info)
    (tmp_path / "ids.npy").rename(tmp_path / "moved.npy")
    label(run, tiny, monkeypatch, "method=file", f"ids={tmp_path}/moved.npy")
    assert "done already" in capsys.readouterr().out
    words = ("self_label", tiny, f"run={run}", "method=file", "name=other", f"ids={tmp_path}/ids.npy")
    assert "ids.npy: not there" in refuse(*words)
    for wrong in (truth[:-1], truth / 2, truth[:, None], truth - 1):
        np.save(tmp_path / "ids.npy", wrong)
        assert "one whole number, 0 or more, per training image" in refuse(*words)
    assert "ids= must be" in refuse("self_label", tiny, f"run={run}", "method=file", "name=other")


def test_one_entry_adds_a_method(run, tiny, monkeypatch, refuse):
    """A name without an entry never becomes the ground truth; a function and its entry are all that a method needs."""
    assert "did you mean colours" in refuse("self_label", tiny, f"run={run}", "method=colors")
    assert all(name in self_label.__doc__ for name in self_label.METHODS)
    known = {f for f in self_label.SelfLabel.__dataclass_fields__}
    assert all(set(names.split()) <= known for _, names in self_label.METHODS.values())

    def parity(run, cfg, data):
        return self_label.Labels({split: np.arange(len(d)) % cfg.groups for split, d in data.items()}, cfg.groups)
    monkeypatch.setitem(self_label.METHODS, "parity", (parity, "groups"))
    out, info = label(run, tiny, monkeypatch, "method=parity", "groups=2")
    assert np.array_equal(out["test"], np.arange(80) % 2)
    assert set(info["recipe"]) == {"method", "groups", "data"}


def test_recipes_hold_what_their_method_used(run, tiny, monkeypatch, capsys, refuse):
    words = ("method=kmeans", "K=4", "name=recipe")
    first, _ = label(run, tiny, monkeypatch, *words)
    again, _ = label(run, tiny, monkeypatch, *words, "contrast=0.7", "rounds=3")      # of other methods
    assert "done already" in capsys.readouterr().out and np.array_equal(first["train"], again["train"])
    label(run, tiny, monkeypatch, "method=kmeans", "K=40", "name=many")
    assert "fewer than 3 images, and all 5.0 on average" in capsys.readouterr().out
    assert "K=4, now 5" in refuse("self_label", tiny, f"run={run}", "method=kmeans", "K=5", "name=recipe")
    info = run / "features/base/info.json"
    before = info.read_text()
    info.write_text(json.dumps(json.loads(before) | dict(precision="bf16")))     # extracted again, with less precision
    assert "features_hash=" in refuse("self_label", tiny, f"run={run}", *words)
    info.write_text(before)


def test_classes_that_change_make_other_labels(run, tiny, monkeypatch, refuse):
    """The fingerprint of the data is of images alone."""
    label(run, tiny, monkeypatch, "method=classes", "name=truth")
    file = run / "data/train/classes.npy"
    before = np.load(file)
    np.save(file, before[::-1])
    assert "classes=" in refuse("self_label", tiny, f"run={run}", "method=classes", "name=truth")
    np.save(file, before)


def test_features_that_are_replaced_meanwhile(run, tiny, monkeypatch, refuse):
    cluster, settings = self_label.METHODS["kmeans"]
    info = run / "features/base/info.json"
    before = info.read_text()

    def meanwhile(run, cfg, data):
        info.write_text(json.dumps(json.loads(before) | dict(hash="another")))
        return cluster(run, cfg, data)
    monkeypatch.setitem(self_label.METHODS, "kmeans", (meanwhile, settings))
    assert "replaced meanwhile" in refuse("self_label", tiny, f"run={run}", "method=kmeans", "K=4", "name=late")
    info.write_text(before)
    assert not (run / "labels/late.npz").exists()


def test_files_that_do_not_belong_together(run, tiny, monkeypatch, refuse):
    words = ("method=kmeans", "K=4", "name=pair")
    good, _ = label(run, tiny, monkeypatch, *words)
    path = run / "labels/pair.npz"
    np.savez(path, **good | dict(train=good["train"][::-1]))                     # a kill between the two files
    monkeypatch.setattr(sys, "argv", ["self_label.py", str(tiny), f"run={run}"])
    some = self_label.start("self_label", self_label.SelfLabel, "")
    with pytest.raises(UserError, match="not the arrays"):
        self_label.load_labels(some, "pair")
    other = ("method=kmeans", "K=3", "name=pair")         # somebody may have edited the labels of this recipe
    assert "K=4, now 3" in refuse("self_label", tiny, f"run={run}", *other)
    again, _ = label(run, tiny, monkeypatch, *words)
    assert np.array_equal(again["train"], good["train"])
    path.unlink()                                         # or before the second
    again, _ = label(run, tiny, monkeypatch, *words)
    assert np.array_equal(again["train"], good["train"])
    with locked(some, "labels", "pair"):
        assert "another command" in refuse("self_label", tiny, f"run={run}", *words)
    path.with_suffix(".json").unlink()
    assert "not ours" in refuse("self_label", tiny, f"run={run}", *words, "overwrite=true") and path.exists()


def test_bad_input(run, tiny, refuse):
    for words in ("method=random reference=none_such", "features=none_such", "K=201", "sk_eps=0", "groups=0"):
        assert words.split("=")[-1] in refuse("self_label", tiny, f"run={run}", *words.split())
    assert "pool=none" in refuse("self_label", tiny, f"run={run}", "method=lost")

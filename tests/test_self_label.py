"""Clustering and its scores against scikit-learn, POT and SciPy; streaming, ranks and degenerate input."""
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

from self_label import (assign, balanced_assign, contingency, fit_projection, hungarian_accuracy, kmeans, ari, nmi, sinkhorn,
                        sinkhorn_cluster, sinkhorn_stream, size_entropy)
from configs.run import UserError


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
    theirs = sklearn.cluster.KMeans(K, init=start.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(x.numpy())
    c, inertia, _ = kmeans(x, K, metric="euclidean", iterations=100, start=start)
    assert inertia <= theirs.inertia_ * 1.0005
    ids, similarity = assign(x, c, "euclidean")
    assert inertia == pytest.approx(float(((x - c[ids]) ** 2).sum()), rel=1e-4) and torch.allclose(similarity, -0.5 * ((x - c[ids]) ** 2).sum(1), atol=1e-3)


def test_plus_plus_and_restarts_find_the_groups():
    x, y = blobs(spread=0.2)
    _, one, _ = kmeans(x, 8, metric="euclidean", seed=3)
    c, best, _ = kmeans(x, 8, metric="euclidean", seed=3, restarts=5)
    assert best <= one and nmi(assign(x, c, "euclidean")[0].numpy(), y) > 0.99
    assert best <= sklearn.cluster.KMeans(8, n_init=5, random_state=0).fit(x.numpy()).inertia_ * 1.001


def test_cosine_is_spherical():
    x, y = blobs(spread=0.3)
    scaled = x * torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    (a, ia, _), (b, ib, _) = kmeans(x, 8, seed=1), kmeans(scaled, 8, seed=1)     # the length of a row says nothing
    assert torch.allclose(a, b, atol=1e-4) and ia == pytest.approx(ib, rel=1e-4)
    assert torch.allclose(a.norm(dim=1), torch.ones(8), atol=1e-5) and nmi(assign(x, a)[0].numpy(), y) > 0.95
    unit = F.normalize(x, dim=1)
    assert ia == pytest.approx(float((2 - 2 * (unit @ a.T).max(1).values).sum()), rel=1e-4)


def test_empty_clusters_are_repaired():
    x, _ = blobs(500)
    start = torch.cat([x[:5], torch.full((3, 16), 100.0) + torch.arange(3)[:, None]])      # three centroids that nobody is near to
    c, _, facts = kmeans(x, 8, metric="euclidean", start=start)
    assert facts["repaired"] >= 3 and len(np.unique(assign(x, c, "euclidean")[0])) == 8
    same = torch.ones(50, 4)                              # nothing to distinguish: must end, and stay finite
    assert torch.isfinite(kmeans(same, 3, metric="euclidean")[0]).all()


def test_mini_batches_come_close():
    x, y = blobs(6000)
    full, small = kmeans(x, 8, metric="euclidean", restarts=3)[1], kmeans(x, 8, metric="euclidean", restarts=3, batch=512, iterations=10)[1]
    assert full <= small < 1.05 * full


def test_memory_maps_and_chunks_change_nothing(tmp_path):
    x, _ = blobs()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    a, b = kmeans(x, 8, seed=2)[0], kmeans(mapped, 8, seed=2, chunk=77)[0]
    assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(assign(x, a)[0], assign(mapped, a, chunk=33)[0])


@pytest.mark.parametrize("K", [0, 21])
def test_impossible_K(K):
    with pytest.raises(UserError, match="K="):
        kmeans(blobs(20)[0], K)


def test_non_finite_features_are_refused():
    x, _ = blobs()
    x[7, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        kmeans(x, 4, metric="euclidean")


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn-Knopp

def scores(n=300, K=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 32, generator=g), dim=1) @ F.normalize(torch.randn(K, 32, generator=g), dim=1).T


def test_marginals():
    q = sinkhorn(scores(), 0.05, 100)
    assert torch.allclose(q.sum(1), torch.ones(300), atol=1e-5) and torch.allclose(q.sum(0), torch.full((20,), 15.0), rtol=1e-3)
    q = sinkhorn(scores(), 0.05, 3)
    assert torch.allclose(q.sum(1), torch.ones(300), atol=1e-5) and (q.sum(0) / 15 - 1).abs().max() < 0.3


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_plan_is_that_of_optimal_transport(eps):
    s = scores().double()
    plan = ot.sinkhorn(np.full(300, 1 / 300), np.full(20, 1 / 20), -s.numpy(), eps, method="sinkhorn_log", numItermax=5000, stopThr=1e-12)
    assert np.allclose(sinkhorn(s, eps, 2000).numpy() / 300, plan, atol=2e-6)


def test_constants_of_rows_and_columns_do_not_matter():
    s, g = scores(), torch.Generator().manual_seed(1)
    q = sinkhorn(s, 0.05, 200)
    assert torch.allclose(q, sinkhorn(s + torch.randn(300, 1, generator=g), 0.05, 200), atol=1e-3)
    assert torch.allclose(q, sinkhorn(s + 0.3 * torch.randn(1, 20, generator=g), 0.05, 500), atol=1e-3)


def test_small_eps_stays_finite():
    q = sinkhorn(scores(), 0.002, 50)
    assert torch.isfinite(q).all() and torch.allclose(q.sum(1), torch.ones(300), atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_streaming_equals_the_dense_iteration(iterations):
    x, c = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), F.normalize(torch.randn(12, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    unit = F.normalize(x, dim=1)
    q = sinkhorn(unit @ c.T, 0.05, iterations)
    g, sums, mass = sinkhorn_stream(x, c, 0.05, iterations, chunk=64)
    assert torch.allclose(torch.softmax(unit @ c.T / 0.05 - g, 1), q, atol=1e-4)
    assert torch.allclose(sums, q.T @ unit, atol=1e-2) and torch.allclose(mass, q.sum(0), rtol=1e-3)


def test_equal_clusters_of_unequal_groups():
    """Groups of 80 and 20 %: k-means keeps them, Sinkhorn splits the large one."""
    g = np.random.default_rng(0)
    y = (g.random(2000) < 0.2).astype(int)
    x = torch.from_numpy((np.eye(2, 8)[y] * 3 + 0.5 * g.normal(size=(2000, 8))).astype(np.float32))
    c, potentials, facts = sinkhorn_cluster(x, 5, eps=0.01, iterations=500, rounds=3)
    ids, p = balanced_assign(x, c, potentials, 0.01)
    sizes = np.bincount(ids, minlength=5)
    assert sizes.min() > 0.6 * 400 and sizes.max() < 1.4 * 400 and contingency(ids.numpy(), y).max(1).sum() > 0.95 * 2000 and (p > 0).all() and facts["mass_spread"] < 1.05


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

def ranks_job(rank, world, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    x, _ = blobs(1001)
    mine = x[len(x) * rank // world:len(x) * (rank + 1) // world]
    s = scores()
    part = slice(len(s) * rank // world, len(s) * (rank + 1) // world)
    c, inertia, facts = kmeans(mine, 8, seed=5)
    start = torch.cat([x[:5], torch.full((3, 16), 100.0) + torch.arange(3)[:, None]])
    repaired = kmeans(mine, 8, metric="euclidean", start=start)
    b, g, _ = sinkhorn_cluster(mine, 8, rounds=3)
    torch.save((c, inertia, repaired[1], b, g, sinkhorn(s[part], 0.05, 5), kmeans(mine, 8, batch=128, iterations=4)[1]), f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(ranks_job, (2, tmp_path / "meet", tmp_path / "out"), 2)
    mp.spawn(ranks_job, (1, tmp_path / "alone", tmp_path / "single"), 1)
    a, b, one = (torch.load(tmp_path / f) for f in ("out.0", "out.1", "single.0"))
    for i in (0, 3, 4):
        assert torch.equal(a[i], b[i]) and torch.allclose(a[i], one[i], atol=1e-3), i
    assert a[1] == b[1] == pytest.approx(one[1], rel=1e-4) and a[2] == pytest.approx(one[2], rel=0.05) and a[6] == pytest.approx(one[6], rel=1e-3)
    assert torch.allclose(torch.cat([a[5], b[5]]), one[5], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Projection and scores

def test_whitening():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 10, generator=g) @ torch.randn(10, 10, generator=g) + 5
    x = torch.cat([x, x[:, :1] * 2], 1)                   # a column that adds no dimension
    mean, p = fit_projection(x.split(700), 0, True)
    z = (x - mean) @ p
    assert p.shape == (11, 10) and torch.allclose(torch.cov(z.T), torch.eye(10), atol=5e-3) and z.mean(0).abs().max() < 1e-3
    _, p = fit_projection(x.split(700), 3, False)
    assert torch.allclose(p.T @ p, torch.eye(3), atol=1e-5)
    top = torch.linalg.svdvals((x - x.mean(0)).double())[:3] ** 2 / len(x)
    assert torch.allclose(((x - mean) @ p).double().var(0, correction=0), top, rtol=1e-4)
    assert fit_projection(x.split(500), 0, False)[1] is None


def labelings():
    """Pairs of labels and classes: unrelated, related, equal, constant, all different, tiny."""
    g = np.random.default_rng(0)
    y = g.integers(7, size=3000)
    yield g.integers(5, size=3000), y
    yield np.where(g.random(3000) < 0.6, y * 3, g.integers(30, size=3000)), y
    yield y, y
    yield np.zeros(3000, int), y
    yield np.arange(3000), y
    yield np.arange(4), np.array([0, 0, 1, 1])


@pytest.mark.parametrize("a, b", list(labelings()))
def test_scores_against_scikit_learn(a, b):
    assert nmi(a, b) == pytest.approx(sklearn.metrics.normalized_mutual_info_score(b, a), abs=1e-9)
    assert ari(a, b) == pytest.approx(sklearn.metrics.adjusted_rand_score(b, a), abs=1e-9)
    assert np.array_equal(contingency(a, b), sklearn.metrics.cluster.contingency_matrix(a, b))
    t = contingency(a, b)
    rows, columns = scipy.optimize.linear_sum_assignment(-t)
    assert hungarian_accuracy(a, b) == pytest.approx(t[rows, columns].sum() / t.sum())


def test_size_entropy():
    assert size_entropy([5, 5, 5]) == pytest.approx(1) and size_entropy([15, 0, 0]) == 0 and 0 < size_entropy([10, 4, 1]) < 1

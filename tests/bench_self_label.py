"""Clustering against its peers, as ratios measured in one run.

    python tests/bench_self_label.py             # a few minutes on two CPU cores; timings of busy machines mean nothing

k-means    50,000 x 512, K = 1,000, 10 iterations, equal starts: against faiss-cpu and scikit-learn (time and inertia)     goal: at most 1
Sinkhorn   50,000 x 1,000, 20 iterations: against POT's log-domain solver                                                 goal: 3 times faster
"""
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import faiss
import numpy as np
import ot
import sklearn.cluster
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self_label import assign, kmeans, sinkhorn          # noqa: E402

N, D, K, ITERATIONS, REPEATS = 50_000, 512, 1_000, 10, 3


def timed(f):
    """(seconds, result)."""
    tick = time.perf_counter()
    out = f()
    return time.perf_counter() - tick, out


def main():
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    warnings.filterwarnings("ignore")                    # peers that say they have not converged: that is intended
    g = np.random.default_rng(0)
    x = (g.normal(size=(200, D))[g.integers(200, size=N)] + 0.8 * g.normal(size=(N, D))).astype(np.float32)
    start = x[g.choice(N, K, replace=False)].copy()
    t = torch.from_numpy(x)

    def with_faiss():
        index = faiss.Kmeans(D, K, niter=ITERATIONS, nredo=1, max_points_per_centroid=N, min_points_per_centroid=1, seed=1)
        index.train(x, init_centroids=start)
        return torch.from_numpy(index.centroids)

    def with_sklearn():
        return torch.from_numpy(sklearn.cluster.KMeans(K, init=start, n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd").fit(x).cluster_centers_)

    runs = dict(ours=lambda: kmeans(t, K, metric="euclidean", iterations=ITERATIONS, start=torch.from_numpy(start))[0], faiss=with_faiss, sklearn=with_sklearn)
    seconds, inertia = {k: [] for k in runs}, {}
    for _ in range(REPEATS):                              # interleaved, so that a slow minute hits all
        for name, f in runs.items():
            s, c = timed(f)
            seconds[name].append(s)
            inertia[name] = float(-2 * assign(t, c.float(), "euclidean")[1].double().sum())
    s = torch.nn.functional.normalize(t[:, :64], dim=1) @ torch.nn.functional.normalize(torch.from_numpy(g.normal(size=(64, K)).astype(np.float32)), dim=0)
    sink = dict(ours=lambda: sinkhorn(s, 0.05, 20), pot=lambda: ot.sinkhorn(torch.full((N,), 1 / N), torch.full((K,), 1 / K), -s, 0.05, method="sinkhorn_log", numItermax=20, stopThr=0))
    sink_seconds = {k: [] for k in sink}
    for _ in range(2):
        for name, f in sink.items():
            sink_seconds[name].append(timed(f)[0])
    m, n = ({k: statistics.median(v) for k, v in d.items()} for d in (seconds, sink_seconds))
    for peer in ("faiss", "sklearn"):
        print(f"k-means: {m['ours'] / m[peer]:.2f} of {peer}'s time ({m['ours']:.2f} s against {m[peer]:.2f} s), {inertia['ours'] / inertia[peer]:.6f} of its inertia (goal: at most 1)")
    print(f"Sinkhorn: {n['pot'] / n['ours']:.2f} times faster than POT ({n['ours']:.2f} s against {n['pot']:.2f} s; goal: 3)")
    print(json.dumps(dict(threads=2, torch=torch.__version__, kmeans_seconds=m, inertia=inertia, sinkhorn_seconds=n)))


if __name__ == "__main__":
    main()

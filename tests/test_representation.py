"""Comparing representations: unbiased HSIC and CKA from mini-batches, alignment, uniformity."""
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from test_dense import WORDS, result, run  # noqa: F401  (run is a fixture)
from test_probe_heads import called

import probe
from probe import alignment, gaussian_potential, hsic

noise = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_hsic_is_the_u_statistic():
    """The definition, an average over all ordered quadruples of different samples, written out; a shift and a rotation change nothing."""
    x, y = noise(7, 3), noise(7, 2, seed=1) + noise(7, 3)[:, :2]
    K, L = x @ x.T, y @ y.T
    want = np.mean([float(K[i, j] * (L[i, j] + L[k, l] - 2 * L[i, k])) for i, j, k, l in itertools.permutations(range(7), 4)])
    got = hsic([x, y])
    assert got[0, 1] == pytest.approx(want, rel=1e-9) and got[0, 1] == got[1, 0]
    assert torch.allclose(hsic([x + 5, y - 3]), got)
    q = torch.linalg.qr(noise(3, 3, seed=2))[0]
    assert torch.allclose(hsic([x @ q, y]), got)


def test_minibatches_estimate_the_closed_form():
    """For x ~ N(0, I) and y = x A + noise, HSIC is |A|_F^2 whatever the batch; the biased estimator is far off at this batch size."""
    A = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.0, 0.0]]).double()
    x = noise(60_000, 3)
    y = x @ A + 0.5 * noise(60_000, 2, seed=1)
    cov = A.T @ A + 0.25 * torch.eye(2)
    want = torch.tensor([[3.0, A.square().sum()], [A.square().sum(), cov.square().sum()]]).double()
    total = torch.stack([hsic([a, b]) for a, b in zip(x.split(10), y.split(10))]).mean(0)
    assert torch.allclose(total, want, rtol=0.04)
    centre = lambda v: v - v.mean(0)
    biased = torch.stack([(centre(a).T @ centre(b)).square().sum() / 81 for a, b in zip(x.split(10), y.split(10))]).mean()
    assert biased > 1.2 * want[0, 1]
    scale = total.diag().sqrt()
    assert (total / torch.outer(scale, scale))[0, 1] == pytest.approx(float(want[0, 1] / (want[0, 0] * want[1, 1]).sqrt()), abs=0.02)


def test_alignment_and_uniformity():
    a, turn = noise(500, 2), torch.tensor([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]]).double()
    assert alignment(a, 7 * a) == pytest.approx(0, abs=1e-12) and alignment(a, a @ turn) == pytest.approx(2 - 2 * math.cos(0.3), abs=1e-6)
    uniform = torch.special.i0(torch.tensor(4.0)) * math.exp(-4)                 # mean of exp(-2 |x - y|^2) = exp(4 cos - 4) over a circle
    assert gaussian_potential(a) == pytest.approx(float(uniform), rel=0.03) and gaussian_potential(a.abs()) > 1.2 * uniform and gaussian_potential(torch.ones(5, 3)) == 1


def test_protocol_cka(monkeypatch, capsys, refuse, tiny, run):  # noqa: F811
    words = [tiny, f"run={run}", "protocol=cka", *WORDS[:2], "activations=mid-repeat?-res-out,unet-in", "t=0.5,1", "compared=40"]
    called(monkeypatch, probe, *words, "against=random")
    got = result(run, "cka")
    m, where = np.array(got["cka"]), {(r["model"], r["activation"], r["t"]): i for i, r in enumerate(got["table"])}
    assert m.shape == (12, 12) and np.allclose(m, m.T) and np.allclose(np.diag(m), 1) and (run / "probe/cka.png").exists()
    assert m[where["diffusion/base", "unet-in", 1.0], where["random", "unet-in", 1.0]] == pytest.approx(1, abs=1e-6)        # the same images, the same noise
    aligned = {k: got["table"][i]["alignment"] for k, i in where.items()}
    assert aligned["diffusion/base", "unet-in", 1.0] < 0.001 < aligned["diffusion/base", "unet-in", 0.5]
    got["recipe"] = {k: v for k, v in got["recipe"].items() if k not in ("transfer", "hashes")}                  # keys that came later
    (run / "probe/cka.json").write_text(json.dumps(got))
    called(monkeypatch, probe, *words, "against=random")
    assert "done already" in capsys.readouterr().out
    shutil.copytree(run / "diffusion/base", run / "diffusion/other")
    called(monkeypatch, probe, *words, "against=diffusion/other", "name=other")
    torch.save(torch.load(file := run / "diffusion/other/checkpoint.pt", weights_only=True) | dict(weights="new"), file)
    assert "hashes" in refuse("probe", *words, "against=diffusion/other", "name=other")        # trained anew under the same name


def test_bad_input(refuse, tiny, run):  # noqa: F811
    assert "grid=0" in refuse("probe", tiny, f"run={run}", "protocol=cka", "name=bad", *WORDS[:2], "grid=0")
    assert "compared=4" in refuse("probe", tiny, f"run={run}", "protocol=cka", "name=bad", *WORDS[:2], "compared=4")
    assert "no such checkpoint" in refuse("probe", tiny, f"run={run}", "protocol=cka", "name=bad", *WORDS[:2], "against=diffusion/none")

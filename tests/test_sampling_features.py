"""Activations kept while sampling: those of the network at the states that the solver visits."""
import json

import numpy as np
import pytest
import torch
from conftest import stage
from test_features import network
from test_probe_heads import called, run, tiny  # noqa: F401, F811  (fixtures)

import sample_ode
from extract_features import tapped
from sample_ode import Field, SampleOde, generate, integrate
from configs.run import Processes, draw
from train_diffusion import PATHS, Condition

NAMES = ["down-level0-repeat0-res-out", "up-level0-repeat0-res-out"]


class Here(Processes):
    device, vae = torch.device("cpu"), None


@pytest.mark.parametrize("labels, w", [(0, 1.0), (3, 1.0), (3, 2.0), (3, 0.0)])
def test_activations_are_those_of_the_path(labels, w, tmp_path):
    """The first evaluation sees the noise, the last one the state that steps before it lead to; guided: the conditional
    pass; batches change nothing."""
    net = network("stem", num_labels=labels)
    state = dict(path="cv", predict="v", channels=3, size=16, file="x", marginal=torch.ones(3) / 3)
    told = Condition("label", torch.arange(labels + 1)) if labels else None
    got = {}
    for batch in (7, 3):
        cfg = SampleOde(features=NAMES, features_at=[0, 3], steps=2, solver="heun", batch=batch, n=7,
                        labels=["1"] if labels else ["marginal"])
        field = Field(net, PATHS["cv"], "v", batch=batch, condition=told)
        about = generate(Here(), cfg, field, state, w, tmp_path / "x.npy")["features"]
        got[batch] = {(a["activation"], a["evaluation"], a["t"]): np.load(tmp_path / a["file"]) for a in about}
    assert set(got[7]) == {(n, i, t) for n in NAMES for i, t in ((0, 0.0), (3, 0.75))}
    assert all(len(got[7][k]) == 7 and np.allclose(got[7][k], got[3][k], atol=1e-5) for k in got[7])
    assert not any(m._forward_hooks for m in net.modules())
    x, label = draw(0, "sample noise", range(7), (3, 16, 16)), torch.full((7,), 1 if w else 3) if labels else None
    field = Field(net, PATHS["cv"], "v", w, condition=told)
    states = []
    field.output = lambda y, t, label, true=field.output: (states.append((y, t)), true(y, t, label))[1]
    integrate(field, x, None if not labels else torch.ones(7, dtype=torch.long), "heun", 2, 0)
    assert len(states) == 4 and torch.equal(states[0][0], x)
    condition = {} if label is None else dict(label=label)
    for number, t in ((0, 0.0), (3, 0.75)):
        for name in NAMES:
            with tapped(net, [name]) as maps:
                net(states[number][0], torch.full((7,), 1000 * states[number][1]), **condition)
            assert np.allclose(got[7][name, number, t], maps[name].mean((2, 3)), atol=1e-5)


def test_saved_beside_the_samples(monkeypatch, tiny, run):  # noqa: F811
    words = [tiny, f"run={run}", "n=10", "steps=3", "solver=euler", "evaluate=false", "features=mid-repeat?-res-out",
             "features_at=0,2", "features_pool=2"]
    called(monkeypatch, sample_ode, *words, "name=seen", "batch=4")
    about = json.loads((run / "samples/seen/metrics.json").read_text())["features"]
    assert [(a["activation"], a["evaluation"], a["shape"]) for a in about] == [
        (f"mid-repeat{r}-res-out", i, [128]) for i in (0, 2) for r in (0, 1)
    ]
    assert about[2]["t"] == pytest.approx(2 / 3, abs=1e-6)
    first = {a["file"]: np.load(run / "samples/seen" / a["file"]) for a in about}
    assert all(v.shape == (10, 128) and v.any(1).all() for v in first.values())
    stage("sample_ode", *words, "name=ranks", "batch=5", ranks=2)
    assert all(np.allclose(v, np.load(run / "samples/ranks" / f), atol=1e-4) for f, v in first.items())
    assert np.array_equal(*(np.load(run / f"samples/{n}/images.npy").astype(int) // 8 for n in ("seen", "ranks")))


@pytest.mark.parametrize("words, said", [
    (["features=nid*"], "no such activation"), (["features=mid*", "features_at=9"], "2 evaluations"),
    (["features=mid*", "features_at="], "2 evaluations"), (["features=mid*", "features_pool=0"], "features_pool=0"),
    (["features=mid*", "solver=rk4", "steps=2", "features_at=6"], "6 evaluations"),
    (["features=mid*", "compile=true"], "hooks need the plain network"),
    (["features=mid*", "solver=dopri5"], "fixed-step")])
def test_bad_input(refuse, tiny, run, words, said):  # noqa: F811
    assert said in refuse("sample_ode", tiny, f"run={run}", "n=4", "steps=2", "solver=euler", "name=bad", *words)

"""Killed at arbitrary moments, saving included, and run again: the same bits as a run that was never killed, on one rank and on two."""
import json
import random

import pytest
import torch
from conftest import killed, stage

SLOW_SAVES = ["save_every=32", "log_every=32", "images=3200"]      # saves after every update, so that kills also hit the saving


def weights(run, folder="diffusion/base"):
    """All tensors of a checkpoint that training changes, and the number of images seen."""
    state = torch.load(run / folder / "checkpoint.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return state["net"] | {f"ema.{k}": v for k, v in state["ema"].items()} | moments, state["seen"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_and_resume_equals_one_run(tiny, tmp_path, ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stage("train_diffusion", tiny, f"run={whole}", *SLOW_SAVES, ranks=ranks)
    stage("train_diffusion", tiny, f"run={broken}", *SLOW_SAVES, "images=64", ranks=ranks)     # start-up is not what is tested
    moments, hits = random.Random(ranks), 0
    for _ in range(4):
        hits += killed("train_diffusion", tiny, f"run={broken}", *SLOW_SAVES, after=moments.uniform(3.5, 6.0) + 2.5 * (ranks - 1), ranks=ranks)
    assert hits, "no kill came in time: the test proves nothing"
    stage("train_diffusion", tiny, f"run={broken}", *SLOW_SAVES, ranks=ranks)
    (a, n), (b, m) = weights(whole), weights(broken)
    assert n == m == 3200 and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line)["images"] for line in (d / "diffusion/base/metrics.jsonl").read_text().splitlines()] for d in (whole, broken)]
    assert logs[0] == logs[1]                             # no line twice, none missing


def test_guided_training_resumes_too(tiny, tmp_path):
    stage("train_diffusion", tiny, f"run={tmp_path}", "images=64")
    stage("self_label", tiny, f"run={tmp_path}", "method=classes")
    stage("train_guided", tiny, f"run={tmp_path}", "labels=classes", "name=once")
    stage("train_guided", tiny, f"run={tmp_path}", "labels=classes", "name=twice", "images=96", "save_every=32")
    assert "resuming at 96" in stage("train_guided", tiny, f"run={tmp_path}", "labels=classes", "name=twice").stdout
    (a, _), (b, _) = weights(tmp_path, "guided/once"), weights(tmp_path, "guided/twice")
    assert all(torch.equal(a[k], b[k]) for k in a)

"""The benchmarks at toy size: every one runs and names its numbers; what they would measure here means nothing."""
import contextlib
import io
import json
import math
import sys
from types import SimpleNamespace

import bench
import pytest
import torch

import train_diffusion

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_here(command, **_):
    """Stands for subprocess.run, without another process: what `python -c CODE` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(command[-1], {})
    return SimpleNamespace(stdout=out.getvalue())


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_toy(name, monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", run_here)
    monkeypatch.setattr(train_diffusion, "preview", lambda net, path, predict, z, **_: z)    # pictures take most
    result = bench.BENCHMARKS[name](DEVICE, small=True)
    if isinstance(result, str):
        return
    assert result["measured"] and all(math.isfinite(v) for v in result["measured"].values())
    assert result["goal"].keys() <= result["measured"].keys()
    bench.report(name, result)


def test_numbers_are_kept_by_name(tmp_path, monkeypatch, capsys):
    good = dict(measured=dict(a=1.04, b=0.4), goal=dict(a="<= 1.05", b=">= 0.5"))
    other = dict(measured=dict(c=2.0), goal={})
    benchmarks = dict(good=lambda device: good, other=lambda device: other, empty=lambda device: "nothing")
    monkeypatch.setattr(bench, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/bench-cpu.json").write_text('{"gone": {}, "good": {}}')
    for words in (["other"], ["good", "empty"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words, "--device", "cpu"])
        bench.main()
    kept = json.loads((tmp_path / "results/bench-cpu.json").read_text())
    assert {name: v["measured"] for name, v in kept.items()} == dict(good=good["measured"], other=other["measured"])
    lines = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("good")]
    assert lines == ["met", "MISSED"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "gone"])
    with pytest.raises(SystemExit):
        bench.main()

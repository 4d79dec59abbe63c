"""The benchmarks at toy size: both sides of every ratio run; what they would measure here means nothing."""
import json
import sys

import bench
import bench_hardware
import bench_sampling
import pytest
import torch

from configs.run import Model

UVIT, UNET = Model("uvit", channels=32, depth=2, heads=2, patch=8), Model(channels=16, mult=[1, 2], blocks=1, attention=[], head_channels=16, stem=4)


@pytest.mark.parametrize("model, labels, w, channels", [(UNET, 0, 1.0, 3), (UVIT, 5, 2.0, 3)])
def test_sampling_and_extraction(model, labels, w, channels):
    for sides in (bench_sampling.sampling(model, 32, 2, 1, labels, w, channels), bench_sampling.extraction(model, 32, 2)):
        assert 0 < bench_sampling.ratio("toy", 1, 1, **{k: sides[k] for k in list(sides)[:2]})


def test_training_as_a_share_of_the_hardware():
    rate = dict(bfloat16=1e6, float32=1e6)
    for model, latent in ((UVIT, True), (UNET, False)):
        out = bench_hardware.training("toy", model, latent, 4, 1, rate)
        assert out["bare_of_loop"] == pytest.approx(out["of_matrix_rate"] / out["bare_of_matrix_rate"], rel=0.05) and 0 <= out["waiting"] < 1


def test_numbers_are_kept_by_name(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "results").mkdir()
    for name, text in dict(good="print('x'); print('{\"a\": 1}')", bad="print('{\"a\": 2}'); raise SystemExit(1)", empty="print('skipped')").items():
        (tmp_path / "tests" / f"bench_{name}.py").write_text(text)
    file = tmp_path / "results" / f"bench-{torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else 'cpu'}.json"
    file.write_text('{"old": 3, "good": 0}')
    monkeypatch.setattr(bench, "HERE", tmp_path / "tests")
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(SystemExit, match="bad"):
        bench.main()
    assert json.loads(file.read_text()) == dict(old=3, good=dict(machine=bench.machine(), a=1))

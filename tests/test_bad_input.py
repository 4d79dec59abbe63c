"""Bad input gets one line that names the file or key and exit code 2, and nothing that was there is lost."""
import dataclasses
import importlib
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import stage
from PIL import Image

from configs.run import comments


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with a short model, features and labels; tests that damage it work on copies."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    stage("train_diffusion", tiny, f"run={folder}", "images=64")
    stage("extract_features", tiny, f"run={folder}", "activations=mid*res-out", "t=0.5")
    stage("self_label", tiny, f"run={folder}", "method=kmeans")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that may be damaged."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize("words, said", [
    (["imags=5"], "did you mean images"), (["images=many"], "images='many'"), (["images=1.5"], "images=1.5"), (["flip=3"], "flip=3"),
    (["path=straight"], "cv, vp"), (["batch=0"], "batch=0"), (["micro=7"], "micro=7"), (["modl.channels=8"], "did you mean model"),
    (["data.size=30"], "size"), (["model.stem=5"], "multiple of"), (["data.source=CIFAR11"], "did you mean CIFAR10"), (["--frobnicate"], "--frobnicate: unknown"),
    (["model.mult=[1,x]"], "model.mult"), (["precision=fp16"], "needs a GPU")])
def test_configuration(refuse, tiny, tmp_path, words, said):
    if "fp16" in words[0] and torch.cuda.is_available():
        pytest.skip("this machine can do it")
    assert said in refuse("train_diffusion", tiny, f"run={tmp_path / 'new'}", *words)


def test_help_explains_every_key():
    for module, section in [("train_diffusion", "TrainDiffusion"), ("probe", "Probe"), ("extract_features", "ExtractFeatures"), ("self_label", "SelfLabel"),
                            ("train_guided", "TrainGuided"), ("sample_ode", "SampleOde"), ("configs.run", "Data"), ("configs.run", "Model")]:
        cls = getattr(importlib.import_module(module), section)
        for f in dataclasses.fields(cls):
            assert len(comments(cls).get(f.name, "")) > 4, f"{module}: {section}.{f.name}"
    assert "map of patch labels" in comments(importlib.import_module("train_guided").TrainGuided)["condition"]              # the fourth line of it


def test_yaml(refuse, tmp_path):
    assert "no.yaml" in refuse("train_diffusion", tmp_path / "no.yaml")
    for text, said in (("data: [", "not valid YAML"), ("- 1", "expected sections"), ("dta: {size: 3}", "did you mean data"), ("data: {sze: 3}", "did you mean size")):
        (tmp_path / "x.yaml").write_text(text)
        assert said in refuse("train_diffusion", tmp_path / "x.yaml", f"run={tmp_path / 'r'}")


def test_other_data_in_the_same_run(refuse, tiny, run):
    assert "data.train=512" in refuse("train_diffusion", tiny, f"run={run}", "data.train=100")


def test_other_recipe_under_the_same_name(refuse, tiny, copy):
    before = (copy / "diffusion/base/checkpoint.pt").read_bytes()
    assert "lr=0.001, now 0.5" in refuse("train_diffusion", tiny, f"run={copy}", "lr=0.5")
    assert "overwrite=true" in refuse("extract_features", tiny, f"run={copy}", "activations=mid*res-out", "t=0.7")
    assert "overwrite=true" in refuse("self_label", tiny, f"run={copy}", "method=kmeans", "K=5")
    assert (copy / "diffusion/base/checkpoint.pt").read_bytes() == before


def test_missing_pieces(refuse, tiny, run, tmp_path):
    assert "no such run" in refuse("extract_features", tiny, f"run={tmp_path / 'nowhere'}")
    assert "diffusion/other" in refuse("extract_features", tiny, f"run={run}", "checkpoint=diffusion/other")
    assert "probe.py first" in refuse("extract_features", tiny, f"run={run}", "name=x")
    assert "self_label.py" in refuse("train_guided", tiny, f"run={run}", "labels=none_such")
    assert "extract_features.py" in refuse("self_label", tiny, f"run={run}", "features=none_such")
    assert "nearest" in refuse("extract_features", tiny, f"run={run}", "activations=mid-repeat7-res-out", "t=0.5")
    assert "ids must be in" in refuse("sample_ode", tiny, f"run={run}", "checkpoint=guided/none") if (run / "guided/none").exists() else True


def test_broken_checkpoints(refuse, tiny, copy):
    path = copy / "diffusion/base/checkpoint.pt"
    good = path.read_bytes()
    for blob in (good[:len(good) // 2], b"", b"hello"):
        path.write_bytes(blob)
        assert "not a readable checkpoint" in refuse("extract_features", tiny, f"run={copy}", "activations=mid*", "t=0.5", "name=x")
    torch.save({"state_dict": {}}, path)
    assert "not a checkpoint of this project" in refuse("sample_ode", tiny, f"run={copy}")
    path.write_bytes(good)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"format": 99}, path)
    assert "format 99" in refuse("sample_ode", tiny, f"run={copy}")
    torch.save(state | {"model": state["model"] | {"channels": 32, "head_channels": 32}}, path)
    assert "do not fit the architecture" in refuse("sample_ode", tiny, f"run={copy}")
    path.write_bytes(good)
    assert "model section differs" in refuse("train_guided", tiny, f"run={copy}", "model.channels=32", "model.head_channels=32")
    assert "predict=v" in refuse("train_guided", tiny, f"run={copy}", "predict=eps")


def test_label_files_that_do_not_fit(refuse, tiny, copy):
    path = copy / "labels/kmeans.npz"
    good = dict(np.load(path))
    for change, said in ((dict(train=good["train"][:-3]), "509 train labels"), (dict(train=good["train"] + 6), "0 ... 5"), (dict(train=good["train"] * 1.5), "whole numbers")):
        np.savez(path, **good | change)
        assert said in refuse("train_guided", tiny, f"run={copy}")
    path.write_bytes(b"PK not really")
    assert "not a readable label file" in refuse("train_guided", tiny, f"run={copy}")
    np.savez(path, **good)
    info = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(info | {"data": {"train": "0" * 16, "test": "0" * 16}}))
    assert "belongs to train images 0000" in refuse("train_guided", tiny, f"run={copy}")


def test_features_that_do_not_fit(refuse, tiny, copy):
    path = next((copy / "features/base").glob("train-*.npy"))
    good = np.load(path)
    bad = good.copy()
    bad[77] = np.nan
    np.save(path, bad)
    assert "row 77" in refuse("self_label", tiny, f"run={copy}", "method=kmeans", "name=x")
    np.save(path, good[:-1])
    assert "511 rows" in refuse("self_label", tiny, f"run={copy}", "method=kmeans", "name=x")
    np.save(path, good)
    assert "K=1000" in refuse("self_label", tiny, f"run={copy}", "method=kmeans", "name=x", "K=1000")
    assert not list((copy / "labels").glob("x*"))


def test_data_arrays_that_were_cut(refuse, tiny, copy):
    np.save(copy / "data/train/images.npy", np.zeros((5, 3, 32, 32), np.uint8))
    assert "5 rows" in refuse("extract_features", tiny, f"run={copy}", "activations=mid*", "t=0.5", "name=x")


def test_sampling_requests(refuse, tiny, run):
    for words, said in ((["n=1"], "n=1"), (["solver=rk5"], "euler"), (["evaluator=nothing.ts"], "evaluator=nothing.ts"), (["steps=0"], "steps=0")):
        assert said in refuse("sample_ode", tiny, f"run={run}", "name=x", *words)


def test_corrupt_images(refuse, tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(30):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    words = [tiny, f"run={tmp_path / 'r'}", "data.source=folder", f"data.root={folder}", "data.train=0", "data.test=0", "images=32"]
    assert "07.png" in refuse("train_diffusion", *words)
    assert not (tmp_path / "r/data/train").exists()       # nothing half done is left under a final name
    words[1] = f"run={tmp_path / 'r2'}"
    stage("train_diffusion", *words, "data.skip_bad=true")
    infos = [json.loads((tmp_path / f"r2/data/{s}/info.json").read_text()) for s in ("train", "test")]
    assert sum(i["count"] for i in infos) == 29 and sum(len(i["skipped"]) for i in infos) == 1


def test_array_files(refuse, tiny, tmp_path):
    words = [tiny, f"run={tmp_path / 'r'}", "data.source=arrays", f"data.root={tmp_path / 'x.npz'}", "data.train=0", "data.test=0", "images=32"]
    assert "no such" in refuse("train_diffusion", *words)
    np.savez(tmp_path / "x.npz", pictures=np.zeros((4, 32, 32, 3), np.uint8))
    assert "no array 'images'" in refuse("train_diffusion", *words)
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 32, 32, 3), np.float32))
    assert "float32" in refuse("train_diffusion", *words)
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    assert "16x16" in refuse("train_diffusion", *words)


def test_torchvision_without_files(refuse, tiny, tmp_path):
    assert "data.download=true" in refuse("train_diffusion", tiny, f"run={tmp_path / 'r'}", "data.source=CIFAR10", f"data.root={tmp_path}", "data.train=0", "data.test=0")


def test_full_disk_keeps_the_previous_checkpoint(tiny, tmp_path):
    """A run folder on a file system of three megabytes: the first save fits beside the data, the next ones do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        stage("train_diffusion", tiny, f"run={disk / 'r'}", "images=64")
        before = (disk / "r/diffusion/base/checkpoint.pt").read_bytes()
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"0" * max(0, free - 100_000))
        p = stage("train_diffusion", tiny, f"run={disk / 'r'}", "images=256", ok=False)
        assert p.returncode == 2 and len(p.stderr.strip().splitlines()) == 1 and "checkpoint.pt" in p.stderr, p.stderr
        assert (disk / "r/diffusion/base/checkpoint.pt").read_bytes() == before
    finally:
        subprocess.run(["umount", str(disk)])


def test_unwritable_run_folder(refuse, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refuse("train_diffusion", tiny, f"run={tmp_path / 'file' / 'r'}")


def test_a_failed_first_attempt_does_not_lock_the_run(refuse, tiny, tmp_path):
    words = [tiny, f"run={tmp_path / 'r'}", "images=32"]
    assert "did you mean shapes" in refuse("train_diffusion", *words, "data.source=shaps")
    stage("train_diffusion", *words)


def test_classes_of_both_parts_have_the_same_ids(tiny, tmp_path):
    for part in ("train/cat", "train/dog", "train/emu", "test/cat", "test/emu"):
        (tmp_path / "images" / part).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(tmp_path / "images" / part / f"{i}.png")
    stage("train_diffusion", tiny, f"run={tmp_path / 'r'}", "data.source=folder", f"data.root={tmp_path / 'images'}", "data.train=0", "data.test=0", "images=32")
    assert np.load(tmp_path / "r/data/test/classes.npy").tolist() == [0] * 12 + [2] * 12


def test_arrays_that_do_not_match(refuse, tiny, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((300, 32, 32, 3), np.uint8), classes=np.zeros(299, np.int64))
    assert "one row for each image" in refuse("train_diffusion", tiny, f"run={tmp_path / 'r'}", "data.source=arrays", f"data.root={tmp_path / 'x.npz'}", "data.train=0", "data.test=0")


def test_requests_without_what_they_need(refuse, tiny, run):
    assert "evaluate=true" in refuse("sample_ode", tiny, f"run={run}", "name=x", "sweep=nfe", "evaluate=false")
    assert "auto, bf16" in refuse("sample_ode", tiny, f"run={run}", "name=x", "precision=bf17")
    assert "K=1" in refuse("probe", tiny, f"run={run}", "K=1")


def test_features_of_an_earlier_state_are_named(copy, tiny):
    """A model that went on after its features were extracted: the labels are made, and it is said whose they are."""
    info = json.loads((copy / "features/base/info.json").read_text())
    (copy / "features/base/info.json").write_text(json.dumps(info | dict(hash="0" * 16)))
    assert "are of an earlier state of diffusion/base" in stage("self_label", tiny, f"run={copy}", "method=kmeans", "name=again").stdout

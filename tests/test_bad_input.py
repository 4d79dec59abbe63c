"""Bad input gets one line that names the file or key and exit code 2, and nothing that was there is lost."""
import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complaint, inside, stage
from PIL import Image

from configs import run as cr

STAGES = dict(train_diffusion="TrainDiffusion", probe="Probe", extract_features="ExtractFeatures",
              self_label="SelfLabel", train_guided="TrainGuided", sample_ode="SampleOde")
READ = ["extract_features", "activations=mid*res-out", "t=0.5"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with a short model, features and labels; tests that damage it work on copies."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    words = [tiny, f"run={folder}", "data.train=200", "data.test=60"]
    inside("train_diffusion", *words, "images=64")
    inside(READ[0], *words, *READ[1:])
    inside("self_label", *words, "method=kmeans")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that may be damaged."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def said(capsys, monkeypatch, tiny):
    """said(run folder, stage, *words) -> the error line of a stage on such a run."""
    def call(folder, name, *words):
        return complaint(capsys, monkeypatch, name, tiny, f"run={folder}", "data.train=200", "data.test=60", *words)
    return call


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

@pytest.mark.parametrize("words, text", [
    (["imags=5"], "did you mean images"), (["images=many"], "images=many"), (["images=1.5"], "images=1.5"),
    (["flip=3"], "flip=3"), (["path=straight"], "path=straight"), (["batch=0"], "batch=0"), (["micro=7"], "micro=7"),
    (["modl.channels=8"], "did you mean model"), (["data.size=30"], "size"), (["model.stem=5"], "stem"),
    (["data.test_fraction=0"], "test_fraction"), (["data.imbalance=nan"], "imbalance"),
    (["data.source=CIFAR11"], "did you mean CIFAR10"),
    (["data.source=CIFAR11", "--dry-run"], "did you mean CIFAR10"), (["--frobnicate"], "--frobnicate: unknown"),
    (["model.mult=[1,x]"], "model.mult"), (["precision=bf8"], "'auto', 'bf16', 'fp16'"),
    (["data.train=-1"], "data.train=-1"), (["lr=inf"], "lr=inf"), (["model.clock=nan,1"], "model.clock=nan,1"),
    (["model.channels=17", "model.head_channels=17"], "must be even"),
    (["model.mult=", "model.attention="], "at least one level"),
    (["data.source=folder", "data.root=/nope", "--dry-run"], "data.root=/nope: no images there")])
def test_configuration(refuse, tiny, tmp_path, words, text):
    assert text in refuse("train_diffusion", tiny, f"run={tmp_path / 'new'}", *words)


def test_lists_may_hold_globs_with_brackets():
    for text, names in (("[a,b]", ["a", "b"]), ("a,b", ["a", "b"]), ("up-repeat[01]", ["up-repeat[01]"]),
                        ("[mu]*-out", ["[mu]*-out"]), ("[]", []), ("", [])):
        assert cr.convert(list[str], text) == names


def test_units_are_exact():
    assert cr.convert(int, "2.01k") == 2010 and cr.convert(int, "16.754M") == 16_754_000
    for wrong in ("5kM", "k", "1.5"):
        with pytest.raises(ValueError):
            cr.convert(int, wrong)


def test_a_plan_is_refused_like_its_command(run, said):
    assert "no such activation" in said(run, "train_guided", "labels=online", "sk_activation=nonsense", "--dry-run",
                                        "switch=64", "sk_until=0")
    assert "data.seed=0, now data.seed=5" in said(run, "train_diffusion", "data.seed=5", "--dry-run")


def test_labels_of_others_stay(copy, said):
    np.savez(copy / "labels/theirs.npz", mine=np.arange(3))
    for name in ("theirs", "kmeans"):
        assert "made by another program" in said(copy, "train_guided", "labels=online", f"name={name}", "switch=64",
                                                      "sk_until=0")
    assert list(np.load(copy / "labels/theirs.npz")) == ["mine"]


@pytest.mark.parametrize("name", STAGES)
def test_help_explains_every_key(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as e:
        module.main()
    lines = capsys.readouterr().out.splitlines()
    assert not e.value.code
    for field in dataclasses.fields(getattr(module, STAGES[name])):
        line = next(line for line in lines if line.startswith(f"  {field.name}="))
        assert len(field.metadata["text"]) > 4 and field.metadata["text"] in line


def test_yaml(refuse, tmp_path):
    assert "no.yaml" in refuse("train_diffusion", tmp_path / "no.yaml")
    for text, what in (("data: [", "expected YAML"), ("- 1", "expected YAML"), ("data: 3", "expected YAML"),
                       ("dta: {size: 3}", "did you mean data"), ("data: {sze: 3}", "did you mean size"),
                       ("data: {train: 2001-99-99}", "train=2001-99-99"), ("data: {5: 3}", "data.5"),
                       ("data: {size: [1]}", "data.size"), ("data: {size: 3, size: 4}", "size: is there twice"),
                       ("data: {size: 3}\ndata: {train: 4}", "data: is there twice")):
        (tmp_path / "x.yaml").write_text(text)
        assert what in refuse("train_diffusion", tmp_path / "x.yaml", f"run={tmp_path / 'r'}")


def test_values_in_yaml_are_what_is_written_there(tmp_path):
    """YAML itself reads yes as true, and 010 and 1:30 as 8 and 90."""
    (tmp_path / "x.yaml").write_text("data: {classes: [yes, 002], train: 010, skip_bad: true, root:}\nmodel:\n")
    data = cr.fill("data", cr.Data, cr.read_yaml(tmp_path / "x.yaml")["data"])
    assert data == cr.Data(classes=["yes", "002"], train=10, skip_bad=True)
    for value in ("yes", "1:30"):
        with pytest.raises(cr.UserError, match=f"data.skip_bad={value}"):
            cr.fill("data", cr.Data, {"skip_bad": value})


def test_ends_that_are_no_errors(monkeypatch, capsys):
    """Ctrl-C, also while torch writes, and a reader such as `head` that has seen enough."""
    def ended(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as e:
            cr.cli(main)
        return e.value.code

    monkeypatch.setattr(os, "_exit", sys.exit)
    assert ended(KeyboardInterrupt()) == 130 and "goes on from what was saved" in capsys.readouterr().err
    assert ended(BrokenPipeError()) == 141 and not capsys.readouterr().err


@pytest.mark.parametrize("why, said", [(OSError(28, "No space left"), cr.UserError),
                                       (KeyboardInterrupt(), KeyboardInterrupt)])
def test_what_stops_torch_from_writing_is_said(tmp_path, monkeypatch, why, said):
    def save(value, f):
        try:
            raise why
        except BaseException:
            raise RuntimeError("unexpected pos 46")       # as torch does

    (tmp_path / "x.pt").write_bytes(b"before")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(said) as e:
        cr.save_torch(tmp_path / "x.pt", {})
    assert said is KeyboardInterrupt or "x.pt: could not be written (No space left)" in str(e.value)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("x.pt", b"before")]


def test_a_full_disk_under_a_new_folder_is_named(tmp_path):
    run = cr.Run("extract_features", tmp_path, None, cr.Data(), cr.Model(), {}, False, set())
    with pytest.raises(cr.UserError, match="features/x: could not be written .*No space left"):
        with cr.making(run, "features", "x", "info.json") as folder:
            (folder / "half.npy").write_bytes(b"0")
            raise OSError(28, "No space left on device")
    with pytest.raises(cr.UserError, match="features/x: another command has just made it"):      # while we waited
        with cr.making(run, "features", "x", "info.json", lambda: True):
            raise AssertionError
    assert not list((tmp_path / "features").iterdir())


def test_unwritable_run_folder(refuse, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refuse("train_diffusion", tiny, f"run={tmp_path / 'file' / 'r'}")


def test_requests_that_cannot_be_met(said, run):
    for words, text in ((["n=1"], "n=1"), (["solver=rk5"], "euler"), (["steps=0"], "steps=0"),
                        (["evaluator=nothing.ts"], "nothing.ts"), (["tol=1e-9"], "at least 1e-06"),
                        (["sweep=heun", "evaluate=false"], "evaluate=true"), (["precision=bf17"], "'auto', 'bf16'")):
        assert text in said(run, "sample_ode", "name=x", *words)
    for words in (["evaluator="], ["guidance="], ["sweep=heun", "sweep_steps="]):
        assert "name at least one" in said(run, "sample_ode", "name=x", *words)
    for words in (["lr="], ["l2="], ["seeds="], ["activations="]):
        assert "name at least one" in said(run, "probe", "protocol=head", *words)
    assert "K=1" in said(run, "probe", "K=1")


# ---------------------------------------------------------------------------------------------------------------------
# Other work under the same name; missing and damaged pieces

def test_other_data_in_the_same_run(said, run):
    assert "data.train=200" in said(run, "train_diffusion", "data.train=100")


def test_models_of_another_size_are_not_compared_with_these_images(refuse, tiny, run, tmp_path):
    words = [tiny, f"run={tmp_path}/small", "data.size=16", "data.train=40", "data.test=40"]
    stage("train_diffusion", *words, "--prepare")
    words.append(f"checkpoint={run}/diffusion/base/checkpoint.pt")
    for more in (["n=4"], ["n=4", "direction=encode"]):
        wrong = refuse("sample_ode", *words, *more)
        assert "inputs of 3 x 32 x 32, this run's are 3 x 16 x 16" in wrong


def test_training_does_not_start_from_a_model_of_another_size(refuse, tiny, run, tmp_path):
    words = [tiny, f"run={tmp_path}/small", "data.size=16", "data.train=40", "data.test=40"]
    stage("train_diffusion", *words, "--prepare")
    stage("self_label", *words, "method=classes")
    said = refuse("train_guided", *words, "labels=classes", f"init={run}/diffusion/base/checkpoint.pt")
    assert "inputs of 3 x 32 x 32, this run's are 3 x 16 x 16" in said


def test_other_recipe_under_the_same_name(said, copy):
    before = (copy / "diffusion/base/checkpoint.pt").read_bytes()
    assert "lr=0.001, now 0.5" in said(copy, "train_diffusion", "lr=0.5")
    assert "overwrite=true" in said(copy, *READ, "t=0.7")
    assert "overwrite=true" in said(copy, "self_label", "method=kmeans", "K=5")
    assert (copy / "diffusion/base/checkpoint.pt").read_bytes() == before


def test_missing_pieces(said, run, tmp_path):
    assert "no such run" in said(tmp_path / "nowhere", "extract_features")
    assert "diffusion/other" in said(run, "extract_features", "checkpoint=diffusion/other")
    assert "probe.py first" in said(run, "extract_features", "name=x")
    assert "self_label.py" in said(run, "train_guided", "labels=none_such")
    assert "extract_features.py" in said(run, "self_label", "features=none_such")
    assert "nearest" in said(run, "extract_features", "activations=mid-repeat7-res-out", "t=0.5")


def test_broken_checkpoints(said, copy):
    path = copy / "diffusion/base/checkpoint.pt"
    good = path.read_bytes()
    for blob in (good[:len(good) // 2], b"", b"hello"):
        path.write_bytes(blob)
        assert "checkpoint.pt" in said(copy, *READ, "name=x")
    path.write_bytes(good)
    state = torch.load(path, weights_only=True)
    wider = state["model"] | {"channels": 32, "head_channels": 32}
    for other in ({"state_dict": {}}, state | {"format": 99}, state | {"model": wider}, state | {"predict": "zzz"}):
        torch.save(other, path)
        assert "checkpoint.pt" in said(copy, "sample_ode")
    torch.save(state | {"config": state["config"] | {"model": [1]}}, path)
    assert "checkpoint.pt" in said(copy, "train_diffusion")
    path.write_bytes(good)
    assert "model section" in said(copy, "train_guided", "model.channels=32", "model.head_channels=32")
    assert "predict=v" in said(copy, "train_guided", "predict=eps")


def test_a_checkpoint_that_cannot_be_reached_is_not_replaced(said, copy):
    """A link to a disk that is not mounted; a folder."""
    folder = copy / "diffusion/base"
    (folder / "checkpoint.pt").rename(copy / "kept.pt")
    for make in (lambda path: path.symlink_to("/nowhere/checkpoint.pt"), lambda path: (path.unlink(), path.mkdir())):
        make(folder / "checkpoint.pt")
        before = sorted(f.name for f in folder.rglob("*"))
        assert f"{folder}/checkpoint.pt: no such checkpoint" in said(copy, "train_diffusion", "images=32")
        assert sorted(f.name for f in folder.rglob("*")) == before


def test_label_files_that_do_not_fit(said, copy):
    path, note = copy / "labels/kmeans.npz", copy / "labels/kmeans.json"
    info = {k: v for k, v in json.loads(note.read_text()).items() if k != "hash"}          # as of labels made by hand
    note.write_text(json.dumps(info))
    good = dict(np.load(path))
    train, test = good["train"], good["test"]
    for change, text in ((dict(train=train[:-3]), "200 whole numbers"), (dict(test=test + 6), "-1 ... 5"),
                         (dict(train=train + 6), "0 ... 5"), (dict(train=train * 1.5), "whole numbers"),
                         (dict(num_labels=np.zeros(2)), "kmeans.npz: damaged")):
        np.savez(path, **good | change)
        assert text in said(copy, "train_guided")
    path.write_bytes(b"PK not really")
    assert "kmeans.npz: damaged" in said(copy, "train_guided")
    np.savez(path, **good)
    note.write_text(json.dumps(info | {"data": {"train": "0" * 16, "test": "0" * 16}}))
    assert "belongs to train images 0000" in said(copy, "train_guided")
    for text in ("[]", "", '{"data": 3}', "{" * 2000):
        note.write_text(text)
        assert "kmeans." in said(copy, "train_guided")


@pytest.mark.parametrize("file, name, words", [
    ("features/base/info.json", "recipe", READ), ("labels/kmeans.json", "recipe", ["self_label"]),
    ("data/train/info.json", "origin", ["train_diffusion", "data.root=."])])
def test_descriptions_that_hold_something_else(said, copy, file, name, words):
    info = json.loads((copy / file).read_text())
    for odd in ([1], "x", 3):
        (copy / file).write_text(json.dumps(info | {name: odd}))
        assert f"{file}: damaged" in said(copy, *words)


def test_features_that_do_not_fit(said, copy):
    path = next((copy / "features/base").glob("train-*.npy"))
    good = np.load(path)
    bad = good.copy()
    bad[77] = np.nan
    np.save(path, bad)
    assert "not finite" in said(copy, "self_label", "method=kmeans", "name=x")
    np.save(path, good[:-1])
    assert "(199, 32) for 200 images" in said(copy, "self_label", "method=kmeans", "name=x")
    np.save(path, good)
    assert "K=1000" in said(copy, "self_label", "method=kmeans", "name=x", "K=1000")
    assert not list((copy / "labels").glob("x*"))
    note = path.with_name("info.json")
    info = json.loads(note.read_text())
    for other in (info | dict(data=None), info | dict(arrays=[{}]), info | dict(arrays=3), []):
        note.write_text(json.dumps(other))
        assert "features/base" in said(copy, "self_label", "method=kmeans", "name=x")


def test_full_disk_keeps_the_previous_checkpoint(tiny, tmp_path):
    """A run folder on a small file system: the first save fits beside the data, the next ones do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        inside("train_diffusion", tiny, f"run={disk / 'r'}", "images=64")
        before = (disk / "r/diffusion/base/checkpoint.pt").read_bytes()
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"0" * max(0, free - 1_000_000))        # pictures fit, a checkpoint does not
        p = stage("train_diffusion", tiny, f"run={disk / 'r'}", "images=256", ok=False)
        assert p.returncode == 2 and len(p.stderr.strip().splitlines()) == 1 and "checkpoint.pt" in p.stderr, p.stderr
        assert (disk / "r/diffusion/base/checkpoint.pt").read_bytes() == before
    finally:
        subprocess.run(["umount", str(disk)])


# ---------------------------------------------------------------------------------------------------------------------
# Data

def test_data_arrays_that_were_cut(said, copy):
    np.save(copy / "data/train/images.npy", np.zeros((5, 3, 32, 32), np.uint8))
    assert "data/train: damaged" in said(copy, *READ, "name=x")
    (copy / "data/train/info.json").write_text("{}")
    assert "data/train: damaged" in said(copy, *READ, "name=x")


def test_corrupt_images_do_not_lock_the_run(refuse, tiny, tmp_path):
    """The same folder can be prepared after what was wrong has been put right, in the same run."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(30):
        x = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(x).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    words = [tiny, f"run={tmp_path / 'r'}", "data.source=folder", f"data.root={folder}", "data.train=0", "data.test=0"]
    assert "07.png" in refuse("train_diffusion", *words, "--prepare")
    assert "data.test_fraction" in refuse("train_diffusion", *words, "--prepare", "data.test_fraction=0.0001")
    assert "did you mean folder" in refuse("train_diffusion", *words, "--prepare", "data.source=foldr")
    assert not (tmp_path / "r/data").exists()             # nothing half done is left
    inside("train_diffusion", *words, "--prepare", "data.skip_bad=true")
    infos = [json.loads((tmp_path / f"r/data/{s}/info.json").read_text()) for s in ("train", "test")]
    assert sum(i["count"] for i in infos) == 29 and sum(len(i["skipped"]) for i in infos) == 1
    Image.fromarray(x).save(folder / "07.png")
    before = (tmp_path / "r/config.yaml").read_bytes()
    assert "use another run=DIR" in refuse("train_diffusion", *words, "--prepare")
    assert (tmp_path / "r/config.yaml").read_bytes() == before


def test_a_dry_run_needs_prepared_data(said, tmp_path):
    assert "no such checkpoint; train it first" in said(tmp_path / "none", *READ, "--dry-run")


def test_a_handful_of_damaged_files():
    """See tests/damage.py, which takes a count."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("damage.py"), "12", "--seed", "5"],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "12 damaged files" in done.stdout and "0 wrong" in done.stdout

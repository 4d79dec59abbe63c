"""The whole chain at tiny size, on one process and on two: every stage runs, writes what the contracts say, and agrees
across processes. Stages on one process run in that of the test, which spares the time of many imports."""
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, stage

from configs.run import weights_hash


STAGES = [
    ("train_diffusion",), ("probe",), ("extract_features",), ("self_label", "method=kmeans"),
    ("self_label", "method=sinkhorn"), ("self_label", "method=random", "reference=kmeans"),
    ("self_label", "method=classes"), ("train_guided", "labels=kmeans"), ("train_guided", "labels=none"),
    ("sample_ode", "checkpoint=guided/kmeans", "name=kmeans", "guidance=1,2"),
    ("sample_ode", "checkpoint=guided/unconditional", "name=unconditional"),
]


@pytest.fixture(scope="session")
def chain(tiny, tmp_path_factory):
    """A finished tiny run: the folder."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for name, *words in STAGES:
        inside(name, tiny, f"run={run}", *words)
    return run


def test_files_follow_the_contract(chain):
    images = np.load(chain / "data/train/images.npy", mmap_mode="r")
    assert images.shape == (512, 3, 32, 32) and images.dtype == np.uint8
    assert np.load(chain / "data/train/classes.npy").dtype == np.int64 and np.load(
        chain / "data/train/boxes.npy"
    ).shape == (512, 4)
    assert np.load(chain / "data/test/masks.npy").shape == (256, 32, 32)
    labels = np.load(chain / "labels/kmeans.npz")
    assert (
        labels["train"].shape == (512,)
        and labels["test"].shape == (256,)
        and int(labels["num_labels"]) == 6
        and len(labels["centroids"]) == 6
    )
    info = json.loads((chain / "labels/kmeans.json").read_text())
    assert {"nmi", "hungarian_accuracy", "size_entropy"} <= set(info["scores"])
    state = torch.load(chain / "guided/kmeans/checkpoint.pt", weights_only=True)
    assert state["num_labels"] == 6 and state["seen"] == 256
    assert torch.allclose(state["marginal"], torch.from_numpy(np.bincount(labels["train"], minlength=6) / 512))
    assert state["net"]["label_emb.weight"].shape[0] == 7
    samples = json.loads((chain / "samples/kmeans/metrics.json").read_text())
    assert (
        np.load(chain / "samples/kmeans/images.npy").shape == (64, 3, 32, 32)
        and np.load(chain / "samples/kmeans/labels.npy").max() < 6
    )
    assert {"frechet", "precision", "recall", "coverage", "memorisation"} <= set(samples["scores"])
    assert (
        samples["w"] in (1, 2)
        and samples["nfe"] == 4
        and samples["network_calls"] == (4 if samples["w"] == 1 else 8)
        and samples["selection"]["seed"] != samples["seed"]
    )
    for picture in (
        "diffusion/base/samples/0000000512.png",
        "labels/kmeans.png",
        "probe/sweep.png",
        "guided/kmeans/samples/0000000256.png",
        "samples/kmeans/grid.png",
    ):
        assert (chain / picture).stat().st_size > 500, picture


def test_metrics_have_a_line_per_interval(chain):
    lines = [json.loads(line) for line in (chain / "diffusion/base/metrics.jsonl").read_text().splitlines()]
    assert [m["images"] for m in lines] == [128, 256, 384, 512]
    assert (
        all(m["images_per_second"] > 0 for m in lines)
        and lines[-1]["loss"] < lines[0]["loss"]
    )


def test_a_dry_run_says_what_would_be_written(chain, tiny):
    words = [tiny, f"run={chain}", "--dry-run", "name=new", "n=1000", "checkpoint=guided/kmeans"]
    said = inside("sample_ode", *words)
    assert "1,000 samples" in said and "3 MB" in said and "parameters" in said and not (chain / "samples/new").exists()


def test_the_same_commands_again_find_the_work_done(chain, tiny):
    before = {
        p: p.stat().st_mtime_ns
        for p in chain.rglob("*")
        if p.is_file() and p.name not in ("config.yaml", "metrics.jsonl")
    }
    for name, *words in [
        ("train_diffusion",),
        ("probe",),
        ("extract_features",),
        ("self_label", "method=kmeans"),
        ("train_guided", "labels=kmeans"),
        ("sample_ode", "checkpoint=guided/kmeans", "name=kmeans", "guidance=1,2"),
    ]:
        assert "done already" in inside(name, tiny, f"run={chain}", *words), name
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.parent.name != "kmeans" or p.suffix != ".npz")


def test_two_ranks_give_the_same_features_labels_and_samples(chain, tiny, tmp_path):
    run = tmp_path / "two"
    shutil.copytree(chain, run, ignore=shutil.ignore_patterns("features", "labels", "samples"))
    stage("extract_features", tiny, f"run={run}", ranks=2)
    file = next((chain / "features/base").glob("train-*.npy")).name
    assert np.allclose(np.load(run / "features/base" / file), np.load(chain / "features/base" / file), atol=1e-5)
    shutil.rmtree(run / "features")
    shutil.copytree(chain / "features", run / "features")
    for method in ("kmeans", "sinkhorn"):
        stage("self_label", tiny, f"run={run}", f"method={method}", ranks=2)
        a, b = (np.load(d / f"labels/{method}.npz")["train"] for d in (chain, run))
        assert (a == b).mean() > 0.99, method
    stage(
        "sample_ode", tiny, f"run={run}", "checkpoint=guided/kmeans", "name=kmeans", "guidance=1,2", "batch=7", ranks=2
    )
    a, b = (np.load(d / "samples/kmeans/images.npy").astype(int) for d in (chain, run))
    assert abs(a - b).max() <= 1
    assert np.array_equal(*(np.load(d / "samples/kmeans/labels.npy") for d in (chain, run)))
    a, b = (json.loads((d / "samples/kmeans/metrics.json").read_text())["scores"]["frechet"] for d in (chain, run))
    assert a == pytest.approx(b, rel=1e-2)
    keys = ["checkpoint=guided/kmeans", "name=adaptive", "guidance=2", "solver=dopri5", "n=100", "evaluate=false"]
    for d, ranks in ((chain, 1), (run, 2)):               # a block of 64 is on both processes
        stage("sample_ode", tiny, f"run={d}", *keys, ranks=ranks)
    a, b = (json.loads((d / "samples/adaptive/metrics.json").read_text()) for d in (chain, run))
    assert [a[k] for k in ("nfe", "network_calls")] == pytest.approx([b[k] for k in ("nfe", "network_calls")])


def test_labels_say_that_their_features_are_of_an_earlier_model(chain, tiny, tmp_path):
    shutil.copytree(chain, tmp_path / "run", ignore=shutil.ignore_patterns("labels", "samples", "guided"))
    words = [tiny, f"run={tmp_path}/run"]
    assert "earlier state" not in inside("self_label", *words, "name=fresh")
    file = tmp_path / "run/diffusion/base/checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(weights="0" * 16)))
    assert "an earlier state of diffusion/base" in inside("self_label", *words, "name=stale")


def test_two_ranks_share_the_times_of_a_sweep(chain, tiny):
    """Three times on two ranks: each rank clusters its own, and the table is that of one process."""
    words = [tiny, f"run={chain}", "t=0.4,0.6,0.8", "activations=mid*-out,up-level0*-out"]
    inside("probe", *words, "name=alone")
    stage("probe", *words, "name=shared", ranks=2)
    a, b = (json.loads((chain / f"probe/{n}.json").read_text()) for n in ("alone", "shared"))
    assert [(r["activation"], r["t"]) for r in a["table"]] == [(r["activation"], r["t"]) for r in b["table"]]
    assert all(
        x["consensus"] == pytest.approx(y["consensus"], abs=0.02) and x["nmi"] == pytest.approx(y["nmi"], abs=0.02)
        for x, y in zip(a["table"], b["table"])
    )


def test_two_ranks_train_on_the_same_images(chain, tiny, tmp_path):
    run = tmp_path / "two"
    shutil.copytree(chain / "data", run / "data")
    shutil.copy(chain / "config.yaml", run / "config.yaml")
    stage("train_diffusion", tiny, f"run={run}", ranks=2)
    a, b = (torch.load(d / "diffusion/base/checkpoint.pt", weights_only=True)["ema"] for d in (chain, run))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3          # the same global batches, up to rounding


def test_two_machines_train_like_two_processes_of_one(tiny, tmp_path):
    """Two launchers that meet at an address, a process each, as on two machines: weights are those of one with two."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    words = [str(ROOT / "train_diffusion.py"), str(tiny), "images=128", "save_every=128"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={address}",
        "--local-addr=127.0.0.1",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = [
        subprocess.Popen(
            [*launcher, *words, f"run={tmp_path / 'two'}"],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [p.communicate(timeout=200)[0] for p in both]
    finally:
        for p in both:
            p.kill()
    assert not any(p.returncode for p in both), "\n".join(said)
    assert sum("starting, at 0" in text for text in said) == 1               # one of them speaks
    stage("train_diffusion", *words[1:], f"run={tmp_path / 'one'}", ranks=2)
    a, b = (torch.load(tmp_path / k / "diffusion/base/checkpoint.pt", weights_only=True) for k in ("one", "two"))
    assert a["seen"] == b["seen"] == 128 and all(torch.equal(a["net"][k], b["net"][k]) for k in a["net"])


def test_two_commands_at_once_in_one_run():
    """See tests/side_by_side.py, which takes a count and knows more pairs."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "side_by_side.py", "2", "--pairs",
                           "samples by pixels"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "as if alone" in done.stdout, done.stdout + done.stderr[-2000:]


def test_guided_vit_and_vp_and_accumulation(tiny, tmp_path, refuse):
    """Another backbone, path and prediction through the same commands, with gradient accumulation."""
    run, model = tmp_path / "vit", [
        "model.backbone=uvit",
        "model.channels=32",
        "model.depth=2",
        "model.heads=2",
        "model.patch=8",
    ]
    inside(
        "train_diffusion",
        tiny,
        f"run={run}",
        *model,
        "path=vp",
        "predict=eps",
        "micro=16",
        "images=256",
    )
    inside("self_label", tiny, f"run={run}", "method=subgroups", "groups=2")
    assert int(np.load(run / "labels/subgroups.npz")["num_labels"]) == 20
    inside("train_guided", tiny, f"run={run}", *model, "path=vp", "predict=eps", "labels=subgroups", "images=64")
    inside("train_guided", tiny, f"run={run}", *model, "path=vp", "predict=eps", "labels=subgroups", "images=64",
           "drop=0", "name=told")
    untold = ["checkpoint=guided/told", "guidance=2", "name=no"]
    assert "no null label" in refuse("sample_ode", tiny, f"run={run}", *untold)
    for words in (["solver=euler"], ["solver=dopri5", "tol=0.05"], ["direction=encode", "n=20"]):
        inside(
            "sample_ode",
            tiny,
            f"run={run}",
            "checkpoint=guided/subgroups",
            f"name={words[0].split('=')[1]}",
            "guidance=2",
            "n=20",
            *words,
            "evaluate=false",
        )
    assert np.isfinite(np.load(run / "samples/encode/noise.npy")).all()


def test_linear_protocol_with_controls(chain, tiny):
    said = inside("probe", tiny, f"run={chain}", "protocol=linear", "supervised_images=128")
    assert "read at its own t; to read it at several, name activations=" in said          # tiny.yaml has t of the sweep
    found = json.loads((chain / "probe/linear.json").read_text())
    rows, choice = found["rows"], json.loads((chain / "probe/sweep.json").read_text())["label_free"]
    read = rows["features"]["results"][0]                 # the YAML's t is the grid of the sweep
    assert (read["activations"], read["t"]) == ([choice["activation"]], [choice["t"]])
    assert {"features", "random weights", "supervised, same size", "raw pixels"} == set(rows)
    assert all(0 <= r["linear"] <= 1 and 0 <= r["knn"] <= 1 for r in rows.values())


def test_table(chain, tiny):
    text = inside("sample_ode", tiny, f"run={chain}", "--table")
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[0] == "|")
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert {"kmeans", "unconditional"} <= set(rows) and float(rows["kmeans"]["distance"]) > 0


def test_autoguidance(chain, tiny):
    inside("sample_ode", tiny, f"run={chain}", "checkpoint=guided/kmeans", "autoguide=diffusion/base", "guidance=1.5",
           "name=auto", "evaluate=false")
    assert json.loads((chain / "samples/auto/metrics.json").read_text())["network_calls"] == 8


def test_sampling_needs_one_other_script(chain, tiny, tmp_path):
    """A fork of sample_ode.py, train_diffusion.py and configs/ samples a model without labels."""
    for name in ("sample_ode.py", "train_diffusion.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    words = [sys.executable, "sample_ode.py", tiny, f"run={chain}", "name=fork", "n=8", "evaluate=false"]
    p = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stderr
    assert len(np.load(chain / "samples/fork/images.npy")) == 8


def test_files_load_safely(chain):
    for path in chain.rglob("checkpoint.pt"):
        state = torch.load(path, weights_only=True)
        assert state["weights"] == weights_hash(state["ema"], state["model"])
        assert not any(k.startswith(("module.", "_orig_mod.")) for k in state["net"])
    for path in chain.rglob("*.npz"):
        np.load(path, allow_pickle=False)


def test_features_stay_the_same_for_another_batch_size(chain, tiny):
    inside("extract_features", tiny, f"run={chain}", "name=other", "batch=37")
    file = next((chain / "features/base").glob("test-*.npy")).name
    assert np.allclose(np.load(chain / "features/other" / file), np.load(chain / "features/base" / file), atol=1e-5)

"""Tests import the stages from the repository root and run on two threads, or on one in each of two processes.

`tiny` is a configuration that trains in seconds.
"""
import contextlib
import importlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# two processes side by side, each with its children on one thread
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
STAGES = ["train_diffusion", "extract_features", "self_label", "train_guided", "sample_ode", "probe"]

TINY = """
data: {source: shapes, train: 512, test: 256}
model: {channels: 16, mult: [1, 2], blocks: 1, attention: [4], head_channels: 16, stem: 4}
train_diffusion: {images: 512, batch: 32, lr: 1.0e-3, warmup: 64, ema: 128, log_every: 128, save_every: 256,
                  grid_every: 512, precision: fp32}
probe: {fit: 200, validation: 100, t: [0.5, 0.8], K: 6, supervised_images: 512, draws: 1, precision: fp32}
extract_features: {precision: fp32}
self_label: {K: 6, restarts: 1}
train_guided: {images: 256, batch: 32, lr: 1.0e-3, warmup: 64, ema: 128, log_every: 128, save_every: 128,
               grid_every: 256, precision: fp32}
sample_ode: {n: 64, steps: 2, select: 64, batch: 20, precision: fp32, evaluator: pixels}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of the tiny YAML."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def small_run(tiny, tmp_path_factory):
    """A run folder with 160 + 40 images and a model that has hardly been trained."""
    folder = tmp_path_factory.mktemp("small") / "run"
    stage("train_diffusion", tiny, f"run={folder}", "images=64", "data.train=160", "data.test=40")
    return folder


def command(stage, *words, ranks=1):
    """The command line of a stage, under torchrun when several ranks are asked for."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / f"{stage}.py"), *map(str, words)]


# Stages start from one process that has imported them: importing PyTorch takes longer than what most tests run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(STAGES)


def in_child(name, words, out, err, env):
    """What each process of `Launched` does: run a stage with its output in two files."""
    os.chdir(ROOT)
    os.environ.update(env)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / f"{name}.py"), *words]
    module = importlib.import_module(name)
    module.cli(module.main)


class Launched:
    """The processes of a stage, started as torchrun starts them, but without its imports."""

    def __init__(self, name, *words, ranks=1, out=os.devnull, err=os.devnull):
        self.words = [name, *map(str, words)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            env = {k: str(v) for k, v in env.items()} if ranks > 1 else {}
            process = FORKS.Process(target=in_child, args=(name, self.words[1:], str(out), str(err), env), daemon=True)
            process.start()
            self.processes.append(process)

    def poll(self):
        """None while any process lives, else the exit code: 0 if all ended well. One that fails ends the others."""
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            for process in self.processes:
                process.join(5)
            self.kill()
            return next(code for code in codes if code)
        return None if None in codes else 0

    def wait(self, seconds=300):
        end = time.time() + seconds
        while self.poll() is None:
            assert time.time() < end, f"{self.words}: still running after {seconds} seconds"
            time.sleep(0.005)
        return self.poll()

    def kill(self):
        """SIGKILL."""
        for process in self.processes:
            process.kill()
            process.join()


def stage(name, *words, ranks=1, ok=True):
    """Run a stage to its end; what subprocess.run would return, with the output of all ranks as text."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = Launched(name, *words, ranks=ranks, out=out, err=err).wait()
        said, complained = (path.read_text() if path.exists() else "" for path in (out, err))
    assert not ok or code == 0, f"{name} {words}\n{said}\n{complained}"
    return subprocess.CompletedProcess([name, *words], code, said, complained)


def killed(name, *words, after, ranks=1):
    """Start a stage and kill it with all its workers after so many seconds; returns whether it was still running."""
    p = subprocess.Popen(command(name, *words, ranks=ranks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                         cwd=ROOT,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    time.sleep(after)
    alive = p.poll() is None
    folder = next(str(w) for w in words if str(w).startswith("run=")).encode()
    # torchrun gives its workers sessions of their own: find them by the run folder they name
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if folder in (entry / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:                                   # gone already
            pass
    p.wait()
    return alive


def complaint(capsys, monkeypatch, name, *words):
    """Run a stage in this process with bad input; returns its one line on stderr after checking exit code 2."""
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        module.cli(module.main)
    text = capsys.readouterr().err
    assert e.value.code == 2, text
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


@pytest.fixture
def refuse(capsys, monkeypatch):
    """complaint(stage, *words) -> the error line."""
    return lambda name, *words: complaint(capsys, monkeypatch, name, *words)


def inside(name, *words):
    """Run a stage in this process, which spares the time of its imports; what it printed."""
    module, said = importlib.import_module(name), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        module.main()
    return said.getvalue()

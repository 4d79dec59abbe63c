"""Kill stages at random moments and run them again: the results must equal those of a run that was never killed.

    python tests/kills.py 60                         # kills in all, over all stages, on one process and on two
    python tests/kills.py 6 --ranks 1 --series training labels --seed 3

Every stage that resumes is run to its end once. Then its command is started in a copy of the same run folder, all its
processes are killed (SIGKILL) at a moment drawn from the time that it works, and it is started again, until so many
kills have met it; a command that ends before its kill is compared and begins anew. A line for each series; exit code 1
where arrays, weights or scores differ in one bit. Folders that differ are kept.
"""
import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from conftest import TINY, Launched

TIMES = {"seconds", "seconds_per_image", "images_per_second", "waiting", "memory_mb"}      # may differ
MAPS = "activations=up-level1-repeat1-res-out"
SERIES = {                                                # name: a stage and its words
    "training": ["train_diffusion", "images=2400", "save_every=32", "log_every=96", "grid_every=2400"],
    "guided": ["train_guided", "labels=classes", "images=1600", "save_every=32", "grid_every=1600"],
    "online": ["train_guided", "labels=online", "images=1600", "save_every=32", "grid_every=1600", "K=6", "switch=320",
               "sk_until=800", "sk_freeze=64", "sk_activation=up-level1-repeat1-res-out"],
    "features": ["extract_features", "name=again", "activations=*-out", "t=0.3,0.5,0.7,0.9", "pool=none", "batch=16"],
    "labels": ["self_label", "method=sinkhorn", "K=20"],
    "boxes": ["self_label", "method=lost", "features=maps", "objects=2"],
    "samples": ["sample_ode", "checkpoint=guided/classes", "n=256", "batch=16", "steps=8", "guidance=1,2"],
}


# ---------------------------------------------------------------------------------------------------------------------
# Running and killing

def start(words, folder, ranks=1):
    """Start a stage in a run folder; its processes, whose output goes to <folder>.log."""
    log = f"{folder}.log"
    return Launched(words[0], folder.parent / "tiny.yaml", f"run={folder}", *words[1:], ranks=ranks, out=log, err=log)


def state_of(folder):
    """What tells that something in a folder has changed."""
    found = []
    for parent, _, names in os.walk(folder):              # passes over folders that are renamed meanwhile
        for path in (os.path.join(parent, name) for name in names):
            with suppress(FileNotFoundError):
                found.append((path, os.stat(path).st_mtime_ns))
    return sorted(found)


def work(process, folder, before, seconds=1e9):
    """Let a command work for so many seconds from its first change of the folder on: those that it has worked."""
    while process.poll() is None and state_of(folder) == before:
        time.sleep(0.02)
    tick = time.time()
    while process.poll() is None and time.time() - tick < seconds:
        time.sleep(0.01)
    return time.time() - tick


def finish(words, folder, ranks=1):
    """Run a stage to its end: seconds from its first change of the folder on."""
    folder.mkdir(exist_ok=True)
    before = state_of(folder)
    process = start(words, folder, ranks)
    took = work(process, folder, before)
    if code := process.wait():
        last = Path(f"{folder}.log").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"{' '.join(words)}: exit code {code}, {last}, see {folder}.log")
    return took


# ---------------------------------------------------------------------------------------------------------------------
# Comparing

def read(path):
    """What a result file holds, as plain containers, arrays and tensors; None where it is no result."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.name == "metrics.jsonl":                      # a line's averages begin at the last start
        return [json.loads(line)["images"] for line in path.read_text().splitlines()]
    return None


def same(a, b):
    """Whether two values are equal in every bit, apart from times."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(k in TIMES or same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a) and torch.is_tensor(b):
        bits = [x.detach().flatten().contiguous().view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or a != a and b != b)


def results(folder):
    """{path inside the run folder: value} of all results, caches included; names that end in .tmp are none."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(p.endswith((".tmp", ".old")) for p in inside.parts):
            found[str(inside)] = read(path)
    return {name: value for name, value in found.items() if value is not None}


def differences(folder, expected):
    """Names of results in a run folder that are missing, too many, or not equal to those expected."""
    there = results(folder)
    return sorted(k for k in expected.keys() | there.keys()
                  if k not in there or k not in expected or not same(there[k], expected[k]))


# ---------------------------------------------------------------------------------------------------------------------
# Series

def given(root):
    """A run folder with all that the stages of SERIES need."""
    folder = root / "given"
    (root / "tiny.yaml").write_text(TINY)
    for words in (["train_diffusion", "--prepare"], ["train_diffusion", "images=64"], ["self_label", "method=classes"],
                  ["train_guided", "labels=classes", "images=64"],
                  ["extract_features", MAPS, "t=0.5"], ["extract_features", MAPS, "t=0.5", "name=maps", "pool=none"]):
        finish(words, folder)
    return folder


def copy(source, target, words):
    """A run folder to start from; a training begins without the checkpoint of its name."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    if words[0] == "train_diffusion":
        shutil.rmtree(target / "diffusion")
    if words[:2] == ["train_guided", "labels=classes"]:
        shutil.rmtree(target / "guided")
    return target


def series(root, name, kills, ranks, moments):
    """So many kills of one stage on so many processes: (names of results that differ, kills, comparisons)."""
    words, source = SERIES[name], root / "given"
    whole = copy(source, root / f"{name}-{ranks}-whole", words)
    took = finish(words, whole, ranks)
    expected = results(whole)
    broken, hits, compared = root / f"{name}-{ranks}-broken", 0, 0
    copy(source, broken, words)
    while True:
        before = state_of(broken)
        process = start(words, broken, ranks)
        if hits < kills:
            if moments.random() < 0.1:                    # while it starts
                time.sleep(moments.uniform(0, 1))
            else:
                work(process, broken, before, moments.uniform(0, took))
            if process.poll() is None:
                process.kill()
                hits += 1
                continue
        if code := process.wait():
            return [f"(exit code {code}, see {broken}.log)"], hits, compared
        compared += 1
        if (wrong := differences(broken, expected)) or hits == kills:
            return wrong, hits, compared
        copy(source, broken, words)


def run(root, kills, ranks=(1, 2), seed=0, names=tuple(SERIES)):
    """All series, with so many kills among them; whether all results were equal. A line for each."""
    given(root)
    every, moments, good = [(name, world) for name in names for world in ranks], random.Random(seed), True
    for i, (name, world) in enumerate(every):
        share = kills * (i + 1) // len(every) - kills * i // len(every)
        try:
            wrong, hits, compared = series(root, name, share, world, moments)
        except RuntimeError as e:                         # it fails without a kill
            wrong, hits, compared = [str(e)], 0, 0
        good = good and not wrong
        verdict = f"WRONG: {', '.join(wrong[:5])}" if wrong else "equal"
        print(f"{name:10} ranks {world}: {hits} kills, {compared} compared, {verdict}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="in all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    good = run(root, asked.kills, asked.ranks, asked.seed, asked.series)
    if good:
        shutil.rmtree(root)
    else:
        print(f"see {root}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

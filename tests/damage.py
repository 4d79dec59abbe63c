"""Damage the files of a run and let the stages read them: each must work, or stop with one line that names the file.

    python tests/damage.py 300                       # so many damaged or hand-edited files, drawn with --seed 0

A small run is made once. Then, again and again, one of its files is cut, emptied, changed in a byte, or rewritten with
a key missing, a value of another kind or an array of another shape, and a command that reads it runs in a process of
its own. A traceback, a crash, a command that takes longer than a minute, or a line that does not say where to look, is
a failure. A line for each failure; exit code 1 if there is any.
"""
import argparse
import copy
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from conftest import TINY, stage

PLACE = "activations=up-level1-repeat1-res-out"
MAKE = [
    ["train_diffusion"],
    ["probe"],
    ["extract_features"],
    ["extract_features", "name=maps", "pool=none", PLACE, "t=0.5"],
    ["self_label"],
    ["self_label", "method=lost", "features=maps"],
    ["train_guided", "labels=kmeans"],
    ["sample_ode", "checkpoint=guided/kmeans", "name=kmeans"],
]
TRAIN, RESUME = ["train_diffusion", "name=new", "images=32"], ["train_diffusion", "images=576"]
EXTRACT = ["extract_features", "name=new", PLACE, "t=0.5"]
LABEL = ["self_label", "name=new"]
GUIDED = ["train_guided", "labels=kmeans", "name=new", "images=32"]
SAMPLE = ["sample_ode", "checkpoint=guided/kmeans", "name=new"]
READERS = {                                               # files of a run: commands that read them
    "config.yaml": [TRAIN, LABEL],
    "data/*/info.json": [TRAIN, EXTRACT, LABEL, SAMPLE],
    "data/*/*.npy": [TRAIN, EXTRACT, SAMPLE, ["self_label", "method=classes"]],
    "diffusion/base/checkpoint.pt": [RESUME, EXTRACT, ["probe", "name=new", "t=0.5"], [*GUIDED, "init=diffusion/base"]],
    "diffusion/base/metrics.jsonl": [RESUME],
    "probe/sweep.json": [["extract_features", "name=new"], ["probe"]],
    "features/base/*": [LABEL, ["extract_features"]],
    "features/maps/*": [["self_label", "method=lost", "features=maps", "name=new"]],
    "labels/kmeans.*[nz]": [GUIDED, ["self_label"], ["self_label", "method=random", "name=new"]],
    "labels/lost.*[nz]": [["train_guided", "labels=lost", "condition=box", "name=new", "images=32"]],
    "guided/kmeans/checkpoint.pt": [SAMPLE, ["train_guided", "labels=kmeans", "images=288"]],
    "samples/kmeans/metrics.json": [["sample_ode", "--table"], ["sample_ode", "checkpoint=guided/kmeans",
                                                                "name=kmeans"]],
    "samples/.*/*": [SAMPLE],
}
ODD = [None, [], {}, "x", -1, 1e300, [[1]], True]


# ---------------------------------------------------------------------------------------------------------------------
# Damage

def places(value, depth, path=()):
    """Paths to all that is inside nested dicts and lists, so many levels down."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items if depth else ():
        yield (*path, name)
        yield from places(inner, depth - 1, (*path, name))


def changed(value, dice, depth=9):
    """A copy of nested dicts and lists in which one thing is missing or something else."""
    value = copy.deepcopy(value)
    found = list(places(value, depth))
    if not found or dice.random() < 0.15:
        return dice.choice(ODD)
    *way, last = dice.choice(found)
    inside = value
    for name in way:
        inside = inside[name]
    if dice.random() < 0.4:
        del inside[last]
    else:
        inside[last] = dice.choice(ODD)
    return value


def changed_array(a, dice):
    """An array of another shape or kind."""
    options = [a[:-1], a[..., None], a.astype(np.float16), a.astype("U3") if a.size < 10_000 else a[:1], a[:0],
               np.full_like(a, -7) if a.dtype.kind != "u" else a[:, ..., :-1], np.zeros(())]
    return dice.choice(options)


def damage(path, dice):
    """Damage one file; in words, how."""
    raw = path.read_bytes()
    how = dice.choice(["cut", "emptied", "byte", "rewritten", "rewritten", "rewritten"])
    if how == "cut":
        path.write_bytes(raw[:dice.randrange(1, max(2, len(raw)))])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "byte" or path.suffix not in (".json", ".jsonl", ".npy", ".npz", ".pt"):
        how, at = "byte", dice.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1:])
    elif path.suffix == ".json":
        path.write_text(json.dumps(changed(json.loads(raw), dice)))
    elif path.suffix == ".jsonl":
        lines = raw.decode().splitlines()
        at = dice.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), dice))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".npy":
        with open(path, "wb") as f:
            np.save(f, changed_array(np.load(io.BytesIO(raw)), dice))
    elif path.suffix == ".npz":
        with np.load(io.BytesIO(raw)) as f:
            arrays = dict(f)
        name = dice.choice(sorted(arrays))
        if dice.random() < 0.4:
            del arrays[name]
        else:
            arrays[name] = changed_array(np.atleast_1d(arrays[name]), dice)
        with open(path, "wb") as f:
            np.savez(f, **arrays)
    else:
        state = torch.load(io.BytesIO(raw), weights_only=True)
        torch.save(changed(state, dice, depth=1), path)        # deeper is for surgeons
    return how


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read(words, yaml):
    """Run a stage in a process of its own: (exit code, or minus the signal that ended it; what it wrote to stderr)."""
    with tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, 60)      # of work, however busy the machine is
            os.dup2(err.fileno(), 2)
            sys.argv = [f"{words[0]}.py", str(yaml), *map(str, words[1:])]
            module = importlib.import_module(words[0])
            code = 0
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(err):
                    module.cli(module.main)
            except SystemExit as e:
                code = e.code or 0
            except BaseException:
                code = 1
                traceback.print_exc(file=err)
            err.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        err.seek(0)
        return os.waitstatus_to_exitcode(status), err.read()


def wrong(code, text, folder):
    """What is wrong with how a command ended, or None."""
    if code == 0:
        return None
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in text:
        return f"exit code {code}: " + " | ".join(text.strip().splitlines()[-4:])
    return None if str(folder) in lines[0] else f"does not name the file: {lines[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="how many files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dice, failures = random.Random(options.seed), 0
    for name in ("train_diffusion", "extract_features", "self_label", "train_guided", "sample_ode", "probe"):
        importlib.import_module(name)                     # once, for all the processes
    with tempfile.TemporaryDirectory() as root:
        yaml, before = Path(root) / "tiny.yaml", Path(root) / "before"
        yaml.write_text(TINY)
        for words in MAKE:
            stage(words[0], yaml, f"run={before}", *words[1:])
        ends = dict(ok=0, refused=0)
        for i in range(options.count):
            pattern = dice.choice(list(READERS))
            files = [p for p in sorted(before.glob(pattern)) if p.is_file() and p.suffix != ".png"]
            folder = Path(root) / "run"
            shutil.copytree(before, folder)
            path = folder / dice.choice(files).relative_to(before)
            words = dice.choice(READERS[pattern])
            how = damage(path, dice)
            code, text = read([*words, f"run={folder}"], yaml)
            if fault := wrong(code, text, folder):
                failures += 1
                print(f"{i}: {path.relative_to(folder)} {how}, {' '.join(words)}: {fault}", flush=True)
            else:
                ends["refused" if code else "ok"] += 1
            shutil.rmtree(folder)
    print(f"{options.count} damaged files: {ends['refused']} refused in one line, {ends['ok']} read all the same, "
          f"{failures} wrong")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()

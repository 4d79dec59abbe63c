"""Start two commands of one run together: each must end as if it were alone, or refuse in one line.

    python tests/side_by_side.py 3                   # every pair three times, at slightly different moments
    python tests/side_by_side.py 5 --pairs features preparations --seed 1

People start several trainings or samplings of a run side by side. For every pair that shares something in the run
folder both commands start in a copy of the same folder, the second up to half a second after the first. Each must end
with exit code 0, or with 2 and one line, but not both with 2. What was refused is run again alone; then every array,
weight and score must equal those of the same commands one after the other. A line for each pair; exit code 1 where
something went wrong, and its folders are kept.
"""
import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from conftest import TINY
from kills import MAPS, SERIES, differences, finish, results, start

TRAINING, FEATURES = ["train_diffusion", "images=256", "save_every=64"], SERIES["features"]
SAMPLES = ["sample_ode", "checkpoint=guided/classes", "n=64"]
LABELS, BOXES = SERIES["labels"], SERIES["boxes"]
PREPARE = [["train_diffusion", "--prepare"]]
BASE = [*PREPARE, ["train_diffusion", "images=64"]]
GUIDED = [*BASE, ["self_label", "method=classes"], ["train_guided", "labels=classes", "images=64"]]
CLUSTERS = [*BASE, ["extract_features", MAPS, "t=0.5"], ["extract_features", MAPS, "t=0.5", "name=maps", "pool=none"]]
PAIRS = {                                                 # name: (what is there before, first command, second command)
    "preparations": ([], *PREPARE * 2),
    "first trainings": ([], TRAINING, [*TRAINING, "name=other"]),
    "trainings": (PREPARE, TRAINING, [*TRAINING, "name=other", "seed=1"]),
    "training twice": (PREPARE, TRAINING, TRAINING),
    "guided twice": (GUIDED, *[["train_guided", "labels=classes", "images=256", "name=again"]] * 2),
    "features": (BASE, FEATURES, FEATURES),
    "features and others": (BASE, FEATURES, [*FEATURES, "name=others", "t=0.4"]),
    "labels": (CLUSTERS, LABELS, LABELS),
    "boxes": (CLUSTERS, BOXES, BOXES),
    "labels and boxes": (CLUSTERS, LABELS, BOXES),
    "samples": (GUIDED, SAMPLES, [*SAMPLES, "name=other", "seed=1"]),
    "samples twice": (GUIDED, SAMPLES, SAMPLES),
    "samples by pixels": (GUIDED, [*SAMPLES, "evaluator=pixels"], [*SAMPLES, "evaluator=pixels", "name=other"]),
}


def make(root, before):
    """A run folder in which these commands have been run, each combination once."""
    folder = root / f"before-{len(before)}-{sum(map(len, before))}-{before[-1][0] if before else 'nothing'}"
    if not folder.exists():
        folder.mkdir()                                    # also where nothing is made
        for words in before:
            finish(words, folder)
    return folder


def refused(log):
    """Whether what a command wrote to stderr is one line that says what is wrong."""
    lines = [line for line in log.splitlines() if line.startswith("error:")]
    return len(lines) == 1 and "Traceback" not in log


def together(source, folder, pair, delay):
    """Run two commands at once in a copy of a run folder: what went wrong, in words, and those that were refused."""
    shutil.copytree(source, folder)
    processes, logs = [], []
    for i, words in enumerate(pair):
        log = Path(f"{folder}-{i}")
        log.symlink_to(folder)                            # a name of its own for the log, the same folder
        processes.append(start(words, log))
        logs.append(Path(f"{log}.log"))
        time.sleep(0 if i else delay)
    codes = [p.wait() for p in processes]
    texts = [log.read_text() for log in logs]
    wrong = [f"{' '.join(words[:2])}: exit code {code}, {text.strip().splitlines()[-1:]}"
             for words, code, text in zip(pair, codes, texts) if code and not (code == 2 and refused(text))]
    wrong += ["both refused"] if codes == [2, 2] else []
    return wrong, [words for words, code in zip(pair, codes) if code == 2]


def repeat(root, name, times, moments):
    """One pair so many times: what went wrong, in words, and how often a command was refused."""
    before, *pair = PAIRS[name]
    source, alone = make(root, before), root / f"{name.replace(' ', '-')}-alone"
    shutil.copytree(source, alone)
    for words in pair:
        finish(words, alone)
    expected, refusals = results(alone), 0
    for i in range(times):
        folder = root / f"{name.replace(' ', '-')}-{i}"
        wrong, again = together(source, folder, pair, moments.uniform(0, 0.5))
        refusals += len(again)
        for words in again if not wrong else ():
            finish(words, folder)
        wrong = wrong or differences(folder, expected)
        if wrong:
            return wrong, refusals
        shutil.rmtree(folder)
    return [], refusals


def run(root, times, seed=0, names=tuple(PAIRS)):
    """All pairs; whether all went well. A line for each."""
    (root / "tiny.yaml").write_text(TINY)
    moments, good = random.Random(seed), True
    for name in names:
        try:
            wrong, refusals = repeat(root, name, times, moments)
        except RuntimeError as e:                         # it fails alone
            wrong, refusals = [str(e)], 0
        good = good and not wrong
        verdict = f"WRONG: {'; '.join(wrong[:5])}" if wrong else "as if alone"
        print(f"{name:20} {times} times, {refusals} refused: {verdict}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=int, help="how often every pair is started")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="side-by-side-"))
    good = run(root, asked.times, asked.seed, asked.pairs)
    if good:
        shutil.rmtree(root)
    else:
        print(f"see {root}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

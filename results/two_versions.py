"""Is one version of the code slower than another? The same commands in two checkouts, in turns, on one thread.

    git worktree add OLD COMMIT; python results/two_versions.py OLD NEW RUN [turns=3] [data.root=DATA]

Times are of whole commands of configs/cifar10-cpu.yaml at small sizes, start-up included, but for trainings: there it
is the median of the log's lines of images per second. Writes results/two-versions.json: seconds (trainings: per 1,000
images) of each turn, and the ratio of the medians, new / old, by command.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.run import write_json                        # noqa: E402

QUICK = "batch=32 lr=1e-3 warmup=1k log_every=640 save_every=100k grid_every=100k"
COMMANDS = {                                              # name: (script, its keys)
    "training": ("train_diffusion", f"optimizer=adamw ema=20k images=4480 {QUICK}"),
    "training, Muon": ("train_diffusion", f"name=muon optimizer=muon ema=20k images=4480 {QUICK}"),
    "sweep of blocks and times": ("probe", "t=0.5,0.7,0.9"),
    "features": ("extract_features", "activations=up-level0-repeat1-res-out t=0.7"),
    "k-means": ("self_label", "method=kmeans features=base K=50"),
    "training with labels": ("train_guided", f"labels=kmeans init= optimizer=adamw ema=20k images=4480 {QUICK}"),
    "training, labels found": ("train_guided", "labels=online name=online init= optimizer=adamw ema=20k images=4480 "
                               f"switch=1k sk_until=0 {QUICK}"),                 # each line of the log labels 2,048
    "samples, guided": ("sample_ode", "checkpoint=guided/kmeans guidance=2 evaluate=false n=128 steps=6 batch=64"),
}


def measured(folder, run, command, words):
    """Seconds of one command in a checkout; of trainings, for 1,000 images."""
    script, keys = COMMANDS[command]
    line = [sys.executable, f"{script}.py", "configs/cifar10-cpu.yaml", f"run={run}", *words, *keys.split()]
    tick = time.perf_counter()
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds = time.perf_counter() - tick
    if done.returncode:
        raise SystemExit(f"{folder}: {' '.join(line)}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    if not script.startswith("train"):
        return seconds
    place = "diffusion/muon" if "muon" in keys else "diffusion/base"
    if script == "train_guided":
        place = "guided/online" if "online" in keys else "guided/kmeans"
    log = [json.loads(text) for text in (run / place / "metrics.jsonl").read_text().splitlines()]
    return 1000 / statistics.median(row["images_per_second"] for row in log[1:])           # the first warms up


def main():
    *folders, run = [Path(word).resolve() for word in sys.argv[1:4]]
    own = dict(word.split("=", 1) for word in sys.argv[4:])
    turns = int(own.pop("turns", 3))
    if run.exists():
        raise SystemExit(f"{run}: is there already, and what is finished cannot be timed; name a new folder")
    words = [f"{k}={v}" for k, v in (dict({"data.train": 4000, "data.test": 1000}) | own).items()]
    times = {command: [[], []] for command in COMMANDS}
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            for command in COMMANDS:
                seconds = measured(folders[side], run / f"turn{turn}-{side}", command, words)
                times[command][side].append(seconds)
                print(turn, ("old", "new")[side], command, f"{seconds:.2f}", flush=True)
    commits = [subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
               .stdout.strip() for folder in folders]
    rows = {command: dict(old=old, new=new, ratio=statistics.median(new) / statistics.median(old))
            for command, (old, new) in times.items()}
    write_json(ROOT / "results" / "two-versions.json", dict(commits=commits, words=words[:2], rows=rows))
    for command, row in rows.items():
        print(f"{command:28} {row['ratio']:.3f}")


if __name__ == "__main__":
    main()

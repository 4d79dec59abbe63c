"""Training time of online labels as a ratio of unconditional training at equal steps. Prints it, at the end one line of JSON.

    python tests/bench_online.py                 # a quarter of an hour on two CPU cores; timings of busy machines mean nothing

Whole runs of fit() with the model of configs/shapes.yaml. An unconditional run stands before and after every other one, whose ratio is taken
to the mean of these two, since the speed of a machine drifts; the median over the turns counts, beside their range.                    goal: at most 1.25
Training set and reports have the proportions of the runs in results/online.json: when labels settle one is found for each of as many images
as 26 % of the run's length, and as many are watched for the log as there by the image of training.
"""
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extract_features import matching                                                                                       # noqa: E402
from configs.data import load_data, prepare_data                # noqa: E402
from configs.run import Data, Model, Run, fill                # noqa: E402
from train_diffusion import build_model, fit, placed                # noqa: E402
from train_guided import Labeller, TrainGuided                                                                              # noqa: E402

IMAGES, TURNS = 4096, 5
VARIANTS = {                                              # name: (conditions of the network, keys)
    "labels found, not used": (dict(), dict(condition="none")),
    "head, label": (dict(num_labels=20), dict(condition="label")),
    "backbone, label, settled": (dict(num_labels=20), dict(condition="label", sk_grad="backbone", switch=IMAGES // 2, sk_until=IMAGES // 2)),
    "head, label, mid": (dict(num_labels=20), dict(condition="label", sk_activation="mid*-out")),
    "head, label, settled": (dict(num_labels=20), dict(condition="label", switch=IMAGES // 2, sk_until=IMAGES // 2)),     # half-way, as the runs in results/online.json
    "head, patch": (dict(layout_channels=20), dict(condition="patch")),
}


def main():
    Labeller.WATCHED = Labeller.WATCHED * IMAGES // 19_000                      # there the log looks at them once in 19k images
    sections = yaml.safe_load((ROOT / "configs" / "shapes.yaml").read_text())
    model, data = fill("model", Model, sections["model"]), Data(train=IMAGES * 26 // 100, test=10)
    base = fill("train_guided", TrainGuided, sections["train_guided"] | dict(labels="online", switch=0, sk_until=0))
    base.images, base.log_every, base.save_every, base.grid_every = IMAGES, IMAGES, 10 ** 9, 10 ** 9
    ratios = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plain = dict(data=dataclasses.asdict(data), model=dataclasses.asdict(model), train_guided=dataclasses.asdict(base))
        run = Run("train_guided", Path(folder), base, data, model, plain, False, set(), device=device)
        prepare_data(run)
        images = load_data(run, "train")
        state = dict(kind="guided", model=plain["model"], size=data.size, channels=3, num_labels=0, path=base.path, predict=base.predict,
                     data=images.info["fingerprint"], config=plain)

        def seconds(name, conditions=None, keys=None):
            """One training, from its first update to its checkpoint; with keys also the labeller's share."""
            cfg, side = dataclasses.replace(base, **(keys or {})), None
            net = placed(build_model(model, data.size, **(conditions or {})), device)
            if keys:
                side = Labeller(cfg, net, matching(net, [cfg.sk_activation])[-1], data.size)
                side.watch(images)
            tick = time.perf_counter()
            fit(run, cfg, net, run.dir / "guided" / name, images, state | dict(conditions=conditions or {}), None, None, side)
            return time.perf_counter() - tick

        seconds("warm-up")
        for turn in range(TURNS):
            before = seconds(f"{turn} before")
            for name, (conditions, keys) in VARIANTS.items():
                took, after = seconds(f"{turn} {name}", conditions, keys), seconds(f"{turn} after {name}")
                ratios[name].append(2 * took / (before + after))
                before = after
    ratio = {name: [round(f(v), 3) for f in (statistics.median, min, max)] for name, v in ratios.items()}
    for name, (median, low, high) in ratio.items():
        print(f"{name:26s}{median:.2f} of unconditional training ({low:.2f} to {high:.2f} in {TURNS} turns; goal 1.25 {'met' if median <= 1.25 else 'MISSED'})")
    print(json.dumps(dict(device=str(device), threads=torch.get_num_threads(), torch=torch.__version__, turns=TURNS, median_min_max=ratio)))


if __name__ == "__main__":
    main()

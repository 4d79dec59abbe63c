"""Training time of online labels as a ratio of unconditional training at equal steps. Prints it, at the end one line of JSON.

    python tests/bench_online.py                 # a quarter of an hour on two CPU cores; timings of busy machines mean nothing

Whole runs of fit() with the model of configs/shapes.yaml, in turn; the faster of two passes of each counts.                            goal: at most 1.25
Training set and reports have the proportions of the runs in results/online.json: a label is found for every image of 26 % of the run's
length when labels settle, and the log's watched images are looked at once in 16k.
"""
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extract_features import matching                                                                                       # noqa: E402
from train_diffusion import Data, Model, Run, build_model, fill, fit, load_data, prepare_data                                # noqa: E402
from train_guided import Labeller, TrainGuided                                                                              # noqa: E402

IMAGES = 16384
VARIANTS = {                                              # name: (conditions of the network, keys)
    "unconditional": None,
    "labels found, not used": (dict(), dict(condition="none")),
    "head, label": (dict(num_labels=20), dict(condition="label")),
    "backbone, label, settled": (dict(num_labels=20), dict(condition="label", sk_grad="backbone", switch=IMAGES // 2, sk_until=IMAGES // 2)),
    "head, label, mid": (dict(num_labels=20), dict(condition="label", sk_activation="mid*-out")),
    "head, label, settled": (dict(num_labels=20), dict(condition="label", switch=IMAGES // 2, sk_until=IMAGES // 2)),     # half-way, as the runs in results/online.json
    "head, patch": (dict(layout_channels=20), dict(condition="patch")),
}


def main():
    sections = yaml.safe_load((ROOT / "configs" / "shapes.yaml").read_text())
    model, data = fill("model", Model, sections["model"]), Data(train=IMAGES * 26 // 100, test=10)
    base = fill("train_guided", TrainGuided, sections["train_guided"] | dict(labels="online", switch=0, sk_until=0))
    base.images, base.log_every, base.save_every, base.grid_every = IMAGES, IMAGES, 10 ** 9, 10 ** 9
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plain = dict(data=dataclasses.asdict(data), model=dataclasses.asdict(model), train_guided=dataclasses.asdict(base))
        run = Run("train_guided", Path(folder), base, data, model, plain, False, set(), device=device)
        prepare_data(run)
        images = load_data(run, "train")
        state = dict(kind="guided", model=plain["model"], size=data.size, channels=3, num_labels=0, path=base.path, predict=base.predict,
                     data=images.info["fingerprint"], config=plain)
        for turn in range(2):
            for name, variant in VARIANTS.items():
                cfg, side = dataclasses.replace(base, **(variant[1] if variant else {})), None
                conditions = variant[0] if variant else {}
                net = build_model(model, data.size, **conditions).to(device)
                if variant:
                    side = Labeller(cfg, net, matching(net, [cfg.sk_activation])[-1], data.size)
                    side.watch(images)
                tick = time.perf_counter()
                fit(run, cfg, net, run.dir / "guided" / f"{turn} {name}", images, state | dict(conditions=conditions), None, None, side)
                seconds.setdefault(name, []).append(time.perf_counter() - tick)
    ratio = {name: round(min(v) / min(seconds["unconditional"]), 3) for name, v in seconds.items()}
    for name, r in ratio.items():
        print(f"{name:24s}{min(seconds[name]):7.1f} s  {r:.2f} of unconditional training" + ("" if name == "unconditional" else f"  (goal 1.25 {'met' if r <= 1.25 else 'MISSED'})"))
    print(json.dumps(dict(device=str(device), threads=torch.get_num_threads(), torch=torch.__version__, ratio=ratio)))


if __name__ == "__main__":
    main()

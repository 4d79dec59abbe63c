"""Which share of a training step goes into waiting for data. Prints it, at the end one line of JSON.

    python tests/bench_data.py                   # about a minute on two CPU cores; timings of busy machines mean nothing

waiting      share of the time of fit() spent in next(batch), with the model of configs/shapes.yaml          goal: below 5 %
feed         images per second that feed() can prepare when nobody uses the processor, against those that fit() trains on
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
from configs.data import load_data, prepare_data                # noqa: E402
from configs.run import Data, Model, Run, fill                # noqa: E402
from train_diffusion import TrainDiffusion, build_model, feed, fit, placed                # noqa: E402


def main():
    sections = yaml.safe_load((ROOT / "configs" / "shapes.yaml").read_text())
    model, data = fill("model", Model, sections["model"]), Data(train=5000, test=10)
    cfg = fill("train_diffusion", TrainDiffusion, sections["train_diffusion"])
    cfg.images, cfg.log_every, cfg.save_every, cfg.grid_every = 24 * 1024, 4 * 1024, 10 ** 9, 10 ** 9
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plain = dict(data=dataclasses.asdict(data), model=dataclasses.asdict(model), train_diffusion=dataclasses.asdict(cfg))
        run = Run("train_diffusion", Path(folder), cfg, data, model, plain, False, set(), device=device)
        prepare_data(run)
        images = load_data(run, "train")

        # feed alone
        batches = feed(run, cfg, images.images, 0)
        for _ in range(5):
            next(batches)                                 # those already queued
        tick = time.perf_counter()
        for _ in range(60):
            next(batches)
        alone = 60 * cfg.batch / (time.perf_counter() - tick)
        batches.close()

        # feed while training
        state = dict(kind="diffusion", model=plain["model"], size=data.size, channels=3, conditions={}, num_labels=0, path=cfg.path, predict=cfg.predict,
                     data=images.info["fingerprint"], config=plain)
        fit(run, cfg, placed(build_model(model, data.size), device), run.dir / "diffusion" / "bench", images, state)
        lines = [json.loads(line) for line in (run.dir / "diffusion" / "bench" / "metrics.jsonl").read_text().splitlines()][1:]      # the first one warms up
    seconds = sum(v["seconds"] for v in lines)
    waiting, speed = sum(v["waiting"] * v["seconds"] for v in lines) / seconds, (len(lines) * cfg.log_every) / seconds
    print(f"waiting for data  {waiting:.2%} of a training step  (goal 5 % {'met' if waiting < 0.05 else 'MISSED'})")
    print(f"feed alone        {alone:.0f} images/s, training {speed:.0f} images/s: {alone / speed:.1f} times")
    print(json.dumps(dict(device=str(device), threads=torch.get_num_threads(), torch=torch.__version__, waiting=round(waiting, 5), feed=round(alone), training=round(speed))))


if __name__ == "__main__":
    main()

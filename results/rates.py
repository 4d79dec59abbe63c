"""Learning rates of both optimizers, chosen on held-out training images: before results/optimizers.py compares them.

    python results/rates.py SET RUN [data.root=DATA]                             SET: shapes, fashion or cifar10-cpu

Every training sees 12,000 images in batches of 32; the last 2,000 training images are kept out of it, and the loss of
the averaged network on 1,024 of these decides. Writes results/rates-SET.json.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.run import Model, fill                       # noqa: E402
from train_diffusion import PATHS, build_model, loss_per_image  # noqa: E402

IMAGES, KEPT = 12_000, 2_000
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (2e-3, 4e-3, 8e-3)}
WARMUP = {"adamw": 5000, "muon": 1000}


def call(*words):
    """One command, on one thread; its last lines if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


@torch.no_grad()
def held_out_loss(checkpoint, images, n=1024):
    """Mean loss of the averaged network over n images, at n even times, with the same noise for every network."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"]).eval()
    net.load_state_dict(state["ema"])
    x = torch.from_numpy(np.array(images[-n:])).float() / 127.5 - 1
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = (torch.arange(n) + 0.5) / n
    parts = zip(x.split(128), z.split(128), t.split(128))
    return float(torch.cat([loss_per_image(net, PATHS["cv"], "v", *part) for part in parts]).mean())


def main():
    which, folder, *words = sys.argv[1:]
    run, config, out = Path(folder).resolve(), f"configs/{which}.yaml", ROOT / "results" / f"rates-{which}.json"
    torch.set_num_threads(1)
    call("train_diffusion.py", config, f"run={run}", *words, "--prepare")        # all training images
    images = np.load(run / "data/train/images.npy", mmap_mode="r")
    rows = json.loads(out.read_text())["loss"] if out.exists() else {}
    for optimizer, rates in RATES.items():
        for lr in rates:
            name = f"{optimizer}-{lr:g}"
            if name in rows:
                print(f"{which} {name}: in {out.name} already")
                continue
            keys = dict(optimizer=optimizer, lr=lr, batch=32, warmup=WARMUP[optimizer], ema=20_000, images=IMAGES,
                        log_every=IMAGES, save_every=IMAGES, grid_every=IMAGES, name=name, seed=7)
            call("train_diffusion.py", config, f"run={run}/rates", f"data.train={len(images) - KEPT}", *words,
                 *(f"{k}={v}" for k, v in keys.items()))
            rows[name] = held_out_loss(run / f"rates/diffusion/{name}/checkpoint.pt", images)
            out.write_text(json.dumps(dict(set=which, images=IMAGES, held_out=KEPT, seed=7, torch=torch.__version__,
                                           loss=rows), indent=1))
            print(which, name, round(rows[name], 4), flush=True)


if __name__ == "__main__":
    main()

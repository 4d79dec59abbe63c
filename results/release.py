"""A small checkpoint to hand on: the averaged weights alone, in bfloat16.

    python results/release.py RUN/diffusion/base/checkpoint.pt OUT.pt

Every later stage reads it where it takes a checkpoint: checkpoint=OUT.pt, init=OUT.pt. Training cannot be resumed
from it, but goes on from its weights: train_guided.py labels=none init=OUT.pt.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.run import save_torch, weights_hash          # noqa: E402

LEFT_OUT = "optimizer", "scaler", "conditioner"


def main():
    source, target = sys.argv[1:]
    state = torch.load(source, map_location="cpu", weights_only=True)
    ema = {name: v.bfloat16() if v.is_floating_point() else v for name, v in state["ema"].items()}
    kept = {name: v for name, v in state.items() if name not in LEFT_OUT}
    kept["config"].get("data", {}).pop("root", None)      # where the images lay is nobody's business
    save_torch(target, kept | dict(net=ema, ema=ema, weights=weights_hash(ema, kept["model"])))
    seen = state["seen"] + (state.get("init") or {}).get("seen", 0)
    print(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB, {seen:,} images seen")


if __name__ == "__main__":
    main()

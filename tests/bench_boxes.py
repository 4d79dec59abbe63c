"""Boxes from stored features, without extraction: seconds for 10,000 images of 16 x 16 patches on two threads.

    python tests/bench_boxes.py             # a minute or two; timings of busy machines mean nothing        goal: below 60 s each
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self_label import find_objects                      # noqa: E402
from configs.shapes import draw_shapes                # noqa: E402


def main():
    torch.set_num_threads(2)
    g, n, step, seconds = torch.Generator().manual_seed(0), 2_000, 64, {}        # time is proportional to the number of images
    images = torch.from_numpy(draw_shapes(0, np.arange(n))[0])
    x = torch.nn.functional.pixel_unshuffle(images / 127.5 - 1, 2)               # [n, 12, 16, 16]; made 64 channels with noise, as an early activation would be
    x = torch.cat([x, 0.3 * torch.randn(n, 52, 16, 16, generator=g)], 1).flatten(2).transpose(1, 2)
    for method in ("lost", "ncut"):
        tick = time.perf_counter()
        for i in range(0, n, step):
            find_objects(x[i:i + step], (16, 16), (32, 32), method, images=images[i:i + step], cells=4)
        seconds[method] = (time.perf_counter() - tick) * 10_000 / n
        print(f"{method}: {seconds[method]:.1f} s for 10,000 images of 16 x 16 patches (goal: below 60)")
    print(json.dumps(dict(threads=2, torch=torch.__version__, boxes_seconds=seconds)))


if __name__ == "__main__":
    main()

"""Attention in training, in bfloat16 on a CPU: PyTorch's fused operation against `attention` of train_diffusion.py, forth and back. Ratios, at the end one line of JSON.

    python tests/bench_attention.py              # seconds on two CPU cores; timings of busy machines mean nothing

Shapes are those of configs/shapes.yaml, configs/folder.yaml, U-ViT-S/2 and L/2 and the levels of ADM; from 500 positions on `attention` is the fused operation itself.
"""
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_diffusion import attention                # noqa: E402

SHAPES = [(128, 2, 64, 32), (32, 8, 65, 48), (8, 8, 257, 64), (4, 16, 257, 64), (16, 4, 256, 64), (2, 4, 1024, 64)]       # batch, heads, positions, width


def main():
    if torch.cuda.is_available():
        return print("skipped: on a GPU attention is PyTorch's fused operation")
    out = {}
    for B, H, L, D in SHAPES:
        x = torch.randn(B, L, 3, H, D).bfloat16().requires_grad_()
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        took = {"fused": [], "ours": []}
        for _ in range(12):                               # in turns, so that a slow moment hits both
            for name, f in (("fused", F.scaled_dot_product_attention), ("ours", attention)):
                tick = time.perf_counter()
                y = f(q, k, v)
                torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
                took[name].append(time.perf_counter() - tick)
        fused, ours = min(took["fused"]), min(took["ours"])
        out[f"{B} x {H} heads, {L} positions, width {D}"] = dict(fused_ms=round(1000 * fused, 2), ours_ms=round(1000 * ours, 2), times_faster=round(fused / ours, 2))
        print(f"{B:4} x {H:2} heads, {L:4} positions, width {D}: {fused / ours:.1f} times as fast as the fused operation ({1000 * ours:.1f} ms against {1000 * fused:.1f})", flush=True)
    print(json.dumps(dict(threads=torch.get_num_threads(), torch=torch.__version__, **out)))


if __name__ == "__main__":
    main()

"""What the stages make of the hardware: shares of a matrix rate, a memory rate and bare network steps that are measured in the same run.

    python tests/bench_hardware.py               # five minutes on two CPU cores; timings of busy machines mean nothing

training     fit() on random images and latents, everything in it: operations that the network needs (three times those of a forward pass) a second,
             as a share of the rate of large matrix products in the same precision        goal on a GPU: 0.5 for U-ViT-L/2 on latents, 8,000 images/s for CIFAR-10's U-Net
optimizer    AdamW's update, and that of the averaged weights: the 28 and 12 bytes of a parameter that they move, as a share of the memory rate
loop         time of a bare step (forward, backward, AdamW on tensors at hand) as a share of fit()'s
k-means      an iteration over all rows: 2 N K D operations, as a share of the fp32 matrix rate     goal on a GPU: 1.28 M x 1024, K = 5,000 within 3 s
Sinkhorn     an iteration that computes the scores anew: likewise
Frechet      distance of two sets of 10,000 x 2,048 features: 4 N D^2 operations for covariances, as a share of the fp64 matrix rate
On a GPU networks are compiled and sizes are the papers'; on a CPU both are what it can do in minutes.
"""
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from bench_sampling import DEVICE, seconds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_diffusion                                                                                                      # noqa: E402
from sample_ode import frechet                                                                                              # noqa: E402
from self_label import kmeans, sinkhorn_stream                                                                              # noqa: E402
from configs.data import Split                                                                                              # noqa: E402
from configs.run import Data, Model, Run, autocast, fill, gpu_flags                                                         # noqa: E402
from train_diffusion import PATHS, TrainDiffusion, build_model, fit, footprint, loss_per_image, placed                      # noqa: E402

GPU = DEVICE.type == "cuda"


def rates():
    """Operations a second of square matrix products by precision, bytes a second of a copy or a product in place: the best of several."""
    n, out = 8192 if GPU else 3072, {}
    for kind in (torch.bfloat16, torch.float32, torch.float64):
        a, b = torch.randn(2, n, n, device=DEVICE).to(kind).unbind()
        a @ b
        out[str(kind).split(".")[1]] = 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(5 if kind != torch.float64 else 2))
    a = torch.ones(2 ** 28 if GPU else 2 ** 27, device=DEVICE)
    b = a.clone()
    out["bytes"] = 2 * 4 * len(a) / min(seconds(f) for f in (lambda: b.copy_(a), lambda: a.mul_(1.0)) for _ in range(5))         # one reads, another writes; or both in place
    return out


def training(what, model, latent, batch, updates, rate):
    """Images a second of fit(), its share of the matrix rate, and the share of its time that bare steps need."""
    g, channels = np.random.default_rng(0), 4 if latent else 3
    images = g.integers(0, 256, (4096, 3, 32, 32), dtype=np.uint8)
    latents = g.normal(size=(4096, 2, 8, 32, 32)).astype(np.float16) if latent else None
    cfg = TrainDiffusion(images=(4 * updates) * batch, batch=batch, log_every=updates * batch, save_every=10 ** 9, grid_every=10 ** 9, compile=GPU)
    with tempfile.TemporaryDirectory() as folder:
        plain = dict(data=dataclasses.asdict(Data()), model=dataclasses.asdict(model), train_diffusion=dataclasses.asdict(cfg))
        run = Run("train_diffusion", Path(folder), cfg, Data(), model, plain, False, set(), device=DEVICE)
        state = dict(kind="diffusion", model=plain["model"], size=32, channels=channels, conditions={}, num_labels=0, path="cv", predict="v", data="random", config=plain)
        run.say = lambda *words: None
        nothing = lambda *_: None                         # no picture and no checkpoint at the end of fit()
        with (mock.patch.object(train_diffusion, "preview", lambda net, path, predict, z: z[:, :3]), mock.patch.object(train_diffusion, "save_checkpoint", nothing),
              mock.patch.object(train_diffusion, "load_checkpoint", nothing)):
            fit(run, cfg, placed(build_model(model, 32, channels), DEVICE, GPU), run.dir / "model", Split(images, np.zeros(4096), None, None, {}, latents), state)
        lines = [json.loads(line) for line in (run.dir / "model" / "metrics.jsonl").read_text().splitlines()][1:]          # the first one warms up
        context, kind, _ = autocast(run, cfg.precision)
    whole = min(line["seconds"] for line in lines) / updates                     # of an update

    net = placed(build_model(model, 32, channels), DEVICE, GPU).train()
    step_net, opt = torch.compile(net) if GPU else net, torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x, z, t = torch.randn(2, batch, channels, 32, 32, device=DEVICE).unbind() + (torch.rand(batch, device=DEVICE),)

    def steps(n):
        for _ in range(n):
            with context():
                loss_per_image(step_net, PATHS["cv"], "v", x, z, t).mean().backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
    steps(3)
    bare = min(seconds(lambda: steps(updates)) for _ in range(3)) / updates
    flops = 3 * footprint(net, channels, 32)[0]
    out = dict(images_per_second=round(batch / whole, 1), precision=str(kind).split(".")[1], batch=batch, gflop_per_image=round(flops / 1e9, 2),
               of_matrix_rate=round(flops * batch / whole / rate[str(kind).split(".")[1]], 3), bare_of_matrix_rate=round(flops * batch / bare / rate[str(kind).split(".")[1]], 3),
               bare_of_loop=round(bare / whole, 3), waiting=round(sum(line["waiting"] for line in lines) / len(lines), 4))
    print(f"{'training, ' + what:40} {out['images_per_second']:.0f} images/s, {out['of_matrix_rate']:.2f} of the matrix rate ({out['precision']}); "
          f"bare steps take {out['bare_of_loop']:.2f} of its time", flush=True)
    return out


def main():
    gpu_flags(training=False)                             # the rate of fp32 is that of full products
    rate = rates()
    gpu_flags(training=True)
    print("rates: " + ", ".join(f"{k} {v / 1e9:,.0f} G{'B' if k == 'bytes' else 'FLOP'}/s" for k, v in rate.items()), flush=True)
    out = {"rates, 1/s": {k: float(f"{v:.4g}") for k, v in rate.items()}}
    config = yaml.safe_load((ROOT / "configs" / ("cifar10.yaml" if GPU else "cifar10-cpu.yaml")).read_text())
    unet, big = fill("model", Model, config["model"]), Model("uvit", channels=1024, depth=20, heads=16, patch=2)
    uvit = big if GPU else Model("uvit", channels=384, depth=12, heads=6, patch=2)
    updates = 20 if GPU else 3
    out["training, U-ViT on latents"] = training(f"U-ViT, {'L/2' if GPU else '384 wide, 12 deep'}, on latents", uvit, True, 256 if GPU else 16, updates, rate)
    out["training, CIFAR-10 U-Net"] = training("CIFAR-10 U-Net", unet, False, 512 if GPU else 64, 2 * updates, rate)

    net = build_model(uvit, 32, 4).to(DEVICE)
    weights, averages, opt = list(net.parameters()), [p.detach().clone() for p in net.parameters()], torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    for p in weights:
        p.grad = torch.ones_like(p)
    count, average = sum(p.numel() for p in weights), torch.no_grad()(lambda: torch._foreach_lerp_(averages, weights, 0.1))
    for what, f, moved in (("AdamW", opt.step, 28), ("average", average, 12)):
        f()
        out[f"{what}, of memory rate"] = round(moved * count / min(seconds(f) for _ in range(5)) / rate["bytes"], 3)
        print(f"{what + f', {count / 1e6:.0f} M parameters':40} {out[f'{what}, of memory rate']:.2f} of the memory rate", flush=True)
    del net, weights, averages, opt

    gpu_flags(training=False)
    N, D, K = (1_280_000, 1024, 5000) if GPU else (60_000, 1024, 1000)
    x = torch.randn(N, D, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    c = x[:K].clone()
    many = lambda n: seconds(lambda: kmeans(x, K, metric="euclidean", iterations=n, start=c, device=DEVICE))
    many(1)
    each = (many(4) - many(1)) / 3                        # an iteration, without what happens once
    out["k-means"] = dict(rows=N, width=D, K=K, seconds=round(each, 3), of_matrix_rate=round(2 * N * D * K / each / rate["float32"], 3))
    c = torch.nn.functional.normalize(c, dim=1)
    many = lambda n: seconds(lambda: sinkhorn_stream(x, c, 0.05, n, 8192))       # n passes and one for the sums, which is two products
    each = (many(4) - many(1)) / 3
    out["Sinkhorn"] = dict(rows=N, width=D, K=K, seconds=round(each, 3), of_matrix_rate=round(2 * N * D * K / each / rate["float32"], 3))
    for what in ("k-means", "Sinkhorn"):
        print(f"{what + f', {N:,} x {D:,}, K = {K:,}':40} {out[what]['seconds']:.2f} s an iteration, {out[what]['of_matrix_rate']:.2f} of the fp32 matrix rate", flush=True)
    a, b = torch.randn(2, 10_000, 2048).unbind()
    took = min(seconds(lambda: frechet(a, b)) for _ in range(2))
    tick = time.perf_counter()
    a.double().T @ a.double()                             # on the processor, where this is computed
    product = time.perf_counter() - tick
    out["Frechet"] = dict(seconds=round(took, 2), products=round(2 * product / took, 3))
    print(f"{'Frechet distance, 2 x 10,000 x 2,048':40} {took:.1f} s, of which the two matrix products for covariances are {2 * product / took:.2f}")
    print(json.dumps(dict(device=torch.cuda.get_device_name() if GPU else "cpu", threads=torch.get_num_threads(), torch=torch.__version__, **out)))


if __name__ == "__main__":
    main()

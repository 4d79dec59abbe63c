"""This project against two others on Fashion-MNIST: similar sizes, the same seconds, 50 network calls an image.

    pip install denoising-diffusion-pytorch torchcfm            # for this comparison only
    python results/peers.py RUN data.root=DATA [seeds=0,1,2]

Ours is configs/fashion.yaml as it stands. The others train as they do by default: denoising-diffusion-pytorch as its
Trainer (batch 16, Adam 1e-4, averages 0.995 every 10 updates; DDIM), torchcfm as its MNIST example (batch 128, Adam
1e-3, no averages; here midpoint steps). One after the other on one thread; seconds are the processor's, ours with
start and sample grids, so that other work beside it favours nobody. Writes results/peers.json.
"""
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.data import load_data, torchvision_datasets  # noqa: E402
from configs.run import start                             # noqa: E402
from sample_ode import Evaluator, SampleOde               # noqa: E402

SAMPLES = 1000
KEPT = "precision", "recall", "coverage", "distance_floor", "coverage_ceiling"


def processor_seconds():
    """Of the commands that have ended: theirs and the system's, as time.process_time counts."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(words, run, seed):
    """(samples uint8, seconds of training, images seen, parameters) of configs/fashion.yaml."""
    name, seconds = f"peer-{seed}", []
    for stage, *more in (["train_diffusion.py"], ["sample_ode.py", f"checkpoint=diffusion/{name}", f"n={SAMPLES}",
                                                  "steps=25", "evaluate=false"]):
        before = processor_seconds()
        subprocess.run([sys.executable, stage, "configs/fashion.yaml", *words, f"name={name}", f"seed={seed}", *more],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds.append(processor_seconds() - before)
    folder = run.dir / "diffusion" / name
    log = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    net = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["net"]
    images = np.load(run.dir / "samples" / name / "images.npy")
    return images, seconds[0], log["images"], sum(v.numel() for v in net.values())


def train_for(seconds, data, batch, generator, update):
    """Call update(images [batch, 1, 28, 28] in 0 ... 1) until the time is over: images seen."""
    tick, seen = time.process_time(), 0
    while time.process_time() - tick < seconds:
        update(data[torch.randint(len(data), (batch,), generator=generator)].float() / 255)
        seen += batch
    return seen


def denoising_diffusion(data, seconds, generator):
    """lucidrains/denoising-diffusion-pytorch."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    net = Unet(dim=16, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(net, image_size=28, sampling_timesteps=50)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def update(x):
        diffusion(x).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    seen = train_for(seconds, data, 16, generator, update)
    with torch.inference_mode():
        x = torch.cat([ema.ema_model.sample(batch_size=100) for _ in range(SAMPLES // 100)])
    return x, seen, net


def conditional_flow(data, seconds, generator):
    """atong01/conditional-flow-matching."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel
    net = UNetModel(dim=(1, 28, 28), num_channels=32, num_res_blocks=1)
    flow, optimizer = ConditionalFlowMatcher(sigma=0.0), torch.optim.Adam(net.parameters())

    def update(x):
        optimizer.zero_grad()
        x = 2 * x - 1
        t, x_t, u_t = flow.sample_location_and_conditional_flow(torch.randn_like(x), x)
        (net(t, x_t) - u_t).square().mean().backward()
        optimizer.step()
    seen = train_for(seconds, data, 128, generator, update)
    parts = []
    with torch.inference_mode():
        for _ in range(SAMPLES // 100):
            x, h = torch.randn(100, 1, 28, 28), 1 / 25
            for i in range(25):
                t = torch.tensor(i * h)
                x = x + h * net(t + h / 2, x + h / 2 * net(t, x))
            parts.append(x)
    return (torch.cat(parts) + 1) / 2, seen, net


def main():
    folder, *words = sys.argv[1:]
    seeds = next((w.split("=")[1].split(",") for w in words if w.startswith("seeds=")), ["0", "1", "2"])
    words = [f"run={Path(folder).resolve()}", *(w for w in words if not w.startswith("seeds="))]
    sys.argv[1:] = ["configs/fashion.yaml", *words]
    torch.set_num_threads(1)
    torchvision_datasets()                                # both of them import torchvision
    subprocess.run([sys.executable, "train_diffusion.py", "configs/fashion.yaml", *words, "--prepare"], cwd=ROOT,
                   check=True)
    run = start("sample_ode", SampleOde, __doc__)
    grey = torch.from_numpy(np.array(load_data(run, "train").images[:, :1]))     # [N, 1, 28, 28]
    evaluators, out = [Evaluator(run, name) for name in ("judge", "pixels")], ROOT / "results" / "peers.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}

    def keep(name, seed, images, seconds, seen, parameters):
        row = dict(seconds=round(seconds, 1), images=seen, parameters=parameters)
        np.save(run.dir / "samples.npy", images)
        for evaluator in evaluators:
            scores = evaluator.scores(run.dir / "samples.npy", "test")
            row[evaluator.text] = {k: scores[k] for k in ("frechet", *KEPT) if k in scores}
        rows.setdefault(name, {})[seed] = row
        about = dict(samples=SAMPLES, calls=50, torch=torch.__version__)
        out.write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")
        print(name, seed, json.dumps(row), flush=True)

    for seed in seeds:
        if seed in rows.get("torchcfm", {}):              # the last one of a seed
            continue
        if (run.dir / "diffusion" / f"peer-{seed}").exists():
            raise SystemExit(f"{run.dir}/diffusion/peer-{seed}: begun earlier; delete it to time it whole")
        images, seconds, seen, parameters = ours(words, run, seed)
        keep("ours", seed, images, seconds, seen, parameters)
        for name, peer in (("denoising-diffusion-pytorch", denoising_diffusion), ("torchcfm", conditional_flow)):
            torch.manual_seed(int(seed))
            x, seen, net = peer(grey, seconds, torch.Generator().manual_seed(int(seed)))
            images = (x.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).numpy()
            keep(name, seed, images, seconds, seen, sum(p.numel() for p in net.parameters()))


if __name__ == "__main__":
    main()

"""Other people's small trainings beside ours: the same images, about as many parameters, the same seconds, the same scores.

    python train_diffusion.py configs/fashion.yaml data.root=DATA run=runs/peers
    python sample_ode.py      configs/fashion.yaml run=runs/peers checkpoint=diffusion/base name=ours n=1000 steps=15
    python results/peers.py   configs/fashion.yaml run=runs/peers n=1000 > peers.json      (pip install denoising-diffusion-pytorch torchcfm)

lucidrains/denoising-diffusion-pytorch: its U-Net and GaussianDiffusion, batch, learning rate, averages of its Trainer, DDIM with 100 steps (its default
of 1,000 ancestral steps takes an hour here). atong01/conditional-flow-matching: the U-Net, optimizer and batch of its MNIST example, 100 Euler steps.
Both train for as many seconds as our log says that ours took. Grey images have one channel there, three here.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.data import load_data, torchvision_datasets  # noqa: E402
from configs.run import seed_of, start                    # noqa: E402
from sample_ode import Evaluation, SampleOde              # noqa: E402


def lucidrains(size, batches):
    """(network, loss of a batch in [0, 1], optimizer, averages, sampler of n images in [0, 1])."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    model = GaussianDiffusion(Unet(dim=16, dim_mults=(1, 2, 4), channels=1), image_size=size, sampling_timesteps=100)
    ema = EMA(model, beta=0.995, update_every=10)
    return model, model, torch.optim.Adam(model.parameters(), 1e-4, betas=(0.9, 0.99)), ema.update, lambda n: ema.ema_model.sample(n)


def torchcfm(size, batches):
    """As `lucidrains`."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel
    net, matcher = UNetModel(dim=(1, size, size), num_channels=32, num_res_blocks=1), ConditionalFlowMatcher(sigma=0.0)

    def loss(x):
        t, x_t, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x), 2 * x - 1)
        return (net(t, x_t) - target).square().mean()

    def sample(n, steps=100):
        x = torch.randn(n, 1, size, size)
        for k in range(steps):
            x = x + net(torch.full((n,), k / steps), x) / steps
        return (x + 1) / 2
    return net, loss, torch.optim.Adam(net.parameters()), lambda: None, sample


def main():
    run = start("sample_ode", SampleOde, __doc__)
    torchvision_datasets()                                # makes torchvision importable beside a CPU-only torch
    data = load_data(run, "train")
    log = [json.loads(line) for line in (run.dir / "diffusion/base/metrics.jsonl").read_text().splitlines()]
    seconds, scores = sum(line["seconds"] for line in log), {}
    judges = {}
    for name in ("judge", "pixels"):
        run.cfg.evaluator = name
        judges[name] = Evaluation(run, run.cfg)
    ours = np.load(run.dir / "samples/ours/images.npy")
    scores["ours"] = dict(images=log[-1]["images"], seconds=seconds, **{k: e.scores(ours[:run.cfg.n]) for k, e in judges.items()})
    for make, batch in ((lucidrains, 16), (torchcfm, 128)):
        torch.manual_seed(run.cfg.seed)
        net, loss, opt, after, sample = make(run.data.size, batch)
        order, seen, began = np.random.default_rng(seed_of(run.cfg.seed, "peers")), 0, time.time()
        while time.time() - began < seconds:
            x = torch.from_numpy(data.images[np.sort(order.integers(0, len(data), batch))][:, :1]).float() / 255
            loss(x).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step(), opt.zero_grad(), after()
            seen += batch
        with torch.no_grad():
            made = torch.cat([sample(100) for _ in range(run.cfg.n // 100)])
        made = (made.clamp(0, 1) * 255).round().to(torch.uint8).repeat(1, 3, 1, 1).numpy()
        scores[make.__name__] = dict(parameters=sum(p.numel() for p in net.parameters()), images=seen, seconds=seconds, **{k: e.scores(made) for k, e in judges.items()})
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()

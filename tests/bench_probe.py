"""What a sweep costs: reading activations against bare forward passes, its linear probes against scikit-learn. Prints ratios, at the end one line of JSON.

    python tests/bench_probe.py                  # about a minute on two CPU cores; timings of busy machines mean nothing
    python tests/bench_probe.py configs/cifar10-cpu.yaml     # probes of the features of that run's model

surface      one pass over images that reads all block outputs at 8 times, against a bare forward pass     goal: at most 8.5
hook         a forward pass to the end with one activation read, against a bare one                        goal: at most 1.02
probes       the sweep's logistic regressions of all block outputs, against scikit-learn's one at a time, on `shapes` seen by a network with
             random weights, or on a run                                          goal: 10 times faster, mean accuracy within 0.3 points
"""
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import yaml
from bench_sampling import DEVICE, ratio
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extract_features import stream, tapped                                      # noqa: E402
from probe import SWEEP, Probe, accuracy, block_outputs, logistic, standardise          # noqa: E402
from configs.data import as_input, load_data                # noqa: E402
from configs.run import Model, fill, start                # noqa: E402
from configs.shapes import draw_shapes                # noqa: E402
from train_diffusion import build_model, load_model                # noqa: E402


def main():
    if len(sys.argv) > 1:
        run = start("probe", Probe, __doc__)
        net, data = load_model(run, run.cfg.checkpoint)[0], load_data(run, "train")
        some = np.sort(np.random.default_rng(0).permutation(len(data))[:3000])
        images, y = data.images[some], np.asarray(data.classes)[some]
    else:
        model = fill("model", Model, yaml.safe_load((ROOT / "configs" / "shapes.yaml").read_text())["model"])
        net = build_model(model, 32).eval().requires_grad_(False).to(DEVICE)
        g = torch.Generator().manual_seed(0)
        for p in net.parameters():                        # branches that start at zero would show nothing
            p += 0.05 * torch.randn(p.shape, generator=g).to(DEVICE)
        images, y = draw_shapes(0, np.arange(3000))[:2]
    names, times, batch, y = block_outputs(net), [0.1 * k for k in range(1, 9)], 500, torch.from_numpy(y)
    x, t = as_input(torch.from_numpy(images[:batch])).to(DEVICE), torch.full((batch,), 500.0, device=DEVICE)

    @torch.no_grad()
    def bare():
        net(x, t)

    @torch.no_grad()
    def hooked():
        with tapped(net, [names[-1]]):
            net(x, t)

    read = lambda n: {name: torch.cat(v) for name, v in zip(names, zip(*[[out[name, 0.5].cpu() for name in names] for _, out in stream(
        net, dict(path="cv"), images, np.arange(n), names, [0.5], device=DEVICE, context=nullcontext, batch=batch)]))}
    surface = lambda: list(stream(net, dict(path="cv"), images, np.arange(batch), names, times, device=DEVICE, context=nullcontext, batch=batch))
    few = 5 if DEVICE.type == "cpu" else 30
    results = {"surface of 8 times / forward": ratio("surface of 8 times", 8.5, few, surface=surface, forward=bare)}
    results["hook"] = ratio("hook", 1.02, 6 * few, hooked=hooked, bare=bare)

    features, seconds, right = read(3000), [0.0, 0.0], []
    for name in names:
        f, v = standardise(features[name][:2000], features[name][2000:])
        tick = time.perf_counter()
        ours = accuracy(logistic(f, y[:2000], int(y.max()) + 1, 1e-3, tolerance=SWEEP), v, y[2000:])
        seconds[0] += time.perf_counter() - tick
        tick = time.perf_counter()
        theirs = LogisticRegression(C=1 / (1e-3 * 2000), max_iter=1000).fit(f.numpy(), y[:2000].numpy()).score(v.numpy(), y[2000:].numpy())
        seconds[1] += time.perf_counter() - tick
        right.append((ours, theirs))
    ours, theirs = np.mean(right, 0)
    faster = seconds[1] / seconds[0]
    print(f"probes of {len(names)} block outputs: {faster:.0f} times faster than scikit-learn (goal 10 {'met' if faster >= 10 else 'MISSED'}), mean accuracy {ours:.4f} against "
          f"{theirs:.4f} (goal: within 0.003 {'met' if ours > theirs - 0.003 else 'MISSED'})")
    print(json.dumps(results | {"probes, times faster": round(faster, 1), "probes, accuracy": [round(ours, 4), round(theirs, 4)]}))


if __name__ == "__main__":
    main()

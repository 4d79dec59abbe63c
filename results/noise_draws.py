"""Are labels of the image or of the noise draw? k-means of features under one draw; the same images under another.

    python results/noise_draws.py configs/cifar10-cpu.yaml run=RUN data.root=DATA checkpoint=results/cifar10-base.pt
                                  activations=mid-repeat0-res-out t=0.2,0.4,0.6,0.7,0.8,0.9,0.95,1 K=50 fit=3000

In a run whose images are prepared. `kept`: share of `fit` training images that fall to the same centroid under another
draw, by time, and for means over 4 and 8 draws at t = 0.7; `nmi`: agreement with the classes. Writes
results/noise-draws.json.
"""
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.data import load_data                        # noqa: E402
from configs.run import autocast, start, write_json       # noqa: E402
from extract_features import stream                       # noqa: E402
from probe import Probe                                   # noqa: E402
from self_label import assign, kmeans, nmi                # noqa: E402
from train_diffusion import load_model                    # noqa: E402


def main():
    run = start("probe", Probe, __doc__)
    cfg, data, (net, state) = run.cfg, load_data(run, "train"), load_model(run, run.cfg.checkpoint)
    rows, (name,) = np.arange(cfg.fit), cfg.activations
    out = dict(activation=name, K=cfg.K, images=cfg.fit, seed=cfg.seed, weights=state["weights"], rows=[])
    for t, draws in [*((t, 1) for t in cfg.t), (0.7, 4), (0.7, 8)]:
        features = []
        for purpose in ("one", "another"):
            read = stream(net, state, data.inputs, rows, [name], [t], device=run.device, purpose=purpose, draws=draws,
                          context=autocast(run, cfg.precision)[0], seed=cfg.seed)
            features.append(torch.cat([part[name, t].cpu() for _, part in read]))
        features = [x - x.mean(0) for x in features]
        centroids, _, _ = kmeans(features[0], cfg.K, restarts=3, seed=cfg.seed)
        one, another = (assign(x, centroids).numpy() for x in features)
        out["rows"].append(dict(t=t, draws=draws, kept=float((one == another).mean()),
                                nmi=nmi(one, np.asarray(data.classes[rows]))))
        print(out["rows"][-1], flush=True)
    write_json(ROOT / "results" / "noise-draws.json", out)


if __name__ == "__main__":
    main()

"""Do labels of a place stay the same where they should? Scores of blocks and times without labels, beside the sweep's.

    python results/places.py configs/SET.yaml run=RUN seed=0 checkpoint=diffusion/base-0 choice=sweep-0 [data.root=DATA]

Goes on in a run of evidence.py, whose rows `stability`, `augmented` and `both` (augmented + consensus) look where these
scores are highest. k-means of `fit` training images at each place of the sweep; the same images again, each to its
nearest centroid: stability, under another noise draw; augmented, under the same noise, but cropped and in other
colours. Each is the NMI of the two labellings. Writes results/places-SET.json, one table per seed; prints for each
score its rank correlation over places with the NMI of clusters and classes, and the place it chooses.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evidence import ROOT, keep                           # noqa: E402
from configs.data import load_data                        # noqa: E402
from configs.run import autocast, seed_of, start          # noqa: E402
from extract_features import stream                       # noqa: E402
from probe import Probe, fit_and_validation  # noqa: E402
from self_label import assign, kmeans, nmi                # noqa: E402
from train_diffusion import load_model                    # noqa: E402


def augmented(images, seed):
    """uint8 images [N, C, H, W], each cropped to 0.7 to 1 of its width and height and resized, and with brightness,
    contrast and saturation times 0.6 to 1.4."""
    numbers = np.random.default_rng(seed_of(seed, "augmented"))
    out = np.empty_like(images)
    for i, x in enumerate(images):
        c, h, w = x.shape
        high, wide = np.int64(numbers.uniform(0.7, 1, 2) * (h, w))
        top, left = numbers.integers(h - high + 1), numbers.integers(w - wide + 1)
        image = Image.fromarray(x.transpose(1, 2, 0)).resize((w, h), box=(left, top, left + wide, top + high))
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(numbers.uniform(0.6, 1.4))
        out[i] = np.asarray(image).transpose(2, 0, 1)
    return out


def main():
    run = start("probe", Probe, __doc__)
    cfg, data, (net, state) = run.cfg, load_data(run, "train"), load_model(run, run.cfg.checkpoint)
    rows, _ = fit_and_validation(cfg, len(data), cfg.fit)
    table = json.loads((run.dir / f"probe/{cfg.choice}.json").read_text())["table"]
    names = list(dict.fromkeys(r["activation"] for r in table))
    images = np.asarray(data.inputs[rows])
    views = {"one": images, "another": images, "changed": augmented(images, cfg.seed)}
    for t in sorted({r["t"] for r in table}):
        features = {}
        for view, shown in views.items():
            read = stream(net, state, shown, np.arange(len(rows)), names, [t], device=run.device, seed=cfg.seed,
                          purpose="another" if view == "another" else "one", context=autocast(run, cfg.precision)[0])
            parts = [out for _, out in read]
            features[view] = {name: torch.cat([out[name, t].cpu() for out in parts]) for name in names}
        for row in (r for r in table if r["t"] == t):
            one, *others = (features[view][row["activation"]] for view in views)
            mean = one.mean(0)
            centroids, _, _ = kmeans(one - mean, cfg.K, metric="cosine", seed=cfg.seed)
            ids, *again = (assign(x - mean, centroids).numpy() for x in (one, *others))
            row["stability"], row["augmented"] = (nmi(ids, other) for other in again)
    scores = {score: [r[score] for r in table] for score in ("consensus", "silhouette", "stability", "augmented")}
    scores["both"] = [a + c for a, c in zip(scores["augmented"], scores["consensus"])]
    for score, values in scores.items():
        rho, best = spearmanr(values, [r["nmi"] for r in table]).statistic, table[int(np.argmax(values))]
        print(f"{score}: rank correlation with NMI {rho:.2f}; best {best['activation']} at {best['t']:g}, NMI "
              f"{best['nmi']:.3f}", flush=True)
    about = dict(K=cfg.K, images=len(rows))
    keep(ROOT / "results" / f"places-{Path(sys.argv[1]).stem}.json", about, "table", cfg.seed, table)


if __name__ == "__main__":
    main()

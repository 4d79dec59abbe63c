"""What do labels have that guide well? Of the labels of evidence.py: NMI with the classes, balance, and how well they
can be told.

    python results/labels.py SET RUN [seeds=0,1,2,3,4] [rows=kmeans,pixels] [K=50] [base=FILE.pt] [ids=FILE.npy]
                             [data.root=DATA]

Labels are made, or found, in a run of evidence.py, but not trained with. balance: entropy of their sizes as a share of
ln K. told: share of that entropy which a linear probe on the base model's features at the label-free place explains, of
training images that it was not fitted to; the noise is another draw than that which own labels were found in.
labels=online are there only after that row's training. Writes results/labels-SET.json, one entry per row and seed;
results/summary.py sets them beside distances.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import entropy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evidence import ROOT, SETS, base_and_features, extract, keep, label, names_of, options              # noqa: E402
from probe import SWEEP, logistic, standardise            # noqa: E402

ROWS = "kmeans,averaged,random,sinkhorn,grid,colours,pixels,untrained,classes,subgroups"


def told(run, name, s, most=15_000):
    """How much of labels/<name> a linear probe tells: 1 - cross-entropy / entropy, on a third of `most` images."""
    y = torch.from_numpy(np.load(run / f"labels/{name}.npz")["train"])
    x = np.load(next((run / f"features/told-{s}").glob("train-*.npy")), mmap_mode="r")
    rows = np.random.default_rng(0).permutation(len(y))[:most]
    held_out, fit = np.split(rows, [len(rows) // 3])
    x_fit, x = standardise(*(torch.from_numpy(np.float32(x[part])) for part in (fit, held_out)))
    w = logistic(x_fit, y[fit], int(y.max()) + 1, 1e-3, tolerance=SWEEP)
    cross = F.cross_entropy(x @ w[:-1] + w[-1], y[held_out])
    return 1 - float(cross) / entropy(np.bincount(y[held_out]))


def main():
    which, folder, *words = sys.argv[1:]
    asked, words = options(words, ("seeds", "rows", "K", "base", "ids"))
    run, out = Path(folder).resolve(), ROOT / "results" / f"labels-{which}.json"
    words, K = [f"run={run}", *words], int(asked.get("K", SETS[which]["K"]))
    for s in map(int, asked.get("seeds", "0,1,2,3,4").split(",")):
        base, found = base_and_features(which, run, s, asked.get("base"), words)
        extract(which, f"told-{s}", base, found["label_free"], s + 1000, words)
        for row in asked.get("rows", ROWS).split(","):
            name, title = names_of(which, row, s, K)
            if row == "averaged":
                extract(which, f"averaged-{s}", base, found["label_free"], s, [*words, "draws=8"])
            if row != "online":
                label(which, row, name, s, K, asked.get("ids"), words)
            about = json.loads((run / f"labels/{name}.json").read_text())
            known = dict(K=about["num_labels"], nmi=about["scores"].get("nmi"), balance=about["scores"]["size_entropy"])
            keep(out, dict(set=which), title, s, known | dict(told=told(run, name, s)))


if __name__ == "__main__":
    main()

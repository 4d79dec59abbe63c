"""Does the Sinkhorn loss help? The same training from scratch with its gradient in the network, at several weights or
ratios of gradients.

    python results/sinkhorn.py SET RUN [seeds=0,1,2,3,4] [weights=0,0.02,0.1,1] [ratios=0.05] [base=FILE.pt]
                               [into=NAME] [data.root=DATA]

SET: shapes, fashion or cifar10-cpu; base: train on from these weights, in place of from scratch. No image has a
condition: weight 0 is the same training without the loss. `pull` is the norm of the loss's gradient over that of both
losses. Features are probed on training images (NMI of k-means; kNN and linear on some that are held out), at the
label-free place, at the best one, and on average over all times of each block; 1,000 samples are scored by the judge
and by pixels. What is finished is not repeated. Writes results/sinkhorn-SET.json, or
sinkhorn-NAME.json: an entry per level and seed.
"""
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evidence import ROOT, keep, options, stage           # noqa: E402

IMAGES = {"shapes": "40k", "fashion": "60k", "cifar10-cpu": "100k"}
ONLINE = ["labels=online", "condition=none", "sk_grad=backbone", "sk_until=0", "switch=0"]


def measured(run, name):
    """What is kept of a training: how hard the loss pulled, scores of features and samples."""
    log = [json.loads(line) for line in (run / "guided" / name / "metrics.jsonl").read_text().splitlines()]
    probe = json.loads((run / "probe" / f"{name}.json").read_text())
    place, table = probe["label_free"], probe["table"]
    here = next(r for r in table if (r["activation"], r["t"]) == (place["activation"], place["t"]))
    scores = ("nmi", "knn", "linear")
    out = {k: here[k] for k in scores} | {f"best_{k}": max(r[k] for r in table) for k in scores}
    blocks = dict.fromkeys(r["activation"] for r in table)
    out["linear_by_block"] = {b: mean(r["linear"] for r in table if r["activation"] == b) for b in blocks}
    samples = json.loads((run / "samples" / name / "metrics.json").read_text())
    out |= dict(judge=samples["scores"]["frechet"], pixels=samples["others"]["pixels"]["scores"]["frechet"])
    return out | dict(pull=[r.get("pull") for r in log], sk_loss=log[-1]["sk_loss"], loss=log[-1]["loss"])


def main():
    which, folder, *words = sys.argv[1:]
    asked, words = options(words, ("seeds", "weights", "ratios", "base", "into"))
    run, out = Path(folder).resolve(), ROOT / "results" / f"sinkhorn-{asked.get('into', which)}.json"
    base, weights, ratios = asked.get("base", ""), asked.get("weights", "0,0.02,0.1,1"), asked.get("ratios", "")
    levels = {w: f"sk_ratio=0 sk_weight={w}" for w in weights.split(",") if w}
    levels |= {f"ratio {r}": f"sk_ratio={r}" for r in ratios.split(",") if r}
    words = [f"run={run}", *words]
    stage("train_diffusion", which, *words, "--prepare")
    for s in asked.get("seeds", "0,1,2,3,4").split(","):
        for title, level in levels.items():
            name = f"sk-{title}-{s}".replace(" ", "-")
            keys = [f"name={name}", f"seed={s}"]
            stage("train_guided", which, *words, *keys, *ONLINE, f"init={base}", f"images={IMAGES[which]}",
                  *level.split())
            stage("probe", which, *words, *keys, f"checkpoint=guided/{name}")
            stage("sample_ode", which, *words, *keys, f"checkpoint=guided/{name}", "n=1000", "solver=midpoint",
                  "steps=8", "evaluator=judge,pixels")
            about = dict(set=which, images=IMAGES[which], base=Path(base).name)
            keep(out, about, title, s, measured(run, name))


if __name__ == "__main__":
    main()

"""Which labels guide well? The same fine-tuning of the same base model under labels of every source, for several seeds.

    python results/evidence.py SET RUN [seeds=0,1,2,3,4] [evaluators=judge,pixels] [rows=kmeans,pixels] [K=50]
                               [tune=60k] [base=FILE.pt] [ids=FILE.npy] [into=NAME] [weak=4k] [labels=uniform]
                               [data.root=DATA]

SET: shapes, fashion or cifar10-cpu. Each row is made by the commands that anybody would type, on one thread; what is
finished is not repeated, so the same command goes on where it was stopped. w is chosen by the first evaluator on other
samples against training images; every evaluator scores the same samples against test images. rows: some of them, or
`file` for the labels in ids=, or the rules of PLACES; K: another number of clusters, as rows of their own; base: one
model for all seeds, in place of a training each. weak: what guides is not the null label, but an early state of the
same training after so many images (or a FILE.pt): autoguidance (arXiv 2406.02507), which needs no labels. labels:
those that are sampled, at w = 1, in place of labels as frequent as in training. Writes
results/evidence-SET.json: one entry per row and seed, with the hash of the base model's weights. Name another file,
evidence-NAME.json, for other images (data.*) or another base.
"""
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.run import save_torch, weights_hash, write_json        # noqa: E402
from probe import label_free_choice                       # noqa: E402

SETS = {                                                  # images of base and fine-tuning, labels, classes
    "shapes": dict(base="40k", tune="24k", K=20, classes=10),
    "fashion": dict(base="60k", tune="24k", K=50, classes=10),
    "cifar10-cpu": dict(base="600k", tune="60k", K=100, classes=10),
}
ROWS = {                                                  # keys of self_label.py; s: seed
    "none": None, "online": None,
    "kmeans": "method=kmeans features=own-{s}",
    "random": "method=random reference={kmeans}",         # needs the row before
    "sinkhorn": "method=sinkhorn features=own-{s}",
    "grid": "method=kmeans features=grid-{s}",            # own features, laid out on 4 x 4 positions
    "averaged": "method=kmeans features=averaged-{s}",    # own features, means over 8 draws of the noise
    "colours": "method=colours", "pixels": "method=pixels",
    "untrained": "method=kmeans features=untrained-{s}",  # of a network with random weights
    "classes": "method=classes", "subgroups": "method=subgroups groups={groups}",
}
PLACES = {                                                # k-means where other rules look: rows of the sweep's table
    "silhouette": lambda table: max(table, key=lambda r: r["silhouette"]),
    "bottleneck": lambda table: label_free_choice([r for r in table if r["activation"].startswith("mid")]),
    "stability": lambda table: max(table, key=lambda r: r["stability"]),         # these: of results/places.py
    "augmented": lambda table: max(table, key=lambda r: r["augmented"]),
    "both": lambda table: max(table, key=lambda r: r["augmented"] + r["consensus"]),
    "best-nmi": lambda table: max(table, key=lambda r: r["nmi"]),                # with labels: what a rule could reach
}
ONLINE = "switch=4k", "sk_until=4k", "sk_ramp=2k", "sk_freeze=1k"                # soon: the base has learnt already
OPTIONS = "seeds", "evaluators", "rows", "K", "tune", "base", "ids", "into", "weak", "labels"
SHOWN = ("precision", "recall", "coverage", "coverage_ceiling", "distance_floor", "copies", "memorisation",
         "head", "tail")                                  # the last two: of long-tailed sets


def stage(name, config, *words):
    """One command; its last lines if it fails."""
    line = [sys.executable, f"{name}.py", f"configs/{config}.yaml", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def base_and_features(which, run, s, base, words):
    """The base model of a seed, or `base`, and where its features cluster best without labels: (checkpoint, what the
    sweep says); features of it and of a network with random weights there."""
    about = SETS[which]
    if not base:
        stage("train_diffusion", which, *words, f"name=base-{s}", f"seed={s}", f"images={about['base']}")
    else:
        stage("train_diffusion", which, *words, "--prepare")
    base = base or f"diffusion/base-{s}"
    stage("probe", which, *words, f"name=sweep-{s}", f"checkpoint={base}", f"seed={s}")
    found = json.loads((run / f"probe/sweep-{s}.json").read_text())
    extract(which, f"own-{s}", base, found["label_free"], s, words)
    extract(which, f"grid-{s}", base, found["label_free"], s, [*words, "pool=4"])
    stage("train_diffusion", which, *words, f"name=untrained-{s}", f"seed={s}", "images=32", "batch=32", "lr=1e-12",
          "optimizer=adamw")
    redraw_zeros(run / "diffusion" / f"untrained-{s}" / "checkpoint.pt", s)
    extract(which, f"untrained-{s}", f"diffusion/untrained-{s}", found["label_free"], s, words)
    return base, found


def choose(which, row, s, found):
    """(where a rule of PLACES looks, what features and labels of that place are called: those of kmeans where it looks
    there, too). found: what the sweep says."""
    table, file = found["table"], ROOT / "results" / f"places-{which}.json"
    if row in ("stability", "augmented", "both"):
        table = json.loads(file.read_text())["rows"]["table"][str(s)]
    place, own = PLACES[row](table), found["label_free"]
    if (place["activation"], place["t"]) == (own["activation"], own["t"]):
        return place, "kmeans"
    return place, f"{place['activation']}-{place['t']:g}"


def weights_of(run, base):
    """Hash of the weights of a base model, a name in the run or a file."""
    file = Path(base) if str(base).endswith(".pt") else run / base / "checkpoint.pt"
    return torch.load(ROOT / file, weights_only=True, map_location="cpu")["weights"]


def extract(which, name, checkpoint, place, s, words):
    """Features of a checkpoint at a place, a row of a sweep."""
    stage("extract_features", which, *words, f"name={name}", f"checkpoint={checkpoint}", f"seed={s}",
          f"activations={place['activation']}", f"t={place['t']}")


def redraw_zeros(file, seed):
    """Give the weights that begin at zero random ones, in place: a network with random weights, as in probe.py."""
    state = torch.load(file, weights_only=True)
    numbers = torch.Generator().manual_seed(seed)
    for name, p in state["ema"].items():
        if p.dim() > 1 and p.abs().max() < 1e-6:          # an update of 1e-12 has moved them
            p = torch.nn.init.kaiming_uniform_(torch.empty(p.shape), a=5 ** 0.5, generator=numbers)
            state["ema"][name] = state["net"][name] = p
    save_torch(file, state | dict(weights=weights_hash(state["ema"], state["model"])))


def names_of(which, row, s, K, place=""):
    """(labels/<name> of a row, what the row is called). place: in place of the row, if it is one of PLACES."""
    if K == SETS[which]["K"] or row in ("none", "classes"):
        return f"{place or row}-{s}", row
    return f"{place or row}-{K}-{s}", f"{row}, K = {K}"


def label(which, row, name, s, K, ids, words):
    """Make the labels of a row, or of features/<row>-<s>."""
    keys = f"method=file ids={ids}" if row == "file" else f"method=kmeans features={row}-{s}"
    if row in ROWS:
        keys = ROWS[row].format(s=s, groups=K // SETS[which]["classes"], kmeans=name.replace("random", "kmeans"))
    stage("self_label", which, *words, f"name={name}", f"K={K}", f"seed={s}", *keys.split())


def guide(which, row, name, s, K, base, tune, weak, labels, words, evaluators):
    """Fine-tune the base model under the labels of a row, sample, guided by its null label or by a weaker model, and
    score; the name of the samples. labels: those to sample, or ""."""
    keys = dict(none=["labels=none"], online=["labels=online", f"K={K}", *ONLINE]).get(row, [f"labels={name}"])
    stage("train_guided", which, *words, f"name={name}", f"seed={s}", f"init={base}", f"images={tune}",
          "ema_ramp=0.25", *keys)
    sampled, keys = (f"{name}-autoguided", [f"autoguide={weak}"]) if weak else (name, [])
    if labels:                                            # w would be chosen against images of other frequencies
        sampled, keys = f"{sampled}-{labels}", [*keys, f"labels={labels}", "guidance=1"]
    stage("sample_ode", which, *words, f"name={sampled}", f"checkpoint=guided/{name}", f"seed={s}", "n=1000",
          "solver=midpoint", "steps=8", f"evaluator={evaluators}", "guidance=1,1.5,2,3", "select=500", *keys)
    return sampled


def measured(run, name, place, evaluators):
    """What is kept of a row: distances by every evaluator at w = 1 and at the chosen w, and what goes with them."""
    m = json.loads((run / f"samples/{name}/metrics.json").read_text())
    first, *others = evaluators.split(",")
    every = {first: m} | {other: m["others"][other] for other in others}
    out = dict(w=m["w"], images=m["total_seen"], nmi=(m.get("label_scores") or {}).get("nmi"))
    out |= dict(activation=place["activation"], t=place["t"])
    for name, scored in every.items():
        at_w, at_1 = scored["scores"], scored.get("scores_w1", scored["scores"])
        kind = "fid" if "fid" in at_w else "frechet"
        more = {k: at_w[k] for k in SHOWN if k in at_w}
        out[Path(name).stem] = dict(w1=at_1[kind], chosen=at_w[kind], **more)    # judge, pixels, a file
    return out


def keep(out, about, title, seed, result):
    """Add an entry to a file of results, to which another command may add some at the same time."""
    folder = os.open(out.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    rows.setdefault(title, {})[str(seed)] = result
    write_json(out, about | dict(rows=rows))
    os.close(folder)                                      # and with it the lock
    print(out.stem, title, seed, json.dumps(result), flush=True)


def require_same_base(out, seed, weights):
    """Rows of one seed are compared, so they begin with the same weights: stop where those in the file do not."""
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    others = {row[str(seed)].get("base_weights", weights) for row in rows.values() if str(seed) in row}
    if others - {weights}:
        raise SystemExit(f"{out.name}: its rows of seed {seed} are of another base model; name another file, into=NAME")


def options(words, names):
    """(those of the key=value words that have these names, as a dict; the other words)."""
    mine = [w for w in words if w.split("=")[0] in names]
    return dict(w.split("=", 1) for w in mine), [w for w in words if w not in mine]


def main():
    which, folder, *words = sys.argv[1:]
    asked, words = options(words, OPTIONS)
    run, out = Path(folder).resolve(), ROOT / "results" / f"evidence-{asked.get('into', which)}.json"
    seeds, K = [int(s) for s in asked.get("seeds", "0,1,2,3,4").split(",")], int(asked.get("K", SETS[which]["K"]))
    words = [f"run={run}", *words]
    tune, evaluators = asked.get("tune", SETS[which]["tune"]), asked.get("evaluators", "judge,pixels")
    for s in seeds:
        base, found = base_and_features(which, run, s, asked.get("base"), words)
        require_same_base(out, s, weights_of(run, base))
        weak = asked.get("weak", "")
        if weak and not weak.endswith(".pt"):
            stage("train_diffusion", which, *words, f"name=weak-{weak}-{s}", f"seed={s}", f"images={weak}")
            weak = f"diffusion/weak-{weak}-{s}"
        for row in asked.get("rows", ",".join(ROWS)).split(","):
            place, source = choose(which, row, s, found) if row in PLACES else (found["label_free"], row)
            if row in PLACES and source != "kmeans":
                extract(which, f"{source}-{s}", base, place, s, words)
            if row == "averaged":
                extract(which, f"averaged-{s}", base, place, s, [*words, "draws=8"])
            name, title = names_of(which, row, s, K, source)
            if tune != SETS[which]["tune"]:
                name, title = f"{name}-{tune}", f"{title}, {tune}"
            if row not in ("none", "online"):
                label(which, source, name, s, K, asked.get("ids"), words)
            labels = asked.get("labels", "")
            sampled = guide(which, row, name, s, K, base, tune, weak, labels, words, evaluators)
            result = dict(tune=tune, base=Path(base).name, base_weights=weights_of(run, base))
            if weak:
                title, result["weak_weights"] = f"{title}, autoguided", weights_of(run, weak)
            title += f", {labels}" * bool(labels)
            keep(out, dict(set=which, K=SETS[which]["K"]), title, s, result | measured(run, sampled, place, evaluators))


if __name__ == "__main__":
    main()

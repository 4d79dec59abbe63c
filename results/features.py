"""How discriminative are the activations of a diffusion model, and how are they best read? The protocols of probe.py on
one model for each seed, one after the other.

    python results/features.py SET RUN [seeds=0,1,2] [jobs=linear,DifFormer] [base=FILE.pt] [data.root=DATA]

SET and base as in evidence.py, in whose run folder this may go on. Places: the label-free choice; the best place, by a
linear probe of validation images; levels: of each level of the way up the block output that is best on average over
times. Heads on photographs, dense tasks on `shapes`. jobs: those whose names begin so; what is finished is not
repeated. Writes results/features-SET.json, an entry per job and seed, and of the first seed features-SET-surface.png;
`python results/summary.py features-SET` prints tables.
"""
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evidence import ROOT, SETS, keep, options, stage, weights_of                # noqa: E402

TIMES = "t=0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,1"
LEVEL = re.compile(r"(down|mid|up)(-level\d)?")
SHARES = {1: "30k", 0.1: "15k", 0.01: "8k"}               # of the labels: images that a head sees


def jobs_of(which, sweep, s):
    """{name of the job: keys of probe.py}, in order; sweep: what job `surface` found."""
    best, levels = sweep["oracle"]["linear"], ",".join(sweep["levels"])
    place = f"activations={best['activation']} t={best['t']:g} controls="
    fused = f"activations={levels} t=0.7,0.9 controls="
    jobs = {
        "linear, label-free place": f"protocol=linear draws=1 choice=sweep-{s} supervised_images=50k",
        "linear, best place": f"protocol=linear draws=1 {place}",
        "linear, three levels, two times": f"protocol=linear draws=1 {fused}",
        "select": "protocol=select t=0.5,0.9",
        "cka": "protocol=cka t=0.5,0.9 against=random",
    }
    return jobs | (dense(levels.split(",", 1)[1]) if which == "shapes" else heads(place, fused))


def heads(place, fused):
    """Jobs that train heads to tell classes. (On `shapes` a line is right already.)"""
    jobs = {}
    for share, images in SHARES.items():
        for head in ("linear", "mlp", "cnn", "attention"):
            keys = f"protocol=head head={head} {place} labels_share={share} images={images} lr=1e-3,3e-3 l2=0.05"
            jobs[f"{head} head, {share:.0%} of labels"] = keys
    short = "images=20k lr=1e-3 l2=0.05"                  # what is slow, and what it is compared with
    return jobs | {
        "attention, 20k": f"protocol=head head=attention {place} {short}",
        "attention, 20k, wider": f"protocol=head head=attention {place} {short} width=288",
        "DifFeed, 20k": f"protocol=head head=diffeed {place} {short}",
        "DifFormer, 20k, three levels, two times": f"protocol=head head=difformer {fused} {short}",
    }


def dense(levels):
    """Jobs that need masks, on two levels of the way up."""
    maps = f"activations={levels} t=0.7,0.9 controls=random,pixels"
    few = "images=4k head_batch=32 width=64"
    return {
        "segment, linear": f"protocol=segment head=linear {maps} {few} lr=1e-2,1e-1 l2=0",
        "segment, UPer": f"protocol=segment head=uper {maps} {few} lr=1e-3,3e-3 l2=0",
        "correspond": "protocol=correspond controls=random,pixels",
    }


def level_of(row):
    """Way and level of an activation, such as up-level0, of a table's row."""
    return LEVEL.match(row["activation"])[0]


def kind_of(row):
    """What an activation is, such as res-out, wherever it is."""
    return re.sub(r"^(down|mid|up)(-level\d)?-?(repeat\d-)?(vit-block0-)?", "", row["activation"])


def grouped(rows, key):
    """{key of a row: rows}, in order."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def of_sweep(found):
    """What is kept of a sweep: its choices, `levels`, and the best scores by level and time."""
    table, times = found["table"], sorted({row["t"] for row in found["table"]})
    out = dict(label_free=found["label_free"], oracle=found["oracle"], times=times, levels=[], nmi={}, linear={})
    for level, rows in grouped(table, level_of).items():
        of_names = grouped(rows, lambda row: row["activation"])
        if level.startswith("up"):
            out["levels"].append(max(of_names, key=lambda name: mean(row["linear"] for row in of_names[name])))
        for score in ("nmi", "linear"):
            out[score][level] = [max(row[score] for row in rows if row["t"] == t) for t in times]
    return out


def of_select(found):
    """Means of the properties by time: of residual blocks' outputs by level, of all activations by kind."""
    table = found["table"]
    left = sum(not row["dropped"] for row in table)
    out = dict(chosen=found["chosen"], left=left, of=len(table), levels={}, kinds={})
    for t, rows in grouped(table, lambda row: row["t"]).items():
        outputs = [row for row in rows if kind_of(row) == "res-out"]
        for place, groups in dict(levels=grouped(outputs, level_of), kinds=grouped(rows, kind_of)).items():
            for name, some in groups.items():
                means = {k: mean(row[k] for row in some) for k in ("sensitivity", "granularity", "locality")}
                out[place].setdefault(name, {})[f"{t:g}"] = means
    return out


def of_cka(found):
    """Mean similarity: of neighbouring blocks at t = 0.9; of each block with itself at t = 0.5, with random weights."""
    at = {(row["model"] == "random", row["t"], row["activation"]): i for i, row in enumerate(found["table"])}
    matrix, blocks = found["cka"], list(dict.fromkeys(row["activation"] for row in found["table"]))
    near = [matrix[at[False, 0.9, a]][at[False, 0.9, b]] for a, b in zip(blocks, blocks[1:])]
    return dict(neighbours=mean(near),
                two_times={b: matrix[at[False, 0.5, b]][at[False, 0.9, b]] for b in blocks},
                random_weights={b: matrix[at[False, 0.9, b]][at[True, 0.9, b]] for b in blocks})


KEPT = dict(sweep=of_sweep, select=of_select, cka=of_cka)


def main():
    which, folder, *words = sys.argv[1:]
    run, out = Path(folder).resolve(), ROOT / "results" / f"features-{which}.json"
    asked, words = options(words, ("seeds", "jobs", "base"))
    words, wanted = [f"run={run}", *words], tuple(asked.get("jobs", "").split(","))

    def probe(title, keys, s, base):
        """One job: measured, kept."""
        name = f"{re.sub('[^a-z0-9]+', '-', title.lower())}-{s}"
        stage("probe", which, *words, f"name={name}", f"checkpoint={base}", f"seed={s}", f"seeds={s}", *keys.split())
        found = json.loads((run / "probe" / f"{name}.json").read_text())
        kept = KEPT.get(found["protocol"], lambda found: dict(rows=found["rows"]))(found)
        keep(out, dict(set=which), title, s, kept | dict(seconds=found["seconds"], base_weights=weights_of(run, base)))
        return name, kept

    for i, s in enumerate(asked.get("seeds", "0,1,2").split(",")):
        base = asked.get("base", f"diffusion/base-{s}")
        if "base" in asked:
            stage("train_diffusion", which, *words, "--prepare")
        else:
            stage("train_diffusion", which, *words, f"name=base-{s}", f"seed={s}", f"images={SETS[which]['base']}")
        stage("probe", which, *words, f"name=sweep-{s}", f"checkpoint={base}", f"seed={s}")
        sheet, sweep = probe("surface", f"protocol=sweep {TIMES}", s, base)
        if i == 0:
            shutil.copy(run / "probe" / f"{sheet}.png", out.with_name(f"{out.stem}-surface.png"))
        for title, keys in jobs_of(which, sweep, s).items():
            if not title.startswith(wanted):
                continue
            _, kept = probe(title, keys, s, base)
            if title == "select":
                names, (t,) = ",".join(kept["chosen"]["activations"]), kept["chosen"]["t"]
                for what, read in (("selected", names), ("three levels", ",".join(sweep["levels"]))):
                    keys = f"protocol=linear draws=1 controls= activations={read} t={t:g}"
                    probe(f"linear, {what}", keys, s, base)


if __name__ == "__main__":
    main()

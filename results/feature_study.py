"""Collect what feature-study.sh measured on several models of one data set: all numbers as JSON,
and tables of means for reading.

    python results/feature_study.py OUT.json RUN RUN RUN > tables.md

± is the standard deviation over the models (n - 1 in the denominator). Differences are taken within a model first.
"""
import json
import sys
from pathlib import Path

import numpy as np

LEVELS = ["down-level0", "down-level1", "down-level2", "mid", "up-level0", "up-level1", "up-level2"]


def scores(file, keys=("linear", "knn", "accuracy", "parameters", "passes", "activation", "t", "l2")):
    """{row: numbers} of a result of protocol=linear or head."""
    return {what: {k: row[k] for k in keys if k in row} for what, row in json.loads(file.read_text())["rows"].items()}


def collected(run):
    """Everything that one model's probe/ folder says, without what is only there to be looked at."""
    probe, out = Path(run) / "probe", {}
    load = lambda name: json.loads((probe / f"{name}.json").read_text())
    short = lambda table, *keys: [{k: round(r[k], 4) if isinstance(r[k], float) else r[k] for k in keys} for r in table]
    out["sweep"] = short(load("sweep")["table"], "activation", "t", "linear", "knn", "nmi", "consensus", "silhouette")
    out["label-free choice"] = load("sweep")["label_free"]
    for other in ("cifar64", "fashion64"):
        if (there := Path(f"{run}-{other}") / "probe" / "linear.json").exists():
            out[f"to-{other}"] = scores(there)
    for name in ["linear", "difformer", "diffeed", "grid-mean", "grid-2", "grid-4", "selected", "unfiltered", "levels"]:
        if (probe / f"{name}.json").exists():
            out[name] = scores(probe / f"{name}.json")
    out["heads"] = {f.stem[5:]: next(iter(scores(f).values())) for f in sorted(probe.glob("head-*.json"))}
    out["kinds"] = short(load("kinds")["table"], "activation", "t", "size", "sensitivity", "granularity", "locality",
                         "linear")
    out["select"] = dict(chosen=load("select")["chosen"],
                         dropped={w or "kept": sum(r["dropped"] == w for r in load("select")["table"])
                                  for w in ("", "noisy", "fine", "local")})
    cka = load("cka")
    at = {(r["model"], r["activation"], r["t"]): i for i, r in enumerate(cka["table"])}
    own, m = cka["checkpoint"], np.array(cka["cka"])
    names = list(dict.fromkeys(r["activation"] for r in cka["table"]))
    times = sorted({r["t"] for r in cka["table"]})
    out["cka"] = dict(neighbours={t: round(float(np.mean([m[at[own, a, t], at[own, b, t]] for a,
                                                          b in zip(names, names[1:])])), 4) for t in times},
                      between_times={n: round(m[at[own, n, times[0]], at[own, n, times[-1]]], 4) for n in names},
                      against_random={n: round(m[at[own, n, times[-1]], at["random", n, times[-1]]], 4) for n in names})
    return out


def attention_blocks(table):
    """The activations of each block with attention, {kind: name}: what attention reads, the increment of that,
    what is inside, its output."""
    names = list(dict.fromkeys(r["activation"] for r in table))
    out = []
    for name in (n for n in names if n.endswith("-vit-out")):
        read = [n for n in names[:names.index(name)] if n.endswith("-res-out")][-1]
        inside = {k: name.replace("vit-out", f"vit-block0-self-{k}") for k in ("q", "k", "v", "map", "out")}
        out.append({"what attention reads": read, "its residual increment": read.replace("res-out", "res-increment"),
                    **inside, "output": name})
    return out


def pm(values, digits=3):
    """Mean ± standard deviation."""
    v = np.array(values, float)
    return f"{v.mean():.{digits}f}" + (f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for r in rows:
        print("| " + " | ".join(map(str, r)) + " |")
    print()


def main():
    file, runs = sys.argv[1], sys.argv[2:]
    models = [collected(r) for r in runs]
    Path(file).write_text(json.dumps(dict(note=__doc__.strip().splitlines()[0], models=models), indent=1))
    every = lambda *path: [v for v in (get(m, path) for m in models) if v is not None]

    def get(m, path):
        for k in path:
            m = m.get(k) if isinstance(m, dict) else None
        return m

    times = sorted({r["t"] for m in models for r in m["sweep"]})
    best = lambda level, t: [max(r["linear"] for r in m["sweep"] if r["t"] == t and r["activation"].startswith(level))
                             for m in models]
    print("Linear probe on validation images, the best block of each level (rows) by time (columns)\n")
    table(["level", *map(str, times)], [[level, *(pm(best(level, t)) for t in times)] for level in LEVELS])
    print("Linear probe and nearest neighbours, test images\n")
    for name in ("linear", "to-cifar64", "to-fashion64", "grid-mean", "grid-2", "grid-4", "selected", "unfiltered",
                 "levels"):
        rows = list(dict.fromkeys(r for m in models for r in m.get(name, {})))
        if rows:
            table([name, "linear", "nearest neighbours", "columns"],
                  [[r, pm(every(name, r, "linear")), pm(every(name, r, "knn")), every(name, r, "parameters")[:1]]
                   for r in rows])
    print("Heads by share of the labels, test accuracy\n")
    shares = sorted({h.rsplit("-", 1)[1] for m in models for h in m["heads"]}, key=float, reverse=True)
    table(["head", "parameters", *shares],
          [[h, every("heads", f"{h}-{shares[0]}", "parameters")[0],
            *(pm(every("heads", f"{h}-{s}", "accuracy")) for s in shares)]
                                            for h in ("linear", "mlp", "cnn", "attention")])
    for name in ("difformer", "diffeed"):
        rows = list(models[0].get(name, {}))
        gain = lambda r: [m[name][name]["accuracy"] - m[name][r]["accuracy"] for m in models if name in m]
        table([name, "passes", "parameters", "accuracy", "gain of the first on it"],
              [[r, every(name, r, "passes")[0], every(name, r, "parameters")[0], pm(every(name, r, "accuracy")),
                pm(gain(r))] for r in rows])
    print("Kinds of activation in the blocks with attention: means over these blocks; validation images\n")
    times = sorted({r["t"] for r in models[0]["kinds"]})
    of = lambda m, kind, t, key: np.mean([r[key] for names in attention_blocks(m["kinds"]) for r in m["kinds"]
                                          if r["activation"] == names[kind] and r["t"] == t])
    share = lambda kind, t, key: pm([of(m, kind, t, key) / of(m, "output", t, key) for m in models], 2)
    table(["kind", *(f"linear probe, t={t}" for t in times),
           *(f"{k} / that of the output, t={t}" for k in ("sensitivity", "locality") for t in times)],
          [[kind, *(pm([of(m, kind, t, "linear") for m in models]) for t in times),
            *(share(kind, t, k) for k in ("sensitivity", "locality") for t in times)]
           for kind in attention_blocks(models[0]["kinds"])[0]])
    print("Noise sensitivity and granularity of residual block outputs, by level\n")
    out = lambda m, level, t, key: np.mean([r[key] for r in m["kinds"] if r["activation"].startswith(level)
                                            and r["activation"].endswith("res-out") and r["t"] == t])
    table(["level", *(f"sensitivity, t={t}" for t in times), *(f"granularity, t={t}" for t in times)],
          [[level, *(pm([out(m, level, t, k) for m in models], 2) for k in ("sensitivity", "granularity")
                     for t in times)] for level in LEVELS])
    for m in models:
        print("selected:", m["select"])
    names = list(models[0]["cka"]["between_times"])
    print("\nlinear CKA; neighbouring blocks:",
          {t: pm(every("cka", "neighbours", t)) for t in models[0]["cka"]["neighbours"]}, "\n")
    table(["block", "its two times", "trained and random weights"],
          [[n, pm(every("cka", "between_times", n), 2), pm(every("cka", "against_random", n), 2)] for n in names])


if __name__ == "__main__":
    main()

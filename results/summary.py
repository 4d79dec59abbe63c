"""What results/evidence-SET.json says: a table of means, spreads and differences within a seed, and a picture.

    python results/summary.py SET [SET ...]               # also sinkhorn-SET, features-SET: of those files

Each row: NMI with the classes, distance at w = 1 and at the chosen w by every evaluator (mean and standard deviation
over seeds), each with the mean difference from `none` of the same seed and length and its standard error. The last
lines are rank correlations with distance, over rows that have labels, of NMI and of what results/labels-SET.json says
of the labels: over all rows, over those of the set's K, one row for each source of labels, own labels alone, and the
rows of that file. Distances there and in the picture are differences from `none` of the same seed, plus the mean of
`none`; autoguided rows, labels sampled uniformly and other lengths of fine-tuning are questions of their own, and left
out. Writes results/evidence-SET.svg: distance against NMI, and below that against K where labels were made with
several. Of the Sinkhorn loss: features and samples by weight, and differences from weight 0 of the same seed. Of
features: a line for each probe and what it was compared with; how activations differ by level and kind.
"""
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

from scipy.stats import spearmanr

RESULTS = Path(__file__).resolve().parent
COLOURS = {"own": "#c33", "control": "#36c", "classes": "#393", "none": "#888"}
VARIANTS = ("grid", "averaged", "silhouette", "bottleneck", "stability", "augmented", "both", "best-nmi")    # of kmeans
OWN = ("kmeans", "sinkhorn", "online", *VARIANTS)
KINDS = dict.fromkeys(OWN, "own") | {"none": "none", "classes": "classes", "subgroups": "classes"}   # others: control
WIDTH, HEIGHT, EDGE = 520, 360, 50                        # of a panel, and its margin


def spread(values, digits=2):
    """Mean and standard deviation as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def parts(title):
    """What evidence.py calls a row, taken apart: (row, K or "", images of fine-tuning or "", how it was sampled)."""
    row, *more = title.split(", ")
    K = next((word.removeprefix("K = ") for word in more if word.startswith("K = ")), "")
    length = next((word for word in more if word[:1].isdigit()), "")
    return row, K, length, [word for word in more if word in ("autoguided", "uniform")]


def paired(row, base, evaluator, w="chosen"):
    """The difference of two rows' distances, seed by seed: mean and standard error."""
    both = [s for s in row if evaluator in row[s] and evaluator in base.get(s, {})]
    gaps = [row[s][evaluator][w] - base[s][evaluator][w] for s in both]
    if len(gaps) < 2:
        return "; ".join(f"{gap:+.2f}" for gap in gaps) or "-"
    return f"{statistics.mean(gaps):+.2f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}"


def baseline(rows, title):
    """What a row is compared with, {seed: ...}: the row `none` of the same length of fine-tuning and, like it,
    autoguided; for autoguided `none`, that without."""
    row, _, length, sampled = parts(title)
    words = ["none", length, "autoguided" if "autoguided" in sampled and row != "none" else ""]
    return rows.get(", ".join(word for word in words if word), {})


def points_of(rows, evaluator):
    """[(row, NMI, distance at the chosen w)], means over the seeds of a row; without labels NMI is 0. Distances are the
    mean difference from `none` of the same seed, plus the mean of `none`: seeds differ more than some rows do."""
    none = {s: r[evaluator]["chosen"] for s, r in rows["none"].items() if evaluator in r}
    out = []
    for name, row in rows.items():
        _, _, length, sampled = parts(name)
        scored = {s: r for s, r in row.items() if evaluator in r and s in none}
        if scored and not length and not sampled:         # these are questions of their own
            gap = statistics.mean(r[evaluator]["chosen"] - none[s] for s, r in scored.items())
            nmi = statistics.mean(r["nmi"] or 0 for r in scored.values())
            out.append((name, nmi, statistics.mean(none.values()) + gap))
    return out


def points_by_K(rows, K, evaluator):
    """[(row, K, distance at the chosen w)] of the rows whose labels were made with several K; K: the set's own."""
    points = [(*parts(name)[:2], distance) for name, _, distance in points_of(rows, evaluator)]
    points = [(row, int(k or K), distance) for row, k, distance in points]
    several = [row for row, count in Counter(row for row, _, _ in points).items() if count > 1]
    return [point for point in points if point[0] in several]


def correlations(which, rows, evaluator):
    """Print how the distances of rows go with what is known of their labels. Rows that differ only in where features
    are read, or how, are not independent: one row for each source counts them once, own labels nothing else. Rows of
    one K are those of the set's K, and ground truth."""
    distances = {name: y for name, _, y in points_of(rows, evaluator) if not name.startswith("none")}
    known = {"NMI": {name: nmi for name, nmi, _ in points_of(rows, evaluator)}}
    file = RESULTS / f"labels-{which}.json"
    about = json.loads(file.read_text())["rows"] if file.exists() else {}
    for key in ("balance", "told"):
        known[key] = {name: statistics.mean(r[key] for r in row.values()) for name, row in about.items()}
    one_K = [name for name in distances if not parts(name)[1]]
    kinds = {"all rows": list(distances), "rows of one K": one_K,
             "one row per source": [name for name in one_K if name not in VARIANTS],
             "own labels": [name for name in one_K if name in OWN],
             "rows with balance and told": [name for name in one_K if name in about]}
    if len(distances) > 2:
        print(f"| distance by {evaluator} and | of | rows | rank correlation | p |\n|", " | ".join(["---"] * 5), "|")
    for key, (kind, names) in itertools.product(known, kinds.items()):
        if len(names) > 2 and all(name in known[key] for name in names):
            rho, p = spearmanr([known[key][name] for name in names], [distances[name] for name in names])
            print(f"| {key} | {kind} | {len(names)} | {rho:.2f} | {p:.3f} |")


def panel(points, title, corner, axis, ticks, share):
    """SVG of one scatter plot with its upper left corner there. axis: what x is; share: x -> 0 ... 1 of the width.
    Points of one name are joined."""
    left, above = corner
    top = 1.05 * max(y for _, _, y in points)

    def at(x, y):
        across, down = share(x) * (WIDTH - 2 * EDGE), (1 - y / top) * (HEIGHT - 2 * EDGE)
        return left + EDGE + across, above + EDGE + down

    x0, y0, (x1, y1) = *at(ticks[0], 0), at(ticks[-1], top)
    out = [f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#000"/>',
           f'<text x="{x0}" y="{above + 20}" font-weight="bold">{title}</text>',
           f'<text x="{(x0 + x1) / 2 - 60}" y="{y0 + 38}">{axis}</text>']
    out += [f'<text x="{at(tick, 0)[0] - 8}" y="{y0 + 15}">{tick:g}</text>' for tick in ticks]
    out += [f'<text x="{x0 - 36}" y="{at(ticks[0], k / 5 * top)[1] + 4}">{k / 5 * top:.3g}</text>' for k in range(6)]
    for name in dict.fromkeys(name for name, _, _ in points):
        line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for n, x, y in sorted(points) if n == name)
        out.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[KINDS.get(name, "control")]}"/>')
    written = []                                          # places of names, which keep apart
    for name, x, y in sorted(points, key=lambda p: p[2]):                        # from the bottom to the top
        x, y = at(x, y)
        colour, low = COLOURS[KINDS.get(name.split(",")[0], "control")], y + 4
        while any(abs(x - x2) < 70 and abs(low - y2) < 12 for x2, y2 in written):
            low -= 1
        written.append((x, low))
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
                   f'<text x="{x + 8:.1f}" y="{low:.1f}" fill="{colour}">{name}</text>')
    return "\n".join(out)


def sinkhorn_table(name):
    """Print what results/sinkhorn.py measured, a row for each weight of the loss."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    scores = "linear", "knn", "nmi", "best_linear", "best_knn", "best_nmi", "judge", "pixels"
    print(f"\n## {name}\n\nMeans; in brackets the difference from weight 0 of the same seed, ± its standard error.\n")
    print("| weight | seeds | pull, last |", " | ".join(scores), "|")
    print("|", " | ".join(["---"] * (3 + len(scores))), "|")
    for weight, row in rows.items():
        pulls = [r["pull"][-1] or 0 for r in row.values()]
        cells = [weight, str(len(row)), spread(pulls)]
        for score in scores:
            digits = 2 if score in ("judge", "pixels") else 3
            gaps = [r[score] - rows["0"][s][score] for s, r in row.items() if s in rows["0"]]
            text = f"{statistics.mean(r[score] for r in row.values()):.{digits}f}"
            if len(gaps) > 1 and weight != "0":
                error = statistics.stdev(gaps) / len(gaps) ** 0.5
                text += f" ({statistics.mean(gaps):+.{digits}f} ± {error:.{digits}f})"
            cells.append(text)
        print("|", " | ".join(cells), "|")
    print("\nlinear probe, mean over times, by block and weight (mean over seeds)\n\n| block |", " | ".join(rows), "|")
    print("|", " | ".join(["---"] * (1 + len(rows))), "|")
    for block in next(iter(rows["0"].values()))["linear_by_block"]:
        values = [statistics.mean(r["linear_by_block"][block] for r in row.values()) for row in rows.values()]
        print(f"| {block} |", " | ".join(f"{v:.3f}" for v in values), "|")


def features_tables(name):
    """Print what results/features.py measured: every probe; the surface of blocks and times; kinds of activations."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    print(f"\n## {name}\n\n| what | of | seeds | scores | trained parameters | passes |")
    print("|", " | ".join(["---"] * 6), "|")
    for title, row in rows.items():
        for what in next(iter(row.values())).get("rows", {}):
            each = [r["rows"][what] for r in row.values()]
            scores = [k.removesuffix("_std") for k in each[0] if k.endswith("_std")]
            said = "; ".join(f"{k} {spread([r[k] for r in each], 3)}" for k in scores)
            print(f"| {title} | {what} | {len(each)} | {said} | {each[0]['parameters']:,} | {each[0]['passes']} |")

    surface, kinds, similar = (list(rows[job].values()) for job in ("surface", "select", "cka"))
    for score in ("nmi", "linear"):
        print(f"\n{score} of the best block by level and time, {len(surface)} seed(s)\n\n| level |",
              " | ".join(f"{t:g}" for t in surface[0]["times"]), "|")
        print("|", " | ".join(["---"] * (1 + len(surface[0]["times"]))), "|")
        for level in surface[0][score]:
            means = [statistics.mean(values) for values in zip(*(r[score][level] for r in surface))]
            print(f"| {level} |", " | ".join(f"{v:.3f}" for v in means), "|")

    for place, key in itertools.product(("levels", "kinds"), ("sensitivity", "granularity", "locality")):
        times = list(next(iter(kinds[0][place].values())))
        print(f"\n{key} by t\n\n| {place} |", " | ".join(times), "|\n|", " | ".join(["---"] * (1 + len(times))), "|")
        for name in kinds[0][place]:
            print(f"| {name} |", " | ".join(spread([r[place][name][t][key] for r in kinds]) for t in times), "|")

    print("\nCKA of neighbouring blocks, t = 0.9:", spread([r["neighbours"] for r in similar], 3))
    print("\n| block | with itself at t = 0.5 | with random weights |\n| --- | --- | --- |")
    for block in similar[0]["two_times"]:
        cells = [spread([r[k][block] for r in similar]) for k in ("two_times", "random_weights")]
        print(f"| {block} |", " | ".join(cells), "|")


def main():
    for which in sys.argv[1:]:
        if which.startswith("sinkhorn"):
            sinkhorn_table(which)
            continue
        if which.startswith("features"):
            features_tables(which)
            continue
        rows = json.loads((RESULTS / f"evidence-{which}.json").read_text())["rows"]
        entries = [item for row in rows.values() for r in row.values() for item in r.items()]
        evaluators = list(dict.fromkeys(k for k, v in entries if isinstance(v, dict) and "chosen" in v))
        print(f"\n## {which}\n\n| labels | seeds | NMI |", " | ".join(
            f"{e}, w = 1 | from none | {e}, chosen w | from none" for e in evaluators), "|")
        print("|", " | ".join(["---"] * (3 + 4 * len(evaluators))), "|")
        for name, row in rows.items():
            nmi = [r["nmi"] for r in row.values() if r["nmi"] is not None]
            cells = [name, str(len(row)), spread(nmi) if nmi else "-"]
            for e in evaluators:
                there = [r[e] for r in row.values() if e in r]
                for w in ("w1", "chosen"):
                    cells.append(spread([r[w] for r in there]) if there else "-")
                    cells.append("-" if baseline(rows, name) is row else paired(row, baseline(rows, name), e, w))
            print("|", " | ".join(cells), "|")
        panels, K = [], json.loads((RESULTS / f"evidence-{which}.json").read_text())["K"]
        for i, e in enumerate(evaluators):
            points = points_of(rows, e)
            print()
            correlations(which, rows, e)
            title, fifths = f"{which}: distance by {e}, chosen w", [k / 5 for k in range(6)]
            panels.append(panel(points, title, (i * WIDTH, 0), "NMI with the classes", fifths, lambda nmi: nmi))
            curves = points_by_K(rows, K, e)
            if curves:
                ticks = sorted({k for _, k, _ in curves})
                share = lambda k: math.log(k / ticks[0]) / math.log(ticks[-1] / ticks[0])
                panels.append(panel(curves, title, (i * WIDTH, HEIGHT), "K, clusters", ticks, share))
        high = HEIGHT * (2 if len(panels) > len(evaluators) else 1)
        size = f'width="{WIDTH * len(evaluators)}" height="{high}"'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        background = '<rect width="100%" height="100%" fill="#fff"/>'
        (RESULTS / f"evidence-{which}.svg").write_text("\n".join([svg, background, *panels, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()

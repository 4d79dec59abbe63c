"""AdamW against Muon at equal seconds: the same data, network, seeds and scores, on shapes, Fashion-MNIST and CIFAR-10.

    python results/optimizers.py SET RUN seeds=0,1,2 [data.root=DATA]            SET: shapes, fashion or cifar10-cpu

How many images each variant sees in the same seconds follows from the time of its training step, measured for all
variants in turn in one process. Every stage is the command that anybody would type; finished ones are not repeated.
Writes results/optimizers-SET.json.
"""
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
from configs.run import Model, autocast, fill             # noqa: E402
from rates import call                                    # noqa: E402
from train_diffusion import (PATHS, TrainDiffusion, build_model, build_optimizer,                # noqa: E402
                             loss_per_image)

ADAMW = dict(optimizer="adamw", warmup=5000, ema=20_000)
MUON = dict(optimizer="muon", warmup=1000, ema=20_000)
SETS = {                                                  # images of the first variant; rates: as it was, best, Muon
    "shapes": (20_000, 2e-3, 8e-3, 3e-3),
    "fashion": (24_000, 2e-3, 8e-3, 4e-3),
    "cifar10-cpu": (20_000, 1e-3, 8e-3, 3e-3),
}


def variants_of(which):
    """(images of the first, {name: keys of its training}).

    AdamW as configurations had it; in Muon's batches with the best of the rates that results/rates.py compared on
    held-out images; and Muon.
    """
    images, was, best, muon = SETS[which]
    return images, {"adamw": ADAMW | dict(batch=64, lr=was), "adamw, best rate": ADAMW | dict(batch=32, lr=best),
                    "muon": MUON | dict(batch=32, lr=muon)}


def speeds(config, variants, repeats=15):
    """Images a second of each variant's whole training step: median over `repeats` rounds in which all take turns."""
    size = config["data"].get("size", 32)
    context = autocast(SimpleNamespace(device=torch.device("cpu")), "auto")[0]   # as the training does
    times, steps = {name: [] for name in variants}, {}
    for name, keys in variants.items():
        cfg = fill("train_diffusion", TrainDiffusion, keys)
        net = build_model(fill("model", Model, config["model"]), size)
        opt, params = build_optimizer(cfg, net), list(net.parameters())

        def step(cfg=cfg, net=net, opt=opt, params=params):
            x, z = torch.randn(2, cfg.batch, 3, size, size)
            t = torch.rand(cfg.batch)
            with context():
                loss = loss_per_image(net, PATHS["cv"], "v", x, z, t)
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            opt.zero_grad()
        steps[name] = step
    for i in range(repeats + 2):
        for name, step in steps.items():
            tick = time.perf_counter()
            step()
            times[name] += [time.perf_counter() - tick] if i > 1 else []
    return {name: variants[name]["batch"] / statistics.median(v) for name, v in times.items()}


def measured(run, yaml_file, name, words):
    """Scores of diffusion/<name>: distances of 1,000 samples (10 midpoint steps) by two evaluators; features at the
    label-free place and at the best."""
    words = [yaml_file, *words, f"checkpoint=diffusion/{name}", f"name={name}", "overwrite=true"]
    call("sample_ode.py", *words, "n=1000", "solver=midpoint", "steps=10", "evaluator=judge,pixels")
    call("probe.py", *words, "t=0.5,0.8")
    m = json.loads((run / "samples" / name / "metrics.json").read_text())
    s, pixels = m["scores"], m["others"]["pixels"]["scores"]
    probe = json.loads((run / "probe" / f"{name}.json").read_text())
    chosen, table = probe["label_free"], probe["table"]
    here = next(r for r in table if (r["activation"], r["t"]) == (chosen["activation"], chosen["t"]))
    log = [json.loads(line) for line in (run / "diffusion" / name / "metrics.jsonl").read_text().splitlines()]
    out = dict(judge=s["frechet"], pixels=pixels["frechet"])
    out |= {k: s[k] for k in ("precision", "recall", "copies")}
    out |= {k: here[k] for k in ("nmi", "linear")} | {f"best_{k}": max(r[k] for r in table) for k in ("nmi", "linear")}
    seconds = sum(r["seconds"] for r in log)
    return out | dict(images=log[-1]["images"], seconds=round(seconds, 1), loss=log[-1]["loss"])


def main():
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    which, folder, *words = sys.argv[1:]
    run, yaml_file, (first, variants) = Path(folder).resolve(), f"configs/{which}.yaml", variants_of(which)
    seeds = next((w.split("=")[1].split(",") for w in words if w.startswith("seeds=")), ["0", "1", "2"])
    words = [f"run={run}", *(w for w in words if not w.startswith("seeds="))]
    torch.set_num_threads(1)
    out = ROOT / "results" / f"optimizers-{which}.json"
    kept = run / "speeds.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(speeds(yaml.safe_load((ROOT / yaml_file).read_text()), variants)))
    speed = json.loads(kept.read_text())
    base = speed[next(iter(variants))]
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    for seed, (name, share) in itertools.product(seeds, [*((name, 1.0) for name in variants), ("muon", 0.5)]):
        v = variants[name]
        images = round(first * share * speed[name] / base / v["batch"]) * v["batch"]
        label = name if share == 1 else f"{name}, half the time"
        if seed in rows.get(label, {}):
            print(f"{which} {label} {seed}: in {out.name} already")
            continue
        key = f"{label.replace(', ', '-').replace(' ', '-')}-s{seed}"
        keys = v | dict(images=images, seed=seed, log_every=images, save_every=images // 2, grid_every=images)
        call("train_diffusion.py", yaml_file, *words, f"name={key}", *(f"{k}={x}" for k, x in keys.items()))
        rows.setdefault(label, {})[seed] = row = measured(run, yaml_file, key, words)
        about = dict(set=which, variants=variants, images_per_second=speed, torch=torch.__version__)
        out.write_text(json.dumps(about | dict(rows=rows), indent=1))
        print(which, label, seed, {k: round(x, 4) for k, x in row.items()}, flush=True)
    for name in list(rows)[1:]:
        for score in ("judge", "pixels", "nmi", "linear"):
            ratios = [rows[name][s][score] / rows["adamw"][s][score] for s in rows["adamw"] if s in rows[name]]
            print(which, name, score, "/ adamw", [round(x, 3) for x in ratios])


if __name__ == "__main__":
    main()

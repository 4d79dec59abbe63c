"""Do maps of patch labels guide, or do they merely tell the image? The same fine-tuning under maps of several sources.

    python results/patch_maps.py SET RUN [seeds=0,1,2] [evaluators=judge,pixels] [data.root=DATA]

Goes on in a run of evidence.py: diffusion/base-<seed> and probe/sweep-<seed> must be there, and its row `none` is what
these are compared with. Maps are clusters of patches (method=segments), told beside the cluster of the image. own: of
the model's features at the label-free place; pixels: of the raw pixels of patches, on the same grid; random: own maps
of other images. rank: how many of the 2,000 images whose maps are sampled resemble a sample more (8 x 8 thumbnails)
than the one whose map it was given: 1,000 by chance, 0 where the map is the image. Writes
results/patch-maps-SET.json: one entry per row and seed.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evidence import ROOT, SETS, extract, keep, measured, options, stage, weights_of, write_json         # noqa: E402
from configs.data import file_of                          # noqa: E402
from configs.run import seed_of                           # noqa: E402
from sample_ode import thumbnail                          # noqa: E402

ROWS = {                                                  # keys of self_label.py; s: seed
    "own": "method=segments features=dense-{s}",
    "pixels": "method=segments features=patches-{s}",
    "random": "method=random reference=maps-own-{s}",     # needs the first
}


def pixel_patches(run, s):
    """features/patches-<s>: the pixels of patches, on the grid of features/dense-<s>."""
    like, folder = run / "features" / f"dense-{s}", run / "features" / f"patches-{s}"
    folder.mkdir(exist_ok=True)
    info = json.loads((like / "info.json").read_text())
    h, w = info["shapes"][0][1:]
    for split in info["data"]:
        images = np.load(run / "data" / split / "images.npy", mmap_mode="r")
        n, c, H, W = images.shape
        patches = np.reshape(images, (n, c, h, H // h, w, W // w)).transpose(0, 1, 3, 5, 2, 4)  # [n, c, dy, dx, h, w]
        np.save(folder / file_of(split, "pixels", 1), np.float16(patches.reshape(n, -1, h, w) / 255))
    known = {k: info[k] for k in ("data", "pool", "draws", "seed", "checkpoint")}
    about = dict(hash="pixels", dtype="float16", arrays=[dict(activation="pixels", t=1.0)])
    write_json(folder / "info.json", known | about)


def ranks(run, name, s):
    """Of each sample, how many images of the bank resemble it more than the one whose map it was given."""
    images = np.load(run / "data/train/images.npy", mmap_mode="r")
    bank = np.random.default_rng(seed_of(s, "bank")).permutation(len(images))[:2000]            # see Condition.bank
    known = thumbnail(torch.from_numpy(images[bank]))     # [2000, 192]
    fake = thumbnail(torch.from_numpy(np.load(run / "samples" / name / "images.npy")))           # [n, 192]
    given = torch.from_numpy(np.load(run / "samples" / name / "labels.npy"))
    distance = torch.cdist(fake, known)
    return (distance < distance.gather(1, given[:, None])).sum(1)


def main():
    which, folder, *words = sys.argv[1:]
    asked, words = options(words, ("seeds", "evaluators"))
    run, out = Path(folder).resolve(), ROOT / "results" / f"patch-maps-{which}.json"
    words, evaluators = [f"run={run}", *words], asked.get("evaluators", "judge,pixels")
    for s in asked.get("seeds", "0,1,2").split(","):
        place, base = json.loads((run / f"probe/sweep-{s}.json").read_text())["label_free"], f"diffusion/base-{s}"
        extract(which, f"dense-{s}", base, place, s, [*words, "pool=none", "dtype=float16"])
        pixel_patches(run, s)
        for row, keys in ROWS.items():
            name = f"maps-{row}-{s}"
            mine = [*words, f"name={name}", f"seed={s}"]
            stage("self_label", which, *mine, f"K={SETS[which]['K']}", *keys.format(s=s).split())
            stage("train_guided", which, *mine, f"labels={name}", "condition=mask", f"init={base}", "ema_ramp=0.25",
                  f"images={SETS[which]['tune']}")
            stage("sample_ode", which, *mine, f"checkpoint=guided/{name}", "n=1000", "solver=midpoint", "steps=8",
                  f"evaluator={evaluators}", "guidance=1,1.5,2,3", "select=500")
            rank = ranks(run, name, int(s))
            told = dict(median_rank=float(rank.median()), nearest=float((rank == 0).float().mean()))
            about = dict(base_weights=weights_of(run, base)) | measured(run, name, place, evaluators)
            keep(out, dict(set=which, **SETS[which]), row, s, about | told)


if __name__ == "__main__":
    main()

"""What tells the classes of `shapes` without a network, with random weights and after training; what shows its objects.

    python results/shapes_controls.py configs/shapes.yaml run=RUN K=20 > controls.json

After train_diffusion.py and probe.py of that run. Clusters: k-means (K = 20) of 4,000 training images, NMI with the
classes; of controls the better of normalised and plain rows, of networks the best block and time of the sweep. Boxes:
400 test images with one object, share whose box overlaps the true one by half, and mean IoU of masks; the places of
features are named by hand, those of the label-free choice are `probe.py protocol=boxes`.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.data import load_data                        # noqa: E402
from configs.run import autocast, start                   # noqa: E402
from configs.shapes import draw_shapes                    # noqa: E402
from extract_features import matching, stream                       # noqa: E402
from probe import Probe, Source, random_network           # noqa: E402
from self_label import (assign, bounds, find_objects, iou, kmeans,               # noqa: E402
                        largest_component, nmi)
from train_diffusion import load_model                    # noqa: E402

PLACES = [("up-level2-repeat0-res-out", 0.85), *(("unet-in", t) for t in (0.5, 0.7, 0.9, 1.0))]


def agreement(x, classes, K, metric="cosine"):
    """NMI with the classes of k-means of the centred rows x [N, D]."""
    x = torch.as_tensor(x).float()
    x = x - x.mean(0)
    return nmi(assign(x, kmeans(x, K, metric=metric, restarts=3)[0], metric).numpy(), classes)


def without_network(images, classes, K):
    """NMI of six colour numbers, of all pixels and of 8x8 averages."""
    x = images.astype(np.float32) / 255
    colours = np.concatenate([x.mean((2, 3)), x.std((2, 3))], 1)
    told = {"colour statistics": (colours - colours.mean(0)) / colours.std(0), "pixels": x.reshape(len(x), -1),
            "pixels, 8x8": F.avg_pool2d(torch.from_numpy(x), 4).flatten(1)}
    return {name: max(agreement(v, classes, K, metric) for metric in ("cosine", "euclidean")) for name,
            v in told.items()}


def otsu(images):
    """Masks of the smaller side of the brightness that splits each image best."""
    masks = []
    for grey in images.mean(1):
        p = np.histogram(grey, 64, (0, 256))[0] / grey.size
        w, mu = p.cumsum(), (p * np.arange(64)).cumsum()
        side = grey >= 4 * (((mu[-1] * w - mu) ** 2 / np.maximum(w * (1 - w), 1e-9)).argmax() + 1)
        masks.append(side if side.mean() < 0.5 else ~side)
    return np.array(masks)


def found(masks, boxes, truth, true_boxes):
    truth = truth > 0
    return dict(corloc=float((iou(np.asarray(boxes), true_boxes) >= 0.5).mean()),
                mask_iou=float(((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).mean()))


def main():
    run = start("probe", Probe, __doc__)
    net, state = load_model(run, "diffusion/base")
    options = dict(device=run.device, context=autocast(run, "fp32")[0])
    data, K = load_data(run, "train"), run.cfg.K
    images, classes = np.asarray(data.images[:4000]), np.asarray(data.classes[:4000])
    out = dict(seed=run.cfg.seed, seen=state["seen"], K=K, clusters=without_network(images, classes, K))
    trained = Source(net, state, matching(net, ["blocks"]), run.cfg.t, seed=run.cfg.seed, **options)
    for name, network in (("random weights", random_network(trained)), ("trained", net)):
        v = replace(trained, net=network).vectors(images, np.arange(4000), "controls")
        scores = {key: agreement(x, classes, K) for key, x in v.items()}
        best = max(scores, key=scores.get)
        out["clusters"][f"{name}, best place"] = dict(nmi=scores[best], place=best)
        if network is net:
            chosen = json.loads((run.dir / "probe/sweep.json").read_text())["label_free"]
            place = chosen["activation"], chosen["t"]
            out["clusters"]["trained, label-free place"] = dict(nmi=scores[place], place=place)

    images, _, boxes, masks = draw_shapes(97, np.arange(400), two=0)
    side = otsu(images)
    largest = largest_component(torch.from_numpy(side).flatten(1), (32, 32)).unflatten(1, (32, 32))
    out["boxes"] = {"Otsu's threshold, smaller side": found(side, bounds(largest).numpy(), masks, boxes)}
    for name, t in PLACES:
        parts = []
        how = dict(pool="none", purpose="controls", **options)
        for rows, got in stream(net, state, images, np.arange(400), [name], [t], **how):
            x, shown = got[name, t], torch.as_tensor(images[rows])
            r = find_objects(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]), (32, 32), images=shown)
            parts.append((r["masks"].numpy() > 0, r["boxes"][:, 0].numpy()))
        out["boxes"][f"lost, {name}, t={t}"] = found(*(np.concatenate(p) for p in zip(*parts)), masks, boxes)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()

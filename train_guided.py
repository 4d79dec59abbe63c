"""Train with guidance: images and self-labels in, a model with classifier-free guidance out.

Reads   data/train, labels/<labels>.npz (self_label.py) and, with init=diffusion/base, the weights of train_diffusion.py
Writes  guided/<name>/: as train_diffusion.py, plus labels.npz (what the model was conditioned on)
Time    t = 0 is noise, t = 1 is data.   Null label = K, the number of labels in the file; nobody types a class count.

    python train_guided.py configs/shapes.yaml labels=kmeans                     # CPU, about a minute
    python train_guided.py configs/cifar10.yaml labels=kmeans init=              # one GPU, from scratch
    torchrun --nproc_per_node=8 train_guided.py configs/cifar10.yaml labels=kmeans
    python train_guided.py configs/shapes.yaml labels=none name=unconditional    # the same training without labels: the base line

The loss is that of train_diffusion.py with a condition: each image's label, replaced by the null label with probability `drop`, sample by
sample (arXiv 2207.12598). One network thereby learns v(x_t, t, label) and v(x_t, t, null); sample_ode.py mixes the two.
"""
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from self_label import load_labels
from train_diffusion import (Model, Training, UserError, atomic, build_model, check_training, cli, digest, fill, fit, load_checkpoint, load_data, start)


@dataclass
class TrainGuided(Training):
    """Section `train_guided`."""
    name: str = ""                                        # results go to guided/<name>; empty = the name of the label file
    labels: str = "kmeans"                                # labels/<labels>.npz; none = train without labels, as a control
    drop: float = 0.1                                     # probability of the null label, decided per image
    init: str = "diffusion/base"                          # start from these averaged weights; empty = from scratch


def load_pretrained(net, state):
    """Copy weights into a network that additionally has conditions. With the null condition it starts as it was (the U-ViT nearly so: one more token takes part).

    net: freshly built; state: the averaged weights of an unconditional model of the same architecture. UserError if they do not fit.
    The rows of the labels keep their random values, of unit variance as in a network trained from scratch: from rows near zero, which
    Adam moves by no more than lr per update, short fine-tuning learns hardly any label.
    """
    own = net.state_dict()
    if "pos_embed" in own and "pos_embed" in state and own["pos_embed"].shape[1] == state["pos_embed"].shape[1] + 1:
        state = state | {"pos_embed": torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], 1)}    # U-ViT's condition token comes first
    added = {k for k in own if k.split(".")[0] in ("label_emb", "vector_emb", "layout_embed")}
    missing, extra = set(own) - set(state) - added, set(state) - set(own)
    bad = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or bad:
        raise UserError(f"init: the checkpoint is of another architecture (first difference: {sorted(missing | extra | set(bad))[0]})")
    net.load_state_dict({k: (v if k == "label_emb.weight" else torch.zeros_like(v)) if k in added else state[k] for k, v in own.items()})
    if "label_emb.weight" in added:
        with torch.no_grad():
            net.label_emb.weight[-1] = 0                  # the null label


def label_condition(labels, K, drop, device):
    """(rows [b], uniform [b]) -> dict(label [b]): the images' labels, each replaced by the null label K with probability `drop`."""
    table = torch.from_numpy(np.ascontiguousarray(labels)).to(device)            # int64 [N]

    def condition(rows, u):
        return dict(label=torch.where(u < drop, K, table[rows]))
    return condition


def main():
    """Train with guidance, from the command line."""
    run = start("train_guided", TrainGuided, __doc__)
    cfg = run.cfg
    check_training(run, cfg)
    if not 0 <= cfg.drop <= 1:
        raise UserError(f"drop={cfg.drop}: must be between 0 and 1")
    guided = cfg.labels != "none"
    cfg.name = run.sections[run.stage]["name"] = cfg.name or (cfg.labels if guided else "unconditional")
    folder, data = run.dir / "guided" / cfg.name, load_data(run, "train")

    # labels: one id per training image, checked against the data
    labels, K, marginal, info, condition = None, 0, None, {}, None
    if guided:
        labels, info = load_labels(run, cfg.labels)
        K = info["num_labels"]
        marginal = torch.from_numpy(np.bincount(labels["train"], minlength=K) / len(labels["train"]))   # float64 [K]
        condition = label_condition(labels["train"], K, cfg.drop, run.device)

    # network: from scratch, or from unconditional weights
    net, init = build_model(run.model, run.data.size, num_labels=K, seed=cfg.seed), None
    if cfg.init:
        source = load_checkpoint(run, cfg.init)
        if fill("model", Model, source["model"]) != run.model:
            raise UserError(f"init={cfg.init}: its model section differs from the configured one ({source['file']})")
        load_pretrained(net, source["ema"])
        init = dict(checkpoint=cfg.init, weights=source["weights"], seen=source["seen"])
        for key in ("path", "predict"):
            if source[key] != getattr(cfg, key):
                raise UserError(f"{key}={getattr(cfg, key)}: the initial weights of {source['file']} were trained with {key}={source[key]}; set train_guided.{key} or init=")
    if run.dry_run:
        run.say(f"parameters {sum(p.numel() for p in net.parameters()):,}; K = {K}; {math.ceil(cfg.images / cfg.batch):,} updates of {cfg.batch} images; "
                f"each checkpoint {16 * sum(p.numel() for p in net.parameters()) / 1e6:.0f} MB in {folder}")
        return

    # train; the checkpoint carries all that sampling needs: K, the marginal, and the hash of the labels
    shown = np.unique(np.linspace(0, K - 1, min(K, 12)).round().astype(int)) if guided else []
    grid = dict(label=torch.tensor(np.repeat(shown, 10)).to(run.device)) if guided else None
    state = dict(kind="guided", model=dataclasses.asdict(run.model), size=run.data.size, channels=3, conditions=dict(num_labels=K) if guided else {},
                 num_labels=K, path=cfg.path, predict=cfg.predict, data=data.info["fingerprint"], init=init,
                 labels=digest(labels["train"]) if guided else None, label_file=cfg.labels, label_scores=info.get("scores", {}), marginal=marginal,
                 config={k: run.sections[k] for k in ("data", "model", run.stage)})
    if guided and run.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    fit(run, cfg, net.to(run.device), folder, data, state, condition, grid, columns=10 if guided else 8)
    if guided and run.rank == 0:
        with atomic(folder / "labels.npz") as f:
            np.savez(f, **labels)

    # close
    run.say(f"model in {folder}, sample grids{' (one row per label)' if guided else ''} in {folder / 'samples'}")
    run.next(f"sample_ode.py checkpoint=guided/{cfg.name} name={cfg.name}" + (" guidance=1,1.5,2,3" if guided else ""))


if __name__ == "__main__":
    cli(main)

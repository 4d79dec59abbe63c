"""Train with guidance: images and self-labels in, a model with classifier-free guidance out. Labels come from a file, or are found on the way.

Reads   data/train, labels/<labels>.npz (self_label.py) and, with init=diffusion/base, the weights of train_diffusion.py
Writes  guided/<name>/: checkpoint, log and sample grids as train_diffusion.py, plus labels.npz (what the model was conditioned on);
        labels=online also labels/<name>.npz with scores and contact sheet
Time    t = 0 is noise, t = 1 is data.   Null label = K, the number of labels; nobody types a class count of the data.

    python train_guided.py configs/shapes.yaml labels=kmeans                     # CPU, about a minute
    python train_guided.py configs/cifar10.yaml labels=kmeans init=              # one GPU, from scratch
    torchrun --nproc_per_node=8 train_guided.py configs/cifar10.yaml labels=online
    python train_guided.py configs/shapes.yaml labels=none                       # the same training without labels, into guided/unconditional: the base line

The loss is that of train_diffusion.py with a condition: each image's label, replaced by the null label with probability `drop`, sample by
sample (arXiv 2207.12598). One network thereby learns v(x_t, t, label) and v(x_t, t, null); sample_ode.py mixes the two.

labels=online (arXiv 2312.08825): a head on the network's own features scores every image against K prototypes, Sinkhorn-Knopp turns the
scores of the averaged network into balanced targets, and from `switch` on the label found for an image is its condition. From `sk_until` on, images keep theirs.
"""
import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from configs.data import input_shape, load_data, load_labels, row_shape
from configs.run import (ALONE, Model, Processes, UserError, atomic, autocast, cli, digest, fill, gpu_flags, key,
                         read_json, require, save_grid, seed_of, seeded, start, wide)
from train_diffusion import (PATHS, PUBLISHED, Training, announce, build_model, check_training, cost, diffuse, fit,
                             footprint, load_checkpoint, missing, placed, save_checkpoint)
from extract_features import cost_shares, matching, reader, stream
from self_label import in_blocks, nmi, potentials, save_labels, score_labels, sinkhorn, size_entropy


@dataclass
class TrainGuided(Training):
    """Section `train_guided`."""
    name: str = key("", "results go to guided/<name>; empty = the name of the labels (`unconditional` for none)")
    labels: str = key("kmeans", "labels/<labels>.npz; none = train without labels, as a control; online = find them")
    drop: float = key(0.1, "probability of the null label, decided per image")
    init: str = key("diffusion/base",
                    "start from these averaged weights, or from published ones (adm:, ddpm:, uvit:, sgfm:FILE); empty"
                    " = from scratch")
    # labels=online: what is found, and how
    K: int = key(50, "online: prototypes")
    condition: Literal["label", "box", "mask", "set", "prototype", "patch", "none"] = key("label",
        "what the network is told of an image: label id; with the file's boxes or masks beside it; set = the clusters"
        " of all boxes of an image (labels made with objects=2 or more); online also: prototype vector, map of patch "
        "labels, none = Sinkhorn loss without guidance")
    switch: int = key(20_000,
                      "online: images seen before conditions begin; until then every image has the null condition")
    assign: Literal["sinkhorn", "argmax"] = key("sinkhorn",
                                                "online: balanced with batch and queue, or nearest prototype")
    sk_activation: str = key("mid*-out", "online: the feature's name; of several that match the last one")
    sk_t: float = key(0.85, "online: time at which the averaged network looks at an image")
    sk_window: list[float] = key([0.8, 0.9], "online: times at which the trained network must predict the target")
    sk_weight: float = key(1.0, "online: weight of the Sinkhorn loss")
    sk_grad: Literal["head", "backbone"] = key("head", "online: how far its gradient reaches")
    sk_ramp: int = key(20_000, "online: images over which the weight rises")
    sk_freeze: int = key(5_000, "online: images before prototypes move")
    sk_until: int = key(0,
                        "online: images after which every training image keeps its label; 0 = labels move to the end")
    sk_share: float = key(0.25, "online: share of each batch that takes part in the Sinkhorn loss")
    sk_queue: int = key(1_024, "online: earlier features that help to balance; 0 = the batch alone")
    sk_eps: float = key(0.05, "online: entropic regularisation of the targets")
    sk_iterations: int = key(3, "online: Sinkhorn iterations")
    sk_temperature: float = key(0.1, "online: of the prediction")
    sk_dim: int = key(64, "online: width of head output and prototypes")
    sk_hidden: int = key(256, "online: hidden width of the head")
    sk_augment: float = key(0.0,
                            "online: > 0: crop, flip and colour of the predicting view, up to this strength (1 = "
                            "strong)")
    sk_patches: int = key(16, "online, condition=patch: patches per image in the Sinkhorn loss")


def load_pretrained(net, state):
    """Copy weights into a network that additionally has conditions. With the null condition it starts as it was (the U-ViT nearly so: one more token takes part).

    net: freshly built; state: the averaged weights of an unconditional model of the same architecture. UserError if they do not fit.
    What conditions added and the checkpoint lacks keeps its random values; label rows have unit variance, as in a network trained from scratch: from rows near zero,
    which Adam moves by no more than lr per update, short fine-tuning learns hardly any label. Null vectors and layouts are zeros, so they add nothing.
    """
    own, state = net.state_dict(), dict(state)
    if "pos_embed" in own and "pos_embed" in state and own["pos_embed"].shape[1] == state["pos_embed"].shape[1] + 1:
        state["pos_embed"] = torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], 1)    # U-ViT's condition token comes first
    first = "input_blocks.0.0.weight"                     # U-Net: a layout brings more input channels, behind those of the image
    if first in own and first in state and own[first].shape[1] > state[first].shape[1]:
        state[first] = torch.cat([state[first], own[first][:, state[first].shape[1]:]], 1)
    added = {k for k in own if k.split(".")[0] in ("label_emb", "vector_emb", "layout_embed") and k not in state}
    missing, extra = set(own) - set(state) - added, set(state) - set(own)
    bad = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or bad:
        raise UserError(f"init: the checkpoint is of another architecture (first difference: {sorted(missing | extra | set(bad))[0]})")
    net.load_state_dict({k: v if k in added else state[k] for k, v in own.items()})
    if "label_emb.weight" in added:
        with torch.no_grad():
            net.label_emb.weight[-1] = 0                  # the null label


def label_condition(labels, K, drop, device):
    """(rows [b], uniforms [b, 3]) -> dict(label [b]): the images' labels, each replaced by the null label K with probability `drop`."""
    table = torch.from_numpy(np.ascontiguousarray(labels)).to(device)            # int64 [N]

    def condition(rows, u):
        return dict(label=torch.where(u[:, 2] < drop, K, table[rows]))
    return condition


def layout_condition(labels, maps, K, kinds, cfg, device):
    """As `label_condition`, with each image's map beside its label: dict(label [b], layout [b, kinds, H, W]), mirrored with the image, dropped together.

    maps: uint8 [N, H, W], ids 0 ... kinds - 1 (of masks 0 = no object, a channel of its own), kinds = no condition there.
    """
    table = torch.from_numpy(np.ascontiguousarray(labels)).to(device)
    resident = torch.from_numpy(np.array(maps, order="C")).to(device) if torch.device(device).type == "cuda" and maps.nbytes < 2e9 else None

    def condition(rows, u):
        ids = (torch.from_numpy(maps[rows.cpu().numpy()]).to(device) if resident is None else resident[rows]).long()
        drop = u[:, 2] < cfg.drop
        if cfg.flip:
            ids = torch.where((u[:, 1] < 0.5)[:, None, None], ids.flip(-1), ids)
        ids = torch.where(drop[:, None, None], kinds, ids)
        return dict(label=torch.where(drop, K, table[rows]), layout=layout_of(ids, kinds, ids.shape[1:]))
    return condition


def set_condition(sets, drop, device):
    """As `label_condition` for several labels per image, dict(vector [b, K]): ones at the image's labels, so that their embeddings add up; zeros when dropped.

    sets: bool [N, K].
    """
    table = torch.from_numpy(sets).to(device)

    def condition(rows, u):
        return dict(vector=(table[rows] & (u[:, 2] >= drop)[:, None]).float())
    return condition


def label_sets(labels, K, name):
    """The clusters of each training image's boxes as bool [N, K], from a label file's ids_train [N, objects] (-1 = none)."""
    if "ids_train" not in labels:
        raise UserError(f"condition=set: labels/{name}.npz has no ids_train, several labels per image; "
                        "make them with self_label.py objects=2 and method=lost, ncut or masks")
    ids = np.asarray(labels["ids_train"])
    if len(ids) != len(labels["train"]) or ids.max() >= K:
        raise UserError(f"labels/{name}.npz: ids_train must have {len(labels['train'])} rows of ids below {K}; make the labels again")
    sets = np.zeros((len(ids), K + 1), bool)
    sets[np.arange(len(ids))[:, None], np.where(ids < 0, K, ids)] = True
    return sets[:, :K]


def draw_boxes(boxes, size):
    """Boxes float [N, objects, 4] (x0 y0 x1 y1 in pixels, negative = none) -> maps uint8 [N, size, size]: 0 inside a box, 1 outside."""
    at = np.arange(size) + 0.5                            # pixel centres
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes, np.float32), -1, 0)[..., None]                                # [N, objects, 1] each
    inside = ((at >= y0) & (at < y1))[..., :, None] & ((at >= x0) & (at < x1))[..., None, :]                     # [N, objects, H, W]
    return 1 - inside.any(1).astype(np.uint8)


def layout_maps(run, cfg, labels, info, split, kinds=0):
    """(maps uint8 [N, H, W], number of ids) of the label file's boxes or masks; of method=classes, which has none, the ground truth's, where 255 is void.

    kinds: the number of ids, where a model was trained with one; 0 = as many as there are.
    """
    data, kind, truth = load_data(run, split), {"box": "boxes", "mask": "masks"}[cfg.condition], info.get("recipe", {}).get("method") == "classes"
    there = labels.get(f"{kind}_{split}", getattr(data, kind) if truth else None)
    if there is None or len(there) != len(data):
        raise UserError(f"condition={cfg.condition}: labels/{cfg.labels}.npz has no {kind} of the {len(data)} {split} images; make them with self_label.py")
    size = data.images.shape[2]
    if cfg.condition == "box":
        return np.concatenate([draw_boxes(b.reshape(len(b), -1, 4), size) for b in np.array_split(np.asarray(there), math.ceil(len(there) / 4096))]), 1
    there = np.asarray(there).astype(np.uint8)
    if there.shape[1] != there.shape[2] or size % there.shape[1]:
        raise UserError(f"labels/{cfg.labels}.npz: masks of {there.shape[1]} x {there.shape[2]} positions do not divide images of {size}")
    there = there.repeat(size // there.shape[1], 1).repeat(size // there.shape[2], 2)
    void = there == 255 if truth else np.zeros(there.shape, bool)
    kinds = kinds or max(int(there[~void].max(initial=0)) + 1, 2)
    there[void | (there >= kinds)] = kinds                # void, or an id that no training image has: no condition there
    return there, kinds


# ---------------------------------------------------------------------------------------------------------------------
# Online labels: head and prototypes beside the network

def augment(x, u, strength, flip):
    """A second view of images x [B, C, H, W]: random crop, perhaps a flip, gain per channel, brightness, contrast; u: uniforms [B, 8] (brightness takes two that others use)."""
    side, s = 1 - 0.6 * strength * u[:, 0], strength
    mirror = torch.where(u[:, 1] < 0.5, -1.0, 1.0) if flip else torch.ones_like(side)
    zero = torch.zeros_like(side)
    theta = torch.stack([side * mirror, zero, (2 * u[:, 2] - 1) * (1 - side), zero, side, (2 * u[:, 3] - 1) * (1 - side)], 1).reshape(-1, 2, 3)
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * wide(1 + s * (u[:, 4] - 0.5)) * (1 + 0.5 * s * (u[:, 5:8, None, None] - 0.5))[:, :x.shape[1]]
    return (x + wide(0.5 * s * (u[:, 4] + u[:, 0] - 1))).clamp(-1, 1)


class Labeller(nn.Module):
    """Finds K labels in a network's features while both train (arXiv 2312.08825), by Sinkhorn-Knopp over the batches of all processes.

    Teacher: the averaged network and the averaged labeller, an image at time sk_t, the null condition. Its scores h_i . c_k, balanced by
    Sinkhorn-Knopp, are the targets q. Student: the trained network on other noise, at a time in sk_window, with the null condition.

        loss = - mean_i sum_k q_ik log softmax_k(h_i . c_k / temperature)

    Features are standardised by running statistics (activations share a large common direction, beside which images hardly differ), and
    pass an MLP without batch statistics of its own; outputs h and prototypes c have unit length.
    """
    uniforms, noises, WATCHED = 9, 2, 2048                # numbers per image that `step` needs, and images whose labels the log follows

    def __init__(self, cfg, net, name, size, world=1, rank=0, channels=3):
        super().__init__()
        self.cfg, self.name, self.world, self.rank, self.path = cfg, name, world, rank, PATHS[cfg.path]
        self.pool = "none" if cfg.condition == "patch" else "mean"
        p = next(net.parameters())
        with torch.no_grad():                             # the feature's width, by looking
            width = reader(net, [name], "none")(torch.zeros(1, channels, size, size, device=p.device), torch.ones(1, device=p.device))[0].shape[1]
        with seeded(cfg.seed, "labeller"):
            self.head = nn.Sequential(nn.Linear(width, cfg.sk_hidden), nn.SiLU(), nn.Linear(cfg.sk_hidden, cfg.sk_dim))
            self.prototypes = nn.Parameter(F.normalize(torch.randn(cfg.K, cfg.sk_dim), dim=1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("queue", torch.zeros(cfg.sk_queue, cfg.sk_dim))     # embeddings of earlier images, the same on every process
        self.register_buffer("watched", torch.full((self.WATCHED,), -1))         # labels of the watched images at the last log line
        self.to(p.device)
        self.sums, self.images, self.classes = torch.zeros(3, dtype=torch.float64, device=p.device), None, None
        self.rows, self.inputs, self.settled = None, None, None    # all training images; their labels int16 [N, patches], once they stay
        self.prices = None                                # of the labels, once training is finished
        self.readers = {}                                 # network -> function that reads its feature

    @property
    def ranks(self):
        """The processes whose images are balanced together."""
        out = Processes()
        out.rank, out.world = self.rank, self.world
        return out

    def get_extra_state(self):
        """What a checkpoint holds besides parameters and buffers: the settled labels."""
        return self.settled

    def set_extra_state(self, settled):
        """The inverse of get_extra_state."""
        self.settled = None if settled is None else settled.to(self.mean.device)

    def watch(self, data):
        """Find labels in these training images, follow some of them, and use their classes as a monitor."""
        self.inputs = data.inputs
        rows = np.unique(np.linspace(0, len(data.inputs) - 1, min(self.WATCHED, len(data.inputs))).astype(int))
        self.rows, self.images, classes = torch.from_numpy(rows), np.asarray(data.inputs[rows]), np.asarray(data.classes[rows])
        self.classes = classes if (classes >= 0).all() else None

    def look(self, net, x, z, t):
        """The feature of images x [B, C, H, W] under noises z at times t [B]; without gradients at most `micro` images at once, as in training."""
        read = self.readers[net] = self.readers.get(net) or reader(net, [self.name], self.pool, self.cfg.compile)
        micro = len(x) if torch.is_grad_enabled() else self.cfg.micro or len(x)
        parts = zip(*(v.split(micro) for v in (diffuse(self.path, x, z, t), t)))
        return torch.cat([read(x_t, s)[0] for x_t, s in parts])

    def embed(self, f):
        """Feature rows [n, D] -> unit vectors float32 [n, d]."""
        return F.normalize(self.head((f - self.mean) / (self.var + 1e-6).sqrt()), dim=1)

    def scores(self, h):
        """Cosines with the prototypes, [B, K]."""
        return h @ F.normalize(self.prototypes, dim=1).T

    @torch.no_grad()
    def learn_statistics(self, f, updates):
        """Running mean and variance of the teacher's feature rows [n, D] over all processes, over about as many as the queue holds."""
        n = len(f) * self.world
        mean, square = self.ranks.total(torch.stack([f.sum(0), f.square().sum(0)]).double()) / n
        share = max(n / max(self.cfg.sk_queue, 4 * n), 1 / (updates + 1))
        self.mean.lerp_(mean.float(), share)
        self.var.lerp_((square - mean.square()).clamp(min=0).float(), share)

    @torch.no_grad()
    def targets(self, scores, past):
        """Balanced targets q [B, K] of this rank's rows. scores: the teacher's, [B, K]; past: those of the queue [Q, K], equal on all ranks."""
        share = past[self.rank::self.world]               # every rank contributes a part of the queue once
        return sinkhorn(torch.cat([scores, share]), self.cfg.sk_eps, self.cfg.sk_iterations, self.ranks)[:len(scores)]

    @torch.no_grad()
    def labels(self, scores, past):
        """Labels int64 [B] from the teacher's scores."""
        if self.cfg.assign == "argmax":
            return scores.argmax(1)
        every = torch.cat([scores, past[self.rank::self.world]])
        return (scores / self.cfg.sk_eps - potentials(in_blocks(every), self.cfg.sk_eps, self.cfg.sk_iterations, self.ranks)).argmax(1)

    def remember(self, h, updates):
        """Put the embeddings [n, d] of all processes into the queue, in order of image number."""
        if not len(self.queue):
            return
        if self.world > 1:
            every = h.new_empty(self.world * len(h), h.shape[1])
            dist.all_gather_into_tensor(every, h.contiguous())
            h = every
        h = h[-len(self.queue):]
        self.queue[(updates * len(h) + torch.arange(len(h), device=h.device)) % len(self.queue)] = h

    def settle(self, ema, teacher, context):
        """Give every training image the label that it keeps: by the averaged network and labeller as they are now, under one draw of noise."""
        n = len(self.inputs)
        rows = np.arange(n * self.rank // self.world, n * (self.rank + 1) // self.world)
        ids = label_images(ema, teacher, self.inputs, rows, context, "settle", self.ranks)[0]
        self.settled = torch.from_numpy(np.concatenate(self.ranks.gather(ids.numpy().astype(np.int16)))).to(self.mean.device)

    def step(self, net, ema, teacher, index, x, z, u, seen, context):
        """(weighted Sinkhorn loss to be differentiated, condition of the batch). index: [b], the images' rows; x: [b, C, H, W]; z: [b, 2, C, H, W]; u: [b, 12].

        Which images take part depends on their running number alone, so any number of processes sees the same global batch. From `sk_until` on
        the labels are those that `settle` found; then nobody needs to look at the images any more, and the head learns to tell these labels.
        """
        cfg, b, updates, guided = self.cfg, len(x), seen // self.cfg.batch, self.cfg.condition != "none" and seen >= self.cfg.switch
        part = torch.arange(0, b, max(1, round(1 / cfg.sk_share)), device=x.device)          # the same images for any number of processes
        if 0 < cfg.sk_until <= seen:
            if self.settled is None:
                self.settle(ema, teacher, context)
            ids = self.settled[index.to(x.device)].long()    # [b, patches]
            if cfg.flip and self.pool == "none":                                 # maps are mirrored with their images
                side = math.isqrt(ids.shape[1])
                ids = torch.where(u[:, 1:2] < 0.5, ids.reshape(b, side, side).flip(2).flatten(1), ids)
            keep = self.kept(ids.shape[1], updates, x.device)
            q = F.one_hot(ids[part][:, keep].flatten(), cfg.K).float()           # [n, K]
        else:
            with torch.no_grad(), context():              # the teacher: no condition, so labels never explain themselves
                look = slice(None) if guided else part
                t = torch.full_like(u[look, 0], cfg.sk_t)
                f = self.look(ema, x[look], z[look, 0], t)
            patches = f[0, 0].numel()                     # 1 for averaged features
            keep, f = self.kept(patches, updates, x.device), rows_of_map(f)
            place = torch.arange(len(f), device=x.device).reshape(-1, patches)   # row of f by image and patch
            rows = (place[part] if guided else place)[:, keep].flatten()         # those in the loss
            self.learn_statistics(f[rows], updates)
            with torch.no_grad():
                teacher.mean.copy_(self.mean), teacher.var.copy_(self.var)
                h = teacher.embed(f)                      # [b or n, d], or one row per patch
                scores, past = teacher.scores(h), teacher.scores(self.queue[:updates * len(rows) * self.world])
            ids = self.labels(scores, past).reshape(b, patches) if guided else torch.zeros(b, patches, dtype=torch.long, device=x.device)
            q = self.targets(scores[rows], past)
            self.remember(h[rows], updates)
        drop = u[:, 2] < cfg.drop if guided else torch.ones_like(u[:, 2], dtype=torch.bool)          # null for all before: the same computation, which compiles once
        condition = self.condition(ids, x.shape[2:], drop, teacher) if cfg.condition != "none" else {}

        # the student: other noise, perhaps another view, a time in the window
        t = cfg.sk_window[0] + (cfg.sk_window[1] - cfg.sk_window[0]) * u[part, 3]
        view = augment(x[part], u[part, 4:12], cfg.sk_augment, cfg.flip) if cfg.sk_augment else x[part]
        with torch.set_grad_enabled(cfg.sk_grad == "backbone"), context():
            f = self.look(net, view, z[part, 1], t)
        f = rows_of_map(f)
        student = self.embed(f.reshape(len(part), -1, f.shape[1])[:, keep].flatten(0, 1))
        fixed = seen < cfg.sk_freeze or self.settled is not None                 # prototypes that are conditions stay with their labels
        prototypes = F.normalize(self.prototypes.detach() if fixed else self.prototypes, dim=1)
        logp = F.log_softmax(student @ prototypes.T / cfg.sk_temperature, 1)
        sk = -(q * logp).sum(1).mean()                    # every process has equally many rows
        self.sums += torch.stack([sk.detach(), -(q * q.clamp(min=1e-12).log()).sum(1).mean(), torch.ones_like(sk)]).double()
        return cfg.sk_weight * min(1.0, (seen + 1) / max(cfg.sk_ramp, 1)) * sk, condition

    def kept(self, patches, updates, device):
        """Those of an image's patches that take part in the loss of this update: int64 [at most sk_patches]."""
        return (torch.linspace(0, patches - 1, min(self.cfg.sk_patches, patches), device=device).long() + 7 * updates) % patches

    def condition(self, ids, size, drop, teacher):
        """Condition from labels int64 [B, patches]; `drop` bool [B] chooses the null condition image by image."""
        if self.cfg.condition == "label":
            return dict(label=torch.where(drop, self.cfg.K, ids[:, 0]))
        if self.cfg.condition == "prototype":
            return dict(vector=F.normalize(teacher.prototypes, dim=1)[ids[:, 0]] * ~drop[:, None])
        side = math.isqrt(ids.shape[1])
        return dict(layout=layout_of(torch.where(drop[:, None], self.cfg.K, ids).reshape(-1, side, side), self.cfg.K, size))

    def after(self, ema, weight):
        """After an update: unit prototypes, averaged labeller (parameters; buffers are copied)."""
        with torch.no_grad():
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
            torch._foreach_lerp_(list(ema.parameters()), list(self.parameters()), weight)
            ema.prototypes.copy_(F.normalize(ema.prototypes, dim=1))
            for a, b in zip(ema.buffers(), self.buffers()):
                a.copy_(b)

    def report(self, ema, teacher, seen, context):
        """What tells a healthy labeller from a collapsed one, over a fixed set of training images; NMI with the classes only as a monitor."""
        sums = self.ranks.total(self.sums.clone())
        self.sums.zero_()
        told, _, alike, _ = label_images(ema, teacher, self.images, np.arange(len(self.images)), context, "watched")
        ids = told if self.settled is None else self.settled[self.rows].cpu().long()     # labels that stay are those that condition
        K = self.cfg.K
        counts = torch.bincount(ids.flatten(), minlength=K)
        before = self.watched[:len(ids)]
        side = math.isqrt(ids.shape[1])
        now = ids[:, side // 2 * side + side // 2]        # of a map: the label in the middle
        line = dict(sk_loss=float(sums[0] / sums[2]), ln_K=math.log(K), target_entropy=float(sums[1] / sums[2]),
                    used=float((counts > 0).float().mean()), label_entropy=size_entropy(counts.numpy()),
                    churn=float((before.cpu() != now).float().mean()) if (before >= 0).all() else None)
        self.watched[:len(ids)] = now.to(self.watched.device)
        if self.settled is not None:                      # does the head tell the labels that stay?
            line["settled"] = float((told == ids).float().mean())
        if self.classes is not None and ids.shape[1] == 1:
            line["nmi"] = nmi(now.numpy(), self.classes)
        line["mean_cosine"] = alike
        # or few labels hold nearly all images
        line["collapsed"] = uniform_targets(line) or math.exp(line["label_entropy"] * math.log(K)) < max(1.5, 0.1 * K)
        return line

    def grid(self, ema, teacher, context):
        """Condition of the sample grid: ten images per label, or per map of a watched image."""
        if self.cfg.condition == "none":
            return {}
        size, no = row_shape(self.images)[1:], torch.zeros(120, dtype=torch.bool, device=self.mean.device)
        if self.cfg.condition == "patch":
            ids = label_images(ema, teacher, self.images, np.arange(len(self.images)), context, "watched")[0][:12].repeat_interleave(10, 0)
        else:
            ids = torch.from_numpy(np.unique(np.linspace(0, self.cfg.K - 1, min(12, self.cfg.K)).round().astype(int)).repeat(10))[:, None]
        return self.condition(ids.to(no.device), size, no[:len(ids)], teacher)

    def words(self, line):
        """The same for the screen."""
        text = f"  SK {line['sk_loss']:.3f} (ln K {line['ln_K']:.2f})  in use {line['used']:.0%}"
        text += "".join(f"  {name} {line[key]:.2f}" for key, name in (("churn", "churn"), ("nmi", "NMI"), ("settled", "as settled")) if line.get(key) is not None)
        if not line["collapsed"]:
            return text
        if uniform_targets(line):
            return text + "\nWARNING: the labels have collapsed: the targets do not tell images apart. Try a smaller sk_eps or sk_weight, or another sk_t"
        return text + ("\nWARNING: the labels have collapsed: nearly all images share a few. Try a larger sk_eps or sk_queue, a smaller sk_weight or K, "
                       "or another sk_t")


def uniform_targets(line):
    """Whether the targets, by a line of the log, tell images apart no more: what balanced assignment makes of a head that maps all images to one place."""
    return line["target_entropy"] > 0.95 * line["ln_K"]


def rows_of_map(f):
    """Features [B, D] or maps [B, D, h, w] -> float32 rows [B, D] or [B h w, D]."""
    return f.float() if f.dim() == 2 else f.float().permute(0, 2, 3, 1).flatten(0, 2)


def layout_of(ids, K, size):
    """Maps of labels int64 [B, h, w] (K = null) -> one-hot float [B, K, H, W]; the null label is all zeros."""
    onehot = torch.zeros(len(ids), K + 1, *ids.shape[1:], device=ids.device).scatter_(1, ids.long()[:, None], 1)[:, :K]
    return F.interpolate(onehot, size=tuple(size), mode="nearest")


class Conditioned(nn.Module):
    """A network conditioned on prototypes, sets of labels or maps, driven by ids 0 ... num_labels - 1 (num_labels = null) as others are by labels.

    Maps and sets come from the bank in the checkpoint; where images have a label besides, the bank has one for each of its maps.
    """

    def __init__(self, net, state):
        super().__init__()
        self.net, self.num_labels, self.kinds, self.labels = net, state["num_labels"], state.get("map_labels"), state.get("bank_labels")
        self.size, device = state["size"], next(net.parameters()).device
        if self.kinds:
            self.table, self.labels = state["maps"].to(device), None if self.labels is None else self.labels.to(device)
        elif "sets" in state:
            self.table = state["sets"].to(device).float()                        # the last row is null
        else:
            c = F.normalize(state["side_ema"]["prototypes"], dim=1)
            self.table = torch.cat([c, torch.zeros_like(c[:1])]).to(device)      # the last row is null

    def forward(self, x, time, label=None):
        if label is None:
            return self.net(x, time)
        row = self.table[label]
        if not self.kinds:
            return self.net(x, time, vector=row)
        return self.net(x, time, layout=layout_of(row, self.kinds, (self.size, self.size)), **({} if self.labels is None else dict(label=self.labels[label])))


def conditioned(net, state):
    """`net` such that an id 0 ... num_labels is its condition, whatever kind of condition its checkpoint `state` was trained with."""
    return Conditioned(net, state) if state.get("condition", "label") in ("prototype", "patch", "box", "mask", "set") else net


def bank_of(maps, kinds, seed, labels=None, K=0, size=2000):
    """What a checkpoint needs to sample maps without the images: a bank of training maps [N, h, w], the last one null, and their labels if there are any."""
    rows = np.random.default_rng(seed_of(seed, "bank")).permutation(len(maps))[:size]
    null, n = np.full_like(maps[:1], kinds), len(rows)
    state = dict(maps=torch.from_numpy(np.concatenate([maps[rows], null])), map_labels=kinds, num_labels=n, marginal=torch.full((n,), 1 / n, dtype=torch.float64))
    return state if labels is None else state | dict(bank_labels=torch.from_numpy(np.append(labels[rows], K)))


@torch.no_grad()
def label_images(net, labeller, images, rows, context, purpose, ranks=ALONE):
    """(labels int64 [n, patches], their scores float32 [n, patches], mean cosine between embeddings, prices [K]) of the images at `rows`; CPU.

    By an averaged network and labeller: at sk_t, without a condition. With assign=sinkhorn labels are balanced over all images of this call, on
    all ranks, unless the labeller has prices: one image alone, or other images, cannot be balanced.
    """
    cfg, h, g, eps, device = labeller.cfg, [], labeller.prices, labeller.cfg.sk_eps, labeller.mean.device
    for part, got in stream(net, dict(path=cfg.path), images, rows, [labeller.name], [cfg.sk_t], device=device, context=context,
                            pool=labeller.pool, seed=cfg.seed, purpose=f"online {purpose}", batch=min(256, cfg.micro or max(1, cfg.batch // labeller.world)),
                            compiled=cfg.compile and purpose != "like"):
        e = labeller.embed(rows_of_map(got[labeller.name, cfg.sk_t])).unflatten(0, (len(part), -1))             # [b, patches, d]
        large = 4 * len(rows) * e[0].numel() > 1e9        # patches of many images: in half precision, off the GPU
        h.append(e.half().cpu() if large else e)
    h = torch.cat(h) if h else labeller.mean.new_zeros(0, 1, cfg.sk_dim)         # [n, patches, d]; their scores, [n, patches, K], are never held at once
    blocks = lambda: (labeller.scores(part.to(device).float()) for part in h.flatten(0, 1).split(2048 if h.dtype == torch.float32 else 2 ** 16))
    if g is None:
        g = potentials(blocks, eps, 50, ranks) if cfg.assign == "sinkhorn" else labeller.mean.new_zeros(cfg.K)
    best = [(k := (S / eps - g).argmax(1), S.gather(1, k[:, None])[:, 0]) for S in blocks()]
    ids, score = (torch.cat(v).view(h.shape[:2]).cpu() for v in zip(*best))
    return ids, score, float(h.mean((0, 1), dtype=torch.float32).square().sum()) if len(h) else 0.0, g


def load_labeller(run, net, state):
    """The averaged labeller of an online checkpoint, for its averaged network `net`."""
    if "side_ema" not in state:
        raise UserError(f"{state['file']}: was not trained with labels=online, so it cannot tell the labels of new images")
    cfg = fill("train_guided", TrainGuided, state["config"]["train_guided"])
    if state.get("prices") is None:
        raise UserError(f"{state['file']}: has no prices of its labels, as its training is not finished; "
                        "run train_guided.py again, with overwrite=true if it says done")
    side = Labeller(cfg, net, state["sk_activation"], state["size"], channels=state["channels"])
    side.load_state_dict(state["side_ema"])
    side.prices = state["prices"].to(side.mean.device)
    return side.eval().requires_grad_(False)


def check_online(run, cfg):
    """Combinations of online keys that cannot work."""
    require(not cfg.recompute or cfg.sk_grad == "head", cfg, "recompute sk_grad", "features with gradients stop inside the network: use recompute=false")
    require(not (cfg.sk_augment and run.data.latents), cfg, "sk_augment", "views differ in colour, which latents do not have; use sk_augment=0 with data.latents")
    share, every = cfg.batch // run.world, round(1 / cfg.sk_share) if 0 < cfg.sk_share <= 1 else 0
    if not every or share % every or abs(every * cfg.sk_share - 1) > 0.01:
        raise UserError(f"sk_share={cfg.sk_share}: must be 1 / n with n a divisor of the {share} images per process and update")
    w = cfg.sk_window
    require(len(w) == 2 and 0 <= w[0] <= w[1] <= 1 and 0 <= cfg.sk_t <= 1, cfg, "sk_window sk_t", "times lie between 0 and 1, a window has two in order")
    require(2 <= cfg.K < 2 ** 15 and min(cfg.sk_eps, cfg.sk_temperature) > 0 and min(cfg.sk_iterations, cfg.sk_dim, cfg.sk_hidden, cfg.sk_patches) >= 1,
            cfg, "K sk_eps sk_temperature sk_iterations sk_dim sk_hidden sk_patches", "must be positive, K 2 ... 32767")
    require(min(cfg.sk_queue, cfg.sk_weight, cfg.sk_ramp, cfg.sk_freeze, cfg.sk_until, cfg.sk_augment, cfg.switch) >= 0,
            cfg, "sk_queue sk_weight sk_ramp sk_freeze sk_until sk_augment switch", "must not be negative")
    require(cfg.condition == "none" or cfg.switch < cfg.images, cfg, "switch images", "labels would never be used: switch comes before images, or condition=none")
    require(not cfg.sk_until or cfg.sk_freeze < cfg.sk_until < cfg.images, cfg, "sk_until sk_freeze images",
            "labels settle after prototypes have moved (sk_freeze), and before training ends; sk_until=0 never settles them")
    if cfg.condition == "patch" and cfg.sk_augment:
        raise UserError("sk_augment: patches of two views do not correspond; use sk_augment=0 with condition=patch")
    if cfg.condition != "patch" and (some := round(cfg.batch * cfg.sk_share) + cfg.sk_queue) < cfg.K:
        run.say(f"note: {some} images balance K={cfg.K} labels at a time (batch x sk_share + sk_queue): not every label can have one; a longer sk_queue helps")


def announce_looks(run, cfg, net, train, test):
    """What looking for labels costs beside the training, for --dry-run: forward passes up to the activation."""
    name, (channels, size) = matching(net, [cfg.sk_activation])[-1], input_shape(run)
    share = cost_shares(copy.deepcopy(net).to("meta"), torch.zeros(1, channels, size, size, device="meta"), torch.zeros(1, device="meta"))[name]
    until = min(cfg.sk_until or cfg.images, cfg.images)
    switch = min(cfg.switch if cfg.condition != "none" else cfg.images, until)   # before it the teacher looks at a share of the images, afterwards at all
    teacher, student = cfg.sk_share * switch + until - switch, (3 if cfg.sk_grad == "backbone" else 1) * cfg.sk_share * cfg.images
    others = train + test + (train if cfg.sk_until else 0) + min(Labeller.WATCHED, train) * cfg.images / cfg.log_every         # in the end all; when labels settle; for the log
    looks = round(teacher + student + others)
    flops = footprint(net, channels, size)[0]
    cost(run, f"beside it, labels: {flops / 1e9:,.1f} GFLOP forward an image x {share:.2f} (up to {name}) x {looks:,} images (teacher {round(teacher):,}, student {round(student):,}, "
         f"all to be labelled and some for the log {round(others):,})", flops * share * looks)


def finish_online(run, cfg, net, side, state, folder, data):
    """Label every image with the finished averaged network; labels, scores and pictures into the run, marginal (or maps) into the checkpoint."""
    settled = side.settled                                # these labels stay; of other images the head tells which one is theirs
    net.load_state_dict(state["ema"]), side.load_state_dict(state["side_ema"])
    net.eval(), side.eval()
    context, splits = autocast(run, cfg.precision)[0], dict(train=data, test=load_data(run, "test"))
    labels, typical = {}, None
    for split, d in splits.items():
        rows = run.share(len(d))
        ids, score, _, side.prices = label_images(net, side, d.inputs, rows, context, split, run)    # test images under the prices of the training images
        side_ = math.isqrt(ids.shape[1])
        ids, score = (np.concatenate(run.gather(v.numpy())) for v in (ids, score))
        ids = ids if settled is None or split == "test" else settled.cpu().numpy().astype(ids.dtype)
        labels[split] = ids[:, 0] if ids.shape[1] == 1 else ids.reshape(-1, side_, side_).astype(np.int16)
        typical = score.mean(1) if split == "train" else typical
    patch, about = cfg.condition == "patch", dict(online=dict(checkpoint=f"guided/{cfg.name}", hash=state["weights"]))
    if patch:                                             # a bank of maps stands for their distribution; the last one is null
        state |= bank_of(labels["train"], cfg.K, cfg.seed)
        if run.rank == 0:
            colours = np.random.default_rng(3).integers(40, 256, (cfg.K, 3)).astype(np.uint8)
            zoom = data.images.shape[2] // side_
            shown = [v for i in range(min(40, len(data))) for v in (data.images[i], colours[labels["train"][i].repeat(zoom, 0).repeat(zoom, 1)].transpose(2, 0, 1))]
            save_grid(folder / "segments.png", np.stack(shown), 10, head=f"{cfg.name}: images and the labels of their patches")
    else:
        save_labels(run, cfg.name, splits, labels, cfg.K, typical, dict(online=state["weights"]), {}, about, cfg.seed)
        marginal = torch.from_numpy(np.bincount(labels["train"], minlength=cfg.K) / len(data))
        state |= dict(marginal=marginal, label_scores={k: float(v) for k, v in score_labels(labels["train"], np.asarray(data.classes)).items()})
    if run.rank == 0:
        with atomic(folder / "labels.npz") as f:
            np.savez(f, num_labels=cfg.K, **labels)
    state |= dict(label_digest=digest(labels["train"]), prices=side.prices)
    save_checkpoint(run, folder, {k: v for k, v in state.items() if k != "file"})


def main():
    """Train with guidance, from the command line."""
    run = start("train_guided", TrainGuided, __doc__)
    cfg = run.cfg
    check_training(run, cfg)
    if not 0 <= cfg.drop <= 1:
        raise UserError(f"drop={cfg.drop}: must be between 0 and 1")
    online, guided = cfg.labels == "online", cfg.labels not in ("none", "online")
    cfg.name = run.sections[run.stage]["name"] = cfg.name or ("unconditional" if cfg.labels == "none" else cfg.labels)
    folder, data = run.dir / "guided" / cfg.name, load_data(run, "train")
    if run.dry_run and guided and not (run.dir / "labels" / f"{cfg.labels}.json").exists():
        run.say(f"labels/{cfg.labels} are not there yet; counted without them, which costs the same")
        guided = False

    # labels: one id per training image, perhaps a map, checked against the data; or none yet
    labels, K, info, condition, conditions, sampling, grid, layout = None, 0, {}, None, {}, {}, None, None
    if guided:
        require(cfg.condition in ("label", "box", "mask", "set"), cfg, "condition labels",
                "prototypes and patches exist with labels=online only; here label, box, mask or set")
        labels, info = load_labels(run, cfg.labels)
        K, conditions = info["num_labels"], dict(num_labels=info["num_labels"])
        marginal = torch.from_numpy(np.bincount(labels["train"], minlength=K) / len(labels["train"]))   # float64 [K]
        condition, sampling = label_condition(labels["train"], K, cfg.drop, run.device), dict(num_labels=K, marginal=marginal)
        grid = dict(label=torch.tensor(np.unique(np.linspace(0, K - 1, min(K, 12)).round().astype(int)).repeat(10)).to(run.device))
        if cfg.condition == "set":                        # a bank of sets, the last one null, stands for their distribution
            sets = label_sets(labels, K, cfg.labels)
            bank = sets[np.random.default_rng(seed_of(cfg.seed, "bank")).permutation(len(sets))[:2000]]
            n = len(bank)
            condition, conditions = set_condition(sets, cfg.drop, run.device), dict(vector_dim=K)
            sampling = dict(sets=torch.from_numpy(np.pad(bank, ((0, 1), (0, 0)))), num_labels=n, marginal=torch.full((n,), 1 / n, dtype=torch.float64))
            layout = digest(sets)
            grid = dict(vector=sampling["sets"][torch.arange(min(n, 12)).repeat_interleave(10)].float().to(run.device))
        elif cfg.condition != "label":
            require(not run.data.latents, cfg, "condition", "boxes and masks are drawn on pixels; with data.latents use condition=label")
            maps, kinds = layout_maps(run, cfg, labels, info, "train")
            condition, conditions = layout_condition(labels["train"], maps, K, kinds, cfg, run.device), conditions | dict(layout_channels=kinds)
            sampling, layout = bank_of(maps, kinds, cfg.seed, labels["train"], K), digest(maps)
            shown = torch.arange(min(12, len(maps))).repeat_interleave(10)
            grid = dict(label=sampling["bank_labels"][shown].to(run.device), layout=layout_of(sampling["maps"][shown], kinds, maps.shape[1:]).to(run.device))
    if online:
        require(cfg.condition not in ("box", "mask", "set"), cfg, "condition labels", "boxes, masks and sets come from a label file")
        check_online(run, cfg)
        file = run.dir / "labels" / f"{cfg.name}.json"    # written at the end; labels that were not found online are not ours to replace
        if cfg.condition != "patch" and not cfg.overwrite and file.exists() and "online" not in read_json(file, "delete it").get("recipe", {}):
            raise UserError(f"{file}: labels of this name were made by another program; choose another name=, or overwrite=true")
        K = cfg.K if cfg.condition in ("label", "prototype") else 0
        sampling = dict(num_labels=K)
        conditions = dict(label=dict(num_labels=cfg.K), prototype=dict(vector_dim=cfg.sk_dim), patch=dict(layout_channels=cfg.K), none={})[cfg.condition]

    # network: from scratch, or from unconditional weights
    source, init = load_checkpoint(run, cfg.init) if cfg.init and not missing(run, cfg.init) else None, None
    if source and cfg.init.split(":")[0] in PUBLISHED:               # what published weights are, they say themselves
        run.model = dataclasses.replace(fill("model", Model, source["model"]), dropout=run.model.dropout)
        run.sections["model"] = source["model"] = dataclasses.asdict(run.model)
    channels, size = input_shape(run)
    net = build_model(run.model, size, channels, seed=cfg.seed, **conditions)
    if source:
        if fill("model", Model, source["model"]) != run.model:
            raise UserError(f"init={cfg.init}: its model section differs from the configured one ({source['file']})")
        if source["num_labels"] and source.get("labels") != (digest(labels["train"]) if guided else None):
            raise UserError(f"init={cfg.init}: was trained with other labels ({source.get('label_file')}) than labels={cfg.labels}; "
                            "start from an unconditional model")
        load_pretrained(net, source["ema"])
        init = dict(checkpoint=cfg.init, weights=source["weights"], seen=source["seen"])
        for key in ("path", "predict"):
            if source[key] != getattr(cfg, key):
                raise UserError(f"{key}={getattr(cfg, key)}: the initial weights of {source['file']} were trained with {key}={source[key]}; "
                                f"set train_guided.{key} or init=")
    if run.dry_run:
        announce(run, cfg, net, folder)
        return announce_looks(run, cfg, net, len(data), len(load_data(run, "test"))) if online else None

    # train; the checkpoint carries all that sampling needs: K, the marginal, and the hash of the labels
    net, side = placed(net, run.device, cfg.compile), None
    state = dict(kind="guided", model=dataclasses.asdict(run.model), size=size, channels=channels, conditions=conditions, num_labels=0,
                 path=cfg.path, predict=cfg.predict, data=data.info["fingerprint"], init=init, condition=cfg.condition if conditions else "none",
                 labels=digest(labels["train"]) if guided else None, layout=layout, label_file=cfg.labels, label_scores=info.get("scores", {}), marginal=None,
                 config={k: run.sections[k] for k in ("data", "model", run.stage)}) | sampling
    if online:
        name = matching(net, [cfg.sk_activation])[-1]
        side = Labeller(cfg, net, name, size, run.world, run.rank, channels)
        side.watch(data)
        state["sk_activation"] = name
    if run.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    state = fit(run, cfg, net, folder, data, state, condition, grid, side, columns=10 if conditions else 8)
    if guided and run.rank == 0:
        with atomic(folder / "labels.npz") as f:
            np.savez(f, **labels)
    if online and "label_digest" not in state:            # not labelled by these very weights yet
        gpu_flags(training=False)                         # in full float32, as sample_ode.py will
        finish_online(run, cfg, net, side, state, folder, data)

    # close
    run.say(f"model in {folder}, sample grids{' (one row per label or layout)' if conditions else ''} in {folder / 'samples'}")
    run.next(f"sample_ode.py checkpoint=guided/{cfg.name} name={cfg.name}" + (" guidance=1,1.5,2,3" if conditions else ""))


if __name__ == "__main__":
    cli(main)

"""Train with guidance: images and self-labels in, a model with classifier-free guidance out.

Reads   data/train, labels/<labels>.npz (self_label.py) and, with init=diffusion/base, the weights of train_diffusion.py
Writes  guided/<name>/: checkpoint, log and sample grids as train_diffusion.py, plus labels.npz (what the model was
        conditioned on); labels=online also labels/<name>.npz with scores and contact sheet
Time    t = 0 is noise, t = 1 is data.   Null label = K, the number of labels; nobody types a class count of the data.

    python train_guided.py configs/shapes.yaml labels=kmeans                     # CPU, about a minute
    python train_guided.py configs/cifar10.yaml labels=kmeans init=              # one GPU, from scratch
    torchrun --nproc_per_node=8 train_guided.py configs/cifar10.yaml labels=online
    python train_guided.py configs/shapes.yaml labels=none                       # without labels: the base line

The loss is that of train_diffusion.py with a condition: each image's label, replaced by the null label with
probability `drop`, image by image (arXiv 2207.12598). One network thereby learns v(x_t, t, label) and v(x_t, t, null);
sample_ode.py mixes the two.

labels=online (arXiv 2312.08825): a head on the network's own features scores every image against K prototypes,
Sinkhorn-Knopp turns the scores of the averaged network into balanced targets, and from `switch` on the label found for
an image is its condition. From `sk_until` on, images keep theirs.

Read first `given_labels`, then `Labeller.step` with the three methods behind it, then `main`; skip at first layouts,
`labeller_report` and initial weights. `Condition`, `GivenLabels` and the loop are in train_diffusion.py.
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configs.data import input_shape, load_data, load_labels
from configs.run import (ALONE, Model, UserError, atomic, autocast, check_name, cli, digest, fill, gpu_flags, key,
                         locked, read_json, require, save_grid, seeded, start)
from train_diffusion import (PATHS, Condition, GivenLabels, Guide, Training, build_model, check_training, diffuse,
                             every_tenth, fit, load_checkpoint, move_average, new_state, placed,
                             save_checkpoint, say_training, with_null)
from extract_features import matching, reader, stream
from self_label import in_blocks, nmi, potentials, save_labels, score_labels, sinkhorn, size_entropy


@dataclass
class TrainGuided(Training):
    """Section `train_guided`. K, switch and sk_ keys are of labels=online."""
    name: str = key("", "results go to guided/<name>; empty = the name of the labels (`unconditional` for none)")
    labels: str = key("kmeans", "labels/<labels>.npz; none = train without labels, as a control; online = find them")
    drop: float = key(0.1, "probability of the null label, decided per image", low=0, high=1)
    init: str = key("diffusion/base", "start from these averaged weights; empty = from scratch")
    condition: Literal["label", "box", "mask", "set", "prototype", "patch", "none"] = key("label",
        "what the network is told of an image: label id; with the file's boxes or masks beside it; set = the clusters"
        " of all boxes of an image (labels made with objects=2 or more); online also: prototype vector, map of patch "
        "labels, none = Sinkhorn loss without guidance")
    K: int = key(50, "prototypes", low=2, high=2 ** 15 - 1)
    switch: int = key(20_000, "images seen before conditions begin; until then every image has the null one", low=0)
    sk_activation: str = key("mid*-out", "the feature's name; of several that match the last one")
    sk_t: float = key(0.85, "time of an image in the teacher pass, by the averaged network", low=0, high=1)
    sk_window: list[float] = key([0.8, 0.9], "times at which the trained network must predict the target",
                                 low=0, high=1, count=2)
    sk_weight: float = key(1.0, "weight of the Sinkhorn loss", low=0)
    sk_grad: Literal["head", "backbone"] = key("head", "how far its gradient reaches")
    sk_ramp: int = key(20_000, "images over which the weight rises", low=0)
    sk_freeze: int = key(5_000, "images before prototypes move", low=0)
    sk_until: int = key(0, "images after which every training image keeps its label; 0 = labels move to the end", low=0)
    sk_share: float = key(0.25, "share of each batch that takes part in the Sinkhorn loss", above=0, high=1)
    sk_queue: int = key(1_024, "earlier features that help to balance; 0 = the batch alone", low=0)
    sk_eps: float = key(0.05, "entropic regularisation of the targets", above=0)
    sk_iterations: int = key(3, "Sinkhorn iterations", low=1)
    sk_temperature: float = key(0.1, "of the prediction", above=0)
    sk_dim: int = key(64, "width of head output and prototypes", low=1)


# ---------------------------------------------------------------------------------------------------------------------
# Labels of a file become conditions

def given_labels(run, cfg, data):
    """(GivenLabels, conditions of the network, facts for the checkpoint) of labels/<labels>.npz."""
    require(cfg.condition in ("label", "box", "mask", "set"), cfg, "condition labels",
            "prototypes and patches exist with labels=online only; here label, box, mask or set")
    labels, info = load_labels(run, cfg.labels)
    ids, K = labels["train"], info["num_labels"]          # int64 [N]
    table = with_null(torch.from_numpy(ids), K)
    facts = dict(labels=digest(ids), label_scores=info.get("scores", {}), condition=cfg.condition, num_labels=K)
    if cfg.condition == "label":
        facts["marginal"] = torch.from_numpy(np.bincount(ids, minlength=K) / len(ids))          # float64 [K]
        by_row, by_id = Condition("label", table), Condition("label", torch.arange(K + 1))
        return GivenLabels(by_row, by_id, cfg.drop), dict(num_labels=K), facts
    if cfg.condition == "set":
        sets = label_sets(labels, K, cfg.labels)
        by_row = Condition("vector", with_null(torch.from_numpy(sets), 0))
        conditions, facts["layout"] = dict(vector_dim=K), digest(sets)
    else:
        maps, kinds = layout_maps(run, cfg, labels, info, "train")
        by_row = Condition("map", with_null(torch.from_numpy(maps), kinds), kinds, data.images.shape[2], table)
        conditions, facts["layout"] = dict(num_labels=K, layout_channels=kinds), digest(maps)
    by_id = by_row.bank(cfg.seed)
    return GivenLabels(by_row, by_id, cfg.drop), conditions, facts | bank_facts(by_id)


def bank_facts(bank):
    """What a checkpoint needs to be sampled by a bank of conditions, each as often as the others."""
    share = torch.full((bank.null,), 1 / bank.null, dtype=torch.float64)
    return dict(bank=bank.state(), marginal=share)


def label_sets(labels, K, name):
    """The clusters of each training image's boxes, bool [N, K], from a label file's ids_train [N, objects], -1: no."""
    if "ids_train" not in labels:
        raise UserError(f"condition=set: labels/{name}.npz has no ids_train, several labels per image; make them with "
                        "self_label.py objects=2 and method=lost, ncut or masks")
    ids = np.asarray(labels["ids_train"])
    if len(ids) != len(labels["train"]) or ids.max() >= K:
        raise UserError(f"labels/{name}.npz: ids_train must have {len(labels['train'])} rows of ids below {K}; make "
                        "the labels again")
    sets = np.zeros((len(ids), K + 1), bool)
    sets[np.arange(len(ids))[:, None], np.where(ids < 0, K, ids)] = True
    return sets[:, :K]


def draw_boxes(boxes, size):
    """Boxes float [N, objects, 4] (x0 y0 x1 y1 in pixels, < 0: none) -> uint8 [N, size, size]: 0 inside, 1 not."""
    at = np.arange(size) + 0.5                            # pixel centres
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes, np.float32), -1, 0)[..., None]                # [N, objects, 1] each
    rows = (at >= y0) & (at < y1)
    columns = (at >= x0) & (at < x1)
    inside = rows[..., :, None] & columns[..., None, :]   # [N, objects, H, W]
    return 1 - inside.any(1).astype(np.uint8)


def layout_maps(run, cfg, labels, info, split, kinds=0):
    """(maps uint8 [N, H, W], number of ids) of the label file's boxes or masks; of method=classes the ground truth's.

    Of masks 0 is no object, a channel of its own. kinds: the number of ids, where a model was trained with one.
    """
    require(not run.data.latents, cfg, "condition", "boxes and masks are drawn on pixels; with data.latents use label")
    data, kind = load_data(run, split), {"box": "boxes", "mask": "masks"}[cfg.condition]
    truth = info.get("recipe", {}).get("method") == "classes"
    there = labels.get(f"{kind}_{split}", getattr(data, kind) if truth else None)
    if there is None or len(there) != len(data):
        raise UserError(f"condition={cfg.condition}: labels/{cfg.labels}.npz has no {kind} of the {len(data)} {split} "
                        "images; make them with self_label.py")
    size = data.images.shape[2]
    if cfg.condition == "box":
        boxes = np.asarray(there).reshape(len(there), -1, 4)
        parts = np.array_split(boxes, math.ceil(len(boxes) / 4096))              # each becomes maps of all its objects
        return np.concatenate([draw_boxes(part, size) for part in parts]), 1
    masks = np.asarray(there).astype(np.uint8)
    if masks.shape[1] != masks.shape[2] or size % masks.shape[1]:
        raise UserError(f"labels/{cfg.labels}.npz: masks of {masks.shape[1]} x {masks.shape[2]} positions do not "
                        f"divide images of {size}")
    zoom = size // masks.shape[1]
    masks = masks.repeat(zoom, 1).repeat(zoom, 2)
    void = masks == 255 if truth else np.zeros(masks.shape, bool)
    kinds = kinds or max(int(masks[~void].max(initial=0)) + 1, 2)
    masks[void | (masks >= kinds)] = kinds                # void, or an id that no training image has: nothing there
    return masks, kinds


# ---------------------------------------------------------------------------------------------------------------------
# Labels that are found while training

class Standardised(nn.Module):
    """Features less their running mean, over their running standard deviation.

    Activations share a large common direction, beside which images hardly differ.
    """

    def __init__(self, width, length):
        super().__init__()
        self.length = length                              # about so many rows count
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, f):                                 # [n, D]
        return (f - self.mean) / (self.var + 1e-6).sqrt()

    @torch.no_grad()
    def learn(self, f, updates, ranks):
        """Take in the rows f [n, D] of all processes."""
        n = len(f) * ranks.world
        mean, square = ranks.total(torch.stack([f.sum(0), f.square().sum(0)]).double()) / n
        share = max(n / max(self.length, 4 * n), 1 / (updates + 1))
        self.mean.lerp_(mean.float(), share)
        self.var.lerp_((square - mean.square()).clamp(min=0).float(), share)


class Queue(nn.Module):
    """The rows of the last updates, the same on every process."""

    def __init__(self, length, width):
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, width))

    def filled(self, n, updates, ranks):
        """What is there after so many updates of n rows a process; every process gets another part of it."""
        return self.rows[:updates * n * ranks.world][ranks.rank::ranks.world]

    def add(self, h, updates, ranks):
        """Put in the rows h [n, d] of all processes, in order of image number."""
        if not len(self.rows):
            return
        if ranks.world > 1:
            every = h.new_empty(ranks.world * len(h), h.shape[1])
            torch.distributed.all_gather_into_tensor(every, h.contiguous())
            h = every
        h = h[-len(self.rows):]
        places = updates * len(h) + torch.arange(len(h), device=h.device)
        self.rows[places % len(self.rows)] = h


class Labeller(Guide):
    """Finds K labels in a network's features while both train (arXiv 2312.08825), over the batches of all processes.

    Teacher: the averaged network and the averaged labeller, an image at time sk_t, the null condition. Its scores
    h_i . c_k, balanced by Sinkhorn-Knopp, are the targets q. Student: the trained network on other noise, at a time in
    sk_window, with the null condition.

        loss = - mean_i sum_k q_ik log softmax_k(h_i . c_k / temperature)

    Standardised features pass an MLP without batch statistics of its own; h and prototypes c have unit length. An image
    has one label, or with condition=patch one for each of P patches; otherwise P = 1.
    """
    uniforms, noises = 12, 2                              # four are used; fewer would change the noise after them
    WATCHED = 2048                                        # images whose labels the log follows
    HIDDEN = 256                                          # width inside the head: 4 x sk_dim; others moved no result
    PATCHES = 16                                          # of an image in one loss: more cost time and moved no result

    def __init__(self, cfg, net, name, size, channels=3):
        super().__init__()
        self.cfg, self.name, self.size, self.path = cfg, name, size, PATHS[cfg.path]
        self.pool = "none" if cfg.condition == "patch" else "mean"
        device = next(net.parameters()).device
        with torch.no_grad():                             # the feature's shape, by looking
            x, t = torch.zeros(1, channels, size, size, device=device), torch.ones(1, device=device)
            shape = reader(net, [name], "none")(x, t)[0].shape                   # [1, D, h, w]
        self.patches = 1 if self.pool == "mean" else shape[2] * shape[3]
        with seeded(cfg.seed, "labeller"):
            self.head = nn.Sequential(nn.Linear(shape[1], self.HIDDEN), nn.SiLU(), nn.Linear(self.HIDDEN, cfg.sk_dim))
            self.prototypes = nn.Parameter(F.normalize(torch.randn(cfg.K, cfg.sk_dim), dim=1))
        self.standardised = Standardised(shape[1], cfg.sk_queue)
        self.queue = Queue(cfg.sk_queue, cfg.sk_dim)      # of h, re-scored with the prototypes as they are
        self.register_buffer("watched", torch.full((self.WATCHED,), -1))         # labels at the last line of the log
        self.to(device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)           # since then: loss, entropy, updates
        self.settled = None                               # int16 [N, P]: labels of all training images, once they stay
        self.potentials = None                            # [K], once training is finished
        self.ranks, self.context = ALONE, nullcontext

    def get_extra_state(self):                            # beside parameters and buffers
        return self.settled

    def set_extra_state(self, settled):
        self.settled = None if settled is None else settled.to(self.prototypes.device)

    def averaged(self):
        return copy.deepcopy(self).eval().requires_grad_(False)

    def begin(self, run, data, context):
        """Find labels in these training images; the log follows some of them."""
        self.ranks, self.context, self.inputs = run, context, data.inputs
        rows = np.linspace(0, len(data.inputs) - 1, min(self.WATCHED, len(data.inputs)))
        self.rows = np.unique(rows.astype(int))           # of the watched images
        classes = np.asarray(data.classes[self.rows])     # a monitor
        self.classes = classes if (classes >= 0).all() else None

    def step(self, net, ema, teacher, batch):
        """(weighted Sinkhorn loss, what the network is told), the same for any number of processes.

        From `sk_until` on labels are those that `settle` found; then there is no teacher pass any more, and the head
        learns to tell these labels.
        """
        cfg, b, device = self.cfg, len(batch.x), batch.x.device
        updates = batch.seen // cfg.batch
        guided = cfg.condition != "none" and batch.seen >= cfg.switch
        some = torch.arange(0, b, round(1 / cfg.sk_share), device=device)        # images in the loss
        patches = self.patches_of(updates, device)        # of each, in the loss
        labels = torch.zeros(b, self.patches, dtype=torch.long, device=device)
        if 0 < cfg.sk_until <= batch.seen:
            labels = self.settled_labels(ema, teacher, batch)
            targets = F.one_hot(self.pick(labels.flatten(), some, patches), cfg.K).float()       # [n, K]
        else:
            images = slice(None) if guided else some      # that the teacher sees
            in_loss = (some, patches) if guided else (slice(None), patches)      # of them
            h = self.teacher_pass(ema, teacher, batch, images, in_loss)          # [m P, d]
            targets, found = self.balance(teacher, h, in_loss, updates)
            labels = found.reshape(b, self.patches) if guided else labels
        loss = self.student_loss(net, batch, some, patches, targets)
        drop = batch.u[:, 2] < (cfg.drop if guided else 1.0)
        weight = cfg.sk_weight * min(1.0, (batch.seen + 1) / max(cfg.sk_ramp, 1))
        return weight * loss, self.tell(labels, drop, teacher)

    def teacher_pass(self, ema, teacher, batch, images, in_loss):
        """Unit vectors h [m P, d] of these images, by the averages.

        Without a condition, so that labels never explain themselves. Statistics learn from what is in the loss.
        """
        with torch.no_grad(), self.context():
            t = torch.full_like(batch.u[images, 0], self.cfg.sk_t)
            f = self.feature(ema, batch.x[images], batch.more[images, 0], t)
        self.standardised.learn(self.pick(f, *in_loss), batch.seen // self.cfg.batch, self.ranks)
        teacher.standardised.load_state_dict(self.standardised.state_dict())
        with torch.no_grad():
            return teacher.embed(f)

    @torch.no_grad()
    def balance(self, teacher, h, in_loss, updates):
        """(targets [n, K] of those in the loss, labels int64 [m P] of all), balanced together with the queue."""
        cfg, ranks, mine = self.cfg, self.ranks, self.pick(h, *in_loss)
        scores = teacher.scores(h)                        # [m P, K]
        # two balancings: of the rows in the loss, which need soft targets, and of all, which need labels
        past = teacher.scores(self.queue.filled(len(mine), updates, ranks))
        balanced = torch.cat([self.pick(scores, *in_loss), past])
        q = sinkhorn(balanced, cfg.sk_eps, cfg.sk_iterations, ranks)[:len(mine)]
        g = potentials(in_blocks(torch.cat([scores, past])), cfg.sk_eps, cfg.sk_iterations, ranks)
        self.queue.add(mine, updates, ranks)
        return q, (scores / cfg.sk_eps - g).argmax(1)

    def student_loss(self, net, batch, some, patches, targets):
        """Cross entropy between targets [n, K] and the trained network's prediction, under other noise."""
        cfg = self.cfg
        low, high = cfg.sk_window
        t = low + (high - low) * batch.u[some, 3]
        with torch.set_grad_enabled(cfg.sk_grad == "backbone"), self.context():
            f = self.feature(net, batch.x[some], batch.more[some, 1], t)
        h = self.embed(self.pick(f, slice(None), patches))
        fixed = batch.seen < cfg.sk_freeze or self.settled is not None           # prototypes of settled labels stay
        prototypes = F.normalize(self.prototypes.detach() if fixed else self.prototypes, dim=1)
        logp = F.log_softmax(h @ prototypes.T / cfg.sk_temperature, 1)
        loss = -(targets * logp).sum(1).mean()            # every process has equally many rows
        entropy = -(targets * targets.clamp(min=1e-12).log()).sum(1).mean()
        self.sums += torch.stack([loss.detach(), entropy, torch.ones_like(loss)]).double()
        return loss

    def feature(self, net, x, z, t):
        """Feature rows float32 [B P, D] of images x under noises z at times t [B]; at most `micro` images at once."""
        read = reader(net, [self.name], self.pool)
        micro = len(x) if torch.is_grad_enabled() else self.cfg.micro or len(x)
        parts = zip(diffuse(self.path, x, z, t).split(micro), t.split(micro))
        return rows_of_map(torch.cat([read(x_t, s)[0] for x_t, s in parts]))

    def embed(self, f):
        """Feature rows [n, D] -> unit vectors h float32 [n, d]."""
        return F.normalize(self.head(self.standardised(f)), dim=1)

    def scores(self, h):
        """Cosines with the prototypes, [n, K]."""
        return h @ F.normalize(self.prototypes, dim=1).T

    def pick(self, rows, images, patches):
        """Those of rows [m P, ...] that are of these images and patches."""
        return rows.unflatten(0, (-1, self.patches))[images][:, patches].flatten(0, 1)

    def patches_of(self, updates, device):
        """The patches of an image that take part in the loss of this update, int64 [at most PATCHES]."""
        even = torch.linspace(0, self.patches - 1, min(self.PATCHES, self.patches), device=device).long()
        return (even + 7 * updates) % self.patches

    def settled_labels(self, ema, teacher, batch):
        """The labels [b, P] that images keep, found now if they are not yet; maps are mirrored with their images."""
        device = self.prototypes.device
        if self.settled is None:                          # by the averages as they are, under one draw of noise
            rows = self.ranks.share(len(self.inputs))
            ids = label_images(ema, teacher, self.inputs, rows, self.context, "settle", self.ranks)[0]
            ids = np.concatenate(self.ranks.gather(ids.numpy().astype(np.int16)))
            self.settled = torch.from_numpy(ids).to(device)
        labels = self.settled[batch.rows.to(device)].long()
        if batch.flip is None or self.patches == 1:
            return labels
        return torch.where(batch.flip[:, None], square(labels).flip(2).flatten(1), labels)

    def tell(self, labels, drop, teacher):
        """Keyword arguments of the network for labels int64 [B, P]; drop: bool [B]."""
        if self.cfg.condition == "none":
            return {}
        if self.cfg.condition == "patch":
            rows = torch.arange(len(labels), device=labels.device)
            return self.map_condition(square(labels))(rows, drop)
        return self.condition(teacher)(labels[:, 0], drop)

    def condition(self, teacher):
        """The condition by label, whose table are ids or the averaged prototypes."""
        if self.cfg.condition == "label":
            return Condition("label", torch.arange(self.cfg.K + 1, device=self.prototypes.device))
        c = F.normalize(teacher.prototypes.detach(), dim=1)
        return Condition("vector", with_null(c, 0))

    def map_condition(self, maps):
        """The condition by row of maps of labels [N, h, w]."""
        return Condition("map", with_null(maps, self.cfg.K), self.cfg.K, self.size)

    def facts(self, teacher):
        return dict(bank=self.condition(teacher).state()) if self.cfg.condition == "prototype" else {}

    @torch.no_grad()
    def after(self, teacher, beta):
        """Unit prototypes; averaged parameters, and buffers as they are."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        move_average(list(teacher.parameters()), list(self.parameters()), beta)
        teacher.prototypes.copy_(F.normalize(teacher.prototypes, dim=1))
        for a, b in zip(teacher.buffers(), self.buffers()):
            a.copy_(b)

    def report(self, ema, teacher):
        return labeller_report(self, ema, teacher)

    def words(self, line):
        return report_in_words(line)

    def grid(self, ema, teacher):
        """Ten images per label, or per map of a watched image."""
        if self.cfg.condition == "patch":
            labels = watched_labels(self, ema, teacher)[0][:12].repeat_interleave(10, 0)
        else:
            labels = every_tenth(self.cfg.K)[:, None]
        keep = torch.zeros(len(labels), dtype=torch.bool, device=self.prototypes.device)
        return self.tell(labels.to(keep.device), keep, teacher)


def watched_labels(labeller, ema, teacher):
    """As `label_images` of the watched images, by each process for itself."""
    images = np.asarray(labeller.inputs[labeller.rows])
    return label_images(ema, teacher, images, np.arange(len(images)), labeller.context, "watched")


def labeller_report(labeller, ema, teacher):
    """For the log: what tells a healthy labeller from a collapsed one; NMI with the classes only as a monitor."""
    sums = labeller.ranks.total(labeller.sums.clone())
    labeller.sums.zero_()
    found, _, alike, _ = watched_labels(labeller, ema, teacher)                   # [n, P]
    ids = found if labeller.settled is None else labeller.settled[labeller.rows].cpu().long()
    K, middle = labeller.cfg.K, math.isqrt(labeller.patches) // 2
    counts = torch.bincount(ids.flatten(), minlength=K)
    now = square(ids)[:, middle, middle]                  # of a map: the label in its middle
    before = labeller.watched[:len(ids)].cpu()
    line = dict(sk_loss=float(sums[0] / sums[2]), ln_K=math.log(K), target_entropy=float(sums[1] / sums[2]),
                used=float((counts > 0).float().mean()), label_entropy=size_entropy(counts.numpy()),
                churn=float((before != now).float().mean()) if (before >= 0).all() else None)
    labeller.watched[:len(ids)] = now.to(labeller.watched.device)
    if labeller.settled is not None:                      # does the head tell the labels that stay?
        line["settled"] = float((found == ids).float().mean())
    if labeller.classes is not None and labeller.patches == 1:
        line["nmi"] = nmi(now.numpy(), labeller.classes)
    few = math.exp(line["label_entropy"] * math.log(K)) < max(1.5, 0.1 * K)      # labels hold nearly all images
    return line | dict(mean_cosine=alike, collapsed=uniform_targets(line) or few)


def report_in_words(line):
    """A report for the screen."""
    text = f"  SK {line['sk_loss']:.3f} (ln K {line['ln_K']:.2f})  in use {line['used']:.0%}"
    for name, key in (("churn", "churn"), ("NMI", "nmi"), ("as settled", "settled")):
        text += f"  {name} {line[key]:.2f}" if line.get(key) is not None else ""
    if not line["collapsed"]:
        return text
    if uniform_targets(line):
        return (f"{text}\nWARNING: the labels have collapsed: the targets do not tell images apart. Try a smaller "
                "sk_eps or sk_weight, or another sk_t")
    return (f"{text}\nWARNING: the labels have collapsed: nearly all images share a few. Try a larger sk_eps or "
            "sk_queue, a smaller sk_weight or K, or another sk_t")


def uniform_targets(line):
    """Whether targets tell images apart no more: what balancing makes of a head that maps all images to one place."""
    return line["target_entropy"] > 0.95 * line["ln_K"]


def rows_of_map(f):
    """Features [B, D] or maps [B, D, h, w] -> float32 rows [B, D] or [B h w, D]."""
    return f.float() if f.dim() == 2 else f.float().movedim(1, 3).flatten(0, 2)


def square(labels):
    """Labels of patches [B, P] as maps [B, h, w]."""
    side = math.isqrt(labels.shape[1])
    return labels.reshape(-1, side, side)


@torch.no_grad()
def label_images(net, labeller, images, rows, context, purpose, ranks=ALONE):
    """(labels int64 [n, P], their scores float32 [n, P], mean cosine between h, potentials [K]) of images; on the CPU.

    By an averaged network and labeller: at sk_t, without a condition, each process its rows. Labels are balanced over
    all images of this call, on all ranks, unless the labeller has potentials: one image alone, or other images, cannot
    be balanced.
    """
    cfg, device = labeller.cfg, labeller.prototypes.device
    batch = min(256, cfg.micro or max(1, cfg.batch // ranks.world))
    parts = []
    for part, got in stream(net, dict(path=cfg.path), images, rows, [labeller.name], [cfg.sk_t], device=device,
                            context=context, pool=labeller.pool, seed=cfg.seed, purpose=f"online {purpose}",
                            batch=batch):
        h = labeller.embed(rows_of_map(got[labeller.name, cfg.sk_t])).unflatten(0, (len(part), -1))      # [b, P, d]
        large = 4 * len(rows) * h[0].numel() > 1e9        # patches of many images: in half precision, off the GPU
        parts.append(h.half().cpu() if large else h)
    h = torch.cat(parts) if parts else labeller.prototypes.new_zeros(0, 1, cfg.sk_dim)                 # [n, P, d]
    size = 2048 if h.dtype == torch.float32 else 2 ** 16

    def blocks():                                         # the scores of all, [n P, K], are never held at once
        return (labeller.scores(part.to(device).float()) for part in h.flatten(0, 1).split(size))

    g = labeller.potentials
    if g is None:
        g = potentials(blocks, cfg.sk_eps, 50, ranks)
    ids, scores = [], []
    for S in blocks():
        best = (S / cfg.sk_eps - g).argmax(1, keepdim=True)
        ids.append(best)
        scores.append(S.gather(1, best))
    alike = float(h.mean((0, 1), dtype=torch.float32).square().sum()) if len(h) else 0.0
    ids, scores = (torch.cat(v).view(h.shape[:2]).cpu() for v in (ids, scores))
    return ids, scores, alike, g


def check_online(run, cfg):
    """Combinations of online keys that cannot work."""
    require(cfg.condition not in ("box", "mask", "set"), cfg, "condition labels",
            "boxes, masks and sets come from a label file")
    require(not cfg.recompute or cfg.sk_grad == "head", cfg, "recompute sk_grad",
            "features with gradients stop inside the network: use recompute=false")
    share, every = cfg.batch // run.world, round(1 / cfg.sk_share)
    if share % every or abs(every * cfg.sk_share - 1) > 0.01:
        raise UserError(f"sk_share={cfg.sk_share}: must be 1 / n with n a divisor of the {share} images per process "
                        "and update")
    require(cfg.sk_window[0] <= cfg.sk_window[1], cfg, "sk_window", "two times in order")
    require(cfg.condition == "none" or cfg.switch < cfg.images, cfg, "switch images",
            "labels would never be used: switch comes before images, or condition=none")
    require(not cfg.sk_until or cfg.sk_freeze < cfg.sk_until < cfg.images, cfg, "sk_until sk_freeze images",
            "labels settle after prototypes have moved (sk_freeze), and before training ends; sk_until=0 never settles")
    some = round(cfg.batch * cfg.sk_share) + cfg.sk_queue
    if cfg.condition != "patch" and some < cfg.K:
        run.say(f"note: {some} images balance K={cfg.K} labels at a time (batch x sk_share + sk_queue): not every "
                "label can have one; a longer sk_queue helps")
    file = run.dir / "labels" / f"{cfg.name}.json"        # written at the end; others' labels are not ours to replace
    if cfg.condition != "patch" and not cfg.overwrite and file.exists():
        if "online" not in read_json(file, "delete it").get("recipe", {}):
            raise UserError(f"{file}: labels of this name were made by another program; choose another name=, or "
                            "overwrite=true")


def online_conditions(cfg):
    """What labels found online are to the network, as `build_model` wants it."""
    return dict(label=dict(num_labels=cfg.K), prototype=dict(vector_dim=cfg.sk_dim),
                patch=dict(layout_channels=cfg.K), none={})[cfg.condition]


def finish_online(run, cfg, net, labeller, state, folder, data):
    """Label every image by the finished averages: labels, scores and pictures into the run, facts into the state."""
    settled = labeller.settled                            # these labels stay; others the head tells
    net.load_state_dict(state["ema"])
    labeller.load_state_dict(state["labeller_ema"])
    net.eval()
    labeller.eval()
    context, splits = autocast(run, cfg.precision)[0], dict(train=data, test=load_data(run, "test"))
    labels, typical = {}, None
    for split, d in splits.items():                       # test images under the potentials of the training images
        found = label_images(net, labeller, d.inputs, run.share(len(d)), context, split, run)
        labeller.potentials = found[3]
        ids, scores = (np.concatenate(run.gather(v.numpy())) for v in found[:2])
        if split == "train":
            typical = scores.mean(1)
            ids = ids if settled is None else settled.cpu().numpy().astype(ids.dtype)
        labels[split] = ids[:, 0] if ids.shape[1] == 1 else square(ids).astype(np.int16)
    if cfg.condition == "patch":                          # some maps stand for the distribution of all
        state |= bank_facts(labeller.map_condition(torch.from_numpy(labels["train"])).bank(cfg.seed))
        if run.rank == 0:
            segments_sheet(folder / "segments.png", cfg, data.images, labels["train"])
    else:
        about = dict(online=dict(checkpoint=f"guided/{cfg.name}", hash=state["weights"]))
        save_labels(run, cfg.name, splits, labels, cfg.K, typical, dict(online=state["weights"]), {}, about)
        scores = score_labels(labels["train"], np.asarray(data.classes))
        state["label_scores"] = {name: float(v) for name, v in scores.items()}
        state["marginal"] = torch.from_numpy(np.bincount(labels["train"], minlength=cfg.K) / len(data))
    if run.rank == 0:
        with atomic(folder / "labels.npz") as f:
            np.savez(f, num_labels=cfg.K, **labels)
    state |= dict(label_digest=digest(labels["train"]), potentials=labeller.potentials)
    save_checkpoint(run, folder, {name: v for name, v in state.items() if name != "file"})


def segments_sheet(path, cfg, images, maps, n=40):
    """A picture of images and the labels of their patches in colours."""
    colours = np.random.default_rng(3).integers(40, 256, (cfg.K, 3)).astype(np.uint8)
    zoom = images.shape[2] // maps.shape[1]
    tiles = []
    for image, ids in zip(images[:n], maps[:n]):
        tiles += [image, colours[ids.repeat(zoom, 0).repeat(zoom, 1)].transpose(2, 0, 1)]
    save_grid(path, np.stack(tiles), 10, head=f"{cfg.name}: images and the labels of their patches")


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights

def initial_weights(run, cfg, net, labels):
    """Load init= into a network; what the checkpoint says of it. labels: digest of the training labels, or None."""
    source = load_checkpoint(run, cfg.init)
    if fill("model", Model, source["model"]) != run.model:
        raise UserError(f"init={cfg.init}: its model section differs from the configured one ({source['file']})")
    if source["num_labels"] and source.get("labels") != labels:
        raise UserError(f"init={cfg.init}: was trained with other labels ({source.get('label_file')}) than "
                        f"labels={cfg.labels}; start from an unconditional model")
    for name in ("path", "predict"):
        if source[name] != getattr(cfg, name):
            raise UserError(f"{name}={getattr(cfg, name)}: the initial weights of {source['file']} were trained with "
                            f"{name}={source[name]}; set train_guided.{name} or init=")
    load_pretrained(net, source["ema"])
    return dict(checkpoint=cfg.init, weights=source["weights"], seen=source["seen"])


def load_pretrained(net, state):
    """Copy averaged weights of an unconditional model into a fresh network that has conditions besides.

    With the null condition it starts as it was (the U-ViT nearly so: one more token takes part). What conditions added
    keeps its random values; label rows have unit variance, as in a network trained from scratch: from rows near zero,
    which Adam moves by no more than lr per update, short fine-tuning learns hardly any label. Null vectors and layouts
    are zeros, so they add nothing.
    """
    own, state = net.state_dict(), dict(state)
    position, first = "pos_embed", "input_blocks.0.0.weight"
    if position in own and position in state and own[position].shape[1] == state[position].shape[1] + 1:
        state[position] = F.pad(state[position], (0, 0, 1, 0))                   # U-ViT: a condition token comes first
    if first in own and first in state and own[first].shape[0] == state[first].shape[0]:
        # U-Net: channels of a layout come behind those of the image
        state[first] = torch.cat([state[first], own[first][:, state[first].shape[1]:]], 1)
    added = {k for k in own if k.split(".")[0] in ("label_emb", "vector_emb", "layout_embed") and k not in state}
    wrong = (set(own) - added) ^ set(state)
    wrong |= {k for k in own if k in state and own[k].shape != state[k].shape}
    if wrong:
        raise UserError(f"init: the checkpoint is of another architecture (first difference: {min(wrong)})")
    net.load_state_dict({k: v if k in added else state[k] for k, v in own.items()})
    if "label_emb.weight" in added:
        with torch.no_grad():
            net.label_emb.weight[-1] = 0                  # the null label


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def check_names(run, cfg):
    """Names inside the run folder; an empty name= is that of the labels."""
    check_name("labels", cfg.labels)
    if cfg.init and not cfg.init.endswith(".pt"):
        check_name("init", cfg.init, parts=2)
    cfg.name = cfg.name or ("unconditional" if cfg.labels == "none" else cfg.labels)
    run.sections[run.stage]["name"] = cfg.name


def used_keys(cfg):
    """The settings that decide about the result: what labels of a file or no labels never read locks nothing."""
    online = {"K", "switch", *(name for name in vars(cfg) if name.startswith("sk_"))}
    unused = {"none": online | {"drop", "condition"}, "online": set()}.get(cfg.labels, online)
    return {name: value for name, value in vars(cfg).items() if name not in unused}


def main():
    """Train with guidance, from the command line."""
    run = start("train_guided", TrainGuided, __doc__)
    cfg = run.cfg
    check_training(run, cfg)
    check_names(run, cfg)
    online = cfg.labels == "online"
    folder, data = run.dir / "guided" / cfg.name, load_data(run, "train")

    # what the network is told: nothing, labels of a file, or labels that are found
    if cfg.labels == "none":
        labeller, conditions, facts = Guide(), {}, dict(condition="none")
    elif online:
        check_online(run, cfg)
        conditions = online_conditions(cfg)
        facts = dict(condition=cfg.condition, num_labels=cfg.K if conditions else 0)
    else:
        labeller, conditions, facts = given_labels(run, cfg, data)

    # network: from scratch, or from unconditional weights
    channels, size = input_shape(run)
    net = build_model(run.model, size, channels, seed=cfg.seed, **conditions)
    init = initial_weights(run, cfg, net, facts.get("labels")) if cfg.init else None
    if run.dry_run:
        return say_training(run, cfg, net, channels, size, folder)
    net = placed(net, run.device, cfg.compile)
    if online:
        labeller = Labeller(cfg, net, matching(net, [cfg.sk_activation])[-1], size, channels)
        facts["sk_activation"] = labeller.name

    # train; the checkpoint carries all that sampling needs
    run.sections[run.stage] = used_keys(cfg)
    state = new_state(run, "guided", data, size, channels, conditions=conditions, init=init, label_file=cfg.labels,
                      **facts)
    with locked(run, "guided", cfg.name):
        state = fit(run, cfg, net, folder, data, state, labeller)
        if "labels" in facts and run.rank == 0:
            with atomic(folder / "labels.npz") as f:
                np.savez(f, **load_labels(run, cfg.labels)[0])
        if online and "label_digest" not in state:        # not labelled by these very weights yet
            gpu_flags(training=False)                     # in full float32, as sample_ode.py will
            finish_online(run, cfg, net, labeller, state, folder, data)

    # close
    rows = " (one row per label or layout)" if conditions else ""
    run.say(f"model in {folder}, sample grids{rows} in {folder / 'samples'}")
    guidance = " guidance=1,1.5,2,3" if conditions else ""
    run.next(f"sample_ode.py checkpoint=guided/{cfg.name} name={cfg.name}{guidance}")


if __name__ == "__main__":
    cli(main)

"""Train with guidance: images and self-labels in, a model with classifier-free guidance out.

Reads   data/train, labels/<labels>.npz (self_label.py), and to start from diffusion/base (init=, train_diffusion.py)
Writes  guided/<name>/: checkpoint, log and sample grids as train_diffusion.py; labels=online also labels.npz, found at
        the end, and but for condition=patch labels/<name>.npz with scores and contact sheet
Time    t = 0 is noise, t = 1 is data.   Null label = K, the number of labels.

    python train_guided.py configs/shapes.yaml labels=kmeans                     # CPU, about a minute
    python train_guided.py configs/cifar10.yaml labels=kmeans                    # one GPU, from scratch
    torchrun --nproc_per_node=8 train_guided.py configs/cifar10.yaml labels=online
    python train_guided.py configs/shapes.yaml labels=none                       # without labels: the baseline

The loss is that of train_diffusion.py with a condition: each image's label, replaced by the null label with
probability `drop`, image by image (arXiv 2207.12598). One network thereby learns v(x_t, t, label) and v(x_t, t, null);
sample_ode.py mixes the two.

labels=online (arXiv 2312.08825): a head on the network's own features scores every image against K prototypes,
Sinkhorn-Knopp turns the scores of the averaged network into balanced targets, and from `switch` on the label found for
an image is its condition. From `sk_until` on, images keep theirs.

`Condition`, `GivenLabels` and the loop are in train_diffusion.py.
"""
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from configs.data import input_shape, load_data, load_labels, require_shape
from configs.run import (ALONE, Model, UserError, atomic, autocast, check_name, cli, digest, fill, gpu_flags, key,
                         locked, read_json, reading, require, seeded, start)
from train_diffusion import (PATHS, Condition, Conditioner, GivenLabels, Training, build_model, check_training, diffuse,
                             fit, load_checkpoint, new_state, save_checkpoint, say_training, ten_of_each, with_null)
from extract_features import matching, reader, stream
from self_label import Labels, assign, filled, nmi, potentials, save_labels, score_labels, sinkhorn, size_entropy


@dataclass
class TrainGuided(Training):
    """Section `train_guided`. K, switch and sk_ keys are of labels=online."""
    name: str = key("", "results go to guided/<name>; empty = the name of the labels (`unconditional` for none)")
    labels: str = key("kmeans", "labels/<labels>.npz; none = train without labels, as a control; online = find them")
    drop: float = key(0.1, "probability of the null label, decided per image", low=0, high=1)
    init: str = key("diffusion/base", "start from these averaged weights; empty = from scratch")
    condition: Literal["label", "box", "mask", "set", "prototype", "patch", "none"] = key("label",
        "what the network is told of an image: label = its id; box, mask = also the file's; set = clusters of all its "
        "boxes (objects=2 or more); online only: prototype = a vector, patch = a map of labels, none = nothing, the "
        "Sinkhorn loss alone")
    K: int = key(50, "prototypes", low=2, high=2 ** 15 - 1)
    switch: int = key(20_000, "images seen before conditions begin; until then every image has the null one", low=0)
    sk_activation: str = key("mid*-out", "the feature's name; of several that match the last one")
    sk_t: float = key(0.85, "time of an image in the teacher pass, by the averaged network", low=0, high=1)
    sk_window: list[float] = key([0.8, 0.9], "times at which the trained network must predict the target",
                                 low=0, high=1, count=2)
    sk_weight: float = key(1.0, "weight of the Sinkhorn loss", low=0)
    sk_ratio: float = key(0.05, "sk_grad=backbone: in place of a weight, what its gradient in the network is to be of "
                                "the whole one, in norm; 0 = by the weight", low=0, high=1)
    sk_grad: Literal["head", "backbone"] = key("head", "how far its gradient reaches")
    sk_ramp: int = key(20_000, "images over which the weight rises", low=0)
    sk_freeze: int = key(5_000, "images before prototypes move", low=0)
    sk_until: int = key(0, "images after which every training image keeps its label; 0 = labels move to the end", low=0)
    sk_queue: int = key(1_024, "rows of earlier features that help to balance, 0 = none; running statistics reach as "
                               "far back, but at least four updates", low=0)
    sk_eps: float = key(0.05, "entropic regularisation of the targets", low=1e-4)
    sk_iterations: int = key(3, "Sinkhorn iterations", low=1)
    sk_temperature: float = key(0.1, "of the prediction", above=0)
    sk_dim: int = key(64, "width of head output and prototypes", low=1)


# ---------------------------------------------------------------------------------------------------------------------
# Labels of a file become conditions

def given_labels(run, cfg, data, labels, info):
    """Of what `load_labels` gives: (GivenLabels, known: sizes for `build_model`, facts for the checkpoint)."""
    require(cfg.condition in ("label", "box", "mask", "set"), cfg, "condition labels",
            "prototypes and patches exist with labels=online only; here label, box, mask or set")
    ids, K = labels["train"], info["num_labels"]          # int64 [N]
    table = with_null(torch.from_numpy(ids), K)
    facts = dict(labels_hash=digest(ids), label_scores=info.get("scores", {}), condition=cfg.condition, num_labels=K,
                 label_file_hash=info.get("hash"))        # with boxes and masks
    if cfg.condition == "label":
        facts["marginal"] = torch.from_numpy(np.bincount(ids, minlength=K) / len(ids))          # float64 [K]
        of_images, of_samples = Condition("label", table), Condition("label", torch.arange(K + 1))
        return GivenLabels(of_images.to(run.device), of_samples.to(run.device), cfg.drop), dict(num_labels=K), facts
    if cfg.condition == "set":
        sets = label_sets(labels, K, cfg.labels)
        of_images = Condition("vector", with_null(torch.from_numpy(sets), 0))
        known, facts["layout_hash"] = dict(vector_dim=K), digest(sets)
    else:
        maps, channels = layout_maps(run, cfg, labels, info, data)
        of_images = Condition("map", with_null(torch.from_numpy(maps), channels), channels, data.images.shape[2], table)
        known, facts["layout_hash"] = dict(num_labels=K, layout_channels=channels), digest(maps)
    of_samples = of_images.bank(cfg.seed)
    facts |= bank_facts(of_samples)
    return GivenLabels(of_images.to(run.device), of_samples.to(run.device), cfg.drop), known, facts


def bank_facts(bank):
    """What a checkpoint needs to be sampled by a bank of conditions, each as often as the others."""
    share = torch.full((bank.null,), 1 / bank.null, dtype=torch.float64)
    return dict(bank=bank.state(), marginal=share)


def label_sets(labels, K, name):
    """Clusters of each training image's boxes, bool [N, K], from a label file's ids_train [N, objects], -1 = none."""
    if "ids_train" not in labels:
        raise UserError(f"condition=set: labels/{name}.npz has no ids_train, several labels per image; make them with "
                        "self_label.py objects=2 and method=lost or masks")
    ids = np.asarray(labels["ids_train"])
    sets = np.zeros((len(ids), K + 1), bool)
    sets[np.arange(len(ids))[:, None], ids] = True        # -1 is the last column
    return sets[:, :K]


def layout_maps(run, cfg, labels, info, data):
    """(maps uint8 [N, H, W], their channels) of the label file's boxes or masks; of method=classes the ground truth's.

    Of boxes 0 is inside, 1 = null outside; of masks 0 is no object, a channel of its own.
    """
    require(not run.data.latents, cfg, "condition", "boxes and masks are drawn on pixels; with data.latents use label")
    kind = {"box": "boxes", "mask": "masks"}[cfg.condition]
    truth = info.get("recipe", {}).get("method") == "classes"
    found = labels.get(f"{kind}_train", getattr(data, kind) if truth else None)
    if found is None:
        raise UserError(f"condition={cfg.condition}: labels/{cfg.labels}.npz has no {kind} of the training images; "
                        "make them with self_label.py")
    if cfg.condition == "box":
        boxes = np.reshape(found, (len(found), -1, 4)).swapaxes(0, 1)            # [objects, N, 4]
        inside = sum(filled(one, data.images.shape[2]) for one in boxes) > 0
        return np.uint8(~inside), 1
    masks = np.array(found, np.uint8)
    void = masks == 255
    require(truth or not void.any(), cfg, "labels condition", "its masks hold 255; clusters go from 0 to 254")
    channels = max(int(masks[~void].max(initial=0)) + 1, 2)
    masks[void] = channels                                # nothing there
    return masks, channels


# ---------------------------------------------------------------------------------------------------------------------
# Labels that are found while training

class Standardised(nn.Module):
    """Features less their running mean, over their running standard deviation: images differ little beside the mean."""

    def __init__(self, width, length):
        super().__init__()
        self.length = length                              # running averages remember about so many rows
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, f):                                 # [n, D]
        return (f - self.mean) / (self.var + 1e-6).sqrt()

    @torch.no_grad()
    def learn(self, f, updates, ranks):
        """Take in the rows f [n, D] of all processes."""
        n = len(f) * ranks.world
        mean, square = ranks.total(torch.stack([f.sum(0), f.square().sum(0)]).double()) / n
        # the plain mean of the first updates, then an exponential one over `length` rows, or four updates if longer
        weight = max(n / max(self.length, 4 * n), 1 / (updates + 1))
        apart = (mean - self.mean).square()               # of this update's mean, from that of all before
        self.var.lerp_(((square - mean.square()).clamp(min=0) + (1 - weight) * apart).float(), weight)
        self.mean.lerp_(mean.float(), weight)


class Queue(nn.Module):
    """The rows of the last updates, the same on every process."""

    def __init__(self, length, width):
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, width))

    def held(self, n, updates, ranks):
        """This process's part of what is there after so many updates of n rows a process, [m, d]."""
        return self.rows[:updates * n * ranks.world][ranks.rank::ranks.world]

    def add(self, h, updates, ranks):
        """Put in the rows h [n, d] of all processes, in order of image number."""
        every = h.new_zeros(ranks.world, *h.shape)
        every[ranks.rank] = h
        h = ranks.total(every).flatten(0, 1)[-len(self.rows):]
        places = updates * len(h) + torch.arange(len(h), device=h.device)
        if len(self.rows):
            self.rows[places % len(self.rows)] = h


class Labeller(Conditioner):
    """Finds K labels in a network's features while both train (arXiv 2312.08825), over the batches of all processes.

    Teacher: the averaged network and labeller, an image at time sk_t, the null condition. Its scores, balanced by
    Sinkhorn-Knopp, are the targets q. Student: the trained network and labeller, other noise, a time in sk_window, the
    null condition. Of its h and c:

        loss = - mean_i sum_k q_ik log softmax_k(h_i . c_k / temperature)

    The targets use every label equally often, so one answer for all images costs at least ln K.
    Standardised features pass an MLP without batch statistics of its own; h and prototypes c have unit length. An image
    has one label, or with condition=patch one for each of P patches; otherwise P = 1.

    Sizes: b images of this process, hence n = b P rows; D channels of the feature; d = sk_dim. update: how many updates
    came before. ema, labeller_ema: the averaged network, the averaged labeller.
    """
    spare = 1, 2                                          # a uniform: the student's time; two noises: one a pass
    WATCHED = 2048                                        # images whose labels the log follows
    HIDDEN = 256                                          # width inside the head

    def __init__(self, cfg, net, name, size, channels=3):
        super().__init__()
        self.cfg, self.name, self.size = cfg, name, size
        device = next(net.parameters()).device
        with torch.no_grad():                             # the feature's shape, by looking
            x, t = torch.zeros(1, channels, size, size, device=device), torch.ones(1, device=device)
            _, width, h, w = reader(net, [name], "none")(x, t)[0].shape
        self.patches = h * w if cfg.condition == "patch" else 1
        self.pool = "none" if cfg.condition == "patch" else "mean"
        with seeded(cfg.seed, "labeller"):
            self.head = nn.Sequential(nn.Linear(width, self.HIDDEN), nn.SiLU(), nn.Linear(self.HIDDEN, cfg.sk_dim))
            self.prototypes = nn.Parameter(F.normalize(torch.randn(cfg.K, cfg.sk_dim), dim=1))
        self.standardised = Standardised(width, cfg.sk_queue)
        self.queue = Queue(cfg.sk_queue, cfg.sk_dim)      # of h, re-scored with the prototypes as they are
        self.register_buffer("watched", torch.full((self.WATCHED,), -1))         # labels when the log was last written
        self.to(device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)           # loss, entropy, updates since then
        self.ratio = cfg.sk_ratio if cfg.sk_grad == "backbone" else 0
        if self.ratio:
            self.register_buffer("norm", torch.zeros((), device=device))         # of the network's last gradient
        self.settled = None                               # int16 [N, P]: labels of all training images, once they stay
        self.ranks, self.context = ALONE, nullcontext

    def get_extra_state(self):                            # beside parameters and buffers
        return self.settled

    def set_extra_state(self, settled):
        self.settled = None if settled is None else settled.to(self.prototypes.device)

    def begin(self, run, data, context):
        """Find labels in these training images; the log follows some of them."""
        self.ranks, self.context, self.inputs = run, context, data.inputs
        self.watched_rows = np.unique(np.linspace(0, len(data.inputs) - 1, self.WATCHED).astype(int))
        self.classes = np.asarray(data.classes[self.watched_rows])               # a monitor; -1: not known

    def step(self, net, ema, labeller_ema, batch):
        """(weighted Sinkhorn loss, what the network is told), the same for any number of processes.

        From `sk_until` on images keep the labels that `settled_labels` gives them at that moment; there is no teacher
        any more. The head learns on: it is to label images that are not in training, as those of the test set.
        """
        cfg, update = self.cfg, batch.seen // self.cfg.batch
        if 0 < cfg.sk_until <= batch.seen:
            labels = self.settled_labels(ema, labeller_ema, batch)               # [n]
            targets = F.one_hot(labels, cfg.K).float()    # [n, K]
        else:
            h = self.teacher_pass(ema, labeller_ema, batch, update)              # [n, d]
            targets = self.balance(labeller_ema, h, update)
            labels = targets.argmax(1)
        loss = self.student_loss(net, batch, targets)
        weight = 1.0 if self.ratio else cfg.sk_weight * self.risen(batch.seen)
        dropped = batch.coin < (cfg.drop if batch.seen >= cfg.switch else 1.0)   # bool [b]; before `switch` all
        return weight * loss, self.tell(labels.view(-1, self.patches), labeller_ema, dropped)

    def risen(self, seen):
        """How far the weight of the loss, or its ratio, has risen, up to 1."""
        return min(1.0, (seen + 1) / max(self.cfg.sk_ramp, 1))                   # + 1: for sk_ramp = 0

    def wanted(self, seen):
        return self.ratio * self.risen(seen) * self.norm if self.ratio else None

    def teacher_pass(self, ema, labeller_ema, batch, update):
        """Unit vectors h [n, d] of images, by the averages; no condition, so that a label is never read off itself.

        First the running mean and deviation take in these rows.
        """
        with torch.no_grad(), self.context():
            f = self.feature(ema, batch.x, batch.spare_z[:, 0], torch.full_like(batch.t, self.cfg.sk_t))
        self.standardised.learn(f, update, self.ranks)
        labeller_ema.standardised.load_state_dict(self.standardised.state_dict())              # the next lines use it
        with torch.no_grad():
            return labeller_ema.embed(f)

    @torch.no_grad()
    def balance(self, labeller_ema, h, update):
        """Soft targets [n, K] of rows h [n, d], balanced with the queue, which then takes in h."""
        rows = torch.cat([h, self.queue.held(len(h), update, self.ranks)])
        q = sinkhorn(labeller_ema.scores(rows), self.cfg.sk_eps, self.cfg.sk_iterations, self.ranks)
        self.queue.add(h, update, self.ranks)
        return q[:len(h)]

    def student_loss(self, net, batch, targets):
        """Cross entropy between targets [n, K] and the trained network's prediction, under other noise."""
        cfg = self.cfg
        low, high = cfg.sk_window
        t = low + (high - low) * batch.spare_u[:, 0]
        with torch.set_grad_enabled(cfg.sk_grad == "backbone"), self.context():
            f = self.feature(net, batch.x, batch.spare_z[:, 1], t)
        h = self.embed(f)
        fixed = batch.seen < cfg.sk_freeze or self.settled is not None           # prototypes of settled labels stay
        prototypes = F.normalize(self.prototypes.detach() if fixed else self.prototypes, dim=1)
        logp = F.log_softmax(h @ prototypes.T / cfg.sk_temperature, 1)
        loss = -(targets * logp).sum(1).mean()            # every process has equally many rows
        entropy = -(targets * targets.clamp(min=1e-12).log()).sum(1).mean()
        self.sums += torch.stack([loss.detach(), entropy, torch.ones_like(loss)]).double()
        return loss

    def feature(self, net, x, z, t):
        """Feature rows float32 [n, D] of images x under noises z at times t [b].

        `micro` images go through the network at once; with gradients, all.
        """
        read = reader(net, [self.name], self.pool)
        micro = len(x) if torch.is_grad_enabled() else self.cfg.micro or len(x)
        parts = zip(diffuse(PATHS[self.cfg.path], x, z, t).split(micro), t.split(micro))
        return rows_of_map(torch.cat([read(x_t, time)[0] for x_t, time in parts]))

    def embed(self, f):
        """Feature rows [n, D] -> unit vectors h float32 [n, d]."""
        return F.normalize(self.head(self.standardised(f)), dim=1)

    def scores(self, h):
        """Cosines with the prototypes, [n, K]."""
        return h @ F.normalize(self.prototypes, dim=1).T

    def settled_labels(self, ema, labeller_ema, batch):
        """The labels [n] that images keep, found now if they are not yet; maps are mirrored with their images."""
        if self.settled is None:                          # by the averages as they are, under one draw of noise
            rows = self.ranks.share(len(self.inputs))
            ids = label_images(ema, labeller_ema, self.inputs, rows, self.context, "settle", self.ranks)[0]
            ids = np.concatenate(self.ranks.gather(ids.numpy().astype(np.int16)))
            self.settled = torch.from_numpy(ids).to(batch.rows.device)
        labels = self.settled[batch.rows].long()          # [b, P]
        mirrored = square(labels).flip(2).flatten(1)
        return torch.where(batch.flip[:, None], mirrored, labels).flatten()

    def tell(self, labels, labeller_ema, dropped=None):
        """Keyword arguments of the network for labels int64 [B, P]; dropped: bool [B]."""
        if self.cfg.condition == "none":
            return {}
        if self.cfg.condition == "patch":
            return self.of_maps(square(labels))(torch.arange(len(labels), device=labels.device), dropped)
        return self.of_labels(labeller_ema)(labels[:, 0], dropped)

    def of_labels(self, labeller_ema):
        """The condition whose row k is label k: the id itself, or the averaged prototype."""
        if self.cfg.condition == "label":
            return Condition("label", torch.arange(self.cfg.K + 1, device=self.prototypes.device))
        return Condition("vector", with_null(F.normalize(labeller_ema.prototypes.detach(), dim=1), 0))

    def of_maps(self, maps):
        """The condition whose row i is the i-th of these maps of labels [N, h, w]."""
        return Condition("map", with_null(maps, self.cfg.K), self.cfg.K, self.size)

    @torch.no_grad()
    def after(self, labeller_ema, beta, norm):
        """Unit prototypes; averaged parameters, and buffers as they are."""
        if self.ratio:
            self.norm.copy_(norm)
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        get_ema_multi_avg_fn(beta)(list(labeller_ema.parameters()), list(self.parameters()), None)
        labeller_ema.prototypes.copy_(F.normalize(labeller_ema.prototypes, dim=1))
        for a, b in zip(labeller_ema.buffers(), self.buffers()):
            a.copy_(b)

    def watched_labels(self, ema, labeller_ema):
        """The labels [n, P] of the images that the log follows, of which each process labels its share."""
        if self.settled is not None:
            return self.settled[self.watched_rows].cpu().long()
        images = np.asarray(self.inputs[self.watched_rows])
        rows = self.ranks.share(len(images))
        ids = label_images(ema, labeller_ema, images, rows, self.context, "watched", self.ranks)[0]
        return torch.cat(self.ranks.gather(ids))

    def report(self, ema, labeller_ema):
        """For the log: what tells a healthy labeller from a collapsed one; NMI with the classes only as a monitor."""
        loss, entropy, updates = self.ranks.total(self.sums).tolist()
        self.sums.zero_()
        labels, ln_K = self.watched_labels(ema, labeller_ema), math.log(self.cfg.K)
        sizes = torch.bincount(labels.flatten(), minlength=self.cfg.K).numpy()
        middle = math.isqrt(self.patches) // 2            # of a map, this label is followed
        now, before = square(labels)[:, middle, middle], self.watched[:len(labels)].cpu()
        line = dict(sk_loss=loss / updates, ln_K=ln_K, target_entropy=entropy / updates,
                    used=float((sizes > 0).mean()), label_entropy=size_entropy(sizes))
        if before[0] >= 0:
            line["churn"] = float((before != now).float().mean())
        self.watched[:len(labels)] = now.to(self.watched.device)
        if (self.classes >= 0).all() and self.patches == 1:
            line["nmi"] = nmi(now.numpy(), self.classes)
        if line["target_entropy"] > 0.95 * ln_K:          # so it is when the head gives all images the same h
            line["warning"] = "the targets do not tell images apart; try a smaller sk_eps or sk_weight, another sk_t"
        elif line["label_entropy"] * ln_K < math.log(max(1.5, 0.1 * self.cfg.K)):
            line["warning"] = ("nearly all images share a few labels; try a larger sk_eps or sk_queue, a smaller "
                               "sk_weight or K, another sk_t")
        return line

    def grid(self, ema, labeller_ema):
        """Ten images of each label, or of each map of a watched image: twelve of them."""
        if self.cfg.condition == "patch":
            labels = self.watched_labels(ema, labeller_ema)[:12].repeat_interleave(10, 0)
        else:
            labels = ten_of_each(self.cfg.K)[:, None]
        return self.tell(labels.to(self.prototypes.device), labeller_ema)


def rows_of_map(f):
    """Features [B, D] or maps [B, D, h, w] -> float32 rows [B, D] or [B h w, D]."""
    return f.float() if f.dim() == 2 else f.float().movedim(1, 3).flatten(0, 2)


def square(labels):
    """Labels of patches [B, P] as maps [B, h, w]."""
    return labels.unflatten(1, (math.isqrt(labels.shape[1]), -1))


LABEL_ITERATIONS = 50                                     # of Sinkhorn-Knopp, where all images are labelled at once


@torch.no_grad()
def label_images(net, labeller, images, rows, context, purpose, ranks=ALONE, g=None):
    """Of the n `rows` of images: (labels int64 [n, P] on the CPU, potentials g [K]).

    By an averaged network and labeller, at sk_t, without a condition. Labels are balanced over all images of this call,
    on all ranks; given g, an image is labelled by itself.
    """
    cfg = labeller.cfg
    batch = min(256, cfg.micro or max(1, cfg.batch // ranks.world))
    features = stream(net, dict(path=cfg.path), images, rows, [labeller.name], [cfg.sk_t], batch=batch, context=context,
                      pool=labeller.pool, seed=cfg.seed, purpose=f"online {purpose}", device=labeller.prototypes.device)
    h = [labeller.embed(rows_of_map(f[labeller.name, cfg.sk_t])) for _, f in features]           # [b P, d] each
    h = torch.cat(h) if h else labeller.prototypes[:0]    # [n P, d]

    def blocks():                                         # the scores of all, [n P, K], are never held at once
        return (labeller.scores(part) for part in h.split(2048))

    g = potentials(blocks, cfg.sk_eps, LABEL_ITERATIONS, ranks) if g is None else g
    return assign(h, labeller.prototypes, offset=cfg.sk_eps * g).view(-1, labeller.patches), g


def check_online(run, cfg):
    """Combinations of online keys that cannot work."""
    require(cfg.condition not in ("box", "mask", "set"), cfg, "condition labels",
            "boxes, masks and sets come from a label file")
    require(not cfg.recompute or cfg.sk_grad == "head", cfg, "recompute sk_grad",
            "features with gradients stop inside the network: use recompute=false")
    last = (math.ceil(cfg.images / cfg.batch) - 1) * cfg.batch                   # images before the last update
    require(cfg.condition == "none" or cfg.switch <= last, cfg, "switch images batch",
            "labels would never be used: switch comes before the last update, or condition=none")
    require(not cfg.sk_until or cfg.sk_freeze + cfg.batch <= cfg.sk_until <= last, cfg,
            "sk_until sk_freeze images batch", "labels settle after prototypes have moved (sk_freeze) for an update, "
            "and before the last one; sk_until=0 never settles")
    check_labels_name(run, cfg)


def check_labels_name(run, cfg):
    """A UserError where labels of this name are not ours to replace: before training and again before writing."""
    file = run.dir / "labels" / f"{cfg.name}.npz"
    if cfg.condition != "patch" and not cfg.overwrite and file.exists():
        note = file.with_suffix(".json")
        if not note.exists() or "online" not in read_json(note, "delete it").get("recipe", {}):
            raise UserError(f"{file}: labels of this name were made by another program; choose another name=, or "
                            "overwrite=true")


def finish_online(run, cfg, net, labeller, state, folder, data):
    """Label every image by the finished averages, but those that keep theirs (sk_until): labels into the run, facts
    into the checkpoint."""
    settled = labeller.settled                            # before the average is loaded, which has none
    net.load_state_dict(state["ema"])
    labeller.load_state_dict(state["conditioner_ema"])
    net.eval()
    labels, g, context = {}, None, autocast(run, cfg.precision)[0]
    splits = dict(train=data, test=load_data(run, "test"))
    for split, d in splits.items():                       # test images under the potentials of the training images
        ids, g = label_images(net, labeller, d.inputs, run.share(len(d)), context, split, run, g)
        labels[split] = np.concatenate(run.gather(ids.numpy()))                  # [N, P]
    if settled is not None:
        labels["train"] = settled.cpu().numpy().astype(np.int64)
    if cfg.condition == "patch":                          # some maps stand for the distribution of all
        labels = {split: square(torch.from_numpy(ids)).numpy().astype(np.int16) for split, ids in labels.items()}
        state |= bank_facts(labeller.of_maps(torch.from_numpy(labels["train"])).bank(cfg.seed))
    else:
        labels = {split: ids[:, 0] for split, ids in labels.items()}
        about = dict(online=dict(checkpoint=f"guided/{cfg.name}", hash=state["weights"]))
        with locked(run, "labels", cfg.name):
            run.agreed(lambda: check_labels_name(run, cfg))
            out = Labels(labels, cfg.K, about=about)
            save_labels(run, cfg.name, splits, out, dict(online=state["weights"]))
        state["label_scores"] = score_labels(labels["train"], np.asarray(data.classes))
        state["marginal"] = torch.from_numpy(np.bincount(labels["train"], minlength=cfg.K) / len(data))
    if run.rank == 0:
        with atomic(folder / "labels.npz") as f:
            np.savez(f, num_labels=cfg.K, **labels)
    state["found_hash"] = digest(labels["train"])
    save_checkpoint(run, folder, {name: v for name, v in state.items() if name != "file"})


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights

def initial_weights(run, cfg, net, facts):
    """Load init= into a network; what the checkpoint says of it. facts: of the labels, as in `given_labels`."""
    source = load_checkpoint(run, cfg.init)
    require(fill("model", Model, source["model"]) == run.model, cfg, "init",
            f"its model section differs from the configured one ({source['file']})")
    same = "labels_hash" in facts                         # an online labeller finds others
    same &= all(source.get(k) == facts.get(k) for k in ("labels_hash", "layout_hash", "condition"))
    require(not source["num_labels"] or same, cfg, "init labels condition",
            f"was trained with condition={source.get('condition')} and labels={source.get('label_file')}, not these; "
            "start from an unconditional model")
    for name in ("path", "predict"):
        require(source[name] == getattr(cfg, name), cfg, name, f"init={cfg.init} has {name}={source[name]}")
    require_shape(run, source)
    with reading(source["file"], "init= needs a model for images of this size"):
        load_pretrained(net, source["ema"])
    return dict(checkpoint=cfg.init, weights=source["weights"],
                seen=source["seen"] + (source.get("init") or {}).get("seen", 0))                 # with those of its own


def load_pretrained(net, state):
    """Copy averaged weights of an unconditional model into a fresh network that has conditions besides.

    With the null condition it starts as it was (the U-ViT nearly so: one more token takes part). Null vectors and
    layouts are zeros, so they add nothing. What conditions added keeps its random values, of labels and vectors half:
    from scratch they have unit variance, which would drown the embedding of time that the network has learnt (its
    deviation is 0.4 to 0.8), and short fine-tuning would not repair that. Rows near zero, which Adam moves by no more
    than lr per update, would hardly become labels in that time (measured in results/).
    """
    own = net.state_dict()
    added = {k: v for k, v in own.items() if k.split(".")[0] in ("label_emb", "vector_emb", "layout_embed")}
    state = added | state
    position, first = "pos_embed", "input_blocks.0.0.weight"
    if position in own and own[position].shape[1] == state[position].shape[1] + 1:
        state[position] = F.pad(state[position], (0, 0, 1, 0))                   # U-ViT: a condition token comes first
    if first in own:                                      # U-Net: channels of a layout come behind those of the image
        state[first] = torch.cat([state[first], own[first][:, state[first].shape[1]:]], 1)
    for name in ("label_emb.weight", "vector_emb.weight"):
        if name in own and state[name] is own[name]:      # not of a model that knows these labels already
            state[name] = state[name] / 2
            if name == "label_emb.weight":
                state[name][-1] = 0                       # the null label
    net.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

ONLINE_ONLY = {"K", "switch", *(name for name in vars(TrainGuided()) if name.startswith("sk_"))}


def prepare_settings(run, cfg):
    """Check names; remove from the recipe the settings that this training does not read."""
    check_name("labels", cfg.labels)
    if cfg.init and not cfg.init.endswith(".pt"):
        check_name("init", cfg.init, parts=2)
    cfg.name = cfg.name or ("unconditional" if cfg.labels == "none" else cfg.labels)
    unread = ONLINE_ONLY | ({"drop", "condition"} if cfg.labels == "none" else set())
    if cfg.labels == "online":
        unread = {"drop", "switch"} if cfg.condition == "none" else set()
    run.sections[run.stage] = {name: value for name, value in vars(cfg).items() if name not in unread}
    given = [word for word in sys.argv[1:] if word.split("=")[0].removeprefix(f"{run.stage}.") in unread]
    if given:
        run.say(f"note: not read with labels={cfg.labels}: {' '.join(given)}")


def main():
    """Train with guidance, from the command line."""
    run = start("train_guided", TrainGuided, __doc__)
    cfg = run.cfg
    check_training(run, cfg)
    prepare_settings(run, cfg)
    folder, data = run.dir / "guided" / cfg.name, load_data(run, "train")

    # what the network is told: nothing, labels of a file, or labels that are found
    conditioner, known, facts = Conditioner(), {}, dict(condition="none")
    if cfg.labels == "online":
        check_online(run, cfg)
        known = dict(label=dict(num_labels=cfg.K), prototype=dict(vector_dim=cfg.sk_dim),
                     patch=dict(layout_channels=cfg.K), none={})[cfg.condition]
        facts = dict(condition=cfg.condition, num_labels=cfg.K if known else 0)
    elif cfg.labels != "none":
        conditioner, known, facts = given_labels(run, cfg, data, *load_labels(run, cfg.labels))

    # network: from scratch, or from unconditional weights
    channels, size = input_shape(run)
    net = build_model(run.model, size, channels, seed=cfg.seed, **known)
    init = initial_weights(run, cfg, net, facts) if cfg.init else None
    place = matching(net, [cfg.sk_activation], "sk_activation")[-1] if cfg.labels == "online" else ""
    if run.dry_run:
        return say_training(run, cfg, net, channels, size, folder)
    net = net.to(run.device)
    if cfg.labels == "online":
        conditioner = Labeller(cfg, net, place, size, channels)

    # train; the checkpoint carries all that sampling needs
    state = new_state(run, "guided", data, size, channels, known=known, init=init, label_file=cfg.labels, **facts)
    with locked(run, "guided", cfg.name):
        state = fit(run, cfg, net, folder, data, state, conditioner)
        made = [folder / "labels.npz", *([run.dir / "labels" / f"{cfg.name}.npz"] if cfg.condition != "patch" else [])]
        there = "found_hash" in state and run.agreed(lambda: all(file.exists() for file in made))
        if cfg.labels == "online" and not there:          # by these weights
            gpu_flags(training=False)                     # without TF32, as sample_ode.py
            finish_online(run, cfg, net, conditioner, state, folder, data)

    # close
    rows = " (a row for a label or layout, twelve of them)" if known else ""
    run.say(f"model in {folder}, sample grids{rows} in {folder / 'samples'}")
    run.next(f"sample_ode.py checkpoint=guided/{cfg.name} name={cfg.name}")


if __name__ == "__main__":
    cli(main)

"""Online labels: targets, gradients, teacher, queue, collapse; a toy of two clusters is found and guides; resume and two ranks."""
import dataclasses
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stage
from PIL import Image

from extract_features import matching
from configs.run import Data, Model, UserError
from configs.shapes import draw_shapes
from train_diffusion import build_model
from train_guided import Labeller, TrainGuided, augment, check_online, label_images, layout_of

UNET = Model(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16, stem=4)
UVIT = Model("uvit", channels=32, depth=2, heads=4, patch=8)
BOTH = pytest.mark.parametrize("model", [UNET, UVIT], ids=["unet", "uvit"])
IMAGES = torch.from_numpy(draw_shapes(0, np.arange(64))[0]).float() / 127.5 - 1


def online(model=UNET, **keys):
    """(cfg, network, averaged network, labeller, averaged labeller) before any training; the network is perturbed so that it is not zero anywhere."""
    cfg = TrainGuided(**dict(labels="online", K=10, batch=32, sk_dim=16, sk_hidden=32, sk_queue=64, sk_freeze=0, sk_ramp=0, switch=0) | keys)
    conditions = dict(label=dict(num_labels=cfg.K), prototype=dict(vector_dim=cfg.sk_dim), patch=dict(layout_channels=cfg.K), none={})[cfg.condition]
    nets = [build_model(model, 32, **conditions) for _ in range(2)]
    for net in nets:
        g = torch.Generator().manual_seed(3)
        for p in net.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    sides = [Labeller(cfg, nets[0], matching(nets[0], [cfg.sk_activation])[-1], 32) for _ in range(2)]
    return cfg, nets[0], nets[1].eval().requires_grad_(False), sides[0], sides[1].eval().requires_grad_(False)


def numbers(n, seed=0):
    """Noise [n, 2, 3, 32, 32] and uniforms [n, 12]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 32, 32, generator=g), torch.rand(n, 12, generator=g)


def step(parts, n=32, seen=0, **more):
    cfg, net, ema, side, teacher = parts
    z, u = numbers(n, seen)
    u = more.get("u", u)
    return side.step(net, ema, teacher, torch.arange(n), IMAGES[:n], z, u, seen, nullcontext)


def test_targets_are_balanced_and_carry_no_gradient():
    _, _, _, side, teacher = online(sk_iterations=50)
    g = torch.Generator().manual_seed(0)
    h = torch.nn.functional.normalize(torch.randn(60, 16, generator=g), dim=1).requires_grad_()
    q = side.targets(side.scores(h), side.scores(torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)))
    assert not q.requires_grad and q.shape == (60, 10) and torch.allclose(q.sum(1), torch.ones(60), atol=1e-5)
    q = side.targets(side.scores(h), side.scores(torch.zeros(0, 16)))
    assert torch.allclose(q.sum(0), torch.full((10,), 6.0), rtol=0.05)           # without a queue the batch itself is balanced


@BOTH
@pytest.mark.parametrize("reach", ["head", "backbone"])
@pytest.mark.parametrize("condition", ["label", "prototype", "patch", "none"])
def test_where_the_gradient_reaches(model, reach, condition):
    parts = online(model, sk_grad=reach, condition=condition)
    loss, cond = step(parts)
    loss.backward()
    _, net, ema, side, teacher = parts
    touched = [k for k, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    assert bool(touched) == (reach == "backbone") and all("out_blocks" not in k and "output_blocks" not in k for k in touched)   # nothing behind the feature
    assert side.prototypes.grad.any() and side.head[0].weight.grad.any()
    assert all(p.grad is None for p in [*ema.parameters(), *teacher.parameters()])
    assert {k: v.shape for k, v in cond.items()} == dict(label={"label": (32,)}, prototype={"vector": (32, 16)}, patch={"layout": (32, 10, 32, 32)}, none={})[condition]


@BOTH
def test_loss_starts_near_ln_K_and_small_eps_stays_finite(model):
    loss, _ = step(online(model, K=30, sk_temperature=1.0))
    assert abs(float(loss.detach()) - math.log(30)) < 0.5
    for eps in (0.005, 0.0005):
        loss, _ = step(online(model, sk_eps=eps, sk_iterations=20))
        assert torch.isfinite(loss)


def test_labels_do_not_depend_on_the_condition():
    """The teacher looks without a condition: neither what is dropped nor the label embedding changes what it finds."""
    parts = online(drop=0.0)
    before = step(parts)[1]["label"]
    for net in parts[1:3]:
        torch.nn.init.normal_(net.label_emb.weight[:-1].data, std=9)
    assert torch.equal(step(online(drop=0.0))[1]["label"], before)
    other = online(drop=0.0)
    other[2].label_emb.weight.data[:-1] = 9
    assert torch.equal(step(other)[1]["label"], before)
    z, u = numbers(32)
    dropped = step(online(drop=0.5), u=u)[1]["label"]
    assert torch.equal(dropped, torch.where(u[:, 2] < 0.5, 10, before)) and (dropped == 10).any()


@pytest.mark.parametrize("condition", ["label", "patch"])
def test_no_more_images_at_once_than_in_training(condition, monkeypatch):
    """micro= limits the passes that need no gradients, too, and changes nothing but rounding."""
    results = []
    for micro in (0, 8):
        parts, sizes = online(condition=condition, micro=micro), []
        for net in parts[1:3]:
            net.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
        loss, cond = step(parts)
        ids, scores, *_ = label_images(parts[2], parts[4], np.asarray(draw_shapes(0, np.arange(40))[0]), np.arange(40), nullcontext, "test")
        assert max(sizes) == (8 if micro else 32)         # 32: the batch
        results.append([loss.detach(), *cond.values(), ids, scores])
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in zip(*results))


def test_before_the_switch_every_condition_is_null():
    """The null label, a zero vector, a layout of zeros: what the network takes for no condition."""
    before, after = (step(online(switch=100), seen=seen)[1]["label"] for seen in (0, 128))
    assert (before == 10).all() and (after < 10).any()
    for condition in ("prototype", "patch"):
        cond = step(online(switch=100, condition=condition))[1]
        assert len(cond) == 1 and not next(iter(cond.values())).any()


@pytest.mark.parametrize("queue", [0, 4, 64])
def test_queue_and_batch_smaller_than_K(queue):
    parts = online(K=50, sk_queue=queue)
    for i in range(3):
        loss, _ = step(parts, seen=32 * i)
        assert torch.isfinite(loss)
    side = parts[3]
    assert len(side.queue) == queue
    if queue == 64:
        assert torch.allclose(side.queue[:24].norm(dim=1), torch.ones(24), atol=1e-5) and not side.queue[24:].any()


def test_weight_ramps_and_prototypes_freeze():
    full, _ = step(online(), seen=64)
    half, _ = step(online(sk_ramp=130), seen=64)
    assert torch.allclose(half, 0.5 * full, rtol=1e-4)
    parts = online(sk_freeze=100)
    step(parts)[0].backward()
    assert parts[3].prototypes.grad is None and parts[3].head[0].weight.grad.any()


def as_rows(x):
    """Images [-1, 1] as uint8 rows, which is how data sets hold them."""
    return (x.numpy() * 127.5 + 127.5).round().astype(np.uint8)


def watched(parts, classes=None):
    side = parts[3]
    side.images, side.classes = as_rows(IMAGES), classes
    return side.report(parts[2], parts[4], 0, nullcontext)


def test_report_tells_health_from_collapse():
    parts = online(assign="argmax")
    for i in range(2):
        step(parts, seen=32 * i)
    line = watched(parts, np.arange(64) % 10)
    assert not line["collapsed"] and line["used"] > 0.2 and line["churn"] is None and 0 <= line["nmi"] <= 1 and line["ln_K"] == math.log(10)
    assert watched(parts)["churn"] is None or watched(parts)["churn"] == 0       # nothing changed since
    for p in parts[4].head.parameters():
        p.mul_(1e-3)
    parts[4].head[-1].bias.fill_(1.0)                     # every image has nearly the same embedding
    line = watched(parts)
    assert line["mean_cosine"] > 0.999
    assert line["collapsed"] and "share a few" in parts[3].words(line) and line["used"] < 0.11


def test_collapse_under_balanced_labels_is_seen():
    parts = online(assign="sinkhorn")
    step(parts)
    line = watched(parts)
    assert not line["collapsed"] and line["target_entropy"] < 0.9 * line["ln_K"]
    for p in parts[4].head.parameters():
        p.mul_(1e-3)
    parts[4].head[-1].bias.fill_(1.0)                     # all scores alike: balanced labels use all of them, and mean nothing
    for i in range(1, 10):                                # until the queue holds nothing else
        step(parts, seen=32 * i)
    watched(parts), step(parts, seen=320)
    line = watched(parts)
    assert line["target_entropy"] > 0.99 * line["ln_K"] and line["collapsed"] and "do not tell images apart" in parts[3].words(line)


@pytest.mark.parametrize("condition", ["label", "prototype", "patch", "none"])
def test_labels_settle_after_sk_until(condition):
    """From then on an image has one label, whatever the noise and the networks become; the head learns to tell it; maps are mirrored with their images."""
    parts = online(sk_until=64, condition=condition, drop=0.0)
    cfg, _, ema, side, teacher = parts
    side.watch(SimpleNamespace(inputs=as_rows(IMAGES), classes=np.arange(64) % 10))
    step(parts, seen=32)
    assert side.settled is None and "settled" not in side.report(ema, teacher, 64, nullcontext)
    before = {k: v.clone() for k, v in side.named_buffers()}
    loss, cond = step(parts, seen=64)
    expected = label_images(ema, teacher, as_rows(IMAGES), np.arange(64), nullcontext, "settle")[0]
    assert torch.equal(side.settled.long(), expected)
    loss.backward()
    assert side.prototypes.grad is None and side.head[0].weight.grad.any()
    for p in ema.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    flips = numbers(32, 96)[1]
    again = step(parts, seen=96, u=flips)[1]
    assert all(torch.equal(v, before[k]) for k, v in side.named_buffers() if k != "watched")
    if condition == "label":
        assert torch.equal(cond["label"], expected[:32, 0]) and torch.equal(again["label"], cond["label"])
    if condition == "patch":
        maps = torch.where(flips[:, 1].reshape(-1, 1, 1) < 0.5, expected[:32].reshape(32, 4, 4).flip(2), expected[:32].reshape(32, 4, 4))
        assert torch.equal(again["layout"], layout_of(maps, 10, (32, 32)))
    line = side.report(ema, teacher, 128, nullcontext)
    assert 0 <= line["settled"] <= 1 and "as settled" in side.words(line)
    copy = Labeller(cfg, parts[1], side.name, 32)
    copy.load_state_dict(side.state_dict())
    assert torch.equal(copy.settled, side.settled)


def test_second_view():
    x, u = IMAGES[:8], numbers(8)[1][:, 4:12]
    assert torch.allclose(augment(x, u, 0.0, False), x, atol=1e-5)               # strength 0 is the identity
    view = augment(x, u, 0.8, True)
    assert view.shape == x.shape and view.abs().max() <= 1 and (view - x).flatten(1).norm(dim=1).min() > 1
    assert torch.allclose(augment(x[3:4], u[3:4], 0.8, True), view[3:4], atol=1e-5)      # each image has its own


def test_layouts_are_one_hot_with_a_null():
    ids = torch.tensor([[[0, 2], [3, 1]]])
    out = layout_of(ids, 3, (4, 4))
    assert out.shape == (1, 3, 4, 4) and torch.equal(out.sum(1)[0], torch.tensor([[1., 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]))
    assert out[0, 2, 0, 3] == 1 and out[0, 1, 3, 3] == 1


@pytest.mark.parametrize("keys", [dict(sk_share=0.3), dict(sk_share=0), dict(sk_window=[0.9, 0.8]), dict(sk_t=1.5), dict(K=1), dict(sk_eps=0.0), dict(sk_queue=-1),
                                  dict(condition="patch", sk_augment=0.5), dict(sk_share=0.7), dict(switch=10 ** 9),
                                  dict(sk_until=5_000), dict(sk_until=10 ** 9)], ids=str)
def test_impossible_requests(keys):
    class OneProcess:
        world, data = 1, Data()
    with pytest.raises(UserError, match="|".join(keys)):
        check_online(OneProcess, dataclasses.replace(TrainGuided(batch=32), **keys))


def test_too_few_images_for_all_labels_are_noted():
    said = []
    process = SimpleNamespace(world=1, data=Data(), say=said.append)
    check_online(process, TrainGuided(batch=32, K=72, sk_queue=64))
    assert not said
    check_online(process, TrainGuided(batch=32, K=73, sk_queue=64))
    assert len(said) == 1 and "72 images balance K=73" in said[0]


TOY = """
data: {source: arrays, size: 16}
model: {channels: 16, mult: [1, 2], blocks: 1, attention: [], head_channels: 16, stem: 2}
train_diffusion: {images: 32, batch: 32, precision: fp32}
train_guided: {init: "", images: 6400, batch: 32, lr: 2.0e-3, warmup: 64, ema: 512, log_every: 1600, save_every: 3200, grid_every: 6400, precision: fp32, labels: online, K: 2,
               switch: 1600, sk_dim: 8, sk_hidden: 32, sk_queue: 64, sk_freeze: 0, sk_ramp: 320, sk_t: 0.8, sk_window: [0.7, 0.9], flip: false}
sample_ode: {n: 40, steps: 8, evaluate: false, precision: fp32, labels: [0, 1]}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two clusters: reddish and bluish images with a random bright square; trained with labels found online."""
    folder = tmp_path_factory.mktemp("toy")
    g = np.random.default_rng(0)
    kind = g.integers(2, size=400)
    images = np.full((400, 16, 16, 3), 60, np.uint8) + g.integers(0, 40, (400, 1, 1, 3), dtype=np.uint8)
    images[np.arange(400), :, :, 2 * kind] += 120
    for i, (a, b) in enumerate(g.integers(0, 12, (400, 2))):
        images[i, a:a + 4, b:b + 4] = 240
    np.savez(folder / "toy.npz", images=images, classes=kind)
    (folder / "toy.yaml").write_text(TOY)
    words = [folder / "toy.yaml", f"run={folder}/run", f"data.root={folder}/toy.npz"]
    stage("train_diffusion", *words)
    stage("train_guided", *words)
    return folder, words


def test_two_clusters_are_found_and_guide(toy):
    folder, words = toy
    info = json.loads((folder / "run/labels/online.json").read_text())
    assert info["scores"]["nmi"] > 0.9, info["scores"]
    lines = [json.loads(line) for line in (folder / "run/guided/online/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["sk_loss"] < 0.5 * lines[-1]["ln_K"] and lines[-1]["used"] == 1 and not lines[-1]["collapsed"] and lines[-1]["churn"] < 0.1
    labels, classes = np.load(folder / "run/labels/online.npz")["train"], np.load(folder / "run/data/train/classes.npy")
    stage("sample_ode", *words, "checkpoint=guided/online", "name=both", "guidance=1.5")
    x = np.load(folder / "run/samples/both/images.npy").astype(float)            # labels 0, 1, 0, 1, ...
    red = (x[:, 0] - x[:, 2]).mean((1, 2)) > 0
    of_label = [np.bincount(classes[labels == k], minlength=2).argmax() == 0 for k in (0, 1)]            # is the label's cluster the reddish one?
    assert of_label[0] != of_label[1] and np.mean([red[i] == of_label[i % 2] for i in range(40)]) > 0.9


def test_like_these_images(toy):
    folder, words = toy
    stage("sample_ode", *words, "checkpoint=guided/online", "name=like", "like=test", "n=20")
    given, x = np.load(folder / "run/data/test/classes.npy")[:20], np.load(folder / "run/samples/like/images.npy").astype(float)
    red = (x[:, 0] - x[:, 2]).mean((1, 2)) > 0
    assert np.mean(red == (given == 0)) > 0.85


def test_the_label_of_an_image_does_not_depend_on_the_others(toy):
    """Balanced labels of one image alone would be a matter of rounding: new images are labelled under the prices of the training images."""
    folder, words = toy
    images, labels = np.load(folder / "run/data/test/images.npy"), np.load(folder / "run/labels/online.npz")["test"]
    (alone := folder / "alone").mkdir()
    for k in (0, 1):
        Image.fromarray(images[np.flatnonzero(labels == k)[0]].transpose(1, 2, 0)).save(alone / "one.png")
        stage("sample_ode", *words, "checkpoint=guided/online", f"name=alone{k}", f"like={alone}", "n=2")
        assert (np.load(folder / f"run/samples/alone{k}/labels.npy") == k).all()


def test_labels_of_another_program_are_not_replaced(toy):
    folder, words = toy
    stage("self_label", *words, "method=classes", "name=mine")
    refused = stage("train_guided", *words, "name=mine", ok=False)
    assert refused.returncode == 2 and "labels/mine.json" in refused.stderr and "overwrite=true" in refused.stderr


def test_two_ranks_before_the_switch(toy):
    """Prototypes come into use later: until then DDP must not wait for their gradients."""
    folder, words = toy
    keys = ["condition=prototype", "images=160", "switch=96", "log_every=160"]
    for ranks in (1, 2):
        stage("train_guided", *words, *keys, f"name=vectors{ranks}", ranks=ranks)
    one, two = (torch.load(folder / f"run/guided/vectors{n}/checkpoint.pt", weights_only=True)["ema"] for n in (1, 2))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-3


@pytest.mark.parametrize("condition", ["prototype", "patch", "none"])
def test_every_condition_trains_and_samples(toy, condition):
    folder, words = toy
    stage("train_guided", *words, f"name={condition}", f"condition={condition}", "images=640", "switch=320", "log_every=320")
    out = stage("sample_ode", *words, f"checkpoint=guided/{condition}", f"name={condition}", "n=6", "labels=marginal", "guidance=2").stdout
    assert "samples in" in out and np.load(folder / f"run/samples/{condition}/images.npy").shape == (6, 3, 16, 16)
    assert (folder / f"run/guided/{condition}/labels.npz").exists() and "done already" in stage("train_guided", *words, f"name={condition}", f"condition={condition}", "images=640",
                                                                                              "switch=320", "log_every=320").stdout


def test_a_checkpoint_samples_without_run_or_images(toy, tmp_path):
    folder, words = toy
    words = [words[0], f"run={tmp_path / 'alone'}", f"checkpoint={folder / 'run/guided/online/checkpoint.pt'}", "guidance=1.5", "n=4"]
    refused = stage("sample_ode", *words, "evaluate=true", ok=False)
    assert refused.returncode == 2 and "evaluate=false" in refused.stderr
    stage("sample_ode", *words, "name=alone")             # evaluate: false in the YAML
    assert np.load(tmp_path / "alone/samples/alone/images.npy").shape == (4, 3, 16, 16)


@pytest.mark.parametrize("until", [0, 160])
def test_resume_and_two_ranks(toy, until):
    """Interrupted between two checkpoints: the same bits. Two processes: the same global batch, so the same labels up to rounding."""
    folder, words = toy
    keys = ["images=480", "switch=160", "save_every=160", "log_every=160", f"sk_until={until}", "overwrite=true"]
    stage("train_guided", *words, *keys, "name=once")
    stage("train_guided", *words, *keys, "images=320", "name=twice")
    assert "resuming at 320" in stage("train_guided", *words, *keys, "name=twice").stdout
    stage("train_guided", *words, *keys, "name=ranks", ranks=2)
    once, twice, ranks = (torch.load(folder / f"run/guided/{n}/checkpoint.pt", weights_only=True) for n in ("once", "twice", "ranks"))
    settled = [c["side"].pop("_extra_state") for c in (once, twice, ranks)]
    assert (settled[0] is None) == (not until) and (not until or torch.equal(settled[0], settled[1]) and (settled[0] == settled[2]).float().mean() > 0.97)
    for part in ("net", "ema", "side", "side_ema"):
        for c in (once, twice, ranks):
            c[part].pop("_extra_state", None)
        assert all(torch.equal(once[part][k], twice[part][k]) for k in once[part]), part
        close = [torch.allclose(once[part][k].float(), ranks[part][k].float(), rtol=1e-2, atol=1e-3) for k in once[part] if k != "watched"]
        assert np.mean(close) > 0.99, part
    a, b = (np.load(folder / f"run/guided/{n}/labels.npz")["train"] for n in ("once", "ranks"))
    assert (a == b).mean() > 0.97

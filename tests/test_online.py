"""Online labels: targets, gradients, teacher, queue, collapse; two clusters are found and guide; resume, ranks."""
import copy
import dataclasses
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import inside, stage
from torch.nn.functional import normalize

import train_guided
from configs.run import Model, UserError
from configs.shapes import draw_shapes
from extract_features import matching
from train_diffusion import Batch, build_model, layout_of, load_condition
from train_guided import Labeller, TrainGuided, check_online, label_images

UNET = Model(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16, stem=4)
UVIT = Model("uvit", channels=32, depth=2, heads=4, patch=8)
BOTH = pytest.mark.parametrize("model", [UNET, UVIT], ids=["unet", "uvit"])
IMAGES = torch.from_numpy(draw_shapes(0, np.arange(64))[0]).float() / 127.5 - 1
ROWS = (IMAGES.numpy() * 127.5 + 127.5).round().astype(np.uint8)                 # as data sets hold them


def online(model=UNET, classes=None, **keys):
    """(cfg, network, averaged network, labeller, averaged labeller) before any training; no weight is zero."""
    keys = dict(labels="online", K=10, batch=32, sk_dim=16, sk_queue=64, sk_freeze=0, sk_ramp=0, switch=0) | keys
    cfg = TrainGuided(**keys)
    known = dict(label=dict(num_labels=cfg.K), prototype=dict(vector_dim=cfg.sk_dim), none={},
                 patch=dict(layout_channels=cfg.K))[cfg.condition]
    nets = [build_model(model, 32, **known) for _ in range(2)]
    for net in nets:
        g = torch.Generator().manual_seed(3)
        for p in net.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    labeller = Labeller(cfg, nets[0], matching(nets[0], [cfg.sk_activation])[-1], 32)
    teacher = copy.deepcopy(labeller).eval().requires_grad_(False)
    classes = np.full(64, -1) if classes is None else classes
    labeller.begin(labeller.ranks, SimpleNamespace(inputs=ROWS, classes=classes), nullcontext)
    return cfg, nets[0], nets[1].eval().requires_grad_(False), labeller, teacher


def uniforms(n=32, seed=0):
    """Numbers of images: for flip, drop, and the labeller's."""
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(1000 + seed))


def step(parts, seen=0, n=32):
    cfg, net, ema, labeller, teacher = parts
    noise = torch.randn(n, 3, 3, 32, 32, generator=torch.Generator().manual_seed(seen))
    u = uniforms(n, seen)
    batch = Batch(torch.arange(n), IMAGES[:n], noise[:, 0], torch.zeros(n), u[:, 0] < 0.5, u[:, 1], u[:, 2:],
                  noise[:, 1:], seen)
    return labeller.step(net, ema, teacher, batch)


@pytest.mark.parametrize("n", [1, 2, 32])
def test_running_statistics_do_not_depend_on_the_batch(n):
    """Rows N(3, 4) in updates of any size: the variance between updates counts, too."""
    rows = 3 + 2 * torch.randn(400 * 32, 5, generator=torch.Generator().manual_seed(0))
    running = train_guided.Standardised(5, 1024)
    for update, part in enumerate(rows.split(n)):
        running.learn(part, update, train_guided.ALONE)
    assert torch.allclose(running.mean, torch.tensor(3.0), atol=0.4)
    assert torch.allclose(running.var, torch.tensor(4.0), rtol=0.2)


def test_targets_are_balanced_and_carry_no_gradient():
    parts = online(sk_iterations=50, sk_queue=40)
    labeller, teacher = parts[3:]
    g = torch.Generator().manual_seed(0)
    h = normalize(torch.randn(60, 16, generator=g), dim=1).requires_grad_()
    q = labeller.balance(teacher, h, 0)                   # nothing in the queue: the batch alone
    assert not q.requires_grad and q.shape == (60, 10) and torch.allclose(q.sum(1), torch.ones(60), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((10,), 6.0), rtol=0.05)
    q = labeller.balance(teacher, h[:20], 1)              # 40 of the batch before help
    assert q.shape == (20, 10) and torch.allclose(q.sum(1), torch.ones(20), atol=1e-5)
    patches = online(condition="patch")
    rows = normalize(torch.randn(4 * patches[3].patches, 16, generator=g), dim=1)
    assert patches[3].balance(patches[4], rows, 0).shape == (len(rows), 10)


@BOTH
@pytest.mark.parametrize("reach, condition", [("head", "label"), ("backbone", "label"), ("head", "patch"),
                                              ("backbone", "prototype"), ("backbone", "none")])
def test_where_the_gradient_reaches(model, reach, condition):
    parts = online(model, sk_grad=reach, condition=condition)
    loss, told = step(parts)
    loss.backward()
    _, net, ema, labeller, teacher = parts
    touched = [k for k, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    behind = [k for k in touched if "out_blocks" in k or "output_blocks" in k]   # nothing behind the feature
    assert bool(touched) == (reach == "backbone") and not behind
    assert labeller.prototypes.grad.any() and labeller.head[0].weight.grad.any()
    assert all(p.grad is None for p in [*ema.parameters(), *teacher.parameters()])
    shapes = dict(label={"label": (32,)}, prototype={"vector": (32, 16)}, patch={"layout": (32, 10, 32, 32)}, none={})
    assert {k: v.shape for k, v in told.items()} == shapes[condition]


@BOTH
def test_loss_starts_near_ln_K_and_small_eps_stays_finite(model):
    loss, _ = step(online(model, K=30, sk_temperature=1.0))
    assert abs(float(loss.detach()) - math.log(30)) < 0.5
    for eps in (0.005, 0.0005):
        loss, _ = step(online(model, sk_eps=eps, sk_iterations=20))
        assert torch.isfinite(loss)


def test_labels_do_not_depend_on_the_condition():
    """The teacher pass has none: neither what is dropped nor the label embedding changes what it finds."""
    before = step(online(drop=0.0))[1]["label"]
    other = online(drop=0.0)
    for net in other[1:3]:
        torch.nn.init.normal_(net.label_emb.weight[:-1].data, std=9)
    assert torch.equal(step(other)[1]["label"], before)
    dropped = step(online(drop=0.5))[1]["label"]
    assert torch.equal(dropped, torch.where(uniforms()[:, 1] < 0.5, 10, before)) and (dropped == 10).any()


@pytest.mark.parametrize("condition", ["label", "patch"])
def test_no_more_images_at_once_than_in_training(condition):
    """micro= limits the passes that need no gradients, too, and changes nothing but rounding."""
    results = []
    for micro in (0, 8):
        parts, sizes = online(condition=condition, micro=micro), []
        for net in parts[1:3]:
            net.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
        loss, told = step(parts)
        ids, g = label_images(parts[2], parts[4], ROWS[:40], np.arange(40), nullcontext, "test")
        assert max(sizes) == (8 if micro else 32)         # 32: the batch
        results.append([loss.detach(), *told.values(), ids, g])
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in zip(*results))


def test_the_label_of_an_image_does_not_depend_on_the_others():
    """Balanced labels of one image alone would be a matter of rounding: potentials are those of the training images."""
    _, _, ema, labeller, _ = online()
    labels, g = label_images(ema, labeller, ROWS, np.arange(64), nullcontext, "test")
    assert labels.shape == (64, 1) and torch.bincount(labels[:, 0], minlength=10).max() < 20
    for i in (3, 40):
        assert label_images(ema, labeller, ROWS, np.arange(i, i + 1), nullcontext, "test", g=g)[0] == labels[i]


def test_before_the_switch_every_condition_is_null():
    """The null label, a zero vector, a layout of zeros: what the network takes for no condition."""
    before, after = (step(online(switch=100), seen=seen)[1]["label"] for seen in (0, 128))
    assert (before == 10).all() and (after < 10).any()
    for condition in ("prototype", "patch"):
        told = step(online(switch=100, condition=condition))[1]
        assert len(told) == 1 and not next(iter(told.values())).any()


@pytest.mark.parametrize("queue", [0, 4, 64])
def test_queue_and_batch_smaller_than_K(queue):
    parts = online(K=50, sk_queue=queue)
    for i in range(3):
        loss, _ = step(parts, seen=32 * i)
        assert torch.isfinite(loss)
    held = parts[3].queue.rows
    assert len(held) == queue
    if queue == 64:                                       # of three batches of 32 the last two
        assert torch.allclose(held.norm(dim=1), torch.ones(64), atol=1e-5)


def test_weight_ramps_and_prototypes_freeze():
    full, _ = step(online(), seen=64)
    half, _ = step(online(sk_ramp=130), seen=64)
    assert torch.allclose(half, 0.5 * full, rtol=1e-4)
    parts = online(sk_freeze=100)
    step(parts)[0].backward()
    assert parts[3].prototypes.grad is None and parts[3].head[0].weight.grad.any()


def test_averages_follow_at_unit_length():
    _, _, _, labeller, teacher = online()
    before = teacher.head[0].weight.clone()
    with torch.no_grad():
        labeller.head[0].weight += 1
        labeller.prototypes *= 3
        labeller.standardised.mean += 2
    labeller.after(teacher, 0.75, None)
    assert torch.allclose(teacher.head[0].weight, before + 0.25, atol=1e-6)
    assert torch.equal(teacher.standardised.mean, labeller.standardised.mean)
    for c in (labeller.prototypes, teacher.prototypes):
        assert torch.allclose(c.norm(dim=1), torch.ones(10), atol=1e-6)


def collapse(teacher):
    """Give every image nearly the same h."""
    for p in teacher.head.parameters():
        p.mul_(1e-3)
    teacher.head[-1].bias.fill_(1.0)


def test_report_tells_health_from_collapse():
    """All scores alike: balanced labels use all prototypes, and mean nothing. Or few labels hold nearly all images."""
    parts = online(classes=np.arange(64) % 10)
    _, _, ema, labeller, teacher = parts
    for i in range(2):
        step(parts, seen=32 * i)
    line = labeller.report(ema, teacher)
    assert "warning" not in line and line["used"] > 0.2 and "churn" not in line and 0 <= line["nmi"] <= 1
    assert line["ln_K"] == math.log(10) and line["target_entropy"] < 0.9 * line["ln_K"]
    step(parts, seen=64)
    for p in teacher.head.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    assert labeller.report(ema, teacher)["churn"] > 0
    collapse(teacher)
    for i in range(3, 12):                                # until the queue holds nothing else
        step(parts, seen=32 * i)
    labeller.report(ema, teacher)
    step(parts, seen=384)
    line = labeller.report(ema, teacher)
    assert line["target_entropy"] > 0.99 * line["ln_K"] and "do not tell images apart" in line["warning"]
    labeller.settled = torch.zeros(64, 1, dtype=torch.int16)
    labeller.sums += torch.tensor([1.0, 0.1, 1.0])
    assert "share a few" in labeller.report(ema, teacher)["warning"]


@pytest.mark.parametrize("condition", ["label", "prototype", "patch", "none"])
def test_labels_settle_after_sk_until(condition):
    """From then on an image has one label, whatever noise and networks become; maps are mirrored with their images."""
    parts = online(sk_until=64, condition=condition, drop=0.0, classes=np.arange(64) % 10)
    cfg, net, ema, labeller, teacher = parts
    step(parts, seen=32)
    assert labeller.settled is None
    before = {k: v.clone() for k, v in labeller.named_buffers()}
    loss, told = step(parts, seen=64)
    expected = label_images(ema, teacher, ROWS, np.arange(64), nullcontext, "settle")[0]
    assert torch.equal(labeller.settled.long(), expected)
    loss.backward()
    assert labeller.prototypes.grad is None and labeller.head[0].weight.grad.any()
    for p in ema.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    again = step(parts, seen=96)[1]
    assert all(torch.equal(v, before[k]) for k, v in labeller.named_buffers() if k != "watched")
    if condition == "label":
        assert torch.equal(told["label"], expected[:32, 0]) and torch.equal(again["label"], told["label"])
    if condition == "patch":
        maps, flip = expected[:32].reshape(32, 4, 4), uniforms(32, 96)[:, 0] < 0.5
        maps = torch.where(flip[:, None, None], maps.flip(2), maps)
        assert torch.equal(again["layout"], layout_of(maps, 10, 32))
    other = Labeller(cfg, net, labeller.name, 32)
    other.load_state_dict(labeller.state_dict())
    assert torch.equal(other.settled, labeller.settled)


@pytest.mark.parametrize("keys", [dict(switch=10 ** 9), dict(sk_until=5_000), dict(sk_until=10 ** 9),
                                  dict(images=250, switch=240), dict(images=250, switch=0, sk_until=240),
                                  dict(condition="set"), dict(recompute=True, sk_grad="backbone")], ids=str)
def test_impossible_requests(keys, tmp_path):
    with pytest.raises(UserError, match="|".join(keys)):
        check_online(SimpleNamespace(world=1, dir=tmp_path), dataclasses.replace(TrainGuided(batch=32), **keys))


TOY = """
data: {source: arrays, size: 16}
model: {channels: 16, mult: [1, 2], blocks: 1, attention: [], head_channels: 16, stem: 2}
train_diffusion: {images: 32, batch: 32, precision: fp32}
train_guided:
  {init: "", images: 4800, batch: 32, lr: 2.0e-3, warmup: 64, ema: 512, log_every: 1600, save_every: 3200,
   grid_every: 6400, precision: fp32, labels: online, K: 2, switch: 1600, sk_dim: 8, sk_queue: 64, sk_freeze: 0,
   sk_ramp: 320, sk_t: 0.8, sk_window: [0.7, 0.9], flip: false}
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
    inside("train_diffusion", *words)
    inside("train_guided", *words)
    return folder, words


def test_two_clusters_are_found_and_guide(toy):
    folder, words = toy
    info = json.loads((folder / "run/labels/online.json").read_text())
    assert info["scores"]["nmi"] > 0.9, info["scores"]
    log = (folder / "run/guided/online/metrics.jsonl").read_text().splitlines()
    line = json.loads(log[-1])
    assert line["sk_loss"] < 0.5 * line["ln_K"] and line["used"] == 1 and "warning" not in line and line["churn"] < 0.1
    labels = np.load(folder / "run/labels/online.npz")["train"]
    classes = np.load(folder / "run/data/train/classes.npy")
    inside("sample_ode", *words, "checkpoint=guided/online", "name=both", "guidance=1.5")
    x = np.load(folder / "run/samples/both/images.npy").astype(float)            # labels 0, 1, 0, 1, ...
    red = (x[:, 0] - x[:, 2]).mean((1, 2)) > 0
    of_label = [np.bincount(classes[labels == k], minlength=2).argmax() == 0 for k in (0, 1)]    # the reddish cluster?
    assert of_label[0] != of_label[1] and np.mean([red[i] == of_label[i % 2] for i in range(40)]) > 0.9


def test_the_log_tells_how_hard_the_labels_pull(toy):
    """The share of the gradient's norm that is the labeller's: of one update it grows with the weight alone."""
    folder, words = toy
    keys = ["images=32", "condition=none", "sk_ramp=0", "switch=0"]

    def first_line(name, *more):
        inside("train_guided", *words, *keys, f"name={name}", *more)
        return json.loads((folder / f"run/guided/{name}/metrics.jsonl").read_text().splitlines()[0])
    assert "pull" not in first_line("still")              # the head alone learns from it
    lines = {w: first_line(f"pull-{w}", "sk_grad=backbone", "sk_ratio=0", f"sk_weight={w}") for w in (1e-3, 0.1, 100.0)}
    of_one = [line["pull"] * line["grad_norm"] / w for w, line in lines.items()]
    assert np.allclose(of_one, of_one[0], rtol=1e-4) and of_one[0] > 0
    assert lines[1e-3]["pull"] < lines[0.1]["pull"] < lines[100.0]["pull"] and 0.95 < lines[100.0]["pull"] < 1.05
    folder_of = folder / "run"
    for file in (folder_of / "labels/still.npz", folder_of / "guided/still/labels.npz"):      # found again if deleted
        file.unlink()
        first_line("still")
        assert file.exists()
    kept = first_line("ratio", "sk_grad=backbone", "sk_ratio=0.3", "images=320", "log_every=320")
    assert 0.2 < kept["pull"] < 0.4                       # of the norm one update before; there was none at first


def test_labels_of_another_program_are_not_replaced(toy, refuse, monkeypatch):
    folder, words = toy
    inside("self_label", *words, "method=classes", "name=mine")
    said = refuse("train_guided", *words, "name=mine")
    assert "labels/mine.npz" in said and "overwrite=true" in said
    fit = train_guided.fit

    def meanwhile(*a):
        inside("self_label", *words, "method=classes", "name=late")
        return fit(*a)
    with monkeypatch.context() as patch:
        patch.setattr(train_guided, "fit", meanwhile)
        keys = ["images=64", "switch=0", "sk_until=0", "sk_freeze=0", "name=late"]
        assert "labels/late.npz" in refuse("train_guided", *words, *keys)
    assert json.loads((folder / "run/labels/late.json").read_text())["recipe"]["method"] == "classes"
    said = refuse("train_guided", *words, "name=new", "init=guided/online")      # whose labels are numbered otherwise
    assert "start from an unconditional model" in said


def test_labels_that_are_not_finite_stop_the_training(toy, refuse, monkeypatch):
    folder, words = toy
    learn, calls = train_guided.Standardised.learn, []

    def overflowing(self, f, *given):                     # as a forward pass in fp16 may
        calls.append(f)
        learn(self, f * (math.inf if len(calls) == 3 else 1), *given)
    monkeypatch.setattr(train_guided.Standardised, "learn", overflowing)
    keys = ["images=320", "switch=160", "sk_until=0", "log_every=160", "name=over"]
    assert "not finite" in refuse("train_guided", *words, *keys)
    assert not (folder / "run/labels/over.npz").exists()


@pytest.mark.parametrize("condition", ["prototype", "patch", "none"])
def test_every_condition_trains_and_samples(toy, condition):
    folder, words = toy
    keys = [f"name={condition}", f"condition={condition}", "images=320", "switch=160", "log_every=320"]
    inside("train_guided", *words, *keys)
    sampling = [f"checkpoint=guided/{condition}", f"name={condition}", "n=6", "labels=marginal", "guidance=2"]
    assert "samples in" in inside("sample_ode", *words, *sampling)
    assert np.load(folder / f"run/samples/{condition}/images.npy").shape == (6, 3, 16, 16)
    assert (folder / f"run/guided/{condition}/labels.npz").exists()
    assert "done already" in inside("train_guided", *words, *keys)
    if condition == "none":                               # which reads neither
        assert "not read" in inside("train_guided", *words, *keys, "switch=7", "drop=0.2")
    if condition == "patch":
        state = torch.load(folder / "run/guided/patch/checkpoint.pt", weights_only=True)
        state.pop("bank")                                 # as it is while it trains
        with pytest.raises(UserError, match="train it to its end"):
            load_condition(state | dict(file="x"), "cpu")


def test_a_checkpoint_samples_without_run_or_images(toy, tmp_path, refuse):
    folder, words = toy
    checkpoint = folder / "run/guided/online/checkpoint.pt"
    words = [words[0], f"run={tmp_path / 'alone'}", f"checkpoint={checkpoint}", "guidance=1.5", "n=4"]
    assert "evaluate=false" in refuse("sample_ode", *words, "evaluate=true")
    inside("sample_ode", *words, "name=alone")             # evaluate: false in the YAML
    assert np.load(tmp_path / "alone/samples/alone/images.npy").shape == (4, 3, 16, 16)


@pytest.mark.parametrize("condition, until", [("label", 160), ("prototype", 0)])
def test_resume_and_two_ranks(toy, condition, until):
    """Interrupted between two checkpoints: the same bits. Two processes: the same batch, the same labels but rounding.
    """
    folder, words = toy
    keys = ["images=480", "switch=160", "save_every=160", "log_every=160", f"sk_until={until}",
            f"condition={condition}", "overwrite=true"]
    if until:
        keys += ["sk_grad=backbone", "sk_ratio=0.2", "sk_ramp=0"]
    inside("train_guided", *words, *keys, "name=once")
    inside("train_guided", *words, *keys, "images=320", "name=twice")
    assert "resuming at 320" in inside("train_guided", *words, *keys, "name=twice")
    if until:
        stage("train_guided", *words, *keys, "name=ranks", ranks=2)
    load = lambda name: torch.load(folder / f"run/guided/{name}/checkpoint.pt", weights_only=True)
    once, twice, ranks = load("once"), load("twice"), load("ranks") if until else load("once")
    settled = [c["conditioner"].pop("_extra_state") for c in (once, twice, ranks)]
    assert (settled[0] is None) == (not until)
    if until:
        assert torch.equal(settled[0], settled[1]) and (settled[0] == settled[2]).float().mean() > 0.97
    for part in ("net", "ema", "conditioner", "conditioner_ema"):
        for c in (once, twice, ranks):
            c[part].pop("_extra_state", None)
        assert all(torch.equal(once[part][k], twice[part][k]) for k in once[part]), part
        close = [torch.allclose(once[part][k].float(), ranks[part][k].float(), rtol=1e-2, atol=1e-3)
                 for k in once[part] if k != "watched"]
        assert np.mean(close) > 0.99, part
    if until:
        a, b = (np.load(folder / f"run/guided/{name}/labels.npz")["train"] for name in ("once", "ranks"))
        assert (a == b).mean() > 0.97
        logs = [(folder / f"run/guided/{name}/metrics.jsonl").read_text().splitlines() for name in ("once", "ranks")]
        pulls = [[json.loads(line)["pull"] for line in lines] for lines in logs]
        assert np.allclose(*pulls, rtol=0.02) and np.allclose(pulls, 0.2, atol=0.05)

"""Parts of the training loop against what they promise: order, feeding, averaging, label dropping, loss bins, non-finite losses."""
import dataclasses
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, stage
from torch.utils._python_dispatch import TorchDispatchMode

import sample_ode
import train_diffusion as td
from configs import data as cd
from configs import run as cr
from configs import shapes as cs
import train_guided
from train_guided import label_condition


def make_run(folder, rank=0, world=1):
    """A Run without command line; cfg is the training section."""
    cfg = td.TrainDiffusion(images=64, batch=16, lr=1e-3, warmup=1, ema=32, log_every=32, save_every=64, grid_every=64, precision="fp32")
    model = cr.Model(channels=16, mult=[1, 2], blocks=1, attention=[], head_channels=16, stem=4)
    sections = dict(data={}, model=dataclasses.asdict(model), train_diffusion=dataclasses.asdict(cfg))
    return cr.Run("train_diffusion", Path(folder), cfg, cr.Data(), model, sections, False, set(), rank, world)


def split(n=40):
    images, classes, boxes, masks = cs.draw_shapes(0, np.arange(n))
    return cd.Split(images, classes, boxes, masks, dict(fingerprint="x"))


def state(run):
    return dict(kind="diffusion", model=dataclasses.asdict(run.model), size=32, channels=3, conditions={}, num_labels=0, path="cv", predict="v", data="x", config=run.sections)


def test_every_epoch_is_a_permutation_and_can_be_entered_anywhere():
    whole = list(islice(td.image_order(3, "test", 0, 50), 175))
    assert all(sorted(whole[i:i + 50]) == list(range(50)) for i in (0, 50, 100)) and whole[:50] != whole[50:100]
    for seen in (1, 49, 50, 120):
        assert list(islice(td.image_order(3, "test", seen, 50), 30)) == whole[seen:seen + 30]


def test_ranks_share_the_batch_of_one_process(tmp_path):
    data = split()
    one = td.feed(make_run(tmp_path), make_run(tmp_path).cfg, data.images, 32)
    two = [td.feed(make_run(tmp_path, r, 2), make_run(tmp_path).cfg, data.images, 32) for r in (0, 1)]
    for _ in range(4):
        whole, parts = next(one), [next(f) for f in two]
        for a, b in zip(whole, zip(*parts)):
            assert torch.equal(a, torch.cat(b))
        assert np.array_equal(whole[1].numpy(), data.images[whole[0].numpy()])
    for f in (one, *two):
        f.close()


def test_labels_are_dropped_image_by_image():
    labels = np.arange(1000) % 7
    condition = label_condition(labels, 7, 0.25, torch.device("cpu"))
    rows, every = torch.arange(1000), torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    u = every[:, 2]
    out = condition(rows, every)["label"]
    assert torch.equal(out == 7, u < 0.25) and 0.2 < (out == 7).float().mean() < 0.3       # a share of the images, not whole batches
    assert torch.equal(out[u >= 0.25], torch.from_numpy(labels)[u >= 0.25])
    assert (label_condition(labels, 7, 0.0, torch.device("cpu"))(rows, every)["label"] < 7).all()


def test_average_has_the_half_life_that_it_names(tmp_path):
    """With weights that jump once, the average has covered half of the jump after `ema` images (no ramp)."""
    a, b, seen = torch.zeros(1), torch.ones(1), 0
    while seen < 1000:
        seen += 10
        a.lerp_(b, 1 - 0.5 ** (10 / min(1000, 1e9 * seen)))
    assert float(a) == pytest.approx(0.5, abs=1e-4)
    run = make_run(tmp_path)
    run.cfg.ema, run.cfg.ema_ramp = 1, 1e-9               # no memory: the average is the network
    out = td.fit(run, run.cfg, td.build_model(run.model, 32), tmp_path / "diffusion/base", split(), state(run))
    assert all(torch.allclose(out["net"][k], out["ema"][k], atol=1e-6) for k in out["net"])


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    results = []
    for micro in (0, 4):
        run = make_run(tmp_path / str(micro))
        run.cfg.micro = micro
        results.append(td.fit(run, run.cfg, td.build_model(run.model, 32), run.dir / "diffusion/base", split(), state(run))["net"])
    assert max(float((results[0][k] - results[1][k]).abs().max()) for k in results[0]) < 1e-4


def test_sample_grids_show_no_more_at_once_than_training(tmp_path, monkeypatch):
    seen, preview = [], td.preview
    monkeypatch.setattr(td, "preview", lambda net, path, predict, z, **k: seen.append((len(z), len(k["label"]))) or preview(net, path, predict, z, **k))
    run = make_run(tmp_path)
    run.cfg.micro = 8
    run.model.mult = [1]
    net = td.build_model(run.model, 32, num_labels=3)
    td.fit(run, run.cfg, net, tmp_path / "diffusion/base", split(), state(run), lambda rows, u: dict(label=rows % 3), dict(label=torch.arange(20) % 4))
    assert seen == [(8, 8), (8, 8), (4, 4)]


@pytest.mark.parametrize("first", [torch.channels_last, torch.contiguous_format])
def test_training_goes_on_in_another_memory_layout(tmp_path, first):
    """Compiled U-Nets are channels-last; their optimizer's moments must fit weights that are not, and the other way round."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        run = make_run(tmp_path / str(layout))
        td.fit(run, run.cfg, td.build_model(run.model, 32).to(memory_format=first), run.dir / "diffusion/base", split(), state(run))
        run.cfg.images = 128
        net = td.build_model(run.model, 32).to(memory_format=layout)
        results.append(td.fit(run, run.cfg, net, run.dir / "diffusion/base", split(), state(run))["net"])
    assert max(float((results[0][k] - results[1][k]).abs().max()) for k in results[0]) < 1e-4


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU has to be waited for, since their result is needed on the host."""
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_consecutive", "_unique2")
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("path", ["cv", "vp"])
def test_no_update_waits_for_the_gpu(path, tmp_path):
    """As many such operations in a training of many updates as in one of few: a log line and a checkpoint each."""
    counts = []
    for images in (64, 192):
        run = make_run(tmp_path / str(images))
        run.cfg.path, run.cfg.images, run.cfg.log_every, run.cfg.save_every, run.cfg.grid_every = path, images, 192, 192, 192
        with Waits() as waits:
            td.fit(run, run.cfg, td.build_model(run.model, 32), run.dir / "diffusion/base", split(), state(run))
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("path, solver", [("cv", "heun"), ("vp", "heun"), ("vp", "ddim"), ("vp-cosine", "ddim")])
def test_no_step_of_a_sampler_waits_for_the_gpu(path, solver, interval):
    """Tensors without data have no value that the host could ask for: an attempt would be an error. (Copies to the device would not be: test_gpu.py sees those.)"""
    net = td.build_model(cr.Model(channels=16, mult=[1], blocks=1, attention=[], head_channels=16, stem=4), 32, num_labels=3).eval().to("meta")
    field = sample_ode.Field(net, td.PATHS[path], "eps", 2.0, interval)
    x, calls = sample_ode.integrate(field, torch.randn(4, 3, 32, 32, device="meta"), torch.zeros(4, dtype=torch.long, device="meta"), solver, 9, 1e-3)
    assert x.shape == (4, 3, 32, 32) and x.is_meta
    guided = 4 * calls * 2                                # which take two
    assert field.images == guided if interval[0] == 0 else guided / 2 < field.images < guided


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    run = make_run(tmp_path)
    td.fit(run, run.cfg, td.build_model(run.model, 32), tmp_path / "diffusion/base", split(), state(run))
    before = (tmp_path / "diffusion/base/checkpoint.pt").read_bytes()
    run.cfg.images, broken = 128, split()
    net = td.build_model(run.model, 32)
    net.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(cr.UserError, match="last checkpoint is kept"):
        td.fit(run, run.cfg, net, tmp_path / "diffusion/base", broken, state(run))
    assert (tmp_path / "diffusion/base/checkpoint.pt").read_bytes() == before


def test_global_generators_are_left_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    run = make_run(tmp_path)
    td.fit(run, run.cfg, td.build_model(run.model, 32), tmp_path / "diffusion/base", split(), state(run))
    assert torch.equal(torch.rand(3), want) and np.array_equal(np.random.get_state()[1], before)


def test_bf16_training_saves_float32_weights(tmp_path):
    run = make_run(tmp_path)
    run.cfg.precision = "bf16"
    out = td.fit(run, run.cfg, td.build_model(run.model, 32), tmp_path / "diffusion/base", split(), state(run))
    assert all(v.dtype == torch.float32 and not k.startswith("_orig_mod") for k, v in out["net"].items())


COMPILED = """
import functools, sys, torch
sys.path.insert(0, {root!r})
from torch._dynamo.backends.debugging import aot_eager
import train_diffusion as td
graphs, compile, wrap = [], torch.compile, torch.nn.parallel.DistributedDataParallel
torch.compile = lambda net: compile(net, backend=lambda graph, inputs: graphs.append(1) or aot_eager(graph, inputs))
torch.nn.parallel.DistributedDataParallel = functools.partial(wrap, bucket_cap_mb=1)
td.main()
if td.dist.get_rank() == 0:
    print("graphs", len(graphs))
"""


def test_two_ranks_of_a_compiled_network_send_gradients_in_buckets(tiny, tmp_path):
    """One graph a bucket, so that gradients travel while others are computed; losses are those of the plain network."""
    script, words = tmp_path / "compiled.py", ["images=64", "model.channels=96", "model.mult=1", "model.attention=8", "data.train=128", "data.test=64", "log_every=32", "micro=8"]
    script.write_text(COMPILED.format(root=str(ROOT)))
    stage("train_diffusion", tiny, f"run={tmp_path / 'plain'}", *words, ranks=2)
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tiny, f"run={tmp_path / 'compiled'}", *words, "compile=true"],
                       capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert p.returncode == 0, p.stderr
    assert int(p.stdout.split("graphs")[1]) > 3
    logs = [[json.loads(line)["loss"] for line in (tmp_path / how / "diffusion/base/metrics.jsonl").read_text().splitlines()] for how in ("plain", "compiled")]
    assert len(logs[0]) == 2 and np.allclose(*logs, rtol=1e-4)


def test_a_compiled_network_trains_and_samples_like_the_plain_one(tiny, tmp_path, monkeypatch):
    compiled, compile = [], torch.compile                 # graphs are captured as for a GPU, then run as they are: generating C++ would take minutes
    monkeypatch.setattr(torch, "compile", lambda net, **how: compiled.append(how) or compile(net, backend="aot_eager", **how))

    def run(stage, folder, *words):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", str(tiny), f"run={tmp_path / folder}", "data.train=128", "data.test=64", "model.mult=1", "model.attention=8", *words])
        stage.main()
    for how, *words in (("true",), ("false",), ("again", "compile=true", "recompute=true")):
        run(td, how, "images=128", *words or [f"compile={how}"])
    logs = [[json.loads(line)["loss"] for line in (tmp_path / how / "diffusion" / "base" / "metrics.jsonl").read_text().splitlines()] for how in ("true", "false", "again")]
    assert len(compiled) == 2 and len(logs[0]) == 1 and np.allclose(logs[0], logs[1], rtol=1e-4) and np.allclose(logs[2], logs[1], rtol=1e-4)
    run(td, "true", "images=160", "compile=false")        # may change when a training goes on: names of weights are the same
    for how in ("true", "false"):
        run(sample_ode, "true", "evaluate=false", "n=16", "batch=8", "solver=euler", f"compile={how}", f"name={how}")
    images = [np.load(tmp_path / "true" / "samples" / how / "images.npy").astype(int) for how in ("true", "false")]
    assert compiled[2:] == [{}] and np.abs(images[0] - images[1]).max() <= 1
    for reach in ("head", "backbone"):                    # online, those who look for labels are compiled, too: teacher and student, for two log lines, at the end for two splits
        compiled.clear()
        for how in ("true", "false"):
            run(train_guided, "true", "labels=online", "init=", "K=6", "switch=64", "sk_freeze=0", "sk_ramp=0", "sk_queue=64", f"sk_grad={reach}", f"compile={how}", f"name={reach}-{how}")
        logs = [[json.loads(line) for line in (tmp_path / f"true/guided/{reach}-{how}/metrics.jsonl").read_text().splitlines()] for how in ("true", "false")]
        assert len(compiled) == 7 and len(logs[0]) == 2 and all(np.allclose(a[key], b[key], rtol=1e-3) for a, b in zip(*logs) for key in ("loss", "sk_loss", "grad_norm"))


def test_turns_and_complaints_of_many_processes(monkeypatch, tmp_path):
    """First one process downloads, then one of each machine, then all others; what the first finds wrong all complain of; shares are disjoint and complete."""
    turns = []
    for rank, local in ((0, 0), (1, 1), (8, 0), (9, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        run = make_run(tmp_path, rank, 16)
        monkeypatch.setattr(cr.Run, "wait", lambda self: None)
        turns.append(list(run.turns()))
    assert turns == [[True, False, False], [False, False, True], [False, True, False], [False, False, True]]
    sent = []
    monkeypatch.setattr(cr.dist, "broadcast_object_list", lambda box: sent.append(box[0]) if box[0] else box.__setitem__(0, sent[0]))
    for rank in (0, 1):
        with pytest.raises(cr.UserError, match="no such"):
            make_run(tmp_path, rank, 2).agreed(lambda: cr.require(False, make_run(tmp_path).cfg, "images", "no such"))
    assert np.array_equal(np.concatenate([make_run(tmp_path, r, 3).share(10) for r in range(3)]), np.arange(10))

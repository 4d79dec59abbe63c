"""The training loop against what it promises: order, batches, averages, non-finite losses; killed and resumed."""
import dataclasses
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, killed, stage
from torch.utils._python_dispatch import TorchDispatchMode

import sample_ode
import train_diffusion as td
import train_guided
from configs import data as cd
from configs import run as cr
from configs import shapes as cs

SMALL = cr.Model(channels=16, mult=[1, 2], blocks=1, attention=[], head_channels=16, stem=4)


def make_run(folder, rank=0, world=1, **keys):
    """A Run without command line; cfg is the training section."""
    cfg = td.TrainDiffusion(**dict(images=64, batch=16, lr=1e-3, warmup=1, ema=32, log_every=32, save_every=64,
                                   grid_every=64, precision="fp32") | keys)
    model = dataclasses.replace(SMALL)
    sections = dict(data={}, model=dataclasses.asdict(model), train_diffusion=dataclasses.asdict(cfg))
    return cr.Run("train_diffusion", Path(folder), cfg, cr.Data(), model, sections, False, set(), rank, world)


def split(n=40):
    images, classes, boxes, masks = cs.draw_shapes(0, np.arange(n))
    return cd.Split(images, classes, boxes, masks, dict(fingerprint="x"))


def trained(run, net=None, labeller=None):
    """The checkpoint of a training of `net`, by default of a fresh network."""
    net = net or td.build_model(run.model, 32)
    state = td.new_state(run, "diffusion", split(), 32, 3)
    return td.fit(run, run.cfg, net, run.dir / "diffusion/base", split(), state, labeller)


def largest_difference(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def log(run, folder="diffusion/base"):
    return [json.loads(line) for line in (Path(run) / folder / "metrics.jsonl").read_text().splitlines()]


def test_every_epoch_is_a_permutation_and_can_be_entered_anywhere():
    whole = list(islice(td.image_order(3, "test", 0, 50), 175))
    assert all(sorted(whole[i:i + 50]) == list(range(50)) for i in (0, 50, 100)) and whole[:50] != whole[50:100]
    for seen in (1, 49, 50, 120):
        assert list(islice(td.image_order(3, "test", seen, 50), 30)) == whole[seen:seen + 30]


def test_ranks_share_the_batch_of_one_process(tmp_path):
    data, run = split(), make_run(tmp_path)
    one = td.batches(run, run.cfg, data, 32, 2, 1)
    two = [td.batches(make_run(tmp_path, r, 2), run.cfg, data, 32, 2, 1) for r in (0, 1)]
    for i in range(4):
        whole, parts = next(one), [next(f) for f in two]
        for name in ("rows", "x", "z", "t", "flip", "coin", "spare_u", "spare_z"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts])), name
        assert whole.seen == 32 + 16 * i and whole.spare_z.shape == (16, 1, 3, 32, 32)
        assert whole.spare_u.shape == (16, 2) and 0 < whole.flip.float().mean() < 1
        images = cd.as_input(torch.from_numpy(data.images[whole.rows.numpy()]), whole.flip)
        assert torch.equal(whole.x, images)
    for f in (one, *two):
        f.close()


def test_average_has_the_half_life_that_it_names(tmp_path, monkeypatch):
    """In the time of `ema` images the old average loses half of its weight (no ramp)."""
    betas, average = [], td.get_ema_multi_avg_fn
    monkeypatch.setattr(td, "get_ema_multi_avg_fn", lambda beta: betas.append(beta) or average(beta))
    trained(make_run(tmp_path / "half", ema=32, ema_ramp=1e9))
    assert len(betas) == 4 and betas[0] * betas[1] == pytest.approx(0.5)
    out = trained(make_run(tmp_path, ema=1, ema_ramp=1e-9))                      # no memory: the average is the network
    assert all(torch.allclose(out["net"][k], out["ema"][k], atol=1e-6) for k in out["net"])


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    whole, parts = (trained(make_run(tmp_path / str(micro), micro=micro))["net"] for micro in (0, 4))
    assert largest_difference(whole, parts) < 1e-4


def test_sample_grids_show_no_more_at_once_than_training(tmp_path, monkeypatch):
    seen, preview = [], td.preview

    def watched(net, path, predict, z, **told):
        seen.append((len(z), len(told["label"])))
        return preview(net, path, predict, z, **told)
    monkeypatch.setattr(td, "preview", watched)
    labels = td.GivenLabels(td.Condition("label", torch.arange(41) % 3), td.Condition("label", torch.arange(3)), 0.1)
    run = make_run(tmp_path, micro=8)
    run.model.mult = [1]
    trained(run, td.build_model(run.model, 32, num_labels=2), labels)            # ten pictures for each of two labels
    assert seen == [(8, 8), (8, 8), (4, 4)]


WAITED_FOR = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_consecutive", "_unique2")


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU has to be waited for, since their result is needed on the host."""
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f.overloadpacket.__name__ in WAITED_FOR
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("path", ["cv", "vp"])
def test_no_update_waits_for_the_gpu(path, tmp_path, monkeypatch):
    """As many such operations in a training of many updates as in one of few: a log line and a checkpoint each."""
    monkeypatch.setattr(td, "preview", lambda net, path, predict, z: z)
    counts = []
    for images in (64, 128):
        with Waits() as waits:
            trained(make_run(tmp_path / str(images), path=path, images=images, log_every=192, save_every=192,
                             grid_every=192))
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("path, solver", [("cv", "heun"), ("vp", "heun"), ("vp-sd", "euler")])
def test_no_step_of_a_sampler_waits_for_the_gpu(path, solver, interval):
    """Tensors without data have no value that the host could ask for: an attempt would be an error."""
    net = td.build_model(dataclasses.replace(SMALL, mult=[1]), 32, num_labels=3).eval().to("meta")
    told = td.Condition("label", torch.arange(4)).to("meta")
    field = sample_ode.Field(net, td.PATHS[path], "eps", 2.0, interval, condition=told)
    x, label = torch.randn(4, 3, 32, 32, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    x, calls = sample_ode.integrate(field, x, label, solver, 9, 1e-3)
    assert x.shape == (4, 3, 32, 32) and x.is_meta
    evaluations = calls                                   # guided ones take two
    if interval[0] == 0:
        assert field.calls == 4 * evaluations * 2
    else:
        assert 4 * evaluations < field.calls < 8 * evaluations


def test_lengths_for_many_more_images_are_pointed_out(tmp_path, capsys):
    """40 images: 1,000 epochs pass, more do not, also in a dry run, once data is there."""
    run = make_run(tmp_path, images=64)
    trained(run)
    assert "note" not in capsys.readouterr().out
    td.say_epochs(run, dataclasses.replace(run.cfg, images=40_000), 40)
    assert not capsys.readouterr().out
    td.say_epochs(run, dataclasses.replace(run.cfg, images=20_000_000), 40)
    said = capsys.readouterr().out
    assert "images=20,000,000 are 500,000 epochs of 40 training images" in said and "try images=8000" in said
    cr.write_json(tmp_path / "data/train/info.json", dict(count=40))
    td.say_training(run, dataclasses.replace(run.cfg, images=80_000), td.build_model(run.model, 32), 3, 32, tmp_path)
    assert "2,000 epochs" in capsys.readouterr().out


def test_what_a_kill_while_saving_leaves_is_removed(tmp_path, monkeypatch):
    def killed_while_saving(run, folder, state):
        (folder / ".checkpoint.pt.01234567.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    folder = tmp_path / "diffusion/base"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(td, "save_checkpoint", killed_while_saving)
        trained(make_run(tmp_path))
    trained(make_run(tmp_path))
    assert len(log(tmp_path)) == 2
    assert {f.name for f in folder.iterdir()} == {"checkpoint.pt", "checkpoint.json", "metrics.jsonl", "samples"}


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    trained(make_run(tmp_path))
    before = (tmp_path / "diffusion/base/checkpoint.pt").read_bytes()
    net = td.build_model(SMALL, 32)
    net.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(cr.UserError, match="last checkpoint is kept"):
        trained(make_run(tmp_path, images=128), net)
    assert (tmp_path / "diffusion/base/checkpoint.pt").read_bytes() == before


def test_global_generators_are_left_alone_and_weights_stay_float32(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    out = trained(make_run(tmp_path, precision="bf16"))
    assert torch.equal(torch.rand(3), want) and np.array_equal(np.random.get_state()[1], before)
    assert all(v.dtype == torch.float32 and not k.startswith("_orig_mod") for k, v in out["net"].items())


def test_a_released_checkpoint_is_read_like_others(tmp_path, monkeypatch, capsys):
    state = trained(make_run(tmp_path))
    out = tmp_path / "out.pt"
    monkeypatch.setattr(sys, "argv", ["release.py", str(tmp_path / "diffusion/base/checkpoint.pt"), str(out)])
    runpy.run_path(str(ROOT / "results" / "release.py"), run_name="__main__")
    net, there = td.load_model(make_run(tmp_path), str(out))
    assert there["seen"] == state["seen"] and "optimizer" not in there and "64 images seen" in capsys.readouterr().out
    for name, value in net.state_dict().items():
        assert torch.equal(value, state["ema"][name].bfloat16().float()), name


def test_checkpoints_of_before_are_refused_with_advice(tmp_path):
    state = trained(make_run(tmp_path))
    (tmp_path / "old").mkdir()
    torch.save(state | dict(format=1), tmp_path / "old/checkpoint.pt")
    with pytest.raises(cr.UserError, match="format 1, this code reads 3.*train again"):
        td.load_model(make_run(tmp_path), "old")


def test_dry_runs_say_what_would_be_done(tiny, tmp_path):
    out = inside("train_diffusion", tiny, f"run={tmp_path}", "--dry-run")
    net = td.build_model(cr.Model(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16, stem=4), 32)
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in out and "GFLOP forward an image" in out
    assert "16 updates of 32 images" in out and "MB in" in out and not (tmp_path / "data").exists()


def test_two_trainings_of_one_name_are_refused(tiny, tmp_path, refuse):
    with cr.locked(make_run(tmp_path), "diffusion", "base"):
        said = refuse("train_diffusion", tiny, f"run={tmp_path}", "data.train=8", "data.test=8")
    assert "another command is making it" in said


# ---------------------------------------------------------------------------------------------------------------------
# Compiled

COMPILED = """
import functools, sys, torch
sys.path.insert(0, {root!r})
from torch._dynamo.backends.debugging import aot_eager
import train_diffusion as td
graphs, compile, wrap = [], torch.compile, torch.nn.parallel.DistributedDataParallel
torch.compile = lambda net: compile(net, backend=lambda graph, inputs: graphs.append(1) or aot_eager(graph, inputs))
torch.nn.parallel.DistributedDataParallel = functools.partial(wrap, bucket_cap_mb=1)
td.main()
if torch.distributed.get_rank() == 0:
    print("graphs", len(graphs))
"""


def test_two_ranks_of_a_compiled_network_send_gradients_in_buckets(tiny, tmp_path):
    """One graph a bucket, so that gradients travel while others are computed; losses are those of the plain network."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED.format(root=str(ROOT)))
    words = ["images=64", "model.channels=96", "model.mult=1", "model.attention=8", "data.train=128", "data.test=64",
             "log_every=32", "micro=8"]
    inside("train_diffusion", tiny, f"run={tmp_path / 'plain'}", *words)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    p = subprocess.run([*launcher, script, tiny, f"run={tmp_path / 'compiled'}", *words, "compile=true"],
                       capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert p.returncode == 0, p.stderr
    assert int(p.stdout.split("graphs")[1]) > 3
    plain, compiled = ([line["loss"] for line in log(tmp_path / how)] for how in ("plain", "compiled"))
    assert len(plain) == 2 and np.allclose(plain, compiled, rtol=1e-4)


def test_a_compiled_network_trains_and_samples_like_the_plain_one(tiny, tmp_path, monkeypatch):
    compiled, compile = [], torch.compile                 # run as captured: generating C++ would take minutes

    def eager(net, **how):
        compiled.append(how)
        return compile(net, backend="aot_eager", **how)
    monkeypatch.setattr(torch, "compile", eager)

    def run(stage, folder, *words):
        shape = ["data.train=128", "data.test=64", "model.mult=1", "model.attention=8"]
        words = [f"{stage.__name__}.py", str(tiny), f"run={tmp_path / folder}", *shape, *words]
        monkeypatch.setattr(sys, "argv", words)
        stage.main()
    run(td, "true", "images=64", "compile=true")
    run(td, "false", "images=64", "compile=false")
    run(td, "again", "images=64", "compile=true", "recompute=true")
    true, false, again = ([line["loss"] for line in log(tmp_path / how)] for how in ("true", "false", "again"))
    assert len(compiled) == 2 and len(true) == 1
    assert np.allclose(true, false, rtol=1e-4) and np.allclose(again, false, rtol=1e-4)
    run(td, "true", "images=96", "compile=false")         # may change when a training goes on: weights keep their names
    for how in ("true", "false"):
        run(sample_ode, "true", "evaluate=false", "n=16", "batch=8", "solver=euler", f"compile={how}", f"name={how}")
    images = [np.load(tmp_path / f"true/samples/{how}/images.npy").astype(int) for how in ("true", "false")]
    assert len(compiled) == 3 and np.abs(images[0] - images[1]).max() <= 1
    online = ["labels=online", "init=", "K=6", "switch=64", "sk_freeze=0", "sk_ramp=0", "sk_queue=64",
              "sk_grad=backbone", "images=128"]
    compiled.clear()
    for how in ("true", "false"):                         # teacher and student are read as they are
        run(train_guided, "true", *online, f"compile={how}", f"name={how}")
    a, b = (log(tmp_path / "true", f"guided/{how}") for how in ("true", "false"))
    assert len(compiled) == 1 and len(a) == 1
    assert all(np.allclose(x[key], y[key], rtol=1e-3) for x, y in zip(a, b) for key in ("loss", "sk_loss", "grad_norm"))


# ---------------------------------------------------------------------------------------------------------------------
# Killed at arbitrary moments, saving included, and run again: the same bits as a run that was never killed

SLOW_SAVES = ["save_every=32", "log_every=32", "images=1600"]      # after every update: kills hit saving, too


def everything(run, folder="diffusion/base"):
    """All tensors of a checkpoint that training changes, and the number of images seen."""
    state = torch.load(run / folder / "checkpoint.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return state["net"] | {f"ema.{k}": v for k, v in state["ema"].items()} | moments, state["seen"]


def test_kill_and_resume_equals_one_run(tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    inside("train_diffusion", tiny, f"run={whole}", *SLOW_SAVES)
    start = [tiny, f"run={broken}", *SLOW_SAVES]          # start-up is not what is tested
    inside("train_diffusion", *start, "images=64")
    moments, hits = random.Random(1), 0
    for _ in range(2):
        hits += killed("train_diffusion", *start, after=moments.uniform(3.5, 6.0))
    assert hits, "no kill came in time: the test proves nothing"
    inside("train_diffusion", *start)
    (a, n), (b, m) = everything(whole), everything(broken)
    assert n == m == 1600 and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    one, two = ([line["images"] for line in log(d)] for d in (whole, broken))
    assert one == two                                     # no line twice, none missing


# ---------------------------------------------------------------------------------------------------------------------
# Guided training in a run of its own

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with a base model and ground-truth labels."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    inside("train_diffusion", tiny, f"run={folder}", "images=64")
    inside("self_label", tiny, f"run={folder}", "method=classes")
    return folder


def test_guided_training_resumes_and_is_locked_by_its_own_keys_only(tiny, run, refuse):
    words = [tiny, f"run={run}", "labels=classes", "init=diffusion/base"]
    inside("train_guided", *words, "name=once")
    inside("train_guided", *words, "name=twice", "images=96", "save_every=32")
    unread = ["sk_t=0.7", "K=7", "switch=1"]              # keys of labels=online
    said = inside("train_guided", *words, "name=twice", *unread)
    assert "resuming at 96" in said and "not read with labels=classes: sk_t=0.7 K=7 switch=1" in said
    (a, _), (b, _) = everything(run, "guided/once"), everything(run, "guided/twice")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "done already" in inside("train_guided", *words, "name=once", *unread)
    shutil.copytree(run / "guided/once", run / "guided/copy")
    assert "resuming at" in inside("train_guided", *words, "name=copy", "images=288")
    assert "train_guided.drop=0.1, now 0.2" in refuse("train_guided", *words, "name=once", "drop=0.2")


def test_a_training_that_replaces_another_is_its_own_from_the_first_image(tiny, run, refuse):
    words = [tiny, f"run={run}", "labels=classes", "init=diffusion/base", "name=replaced", "log_every=32"]
    inside("train_guided", *words)
    assert "not finite" in refuse("train_guided", *words, "lr=1e20", "overwrite=true", "clip=0")
    assert not (run / "guided/replaced/checkpoint.pt").exists()                  # whose log is gone
    assert "starting, at 0" in inside("train_guided", *words, "images=64")
    assert {line["lr"] <= 1e-3 for line in log(run, "guided/replaced")} == {True}


def test_names_stay_inside_the_run(tiny, run, refuse):
    words = [tiny, f"run={run}"]
    assert "labels=../../outside" in refuse("train_guided", *words, "labels=../../outside")
    assert "init=../x" in refuse("train_guided", *words, "labels=classes", "init=../x")
    assert "no such checkpoint" in refuse("train_guided", *words, "labels=classes", "init=diffusion/none")


def test_checkpoints_say_which_labels_were_trained(tiny, run):
    inside("train_guided", tiny, f"run={run}", "labels=classes", "name=facts", "images=64")
    state = torch.load(run / "guided/facts/checkpoint.pt", weights_only=True)
    labels = np.load(run / "labels/classes.npz")["train"]
    assert state["num_labels"] == 10 and "bank" not in state and state["conditioner"] == {}
    assert np.allclose(state["marginal"], np.bincount(labels, minlength=10) / len(labels))
    assert not [k for k in state["config"]["train_guided"] if k.startswith("sk_")]
    condition = td.load_condition(state, "cpu")
    assert condition.null == 10 and condition(torch.tensor([3, 10]))["label"].tolist() == [3, 10]


def test_turns_and_complaints_of_many_processes(monkeypatch, tmp_path):
    """First one process downloads, then one of each machine, then all others; what one finds wrong all complain of."""
    turns = []
    for rank, local in ((0, 0), (1, 1), (8, 0), (9, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        run = make_run(tmp_path, rank, 16)
        monkeypatch.setattr(cr.Run, "wait", lambda self: None)
        turns.append(list(run.turns()))
    assert turns == [[True, False, False], [False, False, True], [False, True, False], [False, False, True]]
    sent = []
    send = lambda box: sent.append(box[0]) if box[0] else box.__setitem__(0, sent[0])
    monkeypatch.setattr(cr.dist, "broadcast_object_list", send)
    for rank in (0, 1):
        with pytest.raises(cr.UserError, match="no such"):
            run = make_run(tmp_path, rank, 2)
            run.agreed(lambda: cr.require(False, run.cfg, "images", "no such"))
    assert np.array_equal(np.concatenate([make_run(tmp_path, r, 3).share(10) for r in range(3)]), np.arange(10))

"""What only a GPU shows, skipped where there is none: no update and no sampling step waits for it, compiled bf16 training agrees with float32, a layout changes on resume,
DDP over NCCL around a compiled network, CUDA features equal the CPU's."""
import datetime
import importlib
import json
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_training import make_run, split, state

import sample_ode
import train_diffusion as td
from configs import run as cr
from extract_features import catalogue, stream
from self_label import kmeans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def trained(folder, **keys):
    """(losses of the log, checkpoint) of a short training on the GPU; keys of its section."""
    run = make_run(folder)
    run.device = GPU
    for key, value in keys.items():
        setattr(run.cfg, key, value)
    cr.gpu_flags(training=True)
    done = td.fit(run, run.cfg, td.placed(td.build_model(run.model, 32), GPU, run.cfg.compile), run.dir / "diffusion/base", split(), state(run))
    return [json.loads(line)["loss"] for line in (run.dir / "diffusion/base/metrics.jsonl").read_text().splitlines()], done


def waits(f):
    """How many operations of f() made the host wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            f()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in seen)


def test_waiting_is_seen():
    assert waits(lambda: torch.ones(1, device=GPU).item()) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_update_waits(tmp_path, optimizer):
    keys = dict(optimizer=optimizer, log_every=192, save_every=192, grid_every=192)
    counts = [waits(lambda: trained(tmp_path / str(images), images=images, **keys)) for images in (64, 192)]
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("path, solver", [("cv", "heun"), ("vp", "heun"), ("vp-cosine", "ddim")])
def test_no_step_of_a_sampler_waits(path, solver, interval):
    net = td.build_model(cr.Model(channels=16, mult=[1], blocks=1, attention=[], head_channels=16, stem=4), 32, num_labels=3).eval().to(GPU)
    field, x, label = sample_ode.Field(net, td.PATHS[path], "eps", 2.0, interval), torch.randn(4, 3, 32, 32, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
    run = lambda steps: sample_ode.integrate(field, x, label, solver, steps, 1e-3)
    run(3)                                                # kernels load, tables are copied
    assert waits(lambda: run(3)) == waits(lambda: run(9))


def test_compiled_bf16_training_is_like_float32_and_changes_layout_on_resume(tmp_path):
    """The compiled network is channels-last; the plain run that goes on is not."""
    keys = dict(images=128, log_every=64, save_every=64, grid_every=128)
    plain, compiled = trained(tmp_path / "plain", **keys)[0], trained(tmp_path / "compiled", compile=True, precision="bf16", **keys)[0]
    assert len(plain) == 2 and np.allclose(plain, compiled, rtol=0.02)
    further = [trained(tmp_path / name, **keys | dict(images=256), precision=precision)[0] for name, precision in (("plain", "fp32"), ("compiled", "bf16"))]
    assert len(further[0]) == 4 and np.allclose(*further, rtol=0.03)


def test_fp16_scales_its_losses(tmp_path):
    losses, done = trained(tmp_path, images=128, precision="fp16")
    assert np.isfinite(losses).all() and done["scaler"]["scale"] > 1


def test_nccl_and_a_compiled_network(tmp_path):
    """Gradients through DDP and torch.compile in a group of one process are those of the network itself."""
    model, x, t = cr.Model(channels=64, mult=[1, 2], blocks=1, attention=[8], head_channels=32, stem=4), torch.randn(8, 3, 32, 32, device=GPU), torch.linspace(0, 1000, 8, device=GPU)
    cr.gpu_flags(training=False)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    dist.group.WORLD._get_backend(GPU)._set_default_timeout(datetime.timedelta(minutes=30))             # as `start` does
    try:
        nets = [td.placed(td.build_model(model, 32), GPU, compiled) for compiled in (False, True)]
        for p in nets[0].parameters():                    # zeros at the ends would hide what is behind them
            torch.nn.init.normal_(p, std=0.05)
        nets[1].load_state_dict(nets[0].state_dict())
        many = torch.compile(torch.nn.parallel.DistributedDataParallel(nets[1], device_ids=[0], gradient_as_bucket_view=True, bucket_cap_mb=1))
        for net in (nets[0], many):
            net(x, t).square().mean().backward()
        for a, b in zip(*(list(net.parameters()) for net in nets)):
            assert (a.grad - b.grad).norm() <= 1e-3 * a.grad.norm() + 1e-6
    finally:
        dist.destroy_process_group()


def test_orthogonalised_is_that_of_the_cpu():
    """With full float32 products, as training with Muon sets them; short ones (TF32) would let the iteration diverge."""
    cr.gpu_flags(training=True, exact=True)
    m = torch.randn(3, 256, 2304)
    assert (td.orthogonalised(m) - td.orthogonalised(m.to(GPU)).cpu()).abs().max() < 1e-3


def test_dry_run_counts_on_the_device(tiny, tmp_path, monkeypatch, capsys):
    """Networks that are not there yet are built where their inputs are."""
    for name, *words in (("extract_features", "activations=unet-out", "t=0.5"), ("probe",), ("sample_ode", "n=10"), ("train_guided", "labels=online", "switch=100")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tiny), f"run={tmp_path / 'none'}", "--dry-run", *words])
        importlib.import_module(name).main()
        assert "work:" in capsys.readouterr().out


def test_resizing_for_inception_is_that_of_the_cpu():
    x = torch.from_numpy(split(8).images)
    assert (sample_ode.inception_resize(x) - sample_ode.inception_resize(x.to(GPU)).cpu()).abs().max() < 0.02


def test_features_and_clusters_are_those_of_the_cpu():
    """float32 in full, as after gpu_flags(training=False)."""
    cr.gpu_flags(training=False)
    net, images, got = td.build_model(cr.Model(channels=32, mult=[1, 2], blocks=1, attention=[16], head_channels=16), 32).eval(), split(64).images, {}
    name = [n for n in catalogue(net) if n.startswith("mid")][-1]
    for device in ("cpu", "cuda"):
        parts = stream(net.to(device), dict(path="cv"), images, np.arange(64), [name], [0.8], device=torch.device(device), context=td.nullcontext, batch=16)
        got[device] = torch.cat([features[name, 0.8].cpu() for _, features in parts])
    assert (got["cpu"] - got["cuda"]).norm() < 1e-4 * got["cpu"].norm()
    centres = [kmeans(got["cpu"].to(d), 4, metric="euclidean", iterations=5, start=got["cpu"][:4].to(d), device=torch.device(d))[0].cpu() for d in ("cpu", "cuda")]
    assert torch.allclose(*centres, atol=1e-3)


def test_compiled_features_are_the_same():
    """Channels-last, up to the middle block, the last batch filled up."""
    cr.gpu_flags(training=False)
    images, got = split(40).images, []
    for compiled in (False, True):
        net = td.placed(td.build_model(cr.Model(channels=64, mult=[1, 2], blocks=1, attention=[8], head_channels=32, stem=2), 32).eval(), GPU, compiled)
        name = [n for n in catalogue(net) if n.startswith("mid")][-1]
        parts = stream(net, dict(path="cv"), images, np.arange(40), [name], [0.8], device=GPU, context=td.nullcontext, batch=16, compiled=compiled)
        got.append(torch.cat([features[name, 0.8].cpu() for _, features in parts]))
    assert got[0].shape == got[1].shape and (got[0] - got[1]).norm() < 1e-3 * got[0].norm()


def test_dopri5_gives_the_cpu_s_samples():
    cr.gpu_flags(training=False)
    net = td.build_model(cr.Model(channels=16, mult=[1], blocks=1, attention=[], head_channels=16, stem=4), 32, num_labels=3).eval()
    x, label, got = torch.randn(21, 3, 32, 32), torch.arange(21) % 3, []
    for device in ("cpu", "cuda"):
        field = sample_ode.Field(net.to(device), td.PATHS["cv"], "v", 2.0)
        y, calls = sample_ode.integrate(field, x.to(device), label.to(device), "dopri5", 1, 1e-3)
        got.append((y.cpu(), calls))
    assert torch.allclose(got[0][0], got[1][0], atol=1e-3) and abs(got[0][1] - got[1][1]) <= 6

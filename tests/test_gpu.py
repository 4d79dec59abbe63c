"""What only a GPU shows; skipped where there is none. Nothing waits for it in training and sampling, compiled bf16
agrees with float32, NCCL under torch.compile, features and samples equal the CPU's."""
import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from torch import nn
import yaml

import sample_ode
import train_diffusion as td
from configs import data as cd
from configs import run as cr
from configs.shapes import draw_shapes
from extract_features import catalogue, stream
from self_label import lloyd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = yaml.safe_load(TINY)["model"] | dict(mult=[1], attention=[])
WIDE = SMALL | dict(channels=64, mult=[1, 2], attention=[8], head_channels=32)


def network(model=SMALL, **conditions):
    return td.build_model(cr.fill("model", cr.Model, model), 32, **conditions)


def three_labels(device):
    return td.Condition("label", torch.arange(4)).to(device)


def images(n):
    return draw_shapes(0, np.arange(n))[0]


def trained(folder, **keys):
    """(losses of the log, checkpoint) of a short training on the GPU; keys of its section."""
    cfg = td.TrainDiffusion(batch=16, lr=1e-3, warmup=1, ema=32, **(dict(precision="fp32") | keys))
    model = cr.fill("model", cr.Model, SMALL | dict(mult=[1, 2]))
    sections = dict(data={}, model=dataclasses.asdict(model), train_diffusion=dataclasses.asdict(cfg))
    run = cr.Run("train_diffusion", folder, cfg, cr.Data(), model, sections, False, set(), device=GPU)
    data = cd.Split(images(40), np.zeros(40, np.int64), None, None, dict(fingerprint="x"))
    state = td.new_state(run, "diffusion", data, 32, 3)
    cr.gpu_flags(training=True)
    done = td.fit(run, cfg, td.build_model(model, 32).to(GPU), folder / "diffusion/base", data, state)
    lines = (folder / "diffusion/base/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], done


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
    counts = [waits(lambda: trained(tmp_path / str(n), images=n, **keys)) for n in (64, 192)]
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("path, solver", [("cv", "heun"), ("vp", "heun"), ("vp-sd", "euler")])
def test_no_step_of_a_sampler_waits(path, solver, interval):
    net = network(num_labels=3).eval().to(GPU)
    field = sample_ode.Field(net, td.PATHS[path], "eps", 2.0, interval, condition=three_labels(GPU))
    x, label = torch.randn(4, 3, 32, 32, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)
    run = lambda steps: sample_ode.integrate(field, x, label, solver, steps, 1e-3)
    run(3)                                                # kernels load, tables are copied
    assert waits(lambda: run(3)) == waits(lambda: run(9))


def test_compiled_bf16_training_is_like_float32_and_goes_on_without(tmp_path):
    keys = dict(images=128, log_every=64, save_every=64, grid_every=128)
    plain = trained(tmp_path / "plain", **keys)[0]
    compiled = trained(tmp_path / "compiled", compile=True, precision="bf16", **keys)[0]
    assert len(plain) == 2 and np.allclose(plain, compiled, rtol=0.02)
    keys |= dict(images=256)
    further = [trained(tmp_path / "plain", **keys)[0], trained(tmp_path / "compiled", precision="bf16", **keys)[0]]
    assert len(further[0]) == 4 and np.allclose(*further, rtol=0.03)


def test_nccl_and_a_compiled_network(tmp_path):
    """Gradients through DDP and torch.compile in a group of one process are those of the network itself."""
    x, t = torch.randn(8, 3, 32, 32, device=GPU), torch.linspace(0, 1000, 8, device=GPU)
    cr.gpu_flags(training=False)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        nets = [network(WIDE).to(GPU) for _ in range(2)]
        for p in nets[0].parameters():                    # zeros at the ends would hide what is behind them
            nn.init.normal_(p, std=0.05)
        nets[1].load_state_dict(nets[0].state_dict())
        many = nn.parallel.DistributedDataParallel(nets[1], device_ids=[0], gradient_as_bucket_view=True,
                                                   bucket_cap_mb=1)
        for net in (nets[0], torch.compile(many)):
            net(x, t).square().mean().backward()
        for a, b in zip(*(net.parameters() for net in nets)):
            assert (a.grad - b.grad).norm() <= 1e-3 * a.grad.norm() + 1e-6
    finally:
        dist.destroy_process_group()


def test_orthogonalised_is_that_of_the_cpu():
    """With full float32 products, as training with Muon sets them; with short ones (TF32) the iteration diverges."""
    cr.gpu_flags(training=True, exact=True)
    m = torch.randn(3, 256, 2304)
    assert (td.orthogonalised(m) - td.orthogonalised(m.to(GPU)).cpu()).abs().max() < 1e-3


def test_resizing_for_inception_is_that_of_the_cpu():
    x = torch.from_numpy(images(8))
    assert (sample_ode.inception_resize(x) - sample_ode.inception_resize(x.to(GPU)).cpu()).abs().max() < 0.02


def test_features_and_clusters_are_those_of_the_cpu():
    """float32 in full, as after gpu_flags(training=False)."""
    cr.gpu_flags(training=False)
    net, got = network(WIDE).eval(), []
    name = [n for n in catalogue(net) if n.startswith("mid")][-1]
    for device in (CPU, GPU):
        parts = stream(net.to(device), dict(path="cv"), images(64), np.arange(64), [name], [0.8], device=device,
                       context=td.nullcontext, batch=16)
        got.append(torch.cat([features[name, 0.8].cpu() for _, features in parts]))
    assert (got[0] - got[1]).norm() < 1e-4 * got[0].norm()
    centres = [lloyd(got[0].to(d), got[0][:4].to(d), "euclidean", 5, cr.ALONE)[0].cpu() for d in (CPU, GPU)]
    assert torch.allclose(*centres, atol=1e-3)


def test_dopri5_gives_the_cpu_s_samples():
    cr.gpu_flags(training=False)
    net, got = network(num_labels=3).eval(), []
    x, label = torch.randn(21, 3, 32, 32), torch.arange(21) % 3
    for device in (CPU, GPU):
        field = sample_ode.Field(net.to(device), td.PATHS["cv"], "v", 2.0, condition=three_labels(device))
        y, calls = sample_ode.integrate(field, x.to(device), label.to(device), "dopri5", 1, 1e-3)
        got.append((y.cpu(), calls))
    assert torch.allclose(got[0][0], got[1][0], atol=1e-3) and abs(got[0][1] - got[1][1]) <= 6

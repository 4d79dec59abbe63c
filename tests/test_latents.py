"""Latents of a tiny random autoencoder: encoded once by any number of processes, drawn in training, decoded for
pictures and scores."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import inside, stage

import train_diffusion as td
from configs import data as cd
from configs.data import as_input, decode, load_data, open_autoencoder, prepare_data, row_shape
from configs.run import Data, Model, Run, UserError
from train_diffusion import build_model

SETTINGS = """
model: {backbone: uvit, channels: 32, depth: 2, heads: 4, patch: 2, final_conv: false}
train_diffusion: {images: 64, batch: 32, log_every: 32, grid_every: 64, precision: fp32}
extract_features: {activations: [mid-vit-block0-out], t: [0.9], precision: fp32}
self_label: {K: 4, restarts: 1}
train_guided: {images: 32, batch: 16, grid_every: 32, precision: fp32}
sample_ode: {n: 6, steps: 2, solver: euler, precision: fp32, evaluator: pixels}
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A random autoencoder on disk that halves the side of images."""
    cd.torchvision_datasets()                             # diffusers imports torchvision, see there
    from diffusers import AutoencoderKL as kind
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                   block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16,
                   scaling_factor=0.4, shift_factor=0.1)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(vae, tmp_path_factory):
    """(YAML, folder) of a run on latents after a short training."""
    folder = tmp_path_factory.mktemp("latents")
    data = f"data: {{source: shapes, train: 256, test: 64, size: 16, latents: {vae}}}"
    (folder / "latents.yaml").write_text(data + SETTINGS)
    inside("train_diffusion", folder / "latents.yaml", f"run={folder / 'run'}")
    return folder / "latents.yaml", folder / "run"


def there(folder, vae, rank=0, world=1):
    """What `start` would hand to a stage of this run; other processes are thought to be elsewhere in time."""
    run = Run("train_diffusion", folder, None, Data(train=256, test=64, size=16, latents=str(vae)), Model(), {}, False,
              set(), rank, world)
    run.wait = lambda: None
    run.agreed = lambda look: look()
    return run


def test_latents_are_those_of_the_autoencoder(run, vae):
    from diffusers import AutoencoderKL
    net, folder = AutoencoderKL.from_pretrained(vae), run[1] / "data/train"
    images, latents = np.load(folder / "images.npy"), np.load(folder / "latents.npy")
    assert latents.shape == (256, 2, 8, 8, 8) and latents.dtype == np.float16
    assert json.loads((folder / "latents.json").read_text())["count"] == 256
    x = torch.from_numpy(images[200:210]).float() / 127.5 - 1
    for i, v in enumerate((x, x.flip(-1))):
        with torch.no_grad():
            d = net.encode(v).latent_dist
        expected = torch.cat([(d.mean - 0.1) * 0.4, d.std * 0.4], 1)
        assert np.allclose(latents[200:210, i], expected, rtol=2e-3, atol=2e-3)
    z = torch.from_numpy(latents[:5, 0, :4]).float()
    with torch.no_grad():
        wanted = net.decode(z / 0.4 + 0.1).sample
    assert torch.allclose(decode(open_autoencoder(there(run[1], vae)), z, 2), wanted, atol=1e-5)


def test_network_input():
    g = torch.Generator().manual_seed(0)
    rows, z = torch.randn(3, 2, 8, 4, 4, generator=g).half(), torch.randn(3, 4, 4, 4, generator=g)
    flip = torch.tensor([True, False, True])
    assert row_shape(rows) == (4, 4, 4) and torch.equal(as_input(rows), rows[:, 0, :4].float())
    drawn = as_input(rows, flip, z)
    assert torch.equal(drawn[0], rows[0, 1, :4].float() + rows[0, 1, 4:].float() * z[0])
    assert torch.equal(drawn[1], rows[1, 0, :4].float() + rows[1, 0, 4:].float() * z[1])
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    assert torch.equal(as_input(images, flip[:2])[0], images[0].flip(-1) / 127.5 - 1) and row_shape(images) == (3, 2, 2)


def test_encoding_that_was_killed_begins_again(run, vae, tmp_path, monkeypatch):
    """Killed between the last row and the end: nothing that a later command could take for latents."""
    expected = np.load(run[1] / "data/train/latents.npy")
    shutil.copytree(run[1] / "data", tmp_path / "data")
    shutil.copy(run[1] / "config.yaml", tmp_path)
    for file in (tmp_path / "data").rglob("latents.*"):
        file.unlink()

    def killed(a, b):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cd.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(there(tmp_path, vae))
    with pytest.raises(UserError, match="latents.npy: not there"):
        load_data(there(tmp_path, vae), "train")
    prepare_data(there(tmp_path, vae))
    assert np.array_equal(load_data(there(tmp_path, vae), "train").latents, expected)
    assert not list((tmp_path / "data").rglob(".latents*"))


def test_chain_on_latents(run):
    """Two ranks for the encoding; pictures and scores are of pixels."""
    yaml, folder = run
    other = folder.parent / "two"
    stage("train_diffusion", yaml, f"run={other}", "--prepare", ranks=2)
    for split in ("train", "test"):
        two, one = (np.load(f / f"data/{split}/latents.npy") for f in (other, folder))
        assert np.array_equal(two, one)
    state = torch.load(folder / "diffusion/base/checkpoint.pt", weights_only=True)
    assert (state["channels"], state["size"]) == (4, 8) and list((folder / "diffusion/base/samples").glob("*.png"))
    inside("extract_features", yaml, f"run={folder}")
    inside("self_label", yaml, f"run={folder}", "method=kmeans")
    inside("train_guided", yaml, f"run={folder}", "labels=kmeans", "recompute=true")
    inside("train_guided", yaml, f"run={folder}", "labels=online", "K=4", "switch=16", "sk_queue=64",
           "sk_activation=mid-vit-block0-out")
    inside("sample_ode", yaml, f"run={folder}", "name=encoded", "direction=encode", "n=3")
    inside("sample_ode", yaml, f"run={folder}", "checkpoint=guided/kmeans", "name=kmeans", "guidance=2")
    assert np.load(folder / "samples/kmeans/images.npy").shape == (6, 3, 16, 16)
    scores = json.loads((folder / "samples/kmeans/metrics.json").read_text())["scores"]
    assert scores["reference"] == "test, 64 images"


def test_training_sees_draws_of_the_latents(run, monkeypatch):
    """Mean and deviation of a row, under a noise of its own, which is not that of the path."""
    seen, loss = [], td.loss_per_image

    def watched_input(rows, flip=None, z=None):
        seen.append([rows, flip, z, as_input(rows, flip, z)])
        return seen[-1][-1]

    def watched_loss(net, path, predict, x, z, *rest, **more):
        seen[-1].append((x, z))
        return loss(net, path, predict, x, z, *rest, **more)

    monkeypatch.setattr(td, "as_input", watched_input)
    monkeypatch.setattr(td, "loss_per_image", watched_loss)
    inside("train_diffusion", run[0], f"run={run[1]}", "name=drawn", "images=64")
    assert len(seen) == 2
    for rows, flip, own, x, (used, z) in seen:
        mean, std = torch.where(flip[:, None, None, None], rows[:, 1], rows[:, 0]).float().chunk(2, 1)
        assert torch.allclose(used, mean + std * own) and torch.equal(used, x) and (std > 0).all()
        assert own.shape == z.shape and not torch.equal(own, z)


def test_what_cannot_work(run, vae, refuse, tmp_path, monkeypatch):
    yaml, folder = run
    assert "data.latents=" in refuse("train_diffusion", yaml, f"run={folder}", "data.latents=")
    assert "multiple of 2" in refuse("train_diffusion", yaml, f"run={tmp_path / 'r'}", "data.size=15")
    alone = [f"run={tmp_path / 'alone'}", f"checkpoint={folder / 'diffusion/base'}", "evaluate=false"]
    assert "name their autoencoder" in refuse("sample_ode", yaml, *alone, "data.latents=")
    inside("self_label", yaml, f"run={folder}", "method=classes")
    assert "drawn on pixels" in refuse("train_guided", yaml, f"run={folder}", "labels=classes", "condition=box")
    broken = shutil.copytree(vae, tmp_path / "vae")
    next(broken.glob("*.safetensors")).write_bytes(b"no tensors")
    said = refuse("train_diffusion", yaml, f"run={tmp_path / 'r'}", f"data.latents={broken}")
    assert "expected an AutoencoderKL" in said and not (tmp_path / "r/data/train/latents.json").exists()
    other = shutil.copytree(folder, tmp_path / "other")   # encoded by the autoencoder whose weights now change
    about = json.loads((other / "data/test/latents.json").read_text())
    (other / "data/test/latents.json").write_text(json.dumps(about | dict(weights="0" * 16)))
    said = refuse("sample_ode", yaml, f"run={other}", "name=late")
    assert "no longer the autoencoder" in said and "data/test" in said
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refuse("train_diffusion", yaml, f"run={tmp_path / 'r2'}")


@pytest.mark.parametrize("model", [
    Model(channels=16, mult=[1, 2], blocks=1, attention=[8], head_channels=8, dropout=0.2),
    Model("uvit", channels=32, depth=4, heads=4)], ids=["unet", "uvit"])
def test_recomputed_gradients_are_the_same(model):
    """Dropout masks among them; less is kept."""
    grads, kept = [], []
    for again in (False, True):
        net, held = build_model(model, 16).train(), []
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        if again:
            td.recompute(net)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            out = net(torch.ones(2, 3, 16, 16), torch.tensor([3.0, 700.0])).square().mean()
        out.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        kept.append(sum(held))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7) and grads[0].norm() > 0 and kept[1] < 0.5 * kept[0]


def test_keys_that_came_later_do_not_stop_a_resumed_run(run):
    """A checkpoint that lacks a key was made with its default."""
    state = torch.load(run[1] / "diffusion/base/checkpoint.pt", weights_only=True)
    for section, key in (("model", "clock"), ("train_diffusion", "recompute")):
        del state["config"][section][key]
    torch.save(state, run[1] / "diffusion/base/checkpoint.pt")
    assert "done already" in inside("train_diffusion", run[0], f"run={run[1]}")

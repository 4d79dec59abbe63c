"""Latents of a tiny random autoencoder: encoded once by any number of processes, drawn in training, decoded for pictures and scores. And what large images need besides."""
import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stage

import train_diffusion as td
from configs import data as cd
from configs import run as cr
from configs.data import as_input, decode, encode_latents, open_autoencoder, row_shape, to_latents
from configs.run import Data, Model
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
    kind, folder = cd.autoencoder_kl(), tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), layers_per_block=1,
             norm_num_groups=4, sample_size=16, scaling_factor=0.4, shift_factor=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(vae, tmp_path_factory):
    """(YAML, folder) of a run on latents after a short training."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "latents.yaml").write_text(f"data: {{source: shapes, train: 256, test: 64, size: 16, latents: {vae}}}{SETTINGS}")
    stage("train_diffusion", folder / "latents.yaml", f"run={folder / 'run'}")
    return folder / "latents.yaml", folder / "run"


def there(folder, vae, **more):
    """What `start` would hand to a stage of this run."""
    return SimpleNamespace(dir=folder, data=Data(size=16, latents=str(vae)), vae=None, world=1, rank=0, device=torch.device("cpu"), dry_run=False, say=lambda *_: None,
                           wait=lambda: None, agreed=lambda look: look(), turns=lambda: [True], **more)


def test_latents_are_those_of_the_autoencoder(run, vae):
    from diffusers import AutoencoderKL
    net, folder = AutoencoderKL.from_pretrained(vae), run[1] / "data/train"
    images, latents = np.load(folder / "images.npy"), np.load(folder / "latents.npy")
    assert latents.shape == (256, 2, 8, 8, 8) and latents.dtype == np.float16 and json.loads((folder / "latents.json").read_text())["count"] == 256
    x = torch.from_numpy(images[200:210]).float() / 127.5 - 1
    for i, v in enumerate((x, x.flip(-1))):
        with torch.no_grad():
            d = net.encode(v).latent_dist
        expected = torch.cat([(d.mean - 0.1) * 0.4, d.std * 0.4], 1)
        assert np.allclose(latents[200:210, i], expected, rtol=2e-3, atol=2e-3)
    own = there(run[1], vae)
    with torch.no_grad():
        assert torch.allclose(decode(open_autoencoder(own), torch.from_numpy(latents[:5, 0, :4]).float(), 2),
                              net.decode(torch.from_numpy(latents[:5, 0, :4]).float() / 0.4 + 0.1).sample, atol=1e-5)


def test_network_input():
    g = torch.Generator().manual_seed(0)
    rows, z, flip = torch.randn(3, 2, 8, 4, 4, generator=g).half(), torch.randn(3, 4, 4, 4, generator=g), torch.tensor([True, False, True])
    assert row_shape(rows) == (4, 4, 4) and torch.equal(as_input(rows), rows[:, 0, :4].float())
    drawn = as_input(rows, flip, z)
    assert torch.equal(drawn[0], rows[0, 1, :4].float() + rows[0, 1, 4:].float() * z[0]) and torch.equal(drawn[1], rows[1, 0, :4].float() + rows[1, 0, 4:].float() * z[1])
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    assert torch.equal(as_input(images, flip[:2])[0], images[0].flip(-1) / 127.5 - 1) and row_shape(images) == (3, 2, 2)


def test_encoding_continues_and_is_shared(run, vae, tmp_path, monkeypatch):
    """Killed after some blocks, continued by two processes in turn: the same file, and no block twice."""
    expected, calls = np.load(run[1] / "data/train/latents.npy"), []
    shutil.copytree(run[1] / "data", tmp_path / "data")
    for f in (tmp_path / "data").rglob("latents.*"):
        f.unlink()
    write = cr.write_rows

    def counted(path, first, rows):
        if path.name == ".latents.npy" and "train" in str(path):
            if len(calls) == 3 and first != -1:
                calls.append("killed")
                raise KeyboardInterrupt
            calls.append(first)
        write(path, first, rows)

    monkeypatch.setattr(cd, "write_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_latents(there(tmp_path, vae), block=32)
    assert not (tmp_path / "data/train/latents.json").exists()
    encode_latents(there(tmp_path, vae), block=32)
    assert sorted(c for c in calls if c != "killed") == list(range(0, 256, 32))
    assert np.array_equal(np.load(tmp_path / "data/train/latents.npy"), expected) and not list((tmp_path / "data").rglob(".latents*"))


def inside(monkeypatch, name, *words):
    """Run a stage in this process, which is quicker."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    importlib.import_module(name).main()


def test_chain_on_latents(run, monkeypatch):
    """Two ranks for the encoding; pictures and scores are of pixels."""
    yaml, folder = run
    other = folder.parent / "two"
    stage("train_diffusion", yaml, f"run={other}", "--prepare", ranks=2)
    for split in ("train", "test"):
        assert np.array_equal(np.load(other / f"data/{split}/latents.npy"), np.load(folder / f"data/{split}/latents.npy"))
    state = torch.load(folder / "diffusion/base/checkpoint.pt", weights_only=True)
    assert (state["channels"], state["size"]) == (4, 8) and list((folder / "diffusion/base/samples").glob("*.png"))
    inside(monkeypatch, "extract_features", yaml, f"run={folder}")
    inside(monkeypatch, "self_label", yaml, f"run={folder}", "method=kmeans")
    inside(monkeypatch, "train_guided", yaml, f"run={folder}", "labels=kmeans", "recompute=true")
    inside(monkeypatch, "train_guided", yaml, f"run={folder}", "labels=online", "K=4", "switch=16", "sk_queue=64", "sk_activation=mid-vit-block0-out")
    inside(monkeypatch, "sample_ode", yaml, f"run={folder}", "checkpoint=guided/online", "name=like", "like=test", "n=3", "evaluate=false")
    inside(monkeypatch, "sample_ode", yaml, f"run={folder}", "name=encoded", "direction=encode", "n=3")
    stage("sample_ode", yaml, f"run={folder}", "checkpoint=guided/kmeans", "name=kmeans", "guidance=2")
    assert np.load(folder / "samples/kmeans/images.npy").shape == (6, 3, 16, 16)
    scores = json.loads((folder / "samples/kmeans/metrics.json").read_text())["scores"]
    assert scores["decoded"] > 0 and scores["reference"] == "test, 64 images"


def test_training_sees_draws_of_the_latents(run, monkeypatch):
    """Mean and deviation of a row, under a noise of its own, which is not that of the path."""
    seen, loss, make = [], td.loss_per_image, cd.as_input
    monkeypatch.setattr(td, "as_input", lambda rows, flip=None, z=None: seen.append([rows, flip, z, make(rows, flip, z)]) or seen[-1][-1])
    monkeypatch.setattr(td, "loss_per_image", lambda net, path, predict, x, z, *rest, **k: seen[-1].append((x, z)) or loss(net, path, predict, x, z, *rest, **k))
    inside(monkeypatch, "train_diffusion", run[0], f"run={run[1]}", "name=drawn", "images=64")
    assert len(seen) == 2
    for rows, flip, own, x, (used, z) in seen:
        mean, std = torch.where(flip[:, None, None, None], rows[:, 1], rows[:, 0]).float().chunk(2, 1)
        assert torch.allclose(used, mean + std * own) and own.shape == z.shape and not torch.equal(own, z) and (std > 0).all() and torch.equal(used, x)


def test_what_cannot_work(run, vae, refuse, tmp_path, monkeypatch):
    yaml, folder = run
    assert "data.latents=" in refuse("train_diffusion", yaml, f"run={folder}", "data.latents=")
    assert "multiple of 2" in refuse("train_diffusion", yaml, f"run={tmp_path / 'r'}", "data.size=15")
    inside(monkeypatch, "self_label", yaml, f"run={folder}", "method=classes")
    assert "drawn on pixels" in refuse("train_guided", yaml, f"run={folder}", "labels=classes", "condition=box")
    assert "latents do not have" in refuse("train_guided", yaml, f"run={folder}", "labels=online", "sk_augment=0.5")
    broken = shutil.copytree(vae, tmp_path / "vae")
    next(broken.glob("*.safetensors")).write_bytes(b"no tensors")
    assert "not a readable AutoencoderKL" in refuse("train_diffusion", yaml, f"run={tmp_path / 'r'}", f"data.latents={broken}")
    assert not (tmp_path / "r/data/train/latents.json").exists()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refuse("train_diffusion", yaml, f"run={tmp_path / 'r2'}")


def test_uvit_weights_sample_through_the_autoencoder(run, tmp_path, monkeypatch):
    """Published latent models are named by their tensors' four channels."""
    from test_published import fake
    yaml, folder = run
    w = build_model(Model("uvit", channels=64, patch=2, depth=2, heads=1, final_conv=False), 8, 4, num_labels=3).state_dict()
    torch.save(w, tmp_path / "w.pt")
    inside(monkeypatch, "sample_ode", yaml, f"run={folder}", f"checkpoint=uvit:{tmp_path / 'w.pt'}", "name=published", "guidance=1.5", "evaluate=false")
    assert np.load(folder / "samples/published/images.npy").shape == (6, 3, 16, 16)
    with pytest.raises(cr.UserError, match="made for inputs of 3 x 16 x 16, this run's are 4 x 8 x 8"):
        td.load_checkpoint(SimpleNamespace(published=cr.Published(), data=Data(size=16, latents="x"), dir=folder, say=lambda *_: None), fake(tmp_path, "adm"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory, costs, chosen classes

@pytest.mark.parametrize("model", [Model(channels=16, mult=[1, 2], blocks=1, attention=[8], head_channels=8, dropout=0.2), Model("uvit", channels=32, depth=4, heads=4)],
                         ids=["unet", "uvit"])
def test_recomputed_gradients_are_the_same(model):
    """Dropout masks among them; less is kept."""
    grads, kept = [], []
    for again in (False, True):
        net, held = build_model(model, 16).train(), []
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        net.run_block = td.again if again else td.plainly
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            out = net(torch.ones(2, 3, 16, 16), torch.tensor([3.0, 700.0])).square().mean()
        out.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        kept.append(sum(held))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7) and grads[0].norm() > 0 and kept[1] < 0.5 * kept[0]


def test_footprint_in_closed_form():
    """A U-ViT's matrix products by hand: 12 D^2 a block and token, 2 D^2 for a skip, 2 L D attention, twice for multiply and add."""
    D, L, depth = 64, 16 + 1, 4
    net = build_model(Model("uvit", channels=D, patch=4, depth=depth, heads=2, final_conv=False), 16)
    flops, kept, less = td.footprint(net, 3, 16)
    blocks = (depth + 1) * (12 * D * D * L) + depth // 2 * 2 * D * D * L
    ends = 16 * 2 * 48 * D
    assert flops == pytest.approx(2 * (blocks + (depth + 1) * 2 * L * L * D) + 2 * ends, rel=0.06)
    assert 4 * L * D * depth < kept < 4 * L * D * depth * 60
    assert 4 * L * D * (depth + 1) < less < kept / 2      # recomputed: the input of every block, one block, the ends
    deeper = build_model(Model("uvit", channels=D, patch=4, depth=2 * depth, heads=2, final_conv=False), 16)
    more = [a - b for a, b in zip(td.footprint(deeper, 3, 16)[1:], (kept, less))]
    assert more[1] == 4 * depth * L * D < more[0] / 5     # of each further block its input in four bytes; skips are inputs of others


def test_costs_are_printed(run, monkeypatch, capsys):
    inside(monkeypatch, "train_diffusion", run[0], f"run={run[1].parent / 'none'}", "--dry-run", "recompute=true")
    text = capsys.readouterr().out
    for word in ("GFLOP forward an image x 4", "GPU-seconds", "encoding, once", "x 2 (mirror images) x 320 images", "memory:", f"{3 * 16 * 16 + 8 * 4 * 8 * 8:,} bytes an image", "x 320"):
        assert word in text, word
    assert not (run[1].parent / "none").exists()


def test_chosen_classes(tmp_path, refuse):
    from PIL import Image
    for split in ("train", "val"):
        for name in ("n3", "n1", "n2"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), (int(name[1]) * 50, i, 0)).save(tmp_path / "tree" / split / name / f"{i}.png")
    words = f"run={tmp_path / 'run'}", "--prepare"
    (tmp_path / "c.yaml").write_text(f"data: {{source: folder, root: {tmp_path / 'tree'}, size: 16, classes: [n3, n1]}}")
    stage("train_diffusion", tmp_path / "c.yaml", *words)
    images, classes = (np.load(tmp_path / f"run/data/train/{k}.npy") for k in ("images", "classes"))
    assert len(images) == 8 and json.loads((tmp_path / "run/data/train/info.json").read_text())["class_names"] == ["n3", "n1"]
    assert set(images[classes == 0, 0, 0, 0]) == {150} and set(images[classes == 1, 0, 0, 0]) == {50}
    assert "data.classes=n9" in refuse("train_diffusion", tmp_path / "c.yaml", f"run={tmp_path / 'other'}", "data.classes=[n9]", "--prepare")


def test_keys_that_came_later_do_not_stop_a_resumed_run(run, monkeypatch, capsys):
    """A checkpoint that lacks a key was made with its default."""
    state = torch.load(run[1] / "diffusion/base/checkpoint.pt", weights_only=True)
    for section, key in (("model", "clock"), ("train_diffusion", "recompute")):
        del state["config"][section][key]
    torch.save(state, run[1] / "diffusion/base/checkpoint.pt")
    inside(monkeypatch, "train_diffusion", run[0], f"run={run[1]}")
    assert "done already" in capsys.readouterr().out

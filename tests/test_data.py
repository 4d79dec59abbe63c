"""Sources of images: folders, arrays, torchvision sets made here; they arrive as arrays in order, cropped, resized and split."""
import dataclasses
import gzip
import json
import struct
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, stage
from PIL import Image

import train_diffusion as td
from configs import run as cr
from extract_features import ExtractFeatures
from probe import Probe
from sample_ode import SampleOde
from self_label import SelfLabel
from train_guided import TrainGuided


def prepare(tiny, run, *words):
    """Prepare data with the smallest training that there is; returns {split: (images, classes, info)}."""
    stage("train_diffusion", tiny, f"run={run}", "data.train=0", "data.test=0", "images=32", *words)
    return {s: (np.load(run / f"data/{s}/images.npy"), np.load(run / f"data/{s}/classes.npy"), json.loads((run / f"data/{s}/info.json").read_text())) for s in ("train", "test")}


def picture(i, shape):
    return np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)


def test_folder_with_classes_and_own_split(tiny, tmp_path):
    for split, n in (("train", 40), ("val", 6)):
        for i in range(n):
            d = tmp_path / "images" / split / ["cat", "dog"][i % 2]
            d.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(i, (32, 32, 3))).save(d / f"{i:03d}.png")
    out = prepare(tiny, tmp_path / "r", "data.source=folder", f"data.root={tmp_path / 'images'}")
    images, classes, info = out["train"]
    assert info["class_names"] == ["cat", "dog"] and classes.tolist() == [0] * 20 + [1] * 20 and len(out["test"][0]) == 6
    assert np.array_equal(images[0], picture(0, (32, 32, 3)).transpose(2, 0, 1)) and np.array_equal(images[20], picture(1, (32, 32, 3)).transpose(2, 0, 1))


def test_flat_folder_is_cropped_and_held_out(tiny, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(60):
        x = np.zeros((20, 60, 3), np.uint8)
        x[:, 20:40] = 200                                 # only the centre square is grey
        Image.fromarray(x).save(tmp_path / "images" / f"{i:03d}.png")
    out = prepare(tiny, tmp_path / "r", "data.source=folder", f"data.root={tmp_path / 'images'}")
    assert len(out["train"][0]) + len(out["test"][0]) == 60 and 0 < len(out["test"][0]) < 20
    assert out["train"][0].shape[1:] == (3, 32, 32) and (out["train"][0] == 200).all() and (out["train"][1] == -1).all()


def test_photographs_are_turned_and_16_bits_kept(tmp_path):
    """EXIF orientation 6 means that the top row of the file is the right edge; 16-bit grey becomes 8-bit grey."""
    from configs.data import Squared
    x = np.zeros((8, 8, 3), np.uint8)
    x[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(x).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray((np.arange(64).reshape(8, 8) * 1024).astype(np.uint16)).save(tmp_path / "deep.png")
    turned, deep = Squared([(Image.open(tmp_path / f"{n}.png"), 0) for n in ("turned", "deep")], 8)
    assert (turned[0][:, :, -2:] == 255).all() and (turned[0][:, :, :-2] == 0).all()
    assert np.array_equal(deep[0][1], np.arange(64).reshape(8, 8) * 4)
    assert "mode F" in Squared([(Image.fromarray(np.zeros((8, 8), np.float32)), 0)], 8)[0][2]


def test_arrays_of_every_layout(tiny, tmp_path):
    x, y = picture(0, (300, 32, 32, 3)), np.arange(300) % 7
    boxes = np.tile(np.array([[1, 2, 3, 4.5]], np.float32), (300, 1))
    np.savez_compressed(tmp_path / "a.npz", images=x, classes=y, boxes=boxes)
    out = prepare(tiny, tmp_path / "a", "data.source=arrays", f"data.root={tmp_path / 'a.npz'}")
    rows = {s: out[s][0] for s in out}
    assert len(rows["train"]) + len(rows["test"]) == 300
    where = {v.tobytes(): i for i, v in enumerate(x.transpose(0, 3, 1, 2).copy())}
    for s in out:                                         # images and classes stay together, in order
        index = [where[v.tobytes()] for v in rows[s]]
        assert index == sorted(index) and out[s][1].tolist() == y[index].tolist()
    assert np.load(tmp_path / "a/data/train/boxes.npy").shape == (len(rows["train"]), 4)
    np.savez(tmp_path / "b.npz", images=x[..., 0], test_images=x[:50, ..., 0])
    out = prepare(tiny, tmp_path / "b", "data.source=arrays", f"data.root={tmp_path / 'b.npz'}")
    assert np.array_equal(out["train"][0], np.repeat(x[..., 0][:, None], 3, 1)) and len(out["test"][0]) == 50
    np.save(tmp_path / "c.npy", x.transpose(0, 3, 1, 2).copy())
    assert len(prepare(tiny, tmp_path / "c", "data.source=arrays", f"data.root={tmp_path / 'c.npy'}")["train"][0]) > 200


def test_torchvision_set_from_files_at_hand(tiny, tmp_path):
    """MNIST's own file format, written here: torchvision reads it without a download."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 64), ("t10k", 32)):
        x, y = picture(n, (n, 28, 28)), (np.arange(n) % 10).astype(np.uint8)
        for kind, blob in (("images-idx3", struct.pack(">4i", 2051, n, 28, 28) + x.tobytes()), ("labels-idx1", struct.pack(">2i", 2049, n) + y.tobytes())):
            (raw / f"{part}-{kind}-ubyte").write_bytes(blob)
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(blob))
    out = prepare(tiny, tmp_path / "r", "data.source=MNIST", f"data.root={tmp_path}", "data.size=28", "model.stem=2", "model.attention=[7]")
    assert out["train"][0].shape == (64, 3, 28, 28) and out["train"][1].tolist() == [i % 10 for i in range(64)]
    assert np.array_equal(out["train"][0][:, 0], picture(64, (64, 28, 28))) and out["train"][2]["class_names"][3].startswith("3")


def test_nothing_is_prepared_twice(tiny, tmp_path):
    a = stage("train_diffusion", tiny, f"run={tmp_path / 'r'}", "images=32").stdout
    b = stage("train_diffusion", tiny, f"run={tmp_path / 'r'}", "images=64").stdout
    assert "prepared 512 train images" in a and "prepared 512" not in b


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_is_valid(file):
    """All sections, as each stage reads them; networks are built without memory."""
    sections = yaml.safe_load(file.read_text())
    kinds = dict(data=cr.Data, model=cr.Model, published=cr.Published, train_diffusion=td.TrainDiffusion, extract_features=ExtractFeatures, self_label=SelfLabel,
                 train_guided=TrainGuided, sample_ode=SampleOde, probe=Probe)
    filled = {name: cr.fill(name, kinds[name], values) for name, values in sections.items()}
    assert {"data", "sample_ode"} <= set(filled)
    for stage_ in ("train_diffusion", "train_guided"):
        if stage_ in filled:
            run = types.SimpleNamespace(world=1)
            td.check_training(run, dataclasses.replace(filled[stage_], precision="fp32"))
    if "model" in filled:
        latent = bool(filled["data"].latents)
        with torch.device("meta"):
            td.build_model(filled["model"], filled["data"].size // 8 if latent else filled["data"].size, 4 if latent else 3)


@pytest.mark.parametrize("name, section, micro", [("imagenet256-adm", "train_guided", 0), ("imagenet256-100-24gb", "train_diffusion", 0), ("imagenet256-100-24gb", "train_guided", 0),
                                                  ("lsun-churches256", "train_diffusion", 32), ("imagenet256-100", "train_guided", 32), ("imagenet256", "train_diffusion", 32)])
def test_configurations_for_24_gb(name, section, micro):
    """The memory that --dry-run computes, with a few GB to spare for what it does not count."""
    sections = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    cfg = cr.fill(section, {"train_guided": TrainGuided, "train_diffusion": td.TrainDiffusion}[section], sections[section])
    latent = "latents" in sections["data"]
    channels, size = (4, sections["data"]["size"] // 8) if latent else (3, sections["data"]["size"])
    with torch.device("meta"):
        net = td.build_model(cr.fill("model", cr.Model, sections["model"]), size, channels)
    parameters, kept = sum(p.numel() for p in net.parameters()), td.footprint(net, channels, size)[1 + cfg.recompute]
    assert 22 * parameters + (micro or cfg.micro or cfg.batch) * kept * (0.5 if latent or cfg.compile else 5 / 6) < 20e9

"""Sources of images: folders, arrays, torchvision sets made here; they arrive as arrays in order, cropped, resized and
split, and what is wrong with them is one line."""
import gzip
import io
import json
import os
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import train_diffusion as td
from configs import data as cd
from configs import run as cr
from configs.data import load_data, open_source, prepare_data, square
from configs import data as data_module
from configs.run import Data, Model, Run, UserError
from extract_features import ExtractFeatures
from probe import Probe
from sample_ode import SampleOde
from self_label import SelfLabel
from train_guided import TrainGuided


def run_of(folder, **data):
    """What `start` would hand to a stage."""
    return Run("train_diffusion", folder, None, Data(**data), Model(), {}, False, set())


def prepare(folder, **data):
    """Prepare data in a run folder; returns {split: (images, classes, info)}."""
    run = run_of(folder, **data)
    prepare_data(run)
    parts = {split: load_data(run, split) for split in ("train", "test")}
    return {split: (np.array(d.images), np.array(d.classes), d.info) for split, d in parts.items()}


def folder_of(run, root, **data):
    return prepare(run, source="folder", root=str(root), **data)


def complaint_of(folder, **data):
    """The line that preparation ends with; nothing is left behind."""
    with pytest.raises(UserError) as e:
        prepare(folder, **data)
    assert not (folder / "data").exists() and not list(folder.glob(".data*")) and "\n" not in str(e.value)
    return str(e.value)


def picture(i, shape=(32, 32, 3)):
    return np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)


def put(path, i=0):
    """An image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(i)).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Folders

@pytest.mark.parametrize("test", ["test", "val", "valid", "Validation", "testing"])
def test_folder_with_classes_and_own_split(tmp_path, test):
    for split, n in (("Train", 40), (test, 6)):
        for i in range(n):
            put(tmp_path / "images" / split / ["cat", "dog"][i % 2] / f"{i:03d}.png", i)
    out = folder_of(tmp_path / "r", tmp_path / "images")
    images, classes, info = out["train"]
    assert info["class_names"] == ["cat", "dog"] and info["class_counts"] == [20, 20] and len(out["test"][0]) == 6
    assert classes.tolist() == [0] * 20 + [1] * 20
    assert np.array_equal(images[0], picture(0).transpose(2, 0, 1))
    assert np.array_equal(images[20], picture(1).transpose(2, 0, 1))


def test_one_class_counts_as_none(tmp_path, capsys):
    """Every label, and every guess, would agree with it."""
    for i in range(40):
        put(tmp_path / "images/horses" / f"{i}.png", i)
    folder_of(tmp_path / "r", tmp_path / "images")
    assert "one class, which tells nothing" in capsys.readouterr().out
    assert (load_data(SimpleNamespace(dir=tmp_path / "r", data=Data()), "train").classes == -1).all()
    data = Data(source="folder", root=str(tmp_path / "images"), classes=["horses"])
    assert open_source(data)[1] == ["horses"]
    np.save(tmp_path / "x.npy", np.zeros((40, 32, 32, 3), np.uint8))
    line = complaint_of(tmp_path / "n", source="arrays", root=str(tmp_path / "x.npy"), classes=["0"])
    assert "no names of classes" in line


def test_a_test_folder_without_classes_gives_way(tmp_path, capsys):
    """ImageNet's layout: what is in test/ has no class, what is in val/ has."""
    for split in ("train/a", "train/b", "val/a", "val/b", "test"):
        for i in range(4):
            put(tmp_path / "images" / split / f"{i}.png", i)
    out = folder_of(tmp_path / "r", tmp_path / "images")
    assert out["test"][1].tolist() == [0] * 4 + [1] * 4
    assert "4 images outside train/ and val/ are left out" in capsys.readouterr().out


def test_classes_of_both_parts_have_the_same_ids(tmp_path):
    for part in ("train/cat", "train/dog", "train/emu", "test/cat", "test/emu"):
        for i in range(3):
            put(tmp_path / "images" / part / f"{i}.png", i)
    (tmp_path / "images/train/ant").mkdir()               # an empty folder is no class
    out = folder_of(tmp_path / "r", tmp_path / "images")
    assert out["test"][1].tolist() == [0] * 3 + [2] * 3 and out["test"][2]["class_counts"] == [3, 0, 3]


def test_flat_folder_is_cropped_and_held_out(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(60):
        x = np.zeros((20, 60, 3), np.uint8)
        x[:, 20:40] = 200                                 # only the centre square is grey
        Image.fromarray(x).save(tmp_path / "images" / f"{i:03d}.png")
    out = folder_of(tmp_path / "r", tmp_path / "images")
    assert len(out["train"][0]) + len(out["test"][0]) == 60 and 0 < len(out["test"][0]) < 20
    assert out["train"][0].shape[1:] == (3, 32, 32) and (out["train"][0] == 200).all() and (out["train"][1] == -1).all()
    assert "prepared 53 train images of no classes" in capsys.readouterr().out


def test_resizing_is_that_of_pillow():
    x = picture(0, (41, 70, 3))
    there = square(Image.fromarray(x), 16)
    wanted = Image.fromarray(x).crop((14, 0, 55, 41)).resize((16, 16), Image.BICUBIC)
    assert np.array_equal(there, np.asarray(wanted).transpose(2, 0, 1))


def test_photographs_are_turned_and_deep_pixels_refused():
    """EXIF orientation 6 means that the top row of the file is the right edge."""
    x, file, exif = np.zeros((8, 8, 3), np.uint8), io.BytesIO(), Image.Exif()
    x[:2] = 255
    exif[0x0112] = 6
    Image.fromarray(x).save(file, "png", exif=exif)
    turned = square(Image.open(file), 8)
    assert (turned[:, :, -2:] == 255).all() and (turned[:, :, :-2] == 0).all()
    for kind in (np.float32, np.uint16):
        with pytest.raises(ValueError, match="store 8 bits"):
            square(Image.fromarray(np.zeros((8, 8), kind)), 8)


def test_contents_decide_and_only_image_formats_are_opened(tmp_path):
    """PostScript under the name of an image would start a program."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: cannot identify image file"):
        cd.read_images(Data(size=8), [(str(tmp_path / "a.png"), 0)], [0])
    for kind in (*cd.FORMATS, "MPO"):                     # MPO: as many cameras write .jpg
        Image.new("RGB", (8, 8), "red").save(tmp_path / "b.jpg", kind)
        assert cd.read_images(Data(size=8), [(str(tmp_path / "b.jpg"), 0)], [0])["images"].shape == (1, 3, 8, 8)


def test_of_an_animation_the_first_picture_counts():
    frames, file = [Image.new("RGB", (8, 8), (colour, 0, 0)) for colour in (100, 200)], io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    assert (square(Image.open(file), 8)[0] == 100).all()


def test_transparent_parts_are_white():
    x = picture(0, (32, 32, 4))
    x[..., 3] = 255
    assert np.array_equal(square(Image.fromarray(x), 32), x[..., :3].transpose(2, 0, 1))
    x[:16, :, 3] = 0
    image = square(Image.fromarray(x), 32)
    assert (image[:, :16] == 255).all() and np.array_equal(image[:, 16:], x[16:, :, :3].transpose(2, 0, 1))


def test_links_and_what_is_no_class(tmp_path):
    """Links to folders are followed; hidden folders, __MACOSX and files that are no images are left."""
    root = tmp_path / "images"
    for i in range(20):
        put(tmp_path / "elsewhere" / f"{i}.png", i)
        put(root / "a" / f"{i}.png", 100 + i)
    put(root / ".ipynb_checkpoints" / "0.png")
    put(root / "__MACOSX" / "a" / "0.png")
    put(root / "a" / ".hidden.png")
    for name in ("a/notes.pdf", "a/data.h5", "a/film.mpg", "list.txt"):
        (root / name).write_bytes(b"no image")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    out = folder_of(tmp_path / "r", root)
    assert out["train"][2]["class_names"] == ["a", "b"] and out["train"][2]["origin"]["files"] == 40
    counts = np.array(out["train"][2]["class_counts"]) + out["test"][2]["class_counts"]
    assert counts.tolist() == [20, 20]


def test_folders_that_are_mixed(tmp_path, capsys):
    root = tmp_path / "images"
    for i in range(30):
        put(root / "train" / "a" / f"{i}.png", i)
    out = folder_of(tmp_path / "alone", root)             # train/ alone: a share of it is held out
    assert out["train"][2]["class_names"] == ["a"] and len(out["train"][0]) + len(out["test"][0]) == 30
    put(root / "valid" / "a" / "0.png")
    put(root / "extra" / "0.png")
    put(root / "train" / "stray.png")
    out = folder_of(tmp_path / "more", root)
    assert [len(out[s][0]) for s in out] == [31, 1] and out["train"][2]["class_counts"] == [30]
    said = capsys.readouterr().out
    assert "prepared 31 train images of 1 classes (a: 30), 1 of no class, 0 unreadable" in said
    assert "1 images outside train/ and valid/ are left out" in said
    assert "no such folder" in complaint_of(tmp_path / "r", source="folder", root="/nowhere")
    (tmp_path / "none").mkdir()
    assert "of 0 images none" in complaint_of(tmp_path / "r", source="folder", root=str(tmp_path / "none"))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(30):
        put(tmp_path / "mine" / f"{i}.png", i)
    assert len(folder_of(tmp_path / "r", "~/mine")["train"][0]) > 20


def test_chosen_classes(tmp_path):
    for split in ("train", "val"):
        for k in (3, 1, 2):
            for i in range(4):
                (tmp_path / "tree" / split / f"00{k}").mkdir(parents=True, exist_ok=True)
                colour = Image.new("RGB", (16, 16), (k * 50, i, 0))
                colour.save(tmp_path / "tree" / split / f"00{k}" / f"{i}.png")
    images, classes, info = folder_of(tmp_path / "r", tmp_path / "tree", size=16, classes=["003", "001"])["train"]
    assert len(images) == 8 and info["class_names"] == ["003", "001"]
    assert set(images[classes == 0, 0, 0, 0]) == {150} and set(images[classes == 1, 0, 0, 0]) == {50}
    words = dict(source="folder", root=str(tmp_path / "tree"))
    assert "known: 001, 002, 003" in complaint_of(tmp_path / "other", classes=["2"], **words)
    assert "name each once" in complaint_of(tmp_path / "other", classes=["001", "003", "001"], **words)


def test_classes_that_are_known_too_late_cannot_be_chosen(tmp_path, monkeypatch):
    read = lambda rows: dict(images=np.zeros((len(rows), 3, 8, 8), np.uint8), classes=rows * 0)
    part = cd.Part(np.full(20, -1), read)
    monkeypatch.setitem(cd.SOURCES, "mine", lambda data: (dict(train=part), ["one", "two"]))
    with pytest.raises(UserError, match="only while its images are read"):
        prepare(tmp_path, source="mine", size=8, classes=["one"])


def test_chosen_shapes_are_as_many_as_asked_for(tmp_path):
    data = cr.Data(classes=["ring", "bow"], train=40, test=30, size=16)
    parts, names = cd.open_source(data)
    for split, count in (("train", 40), ("test", 30)):
        part, rows = cd.choose_rows(data, parts, split)
        found = part.read(rows)
        assert len(rows) == count and names == ["ring", "bow"] and set(found["classes"]) == {0, 1}
        assert np.array_equal(found["classes"], part.classes[rows])


def test_a_source_that_reads_something_else_is_refused(tmp_path, monkeypatch):
    part = cd.Part(np.zeros(20, np.int64), lambda rows: dict(images=np.zeros((len(rows), 3, 8, 8)), classes=rows * 0))
    monkeypatch.setitem(cd.SOURCES, "mine", lambda data: (dict(train=part), ["one"]))
    with pytest.raises(ValueError, match="data.source=mine read images float64"):
        prepare(tmp_path, source="mine", size=8)


def test_very_small_sets_are_refused(tmp_path):
    for i in range(3):
        put(tmp_path / "images" / f"{i}.png", i)
    words = dict(source="folder", root=str(tmp_path / "images"))
    assert "data.test_fraction" in complaint_of(tmp_path / "r", **words)
    assert len(prepare(tmp_path / "r", test_fraction=0.5, **words)["test"][0]) > 0


@pytest.mark.parametrize("when", ["before the lock", "at the lock"])
def test_two_first_commands_with_other_images(tmp_path, monkeypatch, when):
    """Both have seen an empty run folder: the one that comes second is refused, and config.yaml is the first one's."""
    first, second = run_of(tmp_path, train=40, test=10), run_of(tmp_path, train=30, test=10)
    if when == "before the lock":
        prepare_data(first)
    else:
        real = data_module.locked

        def locked(run, *names):
            monkeypatch.setattr(data_module, "locked", real)
            prepare_data(first)
            return real(run, *names)
        monkeypatch.setattr(data_module, "locked", locked)
    with pytest.raises(UserError, match="made with data.train=40, now data.train=30"):
        prepare_data(second)
    assert "train: 40" in (tmp_path / "config.yaml").read_text()
    assert len(load_data(first, "train")) == 40


def spoiled(folder, n=200):
    """Image files of many modes and formats, with flipped bytes, cut short, or with broken EXIF."""
    g, folder = np.random.default_rng(0), folder / "spoiled"
    folder.mkdir()
    kinds = [("png", "RGB"), ("png", "RGBA"), ("png", "LA"), ("png", "P"), ("png", "1"), ("png", "I;16"),
             ("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("webp", "RGBA"), ("gif", "P"), ("tiff", "F"),
             ("tiff", "RGB"), ("bmp", "RGB")]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    for i in range(n):
        ending, mode = kinds[i % len(kinds)]
        image = Image.fromarray(picture(i, (20, 24)).astype(np.uint16) if mode == "I;16" else picture(i, (20, 24, 3)))
        image = image if mode == "I;16" else image.convert("L").convert(mode) if mode in "LAF" else image.convert(mode)
        file = io.BytesIO()
        more = dict(exif=exif) if ending in ("jpg", "webp") or ending == "png" and i % 2 else {}
        image.save(file, {"jpg": "jpeg"}.get(ending, ending), **more)
        blob = bytearray(file.getvalue())
        at = blob.find(b"a camera") if i % 3 == 0 and more else -1
        if at >= 0:                                       # the directory of the EXIF, in front of its text
            for j in g.integers(max(0, at - 40), at, 4):
                blob[j] = g.integers(256)
        elif i % 3 == 1:
            del blob[g.integers(len(blob)):]
        elif i % 7:
            for j in g.integers(0, len(blob), 1 + i % 4):
                blob[j] = g.integers(256)
        (folder / f"{i:03d}.{ending}").write_bytes(blob)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_spoiled_images_are_skipped_or_named(tmp_path):
    folder = spoiled(tmp_path)
    out = folder_of(tmp_path / "r", folder, skip_bad=True)
    skipped = out["train"][2]["skipped"] + out["test"][2]["skipped"]
    assert len(skipped) > 50 and sum(len(out[s][0]) for s in out) + len(skipped) == 200
    assert all(str(folder) in line for line in skipped)
    assert all(out[s][2]["count"] == len(np.load(tmp_path / f"r/data/{s}/classes.npy")) for s in out)
    said = complaint_of(tmp_path / "stop", source="folder", root=str(folder))
    assert said.startswith(f"unreadable image {folder}") and "data.skip_bad=true" in said
    for path in set(folder.iterdir()) - {folder / os.path.basename(line.split(":")[0]) for line in skipped}:
        path.unlink()
    said = complaint_of(tmp_path / "none", source="folder", root=str(folder), skip_bad=True)
    assert "none of the train images can be read" in said


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and torchvision

def test_arrays_of_every_layout(tmp_path):
    x, y = picture(0, (300, 32, 32, 3)), np.arange(300) % 7
    boxes = np.tile(np.array([[1, 2, 3, 4.5]]), (300, 1))
    np.savez_compressed(tmp_path / "a.npz", images=x, classes=y.astype(np.uint8), boxes=boxes)
    out = prepare(tmp_path / "a", source="arrays", root=str(tmp_path / "a.npz"))
    assert len(out["train"][0]) + len(out["test"][0]) == 300
    where = {v.tobytes(): i for i, v in enumerate(x.transpose(0, 3, 1, 2).copy())}
    for images, classes, _ in out.values():               # images and classes stay together, in order
        index = [where[v.tobytes()] for v in images]
        assert index == sorted(index) and classes.tolist() == y[index].tolist()
    assert np.load(tmp_path / "a/data/train/boxes.npy").shape == (len(out["train"][0]), 4)
    np.savez(tmp_path / "b.npz", images=x[..., 0], test_images=x[:50, ..., 0], test_classes=y[:50])
    out = prepare(tmp_path / "b", source="arrays", root=str(tmp_path / "b.npz"))
    assert np.array_equal(out["train"][0], np.repeat(x[..., 0][:, None], 3, 1)) and (out["train"][1] == -1).all()
    assert len(out["test"][0]) == 50 and out["test"][1].tolist() == y[:50].tolist()
    np.save(tmp_path / "c.npy", x.transpose(0, 3, 1, 2).copy())
    assert len(prepare(tmp_path / "c", source="arrays", root=str(tmp_path / "c.npy"))["train"][0]) > 200


IMAGES = np.zeros((40, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("arrays, said", [
    (dict(pictures=IMAGES), "'images'"), (dict(images=IMAGES / 255), "float64"),
    (dict(images=np.zeros((40, 16, 16, 3), np.uint8)), "images: uint8 of shape (40, 16, 16, 3)"),
    (dict(images=np.zeros((40, 32, 32, 4), np.uint8)), "(40, 4, 32, 32), expected uint8 of shape (40, 3, 32, 32)"),
    (dict(images=IMAGES, classes=np.zeros(39, np.int64)), "classes: int64 of shape (39,)"),
    (dict(images=IMAGES, classes=np.zeros(1, np.int64)), "classes: int64 of shape (1,)"),
    (dict(images=IMAGES, classes=np.zeros((40, 5), np.int64)), "expected int64 of shape (40,)"),
    (dict(images=IMAGES, classes=np.arange(40) << 30), "number them from 0"),
    (dict(images=IMAGES, classes=np.zeros(40)), "float64"), (dict(images=IMAGES, boxes=np.zeros((40, 5))), "(40, 5)"),
    (dict(images=IMAGES, masks=np.zeros((40, 8, 8), np.uint8)), "masks: uint8 of shape (40, 8, 8)"),
    (dict(images=IMAGES, masks=IMAGES[..., 0] + 255 * (np.arange(32) % 2).astype(np.uint8)), "0 and 255, which means"),
    (dict(images=IMAGES, test_images=IMAGES[:, :8]), "(40, 8, 32, 3)"),
    (dict(images=IMAGES > 0), "images: bool"), (dict(images=np.array([None] * 40)), "Object arrays"),
    (dict(images=IMAGES[:0]), "none is a train image")])
def test_arrays_that_cannot_be_used(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    line = complaint_of(tmp_path / "r", source="arrays", root=str(tmp_path / "x.npz"))
    assert said in line and ("x.npz" in line or "data.source" in line)


def test_array_files_that_are_damaged(tmp_path):
    words = dict(source="arrays", root=str(tmp_path / "x.npz"))
    assert "not there" in complaint_of(tmp_path / "r", **words)
    np.savez_compressed(tmp_path / "x.npz", images=picture(0, (40, 32, 32, 3)))
    good = (tmp_path / "x.npz").read_bytes()
    for at in (500, len(good) // 2):
        (tmp_path / "x.npz").write_bytes(good[:at] + b"damaged" + good[at + 7:])
        assert "x.npz: damaged" in complaint_of(tmp_path / "r", **words)
    for blob in (b"", b"PK not really", good[:len(good) // 2]):
        (tmp_path / "x.npz").write_bytes(blob)
        assert "x.npz: damaged" in complaint_of(tmp_path / "r", **words)
    np.save(tmp_path / "y.npy", IMAGES)
    os.truncate(tmp_path / "y.npy", 50_000)
    assert "y.npy: damaged" in complaint_of(tmp_path / "r", source="arrays", root=str(tmp_path / "y.npy"))


def test_torchvision_set_from_files_at_hand(tmp_path):
    """MNIST's own file format, written here: torchvision reads it without a download."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 64), ("t10k", 32)):
        x, y = picture(n, (n, 28, 28)), (np.arange(n) % 10).astype(np.uint8)
        for kind, blob in (("images-idx3", struct.pack(">4i", 2051, n, 28, 28) + x.tobytes()),
                           ("labels-idx1", struct.pack(">2i", 2049, n) + y.tobytes())):
            (raw / f"{part}-{kind}-ubyte").write_bytes(blob)
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(blob))
    images, classes, info = prepare(tmp_path / "r", source="MNIST", root=str(tmp_path), size=28)["train"]
    assert images.shape == (64, 3, 28, 28) and classes.tolist() == [i % 10 for i in range(64)]
    assert np.array_equal(images[:, 0], picture(64, (64, 28, 28))) and info["class_names"][3].startswith("3")
    five = ["5 - five"]
    out = prepare(tmp_path / "five", source="MNIST", root=str(tmp_path), size=28, classes=five)
    assert len(out["train"][0]) == 6 and (out["train"][1] == -1).all() and out["train"][2]["class_names"] == five
    assert "data.download=true" in complaint_of(tmp_path / "none", source="CIFAR10", root=str(tmp_path))
    assert "did you mean CIFAR10" in complaint_of(tmp_path / "none", source="CIFAR11")


# ---------------------------------------------------------------------------------------------------------------------
# The run folder

def test_nothing_is_prepared_twice_or_from_something_else(tmp_path, capsys):
    """A moved folder and one that is gone are fine; other images under data.root are not."""
    for i in range(30):
        put(tmp_path / "A" / f"{i}.png", i)
    first = folder_of(tmp_path / "r", tmp_path / "A")
    shutil.move(tmp_path / "A", tmp_path / "B")
    for root in ("A", "B"):
        assert folder_of(tmp_path / "r", tmp_path / root)["train"][2] == first["train"][2]
    assert capsys.readouterr().out.count("prepared 27 train") == 1
    put(tmp_path / "B" / "new.png", 99)
    with pytest.raises(UserError, match=r"B: holds other images than .*r/data, made from .*A; use another run=DIR"):
        folder_of(tmp_path / "r", tmp_path / "B")
    np.save(tmp_path / "x.npy", np.repeat(IMAGES, 2, 0))
    prepare(tmp_path / "arrays", source="arrays", root=str(tmp_path / "x.npy"))
    np.save(tmp_path / "x.npy", np.repeat(IMAGES, 2, 0) + np.uint8(1))
    with pytest.raises(UserError, match="x.npy: holds other images"):
        prepare(tmp_path / "arrays", source="arrays", root=str(tmp_path / "x.npy"))


def test_both_parts_are_there_or_none(tmp_path, monkeypatch):
    """A kill between the two leaves nothing that a later command could take for data; what others left is kept."""
    write, calls = cd.write_part, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(cd, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "r", train=50, test=20)
    assert not (tmp_path / "r/data").exists()
    assert len(prepare(tmp_path / "r", train=50, test=20)["test"][0]) == 20
    put(tmp_path / "s/data/mine.png")
    with pytest.raises(UserError, match="not ours to replace"):
        prepare(tmp_path / "s", train=50, test=20)
    assert (tmp_path / "s/data/mine.png").exists()


def test_arrays_that_do_not_fit_each_other(tmp_path):
    run = run_of(tmp_path, train=50, test=20)
    with pytest.raises(UserError, match="info.json: not there; run train_diffusion.py first"):
        load_data(run, "train")
    prepare_data(run)
    path = tmp_path / "data/train/images.npy"
    for bad in (np.zeros((5, 3, 32, 32), np.uint8), np.zeros((50, 3, 16, 16), np.uint8)):
        np.save(path, bad)
        with pytest.raises(UserError, match="images: uint8 of shape .* for 50 images"):
            load_data(run, "train")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="data/train: damaged"):
        load_data(run, "train")
    (tmp_path / "data/train/info.json").write_text(json.dumps(dict(count=50)))
    with pytest.raises(UserError, match="data/train: damaged"):
        load_data(run, "train")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_is_valid(file):
    """All sections, as each stage reads them; networks are built without memory."""
    kinds = dict(data=Data, model=Model, train_diffusion=td.TrainDiffusion, extract_features=ExtractFeatures,
                 self_label=SelfLabel, train_guided=TrainGuided, sample_ode=SampleOde, probe=Probe)
    filled = {name: cr.fill(name, kinds[name], values) for name, values in cr.read_yaml(file).items()}
    assert {"data", "sample_ode"} <= set(filled)
    if "model" in filled:
        size, latent = filled["data"].size, bool(filled["data"].latents)
        with torch.device("meta"):
            td.build_model(filled["model"], size // 8 if latent else size, 4 if latent else 3)

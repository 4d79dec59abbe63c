"""Images: any source becomes arrays in the run folder, once; row i is image i in every file of a run.

Reads   data.source: the embedded shapes, a folder of images, .npy and .npz arrays, or a torchvision set
Writes  config.yaml; data/{train,test}/: images.npy, classes.npy, boxes.npy, masks.npy (those that there are),
        info.json; of data.latents latents.npy, latents.json

`prepare_data` writes a run's data, `load_data` opens one part of it as a `Split`, `as_input` turns its rows into what
the network sees. To learn the method, skip this file. To add a source, a function and an entry in SOURCES, read `Part`
and `open_shapes`.
"""
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

from configs.run import (ALONE, UserError, ahead, bar, check_data_section, chunks, create_rows, digest, keep_sections,
                         locked, making, read_json, reading, require, seed_of, unknown, weights_hash, wide, write_json,
                         write_rows)

SPLITS = ("train", "test")
KINDS = {"images": np.uint8, "classes": np.int64, "boxes": np.float32, "masks": np.uint8}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")                   # whatever a file is called
MOST_CLASSES = 2 ** 20                                    # ids reach no further: arrays of this length are made
TRAIN_FOLDERS = ("train", "training")                     # in any case
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")                 # beside one of those


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each gives ({train, test: Part}, names of the classes); without a test part a share of train is held out

@dataclass
class Part:
    """Images of a source. read(rows) returns {kind: array [b, ...]}, kinds as in KINDS; `skipped`: complaints."""
    classes: np.ndarray                                   # int64 [N], -1 = not known before images are read
    read: Callable


def open_source(data):
    """The parts and class names of the source that section `data` names, with the classes that it wants."""
    check_settings(data)
    parts, names = SOURCES.get(data.source, open_torchvision)(data)
    if not data.classes:
        return parts, names
    require(names, data, "classes source", "this source has no names of classes to choose from")
    require(len(set(data.classes)) == len(data.classes), data, "classes", "name each once")
    for name in data.classes:
        require(name in names, data, "classes", f"{name} is {unknown(name, names)}")
    require((parts["train"].classes >= 0).any(), data, "source classes",
            "this set tells classes only while its images are read: it can only be used whole, with no classes named")
    place = [data.classes.index(name) if name in data.classes else -1 for name in names]
    place = np.array([*place, -1])                        # the last one is that of -1
    return {split: renumbered(part, place) for split, part in parts.items()}, data.classes


def check_settings(data):
    """A UserError for a source that does not exist, or does not say where its images are."""
    known = [*SOURCES, *TORCHVISION]
    require(data.source in known, data, "source", unknown(data.source, known))
    require(data.root or data.source not in ("folder", "arrays"), data, "root", "name the images, data.root=PATH")


def renumbered(part, place):
    """A part whose class k is called place[k]; -1 = not wanted."""
    def read(rows):
        batch = part.read(rows)
        return batch | dict(classes=place[batch["classes"]])
    return Part(place[part.classes], read)


def open_shapes(data):
    """The embedded set: as many images as are asked for."""
    from configs.shapes import SHAPES_CLASSES, draw_shapes                       # a fork without it needs no shapes.py

    def read(seed, rows):
        return dict(zip(KINDS, draw_shapes(seed, rows, data.size, data.two_objects)))

    parts = {}
    for split, asked, every in (("train", data.train, 20_000), ("test", data.test, 5_000)):
        seed, count = seed_of(data.seed, split), asked or every
        if asked and data.classes:                        # enough of each of the ten; the first ones are kept
            count = 12 * asked + 200
        classes = draw_shapes(seed, np.arange(count), size=1)[1]                 # they do not depend on the size
        parts[split] = Part(classes, partial(read, seed))
    return parts, SHAPES_CLASSES


def find_images(folder, below=""):
    """Yield (path below `folder`, bytes) of its image files, sorted; links are followed, hidden names left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            yield from find_images(entry.path, f"{below}{entry.name}/")
        elif entry.name.lower().endswith(ENDINGS) and entry.is_file():
            yield below + entry.name, entry.stat().st_size


def open_folder(data):
    """Image files below data.root: flat, or one subfolder per class, or train/ and test/ folders of either. Of several
    test folders the first one counts that has classes."""
    root = Path(data.root).expanduser()
    require(root.is_dir(), data, "root", "no such folder of images")
    paths = [path for path, _ in find_images(root)]
    top = lambda path: path.split("/")[0] if "/" in path else None
    folders = {top(path) for path in paths} - {None}
    with_classes = {top(path) for path in paths if path.count("/") > 1}
    of = lambda known: [name for lower in known for name in folders if name.lower() == lower]
    train, test = of(TRAIN_FOLDERS), sorted(of(TEST_FOLDERS), key=lambda name: name not in with_classes)[:1]
    inside = {"train": ""}
    if len(train) == 1 and (test or len(folders) == 1):
        inside = {split: f"{name}/" for split, names in dict(train=train, test=test).items() for name in names}
        left_out = sum(not path.startswith(tuple(inside.values())) for path in paths)
        if left_out:
            print(f"note: {left_out:,} images outside {' and '.join(inside.values())} are left out", flush=True)

    files = {split: [path.removeprefix(folder) for path in paths if path.startswith(folder)]
             for split, folder in inside.items()}
    names = sorted({top(path) for split in files for path in files[split]} - {None})
    ids = {None: -1} | {name: i for i, name in enumerate(names)}
    parts = {}
    for split, folder in inside.items():
        classes = [ids[top(path)] for path in files[split]]
        items = [(f"{root}/{folder}{path}", k) for path, k in zip(files[split], classes)]
        parts[split] = Part(np.array(classes, np.int64), partial(read_images, data, items))
    return parts, names


TORCHVISION = {                                           # set: keyword, its values for the train and the test part
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST"), ("train", True, False)),
    **dict.fromkeys(("SVHN", "Food101", "GTSRB", "StanfordCars", "Flowers102", "DTD"), ("split", "train", "test")),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ("split", "trainval", "test")),
    "STL10": ("split", "train+unlabeled", "test"),        # class -1: not known
    "ImageNet": ("split", "train", "val"),
    "LSUN": ("classes", ["church_outdoor_train"], ["church_outdoor_val"]),
}


def torchvision_datasets():
    """torchvision.datasets, also beside a CPU-only torch, with which its compiled detection operators cannot load."""
    try:
        from torchvision import datasets
    except RuntimeError:                                  # declare them; nothing here calls them
        for op in ("nms", "qnms"):
            with suppress(RuntimeError):                  # declared already
                torch.library.define(f"torchvision::{op}",
                                     "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import datasets
    return datasets


def open_torchvision(data):
    """The torchvision set named data.source."""
    root, kind = Path(data.root or "data").expanduser(), getattr(torchvision_datasets(), data.source)
    keyword, *values = TORCHVISION[data.source]
    more = {} if data.source in ("ImageNet", "LSUN") else dict(download=data.download)       # those have no download
    parts, names = {}, []
    for split, value in zip(SPLITS, values):
        with reading(root, "set data.root to where the files are, or data.download=true"):
            items = kind(str(root), **{keyword: value}, **more)
        labels = getattr(items, "targets", getattr(items, "labels", [-1] * len(items)))
        parts[split] = Part(np.asarray(labels, np.int64), partial(read_images, data, items))
        names = names or list(map(str, getattr(items, "wnids", getattr(items, "classes", []))))
    return parts, names


def read_images(data, items, rows):
    """`Part.read` of items (path or PIL image, class)."""
    images, classes, skipped = [], [], []
    for i in rows:
        name = f"image {i}"
        try:
            image, label = items[i]
            if isinstance(image, str):
                name = image
                image = Image.open(name, formats=FORMATS)
            images.append(square(image, data.size))
            classes.append(label)
        except Exception as e:                            # decoders of damaged files raise nearly everything
            skipped.append(f"{name}: {' '.join(str(e).split())[:200] or type(e).__name__}")
        if skipped and not data.skip_bad:
            raise UserError(f"unreadable image {skipped[0]} (skip such files with data.skip_bad=true)")
    images = np.array(images, np.uint8).reshape(-1, 3, data.size, data.size)
    return dict(images=images, classes=np.array(classes, np.int64), skipped=skipped)


def square(image, size):
    """The middle of a PIL image, upright and on white: uint8 [3, size, size]."""
    image = ImageOps.exif_transpose(image)                # photographs say how they were held
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode} have no known range; store 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    w, h = image.size
    s = min(w, h)
    image = image.convert("RGB").crop(((w - s) // 2, (h - s) // 2, (w + s) // 2, (h + s) // 2))
    return np.asarray(image.resize((size, size), Image.BICUBIC)).transpose(2, 0, 1)


def shapes_of(n, size):
    """Shapes of the arrays of n images."""
    return dict(images=(n, 3, size, size), classes=(n,), boxes=(n, 4), masks=(n, size, size))


def open_arrays(data):
    """A .npy file of images, or an .npz with images [, classes, boxes, masks] [, test_images, test_classes, ...].

    classes: from 0, -1 = not known; boxes: x0 y0 x1 y1 in pixels, the right and lower edge not included; masks: 0 =
    none, 255 = void, classes between."""
    path, parts = Path(data.root).expanduser(), {}
    with reading(path, "expected .npz or .npy arrays, with one row for each image"):
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(images=arrays) if isinstance(arrays, np.ndarray) else dict(arrays)
        for split, prefix in zip(SPLITS, ("", "test_")):
            part = {kind: arrays[prefix + kind] for kind in KINDS if prefix + kind in arrays}
            if part or split == "train":
                parts[split] = array_part(part, data.size)
    return parts, []


def array_part(arrays, size):
    """The Part of {kind: array}; images are [N, H, W], [N, H, W, C] or [N, C, H, W]."""
    images = arrays["images"]
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1:3] == (size, size):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] == 1:                              # grey
        images = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
    known = dict(classes=np.full(len(images), -1)) | arrays | dict(images=images)
    for kind, values in known.items():
        shape, dtype = shapes_of(len(images), size)[kind], np.dtype(KINDS[kind])
        fits = np.can_cast(values.dtype, dtype, "same_kind" if kind == "boxes" else "safe")
        dark = kind == "images" and values.dtype == bool  # 0 and 1 of 255
        if values.shape != shape or dark or not fits:
            raise ValueError(f"{kind}: {values.dtype} of shape {values.shape}, expected {dtype} of shape {shape}")
        known[kind] = values.astype(dtype, copy=False)
    if known["classes"].max(initial=0) >= MOST_CLASSES:
        raise ValueError(f"classes reach {known['classes'].max()}: number them from 0; -1 = not known")
    if "masks" in known and set(np.unique(known["masks"]).tolist()) == {0, 255}:
        raise ValueError("masks: nothing but 0 and 255, which means void; write objects as 1")
    return Part(known["classes"], lambda rows: {kind: values[rows] for kind, values in known.items()})


SOURCES = {"shapes": open_shapes, "folder": open_folder, "arrays": open_arrays}            # besides TORCHVISION


# ---------------------------------------------------------------------------------------------------------------------
# From the source to the run folder

def long_tail(classes, ratio, seed):
    """Rows (sorted) of a long-tailed subset (arXiv 1901.05555): of C classes, class k keeps n_max ratio^(-k / (C - 1))
    images at random, or all; n_max = those of the largest class. classes: int64 [N], none unknown."""
    counts, rng = np.bincount(classes), np.random.default_rng(seed_of(seed, "long tail"))
    wanted = counts.max() * float(ratio) ** (-np.arange(len(counts)) / max(len(counts) - 1, 1))
    wanted = np.maximum(1, np.floor(wanted)).astype(int)
    kept = [rng.permutation(np.flatnonzero(classes == k))[:n] for k, n in enumerate(wanted)]
    return np.sort(np.concatenate(kept))


def choose_rows(data, parts, split):
    """(Part, its rows, sorted): the images of one split."""
    part = parts.get(split, parts["train"])
    rows = np.arange(len(part.classes))
    if "test" not in parts:
        held_out = np.random.default_rng(seed_of(data.seed, "held out")).random(len(rows)) < data.test_fraction
        rows = rows[held_out == (split == "test")]
    if data.classes:
        rows = rows[part.classes[rows] >= 0]
    rows = rows[:getattr(data, split) or None]
    require(len(rows), data, "source classes test_fraction", f"of {len(part.classes)} images none is a {split} image")
    if split == "train" and data.imbalance > 1:
        require(part.classes[rows].min() >= 0, data, "imbalance source", "needs the class of every training image")
        rows = rows[long_tail(part.classes[rows], data.imbalance, data.seed)]
    return part, rows


def write_data(run, folder):
    """Write both parts of the source as arrays and info.json in `folder`."""
    data = run.data
    parts, names = open_source(data)
    chosen = [choose_rows(data, parts, split) for split in SPLITS]               # complaints come first
    origin = origin_of(data)
    for split, (part, rows) in zip(SPLITS, chosen):
        info = write_part(run, folder / split, part, rows)
        classes = np.load(folder / split / "classes.npy")
        per_class = np.bincount(classes[classes >= 0], minlength=len(names)).tolist()
        about = dict(source=data.source, split=split, count=len(classes), size=data.size, class_names=names,
                     class_counts=per_class)
        write_json(folder / split / "info.json", about | info | dict(origin=origin))
        named = ", ".join(f"{name}: {n:,}" for name, n in zip(names, per_class)) if len(names) <= 10 else ""
        of_none = (classes < 0).sum() if per_class else 0
        run.say(f"prepared {len(classes):,} {split} images of {len(per_class) or 'no'} classes"
                + f" ({named})" * bool(named) + f", {of_none:,} of no class" * bool(of_none)
                + f", {len(info['skipped'])} unreadable ones left out")
        if np.count_nonzero(per_class) == 1:
            run.say("note: all are of one class, which tells nothing: it counts as not known")
        if 0 in per_class:
            why = f" (data.{split}= keeps the first images)" * bool(getattr(data, split))
            run.say(f"note: {per_class.count(0)} classes have no {split} image{why}")


def write_part(run, folder, part, rows):
    """Write these rows of a part of the source as arrays in `folder`. Returns what info.json is to say of them: arrays,
    fingerprint, skipped."""
    count, skipped, hashed, threads = 0, [], hashlib.sha256(), min(16, os.cpu_count() or 1)
    blocks = chunks(rows, 128)
    folder.mkdir()
    with bar(run, len(rows), f"preparing {folder.name} images") as progress:
        for batch in ahead(part.read, blocks, depth=threads, threads=threads):
            skipped += batch.pop("skipped", [])
            for kind, values in batch.items():
                if values.dtype != KINDS[kind] or values.shape[1:] != shapes_of(0, run.data.size)[kind][1:]:
                    raise ValueError(f"data.source={run.data.source} read {kind} {values.dtype} {values.shape}")
                if not count:
                    create_rows(ALONE, folder / f"{kind}.npy", KINDS[kind], (len(rows), *values.shape[1:]))
                write_rows(folder / f"{kind}.npy", count, values)
            hashed.update(np.ascontiguousarray(batch["images"]))
            count += len(batch["images"])
            progress.update(len(batch["images"]))
    require(count, run.data, "source root", f"none of the {folder.name} images can be read")
    if skipped:                                           # fewer rows than announced
        for kind in batch:
            np.save(folder / "cut.npy", np.load(folder / f"{kind}.npy", mmap_mode="r")[:count])
            os.replace(folder / "cut.npy", folder / f"{kind}.npy")
    return dict(arrays=sorted(batch), fingerprint=hashed.hexdigest()[:16], skipped=skipped)


def origin_of(data):
    """What data.root of a folder or an array file holds, with a digest of names and sizes, or of the file's size and
    both ends: other pixels of the same size go unnoticed. {} of other sources."""
    root = Path(data.root).expanduser()
    if data.source == "folder":                           # a listing of names and sizes
        listing = list(find_images(root))
        return dict(root=str(root.absolute()), files=len(listing), digest=digest(listing))
    if data.source == "arrays":                           # the size, the first and the last megabyte
        size, part = root.stat().st_size, 2 ** 20
        ends = [np.fromfile(root, np.uint8, part, offset=offset) for offset in (0, max(0, size - part))]
        return dict(root=str(root.absolute()), bytes=size, digest=digest(size, *ends))
    return {}


def check_origin(run):
    """A UserError where the settings or data.root mean other images than those that were prepared. A root that is gone
    is fine."""
    check_data_section(run)
    path = run.dir / "data" / "train" / "info.json"
    before = read_json(path, "delete data/").get("origin")
    if before and run.data.root and Path(run.data.root).expanduser().exists():
        now = origin_of(run.data)
        with reading(path, "delete data/"):
            require(now["digest"] == before["digest"], run.data, "root",
                    f"holds other images than {run.dir / 'data'}, made from {before['root']}; use another run=DIR")


def check_source(run):
    """A UserError where data/ has still to be made from a folder or a file that is not there, for --dry-run."""
    check_settings(run.data)
    made = (run.dir / "data" / "test" / "info.json").exists()
    if not made and run.data.source in ("folder", "arrays"):
        require(run.data.root and Path(run.data.root).expanduser().exists(), run.data, "root", "no images there")


def prepare_data(run):
    """Turn `data.source` into data/ in the run folder, both parts at once; where that is done, check the source."""
    folder = run.dir / "data"
    done = folder / "test" / "info.json"
    there = run.agreed(done.exists)
    if there:
        run.agreed(lambda: check_origin(run))
    with locked(run, "data"):
        if not run.agreed(done.exists):
            keep_sections(run)
            with making(run, ".", "data", "test/info.json") as aside:
                run.agreed(lambda: write_data(run, aside))
        elif not there:                                   # another command has just made it, perhaps of other images
            run.agreed(lambda: check_origin(run))
        for split in SPLITS:
            if run.data.latents and not run.agreed((folder / split / "latents.json").exists):
                encode_split(run, split)


# ---------------------------------------------------------------------------------------------------------------------
# Latents

def open_autoencoder(run):
    """The frozen float32 autoencoder, kept in `run.vae`; None without data.latents. To be called by all processes."""
    if not run.data.latents or run.vae is not None:
        return run.vae
    torchvision_datasets()                                # diffusers imports torchvision, see there
    for mine in run.turns():
        if mine:
            with reading(run.data.latents, "expected an AutoencoderKL of safetensors, and pip install diffusers"):
                from diffusers import AutoencoderKL       # nothing else here needs it
                vae = AutoencoderKL.from_pretrained(run.data.latents, use_safetensors=True)
            run.vae = vae.eval().requires_grad_(False).to(run.device)
    about = about_autoencoder(vae)
    for path in (run.dir / "data" / split / "latents.json" for split in SPLITS):
        if path.exists():
            require(about.items() <= read_json(path, "delete it").items(), run.data, "latents",
                    f"is no longer the autoencoder that encoded {path.parent}; use another run=DIR")
    return run.vae


def about_autoencoder(vae):
    """What tells an autoencoder from others of its name."""
    return dict(weights=weights_hash(vae.state_dict()), scaling_factor=vae.config.scaling_factor)


def scale_and_shift(vae):
    """What makes latents those that the network sees: (latent - shift) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


@torch.no_grad()
def to_latents(vae, x):
    """Images [B, 3, H, W] in [-1, 1] -> mean and deviation of latents as the network sees them, [B, 2C, h, w]."""
    scale, shift = scale_and_shift(vae)
    latents = vae.encode(x).latent_dist
    return torch.cat([(latents.mean - shift) * scale, latents.std * scale], 1)


@torch.no_grad()
def decode(vae, x, batch=16):
    """What the network sees, [B, C, h, w], as images [B, 3, H, W]; x itself where there is no autoencoder."""
    if vae is None:
        return x
    scale, shift = scale_and_shift(vae)
    # TF32 rounds by less than a grey level, and full float32 is slow
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        return torch.cat([vae.decode(part.float() / scale + shift).sample for part in x.split(batch)])


def encode_split(run, split, batch=16):
    """data/<split>/latents.npy, float16 [N, 2, 2C, h, w]: mean and deviation for all images and their mirror images."""
    folder, vae, (channels, side) = run.dir / "data" / split, open_autoencoder(run), input_shape(run)
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    aside, shape = folder / ".latents.npy", [2, 2 * channels, side, side]
    create_rows(run, aside, np.float16, [len(images), *shape])
    with bar(run, len(images), f"encoding {split} images") as progress:
        for i in range(run.rank * batch, len(images), run.world * batch):
            x = as_input(torch.from_numpy(images[i:i + batch].copy()).to(run.device))
            latents = torch.stack([to_latents(vae, x), to_latents(vae, x.flip(-1))], 1)
            write_rows(aside, i, latents.cpu().numpy())
            progress.update(len(x) * run.world)
    run.wait()
    if run.rank == 0:
        about = dict(autoencoder=run.data.latents, shape=shape, count=len(images)) | about_autoencoder(vae)
        os.replace(aside, folder / "latents.npy")
        write_json(folder / "latents.json", about)
    run.wait()


# ---------------------------------------------------------------------------------------------------------------------
# What the stages read

def as_input(stored, flip=None, z=None):
    """What is stored, as the network sees it: images uint8 [B, C, H, W] in [-1, 1]; latents [B, 2, 2C, h, w] (plain,
    mirrored; C means, C deviations) as the mean, or with noise z [B, C, h, w] a draw. flip: bool [B], what to mirror"""
    if stored.dtype == torch.uint8:
        x = stored.float() / 127.5 - 1
        return x if flip is None else torch.where(wide(flip), x.flip(-1), x)
    chosen = stored[:, 0] if flip is None else torch.where(wide(flip), stored[:, 1], stored[:, 0])
    mean, std = chosen.float().chunk(2, 1)
    return mean if z is None else mean + std * z


def row_shape(stored):
    """(C, H, W) of what the network sees of stored images or latents."""
    return tuple(stored.shape[1:]) if stored.ndim == 4 else (stored.shape[2] // 2, *stored.shape[3:])


@dataclass
class Split:
    """One part of the data: arrays opened read-only, row i is image i."""
    images: np.ndarray                                    # uint8 [N, 3, H, W]
    classes: np.ndarray                                   # int64 [N]; -1 = not known. For evaluation and controls only
    boxes: np.ndarray | None                              # float32 [N, 4]
    masks: np.ndarray | None                              # uint8 [N, H, W]
    info: dict
    latents: np.ndarray | None = None                     # float16 [N, 2, 2C, h, w], with data.latents

    def __len__(self):
        return len(self.images)

    @property
    def inputs(self):
        """What the network is shown, for `as_input`: the latents, or the images."""
        return self.images if self.latents is None else self.latents


def load_data(run, split):
    """Open data/<split> of the run and check that its files fit each other."""
    folder, arrays = run.dir / "data" / split, dict(boxes=None, masks=None)
    hint = f"run train_diffusion.py first; if it is damaged, delete {run.dir / 'data'} before"
    info = read_json(folder / "info.json", hint)
    with reading(folder, hint):
        n, size, kinds, _ = (info[name] for name in ("count", "size", "arrays", "fingerprint"))  # KeyError if one lacks
        for kind in [*kinds, "latents"] if run.data.latents else kinds:
            array = arrays[kind] = np.load(folder / f"{kind}.npy", mmap_mode="r", allow_pickle=False)
            shape = shapes_of(n, size).get(kind, (n, *array.shape[1:]))
            if array.shape != shape or array.dtype != KINDS.get(kind, np.float16):
                raise ValueError(f"{kind}: {array.dtype} of shape {array.shape} for {n} images")
        counts = read_json(run.dir / "data" / "train" / "info.json", hint).get("class_counts", [])
        if np.count_nonzero(counts) == 1:                 # tells nothing, and every score of it would be perfect
            arrays["classes"] = np.full(n, -1)
        return Split(info=info, **arrays)


def require_shape(run, state):
    """A UserError where a model (its checkpoint) is made for other inputs than this run has."""
    own, here = (state["channels"], state["size"]), input_shape(run)
    if own != here:
        raise UserError(f"{state['file']}: made for inputs of {own[0]} x {own[1]} x {own[1]}, this run's are {here[0]} "
                        f"x {here[1]} x {here[1]}; set data.size or data.latents in another run=")


def input_shape(run):
    """(channels, side) of what the network of this run sees."""
    size, path = run.data.size, run.dir / "data" / "train" / "latents.json"
    if not run.data.latents:
        return 3, size
    if path.exists():
        with reading(path, "delete it"):
            _, channels, side, _ = read_json(path, "delete it")["shape"]
            return channels // 2, side
    config = open_autoencoder(run).config
    factor = 2 ** (len(config.block_out_channels) - 1)
    require(size % factor == 0, run.data, "size latents",
            f"size must be a multiple of {factor}, by which this autoencoder shrinks images")
    return config.latent_channels, size // factor


def file_of(split, name, t):
    """File name of one feature array."""
    return f"{split}-{name}-t{t:g}.npy"


def load_features(run, name, split):
    """(list of float arrays [N, ...] as memory maps, info) of features/<name>, checked against the run's data."""
    folder, data = run.dir / "features" / name, load_data(run, split)
    hint = "run extract_features.py first; if it is damaged, delete the folder before"
    info = read_json(folder / "info.json", hint)
    with reading(folder, hint):
        if info["data"][split] != data.info["fingerprint"] or "pool" not in info:
            raise ValueError(f"extracted from other {split} images")
        files = [folder / file_of(split, entry["activation"], entry["t"]) for entry in info["arrays"]]
        arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        shapes = info.get("shapes") or [array.shape[1:] for array in arrays]     # others' features may not say
        for file, array, shape in zip(files, arrays, shapes):
            if array.shape != (len(data), *shape):
                raise ValueError(f"{file.name}: shape {array.shape} for {len(data)} images and rows of shape {shape}")
    return arrays, info


def arrays_hash(arrays):
    """Hash of a label file's arrays {name: array}; its description holds it, so that the two are known to fit."""
    return digest(*(arrays[k] for k in sorted(arrays)))


def load_labels(run, name):
    """(dict(train int64 [N], test int64 [N'], ...), info) of labels/<name>.npz, checked against the run's data."""
    path, hint = run.dir / "labels" / f"{name}.npz", "make the labels again"
    info = read_json(path.with_suffix(".json"), "make it with self_label.py (method=..., name=...)")
    with reading(path, hint), np.load(path, allow_pickle=False) as f:
        labels = dict(f)
        if info.get("hash") not in (None, arrays_hash(labels)):
            raise ValueError("not the arrays that its .json describes")
        if not all(isinstance(info.get(k, {}), dict) for k in ("recipe", "scores")):
            raise ValueError("its .json has no recipe or scores")
        K = int(labels["num_labels"])
        for split, lowest in (("train", 0), ("test", -1)):                       # a test image may be of unknown class
            ids, data, made_of = labels[split], load_data(run, split), info["data"][split]
            if made_of != data.info["fingerprint"]:
                raise ValueError(f"belongs to {split} images {made_of}, the run's are {data.info['fingerprint']}")
            for kind in [k for k in labels if k.endswith(f"_{split}")]:          # boxes, masks, ids of objects
                if len(labels[kind]) != len(data):
                    raise ValueError(f"{kind} must have {len(data)} rows")
            if ids.shape != (len(data),) or not lowest <= ids.min() <= ids.max() < K or ids.dtype.kind not in "iu":
                raise ValueError(f"{split} must be {len(data)} whole numbers in {lowest} ... {K - 1}")
            labels[split] = ids.astype(np.int64)
    return labels, info | {"num_labels": K}

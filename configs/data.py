"""Images: any source becomes arrays in the run folder, once; row i is image i in every file of a run.

Reads   data.source: the embedded shapes, a folder of images, .npy and .npz arrays, or a torchvision set
Writes  data/{train,test}/: images.npy, classes.npy, boxes.npy, masks.npy, latents.npy (those that there are), info.json

`prepare_data` writes a run's data, `load_data` opens one part of it as a `Split`, `as_input` turns its rows into what
the network sees. To learn the method, skip this file. To add a source, read `Source` and `open_shapes`.
"""
import functools
import hashlib
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.utils.data
from PIL import Image, ImageOps

from configs.run import (UserError, ahead, bar, create_rows, digest, locked, making, read_json, reading, require,
                         seed_of, unknown, weights_hash, wide, write_json, write_rows)
from configs.shapes import SHAPES_CLASSES, draw_shapes

SPLITS = ("train", "test")
KINDS = {"images": np.uint8, "classes": np.int64, "boxes": np.float32, "masks": np.uint8}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("test", "val", "valid", "validation")     # beside a folder `train`; the first one that is there counts


# ---------------------------------------------------------------------------------------------------------------------
# Sources

@dataclass
class Part:
    """Images of a source that are read in one go. read(rows, classes, found) yields some of them, in order, as dicts
    {kind: array [b, ...]} with kinds as in KINDS, and adds what it notices to `found`."""
    count: int
    classes: np.ndarray | None                            # int64 [count], -1 = not known; None: only by reading images
    read: Callable


@dataclass
class Source:
    """Where images come from, before any is read."""
    parts: dict                                           # train, test: Part; without test a share of train is held out
    names: list                                           # of the classes
    note: str = ""                                        # what the user should know


def open_source(data):
    """The Source that section `data` names, with the classes that it wants."""
    openers = {"shapes": open_shapes, "folder": open_folder, "arrays": open_arrays}
    if data.source not in SOURCES:
        raise UserError(f"data.source={data.source}: {unknown(data.source, SOURCES)}")
    source = openers.get(data.source, open_torchvision)(data)
    if not data.classes:
        return source
    for name in data.classes:
        if name not in source.names:
            raise UserError(f"data.classes={name}: {unknown(name, source.names)}")
    place = np.full(len(source.names) + 1, -1)            # the last row is that of -1, not known
    place[[source.names.index(name) for name in data.classes]] = np.arange(len(data.classes))
    for part in source.parts.values():
        if part.classes is None:
            raise UserError("data.classes: this source does not tell the classes of its images beforehand")
        part.classes = place[part.classes]
    source.names = data.classes
    return source


def open_shapes(data):
    """The embedded set: as many images as are asked for."""
    def read(split, rows, classes, found, size=data.size):
        for i in range(0, len(rows), 1000):
            drawn = draw_shapes(seed_of(data.seed, split), rows[i:i + 1000], size, data.two_objects)
            yield dict(zip(KINDS, drawn))

    parts = {}
    for split, count in (("train", data.train or 20_000), ("test", data.test or 5_000)):
        parts[split] = Part(count, None, functools.partial(read, split))
        if data.imbalance > 1:                            # classes do not depend on the size
            small = read(split, np.arange(count), None, {}, size=8)
            parts[split].classes = np.concatenate([batch["classes"] for batch in small])
    return Source(parts, SHAPES_CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# Image files: folders and torchvision sets

def find_images(folder, below="", above=()):
    """Yield (path below `folder`, bytes) of its image files, sorted; links are followed, hidden names left out."""
    real = os.path.realpath(folder)
    if real in above:                                     # a link to a folder that holds it
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            yield from find_images(entry.path, f"{below}{entry.name}/", (*above, real))
        elif entry.name.lower().endswith(ENDINGS) and entry.is_file():
            yield below + entry.name, entry.stat().st_size


def folder_parts(listing):
    """{part: prefix of its paths}: folders train and test (or val, ...) where they are, else everything is train."""
    folders = {path.split("/")[0] for path, _ in listing if "/" in path}
    test = [name for name in TEST_FOLDERS if name in folders][:1]
    if "train" in folders and (test or folders == {"train"}):
        return {"train": "train/"} | {"test": f"{name}/" for name in test}
    return {"train": ""}


def open_folder(data):
    """Image files below data.root: flat, or one subfolder per class, or train/ and test/ folders of either."""
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={data.root}: no such folder of images")
    listing = list(find_images(root))
    if not listing:
        raise UserError(f"{root}: no image files found ({', '.join(ENDINGS)})")
    prefixes = folder_parts(listing)
    names, paths = set(), {}
    for part, prefix in prefixes.items():
        paths[part] = [path.removeprefix(prefix) for path, _ in listing if path.startswith(prefix)]
        stray = [path for path in paths[part] if "/" not in path]
        if 0 < len(stray) < len(paths[part]):
            raise UserError(f"{root / prefix / stray[0]}: an image beside folders of classes; move it into one of them")
        names |= {path.split("/")[0] for path in paths[part] if "/" in path}
    names = sorted(names)                                 # of all parts, so that ids agree

    source = Source({}, names)
    ids = {name: i for i, name in enumerate(names)}
    for part, prefix in prefixes.items():
        classes = [ids[path.split("/")[0]] if "/" in path else -1 for path in paths[part]]
        files = [str(root / prefix / path) for path in paths[part]]
        source.parts[part] = Part(len(files), np.array(classes), functools.partial(read_images, data, files))
    left = len(listing) - sum(map(len, paths.values()))
    if left:
        source.note = f"; {left} images outside {' and '.join(prefixes.values())} left out"
    return source


TORCHVISION = {                                           # set: keyword, its values for the train and the test part
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST"), ("train", [True], [False])),
    **dict.fromkeys(("SVHN", "Food101", "GTSRB", "StanfordCars"), ("split", ["train"], ["test"])),
    **dict.fromkeys(("Flowers102", "DTD"), ("split", ["train", "val"], ["test"])),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ("split", ["trainval"], ["test"])),
    "STL10": ("split", ["train+unlabeled"], ["test"]),    # class -1: not known
    "ImageNet": ("split", ["train"], ["val"]),
    "LSUN": ("classes", [["church_outdoor_train"]], [["church_outdoor_val"]]),
}
SOURCES = ["shapes", "folder", "arrays", *TORCHVISION]


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
    source = Source({}, [])
    for split, chosen in zip(SPLITS, values):
        try:
            sets = [kind(str(root), **{keyword: value}, **more) for value in chosen]
        except (RuntimeError, OSError, ModuleNotFoundError, ValueError) as e:
            raise UserError(f"data.source={data.source}: {str(e).splitlines()[0]} (looked in {root}; "
                            "set data.root to where the files are, or data.download=true)") from None
        items = torch.utils.data.ConcatDataset(sets)
        classes = [getattr(s, "targets", getattr(s, "labels", None)) for s in sets]
        known = all(c is not None for c in classes)
        classes = np.concatenate([np.asarray(c) for c in classes]).astype(np.int64) if known else None
        source.parts[split] = Part(len(items), classes, functools.partial(read_images, data, items))
        names = getattr(sets[0], "wnids", getattr(sets[0], "classes", []))
        source.names = source.names or list(map(str, names))
    return source


def square(image, size):
    """(uint8 [3, size, size], whether parts of it were transparent) of a PIL image: upright, on white, its middle."""
    image = ImageOps.exif_transpose(image)                # photographs say how they were held
    if image.mode.startswith("I;16"):                     # 16 bits of grey; convert() would clip them to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; store 8 or 16 bits")
    transparent = False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = image.getextrema()[3][0] < 255
        if transparent:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    w, h = image.size
    s = min(w, h)
    if w != h:
        image = image.crop(((w - s) // 2, (h - s) // 2, (w + s) // 2, (h + s) // 2))
    if s != size:
        image = image.resize((size, size), Image.BICUBIC)
    return np.asarray(image, np.uint8).transpose(2, 0, 1), transparent


class Squared(torch.utils.data.Dataset):
    """Items (paths, or a data set of (PIL image, class)) as (image, was it transparent, class, what is wrong): see
    `square`. classes: of all items, or None where these tell theirs."""

    def __init__(self, items, classes, size):
        self.items, self.classes, self.size = items, classes, size

    def __getitem__(self, i):
        name = self.items[i] if isinstance(self.items, list) else f"image {i}"
        try:
            image, label = (Image.open(name), -1) if isinstance(self.items, list) else self.items[i]
            return *square(image, self.size), int(label if self.classes is None else self.classes[i]), ""
        except Exception as e:                            # decoders of damaged files raise nearly everything
            return None, False, -1, f"{name}: {' '.join(str(e).split())[:200] or type(e).__name__}"


def read_images(data, items, rows, classes, found):
    """`Part.read` of items as in `Squared`."""
    workers = min(16, os.cpu_count() or 1) if len(rows) >= 2000 else 0
    loader = torch.utils.data.DataLoader(Squared(items, classes, data.size), batch_size=256, sampler=rows.tolist(),
                                         num_workers=workers, collate_fn=list)
    for batch in loader:
        good = [(image, label) for image, _, label, wrong in batch if not wrong]
        found["unreadable"] += [wrong for *_, wrong in batch if wrong]
        found["transparent"] += sum(transparent for _, transparent, *_ in batch)
        if found["unreadable"] and not data.skip_bad:
            raise UserError(f"unreadable image {found['unreadable'][0]} (skip such files with data.skip_bad=true)")
        if good:
            images, labels = zip(*good)
            yield dict(images=np.stack(images), classes=np.array(labels))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays

def open_array(path, name):
    """(file, shape, dtype) of one array: of the member `name` of an .npz, or of a .npy file. The file stands behind the
    header, so that rows can be streamed."""
    file = zipfile.ZipFile(path).open(f"{name}.npy") if path.suffix == ".npz" else open(path, "rb")
    old = np.lib.format.read_magic(file) == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if fortran or dtype.hasobject or not shape:
        raise UserError(f"{path}: {name} must be a C-ordered array of plain numbers with one row per image")
    return file, shape, dtype


def stream_array(path, name, chunk=256):
    """Yield the rows of an array, `chunk` at a time."""
    file, shape, dtype = open_array(path, name)
    size = dtype.itemsize * int(np.prod(shape[1:]))
    for i in range(0, shape[0], chunk):
        rows = min(chunk, shape[0] - i)
        blob = file.read(rows * size)
        if len(blob) != rows * size:
            raise UserError(f"{path}: {name} is cut short: of {shape[0]} rows it holds {i + len(blob) // size}")
        yield np.frombuffer(blob, dtype).reshape(rows, *shape[1:])


def check_arrays(path, arrays, size):
    """A UserError unless arrays {kind: (shape, dtype)}, one row for each image, are what can be used."""
    square = (size, size)
    rows = {"images": [square, (*square, 1), (*square, 3), (1, *square), (3, *square)],
            "classes": [()], "boxes": [(4,)], "masks": [square]}
    for kind, (shape, dtype) in arrays.items():
        casting = "same_kind" if kind == "boxes" else "safe"
        if shape[1:] not in rows[kind] or not np.can_cast(dtype, KINDS[kind], casting):
            raise UserError(f"{path}: {kind} are {dtype} of shape {shape}; expected {np.dtype(KINDS[kind])}, each of "
                            f"shape {' or '.join(map(str, rows[kind]))} (data.size={size})")
        if shape[0] != arrays["images"][0][0]:
            raise UserError(f"{path}: {shape[0]} rows of {kind}; expected one row for each image")


def open_arrays(data):
    """A .npy file of images, or an .npz with images [, classes, boxes, masks] [, test_images, test_classes, ...]."""
    path = Path(data.root).expanduser()
    if not path.is_file() or path.suffix not in (".npz", ".npy"):
        raise UserError(f"data.root={data.root}: no such .npz or .npy file")
    source = Source({}, [])
    with reading(path, "expected a whole .npz or .npy file"):
        names = zipfile.ZipFile(path).namelist() if path.suffix == ".npz" else ["images.npy"]
        if "images.npy" not in names:
            raise UserError(f"{path}: has no array 'images' (found: {', '.join(names)})")
        for split, prefix in (("train", ""), ("test", "test_")):
            kinds = [kind for kind in KINDS if f"{prefix}{kind}.npy" in names]
            if "images" in kinds:
                headers = {kind: open_array(path, prefix + kind)[1:] for kind in kinds}
                check_arrays(path, headers, data.size)
                classes = read_classes(path, prefix, kinds, count=headers["images"][0][0])
                read = functools.partial(read_arrays, path, prefix, kinds, data.size)
                source.parts[split] = Part(len(classes), classes, read)
    return source


def read_classes(path, prefix, kinds, count):
    """int64 [count], -1 where there are none."""
    if "classes" not in kinds or not count:
        return np.full(count, -1)
    classes = np.concatenate(list(stream_array(path, f"{prefix}classes")))
    if classes.min() < -1 or classes.max() >= 100_000:
        raise UserError(f"{path}: classes are {classes.min()} ... {classes.max()}; expected -1 (not known) ... 99999")
    return classes.astype(np.int64)


def read_arrays(path, prefix, kinds, size, rows, classes, found):
    """`Part.read` of arrays."""
    first, keep = 0, np.zeros(len(classes), bool)
    keep[rows] = True
    with reading(path, "expected a whole .npz or .npy file"):
        for values in zip(*(stream_array(path, prefix + kind) for kind in kinds)):
            here = keep[first:first + len(values[0])]
            batch = {kind: value[here] for kind, value in zip(kinds, values)}
            batch["classes"] = classes[first:first + len(here)][here]
            first += len(here)
            images = batch["images"]
            if images.ndim == 3:                          # [b, H, W]
                images = images[:, None]
            elif images.shape[1:3] == (size, size):       # [b, H, W, C]
                images = images.transpose(0, 3, 1, 2)
            batch["images"] = np.repeat(images, 3 // images.shape[1], 1)
            if here.any():
                yield batch


# ---------------------------------------------------------------------------------------------------------------------
# From the source to the run folder

def held_out(data, n):
    """Which of n images are for testing: bool [n], a function of the seed."""
    return np.random.default_rng(seed_of(data.seed, "held out")).random(n) < data.test_fraction


def long_tail(classes, ratio, seed):
    """Rows (sorted) of a long-tailed subset: of C classes, class k keeps n_max ratio^(-k / (C - 1)) images at random,
    n_max = those of the largest class.

    The exponential profile of Cui et al. 2019 (arXiv 1901.05555), there for CIFAR; a class with fewer images keeps all.
    classes: int64 [N], none unknown.
    """
    counts, g = np.bincount(classes), np.random.default_rng(seed_of(seed, "long tail"))
    k = np.arange(len(counts))
    wanted = np.floor(counts.max() * float(ratio) ** (-k / max(len(counts) - 1, 1)))
    wanted = np.maximum(1, wanted).astype(int)
    kept = [g.permutation(np.flatnonzero(classes == k))[:n] for k, n in enumerate(wanted)]
    return np.sort(np.concatenate(kept))


def choose_rows(data, source, split):
    """(Part, its rows, sorted): the images of one split."""
    part = source.parts.get(split, source.parts["train"])
    rows = np.arange(part.count)
    if "test" not in source.parts:
        rows = rows[held_out(data, part.count) == (split == "test")]
    if data.classes:
        rows = rows[part.classes[rows] >= 0]
    limit = data.train if split == "train" else data.test
    rows = rows[:limit or None]
    if not len(rows):
        hint = "set another data.test_fraction" if "test" not in source.parts else "look at its parts"
        raise UserError(f"data.source={data.source}: of {part.count} images none is a {split} image; {hint}")
    if split == "train" and data.imbalance > 1:
        if part.classes is None or part.classes[rows].min() < 0:
            raise UserError(f"data.imbalance={data.imbalance:g}: needs the class of every training image, "
                            f"and data.source={data.source} does not tell them all")
        rows = rows[long_tail(part.classes[rows], data.imbalance, data.seed)]
    return part, rows


def write_part(run, folder, split, source, part, rows):
    """Stream some rows of a part of the source into arrays in `folder`; returns what describes them."""
    count, classes, hashed = 0, [], hashlib.sha256()
    found = dict(unreadable=[], transparent=0)
    folder.mkdir()
    with bar(run, len(rows), f"preparing {split} images") as progress:
        for batch in part.read(rows, part.classes, found):
            for kind, values in batch.items():
                if not count:
                    create_rows(folder / f"{kind}.npy", KINDS[kind], (len(rows), *values.shape[1:]))
                write_rows(folder / f"{kind}.npy", count, values)
            hashed.update(np.ascontiguousarray(batch["images"]))
            classes.append(batch["classes"])
            count += len(batch["images"])
            progress.update(len(batch["images"]))
    if not count:
        raise UserError(f"data.source={run.data.source}: none of the {split} images can be read")
    for kind in batch:
        finish_rows(folder / f"{kind}.npy", count)
    classes = np.concatenate(classes)
    per_class = np.bincount(classes[classes >= 0], minlength=len(source.names)).tolist()
    return dict(source=run.data.source, split=split, count=count, size=run.data.size, class_names=source.names,
                class_counts=per_class, arrays=sorted(batch), fingerprint=hashed.hexdigest()[:16],
                skipped=found["unreadable"], transparent=found["transparent"])


def finish_rows(path, count):
    """Cut an array file to its first `count` rows, fewer than announced where images were unreadable, and sync it."""
    with open(path, "r+b") as f:
        np.lib.format.read_magic(f)
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        f.truncate(f.tell() + count * dtype.itemsize * int(np.prod(shape[1:])))
        f.seek(0)                                         # numpy leaves room in the header for the first axis to change
        header = dict(descr=dtype.str, fortran_order=False, shape=(count, *shape[1:]))
        np.lib.format.write_array_header_1_0(f, header)
        os.fsync(f.fileno())


def write_data(run, folder):
    """Write both parts of the source to `folder`, and say what they are."""
    source = open_source(run.data)
    chosen = {split: choose_rows(run.data, source, split) for split in SPLITS}   # complains before anything is written
    origin, infos = origin_of(run.data), []
    for split in SPLITS:
        infos.append(write_part(run, folder / split, split, source, *chosen[split]) | dict(origin=origin))
        write_json(folder / split / "info.json", infos[-1])
    train, test = infos
    said = f"{len(train['class_counts']) or 'no'} classes"
    if source.names:
        said += f" ({', '.join(source.names[:10])}{', ...' if len(source.names) > 10 else ''})"
    if skipped := len(train["skipped"] + test["skipped"]):
        said += f"; skipped {skipped} unreadable ones, listed in info.json"
    if transparent := train["transparent"] + test["transparent"]:
        said += f"; {transparent} with transparent parts laid on white"
    run.say(f"prepared {train['count']:,} train and {test['count']:,} test images in {run.dir / 'data'}: "
            f"{said}{source.note}")


def origin_of(data):
    """By its digest one can tell whether data.root still holds the same images; {} where that is no question."""
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
    """A UserError where data.root holds other images than those that were prepared. A root that is gone is fine."""
    folder, data = run.dir / "data", run.data
    before = read_json(folder / "train" / "info.json", f"delete {folder}").get("origin")
    if not before or not Path(data.root).expanduser().exists():
        return
    now = origin_of(data)
    if now["digest"] != before["digest"]:
        size = "files" if data.source == "folder" else "bytes"
        raise UserError(f"data.root={data.root} ({now[size]:,} {size}) is not what {folder} was made from "
                        f"({before['root']}, {before[size]:,} {size}): use another run=DIR, or delete {folder}")


def prepare_data(run):
    """Turn `data.source` into data/ in the run folder, both parts at once; where that is done, check the source."""
    def there(file):
        return run.agreed(lambda: all((run.dir / "data" / split / file).exists() for split in SPLITS))

    prepared = there("info.json")
    if prepared:
        run.agreed(lambda: check_origin(run))
    if prepared and (not run.data.latents or there("latents.json")):
        return
    with locked(run, "data"):
        if not there("info.json"):                        # another command may just have made it
            with making(run, ".", "data", "test/info.json") as folder:
                if run.rank == 0:
                    write_data(run, folder)
        if run.data.latents:
            encode_latents(run)


# ---------------------------------------------------------------------------------------------------------------------
# Latents

def autoencoder_kl():
    """The class of autoencoders that data.latents can name; nothing but latents needs its package."""
    torchvision_datasets()                                # diffusers imports torchvision, see there
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as e:
        raise UserError(f"data.latents needs the package diffusers (pip install diffusers): {str(e).splitlines()[0]}; "
                        "or leave data.latents empty to work on pixels") from None
    return AutoencoderKL


def open_autoencoder(run):
    """The frozen autoencoder of this run on its device, in float32, kept in `run.vae`; None without data.latents. To be
    called by all processes."""
    if not run.data.latents or run.vae is not None:
        return run.vae
    kind = autoencoder_kl()
    for mine in run.turns():
        if mine:
            try:
                vae = kind.from_pretrained(run.data.latents, use_safetensors=True)
            except Exception as e:                        # no such folder or id, no network, damaged or foreign files
                raise UserError(f"data.latents={run.data.latents}: not a readable AutoencoderKL of safetensors "
                                f"({type(e).__name__}: {' '.join(str(e).split())[:150]})") from None
            run.vae = vae.eval().requires_grad_(False).to(run.device)
    return run.vae


def scale_and_shift(vae):
    """What makes latents those that the network sees: (latent - shift) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


@torch.no_grad()
def to_latents(vae, x):
    """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents as the network sees them,
    [B, 2C, h, w]."""
    scale, shift = scale_and_shift(vae)
    d = vae.encode(x).latent_dist
    return torch.cat([(d.mean - shift) * scale, d.std * scale], 1)


@torch.no_grad()
def decode(vae, x, batch=16):
    """What the network sees, [B, C, h, w], as images [B, 3, H, W]; x itself where there is no autoencoder."""
    if vae is None:
        return x
    scale, shift = scale_and_shift(vae)
    # TF32 rounds by less than a grey level, and full float32 is slow
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        return torch.cat([vae.decode(part.float() / scale + shift).sample for part in x.split(batch)])


def encode_latents(run, block=256, batch=16):
    """data/<split>/latents.npy, float16 [N, 2, 2C, h, w]: mean and standard deviation of every image and of its mirror
    image. Finished when latents.json is there."""
    for split in SPLITS:
        if not run.agreed((run.dir / "data" / split / "latents.json").exists):
            encode_split(run, split, block, batch)


def encode_split(run, split, block, batch):
    """Each process takes every so manyth block of rows; a byte per block says what is there, so that the same command
    continues."""
    folder, vae = run.dir / "data" / split, open_autoencoder(run)
    info = read_json(folder / "info.json", "run train_diffusion.py first")
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)

    def encode(x):                                        # [B, 3, H, W] -> [B, 2, 2C, h, w]
        both = [torch.cat([to_latents(vae, part) for part in v.split(batch)]) for v in (x, x.flip(-1))]
        return torch.stack(both, 1)

    shape = list(encode(torch.zeros(1, *images.shape[1:], device=run.device)).shape[1:])
    recipe = dict(autoencoder=run.data.latents, weights=weights_hash(vae.state_dict()),
                  scaling_factor=vae.config.scaling_factor, shape=shape, count=len(images), data=info["fingerprint"])
    rows, done, note = folder / "latents.npy", folder / ".latents-done.npy", folder / ".latents.json"
    begun = rows.exists() and done.exists() and note.exists()
    if run.rank == 0 and not (begun and read_json(note, "delete it") == recipe):
        create_rows(rows, np.float16, [len(images), *shape])
        create_rows(done, np.uint8, [-(-len(images) // block)])
        write_json(note, recipe)
    run.wait()

    finished = np.load(done, allow_pickle=False)
    mine = [i for i in range(run.rank, len(finished), run.world) if not finished[i]]
    blocks = ahead(lambda i: torch.from_numpy(np.array(images[i * block:(i + 1) * block])), mine)
    with bar(run, len(images), f"encoding {split} images") as progress:
        for i, x in zip(mine, blocks):
            latents = encode(as_input(x.to(run.device))).half().cpu()
            if not torch.isfinite(latents).all():
                raise UserError(f"data.latents={run.data.latents}: latents of {split} images {i * block} ... "
                                "are not finite in float16")
            write_rows(rows, i * block, latents.numpy())
            write_rows(done, i, np.ones(1, np.uint8))
            progress.update(len(x) * run.world)
    run.wait()
    if run.rank == 0:
        os.replace(note, folder / "latents.json")         # from here on they are there
        done.unlink()
        run.say(f"encoded {len(images):,} {split} images in {rows}")
    run.wait()


# ---------------------------------------------------------------------------------------------------------------------
# What the stages read

def as_input(rows, flip=None, z=None):
    """Stored rows as the network sees them: uint8 images [B, C, H, W] in [-1, 1]; of latents [B, 2, 2C, h, w] the mean,
    or with noise z [B, C, h, w] a draw.

    flip: bool [B], the images to be mirrored.
    """
    if rows.dtype == torch.uint8:
        x = rows.float() / 127.5 - 1
        return x if flip is None else torch.where(wide(flip), x.flip(-1), x)
    chosen = rows[:, 0] if flip is None else torch.where(wide(flip), rows[:, 1], rows[:, 0])
    mean, std = chosen.float().chunk(2, 1)
    return mean if z is None else mean + std * z


def row_shape(rows):
    """(C, H, W) of what the network sees of stored images or latents."""
    return tuple(rows.shape[1:]) if rows.ndim == 4 else (rows.shape[2] // 2, *rows.shape[3:])


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
    folder, arrays = run.dir / "data" / split, {}
    info = read_json(folder / "info.json", "run train_diffusion.py first")
    if run.data.latents:
        read_json(folder / "latents.json", "run train_diffusion.py first")
    hint = f"if it is damaged, delete {run.dir / 'data'} and run train_diffusion.py again"
    with reading(folder / "info.json", hint):
        n, size, kinds = info["count"], info["size"], info["arrays"]
    shapes = dict(images=(n, 3, size, size), classes=(n,), boxes=(n, 4), masks=(n, size, size))
    for kind in kinds + ["latents"] * bool(run.data.latents):
        path = folder / f"{kind}.npy"
        with reading(path, hint):
            array = arrays[kind] = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(array) != n or array.shape != shapes.get(kind, array.shape):
                raise ValueError(f"shape {array.shape} for {n} images of size {size}")
    return Split(arrays["images"], arrays["classes"], arrays.get("boxes"), arrays.get("masks"), info,
                 arrays.get("latents"))


def require_shape(run, state, advice="use it in a run of its own size: set data.size or data.latents in another run="):
    """A UserError where a model (its checkpoint) is made for other inputs than this run has."""
    own, here = (state["channels"], state["size"]), input_shape(run)
    if own != here:
        raise UserError(f"{state['file']}: made for inputs of {own[0]} x {own[1]} x {own[1]}, "
                        f"this run's are {here[0]} x {here[1]} x {here[1]}; {advice}")


def input_shape(run):
    """(channels, side) of what the network of this run sees: known before there are latents, too."""
    size, path = run.data.size, run.dir / "data" / "train" / "latents.json"
    if not run.data.latents:
        return 3, size
    if path.exists():
        with reading(path, "delete it and run train_diffusion.py again"):
            _, channels, side, _ = read_json(path, "delete it")["shape"]
            return channels // 2, side
    try:
        config = autoencoder_kl().load_config(run.data.latents, local_files_only=run.dry_run)
    except (OSError, ValueError, UserError) as e:
        if run.dry_run:                                   # Stable Diffusion's
            return 4, size // 8
        raise UserError(f"data.latents={run.data.latents}: {' '.join(str(e).split())[:200]}") from None
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    require(size % factor == 0, run.data, "size latents",
            f"size must be a multiple of {factor}, by which this autoencoder shrinks images")
    return config["latent_channels"], size // factor


def file_of(split, name, t):
    """File name of one feature array."""
    return f"{split}-{name}-t{t:g}.npy"


def load_features(run, name, split):
    """(list of float arrays [N, ...] as memory maps, info) of features/<name>, checked against the run's data."""
    folder, data, arrays = run.dir / "features" / name, load_data(run, split), []
    info = read_json(folder / "info.json", "run extract_features.py first")
    hint = "delete the folder and extract again"
    with reading(folder / "info.json", hint):
        made_of = info["data"].get(split)
        files = [folder / file_of(split, entry["activation"], entry["t"]) for entry in info["arrays"]]
    if made_of != data.info["fingerprint"]:
        raise UserError(f"{folder}: extracted from {split} images {made_of}, the run's are "
                        f"{data.info['fingerprint']}; extract again")
    for file in files:
        with reading(file, hint):
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
            if len(arrays[-1]) != len(data):
                raise ValueError(f"{len(arrays[-1])} rows for {len(data)} images")
    return arrays, info


def arrays_hash(arrays):
    """Hash of a label file's arrays {name: array}; its description holds it, so that the two are known to fit."""
    return digest(*(arrays[k] for k in sorted(arrays)))


def load_labels(run, name):
    """(dict(train int64 [N], test int64 [N'], ...), info) of labels/<name>.npz, checked against the run's data."""
    path, hint = run.dir / "labels" / f"{name}.npz", "make the labels again"
    info = read_json(path.with_suffix(".json"), "make it with self_label.py (method=..., name=...)")
    with reading(path, hint):
        with np.load(path, allow_pickle=False) as f:
            labels = {k: f[k] for k in f.files}
        there = arrays_hash(labels)
        K, made_of = int(labels["num_labels"]), info["data"]
        for split in SPLITS:
            ids, data = labels[split], load_data(run, split)
            if made_of[split] != data.info["fingerprint"]:
                raise UserError(f"{path}: belongs to {split} images {made_of[split]}, {run.dir}/data/{split} holds "
                                f"{data.info['fingerprint']}; {hint}")
            if len(ids) != len(data):
                raise ValueError(f"{len(ids)} {split} labels for {len(data)} images")
            lowest = 0 if split == "train" else -1        # a test image may be of unknown class
            if ids.dtype.kind not in "iu" or not lowest <= ids.min() <= ids.max() < K:
                raise ValueError(f"{split} labels must be whole numbers in {lowest} ... {K - 1}; found {ids.dtype}, "
                                 f"{ids.min()} ... {ids.max()}")
            labels[split] = ids.astype(np.int64)
        if info.get("hash") not in (None, there):
            raise ValueError("not the arrays that its .json describes")
    return labels, info | {"num_labels": K}

"""Images: any source becomes arrays in the run folder, once; row i is image i in every file of a run. Latents and long-tailed sets are made here, too.

`prepare_data` writes data/{train,test}/, `load_data` opens them as a `Split`, `as_input` turns rows into what the network sees.
"""
import hashlib
import itertools
import math
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
import torch
import torch.utils.checkpoint

from configs.run import (UserError, ahead, bar, create_rows, digest, read_json, require, seed_of, unknown, weights_hash, wide,
                         write_json, write_rows)
from configs.shapes import SHAPES_CLASSES, draw_shapes


# ---------------------------------------------------------------------------------------------------------------------
# Data: any source becomes arrays in the run folder, once

TORCHVISION = {                                           # set -> constructor arguments of its train and its test part (parts are joined)
    **{name: ([dict(train=True)], [dict(train=False)]) for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST")},
    **{name: ([dict(split="train")], [dict(split="test")]) for name in ("SVHN", "Food101", "GTSRB", "StanfordCars")},
    "STL10": ([dict(split="train+unlabeled")], [dict(split="test")]),            # class -1: not known
    "Flowers102": ([dict(split="train"), dict(split="val")], [dict(split="test")]),
    "DTD": ([dict(split="train"), dict(split="val")], [dict(split="test")]),
    "FGVCAircraft": ([dict(split="trainval")], [dict(split="test")]),
    "OxfordIIITPet": ([dict(split="trainval")], [dict(split="test")]),
    "ImageNet": ([dict(split="train")], [dict(split="val")]),
    "LSUN": ([dict(classes=["church_outdoor_train"])], [dict(classes=["church_outdoor_val"])]),
}
SOURCES = ["shapes", "folder", "arrays", *TORCHVISION]


def torchvision_datasets():
    """torchvision's data sets, also beside a CPU-only torch, with which its compiled detection operators cannot load."""
    try:
        from torchvision import datasets
    except RuntimeError:
        for op in ("nms", "qnms"):                        # declared but absent; nothing here calls them
            try:
                torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            except RuntimeError:
                pass                                      # declared already
        from torchvision import datasets
    return datasets


def open_torchvision(data, split):
    """The torchvision data set `data.source` as one map-style data set of (PIL image, class)."""
    datasets = torchvision_datasets()
    parts = []
    for arguments in TORCHVISION[data.source][split == "test"]:
        if data.source not in ("ImageNet", "LSUN"):       # those two are never downloaded by torchvision
            arguments = arguments | dict(download=data.download)
        try:
            parts.append(getattr(datasets, data.source)(data.root or "data", **arguments))
        except (RuntimeError, OSError, ModuleNotFoundError, ValueError) as e:
            raise UserError(f"data.source={data.source}: {str(e).splitlines()[0]} (looked in {data.root or 'data'}; "
                            "set data.root to where the files are, or data.download=true)") from None
    names = [str(n) for n in getattr(parts[0], "wnids", getattr(parts[0], "classes", []))]
    return torch.utils.data.ConcatDataset(parts), names


class Folder(torch.utils.data.Dataset):
    """Image files below `root`: flat, or one subfolder per class, or train/ and test/ folders of either; sorted by name."""

    def __init__(self, data, split):
        root = Path(data.root)
        if not root.is_dir():
            raise UserError(f"data.root={data.root}: no such folder of images")
        parts = {"train": root / "train", "test": next((root / p for p in ("test", "val") if (root / p).is_dir()), root / "test")}
        own_split = all(p.is_dir() for p in parts.values())
        root = parts[split] if own_split else root
        kinds = set(Image.registered_extensions())
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in kinds and p.is_file())
        if not files:
            raise UserError(f"{root}: no image files found")
        nested = all(len(p.relative_to(root).parts) > 1 for p in files)
        every = parts.values() if own_split else [root]   # class ids must be those of both parts
        self.names = sorted({p.name for r in every for p in r.iterdir() if p.is_dir()}) if nested else []
        keep = range(len(files)) if own_split else np.flatnonzero(held_out(data, len(files)) == (split == "test"))
        self.files = [files[i] for i in keep]
        self.classes = [self.names.index(p.relative_to(root).parts[0]) if nested else -1 for p in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return Image.open(self.files[i]), self.classes[i]


class Chosen(torch.utils.data.Dataset):
    """Those items (image, class) whose class is in `keep`, numbered by its place there."""

    def __init__(self, items, names, keep):
        if missing := [k for k in keep if k not in names]:
            raise UserError(f"data.classes={missing[0]}: {unknown(missing[0], names) if names else 'this source has no named classes'}")
        classes = items.classes if hasattr(items, "classes") else [c for part in items.datasets for c in getattr(part, "targets", [])]
        if len(classes) != len(items):
            raise UserError("data.classes: this source does not tell the classes of its images beforehand")
        self.place = {names.index(k): i for i, k in enumerate(keep)}
        self.items, self.rows = items, [i for i, c in enumerate(classes) if int(c) in self.place]
        if hasattr(items, "files"):
            self.files = [items.files[i] for i in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image, c = self.items[self.rows[i]]
        return image, self.place[int(c)]


def held_out(data, n):
    """Which of n images are for testing: bool [n], a function of the seed."""
    return np.random.default_rng(seed_of(data.seed, "held out")).random(n) < data.test_fraction


class Squared(torch.utils.data.Dataset):
    """(PIL image, class) -> (uint8 [3, size, size], class, complaint): centre crop to a square, resize, RGB."""

    def __init__(self, items, size):
        self.items, self.size = items, size

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            image, label = self.items[i]
            image = ImageOps.exif_transpose(image)            # photographs say how they were held
            if image.mode.startswith("I;16"):             # 16 bits of grey; convert() would clip them to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no known range; store 8 or 16 bits")
            image = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            name = getattr(self.items, "files", {i: f"image {i}"})[i]
            return np.zeros((3, self.size, self.size), np.uint8), -1, f"{name}: {e}"
        (w, h), s = image.size, min(image.size)
        image = image.crop(((w - s) // 2, (h - s) // 2, (w + s) // 2, (h + s) // 2)) if w != h else image
        image = image.resize((self.size, self.size), Image.BICUBIC) if s != self.size else image
        return np.asarray(image, np.uint8).transpose(2, 0, 1), int(label), ""


def read_rows(f, name, chunk=256):
    """Stream the rows of a .npy file object: yields arrays of up to `chunk` rows without holding the rest."""
    try:
        version = np.lib.format.read_magic(f)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(f)
    except (ValueError, AttributeError) as e:
        raise UserError(f"{name}: not a .npy array ({e})") from None
    if fortran or dtype.hasobject or not shape:
        raise UserError(f"{name}: expected a C-ordered array of plain numbers with one row per image")
    size = dtype.itemsize * math.prod(shape[1:])
    for i in range(0, shape[0], chunk):
        rows = min(chunk, shape[0] - i)
        blob = f.read(rows * size)
        if len(blob) != rows * size:
            raise UserError(f"{name}: truncated: {shape[0]} rows announced, the file ends in row {i + len(blob) // size}")
        yield np.frombuffer(blob, dtype).reshape(rows, *shape[1:])


def read_arrays(data, split):
    """Batches of (images, classes, boxes, masks) from a .npy of images or an .npz with images [, classes, boxes, masks] [, test_images, ...]."""
    path = Path(data.root)
    if not path.is_file():
        raise UserError(f"data.root={data.root}: no such .npz or .npy file")
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a readable .npz file")
    archive = zipfile.ZipFile(path) if path.suffix == ".npz" else None
    names = [n.removesuffix(".npy") for n in archive.namelist()] if archive else ["images"]
    if "images" not in names:
        raise UserError(f"{path}: has no array 'images' (found: {', '.join(names)})")
    own_split = "test_images" in names
    prefix = "test_" if own_split and split == "test" else ""
    kinds = [k for k in ("images", "classes", "boxes", "masks") if f"{prefix}{k}" in names]
    streams = [read_rows(archive.open(f"{prefix}{k}.npy") if archive else path.open("rb"), f"{path}:{prefix}{k}") for k in kinds]
    seen, test = 0, None
    for rows in itertools.zip_longest(*streams, fillvalue=()):
        if len({len(v) for v in rows}) > 1:
            raise UserError(f"{path}: {', '.join(kinds)} do not have one row for each image")
        batch = dict(zip(kinds, rows))
        x = batch["images"]
        if x.ndim not in (3, 4) or x.dtype != np.uint8:
            raise UserError(f"{path}: images are {x.dtype} with {x.ndim} dimensions; expected uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]")
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if x.shape[-1] in (1, 3) else x
        if x.shape[1] not in (1, 3) or x.shape[2:] != (data.size, data.size):
            raise UserError(f"{path}: images are {x.shape[2]}x{x.shape[3]} with {x.shape[1]} channels; expected 1 or 3 channels at data.size={data.size}")
        batch["images"] = np.repeat(x, 3 // x.shape[1], 1)
        if not own_split:                                 # one pass decides by row number, so that both parts agree
            test = held_out(data, 1 << 24) if test is None else test
            keep = test[seen:seen + len(x)] == (split == "test")
            seen += len(x)
            batch = {k: v[keep] for k, v in batch.items()}
        yield tuple(batch.get(k) for k in ("images", "classes", "boxes", "masks"))


def source_batches(run, split, bad):
    """(number of images or 0 if unknown, class names, iterator of (images, classes, boxes, masks)); unreadable images are added to `bad`."""
    data = run.data
    require(not data.classes or data.source not in ("shapes", "arrays"), data, "source classes", "classes are chosen from folders and torchvision sets only")
    if data.source == "shapes":
        n = (data.train or 20_000) if split == "train" else (data.test or 5_000)
        chunks = (np.arange(i, min(i + 1000, n)) for i in range(0, n, 1000))
        return n, SHAPES_CLASSES, (draw_shapes(seed_of(data.seed, split), c, data.size, data.two_objects) for c in chunks)
    if data.source == "arrays":
        return 0, [], read_arrays(data, split)
    if data.source == "folder":
        items = Folder(data, split)
        names = items.names
    elif data.source in TORCHVISION:
        items, names = open_torchvision(data, split)
    else:
        raise UserError(f"data.source={data.source}: {unknown(data.source, SOURCES)}")
    if data.classes:
        items, names = Chosen(items, names, data.classes), data.classes

    def batches():
        workers = 0 if len(items) < 2_000 or hasattr(getattr(items, "datasets", [None])[0], "data") else min(16, os.cpu_count() or 1)
        loader = torch.utils.data.DataLoader(Squared(items, data.size), batch_size=256, num_workers=workers, collate_fn=list)
        for batch in loader:
            good = [(x, c) for x, c, complaint in batch if not complaint]
            bad.extend(complaint for _, _, complaint in batch if complaint)
            if bad and not data.skip_bad:
                raise UserError(f"unreadable image {bad[0]}" + " (skip such files with data.skip_bad=true)")
            if good:
                yield np.stack([x for x, _ in good]), np.array([c for _, c in good]), None, None
    return len(items), names, batches()


class RowWriter:
    """Append rows to a .npy file without knowing their number in advance; `close` writes the final shape and returns the sha256 of the data."""

    def __init__(self, path, row):
        self.file, self.row, self.count, self.hash = open(path, "wb"), row, 0, hashlib.sha256()
        self.header()

    def header(self):
        np.lib.format.write_array_header_1_0(self.file, {"shape": (self.count, *self.row.shape), "fortran_order": False, "descr": self.row.dtype.str})

    def add(self, rows):
        blob = np.ascontiguousarray(rows, self.row.dtype).tobytes()
        self.file.write(blob)
        self.hash.update(blob)
        self.count += len(rows)

    def close(self):
        self.file.seek(0)
        self.header()                                     # numpy leaves room in the header for the first axis to grow
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.hash.hexdigest()


def long_tail(classes, ratio, seed):
    """Rows (sorted) of a long-tailed subset: of C classes, class k keeps n_max ratio^(-k / (C - 1)) images at random, n_max = those of the largest class.

    The exponential profile of Cui et al. 2019 (arXiv 1901.05555), there for CIFAR; a class with fewer images keeps all. classes: int64 [N], none unknown.
    """
    counts, g = np.bincount(classes), np.random.default_rng(seed_of(seed, "long tail"))
    wanted = np.maximum(1, np.floor(counts.max() * float(ratio) ** (-np.arange(len(counts)) / max(len(counts) - 1, 1)))).astype(int)
    return np.sort(np.concatenate([g.permutation(np.flatnonzero(classes == k))[:n] for k, n in enumerate(wanted)]))


def keep_rows(folder, rows):
    """Rewrite the arrays of a prepared folder with these rows alone, streaming; the new hashes, {kind: sha256}."""
    hashes = {}
    for path in sorted(folder.glob("*.npy")):
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
        writer = RowWriter(path.with_suffix(".new"), np.empty(whole.shape[1:], whole.dtype))
        for i in range(0, len(rows), 1000):
            writer.add(whole[rows[i:i + 1000]])
        hashes[path.stem] = writer.close()
        os.replace(path.with_suffix(".new"), path)
    return hashes


def prepare_data(run):
    """Turn `data.source` into data/{train,test}/*.npy in the run folder, streaming; nothing happens where that is done already."""
    for split in ("train", "test"):
        folder, aside = run.dir / "data" / split, run.dir / "data" / f".{split}.tmp"
        if run.rank != 0 or (folder / "info.json").exists():
            continue
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        bad, writers, limit, done = [], {}, getattr(run.data, split), 0
        total, names, batches = source_batches(run, split, bad)
        kinds = {"images": np.uint8, "classes": np.int64, "boxes": np.float32, "masks": np.uint8}
        with bar(run, min(limit or 10 ** 12, total) or None, f"preparing {split} images") as progress:
            for batch in batches:
                keep = min(len(batch[0]), limit - done) if limit else len(batch[0])
                for (kind, dtype), rows in zip(kinds.items(), batch):
                    rows = np.full(len(batch[0]), -1) if rows is None and kind == "classes" else rows
                    if rows is not None:
                        rows = rows[:keep].astype(dtype)
                        if kind not in writers:
                            writers[kind] = RowWriter(aside / f"{kind}.npy", np.empty(rows.shape[1:], dtype))
                        writers[kind].add(rows)
                done += keep
                progress.update(keep)
                if limit and done >= limit:
                    break
        if not done:
            raise UserError(f"data.source={run.data.source}: no {split} images")
        hashes, classes = {kind: w.close() for kind, w in writers.items()}, np.load(aside / "classes.npy")
        if run.data.imbalance > 1 and split == "train":
            if (classes < 0).any():
                raise UserError(f"data.imbalance={run.data.imbalance:g}: needs the class of every training image, and data.source={run.data.source} lacks some")
            rows = long_tail(classes, run.data.imbalance, run.data.seed)
            hashes, done, classes = keep_rows(aside, rows), len(rows), classes[rows]
        write_json(aside / "info.json", dict(source=run.data.source, split=split, count=done, size=run.data.size, class_names=names,
                                             class_counts=np.bincount(classes[classes >= 0]).tolist(),
                                             arrays=sorted(hashes), fingerprint=hashes["images"][:16], skipped=bad))
        os.replace(aside, folder)
        run.say(f"prepared {done:,} {split} images in {folder}" + (f"; skipped {len(bad)} unreadable ones, listed in info.json" if bad else ""))
    run.wait()
    if run.data.latents:
        encode_latents(run)


def autoencoder_kl():
    """The class of autoencoders that data.latents can name; nothing but latents needs its package."""
    torchvision_datasets()                                # diffusers imports torchvision: make sure that this works beside a CPU-only torch
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as e:
        raise UserError(f"data.latents needs the package diffusers (pip install diffusers): {str(e).splitlines()[0]}; "
                        "or leave data.latents empty to work on pixels") from None
    return AutoencoderKL


def open_autoencoder(run):
    """The frozen autoencoder of this run on its device, in float32, kept in `run.vae`; None without data.latents. To be called by all processes."""
    if not run.data.latents or run.vae is not None:
        return run.vae
    kind = autoencoder_kl()
    for mine in run.turns():
        if mine:
            try:
                run.vae = kind.from_pretrained(run.data.latents, use_safetensors=True).eval().requires_grad_(False).to(run.device)
            except Exception as e:                        # no such folder or id, no network, damaged or foreign files
                raise UserError(f"data.latents={run.data.latents}: not a readable AutoencoderKL of safetensors "
                                f"({type(e).__name__}: {' '.join(str(e).split())[:150]})") from None
    return run.vae


@torch.no_grad()
def to_latents(vae, x):
    """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents, in the units that the network sees: [B, 2C, h, w]."""
    d, scale, shift = vae.encode(x).latent_dist, vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    return torch.cat([(d.mean - shift) * scale, d.std * scale], 1)


@torch.no_grad()
def decode(vae, x, batch=16):
    """What the network sees, [B, C, h, w], as images [B, 3, H, W]; x itself where there is no autoencoder."""
    if vae is None:
        return x
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):          # TF32 rounds by less than a grey level, and full float32 is slow
        return torch.cat([vae.decode(part.float() / scale + shift).sample for part in x.split(batch)])


def encode_latents(run, block=256, batch=16):
    """data/<split>/latents.npy, float16 [N, 2, 2C, h, w]: mean and standard deviation of every image and of its mirror image.

    Each process takes every so manyth block of rows; a byte per block says what is there, so that the same command continues.
    """
    for split in ("train", "test"):
        folder = run.dir / "data" / split
        if run.agreed((folder / "latents.json").exists):
            continue
        vae, images = open_autoencoder(run), np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        shape = [2, *to_latents(vae, torch.zeros(1, 3, *images.shape[2:], device=run.device)).shape[1:]]
        recipe = dict(autoencoder=run.data.latents, weights=weights_hash(vae.state_dict()), scaling_factor=vae.config.scaling_factor, shape=shape, count=len(images),
                      data=read_json(folder / "info.json", "run train_diffusion.py first")["fingerprint"])
        rows, done, note = (folder / f".latents{end}" for end in (".npy", "-done.npy", ".json"))
        if run.rank == 0 and not (rows.exists() and done.exists() and note.exists() and read_json(note, "delete it") == recipe):
            create_rows(rows, "f2", [len(images), *shape]), create_rows(done, "u1", [math.ceil(len(images) / block)])
            write_json(note, recipe)
        run.wait()
        there = np.load(done, allow_pickle=False)
        with bar(run, len(images), f"encoding {split} images") as progress:
            for i, rows_of_block in ahead(lambda i: (i, torch.from_numpy(np.array(images[i * block:(i + 1) * block]))), [i for i in range(run.rank, len(there), run.world) if not there[i]]):
                x = as_input(rows_of_block.to(run.device))
                both = [torch.cat([to_latents(vae, part) for part in v.split(batch)]) for v in (x, x.flip(-1))]
                out = torch.stack(both, 1).half().cpu()
                if not torch.isfinite(out).all():
                    raise UserError(f"data.latents={run.data.latents}: latents of {split} images {i * block} ... are not finite in float16")
                write_rows(rows, i * block, out.numpy()), write_rows(done, i, np.ones(1, np.uint8))
                progress.update(len(x) * run.world)
        run.wait()
        if run.rank == 0:
            os.replace(rows, folder / "latents.npy")
            write_json(folder / "latents.json", recipe)
            done.unlink(), note.unlink()
            run.say(f"encoded {len(images):,} {split} images in {folder / 'latents.npy'}")
        run.wait()


def as_input(rows, flip=None, z=None):
    """Stored rows as the network sees them: uint8 images [B, C, H, W] in [-1, 1]; of latents [B, 2, 2C, h, w] the mean, or with noise z [B, C, h, w] a draw.

    flip: bool [B], the images to be mirrored.
    """
    if rows.dtype == torch.uint8:
        x = rows.float() / 127.5 - 1
        return x if flip is None else torch.where(wide(flip), x.flip(-1), x)
    mean, std = (rows[:, 0] if flip is None else torch.where(wide(flip), rows[:, 1], rows[:, 0])).float().chunk(2, 1)
    return mean if z is None else mean + std * z


def row_shape(rows):
    """(C, H, W) of what the network sees of stored images or latents."""
    return tuple(rows.shape[1:]) if rows.ndim == 4 else (rows.shape[2] // 2, *rows.shape[3:])


@dataclass
class Split:
    """One part of the data: arrays opened read-only, row i is image i."""
    images: np.ndarray                                    # uint8 [N, 3, H, W]
    classes: np.ndarray                                   # int64 [N]; -1 = not known. For evaluation and control runs only
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


def source_counts(run):
    """Images of the source as far as known without reading it, (train, test); 0 = unknown."""
    data = run.data
    if data.source not in SOURCES:
        raise UserError(f"data.source={data.source}: {unknown(data.source, SOURCES)}")
    if data.source == "folder" and Path(data.root).is_dir():
        known = [source_batches(run, split, [])[0] for split in ("train", "test")]
    elif data.classes:
        known = 0, 0
    else:
        known = {"shapes": (20_000, 5_000), "ImageNet": (1_281_167, 50_000), "LSUN": (126_227, 300), "CIFAR10": (50_000, 10_000)}.get(data.source, (0, 0))
    limits = data.train, data.test
    return tuple(min(n, limit) if n and limit and data.source != "shapes" else limit or n for n, limit in zip(known, limits))


def load_data(run, split):
    """Open data/<split> of the run and check that its files fit each other. For --dry-run before they are there: as many black images, which take no memory."""
    folder = run.dir / "data" / split
    if run.dry_run and not (folder / "info.json").exists():
        if not (n := source_counts(run)[split == "test"]):
            raise UserError(f"{folder}: not prepared yet, and how many images data.source={run.data.source} has is not known; say data.train= and data.test= with --dry-run")
        empty = lambda kind, *shape: np.broadcast_to(kind(0), (n, *shape))
        channels, size = input_shape(run)
        return Split(empty(np.uint8, 3, run.data.size, run.data.size), empty(np.int64), None, None, dict(fingerprint="not prepared yet", count=n),
                     empty(np.float16, 2, 2 * channels, size, size) if run.data.latents else None)
    info, arrays = read_json(folder / "info.json", "run train_diffusion.py first"), {}
    for kind in info["arrays"] + ["latents"] * bool(run.data.latents):
        try:
            arrays[kind] = np.load(folder / f"{kind}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise UserError(f"{folder / kind}.npy: cannot be read ({e}); delete {folder} and run train_diffusion.py again") from None
        if len(arrays[kind]) != info["count"]:
            raise UserError(f"{folder / kind}.npy has {len(arrays[kind])} rows, info.json says {info['count']}; delete {folder} and run train_diffusion.py again")
    return Split(arrays["images"], arrays["classes"], arrays.get("boxes"), arrays.get("masks"), info, arrays.get("latents"))


def require_shape(run, state, advice="use it in a run of its own size: set data.size or data.latents in another run="):
    """A UserError where a model (its checkpoint) is made for other inputs than this run has."""
    if (own := (state["channels"], state["size"])) != (there := input_shape(run)):
        raise UserError(f"{state['file']}: made for inputs of {own[0]} x {own[1]} x {own[1]}, this run's are {there[0]} x {there[1]} x {there[1]}; {advice}")


def input_shape(run):
    """(channels, side) of what the network of this run sees: known before there are latents, too."""
    size, path = run.data.size, run.dir / "data" / "train" / "latents.json"
    if not run.data.latents:
        return 3, size
    if path.exists():
        shape = read_json(path, "run train_diffusion.py first")["shape"]
        return shape[1] // 2, shape[2]
    try:
        config = autoencoder_kl().load_config(run.data.latents, local_files_only=run.dry_run)
    except (OSError, ValueError, UserError) as e:
        if run.dry_run:                                   # Stable Diffusion's
            return 4, size // 8
        raise UserError(f"data.latents={run.data.latents}: {' '.join(str(e).split())[:200]}") from None
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    require(size % factor == 0, run.data, "size latents", f"size must be a multiple of {factor}, by which this autoencoder shrinks images")
    return config["latent_channels"], size // factor


# ---------------------------------------------------------------------------------------------------------------------
# What earlier stages left: features and labels of the same images

def file_of(split, name, t):
    """File name of one feature array."""
    return f"{split}-{name}-t{t:g}.npy"


def load_features(run, name, split):
    """(list of float arrays [N, ...] as memory maps, info) of features/<name>, checked against the run's data."""
    folder = run.dir / "features" / name
    info, data, arrays = read_json(folder / "info.json", "run extract_features.py first"), load_data(run, split), []
    if info["data"].get(split) != data.info["fingerprint"]:
        raise UserError(f"{folder}: extracted from {split} images {info['data'].get(split)}, the run's are {data.info['fingerprint']}; extract again")
    for entry in info["arrays"]:
        file = folder / file_of(split, entry["activation"], entry["t"])
        try:
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as e:
            raise UserError(f"{file}: cannot be read ({e}); delete the folder and extract again") from None
        if len(arrays[-1]) != len(data):
            raise UserError(f"{file} has {len(arrays[-1])} rows, the data {len(data)}; delete the folder and extract again")
    return arrays, info


def arrays_hash(arrays):
    """Hash of a label file's arrays {name: array}: its description holds it, so that the two are known to belong together."""
    return digest(*(arrays[k] for k in sorted(arrays)))


def load_labels(run, name):
    """(dict(train int64 [N], test int64 [N'], ...), info) of labels/<name>.npz, checked against the run's data."""
    path = run.dir / "labels" / f"{name}.npz"
    info = read_json(path.with_suffix(".json"), "make it with self_label.py (method=..., name=...)")
    try:
        with np.load(path, allow_pickle=False) as f:
            labels = {k: f[k] for k in f.files}
        train, _, K = labels["train"], labels["test"], int(labels["num_labels"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not a readable label file ({e}); delete it and make it again") from None
    for split in ("train", "test"):
        data = load_data(run, split)
        if len(labels[split]) != len(data):
            raise UserError(f"{path} has {len(labels[split])} {split} labels, {run.dir}/data/{split} has {len(data)} images; make the labels again")
        if info.get("data", {}).get(split) != data.info["fingerprint"]:
            raise UserError(f"{path} belongs to {split} images {info.get('data', {}).get(split)}, {run.dir}/data/{split} holds {data.info['fingerprint']}; "
                            "make the labels again")
    if train.dtype.kind not in "iu" or not 0 <= train.min() <= train.max() < K:
        raise UserError(f"{path}: labels must be whole numbers in 0 ... {K - 1} (num_labels={K}); found {train.dtype}, {train.min()} ... {train.max()}")
    if info.get("hash") not in (None, arrays_hash(labels)):
        raise UserError(f"{path}: not the arrays that its .json describes; make the labels again")
    return labels | {"train": train.astype(np.int64)}, info | {"num_labels": K}

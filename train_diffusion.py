"""Train without labels: images in, an unconditional diffusion (flow) model out.

Reads   images: procedural `shapes`, a torchvision set, a folder, or uint8 arrays (`data.source`)
Writes  runs/<run>/config.yaml, data/{train,test}/ (uint8 arrays) and diffusion/<name>/ (checkpoint.pt, metrics.jsonl, samples/)
Time    t = 0 is noise, t = 1 is data, everywhere in this project: x_t = alpha(t) x + sigma(t) z.

    python train_diffusion.py configs/shapes.yaml                                # CPU, about three minutes
    python train_diffusion.py configs/cifar10.yaml                               # one GPU
    torchrun --nproc_per_node=8 train_diffusion.py configs/cifar10.yaml          # eight GPUs, the same global batch
    python train_diffusion.py configs/imagenet256-adm.yaml --prepare             # the data alone, for runs that start from published weights

The same command again resumes. This file is the ground floor that the later stages import. To learn the method, read `main`, `fit`,
`loss_per_image`, `ConstantVelocity` and `UNet` first; configuration, run folder and data are plumbing.
"""
import collections
import copy
import ctypes
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
import yaml
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

FORMAT = 1                                                # of checkpoints; raised when older ones can no longer be read
STAGES = ["train_diffusion", "extract_features", "self_label", "train_guided", "sample_ode", "probe"]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass per section of the YAML; the comment of a field is its --help

@dataclass
class Data:
    """Section `data`: where images come from."""
    source: str = "shapes"                                # shapes, folder, arrays, or a torchvision set: CIFAR10, FashionMNIST, STL10, ...
    root: str = ""                                        # folder (torchvision, folder) or .npz/.npy file (arrays) that holds the images
    download: bool = False                                # let torchvision download what is not under root
    size: int = 32                                        # images become size x size: centre crop, then resize
    latents: str = ""                                     # encode once by this diffusers AutoencoderKL (folder or Hugging Face id), train on latents; empty = pixels
    train: int = 0                                        # keep the first so many training images (class folders: the first classes); 0 = all (shapes: 20,000)
    classes: list[str] = field(default_factory=list)      # folder, ImageNet, CIFAR...: keep these classes only, by name (ImageNet: synset such as n01440764)
    test: int = 0                                         # images to keep for testing; 0 = all (shapes: 5,000)
    test_fraction: float = 0.1                            # folder and arrays without a test part: this share of the images is held out
    imbalance: float = 1.0                                # > 1: long-tailed training set; the first class keeps so many times as many images as the last
    skip_bad: bool = False                                # skip unreadable images, listing them in info.json; false = stop
    two_objects: float = 0.2                              # shapes: share of images with a second object of the same class
    seed: int = 0                                         # shapes: which images are drawn; folder, arrays: which are held out


@dataclass
class Model:
    """Section `model`: the network."""
    backbone: Literal["unet", "uvit"] = "unet"            # ADM U-Net, or U-ViT
    channels: int = 128                                   # base channels of the U-Net, token width of the U-ViT
    mult: list[float] = field(default_factory=lambda: [1, 2, 2])    # unet: channel multiple per resolution level
    blocks: int = 2                                       # unet: residual blocks per level
    attention: list[int] = field(default_factory=lambda: [8])       # unet: map sizes (in positions per side) that get self-attention
    head_channels: int = 64                               # unet: channels per attention head; 0 = `heads` heads at every level
    dropout: float = 0.0                                  # unet: dropout inside residual blocks
    stem: int = 1                                         # unet: space-to-depth factor at the input; 2 makes small models four times cheaper
    style: Literal["adm", "ddpm", "ddae"] = "adm"         # unet: the time scales and shifts inside a block, or is added, as in DDPM (arXiv 2006.11239), DDAE (2303.09769)
    resample: Literal["block", "conv"] = "block"          # unet: maps are halved and doubled by residual blocks, or by a convolution
    patch: int = 2                                        # uvit: patch size
    depth: int = 12                                       # uvit: blocks besides the middle one (half before, half after)
    heads: int = 8                                        # uvit: attention heads
    final_conv: bool = True                               # uvit: 3x3 convolution after the last layer (published: all but the H models)
    registers: int = 0                                    # uvit: learned tokens beside those of time and condition
    clock: list[float] = field(default_factory=lambda: [0, 1000])   # a, b: the network is told the time as a + b t; published weights count steps of noise


@dataclass
class Published:
    """Section `published`: what the tensors of published weights (checkpoint=adm:, ddpm:, uvit:, sgfm:FILE) do not tell. Empty or 0 = as was published."""
    size: int = 0                                         # adm, ddpm: side of the images
    heads: int = 0                                        # attention heads; adm: at every level
    head_channels: int = 0                                # adm: or channels per attention head
    order: Literal["", "heads", "qkv"] = ""               # adm: rows of qkv: by head, each with its q, k, v; or by q, k, v, each with its heads
    path: Literal["", "cv", "vp", "vp-cosine", "vp-sd", "vp-sde"] = ""    # noise path
    clock: list[float] = field(default_factory=list)      # a, b: the network is told the time as a + b t
    predict: Literal["", "v", "eps", "x"] = ""            # what the network predicts
    null_row: Literal["", "last", "none"] = ""            # weights with classes: the last row of the table is the null label, or not; sgfm: none = no labels


@dataclass
class Training:
    """Keys shared by the two training stages. Durations are images seen; batches are global, whatever the number of processes."""
    images: int = 20_000_000                              # images seen in all; more may be asked for later
    batch: int = 128                                      # images per update over all processes
    micro: int = 0                                        # at most so many images per forward pass and process; 0 = no gradient accumulation
    path: Literal["cv", "vp", "vp-cosine", "vp-sd", "vp-sde"] = "cv"    # constant velocity; variance preserving: linear, cosine, Stable Diffusion's betas, score SDE
    predict: Literal["v", "eps", "x"] = "v"               # what the network predicts
    times: Literal["uniform", "logit_normal"] = "uniform"  # how t is drawn
    min_snr: float = 0.0                                  # > 0: min-SNR loss weighting with this gamma
    optimizer: Literal["adamw", "muon"] = "adamw"         # muon: orthogonalised updates of the hidden weights; several times faster in short trainings
    lr: float = 2e-4                                      # never rescaled by batch or processes
    weight_decay: float = 0.0                             # of matrices and convolutions, decoupled
    warmup: int = 10_000                                  # images over which lr rises linearly
    clip: float = 1.0                                     # gradient norm limit; 0 = none
    ema: int = 500_000                                    # half-life, in images, of the averaged weights
    ema_ramp: float = 0.05                                # but never longer than this share of the images seen so far
    flip: bool = True                                     # mirror images at random
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"     # auto = bf16 where the hardware has it
    compile: bool = False                                 # torch.compile the network
    recompute: bool = False                               # keep the inputs of blocks only and compute the rest again when going back: less memory, a third more work
    log_every: int = 10_000                               # images between lines of metrics.jsonl
    save_every: int = 500_000                             # images between checkpoints
    grid_every: int = 500_000                             # images between sample grids (fixed noise, averaged weights)
    tensorboard: bool = False                             # also write TensorBoard files
    seed: int = 0                                         # of weights, order, noise, times and flips
    overwrite: bool = False                               # throw away results that another recipe left under this name


@dataclass
class TrainDiffusion(Training):
    """Section `train_diffusion`."""
    name: str = "base"                                    # results go to diffusion/<name>


SHARED = {"data": Data, "model": Model, "published": Published}                  # sections that every stage reads
RESUMABLE = {"images", "log_every", "save_every", "grid_every", "tensorboard", "overwrite", "micro", "compile", "recompute"}   # may change on resume


class UserError(Exception):
    """Something the user can put right: reported as one line, exit code 2."""


@dataclass
class Run:
    """What a stage knows about its run: folder, configuration, processes."""
    stage: str
    dir: Path
    cfg: typing.Any                                       # this stage's own dataclass
    data: Data
    model: Model
    sections: dict                                        # every section as plain types
    dry_run: bool
    flags: set
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    words: tuple = ()                                     # of the command line: what the next stage must be told, too
    published: Published = field(default_factory=Published)
    vae: typing.Any = None                                # the autoencoder of data.latents, once `open_autoencoder` was called

    def say(self, *words):
        """Print from the first process only."""
        if self.rank == 0:
            print(*words, flush=True)

    def next(self, stage, what=""):
        """Say which command comes next, with this run's YAML, folder and overrides."""
        script, *keys = stage.split()
        self.say("next: python", script, *self.words, *keys, *([f"   # {what}"] if what else []))

    def agreed(self, look):
        """What look() gives on the first process, on all of them. Files may change between two looks, and a network file system remembers what was not there."""
        box = [None]
        if self.rank == 0 or self.dry_run:
            try:
                box = [look()]
            except UserError as e:                        # a complaint of all, so that nobody waits
                box = [e]
        if self.world > 1 and not self.dry_run:
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def share(self, n):
        """Those of n rows that are this process's."""
        return np.arange(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def turns(self):
        """Yield True once, when this process should open what may have to be downloaded: first one process, then one of each machine, then all others."""
        mine = 0 if self.rank == 0 else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
        for turn in range(3):
            yield turn == mine
            if not self.dry_run:                          # there nobody waits: processes do not know each other
                self.wait()

    def wait(self):
        """Let all processes meet."""
        if self.world > 1:
            dist.barrier()


def comments(cls):
    """Field name -> trailing comment and the lines that continue it, for a dataclass and its bases: the text of --help."""
    found, name = {}, None
    for c in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(c).splitlines():
            if m := re.match(r"\s+(\w+)\s*:.*?#\s*(.*)$", line):
                name = m[1]
                found[name] = m[2]
            elif name and (m := re.match(r"\s{20,}#\s*(.*)$", line)):
                found[name] += " " + m[1]
    return found


def convert(key, kind, value):
    """`value` (from YAML or the command line) as the type `kind`; 200k and 50M are accepted for whole numbers."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if value is None and (origin is list or "" in args):  # key= on the command line empties it
        return [] if origin is list else ""
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{key}={value}: must be one of {', '.join(map(str, args))}")
    if origin is list:
        items = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        return [convert(key, args[0], v) for v in items]
    if kind is int and isinstance(value, str) and (m := re.fullmatch(r"(\d+(?:\.\d+)?)([kM])", value)):
        value = float(m[1]) * {"k": 1_000, "M": 1_000_000}[m[2]]
    try:
        if isinstance(value, bool) != (kind is bool) or kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value) if kind is int else "" if value is None else value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key}={value!r}: expected {kind.__name__}" + (" (200k and 50M are fine)" if kind is int else "")) from None


def unknown(name, known):
    """The end of a complaint about a name: what it may have meant."""
    near = difflib.get_close_matches(name, known, 1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; known: {', '.join(known)}"


def require(ok, cfg, keys, what):
    """A UserError that shows these keys of a section, and says what they must be, unless ok."""
    if not ok:
        raise UserError(", ".join(f"{k}={getattr(cfg, k)}" for k in keys.split()) + f": {what}")


def fill(section, cls, values):
    """A dataclass from a plain dict; an unknown key or a wrong type is a UserError that names it."""
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"{section}.{key}: {unknown(key, known)}")
    return cls(**{k: convert(f"{section}.{k}", known[k], v) for k, v in values.items()})


def start(stage, cls, doc, flags={}):
    """Read the command line and YAML of a stage, set up processes, and return the `Run`.

    Called as `python <stage>.py config.yaml [key=value ...] [section.key=value ...] [run=DIR] [--dry-run] [--help]`.
    """
    words, known = sys.argv[1:], {stage: cls, **SHARED}
    if "--help" in words or "-h" in words or not words:
        print(doc)
        for name, c in known.items():
            print(f"{name}: {'key=value' if c is cls else name + '.key=value'}")
            text = comments(c)
            for f in dataclasses.fields(c):
                default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
                choices = f"  [{' | '.join(map(str, typing.get_args(f.type)))}]" if typing.get_origin(f.type) is Literal else ""
                print(f"  {f.name + '=' + str(default):32} {text.get(f.name, '')}{choices}")
        print("other:")
        for name, text in {"run=DIR": "default runs/<name of the YAML>", "--dry-run": "configuration, what would be done, and what it would cost", **flags}.items():
            print(f"  {name:32} {text}")
        raise SystemExit(0 if words else 2)
    given = {w for w in words if w.startswith("--")}
    for w in given - {"--dry-run", *flags}:
        raise UserError(f"{w}: {unknown(w, ['--help', '--dry-run', *flags])}")
    files = [w for w in words if "=" not in w and w not in given]
    if len(files) != 1:
        raise UserError(f"expected exactly one YAML file, got {files or 'none'}; see --help")
    try:
        sections = yaml.safe_load(Path(files[0]).read_text()) or {}
    except OSError as e:
        raise UserError(f"{files[0]}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{files[0]}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(sections, dict) or not all(isinstance(v or {}, dict) for v in sections.values()):
        raise UserError(f"{files[0]}: expected sections (data:, model:, {stage}:, ...), each with keys")
    sections, folder = {k: dict(v or {}) for k, v in sections.items()}, Path("runs") / Path(files[0]).stem
    for word in (w for w in words if "=" in w and w not in given):
        key, value = word.split("=", 1)
        if key == "run":
            folder = Path(value)
            continue
        section, _, key = key.rpartition(".")
        section = section or stage
        kinds = {f.name: f.type for f in dataclasses.fields(known[section])} if section in known else {}
        if kinds.get(key) is not str:                     # name=no is a name, not false
            with suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
        sections.setdefault(section, {})[key] = value
    for name in sections:
        if name not in (*SHARED, *STAGES):
            raise UserError(f"section {name}: {unknown(name, [*SHARED, *STAGES])}")
    own = {name: fill(name, c, sections.get(name, {})) for name, c in known.items()}
    sections |= {name: dataclasses.asdict(c) for name, c in own.items()}
    name = own[stage].name                                # names a folder that finished work replaces: it must be one, inside the run
    if not re.fullmatch(r"\w[\w.+-]*", name) and (name or cls().name):
        raise UserError(f"{stage}.name={name}: must be a name of letters, digits, and . _ + -")
    data = own["data"]
    require(data.imbalance >= 1, data, "imbalance", "must be at least 1 (1 = as it is)")
    require(min(data.train, data.test) >= 0 and 0 < data.test_fraction < 1, data, "train test test_fraction",
            "counts must not be negative (0 = all), the share lies between 0 and 1")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    reuse_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu_flags(training=stage in ("train_diffusion", "train_guided"), exact=getattr(own[stage], "optimizer", "") == "muon")
    dry = "--dry-run" in given
    if world > 1 and not dry:                             # preparing a large data set may keep the other ranks waiting for hours
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=24))
        if device.type == "cuda":                         # but gradients wait for a machine that is gone no longer than this
            dist.group.WORLD._get_backend(device)._set_default_timeout(datetime.timedelta(minutes=30))
    shared = [w for w in words if w.split("=")[0] == "run" or w.split(".")[0] in (*SHARED, *STAGES) and "=" in w]
    run = Run(stage, folder, own[stage], own["data"], own["model"], sections, dry, given, rank, world, device, (files[0], *shared), own["published"])
    if dry:
        run.say(yaml.safe_dump({k: sections[k] for k in ("data", "model", stage)}, sort_keys=False))
    else:
        check_run_folder(run)
    return run


def reuse_memory():
    """Let the C library keep what was freed: every training step asks for the same sizes again, and fresh pages from the kernel cost up to a fifth of its time on CPUs."""
    with suppress(AttributeError, OSError, TypeError):    # glibc alone has this
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD: in bytes
            mallopt(option, value)


def gpu_flags(training, exact=False):
    """PyTorch's settings for GPUs: short float32 products (TF32) in training only, not in k-means, metrics and ODEs; convolutions by the fastest kernel tried.

    exact: no short matrix products, which Muon's orthogonalisation does not survive. In bf16 and fp16 nothing else multiplies float32 matrices.
    """
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = training and not exact, training
    torch.backends.cudnn.benchmark = True


def check_run_folder(run):
    """Write config.yaml on first use; afterwards the data section must stay what it was, since every file's row i is image i."""
    path = run.dir / "config.yaml"
    if run.agreed(lambda: path.exists() and (run.dir / "data" / "train" / "info.json").exists()):
        try:
            there = fill("data", Data, (yaml.safe_load(path.read_text()) or {}).get("data", {}))
        except (UserError, yaml.YAMLError, AttributeError) as e:
            raise UserError(f"{path}: cannot be read ({e}); restore it or use another run=DIR") from None
        for key, value in dataclasses.asdict(run.data).items():
            if getattr(there, key) != value and key not in ("root", "download", "skip_bad"):
                raise UserError(f"{path}: this run was made with data.{key}={getattr(there, key)}, now data.{key}={value}; use another run=DIR")
    elif run.stage != "train_diffusion" and getattr(run.cfg, "evaluate", True):  # sampling alone needs no images
        raise UserError(f"{run.dir}: no such run; start with train_diffusion.py" + (", or only sample with evaluate=false" if run.stage == "sample_ode" else ""))
    run.wait()
    if run.rank == 0 and run.stage == "train_diffusion":
        run.dir.mkdir(parents=True, exist_ok=True)
        with atomic(path) as f:
            f.write(yaml.safe_dump(run.sections, sort_keys=False).encode())
    run.wait()


def cli(main):
    """Run a stage's `main`: what the user can put right is one line on stderr and exit code 2."""
    code = 0
    try:
        main()
    except UserError as e:
        code = 2
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:                                  # full disk, no permission, ...
        code = 2
        print(f"error: {e.filename or 'file system'}: {e.strerror or e}", file=sys.stderr)
    except Exception:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        code = 1                                          # the other ranks must not wait for this one
        traceback.print_exc()
    except KeyboardInterrupt:
        code = 130
        print("interrupted; the same command again continues from the last checkpoint", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)                                    # the other ranks may sit in a collective that will never complete
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Files, randomness, pictures

@contextmanager
def atomic(path):
    """Open `path` for binary writing under a temporary name; on success flush, sync and rename. A kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as e:                                  # a full disk, most of all: say which file it was
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({e.strerror or e}); what was there before is kept") from None
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """`value` as indented JSON, atomically."""
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def create_rows(path, dtype, shape):
    """A .npy file of zeros whose rows `write_rows` fills, perhaps from several machines."""
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=tuple(shape)))
        f.truncate(f.tell() + np.dtype(dtype).itemsize * math.prod(shape))


def write_rows(path, first, rows):
    """Put rows into a .npy file at row `first`. Plain writes: with memory maps, machines that share a page on a network file system lose rows."""
    with open(path, "r+b") as f:
        np.lib.format.read_magic(f)
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        f.seek(first * dtype.itemsize * math.prod(shape[1:]), os.SEEK_CUR)
        f.write(np.ascontiguousarray(rows, dtype).tobytes())


def read_json(path, hint):
    """The JSON file at `path`; a missing or broken one is a UserError that ends in `hint`."""
    try:
        return json.loads(Path(path).read_text())
    except OSError:
        raise UserError(f"{path}: not there; {hint}") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; {hint}") from None


def finished(run, path, recipe):
    """Whether the result described by the JSON file `path` is there and was made by `recipe`.

    A result of another recipe is a UserError that names what differs, unless overwrite=true.
    """
    if not path.exists():
        return False
    there = read_json(path, "delete it")
    there = dict(precision="auto") | there.get("recipe", there)                  # a key that came later, and what was meant before
    other = [f"{k}={there.get(k)}, now {v}" if len(str(v)) < 40 else k for k, v in recipe.items() if there.get(k) != v]
    if other and not run.cfg.overwrite:
        raise UserError(f"{path}: was made with {'; '.join(other[:3])}. Choose another name=, or overwrite=true")
    if not other:
        run.say(f"{path.parent}/{path.stem}: done already")
    return not other


def digest(*parts):
    """Short hash of strings, numbers, lists, dicts and arrays: names a recipe or a set of weights."""
    h = hashlib.sha256()
    for p in parts:
        h.update(np.ascontiguousarray(p).tobytes() if isinstance(p, np.ndarray) else json.dumps(p, sort_keys=True).encode())
    return h.hexdigest()[:16]


def bar(run, total, what, unit="img"):
    """Progress on the first process, if somebody is watching."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=run.rank != 0 or not sys.stderr.isatty(), leave=False)


def seed_of(seed, purpose, index=0):
    """A 32-bit seed that is a function of (seed, purpose, index) and different for every index of one purpose (mt19937 takes 32 bits)."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "little")
    h = (base + index) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):          # each step is a bijection of the 32-bit numbers
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h


@contextmanager
def seeded(seed, purpose, index=0):
    """Constructors of modules know only the global generator of the CPU: lend it to them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, purpose, index))
        yield


def draw(seed, purpose, indices, shape, uniforms=0):
    """Random numbers that belong to each index alone, so that no batch size or number of processes changes them.

    indices: ints [B] -> normal numbers float32 [B, *shape], preceded by uniform ones [B, uniforms] when asked for.
    """
    g, u, z = torch.Generator(), torch.empty(len(indices), uniforms), torch.empty(len(indices), *shape)
    for j, i in enumerate(indices):
        g.manual_seed(seed_of(seed, purpose, int(i)))
        if uniforms:
            u[j].uniform_(generator=g)
        z[j].normal_(generator=g)
    return (u, z) if uniforms else z


def ahead(f, items, depth=1):
    """Yield f(item) for every item, computed one after the other in a thread, up to `depth` of them while the caller is busy with an earlier one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(f, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def to_uint8(x):
    """float images in [-1, 1] -> uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(path, images, columns, rows=None, zoom=0, head=None):
    """Images uint8 [N, 3, H, W] as one PNG, row by row; `rows` are captions left of each row, `head` a line on top."""
    n, _, h, w = images.shape
    zoom = zoom or max(1, round(64 / h))
    left, top, gap = 8 * max(map(len, rows)) + 8 if rows else 0, 20 if head else 0, 2
    lines = math.ceil(n / columns)
    sheet = Image.new("RGB", (left + columns * (w * zoom + gap), top + lines * (h * zoom + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, x in enumerate(np.asarray(images)):
        tile = Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))).resize((w * zoom, h * zoom), Image.NEAREST)
        sheet.paste(tile, (left + i % columns * (w * zoom + gap), top + i // columns * (h * zoom + gap)))
    for j, text in enumerate(rows or []):
        pen.text((4, top + j * (h * zoom + gap) + h * zoom // 2 - 6), text, "black")
    if head:
        pen.text((4, 4), head, "black")
    with atomic(path) as f:
        sheet.save(f, "PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Data: any source becomes arrays in the run folder, once

SHAPES_CLASSES = ["red disc", "red star", "yellow ring", "yellow square", "green triangle", "green disc", "blue star", "blue ring",
                  "violet square", "violet triangle"]
SHAPES = ["disc", "square", "triangle", "ring", "star"]
HUES = np.array([0.0, 0.14, 0.33, 0.58, 0.80])            # of the five colour families: two classes each


def _hash(key, counter):
    """Mix two uint64 arrays (broadcast) into uniform uint64: the splitmix64 generator, entered at position `counter`."""
    z = key + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _signed_distance(shape, x, y, reach):
    """Distance in pixels to a shape's outline, negative inside; x, y [N, H, W] from its centre, reach [N, 1, 1] to its farthest point."""
    if shape == 0:  # disc
        return np.sqrt(x * x + y * y) - reach
    if shape == 1:  # square
        return np.maximum(np.abs(x), np.abs(y)) - 0.70710678 * reach
    if shape == 2:  # triangle: behind all of its three sides
        return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.5 * reach
    if shape == 3:  # ring
        return np.abs(np.sqrt(x * x + y * y) - 0.74 * reach) - 0.26 * reach
    first = second = np.float32(-1e9)  # star: behind all of its five lines but one, so the second largest distance decides
    for a, b in [(0, -1), (0.95105652, -0.30901699), (-0.95105652, -0.30901699), (0.58778525, 0.80901699), (-0.58778525, 0.80901699)]:
        line = a * x + b * y
        first, second = np.maximum(first, line), np.maximum(second, np.minimum(first, line))
    return second - 0.30901699 * reach


def _rgb(hue, saturation, value):
    """HSV in [0, 1], each [...], to RGB [..., 3]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6  # [..., 3]
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def _scene(seed, index, size, two):
    """What images `index` show: (hash key [B, 1], uniform numbers [B, 32], classes, shape, is there a second object [B]; of both objects reach [B, 2] in pixels,
    centre [B, 2, xy] and tangent of the turn [B, 2])."""
    index, B = np.asarray(index).astype(np.uint64), len(index)
    key = _hash(_hash(np.array([seed], np.uint64), np.uint64(0)), index)[:, None]  # [B, 1]
    u = (_hash(key, np.arange(1, 33, dtype=np.uint64)) >> np.uint64(11)) * 2.0 ** -53  # [B, 32] uniform in [0, 1)
    classes = (u[:, 0] * 10).astype(np.int64)  # [B]
    shape = np.array([SHAPES.index(name.split()[1]) for name in SHAPES_CLASSES])[classes]  # [B]
    paired = u[:, 1] < two  # [B]

    # Where objects go. Axis 1 holds the main object and the second one, which is drawn only where `paired`.
    stretch = np.array([0.78, 0.90, 1.05, 0.86, 1.10])[shape]  # [B] gives all shapes similar areas: size is no clue to the class
    widest = np.where(paired, np.minimum(12, 15.5 / 1.6 / stretch), 12)  # [B] a pair must fit side by side
    reach = (stretch * (8.2 + (widest - 8.2) * u[:, 2]) * size / 32)[:, None] * np.array([1, 0.6])  # [B, 2]
    centre = reach[..., None] + (size - 2 * reach[..., None]) * u[:, 3:7].reshape(B, 2, 2)  # [B, 2, xy] wholly inside the image
    free = size - 2 * reach.sum(1)  # [B] room left along the line of a pair: some before it, some between the two, the rest behind
    near = reach[:, 0] + free * u[:, 7]
    line = np.stack([near, near + reach.sum(1) + free * (1 - u[:, 7]) * u[:, 8]], 1)  # [B, 2]
    line = np.where(u[:, 9:10] < 0.5, line, size - line)
    lined = paired[:, None] & (np.arange(2) == (u[:, 10:11] < 0.5))  # [B, xy] a pair stands side by side or one above the other
    centre = np.where(lined[:, None], line[..., None], centre)
    tilt = 0.9 * u[:, 11:13] - 0.45  # [B, 2] tangent of the angle, at most 24 degrees: a square never stands on its corner
    return key, u, classes, shape, paired, reach, centre, tilt


def shape_parts(seed, index, size=32, two=0.2):
    """Where the parts of the main objects of images `index` are: (origin [B, 2], axes [B, 2, 2]), in pixels.

    The point origin + axes @ p shows the same part of all objects of one class, for any p in [-1, 1]^2. Discs and rings are taken as upright: nobody sees their turn.
    """
    _, _, _, shape, _, reach, centre, tilt = _scene(seed, index, size, two)
    t = np.where((shape == 0) | (shape == 3), 0, tilt[:, 0])
    turn = np.stack([np.ones_like(t), -t, t, np.ones_like(t)], 1).reshape(-1, 2, 2)
    return centre[:, 0], turn * (reach[:, 0] / np.sqrt(1 + t * t))[:, None, None]


def draw_shapes(seed, index, size=32, two=0.2):
    """Draw images `index` of the endless set `seed`: a bright shape (or two of one class) on a plain grey ground.

    Image i depends on (seed, i) only, whatever is drawn with it. Every step is integer arithmetic or one of + - * / sqrt, which
    IEEE 754 rounds in one way only (sin or exp may differ between machines), so the bits are the same everywhere.

    index: ints [B]; two: share of images with a second, smaller object of the same class. Returns images uint8 [B, 3, size, size],
    classes int64 [B] (positions in SHAPES_CLASSES), boxes float32 [B, 4] (x0 y0 x1 y1 in pixels of the larger object, right and bottom
    exclusive), masks uint8 [B, size, size] (0 on the background, 1 + class on an object). An image shows the same scene at every size.
    """
    index = np.asarray(index).astype(np.uint64)
    if len(index) > 128:  # small pieces stay in the processor's cache, which is faster, and need little memory
        pieces = [draw_shapes(seed, index[i:i + 128], size, two) for i in range(0, len(index), 128)]
        return tuple(np.concatenate(p) for p in zip(*pieces))

    B = len(index)
    key, u, classes, shape, paired, reach, centre, tilt = _scene(seed, index, size, two)
    cos = 1 / np.sqrt(1 + tilt * tilt)
    hue = (HUES[classes // 2][:, None] + 0.10 * u[:, 13:15] - 0.05) % 1  # [B, 2] varies inside its family
    colour = _rgb(hue, 0.65 + 0.25 * u[:, 15:17], 0.75 + 0.25 * u[:, 17:19])  # [B, 2, 3]
    ground = 0.16 + 0.08 * u[:, 19:20] + 0.03 * u[:, 20:23]  # [B, 3] varies little: the object must be what tells images apart

    f32 = np.float32  # from here on pixels, where speed counts
    steps = np.arange(size, dtype=f32) + f32(0.5)  # [W] pixel centres
    image = np.zeros((B, 3, size, size), f32) + ground.astype(f32)[..., None, None]
    masks, boxes = np.zeros((B, size, size), np.uint8), np.zeros((B, 4), f32)
    for o in (0, 1):
        for s in range(5):
            n = np.nonzero((shape == s) & (paired | (o == 0)))[0]  # [N] the images with this shape
            cx, cy, c, t, r = np.stack([centre[n, o, 0], centre[n, o, 1], cos[n, o], tilt[n, o], reach[n, o]]).astype(f32)[..., None, None]
            x, y = c * (steps - cx), c * (steps[:, None] - cy)  # [N, 1, W], [N, H, 1]
            distance = _signed_distance(s, x + t * y, y - t * x, r)  # [N, H, W]
            cover = np.clip(f32(0.5) - distance, 0, 1)[:, None]  # [N, 1, H, W] soft over one pixel: smooth edges
            image[n] += cover * (colour[n, o].astype(f32)[..., None, None] - image[n])
            inside = distance < 0
            masks[n] = np.maximum(masks[n], inside * (1 + classes[n]).astype(np.uint8)[:, None, None])
            if o == 0:
                cols, rows = inside.any(1), inside.any(2)  # [N, W], [N, H]
                boxes[n] = np.stack([cols.argmax(1), rows.argmax(1), size - cols[:, ::-1].argmax(1), size - rows[:, ::-1].argmax(1)], 1)

    slope = (0.16 * u[:, 23:25] - 0.08).astype(f32)[..., None, None]  # [B, 2, 1, 1] soft light from one side
    light = slope[:, 0] * (steps / size - f32(0.5)) + slope[:, 1] * (steps[:, None] / size - f32(0.5))  # [B, H, W]
    bits = _hash(key, np.arange(64, 64 + size * size, dtype=np.uint64)).reshape(B, size, size)  # one draw holds the noise of 3 channels
    for channel in range(3):
        grain = ((bits >> np.uint64(16 * channel)) & np.uint64(0xFFFF)).astype(f32) * f32(0.02 / 65535) - f32(0.01)
        image[:, channel] += light + grain
    return np.clip(image * 255 + f32(0.5), 0, 255).astype(np.uint8), classes, boxes, masks


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
# Noise paths: x_t = alpha(t) x + sigma(t) z with t = 0 noise, t = 1 data

class ConstantVelocity:
    """Straight path of constant velocity (arXiv 2312.08825): alpha = t, sigma = 1 - c t, dx_t/dt = x - c z, with c = 1 - 1e-4."""
    c = 1 - 1e-4

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - self.c * t

    def v_target(self, x, z, t):
        """What a v-prediction learns: here the velocity itself."""
        return x - self.c * z

    def from_v(self, v, x_t, t):
        """(x_hat, z_hat) from a predicted v; exact identities."""
        z = x_t - t * v
        return v + self.c * z, z

    # The ODE is dy/ds = slope in the variables (y, s): here simply y = x_t, s = t
    def clock(self, t):
        return t

    def time(self, s):
        return s

    def scale(self, t):
        """x_t = scale(t) * y."""
        return torch.ones_like(t)

    def slope(self, x_hat, z_hat):
        return x_hat - self.c * z_hat


class VariancePreserving:
    """DDPM's linear betas (1e-4 ... 0.02, 1000 steps) read on the clock t_ddpm = 1000 (1 - t); alpha^2 + sigma^2 = 1.

    Its velocity in t is singular at the data end; the ODE is solved as dy/drho = z_hat with y = x_t / alpha and rho = sigma / alpha,
    in which an Euler step is exactly DDIM (eta = 0).
    """

    def __init__(self, schedule="linear"):
        """Other schedules on the same clock: cosine (arXiv 2102.09672), sd (Stable Diffusion: even steps in sqrt(beta)), sde (2011.13456: beta from 0.1 to 20)."""
        u, self.copies = torch.arange(1001, dtype=torch.float64) / 1000, {}
        if schedule == "sde":
            self.table = -(0.1 * u + 9.95 * u ** 2)       # ln abar after 0, 1, ..., 1000 steps
            return
        falling = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = {"linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), "sd": torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2,
                 "cosine": (1 - falling[1:] / falling[:-1]).clamp(max=0.999)}[schedule]
        self.table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])

    def on(self, device):
        """The table there; copied once, since a copy makes a GPU wait."""
        if device not in self.copies:
            self.copies[device] = self.table.to(device)
        return self.copies[device]

    def log_abar(self, t):
        """ln of the product of (1 - beta), interpolated between the 1000 steps. t: [...] -> same shape, float64."""
        u = (1000 * (1 - t.double())).clamp(0, 1000)
        k = u.floor().clamp(max=999).long()
        low, high = (self.on(t.device).take(i) for i in (k, k + 1))            # table[k] of a single k would make a GPU wait
        return low + (u - k) * (high - low)

    def alpha(self, t):
        return (0.5 * self.log_abar(t)).exp().to(t.dtype)

    def sigma(self, t):
        return (-torch.expm1(self.log_abar(t))).sqrt().to(t.dtype)

    def v_target(self, x, z, t):
        """Angular velocity alpha z - sigma x (Salimans and Ho, arXiv 2202.00512)."""
        return self.alpha(t) * z - self.sigma(t) * x

    def from_v(self, v, x_t, t):
        a, s = self.alpha(t), self.sigma(t)
        return a * x_t - s * v, s * x_t + a * v

    def clock(self, t):
        """rho = sigma / alpha, falling from 157 at t = 0 to 0 at t = 1."""
        return torch.expm1(-self.log_abar(t)).sqrt().to(t.dtype)

    def time(self, s):
        """Inverse of `clock`: ln abar = -ln(1 + rho^2), looked up in the (falling) table."""
        table, y = self.on(s.device), -torch.log1p(s.double() ** 2)
        k = (torch.searchsorted(-table, -y) - 1).clamp(0, 999)
        return (1 - (k + (y - table[k]) / (table[k + 1] - table[k])) / 1000).clamp(0, 1).to(s.dtype)

    def scale(self, t):
        return self.alpha(t)

    def slope(self, x_hat, z_hat):
        return z_hat


PATHS = {"cv": ConstantVelocity(), "vp": VariancePreserving(), **{f"vp-{s}": VariancePreserving(s) for s in ("cosine", "sd", "sde")}}


def wide(t):
    """[B] -> [B, 1, 1, 1]."""
    return t[:, None, None, None]


def diffuse(path, x, z, t):
    """x_t = alpha(t) x + sigma(t) z. x, z: [B, C, H, W]; t: [B]."""
    return wide(path.alpha(t)) * x + wide(path.sigma(t)) * z


def estimates(path, predict, out, x_t, t):
    """(x_hat, z_hat) from what the network predicts. Affine in `out`, so guidance may mix outputs first. x_t: [B, C, H, W]; t: [B]."""
    out, t = out.to(x_t.dtype), wide(t)
    if predict == "v":
        return path.from_v(out, x_t, t)
    a, s = path.alpha(t), path.sigma(t)                   # at an end of the path the other part is not determined: do not divide the network's error by nothing
    return ((x_t - s * out) / a.clamp(min=0.005), out) if predict == "eps" else (out, (x_t - a * out) / s.clamp(min=0.02))


def loss_per_image(net, path, predict, x, z, t, min_snr=0.0, **condition):
    """Mean squared error of the network's prediction, [B]; optionally weighted by min(SNR, gamma) (arXiv 2303.09556)."""
    target = {"v": path.v_target, "eps": lambda x, z, t: z, "x": lambda x, z, t: x}[predict](x, z, wide(t))
    error = (net(diffuse(path, x, z, t), 1000 * t, **condition).float() - target).square().flatten(1).mean(1)
    if min_snr:                                           # an error d of x_hat is d / sigma in v and d alpha / sigma in eps, on both paths
        snr = (path.alpha(t) / path.sigma(t)).square().clamp(1e-8, 1e8)
        error = error * snr.clamp(max=min_snr) * {"v": path.sigma(t).square(), "eps": 1 / snr, "x": torch.ones_like(t)}[predict]
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Backbones. forward(x [B, C, H, W], time [B] = 1000 t, label [B], vector [B, D], layout [B, L, H, W]) -> [B, C', H, W].
# Conditions may be absent; null is: label num_labels, vector of zeros, layout of zeros. Module names are those of the published weights.

def time_embedding(t, width, clock=(0, 1000), closed=False):
    """Sinusoidal embedding of network time. t: [B] in 0 ... 1000 -> [B, width], cosines first, as published for ADM and U-ViT.

    clock: (a, b), the time as it is embedded is a + b t / 1000. Frequencies fall from 1 towards 1e-4; `closed`: and reach it, as published for DDPM.
    """
    if tuple(clock) != (0, 1000):
        t = clock[0] + clock[1] / 1000 * t.float()
    freqs = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2 - closed))
    angles = t.float()[:, None] * freqs                                          # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], 1)


def zeroed(module):
    """Start a residual branch at zero, so that a fresh block is the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels, eps=1e-5):
    """ADM's 32 groups; fewer below 128 channels, where groups of one channel would erase what the channel says."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps)


class ResBlock(nn.Module):
    """ADM residual block: norm, SiLU, conv, twice; the embedding scales and shifts the second norm, or is `added` before it; optional 2x resampling inside."""

    def __init__(self, c_in, c_out, width, dropout=0.0, resample=None, added=False, eps=1e-5):
        super().__init__()
        self.resample, self.added = resample, added       # None, "down" or "up"
        self.in_layers = nn.Sequential(group_norm(c_in, eps), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, c_out if added else 2 * c_out))
        self.out_layers = nn.Sequential(group_norm(c_out, eps), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def resized(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x, emb):                            # x: [B, C, H, W], emb: [B, width]
        (norm, act, conv), (norm2, act2, dropout, conv2) = self.in_layers, self.out_layers
        h, e = conv(self.resized(act(norm(x)))), self.emb_layers(emb)[:, :, None, None]
        if self.added:                                    # e: [B, C', 1, 1]
            h = norm2(h + e)
        else:
            scale, shift = e.chunk(2, 1)                  # [B, C', 1, 1] each
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        return self.skip_connection(self.resized(x)) + conv2(dropout(act2(h)))


class Resample(nn.Module):
    """A convolution that halves maps, or that follows when they are doubled: what DDPM has in place of resampling residual blocks."""

    def __init__(self, channels, resample, behind=False):
        super().__init__()
        self.resample, self.behind = resample, behind     # "down" or "up"; behind: zeros right and below only, else around
        self.op = nn.Conv2d(channels, channels, 3, *(2, 0 if behind else 1) if resample == "down" else (1, 1))

    def forward(self, x):                                 # [B, C, H, W]
        if self.resample == "up":
            return self.op(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.behind else x)


def again(f, *args):
    """f(*args), of which the backward pass keeps the arguments only and computes the rest once more."""
    return torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False) if torch.is_grad_enabled() else f(*args)


def plainly(f, *args):
    """f(*args): what `again` is instead of."""
    return f(*args)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, [B, heads, L, d] each. The backward pass keeps no scores.

    PyTorch's fused operation, but for training in bfloat16 on CPUs, where it takes up to four times as long as these products and their recomputation
    (64 positions; 1.5 times at 257, as long at 500: `python tests/bench_attention.py`).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < 500 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(lambda q, k, v: (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v, q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(nn.Module):
    """ADM self-attention over all positions of a map, with a residual connection."""

    def __init__(self, channels, heads, eps=1e-5):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)   # per head, its q, k and v lie together
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):                                 # [B, C, H, W]
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).reshape(B, C, H * W))                        # [B, 3C, HW]
        qkv = qkv.reshape(B, self.heads, 3, C // self.heads, H * W).transpose(3, 4).contiguous()                 # else the scores of all pairs would be kept
        q, k, v = qkv.unbind(2)                                                  # [B, heads, HW, C / heads] each
        a = attention(q, k, v)                                                   # [B, heads, HW, C / heads]
        return x + self.proj_out(a.transpose(2, 3).reshape(B, C, H * W)).reshape(B, C, H, W)


class UNet(nn.Module):
    """The ADM U-Net (arXiv 2105.05233): scale-shift residual blocks, residual resampling, attention at chosen map sizes.

    A label row or a vector is added to the time embedding; a layout is concatenated to the input. `style` ddpm and `resample` conv make it DDPM's,
    ddae differs from that in eps, padding and the groups of the last norm.
    """
    run_block = staticmethod(plainly)                     # or `again`: activation checkpointing, block by block
    ends = ("input_blocks.0.", "out.", "vector_emb")      # layers that touch pixels or conditions

    def __init__(self, size, in_channels, out_channels, channels, mult, blocks, attention, head_channels, dropout=0.0, stem=1,
                 num_labels=0, vector_dim=0, layout_channels=0, heads=0, clock=(0, 1000), style="adm", resample="block"):
        super().__init__()
        self.channels, self.stem, self.num_labels, self.layout_channels, self.clock = channels, stem, num_labels, layout_channels, clock
        self.vector_dim, self.added = vector_dim, style != "adm"
        mult, eps = [int(m * channels) for m in mult], 1e-6 if style == "ddpm" else 1e-5
        width, size, c = 4 * channels, size // stem, channels if self.added else mult[0]
        block = lambda c_in, c_out, way=None: ResBlock(c_in, c_out, width, dropout, way, self.added, eps)
        moved = lambda c, way: block(c, c, way) if resample == "block" else Resample(c, way, behind=style == "ddpm")
        attend = lambda c: AttentionBlock(c, heads or max(1, c // head_channels), eps)
        self.time_embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        if num_labels:
            self.label_emb = nn.Embedding(num_labels + 1, width)                 # rows N(0, 1), as published; the last is the null label
        if vector_dim:
            self.vector_emb = nn.Linear(vector_dim, width, bias=False)           # without bias, so that the zero vector is null
            nn.init.normal_(self.vector_emb.weight)                              # a unit vector then weighs as much as a label row
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d((in_channels + layout_channels) * stem ** 2, c, 3, padding=1)])])
        self.output_blocks, skips = nn.ModuleList(), [c]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList([block(c, m)]))
                c = m
                if size in attention:
                    self.input_blocks[-1].append(attend(c))
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([moved(c, "down")]))
                skips.append(c)
                size //= 2
        self.middle_block = nn.ModuleList([block(c, c), attend(c), block(c, c)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                self.output_blocks.append(nn.ModuleList([block(c + skips.pop(), m)]))
                c = m
                if size in attention:
                    self.output_blocks[-1].append(attend(c))
                if level and i == blocks:
                    self.output_blocks[-1].append(moved(c, "up"))
                    size *= 2
        self.out = nn.Sequential(nn.GroupNorm(8, c) if style == "ddae" else group_norm(c, eps), nn.SiLU(), zeroed(nn.Conv2d(c, out_channels * stem ** 2, 3, padding=1)))

    def forward(self, x, time, label=None, vector=None, layout=None):
        emb = self.time_embed(time_embedding(time, self.channels, self.clock, self.added))               # [B, width]
        if self.num_labels:
            emb = emb + self.label_emb(label if label is not None else time.new_full((len(x),), self.num_labels, dtype=torch.long))
        if self.vector_dim:                               # what is not given is null
            emb = emb + self.vector_emb(vector if vector is not None else emb.new_zeros(len(x), self.vector_dim))
        if self.layout_channels:
            x = torch.cat([x, layout if layout is not None else x.new_zeros(len(x), self.layout_channels, *x.shape[2:])], 1)

        def layers(block, x, emb):
            for layer in block:
                x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
            return x

        x, skips = F.pixel_unshuffle(x, self.stem), []
        for block in self.input_blocks:
            x = self.run_block(layers, block, x, emb)
            skips.append(x)
        x = self.run_block(layers, self.middle_block, x, emb)
        for block in self.output_blocks:
            x = self.run_block(layers, block, torch.cat([x, skips.pop()], 1), emb)
        return F.pixel_shuffle(self.out(x), self.stem)


class Attention(nn.Module):
    """Self-attention of the U-ViT, without bias in q, k and v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):                                 # [B, L, D]
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)       # [B, heads, L, D / heads] each
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    """Feed-forward part of a transformer block."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; in the second half of the network it first merges the tokens of its mirror block."""

    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim), Mlp(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, patch, channels, dim, bias=True):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch, bias=bias)

    def forward(self, x):                                 # [B, C, H, W] -> [B, L, D]
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    """U-ViT (arXiv 2209.12152): condition token, time token and patch tokens, with long skips from the first to the second half.

    Label row and vector share the condition token; a layout is embedded per patch and added to the patch tokens. Behind condition and time there may be
    registers: tokens that are the same for all inputs, a row of pos_embed each.
    """
    run_block = staticmethod(plainly)                     # or `again`: activation checkpointing, block by block
    ends = ("patch_embed", "layout_embed", "vector_emb", "decoder_pred", "final_layer")       # layers that touch pixels or conditions

    def __init__(self, size, in_channels, out_channels, channels, patch, depth, heads, final_conv=True, num_labels=0, vector_dim=0, layout_channels=0,
                 clock=(0, 1000), registers=0):
        super().__init__()
        self.registers, self.vector_dim, self.layout_channels = registers, vector_dim, layout_channels
        self.clock, self.channels, self.patch, self.num_labels, self.out_channels, self.grid = clock, channels, patch, num_labels, out_channels, size // patch
        self.patch_embed = PatchEmbed(patch, in_channels, channels)
        if num_labels:
            self.label_emb = nn.Embedding(num_labels + 1, channels)
        if vector_dim:
            self.vector_emb = nn.Linear(vector_dim, channels, bias=False)
        if layout_channels:
            self.layout_embed = PatchEmbed(patch, layout_channels, channels, bias=False)
        self.extras = 1 + registers + bool(num_labels or vector_dim)             # time, registers, and perhaps a condition
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.grid ** 2, channels))
        self.in_blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth // 2))
        self.mid_block = Block(channels, heads)
        self.out_blocks = nn.ModuleList(Block(channels, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(channels)
        self.decoder_pred = nn.Linear(channels, patch ** 2 * out_channels)
        self.final_layer = nn.Conv2d(out_channels, out_channels, 3, padding=1) if final_conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if vector_dim:
            nn.init.normal_(self.vector_emb.weight)

    def forward(self, x, time, label=None, vector=None, layout=None):
        tokens = self.patch_embed(x)                                             # [B, L, D]
        if self.layout_channels:                          # what is not given is null
            tokens = tokens + self.layout_embed(layout if layout is not None else x.new_zeros(len(x), self.layout_channels, *x.shape[2:]))
        front = [time_embedding(time, self.channels, self.clock).to(tokens.dtype)]
        front += [torch.zeros_like(front[0])] * self.registers
        if self.extras > len(front):
            cond = torch.zeros_like(front[0])
            if self.num_labels:
                cond = cond + self.label_emb(label if label is not None else time.new_full((len(x),), self.num_labels, dtype=torch.long))
            if self.vector_dim:
                cond = cond + self.vector_emb(vector if vector is not None else cond.new_zeros(len(x), self.vector_dim))
            front.insert(0, cond)
        x = torch.cat([torch.stack(front, 1), tokens], 1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self.run_block(block, x)
            skips.append(x)
        x = self.run_block(self.mid_block, x)
        for block in self.out_blocks:
            x = self.run_block(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x)[:, self.extras:])                     # [B, L, patch * patch * C]
        x = x.reshape(len(x), self.grid, self.grid, self.patch, self.patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(x.reshape(len(x), self.out_channels, self.grid * self.patch, self.grid * self.patch))


def build_model(model, size, in_channels=3, num_labels=0, vector_dim=0, layout_channels=0, seed=0):
    """The network that section `model` describes, with weights drawn from `seed`; impossible combinations are UserErrors."""
    condition = dict(num_labels=num_labels, vector_dim=vector_dim, layout_channels=layout_channels, clock=model.clock)
    require(len(model.clock) == 2, model, "clock", "two numbers a, b: the network is told a + b t")
    with seeded(seed, "weights"):
        if model.backbone == "uvit":
            if size % model.patch or model.channels % model.heads or model.depth % 2 or model.channels % 2:
                raise UserError(f"model: size {size} must be a multiple of patch={model.patch}, channels={model.channels} of heads={model.heads}; "
                                f"channels and depth={model.depth} even")
            return UViT(size, in_channels, in_channels, model.channels, model.patch, model.depth, model.heads, model.final_conv,
                        registers=model.registers, **condition)
        if size % (step := model.stem * 2 ** (len(model.mult) - 1)):
            raise UserError(f"model: size {size} must be a multiple of {step} (stem={model.stem}, {len(model.mult)} levels in mult)")
        widths, per_head = [m * model.channels for m in model.mult], f"head_channels={model.head_channels}" if model.head_channels else f"heads={model.heads}"
        if model.channels % 8 or any(c <= 0 or c % 8 or c % (min(c, model.head_channels) or model.heads or 1) for c in widths):
            raise UserError(f"model: channels={model.channels} must be a multiple of 8, and of {per_head} at every level")
        sizes = [size // model.stem // 2 ** level for level in range(len(model.mult))]
        if stray := [a for a in model.attention if a not in sizes]:
            raise UserError(f"model: attention={','.join(map(str, stray))}: no level has maps of that size; here they have {', '.join(map(str, sizes))}")
        return UNet(size, in_channels, in_channels, model.channels, model.mult, model.blocks, model.attention, model.head_channels,
                    model.dropout, model.stem, heads=0 if model.head_channels else model.heads, style=model.style, resample=model.resample, **condition)


def hidden_weights(net):
    """Weights of linear and convolutional layers between hidden activations: not those of the first and the last layer, nor embeddings of conditions."""
    return [m.weight for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and not name.startswith(net.ends)]


def placed(net, device, compiled=False):
    """`net` on the device, in the memory layout that suits it: U-Nets that a GPU runs compiled are channels-last.

    Not compiled they are not, since PyTorch's own group normalisation knows one layout on GPUs; on CPUs channels-last was measured to be slower.
    """
    net.to(device)
    return net.to(memory_format=torch.channels_last) if isinstance(net, UNet) and compiled and torch.device(device).type == "cuda" else net


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain types only, so that weights_only=True reads them and they rebuild the model alone

def weights_hash(state):
    """Short hash of a state dict: what features, labels and samples say they were made with."""
    h = hashlib.sha256()
    for name in sorted(state):
        h.update(name.encode())
        h.update(state[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data if state[name].dim() else str(state[name].item()).encode())
    return h.hexdigest()[:16]


def save_checkpoint(run, folder, state):
    """checkpoint.pt and checkpoint.json in `folder`, from the first process, atomically; the previous one stays until the new one is complete."""
    if run.rank == 0:
        path = Path(folder) / "checkpoint.pt"
        try:
            with atomic(path) as f:
                torch.save(state, f)
        except RuntimeError as e:                         # torch reports a full disk as a RuntimeError
            raise UserError(f"{path}: could not be written ({str(e).splitlines()[0]}); is the disk full? the previous checkpoint is kept") from None
        write_json(path.with_suffix(".json"), dict(
            what=f"{state['kind']} model, {state['seen']:,} images seen; 'ema' holds the averaged weights that samples and features use",
            seen=state["seen"], parameters=sum(v.numel() for v in state["net"].values()), weights=state["weights"], num_labels=state["num_labels"],
            path=state["path"], predict=state["predict"], data=state["data"], model=state["model"], config=state["config"]))
    run.wait()


def read_torch(path):
    """What a file written by torch.save holds, on the CPU; anything that is not tensors and plain types is a UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:                                # a truncated or foreign file fails in many ways
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"
        raise UserError(f"{path}: not a readable checkpoint ({why}); it may be truncated or of another program") from None


PUBLISHED = {}                                            # prefix: function (run, file) -> checkpoint dict; extract_features.py reads other people's weights


def checkpoint_file(run, name):
    """The file that checkpoint `name` means; None if it is not there."""
    kind, _, file = name.partition(":")
    places = [file] if kind in PUBLISHED else [run.dir / name / "checkpoint.pt", Path(name) / "checkpoint.pt", name]
    return next((Path(p) for p in places if Path(p).is_file()), None)


def missing(run, name):
    """Whether --dry-run has to count without checkpoint `name`, a folder of the run or published weights that will be there later, and says so."""
    later = name.partition(":")[0] in PUBLISHED if ":" in name else not name.endswith(".pt")
    if not (run.dry_run and later and checkpoint_file(run, name) is None):
        return False
    run.say(f"{name} is not there yet; counted for the network of section model")
    return True


def load_checkpoint(run, name):
    """Checkpoint `name` (a folder of the run such as diffusion/base, a path to a .pt, or published weights: adm:, ddpm:, uvit:, sgfm:FILE) as a dict on the CPU."""
    kind, _, file = name.partition(":")
    if kind in PUBLISHED:
        return PUBLISHED[kind](run, file)
    path = checkpoint_file(run, name)
    if path is None:
        raise UserError(f"{run.dir / name / 'checkpoint.pt'}: no such checkpoint; train it first"
                        + (f" (published weights: {', '.join(PUBLISHED)})" if file else ""))
    state = read_torch(path)
    if not isinstance(state, dict) or not {"format", "kind", "net", "ema", "model"} <= set(state):
        what = f"keys: {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: a torch file, but not a checkpoint of this project ({what}); published weights are named adm:FILE, ddpm:FILE, uvit:FILE or sgfm:FILE")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {state['format']}, this code reads {FORMAT}")
    return state | {"file": str(path)}


def load_model(run, name, weights="ema", compiled=False):
    """(network in eval mode on the run's device, checkpoint dict) from the checkpoint alone. For --dry-run before it is there: as section `model` has it."""
    if missing(run, name):
        (channels, size), K = input_shape(run), int(name.startswith("guided/") and not name.endswith("/unconditional"))
        return placed(build_model(run.model, size, channels, num_labels=K).eval().requires_grad_(False), run.device, compiled), dict(
            file=name, channels=channels, size=size, path="cv", predict="v", num_labels=K, weights="", kind="", conditions={}, planned=True)
    state = load_checkpoint(run, name)
    net = build_model(fill("model", Model, state["model"]), state["size"], state["channels"], **state["conditions"])
    try:
        net.load_state_dict(state[weights])
    except RuntimeError as e:
        raise UserError(f"{state['file']}: the weights do not fit the architecture it names: {str(e).splitlines()[1].strip()[:160]}") from None
    return placed(net.eval().requires_grad_(False), run.device, compiled), state


def autocast(run, precision):
    """(context factory, dtype, the reason in words): bf16 where the hardware multiplies it natively, unless told otherwise."""
    cuda = run.device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    kind = {"auto": torch.bfloat16 if native else torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    why = f"{str(kind).split('.')[1]} ({'asked for' if precision != 'auto' else 'native on this device' if native else 'no native bfloat16 here'})"
    return (lambda: torch.autocast(run.device.type, kind) if kind != torch.float32 else nullcontext()), kind, why


# ---------------------------------------------------------------------------------------------------------------------
# Training

RESIDENT = 4e9                                            # bytes of a training set, as the network sees it, up to which a GPU keeps it


def image_order(seed, purpose, seen, n):
    """Endless dataset rows from image number `seen` on: a new permutation for every epoch, a function of (seed, purpose, epoch)."""
    epoch, position = divmod(seen, n)
    while True:
        yield from np.random.default_rng(seed_of(seed, f"{purpose} order", epoch)).permutation(n)[position:].tolist()
        epoch, position = epoch + 1, 0


def feed(run, cfg, images, seen, uniforms=0, noises=0):
    """This rank's part of every batch from image `seen` on: (rows int64 [b], images uint8, noise [b, 1 + noises, C, H, W], uniforms [b, 3 + uniforms]) on the device.

    The first three uniforms decide time, flip and condition of each image. images: uint8 [N, C, H, W], or latents.

    Noise and uniforms belong to the stage and the running number of the image, so neither restarts nor the number of processes change them. A thread
    prepares the next batches while the network works. Small sets are kept on the device.
    """
    share = cfg.batch // run.world
    pin = run.device.type == "cuda"
    resident = torch.from_numpy(np.array(images, order="C")).to(run.device) if pin and images.nbytes < RESIDENT else None
    order = image_order(cfg.seed, run.stage, seen, len(images))

    def prepared(number):
        rows = torch.tensor([next(order) for _ in range(cfg.batch)][run.rank * share:(run.rank + 1) * share])
        mine = range(number + run.rank * share, number + (run.rank + 1) * share)
        u, z = draw(cfg.seed, run.stage, mine, (1 + noises, *row_shape(images)), 3 + uniforms)
        x = torch.from_numpy(images[rows.numpy()]) if resident is None else None
        return [v.pin_memory() if pin and v is not None else v for v in (rows, x, z, u)]

    for item in ahead(prepared, itertools.count(seen, cfg.batch), depth=4):
        rows, x, z, u = (v.to(run.device, non_blocking=True) if v is not None else None for v in item)
        yield rows, resident[rows] if x is None else x, z, u


@torch.no_grad()
def preview(net, path, predict, z, steps=25, **condition):
    """Quick pictures while training: x_s = alpha(s) x_hat + sigma(s) z_hat on an even grid (Euler on the straight path, DDIM on VP)."""
    x = z
    for t, s in itertools.pairwise(torch.linspace(0, 1, steps + 1)):
        t = t.expand(len(x)).to(x)
        x_hat, z_hat = estimates(path, predict, net(x, 1000 * t, **condition), x, t)
        x = path.alpha(s).to(x) * x_hat + path.sigma(s).to(x) * z_hat
    return x


def footprint(net, channels, size):
    """(operations of one forward pass of one image, bytes that it keeps for the backward pass in float32, the same when blocks are run `again`), counted on a
    copy without data."""
    net, kept, counter, inputs, inside = copy.deepcopy(net).to("meta").train(), {}, FlopCounterMode(display=False), {}, []
    own = {p.untyped_storage()._cdata for p in net.parameters()}

    def keep(x):                                          # views share their storage
        if (storage := x.untyped_storage())._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return x

    def watched(f, *args):                                # what a block keeps, and the inputs that would be kept in its place
        before = sum(kept.values())
        out = f(*args)
        inside.append(sum(kept.values()) - before)
        inputs.update({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in args if isinstance(x, torch.Tensor)})
        return out

    net.run_block = watched
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = net(torch.empty(1, channels, size, size, device="meta"), torch.empty(1, device="meta"))
    del out
    total = sum(kept.values())
    return counter.get_total_flops(), total, total - sum(inside) + sum(inputs.values()) + max(inside)


ENCODE, DECODE = 4.17e6, 9.49e6                           # operations a pixel of Stable Diffusion's autoencoder, counted on its layers without data


def cost(run, what, flops, precision="bf16"):
    """Say what a number of operations is made of and how long GPUs take for it, for --dry-run. what: the factors, in words."""
    run.say(f"work: {what} = {flops:.2e} FLOP")
    for card, rates in (("H100", dict(bf16=989e12, tf32=494e12, fp32=67e12)), ("RTX 4090", dict(bf16=165e12, tf32=83e12, fp32=83e12))):
        seconds = flops / (0.4 * rates[precision])
        run.say(f"  at 40 % of the {rates[precision] / 1e12:.0f} TFLOP/s that an {card} does in {precision}: "
                + (f"{seconds / 3600:,.1f} GPU-hours" if seconds >= 360 else f"{seconds:,.0f} GPU-seconds"))


def announce(run, cfg, net, folder):
    """What a training would do and cost, with the arithmetic: for --dry-run."""
    parameters, (channels, size) = sum(p.numel() for p in net.parameters()), input_shape(run)
    run.say(f"parameters {parameters:,}; {math.ceil(cfg.images / cfg.batch):,} updates of {cfg.batch} images; "
            f"checkpoint {(12 if cfg.optimizer == 'muon' else 16) * parameters / 1e6:.0f} MB in {folder}")
    flops, kept, kept_again = footprint(net, channels, size)
    kept = kept_again if cfg.recompute else kept
    passes, micro = 4 if cfg.recompute else 3, micro_batch(run, cfg)
    cost(run, f"{flops / 1e9:,.1f} GFLOP forward an image x {passes} (forward, twice that backward{', forward again' if cfg.recompute else ''}) "
         f"x {cfg.images:,} images", passes * flops * cfg.images)
    share, why = (0.5, "half of those in float32") if cfg.compile or isinstance(net, UViT) else (5 / 6, "5/6 of those in float32, in which norms work that are not compiled")
    train, test = source_counts(run)
    row = (8 if run.data.latents else 1) * channels * size ** 2                  # bytes of an image as the network sees it
    resident = train * row if train * row < RESIDENT else 0
    muon = cfg.optimizer == "muon"
    held = (18 if muon else 22) * parameters
    run.say(f"memory: {held / 1e9:.1f} GB (4 bytes each for weights, average, gradients, {'one of Muon' if muon else 'two of AdamW'}; 2 for weights in bf16) + "
            f"{micro} images x {share * kept / 1e6:,.0f} MB of activations ({why}{'; of one block, and the inputs of all' if cfg.recompute else ''}) + "
            f"{resident / 1e9:.1f} GB of training images that a GPU keeps (of sets below {RESIDENT / 1e9:.0f} GB) = "
            f"{(held + share * micro * kept + resident) / 1e9:.1f} GB in bf16; lower it by micro={'' if cfg.recompute else ', recompute=true'}")
    if run.data.latents and run.stage == "train_diffusion":
        each = ENCODE * run.data.size ** 2
        cost(run, f"encoding, once: {each / 1e9:,.0f} GFLOP (as Stable Diffusion's autoencoder) x 2 (mirror images) x " +
             (f"{train + test:,} images" if train + test else "a million images (counted where data.root is there)"), 2 * each * (train + test or 1_000_000), "tf32")
    each = 3 * run.data.size ** 2 + (8 * channels * size ** 2 if run.data.latents else 0)
    run.say(f"disk: {each:,} bytes an image (uint8 pixels" + (", float16 mean and std of latents, twice for the mirror image)" if run.data.latents else ")")
            + (f" x {train + test:,} = {each * (train + test) / 1e9:.1f} GB" if train + test else f": {each / 1e3:,.1f} GB a million; counted where data.root is there"))


def micro_batch(run, cfg):
    """Images per forward pass of this process: its share of the batch, or `micro` where that is less."""
    share = cfg.batch // run.world
    return min(cfg.micro or share, share)


def check_training(run, cfg):
    """Combinations of training keys that cannot work."""
    if cfg.batch < 1 or cfg.batch % run.world:
        raise UserError(f"batch={cfg.batch} must be a multiple of the {run.world} processes")
    if cfg.micro < 0 or (cfg.batch // run.world) % micro_batch(run, cfg):
        raise UserError(f"micro={cfg.micro} must divide the {cfg.batch // run.world} images per process and update")
    for key in ("images", "log_every", "save_every", "grid_every", "ema"):
        require(getattr(cfg, key) >= 1, cfg, key, "must be at least 1")
    if cfg.precision == "fp16" and run.device.type != "cuda":
        raise UserError("precision=fp16 needs a GPU; use bf16 or fp32")


def resume(run, cfg, folder, state, parts):
    """Load the checkpoint in `folder` into `parts` (name in the file -> object with load_state_dict); returns the images seen, 0 to start.

    A checkpoint of another recipe is a UserError unless overwrite=true. Log lines and pictures later than the checkpoint are removed:
    they belong to a run that was killed.
    """
    seen, log, pictures = 0, Path(folder) / "metrics.jsonl", Path(folder) / "samples"
    if run.agreed((Path(folder) / "checkpoint.pt").exists):
        old = load_checkpoint(run, str(folder))
        was = {section: dataclasses.asdict(cls()) | old["config"].get(section, {}) for section, cls in (("model", Model), (run.stage, type(cfg)))}
        other = [f"{section}.{key}={was[section].get(key)}, now {value}" for section in was
                 for key, value in state["config"][section].items() if was[section].get(key) != value and key not in RESUMABLE]
        names = dict(data="images", labels="labels", layout="layouts", init="initial weights")
        other += [f"other {what}" for key, what in names.items() if old.get(key) != state.get(key)]
        if other and not cfg.overwrite:
            raise UserError(f"{folder}: was made with {'; '.join(other[:3])}. Choose another name=, or overwrite=true to start again")
        if not other:
            seen = old["seen"]
            for name, part in parts.items():
                part.load_state_dict(old[name])
    if run.rank == 0 and seen < cfg.images:
        pictures.mkdir(parents=True, exist_ok=True)
        lines = log.read_text().splitlines() if seen and log.exists() else []
        with atomic(log) as f:
            f.write("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["images"] <= seen).encode())
        for picture in pictures.glob("*.png"):
            if picture.stem.isdigit() and int(picture.stem) > seen:
                picture.unlink()
    return seen


def orthogonalised(m, iterations=5):
    """U V^T of m = U S V^T, roughly: the same singular vectors, every singular value moved to between 0.7 and 1.2. m: [N, rows, columns].

    Newton-Schulz: x -> (a + b G + c G^2) x with G = x x^T acts on each singular value alone. With these coefficients (Jordan 2024) small values grow
    3.4 times an iteration and none passes 1.2. All factors are polynomials of the first G, so they are multiplied among themselves, which
    takes a third of the time since x is several times as long as it is wide, and meet x once, in the end. Needs all digits of float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m if m.shape[1] <= m.shape[2] else m.mT           # [N, short, long]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)                    # all singular values in [0, 1]
    gram, product = x @ x.mT, None
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)           # a + b G + c G^2
        product = factor if i == 0 else factor @ product
        if i < iterations - 1:
            gram = factor @ (factor @ gram)
    x = product @ x
    return x if m.shape[1] <= m.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024; arXiv 2502.16982) for parameter groups with `muon=True`, AdamW for the others.

    A hidden weight moves by its orthogonalised momentum, so that all directions in which it can act learn at one speed, not only the few that
    dominate the gradient. Convolutions are matrices [out, in * k * k]. With the factor 0.2 sqrt(max(out, in)) an update is
    as large as AdamW's usually are, whose learning rate and weight decay therefore carry over.
    """
    momentum = 0.95                                       # Nesterov's

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["muon"]:
                continue
            alike = {}                                    # shape of the matrix: weights of that shape, one batch
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), weights in alike.items():
                update = orthogonalised(torch.stack([self.ahead(p).flatten(1) for p in weights]))               # [N, rows, columns]
                for p, u in zip(weights, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.view_as(p), alpha=-0.2 * group["lr"] * math.sqrt(max(rows, columns)))
                    p.grad = None                         # AdamW passes over what has no gradient
        super().step()

    def ahead(self, p):
        """Take the gradient of p into its momentum; the gradient that Nesterov's momentum looks ahead to."""
        state = self.state[p]
        if not state:
            state |= dict(momentum=torch.zeros_like(p), step=torch.tensor(0.0))           # AdamW expects a step in every state that it loads
        state["momentum"].mul_(self.momentum).add_(p.grad)
        return p.grad.add(state["momentum"], alpha=self.momentum)


def build_optimizer(cfg, net, beside=()):
    """The optimizer of a network and of parameters beside it. Norms, biases and embeddings of all kinds keep clear of Muon and, the embeddings apart, of weight decay."""
    hidden = hidden_weights(net) if cfg.optimizer == "muon" else []
    others = [p for p in [*net.parameters(), *beside] if not any(p is h for h in hidden)]
    groups = [dict(params=[p for p in others if p.dim() > 1], weight_decay=cfg.weight_decay), dict(params=[p for p in others if p.dim() <= 1], weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    return Muon([dict(params=hidden, weight_decay=cfg.weight_decay, muon=True), *(g | dict(muon=False) for g in groups)], lr=cfg.lr)


class Meter:
    """What happened since the last line of metrics.jsonl: loss by tenth of t, gradient norm, time. Sums stay on the device."""

    def __init__(self, device, seen):
        self.bins = torch.zeros(2, 10, device=device, dtype=torch.float64)       # sum of losses and number of images
        self.norms, self.updates = torch.zeros((), device=device), 0
        self.clock, self.since, self.waited = time.time(), seen, 0.0

    def add(self, t, loss):
        slot = (t * 10).long().clamp(0, 9)
        self.bins[0].index_add_(0, slot, loss.detach().double())
        self.bins[1].index_add_(0, slot, torch.ones_like(loss, dtype=torch.float64))

    def sums(self):
        """(losses by tenth, images by tenth) over all processes."""
        every = self.bins.clone()
        if dist.is_initialized():
            dist.all_reduce(every)
        return every.tolist()

    def healthy(self, fp16):
        """Whether all losses so far were finite (and gradients, where no scaler skips those that are not)."""
        return all(map(math.isfinite, self.sums()[0])) and (fp16 or math.isfinite(float(self.norms)))

    def line(self, seen, lr):
        total, count = self.sums()
        seconds, images = time.time() - self.clock, seen - self.since
        return dict(images=seen, loss=sum(total) / max(sum(count), 1), loss_by_t=[round(a / b, 5) if b else None for a, b in zip(total, count)],
                    grad_norm=float(self.norms) / max(self.updates, 1), lr=lr, seconds=round(seconds, 3), images_per_second=round(images / seconds, 1),
                    waiting=round(self.waited / seconds, 4), memory_mb=round(torch.cuda.max_memory_allocated() / 2 ** 20) if torch.cuda.is_available() else None)


def fit(run, cfg, net, folder, data, state, condition=None, grid=None, side=None, columns=8):
    """The training loop of both training stages; returns the finished checkpoint state.

    net        raw module on the device, freshly initialised; a checkpoint in `folder` takes precedence (resume)
    data       Split to train on
    state      what the checkpoint carries besides weights: kind, model, size, channels, conditions, num_labels, path, predict, data, config, ...
    condition  (rows [b], uniforms [b, 3] of time, flip and condition) -> dict of conditions for the network, or None
    grid       dict of conditions for the images of the sample grid (fixed noise, averaged weights; `columns` per row), or None
    side       a module trained and averaged beside the network, or None. `side.step` gives a loss of its own and the condition, `side.report` joins the log
    """
    path, share, folder, latent = PATHS[cfg.path], cfg.batch // run.world, Path(folder), data.latents is not None
    micro = micro_batch(run, cfg)
    context, kind, why = autocast(run, cfg.precision)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.run_block = again if cfg.recompute else plainly
    parts, weights, averages = dict(net=net, ema=ema), list(net.parameters()), list(ema.parameters())
    beside, looks = list(side.parameters()) if side else [], side.noises if side else 0
    if side:
        side_ema = copy.deepcopy(side, {id(side.inputs): side.inputs}).eval().requires_grad_(False)          # not the images
        parts |= dict(side=side, side_ema=side_ema)
    opt = build_optimizer(cfg, net, beside)
    scaler = torch.amp.GradScaler(run.device.type, enabled=kind == torch.float16)
    parts |= dict(optimizer=opt, scaler=scaler)

    # resume: the same command again
    seen = resume(run, cfg, folder, state, parts)
    for p, s in opt.state.items():                        # moments come back in the memory layout of the run that wrote them, which may have been compiled
        s |= {k: torch.empty_like(p).copy_(v) for k, v in s.items() if v.shape == p.shape}
    if seen >= cfg.images:
        run.say(f"{folder}: done already ({seen:,} images seen)")
        return load_checkpoint(run, str(folder))
    run.say(f"{'resuming at' if seen else 'starting, at'} {seen:,} of {cfg.images:,} images; {len(data):,} training images; "
            f"{sum(p.numel() for p in weights) / 1e6:.2f} M parameters; batch {cfg.batch} = {run.world} process(es) x {share // micro} x {micro}; {why}")
    board = None
    if cfg.tensorboard and run.rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard=true needs the package tensorboard (pip install tensorboard)") from None
        board = SummaryWriter(folder, purge_step=seen)
    model = net
    if run.world > 1:
        model = nn.parallel.DistributedDataParallel(net, device_ids=[run.device.index] if run.device.type == "cuda" else None,
                                                    gradient_as_bucket_view=True)         # else every gradient is held twice
    if cfg.compile:                                       # around DDP: one graph for each of its buckets, so that late gradients travel while early ones are computed
        torch._dynamo.config.optimize_ddp = not cfg.recompute                    # PyTorch 2.6 cannot split blocks that run again: one graph
        model = torch.compile(model)
    net.train()
    open_autoencoder(run)                                 # for the sample grids
    crossed = lambda every: seen // every > (seen - cfg.batch) // every or seen >= cfg.images
    meter, batches = Meter(run.device, seen), feed(run, cfg, data.inputs, seen, side.uniforms if side else 0, looks + latent)
    with bar(run, cfg.images, f"{run.stage} {cfg.name}") as progress:
        progress.update(seen)
        while seen < cfg.images:
            # a batch: images, noise, times, conditions
            tick = time.time()
            rows, x, z, u = next(batches)
            meter.waited += time.time() - tick
            x = as_input(x, u[:, 1] < 0.5 if cfg.flip else None, z[:, -1] if latent else None)                   # [b, C, H, W]; the last noise draws the latent
            t = u[:, 0] if cfg.times == "uniform" else torch.special.ndtri(u[:, 0].clamp(1e-6, 1 - 1e-6)).sigmoid()
            if state["model"]["dropout"]:                                        # masks come from the global generator: a function of (seed, rank, images seen)
                torch.manual_seed(seed_of(cfg.seed, f"dropout {run.rank}", seen))
            if side:                                                             # its backward comes before that of DDP, which then averages the sum
                loss, cond = side.step(net, ema, side_ema, rows, x, z[:, 1:1 + looks], u, seen, context)
                scaler.scale(loss).backward()
            else:
                cond = condition(rows, u) if condition else {}
            z = z[:, 0]                                   # the first is that of the path

            # one update
            lr = cfg.lr * min(1.0, (seen + cfg.batch) / max(cfg.warmup, 1))
            for group in opt.param_groups:
                group["lr"] = lr
            for i in range(0, share, micro):
                part = slice(i, i + micro)
                with (nullcontext() if i + micro >= share or run.world == 1 else model.no_sync()), context():
                    loss = loss_per_image(model, path, cfg.predict, x[part], z[part], t[part], cfg.min_snr, **{k: v[part] for k, v in cond.items()})
                    scaler.scale(loss.mean() * micro / share).backward()
                meter.add(t[part], loss)
            for p in beside if run.world > 1 else ():                            # DDP knows the network only
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= run.world
            scaler.unscale_(opt)
            norm = nn.utils.clip_grad_norm_(weights, cfg.clip or math.inf)
            meter.norms += norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else norm           # updates that the scaler skips do not count
            meter.updates += 1
            if beside:
                nn.utils.clip_grad_norm_(beside, cfg.clip or math.inf)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)
            seen += cfg.batch
            beta = 0.5 ** (cfg.batch / max(min(cfg.ema, cfg.ema_ramp * seen), 1e-9))
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - beta)
                if side:
                    side.after(side_ema, 1 - beta)
            progress.update(cfg.batch)

            # what the loop says: one line, a picture, a checkpoint, each at its own interval
            if (crossed(cfg.log_every) or crossed(cfg.save_every)) and not meter.healthy(scaler.is_enabled()):
                raise UserError(f"{folder}: the loss is not finite after {seen:,} images; the last checkpoint is kept. Lower lr, or use precision=fp32 or bf16")
            if crossed(cfg.log_every):
                line = meter.line(seen, lr) | (dict(scale=scaler.get_scale()) if scaler.is_enabled() else {}) | (side.report(ema, side_ema, seen, context) if side else {})
                meter = Meter(run.device, seen)
                if run.rank == 0:
                    with open(folder / "metrics.jsonl", "a") as f:
                        f.write(json.dumps(line) + "\n")
                for key, value in line.items() if board else ():
                    if isinstance(value, (int, float)):
                        board.add_scalar(key, value, seen)
                progress.set_postfix(loss=f"{line['loss']:.4f}")
                if progress.disable:
                    run.say(f"{seen:>12,} images  loss {line['loss']:.4f}  {line['images_per_second']:.0f} images/s{side.words(line) if side else ''}")
            if crossed(cfg.save_every):
                dicts = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(run, folder, state | dict(format=FORMAT, seen=seen, weights=weights_hash(dicts["ema"])) | dicts)
            if crossed(cfg.grid_every):
                if run.rank == 0:
                    shown = side.grid(ema, side_ema, context) if side else grid or {}
                    noise = draw(cfg.seed, "grid", range(len(next(iter(shown.values()))) if shown else 64), row_shape(data.inputs)).to(run.device)
                    with context():                       # no more at once than in training
                        drawn = torch.cat([preview(ema, path, cfg.predict, noise[i:i + micro], **{k: v[i:i + micro] for k, v in shown.items()})
                                              for i in range(0, len(noise), micro)])
                    pictures = to_uint8(decode(run.vae, drawn)).cpu().numpy()
                    save_grid(folder / "samples" / f"{seen:010d}.png", pictures, columns, head=f"{run.stage} {cfg.name}: {seen:,} images, averaged weights")
                run.wait()
    batches.close()
    if board:
        board.close()
    return load_checkpoint(run, str(folder))


def main():
    """Train without labels, from the command line."""
    run = start("train_diffusion", TrainDiffusion, __doc__, flags={"--prepare": "only turn the source into data/ (and latents)"})
    cfg = run.cfg
    if "--prepare" in run.flags:                          # the data alone: for runs that start from published weights
        return run.say(f"would prepare the images in {run.dir / 'data'}") if run.dry_run else prepare_data(run)
    check_training(run, cfg)
    channels, size = input_shape(run)
    net = build_model(run.model, size, channels, seed=cfg.seed)
    folder = run.dir / "diffusion" / cfg.name
    if run.dry_run:
        return announce(run, cfg, net, folder)

    # data: any source becomes arrays, row i is image i from here on
    prepare_data(run)
    data = load_data(run, "train")

    # train; the checkpoint alone rebuilds the model
    state = dict(kind="diffusion", model=dataclasses.asdict(run.model), size=size, channels=channels, conditions={}, num_labels=0, path=cfg.path,
                 predict=cfg.predict, data=data.info["fingerprint"], config={k: run.sections[k] for k in ("data", "model", run.stage)})
    fit(run, cfg, placed(net, run.device, cfg.compile), folder, data, state)

    # close
    run.say(f"model in {folder}, sample grids in {folder / 'samples'}")
    run.next("probe.py" + ("" if cfg.name == "base" else f" checkpoint=diffusion/{cfg.name}"), "finds the block and time whose features cluster best")


if __name__ == "__main__":
    cli(main)

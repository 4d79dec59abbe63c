"""Everything around the method: settings, run folder, processes, files, random numbers, picture grids. No stage's idea is in here.

A stage calls `start`, which reads `python <stage>.py CONFIG.yaml key=value ...` into dataclasses and returns a `Run`, and ends in `cli(main)`.
"""
import collections
import ctypes
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import sys
import traceback
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from tqdm import tqdm
import yaml


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
    two_objects: float = 0.1                              # shapes: share of images with a second object of the same class
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


SHARED = {"data": Data, "model": Model, "published": Published}                  # sections that every stage reads


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
        self.say("next: python", script, *map(shlex.quote, self.words), *keys, *([f"   # {what}"] if what else []))

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


def wide(t):
    """[B] -> [B, 1, 1, 1]."""
    return t[:, None, None, None]


def weights_hash(state):
    """Short hash of a state dict: what features, labels and samples say they were made with."""
    h = hashlib.sha256()
    for name in sorted(state):
        h.update(name.encode())
        h.update(state[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data if state[name].dim() else str(state[name].item()).encode())
    return h.hexdigest()[:16]


def read_torch(path):
    """What a file written by torch.save holds, on the CPU; anything that is not tensors and plain types is a UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:                                # a truncated or foreign file fails in many ways
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"
        raise UserError(f"{path}: not a readable checkpoint ({why}); it may be truncated or of another program") from None


def autocast(run, precision):
    """(context factory, dtype, the reason in words): bf16 where the hardware multiplies it natively, unless told otherwise."""
    cuda = run.device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    kind = {"auto": torch.bfloat16 if native else torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    why = f"{str(kind).split('.')[1]} ({'asked for' if precision != 'auto' else 'native on this device' if native else 'no native bfloat16 here'})"
    return (lambda: torch.autocast(run.device.type, kind) if kind != torch.float32 else nullcontext()), kind, why

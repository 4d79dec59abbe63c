"""Everything around the method: settings, run folder, processes, files, random numbers, picture grids. No stage's idea
is in here.

A stage calls `start`, which reads `python <stage>.py CONFIG.yaml key=value ...` into dataclasses and returns a `Run`,
and ends in `cli(main)`. What it makes, it makes under names of its own (`atomic`, `making`), so that commands side by
side never harm each other.
"""
import collections
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import typing
import uuid
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

STAGES = ["train_diffusion", "extract_features", "self_label", "train_guided", "sample_ode", "probe"]


class UserError(Exception):
    """Something the user can put right: reported as one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass per section of the YAML; what a key means and may be stands beside it

def key(default, text, low=None, high=None, above=None, count=None):
    """A setting: its default, its line of --help, and what numbers it may be (low ... high, or above; in a list each;
    count: how many)."""
    meta = dict(text=text, low=low, high=high, above=above, count=count)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class Data:
    """Section `data`: where images come from."""
    source: str = key("shapes", "shapes, folder, arrays, or a torchvision set: CIFAR10, FashionMNIST, STL10, ...")
    root: str = key("", "folder (torchvision, folder) or .npz/.npy file (arrays) that holds the images")
    download: bool = key(False, "let torchvision download what is not under root")
    size: int = key(32, "images become size x size: centre crop, then resize", low=4)
    latents: str = key("", "encode once by this diffusers AutoencoderKL (folder or Hugging Face id); empty = pixels")
    train: int = key(0, "keep the first so many training images; 0 = all (shapes: 20,000)", low=0)
    classes: list[str] = key([], "keep these classes only, by name (ImageNet: synset such as n01440764)")
    test: int = key(0, "images to keep for testing; 0 = all (shapes: 5,000)", low=0)
    test_fraction: float = key(0.1, "folder and arrays without a test part: this share is held out", above=0, high=0.9)
    imbalance: float = key(1.0, "> 1: long tail; the first class keeps so many times as many images as the last", low=1)
    skip_bad: bool = key(False, "skip unreadable images, listing them in info.json; false = stop")
    two_objects: float = key(0.1, "shapes: share of images with a second object of the same class", low=0, high=1)
    seed: int = key(0, "shapes: which images are drawn; folder, arrays: which are held out")


@dataclass
class Model:
    """Section `model`: the network."""
    backbone: Literal["unet", "uvit"] = key("unet", "ADM U-Net, or U-ViT")
    channels: int = key(128, "base channels of the U-Net, token width of the U-ViT", low=8)
    mult: list[float] = key([1, 2, 2], "unet: channel multiple per resolution level", above=0)
    blocks: int = key(2, "unet: residual blocks per level", low=1)
    attention: list[int] = key([8], "unet: map sizes (in positions per side) that get self-attention", low=1)
    head_channels: int = key(64, "unet: channels per attention head; 0 = `heads` heads at every level", low=0)
    dropout: float = key(0.0, "unet: dropout inside residual blocks", low=0, high=0.9)
    stem: int = key(1, "unet: space-to-depth factor at the input; 2 makes small models four times cheaper", low=1)
    patch: int = key(2, "uvit: patch size", low=1)
    depth: int = key(12, "uvit: blocks besides the middle one (half before, half after)", low=2)
    heads: int = key(8, "uvit: attention heads; unet: where head_channels=0", low=1)
    final_conv: bool = key(True, "uvit: 3x3 convolution after the last layer (published: all but the H models)")
    clock: list[float] = key([0, 1000], "a, b: the network is told the time as a + b t", count=2)


SHARED = {"data": Data, "model": Model}                   # sections that every stage reads


def convert(name, kind, value):
    """`value` (from YAML or the command line) as the type `kind`; 200k and 50M are accepted for whole numbers."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if value is None and (origin is list or "" in args):  # key= on the command line empties it
        return [] if origin is list else ""
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{name}={value}: must be one of {', '.join(map(str, args))}")
    if origin is list:
        items = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        return [convert(name, args[0], v) for v in items]
    if kind is int and isinstance(value, str) and (m := re.fullmatch(r"(\d+(?:\.\d+)?)([kM])", value)):
        value = float(m[1]) * {"k": 1_000, "M": 1_000_000}[m[2]]
    try:
        if isinstance(value, bool) != (kind is bool) or kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value) if kind is int else "" if value is None else value)
    except (TypeError, ValueError, OverflowError):
        hint = {int: " (200k and 50M are fine)", str: " (a name such as yes or no: quote it)"}.get(kind, "")
        raise UserError(f"{name}={value!r}: expected {kind.__name__}{hint}") from None


def check(name, field, value):
    """A UserError unless a converted value is what its field allows."""
    m, values = field.metadata, value if isinstance(value, list) else [value]
    if m.get("count") and len(values) != m["count"]:
        raise UserError(f"{name}={value}: expected {m['count']} values")
    for v in values:
        if not isinstance(v, (int, float)) or isinstance(v, bool):
            continue
        low, high, above = m.get("low"), m.get("high"), m.get("above")
        wrong = [f"at least {low:g}"] if low is not None and not v >= low else []
        wrong += [f"above {above:g}"] if above is not None and not v > above else []
        wrong += [f"at most {high:g}"] if high is not None and not v <= high else []
        wrong += [] if math.isfinite(v) and abs(v) < 2 ** 53 else ["a finite number"]
        if wrong:
            raise UserError(f"{name}={v:g}: must be {' and '.join(wrong)}")


def unknown(name, known):
    """The end of a complaint about a name: what it may have meant."""
    near = difflib.get_close_matches(str(name), known, 1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; known: {', '.join(known)}"


def require(ok, cfg, keys, what):
    """A UserError that shows these keys of a section, and says what they must be, unless ok."""
    if not ok:
        raise UserError(", ".join(f"{k}={getattr(cfg, k)}" for k in keys.split()) + f": {what}")


def fill(section, cls, values):
    """A dataclass from a plain dict; an unknown key, a wrong type or a value out of range is a UserError that names it.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{section}.{name}: {unknown(name, list(known))}")
    kinds, out = typing.get_type_hints(cls), {}
    for name, value in values.items():
        out[name] = convert(f"{section}.{name}", kinds[name], value)
        check(f"{section}.{name}", known[name], out[name])
    return cls(**out)


def print_help(doc, known, stage, flags):
    """What --help says: the script's docstring and every key with its default, meaning and choices."""
    print(doc)
    for section, cls in known.items():
        print(f"{section}: {'key=value' if section == stage else section + '.key=value'}")
        for f in dataclasses.fields(cls):
            default = f.default if f.default is not dataclasses.MISSING else ",".join(map(str, f.default_factory()))
            choices = f"  [{' | '.join(typing.get_args(f.type))}]" if typing.get_origin(f.type) is Literal else ""
            print(f"  {f.name + '=' + str(default):32} {f.metadata['text']}{choices}")
    print("other:")
    others = {"run=DIR": "default runs/<name of the YAML>", "--dry-run": "configuration and what would be done"}
    for name, text in (others | flags).items():
        print(f"  {name:32} {text}")


def read_yaml(path):
    """The sections of a YAML file as plain dicts; all that is wrong with it is a UserError that names it."""
    try:
        sections = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:                    # impossible dates are ValueErrors
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(sections, dict) or not all(isinstance(v or {}, dict) for v in sections.values()):
        raise UserError(f"{path}: expected sections (data:, model:, ...), each with keys")
    return {k: dict(v or {}) for k, v in sections.items()}


def read_words(stage, words, known, flags):
    """(YAML file, sections with what the command line overrides, run folder, --flags) of a command line."""
    given = {w for w in words if w.startswith("--")}
    for w in given - {"--dry-run", *flags}:
        raise UserError(f"{w}: {unknown(w, ['--help', '--dry-run', *flags])}")
    files = [w for w in words if "=" not in w and w not in given]
    if len(files) != 1:
        raise UserError(f"expected exactly one YAML file, got {files or 'none'}; see --help")
    sections, folder = read_yaml(files[0]), Path("runs") / Path(files[0]).stem
    for word in (w for w in words if "=" in w and w not in given):
        name, value = word.split("=", 1)
        if name == "run":
            if not value:
                raise UserError("run=: name a folder")
            folder = Path(value).expanduser()
            continue
        section, _, name = name.rpartition(".")
        section = section or stage
        kinds = {f.name: f.type for f in dataclasses.fields(known[section])} if section in known else {}
        if kinds.get(name) not in (str, list[str]):       # name=no is a name, not false
            with suppress(yaml.YAMLError, ValueError, RecursionError):
                value = yaml.safe_load(value)
        sections.setdefault(section, {})[name] = value
    for name in sections:
        if name not in (*SHARED, *STAGES):
            raise UserError(f"section {name}: {unknown(name, [*SHARED, *STAGES])}")
    return files[0], sections, folder, given


def check_name(name, value, parts=1):
    """A UserError unless the value names something inside the run: up to so many parts of letters, digits and . _ + -,
    joined by /."""
    if not re.fullmatch(rf"\w[\w.+-]*(/\w[\w.+-]*){{0,{parts - 1}}}", value):
        raise UserError(f"{name}={value}: must be a name of letters, digits, and . _ + -")


# ---------------------------------------------------------------------------------------------------------------------
# A stage's run: folder, configuration, processes

class Processes:
    """This process among those that torchrun started. Alone: rank 0 of 1, and nothing is ever exchanged."""
    rank, world, patient = 0, 1, None  # patient: a group that waits for hours, as for a large set to be prepared

    def share(self, n):
        """Those of n rows that are this process's."""
        return np.arange(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def wait(self):
        """Let all processes meet."""
        if self.world > 1:
            dist.barrier(self.patient)

    def gather(self, value):
        """Every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        every = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    def total(self, x):
        """The sum of a tensor over processes, in place; returns it."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def agreed(self, look):
        """What look() gives on the first process, on all of them; so too its UserError. Files may change between two
        looks."""
        box = [None]
        if self.rank == 0:
            try:
                box = [look()]
            except UserError as e:                        # a complaint of all, so that nobody waits
                box = [e]
        if self.world > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def turns(self):
        """Yield True once, when this process should open what may have to be downloaded: first one, then one a machine,
        then all."""
        mine = 0 if self.rank == 0 else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
        for turn in range(3):
            yield turn == mine
            self.wait()


ALONE = Processes()


@dataclass
class Run(Processes):
    """What a stage knows about its run."""
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
    patient: typing.Any = None
    vae: typing.Any = None  # the autoencoder of data.latents, once `open_autoencoder` was called

    def say(self, *words):
        """Print from the first process only."""
        if self.rank == 0:
            print(*words, flush=True)

    def next(self, stage, what=""):
        """Say which command comes next, with this run's YAML, folder and overrides."""
        script, *keys = stage.split()
        words = map(shlex.quote, [*self.words, *keys])
        self.say("next: python", script, *words, *([f"   # {what}"] if what else []))


def start(stage, cls, doc, flags={}):
    """Read the command line and YAML of a stage, set up its processes, and return the `Run`.

    Called as `python <stage>.py config.yaml [key=value ...] [section.key=value ...] [run=DIR] [--dry-run] [--help]`.
    """
    words, known = sys.argv[1:], {stage: cls, **SHARED}
    if "--help" in words or "-h" in words or not words:
        print_help(doc, known, stage, flags)
        raise SystemExit(0 if words else 2)
    file, sections, folder, given = read_words(stage, words, known, flags)
    own = {name: fill(name, c, sections.get(name, {})) for name, c in known.items()}
    sections |= {name: dataclasses.asdict(c) for name, c in own.items()}
    if own[stage].name or cls().name:                     # names a folder that finished work replaces: inside the run
        check_name(f"{stage}.name", own[stage].name)
    dry = "--dry-run" in given
    rank, world, device = start_processes(stage, own[stage], dry)
    shared = [w for w in words if w.split("=")[0] == "run" or w.split(".")[0] in (*SHARED, *STAGES) and "=" in w]
    run = Run(stage, folder, own[stage], own["data"], own["model"], sections, dry, given,
              rank, world, device, words=(file, *shared))
    if world > 1:
        run.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=24))
    if dry:
        run.say(yaml.safe_dump({k: sections[k] for k in ("data", "model", stage)}, sort_keys=False))
    else:
        check_run_folder(run)
    return run


def start_processes(stage, cfg, dry):
    """(rank, number of processes, device), as torchrun set them; a dry run knows one process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not by torchrun, which starts several processes")
    rank, world, local = (0, 1, 0) if dry else (int(os.environ.get(k, v)) for k, v in zip(names, (0, 1, 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    reuse_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu_flags(stage in ("train_diffusion", "train_guided"), exact=getattr(cfg, "optimizer", "") == "muon")
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return rank, world, device


def reuse_memory():
    """Let the C library keep what was freed: every training step asks for the same sizes again, and fresh pages cost
    CPUs a fifth of it."""
    with suppress(AttributeError, OSError, TypeError):    # glibc alone has this
        mallopt = ctypes.CDLL(None).mallopt
        # mmap and trim threshold, top pad: in bytes
        for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):
            mallopt(option, value)


def gpu_flags(training, exact=False):
    """PyTorch's settings for GPUs: short float32 products (TF32) in training only; convolutions by the fastest kernel
    tried.

    exact: no short matrix products, which Muon's orthogonalisation does not survive. In bf16 and fp16 nothing else
    multiplies float32.
    """
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = training and not exact, training
    torch.backends.cudnn.benchmark = True


def check_run_folder(run):
    """Write config.yaml on first use; afterwards the data section must stay what it was, since every file's row i is
    image i."""
    path = run.dir / "config.yaml"
    there = run.agreed((run.dir / "data" / "train" / "info.json").exists)
    if there:
        with reading(path, "restore it or use another run=DIR"):
            before = fill("data", Data, read_yaml(path).get("data", {}))
        for name, value in dataclasses.asdict(run.data).items():
            if getattr(before, name) != value and name not in ("root", "download", "skip_bad"):
                raise UserError(f"{path}: this run was made with data.{name}={getattr(before, name)}, "
                                f"now data.{name}={value}; use another run=DIR")
    elif run.stage != "train_diffusion" and getattr(run.cfg, "evaluate", True):  # sampling alone needs no images
        alone = ", or only sample with evaluate=false" if run.stage == "sample_ode" else ""
        raise UserError(f"{run.dir}: no such run; start with train_diffusion.py{alone}")
    run.wait()
    if run.rank == 0 and run.stage == "train_diffusion":
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
    except BrokenPipeError:                               # | head
        code = 1
        sys.stdout = open(os.devnull, "w")
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
        print("interrupted; the same command again goes on from what was saved", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)  # the other ranks may sit in a collective that will never complete
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Files

@contextmanager
def atomic(path):
    """Open `path` for binary writing under a name of one's own; on success flush, sync and rename. A kill leaves the
    old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
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


@contextmanager
def locked(run, *names):
    """Within this context no other command makes the same thing in this run: dir/.locks/<names>, held by the first
    process while it lives."""
    path, file = run.dir / ".locks" / "-".join(names), None

    def take():
        nonlocal file
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        for tries in range(30):                           # a killed predecessor may take a moment to be gone
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise UserError(f"{run.dir / '/'.join(names)}: another command is making it right now; "
                        "wait for it, or choose another name")
    run.agreed(take)
    try:
        yield
    finally:
        if file:
            file.close()


@contextmanager
def making(run, kind, name, proof):
    """A new folder in which all processes build <run>/<kind>/<name>, and which takes its place in the end; refused
    while another does so.

    proof: the file, written last, by which our results are known; a folder without it was made by others and is left
    alone.
    """
    target = run.dir / kind / name
    with locked(run, kind, name):
        if target.exists() and not (target / proof).exists() and any(target.iterdir()):
            raise UserError(f"{target}: has no {proof}, so it is not ours to replace; "
                            "move it away or choose another name=")
        aside = run.agreed(lambda: target.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp"))
        if run.rank == 0:
            for stale in target.parent.glob(f".{name}.*.tmp"):                   # of commands that were killed
                shutil.rmtree(stale, ignore_errors=True)
            aside.mkdir(parents=True)
        run.wait()
        try:
            yield aside
            run.wait()
            if run.rank == 0:
                old = aside.with_suffix(".old")
                if target.exists():
                    os.rename(target, old)
                os.rename(aside, target)
                shutil.rmtree(old, ignore_errors=True)
            run.wait()
        finally:
            if run.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def reading(path, hint):
    """Whatever goes wrong while a file of ours is taken apart is one line that names it and ends in `hint`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: not there; {hint}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
            zipfile.BadZipFile, zlib.error) as e:
        text = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        raise UserError(f"{path}: damaged, or not what this program writes ({text}); {hint}") from None


def write_json(path, value):
    """`value` as indented JSON, atomically; numbers that are not finite become null."""
    def finite(v):
        if isinstance(v, dict):
            return {k: finite(u) for k, u in v.items()}
        if isinstance(v, (list, tuple)):
            return [finite(u) for u in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    with atomic(path) as f:
        f.write((json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path, hint):
    """The dict in the JSON file at `path`; a missing or broken one is a UserError that ends in `hint`."""
    with reading(path, hint):
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise TypeError("not a dict")
    return value


def create_rows(path, dtype, shape):
    """A .npy file of zeros whose rows `write_rows` fills, perhaps from several machines."""
    with open(path, "wb") as f:
        header = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=tuple(shape))
        np.lib.format.write_array_header_1_0(f, header)
        f.truncate(f.tell() + np.dtype(dtype).itemsize * math.prod(shape))


def write_rows(path, first, rows):
    """Put rows into a .npy file at row `first`. Plain writes: with memory maps, machines that share a page on a network
    disk lose rows."""
    try:
        with open(path, "r+b") as f:
            np.lib.format.read_magic(f)
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            f.seek(first * dtype.itemsize * math.prod(shape[1:]), os.SEEK_CUR)
            f.write(np.ascontiguousarray(rows, dtype).tobytes())
    except OSError as e:                                  # a full disk, most of all: say which file it was
        raise UserError(f"{path}: could not be written ({e.strerror or e})") from None


def finished(run, path, recipe, files=()):
    """Whether the result described by the JSON file `path` is there, with its files, and was made by `recipe`.

    A result of another recipe is a UserError that names what differs, unless overwrite=true.
    """
    if not path.exists():
        return False
    there = read_json(path, "delete it")
    there = there.get("recipe", there)
    other = [f"{k}={there.get(k)}, now {v}" if len(str(v)) < 40 else k for k, v in recipe.items() if there.get(k) != v]
    if other and not run.cfg.overwrite:
        raise UserError(f"{path}: was made with {'; '.join(other[:3])}. Choose another name=, or overwrite=true")
    gone = [file for file in files if not file.exists()]
    if gone and not other:
        run.say(f"{gone[0]} is gone: made again")
    elif not other:
        run.say(f"{path.parent}/{path.stem}: done already")
    return not other and not gone


def read_torch(path):
    """What a file written by torch.save holds, on the CPU; anything that is not tensors and plain types is a UserError.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:                                # a truncated or foreign file fails in many ways
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"
        raise UserError(f"{path}: not a readable checkpoint ({why}); truncated, or of another program?") from None


def digest(*parts):
    """Short hash of strings, numbers, lists, dicts and arrays: names a recipe or a set of weights."""
    h = hashlib.sha256()
    for p in parts:
        array = isinstance(p, np.ndarray)
        h.update(np.ascontiguousarray(p).tobytes() if array else json.dumps(p, sort_keys=True).encode())
    return h.hexdigest()[:16]


def weights_hash(state):
    """Short hash of a state dict: what features, labels and samples say they were made with."""
    h = hashlib.sha256()
    for name in sorted(state):
        v = state[name].detach().cpu()
        h.update(name.encode())
        h.update(v.reshape(-1).contiguous().view(torch.uint8).numpy().data if v.dim() else str(v.item()).encode())
    return h.hexdigest()[:16]


def bar(run, total, what, unit="img"):
    """Progress on the first process, if somebody is watching."""
    hidden = run.rank != 0 or not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=hidden, leave=False)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers, precision, pictures

def seed_of(seed, purpose, index=0):
    """A 32-bit seed that is a function of (seed, purpose, index) and different for every index of one purpose (mt19937
    takes 32 bits)."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "little")
    h = (base + index) & 0xFFFFFFFF
    # each step is a bijection of the 32-bit numbers
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
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
    """Yield f(item) for every item, computed in order in a thread, up to `depth` of them while the caller is busy with
    an earlier one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(f, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def autocast(run, precision):
    """(context factory, dtype, the reason in words): bf16 where the hardware multiplies it natively, unless told
    otherwise."""
    cuda, kinds = run.device.type == "cuda", dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    if cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:                                                 # PyTorch has no public function that tells
        flags = Path("/proc/cpuinfo")
        native = flags.exists() and "avx512_bf16" in flags.read_text()
    kind = kinds.get(precision) or (torch.bfloat16 if native else torch.float32)
    why = "asked for" if precision != "auto" else "native on this device" if native else "no native bfloat16 here"
    context = (lambda: torch.autocast(run.device.type, kind)) if kind != torch.float32 else nullcontext
    return context, kind, f"{str(kind).split('.')[1]} ({why})"


def wide(t):
    """[B] -> [B, 1, 1, 1]."""
    return t[:, None, None, None]


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

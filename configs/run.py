"""Everything around the method: settings, run folder, processes, files, random numbers, picture grids. No stage's idea
is in here.

A stage calls `start`, which reads `python <stage>.py CONFIG.yaml key=value ...` into dataclasses and returns a `Run`,
and ends in `cli(main)`. Commands side by side never harm each other: see `atomic`, `locked`, `making`.
"""
import collections
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import hashlib
import inspect
import json
import math
import operator
import os
import re
import shlex
import shutil
import sys
import time
import typing
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
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
    """A setting: default, line of --help, limits of its number(s), and how many a list must have."""
    meta = dict(text=text, low=low, high=high, above=above, count=count)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class Data:
    """Section `data`: where images come from."""
    source: str = key("shapes", "shapes, folder, arrays, or a torchvision set: CIFAR10, FashionMNIST, STL10, ...")
    root: str = key("", "folder (torchvision, folder) or .npz/.npy file (arrays) that holds the images")
    download: bool = key(False, "let torchvision download what is not under root")
    size: int = key(32, "images become size x size: centre crop, then resize", low=4)
    latents: str = key("", "encode once by this diffusers AutoencoderKL (folder or Hugging Face id); empty = pixels")
    train: int = key(0, "keep the first so many training images (of these classes); 0 = all (shapes: 20,000)", low=0)
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
UNITS = {"k": "e3", "M": "e6"}                             # as text: 2.01 * 1000 is no whole number
LIMITS = {"low": (operator.ge, "at least"), "above": (operator.gt, "above"), "high": (operator.le, "at most")}


def convert(kind, value):
    """`value` (from YAML or the command line) as the type `kind`; a ValueError or KeyError if it is none."""
    args, text = typing.get_args(kind), "" if value is None else str(value).strip()
    if typing.get_origin(kind) is list:
        nested = typing.get_origin(args[0]) is list       # [[1,2],[3,4]]
        if not isinstance(value, list):
            inside = text[1:-1] if text[:1] + text[-1:] == "[]" else text        # a glob may have one of both
            value = (yaml.safe_load(text) or []) if nested else inside.split(",")
        return [convert(args[0], v) for v in value if v != ""]
    if args:
        return args[args.index(text)]
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    unit = UNITS.get(text[-1:], "")
    number = float(text[:-1] + unit if unit else text)
    if not math.isfinite(number) or kind is int and not number.is_integer():
        raise ValueError
    return kind(number)


def fill(section, cls, values):
    """A dataclass from a plain dict, or a UserError that names what is unknown, of a wrong type or out of range."""
    fields, out = {f.name: f for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        said = f"{section}.{name}={value}"
        if name not in fields:
            raise UserError(f"{said}: {unknown(name, list(fields))}")
        kind, meta = fields[name].type, fields[name].metadata
        try:
            out[name] = convert(kind, value)
        except (ValueError, KeyError, TypeError, yaml.YAMLError):
            choices = " (true or false)" if kind is bool else ""
            raise UserError(f"{said}: expected {inspect.formatannotation(kind)}{choices}") from None
        numbers = out[name] if isinstance(out[name], list) else [out[name]]
        if meta["count"] not in (None, len(numbers)):
            raise UserError(f"{said}: expected {meta['count']} values")
        for limit, (holds, words) in LIMITS.items():
            if meta[limit] is not None and not all(holds(v, meta[limit]) for v in numbers):
                raise UserError(f"{said}: must be {words} {meta[limit]:g}")
    return cls(**out)


def unknown(name, known):
    """The end of a complaint about a name: what it may have meant."""
    near = difflib.get_close_matches(str(name), known, 1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; known: {', '.join(known)}"


def require(ok, cfg, keys, what):
    """A UserError that shows these keys of a section, and says what they must be, unless ok."""
    section = {Data: "data.", Model: "model."}.get(type(cfg), "")
    if not ok:
        raise UserError(", ".join(f"{section}{k}={getattr(cfg, k)}" for k in keys.split()) + f": {what}")


def check_name(name, value, parts=1):
    """A UserError unless the value names something inside the run, in up to so many parts joined by /."""
    if not re.fullmatch(rf"\w[\w.+-]*(/\w[\w.+-]*){{0,{parts - 1}}}", value):
        raise UserError(f"{name}={value}: must be a name of letters, digits, and . _ + -")


def print_help(doc, known, stage, flags):
    """What --help says: the script's docstring and every key with its default, meaning and type."""
    print(doc)
    for section, cls in known.items():
        print(f"{section}: {'key=value' if section == stage else section + '.key=value'}")
        for f in dataclasses.fields(cls):
            default = f"{f.name}={getattr(cls(), f.name)}"
            print(f"  {default:32} {f.metadata['text']}  ({inspect.formatannotation(f.type)})")
    others = {"run=DIR": "default runs/<name of the YAML>", "--dry-run": "configuration and what would be done"}
    for name, text in (others | flags).items():
        print(f"{name:34} {text}")


class Loader(yaml.BaseLoader):
    """YAML as texts, lists and dicts: YAML itself would turn 010, 1:30 and yes into other values."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        most = max(keys, key=keys.count, default="")
        if keys.count(most) > 1:                          # YAML would take the last one
            raise ValueError(f"{most}: is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The sections of a YAML file as dicts of texts and lists, for `convert`: as words of the command line are."""
    with reading(path, "expected YAML of sections (data:, model:, ...), each with keys"):
        sections = yaml.load(Path(path).read_text(), Loader) or {}
        return {name: dict(keys or {}) for name, keys in sections.items()}


def read_words(words, stage):
    """(sections of the YAML file, overridden by words; run folder; the file and the words that later stages need)."""
    files = [w for w in words if "=" not in w and not w.startswith("--")]
    if len(files) != 1:
        raise UserError(f"expected exactly one YAML file, got {files or 'none'}; see --help")
    sections, folder, shared = read_yaml(files[0]), Path("runs") / Path(files[0]).stem, list(files)
    for word in words:
        where, equals, value = word.partition("=")
        section, _, name = where.rpartition(".")
        if where == "run" and value:
            folder = Path(value).expanduser()
        elif equals:
            sections.setdefault(section or stage, {})[name] = value
        if equals and (section or where == "run"):
            shared.append(word)
    for name in sections:
        if name not in (*SHARED, *STAGES):
            raise UserError(f"section {name}: {unknown(name, [*SHARED, *STAGES])}")
    return sections, folder, shared


# ---------------------------------------------------------------------------------------------------------------------
# A stage's run: folder, configuration, processes

class Processes:
    """This process among those that torchrun started. Alone: rank 0 of 1, and nothing is ever exchanged."""
    rank, world = 0, 1

    def share(self, n):
        """Those of n rows that are this process's."""
        return np.arange(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def wait(self):
        """Let all processes meet."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value):
        """Every process's value, in order of rank."""
        every = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(every, value)
        return every

    def total(self, x):
        """The sum of a tensor over processes, in place; returns it."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def agreed(self, look):
        """What look() gives on the first process, on all of them; so too its UserError."""
        box = [None]
        if self.rank == 0:
            try:
                box[0] = look()
            except UserError as e:
                box[0] = e
        if self.world > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def turns(self):
        """Yield three times, True when this process may download: process 0 first, then the first one of every other
        machine, then the rest."""
        mine = [self.rank == 0, int(os.environ.get("LOCAL_RANK", 0)) == 0, True].index(True)
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
    vae: typing.Any = None                                # of data.latents: see `open_autoencoder`

    def say(self, *words):
        """Print from the first process only."""
        if self.rank == 0:
            print(*words, flush=True)

    def next(self, command, what=""):
        """Say which command comes next, with this run's YAML, folder and overrides."""
        script, *keys = command.split()
        self.say("next: python", shlex.join([script, *self.words, *keys]), f"   # {what}" if what else "")


def start(stage, cls, doc, flags={}, needs_data=lambda cfg: True, otherwise=""):
    """The `Run` of `python <stage>.py CONFIG.yaml [key=value ...] [section.key=value ...] [run=DIR] [--flags]`.

    needs_data: whether a stage with these settings reads data/ of a run that must be there; otherwise: what else to do.
    """
    words, known = sys.argv[1:], {stage: cls, **SHARED}
    if "--help" in words or not words:
        print_help(doc, known, stage, flags)
        raise SystemExit(0 if words else 2)
    given = {w for w in words if w.startswith("--")}
    for w in given - {"--dry-run", *flags}:
        raise UserError(f"{w}: {unknown(w, ['--help', '--dry-run', *flags])}")
    sections, folder, shared = read_words(words, stage)
    own = {name: fill(name, c, sections.get(name, {})) for name, c in known.items()}
    sections |= {name: dataclasses.asdict(c) for name, c in own.items()}
    cfg = own[stage]
    if cfg.name or cls().name:                            # names a folder that finished work replaces: inside the run
        check_name(f"{stage}.name", cfg.name)
    run = Run(stage, folder, cfg, own["data"], own["model"], sections, "--dry-run" in given, given, words=shared)
    start_processes(run)
    if run.dry_run:
        run.say(yaml.safe_dump({k: sections[k] for k in ("data", "model", stage)}, sort_keys=False))
    if run.agreed((run.dir / "data" / "train" / "info.json").exists):
        check_data_section(run)
    elif needs_data(cfg) and not run.dry_run:
        raise UserError(f"{run.dir}: no such run; start with train_diffusion.py{otherwise}")
    return run


def start_processes(run):
    """Give a run the rank, the number of processes and the device that torchrun chose."""
    run.rank, run.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    backend = "gloo"
    reuse_memory()
    if torch.cuda.is_available():
        backend, run.device = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(run.device)
        gpu_flags(run.stage.startswith("train"), exact=getattr(run.cfg, "optimizer", "") == "muon")
    if run.world > 1:                                     # one may prepare a large set for hours while others wait
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=24))
        except ValueError as e:                           # some clusters set WORLD_SIZE for every program
            raise UserError(f"WORLD_SIZE={run.world}: {e}; start with torchrun, or unset WORLD_SIZE") from None


def reuse_memory():
    """Let the C library keep what was freed: fresh pages cost a training step on CPUs a fifth of its time."""
    with suppress(AttributeError, OSError, TypeError):    # glibc alone has this
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):  # mmap and trim threshold, top pad
            mallopt(option, value)


def gpu_flags(training, exact=False):
    """Short float32 products (TF32) in training only; exact: not of matrices, which Muon has to orthogonalise."""
    torch.backends.cuda.matmul.allow_tf32 = training and not exact
    torch.backends.cudnn.allow_tf32 = training
    torch.backends.cudnn.benchmark = True


def check_data_section(run):
    """The data section must stay what it was, since every file's row i is image i; it is kept in config.yaml."""
    path = run.dir / "config.yaml"
    before = fill(f"{path}: data", Data, read_yaml(path).get("data", {}))
    for name, value in dataclasses.asdict(run.data).items():
        if getattr(before, name) != value and name not in ("root", "download", "skip_bad"):
            raise UserError(f"{path}: this run was made with data.{name}={getattr(before, name)}, "
                            f"now data.{name}={value}; use another run=DIR")


def keep_sections(run):
    """Write config.yaml, by the one command that makes the images, before it does."""
    if run.rank == 0:
        with atomic(run.dir / "config.yaml") as f:
            sections = run.sections | dict(data=dataclasses.asdict(run.data))
            f.write(yaml.safe_dump(sections, sort_keys=False).encode())


def cli(main):
    """Run a stage's `main`: what the user can put right is one line on stderr and exit code 2. Of several processes the
    first one speaks, if it can: the others wait, and torchrun ends them meanwhile."""
    try:
        main()
    except BrokenPipeError:                               # of `| head`: nobody reads on
        os._exit(141)
    except Exception as e:
        ours = isinstance(e, (UserError, OSError))
        if int(os.environ.get("RANK", 0)) > 0 or (dist.is_initialized() and not ours):
            time.sleep(3)                                 # process 0, too: its exception may be another's echo
        if not ours:
            raise
        print(f"error: {e}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)                                   # others may sit in a collective that will never complete
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from what was saved", file=sys.stderr, flush=True)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Files

@contextmanager
def atomic(path):
    """Open `path` for binary writing, under a name of one's own until it is complete: a kill leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as e:                                  # a full disk, most of all
        raise UserError(f"{path}: could not be written ({e.strerror or e}); what was there before is kept") from None
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def locked(run, *names):
    """Within this context no other command makes <run>/<names>: the first process holds a lock while it lives."""
    path = run.dir / ".locks" / "-".join(names)

    def take():
        for _ in range(30):                               # a killed predecessor may take a moment to be gone
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise UserError(f"{run.dir / '/'.join(names)}: another command is making it right now; "
                        "wait for it, or choose another name")

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        run.agreed(take)
        yield


@contextmanager
def making(run, kind, name, proof, done=lambda: False):
    """A new folder that all processes fill and that becomes <run>/<kind>/<name> in the end; refused while another does.
    A folder without `proof`, which is written last, is not ours to replace; nor one that is `done` when our turn comes.
    """
    target = run.dir / kind / name

    def begin():
        if target.exists() and not (target / proof).exists() and any(target.iterdir()):
            raise UserError(f"{target}: has no {proof}, so it is not ours to replace; "
                            "move it away or choose another name=")
        if done():
            raise UserError(f"{target}: another command has just made it")
        for stale in target.parent.glob(f".{name}.{'?' * 8}.???"):               # of commands that were killed
            shutil.rmtree(stale)
        aside = target.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp")
        aside.mkdir(parents=True)
        return aside

    with locked(run, kind, name):
        aside = run.agreed(begin)
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
        except BrokenPipeError:                           # of `| head`, see `cli`
            raise
        except OSError as e:                              # a full disk, most of all
            raise UserError(f"{target}: could not be written ({e}); what was there before is kept") from None
        finally:
            if run.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def reading(path, hint):
    """Whatever goes wrong while a file is taken apart is one line that names it and ends in `hint`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"{e.filename or path}: not there; {hint}") from None
    except Exception as e:                                # readers of damaged files raise nearly everything
        text = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        raise UserError(f"{path}: damaged, or not what is expected there ({text}); {hint}") from None


def write_json(path, value):
    """`value` as indented JSON, atomically; numbers that are not finite become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda word: None)
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path, hint):
    """The dict in the JSON file at `path`; a missing or broken one is a UserError that ends in `hint`."""
    with reading(path, hint):
        return {**json.loads(Path(path).read_text())}


def create_rows(ranks, path, dtype, shape):
    """A .npy file of zeros, made by the first process, whose rows `write_rows` fills, perhaps from several machines."""
    if ranks.rank == 0:
        np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
    ranks.wait()


def write_rows(path, first, rows):
    """Put rows into a .npy file. Not by memory maps: machines that share a page on a network disk would lose rows."""
    there = np.load(path, mmap_mode="r")
    with open(path, "r+b") as f:
        f.seek(there.offset + first * there.strides[0])
        f.write(np.ascontiguousarray(rows, there.dtype).tobytes())


def finished(run, path, recipe, files=(), whole=True):
    """Whether the result that the JSON file `path` describes is there, with its files, whole, and made by `recipe`; a
    UserError if another one made it, unless overwrite=true."""
    if not path.exists():
        return False
    with reading(path, "delete it"):
        there = read_json(path, "delete it")
        there = there.get("recipe", there)
        other = [f"{k}={str(there.get(k))[:40]}, now {str(v)[:40]}" for k, v in recipe.items() if there.get(k) != v]
    if other and not run.cfg.overwrite:
        raise UserError(f"{path}: was made with {'; '.join(other[:3])}. Choose another name=, or overwrite=true")
    complete = not other and whole and all(file.exists() for file in files)
    if complete:
        run.say(f"{path}: done already; without it the same command makes it anew")
    return complete


def save_torch(path, value):
    """Tensors and plain types into the file at `path`, atomically."""
    with atomic(path) as f:
        try:
            torch.save(value, f)
        except RuntimeError as e:                         # what torch makes of a full disk, and of Ctrl-C
            raise e.__context__ or e from None


def read_torch(path, hint):
    """What `save_torch` wrote, on the CPU: tensors and plain types alone; else a UserError that ends in `hint`."""
    with reading(path, hint):
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():         # torch compares no checksums
            raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def chunks(rows, size):
    """Rows, or an array, in parts of this size; one empty part of nothing."""
    return [rows[i:i + size] for i in range(0, max(len(rows), 1), size)]


def digest(*parts):
    """Short hash of strings, numbers, lists, dicts and arrays: names a recipe or a set of weights."""
    h = hashlib.sha256()
    for p in parts:
        array = isinstance(p, np.ndarray)
        h.update(np.ascontiguousarray(p).tobytes() if array else json.dumps(p, sort_keys=True).encode())
    return h.hexdigest()[:16]


def weights_hash(state, model={}):
    """Short hash of a state dict and its section `model`: what features, labels and samples say they were made with."""
    h = hashlib.sha256(json.dumps(model, sort_keys=True).encode())
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
    """A 32-bit seed (mt19937 takes no more), different for every index of one (seed, purpose)."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "little")
    h = (base + index) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):          # bijections of the 32-bit numbers
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h


@contextmanager
def seeded(seed, purpose):
    """Constructors of modules know only the global generator of the CPU: lend it to them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, purpose))
        yield


def draw(seed, purpose, indices, shape, uniforms=0):
    """Normal numbers z [B, *shape], or (u, z) with uniform u [B, uniforms] if asked for, float32. Row j is a function
    of (seed, purpose, indices[j]) alone: no batch size or number of processes changes it."""
    g, u, z = torch.Generator(), torch.empty(len(indices), uniforms), torch.empty(len(indices), *shape)
    for j, i in enumerate(indices):
        g.manual_seed(seed_of(seed, purpose, int(i)))
        if uniforms:
            u[j].uniform_(generator=g)
        z[j].normal_(generator=g)
    return (u, z) if uniforms else z


def ahead(f, items, depth=1, threads=1):
    """Yield f(item) for every item in order, computed in threads, up to `depth` of them while the caller is busy."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(f, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def autocast(run, precision):
    """(context factory, dtype, the reason in words); auto: bf16 where the hardware multiplies it natively."""
    if run.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:                                                 # PyTorch has no public function that tells
        flags = Path("/proc/cpuinfo")
        native = flags.exists() and "avx512_bf16" in flags.read_text()
    why = "asked for"
    if precision == "auto":
        precision, why = ("bf16", "native here") if native else ("fp32", "no native bf16 here")
    kind = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]
    context = nullcontext if precision == "fp32" else partial(torch.autocast, run.device.type, kind)
    return context, kind, f"{precision} on {run.device.type} ({why})"


def wide(t):
    """[B] -> [B, 1, 1, 1]."""
    return t[:, None, None, None]


def to_uint8(x):
    """float images in [-1, 1] -> uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(path, images, columns, rows=None, zoom=0, head=None):
    """Images uint8 [N, 3, H, W] as one PNG, row by row; `rows` are captions left of each row, `head` a line on top."""
    zoom = zoom or max(1, round(64 / images.shape[2]))
    tiles = np.asarray(images).transpose(0, 2, 3, 1).repeat(zoom, 1).repeat(zoom, 2)
    high, across = tiles.shape[1] + 2, tiles.shape[2] + 2                        # 2 pixels between them
    left, top = 8 * max(map(len, rows)) + 8 if rows else 0, 20 if head else 0
    size = (left + columns * across, top + math.ceil(len(tiles) / columns) * high)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (left + i % columns * across, top + i // columns * high))
    for j, text in enumerate(rows or []):
        pen.text((4, top + j * high + high // 2 - 7), text, "black")
    pen.text((4, 4), head or "", "black")
    with atomic(path) as f:
        sheet.save(f, "PNG")

"""Published weights: layouts as the original repositories write them, the same function, all stages from them, and files that do not fit."""
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stage
from test_model import inputs

from extract_features import READERS
from configs.run import Data, Model, Published, UserError
from train_diffusion import PATHS, UNet, UViT, load_model

# Digests of all names and shapes, taken from the original programs with their published settings. Their class tables have K rows, ours K + 1.
ADM = {                                                   # size: channels, mult, blocks, classes, attention order and heads, path, digest
    "64": (64, 192, [1, 2, 3, 4], 3, 1000, dict(head_channels=64), "vp-cosine", "b879ba9ed4fe94bb"),
    "128": (128, 256, [1, 1, 2, 3, 4], 2, 1000, dict(head_channels=0, heads=4), "vp", "d91b9be2449a697e"),
    "256 and LSUN": (256, 256, [1, 1, 2, 2, 4, 4], 2, 0, dict(head_channels=64), "vp", "b9c90be1570d1541"),
    "256 conditional": (256, 256, [1, 1, 2, 2, 4, 4], 2, 1000, dict(head_channels=64), "vp", "408c4d65687d2b6d"),
    "512": (512, 256, [0.5, 1, 1, 2, 2, 4, 4], 2, 1000, dict(head_channels=64), "vp", "f95458c996170da9"),
}
UVITS = {                                                 # name: side, channels, width, patch, depth, heads, rows of the class table, convolution, path, digest
    "CIFAR-10 S/2": (32, 3, 512, 2, 12, 8, 0, True, "vp-sde", "b38ffe35bab000aa"),
    "CelebA S/4": (64, 3, 512, 4, 12, 8, 0, True, "vp-sde", "ecb30627c7534fdf"),
    "ImageNet64 M/4": (64, 3, 768, 4, 16, 12, 1000, True, "vp-sde", "928cf19184638c83"),
    "ImageNet64 L/4": (64, 3, 1024, 4, 20, 16, 1000, True, "vp-sde", "b51cfc0d8100fbf5"),
    "ImageNet256 L/2": (32, 4, 1024, 2, 20, 16, 1001, True, "vp-sde", "da42ca0b04b6afc3"),
    "ImageNet256 H/2": (32, 4, 1152, 2, 28, 16, 1001, False, "vp-sd", "74dc6939adec520f"),
    "ImageNet512 L/4": (64, 4, 1024, 4, 20, 16, 1001, True, "vp-sde", "fe701646042735c4"),
    "ImageNet512 H/4": (64, 4, 1152, 4, 28, 16, 1001, False, "vp-sd", "17c4d0081842ef08"),
}


def layout(net, rows):
    """Tensors of a network as it would be published: a class table of `rows` rows."""
    w = net.state_dict()
    if rows:
        w["label_emb.weight"] = w["label_emb.weight"][:rows]
    return w


def pinned(w):
    return hashlib.sha256("\n".join(sorted(f"{k} {tuple(v.shape)}" for k, v in w.items())).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ADM)
def test_adm_is_read_from_its_tensors(name):
    size, channels, mult, blocks, rows, heads, path, expected = ADM[name]
    with torch.device("meta"):
        w = layout(UNet(size, 3, 6, channels, mult, blocks, [32, 16, 8], 64, num_labels=rows), rows)
    assert pinned(w) == expected
    model, s, c, w = READERS["adm"](w, {})
    assert model == Model("unet", channels, mult, blocks, [32, 16, 8], clock=[999, -1000], **heads) and (c, s["size"], s["path"], s["predict"]) == (3, size, path, "eps")
    assert len(w["out.2.weight"]) == len(w["out.2.bias"]) == 3


@pytest.mark.parametrize("name", UVITS)
def test_uvit_is_read_from_its_tensors(name):
    size, c, width, patch, depth, heads, rows, conv, path, expected = UVITS[name]
    with torch.device("meta"):
        w = layout(UViT(size, c, c, width, patch, depth, heads, conv, num_labels=rows), rows)
    assert pinned(w) == expected
    model, s, channels, _ = READERS["uvit"](w, {})
    clock = [999, -999] if conv else [1000, -1000]       # train_ldm.py and train.py: continuous time; train_ldm_discrete.py: steps
    assert model == Model("uvit", width, patch=patch, depth=depth, heads=heads, final_conv=conv, clock=clock)
    assert (channels, s["size"], s["path"], s["predict"], s["null_row"]) == (c, size, path, "eps", "last" if c == 4 else "none")


def fake(folder, kind, rows=0, side=16):
    """A small file in the layout of `kind`: 128 channels, so that groups are those of the large ones; the weights are those of a formula."""
    net = UNet(side, 3, 6, 128, [1] * (side // 8), 1, [8], 32, num_labels=rows) if kind == "adm" else UViT(side, 3, 3, 64, 2, 4, 4, num_labels=rows)
    w = layout(net, rows)
    for i, (k, v) in enumerate(sorted(w.items())):        # the formula of `waves`, over the rows that are there
        n = torch.arange(v.numel(), dtype=torch.float64)
        w[k] = (torch.sin(0.01 * n * n + 1.7 * n + i) * (2 / v[0].numel()) ** 0.5 if v.dim() > 1 else 0.3 * torch.sin(n + i)).reshape(v.shape).float()
    torch.save(w, folder / f"{kind}.pt")
    return f"{kind}:{folder / f'{kind}.pt'}"


def opened(name, size=16, **published):
    run = SimpleNamespace(published=Published(**published), data=Data(size=size), say=lambda *_: None, dir=Path("none"), device=torch.device("cpu"), dry_run=False)
    return load_model(run, name)


# Outputs of the original programs with these weights, at steps 3 and 700, or at times 0.003 and 0.7 of noise (U-ViT on pixels), for classes 1 and 4
NUMBERS = {
    "heads": [-0.375521, -0.313687, -0.302219, -0.069476, -0.179374, -0.376178], "qkv": [-0.32946, -0.420094, -0.34833, -0.021695, -0.265516, -0.434888],
    "uvit": [-0.176548, 0.220652, -0.630208, -0.075593, 0.374553, -0.537529],
}


@pytest.mark.parametrize("order", ["heads", "qkv"])
def test_adm_computes_what_the_original_does(tmp_path, order):
    """Step i of 1000 is t = 1 - (i + 1) / 1000: that is where its noise level lies on our clock."""
    net, state = opened(fake(tmp_path, "adm", rows=5), head_channels=32, order=order)
    t = 1 - (torch.tensor([3, 700]) + 1) / 1000
    out = net(inputs()[0], 1000 * t, torch.tensor([1, 4]))
    assert out.shape == (2, 3, 16, 16) and out[:, :, 5, 7].flatten().tolist() == pytest.approx(NUMBERS[order], abs=1e-5)
    assert torch.allclose(PATHS[state["path"]].alpha(t[:1].double()) ** 2, torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[3:4]), rtol=1e-5)
    assert state["num_labels"] == 5 and not state["null"] and torch.allclose(net.label_emb.weight[5], net.label_emb.weight[:5].mean(0))


def test_uvit_computes_what_the_original_does(tmp_path):
    net, _ = opened(fake(tmp_path, "uvit", rows=5), heads=4)
    assert net(inputs()[0], 1000 * (1 - torch.tensor([0.003, 0.7])), torch.tensor([1, 4]))[:, :, 5, 7].flatten().tolist() == pytest.approx(NUMBERS["uvit"], abs=1e-5)


def test_schedules_in_closed_form():
    """Cumulative products at steps 1, 500 and 1000 of 1000."""
    u = np.arange(1, 1001) / 1000
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = {"vp-sd": np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2), "vp-sde": np.exp(-0.1 * u - 9.95 * u ** 2),
            "vp-cosine": np.append(f[1:-1] / f[0], f[999] / f[0] * 1e-3)}
    for kind, expected in abar.items():
        assert np.allclose(PATHS[kind].log_abar(torch.from_numpy(1 - u)).exp().numpy(), expected, rtol=1e-9), kind


@pytest.mark.parametrize("kind, solver, steps, limit", [("vp-sd", "rk4", 60, 5e-3), ("vp-sde", "rk4", 100, 5e-3), ("vp-cosine", "ddim", 400, 5e-2)])
def test_other_schedules_reach_gaussian_data(kind, solver, steps, limit):
    """The cosine schedule ends where the signal is 5e-5 of the noise: one step of DDIM loses nothing there, other solvers do."""
    from test_solver import Flow, noise, sample
    flow, z = Flow(kind, "eps"), noise()
    assert float((sample(flow, flow.path, "eps", z, solver, steps) - flow.end(z)).abs().max()) < limit


def test_overrides_are_taken(tmp_path):
    name = fake(tmp_path, "adm", side=8)
    plain, other = opened(name, 8), opened(name, 8, heads=2, path="vp-cosine", clock=[0.0, 500.0], predict="v")
    assert plain[1]["path"] == "vp" and plain[0].middle_block[1].heads == 2      # 64 channels each
    assert (other[1]["path"], other[1]["predict"]) == ("vp-cosine", "v") and other[0].clock == [0, 500]
    assert opened(name, 8, head_channels=16)[0].middle_block[1].heads == 8
    assert plain[1]["weights"] != other[1]["weights"]                            # features of one are not taken for those of the other


def test_files_that_do_not_fit(tmp_path):
    def said(name, size=8, **published):
        with pytest.raises(UserError) as e:
            opened(name, size, **published)
        assert "\n" not in str(e.value)
        return str(e.value)

    name = fake(tmp_path, "adm", side=8)
    path = tmp_path / "adm.pt"
    w = torch.load(path, weights_only=True)
    assert "no such file" in said("adm:nothing.pt")
    assert "3 x 32 x 32; set data.size" in said(name, 32)
    assert "not the weights of a published uvit" in said(f"uvit:{path}") and "pos_embed" in said(f"uvit:{path}")
    for change, text in (
            ({"input_blocks.0.0.weight": torch.zeros(128, 6, 3, 3)}, "input_blocks.0.0.weight is [128, 6, 3, 3], expected [128, 3, 3, 3]"),             # an upsampler
            ({"input_blocks.1.0.emb_layers.1.weight": torch.zeros(128, 512)}, "emb_layers.1.weight is [128, 512], expected [256, 512]"),
            ({"context.weight": torch.zeros(3)}, "context.weight is unknown")):
        torch.save(w | change, path)
        assert text in said(name)
    torch.save({k: v for k, v in w.items() if not k.startswith("middle_block.1.")}, path)
    assert "middle_block.1.norm.weight is missing" in said(name) and "and 3 more" in said(name)
    blob = path.read_bytes()
    path.write_bytes(blob[:len(blob) // 2])
    assert "not a readable checkpoint" in said(name)
    torch.save({"state_dict": w}, path)
    assert "expected a dict of tensors" in said(name)
    torch.save(w, path)
    assert "published weights are named adm:FILE" in said(str(path))
    assert "not the weights of a published ddpm model" in said(f"ddpm:{path}") and "published weights: adm, ddpm" in said(f"edm:{path}")


# ---------------------------------------------------------------------------------------------------------------------
# The stages

def config(folder, name):
    path = folder / "published.yaml"
    path.write_text(f"""
data: {{source: shapes, train: 48, test: 16, size: 8}}
extract_features: {{checkpoint: "{name}", activations: [mid*-out], t: [0.9], precision: fp32}}
self_label: {{K: 2, restarts: 1}}
train_guided: {{init: "{name}", path: vp, predict: eps, images: 16, batch: 8, grid_every: 1M, precision: fp32}}
sample_ode: {{n: 4, solver: ddim, steps: 2, evaluate: false, precision: fp32}}
""")
    return path


def test_chain_from_adm(tmp_path):
    """Features, labels, guided fine-tuning and samples as in the README."""
    yaml, run = config(tmp_path, fake(tmp_path, "adm", side=8)), f"run={tmp_path / 'run'}"
    stage("train_diffusion", yaml, run, "--prepare")
    stage("extract_features", yaml, run)
    stage("self_label", yaml, run, "method=kmeans")
    stage("train_guided", yaml, run, "labels=kmeans")
    stage("sample_ode", yaml, run, "checkpoint=guided/kmeans", "guidance=2", "name=kmeans")
    assert np.load(tmp_path / "run/samples/kmeans/images.npy").shape == (4, 3, 8, 8)
    name = f"adm:{tmp_path / 'adm.pt'}"
    stage("probe", yaml, run, f"checkpoint={name}", "protocol=linear", "activations=mid*-out", "t=0.8", "validation=12", "draws=1", "controls=pixels", "precision=fp32")
    assert json.loads((tmp_path / "run/probe/linear.json").read_text())["checkpoint"] == name
    stage("sample_ode", yaml, run, "checkpoint=guided/kmeans", f"autoguide={name}", "guidance=2", "name=auto")       # the published model as the weaker one
    assert not np.array_equal(*(np.load(tmp_path / f"run/samples/{n}/images.npy") for n in ("kmeans", "auto")))
    state = torch.load(tmp_path / "run/guided/kmeans/checkpoint.pt", weights_only=True)
    assert state["num_labels"] == 2 and state["model"]["clock"] == [999, -1000] and state["init"]["checkpoint"].startswith("adm:")
    published = torch.load(tmp_path / "adm.pt", weights_only=True)
    assert (state["net"]["input_blocks.1.0.in_layers.2.weight"] - published["input_blocks.1.0.in_layers.2.weight"]).abs().max() < 0.01      # it started from them


def test_chain_from_uvit(tmp_path, monkeypatch):
    """The same in this process, and a probe; then weights with classes: sampled, but neither guided without a null label nor taken for unconditional ones."""
    import importlib

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(yaml), f"run={tmp_path / 'run'}", "published.heads=4", *words])
        module = importlib.import_module(name)
        module.main()

    name = fake(tmp_path, "uvit", side=8)
    yaml = config(tmp_path, name)
    run("train_diffusion", "--prepare")
    run("extract_features", "activations=mid-vit-block0-out")
    run("self_label", "method=kmeans")
    with pytest.raises(UserError, match="path=vp: the initial weights"):
        run("train_guided", "labels=kmeans")
    run("train_guided", "labels=kmeans", "path=vp-sde")
    run("sample_ode", "checkpoint=guided/kmeans", "guidance=1.5", "name=kmeans")
    run("probe", f"probe.checkpoint={name}", "t=0.5,0.8", "fit=30", "validation=18", "K=3", "precision=fp32")
    name = fake(tmp_path, "uvit", rows=5, side=8)
    run("sample_ode", f"checkpoint={name}", "name=classes")
    assert set(np.load(tmp_path / "run/samples/classes/labels.npy")) <= set(range(5))
    for stage_, words, text in (("sample_ode", ["guidance=2", "name=x"], "no null label"), ("train_guided", ["labels=kmeans", "path=vp-sde", "name=x"], "other labels")):
        with pytest.raises(UserError, match=text):
            run(stage_, f"{'checkpoint' if stage_ == 'sample_ode' else 'init'}={name}", *words)

"""Published weights, as the original repositories write them: the same function, stages, wrong files.

That names and shapes of our networks are theirs is tested in test_model.py."""
import importlib
import json
import sys

import numpy as np
import pytest
import torch

from configs.run import Processes, UserError
from train_diffusion import PATHS, UNet, UViT, load_model

YAML = """
data: {{source: shapes, train: 48, test: 16, size: {size}}}
model: {model}
train_diffusion: {{imported: "{imported}", name: theirs}}
extract_features: {{checkpoint: diffusion/theirs, activations: [mid*-out], t: [0.9], precision: fp32}}
self_label: {{K: 2, restarts: 1}}
train_guided: {{init: diffusion/theirs, path: {path}, predict: eps, images: 16, batch: 8, precision: fp32}}
sample_ode: {{n: 4, solver: euler, steps: 2, evaluate: false, precision: fp32}}
"""


def layout(net, rows):
    """Tensors of a network as it would be published: a class table of `rows` rows."""
    w = net.state_dict()
    if rows:
        w["label_emb.weight"] = w["label_emb.weight"][:rows]
    return w


def fake(folder, kind, rows=0, side=16):
    """A small file in the layout of `kind`, with weights of a formula; 128 channels, as groups differ below."""
    if kind == "adm":
        net = UNet(side, 3, 6, 128, [1] * (side // 8), 1, [8], 32, num_labels=rows)
    else:
        net = UViT(side, 3, 3, 64, 2, 4, 4, num_labels=rows)
    w = layout(net, rows)
    for i, (k, v) in enumerate(sorted(w.items())):
        n = torch.arange(v.numel(), dtype=torch.float64)
        matrix = v.dim() > 1
        waves = torch.sin(0.01 * n * n + 1.7 * n + i) if matrix else torch.sin(n + i)
        w[k] = (waves * ((2 / v[0].numel()) ** 0.5 if matrix else 0.3)).reshape(v.shape).float()
    torch.save(w, folder / f"{kind}.pt")
    return f"{kind}:{folder / f'{kind}.pt'}"


ADM = "{{channels: 128, mult: {}, blocks: 1, attention: [8], head_channels: 32, clock: [999, -1000]}}"
UVIT = "{backbone: uvit, channels: 64, depth: 4, heads: 4, clock: [999, -999]}"


def staged(monkeypatch, folder, imported, size=16, path="vp", model=None):
    """A function that runs a stage on these weights, in this process, in the run folder/run."""
    yaml = folder / "published.yaml"
    model = model or (UVIT if imported.startswith("uvit") else ADM.format([1] * (size // 8)))
    yaml.write_text(YAML.format(imported=imported, size=size, path=path, model=model))

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(yaml), f"run={folder / 'run'}", *map(str, words)])
        module = importlib.import_module(name)
        module.main()
    return run


class Here(Processes):
    """As much of a Run as load_model needs."""
    def __init__(self, folder):
        self.dir, self.device, self.dry_run = folder / "run", torch.device("cpu"), False


def opened(monkeypatch, folder, imported):
    staged(monkeypatch, folder, imported)("train_diffusion")
    return load_model(Here(folder), "diffusion/theirs")


# Outputs of the original programs with these weights, at steps 3 and 700, or at times 0.003 and 0.7 of noise (U-ViT on
# pixels), for classes 1 and 4
NUMBERS = {
    "adm": [-0.375521, -0.313687, -0.302219, -0.069476, -0.179374, -0.376178],
    "uvit": [-0.176548, 0.220652, -0.630208, -0.075593, 0.374553, -0.537529],
}


def inputs():
    """An image [2, 3, 16, 16] of a formula."""
    n = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)
    return torch.sin(1.3 * n + 0.003 * n * n).reshape(2, 3, 16, 16).float()


def test_adm_computes_what_the_original_does(tmp_path, monkeypatch):
    """Step i of 1000 is t = 1 - (i + 1) / 1000: that is where its noise level lies on our clock."""
    net, state = opened(monkeypatch, tmp_path, fake(tmp_path, "adm", rows=5))
    t = 1 - (torch.tensor([3, 700]) + 1) / 1000
    out = net(inputs(), 1000 * t, torch.tensor([1, 4]))
    assert out.shape == (2, 3, 16, 16) and out[:, :, 5, 7].flatten().tolist() == pytest.approx(NUMBERS["adm"], abs=1e-5)
    abar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[3:4])
    assert torch.allclose(PATHS[state["path"]].alpha(t[:1].double()) ** 2, abar, rtol=1e-5)
    assert (state["num_labels"], state["null"], state["predict"]) == (5, False, "eps")
    assert torch.allclose(state["marginal"], torch.full((5,), 0.2, dtype=torch.float64))
    assert torch.allclose(net.label_emb.weight[5], net.label_emb.weight[:5].mean(0))


def test_uvit_computes_what_the_original_does(tmp_path, monkeypatch):
    net, state = opened(monkeypatch, tmp_path, fake(tmp_path, "uvit", rows=5))
    out = net(inputs(), 1000 * (1 - torch.tensor([0.003, 0.7])), torch.tensor([1, 4]))
    assert out[:, :, 5, 7].flatten().tolist() == pytest.approx(NUMBERS["uvit"], abs=1e-5)
    assert (state["path"], state["kind"]) == ("vp-sde", "published uvit")


def test_schedules_in_closed_form():
    """Cumulative products at steps 1, 500 and 1000 of 1000."""
    u = np.arange(1, 1001) / 1000
    abar = {"vp-sd": np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2),
            "vp-sde": np.exp(-0.1 * u - 9.95 * u ** 2)}
    for kind, expected in abar.items():
        assert np.allclose(PATHS[kind].log_abar(torch.from_numpy(1 - u)).exp().numpy(), expected, rtol=1e-9), kind


@pytest.mark.parametrize("kind, steps", [("vp-sd", 80), ("vp-sde", 100)])
def test_their_schedules_reach_gaussian_data(kind, steps):
    from test_solver import Flow, noise, sample
    flow, z = Flow(kind, "eps"), noise()
    assert float((sample(flow, flow.path, "eps", z, "rk4", steps) - flow.end(z)).abs().max()) < 5e-3


def test_files_that_do_not_fit(tmp_path, monkeypatch):
    def said(imported, size=8, model=None):
        with pytest.raises(UserError) as e:
            staged(monkeypatch, tmp_path, imported, size, model=model)("train_diffusion")
        assert "\n" not in str(e.value) and not (tmp_path / "run/diffusion").exists()
        return str(e.value)

    name = fake(tmp_path, "adm", side=8)
    path = tmp_path / "adm.pt"
    w = torch.load(path, weights_only=True)
    assert "must be adm:FILE" in said(str(path)) and "must be adm:FILE" in said(f"ddpm:{path}")
    assert "nothing.pt: not there; imported= takes the weights of a published adm" in said("adm:nothing.pt")
    assert "imported= takes the weights of a published uvit" in said(f"uvit:{path}")
    for change in ({"input_blocks.0.0.weight": torch.zeros(128, 6, 3, 3)},       # an upsampler's
                   {"input_blocks.1.0.emb_layers.1.weight": torch.zeros(128, 512)}, {"context.weight": torch.zeros(3)}):
        torch.save(w | change, path)
        assert "adm.pt: damaged" in said(name)
    torch.save({k: v for k, v in w.items() if not k.startswith("middle_block.1.")}, path)
    assert "adm.pt: damaged" in said(name)
    blob = path.read_bytes()
    path.write_bytes(blob[:len(blob) // 2])
    assert "adm.pt: damaged" in said(name)
    torch.save({"state_dict": w}, path)
    assert "imported= takes the weights of a published adm" in said(name)
    torch.save(w, path)
    assert "cosine betas" in said(name, 64, ADM.format([1, 2, 3, 4]))


# ---------------------------------------------------------------------------------------------------------------------
# The stages

def test_chain_from_adm(tmp_path, monkeypatch, capsys):
    """Features, labels, guided fine-tuning and samples as in the README, from a checkpoint like any other."""
    run = staged(monkeypatch, tmp_path, fake(tmp_path, "adm", side=8), size=8)
    run("train_diffusion", "--dry-run")
    assert "would be written" in capsys.readouterr().out and not (tmp_path / "run").exists()
    run("train_diffusion")                                # needs no images
    about = json.loads((tmp_path / "run/diffusion/theirs/checkpoint.json").read_text())
    assert about["kind"] == "published adm" and (about["path"], about["predict"]) == ("vp", "eps")
    capsys.readouterr()
    run("train_diffusion")
    assert "done already" in capsys.readouterr().out
    file = tmp_path / "run/diffusion/theirs/checkpoint.pt"
    before = torch.load(file, weights_only=True)["weights"]
    with pytest.raises(UserError, match="overwrite=true"):                       # no tensor tells its number of heads
        run("train_diffusion", "model.head_channels=16")
    run("train_diffusion", "model.head_channels=16", "overwrite=true")
    assert torch.load(file, weights_only=True)["weights"] != before
    file.unlink()
    run("train_diffusion", "overwrite=true")
    assert torch.load(file, weights_only=True)["weights"] == before
    run("train_diffusion", "--prepare")
    run("extract_features")
    run("self_label", "method=kmeans")
    run("train_guided", "labels=kmeans")
    run("sample_ode", "checkpoint=guided/kmeans", "guidance=2", "name=kmeans")
    assert np.load(tmp_path / "run/samples/kmeans/images.npy").shape == (4, 3, 8, 8)
    state = torch.load(tmp_path / "run/guided/kmeans/checkpoint.pt", weights_only=True)
    assert state["num_labels"] == 2 and state["model"]["clock"] == [999, -1000]
    assert state["init"]["checkpoint"] == "diffusion/theirs"
    published, weight = torch.load(tmp_path / "adm.pt", weights_only=True), "input_blocks.1.0.in_layers.2.weight"
    assert (state["net"][weight] - published[weight]).abs().max() < 0.01         # it started from them


def test_weights_with_classes(tmp_path, monkeypatch):
    """They are sampled, but neither guided without a null label nor taken for unconditional ones; another file is not
    taken for the first."""
    run = staged(monkeypatch, tmp_path, fake(tmp_path, "uvit", rows=5, side=8), size=8, path="vp-sde")
    run("train_diffusion")
    run("train_diffusion", "--prepare")
    run("self_label", "method=classes")
    run("sample_ode", "checkpoint=diffusion/theirs", "name=classes")
    assert set(np.load(tmp_path / "run/samples/classes/labels.npy")) <= set(range(5))
    with pytest.raises(UserError, match="no null label"):
        run("sample_ode", "checkpoint=diffusion/theirs", "guidance=2", "name=x")
    with pytest.raises(UserError, match="published classes"):
        run("train_guided", "labels=classes", "name=x")
    other = fake(tmp_path, "adm", side=8)
    run = staged(monkeypatch, tmp_path, other, size=8)
    with pytest.raises(UserError, match="overwrite=true"):
        run("train_diffusion")
    run("train_diffusion", "overwrite=true")
    assert load_model(Here(tmp_path), "diffusion/theirs")[1]["num_labels"] == 0


def test_latent_models_are_known_by_their_channels(tmp_path, monkeypatch):
    """Four channels: their last class is the null label, and the run must see latents of that size."""
    w = UViT(8, 4, 4, 64, 2, 2, 1, final_conv=False, num_labels=3).state_dict()
    torch.save(w, tmp_path / "w.pt")
    model = "{backbone: uvit, channels: 64, depth: 2, heads: 1, patch: 2, final_conv: false}"
    run = staged(monkeypatch, tmp_path, f"uvit:{tmp_path / 'w.pt'}", model=model)
    with pytest.raises(UserError, match="w.pt: damaged, or not what"):
        run("train_diffusion")
    (tmp_path / "run/data/train").mkdir(parents=True)
    (tmp_path / "run/data/train/latents.json").write_text(json.dumps(dict(shape=[2, 8, 8, 8])))
    run("train_diffusion", "data.latents=somewhere")
    net, state = load_model(Here(tmp_path), "diffusion/theirs")
    assert (state["num_labels"], state["null"], state["path"], state["channels"]) == (3, True, "vp-sd", 4)
    assert torch.equal(net.label_emb.weight, w["label_emb.weight"])

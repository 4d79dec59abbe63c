"""More published weights: those of self-guided flow, whose labels are its own prototypes; DDPM's CIFAR-10 network through diffusers."""
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from test_foreign import opened as foreign
from test_foreign import through
from test_model import inputs
from test_published import opened, pinned

from extract_features import READERS
from train_diffusion import PATHS, AttentionBlock, Model, UserError, build_model, torchvision_datasets


def layout(width=64, depth=4, patch=2, channels=3, side=8, K=5, per_patch=False):
    """Shapes by name, as libs/uvit_online.py and libs/uvit_online_patch.py of dongzhuoyao/sgfm (103d158) make them; side in patches."""
    shapes = {"pos_embed": (1, side ** 2 + (2 if per_patch else 3), width)}
    shapes |= {"patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= {k: (1, 1, width) for k in ("cls_token", "null_cfg_embed", "unconditional_embed")} | {"prototypes.weight": (K, width)}
    for i, shape in ((0, (width // 2, width)), (1, (width // 2,)), (3, (width, width // 2))):
        shapes |= {f"projection_head.{i}.weight": shape, f"projection_head.{i}.bias": shape[:1]}
    shapes |= {"projection_head.1.running_mean": (width // 2,), "projection_head.1.running_var": (width // 2,), "projection_head.1.num_batches_tracked": ()}
    for block in [f"{half}_blocks.{i}" for half in ("in", "out") for i in range(depth // 2)] + ["mid_block"]:
        linear = {"norm1": (width,), "norm2": (width,), "attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        linear |= {"skip_linear": (width, 2 * width)} if block.startswith("out") else {}
        shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)}
        shapes |= {f"{block}.{k}.weight": v for k, v in linear.items()} | {f"{block}.{k}.bias": v[:1] for k, v in linear.items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"decoder_pred.weight": (patch ** 2 * channels, width), "decoder_pred.bias": (patch ** 2 * channels,)}
    return shapes | {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}


def fake(folder, batches=7, name="nnet", **size):
    """A small file of that layout, the weights those of a formula; `batches` is how many the head saw in training."""
    w = {}
    for i, (k, shape) in enumerate(sorted(layout(**size).items())):
        v = torch.empty(shape)
        n = torch.arange(v.numel(), dtype=torch.float64)
        w[k] = (torch.sin(0.01 * n * n + 1.7 * n + i) * (2 / v[0].numel()) ** 0.5 if v.dim() > 1 else 0.3 * torch.sin(n + i)).reshape(shape).float()
    w |= {"projection_head.1.num_batches_tracked": torch.tensor(batches), "projection_head.1.running_var": torch.ones_like(w["projection_head.1.running_var"])}
    torch.save(w, folder / f"{name}.pth")
    return f"sgfm:{folder / f'{name}.pth'}"


@pytest.mark.parametrize("per_patch, expected", [(False, "2307e8319aa5937f"), (True, "1f358cc30126444d")])
def test_self_guided_flow_is_read_from_its_tensors(per_patch, expected):
    """Digests of all names and shapes of the original, with the settings it was published with (U-ViT-L/2 on latents, 300 prototypes)."""
    w = {k: torch.empty(shape, device="meta") for k, shape in layout(1024, 20, 2, 4, 16, 300, per_patch).items()}
    w["projection_head.1.num_batches_tracked"] = torch.tensor(1)
    assert pinned(w) == expected
    for null_row, registers in (("", 1), ("none", 1 if per_patch else 2)):
        model, s, channels, got = READERS["sgfm"](dict(w), {"null_row": null_row} if null_row else {})
        assert model == Model("uvit", 1024, patch=2, depth=20, heads=16, registers=registers, clock=[0, 1])
        assert (channels, s["size"], s["path"], s["predict"]) == (4, 32, "cv", "v")
        labels = 0 if per_patch or null_row else 300
        with torch.device("meta"):
            own = build_model(model, 32, 4, num_labels=labels).state_dict()
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in own.items()}


# Outputs of the original program with these weights at t = 0.3 and 0.85: with prototypes 1 and 4; with its null; with what stands there without labels
NUMBERS = {
    "labels": [0.71749, -0.113456, -1.078731, 0.302455, 0.035204, -1.106045], "null": [0.717155, -0.113307, -1.077597, 0.302702, 0.035711, -1.106959],
    "none": [0.716732, -0.113268, -1.078553, 0.302617, 0.035185, -1.107859], "patch null": [0.727117, -0.103189, -1.130891, 0.333896, 0.043617, -1.163931],
    "patch none": [0.723926, -0.123855, -1.041627, 0.302954, 0.019939, -1.068457],
}


@pytest.mark.parametrize("case", NUMBERS)
def test_self_guided_flow_computes_what_the_original_does(tmp_path, case):
    net, state = opened(fake(tmp_path, per_patch="patch" in case), heads=4, **{"null_row": "none"} if "none" in case else {})
    label = torch.tensor([1, 4]) if case == "labels" else None
    out = net(inputs()[0], 1000 * torch.tensor([0.3, 0.85]), *[label] if state["num_labels"] else [])
    assert out.shape == (2, 3, 16, 16) and out[:, :, 5, 7].flatten().tolist() == pytest.approx(NUMBERS[case], abs=1e-5)
    assert (state["num_labels"], state["null"]) == ((5, True) if case in ("labels", "null") else (0, "none" not in case))


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="name the nnet.pth beside it"):
        opened(fake(tmp_path, batches=0))
    with pytest.raises(UserError, match="not the weights of a published uvit model|does not fit the uvit model"):
        opened(fake(tmp_path).replace("sgfm", "uvit"))
    torch.save({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights of a published sgfm model"):
        opened(f"sgfm:{tmp_path / 'other.pth'}")


def test_chain_from_self_guided_flow(tmp_path, monkeypatch, capsys):
    """Features and new guidance from it without its labels; samples guided by its prototypes. Its labels are neither ours nor classes."""
    name, yaml = fake(tmp_path, side=4), tmp_path / "sgfm.yaml"
    yaml.write_text(f"""
data: {{source: shapes, train: 48, test: 16, size: 8}}
published: {{heads: 4}}
extract_features: {{checkpoint: "{name}", activations: [mid*-out], t: [0.9], precision: fp32}}
self_label: {{K: 2, restarts: 1}}
train_guided: {{init: "{name}", images: 16, batch: 8, grid_every: 1M, precision: fp32}}
sample_ode: {{n: 4, steps: 2, evaluate: false, precision: fp32}}
""")

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(yaml), f"run={tmp_path / 'run'}", *words])
        importlib.import_module(name).main()

    run("train_diffusion", "--prepare")
    run("extract_features", "published.null_row=none")
    assert "read without labels" in (said := capsys.readouterr().out) and "trained with classes" in said
    run("probe", f"probe.checkpoint={name}", "published.null_row=none", "protocol=cka", "compared=16", "t=0.9", "precision=fp32")
    run("self_label", "method=kmeans")
    with pytest.raises(UserError, match="other labels"):
        run("train_guided", "labels=kmeans")
    run("train_guided", "labels=kmeans", "published.null_row=none")
    state = torch.load(tmp_path / "run/guided/kmeans/checkpoint.pt", weights_only=True)
    assert state["model"]["registers"] == 2 and state["net"]["pos_embed"].shape == (1, 1 + 1 + 2 + 16, 64) and state["num_labels"] == 2
    run("sample_ode", "checkpoint=guided/kmeans", "guidance=1.5", "name=kmeans")
    run("sample_ode", f"checkpoint={name}", "guidance=1.5", "name=own")
    assert set(np.load(tmp_path / "run/samples/own/labels.npy")) <= set(range(5))
    assert json.loads((tmp_path / "run/samples/own/metrics.json").read_text())["label_file"] == "published prototypes"


def test_attention_does_not_keep_the_scores():
    """What the backward pass needs grows with the number of positions, not with its square: here 5 maps and 2 x 1024 sums against 2 x 1024 x 1024 scores."""
    block, kept = AttentionBlock(16, 2), []
    block.qkv.weight.data.normal_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        block(torch.randn(1, 16, 32, 32))
    assert max(kept) <= 3 * 16 * 1024


# ---------------------------------------------------------------------------------------------------------------------
# DDPM's CIFAR-10 network has other blocks than ADM's: it is read through diffusers

def test_ddpm_of_cifar10(tmp_path):
    """Settings and folder of google/ddpm-cifar10-32, but narrow: one head, convolutions with stride, network and scheduler in one folder, older names in attention."""
    torchvision_datasets()
    diffusers, safetensors = pytest.importorskip("diffusers"), pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(sample_size=32, block_out_channels=(16, 32, 32, 32), layers_per_block=2, norm_num_groups=8, norm_eps=1e-6, attention_head_dim=None,
                                   down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), downsample_padding=0,
                                   up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, freq_shift=1).eval()
    theirs.save_pretrained(tmp_path)
    diffusers.DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path)             # another schedule than the default, to see that it is read
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    file, older = tmp_path / "diffusion_pytorch_model.safetensors", dict(to_q="query", to_k="key", to_v="value")
    w = {k.replace("to_out.0", "proj_attn"): v for k, v in safetensors.load_file(file).items()}
    for ours, was in older.items():
        w = {k.replace(ours, was): v for k, v in w.items()}
    assert sum("query" in k for k in w) == 2 * (2 + 3 + 1)                       # weights and biases
    safetensors.save_file(w, file, metadata={"format": "pt"})

    net, state = foreign(f"diffusers:{tmp_path}")
    x, i = torch.randn(2, 3, 32, 32), torch.tensor([0, 11, 500, 999])
    abar = np.cumprod(1 - np.linspace(1e-4, 0.03, 1000))[i]                      # step i, from 0, is our t = 1 - (i + 1) / 1000
    path = PATHS[state["path"]]
    assert np.allclose(path.alpha((1 - (i + 1) / 1000).double()) ** 2, abar, rtol=1e-4)
    names = ["mid-repeat1-res-out", "up-level2-repeat0-vit-block0-self-q", "down-level1-downsampler-out", "unet-out"]
    got = [through(net, x, 999.0 - i[1:3], [n])[n] for n in names]
    assert [tuple(v.shape[1:]) for v in got] == [(32, 4, 4), (32, 16, 16), (32, 8, 8), (3, 32, 32)]
    with torch.no_grad():
        assert torch.allclose(got[3], theirs(x, i[1:3]).sample, atol=1e-5)

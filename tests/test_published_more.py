"""More published weights: those of self-guided flow, whose labels are its own prototypes; DDPM's and DDAE's networks; improved-diffusion's."""
import importlib
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from test_foreign import opened as foreign
from test_foreign import through
from test_model import inputs
from test_published import opened, pinned

from extract_features import READERS, catalogue
from configs.data import torchvision_datasets
from configs.run import Model, UserError
from train_diffusion import PATHS, UNet, build_model


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


# ---------------------------------------------------------------------------------------------------------------------
# DDPM's U-Net and DDAE's: other blocks than ADM's, under other names

def unet_layout(mult, blocks, attention, channels=128, ddae=False, moved_by_blocks=False):
    """Shapes by name, as pesser/pytorch_diffusion (304bdff) and FutureXiang/ddae (ddd4a3b) make them; attention: levels that have it."""
    shapes, width = {}, 4 * channels
    conv2, emb, short, q = ("conv2.1", "time_emb.1", "shortcut", "projection") if ddae else ("conv2", "temb_proj", "nin_shortcut", "q")

    def add(name, *shape):
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def res(name, c_in, c_out):
        add(f"{name}.norm1", c_in)
        add(f"{name}.conv1", c_out, c_in, 3, 3)
        add(f"{name}.{emb}", c_out, width)
        add(f"{name}.norm2", c_out)
        add(f"{name}.{conv2}", c_out, c_out, 3, 3)
        if c_in != c_out:
            add(f"{name}.{short}", c_out, c_in, 1, 1)

    def attend(name, c):
        add(f"{name}.norm", c)
        for k in ["projection", "output"] if ddae else ["q", "k", "v", "proj_out"]:
            add(f"{name}.{k}", (3 if k == "projection" else 1) * c, c, *() if ddae else (1, 1))

    def move(way, level, number, c):
        if moved_by_blocks:
            return res(f"{way}.{number}.op", c, c)
        add(f"{way}.{number}.conv" if ddae else f"{way}.{level}.{way}sample.conv", c, c, 3, 3)

    lin = ["time_emb.lin1", "time_emb.lin2"] if ddae else ["temb.dense.0", "temb.dense.1"]
    add(lin[0], width, channels)
    add(lin[1], width, width)
    add("image_proj" if ddae else "conv_in", channels, 3, 3, 3)
    c, skips, number = channels, [channels], 0
    for level, m in enumerate(mult):
        for b in range(blocks):
            res(f"down.{number}.res" if ddae else f"down.{level}.block.{b}", c, m * channels)
            c, number = m * channels, number + 1
            if level in attention:
                attend(f"down.{number - 1}.attn" if ddae else f"down.{level}.attn.{b}", c)
            skips.append(c)
        if level + 1 < len(mult):
            move("down", level, number, c)
            skips.append(c)
            number += 1
    for names, f in ((("middle.res1", "mid.block_1"), lambda n: res(n, c, c)), (("middle.attn", "mid.attn_1"), lambda n: attend(n, c)), (("middle.res2", "mid.block_2"), lambda n: res(n, c, c))):
        f(names[not ddae])
    number = 0
    for level, m in reversed(list(enumerate(mult))):
        for b in range(blocks + 1):
            res(f"up.{number}.res" if ddae else f"up.{level}.block.{b}", c + skips.pop(), m * channels)
            c, number = m * channels, number + 1
            if level in attention:
                attend(f"up.{number - 1}.attn" if ddae else f"up.{level}.attn.{b}", c)
        if level:
            move("up", level, number, c)
            number += 1
    add("norm" if ddae else "norm_out", c)
    add("final" if ddae else "conv_out", 3, c, 3, 3)
    return shapes


UNETS = {                                                 # mult, blocks, levels with attention, the rest; digest of the original's names and shapes; side, style, resampling
    "DDPM, CIFAR-10": (([1, 2, 2, 2], 2, [1]), {}, "5b8505047443ff13", 32, "ddpm", "conv"),
    "DDPM, LSUN": (([1, 1, 2, 2, 4, 4], 2, [4]), {}, "dd620a5e91b68ae8", 256, "ddpm", "conv"),
    "DDAE, DDPM": (([1, 2, 2, 2], 2, [1]), dict(ddae=True), "d10d8b6c43214317", 32, "ddae", "conv"),
    "DDAE, DDPM++": (([2, 2, 2], 4, [1]), dict(ddae=True, moved_by_blocks=True), "1af076ad0b27f8f6", 32, "ddae", "block"),
}


@pytest.mark.parametrize("name", UNETS)
def test_ddpm_is_read_from_its_tensors(name):
    (mult, blocks, attention), other, expected, size, style, resample = UNETS[name]
    w = {k: torch.empty(shape, device="meta") for k, shape in unet_layout(mult, blocks, attention, **other).items()}
    assert pinned(w) == expected
    model, s, channels, got = READERS["ddpm"](w, {})
    assert model == Model("unet", 128, mult, blocks, [16], head_channels=0, heads=1, style=style, resample=resample, clock=[1, -1] if style == "ddae" else [999, -1000])
    assert (channels, s["size"], s["path"], s["predict"]) == (3, size, "vp", "eps")
    with torch.device("meta"):
        own = build_model(model, size).state_dict()
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in own.items()}


def waves(shapes):
    """Weights of a formula, by the order of their names."""
    w = {}
    for i, (k, shape) in enumerate(sorted(shapes.items())):
        n = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        v = torch.sin(0.01 * n * n + 1.7 * n + i) * (2 / (n.numel() / shape[0])) ** 0.5 if len(shape) > 1 else 0.3 * torch.sin(n + i)
        w[k] = v.reshape(shape).float()
    return w


def fake_ddpm(folder, case):
    """A small file of one of these layouts: two levels, attention at the second. DDAE's lies in a file of its training."""
    shapes = unet_layout([1, 2], 1, [1], ddae=case != "ddpm", moved_by_blocks=case == "ddae blocks")
    w = waves(shapes)
    torch.save(w if case == "ddpm" else dict(MODEL={}, EMA={"step": torch.tensor(3)} | {f"ema_model.nn_model.{k}": v for k, v in w.items()}, opt={}), folder / "unet.pt")
    return f"ddpm:{folder / 'unet.pt'}"


# Outputs of the original programs with these weights: at steps 3 and 700 from 0; DDAE's at steps 4 and 701 from 1
DDPM_NUMBERS = {
    "ddpm": [0.115728, -0.027081, -0.274319, 0.101561, -0.022248, -0.24801], "ddae": [-0.207334, -0.262605, 0.072822, -0.232008, -0.225932, 0.041114],
    "ddae blocks": [0.186787, 0.490562, 0.001024, 0.205234, 0.43954, -0.067786],
}


@pytest.mark.parametrize("case", DDPM_NUMBERS)
def test_ddpm_computes_what_the_original_does(tmp_path, case):
    net, state = opened(fake_ddpm(tmp_path, case), 32)             # such networks take any size; two levels are read as those of 32 pixels
    t = 1 - (torch.tensor([3, 700]) + 1) / 1000
    out = net(inputs()[0], 1000 * t)
    assert out.shape == (2, 3, 16, 16) and out[:, :, 5, 7].flatten().tolist() == pytest.approx(DDPM_NUMBERS[case], abs=1e-5)
    assert torch.allclose(PATHS[state["path"]].alpha(t[:1].double()) ** 2, torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[3:4]), rtol=1e-5)


def iddpm_layout(channels, mult, blocks, attention, rows=0):
    """Our names are improved-diffusion's but for the convolutions that follow a doubling."""
    with torch.device("meta"):
        net = UNet(8 * 2 ** (len(mult) - 1), 3, 6, channels, mult, blocks, [2 ** (len(mult) + 2 - level) for level in attention], 0, num_labels=rows, heads=4, resample="conv")
    return {re.sub(r"(output_blocks\.\d+\.[12]\.)op", r"\1conv", k): (rows, *v.shape[1:]) if k == "label_emb.weight" else tuple(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("channels, mult, rows, size, expected", [(128, [1, 2, 2, 2], 0, 32, "001b621871f3fa9d"), (128, [1, 2, 3, 4], 0, 64, "5a42ef114f79713a"),
                                                                  (192, [1, 2, 3, 4], 1000, 64, "59179ffdc09597c8")])
def test_improved_diffusion_is_read_from_its_tensors(channels, mult, rows, size, expected):
    shapes = iddpm_layout(channels, mult, 3, [1, 2] if size == 32 else [2, 3], rows)
    w = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    assert pinned(w) == expected
    model, s, _, _ = READERS["adm"](w, {})
    assert model == Model("unet", channels, mult, 3, [16, 8], head_channels=0, heads=4, resample="conv", clock=[3999, -4000] if rows else [999.75, -1000])
    assert (s["size"], s["path"], s["predict"]) == (size, "vp-cosine", "eps")


def test_improved_diffusion_of_other_sizes_wants_to_be_told_its_heads(tmp_path):
    torch.save(waves(iddpm_layout(128, [1, 1], 1, [1])), tmp_path / "iddpm.pt")
    with pytest.raises(UserError, match="set published.heads"):
        opened(f"adm:{tmp_path / 'iddpm.pt'}", 16)


IDDPM_NUMBERS = [0.204393, 0.11234, -0.403537, 0.202131, -0.026321, -0.104497]             # of the original, at steps 3 and 2800 of 4000


def test_improved_diffusion_computes_what_the_original_does(tmp_path):
    torch.save(waves(iddpm_layout(128, [1, 1], 1, [1])), tmp_path / "iddpm.pt")
    net, state = opened(f"adm:{tmp_path / 'iddpm.pt'}", 16, heads=4, path="vp-cosine", clock=[999.75, -1000.0])
    t = 1 - (torch.tensor([3, 2800]) + 1) / 4000
    assert net(inputs()[0], 1000 * t)[:, :, 5, 7].flatten().tolist() == pytest.approx(IDDPM_NUMBERS, abs=1e-5)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    assert float(PATHS[state["path"]].alpha(t[1].double()) ** 2) == pytest.approx(f(2801 / 4000) / f(0), rel=1e-5)


def test_ddpm_files_that_do_not_fit(tmp_path):
    def said(w):
        torch.save(w, tmp_path / "x.pt")
        with pytest.raises(UserError) as e:
            opened(f"ddpm:{tmp_path / 'x.pt'}", 32)
        assert "\n" not in str(e.value)
        return str(e.value)

    w = waves(unet_layout([1, 1], 1, [1], ddae=True))
    assert "aug_emb" in said(w | {"time_emb.aug_emb.weight": torch.zeros(128, 9)})             # DDAE's EDM with augmentation
    assert "found a dict of MODEL, EMA" in said(dict(MODEL=w, EMA={"step": torch.tensor(1)}))
    assert "not the weights of a published ddpm model" in said({"time_embed.0.weight": torch.zeros(512, 128)})             # ADM's names
    assert "middle_block.1.norm.weight is missing" in said({k: v for k, v in w.items() if not k.startswith("middle.attn.norm")})
    assert "fewer than 128 channels" in said(waves(unet_layout([1, 2], 1, [1], channels=64)))
    for w in ({"EMA": {0: torch.zeros(1)}}, {"image_proj.weight": torch.zeros(())}, waves(unet_layout([1], 1, [])) | {"conv_in.bias": torch.zeros(())},
              waves(unet_layout([1], 1, [])) | {"conv_in.bias": torch.zeros(0)}):
        said(w)                                           # a line, whatever it is
    fake_ddpm(tmp_path, "ddpm")
    with pytest.raises(UserError, match="inputs of 3 x 32 x 32, this run's are 3 x 16 x 16"):
        opened(f"ddpm:{tmp_path / 'unet.pt'}", 16)


def test_chain_from_ddae(tmp_path, monkeypatch):
    """Features, labels, guided fine-tuning and samples from the file of a training of DDAE."""
    name, yaml = fake_ddpm(tmp_path, "ddae"), tmp_path / "ddae.yaml"
    yaml.write_text(f"""
data: {{source: shapes, train: 48, test: 16, size: 8}}
published: {{size: 8}}
extract_features: {{checkpoint: "{name}", activations: [up-level1-repeat1-res-out], t: [0.9], precision: fp32}}
self_label: {{K: 2, restarts: 1}}
train_guided: {{init: "{name}", path: vp, predict: eps, images: 16, batch: 8, grid_every: 1M, precision: fp32}}
sample_ode: {{n: 4, solver: ddim, steps: 2, evaluate: false, precision: fp32}}
""")

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(yaml), f"run={tmp_path / 'run'}", *words])
        importlib.import_module(name).main()

    run("train_diffusion", "--prepare")
    run("extract_features")
    run("self_label", "method=kmeans")
    run("train_guided", "labels=kmeans")
    run("sample_ode", "checkpoint=guided/kmeans", "guidance=1.5", "name=kmeans")
    state = torch.load(tmp_path / "run/guided/kmeans/checkpoint.pt", weights_only=True)
    assert state["num_labels"] == 2 and (state["model"]["style"], state["model"]["clock"]) == ("ddae", [1, -1])
    own = torch.load(tmp_path / "unet.pt", weights_only=True)["EMA"]["ema_model.nn_model.down.0.res.conv1.weight"]
    assert (state["net"]["input_blocks.1.0.in_layers.2.weight"] - own).abs().max() < 0.01                        # it started from them
    assert np.load(tmp_path / "run/samples/kmeans/images.npy").shape == (4, 3, 8, 8)


def test_styles_train_from_scratch():
    """Every style and resampling is a network like others: names for all activations, a gradient for every weight."""
    for style in ("adm", "ddpm", "ddae"):
        for resample in ("block", "conv"):
            net = build_model(Model(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=8, style=style, resample=resample), 8, num_labels=3)
            names = list(catalogue(net))
            assert ("down-level0-downsampler-out" in names) and ("up-level0-upsampler-out" in names)
            for p in net.parameters():                    # zeros at the start of residual branches would hide what is behind them
                torch.nn.init.normal_(p, std=0.1)
            net(torch.randn(2, 3, 8, 8), torch.tensor([100.0, 900.0]), torch.tensor([0, 3])).square().mean().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()), (style, resample)


# ---------------------------------------------------------------------------------------------------------------------
# DDPM's CIFAR-10 network through diffusers


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

"""Models of other programs: diffusers' networks and torch.hub encoders, as tiny random ones saved to disk."""
import json
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import extract_features
from configs.data import torchvision_datasets
from configs.run import Run, UserError
from extract_features import ExtractFeatures, as_map, catalogue, open_foreign, reader, stream
from train_diffusion import diffuse

BLOCKS = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
CROSS = dict(attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **BLOCKS)
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
           **BLOCKS)
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
WORDS = ["data.train=160", "data.test=40"]                # of small_run


class Here:
    """As much of a Run as opening a model needs."""
    device, data, rank, world, dry_run = torch.device("cpu"), type("Data", (), dict(size=32)), 0, 1, False
    wait, turns = staticmethod(lambda: None), classmethod(Run.turns)


def opened(model, **options):
    return open_foreign(Here, ExtractFeatures(model=str(model), **options))


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, words)])
    extract_features.main()


def through(net, x_t, time, names):
    """Maps of one pass through hooks."""
    return dict(zip(names, reader(net, names, "none")(x_t, torch.ones(len(x_t)) if time is None else time / 1000)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny pipelines on disk: a DDPM, and a DiT with autoencoder."""
    torchvision_datasets()                                # lets diffusers be imported beside a CPU-only torch
    diffusers, path = pytest.importorskip("diffusers"), tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=32, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **BLOCKS)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(path / "unet")
    dit = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                          num_layers=3, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=8)
    vae, scheduler = diffusers.AutoencoderKL(scaling_factor=0.5, **VAE), diffusers.DDIMScheduler(**NOISE)
    diffusers.DiTPipeline(dit, vae, scheduler).save_pretrained(path / "dit")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Networks of diffusers

def test_unet_of_diffusers(folder):
    """Names of our scheme; hooks give what a pass by diffusers' own modules gives; the clock is theirs."""
    import diffusers
    net, state = opened(f"diffusers:{folder / 'unet'}")
    names = list(catalogue(net))
    assert {"unet-after-conv-in", "down-level1-repeat0-vit-block0-self-q", "down-level0-downsampler-out",
            "mid-repeat1-res-out", "mid-repeat0-vit-out", "up-level0-repeat1-res-increment",
            "up-level0-upsampler-out", "up-level1-repeat1-res-out", "unet-out"} <= set(names)
    assert names.index("mid-repeat1-res-out") < names.index("up-level0-repeat0-res-out")
    assert not any("." in n for n in names)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet", subfolder="unet").eval()
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([950.0, 300.0])
    read = ("mid-repeat1-res-out", "down-level1-repeat0-vit-block0-self-q", "unet-out")
    middle, q, out = (through(net, x, t, [n])[n] for n in read)
    with torch.no_grad():
        emb, h = theirs.time_embedding(theirs.time_proj(999 - t)), theirs.conv_in(x)
        for block in theirs.down_blocks:
            h, _ = block(h, emb)
        assert torch.allclose(middle, theirs.mid_block(h, emb), atol=1e-5)
        assert torch.allclose(out, theirs(x, 999 - t).sample, atol=1e-5)
    assert q.shape == (2, 64, 16, 16) and state["size"] == 32
    path, i = state["path"], torch.tensor([0, 500, 999])
    abar = diffusers.DDPMScheduler().alphas_cumprod[i]
    assert torch.allclose(path.alpha(1 - (i + 1) / 1000), abar.sqrt(), atol=1e-5)
    assert torch.allclose(path.sigma(1 - (i + 1) / 1000), (1 - abar).sqrt(), atol=1e-4)


def test_ddpm_of_cifar10(tmp_path):
    """Settings and folder of google/ddpm-cifar10-32, but narrow: one head, convolutions with stride, network and
    scheduler in one folder, older names in attention."""
    torchvision_datasets()
    diffusers, safetensors = pytest.importorskip("diffusers"), pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(16, 32, 32, 32), layers_per_block=2, norm_num_groups=8, norm_eps=1e-6,
        attention_head_dim=None, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1).eval()
    theirs.save_pretrained(tmp_path)
    diffusers.DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path)             # not the default: is it read?
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1", "scheduler": ["diffusers", "DDPMScheduler"],
             "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    file, older = tmp_path / "diffusion_pytorch_model.safetensors", dict(to_q="query", to_k="key", to_v="value")
    w = {k.replace("to_out.0", "proj_attn"): v for k, v in safetensors.load_file(file).items()}
    for ours, was in older.items():
        w = {k.replace(ours, was): v for k, v in w.items()}
    assert sum("query" in k for k in w) == 2 * (2 + 3 + 1)                       # weights and biases
    safetensors.save_file(w, file, metadata={"format": "pt"})

    net, state = opened(f"diffusers:{tmp_path}")
    x, i = torch.randn(2, 3, 32, 32), torch.tensor([0, 11, 500, 999])
    abar = np.cumprod(1 - np.linspace(1e-4, 0.03, 1000))[i]                      # step i is our t = 1 - (i + 1) / 1000
    assert np.allclose(state["path"].alpha((1 - (i + 1) / 1000).double()) ** 2, abar, rtol=1e-4)
    names = ["mid-repeat1-res-out", "up-level2-repeat0-vit-block0-self-q", "down-level1-downsampler-out", "unet-out"]
    got = [through(net, x, 999.0 - i[1:3], [n])[n] for n in names]
    assert [tuple(v.shape[1:]) for v in got] == [(32, 4, 4), (32, 16, 16), (32, 8, 8), (3, 32, 32)]
    with torch.no_grad():
        assert torch.allclose(got[3], theirs(x, i[1:3]).sample, atol=1e-5)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """Tiny pipelines with text encoders, saved to disk: {name: pipeline}, folder."""
    torchvision_datasets()
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("prompted")
    (path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    words = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=6)
    clip = transformers.CLIPTextConfig(
        vocab_size=4, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=8)
    plain, projected = transformers.CLIPTextModel(clip), transformers.CLIPTextModelWithProjection(clip)
    unet, vae = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL(**VAE)
    latent, noise = dict(sample_size=8, in_channels=4, out_channels=4, **CROSS), diffusers.DDIMScheduler(**NOISE)
    sized = dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    pipes = {
        "sd": diffusers.StableDiffusionPipeline(vae, plain, words, unet(cross_attention_dim=12, **latent), noise, None,
                                                None, requires_safety_checker=False),
        "sdxl": diffusers.StableDiffusionXLPipeline(vae, plain, projected, words, words,
                                                    unet(cross_attention_dim=24, **sized, **latent), noise)}
    for name, pipe in pipes.items():
        pipe.save_pretrained(path / name)
    return pipes, path


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pipelines_with_text(prompted, name):
    """The network is called as the pipeline calls it for the empty prompt: its output equals a call by hand."""
    pipes, path = prompted
    own, _ = opened(f"diffusers:{path / name}")
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 250.0])
    how = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    text, *rest = pipes[name].encode_prompt(prompt="", **how)
    twice = lambda v: torch.cat([v, v])
    more = {}
    if name == "sdxl":
        sizes = torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
        more = dict(added_cond_kwargs=dict(text_embeds=twice(rest[1]), time_ids=sizes))
    with torch.no_grad():
        want = pipes[name].unet.eval()(x, 999 - time, twice(text), **more).sample
        assert torch.allclose(own(x, time), want, atol=1e-5) and want.std() > 0
    names = list(catalogue(own))                          # text has no place in the image
    assert "down-level0-repeat0-vit-block0-ffn-inner" in names and not any(n.endswith("cross-k") for n in names)
    query = "down-level0-repeat0-vit-block0-cross-q"
    assert through(own, x, time, [query])[query].shape == (2, 32, 8, 8)


def test_transformer_with_autoencoder(folder):
    """Latents are the scaled mean of its own autoencoder, images are resized to what it was made for; the null label is
    the condition."""
    import diffusers
    net, state = opened(f"diffusers:{folder / 'dit'}")
    pipe = diffusers.DiTPipeline.from_pretrained(folder / "dit")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    x = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        small = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
        z = pipe.vae.eval().encode(small).latent_dist.mean * 0.5
        assert torch.allclose(net.encode(x), z, atol=1e-5) and z.shape == (3, 4, 8, 8)
        label = torch.full((3,), 10)
        want = pipe.transformer.eval()(z, timestep=torch.full((3,), 199.0), class_labels=label).sample
        assert torch.allclose(net(z, torch.full((3,), 800.0)), want, atol=1e-5)
    names = ["vit-block1-out", "vit-block1-self-k"]
    options = dict(device="cpu", context=nullcontext, pool="none")
    _, out = next(stream(net, state, images, np.arange(3), names, [0.8, 0.9], **options))
    assert out[names[0], 0.8].shape == (3, 16, 4, 4) and out[names[1], 0.9].shape == (3, 16, 4, 4)
    abar, path = pipe.scheduler.alphas_cumprod[99].double(), state["path"]
    assert float(path.alpha(torch.tensor(0.9, dtype=torch.float64))) == pytest.approx(float(abar.sqrt()), abs=1e-6)
    noisy = diffuse(path, z, torch.ones_like(z), torch.full((3,), 0.9))
    assert torch.allclose(noisy, abar.sqrt().float() * z + (1 - abar).sqrt().float(), atol=1e-5)


def test_networks_of_latents_without_their_autoencoder_are_refused(folder, tmp_path):
    """Also where an autoencoder of another kind makes three channels, so that images would pass for latents."""
    import diffusers
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", subfolder="unet")
    vq = diffusers.VQModel(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                           block_out_channels=(8,), norm_num_groups=8)
    diffusers.LDMPipeline(vq, unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="latents of an AutoencoderKL"):
        opened(f"diffusers:{tmp_path}")


def test_the_autoencoder_is_in_the_hash(folder, tmp_path):
    import diffusers
    pipe = diffusers.DiTPipeline.from_pretrained(folder / "dit")
    torch.nn.init.ones_(pipe.vae.quant_conv.bias)
    pipe.save_pretrained(tmp_path)
    hashes = [opened(f"diffusers:{model}")[1]["weights"] for model in (folder / "dit", tmp_path, folder / "dit")]
    assert hashes[0] == hashes[2] != hashes[1]


def test_extracting_from_them(monkeypatch, capsys, folder, tiny, small_run):
    words = [tiny, f"run={small_run}", *WORDS, f"model=diffusers:{folder / 'dit'}"]
    called(monkeypatch, *words, "--list")
    assert capsys.readouterr().out.splitlines()[-1].startswith("unet-out")
    called(monkeypatch, *words, "name=dit", "activations=vit-block?-out", "t=0.9")
    info = json.loads((small_run / "features/dit/info.json").read_text())
    assert info["shapes"] == [[16]] * 3 and info["checkpoint"].startswith("diffusers:") and info["arrays"][0]["rho"] > 0
    assert np.load(small_run / "features/dit/test-vit-block2-out-t0.9.npy").shape == (40, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders of torch.hub

HUB = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.norm = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.norm(self.block(torch.cat([x.mean(1, keepdim=True), x], 1)))[:, 0]

class Named(Tiny):
    def forward(self, x):
        return dict(out=super().forward(x))

def tiny(pretrained=True):
    torch.manual_seed(0)
    return Tiny()

def named(pretrained=True):
    torch.manual_seed(0)
    return Named()
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    (path / "hubconf.py").write_text(HUB)
    return path


def test_encoders(monkeypatch, hub, tiny, small_run):
    """From a local directory: normalised images without noise, maps behind the class token."""
    net, _ = opened(f"hub:{hub}/tiny", resize=32)
    assert list(catalogue(net)) == ["embed", "block", "norm", "out"]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    want = (x / 2 + 0.5 - mean) / std
    assert torch.allclose(net.encode(x), want, atol=1e-5)
    assert through(net, want, None, ["norm"])["norm"].shape == (2, 8, 2, 2)
    other, _ = opened(f"hub:{hub}/named", resize=32)      # as torchvision's models of segmentation, it returns a dict
    assert torch.equal(through(other, want, None, ["out"])["out"], through(net, want, None, ["out"])["out"])
    load = extract_features.load_data                     # a run's own models see its latents, others its images
    latents = np.zeros((40, 2, 8, 4, 4), np.float16)
    monkeypatch.setattr(extract_features, "load_data", lambda *a: replace(load(*a), latents=latents))
    words = [tiny, f"run={small_run}", *WORDS, f"model=hub:{hub}/tiny"]
    words += ["name=hub", "resize=32", "draws=2"]
    called(monkeypatch, *words)
    images = torch.from_numpy(np.load(small_run / "data/test/images.npy")).float() / 127.5 - 1
    got = np.load(small_run / "features/hub/test-out-t1.npy")
    assert np.allclose(got, net.net(net.encode(images)), atol=1e-5)
    assert json.loads((small_run / "features/hub/info.json").read_text())["arrays"][0]["rho"] == 0


def test_processes_open_a_model_one_after_the_other(monkeypatch, hub):
    seen, opens = [], extract_features.open_encoder
    monkeypatch.setattr(extract_features, "open_encoder", lambda *a: seen.append("opened") or opens(*a))
    wait = staticmethod(lambda: seen.append("waited"))
    second = type("Second", (Here,), dict(rank=1, world=3, wait=wait))
    open_foreign(second, ExtractFeatures(model=f"hub:{hub}/tiny", resize=32))
    assert seen == ["waited", "opened", "waited", "waited"]


def test_tokens_and_vectors_as_maps():
    x = torch.arange(2 * 17 * 3.0).reshape(2, 17, 3)
    assert torch.equal(as_map(x)[:, :, 1, 2], x[:, 1 + 6]) and as_map((x, 1)).shape == (2, 3, 4, 4)
    assert as_map(torch.zeros(2, 5)).shape == (2, 5, 1, 1)
    assert as_map(torch.zeros(2, 77, 3)) is None and as_map("no") is None and as_map(()) is None


@pytest.mark.parametrize("words, said", [
    (["model=diffusers:/nowhere"], "cannot be loaded"), (["model=hub:/nowhere/x"], "cannot be loaded"),
    (["model=hub:HUB/none"], "cannot be loaded"),
    (["model=hub:HUB/tiny", "resize=32", "activations=nrom"], "nearest: norm")])
def test_bad_input(refuse, tiny, small_run, hub, words, said):
    words = [w.replace("HUB", str(hub)) for w in words]
    assert said in refuse("extract_features", tiny, f"run={small_run}", *WORDS, "name=bad", *words)


def test_without_diffusers(monkeypatch, refuse, tiny, small_run):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = [tiny, f"run={small_run}", *WORDS, "model=diffusers:x", "activations=mid*", "t=0.5"]
    assert "import of diffusers" in refuse("extract_features", *words)

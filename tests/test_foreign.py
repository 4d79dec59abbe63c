"""Models of other programs: diffusers' networks, torch.hub and TorchScript encoders, as tiny random ones saved to disk."""
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_dense import WORDS, run  # noqa: F401  (run is a fixture)
from test_probe_heads import called

import extract_features
from extract_features import ExtractFeatures, as_map, attended, catalogue, encoded, open_foreign, reader, stream, text_embedding
from configs.data import torchvision_datasets
from configs.run import Run, UserError
from train_diffusion import PATHS, diffuse

BLOCKS = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)


class Here:
    """As much of a Run as opening a model needs."""
    device, data, rank, world, dry_run = torch.device("cpu"), type("Data", (), dict(size=32)), 0, 1, False
    wait, turns = staticmethod(lambda: None), classmethod(Run.turns)


def opened(model, **options):
    return open_foreign(Here, ExtractFeatures(model=str(model), **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models on disk: an unconditional U-Net, one with text, a DiT pipeline with autoencoder and scheduler."""
    torchvision_datasets()                                # lets torchvision, and so diffusers, be imported beside a CPU-only torch
    diffusers, path = pytest.importorskip("diffusers"), tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    diffusers.UNet2DModel(sample_size=32, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
                          **BLOCKS).save_pretrained(path / "unet")
    diffusers.UNet2DConditionModel(sample_size=16, in_channels=3, out_channels=3, cross_attention_dim=12, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                   up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **BLOCKS).save_pretrained(path / "text")
    dit = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=8)
    vae = diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5, **BLOCKS)
    diffusers.DiTPipeline(dit, vae, diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)).save_pretrained(path / "dit")
    return path


def through(net, x_t, time, names):
    """Maps of one pass through hooks."""
    return dict(zip(names, reader(net, names, "none")(x_t, torch.ones(len(x_t)) if time is None else time / 1000)))


def test_unet_of_diffusers(folder):
    """Names of our scheme; hooks give what a pass written with diffusers' own modules gives; the clock is theirs."""
    import diffusers
    net, state = opened(f"diffusers:{folder / 'unet'}")
    names = list(catalogue(net))
    assert {"unet-after-conv-in", "down-level1-repeat0-vit-block0-self-q", "down-level0-downsampler-out", "mid-repeat1-res-out", "mid-repeat0-vit-out",
            "up-level0-repeat1-res-increment", "up-level0-upsampler-out", "up-level1-repeat1-res-out", "unet-out"} <= set(names)
    assert names.index("mid-repeat1-res-out") < names.index("up-level0-repeat0-res-out") and not any("." in n for n in names)
    theirs, x, t = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval(), torch.randn(2, 3, 32, 32), torch.tensor([950.0, 300.0])
    step = 999 - t
    got = [through(net, x, t, [n])[n] for n in ("mid-repeat1-res-out", "down-level1-repeat0-vit-block0-self-q", "unet-out")]
    with torch.no_grad():
        emb, h = theirs.time_embedding(theirs.time_proj(step)), theirs.conv_in(x)
        for block in theirs.down_blocks:
            h, _ = block(h, emb)
        assert torch.allclose(got[0], theirs.mid_block(h, emb), atol=1e-5) and torch.allclose(got[2], theirs(x, step).sample, atol=1e-5)
    assert got[1].shape == (2, 64, 16, 16) and state["size"] == 32
    path, i = PATHS[state["path"]], torch.tensor([0, 500, 999])
    abar = diffusers.DDPMScheduler().alphas_cumprod[i]
    assert torch.allclose(path.alpha(1 - (i + 1) / 1000), abar.sqrt(), atol=1e-5) and torch.allclose(path.sigma(1 - (i + 1) / 1000), (1 - abar).sqrt(), atol=1e-4)


def test_score_maps_and_skips_of_diffusers(folder, tmp_path):
    """Softmax of the scores by hand from their own projections, for image and text; a skip is what the mirrored place of the way down gave."""
    np.save(tmp_path / "e.npy", e := np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32))
    for model, options in ((folder / "unet", {}), (folder / "text", dict(embedding=str(tmp_path / "e.npy")))):
        net, _ = opened(f"diffusers:{model}", **options)
        names, side = list(catalogue(net)), net.net.config.sample_size
        x, t = torch.randn(2, 3, side, side), torch.full((2,), 700.0)
        maps = [n for n in names if n.endswith("-map")]
        got = through(net, x, t, names)
        assert len(maps) == (4 if not options else 8) and len([n for n in names if n.endswith("-skip")]) == 4
        for name in maps:
            q, a = got[f"{name[:-3]}q"], got[name]
            k = got[f"{name[:-3]}k"] if "self" in name else None
            path = next(p for p, m in net.net.named_modules() if m is catalogue(net)[name][0])
            heads = net.net.get_submodule(path[:-5]).heads
            if k is None:
                with torch.no_grad():
                    k = net.net.get_submodule(path)(torch.from_numpy(e).expand(2, -1, -1)).transpose(1, 2)      # [B, C, tokens]
            split = lambda v: v.flatten(2).unflatten(1, (heads, -1))
            want = torch.einsum("bhdq,bhdk->bhkq", split(q), split(k)) / (q.shape[1] // heads) ** 0.5
            assert torch.allclose(a, want.softmax(2).flatten(1, 2).unflatten(2, a.shape[2:]), atol=1e-5)
            assert torch.equal(through(net, x, t, [name])[name], a)
        assert torch.equal(got["up-level1-repeat1-skip"], got["unet-after-conv-in"])
        assert torch.equal(got["up-level0-repeat0-skip"], got["down-level1-repeat0-vit-out" if not options else "down-level1-repeat0-res-out"])


def test_unet_with_text(monkeypatch, folder, tmp_path, refuse, tiny, run):  # noqa: F811
    """A given embedding is what it attends to; without one, or with a wrong one, it is an error."""
    import diffusers
    words = [tiny, f"run={run}", *WORDS[:2], f"model=diffusers:{folder / 'text'}", "activations=mid*", "t=0.5"]
    assert "embedding=FILE.npy" in refuse("extract_features", *words)
    np.save(tmp_path / "wide.npy", np.ones((4, 13), np.float32))
    assert "must be [tokens, 12]" in refuse("extract_features", *words, f"embedding={tmp_path / 'wide.npy'}")
    np.save(tmp_path / "e.npy", e := np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32))
    net, _ = opened(f"diffusers:{folder / 'text'}", embedding=str(tmp_path / "e.npy"))
    theirs, x = diffusers.UNet2DConditionModel.from_pretrained(folder / "text").eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(net(x, torch.full((2,), 700.0)), theirs(x, 299, torch.from_numpy(e).expand(2, -1, -1)).sample, atol=1e-5)
    q = through(net, x, torch.full((2,), 700.0), [n := "down-level0-repeat0-vit-block0-cross-q"])[n]
    assert q.shape == (2, 32, 16, 16) and "down-level0-repeat0-vit-block0-ffn-inner" in catalogue(net) and not any(n.endswith(("cross-k", "cross-v")) for n in catalogue(net))
    words = [*words[:-2], "activations=mid-repeat1-res-out", "t=0.5", f"embedding={tmp_path / 'e.npy'}", "splits=test", "name=text"]
    called(monkeypatch, extract_features, *words)
    np.save(tmp_path / "e.npy", 2 * e)
    assert "embedding" in refuse("extract_features", *words).split("made with")[1].split(".")[0]                 # another text in a file of the same name


TEXT = dict(vocab_size=4, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, pad_token_id=1)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """Tiny pipelines with text encoders, saved to disk: {name: (folder, width of the text)}."""
    torchvision_datasets()
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("prompted")
    (path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    words = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=6)
    clip, vae = transformers.CLIPTextConfig(**TEXT, projection_dim=8), dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS)
    plain, projected = transformers.CLIPTextModel(clip), [transformers.CLIPTextModelWithProjection(clip) for _ in range(2)]
    unet = dict(sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **BLOCKS)
    noise, flow = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vit = dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8)
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=8, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1)).eval()
    pipes = {
        "sd": diffusers.StableDiffusionPipeline(diffusers.AutoencoderKL(latent_channels=4, **vae), plain, words, diffusers.UNet2DConditionModel(cross_attention_dim=12, **unet), noise, None, None,
                                                requires_safety_checker=False),
        "sdxl": diffusers.StableDiffusionXLPipeline(diffusers.AutoencoderKL(latent_channels=4, **vae), plain, projected[0], words, words, diffusers.UNet2DConditionModel(
            cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 24, **unet), noise),
        "sd3": diffusers.StableDiffusion3Pipeline(diffusers.SD3Transformer2DModel(in_channels=4, out_channels=4, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16,
                                                                                 pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm", **vit), flow, diffusers.AutoencoderKL(latent_channels=4, shift_factor=0.1, **vae),
                                                  projected[0], words, projected[1], words, None, None),
        "pixart": diffusers.PixArtAlphaPipeline(Words(), t5, diffusers.AutoencoderKL(latent_channels=4, **vae), diffusers.PixArtTransformer2DModel(
            in_channels=4, out_channels=8, cross_attention_dim=24, caption_channels=12, use_additional_conditions=True, **vit | dict(num_attention_heads=3)), noise)}
    for name in ("sd", "sdxl"):                           # the others lack a text encoder, or have a stand-in for a tokenizer: such parts are not saved
        pipes[name].save_pretrained(path / name)
    return pipes, path


class Words:
    """A tokenizer for T5 with the interface of transformers: of the empty prompt an end and padding."""
    model_max_length = 120

    def __call__(self, text, max_length=120, **_):
        ids = torch.zeros(len(text), max_length, dtype=torch.long)
        ids[:, 0] = 1
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())

    def batch_decode(self, ids):
        return [""]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart"])
def test_pipelines_with_text(monkeypatch, prompted, name):
    """The network is called as the pipeline calls it for the empty prompt: its output equals a call written out by hand."""
    pipes, path = prompted
    pipe, net = pipes[name], (pipes[name].unet if name.startswith("sd") and name != "sd3" else pipes[name].transformer).eval()
    if name in ("sd3", "pixart"):
        import diffusers
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda where, **_: pipe)
    own, state = opened(f"diffusers:{path / name}")
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 250.0])
    text, *rest = pipe.encode_prompt(**dict(prompt="", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False) | (dict(prompt_2="", prompt_3="") if name == "sd3" else {}))
    twice = lambda v: torch.cat([v, v])
    with torch.no_grad():
        if name == "sd":
            want = net(x, 999 - time, twice(text)).sample
        if name == "sdxl":
            want = net(x, 999 - time, twice(text), added_cond_kwargs=dict(text_embeds=twice(rest[1]), time_ids=torch.tensor([[16, 16, 0, 0, 16, 16]] * 2))).sample
        if name == "sd3":
            want = net(x, encoder_hidden_states=twice(text), pooled_projections=twice(rest[1]), timestep=1000 - time).sample
        if name == "pixart":
            assert rest[0].sum() == 1 < rest[0].numel()   # padding is masked
            more = dict(resolution=torch.full((2, 2), 16.0), aspect_ratio=torch.ones(2, 1))
            want = net(x, encoder_hidden_states=twice(text), timestep=999 - time, added_cond_kwargs=more, encoder_attention_mask=twice(rest[0])).sample
        assert torch.allclose(own(x, time), want, atol=1e-5) and want.std() > 0
    level, names = PATHS[state["path"]], list(catalogue(own))
    if name == "sd3":                                     # its clock is the share of noise of a straight path
        assert float(level.alpha(torch.tensor(0.3))) == pytest.approx(0.3) and float(level.sigma(torch.tensor(0.3))) == pytest.approx(0.7, abs=1e-4)
        image = torch.rand(1, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            assert torch.allclose(encoded(own, image), (pipe.vae.eval().encode(image).latent_dist.mean - 0.1) * pipe.vae.config.scaling_factor, atol=1e-5)
    if name in ("sd3", "pixart"):
        assert {"vit-block0-out", "vit-block1-self-q", "vit-block1-ffn-out", "vit-block1-self-out"} <= set(names)
        assert not [n for n in names if re.search("context|caption|add_|added", n)]                                # what sees the text alone
        assert not any(n.endswith("cross-map") for n in names) and ("vit-block1-self-map" in names) == (name == "pixart")         # padding; text and image together
        assert name != "sd3" or {"vit-block0-attn_second-self-q", "vit-block0-attn_second-self-map"} <= set(names)             # two attentions of the image
        block, kept = net.transformer_blocks[1], []
        hook = block.register_forward_hook(lambda m, args, out: kept.append(out[1] if name == "sd3" else out))
        with torch.no_grad():
            if name == "sd3":
                net(x, encoder_hidden_states=twice(text), pooled_projections=twice(rest[1]), timestep=1000 - time)
            else:
                net(x, encoder_hidden_states=twice(text), timestep=999 - time, added_cond_kwargs=more, encoder_attention_mask=twice(rest[0]))
        hook.remove()
        assert torch.allclose(through(own, x, time, ["vit-block1-out"])["vit-block1-out"], kept[0].transpose(1, 2).unflatten(2, (4, 4)), atol=1e-5)


def test_what_is_asked_for_but_not_given(prompted):
    """SDXL's refiner wants a score, some pipelines fail on the empty prompt: one line each."""
    pipes, path = prompted
    index = path / "sdxl" / "model_index.json"
    text = index.read_text()
    index.write_text(json.dumps(json.loads(text) | {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}))
    with pytest.raises(UserError, match="further conditions"):
        opened(f"diffusers:{path / 'sdxl'}")
    index.write_text(text)
    broken = SimpleNamespace(text_encoder=1, encode_prompt=lambda prompt, **_: 1 / 0)
    with pytest.raises(UserError, match="empty prompt .division by zero"):
        text_embedding(ExtractFeatures(model="diffusers:x"), broken, 12, "UNet2DConditionModel")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_do_not_overflow_under_autocast(dtype):
    q, k = 60 * torch.randn(2, 3, 5, 64), 60 * torch.randn(2, 3, 7, 64)
    with torch.autocast("cpu", dtype):
        a = attended(q.to(dtype), k.to(dtype))
    want = (q.to(dtype).double() @ k.to(dtype).double().transpose(2, 3) / 8).softmax(3)
    assert a.dtype == torch.float32 and torch.allclose(a.double(), want, atol=1e-3)


def test_given_text_in_place_of_the_empty_prompt(monkeypatch, prompted, tmp_path):
    """Of a given text no summary is known: zeros. Text encoders are not loaded for it."""
    pipes, path = prompted
    import transformers
    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", lambda *a, **k: 1 / 0)
    np.save(tmp_path / "e.npy", e := np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32))
    own, _ = opened(f"diffusers:{path / 'sdxl'}", embedding=str(tmp_path / "e.npy"))
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 250.0])
    with torch.no_grad():
        more = dict(text_embeds=torch.zeros(2, 8), time_ids=torch.tensor([[16, 16, 0, 0, 16, 16]] * 2))
        want = pipes["sdxl"].unet.eval()(x, 999 - time, torch.from_numpy(e).expand(2, -1, -1), added_cond_kwargs=more).sample
        assert torch.allclose(own(x, time), want, atol=1e-5)


def test_transformer_with_autoencoder(folder):
    """Latents are the scaled mean of its own autoencoder, images are resized to what it was made for; the null label is the condition."""
    import diffusers
    net, state = opened(f"diffusers:{folder / 'dit'}")
    pipe, images = diffusers.DiTPipeline.from_pretrained(folder / "dit"), np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    x = torch.from_numpy(images).float() / 127.5 - 1
    with torch.no_grad():
        small = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
        z = pipe.vae.eval().encode(small).latent_dist.mean * 0.5
        assert torch.allclose(encoded(net, x), z, atol=1e-5) and z.shape == (3, 4, 8, 8)
        want = pipe.transformer.eval()(z, timestep=torch.full((3,), 199.0), class_labels=torch.full((3,), 10)).sample
        assert torch.allclose(net(z, torch.full((3,), 800.0)), want, atol=1e-5)
    _, out = next(stream(net, state, images, np.arange(3), ["vit-block1-out", "vit-block1-self-k"], [0.8, 0.9], device="cpu", context=nullcontext,
                         pool="none"))
    assert out["vit-block1-out", 0.8].shape == (3, 16, 4, 4) and out["vit-block1-self-k", 0.9].shape == (3, 16, 4, 4)
    abar = pipe.scheduler.alphas_cumprod[99].double()
    assert float(PATHS[state["path"]].alpha(torch.tensor(0.9, dtype=torch.float64))) == pytest.approx(float(abar.sqrt()), abs=1e-6)
    noisy = diffuse(PATHS[state["path"]], z, torch.ones_like(z), torch.full((3,), 0.9))
    assert torch.allclose(noisy, abar.sqrt().float() * z + (1 - abar).sqrt().float(), atol=1e-5)


def test_more_than_the_weights_is_in_the_hash(folder, folder_of_hub, tmp_path):
    """The autoencoder, the text, the code of a script."""
    import diffusers
    pipe = diffusers.DiTPipeline.from_pretrained(folder / "dit")
    torch.nn.init.ones_(pipe.vae.quant_conv.bias)
    pipe.save_pretrained(tmp_path / "dit")
    np.save(tmp_path / "a.npy", np.zeros((5, 12), np.float32)), np.save(tmp_path / "b.npy", np.ones((5, 12), np.float32))
    for k, f in enumerate((lambda x: x.float().mean((2, 3)), lambda x: x.float().amax((2, 3)))):
        torch.jit.trace(f, torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).save(str(tmp_path / f"{k}.pt"))
    models = [(f"diffusers:{folder / 'dit'}", {}), (f"diffusers:{tmp_path / 'dit'}", {}), *[(f"diffusers:{folder / 'text'}", dict(embedding=str(tmp_path / f"{e}.npy"))) for e in "ab"],
              *[(tmp_path / f"{k}.pt", {}) for k in (0, 1)]]
    hashes = [opened(m, **options)[1]["weights"] for m, options in models]
    assert len(set(hashes)) == 6 and hashes[0] == opened(f"diffusers:{folder / 'dit'}")[1]["weights"]


def test_extracting_from_them(monkeypatch, capsys, folder, tiny, run):  # noqa: F811
    words = [tiny, f"run={run}", *WORDS[:2], f"model=diffusers:{folder / 'dit'}"]
    called(monkeypatch, extract_features, *words, "--list")
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "100%"
    called(monkeypatch, extract_features, *words, "name=dit", "activations=vit-block?-out", "t=0.9", "splits=test")
    info = json.loads((run / "features/dit/info.json").read_text())
    assert info["shapes"] == [[16]] * 3 and info["checkpoint"].startswith("diffusers:") and info["arrays"][0]["rho"] > 0
    assert np.load(run / "features/dit/test-vit-block2-out-t0.9.npy").shape == (40, 16)


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

def tiny(pretrained=True):
    torch.manual_seed(0)
    return Tiny()
"""


def test_encoders(monkeypatch, folder_of_hub, tiny, run):  # noqa: F811
    """torch.hub from a local directory: normalised images, maps behind the class token; TorchScript: uint8 images; both without noise."""
    words = [tiny, f"run={run}", *WORDS[:2], "splits=test"]
    net, state = opened(f"hub:{folder_of_hub}/tiny", resize=32)
    assert list(catalogue(net)) == ["embed", "block", "norm", "out"]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    want = (x / 2 + 0.5 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(encoded(net, x), want, atol=1e-5) and through(net, want, None, ["norm"])["norm"].shape == (2, 8, 2, 2)
    called(monkeypatch, extract_features, *words, f"model=hub:{folder_of_hub}/tiny", "name=hub", "resize=32")
    images = torch.from_numpy(np.load(run / "data/test/images.npy")).float() / 127.5 - 1
    with torch.no_grad():
        assert np.allclose(np.load(run / "features/hub/test-out-t1.npy"), net.net(net.encode(images)), atol=1e-5)
    script = torch.jit.trace(Mean(), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    script.save(str(folder_of_hub / "mean.pt"))
    latents, load = np.zeros((40, 2, 8, 4, 4), np.float16), extract_features.load_data                          # of the run's own models: others see images
    monkeypatch.setattr(extract_features, "load_data", lambda *a: replace(load(*a), latents=latents))
    called(monkeypatch, extract_features, *words, f"model={folder_of_hub / 'mean.pt'}", "name=script")
    assert np.allclose(np.load(run / "features/script/test-out-t1.npy"), np.load(run / "data/test/images.npy").mean((2, 3)), atol=1e-4)


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


@pytest.fixture(scope="module")
def folder_of_hub(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    (path / "hubconf.py").write_text(HUB)
    return path


def test_processes_open_a_model_one_after_the_other(monkeypatch, folder_of_hub):
    seen, opens = [], extract_features.open_encoder
    monkeypatch.setattr(extract_features, "open_encoder", lambda *a: seen.append("opened") or opens(*a))
    second = type("Second", (Here,), dict(rank=1, world=3, wait=staticmethod(lambda: seen.append("waited"))))
    open_foreign(second, ExtractFeatures(model=f"hub:{folder_of_hub}/tiny", resize=32))
    assert seen == ["waited", "opened", "waited", "waited"]


def test_maps_with_channels_last():
    """Layers that work on the last dimension of maps, as in Swin and ConvNeXt: their channels come second in the catalogue, too."""
    class Norm2d(torch.nn.LayerNorm):                     # of torchvision's ConvNeXt: a LayerNorm whose output has channels first
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.inner = Norm2d(3), torch.nn.LayerNorm(3), torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU())

        def forward(self, x):
            return self.inner(self.norm(self.first(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    net = extract_features.Foreign(Last(), lambda x: x, lambda net, x, time: net(x), "out", 8, "cpu")
    x = torch.randn(2, 3, 8, 8)
    got = through(net, x, None, ["first", "norm", "inner-0", "inner-1", "inner", "out"])
    assert torch.equal(got["first"], net.net.first(x)) and torch.equal(got["norm"], net.net.norm(got["first"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) and got["inner-0"].shape == (2, 5, 8, 8)
    assert torch.equal(got["inner-1"], got["out"]) and torch.equal(got["inner"], got["out"])


def test_tokens_and_vectors_as_maps():
    x = torch.arange(2 * 17 * 3.0).reshape(2, 17, 3)
    assert torch.equal(as_map(x)[:, :, 1, 2], x[:, 1 + 6]) and as_map((x, 1)).shape == (2, 3, 4, 4)
    assert as_map(torch.zeros(2, 77, 3)) is None and as_map(torch.zeros(2, 5)).shape == (2, 5, 1, 1) and as_map("no") is None and as_map(()) is None


@pytest.mark.parametrize("words, said", [
    (["model=diffusers:/nowhere"], "cannot be loaded"), (["model=hub:/nowhere/x"], "cannot be loaded"), (["model=none.pt"], "cannot be loaded"),
    (["model=hub:HUB/tiny", "resize=32", "t=0.5"], "t=1"), (["model=hub:HUB/tiny", "resize=32", "activations=nrom"], "nearest: norm"), (["model=hub:HUB/none"], "cannot be loaded")])
def test_bad_input(refuse, tiny, run, folder_of_hub, words, said):  # noqa: F811
    words = [w.replace("HUB", str(folder_of_hub)) for w in words]
    assert said in refuse("extract_features", tiny, f"run={run}", *WORDS[:2], "name=bad", *words)


def test_without_diffusers(monkeypatch, refuse, tiny, run):  # noqa: F811
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refuse("extract_features", tiny, f"run={run}", *WORDS[:2], "model=diffusers:x", "activations=mid*", "t=0.5")

"""The catalogue of activations, early stopping, pooling, features that belong to their image alone, and the stage."""
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import extract_features
from configs.run import Model, UserError, draw
from extract_features import block_outputs, catalogue, matching, pca_rgb, pooled, read_map, stream, tapped
from train_diffusion import PATHS, AttentionBlock, Block, ResBlock, build_model, diffuse, time_embedding

MODELS = {
    "unet": Model(channels=32, mult=[1, 2], blocks=2, attention=[8], head_channels=16),
    "stem": Model(channels=16, mult=[1, 2, 2], blocks=1, attention=[4], head_channels=16, stem=2),
    "uvit": Model("uvit", channels=32, depth=4, heads=4)}
EVERY = pytest.mark.parametrize("kind", MODELS)
STATE = dict(path="cv", predict="v")
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 3, 16, 16), dtype=np.uint8)


def network(kind, seed=0, **conditions):
    """A network in which every part matters: fresh ones end in zeros."""
    net = build_model(MODELS[kind], 16, seed=seed, **conditions).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return net


def run(net, **options):
    """All of `stream` over IMAGES: {(name, t): [N, ...]}."""
    defaults = dict(names=None, times=[0.5], rows=np.arange(len(IMAGES)), device="cpu", context=nullcontext)
    options = defaults | options
    names, times, rows = (options.pop(k) for k in ("names", "times", "rows"))
    got = list(stream(net, STATE, IMAGES, rows, names or list(catalogue(net)), times, **options))
    assert np.array_equal(np.concatenate([r for r, _ in got]), rows)
    return {key: torch.cat([out[key] for _, out in got]) for key in got[0][1]}


def inputs():
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, 16, 16, generator=g), torch.tensor([10.0, 500.0, 990.0])


# ---------------------------------------------------------------------------------------------------------------------
# Names

@EVERY
def test_every_part_has_its_own_name(kind):
    net = network(kind)
    res = [m for m in net.modules() if isinstance(m, ResBlock)]
    resamplers = sum(m.resample is not None for m in res)
    attention, blocks = (sum(isinstance(m, c) for m in net.modules()) for c in (AttentionBlock, Block))
    skips = sum(isinstance(m, Block) and m.skip_linear is not None for m in net.modules())
    names = catalogue(net)                                # the last 3: input, first layer and output
    assert len(names) == 2 * (len(res) - resamplers) + resamplers + 6 * attention + 9 * blocks + skips + 3
    modules = {id(m) for m, _ in names.values()}
    assert len(modules) == len(names) - 3 * (attention + blocks) - 1             # q, k, v and map share a module


def test_names_count_levels_from_the_far_end():
    """The first level of the way up is the lowest resolution; sizes double at its end. Channels and sizes as built."""
    net = network("unet")
    shapes = {n: tuple(v.shape[1:]) for (n, _), v in run(net, pool="none", rows=np.arange(2)).items()}
    assert shapes["unet-after-conv-in"] == (32, 16, 16) and shapes["unet-out"] == (3, 16, 16)
    assert shapes["down-level0-repeat1-res-out"] == (32, 16, 16)
    assert shapes["down-level0-downsampler-out"] == (32, 8, 8)
    for name in ("down-level1-repeat0-vit-out", "mid-repeat0-res-out", "up-level0-repeat2-res-increment"):
        assert shapes[name] == (64, 8, 8)
    assert shapes["up-level0-upsampler-out"] == (64, 16, 16) and shapes["up-level1-repeat2-res-out"] == (32, 16, 16)
    assert "up-level2-repeat0-res-out" not in shapes and "up-level0-repeat3-res-out" not in shapes
    shapes = {n: tuple(v.shape[1:]) for (n, _), v in run(network("uvit"), pool="none", rows=np.arange(2)).items()}
    plain = {v for n, v in shapes.items() if not n.startswith("unet") and not n.endswith(("ffn-inner", "map"))}
    assert plain == {(32, 8, 8)}
    assert shapes["mid-vit-block0-ffn-inner"] == (128, 8, 8) and shapes["unet-out"] == (3, 16, 16)


def test_matching():
    net = network("unet")
    names = list(catalogue(net))
    assert matching(net, ["*"]) == names
    assert matching(net, ["unet-out", "mid-repeat0-res-out"]) == ["mid-repeat0-res-out", "unet-out"]     # forward order
    some = matching(net, ["up-level?-*-res-out", "mid*-out"])
    up = [n for n in names if n.startswith("up-") and n.endswith("-res-out")]
    mid = [n for n in names if n.startswith("mid") and n.endswith("-out")]
    assert some == mid + up and len(some) > 6
    blocks = matching(net, ["blocks"])
    assert blocks == block_outputs(net) == [n for n in names if n.endswith(("res-out", "vit-out", "sampler-out"))]
    assert matching(net, ["unet-in", "blocks"]) == ["unet-in", *blocks]
    with pytest.raises(UserError, match="nearest: .*mid-repeat0-res-out"):
        matching(net, ["mid-repeat-res-out"])
    for wrong in (["mid-vit-block0-out"], ["*", "nothing-*"], [""], []):
        with pytest.raises(UserError, match="activations="):
            matching(net, wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks

@pytest.mark.parametrize("kind, conditions", [("unet", dict(num_labels=4)), ("stem", {}), ("uvit", {}),
                                              ("uvit", dict(num_labels=4))])
def test_every_activation_fires_in_the_order_of_the_catalogue(kind, conditions):
    net, (x, t), fired = network(kind, **conditions), inputs(), []
    names = list(catalogue(net))
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: fired.append(n)) for n, (m, _) in catalogue(net).items()]
    out = net(x, t)
    for h in hooks:
        h.remove()
    assert fired == names and out.shape == x.shape
    got = run(net, names=names[::-1], pool="none", rows=np.arange(2))            # and all can be had at once
    assert {n for n, _ in got} == set(names)
    assert all(v.dim() == 4 and v.shape[-1] == v.shape[-2] for v in got.values())


@EVERY
def test_forward_stops_after_the_deepest_name(kind):
    net = network(kind)
    names = list(catalogue(net))
    whole = run(net, pool="none", rows=np.arange(3))
    for deepest in names[:: max(1, len(names) // 9)]:
        modules, at = [m for m, _ in catalogue(net).values()], names.index(deepest)
        ran, later = [], {id(m) for m in modules[at + 1:]} - {id(m) for m in modules[:at + 1]}
        hooks = [m.register_forward_hook(lambda m, *_: ran.append(id(m))) for m in net.modules()]
        part = run(net, names=[deepest, names[0]], pool="none", rows=np.arange(3))         # in whatever order
        for h in hooks:
            h.remove()
        assert not later & set(ran) and id(modules[at]) in ran
        for key in part:
            assert torch.equal(part[key], whole[key])
    assert not any(m._forward_hooks for m in net.modules())                      # none is left behind


def test_hooks_go_even_if_the_forward_fails():
    net = network("unet")
    with pytest.raises(RuntimeError):
        with tapped(net, ["mid-repeat0-res-out"]):
            net(torch.zeros(1, 4, 16, 16), torch.zeros(1))
    next(stream(net, STATE, IMAGES, np.arange(3), ["mid-repeat0-res-out"], [0.5], device="cpu", context=nullcontext))
    assert not any(m._forward_hooks for m in net.modules()) and net(*inputs()).shape == (3, 3, 16, 16)


def maps(net, x, t):
    """Every activation as a map, from one ordinary forward pass."""
    with tapped(net, catalogue(net)) as got:
        net(x, t)
    return got


def test_parts_of_the_unet_fit_together():
    """Outputs are inputs plus increments, and the stored q, k and v give the stored output of attention."""
    net, (x, t) = network("unet"), inputs()
    a = maps(net, x, t)
    first, name = a["unet-after-conv-in"], "down-level1-repeat1"
    assert torch.allclose(first, net.input_blocks[0][0](x), atol=1e-6)
    assert torch.allclose(a["down-level0-repeat0-res-out"], first + a["down-level0-repeat0-res-increment"], atol=1e-5)
    assert torch.equal(a["unet-in"], x)

    q, k, v = (a[f"{name}-vit-block0-self-{c}"].flatten(2).unflatten(1, (4, 16)) for c in "qkv")     # [B, heads, d, L]
    scores = (q.transpose(2, 3) @ k / 4).softmax(-1).transpose(2, 3)             # [B, heads, keys, queries]
    block, out = net.input_blocks[5][1], a[f"{name}-vit-block0-self-out"]
    assert torch.allclose(a[f"{name}-vit-block0-self-map"].flatten(2).unflatten(1, (4, 64)), scores, atol=1e-5)
    assert torch.allclose(out.flatten(2), block.proj_out((v @ scores).flatten(1, 2)), atol=1e-4)
    assert torch.allclose(a[f"{name}-vit-out"], a[f"{name}-res-out"] + out, atol=1e-5)
    w, bias = block.qkv.weight.reshape(4, 3, 16, 64)[:, 1], block.qkv.bias.reshape(4, 3, 16)[:, 1]   # rows of the keys
    keys = torch.einsum("hdc,bcyx->bhdyx", w, block.norm(a[f"{name}-res-out"])).flatten(1, 2) + bias.reshape(64, 1, 1)
    assert torch.allclose(a[f"{name}-vit-block0-self-k"], keys, atol=1e-4)


def test_residual_blocks_and_resamplers_by_hand():
    """Increments and resampled maps equal the block's formula, written out from its weights and the map before it."""
    net, (x, t) = network("unet"), inputs()
    a, w, modules = maps(net, x, t), dict(net.named_parameters()), {id(m): n for n, m in net.named_modules()}
    emb = net.time_embed(time_embedding(t, net.channels, net.clock))

    def branch(name, x, resized):
        m = modules[id(catalogue(net)[name][0])].rsplit(".out_layers", 1)[0]
        p = lambda layer: (w[f"{m}.{layer}.weight"], w[f"{m}.{layer}.bias"])
        groups = net.get_submodule(f"{m}.out_layers.0").num_groups               # of both norms, with as many channels
        h = F.silu(F.group_norm(x, groups, *p("in_layers.0")))
        h = F.conv2d(resized(h), *p("in_layers.2"), padding=1)
        scale, shift = F.linear(F.silu(emb), *p("emb_layers.1"))[:, :, None, None].chunk(2, 1)
        h = F.group_norm(h, groups, *p("out_layers.0")) * (1 + scale) + shift
        return F.conv2d(F.silu(h), *p("out_layers.3"), padding=1)

    same, half = lambda v: v, lambda v: F.avg_pool2d(v, 2)
    twice = lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)
    names, first = list(a), "down-level0-repeat0-res-increment"
    before = lambda name: a[[n for n in names[:names.index(name)] if n.endswith(("res-out", "vit-out"))][-1]]
    assert torch.allclose(a[first], branch(first, a["unet-after-conv-in"], same), atol=1e-4)
    for name, resized in [("down-level0-downsampler-out", half), ("up-level0-upsampler-out", twice)]:
        x = before(name)
        assert torch.allclose(a[name], resized(x) + branch(name, x, resized), atol=1e-4), name


@pytest.mark.parametrize("conditions", [{}, dict(num_labels=4)], ids=["plain", "labels"])
def test_parts_of_the_uvit_fit_together(conditions):
    net, (x, t) = network("uvit", **conditions), inputs()
    blocks = {"down-vit-block0": net.in_blocks[0], "mid-vit-block0": net.mid_block, "up-vit-block1": net.out_blocks[1]}
    seen = {}
    hooks = [b.register_forward_hook(lambda m, args, out, n=n: seen.__setitem__(n, (args, out)))
             for n, b in blocks.items()]
    a = maps(net, x, t)
    for h in hooks:
        h.remove()
    square = lambda v: v[:, net.extras:].transpose(1, 2).unflatten(2, (8, 8))    # row by row, without extra tokens
    same = lambda name, value: torch.allclose(a[name], value, atol=1e-4)
    assert net.extras == (2 if conditions else 1)
    assert same("vit-after-embed", F.conv2d(x, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=2))
    for name, block in blocks.items():
        args, out = seen[name]
        tokens = args[0]
        if block.skip_linear is not None:
            tokens = block.skip_linear(torch.cat(args, -1))
            assert same(f"{name}-skip", square(tokens))
        q, k, v = (F.linear(block.norm1(tokens), w) for w in block.attn.qkv.weight.chunk(3))         # [B, L, D]
        for letter, value in zip("qkv", (q, k, v)):
            assert same(f"{name}-self-{letter}", square(value))
        q, k, v = (u.unflatten(2, (4, 8)).transpose(1, 2) for u in (q, k, v))
        scores = (q @ k.transpose(2, 3) / 8 ** 0.5).softmax(-1)                  # [B, heads, extras + L, extras + L]
        after = tokens + block.attn.proj((scores @ v).transpose(1, 2).flatten(2))
        shown = scores[:, :, net.extras:].transpose(2, 3).flatten(1, 2)
        assert same(f"{name}-self-out", square(after - tokens)) and same(f"{name}-self-residual", square(after))
        assert torch.allclose(a[f"{name}-self-map"].flatten(2), shown, atol=1e-5)
        inner = block.mlp.fc1(block.norm2(after))
        assert same(f"{name}-ffn-inner", square(inner))
        assert same(f"{name}-ffn-out", square(block.mlp.fc2(F.gelu(inner))))
        assert same(f"{name}-out", square(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_do_not_overflow_under_autocast(dtype):
    qkv = 60 * torch.randn(2, 9, 3 * 3 * 64)              # [B, L, 3 * heads * d]
    net, block = SimpleNamespace(extras=0), SimpleNamespace(attn=SimpleNamespace(heads=3))
    with torch.autocast("cpu", dtype):
        a = read_map(net, block, None, qkv.to(dtype))     # [B, heads * L, 3, 3]
    q, k, _ = qkv.to(dtype).double().unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    want = (q @ k.transpose(2, 3) / 8).softmax(3).transpose(2, 3).flatten(1, 2)
    assert a.dtype == torch.float32 and torch.allclose(a.double().flatten(2), want, atol=1e-3)


def test_pca_finds_the_directions_that_vary_most():
    """Colours are the coordinates along them, from least to greatest."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(2, 3, 8, 8, generator=g) * torch.tensor([9.0, 3.0, 1.0])[:, None, None]
    basis = torch.linalg.qr(torch.randn(6, 6, generator=g))[0][:, :3]
    rgb = pca_rgb(torch.einsum("dc,ncyx->ndyx", basis, z)).float()
    for c in range(3):
        assert abs(np.corrcoef(rgb[:, c].flatten(), z[:, c].flatten())[0, 1]) > 0.95
        assert rgb[:, c].min() == 0 and rgb[:, c].max() == 255
    assert pca_rgb(z[:, :2]).shape == (2, 3, 8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Pooling, noise, batches

def test_pooling():
    x = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).double()
    assert pooled(x, "mean").dtype == pooled(x, "none").dtype == torch.float32
    assert torch.equal(pooled(x, "none"), x.float()) and torch.equal(pooled(x, "mean"), x.mean((2, 3)).float())
    assert torch.equal(pooled(x, "1"), pooled(x, "mean")) and torch.equal(pooled(x, "4"), x.float().flatten(1))
    assert float(pooled(x, "2").reshape(2, 3, 2, 2)[1, 2, 0, 1]) == float(x[1, 2, :2, 2:].mean())


@EVERY
def test_features_belong_to_their_image(kind):
    """Whatever the batch and whoever computes them; rows in any order."""
    net = network(kind)
    names = [n for n in catalogue(net) if n.startswith("mid") and n.endswith("out")]
    options = dict(names=names, times=[0.3, 0.8])
    whole = run(net, **options)
    for other in (run(net, **options, batch=4), run(net, names=names[::-1], times=[0.8, 0.3], batch=1)):
        assert other.keys() == whole.keys()
        for key in whole:
            assert torch.allclose(other[key], whole[key], atol=1e-5)
    rows = np.array([9, 2, 5])
    for key, value in run(net, **options, rows=rows, batch=2).items():
        assert torch.allclose(value, whole[key][rows], atol=1e-5)


def test_the_network_sees_the_noised_image_and_the_null_label():
    net = network("unet", num_labels=4)
    name, t = "unet-out", 0.7
    z = draw(5, "features test 0", range(11), (3, 16, 16))
    x_t = diffuse(PATHS["cv"], torch.from_numpy(IMAGES).float() / 127.5 - 1, z, torch.full((11,), t))
    time = torch.full((11,), 1000 * t)
    expected = net(x_t, time, torch.full((11,), 4))
    got = run(net, names=[name], times=[t], seed=5, purpose="features test", pool="none")[name, t]
    assert torch.allclose(got, expected, atol=1e-5)
    assert (expected - net(x_t, time, torch.full((11,), 0))).abs().max() > 1e-3


def test_draws_are_averaged():
    net, key = network("stem"), ("mid-repeat1-res-out", 0.5)
    one = lambda **options: run(net, names=[key[0]], **options)[key]
    three = one(draws=3, seed=7, purpose="p")
    x, t, parts = torch.from_numpy(IMAGES).float() / 127.5 - 1, torch.full((11,), 0.5), []
    for d in range(3):
        noise = draw(7, f"p {d}", range(11), (3, 16, 16))
        parts.append(maps(net, diffuse(PATHS["cv"], x, noise, t), 1000 * t)[key[0]].mean((2, 3)))
    assert torch.allclose(three, sum(parts) / 3, atol=1e-5)
    assert torch.allclose(one(seed=7, purpose="p"), parts[0], atol=1e-5)
    for other in (one(seed=8, purpose="p"), one(seed=7, purpose="q"), parts[1]):
        assert not torch.allclose(other, parts[0], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, words)])
    extract_features.main()


def test_stage(monkeypatch, capsys, refuse, tiny, small_run):
    """What it would do, what it does, and that it does it once; results of another recipe stay until told otherwise."""
    words = [tiny, f"run={small_run}", "data.train=160", "data.test=40"]
    words += ["name=stage", "activations=mid-repeat?-res-out", "t=0.5,0.8"]
    folder = small_run / "features/stage"
    called(monkeypatch, *words, "--dry-run", "pool=none", "dtype=float16")
    said = capsys.readouterr().out
    assert "parameters, " in said and "FLOP" in said and not folder.exists()
    assert f"{200 * 4 * 32 * 4 * 4 * 2 / 1e6:.1f} MB in {folder}" in said         # 32 channels, 4 x 4 positions
    called(monkeypatch, *words)
    info = json.loads((folder / "info.json").read_text())
    places = [(f"mid-repeat{i}-res-out", t) for i in (0, 1) for t in (0.5, 0.8)]
    assert [(a["activation"], a["t"]) for a in info["arrays"]] == places
    assert info["shapes"] == [[32]] * 4 and info["arrays"][0]["rho"] == pytest.approx(1, abs=1e-3)
    arrays = {p.name: np.load(p) for p in folder.glob("*.npy")}
    assert len(arrays) == 8 and all(a.std() > 0 for a in arrays.values())
    assert all(a.shape == (40 if name.startswith("test") else 160, 32) for name, a in arrays.items())
    capsys.readouterr()
    called(monkeypatch, *words, "batch=7")
    assert "done already" in capsys.readouterr().out
    assert "overwrite=true" in refuse("extract_features", *words, "draws=2")
    called(monkeypatch, *words, "draws=2", "overwrite=true")
    assert json.loads((folder / "info.json").read_text())["draws"] == 2


def test_list_and_pca(monkeypatch, capsys, tiny, small_run):
    words = [tiny, f"run={small_run}", "data.train=160", "data.test=40", "name=look"]
    called(monkeypatch, *words, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == "unet-out 3 x 32 x 32".split()
    called(monkeypatch, *words, "--pca", "activations=mid*out", "t=0.5,0.9")
    picture = small_run / "features/look-pca.png"
    assert picture.stat().st_size > 1000 and not (small_run / "features/look").exists()
    whole = np.asarray(Image.open(picture)).astype(int)
    called(monkeypatch, *words, "--pca", "activations=mid*out", "t=0.5,0.9", "batch=1")
    parts = np.asarray(Image.open(picture)).astype(int)
    assert whole.shape == parts.shape and abs(whole - parts).mean() < 1          # rounding of other batches


@pytest.mark.parametrize("words, said", [
    (["checkpoint=diffusion/none"], "diffusion/none"), (["activations=auto", "t="], "probe.py first"),
    (["t=0.5,0.5000001"], "six digits"), (["t="], "t=[]"), (["t=1.5"], "t=1.5"), (["pool=00"], "pool=00"),
    (["pool=99"], "a map has 4 x 4 positions"),
    (["draws=0"], "draws=0"),
    (["model=none.pt"], "diffusers:FOLDER_OR_ID")])
def test_bad_input(refuse, tiny, small_run, words, said):
    first = [tiny, f"run={small_run}", "data.train=160", "data.test=40", "name=bad"]
    assert said in refuse("extract_features", *first, "activations=mid*out", "t=0.5", *words)

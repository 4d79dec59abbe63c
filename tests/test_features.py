"""The catalogue of activations, early stopping, pooling, and features that belong to their image alone."""
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from extract_features import catalogue, cost_shares, describe, matching, pca_rgb, pooled, reader, stream, tapped
from configs.run import Model, UserError, draw
from train_diffusion import PATHS, AttentionBlock, Block, ResBlock, UNet, build_model, diffuse, time_embedding

MODELS = {"unet": Model(channels=32, mult=[1, 2], blocks=2, attention=[8], head_channels=16), "stem": Model(channels=16, mult=[1, 2, 2], blocks=1, attention=[4], head_channels=16, stem=2),
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
    options = dict(names=None, times=[0.5], rows=np.arange(len(IMAGES)), device="cpu", context=nullcontext) | options
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
    skips += len(getattr(net, "output_blocks", ()))
    assert len(catalogue(net)) == 2 * (len(res) - resamplers) + resamplers + 6 * attention + 9 * blocks + skips + 3     # + input, first layer and output
    assert len({id(m) for m, _ in catalogue(net).values()}) == len(catalogue(net)) - 3 * (attention + blocks) - 1      # q, k, v and map share a module


def test_names_count_levels_from_the_far_end():
    """The first level of the way up is the lowest resolution; sizes double at its end. Channels and sizes as built."""
    net = network("unet")
    shapes = {n: tuple(v.shape[1:]) for (n, _), v in run(net, pool="none", rows=np.arange(2)).items()}
    assert shapes["unet-after-conv-in"] == (32, 16, 16) and shapes["unet-out"] == (3, 16, 16)
    assert shapes["down-level0-repeat1-res-out"] == (32, 16, 16) and shapes["down-level0-downsampler-out"] == (32, 8, 8)
    assert shapes["down-level1-repeat0-vit-out"] == shapes["mid-repeat0-res-out"] == shapes["up-level0-repeat2-res-increment"] == (64, 8, 8)
    assert shapes["up-level0-upsampler-out"] == (64, 16, 16) and shapes["up-level1-repeat2-res-out"] == (32, 16, 16)
    assert "up-level2-repeat0-res-out" not in shapes and "up-level0-repeat3-res-out" not in shapes
    shapes = {n: tuple(v.shape[1:]) for (n, _), v in run(network("uvit"), pool="none", rows=np.arange(2)).items()}
    assert {v for n, v in shapes.items() if not n.startswith("unet") and not n.endswith(("ffn-inner", "map"))} == {(32, 8, 8)}
    assert shapes["mid-vit-block0-ffn-inner"] == (128, 8, 8) and shapes["unet-out"] == (3, 16, 16)


def test_what_a_pass_never_computes_is_said():
    """A block that is there but unused: its name matches, and the pass tells what it computes near it."""
    class Idle(UNet):
        def forward(self, x, time):
            every, self.middle_block = self.middle_block, self.middle_block[:-1]
            try:
                return super().forward(x, time)
            finally:
                self.middle_block = every

    net = Idle(16, 3, 3, 32, [1], 1, [], 16).eval()
    with pytest.raises(UserError, match="mid-repeat1-res-out.*never computes it; computed are mid-repeat0-res-out"):
        list(stream(net, STATE, IMAGES, np.arange(2), ["mid-repeat0-res-out", "mid-repeat1-res-out"], [0.5], device="cpu", context=nullcontext))


def test_matching():
    net = network("unet")
    names = list(catalogue(net))
    assert matching(net, ["*"]) == names
    assert matching(net, ["unet-out", "mid-repeat0-res-out"]) == ["mid-repeat0-res-out", "unet-out"]                   # forward order
    some = matching(net, ["up-level?-*-res-out", "mid*-out"])
    assert some == [n for n in names if n.startswith("up-") and n.endswith("-res-out") or n.startswith("mid") and n.endswith("-out")] and len(some) > 6
    with pytest.raises(UserError, match="nearest: .*mid-repeat0-res-out"):
        matching(net, ["mid-repeat-res-out"])
    for wrong in (["mid-vit-block0-out"], ["*", "nothing-*"], [""], []):
        with pytest.raises(UserError, match="activations="):
            matching(net, wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks

@EVERY
@pytest.mark.parametrize("conditions", [{}, dict(num_labels=4)], ids=["plain", "labels"])
def test_every_activation_fires_in_the_order_of_the_catalogue(kind, conditions):
    net, (x, t), fired = network(kind, **conditions), inputs(), []
    names = list(catalogue(net))
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: fired.append(n)) for n, (m, _) in catalogue(net).items()]
    out = net(x, t)
    for h in hooks:
        h.remove()
    assert fired == names and out.shape == x.shape
    got = run(net, names=names[::-1], pool="none", rows=np.arange(2))            # and all can be had at once
    assert {n for n, _ in got} == set(names) and all(v.dim() == 4 and v.shape[-1] == v.shape[-2] for v in got.values())


@EVERY
def test_forward_stops_after_the_deepest_name(kind):
    net, (x, t) = network(kind), inputs()
    names = list(catalogue(net))
    whole = run(net, pool="none", rows=np.arange(3))
    for deepest in names[:: max(1, len(names) // 9)]:
        modules = [m for m, _ in catalogue(net).values()]
        ran, later = [], {id(m) for m in modules[names.index(deepest) + 1:]} - {id(m) for m in modules[:names.index(deepest) + 1]}
        hooks = [m.register_forward_hook(lambda m, *_: ran.append(id(m))) for m in net.modules()]
        part = run(net, names=[deepest, names[0]], pool="none", rows=np.arange(3))   # in whatever order they are named
        for h in hooks:
            h.remove()
        assert not later & set(ran) and id(modules[names.index(deepest)]) in ran
        for key in part:
            assert torch.equal(part[key], whole[key])
    assert not any(m._forward_hooks for m in net.modules())                      # none is left behind


@EVERY
def test_compiled_features_are_the_same_and_need_no_more(kind, monkeypatch):
    """Every activation, from graphs captured as for a GPU; up to the middle, the graph holds what the plain pass runs, and the network is left as it was."""
    net, graphs, compile = network(kind), [], torch.compile

    def backend(graph, inputs):
        aot = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph.forward)
        return aot(graph, inputs)
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend=backend, fullgraph=True, **how))
    whole, compiled = (run(net, times=[0.4, 0.9], rows=np.arange(7), batch=4, compiled=c) for c in (False, True))
    assert all(torch.allclose(compiled[key], whole[key], atol=1e-5) for key in whole) and len(graphs) == 1       # the last batch is filled up
    name = [n for n in catalogue(net) if n.startswith("mid")][-1]
    with torch.no_grad():
        reader(net, [name], compiled=True)(torch.zeros(2, 3, 16, 16), torch.ones(2))
    products = [sum(n.target in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default) for n in g.graph.nodes)
                for g in graphs]
    assert len(graphs) == 2 and 0 < products[1] < 0.75 * products[0]
    assert not any(m._forward_hooks for m in net.modules())


def test_hooks_go_even_if_the_forward_fails():
    net = network("unet")
    with pytest.raises(RuntimeError):
        with tapped(net, ["mid-repeat0-res-out"]):
            net(torch.zeros(1, 4, 16, 16), torch.zeros(1))
    next(stream(net, STATE, IMAGES, np.arange(3), ["mid-repeat0-res-out"], [0.5], device="cpu", context=nullcontext))      # given up after one batch
    assert not any(m._forward_hooks for m in net.modules()) and net(*inputs()).shape == (3, 3, 16, 16)


def maps(net, x, t):
    """Every activation as a map, from one ordinary forward pass."""
    out = {}
    hooks = [m.register_forward_hook(lambda m, a, o, n=n, pick=pick: out.__setitem__(n, pick(o, a))) for n, (m, pick) in catalogue(net).items()]
    net(x, t)
    for h in hooks:
        h.remove()
    return out


def test_parts_of_the_unet_fit_together():
    """Outputs are inputs plus increments, and attention of the stored q, k and v gives the stored self-attention output."""
    net, (x, t) = network("unet"), inputs()
    a = maps(net, x, t)
    assert torch.allclose(a["unet-after-conv-in"], net.input_blocks[0][0](x), atol=1e-6)
    assert torch.allclose(a["down-level0-repeat0-res-out"], a["unet-after-conv-in"] + a["down-level0-repeat0-res-increment"], atol=1e-5)
    name = "down-level1-repeat1"
    q, k, v = (a[f"{name}-vit-block0-self-{c}"].flatten(2).unflatten(1, (4, 16)) for c in "qkv")     # [B, heads, d, L]
    h = v @ (q.transpose(2, 3) @ k / 4).softmax(-1).transpose(2, 3)
    block = net.input_blocks[5][1]
    assert torch.allclose(a[f"{name}-vit-block0-self-map"].flatten(2).unflatten(1, (4, 64)), (q.transpose(2, 3) @ k / 4).softmax(-1).transpose(2, 3), atol=1e-5)
    assert torch.equal(a["unet-in"], x) and torch.equal(a["up-level1-repeat2-skip"], a["unet-after-conv-in"])
    assert torch.equal(a["up-level0-repeat1-skip"], a["down-level1-repeat0-vit-out"])
    assert torch.allclose(a[f"{name}-vit-block0-self-out"].flatten(2), block.proj_out(h.flatten(1, 2)), atol=1e-4)
    assert torch.allclose(a[f"{name}-vit-out"], a[f"{name}-res-out"] + a[f"{name}-vit-block0-self-out"], atol=1e-5)
    w = block.qkv.weight.reshape(4, 3, 16, 64)            # which rows of the weights are keys, directly
    keys = torch.einsum("hdc,bcyx->bhdyx", w[:, 1], block.norm(a[f"{name}-res-out"])).flatten(1, 2) + block.qkv.bias.reshape(4, 3, 16)[:, 1].reshape(1, 64, 1, 1)
    assert torch.allclose(a[f"{name}-vit-block0-self-k"], keys, atol=1e-4)


def test_residual_blocks_and_resamplers_by_hand():
    """Increments and resampled maps equal the block's formula, written out from its weights and the stored activation before it."""
    net, (x, t) = network("unet"), inputs()
    a, w, modules = maps(net, x, t), dict(net.named_parameters()), {id(m): n for n, m in net.named_modules()}
    emb = net.time_embed(time_embedding(t, net.channels, net.clock))

    def branch(name, x, resized):
        m = modules[id(catalogue(net)[name][0])].rsplit(".out_layers", 1)[0]
        p = lambda layer: (w[f"{m}.{layer}.weight"], w[f"{m}.{layer}.bias"])
        groups = dict(net.named_modules())[f"{m}.out_layers.0"].num_groups        # of both norms, where both see the same number of channels
        h = F.conv2d(resized(F.silu(F.group_norm(x, groups, *p("in_layers.0")))), *p("in_layers.2"), padding=1)
        scale, shift = F.linear(F.silu(emb), *p("emb_layers.1"))[:, :, None, None].chunk(2, 1)
        h = F.group_norm(h, groups, *p("out_layers.0")) * (1 + scale) + shift
        return F.conv2d(F.silu(h), *p("out_layers.3"), padding=1)

    same, half, twice = lambda v: v, lambda v: F.avg_pool2d(v, 2), lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)
    names = list(a)
    before = lambda name: a[[n for n in names[:names.index(name)] if n.endswith(("res-out", "vit-out"))][-1]]
    assert torch.allclose(a["down-level0-repeat0-res-increment"], branch("down-level0-repeat0-res-increment", a["unet-after-conv-in"], same), atol=1e-4)
    for name, resized in [("down-level0-downsampler-out", half), ("up-level0-upsampler-out", twice)]:
        x = before(name)
        assert torch.allclose(a[name], resized(x) + branch(name, x, resized), atol=1e-4), name


@pytest.mark.parametrize("conditions", [{}, dict(num_labels=4)], ids=["plain", "labels"])
def test_parts_of_the_uvit_fit_together(conditions):
    net, (x, t) = network("uvit", **conditions), inputs()
    a, blocks = maps(net, x, t), {"down-vit-block0": net.in_blocks[0], "mid-vit-block0": net.mid_block, "up-vit-block1": net.out_blocks[1]}
    seen = {}
    hooks = [b.register_forward_hook(lambda m, args, out, n=n: seen.__setitem__(n, (args, out))) for n, b in blocks.items()]
    net(x, t)
    for h in hooks:
        h.remove()
    square = lambda tokens: tokens[:, net.extras:].transpose(1, 2).unflatten(2, (8, 8))              # row by row, without the extra tokens
    assert net.extras == (2 if conditions else 1)
    assert torch.allclose(a["vit-after-embed"], F.conv2d(x, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=2), atol=1e-5)
    for name, block in blocks.items():
        args, out = seen[name]
        tokens = args[0]
        if block.skip_linear is not None:
            tokens = block.skip_linear(torch.cat(args, -1))
            assert torch.allclose(a[f"{name}-skip"], square(tokens), atol=1e-5)
        q, k, v = (F.linear(block.norm1(tokens), w) for w in block.attn.qkv.weight.chunk(3))         # [B, L, D]
        for letter, value in zip("qkv", (q, k, v)):
            assert torch.allclose(a[f"{name}-self-{letter}"], square(value), atol=1e-5)
        q, k, v = (u.unflatten(2, (4, 8)).transpose(1, 2) for u in (q, k, v))
        attended = block.attn.proj(((q @ k.transpose(2, 3) / 8 ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(a[f"{name}-self-out"], square(attended), atol=1e-4)
        scores = (q @ k.transpose(2, 3) / 8 ** 0.5).softmax(-1)[:, :, net.extras:]                    # [B, heads, L, extras + L]
        assert torch.allclose(a[f"{name}-self-map"].flatten(2), scores.transpose(2, 3).flatten(1, 2), atol=1e-5)
        assert torch.allclose(a[f"{name}-self-residual"], square(tokens + attended), atol=1e-4)
        inner = block.mlp.fc1(block.norm2(tokens + attended))
        assert torch.allclose(a[f"{name}-ffn-inner"], square(inner), atol=1e-4) and torch.allclose(a[f"{name}-ffn-out"], square(block.mlp.fc2(F.gelu(inner))), atol=1e-4)
        assert torch.allclose(a[f"{name}-out"], square(out), atol=1e-5)


@EVERY
def test_cost_share_rises_to_one(kind):
    net, (x, t) = network(kind), inputs()
    share = cost_shares(net, x, t / 1000)
    assert list(share) == list(catalogue(net)) and sorted(share.values()) == list(share.values()) and 0.95 < share["unet-out"] <= 1 and share["unet-in"] < 0.2
    assert describe("up-level0-repeat1-vit-block0-self-map") == ("self-map", "up") and describe("unet-in") == ("in", "end") and describe("down-vit-block1-out") == ("out", "down")


def test_pca_finds_the_directions_that_vary_most():
    """Colours are the coordinates along them, from least to greatest."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(2, 3, 8, 8, generator=g) * torch.tensor([9.0, 3.0, 1.0])[:, None, None]
    basis = torch.linalg.qr(torch.randn(6, 6, generator=g))[0][:, :3]
    rgb = pca_rgb(torch.einsum("dc,ncyx->ndyx", basis, z)).float()
    for c in range(3):
        assert abs(np.corrcoef(rgb[:, c].flatten(), z[:, c].flatten())[0, 1]) > 0.95 and rgb[:, c].min() == 0 and rgb[:, c].max() == 255
    assert pca_rgb(z[:, :2]).shape == (2, 3, 8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Pooling, noise, batches

def test_pooling():
    x = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).double()
    assert pooled(x, "mean").dtype == pooled(x, "none").dtype == torch.float32
    assert torch.equal(pooled(x, "none"), x.float()) and torch.equal(pooled(x, "mean"), x.mean((2, 3)).float()) and torch.equal(pooled(x, "1"), pooled(x, "mean"))
    grid = pooled(x, "2").reshape(2, 3, 2, 2)
    assert float(grid[1, 2, 0, 1]) == float(x[1, 2, :2, 2:].mean()) and torch.equal(pooled(x, "4"), x.float().flatten(1))


@EVERY
def test_features_belong_to_their_image(kind):
    """Whatever the batch and whoever computes them; rows in any order."""
    net = network(kind)
    names = [n for n in catalogue(net) if n.startswith("mid") and n.endswith("out")]
    whole = run(net, names=names, times=[0.3, 0.8])
    for other in (run(net, names=names, times=[0.3, 0.8], batch=4), run(net, names=names[::-1], times=[0.8, 0.3], batch=1)):
        assert other.keys() == whole.keys()
        for key in whole:
            assert torch.allclose(other[key], whole[key], atol=1e-5)
    rows = np.array([9, 2, 5])
    for key, value in run(net, names=names, times=[0.3, 0.8], rows=rows, batch=2).items():
        assert torch.allclose(value, whole[key][rows], atol=1e-5)


def test_the_network_sees_the_noised_image_and_the_null_label():
    net = network("unet", num_labels=4)
    name, t = "unet-out", 0.7
    z = draw(5, "features test 0", range(11), (3, 16, 16))
    x_t = diffuse(PATHS["cv"], torch.from_numpy(IMAGES).float() / 127.5 - 1, z, torch.full((11,), t))
    expected = net(x_t, torch.full((11,), 1000 * t), torch.full((11,), 4))
    assert torch.allclose(run(net, names=[name], times=[t], seed=5, purpose="features test", pool="none")[name, t], expected, atol=1e-5)
    assert (expected - net(x_t, torch.full((11,), 1000 * t), torch.full((11,), 0))).abs().max() > 1e-3


def test_draws_are_averaged():
    net, key = network("stem"), ("mid-repeat1-res-out", 0.5)
    one = lambda **options: run(net, names=[key[0]], **options)[key]
    three = one(draws=3, seed=7, purpose="p")
    z = [draw(7, f"p {d}", range(11), (3, 16, 16)) for d in range(3)]
    x, t, parts = torch.from_numpy(IMAGES).float() / 127.5 - 1, torch.full((11,), 0.5), []
    for noise in z:
        parts.append(maps(net, diffuse(PATHS["cv"], x, noise, t), 1000 * t)[key[0]].mean((2, 3)))
    assert torch.allclose(three, sum(parts) / 3, atol=1e-5)
    assert torch.allclose(one(seed=7, purpose="p"), parts[0], atol=1e-5)
    for other in (one(seed=8, purpose="p"), one(seed=7, purpose="q"), parts[1]):
        assert not torch.allclose(other, parts[0], atol=1e-3)

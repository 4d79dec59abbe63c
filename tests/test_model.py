"""The two networks against facts of the published ones (ADM, U-ViT), their conditions, and initial weights."""
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from configs.run import Model, UserError
from train_diffusion import AttentionBlock, UNet, UViT, attention, build_model, time_embedding

# Published settings with parameter counts and digests of all names and shapes, taken from the original repositories.
# Their class tables have no row for the null label: the U-Net's differs by one row, the U-ViTs' last row is our null.
PUBLISHED = {
    "ADM 256 unconditional": (lambda: UNet(256, 3, 6, 256, [1, 1, 2, 2, 4, 4], 2, [32, 16, 8], 64),
                              552_814_086, "b9c90be1570d1541"),
    "ADM 64 conditional": (lambda: UNet(64, 3, 6, 192, [1, 2, 3, 4], 3, [32, 16, 8], 64, num_labels=1000),
                           295_904_454 + 4 * 192, "5916e614ea397bd0"),
    "U-ViT-S/2 CIFAR10": (lambda: UViT(32, 3, 3, 512, 2, 12, 8), 44_255_328, "b38ffe35bab000aa"),
    "U-ViT-L/2 ImageNet256": (lambda: UViT(32, 4, 4, 1024, 2, 20, 16, False, num_labels=1000),
                              286_763_024, "0073982842c6d0ef"),
    "U-ViT-M/4 ImageNet64": (lambda: UViT(64, 3, 3, 768, 4, 16, 12, num_labels=999), 130_940_292, "928cf19184638c83"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_names_and_shapes(name):
    make, parameters, digest = PUBLISHED[name]
    with torch.device("meta"):
        net = make()
    assert sum(p.numel() for p in net.parameters()) == parameters
    lines = "\n".join(sorted(f"{k} {tuple(v.shape)}" for k, v in net.state_dict().items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


def waves(net):
    """Fill a network by a formula: every part matters (fresh networks end in zeros), any program can repeat it."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(net.state_dict().items())):
            n = torch.arange(p.numel(), dtype=torch.float64)
            values = 0.3 * torch.sin(n + i)
            if p.dim() > 1:
                values = torch.sin(0.01 * n * n + 1.7 * n + i) * (2 / p[0].numel()) ** 0.5
            p.copy_(values.reshape(p.shape))
    return net.eval().requires_grad_(False)


def inputs(size=16, batch=2):
    n = torch.arange(batch * 3 * size ** 2, dtype=torch.float64)
    x = torch.sin(1.3 * n + 0.003 * n * n).reshape(batch, 3, size, size).float()
    return x, torch.tensor([3.0, 700.5, 40.0, 999.0])[:batch]


@pytest.mark.parametrize("make, expected", [
    (lambda: UNet(16, 3, 6, 128, [1, 2], 1, [8], 32, num_labels=5),
     [0.094437, -0.121122, 0.557746, -0.109777, -0.258532, -0.31814, 0.001174, 0.06475, 0.697958, 0.027061, -0.423735,
      -0.435148]),
    (lambda: UViT(16, 3, 3, 64, 2, 4, 4, num_labels=5),
     [-0.176549, 0.220652, -0.630206, -0.076235, 0.374609, -0.536741])], ids=["unet", "uvit"])
def test_same_function_as_the_published_networks(make, expected):
    """The numbers are outputs of the original programs with the weights of `waves`; 128 channels: groups of four."""
    out = waves(make())(*inputs(), torch.tensor([1, 4]))
    assert out[:, :, 5, 7].flatten().tolist() == pytest.approx(expected, abs=2e-5)


def test_time_embedding():
    t = torch.tensor([0.0, 12.5, 1000.0])
    angles = [[v * 10_000 ** (-i / 4) for i in range(4)] for v in t.tolist()]
    expected = [[*map(math.cos, a), *map(math.sin, a)] for a in angles]
    assert torch.allclose(time_embedding(t, 8), torch.tensor(expected), atol=1e-4)


def test_attention_is_softmax_of_products():
    block, x = waves(AttentionBlock(16, 2)), torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    qkv = (block.qkv.weight[:, :, 0] @ block.norm(x).flatten(2)) + block.qkv.bias[:, None]           # [B, 3C, HW]
    heads = []
    for q, k, v in (h.chunk(3, 1) for h in qkv.chunk(2, 1)):                     # per head, its q, k and v lie together
        heads.append(v @ (q.transpose(1, 2) @ k / math.sqrt(8)).softmax(-1).transpose(1, 2))
    out = block.proj_out.weight[:, :, 0] @ torch.cat(heads, 1) + block.proj_out.bias[:, None]
    expected = x + out.reshape(x.shape)
    assert torch.allclose(block(x), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Conditions

MODELS = [Model(channels=32, mult=[1, 2], blocks=1, attention=[8], head_channels=16),
          Model(channels=16, mult=[1, 2], blocks=1, attention=[4], head_channels=16, stem=2),
          Model("uvit", channels=32, depth=4, heads=4)]
EVERY = pytest.mark.parametrize("model", MODELS, ids=["unet", "unet-stem2", "uvit"])
ALL = dict(num_labels=5, vector_dim=7, layout_channels=2)


def conditions(null=True):
    """Conditions for four images; with `null`, the last one has no label."""
    g = torch.Generator().manual_seed(1)
    return dict(label=torch.tensor([0, 4, 2, 5 if null else 1]), vector=torch.randn(4, 7, generator=g),
                layout=torch.randn(4, 2, 16, 16, generator=g))


@EVERY
def test_null_conditions_are_absent_conditions(model):
    net, (x, t) = waves(build_model(model, 16, **ALL)), inputs(batch=4)
    plain = net(x, t)
    every = dict(label=torch.full((4,), 5), vector=torch.zeros(4, 7), layout=torch.zeros(4, 2, 16, 16))
    for null in (*({k: v} for k, v in every.items()), every):
        assert torch.equal(net(x, t, **null), plain), list(null)


@EVERY
@pytest.mark.parametrize("used", [["label"], ["vector"], ["layout"], ["label", "vector"],
                                  ["label", "vector", "layout"]], ids="+".join)
def test_conditions_act_alone_and_together(model, used):
    """Each condition changes the output, and each of several still does when the others are given."""
    size = {"label": "num_labels", "vector": "vector_dim", "layout": "layout_channels"}
    net, (x, t) = waves(build_model(model, 16, **{size[k]: ALL[size[k]] for k in used})), inputs(batch=4)
    given = {k: v for k, v in conditions(null=False).items() if k in used}
    full = net(x, t, **given)
    assert full.shape == x.shape and torch.isfinite(full).all()
    for left_out in used:
        other = net(x, t, **{k: v for k, v in given.items() if k != left_out})
        change = (other - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
        assert (change > 1e-4).all(), (left_out, change)


@EVERY
def test_conditions_belong_to_their_sample(model):
    net, (x, t), given = waves(build_model(model, 16, **ALL)), inputs(batch=4), conditions()
    together = net(x, t, **given)
    for i in range(4):
        alone = net(x[i:i + 1], t[i:i + 1], **{k: v[i:i + 1] for k, v in given.items()})
        assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_stem_is_space_to_depth():
    """A stem of 2 is the same network on quarter-size maps of four times the channels."""
    whole, inner = waves(UNet(16, 3, 3, 32, [1, 2], 1, [4], 16, stem=2)), waves(UNet(8, 12, 12, 32, [1, 2], 1, [4], 16))
    x, t = inputs()
    assert torch.equal(whole(x, t), F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2), t), 2))
    # map sizes for attention count positions after the stem
    assert sum(isinstance(m, AttentionBlock) for m in whole.modules()) == 4


@pytest.mark.parametrize("channels", [8, 24, 32, 40, 48, 72, 96, 136])
def test_any_multiple_of_eight_channels_builds(channels):
    """Joined skips have sums of level widths as channels, such as 144 = 48 + 96: their groups must divide those too."""
    net = build_model(Model(channels=channels, mult=[1, 2, 4], blocks=1, attention=[4], head_channels=8), 16)
    for m in (m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)):
        assert m.num_channels % m.num_groups == 0 and m.num_channels // m.num_groups > 1
    assert net(*inputs()).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("size, model", [
    (18, Model(channels=32, mult=[1, 2, 2])), (12, Model(channels=32, mult=[1, 2], stem=4)),
    (16, Model(channels=32, mult=[1], attention=[8])), (15, Model("uvit", channels=32, heads=4)),
    (16, Model("uvit", channels=32, heads=4, depth=3))])
def test_impossible_sizes_are_user_errors(size, model):
    with pytest.raises(UserError, match="size"):
        build_model(model, size)


@EVERY
def test_weights_are_a_function_of_the_seed(model):
    before = torch.get_rng_state()
    nets = [build_model(model, 16, seed=s).state_dict() for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)     # nobody else's random numbers are touched
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert any(not torch.equal(nets[0][k], nets[2][k]) for k in nets[0])


@EVERY
def test_every_parameter_learns(model):
    net, (x, t) = waves(build_model(model, 16, **ALL)).requires_grad_(True), inputs(batch=4)
    net(x, t, **conditions()).square().mean().backward()
    assert not [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights of the guided model

@EVERY
@pytest.mark.parametrize("more", [dict(num_labels=5), dict(vector_dim=7), dict(num_labels=5, vector_dim=7),
                                  dict(layout_channels=3)], ids="+".join)
def test_guided_model_starts_from_the_unconditional_one(model, more):
    """Under the null condition; the U-ViT's condition token joins the attention, so there nearly."""
    from train_guided import load_pretrained
    source, net, (x, t) = waves(build_model(model, 16)), build_model(model, 16, seed=1, **more).eval(), inputs(batch=4)
    load_pretrained(net, source.state_dict())
    with torch.no_grad():
        plain, start = source(x, t), net(x, t)
        assert plain.std() > 0.01                                                # else nothing is compared
        if model.backbone == "unet":
            assert torch.equal(start, plain)
        else:
            assert (start - plain).norm() < 0.05 * plain.norm()
        if "num_labels" in more:
            assert torch.equal(net(x, t, torch.full((4,), 5)), start)
            apart = [net(x, t, torch.full((4,), k)) for k in range(5)]           # rows of order 1, not near zero
            assert min((a - b).norm() for i, a in enumerate([start, *apart]) for b in apart[i:]) > 1e-4 * start.norm()
        if "vector_dim" in more:
            assert torch.equal(net(x, t, vector=torch.zeros(4, 7)), start)       # null
            assert (net(x, t, vector=conditions()["vector"]) - start).norm() > 1e-4 * start.norm()
        if "layout_channels" in more:
            assert torch.equal(net(x, t, layout=torch.zeros(4, 3, 16, 16)), start)
            assert (net(x, t, layout=torch.ones(4, 3, 16, 16)) - start).norm() > 1e-4 * start.norm()


def test_unfitting_initial_weights_are_errors():
    from train_guided import load_pretrained
    thin = Model(channels=16, mult=[1, 2], blocks=1, attention=[8], head_channels=16)
    deep = Model(channels=32, mult=[1, 2], blocks=2, attention=[8], head_channels=16)
    for other in (thin, deep, MODELS[2]):
        with pytest.raises((LookupError, RuntimeError)):             # which `initial_weights` puts into words
            load_pretrained(build_model(MODELS[0], 16, num_labels=5), build_model(other, 16).state_dict())


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("L", [17, 600])
def test_attention_and_its_gradients(kind, tolerance, L):
    """Against the formula in float64, for both ways in which it is computed."""
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, L, 32, generator=g).to(kind).unbind()

    def result(f, kind):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out = f(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(kind))]
    exact = result(lambda q, k, v: ((q @ k.transpose(2, 3)) / 32 ** 0.5).softmax(3) @ v, torch.float64)
    for got, wanted in zip(result(attention, kind), exact):
        assert got.dtype == kind and (got - wanted).norm() < tolerance * wanted.norm()
    with torch.no_grad():
        assert (attention(q, k, v) - exact[0]).norm() < tolerance * exact[0].norm()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_attention_does_not_keep_the_scores(kind):
    """What is kept grows with positions, not their square: 5 maps and 2 x 400 sums, not 2 x 400 x 400."""
    block, kept = AttentionBlock(16, 2).to(kind), []
    block.qkv.weight.data.normal_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        block(torch.randn(1, 16, 20, 20, dtype=kind))
    assert max(kept) <= 3 * 16 * 400

"""Muon: its updates against an SVD and PyTorch's own, which weights it moves; trainings resume, divide, accumulate."""
import json

import pytest
import torch
from conftest import inside, stage

from configs.run import Model
from train_diffusion import Muon, Training, build_model, build_optimizer, hidden_weights, orthogonalised


def matrices(*singular_values, rows=24, columns=70):
    """Matrices [N, rows, columns] with these singular values, and their factors U, V."""
    g = torch.Generator().manual_seed(0)
    n = len(singular_values)
    u = torch.linalg.qr(torch.randn(n, rows, rows, generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, columns, rows, generator=g))[0]
    return u @ torch.diag_embed(torch.stack(singular_values)) @ v.mT, u, v


@pytest.mark.parametrize("turned", [False, True])
def test_orthogonalised_keeps_singular_vectors_and_evens_out_singular_values(turned):
    m, u, v = matrices(torch.logspace(0, -1.5, 24), torch.linspace(5, 1, 24), 1e-6 * torch.ones(24))
    out = orthogonalised(m.mT).mT if turned else orthogonalised(m)
    core = u.mT @ out @ v                                 # diagonal if the singular vectors are those of m
    values = core.diagonal(dim1=1, dim2=2)
    assert (values > 0.65).all() and (values < 1.21).all()
    assert (core - torch.diag_embed(values)).abs().max() < 1e-4
    plain = m / m.norm(dim=(1, 2), keepdim=True)          # the iteration as it is usually written, in float64
    plain = plain.double()
    for _ in range(5):
        gram = plain @ plain.mT
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    assert torch.allclose(out, plain.float(), atol=1e-4)


def test_orthogonalised_of_matrices_without_full_rank_stays_bounded():
    m, u, v = matrices(torch.cat([torch.ones(3), torch.zeros(21)]), torch.zeros(24), torch.logspace(0, -12, 24))
    out = orthogonalised(m)
    assert torch.isfinite(out).all() and torch.linalg.matrix_norm(out, 2).max() < 1.21
    assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_matrices_move_as_with_pytorchs_muon():
    """PyTorch orthogonalises in bfloat16, hence the tolerance."""
    g = torch.Generator().manual_seed(1)
    start = [torch.randn(12, 40, generator=g), torch.randn(40, 12, generator=g), torch.randn(12, 40, generator=g)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = Muon([dict(params=ours, muon=True)], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(8):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for w, p, q in zip(start, ours, theirs):
        assert (p - q).norm() < 0.03 * (p - w).norm()


def test_a_convolution_is_the_matrix_of_its_output_channels():
    g = torch.Generator().manual_seed(2)
    w, grad = torch.randn(8, 5, 3, 3, generator=g), torch.randn(8, 5, 3, 3, generator=g)
    conv = torch.nn.Parameter(w.clone())
    conv.grad = grad.clone()
    Muon([dict(params=[conv], muon=True)], lr=1.0, weight_decay=0.0).step()
    u, _, v = torch.linalg.svd(grad.flatten(1), full_matrices=False)
    core = u.mT @ (w - conv.detach()).flatten(1) @ v.mT / (0.2 * 45 ** 0.5)
    assert (core.diagonal() > 0.65).all() and (core.diagonal() < 1.21).all()


@pytest.mark.parametrize("backbone", ["unet", "uvit"])
def test_ends_embeddings_norms_and_biases_stay_with_adamw(backbone):
    model = Model(backbone=backbone, channels=32, mult=[1, 2], blocks=1, attention=[8], head_channels=32, stem=2,
                  patch=4, depth=2, heads=4)
    net = build_model(model, 16, num_labels=5, vector_dim=3, layout_channels=2)
    hidden = {name for name, p in net.named_parameters() if any(p is h for h in hidden_weights(net))}
    others = {name for name, _ in net.named_parameters()} - hidden
    assert all(net.get_parameter(name).dim() > 1 for name in hidden)
    assert not [name for name in hidden if "emb" in name]
    ends = dict(unet=["input_blocks.0.0.weight", "out.2.weight"],
                uvit=["patch_embed.proj.weight", "layout_embed.proj.weight", "decoder_pred.weight",
                      "final_layer.weight"])
    assert set(ends[backbone]) <= others
    assert sum(net.get_parameter(name).numel() for name in hidden) > 0.7 * sum(p.numel() for p in net.parameters())
    norms = sum(p.numel() for p in net.parameters() if p.dim() == 1)
    groups = build_optimizer(Training(optimizer="muon", weight_decay=0.1), net).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert sum(p.numel() for p in groups[2]["params"]) == norms
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())


def test_what_is_not_hidden_moves_as_with_adamw():
    model = Model(channels=16, mult=[1], blocks=1, attention=[], stem=2, head_channels=16)
    net, other = build_model(model, 8), build_model(model, 8)
    a = build_optimizer(Training(optimizer="muon", lr=1e-2, weight_decay=0.1), net)
    b = build_optimizer(Training(lr=1e-2, weight_decay=0.1), other)
    for k in range(3):
        for p, q in zip(net.parameters(), other.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            q.grad = p.grad.clone()
        a.step(), b.step()
    hidden = {id(p) for p in hidden_weights(net)}
    pairs = list(zip(net.parameters(), other.parameters()))
    same = [torch.allclose(p, q, atol=1e-6) for p, q in pairs if id(p) not in hidden]
    assert len(same) > 10 and all(same)
    assert not any(torch.allclose(p, q) for p, q in pairs if id(p) in hidden)


def test_a_step_with_overflowing_gradients_is_skipped_for_all_weights():
    """Half precision: one infinite gradient, and neither group may move, nor remember anything."""
    net = build_model(Model(channels=16, mult=[1], blocks=1, attention=[], stem=2, head_channels=16), 8)
    opt, scaler = build_optimizer(Training(optimizer="muon"), net), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in net.parameters()]
    scaler.scale(torch.ones(1))                           # the scale is made on first use

    def step():
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()

    for p in net.parameters():
        p.grad = torch.ones_like(p)
    next(net.parameters()).grad.fill_(float("inf"))
    step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before)) and not opt.state
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    step()
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before))


def test_training_in_half_precision_lowers_the_loss(tiny, tmp_path):
    inside("train_diffusion", tiny, f"run={tmp_path}", "precision=fp16", "optimizer=muon", "data.train=64")
    log = [json.loads(line) for line in (tmp_path / "diffusion/base/metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and log[0]["grad_norm"] > 0


def state_of(folder):
    """(all tensors that training changes, log) of a finished training."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    labeller = {f"labeller.{k}": v for k, v in state["conditioner"].items() if isinstance(v, torch.Tensor)}
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state["net"] | {f"ema.{k}": v for k, v in state["ema"].items()} | moments | labeller, log


def test_training_with_muon_resumes_exactly_and_divides(tiny, tmp_path):
    words = ["train_diffusion.optimizer=muon", "train_guided.optimizer=muon", "data.train=160", "data.test=40",
             "save_every=64"]
    online = ["labels=online", "init=", "K=6", "switch=64", "sk_freeze=0", "sk_ramp=0", "sk_queue=64", "images=192"]
    for how, *steps in (("whole", "192"), ("broken", "64", "128", "192")):
        for images in steps:
            inside("train_diffusion", tiny, f"run={tmp_path / how}", *words, f"images={images}")
            inside("train_guided", tiny, f"run={tmp_path / how}", *words, *online, f"images={max(int(images), 128)}")
    stage("train_diffusion", tiny, f"run={tmp_path / 'ranks'}", *words, "images=192", ranks=2)
    inside("train_diffusion", tiny, f"run={tmp_path / 'micro'}", *words, "images=192", "micro=8", "precision=bf16")
    for folder in ("diffusion/base", "guided/online"):
        (a, _), (b, _) = (state_of(tmp_path / how / folder) for how in ("whole", "broken"))
        assert any("momentum" in k for k in a) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [state_of(tmp_path / how / "diffusion/base")[1] for how in ("whole", "ranks", "micro")]
    for line, ranks, micro in zip(*logs):
        assert line["loss"] == pytest.approx(ranks["loss"], rel=1e-4)
        assert line["loss"] == pytest.approx(micro["loss"], rel=0.05)

"""Probing other images than the model was trained on, and feedback in a U-ViT."""
import numpy as np
import torch
from test_dense import WORDS, result, run  # noqa: F401  (run is a fixture)
from test_features import inputs, network
from test_probe_heads import called

import probe
from extract_features import reader
from probe import DifFeed, mirrors
from train_diffusion import time_embedding


def test_feedback_in_a_uvit():
    """Sums at the ends of every long skip, as in a pass written by hand; zeroed feedback is the plain pass."""
    net, (x, t) = network("uvit"), inputs()
    name, (sources, targets) = "up-vit-block1-out", zip(*mirrors(net))
    assert sources == ("up-vit-block1-out", "up-vit-block0-out") and targets == tuple(net.in_blocks)
    kept = reader(net, sources, "none")(x, t / 1000)
    head = DifFeed(net, name, [k.shape[1:] for k in kept], kept[0].shape[1:], 5, 32, 1, 4).eval()
    for g in head.back:
        torch.nn.init.zeros_(g[1].weight)
    assert torch.equal(head([kept], x, t / 1000), head.head([reader(net, [name], "none")(x, t / 1000)]))
    for g in head.back:
        torch.nn.init.ones_(g[1].weight)
    h, skips = torch.cat([time_embedding(t, net.channels)[:, None], net.patch_embed(x)], 1) + net.pos_embed, []
    for block, f, k in zip(net.in_blocks, head.back, kept):
        h = block(h)
        h[:, 1:] += f(k).flatten(2).transpose(1, 2)
        skips.append(h)
    h = net.mid_block(h)
    for block in net.out_blocks:
        h = block(h, skips.pop())
    assert torch.allclose(head([kept], x, t / 1000), head.head([[h[:, 1:].transpose(1, 2).unflatten(2, (8, 8))]]), atol=1e-5)


def test_protocols_on_other_images(monkeypatch, refuse, tiny, run, tmp_path):  # noqa: F811
    """transfer= reads another data section at the model's size, once; results say so and land in the run."""
    g = np.random.default_rng(0)
    np.savez(tmp_path / "other.npz", images=g.integers(0, 256, (90, 3, 32, 32), dtype=np.uint8), classes=np.arange(90) % 3,
             test_images=g.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8), test_classes=np.arange(30) % 3)
    (tmp_path / "other.yaml").write_text(f"data: {{source: arrays, root: {tmp_path / 'other.npz'}, size: 99}}\nprobe: {{}}\n")
    words = [tiny, f"run={run}", "protocol=head", "head=linear", "name=moved", f"transfer={tmp_path / 'other.yaml'}", *WORDS, "activations=mid-repeat1-res-out",
             "per_class=5", "controls=random", "draws=1"]
    called(monkeypatch, probe, *words)
    got = result(run, "moved")
    assert got["train_images"] == 15 and got["test_images"] == 30 and set(got["rows"]) == {"linear", "random weights"}
    assert set(got["recipe"]["transfer"]) == {"train", "test"} and (run / "transfer/other/data/train/images.npy").exists()
    assert "now None" in refuse("probe", *[w for w in words if not str(w).startswith("transfer=")])               # is no result on the run's own images
    called(monkeypatch, probe, *words[:2], "name=moved-sweep", words[5], *WORDS[:2], "activations=mid*res-out", "t=0.8", "fit=40", "validation=20", "K=3")
    assert "looked at other images" in refuse("extract_features", *words[:2], *WORDS[:2], "choice=moved-sweep", "name=bad")
    called(monkeypatch, probe, *words[:2], "protocol=boxes", "name=moved-boxes", words[5], *WORDS[:4], "boxed=4")
    assert "oracle" not in result(run, "moved-boxes") and result(run, "moved-boxes")["images"] == 4              # these images have no true boxes


def test_bad_input(refuse, tiny, run, tmp_path):  # noqa: F811
    words = [tiny, f"run={run}", "protocol=head", "name=bad", *WORDS]
    assert "transfer=none.yaml" in refuse("probe", *words, "transfer=none.yaml")
    np.savez(tmp_path / "more.npz", images=np.zeros((20, 3, 32, 32), np.uint8), classes=np.arange(20) % 3, test_images=np.zeros((8, 3, 32, 32), np.uint8),
             test_classes=np.arange(8))
    (tmp_path / "more.yaml").write_text(f"data: {{source: arrays, root: {tmp_path / 'more.npz'}}}")
    assert "the test images have class 3, 4, 5, 6, 7, the training" in refuse("probe", *words, f"transfer={tmp_path / 'more.yaml'}", "activations=mid-repeat1-res-out")
    assert "see latents" in refuse("probe", *words, f"transfer={tmp_path / 'more.yaml'}", "data.latents=x", "--dry-run")
    (tmp_path / "other.yaml").write_text("data: {source: shapes, train: 7}")
    assert "another data section" in refuse("probe", *words, f"transfer={tmp_path / 'other.yaml'}")

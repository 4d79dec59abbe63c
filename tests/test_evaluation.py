"""Distances between sets of features against scipy, closed forms and plain loops."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import stage

import sample_ode
from sample_ode import Judge, features_of, frechet, kernel_distance, manifold, nearest
from configs.data import torchvision_datasets
from configs.run import UserError


def points(n, d, seed=0, spread=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g) / d ** 0.5
    return spread * torch.randn(n, d, generator=g) @ mix + shift


def with_moments(n, mean, covariance, seed=0):
    """n points whose sample mean and sample covariance are exactly the given ones (float64)."""
    x = points(n, len(mean), seed).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance

@pytest.mark.parametrize("n, d", [(500, 1), (500, 16), (300, 64), (40, 64)])     # the last one: fewer points than dimensions
def test_frechet_against_the_matrix_root_of_scipy(n, d):
    a, b = points(n, d), points(n + 50, d, 1, 1.5, 0.3)
    x, y = a.double().numpy(), b.double().numpy()
    c1, c2 = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6 if n > d else 1e-3)


def test_frechet_of_gaussians_with_commuting_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2, in any basis."""
    q, _ = torch.linalg.qr(points(8, 8, 5).double())
    s1, s2 = torch.linspace(0.1, 2, 8).double(), torch.linspace(1.5, 0.5, 8).double()
    m1, m2 = torch.zeros(8).double(), torch.linspace(-1, 1, 8).double()
    a, b = (with_moments(200 + 40 * i, m, q @ torch.diag(s ** 2) @ q.T, i) for i, (m, s) in enumerate([(m1, s1), (m2, s2)]))
    assert frechet(a, b) == pytest.approx(float(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()), rel=1e-9)


def test_frechet_is_a_squared_distance():
    a, b = points(300, 12), points(400, 12, 1, 2.0)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9) and frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9) and frechet(a, b) > 0
    assert frechet(a, a + 0.5) == pytest.approx(12 * 0.25, rel=1e-5)             # a shift costs its square
    assert frechet(3 * a, 3 * b) == pytest.approx(9 * frechet(a, b), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance

def test_kernel_distance_against_a_plain_loop():
    a, b = points(30, 5), points(23, 5, 1, 1.3, 0.2)
    x, y = a.double().numpy(), b.double().numpy()
    k = lambda u, v: (u @ v / 5 + 1) ** 3
    pairs = lambda s: sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
    expected = pairs(x) + pairs(y) - 2 * np.mean([[k(u, v) for v in y] for u in x])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(a, b, limit=10) == pytest.approx(kernel_distance(a[:10], b[:10]), rel=1e-12)


def test_kernel_distance_against_torchmetrics():
    torchvision_datasets()                                # torchmetrics imports torchvision: make sure that this works beside a CPU-only torch
    from torchmetrics.image.kid import poly_mmd
    a, b = points(200, 16), points(200, 16, 1, 1.3, 0.2)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a.double(), b.double())), rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Two sets of one distribution: zero on average, so sometimes negative."""
    g = torch.Generator().manual_seed(0)
    values = np.array([kernel_distance(torch.randn(40, 3, generator=g), torch.randn(40, 3, generator=g)) for _ in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20 and (values < 0).any() and (values > 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# Precision, recall, density, coverage; nearest neighbours

def by_force(fake, real, k):
    """The definitions, with one loop per word."""
    distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    radius = lambda s: np.sort(distance(s, s), 1)[:, k]                          # column 0 is the point itself
    d, r_real, r_fake = distance(fake, real), radius(real), radius(fake)
    return dict(precision=np.mean([any(d[i, j] < r_real[j] for j in range(len(real))) for i in range(len(fake))]),
                recall=np.mean([any(d[i, j] < r_fake[i] for i in range(len(fake))) for j in range(len(real))]),
                density=sum(d[i, j] < r_real[j] for i in range(len(fake)) for j in range(len(real))) / (k * len(fake)),
                coverage=np.mean([any(d[i, j] < r_real[j] for i in range(len(fake))) for j in range(len(real))]))


@pytest.mark.parametrize("k, spread, shift", [(1, 1.0, 0.0), (3, 0.4, 0.0), (5, 2.0, 0.5), (5, 1.0, 30.0)])
def test_manifold_against_brute_force(k, spread, shift):
    fake, real = points(70, 3, 1, spread, shift), points(90, 3)
    expected = by_force(fake.double().numpy(), real.double().numpy(), k)
    assert manifold(fake, real, k) == pytest.approx(expected, abs=1e-6)
    if spread != 1:
        assert 0.05 < expected["precision"] < 1 or 0.05 < expected["recall"] < 1     # the case says something


def test_manifold_of_a_set_with_itself():
    x = points(1500, 8)                                   # more than one chunk
    got = manifold(x, x, 5)
    assert (got["precision"], got["recall"], got["coverage"]) == (1, 1, 1) and 0.9 < got["density"] <= 1.1


def test_manifold_tells_narrow_from_wide():
    real = points(600, 4)
    narrow, wide, elsewhere = (manifold(points(600, 4, 0)[torch.randperm(600, generator=torch.Generator().manual_seed(1))] * s + m, real, 5) for s, m in ((0.3, 0), (3.0, 0), (1, 50)))
    assert narrow["precision"] > 0.95 and narrow["recall"] < 0.6 and wide["precision"] < 0.6 and wide["recall"] > 0.9
    assert elsewhere == dict(precision=0, recall=0, density=0, coverage=0)
    assert manifold(real[:3], real, 5)["precision"] == 1  # fewer points than neighbours


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest(offset):
    """Also far from the origin, where |a|^2 + |b|^2 - 2 ab loses the small distances that memorisation is about."""
    train, x = points(700, 16) + offset, points(600, 16, 1) + offset
    x[:5], x[5] = train[:5], train[6] + 1e-3
    expected = np.sqrt(((x.double().numpy()[:, None] - train.double().numpy()[None]) ** 2).sum(-1)).min(1)
    got = nearest(x, train).numpy()
    assert got == pytest.approx(expected, rel=1e-3, abs=5e-3)
    fake, real = x[:200], train[:200]
    assert manifold(fake, real, 3) == pytest.approx(manifold(fake - offset, real - offset, 3), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators

def test_features_of_streams_images_in_order():
    run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (230, 3, 8, 8), dtype=np.uint8)
    net = Judge(4).eval()
    rows = np.arange(20, 230)
    assert torch.allclose(torch.cat(list(features_of(run, net, images, rows, "test"))), net(torch.from_numpy(images[20:])), atol=1e-5)
    with pytest.raises(UserError, match="non-finite"):
        list(features_of(run, lambda x: x.float().flatten(1) / 0, images, rows, "test"))


def test_features_that_do_not_fit_memory(tmp_path, monkeypatch):
    """Moments and nearest rows of a memory-mapped file, chunk by chunk, are those of the whole."""
    x = (100 + torch.randn(1050, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    np.save(tmp_path / "x.npy", x.numpy())
    there, a = np.load(tmp_path / "x.npy", mmap_mode="r"), x[:300] + 0.5
    assert len(list(sample_ode.chunks_of(there, size=100))) == 11
    monkeypatch.setattr(sample_ode.chunks_of, "__defaults__", ("cpu", 100))
    mean, covariance = sample_ode.moments(there)
    assert np.allclose(mean, x.double().mean(0), rtol=1e-12) and np.allclose(covariance, np.cov(x.double().numpy().T), rtol=1e-9)
    assert frechet(a, there) == pytest.approx(frechet(a, x), rel=1e-9) == pytest.approx(frechet(sample_ode.moments(a), (mean, covariance)), rel=1e-12)
    assert torch.allclose(nearest(a, there), torch.cdist(a.double(), x.double()).amin(1).float(), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Inception: its weights are not here, so a small file in their layout stands in

class Layers(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, (32, 32))[:, :2].reshape(len(x), 2048)


class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("size", [28, 32, 256, 320])
def test_images_reach_inception_as_in_clean_fid(tmp_path, monkeypatch, size):
    """Resized as clean-fid does it, to 0.01 grey levels, then scaled as the published network wants it."""
    torchvision_datasets()
    from cleanfid.resize import build_resizer
    torch.jit.script(Base()).save(tmp_path / "inception-2015-12-05.pt")
    monkeypatch.setenv("INCEPTION_DIR", str(tmp_path))
    run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), turns=lambda: [True])
    evaluator, text, name = sample_ode.open_evaluator(run, "inception")
    images = np.random.default_rng(0).integers(0, 256, (6, 3, size, size), dtype=np.uint8)
    resized = torch.from_numpy(np.stack([build_resizer("clean")(x) for x in images.transpose(0, 2, 3, 1)]).transpose(0, 3, 1, 2))
    assert (sample_ode.inception_resize(torch.from_numpy(images)) - resized).abs().max() < 0.011
    got = torch.cat(list(features_of(run, evaluator, images, np.arange(6), "features")))
    assert name == "fid" and "clean" in text and torch.allclose(got, Layers()((resized - 128) / 128), atol=1e-4)


def test_inception_without_weights_or_network(tmp_path, monkeypatch):
    torchvision_datasets()
    import cleanfid.inception_torchscript

    def offline(fpath):
        raise OSError("no route")
    monkeypatch.setattr(cleanfid.inception_torchscript, "check_download_inception", offline)
    monkeypatch.setenv("INCEPTION_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded \(no route\); put inception-2015-12-05.pt there"):
        sample_ode.open_evaluator(SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), turns=lambda: [True]), "inception")


def test_pixel_components_are_those_of_an_svd_and_need_no_classes(small_run, tiny):
    images = np.load(small_run / "data/train/images.npy")
    features = sample_ode.pixel_components(images)(torch.from_numpy(images))
    x = torch.from_numpy(images).double().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)).flatten(1) / 127.5 - 1
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    best = u[:, :64] * s[:64] @ (u[:, :64] * s[:64]).T   # all products of the best 64 numbers an image
    assert features.shape == (160, 64) and torch.allclose(features.double() @ features.double().T, best, atol=1e-3)
    stage("sample_ode", tiny, f"run={small_run}", "data.train=160", "data.test=40", "n=24", "name=by-pixels", "evaluator=pixels", "steps=1", "guidance=1")
    scores = json.loads((small_run / "samples/by-pixels/metrics.json").read_text())["scores"]
    assert scores["evaluator"].startswith("pixels") and scores["frechet"] > 0

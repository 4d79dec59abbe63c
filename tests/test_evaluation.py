"""Distances between sets of features against scipy, closed forms and plain loops."""
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import inside
from PIL import Image

import sample_ode
from sample_ode import Judge, features_of, frechet, manifold, nearest
from configs.data import Split, torchvision_datasets
from configs.run import Data, Processes, UserError
from configs.shapes import draw_shapes
from train_diffusion import Condition


class Here(Processes):
    device = torch.device("cpu")


class Averages(torch.nn.Module):
    """An evaluator: averages over a grid of 2 x 2."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


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


@pytest.mark.parametrize(
    "n, d", [(500, 1), (500, 16), (300, 64), (40, 64)]
)  # the last one: fewer points than dimensions
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
    a, b = (
        with_moments(200 + 40 * i, m, q @ torch.diag(s**2) @ q.T, i) for i, (m, s) in enumerate([(m1, s1), (m2, s2)])
    )
    assert frechet(a, b) == pytest.approx(float(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()), rel=1e-9)


def test_frechet_is_a_squared_distance():
    a, b = points(300, 12), points(400, 12, 1, 2.0)
    assert (
        frechet(a, a) == pytest.approx(0, abs=1e-9)
        and frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
        and frechet(a, b) > 0
    )
    assert frechet(a, a + 0.5) == pytest.approx(12 * 0.25, rel=1e-5)             # a shift costs its square
    assert frechet(3 * a, 3 * b) == pytest.approx(9 * frechet(a, b), rel=1e-4)


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
    narrow, wide, elsewhere = (
        manifold(points(600, 4, 0)[torch.randperm(600, generator=torch.Generator().manual_seed(1))] * s + m, real, 5)
        for s, m in ((0.3, 0), (3.0, 0), (1, 50))
    )
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

def test_features_of_images_in_order():
    images = np.random.default_rng(0).integers(0, 256, (230, 3, 8, 8), dtype=np.uint8)
    net = Judge(4).eval()
    with torch.no_grad():
        assert torch.allclose(features_of(Here(), net, images), net(torch.from_numpy(images)), atol=1e-5)


def test_features_that_do_not_fit_memory(tmp_path, monkeypatch):
    """Moments and nearest rows of a memory-mapped file, chunk by chunk, are those of the whole."""
    x = 100 + torch.randn(1050, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        6, 6, generator=torch.Generator().manual_seed(1)
    )
    np.save(tmp_path / "x.npy", x.numpy())
    there, a = np.load(tmp_path / "x.npy", mmap_mode="c"), x[:300] + 0.5
    assert len(list(sample_ode.chunks_of(there, size=100))) == 11
    monkeypatch.setattr(sample_ode.chunks_of, "__defaults__", ("cpu", 100))
    mean, covariance = sample_ode.moments(there)
    assert np.allclose(mean, x.double().mean(0), rtol=1e-12) and np.allclose(
        covariance, np.cov(x.double().numpy().T), rtol=1e-9
    )
    assert (
        frechet(a, there)
        == pytest.approx(frechet(a, x), rel=1e-9)
        == pytest.approx(frechet(sample_ode.moments(a), (mean, covariance)), rel=1e-12)
    )
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
    run = Here()
    evaluator, text = sample_ode.open_network(run, "inception")
    images = np.random.default_rng(0).integers(0, 256, (6, 3, size, size), dtype=np.uint8)
    resized = torch.from_numpy(
        np.stack([build_resizer("clean")(x) for x in images.transpose(0, 2, 3, 1)]).transpose(0, 3, 1, 2)
    )
    assert (sample_ode.inception_resize(torch.from_numpy(images)) - resized).abs().max() < 0.011
    got = features_of(run, evaluator, images)
    assert "clean" in text and torch.allclose(got, Layers()((resized - 128) / 128), atol=1e-4)


def test_inception_without_weights_or_network(tmp_path, monkeypatch):
    torchvision_datasets()
    import cleanfid.inception_torchscript

    def offline(fpath):
        raise OSError("no route")
    monkeypatch.setattr(cleanfid.inception_torchscript, "check_download_inception", offline)
    monkeypatch.setenv("INCEPTION_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded \(no route\); put inception-2015-12-05.pt into"):
        sample_ode.open_network(Here(), "inception")


def test_pixel_components_are_those_of_an_svd(small_run):
    images = np.load(small_run / "data/train/images.npy")
    features = sample_ode.pixel_components(images)(torch.from_numpy(images))
    x = (
        torch.from_numpy(images).double().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)).flatten(1) / 127.5
        - 1
    )
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    best = u[:, :64] * s[:64] @ (u[:, :64] * s[:64]).T   # all products of the best 64 numbers an image
    assert features.shape == (160, 64) and torch.allclose(features.double() @ features.double().T, best, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Copies, limits, refusals, caches

def test_near_copies_are_found():
    """Exact, mirrored, with noise, blurred, moved by a pixel; new images are as far from training images as others."""
    train, other, new = (torch.from_numpy(draw_shapes(seed, np.arange(n))[0]) for seed, n in enumerate((600, 300, 200)))
    small = sample_ode.thumbnail
    x, g = train[:200].float(), torch.Generator().manual_seed(0)
    copies = dict(exact=x, mirrored=x.flip(3), moved=x.roll(1, 3),
                  noise=(x + 10 * torch.randn(x.shape, generator=g)).clamp(0, 255),
                  blurred=torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    found = {name: sample_ode.copying(small(v), small(other), small(train).numpy()) for name, v in copies.items()}
    assert all(v["copies"] > 0.8 and v["memorisation"] < 0.6 for v in found.values()), found
    fresh = sample_ode.copying(small(new), small(other), small(train).numpy())
    assert fresh["copies"] < 0.05 and fresh["memorisation"] == pytest.approx(1, abs=0.1)


def sampled(monkeypatch, tiny, run, *words):
    """The metrics of a stage that runs in this process."""
    words = [f"run={run}", "data.train=160", "data.test=40", "n=24", "steps=1", "name=x", "overwrite=true", *words]
    monkeypatch.setattr(sys, "argv", ["sample_ode.py", str(tiny), *words])
    sample_ode.main()
    return json.loads((run / "samples/x/metrics.json").read_text())


def test_scores_say_what_real_images_would_score(monkeypatch, tiny, small_run, capsys):
    """An unconditional model ignores several w; fewer images than features are pointed out; nothing is left behind."""
    m = sampled(monkeypatch, tiny, small_run, "guidance=1,2")
    scores = m["scores"]
    assert scores["evaluator"].startswith("pixels") and "selection" not in m and m["w"] == 1
    assert 0 < scores["distance_floor"] < scores["frechet"] and 0 < scores["coverage_ceiling"] <= 1
    said = capsys.readouterr().out
    assert 0 <= scores["copies"] <= 1 and "as many other real images" in said
    assert scores["singular"] and scores["evaluator_features"] == 64
    assert "note: pixels: of 24 samples (reference: test, 40 images) in 64 features" in said
    assert {f.name for f in (small_run / "samples/x").iterdir()} == {"images.npy", "grid.png", "metrics.json"}
    m = sampled(monkeypatch, tiny, small_run, "autoguide=diffusion/base", "guidance=1,1", "select=10")
    assert len(m["selection"]["curve"]) == 2 and "fewer images than" in capsys.readouterr().out
    assert (small_run / "samples/x/guidance.png").stat().st_size > 500


def test_guidance_is_shown_by_w(monkeypatch, tmp_path):
    """All w write their samples to one file: each row of the picture shows its own."""
    def generate(run, cfg, field, state, w, file):
        np.save(file, np.full((cfg.n, 3, 8, 8), 50 * w, np.uint8))
        return dict(nfe=1)
    monkeypatch.setattr(sample_ode, "generate", generate)
    run = Here()
    run.say = lambda *words: None
    cfg = sample_ode.SampleOde(guidance=[1, 2, 4], select=20)
    evaluator = SimpleNamespace(kind="frechet", distance=lambda file, split: abs(np.load(file)[0, 0, 0, 0] - 100.0),
                                data=dict(train=range(99)), features=dict(train=np.zeros((99, 2))))
    w, told = sample_ode.choose_w(run, cfg, None, {}, evaluator, tmp_path / "spare.npy")
    assert w == 2 and told["curve"] == [(1, 50.0), (2, 0.0), (4, 100.0)]
    sheet = np.array(Image.open(tmp_path / "guidance.png"))
    assert [(sheet == value).all(2).any() for value in (50, 100, 200)] == [True] * 3


def test_a_sweep_counts_evaluations_and_several_evaluators_score_alike(monkeypatch, tiny, small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    m = sampled(monkeypatch, tiny, run, "sweep=euler,heun,dopri5", "sweep_steps=2,3", "select=16")
    curves = m["nfe_sweep"]
    assert [nfe for nfe, _ in curves["euler"]] == [2, 3] and [nfe for nfe, _ in curves["heun"]] == [4, 6]
    counts = [nfe for nfe, _ in curves["dopri5"]]
    assert counts == sorted(counts) and counts[0] >= 7 and all(d > 0 for curve in curves.values() for _, d in curve)
    picture = np.asarray(Image.open(run / "samples/x/nfe.png"))
    assert picture.shape == (480, 760, 3) and (picture != 255).any(2).sum() > 500

    torch.jit.script(Averages()).save(run / "averages.ts")
    m = sampled(monkeypatch, tiny, run, f"evaluator=pixels,{run}/averages.ts")
    other = m["others"][f"{run}/averages.ts"]["scores"]
    assert m["scores"]["evaluator"].startswith("pixels") and "averages.ts" in other["evaluator"]
    assert 0 < other["frechet"] != m["scores"]["frechet"] and other["copies"] == m["scores"]["copies"]
    assert other["singular"] == (other["evaluator_features"] >= 24)


class Rows(torch.nn.Module):
    """An evaluator as a file: `times` the mean colours, or something that is no evaluator."""

    def __init__(self, times=1.0, what="rows"):
        super().__init__()
        self.times, self.what = times, what

    def forward(self, x):
        rows = x.float().mean((2, 3)) * self.times
        if self.what == "maps":
            rows = x.float()
        if self.what == "nan":
            rows = rows / 0.0 - rows / 0.0
        return rows


def test_an_evaluator_file_that_changed_scores_anew(tiny, small_run, refuse, tmp_path):
    words = [tiny, f"run={tmp_path}/run", "name=x", "n=16", f"evaluator={tmp_path}/e.ts"]
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    words += ["data.train=160", "data.test=40"]
    torch.jit.script(Rows()).save(tmp_path / "e.ts")
    inside("sample_ode", *words)
    assert "done already" in inside("sample_ode", *words)
    torch.jit.script(Rows(3.0)).save(tmp_path / "e.ts")
    assert "was made with evaluators=" in refuse("sample_ode", *words)
    for what in ("maps", "nan"):
        torch.jit.script(Rows(what=what)).save(tmp_path / "e.ts")
        assert "one row of finite numbers" in refuse("sample_ode", *words, "overwrite=true")
    shown = [*words[:2], *words[-2:], "--table"]
    said = inside("sample_ode", *shown)
    (tmp_path / "run/samples/x").rename(tmp_path / "run/samples/.x.12345678.old")            # a kill may leave it
    assert "reference" in said and " x " in said
    assert "no evaluated samples" in refuse("sample_ode", *shown)


def test_samples_know_the_images_they_were_scored_against(tiny, small_run, refuse, tmp_path):
    words = [tiny, f"run={tmp_path}/run", "data.train=100", "data.test=40"]
    keys = [f"checkpoint={small_run}/diffusion/base/checkpoint.pt", "n=8", "steps=1", "name=x"]
    inside("train_diffusion", *words, "--prepare")
    inside("sample_ode", *words, *keys)
    (tmp_path / "run/samples/x").rename(tmp_path / "run/samples/y")              # what it is called decides nothing
    keys[-1] = "name=y"
    assert "done already" in inside("sample_ode", *words, *keys)
    shutil.rmtree(tmp_path / "run/data")
    (tmp_path / "run/config.yaml").unlink()
    inside("train_diffusion", *words, "data.seed=1", "--prepare")
    assert "was made with images=" in refuse("sample_ode", *words, "data.seed=1", *keys)


def test_what_cannot_be_scored_is_refused_before_sampling(refuse, tiny, small_run):
    words = [tiny, f"run={small_run}", "data.train=160", "data.test=40", "name=no"]
    assert "evaluate=false guidance=W" in refuse("sample_ode", *words, "evaluator=judge")        # of 160 images
    assert "name one w" in refuse("sample_ode", *words, "autoguide=diffusion/base", "guidance=1,2", "evaluate=false")
    assert "takes judge" in refuse("sample_ode", *words, "evaluator=x.ts")
    assert not (small_run / "samples/no").exists()


def test_one_image_is_too_few_to_compare_with(tmp_path, monkeypatch):
    data = Split(*draw_shapes(0, np.arange(1)), dict(fingerprint="abc"))
    monkeypatch.setattr(sample_ode, "load_data", lambda run, split: data)
    run = Here()
    run.dir, run.data = tmp_path, Data()
    with pytest.raises(UserError, match="train: one image has no covariance"):
        sample_ode.Evaluator(run, "pixels")


def test_rows_of_the_grid_are_the_most_frequent_labels(tmp_path):
    images = np.arange(13, dtype=np.uint8)[:, None, None, None] + np.zeros((13, 3, 8, 8), np.uint8)
    np.save(tmp_path / "images.npy", images)
    labels = torch.tensor([7] * 2 + [4] * 11)
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ode, "save_grid", lambda path, *given, head: shown.extend(given))
        sample_ode.sample_sheet(sample_ode.SampleOde(), Condition("label", torch.arange(9)), labels, 1.0, tmp_path)
    cells, columns, names = shown
    assert columns == 10 and names == ["4", "7"] and cells[:, 0, 0, 0].tolist() == [*range(2, 12), 0, 1, *[255] * 8]


def test_settings_that_do_not_matter_do_not_lock_samples(monkeypatch, tiny, small_run, capsys, refuse):
    """Of a model without labels, and of encoding."""
    words = [str(tiny), f"run={small_run}", "data.train=160", "data.test=40", "n=24", "steps=1"]
    for first, more in ((["name=free"], ["compile=true", "interval=0.1,0.9"]),
                        (["name=codes", "direction=encode"], ["guidance=1,2", "evaluator=judge"])):
        for given in (first, [*first, *more]):
            monkeypatch.setattr(sys, "argv", ["sample_ode.py", *words, *given])
            sample_ode.main()
        assert "done already" in capsys.readouterr().out
    assert "direction=generate" in refuse("sample_ode", *words, "direction=encode", "features=mid*-out")


def test_damaged_caches_are_one_line(refuse, tiny, small_run, monkeypatch):
    sampled(monkeypatch, tiny, small_run, "n=2")
    for file in (small_run / "samples/.reference").glob("*.npy"):
        good = file.read_bytes()
        for bad in (b"", good[:-9]):
            file.write_bytes(bad)
            said = refuse("sample_ode", tiny, f"run={small_run}", "data.train=160", "data.test=40", "name=no",
                          "autoguide=diffusion/base", "guidance=1,2")            # to choose w all caches are read
            assert file.name in said and "delete it" in said
        file.write_bytes(good)


def test_the_judge_is_trained_once(tmp_path, monkeypatch):
    """Whoever saves it first, all use the same; a damaged file is named."""
    images, classes, *_ = draw_shapes(0, np.arange(300))
    data = Split(images, classes, None, None, dict(fingerprint="abc"))
    monkeypatch.setattr(sample_ode, "load_data", lambda run, split: data)
    run = Here()
    run.dir, run.data = tmp_path, Data()
    with pytest.raises(UserError, match="300 training images of 10 known classes are too few"):
        sample_ode.open_judge(run)
    monkeypatch.setattr(sample_ode, "JUDGE_UPDATES", 2)
    one = replace(data, classes=np.zeros(300, np.int64))  # it would learn nothing, and be right always
    monkeypatch.setattr(sample_ode, "load_data", lambda run, split: one)
    with pytest.raises(UserError, match="of 1 known classes"):
        sample_ode.open_judge(run)
    unknown = replace(data, classes=np.full(300, -1))     # of the test images
    monkeypatch.setattr(sample_ode, "load_data", lambda run, split: data if split == "train" else unknown)
    assert "accuracy not measured" in sample_ode.open_judge(run)[1]
    (tmp_path / "samples/.judge.pt").unlink()
    monkeypatch.setattr(sample_ode, "load_data", lambda run, split: data)
    (a, text), (b, again) = sample_ode.open_judge(run), sample_ode.open_judge(run)
    assert text == again and "test accuracy" in text and all(map(torch.equal, a.parameters(), b.parameters()))
    file = tmp_path / "samples/.judge.pt"
    first = file.read_bytes()
    file.unlink()

    def another_is_faster(*given):
        file.write_bytes(first)
        return 0.0
    with monkeypatch.context() as patch:
        patch.setattr(sample_ode, "train_judge", another_is_faster)
        assert sample_ode.open_judge(run)[1] == text
    data.classes[:] = data.classes[::-1].copy()
    with pytest.raises(UserError, match="other images, or classes"):
        sample_ode.open_judge(run)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="judge.pt: damaged"):
        sample_ode.open_judge(run)

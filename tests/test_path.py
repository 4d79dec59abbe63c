"""Noise paths, prediction targets and the loss against closed forms. t = 0 is noise, t = 1 is data."""
import math
import typing

import numpy as np
import pytest
import torch

from configs.run import wide
from extract_features import noise_level
from train_diffusion import PATHS, NoisePath, Training, diffuse, loss_per_image, preview, to_x_and_z


class CosineSine(NoisePath):
    """A path of one's own: a quarter of a circle, from the three functions that a path has to say."""

    def alpha(self, t):
        return (math.pi / 2 * t).sin()

    def sigma(self, t):
        return (math.pi / 2 * t).cos()

    def rates(self, t):
        return math.pi / 2 * (math.pi / 2 * t).cos(), -math.pi / 2 * (math.pi / 2 * t).sin()


class Straight(NoisePath):
    """The straight path again, by the defaults."""
    alpha, sigma = PATHS["cv"].alpha, PATHS["cv"].sigma

    def rates(self, t):
        return torch.ones_like(t), torch.full_like(t, -PATHS["cv"].c)


CV, VP, CS = PATHS["cv"], PATHS["vp"], CosineSine()
ALL = pytest.mark.parametrize("path", [CV, VP, CS], ids=["cv", "vp", "cosine-sine"])
PREDICT = pytest.mark.parametrize("predict", ["v", "eps", "x"])


def test_every_path_can_be_named_and_its_rates_are_derivatives():
    assert set(typing.get_args(Training.__annotations__["path"])) == set(PATHS)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for path in [path for path in PATHS.values() if hasattr(path, "rates")] + [CS]:
        for value, rate in zip((path.alpha, path.sigma), path.rates(t)):
            assert torch.allclose((value(t + 1e-6) - value(t - 1e-6)) / 2e-6, torch.as_tensor(rate).to(t), atol=1e-8)


def batch(n=64, dtype=torch.float64):
    """(x, z, t) of n rows; t keeps away from the ends, where eps and x each leave the other one undetermined."""
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 3, 4, 4, generator=g, dtype=dtype) for _ in "xz")
    return x, z, torch.rand(n, generator=g, dtype=dtype) * 0.9 + 0.05


def perfect(predict, path, x, z, t):
    """The right answer of a network that predicts v, eps or x."""
    return {"v": path.v_target(x, z, wide(t)), "eps": z, "x": x}[predict]


def test_ends():
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert CV.alpha(t).tolist() == [0, 1] and CV.sigma(t).tolist() == pytest.approx([1, 1e-4], abs=1e-15)
    assert VP.alpha(t)[1] == 1 and VP.sigma(t)[1] == 0
    assert float(VP.alpha(t)[0] ** 2) == pytest.approx(4.04e-5, abs=0.005e-5)
    assert float(VP.to_s(t)[0]) == pytest.approx(157, abs=0.5)


@ALL
def test_time_runs_from_noise_to_data(path):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    assert (path.alpha(t).diff() > 0).all() and (path.sigma(t).diff() < 0).all()
    x, z, _ = batch()
    early, late = (diffuse(path, x, z, torch.full((len(x),), v, dtype=x.dtype)) for v in (0.02, 0.99))
    assert (early - z).square().mean() < 0.01 and (late - x).square().mean() < 0.02


@ALL
@PREDICT
def test_previews_run_from_noise_to_data(path, predict):
    """All data is one point: whatever the noise, pictures end there."""
    point, z = 0.5, batch()[1].float()

    def net(x, time):
        t = wide(time / 1000)
        noise = (x - path.alpha(t) * point) / path.sigma(t).clamp(min=1e-6)
        data = torch.full_like(x, point)
        return {"v": path.v_target(data, noise, t), "eps": noise, "x": data}[predict]
    assert torch.allclose(preview(net, path, predict, z), torch.full_like(z, point), atol=2e-3)


@ALL
@PREDICT
def test_prediction_gives_back_data_and_noise(path, predict):
    x, z, t = batch()
    x_hat, z_hat = to_x_and_z(path, predict, perfect(predict, path, x, z, t), diffuse(path, x, z, t), t)
    assert torch.allclose(x_hat, x, atol=1e-10) and torch.allclose(z_hat, z, atol=1e-10)


@pytest.mark.parametrize("path", [CV, CS])
def test_velocity_is_the_derivative(path):
    x, z, t = batch()
    _, speed = torch.autograd.functional.jvp(lambda s: diffuse(path, x, z, s), t, torch.ones_like(t))
    assert torch.allclose(speed, path.v_target(x, z, wide(t)), atol=1e-12)
    assert torch.allclose(speed, path.slope(x, z, wide(t)), atol=1e-12)


def test_defaults_of_a_path():
    """What the straight path says for itself is what the defaults make of its alpha, sigma and their derivatives."""
    x, z, t = batch()
    x_t, v = diffuse(CV, x, z, t), CV.v_target(x, z, wide(t))
    assert torch.allclose(Straight().v_target(x, z, wide(t)), v, atol=1e-12)
    for got, wanted in zip(Straight().from_v(v, x_t, wide(t)), CV.from_v(v, x_t, wide(t))):
        assert torch.allclose(got, wanted, atol=1e-12)
    x_hat, z_hat = CV.from_v(v, x_t, wide(t))
    assert torch.allclose(x_t + wide(1 - t) * v, x_hat + 1e-4 * z_hat, atol=1e-12)               # end point of the path


def test_angular_velocity_is_the_derivative_by_angle():
    """v of Salimans and Ho: with alpha = cos p and sigma = sin p, v = d x_p / d p."""
    x, z, t = batch()
    p, h = torch.atan2(VP.sigma(t), VP.alpha(t)), 1e-5
    ahead, back = (wide((p + d).cos()) * x + wide((p + d).sin()) * z for d in (h, -h))
    assert torch.allclose((ahead - back) / (2 * h), VP.v_target(x, z, wide(t)), atol=1e-8)


def test_vp_slope_is_the_derivative_in_rho():
    x, z, t = batch()
    y = lambda t: diffuse(VP, x, z, t) / wide(VP.alpha(t))
    ahead, back = t + 1e-6, t - 1e-6
    rate = (y(ahead) - y(back)) / wide(VP.to_s(ahead) - VP.to_s(back))
    assert torch.allclose(rate, VP.slope(x, z, wide(t)), atol=1e-5)


def test_vp_table_is_that_of_ddpm():
    abar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    k = np.arange(1001)
    t = torch.from_numpy(1 - k / 1000)
    assert np.allclose(VP.alpha(t) ** 2, abar, rtol=1e-9)
    assert np.allclose(VP.sigma(t) ** 2, 1 - abar, rtol=1e-9, atol=1e-15)
    between = torch.from_numpy(1 - (k[:-1] + 0.25) / 1000)                       # ln abar is interpolated linearly
    assert np.allclose(VP.log_abar(between), 0.75 * np.log(abar[:-1]) + 0.25 * np.log(abar[1:]), rtol=1e-9)
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(VP.alpha(t) ** 2 + VP.sigma(t) ** 2, torch.ones_like(t), atol=1e-14)


@pytest.mark.parametrize("index, rho, log_snr, straight", [        # 0-based DDPM index i is t = 1 - (i + 1) / 1000
    (0, 0.0100, 9.21, 0.9902), (1, 0.0148, 8.42, 0.9855), (11, 0.0502, 5.98, 0.9523), (21, 0.0826, 4.99, 0.9238),
    (50, 0.176, 3.47, 0.850), (90, 0.308, 2.35, 0.765), (150, 0.522, 1.30, 0.657), (250, 0.958, 0.09, 0.511),
    (300, 1.240, -0.43, 0.446), (350, 1.591, -0.93, 0.386), (500, 3.44, -2.47, 0.225)])
def test_noise_levels_of_the_papers(index, rho, log_snr, straight):
    level = noise_level("vp", 1 - (index + 1) / 1000)
    assert level["rho"] == pytest.approx(rho, abs=0.6 * 10 ** -(4 if rho < 0.1 else 2 if rho > 3 else 3))
    assert level["log_snr"] == pytest.approx(log_snr, abs=0.006)
    t = 1 / (level["rho"] + CV.c)                         # the same noise on the straight path
    assert t == pytest.approx(straight, abs=6e-4)
    assert noise_level("cv", t)["rho"] == pytest.approx(level["rho"], rel=1e-9)


@pytest.mark.parametrize("straight, rho, log_snr, vp", [
    (0.85, 0.177, 3.47, 0.949), (0.8, 0.250, 2.77, 0.926), (0.9, 0.111, 4.39, 0.969), (0.5, 1.0, 0.0, 0.741)])
def test_noise_levels_given_on_the_straight_path(straight, rho, log_snr, vp):
    level = noise_level("cv", straight)
    assert level["rho"] == pytest.approx(rho, abs=6e-4) and level["log_snr"] == pytest.approx(log_snr, abs=6e-3)
    assert float(VP.to_t(torch.tensor(level["rho"], dtype=torch.float64))) == pytest.approx(vp, abs=6e-4)


@ALL
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_s_and_t_are_inverses(path, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    t = torch.cat([torch.linspace(0, 1, 2001, dtype=dtype), torch.rand(500, generator=g, dtype=dtype)])
    s = path.to_s(t)
    assert s.dtype == dtype and (path.to_t(s) - t).abs().max() <= tolerance
    if path is VP:
        rtol = 1e-4 if dtype == torch.float32 else 1e-12
        assert torch.allclose(s, path.sigma(t) / path.alpha(t), rtol=rtol)


@pytest.mark.parametrize("path", [CV, VP])
def test_one_formula_for_all_steps(path):
    """x_s = alpha(s) x_hat + sigma(s) z_hat is an Euler step in the path's own variables, and x_t = scale(t) y."""
    x, z, t = batch()
    s, x_t = t + 0.04, diffuse(path, x, z, t)
    y = x_t / wide(path.scale(t)) + wide(path.to_s(s) - path.to_s(t)) * path.slope(x, z, wide(t))
    assert torch.allclose(y * wide(path.scale(s)), diffuse(path, x, z, s), atol=1e-12)


@ALL
@PREDICT
def test_loss(path, predict):
    x, z, t = batch()
    right = perfect(predict, path, x, z, t)
    single = x.float(), z.float(), t.float()
    assert float(loss_per_image(lambda *_: right.float(), path, predict, *single).max()) < 1e-11
    off = torch.arange(len(x)).double()
    loss = loss_per_image(lambda *_: right + wide(off), path, predict, x, z, t)
    assert torch.allclose(loss, off ** 2, rtol=1e-4, atol=1e-6)

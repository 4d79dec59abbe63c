"""Solvers, guidance and sampling against closed forms, torchdiffeq, and data whose exact flow is known."""
import math
import typing

import numpy as np
import pytest
import scipy.integrate
import torch
import torchdiffeq

import sample_ode
from sample_ode import (BLOCK, DOPRI5, DOPRI5_ERROR, TABLEAUS, Field, SampleOde, generate, integrate,
                        sample_labels, solve_dopri5, solve_fixed)
from configs.run import Processes, UserError, draw, seed_of, to_uint8, wide
from train_diffusion import PATHS, Condition

FIXED = list(TABLEAUS)
ORDERS = dict(euler=1, midpoint=2, heun=2, rk4=4)


def test_every_solver_is_known_and_tested():
    assert set(typing.get_args(sample_ode.Solver)) == {*TABLEAUS, "dopri5"} and set(ORDERS) == set(TABLEAUS)
EVERY_PATH = pytest.mark.parametrize("kind", ["cv", "vp"])
y0 = torch.linspace(0.5, 2, 4, dtype=torch.float64)[:, None]                     # [B, 1]


@pytest.fixture
def dopri5_fixed(monkeypatch):
    """The Dormand-Prince tableau for fixed steps: its own weights, and those of the embedded 4th order method."""
    c, a, b = DOPRI5
    monkeypatch.setitem(TABLEAUS, "dopri5", DOPRI5)
    monkeypatch.setitem(TABLEAUS, "embedded", (c, a, [v - e for v, e in zip(b, DOPRI5_ERROR)]))


# ---------------------------------------------------------------------------------------------------------------------
# Fixed steps

@pytest.mark.parametrize("solver, order", [*ORDERS.items(), ("dopri5", 5), ("embedded", 4)])
def test_order_of_convergence(dopri5_fixed, solver, order):
    """Halving the step divides the error by 2^order; y' = y cos s has y = y0 exp(sin s)."""
    f = lambda y, s: y * math.cos(s)
    exact = y0 * math.exp(math.sin(2.0))
    errors = [
        float(
            (solve_fixed(f, y0, torch.linspace(0, 2, n + 1, dtype=torch.float64).tolist(), solver) - exact).abs().max()
        )
        for n in (40, 80, 160)
    ]
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert measured[-1] == pytest.approx(order, abs=0.15), (measured, errors)
    assert measured[0] == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize(
    "solver, factor",
    [
        ("euler", lambda z: 1 + z),
        ("midpoint", lambda z: 1 + z + z**2 / 2),
        ("heun", lambda z: 1 + z + z**2 / 2),
        ("rk4", lambda z: sum(z**k / math.factorial(k) for k in range(5))),
        ("dopri5", lambda z: sum(z**k / math.factorial(k) for k in range(6)) + z**6 / 600),
    ],
)
def test_one_step_of_a_linear_field(dopri5_fixed, solver, factor):
    """Each method multiplies y' = r y by its stability polynomial."""
    for r in (-1.5, 0.3, 2.0):
        assert torch.allclose(solve_fixed(lambda y, s: r * y, y0, [0.0, 0.7], solver), y0 * factor(0.7 * r), rtol=1e-12)


@pytest.mark.parametrize("solver, theirs", [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
def test_fixed_steps_against_torchdiffeq(solver, theirs):
    f = lambda s, y: torch.sin(3 * y) + s * y
    grid = torch.linspace(0, 1, 8, dtype=torch.float64) ** 1.5                   # an uneven one
    assert torch.allclose(
        solve_fixed(lambda y, s: f(s, y), y0, grid.tolist(), solver),
        torchdiffeq.odeint(f, y0, grid, method=theirs)[-1],
        rtol=1e-12,
    )


def test_rk4_against_torchdiffeq():
    """Its rk4 is another method of the same order, so the reference is an adaptive solution."""
    f = lambda s, y: torch.sin(3 * y) + s * y
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    exact = torchdiffeq.odeint(f, y0, grid[[0, -1]], method="dopri8", rtol=1e-12, atol=1e-12)[-1]
    assert (solve_fixed(lambda y, s: f(s, y), y0, grid.tolist(), "rk4") - exact).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Adaptive steps

def count(f):
    """f(s, y) as the other library wants it, and how often it was called."""
    calls = [0]

    def counted(s, y):
        calls[0] += 1
        return f(s, y)
    return counted, calls


def van_der_pol(s, y):
    return torch.stack([y[..., 1], 20 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


FIELDS = {  # name: (f(s, y), start [1, D], end)
    "smooth": (
        lambda s, y: torch.cos(torch.as_tensor(2 * s)) - y + torch.sin(y),
        torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64),
        10.0,
    ),
    "oscillating": (
        lambda s, y: torch.stack([y[..., 1], -25 * y[..., 0]], -1),
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        3.0,
    ),
    "stiff decay": (
        lambda s, y: -50 * (y - torch.cos(torch.as_tensor(s))),
        torch.tensor([[0.0]], dtype=torch.float64),
        3.0,
    ),
    "van der Pol": (van_der_pol, torch.tensor([[2.0, 0.0]], dtype=torch.float64), 20.0),
}


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("name", FIELDS)
def test_dopri5_against_other_programs(name, tol):
    """As exact as torchdiffeq and scipy for as many calls. (torchdiffeq estimates errors a third lower: 8 % fewer.)"""
    f, start, end = FIELDS[name]
    ends = torch.tensor([0.0, end], dtype=torch.float64)
    exact = torchdiffeq.odeint(f, start, ends, method="dopri8", rtol=1e-11, atol=1e-11)[-1]
    counted, calls = count(f)
    theirs = torchdiffeq.odeint(counted, start, ends, method="dopri5", rtol=tol, atol=tol)[-1]
    scipys = scipy.integrate.solve_ivp(
        lambda s, y: f(s, torch.from_numpy(y)[None])[0].numpy(), (0, end), start[0].numpy(), "RK45", rtol=tol, atol=tol
    )
    counted, own = count(f)
    ours = solve_dopri5(lambda y, s: counted(s, y), start, 0.0, end, tol)
    nfe = own[0]
    assert 0.8 * calls[0] <= nfe <= 1.1 * calls[0] + 18, (nfe, calls[0])         # 6 calls are one step
    assert abs(nfe - scipys.nfev) <= 0.1 * scipys.nfev + 18, (nfe, scipys.nfev)
    errors = [float((y - exact).norm()) for y in (ours, theirs, torch.from_numpy(scipys.y[:, -1]))]
    assert errors[0] <= 3 * max(errors[1:]) + tol, errors


def test_dopri5_error_follows_the_tolerance():
    start, errors, calls = 0.4 * y0, [], []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9):
        f, asked = count(lambda s, y: y ** 2 * math.cos(s))
        y = solve_dopri5(lambda y, s: f(s, y), start, 0.0, 1.0, tol)
        errors.append(float((y - start / (1 - start * math.sin(1.0))).abs().max()))
        calls.append(asked[0])
        assert errors[-1] < 10 * tol
    assert errors[-1] < 1e-4 * errors[0] and calls[0] < calls[-1] < 30 * calls[0]


def test_every_row_is_as_exact_as_it_would_be_alone():
    """One step for all: the worst row decides, however many easy ones there are."""
    rates = torch.tensor([80.0] + [0.1] * 63, dtype=torch.float64)[:, None]
    start = torch.linspace(0.5, 2, 64, dtype=torch.float64)[:, None].expand(64, 6) + torch.arange(6) * 0.1
    field = lambda rates: lambda y, s: -rates * (y - math.cos(s)) + torch.sin(y)
    exact = solve_dopri5(field(rates[:1]), start[:1], 0.0, 1.0, 1e-10)
    alone = solve_dopri5(field(rates[:1]), start[:1], 0.0, 1.0, 1e-4)
    together = solve_dopri5(field(rates), start, 0.0, 1.0, 1e-4)
    assert (together[0] - exact[0]).abs().max() <= 2 * (alone[0] - exact[0]).abs().max() + 1e-9


def test_dopri5_back_and_forth():
    f = lambda y, s: torch.sin(3 * y) + s * y
    end = solve_dopri5(f, y0, 0.0, 1.0, 1e-9)
    assert torch.allclose(solve_dopri5(f, end, 1.0, 0.0, 1e-9), y0, atol=1e-7) and (end - y0).abs().max() > 0.1


@pytest.mark.parametrize("f, words", [
    (lambda y, s: y ** 2 * 2, "more than 2000 steps|non-finite"),                # blows up at s = 1 / (2 y0)
    (lambda y, s: y if s < 0.4 else y * math.nan, "non-finite"), (lambda y, s: y * math.inf, "non-finite"),
    (lambda y, s: -1e9 * (y - s), "more than 2000 steps")], ids=["singular", "nan", "infinite", "too stiff"])
def test_hopeless_fields_are_user_errors(f, words):
    with pytest.raises(UserError, match=words):
        solve_dopri5(f, y0, 0.0, 1.0, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Integration in the variables of the paths

class Flow:
    """A network for data of independent pixels N(mu, std^2), and where the exact flow takes noise, in closed form."""

    def __init__(self, kind, predict):
        g = torch.Generator().manual_seed(0)
        self.path, self.predict = PATHS[kind], predict
        self.mu, self.std = torch.randn(1, 3, 4, 4, generator=g) * 0.5, torch.rand(1, 3, 4, 4, generator=g) * 0.8 + 0.1

    def __call__(self, x, time):
        t, x = wide(time / 1000).double(), x.double()
        a, s = self.path.alpha(t), self.path.sigma(t)
        rest = (x - a * self.mu) / (a ** 2 * self.std ** 2 + s ** 2)
        x_hat, z_hat = self.mu + a * self.std ** 2 * rest, s * rest              # means of data and noise given x_t
        return {"v": self.path.v_target(x_hat, z_hat, t), "eps": z_hat, "x": x_hat}[self.predict].float()

    def end(self, z):
        """Quantiles are kept: from N(alpha mu, alpha^2 std^2 + sigma^2) at t = 0 to the same at t = 1."""
        (a0, a1), (s0, s1) = [
            f(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() for f in (self.path.alpha, self.path.sigma)
        ]
        scale = ((a1 * self.std) ** 2 + s1 ** 2).sqrt() / ((a0 * self.std) ** 2 + s0 ** 2).sqrt()
        return a1 * self.mu + scale * (z - a0 * self.mu)


def noise(n=16):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def sample(net, path, predict, z, solver="heun", steps=12, tol=1e-5, label=None, reverse=False, **more):
    condition = None if label is None else Condition("label", torch.arange(5))
    field = Field(net, path, predict, condition=condition, **more)
    return integrate(field, z, label, solver, steps, tol, reverse)[0]


@EVERY_PATH
@pytest.mark.parametrize("predict", ["v", "eps", "x"])
def test_gaussian_data_is_reached_exactly(kind, predict):
    flow, z = Flow(kind, predict), noise()
    for solver, steps, limit in (
        ("heun", 100, 5e-3),
        ("rk4", 50, 4e-3),
        ("dopri5", 1, 4e-3),
        ("midpoint", 100, 4e-3),
        ("euler", 200, 4e-2),
    ):
        error = float((sample(flow, flow.path, predict, z, solver, steps) - flow.end(z)).abs().max())
        assert error < limit, (solver, error)


@EVERY_PATH
@pytest.mark.parametrize("predict", ["v", "eps", "x"])
def test_small_errors_of_the_network_stay_small(kind, predict):
    """Where x_t is pure noise, eps says nothing about x: its error must not be divided by nothing."""
    flow, z, off = Flow(kind, predict), noise(), 0.01 * noise(1)
    x = sample(lambda x, time: flow(x, time) + off, flow.path, predict, z, "rk4", 12)
    assert (x - flow.end(z)).square().mean().sqrt() < 0.08


@EVERY_PATH
def test_samples_have_the_mean_and_spread_of_the_data(kind):
    flow = Flow(kind, "v")
    x = sample(flow, flow.path, "v", noise(4000), "rk4", 25)
    assert torch.allclose(x.mean(0, keepdim=True), flow.mu, atol=0.06) and torch.allclose(
        x.std(0, keepdim=True), flow.std, rtol=0.06
    )


def test_both_paths_take_noise_to_the_same_picture():
    """Quantiles are kept on either path, up to the 0.6 % of data in VP's noise end: one noise, one picture."""
    z = noise()
    straight, curved = (
        sample(Flow(kind, predict), PATHS[kind], predict, z, "rk4", 100)
        for kind, predict in (("cv", "v"), ("vp", "eps"))
    )
    assert torch.allclose(straight, curved, atol=0.02) and straight.std() > 0.3


@EVERY_PATH
@pytest.mark.parametrize("predict", ["v", "eps", "x"])
def test_an_euler_step_is_one_of_ddim(kind, predict):
    flow, z = Flow(kind, predict), noise().double()
    for steps in (1, 7, 30):
        x, field = z, Field(flow, flow.path, predict)
        for t in torch.arange(steps, dtype=torch.float64):
            x_hat, z_hat = field.estimate(x, float(t / steps), None)
            s = (t + 1) / steps
            x = flow.path.alpha(s) * x_hat + flow.path.sigma(s) * z_hat
        assert torch.allclose(sample(flow, flow.path, predict, z, "euler", steps), x, atol=2e-6)


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_constant_velocity_needs_one_step(solver):
    v, z = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(2)), noise()
    net = lambda x, time: v[:len(x)]                      # one v for all times
    assert torch.allclose(sample(net, PATHS["cv"], "v", z, solver, 1), z + v, atol=2e-6)
    assert torch.allclose(sample(net, PATHS["cv"], "v", z, solver, 1, reverse=True), z - v, atol=2e-6)


@EVERY_PATH
@pytest.mark.parametrize(
    "solver, steps, atol", [("dopri5", 1, 1e-3), ("rk4", 100, 1e-3), ("heun", 200, 0.02)]
)
def test_encoding_returns_to_the_start(kind, solver, steps, atol):
    flow, z = Flow(kind, "v"), noise()
    x = flow.end(z)
    back = sample(flow, flow.path, "v", x, solver, steps, 1e-6, reverse=True)
    assert torch.allclose(back, z, atol=atol) and torch.allclose(
        sample(flow, flow.path, "v", back, solver, steps, 1e-6), x, atol=atol
    )


@pytest.mark.parametrize("solver, calls", [("euler", 5), ("midpoint", 10), ("heun", 10), ("rk4", 18)])
def test_evaluations_are_counted(solver, calls):
    flow, z, seen, times = Flow("vp", "v"), noise(), [], []

    def net(x, time):
        seen.append(len(x))
        times.append(float(time[0]))
        return flow(x, time)
    field = Field(net, flow.path, "v")
    _, n = integrate(field, z, None, solver, 5, 1e-3)
    assert len(seen) == calls == n and field.calls == sum(seen)
    assert max(times) < 990                               # the data end is not asked about noise


def test_adaptive_evaluations_are_counted():
    flow, seen = Flow("cv", "v"), []

    def net(x, time):
        seen.append(len(x))
        return flow(x, time)
    field = Field(net, flow.path, "v")
    _, n = integrate(field, noise(), None, "dopri5", 1, 1e-4)
    assert 16 * n == sum(seen) == field.calls


# ---------------------------------------------------------------------------------------------------------------------
# Guidance

class Labelled:
    """A network of K labels with a smooth output that depends on x, t and label; remembers what it was asked."""
    num_labels = 4

    def __init__(self, turn=0.0):
        self.asked, self.turn = [], turn

    def __call__(self, x, time, label=None):
        label = torch.full((len(x),), self.num_labels) if label is None else label
        self.asked.append((time / 1000, label))
        return torch.sin(x + self.turn + wide(label.float())) + wide(time / 1000)


LABELS = Condition("label", torch.arange(5))


def labelled(net, path, *more, **kw):
    """A field of a network that knows labels and predicts v."""
    return Field(net, path, "v", *more, condition=LABELS, **kw)


label16 = torch.arange(16) % 4
null16 = torch.full((16,), 4)


@EVERY_PATH
def test_guidance_scale(kind):
    """v = v_null + w (v_cond - v_null): w = 0 and w = 1 are exactly the two fields, the rest is linear in w."""
    z, t = noise(), 0.4
    def velocity(w, ids=label16):
        x_hat, z_hat = labelled(Labelled(), PATHS[kind], w).estimate(z, t, ids)
        return PATHS[kind].slope(x_hat, z_hat, torch.tensor(t))

    assert torch.equal(velocity(0.0), velocity(1.0, null16)) and torch.equal(velocity(1.0), velocity(1.0, label16))
    assert not torch.allclose(velocity(0.0), velocity(1.0))
    for w in (-0.5, 0.3, 1.4, 4.0):
        assert torch.allclose(velocity(w), velocity(0.0) + w * (velocity(1.0) - velocity(0.0)), atol=1e-5)


@EVERY_PATH
def test_whole_trajectories_at_zero_and_one(kind):
    z = noise()
    for w, label in ((0.0, null16), (1.0, label16)):
        plain = sample(Labelled(), PATHS[kind], "v", z, label=label)
        assert torch.equal(sample(Labelled(), PATHS[kind], "v", z, label=label16, w=w), plain)
    assert torch.equal(
        sample(Labelled(), PATHS[kind], "v", z, label=null16), sample(Labelled(), PATHS[kind], "v", z)
    )  # null = no label given


def test_one_doubled_batch_equals_two_calls():
    z, t, w, net = noise(), 0.4, 2.5, Labelled()
    field = labelled(net, PATHS["cv"], w)
    got = field.estimate(z, t, label16)
    assert len(net.asked) == 1 and len(net.asked[0][1]) == 32 == field.calls
    two = [labelled(Labelled(), PATHS["cv"]).estimate(z, t, k) for k in (label16, null16)]
    for g, cond, null in zip(got, *two):
        assert torch.allclose(g, null + w * (cond - null), atol=1e-6)


@pytest.mark.parametrize("w, images", [(0.0, 16), (1.0, 16), (2.0, 32)])
def test_network_calls_of_guidance(w, images):
    net = Labelled()
    field = labelled(net, PATHS["cv"], w)
    _, n = integrate(field, noise(), label16, "heun", 3, 1e-3)
    assert field.calls == 6 * images == sum(len(t) for t, _ in net.asked) and n == 6


@pytest.mark.parametrize("w", [0.0, 3.0])
def test_guidance_interval(w):
    """Inside the interval guided, outside plain conditional; its ends count as inside, however they are rounded."""
    z = noise()
    for t in (0.0, 0.1, 0.3, 0.5, 0.1 + 0.2 + 0.4, 1.0):
        part = labelled(Labelled(), PATHS["cv"], w, (0.3, 0.7))
        same = labelled(Labelled(), PATHS["cv"], w if 0.29 < t < 0.71 else 1.0)
        for a, b in zip(part.estimate(z, t, label16), same.estimate(z, t, label16)):
            assert torch.equal(a, b)
        assert part.calls == same.calls                 # outside, nothing is computed for nothing
    for kind in ("cv", "vp"):                             # 11 evaluations, of which those at 0.3 ... 0.7 are guided
        field = labelled(Labelled(), PATHS[kind], 3.0, (0.3, 0.7))
        integrate(field, z, label16, "euler", 10, 0)
        assert field.calls == 16 * (10 + 5)


def test_autoguidance():
    z, t = noise(), 0.4
    main, weak = (labelled(Labelled(turn), PATHS["cv"]).estimate(z, t, label16) for turn in (0.0, 0.7))
    for w in (0.0, 1.0, 2.5):
        field = labelled(Labelled(), PATHS["cv"], w, weak=Labelled(0.7), weak_condition=LABELS)
        for g, a, b in zip(field.estimate(z, t, label16), main, weak):
            assert torch.allclose(g, b + w * (a - b), atol=1e-5)
        assert field.calls == 32 or w == 1               # at w = 1 the weak model may be left alone
    early = labelled(Labelled(), PATHS["cv"], 2.5, (0.5, 1.0), weak=Labelled(0.7), weak_condition=LABELS).estimate(z,
        t, label16)
    assert torch.allclose(early[0], main[0], atol=1e-5)   # the interval holds for it too


def test_autoguidance_of_models_without_labels():
    plain = lambda turn: lambda x, time: torch.sin(x + turn)
    z, t = noise(), 0.4
    got = Field(plain(0.0), PATHS["cv"], "v", 2.0, weak=plain(0.5)).estimate(z, t, None)
    main, weak = (Field(plain(turn), PATHS["cv"], "v").estimate(z, t, None) for turn in (0.0, 0.5))
    assert torch.allclose(got[0], 2 * main[0] - weak[0], atol=1e-5)


def test_networks_see_a_part_of_the_rows_at_once():
    z, net = noise(), Labelled()
    parts, whole = labelled(net, PATHS["cv"], 2.0, batch=6), labelled(Labelled(), PATHS["cv"], 2.0)
    assert torch.equal(integrate(parts, z, label16, "heun", 2, 0)[0], integrate(whole, z, label16, "heun", 2, 0)[0])
    assert [len(t) for t, _ in net.asked[:3]] == [12, 12, 8]


# ---------------------------------------------------------------------------------------------------------------------
# What belongs to each sample

def test_random_numbers_belong_to_their_index():
    before = torch.get_rng_state()
    u, z = draw(3, "test", range(40), (3, 4, 4), 2)
    order = [7, 39, 0]
    for part in (order, order[::-1]):
        u2, z2 = draw(3, "test", part, (3, 4, 4), 2)
        assert torch.equal(u2, u[part]) and torch.equal(z2, z[part])
    assert torch.equal(torch.get_rng_state(), before)
    for other in (draw(4, "test", range(40), (3, 4, 4)), draw(3, "other", range(40), (3, 4, 4))):
        assert not torch.isclose(other, z).any(1).all()
    assert len({tuple(v) for v in z.flatten(1).tolist()}) == 40


def test_random_numbers_are_independent_and_standard():
    u, z = draw(0, "test", range(20_000), (4,), 2)
    assert z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.02 and (u.mean(0) - 0.5).abs().max() < 0.01
    together = torch.cat([z, z[1:].roll(-1, 0)[:1].expand(0, 4)]).T              # within an index ...
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 0.03
    assert abs(float(torch.corrcoef(torch.stack([z[:-1, 0], z[1:, 0]]))[0, 1])) < 0.03  # ... and between neighbours


def test_seeds_of_one_purpose_never_collide():
    assert len({seed_of(1, "test", i) for i in range(200_000)}) == 200_000
    assert len({seed_of(s, p) for s in range(100) for p in ("a", "b", "c")}) == 300


def configured(**more):
    return SampleOde(**dict(n=20, steps=2) | more)


def drawn_from(K, marginal):
    """What only draws labels: a field, a checkpoint."""
    return Field(None, None, "v", condition=Condition("label", torch.arange(K + 1))), dict(marginal=marginal)


def test_labels_follow_the_marginal():
    p = torch.tensor([0.5, 0.0, 0.3, 0.05, 0.15], dtype=torch.float64)
    for kind, expected in (("marginal", p), ("uniform", (p > 0) / 4)):           # never one that no image had
        cfg, model = configured(labels=[kind]), drawn_from(5, p)
        labels = sample_labels(cfg, *model, np.arange(10_000))
        seen = torch.bincount(labels, minlength=5).double()
        used = expected > 0
        assert labels.dtype == torch.int64 and seen[~used].sum() == 0
        chi = float(((seen - 10_000 * expected)[used] ** 2 / (10_000 * expected)[used]).sum())
        assert chi < 21.2                                 # 3 degrees of freedom, p = 0.0001
        assert torch.equal(sample_labels(cfg, *model, [77, 5]), labels[[77, 5]])
        assert not torch.equal(sample_labels(configured(labels=[kind], seed=1), *model, np.arange(10_000)), labels)


def test_labels_by_name():
    model = drawn_from(5, torch.full((5,), 0.2))
    labels = sample_labels(configured(labels=["3", "0", "5"]), *model, range(2, 7))
    assert labels.tolist() == [5, 3, 0, 5, 3]             # cycles by index; 5 = null
    assert sample_labels(configured(), Field(None, None, "v"), {}, [0]) is None
    for wrong in (["6"], ["-1"], ["cat"], ["1.5"], []):
        with pytest.raises(UserError, match="labels"):
            sample_labels(configured(labels=wrong), *model, [0])
    with pytest.raises(UserError, match="after the training"):
        sample_labels(configured(), *drawn_from(5, None), [0])


class Here(Processes):
    """One of the processes, which this test runs one after another."""
    device, vae = torch.device("cpu"), None

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world

    def wait(self):
        pass

    def total(self, x):
        return x


STATE = dict(path="cv", predict="v", channels=3, size=8, file="x", marginal=torch.full((4,), 0.25))


def field_of(batch=250):
    return labelled(Labelled(), PATHS["cv"], batch=batch)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_sample_i_is_the_same_picture_for_any_batch_and_world(solver, tmp_path, monkeypatch):
    made = lambda ranks, path, *rest: path.exists() or create(ranks, path, *rest)          # by the first process, once
    create = sample_ode.create_rows
    monkeypatch.setattr(sample_ode, "create_rows", made)

    def run(n=150, worlds=1, seed=0, **more):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        cfg = configured(solver=solver, tol=1e-3, n=n, seed=seed, **more)
        reports = [generate(Here(rank, worlds), cfg, field_of(cfg.batch), STATE, 2.0, file) for rank in range(worlds)]
        return np.load(file), reports[0]
    images, report = run()
    assert images.shape == (150, 3, 8, 8) and images.dtype == np.uint8 and len(np.unique(images)) > 50
    assert report["network_calls"] == pytest.approx(2 * report["nfe"]) and (report["nfe"] == 4 or solver == "dopri5")
    for other in (run(batch=7), run(worlds=3), run(n=5)):                        # nor does their number matter
        assert np.abs(other[0].astype(int) - images[:len(other[0])]).max() <= 1
    assert not np.array_equal(run(seed=1)[0], images)


def test_blocks_of_dopri5_share_their_steps(tmp_path):
    """The steps of a block are those that the block takes alone, wherever the share of a process ends."""
    cfg = configured(solver="dopri5", tol=1e-3, n=BLOCK + 10)
    generate(Here(), cfg, field_of(), STATE, 2.0, tmp_path / "x.npy")
    rows = range(BLOCK, 2 * BLOCK)
    z, label = draw(0, "sample noise", rows, (3, 8, 8)), sample_labels(cfg, field_of(), STATE, rows)
    x, _ = integrate(labelled(Labelled(), PATHS["cv"], 2.0), z, label, "dopri5", 2, 1e-3)
    assert np.array_equal(np.load(tmp_path / "x.npy")[BLOCK:], to_uint8(x)[:10].numpy())


def test_broken_networks_do_not_become_pictures(tmp_path):
    """Not-a-number would turn into some uint8 and pass as an image."""
    for solver in ("heun", "dopri5"):
        with pytest.raises(UserError, match="non-finite|not finite"):
            broken = Field(lambda x, time: x * math.nan, PATHS["cv"], "v")
            generate(Here(), configured(solver=solver), broken, STATE, 1.0, tmp_path / "x.npy")

"""Distributions of noise levels against their CDFs, and the loss of the exact denoiser under each in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from gaussian import exact, gaussian_image

from ddpm_jax import config, diffusion, experiment, schedules
from ddpm_jax.keys import named

# P(log-SNR < x), up to a scale and an offset.
CDFS = {
    "log_normal": lambda x: 0.5 + math.erf((x / -2 + 1.2) / 1.2 / -math.sqrt(2)) / 2,  # of ln sigma_e = -logsnr / 2
    "logit_normal": lambda x: 0.5 + math.erf(x / 2 / math.sqrt(2)) / 2,  # of the logit of alpha / (alpha + sigma)
    "cosine": lambda x: -math.atan(math.exp(-x / 2)),  # alpha = cos(pi t / 2): tan(pi t / 2) = exp(-logsnr / 2)
    "uniform": lambda x: x,
}
SCHEDULES = {name: schedules.make_schedule(name) for name in ("linear", "cosine", "vp", "cosine_logsnr")}
SCHEDULES["T=3"] = schedules.make_schedule("linear", 3, betas=(0.1, 0.2, 0.999))
SCHEDULES["no signal"] = schedules.make_schedule("linear", zero_terminal_snr=True)
GRID = np.append((np.arange(20_000) + 0.5) / 20_000, [0, 1 - 2**-24])
GRID.sort()


def truncated(name, schedule):
    """P(log-SNR < x) between the ends of the schedule, float64."""
    low, high = (float(np.clip(schedule.logsnr(t), -20, 20)) for t in (schedule.T, schedule.t_min))
    cdf = CDFS[name]
    return lambda x: (cdf(min(max(x, low), high)) - cdf(low)) / (cdf(high) - cdf(low))


def borders(schedule):
    """Log-SNRs that separate each time of a discrete schedule from the next, by the midpoint; -inf below the last."""
    levels = np.asarray(schedule.table[1:], np.float64)
    return np.append((np.clip(levels, -20, 20)[1:] + levels[:-1]) / 2, -np.inf)


@functools.cache
def drawn(where):
    """{name: (v, importance weight) at GRID}, of one compiled program."""

    @jax.jit
    @jax.vmap
    def draw(u):
        return {name: schedules.make_noise_levels(name, SCHEDULES[where], (), True)(u) for name in CDFS}

    return jax.device_get(draw(GRID))


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize("name", CDFS)
def test_drawn_levels_have_the_distribution_of_their_name(name, where):
    """For evenly spread u the share of log-SNRs above x is 1 - CDF(x), to the resolution of the grid."""
    schedule, (v, _) = SCHEDULES[where], drawn(where)[name]
    assert np.all(np.diff(v) >= 0)
    found = np.asarray(schedule.logsnr(schedule.t_from_u(v[1:-1])), np.float64)
    cdf = truncated(name, schedule)
    for x in borders(schedule)[:: 1 + schedule.T // 20] if schedule.T > 1 else np.linspace(-12, 12, 25):
        assert np.mean(found > x) == pytest.approx(1 - cdf(x), abs=2e-4), x


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize("name", CDFS)
def test_the_ends_of_u_are_times_of_the_schedule(name, where):
    schedule, (v, weight) = SCHEDULES[where], drawn(where)[name]
    t = schedule.t_from_u(v)
    assert schedule.t_min <= t[0] <= t[-1] <= schedule.T
    assert 0 <= v[0] <= v[-1] < 1
    assert np.all(np.isfinite(weight))


def test_own_mean_and_deviation(linear):
    """Of a normal far from both ends of the schedule, whose CDF there is 0 and 1 in float32."""
    for weights in (False, True):
        levels = schedules.make_noise_levels("logit_normal", linear, (1.0, 0.5), weights)
        v, weight = jax.jit(jax.vmap(levels))(GRID)
        found = linear.logsnr(linear.t_from_u(v))
        assert np.mean(found) == pytest.approx(1.0, abs=2e-3)
        assert np.std(found) == pytest.approx(0.5, abs=2e-3)
        assert np.all(np.isfinite(weight))
        assert np.all(weight == 1) or weights


@pytest.mark.parametrize("where", ["linear", "T=3", "vp"])
@pytest.mark.parametrize("name", ["cosine", "uniform"])
def test_importance_weights_restore_the_mean_over_uniform_t(name, where):
    """The mean over t of a function of t, of distributions that reach both ends."""
    schedule, (v, weight) = SCHEDULES[where], drawn(where)[name]
    for function in (np.ones_like, lambda t: t, lambda t: np.cos(9 * t)):
        values = [function(np.float64(schedule.t_from_u(u)) / schedule.T) for u in (v, np.float32(GRID))]
        assert np.mean(weight * values[0]) == pytest.approx(np.mean(values[1]), abs=5e-3)


@pytest.mark.parametrize("name", ["schedule", "uniform"])
def test_the_sigmoid_weighting_is_an_integral_over_the_log_snr(name):
    """With an error of 1: half the integral of sigmoid(b - logsnr), which is a difference of two softplus."""
    schedule, bias = SCHEDULES["cosine_logsnr"], 1.5
    v, weight = drawn("cosine_logsnr")[name] if name in CDFS else (np.float32(GRID), np.ones_like(GRID))
    weighted = weight * jax.vmap(lambda t: diffusion.sigmoid(schedule, t, bias))(schedule.t_from_u(v))
    ends = np.float64([schedule.logsnr(schedule.T), schedule.logsnr(schedule.t_min)])
    assert np.mean(weighted[1:-1]) == pytest.approx(np.log1p(np.exp(bias - ends)) @ [1, -1] / 2, rel=0.01)


SPREAD = 0.5
# E |error|^2 of the exact denoiser for Gaussian data, from the variance of x_0 given x_t and n = sigma / alpha.
ERRORS = {
    "x_0": lambda variance, n: variance,
    "eps": lambda variance, n: variance / n**2,
    "v": lambda variance, n: variance * (1 + n**2) / n**2,
    "flow": lambda variance, n: variance * (1 + n) ** 2 / n**2,
    "output": lambda variance, n: variance * (n**2 + 0.5**2) / (n * 0.5) ** 2,  # of EDM, with sigma_data = 0.5
}


@functools.cache
def exact_losses():
    """(key, u) -> {space of the error: loss of an image whose pixels have just the mean and spread of the data}."""
    way, schedule = diffusion.PARAMETERIZATIONS["edm"], SCHEDULES["linear"]

    def net(params, x_t, t, key, label):
        alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(t))
        x_0_hat = exact(schedule, SPREAD)(x_t, t)
        return way.target(x_0_hat, (x_t - alpha * x_0_hat) / sigma, schedule.logsnr(t))

    losses = {
        error: diffusion.make_loss(net, schedule, change(way), diffusion.simple)
        for error, change in diffusion.ERRORS.items()
    }
    x_0 = gaussian_image(SPREAD, (16, 16, 1))
    return jax.jit(jax.vmap(lambda key, u: {error: loss(None, key, x_0, None, u) for error, loss in losses.items()}))


@pytest.mark.parametrize("name", CDFS)
def test_loss_of_the_exact_denoiser(linear, name):
    """The sum over t of P(t) E |error|^2, in float64, for every space of the error."""
    v = drawn("linear")[name][0][5::10]
    found = exact_losses()(jax.random.split(jax.random.key(1), len(v)), v)
    shares = -np.diff(np.insert([truncated(name, linear)(x) for x in borders(linear)], 0, 1))
    n = np.exp(-np.asarray(linear.table[1:], np.float64) / 2)
    for error, value in found.items():
        wanted = np.sum(shares * ERRORS[error](1 / (SPREAD**-2 + n**-2), n))
        assert np.mean(value) == pytest.approx(wanted, rel=0.01), error


def test_the_weight_of_a_level_multiplies_its_loss(linear):
    losses = [
        diffusion.make_loss(
            lambda w, x_t, *_: w * x_t,
            linear,
            diffusion.PARAMETERIZATIONS["v"],
            diffusion.simple,
            noise_levels=lambda u, weight=weight: (0.25, weight),
        )
        for weight in (1.0, 3.0)
    ]
    one, three = (loss(0.5, jax.random.key(0), jnp.ones((2, 2, 1))) for loss in losses)
    assert three == pytest.approx(3 * one)


@pytest.mark.parametrize("where", ["linear", "T=3", "no signal", "vp"])
@pytest.mark.parametrize("name", [*diffusion.PARAMETERIZATIONS, "mean"])
def test_gradients_are_finite_at_both_ends(name, where):
    schedule = SCHEDULES[where]
    if name == "mean" and schedule.T == 1:
        pytest.skip("needs a discrete schedule")
    way, x_0 = diffusion.make_parameterization(name, schedule), jnp.linspace(-1, 1, 4).reshape(2, 2, 1)
    no_signal = schedule.logsnr(schedule.T) == -np.inf  # where experiment.make refuses eps
    for error, change in diffusion.ERRORS.items():
        loss = diffusion.make_loss(lambda w, x_t, *_: w * x_t, schedule, change(way), diffusion.simple)
        for u in [0.0, 0.5] + [1 - 2**-24] * (not (no_signal and "eps" in (name, error))):
            value, slope = jax.value_and_grad(loss)(0.7, jax.random.key(0), x_0, None, np.float32(u))
            assert np.isfinite(value), (error, u)
            assert np.isfinite(slope), (error, u)


def spied(**choices):
    """(loss of an Experiment with a network that answers 0, list of the (t, x_t) that the network sees)."""
    seen = []

    def net(params, x_t, t, key=None, label=None):
        seen.append((int(t), np.asarray(x_t)))
        return 0 * x_t * params

    made = config.Config(model=config.Model(**TINY), diffusion=config.Diffusion(**choices))
    return experiment.make(made, (2, 2, 1), (lambda key: 1.0, net)).loss, seen


def test_the_config_reaches_the_network(linear):
    """The median of the log-SNR: 2.4, 0, -3, and 0 of (15.0, 2.0)."""
    for choices, wanted in (
        ({"noise_levels": "log_normal"}, 2.4),
        ({"noise_levels": "logit_normal"}, 0),
        ({"noise_levels": "logit_normal", "logsnr_normal": (-3.0, 1.0), "weighting": "p2"}, -3),
        ({"noise_levels": "uniform", "weighting": "sigmoid", "importance_weights": True}, -0.454),  # mean of both ends
    ):
        loss, seen = spied(**choices)
        loss(1.0, jax.random.key(0), jnp.zeros((2, 2, 1)), None, 0.5)
        assert linear.logsnr(seen[0][0]) == pytest.approx(wanted, abs=0.02)


X_0 = jnp.linspace(-1, 1, 12).reshape(2, 2, 3)


def with_noises(num, choice):
    """(the loss of a network w x_t, the loss of one of `num` noises, these noises)."""
    schedule, way = schedules.make_schedule("linear"), diffusion.PARAMETERIZATIONS["eps"]
    loss = diffusion.make_loss(lambda w, x_t, *_: w * x_t, schedule, way, diffusion.simple)
    noises = jax.random.normal(named(jax.random.key(3), "eps"), (num, *X_0.shape))
    return loss, diffusion.choose_noise(loss, num, choice), np.asarray(noises)


def test_the_nearest_noise_is_learned():
    loss, chosen, noises = with_noises(16, "nearest")
    nearest = min(noises, key=lambda eps: np.linalg.norm(np.asarray(X_0) - eps))
    args = 0.3, jax.random.key(3), X_0, None, 0.4
    assert chosen(*args) == pytest.approx(float(loss(*args, nearest)), rel=1e-6)
    assert jax.grad(chosen)(*args) == pytest.approx(float(jax.grad(loss)(*args, nearest)), rel=1e-6)


@pytest.mark.parametrize("u", [0.4, None])
def test_the_noise_with_the_lowest_loss_is_learned(u):
    loss, chosen, noises = with_noises(16, "lowest_loss")
    args = 0.3, jax.random.key(3), X_0, None, u
    losses = [float(loss(*args, eps)) for eps in noises]
    assert chosen(*args) == pytest.approx(min(losses), rel=1e-6)
    wanted = jax.grad(loss)(*args, noises[np.argmin(losses)])
    assert jax.grad(chosen)(*args) == pytest.approx(float(wanted), rel=1e-6)


def test_one_noise_is_no_choice():
    for choice in diffusion.NOISE_CHOICES:
        loss, chosen, _ = with_noises(1, choice)
        args = 0.3, jax.random.key(3), X_0, None, 0.4
        assert chosen(*args) == loss(*args)


def test_the_config_chooses_among_noises(linear):
    """The last image that the network sees is made of the nearest noise."""
    loss, seen = spied(noises=8)
    loss(1.0, jax.random.key(3), X_0[..., :1], None, 0.4)
    noises = np.asarray(jax.random.normal(named(jax.random.key(3), "eps"), (8, 2, 2, 1)))
    nearest = min(noises, key=lambda eps: np.linalg.norm(np.asarray(X_0[..., :1]) - eps))
    wanted = diffusion.q_sample(X_0[..., :1], nearest, linear.logsnr(401))
    np.testing.assert_allclose(seen[-1][1], wanted, rtol=1e-6)

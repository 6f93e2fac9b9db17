"""Samplers against the exact denoiser of Gaussian data, for which every answer is known."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from ddpm_jax import diffusion, keys, parallel, samplers, schedules
from ddpm_jax.errors import ConfigError, Diverged

BAR = np.insert(np.cumprod(1 - schedules.linear_betas(1000)), 0, 1.0)
MEAN = 0.3


def exact(schedule, spread):
    """E[x_0 | x_t] for data N(MEAN, spread^2)."""

    def predict(x_t, t):
        alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(t))
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)

    return predict


def recursion(times, spread, coefficients):
    """Mean and variance of the last x, from x_T ~ N(0, 1) on, for x_s = a x_0_hat + b x_t + c noise; float64."""
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(times):
        gain = np.sqrt(BAR[t]) * spread**2 / (BAR[t] * spread**2 + 1 - BAR[t])
        a, b, c = coefficients(t, s)
        slope = a * gain + b
        mean = slope * mean + a * (MEAN - gain * np.sqrt(BAR[t]) * MEAN)
        variance = slope**2 * variance + c**2
    return mean, variance


def ancestral(large):
    """Eqs. 6 and 7 with beta = 1 - alphas_bar_t / alphas_bar_s for the step from t to s; no noise in the last one."""

    def coefficients(t, s):
        beta = 1 - BAR[t] / BAR[s]
        a = np.sqrt(BAR[s]) * beta / (1 - BAR[t])
        b = np.sqrt(1 - beta) * (1 - BAR[s]) / (1 - BAR[t])
        variance = beta if large else (1 - BAR[s]) / (1 - BAR[t]) * beta
        return a, b, np.sqrt(variance) * (s > 0)

    return coefficients


def implicit(eta):
    """Song et al. 2020, eqs. 12 and 16, in their own symbols."""

    def coefficients(t, s):
        noise = eta * np.sqrt((1 - BAR[s]) / (1 - BAR[t])) * np.sqrt(1 - BAR[t] / BAR[s])
        direction = np.sqrt(1 - BAR[s] - noise**2) / np.sqrt(1 - BAR[t])
        return np.sqrt(BAR[s]) - direction * np.sqrt(BAR[t]), direction, noise

    return coefficients


LAST_STEPS = ["ddpm small", "ddpm large", "ddim 0", "ddim 1", "dpmpp_2m", "dpmpp_3m", "heun", "edm"]
CASES = {
    "ddpm small": ("ddpm", {"variance": "fixedsmall"}, ancestral(False)),
    "ddpm large": ("ddpm", {"variance": "fixedlarge"}, ancestral(True)),
    "ddim 0": ("ddim", {"eta": 0.0}, implicit(0.0)),
    "ddim 0.5": ("ddim", {"eta": 0.5}, implicit(0.5)),
    "ddim 1": ("ddim", {"eta": 1.0}, implicit(1.0)),
}


@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("case", CASES)
def test_gaussian_data_end_with_the_known_mean_and_variance(linear, case, steps):
    name, options, coefficients = CASES[case]
    times, spreads = linear.times(steps), np.array([1.0, 0.5, 0.1])
    sampler = samplers.make_sampler(name, linear, **options)

    @jax.vmap
    def draw(spread):
        return samplers.sample(exact(linear, spread), sampler, times, jax.random.key(3), (200, 200, 1))

    for spread, x_0 in zip(spreads, draw(spreads), strict=True):
        mean, variance = recursion(times, spread, coefficients)
        # The sample's mean and variance scatter by sd / 200 and by sqrt(2) variance / 200; five of those are allowed.
        assert abs(x_0.mean() - mean) < 5 * np.sqrt(variance) / 200 + 1e-4
        assert abs(x_0.var() - variance) < 5 * np.sqrt(2) * variance / 200 + 1e-6


class Affine:
    """slope x_T + offset in float64, so that a linear sampler's answer is known for all x_T at once."""

    def __init__(self, slope, offset):
        self.slope, self.offset = slope, offset

    def __add__(self, other):
        return Affine(self.slope + other.slope, self.offset + other.offset)

    def __mul__(self, factor):
        return Affine(factor * self.slope, factor * self.offset)

    __rmul__ = __mul__

    def __sub__(self, other):
        return self + -1 * other


def posterior_mean(x, t, spread):
    """E[x_0 | x_t] for data N(MEAN, spread^2), by the regression of x_0 on x_t."""
    gain = np.sqrt(BAR[t]) * spread**2 / (BAR[t] * spread**2 + 1 - BAR[t])
    return gain * x + Affine(0, MEAN - gain * np.sqrt(BAR[t]) * MEAN)


def half_logsnr(t):
    return 0.5 * np.log(BAR[t] / (1 - BAR[t])) if t else np.inf


def multistep(order):
    """DPM-Solver++ as its derivation has it: x_0_hat as the polynomial through the last `order` values over half the
    log-SNR u, and x_s = sigma_s / sigma_t x_t + sigma_s * the integral of exp(u) x_0_hat(u), by quadrature.
    2M takes the value half a step ahead instead (Lu et al. 2022, algorithm 2). To clean data the last value is taken.
    """

    def run(times, spread):
        x, known = Affine(1.0, 0.0), []
        for t, s in itertools.pairwise(times):
            u_t, u_s = half_logsnr(t), half_logsnr(s)
            known = [(u_t, posterior_mean(x, t, spread)), *known][:order]
            if s == 0:
                return known[0][1]
            sigma_t, sigma_s = np.sqrt(1 - BAR[t]), np.sqrt(1 - BAR[s])
            if order == 2 and len(known) == 2:
                ahead = (u_s - u_t) / (2 * (known[0][0] - known[1][0]))
                weights = (np.exp(u_s) - np.exp(u_t)) * np.array([1 + ahead, -ahead])
            else:
                weights = lagrange_integrals([at for at, _ in known], u_t, u_s)
            x = sigma_s / sigma_t * x
            for weight, (_, x_0_hat) in zip(weights, known, strict=True):
                x = x + sigma_s * weight * x_0_hat
        return x

    return run


def lagrange_integrals(nodes, start, end):
    """The integral of exp(u) l_i(u) for each polynomial l_i that is 1 at node i and 0 at the others."""

    def value(u, i):
        return np.exp(u) * np.prod([(u - node) / (nodes[i] - node) for k, node in enumerate(nodes) if k != i])

    return [scipy.integrate.quad(value, start, end, (i,))[0] for i in range(len(nodes))]


def heuns(times, spread):
    """Karras et al. 2022, algorithm 1, for y = x / alpha over n = sigma / alpha: dy/dn = (y - x_0_hat) / n."""
    y, n = (1 / np.sqrt(BAR[times[0]])) * Affine(1.0, 0.0), np.exp([-half_logsnr(t) for t in times])
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        slope = (1 / n[i]) * (y - posterior_mean(np.sqrt(BAR[t]) * y, t, spread))
        euler = y + (n[i + 1] - n[i]) * slope
        if s:
            at_s = (1 / n[i + 1]) * (euler - posterior_mean(np.sqrt(BAR[s]) * euler, s, spread))
            y = y + (n[i + 1] - n[i]) / 2 * (slope + at_s)
        else:
            y = euler
    return y


ANSWERS = {"dpmpp_2m": multistep(2), "dpmpp_3m": multistep(3), "heun": heuns}


@pytest.mark.parametrize("steps", [3, 10, 100])
@pytest.mark.parametrize("name", ANSWERS)
def test_gaussian_data_end_where_the_recursion_says(linear, name, steps):
    """The whole map from x_T to x_0, for three spreads of the data; variance and mean follow from it."""
    sampler, times, x_T = samplers.make_sampler(name, linear), linear.times(steps), jnp.linspace(-3, 3, 13)
    spreads = np.array([1.0, 0.5, 0.1])

    @jax.vmap
    def end(spread):
        return samplers.follow(exact(linear, spread), sampler, times, jax.random.key(0), x_T)[0][-1]

    for spread, found in zip(spreads, end(spreads), strict=True):
        wanted = ANSWERS[name](times, spread)
        np.testing.assert_allclose(found, wanted.slope * x_T + wanted.offset, atol=2e-3)


@pytest.mark.parametrize("spread", [1.0, 0.5, 0.1])
def test_edm_ends_with_the_known_mean_and_variance(linear, spread):
    """Karras et al. 2022, algorithm 2: noise up to the time next to (1 + churn) n, then Heun's step from there."""
    churn, inflation, low, high = 0.3, 1.05, 0.05, 20.0
    times, logsnr = linear.times(20), np.log(BAR[1:] / (1 - BAR[1:]))
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(times):
        n, up = np.exp(-half_logsnr(t)), t
        if low <= n <= high:
            up = max(t, 1 + np.argmin(np.abs(logsnr - 2 * (half_logsnr(t) - np.log(1 + churn)))))
        keep = np.sqrt(BAR[up] / BAR[t])
        step = heuns([up, s], spread) if s else posterior_mean(Affine(1.0, 0.0), up, spread)
        slope = step.slope * (np.sqrt(BAR[s]) if s else 1)
        offset = step.offset * (np.sqrt(BAR[s]) if s else 1)
        mean = slope * keep * mean + offset
        variance = slope**2 * (keep**2 * variance + inflation**2 * (1 - BAR[up] - keep**2 * (1 - BAR[t])))
    sampler = samplers.make_sampler("edm", linear, churn=churn, noise=inflation, low=low, high=high)
    x_0 = samplers.sample(exact(linear, spread), sampler, times, jax.random.key(3), (200, 200, 1))
    assert abs(x_0.mean() - mean) < 5 * np.sqrt(variance) / 200 + 1e-4
    assert abs(x_0.var() - variance) < 5 * np.sqrt(2) * variance / 200 + 1e-6


def test_edm_without_churn_is_heun(linear):
    args = linear.times(10), jax.random.key(0), (16,)
    found = samplers.sample(exact(linear, 0.5), samplers.edm(linear, churn=0.0), *args)
    np.testing.assert_allclose(found, samplers.sample(exact(linear, 0.5), samplers.heun(linear), *args), atol=1e-5)


ORDERS = {"ddim": 1, "dpmpp_2m": 2, "heun": 2, "dpmpp_3m": 3}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence_in_float64(name):
    """On the continuous VP schedule at evenly spread log-SNR: halve the steps, and the error falls by 2^order."""
    spread, end, errors = 0.5, 0.05, []
    with jax.enable_x64(True):
        schedule = schedules.make_schedule("vp")
        x_T = jax.random.normal(jax.random.key(0), (20,), float)
        ends = [float(schedule.logsnr(t)) for t in (1.0, end)]
        for steps in (40, 80, 160, 320):
            # The log-SNR of the VP-SDE solved for t: -log alphas_bar = 0.1 t + 9.95 t^2.
            integral = np.log1p(np.exp(-np.linspace(*ends, steps + 1)))
            times = (np.sqrt(0.01 + 4 * 9.95 * integral) - 0.1) / (2 * 9.95)
            times[[0, -1]] = 1.0, end
            sampler = samplers.make_sampler(name, schedule)
            x = samplers.follow(exact(schedule, spread), sampler, times, jax.random.key(0), x_T)[0][-1]
            bar = 1 / (1 + np.exp(-np.array(ends)))
            scale = np.sqrt((bar[1] * spread**2 + 1 - bar[1]) / (bar[0] * spread**2 + 1 - bar[0]))
            wanted = np.sqrt(bar[1]) * MEAN + scale * (np.asarray(x_T) - np.sqrt(bar[0]) * MEAN)
            errors.append(np.abs(np.asarray(x) - wanted).mean())
    found = np.log2(errors[1] / errors[3]) / 2
    assert found == pytest.approx(ORDERS[name], abs=0.25)


BOUNDS = {"ddim": 2e-5, "dpmpp_2m": 2e-5, "dpmpp_3m": 1e-4, "heun": 2e-5}


@pytest.mark.parametrize("name", BOUNDS)
def test_float32_errors_over_1000_steps_are_bounded(name):
    """Against the same 1,000 steps in float64, from the same x_T, relative to pixels of size 1."""
    x_T, ends = np.random.default_rng(0).normal(size=100), []
    for wide in (False, True):
        with jax.enable_x64(wide):
            table = np.concatenate([[np.inf], np.log(BAR[1:] / (1 - BAR[1:]))])
            schedule = schedules.DiscreteSchedule(table if wide else table.astype(np.float32))
            sampler, start = samplers.make_sampler(name, schedule), jnp.asarray(x_T, float)
            path = samplers.follow(exact(schedule, 0.5), sampler, schedule.times(1000), jax.random.key(0), start)[0]
            ends.append(np.asarray(path[-1], np.float64))
    assert np.abs(ends[0] - ends[1]).max() < BOUNDS[name]


NAN_CASES = [(name, {}) for name in samplers.SAMPLERS if name != "ddpm"]
NAN_CASES += [("ddpm", {"variance": variance}) for variance in diffusion.VARIANCES]
TABLES = [schedules.make_schedule(name).table for name in ("linear", "cosine")]
NO_SIGNAL = schedules.make_schedule("linear", zero_terminal_snr=True).table


@pytest.mark.parametrize("parameterization", diffusion.PARAMETERIZATIONS)
@pytest.mark.parametrize(("name", "options"), NAN_CASES, ids=lambda case: str(case))
def test_no_step_gives_nan(name, options, parameterization):
    """At t = 1, t = T and s = 0, alone and in a row, for a network that answers with what it is shown.

    Also where no signal is left at T; there eps tells nothing of the image, and experiment.make refuses it.
    """
    way, x = diffusion.PARAMETERIZATIONS[parameterization], jnp.linspace(-2, 2, 8)

    def walk(schedule, times):
        sampler = samplers.make_sampler(name, schedule, **options)
        make = diffusion.make_denoiser_with_variance if sampler.asks_variance else diffusion.make_denoiser
        predict = make(lambda params, x, t, label: jnp.tile(x, 2), schedule, way, None, None, diffusion.clip)
        return samplers.follow(predict, sampler, times, jax.random.key(0), x)[0]

    over = jax.jit(jax.vmap(lambda table, times: walk(schedules.DiscreteSchedule(table), times), (None, 0)))
    for table in TABLES if parameterization == "eps" else [*TABLES, NO_SIGNAL]:
        assert np.isfinite(over(table, np.array([[1000, 500, 1, 0], [1000, 999, 1, 0], [1000, 2, 1, 0]]))).all()
        assert np.isfinite(over(table, np.array([[1, 0], [1000, 0], [1000, 1]]))).all()
    vp = schedules.make_schedule("vp")
    assert np.isfinite(walk(vp, np.array([1.0, 0.5, vp.first, 0.0], np.float32))).all()


def test_ddim_with_eta_1_is_the_ancestral_sampler(linear):
    predict, x_t, key = exact(linear, 0.5), jax.random.normal(jax.random.key(0), (64,)), jax.random.key(1)
    for t, s in [(1000, 999), (1000, 500), (500, 20), (2, 1), (1, 0), (300, 0)]:
        a, _ = samplers.ddpm(linear, "fixedsmall").step(predict, key, x_t, t, s, ())
        b, _ = samplers.ddim(linear, 1.0).step(predict, key, x_t, t, s, ())
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "heun"])
def test_a_perfect_prediction_lands_on_the_marginal(linear, name):
    """x_t = alpha_t x_0 + sigma_t eps goes to alpha_s x_0 + sigma_s eps, for every pair of times."""
    sampler = samplers.make_sampler(name, linear)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 64))
    for t, s in [(1000, 700), (700, 10), (10, 9), (1, 0), (1000, 0)]:
        x_t = np.sqrt(BAR[t]) * x_0 + np.sqrt(1 - BAR[t]) * eps
        memory = sampler.init(jnp.asarray(x_t))
        x_s, _ = sampler.step(lambda x, t: jnp.asarray(x_0), jax.random.key(0), x_t, t, s, memory)
        np.testing.assert_allclose(
            x_s,
            np.sqrt(BAR[s]) * x_0 + np.sqrt(1 - BAR[s]) * eps,
            atol=2e-3 if t == 1 else 5e-4 if name == "heun" else 1e-4,
        )


@pytest.mark.parametrize(
    ("name", "options"), [("ddpm", {}), ("ddim", {"eta": 0.7}), ("edm", {"churn": 0.3, "noise": 1.0})]
)
def test_a_perfect_prediction_keeps_the_marginal_of_random_steps(linear, name, options):
    """x_t drawn from q(x_t | x_0) goes to x_s with the mean and the variance of q(x_s | x_0)."""
    sampler, x_0 = samplers.make_sampler(name, linear, **options), 0.6
    for t, s in [(900, 500), (300, 20), (20, 19)]:
        x_t = np.sqrt(BAR[t]) * x_0 + np.sqrt(1 - BAR[t]) * np.random.default_rng(0).normal(size=90_000)
        x_s, _ = sampler.step(lambda x, t: x_0 + 0 * x, jax.random.key(1), jnp.asarray(x_t, jnp.float32), t, s, ())
        assert x_s.mean() == pytest.approx(np.sqrt(BAR[s]) * x_0, abs=5 * np.sqrt(1 - BAR[s]) / 300)
        assert x_s.var() == pytest.approx(1 - BAR[s], rel=5 * np.sqrt(2) / 300)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_3m"])
def test_one_denoiser_gives_the_same_samples_as_eps_x_0_or_v(linear, name):
    ends, denoiser = [], exact(linear, 0.5)
    for way in diffusion.PARAMETERIZATIONS.values():

        def net(params, x_t, t, label, way=way):
            alpha, sigma = diffusion.alpha_sigma(linear.logsnr(t))
            x_0_hat = denoiser(x_t, t)
            return way.target(x_0_hat, (x_t - alpha * x_0_hat) / sigma, linear.logsnr(t))

        predict, sampler = diffusion.make_denoiser(net, linear, way, None), samplers.make_sampler(name, linear)
        ends.append(samplers.sample(predict, sampler, linear.times(50), jax.random.key(0), (64,)))
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-3)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-3)


@pytest.mark.parametrize("case", LAST_STEPS)
def test_the_last_step_returns_the_prediction(linear, case):
    name, options, _ = CASES.get(case, (case, {}, None))
    sampler = samplers.make_sampler(name, linear, **options)
    x_0 = jnp.linspace(-1, 1, 64)
    x_s, _ = sampler.step(lambda x, t: x_0, jax.random.key(0), jnp.ones(64), 1, 0, sampler.init(jnp.ones(64)))
    np.testing.assert_allclose(x_s, x_0, atol=1e-6)


def flow(x_t, t, s, spread):
    """The exact solution of the probability-flow ODE for data N(MEAN, spread^2), from time t to s; float64."""
    sd_t, sd_s = (np.sqrt(BAR[time] * spread**2 + 1 - BAR[time]) for time in (t, s))
    return np.sqrt(BAR[s]) * MEAN + (np.asarray(x_t, np.float64) - np.sqrt(BAR[t]) * MEAN) * sd_s / sd_t


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_measured_order_of_convergence(linear, name, order):
    """From t = 1000 to t = 200 in 10, 20 and 40 steps: the error falls with the step size to the claimed order."""
    key, spread = jax.random.key(5), 0.5
    x_t = jax.random.normal(keys.named(key, "x_T"), (50, 50, 1))
    errors = []
    for steps in (10, 20, 40):
        times = np.linspace(1000, 200, steps + 1).astype(int)
        x_s = samplers.sample(exact(linear, spread), samplers.make_sampler(name, linear), times, key, x_t.shape)
        errors.append(np.abs(x_s - flow(x_t, 1000, 200, spread)).mean())
    assert np.mean(np.log2(errors[:-1]) - np.log2(errors[1:])) == pytest.approx(order, abs=0.15)


def test_order_counts_what_a_few_steps_are_worth(linear):
    """With 20 steps down to clean data the second-order samplers are nearer the exact solution than DDIM."""
    key, spread, error = jax.random.key(5), 0.5, {}
    x_T = jax.random.normal(keys.named(key, "x_T"), (50, 50, 1))
    for name in ("ddim", "dpmpp_2m", "heun"):
        sampler = samplers.make_sampler(name, linear)
        x_0 = samplers.sample(exact(linear, spread), sampler, linear.times(20), key, x_T.shape)
        error[name] = np.abs(x_0 - flow(x_T, 1000, 0, spread)).mean()
    assert error["dpmpp_2m"] < error["ddim"] / 2
    assert error["heun"] < error["ddim"] / 2


def test_wrong_names_and_options_are_refused(linear):
    with pytest.raises(ConfigError, match="sampler=dpm is not one of ddpm, ddim, dpmpp_2m, dpmpp_3m, heun, edm"):
        samplers.make_sampler("dpm", linear)
    with pytest.raises(ConfigError, match="ddpm has no option eta"):
        samplers.make_sampler("ddpm", linear, eta=0.5)
    with pytest.raises(ConfigError, match=r"eta=1\.5"):
        samplers.make_sampler("ddim", linear, eta=1.5)
    samplers.make_sampler("ddim", linear, {"variance": "fixedlarge"}, eta=0.5)  # a default that it lacks is no fault


def test_path_ends_with_the_sample(linear):
    args = exact(linear, 0.5), samplers.ddpm(linear), linear.times(20), jax.random.key(0)
    x_T = samplers.pure_noise(args[-1], (4, 4, 1))
    path, _ = samplers.follow(*args, x_T, frames=7)
    assert path.shape == (7, 4, 4, 1)
    np.testing.assert_array_equal(path[-1], samplers.sample(*args, x_T.shape))
    assert len(np.unique(np.asarray(path)[:, 0, 0, 0])) == 7
    assert samplers.follow(*args, x_T, frames=40)[0].shape == (20, 4, 4, 1)


@pytest.fixture(scope="module")
def generate(tiny, linear):
    way = diffusion.PARAMETERIZATIONS["eps"]

    def denoiser(params, label):
        return diffusion.make_denoiser(tiny[0], linear, way, params, label, diffusion.clip)

    def start(predict, key, index):
        return samplers.pure_noise(key, (8, 8, 1))

    make = samplers.make_generate(denoiser, samplers.ddpm(linear, "fixedlarge"), linear.times(20), start)
    return parallel.pmap_generate(make)


def pictures(generate, params, num, batch_size):
    root = jax.random.key(9)
    return np.concatenate(
        list(parallel.generate_batches(generate, params, root, np.arange(num), batch_size=batch_size))
    )


def test_image_i_is_the_same_in_any_batch(tiny, generate):
    wanted = pictures(generate, tiny[1], 100, 64).astype(int)
    assert len(np.unique(wanted.reshape(100, -1), axis=0)) == 100
    for num, batch_size in [(7, 1), (7, 7), (7, 64), (64, 64), (100, 7), (64, 7)]:
        found = pictures(generate, tiny[1], num, batch_size)
        assert len(found) == num
        assert np.abs(found.astype(int) - wanted[:num]).max() <= 1


def test_ten_calls_compile_once(tiny, generate, compilations):
    pictures(generate, tiny[1], 16, 16)
    with compilations() as count:
        for _ in range(10):
            pictures(generate, tiny[1], 16, 16)
    assert count() == 0


def test_a_sample_that_is_not_finite_is_refused(tiny, generate):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny[1])
    with pytest.raises(Diverged, match="sample 0 is not finite"):
        pictures(generate, broken, 8, 8)


def test_the_readmes_own_sampler_works(linear):
    """Its example is DDIM at eta 0, added to the table from outside."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def straight" in block]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
        exec(code, {})
        sampler = samplers.make_sampler("straight", linear)
    args = linear.times(10), jax.random.key(0), (16,)
    found = samplers.sample(exact(linear, 0.5), sampler, *args)
    np.testing.assert_allclose(found, samplers.sample(exact(linear, 0.5), samplers.ddim(linear), *args), atol=1e-5)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_preview_ends_with_the_sample_itself(linear, name):
    """Whatever the frames before it show; and no sample is changed by it."""
    sampler, key = samplers.make_sampler(name, linear), jax.random.key(0)
    args, x_T = (linear.times(6), key), samplers.pure_noise(key, (4,))
    path, _ = samplers.follow(
        exact(linear, 0.5), samplers.with_preview(sampler), *args, x_T, frames=6, view=lambda x, memory: memory[1]
    )
    np.testing.assert_allclose(path[-1], samplers.sample(exact(linear, 0.5), sampler, *args, (4,)), atol=1e-6)
    assert np.abs(path[0] - MEAN).max() < 0.2  # x_0_hat from pure noise is nearly the mean of the data


def test_ddim_goes_up_to_where_no_signal_is_left():
    """From t = 500 to T of a schedule with alphas_bar_T = 0: what arrives is eps_hat alone."""
    schedule = schedules.make_schedule("linear", zero_terminal_snr=True)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 16))
    x_t = diffusion.q_sample(x_0, eps, schedule.logsnr(500))
    x_s, _ = samplers.ddim(schedule).step(lambda x, t: jnp.asarray(x_0), jax.random.key(0), x_t, 500, 1000, ())
    np.testing.assert_allclose(x_s, eps, atol=1e-4)

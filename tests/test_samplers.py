"""Where samplers end, and how fast, by the exact denoiser of Gaussian data, for which every answer is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from gaussian import BAR, MEAN, exact

from ddpm_jax import keys, samplers, schedules


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


@pytest.mark.parametrize("steps", [1, 10, pytest.param(1000, marks=pytest.mark.slow)])
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
        return samplers.run_sampler(exact(linear, spread), sampler, times, jax.random.key(0), x_T)[0][-1]

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


@pytest.mark.parametrize("case", LAST_STEPS)
def test_the_last_step_returns_the_prediction(linear, case):
    name, options, _ = CASES.get(case, (case, {}, None))
    sampler = samplers.make_sampler(name, linear, **options)
    x_0 = jnp.linspace(-1, 1, 64)
    x_s, _ = sampler.step(lambda x, t: x_0, jax.random.key(0), jnp.ones(64), 1, 0, sampler.init(jnp.ones(64)))
    np.testing.assert_allclose(x_s, x_0, atol=1e-6)


# --- orders of convergence


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
            x = samplers.run_sampler(exact(schedule, spread), sampler, times, jax.random.key(0), x_T)[0][-1]
            bar = 1 / (1 + np.exp(-np.array(ends)))
            scale = np.sqrt((bar[1] * spread**2 + 1 - bar[1]) / (bar[0] * spread**2 + 1 - bar[0]))
            wanted = np.sqrt(bar[1]) * MEAN + scale * (np.asarray(x_T) - np.sqrt(bar[0]) * MEAN)
            errors.append(np.abs(np.asarray(x) - wanted).mean())
    found = np.log2(errors[1] / errors[3]) / 2
    assert found == pytest.approx(ORDERS[name], abs=0.25)


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


BOUNDS = {"ddim": 2e-5, "dpmpp_2m": 2e-5, "dpmpp_3m": 1e-4, "heun": 2e-5}


@pytest.mark.parametrize("name", BOUNDS)
def test_float32_errors_over_1000_steps_are_bounded(name):
    """Against the same 1,000 steps in float64, from the same x_T, relative to pixels of size 1."""
    x_T, ends = np.random.default_rng(0).normal(size=100), []
    for wide in (False, True):
        with jax.enable_x64(wide):
            table = np.concatenate([[np.inf], np.log(BAR[1:] / (1 - BAR[1:]))])
            schedule = schedules.DiscreteSchedule(table if wide else table.astype(np.float32))
            sampler, x = samplers.make_sampler(name, schedule), jnp.asarray(x_T, float)
            path, _ = samplers.run_sampler(exact(schedule, 0.5), sampler, schedule.times(1000), jax.random.key(0), x)
            ends.append(np.asarray(path[-1], np.float64))
    assert np.abs(ends[0] - ends[1]).max() < BOUNDS[name]

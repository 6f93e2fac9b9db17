"""The density by the probability-flow ODE against closed forms for Gaussian data, and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import MEAN, exact, gaussian_image
from scipy import stats

from ddpm_jax import conditioning, diffusion, likelihood, schedules

LN2 = np.log(2)
KEY = jax.random.key(0)


def gaussian_log_density(x, variance, mean=MEAN):
    return stats.norm(mean, np.sqrt(variance)).logpdf(np.asarray(x, np.float64)).sum()


def noise_left(schedule, times):
    """(sigma / alpha)^2 at the last time above 0, in float64."""
    return np.exp(-np.float64(schedule.logsnr(times[-2])))


@pytest.mark.parametrize("spread", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", ["vp", "linear"])
def test_ode_density_of_gaussian_data(name, spread):
    """That of N(m, s^2) blurred by the noise of the first time; exact and by a probe, in bits/dim."""
    schedule = schedules.make_schedule(name)
    times, x_0 = schedule.times(200, "logsnr"), gaussian_image(spread, (4, 4, 1))
    wanted = gaussian_log_density(x_0, spread**2 + noise_left(schedule, times))
    for divergence in likelihood.DIVERGENCES:  # the Jacobian is diagonal, so that a probe of signs is exact
        found = jax.jit(
            lambda x, how=divergence: likelihood.ode_log_density(exact(schedule, spread), schedule, times, x, KEY, how)
        )(x_0)
        assert float(found) / 16 / LN2 == pytest.approx(wanted / 16 / LN2, abs=2e-3)


def test_ode_density_of_a_network_that_conditions_on_itself():
    """One that answers by way of its own estimate alone has the density of the same answer given at once."""
    schedule, way = schedules.make_schedule("vp"), diffusion.PARAMETERIZATIONS["x_0"]
    times, x_0, told = (
        schedule.times(100, "logsnr"),
        gaussian_image(0.1, (4, 4, 1), mean=0.0),
        exact(schedule, 0.1, 0.0),
    )

    def net(params, pair, t, key=None, label=None):
        x_t, estimate = jnp.split(pair, 2, -1)
        return jnp.where(jnp.any(estimate != 0), estimate, told(x_t, t))

    both = conditioning.self_conditioning(net, schedule, way)
    predict = diffusion.make_denoiser(both, schedule, way, None)
    found, wanted = (
        jax.jit(lambda x, how=how: likelihood.ode_log_density(how, schedule, times, x, KEY))(x_0)
        for how in (predict, told)
    )
    assert found == pytest.approx(float(wanted), abs=0.05)


def correlated(schedule, covariance):
    """E[x_0 | x_t] of data N(0, covariance) over the flattened image."""

    def predict(x_t, t):
        alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(t))
        inverse = jnp.linalg.inv(alpha**2 * covariance + sigma**2 * jnp.eye(len(covariance)))
        return (alpha * covariance @ inverse @ x_t.ravel()).reshape(x_t.shape)

    return predict


def test_hutchinsons_estimate_is_unbiased_where_pixels_depend_on_each_other():
    """A Gaussian with full covariance: exact to 2e-3 bits/dim; the mean over probes within its own scatter."""
    schedule, random = schedules.make_schedule("vp"), np.random.default_rng(0)
    root = random.normal(size=(4, 4)) / 3
    covariance = (root @ root.T + 0.02 * np.eye(4)).astype(np.float32)
    times, x_0 = schedule.times(100, "logsnr"), np.float32([0.3, -0.2, 0.1, 0.4]).reshape(2, 2, 1)
    blurred = covariance.astype(np.float64) + noise_left(schedule, times) * np.eye(4)
    wanted = stats.multivariate_normal(np.zeros(4), blurred).logpdf(x_0.ravel())
    args = correlated(schedule, covariance), schedule, times, x_0
    assert float(likelihood.ode_log_density(*args, KEY)) == pytest.approx(wanted, abs=4 * LN2 * 5e-3)
    keys = jax.random.split(KEY, 200)
    found = jax.jit(jax.vmap(lambda key: likelihood.ode_log_density(*args, key, "hutchinson")))(keys)
    error = np.std(found) / np.sqrt(200)
    assert error > 0.01
    assert abs(np.mean(found) - wanted) < 4 * error + 0.02


def mixture(schedule, weights, means, spread):
    """E[x_0 | x_t] of pixels that are independent draws from a mixture of N(mean, spread^2)."""

    def predict(x_t, t):
        alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(t))
        variance = alpha**2 * spread**2 + sigma**2
        log_share = jnp.log(weights) - (x_t[..., None] - alpha * means) ** 2 / (2 * variance)
        each = means + alpha * spread**2 / variance * (x_t[..., None] - alpha * means)
        return jnp.sum(jax.nn.softmax(log_share) * each, -1)

    return predict


def test_ode_density_of_a_mixture():
    """Within 1e-3 bits/dim of the exact density, at the modes, between them and outside."""
    schedule = schedules.make_schedule("vp")
    weights, means, spread = np.float32([0.3, 0.7]), np.float32([-0.5, 0.5]), 0.1
    x_0 = np.linspace(-0.9, 0.9, 16, dtype=np.float32).reshape(4, 4, 1)
    times = schedule.times(400, "logsnr")
    scale = np.sqrt(spread**2 + noise_left(schedule, times))
    density = sum(w * stats.norm(m, scale).pdf(x_0) for w, m in zip(weights, means, strict=True))
    predict = mixture(schedule, weights, means, spread)
    found = jax.jit(lambda x: likelihood.ode_log_density(predict, schedule, times, x, KEY))(x_0)
    assert float(found) / 16 / LN2 == pytest.approx(np.log2(density).sum() / 16, abs=1e-3)


def test_ode_density_is_of_second_order():
    schedule, spread, errors = schedules.make_schedule("vp"), 0.5, []
    x_0, predict = gaussian_image(spread, (32, 32, 1), mean=0.0), exact(schedule, spread, 0.0)
    for steps in (20, 40, 80):
        times = schedule.times(steps + 1, "logsnr")
        found = likelihood.ode_log_density(predict, schedule, times, x_0, KEY, "hutchinson")
        wanted = gaussian_log_density(x_0, spread**2 + noise_left(schedule, times), 0.0)
        errors.append(abs(float(found) - wanted))
    assert np.mean(np.log2(errors[:-1]) - np.log2(errors[1:])) == pytest.approx(2, abs=0.2)


def test_ode_bits_are_of_whole_levels():
    """The bright levels under N(0, s^2): the bits are those of bins from 1/255 below to 1/255 above each level."""
    schedule, spread = schedules.make_schedule("vp"), 0.7
    image, times = np.arange(112, 256, dtype=np.uint8).reshape(12, 12, 1), schedule.times(200, "logsnr")
    levels, normal = np.arange(112, 256) / 127.5 - 1, stats.norm(0, spread)
    wanted = -np.log2(normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)).mean()
    predict = exact(schedule, spread, 0.0)
    keys = jax.random.split(KEY, 20)
    found = jax.jit(
        jax.vmap(lambda key: likelihood.ode_bits_per_dim(predict, schedule, times, image, key, "hutchinson"))
    )(keys)
    assert len(np.unique(found)) == 20
    # A width of 2/256 would be 6e-3 away, noise that is not centred 5e-3.
    assert np.mean(found) == pytest.approx(wanted, abs=2e-3)

"""Noise levels against products in float64, published values and the papers' own definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import schedules
from ddpm_jax.errors import ConfigError


def alphas_bar(schedule, t):
    return 1 / (1 + np.exp(-np.asarray(schedule.logsnr(t), np.float64)))


def test_published_alphas_bar_at_T(linear):
    """Ho et al. 2020: the linear schedule of 1000 steps ends at alphas_bar = 4.0358e-5."""
    assert alphas_bar(linear, 1000) == pytest.approx(4.0358e-5, rel=2e-5)


def test_linear_table_is_the_product_of_one_minus_beta(linear):
    product, step = [], 1.0
    for t in range(1000):
        step *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        product.append(step)
    found = alphas_bar(linear, np.arange(1, 1001))
    np.testing.assert_allclose(found, product, rtol=1e-5)
    np.testing.assert_allclose(1 - found, 1 - np.array(product), rtol=1e-5)


@pytest.mark.parametrize("T", [50, 200, 4000])
def test_scaled_linear_ends_near_the_same_noise(T):
    """-log alphas_bar_T is about the integral of beta, which does not depend on T when the ends scale with 1000 / T."""
    end = alphas_bar(schedules.from_betas(schedules.linear_betas(T)), T)
    assert 0.3 < np.log(end) / np.log(4.0358e-5) - 0.5 < 1.0
    unscaled = alphas_bar(schedules.from_betas(schedules.linear_betas(T, scale=False)), T)
    assert (unscaled > 10 * end) == (T < 1000)


def test_cosine_follows_its_closed_form():
    """Nichol & Dhariwal 2021, eq. 17, wherever no beta is capped."""
    schedule = schedules.from_betas(schedules.cosine_betas(1000))
    t = np.arange(1, 990)
    wanted = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas_bar(schedule, t), wanted, rtol=1e-4)
    assert schedules.cosine_betas(1000).max() == 0.999


def test_clean_data_and_times_outside(linear):
    assert linear.logsnr(0) == np.inf
    assert linear.T == 1000
    assert np.isnan(linear.logsnr(1001))
    assert np.isnan(linear.logsnr(-1))


def test_log_snr_falls(linear):
    assert np.all(np.diff(linear.logsnr(np.arange(1001))[1:]) < 0)


@pytest.mark.parametrize("bad", [[0.1, 1.0], [0.0, 0.1], [-0.1], [np.nan], [1.5]])
def test_betas_outside_0_to_1_are_refused(bad):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        schedules.from_betas(bad)


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("T", [1, 7, 50, 1000])
def test_times_fall_for_every_number_of_steps(T, spacing):
    schedule = schedules.DiscreteSchedule(np.zeros(T + 1))
    for n in range(1, T + 1, 1 if T < 100 else 13):
        times = schedule.times(n, spacing)
        assert len(times) == n + 1
        assert times[-1] == 0
        assert times[0] <= T
        assert np.all(np.diff(times) < 0)
        if spacing == "trailing":
            assert times[0] == T
            assert np.ptp(np.diff(times)) <= 1
        elif spacing == "leading":
            assert times[-2] == 1
            assert set(np.diff(times[:-1])) <= {-(T // n)}
        else:
            assert times[0] == T
            assert times[-2] == 1 or n == 1


@pytest.mark.parametrize("n", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(linear, n):
    with pytest.raises(ConfigError, match="from 1 to T=1000"):
        linear.times(n)


def test_sample_t_is_uniform_on_1_to_T():
    schedule = schedules.DiscreteSchedule(np.zeros(11))
    drawn = jax.vmap(schedule.sample_t)(jax.random.split(jax.random.key(0), 20_000))
    counts = np.bincount(drawn, minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    assert np.sum((counts[1:] - 2000) ** 2 / 2000) < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


def test_time_at_reaches_both_ends(linear):
    assert linear.time_at(0.0) == 1
    assert linear.time_at(np.nextafter(np.float32(1), np.float32(0))) == 1000


def test_another_schedule_compiles_nothing_anew():
    traces = []

    @jax.jit
    def logsnr(schedule, t):
        traces.append(t)
        return schedule.logsnr(t)

    for betas in (schedules.linear_betas(100), schedules.cosine_betas(100)):
        logsnr(schedules.from_betas(betas), jnp.int32(3))
    assert len(traces) == 1


def test_quadratic_constant_and_warm_up_betas_are_those_of_hos_code():
    """diffusion_utils.py: quad, const and warmup10 with T = 1000, from 1e-4 to 0.02."""
    found = schedules.quadratic_betas(1000)
    assert found[[0, -1]] == pytest.approx([1e-4, 0.02])
    np.testing.assert_allclose(np.diff(np.sqrt(found)), (np.sqrt(0.02) - 0.01) / 999, rtol=1e-9)
    assert set(schedules.constant_betas(1000)) == {0.02}
    found = schedules.warm_up_betas(1000)
    np.testing.assert_allclose(np.diff(found[:100]), (0.02 - 1e-4) / 99)
    assert set(found[99:]) == {0.02}
    assert len(found) == 1000


def test_sigmoid_follows_its_closed_form():
    """Jabri et al. 2022, gamma(t) with start -3, end 3, tau 1, wherever no beta is capped."""
    schedule, t = schedules.from_betas(schedules.sigmoid_betas(1000)), np.arange(1, 995)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    wanted = (sigmoid(3) - sigmoid(t / 1000 * 6 - 3)) / (sigmoid(3) - sigmoid(-3))
    np.testing.assert_allclose(alphas_bar(schedule, t), wanted, rtol=1e-4)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("T", [100, 1000])
def test_every_schedule_is_usable(name, T):
    """Log-SNRs that fall from 10 bits or more of signal to almost none."""
    schedule = schedules.from_betas(schedules.SCHEDULES[name](T))
    logsnr = np.asarray(schedule.logsnr(np.arange(1, T + 1)))
    assert np.all(np.diff(logsnr) < 0)
    assert logsnr[0] > 1.3
    assert alphas_bar(schedule, T) < 1e-3


def test_an_unknown_spacing_is_refused(linear):
    with pytest.raises(ConfigError, match="spacing=even is not one of trailing, leading"):
        linear.times(5, "even")

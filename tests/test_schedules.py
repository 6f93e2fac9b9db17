"""Noise levels against products in float64, published values and the papers' own definitions."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from gaussian import exact
from PIL import Image

from ddpm_jax import samplers, schedules
from ddpm_jax.errors import ConfigError
from ddpm_jax.schedules import report


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


@pytest.mark.parametrize("bad", [[1.0, 0.1], [0.0, 0.1], [-0.1], [np.nan], [1.5]])
def test_betas_outside_0_to_1_are_refused(bad):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        schedules.from_betas(bad)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zero", [False, True])
def test_too_few_steps_for_a_schedule_are_told_as_such(zero):
    """At T = 10 the linear betas, 1000 / T times those of 1,000 steps, would end at 2."""
    with pytest.raises(ConfigError, match=r"run from 0\.01 to 2; with T=10"):
        schedules.make_schedule("linear", 10, zero_terminal_snr=zero)


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("T", [1, 7, 50, 1000])
def test_times_fall_for_every_number_of_steps(T, spacing):
    schedule = schedules.from_betas(schedules.linear_betas(T, scale=False))
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
            assert T - times[0] < T / n
            assert n == 1 or np.ptp(np.diff(times[:-1])) <= (T % n > 0)
        else:
            assert times[0] == T or T == 1
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
    assert linear.t_from_u(0.0) == 1
    assert linear.t_from_u(np.nextafter(np.float32(1), np.float32(0))) == 1000


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
    """diffusion_utils.py: quad, const, warmup10 and warmup50 with T = 1000, from 1e-4 to 0.02."""
    found = schedules.quadratic_betas(1000)
    assert found[[0, -1]] == pytest.approx([1e-4, 0.02])
    np.testing.assert_allclose(np.diff(np.sqrt(found)), (np.sqrt(0.02) - 0.01) / 999, rtol=1e-9)
    assert set(schedules.constant_betas(1000)) == {0.02}
    for name, rising in (("warm_up", 100), ("warm_up_50", 500)):
        found, wanted = schedules.SCHEDULES[name](1000), np.full(1000, 0.02)
        for i in range(rising):
            wanted[i] = 1e-4 + (0.02 - 1e-4) * i / (rising - 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


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


def test_jsd_falls_in_a_straight_line_to_no_signal():
    """Sohl-Dickstein et al. 2015: beta_t = 1 / (T - t + 1) takes the same part of the first signal away each time."""
    schedule = schedules.from_betas(schedules.jsd_betas(1000))
    t = np.arange(1, 1001)
    np.testing.assert_allclose(alphas_bar(schedule, t), 1 - t / 1000, atol=2e-7)
    assert schedule.logsnr(1000) == -np.inf


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic"])
def test_zero_terminal_snr_moves_the_signal_in_a_straight_line(name):
    """Lin et al. 2023: nothing left at T, the first step as it was, sqrt(alphas_bar) an affine function of the old."""
    old = np.sqrt(np.cumprod(1 - schedules.SCHEDULES[name](1000)))
    schedule = schedules.make_schedule(name, zero_terminal_snr=True)
    new = np.sqrt(alphas_bar(schedule, np.arange(1, 1001)))
    assert new[-1] == 0
    assert new[0] == pytest.approx(old[0], rel=1e-6)
    slope, intercept = np.polyfit(old, new, 1)
    np.testing.assert_allclose(new, slope * old + intercept, atol=1e-5)


def test_base_resolution_gives_a_shrunken_picture_the_old_noise():
    """The mean over 2x2 pixels has a quarter of the noise's variance, so that picture's SNR is 4 times as high."""
    t = np.arange(1, 1001)
    base, large = (schedules.make_schedule("linear", resolution=side, base_resolution=64) for side in (64, 128))
    np.testing.assert_allclose(np.exp(base.logsnr(t)), 4 * np.exp(large.logsnr(t)), rtol=1e-5)
    curve = schedules.make_schedule("vp", resolution=128, base_resolution=64)
    assert curve.logsnr(0.3) == pytest.approx(float(schedules.make_schedule("vp").logsnr(0.3)) - np.log(4), abs=1e-5)
    assert curve.logsnr(0) == np.inf


def test_own_betas_take_the_schedules_place():
    schedule = schedules.make_schedule("linear", 4, betas=(0.1, 0.2, 0.5, 0.9))
    np.testing.assert_allclose(alphas_bar(schedule, np.arange(1, 5)), [0.9, 0.72, 0.36, 0.036], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"betas has 4 numbers, but diffusion\.T=5"):
        schedules.make_schedule("linear", 5, betas=(0.1, 0.2, 0.5, 0.9))
    with pytest.raises(ConfigError, match="vp is continuous"):
        schedules.make_schedule("vp", 4, betas=(0.1, 0.2, 0.5, 0.9))
    with pytest.raises(ConfigError, match="liner is not one of linear, cosine"):
        schedules.make_schedule("liner")


@pytest.fixture(params=schedules.CURVES)
def continuous(request):
    return schedules.make_schedule(request.param)


def test_vp_is_the_limit_of_the_linear_schedule():
    """Song et al. 2021, appendix B: -log alphas_bar is the integral of beta(t), 0.1 to 20; Ho's are beta(t) / T."""
    vp, t = schedules.make_schedule("vp"), np.array([1e-3, 0.1, 0.5, 1.0])
    integral = [scipy.integrate.quad(lambda at: 0.1 + 19.9 * at, 0, end)[0] for end in t]
    np.testing.assert_allclose(vp.logsnr(t), -np.log(np.expm1(integral)), rtol=1e-5)
    errors = []
    for T in (1000, 4000):
        linear = schedules.make_schedule("linear", T)
        at = np.array([0.1, 0.5, 0.9])
        errors.append(np.abs(linear.logsnr((at * T).astype(int)) - vp.logsnr(at)).max())
    assert errors[1] < errors[0] / 3
    assert errors[0] < 0.06


def test_cosine_logsnr_is_a_cosine_and_linear_logsnr_a_line():
    """Nichol & Dhariwal's cosine without offset: alpha = cos(pi t / 2), up to the cut ends."""
    t = np.linspace(0.01, 0.99, 50)
    found = schedules.make_schedule("cosine_logsnr").logsnr(t)
    np.testing.assert_allclose(np.sqrt(1 / (1 + np.exp(-found))), np.cos(np.pi * t / 2), atol=1e-3)
    found = schedules.make_schedule("linear_logsnr").logsnr(np.array([1e-5, 0.25, 0.5, 0.75, 1]))
    np.testing.assert_allclose(found, [13.3, 7.475, 1.65, -4.175, -10], atol=1e-3)


def test_continuous_times(continuous):
    assert continuous.logsnr(0) == np.inf
    assert np.isnan(continuous.logsnr(np.array([-0.1, 1.1]))).all()
    assert continuous.t_from_u(0.0) == continuous.t_min
    for spacing in schedules.SPACINGS:
        times = continuous.times(25, spacing)
        assert len(times) == 26
        assert times[-1] == 0
        assert np.all(np.diff(times) < 0)
        assert times[0] == 1 or spacing == "leading"
    drawn = jax.vmap(continuous.sample_t)(jax.random.split(jax.random.key(0), 10_000))
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 1e-3


def test_rate_of_a_continuous_schedule_is_its_slope(continuous):
    t, h = np.array([0.05, 0.3, 0.6, 0.95]), 1e-3
    slope = (continuous.logsnr(t + h).astype(float) - continuous.logsnr(t - h)) / (2 * h)
    np.testing.assert_allclose(continuous.rate(t), -slope, rtol=5e-3)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_rate_is_the_weight_of_eq_12(name):
    """T beta_t^2 / (sigma_t^2 alpha_t (1 - alphas_bar_t)), alpha_t = 1 - beta_t, with sigma_t^2 = beta-tilde_t."""
    betas = schedules.SCHEDULES[name](1000)
    bar = np.cumprod(1 - betas)
    variance = (1 - bar[:-1]) / (1 - bar[1:]) * betas[1:]
    wanted = betas[1:] ** 2 / (variance * (1 - betas[1:]) * (1 - bar[1:]))
    schedule = schedules.from_betas(betas)
    np.testing.assert_allclose(schedule.rate(np.arange(2, 1001)), 1000 * wanted, rtol=2e-3)
    assert schedule.rate(1) == pytest.approx(1000 / bar[0], rel=1e-5)


def test_time_of_is_the_inverse_of_logsnr(linear, continuous):
    t = np.array([1, 2, 500, 999, 1000])
    np.testing.assert_array_equal(jax.vmap(linear.t_from_logsnr)(linear.logsnr(t)), t)
    t = np.array([0.01, 0.3, 0.99])
    np.testing.assert_allclose(continuous.t_from_logsnr(continuous.logsnr(t)), t, atol=2e-5)


def test_spacings_by_noise_level_are_even_in_it():
    schedule = schedules.make_schedule("vp")
    levels = np.asarray(schedule.logsnr(schedule.times(20, "logsnr")[:-1]), float)
    # Times are multiples of 1e-5, which shows in the last ones.
    np.testing.assert_allclose(np.diff(levels)[:-3], (levels[-1] - levels[0]) / 19, rtol=0.01)
    roots = np.exp(-np.asarray(schedule.logsnr(schedule.times(20, "karras")[:-1]), float) / 14)
    np.testing.assert_allclose(np.diff(roots)[:-3], (roots[-1] - roots[0]) / 19, rtol=0.01)


def test_report_of_the_papers_schedule(linear):
    """Ho et al. 2020: alphas_bar_T is 4.0358e-5; the KL from N(0, 1) of a pixel at 1 follows from it in closed form."""
    found = report.report(linear)
    assert found["alphas_bar_T"] == pytest.approx(4.0358e-5, rel=1e-4)
    assert found["snr_T"] == pytest.approx(4.0358e-5 / (1 - 4.0358e-5), rel=1e-4)
    assert found["sigma_1"] == pytest.approx(0.01, rel=1e-5)
    mean, variance = 4.0358e-5**0.5, 1 - 4.0358e-5
    assert found["prior_kl"] == pytest.approx((mean**2 + variance - 1 - np.log(variance)) / 2 / np.log(2), rel=1e-3)


def test_signal_left_at_T_is_warned_of(recwarn):
    report.check_terminal_snr(schedules.from_betas(schedules.linear_betas(1000)))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"x_T keeps 13\.[0-9]% of the image's variance"):
        report.check_terminal_snr(schedules.from_betas(schedules.linear_betas(200, scale=False)))


@pytest.mark.parametrize("n", [40, 501, *(pytest.param(n, marks=pytest.mark.slow) for n in (334, 500, 700))])
def test_every_spacing_starts_where_pure_noise_belongs(linear, n):
    """The exact denoiser of data N(0.5, 0.5^2) ends at their mean, which a start from noise at a lower t pulls to 0.

    In 501 steps from t = 501, where 28 % of the image's amplitude is left, at 0.36.
    """
    key = jax.random.key(0)
    for spacing in schedules.SPACINGS:
        x_0 = samplers.sample(exact(linear, 0.5, 0.5), samplers.ddim(linear), linear.times(n, spacing), key, (10_000,))
        assert np.mean(x_0) == pytest.approx(0.5, abs=0.015), spacing


def test_a_start_from_noise_where_an_image_still_shows_is_warned_of(linear, recwarn):
    for t in (1000, 950):
        report.check_start_snr(linear, t)
    report.check_start_snr(schedules.from_betas(schedules.linear_betas(200, scale=False)), 200)  # check_terminal_snr's
    assert not recwarn
    left = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:501])
    with pytest.warns(UserWarning, match=f"x_t at t = 501 of 1000, which keeps {left:.1%} of the image's variance"):
        report.check_start_snr(linear, np.int32(501))
    with pytest.warns(UserWarning, match=r"x_t at t = 0\.5 of 1, which keeps 7\.9%"):  # exp(-(0.1 + 19.9 / 4) / 2)
        report.check_start_snr(schedules.make_schedule("vp"), 0.5)


def test_the_report_is_printed_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "ddpm_jax.schedules", "--schedule=cosine", f"--out={tmp_path}/cosine.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["alphas_bar_T", "snr_T", "sigma_1", "prior_kl"]
    assert Image.open(tmp_path / "cosine.png").size == (800, 300)
    done = subprocess.run([*command[:3], "--schedule=cosin"], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_new_schedule_is_one_function(monkeypatch):
    """Straight in sigma: alphas_bar_t = 1 - (t/T)^2."""

    def straight_betas(T):
        level = 1 - (np.arange(T + 1) / (T + 0.1)) ** 2
        return 1 - level[1:] / level[:-1]

    monkeypatch.setitem(schedules.SCHEDULES, "straight", straight_betas)
    schedule = schedules.make_schedule("straight", 50)
    np.testing.assert_allclose(1 - alphas_bar(schedule, np.arange(1, 51)), (np.arange(1, 51) / 50.1) ** 2, rtol=1e-4)

"""Encoding, interpolation and inpainting of Gaussian data, whose exact denoiser makes every answer known."""

import itertools

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import diffusion, editing, samplers, schedules

MEAN, SPREAD = 0.2, 0.5

# schedule, and alphas_bar by the papers' own definitions: a product; exp of minus the integral of 0.1 + 19.9 t
CASES = {
    "linear": (schedules.from_betas(schedules.linear_betas()), lambda t: gaussian.BAR[np.asarray(t, int)]),
    "vp": (schedules.make_schedule("vp"), lambda t: np.exp(-(0.1 * t + 19.9 * t**2 / 2))),
}


def exact(schedule, spread=SPREAD, mean=MEAN):
    return gaussian.exact(schedule, spread, mean)


def flow(x, bar_from, bar_to, spread=SPREAD, mean=MEAN):
    """Where the probability-flow ODE of that data leads: quantiles stay quantiles of N(alpha mean, ...); float64."""
    sd_from, sd_to = (np.sqrt(bar * spread**2 + 1 - bar) for bar in (bar_from, bar_to))
    return np.sqrt(bar_to) * mean + (np.asarray(x, np.float64) - np.sqrt(bar_from) * mean) * sd_to / sd_from


def order(errors):
    """The mean order at which errors fall when the number of steps doubles."""
    return np.mean(np.log2(errors[:-1]) - np.log2(errors[1:]))


def picture(shape=(16, 16, 1), seed=0):
    return jnp.asarray(MEAN + SPREAD * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_encoding_and_decoding_are_right_to_first_order(name):
    """x_T is the image's own quantile of the prior, so that data N(m, s^2) have N(sqrt(bar) m, bar s^2 + 1 - bar).

    And from there the sampler leads back to the image, which is the same to within an error of first order.
    """
    schedule, bar = CASES[name]
    x_0, sampler, predict = picture(), samplers.ddim(schedule), exact(schedule)

    def there_and_back(times):
        x_T = editing.encode(predict, sampler, schedule, times, x_0)
        return x_T, samplers.run_sampler(predict, sampler, times, jax.random.key(0), x_T)[0][-1]

    there, back = [], []
    for steps in (25, 50, 100):
        times = schedule.times(steps)
        x_T, again = jax.jit(lambda times=times: there_and_back(times))()
        there.append(np.abs(x_T - flow(x_0, 1.0, bar(times[0]))).mean())
        back.append(np.abs(again - x_0).mean())
    assert order(there) == pytest.approx(1, abs=0.15)
    assert order(back) == pytest.approx(1, abs=0.2)
    assert back[-1] < 0.05 * SPREAD
    # Standardised, x_T is the standardised image: mean and variance are known with the image's own.
    z = (np.asarray(x_0) - MEAN) / SPREAD
    assert x_T.mean() == pytest.approx(np.sqrt(bar(times[0])) * MEAN + z.mean(), abs=0.01)
    assert x_T.std() == pytest.approx(z.std(), rel=0.05)


def test_encoding_in_one_step_knows_no_noise():
    """With one step, from T to clean data, the image is its own x_0_hat there and x_T = sqrt(alphas_bar_T) x_0."""
    schedule, bar = CASES["linear"]
    x_T = editing.encode(exact(schedule), samplers.ddim(schedule), schedule, schedule.times(1), picture())
    np.testing.assert_allclose(x_T, np.sqrt(bar(1000)) * np.asarray(picture()), rtol=1e-4)


def generated(schedule, edit, steps, num, sampler="ddim", predict=None, wrap=lambda sampler: sampler):
    """What samplers.make_generate makes of an edit: uint8 (num, H, W, C)."""
    sampler, times, start = edit(wrap(samplers.make_sampler(sampler, schedule)), schedule.times(steps))
    generate = samplers.make_generate(lambda params, label: predict or exact(schedule), sampler, times, start)
    batch = jax.jit(jax.vmap(generate, (None, None, 0)))
    pictures, finite = batch(None, jax.random.key(3), jnp.arange(num))
    assert np.all(finite)
    return np.asarray(pictures)[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_reconstruction_returns_the_picture(name):
    schedule, _ = CASES[name]
    x_0 = jnp.clip(picture(), -1, 1)
    (found,) = generated(schedule, editing.reconstruct(schedule, x_0), 200, 1)
    error = np.abs(found.astype(int) - np.asarray(diffusion.to_uint8(x_0)).astype(int))
    assert error.mean() < 2  # grey levels of 255
    assert error.max() <= 6


@pytest.mark.parametrize(("name", "t"), [("linear", 300), ("vp", 0.4)])
def test_interpolation_mixes_two_noisy_pictures(name, t):
    """Shares 0 and 1 are draws from q(x_t | x_0) of one picture each, with noises that know nothing of each other."""
    schedule, bar = CASES[name]
    bar, shape = bar(t), (200, 200, 1)
    x_0, other = jnp.full(shape, -0.5), jnp.full(shape, 0.8)
    start = editing.interpolation(schedule, t, jax.random.key(0), x_0, other)
    first, half, second = (np.asarray(start(share), np.float64) for share in (0.0, 0.5, 1.0))
    for x_t, mean, variance in [
        (first, -0.5, 1 - bar),
        (half, 0.15, (1 - bar) / 2),  # of the mean of two independent noises
        (second, 0.8, 1 - bar),
    ]:
        assert x_t.mean() == pytest.approx(np.sqrt(bar) * mean, abs=5 * np.sqrt(variance) / 200)
        assert x_t.var() == pytest.approx(variance, rel=5 * np.sqrt(2) / 200)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / 200


def test_all_shares_of_an_interpolation_have_the_same_noise():
    """So the pictures move along a straight line; with noise of their own, no three of them would lie on one."""
    start = editing.interpolation(CASES["linear"][0], 300, jax.random.key(0), picture(), picture(seed=1))
    ends = np.asarray(start(0.0), np.float64), np.asarray(start(1.0), np.float64)
    for share in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(start(share), ends[0] + share * (ends[1] - ends[0]), atol=1e-5)
    np.testing.assert_array_equal(start(0.3), start(0.3))


@pytest.mark.parametrize(("name", "t"), [("linear", 300), ("linear", 300.0), ("linear", 287.5), ("vp", 0.3)])
def test_interpolated_pictures_run_from_one_to_the_other(name, t):
    """DDIM is affine for Gaussian data, so the decoded pictures are evenly spread between the first and the last.

    These are the pictures with noise, led to clean data by the flow; of many equal pixels the mean is known. A time
    between two whole ones is the lower one for a discrete schedule.
    """
    schedule, bar = CASES[name]
    bar, num, spread = bar(t), 5, 0.15  # so narrow that no pixel meets the ends of the grey scale
    values = np.array([-0.3, 0.6])
    x_0, other = (jnp.full((64, 64, 1), value) for value in values)
    edit = editing.interpolate(schedule, t, jax.random.key(1), x_0, other, num)
    found = generated(schedule, edit, 200, num, predict=exact(schedule, spread)) / 127.5 - 1
    for i, share in enumerate(np.linspace(0, 1, num)):
        np.testing.assert_allclose(found[i], found[0] + share * (found[-1] - found[0]), atol=1.5 / 127.5)
    wanted = flow(np.sqrt(bar) * values, bar, 1.0, spread)
    assert np.diff(wanted) > 0.1
    for page, value in ((found[0], wanted[0]), (found[-1], wanted[1])):
        # Five standard deviations of the mean of 64 x 64 pixels, and what 200 steps of first order leave.
        assert page.mean() == pytest.approx(value, abs=5 * spread / 64 + 0.01)


@pytest.mark.parametrize(("name", "t"), [("linear", 500.0), ("linear", 0.5), ("vp", 0.437), ("linear", 1000)])
def test_an_interpolation_starts_at_its_time_and_ends_clean(name, t):
    schedule, _ = CASES[name]
    times = schedule.times(20)
    edit = editing.interpolate(schedule, t, jax.random.key(1), picture(), picture(seed=1), 5)
    _, way, _ = edit(samplers.ddim(schedule), times)
    assert way.dtype == times.dtype
    assert way[0] == max(t, schedule.t_min)
    assert np.all(np.diff(way) < 0)
    np.testing.assert_array_equal(way[1:], times[times < way[0]])


@pytest.mark.parametrize(("n", "jump", "repeats"), [(20, 5, 3), (20, 1, 4), (23, 10, 5), (20, 20, 7), (20, 50, 2)])
def test_resampled_times_go_back_and_forth(n, jump, repeats):
    times = np.arange(n, -1, -1) * 7
    way = editing.resampling_times(times, jump, repeats)
    assert way[0] == times[0]
    assert way[-1] == 0
    assert np.sum(way == 0) == 1  # from clean data there is no way back
    steps = list(itertools.pairwise(way))
    down = [pair for pair in steps if pair[0] > pair[1]]
    up = [pair for pair in steps if pair[0] < pair[1]]
    assert len(down) + len(up) == len(steps)
    every = list(itertools.pairwise(times))
    assert set(down) == set(every)  # no step leaves one of the times out
    blocks = (n - 1) // jump  # whole ones above the least noisy time
    once = n - blocks * jump - 1  # odd steps at the start
    assert len(up) == blocks * (repeats - 1)
    assert [down.count(pair) for pair in every] == [1] * once + [repeats] * (blocks * jump) + [1]
    assert all(high - low == 7 * jump for low, high in up)


def test_one_repeat_is_the_plain_way():
    times = CASES["linear"][0].times(50)
    np.testing.assert_array_equal(editing.resampling_times(times, 10, 1), times)
    assert editing.resampling_times(times, 10, 3).dtype == times.dtype


@pytest.mark.parametrize("name", [*samplers.SAMPLERS, "dpmpp_2m and preview"])
def test_known_pixels_are_kept_exactly(name):
    """By every sampler, whatever its memory; and what is painted is neither the known picture nor the mask."""
    schedule, _ = CASES["linear"]
    known = diffusion.to_unit(np.random.default_rng(0).integers(0, 256, (8, 8, 1)).astype(np.uint8))
    mask = np.random.default_rng(1).random((8, 8, 1)) < 0.5
    edit = editing.inpaint(schedule, known, mask, 2, 2)
    name, *preview = name.split(" and ")
    wrap = samplers.with_preview if preview else lambda sampler: sampler
    (found,) = generated(schedule, edit, 6, 1, name, wrap=wrap)
    np.testing.assert_array_equal(found[mask], diffusion.to_uint8(known)[mask])
    assert np.mean(found[~mask] != np.asarray(diffusion.to_uint8(known))[~mask]) > 0.8


def test_a_step_up_has_the_forward_process_own_mean_and_variance():
    """x_s of N(sqrt(bar_t) c, 1 - bar_t) is to be N(sqrt(bar_s) c, 1 - bar_s), without a question to the network."""
    schedule, bar = CASES["linear"]
    shape = (200, 200, 1)
    sampler = editing.inpainted(samplers.ddpm(schedule), schedule, jnp.zeros(shape), jnp.zeros(shape, bool))
    for t, s in [(1, 30), (200, 230), (200, 900), (999, 1000)]:
        x_t = np.sqrt(bar(t)) * 0.7 + np.sqrt(1 - bar(t)) * jax.random.normal(jax.random.key(1), shape)
        x_s, _ = sampler.step(lambda x, time: x * jnp.nan, jax.random.key(0), x_t, t, s, ())
        assert x_s.mean() == pytest.approx(np.sqrt(bar(s)) * 0.7, abs=5 * np.sqrt(1 - bar(s)) / 200)
        assert x_s.var() == pytest.approx(1 - bar(s), rel=5 * np.sqrt(2) / 200)
        kept = np.cov(np.asarray(x_t).ravel(), np.asarray(x_s).ravel())[0, 1] / np.var(x_t)
        assert kept == pytest.approx(np.sqrt(bar(s) / bar(t)), abs=5 * np.sqrt((1 - bar(s)) / (1 - bar(t))) / 200)


def pair_denoiser(schedule, rho):
    """E[x_0 | x_t] for images (1, 2, 1), both pixels N(MEAN, SPREAD^2) and of correlation rho.

    Their mean and half their difference are independent, of variance (1 + rho) / 2 and (1 - rho) / 2 times SPREAD^2.
    """

    def predict(x_t, t):
        first, second = x_t[0, :, 0]
        common, half = (
            exact(schedule, SPREAD * np.sqrt(1 + sign * rho), mean * np.sqrt(2))(part / np.sqrt(2), t) / np.sqrt(2)
            for sign, mean, part in ((1, MEAN, first + second), (-1, 0.0, first - second))
        )
        return jnp.stack([common + half, common - half]).reshape(x_t.shape)

    return predict


def painted(schedule, rho, steps, jump, repeats, num=4000):
    """(known, painted) pixels of `num` images, the known one drawn from the data, standardised."""
    mask = jnp.array([True, False]).reshape(1, 2, 1)
    times = editing.resampling_times(schedule.times(steps), jump, repeats)
    z = jnp.asarray(np.random.default_rng(0).normal(size=num), jnp.float32)

    def paint(key, z):
        known = jnp.full((1, 2, 1), MEAN + SPREAD * z)
        sampler = editing.inpainted(samplers.ddpm(schedule), schedule, known, mask)
        return samplers.sample(pair_denoiser(schedule, rho), sampler, times, key, (1, 2, 1))

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(num))
    x_0 = np.asarray(jax.jit(jax.vmap(paint))(keys, z)).reshape(num, 2)
    np.testing.assert_allclose(x_0[:, 0], MEAN + SPREAD * z, atol=1e-6)
    return ((x_0 - MEAN) / SPREAD).T


def repainted(rho, times):
    """Slope and variance of the painted pixel given z, from eqs. 2, 4, 6 and 7 for two Gaussian pixels; float64.

    Both pixels at t are mean z plus Gaussian noise of covariance `spread`, and every step is linear.
    """
    bar, data = CASES["linear"][1], SPREAD**2 * np.array([[1, rho], [rho, 1]])
    mean, spread = np.zeros(2), np.eye(2)
    for t, s in itertools.pairwise(times):
        beta = 1 - (bar(s) / bar(t) if s > t else bar(t) / bar(s))
        if s > t:
            mean, spread = np.sqrt(1 - beta) * mean, (1 - beta) * spread + beta * np.eye(2)
            continue
        regression = np.sqrt(bar(t)) * data @ np.linalg.inv(bar(t) * data + (1 - bar(t)) * np.eye(2))
        of_x_0, of_x_t = np.sqrt(bar(s)) * beta / (1 - bar(t)), np.sqrt(1 - beta) * (1 - bar(s)) / (1 - bar(t))
        row = (of_x_0 * regression + of_x_t * np.eye(2))[1]
        variance = row @ spread @ row + beta * (1 - bar(s)) / (1 - bar(t))
        mean, spread = np.array([np.sqrt(bar(s)) * SPREAD, row @ mean]), np.diag([1 - bar(s), variance])
    return mean[1] / SPREAD, spread[1, 1] / SPREAD**2


@pytest.mark.parametrize(("steps", "jump", "repeats"), [(50, 5, 1), (50, 5, 10), (100, 10, 4)])
def test_painted_pixels_have_the_known_regression_on_the_kept_ones(steps, jump, repeats):
    schedule, num = CASES["linear"][0], 4000
    slope, variance = repainted(0.8, editing.resampling_times(schedule.times(steps), jump, repeats))
    known, new = painted(schedule, 0.8, steps, jump, repeats, num)
    found, offset = np.polyfit(known, new, 1)
    scatter = 5 * np.sqrt(variance / num)
    assert found == pytest.approx(slope, abs=scatter)
    assert offset == pytest.approx(0, abs=scatter)
    assert np.var(new - found * known) == pytest.approx(variance, rel=5 * np.sqrt(2 / num))


@pytest.mark.parametrize("rho", [-0.9, 0.5, 0.8])
def test_resampling_makes_what_is_painted_fit_what_is_known(rho):
    """For two pixels of correlation rho the painted one is to have the slope rho on the known one.

    Without resampling each step draws the known pixel anew, so that the other cannot follow it and the slope falls
    short (Lugmayr et al. 2022, section 4.2); the more and the finer the repeats, the nearer it comes.
    """
    times = CASES["linear"][0].times
    plain, some, more = (
        repainted(rho, editing.resampling_times(times(steps), 5, repeats))[0] / rho
        for steps, repeats in ((250, 1), (250, 5), (1000, 20))
    )
    assert plain < 0.7 < some < more < 1
    assert more > 0.95

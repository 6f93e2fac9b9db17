"""The process against the paper's definitions in float64, Gaussian conditioning, and the exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import diffusion, schedules

BETAS = {"linear": schedules.linear_betas(1000), "linear 100": schedules.linear_betas(100)}
BETAS["cosine"] = schedules.cosine_betas(500)


@pytest.fixture(scope="module", params=BETAS)
def chain(request):
    """(schedule, betas with betas[t] = beta_t, alphas_bar with alphas_bar[0] = 1), the arrays in float64."""
    betas = BETAS[request.param]
    return schedules.from_betas(betas), np.insert(betas, 0, 0.0), np.insert(np.cumprod(1 - betas), 0, 1.0)


def test_alpha_sigma_over_all_steps(chain):
    schedule, _, bar = chain
    alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(np.arange(len(bar))))
    np.testing.assert_allclose(np.square(alpha, dtype=np.float64), bar, atol=1e-6)
    np.testing.assert_allclose(np.square(sigma, dtype=np.float64), 1 - bar, atol=1e-6)
    assert (alpha[0], sigma[0]) == (1, 0)


def test_q_sample_is_eq_4(chain):
    schedule, _, bar = chain
    x_0, eps = np.random.default_rng(0).normal(size=(2, 5, 4, 3))
    for t in (0, 1, 2, len(bar) // 2, len(bar) - 1):
        wanted = np.sqrt(bar[t]) * x_0 + np.sqrt(1 - bar[t]) * eps
        np.testing.assert_allclose(diffusion.q_sample(x_0, eps, schedule.logsnr(t)), wanted, atol=3e-6)
    assert hasattr(diffusion.q_sample, "lower")  # jitted


def test_posterior_of_neighbours_is_eqs_6_and_7(chain):
    schedule, betas, bar = chain
    t = np.arange(1, len(bar))
    coefficient_0 = np.sqrt(bar[t - 1]) * betas[t] / (1 - bar[t])
    coefficient_t = np.sqrt(1 - betas[t]) * (1 - bar[t - 1]) / (1 - bar[t])
    beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * betas[t]
    posterior = jax.vmap(diffusion.q_posterior, (None, None, 0, 0))
    mean, variance = posterior(1.0, 0.0, schedule.logsnr(t), schedule.logsnr(t - 1))
    np.testing.assert_allclose(mean, coefficient_0, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(variance, beta_tilde, rtol=2e-4, atol=1e-9)
    mean, _ = posterior(0.0, 1.0, schedule.logsnr(t), schedule.logsnr(t - 1))
    np.testing.assert_allclose(mean, coefficient_t, rtol=2e-4, atol=1e-6)


def test_posterior_of_any_two_times_is_gaussian_conditioning(chain):
    """q(x_s | x_t, x_0) from q(x_s | x_0) and q(x_t | x_s), where the latter multiplies the steps between."""
    schedule, betas, bar = chain
    T, x_0, x_t = len(bar) - 1, 0.7, -0.4
    for s, t in [(1, T), (T // 3, T // 2), (0, T // 2), (0, 1), (T - 1, T), (2, T // 2)]:
        keep = np.prod(1 - betas[s + 1 : t + 1])
        prior_mean, prior_variance = np.sqrt(bar[s]) * x_0, 1 - bar[s]
        gain = prior_variance * np.sqrt(keep) / (keep * prior_variance + 1 - keep)
        wanted_mean = prior_mean + gain * (x_t - np.sqrt(keep) * prior_mean)
        wanted_variance = prior_variance * (1 - gain * np.sqrt(keep))
        mean, variance = diffusion.q_posterior(x_0, x_t, schedule.logsnr(t), schedule.logsnr(s))
        np.testing.assert_allclose(mean, wanted_mean, rtol=1e-4)
        np.testing.assert_allclose(variance, wanted_variance, rtol=2e-4, atol=1e-12)


def test_published_first_posterior_log_variance(linear):
    """Ho's code starts its table of log-variances with log beta-tilde_2 = -9.8167."""
    _, variance = diffusion.q_posterior(0.0, 0.0, linear.logsnr(2), linear.logsnr(1))
    assert np.log(variance) == pytest.approx(-9.8167, abs=1e-3)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_parameterizations_tell_of_one_denoiser(linear, t):
    """A denoiser that errs is the same seen as eps, x_0 or v: the same x_0_hat and the same error in eps."""
    x_0, eps, wrong = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    logsnr = linear.logsnr(t)
    x_t = diffusion.q_sample(x_0, eps, logsnr)
    eps_hat = eps + 0.1 * wrong
    alpha, sigma = (float(v) for v in diffusion.alpha_sigma(logsnr))
    x_0_hat = (np.asarray(x_t, np.float64) - sigma * eps_hat) / alpha
    outputs = {"eps": eps_hat, "x_0": x_0_hat, "v": alpha * eps_hat - sigma * x_0_hat}
    for name, output in outputs.items():
        way = diffusion.PARAMETERIZATIONS[name]
        output = jnp.asarray(output, jnp.float32)
        np.testing.assert_allclose(way.x_0(output, x_t, logsnr), x_0_hat, rtol=1e-3, atol=1e-3)
        error = way.eps_error(output - way.target(x_0, eps, logsnr), logsnr)
        np.testing.assert_allclose(error, 0.1 * wrong, atol=1e-3)


@pytest.mark.parametrize("spread", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", diffusion.PARAMETERIZATIONS)
def test_loss_of_the_exact_denoiser(linear, name, spread):
    """For data N(0, s^2) the best possible error is E|eps - eps_hat|^2 = SNR s^2 / (SNR s^2 + 1)."""
    way = diffusion.PARAMETERIZATIONS[name]

    def exact(params, x_t, t, key, label):
        alpha, sigma = diffusion.alpha_sigma(linear.logsnr(t))
        x_0_hat = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x_t
        return way.target(x_0_hat, (x_t - alpha * x_0_hat) / sigma, linear.logsnr(t))

    loss = diffusion.make_loss(exact, linear, way, diffusion.WEIGHTINGS["simple"])
    x_0 = spread * jax.random.normal(jax.random.key(1), (400, 400, 1))
    for t in (5, 100, 600):
        snr = float(np.exp(linear.logsnr(t), dtype=np.float64))
        found = loss(None, jax.random.key(2), x_0, None, (t - 0.5) / 1000)
        assert found == pytest.approx(snr * spread**2 / (snr * spread**2 + 1), rel=0.02)


def test_loss_draws_what_its_key_says(linear):
    """The same key gives the same loss; the network sees an integer time in 1..T, the label and a key for dropout."""
    seen = []

    def net(params, x_t, t, key, label):
        seen.append((int(t), int(label), jax.random.key_data(key).tolist()))
        return x_t

    loss = diffusion.make_loss(net, linear, diffusion.PARAMETERIZATIONS["eps"], diffusion.WEIGHTINGS["simple"])
    keys = jax.random.split(jax.random.key(0), 20)
    values = [float(loss(None, key, jnp.zeros((4, 4, 1)), 7)) for key in (*keys, keys[0])]
    assert values[-1] == values[0]
    assert len(set(values)) == len({dropout for _, _, (dropout, _) in seen}) == 20
    assert {label for _, label, _ in seen} == {7}
    times = [t for t, _, _ in seen]
    assert 1 <= min(times) < 300 < 700 < max(times) <= 1000


def test_weightings_at_their_turning_points(linear):
    """min-SNR-5 is 1 up to SNR 5 and then 5 / SNR; P2 is 1 / (1 + SNR), between 1 - alphas_bar exactly."""
    t = np.arange(1, 1001)
    bar = np.cumprod(1 - BETAS["linear"])
    weigh = {
        name: jax.vmap(weight, (None, 0))(linear, t)
        for name, weight in diffusion.WEIGHTINGS.items()
        if name != "simple"
    }
    easy = bar / (1 - bar) > 5
    np.testing.assert_allclose(weigh["min_snr"][~easy], 1)
    np.testing.assert_allclose(weigh["min_snr"][easy], (5 * (1 - bar) / bar)[easy], rtol=1e-4)
    np.testing.assert_allclose(weigh["p2"], 1 - bar, rtol=1e-4)


def test_reverse_variance_runs_from_beta_tilde_to_beta(chain):
    """Eq. 7 at nu = 0, beta_t at nu = 1; Nichol & Dhariwal 2021, eq. 15, between; none at the step to clean data."""
    schedule, betas, bar = chain
    t = np.arange(2, len(bar))
    beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * betas[t]
    variance = jax.vmap(diffusion.reverse_variance, (0, 0, None))
    for nu, wanted in [
        (0.0, beta_tilde),
        (1.0, betas[t]),
        (0.3, np.exp(0.3 * np.log(betas[t]) + 0.7 * np.log(beta_tilde))),
    ]:
        np.testing.assert_allclose(variance(schedule.logsnr(t), schedule.logsnr(t - 1), nu), wanted, rtol=2e-4)
    for nu in (-0.5, 0.0, 1.0, 1.5):
        assert diffusion.reverse_variance(schedule.logsnr(1), schedule.logsnr(0), nu) == 0


def constant_error(schedule, name, size):
    """A network of which eps_hat is wrong by `size` at every time and pixel."""
    way = diffusion.PARAMETERIZATIONS[name]

    def net(params, x_t, t, key, label):
        alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(t))
        eps_hat = (x_t - alpha * params) / sigma + size  # params is the image itself
        return way.target((x_t - sigma * eps_hat) / alpha, eps_hat, schedule.logsnr(t))

    return net


@pytest.mark.parametrize("name", diffusion.PARAMETERIZATIONS)
@pytest.mark.parametrize("distance", diffusion.DISTANCES)
def test_distances_of_a_known_error(linear, name, distance):
    """The same for one denoiser seen as eps, x_0 or v; Huber's as optax has it."""
    wanted = {"l2": jnp.square, "l1": jnp.abs, "huber": optax.losses.huber_loss}[distance]
    x_0 = jnp.linspace(-1, 1, 16).reshape(4, 4, 1)
    for size in (-2.5, 0.4):
        net, way = constant_error(linear, name, size), diffusion.PARAMETERIZATIONS[name]
        loss = diffusion.make_loss(net, linear, way, diffusion.simple, diffusion.DISTANCES[distance])
        for u in (0.05, 0.5, 0.9):
            assert loss(x_0, jax.random.key(0), x_0, None, u) == pytest.approx(float(wanted(size)), rel=2e-3)


FACTORS = {  # what an error of 1 in eps is in other terms; n = sigma / alpha is the noise beside x_0
    "eps": lambda alpha, n: 1,
    "x_0": lambda alpha, n: n,  # eq. 15
    "v": lambda alpha, n: 1 / alpha,
    "flow": lambda alpha, n: n / (n / (1 + n)),  # (x_0_hat - x_0) / (1 - t) of Li & He 2025, with 1 - t = n / (1 + n)
    "edm": lambda alpha, n: n * np.sqrt((n**2 + 0.5**2) / (n * 0.5) ** 2),  # the weight of Karras et al. 2022, table 1
}


@pytest.mark.parametrize("error", diffusion.ERRORS)
@pytest.mark.parametrize("name", diffusion.PARAMETERIZATIONS)
def test_an_error_in_eps_as_other_spaces_measure_it(linear, name, error):
    x_0, size = jnp.linspace(-1, 1, 16).reshape(4, 4, 1), 0.4
    way = diffusion.ERRORS[error](diffusion.PARAMETERIZATIONS[name])
    loss = diffusion.make_loss(constant_error(linear, name, size), linear, way, diffusion.simple)
    bar = np.cumprod(1 - BETAS["linear"])
    for t in (50, 500, 900):
        factor = FACTORS[name if error == "output" else error]
        wanted = (size * factor(np.sqrt(bar[t - 1]), np.sqrt(1 / bar[t - 1] - 1))) ** 2
        assert loss(x_0, jax.random.key(0), x_0, None, (t - 0.5) / 1000) == pytest.approx(wanted, rel=2e-3)


def test_without_signal_v_and_x_0_are_still_taught():
    """Where alphas_bar_T = 0, v is -x_0: the loss in the output is that of guessing the image."""
    schedule = schedules.make_schedule("linear", zero_terminal_snr=True)
    x_0 = jnp.linspace(-1, 1, 16).reshape(4, 4, 1)
    for name in ("x_0", "v"):
        way = diffusion.ERRORS["output"](diffusion.PARAMETERIZATIONS[name])
        loss = diffusion.make_loss(lambda params, x_t, *_: 0 * x_t, schedule, way, diffusion.simple)
        assert loss(None, jax.random.key(0), x_0, None, 0.9999) == pytest.approx(float(jnp.mean(x_0**2)), rel=1e-5)


def test_the_bound_on_a_continuous_schedule_is_an_integral():
    """Kingma et al. 2021, eq. 17: with |eps_hat - eps| = size everywhere, half the fall of the log-SNR times size^2."""
    schedule, x_0, size = schedules.make_schedule("cosine_logsnr"), jnp.zeros((2, 2, 1)), 0.3
    way = diffusion.PARAMETERIZATIONS["eps"]
    loss = diffusion.make_loss(constant_error(schedule, "eps", size), schedule, way, diffusion.WEIGHTINGS["vlb"])
    middle = (np.arange(20_000) + 0.5) / 20_000
    values = jax.vmap(loss, (None, None, None, None, 0))(x_0, jax.random.key(0), x_0, None, middle)
    assert np.mean(values, dtype=float) == pytest.approx(30 / 2 * size**2, rel=2e-3)


def test_limits():
    """Dynamic thresholding by NumPy's percentile; inside [-1, 1] no limit changes anything."""
    inside = np.random.default_rng(0).uniform(-1, 1, (8, 8, 3)).astype(np.float32)
    for limit in diffusion.LIMITS.values():
        np.testing.assert_array_equal(limit(inside), inside)
    outside = 3 * inside
    np.testing.assert_array_equal(diffusion.LIMITS["clip"](outside), np.clip(outside, -1, 1))
    largest = np.percentile(np.abs(outside), 99.5)
    found = diffusion.LIMITS["dynamic"](outside)
    np.testing.assert_allclose(found, np.clip(outside / largest, -1, 1), atol=1e-6)
    np.testing.assert_array_equal(diffusion.LIMITS["none"](outside), outside)


def test_a_learned_variance_is_the_second_half_of_the_output(linear):
    """The prediction is that of the first C channels, and nu = (v + 1) / 2."""
    way, x_t = diffusion.PARAMETERIZATIONS["v"], jnp.ones((4, 4, 3)) / 2

    def net(params, x, t, label):
        return jnp.concatenate([x / 3, x - 1.5], -1)

    x_0_hat, nu = diffusion.make_denoiser_with_variance(net, linear, way, None)(x_t, 400)
    plain = diffusion.make_denoiser(lambda params, x, t, label: x / 3, linear, way, None)(x_t, 400)
    np.testing.assert_array_equal(x_0_hat, plain)
    np.testing.assert_array_equal(nu, np.zeros((4, 4, 3)))
    np.testing.assert_array_equal(diffusion.make_denoiser(net, linear, way, None)(x_t, 400), plain)


def test_a_new_weighting_is_one_function(linear):
    """Soft min-SNR, gamma / (gamma + SNR), on a known error."""

    def soft(schedule, t, gamma=4.0):
        return gamma / (gamma + jnp.exp(schedule.logsnr(t)))

    x_0, way = jnp.zeros((2, 2, 1)), diffusion.PARAMETERIZATIONS["eps"]
    loss = diffusion.make_loss(constant_error(linear, "eps", 1.0), linear, way, soft)
    bar = np.cumprod(1 - BETAS["linear"])[99]
    found = loss(x_0, jax.random.key(0), x_0, None, 0.0995)
    assert found == pytest.approx(4 / (4 + bar / (1 - bar)), rel=1e-3)

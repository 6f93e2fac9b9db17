"""The variational bound against the paper's definitions in float64, closed forms for Gaussian data, and SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import exact, gaussian_image
from scipy import integrate, stats

from ddpm_jax import diffusion, likelihood, schedules

LN2 = np.log(2)
KEY = jax.random.key(0)
BETAS = {"linear": schedules.linear_betas(), "cosine": schedules.cosine_betas(), "T=50": schedules.linear_betas(50)}


@pytest.fixture(scope="module", params=BETAS)
def chain(request):
    """(schedule, alphas_bar_0..T in float64)."""
    betas = BETAS[request.param]
    return schedules.from_betas(betas), np.insert(np.cumprod(1 - betas), 0, 1.0)


def normal_kl(mean_1, variance_1, mean_2, variance_2):
    """KL(N(1) || N(2)) in nats."""
    return (np.log(variance_2 / variance_1) + (variance_1 + (mean_1 - mean_2) ** 2) / variance_2 - 1) / 2


def test_closed_form_of_the_kl_is_its_integral():
    """The formula that the other tests rest on."""
    p, q = stats.norm(0.2, np.sqrt(0.3)), stats.norm(-0.1, np.sqrt(0.5))
    wanted, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -6, 6)
    assert normal_kl(0.2, 0.3, -0.1, 0.5) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bar", [0.5, 1e-2, 4e-5, 1e-9, 0.0])
def test_prior_kl(bar):
    x_0 = gaussian_image(0.5)
    with np.errstate(divide="ignore"):
        logsnr = np.float32(np.log(bar) - np.log1p(-bar))
    wanted = np.mean(-np.log1p(-bar) - bar + bar * x_0.astype(np.float64) ** 2) / 2 / LN2
    assert float(likelihood.prior_kl(x_0, logsnr)) == pytest.approx(wanted, rel=1e-4, abs=1e-14)
    if bar > 1e-3:
        kl = normal_kl(np.sqrt(bar) * x_0.astype(np.float64), 1 - bar, 0, 1)
        assert wanted == pytest.approx(np.mean(kl) / LN2, rel=1e-9)


@pytest.mark.parametrize("nu", [0.0, 0.3, 1.0, "learned"])
def test_step_kl_is_that_of_the_papers_two_gaussians(chain, nu):
    """Eqs. 6 and 7 with beta = 1 - alphas_bar_t / alphas_bar_s, for neighbours and for respaced steps; float64."""
    schedule, bar = chain
    T, random = len(bar) - 1, np.random.default_rng(1)
    x_0, x_0_hat = (gaussian_image(0.5, seed=seed).astype(np.float64) for seed in (1, 2))
    x_t = random.normal(size=x_0.shape)
    share = random.uniform(size=x_0.shape).astype(np.float32) if nu == "learned" else nu
    for t, s in [(2, 1), (3, 1), (T // 2, T // 2 - 1), (T // 2, 7), (T - 1, T - 2), (T, 1)]:
        beta = 1 - bar[t] / bar[s]
        mean, mean_hat = (
            np.sqrt(bar[s]) * beta / (1 - bar[t]) * x + np.sqrt(1 - beta) * (1 - bar[s]) / (1 - bar[t]) * x_t
            for x in (x_0, x_0_hat)
        )
        beta_tilde = (1 - bar[s]) / (1 - bar[t]) * beta
        variance = np.exp((1 - share) * np.log(beta_tilde) + share * np.log(beta))
        wanted = np.mean(normal_kl(mean, beta_tilde, mean_hat, variance)) / LN2
        found = likelihood.step_kl(x_0, x_0_hat, schedule.logsnr(t), schedule.logsnr(s), share)
        assert float(found) == pytest.approx(wanted, rel=3e-4)


def bins(mean, variance, cdf):
    """Probability of each level of 0..255 by differences of a distribution function in float64, open at both ends."""
    edges = (np.arange(255) + 0.5) / 127.5 - 1
    inner = cdf((edges[:, None] - mean) / np.sqrt(variance))
    return np.diff(np.concatenate([np.zeros_like(inner[:1]), inner, np.ones_like(inner[:1])]), axis=0)


def tanh_cdf(z):
    return (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2


@pytest.mark.parametrize(("name", "cdf"), [("exact", stats.norm.cdf), ("tanh", tanh_cdf)])
@pytest.mark.parametrize("variance", [5.4e-5, 1e-3, 0.1, 1.0])
def test_decoder_gives_each_level_its_bin(name, cdf, variance):
    """All 256 bins for means inside and outside the range; probabilities that float64 can take as differences."""
    means = np.array([-1.1, -1.0, -0.5, 0.0, 0.003, 0.77, 1.0, 1.02])
    wanted = bins(means, variance, cdf)
    levels = jnp.arange(256) / 127.5 - 1
    nll = jax.vmap(
        jax.vmap(lambda x, mean: likelihood.decoder_nll(x, mean, variance, likelihood.DECODERS[name]), (None, 0)),
        (0, None),
    )(levels, jnp.asarray(means))
    found = np.exp(-np.asarray(nll, np.float64) * LN2)
    np.testing.assert_allclose(found.sum(0), 1, atol=2e-4)
    seen = wanted > 1e-9
    np.testing.assert_allclose(found[seen], wanted[seen], rtol=2e-3)
    assert np.isfinite(nll).all()
    assert np.all(found[~seen] < 1e-8)


def test_decoder_in_the_far_tails_has_the_logarithm_of_scipy():
    """Pixels missed by up to 2 at a standard deviation of .01: probabilities down to exp(-20,000), on both sides."""
    scale, mean = 0.01, np.array([-0.9, -0.3, 0.2, 0.9])
    x_0 = np.array([1.0, 0.8, -0.6, -1.0]) * 127 // 1 / 127.5
    z = -np.abs(x_0 - mean) / scale
    half = 1 / 255 / scale
    upper, lower = stats.norm.logcdf(z + half), stats.norm.logcdf(z - half)
    wanted = -(upper + np.log1p(-np.exp(lower - upper))) / LN2
    found = jax.vmap(lambda x, mean: likelihood.decoder_nll(x, mean, scale**2))(x_0, mean)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    # The open bins end at their inner edge, also where the mean lies outside.
    for x, mean, wanted in [(1.0, 1.5, 0.0), (-1.0, -1.5, 0.0), (1.0, -1.0, stats.norm.logsf((2 - 1 / 255) / scale))]:
        assert float(likelihood.decoder_nll(x, mean, scale**2)) == pytest.approx(-wanted / LN2, rel=1e-4)


@pytest.mark.parametrize("name", likelihood.DECODERS)
def test_decoder_has_finite_gradients(name):
    def nll(mean, log_variance, x_0):
        return likelihood.decoder_nll(x_0, mean, jnp.exp(log_variance), likelihood.DECODERS[name])

    x_0, mean, log_variance = np.meshgrid([-1, -0.2, 0, 1 - 1 / 127.5, 1], np.linspace(-3, 3, 25), [-14.0, -9.8, 0, 2])
    grid = [jnp.asarray(axis.ravel(), jnp.float32) for axis in (mean, log_variance, x_0)]
    value, slopes = jax.vmap(jax.value_and_grad(nll, (0, 1)))(*grid)
    assert np.isfinite(value).all()
    assert np.isfinite(slopes).all()


def test_variance_of_the_last_step():
    """As in the paper's code: beta-tilde_2, of logarithm -9.8167, and beta_1 = 1e-4; between them even in logs."""
    schedule = schedules.from_betas(BETAS["linear"])
    level, before = schedule.logsnr(1), schedule.logsnr(2)
    small, large, middle = (float(likelihood.decoder_variance(level, before, nu)) for nu in (0.0, 1.0, 0.5))
    assert np.log(small) == pytest.approx(-9.8167, abs=1e-3)
    assert large == pytest.approx(1e-4, rel=1e-3)
    assert middle == pytest.approx(np.sqrt(small * large), rel=1e-4)
    assert float(likelihood.decoder_variance(level, -jnp.inf, 0.0)) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "variance", "spread"),
    [
        (1, "fixedsmall", 0.5),
        *itertools.product([10], ["fixedsmall", "fixedlarge"], [1.0, 0.5, 0.1]),
        (100, "fixedsmall", 0.1),
        (1000, "fixedlarge", 0.5),
    ],
)
def test_bound_of_the_exact_denoiser(linear, steps, variance, spread):
    """Every term in the mean over x_t, from the paper's definitions: E|x_0 - x_0_hat|^2 = s^2 / (1 + SNR s^2)."""
    bar, times = np.insert(np.cumprod(1 - BETAS["linear"]), 0, 1.0), linear.times(steps)
    x_0, predict = gaussian_image(spread, (64, 64, 1)), exact(linear, spread)
    found = jax.jit(lambda x: likelihood.bits_per_dim(predict, linear, times, x, KEY, variance))(x_0)
    found = jax.device_get(found)
    t, s = times[:-2], times[1:-1]
    beta = 1 - bar[t] / bar[s]
    beta_tilde = (1 - bar[s]) / (1 - bar[t]) * beta
    missed = spread**2 / (1 + bar / np.maximum(1 - bar, 1e-300) * spread**2)  # at all times
    offset = (np.sqrt(bar[s]) * beta / (1 - bar[t])) ** 2 * missed[t]
    chosen = beta_tilde if variance == "fixedsmall" else beta
    wanted = (np.log(chosen / beta_tilde) + (beta_tilde + offset) / chosen - 1) / 2 / LN2
    assert found["steps"].shape == (steps - 1,)
    np.testing.assert_allclose(found["steps"], wanted, rtol=0.12, atol=1e-7)
    if steps > 1:
        assert float(found["steps"].sum()) == pytest.approx(wanted.sum(), rel=0.03)
    prior = np.mean(-np.log1p(-bar[-1]) - bar[-1] + bar[-1] * x_0.astype(np.float64) ** 2) / 2 / LN2
    assert float(found["prior"]) == pytest.approx(prior, rel=1e-3)
    parts = found["prior"] + found["steps"].sum(dtype=np.float64) + found["decoder"]
    assert float(found["total"]) == pytest.approx(parts, rel=1e-5)
    visited = times[:-1]
    np.testing.assert_allclose(found["distortion"], missed[visited] * 127.5**2, rtol=0.12)
    snr = bar[visited] / (1 - bar[visited])
    np.testing.assert_allclose(found["mse"], snr * missed[visited], rtol=0.12)


def test_decoder_of_a_bound(linear):
    """L_0 is the bin's probability under N(x_0_hat, variance of the last step), for a prediction that is off by .01."""
    x_0 = np.random.default_rng(0).integers(1, 255, (4, 4, 1)) / 127.5 - 1

    def moved(x_t, t):
        return x_0 + 0.01

    variances = {10: np.exp(-9.8167), 1: 1 - np.prod(1 - BETAS["linear"])}
    for steps, variance in variances.items():
        times = np.append(np.arange(steps, 0, -1), 0) if steps > 1 else np.array([1000, 0])
        bound = jax.jit(lambda x, times=times: likelihood.bits_per_dim(moved, linear, times, x, KEY, "fixedlarge"))
        found = bound(x_0)
        scale = np.sqrt(variance)
        bin_ = stats.norm.cdf((-0.01 + 1 / 255) / scale) - stats.norm.cdf((-0.01 - 1 / 255) / scale)
        assert float(found["decoder"]) == pytest.approx(-np.log2(bin_), rel=2e-3)


def test_learned_variance_and_limit(linear):
    """nu between, per pixel, comes in by the pair; the limit acts on the bound and not on L_simple's error."""
    x_0, times = np.full((8, 8, 1), 0.5, np.float32), linear.times(10)
    nu = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    found = likelihood.bits_per_dim(lambda x_t, t: (x_0 + 2, nu), linear, times, x_0, KEY, "learned")
    level = linear.logsnr(times)
    for i in (0, 4, 8):
        wanted = likelihood.step_kl(x_0, x_0 + 2, level[i], level[i + 1], nu)
        assert float(found["steps"][i]) == pytest.approx(float(wanted), rel=1e-5)
    clipped = likelihood.bits_per_dim(lambda x_t, t: x_0 + 2, linear, times, x_0, KEY, limit=diffusion.clip)
    np.testing.assert_allclose(clipped["distortion"], (127.5 * 0.5) ** 2, rtol=1e-4)
    np.testing.assert_allclose(clipped["mse"], 4 * np.exp(level[:-1]), rtol=1e-4)


def test_vlb_weighting_is_the_bound(linear):
    """The mean over all t > 1 of the loss in nats is the sum of the steps; both telescope for a fixed x_0_hat."""
    way, x_0 = diffusion.PARAMETERIZATIONS["x_0"], gaussian_image(0.5)
    loss = diffusion.make_loss(
        lambda params, x_t, t, key, label: jnp.full_like(x_t, 0.1), linear, way, diffusion.WEIGHTINGS["vlb"]
    )
    u = (np.arange(2, 1001) - 0.5) / 1000
    nats = np.mean(jax.vmap(lambda u: loss(None, KEY, x_0, None, u))(u)) * 999 / 1000
    bound = jax.jit(
        lambda x: likelihood.bits_per_dim(lambda x_t, t: jnp.full_like(x_t, 0.1), linear, linear.times(1000), x, KEY)
    )(x_0)
    bar = np.cumprod(1 - BETAS["linear"])
    snr = bar / (1 - bar)
    wanted = (snr[0] - snr[-1]) / 2 * np.mean((x_0.astype(np.float64) - 0.1) ** 2)
    assert nats == pytest.approx(wanted, rel=1e-4)
    assert float(bound["steps"].sum()) * LN2 == pytest.approx(wanted, rel=1e-4)


def test_many_steps_tend_to_the_integral_over_continuous_time():
    """Half the integral of s^2 / (1 + SNR s^2) over SNR, between the ends: ln(1 + SNR s^2) / 2 (Kingma et al. 2021)."""
    schedule, spread, gaps = schedules.make_schedule("linear_logsnr"), 0.5, []
    x_0, predict = gaussian_image(spread, (64, 64, 1)), exact(schedule, spread)
    for steps in (25, 100, 400):
        times = schedule.times(steps)
        bound = jax.jit(lambda x, times=times: likelihood.bits_per_dim(predict, schedule, times, x, KEY))
        snr = np.exp(np.asarray(schedule.logsnr(times[[0, -2]]), np.float64))
        wanted = np.diff(np.log1p(snr * spread**2))[0] / 2 / LN2
        gaps.append(float(bound(x_0)["steps"].sum()) / wanted - 1)
    assert gaps[0] > 2 * gaps[1] > 0  # fewer steps are a looser bound
    assert abs(gaps[2]) < 0.04


@pytest.mark.parametrize("name", diffusion.PARAMETERIZATIONS)
def test_variance_loss_is_the_bound_and_teaches_the_variance_alone(linear, name):
    way, x_0 = diffusion.PARAMETERIZATIONS[name], gaussian_image(0.3)
    learn = jax.jit(jax.value_and_grad(likelihood.make_variance_loss(linear, way)))
    v, wrong = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    for t in (1, 2, 500, 1000):
        eps, level = jax.random.normal(KEY, x_0.shape), linear.logsnr(t)
        x_t = diffusion.q_sample(x_0, eps, level)
        output = jnp.concatenate([way.target(x_0, eps, level) + 0.1 * wrong, v], -1)
        value, slope = learn(output, x_0, x_t, t)
        assert np.isfinite(slope).all()
        assert not slope[..., :1].any()
        assert (slope[..., 1:] != 0).all() or t == 1000  # where the two variances are the same in float32
        x_0_hat, nu = way.x_0(output[..., :1], x_t, level), (v + 1) / 2
        if t > 1:
            wanted = likelihood.step_kl(x_0, x_0_hat, level, linear.logsnr(t - 1), nu)
        else:
            variance = np.exp((1 - nu) * -9.8167 + nu * np.log(1e-4))
            wanted = likelihood.decoder_nll(x_0, x_0_hat, variance, likelihood.DECODERS["tanh"])
        assert float(value) == pytest.approx(float(wanted), rel=5e-3)  # T / 1000 = 1
    assert float(likelihood.make_variance_loss(schedules.from_betas(BETAS["T=50"]), way)(output, x_0, x_t, 50)) > 0


def test_variance_loss_is_finite_where_next_to_no_signal_is_left():
    """With alpha_T = 1e-15 the decoder that t = T does not ask for would overflow."""
    schedule = schedules.from_betas([1e-4, 1 - 1e-15, 1 - 1e-15])
    extra = likelihood.make_variance_loss(schedule, diffusion.PARAMETERIZATIONS["eps"])
    x_0 = gaussian_image(0.3)
    value, slope = jax.value_and_grad(extra)(jnp.full((8, 8, 2), 0.1), x_0, jnp.ones_like(x_0), 3)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_variance_loss_finds_the_best_variance(linear):
    """Where x_0_hat is missed with the error e, the KL is least at variance beta-tilde + offset^2."""
    way, t, x_0 = diffusion.PARAMETERIZATIONS["x_0"], 20, np.zeros((1, 1, 1), np.float32)
    bar = np.insert(np.cumprod(1 - BETAS["linear"]), 0, 1.0)
    beta = BETAS["linear"][t - 1]
    beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * beta
    missed = 0.05
    best = beta_tilde + (np.sqrt(bar[t - 1]) * beta / (1 - bar[t]) * missed) ** 2
    nu = np.log(best / beta_tilde) / np.log(beta / beta_tilde)
    assert 0.1 < nu < 0.9
    extra = likelihood.make_variance_loss(linear, way)
    slope = jax.grad(lambda v: extra(jnp.stack([jnp.full((1, 1), missed), v], -1), x_0, x_0, t))
    at = lambda nu: float(slope(jnp.full((1, 1), 2 * nu - 1, jnp.float32))[0, 0])  # noqa: E731
    assert abs(at(nu)) < 0.01 * min(abs(at(0.0)), abs(at(1.0)))
    assert at(0.0) < 0 < at(1.0)

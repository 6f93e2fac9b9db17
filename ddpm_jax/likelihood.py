"""Log-likelihoods in bits per dimension, for one image and scalar times; batches come from `vmap`.

The variational bound L_T + sum of L_{t-1} + L_0 of Ho, Jain & Abbeel 2020 (eqs. 5, 8 and 13), and the density of the
probability-flow ODE (Song et al. 2021). Bits per dimension are nats, averaged over pixels and channels and divided by
ln 2; the terms of the bound are summed over time. Images are in [-1, 1], with the levels 0..255 spaced 1/127.5 apart.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr
from jax.scipy.stats import norm

from ddpm_jax.diffusion import VARIANCES, alpha_sigma, q_sample, reverse_variance, to_unit
from ddpm_jax.keys import named
from ddpm_jax.samplers import Sampler, run_sampler
from ddpm_jax.schedules import Schedule

HALF_BIN = 1 / 255


def _bits(nats):
    return jnp.mean(nats) / math.log(2)


def prior_kl(x_0, logsnr) -> jax.Array:
    """L_T (eq. 5): KL from q(x_T | x_0), at the log-SNR of T, to the standard normal, in bits/dim. Not trained."""
    signal = jax.nn.sigmoid(logsnr)  # alphas_bar_T
    return _bits((signal * x_0**2 + (jax.nn.softplus(logsnr) - signal)) / 2)


def step_kl(x_0, x_0_hat, logsnr_t, logsnr_s, nu=0.0) -> jax.Array:
    """L_{t-1} (eq. 8): KL from q(x_s | x_t, x_0) to p(x_s | x_t) for any 0 < s < t, in bits/dim.

    p has the mean of q_posterior at x_0_hat and the variance of reverse_variance at nu, a scalar or one value per pixel
    (Nichol & Dhariwal 2021, eq. 15). With nu = 0 the KL is (SNR_s - SNR_t) |x_0 - x_0_hat|^2 / 2.
    """
    log_ratio = nu * (jax.nn.softplus(logsnr_s) - jax.nn.softplus(logsnr_t))  # log of the ratio of p's variance to q's
    snr_drop = -jnp.exp(logsnr_s) * jnp.expm1(logsnr_t - logsnr_s)  # SNR_s - SNR_t
    return _bits((log_ratio + jnp.expm1(-log_ratio) + jnp.exp(-log_ratio) * snr_drop * (x_0 - x_0_hat) ** 2) / 2)


def _log_tanh_cdf(z):
    """log of (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2."""
    return jax.nn.log_sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


# Log of the standard normal distribution function. The paper's code and published results use the tanh approximation.
DECODERS = {"exact": log_ndtr, "tanh": _log_tanh_cdf}


def decoder_nll(x_0, mean, variance, log_cdf=log_ndtr) -> jax.Array:
    """L_0 (eq. 13) in bits/dim: the negative log of N(mean, variance)'s mass on the bin of each pixel of x_0.

    A bin extends 1/255 to both sides of its level; the bins of levels 0 and 255 extend to infinity. log_cdf: an entry
    of DECODERS. The paper's code bounds probabilities below by 1e-12, which hides how large an error is. Here they are
    differences of two logarithms instead, taken in the tail near 0, not near 1.
    """
    scale, error = jnp.sqrt(variance), x_0 - mean
    upper, lower = (log_cdf((side - jnp.abs(error)) / scale) for side in (HALF_BIN, -HALF_BIN))
    inner_bin = upper + jax.nn.log1mexp(upper - lower)
    edge_bin = log_cdf((HALF_BIN - jnp.sign(x_0) * error) / scale)
    return -_bits(jnp.where(jnp.abs(x_0) > 0.999, edge_bin, inner_bin))


def decoder_variance(logsnr, logsnr_before, nu):
    """Variance of p(x_0 | x_t) at the last step, from `logsnr`; the step before it is from `logsnr_before`.

    reverse_variance would be 0. As in the paper's code, the small variance (nu = 0) is that of the step before,
    beta-tilde_2, and the large one (nu = 1) is sigma_t^2 = beta_1. Without a step before (-inf) both are sigma_t^2.
    """
    return reverse_variance(logsnr_before, logsnr, 0.0) ** (1 - nu) * jax.nn.sigmoid(-logsnr) ** nu


def bits_per_dim(
    predict, schedule, times, x_0, key, variance="fixedsmall", decoder="exact", limit=lambda x_0_hat: x_0_hat
):
    """The variational bound (eq. 5) of one image, from one sample of q(x_t | x_0) at each of n decreasing `times`.

    predict(x_t, t) -> x_0_hat, or that of diffusion.make_denoiser_with_variance for the variance "learned"; times:
    (n + 1,), the last is 0; variance, decoder, limit: in diffusion.VARIANCES, DECODERS and diffusion.LIMITS.
    In bits/dim: "prior" L_T, "steps" (n - 1,) L_{t-1} of the steps to times[1:-1], "decoder" L_0, "total" the sum.
    At each of times[:-1]: "mse" (n,), the squared error of eps without `limit` (its mean is L_simple, eq. 14), and
    "distortion" (n,), the squared error of x_0_hat in levels of 0..255.
    """
    logsnrs = schedule.logsnr(jnp.asarray(times))
    before = jnp.insert(logsnrs, 0, -jnp.inf)[:-2]

    def terms_of_step(step):
        i, t, logsnr_before, logsnr_t, logsnr_s = step
        eps = jax.random.normal(jax.random.fold_in(named(key, "eps"), i), x_0.shape)
        last = logsnr_s == jnp.inf
        prediction, nu = VARIANCES[variance](predict(q_sample(x_0, eps, logsnr_t), t), last)
        mse = jnp.exp(logsnr_t) * jnp.mean((x_0 - prediction) ** 2)
        x_0_hat = limit(prediction)
        nll = decoder_nll(x_0, x_0_hat, decoder_variance(logsnr_t, logsnr_before, nu), DECODERS[decoder])
        term = jnp.where(last, nll, step_kl(x_0, x_0_hat, logsnr_t, logsnr_s, nu))
        return term, mse, jnp.mean((127.5 * (x_0 - x_0_hat)) ** 2)

    n, prior = len(times) - 1, prior_kl(x_0, logsnrs[0])
    steps = np.arange(n), jnp.asarray(times)[:-1], before, logsnrs[:-1], logsnrs[1:]
    terms, mse, distortion = lax.map(terms_of_step, steps)
    parts = {"prior": prior, "steps": terms[:-1], "decoder": terms[-1], "total": prior + jnp.sum(terms)}
    return parts | {"mse": mse, "distortion": distortion}


def make_variance_loss(schedule, parameterization):
    """extra(output, x_0, x_t, t) for diffusion.make_loss: L_hybrid - L_simple (Nichol & Dhariwal 2021, eq. 16).

    It is T/1000 times L_{t-1} or L_0 in bits/dim (lambda = 0.001 times the sum over t). It trains only the second half
    of the output's 2C channels, 2 nu - 1: x_0_hat gets no gradient. For a DiscreteSchedule. Like theirs, the decoder
    uses tanh, whose gradient stays exact for pixels with a large error, where that of log_ndtr loses digits.
    """
    first, second = schedule.logsnr(1), schedule.logsnr(2) if schedule.T > 1 else -jnp.inf

    def extra(output, x_0, x_t, t):
        prediction, v = jnp.split(output, [x_0.shape[-1]], -1)
        nu, logsnr_t, logsnr_s = (v + 1) / 2, schedule.logsnr(t), schedule.logsnr(jnp.maximum(t - 1, 1))
        x_0_hat = lax.stop_gradient(parameterization.x_0(prediction, x_t, logsnr_t))
        mean = jnp.where(t > 1, x_0, x_0_hat)  # the unused branch must be finite, or its gradient is NaN
        nll = decoder_nll(x_0, mean, decoder_variance(first, second, nu), DECODERS["tanh"])
        term = jnp.where(t > 1, step_kl(x_0, x_0_hat, logsnr_t, logsnr_s, nu), nll)
        return schedule.T / 1000 * term

    return extra


# Vectors v for which the sum of v . J v is the trace of J, exactly or in expectation: (key, shape) -> (n, *shape).
DIVERGENCES = {
    "exact": lambda key, shape: jnp.eye(math.prod(shape)).reshape(-1, *shape),
    "hutchinson": lambda key, shape: jax.random.rademacher(key, (1, *shape), jnp.float32),  # Grathwohl et al. 2019
}


def probability_flow(schedule, probes):
    """Sampler of the probability-flow ODE towards noise, s > t. Its memory is the change of log-density in nats.

    With y = x / alpha and the noise level n = sigma / alpha, the ODE is dy/dn = eps_hat (see samplers.heun), and
    d log p(y) / d log n = -div(y - x_0_hat). A Heun step integrates y over n and log p over log n; both are nearly
    linear where noise dominates. Two network calls per step; probes: from one of DIVERGENCES.
    """

    def step(predict, key, x_t, t, s, memory):
        def derivatives(y, time):
            logsnr = schedule.logsnr(time)

            def noise(y):
                return y - predict(alpha_sigma(logsnr)[0] * y, time)

            value, jacobian_products = jax.vmap(lambda v: jax.jvp(noise, (y,), (v,)), out_axes=(None, 0))(probes)
            return value * jnp.exp(logsnr / 2), jnp.sum(probes * jacobian_products)

        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        h = jnp.exp(-logsnr_s / 2) - jnp.exp(-logsnr_t / 2)
        y = x_t / alpha_sigma(logsnr_t)[0]
        eps_hat, divergence = derivatives(y, t)
        eps_hat_s, divergence_s = derivatives(y + h * eps_hat, s)
        x_s = alpha_sigma(logsnr_s)[0] * (y + h / 2 * (eps_hat + eps_hat_s))
        return x_s, memory + (logsnr_s - logsnr_t) / 4 * (divergence + divergence_s)

    return Sampler(lambda x: jnp.zeros(()), step)


def ode_log_density(predict, schedule, times, x_0, key, divergence="exact"):
    """log p(x_0) in nats under the probability-flow ODE (Song et al. 2021, eq. 39).

    It is the density of y = x / alpha at the last of the decreasing `times` above 0, if x at times[0] is standard
    normal: the data density, blurred by the noise of that time. times: at least two above 0, all with some signal (a
    finite log-SNR); divergence: in DIVERGENCES; "exact" needs one derivative per dimension.
    """
    up = np.asarray(times)[-2::-1]
    (alpha, _), (alpha_T, _) = (alpha_sigma(schedule.logsnr(t)) for t in (up[0], up[-1]))
    probes = DIVERGENCES[divergence](named(key, "probe"), x_0.shape)
    path, change = run_sampler(predict, probability_flow(schedule, probes), up, key, alpha * x_0)
    return jnp.sum(norm.logpdf(path[-1]) + jnp.log(alpha_T)) - change


def ode_bits_per_dim(predict: Callable, schedule: Schedule, times, image, key, divergence="exact") -> jax.Array:
    """Bits per dimension of a uint8 image under the ODE's density; see ode_log_density.

    Uniform dequantisation: uniform noise fills the bin of each level. A bin is 1/127.5 wide in [-1, 1] (other codebases
    scale to 1/128), which adds log2 127.5 to the bits of the density. The mean over the noise is an upper bound on the
    bits of the discrete likelihood (Theis et al. 2016).
    """
    noise = jax.random.uniform(named(key, "dequantize"), image.shape) - 0.5
    density = ode_log_density(predict, schedule, times, to_unit(image + noise), key, divergence)
    return math.log2(127.5) - density / (image.size * math.log(2))

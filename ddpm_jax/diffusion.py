"""The diffusion process and its loss, for one image and scalar times; `vmap` makes the batch.

Every formula takes log-SNRs (see schedules.py). Written alpha, sigma:

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),  alpha_t = sqrt(alphas_bar_t),  sigma_t = sqrt(1 - alphas_bar_t)

The paper's own alpha_t is 1 - beta_t, another thing; it appears nowhere in this code.
Equation numbers are those of Ho, Jain & Abbeel 2020.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.keys import named


def to_unit(image) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1] (Ho et al. 2020, section 3.3)."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1


def to_uint8(x) -> jax.Array:
    """[-1, 1] to uint8 by rounding to the nearest level; values outside are clipped, never wrapped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def alpha_sigma(logsnr) -> tuple[jax.Array, jax.Array]:
    """Signal and noise level: alpha = sqrt(alphas_bar), sigma = sqrt(1 - alphas_bar). Clean data (+inf) gives 1, 0."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


@jax.jit
def q_sample(x_0, eps, logsnr) -> jax.Array:
    """x_t drawn from q(x_t | x_0) by means of the standard normal eps (eq. 4). x_0, eps: any one shape."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x_0 + sigma * eps


def q_posterior(x_0, x_t, logsnr_t, logsnr_s) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of q(x_s | x_t, x_0) for any s < t; s = t-1 gives eqs. 6 and 7.

    `share` = 1 - SNR_t / SNR_s is the part of x_t's noise added since s: beta_t / (1 - alphas_bar_t) when s = t-1.
    At s = 0 it is 1: the mean is x_0 and the variance 0, with no special case.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    share = -jnp.expm1(logsnr_t - logsnr_s)
    mean = alpha_s * share * x_0 + alpha_t * sigma_s**2 / (alpha_s * sigma_t**2) * x_t
    return mean, share * sigma_s**2


def reverse_variance(logsnr_t, logsnr_s, nu) -> jax.Array:
    """Variance of p(x_s | x_t): share sigma_s^(2 - 2 nu) sigma_t^(2 nu), 0 for the step to clean data.

    nu = 0 is the variance of q_posterior (beta-tilde_t when s = t-1), nu = 1 the largest one that makes sense
    (beta_t); between them it runs as Nichol & Dhariwal 2021, eq. 15 does: evenly in logarithms.
    """
    small, large = (jax.nn.sigmoid(-logsnr) for logsnr in (logsnr_s, logsnr_t))
    variance = -jnp.expm1(logsnr_t - logsnr_s) * small ** (1 - nu) * large**nu
    return jnp.where(logsnr_s < jnp.inf, variance, 0.0)


# Where the variance of a reverse step lies: (prediction, whether s is clean data) -> x_0_hat, nu. The paper uses
# fixedlarge for CIFAR-10 and fixedsmall for CelebA-HQ and LSUN (section 3.2); at the last step, where only the decoder
# of the likelihood asks, its code takes the small one for both.
VARIANCES = {
    "fixedsmall": lambda x_0_hat, last: (x_0_hat, 0.0),
    "fixedlarge": lambda x_0_hat, last: (x_0_hat, jnp.where(last, 0.0, 1.0)),
    "learned": lambda prediction, last: prediction,  # of make_denoiser_with_variance
}


class Parameterization(NamedTuple):
    """What the network's output means."""

    target: Callable  # (x_0, eps, logsnr) -> what the output should be
    x_0: Callable  # (output, x_t, logsnr) -> x_0_hat
    eps_error: Callable  # (output - target, logsnr) -> eps_hat - eps, the error that L_simple squares


def _alpha(logsnr):
    return alpha_sigma(logsnr)[0]


def _sigma(logsnr):
    return alpha_sigma(logsnr)[1]


PARAMETERIZATIONS = {
    "eps": Parameterization(  # eq. 14, and eq. 15 solved for x_0
        target=lambda x_0, eps, logsnr: eps,
        x_0=lambda output, x_t, logsnr: (x_t - _sigma(logsnr) * output) / _alpha(logsnr),
        eps_error=lambda error, logsnr: error,
    ),
    "x_0": Parameterization(
        target=lambda x_0, eps, logsnr: x_0,
        x_0=lambda output, x_t, logsnr: output,
        eps_error=lambda error, logsnr: -jnp.exp(logsnr / 2) * error,
    ),
    "v": Parameterization(  # Salimans & Ho 2022, appendix D
        target=lambda x_0, eps, logsnr: _alpha(logsnr) * eps - _sigma(logsnr) * x_0,
        x_0=lambda output, x_t, logsnr: _alpha(logsnr) * x_t - _sigma(logsnr) * output,
        eps_error=lambda error, logsnr: _alpha(logsnr) * error,
    ),
}


# In which space the error is measured: in eps, where one denoiser has the same loss whatever its network puts out, or
# in the output itself, which is plain regression and also teaches times without any signal.
ERRORS = {
    "eps": lambda parameterization: parameterization,
    "output": lambda parameterization: parameterization._replace(eps_error=lambda error, logsnr: error),
}


def simple(schedule, t):
    """L_simple (eq. 14): every time counts the same."""
    return 1.0


def vlb(schedule, t):
    """Eq. 12 with fixedsmall: the bound itself, in nats per dimension; on a continuous schedule the VDM objective."""
    return schedule.rate(t) / 2


def min_snr(schedule, t, gamma=5.0):
    """Hang et al. 2023: min(SNR, gamma) / SNR, which holds back the easy times of little noise."""
    return jnp.minimum(1.0, gamma * jnp.exp(-schedule.logsnr(t)))


def p2(schedule, t, k=1.0, gamma=1.0):
    """Choi et al. 2022, eq. 8 over L_simple: 1 / (k + SNR)^gamma, which favours the times where content is decided."""
    return (k + jnp.exp(schedule.logsnr(t))) ** -gamma


WEIGHTINGS = {"simple": simple, "vlb": vlb, "min_snr": min_snr, "p2": p2}  # (schedule, t) -> weight of the error


def huber(error):
    """Half the square up to 1, growing as |error| beyond."""
    size = jnp.abs(error)
    return jnp.where(size < 1, error**2 / 2, size - 0.5)


DISTANCES = {"l2": jnp.square, "l1": jnp.abs, "huber": huber}  # of each pixel's error


def make_loss(net, schedule, parameterization, weight, distance=jnp.square, extra=lambda *_: 0.0) -> Callable:
    """Algorithm 1, lines 2 to 5, for one image: loss(params, key, x_0, label=None, u=None) -> scalar.

    net: (params, x_t, t, key, label) -> output; parameterization: an entry of PARAMETERIZATIONS; weight: an entry of
    WEIGHTINGS; distance: an entry of DISTANCES; extra(output, x_0, x_t, t) is added. x_0 is (H, W, C) in [-1, 1].
    u in [0, 1) is where t lies among all times, drawn from `key` when not given. Of an output that has more channels
    than the image, only the first C are the prediction.
    """

    def loss(params, key, x_0, label=None, u=None):
        t = schedule.t_from_u(draw_u(key) if u is None else u)
        logsnr = schedule.logsnr(t)
        eps = jax.random.normal(named(key, "eps"), x_0.shape)
        x_t = q_sample(x_0, eps, logsnr)
        output = net(params, x_t, t, named(key, "dropout"), label)
        error = output[..., : x_0.shape[-1]] - parameterization.target(x_0, eps, logsnr)
        value = weight(schedule, t) * jnp.mean(distance(parameterization.eps_error(error, logsnr)))
        return value + extra(output, x_0, x_t, t)

    return loss


def draw_u(key):
    """Where t lies among all times, uniform on [0, 1), for the image that `key` belongs to."""
    return jax.random.uniform(named(key, "t"))


# Limits: x_0_hat -> x_0_hat within the range of images.


def clip(x_0_hat):
    """To [-1, 1], as in the paper's code."""
    return jnp.clip(x_0_hat, -1.0, 1.0)


def dynamic_threshold(x_0_hat, percentile=99.5) -> jax.Array:
    """Saharia et al. 2022, section 2.3: what exceeds the percentile of |x_0_hat| is cut, and that is scaled to 1."""
    largest = jnp.maximum(1.0, jnp.percentile(jnp.abs(x_0_hat), percentile))
    return jnp.clip(x_0_hat, -largest, largest) / largest


LIMITS = {"clip": clip, "dynamic": dynamic_threshold, "none": lambda x_0_hat: x_0_hat}


def make_denoiser_with_variance(net, schedule, parameterization, params, label=None, limit=LIMITS["none"]):
    """predict(x_t, t) -> x_0_hat, nu, for an output of 2C channels, the second half v = 2 nu - 1.

    nu is that of reverse_variance (Nichol & Dhariwal 2021).
    An estimate of x_0 as a third argument goes to the network beside x_t (self-conditioning).
    """

    def predict(x_t, t, *estimate):
        output = net(params, jnp.concatenate([x_t, *estimate], -1), t, label=label)
        output, v = jnp.split(output, [x_t.shape[-1]], -1)
        return limit(parameterization.x_0(output, x_t, schedule.logsnr(t))), (v + 1) / 2

    return predict


def make_denoiser(net, schedule, parameterization, params, label=None, limit=LIMITS["none"]):
    """predict(x_t, t) -> x_0_hat (eq. 15), what every sampler asks for; see make_denoiser_with_variance."""
    predict = make_denoiser_with_variance(net, schedule, parameterization, params, label, limit)
    return lambda x_t, t, *estimate: predict(x_t, t, *estimate)[0]

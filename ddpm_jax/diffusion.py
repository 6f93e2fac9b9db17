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


def alpha_sigma(logsnr):
    """Signal and noise level: alpha = sqrt(alphas_bar), sigma = sqrt(1 - alphas_bar). Clean data (+inf) gives 1, 0."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


@jax.jit
def q_sample(x_0, eps, logsnr):
    """x_t drawn from q(x_t | x_0) by means of the standard normal eps (eq. 4). x_0, eps: any one shape."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x_0 + sigma * eps


def q_posterior(x_0, x_t, logsnr_t, logsnr_s):
    """Mean and variance of q(x_s | x_t, x_0) for any s < t; s = t-1 gives eqs. 6 and 7.

    `share` = 1 - SNR_t / SNR_s is the part of x_t's noise added since s: beta_t / (1 - alphas_bar_t) when s = t-1.
    At s = 0 it is 1: the mean is x_0 and the variance 0, with no special case.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    share = -jnp.expm1(logsnr_t - logsnr_s)
    mean = alpha_s * share * x_0 + alpha_t * sigma_s**2 / (alpha_s * sigma_t**2) * x_t
    return mean, share * sigma_s**2


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


def simple(schedule, t):
    """L_simple (eq. 14): every time counts the same."""
    return 1.0


def min_snr(schedule, t, gamma=5.0):
    """Hang et al. 2023: min(SNR, gamma) / SNR, which holds back the easy times of little noise."""
    return jnp.minimum(1.0, gamma * jnp.exp(-schedule.logsnr(t)))


def p2(schedule, t, k=1.0, gamma=1.0):
    """Choi et al. 2022, eq. 8 over L_simple: 1 / (k + SNR)^gamma, which favours the times where content is decided."""
    return (k + jnp.exp(schedule.logsnr(t))) ** -gamma


WEIGHTINGS = {"simple": simple, "min_snr": min_snr, "p2": p2}  # (schedule, t) -> weight of the squared eps error


def make_loss(net, schedule, parameterization, weight):
    """Algorithm 1, lines 2 to 5, for one image: loss(params, key, x_0, label=None, u=None) -> scalar.

    net: (params, x_t, t, key, label) -> output; parameterization: an entry of PARAMETERIZATIONS;
    weight: an entry of WEIGHTINGS. x_0 is (H, W, C) in [-1, 1]. u in [0, 1) is where t lies among all times,
    drawn from `key` when not given.
    """

    def loss(params, key, x_0, label=None, u=None):
        t = schedule.time_at(draw_u(key) if u is None else u)
        logsnr = schedule.logsnr(t)
        eps = jax.random.normal(named(key, "eps"), x_0.shape)
        output = net(params, q_sample(x_0, eps, logsnr), t, named(key, "dropout"), label)
        error = parameterization.eps_error(output - parameterization.target(x_0, eps, logsnr), logsnr)
        return weight(schedule, t) * jnp.mean(error**2)

    return loss


def draw_u(key):
    """Where t lies among all times, uniform on [0, 1), for the image that `key` belongs to."""
    return jax.random.uniform(named(key, "t"))


def make_denoiser(net, schedule, parameterization, params, label=None):
    """predict(x_t, t) -> x_0_hat (eq. 15), what every sampler asks for."""

    def predict(x_t, t):
        return parameterization.x_0(net(params, x_t, t, label=label), x_t, schedule.logsnr(t))

    return predict


def clipped(predict, low=-1.0, high=1.0):
    """`predict` with x_0_hat clipped to the range of images, as in the paper's code."""
    return lambda x_t, t: jnp.clip(predict(x_t, t), low, high)

"""Distributions of the noise levels that training draws, by name; independent of the schedule that gives their times.

    u uniform on [0, 1)  ->  log-SNR, the quantile of the distribution  ->  v in [0, 1), the quantile of the schedule

Without importance weights, another distribution is another weighting of the loss (Kingma & Gao 2023, arXiv:2303.00848):
log-SNRs that are drawn twice as often count twice.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from ddpm_jax.errors import ConfigError
from ddpm_jax.schedules.spacings import LIMIT


class Distribution(NamedTuple):
    """Of -logsnr, the log of the noise-to-signal ratio. Scale and offset of `cdf` cancel, because it is truncated."""

    cdf: Callable
    quantile: Callable


def normal(mean, spread) -> Distribution:
    """The log-SNR is normal with this mean and standard deviation."""

    def quantile(p):  # finite, also where rounding makes p 0 or 1
        return spread * ndtri(jnp.clip(p, 2**-24, 1 - 2**-24)) - mean

    return Distribution(lambda x: ndtr((x + mean) / spread), quantile)


DISTRIBUTIONS = {
    "log_normal": normal(2.4, 2.4),  # Karras et al. 2022, table 1: ln(sigma / alpha) has mean -1.2 and deviation 1.2
    "logit_normal": normal(0.0, 2.0),  # Esser et al. 2024, eq. 19: the logit of sigma / (alpha + sigma) is N(0, 1)
    "cosine": Distribution(  # uniform t of Hoogeboom et al. 2023: alpha = cos(pi t / 2)
        lambda x: jnp.arctan(jnp.exp(x / 2)), lambda p: 2 * jnp.log(jnp.tan(p))
    ),
    "uniform": Distribution(lambda x: x, lambda p: p),  # in log-SNR, between the ends of the schedule
}


def make_noise_levels(name, schedule, logsnr_normal=(), importance_weights=False) -> Callable:
    """u in [0, 1) -> (v in [0, 1), weight): the noise level of quantile u is at the time schedule.t_from_u(v).

    name: "schedule", where v = u, or in DISTRIBUTIONS, truncated to log-SNRs of the schedule within 20 of 0; a discrete
    schedule takes the nearest step. logsnr_normal: mean and standard deviation instead of those of log_normal or
    logit_normal. The weight is 1, or with `importance_weights` dv/du, the ratio of the schedule's density to the
    distribution's, which restores the expected loss of uniform v. It is large where the distribution is rare.
    Raises ConfigError for a logsnr_normal that is not a mean and a positive deviation.
    """
    if logsnr_normal:
        distribution = normal(*_checked(name, logsnr_normal))
    elif name == "schedule":
        return lambda u: (u, 1.0)
    else:
        distribution = DISTRIBUTIONS[name]
    ends = jnp.clip(-schedule.logsnr(jnp.array([schedule.t_min, schedule.T])), -LIMIT, LIMIT)

    def warp(u):
        low, high = distribution.cdf(ends)
        v = schedule.u_from_logsnr(-distribution.quantile(low + u * (high - low)))
        return jnp.minimum(v, 1 - 2**-24)

    return jax.value_and_grad(warp) if importance_weights else lambda u: (warp(u), 1.0)


def _checked(name, logsnr_normal):
    if name not in ("log_normal", "logit_normal"):
        raise ConfigError(f"diffusion.noise_levels={name} is not normal and has no diffusion.logsnr_normal")
    if len(logsnr_normal) != 2 or not (math.isfinite(logsnr_normal[0]) and 0 < logsnr_normal[1] < math.inf):
        given = ",".join(f"{number:g}" for number in logsnr_normal)
        raise ConfigError(f"diffusion.logsnr_normal={given} must be a mean and a standard deviation above 0")
    return logsnr_normal

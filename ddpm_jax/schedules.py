"""Noise levels: beta_t, then alphas_bar_t (eq. 4), then log-SNR, the one quantity every formula takes.

    logsnr(t) = log(alphas_bar_t / (1 - alphas_bar_t)),  logsnr(0) = +inf for clean data

Times run 0..T as in the paper: t = 0 is clean data, t = 1 the first noising step, t = T the prior.
Tables are made in NumPy float64 on the host and stored as float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import ConfigError


def linear_betas(T=1000, start=1e-4, end=0.02, scale=True):
    """Ho et al. 2020, section 4: T betas from `start` to `end`, NumPy float64 (T,).

    With `scale` both ends are multiplied by 1000 / T, so that any T ends at about the same noise
    (Nichol & Dhariwal 2021); without, a T below 1000 leaves signal in x_T.
    """
    factor = 1000 / T if scale else 1.0
    return np.linspace(start * factor, end * factor, T)


def cosine_betas(T=1000, s=0.008, largest=0.999):
    """Nichol & Dhariwal 2021, eq. 17: alphas_bar_t proportional to cos^2((t/T + s) / (1 + s) * pi/2).

    Each beta is capped at `largest`; alphas_bar is then the product of the capped betas. NumPy float64 (T,).
    """
    level = np.cos((np.arange(T + 1) / T + s) / (1 + s) * math.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], largest)


def quadratic_betas(T=1000, start=1e-4, end=0.02, scale=True):
    """`quad` of Ho's code: linear in the square root of beta. NumPy float64 (T,)."""
    factor = 1000 / T if scale else 1.0
    return np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2 * factor


def constant_betas(T=1000, value=0.02, scale=True):
    """`const` of Ho's code: the same beta at every time. NumPy float64 (T,)."""
    return np.full(T, value * (1000 / T if scale else 1.0))


def warm_up_betas(T=1000, start=1e-4, end=0.02, share=0.1, scale=True):
    """`warmup10` of Ho's code: linear over the first `share` of the times, constant after. NumPy float64 (T,)."""
    factor, rising = 1000 / T if scale else 1.0, int(T * share)
    return np.concatenate([np.linspace(start, end, rising), np.full(T - rising, end)]) * factor


def sigmoid_betas(T=1000, start=-3.0, end=3.0, tau=1.0, largest=0.999):
    """Jabri et al. 2022; Chen 2023: alphas_bar is a sigmoid of t / T, from `start` to `end`, scaled to run from 1 to 0.

    Each beta is capped at `largest`; alphas_bar is then the product of the capped betas. NumPy float64 (T,).
    """
    level = 1 / (1 + np.exp((np.linspace(start, end, T + 1)) / tau))
    level = (level - level[-1]) / (level[0] - level[-1])
    return np.minimum(1 - level[1:] / level[:-1], largest)


SCHEDULES = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
    "constant": constant_betas,
    "warm_up": warm_up_betas,
}


def trailing(T, n):
    """n steps evenly spread from T down to 0; the first is T itself, where sampling starts from pure noise."""
    return np.round(np.linspace(T, 0, n + 1)).astype(np.int32)


def leading(T, n):
    """n steps of the fixed stride T // n upward from t = 1, then 0 (DDIM's published tables)."""
    return np.append(1 + T // n * np.arange(n)[::-1], 0).astype(np.int32)


def linspace(T, n):
    """n times evenly spread from T to 1, both included, then 0."""
    return np.append(np.round(np.linspace(T, 1, n)), 0).astype(np.int32)


def quadratic(T, n):
    """n times whose square roots are evenly spread, dense near clean data (Song et al. 2020, appendix D.2), then 0."""
    return _distinct(np.linspace(math.sqrt(T), 1, n) ** 2, T)


def _distinct(times, T):
    """Falling times rounded to whole ones and moved apart where rounding joins them, then 0."""
    times, n = np.round(times).astype(np.int64), len(times)
    left = np.arange(n, 0, -1)  # how many times must still fit above 0
    times = np.minimum.accumulate(times + np.arange(n)) - np.arange(n)
    return np.append(np.clip(np.maximum(times, left), 1, T), 0).astype(np.int32)


SPACINGS = {"trailing": trailing, "leading": leading, "linspace": linspace, "quadratic": quadratic}


class DiscreteSchedule(NamedTuple):
    """Noise levels at t = 0..T. A pytree: passing another schedule of the same T compiles nothing anew."""

    table: jax.Array  # log-SNR, float32 (T + 1,), table[0] = +inf

    @property
    def T(self):
        return len(self.table) - 1

    def logsnr(self, t):
        """Log-SNR at integer times t in 0..T, any shape; NaN outside, where plain indexing would clamp or wrap."""
        return jnp.asarray(self.table).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def time_at(self, u):
        """The time below which a share u in [0, 1) of 1..T lies: u uniform gives t uniform."""
        return 1 + jnp.floor(u * self.T).astype(jnp.int32)

    def sample_t(self, key):
        """A time uniform on 1..T (Algorithm 1, line 3)."""
        return self.time_at(jax.random.uniform(key))

    def times(self, n, spacing="trailing"):
        """Times of an n-step sampler, falling from at most T to 0: NumPy int32 (n + 1,)."""
        if not 1 <= n <= self.T:
            raise ConfigError(f"steps={n} must be from 1 to T={self.T}")
        if spacing not in SPACINGS:
            raise ConfigError(f"spacing={spacing} is not one of {', '.join(SPACINGS)}")
        return SPACINGS[spacing](self.T, n)


def from_betas(betas):
    """The DiscreteSchedule of betas beta_1..beta_T (eq. 2), each in (0, 1).

    Raises ConfigError for a beta outside; then a larger T or the cosine schedule helps.
    """
    betas = np.asarray(betas, np.float64)
    if not np.all((betas > 0) & (betas < 1)):
        raise ConfigError(
            f"betas must lie between 0 and 1, but run from {betas.min():g} to {betas.max():g}; "
            f"with T={len(betas)} take a larger diffusion.T or diffusion.schedule=cosine"
        )
    log_alphas_bar = np.cumsum(np.log1p(-betas))
    logsnr = log_alphas_bar - np.log(-np.expm1(log_alphas_bar))
    return DiscreteSchedule(np.concatenate([[np.inf], logsnr]).astype(np.float32))

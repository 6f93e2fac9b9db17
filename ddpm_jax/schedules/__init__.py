"""Noise schedules: betas (eq. 2) give alphas_bar (eq. 4) and then the log-SNR, which every formula takes.

    logsnr(t) = log(alphas_bar_t / (1 - alphas_bar_t)),  logsnr(0) = +inf for clean data

Discrete times run from 0 to T as in the paper: t = 0 is clean data, t = 1 the first noising step, t = T the prior.
Continuous times run from 0 to 1. Tables are computed in NumPy float64 on the host and stored as float32.

    python -m ddpm_jax.schedules --schedule=cosine --out=cosine.png

reports how much signal a schedule leaves at T, and plots it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ddpm_jax.errors import ConfigError
from ddpm_jax.schedules.distributions import DISTRIBUTIONS, make_noise_levels  # noqa: F401
from ddpm_jax.schedules.levels import (  # noqa: F401
    CURVES,
    SCHEDULES,
    constant_betas,
    cosine_betas,
    cosine_logsnr,
    jsd_betas,
    linear_betas,
    linear_logsnr,
    quadratic_betas,
    sigmoid_betas,
    vp_logsnr,
    warm_up_betas,
    zero_terminal,
)
from ddpm_jax.schedules.spacings import LIMIT, SPACINGS


def _space(table, n, spacing, maximum):
    if not 1 <= n < len(table):
        raise ConfigError(f"steps={n} must be from 1 to {maximum}")
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing={spacing} is not one of {', '.join(SPACINGS)}")
    return SPACINGS[spacing](table, n)


class DiscreteSchedule(NamedTuple):
    """Noise levels at t = 0..T. A pytree: another schedule with the same T needs no recompilation."""

    table: jax.Array | np.ndarray  # log-SNR, float32 (T + 1,), table[0] = +inf

    @property
    def T(self) -> int:
        return len(self.table) - 1

    @property
    def t_min(self) -> int:
        """The noisy time closest to clean data."""
        return 1

    @property
    def time_scale(self) -> float:
        """The factor that scales times to about 1..1000, as the network's time embedding expects them."""
        return 1.0

    def logsnr(self, t):
        """Log-SNR at integer times t in 0..T, any shape; NaN outside (plain indexing would clamp or wrap)."""
        return jnp.asarray(self.table).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def t_from_u(self, u):
        """The u-quantile of the times 1..T, u in [0, 1): uniform u give uniform t."""
        return 1 + jnp.floor(u * self.T).astype(jnp.int32)

    def sample_t(self, key):
        """A time uniform on 1..T (Algorithm 1, line 3)."""
        return self.t_from_u(jax.random.uniform(key))

    def t_from_logsnr(self, logsnr):
        """The time in 1..T with the closest log-SNR."""
        levels = jnp.asarray(self.table)[1:]
        return 1 + jnp.argmin(jnp.abs(levels - logsnr))

    def u_from_logsnr(self, logsnr):
        """The u in [0, 1] of this log-SNR: t_from_u(u) is the time with the closest one, for u < 1.

        It is linear between the borders of the times, midway between their log-SNRs.
        """
        levels = -jnp.clip(jnp.asarray(self.table)[1:], -LIMIT, LIMIT)
        borders = jnp.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]])
        return jnp.interp(-logsnr, borders, jnp.arange(self.T + 1) / self.T)

    def rate(self, t):
        """T (SNR_{t-1} / SNR_t - 1): twice the weight of the squared eps error in the bound (eq. 12), summed over t.

        At t = 1, where that is infinite, it is T / alphas_bar_1, from a Gaussian decoder with variance beta_1.
        """
        logsnr_t, logsnr_s = self.logsnr(t), self.logsnr(jnp.maximum(t - 1, 1))
        return self.T * jnp.where(t > 1, jnp.expm1(logsnr_s - logsnr_t), 1 + jnp.exp(-logsnr_t))

    def times(self, n, spacing="trailing"):
        """Times of an n-step sampler, decreasing from at most T to 0: NumPy int32 (n + 1,)."""
        return _space(self.table, n, spacing, f"T={self.T}")

    def shifted(self, by):
        """The schedule with `by` added to all log-SNRs."""
        return DiscreteSchedule(self.table + np.float32(by))


T_MIN = 1e-5  # the smallest noisy time of a continuous schedule, as in Song et al. 2021


class ContinuousSchedule(NamedTuple):
    """Noise levels at real t from 0 to 1; 0 is clean data and the smallest noisy time is `T_MIN`."""

    curve: Callable  # t in (0, 1] -> log-SNR, decreasing

    @property
    def T(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return T_MIN

    @property
    def time_scale(self) -> float:
        return 1000.0

    def logsnr(self, t):
        """Log-SNR at times t in [0, 1], any shape, +inf at 0; NaN outside."""
        t = jnp.asarray(t, float)
        level = jnp.where(t > 0, self.curve(jnp.maximum(t, T_MIN)), jnp.inf)
        return jnp.where((t >= 0) & (t <= 1), level, jnp.nan)

    def t_from_u(self, u):
        """The time for a quantile u in [0, 1): u itself, at least T_MIN."""
        return jnp.maximum(u, T_MIN)

    def sample_t(self, key):
        """A time uniform on (0, 1)."""
        return self.t_from_u(jax.random.uniform(key))

    def t_from_logsnr(self, logsnr):
        """The time in (0, 1] with this log-SNR, or the closest end of the interval."""
        table = self._table()[1:]
        return jnp.interp(-logsnr, -table, np.arange(1, len(table) + 1) / len(table))

    def u_from_logsnr(self, logsnr):
        """The u of this log-SNR: t_from_logsnr itself."""
        return self.t_from_logsnr(logsnr)

    def rate(self, t):
        """-d logsnr / dt, the limit of the discrete rate for T -> infinity (Kingma et al. 2021, eq. 17)."""
        t = jnp.asarray(t, float)
        return -jax.jvp(self.curve, (t,), (jnp.ones_like(t),))[1]

    def times(self, n, spacing="trailing"):
        """Times of an n-step sampler, decreasing from at most 1 to 0: NumPy float64 (n + 1,)."""
        maximum = f"{round(1 / T_MIN)}, the resolution of a continuous schedule"
        return _space(self._table(), n, spacing, maximum) * T_MIN

    def shifted(self, by):
        """The schedule with `by` added to all log-SNRs."""
        return ContinuousSchedule(lambda t: self.curve(t) + by)

    def _table(self):
        """Log-SNR at 0, T_MIN, 2 T_MIN ... 1, on the host."""
        with jax.ensure_compile_time_eval():
            return np.asarray(self.logsnr(np.arange(round(1 / T_MIN) + 1) * T_MIN), np.float64)


Schedule = DiscreteSchedule | ContinuousSchedule


def from_betas(betas: ArrayLike) -> DiscreteSchedule:
    """The DiscreteSchedule of beta_1..beta_T (eq. 2), each in (0, 1). beta_T may be 1, which leaves no signal.

    Raises ConfigError for a beta outside that range.
    """
    betas = np.asarray(betas, np.float64)
    if not (len(betas) and np.all((betas > 0) & (betas[-1:] <= 1)) and np.all(betas[:-1] < 1)):
        raise ConfigError(
            f"betas must lie between 0 and 1, but run from {betas.min(initial=1):g} to {betas.max(initial=0):g}; "
            f"with T={len(betas)} use a larger diffusion.T or diffusion.schedule=cosine"
        )
    with np.errstate(divide="ignore"):
        log_alphas_bar = np.cumsum(np.log1p(-betas))
    logsnr = log_alphas_bar - np.log(-np.expm1(log_alphas_bar))
    return DiscreteSchedule(np.concatenate([[np.inf], logsnr]).astype(np.float32))


def make_schedule(name: str, T=1000, betas=(), zero_terminal_snr=False, resolution=0, base_resolution=0) -> Schedule:
    """The schedule `name` of SCHEDULES (with T steps) or CURVES (continuous).

    `betas`, when given, replace those of the schedule. zero_terminal_snr rescales it to leave no signal at T. With a
    base_resolution, log-SNRs shift by 2 log(base_resolution / resolution) (Hoogeboom et al. 2023), because larger
    images need more noise to lose the same information. Raises ConfigError for unknown or incompatible arguments.
    """
    if name not in SCHEDULES | CURVES:
        raise ConfigError(f"diffusion.schedule={name} is not one of {', '.join(SCHEDULES | CURVES)}")
    if len(betas) not in (0, T):
        raise ConfigError(f"diffusion.betas has {len(betas)} numbers, but diffusion.T={T}")
    if name in CURVES:
        if len(betas) or zero_terminal_snr:
            raise ConfigError(f"diffusion.schedule={name} is continuous and has no betas and no zero_terminal_snr")
        schedule: Schedule = ContinuousSchedule(CURVES[name])
    else:
        if zero_terminal_snr and T < 2:
            raise ConfigError("diffusion.zero_terminal_snr needs diffusion.T of at least 2")
        betas = np.asarray(betas, np.float64) if len(betas) else SCHEDULES[name](T)
        schedule = from_betas(betas)  # raises for invalid betas
        if zero_terminal_snr:
            schedule = from_betas(zero_terminal(betas))
    return schedule.shifted(2 * math.log(base_resolution / resolution)) if base_resolution else schedule

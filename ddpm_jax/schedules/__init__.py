"""Noise levels: beta_t, then alphas_bar_t (eq. 4), then log-SNR, the one quantity every formula takes.

    logsnr(t) = log(alphas_bar_t / (1 - alphas_bar_t)),  logsnr(0) = +inf for clean data

Discrete times run 0..T as in the paper: t = 0 is clean data, t = 1 the first noising step, t = T the prior; continuous
ones run from 0 to 1. Tables are made in NumPy float64 on the host and stored as float32.

    python -m ddpm_jax.schedules --schedule=cosine --out=cosine.png

tells how much signal a schedule leaves at T and draws it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ddpm_jax.errors import ConfigError
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
from ddpm_jax.schedules.spacings import SPACINGS


def _spaced(table, n, spacing, most):
    if not 1 <= n < len(table):
        raise ConfigError(f"steps={n} must be from 1 to {most}")
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing={spacing} is not one of {', '.join(SPACINGS)}")
    return SPACINGS[spacing](table, n)


class DiscreteSchedule(NamedTuple):
    """Noise levels at t = 0..T. A pytree: passing another schedule of the same T compiles nothing anew."""

    table: jax.Array | np.ndarray  # log-SNR, float32 (T + 1,), table[0] = +inf

    @property
    def T(self) -> int:
        return len(self.table) - 1

    @property
    def t_min(self) -> int:
        """The time of the least noise."""
        return 1

    @property
    def time_scale(self) -> float:
        """What brings the times to those that the network's time embedding is made for."""
        return 1.0

    def logsnr(self, t):
        """Log-SNR at integer times t in 0..T, any shape; NaN outside, where plain indexing would clamp or wrap."""
        return jnp.asarray(self.table).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def t_from_u(self, u):
        """The time below which a share u in [0, 1) of 1..T lies: u uniform gives t uniform."""
        return 1 + jnp.floor(u * self.T).astype(jnp.int32)

    def sample_t(self, key):
        """A time uniform on 1..T (Algorithm 1, line 3)."""
        return self.t_from_u(jax.random.uniform(key))

    def t_from_logsnr(self, logsnr):
        """The time in 1..T whose log-SNR is nearest."""
        levels = jnp.asarray(self.table)[1:]
        return 1 + jnp.argmin(jnp.abs(levels - logsnr))

    def rate(self, t):
        """T (SNR_{t-1} / SNR_t - 1): what the bound of eq. 12 multiplies half the squared eps error by, summed over t.

        At t = 1 that is infinite; there it is the density of a Gaussian decoder of variance beta_1: T / alphas_bar_1.
        """
        here, before = self.logsnr(t), self.logsnr(jnp.maximum(t - 1, 1))
        return self.T * jnp.where(t > 1, jnp.expm1(before - here), 1 + jnp.exp(-here))

    def times(self, n, spacing="trailing"):
        """Times of an n-step sampler, falling from at most T to 0: NumPy int32 (n + 1,)."""
        return _spaced(self.table, n, spacing, f"T={self.T}")

    def shifted(self, by):
        """The schedule with `by` added to all log-SNRs."""
        return DiscreteSchedule(self.table + np.float32(by))


T_MIN = 1e-5  # the least time at which a continuous schedule is asked for anything, as in Song et al. 2021


class ContinuousSchedule(NamedTuple):
    """Noise levels at real t from 0 to 1; 0 is clean data and the first noisy time is `T_MIN`."""

    curve: Callable  # t in (0, 1] -> log-SNR, falling

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
        """The time below which a share u in [0, 1) of all times lies."""
        return jnp.maximum(u, T_MIN)

    def sample_t(self, key):
        """A time uniform on (0, 1)."""
        return self.t_from_u(jax.random.uniform(key))

    def t_from_logsnr(self, logsnr):
        """The time in (0, 1] with this log-SNR, or the end that is next to it."""
        table = self._table()[1:]
        return jnp.interp(-logsnr, -table, np.arange(1, len(table) + 1) / len(table))

    def rate(self, t):
        """-d logsnr / dt, the limit of the discrete rate for many steps (Kingma et al. 2021, eq. 17)."""
        t = jnp.asarray(t, float)
        return -jax.jvp(self.curve, (t,), (jnp.ones_like(t),))[1]

    def times(self, n, spacing="trailing"):
        """Times of an n-step sampler, falling from at most 1 to 0: NumPy float64 (n + 1,)."""
        most = f"{round(1 / T_MIN)}, the times that are told apart on a continuous schedule"
        return _spaced(self._table(), n, spacing, most) * T_MIN

    def shifted(self, by):
        """The schedule with `by` added to all log-SNRs."""
        return ContinuousSchedule(lambda t: self.curve(t) + by)

    def _table(self):
        """Log-SNR at 0, T_MIN, 2 T_MIN ... 1, on the host."""
        with jax.ensure_compile_time_eval():
            return np.asarray(self.logsnr(np.arange(round(1 / T_MIN) + 1) * T_MIN), np.float64)


Schedule = DiscreteSchedule | ContinuousSchedule


def from_betas(betas: ArrayLike) -> DiscreteSchedule:
    """The DiscreteSchedule of betas beta_1..beta_T (eq. 2), each in (0, 1); beta_T may be 1, which leaves no signal.

    Raises ConfigError for a beta outside; then a larger T or the cosine schedule helps.
    """
    betas = np.asarray(betas, np.float64)
    if not (len(betas) and np.all((betas > 0) & (betas[-1:] <= 1)) and np.all(betas[:-1] < 1)):
        raise ConfigError(
            f"betas must lie between 0 and 1, but run from {betas.min(initial=1):g} to {betas.max(initial=0):g}; "
            f"with T={len(betas)} take a larger diffusion.T or diffusion.schedule=cosine"
        )
    with np.errstate(divide="ignore"):
        log_alphas_bar = np.cumsum(np.log1p(-betas))
    logsnr = log_alphas_bar - np.log(-np.expm1(log_alphas_bar))
    return DiscreteSchedule(np.concatenate([[np.inf], logsnr]).astype(np.float32))


def make_schedule(name: str, T=1000, betas=(), zero_terminal_snr=False, resolution=0, base_resolution=0) -> Schedule:
    """The schedule `name` of SCHEDULES (with T steps) or CURVES (continuous).

    `betas` stand in its place when given. zero_terminal_snr takes the last signal away. With a base_resolution, images
    of side `resolution` get 2 log(base_resolution / resolution) more log-SNR (Hoogeboom et al. 2023): large pictures
    need more noise to lose as much. Raises ConfigError for what does not exist or fit together.
    """
    if name not in SCHEDULES | CURVES:
        raise ConfigError(f"diffusion.schedule={name} is not one of {', '.join(SCHEDULES | CURVES)}")
    if len(betas) not in (0, T):
        raise ConfigError(f"diffusion.betas has {len(betas)} numbers, but diffusion.T={T}")
    if name in CURVES:
        if len(betas) or zero_terminal_snr:
            raise ConfigError(f"diffusion.schedule={name} is continuous and takes no betas and no zero_terminal_snr")
        schedule: Schedule = ContinuousSchedule(CURVES[name])
    else:
        if zero_terminal_snr and T < 2:
            raise ConfigError("diffusion.zero_terminal_snr needs diffusion.T of at least 2")
        betas = np.asarray(betas, np.float64) if len(betas) else SCHEDULES[name](T)
        schedule = from_betas(betas)  # refuses betas that are none
        if zero_terminal_snr:
            schedule = from_betas(zero_terminal(betas))
    return schedule.shifted(2 * math.log(base_resolution / resolution)) if base_resolution else schedule

"""Times of a sampler: (log-SNR table for 0..T, n) -> n + 1 decreasing integer times, from at most T to 0."""

import math

import numpy as np


def trailing(table, n):
    """Evenly spaced from T to 0, so that sampling starts from pure noise at T."""
    return np.round(np.linspace(len(table) - 1, 0, n + 1)).astype(np.int32)


def leading(table, n):
    """n times upwards from t = 1 in steps of T / n, rounded down, then 0. Equals DDIM's tables if n divides T.

    Otherwise the integer stride T // n of other code would start far below T: at t = 501 for 501 of 1000 steps.
    """
    return np.append(1 + (len(table) - 1) * np.arange(n, dtype=np.int64)[::-1] // n, 0).astype(np.int32)


def linspace(table, n):
    """n evenly spaced times from T to 1, both included, then 0."""
    return _distinct(np.linspace(len(table) - 1, 1, n), table)


def quadratic(table, n):
    """n times with evenly spaced square roots, dense near clean data (Song et al. 2020, appendix D.2), then 0."""
    return _distinct(np.linspace(math.sqrt(len(table) - 1), 1, n) ** 2, table)


def logsnr(table, n):
    """n times from T to 1 with evenly spaced log-SNR (Lu et al. 2022), then 0."""
    levels = _finite(table)
    return _at_levels(np.linspace(levels[-1], levels[0], n), table)


def karras(table, n, rho=7.0):
    """n times from T to 1 with evenly spaced (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5), then 0."""
    levels = _finite(table)
    ends = np.exp(-levels[[-1, 0]] / (2 * rho))
    return _at_levels(-2 * rho * np.log(np.linspace(*ends, n)), table)


LIMIT = 20.0  # log-SNRs beyond it are as good as clean data and pure noise; without signal at T the last is infinite


def _finite(table):
    """The log-SNRs at 1..T, clipped to [-LIMIT, LIMIT]."""
    return np.clip(np.asarray(table[1:], np.float64), -LIMIT, LIMIT)


def _at_levels(levels, table):
    """Distinct times closest to increasing log-SNRs, then 0."""
    return _distinct(np.interp(-levels, -_finite(table), np.arange(1, len(table))), table)


def _distinct(times, table):
    """Decreasing times rounded to distinct integers, then 0."""
    times, n, T = np.round(times).astype(np.int64), len(times), len(table) - 1
    minimum = np.arange(n, 0, -1)  # leaves room above 0 for the times that follow
    times = np.minimum.accumulate(times + np.arange(n)) - np.arange(n)
    return np.append(np.clip(np.maximum(times, minimum), 1, T), 0).astype(np.int32)


SPACINGS = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "quadratic": quadratic,
    "logsnr": logsnr,
    "karras": karras,
}

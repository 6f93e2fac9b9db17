"""Which times a sampler visits: (table of log-SNR at 0..T, n) -> n + 1 falling whole times, from at most T to 0."""

import math

import numpy as np


def trailing(table, n):
    """n steps evenly spread from T down to 0; the first is T itself, where sampling starts from pure noise."""
    return np.round(np.linspace(len(table) - 1, 0, n + 1)).astype(np.int32)


def leading(table, n):
    """n times T / n apart upward from t = 1, rounded down, then 0: DDIM's published tables where n divides T.

    Elsewhere a whole stride of T // n, as others have it, would end far below T: with 501 of 1000 steps at t = 501.
    """
    return np.append(1 + (len(table) - 1) * np.arange(n, dtype=np.int64)[::-1] // n, 0).astype(np.int32)


def linspace(table, n):
    """n times evenly spread from T to 1, both included, then 0."""
    return _distinct(np.linspace(len(table) - 1, 1, n), table)


def quadratic(table, n):
    """n times whose square roots are evenly spread, dense near clean data (Song et al. 2020, appendix D.2), then 0."""
    return _distinct(np.linspace(math.sqrt(len(table) - 1), 1, n) ** 2, table)


def logsnr(table, n):
    """n times from T to 1 at evenly spread log-SNR (Lu et al. 2022), then 0."""
    levels = _finite(table)
    return _at_levels(np.linspace(levels[-1], levels[0], n), table)


def karras(table, n, rho=7.0):
    """n times from T to 1 at which (sigma / alpha)^(1 / rho) is evenly spread (Karras et al. 2022, eq. 5), then 0."""
    levels = _finite(table)
    ends = np.exp(-levels[[-1, 0]] / (2 * rho))
    return _at_levels(-2 * rho * np.log(np.linspace(*ends, n)), table)


def _finite(table):
    """The log-SNRs of 1..T, the infinite one of a schedule that ends without signal made finite."""
    return np.clip(np.asarray(table[1:], np.float64), -20, 20)


def _at_levels(levels, table):
    """The times next to falling noise levels, given by their log-SNR."""
    return _distinct(np.interp(-levels, -_finite(table), np.arange(1, len(table))), table)


def _distinct(times, table):
    """Falling times rounded to whole ones and moved apart where rounding joins them, then 0."""
    times, n, T = np.round(times).astype(np.int64), len(times), len(table) - 1
    left = np.arange(n, 0, -1)  # how many times must still fit above 0
    times = np.minimum.accumulate(times + np.arange(n)) - np.arange(n)
    return np.append(np.clip(np.maximum(times, left), 1, T), 0).astype(np.int32)


SPACINGS = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "quadratic": quadratic,
    "logsnr": logsnr,
    "karras": karras,
}

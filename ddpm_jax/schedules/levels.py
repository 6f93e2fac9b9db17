"""Formulas of the noise schedules: betas at t = 1..T in NumPy float64, or log-SNR as a function of t in (0, 1]."""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np


def linear_betas(T: int = 1000, start=1e-4, end=0.02, scale=True) -> np.ndarray:
    """Ho et al. 2020, section 4: T betas from `start` to `end`, NumPy float64 (T,).

    `scale` multiplies both ends by 1000 / T, so that x_T has about the same noise for any T (Nichol & Dhariwal 2021).
    Without it, a T below 1000 leaves signal in x_T.
    """
    factor = 1000 / T if scale else 1.0
    return np.linspace(start * factor, end * factor, T)


def cosine_betas(T: int = 1000, s=0.008, max_beta=0.999) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17: alphas_bar_t proportional to cos^2((t/T + s) / (1 + s) * pi/2).

    Each beta is capped at `max_beta`; alphas_bar is then the product of the capped betas. NumPy float64 (T,).
    """
    level = np.cos((np.arange(T + 1) / T + s) / (1 + s) * math.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], max_beta)


def quadratic_betas(T: int = 1000, start=1e-4, end=0.02, scale=True) -> np.ndarray:
    """`quad` in Ho's code: the square root of beta is linear. NumPy float64 (T,)."""
    factor = 1000 / T if scale else 1.0
    return np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2 * factor


def constant_betas(T: int = 1000, value=0.02, scale=True) -> np.ndarray:
    """`const` in Ho's code: the same beta at every time. NumPy float64 (T,)."""
    return np.full(T, value * (1000 / T if scale else 1.0))


def warm_up_betas(T: int = 1000, start=1e-4, end=0.02, fraction=0.1, scale=True) -> np.ndarray:
    """`warmup10` in Ho's code: linear over the first `fraction` of the times, then constant. NumPy float64 (T,).

    A fraction of 0.5 is `warmup50`.
    """
    factor, rising = 1000 / T if scale else 1.0, int(T * fraction)
    return np.concatenate([np.linspace(start, end, rising), np.full(T - rising, end)]) * factor


def jsd_betas(T: int = 1000) -> np.ndarray:
    """`jsd` in Ho's code: beta_t = 1 / (T - t + 1), so that alphas_bar_t = 1 - t / T ends at 0. NumPy float64 (T,)."""
    return 1 / np.arange(T, 0, -1)


def sigmoid_betas(T: int = 1000, start=-3.0, end=3.0, tau=1.0, max_beta=0.999) -> np.ndarray:
    """Jabri et al. 2022; Chen 2023: alphas_bar is a sigmoid of t / T, from `start` to `end`, scaled to run from 1 to 0.

    Each beta is capped at `max_beta`; alphas_bar is then the product of the capped betas. NumPy float64 (T,).
    """
    level = 1 / (1 + np.exp((np.linspace(start, end, T + 1)) / tau))
    level = (level - level[-1]) / (level[0] - level[-1])
    return np.minimum(1 - level[1:] / level[:-1], max_beta)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {  # T -> betas
    "linear": linear_betas,
    "cosine": cosine_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
    "constant": constant_betas,
    "warm_up": warm_up_betas,
    "warm_up_50": partial(warm_up_betas, fraction=0.5),
    "jsd": jsd_betas,
}


def zero_terminal(betas: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, algorithm 1: rescaled betas with alphas_bar_T = 0 and an unchanged alphas_bar_1.

    sqrt(alphas_bar) is shifted and scaled. x_T is then pure noise, so predicting eps there is useless.
    """
    signal = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return 1 - np.square(signal / np.insert(signal[:-1], 0, 1.0))


def linear_logsnr(t, high=13.3, low=-10.0):
    """Kingma et al. 2021: log-SNR is linear in t. They learn both ends; these values are our own."""
    return high + (low - high) * t


def cosine_logsnr(t, high=15.0, low=-15.0):
    """Hoogeboom et al. 2023: alpha = cos(pi t / 2), with t truncated so that log-SNR runs from high to low."""
    start, end = (math.atan(math.exp(-logsnr / 2)) for logsnr in (high, low))
    return -2 * jnp.log(jnp.tan(start + (end - start) * t))


def vp_logsnr(t, start=0.1, end=20.0):
    """The VP-SDE of Song et al. 2021: -log alphas_bar is the integral of beta(t) = start + (end - start) t."""
    return -jnp.log(jnp.expm1(start * t + (end - start) * t**2 / 2))


CURVES = {"linear_logsnr": linear_logsnr, "cosine_logsnr": cosine_logsnr, "vp": vp_logsnr}  # t in (0, 1] -> log-SNR

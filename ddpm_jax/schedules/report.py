"""How much of an image a schedule leaves at T, in numbers and as a picture."""

import math
import warnings

import numpy as np

from ddpm_jax.errors import ConfigError
from ddpm_jax.schedules import ContinuousSchedule


def report(schedule):
    """What the schedule leaves of an image at T, float64: alphas_bar_T, snr_T, the noise of the first step, and L_T.

    prior_kl is eq. 5's L_T in bits/dim for pixels at +-1, so the most that images in [-1, 1] can have.
    """
    last, first = (float(schedule.logsnr(t)) for t in (schedule.T, schedule.first))
    alphas_bar = 1 / (1 + math.exp(min(-last, 700)))
    return {
        "alphas_bar_T": alphas_bar,
        "snr_T": math.exp(last),
        "sigma_1": 1 / math.sqrt(1 + math.exp(first)),
        "prior_kl": -0.5 * math.log1p(-alphas_bar) / math.log(2),
    }


def warn_of_signal(schedule):
    """Warn when x_T keeps a part of the image that sampling, which starts from pure noise, cannot know of."""
    left = report(schedule)["alphas_bar_T"]
    if left > 1e-3:
        warnings.warn(
            f"x_T keeps {left:.1%} of the image's variance, but sampling starts from pure noise; take a larger "
            "diffusion.T, diffusion.schedule=cosine or diffusion.zero_terminal_snr",
            stacklevel=3,
        )


def plot(schedule, path):
    """A PNG of alpha, sigma and log-SNR over t / T; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('--out needs matplotlib: pip install -e ".[plot]"') from error
    share = np.arange(1, 1001) / 1000
    times = share if isinstance(schedule, ContinuousSchedule) else np.ceil(share * schedule.T).astype(int)
    levels = np.asarray(schedule.logsnr(times))
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(share, np.sqrt(1 / (1 + np.exp(-levels))), label="alpha, the signal")
    left.plot(share, np.sqrt(1 / (1 + np.exp(levels))), label="sigma, the noise")
    left.legend()
    right.plot(share, levels, label="log-SNR")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("t / T")
        axes.grid(alpha=0.3)
    figure.savefig(path)

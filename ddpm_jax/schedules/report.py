"""How much of an image a schedule leaves at T."""

import math
import warnings


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

"""How much of an image a schedule leaves where sampling starts."""

import math
import warnings

MAX_SIGNAL = 1e-3  # of an image's variance that may be left where pure noise stands for it


def alphas_bar(schedule, t):
    """The share of an image's variance that x_t keeps, float64."""
    return 1 / (1 + math.exp(min(-float(schedule.logsnr(t)), 700)))


def report(schedule):
    """What the schedule leaves of an image at T, float64: alphas_bar_T, snr_T, the noise of the first step, and L_T.

    prior_kl is eq. 5's L_T in bits/dim for pixels at +-1, so the most that images in [-1, 1] can have.
    """
    last, first = (float(schedule.logsnr(t)) for t in (schedule.T, schedule.t_min))
    return {
        "alphas_bar_T": alphas_bar(schedule, schedule.T),
        "snr_T": math.exp(last),
        "sigma_1": 1 / math.sqrt(1 + math.exp(first)),
        "prior_kl": -0.5 * math.log1p(-alphas_bar(schedule, schedule.T)) / math.log(2),
    }


def check_terminal_snr(schedule):
    """Warn when x_T keeps a part of the image that sampling, which starts from pure noise, cannot know of."""
    left = alphas_bar(schedule, schedule.T)
    if left > MAX_SIGNAL:
        warnings.warn(
            f"x_T keeps {left:.1%} of the image's variance, but sampling starts from pure noise; take a larger "
            "diffusion.T, diffusion.schedule=cosine or diffusion.zero_terminal_snr",
            stacklevel=3,
        )


def check_start_snr(schedule, t, remedy="take --spacing=trailing, which starts at T, or more steps"):
    """Warn when pure noise is taken for x_t at a time t below T at which an image still shows."""
    left = alphas_bar(schedule, t)
    if t < schedule.T and left > MAX_SIGNAL:
        warnings.warn(
            f"pure noise is taken for x_t at t = {t:g} of {schedule.T:g}, which keeps {left:.1%} of the image's "
            f"variance; {remedy}",
            stacklevel=3,
        )

"""How much of an image a schedule leaves where sampling starts."""

import math
import warnings

MAX_SIGNAL = 1e-3  # largest fraction of an image's variance in an x_t that pure noise may replace


def alphas_bar(schedule, t):
    """The fraction of an image's variance that x_t keeps, float64."""
    return 1 / (1 + math.exp(min(-float(schedule.logsnr(t)), 700)))


def report(schedule):
    """alphas_bar_T, SNR at T, the noise of the first step sigma_1, and an upper bound on L_T, float64.

    prior_kl is L_T (eq. 5) in bits/dim for pixels at +-1, the largest value for images in [-1, 1].
    """
    last, first = (float(schedule.logsnr(t)) for t in (schedule.T, schedule.t_min))
    return {
        "alphas_bar_T": alphas_bar(schedule, schedule.T),
        "snr_T": math.exp(last),
        "sigma_1": 1 / math.sqrt(1 + math.exp(first)),
        "prior_kl": -0.5 * math.log1p(-alphas_bar(schedule, schedule.T)) / math.log(2),
    }


def check_terminal_snr(schedule):
    """Warn when x_T keeps a part of the image: sampling starts from pure noise, which lacks it."""
    signal = alphas_bar(schedule, schedule.T)
    if signal > MAX_SIGNAL:
        warnings.warn(
            f"x_T keeps {signal:.1%} of the image's variance, but sampling starts from pure noise; use a larger "
            "diffusion.T, diffusion.schedule=cosine or diffusion.zero_terminal_snr",
            stacklevel=3,
        )


def check_start_snr(schedule, t, remedy="use --spacing=trailing, which starts at T, or more steps"):
    """Warn when sampling starts from pure noise at a time t < T at which images are still visible."""
    signal = alphas_bar(schedule, t)
    if t < schedule.T and signal > MAX_SIGNAL:
        warnings.warn(
            f"pure noise is used for x_t at t = {t:g} of {schedule.T:g}, which keeps {signal:.1%} of the image's "
            f"variance; {remedy}",
            stacklevel=3,
        )

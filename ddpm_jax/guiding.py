"""Guidance of the samples of an Experiment: what is possible with it, and the worse denoiser to guide away from.

The methods themselves are in conditioning.py. `experiment` and `guide` are Experiments.
"""

import inspect
import warnings

import jax
import numpy as np

from ddpm_jax import conditioning, diffusion
from ddpm_jax.errors import ConfigError


def check(experiment, steps, scale, interval, method, options, guide):
    """Raise ConfigError for guidance that is impossible with this experiment, or that would have no effect.

    Warns of many steps with CFG++, as each one guides by the same amount, however short it is.
    """
    T, table = experiment.schedule.T, conditioning.GUIDANCES
    if method not in table:
        raise ConfigError(f"guidance_method={method} is not one of {', '.join(table)}")
    low, high = table[method].scales
    if not low <= scale <= high:
        raise ConfigError(f"guidance={scale:g} must be from {low:g} to {high:g} with guidance_method={method}")
    known = list(inspect.signature(table[method].combine).parameters)[3:]
    for option in options:
        if option not in known:
            raise ConfigError(f"guidance_method={method} has no option {option}; it has {', '.join(known) or 'none'}")
    none = scale == 1 and not table[method].renoise
    if interval and (none or not 0 <= interval[0] <= interval[1] <= T):
        raise ConfigError(f"interval={interval[0]:g},{interval[1]:g} needs guidance, and 0 <= LOW <= HIGH <= {T:g}")
    if none and (guide or method != "cfg"):
        what = "a guide" if guide else f"guidance_method={method}"
        raise ConfigError(f"{what} has no effect with guidance=1, which is no guidance; set it to 2, for example")
    if not (none or guide or experiment.config.diffusion.label_dropout):
        raise ConfigError(f"guidance={scale:g} needs a model trained with diffusion.label_dropout, or a guide")
    if table[method].renoise and scale and steps > 100:
        warnings.warn(
            f"guidance_method={method} guides more strongly the more steps there are; {steps} are far more than the 50 "
            "of its paper, so use fewer, or a smaller guidance",
            stacklevel=3,
        )


def make_base(experiment, guide, times):
    """base(params, label) -> the denoiser to guide away from: the guide's, or the experiment's own without a label."""
    schedule, parameterization = experiment.schedule, experiment.parameterization
    if guide is None:
        null = experiment.config.model.num_classes
        return lambda params, label: diffusion.make_denoiser(experiment.net, schedule, parameterization, params, null)
    _check_guide(experiment, guide)
    same_schedule = _check_noise_levels(schedule, guide.schedule, times)
    shared = guide.config.diffusion.self_conditioning and experiment.config.diffusion.self_conditioning
    net = guide.net if shared else guide.image_net

    def base(params, label):
        label = label if guide.config.model.num_classes else None
        predict = diffusion.make_denoiser(net, guide.schedule, guide.parameterization, params, label)
        predict = predict if same_schedule else conditioning.at_equal_noise(predict, schedule, guide.schedule)
        return predict if shared else lambda x_t, t, *estimate: predict(x_t, t)

    return base


def _check_guide(experiment, guide):
    """Raise ConfigError for a guide of another shape, or of other classes. One without classes suits all."""
    pairs = [("shape", experiment.shape, guide.shape)]
    if guide.config.model.num_classes:
        pairs.append(("number of classes", experiment.config.model.num_classes, guide.config.model.num_classes))
        names = zip(experiment.classes or (), guide.classes or (), strict=False)  # some runs have no names
        pairs += [(f"name of class {i}", own, other) for i, (own, other) in enumerate(names)]
    for what, own, other in pairs:
        if own != other:
            raise ConfigError(f"the {what} of the guide is {other}, of the model {own}; take another guide")


def _check_noise_levels(schedule, other, times):
    """Whether both schedules are the same at these times. Raises ConfigError for a level that `other` does not have.

    (alpha, sigma) may be 0.02 off, which is more than discrete schedules with 100 times are off between their times.
    """
    levels = schedule.logsnr(times[:-1])
    if type(schedule) is type(other) and schedule.T == other.T and np.array_equal(levels, other.logsnr(times[:-1])):
        return True
    nearest = other.logsnr(jax.vmap(other.t_from_logsnr)(levels))
    pairs = zip(diffusion.alpha_sigma(levels), diffusion.alpha_sigma(nearest), strict=True)
    errors = np.hypot(*(np.asarray(a - b) for a, b in pairs))
    if errors.max() > 0.02:
        i = errors.argmax()
        raise ConfigError(
            f"the guide's schedule has no time with the noise of t={times[i]:g} of the model (log-SNR {levels[i]:.2f}, "
            f"the nearest {nearest[i]:.2f}); take a guide with a schedule closer to the model's"
        )
    return False

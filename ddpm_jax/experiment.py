"""From a Config to the parts of a run. Only this file and the scripts see a Config; all others take plain values."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax

from ddpm_jax import diffusion, keys, samplers, schedules, training, unet
from ddpm_jax.config import Config
from ddpm_jax.errors import ConfigError


class Experiment(NamedTuple):
    config: Config
    shape: tuple[int, int, int]  # of one image
    schedule: schedules.DiscreteSchedule
    parameterization: diffusion.Parameterization
    weight: Callable  # an entry of diffusion.WEIGHTINGS
    init: Callable  # key -> params
    net: Callable


def make(config, shape):
    """The network and the process that `config` describes, for images of `shape` (H, W, C).

    Raises ConfigError for any name in it that does not exist, and warns when x_T keeps a part of the image.
    """
    names, shape = config.diffusion, tuple(shape)
    schedule = schedules.from_betas(_choose(schedules.SCHEDULES, names.schedule, "diffusion.schedule")(names.T))
    left = float(diffusion.alpha_sigma(schedule.logsnr(schedule.T))[0] ** 2)
    if left > 1e-3:
        warnings.warn(
            f"x_T keeps {left:.1%} of the image's variance, but sampling starts from pure noise; take a larger "
            "diffusion.T or diffusion.schedule=cosine",
            stacklevel=2,
        )
    parameterization = _choose(diffusion.PARAMETERIZATIONS, names.parameterization, "diffusion.parameterization")
    weight = _choose(diffusion.WEIGHTINGS, names.weighting, "diffusion.weighting")
    init, net = unet.make_unet(shape, **vars(config.model))
    _choose(samplers.VARIANCES, names.variance, "diffusion.variance")
    _choose(samplers.SAMPLERS, config.train.sampler, "train.sampler")
    return Experiment(config, shape, schedule, parameterization, weight, init, net)


def _choose(table, name, field):
    if name not in table:
        raise ConfigError(f"{field}={name} is not one of {', '.join(table)}")
    return table[name]


def parameter_count(experiment):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(experiment.init, jax.random.key(0))))


def labels_in_turn(experiment, indices):
    """A class for each index, all classes in turn; None for a model without."""
    classes = experiment.config.model.num_classes
    return indices % classes if classes else None


def learning_rate(experiment):
    """The learning rate as a function of the number of updates made before."""
    return training.warm_up(experiment.config.train.learning_rate, experiment.config.train.warmup_steps)


def make_training(experiment):
    """(init_state, train_step): init_state() -> TrainState; train_step is still to be mapped over devices."""
    config = experiment.config
    optimizer = training.make_optimizer(learning_rate(experiment), config.train.grad_clip)
    loss = diffusion.make_loss(experiment.net, experiment.schedule, experiment.parameterization, experiment.weight)
    step = training.make_train_step(
        loss, optimizer, config.train.ema_decay, flip=config.data.flip, accumulate=config.train.accumulate
    )
    root = keys.root(config.train.seed, "init")
    return jax.jit(lambda: training.init_state(experiment.init(root), optimizer)), step


def make_generate(experiment, sampler, steps, spacing="trailing", frames=1, **options):
    """`samplers.make_generate` with this experiment's network and variance; `options` are the sampler's own."""
    defaults = {"variance": experiment.config.diffusion.variance}
    return samplers.make_generate(
        experiment.net,
        experiment.schedule,
        experiment.parameterization,
        samplers.make_sampler(sampler, experiment.schedule, defaults, **options),
        experiment.schedule.times(steps, spacing),
        experiment.shape,
        frames,
    )

"""From a Config to the parts of a run. Only this file and the scripts see a Config; all others take plain values."""

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
    init: Callable  # key -> params
    net: Callable


def make(config, shape):
    """The network and the process that `config` describes, for images of `shape` (H, W, C)."""
    betas = _choose(schedules.SCHEDULES, config.diffusion.schedule, "diffusion.schedule")(config.diffusion.T)
    parameterization = _choose(
        diffusion.PARAMETERIZATIONS, config.diffusion.parameterization, "diffusion.parameterization"
    )
    init, net = unet.make_unet(tuple(shape), **vars(config.model))
    return Experiment(config, tuple(shape), schedules.from_betas(betas), parameterization, init, net)


def _choose(table, name, field):
    if name not in table:
        raise ConfigError(f"{field}={name} is not one of {', '.join(table)}")
    return table[name]


def parameter_count(experiment):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(experiment.init, jax.random.key(0))))


def learning_rate(experiment):
    """The learning rate as a function of the number of updates made before."""
    return training.warm_up(experiment.config.train.learning_rate, experiment.config.train.warmup_steps)


def make_training(experiment):
    """(init_state, train_step): init_state() -> TrainState; train_step is still to be mapped over devices."""
    config = experiment.config
    optimizer = training.make_optimizer(learning_rate(experiment), config.train.grad_clip)
    weight = _choose(diffusion.WEIGHTINGS, config.diffusion.weighting, "diffusion.weighting")
    loss = diffusion.make_loss(experiment.net, experiment.schedule, experiment.parameterization, weight)
    step = training.make_train_step(
        loss, optimizer, config.train.ema_decay, flip=config.data.flip, accumulate=config.train.accumulate
    )
    root = keys.root(config.train.seed, "init")
    return jax.jit(lambda: training.init_state(experiment.init(root), optimizer)), step


def make_generate(experiment, sampler, steps, spacing="trailing", frames=1, **options):
    """`samplers.make_generate` with this experiment's network and variance; `options` are the sampler's own."""
    _choose(samplers.VARIANCES, experiment.config.diffusion.variance, "diffusion.variance")
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

"""From a Config to the parts of an experiment: schedule, network, loss, training step, sampling."""

import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import (
    augmentation,
    averages,
    conditioning,
    diffusion,
    editing,
    guiding,
    keys,
    likelihood,
    networks,
    samplers,
    schedules,
    training,
    vectors,
)
from ddpm_jax.config import Config, decay_span, from_json
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.options import replace
from ddpm_jax.run import checkpoint, snapshots
from ddpm_jax.run.files import expand
from ddpm_jax.schedules.report import check_terminal_snr


class Experiment(NamedTuple):
    config: Config
    shape: tuple[int, ...]  # of one image, (H, W, C)
    schedule: schedules.Schedule
    parameterization: diffusion.Parameterization
    init: Callable  # key -> params
    net: Callable  # the network itself
    image_net: Callable  # the network of x_t (H, W, C), with self-conditioning on its own estimate if configured
    loss: Callable  # of one image, from diffusion.make_loss
    learning_rate: Callable  # number of previous updates -> learning rate
    init_state: Callable  # (params=None) -> TrainState, by default with random parameters; on CPU of vectors.Vectors
    train_step: Callable  # (state, batch, root, scale, span) -> state, metrics; see training.make_train_step
    classes: tuple[str, ...] | None = None  # names of the labels 0, 1, ...; None if unknown
    data: str | None = None  # fingerprint of the training data; None if unknown


def make(config: Config, shape: Sequence[int], network: tuple[Callable, Callable] | None = None) -> Experiment:
    """The Experiment that `config` describes, for images of `shape` (H, W, C).

    network: (init, net) of one image, used instead of that of config.model. Raises ConfigError for unknown or
    incompatible names in the config, and warns when x_T keeps a part of the image.
    """
    choices, shape = config.diffusion, tuple(shape)
    _check_names(config)
    schedule = schedules.make_schedule(
        choices.schedule, choices.T, choices.betas, choices.zero_terminal_snr, max(shape[:2]), choices.base_resolution
    )
    _check_signal(choices, schedule)
    init, net = network or networks.make_network(
        config.model,
        shape,
        learned_variance=choices.variance == "learned",
        self_conditioning=choices.self_conditioning,
        time_scale=schedule.time_scale,
        augmented=config.data.augment > 0,
    )
    parameterization = diffusion.make_parameterization(choices.parameterization, schedule, choices.sigma_data)
    image_net = net = conditioning.scaled_input(net, schedule, parameterization, shape[-1])
    if choices.self_conditioning:
        image_net = conditioning.self_conditioning(net, schedule, parameterization)
    loss = _make_loss(config, schedule, parameterization, image_net)
    training_parts = _make_training(config.train, config.data.flip, choices.time_sampling, init, loss)
    return Experiment(config, shape, schedule, parameterization, init, net, image_net, loss, *training_parts)


def _make_loss(config, schedule, parameterization, net):
    choices, parameterization = config.diffusion, diffusion.ERRORS[config.diffusion.error](parameterization)
    if choices.label_dropout:
        net = conditioning.label_dropout(net, choices.label_dropout, config.model.num_classes)
    noise_levels = schedules.make_noise_levels(
        choices.noise_levels, schedule, choices.logsnr_normal, choices.importance_weights
    )
    options = {"distance": diffusion.DISTANCES[choices.distance], "noise_levels": noise_levels}
    if choices.variance == "learned":
        options["extra"] = likelihood.make_variance_loss(schedule, parameterization)
    weight = diffusion.WEIGHTINGS[choices.weighting]
    if choices.weighting == "sigmoid":
        weight = partial(weight, bias=choices.sigmoid_bias)
    loss = diffusion.make_loss(net, schedule, parameterization, weight, **options)
    if choices.noises > 1:
        loss = diffusion.choose_noise(loss, choices.noises, choices.noise_choice)
    return augmentation.augmented(loss, config.data.augment) if config.data.augment else loss


def _make_training(config, flip, time_sampling, init, loss):
    """(learning_rate, init_state, train_step) of the config's section train."""
    weight_decay = {"weight_decay": config.weight_decay} if config.weight_decay else {}
    optimizer = training.make_optimizer(
        training.warm_up(config.learning_rate, config.warmup_steps),
        config.grad_clip,
        config.optimizer,
        b1=config.b1,
        b2=config.b2,
        **weight_decay,
    )
    options = {"time_sampling": training.TIME_SAMPLINGS[time_sampling], "lengths": config.averages}

    def make_state(key, params):  # a key made in here would be a constant, and XLA would draw while compiling
        params = init(key) if params is None else params
        params = vectors.pack(params) if jax.default_backend() == "cpu" else params
        return training.init_state(params, optimizer, **options)

    compiled = jit_unoptimized(make_state)

    def init_state(params=None):
        return compiled(keys.root(config.seed, "init"), params)

    train_step = training.make_train_step(
        loss,
        optimizer,
        config.ema_decay,
        flip=flip,
        accumulate=config.accumulate,
        decay=training.DECAYS[config.decay],
        span=decay_span(config),
        **options,
    )
    return _make_learning_rate(config), init_state, train_step


def _make_learning_rate(config):
    warm_up, decay = training.warm_up(config.learning_rate, config.warmup_steps), training.DECAYS[config.decay]
    return lambda n: warm_up(n) * training.decay_factor(decay, n, decay_span(config))


def with_steps(parts: Experiment, steps: int) -> Experiment:
    """The Experiment for another number of steps, with the same functions: nothing is compiled again.

    Its train_step needs the `span` of config.decay_span then, which program.Program passes.
    """
    config = replace(parts.config, {"train.steps": steps})
    return parts._replace(config=config, learning_rate=_make_learning_rate(config.train))


def jit_unoptimized(function):
    """jax.jit without optimisation on CPU, for what runs once: drawing parameters took 0.3 of the time (measured)."""

    def call(*args):
        outer = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))  # others take no options
        options = {"xla_backend_optimization_level": 0} if outer and jax.default_backend() == "cpu" else None
        return jax.jit(function, compiler_options=options)(*args)

    return call


def _check_names(config):
    choices = config.diffusion
    for table, name, field in (
        (networks.NETWORKS, config.model.network, "model.network"),
        ([*diffusion.PARAMETERIZATIONS, "mean"], choices.parameterization, "diffusion.parameterization"),
        (diffusion.WEIGHTINGS, choices.weighting, "diffusion.weighting"),
        (diffusion.VARIANCES, choices.variance, "diffusion.variance"),
        (diffusion.ERRORS, choices.error, "diffusion.error"),
        (diffusion.DISTANCES, choices.distance, "diffusion.distance"),
        (training.TIME_SAMPLINGS, choices.time_sampling, "diffusion.time_sampling"),
        (diffusion.NOISE_CHOICES, choices.noise_choice, "diffusion.noise_choice"),
        (["schedule", *schedules.DISTRIBUTIONS], choices.noise_levels, "diffusion.noise_levels"),
        (training.OPTIMIZERS, config.train.optimizer, "train.optimizer"),
        (training.DECAYS, config.train.decay, "train.decay"),
        (samplers.SAMPLERS, config.train.sampler, "train.sampler"),
        (samplers.SAMPLERS, config.train.evaluate_sampler, "train.evaluate_sampler"),
    ):
        if name not in table:
            raise ConfigError(f"{field}={name} is not one of {', '.join(table)}")
    if choices.error != "eps" and choices.weighting != "simple":
        raise ConfigError(
            f"diffusion.weighting={choices.weighting} weights the error in eps; "
            f"use simple with diffusion.error={choices.error}"
        )
    for name, wanted in (("variance", "learned"), ("parameterization", "mean")):
        if getattr(choices, name) == wanted and choices.schedule in schedules.CURVES:
            raise ConfigError(f"diffusion.{name}={wanted} needs a discrete schedule, {choices.schedule} is continuous")
    if (
        choices.weighting in ("vlb", "sigmoid")
        and choices.noise_levels != "schedule"
        and not choices.importance_weights
    ):
        raise ConfigError(
            f"diffusion.weighting={choices.weighting} is that of uniform t; "
            f"with diffusion.noise_levels={choices.noise_levels} add diffusion.importance_weights=true"
        )
    if choices.label_dropout and not config.model.num_classes:
        raise ConfigError(f"diffusion.label_dropout={choices.label_dropout}, but model.num_classes=0")
    if config.train.weight_decay and config.train.optimizer == "adam":
        raise ConfigError(f"train.weight_decay={config.train.weight_decay} needs train.optimizer=adamw or muon")
    if config.train.optimizer == "adamw" and not config.train.weight_decay:
        raise ConfigError("train.optimizer=adamw needs train.weight_decay above 0, such as 0.01; without it it is adam")
    for length in config.train.averages:
        averages.gamma(length)


def _check_signal(choices, schedule):
    """Where x_T is pure noise, predicting eps reveals nothing about the image, and an error in eps has weight 0."""
    if schedule.logsnr(schedule.T) > -float("inf"):
        check_terminal_snr(schedule)
    elif choices.parameterization == "eps" or choices.error == "eps":
        raise ConfigError(
            f"the schedule leaves no signal at T, where diffusion.parameterization={choices.parameterization} with "
            f"diffusion.error={choices.error} learns nothing; use v or x_0 with diffusion.error=output"
        )


def find_run(path: str | Path, step: int = 0, option: str = "--workdir") -> tuple[Path, int | None]:
    """(folder of the run, step or None for the newest). `path` is that folder, its checkpoints, or one of them.

    option: the one that gave `path`, for the message of an error.
    Raises CheckpointError when it is none of these, and ConfigError when it is a checkpoint of another step.
    """
    folder, checkpoints = expand(path), "checkpoints"
    if (folder / checkpoints).is_dir():
        return folder, step or None
    folder = Path(os.path.abspath(folder))
    if folder.name == checkpoints and folder.is_dir():
        return folder.parent, step or None
    if folder.parent.name == checkpoints and folder.parent.is_dir() and folder.name.isdigit():
        if step not in (0, int(folder.name)):
            raise ConfigError(f"{option}={path} and --step={step} are different steps; leave one of them out")
        return folder.parent.parent, int(folder.name)
    raise CheckpointError(f"there is no run in {path} (no folder {checkpoints}); train first, or change {option}")


def restore(
    workdir: Path, weights: str, step: int | None = None, member: int = 0, option: str = "--weights"
) -> tuple[Experiment, Any, int]:
    """(Experiment, parameters, step) from the checkpoint of `step`, by default the newest intact one.

    weights: "ema", "raw", or the sigma_rel of a post-hoc EMA, for which `step` counts updates and is by default that of
    the last snapshot; member: which member of an ensemble; option: the one that gave `weights`, for error messages.
    """
    folder = workdir / "checkpoints"
    parts: Any = None  # the Experiment of the checkpoint
    items = {"ema": ["ema_params"], "raw": ["params"]}.get(weights, [])
    newest = folder / str(step or max(checkpoint.steps(folder), default=0))
    if newest.is_dir() and not all((newest / item).is_dir() for item in items):
        other = "raw" if weights == "ema" else "ema"
        raise CheckpointError(f"{newest} has no {items[0]}; try {option}={other}, or another --step")

    def make_templates(meta):
        nonlocal parts
        config, classes = from_json(json.dumps(meta["config"]), f"{folder}, meta"), meta.get("classes")
        members = config.train.ensemble
        if member >= members:
            raise ConfigError(f"--member={member}, but {workdir} has {members} (0 to {members - 1})")
        parts = make(member_config(config, member), meta["shape"])
        parts = parts._replace(data=meta.get("data"), classes=None if classes is None else tuple(classes))
        axis = (members,) if members > 1 else ()
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(axis + x.shape, x.dtype), params_shape(parts))
        return dict.fromkeys(items, template)

    meta, trees = checkpoint.load(folder, items, make_templates, step if items else None)
    if items:
        params = trees[items[0]]
        if meta["config"]["train"].get("ensemble", 1) > 1:
            params = jax.tree.map(lambda x: x[member], params)
        return parts, params, meta["step"]
    step = step or snapshots.stored(workdir / "averages")[-1][0]
    return parts, posthoc_ema(workdir / "averages", params_shape(parts), float(weights), step), step


def posthoc_ema(folder: Path, template: Any, sigma_rel: float, step: int | None = None) -> Any:
    """The average of length `sigma_rel` at `step` (default: that of the last snapshot), a tree like `template`.

    Warns when the stored snapshots approximate its weights with an error above 10 %. Raises ConfigError for a length or
    step out of range, CheckpointError when there is no intact snapshot or one does not fit the template.
    """
    found = snapshots.stored(folder)
    step = found[-1][0] if step is None else step
    coefficients, error = averages.posthoc_coefficients(found, step, sigma_rel)
    if error > 0.1:
        warnings.warn(
            f"the average of sigma_rel={sigma_rel} at step {step} is only approximate: {len(found)} snapshots give its "
            f"weights with an error of {error:.0%}; use a closer length or step, or a lower train.average_every",
            stacklevel=2,
        )
    return snapshots.combine(folder, dict(zip(found, coefficients, strict=True)), template)


def member_config(config: Config, i: int) -> Config:
    """The Config that trains member `i` of an ensemble alone; `config` itself when there is no ensemble."""
    train = config.train
    if train.ensemble == 1:
        return config
    own = {"learning_rate": train.learning_rates[i]} if train.learning_rates else {"seed": train.seed + i}
    changes = {f"train.{name}": value for name, value in {"ensemble": 1, "learning_rates": (), **own}.items()}
    return replace(config, changes)


def params_shape(experiment: Experiment) -> Any:
    """The tree of the parameters as jax.ShapeDtypeStruct, without computing them."""
    return jax.eval_shape(experiment.init, jax.random.key(0))


def parameter_count(experiment: Experiment) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params_shape(experiment)))


def describe_network(experiment: Experiment) -> str:
    """Like "U-Net of 35,746,307 parameters"."""
    name = experiment.config.model.network
    return f"{networks.TITLES.get(name, name)} of {parameter_count(experiment):,} parameters"


def find_label(experiment: Experiment, wanted: str) -> int:
    """The label for a number or for the name of a class, which may be written name:NAME.

    Raises ConfigError for an unknown label, and for a number that is also the name of another class.
    """
    count, names = experiment.config.model.num_classes, list(experiment.classes or ())
    if not count:
        raise ConfigError(f"label={wanted}, but the model has no labels")
    name = wanted.removeprefix("name:")
    by_name = names.index(name) if name in names else None
    if name != wanted or not re.fullmatch("[+-]?[0-9]{1,9}", wanted):
        if by_name is None:
            hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, names, 1))
            listed = ", ".join(names[:10]) + ", ..." * (len(names) > 10)
            known = f"has the classes {listed}" if names else "has no class names"
            raise ConfigError(f"label={wanted}, but the run {known}; its labels are 0 to {count - 1}{hint}")
        return by_name
    number = int(wanted)
    if not 0 <= number < count:
        raise ConfigError(f"label={wanted}, but the model has labels 0 to {count - 1}")
    if by_name not in (None, number):
        other = names[number] if number < len(names) else ""
        raise ConfigError(
            f"label={wanted} is the number of class {other!r} and the name of class number {by_name}; "
            f"write label=name:{other} or label=name:{wanted}"
        )
    return number


def cyclic_labels(experiment: Experiment, indices: np.ndarray) -> np.ndarray | None:
    """Labels that cycle through all classes, one for each index; None for a model without classes."""
    classes = experiment.config.model.num_classes
    return indices % classes if classes else None


def make_generate(
    experiment,
    sampler,
    steps,
    spacing="trailing",
    frames=1,
    preview=False,
    limit="clip",
    guidance=1.0,
    interval=(),
    edit=None,
    guidance_method="cfg",
    guidance_options=(),
    guide=None,
    **options,
):
    """`samplers.make_generate` with this experiment's network and variance; `options` are those of the sampler.

    preview: the frames show x_0_hat instead of x_t; limit: a name in diffusion.LIMITS; guidance, interval: the scale
    and the times of guidance; guidance_method: a name in conditioning.GUIDANCES, with a dict of options; guide: the
    Experiment of a worse network to guide away from (autoguidance), by default the same network without the label. With
    a guide, params are the pair (params, params of the guide). edit: see editing.py, by default sampling from pure
    noise.
    """
    choices, schedule = experiment.config.diffusion, experiment.schedule
    if limit not in diffusion.LIMITS:
        raise ConfigError(f"limit={limit} is not one of {', '.join(diffusion.LIMITS)}")
    if options.get("variance") == "learned" != choices.variance:
        raise ConfigError("variance=learned, but the model was trained without a learned variance")
    guiding.check(experiment, steps, guidance, interval, guidance_method, guidance_options, guide)
    sampler = samplers.make_sampler(sampler, schedule, {"variance": choices.variance}, **options)
    times = schedule.times(steps, spacing)
    make_denoiser = diffusion.make_denoiser_with_variance if sampler.needs_variance else diffusion.make_denoiser
    parts = schedule, experiment.parameterization
    if guide is None and guidance_method == "cfg":
        net = _guided_net(experiment, guidance, interval)

        def denoiser(params, label):
            return make_denoiser(net, *parts, params, label, diffusion.LIMITS[limit])

    else:
        method, base = conditioning.GUIDANCES[guidance_method], guiding.make_base(experiment, guide, times)
        arguments = method, guidance, diffusion.LIMITS[limit], *interval
        sampler = samplers.renoised(sampler, schedule) if method.renoise else sampler

        def denoiser(params, label):
            own, others = (params, params) if guide is None else params
            predict = make_denoiser(experiment.net, *parts, own, label)
            return conditioning.guided_denoiser(predict, base(others, label), *arguments, **dict(guidance_options))

    if choices.self_conditioning:
        sampler = samplers.self_conditioned(sampler)
    elif preview:
        sampler = samplers.with_preview(sampler)
    sampler, times, start = (edit or editing.from_noise(schedule, experiment.shape))(sampler, times)
    view = (lambda x, memory: memory[1]) if preview else (lambda x, memory: x)
    return samplers.make_generate(denoiser, sampler, times, start, frames, view)


def _guided_net(experiment, scale, interval):
    """The experiment's network with classifier-free guidance of that scale at the times of the interval."""
    if scale == 1:
        return experiment.net
    null, channels = experiment.config.model.num_classes, experiment.shape[-1]
    return conditioning.guided(experiment.net, scale, null, *interval, channels=channels)

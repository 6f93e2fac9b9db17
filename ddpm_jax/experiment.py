"""From a Config to the parts of a run. Only this file, runs.py, reports and the scripts see a Config."""

import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import averages, conditioning, diffusion, editing, keys, likelihood, samplers, schedules, training
from ddpm_jax.config import Config, from_json
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.networks import unet
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
    net: Callable  # the bare network
    image_net: Callable  # the network of (H, W, C): one that conditions on itself asks itself first
    loss: Callable  # of one image, as diffusion.make_loss makes it
    learning_rate: Callable  # the number of updates made before -> the learning rate
    init_state: Callable  # (params=None) -> TrainState, of random parameters unless they are given
    train_step: Callable  # (state, batch, root) -> state, metrics; still to be mapped over devices
    classes: tuple[str, ...] | None = None  # the names of the labels from 0 on; None where none are kept
    data: str | None = None  # the fingerprint of the data that it was trained on, where that is known


def make(config: Config, shape: Sequence[int], network: tuple[Callable, Callable] | None = None) -> Experiment:
    """The process, the network, its loss and its training that `config` describes, for images of `shape` (H, W, C).

    network: (init, net) of one image in the place of the U-Net of config.model. Raises ConfigError for any name in the
    config that does not exist or does not go with another, and warns when x_T keeps a part of the image.
    """
    names, shape = config.diffusion, tuple(shape)
    _check(config)
    schedule = schedules.make_schedule(
        names.schedule, names.T, names.betas, names.zero_terminal_snr, max(shape[:2]), names.base_resolution
    )
    _check_signal(names, schedule)
    init, net = network or unet.make_unet(
        shape, names.variance == "learned", names.self_conditioning, schedule.time_scale, **vars(config.model)
    )
    parameterization = diffusion.PARAMETERIZATIONS[names.parameterization]
    image_net = net
    if names.self_conditioning:
        image_net = conditioning.self_conditioning(net, schedule, parameterization)
    loss = _make_loss(config, schedule, parameterization, image_net)
    training_parts = _make_training(config.train, config.data.flip, names.time_sampling, init, loss)
    return Experiment(config, shape, schedule, parameterization, init, net, image_net, loss, *training_parts)


def _make_loss(config, schedule, parameterization, net):
    names, error = config.diffusion, diffusion.ERRORS[config.diffusion.error](parameterization)
    if names.label_dropout:
        net = conditioning.label_dropout(net, names.label_dropout, config.model.num_classes)
    options = {"distance": diffusion.DISTANCES[names.distance]}
    if names.variance == "learned":
        options["extra"] = likelihood.make_variance_loss(schedule, error)
    return diffusion.make_loss(net, schedule, error, diffusion.WEIGHTINGS[names.weighting], **options)


def _make_training(config, flip, time_sampling, init, loss):
    """(learning_rate, init_state, train_step) of the section train."""
    learning_rate = training.warm_up(config.learning_rate, config.warmup_steps)
    optimizer = training.make_optimizer(learning_rate, config.grad_clip)
    options = {"time_sampling": training.TIME_SAMPLINGS[time_sampling], "lengths": config.averages}

    def init_state(params=None):
        params = init(keys.root(config.seed, "init")) if params is None else params
        return training.init_state(params, optimizer, **options)

    train_step = training.make_train_step(
        loss, optimizer, config.ema_decay, flip=flip, accumulate=config.accumulate, **options
    )
    return learning_rate, jax.jit(init_state), train_step


def _check(config):
    names = config.diffusion
    for table, name, field in (
        (diffusion.PARAMETERIZATIONS, names.parameterization, "diffusion.parameterization"),
        (diffusion.WEIGHTINGS, names.weighting, "diffusion.weighting"),
        (diffusion.VARIANCES, names.variance, "diffusion.variance"),
        (diffusion.ERRORS, names.error, "diffusion.error"),
        (diffusion.DISTANCES, names.distance, "diffusion.distance"),
        (training.TIME_SAMPLINGS, names.time_sampling, "diffusion.time_sampling"),
        (samplers.SAMPLERS, config.train.sampler, "train.sampler"),
        (samplers.SAMPLERS, config.train.evaluate_sampler, "train.evaluate_sampler"),
    ):
        if name not in table:
            raise ConfigError(f"{field}={name} is not one of {', '.join(table)}")
    if names.error == "output" and names.weighting != "simple":
        raise ConfigError(
            f"diffusion.weighting={names.weighting} weights the error in eps; diffusion.error=output goes with simple"
        )
    if names.variance == "learned" and names.schedule in schedules.CURVES:
        raise ConfigError(f"diffusion.variance=learned needs a discrete schedule, {names.schedule} is continuous")
    if names.label_dropout and not config.model.num_classes:
        raise ConfigError(f"diffusion.label_dropout={names.label_dropout}, but model.num_classes=0")
    for length in config.train.averages:
        averages.gamma(length)


def _check_signal(names, schedule):
    """Where x_T is pure noise, eps says nothing of the image and an error in eps weighs nothing."""
    if schedule.logsnr(schedule.T) > -float("inf"):
        check_terminal_snr(schedule)
    elif names.parameterization == "eps" or names.error == "eps":
        raise ConfigError(
            f"the schedule leaves no signal at T, where diffusion.parameterization={names.parameterization} with "
            f"diffusion.error={names.error} teaches nothing; take v or x_0 with diffusion.error=output"
        )


def find_run(path: str | Path, step: int = 0) -> tuple[Path, int | None]:
    """(folder of the run, step or None for the newest) from that folder, its folder checkpoints or a step's folder.

    Raises CheckpointError when it is none of them, ConfigError when it is the folder of another step than `step`.
    """
    run, steps = expand(path), "checkpoints"
    if (run / steps).is_dir():
        return run, step or None
    run = Path(os.path.abspath(run))
    if run.name == steps and run.is_dir():
        return run.parent, step or None
    if run.parent.name == steps and run.parent.is_dir() and run.name.isdigit():
        if step not in (0, int(run.name)):
            raise ConfigError(f"--workdir={path} is another step than --step={step}; leave one of them out")
        return run.parent.parent, int(run.name)
    raise CheckpointError(f"there is no run in {path} (no folder {steps}); train first, or see --workdir")


def restore(workdir: Path, weights: str, step: int | None = None, member: int = 0) -> tuple[Experiment, Any, int]:
    """(Experiment, parameters, step) of the newest whole checkpoint of a run, or of that of `step`.

    Of an ensemble, they are those of the member `member`.

    weights: "ema", "raw", or the sigma_rel of an average of that length, put together from the stored ones; its step,
    the last of them when not given, is counted in updates.
    """
    folder = workdir / "checkpoints"
    parts: Any = None  # the Experiment of the checkpoint that is read
    items = {"ema": ["ema_params"], "raw": ["params"]}.get(weights, [])
    newest = folder / str(step or max(checkpoint.steps(folder), default=0))
    if newest.is_dir() and not all((newest / item).is_dir() for item in items):
        other = "raw" if weights == "ema" else "ema"
        raise CheckpointError(f"{newest} has no {items[0]}; try --weights={other}, or another --step")

    def expect(meta):
        nonlocal parts
        config, classes = from_json(json.dumps(meta["config"]), f"{folder}, meta"), meta.get("classes")
        members = config.train.ensemble
        if member >= members:
            raise ConfigError(f"--member={member}, but {workdir} has {members} (0 to {members - 1})")
        parts = make(member_config(config, member), meta["shape"])
        parts = parts._replace(data=meta.get("data"), classes=None if classes is None else tuple(classes))
        one = params_shape(parts)
        add = (members,) if members > 1 else ()
        return {item: jax.tree.map(lambda x: jax.ShapeDtypeStruct(add + x.shape, x.dtype), one) for item in items}

    meta, trees = checkpoint.load(folder, items, expect, step if items else None)
    if items:
        params = trees[items[0]]
        if meta["config"]["train"].get("ensemble", 1) > 1:
            params = jax.tree.map(lambda x: x[member], params)
        return parts, params, meta["step"]
    template = params_shape(parts)
    step = step or snapshots.stored(workdir / "averages")[-1][0]
    return parts, posthoc_ema(workdir / "averages", template, float(weights), step), step


def posthoc_ema(folder: Path, template: Any, sigma_rel: float, step: int | None = None) -> Any:
    """The average of length `sigma_rel` at `step` (default: the last snapshot's), shaped and typed as `template`.

    Warns when the stored snapshots give its weights with an error above a tenth. Raises ConfigError for a length or
    step out of range, CheckpointError when there is no whole snapshot or one does not fit the template.
    """
    found = snapshots.stored(folder)
    step = found[-1][0] if step is None else step
    coefficients, error = averages.posthoc_coefficients(found, step, sigma_rel)
    if error > 0.1:
        warnings.warn(
            f"the average of sigma_rel={sigma_rel} at step {step} is only roughly known: {len(found)} snapshots give "
            f"its weights with an error of {error:.0%}; take a length nearer to theirs or a step that has one, or save "
            "them more often",
            stacklevel=2,
        )
    return snapshots.combine(folder, dict(zip(found, coefficients, strict=True)), template)


def member_config(config: Config, i: int) -> Config:
    """The Config of the run that member `i` of an ensemble is by itself; that of a run without members is `config`."""
    train = config.train
    if train.ensemble == 1:
        return config
    own = {"learning_rate": train.learning_rates[i]} if train.learning_rates else {"seed": train.seed + i}
    changes = {f"train.{name}": value for name, value in {"ensemble": 1, "learning_rates": (), **own}.items()}
    return replace(config, changes)


def params_shape(experiment: Experiment) -> Any:
    """The tree of the parameters' shapes and types, as jax.ShapeDtypeStruct, without computing them."""
    return jax.eval_shape(experiment.init, jax.random.key(0))


def parameter_count(experiment: Experiment) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params_shape(experiment)))


def find_label(experiment: Experiment, wanted: str) -> int:
    """The label that is meant by a number or by the name of a class, also spelled name:NAME.

    Raises ConfigError for none, and for a number that is the name of another class.
    """
    count, names = experiment.config.model.num_classes, list(experiment.classes or ())
    if not count:
        raise ConfigError(f"label={wanted}, but the model has no labels")
    name = wanted.removeprefix("name:")
    named = names.index(name) if name in names else None
    if name != wanted or not re.fullmatch("[+-]?[0-9]{1,9}", wanted):
        if named is None:
            meant = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, names, 1))
            known = (
                f"has the classes {', '.join(names[:10])}{', ...' * (len(names) > 10)}" if names else "keeps no names"
            )
            raise ConfigError(f"label={wanted}, but the run {known}; its labels are 0 to {count - 1}{meant}")
        return named
    number = int(wanted)
    if not 0 <= number < count:
        raise ConfigError(f"label={wanted}, but the model has labels 0 to {count - 1}")
    if named not in (None, number):
        other = names[number] if number < len(names) else ""
        raise ConfigError(
            f"label={wanted} is the number of class {other!r}, but there is a class of that name, number {named}; "
            f"say label=name:{other} or label=name:{wanted}"
        )
    return number


def cyclic_labels(experiment: Experiment, indices: np.ndarray) -> np.ndarray | None:
    """A class for each index, all classes in turn; None for a model without."""
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
    **options,
):
    """`samplers.make_generate` with this experiment's network and variance; `options` are the sampler's own.

    preview: the frames show x_0_hat instead of x_t; limit: a name in diffusion.LIMITS; guidance, interval: the scale
    and the times of classifier-free guidance; edit: (sampler, times) -> (sampler, times, start) of another start or way
    than from pure noise.
    """
    names, schedule, net = experiment.config.diffusion, experiment.schedule, experiment.net
    if limit not in diffusion.LIMITS:
        raise ConfigError(f"limit={limit} is not one of {', '.join(diffusion.LIMITS)}")
    if options.get("variance") == "learned" != names.variance:
        raise ConfigError("variance=learned, but the model has not learned one")
    if interval and (guidance == 1 or not 0 <= interval[0] <= interval[1] <= schedule.T):
        raise ConfigError(
            f"interval={interval[0]:g},{interval[1]:g} needs guidance, and 0 <= LOW <= HIGH <= {schedule.T:g}"
        )
    if guidance != 1:
        if not names.label_dropout:
            raise ConfigError(f"guidance={guidance:g} needs a model trained with diffusion.label_dropout")
        null, channels = experiment.config.model.num_classes, experiment.shape[-1]
        net = conditioning.guided(net, guidance, null, *interval, channels=channels)
    sampler = samplers.make_sampler(sampler, schedule, {"variance": names.variance}, **options)
    make_denoiser = diffusion.make_denoiser_with_variance if sampler.needs_variance else diffusion.make_denoiser

    def denoiser(params, label):
        return make_denoiser(net, schedule, experiment.parameterization, params, label, diffusion.LIMITS[limit])

    if names.self_conditioning:
        sampler = samplers.self_conditioned(sampler)
    elif preview:
        sampler = samplers.with_preview(sampler)
    times = schedule.times(steps, spacing)
    sampler, times, start = (edit or editing.from_noise(schedule, experiment.shape))(sampler, times)
    view = (lambda x, memory: memory[1]) if preview else (lambda x, memory: x)
    return samplers.make_generate(denoiser, sampler, times, start, frames, view)

"""The compiled programs of a run: training on all devices, or an ensemble's on one each; sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, experiment, keys, parallel, training
from ddpm_jax.experiment import Experiment


class Program(NamedTuple):
    """`again` counts the roll-backs so far, 0 when not given: after each, batches and draws are others."""

    init_state: Callable  # () -> state, on the host's default device
    place: Callable  # state -> the same lying on the devices as `step` returns it
    batches: Callable  # (range of steps, again) -> what `step` takes of them, on the host
    step: Callable  # (state, batches, again) -> state, metrics with an axis of steps


def make(parts: Experiment, dataset: data.Dataset) -> Program:
    """The Program of an Experiment on a Dataset."""
    return _ensemble(parts, dataset) if parts.config.train.ensemble > 1 else _single(parts, dataset)


def _single(parts, dataset):
    """Every device has the same state and its share of every batch."""
    config = parts.config.train
    rows, step = parallel.local_rows(config.batch_size), parallel.pmap_step(training.several_steps(parts.train_step))

    def batches(steps, again=0):
        made = (data.batch(dataset, config.seed, step, config.batch_size, rows, again) for step in steps)
        return _stack(map(parallel.shard, made), 1)

    def all_steps(state, batches, again=0):
        return step(state, batches, _root(config.seed, again))

    return Program(parts.init_state, parallel.replicate, batches, all_steps)


def _ensemble(parts, dataset):
    """Every device has some members, and each member is the run that it would be alone: its own state, batches, draws.

    All arrays have the members in front. Metrics are means over them, counters the largest; the loss is also told of
    each.
    """
    config = parts.config.train
    members = [experiment.member(parts.config, i).train for i in range(config.ensemble)]
    seeds = [member.seed for member in members]
    scales = np.float32([member.learning_rate for member in members]) / np.float32(config.learning_rate)
    spread, place = parallel.shard_members(training.steps_of_members(parts.train_step), config.ensemble)

    def step(state, batches, roots):
        state, metrics = spread(state, batches, roots, scales)
        each = {f"loss_member_{i}": loss for i, loss in enumerate(metrics["loss"])}
        return state, each | {
            name: jnp.mean(values, 0) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.max(values, 0)
            for name, values in metrics.items()
        }

    step = jax.jit(step, donate_argnums=0)

    def batches(steps, again=0):
        made = (
            _stack(data.batch(dataset, seed, step, config.batch_size, rollbacks=again) for step in steps)
            for seed in seeds
        )
        return _stack(made)

    def all_steps(state, batches, again=0):
        return step(state, batches, jnp.stack([_root(seed, again) for seed in seeds]))

    def init_states():
        params = jax.vmap(parts.init)(jnp.stack([keys.root(seed, "init") for seed in seeds]))
        return jax.vmap(parts.init_state)(params)

    return Program(jax.jit(init_states), place, batches, all_steps)


def make_draw(parts: Experiment, sampler: str, steps: int, *args, **options) -> Callable:
    """draw(params, num, seed=0, labels=None, batch_size=64, start=0): images `start` to `num` of a seed, in batches.

    Arrays uint8 (b, frames, H, W, C), a sample and the way to it; a model with classes is given them in turn where
    there are no labels. The arguments are those of experiment.make_generate. Raises Diverged when a picture is not
    finite.
    """
    generate = parallel.pmap_generate(experiment.make_generate(parts, sampler, steps, *args, **options))

    def draw(params, num, seed=0, labels=None, batch_size=64, start=0):
        indices, root = np.arange(start, num), keys.root(seed, "sample")
        labels = experiment.labels_in_turn(parts, indices) if labels is None else labels[start:]
        return parallel.generate_batches(generate, parallel.replicate(params), root, indices, labels, batch_size)

    return draw


def draw(parts: Experiment, params, num: int, seed=0, sampler="ddpm", steps=0, batch_size=64, **options) -> np.ndarray:
    """The first `num` images of a seed, uint8 (num, H, W, C), by so many steps, 0 for all T; otherwise as make_draw."""
    draw = make_draw(parts, sampler, steps or parts.config.diffusion.T, **options)
    return np.concatenate([batch[:, -1] for batch in draw(params, num, seed, batch_size=batch_size)])


def _root(seed, again):
    return keys.root(seed, f"train {again}" if again else "train")


def _stack(trees, axis=0):
    return jax.tree.map(lambda *x: np.stack(x, axis), *trees)

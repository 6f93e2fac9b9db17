"""The compiled program that a run repeats: steps of one training on all devices, or of an ensemble's on one each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, experiment, keys, parallel, training


class Program(NamedTuple):
    """`again` counts the roll-backs so far: after each, batches and draws are others."""

    init_state: Callable  # () -> state, on the host's default device
    place: Callable  # state -> the same lying on the devices as `step` returns it
    batches: Callable  # (range of steps, again) -> what `step` takes of them, on the host
    step: Callable  # (state, batches, again) -> state, metrics with an axis of steps


def make(parts, dataset):
    """The Program of an Experiment on a Dataset."""
    return _ensemble(parts, dataset) if parts.config.train.ensemble > 1 else _single(parts, dataset)


def _single(parts, dataset):
    """Every device has the same state and its share of every batch."""
    config, (init_state, train_step) = parts.config.train, experiment.make_training(parts)
    rows, step = parallel.local_rows(config.batch_size), parallel.pmap_step(training.several_steps(train_step))

    def batches(steps, again):
        made = (data.batch(dataset, config.seed, step, config.batch_size, rows, again) for step in steps)
        return _stack(map(parallel.shard, made), 1)

    def all_steps(state, batches, again):
        return step(state, batches, _root(config.seed, again))

    return Program(init_state, parallel.replicate, batches, all_steps)


def _ensemble(parts, dataset):
    """Every device has some members, and each member is the run that it would be alone: its own state, batches, draws.

    All arrays have the members in front. Metrics are means over them, counters the largest; the loss is also told of
    each.
    """
    config, (init_state, train_step) = parts.config.train, experiment.make_training(parts)
    seeds = [experiment.member(parts, i).config.train.seed for i in range(config.ensemble)]
    rates = [experiment.member(parts, i).config.train.learning_rate for i in range(config.ensemble)]
    scales = np.float32(rates) / np.float32(config.learning_rate)
    spread, place = parallel.spread(training.steps_of_members(train_step), config.ensemble)

    def step(state, batches, roots):
        state, metrics = spread(state, batches, roots, scales)
        each = {f"loss_member_{i}": loss for i, loss in enumerate(metrics["loss"])}
        return state, each | {
            name: jnp.mean(values, 0) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.max(values, 0)
            for name, values in metrics.items()
        }

    step = jax.jit(step, donate_argnums=0)

    def batches(steps, again):
        made = (
            _stack(data.batch(dataset, seed, step, config.batch_size, again=again) for step in steps) for seed in seeds
        )
        return _stack(made)

    def all_steps(state, batches, again):
        return step(state, batches, jnp.stack([_root(seed, again) for seed in seeds]))

    def init_states():
        params = jax.vmap(parts.init)(jnp.stack([keys.root(seed, "init") for seed in seeds]))
        return jax.vmap(init_state)(params)

    return Program(jax.jit(init_states), place, batches, all_steps)


def _root(seed, again):
    return keys.root(seed, f"train {again}" if again else "train")


def _stack(trees, axis=0):
    return jax.tree.map(lambda *x: np.stack(x, axis), *trees)

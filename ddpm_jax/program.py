"""The compiled programs of a run: training one model or an ensemble over all devices, and sampling."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, experiment, keys, parallel, training, vectors
from ddpm_jax.config import decay_span
from ddpm_jax.experiment import Experiment


class Program(NamedTuple):
    """Training as four functions. `rollbacks` is their number so far; each one changes the batches and random keys."""

    init_state: Callable  # () -> state, on the host's default device
    place: Callable  # state -> state with the form, and the layout on the devices, that `step` returns
    batches: Callable  # (range of steps, rollbacks=0) -> batches for `step`, on the host
    step: Callable  # (state, batches, rollbacks=0, steps=train.steps) -> state, metrics with a leading axis of steps


def make(parts: Experiment, dataset: data.Dataset) -> Program:
    """The Program that trains an Experiment on a Dataset."""
    return _ensemble(parts, dataset) if parts.config.train.ensemble > 1 else _single(parts, dataset)


def _single(parts, dataset):
    """Data parallelism: every device has a copy of the state and its part of every batch."""
    config = parts.config.train
    rows, train = parallel.local_rows(config.batch_size), training.scan_steps(parts.train_step)
    mapped = parallel.pmap_step(lambda state, batches, others: train(state, batches, *others))

    def batches(steps, rollbacks=0):
        found = (data.batch(dataset, config.seed, step, config.batch_size, rows, rollbacks) for step in steps)
        return _stack(map(parallel.shard, found), 1)

    def step(state, batches, rollbacks=0, steps=config.steps):
        scale_and_span = [1.0, *spans] if (spans := _decay_spans(config, steps)) else []
        return mapped(state, batches, (_train_key(config.seed, rollbacks), *scale_and_span))

    return Program(parts.init_state, _pack_first(parts.init_state, parallel.replicate), batches, step)


def _ensemble(parts, dataset):
    """Every device trains some members. Each has its own state, batches and random keys, as if it were trained alone.

    All arrays have a leading axis of members. Metrics are averaged over it, counters are maxima, and the loss is also
    reported for each member.
    """
    config = parts.config.train
    members = [experiment.member_config(parts.config, i).train for i in range(config.ensemble)]
    seeds = [member.seed for member in members]
    scales = np.float32([member.learning_rate for member in members]) / np.float32(config.learning_rate)
    train_members, place = parallel.shard_members(training.ensemble_steps(parts.train_step), config.ensemble)

    @partial(jax.jit, donate_argnums=0)
    def train(state, batches, roots, *spans):
        state, metrics = train_members(state, batches, roots, scales, *spans)
        losses = {f"loss_member_{i}": loss for i, loss in enumerate(metrics["loss"])}
        return state, losses | {
            name: jnp.mean(values, 0) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.max(values, 0)
            for name, values in metrics.items()
        }

    def batches(steps, rollbacks=0):
        def member_batches(seed):
            return _stack(data.batch(dataset, seed, step, config.batch_size, rollbacks=rollbacks) for step in steps)

        return _stack(map(member_batches, seeds))

    def step(state, batches, rollbacks=0, steps=config.steps):
        spans = [np.tile(span, (config.ensemble, 1)) for span in _decay_spans(config, steps)]
        return train(state, batches, jnp.stack([_train_key(seed, rollbacks) for seed in seeds]), *spans)

    draw_params = experiment.jit_unoptimized(jax.vmap(parts.init))

    def init_states():
        return jax.vmap(parts.init_state)(draw_params(jnp.stack([keys.root(seed, "init") for seed in seeds])))

    return Program(init_states, _pack_first(init_states, place), batches, step)


def _pack_first(init_state, place):
    """`place` of a state in the form that init_state returns; one from a checkpoint has no Vectors."""
    return lambda state: place(vectors.pack_like(jax.eval_shape(init_state), state))


def make_draw(parts: Experiment, sampler: str, steps: int, *args, **options) -> Callable:
    """draw(params, num, seed=0, labels=None, batch_size=64, start=0): images `start` to `num` of a seed, in batches.

    params: a tree or a vectors.Vector; with a guide the pair of the model's and the guide's. Batches are uint8
    (b, frames, H, W, C); the last frame is the sample. Without labels, a class-conditional model cycles through its
    classes. Arguments: see experiment.make_generate. Raises Diverged for a non-finite image.
    """
    generate = parallel.pmap_generate(experiment.make_generate(parts, sampler, steps, *args, **options))

    def draw(params, num, seed=0, labels=None, batch_size=64, start=0):
        indices, root = np.arange(start, num), keys.root(seed, "sample")
        labels = experiment.cyclic_labels(parts, indices) if labels is None else labels[start:]
        tree = parallel.replicate(vectors.unpack(jax.device_get(params)))
        return parallel.generate_batches(generate, tree, root, indices, labels, batch_size)

    return draw


def draw(parts: Experiment, params, num: int, seed=0, sampler="ddpm", steps=0, batch_size=64, **options) -> np.ndarray:
    """The first `num` images of a seed, uint8 (num, H, W, C), in `steps` steps (0: T). Other arguments: make_draw."""
    draw = make_draw(parts, sampler, steps or parts.config.diffusion.T, **options)
    return np.concatenate([batch[:, -1] for batch in draw(params, num, seed, batch_size=batch_size)])


def _decay_spans(config, steps):
    """[the span of updates over which the learning rate decays], empty if it is constant.

    An argument of the compiled step, so that another number of steps needs no compilation.
    """
    return [] if config.decay == "constant" else [np.float32(decay_span(dataclasses.replace(config, steps=steps)))]


def _train_key(seed, rollbacks):
    return keys.root(seed, f"train {rollbacks}" if rollbacks else "train")


def _stack(trees, axis=0):
    return jax.tree.map(lambda *x: np.stack(x, axis), *trees)

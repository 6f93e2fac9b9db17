"""Learning: the state, the optimiser and one step of Algorithm 1, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from ddpm_jax import averages
from ddpm_jax.diffusion import draw_u, to_unit
from ddpm_jax.keys import named


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; arrays only."""

    step: jax.Array  # int32: steps taken, skipped ones included
    skipped: jax.Array  # int32: steps whose gradient was not finite and changed nothing
    skipped_in_row: jax.Array  # int32: how many of them were the last ones
    params: Any
    ema_params: Any
    opt_state: Any
    times: Any = ()  # the memory of a TimeSampling
    averages: Any = ()  # power-function averages of the parameters, one tree for each length (averages.py)


class TimeSampling(NamedTuple):
    """How the batch's u, where each t lies among all times, are drawn. The loss stays that of uniform u on average."""

    init: Callable  # () -> memory
    draw: Callable  # (memory, key, keys, position, size) -> u (b,), weight (b,); position: the rows among `size`
    observe: Callable  # (u, loss) of one image -> what the update wants to know, summed over the batch
    update: Callable  # (memory, that sum) -> memory


def _forgetful(draw):
    return TimeSampling(lambda: (), draw, lambda u, loss: (), lambda memory, seen: memory)


def uniform_times(memory, key, keys, position, size):
    """Each image's u by itself (Algorithm 1, line 3)."""
    return jax.vmap(draw_u)(keys), jnp.ones(len(position))


def stratified_times(memory, key, keys, position, size):
    """One u in each of `size` equal parts of [0, 1), so that batches differ less (Kingma et al. 2021, appendix I.1)."""
    return (draw_u(key) + position / size) % 1.0, jnp.ones(len(position))


def loss_aware(bins=64, decay=0.9, floor=0.001, patience=10):
    """Nichol & Dhariwal 2021, eq. 18: u with a density in proportion to sqrt(E[loss^2]), a running mean in each bin.

    Uniform until each bin has been seen `patience` times; a share `floor` of the density always is. The weight, one
    over the density, leaves the mean of the loss as it is.
    """

    def init():
        return jnp.ones(bins), jnp.zeros(bins)

    def draw(memory, key, keys, position, size):
        square, count = memory
        share = jnp.sqrt(square) / jnp.sum(jnp.sqrt(square))
        share = jnp.where(jnp.min(count) < patience, 1 / bins, floor / bins + (1 - floor) * share)
        at = jax.vmap(draw_u)(keys) * jnp.sum(share)
        bin = jnp.minimum(jnp.searchsorted(jnp.cumsum(share), at, side="right"), bins - 1)
        within = 1 - (jnp.cumsum(share)[bin] - at) / share[bin]
        return jnp.minimum((bin + jnp.clip(within, 0, 1)) / bins, 1 - 2**-24), 1 / (bins * share[bin])

    def observe(u, loss):
        here = jax.nn.one_hot(jnp.floor(u * bins).astype(int), bins)
        return here, here * loss**2

    def update(memory, seen):
        (square, count), (number, total) = memory, seen
        kept = decay**number
        return kept * square + (1 - kept) * total / jnp.maximum(number, 1), count + number

    return TimeSampling(init, draw, observe, update)


TIME_SAMPLINGS = {
    "uniform": _forgetful(uniform_times),
    "stratified": _forgetful(stratified_times),
    "loss_aware": loss_aware(),
}


def warm_up(learning_rate, steps):
    """learning_rate * min(n / steps, 1) for the n-th update, counted from 0: the first one changes nothing (Ho)."""
    return optax.linear_schedule(0.0, learning_rate, steps) if steps else optax.constant_schedule(learning_rate)


def make_optimizer(learning_rate, grad_clip):
    """Adam (Ho et al. 2020, appendix B) on the gradient clipped to the global norm `grad_clip`."""
    return optax.chain(_clip_by_global_norm(grad_clip), optax.adam(learning_rate))


def _clip_by_global_norm(most):
    """optax's of this name, but every entry is multiplied by one number instead of divided by the norm: on a CPU the
    divisions, written into each of Adam's loops, took half the time of the update (measured)."""

    def update(grad, state, params=None):
        scale = jnp.minimum(1.0, most / optax.tree.norm(grad))
        return jax.tree.map(lambda g: scale * g, grad), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init_state(params, optimizer, time_sampling=TIME_SAMPLINGS["uniform"], lengths=()):
    """The state before the first step. The other arguments: make_train_step."""
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + len(lengths))]
    return TrainState(*zero, params, copies[0], optimizer.init(params), time_sampling.init(), tuple(copies[1:]))


def ema_rate(ema_decay, n):
    """1 - decay of the average after n updates. It warms up as 9 / (10 + n), so that early averages follow the
    parameters instead of their initialisation."""
    return jnp.maximum(1 - ema_decay, 9 / (10 + n))


def ema_init_share(ema_decay, n):
    """The share of the initialisation that is left in the average after n updates, in closed form (float64)."""
    return float(np.prod(np.minimum(ema_decay, (1 + np.arange(n)) / (10 + np.arange(n)))))


def make_train_step(
    loss,
    optimizer,
    ema_decay,
    axis="batch",
    flip=False,
    accumulate=1,
    time_sampling=TIME_SAMPLINGS["uniform"],
    lengths=(),
):
    """train_step(state, batch, root, scale=1.0) -> state, metrics, to be mapped over devices along `axis`.

    loss: one image's, as from diffusion.make_loss. batch: {"index": (b,), "image": uint8 (b, H, W, C), "label"?: (b,)},
    this device's share; root: the key of the stream "train"; scale: of the update, and so of the learning rate.
    `accumulate` micro-batches bound the memory; `lengths` are the sigma_rel of the power-function averages to keep.
    Metrics are scalars: loss, its parts by quartile of t (loss_q1 + ... + loss_q4 = 4 loss), grad_norm, param_norm,
    skipped, skipped_in_row. A gradient that is not finite changes nothing but the counters.
    """

    gammas = [averages.gamma(length) for length in lengths]

    def image_loss(params, key, image, label, u, weight):
        x_0 = to_unit(image)
        if flip:
            x_0 = jnp.where(jax.random.bernoulli(named(key, "flip")), x_0[:, ::-1], x_0)
        value = loss(params, key, x_0, label, u)
        quartiles = {f"loss_q{q + 1}": 4 * weight * value * (jnp.floor(4 * u) == q) for q in range(4)}
        return weight * value, (quartiles, time_sampling.observe(u, value))

    def batch_loss(params, keys, batch, u, weight):
        values, parts = jax.vmap(image_loss, (None, 0, 0, 0, 0, 0))(
            params, keys, batch["image"], batch.get("label"), u, weight
        )
        return jnp.mean(values), jax.tree.map(lambda x: jnp.mean(x, 0), parts)

    def loss_and_grad(*args):
        (value, (quartiles, seen)), grad = jax.value_and_grad(batch_loss, has_aux=True)(*args)
        return {"loss": value, **quartiles}, seen, grad

    def train_step(state, batch, root, scale=1.0):
        key = jax.random.fold_in(root, state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        rows = len(batch["index"])
        size, position = rows * lax.axis_size(axis), rows * lax.axis_index(axis) + jnp.arange(rows)
        u, weight = time_sampling.draw(state.times, key, keys, position, size)
        parts = _mean_over_microbatches(loss_and_grad, accumulate, state.params, keys, batch, u, weight)
        metrics, seen, grad = _mean_over_devices(parts, axis)
        grad_norm = optax.tree.norm(grad)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])

        def learn(state):
            n = state.step - state.skipped
            updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
            params = optax.apply_updates(state.params, jax.tree.map(lambda update: scale * update, updates))
            ema_params = optax.incremental_update(params, state.ema_params, ema_rate(ema_decay, n))
            powers = tuple(
                optax.incremental_update(params, average, averages.update_rate(gamma, n + 1))
                for gamma, average in zip(gammas, state.averages, strict=True)
            )
            times = time_sampling.update(state.times, jax.tree.map(lambda x: size * x, seen))
            return state._replace(
                skipped_in_row=jnp.int32(0),
                params=params,
                ema_params=ema_params,
                opt_state=opt_state,
                times=times,
                averages=powers,
            )

        def skip(state):
            return state._replace(skipped=state.skipped + 1, skipped_in_row=state.skipped_in_row + 1)

        # A branch lets the new values take the place of the old ones; to choose each by jnp.where took three times as
        # long on a CPU (measured).
        new = lax.cond(finite, learn, skip, state)
        new = new._replace(step=state.step + 1)
        counters = {"skipped": new.skipped, "skipped_in_row": new.skipped_in_row}
        return new, metrics | {"grad_norm": grad_norm, "param_norm": optax.tree.norm(new.params)} | counters

    return train_step


def _mean_over_devices(tree, axis):
    """lax.pmean; several devices of a CPU exchange one vector, which is faster than leaf by leaf (measured)."""

    def as_vector(tree):
        vector, unravel = ravel_pytree(tree)
        return unravel(lax.pmean(vector, axis))

    def leaf_by_leaf(tree):
        return lax.pmean(tree, axis)

    cpu = leaf_by_leaf if lax.axis_size(axis) == 1 else as_vector
    return lax.platform_dependent(tree, cpu=cpu, default=leaf_by_leaf)


def ensemble_steps(train_step, axis="batch"):
    """Steps of each of several trainings on one device: `scan_steps` of states, batches and more, (members, ...).

    On a CPU one member after another: a convolution with a kernel for each is slow there (measured).
    """

    def alone(state, batch, *others):
        step = jax.vmap(train_step, (None, 0, *[None] * len(others)), None, axis_name=axis)
        return step(state, jax.tree.map(lambda x: x[None], batch), *others)

    member = scan_steps(alone)

    def one_after_another(*args):
        each = [member(*jax.tree.map(lambda x, i=i: x[i], args)) for i in range(len(args[-1]))]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    def steps(*args):
        return lax.platform_dependent(*args, cpu=one_after_another, default=jax.vmap(member))

    return steps


def scan_steps(train_step):
    """`train_step` over batches with a leading axis of steps, (n, b, ...), in one call; its metrics have it too."""

    def steps(state, batches, *others):
        return _loop(lambda state, batch: train_step(state, batch, *others), state, batches)

    return steps


def _loop(body, carry, parts):
    """lax.scan; but XLA on CPU runs the gradient of a convolution about 20 times slower inside a loop (measured), so
    that there, and for a single part, the body is written out once for each."""

    def loop(carry, parts):
        return lax.scan(body, carry, parts)

    def written_out(carry, parts):
        return lax.scan(body, carry, parts, unroll=0)

    if len(jax.tree.leaves(parts)[0]) == 1:
        return written_out(carry, parts)
    return lax.platform_dependent(carry, parts, cpu=written_out, default=loop)


def _mean_over_microbatches(function, parts, params, *args):
    """The mean of function(params, *part) over `parts` equal cuts of the leading axis of `args`, one after another.

    The numbers of a part wait for the total of those before: where the loop is written out, XLA would else begin with
    all of them at once and keep what each needs.
    """
    if parts == 1:
        return function(params, *args)

    def body(total, part):
        # Zero; or NaN, where the total is not finite, and then neither is the mean.
        done = 0 * sum(x.ravel()[0] for x in jax.tree.leaves(total))
        part = jax.tree.map(lambda x: x + done if jnp.issubdtype(x.dtype, jnp.floating) else x, part)
        return jax.tree.map(jnp.add, total, function(params, *part)), None

    cuts = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), args)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], cuts)))
    total, _ = _loop(body, zero, cuts)
    return jax.tree.map(lambda x: x / parts, total)

"""Learning: the state, the optimiser and one step of Algorithm 1, as pure functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ddpm_jax.diffusion import draw_u
from ddpm_jax.images import to_unit
from ddpm_jax.keys import named


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; arrays only."""

    step: jax.Array  # int32: steps taken, skipped ones included
    skipped: jax.Array  # int32: steps whose gradient was not finite and changed nothing
    skipped_in_row: jax.Array  # int32: how many of them were the last ones
    params: Any
    ema_params: Any
    opt_state: Any


def warm_up(learning_rate, steps):
    """learning_rate * min(n / steps, 1) for the n-th update, counted from 0: the first one changes nothing (Ho)."""
    return optax.linear_schedule(0.0, learning_rate, steps) if steps else optax.constant_schedule(learning_rate)


def make_optimizer(learning_rate, grad_clip):
    """Adam (Ho et al. 2020, appendix B) on the gradient clipped to the global norm `grad_clip`."""
    return optax.chain(optax.clip_by_global_norm(grad_clip), optax.adam(learning_rate))


def init_state(params, optimizer):
    """The state before the first step."""
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(*zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def ema_rate(ema_decay, n):
    """1 - decay of the average after n updates. It warms up as 9 / (10 + n), so that early averages follow the
    parameters instead of their initialisation."""
    return jnp.maximum(1 - ema_decay, 9 / (10 + n))


def ema_init_share(ema_decay, n):
    """The share of the initialisation that is left in the average after n updates, in closed form (float64)."""
    return float(np.prod(np.minimum(ema_decay, (1 + np.arange(n)) / (10 + np.arange(n)))))


def make_train_step(loss, optimizer, ema_decay, axis="batch", flip=False, accumulate=1):
    """train_step(state, batch, root) -> state, metrics, to be mapped over devices along `axis`.

    loss: one image's, as from diffusion.make_loss. batch: {"index": (b,), "image": uint8 (b, H, W, C), "label"?: (b,)},
    this device's share; root: the key of the stream "train". `accumulate` micro-batches bound the memory.
    Metrics are scalars: loss, its parts by quartile of t (loss_q1 + ... + loss_q4 = 4 loss), grad_norm, param_norm,
    skipped, skipped_in_row. A gradient that is not finite changes nothing but the counters.
    """

    def image_loss(params, key, image, label):
        x_0, u = to_unit(image), draw_u(key)
        if flip:
            x_0 = jnp.where(jax.random.bernoulli(named(key, "flip")), x_0[:, ::-1], x_0)
        value = loss(params, key, x_0, label, u)
        return value, {f"loss_q{q + 1}": 4 * value * (jnp.floor(4 * u) == q) for q in range(4)}

    def batch_loss(params, keys, batch):
        values, parts = jax.vmap(image_loss, (None, 0, 0, 0))(params, keys, batch["image"], batch.get("label"))
        return jnp.mean(values), jax.tree.map(jnp.mean, parts)

    def loss_and_grad(params, keys, batch):
        (value, parts), grad = jax.value_and_grad(batch_loss, has_aux=True)(params, keys, batch)
        return {"loss": value, **parts}, grad

    def train_step(state, batch, root):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(root, state.step), batch["index"])
        metrics, grad = lax.pmean(_mean_over_parts(loss_and_grad, accumulate, state.params, keys, batch), axis)
        grad_norm = optax.tree.norm(grad)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])

        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(ema_decay, state.step - state.skipped)
        ema_params = optax.incremental_update(params, state.ema_params, rate)

        new = TrainState(
            state.step + 1,
            state.skipped + ~finite,
            jnp.where(finite, 0, state.skipped_in_row + 1),
            *jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, ema_params, opt_state),
                (state.params, state.ema_params, state.opt_state),
            ),
        )
        counters = {"skipped": new.skipped, "skipped_in_row": new.skipped_in_row}
        return new, metrics | {"grad_norm": grad_norm, "param_norm": optax.tree.norm(new.params)} | counters

    return train_step


def _mean_over_parts(function, parts, params, *args):
    """The mean of function(params, *part) over `parts` equal cuts of the leading axis of `args`, one after another."""
    if parts == 1:
        return function(params, *args)

    def body(total, part):
        return jax.tree.map(jnp.add, total, function(params, *part)), None

    cuts = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), args)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], cuts)))
    # XLA on CPU runs the gradient of a convolution about 20 times slower inside a loop (measured), so unroll it there.
    total, _ = lax.scan(body, zero, cuts, unroll=parts if jax.default_backend() == "cpu" else 1)
    return jax.tree.map(lambda x: x / parts, total)

"""Training: the state, the optimiser and one step of Algorithm 1, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from ddpm_jax import averages, vectors
from ddpm_jax.diffusion import draw_u, to_unit
from ddpm_jax.keys import named


class TrainState(NamedTuple):
    """Everything that training carries from step to step; arrays only. A tree may be packed into a vectors.Vector."""

    step: jax.Array  # int32: steps taken, skipped ones included
    skipped: jax.Array  # int32: steps with a non-finite gradient, which changed nothing
    skipped_in_row: jax.Array  # int32: length of the latest run of skipped steps
    params: Any
    ema_params: Any
    opt_state: Any
    times: Any = ()  # the state of the TimeSampling
    averages: Any = ()  # power-function averages of the parameters, one tree per length (averages.py)


class TimeSampling(NamedTuple):
    """How a batch's u, which determine the times t, are drawn. The expected loss stays that of uniform u."""

    init: Callable  # () -> memory
    draw: Callable  # (memory, key, keys, position, size) -> u (b,), weight (b,); position: of the rows in the batch
    observe: Callable  # (u, loss) of one image -> statistics for the update
    update: Callable  # (memory, sum of the statistics over the batch) -> memory


def _stateless(draw):
    return TimeSampling(lambda: (), draw, lambda u, loss: (), lambda memory, statistics: memory)


def uniform_times(memory, key, keys, position, size):
    """An independent u for each image (Algorithm 1, line 3)."""
    return jax.vmap(draw_u)(keys), jnp.ones(len(position))


def stratified_times(memory, key, keys, position, size):
    """One u in each of `size` equal strata of [0, 1), for a lower variance (Kingma et al. 2021, appendix I.1)."""
    return (draw_u(key) + position / size) % 1.0, jnp.ones(len(position))


def loss_aware(bins=64, decay=0.9, floor=0.001, patience=10):
    """Nichol & Dhariwal 2021, eq. 18: u with a density proportional to sqrt(E[loss^2]), a running mean in each bin.

    The density is uniform until each bin has `patience` observations; later a fraction `floor` of it stays uniform. The
    weight is 1 / density, so the expected loss does not change.
    """

    def init():
        return jnp.ones(bins), jnp.zeros(bins)

    def draw(memory, key, keys, position, size):
        mean_square, count = memory
        p = jnp.sqrt(mean_square) / jnp.sum(jnp.sqrt(mean_square))  # the probability of each bin
        p = jnp.where(jnp.min(count) < patience, 1 / bins, floor / bins + (1 - floor) * p)
        quantile = jax.vmap(draw_u)(keys) * jnp.sum(p)
        bin = jnp.minimum(jnp.searchsorted(jnp.cumsum(p), quantile, side="right"), bins - 1)
        offset = 1 - (jnp.cumsum(p)[bin] - quantile) / p[bin]
        return jnp.minimum((bin + jnp.clip(offset, 0, 1)) / bins, 1 - 2**-24), 1 / (bins * p[bin])

    def observe(u, loss):
        one_hot = jax.nn.one_hot(jnp.floor(u * bins).astype(int), bins)
        return one_hot, one_hot * loss**2

    def update(memory, statistics):
        (mean_square, count), (new_count, sum_square) = memory, statistics
        kept = decay**new_count
        return kept * mean_square + (1 - kept) * sum_square / jnp.maximum(new_count, 1), count + new_count

    return TimeSampling(init, draw, observe, update)


TIME_SAMPLINGS = {
    "uniform": _stateless(uniform_times),
    "stratified": _stateless(stratified_times),
    "loss_aware": loss_aware(),
}


def warm_up(learning_rate, steps):
    """learning_rate * min(n / steps, 1) for update n = 0, 1, ...: the first changes nothing, as in Ho's code."""
    return optax.linear_schedule(0.0, learning_rate, steps) if steps else optax.constant_schedule(learning_rate)


DECAYS = {  # p, from 0 to 1 while the learning rate decays -> a factor on it
    "constant": lambda p: 1.0,
    "cosine": lambda p: 0.5 + 0.5 * jnp.cos(jnp.pi * p),  # Loshchilov & Hutter 2017, eq. 5
    "linear": lambda p: 1 - p,
    "wsd": lambda p: 1 - jnp.sqrt(p),  # Haegele et al. 2024; only the last steps of the run decay
}


def decay_factor(decay, n, span):
    """The factor of an entry of DECAYS on the learning rate of update n = 0, 1, ...; span: where it starts and ends."""
    start, end = span
    return decay(jnp.clip((n - start) / jnp.maximum(end - start, 1), 0, 1))


def adamw(learning_rate, b1=0.9, b2=0.999, weight_decay=0.01):
    """Adam, and a step towards 0 by learning_rate * weight_decay of each kernel (Loshchilov & Hutter 2019).

    Norms, biases and embeddings, which are not named kernel, do not decay.
    """

    def decayed(path, leaf):
        return weight_decay * leaf if _is_kernel(path) else jnp.zeros_like(leaf)

    def update(updates, state, params=None):
        decay = jax.tree_util.tree_map_with_path(decayed, vectors.unpack(params))
        return jax.tree.map(jnp.add, updates, vectors.pack_like(params, decay)), state

    decay_kernels = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.scale_by_adam(b1, b2), decay_kernels, optax.scale_by_learning_rate(learning_rate))


def muon(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0):
    """Muon (Jordan et al. 2024): the update of a hidden layer's kernel is its momentum, made orthogonal.

    Its root mean square is 0.2 of the learning rate, about that of Adam's (Liu et al. 2025), which updates all other
    parameters, with Nesterov's momentum. Only the kernels of hidden layers decay.
    """
    optimizer = optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimension_numbers,
    )

    def update(updates, state, params=None):  # a Vector has lost the shapes of its arrays
        new, state = optimizer.update(vectors.unpack(updates), state, vectors.unpack(params))
        return vectors.pack_like(params, new), state

    return optax.GradientTransformation(lambda params: optimizer.init(vectors.unpack(params)), update)


FIRST_AND_LAST = {"conv_in", "embed", "time_1", "label", "augmentation", "conv_out", "out"}  # not hidden layers


def muon_dimension_numbers(params):
    """The tree of Muon's parameters, each with the axes of its inputs and outputs; None in place of the others.

    These are the kernels of hidden layers: (in, out), or (height, width, in, out) of a convolution, which is the matrix
    (height width in, out). Further axes at the front count matrices, as of layers in a scan.
    """

    def axes(path, leaf):
        if not _is_kernel(path) or getattr(path[0], "key", None) in FIRST_AND_LAST:
            return None
        return optax.contrib.MuonDimensionNumbers((-4, -3, -2) if leaf.ndim >= 4 else (-2,), (-1,))

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_kernel(path):
    return bool(path) and getattr(path[-1], "key", None) == "kernel"


OPTIMIZERS = {"adam": optax.adam, "adamw": adamw, "muon": muon}


def make_optimizer(learning_rate, grad_clip, name="adam", **options):
    """An entry of OPTIMIZERS on gradients clipped to the global norm `grad_clip`.

    By default Adam (Kingma & Ba 2015), as in Ho et al. 2020, appendix B.
    """
    return optax.chain(_clip_by_global_norm(grad_clip), OPTIMIZERS[name](learning_rate, **options))


def _clip_by_global_norm(max_norm):
    """Like optax's, but multiplies by one factor instead of dividing by the norm: on CPU the divisions, fused into
    Adam's loops, took half the time of the update (measured)."""

    def update(grad, state, params=None):
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grad))
        return jax.tree.map(lambda g: scale * g, grad), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init_state(params, optimizer, time_sampling=TIME_SAMPLINGS["uniform"], lengths=()):
    """The state before the first step. Other arguments: see make_train_step."""
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 + len(lengths))]
    return TrainState(*zero, params, copies[0], optimizer.init(params), time_sampling.init(), tuple(copies[1:]))


def ema_rate(ema_decay, n):
    """1 - decay of the EMA after n updates. The warm-up, 9 / (10 + n), makes it forget the initialisation early."""
    return jnp.maximum(1 - ema_decay, 9 / (10 + n))


def ema_init_share(ema_decay, n):
    """The weight of the initialisation in the EMA after n updates, in closed form (float64)."""
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
    decay=DECAYS["constant"],
    span=(0, 1),
):
    """train_step(state, batch, root, scale=1.0, span=span) -> state, metrics, to be mapped over devices along `axis`.

    loss: of one image, as made by diffusion.make_loss. batch: {"index": (b,), "image": uint8 (b, H, W, C), "label"?:
    (b,)}, the part of this device; root: the key of the stream "train"; scale: a factor on the learning rate.
    accumulate: the number of micro-batches, which saves memory; lengths: sigma_rel of the power-function averages;
    decay: of the learning rate, an entry of DECAYS, between the updates of `span`.
    Metrics are scalars: loss, its parts by quartile of u (loss_q1 + ... + loss_q4 = 4 loss), grad_norm, param_norm,
    skipped, skipped_in_row. A non-finite gradient changes only the counters.
    """

    gammas = [averages.gamma(length) for length in lengths]
    loss_and_grad = _make_loss_and_grad(loss, flip, time_sampling)

    def train_step(state, batch, root, scale=1.0, span=span):
        key = jax.random.fold_in(root, state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        rows = len(batch["index"])
        size, position = rows * lax.axis_size(axis), rows * lax.axis_index(axis) + jnp.arange(rows)
        u, weight = time_sampling.draw(state.times, key, keys, position, size)
        local_means = _mean_over_microbatches(loss_and_grad, accumulate, state.params, keys, batch, u, weight)
        metrics, statistics, grad = _mean_over_devices(local_means, axis)
        grad_norm = optax.tree.norm(grad)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])

        def update(state):
            n = state.step - state.skipped
            updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
            factor = scale * decay_factor(decay, n, span)
            params = optax.apply_updates(state.params, jax.tree.map(lambda x: factor * x, updates))
            ema_params = optax.incremental_update(params, state.ema_params, ema_rate(ema_decay, n))
            power_averages = tuple(
                optax.incremental_update(params, average, averages.update_rate(gamma, n + 1))
                for gamma, average in zip(gammas, state.averages, strict=True)
            )
            times = time_sampling.update(state.times, jax.tree.map(lambda x: size * x, statistics))
            state = state._replace(params=params, ema_params=ema_params, opt_state=opt_state)
            return state._replace(times=times, averages=power_averages, skipped_in_row=jnp.int32(0))

        def skip(state):
            return state._replace(skipped=state.skipped + 1, skipped_in_row=state.skipped_in_row + 1)

        # lax.cond lets XLA update in place; selecting by jnp.where took three times as long on CPU (measured).
        new = lax.cond(finite, update, skip, state)
        new = new._replace(step=state.step + 1)
        counters = {"skipped": new.skipped, "skipped_in_row": new.skipped_in_row}
        return new, metrics | {"grad_norm": grad_norm, "param_norm": optax.tree.norm(new.params)} | counters

    return train_step


def _make_loss_and_grad(loss, flip, time_sampling):
    """(params, keys, batch, u, weight) -> metrics, statistics of `time_sampling`, gradient; means over the batch."""

    def image_loss(params, key, image, label, u, weight):
        x_0 = to_unit(image)
        if flip:
            x_0 = jnp.where(jax.random.bernoulli(named(key, "flip")), x_0[:, ::-1], x_0)
        value = loss(params, key, x_0, label, u)
        quartiles = {f"loss_q{q + 1}": 4 * weight * value * (jnp.floor(4 * u) == q) for q in range(4)}
        return weight * value, (quartiles, time_sampling.observe(u, value))

    def batch_loss(params, keys, batch, u, weight):
        losses, aux = jax.vmap(image_loss, (None, 0, 0, 0, 0, 0))(
            vectors.unpack(params), keys, batch["image"], batch.get("label"), u, weight
        )
        return jnp.mean(losses), jax.tree.map(lambda x: jnp.mean(x, 0), aux)

    def loss_and_grad(*args):
        (value, (quartiles, statistics)), grad = jax.value_and_grad(batch_loss, has_aux=True)(*args)
        return {"loss": value, **quartiles}, statistics, grad

    return loss_and_grad


def _mean_over_devices(tree, axis):
    """lax.pmean. On several CPU devices, one flat vector is faster than leaf by leaf (measured)."""

    def as_vector(tree):
        vector, unravel = ravel_pytree(tree)
        return unravel(lax.pmean(vector, axis))

    def leaf_by_leaf(tree):
        return lax.pmean(tree, axis)

    cpu = leaf_by_leaf if lax.axis_size(axis) == 1 else as_vector
    return lax.platform_dependent(tree, cpu=cpu, default=leaf_by_leaf)


def ensemble_steps(train_step, axis="batch"):
    """`scan_steps` for several members on one device: all arguments and results have a leading axis of members.

    On CPU the members run one by one, because batched convolutions with different kernels are slow there (measured).
    """

    def single_step(state, batch, *others):
        step = jax.vmap(train_step, (None, 0, *[None] * len(others)), None, axis_name=axis)
        return step(state, jax.tree.map(lambda x: x[None], batch), *others)

    member_steps = scan_steps(single_step)

    def one_by_one(*args):
        return lax.map(lambda args: member_steps(*args), args)

    def steps(*args):
        return lax.platform_dependent(*args, cpu=one_by_one, default=jax.vmap(member_steps))

    return steps


def scan_steps(train_step):
    """`train_step` over batches (n, b, ...) of n steps in one call; the metrics also get a leading axis of steps."""

    def steps(state, batches, *others):
        single = len(jax.tree.leaves(batches)[0]) == 1
        return lax.scan(lambda state, batch: train_step(state, batch, *others), state, batches, unroll=single)

    return steps


def _mean_over_microbatches(function, num, params, *args):
    """Gradient accumulation: the mean of function(params, *microbatch) over `num` equal slices of `args` (axis 0)."""
    if num == 1:
        return function(params, *args)

    def body(total, microbatch):
        return jax.tree.map(jnp.add, total, function(params, *microbatch)), None

    microbatches = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), args)
    shapes = jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], microbatches))
    total, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, shapes), microbatches)
    return jax.tree.map(lambda x: x / num, total)

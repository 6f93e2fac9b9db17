"""Training steps over a few devices, and a loss whose gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import training

ROOT = jax.random.key(0)


def batch_of(n, shape=(8, 8, 1), seed=0):
    random = np.random.default_rng(seed)
    return {"index": np.arange(n, dtype=np.int32), "image": random.integers(0, 256, (n, *shape), np.uint8)}


def run(step, state, batch, devices=1, times=1):
    """`times` steps over the first `devices` devices; (state, metrics) with every replica of every array compared."""
    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0, None), out_axes=None, devices=jax.devices()[:devices])
    shards = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    for _ in range(times):
        state, metrics = mapped(state, shards, ROOT)
    return state, metrics


def pull(params, key, x_0, label=None, u=None):
    """A loss with a known gradient: half the squared distance of the one parameter from the image's mean."""
    return 0.5 * (params["w"] - jnp.mean(x_0)) ** 2


def one_parameter(optimizer, w=0.0):
    return training.init_state({"w": jnp.float32(w)}, optimizer)

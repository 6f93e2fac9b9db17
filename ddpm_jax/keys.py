"""Random keys by name, so that every draw is a function of (seed, name, step, index of the image).

No key is split, carried or saved: a resumed run makes the same draws, and image i of a seed is the same picture in
any batch and on any number of devices, to one grey level: the noise is the same, and the network rounds differently.
"""

import zlib

import jax


def named(key: jax.Array, name: str) -> jax.Array:
    """The key of the stream `name` under `key`; a new name changes no other stream."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def root(seed: int, name: str) -> jax.Array:
    """The key from which everything called `name` ("init", "train", "sample") is drawn in a run."""
    # Threefry also where JAX_DEFAULT_PRNG_IMPL says rbg, under which all images of a vmap are drawn from the first key.
    return named(jax.random.key(seed, impl="threefry2x32"), name)

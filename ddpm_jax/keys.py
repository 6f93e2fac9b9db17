"""Named random keys: every random number is a function of (seed, name, step, index of the image).

No key is split, carried or saved. A resumed run therefore draws the same numbers. Image i of a seed has the same noise
in any batch and on any number of devices, so it is the same image, to one grey level (the network's rounding differs).
"""

import zlib

import jax


def named(key: jax.Array, name: str) -> jax.Array:
    """The key of the stream `name` under `key`. Adding a stream does not change the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def root(seed: int, name: str) -> jax.Array:
    """The root key of the stream `name` ("init", "train" or "sample") of a run."""
    # Always Threefry: with rbg (JAX_DEFAULT_PRNG_IMPL) vmap would draw the numbers of all images from the first key.
    return named(jax.random.key(seed, impl="threefry2x32"), name)

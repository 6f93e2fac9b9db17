"""The Inception network of the published FID: the TensorFlow graph of 2015-12-05 up to pool3, 2048 features.

It is Inception v3 (Szegedy et al. 2015) with the peculiarities of that graph: average pools exclude the padding, the
last block has a max pool, images are resized as in TensorFlow 1 and scaled by (x - 128) / 128. The weights may not be
distributed here; they come from a file with the tensor names of the usual conversion to PyTorch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.evaluation.features import layers

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # pt_inception-2015-12-05-6726825d.pth
SIZE = 299

A = ["branch1x1", "branch5x5_1", "branch5x5_2", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", "branch_pool"]
B = ["branch3x3", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
C = ["branch1x1", *(f"branch7x7_{i}" for i in (1, 2, 3)), *(f"branch7x7dbl_{i}" for i in range(1, 6)), "branch_pool"]
D = ["branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in range(1, 5))]
E = ["branch1x1", "branch3x3_1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_1", "branch3x3dbl_2"]
E += ["branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"]
STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
MIXED = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D, "7b": E, "7c": E}


def params(tensors, where):
    """The network's parameters from a state dict, batch norms folded into the convolutions."""
    names = STEM + [f"Mixed_{block}.{layer}" for block, own in MIXED.items() for layer in own]
    return {name: layers.fold_batch_norm(tensors, f"{name}.conv", f"{name}.bn", where) for name in names}


def _pool(x, start, combine, stride, padding):
    return lax.reduce_window(x, start, combine, (3, 3, 1), (stride, stride, 1), padding)


def _max_pool(x, stride=2, padding="VALID"):
    return _pool(x, -jnp.inf, lax.max, stride, padding)


def _mean_pool(x):
    """The mean over 3x3 pixels, excluding the padding."""
    return _pool(x, 0.0, lax.add, 1, "SAME") / _pool(jnp.ones_like(x), 0.0, lax.add, 1, "SAME")


def features(params, x):
    """pool3, (2048,), for an image (299, 299, 3) from `preprocess`."""

    def layer(name, x, stride=1, padding="SAME"):
        return jax.nn.relu(layers.convolve(x, params[name], stride, padding))

    def chain(block, names, x):
        for name in names.split():
            x = layer(f"Mixed_{block}.branch{name}", x)
        return x

    def strided(block, name, x):
        return layer(f"Mixed_{block}.branch{name}", x, 2, "VALID")

    def concatenated(*branches):
        return jnp.concatenate(branches, -1)

    x = layer("Conv2d_1a_3x3", x, 2, "VALID")
    x = layer("Conv2d_2b_3x3", layer("Conv2d_2a_3x3", x, padding="VALID"))
    x = layer("Conv2d_3b_1x1", _max_pool(x))
    x = _max_pool(layer("Conv2d_4a_3x3", x, padding="VALID"))
    for block in ("5b", "5c", "5d"):
        x = concatenated(
            chain(block, "1x1", x),
            chain(block, "5x5_1 5x5_2", x),
            chain(block, "3x3dbl_1 3x3dbl_2 3x3dbl_3", x),
            chain(block, "_pool", _mean_pool(x)),
        )
    x = concatenated(
        strided("6a", "3x3", x), strided("6a", "3x3dbl_3", chain("6a", "3x3dbl_1 3x3dbl_2", x)), _max_pool(x)
    )
    for block in ("6b", "6c", "6d", "6e"):
        x = concatenated(
            chain(block, "1x1", x),
            chain(block, "7x7_1 7x7_2 7x7_3", x),
            chain(block, "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", x),
            chain(block, "_pool", _mean_pool(x)),
        )
    x = concatenated(
        strided("7a", "3x3_2", chain("7a", "3x3_1", x)),
        strided("7a", "7x7x3_4", chain("7a", "7x7x3_1 7x7x3_2 7x7x3_3", x)),
        _max_pool(x),
    )
    for block, pool in (("7b", _mean_pool), ("7c", lambda x: _max_pool(x, 1, "SAME"))):
        short, long = chain(block, "3x3_1", x), chain(block, "3x3dbl_1 3x3dbl_2", x)
        x = concatenated(
            chain(block, "1x1", x),
            chain(block, "3x3_2a", short),
            chain(block, "3x3_2b", short),
            chain(block, "3x3dbl_3a", long),
            chain(block, "3x3dbl_3b", long),
            chain(block, "_pool", pool(x)),
        )
    return x.mean((0, 1))


def resize(image, size=SIZE):
    """TensorFlow 1's resize_bilinear: pixel i of n is at i / n, without half-pixel offset or antialiasing."""
    for axis in (0, 1):
        side = image.shape[axis]
        position = np.arange(size, dtype=np.float32) * np.float32(side / size)
        low = position.astype(int)
        weight = np.expand_dims(position - low, (1, 2) if axis == 0 else (0, 2))
        first, second = (image.take(i, axis) for i in (low, np.minimum(low + 1, side - 1)))
        image = first + (second - first) * weight
    return image


def preprocess(image):
    """The network's input from uint8 (H, W, C): (299, 299, 3), -1..1."""
    return (resize(layers.to_rgb(image)) - 128) / 128


def apply(params, image):
    """uint8 (H, W, C) -> (2048,)."""
    return features(params, preprocess(image))

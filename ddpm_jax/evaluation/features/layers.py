"""Layers of the feature extractors, for one image (H, W, C), in full float32 on every device."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.errors import CheckpointError

EPS = 1e-3  # of the batch norms, in both networks


def fold_batch_norm(tensors, convolution, norm, where):
    """(weight (h, w, in, out), bias) of a bias-free convolution in PyTorch's layout and the batch norm after it."""
    names = [f"{convolution}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"{where} has no tensor {name}; it is not a file of this network")
    weight, gain, shift, mean, variance = (tensors[name].astype(np.float64) for name in names)
    scale = gain / np.sqrt(variance + EPS)
    return (weight.transpose(2, 3, 1, 0) * scale).astype(np.float32), (shift - mean * scale).astype(np.float32)


def convolve(x, layer, stride=1, padding="SAME"):
    """The convolution of (H, W, C) with a layer (weight, bias)."""
    weight, bias = layer
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": lax.Precision.HIGHEST}
    return lax.conv_general_dilated(x[None], weight, (stride, stride), padding, **options)[0] + bias


def to_rgb(image):
    """An image as float32 with three channels; a gray channel is repeated."""
    image = jnp.asarray(image, jnp.float32)
    return jnp.repeat(image, 3, -1) if image.shape[-1] == 1 else image

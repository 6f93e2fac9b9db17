"""What the feature extractors have in common; maths for one image (H, W, C), in full float32 on every device."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.errors import CheckpointError

EPS = 1e-3  # of the batch norms, in both networks


def folded(tensors, convolution, norm, where):
    """(weight (h, w, in, out), bias) of a convolution without bias (torch's layout) and the batch norm after it."""
    names = [f"{convolution}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"{where} has no tensor {name}; it does not hold this network")
    weight, gain, shift, mean, variance = (tensors[name].astype(np.float64) for name in names)
    scale = gain / np.sqrt(variance + EPS)
    return (weight.transpose(2, 3, 1, 0) * scale).astype(np.float32), (shift - mean * scale).astype(np.float32)


def convolve(x, layer, stride=1, padding="SAME"):
    weight, bias = layer
    numbers = ("NHWC", "HWIO", "NHWC")
    precision = lax.Precision.HIGHEST
    stride = (stride, stride)
    return (
        lax.conv_general_dilated(x[None], weight, stride, padding, dimension_numbers=numbers, precision=precision)[0]
        + bias
    )


def rgb(image):
    """An image as float32 with three channels, a gray one repeated."""
    image = jnp.asarray(image, jnp.float32)
    return jnp.repeat(image, 3, -1) if image.shape[-1] == 1 else image

"""Faster implementations of the U-Net's 3x3 convolutions. They differ from XLA's by rounding only.

The signatures fit the `conv_general_dilated` argument of nn.Conv. x: (N, H, W, C), kernel: (3, 3, C, F).
"""

import contextlib
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

MIN_CHANNELS = 128  # from this number on, minimal filtering is faster on CPU; with 32 and 64 channels it was slower


def same(x, kernel, *_, **__):
    """The SAME convolution, (N, H, W, F): minimal filtering for many channels on CPU, otherwise XLA's own."""
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    if even and x.dtype == jnp.float32 and min(kernel.shape[2:]) >= MIN_CHANNELS:
        return _same.bind(x, kernel)
    return direct(x, kernel)


@contextlib.contextmanager
def direct_only():
    """Trace networks without minimal filtering, whose compilation time grows with the size of the images."""
    global MIN_CHANNELS
    previous, MIN_CHANNELS = MIN_CHANNELS, math.inf
    try:
        yield
    finally:
        MIN_CHANNELS = previous


def upsampled(x, kernel, *_, **__):
    """The SAME convolution of x after nearest-neighbour upsampling, (N, 2 H, 2 W, F).

    Each window covers only 2x2 different pixels, so it is one of four convolutions of x itself. Their 2x2 kernels are
    sums of rows and columns of the kernel, with 4/9 of the multiplications.
    """

    def fold(kernel, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)

    return _interleave(
        [
            [direct(x, k, [(1 - i, i), (1 - j, j)]) for j, k in enumerate(fold(rows, 1))]
            for i, rows in enumerate(fold(kernel, 0))
        ]
    )


def direct(x, kernel, padding="SAME"):
    """XLA's own convolution."""
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def minimal_filtering(x, kernel):
    """The SAME convolution for even H, W (Winograd): F(2x2, 3x3) of Lavin & Gray 2016 (arXiv:1509.09308, section 4.1).

    In 1D, two outputs of a convolution with three weights need 4 products instead of 6; in 2D, a tile of 2x2 outputs
    needs 16 instead of 36. For all tiles, each of the 16 is a matrix product of (N H W / 4, C) by (C, F).
    """

    def transform_input(a, b, c, d):
        return a - c, b + c, c - b, b - d

    def transform_kernel(a, b, c):
        return a, (a + b + c) / 2, (a - b + c) / 2, c

    def transform_output(a, b, c, d):
        return a + b + c, b - c - d

    def on_both_axes(function, grid):
        return [function(*column) for column in zip(*(function(*row) for row in grid), strict=True)]

    n, height, width, channels = x.shape
    h, w = height // 2, width // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, h + 1, 2, w + 1, 2, channels)
    rows, columns = ([(slice(i, i + size), parity) for i in (0, 1) for parity in (0, 1)] for size in (h, w))
    tiles = [[x[:, *row, *column].reshape(n * h * w, channels) for column in columns] for row in rows]
    factors = zip(on_both_axes(transform_input, tiles), on_both_axes(transform_kernel, kernel), strict=True)
    # The barrier keeps a gradient's transpose in the product, where it is free; XLA would move it before the product.
    products = [[lax.optimization_barrier(v @ u) for v, u in zip(*row, strict=True)] for row in factors]
    return _interleave([[y.reshape(n, h, w, -1) for y in row] for row in on_both_axes(transform_output, products)])


def _interleave(parts):
    """The image (N, 2 H, 2 W, F) whose pixel (2 h + i, 2 w + j) is pixel (h, w) of parts[i][j], each (N, H, W, F)."""
    n, height, width, features = parts[0][0].shape
    rows = [jnp.stack(row, 3) for row in parts]
    return jnp.stack(rows, 2).reshape(n, 2 * height, 2 * width, features)


def _input_gradient_of(convolve):
    """The function (gradient of the output, kernel) -> gradient of x, for convolve(x, kernel)."""

    def input_gradient(y, kernel):
        x = jax.ShapeDtypeStruct((*y.shape[:-1], kernel.shape[2]), y.dtype)
        return jax.linear_transpose(lambda x: convolve(x, kernel), x)(y)[0]

    return input_gradient


def _kernel_gradient_of(convolve):
    """The function (gradient of the output, x) -> gradient of the kernel, for convolve(x, kernel)."""

    def kernel_gradient(y, x):
        kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], y.shape[-1]), x.dtype)
        return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(y)[0]

    return kernel_gradient


def _deferred(gradient):
    """`gradient`(y, other) in which `other` depends on y, so that XLA does not transform it before y is known.

    Otherwise XLA would do so in the forward pass and keep the result, which is two or four times as large as `other`.
    """
    return lambda y, other: gradient(y, other + 0 * y[0, 0, 0, 0])


# The convolution and its two gradients are primitives for two reasons: the implementation is chosen when the platform
# is known, and vmap merges its axis into that of the images. As a separate axis in the matrix products it would make
# the gradient of a kernel slow. Each primitive is linear in both arguments; its transposes are the other two.


def _primitive(name, default, on_cpu, shape, merge_batch=True):
    """A primitive of two arrays. merge_batch: vmap may merge its axis into the images of the first argument."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(lambda a, b: jax.core.ShapedArray(shape(a.shape, b.shape), a.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(jax.jit(default), multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(jax.jit(on_cpu), multiple_results=False), platform="cpu")

    def batched(arguments, axes):
        if not merge_batch or axes[1] is not None:
            return jax.vmap(default, axes)(*arguments), 0
        images = jnp.moveaxis(arguments[0], axes[0], 0)
        result = primitive.bind(images.reshape(-1, *images.shape[2:]), arguments[1])
        return result.reshape(*images.shape[:-1], -1), 0

    batching.primitive_batchers[primitive] = batched
    return primitive


_same = _primitive("same", direct, minimal_filtering, lambda x, kernel: (*x[:-1], kernel[3]))
_input_gradient = _primitive(
    "same_input_gradient",
    _input_gradient_of(direct),
    _deferred(_input_gradient_of(minimal_filtering)),
    lambda y, kernel: (*y[:-1], kernel[2]),
)
_kernel_gradient = _primitive(
    "same_kernel_gradient",
    _kernel_gradient_of(direct),
    _deferred(_kernel_gradient_of(minimal_filtering)),
    lambda y, x: (3, 3, x[-1], y[-1]),
    merge_batch=False,
)
ad.defbilinear(_same, lambda y, x, k: _input_gradient.bind(y, k), lambda y, x, k: _kernel_gradient.bind(y, x))
ad.defbilinear(_input_gradient, lambda x, y, k: _same.bind(x, k), lambda x, y, k: _kernel_gradient.bind(y, x))
ad.defbilinear(_kernel_gradient, lambda k, y, x: _same.bind(x, k), lambda k, y, x: _input_gradient.bind(y, k))

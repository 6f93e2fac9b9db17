"""3x3 convolutions of the U-Net in other forms than XLA's, where these are faster; values differ by rounding only.

The functions have the arguments that nn.Conv gives its `conv_general_dilated`. x: (N, H, W, C), kernel: (3, 3, C, F).
"""

import contextlib
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

MIN_CHANNELS = 128  # channels from which minimal filtering is faster on a CPU; at 32 and 64 it was slower


def same(x, kernel, *_, **__):
    """The SAME convolution, (N, H, W, F); of many channels on a CPU by minimal filtering, else XLA's own."""
    halves = x.shape[1] % 2 == x.shape[2] % 2 == 0
    if halves and x.dtype == jnp.float32 and min(kernel.shape[2:]) >= MIN_CHANNELS:
        return _same.bind(x, kernel)
    return direct(x, kernel)


@contextlib.contextmanager
def direct_only():
    """Within it, networks are traced without minimal filtering, which XLA compiles the slower the larger the images."""
    global MIN_CHANNELS
    usual, MIN_CHANNELS = MIN_CHANNELS, math.inf
    try:
        yield
    finally:
        MIN_CHANNELS = usual


def upsampled(x, kernel, *_, **__):
    """The SAME convolution of x with each pixel repeated 2x2, (N, 2 H, 2 W, F).

    There every window sees only 2x2 different pixels, with one of four sums of the kernel's rows and columns; these are
    four convolutions of x itself, with 4/9 of the products.
    """

    def halves(kernel, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)

    return _interleave(
        [
            [direct(x, k, [(1 - i, i), (1 - j, j)]) for j, k in enumerate(halves(row, 1))]
            for i, row in enumerate(halves(kernel, 0))
        ]
    )


def direct(x, kernel, padding="SAME"):
    """XLA's own convolution."""
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def minimal_filtering(x, kernel):
    """The SAME convolution for even H and W, by F(2x2, 3x3) of Lavin & Gray 2016 (arXiv:1509.09308, section 4.1).

    Two neighbours of a convolution with three weights take four products in place of six, both ways a tile of 2x2
    takes 16 in place of 36. Of each of the 16 all tiles together are one product of matrices, (N H W / 4, C) by (C, F).
    """

    def inputs(a, b, c, d):
        return a - c, b + c, c - b, b - d

    def weights(a, b, c):
        return a, (a + b + c) / 2, (a - b + c) / 2, c

    def outputs(a, b, c, d):
        return a + b + c, b - c - d

    def both_ways(function, grid):
        return [function(*column) for column in zip(*(function(*row) for row in grid), strict=True)]

    n, height, width, channels = x.shape
    h, w = height // 2, width // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, h + 1, 2, w + 1, 2, channels)
    rows, columns = ([(slice(i, i + size), parity) for i in (0, 1) for parity in (0, 1)] for size in (h, w))
    tiles = [[x[:, *row, *column].reshape(n * h * w, channels) for column in columns] for row in rows]
    terms = zip(both_ways(inputs, tiles), both_ways(weights, kernel), strict=True)
    # The barrier keeps XLA from moving the transposition of a gradient from the product, where it is free, before it.
    products = [[lax.optimization_barrier(v @ u) for v, u in zip(*row, strict=True)] for row in terms]
    return _interleave([[y.reshape(n, h, w, -1) for y in row] for row in both_ways(outputs, products)])


def _interleave(parts):
    """The image (N, 2 H, 2 W, F) whose pixel (2 h + i, 2 w + j) is pixel (h, w) of parts[i][j], each (N, H, W, F)."""
    n, height, width, features = parts[0][0].shape
    rows = [jnp.stack(row, 3) for row in parts]
    return jnp.stack(rows, 2).reshape(n, 2 * height, 2 * width, features)


def _input_gradient_of(form):
    """The function (gradient of form(x, kernel), kernel) -> gradient of x."""

    def input_gradient(y, kernel):
        x = jax.ShapeDtypeStruct((*y.shape[:-1], kernel.shape[2]), y.dtype)
        return jax.linear_transpose(lambda x: form(x, kernel), x)(y)[0]

    return input_gradient


def _kernel_gradient_of(form):
    """The function (gradient of form(x, kernel), x) -> gradient of the kernel."""

    def kernel_gradient(y, x):
        kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], y.shape[-1]), x.dtype)
        return jax.linear_transpose(lambda kernel: form(x, kernel), kernel)(y)[0]

    return kernel_gradient


def _late(gradient):
    """The function `gradient` (y, other), of which XLA has `other` only once it has y.

    It would make the terms of `other` on the way forwards and keep them, twice or four times as large.
    """
    return lambda y, other: gradient(y, other + 0 * y[0, 0, 0, 0])


# The convolution and its two gradients are primitives, for two reasons. Which form they take is chosen when the
# platform is known. And under vmap the batch joins the images; in a product of matrices it would stay apart from the
# rows, and the gradient of a kernel would be slow. Each is linear in both arguments; its transposes are the other two.


def _primitive(name, form, on_cpu, shape, joins=True):
    """A primitive of two arrays; `joins`: it treats the images of its first argument one by one."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(lambda a, b: jax.core.ShapedArray(shape(a.shape, b.shape), a.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(jax.jit(form), multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(jax.jit(on_cpu), multiple_results=False), platform="cpu")

    def of_batch(arguments, axes):
        if not joins or axes[1] is not None:
            return jax.vmap(form, axes)(*arguments), 0
        images = jnp.moveaxis(arguments[0], axes[0], 0)
        result = primitive.bind(images.reshape(-1, *images.shape[2:]), arguments[1])
        return result.reshape(*images.shape[:-1], -1), 0

    batching.primitive_batchers[primitive] = of_batch
    return primitive


_same = _primitive("same", direct, minimal_filtering, lambda x, kernel: (*x[:-1], kernel[3]))
_input_gradient = _primitive(
    "same_input_gradient",
    _input_gradient_of(direct),
    _late(_input_gradient_of(minimal_filtering)),
    lambda y, kernel: (*y[:-1], kernel[2]),
)
_kernel_gradient = _primitive(
    "same_kernel_gradient",
    _kernel_gradient_of(direct),
    _late(_kernel_gradient_of(minimal_filtering)),
    lambda y, x: (3, 3, x[-1], y[-1]),
    joins=False,
)
ad.defbilinear(_same, lambda y, x, k: _input_gradient.bind(y, k), lambda y, x, k: _kernel_gradient.bind(y, x))
ad.defbilinear(_input_gradient, lambda x, y, k: _same.bind(x, k), lambda x, y, k: _kernel_gradient.bind(y, x))
ad.defbilinear(_kernel_gradient, lambda k, y, x: _same.bind(x, k), lambda k, y, x: _input_gradient.bind(y, k))

"""The U-Net's convolutions and products, in forms with fast gradients on CPU. They differ from XLA's by rounding only.

`convolve`, `upsampled` and `product` fit the arguments conv_general_dilated of nn.Conv and dot_general of nn.Dense,
also in networks of your own. x: (N, H, W, C), kernel: (kh, kw, C, F).

Inside a loop, XLA on CPU does not recognize the gradients of a convolution, and runs them up to 200 times slower than
outside (findings/xla-gradients-in-loops.sh). Here both are convolutions that it recognizes everywhere.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

MIN_CHANNELS = 128  # of input and output, from which minimal filtering is faster (see choose_forms)
SAME = ((1, 1), (1, 1))


class Forms(NamedTuple):
    """Names in FORMS: how a convolution and its two gradients are computed on CPU."""

    output: str
    input_gradient: str
    kernel_gradient: str


def choose_forms(shape, kernel_shape, stride=1, padding=SAME, dtype=jnp.float32):
    """The Forms of the convolution of x, of `shape` (N, H, W, C), with a kernel of `kernel_shape` (kh, kw, C, F).

    `python -m benchmarks.convolutions` measures all of them (docs/performance.md). N does not count, because a network
    of one image does not know it. XLA's own gradients, slow in loops, are chosen only where no other form fits.
    """
    given = shape[1:3], kernel_shape[:2], stride, padding
    if fits("minimal_filtering", *given) and dtype == jnp.float32 and min(kernel_shape[2:]) >= MIN_CHANNELS:
        return Forms(*["minimal_filtering"] * 3)
    if math.prod(shape[1:3]) < math.prod(kernel_shape[:2]):
        return Forms(*["im2col"] * 3)
    gradient = next(name for name in ("convolution", "phases", "xla") if fits(name, *given))
    return Forms("xla", gradient, gradient)


def fits(form, sides, size, stride, padding):
    """Whether `form`, a name in FORMS, can compute the convolution: (height, width) of images and kernel."""
    even = size == (3, 3) and not any(side % 2 for side in sides)
    halving = stride == 2 and all(low in (0, 1) and low + high in (1, 2) for low, high in padding)
    return {
        "minimal_filtering": even and stride == 1 and padding == SAME,
        "phases": even and halving,
        "convolution": stride == 1,
    }.get(form, True)


def convolve(x, kernel, strides=(1, 1), padding="SAME", **options):
    """The convolution with stride 1 or 2 and zero padding ((top, bottom), (left, right)), SAME or VALID.

    On CPU in the forms of `choose_forms`, otherwise XLA's own. Raises ValueError for groups and dilations.
    """
    dilated = {*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())} - {1}
    if tuple(strides) not in ((1, 1), (2, 2)) or options.get("feature_group_count", 1) != 1 or dilated:
        raise ValueError(f"only a stride of 1 or 2, no groups, no dilation: {strides=}, {options}")
    size, stride = kernel.shape[:2], strides[0]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    padding = tuple(map(tuple, padding))
    forms = choose_forms(x.shape, kernel.shape, stride, padding, x.dtype)
    return _convolution.bind(x, kernel, stride=stride, padding=padding, forms=forms)


def product(x, kernel, dimension_numbers, **_):
    """The product of every pixel (H, W, C) with a matrix (C, F): a convolution of 1x1. Vectors: lax.dot_general."""
    if x.ndim != 3:
        return lax.dot_general(x, kernel, dimension_numbers)
    return convolve(x[None], kernel[None, None], padding=((0, 0), (0, 0)))[0]


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
            [convolve(x, k, padding=[(1 - i, i), (1 - j, j)]) for j, k in enumerate(fold(rows, 1))]
            for i, rows in enumerate(fold(kernel, 0))
        ]
    )


def direct(x, kernel, stride=1, padding=SAME):
    """XLA's own convolution; of 1x1 without padding, its product of matrices."""
    if kernel.shape[:2] == (1, 1) and stride == 1 and not any(map(any, padding)):
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def im2col(x, kernel, stride=1, padding=SAME):
    """The convolution as one product of all windows of x with the kernel; fast for fewer pixels than the kernel has.

    XLA exchanges the two in such a convolution and then has no fast one on CPU (findings/xla-few-pixels.sh). A step of
    a U-Net with a level of 2x2 pixels took 1.6 times as long (measured).
    """
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)])
    sides = [(n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)]
    rows, columns = (
        [slice(i, i + stride * (n - 1) + 1, stride) for i in range(k)]
        for n, k in zip(sides, kernel.shape[:2], strict=True)
    )
    windows = jnp.concatenate([x[:, row, column] for row in rows for column in columns], -1)
    return lax.dot_general(windows, kernel.reshape(-1, kernel.shape[3]), (((3,), (0,)), ((), ())))


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


def phases(x, kernel, stride=2, padding=((0, 1), (0, 1))):
    """The 3x3 convolution of stride 2 from even sides to half of them, as four of stride 1.

    They are of even and odd rows and columns.
    """

    def phase(parity, low):
        """(the first of every second weight that meets pixels of this parity, their padding) along one axis."""
        taps = [tap for tap in range(3) if (tap - low) % 2 == parity]
        return taps[0], (-((taps[0] - low) // 2), (taps[-1] - low) // 2)

    total = 0
    for i in (0, 1):
        for j in (0, 1):
            (top, rows), (left, columns) = phase(i, padding[0][0]), phase(j, padding[1][0])
            total += convolve(x[:, i::2, j::2], kernel[top::2, left::2], padding=(rows, columns))
    return total


class Form(NamedTuple):
    """A way to compute a convolution and its gradients; `size` is the height and width of what a gradient is of."""

    output: Callable  # (x, kernel, stride, padding) -> y
    input_gradient: Callable  # (y, kernel, size, stride, padding) -> gradient of x
    kernel_gradient: Callable  # (y, x, size, stride, padding) -> gradient of the kernel


def with_transposes(function, prepare=lambda y, other: other):
    """The Form of function(x, kernel, stride, padding), whose gradients are its transposes.

    prepare(y, other) is applied to the other argument of a gradient, the kernel or x.
    """

    def input_gradient(y, kernel, size, stride, padding):
        x, kernel = jax.ShapeDtypeStruct((len(y), *size, kernel.shape[2]), y.dtype), prepare(y, kernel)
        return jax.linear_transpose(lambda x: function(x, kernel, stride, padding), x)(y)[0]

    def kernel_gradient(y, x, size, stride, padding):
        kernel, x = jax.ShapeDtypeStruct((*size, x.shape[-1], y.shape[-1]), x.dtype), prepare(y, x)
        return jax.linear_transpose(lambda kernel: function(x, kernel, stride, padding), kernel)(y)[0]

    return Form(function, input_gradient, kernel_gradient)


def _defer(y, other):
    """`other`, made to depend on y, so that XLA does not transform it before y is known.

    Otherwise XLA would do so in the forward pass and keep the result, which is two or four times as large as `other`.
    """
    return other + 0 * y[0, 0, 0, 0]


def _input_gradient_as_convolution(y, kernel, size, stride, padding):
    return direct(y, kernel[::-1, ::-1].swapaxes(2, 3), 1, _transposed_padding(kernel.shape[:2], padding))


def _kernel_gradient_as_convolution(y, x, size, stride, padding):
    """A convolution in which each channel of `a` is an image, whose channels are the images of the batch.

    `b` is its kernel. Of 1x1 without padding, a product.
    """
    if size == (1, 1) and not any(map(any, padding)):
        return lax.dot_general(x, y, (((0, 1, 2), (0, 1, 2)), ((), ())))[None, None]
    # The barrier keeps what computes x and y out of the loops that transpose them, which read with strides.
    x, y = lax.optimization_barrier((x, y))
    a, b = (y, x) if y.shape[3] < x.shape[3] else (x, y)
    around = padding if a is x else _transposed_padding(size, padding)
    gradient = direct(a.transpose(3, 1, 2, 0), b.transpose(1, 2, 0, 3), 1, around)
    return gradient.transpose(1, 2, 0, 3) if a is x else gradient[:, ::-1, ::-1].transpose(1, 2, 3, 0)


def _transposed_padding(size, padding):
    """The padding of the convolution that is the transpose of one with this padding and size of kernel."""
    return [(side - 1 - low, side - 1 - high) for side, (low, high) in zip(size, padding, strict=True)]


FORMS = {
    "xla": with_transposes(direct),
    "convolution": Form(direct, _input_gradient_as_convolution, _kernel_gradient_as_convolution),
    "im2col": with_transposes(im2col),
    "minimal_filtering": with_transposes(lambda x, kernel, stride, padding: minimal_filtering(x, kernel), _defer),
    "phases": with_transposes(phases),
}


# The convolution and its two gradients are primitives for two reasons: the implementation is chosen when the platform
# is known, and vmap merges its axis into that of the images. As a separate axis in the matrix products it would make
# the gradient of a kernel slow. Each primitive is linear in both arguments; its transposes are the other two.


def _primitive(name, operation, shape, static=("size", "stride", "padding", "forms"), merge_batch=True):
    """A primitive of two arrays, for the `operation` that is a field of Form and of Forms.

    merge_batch: vmap may merge its axis into the images of the first argument.
    """
    primitive = Primitive(name)

    @partial(jax.jit, static_argnames=static)
    def default(*arrays, forms, **options):
        return getattr(FORMS["xla"], operation)(*arrays, **options)

    @partial(jax.jit, static_argnames=static)
    def on_cpu(*arrays, forms, **options):
        return getattr(FORMS[getattr(forms, operation)], operation)(*arrays, **options)

    compiled = jax.jit(primitive.bind, static_argnames=static)

    def run(*arrays, **options):
        with jax.disable_jit(False):  # without jit, bind would call this function again
            return compiled(*arrays, **options)

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda a, b, **options: jax.core.ShapedArray(shape(a, b, **options), a.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")

    def batched(arguments, axes, **options):
        if not merge_batch or axes[1] is not None:
            return jax.vmap(partial(default, **options), axes)(*arguments), 0
        images = jnp.moveaxis(arguments[0], axes[0], 0)
        result = primitive.bind(images.reshape(-1, *images.shape[2:]), arguments[1], **options)
        return result.reshape(*images.shape[:2], *result.shape[1:]), 0

    batching.primitive_batchers[primitive] = batched
    return primitive


def _output_shape(x, kernel, stride, padding, forms):
    sides = zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
    return (x.shape[0], *((n + sum(pad) - k) // stride + 1 for n, k, pad in sides), kernel.shape[3])


_convolution = _primitive("convolution", "output", _output_shape, ("stride", "padding", "forms"))
_input_gradient = _primitive(
    "convolution_input_gradient",
    "input_gradient",
    lambda y, kernel, size, **_: (y.shape[0], *size, kernel.shape[2]),
)
_kernel_gradient = _primitive(
    "convolution_kernel_gradient",
    "kernel_gradient",
    lambda y, x, size, **_: (*size, x.shape[3], y.shape[3]),
    merge_batch=False,
)


def _convolution_of(a, b, size, **options):
    return _convolution.bind(a, b, **options)


def _input_gradient_at(y, kernel, image, **options):
    return _input_gradient.bind(y, kernel, size=image.aval.shape[1:3], **options)


def _kernel_gradient_at(y, x, kernel, **options):
    return _kernel_gradient.bind(y, x, size=kernel.aval.shape[:2], **options)


ad.defbilinear(
    _convolution,
    lambda y, x, k, **options: _input_gradient_at(y, k, x, **options),
    lambda y, x, k, **options: _kernel_gradient_at(y, x, k, **options),
)
ad.defbilinear(
    _input_gradient,
    lambda x, y, k, **options: _convolution_of(x, k, **options),
    lambda x, y, k, size, **options: _kernel_gradient_at(y, x, k, **options),
)
ad.defbilinear(
    _kernel_gradient,
    lambda k, y, x, **options: _convolution_of(x, k, **options),
    lambda k, y, x, size, **options: _input_gradient_at(y, k, x, **options),
)

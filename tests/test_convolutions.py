"""The quick forms of convolutions against SciPy's sums in float64 and against XLA's own convolution."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from ddpm_jax.networks import convolutions

WIDE = convolutions.MIN_CHANNELS


def draw(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def in_float64(x, kernel):
    """The SAME convolution, summed by SciPy channel by channel in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    channels = [
        [
            sum(signal.correlate2d(image[..., c], kernel[..., c, f], "valid") for c in range(x.shape[3]))
            for image in padded
        ]
        for f in range(kernel.shape[3])
    ]
    return np.moveaxis(channels, 0, -1)


def close(value, reference, error):
    np.testing.assert_allclose(value, reference, rtol=0, atol=error * np.abs(reference).max())


@pytest.mark.parametrize("form", [convolutions.minimal_filtering, convolutions.direct])
@pytest.mark.parametrize("shape", [(2, 8, 8, 5), (1, 2, 6, 3), (3, 4, 2, 1)])
def test_it_is_the_convolution(form, shape):
    x, kernel = draw(shape, (3, 3, shape[-1], 4))
    close(form(x, kernel), in_float64(x, kernel), 2e-6)


def test_doubled_is_the_convolution_of_the_doubled_image():
    x, kernel = draw((2, 3, 4, 5), (3, 3, 5, 4))
    close(convolutions.upsampled(x, kernel), in_float64(x.repeat(2, 1).repeat(2, 2), kernel), 2e-6)


# side lengths, sides of the kernel, channels, features, stride, padding
FORMS = {
    "wide": ((4, 6), (3, 3), WIDE, WIDE + 1, 1, ((1, 1), (1, 1))),
    "few features": ((4, 6), (3, 3), 5, 3, 1, ((1, 1), (1, 1))),
    "more features": ((5, 3), (3, 3), 2, 4, 1, ((1, 1), (1, 1))),
    "part of a doubling": ((4, 6), (2, 2), 3, 2, 1, ((1, 0), (0, 1))),
    "halving": ((4, 6), (3, 3), 3, 2, 2, ((0, 1), (0, 1))),
    "symmetric halving": ((4, 6), (3, 3), 2, 3, 2, ((1, 1), (1, 1))),
    "halving odd sides": ((5, 7), (3, 3), 2, 3, 2, ((1, 1), (1, 1))),
    "few pixels": ((2, 2), (3, 3), 3, 5, 1, ((1, 1), (1, 1))),
    "halving few pixels": ((2, 3), (3, 3), 3, 2, 2, ((0, 1), (1, 1))),
    "one pixel": ((1, 1), (3, 3), 4, 2, 1, ((1, 1), (1, 1))),
    "products": ((4, 6), (1, 1), 3, 2, 1, ((0, 0), (0, 0))),
    "padded products": ((4, 6), (1, 1), 3, 2, 1, ((1, 0), (0, 2))),
    "halving without padding": ((4, 6), (3, 3), 3, 2, 2, ((0, 0), (0, 0))),
    "halving of what came before": ((4, 6), (3, 3), 2, 3, 2, ((2, 0), (2, 0))),
}


@pytest.fixture(scope="module", params=FORMS)
def both(request):
    """(ours, XLA's own): each (value, the two gradients, a derivative along a direction) of a convolution."""
    sides, size, channels, features, stride, padding = FORMS[request.param]
    shapes = (2, *sides, channels), (*size, channels, features)
    x, kernel, dx, dk = draw(*shapes, *shapes)

    def ours(x, kernel):
        return convolutions.convolve(x, kernel, (stride, stride), padding)

    def theirs(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)

    (y,) = draw(theirs(x, kernel).shape, seed=1)

    def all_of(form):
        def per_image(x, kernel):
            return jax.vmap(lambda image: form(image[None], kernel)[0])(x)

        def size_of_gradients(x, kernel):
            return sum(jnp.vdot(g, g) for g in jax.vjp(per_image, x, kernel)[1](y))

        return jax.jit(
            lambda: {
                "value": per_image(x, kernel),
                "gradients": jax.vjp(per_image, x, kernel)[1](y),
                "along": jax.jvp(per_image, (x, kernel), (dx, dk))[1],
                "of each image": jax.vmap(jax.grad(lambda k, x, y: jnp.vdot(form(x[None], k)[0], y)), (None, 0, 0))(
                    kernel, x, y
                ),
                "of several outputs": jax.vmap(jax.vjp(form, x, kernel)[1])(jnp.stack([y, -2 * y])),
                "of several kernels": jax.vmap(form, (None, 0))(x, jnp.stack([kernel, dk])),
                "second": jax.grad(size_of_gradients, (0, 1))(x, kernel),
            }
        )()

    return all_of(ours), all_of(theirs)


@pytest.mark.parametrize(
    "what", ["value", "gradients", "along", "of each image", "of several outputs", "of several kernels", "second"]
)
def test_every_derivative_is_that_of_xlas_convolution(both, what):
    ours, theirs = (jax.tree.leaves(side[what]) for side in both)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other, 5e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_that_fits_is_xlas_convolution(kind):
    """Also those that are not chosen for these shapes."""
    sides, size, channels, features, stride, padding = FORMS[kind]
    x, kernel = draw((2, *sides, channels), (*size, channels, features))
    (y,) = draw(convolutions.direct(x, kernel, stride, padding).shape, seed=1)

    def theirs(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)

    @jax.jit
    def all_of():
        ours = {
            name: (
                form.output(x, kernel, stride, padding),
                form.input_gradient(y, kernel, sides, stride, padding),
                form.kernel_gradient(y, x, size, stride, padding),
            )
            for name, form in convolutions.FORMS.items()
            if convolutions.fits(name, sides, size, stride, padding)
        }
        return ours, (theirs(x, kernel), *jax.vjp(theirs, x, kernel)[1](y))

    ours, reference = all_of()
    assert len(ours) >= 2
    for found in ours.values():
        for mine, other in zip(found, reference, strict=True):
            close(mine, other, 5e-6)


def test_a_form_that_fits_is_chosen_and_gradients_in_loops_are_fast():
    """For all small sides. XLA's own gradient is slow in loops, and other forms exist for a stride of 1."""
    channels, paddings = (1, WIDE - 1, WIDE), [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (0, 0))]
    sizes, strides, dtypes = ((3, 3), (2, 2), (1, 1)), (1, 2), (jnp.float32, jnp.bfloat16)
    for height, width, c, f, size, stride, padding, dtype in itertools.product(
        range(1, 6), range(1, 6), channels, channels, sizes, strides, paddings, dtypes
    ):
        forms = convolutions.choose_forms((1, height, width, c), (*size, c, f), stride, padding, dtype)
        assert all(convolutions.fits(name, (height, width), size, stride, padding) for name in forms)
        assert stride == 2 or "xla" not in forms[1:]
        assert dtype == jnp.float32 or "minimal_filtering" not in forms


@pytest.mark.parametrize(
    ("shape", "features", "dtype", "quick"),
    [
        ((1, 4, 4, WIDE), WIDE, "float32", True),
        ((1, 4, 4, WIDE), WIDE, "bfloat16", False),
        ((1, 4, 4, WIDE), WIDE - 1, "float32", False),
        ((1, 4, 4, WIDE - 1), WIDE, "float32", False),
        ((1, 4, 5, WIDE), WIDE, "float32", False),
    ],
)
def test_wide_ones_alone_are_products_of_matrices(shape, features, dtype, quick):
    x, kernel = jnp.ones(shape, dtype), jnp.ones((3, 3, shape[-1], features), dtype)
    program = jax.jit(convolutions.convolve).lower(x, kernel).as_text()
    assert ("stablehlo.convolution" not in program) == quick
    close(np.asarray(convolutions.convolve(x, kernel), np.float32), in_float64(*map(np.asarray, (x, kernel))), 1e-2)


def test_a_dense_layer_is_a_product_for_every_pixel():
    x, kernel, vector = draw((4, 6, 5), (5, 3), (5,))
    numbers = (((2,), (0,)), ((), ()))
    close(convolutions.product(x, kernel, numbers), x.astype(np.float64) @ kernel, 1e-6)
    close(convolutions.product(vector, kernel, (((0,), (0,)), ((), ()))), vector.astype(np.float64) @ kernel, 1e-6)


@pytest.mark.parametrize(
    ("strides", "options"),
    [((1, 2), {}), ((3, 3), {}), ((1, 1), {"rhs_dilation": (2, 2)}), ((1, 1), {"feature_group_count": 2})],
)
def test_what_it_cannot_do_is_refused(strides, options):
    with pytest.raises(ValueError, match="only a stride of 1 or 2"):
        convolutions.convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)), strides, **options)


def test_without_jit_each_operation_runs_once():
    """jax.disable_jit, with which users look for a NaN, must not send an operation back to itself."""
    x, kernel = draw((1, 4, 4, 2), (3, 3, 2, 3))

    def gradients():
        return jax.grad(lambda x, kernel: (convolutions.convolve(x, kernel) ** 2).sum(), (0, 1))(x, kernel)

    with jax.disable_jit():
        found = gradients()
    for one, other in zip(found, jax.jit(gradients)(), strict=True):
        close(one, other, 1e-6)


def test_gradients_in_a_loop_are_convolutions_that_xla_recognizes():
    """XLA on CPU calls its fast convolutions for this order of dimensions alone; outside loops it rearranges others."""

    def gradients(kernel, x):
        def output(kernel, x):
            h = convolutions.convolve(x, kernel)
            h = convolutions.convolve(h, kernel, (2, 2))
            return jnp.sum(convolutions.upsampled(h, kernel) ** 2)

        return jax.lax.scan(lambda _, x: (None, jax.grad(output, (0, 1))(kernel, x)), None, x)[1]

    program = jax.jit(gradients).lower(jnp.ones((3, 3, 4, 4)), jnp.ones((3, 2, 8, 8, 4))).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=([^,\s]*)", program)
    assert len(orders) >= 6
    assert set(orders) == {"b01f_01io->b01f"}
    assert "lhs_dilate" not in program


def test_few_pixels_are_products():
    """XLA would exchange image and kernel of a convolution of 2x2 pixels, and run it as a plain loop."""

    def gradients(x, kernel):
        return jax.grad(lambda x, kernel: jnp.sum(convolutions.convolve(x, kernel) ** 2), (0, 1))(x, kernel)

    for side, few in ((2, True), (4, False)):
        program = jax.jit(gradients).lower(jnp.ones((5, side, side, 4)), jnp.ones((3, 3, 4, 6))).compile().as_text()
        assert (" convolution(" not in program) == few


def test_other_platforms_keep_xlas_convolution():
    x, kernel = jnp.ones((1, 4, 4, WIDE)), jnp.ones((3, 3, WIDE, WIDE))
    gradients = jax.jit(lambda x, kernel: jax.vjp(convolutions.convolve, x, kernel)[1](x))
    for platform in ("cuda", "tpu"):
        program = gradients.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.convolution") == 2
        assert "stablehlo.dot_general" not in program

"""The quick forms of convolutions against SciPy's sums in float64 and against XLA's own convolution."""

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


@pytest.fixture(scope="module")
def both():
    """(ours, XLA's own): each (value, the two gradients, a derivative along a direction) of a wide convolution."""
    x, kernel, dx, dk = draw((2, 4, 6, WIDE), (3, 3, WIDE, WIDE + 1), (2, 4, 6, WIDE), (3, 3, WIDE, WIDE + 1))
    (y,) = draw((2, 4, 6, WIDE + 1), seed=1)

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

    return all_of(convolutions.convolve), all_of(convolutions.direct)


@pytest.mark.parametrize(
    "what", ["value", "gradients", "along", "of each image", "of several outputs", "of several kernels", "second"]
)
def test_every_derivative_is_that_of_xlas_convolution(both, what):
    ours, theirs = (jax.tree.leaves(side[what]) for side in both)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other, 5e-6)


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


def test_other_platforms_keep_xlas_convolution():
    x, kernel = jnp.ones((1, 4, 4, WIDE)), jnp.ones((3, 3, WIDE, WIDE))
    gradients = jax.jit(lambda x, kernel: jax.vjp(convolutions.convolve, x, kernel)[1](x))
    for platform in ("cuda", "tpu"):
        program = gradients.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.convolution") == 2
        assert "stablehlo.dot_general" not in program

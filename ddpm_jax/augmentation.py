"""Augmentation that does not leak into the samples: each image is transformed at random, and the network learns how.

The nine parameters, their order and their constants are those of Karras et al. 2022 (EDM, appendix F.2, table 6), after
Karras et al. 2020 (arXiv:2006.06676). All are 0 for an image as it is, and a network without them takes them for 0:
sampling and evaluation give none, so samples look like the images before augmentation.

    0     x_flip: 0 or 1           3, 4  cos(angle) - 1, sin(angle)
    1     y_flip: 0 or 1           5, 6  stretch cos(2 axis), stretch sin(2 axis)
    2     scale: by 2^(0.2 scale)  7, 8  shift_x, shift_y, in eighths of the width and the height

EDM tells the network stretch cos(axis) and stretch sin(axis). These have the same distribution, but stand for two
transformations: a stretch along an axis and, with the opposite sign and direction, a squeeze along it.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.keys import named

NUM_PARAMETERS = 9
LOG2_SCALE = 0.2  # standard deviation of log2 of the scale, and of the stretch
SHIFT = 1 / 8  # standard deviation of the shift, as a fraction of the image


def draw_parameters(key, probability) -> jax.Array:
    """Random parameters (9,). Each transformation is applied with that `probability`, independently of the others.

    The exception is the x-flip: half of all images, as in EDM. An applied y-flip flips half of its images. Scale,
    stretch and shift are standard normal, the angle and the axis uniform.
    """
    x_flip, y_flip = jax.random.bernoulli(named(key, "flip"), shape=(2,)).astype(jnp.float32)
    scale, stretch, *shift = jax.random.normal(named(key, "size"), (4,))
    angle, direction = jax.random.uniform(named(key, "angle"), (2,), minval=-math.pi, maxval=math.pi)
    rotation, axis = (jnp.cos(angle) - 1, jnp.sin(angle)), (jnp.cos(direction), jnp.sin(direction))
    groups = [y_flip], [scale], rotation, [stretch * x for x in axis], shift
    applied = jax.random.bernoulli(named(key, "applied"), probability, (len(groups),))
    values = [jnp.where(on, value, 0.0) for on, group in zip(applied, groups, strict=True) for value in group]
    return jnp.array([x_flip, *values])


def inverse_matrix(parameters) -> tuple[jax.Array, jax.Array]:
    """(matrix, shift): the result at a place p, (x, y) from the centre, is the image at matrix @ (p - shift).

    The image is flipped, scaled, rotated, stretched and shifted, in this order. A positive angle turns the x-axis
    (right) to the y-axis (down); a stretch along the axis divides the perpendicular direction by the same factor.
    shift: in widths and heights of the image.
    """
    x_flip, y_flip, scale, cos_minus_1, sin, stretch_cos, stretch_sin, *shift = parameters
    cos, direction = 1 + cos_minus_1, jnp.arctan2(stretch_sin, stretch_cos)
    factor = jnp.exp2(-LOG2_SCALE * jnp.hypot(stretch_cos, stretch_sin))
    mean, half = (factor + 1 / factor) / 2, (factor - 1 / factor) / 2
    a, b, d = mean + half * jnp.cos(direction), half * jnp.sin(direction), mean - half * jnp.cos(direction)
    rotated = jnp.array([[cos * a + sin * b, cos * b + sin * d], [cos * b - sin * a, cos * d - sin * b]])
    flips = jnp.array([[1 - 2 * x_flip], [1 - 2 * y_flip]])
    return flips * jnp.exp2(-LOG2_SCALE * scale) * rotated, SHIFT * jnp.array(shift)


def transform(image, parameters) -> jax.Array:
    """The image (H, W, C) in [-1, 1] under the transformation with these `parameters` (9,), in [-1, 1].

    One interpolation of the composed transformation, by Keys' cubic convolution (1981) of 4x4 pixels, and by reflection
    about the outer pixels beyond them. Flips, quarter turns and shifts by whole pixels are exact. Shrinking does not
    average: at a probability of 0.12, less than 1 % of images shrink below 3/4 in any direction.
    """
    image, (height, width, _) = jnp.asarray(image), image.shape
    (matrix, shift), size = inverse_matrix(parameters), jnp.array([width, height])
    centre = (size - 1) / 2

    def at(y, x):
        x, y = jnp.sum(matrix * (jnp.array([x, y]) - centre - size * shift), 1) + centre
        # On CPU one gather of all 16 pixels took 4 times as long (measured).
        pairs = itertools.product(_neighbours(y, height), _neighbours(x, width))
        return sum(weight_y * weight_x * image[row, column] for (row, weight_y), (column, weight_x) in pairs)

    result = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(jnp.arange(height), jnp.arange(width))
    return jnp.clip(result, -1.0, 1.0)


def _neighbours(place, side):
    """[(index, weight)] of the four pixels around `place` on an axis of `side` pixels that reflects at both ends."""
    before = jnp.floor(place)
    d = place - before
    weights = ((2 - d) * d - 1) * d, (3 * d - 5) * d**2 + 2, ((4 - 3 * d) * d + 1) * d, (d - 1) * d**2
    indices = [(before.astype(int) + i) % max(2 * side - 2, 1) for i in (-1, 0, 1, 2)]
    return [(jnp.minimum(i, 2 * side - 2 - i), weight / 2) for i, weight in zip(indices, weights, strict=True)]


def augmented(loss, probability) -> Callable:
    """`loss` of diffusion.make_loss on an augmented image, whose parameters the network gets as `augmentation`."""

    def augmented_loss(params, key, x_0, label=None, u=None):
        parameters = draw_parameters(named(key, "augmentation"), probability)
        return loss(params, key, transform(x_0, parameters), label, u, augmentation=parameters)

    return augmented_loss

"""Conditioning of the network on more than x_t and t. Each part wraps `net`; the loss and the samplers do not change.

net(params, x_t, t, key=None, label=None, augmentation=None) -> output        a key means training
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.diffusion import clip
from ddpm_jax.keys import named


def label_dropout(net, rate, null):
    """`net` that, in training, replaces labels by the label `null` with probability `rate`.

    This also trains the unconditional network that `guided` needs (Ho & Salimans 2022, algorithm 1).
    """

    def with_dropout(params, x_t, t, key=None, label=None, **others):
        if key is not None:
            label = jnp.where(jax.random.bernoulli(named(key, "label"), rate), null, label)
        return net(params, x_t, t, key, label, **others)

    return with_dropout


def guided(net, scale, null, low=0.0, high=jnp.inf, channels=None):
    """Classifier-free guidance: output_null + scale (output - output_null) at times from `low` to `high`.

    scale = 1 is the plain conditional network, 0 the unconditional one; Ho & Salimans 2022, eq. 6, write 1 + w. The
    result is the same for eps, x_0 and v, which are affine in each other. Outside the interval (Kynkaanniemi et al.
    2024) scale = 1. Channels after the first `channels`, a learned variance, are those of the conditional network.
    """

    def guided_net(params, x_t, t, key=None, label=None):
        conditional, unconditional = (net(params, x_t, t, key, y) for y in (label, null))
        extra = jnp.where((t >= low) & (t <= high), scale, 1.0) - 1
        return conditional.at[..., :channels].add(extra * (conditional - unconditional)[..., :channels])

    return guided_net


def scaled_input(net, schedule, parameterization, channels):
    """`net` that sees x_t, the first `channels` of its input, times parameterization.input_scale, if there is one."""
    if parameterization.input_scale is None:
        return net

    def scaled(params, x_t, t, key=None, label=None, **others):
        factor = parameterization.input_scale(schedule.logsnr(t))
        return net(params, x_t.at[..., :channels].multiply(factor), t, key, label, **others)

    return scaled


def self_conditioning(net, schedule, parameterization):
    """A network of x_t (H, W, C) from one of (H, W, 2C): x_t concatenated with an estimate of x_0 (Chen et al. 2023).

    The estimate is the network's own x_0_hat when given zeros. In training it gets no gradient, and half of the images
    keep the zeros. A sampler uses the x_0_hat of its previous step instead: samplers.self_conditioned.
    """

    def conditioned(params, x_t, t, key=None, label=None, **others):
        def forward(estimate):
            return net(params, jnp.concatenate([x_t, estimate], -1), t, key, label, **others)

        output = forward(jnp.zeros_like(x_t))[..., : x_t.shape[-1]]
        estimate = clip(parameterization.x_0(output, x_t, schedule.logsnr(t)))
        if key is not None:
            use_estimate = jax.random.bernoulli(named(key, "self_conditioning"))
            estimate = jnp.where(use_estimate, lax.stop_gradient(estimate), 0.0)
        return forward(estimate)

    return conditioned


# Guidance of x_0_hat: away from the prediction of a worse denoiser, `base`. That is the network without the label, or
# another, worse network (autoguidance, Karras et al. 2024).


class Guidance(NamedTuple):
    """A way to guide x_0_hat away from `base`, the x_0_hat of a worse denoiser."""

    combine: Callable  # (x_0_hat, base, scale, **options) -> guided x_0_hat
    renoise: bool = False  # whether eps_hat is that of `base`, so that the sampler must be samplers.renoised
    scales: tuple[float, float] = (-jnp.inf, jnp.inf)  # the range of `scale`


def extrapolate(x_0_hat, base, scale) -> jax.Array:
    """base + scale (x_0_hat - base): Ho & Salimans 2022, eq. 6; autoguidance, Karras et al. 2024."""
    return x_0_hat + (scale - 1) * (x_0_hat - base)


def interpolate(x_0_hat, base, scale) -> jax.Array:
    """base + scale (x_0_hat - base) for a scale from 0 to 1, the lambda of CFG++ (Chung et al. 2024, algorithm 2)."""
    return base + scale * (x_0_hat - base)


def project(x_0_hat, base, scale, parallel=0.0, norm=jnp.inf) -> jax.Array:
    """Adaptive projected guidance (Sadat et al. 2024) without momentum.

    The update x_0_hat - base, if longer, is shortened to the L2 norm `norm` (the paper's r). Its part along x_0_hat,
    which mainly raises contrast and saturation, is multiplied by `parallel` (the paper's eta). parallel = 1 with an
    infinite norm is `extrapolate`.
    """
    update = x_0_hat - base
    update *= jnp.minimum(1.0, norm / jnp.sqrt(jnp.sum(update**2)))
    along = jnp.sum(update * x_0_hat) / jnp.maximum(jnp.sum(x_0_hat**2), jnp.finfo(x_0_hat.dtype).tiny) * x_0_hat
    return x_0_hat + (scale - 1) * (update - (1 - parallel) * along)


GUIDANCES = {
    "cfg": Guidance(extrapolate),
    "cfg++": Guidance(interpolate, renoise=True, scales=(0.0, 1.0)),
    "apg": Guidance(project),
}


def guided_denoiser(predict, base, guidance, scale, limit=lambda x_0_hat: x_0_hat, low=0.0, high=jnp.inf, **options):
    """predict(x_t, t) with its x_0_hat guided away from base(x_t, t) -> x_0_hat, at times from `low` to `high`.

    predict, base: denoisers without a limit, which is applied to the result; guidance: an entry of GUIDANCES, with its
    options. With guidance.renoise the result is (guided prediction, prediction of base), for samplers.renoised. Outside
    the interval `predict` takes the place of `base`. A variance that is predicted too is that of `predict`.
    """

    def guided_predict(x_t, t, *estimate):
        (x_0_hat, *variance), structure = jax.tree.flatten(predict(x_t, t, *estimate))
        base_x_0_hat = jnp.where((t >= low) & (t <= high), base(x_t, t, *estimate), x_0_hat)
        guided_x_0_hat = guidance.combine(x_0_hat, base_x_0_hat, scale, **options)
        prediction, of_base = (structure.unflatten([limit(x), *variance]) for x in (guided_x_0_hat, base_x_0_hat))
        return (prediction, of_base) if guidance.renoise else prediction

    return guided_predict


def at_equal_noise(predict, schedule, own_schedule):
    """predict(x_t, t), a denoiser trained on `own_schedule`, as one for the times of `schedule`."""
    return lambda x_t, t, *estimate: predict(x_t, own_schedule.t_from_logsnr(schedule.logsnr(t)), *estimate)

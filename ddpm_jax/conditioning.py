"""Conditioning of the network on more than x_t and t. Each part wraps `net`; the loss and the samplers do not change.

net(params, x_t, t, key=None, label=None, augmentation=None) -> output        a key means training
"""

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

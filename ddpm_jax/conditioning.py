"""What the network is told besides x_t and t, as wrappers around `net`; the loss and the samplers know nothing of them.

net(params, x_t, t, key=None, label=None) -> output        a key means training
"""

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.diffusion import clip
from ddpm_jax.keys import named


def label_dropout(net, share, null):
    """`net` that in training sees the label `null` instead of its own for a `share` of the images.

    So it learns to do without (Ho & Salimans 2022, algorithm 1), as `guided` asks of it.
    """

    def dropped(params, x_t, t, key=None, label=None):
        if key is not None:
            label = jnp.where(jax.random.bernoulli(named(key, "label"), share), null, label)
        return net(params, x_t, t, key, label)

    return dropped


def guided(net, scale, null, low=0.0, high=jnp.inf, channels=None):
    """Classifier-free guidance: output_null + scale (output - output_null) at times from `low` to `high`.

    scale = 1 is the plain conditional network, 0 the one without label; Ho & Salimans 2022, eq. 6, write 1 + w. It is
    the same for eps, x_0 and v, which are affine in each other. Outside the interval (Kynkaanniemi et al. 2024)
    scale = 1. What lies beyond the first `channels`, a learned variance, stays that of the label.
    """

    def guide(params, x_t, t, key=None, label=None):
        output, without = (net(params, x_t, t, key, which) for which in (label, null))
        more = jnp.where((t >= low) & (t <= high), scale, 1.0) - 1
        return output.at[..., :channels].add(more * (output - without)[..., :channels])

    return guide


def self_conditioning(net, schedule, parameterization):
    """A network for (H, W, C) from one that takes (H, W, 2C): x_t and beside it an estimate of x_0 (Chen et al. 2023).

    The estimate is the network's own x_0_hat given none (zeros); in training it is held constant, and half of the
    images go without. A sampler has a better one from its last step: samplers.self_conditioned.
    """

    def conditioned(params, x_t, t, key=None, label=None):
        def ask(estimate):
            return net(params, jnp.concatenate([x_t, estimate], -1), t, key, label)

        output = ask(jnp.zeros_like(x_t))[..., : x_t.shape[-1]]
        estimate = clip(parameterization.x_0(output, x_t, schedule.logsnr(t)))
        if key is not None:
            shown = jax.random.bernoulli(named(key, "self_conditioning"))
            estimate = jnp.where(shown, lax.stop_gradient(estimate), 0.0)
        return ask(estimate)

    return conditioned

"""Reverse processes over any falling set of times: Algorithm 2 and its successors, for one image.

A Sampler has optax's shape, two pure functions:

    init(x_T) -> memory                                         what it carries from step to step
    step(predict, key, x_t, t, s, memory) -> x_s, memory        from time t to s < t; predict(x_t, t) -> x_0_hat

Clipping and guidance wrap `predict`; a sampler never knows of them.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.diffusion import alpha_sigma, clipped, make_denoiser, q_posterior
from ddpm_jax.errors import ConfigError
from ddpm_jax.images import to_uint8
from ddpm_jax.keys import named


class Sampler(NamedTuple):
    init: Callable
    step: Callable


def no_memory(x_T):
    return ()


# Where the variance of a reverse step lies between beta-tilde_t (0) and beta_t (1), in logarithms; the paper uses
# fixedlarge for CIFAR-10 and fixedsmall for CelebA-HQ and LSUN (section 3.2).
VARIANCES = {"fixedsmall": 0.0, "fixedlarge": 1.0}


def ddpm(schedule, variance="fixedsmall"):
    """Ancestral sampling (Algorithm 2): x_s from the Gaussian with the mean of q(x_s | x_t, x_0_hat).

    The variance is share * sigma_s^(2 - 2 nu) * sigma_t^(2 nu); between neighbouring times nu = 0 is beta-tilde_t
    and nu = 1 is beta_t. The step to clean data adds no noise.
    """
    nu = VARIANCES[variance]

    def step(predict, key, x_t, t, s, memory):
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        mean, small = q_posterior(predict(x_t, t), x_t, logsnr_t, logsnr_s)
        large = -jnp.expm1(logsnr_t - logsnr_s) * alpha_sigma(logsnr_t)[1] ** 2
        scale = jnp.sqrt(small ** (1 - nu) * large**nu) * (logsnr_s < jnp.inf)
        return mean + scale * jax.random.normal(key, x_t.shape), memory

    return Sampler(no_memory, step)


def ddim(schedule, eta=0.0):
    """Song, Meng & Ermon 2020, eqs. 12 and 16: deterministic at eta = 0, the ancestral sampler at eta = 1.

    eps_hat is taken from x_0_hat, so that it also agrees with a clipped one.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta} must be from 0 to 1")

    def step(predict, key, x_t, t, s, memory):
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        share = -jnp.expm1(logsnr_t - logsnr_s)
        x_0_hat = predict(x_t, t)
        eps_hat = (x_t - alpha_t * x_0_hat) / sigma_t
        noise = jax.random.normal(key, x_t.shape)
        kept, fresh = jnp.sqrt(1 - eta**2 * share), eta * jnp.sqrt(share)
        return alpha_s * x_0_hat + sigma_s * (kept * eps_hat + fresh * noise), memory

    return Sampler(no_memory, step)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def make_sampler(name, schedule, defaults=(), **options):
    """The Sampler `name`, with those of `options` that it has; a wrong name or option raises ConfigError.

    `defaults` are options that are passed over in silence when this sampler has no such option.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"sampler={name} is not one of {', '.join(SAMPLERS)}")
    has = list(inspect.signature(SAMPLERS[name]).parameters)[1:]
    for option in options:
        if option not in has:
            raise ConfigError(f"the sampler {name} has no option {option}; it has {', '.join(has) or 'none'}")
    return SAMPLERS[name](schedule, **{k: v for k, v in dict(defaults).items() if k in has} | options)


def sample(predict, sampler, times, key, shape):
    """x_0 of one image (Algorithm 2) by one scan over the pairs (t, s) of neighbouring `times`.

    times: falling, from the time of pure noise to 0, (n + 1,); shape: (H, W, C). The picture is a function of `key`.
    """
    return sample_path(predict, sampler, times, key, shape, frames=1)[-1]


def sample_path(predict, sampler, times, key, shape, frames):
    """x at `frames` moments evenly spread over the reverse process, (frames, H, W, C); the last is x_0."""
    times, n = jnp.asarray(times), len(times) - 1
    slots = np.arange(n) * frames // n  # the last step that falls into a slot stays there

    def body(carry, at):
        x, memory, path = carry
        i, slot, t, s = at
        x, memory = sampler.step(predict, jax.random.fold_in(named(key, "step"), i), x, t, s, memory)
        return (x, memory, path.at[slot].set(x)), None

    x_T = jax.random.normal(named(key, "x_T"), shape)
    start = (x_T, sampler.init(x_T), jnp.zeros((frames, *shape)))
    return lax.scan(body, start, (np.arange(n), slots, times[:-1], times[1:]))[0][2]


def make_generate(net, schedule, parameterization, sampler, times, shape, frames=1, clip=True):
    """generate(params, root, index, label=None) -> image `index` of the stream `root`.

    uint8 (frames, H, W, C): pictures along the reverse process of which the last is the sample. NaN, if there is
    any, is kept visible by the second result: whether all values were finite.
    """

    def generate(params, root, index, label=None):
        predict = make_denoiser(net, schedule, parameterization, params, label)
        key = jax.random.fold_in(root, index)
        path = sample_path(clipped(predict) if clip else predict, sampler, times, key, shape, frames)
        return to_uint8(path), jnp.all(jnp.isfinite(path))

    return generate

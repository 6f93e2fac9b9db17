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


def dpmpp_2m(schedule):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: second order in the log-SNR, one call of the network a step.

    Remembers the last x_0_hat and the last step h in half log-SNR. The first step and the one to clean data, whose
    h is infinite, are of first order.
    """

    def init(x_T):
        return jnp.zeros_like(x_T), jnp.inf

    def step(predict, key, x_t, t, s, memory):
        last_x_0_hat, last_h = memory
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        h = (logsnr_s - logsnr_t) / 2
        x_0_hat = predict(x_t, t)
        slope = jnp.where(jnp.isfinite(h), h / (2 * last_h), 0.0)
        ahead = x_0_hat + slope * (x_0_hat - last_x_0_hat)
        return sigma_s / sigma_t * x_t - alpha_s * jnp.expm1(-h) * ahead, (x_0_hat, h)

    return Sampler(init, step)


def heun(schedule):
    """Heun's second-order step of the probability-flow ODE (Karras et al. 2022, algorithm 1), two calls a step.

    Over the noise level n = sigma / alpha the ODE of y = x / alpha is dy/dn = eps_hat, so that Euler's step is DDIM's.
    The correction takes the mean of both ends' eps_hat; the step to clean data has none.
    """

    def step(predict, key, x_t, t, s, memory):
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        x_0_hat = predict(x_t, t)
        eps_hat = (x_t - alpha_t * x_0_hat) / sigma_t
        euler = alpha_s * x_0_hat + sigma_s * eps_hat

        def correction():
            eps_hat_s = (euler - alpha_s * predict(euler, s)) / sigma_s
            return (sigma_s - alpha_s * sigma_t / alpha_t) * (eps_hat_s - eps_hat) / 2

        return euler + lax.cond(sigma_s > 0, correction, lambda: jnp.zeros_like(euler)), memory

    return Sampler(no_memory, step)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "heun": heun}


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
    """x at `frames` moments evenly spread over the reverse process, (frames, H, W, C); the last is x_0.

    There are no more frames than steps.
    """
    times, n = jnp.asarray(times), len(times) - 1
    frames = min(frames, n)
    slots = np.arange(n) * frames // n  # the last step that falls into a slot stays there

    def body(carry, at):
        x, memory, path = carry
        i, slot, t, s = at
        x, memory = sampler.step(predict, jax.random.fold_in(named(key, "step"), i), x, t, s, memory)
        return (x, memory, path.at[slot].set(x)), None

    x_T = jax.random.normal(named(key, "x_T"), shape)
    start = (x_T, sampler.init(x_T), jnp.zeros((frames, *shape)))
    return lax.scan(body, start, (np.arange(n), slots, times[:-1], times[1:]))[0][2]


def make_generate(net, schedule, parameterization, sampler, times, shape, frames=1):
    """generate(params, root, index, label=None) -> image `index` of the stream `root`.

    uint8 (frames, H, W, C): pictures along the reverse process of which the last is the sample; and whether all of
    their values were finite, which uint8 cannot show.
    """

    def generate(params, root, index, label=None):
        predict = make_denoiser(net, schedule, parameterization, params, label)
        key = jax.random.fold_in(root, index)
        path = sample_path(clipped(predict), sampler, times, key, shape, frames)
        return to_uint8(path), jnp.all(jnp.isfinite(path))

    return generate

"""Reverse processes over any decreasing sequence of times: Algorithm 2 and its successors, for one image.

A Sampler has optax's shape, two pure functions:

    init(x_T) -> memory                                         state carried from step to step
    step(predict, key, x_t, t, s, memory) -> x_s, memory        from time t to s < t; predict(x_t, t) -> x_0_hat

Clipping and guidance wrap the network or `predict`, so samplers do not depend on them.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.diffusion import VARIANCES, alpha_sigma, q_posterior, reverse_variance, to_uint8
from ddpm_jax.errors import ConfigError
from ddpm_jax.keys import named
from ddpm_jax.schedules import Schedule


class Sampler(NamedTuple):
    init: Callable
    step: Callable
    needs_variance: bool = False  # whether `predict` must come from diffusion.make_denoiser_with_variance
    separable: bool = False  # whether x_s is alpha_s x_0_hat plus terms of eps_hat and noise, all of (x_t, t)


def no_memory(x_T):
    return ()


def ddpm(schedule: Schedule, variance: str = "fixedsmall") -> Sampler:
    """Ancestral sampling (Algorithm 2): x_s is drawn from a Gaussian with the mean of q(x_s | x_t, x_0_hat).

    variance: a name in diffusion.VARIANCES. The step to clean data adds no noise.
    """
    if variance not in VARIANCES:
        raise ConfigError(f"variance={variance} is not one of {', '.join(VARIANCES)}")

    def step(predict, key, x_t, t, s, memory):
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        x_0_hat, nu = VARIANCES[variance](predict(x_t, t), logsnr_s == jnp.inf)
        mean, _ = q_posterior(x_0_hat, x_t, logsnr_t, logsnr_s)
        scale = jnp.sqrt(reverse_variance(logsnr_t, logsnr_s, nu))
        return mean + scale * jax.random.normal(key, x_t.shape), memory

    return Sampler(no_memory, step, variance == "learned", separable=True)


def ddim(schedule: Schedule, eta: float = 0.0) -> Sampler:
    """Song, Meng & Ermon 2020, eqs. 12 and 16: deterministic at eta = 0, `ddpm` with variance fixedsmall at eta = 1.

    eps_hat is computed from x_0_hat, so it is consistent with clipping. At eta = 0 a step may also go up, to s > t.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta} must be from 0 to 1")

    def step(predict, key, x_t, t, s, memory):
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        share = jnp.maximum(-jnp.expm1(logsnr_t - logsnr_s), 0)
        x_0_hat = predict(x_t, t)
        eps_hat = (x_t - alpha_t * x_0_hat) / sigma_t
        noise = jax.random.normal(key, x_t.shape)
        kept, fresh = jnp.sqrt(1 - eta**2 * share), eta * jnp.sqrt(share)
        return alpha_s * x_0_hat + sigma_s * (kept * eps_hat + fresh * noise), memory

    return Sampler(no_memory, step, separable=True)


def dpmpp_2m(schedule: Schedule) -> Sampler:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: second order in the log-SNR, one network call per step.

    The memory is the previous x_0_hat and step size h (in half log-SNR). The first step is of first order, and so is
    the step to clean data, for which h is infinite.
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
        extrapolated = x_0_hat + slope * (x_0_hat - last_x_0_hat)
        return sigma_s / sigma_t * x_t - alpha_s * jnp.expm1(-h) * extrapolated, (x_0_hat, h)

    return Sampler(init, step)


def dpmpp_3m(schedule: Schedule) -> Sampler:
    """DPM-Solver++ of third order, multistep (Lu et al. 2022, eq. 4.2 with k = 3), one network call per step.

    A parabola in half the log-SNR through the last three x_0_hat is integrated exactly. The first step and the step to
    clean data are of first order, the second step is of second order. The parabola overshoots for large steps in
    log-SNR, so use trailing spacing when there are few steps.
    """

    def init(x_T):
        return (jnp.zeros_like(x_T), jnp.zeros_like(x_T)), (jnp.inf, jnp.inf)

    def step(predict, key, x_t, t, s, memory):
        (last, before), (h_1, h_2) = memory
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        h = (logsnr_s - logsnr_t) / 2
        x_0_hat = predict(x_t, t)
        slope_1, slope_2 = (x_0_hat - last) / h_1, (last - before) / h_2
        curvature = (slope_1 - slope_2) / (h_1 + h_2)
        slope = slope_1 + jnp.where(jnp.isfinite(h_2), h_1 * curvature, 0.0)
        level = -jnp.expm1(-h)  # integrals of exp(u - h), u exp(u - h) and u^2 exp(u - h) / 2 over u in 0..h
        finite = jnp.where(jnp.isfinite(h), h, 0.0)
        linear = finite + jnp.expm1(-finite)
        square = finite**2 / 2 - linear
        x_s = sigma_s / sigma_t * x_t + alpha_s * (level * x_0_hat + linear * slope + 2 * square * curvature)
        return x_s, ((x_0_hat, last), (h, h_1))

    return Sampler(init, step)


def heun(schedule: Schedule) -> Sampler:
    """Heun's second-order method for the probability-flow ODE (Karras et al. 2022, algorithm 1), two calls per step.

    With y = x / alpha and the noise level n = sigma / alpha, the ODE is dy/dn = eps_hat and its Euler step is DDIM.
    The correction averages eps_hat over both ends of the step. Steps from pure noise and to clean data have none.
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

        return euler + lax.cond((sigma_s > 0) & (alpha_t > 0), correction, lambda: jnp.zeros_like(euler)), memory

    return Sampler(no_memory, step)


def edm(schedule: Schedule, churn=0.1, noise=1.007, low=0.01, high=1.0) -> Sampler:
    """Karras et al. 2022, algorithm 2: adds fresh noise before each Heun step.

    A noise level n = sigma / alpha between `low` and `high` is raised to (1 + churn) n (for a discrete schedule, to the
    nearest time) by noise of standard deviation `noise`. churn is the paper's S_churn / N, at most sqrt(2) - 1. The
    defaults are close to the paper's values for the VP CIFAR-10 model.
    """
    if not 0 <= churn <= 0.4143:
        raise ConfigError(f"churn={churn} must be from 0 to sqrt(2) - 1")
    solver = heun(schedule)

    def step(predict, key, x_t, t, s, memory):
        logsnr = schedule.logsnr(t)
        level = jnp.exp(-logsnr / 2)
        raised = jnp.where((level >= low) & (level <= high), schedule.t_from_logsnr(logsnr - 2 * jnp.log1p(churn)), t)
        (alpha, sigma), (alpha_up, sigma_up) = (alpha_sigma(schedule.logsnr(time)) for time in (t, raised))
        added = jnp.sqrt(jnp.maximum(sigma_up**2 - (alpha_up / alpha * sigma) ** 2, 0))
        x_up = alpha_up / alpha * x_t + noise * added * jax.random.normal(key, x_t.shape)
        return solver.step(predict, key, jnp.where(raised > t, x_up, x_t), jnp.maximum(raised, t), s, memory)

    return Sampler(no_memory, step)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "heun": heun,
    "edm": edm,
}


def make_sampler(name: str, schedule: Schedule, defaults=(), **options) -> Sampler:
    """The Sampler `name` with `options`. Raises ConfigError for an unknown name or option.

    `defaults` are further options, ignored by samplers that do not have them.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"sampler={name} is not one of {', '.join(SAMPLERS)}")
    known = list(inspect.signature(SAMPLERS[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise ConfigError(f"the sampler {name} has no option {option}; it has {', '.join(known) or 'none'}")
    return SAMPLERS[name](schedule, **{k: v for k, v in dict(defaults).items() if k in known} | options)


def with_preview(sampler: Sampler) -> Sampler:
    """`sampler` that also keeps its latest x_0_hat: its memory is (memory of `sampler`, x_0_hat).

    This needs no extra network calls, except for edm, which evaluates the network at other times. Samples are equal up
    to rounding, because XLA fuses operations differently when x_0_hat is an output.
    """

    def init(x_T):
        return sampler.init(x_T), jnp.zeros_like(x_T)

    def step(predict, key, x_t, t, s, memory):
        prediction = predict(x_t, t)

        def cached_predict(x, time):  # most samplers first evaluate the network at (x_t, t)
            return prediction if x is x_t and time is t else predict(x, time)

        x_s, own_memory = sampler.step(cached_predict, key, x_t, t, s, memory[0])
        return x_s, (own_memory, jax.tree.leaves(prediction)[0])

    return sampler._replace(init=init, step=step)


def renoised(sampler: Sampler, schedule: Schedule) -> Sampler:
    """`sampler` for predict(x_t, t) -> (prediction, base): x_0_hat is that of `prediction`, eps_hat that of `base`.

    This is CFG++ (Chung et al. 2024, algorithm 2). As x_s is alpha_s x_0_hat plus terms of eps_hat, it is a step with
    `base`, plus alpha_s times the difference of the two x_0_hat. Raises ConfigError for a sampler that is not
    `separable`.
    """
    if not sampler.separable:
        names = " or ".join(name for name, make in SAMPLERS.items() if make(schedule).separable)
        raise ConfigError(f"CFG++ does not work with this sampler; use {names}")

    def step(predict, key, x_t, t, s, memory):
        prediction, base = predict(x_t, t)
        x_s, memory = sampler.step(lambda x, time: base, key, x_t, t, s, memory)
        x_0_hat, base_x_0_hat = (jax.tree.leaves(tree)[0] for tree in (prediction, base))
        return x_s + alpha_sigma(schedule.logsnr(s))[0] * (x_0_hat - base_x_0_hat), memory

    return sampler._replace(step=step)


def self_conditioned(sampler: Sampler) -> Sampler:
    """with_preview(sampler) for predict(x_t, t, x_0_hat), which also takes the previous x_0_hat (Chen et al. 2023)."""
    inner = with_preview(sampler)

    def step(predict, key, x_t, t, s, memory):
        return inner.step(lambda x, time: predict(x, time, memory[1]), key, x_t, t, s, memory)

    return inner._replace(step=step)


def pure_noise(key, shape) -> jax.Array:
    """x_T of the image with this `key`."""
    return jax.random.normal(named(key, "x_T"), shape)


def sample(predict: Callable, sampler: Sampler, times, key, shape) -> jax.Array:
    """x_0 of one image (Algorithm 2), by a scan over the pairs (t, s) of consecutive `times`.

    times: (n + 1,), decreasing from the time of pure noise to 0; shape: (H, W, C). The image is a function of `key`.
    """
    return run_sampler(predict, sampler, times, key, pure_noise(key, shape))[0][-1]


def run_sampler(predict: Callable, sampler: Sampler, times, key, x, frames=1, view=lambda x, memory: x):
    """(path, memory) of a sampler that starts with `x` at times[0] and visits all `times`: the only loop over time.

    path: (frames, *x.shape), view(x, memory) after `frames` evenly spaced steps; its last entry is always the final x.
    There are at most as many frames as steps.
    """
    times, n = jnp.asarray(times), len(times) - 1
    frames = min(frames, n)
    slots = np.arange(n) * frames // n  # the frame that each step writes; the last step of a frame remains

    def body(carry, step):
        x, memory, path = carry
        i, slot, t, s = step
        x, memory = sampler.step(predict, jax.random.fold_in(named(key, "step"), i), x, t, s, memory)
        return (x, memory, path.at[slot].set(view(x, memory))), None

    carry = (x, sampler.init(x), jnp.zeros((frames, *x.shape), x.dtype))
    (x, memory, path), _ = lax.scan(body, carry, (np.arange(n), slots, times[:-1], times[1:]))
    return path.at[-1].set(x), memory


def make_generate(denoiser: Callable, sampler: Sampler, times, start, frames=1, view=lambda x, memory: x) -> Callable:
    """generate(params, root, index, label=None) -> (images, finite) of image `index` of the stream `root`.

    denoiser: (params, label) -> predict; start: (predict, key, index) -> x at times[0]; frames, view: see run_sampler.
    images: uint8 (frames, H, W, C) along the reverse process; the last one is the sample. finite: whether all values
    were finite before the conversion to uint8.
    """

    def generate(params, root, index, label=None):
        key, predict = jax.random.fold_in(root, index), denoiser(params, label)
        path, _ = run_sampler(predict, sampler, times, key, start(predict, key, index), frames, view)
        return to_uint8(path), jnp.all(jnp.isfinite(path))

    return generate

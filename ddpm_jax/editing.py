"""Pictures from pictures: encode, interpolate, paint in. Each is a start, a sampler or times for samplers.run_sampler.

An edit is (sampler, times) -> (sampler, times, start), start(predict, key, index) -> x at times[0], for
experiment.make_generate; `from_noise` is that of plain sampling.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ddpm_jax.diffusion import alpha_sigma, q_sample
from ddpm_jax.keys import named
from ddpm_jax.samplers import pure_noise, run_sampler
from ddpm_jax.schedules.report import check_start_snr


def encode(predict, sampler, schedule, times, x_0):
    """x at times[0] from which `sampler`, DDIM at eta = 0, leads over the same falling `times` back to nearly x_0.

    Song, Meng & Ermon 2020, section 4.3. The deterministic steps are taken upwards, from the last time above 0, where
    x_0 is taken to be without noise.
    """
    up = np.asarray(times)[-2::-1]
    x = alpha_sigma(schedule.logsnr(up[0]))[0] * x_0
    return x if len(up) == 1 else run_sampler(predict, sampler, up, jax.random.key(0), x)[0][-1]


def interpolation(schedule, t, key, x_0, x_0_other):
    """start(share) -> x_t between two images at time t, for share from 0 (x_0) to 1 (Ho et al. 2020, section 4.4).

    x_t = (1 - share) x_t + share x_t', each drawn from q(x_t | x_0) once, so that all shares have the same noise.
    """
    noisy = [
        q_sample(image, jax.random.normal(named(key, name), image.shape), schedule.logsnr(t))
        for name, image in (("first", x_0), ("second", x_0_other))
    ]
    return lambda share: (1 - share) * noisy[0] + share * noisy[1]


def inpainted(sampler, schedule, known, mask):
    """RePaint (Lugmayr et al. 2022, algorithm 1): `sampler` that keeps `known` (H, W, C) where `mask` is 1.

    After each step the known part of x_s is drawn from q(x_s | known). A step up, s > t, adds noise (eq. 2), so that
    what is new and what is known grow together; see `resampling_times`.
    """

    def step(predict, key, x_t, t, s, memory):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma(schedule.logsnr(time)) for time in (t, s))
        noise = jax.random.normal(named(key, "known"), x_t.shape)

        def down():
            x_s, new = sampler.step(predict, key, x_t, t, s, memory)
            return jnp.where(mask, q_sample(known, noise, schedule.logsnr(s)), x_s), new

        def up():
            keep = alpha_s / alpha_t
            return keep * x_t + jnp.sqrt(jnp.maximum(sigma_s**2 - (keep * sigma_t) ** 2, 0)) * noise, sampler.init(x_t)

        return lax.cond(s < t, down, up)

    return sampler._replace(step=step)


def resampling_times(times, jump=10, repeats=5):
    """`times` that after every `jump` steps go back up those steps and down again, `repeats` times in all.

    Counted from the least noisy time, down to which the paper's code resamples; only the step to clean data, and the
    odd steps at the start, are taken once.
    """
    path, last = [], len(times) - 2
    for i, time in enumerate(times):
        path.append(time)
        if jump <= i <= last and (last - i) % jump == 0:
            path += [*times[i - jump : i + 1]] * (repeats - 1)
    return np.array(path)


def from_noise(schedule, shape):
    """The edit that begins with pure noise; warns where an image of that `shape` still shows at times[0]."""

    def edit(sampler, times):
        check_start_snr(schedule, times[0])
        return sampler, times, lambda predict, key, index: pure_noise(key, shape)

    return edit


def reconstruct(schedule, x_0):
    """The edit that leads from x_0 up to noise and back (see `encode`)."""

    def edit(sampler, times):
        return sampler, times, lambda predict, key, index: encode(predict, sampler, schedule, times, x_0)

    return edit


def interpolate(schedule, t, key, x_0, x_0_other, num):
    """The edit of `num` images from x_0 to x_0_other by way of time t (see `interpolation`)."""

    def edit(sampler, times):
        level = times.dtype.type(max(t, schedule.t_min))  # discrete times are whole, and the options give a float
        start = interpolation(schedule, level, key, x_0, x_0_other)
        times = np.insert(times[times < level], 0, level)
        return sampler, times, lambda predict, key, index: start(index / max(num - 1, 1))

    return edit


def inpaint(schedule, known, mask, jump, repeats):
    """The edit that paints new where `mask` is 0 (see `inpainted` and `resampling_times`)."""

    def edit(sampler, times):
        way = resampling_times(times, jump, repeats)
        return from_noise(schedule, known.shape)(inpainted(sampler, schedule, known, mask), way)

    return edit

"""Image editing: reconstruction, interpolation and inpainting, by changing what samplers.run_sampler is given.

An edit is a function (sampler, times) -> (sampler, times, start) for experiment.make_generate, with
start(predict, key, index) -> x at times[0]. `from_noise` is plain sampling.
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
    """x at times[0] that `sampler`, DDIM with eta = 0, decodes to approximately x_0 over the same decreasing `times`.

    Song, Meng & Ermon 2020, section 4.3: the deterministic steps in reverse order. They begin at the last time above 0
    with x_0 scaled by its alpha, without noise.
    """
    up = np.asarray(times)[-2::-1]
    x = alpha_sigma(schedule.logsnr(up[0]))[0] * x_0
    return x if len(up) == 1 else run_sampler(predict, sampler, up, jax.random.key(0), x)[0][-1]


def interpolation(schedule, t, key, x_0, x_0_other):
    """start(fraction) -> x_t between two images at time t: 0 is x_0, 1 is x_0_other (Ho et al. 2020, section 4.4).

    It is (1 - fraction) x_t + fraction x_t'. Each image is noised only once, so all fractions share the noise.
    """
    noised = [
        q_sample(image, jax.random.normal(named(key, name), image.shape), schedule.logsnr(t))
        for name, image in (("first", x_0), ("second", x_0_other))
    ]
    return lambda fraction: (1 - fraction) * noised[0] + fraction * noised[1]


def inpainted(sampler, schedule, known, mask):
    """RePaint (Lugmayr et al. 2022, algorithm 1): `sampler` that keeps `known` (H, W, C) where `mask` is 1.

    After each step the known pixels of x_s are drawn from q(x_s | known). A step to a larger time s > t adds noise
    (eq. 2), which harmonises the known and the new pixels; see `resampling_times`.
    """

    def step(predict, key, x_t, t, s, memory):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma(schedule.logsnr(time)) for time in (t, s))
        noise = jax.random.normal(named(key, "known"), x_t.shape)

        def denoise():
            x_s, new_memory = sampler.step(predict, key, x_t, t, s, memory)
            return jnp.where(mask, q_sample(known, noise, schedule.logsnr(s)), x_s), new_memory

        def add_noise():
            scale = alpha_s / alpha_t
            std = jnp.sqrt(jnp.maximum(sigma_s**2 - (scale * sigma_t) ** 2, 0))
            return scale * x_t + std * noise, sampler.init(x_t)

        return lax.cond(s < t, denoise, add_noise)

    return sampler._replace(step=step)


def resampling_times(times, jump=10, repeats=5):
    """`times` in which every `jump` steps are run `repeats` times, with a jump back up in between (RePaint).

    Groups of steps are counted from the last time above 0, as in the paper's code. The step to clean data and the
    remaining steps at the start are run once.
    """
    result, last = [], len(times) - 2
    for i, time in enumerate(times):
        result.append(time)
        if jump <= i <= last and (last - i) % jump == 0:
            result += [*times[i - jump : i + 1]] * (repeats - 1)
    return np.array(result)


def from_noise(schedule, shape):
    """The edit that starts from pure noise of `shape`; warns when images are still visible at times[0]."""

    def edit(sampler, times):
        check_start_snr(schedule, times[0])
        return sampler, times, lambda predict, key, index: pure_noise(key, shape)

    return edit


def reconstruct(schedule, x_0):
    """The edit that encodes x_0 into noise and decodes it (see `encode`)."""

    def edit(sampler, times):
        return sampler, times, lambda predict, key, index: encode(predict, sampler, schedule, times, x_0)

    return edit


def interpolate(schedule, t, key, x_0, x_0_other, num):
    """The edit that makes `num` images from x_0 to x_0_other, mixed at time t (see `interpolation`)."""

    def edit(sampler, times):
        level = times.dtype.type(max(t, schedule.t_min))  # discrete times are integers, options are floats
        start = interpolation(schedule, level, key, x_0, x_0_other)
        times = np.insert(times[times < level], 0, level)
        return sampler, times, lambda predict, key, index: start(index / max(num - 1, 1))

    return edit


def inpaint(schedule, known, mask, jump, repeats):
    """The edit that generates the pixels where `mask` is 0 (see `inpainted` and `resampling_times`)."""

    def edit(sampler, times):
        times = resampling_times(times, jump, repeats)
        return from_noise(schedule, known.shape)(inpainted(sampler, schedule, known, mask), times)

    return edit

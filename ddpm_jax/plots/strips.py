"""Images on the way to noise and back, at the times that a figure or a GIF shows."""

from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import diffusion, keys, program
from ddpm_jax.diffusion import to_uint8, to_unit
from ddpm_jax.images import encode_gif, evenly_spaced, grid
from ddpm_jax.plots import figures
from ddpm_jax.schedules import ContinuousSchedule

FRAMES, COLUMNS = 40, 11  # largest number of frames of a GIF, and of columns of a figure


class Strip(NamedTuple):
    times: np.ndarray  # (F,)
    pictures: np.ndarray  # uint8 (F, N, H, W, C)


def noise_images(schedule, x_0, times, key):
    """x_t (eq. 4) at each of `times`, (F, N, H, W, C), from images x_0 (N, H, W, C), with one eps per image."""
    eps = jax.random.normal(key, x_0.shape)
    return jax.vmap(diffusion.q_sample, (None, None, 0))(x_0, eps, schedule.logsnr(times))


def forward(schedule, images, seed=0):
    """The Strip of uint8 images (N, H, W, C) from t = 0 to T."""
    frames = FRAMES if isinstance(schedule, ContinuousSchedule) else min(FRAMES, schedule.T)
    times = schedule.times(frames)[::-1]
    x_t = noise_images(schedule, to_unit(images), times, keys.root(seed, "forward"))
    return Strip(times, np.asarray(to_uint8(x_t)))


def reverse(parts, params, num, steps, seed=0, preview=False):
    """The Strip of the first `num` images of a seed, with the run's sampler.

    It shows x_t, or with `preview` the x_0_hat predicted from it; the last frame is the image that sample.py gives.
    """
    draw = program.make_draw(parts, parts.config.train.sampler, steps, frames=FRAMES, preview=preview)
    pictures = np.concatenate(list(draw(params, num, seed, batch_size=num)))
    return Strip(frame_times(parts.schedule.times(steps), FRAMES, preview), pictures.swapaxes(0, 1))


def frame_times(times, frames, preview):
    """The times of the frames that samplers.run_sampler returns for these sampling `times`."""
    steps = len(times) - 1
    frames = min(frames, steps)
    # Steps before each frame; an x_0_hat belongs to the time at which the last of them started.
    done = -(-np.arange(1, frames + 1) * steps // frames)
    return np.append(times[done[:-1] - preview], 0)


def draw(strip):
    """The Figure of a Strip: one image per row, time from left to right."""
    picked = evenly_spaced(len(strip.times), COLUMNS)
    labels = [f"t = {round(float(strip.times[i]), 3):g}" for i in picked]
    return figures.tiles([grid(strip.pictures[i], columns=1) for i in picked], labels, len(picked))


def gif(strip):
    """A Strip as the bytes of a GIF."""
    return encode_gif([grid(page) for page in strip.pictures])

"""Steps of diffusers' schedulers and of our samplers from the same x_t, output of the network and noise.

Both sides compute in float32, theirs from tables of float32 products, ours from log-SNRs made in float64. Each step of
either starts from the same x_t, so that a difference is that of the step itself; multistep solvers keep their own
memory. Times: theirs run 0..T-1, ours 1..T with 0 for clean data: our t is their t + 1.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import diffusion, samplers, schedules

torch = pytest.importorskip("torch")

SHAPE = (8, 8, 3)
WAYS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}  # our names and theirs
COSINE = schedules.from_betas(schedules.cosine_betas())
ZERO = schedules.from_betas(schedules.zero_terminal(schedules.linear_betas()))


def network(x_t, t, channels=3):
    """A fixed function in the place of a network; it goes beyond [-1, 1], so that clipping is active."""
    phase = 1.3 * np.asarray(x_t) + t / 150
    return np.concatenate([1.4 * np.sin(phase), np.cos(phase)], -1)[..., :channels].astype(np.float32)


def theirs(x):
    """(H, W, C) of ours as their (1, C, H, W)."""
    return torch.from_numpy(np.moveaxis(np.array(x, np.float32), -1, 0)[None].copy())


def ours(x):
    return np.moveaxis(x[0].numpy(), 0, -1)


def noise_of(seed):
    """Their noise of a generator with that seed, for us, and such a generator, for them."""
    noise = torch.randn((1, *np.roll(SHAPE, 1)), generator=torch.Generator().manual_seed(seed))
    return ours(noise), torch.Generator().manual_seed(seed)


def our_step(sampler, schedule, way="eps", limit="none"):
    """step(output, noise, x_t, t, s, memory) -> x_s, memory, with the network's output and all noise given."""
    make = diffusion.make_denoiser_with_variance if sampler.needs_variance else diffusion.make_denoiser

    @jax.jit
    def step(output, noise, x_t, t, s, memory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samplers.jax.random, "normal", lambda key, shape: noise)
            parameterization, limits = diffusion.PARAMETERIZATIONS[way], diffusion.LIMITS[limit]
            predict = make(lambda *_, label: output, schedule, parameterization, None, limit=limits)
            return sampler.step(predict, jax.random.key(0), x_t, t, s, memory)

    return step


class Step(NamedTuple):
    t: int
    s: int
    x_t: np.ndarray
    output: np.ndarray
    mine: np.ndarray  # x_s
    his: np.ndarray
    his_x_0_hat: np.ndarray | None

    @property
    def difference(self):
        """The greatest one, relative where x_s is larger than an image."""
        return np.abs(self.mine - self.his).max() / max(1.0, np.abs(self.his).max())


def walk(scheduler, sampler, schedule, times, way="eps", limit="none", channels=3, **options):
    """A Step for each pair of `times`, each from what their last step gave, along what `scheduler` was set to."""
    np.testing.assert_array_equal(scheduler.timesteps.numpy() + 1, times[: len(scheduler.timesteps)])
    step, x = our_step(sampler, schedule, way, limit), np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    memory = sampler.init(jnp.asarray(x))
    for (t, s), their_t in zip(itertools.pairwise(times.tolist()), scheduler.timesteps, strict=True):
        output, (noise, generator) = network(x, t, channels), noise_of(t)
        mine, memory = step(output, noise, x, t, s, memory)
        given = {"generator": generator} | {k: v(noise) if callable(v) else v for k, v in options.items()}
        result = scheduler.step(theirs(output), their_t, theirs(x), **given)
        x_0_hat = result.get("pred_original_sample")
        his = ours(result.prev_sample)
        yield Step(t, s, x, output, np.asarray(mine), his, None if x_0_hat is None else ours(x_0_hat))
        x = his


def together(scheduler, sampler, schedule, steps, spacing="trailing", **options):
    scheduler.set_timesteps(steps)
    return list(walk(scheduler, sampler, schedule, schedule.times(steps, spacing), **options))


def worst(steps):
    return max(step.difference for step in steps)


def noise_up_to(t):
    """1 - alphas_bar_t of the linear schedule, the variance of all noise up to t."""
    return 1 - np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:t])

"""Gaussian data, for which the best denoiser and every answer are known."""

import numpy as np

from ddpm_jax import diffusion

BAR = np.insert(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 0, 1.0)  # alphas_bar_0..T, linear schedule, float64
MEAN = 0.3


def exact(schedule, spread, mean=MEAN):
    """E[x_0 | x_t] for data N(mean, spread^2)."""

    def predict(x_t, t):
        alpha, sigma = diffusion.alpha_sigma(schedule.logsnr(t))
        return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x_t - alpha * mean)

    return predict


def gaussian_image(spread, shape=(8, 8, 1), seed=0, mean=MEAN):
    """Pixels of N(mean, spread^2) whose own mean and variance are just these."""
    x = np.random.default_rng(seed).normal(size=shape)
    return (mean + spread * (x - x.mean()) / x.std()).astype(np.float32)

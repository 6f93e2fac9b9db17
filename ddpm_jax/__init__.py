"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX and Flax.

This module does not import JAX, so `--help` and argument errors appear without waiting for it.
"""

from ddpm_jax import environment

__version__ = "0.2.0"

environment.prepare()

"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX and Flax.

This file does not import JAX, so that `--help` and argument errors answer before it is loaded.
"""

from ddpm_jax import environment

__version__ = "0.2.0"

environment.prepare()

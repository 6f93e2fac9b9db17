"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX and Flax.

This file imports nothing, so that `--help` and argument errors answer before JAX is loaded.
"""

__version__ = "0.1.0"

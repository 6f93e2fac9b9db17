"""Weights in and out: the folders of diffusers' DDPMs, and single safetensors files with the config inside.

layout.py turns diffusers' configs into ours and back, tensors.py its tensors; __main__.py is the command line:

    python -m ddpm_jax.interop import DIR --workdir=runs/church
    python -m ddpm_jax.interop export runs/digits DIR

docs/interop.md has every convention that differs.
"""

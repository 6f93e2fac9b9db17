"""Import and export weights: folders of diffusers' DDPMs, and single safetensors files that contain the config.

layout.py converts diffusers' configs to ours and back, tensors.py its tensors; __main__.py is the command line:

    python -m ddpm_jax.interop import DIR --workdir=runs/church
    python -m ddpm_jax.interop export runs/digits DIR

docs/interop.md lists every convention that differs.
"""

"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX and Flax.

This file does not import JAX, so that `--help` and argument errors answer before it is loaded.
"""

import os
from importlib import metadata, util

__version__ = "0.1.0"

YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
WRONG_SUMS = ("0.10.2",)  # versions of jaxlib


def _leave_out_wrong_sums():
    """Keep jaxlib 0.10.2 from fusing sums on a CPU, some of which come out wrong there (jax-ml/jax issue 39103).

    XLA reads its flags when JAX first makes an array, so this package is to be imported before that. A flag of the
    user's own stays; where an accelerator's plugin is installed, which reads the same flags, nothing is changed.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    accelerated = os.environ.get("JAX_PLATFORMS") != "cpu" and any(
        util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    )
    if metadata.version("jaxlib") in WRONG_SUMS and YNN_FLAG not in flags and not accelerated:
        os.environ["XLA_FLAGS"] = f"{flags} {YNN_FLAG}=-reduce".strip()


_leave_out_wrong_sums()

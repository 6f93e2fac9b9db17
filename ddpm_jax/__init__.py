"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX and Flax.

This file does not import JAX, so that `--help` and argument errors answer before it is loaded.
"""

import glob
import os
from importlib import util

__version__ = "0.1.0"

# What libtpu looks for around it, at length, and prints that it did not find; and it lets in one process at a time.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_is_attached():
    """Whether this machine has the device files of a TPU, without which libtpu cannot open one."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _quiet_libtpu():
    """Where libtpu is installed and has no TPU to find, keep it from printing so; what the user has set stays."""
    if util.find_spec("libtpu") and not tpu_is_attached() and "JAX_FORCE_TPU_INIT" not in os.environ:
        for variable, value in WITHOUT_TPU.items():
            os.environ.setdefault(variable, value)


_quiet_libtpu()

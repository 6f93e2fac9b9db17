"""What must stand in the environment before JAX starts; set when the package is imported, and never over the user's."""

import glob
import os
from importlib import metadata, util

YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
MISCOMPILED = ("0.10.2",)  # versions of jaxlib
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")  # of GPUs; they read XLA_FLAGS too

# What libtpu looks for around it, at length, and prints that it did not find; and it lets in one process at a time.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare():
    """Set what the software here needs; XLA reads its flags when JAX first makes an array."""
    _disable_miscompiled_reductions()
    _quiet_libtpu()


def tpu_is_attached():
    """Whether this machine has the device files of a TPU, without which libtpu cannot open one."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _disable_miscompiled_reductions():
    """Keep jaxlib 0.10.2 from fusing sums on a CPU, some of which come out wrong there (jax-ml/jax issue 39103)."""
    flags = os.environ.get("XLA_FLAGS", "")
    accelerated = tpu_is_attached() or any(util.find_spec(name) for name in PLUGINS)
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerated
    if on_cpu and metadata.version("jaxlib") in MISCOMPILED and YNN_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {YNN_FLAG}=-reduce".strip()


def _quiet_libtpu():
    """Where libtpu is installed and has no TPU to find, keep it from printing so."""
    if util.find_spec("libtpu") and not tpu_is_attached() and "JAX_FORCE_TPU_INIT" not in os.environ:
        for variable, value in WITHOUT_TPU.items():
            os.environ.setdefault(variable, value)

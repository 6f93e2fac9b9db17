"""Environment variables that must be set before JAX starts. The user's own settings always win."""

import glob
import os
from importlib import metadata, util

YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
MISCOMPILED = ("0.10.2",)  # versions of jaxlib
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")  # of GPUs; they read XLA_FLAGS too

# With these set, libtpu does not search for a TPU, print that it found none, or refuse a second process.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare():
    """Set the variables for the installed libraries. XLA reads its flags when JAX creates the first array."""
    _choose_fusions()
    _quiet_libtpu()


def tpu_is_attached():
    """Whether this machine has the device files that libtpu needs to open a TPU."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _choose_fusions():
    """Turn off two kinds of YNNPACK's fusions on CPU, where no accelerator's plugin would read the flag too.

    Its convolutions take twice as long as Eigen's for the gradient of a kernel (docs/performance.md). Its sums give
    some wrong results in jaxlib 0.10.2 (jax-ml/jax issue 39103).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    has_accelerator = tpu_is_attached() or any(util.find_spec(name) for name in PLUGINS)
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not has_accelerator
    if on_cpu and YNN_FLAG not in flags:
        wrong = ["-reduce"] if metadata.version("jaxlib") in MISCOMPILED else []
        os.environ["XLA_FLAGS"] = f"{flags} {YNN_FLAG}={','.join(['-individual_convolution', *wrong])}".strip()


def _quiet_libtpu():
    """Silence libtpu where it is installed but no TPU is attached."""
    if util.find_spec("libtpu") and not tpu_is_attached() and "JAX_FORCE_TPU_INIT" not in os.environ:
        for variable, value in WITHOUT_TPU.items():
            os.environ.setdefault(variable, value)

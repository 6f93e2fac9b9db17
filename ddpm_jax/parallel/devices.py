"""Choosing and describing the devices of this process, and TPU devices to compile for without having them."""

import contextlib
import importlib.util
import os
import re
import warnings
import zlib
from pathlib import Path
from platform import machine

import jax

from ddpm_jax.environment import WITHOUT_TPU
from ddpm_jax.errors import ConfigError, OutOfMemory
from ddpm_jax.parallel import launch
from ddpm_jax.parallel.pods import gather, make_exit_code_sync
from ddpm_jax.run.files import cache_folder


def start(batch_size, accumulate=1, platform="auto", distributed="auto", cpu_devices=0, heartbeat=100, members=1):
    """Choose the devices and join the other processes. Must be called before any array is created.

    Once JAX has started, here or in the program around this call, the choice is fixed; another one is a ConfigError.

    platform: cpu, gpu or tpu, or auto for the best available. distributed: off; auto to join the other processes of a
    SLURM, Open MPI or TPU pod job; or "HOST:PORT,ID,COUNT". cpu_devices: the number of devices that a CPU is split
    into; 0 for up to one per core, as long as they divide the batch into 16 images or more each, or the `members` of
    an ensemble evenly (XLA uses the cores better as several devices). heartbeat: seconds of silence after which a
    process counts as lost and the others end.
    """
    platforms_before = jax.config.jax_platforms
    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    if not jax.config.jax_compilation_cache_dir:  # not set by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / _processor()))
    _split_cpu(cpu_devices, batch_size, accumulate, members)
    launch.join(distributed, heartbeat)
    try:
        _check_platform(platform)
    except ConfigError:
        jax.config.update("jax_platforms", platforms_before)
        raise
    # Connect all devices now: XLA waits only 30 s for a connection, but without limit for a result later.
    gather("")
    make_exit_code_sync()(None)


def _split_cpu(requested, batch_size, accumulate, members):
    """Split a CPU into `requested` devices; 0 for as many as its cores, the batch and the members allow."""
    devices = requested
    if not requested and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        counts = range(2, cores + 1)
        if members > 1:
            fits = [n for n in counts if members % n == 0]
        else:
            fits = [n for n in counts if batch_size % (n * accumulate) == 0 and batch_size // n >= 16]
        devices = max(fits, default=1)
    if not devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:  # JAX has started
        actual = jax.local_device_count()
        if requested and requested != actual and jax.default_backend() == "cpu":
            raise ConfigError(
                f"--cpu-devices={requested}, but this process already uses its CPU as {actual}; start a new one"
            ) from error


def _check_platform(requested):
    """Raise ConfigError unless JAX runs on the `requested` platform; warn when it falls back to CPU."""
    try:
        actual = jax.default_backend()
    except RuntimeError as error:
        raise ConfigError(f"no such platform here: {str(error).splitlines()[0]} (--platform={requested})") from error
    if requested not in ("auto", actual):
        raise ConfigError(
            f"--platform={requested} is not available, JAX found {actual}; another choice needs a new process"
        )
    signs = [name for name in ("CUDA_VISIBLE_DEVICES", "TPU_NAME") if os.environ.get(name)]
    signs += [path for path in ("/dev/nvidia0", "/dev/accel0") if os.path.exists(path)]
    if actual == "cpu" and requested == "auto" and signs:
        warnings.warn(
            f"running on CPU although {signs[0]} suggests an accelerator; install ddpm-jax[cuda13] or [tpu], "
            "or add --platform=cpu",
            stacklevel=3,
        )


def _processor():
    """A name for this type of CPU: a program compiled for one can crash on another that shares the cache."""
    try:
        facts = re.findall(r"^(?:model name|flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        facts = []
    return f"{machine()}-{zlib.crc32(' '.join(sorted(set(facts))).encode()):08x}"


def describe():
    """The devices and processes as text, such as "8 x TPU v4 (tpu) in 2 processes"."""
    kind = jax.devices()[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {kind} ({jax.default_backend()}){processes}"


@contextlib.contextmanager
def memory_advice(advice):
    """Inside the block, a device that runs out of memory raises OutOfMemory with this advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(f"a device has too little memory ({str(error).splitlines()[0][:160]}); {advice}") from error


def topology(name):
    """The devices of a TPU slice, such as v5e:2x4, to compile for without having it.

    As on the real slice, a chip of TPU7x, v3 or v2 is two devices to JAX, any other chip is one.
    Raises ConfigError without libtpu, for an unknown name, and for a slice larger than any that exists.
    """
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(f"--topology={name} needs TPU's compiler: pip install ddpm-jax[tpu]")
    from jax.experimental import topologies

    jax.config.update("jax_enable_compilation_cache", False)  # it cannot load programs for chips that are not here
    for variable, value in WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
        if devices[0].device_kind == "TPU v4":  # libtpu's default has two devices a chip, a real machine has one
            devices = topologies.get_topology_desc(name, "tpu", chip_config_name="megacore").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(
            f"--topology={name} is not known ({reason}); try v5e:2x4, v6e:2x4, tpu7x:2x2x1, v5p:2x2x1 or v4:2x2x1"
        ) from error
    if devices[0].device_kind.endswith("lite") and max(max(device.coords) for device in devices) >= 16:
        raise ConfigError(f"--topology={name} is larger than any such slice, which has 16x16 chips at most")
    return devices

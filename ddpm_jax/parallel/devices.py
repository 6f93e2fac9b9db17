"""The devices of this process: chosen, described, and those of machines that are not here."""

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
from ddpm_jax.parallel.pods import gather, make_agreement
from ddpm_jax.run.files import cache_folder


def start(batch_size, accumulate=1, platform="auto", distributed="auto", cpu_devices=0, heartbeat=100, members=1):
    """Choose the devices and join the other processes; to be called before any array is made.

    A process has one choice: where JAX has started, that of an earlier call, or of the program around it, stays, and
    ConfigError says so when another is asked for.

    platform: auto, or cpu, gpu, tpu, which refuses anything else. distributed: off; auto, which joins where SLURM,
    Open MPI or a TPU pod says that there are several processes; or "HOST:PORT,ID,COUNT" spelled out. cpu_devices: as
    how many devices a CPU shows itself; 0 for one a core, as far as they divide the batch into shares of 16 images or
    more, or the `members` of an ensemble (XLA uses several cores better so than from one device). heartbeat: seconds of
    silence after which a process counts as lost and the others end.
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
    # Connect all devices now: XLA waits 30 s for the others to connect, but after that for as long as they need.
    gather("")
    make_agreement()(None)


def _split_cpu(wanted, batch_size, accumulate, members):
    """Let a CPU show itself as `wanted` devices; 0 for as many as its cores, the batch and the members allow."""
    devices = wanted
    if not wanted and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
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
        used = jax.local_device_count()
        if wanted and wanted != used and jax.default_backend() == "cpu":
            raise ConfigError(
                f"--cpu-devices={wanted}, but this process already uses its CPU as {used}; start a new one"
            ) from error


def _check_platform(wanted):
    """Raise ConfigError unless JAX runs on the `wanted` platform; warn when it falls back to a CPU."""
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise ConfigError(f"no such platform here: {str(error).splitlines()[0]} (--platform={wanted})") from error
    if wanted not in ("auto", found):
        raise ConfigError(
            f"--platform={wanted} is not available, JAX found {found}; another choice needs a new process"
        )
    signs = [name for name in ("CUDA_VISIBLE_DEVICES", "TPU_NAME") if os.environ.get(name)]
    signs += [path for path in ("/dev/nvidia0", "/dev/accel0") if os.path.exists(path)]
    if found == "cpu" and wanted == "auto" and signs:
        warnings.warn(
            f"running on CPU although {signs[0]} speaks of an accelerator; install ddpm-jax[cuda13] or [tpu], "
            "or say --platform=cpu",
            stacklevel=3,
        )


def _processor():
    """A name for this kind of processor: a program compiled for one can crash on another that shares the folder."""
    try:
        said = re.findall(r"^(?:model name|flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        said = []
    return f"{machine()}-{zlib.crc32(' '.join(sorted(set(said))).encode()):08x}"


def describe():
    """The devices in words."""
    kind = jax.devices()[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {kind} ({jax.default_backend()}){processes}"


@contextlib.contextmanager
def memory_advice(what):
    """Within it, a device that runs out of memory is an OutOfMemory that says `what` to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(f"a device has too little memory ({str(error).splitlines()[0][:160]}); {what}") from error


def topology(name):
    """The devices of a TPU slice that is not here, such as v5e:2x4, to compile for.

    They are those that JAX has on the real one: two of each chip of TPU7x, v3 and v2, one of each of the others.
    Raises ConfigError without libtpu, for a name that it does not know, and for more chips than there are.
    """
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(f"--topology={name} needs TPU's compiler: pip install ddpm-jax[tpu]")
    from jax.experimental import topologies

    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read back what is for other chips
    for variable, value in WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
        if devices[0].device_kind == "TPU v4":  # as libtpu has it half a chip is a device; on a real one a chip is
            devices = topologies.get_topology_desc(name, "tpu", chip_config_name="megacore").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0][:160]
        raise ConfigError(
            f"--topology={name} is not known ({said}); try v5e:2x4, v6e:2x4, tpu7x:2x2x1, v5p:2x2x1 or v4:2x2x1"
        ) from error
    if devices[0].device_kind.endswith("lite") and max(max(device.coords) for device in devices) >= 16:
        raise ConfigError(f"--topology={name} is larger than any such machine, which has 16x16 chips at most")
    return devices

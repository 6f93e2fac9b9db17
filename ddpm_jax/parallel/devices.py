"""Devices and processes; no other file knows of them.

State is replicated and has no leading device axis (`in_axes=None, out_axes=None`); a batch has one. Since JAX 0.8
`pmap` is `jit(shard_map)` inside, so the program is an ordinary partitioned one.
"""

import contextlib
import importlib.util
import json
import os
import re
import threading
import warnings
import zlib
from pathlib import Path
from platform import machine

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.environment import WITHOUT_TPU, tpu_is_attached
from ddpm_jax.errors import INTERRUPTED, PREEMPTED, ConfigError, Diverged, LostProcess, OutOfMemory, UserError
from ddpm_jax.run.files import cache_folder

AXIS = "batch"


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
    platforms = jax.config.jax_platforms
    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    if not jax.config.jax_compilation_cache_dir:  # not told by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / _processor()))
    asked = cpu_devices
    if not asked and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        fits = [n for n in range(2, cores + 1) if batch_size % (n * accumulate) == 0 and batch_size // n >= 16]
        if members > 1:
            fits = [n for n in range(2, cores + 1) if members % n == 0]
        cpu_devices = max(fits, default=1)
    if cpu_devices:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError as error:  # JAX has started
            used = jax.local_device_count()
            if asked and asked != used and jax.default_backend() == "cpu":
                raise ConfigError(
                    f"--cpu-devices={asked}, but this process already uses its CPU as {used}; start a new one"
                ) from error
    place = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", distributed)
    if distributed not in ("auto", "off") and not (place and int(place[2]) < int(place[3])):
        raise ConfigError(f"--distributed={distributed} is not auto, off or HOST:PORT,ID,COUNT with ID below COUNT")
    try:
        if jax.distributed.is_initialized():
            _check_joined(distributed, place)
        elif place:
            jax.distributed.initialize(place[1], int(place[3]), int(place[2]), heartbeat_timeout_seconds=heartbeat)
        elif distributed == "auto" and _among_several():
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the other processes ({str(error).splitlines()[0]}); --distributed=off trains alone"
        ) from error
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        jax.config.update("jax_platforms", platforms)
        raise ConfigError(f"no such platform here: {str(error).splitlines()[0]} (--platform={platform})") from error
    if platform not in ("auto", found):
        jax.config.update("jax_platforms", platforms)
        raise ConfigError(
            f"--platform={platform} is not available, JAX found {found}; another choice needs a new process"
        )
    wanted = [name for name in ("CUDA_VISIBLE_DEVICES", "TPU_NAME") if os.environ.get(name)]
    wanted += [path for path in ("/dev/nvidia0", "/dev/accel0") if os.path.exists(path)]
    if found == "cpu" and platform == "auto" and wanted:
        warnings.warn(
            f"running on CPU although {wanted[0]} speaks of an accelerator; install ddpm-jax[cuda13] or [tpu], "
            "or say --platform=cpu",
            stacklevel=2,
        )
    # Connect all devices now: XLA waits 30 s for the others to connect, but after that for as long as they need.
    gather("")
    make_agree()(None)


def _check_joined(distributed, place):
    """Raise ConfigError unless this process, which has joined others, is asked to be among just these."""
    joined = jax.process_index(), jax.process_count()
    if joined[1] > 1 and (distributed == "off" or (place and joined != (int(place[2]), int(place[3])))):
        raise ConfigError(
            f"this process is already number {joined[0]} of {joined[1]}; --distributed={distributed} needs a new one"
        )


def _processor():
    """A name for this kind of processor: a program compiled for one can crash on another that shares the folder."""
    try:
        said = re.findall(r"^(?:model name|flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        said = []
    return f"{machine()}-{zlib.crc32(' '.join(sorted(set(said))).encode()):08x}"


def _among_several():
    counts = [os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    on_tpu = importlib.util.find_spec("libtpu") is not None and tpu_is_attached()
    return any(count != "1" for count in counts) or "JAX_COORDINATOR_ADDRESS" in os.environ or on_tpu


def describe():
    """The devices in words."""
    kind = jax.devices()[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {kind} ({jax.default_backend()}){processes}"


def is_first():
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def make_agree():
    """agree(code): the largest exit code that a process gave at the call before this one, None counting as none.

    So all leave after the same step, and no step waits for the others' answers. A lone process is answered at once.
    """
    if jax.process_count() == 1:
        return lambda code: code
    largest = jax.pmap(lambda code: lax.pmax(code, AXIS), axis_name=AXIS, out_axes=None)
    codes = []

    def agree(code):
        codes.append(largest(np.full(jax.local_device_count(), code or 0, np.int32)))
        return int(codes.pop(0)) or None if len(codes) > 1 else None

    return agree


def gather(text):
    """The texts that all processes give, in their order; waits for all."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(work):
    """work() in every process; the UserError of one is raised in all of them, so that none waits for one that left."""
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        if jax.process_count() == 1:
            raise
        failure = error
    told = gather(json.dumps([type(failure).__name__, str(failure)] if failure else None))
    for process, (kind, text) in ((i, json.loads(answer)) for i, answer in enumerate(told) if answer != "null"):
        kinds = {kind.__name__: kind for kind in UserError.__subclasses__()}
        raise kinds.get(kind, UserError)(f"{text} (process {process})") from failure
    return result


@contextlib.contextmanager
def among_others(patience=10):
    """Within it, the loss of another process is a LostProcess; and an error ends this one, whatever the others do.

    At its exit JAX waits for them. Those that met the same error come there too; others, which know nothing of it, wait
    for this process in the next step, so that after `patience` seconds it leaves alone.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, (RuntimeError, ValueError)) and re.search("Gloo|NCCL", str(error)):
            reason = str(error).splitlines()[0][:160]
            error = LostProcess(f"another process has ended ({reason}); start all of them again with the same command")
            patience = 1
        codes = {KeyboardInterrupt: INTERRUPTED, SystemExit: PREEMPTED}
        leave = threading.Timer(patience, os._exit, [codes.get(type(error), getattr(error, "exit_code", 1))])
        leave.daemon = True
        leave.start()
        raise error


@contextlib.contextmanager
def memory_for(what):
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


def check_batch_size(batch_size, accumulate=1, devices=None, members=1):
    """Raise ConfigError unless the batch divides evenly over all `devices` and micro-batches.

    Each of several `members` has a whole batch on one device; all are in one process.
    """
    if members > 1 and jax.process_count() > 1:
        raise ConfigError(f"train.ensemble={members} runs in one process, not in {jax.process_count()}")
    devices = 1 if members > 1 else len(devices or jax.devices())
    unit = devices * accumulate
    if batch_size % unit:
        near = [size for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size]
        over = f"{devices} devices" + (f" of {accumulate} micro-batches each" if accumulate > 1 else "")
        raise ConfigError(f"batch_size={batch_size} does not divide over {over}; try {' or '.join(map(str, near))}")


def local_rows(batch_size):
    """The rows of a global batch that belong to this process."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def shard(batch):
    """Cut this process's rows into one piece a device: (b, ...) -> (devices, b / devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)


def replicate(tree, devices=None):
    """Place a tree whole on each device, exactly as the mapped functions return it, so that they compile once."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pmap_step(train_step, devices=None):
    """The train step over all `devices` of all processes; the state it is given is used up (donated)."""
    axes = {"in_axes": (None, 0, None), "out_axes": None}
    return jax.pmap(train_step, axis_name=AXIS, **axes, devices=devices, donate_argnums=0)


def spread(steps, members):
    """(`steps` of arrays (members, ...), the members shared out over as many devices as divide them; place).

    place(tree) puts one such tree where it belongs.
    """
    number = max(n for n in range(1, jax.device_count() + 1) if members % n == 0)
    mesh, parts = Mesh(np.array(jax.devices()[:number]), ("members",)), PartitionSpec("members")
    spread_steps = jax.shard_map(steps, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False)
    return spread_steps, lambda tree: jax.device_put(tree, NamedSharding(mesh, parts))


def pmap_rows(measure):
    """`measure`(params, root, row) over this process's devices and the rows of each; a row is a tree of arrays."""
    batched = jax.vmap(measure, (None, None, 0))
    return jax.pmap(batched, axis_name=AXIS, in_axes=(None, None, 0), devices=jax.local_devices())


def measure_batches(measure, params, root, rows, batch_size=64):
    """What a pmapped `measure` makes of `rows`, a tree of arrays (n, ...), one tree of arrays (b, ...) after another.

    The batch is rounded up to the devices, the last one filled up and cut off again: one shape, one compilation.
    """
    devices, n = jax.local_device_count(), len(jax.tree.leaves(rows)[0])
    batch_size = -(-min(batch_size, n) // devices) * devices
    for start in range(0, n, batch_size):
        take, keep = np.arange(start, start + batch_size) % n, min(batch_size, n - start)
        part = shard(jax.tree.map(lambda x, take=take: x[take], rows))
        found = jax.device_get(measure(params, root, part))
        yield jax.tree.map(lambda x, keep=keep: x.reshape(batch_size, *x.shape[2:])[:keep], found)


def pmap_generate(generate):
    """`generate` (see samplers.make_generate) over this process's devices and the images of each."""
    batched = jax.vmap(generate, (None, None, 0, 0))
    return jax.pmap(batched, axis_name=AXIS, in_axes=(None, None, 0, 0), devices=jax.local_devices())


def generate_batches(generate, params, root, indices, labels=None, batch_size=64):
    """Pictures of the given indices, one array (b, frames, H, W, C) after another, by a pmapped `generate`.

    Raises Diverged when a picture is not finite.
    """

    def measure(params, root, row):
        return generate(params, root, row["index"], row["label"])

    rows, done = {"index": indices, "label": labels}, 0
    for images, finite in measure_batches(measure, params, root, rows, batch_size):
        if not finite.all():
            raise Diverged(f"sample {indices[done + np.argmin(finite)]} is not finite; nothing was written for it")
        yield images
        done += len(images)

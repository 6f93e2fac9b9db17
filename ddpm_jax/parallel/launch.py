"""Joining the other processes of a run."""

import importlib.util
import os
import re

import jax

from ddpm_jax.environment import tpu_is_attached
from ddpm_jax.errors import ConfigError


def join(distributed, heartbeat):
    """Join the other processes; the arguments are those of devices.start.

    Raises ConfigError for a malformed `distributed`, when joining fails, and when this process is part of another job.
    """
    place = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", distributed)
    if distributed not in ("auto", "off") and not (place and int(place[2]) < int(place[3])):
        raise ConfigError(f"--distributed={distributed} is not auto, off or HOST:PORT,ID,COUNT with ID below COUNT")
    try:
        if jax.distributed.is_initialized():
            _check_joined(distributed, place)
        elif place:
            jax.distributed.initialize(place[1], int(place[3]), int(place[2]), heartbeat_timeout_seconds=heartbeat)
        elif distributed == "auto" and _is_multi_process_job():
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the other processes ({str(error).splitlines()[0]}); --distributed=off trains alone"
        ) from error


def _check_joined(distributed, place):
    joined = jax.process_index(), jax.process_count()
    if joined[1] > 1 and (distributed == "off" or (place and joined != (int(place[2]), int(place[3])))):
        raise ConfigError(
            f"this process is already number {joined[0]} of {joined[1]}; --distributed={distributed} needs a new one"
        )


def _is_multi_process_job():
    """Whether SLURM, Open MPI, JAX's own variables or a TPU indicate several processes."""
    counts = [os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    on_tpu = importlib.util.find_spec("libtpu") is not None and tpu_is_attached()
    return any(count != "1" for count in counts) or "JAX_COORDINATOR_ADDRESS" in os.environ or on_tpu

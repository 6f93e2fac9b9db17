"""Devices and processes; other code reaches them only through this package.

devices.py chooses and describes the devices, launch.py joins the other processes, steps.py maps functions over the
devices, pods.py coordinates the processes.
"""

from ddpm_jax.parallel.devices import describe, memory_advice, start, topology
from ddpm_jax.parallel.pods import fail_fast, gather, is_first, make_exit_code_sync, on_all_processes
from ddpm_jax.parallel.steps import (
    AXIS,
    check_batch_size,
    generate_batches,
    local_rows,
    measure_batches,
    pmap_generate,
    pmap_rows,
    pmap_step,
    replicate,
    shard,
    shard_members,
)

__all__ = [
    "AXIS",
    "check_batch_size",
    "describe",
    "fail_fast",
    "gather",
    "generate_batches",
    "is_first",
    "local_rows",
    "make_exit_code_sync",
    "measure_batches",
    "memory_advice",
    "on_all_processes",
    "pmap_generate",
    "pmap_rows",
    "pmap_step",
    "replicate",
    "shard",
    "shard_members",
    "start",
    "topology",
]

"""Devices and processes; the only rooms that know of them.

devices.py chooses and describes the devices, launch.py joins the other processes, steps.py runs functions over the
devices, pods.py keeps the processes together.
"""

from ddpm_jax.parallel.devices import describe, memory_advice, start, topology
from ddpm_jax.parallel.pods import exit_with_others, gather, is_first, make_agreement, on_all_processes
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
    spread,
)

__all__ = [
    "AXIS",
    "check_batch_size",
    "describe",
    "exit_with_others",
    "gather",
    "generate_batches",
    "is_first",
    "local_rows",
    "make_agreement",
    "measure_batches",
    "memory_advice",
    "on_all_processes",
    "pmap_generate",
    "pmap_rows",
    "pmap_step",
    "replicate",
    "shard",
    "spread",
    "start",
    "topology",
]

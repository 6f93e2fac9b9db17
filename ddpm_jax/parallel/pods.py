"""Coordination of the processes of a run: they stop at the same step, and none waits for one that has exited."""

import contextlib
import json
import os
import re
import threading

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from ddpm_jax.errors import INTERRUPTED, PREEMPTED, LostProcess, UserError
from ddpm_jax.parallel.steps import AXIS


def is_first():
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


def make_exit_code_sync():
    """sync_exit_code(code) -> the largest exit code that any process passed at the previous call, or None.

    All processes then stop after the same step, and no step waits for communication. A single process gets `code` back.
    """
    if jax.process_count() == 1:
        return lambda code: code
    largest = jax.pmap(lambda code: lax.pmax(code, AXIS), axis_name=AXIS, out_axes=None)
    codes = []

    def sync_exit_code(code):
        codes.append(largest(np.full(jax.local_device_count(), code or 0, np.int32)))
        return int(codes.pop(0)) or None if len(codes) > 1 else None

    return sync_exit_code


def gather(text):
    """The texts of all processes, in the order of the processes; waits for all of them."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def on_all_processes(work):
    """work() in every process. A UserError in one of them is raised in all, so that none waits for one that failed."""
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        if jax.process_count() == 1:
            raise
        failure = error
    outcomes = map(json.loads, gather(json.dumps([type(failure).__name__, str(failure)] if failure else None)))
    for process, outcome in enumerate(outcomes):
        if outcome:
            kinds = {kind.__name__: kind for kind in UserError.__subclasses__()}
            raise kinds.get(outcome[0], UserError)(f"{outcome[1]} (process {process})") from failure
    return result


@contextlib.contextmanager
def fail_fast(patience=10):
    """Inside the block, the loss of another process raises LostProcess, and an error ends this process in any case.

    At exit JAX waits for the other processes. Those with the same error arrive there too. Others wait for this one in
    the next step: a deadlock, which this process ends by exiting after `patience` seconds.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, (RuntimeError, ValueError)) and re.search("Gloo|NCCL", str(error)):
            reason = str(error).splitlines()[0][:160]
            error = LostProcess(f"another process has ended ({reason}); restart all of them with the same command")
            patience = 1
        codes = {KeyboardInterrupt: INTERRUPTED, SystemExit: PREEMPTED}
        timer = threading.Timer(patience, os._exit, [codes.get(type(error), getattr(error, "exit_code", 1))])
        timer.daemon = True
        timer.start()
        raise error

"""What all processes of a run do together: they agree, and none waits for one that has left."""

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
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def make_agreement():
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


def on_all_processes(work):
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
def exit_with_others(patience=10):
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

"""A profiler trace of some steps of a run, for ui.perfetto.dev or TensorBoard."""

import contextlib
import warnings

import jax

from ddpm_jax.errors import first_line


@contextlib.contextmanager
def profiler(span, folder, say):
    """A function profile(step, state), to be called before each step, that traces the steps span[0] to span[1].

    step: the number of steps taken; state: their result, waited for when tracing starts and stops. Errors are warnings.
    """
    start, stop = span
    running, failed = False, False

    def profile(step, state):
        nonlocal running, failed
        if running == (start <= step < stop and not failed):
            return
        jax.block_until_ready(state)
        running = not running
        try:
            if running:
                jax.profiler.start_trace(folder)
            else:
                jax.profiler.stop_trace()
                say(f"the trace of --profile={start}:{stop} is in {folder}")
        except Exception as error:  # a profiler error must not end the run
            failed, running = True, False
            warnings.warn(f"there is no trace of steps {start} to {stop}: {first_line(error)}", stacklevel=2)

    try:
        yield profile
    finally:
        profile(stop, None)

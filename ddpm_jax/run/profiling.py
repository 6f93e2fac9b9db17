"""A trace of some steps of a run, which ui.perfetto.dev and TensorBoard's profiler show."""

import contextlib
import warnings

import jax

from ddpm_jax.errors import first_line


@contextlib.contextmanager
def profiler(span, folder, say):
    """Within it, profile(step, state) is to be called before each step: from span[0] to span[1] all is traced.

    step: the number of steps taken; state: what they give, waited for at both ends. What fails is a warning.
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
        except Exception as error:  # whatever the profiler raises, the run goes on
            failed, running = True, False
            warnings.warn(f"there is no trace of steps {start} to {stop}: {first_line(error)}", stacklevel=2)

    try:
        yield profile
    finally:
        profile(stop, None)

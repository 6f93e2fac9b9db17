"""Signals that stop the training loop after the current step, and a watchdog that shows where it hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import warnings

from ddpm_jax.errors import INTERRUPTED, PREEMPTED

# Besides Ctrl-C, the signals by which schedulers end a job or warn before they do: SLURM sends what --signal names,
# Grid Engine's -notify sends USR1 and USR2, limits on CPU time send XCPU, a closed terminal or connection HUP.
WARNINGS = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
CODES = {signal.SIGINT: INTERRUPTED} | dict.fromkeys(WARNINGS, PREEMPTED)


@contextlib.contextmanager
def catch():
    """Catch the signals in CODES. The value is stop_requested(): the exit code for the signal received, or None.

    Ignored signals (nohup, a background job of a script) stay ignored. Outside the main thread no signal is caught.
    Before the first call of stop_requested() there is nothing to save, and a signal ends the process. After it, a
    second Ctrl-C ends the process: whatever is being written is not committed, so nothing is harmed.
    """
    if threading.current_thread() is not threading.main_thread():
        warnings.warn("Python delivers signals to the main thread only: here none can save and stop", stacklevel=3)
        yield lambda: None
        return
    received, polled = [], False
    source, sink = os.pipe()
    os.set_blocking(sink, False)

    def handle(number, frame):
        if not polled:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(PREEMPTED)

    def listen():
        """In a thread: Python calls `handle` only once the main thread returns from native code, perhaps never."""
        while number := os.read(source, 1):
            if number[0] == signal.SIGINT and received:
                os._exit(INTERRUPTED)
            if number[0] in CODES:  # others belong to other handlers of the program
                received.append(number[0])
        os.close(source)

    def stop_requested():
        nonlocal polled
        polled = True
        return CODES[received[0]] if received else None

    threading.Thread(target=listen, daemon=True).start()
    untouched = signal.SIG_IGN, None  # ignored, or handled outside Python
    before = {number: signal.signal(number, handle) for number in CODES if signal.getsignal(number) not in untouched}
    wakeup = signal.set_wakeup_fd(sink)
    try:
        yield stop_requested
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(sink)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watchdog(seconds, abort=False):
    """Print the stacks of all threads whenever keep_alive(), the value, is not called for `seconds`; 0 for never.

    With `abort` the process then ends by SIGABRT (exit code 134 in a shell).
    """
    last, ended = time.monotonic(), threading.Event()

    def keep_alive():
        nonlocal last
        last = time.monotonic()

    def watch():
        while not ended.wait(max(0.0, last + seconds - time.monotonic())):
            if time.monotonic() - last >= seconds:
                print(f"warning: no step has ended for {seconds} s; where each thread is:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
                if abort:
                    os.abort()
                keep_alive()

    thread = threading.Thread(target=watch, daemon=True)
    if seconds:
        thread.start()
    try:
        yield keep_alive
    finally:
        ended.set()

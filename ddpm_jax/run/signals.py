"""Signals, which end the loop after its step, and a watchdog, which shows where it hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import warnings

from ddpm_jax.errors import INTERRUPTED, PREEMPTED

# Besides Ctrl-C those by which schedulers end a job or warn that they will: SLURM what --signal names, Grid Engine's
# -notify USR1 and USR2, limits on the CPU time XCPU, a terminal or connection that goes away HUP.
WARNINGS = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
CODES = {signal.SIGINT: INTERRUPTED} | dict.fromkeys(WARNINGS, PREEMPTED)


@contextlib.contextmanager
def caught():
    """Catch the signals in CODES; the value is asked(): the exit code that one of them has asked for, or None.

    Those that are ignored (nohup, a job in the background of a script) stay so; outside the main thread none is caught.

    Until asked() is called for the first time there is nothing to save, and a signal ends the process. After that a
    second Ctrl-C does: whatever is being written is not committed, so nothing is harmed.
    """
    if threading.current_thread() is not threading.main_thread():
        warnings.warn("Python tells signals to the main thread alone: none saves and ends what runs here", stacklevel=3)
        yield lambda: None
        return
    received, asking = [], False
    source, sink = os.pipe()
    os.set_blocking(sink, False)

    def handle(number, frame):
        if not asking:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(PREEMPTED)

    def listen():
        """In a thread: Python calls `handle` only when the main thread comes back from native code, perhaps never."""
        while number := os.read(source, 1):
            if number[0] == signal.SIGINT and received:
                os._exit(INTERRUPTED)
            if number[0] in CODES:  # and not for another handler of the program
                received.append(number[0])
        os.close(source)

    def asked():
        nonlocal asking
        asking = True
        return CODES[received[0]] if received else None

    threading.Thread(target=listen, daemon=True).start()
    unset = signal.SIG_IGN, None  # ignored, or caught by what is not Python
    before = {number: signal.signal(number, handle) for number in CODES if signal.getsignal(number) not in unset}
    wakeup = signal.set_wakeup_fd(sink)
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(sink)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watchdog(seconds, abort=False):
    """Show the stacks of all threads whenever feed(), the value, is not called for `seconds`; 0 for never.

    With `abort` the process then ends by SIGABRT (exit code 134 in a shell).
    """
    fed, ended = time.monotonic(), threading.Event()

    def feed():
        nonlocal fed
        fed = time.monotonic()

    def watch():
        while not ended.wait(max(0.0, fed + seconds - time.monotonic())):
            if time.monotonic() - fed >= seconds:
                print(f"warning: no step has ended for {seconds} s; where each thread is:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
                if abort:
                    os.abort()
                feed()

    thread = threading.Thread(target=watch, daemon=True)
    if seconds:
        thread.start()
    try:
        yield feed
    finally:
        ended.set()

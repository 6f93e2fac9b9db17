"""SIGTERM and Ctrl-C: the loop ends after its step and saves; a second Ctrl-C leaves at once."""

import os
import signal

from ddpm_jax.errors import INTERRUPTED, PREEMPTED


def catch():
    """Install the handlers and return asked(): the exit code that a signal has asked for, or None."""
    received = []

    def handle(number, frame):
        if received and number == signal.SIGINT:
            os._exit(INTERRUPTED)  # whatever is being written is not committed, so nothing is harmed
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}[received[0]] if received else None

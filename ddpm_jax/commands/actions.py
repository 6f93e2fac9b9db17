"""What training does beside its steps: actions that are due every so often, and the metrics between two log lines."""

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax

from ddpm_jax import errors, parallel, training
from ddpm_jax.run import log, snapshots


class Action(NamedTuple):
    """What is done after every so many steps, and after the last one."""

    every: int
    act: Callable  # (step, state, ending); ending: whether no step follows
    on_stop: bool | None = (
        None  # whether to act after the step at which a signal ends the run; None: as after any other
    )

    def is_due(self, step, last, stopped):
        if stopped and self.on_stop is not None:
            return self.on_stop
        return step == last or step % self.every == 0

    def __call__(self, step, state, ending):
        self.act(step, state, ending)


class StepTimer:
    """The seconds that the steps since the last reset took, and how many of them they waited for their batches."""

    def __init__(self, step):
        self.reset(step)

    def reset(self, step):
        self.first, self.busy, self.waited = step, 0.0, 0.0

    @contextlib.contextmanager
    def working(self):
        begun = time.monotonic()
        yield
        self.busy += time.monotonic() - begun

    @contextlib.contextmanager
    def waiting(self):
        begun = time.monotonic()
        yield
        self.waited += time.monotonic() - begun

    def report(self, step, batch_size):
        """{name: mean over the steps up to `step`}, None where there are none."""
        steps = step - self.first
        return {
            "images_per_second": batch_size * steps / self.busy if steps else None,
            "seconds_per_step": self.busy / steps if steps else None,
            "input_wait": self.waited / steps if steps else None,
        }


class Metrics:
    """The metrics of the steps since the last line of the log.

    They are read one call late, while the device works on, except where they are needed at once.
    """

    def __init__(self, step, window, check):
        """step: the last one of which they are known; window: theirs; check(row, step) may refuse a step."""
        self.step, self.window, self.check, self.unread = step, window, check, deque()

    def add(self, metrics, read_all):
        self.unread.append(metrics)
        while len(self.unread) > (0 if read_all else 1):
            for row in _on_host(self.unread.popleft()):
                self.step += 1
                self.check(row, self.step)
                self.window.append(row)

    def take(self):
        """One row of them, which stays as `last`; the next ones begin a new window."""
        self.last, self.window = log.mean(self.window), []
        return self.last


def _on_host(metrics):
    """The metrics of each step of a call, as plain numbers; waits until they are computed."""
    columns = {name: values.tolist() for name, values in jax.device_get(metrics).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def make_actions(run, start, metrics, timer, writer, keep):
    """The Actions of a run in the order in which they are taken."""
    config = run.parts.config.train
    meta = run.meta | {"rollbacks": start.rollbacks, "branch": start.branch}

    def write_log(step, state, ending):
        row = metrics.take()
        updates = step - row["skipped"]
        rates = {
            "learning_rate": float(run.parts.learning_rate(max(0, updates - 1))),
            "ema_init_share": training.ema_init_share(config.ema_decay, updates),
        }
        timing = timer.report(step, config.batch_size)
        writer.write({"step": step} | row | rates | timing | run.evaluate(state, step))
        timer.reset(step)

    def save(step, state, ending):
        keep(state, last=ending, window=metrics.window, **meta)
        run.keep_alive()

    def draw(step, state, ending):
        for name, picture in run.write_grid(state, step).items():
            writer.image(name, picture, step)

    found = [Action(config.log_every, write_log)]
    if config.averages and parallel.is_first():
        found.append(Action(config.average_every, lambda step, state, ending: _store_averages(run, state)))
    return [
        *found,
        Action(config.checkpoint_every, save, on_stop=True),
        Action(config.sample_every, draw, on_stop=False),
    ]


def _store_averages(run, state):
    """Keep the power-function averages for good; one that cannot be written is missed with a warning."""
    updates = int(state.step) - int(state.skipped)  # on the host: other processes do not come by here
    lengths = run.parts.config.train.averages
    if updates:
        try:
            snapshots.save(run.workdir / "averages", updates, dict(zip(lengths, state.averages, strict=True)))
        except errors.CheckpointError as error:
            warnings.warn(f"{error}; training goes on", stacklevel=2)

"""Periodic actions between training steps, such as saving and logging, and the metrics between two log lines."""

import contextlib
import functools
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import data, errors, parallel, training
from ddpm_jax.commands import recovery
from ddpm_jax.run import boards, checkpoint, log, profiling, snapshots


class Action(NamedTuple):
    """Something to do every so many steps, and after the last step."""

    every: int
    act: Callable  # (step, state, ending); ending: whether training ends after this step
    on_stop: bool | None = None  # whether to act when a signal ends the run; None: only if due

    def is_due(self, step, last, stopped):
        if stopped and self.on_stop is not None:
            return self.on_stop
        return step == last or step % self.every == 0

    def __call__(self, step, state, ending):
        self.act(step, state, ending)


class StepTimer:
    """The seconds spent in steps since the last reset, and the part of them spent waiting for batches."""

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
        """{name: rate or mean per step since the last reset}; the values are None if there were no steps."""
        steps = step - self.first
        return {
            "images_per_second": batch_size * steps / self.busy if steps else None,
            "seconds_per_step": self.busy / steps if steps else None,
            "input_wait": self.waited / steps if steps else None,
        }


class Metrics:
    """The metrics of the steps since the last log line.

    They are read one call late, so that the device never waits, except when an action needs them.
    """

    def __init__(self, step, window, check):
        """window: the metrics up to `step` that are not logged yet; check(row, step) may raise an error."""
        self.step, self.window, self.check, self.unread = step, window, check, deque()

    def add(self, metrics, read_all):
        self.unread.append(metrics)
        while len(self.unread) > (0 if read_all else 1):
            for row in _on_host(self.unread.popleft()):
                self.step += 1
                self.check(row, self.step)
                self.window.append(row)

    def take(self):
        """The mean of the window as one row, also kept in `last`; starts a new window."""
        self.last, self.window = log.mean(self.window), []
        return self.last


def _on_host(metrics):
    """The metrics of each step of a call, as plain numbers; waits until they are computed."""
    columns = {name: values.tolist() for name, values in jax.device_get(metrics).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Tools(NamedTuple):
    """What the training loop needs besides the program."""

    batches: Iterator  # of (number of steps, their batches), prefetched
    profile: Callable  # (step, state), before each step
    sync_exit_code: Callable  # (exit code or None) -> the exit code of all processes, or None
    metrics: Metrics
    timer: StepTimer
    actions: list[Action]
    save_or_warn: Callable  # () reports a save that failed in the background
    writer: log.Log


@contextlib.contextmanager
def open_tools(run, start, first):
    """The Tools for the steps from `first` on, closed in reverse order."""
    config = run.parts.config.train
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_open_log(run, start.state, first))
        manager = checkpoint.open_manager(run.workdir / "checkpoints", config.keep, config.keep_every)
        stack.callback(checkpoint.close, manager)
        batches = stack.enter_context(contextlib.closing(prefetch(run.program, config, first, start.rollbacks)))
        profile = stack.enter_context(profiling.profiler(run.span, run.workdir / "profile", run.say))
        stack.enter_context(parallel.fail_fast())  # entered last: its timer must run while the rest closes
        save_or_warn, timer = checkpoint.make_saver(manager), StepTimer(first)
        check = functools.partial(recovery.check_finite, config=config, manager=manager)
        metrics = Metrics(first, start.window, check)
        actions = _make_actions(run, start, metrics, timer, writer, save_or_warn)
        yield Tools(batches, profile, parallel.make_exit_code_sync(), metrics, timer, actions, save_or_warn, writer)


@contextlib.contextmanager
def _open_log(run, state, first):
    """The Log of the first process, from the step `first` on; a silent one in the others."""
    writer = log.SILENT
    if parallel.is_first():
        snapshots.drop_after(run.workdir / "averages", first - int(np.max(state.skipped)))
        with errors.writing(f"--workdir={run.workdir}"):
            dashboards = boards.open_boards(run.workdir, first, run.args.wandb, run.meta["config"])
            writer = log.open_log(run.workdir, first, run.parts.config.train.steps, dashboards)
    try:
        yield writer
    finally:
        writer.close()


def prefetch(program, config, first, rollbacks):
    """(number of steps, their batches) for each call from the step `first` to the last."""
    last, per_call = config.steps, config.steps_per_call

    def make_batches(call):
        steps = range(max(first, call * per_call), min(last, (call + 1) * per_call))
        return len(steps), program.batches(steps, rollbacks)

    return data.prefetch(make_batches, first // per_call, -(-last // per_call))


def _make_actions(run, start, metrics, timer, writer, save_or_warn):
    """The Actions of a run, in order."""
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
        save_or_warn(state, last=ending, window=metrics.window, **meta)
        run.keep_alive()

    def draw(step, state, ending):
        for name, image in run.write_grid(state, step).items():
            writer.image(name, image, step)

    actions = [Action(config.log_every, write_log)]
    if config.averages and parallel.is_first():
        actions.append(Action(config.average_every, lambda step, state, ending: _store_averages(run, state)))
    return [
        *actions,
        Action(config.checkpoint_every, save, on_stop=True),
        Action(config.sample_every, draw, on_stop=False),
    ]


def _store_averages(run, state):
    """Write a snapshot of the power-function averages, or warn if that fails."""
    updates = int(state.step) - int(state.skipped)  # on the host, because only the first process gets here
    lengths = run.parts.config.train.averages
    if updates:
        try:
            snapshots.save(run.workdir / "averages", updates, dict(zip(lengths, state.averages, strict=True)))
        except errors.CheckpointError as error:
            warnings.warn(f"{error}; training continues", stacklevel=2)

"""The training loop: Algorithm 1, its periodic actions, and a new start after a rollback."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import commands, experiment, parallel, program
from ddpm_jax.commands import actions, budget, progress, recovery
from ddpm_jax.run import folder as run_folder
from ddpm_jax.run import log, signals


class Run(NamedTuple):
    """The parts of a run that do not change from step to step."""

    args: Any  # of commands.train
    span: tuple[int, int]  # of the steps to trace
    parts: Any  # experiment.Experiment
    program: Any  # program.Program
    workdir: Path
    meta: dict  # entries of its checkpoints besides the state
    stop_requested: Callable  # () -> exit code or None
    keep_alive: Callable  # (), resets the watchdog
    write_grid: Callable  # (state, step) -> images
    evaluate: Callable  # (state, step) -> metrics
    say: Callable


def train(args, span, parts, dataset, fingerprint, workdir, stop_requested, say, argv, began):
    """Run Algorithm 1 to the last step; the exit code. It starts from the newest checkpoint, that of --step, or anew.

    args: those of commands.train; span: the steps to trace; argv: the command, for run.json; began: its time.
    """
    config, made = parts.config.train, program.make(parts, dataset)
    with signals.watchdog(config.watchdog, config.watchdog_abort) as keep_alive:
        measured = config.minutes and run_folder.is_new(workdir)
        if measured:
            say("compiling the training step and measuring its speed")
            parts = experiment.with_steps(parts, budget.choose_steps(made, config, began, say))
        meta = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "classes": parts.classes}
        meta |= {"data": fingerprint, "devices": parallel.describe()}
        write_grid = progress.make_grid_writer(parts, workdir, keep_alive)
        evaluate = progress.make_evaluator(parts, dataset, keep_alive, say)
        run = Run(args, span, parts, made, workdir, meta, stop_requested, keep_alive, write_grid, evaluate, say)
        start = recovery.start(run, args.step or None)
        parallel.on_all_processes(lambda: parallel.is_first() and run_folder.record(workdir, parts.config, argv))
        if not measured:
            say("compiling the training step")
        while True:
            try:
                return take_steps(run, start)
            except recovery.RollBack as failure:
                start = recovery.roll_back(run, start, failure)


def take_steps(run, start):
    """Take the steps of Algorithm 1 from `start` on, each followed by the actions due; the exit code."""
    config, first = run.parts.config.train, int(np.max(start.state.step))
    state, step, code = run.program.place(start.state), first, None
    with actions.open_tools(run, start, first) as tools:
        started = time.monotonic()
        while step < config.steps and code is None:
            with tools.timer.working():
                with tools.timer.waiting():
                    num_steps, batch = next(tools.batches)
                tools.profile(step, state)
                state, metrics = run.program.step(state, batch, start.rollbacks, config.steps)
                step += num_steps
                code = tools.sync_exit_code(run.stop_requested())
                due = [action for action in tools.actions if action.is_due(step, config.steps, code is not None)]
                tools.metrics.add(metrics, read_all=bool(due))
            tools.writer.advance(step)
            if step == first + num_steps:
                jax.block_until_ready(metrics)
                run.say(f"first step, compilation included: {time.monotonic() - started:.1f} s")
                tools.timer.reset(step)
            run.keep_alive()
            tools.save_or_warn()  # reports a save that has failed in the background
            for action in due:
                action(step, state, ending=step == config.steps or code is not None)
    if code is not None:
        run.say(f"stopped by a signal; step {step:,} is saved and the same command resumes from it")
        return code
    took, loss = log.format_duration(time.monotonic() - started), tools.metrics.last["loss"]
    run.say(f"finished step {step:,} in {took}, loss {loss:.4f}; samples: {run.workdir / 'samples'}")
    run.say(f"more samples: python {commands.prog_name('sample')} --workdir={run.workdir}")
    return 0

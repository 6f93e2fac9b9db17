"""How training recovers: it starts from the newest intact checkpoint, rolls back, or gives up."""

import warnings
from typing import Any, NamedTuple

import jax

from ddpm_jax import errors
from ddpm_jax.run import checkpoint
from ddpm_jax.run import folder as run_folder


class Start(NamedTuple):
    """Where training starts from."""

    state: Any  # TrainState
    window: list  # the metrics of the steps since the last log line
    rollbacks: int  # so far; each one changes the batches and the noise
    branch: int | None  # the step given by --step
    attempts: dict  # {step: number of rollbacks to it}


class RollBack(BaseException):
    """The gradient was not finite. Raised in all processes; a BaseException, so that none handles it as an error."""


def start(run, step=None):
    """The Start from the checkpoint of `step`, by default the newest intact one; the initial state if there is none."""
    if not (checkpoint.steps(run.workdir / "checkpoints") or step):
        return Start(run.program.init_state(), [], 0, None, {})
    template = jax.eval_shape(run.program.init_state)
    state, meta, lines = run_folder.resume(
        run.parts, template, run.meta["data"], run.workdir, step, run.args.allow_change
    )
    for line in lines:
        run.say(line)
    return Start(state, meta["window"], meta["rollbacks"], step or meta.get("branch"), {})


def roll_back(run, failed, failure):
    """The Start after training from `failed`, a Start, ended in a RollBack. Raises Diverged after too many of them."""
    restart, limit = start(run), run.parts.config.train.max_skipped
    step = int(restart.state.step.max())
    attempts = failed.attempts | {step: failed.attempts.get(step, 0) + 1}
    if attempts[step] > limit:
        raise errors.Diverged(f"{failure}, after {limit} rollbacks to step {step}") from failure
    warnings.warn(
        f"{failure}; restarting from step {step} with other batches and noise "
        f"({attempts[step]} of at most {limit} times)",
        stacklevel=2,
    )
    rollbacks = max(failed.rollbacks + 1, restart.rollbacks)
    return restart._replace(rollbacks=rollbacks, branch=failed.branch or restart.branch, attempts=attempts)


def check_finite(row, step, config, manager):
    """Apply train.on_nan if the gradient of the step with these metrics was not finite. (That step changed nothing.)"""
    in_row = row["skipped_in_row"]
    if in_row < (config.max_skipped if config.on_nan == "skip" else 1):
        return
    problem = f"the gradient was not finite at step {step} ({in_row} in a row)"
    checkpoint.finish_or_warn(manager)
    if config.on_nan == "rollback":
        raise RollBack(problem)
    good = checkpoint.steps(manager.directory)
    where = f"the newest checkpoint is {manager.directory / str(good[-1])}" if good else "no checkpoint was written"
    raise errors.Diverged(f"{problem}; {where}; try a lower train.learning_rate")

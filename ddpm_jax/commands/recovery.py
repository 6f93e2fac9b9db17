"""What training does when something goes wrong: it starts from the newest whole checkpoint, rolls back, or gives up."""

import warnings
from typing import Any, NamedTuple

import jax

from ddpm_jax import errors
from ddpm_jax.run import checkpoint
from ddpm_jax.run import folder as run_folder


class Start(NamedTuple):
    """Where the steps begin."""

    state: Any  # TrainState
    window: list  # the metrics of the steps since the last line of the log
    rollbacks: int  # so far; after each, batches and noise are others
    branch: int | None  # the step that --step named
    tries: dict  # {step: how often the run was rolled back to it}


class RollBack(BaseException):
    """A step was not finite; in all processes, so that none takes it for an error of its own."""


def start(run, step=None):
    """The Start at the newest whole checkpoint, or at that of `step`; at the first state where there is none."""
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
    """The Start after the steps from the Start `failed` ended in a RollBack. Raises Diverged after too many of them."""
    found, most = start(run), run.parts.config.train.max_skipped
    step = int(found.state.step.max())
    tries = failed.tries | {step: failed.tries.get(step, 0) + 1}
    if tries[step] > most:
        raise errors.Diverged(f"{failure}, after {most} roll-backs to step {step}") from failure
    warnings.warn(
        f"{failure}; on from step {step} with other batches and noise ({tries[step]} of at most {most} times)",
        stacklevel=2,
    )
    rollbacks = max(failed.rollbacks + 1, found.rollbacks)
    return found._replace(rollbacks=rollbacks, branch=failed.branch or found.branch, tries=tries)


def check_finite(row, step, config, manager):
    """Do as train.on_nan says when the gradient of the step with these metrics was not finite. It changed nothing."""
    in_row = row["skipped_in_row"]
    if in_row < (config.max_skipped if config.on_nan == "skip" else 1):
        return
    what = f"the gradient was not finite at step {step} ({in_row} in a row)"
    checkpoint.finish_or_warn(manager)
    if config.on_nan == "rollback":
        raise RollBack(what)
    good = checkpoint.steps(manager.directory)
    where = f"the last good checkpoint is {manager.directory / str(good[-1])}" if good else "no checkpoint was written"
    raise errors.Diverged(f"{what}; {where}; try a lower train.learning_rate")

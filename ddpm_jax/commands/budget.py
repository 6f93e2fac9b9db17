"""train.minutes: the number of steps for that time, from the measured speed of a few whose results are discarded."""

import bisect
import contextlib
import dataclasses
import json
import math
import time
import warnings

import jax

from ddpm_jax import parallel
from ddpm_jax.commands import actions


def choose_steps(program, config, began, say):
    """train.steps for train.minutes since `began` (time.monotonic()), the same in all processes.

    Compiling is a part of that time, and so is the measurement, which takes at most a fiftieth of it or three calls.
    config: the section train.
    """
    total = 60 * config.minutes
    compilation, single, seconds = _measure(program, config, at_most=min(total / 50, 10))
    step = seconds / config.steps_per_call
    used = time.monotonic() - began
    # The sampler is not compiled yet. It takes about half the time of the step, as it has no backward pass.
    (steps,) = _first([fitting_steps(config, total - used, step, max(0, compilation - single) / 2)])
    say(f"{config.minutes:g} minutes: {steps:,} steps of {step:.2g} s")
    if used > total and parallel.is_first():
        warnings.warn(
            f"train.minutes={config.minutes:g} are over already, after compiling for {compilation:.0f} s", stacklevel=2
        )
    return steps


def fitting_steps(config, remaining, step, compilation):
    """The largest number of steps for `remaining` seconds, of `step` seconds each; a multiple of steps_per_call, not 0.

    The images drawn in the meantime count too: the network without its gradient takes about a third of a step for each
    image of a batch. Their programs need `compilation` seconds. Checkpoints are written beside the steps.
    """
    drawn = [(config.sample_every, config.sample_num * config.sample_steps)]
    if config.evaluate_every:
        drawn.append((config.evaluate_every, config.evaluate_num * config.evaluate_steps))

    def duration(calls):
        steps = calls * config.steps_per_call
        calls_of_net = sum(math.ceil(steps / every) * number for every, number in drawn)
        return step * (steps + calls_of_net / config.batch_size / 3) + compilation * len(drawn)

    return max(1, bisect.bisect_right(range(1, 10**9), remaining, key=duration)) * config.steps_per_call


def _measure(program, config, at_most):
    """Seconds of the first call, which compiles, of the second, and the mean of some more that take `at_most`."""
    endless = dataclasses.replace(config, steps=10**9)
    with contextlib.closing(actions.prefetch(program, endless, 0, 0)) as batches:
        state = program.place(program.init_state())

        def seconds(calls):
            nonlocal state
            started = time.monotonic()
            for _ in range(calls):
                state, metrics = program.step(state, next(batches)[1])
            jax.block_until_ready(metrics)
            return time.monotonic() - started

        compilation, single = seconds(1), seconds(1)
        (calls,) = _first([max(1, int(at_most / single))])
        return _first([compilation, single, seconds(calls) / calls])


def _first(numbers):
    """Those of the first process, in all processes."""
    return json.loads(parallel.gather(json.dumps(numbers))[0])

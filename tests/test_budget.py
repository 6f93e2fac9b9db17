"""train.minutes: the number of steps by hand, on a clock that the test sets, and the run that has it."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import SMALL, assert_same_end

from ddpm_jax import config as configs
from ddpm_jax import program
from ddpm_jax.commands import budget
from ddpm_jax.config import Train
from ddpm_jax.errors import ConfigError
from ddpm_jax.run import folder as run_folder

PLAIN = Train(batch_size=50, sample_num=30, sample_steps=100, sample_every=10**6)


@pytest.mark.parametrize(
    ("changes", "remaining", "compilation", "steps"),
    [
        ({}, 60, 0, 100),  # a grid is 30 * 100 / 50 / 3 = 20 steps of 0.5 s
        ({}, 60, 3, 94),
        ({"steps_per_call": 8}, 60, 3, 88),
        ({"sample_every": 20}, 60, 0, 60),  # 60 + 3 * 20
        ({"sample_every": 25}, 60, 0, 60),  # 60 + 3 * 20, where 75 + 3 * 20 does not fit
        ({"evaluate_every": 50, "evaluate_num": 300, "evaluate_steps": 10}, 60, 2, 52),  # 52 + 20 + 2 * 20, 2 * 2 s
        ({}, 5, 0, 1),
        ({"steps_per_call": 8}, -5, 0, 8),
    ],
)
def test_the_number_of_steps_that_fit(changes, remaining, compilation, steps):
    config = dataclasses.replace(PLAIN, **changes)
    assert budget.fitting_steps(config, remaining, 0.5, compilation) == steps


class Clock:
    """A clock, and a program whose first call takes 30 s and each later one half a second."""

    def __init__(self):
        self.now, self.calls = 40.0, 0

    def step(self, state, batches):
        assert (state, batches) == ("state", range(self.calls, self.calls + 1))
        self.now += 0.5 if self.calls else 30
        self.calls += 1
        return state, {"loss": np.zeros(1)}


@pytest.mark.parametrize("process", [0, 1])
def test_what_was_used_so_far_is_subtracted(monkeypatch, process):
    """600 - 80.5 s, of which 30 / 2 for the sampler and 20 steps for the grid; the second process takes the first's."""
    clock, said = Clock(), []
    monkeypatch.setattr(budget.time, "monotonic", lambda: clock.now)
    if process:
        numbers = iter([[4], [30.5, 0.5, 0.5], [77]])
        monkeypatch.setattr(budget.parallel, "gather", lambda text: [json.dumps(next(numbers)), text])
    made = program.Program(lambda: "state", lambda state: state, lambda steps, rollbacks: steps, clock.step)
    config = dataclasses.replace(PLAIN, minutes=10.0, steps=7)
    assert budget.choose_steps(made, config, 0.0, said.append) == (77 if process else 989)
    assert clock.calls == 2 + (4 if process else 20)
    assert said == [f"10 minutes: {77 if process else 989} steps of 0.5 s"]


def test_other_minutes_are_refused_once_there_is_a_checkpoint(tmp_path):
    def recorded(minutes, steps=5):
        return run_folder.recorded_steps(
            tmp_path, configs.Config(train=Train(minutes=minutes, steps=steps))
        ).train.steps

    (tmp_path / "config.json").write_text(configs.to_json(configs.Config(train=Train(minutes=10.0, steps=1234))))
    assert recorded(10.0) == 5
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "100" / "commit_success.txt").touch()
    assert recorded(10.0) == 1234
    assert recorded(0.0, 3000) == 3000
    with pytest.raises(ConfigError, match=r"a run of 1,234 steps, not one of train\.minutes=20; .*minutes=0 --config"):
        recorded(20.0)


PATCH = "from ddpm_jax.commands import budget; budget.fitting_steps = lambda *args: 60"


@pytest.mark.slow
def test_the_measurement_changes_no_bit_and_a_resumed_run_has_its_number(trained, start, script, tmp_path):
    options = "--config.train.minutes=0.5", f"--workdir={tmp_path / 'run'}"
    process = start(*options, patch=PATCH)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert re.search(r"0\.5 minutes: 60 steps of [\d.e-]+ s", out)
    assert_same_end(tmp_path / "run", trained)
    again = "train.py", *SMALL, *options, "--cpu-devices=1"
    assert "already finished at step 60; for more, --config.train.minutes=0 --config" in script(*again).stdout
    done = script(*again, "--step=50")
    assert done.returncode == 0, done.stderr
    assert "minutes:" not in done.stdout
    assert_same_end(tmp_path / "run", trained)

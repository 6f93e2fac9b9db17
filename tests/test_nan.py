"""A step whose gradient is not finite: left out, the end of the run, or the way back to a checkpoint."""

import re

import numpy as np
import pytest
from conftest import SMALL, assert_one_line, fingerprint, logged_metrics

from ddpm_jax.run import checkpoint

CONFIG = """
import jax.numpy as jnp

from ddpm_jax import data, training
from ddpm_jax.config import Config, Data, Diffusion, Train

to_unit, batch = training.to_unit, data.batch


def white_is_nan(image):
    return jnp.where(jnp.all(image == 255), jnp.nan, to_unit(image))


def batch_with_white(dataset, seed, step, batch_size, rows=slice(None), rollbacks=0):
    found = batch(dataset, seed, step, batch_size, rows, rollbacks)
    if {when}:
        found["image"][:] = 255
    return found


training.to_unit, data.batch = white_is_nan, batch_with_white


def get_config():
    return Config(data=Data(source="digits"), train=Train(learning_rate=2e-3))
"""


@pytest.fixture
def train(script, tmp_path):
    """train(when, option, ...): 30 steps in tmp_path / "run", with NaN in the batches for which `when` is true."""

    def run(when, *options, workdir=tmp_path / "run"):
        (tmp_path / "nan.py").write_text(CONFIG.replace("{when}", when))
        fixed = [*SMALL, "--config.train.steps=30", "--config.train.checkpoint_every=5", "--cpu-devices=1"]
        return script("train.py", f"--config={tmp_path}/nan.py", *fixed, f"--workdir={workdir}", *options)

    return run


@pytest.mark.faults
def test_fault_59_nan_in_one_batch_is_left_out(train, tmp_path):
    """Counted in metrics.jsonl; the run ends as ever."""
    done = train("step == 11", "--config.train.on_nan=skip")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["skipped"] for row in logged_metrics(tmp_path / "run")] == [0, 1, 1, 1, 1]
    assert all(np.isfinite(row["loss"]) for row in logged_metrics(tmp_path / "run"))


@pytest.mark.faults
def test_fault_60_nan_in_many_steps_ends_the_run(train, tmp_path):
    """The newest checkpoint is named and none has been written over; the same command tries again from there."""
    done = train("step >= 11", "--config.train.on_nan=skip", "--config.train.max_skipped=3")
    assert done.returncode == 5
    found = re.search(r"not finite at step (\d+) \((\d) in a row\); the newest checkpoint is .*/10;", done.stderr)
    assert int(found[1]) - int(found[2]) == 11
    assert_one_line(done)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 10]
    assert train("False").returncode == 0
    assert train("False", workdir=tmp_path / "never").returncode == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "never")


@pytest.mark.faults
@pytest.mark.parametrize("batch", [11, 12, 13])
def test_nan_ends_the_run_at_once_when_so_chosen(train, tmp_path, batch):
    """Whether the metrics of the step are read late, with those of the next step, or at once (log and save)."""
    done = train(f"step == {batch}", "--config.train.on_nan=abort")
    assert done.returncode == 5
    assert re.search(rf"not finite at step {batch + 1} \(1 in a row\); the newest checkpoint is .*/10;", done.stderr)
    assert_one_line(done)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 10]


@pytest.mark.faults
def test_nan_sends_the_run_back_when_so_chosen(train, tmp_path):
    """To the step 10, on to other batches and noise; also when it is stopped and taken up again afterwards."""
    rollback = "--config.train.on_nan=rollback"
    done = train("step == 11 and not rollbacks", rollback)
    assert done.returncode == 0, done.stderr
    assert re.search(r"not finite at step 12 .*; restarting from step 10 with other batches .* \(1 of", done.stderr)
    assert [row["step"] for row in logged_metrics(tmp_path / "run")] == [7, 14, 21, 28, 30]
    assert logged_metrics(tmp_path / "run")[-1]["skipped"] == 0
    assert train("False", workdir=tmp_path / "never").returncode == 0
    assert logged_metrics(tmp_path / "run")[0] == logged_metrics(tmp_path / "never")[0]
    assert fingerprint(tmp_path / "run") != fingerprint(tmp_path / "never")
    for steps in (17, 30):
        workdir = tmp_path / "stopped"
        again = train("step == 11 and not rollbacks", rollback, f"--config.train.steps={steps}", workdir=workdir)
        assert again.returncode == 0, again.stderr
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "run")


@pytest.mark.faults
def test_nan_that_comes_back_ends_the_run(train, tmp_path):
    done = train("step == 11", "--config.train.on_nan=rollback", "--config.train.max_skipped=2")
    assert done.returncode == 5
    *told, last = done.stderr.splitlines()
    assert [re.search(r"\((\d) of at most 2 times\)", line)[1] for line in told] == ["1", "2"]
    assert re.match("error: the gradient was not finite at step 12 .*, after 2 rollbacks to step 10", last)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 10]

"""Several processes are one run: they agree, or all of them end."""

import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, free_port, metrics

from ddpm_jax import checkpoint


@pytest.mark.faults
def test_two_processes_of_two_devices_are_one_of_four(script, environment, tmp_path):
    """The same losses, and one checkpoint that both agree on."""
    options = [*SMALL, "--config.train.steps=10"]
    command = [sys.executable, "train.py", *options, f"--workdir={tmp_path}/two", "--cpu-devices=2"]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    alone = script("train.py", *options, f"--workdir={tmp_path}/one", "--cpu-devices=4", **quick)
    assert alone.returncode == 0, alone.stderr
    port = free_port()
    pair = [
        subprocess.Popen(
            [*command, f"--distributed=localhost:{port},{process},2"],
            cwd=ROOT,
            env=environment | quick,
            stdout=subprocess.DEVNULL,
        )
        for process in (0, 1)
    ]
    assert [process.wait(300) for process in pair] == [0, 0]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in two] == [7, 10]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert checkpoint.steps(tmp_path / "two" / "checkpoints") == [10]


@pytest.mark.faults
def test_a_signal_to_one_of_two_processes_stops_both(environment, tmp_path):
    """Both leave with 75 after the same step, which is saved."""
    port, options = free_port(), [*SMALL, "--config.train.checkpoint_every=100000", f"--workdir={tmp_path}/run"]
    pair = [
        subprocess.Popen(
            [sys.executable, "train.py", *options, f"--distributed=localhost:{port},{process},2", "--cpu-devices=1"],
            cwd=ROOT,
            env=environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    for line in pair[0].stdout:
        if line.startswith("step"):
            pair[1].terminate()
            break
    assert [process.wait(100) for process in pair] == [75, 75]
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 1

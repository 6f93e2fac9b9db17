"""Disks that are full, limited or cannot be written: nothing is lost, and with room the run goes on."""

import re

import pytest
from conftest import SMALL, assert_one_line, assert_same_end, fingerprint

from ddpm_jax.run import checkpoint


@pytest.mark.faults
def test_fault_22_a_disk_that_cannot_be_written(mount, script):
    done = script("train.py", *SMALL, f"--workdir={mount('ro')}/run")
    assert (done.returncode, "first step" in done.stdout) == (2, False)
    assert "Read-only file system" in done.stderr
    assert_one_line(done)


@pytest.mark.faults
def test_fault_23_a_full_disk_loses_nothing(trained, mount, start, tmp_path):
    """Room for some steps: the saves after them fail, at last the run ends; with room it goes on from those there."""
    disk, options = mount("size=1400k"), ("--config.train.steps=60", f"--workdir={tmp_path}/run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(disk)
    process = start(*options)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 4
    *warned, last = err.splitlines()
    told = r"step \d+ was not saved: it needs \d\.\d MB and .* has \d\.\d MB free|a checkpoint could not be written to"
    assert len(warned) >= 3
    assert all(re.match(f"warning: ({told})", line) for line in warned)
    assert re.match(f"error: ({told})", last)
    there = [(step, fault) for step, _, fault in checkpoint.verify(disk)]
    assert there
    assert there == [(step, None) for step, _ in there]
    assert {path.name for path in disk.iterdir()} <= {str(step) for step, _ in there} | {"deleted"}
    mount("remount,size=10m")
    assert start(*options).wait(100) == 0
    assert_same_end(tmp_path / "run", trained)


@pytest.mark.faults
def test_fault_24_a_limit_on_files_loses_nothing(trained, script, tmp_path):
    """With files limited to 100 blocks from step 21 on, saves fail behind; the run goes on for a while, then ends.

    With room again it goes on from step 20, to the same end as the run that nothing disturbed.
    """
    command = ["train.py", *SMALL, f"--workdir={tmp_path}/run", "--cpu-devices=1"]
    assert script(*command, "--config.train.steps=20").returncode == 0
    full = script(*command, "--config.train.steps=60", shell="ulimit -f 100;")
    assert full.returncode == 4
    *warned, last = [line for line in full.stderr.splitlines() if "compilation cache" not in line]
    assert all("could not be written" in line and line.endswith("training goes on") for line in warned)
    assert last.startswith("error: a checkpoint could not be written")
    assert warned
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10, 20]
    assert script(*command, "--config.train.steps=60").returncode == 0
    assert fingerprint(tmp_path / "run") == fingerprint(trained)

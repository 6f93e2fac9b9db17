"""Runs that are killed, stopped, disturbed and taken up again: the end is that of the run that nothing disturbed."""

import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL, assert_one_line, fingerprint, metrics
from PIL import Image

from ddpm_jax import checkpoint


def test_killed_at_random_moments_it_ends_with_the_same_bits(trained, environment, tmp_path):
    """SIGKILL four times, a SIGTERM among them, the same command again each time: state and metrics are equal."""
    workdir, chance = tmp_path / "run", random.Random(time.time_ns())
    command = [sys.executable, "train.py", *SMALL, "--config.train.steps=60", f"--workdir={workdir}", "--cpu-devices=1"]
    codes = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(("first step", "already")):
                break
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(number)
        codes.append(process.wait(60))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(codes) <= {-signal.SIGKILL, 75, 0}
    assert fingerprint(workdir) == fingerprint(trained)
    assert metrics(workdir) == metrics(trained)


@pytest.mark.faults
def test_a_disk_that_fills_up_loses_nothing(trained, script, tmp_path):
    """With files limited to 100 blocks from step 21 on, saves fail; the run goes on for a while, then ends.

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
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "20"]
    assert script(*command, "--config.train.steps=60").returncode == 0
    assert fingerprint(tmp_path / "run") == fingerprint(trained)


def test_sigterm_saves_and_asks_to_be_run_again(environment, tmp_path):
    command = [
        sys.executable,
        "train.py",
        *SMALL,
        f"--workdir={tmp_path}/run",
        "--config.train.checkpoint_every=100000",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step"):
            process.terminate()
    assert process.wait(60) == 75
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert f"stopped by a signal; step {step} is saved" in lines[-1]


def test_a_finished_run_is_left_alone_and_can_be_made_longer(trained, script, tmp_path):
    before = fingerprint(trained)
    again = script("train.py", *SMALL, "--config.train.steps=60", f"--workdir={trained}", "--cpu-devices=1")
    assert (again.returncode, "already finished at step 60" in again.stdout) == (0, True)
    assert fingerprint(trained) == before


@pytest.mark.faults
def test_a_second_run_in_the_folder_is_refused(environment, script, tmp_path):
    command = ["train.py", *SMALL, f"--workdir={tmp_path}/run"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("first step"):
            break
    second = script(*command)
    process.kill()
    process.wait()
    assert second.returncode == 2
    assert f"is in use by another run (process {process.pid} on" in second.stderr
    assert_one_line(second)


@pytest.mark.faults
def test_changed_data_are_noticed_on_resume(script, tmp_path):
    """One image more would make every later batch another one."""
    command = ["train.py", *SMALL, f"--workdir={tmp_path}/run", f"--config.data.source=npz:{tmp_path}/data.npz"]
    images = np.zeros((40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    assert script(*command, "--config.train.steps=3").returncode == 0
    np.savez(tmp_path / "data.npz", images=np.concatenate([images, images[:1]]))
    again = script(*command, "--config.train.steps=6")
    assert again.returncode == 2
    assert re.search("the run had 40x8x8x1-.{8}, the data now are 41x8x8x1-", again.stderr)


@pytest.mark.faults
def test_a_resume_on_more_devices_agrees_to_rounding_and_says_so(trained, script, tmp_path):
    """From step 20 of one device on with two: the losses are those of the run on one, to 1e-5."""
    command = ["train.py", *SMALL, f"--workdir={tmp_path}/run"]
    assert script(*command, "--config.train.steps=20", "--cpu-devices=1").returncode == 0
    more = script(*command, "--config.train.steps=60", "--cpu-devices=2")
    assert more.returncode == 0, more.stderr
    assert "not bit-exact from here on, only to rounding: devices 1 x cpu (cpu) is now 2 x cpu (cpu)" in more.stdout
    wanted = {row["step"]: row["loss"] for row in metrics(trained)}
    for row in metrics(tmp_path / "run"):
        if row["step"] in wanted and row["step"] > 28:
            assert row["loss"] == pytest.approx(wanted[row["step"]], abs=1e-5)


def test_another_experiment_in_the_folder_is_refused_by_name(trained, script):
    other = script(
        "train.py", *SMALL, "--config.train.steps=60", "--config.train.learning_rate=0.1", f"--workdir={trained}"
    )
    assert other.returncode == 2
    assert "train.learning_rate is 0.002 there, 0.1 here" in other.stderr
    assert_one_line(other)


EVERYTHING = [
    "--config.model.num_classes=10",
    "--config.diffusion.variance=learned",
    "--config.diffusion.self_conditioning=true",
    "--config.diffusion.label_dropout=0.2",
    "--config.diffusion.time_sampling=loss_aware",
    "--config.train.averages=0.05,0.1",
    "--config.train.average_every=5",
]


@pytest.mark.faults
def test_all_that_a_state_can_hold_survives_a_stop(script, tmp_path):
    """Also the memory of the times and the power-function averages; then pictures by way of all of it."""
    ends = []
    for name, stops in (("unbroken", [20]), ("stopped", [7, 20])):
        workdir = tmp_path / name
        for steps in stops:
            done = script("train.py", *SMALL, *EVERYTHING, f"--config.train.steps={steps}", f"--workdir={workdir}")
            assert done.returncode == 0, done.stderr
        _, trees = checkpoint.load(workdir / "checkpoints", checkpoint.ARRAYS)
        ends.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)])
    assert ends[0] == ends[1]
    stored = sorted(path.name for path in (workdir / "averages").iterdir())
    assert stored == [f"step_{step:09}.npz" for step in (5, 7, 10, 15, 20)]
    options = [f"--workdir={workdir}", "--num=3", "--steps=4", "--overwrite"]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    a = f"{tmp_path}/a.png"
    for extra in (
        ["--weights=0.08", "--guidance=2", "--interval=100,900", "--gif", "--preview", "--limit=dynamic"],
        ["--sampler=dpmpp_3m", "--spacing=logsnr"],
        ["--sampler=edm", "--churn=0.2", "--weights=raw"],
        ["--label=3", f"--interpolate={a},{a}", "--sampler=ddim"],
        ["--label=3", f"--inpaint={a}", f"--mask={a}", "--jump=2", "--repeats=2", "--gif", "--preview"],
        ["--label=3", f"--reconstruct={a}", "--sampler=ddim", "--num=1"],
    ):
        done = script("sample.py", *options, *extra)
        assert done.returncode == 0, done.stderr
    assert len(np.load(workdir / "out" / "samples.npz")["images"]) == 1
    for extra, fragment in (
        ([f"--reconstruct={a}", "--sampler=ddim"], "needs one --label"),
        (["--interval=100,900"], "needs guidance"),
        (["--guidance=2", "--interval=900,100"], "0 <= LOW <= HIGH <= 1000"),
        (["--jump=3"], "--jump belongs to --inpaint"),
        (["--label=3", f"--inpaint={a}", f"--mask={a}"], "--jump=10 must be less than the steps"),
    ):
        done = script("sample.py", *options, *extra)
        assert done.returncode == 2, done.stderr
        assert fragment in done.stderr

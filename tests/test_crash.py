"""Runs that are killed, stopped, disturbed and taken up again: the end is that of the run that nothing disturbed."""

import json
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import SMALL, assert_one_line, assert_same_end, fingerprint, logged_metrics
from PIL import Image

from ddpm_jax.run import checkpoint


def wait_for(process, *starts):
    """Read the process's lines up to one that begins with one of `starts`, or to the last one."""
    for line in process.stdout:
        if line.startswith(starts):
            return


def slow_marker(seconds):
    """Code after which a save tells that it is about to write its commit marker, and waits."""
    return f"""
from orbax.checkpoint._src.path import async_path
write = async_path.write_text
async def slow(path, text):
    if path.name == "commit_success.txt":
        print("before the marker of", path.parent.name, flush=True)
        time.sleep({seconds})
    await write(path, text)
async_path.write_text = slow
"""


def seeded():
    """Random numbers that differ from run to run; a test that fails shows the seed."""
    seed = time.time_ns()
    print("seed", seed)
    return random.Random(seed)


def assert_kills_change_nothing(start, tmp_path, options, kills, wait):
    """SIGKILL so often, each time up to `wait` seconds after the first step; then the run is left alone."""
    assert start(*options, f"--workdir={tmp_path}/unbroken").wait(900) == 0
    chance = seeded()
    for _ in range(kills):
        process = start(*options, f"--workdir={tmp_path}/run")
        wait_for(process, "first step")
        time.sleep(chance.uniform(0, wait))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(*options, f"--workdir={tmp_path}/run").wait(900) == 0
    assert_same_end(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.faults
def test_killed_at_random_moments_it_ends_with_the_same_bits(trained, start, tmp_path):
    """SIGKILL and SIGTERM in turns, the same command again each time."""
    chance, codes = seeded(), []
    options = "--config.train.steps=60", f"--workdir={tmp_path}"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(*options)
        wait_for(process, "first step", "already")
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(number)
        process.communicate(timeout=60)
        codes.append(process.returncode)
    assert set(codes) <= {-signal.SIGKILL, 75, 0}
    out, err = start(*options).communicate(timeout=60)
    assert ("resuming at step" in out or "already finished" in out, err) == (True, "")
    assert_same_end(tmp_path, trained)


@pytest.mark.faults
def test_fault_01_killed_twenty_times(start, tmp_path):
    """A save is under way most of the time, for every second step has one."""
    options = ["--config.train.steps=120", "--config.train.checkpoint_every=2"]
    assert_kills_change_nothing(start, tmp_path, options, 20, 0.8)


@pytest.mark.soak
def test_fault_01_killed_fifty_times_while_the_digits_are_learned(start, tmp_path):
    """The network of configs/digits.py; a quarter of an hour."""
    options = [f"--config.model.{name}" for name in ("channels=32", "multipliers=1,2", "attention_resolutions=4")]
    options += ["--config.model.groups=8", "--config.train.batch_size=64", "--config.train.steps=1000"]
    options += ["--config.train.checkpoint_every=5"]
    assert_kills_change_nothing(start, tmp_path, options, 50, 3.0)


@pytest.mark.faults
def test_fault_02_killed_between_data_and_marker(trained, start, tmp_path):
    """The step does not count; the run goes on from the one before."""
    options = "--config.train.steps=60", f"--workdir={tmp_path}"
    process = start(*options, patch=slow_marker("60 if path.parent.name == '20' else 0"))
    wait_for(process, "before the marker of 20")
    process.kill()
    assert (tmp_path / "checkpoints" / "20" / "params").is_dir()
    assert checkpoint.steps(tmp_path / "checkpoints") == [10]
    out, err = start(*options).communicate(timeout=100)
    assert ("resuming at step 10" in out, err) == (True, "")
    assert_same_end(tmp_path, trained)


@pytest.mark.faults
def test_fault_03_killed_while_an_old_step_is_deleted(trained, start, tmp_path):
    """The half that is left is no step, and is gone after the next start."""
    patch = """
from ddpm_jax.run import checkpoint
def half(paths):
    for path in paths:
        if path.name.isdigit():
            for file in [file for file in path.rglob("*") if file.is_file()][::2]:
                file.unlink()
            print("half deleted", flush=True)
            time.sleep(60)
checkpoint.delete = half
"""
    options = "--config.train.steps=60", f"--workdir={tmp_path}"
    process = start(*options, "--config.train.keep=1", patch=patch)
    wait_for(process, "half deleted")
    process.kill()
    assert any(path.is_file() for path in (tmp_path / "checkpoints" / "deleted").rglob("*"))
    assert 10 not in checkpoint.steps(tmp_path / "checkpoints")
    _, err = start(*options).communicate(timeout=100)
    assert err == ""
    assert not any(path.is_file() for path in (tmp_path / "checkpoints" / "deleted").rglob("*"))
    assert_same_end(tmp_path, trained)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 75, id="fault_04 SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="fault_07 Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(start, tmp_path, number, code):
    """The step is finished, and the line that names it is the last one."""
    process = start(f"--workdir={tmp_path}", "--config.train.checkpoint_every=1000")
    wait_for(process, "step")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    assert out.splitlines()[-1] == f"stopped by a signal; step {step} is saved and the same command resumes from it"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "code", "seconds"),
    [
        pytest.param(signal.SIGTERM, 75, 2, id="fault_06 SIGTERM"),
        pytest.param(signal.SIGINT, 130, 100, id="fault_06 Ctrl-C"),
    ],
)
def test_a_second_signal_during_the_last_save(trained, start, tmp_path, number, code, seconds):
    """A second SIGTERM changes nothing; a second Ctrl-C leaves at once, without a new step and without harm."""
    options = f"--workdir={tmp_path}", "--config.train.steps=60"
    process = start(*options, patch=slow_marker(seconds))
    wait_for(process, "first step")
    process.send_signal(number)
    wait_for(process, "before the marker")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert len(checkpoint.steps(tmp_path / "checkpoints")) == (number == signal.SIGTERM)
    assert start(*options).wait(100) == 0
    assert_same_end(tmp_path, trained)


@pytest.mark.faults
def test_fault_08_an_exception_while_a_save_is_under_way(start, tmp_path):
    """The save still comes to its end."""
    fails = "from ddpm_jax import training\ntraining.ema_init_share = lambda *args: 1 / 0\n"
    process = start(f"--workdir={tmp_path}", "--config.train.checkpoint_every=6", patch=slow_marker(2) + fails)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ZeroDivisionError" in err
    assert checkpoint.steps(tmp_path / "checkpoints") == [6]


@pytest.mark.faults
def test_fault_09_the_last_step_while_a_save_is_under_way(start, tmp_path):
    options = "--config.train.steps=20", "--config.train.checkpoint_every=19", f"--workdir={tmp_path}"
    process = start(*options, patch=slow_marker(2))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert checkpoint.steps(tmp_path / "checkpoints") == [19, 20]


def test_fault_10_a_finished_run_is_left_alone(trained, script):
    before = fingerprint(trained)
    again = script("train.py", *SMALL, "--config.train.steps=60", f"--workdir={trained}", "--cpu-devices=1")
    assert (again.returncode, "already finished at step 60" in again.stdout) == (0, True)
    assert fingerprint(trained) == before
    assert len(json.loads((trained / "run.json").read_text())) == 1


@pytest.mark.faults
def test_fault_10_a_damaged_end_is_made_again(trained, script, tmp_path):
    """The last step is there but cannot be read: the run goes on from the one before."""
    run = shutil.copytree(trained, tmp_path / "run")
    for file in (run / "checkpoints" / "60" / "params").glob("d/*"):
        file.write_bytes(b"")
    again = script("train.py", *SMALL, "--config.train.steps=60", f"--workdir={run}", "--cpu-devices=1")
    assert (again.returncode, "resuming at step 50" in again.stdout) == (0, True)
    assert "damaged checkpoint skipped, step 60" in again.stderr
    assert fingerprint(run) == fingerprint(trained)


@pytest.mark.faults
def test_the_same_command_goes_on_from_a_chosen_step(trained, script, tmp_path):
    """Also after that step is no longer kept; the first way on from it stays beside, the end is the same."""
    run = shutil.copytree(trained, tmp_path / "run")
    command = ["train.py", *SMALL, f"--workdir={run}", "--cpu-devices=1", "--step=40", "--config.train.keep=1"]
    first = script(*command, "--config.train.steps=53")
    assert (first.returncode, "resuming at step 40" in first.stdout) == (0, True), first.stderr
    assert checkpoint.steps(run / "checkpoints") == [53]
    second = script(*command, "--config.train.steps=60")
    assert (second.returncode, "resuming at step 53" in second.stdout) == (0, True), second.stderr
    third = script(*command, "--config.train.steps=60")
    assert "already finished at step 60" in third.stdout
    assert sorted(path.name for path in (run / "checkpoints").glob("*.aside*")) == ["50.aside", "60.aside"]
    assert fingerprint(run) == fingerprint(trained)


@pytest.mark.faults
def test_fault_11_a_run_can_be_made_longer(trained, script, tmp_path):
    """Forty steps and then sixty are the sixty of one go."""
    for steps in (40, 60):
        done = script("train.py", *SMALL, f"--config.train.steps={steps}", f"--workdir={tmp_path}", "--cpu-devices=1")
        assert (done.returncode, done.stderr) == (0, "")
    assert "resuming at step 40" in done.stdout
    assert "step 49/60" in done.stdout
    assert fingerprint(tmp_path) == fingerprint(trained)


@pytest.mark.faults
def test_fault_12_a_second_run_in_the_folder_is_refused(start, script, tmp_path):
    process = start(f"--workdir={tmp_path}")
    wait_for(process, "first step")
    second = script("train.py", *SMALL, f"--workdir={tmp_path}", "--cpu-devices=1")
    assert second.returncode == 2
    assert f"is in use by another run (process {process.pid} on" in second.stderr
    assert_one_line(second)


@pytest.mark.faults
def test_fault_13_other_devices_agree_to_rounding_and_say_so(script, tmp_path):
    """Saved by eight devices, taken up by one, two and eight: the losses are those of eight, to 1e-5."""
    command = ["train.py", *SMALL]
    for steps, name in ((20, "begun"), (34, "unbroken")):
        done = script(*command, f"--config.train.steps={steps}", f"--workdir={tmp_path}/{name}", "--cpu-devices=8")
        assert done.returncode == 0, done.stderr
    wanted = {row["step"]: row["loss"] for row in logged_metrics(tmp_path / "unbroken")}
    for devices in (1, 2):
        workdir = shutil.copytree(tmp_path / "begun", tmp_path / f"{devices}")
        more = script(*command, "--config.train.steps=34", f"--workdir={workdir}", f"--cpu-devices={devices}")
        assert more.returncode == 0, more.stderr
        told = f"only to rounding: devices 8 x cpu (cpu) is now {devices} x cpu (cpu)"
        assert f"not bit-exact from here on, {told}" in more.stdout
        found = {row["step"]: row["loss"] for row in logged_metrics(workdir)}
        for step in (28, 34):
            assert found[step] == pytest.approx(wanted[step], abs=1e-5)


@pytest.mark.faults
def test_fault_14_changed_data_are_noticed_on_resume(script, tmp_path):
    """Of the same number too; by name the run goes on with them."""
    command = ["train.py", *SMALL, f"--workdir={tmp_path}/run", f"--config.data.source=npz:{tmp_path}/data.npz"]
    images = np.zeros((40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    assert script(*command, "--config.train.steps=3").returncode == 0
    images[20] = 9
    np.savez(tmp_path / "data.npz", images=images)
    again = script(*command, "--config.train.steps=6")
    assert again.returncode == 2
    assert re.search("the run had 40x8x8x1-.{8}, the data now are 40x8x8x1-.{8}: its batches", again.stderr)
    assert_one_line(again)
    again = script(*command, "--config.train.steps=6", "--allow-change=data.source")
    assert (again.returncode, "continuing with other data" in again.stdout) == (0, True)


def test_fault_14_another_experiment_in_the_folder_is_refused_by_name(trained, script):
    other = script(
        "train.py", *SMALL, "--config.train.steps=60", "--config.train.learning_rate=0.1", f"--workdir={trained}"
    )
    assert other.returncode == 2
    assert "train.learning_rate is 0.002 there, 0.1 here" in other.stderr
    assert "with --allow-change=train.learning_rate" in other.stderr
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
    Image.fromarray(np.repeat([[0, 255]], [4, 4], 1).astype(np.uint8).repeat(8, 0)).save(tmp_path / "a.png")
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
        (["--jump=3"], "--jump needs --inpaint"),
        (["--label=3", f"--inpaint={a}", f"--mask={a}"], "--jump=10 must be less than the steps"),
    ):
        done = script("sample.py", *options, *extra)
        assert done.returncode == 2, done.stderr
        assert fragment in done.stderr

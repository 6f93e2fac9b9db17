"""The scripts as a user runs them: train, kill, resume, sample, and what goes wrong by mistake."""

import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import checkpoint

ROOT = Path(__file__).parent.parent
TINY = [
    "--config.model.channels=8",
    "--config.model.multipliers=1",
    "--config.model.attention_resolutions=8",
    "--config.model.groups=4",
    "--config.train.batch_size=16",
    "--config.train.warmup_steps=5",
    "--config.train.log_every=7",
    "--config.train.checkpoint_every=10",
    "--config.train.sample_every=1000",
    "--config.train.sample_num=3",
    "--config.train.sample_steps=3",
]


@pytest.fixture(scope="session")
def trained(script, tmp_path_factory):
    """The folder of a run of 60 steps that nothing interrupted, on one device."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    done = script("train.py", *TINY, "--config.train.steps=60", f"--workdir={workdir}", "--cpu-devices=1")
    assert done.returncode == 0, done.stderr
    return workdir


def fingerprint(workdir):
    """SHA-256 over parameters, average, optimiser state and counters of the newest step."""
    meta, trees = checkpoint.load(workdir / "checkpoints", checkpoint.ARRAYS[:3])
    sha = hashlib.sha256(json.dumps([meta[name] for name in checkpoint.COUNTERS]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        sha.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def metrics(workdir):
    """The rows of metrics.jsonl without what the clock gave."""
    clock = ("images_per_second", "seconds_per_step", "input_wait")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def test_a_run_leaves_what_it_promises(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "run.json",
        "samples",
    ]
    assert checkpoint.steps(trained / "checkpoints") == [40, 50, 60]
    assert [row["step"] for row in metrics(trained)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert metrics(trained)[-1]["learning_rate"] == pytest.approx(2e-3)
    grid = Image.open(trained / "samples" / "step_000000060.png")
    assert grid.mode == "L"
    (start,) = json.loads((trained / "run.json").read_text())
    assert start["devices"].startswith("1 x cpu")
    assert set(start["versions"]) >= {"jax", "flax", "numpy", "python", "ddpm_jax"}


def test_killed_at_random_moments_it_ends_with_the_same_bits(trained, environment, tmp_path):
    """SIGKILL four times, a SIGTERM among them, the same command again each time: state and metrics are equal."""
    workdir, chance = tmp_path / "run", random.Random(time.time_ns())
    command = [sys.executable, "train.py", *TINY, "--config.train.steps=60", f"--workdir={workdir}", "--cpu-devices=1"]
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
    command = ["train.py", *TINY, f"--workdir={tmp_path}/run", "--cpu-devices=1"]
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
    command = [sys.executable, "train.py", *TINY, f"--workdir={tmp_path}/run", "--config.train.checkpoint_every=100000"]
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
    again = script("train.py", *TINY, "--config.train.steps=60", f"--workdir={trained}", "--cpu-devices=1")
    assert (again.returncode, "already finished at step 60" in again.stdout) == (0, True)
    assert fingerprint(trained) == before


@pytest.mark.faults
def test_a_second_run_in_the_folder_is_refused(environment, script, tmp_path):
    command = ["train.py", *TINY, f"--workdir={tmp_path}/run"]
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
    command = ["train.py", *TINY, f"--workdir={tmp_path}/run", f"--config.data.source=npz:{tmp_path}/data.npz"]
    images = np.zeros((40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    assert script(*command, "--config.train.steps=3").returncode == 0
    np.savez(tmp_path / "data.npz", images=np.concatenate([images, images[:1]]))
    again = script(*command, "--config.train.steps=6")
    assert again.returncode == 2
    assert "the run had 40 images, the data now have 41" in again.stderr


@pytest.mark.faults
def test_a_resume_on_more_devices_agrees_to_rounding_and_says_so(trained, script, tmp_path):
    """From step 20 of one device on with two: the losses are those of the run on one, to 1e-5."""
    command = ["train.py", *TINY, f"--workdir={tmp_path}/run"]
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
        "train.py", *TINY, "--config.train.steps=60", "--config.train.learning_rate=0.1", f"--workdir={trained}"
    )
    assert other.returncode == 2
    assert "train.learning_rate is 0.002 there, 0.1 here" in other.stderr
    assert_one_line(other)


def samples(script, workdir, out, *options):
    done = script("sample.py", f"--workdir={workdir}", f"--out={out}", "--steps=5", *options)
    assert done.returncode == 0, done.stderr
    return np.load(out / "samples.npz")["images"]


def test_fault_72_samples_are_the_same_for_any_device_count_and_batch(trained, script, tmp_path):
    """To one level of 255; from the folder of the run alone."""
    one = samples(script, trained, tmp_path / "one", "--num=11", "--batch-size=4", "--cpu-devices=1", "--png", "--gif")
    assert (one.shape, one.dtype) == ((11, 8, 8, 1), np.uint8)
    for devices, batch in [(2, 11), (8, 8)]:
        out = tmp_path / f"{devices}"
        other = samples(script, trained, out, "--num=11", f"--batch-size={batch}", f"--cpu-devices={devices}")
        assert np.abs(one.astype(int) - other).max() <= 1
    gif = Image.open(tmp_path / "one" / "denoising.gif")
    assert gif.n_frames == 5  # no more than steps
    gif.seek(4)
    grid = np.asarray(Image.open(tmp_path / "one" / "grid.png").convert("L"), int)
    found = np.asarray(gif.convert("L"), int)[:, : grid.shape[1]]
    rows = min(grid.shape[0], found.shape[0]) // 2
    assert np.abs(found[:rows, : rows // 2] - grid[:rows, : rows // 2]).mean() < 40
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one" / "image_000010.png")), one[10, ..., 0])
    raw = samples(script, trained, tmp_path / "raw", "--num=11", "--weights=raw", "--seed=0")
    seed = samples(script, trained, tmp_path / "seed", "--num=11", "--seed=1", "--sampler=ddim", "--eta=0.5")
    assert len({one.tobytes(), raw.tobytes(), seed.tobytes()}) == 3


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.faults
def test_two_processes_of_two_devices_are_one_of_four(script, environment, tmp_path):
    """The same losses, and one checkpoint that both agree on."""
    options = [*TINY, "--config.train.steps=10"]
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


def test_a_run_with_labels(script, tmp_path):
    """Trained with the digits' ten classes; sampled with each in turn, and with one."""
    options = [*TINY, "--config.train.steps=5", "--config.model.num_classes=10", f"--workdir={tmp_path}/run"]
    done = script("train.py", *options)
    assert done.returncode == 0, done.stderr
    for option, wanted in [("--seed=0", [*range(10), 0, 1]), ("--label=3", [3] * 12)]:
        done = script("sample.py", f"--workdir={tmp_path}/run", "--num=12", "--steps=3", "--gif", option, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert np.load(tmp_path / "run" / "out" / "samples.npz")["labels"].tolist() == wanted


@pytest.mark.faults
def test_a_signal_to_one_of_two_processes_stops_both(environment, tmp_path):
    """Both leave with 75 after the same step, which is saved."""
    port, options = free_port(), [*TINY, "--config.train.checkpoint_every=100000", f"--workdir={tmp_path}/run"]
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
            done = script("train.py", *TINY, *EVERYTHING, f"--config.train.steps={steps}", f"--workdir={workdir}")
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


def test_dry_run_writes_nothing(script, tmp_path):
    done = script("train.py", *TINY, "--dry-run", f"--workdir={tmp_path}/run", "--config.data.image_size=8")
    assert done.returncode == 0, done.stderr
    assert "dry run done" in done.stdout
    assert not (tmp_path / "run").exists()


def assert_one_line(done):
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")


MISTAKES = {
    "fault_28 unknown key": (["train.py", "--config.train.lrr=1"], 2, "did you mean --config.train.learning_rate?"),
    "fault_29 wrong type": (
        ["train.py", "--config.train.steps=abc"],
        2,
        "--config.train.steps=abc is not a whole number",
    ),
    "fault_31 batch over devices": (
        ["train.py", "--config.train.batch_size=100", "--cpu-devices=8"],
        2,
        "batch_size=100 does not divide over 8 devices; try 96 or 104",
    ),
    "fault_32 batch below devices": (
        ["train.py", "--config.train.batch_size=4", "--cpu-devices=8"],
        2,
        "8 devices; try 8",
    ),
    "fault_33 image size and levels": (
        ["train.py", "--config.model.multipliers=1,1,1,1,1"],
        2,
        "8x8 cannot be halved 4 times, as model.multipliers=1,1,1,1,1 asks; sizes that fit: 16x16",
    ),
    "schedule": (["train.py", "--config.diffusion.schedule=linaer"], 2, "is not one of linear, cosine"),
    "weighting": (["train.py", "--config.diffusion.weighting=none"], 2, "is not one of simple, vlb, min_snr, p2"),
    "variance": (["train.py", "--config.diffusion.variance=fixedsmal"], 2, "is not one of fixedsmall, fixedlarge"),
    "spacing": (["sample.py", "--workdir=RUN", "--spacing=even"], 2, "is not one of trailing, leading"),
    "processes": (["train.py", "--distributed=localhost:1,3,2"], 2, "with ID below COUNT"),
    "fault_39 platform": (["train.py", "--platform=tpu"], 2, "(--platform=tpu)"),
    "unwritable": (["train.py", "--workdir=/proc/run"], 2, "cannot write to --workdir=/proc/run"),
    "classes": (["train.py", "--config.model.num_classes=5"], 2, "labels run from 0 to 9"),
    "missing folder": (
        ["train.py", "--config.data.source=folder:NOWHERE", "--config.data.image_size=8"],
        3,
        "there is no folder NOWHERE",
    ),
    "empty folder": (
        ["train.py", "--config.data.source=folder:EMPTY", "--config.data.image_size=8"],
        3,
        "no pictures in",
    ),
    "unreadable": (["train.py", "--config.data.source=folder:BROKEN", "--config.data.image_size=8"], 3, "a.png ("),
    "source": (["train.py", "--config.data.source=cifar"], 3, "is none of digits, tfds, folder, npz"),
    "data below batch": (["train.py", "--config.train.batch_size=2048"], 3, "1797 images"),
    "no run": (["sample.py", "--workdir=EMPTY"], 4, "there is no run in"),
    "no checkpoint": (["sample.py", "--workdir=NEW"], 4, "there is no checkpoint in"),
    "fault_70 no images asked": (["sample.py", "--num=0"], 2, "--num=0 must be at least 1"),
    "fault_71 steps above T": (["sample.py", "--workdir=RUN", "--steps=1001"], 2, "must be from 1 to T=1000"),
    "fault_71 eta for ddpm": (["sample.py", "--workdir=RUN", "--eta=0.5"], 2, "ddpm has no option eta"),
    "label": (["sample.py", "--workdir=RUN", "--label=3"], 2, "the model has no labels"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_its_exit_code(script, trained, tmp_path, mistake):
    (command, *options), code, fragment = MISTAKES[mistake]
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NEW" / "checkpoints").mkdir(parents=True)
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "a.png").write_text("<html>")
    places = {name: str(tmp_path / name) for name in ("EMPTY", "NEW", "BROKEN")} | {"RUN": str(trained)}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    if not any(option.startswith("--workdir") for option in options):
        options.append(f"--workdir={tmp_path / 'workdir'}")
    done = script(command, *options)
    assert done.returncode == code, done.stderr
    assert fragment in done.stderr
    assert_one_line(done)
    assert not (tmp_path / "workdir").exists()


def test_fault_73_existing_samples_are_not_overwritten(trained, script, tmp_path):
    first = samples(script, trained, tmp_path, "--num=2")
    again = script("sample.py", f"--workdir={trained}", f"--out={tmp_path}", "--num=2", "--seed=5")
    assert again.returncode == 2
    assert "already holds samples" in again.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["images"], first)


@pytest.mark.faults
def test_a_run_that_diverges_names_the_last_good_checkpoint(script, tmp_path):
    """A learning rate of 1e30 makes the loss overflow within a few steps."""
    done = script(
        "train.py",
        *TINY,
        f"--workdir={tmp_path}/run",
        "--config.train.learning_rate=1e30",
        "--config.train.checkpoint_every=2",
        "--config.train.max_skipped=3",
    )
    assert done.returncode == 5, done.stderr
    assert "steps in a row" in done.stderr
    assert f"checkpoints/{checkpoint.steps(tmp_path / 'run' / 'checkpoints')[-1]};" in done.stderr
    _, trees = checkpoint.load(tmp_path / "run" / "checkpoints", checkpoint.ARRAYS[:3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


def test_tensorflow_is_never_imported(environment):
    code = "import sys, train, sample, evaluate; import ddpm_jax.data.digits, ddpm_jax.experiment; "
    code += "sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0

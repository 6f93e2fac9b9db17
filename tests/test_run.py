"""The scripts as a user runs them: train, sample, and what goes wrong by mistake."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL, assert_one_line, logged_metrics
from PIL import Image

from ddpm_jax.commands import sample, train
from ddpm_jax.run import checkpoint


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
    assert [row["step"] for row in logged_metrics(trained)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert logged_metrics(trained)[-1]["learning_rate"] == pytest.approx(2e-3)
    grid = Image.open(trained / "samples" / "step_000000060.png")
    assert grid.mode == "L"
    (start,) = json.loads((trained / "run.json").read_text())
    assert start["devices"].startswith("1 x cpu")
    assert set(start["versions"]) >= {"jax", "flax", "numpy", "python", "ddpm_jax"}


def samples(script, workdir, out, *options):
    done = script("sample.py", f"--workdir={workdir}", f"--out={out}", "--steps=5", *options)
    assert done.returncode == 0, done.stderr
    return np.load(out / "samples.npz")["images"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_with_labels(script, tmp_path):
    """Trained with the digits' ten classes; sampled with each in turn, and with one."""
    options = [*SMALL, "--config.train.steps=5", "--config.model.num_classes=10", f"--workdir={tmp_path}/run"]
    done = script("train.py", *options)
    assert done.returncode == 0, done.stderr
    for option, wanted in [("--seed=0", [*range(10), 0, 1]), ("--label=3", [3] * 12)]:
        done = script("sample.py", f"--workdir={tmp_path}/run", "--num=12", "--steps=3", "--gif", option, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert np.load(tmp_path / "run" / "out" / "samples.npz")["labels"].tolist() == wanted


@pytest.mark.slow
def test_dry_run_writes_nothing(script, tmp_path):
    options = [*SMALL, "--dry-run", f"--workdir={tmp_path}/run", "--config.data.image_size=8"]
    done = script("train.py", *options, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    assert "dry run done" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_steps_in_one_call_and_a_stop_within_them(script, tmp_path):
    """The run of one step a call to rounding; stopped and resumed, the same bits as one that was not stopped."""
    common, at_once = [*SMALL, "--cpu-devices=1"], ["--config.train.steps_per_call=5", "--config.train.log_every=10"]

    def params(name, *options, steps=20):
        done = script("train.py", *common, f"--config.train.steps={steps}", f"--workdir={tmp_path / name}", *options)
        assert done.returncode == 0, done.stderr
        return checkpoint.load(tmp_path / name / "checkpoints", ["params"])[1]["params"]

    single, whole = params("single"), params("whole", *at_once)
    params("parts", *at_once, steps=13)  # not a multiple: the last call is shorter, and so is the first one after it
    parts = params("parts", *at_once)
    for a, b, c in zip(*map(jax.tree.leaves, (single, whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        np.testing.assert_allclose(b, c, atol=1e-4)
    assert [row["step"] for row in logged_metrics(tmp_path / "parts")] == [10, 13, 20]


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_run(script, tmp_path):
    """Where the user's cache is; a home that cannot be written does no harm."""
    options = [*SMALL, "--cpu-devices=1", "--dry-run", "--config.data.image_size=8", "--config.data.channels=1"]
    own = {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}

    def kept():
        done = script("train.py", *options, **own)
        assert done.returncode == 0, done.stderr
        return sorted(path.name for path in (tmp_path / ".cache/ddpm_jax/compiled").glob("*/*-cache"))

    first = kept()
    assert any("_fun" in name for name in first)
    assert kept() == first
    done = script("train.py", *options, **own | {"HOME": "/proc"})
    assert done.returncode == 0, done.stderr


def test_a_topology_is_only_compiled_for(script, tmp_path):
    done = script("train.py", "--topology=v5e:2x4", f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    assert_one_line(done)
    assert "--topology=v5e:2x4 only compiles; add --dry-run" in done.stderr


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
        "8x8 cannot be halved 4 times, as model.multipliers=1,1,1,1,1 requires; sizes that fit: 16x16",
    ),
    "schedule": (["train.py", "--config.diffusion.schedule=linaer"], 2, "is not one of linear, cosine"),
    "weighting": (["train.py", "--config.diffusion.weighting=none"], 2, "is not one of simple, vlb, min_snr, p2"),
    "variance": (["train.py", "--config.diffusion.variance=fixedsmal"], 2, "is not one of fixedsmall, fixedlarge"),
    "spacing": (["sample.py", "--workdir=RUN", "--spacing=even"], 2, "is not one of trailing, leading"),
    "processes": (["train.py", "--distributed=localhost:1,3,2"], 2, "with ID below COUNT"),
    "fault_39 platform": (["train.py", "--platform=tpu"], 2, "(--platform=tpu)"),
    "step at the end": (["train.py", "--step=2000"], 2, "--step=2000 must be less than train.steps=2000"),
    "span": (["train.py", "--profile=7"], 2, "--profile=7 must be START:STOP, two whole numbers, the second"),
    "span backwards": (["train.py", "--profile=7:7"], 2, "--profile=7:7 must be START:STOP"),
    "span beyond the end": (["train.py", "--profile=2000:2001"], 2, "must begin before train.steps=2000"),
    "span within calls": (
        ["train.py", "--profile=10:25", "--config.train.steps_per_call=10"],
        2,
        "--profile=10:25 must be multiples of train.steps_per_call=10",
    ),
    "fault_22 unwritable": (["train.py", "--workdir=/proc/run"], 2, "cannot write to --workdir=/proc/run"),
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
    "fault_45 data below batch": (["train.py", "--config.train.batch_size=2048"], 3, "1797 images"),
    "no run": (["sample.py", "--workdir=EMPTY"], 4, "there is no run in"),
    "no checkpoint": (["sample.py", "--workdir=NEW"], 4, "there is no checkpoint in"),
    "fault_70 no images asked": (["sample.py", "--num=0"], 2, "--num=0 must be at least 1"),
    "fault_71 steps above T": (["sample.py", "--workdir=RUN", "--steps=1001"], 2, "must be from 1 to T=1000"),
    "fault_71 eta for ddpm": (["sample.py", "--workdir=RUN", "--eta=0.5"], 2, "ddpm has no option eta"),
    "label": (["sample.py", "--workdir=RUN", "--label=3"], 2, "the model has no labels"),
}


AS_PROCESSES = ("fault_28 unknown key", "fault_39 platform", "source", "no run")  # one of each code, and a first start


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_its_exit_code(script, call, environment, monkeypatch, trained, tmp_path, mistake):
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
    if mistake in AS_PROCESSES:
        done = script(command, *options)
    else:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("TFDS_DATA_DIR", environment["TFDS_DATA_DIR"])
        module = {"train.py": train, "sample.py": sample}[command]
        done = subprocess.CompletedProcess(command, *call(module, *options))
    assert done.returncode == code, done.stderr
    assert fragment in done.stderr
    assert_one_line(done)
    assert not (tmp_path / "workdir").exists()


def test_fault_73_existing_samples_are_not_overwritten(trained, script, call, tmp_path):
    first = samples(script, trained, tmp_path, "--num=2")
    code, _, err = call(sample, f"--workdir={trained}", f"--out={tmp_path}", "--num=2", "--seed=5")
    assert code == 2
    assert "already holds samples" in err
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["images"], first)


@pytest.mark.faults
def test_a_run_that_diverges_names_the_last_good_checkpoint(script, tmp_path):
    """A learning rate of 1e30 makes the loss overflow within a few steps."""
    done = script(
        "train.py",
        *SMALL,
        f"--workdir={tmp_path}/run",
        "--config.train.learning_rate=1e30",
        "--config.train.checkpoint_every=2",
        "--config.train.max_skipped=3",
    )
    assert done.returncode == 5, done.stderr
    assert re.search(r"at step \d+ \([34] in a row\)", done.stderr)
    assert f"checkpoints/{checkpoint.steps(tmp_path / 'run' / 'checkpoints')[-1]};" in done.stderr
    _, trees = checkpoint.load(tmp_path / "run" / "checkpoints", checkpoint.ARRAYS[:3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


def test_tensorflow_is_never_imported(environment):
    code = "import sys, train, sample, evaluate; import ddpm_jax.data.digits, ddpm_jax.experiment; "
    code += "sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0

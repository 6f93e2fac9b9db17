"""What goes wrong in sample.py and evaluate.py: where they look, what they are asked for, what they may write."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, T, make_run
from PIL import Image

from ddpm_jax import experiment, schedules
from ddpm_jax.commands import evaluate, sample
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.run import checkpoint, snapshots

OUTPUTS = ["denoising.gif", "grid.png", "image_000000.png", "image_000001.png", "samples.npz"]


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """A run's folder with the steps 3 and 5, of other parameters each."""
    return make_run(tmp_path_factory.mktemp("two"), steps=(3, 5))[0]


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def drawn(call, out, *given):
    code, _, err = call(sample, f"--out={out}", "--steps=3", *given)
    assert (code, err) == (0, "")
    return np.load(out / "samples.npz")["images"].astype(int)


# --- what is asked for


def test_fault_70_a_remainder_is_neither_lost_nor_different(run, call, tmp_path):
    """7 images in batches of 3, over 8 devices, are the first of 16 in one batch."""
    few = drawn(call, tmp_path / "few", f"--workdir={run[0]}", "--num=7", "--batch-size=3")
    many = drawn(call, tmp_path / "many", f"--workdir={run[0]}", "--num=16", "--batch-size=16")
    assert (len(few), len(many)) == (7, 16)
    assert np.abs(few - many[:7]).max() <= 1


def test_fault_71_one_step(run, call, tmp_path):
    """One step from noise to clean data is one guess from the noise at T alone, so samplers agree."""
    ddpm, ddim = (
        drawn(call, tmp_path / name, f"--workdir={run[0]}", "--num=2", "--steps=1", f"--sampler={name}")
        for name in ("ddpm", "ddim")
    )
    assert np.abs(ddpm - ddim).max() <= 1


MISTAKES = {
    "fault_70 no images": (["--num=0"], "--num=0 must be at least 1"),
    "fault_70 fewer than none": (["--num=-3"], "--num=-3 must be at least 1"),
    "fault_70 no batch": (["--batch-size=0"], "--batch-size=0 must be at least 1"),
    "fault_71 steps above T": (["--steps=13"], f"steps=13 must be from 1 to T={T}"),
    "fault_71 steps below one": (["--steps=-1"], "--steps=-1 must be at least 0"),
    "fault_71 eta above 1": (["--sampler=ddim", "--eta=1.5"], "eta=1.5 must be from 0 to 1"),
    "fault_71 eta below 0": (["--sampler=ddim", "--eta=-0.1"], "eta=-0.1 must be from 0 to 1"),
    "fault_71 no eta": (["--sampler=ddim", "--eta=nan"], "eta=nan must be from 0 to 1"),
    "fault_71 eta of another sampler": (["--eta=0.5"], "ddpm has no option eta"),
    "fault_38 stray": (["runs/digits"], "unexpected argument 'runs/digits'; options are written --name=value"),
    "guidance": (["--guidance=nan"], "--guidance=nan must be finite"),
    "level between times": (["--interpolate=A,A", "--level=2.5"], f"--level=2.5 must be a whole time, from 1 to {T}"),
    "level above T": (["--interpolate=A,A", "--level=13"], f"--level=13 must be above 0 and at most {T}"),
    "images of one": (["--reconstruct=A", "--sampler=ddim", "--num=3"], "--reconstruct makes one image; leave --num=3"),
    "out is a file": (["--out=A"], "cannot write to --out="),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_writes_nothing(run, call, tmp_path, mistake):
    given, fragment = MISTAKES[mistake]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    given = [option.replace("A", str(tmp_path / "a.png")) for option in given]
    code, out, err = call(sample, f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", *given)
    assert (code, out) == (2, "")
    assert fragment in err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert names(tmp_path) == ["a.png"]


def test_fault_71_steps_of_a_continuous_schedule():
    """It has no T to name, but a resolution."""
    with pytest.raises(ConfigError, match="steps=100001 must be from 1 to 100000, the resolution of"):
        schedules.make_schedule("vp").times(100_001)


# --- what is there already


@pytest.mark.parametrize("name", OUTPUTS)
def test_fault_73_nothing_there_is_written_over_unasked(run, call, tmp_path, name):
    """Any file that would be written counts, before anything is computed; with --overwrite all are written."""
    (tmp_path / name).write_bytes(b"mine")
    given = [f"--workdir={run[0]}", f"--out={tmp_path}", "--num=2", "--steps=2", "--png", "--gif"]
    code, out, err = call(sample, *given)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path} already holds samples ({name}); take another --out, or add --overwrite\n"
    assert (names(tmp_path), (tmp_path / name).read_bytes()) == ([name], b"mine")
    if name == "grid.png":
        code, out, _ = call(sample, *given, "--overwrite")
        assert (code, names(tmp_path)) == (0, OUTPUTS)
        assert out.endswith(f"wrote {tmp_path / 'grid.png'}, samples.npz, denoising.gif, 2 single images\n")
        assert Image.open(tmp_path / "grid.png").format == "PNG"


def test_fault_73_an_evaluation_is_not_written_over_unasked(run, call, tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    out.write_text("mine")
    given = [f"--workdir={run[0]}", f"--out={out}", "--num=8", "--steps=1", "--metrics=mse"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "prepare_run", None)  # refused before anything is computed
        code, told, err = call(evaluate, *given)
    assert (code, told) == (2, "")
    assert err == f"error: {out} already exists; take another --out, or add --overwrite\n"
    assert out.read_text() == "mine"


def test_fault_73_a_device_is_no_file_to_write_over(run, call):
    """A rename onto /dev/null would put a file in its place for everybody."""
    code, _, err = call(evaluate, f"--workdir={run[0]}", "--out=/dev/null", "--num=8", "--overwrite")
    assert code == 2
    assert "--out=/dev/null is a folder or a device" in err
    assert Path("/dev/null").is_char_device()


# --- what comes out


def test_fault_74_samples_that_are_not_finite_are_not_written(call, tmp_path):
    """Parameters up to 1e38 are finite, their products are not. What was there is left as it was."""
    folder, out = make_run(tmp_path, scale=1e38)[0], tmp_path / "out"
    out.mkdir()
    (out / "grid.png").write_bytes(b"mine")
    given = [f"--workdir={folder}", f"--out={out}", "--num=2", "--steps=2", "--png", "--gif", "--overwrite"]
    code, _, err = call(sample, *given)
    assert (code, err) == (5, "error: sample 0 is not finite; nothing was written for it\n")
    assert (names(out), (out / "grid.png").read_bytes()) == (["grid.png"], b"mine")


@pytest.mark.parametrize("script", [sample, evaluate])
def test_fault_77_a_full_disk_leaves_no_half_of_a_file(run, call, tmp_path, script):
    """Files of more than 100 bytes cannot be written; a result that took long is told all the same."""
    out = {sample: tmp_path, evaluate: tmp_path / "a.json"}[script]
    given = [f"--workdir={run[0]}", f"--out={out}", "--num=8", "--steps=1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        code, told, err = call(script, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err) == (2, f"error: cannot write to --out={out}: File too large\n")
    assert "8/8 images" in told
    assert ("bits/dim" in told) == (script is evaluate)
    assert names(tmp_path) == []


# sample.py, which waits for a minute when the new grid is about to take the place of the old one.
SLOW = """
import os, sys, time
from ddpm_jax import errors
from ddpm_jax.commands import sample
replace = os.replace
def slow(part, path):
    if str(path).endswith("grid.png"):
        print("written by halves", flush=True)
        time.sleep(60)
    replace(part, path)
os.replace, sys.argv[0] = slow, "sample.py"
sys.exit(errors.run(sample.main))
"""


@pytest.mark.slow
def test_fault_77_killed_while_it_writes_the_grid(run, environment, tmp_path):
    """The old grid is there, whole, and whoever looks for pictures finds no other."""
    (tmp_path / "grid.png").write_bytes(b"mine")
    given = [f"--workdir={run[0]}", f"--out={tmp_path}", "--num=2", "--steps=2", "--overwrite"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *given], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert "written by halves\n" in iter(process.stdout.readline, "")
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.glob("*.png")] == ["grid.png"]
    assert len(np.load(tmp_path / "samples.npz")["images"]) == 2


# --- where a run is


def test_fault_75_the_run_its_checkpoints_or_a_step(two, monkeypatch):
    """However the place is written. `two` is a folder beside which there is nothing else."""
    monkeypatch.setenv("HOME", str(two.parent))
    home = f"~/{two.name}"
    monkeypatch.chdir(two.parent)
    for place in (two, f"{two}/", two.name, f"./{two.name}/", home, f"{home}/", f"{two}/../{two.name}"):
        for inside, step in (("", None), ("checkpoints", None), ("checkpoints/", None), ("checkpoints/3", 3)):
            run, found = experiment.find_run(os.path.join(place, inside))
            assert run.samefile(two)
            assert found == step
    monkeypatch.chdir(two / "checkpoints" / "3")
    assert experiment.find_run(".")[1] == 3
    assert experiment.find_run("..")[1] is None
    assert experiment.find_run("../..", 3) == (Path("../.."), 3)
    assert experiment.find_run(".", 3)[1] == 3
    with pytest.raises(ConfigError, match=r"--workdir=\. and --step=5 are different steps"):
        experiment.find_run(".", 5)


def test_fault_75_a_run_in_a_folder_with_an_odd_name(two, tmp_path):
    """A run in runs/checkpoints/7 is a run, not step 7 of one; links lead to where they point."""
    for name in ("checkpoints/7", "checkpoints"):
        (tmp_path / name / "checkpoints").mkdir(parents=True, exist_ok=True)
        assert experiment.find_run(tmp_path / name) == (tmp_path / name, None)
    (tmp_path / "link").symlink_to(two)
    assert experiment.find_run(tmp_path / "link" / "checkpoints" / "5") == (tmp_path / "link", 5)


@pytest.mark.parametrize("place", ["", "checkpoints/7", "two/checkpoints/x", "two/samples", "~nobody/run"])
def test_fault_75_no_run(two, tmp_path, place):
    (tmp_path / "two").symlink_to(two)
    place = place if place.startswith("~") else str(tmp_path / place)
    with pytest.raises(CheckpointError, match="there is no run in"):
        experiment.find_run(place)


@pytest.mark.slow
def test_fault_75_a_step_is_sampled_and_evaluated(two, call, tmp_path):
    """As if it were the only one of the run, whether its folder or --step names it."""
    shutil.copytree(two, tmp_path / "one", ignore=shutil.ignore_patterns("5"))
    for weights in ("ema", "raw"):
        wanted, found, newest = (
            experiment.restore(*place) for place in ((tmp_path / "one", weights), (two, weights, 3), (two, weights))
        )
        jax.tree.map(np.testing.assert_array_equal, wanted[1], found[1])
        assert (wanted[2], found[2], newest[2]) == (3, 3, 5)
    wanted = drawn(call, tmp_path / "wanted", f"--workdir={tmp_path / 'one'}", "--num=8")
    found = drawn(call, tmp_path / "found", f"--workdir={two}/checkpoints/3/", "--num=8")
    np.testing.assert_array_equal(found, wanted)
    given = [f"--workdir={two}", "--step=3", "--num=8", "--steps=1", "--metrics=mse", f"--out={tmp_path / 'a.json'}"]
    assert call(evaluate, *given)[0] == 0
    assert json.loads((tmp_path / "a.json").read_text())["checkpoint_step"] == 3


@pytest.mark.parametrize("script", [sample, evaluate])
@pytest.mark.parametrize("place", [["--workdir=TWO", "--step=77"], ["--workdir=TWO/checkpoints/77"]])
def test_a_step_that_is_absent_lists_those_that_are_there(two, call, script, place):
    code, out, err = call(script, *[word.replace("TWO", str(two)) for word in place])
    assert (code, out) == (4, "")
    assert err == f"error: there is no step 77 in {two}/checkpoints; there are 3, 5\n"


# --- what is missing or strange in a run


@pytest.mark.parametrize("script", [sample, evaluate])
def test_fault_42_no_average_in_the_checkpoint(two, call, tmp_path, script):
    """The message offers the plain parameters, with which it goes on; the other way round too."""
    for lost, other in (("params", "ema"), ("ema_params", "raw")):
        run = tmp_path / lost
        shutil.copytree(two, run)
        shutil.rmtree(run / "checkpoints" / "5" / lost)
        given = [f"--workdir={run}", "--num=8", "--steps=1", f"--out={tmp_path / 'out'}"]
        code, _, err = call(script, *given, "--weights=" + {"raw": "ema", "ema": "raw"}[other])
        assert code == 4
        assert err == f"error: {run}/checkpoints/5 has no {lost}; try --weights={other}, or another --step\n"
    assert call(script, *given, "--weights=raw")[0] == 0


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    return Canary(str(tmp_path / "canary"))


def test_fault_37_a_checkpoint_of_pickles_executes_nothing(two, tmp_path, canary):
    """Each file that sampling reads in turn holds a pickle: the step is passed over, or goes by without that file."""
    shutil.copytree(two / "checkpoints", tmp_path / "run")
    step, evil = tmp_path / "run" / "5", pickle.dumps(canary)
    files = [path for path in step.rglob("*") if path.is_file() and path.relative_to(step).parts[0] != "opt_state"]
    assert {path.name for path in files} > {"metadata", "manifest.ocdbt", "_METADATA", checkpoint.MARKER}
    for file in [path for path in files if "params" not in path.relative_to(step).parts]:
        whole = file.read_bytes()
        file.write_bytes(evil)
        with warnings.catch_warnings(record=True):
            assert checkpoint.load(tmp_path / "run", ["ema_params"])[0]["step"] in (3, 5)
        file.write_bytes(whole)
        assert not os.path.exists(canary.path), file
    pickle.loads(evil)  # the canary does sing
    assert os.path.exists(canary.path)


@pytest.mark.parametrize("kind", ["pickle", "array of objects"])
def test_fault_37_averages_of_pickles_execute_nothing(tmp_path, canary, kind):
    """An npz may hold pickles inside, and a pickle be called npz."""
    file = tmp_path / "step_000000005.npz"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(canary))
    else:
        np.savez(file, **{"crc32": np.uint32(0), "0.1/a": np.array([canary], dtype=object)})
    with pytest.warns(UserWarning, match="averages skipped"), pytest.raises(CheckpointError, match="no averages"):
        snapshots.stored(tmp_path)
    assert not os.path.exists(canary.path)


MODULES = ("sitecustomize", "usercustomize", "conftest", "__init__", "__main__", "config", "numpy", "jax", "json")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("sample.py --workdir=RUN --num=2 --steps=1", marks=pytest.mark.faults),
        pytest.param("evaluate.py --workdir=RUN --num=2 --steps=1 --metrics=mse", marks=pytest.mark.faults),
        pytest.param("-m ddpm_jax.run RUN", marks=pytest.mark.faults),
    ],
)
def test_fault_37_code_in_the_folder_of_a_run_is_not_run(two, script, tmp_path, canary, command):
    """Neither files of the names that Python looks for, nor pickles in the place of what a run writes down."""
    run = tmp_path / "run"
    shutil.copytree(two, run)
    for name in ("config.json", "run.json", "metrics.jsonl", "lock"):
        (run / name).write_bytes(pickle.dumps(canary))
    for folder in (run, run / "checkpoints", run / "checkpoints" / "5"):
        for name in MODULES:
            (folder / f"{name}.py").write_text(f"import os\nos.makedirs({canary.path!r}, exist_ok=True)\n")
    done = script(*command.replace("RUN", str(run)).split())
    assert done.returncode == 0, done.stderr
    assert not os.path.exists(canary.path)


# --- what it runs on


def test_fault_39_an_unknown_flag_of_xla_is_named(run, script):
    """XLA ends the process itself, before any code of ours is asked; its line is all that there is."""
    done = script("sample.py", f"--workdir={run[0]}", "--num=2", XLA_FLAGS="--xla_no_such_flag=1")
    assert done.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run[0] / "out").exists()


def test_fault_39_no_accelerator_where_one_was_demanded(run, script):
    """No falling back to the CPU."""
    done = script("sample.py", f"--workdir={run[0]}", "--num=2", "--platform=gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "(--platform=gpu)" in done.stderr
    assert (done.stderr.count("\n"), done.stderr[:7]) == (1, "error: ")
    assert not (run[0] / "out").exists()

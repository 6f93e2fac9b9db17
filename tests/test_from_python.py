"""The lines of the README that train and sample from Python."""

import logging
import pickle
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import experiment, options, program
from ddpm_jax.commands import sample, train
from ddpm_jax.run import checkpoint

KEEP = """
import pickle, jax
from ddpm_jax import vectors
pickle.dump((vectors.unpack(jax.device_get(state.ema_params)), samples), open("made", "wb"))
"""


@pytest.mark.slow
def test_the_lines_of_the_readme_are_train_and_sample(trained, script, environment, tmp_path):
    """With the options of a run of train.py: its averaged parameters and the images of sample.py, to the bit."""
    lines = re.search(r"## From Python\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line]) == 10
    small = options.parse(train.Args, [*SMALL, "--config.train.steps=60"], "train.py", "", configs.load).config
    changes = {name: value for name, _, value in configs.differences(configs.load("digits"), small)}
    for here, there in (('{"train.steps": 500}', repr(changes)), ("num=64, steps=100", "num=5, steps=3")):
        assert lines.count(here) == 1
        lines = lines.replace(here, there)
    command = [sys.executable, "-c", lines + KEEP]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # nor warnings of libraries that are not asked for

    params, samples = pickle.loads((tmp_path / "made").read_bytes())
    there = checkpoint.load(trained / "checkpoints", ["ema_params"])[1]["ema_params"]
    jax.tree.map(np.testing.assert_array_equal, params, there)
    options_of = [f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--num=5", "--steps=3", "--cpu-devices=1"]
    assert script("sample.py", *options_of).returncode == 0
    np.testing.assert_array_equal(samples, np.load(tmp_path / "out" / "samples.npz")["images"])
    grids = [np.asarray(Image.open(tmp_path / name)) for name in ("samples.png", "out/grid.png")]
    np.testing.assert_array_equal(*grids)


def test_a_restored_run_brings_no_warnings_of_orbax(run, caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        experiment.restore(run[0], "ema")
        assert logging.getLogger("absl").level == logging.WARNING
    assert not caplog.records


@pytest.mark.slow
def test_draw_is_sample(run, call, tmp_path):
    """With other options than its own, and labels in turn; the run was made by hand, for tiny images."""
    parts, params, _ = experiment.restore(run[0], "ema")
    options_of = ["--num=5", "--seed=3", "--sampler=ddim", "--steps=4", "--eta=0.5", "--spacing=linspace"]
    assert call(sample, f"--workdir={run[0]}", f"--out={tmp_path}", *options_of)[0] == 0
    wanted = np.load(tmp_path / "samples.npz")["images"]
    own = {"sampler": "ddim", "steps": 4, "eta": 0.5, "spacing": "linspace"}
    found = program.draw(parts, params, 5, seed=3, batch_size=3, **own)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert np.abs(found.astype(int) - program.draw(parts, params, 5, **own)).max() > 1
    assert program.draw(parts, params, 2).shape == (2, 4, 4, 1)

"""The folder of a run: whose it is, and what has changed since it was written."""

import contextlib
import dataclasses
import datetime
import json
import os
import re

import jax
import numpy as np
import pytest
from conftest import make_run

from ddpm_jax import config as configs
from ddpm_jax import experiment
from ddpm_jax.config import Config
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.run import checkpoint
from ddpm_jax.run import folder as run_folder

DATA = "11x4x4x1-00000000"


@pytest.fixture
def begun(tmp_path):
    """(folder, Experiment, template) of a run with the steps 5 and 10, as train.py writes them."""
    _, parts, _, _ = make_run(tmp_path, steps=())
    template = jax.eval_shape(parts.init_state)
    entries = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "data": DATA}
    entries |= {"devices": run_folder.parallel.describe(), "rollbacks": 0, "window": []}
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        for step in (5, 10):
            state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
            checkpoint.save(manager, state._replace(step=np.int32(step)), **entries)
        checkpoint.finish(manager)
    run_folder.record(tmp_path, parts.config)
    return tmp_path, parts, template


@pytest.mark.parametrize(
    ("name", "value"),
    [("train.batch_size", 64), ("train.seed", 7), ("data.source", "digits"), ("diffusion.T", 500)],
)
def test_fault_14_a_change_is_refused_unless_allowed_by_name(begun, name, value):
    folder, parts, _ = begun
    config = configs.replace(parts.config, {name: value})
    with pytest.raises(ConfigError, match=f"{name} is .* there, .*{value}.* here.*--allow-change={name}"):
        run_folder.check(folder, config)
    with pytest.raises(ConfigError, match=f"{name} is"):
        run_folder.check(folder, config, ("train.learning_rate",))
    with pytest.warns(UserWarning, match=f"continuing as another experiment: {name} is"):
        run_folder.check(folder, config, (name,))


def test_fault_14_what_only_says_how_often_may_change(begun):
    folder, parts, _ = begun
    changes = {name: 3 for name in configs.MAY_CHANGE if isinstance(getattr(parts.config.train, name[6:], None), int)}
    changes |= {"train.watchdog_abort": True, "train.on_nan": "rollback", "train.evaluate_num": 30}
    assert len(changes) > 10
    run_folder.check(folder, configs.replace(parts.config, changes))


def decaying(parts, **changes):
    changes = {"warmup_steps": 2, "steps": 50} | changes
    return configs.replace(parts.config, {f"train.{name}": value for name, value in changes.items()})


def test_the_steps_may_change_until_the_learning_rate_decays(begun):
    """The run has a checkpoint of step 10: what was computed until there is what the new number would compute."""
    folder, parts, _ = begun
    for decay, then, now, step, fits in (
        ("constant", 10, 50, 0, True),
        ("linear", 50, 100, 0, False),
        ("cosine", 50, 40, 0, False),
        ("wsd", 13, 26, 0, True),  # from step 10 on
        ("wsd", 26, 11, 0, False),
        ("wsd", 11, 26, 0, False),
        ("wsd", 11, 26, 5, True),
    ):
        run_folder.record(folder, decaying(parts, decay=decay, steps=then))
        config = decaying(parts, decay=decay, steps=now)
        refused = f"train.steps is {then} there, {now} here, and the learning rate decays from step"
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=refused):
            run_folder.check(folder, config, step=step)
        with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="continuing as another experiment"):
            run_folder.check(folder, config, ("train.steps",), step)


def test_a_run_of_a_constant_learning_rate_may_end_by_a_decay(begun):
    folder, parts, _ = begun
    run_folder.record(folder, decaying(parts, steps=10))
    for steps, fits in ((15, True), (11, False)):  # which decays from step 12 or 9 on
        config = decaying(parts, decay="wsd", steps=steps, decay_fraction=0.2)
        with (
            pytest.warns(UserWarning, match="decay")
            if fits
            else pytest.raises(ConfigError, match=r"train\.steps is 10")
        ):
            run_folder.check(folder, config, ("train.decay",))


def test_a_field_that_is_not_there_cannot_be_allowed(begun):
    folder, parts, _ = begun
    with pytest.raises(ConfigError, match=r"lr is no field of the config; did you mean train\.learning_rate\?"):
        run_folder.check(folder, parts.config, ("train.lr",))


def test_fault_14_other_data_are_refused_unless_allowed(begun):
    folder, parts, template = begun
    with pytest.raises(ConfigError, match=f"the run had {DATA}, the data now are 12x4x4x1-1: its batches would"):
        run_folder.resume(parts, template, "12x4x4x1-1", folder)
    state, _, lines = run_folder.resume(parts, template, "12x4x4x1-1", folder, allowed=("data.source",))
    assert state.step == 10
    assert f"continuing with other data: the run had {DATA}, the data now are 12x4x4x1-1" in lines


def test_fault_15_starts_in_one_second_and_a_clock_that_jumps(begun, monkeypatch):
    """Each start is written down, in order; no file is called after the time."""
    folder, parts, _ = begun

    class Jumping(datetime.datetime):
        hours = iter((5, 5, 2))

        @classmethod
        def now(cls, zone):
            return cls(2020, 1, 1, next(cls.hours), tzinfo=zone)

    monkeypatch.setattr(run_folder, "datetime", Jumping)
    before = sorted(os.listdir(folder))
    for _ in range(3):
        run_folder.record(folder, parts.config)
    times = [start["time"] for start in json.loads((folder / "run.json").read_text())]
    assert times[1:] == [f"2020-01-01T{hour:02}:00:00+00:00" for hour in (5, 5, 2)]
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("name", ["jax", "jax_default_prng_impl", "jax_threefry_partitionable"])
def test_fault_27_other_versions_are_told(begun, monkeypatch, name):
    folder, parts, template = begun
    now = checkpoint.versions()
    assert not [line for line in run_folder.resume(parts, template, DATA, folder)[2] if "exact" in line]
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {name: "other"})
    (line,) = [line for line in run_folder.resume(parts, template, DATA, folder)[2] if "exact" in line]
    assert line == f"not bit-exact from here on, only to rounding: {name} {now[name]} is now other"


def test_fault_40_another_network_is_refused_with_the_key_that_differs(begun):
    """Also when the change was allowed; nothing of the run is changed by the attempt."""
    folder, parts, _ = begun
    wide = experiment.make(configs.replace(parts.config, {"model.channels": 8}), parts.shape)
    template = jax.eval_shape(wide.init_state)
    with pytest.raises(
        CheckpointError, match=r"conv_in.*and .* more; of the config, model/channels is 4 there, 8 here"
    ):
        run_folder.resume(wide, template, DATA, folder, step=5, allowed=("model.channels",))
    assert checkpoint.steps(folder / "checkpoints") == [5, 10]


def test_fault_41_images_of_another_size_are_told(begun):
    """The same parameters fit; the change of data.image_size has been allowed by name before."""
    folder, parts, template = begun
    larger = experiment.make(parts.config, (8, 8, 1))
    _, _, lines = run_folder.resume(larger, template, DATA, folder)
    assert "continuing with images of another size: [4, 4, 1] is now [8, 8, 1]" in lines


def test_a_step_to_go_on_from(begun):
    """Later ones are set aside, not lost."""
    folder, parts, template = begun
    state, _, _ = run_folder.resume(parts, template, DATA, folder, step=5)
    assert state.step == 5
    assert sorted(os.listdir(folder / "checkpoints")) == ["10.aside", "5"]


@pytest.mark.parametrize("letter", ["*", "?", "[", "]", "\\"])
def test_a_path_from_which_orbax_cannot_read_is_refused(tmp_path, letter):
    with pytest.raises(ConfigError, match=f"a path with {re.escape(letter)}"):
        run_folder.create_and_lock(tmp_path / f"a{letter}b" / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_does_not_see(tmp_path):
    with pytest.raises(ConfigError, match="is not the same folder for all processes"):
        run_folder.check_shared(tmp_path / "run")
    run_folder.create_and_lock(tmp_path / "run").close()
    run_folder.check_shared(tmp_path / "run")


def test_checkpoints_without_a_config_are_left_alone(begun):
    folder, parts, _ = begun
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints but no config\.json"):
        run_folder.check(folder, parts.config)
    run_folder.check(folder / "elsewhere", Config())

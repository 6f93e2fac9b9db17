"""Checkpoints under damage: what is restored is exactly what was saved, or an older step, or a reason."""

import fcntl
import json
import os
import random
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import __version__, parallel, training
from ddpm_jax.errors import CheckpointError, ConfigError, Diverged
from ddpm_jax.run import __main__ as listing
from ddpm_jax.run import checkpoint, trees


def state_at(step):
    """A TrainState with an Adam state, different at each step."""
    params = {"block": {"kernel": jnp.full((64, 32), step, jnp.float32), "bias": jnp.arange(7.0) + step}}
    state = training.init_state(params, training.make_optimizer(1e-3, 1.0))
    return state._replace(step=jnp.int32(step), skipped=jnp.int32(2))


TEMPLATE = jax.eval_shape(lambda: state_at(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with checkpoint.open_manager(folder, keep=3) as manager:
        for step in (5, 10, 20, 30):
            meta = {"config": {"model": {"channels": 32, "groups": 4}}, "shape": (8, 8, 1)}
            checkpoint.save(manager, state_at(step), window=[{"loss": float("nan")}], **meta)
        checkpoint.finish(manager)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored_step(folder):
    """The step that is restored, after a check that its arrays are exactly those saved."""
    state, meta = checkpoint.restore_state(folder, TEMPLATE)
    wanted = state_at(meta["step"])
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    return meta["step"]


def test_the_newest_step_comes_back_exactly(folder):
    assert checkpoint.steps(folder) == [10, 20, 30]
    assert restored_step(folder) == 30


def test_a_replicated_state_is_saved_once(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, parallel.replicate(state_at(3)))
        checkpoint.finish(manager)
    assert restored_step(tmp_path) == 3


def test_only_the_items_asked_for_are_read(folder):
    for step in (10, 20, 30):
        shutil.rmtree(folder / str(step) / "opt_state")
    meta, trees = checkpoint.load(folder, ["ema_params"])
    assert (meta["step"], list(trees)) == (30, ["ema_params"])


def data_files(folder):
    return [path for path in (folder / "30").glob("*/d/*") if path.is_file()]


def test_fault_17_every_flipped_bit_in_array_data_is_found(folder):
    """40 of 40: the step before is taken, and the warning names the item."""
    chance = random.Random(0)
    for _ in range(40):
        path = chance.choice(data_files(folder))
        whole = path.read_bytes()
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="skipped, step 30"):
            assert restored_step(folder) == 20
        path.write_bytes(whole)
    assert restored_step(folder) == 30


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def edit_meta(path):
    text = path.read_text()
    assert '"step": 30' in text
    path.write_text(text.replace('"step": 30', '"step": 31'))


DAMAGES = {
    "array data cut": lambda folder: [truncate(path) for path in data_files(folder)],
    "array data gone": lambda folder: [path.unlink() for path in data_files(folder)],
    "item gone": lambda folder: shutil.rmtree(folder / "30" / "params"),
    "manifest empty": lambda folder: (folder / "30" / "ema_params" / "manifest.ocdbt").write_bytes(b""),
    "meta gone": lambda folder: shutil.rmtree(folder / "30" / "meta"),
    "meta not JSON": lambda folder: (folder / "30" / "meta" / "metadata").write_text("{"),
    "meta edited": lambda folder: edit_meta(folder / "30" / "meta" / "metadata"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_16_a_damaged_step_gives_way_to_the_one_before(folder, damage):
    DAMAGES[damage](folder)
    with pytest.warns(UserWarning, match="damaged checkpoint skipped, step 30"):
        assert restored_step(folder) == 20


def test_fault_20_a_step_without_its_marker_is_ignored(folder):
    (folder / "30" / checkpoint.MARKER).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restored_step(folder) == 20


def test_fault_19_foreign_names_are_ignored(folder):
    """Those that a save left unfinished are gone after the next one."""
    (folder / "40").mkdir()
    (folder / "50").write_text("no folder")
    (folder / "60.orbax-checkpoint-tmp").mkdir()
    (folder / "notes").mkdir()
    assert checkpoint.steps(folder) == [10, 20, 30]
    assert restored_step(folder) == 30
    with checkpoint.open_manager(folder, keep=3) as manager:
        checkpoint.save(manager, state_at(35))
        checkpoint.finish(manager)
    assert checkpoint.steps(folder) == [20, 30, 35]
    assert sorted(os.listdir(folder)) == ["20", "30", "35", "50", "deleted", "notes"]


def test_fault_18_when_all_are_bad_each_is_named(folder):
    for step in (10, 20, 30):
        shutil.rmtree(folder / str(step) / "params")
    with pytest.warns(UserWarning, match="damaged checkpoint skipped"), pytest.raises(CheckpointError) as caught:
        restored_step(folder)
    assert all(f"step {step}: " in str(caught.value) for step in (10, 20, 30))


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path, ["params"])


def test_fault_40_another_model_is_refused_by_name_before_anything_is_read(folder, monkeypatch):
    other = TEMPLATE._replace(params={"block": {"kernel": jnp.zeros((64, 16))}, "more": jnp.zeros(3)})
    monkeypatch.setattr(checkpoint, "_restore", lambda *args: pytest.fail("array data were read"))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore_state(folder, other, config={"model": {"channels": 16, "groups": 4}})
    message = str(caught.value)
    assert "params/block/kernel: float32[64, 32] there, float32[64, 16] in the model" in message
    assert "params/block/bias: float32[7] there, missing in the model" in message
    assert "params/more: missing there, float32[3] in the model" in message
    assert message.endswith("of the config, model/channels is 32 there, 16 here")


def test_fault_43_another_type_is_refused_by_name(folder):
    half = TEMPLATE._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state_at(0).params))
    with pytest.raises(CheckpointError, match=r"kernel: float32\[64, 32\] there, bfloat16\[64, 32\] in the model"):
        checkpoint.restore_state(folder, half)


def test_fault_21_a_step_that_is_not_there(folder):
    with pytest.raises(CheckpointError, match=r"there is no step 77 in .*; there are 10, 20, 30"):
        checkpoint.restore_state(folder, TEMPLATE, step=77)


def test_a_step_that_is_asked_for_is_taken_or_refused(folder):
    """No other step takes its place."""
    state, meta = checkpoint.restore_state(folder, TEMPLATE, step=20)
    assert (meta["step"], state.params["block"]["kernel"][0, 0]) == (20, 20)
    shutil.rmtree(folder / "20" / "params")
    with pytest.raises(CheckpointError, match="step 20: it has no params"):
        checkpoint.restore_state(folder, TEMPLATE, step=20)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("item", ["params", "ema_params", "opt_state"])
def test_fault_25_what_is_not_finite_is_not_saved(folder, item, bad):
    """The array is named; the steps that are there stay."""
    state = state_at(40)
    leaves, structure = jax.tree.flatten(getattr(state, item))
    leaves[-1] = leaves[-1].at[(3,) * leaves[-1].ndim].set(bad)
    state = state._replace(**{item: jax.tree.unflatten(structure, leaves)})
    with (
        checkpoint.open_manager(folder, keep=3) as manager,
        pytest.raises(Diverged, match=rf"step 40 was not saved: {item}/.*kernel is not finite \(one of 1"),
    ):
        checkpoint.save(manager, state)
    assert restored_step(folder) == 30


def save_all(manager, there, saved, keep, every):
    """Save these steps; those that ought to be there then: the newest, and for good the multiples of `every`."""
    with manager:
        for step in saved:
            checkpoint.save(manager, state_at(step))
            there = [*there, step]
            newest = there if keep is None else there[-keep:]
            there = [found for found in there if found in newest or (every and found % every == 0)]
        checkpoint.finish(manager)
    assert checkpoint.steps(manager.directory) == there
    return there


def old_manager(folder, **options):
    """Orbax's manager with the options that runs had before there were policies."""
    handlers = {name: checkpoint.ocp.PyTreeCheckpointHandler() for name in checkpoint.ARRAYS}
    commit = checkpoint.ocp.options.AtomicityOptions(mode=checkpoint.ocp.options.AtomicityMode.COMMIT_FILE)
    options = checkpoint.ocp.CheckpointManagerOptions(todelete_subdir="deleted", atomicity_options=commit, **options)
    handlers["meta"] = checkpoint.ocp.JsonCheckpointHandler()
    return checkpoint.ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def test_the_newest_are_kept_and_every_mth(tmp_path):
    """Also in the folder of an older run, after resuming with other settings, rolling back, and setting aside."""

    def save(there, saved, keep, every):
        return save_all(checkpoint.open_manager(tmp_path, keep, every), there, saved, keep, every)

    there = save_all(old_manager(tmp_path, max_to_keep=2, keep_period=20), [], range(5, 50, 5), 2, 20)
    assert there == [20, 40, 45]
    there = save(there, (50, 55, 60), 2, 20)
    assert there == [20, 40, 55, 60]
    checkpoint.set_aside(tmp_path, 40)
    aside = sorted(path.name for path in tmp_path.glob("*.aside"))
    assert aside == ["55.aside", "60.aside"]
    there = save([20, 40], (45, 50), 1, 50)  # with another period 20 and 40 are no longer for good
    assert there == [50]
    there = save(there, (55, 60, 65), 2, 0)
    assert there == [60, 65]
    assert save(there, (70, 75), None, 0) == [60, 65, 70, 75]
    assert sorted(path.name for path in tmp_path.glob("*.aside")) == aside


def test_at_most_ten_differences_are_named(folder):
    other = TEMPLATE._replace(params={f"layer_{i}": jnp.zeros(1) for i in range(20)})
    with pytest.raises(CheckpointError, match="and 12 more") as caught:
        checkpoint.restore_state(folder, other)
    assert str(caught.value).count("in the model") == 10


@pytest.mark.parametrize("own", [1, 3])
def test_fault_26_another_format_is_refused(folder, monkeypatch, own):
    monkeypatch.setattr(checkpoint, "FORMAT", own)
    monkeypatch.setattr(checkpoint, "__version__", "9.9")
    told = f"has format 2; ddpm_jax 9.9 reads format {own}; use ddpm_jax {re.escape(__version__)}"
    with pytest.raises(CheckpointError, match=told):
        restored_step(folder)


def test_fault_23_a_full_disk_is_told_before_writing(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        checkpoint.open_manager(folder, keep=3) as manager,
        pytest.raises(CheckpointError, match=r"step 40 was not saved: it needs 0\.0 MB .* 0\.0 MB free"),
    ):
        checkpoint.save(manager, state_at(40))
    assert restored_step(folder) == 30


def test_failures_are_borne_until_the_fourth_in_a_row(folder, monkeypatch):
    """Two failures, a good save, three more are warnings; the next one without a good one between ends the run."""
    with checkpoint.open_manager(folder, keep=3) as manager:
        keep = checkpoint.make_saver(manager)
        usage = shutil.disk_usage(folder)

        for step, fails in [(40, True), (50, True), (60, False), (70, True), (80, True), (85, True)]:
            with pytest.MonkeyPatch.context() as patch:
                if fails:
                    patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
                    with pytest.warns(UserWarning, match=f"step {step} was not saved.*training goes on"):
                        keep(state_at(step))
                else:
                    keep(state_at(step))
                    checkpoint.finish(manager)
                    keep()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        with pytest.raises(CheckpointError, match="step 90 was not saved"):
            keep(state_at(90))
    assert restored_step(folder) == 60


def test_a_failure_of_the_last_save_is_raised_at_once(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with checkpoint.open_manager(folder) as manager, pytest.raises(CheckpointError, match="step 40 was not saved"):
        checkpoint.make_saver(manager)(state_at(40), last=True)


def test_leftovers_are_told_and_deleted_when_asked(folder, capsys):
    """Not while a run is writing there."""
    (folder / "40").mkdir()
    checkpoint.set_aside(folder, 20)
    assert listing.main([folder.parent]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[3:]] == ["30.aside,", "40,"]
    clean = [folder.parent, "--clean"]
    with open(folder.parent / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by another run"):
            listing.main(clean)
    assert listing.main(clean) == 0
    assert sorted(os.listdir(folder)) == ["10", "20", "deleted"]
    assert restored_step(folder) == 20


def test_damaged_steps_are_set_aside_so_that_saving_goes_on(folder):
    """Orbax takes no step before its newest; after a fall back to 20 the next save must not have to wait for 31."""
    shutil.rmtree(folder / "30" / "params")
    with pytest.warns(UserWarning, match="skipped, step 30"):
        assert restored_step(folder) == 20
    checkpoint.set_aside(folder, 20)
    assert checkpoint.steps(folder) == [10, 20]
    with checkpoint.open_manager(folder, keep=3) as manager:
        checkpoint.save(manager, state_at(25))
        checkpoint.finish(manager)
    assert restored_step(folder) == 25


def test_an_older_step_is_refused_aloud(folder):
    with (
        checkpoint.open_manager(folder, keep=3) as manager,
        pytest.raises(CheckpointError, match=r"step 25 was not saved.*already holds step 30"),
    ):
        checkpoint.save(manager, state_at(25))


def test_meta_is_plain_json(folder):
    meta = json.loads((folder / "30" / "meta" / "metadata").read_text())
    assert (meta["step"], meta["skipped"], meta["shape"]) == (30, 2, [8, 8, 1])
    assert meta["versions"]["jax"] == jax.__version__


def test_digest_minds_names_shapes_and_types():
    others = [{"a": np.zeros(4)}, {"b": np.zeros(4)}, {"a": np.zeros((2, 2))}, {"a": np.zeros(8, np.float32)}]
    assert len({trees.digest(tree) for tree in others}) == 4
    assert trees.digest({"a": np.zeros(4), "b": np.ones(2)}) == trees.digest({"b": np.ones(2), "a": np.zeros(4)})


def test_reading_leaves_the_folder_as_it_is(folder):
    (folder / "40").mkdir()
    before = sorted(os.listdir(folder))
    checkpoint.load(folder, ["params"])
    assert sorted(os.listdir(folder)) == before


def test_the_list_of_steps_tells_whole_from_damaged(folder, capsys):
    assert listing.main([folder.parent]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:3]] == ["10", "20", "30"]
    largest = max(data_files(folder), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the newest checkpoint in .* cannot be used: "):
        listing.main([folder.parent])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("MB")[1].split()[0] for line in lines[:3]] == ["intact", "intact", "DAMAGED:"]
    assert lines[3].startswith("newest intact: step 20, skipped 2,")
    with pytest.raises(CheckpointError, match="there is no run in"):
        listing.main([folder / "nowhere"])

"""What chooses and names images: links, splits, ranges, frames, classes; and the same data in another place."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import levels, make_run, paint, small_experiment
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import experiment
from ddpm_jax.commands import evaluate
from ddpm_jax.data import Dataset, fingerprint, load, match_labels_to_run, reorder_classes
from ddpm_jax.data import __main__ as describe
from ddpm_jax.data.intake import read, read_frames
from ddpm_jax.errors import ConfigError, DataError
from ddpm_jax.run import checkpoint
from ddpm_jax.run import folder as run_folder


def painted(folder, **pictures):
    """Pictures of one level by their paths, __ for a slash."""
    for name, level in pictures.items():
        path = folder / (name.replace("__", "/") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(path, level)


# --- links


def test_fault_78_linked_class_folders_and_files(album, tmp_path):
    """A link back to a folder above ends; one to a folder beside is gone into; one to nothing is counted."""
    folder, load_album = album
    painted(tmp_path, elsewhere__1=1, elsewhere__deeper__2=2, alone=4)
    painted(folder, dog__3=3)
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "4.png").symlink_to(tmp_path / "alone.png")
    (folder / "dog" / "back").symlink_to(folder)
    dataset = load_album(max_unreadable=0)
    assert (levels(dataset), dataset.labels.tolist()) == ([1, 2, 3, 4], [0, 0, 1, 1])
    (folder / "eel").symlink_to(tmp_path / "not mounted")
    with pytest.warns(UserWarning, match=r"1 of 5 pictures cannot be read: .*album/eel \(.*No such file"):
        assert load_album(max_unreadable=0.5).labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="max_unreadable=0 "):
        load_album(max_unreadable=0)


# --- splits and fields that a source does not use


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_fault_79_a_split_of_a_folder(album, capsys, validation):
    folder, load_album = album
    painted(folder, train__a__1=1, train__b__2=2, test__a__3=3)
    painted(folder / validation, b__4=4)
    train = load_album()
    assert (levels(train), train.labels.tolist(), train.classes) == ([1, 2], [0, 1], ("a", "b"))
    assert f"split train of test, train, {validation}; data.split=all" in capsys.readouterr().out
    assert levels(load_album(split="test")) == [3]
    assert levels(load_album(split="validation")) == [4]
    assert load_album(split="all").classes == ("test", "train", validation)
    with pytest.raises(DataError, match=r"no subfolder for data\.split=banana; it has test, train"):
        load_album(split="banana")


def test_fault_79_classes_that_are_called_like_a_split(album):
    """One split's name among others is a class, as a train is among vehicles."""
    folder, load_album = album
    painted(folder, car__1=1, train__2=2)
    assert load_album().labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"data\.split=banana"):
        load_album(split="banana")


@pytest.mark.parametrize(("name", "value"), [("split", "banana"), ("range", (0.0, 9.0)), ("frames", "all")])
def test_fault_79_a_field_that_npz_has_no_use_for(tmp_path, name, value):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(DataError, match=f"data.{name}=.* does not apply to data.source=npz:"):
        load(f"npz:{tmp_path / 'a.npz'}", **{name: value})


def test_a_field_that_changes_nothing_is_told(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8))
    load(f"npz:{tmp_path / 'a.npz'}", max_unreadable=0.0)
    assert "data.max_unreadable=0.0 has no effect with" in capsys.readouterr().out


# --- values of more than 8 bits


def deep(path, *values):
    """A 16-bit picture whose columns of 8x8 pixels have these values."""
    Image.fromarray(np.uint16(values)[None].repeat(8, 0).repeat(8, 1)).save(path)


def columns(dataset):
    return dataset.images[:, 4, 4::8, 0].tolist()


def test_fault_80_a_range_of_the_whole_set(album):
    """12 bits: 4095 becomes white and 2048 the middle, 2048 / 4095 * 255 = 127.53, in the darker file too."""
    folder, load_album = album
    deep(folder / "a.png", 0, 4095)
    deep(folder / "b.png", 2048, 1024)
    with pytest.warns(UserWarning, match=r"from 0 to 4,095, but 0 becomes black and 65,535 white: at most 17 of 256"):
        assert columns(load_album(image_size=(8, 16))) == [[0, 16], [8, 4]]
    for _ in range(2):  # decoded, then mapped
        assert columns(load_album(image_size=(8, 16), range=(0.0, 4095.0))) == [[0, 255], [128, 64]]
    with pytest.warns(UserWarning, match=r"0 becomes black and 2,048 white by data.range: those outside are clipped"):
        assert columns(load_album(image_size=(8, 16), range=(0.0, 2048.0))) == [[0, 255], [255, 128]]
    with pytest.warns(UserWarning, match="at most 17 of 256"):  # also from the map
        load_album(image_size=(8, 16))


def test_fault_80_a_range_where_it_has_no_meaning(album):
    folder, load_album = album
    painted(folder, a=3)
    with pytest.raises(DataError, match=r"a\.png \(8 bits per value, but data\.range is for more\)"):
        load_album(range=(0.0, 4095.0))
    for text in ("9,1", "1", "1,1"):
        with pytest.raises(ConfigError, match=r"data\.range=.* must be two increasing numbers"):
            configs.Data(range=tuple(map(float, text.split(","))))


def test_fault_80_floats_with_a_range(tmp_path):
    Image.fromarray(np.float32([[-1, 0, 1]])).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif", (), 1, (-1, 1)).ravel().tolist() == [0, 128, 255]
    Image.fromarray(np.float32([[-1, np.nan, 1]])).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="not finite"):
        read(tmp_path / "a.tif", (), 1, (-1, 1))


# --- shapes


def test_fault_81_long_pictures_that_are_asked_for(tmp_path):
    """A spectrogram of 1024x16 is kept whole; 65 squares of it would each be a 64th."""
    Image.fromarray(np.arange(16, dtype=np.uint8)[:, None].repeat(1024, 1)).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png", (16, 1024), 1)
    np.testing.assert_array_equal(found[:, 500, 0], np.arange(16))
    assert read(tmp_path / "a.png", (8, 512), 1).shape == (8, 512, 1)
    for other in ((16, 16), (1024, 16)):
        with pytest.raises(ValueError, match="1024x16 is too long"):
            read(tmp_path / "a.png", other, 1)


# --- frames


@pytest.mark.parametrize(
    ("name", "options"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {})]
)
def test_fault_82_all_frames_of_a_file(album, capsys, name, options):
    folder, load_album = album
    (folder / "x").mkdir()
    frames = [Image.new("RGB", (8, 8), (10 * i,) * 3) for i in range(5)]
    frames[0].save(folder / "x" / name, save_all=True, append_images=frames[1:], **options)
    painted(folder, y__b=77)
    for _ in range(2):  # decoded, then mapped
        assert levels(load_album()) == [0, 77]
        assert "4 further frames of 1 files are left out; data.frames=all" in capsys.readouterr().out
    every = load_album(frames="all")
    assert levels(every) == [0, 10, 20, 30, 40, 77]
    assert every.labels.tolist() == [0] * 5 + [1]
    assert "left out" not in capsys.readouterr().out


def test_fault_82_a_bomb_of_frames(tmp_path, monkeypatch):
    frames = [Image.new("L", (8, 8), i) for i in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr("ddpm_jax.data.intake.MAX_PIXELS_OF_FRAMES", 4 * 64)
    with pytest.raises(ValueError, match="its frames have more than 256 pixels"):
        read_frames(tmp_path / "a.gif", (8, 8), 1, every=True)
    assert read_frames(tmp_path / "a.gif", (8, 8), 1).left_out == 4


# --- classes


def test_fault_83_classes_in_natural_order(album, call, tmp_path):
    folder, load_album = album
    for i in range(12):
        painted(folder / str(i), a=i)
    dataset = load_album()
    assert dict(zip(levels(dataset), dataset.labels.tolist(), strict=True)) == {i: i for i in range(12)}
    (folder / "11").rename(folder / "b2")
    (folder / "10").rename(folder / "b10")
    assert load_album().classes == (*map(str, range(10)), "b2", "b10")
    said = call(describe, f"folder:{folder}", "--image-size=8", f"--cache-dir={tmp_path}")[1]
    assert "9 '9', 10 'b2', 11 'b10'" in said


def test_fault_83_an_older_run_keeps_its_order(album):
    """From before names were kept: 0, 1, 10, 11, 2 and so on, in which its fingerprint has them."""
    folder, load_album = album
    for i in range(12):
        painted(folder / str(i), a=i)
    new = load_album()
    old = match_labels_to_run(new, f"folder:{folder}", "12x8x8x3-00000000", None)
    assert old.classes[:4] == ("0", "1", "10", "11")
    assert [old.classes[label] for label in old.labels] == [new.classes[label] for label in new.labels]
    assert old.labels.tolist() == list(range(12))  # the files too are in byte order
    assert match_labels_to_run(old, f"folder:{folder}", "other", new.classes).labels.tolist() == new.labels.tolist()
    assert match_labels_to_run(new, "tfds:x", "other", None).classes == new.classes


def test_labels_in_another_order_name_the_same_classes():
    dataset = Dataset(np.zeros((4, 1, 1, 1), np.uint8), np.array([2, 0, 1, 2]), ("a", "b", "c"))
    assert reorder_classes(dataset, ["c", "a", "b"]).labels.tolist() == [0, 1, 2, 0]
    assert reorder_classes(dataset, ["c", "a"]) == dataset


def test_fault_83_a_label_by_its_name():
    parts = small_experiment({"num_classes": 3})._replace(classes=("cat", "dog", "7"))
    assert [experiment.find_label(parts, text) for text in ("cat", "1", "name:7")] == [0, 1, 2]
    for text, fragment in (
        ("dogg", "did you mean dog"),
        ("3", "labels 0 to 2"),
        ("7", "labels 0 to 2"),
        ("name:2", "has the classes cat, dog, 7"),
    ):
        with pytest.raises(ConfigError, match=fragment):
            experiment.find_label(parts, text)
    with pytest.raises(ConfigError, match="the number of class '2' and the name of class number 0"):
        experiment.find_label(parts._replace(classes=("1", "2", "3")), "1")
    with pytest.raises(ConfigError, match="has no class names"):
        experiment.find_label(parts._replace(classes=None), "cat")


# --- the same data in another place


@pytest.fixture
def moved(tmp_path):
    """(folder, Experiment, new config) of a run whose data.npz has become folder/there.npz, named in the config."""
    _, parts, _, _ = make_run(tmp_path, steps=(), model={"num_classes": 3})
    parts = parts._replace(classes=("a", "b", "c"))
    entries = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "classes": parts.classes}
    entries |= {"data": fingerprint(load(parts.config.data.source)), "devices": "", "rollbacks": 0, "window": []}
    template = jax.eval_shape(parts.init_state)
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
        checkpoint.save(manager, state._replace(step=np.int32(5)), **entries)
        checkpoint.finish(manager)
    run_folder.record(tmp_path, parts.config)
    shutil.move(tmp_path / "data.npz", tmp_path / "there.npz")
    config = configs.replace(parts.config, {"data.source": f"npz:{tmp_path / 'there.npz'}"})
    return tmp_path, parts._replace(config=config), template


def test_fault_84_training_goes_on_with_moved_data(moved):
    folder, parts, template = moved
    run_folder.check(folder, parts.config)
    data = fingerprint(load(parts.config.data.source))
    lines = run_folder.resume(parts, template, data, folder)[2]
    assert any("the same data by their fingerprint: data.source was npz:" in line for line in lines)
    with pytest.raises(ConfigError, match=r"the data now are 1x2; data.source was npz:.*there\.npz"):
        run_folder.resume(parts, template, "1x2", folder)


@pytest.mark.slow
def test_fault_84_evaluation_is_told_the_new_place(moved, call):
    folder, _, _ = moved
    options = [f"--workdir={folder}", "--num=8", "--steps=1", "--metrics=mse", "--overwrite"]
    assert call(evaluate, *options)[0] == 3
    there = f"--data=npz:{folder / 'there.npz'}"
    assert call(evaluate, *options, there)[::2] == (0, "")
    arrays = dict(np.load(folder / "there.npz"))
    np.savez(folder / "there.npz", **arrays | {"images": 255 - arrays["images"]})
    code, _, said = call(evaluate, *options, there)
    assert code == 2
    assert "is not the data of the run" in said
    assert call(evaluate, *options, there, "--other-data")[0] == 0
    assert json.loads((folder / "evaluation.json").read_text())["config"]["data"]["source"] == there[7:]
    assert experiment.restore(folder, "ema")[0].classes == ("a", "b", "c")

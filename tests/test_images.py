"""Levels, grids and the files written, read back by Pillow."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.diffusion import to_uint8, to_unit
from ddpm_jax.images import grid, save_gif, save_png
from ddpm_jax.run.files import write_atomic


def noise(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, np.uint8)


# --- levels


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    unit = to_unit(levels)
    assert unit.dtype == np.float32
    assert (unit[0], unit[255]) == (-1, 1)
    assert np.ptp(np.diff(unit)) < 1e-6  # equal steps
    np.testing.assert_array_equal(to_uint8(unit), levels)


@pytest.mark.parametrize(
    ("level", "rounded"), [(254.9, 255), (254.6, 255), (254.4, 254), (127.6, 128), (127.4, 127), (0.6, 1), (0.4, 0)]
)
def test_rounding_is_to_the_nearest_level(level, rounded):
    assert to_uint8(np.float32(2 * level / 255 - 1)) == rounded


@pytest.mark.parametrize(
    ("x", "level"), [(1.004, 255), (1.1, 255), (3.01, 255), (300, 255), (np.inf, 255), (-1.1, 0), (-3, 0), (-np.inf, 0)]
)
def test_values_outside_are_clipped_not_wrapped(x, level):
    found = to_uint8(np.float32(x))
    assert found.dtype == np.uint8
    assert found == level


# --- grids


@pytest.mark.parametrize(
    ("images", "columns", "gap", "rows", "across", "zoom"),
    [
        (noise(5, 8, 8, 1), None, 2, 2, 3, 8),
        (noise(9, 8, 8, 3), None, 2, 3, 3, 8),
        (noise(3, 32, 32, 3), 3, 2, 1, 3, 2),
        (noise(7, 20, 40, 1), 2, 1, 4, 2, 1),
        (noise(2, 100, 70, 3), 1, 0, 2, 1, 1),
        (noise(1, 64, 64, 1), None, 2, 1, 1, 1),
    ],
)
def test_grid(images, columns, gap, rows, across, zoom):
    """Image i enlarged at row i // across and column i % across, everything else white."""
    images = images // 2  # so that no image has white in it
    _, height, width, channels = images.shape
    page = grid(images, columns, gap)
    high, wide = height * zoom, width * zoom
    assert page.dtype == np.uint8
    assert page.shape == (rows * (high + gap) + gap, across * (wide + gap) + gap, channels)
    rest = page.copy()
    for i, image in enumerate(images):
        top, left = gap + i // across * (high + gap), gap + i % across * (wide + gap)
        place = np.s_[top : top + high, left : left + wide]
        np.testing.assert_array_equal(page[place], np.kron(image, np.ones((zoom, zoom, 1), np.uint8)))
        rest[place] = 255
    assert (rest == 255).all()


# --- files


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(tmp_path, channels):
    image = noise(6, 9, channels)
    save_png(tmp_path / "new" / "a.png", image)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", {1: "L", 3: "RGB"}[channels])
        np.testing.assert_array_equal(np.asarray(picture).reshape(image.shape), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_holds_the_frames(tmp_path, channels):
    """Each frame once, endless, 1 s in all and the last one 0.5 s more."""
    frames = noise(5, 8, 8, channels)
    save_gif(tmp_path / "a.gif", frames, seconds=1, hold=0.5)
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 5, 0)
        durations = []
        for i, frame in enumerate(frames):
            picture.seek(i)
            durations.append(picture.info["duration"])
            found = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(frame.shape)
            np.testing.assert_array_equal(found, frame)
    assert durations == [200, 200, 200, 200, 700]


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, b"old")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_atomic_that_fails_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_is_seen_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    path.write_bytes(b"old")
    fsync = os.fsync

    def look(file):
        seen.append(path.read_bytes())
        fsync(file)

    monkeypatch.setattr(os, "fsync", look)
    write_atomic(path, b"new")
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"

"""The memory map of a folder's pictures: made once, anew when files change, by one of several processes at once."""

import os
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, levels, paint

from ddpm_jax.data import batch, maps, sources
from ddpm_jax.errors import DataError


def test_a_folder_is_decoded_once_then_mapped(album, monkeypatch):
    folder, load_album = album
    (folder / "sub").mkdir()
    for name, level in (("b.png", 2), ("a.BMP", 1), ("sub/c.png", 3)):
        paint(folder / name, level)
    first = load_album()
    assert first.images.shape == (3, 8, 8, 3)
    assert first.labels is None

    def read(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "read_frames", read)
    second = load_album()
    assert isinstance(second.images, np.memmap)
    assert levels(first) == levels(second) == [1, 2, 3]


def test_a_changed_folder_is_decoded_anew(album):
    folder, load_album = album
    paint(folder / "a.png", 1)
    paint(folder / "b.png", 2)
    assert levels(load_album()) == [1, 2]
    size = (folder / "a.png").stat().st_size
    paint(folder / "a.png", 3)
    os.utime(folder / "a.png", ns=(1, 1))
    assert (folder / "a.png").stat().st_size == size  # so that the time alone tells
    assert levels(load_album()) == [3, 2]
    paint(folder / "c.png", 4)
    assert levels(load_album()) == [3, 2, 4]
    (folder / "a.png").rename(folder / "d.png")
    assert levels(load_album()) == [2, 4, 3]
    (folder / "b.png").unlink()
    assert levels(load_album()) == [4, 3]


def test_a_picture_moved_to_another_subfolder_has_its_label(album):
    """Of the same size and time as before, and in the same order."""
    folder, load_album = album
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        paint(folder / name, 7)
        os.utime(folder / name, ns=(1, 1))
    assert load_album().labels.tolist() == [0, 0, 1]
    (folder / "a" / "2.png").rename(folder / "b" / "2.png")
    assert load_album().labels.tolist() == [0, 1, 1]


def test_a_map_from_before_there_were_labels_is_made_anew(album, monkeypatch):
    folder, load_album = album
    (folder / "a").mkdir()
    paint(folder / "a" / "1.png", 1)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_classes", lambda names: [])
        assert load_album().labels is None
    assert load_album().labels.tolist() == [0]


def test_fault_56_a_folder_that_is_gone_while_training(album):
    """Batches come from the memory map, which also stays if another process replaces it."""
    folder, load_album = album
    for level in range(4):
        paint(folder / f"{level}.png", level)
    dataset = load_album()
    before = batch(dataset, 0, 0, 4)
    paint(folder / "2.png", 200, (9, 9))
    load_album()
    shutil.rmtree(folder)
    np.testing.assert_array_equal(batch(dataset, 0, 0, 4)["image"], before["image"])


@pytest.mark.parametrize("suffix", [".json", ".npy", ".labels.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_map_is_made_anew(album, tmp_path, suffix, damage):
    folder, load_album = album
    for level in range(4):
        paint(folder / f"{level}.png", level)
    load_album()
    (file,) = [file for file in (tmp_path / "cache").iterdir() if file.name[16:] == suffix]
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1 if damage == "cut" else 0)
    assert levels(load_album()) == [0, 1, 2, 3]


def test_a_map_without_room(album, tmp_path, monkeypatch):
    folder, load_album = album
    for level in range(40):
        paint(folder / f"{level:02}.png", level)
    with pytest.raises(DataError, match=r"cannot write to data\.cache_dir=.*00\.png/cache: Not a directory"):
        load_album(cache_dir=folder / "00.png/cache")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7000))
        with pytest.raises(DataError, match=r"need 0\.0 GB, data\.cache_dir=.* has 0\.0 GB"):
            load_album()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # which meets the writer as a full disk does
    try:
        with pytest.raises(DataError, match=r"cannot write to data\.cache_dir=.*: File too large"):
            load_album()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert levels(load_album()) == list(range(40))


@pytest.fixture
def counted(album, monkeypatch):
    """An album of 2,000 equal pictures and the list of those that have been read."""
    folder, _ = album
    done, read = [], sources.read_frames
    paint(folder / "0000.png", 7)
    for number in range(1, 2000):
        os.link(folder / "0000.png", folder / f"{number:04}.png")

    def counting(path, *rest):
        done.append(path)
        return read(path, *rest)

    monkeypatch.setattr(sources, "read_frames", counting)
    return done


def test_decoding_can_be_interrupted(album, counted, monkeypatch):
    """Ctrl-C waits for few pictures, and leaves nothing behind that looks like a map."""
    _, load_album = album

    def interrupted(items, *_):
        for i, item in enumerate(items):
            if i == 10:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(maps, "progress_bar", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_album()
    assert len(counted) < 500
    assert levels(load_album()) == [7] * 2000


def test_few_pictures_wait_in_memory(album, counted, monkeypatch):
    """While the first of them takes its time the others are not all decoded."""
    _, load_album = album
    counting = sources.read_frames

    def slow(path, *rest):
        found = counting(path, *rest)
        if path.endswith("0000.png"):
            time.sleep(1)
            ahead.append(len(counted))
        return found

    ahead = []
    monkeypatch.setattr(sources, "read_frames", slow)
    assert levels(load_album()) == [7] * 2000
    assert ahead[0] < 500


# --- several processes


DECODE = """
import os, sys, time
from ddpm_jax.data import load, sources

folder, cache, log, go = sys.argv[1:]
read = sources.read_frames

def slow(path, *rest):
    with open(log, "a") as file:
        file.write(path + os.linesep)
    time.sleep(0.01)
    return read(path, *rest)

sources.read_frames = slow
print("ready", flush=True)
while not os.path.exists(go):
    time.sleep(0.001)
print(load("folder:" + folder, image_size=(8,), cache_dir=cache).images[:, 0, 0, 0].tolist())
"""


@pytest.fixture
def start(album, tmp_path):
    """A function that starts a process which waits for the file `go`, then decodes the album slowly and logs it."""
    folder, _ = album
    for level in range(100):
        paint(folder / f"{level:02}.png", level)
    paths = [folder, tmp_path / "cache", tmp_path / "log", tmp_path / "go"]
    started = []

    def start_one():
        command = [sys.executable, "-c", DECODE, *map(str, paths)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_several_processes_decode_once(album, tmp_path, start):
    folder, _ = album
    processes = [start() for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for process in processes:
        assert process.communicate(timeout=60)[0] == f"{list(range(100))}\n"
    assert sorted((tmp_path / "log").read_text().split()) == [str(folder / f"{level:02}.png") for level in range(100)]


def test_fault_58_a_process_killed_while_decoding(tmp_path, start):
    """Another that waits takes over, and what the first had begun is cleared away."""
    log = tmp_path / "log"
    first = start()
    (tmp_path / "go").touch()
    while not log.exists() or len(log.read_text().split()) < 10:
        time.sleep(0.01)
    second = start()
    first.kill()
    assert second.communicate(timeout=60)[0] == f"ready\n{list(range(100))}\n"
    left = sorted(file.name[16:] for file in (tmp_path / "cache").iterdir())
    assert left == [".json", ".labels.npy", ".lock", ".npy"]

"""Folders of pictures against pictures painted beforehand: what is read, and what is refused."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, levels, paint
from PIL import Image

from ddpm_jax.data import load, sources
from ddpm_jax.errors import DataError


def test_size_and_channels_of_a_folder(album):
    folder, load_album = album
    paint(folder / "a.png", 90, (40, 20))
    assert load_album(image_size=(4, 6)).images.shape == (1, 4, 6, 3)
    assert load_album(image_size=(4, 6), channels=1).images.shape == (1, 4, 6, 1)
    assert levels(load_album(image_size=(4, 6), channels=1)) == [90]


def test_subfolders_are_labels_in_byte_order(album, capsys):
    """However deep a picture lies; upper case sorts first, as bytes do, and bytes that are no UTF-8 last."""
    folder, load_album = album
    for i, name in enumerate(["zebra/b.png", "Zoo/c.png", "ant/deep/er/d.png", "ant/a.png", "\udcff/e.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        paint(folder / name, i)
    dataset = load_album()
    assert dict(zip(levels(dataset), dataset.labels.tolist(), strict=True)) == {0: 2, 1: 0, 2: 1, 3: 1, 4: 3}
    assert "4 subfolders, 'Zoo', 'ant', 'zebra', '\\udcff'" in capsys.readouterr().out
    paint(folder / "top.png", 9)
    assert load_album().labels is None
    assert "subfolders" not in capsys.readouterr().out


def test_labels_follow_a_renamed_subfolder(album):
    """Also when the pictures stay in the same order, and as pictures that cannot be read leave theirs out."""
    folder, load_album = album
    for name, level in (("a/1.png", 1), ("b/2.png", 2), ("c/3.png", 3)):
        (folder / name).parent.mkdir()
        paint(folder / name, level)
    assert load_album().labels.tolist() == [0, 1, 2]
    (folder / "a").rename(folder / "d")
    dataset = load_album()
    assert dict(zip(levels(dataset), dataset.labels.tolist(), strict=True)) == {2: 0, 3: 1, 1: 2}
    (folder / "b" / "2.png").write_bytes(b"<html>")
    with pytest.warns(UserWarning, match="1 of 3"):
        assert load_album(max_unreadable=0.5).labels.tolist() == [1, 2]


# --- what is refused


def test_fault_46_unreadable_pictures_are_named_and_the_rest_kept(album):
    folder, load_album = album
    for i in range(30):
        paint(folder / f"{i:02}.png", i)
    bad = [3, 7, 11, 15, 19, 23]
    for i in bad:
        (folder / f"{i:02}.png").write_bytes(b"<html>")
    for _ in range(2):  # decoded, then mapped
        with pytest.warns(UserWarning, match="they are left out") as warned:
            assert levels(load_album(max_unreadable=0.2)) == [i for i in range(30) if i not in bad]
        (said,) = [str(warning.message) for warning in warned]
        assert "6 of 30" in said
        assert [f"{i:02}.png" in said for i in bad] == [True] * 5 + [False]


def test_fault_46_too_many_unreadable_pictures(album):
    """An error that counts them; the pictures put right, the same folder as before is whole again."""
    folder, load_album = album
    for i in range(10):
        paint(folder / f"{i}.png", i)
    assert levels(load_album()) == list(range(10))
    for i in (4, 5):
        (folder / f"{i}.png").rename(folder / f"{i}.kept")
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 10 .*4\.png.*5\.png.*max_unreadable=0\.1"):
        load_album()
    for i in (4, 5):
        (folder / f"{i}.kept").replace(folder / f"{i}.png")
    assert levels(load_album()) == list(range(10))


def png(size, flip=False):
    """The bytes of a PNG of noise, one bit of which may be flipped."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= flip
    return bytes(data)


def writes(data):
    return lambda path: path.write_bytes(data)


def links_to(target):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(writes(b""), id="fault_46 no bytes"),
        pytest.param(writes(png((64, 64))[:2000]), id="fault_46 cut"),
        pytest.param(writes(b"no picture at all\n"), id="fault_46 text"),
        pytest.param(writes(b"<!DOCTYPE html><html><body>404</body></html>"), id="fault_46 html"),
        pytest.param(writes(png((64, 64), flip=True)), id="fault_46 flipped bit"),
        pytest.param(lambda path: Image.new("F", (8, 8), 0.5).save(path, "TIFF"), id="fault_49 float TIFF"),
        pytest.param(writes(b"P6 20000 20000 255\n"), id="fault_53 bomb"),
        pytest.param(writes(png((1, 400))), id="fault_53 line"),
        pytest.param(os.mkfifo, id="fault_54 pipe"),
        pytest.param(links_to("/dev/zero"), id="fault_54 device"),
        pytest.param(links_to("b.png"), id="fault_54 link to itself"),
        pytest.param(links_to("nothing"), id="fault_56 link to nothing"),
    ],
)
def test_what_cannot_be_used_is_left_out_counted_and_named(album, make):
    folder, load_album = album
    for name, level in (("a.png", 1), ("c.png", 3), ("d.png", 4)):
        paint(folder / name, level)
    make(folder / "b.png")
    with pytest.warns(UserWarning, match=r"1 of 4 pictures cannot be read: [^;]*b\.png .*; they are left out"):
        assert levels(load_album(max_unreadable=0.25)) == [1, 3, 4]
    with pytest.raises(DataError, match=r"1 of 4 .*b\.png.*max_unreadable=0 ") as caught:
        load_album(max_unreadable=0)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_fault_44_nothing_readable_at_all(album):
    folder, load_album = album
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 1"):
        load_album()
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(DataError, match="holds no images"):
        load_album(max_unreadable=1)


def test_fault_44_folders_that_cannot_be_used(album, tmp_path):
    folder, load_album = album
    (folder / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"no pictures in .*album.*\*\.png"):
        load_album()
    with pytest.raises(DataError, match=r"no folder .*elsewhere"):
        load(f"folder:{tmp_path / 'elsewhere'}", image_size=(8,))
    paint(folder / "a.png", 1)
    with pytest.raises(DataError, match=r"data\.image_size"):
        load_album(image_size=())


def test_a_subfolder_that_cannot_be_listed_is_no_empty_one(album, monkeypatch):
    folder, load_album = album
    paint(folder / "a.png", 1)
    (folder / "sub").mkdir()
    scandir = os.scandir

    def forbidden(path):
        if os.fsencode(path).endswith(b"sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError, match=r"cannot list .*sub.*Permission denied"):
        load_album()


def test_fault_46_and_fault_54_what_is_no_picture_file(album):
    """A folder called x.png is gone into, a pipe is counted as unreadable, hidden files and other suffixes are not."""
    folder, load_album = album
    (folder / "x.png").mkdir()
    for name, level in (("a.png", 1), ("x.png/b.png", 2), ("y.png", 3)):
        paint(folder / name, level)
    (folder / "._a.png").write_bytes(b"resource fork")
    (folder / "a.txt").write_text("text")
    assert levels(load_album(max_unreadable=0)) == [1, 2, 3]
    os.mkfifo(folder / "pipe.png")
    with pytest.warns(UserWarning, match=r"1 of 4 .*pipe\.png"):
        assert levels(load_album(max_unreadable=0.3)) == [1, 2, 3]


# --- names


def test_fault_55_order_is_that_of_the_names_bytes(album):
    """However odd the names, and whichever was written first; one of them cannot be read and is still named."""
    folder, load_album = album
    names = [
        b"Z.png",
        b"a b.png",
        b"a.png",
        b"n" * 200 + b".png",
        "\u00e9.png".encode(),
        "\u65e5.PNG".encode(),
        b"\xff.png",
    ]
    paths = [os.path.join(os.fsencode(folder), name) for name in names]
    for level in (5, 2, 0, 6, 3, 1, 4):
        with open(paths[level], "wb") as file:
            Image.new("L", (8, 8), level).save(file, "PNG")
    assert levels(load_album()) == list(range(7))
    with open(paths[6], "wb") as file:
        file.write(b"broken")
    with pytest.warns(UserWarning, match=r"\\udcff\.png"):
        assert levels(load_album(max_unreadable=0.5)) == list(range(6))


def test_fault_55_a_name_of_several_lines(album):
    folder, load_album = album
    (folder / "a\nb\x1b[31m.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a\\nb\\x1b\[31m\.png") as caught:
        load_album()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "utf8", "latin1"])
def test_fault_55_a_name_that_the_output_cannot_show(encoding):
    code = "import os; from ddpm_jax.run.log import note; note(os.fsdecode('\u65e5'.encode() + bytes([255])))"
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode(encoding) == ("\u65e5" if encoding == "utf8" else "\\u65e5") + "\\udcff\n"


@pytest.mark.slow
def test_fault_55_many_files(album):
    """20,000, in the order of their numbers, whichever was written first."""
    folder, load_album = album
    for level in range(100):
        paint(folder / f".{level}.png", level)
    for number in np.random.default_rng(0).permutation(20_000):
        directory = folder / f"{number // 1000:02}"
        directory.mkdir(exist_ok=True)
        os.link(folder / f".{number % 100}.png", directory / f"{number:05}.png")
    assert levels(load_album()) == list(range(100)) * 200


# --- files that change


def test_fault_56_a_second_try(album, monkeypatch):
    """One fault of each file is not even told; a lasting one is, after two tries."""
    folder, load_album = album
    for level in range(4):
        paint(folder / f"{level}.png", level)
    tries, read = [], sources.read_frames

    def failing(path, *rest):
        tries.append(Path(path).name)
        if tries[-1] == lasting or tries.count(tries[-1]) == 1:
            raise OSError("Stale file handle")
        return read(path, *rest)

    monkeypatch.setattr(sources, "read_frames", failing)
    lasting = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert levels(load_album()) == [0, 1, 2, 3]
    assert sorted(tries) == sorted(2 * ["0.png", "1.png", "2.png", "3.png"])
    tries.clear()
    lasting = "2.png"
    with pytest.warns(UserWarning, match=r"1 of 4 .*2\.png \(Stale file handle\)"):
        assert levels(load_album(cache_dir=folder / "other", max_unreadable=0.5)) == [0, 1, 3]
    assert tries.count("2.png") == 2


def test_fault_56_a_picture_that_can_be_read_by_now(album, monkeypatch):
    """It had no permission, say; neither size nor time of the file tell that it has."""
    folder, load_album = album
    for level in range(4):
        paint(folder / f"{level}.png", level)
    read = sources.read_frames

    def forbidden(path, *rest):
        if path.endswith("2.png"):
            raise PermissionError(13, "Permission denied")
        return read(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_frames", forbidden)
        with pytest.raises(DataError, match=r"1 of 4 .*2\.png .*Permission denied"):
            load_album()
    assert levels(load_album()) == [0, 1, 2, 3]


def test_fault_56_a_file_that_is_gone_when_it_is_read(album, monkeypatch):
    folder, load_album = album
    for level in range(4):
        paint(folder / f"{level}.png", level)
    find = sources.find

    def find_then_remove(path):
        found = find(path)
        (folder / "2.png").unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sources, "find", find_then_remove)
        with pytest.warns(UserWarning, match=r"1 of 4 .*2\.png \(.*No such file"):
            assert levels(load_album(max_unreadable=0.25)) == [0, 1, 3]
    assert levels(load_album(max_unreadable=0)) == [0, 1, 3]  # listed anew

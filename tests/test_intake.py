"""Picture files of every mode and kind of damage, against pixel values worked out by hand."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import EpsImagePlugin, Image

from ddpm_jax.data.intake import fit, read

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a picture and gives back what is read from the file, in its own size."""

    def save_and_read(picture, name="a.png", channels=0, **options):
        picture.save(tmp_path / name, **options)
        return read(tmp_path / name, (), channels)

    return save_and_read


def row(pixels, mode):
    """A picture one pixel high."""
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


# --- modes


@pytest.mark.parametrize(
    ("value", "level"),
    [(0, 0), (32896, 128), (65535, 255), (257, 1), (9509 + 128, 37), (9509 + 129, 38)],  # 9509 = 37 * 257
)
@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.int32)])
def test_fault_48_16_bit_gray(saved, value, level, name, dtype):
    found = saved(Image.fromarray(np.full((2, 3), value, dtype)), name)
    assert found.shape == (2, 3, 1)
    assert (found == level).all()


def test_fault_48_16_bit_gray_as_rgb(saved):
    assert (saved(Image.fromarray(np.full((2, 3), 32896, np.uint16)), channels=3) == np.full((2, 3, 3), 128)).all()


def test_gray_beyond_16_bits_is_refused(saved):
    with pytest.raises(ValueError, match="65536"):
        saved(Image.fromarray(np.full((2, 3), 65536, np.int32)), "a.tif")


def test_fault_49_float_tiff_is_refused(saved):
    with pytest.raises(ValueError, match="floating point"):
        saved(Image.fromarray(np.full((2, 3), 0.5, np.float32)), "a.tif")


def with_palette():
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([0, 1, 2])
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        (row([(*RED, 0), (*GREEN, 255), (0, 0, 0, 0)], "RGBA"), {}, [WHITE, GREEN, WHITE]),
        (row([(0, 0, 0, 128), (255, 0, 0, 51)], "RGBA"), {}, [(127, 127, 127), (255, 204, 204)]),  # 51 = 255 / 5
        (row([(40, 255), (40, 0), (0, 128)], "LA"), {}, [(40, 40, 40), WHITE, (127, 127, 127)]),
        (with_palette(), {}, [RED, GREEN, BLUE]),
        (with_palette(), {"transparency": 0}, [WHITE, GREEN, BLUE]),
        (with_palette(), {"transparency": bytes([255, 0, 51])}, [RED, WHITE, (204, 204, 255)]),
        (row([RED, GREEN], "RGB"), {"transparency": RED}, [WHITE, GREEN]),
        (row([7, 90], "L"), {"transparency": 7}, [WHITE, (90, 90, 90)]),
        (row([0, 255], "1"), {}, [0, 255]),
        (row([0, 77, 255], "L"), {}, [0, 77, 255]),
    ],
    ids=["fault_50 RGBA", "fault_50 half"]
    + ["fault_47 " + mode for mode in ("LA", "P", "P-clear", "P-half", "RGB-key", "L-key", "1", "L")],
)
def test_modes_of_png(saved, picture, options, expected):
    """Transparency ends on white, so that no colour hidden under it shows; gray stays gray."""
    found = saved(picture, **options)
    assert found.dtype == np.uint8
    expected = np.array(expected).reshape(1, len(expected), -1)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


def test_fault_47_cmyk(saved):
    """Inks: magenta and yellow make red, cyan and yellow green, black alone black."""
    inks = row([(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)], "CMYK")
    assert saved(inks, "a.tif")[0].tolist() == [[*RED], [*GREEN], [0, 0, 0], [*WHITE]]
    jpeg = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg", quality=95)
    assert np.abs(jpeg.astype(int) - RED).max() <= 3


@pytest.mark.parametrize(("colour", "gray"), [(RED, 76), (GREEN, 150), (BLUE, 29), (WHITE, 255), ((50, 50, 50), 50)])
def test_gray_from_rgb(saved, colour, gray):
    """Luma of ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""
    assert saved(Image.new("RGB", (2, 1), colour), channels=1).ravel().tolist() == [gray, gray]


# Where the stored picture's upper left and upper right corner are seen (EXIF 2.3, tag 0x0112).
SEEN = {
    1: ("upper left", "upper right"),
    2: ("upper right", "upper left"),
    3: ("lower right", "lower left"),
    4: ("lower left", "lower right"),
    5: ("upper left", "lower left"),
    6: ("upper right", "lower right"),
    7: ("lower right", "upper right"),
    8: ("lower left", "upper left"),
}
CORNERS = {"upper left": (0, 0), "upper right": (0, -1), "lower left": (-1, 0), "lower right": (-1, -1)}


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("orientation", SEEN)
def test_fault_51_exif_orientation(saved, name, orientation):
    picture = Image.new("RGB", (60, 40), WHITE)
    picture.paste(RED, (0, 0, 16, 16))
    picture.paste(BLUE, (44, 0, 60, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(picture, name, exif=exif)
    assert found.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))
    for corner, at in CORNERS.items():
        colour = dict(zip(SEEN[orientation], (RED, BLUE), strict=True)).get(corner, WHITE)
        assert np.abs(found[at].astype(int) - colour).max() <= 8


@pytest.mark.parametrize(("name", "options"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})])
def test_fault_52_first_frame_of_an_animation(saved, name, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED, BLUE)]
    found = saved(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert (found == GREEN).all()


# --- files that are refused


def png_header(width, height):
    """A PNG of 1-bit pixels that ends before the first of them."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("width", "height", "fragment"),
    [
        (8125, 8000, "8125x8000 is more than 64,000,000 pixels"),
        (20_000, 20_000, "pixels"),
        (1, 4000, "1x4000 is too long"),
        (4000, 1, "4000x1 is too long"),
    ],
)
def test_fault_53_sizes_refused_by_the_header(tmp_path, width, height, fragment):
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    clock = time.perf_counter()
    with pytest.raises((ValueError, Image.DecompressionBombError), match=fragment):
        read(tmp_path / "a.png", (8, 8), 1)
    assert time.perf_counter() - clock < 0.5


READ_ALL = """
import resource, sys, warnings
from ddpm_jax.data import read
warnings.simplefilter("ignore")
peaks = []
for path in sys.argv[1:]:
    try:
        read(path, (8, 8), 3)
    except Exception as error:
        print(error)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[-1] - peaks[0])
"""


def test_fault_53_bombs_take_no_memory(tmp_path):
    """The peak after them in kB; whole, the second has 121 MB as Pillow keeps it."""
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    Image.new("1", (11_000, 11_000)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(png_header(20_000, 20_000))
    (tmp_path / "3.png").write_bytes(b"P6 20000 20000 255\n")
    command = [sys.executable, "-c", READ_ALL, *sorted(map(str, tmp_path.iterdir()))]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "11000x11000 is more than 64,000,000 pixels" in said[0]
    assert ["400000000 pixels" in line for line in said[1:3]] == [True, True]
    assert int(said[3]) < 20_000


def test_a_picture_runs_no_program(tmp_path, monkeypatch):
    """Encapsulated PostScript, whatever its name: Pillow would hand it to `gs`."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'canary'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once a process
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(Image.UnidentifiedImageError):
        read(tmp_path / "a.png", (8, 8), 3)
    assert not (tmp_path / "canary").exists()
    with Image.open(tmp_path / "a.png") as picture, pytest.raises((OSError, ValueError)):
        picture.load()
    assert (tmp_path / "canary").exists()  # it does sing


@pytest.fixture
def alarm():
    """TimeoutError in what takes longer than five seconds."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "folder", "device"]
)
def test_fault_54_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read(tmp_path / "a.png", (8, 8), 1)


def test_fault_54_links(tmp_path):
    """A link to a picture is that picture; a loop of links is an error."""
    Image.new("L", (2, 2), 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert (read(tmp_path / "b.png", (), 0) == 9).all()
    (tmp_path / "c.png").symlink_to("d.png")
    (tmp_path / "d.png").symlink_to("c.png")
    with pytest.raises(OSError, match="symbolic links"):
        read(tmp_path / "c.png", (), 0)


def encoded(form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jpg", encoded("JPEG")[:2000]),
        ("a.png", encoded("PNG")[:2000]),
        ("a.png", flipped(encoded("PNG"))),
        ("a.png", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("a.jpg", b"no picture at all\n"),
        ("a.png", b""),
    ],
    ids=["cut jpg", "cut png", "flipped bit", "html", "text", "empty"],
)
def test_fault_46_damaged_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OSError, match=r"truncated|cannot identify|broken data"):
        read(tmp_path / name, (8, 8), 3)


def test_a_picture_under_another_formats_name_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("PNG"))
    np.testing.assert_array_equal(read(tmp_path / "a.jpg", (64, 64), 3), Image.open(io.BytesIO(encoded("PNG"))))


# --- size and shape


def test_the_middle_is_cut_out_and_nothing_squashed():
    """Red, green and blue stripes of 10, 20 and 10 pixels: the square in the middle is green."""
    wide = Image.new("RGB", (40, 20), GREEN)
    wide.paste(RED, (0, 0, 10, 20))
    wide.paste(BLUE, (30, 0, 40, 20))
    tall = wide.transpose(Image.Transpose.ROTATE_270)  # red above, blue below
    for size in (5, 10, 20):
        assert (fit(wide, (size, size), 3) == GREEN).all()
        assert (fit(tall, (size, size), 3) == GREEN).all()
    stripes = np.array([RED] * 5 + [GREEN] * 10 + [BLUE] * 5)
    np.testing.assert_array_equal(fit(wide, (10, 20), 3), np.broadcast_to(stripes, (10, 20, 3)))
    np.testing.assert_array_equal(fit(tall, (20, 10), 3), np.broadcast_to(stripes[:, None], (20, 10, 3)))


def test_blocks_are_averaged():
    """Up to one level, for the mean is rounded along each axis."""
    blocks = np.array([[10, 20, 0, 255], [30, 40, 255, 0], [0, 0, 1, 2], [0, 200, 3, 6]], np.uint8)
    found = fit(Image.fromarray(blocks), (2, 2), 1)[..., 0].astype(int)
    np.testing.assert_allclose(found, [[25, 127.5], [50, 3]], atol=1)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (5, 9, 3)])
def test_the_right_size_is_left_alone(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = fit(Image.fromarray(pixels), shape[:2], 0)
    np.testing.assert_array_equal(found, pixels.reshape(*shape[:2], -1))
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), (), 0), found)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((58, 58), (28, 28)), ((106, 177), (49, 49)), ((7, 7), (50, 50)), ((44, 7), (100, 100)), ((1, 1), (8, 8))],
)
def test_one_colour_stays_one_colour(size, wanted):
    """Also at sizes whose ratio has no exact floating point number."""
    found = fit(Image.new("RGB", size, (10, 20, 30)), wanted, 3)
    assert found.shape == (*wanted, 3)
    assert (found == (10, 20, 30)).all()

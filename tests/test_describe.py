"""What `python -m ddpm_jax.data` says of data, against data whose facts are known beforehand."""

import re

import numpy as np
import pytest
from conftest import assert_one_line
from PIL import Image

from ddpm_jax.data import __main__ as describe
from ddpm_jax.data import fingerprint, load


@pytest.fixture
def source(tmp_path):
    """Half black, half (51, 102, 255): mean and deviation of each channel are half of the level."""
    images = np.zeros((6, 4, 8, 3), np.uint8)
    images[:, :, :4] = 51, 102, 255
    np.savez(tmp_path / "a.npz", images=images, labels=[2, 0, 2, 2, 0, 3])
    return f"npz:{tmp_path / 'a.npz'}"


def test_the_facts(call, source):
    code, said, _ = call(describe, source)
    assert code == 0
    assert said.splitlines() == [
        "6 images of 4x8x3",
        "mean 0.10000 0.20000 0.50000 std 0.10000 0.20000 0.50000 (0 black, 1 white)",
        "3 classes from 0 to 3, with 2 3 1 images",
        f"fingerprint {fingerprint(load(source))}",
    ]


def test_a_grid_of_as_many_as_asked_for_from_first_to_last(call, tmp_path):
    """Of 100 gray levels nine, evenly spaced: 0, 12, 24, 37, 49, 61, 74, 86, 99."""
    np.savez(tmp_path / "a.npz", images=np.arange(100, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(64, 2))
    out = tmp_path / "new" / "grid.png"
    assert call(describe, f"--source=npz:{tmp_path / 'a.npz'}", "--num=9", f"--out={out}")[0] == 0
    page = np.asarray(Image.open(out))
    assert page.shape == (3 * 66 + 2, 3 * 66 + 2)
    assert page[34::66, 34::66].ravel().tolist() == [0, 12, 24, 37, 49, 61, 74, 86, 99]


def test_size_and_channels(call, source):
    assert "6 images of 2x2x1" in call(describe, source, "--image-size=2", "--channels=1")[1]


def test_a_single_image(call, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.repeat(np.uint8([51, 153]), 8).reshape(1, 4, 4))
    code, said, told = call(describe, f"npz:{tmp_path / 'a.npz'}")
    assert (code, told) == (0, "")
    assert "1 images of 4x4x1\nmean 0.40000 std 0.20000 (0 black, 1 white)\n" in said


@pytest.mark.parametrize(
    ("options", "code", "fragment"),
    [
        ((), 2, "name a source"),
        (("--split=test",), 2, "name a source"),
        (("digits", "--files=x"), 2, "--files=x needs a source tfds:NAME, not digits"),
        (("digits", "more"), 2, "unexpected argument 'more'"),
        (("digits", "--num=0"), 2, "--num=0 must be at least 1"),
        (("npz:none.npz",), 3, "none.npz"),
        (("nothing",), 3, "none of digits, tfds, folder, npz"),
        (("tfds:mnist", "--files=/none"), 3, "there is no train-images-idx3-ubyte"),
    ],
)
def test_what_cannot_be_described(call, tmp_path, options, code, fragment):
    found, _, said = call(describe, *options, f"--data-dir={tmp_path}")
    assert found == code
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert fragment in said


def test_a_grid_that_cannot_be_written(call, source, tmp_path):
    code, _, said = call(describe, source, f"--out={tmp_path / 'a.npz' / 'grid.png'}")
    assert code == 2
    assert re.match(r"error: cannot write to --out=.*(Not a directory|File exists)\n$", said)


def test_as_a_command(script, source, tmp_path):
    done = script("-m", "ddpm_jax.data", source)
    assert done.returncode == 0
    assert done.stdout.startswith("6 images of 4x8x3\nmean")
    assert done.stderr == ""
    done = script("-m", "ddpm_jax.data", "npz:none.npz")
    assert done.returncode == 3
    assert_one_line(done)

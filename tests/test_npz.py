"""Arrays of npz and npy files: taken as they are, or refused with what they hold."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.data import batch, load
from ddpm_jax.errors import DataError


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, channels), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(5))
    dataset = load(f"npz:{tmp_path / 'a.npz'}")
    np.testing.assert_array_equal(dataset.images, images)
    np.testing.assert_array_equal(dataset.labels, np.arange(5))


def test_npz_without_channel_axis_and_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((5, 6, 4), 9, np.uint8))
    dataset = load(f"npz:{tmp_path / 'a.npz'}")
    assert dataset.images.shape == (5, 6, 4, 1)
    assert dataset.labels is None


def test_npz_resized(tmp_path):
    """Quarters of an image become its pixels, and gray becomes three equal channels."""
    quarters = np.array([[10, 20], [30, 40]], np.uint8)
    np.savez(tmp_path / "a.npz", images=np.kron(quarters, np.ones((4, 4), np.uint8))[None])
    dataset = load(f"npz:{tmp_path / 'a.npz'}", image_size=(2,), channels=3)
    np.testing.assert_array_equal(dataset.images[0], quarters[..., None].repeat(3, 2))


def test_npy_is_mapped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)
    np.save(tmp_path / "a.npy", images)
    dataset = load(f"npz:{tmp_path / 'a.npy'}")
    assert isinstance(dataset.images, np.memmap)
    np.testing.assert_array_equal(batch(dataset, 0, 0, 5)["image"], images[batch(dataset, 0, 0, 5)["index"]])


class Canary:
    """Unpickled, it writes the file `canary`."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


GRAY = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "fragment"),
    [
        ({"images": np.array([Canary()], object)}, "pickle"),
        pytest.param(
            {"images": GRAY + np.float32([0, 99.5, 254, 255])},
            "float32 from 0.0 to 255.0.*as uint8",
            id="fault_57 0..255",
        ),
        pytest.param({"images": GRAY + np.float32(1)}, "float32 from 1.0 to 1.0.*save as uint8", id="fault_57 0..1"),
        pytest.param({"images": GRAY.astype(np.int64) + 7}, "int64 from 7 to 7.*as uint8", id="fault_57 int64"),
        ({"data": GRAY}, "no array 'images'; it has data"),
        ({"arr_0": GRAY, "arr_1": np.arange(3), "arr_2": GRAY}, "no array 'images'; it has arr_0, arr_1, arr_2"),
        ({"arr_0": GRAY, "arr_1": GRAY}, r"arr_1 of a\.npz are uint8 of shape \(3, 4, 4\), not 3 integers"),
        ({"arr_0": GRAY / 255}, r"arr_0 of a\.npz are float64 from 0\.0 to 0\.0; scale"),
        ({"images": GRAY[0]}, r"shape \(4, 4\)"),
        ({"images": GRAY[..., None].repeat(4, 3)}, r"shape \(3, 4, 4, 4\)"),
        ({"images": GRAY, "labels": np.arange(2)}, r"labels.*shape \(2,\).*3 integers"),
        ({"images": GRAY[:0]}, "no images"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, monkeypatch, arrays, fragment):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **arrays)
    with pytest.raises(DataError, match=fragment) as caught:
        load("npz:a.npz")
    assert "\n" not in str(caught.value)
    assert not Path("canary").exists()


def test_npz_of_other_samplers(tmp_path):
    """np.savez(path, images, labels) of guided-diffusion; ADM's reference batches have moments beside arr_0."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", images, np.arange(5))
    moments = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s"), np.zeros((2, 2)))
    np.savez(tmp_path / "reference.npz", arr_0=images, **moments)
    for name, labels in (("samples", list(range(5))), ("reference", None)):
        found = load(f"npz:{tmp_path / name}.npz")
        np.testing.assert_array_equal(found.images, images)
        assert (found.labels is None) if labels is None else (found.labels.tolist() == labels)


def test_npz_that_claims_to_be_huge(tmp_path):
    """More than an address space in a file of some hundred bytes."""
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", header.getvalue())
    with pytest.raises(DataError, match=r"cannot read .*a\.npz.*allocate"):
        load(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped bit", "text", "missing"])
def test_npz_that_is_damaged(tmp_path, damage):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, images=np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8))
    good = file.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    file.write_bytes({"empty": b"", "cut": good[:middle], "flipped bit": flipped}.get(damage, b"images"))
    if damage == "missing":
        file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.npz"):
        load(f"npz:{file}")

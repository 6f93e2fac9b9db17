"""Real images from a Debian package to a prepared set: minutes long."""

import gzip
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow_datasets as tfds

PACKAGE = "dataset-fashion-mnist"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder with the four idx files of the package, which is unpacked and not installed."""
    folder = tmp_path_factory.mktemp("package")
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("no apt-get here to obtain the Debian package dataset-fashion-mnist")
    done = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=300)
    packages = list(folder.glob("*.deb"))
    if not packages:
        pytest.skip(f"the Debian package {PACKAGE} cannot be had: {done.stderr.strip()[-200:]}")
    subprocess.run(["dpkg-deb", "-x", packages[0], folder], check=True)
    return next(folder.rglob("train-images-idx3-ubyte.gz")).parent


@pytest.mark.slow
def test_70000_real_images_are_prepared_without_tensorflow(files, script, tmp_path):
    """Mean and deviation are the published .2860 and .3530; each image and label is that of the package."""
    options = [f"--data-dir={tmp_path / 'tfds'}", f"--cache-dir={tmp_path / 'cache'}"]
    done = script("-m", "ddpm_jax.data", "tfds:fashion_mnist", f"--files={files}", *options)
    assert done.returncode == 0, done.stderr
    assert "their contents were checked, not their checksums" in done.stdout
    assert "60,000 images of 28x28x1\nmean 0.28604 std 0.35302 " in done.stdout
    assert "10 classes from 0 to 9, with" + 10 * " 6,000" + " images" in done.stdout
    builder = tfds.builder("fashion_mnist", data_dir=tmp_path / "tfds")
    for split, prefix, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        images, labels = (
            np.frombuffer(gzip.decompress((files / f"{prefix}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=start)
            for kind, start in (("images-idx3", 16), ("labels-idx1", 8))
        )
        rows = [(row["image"].tobytes(), int(row["label"])) for row in builder.as_data_source(split)]
        assert len(rows) == count
        expected = zip((image.tobytes() for image in images.reshape(-1, 784)), labels.tolist(), strict=True)
        assert sorted(rows) == sorted(expected)

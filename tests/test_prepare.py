"""TFDS's sets from tiny archives in the exact formats, against the arrays that were written into them and TFDS's word."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import shutil
import struct
import tarfile
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax import data
from ddpm_jax.data import load, prepare
from ddpm_jax.data import __main__ as command
from ddpm_jax.errors import DataError

N = {"train": 20, "test": 10}
CLASSES = {"cifar10": {"label": 10}, "cifar100": {"coarse_label": 20, "label": 100}}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Sets of 20 and 10 images instead of 60,000, and of 6 flowers; no network."""
    for name in CLASSES | {"mnist": 0, "fashion_mnist": 0, "kmnist": 0}:
        monkeypatch.setitem(prepare.SETS, name, prepare.SETS[name]._replace(counts=N))
    flowers = prepare.SETS["oxford_flowers102"]._replace(counts={"train": 3, "test": 2, "validation": 1})
    monkeypatch.setitem(prepare.SETS, "oxford_flowers102", flowers)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://localhost:9")  # where nothing listens
    monkeypatch.setenv("no_proxy", "")


def draw(n, shape, classes):
    random = np.random.default_rng(n)
    return random.integers(0, 256, (n, *shape), np.uint8), random.integers(0, classes, n).astype(np.uint8)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files():
    """{name: bytes} of the four files of MNIST."""
    files = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        images, labels = draw(N[split], (28, 28), 10)
        files[f"{name}-images-idx3-ubyte"], files[f"{name}-labels-idx1-ubyte"] = idx(images), idx(labels)
    return files


def cifar_files(name):
    """{name: bytes} of what lies in the archive of CIFAR-10 or CIFAR-100."""
    files, parts = {}, {"train": ["train.bin"], "test": ["test.bin"]}
    if name == "cifar10":
        parts = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    for split, names in parts.items():
        images, labels = draw(N[split], (32, 32, 3), 10)
        for i, images_of_file in enumerate(np.split(images, len(names))):
            records = b""
            for j, image in enumerate(images_of_file, i * len(images_of_file)):
                records += bytes([3] * (name == "cifar100") + [labels[j]])
                records += b"".join(image[:, :, channel].tobytes() for channel in range(3))
            files[names[i]] = records
    for kind, n in CLASSES[name].items():
        file = {"cifar10": "batches.meta.txt"}.get(name, f"{kind.replace('label', 'fine_label').split('_fine')[0]}")
        file = {"label": "fine_label_names.txt", "coarse_label": "coarse_label_names.txt"}[kind] if n > 10 else file
        files[file] = "".join(f"{kind} {i}\n" for i in range(n)).encode() + b"\n"
    return files


def tar(files, change=lambda tar: None, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        change(archive)
    return buffer.getvalue()

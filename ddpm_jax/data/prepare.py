"""TFDS's own image sets prepared without TensorFlow, which they need for nothing but to unpack their archives.

A set is written by TFDS's own builder, only the examples come from here, with the same keys: so it is the same set,
row by row, as one prepared with TensorFlow.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ddpm_jax.data.archives import find, read_idx
from ddpm_jax.errors import DataError
from ddpm_jax.log import note


class Set(NamedTuple):
    read: Callable  # (folder of the archives, counts, features) -> {split: iterable of (key, example)}
    counts: dict  # images in each split


def prepare(builder, files=""):
    """Write the set of a TFDS builder from its archives: downloaded, or those that lie in the folder `files`."""
    import tensorflow_datasets as tfds

    folder = Path(os.path.expanduser(files))
    read, counts = SETS[builder.name]
    note(f"preparing {builder.info.full_name} in {builder.data_dir}")
    examples = read(folder, counts, builder.info.features)
    told = builder.url_infos.values()
    if not all(_is_original(folder / info.filename, info) for info in told):
        note(f"the files in {folder} are not the original archives byte for byte; their contents were checked instead")
    builder._split_generators = lambda manager: examples
    tfds.disable_progress_bar()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _is_original(path, info):
    if not path.is_file() or path.stat().st_size != info.size:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == info.checksum


def _mnist(folder, counts, features):
    """Four idx files, two for each split; the keys count from 0."""

    def read(split, n):
        name = {"train": "train", "test": "t10k"}[split]
        parts = []
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            file = f"{name}-{kind}-ubyte"
            parts.append(read_idx(find(folder, f"{file}.gz", file), shape))
        return _rows(*parts, features)

    return {split: read(split, n) for split, n in counts.items()}


def _rows(images, labels, features):
    if labels.max() >= features["label"].num_classes:
        raise DataError(f"a label is {labels.max()}, more than {features['label'].num_classes} classes have")
    return ((i, {"image": Image.fromarray(images[i]), "label": int(labels[i])}) for i in range(len(images)))


SETS = {name: Set(_mnist, {"train": 60_000, "test": 10_000}) for name in ("mnist", "fashion_mnist", "kmnist")}

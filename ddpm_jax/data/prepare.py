"""Preparing image sets of TFDS without TensorFlow, which TFDS only needs to unpack their archives.

TFDS's own builder writes the set; only the examples come from here, with the same keys. The result is therefore the
same, row by row, as a set prepared with TensorFlow.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddpm_jax.data.archives import find, read_idx, read_members
from ddpm_jax.errors import DataError, first_line
from ddpm_jax.run.files import expand
from ddpm_jax.run.log import note, progress_bar

TIMEOUT = 30  # seconds without a byte after which a download has failed


class Set(NamedTuple):
    read: Callable  # (folder of the archives, builder, counts) -> {split: iterable of (key, example)}, all checked
    counts: dict  # {split: number of images}


def prepare(builder, files=""):
    """Write the set of a TFDS builder from its archives, which are downloaded or read from the folder `files`.

    Raises DataError when they cannot be downloaded, are damaged or truncated, or belong to another set.
    """
    folder = expand(files) if files else _download(builder)
    read, counts = SETS[builder.name]
    examples = read(folder, builder, counts)
    if not all(_is_original(folder / info.filename, info) for info in builder.url_infos.values()):
        note(f"the archives in {folder} are not the original files; their contents were checked, not their checksums")
    builder._split_generators = lambda manager: examples  # the only part that is not TFDS's own
    write(builder)


def write(builder):
    """Let a TFDS builder write its examples as array_record; the folder gets its name when it is complete."""
    import tensorflow_datasets as tfds

    note(f"preparing {builder.info.full_name} in {builder.data_dir}")
    tfds.disable_progress_bar()
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # hides TFDS's lines on downloads of unknown size
        builder.download_and_prepare(download_config=settings, file_format="array_record")


def _download(builder):
    """The folder with the archives of a set; those that are missing or incomplete are downloaded."""
    folder = Path(builder.data_dir_root) / "downloads" / builder.name
    for url, info in builder.url_infos.items():
        if not _is_original(folder / info.filename, info):
            try:
                _fetch(url, folder / info.filename, info)
            except (OSError, DataError) as error:  # requests' errors are OSErrors
                reason = getattr((*error.args, None)[0], "reason", error)  # without the number of retries
                names = ", ".join(info.filename for info in builder.url_infos.values())
                raise DataError(
                    f"cannot download {url}: {first_line(reason)}; or put {names} into a folder DIR and run "
                    f"python -m ddpm_jax.data tfds:{builder.name} --files=DIR"
                ) from error
    return folder


def _fetch(url, path, info):
    """Download a file of known size and checksum; an incomplete one has another name and is deleted."""
    import requests  # a dependency of TFDS

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    note(f"downloading {url} ({info.size / 1e6:,.1f} MB) to {path.parent}")
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as reply, open(part, "wb") as file:
            reply.raise_for_status()
            for block in progress_bar(reply.iter_content(2**20), -(-info.size // 2**20), "downloading"):
                file.write(block)
        if not _is_original(part, info):
            size = part.stat().st_size
            raise DataError(f"got {size:,} bytes of {info.size:,}" if size != info.size else "its checksum differs")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _is_original(path, info):
    if not path.is_file() or path.stat().st_size != info.size:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == info.checksum


def _mnist(folder, builder, counts):
    """Two idx files for each split: images and labels."""

    def part(split, kind, shape):
        name = f"{'t10k' if split == 'test' else split}-{kind}-ubyte"
        return read_idx(find(folder, name + ".gz", name), shape)

    return {
        split: _rows(builder, part(split, "images-idx3", (n, 28, 28)), {"label": part(split, "labels-idx1", (n,))})
        for split, n in counts.items()
    }


def _cifar(folder, builder, counts):
    """A tar of records: one byte for each kind of label, then the red, green and blue planes of 32x32 bytes."""
    info = builder._cifar_info
    parts = {"train": info.train_files, "test": info.test_files}
    names = [*info.label_files, *info.train_files, *info.test_files]
    files = read_members(folder, os.path.basename(info.url), info.prefix, names)
    for key, name in zip(info.label_keys, info.label_files, strict=True):
        classes = [line for line in files[name].decode("utf8", "replace").split("\n") if line]
        count, expected = len(set(classes)), builder.info.features[key].num_classes
        if not count == len(classes) == expected:
            raise DataError(f"{name} in {folder} names {count} classes, not {expected} of one line each")
        builder.info.features[key].names = classes

    def read_split(split, n):
        keys, data = info.label_keys, b"".join(files[name] for name in parts[split])
        if len(data) != n * (len(keys) + 3072):
            raise DataError(
                f"{', '.join(parts[split])} in {folder} have {len(data):,} bytes, not those of {n:,} images"
            )
        records = np.frombuffer(data, np.uint8).reshape(n, -1)
        images = records[:, len(keys) :].reshape(n, 3, 32, 32).transpose(0, 2, 3, 1)
        return _with_id(_rows(builder, images, dict(zip(keys, records.T, strict=False))), split)

    return {split: read_split(split, n) for split, n in counts.items()}


def _with_id(rows, split):
    return ((i, row | {"id": f"{split}_{i:05d}"}) for i, row in rows)


def _rows(builder, images, labels):
    """(key, example) of uint8 images and {feature: labels}; the keys are 0, 1, ..."""
    for name, values in labels.items():
        classes = builder.info.features[name].num_classes
        if values.max() >= classes:
            raise DataError(f"a {name} of {builder.name} is {values.max()}, but there are {classes} classes from 0 on")

    def row(i):
        return {"image": Image.fromarray(images[i])} | {name: int(values[i]) for name, values in labels.items()}

    return ((i, row(i)) for i in range(len(images)))


def _flowers(folder, builder, counts):
    """A tar of JPEGs, numbered from 1; a .mat file with their labels, also from 1, and one with the splits' numbers."""
    originals = {info.filename: info for info in builder.url_infos.values()}
    (labels,) = _mat(folder, originals["imagelabels.mat"], "labels")
    splits = dict(zip(counts, _mat(folder, originals["setid.mat"], "trnid", "tstid", "valid"), strict=True))
    names = {number: f"image_{number:05d}.jpg" for numbers in splits.values() for number in numbers}
    pictures = read_members(folder, "102flowers.tgz", "jpg/", names.values())
    for name, picture in pictures.items():
        if not picture.startswith(b"\xff\xd8"):
            raise DataError(f"{name} in {folder} is not a JPEG")

    def row(number):
        name = names[number]
        return name, {"image": pictures[name], "label": labels[number - 1] - 1, "file_name": name}

    return {split: map(row, numbers) for split, numbers in splits.items()}


def _mat(folder, original, *names):
    """The rows `names` of a .mat file as lists of integers; only the original is read, as SciPy trusts the file."""
    from scipy.io import loadmat  # a dependency of scikit-learn

    path = find(folder, original.filename)
    if not _is_original(path, original):
        raise DataError(f"{path} is not the original: its size or checksum differs")
    arrays = loadmat(path)
    return [arrays[name].ravel().tolist() for name in names]


IDX = Set(_mnist, {"train": 60_000, "test": 10_000})
CIFAR = Set(_cifar, {"train": 50_000, "test": 10_000})
FLOWERS = Set(_flowers, {"train": 1020, "test": 6149, "validation": 1020})

SETS = {
    "mnist": IDX,
    "fashion_mnist": IDX,
    "kmnist": IDX,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "oxford_flowers102": FLOWERS,
}

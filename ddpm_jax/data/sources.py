"""Where images come from: SOURCES maps the word before the colon of `data.source` to a function that reads it."""

import os
from collections.abc import Callable

import numpy as np

from ddpm_jax.data.intake import SUFFIXES, find, fit_array, read
from ddpm_jax.data.loader import Dataset
from ddpm_jax.data.maps import decode, digest
from ddpm_jax.data.records import from_digits, from_tfds
from ddpm_jax.errors import DataError, first_line
from ddpm_jax.files import expand
from ddpm_jax.log import note


def load(source: str, image_size: tuple[int, ...] = (), channels: int = 0, **options) -> Dataset:
    """The Dataset that `source` names: digits, tfds:NAME, folder:DIR or npz:FILE; `options` are config.Data's.

    Raises DataError when there is no such source, or nothing usable in it.
    """
    kind, _, argument = source.partition(":")
    if kind not in SOURCES:
        raise DataError(f"data.source={source} is none of {', '.join(SOURCES)} (as in folder:my_pictures)")
    if len(image_size) == 1:
        image_size = image_size * 2
    dataset = SOURCES[kind](argument, image_size, channels, **options)
    if dataset.images.shape[0] == 0:
        raise DataError(f"data.source={source} holds no images")
    return dataset


def from_npz(path: str, image_size: tuple[int, ...], channels: int, **_) -> Dataset:
    """`images` (and `labels`) of an npz file, or a lone npy file, which is mapped: uint8 (N, H, W[, C])."""
    where = expand(path)
    try:
        file = np.load(where, mmap_mode="r", allow_pickle=False)
        arrays = {"images": file} if isinstance(file, np.ndarray) else {name: file[name] for name in file.files}
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise DataError(f"cannot read {path} as npz: {first_line(error)}") from error
    if "images" not in arrays:
        raise DataError(f"{path} has no array 'images'; it has {', '.join(arrays) or 'nothing'}")
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8:
        values = f" from {images.min()} to {images.max()}" if images.dtype.kind in "fiub" and images.size else ""
        raise DataError(f"images of {path} are {images.dtype}{values}; scale to 0..255, round, save as uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"images of {path} have the shape {images.shape}; (N, height, width, 1 or 3) is needed")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise DataError(
            f"labels of {path} are {labels.dtype} of shape {labels.shape}, not whole numbers, one for each of "
            f"{len(images)} images"
        )
    if len(images) and images.shape[1:] != (*(image_size or images.shape[1:3]), channels or images.shape[-1]):
        images = np.stack([fit_array(image, image_size, channels) for image in images])
    return Dataset(images, labels)


def from_folder(folder, image_size, channels, max_unreadable=0.1, cache_dir="~/.cache/ddpm_jax", **_):
    """All pictures below a folder, decoded once into a memory map; a changed folder is decoded anew.

    Labels are the subfolders that the pictures lie in, counted in byte order, unless one lies in none.
    """
    if not folder:
        raise DataError("data.source=folder: names no folder; say for example --config.data.source=folder:my_pictures")
    folder = expand(folder)
    if not os.path.isdir(folder):  # which never raises
        raise DataError(f"there is no folder {folder} (data.source=folder:{folder})")
    if not image_size:
        raise DataError("data.image_size is needed for a folder of pictures, for example --config.data.image_size=64")
    try:
        files = find(folder)
    except OSError as error:
        where = os.fsdecode(error.filename)
        raise DataError(f"cannot list {where} (data.source=folder:{folder}): {error.strerror}") from error
    if not files:
        raise DataError(f"no pictures in {folder}; looked for {' '.join('*' + suffix for suffix in SUFFIXES)}")
    names = [os.path.relpath(path, folder) for path, _, _ in files]
    classes = _classes(names)
    if classes:
        told = ", ".join(map(repr, classes[:5])) + ", ..." * (len(classes) > 5)
        note(f"{folder}: labels from the names of {len(classes)} subfolders, {told}")
    label = {name: i for i, name in enumerate(classes)}
    return decode(
        f"folder:{folder.resolve()}",
        digest(repr((classes, names, [at for _, *at in files]))),
        [path for path, _, _ in files],
        lambda path: (read(path, image_size, channels or 3), label.get(_top(os.path.relpath(path, folder)), -1)),
        (*image_size, channels or 3),
        max_unreadable,
        cache_dir,
    )


def _classes(names):
    """The subfolders in byte order if every one of the relative `names` lies in one, however deep; [] otherwise."""
    inside = all(os.sep in name for name in names)
    return sorted({_top(name) for name in names}, key=os.fsencode) if inside else []


def _top(name):
    return name.split(os.sep)[0]


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": from_digits,
    "tfds": from_tfds,
    "folder": from_folder,
    "npz": from_npz,
}

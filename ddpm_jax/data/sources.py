"""Sources of images: SOURCES maps the word before the colon in `data.source` to the function that reads it."""

import inspect
import os
import re
from collections.abc import Callable

import numpy as np

from ddpm_jax.config import Data
from ddpm_jax.data.intake import SUFFIXES, find, fit_array, is_picture, read_frames
from ddpm_jax.data.labels import reorder_classes
from ddpm_jax.data.loader import Dataset
from ddpm_jax.data.maps import decode, digest
from ddpm_jax.data.records import from_digits, from_tfds
from ddpm_jax.errors import DataError, first_line
from ddpm_jax.options import to_text
from ddpm_jax.run import shards
from ddpm_jax.run.files import expand
from ddpm_jax.run.log import note

SPLITS = (("train", "training"), ("test", "testing"), ("validation", "valid", "val", "dev"))  # folder names


def load(source: str, image_size: tuple[int, ...] = (), channels: int = 0, **options) -> Dataset:
    """The Dataset of `source`: digits, tfds:NAME, folder:DIR or npz:FILE; `options` are the fields of config.Data.

    Raises DataError when there is no such source, when nothing in it is usable, or when an option does not apply to it.
    """
    kind, _, argument = source.partition(":")
    if kind not in SOURCES:
        raise DataError(f"data.source={source} is none of {', '.join(SOURCES)} (as in folder:my_pictures)")
    if len(image_size) == 1:
        image_size = image_size * 2
    _check_options(kind, source, options)
    dataset = SOURCES[kind](argument, image_size, channels, **options)
    if dataset.images.shape[0] == 0:
        raise DataError(f"data.source={source} holds no images")
    return dataset


def _check_options(kind, source, options):
    """Refuse options that select images but do not apply to this kind of source; report others that have no effect."""
    applicable = inspect.signature(SOURCES[kind]).parameters
    defaults = {name: field.default for name, field in Data.__dataclass_fields__.items()}
    for name in ("split", "range", "frames", "max_unreadable", "data_dir"):
        if name in applicable or options.get(name, defaults[name]) == defaults[name]:
            continue
        option = f"data.{name}={to_text(options[name])}"
        if name in ("split", "range", "frames"):
            raise DataError(f"{option} does not apply to data.source={source}; leave it out")
        note(f"{option} has no effect with data.source={source}")


def from_npz(path: str, image_size: tuple[int, ...], channels: int, **_) -> Dataset:
    """The arrays `images` (and `labels`) of an npz file, or a memory-mapped npy file: uint8 (N, H, W[, C]).

    Without these names, arr_0 (and arr_1), as in samples of guided-diffusion and reference batches of ADM.
    For a folder, the shards of samples that sample.py has written there.
    """
    location = expand(path)
    try:
        file = shards.load(location) if location.is_dir() else np.load(location, mmap_mode="r", allow_pickle=False)
        arrays = {"images": file} if isinstance(file, np.ndarray) else dict(file)
    except DataError:
        raise
    except Exception as error:  # NumPy can raise anything on a damaged file
        raise DataError(f"cannot read {path} as npz: {first_line(error)}") from error
    names = ("images", "labels") if "images" in arrays else ("arr_0", "arr_1")
    others = [name for name in arrays if name.startswith("arr_") and name not in names]
    if names[0] not in arrays or (others and names[0] == "arr_0"):
        raise DataError(f"{path} has no array 'images'; it has {', '.join(arrays) or 'nothing'}")
    images, labels = arrays[names[0]], arrays.get(names[1])
    if images.dtype != np.uint8:
        values = f" from {images.min()} to {images.max()}" if images.dtype.kind in "fiub" and images.size else ""
        raise DataError(f"{names[0]} of {path} are {images.dtype}{values}; scale to 0..255, round, save as uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"{names[0]} of {path} have the shape {images.shape}; (N, height, width, 1 or 3) is needed")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise DataError(f"{names[1]} of {path} are {labels.dtype} of shape {labels.shape}, not {len(images)} integers")
    if len(images) and images.shape[1:] != (*(image_size or images.shape[1:3]), channels or images.shape[-1]):
        images = np.concatenate([fit_array(image, image_size, channels).images for image in images])
    return Dataset(images, labels)


def from_folder(
    folder,
    image_size,
    channels,
    split="train",
    range=(),
    frames="first",
    max_unreadable=0.1,
    cache_dir="~/.cache/ddpm_jax",
    **_,
):
    """All pictures below a folder, or its subfolder `split`, cached as a memory map until one of them changes.

    The labels number the subfolders in natural order (2 before 10). There are none if a picture is in no subfolder.
    """
    if not folder:
        raise DataError("data.source=folder: names no folder; use for example --config.data.source=folder:my_pictures")
    folder = expand(folder)
    if not os.path.isdir(folder):  # unlike Path.is_dir this never raises
        raise DataError(f"there is no folder {folder} (data.source=folder:{folder})")
    if not image_size:
        raise DataError("data.image_size is needed for a folder of pictures, for example --config.data.image_size=64")
    try:
        files = find(folder)
    except OSError as error:
        where = os.fsdecode(error.filename)
        raise DataError(f"cannot list {where} (data.source=folder:{folder}): {error.strerror}") from error
    names = [os.path.relpath(path, folder) for path, _, _ in files]
    subfolder = _split_folder(folder, names, split)
    if subfolder:
        folder /= subfolder
        files = [file for file, name in zip(files, names, strict=True) if _top(name) == subfolder]
        names = [name[len(subfolder) + 1 :] for name in names if _top(name) == subfolder]
    if not any(is_picture(path) for path, _, _ in files):
        raise DataError(f"no pictures in {folder}; looked for {' '.join('*' + suffix for suffix in SUFFIXES)}")
    classes = _classes(names)
    in_order = tuple(sorted(classes, key=_natural))
    if classes:
        examples = ", ".join(map(repr, in_order[:5])) + ", ..." * (len(classes) > 5)
        note(f"{folder}: labels from the names of {len(classes)} subfolders, {examples}")
    label = {name: i for i, name in enumerate(classes)}

    def get(path):
        found = read_frames(path, image_size, channels or 3, range, frames == "all")
        if range and not found.values:
            raise ValueError("8 bits per value, but data.range is for more")
        return found, label.get(_top(os.path.relpath(path, folder)), -1)

    options = f":{range}:{frames}" if range or frames != "first" else ""
    dataset = decode(
        f"folder:{folder.resolve()}{options}",
        digest(repr((classes, names, [size_and_time for _, *size_and_time in files], range, frames))),
        [path for path, _, _ in files],
        get,
        (*image_size, channels or 3),
        max_unreadable,
        cache_dir,
        range,
    )
    return reorder_classes(dataset._replace(classes=tuple(classes)), in_order)


def _split_folder(folder, names, split):
    """The subfolder of `folder` with its `split`, or "" for the whole folder; `names`: the relative paths of its files.

    The default, train, is the whole folder unless two or more of its subfolders, or all, have the name of a split.
    """
    tops = sorted({_top(name) for name in names if os.sep in name})
    splits = [top for top in tops if any(top.lower() in synonyms for synonyms in SPLITS)]
    has_loose_pictures = any(os.sep not in name for name in names if is_picture(name))
    is_divided = len(splits) > 1 or (splits and splits == tops and not has_loose_pictures)
    if split == "all" or (split == Data.split and not is_divided):
        return ""
    synonyms = next((synonyms for synonyms in SPLITS if split.lower() in synonyms), ())
    matches = [top for top in tops if top == split] or [top for top in tops if top.lower() in synonyms]
    if len(matches) != 1:
        present = ", ".join(splits or tops[:5]) or "none"
        raise DataError(
            f"{folder} has no subfolder for data.split={split}; it has {present}; data.split=all uses all of it"
        )
    note(f"{folder}: split {matches[0]} of {', '.join(splits or matches)}; data.split=all uses all of it")
    return matches[0]


def _classes(names):
    """The top-level subfolders, in byte order, if every picture is in one, however deep; [] otherwise."""
    inside = all(os.sep in name for name in names if is_picture(name))
    return sorted({_top(name) for name in names if os.sep in name}, key=os.fsencode) if inside else []


def _natural(name):
    """A sort key that compares numbers inside names as numbers and the rest as bytes."""
    parts = re.split("([0-9]+)", name)  # every second part is a number
    return [int(part) if i % 2 else os.fsencode(part) for i, part in enumerate(parts)], os.fsencode(name)


def _top(name):
    return name.split(os.sep)[0]


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": from_digits,
    "tfds": from_tfds,
    "folder": from_folder,
    "npz": from_npz,
}

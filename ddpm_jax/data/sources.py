"""Where images come from: SOURCES maps the word before the colon of `data.source` to a function that reads it."""

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ddpm_jax.data.intake import SUFFIXES, find, fit, read
from ddpm_jax.data.loader import Dataset
from ddpm_jax.errors import DataError
from ddpm_jax.files import locked, write_atomic
from ddpm_jax.log import note, progress


def load(source, image_size=(), channels=0, **options):
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


def from_npz(path, image_size, channels, **_):
    """`images` (and `labels`) of an npz file, or a lone npy file, which is mapped: uint8 (N, H, W[, C])."""
    try:
        file = np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
        arrays = {"images": file} if isinstance(file, np.ndarray) else {name: file[name] for name in file.files}
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise DataError(f"cannot read {path} as npz: {_first_line(error)}") from error
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
        images = np.stack([_fit_array(image, image_size, channels) for image in images])
    return Dataset(images, labels)


def from_folder(folder, image_size, channels, max_unreadable=0.1, cache_dir="~/.cache/ddpm_jax", **_):
    """All pictures below a folder, decoded once into a memory map; a changed folder is decoded anew."""
    if not folder:
        raise DataError("data.source=folder: names no folder; say for example --config.data.source=folder:my_pictures")
    folder = Path(os.path.expanduser(folder))
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
    return _decode(
        f"folder:{folder.resolve()}",
        _digest(repr([(os.path.relpath(p, folder), s, m) for p, s, m in files])),
        [path for path, _, _ in files],
        lambda path: (read(path, image_size, channels or 3), -1),
        (*image_size, channels or 3),
        max_unreadable,
        cache_dir,
    )


def from_tfds(name, image_size, channels, split="train", data_dir="", cache_dir="~/.cache/ddpm_jax", **_):
    """A split of a prepared TFDS data set (array_record), without TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = _first_line(error)
        raise DataError(f"TFDS cannot open data set {name} (data.source=tfds:{name}): {reason}") from error
    return _from_builder(builder, image_size, channels, split, cache_dir)


def from_digits(_, image_size, channels, split="train", data_dir="", cache_dir="~/.cache/ddpm_jax", **__):
    """scikit-learn's 1,797 handwritten digits; the first use prepares them as a TFDS data set, without a network."""
    import tensorflow_datasets as tfds

    from ddpm_jax.data.digits import Digits

    def open_builder():
        try:
            return Digits(data_dir=data_dir or None, file_format="array_record")
        except ValueError as error:
            reason = _first_line(error)
            raise DataError(f"cannot use the prepared digits: {reason}; give another data.data_dir") from error

    builder = open_builder()
    if not builder.is_prepared():
        folder = Path(builder.data_dir).parent
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            builder = open_builder()  # perhaps another process has prepared them meanwhile
            if not builder.is_prepared():
                note(f"preparing the digits in {builder.data_dir}")
                tfds.disable_progress_bar()
                builder.download_and_prepare()
    return _from_builder(builder, image_size, channels, split, cache_dir)


SOURCES = {"digits": from_digits, "tfds": from_tfds, "folder": from_folder, "npz": from_npz}


def _from_builder(builder, image_size, channels, split, cache_dir):
    try:
        rows = builder.as_data_source(split=split)
        if "image" not in builder.info.features:
            raise DataError(f"TFDS data set {builder.info.full_name} has no feature 'image'")
        rows[0]  # only now is a file opened
    except (RuntimeError, ValueError, LookupError, AssertionError, OSError) as error:
        raise DataError(
            f"TFDS data set {builder.info.full_name} is not prepared as array_record in {builder.data_dir}, or has no "
            f"split {split}; prepare it with download_and_prepare(file_format='array_record') ({_first_line(error)})"
        ) from error
    features = builder.info.features
    labelled = "label" in features
    if not image_size and None in features["image"].shape[:2]:
        raise DataError(
            f"{builder.info.full_name} has images of several sizes; --config.data.image_size=64 makes them one"
        )

    def get(i):
        row = rows[int(i)]
        return _fit_array(row["image"], image_size, channels), int(row["label"]) if labelled else -1

    return _decode(
        f"tfds:{builder.data_dir}:{split}:{image_size}:{channels}",
        f"{builder.info.full_name}:{len(rows)}",
        range(len(rows)),
        get,
        get(0)[0].shape,
        0.0,
        cache_dir,
    )


def _digest(text):
    return hashlib.sha256(text.encode("utf8", "backslashreplace")).hexdigest()  # names need not be UTF-8


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def _fit_array(image, image_size, channels):
    from PIL import Image

    height, width, bands = image.shape
    if (height, width, bands) == (*(image_size or (height, width)), channels or bands):
        return image
    return fit(Image.fromarray(image[..., 0] if bands == 1 else image), image_size, channels)


def _decode(name, state, items, get, shape, max_unreadable, cache_dir):
    """get(item) -> (image, label or -1) of every item, with all cores, as a memory map kept under `cache_dir`.

    `name` says which map it is, `state` in which state its source was when it was made. Of several processes one
    decodes and the others wait. Items that cannot be read are counted and the first five named; more than the share
    `max_unreadable` of them is an error.
    """
    base = Path(cache_dir).expanduser() / _digest(f"{name}:{shape}")[:16]

    def attempt(item):
        reason = None
        for _ in range(2):  # a network folder may fail once
            try:
                image, label = get(item)
                if image.shape != shape:
                    raise ValueError(f"its shape is {image.shape}, not {shape}")
                return image, label, None
            except Exception as error:  # whatever a damaged file makes Pillow raise
                reason = repr(f"{item} ({_first_line(error)})")[1:-1]  # names need be neither UTF-8 nor printable
        return None, None, reason

    def kept():
        found = _open_map(base, state)
        if found and any(attempt(items[i])[2] is None for i, _ in found[0]):
            return None  # what could not be read can be by now
        return found

    found = kept()
    if not found:
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            with locked(base.with_suffix(".lock")):
                found = kept()  # made by another process meanwhile
                if not found:
                    _check_room(base.parent, len(items) * math.prod(shape))
                    _write_map(base, name, state, items, attempt, shape)
                    found = _open_map(base, state)
        except OSError as error:
            raise DataError(
                f"cannot write to data.cache_dir={cache_dir}: {error.strerror}; give another one"
            ) from error
    bad, images, labels = found
    if len(bad) > max_unreadable * len(items):
        raise DataError(
            f"{_unreadable(bad, items)}, more than data.max_unreadable={max_unreadable:g} of them; mend or remove them"
        )
    if bad:
        warnings.warn(f"{_unreadable(bad, items)}; they are left out", stacklevel=2)
    return Dataset(images, None if (labels < 0).any() else labels)


def _unreadable(bad, items):
    return f"{len(bad)} of {len(items)} pictures cannot be read: {'; '.join(reason for _, reason in bad[:5])}"


def _check_room(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"the decoded images need {size / 1e9:,.1f} GB, data.cache_dir={folder} has {free / 1e9:,.1f} GB; "
            "free some or give another one"
        )


def _paths(base):
    return [base.with_suffix(suffix) for suffix in (".json", ".npy", ".labels.npy")]


def _open_map(base, state):
    """([(item's number, why it cannot be read)], images, labels) of a map; None if there is none of that state."""
    about, images, labels = _paths(base)
    try:
        text = about.read_text()
        told = json.loads(text)
        found = told["unreadable"], np.load(images, mmap_mode="r"), np.load(labels)
        same = told["state"] == state and about.read_text() == text  # not exchanged since by another process
    except (OSError, ValueError, EOFError, KeyError):
        return None
    return found if same else None


def _write_map(base, name, state, items, attempt, shape):
    about, images, labels = _paths(base)
    about.unlink(missing_ok=True)  # it no longer tells the truth, also when decoding fails
    part, bad, kept = base.with_suffix(".part"), [], []
    try:
        with part.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            _write_header(file, (len(items), *shape))
            few = (items[i : i + 256] for i in range(0, len(items), 256))  # so that memory stays flat
            done = (result for some in few for result in pool.map(attempt, some))
            for i, (image, label, reason) in enumerate(progress(done, len(items), "decoding")):
                if reason:
                    bad.append((i, reason))
                else:
                    file.write(image.tobytes())
                    kept.append(label)
            file.seek(0)
            _write_header(file, (len(kept), *shape))  # as long as before: NumPy leaves room for any first number
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, images)
    finally:
        part.unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(kept, np.int32))
    write_atomic(labels, buffer.getvalue())
    write_atomic(about, json.dumps({"name": name, "state": state, "unreadable": bad}).encode())


def _write_header(file, shape):
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

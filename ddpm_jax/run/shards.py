"""Samples written while they are drawn: numbered npz files (shards) in a folder, from which the same command resumes.

samples.json beside them records everything that the images depend on. Shard k holds `size` images from k * size on;
only the last one may hold fewer.
"""

import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from ddpm_jax.errors import ConfigError, DataError, first_line
from ddpm_jax.run import trees
from ddpm_jax.run.files import atomic

SETTINGS, PATTERN = "samples.json", "samples-[0-9]*.npz"
SHARD_BYTES = 2**26  # of a shard's images, unless the number of images is given
FLUSH_SECONDS = 60.0  # after which a partial shard is written too


def path(folder: Path, index: int) -> Path:
    return folder / f"samples-{index:05}.npz"


def files(folder: Path) -> list[Path]:
    """The shards in a folder, in order."""
    return sorted(folder.glob(PATTERN), key=lambda file: (len(file.name), file.name))


def _read(file):
    """{"images", "labels"?} of a shard; DataError when its checksums do not match or it is damaged otherwise."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy can raise anything on a damaged file
        raise DataError(f"cannot read {file}: {first_line(error)}") from error


def resume(folder: Path, settings: dict, environment: dict, size: int, overwrite=False) -> tuple[int, list[str]]:
    """(number of images in the folder, lines on what has changed) for samples with these settings.

    Raises ConfigError when the folder has samples with other settings; `overwrite` deletes them instead. Shards from a
    damaged one on are deleted. `environment` may differ: the images then agree to rounding.
    """
    file = folder / SETTINGS
    if not file.exists():
        remove(folder)
        return 0, []
    try:
        there = json.loads(file.read_text())
        differ = trees.differences(there["settings"], settings, "{} is {!r} there, {!r} here")
        changed = trees.differences(there["environment"], environment, "{} {} is now {}")
    except (ValueError, KeyError, TypeError) as error:
        differ, changed = [f"{SETTINGS} is damaged: {first_line(error)}"], []
    if differ and not overwrite:
        why = "; ".join(differ[:10])
        raise ConfigError(f"{folder} holds samples of other settings ({why}); take another --out, or add --overwrite")
    if differ:
        remove(folder)
        return 0, []
    done = _count_intact(folder, size)
    for rest in files(folder)[-(-done // size) :]:
        rest.unlink()
    return done, [f"the same images only to rounding from here on: {'; '.join(changed)}"] if changed else []


def _count_intact(folder, size):
    """The number of images up to the first shard that is partial, missing or damaged."""
    done = 0
    while path(folder, done // size).exists():
        try:
            count = len(_read(path(folder, done // size))["images"])
        except (DataError, KeyError) as error:
            warnings.warn(f"redrawing the images from {done} on: {error}", stacklevel=3)
            break
        done += count
        if count != size:
            break
    return done


def write(
    folder: Path,
    batches: Iterable[np.ndarray],
    shape: tuple[int, ...],
    done: int,
    size: int,
    labels: np.ndarray | None = None,
    before_write: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], int | None] = lambda: None,
) -> tuple[int, np.ndarray, int | None]:
    """(number of images in full shards, remaining images, exit code) of `batches` (b, H, W, C) from image `done` on.

    Full shards are written immediately. A partial one is written every FLUSH_SECONDS, and when stop_requested() gives
    an exit code, which ends the drawing. before_write() is called before each write; few images may need none.
    """
    base, code, last = done // size * size, None, time.monotonic()
    pending = [_read(path(folder, done // size))["images"] if done % size else np.zeros((0, *shape), np.uint8)]
    for batch in batches:
        pending.append(batch)
        done, code = done + len(batch), stop_requested()
        if code is None and done - base < size and time.monotonic() - last < FLUSH_SECONDS:
            continue
        before_write()
        images = np.concatenate(pending)
        add(folder, base, size, images, labels)
        pending, last = [images[(done // size * size) - base :]], time.monotonic()
        base = done // size * size
        if code is not None:
            break
    return base, np.concatenate(pending), code


def add(folder: Path, base: int, size: int, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write the images from `base` on, a multiple of `size`, into shards."""
    for first in range(0, len(images), size):
        part, start = images[first : first + size], base + first
        others = {} if labels is None else {"labels": labels[start : start + len(part)]}
        save(path(folder, start // size), len(part), [part], **others)


def chunks(folder: Path, base: int, size: int, rest: np.ndarray) -> Iterator[np.ndarray]:
    """All images in order: the first `base`, which are in full shards, and the `rest`."""
    for index in range(base // size):
        yield _read(path(folder, index))["images"]
    yield rest


def load(folder: Path) -> dict[str, np.ndarray]:
    """{"images": uint8 (N, H, W, C), "labels"?} of all shards; DataError when one is missing or damaged.

    Warns when sampling was interrupted before the last image.
    """
    try:
        num = json.loads((folder / SETTINGS).read_text())["settings"]["num"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no samples in shards: {SETTINGS}: {first_line(error)}") from error
    found, done, labels = files(folder), 0, []
    if not found or found != [path(folder, index) for index in range(len(found))]:
        raise DataError(f"{folder} lacks some shards; it has {', '.join(file.name for file in found) or 'none'}")
    images = np.empty((num, *_read(found[0])["images"].shape[1:]), np.uint8)
    for part in map(_read, found):
        images[done : done + len(part["images"])] = part["images"]
        done += len(part["images"])
        labels.append(part.get("labels"))
    if done < num:
        warnings.warn(f"{folder} holds {done:,} of {num:,} samples: sampling is not finished", stacklevel=3)
    return {"images": images[:done]} | ({} if labels[0] is None else {"labels": np.concatenate(labels)})


def remove(folder: Path) -> None:
    """Delete the shards and samples.json."""
    for file in (*files(folder), folder / SETTINGS):
        file.unlink(missing_ok=True)


def save(file: Path, num: int, chunks: Iterable[np.ndarray], **others: np.ndarray) -> None:
    """Write `num` images (uint8, (num, H, W, C)), given in chunks, and other arrays to an npz file."""
    with atomic(file) as out, zipfile.ZipFile(out, "w") as archive:
        header = None
        with archive.open("images.npy", "w", force_zip64=True) as member:
            for chunk in chunks:
                if header is None:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *chunk.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(chunk).data)
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)

"""Images that are written as they are made: numbered npz files of a folder, from which the same command goes on.

Beside them samples.json has all that the images depend on. Shard k has the images from k times `size` on; only the last
may hold fewer.
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
BYTES = 2**26  # of a shard's images, unless their number is asked for
SECONDS = 60.0  # after which also a shard that is not full is written


def path(folder: Path, index: int) -> Path:
    return folder / f"samples-{index:05}.npz"


def files(folder: Path) -> list[Path]:
    """The shards in a folder, in turn."""
    return sorted(folder.glob(PATTERN), key=lambda file: (len(file.name), file.name))


def _read(file):
    """{"images", "labels"?} of a shard, whose checksums are compared; DataError when it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise DataError(f"cannot read {file}: {first_line(error)}") from error


def resume(folder: Path, settings: dict, environment: dict, size: int, overwrite=False) -> tuple[int, list[str]]:
    """(number of images that are there, lines on what has changed) for samples of these settings.

    Raises ConfigError when the folder has those of others, unless they may be overwritten: then they are deleted. So is
    what follows a damaged shard. `environment` may differ: the images then agree to rounding.
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
        told = "; ".join(differ[:10])
        raise ConfigError(f"{folder} holds samples of other settings ({told}); take another --out, or say --overwrite")
    if differ:
        remove(folder)
        return 0, []
    done = _whole(folder, size)
    for left in files(folder)[-(-done // size) :]:
        left.unlink()
    return done, [f"the same images only to rounding from here on: {'; '.join(changed)}"] if changed else []


def _whole(folder, size):
    """How many images lie in the first shards, up to one that is not full, missing or damaged."""
    done = 0
    while path(folder, done // size).exists():
        try:
            count = len(_read(path(folder, done // size))["images"])
        except (DataError, KeyError) as error:
            warnings.warn(f"made again from image {done} on: {error}", stacklevel=3)
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
    start: Callable[[], None] = lambda: None,
    asked: Callable[[], int | None] = lambda: None,
) -> tuple[int, np.ndarray, int | None]:
    """(number of images in full shards, those after them, exit code) of `batches` (b, H, W, C) from image `done` on.

    Shards are written as they come; one that is not full once a minute, and when asked() gives an exit code, after
    which no further batch is taken. start() is called before that: of few images that come fast there are no shards.
    """
    base, code, last = done // size * size, None, time.monotonic()
    pending = [_read(path(folder, done // size))["images"] if done % size else np.zeros((0, *shape), np.uint8)]
    for batch in batches:
        pending.append(batch)
        done, code = done + len(batch), asked()
        if code is None and done - base < size and time.monotonic() - last < SECONDS:
            continue
        start()
        images = np.concatenate(pending)
        add(folder, base, size, images, labels)
        pending, last = [images[(done // size * size) - base :]], time.monotonic()
        base = done // size * size
        if code is not None:
            break
    return base, np.concatenate(pending), code


def add(folder: Path, base: int, size: int, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write the images from `base` on, where a shard begins, into shards."""
    for first in range(0, len(images), size):
        part, at = images[first : first + size], base + first
        others = {} if labels is None else {"labels": labels[at : at + len(part)]}
        save(path(folder, at // size), len(part), [part], **others)


def chunks(folder: Path, base: int, size: int, left: np.ndarray) -> Iterator[np.ndarray]:
    """All images in turn: the first `base`, of full shards, and those that are `left`."""
    for index in range(base // size):
        yield _read(path(folder, index))["images"]
    yield left


def load(folder: Path) -> dict[str, np.ndarray]:
    """{"images": uint8 (N, H, W, C), "labels"?} of all shards; DataError where one is missing or damaged.

    Warns when they are not yet all.
    """
    try:
        num = json.loads((folder / SETTINGS).read_text())["settings"]["num"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no samples in shards: {SETTINGS}: {first_line(error)}") from error
    found, done, labels = files(folder), 0, []
    if not found or found != [path(folder, index) for index in range(len(found))]:
        raise DataError(f"{folder} lacks some of its shards; it has {', '.join(file.name for file in found) or 'none'}")
    images = np.empty((num, *_read(found[0])["images"].shape[1:]), np.uint8)
    for part in map(_read, found):
        images[done : done + len(part["images"])] = part["images"]
        done += len(part["images"])
        labels.append(part.get("labels"))
    if done < num:
        warnings.warn(f"{folder} holds {done:,} of {num:,} samples: sampling has not come to its end", stacklevel=3)
    return {"images": images[:done]} | ({} if labels[0] is None else {"labels": np.concatenate(labels)})


def remove(folder: Path) -> None:
    """Delete the shards and what is told of them."""
    for file in (*files(folder), folder / SETTINGS):
        file.unlink(missing_ok=True)


def save(file: Path, num: int, chunks: Iterable[np.ndarray], **others: np.ndarray) -> None:
    """Write `num` images, uint8 (num, H, W, C), that come in chunks, and other arrays as np.savez does."""
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

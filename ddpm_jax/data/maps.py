"""Decoded images cached as a memory map: written once with all cores by one of the processes, then only opened."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import warnings

import numpy as np

from ddpm_jax.data.intake import LEVELS
from ddpm_jax.data.loader import Dataset, prefetch
from ddpm_jax.errors import DataError, first_line
from ddpm_jax.run.files import cache_folder, locked, write_atomic
from ddpm_jax.run.log import note, progress_bar

GROUP = 8  # items per task of a thread, to keep the overhead small


def digest(text):
    return hashlib.sha256(text.encode("utf8", "backslashreplace")).hexdigest()  # names need not be UTF-8


def decode(name, state, items, get, shape, max_unreadable, cache_dir, levels=()):
    """get(item) -> (intake.Frames, label or -1) of every item, with all cores, as a memory map under `cache_dir`.

    `name` identifies the map, `state` the content of its source when it was written. One process decodes while the
    others wait. Unreadable items are skipped with a warning that names the first five; more than the share
    `max_unreadable` of them is an error. Reports the frames that were left out, and for values of more than 8 bits
    their range and the two `levels` that became black and white.
    """
    base = cache_folder(cache_dir) / digest(f"{name}:{shape}")[:16]

    def attempt(item):
        reason = None
        for _ in range(2):  # a network folder may fail once
            try:
                frames, label = get(item)
                if frames.images.shape[1:] != shape:
                    raise ValueError(f"its shape is {frames.images.shape[1:]}, not {shape}")
                return frames, label, None
            except Exception as error:  # Pillow can raise anything on a damaged file
                reason = repr(f"{item} ({first_line(error)})")[1:-1]  # names may be neither UTF-8 nor printable
        return None, None, reason

    bad, images, labels, facts = _open_or_write(base, name, state, items, attempt, shape, cache_dir)
    unreadable = f"{len(bad)} of {len(items)} pictures cannot be read: {'; '.join(reason for _, reason in bad[:5])}"
    if len(bad) > max_unreadable * len(items):
        raise DataError(f"{unreadable}, more than data.max_unreadable={max_unreadable:g} of them; mend or remove them")
    if bad:
        warnings.warn(f"{unreadable}; they are left out", stacklevel=2)
    _report(facts, levels)
    return Dataset(images, None if (labels < 0).any() else labels)


def _open_or_write(base, name, state, items, attempt, shape, cache_dir):
    """The map as _open_map gives it; decoded first if there is none, or if an unreadable item has become readable."""

    def cached():
        found = _open_map(base, state)
        return None if found and any(attempt(items[i])[2] is None for i, _ in found[0]) else found

    found = cached()
    if found:
        return found
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with locked(base.with_suffix(".lock")):
            found = cached()  # another process may have written it meanwhile
            if found:
                return found
            _check_disk_space(base.parent, len(items) * math.prod(shape))
            _write_map(base, name, state, items, attempt, shape)
            return _open_map(base, state)
    except OSError as error:
        raise DataError(f"cannot write to data.cache_dir={cache_dir}: {error.strerror}; give another one") from error


def _report(facts, levels):
    """Say what the images lack of their source."""
    if facts.get("frames_left_out"):
        files, frames = facts["frames_left_out"]
        note(f"{frames:,} further frames of {files:,} files are left out; data.frames=all reads them too")
    if not facts.get("values"):
        return
    (lowest, highest), (low, high) = facts["values"], levels or LEVELS
    values = f"the values of more than 8 bits range from {lowest:,g} to {highest:,g}"
    scaled = f"{low:,g} becomes black and {high:,g} white"
    if lowest < low or highest > high:
        warnings.warn(f"{values}, but {scaled} by data.range: those outside are clipped", stacklevel=3)
    elif not levels and highest - lowest < (high - low) / 2:  # 15 bits or fewer are used
        gray = f"at most {math.ceil(256 * (highest - lowest + 1) / (high - low + 1)) + 1} of 256 gray levels are left"
        warnings.warn(
            f"{values}, but {scaled}: {gray}; use data.range={lowest:g},{highest:g}, or the range of your device such "
            "as 0,4095",
            stacklevel=3,
        )
    else:
        note(f"{values}; {scaled}")


def _check_disk_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"the decoded images need {size / 1e9:,.1f} GB, data.cache_dir={folder} has {free / 1e9:,.1f} GB; "
            "free some or give another one"
        )


def _paths(base):
    return [base.with_suffix(suffix) for suffix in (".json", ".npy", ".labels.npy")]


def _open_map(base, state):
    """([(item's number, why it cannot be read)], images, labels, facts) of a map; None if none has this state."""
    about, images, labels = _paths(base)
    try:
        text = about.read_text()
        entries = json.loads(text)
        found = entries["unreadable"], np.load(images, mmap_mode="r"), np.load(labels), entries.get("facts", {})
        same = entries["state"] == state and about.read_text() == text  # another process may just have replaced it
    except (OSError, ValueError, EOFError, KeyError):
        return None
    return found if same else None


def _write_map(base, name, state, items, attempt, shape):
    about, images, labels = _paths(base)
    about.unlink(missing_ok=True)  # it is out of date, even if decoding fails
    part, bad, kept_labels, left_out, values = base.with_suffix(".part"), [], [], [], []
    try:
        cores = os.cpu_count()
        groups = prefetch(
            lambda i: [attempt(item) for item in items[GROUP * i : GROUP * (i + 1)]],
            0,
            -(-len(items) // GROUP),
            ahead=2 * cores,  # bounds the memory
            threads=cores,
        )
        with part.open("wb") as file, contextlib.closing(groups):
            _write_header(file, (len(items), *shape))
            results = (result for group in groups for result in group)
            for i, (frames, label, reason) in enumerate(progress_bar(results, len(items), "decoding")):
                if reason:
                    bad.append((i, reason))
                else:
                    file.write(frames.images.tobytes())
                    kept_labels += [label] * len(frames.images)
                    left_out += [frames.left_out] * (frames.left_out > 0)
                    values += frames.values or ()
            file.seek(0)
            _write_header(file, (len(kept_labels), *shape))  # same length: NumPy pads it for any first dimension
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, images)
    finally:
        part.unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(kept_labels, np.int32))
    write_atomic(labels, buffer.getvalue())
    facts = {"frames_left_out": [len(left_out), sum(left_out)] if left_out else None}
    facts["values"] = [min(values), max(values)] if values else None
    write_atomic(about, json.dumps({"name": name, "state": state, "unreadable": bad, "facts": facts}).encode())


def _write_header(file, shape):
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

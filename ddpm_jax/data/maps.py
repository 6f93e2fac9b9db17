"""Decoded images kept as a memory map: made once with all cores, by one of several processes, then only opened."""

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
from ddpm_jax.run.log import note, progress

GROUP = 8  # items that a thread decodes at once, so that it gets on for a while


def digest(text):
    return hashlib.sha256(text.encode("utf8", "backslashreplace")).hexdigest()  # names need not be UTF-8


def decode(name, state, items, get, shape, max_unreadable, cache_dir, levels=()):
    """get(item) -> (intake.Frames, label or -1) of every item, with all cores, as a memory map kept under `cache_dir`.

    `name` says which map it is, `state` in which state its source was when it was made. Of several processes one
    decodes and the others wait. Items that cannot be read are counted and the first five named; more than the share
    `max_unreadable` of them is an error. It is told how many frames were left out, and how values of more than 8 bits
    lie between the two of `levels` from which they were scaled.
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
            except Exception as error:  # whatever a damaged file makes Pillow raise
                reason = repr(f"{item} ({first_line(error)})")[1:-1]  # names need be neither UTF-8 nor printable
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
    bad, images, labels, facts = found
    if len(bad) > max_unreadable * len(items):
        raise DataError(
            f"{_unreadable(bad, items)}, more than data.max_unreadable={max_unreadable:g} of them; mend or remove them"
        )
    if bad:
        warnings.warn(f"{_unreadable(bad, items)}; they are left out", stacklevel=2)
    _tell(facts, levels)
    return Dataset(images, None if (labels < 0).any() else labels)


def _unreadable(bad, items):
    return f"{len(bad)} of {len(items)} pictures cannot be read: {'; '.join(reason for _, reason in bad[:5])}"


def _tell(facts, levels):
    """Say what of the source is not in the images."""
    if facts.get("frames_left_out"):
        files, frames = facts["frames_left_out"]
        note(f"{frames:,} further frames of {files:,} files are left out; data.frames=all takes them too")
    if not facts.get("values"):
        return
    (lowest, highest), (low, high) = facts["values"], levels or LEVELS
    told = f"the values of more than 8 bits run from {lowest:,g} to {highest:,g}"
    scaled = f"{low:,g} becomes black and {high:,g} white"
    if lowest < low or highest > high:
        warnings.warn(f"{told}, but {scaled} by data.range: those outside are clipped", stacklevel=3)
    elif not levels and highest - lowest < (high - low) / 2:  # 15 bits or fewer are used
        gray = f"at most {math.ceil(256 * (highest - lowest + 1) / (high - low + 1)) + 1} of 256 gray levels are left"
        warnings.warn(
            f"{told}, but {scaled}: {gray}; data.range={lowest:g},{highest:g}, or the range of your device such as "
            "0,4095, takes it all",
            stacklevel=3,
        )
    else:
        note(f"{told}; {scaled}")


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
    """([(item's number, why it cannot be read)], images, labels, facts) of a map; None if there is none so."""
    about, images, labels = _paths(base)
    try:
        text = about.read_text()
        told = json.loads(text)
        found = told["unreadable"], np.load(images, mmap_mode="r"), np.load(labels), told.get("facts", {})
        same = told["state"] == state and about.read_text() == text  # not exchanged since by another process
    except (OSError, ValueError, EOFError, KeyError):
        return None
    return found if same else None


def _write_map(base, name, state, items, attempt, shape):
    about, images, labels = _paths(base)
    about.unlink(missing_ok=True)  # it no longer tells the truth, also when decoding fails
    part, bad, kept, left_out, values = base.with_suffix(".part"), [], [], [], []
    try:
        cores = os.cpu_count()
        groups = prefetch(
            lambda i: [attempt(item) for item in items[GROUP * i : GROUP * (i + 1)]],
            0,
            -(-len(items) // GROUP),
            ahead=2 * cores,  # so that memory stays flat
            threads=cores,
        )
        with part.open("wb") as file, contextlib.closing(groups):
            _write_header(file, (len(items), *shape))
            done = (result for group in groups for result in group)
            for i, (frames, label, reason) in enumerate(progress(done, len(items), "decoding")):
                if reason:
                    bad.append((i, reason))
                else:
                    file.write(frames.images.tobytes())
                    kept += [label] * len(frames.images)
                    left_out += [frames.left_out] * (frames.left_out > 0)
                    values += frames.values or ()
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
    facts = {"frames_left_out": [len(left_out), sum(left_out)] if left_out else None}
    facts["values"] = [min(values), max(values)] if values else None
    write_atomic(about, json.dumps({"name": name, "state": state, "unreadable": bad, "facts": facts}).encode())


def _write_header(file, shape):
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

"""A file cache of the features of a data set, valid only for the same images and the same weights."""

import hashlib
import json
import os
import zlib

import jax
import numpy as np

from ddpm_jax.errors import DataError
from ddpm_jax.evaluation.features import extract
from ddpm_jax.run.files import cache_folder, locked, write_atomic
from ddpm_jax.run.log import note

FORMAT = 1  # increase when an extractor computes other features from the same weights


def digest(array):
    """The CRC-32 of an array, possibly memory-mapped, as text."""
    crc = 0
    for start in range(0, len(array), 1000):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + 1000]), crc)
    return f"{crc:08x}"


def cached_features(extractor, images, where, folder, batch_size=64, progress=lambda done: None):
    """(float32 (N, d) mapped from a file below `folder`, its provenance): the features of uint8 (N, H, W, C).

    where: {"source", "split"} of the images. The features are recomputed if the images or the weights have changed or
    the file is damaged; progress(done) is called after each batch. A lock lets one of several processes compute them.
    """
    name = where | {"extractor": extractor.name, "shape": list(images.shape)}
    provenance = name | {"images": digest(images), "sha256": extractor.sha256, "format": FORMAT}
    base = cache_folder(folder) / f"features-{hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with locked(base.with_suffix(".lock")):
            found = _open(base, provenance)
            if found is None:
                note(f"features {extractor.name} of {len(images):,} images of {where['source']}, cached in {base}.npy")
                _write(base, provenance, extractor, images, batch_size, progress)
                found = _open(base, provenance)
    except OSError as error:
        raise DataError(f"cannot write to data.cache_dir={folder}: {error.strerror}; give another one") from error
    return found, provenance


def _open(base, provenance):
    """The cached features, or None if they are missing, damaged or of another provenance."""
    try:
        record = json.loads(base.with_suffix(".json").read_text())
        features = np.load(base.with_suffix(".npy"), mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    same = record.get("made_of") == provenance and record["features"] == digest(features)
    return features if same else None


def _write(base, provenance, extractor, images, batch_size, progress):
    record_file, part, done = base.with_suffix(".json"), base.with_suffix(".part"), 0
    record_file.unlink(missing_ok=True)  # first, as it is invalid even if this fails
    image = jax.ShapeDtypeStruct(images.shape[1:], np.uint8)
    shape = (len(images), *jax.eval_shape(extractor.apply, extractor.params, image).shape)
    try:
        with part.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in extract(extractor, images, batch_size):
                file.write(batch.tobytes())
                done += len(batch)
                progress(done)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, base.with_suffix(".npy"))
    finally:
        part.unlink(missing_ok=True)
    features = np.load(base.with_suffix(".npy"), mmap_mode="r")
    write_atomic(record_file, json.dumps({"made_of": provenance, "features": digest(features)}, indent=2).encode())

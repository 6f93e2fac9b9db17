"""The features of a whole data set, kept in a file that is used again only for the same images and the same weights."""

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

FORMAT = 1  # to be raised when an extractor changes what it makes of the same weights


def digest(array):
    """The CRC-32 of all numbers of an array, also of one mapped from a file, as text."""
    crc = 0
    for start in range(0, len(array), 1000):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + 1000]), crc)
    return f"{crc:08x}"


def reference(extractor, images, where, folder, batch_size=64, feed=lambda done: None):
    """(float32 (N, d) mapped from a file below `folder`, its provenance): the features of uint8 (N, H, W, C).

    where: {"source", "split"} of the images. They are computed anew when the images, the weights or the file itself
    are not what the file was made of; feed(done) is called after each batch then. Of several processes one computes.
    """
    name = where | {"extractor": extractor.name, "shape": list(images.shape)}
    made_of = name | {"images": digest(images), "sha256": extractor.sha256, "format": FORMAT}
    base = cache_folder(folder) / f"features-{hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with locked(base.with_suffix(".lock")):
            found = _open(base, made_of)
            if found is None:
                note(f"features {extractor.name} of {len(images):,} images of {where['source']}, kept in {base}.npy")
                _write(base, made_of, extractor, images, batch_size, feed)
                found = _open(base, made_of)
    except OSError as error:
        raise DataError(f"cannot write to data.cache_dir={folder}: {error.strerror}; give another one") from error
    return found, made_of


def _open(base, made_of):
    """The features, or None when there are none made of that, or when their file is damaged."""
    try:
        told = json.loads(base.with_suffix(".json").read_text())
        features = np.load(base.with_suffix(".npy"), mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    same = told.get("made_of") == made_of and told["features"] == digest(features)
    return features if same else None


def _write(base, made_of, extractor, images, batch_size, feed):
    about, part, done = base.with_suffix(".json"), base.with_suffix(".part"), 0
    about.unlink(missing_ok=True)  # it no longer tells the truth, also when this fails
    image = jax.ShapeDtypeStruct(images.shape[1:], np.uint8)
    shape = (len(images), *jax.eval_shape(extractor.apply, extractor.params, image).shape)
    try:
        with part.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in extract(extractor, images, batch_size):
                file.write(batch.tobytes())
                done += len(batch)
                feed(done)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, base.with_suffix(".npy"))
    finally:
        part.unlink(missing_ok=True)
    features = np.load(base.with_suffix(".npy"), mmap_mode="r")
    write_atomic(about, json.dumps({"made_of": made_of, "features": digest(features)}, indent=2).encode())

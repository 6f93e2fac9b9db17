"""Feature extractors: networks that map an image to a vector. EXTRACTORS maps a name to a function that loads one."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import diffusion, parallel
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.evaluation.features import enl0, inception, torchfile
from ddpm_jax.run.files import expand


class Extractor(NamedTuple):
    name: str  # as in reports
    apply: Callable  # (params, uint8 (H, W, C)) -> float32 (d,); one function object per network, for the cache
    params: Any
    sha256: str = ""  # of the weights file
    published: bool = False  # whether these are the features of the published FID


def _flat(params, image):
    return diffusion.to_unit(image).reshape(-1)


def _load_pixels(file):
    return Extractor("pixels", _flat, ())


def _load_enl0(file):
    path = enl0.find()
    sha256 = _sha256(path)
    if sha256 != enl0.SHA256:
        raise CheckpointError(f"{path} has SHA-256 {sha256}, not {enl0.SHA256}; reinstall its package")
    return Extractor(f"ENL0-{enl0.SIZE}", enl0.apply, enl0.params(torchfile.read(path), path), sha256)


def _load_inception(file):
    if not file:
        raise ConfigError("--features=inception needs --inception=FILE, such as pt_inception-2015-12-05-6726825d.pth")
    file = expand(file)
    params, sha256 = inception.params(torchfile.read(file), file), _sha256(file)
    try:
        jax.eval_shape(inception.apply, params, np.zeros((1, 1, 3), np.uint8))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the tensors in {file} do not have Inception's shapes") from error
    return Extractor("inception", inception.apply, params, sha256, sha256 == inception.SHA256)


EXTRACTORS = {"pixels": _load_pixels, "enl0": _load_enl0, "inception": _load_inception}


def load(name, file=""):
    """The Extractor of that name; file: the weights, for an extractor that has none of its own.

    Raises ConfigError for an unknown name or missing weights, CheckpointError for unusable weights.
    """
    if name not in EXTRACTORS:
        raise ConfigError(f"features={name} is not one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](file)


def extract(extractor, pictures, batch_size=64):
    """Yield the features of uint8 (N, H, W, C) as float32 (b, d), computed on all devices of this process.

    Raises CheckpointError for non-finite features.
    """
    params = parallel.replicate(extractor.params)
    for batch in parallel.measure_batches(_pmapped(extractor.apply), params, None, pictures, batch_size):
        if not np.isfinite(batch).all():
            raise CheckpointError(f"features {extractor.name} are not finite; their weights are damaged")
        yield batch


@functools.cache
def _pmapped(apply):
    return parallel.pmap_rows(lambda params, _, image: apply(params, image))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

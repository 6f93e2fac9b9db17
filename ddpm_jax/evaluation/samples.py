"""How far samples are from the data, each number beside the same number of real images."""

import tempfile
import time
import warnings
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import ConfigError, writing
from ddpm_jax.evaluation import features, metrics
from ddpm_jax.evaluation.features import cache

PARTS, LARGEST = 10, 1000  # of samples for KID: at least so many, each of at most so many images
LEAST = 2 * PARTS  # images
MOST = 10_000  # of the data, where a KID is to be quick


def collect(batches, num, shape, say=lambda text: None):
    """uint8 (num, H, W, C) in a nameless file, of images of `shape`; say(text) is called after each batch.

    batches: what the function that program.make_draw gives makes of `num`.
    """
    clock, done = time.monotonic(), 0
    with writing("the folder of temporary files (TMPDIR)"), tempfile.TemporaryFile() as file:
        for batch in batches:
            file.write(batch[:, -1].tobytes())
            done, took = done + len(batch), time.monotonic() - clock
            say(f"{done}/{num} samples, {done / took:.1f} a second")
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=(num, *shape))


class Sets(NamedTuple):
    """What is compared. Real images are held against each other in the same way, as many as there are samples."""

    samples: np.ndarray  # uint8 (N, H, W, C)
    data: np.ndarray
    extractor: features.Extractor | None = None
    of_samples: np.ndarray | None = None  # features (N, d)
    of_data: np.ndarray | None = None

    def real(self, most=None):
        """Features of as many random images of the data as there are samples, or of half of them; and of the rest.

        most: of the rest, where their number makes no difference.
        """
        order = np.random.default_rng(0).permutation(len(self.of_data))
        num = min(len(self.of_samples), len(order) // 2)
        return self.of_data[np.sort(order[:num])], self.of_data[np.sort(order[num:][:most])]


def _number(value, unit, error=None, real=None, **rest):
    found = {"value": float(value), "standard_error": None if error is None else float(error), "unit": unit}
    return found | ({} if real is None else {"real": real}) | rest


def kid(sets):
    """KID x 1000 over parts of the samples."""
    size = min(LARGEST, len(sets.of_samples) // PARTS)
    value, error, parts = metrics.kid_in_parts(sets.of_samples, sets.of_data, size)
    ours, rest = sets.real(MOST)
    real = metrics.kid_in_parts(ours, rest, size)
    real = {"value": 1000 * real[0], "standard_error": 1000 * real[1], "num": len(ours), "against": len(rest)}
    told = _number(1000 * value, "x 1000", 1000 * error, real, subsets=parts, subset_size=size)
    return {f"KID-{sets.extractor.name}": told}


def fid(sets):
    """The Frechet distance; FID by name only when its features are those of the published FID."""
    name = "FID" if sets.extractor.published else f"Frechet distance ({sets.extractor.name})"
    least = min(len(sets.of_samples), len(sets.of_data))
    if least < metrics.FEW:
        warnings.warn(
            f"{name} of {least:,} images is too high by an amount that depends on their number; take "
            f"{metrics.FEW:,} or more, the published figures are of 50,000",
            stacklevel=2,
        )
    ours, rest = sets.real()
    real = {"value": float(metrics.frechet(metrics.moments(ours), metrics.moments(rest)))}
    real |= {"num": len(ours), "against": len(rest)}
    value = metrics.frechet(metrics.moments(sets.of_samples), metrics.moments(sets.of_data))
    return {name: _number(value, "squared distance", real=real)}


def precision_recall(sets):
    """Precision and recall by three neighbours."""
    ours, rest = sets.real()
    found = metrics.precision_recall(sets.of_samples, sets.of_data)
    names, told = ("precision", "recall"), {}
    for name, value, real in zip(names, found, metrics.precision_recall(ours, rest), strict=True):
        real = {"value": float(real), "num": len(ours), "against": len(rest)}
        told[f"{name} ({sets.extractor.name})"] = _number(value, "share", real=real, neighbours=metrics.K)
    return told


def copies(sets):
    """The share of samples that are near twins of one of the data, in pixels and, if there are any, in features."""
    flat = (images.reshape(len(images), -1) for images in (sets.samples, sets.data))
    compared = {"pixels": tuple(flat)}
    if sets.extractor and sets.extractor.name != "pixels":
        compared[sets.extractor.name] = sets.of_samples, sets.of_data
    told = {}
    for name, (samples, data) in compared.items():
        found = metrics.copies(samples, data)
        parts = {"limit": found.limit, "median": found.median, "median within data": found.median_within}
        parts = {part: float(value) for part, value in parts.items()}
        error = (found.share * (1 - found.share) / len(samples)) ** 0.5
        real = {"value": metrics.TWINS}
        told[f"copies ({name})"] = _number(found.share, "share of near twins", error, real, parts=parts)
    return told


def tint(sets):
    """The largest difference of a channel's mean, and of its spread, from the data's; a warning when it shows."""
    ours, data, told = metrics.tint(sets.samples), metrics.tint(sets.data), {}
    for name in ("mean", "spread"):
        values = [getattr(found, name) for found in (ours, data)]
        errors = [getattr(found, f"{name}_error") for found in (ours, data)]
        worst = np.argmax(np.abs(values[0] - values[1]))
        parts = {f"channel {i}": float(value) for i, value in enumerate(values[0])}
        parts |= {f"channel {i} of data": float(value) for i, value in enumerate(values[1])}
        difference, error = (values[0] - values[1])[worst], np.hypot(*errors)[worst]
        told[f"{name} of channels"] = _number(difference, "levels of 255 off", error, parts=parts)
        if metrics.is_off(*values, *errors).any():
            warnings.warn(
                f"the {name} of channel {worst} is {values[0][worst]:.1f} in the samples, {values[1][worst]:.1f} in "
                "the data: their colours or contrast are off",
                stacklevel=2,
            )
    return told


REPORTS = {"kid": kid, "fid": fid, "pr": precision_recall, "copies": copies, "moments": tint}
ON_FEATURES = ("kid", "fid", "pr")  # these need an extractor, copies uses one


def check_numbers(num, num_data):
    """Raise ConfigError when there are too few samples or too few data to judge them by."""
    for number, what in ((num, "samples"), (num_data, "images of the data")):
        if number < LEAST:
            raise ConfigError(f"{number} {what} are too few to judge samples; take {LEAST} or more")


def judge(samples, data, where, metrics, extractor, settings, folder, batch_size=64, say=lambda text: None):
    """{name: number} of the metrics, each with `settings`, the images and the features that it rests on.

    samples, data: uint8 (N, H, W, C); where: {"source", "split"} of the data, whose features are kept below `folder`;
    extractor: None when no metric needs one; say(text) is called after each batch.
    """
    made_of, of_samples, of_data = where | {"images": cache.digest(data)}, None, None
    if extractor:
        of_data, made_of = cache.reference(
            extractor, data, where, folder, batch_size, lambda done: say(f"features of {done}/{len(data)} of the data")
        )
        batches = []
        for batch in features.extract(extractor, samples, batch_size):
            batches.append(batch)
            say(f"features of {sum(map(len, batches))}/{len(samples)} samples")
        of_samples = np.concatenate(batches)
    sets = Sets(samples, data, extractor, of_samples, of_data)
    settings = settings | {"num": len(samples), "images": cache.digest(samples)}
    settings |= {"reference": made_of | {"num": len(data)}}
    found = {}
    for metric in metrics:
        for name, number in REPORTS[metric](sets).items():
            found[name] = number | {"settings": settings}
    return found


def quick_kid(samples, data, where, extractor, folder, say=lambda text: None):
    """KID x 1000 and its standard error, {"kid_enl0_64": value, "kid_enl0_64_error": error}, for the log of a run.

    Against at most `MOST` of the data, evenly spaced; the arguments are those of `judge`.
    """
    rows = np.linspace(0, len(data) - 1, min(len(data), MOST)).astype(int)
    of_data, _ = cache.reference(extractor, data[rows], where, folder, feed=say)
    of_samples = np.concatenate(list(features.extract(extractor, samples)))
    value, error, _ = metrics.kid_in_parts(of_samples, of_data, len(samples) // PARTS)
    name = f"kid_{extractor.name}".lower().replace("-", "_")
    return {name: float(1000 * value), f"{name}_error": float(1000 * error)}

"""Metrics of samples against the data, each beside the same metric of real images."""

import tempfile
import time
import warnings
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import ConfigError, writing
from ddpm_jax.evaluation import features, metrics
from ddpm_jax.evaluation.features import cache
from ddpm_jax.images import evenly_spaced

MIN_SUBSETS, MAX_SUBSET = 10, 1000  # for KID: smallest number of subsets of the samples, largest subset
MIN_IMAGES = 2 * MIN_SUBSETS
MAX_REAL = 10_000  # real images where a KID has to be quick


def collect(batches, num, shape, progress=lambda text: None):
    """uint8 (num, H, W, C), memory-mapped from an anonymous file; progress(text) is called after each batch.

    batches: the generator that the function of program.make_draw returns; shape: (H, W, C).
    """
    start, done = time.monotonic(), 0
    with writing("the folder of temporary files (TMPDIR)"), tempfile.TemporaryFile() as file:
        for batch in batches:
            file.write(batch[:, -1].tobytes())
            done += len(batch)
            progress(f"{done}/{num} samples, {done / (time.monotonic() - start):.1f}/s")
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=(num, *shape))


class Comparison(NamedTuple):
    """Samples and data. As a baseline the same number of real images is compared with the rest in the same way."""

    samples: np.ndarray  # uint8 (N, H, W, C)
    data: np.ndarray
    extractor: features.Extractor | None = None
    of_samples: np.ndarray | None = None  # features (N, d)
    of_data: np.ndarray | None = None

    def split_data(self, limit=None):
        """Features of as many random real images as there are samples (at most half the data), and of the rest.

        limit: the largest number of the rest, for metrics that do not depend on their number.
        """
        order = np.random.default_rng(0).permutation(len(self.of_data))
        num = min(len(self.of_samples), len(order) // 2)
        return self.of_data[np.sort(order[:num])], self.of_data[np.sort(order[num:][:limit])]


def _entry(value, unit, error=None, real=None, **rest):
    entry = {"value": float(value), "standard_error": None if error is None else float(error), "unit": unit}
    return entry | ({} if real is None else {"real": real}) | rest


def kid(comparison):
    """KID x 1000, averaged over subsets of the samples."""
    size = min(MAX_SUBSET, len(comparison.of_samples) // MIN_SUBSETS)
    value, error, subsets = metrics.kid_of_subsets(comparison.of_samples, comparison.of_data, size)
    held_out, rest = comparison.split_data(MAX_REAL)
    real = metrics.kid_of_subsets(held_out, rest, size)
    real = {"value": 1000 * real[0], "standard_error": 1000 * real[1], "num": len(held_out), "against": len(rest)}
    entry = _entry(1000 * value, "x 1000", 1000 * error, real, subsets=subsets, subset_size=size)
    return {f"KID-{comparison.extractor.name}": entry}


def fid(comparison):
    """The Frechet distance; named FID only with the features of the published FID."""
    name = "FID" if comparison.extractor.published else f"Frechet distance ({comparison.extractor.name})"
    num = min(len(comparison.of_samples), len(comparison.of_data))
    if num < metrics.MIN_FOR_FRECHET:
        warnings.warn(
            f"{name} of {num:,} images is too high, by an amount that depends on their number; use "
            f"{metrics.MIN_FOR_FRECHET:,} or more (published figures use 50,000)",
            stacklevel=2,
        )
    held_out, rest = comparison.split_data()
    real = {"value": float(metrics.frechet(metrics.moments(held_out), metrics.moments(rest)))}
    real |= {"num": len(held_out), "against": len(rest)}
    value = metrics.frechet(metrics.moments(comparison.of_samples), metrics.moments(comparison.of_data))
    return {name: _entry(value, "squared distance", real=real)}


def precision_recall(comparison):
    """Precision and recall with K nearest neighbours."""
    held_out, rest = comparison.split_data()
    values = metrics.precision_recall(comparison.of_samples, comparison.of_data)
    baselines, report = metrics.precision_recall(held_out, rest), {}
    for name, value, baseline in zip(("precision", "recall"), values, baselines, strict=True):
        real = {"value": float(baseline), "num": len(held_out), "against": len(rest)}
        report[f"{name} ({comparison.extractor.name})"] = _entry(value, "share", real=real, neighbours=metrics.K)
    return report


def copies(comparison):
    """The share of samples that are near copies of real images, in pixels and, if there are any, in features."""
    flat = (images.reshape(len(images), -1) for images in (comparison.samples, comparison.data))
    compared = {"pixels": tuple(flat)}
    if comparison.extractor and comparison.extractor.name != "pixels":
        compared[comparison.extractor.name] = comparison.of_samples, comparison.of_data
    report = {}
    for name, (samples, data) in compared.items():
        found = metrics.copies(samples, data)
        parts = {"limit": found.limit, "median": found.median, "median within data": found.median_within}
        parts = {part: float(value) for part, value in parts.items()}
        error = (found.share * (1 - found.share) / len(samples)) ** 0.5
        real = {"value": metrics.COPY_QUANTILE}
        report[f"copies ({name})"] = _entry(found.share, "share of near twins", error, real, parts=parts)
    return report


def moments(comparison):
    """The largest difference of a channel's mean and standard deviation from the data's; warns if it is visible."""
    both, report = [metrics.channel_statistics(images) for images in (comparison.samples, comparison.data)], {}
    for name in ("mean", "spread"):
        values = [getattr(statistics, name) for statistics in both]
        errors = [getattr(statistics, f"{name}_error") for statistics in both]
        worst = np.argmax(np.abs(values[0] - values[1]))
        parts = {f"channel {i}": float(value) for i, value in enumerate(values[0])}
        parts |= {f"channel {i} of data": float(value) for i, value in enumerate(values[1])}
        difference, error = (values[0] - values[1])[worst], np.hypot(*errors)[worst]
        report[f"{name} of channels"] = _entry(difference, "levels of 255 off", error, parts=parts)
        if metrics.differs_visibly(*values, *errors).any():
            warnings.warn(
                f"the {name} of channel {worst} is {values[0][worst]:.1f} in the samples, {values[1][worst]:.1f} in "
                "the data: their colours or contrast are off",
                stacklevel=2,
            )
    return report


REPORTS = {"kid": kid, "fid": fid, "pr": precision_recall, "copies": copies, "moments": moments}
NEED_FEATURES = ("kid", "fid", "pr")  # these need an extractor, copies uses one


def check_sizes(num, num_data):
    """Raise ConfigError for too few samples or too few real images."""
    for number, what in ((num, "samples"), (num_data, "images of the data")):
        if number < MIN_IMAGES:
            raise ConfigError(f"{number} {what} are too few to evaluate samples; use {MIN_IMAGES} or more")


def measure(samples, data, where, metrics, extractor, settings, folder, batch_size=64, progress=lambda text: None):
    """{name: entry} of the metrics, each with its `settings` and the digests of the images that it depends on.

    samples, data: uint8 (N, H, W, C); where: {"source", "split"} of the data; folder: the cache of their features;
    extractor: None when no metric needs one; progress(text) is called after each batch.
    """
    provenance, of_samples, of_data = where | {"images": cache.digest(data)}, None, None
    if extractor:
        of_data, provenance = cache.cached_features(
            extractor, data, where, folder, batch_size, lambda n: progress(f"features of {n}/{len(data)} real images")
        )
        batches = []
        for batch in features.extract(extractor, samples, batch_size):
            batches.append(batch)
            progress(f"features of {sum(map(len, batches))}/{len(samples)} samples")
        of_samples = np.concatenate(batches)
    comparison = Comparison(samples, data, extractor, of_samples, of_data)
    settings = settings | {"num": len(samples), "images": cache.digest(samples)}
    settings |= {"reference": provenance | {"num": len(data)}}
    reports = [REPORTS[metric](comparison) for metric in metrics]
    return {name: entry | {"settings": settings} for report in reports for name, entry in report.items()}


def quick_kid(samples, data, where, extractor, folder, progress=lambda text: None):
    """KID x 1000 and its standard error, {"kid_enl0_64": value, "kid_enl0_64_error": error}, for the log of a run.

    It uses at most `MAX_REAL` real images, evenly spaced in the data. The arguments are those of `measure`.
    """
    rows = evenly_spaced(len(data), MAX_REAL)
    of_data, _ = cache.cached_features(extractor, data[rows], where, folder, progress=progress)
    of_samples = np.concatenate(list(features.extract(extractor, samples)))
    value, error, _ = metrics.kid_of_subsets(of_samples, of_data, len(samples) // MIN_SUBSETS)
    name = f"kid_{extractor.name}".lower().replace("-", "_")
    return {name: float(1000 * value), f"{name}_error": float(1000 * error)}

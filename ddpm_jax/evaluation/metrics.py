"""Metrics between sets of images: KID, Frechet distance, precision and recall, near copies, channel statistics.

A set is an array of features (N, d) of any real type, possibly memory-mapped. It is read in blocks and reduced in
float64; the matrix of all pairs is never in memory. ddpm_jax.evaluation.features computes the features.
"""

from typing import NamedTuple

import numpy as np

from ddpm_jax.images import evenly_spaced

BLOCK_ROWS = 2048  # rows in a block; fewer if the block would exceed BLOCK_SIZE numbers
BLOCK_SIZE = 2**25
K = 3  # precision and recall: the radius around an image is the distance of its K-th neighbour
COPY_QUANTILE = 0.01  # the share of real images that count as near copies of another
MIN_FOR_FRECHET = 10_000  # with fewer images the Frechet distance is visibly biased


def _blocks(x):
    """(index of the first row, float64 rows) of each block of x."""
    size = max(1, min(BLOCK_ROWS, BLOCK_SIZE // x.shape[1]))
    for start in range(0, len(x), size):
        yield start, np.asarray(x[start : start + size], np.float64)


def _kernel(a, b):
    k = a @ b.T
    k /= a.shape[1]
    k += 1
    return k * k * k


def _mean_within(x):
    """The mean of k(x_i, x_j) over all i != j."""
    total = 0.0
    for i, a in _blocks(x):
        diagonal = _kernel(a, a)
        total += diagonal.sum() - np.trace(diagonal)
        total += 2 * sum(_kernel(a, b).sum() for _, b in _blocks(x[i + len(a) :]))
    return total / (len(x) * (len(x) - 1))


def _means_between(x, y):
    """The mean of k(x_i, y_j) over j, for each i: (N,)."""
    return np.concatenate([sum(_kernel(a, b).sum(1) for _, b in _blocks(y)) for _, a in _blocks(x)]) / len(y)


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD under the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, section 4); may be below 0."""
    return _mean_within(x) + _mean_within(y) - 2 * _means_between(x, y).mean()


def kid_of_subsets(x: np.ndarray, y: np.ndarray, size: int = 1000) -> tuple[float, float, int]:
    """(mean, standard error, number) of the KIDs between disjoint random subsets of x, of about `size`, and all of y.

    There are at least two subsets. The error covers the sampling of x only; that of y is far smaller if y is not
    smaller than x.
    """
    order = np.random.default_rng(0).permutation(len(x))  # x may be sorted by class
    subsets = [np.sort(subset) for subset in np.array_split(order, max(2, len(x) // size))]
    within, between = _mean_within(y), _means_between(x, y)
    values = np.array([_mean_within(x[subset]) + within - 2 * between[subset].mean() for subset in subsets])
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5, len(values)


class Moments(NamedTuple):
    num: int
    mean: np.ndarray  # (d,)
    covariance: np.ndarray  # (d, d), unbiased


def moments(x: np.ndarray) -> Moments:
    """The Moments of x in one pass, merging the mean and scatter of each block (Chan et al. 1979)."""
    count, mean, scatter = 0, np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
    for _, a in _blocks(x):
        own = a.mean(0)
        scatter += (a - own).T @ (a - own)
        scatter += np.outer(own - mean, own - mean) * (count * len(a) / (count + len(a)))
        mean += (own - mean) * (len(a) / (count + len(a)))
        count += len(a)
    return Moments(count, mean, scatter / (count - 1))


def frechet(a: Moments, b: Moments) -> float:
    """The squared Frechet distance between Gaussians with the Moments a and b (Heusel et al. 2017, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2).
    It is biased: between two sets of n images of the same distribution it is roughly proportional to 1 / n, not 0.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    shared = np.sqrt(product.clip(0)).sum()
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared


def _squared_distances(a, b):
    found = a @ b.T
    found *= -2
    found += (a * a).sum(1)[:, None]
    found += (b * b).sum(1)
    return found.clip(0, out=found)


def neighbour_distances(x, y, k=1, own=None):
    """The Euclidean distance from each x to its k-th nearest y: (N,).

    own: (N,), the row of y that is x itself, which is excluded.
    """
    found = []
    for i, a in _blocks(x):
        nearest = np.full((len(a), k), np.inf)
        for j, b in _blocks(y):
            squares = _squared_distances(a, b)
            if own is not None:
                itself = own[i : i + len(a)] - j
                here = np.flatnonzero((itself >= 0) & (itself < len(b)))
                squares[here, itself[here]] = np.inf
            if squares.shape[1] > k:
                squares = np.partition(squares, k - 1)[:, :k]
            nearest = np.sort(np.concatenate([nearest, squares], 1))[:, :k]
        found.append(np.sqrt(nearest[:, -1]))
    return np.concatenate(found)


def _share_covered(x, y, radii):
    """The share of x within radii[j] of some y_j."""
    inside = 0
    for _, a in _blocks(x):
        hit = np.zeros(len(a), bool)
        for j, b in _blocks(y):
            hit |= (_squared_distances(a, b) <= radii[j : j + len(b)] ** 2).any(1)
        inside += hit.sum()
    return inside / len(x)


def precision_recall(samples: np.ndarray, data: np.ndarray, k: int = K) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019: the share of one set inside the balls around the other.

    The radius of an image's ball is the distance to its k-th nearest neighbour in its own set.
    """
    around_data = neighbour_distances(data, data, k, np.arange(len(data)))
    around_samples = neighbour_distances(samples, samples, k, np.arange(len(samples)))
    return _share_covered(samples, data, around_data), _share_covered(data, samples, around_samples)


class Copies(NamedTuple):
    share: float  # of the samples whose distance to the data is at most `limit`
    limit: float  # the quantile COPY_QUANTILE of the distances within the data
    median: float  # distance from a sample to its nearest real image
    median_within: float  # distance from a real image to its nearest other


def copies(samples: np.ndarray, data: np.ndarray, max_data: int = 10_000) -> Copies:
    """The share of samples that are closer to a real image than all but COPY_QUANTILE of the real images to another.

    New images of the same distribution would give about COPY_QUANTILE. Distances within the data are measured for at
    most `max_data` evenly spaced images. Distances are root mean squares over the d features.
    """
    rows = evenly_spaced(len(data), max_data)
    scale = data.shape[1] ** -0.5
    within, found = scale * neighbour_distances(data[rows], data, own=rows), scale * neighbour_distances(samples, data)
    limit = np.quantile(within, COPY_QUANTILE)
    return Copies(np.mean(found <= limit), limit, np.median(found), np.median(within))


class ChannelStatistics(NamedTuple):
    mean: np.ndarray  # of each channel, in levels 0..255: (C,)
    spread: np.ndarray  # standard deviation over pixels and images: (C,)
    mean_error: np.ndarray  # standard errors over images
    spread_error: np.ndarray


def channel_statistics(images: np.ndarray) -> ChannelStatistics:
    """The ChannelStatistics of uint8 images (N, H, W, C); the errors of a single image are 0."""
    flat = (np.asarray(image, np.float64).reshape(-1, image.shape[-1]) for image in images)
    first, second = np.array([(pixels.mean(0), (pixels**2).mean(0)) for pixels in flat]).swapaxes(0, 1)
    mean, root = first.mean(0), max(1, len(first) - 1) ** 0.5
    spread = np.sqrt((second.mean(0) - mean**2).clip(0))
    squares = second - 2 * mean * first + mean**2  # each image's mean squared deviation from the common mean
    error = squares.std(0) / (2 * np.maximum(spread, 1e-9)) / root
    return ChannelStatistics(mean, spread, first.std(0) / root, error)


def differs_visibly(a, b, error_a, error_b, levels=2.0, errors=4.0):
    """Whether a and b differ by more than `levels` grey levels and by more than `errors` standard errors."""
    difference = np.abs(a - b)
    return (difference > levels) & (difference > errors * np.hypot(error_a, error_b))

"""How far a set of samples is from the data: KID, Frechet distance, precision and recall, copies, tint.

Sets are features (N, d) of any real type, also mapped from a file. They are read in blocks and counted in float64: no
matrix of all pairs is ever whole in memory. What the features are is not known here; see ddpm_jax.evaluation.features.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 2048  # rows at a time, fewer where they are so long that they would hold more than NUMBERS
NUMBERS = 2**25
K = 3  # neighbours whose distance is the radius of a ball in precision and recall
TWINS = 0.01  # the share of the data that is taken to have a near twin
FEW = 10_000  # images below which the Frechet distance is visibly biased


def _blocks(x):
    """(index of the first row, float64 rows) of each block of x."""
    size = max(1, min(BLOCK, NUMBERS // x.shape[1]))
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


def kid_in_parts(x: np.ndarray, y: np.ndarray, size: int = 1000) -> tuple[float, float, int]:
    """(mean, standard error, number) of the KIDs of disjoint random parts of x, each of about `size`, to all of y.

    The error is that of x alone; while y is no smaller than x, that of y is far below it. At least two parts are made.
    """
    order = np.random.default_rng(0).permutation(len(x))  # x may be sorted by class
    parts = [np.sort(part) for part in np.array_split(order, max(2, len(x) // size))]
    within, between = _mean_within(y), _means_between(x, y)
    values = np.array([_mean_within(x[part]) + within - 2 * between[part].mean() for part in parts])
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5, len(values)


class Moments(NamedTuple):
    num: int
    mean: np.ndarray  # (d,)
    covariance: np.ndarray  # (d, d), unbiased


def moments(x: np.ndarray) -> Moments:
    """The Moments of x, from one pass over it (Chan et al. 1979: each block is added by its own mean and scatter)."""
    count, mean, scatter = 0, np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
    for _, a in _blocks(x):
        own = a.mean(0)
        scatter += (a - own).T @ (a - own)
        scatter += np.outer(own - mean, own - mean) * (count * len(a) / (count + len(a)))
        mean += (own - mean) * (len(a) / (count + len(a)))
        count += len(a)
    return Moments(count, mean, scatter / (count - 1))


def frechet(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of the Gaussians with the Moments a and b (Heusel et al. 2017, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2).
    It is biased: of two sets of n images of one distribution it is about proportional to 1 / n, not 0.
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


def nearest(x, y, k=1, own=None):
    """The Euclidean distance of each x to its k-th nearest y: (N,).

    own: (N,), which row of y is x itself and does not count.
    """
    found = []
    for i, a in _blocks(x):
        least = np.full((len(a), k), np.inf)
        for j, b in _blocks(y):
            squares = _squared_distances(a, b)
            if own is not None:
                self_ = own[i : i + len(a)] - j
                here = np.flatnonzero((self_ >= 0) & (self_ < len(b)))
                squares[here, self_[here]] = np.inf
            if squares.shape[1] > k:
                squares = np.partition(squares, k - 1)[:, :k]
            least = np.sort(np.concatenate([least, squares], 1))[:, :k]
        found.append(np.sqrt(least[:, -1]))
    return np.concatenate(found)


def _covered(x, y, radii):
    """The share of x that lies within radii[j] of some y_j."""
    inside = 0
    for _, a in _blocks(x):
        hit = np.zeros(len(a), bool)
        for j, b in _blocks(y):
            hit |= (_squared_distances(a, b) <= radii[j : j + len(b)] ** 2).any(1)
        inside += hit.sum()
    return inside / len(x)


def precision_recall(samples: np.ndarray, data: np.ndarray, k: int = K) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019: what share of one set lies in the balls around the other.

    The ball of an image reaches to its k-th nearest neighbour in its own set.
    """
    around_data = nearest(data, data, k, np.arange(len(data)))
    around_samples = nearest(samples, samples, k, np.arange(len(samples)))
    return _covered(samples, data, around_data), _covered(data, samples, around_samples)


class Copies(NamedTuple):
    share: float  # of the samples, nearer to the data than `limit`
    limit: float  # the quantile TWINS of the distances within the data
    median: float  # distance of a sample to the data
    median_within: float  # distance of one of the data to the rest of them


def copies(samples: np.ndarray, data: np.ndarray, most: int = 10_000) -> Copies:
    """How many samples are as near to one of the data as only the share TWINS of the data is to another of them.

    New images of the same distribution would give about TWINS. Up to `most` of the data, evenly spaced, are asked for
    their own neighbours. Distances are root mean squares over the d features.
    """
    rows = np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int))
    scale = data.shape[1] ** -0.5
    within, found = scale * nearest(data[rows], data, own=rows), scale * nearest(samples, data)
    limit = np.quantile(within, TWINS)
    return Copies(np.mean(found <= limit), limit, np.median(found), np.median(within))


class Tint(NamedTuple):
    mean: np.ndarray  # of each channel, in levels 0..255: (C,)
    spread: np.ndarray  # standard deviation over pixels and images: (C,)
    mean_error: np.ndarray  # standard errors over images
    spread_error: np.ndarray


def tint(images: np.ndarray) -> Tint:
    """The Tint of uint8 images (N, H, W, C); the errors of a single one are 0."""
    flat = (np.asarray(image, np.float64).reshape(-1, image.shape[-1]) for image in images)
    first, second = np.array([(pixels.mean(0), (pixels**2).mean(0)) for pixels in flat]).swapaxes(0, 1)
    mean, root = first.mean(0), max(1, len(first) - 1) ** 0.5
    spread = np.sqrt((second.mean(0) - mean**2).clip(0))
    around = second - 2 * mean * first + mean**2  # of each image, its mean square about the common mean
    error = around.std(0) / (2 * np.maximum(spread, 1e-9)) / root
    return Tint(mean, spread, first.std(0) / root, error)


def is_off(ours, theirs, our_error, their_error, least=2.0, errors=4.0):
    """Whether two values differ by more than chance (so many standard errors) and by so many levels that it shows."""
    difference = np.abs(ours - theirs)
    return (difference > least) & (difference > errors * np.hypot(our_error, their_error))

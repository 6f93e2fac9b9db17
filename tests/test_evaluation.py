"""Metrics of samples against closed forms, direct sums and damage done to real digits on purpose."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial
from sklearn.datasets import load_digits

from ddpm_jax.evaluation import metrics


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture(
    params=[("BLOCK_ROWS", 2048), ("BLOCK_ROWS", 7), ("BLOCK_SIZE", 21)],
    ids=["one block", "of 7 rows", "of 21 numbers"],
)
def block(request, monkeypatch):
    monkeypatch.setattr(metrics, *request.param)


def rotation(random, d):
    return np.linalg.qr(random.normal(size=(d, d)))[0]


def test_frechet_distance_of_known_gaussians(random):
    """With common axes: sum of (sqrt a - sqrt b)^2; two by two: tr (AB)^1/2 = sqrt(tr AB + 2 sqrt det AB)."""
    a, b = random.uniform(0, 3, (2, 50))
    b[:10] = 0  # a flat set of features
    axes, means = rotation(random, 50), random.normal(size=(2, 50))
    turned = [metrics.Moments(9, mean, (axes * s) @ axes.T) for mean, s in zip(means, (a, b), strict=True)]
    wanted = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert metrics.frechet(*turned) == pytest.approx(wanted, rel=1e-6)
    assert metrics.frechet(turned[0], turned[0]) == pytest.approx(0, abs=1e-10)
    p, q = (part @ part.T for part in random.normal(size=(2, 2, 2)))
    root = math.sqrt(np.trace(p @ q) + 2 * math.sqrt(np.linalg.det(p @ q)))
    found = metrics.frechet(metrics.Moments(9, np.zeros(2), p), metrics.Moments(9, np.zeros(2), q))
    assert found == pytest.approx(np.trace(p) + np.trace(q) - 2 * root)


def test_frechet_distance_of_drawn_gaussians_falls_with_their_number(random):
    """Toward 0 about as 1 / n: for d independent features and large n it is near d (d + 7) / (4 n)."""
    found = []
    for n in (400, 1600):
        sets = [metrics.moments(random.normal(size=(n, 20))) for _ in range(2)]
        found.append(metrics.frechet(*sets))
    assert 3 < found[0] / found[1] < 5.5


def test_moments_streamed_are_those_of_the_whole(random, block):
    """Also where the mean is a million times the spread, as sums of squares would lose it."""
    x = random.normal(size=(100, 5)) @ random.normal(size=(5, 5)) + 1e6
    found = metrics.moments(x)
    assert found.num == 100
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-8, atol=1e-8)


def test_kid_is_the_double_sum(random, block):
    x, y = random.normal(size=(23, 4)), random.normal(size=(31, 4)) + 0.3

    def mean(a, b, keep):
        return np.mean([(p @ q / 4 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if keep(i, j)])

    different, every = (lambda i, j: i != j), (lambda i, j: True)
    wanted = mean(x, x, different) + mean(y, y, different) - 2 * mean(x, y, every)
    assert metrics.kid(x, y) == pytest.approx(wanted, rel=1e-10)
    assert metrics.kid(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(wanted, rel=1e-4)


def test_kid_is_unbiased_and_its_error_honest(random):
    """In one dimension it estimates sum_k binomial(3, k) (E x^k - E y^k)^2; 300 estimates scatter as each says."""
    found = []
    for _ in range(300):
        x, y = random.exponential(size=(60, 1)), random.uniform(0, 2, (600, 1))  # E: 1, 2, 6 and 1, 4/3, 2
        found.append(metrics.kid_of_subsets(x, y, 6)[:2])
    values, errors = np.array(found).T
    wanted = 3 * (2 - 4 / 3) ** 2 + (6 - 2) ** 2
    assert abs(values.mean() - wanted) < 4 * values.std() / 300**0.5
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.3)


def test_kid_in_parts_uses_every_sample_once(random):
    """Equal parts of equal samples: any cut gives the KID of one part; so does a set sorted by class."""
    x, y = np.full((20, 3), 2.0), random.normal(size=(50, 3))
    value, error, parts = metrics.kid_of_subsets(x, y, 4)
    assert (value, error, parts) == (pytest.approx(metrics.kid(x, y)), pytest.approx(0, abs=1e-9), 5)
    x = random.normal(size=(40, 3))
    between = [metrics.kid_of_subsets(x[::step], y, 10) for step in (1, -1)]
    assert between[0][0] != between[1][0]  # other parts
    data = np.repeat([[0.0], [5.0]], 500, 0) + random.normal(size=(1000, 1))
    _, by_class, _ = metrics.kid_of_subsets(data, data, 100)
    _, mixed, _ = metrics.kid_of_subsets(random.permutation(data), data, 100)
    assert by_class < 3 * mixed


def test_nearest_is_the_tree_search(random, block):
    x, y = random.normal(size=(40, 3)), random.normal(size=(50, 3))
    for k in (1, 3):
        wanted = scipy.spatial.cKDTree(y).query(x, [k])[0][:, 0]
        np.testing.assert_allclose(metrics.neighbour_distances(x, y, k), wanted, rtol=1e-6)
        within = scipy.spatial.cKDTree(y).query(y, [k + 1])[0][:, 0]  # the first is y itself
        np.testing.assert_allclose(metrics.neighbour_distances(y, y, k, np.arange(50)), within, rtol=1e-6)
    some = np.array([3, 49, 12])
    np.testing.assert_allclose(metrics.neighbour_distances(y[some], y, 3, some), within[some], rtol=1e-6)


def test_precision_and_recall_of_constructed_sets(block):
    """Points on a line, 3 neighbours: apart, the same, and samples of one of two modes."""
    near, far = np.arange(60.0)[:, None], 1000 + np.arange(60.0)[:, None]
    data = np.concatenate([near, far])
    assert metrics.precision_recall(near, far) == (0, 0)
    assert metrics.precision_recall(data, data) == (1, 1)
    assert metrics.precision_recall(near[:-1] + 0.5, data) == (1, 0.5)
    assert metrics.precision_recall(data, near[:-1] + 0.5) == (0.5, 1)
    one, three = np.array([[0.0], [2.9]]), np.arange(4.0)[:, None]
    assert metrics.precision_recall(one, three, 3)[0] == 1  # the middle ones reach only 2, the outer ones 3
    assert metrics.precision_recall(one + 3.2, three, 3)[0] == 0.5


def test_copies_are_near_twins(block):
    """Distances per feature: data a unit apart, three of them with a twin at 1/8; samples on them and beside them."""
    data = np.concatenate([np.arange(200.0), np.array([0, 100, 150]) + 0.125])[:, None] * np.ones(4)
    found = metrics.copies(data[:50] + 0.25, data)  # the first of these is 1/8 from a twin
    assert found == (0.02, 0.125, 0.25, 1)
    assert metrics.copies(data, data)[:3] == (1, 0.125, 0)
    assert metrics.copies(data[1:50] + 0.0625, data).share == 1
    assert metrics.copies(data[1:50] + 0.5, data).share == 0
    assert metrics.copies(data[:50] + 0.25, data, max_data=101) == (0.02, 0.125, 0.25, 1)  # every other of the data


def test_tint(random):
    images = random.integers(0, 256, (300, 4, 4, 3)).astype(np.uint8)
    images[..., 1] //= 2
    found = metrics.channel_statistics(images)
    pixels = images.reshape(-1, 3)
    np.testing.assert_allclose(found.mean, pixels.mean(0))
    np.testing.assert_allclose(found.spread, pixels.std(0))
    draws = [metrics.channel_statistics(random.choice(images, 300)) for _ in range(200)]
    for name in ("mean", "spread"):  # the bootstrap's standard errors
        errors = np.std([getattr(draw, name) for draw in draws], 0)
        np.testing.assert_allclose(getattr(found, f"{name}_error"), errors, rtol=0.25)
    assert not metrics.differs_visibly(found.mean, found.mean + 1.9, 0.1, 0.1).any()
    assert metrics.differs_visibly(found.mean, found.mean + np.array([0, 0, 2.1]), 0.3, 0.4).tolist() == [
        False,
        False,
        True,
    ]
    assert not metrics.differs_visibly(found.mean, found.mean + 2.1, 0.6, 0.0).any()


@pytest.fixture(scope="module")
def digits():
    """Two halves of the real digits in [-1, 1], and the classes of the first."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    images = found.images[order] / 8 - 1
    return images[:898], images[898:], found.target[order][:898]


def damaged(images, labels):
    random = np.random.default_rng(1)
    yield "blur", scipy.ndimage.gaussian_filter(images, (0, 0.7, 0.7))
    yield "noise", (images + random.normal(0, 0.3, images.shape)).clip(-1, 1)
    yield "half the classes", images[labels < 5]


def test_each_damage_is_seen_by_the_metric_that_should_see_it(digits):
    """And copies by the search for them alone: KID, precision and recall take them for real digits."""
    ours, data, labels = digits
    flat = data.reshape(len(data), -1)

    def judge(images):
        x = images.reshape(len(images), -1)
        value, error, _ = metrics.kid_of_subsets(x, flat, 80)
        precision, recall = metrics.precision_recall(x, flat)
        distance = metrics.frechet(metrics.moments(x), metrics.moments(flat))
        return value, error, precision, recall, metrics.copies(x, flat).share, distance

    value, error, precision, recall, share, distance = judge(ours)
    assert abs(value) < 3 * error
    assert min(precision, recall) > 0.8
    assert share < 0.03
    bad = {name: judge(images) for name, images in damaged(ours, labels)}
    for name, (worse, its_error, _, _, its_share, its_distance) in bad.items():
        assert worse > value + 5 * its_error, name
        assert its_distance > 2 * distance, name
        assert its_share < 0.03, name
    assert bad["noise"][2] < precision - 0.2
    assert bad["half the classes"][2] > precision - 0.1
    assert bad["half the classes"][3] < recall - 0.3
    copied = data[np.random.default_rng(2).permutation(len(data))[:450].repeat(2)[:898]]
    value, error, precision, recall, share, _ = judge(copied + 0.0)
    assert abs(value) < 4 * error
    assert min(precision, recall) > 0.7
    assert share == 1

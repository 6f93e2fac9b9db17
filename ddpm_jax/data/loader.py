"""Stateless batches: the batch of step n depends on the seed and n only, so there is no data state to save."""

import collections
import contextlib
import functools
import mmap
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import DataError

LARGE = 2**30  # bytes; a smaller memory map is soon in memory as a whole and needs no read-ahead advice


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W, C), in memory or mapped from a file
    labels: np.ndarray | None = None  # int32 (N,), if the source has labels
    classes: tuple[str, ...] = ()  # the names of the labels 0, 1, ..., if the source has names


def fingerprint(dataset: Dataset) -> str:
    """A short text that identifies a data set: shape and CRC-32 of the labels and up to 1,000 evenly spaced images."""
    images, labels, _ = dataset
    crc = 0 if labels is None else zlib.crc32(labels.astype("<i8"))
    index = np.arange(0, len(images), -(-len(images) // 1000))
    with _read_ahead(images, index):
        for row in index:
            crc = zlib.crc32(np.ascontiguousarray(images[row]), crc)
    return f"{'x'.join(map(str, images.shape))}-{crc:08x}"


@contextlib.contextmanager
def _read_ahead(images, index):
    """If `images` are memory-mapped: read exactly the rows `index`, all at the same time.

    By default the system reads one row after another, each with a read-ahead of up to megabytes.
    """
    base = images
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = isinstance(base, mmap.mmap) and images.flags.c_contiguous
    if mapped:
        base.madvise(mmap.MADV_RANDOM)
        first, size = images.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data, images.strides[0]
        for row in index.tolist():
            start = first + row * size
            page = start - start % mmap.PAGESIZE
            base.madvise(mmap.MADV_WILLNEED, page, start + size - page)
    yield
    if mapped:
        base.madvise(mmap.MADV_NORMAL)


@functools.lru_cache(maxsize=2)
def _permutation(n, seed, epoch, rollbacks):
    return np.random.default_rng([seed, epoch, rollbacks]).permutation(n)


def batch(
    dataset: Dataset, seed: int, step: int, batch_size: int, rows=slice(None), rollbacks=0
) -> dict[str, np.ndarray]:
    """The batch of `step` (counted from 0): {"index": int32 (b,), "image": uint8 (b, H, W, C), "label"?: int32 (b,)}.

    Each epoch is a new permutation, cut into N // batch_size batches; the remaining images are dropped for that epoch.
    `rows` is the part of the batch that this process reads. Each value of `rollbacks` gives other permutations. Raises
    DataError when there are fewer images than a batch needs.
    """
    n = len(dataset.images)
    if n < batch_size:
        raise DataError(f"the data set has {n} images, fewer than train.batch_size={batch_size}; use a smaller batch")
    epoch, position = divmod(step, n // batch_size)
    index = _permutation(n, seed, epoch, rollbacks)[position * batch_size : (position + 1) * batch_size][rows]
    in_order = np.argsort(index)  # read a memory map front to back
    image = np.empty((len(index), *dataset.images.shape[1:]), np.uint8)
    with _read_ahead(dataset.images, index[in_order]) if dataset.images.nbytes > LARGE else contextlib.nullcontext():
        image[in_order] = dataset.images[index[in_order]]
    label = {} if dataset.labels is None else {"label": dataset.labels[index].astype(np.int32)}
    return {"index": index.astype(np.int32), "image": image, **label}


def prefetch(make: Callable, first: int, last: int, ahead=2, threads=1) -> Iterator:
    """Yield make(first), ..., make(last - 1); up to `ahead` of them are computed in threads in advance."""
    with ThreadPoolExecutor(threads) as pool:
        pending = collections.deque(pool.submit(make, step) for step in range(first, min(first + ahead, last)))
        for step in range(first, last):
            if step + ahead < last:
                pending.append(pool.submit(make, step + ahead))
            yield pending.popleft().result()

"""Batches without state: what step n trains on follows from the seed and n alone, so there is nothing to save."""

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

LARGE = 2**30  # bytes; what is less is soon in memory as a whole, where a memory map is as fast as it can be


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W, C), in memory or mapped from a file
    labels: np.ndarray | None = None  # int32 (N,), when the source has any
    classes: tuple[str, ...] = ()  # the names of the labels from 0 on, where the source has some


def fingerprint(dataset: Dataset) -> str:
    """A short text that tells data sets apart: shape and CRC-32 of the labels and up to 1,000 evenly spaced images."""
    images, labels, _ = dataset
    crc = 0 if labels is None else zlib.crc32(labels.astype("<i8"))
    index = np.arange(0, len(images), -(-len(images) // 1000))
    with _reading(images, index):
        for row in index:
            crc = zlib.crc32(np.ascontiguousarray(images[row]), crc)
    return f"{'x'.join(map(str, images.shape))}-{crc:08x}"


@contextlib.contextmanager
def _reading(images, index):
    """Where `images` are mapped from a file: read the rows `index` at once, and no others.

    Left alone, the system reads them one after the other, and on after each: it may be megabytes every time.
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

    Each epoch is a permutation of its own, cut into N // batch_size batches; the few images left over sit that epoch
    out. `rows` is the part of the batch that this process reads; each number of `rollbacks` gives other epochs. Raises
    DataError when the data fill no batch.
    """
    n = len(dataset.images)
    if n < batch_size:
        raise DataError(f"the data set has {n} images, fewer than train.batch_size={batch_size}; take a smaller batch")
    epoch, position = divmod(step, n // batch_size)
    index = _permutation(n, seed, epoch, rollbacks)[position * batch_size : (position + 1) * batch_size][rows]
    in_order = np.argsort(index)  # read a memory map front to back
    image = np.empty((len(index), *dataset.images.shape[1:]), np.uint8)
    with _reading(dataset.images, index[in_order]) if dataset.images.nbytes > LARGE else contextlib.nullcontext():
        image[in_order] = dataset.images[index[in_order]]
    label = {} if dataset.labels is None else {"label": dataset.labels[index].astype(np.int32)}
    return {"index": index.astype(np.int32), "image": image, **label}


def prefetch(make: Callable, first: int, last: int, ahead=2, threads=1) -> Iterator:
    """make(first), ..., make(last - 1), up to `ahead` of them prepared in threads while the caller is busy."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque(pool.submit(make, step) for step in range(first, min(first + ahead, last)))
        for step in range(first, last):
            if step + ahead < last:
                waiting.append(pool.submit(make, step + ahead))
            yield waiting.popleft().result()

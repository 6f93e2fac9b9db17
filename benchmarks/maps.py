"""Does a data set larger than memory train as fast as a small one? python -m benchmarks.maps --gb=20

With --pictures=100000: how long does a folder of that many small PNGs take, the first time and the second?

Writes random images to a memory-mapped file and reads batches from it as training does: in random order, with two
batches of prefetch. Alternates with reading from an array in memory; the file is dropped from the page cache before
each round. The result depends on how much of the file fits into memory: docs/data.md says how to limit that.
"""

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.__main__ import median_and_range, print_row
from ddpm_jax import errors, options

IN_MEMORY = 50_000  # images of the array in memory


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    gb: float = options.option(1.0, "size of the memory-mapped file in gigabytes", options.above(0))
    pictures: int = options.option(0, "decode a folder of this many pictures instead", options.at_least(0))
    image_size: int = options.option(64, "side of the RGB images", options.at_least(1))
    batch_size: int = options.option(128, "images in a batch", options.at_least(1))
    seconds: float = options.option(10.0, "duration of each read", options.above(0))
    rounds: int = options.option(3, "reads of each kind", options.at_least(1))
    folder: str = options.option("", "where to write the file; a temporary folder when empty")
    debug: bool = options.option(*options.DEBUG)


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.maps", __doc__)

    if args.pictures:
        decode(args)
        return 0

    import numpy as np

    from ddpm_jax import data

    shape = (args.image_size, args.image_size, 3)
    count = int(args.gb * 1e9) // int(np.prod(shape))
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        path = Path(folder) / "images.npy"
        write(path, count, shape)
        size, rates, peaks = path.stat().st_size, {"map": [], "memory": []}, []
        for seed in range(args.rounds):
            drop_from_page_cache(path)
            dataset = data.load(f"npz:{path}")
            rate, peak = read(dataset, args, seed)
            rates["map"].append(rate)
            peaks.append(peak)
            in_memory = data.Dataset(np.array(dataset.images[: min(count, IN_MEMORY)]), None)
            del dataset  # mapped pages stay in the page cache
            rates["memory"].append(read(in_memory, args, seed)[0])
            del in_memory
    print(f"{count:,} images of {'x'.join(map(str, shape))}, {size / 1e9:.1f} GB")
    for name, text in (("map", "from the map"), ("memory", "from an array in memory")):
        print_row(text, median_and_range(rates[name], "{:,.0f}") + " images/s")
    peaks = ", ".join(f"{peak / 1e6:,.0f}" for peak in peaks)
    print(f"peak anonymous memory of each read from the map {peaks} MB")
    return 0


def write(path, count, shape):
    """Write a .npy of random bytes, which no file system can compress or store sparsely."""
    import numpy as np

    random, block = np.random.default_rng(0), 1000
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
        for first in range(0, count, block):
            file.write(random.bytes(min(block, count - first) * int(np.prod(shape))))
        file.flush()
        os.fsync(file.fileno())


def decode(args):
    """Print how long a folder of smooth random pictures takes to load, first decoded and then from the cache."""
    import numpy as np
    from PIL import Image

    from ddpm_jax import data

    random, size = np.random.default_rng(0), (args.image_size, args.image_size)
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        for i in range(args.pictures):
            path = Path(folder) / "pictures" / f"{10 * i // args.pictures}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(path, compress_level=1)
        for what in ("decoded", "found unchanged"):
            start = time.perf_counter()
            data.load(f"folder:{path.parents[1]}", image_size=size, cache_dir=Path(folder) / "cache")
            seconds = time.perf_counter() - start
            print(f"{args.pictures:,} pictures of {args.image_size}x{args.image_size} {what} in {seconds:.1f} s")
        print(f"{anonymous_memory() / 1e6:,.0f} MB of anonymous memory")


def drop_from_page_cache(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(dataset, args, seed):
    """(images per second, peak anonymous memory in bytes) over `args.seconds` of batches."""
    from ddpm_jax import data

    batches = data.prefetch(lambda step: data.batch(dataset, seed, step, args.batch_size), 0, 10**9)
    next(batches)  # the first batch also computes the epoch's permutation
    start, count, peak = time.perf_counter(), 0, 0
    while (elapsed := time.perf_counter() - start) < args.seconds:
        count += len(next(batches)["image"])
        peak = max(peak, anonymous_memory())
    batches.close()
    return count / elapsed, peak


def anonymous_memory():
    """Bytes of this process's memory that are not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(errors.run(main))

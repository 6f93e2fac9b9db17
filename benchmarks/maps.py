"""Does a data set larger than memory train as fast as a small one? python -m benchmarks.maps --gb=20

With --pictures=100000: how long does a folder of so many small PNGs take, the first time and the second?

Writes a memory map of random images, then reads batches from it as training does, in random order and two ahead, and
the same from an array in memory; in turns, each after the file was put out of the system's cache. What a table of the
map is worth depends on how much of the file fits into memory: see docs/data.md for how to leave it little.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ddpm_jax import errors, options

FEW = 50_000  # images of the array in memory


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    gb: float = options.option(1.0, "size of the map in gigabytes", options.above(0))
    pictures: int = options.option(0, "decode a folder of so many pictures instead", options.at_least(0))
    image_size: int = options.option(64, "side of the images, which have 3 channels", options.at_least(1))
    batch_size: int = options.option(128, "images a batch", options.at_least(1))
    seconds: float = options.option(10.0, "how long each turn reads", options.above(0))
    rounds: int = options.option(3, "turns", options.at_least(1))
    folder: str = options.option("", "where to write the map; a temporary folder when empty")
    debug: bool = options.option(False, "show tracebacks")


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
        for turn in range(args.rounds):
            drop(path)
            dataset = data.load(f"npz:{path}")
            rate, peak = read(dataset, args, turn)
            rates["map"].append(rate)
            peaks.append(peak)
            few = data.Dataset(np.array(dataset.images[: min(count, FEW)]), None)
            del dataset  # what is mapped stays in the cache
            rates["memory"].append(read(few, args, turn)[0])
            del few
    print(f"{count:,} images of {'x'.join(map(str, shape))}, {size / 1e9:.1f} GB")
    for name, text in (("map", "from the map"), ("memory", "from an array in memory")):
        low, high = min(rates[name]), max(rates[name])
        print(f"{text:<44} {statistics.median(rates[name]):>9,.0f} ({low:,.0f} to {high:,.0f}) images/s")
    grown = ", ".join(f"{peak / 1e6:,.0f}" for peak in peaks)
    print(f"most anonymous memory in each turn of the map {grown} MB")
    return 0


def write(path, count, shape):
    """A .npy of random bytes, which no file system can leave out or compress."""
    import numpy as np

    random, block = np.random.default_rng(0), 1000
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
        for first in range(0, count, block):
            file.write(random.bytes(min(block, count - first) * int(np.prod(shape))))
        file.flush()
        os.fsync(file.fileno())


def decode(args):
    """Print how long a folder of smooth random pictures takes to load, decoded and then mapped."""
    import numpy as np
    from PIL import Image

    from ddpm_jax import data

    random, size = np.random.default_rng(0), (args.image_size, args.image_size)
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        for i in range(args.pictures):
            path = Path(folder) / "pictures" / f"{10 * i // args.pictures}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rough = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
            rough.resize(size, Image.Resampling.BICUBIC).save(path, compress_level=1)
        for what in ("decoded", "found unchanged"):
            clock = time.perf_counter()
            data.load(f"folder:{path.parents[1]}", image_size=size, cache_dir=Path(folder) / "cache")
            took = time.perf_counter() - clock
            print(f"{args.pictures:,} pictures of {args.image_size}x{args.image_size} {what} in {took:.1f} s")
        print(f"{anonymous() / 1e6:,.0f} MB of anonymous memory")


def drop(path):
    """Take a file out of the system's cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(dataset, args, seed):
    """(images a second, most anonymous memory in bytes) over `args.seconds` of batches."""
    from ddpm_jax import data

    batches = data.prefetch(lambda step: data.batch(dataset, seed, step, args.batch_size), 0, 10**9)
    next(batches)  # with the permutation of the epoch
    begun, count, most = time.perf_counter(), 0, 0
    while (took := time.perf_counter() - begun) < args.seconds:
        count += len(next(batches)["image"])
        most = max(most, anonymous())
    batches.close()
    return count / took, most


def anonymous():
    """Bytes of memory that this process holds and that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(errors.run(main))

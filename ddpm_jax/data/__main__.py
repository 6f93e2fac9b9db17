"""Prepare, describe and preview a data source: python -m ddpm_jax.data tfds:fashion_mnist --out=grid.png"""

import dataclasses
import sys

from ddpm_jax import errors, options
from ddpm_jax.config import Data
from ddpm_jax.run.files import expand
from ddpm_jax.run.log import hide_absl_warnings


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    source: str = options.option("", "digits, tfds:NAME, folder:DIR or npz:FILE; may be the first argument")
    split: str = options.same_as(Data, "split")
    image_size: tuple[int, ...] = options.same_as(Data, "image_size")
    channels: int = options.same_as(Data, "channels")
    range: tuple[float, ...] = options.same_as(Data, "range")
    frames: str = options.same_as(Data, "frames")
    files: str = options.option("", "folder with the archives of a tfds source; empty to download them")
    max_unreadable: float = options.same_as(Data, "max_unreadable")
    data_dir: str = options.same_as(Data, "data_dir")
    cache_dir: str = options.same_as(Data, "cache_dir")
    num: int = options.option(64, "images in the grid, evenly spaced in the data", options.at_least(1))
    out: str = options.option("", "PNG to write a grid of images to")
    debug: bool = options.option(*options.DEBUG)


@hide_absl_warnings()  # TFDS warns about normal conditions
def main(argv=None):
    """Print a description of the data, one fact per line."""
    args = options.parse(Args, argv, "-m ddpm_jax.data SOURCE", __doc__, positional=["source"])
    if not args.source:
        raise errors.ConfigError("name a source, for example python -m ddpm_jax.data folder:my_pictures")
    if args.files and not args.source.startswith("tfds:"):
        raise errors.ConfigError(f"--files={args.files} needs a source tfds:NAME, not {args.source}")

    import numpy as np

    from ddpm_jax import data
    from ddpm_jax.evaluation import metrics

    dataset = data.load(**{name: value for name, value in vars(args).items() if name not in ("num", "out", "debug")})
    count, height, width, channels = dataset.images.shape
    found = metrics.channel_statistics(dataset.images)
    mean, std = found.mean / 255, found.spread / 255
    print(f"{count:,} images of {height}x{width}x{channels}")
    print("mean", *(f"{value:.5f}" for value in mean), "std", *(f"{value:.5f}" for value in std), "(0 black, 1 white)")
    if dataset.labels is not None:
        classes, counts = np.unique(dataset.labels, return_counts=True)
        print(f"{len(classes)} classes from {classes[0]} to {classes[-1]}, with", *(f"{n:,}" for n in counts), "images")
    if list(dataset.classes) != [str(i) for i in range(len(dataset.classes))]:
        print("labels", ", ".join(f"{i} {name!r}" for i, name in enumerate(dataset.classes)))
    print("fingerprint", data.fingerprint(dataset))
    if args.out:
        from ddpm_jax import images

        picked = images.evenly_spaced(count, args.num)
        with errors.writing(f"--out={args.out}"):
            images.save_png(expand(args.out), images.grid(dataset.images[picked]))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))

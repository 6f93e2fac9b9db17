"""Prepare, describe and show a data source: python -m ddpm_jax.data tfds:fashion_mnist --out=grid.png"""

import dataclasses
import sys

from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    source: str = options.option("", "digits, tfds:NAME, folder:DIR or npz:FILE; also as the first word")
    split: str = options.option("train", "split of a tfds source, in the spelling of TFDS")
    files: str = options.option("", "folder with the archives of a tfds source; empty to download them")
    data_dir: str = options.option("", "folder of prepared TFDS data sets; empty for TFDS's own default")
    debug: bool = options.option(False, "show tracebacks")


def main():
    argv = [f"--source={word}" if i == 0 and word[:1] != "-" else word for i, word in enumerate(sys.argv[1:])]
    args = options.parse(Args, argv, "-m ddpm_jax.data SOURCE", __doc__)

    from ddpm_jax import data

    dataset = data.load(args.source, split=args.split, files=args.files, data_dir=args.data_dir)
    print(f"{len(dataset.images):,} images of {'x'.join(map(str, dataset.images.shape[1:]))}")
    print(f"fingerprint {data.fingerprint(dataset)}")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))

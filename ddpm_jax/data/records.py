"""TFDS data sets in the array_record format, which needs no TensorFlow."""

import functools
import os

import numpy as np

from ddpm_jax.data.intake import fit_array
from ddpm_jax.data.maps import GROUP, decode
from ddpm_jax.data.prepare import SETS, prepare, write
from ddpm_jax.errors import DataError, first_line
from ddpm_jax.run.files import cache_folder, expand, has_home, locked
from ddpm_jax.run.log import hide_absl_warnings, note


def from_tfds(
    name, image_size, channels, split="train", range=(), data_dir="", cache_dir="~/.cache/ddpm_jax", files="", **_
):
    """A split of a TFDS data set. Sets in SETS are prepared first if need be, from archives in `files` if given."""
    import tensorflow_datasets as tfds

    def make():
        return tfds.builder(name, data_dir=_folder(data_dir))

    try:
        builder = make()
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = first_line(error)
        raise DataError(f"TFDS cannot open data set {name} (data.source=tfds:{name}): {reason}") from error
    if files and builder.is_prepared():
        note(f"{builder.info.full_name} is prepared already, in {builder.data_dir}; {files} is not read")
    if builder.name in SETS:
        try:
            builder = _prepared(make, lambda builder: prepare(builder, files))
        except (OSError, RuntimeError) as error:  # RuntimeError: from the writer of array_record
            reason = first_line(error)
            raise DataError(f"cannot prepare TFDS data set {name}: {reason}; give another data.data_dir") from error
    if not builder.is_prepared():
        raise DataError(
            f"TFDS data set {name} is not prepared in {builder.data_dir_root}, and only {', '.join(SETS)} are prepared "
            f"here; do it {_with_tensorflow(name, builder.data_dir_root)}, or use its pictures as folder:DIR"
        )
    return _from_builder(builder, image_size, channels, split, cache_dir, range)


def _folder(data_dir):
    """The folder of prepared sets; None for TFDS's default, which depends on the environment or the home folder."""
    if data_dir:
        return expand(data_dir)
    return None if has_home() or "TFDS_DATA_DIR" in os.environ else cache_folder() / "tensorflow_datasets"


def _with_tensorflow(name, data_dir):
    return f"where TensorFlow is installed by tfds build {name} --file_format=array_record --data_dir={data_dir}"


def from_digits(_, image_size, channels, split="train", data_dir="", cache_dir="~/.cache/ddpm_jax", **__):
    """scikit-learn's 1,797 handwritten digits. The first use prepares them as a TFDS data set; no network is needed."""
    from ddpm_jax.data.digits import Digits

    def make():
        return Digits(data_dir=_folder(data_dir), file_format="array_record")

    try:
        builder = _prepared(make, write)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot use the prepared digits: {first_line(error)}; give another data.data_dir") from error
    return _from_builder(builder, image_size, channels, split, cache_dir)


def _prepared(make, prepare):
    """The builder make(), after prepare(builder) if it was not prepared; one process at a time prepares."""
    builder = make()
    if builder.is_prepared():
        return builder
    builder.data_dir_root.mkdir(parents=True, exist_ok=True)
    with locked(builder.data_dir_root / f"{builder.name}.lock"):
        builder = make()
        if not builder.is_prepared():  # another process may have done it meanwhile
            prepare(builder)
    return make()


def _from_builder(builder, image_size, channels, split, cache_dir, levels=()):
    try:
        rows = builder.as_data_source(split=split)
        with hide_absl_warnings():  # that OpenCV is not installed
            rows[0]  # opens the first file
    except NotImplementedError as error:
        how = "" if builder.name in SETS else f" and prepare it there, {_with_tensorflow(builder.name, 'DIR')}"
        raise DataError(
            f"TFDS set {builder.info.full_name} is in {builder.data_dir} as {builder.info.file_format.value}, which "
            f"only TensorFlow reads; give another data.data_dir=DIR{how}"
        ) from error
    except (RuntimeError, ValueError, LookupError, AssertionError, OSError) as error:
        raise DataError(
            f"TFDS data set {builder.info.full_name} in {builder.data_dir} has no split {split}, or is damaged "
            f"({first_line(error)}); in the latter case delete that folder and prepare it again"
        ) from error
    if "image" not in builder.info.features:
        raise DataError(f"TFDS data set {builder.info.full_name} has no feature 'image'")
    features = builder.info.features
    labelled = "label" in features
    if levels and features["image"].dtype == np.uint8:
        raise DataError(f"data.range is for values of more than 8 bits, {builder.info.full_name} has 8; leave it out")
    if not image_size and None in features["image"].shape[:2]:
        raise DataError(
            f"{builder.info.full_name} has images of several sizes; add for example --config.data.image_size=64"
        )

    @functools.lru_cache(os.cpu_count())
    def group(i):  # several times faster than reading rows one by one
        return rows.__getitems__(range(i * GROUP, min(len(rows), (i + 1) * GROUP)))

    def get(i):
        row = group(i // GROUP)[i % GROUP]
        return fit_array(row["image"], image_size, channels, levels), int(row["label"]) if labelled else -1

    scaled = f":{levels}" if levels else ""
    dataset = decode(
        f"tfds:{builder.data_dir}:{split}:{image_size}:{channels}{scaled}",
        f"{builder.info.full_name}:{len(rows)}",
        range(len(rows)),
        get,
        get(0)[0].images.shape[1:],
        0.0,
        cache_dir,
        levels,
    )
    return dataset._replace(classes=tuple(getattr(features["label"], "names", None) or ()) if labelled else ())

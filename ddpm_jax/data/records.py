"""TFDS data sets in its format array_record, which is read and written without TensorFlow."""

from ddpm_jax.data.intake import fit_array
from ddpm_jax.data.maps import decode
from ddpm_jax.data.prepare import SETS, prepare
from ddpm_jax.errors import DataError, first_line
from ddpm_jax.files import locked
from ddpm_jax.log import note


def from_tfds(name, image_size, channels, split="train", data_dir="", cache_dir="~/.cache/ddpm_jax", files="", **_):
    """A split of a TFDS data set; those in SETS are prepared first, from their archives."""
    import tensorflow_datasets as tfds

    def make():
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")

    try:
        builder = make()
        if builder.name in SETS:
            builder = _prepared(make, lambda builder: prepare(builder, files))
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = first_line(error)
        raise DataError(f"TFDS cannot open data set {name} (data.source=tfds:{name}): {reason}") from error
    return _from_builder(builder, image_size, channels, split, cache_dir)


def from_digits(_, image_size, channels, split="train", data_dir="", cache_dir="~/.cache/ddpm_jax", **__):
    """scikit-learn's 1,797 handwritten digits; the first use prepares them as a TFDS data set, without a network."""
    import tensorflow_datasets as tfds

    from ddpm_jax.data.digits import Digits

    def write(builder):
        note(f"preparing the digits in {builder.data_dir}")
        tfds.disable_progress_bar()
        builder.download_and_prepare()

    try:
        builder = _prepared(lambda: Digits(data_dir=data_dir or None, file_format="array_record"), write)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot use the prepared digits: {first_line(error)}; give another data.data_dir") from error
    return _from_builder(builder, image_size, channels, split, cache_dir)


def _prepared(make, write):
    """The builder `make()`, after `write(builder)` if it was not prepared, which one process does at a time."""
    builder = make()
    if builder.is_prepared():
        return builder
    builder.data_dir_root.mkdir(parents=True, exist_ok=True)
    with locked(builder.data_dir_root / f"{builder.name}.lock"):
        builder = make()
        if not builder.is_prepared():  # nor by another process meanwhile
            write(builder)
    return make()


def _from_builder(builder, image_size, channels, split, cache_dir):
    try:
        rows = builder.as_data_source(split=split)
        if "image" not in builder.info.features:
            raise DataError(f"TFDS data set {builder.info.full_name} has no feature 'image'")
        rows[0]  # only now is a file opened
    except (RuntimeError, ValueError, LookupError, AssertionError, OSError) as error:
        raise DataError(
            f"TFDS data set {builder.info.full_name} is not prepared as array_record in {builder.data_dir}, or has no "
            f"split {split}; prepare it with download_and_prepare(file_format='array_record') ({first_line(error)})"
        ) from error
    features = builder.info.features
    labelled = "label" in features
    if not image_size and None in features["image"].shape[:2]:
        raise DataError(
            f"{builder.info.full_name} has images of several sizes; --config.data.image_size=64 makes them one"
        )

    def get(i):
        row = rows[int(i)]
        return fit_array(row["image"], image_size, channels), int(row["label"]) if labelled else -1

    return decode(
        f"tfds:{builder.data_dir}:{split}:{image_size}:{channels}",
        f"{builder.info.full_name}:{len(rows)}",
        range(len(rows)),
        get,
        get(0)[0].shape,
        0.0,
        cache_dir,
    )

"""Matching the labels of a Dataset to a model or to an earlier run."""

import os
from collections.abc import Sequence

import numpy as np

from ddpm_jax.data.loader import Dataset
from ddpm_jax.errors import ConfigError
from ddpm_jax.run.log import note


def reorder_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The Dataset with its labels numbered in the order of `classes`; unchanged if its classes have other names."""
    if not classes or sorted(classes) != sorted(dataset.classes) or dataset.labels is None:
        return dataset
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in dataset.classes], np.int32)[dataset.labels]
    return dataset._replace(labels=labels, classes=tuple(classes))


def with_labels(dataset: Dataset, num_classes: int) -> Dataset:
    """The Dataset with its labels if the model has classes, without them if not; ConfigError if they do not fit."""
    if not num_classes:
        return dataset._replace(labels=None, classes=())
    if dataset.labels is None:
        raise ConfigError(f"model.num_classes={num_classes}, but the data have no labels; set it to 0")
    if dataset.labels.max() >= num_classes or dataset.labels.min() < 0:
        low, high = dataset.labels.min(), dataset.labels.max()
        raise ConfigError(f"model.num_classes={num_classes}, but labels run from {low} to {high}")
    return dataset


def match_labels_to_run(dataset: Dataset, source: str, data: str | None, classes: Sequence[str] | None) -> Dataset:
    """The Dataset of a data.source with its labels numbered as in a run with this fingerprint and these class names.

    Older runs did not store class names; their folders were numbered in byte order.
    """
    if classes is None and data and source.startswith("folder:"):
        classes = sorted(dataset.classes, key=os.fsencode)
    matched = reorder_classes(dataset, classes or ())
    if matched.classes != dataset.classes:
        names = ", ".join(matched.classes[:5]) + ", ..." * (len(matched.classes) > 5)
        note(f"the run numbers its labels differently: {names}")
    return matched

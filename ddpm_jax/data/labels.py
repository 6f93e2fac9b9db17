"""The labels of a Dataset, as a model or an earlier run has them."""

import os
from collections.abc import Sequence

import numpy as np

from ddpm_jax.data.loader import Dataset
from ddpm_jax.errors import ConfigError
from ddpm_jax.run.log import note


def reorder_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The Dataset with its labels counted in the order of `classes`; as it is where its classes have other names."""
    if not classes or sorted(classes) != sorted(dataset.classes) or dataset.labels is None:
        return dataset
    place = {name: i for i, name in enumerate(classes)}
    labels = np.array([place[name] for name in dataset.classes], np.int32)[dataset.labels]
    return dataset._replace(labels=labels, classes=tuple(classes))


def with_labels(dataset: Dataset, num_classes: int) -> Dataset:
    """The data set with labels if the model has classes, and without if not."""
    if not num_classes:
        return dataset._replace(labels=None, classes=())
    if dataset.labels is None:
        raise ConfigError(f"model.num_classes={num_classes}, but the data have no labels; set it to 0")
    if dataset.labels.max() >= num_classes or dataset.labels.min() < 0:
        low, high = dataset.labels.min(), dataset.labels.max()
        raise ConfigError(f"model.num_classes={num_classes}, but labels run from {low} to {high}")
    return dataset


def with_labels_of_run(dataset: Dataset, source: str, data: str | None, classes: Sequence[str] | None) -> Dataset:
    """The Dataset of a data.source with its labels counted as in a run with that fingerprint and those class names.

    A run from before the names were kept has those of a folder in byte order.
    """
    if classes is None and data and source.startswith("folder:"):
        classes = sorted(dataset.classes, key=os.fsencode)
    found = reorder_classes(dataset, classes or ())
    if found.classes != dataset.classes:
        note(f"the run counts its labels otherwise: {', '.join(found.classes[:5])}{', ...' * (len(found.classes) > 5)}")
    return found

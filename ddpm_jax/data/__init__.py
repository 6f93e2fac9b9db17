"""Images from a source as one uint8 array, and batches of them as a pure function of (seed, step)."""

from ddpm_jax.data.intake import read
from ddpm_jax.data.labels import match_labels_to_run, reorder_classes, with_labels
from ddpm_jax.data.loader import Dataset, batch, fingerprint, prefetch
from ddpm_jax.data.sources import SOURCES, load

__all__ = [
    "SOURCES",
    "Dataset",
    "batch",
    "fingerprint",
    "load",
    "match_labels_to_run",
    "prefetch",
    "read",
    "reorder_classes",
    "with_labels",
]

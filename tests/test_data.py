"""Batches against set arithmetic, sources against files whose pixels are known beforehand."""

import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sklearn.datasets import load_digits

from ddpm_jax.data import Dataset, batch, fingerprint, load, loader, prefetch
from ddpm_jax.errors import DataError


def numbered(n):
    """A data set whose image i is filled with i and whose label is 1000 + i."""
    return Dataset(np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(3, 3), np.arange(1000, 1000 + n))


# --- batches


@pytest.mark.parametrize(("n", "batch_size"), [(24, 4), (23, 4), (5, 5), (9, 1)])
def test_an_epoch_shows_no_image_twice(n, batch_size):
    per_epoch = n // batch_size
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = np.concatenate([batch(numbered(n), 0, step, batch_size)["index"] for step in steps])
        assert len(seen) == per_epoch * batch_size
        assert len(set(seen.tolist())) == len(seen)
        assert set(seen.tolist()) <= set(range(n))


def test_images_left_over_in_one_epoch_come_in_another():
    seen = np.concatenate([batch(numbered(7), 0, step, 4)["index"] for step in range(20)])
    assert set(seen.tolist()) == set(range(7))


def test_a_batch_follows_from_seed_and_step_alone():
    """Steps walked in order, then taken in any order with other seeds between and with the arrays spoiled."""
    dataset = numbered(23)
    walked = [batch(dataset, 7, step, 4) for step in range(30)]
    kept = [{name: array.copy() for name, array in one.items()} for one in walked]
    for one in walked:
        for array in one.values():
            array[:] = 0
    steps = list(range(30))
    random.Random(0).shuffle(steps)
    for step in steps:
        batch(dataset, step, step, 4)
        again = batch(dataset, 7, step, 4)
        assert again.keys() == kept[step].keys()
        for name, array in again.items():
            np.testing.assert_array_equal(array, kept[step][name])


def test_seeds_and_epochs_differ_in_their_order():
    whole = [tuple(batch(numbered(50), seed, epoch, 50)["index"]) for seed in range(4) for epoch in range(4)]
    assert len(set(whole)) == 16


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_all_processes_join_to_the_global_batch(processes):
    dataset, share = numbered(20), 8 // processes
    for step in range(5):
        parts = [batch(dataset, 3, step, 8, slice(i * share, (i + 1) * share)) for i in range(processes)]
        for name, array in batch(dataset, 3, step, 8).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_index_names_image_and_label():
    one = batch(numbered(40), 0, 3, 9)
    assert one["image"].shape == (9, 1, 1, 3)
    assert [one[name].dtype for name in ("index", "image", "label")] == [np.int32, np.uint8, np.int32]
    np.testing.assert_array_equal(one["image"][:, 0, 0, 2], one["index"])
    np.testing.assert_array_equal(one["label"], one["index"] + 1000)


def test_no_labels_no_label():
    assert batch(numbered(4)._replace(labels=None), 0, 0, 2).keys() == {"index", "image"}


def test_fault_45_too_few_images_for_one_batch():
    with pytest.raises(DataError, match=r"\b3 images.*batch_size=4\b"):
        batch(numbered(3), 0, 0, 4)


# --- fingerprints


def differing(images, labels):
    """A data set and others that differ from it by one thing each."""
    image, label, swapped = images.copy(), labels.copy(), np.arange(len(images))
    image[0, -1, -1, -1] ^= 1
    label[1] += 1
    swapped[[0, -1]] = swapped[[-1, 0]]
    return {
        "given": Dataset(images, labels),
        "image": Dataset(image, labels),
        "label": Dataset(images, label),
        "order of images": Dataset(images[swapped], labels),
        "order of labels": Dataset(images, labels[swapped]),
        "count": Dataset(images[:-1], labels[:-1]),
        "shape": Dataset(images.reshape(len(images), 2, -1, 3), labels),
        "no labels": Dataset(images, None),
    }


@pytest.mark.parametrize("n", [2, 5, 1000, 5001])
def test_another_data_set_has_another_fingerprint(n):
    images = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), np.uint8)
    found = {name: fingerprint(dataset) for name, dataset in differing(images, np.arange(n)).items()}
    assert len(set(found.values())) == len(found)
    assert all(re.fullmatch(r"\S{1,40}", text) for text in found.values())


def test_a_fingerprint_tells_the_data_not_how_they_are_kept(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8), np.arange(50)
    np.save(tmp_path / "a.npy", images)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    others = [(mapped, labels), (np.asfortranarray(images), labels), (images, labels.astype(np.int32))]
    assert {fingerprint(Dataset(*other)) for other in others} == {fingerprint(Dataset(images, labels))}


def test_the_fingerprint_of_20_gigabytes_is_cheap(tmp_path):
    """All zeros, which need no room on the disk."""
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (20_000_000, 32, 32, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 20_000_000 * 1024)
    dataset = load(f"npz:{tmp_path / 'a.npy'}")
    clock = time.perf_counter()
    assert fingerprint(dataset).startswith("20000000x32x32x1-")
    assert time.perf_counter() - clock < 5


@pytest.mark.parametrize("side", [1, 37, 64])  # of which many share a page, some cross one, or take three
def test_batches_of_a_large_map_are_those_of_an_array(tmp_path, monkeypatch, side):
    images = np.random.default_rng(0).integers(0, 256, (50, side, side, 3), np.uint8)
    np.save(tmp_path / "a.npy", images)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    monkeypatch.setattr(loader, "LARGE", 0)
    for source in (mapped, mapped[::-1], mapped[..., :1], np.asfortranarray(images)):
        for step in range(7):
            one = batch(Dataset(source, None), 0, step, 16)
            np.testing.assert_array_equal(one["image"], np.array(source)[one["index"]])


# --- prefetch


@pytest.mark.parametrize(("first", "last"), [(0, 10), (5, 6), (5, 7), (4, 4)])
def test_prefetch_keeps_the_order(first, last):
    assert list(prefetch(lambda step: step * step, first, last)) == [step * step for step in range(first, last)]


def test_prefetch_with_several_threads_keeps_the_order():
    def slow_when_even(step):
        time.sleep(0.002 * (step % 2 == 0))
        return step

    assert list(prefetch(slow_when_even, 0, 30, ahead=8, threads=4)) == list(range(30))


def test_prefetch_prepares_two_ahead_and_no_more():
    made = [threading.Event() for _ in range(10)]
    steps = prefetch(lambda step: made[step].set(), 0, 10)
    next(steps)
    assert made[2].wait(10)  # while nobody asks
    assert not made[3].wait(0.1)
    steps.close()


@pytest.mark.parametrize("error", [DataError("gone"), MemoryError()], ids=["gone", "memory"])
def test_fault_58_an_exception_in_the_thread_reaches_the_caller(error):
    """At its step and not before, and in no more time than the steps ahead take."""

    def make(step):
        if step == 3:
            raise error
        return step

    steps, clock = prefetch(make, 0, 9), time.perf_counter()
    assert [next(steps), next(steps), next(steps)] == [0, 1, 2]
    with pytest.raises(type(error)) as caught:
        next(steps)
    assert caught.value is error
    assert time.perf_counter() - clock < 5


# --- digits and other TFDS sets


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folders in which the digits source has made its TFDS data set, as options of `load`."""
    folder = tmp_path_factory.mktemp("digits")
    options = {"data_dir": str(folder / "tfds"), "cache_dir": str(folder / "cache")}
    load("digits", **options)
    return options


def test_digits_are_those_of_scikit_learn(prepared):
    """Each of the 1,797 with its label, in TFDS's own order; 16 gray steps of 255/16, halves upwards."""
    dataset, known = load("digits", **prepared), load_digits()
    assert dataset.images.shape == (1797, 8, 8, 1)
    assert dataset.images.dtype == np.uint8
    assert "tensorflow" not in sys.modules
    scaled = (known.images.astype(int) * 255 + 8) // 16

    def pairs(images, labels):
        return sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))

    assert pairs(dataset.images, dataset.labels) == pairs(scaled.astype(np.uint8), known.target)


def test_tfds_finds_a_prepared_set_by_name(prepared, tmp_path):
    """In a process of its own, where the class of the digits is not known."""
    code = f"""
import sys
import numpy as np
from ddpm_jax.data import load
dataset = load("tfds:digits", data_dir={prepared["data_dir"]!r}, cache_dir={str(tmp_path / "cache")!r})
np.savez({str(tmp_path / "out.npz")!r}, images=dataset.images, labels=dataset.labels)
assert "ddpm_jax.data.digits" not in sys.modules
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, digits = np.load(tmp_path / "out.npz"), load("digits", **prepared)
    np.testing.assert_array_equal(found["images"], digits.images)
    np.testing.assert_array_equal(found["labels"], digits.labels)


@pytest.mark.slow
def test_several_processes_prepare_the_digits_once(tmp_path):
    """Each has them, and one of them says that it has made them."""
    options = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache")}
    code = f"from ddpm_jax.data import load; print(load('digits', **{options}).images.sum())"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert sum("preparing digits/" in text for text in said) == 1


def test_digits_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot use the prepared digits: .*file"):
        load("digits", data_dir=str(tmp_path / "file" / "tfds"), cache_dir=tmp_path / "cache")


def test_digits_by_split_size_and_channels(prepared):
    whole = load("digits", **prepared)
    np.testing.assert_array_equal(load("digits", split="train[:10]", **prepared).images, whole.images[:10])
    doubled = load("digits", image_size=(16,), channels=3, split="train[:10]", **prepared)
    assert doubled.images.shape == (10, 16, 16, 3)
    np.testing.assert_array_equal(doubled.images[..., 0], doubled.images[..., 2])


@pytest.mark.parametrize(
    ("source", "options", "fragment"),
    [
        ("tfds:no_such_set", {}, "no_such_set"),
        ("tfds:celeb_a", {}, "celeb_a is not prepared.*tfds build celeb_a .*or use its pictures as folder:"),
        ("tfds:cifar10/none", {}, "cifar10/none"),
        ("tfds:digits:9.9.9", {}, "9.9.9"),
        ("tfds:", {}, "tfds:"),
        ("tfds:digits", {"split": "test"}, "no split test"),
        ("digits", {"split": "test"}, "no split test"),
        ("imagenet", {}, "none of digits, tfds, folder, npz"),
    ],
)
def test_sets_that_are_not_there(prepared, source, options, fragment):
    with pytest.raises(DataError, match=fragment) as caught:
        load(source, **prepared, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 1000)], ids=["gone", "cut"])
def test_a_prepared_set_without_its_records(prepared, tmp_path, damage):
    shutil.copytree(prepared["data_dir"], tmp_path / "tfds")
    damage(next((tmp_path / "tfds").rglob("*.array_record-*")))
    with pytest.raises(DataError, match=r"digits.*or is damaged.*delete that folder"):
        load("tfds:digits", data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache")

"""TFDS's sets from tiny archives in their exact formats, against the arrays written into them and TFDS's own word."""

import gzip
import io
import json
import re
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tiny_archives import (
    COUNTS,
    FEW,
    FLOWERS,
    NUMBERS,
    add,
    archives,
    cifar10,
    cifar100,
    draw,
    flowers,
    in_order_of_keys,
    jpeg,
    mat,
    mnist,
    publish,
    put,
    take_few,
    tar,
)

from ddpm_jax.data import load, prepare
from ddpm_jax.errors import DataError


@pytest.fixture(autouse=True)
def few(monkeypatch):
    take_few(monkeypatch)


@pytest.fixture
def read(tmp_path):
    """read(name, files, split) -> the rows of the set that is made of the files, as stock TFDS reads them."""

    def rows(name, files, split="train"):
        options = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache"), "image_size": (8,)}
        load(f"tfds:{name}", split=split, files=str(put(tmp_path / "files", files)), **options)
        return tfds.builder(name, data_dir=options["data_dir"]).as_data_source(split)

    return rows


# --- what is read


@pytest.mark.parametrize("split", FEW)
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100"])
def test_rows_are_those_of_the_archive_in_the_order_of_tfds(read, name, split):
    """The keys of the stock builders are the positions in the archive."""
    fine = 100 if name == "cifar100" else 10
    images, labels = draw(split, (32, 32, 3) if "cifar" in name else (28, 28), fine)
    rows, order = read(name, archives(name), split), in_order_of_keys(split, range(FEW[split]))
    assert len(rows) == FEW[split]
    for row, i in zip(rows, order, strict=True):
        np.testing.assert_array_equal(row["image"].squeeze(), images[i])
        assert row["label"] == labels[i]
        assert row.get("id", b"").decode() == (f"{split}_{i:05d}" if "cifar" in name else "")
        assert row.get("coarse_label", 7) == 7
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("split", FLOWERS)
def test_flowers(read, split):
    numbers = NUMBERS[{"train": "trnid", "test": "tstid", "validation": "valid"}[split]]
    files = [f"image_{number:05d}.jpg" for number in numbers]
    rows = read("oxford_flowers102", archives("oxford_flowers102"), split)
    for row, i in zip(rows, in_order_of_keys(split, files), strict=True):
        assert row["file_name"].decode() == files[i]
        assert row["label"] == (101 if numbers[i] == 6 else 9 + numbers[i])  # from 0; in the file, from 1
        np.testing.assert_array_equal(row["image"], np.asarray(Image.open(io.BytesIO(jpeg(numbers[i])))))


@pytest.mark.parametrize("name", COUNTS)
def test_a_prepared_set_tells_what_the_stock_builder_tells(read, name, tmp_path):
    read(name, archives(name))
    made, stock = (tfds.builder(name, data_dir=tmp_path / folder).info for folder in ("tfds", "empty"))
    assert made.full_name == stock.full_name
    assert repr(made.features) == repr(stock.features)
    assert {split: made.splits[split].num_examples for split in made.splits} == COUNTS[name]
    told = json.loads((tmp_path / "tfds" / made.full_name / "dataset_info.json").read_text())
    assert told["moduleName"] == type(tfds.builder(name)).__module__
    assert told["fileFormat"] == "array_record"


def test_the_names_of_cifars_classes_are_those_of_the_archive(read, tmp_path):
    read("cifar100", archives("cifar100"))
    features = tfds.builder("cifar100", data_dir=tmp_path / "tfds").info.features
    assert features["label"].names == [f"fine {i}" for i in range(100)]
    assert features["coarse_label"].names == [f"coarse {i}" for i in range(20)]


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("cifar10", "50000 training images and 10000 test images"),
        ("fashion_mnist", "training set of 60000 examples and a test set of 10000"),
        ("kmnist", "70000 images"),
    ],
)
def test_the_counts_are_those_that_tfds_states(monkeypatch, name, stated):
    monkeypatch.undo()
    assert stated in tfds.builder(name).info.description.replace(",", "")
    numbers = [int(word) for word in stated.split() if word.isdigit()]
    counts = list(prepare.SETS[name].counts.values())
    assert numbers in (counts, [sum(counts)])


# --- what users have: unpacked, compressed anew, somewhere else


@pytest.mark.parametrize(
    ("name", "files"),
    [
        pytest.param("mnist", mnist(), id="unpacked idx files"),
        pytest.param("mnist", {k + ".gz": gzip.compress(v, 1, mtime=7) for k, v in mnist().items()}, id="gzipped anew"),
        pytest.param("mnist", {k + ".gz": v for k, v in mnist().items()}, id="unpacked by another's name"),
        pytest.param("cifar10", cifar10(), id="unpacked tar"),
        pytest.param("cifar10", {k.split("/")[-1]: v for k, v in cifar10().items()}, id="files of the tar alone"),
        pytest.param("cifar10", {"cifar-10-binary.tar": tar(cifar10(), mode="w")}, id="tar not compressed"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": tar(cifar10(), mode="w")}, id="tar by another's name"),
        pytest.param(
            "cifar10",
            {"cifar-10-binary.tar.gz": tar({f"./{k}": v for k, v in cifar10().items()})},
            id="tar of the current folder",
        ),
    ],
)
def test_the_same_files_in_other_wrapping_are_the_same_set(read, capsys, name, files):
    rows = read(name, files)
    images = draw("train", (32, 32, 3) if name == "cifar10" else (28, 28, 1), 10)[0]
    assert sorted(row["image"].tobytes() for row in rows) == sorted(image.tobytes() for image in images)
    assert capsys.readouterr().out.count("their contents were checked, not their checksums") == 1


def test_files_of_a_set_that_is_prepared_are_not_read(read, capsys):
    rows = read("mnist", mnist())
    assert "is not read" not in capsys.readouterr().out
    assert len(read("mnist", dict.fromkeys(mnist(), b"others"))) == len(rows)
    assert re.search(r"mnist/3.0.1 is prepared already, in .*; .*files is not read", capsys.readouterr().out)


def test_original_archives_need_no_note(read, capsys, monkeypatch):
    files = archives("cifar10")
    publish(monkeypatch, "cifar10", files)
    read("cifar10", files)
    assert "checksums" not in capsys.readouterr().out


# --- what cannot be used


def without(files, *gone):
    return {name: content for name, content in files.items() if name not in gone}


def cut(name, size, files=None):
    files = files or archives(name)
    return {file: content[:size] if i == 0 else content for i, (file, content) in enumerate(files.items())}


def flipped(name):
    """The archives with one bit changed in the middle of the first."""
    files = archives(name)
    first = next(iter(files))
    content = bytearray(files[first])
    content[len(content) // 2] ^= 4
    return files | {first: bytes(content)}


def changed(name, file, content):
    """CIFAR's archive with other content of one file, or without it."""
    files = {"cifar10": cifar10, "cifar100": cifar100}[name]()
    inside = next(full for full in files if full.endswith(file))
    files = without(files, inside) if content is None else files | {inside: content}
    return {f"cifar-{name[5:]}-binary.tar.gz": tar(files)}


def odd(*about, **more):
    return {"cifar-10-binary.tar.gz": tar(cifar10(), lambda archive: add(archive, *about, **more))}


BATCH = "cifar-10-batches-bin/data_batch_1.bin"
IMAGES = "train-images-idx3-ubyte"
FLOWER = archives("oxford_flowers102")


@pytest.mark.parametrize(
    ("name", "files", "fragment"),
    [
        pytest.param("mnist", {}, r"there is no train-images-idx3-ubyte\.gz nor train-images-idx3-ubyte in .*files"),
        pytest.param("cifar10", {}, r"there is no cifar-10-binary\.tar\.gz nor cifar-10-batches-bin/batches\.meta"),
        pytest.param("oxford_flowers102", {}, r"there is no imagelabels\.mat"),
        pytest.param("mnist", without(mnist(), "t10k-labels-idx1-ubyte"), "there is no t10k-labels"),
        pytest.param("cifar10", without(cifar10(), BATCH), "there is no .*data_batch_1"),
        pytest.param("mnist", cut("mnist", 300), f"cannot read .*{IMAGES}.*damaged or truncated"),
        pytest.param("mnist", cut("mnist", 300, mnist()), f"{IMAGES} is not an idx file of 20 x 28 x .*truncated"),
        pytest.param("mnist", mnist() | {IMAGES: mnist()[IMAGES] + b"0"}, f"{IMAGES} is not an idx file of 20 x 28 x"),
        pytest.param(
            "mnist", mnist() | {IMAGES: b"\0\0\t\3" + mnist()[IMAGES][4:]}, f"{IMAGES} is not an idx", id="signed"
        ),
        pytest.param("mnist", mnist() | {IMAGES: b""}, f"{IMAGES} is not an idx file"),
        pytest.param("mnist", flipped("mnist"), f"cannot read .*{IMAGES}.*damaged"),
        pytest.param(
            "mnist", mnist() | {IMAGES: mnist()["t10k-images-idx3-ubyte"]}, f"{IMAGES} is not an idx file", id="other"
        ),
        pytest.param("mnist", {k + ".gz": tar(mnist()) for k in mnist()}, f"{IMAGES}.gz is not an idx", id="a tar"),
        pytest.param(
            "mnist",
            mnist() | {"train-labels-idx1-ubyte": mnist()["train-labels-idx1-ubyte"][:-1] + b"\12"},
            "a label of mnist is 10, but there are 10 classes",
            id="label",
        ),
        pytest.param("cifar10", cut("cifar10", 30_000), "cannot read .*cifar-10-binary.*damaged or truncated"),
        pytest.param("cifar10", cut("cifar10", -6), "cannot read .*cifar-10-binary.*damaged", id="cut in its checksum"),
        pytest.param("cifar10", flipped("cifar10"), "cannot read .*cifar-10-binary.*damaged"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": b"<html>404</html>"}, "cannot read .*cifar-10-binary"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": b""}, "cannot read .*cifar-10-binary", id="empty"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": tar(cifar100())}, "has no cifar-10-.*another archive"),
        pytest.param("cifar10", changed("cifar10", "_2.bin", None), "has no .*data_batch_2.bin.*truncated"),
        pytest.param("cifar10", changed("cifar10", "_2.bin", b"1" * 3073), "data_batch_2.bin.* not those of 20 images"),
        pytest.param("cifar10", changed("cifar10", ".txt", b"a\nb\n"), "batches.meta.txt .* names 2 classes, not 10"),
        pytest.param(
            "cifar10", changed("cifar10", "test_batch.bin", b"\12" + bytes(30729)), "a label of cifar10 is 10"
        ),
        pytest.param("cifar100", changed("cifar100", "test.bin", b"\24" + bytes(30739)), "a coarse_label .* is 20"),
        pytest.param("cifar10", changed("cifar10", ".txt", b"a\n" * 10), "names 1 classes, not 10", id="names"),
        pytest.param("cifar10", odd("../evil", b"x"), r"member, '\.\./evil'"),
        pytest.param("cifar10", odd("/etc/evil", b"x"), r"member, '/etc/evil'"),
        pytest.param("cifar10", odd("link", type=tarfile.SYMTYPE, linkname="/etc"), "member, 'link'", id="link"),
        pytest.param("cifar10", odd("hard", type=tarfile.LNKTYPE, linkname=BATCH), "member, 'hard'", id="hard"),
        pytest.param("cifar10", odd("device", type=tarfile.CHRTYPE), "member, 'device'", id="device"),
        pytest.param("cifar10", odd(BATCH, b"x"), "member, .*data_batch_1", id="twice"),
        pytest.param("oxford_flowers102", without(FLOWER, "setid.mat"), "there is no setid.mat"),
        pytest.param(
            "oxford_flowers102", FLOWER | {"setid.mat": FLOWER["setid.mat"][:-1]}, "setid.mat is not the orig"
        ),
        pytest.param(
            "oxford_flowers102",
            FLOWER | {"imagelabels.mat": mat(labels=[12, 11, 13, 14, 15, 102])},
            "imagelabels.mat is not",
        ),
        pytest.param(
            "oxford_flowers102",
            FLOWER | {"102flowers.tgz": tar(without(flowers(), "jpg/image_00003.jpg"))},
            "has no jpg/image_00003.jpg",
        ),
        pytest.param(
            "oxford_flowers102",
            FLOWER | {"102flowers.tgz": tar(flowers() | {"jpg/image_00003.jpg": b"<html>"})},
            "image_00003.jpg .*is not a JPEG",
        ),
    ],
)
def test_archives_that_cannot_be_used(read, tmp_path, name, files, fragment):
    """Nothing is prepared; the right files put there, everything is."""
    with pytest.raises(DataError, match=fragment) as caught:
        read(name, files)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tfds" / name).exists()
    read(name, archives(name))


def test_a_tar_that_unpacks_to_gigabytes(read, monkeypatch):
    """Told by what its members claim, before any of it is read."""
    endless = tarfile.TarInfo("endless")
    endless.size = 2**40
    with pytest.raises(DataError, match=r"unpacks to more than 2\.1 GB"):
        read("cifar10", {"cifar-10-binary.tar.gz": tar({}, lambda archive: archive.fileobj.write(endless.tobuf()))})

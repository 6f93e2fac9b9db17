"""Archives of TFDS's sets with a few images, written here byte by byte as their formats say."""

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.hashing import Hasher

from ddpm_jax.data import prepare

FEW, FLOWERS = {"train": 20, "test": 10}, {"train": 3, "test": 2, "validation": 1}
COUNTS = dict.fromkeys(("fashion_mnist", "mnist", "kmnist", "cifar10", "cifar100"), FEW)
COUNTS |= {"oxford_flowers102": FLOWERS}


def draw(split, shape, classes):
    random = np.random.default_rng(FEW[split])
    return random.integers(0, 256, (FEW[split], *shape), np.uint8), random.integers(0, classes, FEW[split], np.uint8)


def mnist():
    """The files of MNIST and its kin: big-endian sizes after 0, 0, 8 (unsigned bytes) and the rank."""
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = draw(split, (28, 28), 10)
        files[f"{prefix}-images-idx3-ubyte"] = (
            bytes([0, 0, 8, 3]) + struct.pack(">3i", *images.shape) + images.tobytes()
        )
        files[f"{prefix}-labels-idx1-ubyte"] = bytes([0, 0, 8, 1]) + struct.pack(">i", len(labels)) + labels.tobytes()
    return files


def records(images, labels, before=b""):
    """Labels, then all of red, all of green, all of blue, row by row."""
    colours = [[image[:, :, colour].tobytes() for colour in range(3)] for image in images]
    return b"".join(before + bytes([y]) + b"".join(rgb) for y, rgb in zip(labels, colours, strict=True))


def names(kind, n):
    return "".join(f"{kind} {i}\n" for i in range(n)).encode() + b"\n"


def cifar10():
    """The members of cifar-10-binary.tar.gz."""
    images, labels = draw("train", (32, 32, 3), 10)
    parts = {f"data_batch_{i + 1}.bin": records(images[4 * i :][:4], labels[4 * i :][:4]) for i in range(5)}
    parts |= {"test_batch.bin": records(*draw("test", (32, 32, 3), 10)), "batches.meta.txt": names("class", 10)}
    return {f"cifar-10-batches-bin/{name}": part for name, part in parts.items()} | {"readme.html": b"<html>"}


def cifar100():
    """The members of cifar-100-binary.tar.gz; the coarse label, always 7, stands before the fine one."""
    parts = {f"{split}.bin": records(*draw(split, (32, 32, 3), 100), before=b"\7") for split in FEW}
    parts |= {"coarse_label_names.txt": names("coarse", 20), "fine_label_names.txt": names("fine", 100)}
    return {f"cifar-100-binary/{name}": part for name, part in parts.items()}


NUMBERS = {"trnid": [6, 2, 4], "tstid": [1, 5], "valid": [3]}  # of the pictures in each split, from 1


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 30), (40 * number, 0, 99)).save(buffer, "JPEG")
    return buffer.getvalue()


def flowers():
    return {f"jpg/image_{number:05d}.jpg": jpeg(number) for number in range(1, 7)}


def mat(**arrays):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {name: np.array([values], np.uint8) for name, values in arrays.items()})
    return b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:]  # without the time


def tar(files, change=lambda archive: None, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            add(archive, name, content)
        change(archive)
    return buffer.getvalue()


def add(archive, name, content=b"", **about):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def archives(name):
    """{name: bytes} of what a user downloads."""
    if name == "oxford_flowers102":
        labels = {"imagelabels.mat": mat(labels=[11, 12, 13, 14, 15, 102]), "setid.mat": mat(**NUMBERS)}
        return {"102flowers.tgz": tar(flowers()), **labels}
    if name.startswith("cifar"):
        return {f"cifar-{name[5:]}-binary.tar.gz": tar({"cifar10": cifar10, "cifar100": cifar100}[name]())}
    return {file + ".gz": gzip.compress(content) for file, content in mnist().items()}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def publish(monkeypatch, name, files):
    """Let TFDS know these files, instead of the real ones, by their sizes and checksums."""
    stock = tfds.builder_cls(name)
    (base, _), *_ = (url.rsplit("/", 1) for url in stock.url_infos)
    told = {
        f"{base}/{file}": tfds.core.download.checksums.UrlInfo(
            tfds.core.utils.Size(len(content)), hashlib.sha256(content).hexdigest(), file
        )
        for file, content in files.items()
    }
    monkeypatch.setattr(stock, "url_infos", told)


def take_few(monkeypatch):
    """Let the sets have a few images, and let there be no network."""
    for name, counts in COUNTS.items():
        monkeypatch.setitem(prepare.SETS, name, prepare.SETS[name]._replace(counts=counts))
    publish(monkeypatch, "oxford_flowers102", archives("oxford_flowers102"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://localhost:9")  # where nothing listens
    monkeypatch.setenv("no_proxy", "")


def in_order_of_keys(split, keys):
    """TFDS sorts by a hash of the key that is salted with the split's name."""
    return sorted(range(len(keys)), key=lambda i: Hasher(split).hash_key(keys[i]))

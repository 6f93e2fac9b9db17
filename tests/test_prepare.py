"""TFDS's sets from tiny archives in their exact formats, against the arrays written into them and TFDS's own word."""

import gzip
import hashlib
import http.server
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from conftest import assert_one_line
from PIL import Image
from tensorflow_datasets.core.hashing import Hasher

from ddpm_jax.data import load, prepare
from ddpm_jax.errors import DataError

FEW, FLOWERS = {"train": 20, "test": 10}, {"train": 3, "test": 2, "validation": 1}
COUNTS = dict.fromkeys(("fashion_mnist", "mnist", "kmnist", "cifar10", "cifar100"), FEW)
COUNTS |= {"oxford_flowers102": FLOWERS}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Sets of a few images, and no network."""
    for name, counts in COUNTS.items():
        monkeypatch.setitem(prepare.SETS, name, prepare.SETS[name]._replace(counts=counts))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://localhost:9")  # where nothing listens
    monkeypatch.setenv("no_proxy", "")


# --- the formats


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
    return buffer.getvalue()


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


@pytest.fixture
def read(tmp_path):
    """read(name, files, split) -> the rows of the set that is made of the files, as stock TFDS reads them."""

    def rows(name, files, split="train"):
        options = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache"), "image_size": (8,)}
        load(f"tfds:{name}", split=split, files=str(put(tmp_path / "files", files)), **options)
        return tfds.builder(name, data_dir=options["data_dir"]).as_data_source(split)

    return rows


def in_order_of_keys(split, keys):
    """TFDS sorts by a hash of the key that is salted with the split's name."""
    return sorted(range(len(keys)), key=lambda i: Hasher(split).hash_key(keys[i]))


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
        pytest.param("mnist", cut("mnist", 300), f"cannot read .*{IMAGES}.*damaged or a part"),
        pytest.param("mnist", cut("mnist", 300, mnist()), f"{IMAGES} is no idx file of 20 x 28 x 28 .*or a part"),
        pytest.param("mnist", mnist() | {IMAGES: mnist()[IMAGES] + b"0"}, f"{IMAGES} is no idx file of 20 x 28 x 28"),
        pytest.param(
            "mnist", mnist() | {IMAGES: b"\0\0\t\3" + mnist()[IMAGES][4:]}, f"{IMAGES} is no idx", id="signed"
        ),
        pytest.param("mnist", mnist() | {IMAGES: b""}, f"{IMAGES} is no idx file"),
        pytest.param("mnist", flipped("mnist"), f"cannot read .*{IMAGES}.*damaged"),
        pytest.param(
            "mnist", mnist() | {IMAGES: mnist()["t10k-images-idx3-ubyte"]}, f"{IMAGES} is no idx file of 20", id="other"
        ),
        pytest.param("mnist", {k + ".gz": tar(mnist()) for k in mnist()}, f"{IMAGES}.gz is no idx file", id="a tar"),
        pytest.param(
            "mnist",
            mnist() | {"train-labels-idx1-ubyte": mnist()["train-labels-idx1-ubyte"][:-1] + b"\12"},
            "a label of mnist is 10, but there are 10 classes",
            id="label",
        ),
        pytest.param("cifar10", cut("cifar10", 30_000), "cannot read .*cifar-10-binary.*damaged or a part"),
        pytest.param("cifar10", cut("cifar10", -6), "cannot read .*cifar-10-binary.*damaged", id="cut in its checksum"),
        pytest.param("cifar10", flipped("cifar10"), "cannot read .*cifar-10-binary.*damaged"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": b"<html>404</html>"}, "cannot read .*cifar-10-binary"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": b""}, "cannot read .*cifar-10-binary", id="empty"),
        pytest.param("cifar10", {"cifar-10-binary.tar.gz": tar(cifar100())}, "has no cifar-10-.*another archive"),
        pytest.param("cifar10", changed("cifar10", "_2.bin", None), "has no .*data_batch_2.bin.*a part"),
        pytest.param("cifar10", changed("cifar10", "_2.bin", b"1" * 3073), "data_batch_2.bin.* not those of 20 images"),
        pytest.param("cifar10", changed("cifar10", ".txt", b"a\nb\n"), "batches.meta.txt .* names 2 classes, not 10"),
        pytest.param(
            "cifar10", changed("cifar10", "test_batch.bin", b"\12" + bytes(30729)), "a label of cifar10 is 10"
        ),
        pytest.param("cifar100", changed("cifar100", "test.bin", b"\24" + bytes(30739)), "a coarse_label .* is 20"),
        pytest.param("cifar10", odd("../evil", b"x"), r"odd member, '\.\./evil'"),
        pytest.param("cifar10", odd("/etc/evil", b"x"), r"odd member, '/etc/evil'"),
        pytest.param("cifar10", odd("link", type=tarfile.SYMTYPE, linkname="/etc"), "odd member, 'link'", id="link"),
        pytest.param("cifar10", odd("hard", type=tarfile.LNKTYPE, linkname=BATCH), "odd member, 'hard'", id="hard"),
        pytest.param("cifar10", odd("device", type=tarfile.CHRTYPE), "odd member, 'device'", id="device"),
        pytest.param("cifar10", odd(BATCH, b"x"), "odd member, .*data_batch_1", id="twice"),
        pytest.param("oxford_flowers102", without(FLOWER, "setid.mat"), "there is no setid.mat"),
        pytest.param("oxford_flowers102", FLOWER | {"setid.mat": b"MATLAB"}, "cannot read .*setid.mat"),
        pytest.param("oxford_flowers102", FLOWER | {"setid.mat": mat(trnid=[1])}, "cannot read tstid in .*setid.mat"),
        pytest.param(
            "oxford_flowers102", FLOWER | {"setid.mat": mat(**NUMBERS | {"valid": [1, 2]})}, "not those of .*'train': 3"
        ),
        pytest.param(
            "oxford_flowers102", FLOWER | {"setid.mat": mat(**NUMBERS | {"valid": [7]})}, "numbers from 1 to 7 for 6"
        ),
        pytest.param("oxford_flowers102", FLOWER | {"imagelabels.mat": mat(labels=[103] * 6)}, "not those of"),
        pytest.param("oxford_flowers102", FLOWER | {"imagelabels.mat": mat(labels=[0] * 6)}, "not those of"),
        pytest.param(
            "oxford_flowers102",
            FLOWER | {"102flowers.tgz": tar(without(flowers(), "jpg/image_00003.jpg"))},
            "has no jpg/image_00003.jpg",
        ),
        pytest.param(
            "oxford_flowers102",
            FLOWER | {"102flowers.tgz": tar(flowers() | {"jpg/image_00003.jpg": b"<html>"})},
            "image_00003.jpg .*is no JPEG",
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


# --- downloads, through a proxy that plays the server


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.answer(self, self.server.files.get(self.path.rsplit("/", 1)[-1]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A proxy for http://; its `answer(request, content)` may be replaced, its `files` are what it serves."""
    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as running:
        running.files, running.asked, running.answer = archives("fashion_mnist"), [], send
        publish(monkeypatch, "fashion_mnist", running.files)
        monkeypatch.setenv("http_proxy", f"http://localhost:{running.server_port}")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def send(request, content, told=None, code=200):
    request.send_response(code)
    if told != 0:
        request.send_header("Content-Length", str(told or len(content)))
    request.end_headers()
    request.wfile.write(content)


def fetch(tmp_path):
    options = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache")}
    return load("tfds:fashion_mnist", **options)


def left(tmp_path):
    """The names of all files below the folder of the data sets."""
    return sorted(path.name for path in (tmp_path / "tfds").rglob("*") if path.is_file())


def test_what_is_not_prepared_is_downloaded_and_prepared(server, tmp_path, capsys):
    images, labels = draw("train", (28, 28, 1), 10)
    dataset, order = fetch(tmp_path), in_order_of_keys("train", range(20))
    np.testing.assert_array_equal(dataset.images, images[order])
    np.testing.assert_array_equal(dataset.labels, labels[order])
    assert len(server.asked) == 4
    said = capsys.readouterr().out.splitlines()
    assert ["downloading" in line for line in said[:5]] == [True] * 4 + [False]
    assert said[4].startswith("preparing fashion_mnist/3.0.1 in ")
    fetch(tmp_path)
    assert len(server.asked) == 4


def half(request, content):
    send(request, content[: len(content) // 2], told=len(content))


def half_untold(request, content):
    send(request, content[: len(content) // 2], told=0)


def other(request, content):
    send(request, content[:-1] + b"?")


def stalls(request, content):
    request.wfile.flush()
    request.server.woken.wait(20)


def gone(request, content):
    send(request, b"no such file", code=404)


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        (half, "Connection broken|IncompleteRead"),
        (half_untold, r"[\d,]+ bytes of [\d,]+ came"),
        (other, "its checksum is another"),
        (stalls, "timed out"),
        (gone, "404"),
    ],
)
def test_a_failed_download_leaves_nothing_and_the_next_one_starts_clean(
    server, tmp_path, monkeypatch, answer, fragment
):
    """The third of the four files fails; the two that came whole are not asked for again."""
    monkeypatch.setattr(prepare, "TIMEOUT", 0.5)
    server.woken = threading.Event()
    server.answer = lambda request, content: (answer if len(server.asked) == 3 else send)(request, content)
    with pytest.raises(DataError, match="cannot download http://fashion-mnist") as caught:
        fetch(tmp_path)
    server.woken.set()
    assert re.search(fragment, str(caught.value))
    assert re.search(r"put (t\S+gz,? ){4}into a folder DIR and run python -m ddpm_jax.* --files=DIR", str(caught.value))
    assert [name for name in left(tmp_path) if "idx" in name] == sorted(Path(url).name for url in server.asked[:2])
    fetch(tmp_path)
    assert len(server.asked) == 5


def test_a_download_that_was_killed_or_spoiled_is_not_taken_for_whole(server, tmp_path):
    first, second = list(server.files)[:2]
    folder = tmp_path / "tfds" / "downloads" / "fashion_mnist"
    put(folder, {first + ".part": server.files[first][:99], second: server.files[second][:-1] + b"?"})
    fetch(tmp_path)
    assert len(server.asked) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == server.files


def test_without_a_network_the_failure_is_one_line_at_once(tmp_path):
    with pytest.raises(DataError, match=r"cannot download http://fashion-mnist.*refused.*--files=DIR") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert [name for name in left(tmp_path) if not name.endswith(".lock")] == []


def test_training_on_a_set_that_cannot_be_had_ends_in_one_line(script, tmp_path):
    proxy = {"https_proxy": "http://localhost:9", "no_proxy": ""}
    options = ["--config=configs/cifar10.py", f"--config.data.data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    done = script("train.py", *options, **proxy)
    assert done.returncode == 3
    assert_one_line(done)
    assert "cifar-10-binary.tar.gz" in done.stderr
    assert "downloading https://" in done.stdout


# --- sets that others have prepared


def test_a_set_kept_as_tfrecord_is_named_as_such(read, tmp_path):
    """The folder made by TFDS with TensorFlow, by default: the records lie in files of another format and name."""
    read("mnist", archives("mnist"))
    folder = next((tmp_path / "tfds" / "mnist").iterdir())
    for path in folder.glob("*array_record*"):
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    about = folder / "dataset_info.json"
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        DataError, match=r"mnist.* as tfrecord, which only TensorFlow reads; give another data.data_dir"
    ):
        load("tfds:mnist", data_dir=str(tmp_path / "tfds"))


@pytest.mark.faults
def test_a_full_disk_leaves_no_set_and_with_room_it_is_prepared(mount, tmp_path):
    disk, files = mount("size=30k"), str(put(tmp_path / "files", mnist()))
    options = {"data_dir": str(disk), "cache_dir": str(tmp_path / "cache"), "files": files}
    with pytest.raises(DataError, match=r"cannot prepare .*mnist.*No space left.*give another data.data_dir"):
        load("tfds:mnist", **options)
    assert not tfds.builder("mnist", data_dir=disk).is_prepared()
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    assert len(load("tfds:mnist", **options).images) == 20


def test_where_nothing_can_be_written(tmp_path):
    put(tmp_path, {"file": b""})
    with pytest.raises(DataError, match=r"cannot prepare .*mnist.*file.*give another data.data_dir"):
        load("tfds:mnist", data_dir=str(tmp_path / "file" / "tfds"), files=str(tmp_path))

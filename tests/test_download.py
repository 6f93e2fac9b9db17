"""Sets that have to be downloaded, or that others have prepared; and where they cannot be written."""

import http.server
import re
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import assert_one_line
from tiny_archives import archives, draw, in_order_of_keys, mnist, publish, put, take_few

from ddpm_jax.data import load, prepare
from ddpm_jax.errors import DataError


@pytest.fixture(autouse=True)
def few(monkeypatch):
    take_few(monkeypatch)


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
        (half_untold, r"got [\d,]+ bytes of [\d,]+"),
        (other, "its checksum differs"),
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


def test_a_set_kept_as_tfrecord_is_named_as_such(tmp_path):
    """The folder made by TFDS with TensorFlow, by default: the records lie in files of another format and name."""
    options = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache")}
    load("tfds:mnist", files=str(put(tmp_path / "files", mnist())), **options)
    folder = next((tmp_path / "tfds" / "mnist").iterdir())
    for path in folder.glob("*array_record*"):
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    about = folder / "dataset_info.json"
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        DataError, match=r"mnist.* as tfrecord, which only TensorFlow reads; give another data.data_dir"
    ):
        load("tfds:mnist", **options)


@pytest.mark.faults
def test_a_full_disk_leaves_no_set_and_with_room_it_is_prepared(mount, tmp_path):
    disk, files = mount("size=30k"), str(put(tmp_path / "files", mnist()))
    options = {"data_dir": str(disk), "cache_dir": str(tmp_path / "cache"), "files": files}
    with pytest.raises(DataError, match=r"cannot prepare .*mnist.*No space left.*give another data.data_dir"):
        load("tfds:mnist", **options)
    assert not tfds.builder("mnist", data_dir=disk).is_prepared()
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    assert len(load("tfds:mnist", **options).images) == 20


@pytest.mark.parametrize("source", ["tfds:mnist", "digits"])
def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch, source):
    """As no shell expands it in --data-dir=~/tfds."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(put(tmp_path, mnist()))
    load(source, data_dir="~/tfds", cache_dir="~/cache", files="~")
    assert (tmp_path / "tfds" / source.split(":")[-1]).is_dir()
    assert (tmp_path / "cache").is_dir()
    assert not (tmp_path / "~").exists()


def test_where_nothing_can_be_written(tmp_path):
    put(tmp_path, {"file": b""})
    with pytest.raises(DataError, match=r"cannot prepare .*mnist.*file.*give another data.data_dir"):
        load("tfds:mnist", data_dir=str(tmp_path / "file" / "tfds"), files=str(tmp_path))

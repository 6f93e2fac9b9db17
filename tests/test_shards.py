"""Samples that are interrupted and gone on with: the same images as of one command, and nothing taken for another's."""

import json
import os
import signal
import threading

import numpy as np
import pytest
from conftest import make_run

from ddpm_jax import program
from ddpm_jax.commands import evaluate, sample
from ddpm_jax.run import shards

NUM = 40


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A run with classes, so that labels are in the files."""
    return make_run(tmp_path_factory.mktemp("classes"), model={"num_classes": 3})[0]


@pytest.fixture(scope="module")
def given(classes):
    return [f"--workdir={classes}", f"--num={NUM}", "--steps=2", "--batch-size=8"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The npz file of a command that nothing interrupted, as bytes."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sample.py", *given, f"--out={out}"])
        assert sample.main() == 0
    assert names(out) == ["grid.png", "samples.npz"]
    return (out / "samples.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["75", "130"])
def test_fault_85_interrupted_samples_are_kept_and_gone_on_with(
    call, given, whole, tmp_path, monkeypatch, number, code
):
    """A signal after 16 of 40; the same command again makes the other 24 alone. The file is the same, bit for bit."""
    draw, made = program.parallel.generate_batches, []

    def stopped(*args):
        for batch in draw(*args):
            made.append(len(batch))
            if len(made) == 3:  # the loop has asked twice
                os.kill(os.getpid(), number)
                threading.Event().wait(0.2)
            yield batch

    monkeypatch.setattr(program.parallel, "generate_batches", stopped)
    out = tmp_path / "out"
    found, told, err = call(sample, *given, f"--out={out}", "--gif")
    assert (found, err) == (code, "")
    assert told.endswith(f"kept 24 of 40 images in {out}; the same command resumes from there\n")
    assert names(out) == ["denoising.gif", "samples-00000.npz", "samples.json"]
    with pytest.warns(UserWarning, match="24 of 40 samples"):
        assert len(shards.load(out)["images"]) == 24
    found, told, _ = call(sample, *given, f"--out={out}", "--gif")
    assert found == 0
    assert f"resuming after 24 of 40 images in {out}\n" in told
    assert made == [8] * 5
    assert names(out) == ["denoising.gif", "grid.png", "samples.npz"]
    assert (out / "samples.npz").read_bytes() == whole


@pytest.fixture
def drawn(monkeypatch):
    """Pictures that are random functions of (seed, index) in the place of the network's; the one file of them all."""

    def make_draw(*args, **options):
        def draw(params, num, seed, labels, batch_size, start):
            images = np.random.default_rng(seed).integers(0, 256, (num, 1, 4, 4, 1), np.uint8)
            return (images[at : min(at + batch_size, num)] for at in range(start, num, batch_size))

        return draw

    monkeypatch.setattr(program, "make_draw", make_draw)
    return {"images": np.random.default_rng(0).integers(0, 256, (NUM, 4, 4, 1), np.uint8), "labels": np.arange(NUM) % 3}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_fault_85_killed_at_any_moment(call, given, drawn, tmp_path, monkeypatch):
    """Killed, here by an exception, after a random number of written shards, again and again; one shard is damaged."""
    monkeypatch.setattr(shards, "FLUSH_SECONDS", 0.0)  # each batch is written
    monkeypatch.setattr(shards, "SHARD_BYTES", 12 * 16)  # twelve images a shard
    add, random, kills = shards.add, np.random.default_rng(0), 0
    while True:
        left = random.integers(1, 4)

        def die(*args, **others):
            nonlocal left
            left -= 1
            if not left:
                raise MemoryError
            add(*args, **others)

        with monkeypatch.context() as patch:
            patch.setattr(shards, "add", die)
            try:
                assert call(sample, *given, f"--out={tmp_path}")[0] == 0
                break
            except MemoryError:
                kills += 1
        if kills == 2:
            shards.files(tmp_path)[-1].write_bytes(b"damaged")
    assert kills > 2
    assert_same(dict(np.load(tmp_path / "samples.npz")), drawn)
    assert names(tmp_path) == ["grid.png", "samples.npz"]


def test_fault_85_only_the_same_samples_are_gone_on_with(call, given, drawn, tmp_path):
    """By name of what differs; devices and batches are told. --overwrite begins anew."""
    shard = [*given, "--shards=16", f"--out={tmp_path}"]
    assert call(sample, *shard)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other, told in (("--seed=1", "seed is 0 there, 1 here"), ("--steps=3", "steps is 2 there, 3 here")):
        code, _, err = call(sample, *shard, other)
        assert (code, err) == (
            2,
            f"error: {tmp_path} holds samples of other settings ({told}); take another --out, or add --overwrite\n",
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    code, told, _ = call(sample, *shard, "--batch-size=16")
    assert code == 0
    assert "the same images only to rounding from here on: batch_size 8 is now 16\n" in told
    assert call(sample, *shard, "--seed=1", "--overwrite")[0] == 0
    assert any(path.read_bytes() != old for path, old in before.items() if path.suffix == ".npz")
    (tmp_path / "samples.json").write_text("{}")
    assert "samples.json is damaged" in call(sample, *shard)[2]


def test_shards_hold_what_the_one_file_holds(call, given, drawn, tmp_path):
    """Of any size, with their labels; evaluate.py takes the folder as it takes the file, and tells when one is gone."""
    np.savez(tmp_path / "whole.npz", **drawn)
    out = tmp_path / "out"
    assert call(sample, *given, "--shards=15", f"--out={out}")[0] == 0
    assert names(out) == ["grid.png", *(f"samples-0000{i}.npz" for i in range(3)), "samples.json"]
    assert [len(np.load(path)["images"]) for path in shards.files(out)] == [15, 15, 10]
    assert_same(shards.load(out), drawn)
    judged = []
    for samples in (tmp_path / "whole.npz", out):
        options = [f"--samples={samples}", f"--reference=npz:{samples}", "--metrics=moments"]
        assert call(evaluate, *options)[0] == 0
        report = samples.with_suffix(".json") if samples.is_file() else out / "evaluation.json"
        judged.append(json.loads(report.read_text())["metrics"])
    for name, number in judged[0].items():
        assert number["value"] == judged[1][name]["value"]
        assert number["settings"]["images"] == judged[1][name]["settings"]["images"]
    (out / "samples-00001.npz").unlink()
    code, _, err = call(evaluate, *options, "--overwrite")
    assert code == 3
    assert f"{out} lacks some shards; it has samples-00000.npz, samples-00002.npz" in err

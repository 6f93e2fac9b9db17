"""TensorBoard and Weights & Biases, played by fakes: they are shown a run, and whatever they do it goes on."""

import json
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
from conftest import PYTHONPATH, SMALL, fingerprint, logged_metrics

from ddpm_jax.run import boards, log

ROWS = [{"step": step, "loss": 1 / step, "skipped": 0, "kid": None, "seconds_per_step": None} for step in (10, 20)]
GRID = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


class Fake:
    """A module that answers every call, keeps them as (name, positional and named arguments), and fails in one."""

    def __init__(self, fails=None, error=ConnectionError):
        self.calls, self.fails, self.error = [], fails, error
        self.settings = types.SimpleNamespace(mode="online")

    def __getattr__(self, name):
        def answer(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails:
                raise self.error(f"{name} fails\nand says so at length")
            return self

        return answer

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def show(monkeypatch, tmp_path):
    """show(tensorboard, wandb): a run of two rows and a grid, shown to them; the warnings."""
    (tmp_path / "run.json").write_text(json.dumps([{"time": "2026-01-02T03:04:05+00:00"}, {"time": "2027"}]))

    def run(tensorboard, wandb=None):
        monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: tensorboard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opened = boards.open_boards(tmp_path, 5, "faces", {"train": {"steps": 20}})
            writer = log.open_log(tmp_path, 5, 20, opened)
            for row in ROWS:
                writer.write(row)
            writer.image("samples", GRID, 20)
            writer.close()
        assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ROWS
        return [str(warning.message) for warning in caught]

    return run


def test_both_are_shown_everything(show, tmp_path):
    tensorboard, wandb = Fake(), Fake()
    wandb.url = "https://wandb.test/run"
    assert show(tensorboard, wandb) == []
    assert tensorboard.of("SummaryWriter") == [((str(tmp_path),), {"purge_step": 6})]
    told = [("step", 10, 10), ("loss", 0.1, 10), ("skipped", 0, 10), ("step", 20, 20), ("loss", 0.05, 20)]
    assert [args for args, _ in tensorboard.of("add_scalar")] == [*told, ("skipped", 0, 20)]
    (((name, image, step), kinds),) = tensorboard.of("add_image")
    assert (name, image is GRID, step, kinds) == ("samples", True, 20, {"dataformats": "HWC"})
    ((_, options),) = wandb.of("init")
    assert options["project"] == "faces"
    assert options["config"] == {"train": {"steps": 20}}
    assert (options["name"], options["resume"]) == (tmp_path.name, "allow")
    assert options["id"] == f"{tmp_path.name}-2026-01-02T03-04-05-00-00"  # of the first start, so the same ever after
    (first, second, grid) = wandb.of("log")
    assert (first, second) == (
        (({"step": 10, "loss": 0.1, "skipped": 0},), {"step": 10}),
        (({"step": 20, "loss": 0.05, "skipped": 0},), {"step": 20}),
    )
    assert (list(grid[0][0]), grid[1]) == (["samples"], {"step": 20})
    for board, last in ((tensorboard, "close"), (wandb, "finish")):
        assert board.calls[-1][0] == last


TENSORBOARD, WANDB = ("SummaryWriter", "add_scalar", "add_image", "close"), ("login", "init", "log", "Image", "finish")


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("fails", [*TENSORBOARD, *WANDB])
def test_one_that_fails_is_left_out_with_one_warning(show, fails, error):
    """And the other is shown all the same."""
    ours = TENSORBOARD if fails in TENSORBOARD else WANDB
    tensorboard, wandb = (Fake(fails, error) if names is ours else Fake() for names in (TENSORBOARD, WANDB))
    name = "TensorBoard" if ours is TENSORBOARD else "Weights & Biases"
    assert show(tensorboard, wandb) == [f"{name} gets no more data from this run: {fails} fails"]
    failed, other = (tensorboard, wandb) if ours is TENSORBOARD else (wandb, tensorboard)
    assert failed.calls[-1][0] == fails
    assert other.calls[-1][0] in ("close", "finish")


def test_a_package_that_is_missing(show):
    (said,) = show(Fake(), None)  # None in sys.modules: it cannot be imported
    assert said.startswith("Weights & Biases gets no more data from this run: ")
    assert "wandb" in said


def test_no_key_means_no_question(show):
    """Nobody would answer it; but a run that stays on this machine needs none."""

    class NoKey(Fake):
        def login(self, prompt):
            assert not prompt
            return False

    (said,) = show(Fake(), NoKey())
    assert "there is no API key; run wandb login" in said
    offline = NoKey()
    offline.settings.mode = "offline"
    assert show(Fake(), offline) == []
    assert len(offline.of("log")) == 3


def test_one_that_hangs_is_not_waited_for(show, monkeypatch):
    monkeypatch.setattr(boards, "TIMEOUT", 0.2)
    wandb = Fake()
    wandb.init = lambda **_: threading.Event().wait()
    clock = time.monotonic()
    assert show(Fake(), wandb) == ["Weights & Biases has not answered for 0.2 s; metrics.jsonl has what it missed"]
    assert time.monotonic() - clock < 10


def test_none_unless_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    assert boards.open_boards(tmp_path, 0) == []


# A module that writes what it is asked to its own file of calls, and gives itself for all answers.
RECORDER = """
import sys, types
settings = types.SimpleNamespace(mode="offline")
def __getattr__(name):
    def answer(*args, **kwargs):
        with open(__file__ + ".calls", "a") as file:
            print(name, args, kwargs, file=file)
        if name == "FAILS" and kwargs.get("step", 0) > 7:
            raise ConnectionError("the network is gone")
        return sys.modules[__name__]
    if name.startswith("__"):
        raise AttributeError(name)
    return answer
"""


@pytest.mark.slow
def test_a_run_goes_on_without_them(trained, script, tmp_path):
    """Its end is that of a run without boards and without a trace, to the bit; there is one line of warning."""
    for name, fails in (("tensorboardX", ""), ("wandb", "log")):
        (tmp_path / f"{name}.py").write_text(RECORDER.replace("FAILS", fails))
    options = [*SMALL, "--config.train.steps=60", "--cpu-devices=1", f"--workdir={tmp_path / 'run'}"]
    variables = {"PYTHONPATH": f"{tmp_path}:{PYTHONPATH}"}
    done = script("train.py", *options, "--wandb=faces", "--profile=20:22", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: Weights & Biases gets no more data from this run: the network is gone\n"
    assert f"the trace of --profile=20:22 is in {tmp_path / 'run' / 'profile'}" in done.stdout
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    assert fingerprint(tmp_path / "run") == fingerprint(trained)
    assert logged_metrics(tmp_path / "run") == logged_metrics(trained)
    calls = {name: (tmp_path / f"{name}.py.calls").read_text().splitlines() for name in ("tensorboardX", "wandb")}
    assert sum(line.startswith("add_scalar ('loss', ") for line in calls["tensorboardX"]) == 9
    assert sum(line.startswith("add_image ('samples', ") for line in calls["tensorboardX"]) == 1
    (begun,) = (line for line in calls["wandb"] if line.startswith("init "))
    assert "'project': 'faces'" in begun
    assert "'batch_size': 16" in begun
    assert [line.split(" ")[0] for line in calls["wandb"]][-2:] == ["log", "log"]

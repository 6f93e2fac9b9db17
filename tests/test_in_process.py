"""Commands called from a program or a notebook: exactly those options, and nothing left behind in the process."""

import contextlib
import errno
import fcntl
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings

import jax
import numpy as np
import pytest
from conftest import LEAST, SMALL, fingerprint

from ddpm_jax import __main__ as program
from ddpm_jax import errors, parallel
from ddpm_jax.commands import loop, train
from ddpm_jax.errors import ConfigError, Diverged
from ddpm_jax.parallel import devices
from ddpm_jax.run import files, signals

MAINS = ["ddpm_jax.run.__main__", "ddpm_jax.commands.train", "ddpm_jax.commands.sample", "ddpm_jax.commands.evaluate"]
MAINS += [f"ddpm_jax.{name}.__main__" for name in ("data", "plots", "schedules")]
MAINS += ["benchmarks.__main__", *(f"benchmarks.{name}" for name in ("checkpoints", "convolutions", "ensemble"))]
MAINS += [f"benchmarks.{name}" for name in ("growth", "maps", "nets", "networks", "peers", "race", "samplers")]
MAINS += [f"benchmarks.{name}" for name in ("scale", "variants")]


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "of the program"])
def test_a_command_takes_all_its_options_and_no_others(name, given, monkeypatch):
    """Whatever the program is called, the first is not dropped; those given to main take the place of the program's."""
    monkeypatch.setattr(sys, "argv", ["mine.py", "--theirs" if given else "--banana"])
    with pytest.raises(ConfigError, match="unknown option --banana"):
        importlib.import_module(name).main(*[["--banana"]] * given)


@pytest.mark.parametrize("argv", [["sample", "--num=0"], ["train", "--config.train.steps=0"], ["evaluate", "--num=0"]])
def test_the_first_word_is_the_command(argv):
    with pytest.raises(ConfigError, match=r"(num|steps)=0 must be at least 1"):
        program.main(argv)


def test_one_text_is_no_list_of_options():
    with pytest.raises(ConfigError, match=r"options must be a list, .* not the string '--workdir=a --num=3'"):
        program.main("--workdir=a --num=3")


@pytest.mark.parametrize(("own", "given", "shown"), [([], None, False), (["--debug"], None, True)])
@pytest.mark.parametrize("other", [False, True], ids=["none", "of the command"])
def test_debug_is_that_of_the_options_in_use(monkeypatch, capsys, own, given, shown, other):
    def fail(argv):
        raise ConfigError("wrong")

    monkeypatch.setattr(sys, "argv", ["mine.py", *([] if other else own)])
    given = own if other else given
    if other:
        sys.argv.append("--debug")  # which is not the command's
    with pytest.raises(ConfigError) if shown else contextlib.nullcontext():
        assert errors.run(fail, given) == 2
    assert capsys.readouterr().err == ("" if shown else "error: wrong\n")


# --- a second start


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(body, option, ...): train.main on tiny pictures, with body() in the place of training."""
    np.savez(tmp_path / "data.npz", images=np.zeros((16, 4, 4, 1), np.uint8))
    net = [f"--config.model.{name}={','.join(map(str, np.atleast_1d(value)))}" for name, value in LEAST.items()]
    given = [*net, f"--config.data.source=npz:{tmp_path / 'data.npz'}", "--config.train.batch_size=16"]

    def run(body, *argv):
        monkeypatch.setattr(loop, "train", lambda *args, **kwargs: body())
        return train.main([f"--workdir={tmp_path / 'run'}", *given, *argv])

    return run


def fail(error):
    raise error


def left_behind():
    loggers = [logging.getLogger(name).level for name in ("absl", "asyncio")]
    hooks = sys.unraisablehook, warnings.showwarning, sys.stdout, sys.stderr, list(warnings.filters)
    return loggers, hooks, [signal.getsignal(number) for number in signals.CODES], jax.config.jax_platforms


@pytest.mark.parametrize("error", [None, Diverged("far"), KeyboardInterrupt(), SystemExit(75), ValueError()], ids=repr)
def test_fault_87_a_second_start_in_one_process(start, error):
    """However the first has ended, and although its traceback is kept, as a notebook keeps it."""
    before = left_behind()
    with pytest.raises(type(error)) if error else contextlib.nullcontext() as kept:
        start(lambda: fail(error) if error else 0)
    assert start(lambda: 0) == 0
    assert left_behind() == before
    del kept


def test_fault_87_two_at_once_in_one_process(start):
    def again():
        with pytest.raises(ConfigError, match=rf"run is in use by another run \(process {os.getpid()} on "):
            start(lambda: 0)
        return 5

    assert start(again) == 5


def test_run_leaves_the_process_as_it_was(capsys):
    """With the streams that a program has from the beginning, which a script's own take the place of."""
    code = """
import io, sys, warnings
from ddpm_jax import errors

def main(argv):
    print("inside", end="")
    warnings.warn("late")
    assert sys.stdout is not streams[0]

streams = sys.stdout, sys.stderr, warnings.showwarning
print("before", end=" ")
assert errors.run(main, []) == 0
assert streams == (sys.stdout, sys.stderr, warnings.showwarning)
print(" after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "before inside after\n", "warning: late\n")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--cpu-devices=3", "--cpu-devices=3, but this process already uses its CPU as 8; start a new one"),
        ("--platform=tpu", "--platform=tpu is not available, JAX found cpu; another choice needs a new process"),
    ],
)
def test_fault_87_other_devices_than_those_in_use(start, option, text):
    assert start(lambda: 0, "--cpu-devices=8", "--platform=cpu") == 0
    platforms = jax.config.jax_platforms
    with pytest.raises(ConfigError, match=text):
        start(lambda: 0, option)
    assert start(lambda: 0) == 0
    assert (jax.device_count(), jax.config.jax_platforms) == (8, platforms)


@pytest.mark.parametrize(
    ("distributed", "fits"),
    [("auto", True), ("host:1,1,3", True), ("host:1,0,3", False), ("host:1,1,2", False), ("off", False)],
)
def test_fault_87_other_processes_than_those_joined(monkeypatch, distributed, fits):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(devices, "gather", lambda text: [text] * 3)
    monkeypatch.setattr(devices, "make_exit_code_sync", lambda: lambda code: code)
    wrong = pytest.raises(ConfigError, match=r"this process is already number 1 of 3; --distributed=.* needs a new one")
    with contextlib.nullcontext() if fits else wrong:
        parallel.start(16, distributed=distributed)


def test_fault_88_training_in_a_thread(start):
    """It cannot be told of signals, which is said; the handlers of the program stay."""
    before, codes = left_behind(), []

    def inside():
        assert [signal.getsignal(number) for number in signals.CODES] == before[2]
        return 5

    def in_a_thread():
        thread = threading.Thread(target=lambda: codes.append(start(inside)))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="to the main thread only: here none can save and stop"):
        in_a_thread()
    assert codes == [5]


NOTEBOOK = """
import asyncio, sys, threading, warnings
from ddpm_jax.commands import evaluate, sample, train

workdir, *options = sys.argv[1:]

async def cell(main, *argv):  # a notebook's cells run inside its event loop
    return main([f"--workdir={workdir}", *argv])

assert asyncio.run(cell(train.main, *options, "--config.train.steps=20")) == 0
assert asyncio.run(cell(train.main, *options, "--config.train.steps=40")) == 0
codes = []
thread = threading.Thread(target=lambda: codes.append(train.main([f"--workdir={workdir}", *options])))
thread.start()
thread.join()
assert codes == [0], codes
for _ in range(2):
    assert asyncio.run(cell(sample.main, "--num=2", "--steps=2", "--overwrite")) == 0
    assert asyncio.run(cell(evaluate.main, "--metrics=mse", "--num=2", "--steps=1", "--overwrite")) == 0
"""


@pytest.mark.faults
def test_fault_87_the_cells_of_a_notebook(trained, environment, tmp_path):
    """Three starts in one process, the last in a thread, end with the bits of one; run.json has their options."""
    small = [*SMALL, "--cpu-devices=1", "--config.train.steps=60"]
    command = [sys.executable, "-c", NOTEBOOK, tmp_path / "run", *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 2, done.stderr  # one warning, and the line that caused it
    assert "UserWarning: Python delivers signals to the main thread only" in done.stderr
    assert fingerprint(tmp_path / "run") == fingerprint(trained)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    own = [f"--workdir={tmp_path / 'run'}", *small]
    for at, last in zip(starts, (["--config.train.steps=20"], ["--config.train.steps=40"], []), strict=True):
        assert at["argv"] == ["-m", "ddpm_jax", "train", *own, *last]


# --- no home


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """Neither HOME nor an entry in the list of users; the folder of temporary files is tmp_path / "temporary"."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: fail(KeyError(number)))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "temporary"
    assert not os.path.lexists(tmp_path / "~")


PLACES = {
    "ddpm_jax.commands.train": ["--workdir=~/a", "--config=~/a.py", "--config.data.source=folder:~/a"],
    "ddpm_jax.commands.sample": ["--workdir=~/a", "--out=~/a"],
    "ddpm_jax.commands.evaluate": ["--workdir=~/a", "--out=~/a", "--samples=~/a.npz"],
    "ddpm_jax.data.__main__": ["npz:~/a.npz", "folder:~/a", "--data-dir=~/a", "--cache-dir=~/a", "--out=~/a.png"],
    "ddpm_jax.plots.__main__": ["~/a", "--out=~/a"],
    "ddpm_jax.schedules.__main__": ["--out=~/a.png"],
    "ddpm_jax.run.__main__": ["~/a"],
}


@pytest.mark.filterwarnings("ignore:there is no home folder")
@pytest.mark.parametrize(("name", "option"), [(name, option) for name, given in PLACES.items() for option in given])
def test_fault_89_a_place_at_home_without_a_home(run, homeless, tmp_path, name, option):
    """Refused, and no folder named ~ is made."""
    argv = [option]
    if name.endswith(("sample", "evaluate", "plots.__main__")) and "workdir" not in option and option != "~/a":
        argv.append(f"--workdir={run[0]}")
    if name.endswith("data.__main__") and option.startswith("--"):
        argv = ["digits", f"--data-dir={tmp_path}/digits", *argv]
    if option.endswith("folder:~/a"):
        argv.append("--config.data.image_size=8" if name.endswith("train") else "--image-size=8")
    main = importlib.import_module(name).main
    with pytest.raises(ConfigError, match=r"~/a.* begins with ~, but there is no such home folder"):
        main(argv)


def test_fault_89_what_is_kept_without_a_home(homeless, monkeypatch):
    """In the folder of temporary files, the same at each start, or in XDG_CACHE_HOME; said in a line."""
    own = homeless / f"ddpm_jax-{os.getuid()}"
    with pytest.warns(UserWarning, match=f"there is no home folder .* goes to {own}$"):
        assert [files.cache_folder() for _ in range(2)] == [own, own]
    assert own.stat().st_mode & 0o777 == 0o700
    assert files.cache_folder("elsewhere") == files.expand("elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(homeless / "xdg"))
    with pytest.warns(UserWarning, match="goes to .*/xdg/ddpm_jax$"):
        assert files.cache_folder() == homeless / "xdg" / "ddpm_jax"


@pytest.mark.parametrize("how", ["a link", "open to all"])
def test_fault_89_the_folder_of_another_is_not_taken(homeless, tmp_path, how):
    """Compiled programs are read from it."""
    own = homeless / f"ddpm_jax-{os.getuid()}"
    if how == "a link":
        (tmp_path / "theirs").mkdir()
        own.symlink_to(tmp_path / "theirs")
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.warns(UserWarning, match="there is no home folder"):
        found = files.cache_folder()
    assert found != own
    assert found.stat().st_mode & 0o777 == 0o700


def test_fault_89_the_digits_without_a_home(homeless):
    from ddpm_jax import data

    with pytest.warns(UserWarning, match="there is no home folder"):
        assert data.load("digits").images.shape == (1797, 8, 8, 1)
    own = homeless / f"ddpm_jax-{os.getuid()}"
    assert (own / "tensorflow_datasets" / "digits").is_dir()
    assert list(own.glob("*.npy"))


# --- no locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EIO], ids=errno.errorcode.get)
def test_fault_90_a_file_system_without_locks(monkeypatch, tmp_path, number):
    """It is used, with a warning; other faults are faults."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: fail(OSError(number, os.strerror(number))))

    def use():
        files.lock(tmp_path).close()
        with files.locked(tmp_path / "other"):
            return True

    if number == errno.EIO:
        with pytest.raises(OSError, match=r"Input/output error"):
            use()
        return
    with pytest.warns(UserWarning, match="cannot be locked") as told:
        assert use()
    assert [str(line.message).split(" cannot be locked ")[0] for line in told] == [
        str(tmp_path / name) for name in ("lock", "other")
    ]
    assert os.strerror(number) in str(told[0].message)

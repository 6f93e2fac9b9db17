"""Several processes are one run: they agree, or all of them end."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SMALL, fingerprint, free_port, logged_metrics

from ddpm_jax.run import checkpoint

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
HEARTBEAT = 10
AGAIN = {75, -signal.SIGABRT}  # of a process that has lost another: by its own error, or ended by JAX

CONFIG = """
import os, runpy, time
from ddpm_jax import data
from ddpm_jax.errors import DataError

get_config = runpy.run_path("configs/digits.py")["get_config"]
batch, fails = data.batch, os.environ.get("FAILS")


def slow(dataset, seed, step, *rest):
    time.sleep(0.1)
    if fails and step == 14:
        raise DataError("the picture is gone")
    return batch(dataset, seed, step, *rest)


data.batch = slow
"""


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory):
    """start(command, ..., each=its further words, variables=its environment) -> two processes of two devices each.

    A word with PLACE in it says where they meet.
    """
    started = []

    def pair(*command, each=((), ()), variables=({}, {})):
        port, folder = free_port(), tmp_path_factory.mktemp("pair")
        for process in (0, 1):
            place = f"localhost:{port},{process},2"
            words = [str(word).replace("PLACE", place) for word in (*command, *each[process])]
            with open(folder / f"{process}", "w") as file:
                made = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=ROOT,
                    env=environment | QUICK | variables[process],
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
            made.told = folder / f"{process}"
            started.append(made)
        return started[-2:]

    yield pair
    for process in started:
        process.kill()


TRAIN = ["train.py", *SMALL, "--config.train.steps=30", "--cpu-devices=2", "--distributed=PLACE"]
TRAIN += [f"--heartbeat={HEARTBEAT}"]


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    pair = start(*TRAIN, f"--workdir={workdir}")
    assert [process.wait(300) for process in pair] == [0, 0]
    return workdir


def reach(process, line):
    """Read what the process prints until a line begins so."""
    assert any(found.startswith(line) for found in process.stdout), process.told.read_text()


@pytest.mark.faults
def test_fault_65_two_processes_of_two_devices_are_one_of_four(unbroken, script, tmp_path):
    """The same losses, and one checkpoint that both agree on."""
    options = [*SMALL, "--config.train.steps=30", f"--workdir={tmp_path}/one", "--cpu-devices=4"]
    alone = script("train.py", *options, **QUICK)
    assert alone.returncode == 0, alone.stderr
    one, two = logged_metrics(tmp_path / "one"), logged_metrics(unbroken)
    assert [row["step"] for row in two] == [7, 14, 21, 28, 30]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert checkpoint.steps(unbroken / "checkpoints") == [10, 20, 30]


MINUTES = """
import runpy
from ddpm_jax import parallel
from ddpm_jax.commands import budget

get_config = runpy.run_path("configs/digits.py")["get_config"]
budget.fitting_steps = lambda *args: 30 if parallel.is_first() else 20
"""


@pytest.mark.faults
def test_processes_that_measure_another_speed_take_the_number_of_the_first(start, unbroken, tmp_path):
    (tmp_path / "minutes.py").write_text(MINUTES)
    pair = start(*TRAIN, f"--config={tmp_path}/minutes.py", "--config.train.minutes=0.1", f"--workdir={tmp_path}/run")
    assert [process.wait(300) for process in pair] == [0, 0], pair[0].told.read_text()
    assert fingerprint(tmp_path / "run") == fingerprint(unbroken)
    assert logged_metrics(tmp_path / "run") == logged_metrics(unbroken)


@pytest.mark.faults
def test_fault_05_a_signal_to_one_of_two_processes_stops_both(start, tmp_path):
    """Both leave with 75 after the same step, which is saved."""
    options = ["--config.train.steps=100000", "--config.train.checkpoint_every=100000", f"--workdir={tmp_path}/run"]
    pair = start(*TRAIN, *options)
    reach(pair[0], "step")
    pair[1].terminate()
    assert [process.wait(100) for process in pair] == [75, 75]
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.faults
def test_fault_66_a_killed_process_ends_the_other_and_both_resume(start, unbroken, tmp_path):
    """Process 1 killed between two steps, then process 0 while it saves; the same command each time."""
    (tmp_path / "slow.py").write_text(CONFIG)
    command, folder = [*TRAIN, f"--config={tmp_path}/slow.py"], tmp_path / "run" / "checkpoints"
    for victim in (1, 0):
        pair = start(*command, f"--workdir={tmp_path}/run")
        if victim:
            reach(pair[0], "step 14/30")
        else:
            while not (folder / "20").exists():
                assert pair[0].poll() is None
                time.sleep(0.001)
        pair[victim].kill()
        assert pair[1 - victim].wait(HEARTBEAT + 20) in AGAIN
        told = pair[1 - victim].told.read_text()
        assert "another process has ended" in told or "another task died" in told
        assert "Traceback" not in told
    assert checkpoint.steps(folder) == [10]
    pair = start(*command, f"--workdir={tmp_path}/run")
    assert [process.wait(300) for process in pair] == [0, 0]
    assert fingerprint(tmp_path / "run") == fingerprint(unbroken)
    assert logged_metrics(tmp_path / "run") == logged_metrics(unbroken)


RATES = "--config.train.learning_rate=0.1", "--config.train.learning_rate=0.2"
DISAGREE = {
    "fault_67 config": (
        RATES,
        ("black", "black"),
        2,
        ["the processes were not started alike: config/train/learning_rate is 0.1 in process 0, 0.2 in process 1\n"],
    ),
    "fault_67 data": (
        RATES[:1] * 2,
        ("black", "white"),
        2,
        ["the processes were not started alike: data is '40x8x8x1-", "' in process 0, '40x8x8x1-", "' in process 1\n"],
    ),
    "fault_68 no data": (
        RATES[:1] * 2,
        ("black", "empty"),
        3,
        ["cannot read ~/data.npz as npz: ", "No such file", "(process 1)\n"],
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize(("rates", "homes", "code", "parts"), DISAGREE.values(), ids=DISAGREE)
def test_processes_that_cannot_go_together_all_end(start, tmp_path, rates, homes, code, parts):
    """In one line that says the same in both; nothing is written."""
    for home, level in (("black", 0), ("white", 255)):
        (tmp_path / home).mkdir()
        np.savez(tmp_path / home / "data.npz", images=np.full((40, 8, 8, 1), level, np.uint8))
    pair = start(
        *TRAIN,
        f"--workdir={tmp_path}/run",
        "--config.data.source=npz:~/data.npz",
        each=[[rate] for rate in rates],
        variables=[{"HOME": str(tmp_path / home)} for home in homes],
    )
    assert [process.wait(100) for process in pair] == [code, code]
    for process in pair:
        told = process.told.read_text()
        assert told.startswith("error: " + parts[0])
        assert all(part in told for part in parts)
        assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_fault_68_data_that_one_process_loses_while_training(start, tmp_path):
    """It leaves with its error and its exit code, and the other, which waits for it in the next step, ends too."""
    (tmp_path / "slow.py").write_text(CONFIG)
    options = [f"--config={tmp_path}/slow.py", f"--workdir={tmp_path}/run"]
    pair = start(*TRAIN, *options, variables=({}, {"FAILS": "1"}))
    assert pair[1].wait(100) == 3
    assert pair[1].told.read_text() == "error: the picture is gone\n"
    assert pair[0].wait(HEARTBEAT + 20) in AGAIN
    assert "Traceback" not in pair[0].told.read_text()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10]


PROGRAM = """
import os, signal, sys, time
from ddpm_jax import errors, parallel
from ddpm_jax.run import signals

class Own(errors.UserError):
    exit_code = 9

class Further(errors.DataError):
    pass

def fail(kind, process):
    if me == process:
        raise kind(f"of a file \\udcff ä {{kind.__name__}}")
    return me

def main(argv):
    global me
    parallel.start(4, distributed="PLACE", cpu_devices=2, heartbeat=10)
    me = 1 - parallel.is_first()
    with parallel.fail_fast(2), signals.catch():
        agree = parallel.make_exit_code_sync()
        time.sleep({wait} * (1 - me))
        agreed = [agree(None)]
        print(ascii(parallel.gather("")), ascii(parallel.gather("ä€" * me)))
        print(agreed + [agree(code) for code in ((75, None, None), (130, None, None))[me]])
        print(parallel.on_all_processes(lambda: me))
        for process, kind in enumerate((errors.ConfigError, errors.CheckpointError, Own, Further)):
            try:
                parallel.on_all_processes(lambda: fail(kind, process % 2))
            except errors.UserError as error:
                print(type(error).__name__, error.exit_code, ascii(str(error)))
        sys.stdout.flush()
        if me:
            {leave}
        parallel.gather("")

sys.exit(errors.run(main))
"""
TOLD = [
    "['', ''] ['', '\\xe4\\u20ac']",
    "[None, None, 130, None]",
    "ConfigError 2 'of a file \\udcff \\xe4 ConfigError (process 0)'",
    "CheckpointError 4 'of a file \\udcff \\xe4 CheckpointError (process 1)'",
    "Own 9 'of a file \\udcff \\xe4 Own (process 0)'",
    "UserError 1 'of a file \\udcff \\xe4 Further (process 1)'",
]
LEAVE = {
    "fault_68 an error of any kind": ("raise ValueError('mine')", 1, "ValueError: mine\n", 35),
    "fault_05 a signal before the first step": ("os.kill(os.getpid(), signal.SIGTERM)", 75, "", 0),
    "fault_66 no sign of life": ("os.kill(os.getpid(), signal.SIGSTOP)", -signal.SIGKILL, "", 0),
}


@pytest.mark.faults
@pytest.mark.parametrize(("leave", "code", "told", "wait"), LEAVE.values(), ids=LEAVE)
def test_texts_errors_and_endings_reach_the_other_process(start, leave, code, told, wait):
    """Also after waiting for longer than XLA does for a connection; then one of the two leaves alone."""
    pair = start("-c", PROGRAM.format(leave=leave, wait=wait))
    assert pair[0].wait(60 + wait) in AGAIN
    if code == -signal.SIGKILL:
        pair[1].kill()
    assert pair[1].wait(10) == code
    assert pair[1].told.read_text().endswith(told)
    for me, process in enumerate(pair):
        # Gloo's line comes in pieces, between which another may stand.
        lines = [line.strip() for line in process.stdout if "[Gloo]" not in line and "peer ranks" not in line]
        assert lines == [*TOLD[:2], str(me), *TOLD[2:]]


@pytest.mark.faults
def test_processes_that_prepare_the_digits_at_once(start, tmp_path):
    """One does, the other waits and reads."""
    program = "from ddpm_jax import data; print(len(data.load('digits', (), 0).images))"
    pair = start("-c", program, variables=({"TFDS_DATA_DIR": f"{tmp_path}/tfds", "HOME": f"{tmp_path}"},) * 2)
    told = [process.communicate(timeout=100)[0].splitlines() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert [lines[-1] for lines in told] == ["1797", "1797"]
    assert sum("preparing digits/" in line for lines in told for line in lines) == 1

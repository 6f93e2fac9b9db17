"""Signals and the watchdog: in small programs of their own, without JAX; and a step that hangs in a whole run."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from conftest import ROOT, SMALL, fingerprint, logged_metrics

from ddpm_jax.run import checkpoint

HEAD = """
import hashlib, os, signal, sys, threading, time
from ddpm_jax import errors
from ddpm_jax.run import signals

def now():
    os.write(1, b"now\\n")  # not by print, which a signal may interrupt
"""


def run(program, *numbers, seconds=20):
    """Run a program; send it a signal of `numbers` for each line "now" that it prints. The finished process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    late = threading.Timer(seconds, process.kill)
    late.start()
    lines, left = [], list(numbers)
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == "now":
            process.send_signal(left.pop(0))
    err = process.stderr.read()
    late.cancel()
    return subprocess.CompletedProcess(process.args, process.wait(), lines, err)


BEFORE = """
def main(argv):
    with signals.catch():
        now()
        time.sleep(10)

sys.exit(errors.run(main))
"""


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGTERM, 75, ""), (signal.SIGUSR1, 75, ""), (signal.SIGINT, 130, "interrupted\n")],
    ids=["fault_04 SIGTERM", "fault_04 SIGUSR1", "fault_07 Ctrl-C"],
)
def test_a_signal_before_there_is_anything_to_save(number, code, told):
    done = run(BEFORE, number)
    assert (done.returncode, done.stderr) == (code, told)


def test_old_handlers_are_back_afterwards():
    program = """
    old = [signal.signal(number, print) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals.catch():
        assert signal.getsignal(signal.SIGTERM) is not print
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [print, print]
    try:
        with signals.catch():
            raise ValueError
    except ValueError:
        assert signal.getsignal(signal.SIGINT) is print
    print("done")
    """
    assert run(program).stdout == ["done"]


AFTER = """
def main(argv):
    with signals.catch() as asked:
        print(asked())
        for _ in range({times}):
            now()
            {wait}
            print(asked())
    return asked()

sys.exit(errors.run(main))
"""


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGTERM], 75),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGHUP], 75),
        ([signal.SIGUSR1, signal.SIGTERM], 75),
        ([signal.SIGUSR2], 75),
        ([signal.SIGXCPU], 75),
    ],
    ids=["fault_04 SIGTERM", "fault_07 Ctrl-C", "fault_06 SIGTERM again", "fault_06 SIGTERM after Ctrl-C"]
    + [f"fault_04 {name}" for name in ("SIGHUP", "SIGUSR1, then SIGTERM", "SIGUSR2", "SIGXCPU")],
)
def test_a_signal_is_recorded_and_the_first_decides(numbers, code):
    done = run(AFTER.format(times=len(numbers), wait="time.sleep(0.2)"), *numbers)
    assert done.stdout == ["None", *["now", str(code)] * len(numbers)]
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["fault_04 nohup", "fault_04 background"])
def test_what_is_ignored_at_the_start_stays_so(number):
    """As under nohup; a shell that is no terminal's has what it starts in the background ignore Ctrl-C."""
    program = f"signal.signal({int(number)}, signal.SIG_IGN)" + AFTER.format(times=1, wait="time.sleep(0.2)")
    done = run(program, number)
    assert (done.returncode, done.stdout, done.stderr) == (0, ["None", "now", "None"], "")


def test_signals_of_the_program_are_its_own():
    """They come by the same file descriptor."""
    program = "signal.signal(signal.SIGWINCH, lambda *_: print('mine'))" + AFTER.format(times=1, wait="time.sleep(0.2)")
    done = run(program, signal.SIGWINCH)
    assert (done.returncode, done.stdout, done.stderr) == (0, ["None", "now", "mine", "None"], "")


TWICE = """
def announce():
    for _ in range(2):
        time.sleep(0.2)
        now()

def main(argv):
    with signals.catch() as asked:
        asked()
        threading.Thread(target=announce, daemon=True).start()
        {wait}

sys.exit(errors.run(main))
"""
WAITS = {
    "sleep": "time.sleep(60)",
    "lock": "threading.Event().wait(60)",
    "native code": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=["fault_06 " + name for name in WAITS])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_leaves_at_once(first, wait):
    """Whatever the main thread is doing, also where it cannot call a handler."""
    started = time.monotonic()
    done = run(TWICE.replace("{wait}", wait), first, signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (130, ["now", "now"], "")
    assert time.monotonic() - started < 10


HANGS = """
def stuck(event):
    event.wait({seconds})

def main(argv):
    with signals.watchdog({patience}, {abort}) as feed:
        event = threading.Event()
        other = threading.Thread(target=stuck, args=[event], daemon=True)
        other.start()
        for _ in range(15):
            time.sleep(0.1)
            feed()
        {end}
        print(threading.active_count())

sys.exit(errors.run(main))
"""


def test_fault_69_a_watchdog_shows_where_each_thread_is_and_goes_on():
    """Once for each time that it is not fed in time; the main thread is in `join`, the other in `stuck`."""
    done = run(HANGS.format(seconds=3, patience=1, abort=False, end="other.join()"))
    assert (done.returncode, done.stdout) == (0, ["2"])
    head, *shown = done.stderr.split("warning: ")
    assert head == ""
    assert len(shown) == 1
    assert shown[0].startswith("no step has ended for 1 s; where each thread is:\n")
    for thread in ("in stuck", "in join"):
        assert thread in shown[0]


def test_fault_69_a_watchdog_that_ends_the_process():
    done = run(HANGS.format(seconds=30, patience=0.5, abort=True, end="other.join()"))
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, [])
    assert "no step has ended for 0.5 s" in done.stderr
    assert "in stuck" in done.stderr


@pytest.mark.parametrize(("patience", "threads"), [(1, "3"), (0, "2")], ids=["fault_69 fed", "fault_69 none"])
def test_a_watchdog_is_silent(patience, threads):
    """While it is fed in time, as slow as the rest of it may be; and for 0 seconds there is none."""
    done = run(HANGS.format(seconds=30, patience=patience, abort=True, end=""))
    assert (done.returncode, done.stdout, done.stderr) == (0, [threads], "")


CONFIG = """
import os, runpy, time
from pathlib import Path
from ddpm_jax import data

get_config = runpy.run_path("configs/digits.py")["get_config"]
flag, seconds, batch = Path(os.environ["FLAG"]), float(os.environ["SECONDS"]), data.batch


def stuck(dataset, seed, step, *rest):
    if step == 11 and not flag.exists():
        flag.touch()
        time.sleep(seconds)
    return batch(dataset, seed, step, *rest)


data.batch = stuck
"""


@pytest.mark.faults
@pytest.mark.parametrize("abort", [False, True], ids=["goes on", "ends"])
def test_fault_69_a_step_that_hangs(trained, script, tmp_path, abort):
    """The place is named; in the end, or after the same command again, the run is that which nothing disturbed."""
    (tmp_path / "hangs.py").write_text(CONFIG)
    command = ["train.py", f"--config={tmp_path}/hangs.py", *SMALL, "--config.train.steps=60", "--cpu-devices=1"]
    command += [f"--workdir={tmp_path}/run", "--config.train.watchdog=20", f"--config.train.watchdog_abort={abort}"]
    variables = {"FLAG": str(tmp_path / "flag"), "SECONDS": "600" if abort else "24"}
    done = script(*command, **variables)
    assert done.returncode == (-signal.SIGABRT if abort else 0)
    assert "warning: no step has ended for 20 s; where each thread is:" in done.stderr
    assert re.search(r'/hangs.py", line \d+ in stuck', done.stderr)
    if abort:
        assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10]
        again = script(*command, "--config.train.watchdog=100", **variables)  # a busy machine may be slow
        assert (again.returncode, again.stderr) == (0, "")
    assert fingerprint(tmp_path / "run") == fingerprint(trained)
    assert logged_metrics(tmp_path / "run") == logged_metrics(trained)

"""What is printed may be lost: no closed stream, full disk or odd terminal changes the work or its exit code."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

# A script that prints in every way that ours do, writes a file, and ends well (0) or with an error of ours (3).
TALK = """
import sys, warnings
from ddpm_jax import errors
from ddpm_jax.run import log
def main(argv):
    folder, fails = sys.argv[1:]
    log.note("a note")
    warnings.warn("it is late")
    assert list(log.progress_bar(iter(range(3)), 3, "items")) == [0, 1, 2]
    writer = log.open_log(folder, 0, 3)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 0.5, "skipped": 0, "seconds_per_step": None})
    writer.close()
    with open(folder + "/done", "w") as file:
        file.write(str(file.fileno()))
    print("not flushed", end="")
    if fails == "fails":
        raise errors.DataError("no data")
sys.exit(errors.run(main))
"""


def talk(folder, redirection="", fails="", variables=(), **options):
    """The finished process of TALK under a shell's `redirection`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", TALK, folder, fails],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables),
        check=False,
        **options,
    )


def assert_worked(folder):
    assert [line[:10] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        f'{{"step": {step}' for step in (1, 2, 3)
    ]
    assert int((folder / "done").read_text()) > 2  # what native code prints into is no file of ours


REDIRECTIONS = {
    "none": "",
    "no stdout": ">&-",
    "no stderr": "2>&-",
    "no stdout, no stderr": ">&- 2>&-",
    "nothing open": "<&- >&- 2>&-",
    "full stdout": ">/dev/full",
    "full stderr": "2>/dev/full",
    "both full": ">/dev/full 2>&1",
}


@pytest.mark.parametrize("fails", ["", "fails"])
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_fault_76_a_stream_that_is_closed_or_full(tmp_path, redirection, fails):
    """A stream that is whole has what belongs there, and nothing about the other one."""
    redirection = REDIRECTIONS[redirection]
    done = talk(tmp_path, redirection, fails, capture_output=True, text=True)
    assert done.returncode == (3 if fails else 0)
    assert_worked(tmp_path)
    if "2>" not in redirection:
        assert done.stderr == "warning: it is late\n" + "error: no data\n" * bool(fails)
    if not redirection.startswith(">") and "<" not in redirection:
        first, *steps, last = done.stdout.splitlines()
        assert (first, len(steps), last) == ("a note", 3, "not flushed")


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_fault_76_a_pipe_whose_reader_is_gone(tmp_path, streams):
    read, write = os.pipe()
    os.close(read)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams, write)
    done = talk(tmp_path, "", "fails", text=True, **pipes)
    os.close(write)
    assert done.returncode == 3
    assert_worked(tmp_path)
    assert done.stderr in (None, "warning: it is late\nerror: no data\n")


def on_terminal(width, command, environment):
    """(exit code, all that was shown) of a command on a terminal of `width` columns and two rows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 2, width, 0, 0))
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(60), shown.decode()


TERMINALS = {  # variables, columns, whether a bar is drawn, whether in colour
    "wide": ({"TERM": "xterm-256color"}, 120, True, True),
    "one column": ({"TERM": "xterm-256color"}, 1, True, False),  # with nothing in it
    "no size": ({"TERM": "xterm-256color"}, 0, True, True),
    "five columns": ({"TERM": "xterm-256color", "COLUMNS": "5"}, 80, True, True),
    "no colour": ({"TERM": "xterm-256color", "NO_COLOR": "1"}, 120, True, False),
    "dumb": ({"TERM": "dumb"}, 80, False, False),
    "dumb and small": ({"TERM": "dumb", "COLUMNS": "5"}, 3, False, False),
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_fault_76_a_terminal_of_any_kind(tmp_path, terminal):
    variables, width, bar, colour = TERMINALS[terminal]
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-c", TALK, str(tmp_path), ""]
    code, shown = on_terminal(width, command, plain | {"PYTHONPATH": str(ROOT)} | variables)
    assert code == 0
    assert_worked(tmp_path)
    assert "Traceback" not in shown
    assert ("\x1b[" in shown) == bar
    assert bool(re.search(r"\x1b\[[0-9;]*[34]\d", shown)) == colour  # a colour of the text or behind it
    if not bar:
        assert shown.replace("\r\n", "\n").count("\nstep ") == 3
        assert "\r" not in shown.replace("\r\n", "\n")


BAR = """
import sys
from ddpm_jax.run import log
writer = log.open_log(sys.argv[1], 40, 2000)
row = {"step": 80, "loss": 0.0866, "skipped": 2, "seconds_per_step": 0.5, "images_per_second": 1536.4}
writer.write(row | {"grad_norm": 7.0, "learning_rate": 3e-4})
writer.advance(83)
print("a note")
writer.close()
"""


def test_the_bar_counts_steps_between_two_rows(tmp_path):
    """With the loss and the rate of the last row; what is printed meanwhile has a line of its own."""
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    command = [sys.executable, "-c", BAR, str(tmp_path)]
    _, shown = on_terminal(80, command, plain | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1"})
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").splitlines()
    assert "a note" in [line.strip() for line in lines]
    last = [line for line in lines if line.strip()][-1]
    assert re.fullmatch(r"\s*83/2000 .* loss 0\.0866  1,536 images/s  skipped 2 ETA \S+\s*", last), last
    assert len(last) <= 80


def test_fault_76_no_terminal_no_bar(tmp_path):
    """Also where colours are asked for."""
    done = talk(tmp_path, variables={"FORCE_COLOR": "1"}, capture_output=True, text=True)
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr)


def test_fault_76_help_on_a_small_terminal():
    for columns in ("5", "0", "-1", "wide"):
        done = subprocess.run(
            [sys.executable, "sample.py", "--help"],
            cwd=ROOT,
            env=os.environ | {"COLUMNS": columns},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "--workdir" in done.stdout


@pytest.mark.slow
def test_fault_76_sampling_with_nothing_to_print_to(run, script, tmp_path):
    done = script("sample.py", f"--workdir={run[0]}", f"--out={tmp_path}", "--num=3", shell="exec >&- 2>&-;")
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "samples.npz"]


@pytest.mark.faults
@pytest.mark.parametrize("redirection", ["2>&1 | true", ">&- 2>&-"])
def test_fault_76_every_command_without_a_reader(environment, tmp_path, redirection):
    """Training, sampling, evaluating and checking one after another; their exit codes go to a file."""
    workdir, model = f"--workdir={tmp_path}/run", "--config.model.channels=4 --config.model.groups=2"
    commands = [
        f"train.py {workdir} {model} --config.train.steps=3 --config.train.sample_num=2 --config.train.sample_steps=2",
        f"sample.py {workdir} --num=2 --steps=2",
        f"evaluate.py {workdir} --num=2 --steps=2",
        f"-m ddpm_jax.run {tmp_path}/run",
        f"sample.py {workdir} --num=2",
    ]
    for command in commands:
        line = f"{{ {sys.executable} {command}; echo $? >>{tmp_path}/codes; }} {redirection}"
        subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False)
    assert (tmp_path / "codes").read_text().split() == ["0", "0", "0", "0", "2"]
    assert (tmp_path / "run" / "evaluation.json").exists()

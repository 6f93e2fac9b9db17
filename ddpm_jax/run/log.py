"""What a run says: metrics.jsonl, and a line or a bar on the console."""

import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddpm_jax.run.files import write_atomic


def note(text):
    """Print a line at once, escaped where the output has no letters for it."""
    encoding = sys.stdout.encoding or "utf8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextlib.contextmanager
def _at_least(level, *names):
    """Meanwhile these loggers are silent below `level`."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def without_warnings_of_absl():
    """Meanwhile only the errors of Orbax and TFDS are shown, not what they recommend or say of their own options."""
    return _at_least(logging.ERROR, "absl")


@contextlib.contextmanager
def quiet():
    """Meanwhile, or in the command that it decorates, Orbax's own pages of traceback are kept off the terminal.

    Its failures reach the user as our errors.
    """
    show = sys.unraisablehook

    def hook(unraisable):  # what its file layer says when a failed save has closed the event loop
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook
    try:
        with _at_least(logging.CRITICAL + 1, "absl", "asyncio"):
            yield
    finally:
        sys.unraisablehook = show


def now_and_then(say, seconds=5):
    """`say`, deaf to what comes within so many seconds of what it said last."""
    last = -math.inf

    def sparsely(text):
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(text)

    return sparsely


def _draws(stream):
    """Whether a bar can be drawn there: a terminal that can go back to the start of a line."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def progress(items, total, what):
    """`items` one by one, with a bar on a terminal."""
    if not _draws(sys.stderr):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total, console=Console(stderr=True), transient=True)


class Log(NamedTuple):
    write: Callable  # (row of metrics with "step")
    advance: Callable  # (step): so many are taken
    picture: Callable  # (name, uint8 (H, W, C), step), for the boards
    close: Callable


SILENT = Log(*[lambda *_: None] * 4)


def mean(window):
    """One row from the metrics of several steps: finite means; counters as they are at the end; None for no value."""

    def fold(name):
        values = [row[name] for row in window]
        if isinstance(values[-1], int):
            return values[-1]
        values = [value for value in values if math.isfinite(value)]
        return math.fsum(values) / len(values) if values else None

    return {name: fold(name) for name in window[-1]} if window else {}


def open_log(workdir, step, total, boards=()):
    """Append to RUN/metrics.jsonl from `step` on: rows after it, from a run that was cut off, are dropped first.

    boards: those of boards.py, which are shown the same.
    """
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash left a part of a line
                if json.loads(line)["step"] <= step:
                    rows.append(line)
        write_atomic(path, "".join(line + "\n" for line in rows).encode())
    file = open(path, "a")  # noqa: SIM115 (closed by close)
    show, advance, hide = _console(step, total)

    def write(row):
        try:
            file.write(json.dumps(row) + "\n")
            file.flush()
        except OSError as error:
            warnings.warn(f"step {row['step']} is missing in {path}: {error.strerror}", stacklevel=2)
        for board in boards:
            board.write(row)
        show(row)

    def picture(*drawn):
        for board in boards:
            board.picture(*drawn)

    def close():
        hide()
        with contextlib.suppress(OSError):  # told when it was written
            file.close()
        for board in boards:
            board.close()

    return Log(write, advance, picture, close)


def _console(step, total):
    """(show, advance, hide): a bar on a terminal, a line for each row otherwise."""

    def words(row):
        def number(name, form):
            return "-" if row.get(name) is None else format(row[name], form)

        loss, speed = f"loss {number('loss', '.4f')}", f"{number('images_per_second', ',.0f')} images/s"
        rates = f"grad {number('grad_norm', '.3f')}  lr {number('learning_rate', '.1e')}"
        return loss, rates, speed + (f"  skipped {row['skipped']}" if row["skipped"] else "")

    if not _draws(sys.stdout):

        def show(row):
            pace = row["seconds_per_step"]
            eta = "-" if pace is None else clock(pace * (total - row["step"]))
            note("  ".join([f"step {row['step']:>{len(str(total))}}/{total}", *words(row), f"ETA {eta}"]))

        return show, lambda step: None, lambda: None

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(None), TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn()
    bar = Progress(MofNCompleteColumn(), *columns, speed_estimate_period=600, expand=True)
    task = bar.add_task("", total=total, completed=step)
    bar.start()

    def show(row):
        loss, _, speed = words(row)
        bar.update(task, description=f"{loss}  {speed}")

    return show, lambda step: bar.update(task, completed=step), bar.stop


def clock(seconds):
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

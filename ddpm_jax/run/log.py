"""Output of a run: metrics.jsonl, and lines or a progress bar on the console."""

import atexit
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
    """Print and flush a line; characters that the output's encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextlib.contextmanager
def _log_level(level, *names):
    """Raise the level of these loggers to `level` inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def hide_absl_warnings():
    """Show only errors of Orbax and TFDS, no warnings, inside the block."""
    return _log_level(logging.ERROR, "absl")


@contextlib.contextmanager
def quiet():
    """Hide Orbax's long tracebacks inside the block or the decorated command; its failures are raised as our errors."""
    show = sys.unraisablehook

    def hook(unraisable):  # hides what its file layer prints after a failed save has closed the event loop
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook
    # The errors of a failed save can outlive the block; asyncio logs them when the interpreter frees them at its end.
    atexit.register(logging.getLogger("asyncio").setLevel, logging.CRITICAL + 1)
    try:
        with _log_level(logging.CRITICAL + 1, "absl", "asyncio"):
            yield
    finally:
        sys.unraisablehook = show


def rate_limited(say, seconds=5):
    """`say`, at most once in so many seconds; lines in between are dropped."""
    last = -math.inf

    def say_sometimes(text):
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(text)

    return say_sometimes


def _supports_bar(stream):
    """Whether the stream is a terminal that can redraw a line."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def progress_bar(items, total, title):
    """Yield `items`, with a progress bar on a terminal."""
    if not _supports_bar(sys.stderr):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, title, total, console=Console(stderr=True), transient=True)


class Log(NamedTuple):
    write: Callable  # (row of metrics with "step")
    advance: Callable  # (step): the number of steps taken so far
    image: Callable  # (name, uint8 (H, W, C), step), for the dashboards
    close: Callable


SILENT = Log(*[lambda *_: None] * 4)


def mean(window):
    """One row from the metrics of several steps: means of the finite values (None if there are none), last counters."""

    def reduce(name):
        values = [row[name] for row in window]
        if isinstance(values[-1], int):
            return values[-1]
        values = [value for value in values if math.isfinite(value)]
        return math.fsum(values) / len(values) if values else None

    return {name: reduce(name) for name in window[-1]} if window else {}


def open_log(workdir, step, total, boards=()):
    """Append to WORKDIR/metrics.jsonl from `step` on; later rows, of an interrupted run, are dropped first.

    boards: the dashboards (see boards.py) that get the same metrics.
    """
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash can leave part of a line
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

    def write_image(name, image, step):
        for board in boards:
            board.image(name, image, step)

    def close():
        hide()
        with contextlib.suppress(OSError):  # reported by write
            file.close()
        for board in boards:
            board.close()

    return Log(write, advance, write_image, close)


def _console(step, total):
    """(show, advance, hide): a progress bar on a terminal, a line for each row otherwise."""

    def format_row(row):
        def number(name, spec):
            return "-" if row.get(name) is None else format(row[name], spec)

        loss, speed = f"loss {number('loss', '.4f')}", f"{number('images_per_second', ',.0f')} images/s"
        rates = f"grad {number('grad_norm', '.3f')}  lr {number('learning_rate', '.1e')}"
        return loss, rates, speed + (f"  skipped {row['skipped']}" if row["skipped"] else "")

    if not _supports_bar(sys.stdout):

        def show(row):
            pace = row["seconds_per_step"]
            eta = "-" if pace is None else format_duration(pace * (total - row["step"]))
            note("  ".join([f"step {row['step']:>{len(str(total))}}/{total}", *format_row(row), f"ETA {eta}"]))

        return show, lambda step: None, lambda: None

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(None), TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn()
    bar = Progress(MofNCompleteColumn(), *columns, speed_estimate_period=600, expand=True)
    task = bar.add_task("", total=total, completed=step)
    bar.start()

    def show(row):
        loss, _, speed = format_row(row)
        bar.update(task, description=f"{loss}  {speed}")

    return show, lambda step: bar.update(task, completed=step), bar.stop


def format_duration(seconds):
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

"""What a run says: metrics.jsonl, one line or bar on the console, TensorBoard when it is installed."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddpm_jax.files import write_atomic


def note(text):
    """Print a line at once, escaped where the output has no letters for it."""
    encoding = sys.stdout.encoding or "utf8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


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
    close: Callable


def mean(window):
    """One row from the metrics of several steps: finite means; counters as they are at the end; None for no value."""

    def fold(name):
        values = [row[name] for row in window]
        if isinstance(values[-1], int):
            return values[-1]
        values = [value for value in values if math.isfinite(value)]
        return math.fsum(values) / len(values) if values else None

    return {name: fold(name) for name in window[-1]} if window else {}


def open_log(workdir, step, total):
    """Append to RUN/metrics.jsonl from `step` on: rows after it, from a run that was cut off, are dropped first."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash left a part of a line
                if json.loads(line)["step"] <= step:
                    rows.append(line)
        write_atomic(path, "".join(line + "\n" for line in rows).encode())
    file = open(path, "a")  # noqa: SIM115 (closed by close)
    board = None
    if importlib.util.find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter

        board = SummaryWriter(str(workdir), purge_step=step + 1)
    show, hide = _console(step, total)

    def write(row):
        try:
            file.write(json.dumps(row) + "\n")
            file.flush()
        except OSError as error:
            warnings.warn(f"step {row['step']} is missing in {path}: {error.strerror}", stacklevel=2)
        if board:
            for name, value in row.items():
                if value is not None:
                    board.add_scalar(name, value, row["step"])
        show(row)

    def close():
        hide()
        with contextlib.suppress(OSError):  # told when it was written
            file.close()
        if board:
            board.close()

    return Log(write, close)


def _console(step, total):
    """(show, hide): a bar on a terminal, a line for each row otherwise."""

    def text(row):
        def number(name, form):
            return "-" if row.get(name) is None else format(row[name], form)

        return (
            f"loss {number('loss', '.4f')}  grad {number('grad_norm', '.3f')}  lr {number('learning_rate', '.1e')}  "
            f"{number('images_per_second', ',.0f')} images/s"
            + (f"  skipped {row['skipped']}" if row["skipped"] else "")
        )

    if not _draws(sys.stdout):

        def show(row):
            pace = row["seconds_per_step"]
            eta = "-" if pace is None else clock(pace * (total - row["step"]))
            note(f"step {row['step']:>{len(str(total))}}/{total}  {text(row)}  ETA {eta}")

        return show, lambda: None

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn()
    )
    task = bar.add_task("", total=total, completed=step)
    bar.start()
    return lambda row: bar.update(task, completed=row["step"], description=text(row)), bar.stop


def clock(seconds):
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

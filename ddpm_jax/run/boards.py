"""Dashboards for the metrics and sample grids of a run: TensorBoard if installed, Weights & Biases on request.

Each runs in its own thread. If it fails or hangs, the run gets a warning and goes on.
"""

import importlib.util
import json
import queue
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddpm_jax.errors import first_line
from ddpm_jax.run.log import note

TIMEOUT = 30  # seconds that the end of a run waits for a dashboard


class Board(NamedTuple):
    write: Callable  # (row of metrics with "step")
    image: Callable  # (name, uint8 (H, W, C), step)
    close: Callable


def open_boards(workdir: Path, step: int, project: str = "", config: dict | None = None) -> list[Board]:
    """The dashboards of a run that starts or resumes at `step`. project: of Weights & Biases; "" for none."""
    boards = []
    if importlib.util.find_spec("tensorboardX"):
        boards.append(in_thread("TensorBoard", lambda: tensorboard(workdir, step)))
    if project:
        boards.append(in_thread("Weights & Biases", lambda: weights_and_biases(workdir, project, config)))
    return boards


def in_thread(name: str, make: Callable[[], Board]) -> Board:
    """Run the Board of make() in a thread. Its first error becomes a warning, and it is not called any more."""
    calls: queue.SimpleQueue = queue.SimpleQueue()

    def serve():
        try:
            board = make()
            for method, *arguments in iter(calls.get, None):
                getattr(board, method)(*arguments)
            board.close()
        except BaseException as error:  # even SystemExit: a dashboard must not end the process
            warnings.warn(f"{name} gets no more data from this run: {first_line(error)}", stacklevel=2)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def close():
        calls.put(None)
        thread.join(TIMEOUT)
        if thread.is_alive():
            warnings.warn(f"{name} has not answered for {TIMEOUT} s; metrics.jsonl has what it missed", stacklevel=2)

    return Board(lambda row: calls.put(("write", row)), lambda *image: calls.put(("image", *image)), close)


def tensorboard(workdir: Path, step: int) -> Board:
    """Event files in the folder of the run; events after `step` from an earlier start are hidden."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(row):
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, row["step"])

    def write_image(name, image, step):
        writer.add_image(name, image, step, dataformats="HWC")

    return Board(write, write_image, writer.close)


def weights_and_biases(workdir: Path, project: str, config: dict | None) -> Board:
    """A Weights & Biases run named after the folder. It resumes whenever the run does, also on another machine."""
    import wandb

    online = wandb.setup().settings.mode == "online"
    if online and not wandb.login(prompt=False):
        raise RuntimeError("there is no API key; run wandb login, or set WANDB_MODE=offline")
    started = json.loads((workdir / "run.json").read_text())[0]["time"]
    run = wandb.init(
        project=project,
        name=workdir.name,
        id=re.sub(r"[^\w-]", "-", f"{workdir.name}-{started}"),
        resume="allow",
        dir=str(workdir),
        config=config,
        settings=wandb.Settings(console="off", silent=True),
    )
    if online:
        note(f"Weights & Biases: {run.url}")

    def write(row):
        run.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def write_image(name, image, step):
        run.log({name: wandb.Image(image.squeeze())}, step=step)

    return Board(write, write_image, run.finish)

"""Who else is shown the metrics and grids of a run: TensorBoard where it is installed, Weights & Biases where asked.

Each is served by a thread of its own, so that what fails or hangs there costs the run a warning and nothing else.
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

PATIENCE = 30  # seconds for which the end of a run waits


class Board(NamedTuple):
    write: Callable  # (row of metrics with "step")
    picture: Callable  # (name, uint8 (H, W, C), step)
    close: Callable


def open_boards(workdir: Path, step: int, project: str = "", config: dict | None = None) -> list[Board]:
    """The boards of a run that goes on from `step`; project: where Weights & Biases puts it with its config, or ""."""
    boards = []
    if importlib.util.find_spec("tensorboardX"):
        boards.append(aside("TensorBoard", lambda: tensorboard(workdir, step)))
    if project:
        boards.append(aside("Weights & Biases", lambda: weights_and_biases(workdir, project, config)))
    return boards


def aside(name: str, make: Callable[[], Board]) -> Board:
    """The Board of make() in a thread; its first fault is a warning, after which it is left alone."""
    calls: queue.SimpleQueue = queue.SimpleQueue()

    def serve():
        try:
            board = make()
            for method, *arguments in iter(calls.get, None):
                getattr(board, method)(*arguments)
            board.close()
        except BaseException as error:  # also one that would end the process: it is not theirs to end
            warnings.warn(f"{name} is shown no more of this run: {first_line(error)}", stacklevel=2)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def close():
        calls.put(None)
        thread.join(PATIENCE)
        if thread.is_alive():
            warnings.warn(f"{name} has not answered for {PATIENCE} s; metrics.jsonl has what it missed", stacklevel=2)

    return Board(lambda row: calls.put(("write", row)), lambda *picture: calls.put(("picture", *picture)), close)


def tensorboard(workdir: Path, step: int) -> Board:
    """Events in the folder of the run, where those after `step` no longer count."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(row):
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, row["step"])

    def picture(name, image, step):
        writer.add_image(name, image, step, dataformats="HWC")

    return Board(write, picture, writer.close)


def weights_and_biases(workdir: Path, project: str, config: dict | None) -> Board:
    """A run of Weights & Biases under the name of the folder; it goes on when the run does, wherever that was begun."""
    import wandb

    online = wandb.setup().settings.mode == "online"
    if online and not wandb.login(prompt=False):
        raise RuntimeError("it knows no API key; say wandb login, or set WANDB_MODE=offline")
    begun = json.loads((workdir / "run.json").read_text())[0]["time"]
    run = wandb.init(
        project=project,
        name=workdir.name,
        id=re.sub(r"[^\w-]", "-", f"{workdir.name}-{begun}"),
        resume="allow",
        dir=str(workdir),
        config=config,
        settings=wandb.Settings(console="off", silent=True),
    )
    if online:
        note(f"Weights & Biases: {run.url}")

    def write(row):
        run.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def picture(name, image, step):
        run.log({name: wandb.Image(image.squeeze())}, step=step)

    return Board(write, picture, run.finish)

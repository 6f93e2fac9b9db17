"""Files that a reader, also one after a crash, sees old or new but never in part; and folders with one writer."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from ddpm_jax.errors import ConfigError


def write_atomic(path, data):
    """Write bytes to `path` as `atomic` does."""
    with atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic(path):
    """An open file for the bytes of `path`: a temporary one beside it, synced and renamed if the body ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_held: list = []  # open files, whose locks end with them


def lock(folder):
    """Keep other processes from writing to `folder` until this one ends, or closes the file that is returned.

    Raises ConfigError if one does already.
    """
    file = open(Path(folder) / "lock", "a+")  # noqa: SIM115 (held until the process ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ConfigError(f"{folder} is in use by another run ({file.read().strip()}); take another folder") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.append(file)
    return file


@contextlib.contextmanager
def locked(path):
    """The body runs in one process at a time, the others wait; `path` is left behind as an empty file."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, so also with a process that is killed
        yield

"""Atomic files (a reader sees the old or the new content, even after a crash), and locks for folders."""

import contextlib
import errno
import fcntl
import functools
import os
import socket
import stat
import tempfile
import warnings
from pathlib import Path

from ddpm_jax.errors import ConfigError

CACHE = "~/.cache/ddpm_jax"  # decoded images and compiled programs; rebuilt when missing


def write_atomic(path, data):
    """Write bytes to `path` as `atomic` does."""
    with atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic(path):
    """A file to write the bytes of `path` to: a temporary one beside it, synced and renamed if no error is raised."""
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


NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK  # the file system has no locks


def _flock(file, operation):
    """Lock an open file. Closing the file releases the lock, and so does the death of the process."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{file.name} cannot be locked ({error.strerror}); let no other process write there", stacklevel=3
        )


def lock(folder):
    """Lock `folder` against other runs, also of this process, until the returned file is closed.

    Raises ConfigError if it is locked already.
    """
    file = open(Path(folder) / "lock", "a+")  # noqa: SIM115 (closed by the caller)
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BlockingIOError as error:
        with file:
            file.seek(0)
            owner = file.read().strip()
        raise ConfigError(f"{folder} is in use by another run ({owner}); take another folder") from error
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def locked(path):
    """Run the body in one process at a time, while the others wait. Leaves `path` behind as an empty file."""
    with open(path, "a") as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def has_home():
    """Whether ~ can be expanded. It cannot if HOME is not set and the user ID is in no password database."""
    return os.path.expanduser("~") != "~"


def expand(path):
    """The Path of an option with ~ and ~user expanded; ConfigError if that is not possible."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} begins with ~, but there is no such home folder; write the path out") from error


def cache_folder(folder=CACHE):
    """`expand(folder)`. Without a home folder CACHE is in XDG_CACHE_HOME, or else in the temporary folder."""
    if folder != CACHE or has_home():
        return expand(folder)
    return _without_home(os.environ.get("XDG_CACHE_HOME"), tempfile.gettempdir())


@functools.cache  # warns once
def _without_home(cache_home, temporary):
    folder = Path(cache_home) / "ddpm_jax" if cache_home else _private_folder(Path(temporary))
    warnings.warn(f"there is no home folder (HOME is not set); {CACHE} goes to {folder}", stacklevel=3)
    return folder


def _private_folder(temporary):
    """The same folder at every start, unless another user made it: compiled programs are loaded from it."""
    folder = temporary / f"ddpm_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if private else Path(tempfile.mkdtemp(prefix="ddpm_jax-", dir=temporary))

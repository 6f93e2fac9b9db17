"""Files that a reader, also one after a crash, sees old or new but never in part; and folders with one writer."""

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

CACHE = "~/.cache/ddpm_jax"  # decoded images and compiled programs, which are made again where they are missing


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


NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK  # of file systems that have none


def _flock(file, how):
    """Lock an open file; the lock ends with the file, so also with a process that is killed."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{file.name} cannot be locked ({error.strerror}); see that no other process writes there", stacklevel=3
        )


def lock(folder):
    """Keep other runs, of this process too, from writing to `folder` until the file that is returned is closed.

    Raises ConfigError if one does already.
    """
    file = open(Path(folder) / "lock", "a+")  # noqa: SIM115 (held by the caller)
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BlockingIOError as error:
        with file:
            file.seek(0)
            who = file.read().strip()
        raise ConfigError(f"{folder} is in use by another run ({who}); take another folder") from error
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def locked(path):
    """The body runs in one process at a time, the others wait; `path` is left behind as an empty file."""
    with open(path, "a") as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def has_home():
    """Whether ~ stands for a folder; not where HOME is not set and the user is in no list of users."""
    return os.path.expanduser("~") != "~"


def expand(path):
    """The Path of an option, ~ and ~user being the folders that they stand for; ConfigError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} begins with ~, for which no folder is known here; write the folder out") from error


def cache_folder(folder=CACHE):
    """`expand(folder)`; without a home CACHE lies in XDG_CACHE_HOME or in the folder of temporary files."""
    if folder != CACHE or has_home():
        return expand(folder)
    return _without_home(os.environ.get("XDG_CACHE_HOME"), tempfile.gettempdir())


@functools.cache  # said once
def _without_home(caches, temporary):
    found = Path(caches) / "ddpm_jax" if caches else _own_folder(Path(temporary))
    warnings.warn(f"there is no home folder (HOME is not set); what is kept in {CACHE} goes to {found}", stacklevel=3)
    return found


def _own_folder(temporary):
    """The same at every start, but none that another user has made: compiled programs are read from it."""
    folder = temporary / f"ddpm_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    at = folder.lstat()
    mine = stat.S_ISDIR(at.st_mode) and at.st_uid == os.getuid() and not at.st_mode & 0o022
    return folder if mine else Path(tempfile.mkdtemp(prefix="ddpm_jax-", dir=temporary))

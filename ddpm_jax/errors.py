"""Errors that the user can mend: one line each, and the exit code that goes with it."""

import contextlib
import io
import os
import sys
import warnings

PREEMPTED = 75  # EX_TEMPFAIL: saved, run the same command again
INTERRUPTED = 130  # Ctrl-C


class UserError(Exception):
    """What is wrong, where, and what to do, in one line; printed without a traceback."""

    exit_code = 1

    def __init__(self, text):
        super().__init__(" ".join(str(text).splitlines()))  # values, names of files and reasons may have several


class ConfigError(UserError):
    """The command line or the config cannot be used."""

    exit_code = 2


class DataError(UserError):
    """The images cannot be found or read."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, does not fit the model, or cannot be written."""

    exit_code = 4


class Diverged(UserError):
    """Training or sampling met values that are not finite and cannot go on."""

    exit_code = 5


class OutOfMemory(UserError):
    """A device has too little memory for what it was given."""

    exit_code = 1


class LostProcess(UserError):
    """Another process of the run has ended; the same command, in all of them, goes on from the newest checkpoint."""

    exit_code = PREEMPTED


def first_line(error):
    """What an exception says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def writing(where):
    """A file or folder inside that cannot be written is a ConfigError that names the option `where`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {where}: {error.strerror or error}") from error


class _Unread(io.FileIO):
    """The file of a stream that perhaps nobody reads: what cannot be written to it is lost."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def _streams_that_may_fail():
    """A closed pipe, a full disk or no stdout at all is no reason to end: the work is not done for what is printed."""
    before = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    for name, stream in before.items():
        if stream is None:  # it was closed: without this a file of ours gets its number, and native code prints into it
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and name != "stdin":
            with contextlib.suppress(OSError):
                stream.flush()
            file = io.BufferedWriter(_Unread(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True))
    try:
        yield
    finally:
        for name, stream in before.items():
            if name != "stdin":
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def run(main, argv=None):
    """Call `main(argv)` as a script; return its exit code, a `UserError` becoming one line on stderr.

    argv: the options, None for those of the program. With `--debug` among them the traceback is shown instead.
    """
    debug = not {"--debug", "--debug=true"}.isdisjoint(sys.argv[1:] if argv is None else map(str, argv))

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"warning: {message}", file=sys.stderr, flush=True)

    with _streams_that_may_fail(), warnings.catch_warnings():
        if not debug:
            warnings.showwarning = show
        try:
            return main(argv) or 0
        except UserError as error:
            if debug:
                raise
            print("error: " + " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

"""Errors that the user can fix, each with a one-line message and an exit code."""

import contextlib
import io
import os
import sys
import warnings

PREEMPTED = 75  # EX_TEMPFAIL: saved; run the same command to resume
INTERRUPTED = 130  # Ctrl-C


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; printed without a traceback."""

    exit_code = 1

    def __init__(self, text):
        super().__init__(" ".join(str(text).splitlines()))  # values, file names and reasons may contain newlines


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
    """Training or sampling produced non-finite values and cannot continue."""

    exit_code = 5


class OutOfMemory(UserError):
    """A device does not have enough memory."""

    exit_code = 1


class LostProcess(UserError):
    """Another process of the run has ended. Restart all of them to resume from the newest checkpoint."""

    exit_code = PREEMPTED


def first_line(error):
    """The first line of an exception's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def writing(where):
    """Turn an OSError inside into a ConfigError that names the option `where`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {where}: {error.strerror or error}") from error


class _DiscardOnError(io.FileIO):
    """The file of an output stream. Output that cannot be written is dropped without an error."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def _tolerant_streams():
    """Keep running when output fails (closed pipe, full disk, no stdout): results are in files, not on stdout."""
    before = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    for name, stream in before.items():
        if stream is None:  # closed: else the next opened file gets its number, and native code prints into that file
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and name != "stdin":
            with contextlib.suppress(OSError):
                stream.flush()
            file = io.BufferedWriter(_DiscardOnError(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True))
    try:
        yield
    finally:
        for name, stream in before.items():
            if name != "stdin":
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def run(main, argv=None):
    """Call `main(argv)` as a script and return its exit code. A `UserError` is printed as one line on stderr.

    argv: the options, or None for sys.argv. With `--debug` the traceback is shown instead.
    """
    debug = not {"--debug", "--debug=true"}.isdisjoint(sys.argv[1:] if argv is None else map(str, argv))

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"warning: {message}", file=sys.stderr, flush=True)

    with _tolerant_streams(), warnings.catch_warnings():
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

"""Diffusion models from the command line; each of these tells its options with --help:

    python -m ddpm_jax train --config=configs/digits.py --workdir=runs/digits
    python -m ddpm_jax sample --workdir=runs/digits --num=64
    python -m ddpm_jax evaluate --workdir=runs/digits --metrics=nll

    python -m ddpm_jax.data          describe, show and prepare images
    python -m ddpm_jax.run    list and check the checkpoints of a run
    python -m ddpm_jax.plots         draw a run, and put it on one page
    python -m ddpm_jax.interop       take and give released weights
    python -m ddpm_jax.schedules     tell the signal that a noise schedule leaves

`ddpm-jax train` is `python -m ddpm_jax train`, and so on.
"""

import importlib
import sys

from ddpm_jax import errors, options
from ddpm_jax.commands import COMMANDS


def main(argv=None):
    command, *rest = options.command_line(argv) or [""]
    if command in ("-h", "--help"):
        print(__doc__.rstrip())
        return 0
    if command not in COMMANDS:
        raise errors.ConfigError(f"{command!r} is none of {', '.join(COMMANDS)}; see python -m ddpm_jax --help")
    return importlib.import_module(f"ddpm_jax.commands.{command}").main(rest)


def start():
    """The exit code of the command that the command line names."""
    return errors.run(main)


if __name__ == "__main__":
    sys.exit(start())

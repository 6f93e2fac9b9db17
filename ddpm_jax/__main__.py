"""Diffusion models from the command line. Each command lists its options with --help:

    python -m ddpm_jax train --config=configs/digits.py --workdir=runs/digits
    python -m ddpm_jax sample --workdir=runs/digits --num=64
    python -m ddpm_jax evaluate --workdir=runs/digits --metrics=nll

    python -m ddpm_jax.data          describe, show and prepare images
    python -m ddpm_jax.run           list and check the checkpoints of a run
    python -m ddpm_jax.plots         plot a run, or summarise it on one page
    python -m ddpm_jax.interop       import and export released weights
    python -m ddpm_jax.schedules     report how much signal a noise schedule leaves

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
        raise errors.ConfigError(f"{command!r} is not one of {', '.join(COMMANDS)}; see python -m ddpm_jax --help")
    return importlib.import_module(f"ddpm_jax.commands.{command}").main(rest)


def start():
    """Run the command named on the command line; return its exit code."""
    return errors.run(main)


if __name__ == "__main__":
    sys.exit(start())

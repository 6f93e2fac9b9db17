"""The commands: train.py, sample.py and evaluate.py in a clone, python -m ddpm_jax train, sample, evaluate anywhere."""

import sys
from pathlib import Path

from ddpm_jax import options

COMMANDS = ("train", "sample", "evaluate")


def prog_name(command):
    """The words after `python` that start `command` as this process was started: train.py or -m ddpm_jax train."""
    script = Path(sys.argv[0]).name in [f"{name}.py" for name in COMMANDS]
    return f"{command}.py" if script else f"-m ddpm_jax {command}"


def parse(cls, argv, command, description, load=None):
    """`options.parse` for `command`; -m ddpm_jax COMMAND in its description becomes the `prog_name`."""
    prog = prog_name(command)
    return options.parse(cls, argv, prog, description.replace(f"-m ddpm_jax {command}", prog), load)

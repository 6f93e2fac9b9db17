"""What train.py, sample.py and evaluate.py do in a clone, and python -m ddpm_jax train, sample, evaluate anywhere."""

import sys
from pathlib import Path

from ddpm_jax import options

COMMANDS = ("train", "sample", "evaluate")


def spelled(command):
    """What stands after `python` to start `command` in the way that this process was: train.py or -m ddpm_jax train."""
    script = Path(sys.argv[0]).name in [f"{name}.py" for name in COMMANDS]
    return f"{command}.py" if script else f"-m ddpm_jax {command}"


def parse(cls, argv, command, description, load=None):
    """`options.parse` for `command`, whose description has it as python -m ddpm_jax does."""
    prog = spelled(command)
    return options.parse(cls, argv, prog, description.replace(f"-m ddpm_jax {command}", prog), load)

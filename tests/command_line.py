"""A command line with all options of a config."""

import dataclasses

from ddpm_jax import config as configs
from ddpm_jax import options
from ddpm_jax.config import Config

EVERY = {f"{part.name}.{field.name}" for part in dataclasses.fields(Config) for field in dataclasses.fields(part.type)}


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    """A command line like that of train.py."""

    config: Config = dataclasses.field(default_factory=Config)
    config_file: str = "configs/digits.py"
    workdir: str = options.option("", "a folder")
    dry_run: bool = options.option(False, "a flag")


def parse(*argv):
    return options.parse(Args, argv, "train.py", "Train.", configs.load)

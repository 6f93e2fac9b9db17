"""Train a diffusion model, in a clone: what python -m ddpm_jax train does, see ddpm_jax/commands/train.py."""

import sys

from ddpm_jax import errors
from ddpm_jax.commands import train

if __name__ == "__main__":
    sys.exit(errors.run(train.main))

"""Sample from a trained run, in a clone: what python -m ddpm_jax sample does, see ddpm_jax/commands/sample.py."""

import sys

from ddpm_jax import errors
from ddpm_jax.commands import sample

if __name__ == "__main__":
    sys.exit(errors.run(sample.main))

"""Evaluate a trained run, in a clone: what python -m ddpm_jax evaluate does, see ddpm_jax/commands/evaluate.py."""

import sys

from ddpm_jax import errors
from ddpm_jax.commands import evaluate

if __name__ == "__main__":
    sys.exit(errors.run(evaluate.main))

"""What evaluate.py tells: the likelihood of a run (likelihood.py), how far its samples are from the data (samples.py);
what a training step will take (dry_run.py), and samples while it trains (progress.py).

Each number of evaluate.py is a dict {"value", "standard_error", "unit", "settings", ...} that rests on nothing but what
is in it.
"""

from ddpm_jax.reports import likelihood, samples

__all__ = ["likelihood", "samples"]

"""What evaluate.py tells: the likelihood of a run (likelihood.py), how far its samples are from the data (samples.py).

Each number is a dict {"value", "standard_error", "unit", "settings", ...} that rests on nothing but what is in it.
"""

from ddpm_jax.reports import likelihood, samples

__all__ = ["likelihood", "samples"]

"""What the files of a run hold that is to be drawn."""

import json

import numpy as np

from ddpm_jax.plots import records

ODD = "<script>&\"'"  # a name that a page must escape
STEPS = (100, 200, 300)


def rows():
    """Three rows of metrics, one of them without a finite loss."""
    random = np.random.default_rng(1)
    made = [dict(zip(records.NAMES, [step, *random.uniform(0.01, 1, 7)], strict=True)) for step in STEPS]
    return [made[0], made[1] | {"loss": None, "loss_q4": None}, made[2]]


EVALUATION = {
    "metrics": {
        "nll": {
            "value": 4.75265,
            "standard_error": 0.01660,
            "unit": "bits/dim",
            "parts": {"prior": 2e-05, "steps": 3.0},
            "settings": {"decoder": "exact", "steps": 3},
            "curve": {"t": [3, 2, 1], "rate": [0.1, 0.5, 3.0], "rmse": [90.0, 20.0, 1.0]},
        },
        "KID-<i>": {
            "value": 3.25,
            "standard_error": None,
            "unit": "x 1000",
            "real": {"value": 0.125, "standard_error": 0.5},
            "settings": {"sampler": "ddim", "reference": {"source": ODD, "num": 77}},
        },
    },
    "num": 1000,
    "checkpoint_step": 5,
    "versions": {"jax": "0.0.7"},
}


def metrics():
    """The text of metrics.jsonl with these rows."""
    return "".join(json.dumps(row) + "\n" for row in rows())

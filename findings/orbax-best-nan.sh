#!/usr/bin/env bash
# Versions: orbax-checkpoint 0.12.8 with jax 0.10.2 (Python 3.11) or 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: a CheckpointManager that keeps the best two steps by the lowest metric takes a later NaN for the best and
# deletes a good step to keep it. After metrics 3, 5, NaN, NaN the two steps with NaN are left. An earlier NaN, in
# turn, is sorted as the worst: the answer depends on the order.
#
# Why it defeats a good guess: NaN compares false with everything, so one expects that it never wins, as with a
# running "if new < best"; and best-of-N retention is chosen just to be safe from a run that goes wrong at its end.
#
# Do instead: have best_fn return inf for a NaN (-inf where the highest is best), or do not save such a step.
#
# Output seen:
#   3, 5, nan, nan: kept [3, 4], best 4; nan, 3, 5 (all kept): best 2; 3, 5, inf, inf: kept [1, 2], best 1
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    'jax==0.10.2; python_version < "3.12"' 'jax==0.12.0.1; python_version >= "3.12"' numpy==2.4.6 \
    orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/bin/python" -I -W ignore - <<'EOF'
import importlib.metadata
import logging
import math
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.ERROR)


def kept(metrics, most):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=most, best_fn=lambda metrics: metrics["fid"], best_mode="min", enable_async_checkpointing=False
    )
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder, options=options) as manager:
        for step, metric in enumerate(metrics, 1):
            saved = ocp.args.StandardSave({"weight": np.ones(2)})
            manager.save(step, args=saved, metrics={"fid": metric})
        return sorted(manager.all_steps()), manager.best_step()


nan, inf = math.nan, math.inf
late, early, mended = kept([3.0, 5.0, nan, nan], 2), kept([nan, 3.0, 5.0], None), kept([3.0, 5.0, inf, inf], 2)
print(f"orbax-checkpoint {importlib.metadata.version('orbax-checkpoint')}: steps kept and the best")
print(f"3, 5, nan, nan: {late}; nan, 3, 5: {early}; 3, 5, inf, inf: {mended}")
held = late == ([3, 4], 4) and early[1] == 2 and mended == ([1, 2], 1)
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

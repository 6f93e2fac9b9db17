#!/usr/bin/env bash
# Versions: orbax-checkpoint 0.12.8 with jax 0.10.2 (Python 3.11) or 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: StandardRestore with NumPy arrays as the target gives back the shape that was saved, not the target's,
# and does not say so: asked for 2 or 5 numbers where 3 were saved, it returns 3. The type, on the other hand, is
# taken from the target without a check of the values: 300.0 restored into uint8 is 44, -2.9 is 254.
#
# Why it defeats a good guess: the target is described as the structure to restore into, and with jax arrays as the
# target a wrong shape is an error. A checkpoint of another network is thus found out late, by a broadcast or not at
# all, and rounding a state by mistake leaves no trace.
#
# Do instead: compare the checkpoint's metadata (names, shapes, types) with the state before restoring.
#
# Output seen, saved [1.7, -2.9, 300.0]:
#   target of 2: shape (3,); target of 5: shape (3,); target uint8: [1, 254, 44]; jax target of 2: ValueError
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
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.ERROR)
options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder, options=options) as manager:
    manager.save(1, args=ocp.args.StandardSave({"weight": np.array([1.7, -2.9, 300.0], np.float32)}))

    def restored(target):
        try:
            return manager.restore(1, args=ocp.args.StandardRestore({"weight": target}))["weight"]
        except ValueError as error:
            return type(error)

    short, long = (restored(np.zeros(size, np.float32)).shape for size in (2, 5))
    cast = restored(np.zeros(3, np.uint8)).tolist()
    refused = restored(jnp.zeros(2, jnp.float32))
print(f"orbax-checkpoint {importlib.metadata.version('orbax-checkpoint')}: target of 2: {short}; target of 5: {long}; "
      f"target uint8: {cast}; jax target of 2: {refused.__name__}")
held = short == long == (3,) and cast == [1, 254, 44] and refused is ValueError
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

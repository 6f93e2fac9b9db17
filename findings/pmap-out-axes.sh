#!/usr/bin/env bash
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (3.12 and later), CPU (8 virtual devices).
#
# Behaviour: pmap with out_axes=None takes a value that differs between devices, labels it as replicated, and goes on
# computing with a different number on every device. Printing, saving or comparing the array shows device 0 alone.
#
# Why it defeats a good guess: out_axes=None says "the same on all devices", and jax.shard_map refuses the same
# program. A training step without its pmean therefore runs, its loss falls, its checkpoint holds one eighth of the
# run, and only the single shards show that eight models are being trained.
#
# Do instead: compare array.addressable_shards of the state after a few steps.
#
# Output seen:
#   pmap: printed 0.0, shards 0.0 -1.0 -2.0 -3.0 -4.0 -5.0 -6.0 -7.0; called replicated: True; shard_map: ValueError
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    'jax==0.10.2; python_version < "3.12"' 'jax==0.12.0.1; python_version >= "3.12"' numpy==2.4.6
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/bin/python" -I -W ignore - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec


def step(weight, batch):
    return weight - batch.mean()  # no pmean


weight, batch = jnp.float32(0), np.arange(8.0, dtype=np.float32)
result = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)(weight, batch)
shards = [float(shard.data) for shard in result.addressable_shards]
mesh = Mesh(np.array(jax.devices()), ("data",))
parts = (PartitionSpec(), PartitionSpec("data"))
try:
    jax.shard_map(step, mesh=mesh, in_specs=parts, out_specs=PartitionSpec())(weight, batch)
    mapped = "accepted"
except ValueError:
    mapped = "ValueError"
replicated = result.sharding.is_fully_replicated
print(f"jax {jax.__version__}: pmap: printed {result}, shards {shards}, called replicated: {replicated}; "
      f"shard_map: {mapped}")
held = shards == [float(-i) for i in range(8)] and float(result) == 0 and replicated and mapped == "ValueError"
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

#!/usr/bin/env bash
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: on a CPU, jax.device_put of a NumPy array that starts at a multiple of 64 bytes shares its memory; the
# "array on the device" changes when the NumPy array is written to later. At any other address it is copied, and
# jnp.asarray, whose NumPy namesake is the one that shares, copies at every address.
#
# Why it defeats a good guess: JAX arrays are immutable, and putting one on a device sounds like a copy. A loader that
# fills one buffer again and again is thus right with jnp.asarray, right on a GPU, right for most small buffers, and
# hands out next step's images on a CPU when the allocator happens to align the buffer.
#
# Do instead: a fresh NumPy array per batch, or jnp.array(buffer), which always copies.
#
# Output seen, first entry after the buffer was changed from 1 to 2:
#   aligned to 64 bytes: device_put 2, asarray 1, array 1; 4 bytes further: device_put 1, asarray 1, array 1
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    'jax==0.10.2; python_version < "3.12"' 'jax==0.12.0.1; python_version >= "3.12"' numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/bin/python" -I -W ignore - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np

memory = np.zeros(4096 + 32, np.float32)
start = -memory.ctypes.data // 4 % 16
ways = {"device_put": jax.device_put, "asarray": jnp.asarray, "array": jnp.array}


def after_change(way, offset):
    buffer = memory[start + offset :][:4096]
    buffer[:] = 1
    placed = jax.block_until_ready(way(buffer))
    buffer[:] = 2
    return int(placed[0])


seen = [{name: after_change(way, offset) for name, way in ways.items()} for offset in (0, 1)]
print(f"jax {jax.__version__}: aligned to 64 bytes: {seen[0]}; 4 bytes further: {seen[1]}")
held = seen == [{"device_put": 2, "asarray": 1, "array": 1}, {"device_put": 1, "asarray": 1, "array": 1}]
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

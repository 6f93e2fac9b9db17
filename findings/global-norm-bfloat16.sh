#!/usr/bin/env bash
# Versions: optax 0.2.8 with jax 0.10.2 (Python 3.11) or 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: optax.tree.norm, and with it optax.clip_by_global_norm, adds up the squares of the leaves in the leaves'
# own type. In bfloat16 that sum stops growing at 256 times the square of one leaf: 1,000 leaves of norm 1 have norm
# 16, not 31.6, and "clipped to 1" they have norm 2.
#
# Why it defeats a good guess: each leaf's sum is kept in float32 by XLA, so the norm of one large bfloat16 array is
# right, and so is that of a small network. It goes wrong with the number of leaves, which no test with a tiny network
# shows; a U-Net for CIFAR-10 has some 300.
#
# Do instead: cast the gradient to float32 before the norm.
#
# Output seen:
#   one leaf of 1000: 31.6; 100 leaves: 10.0; 1000 leaves: 16.0, clipped to 1: 1.98; 1000 float32 leaves: 31.6
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    'jax==0.10.2; python_version < "3.12"' 'jax==0.12.0.1; python_version >= "3.12"' numpy==2.4.6 \
    optax==0.2.8
JAX_PLATFORMS=cpu "$folder/bin/python" -I -W ignore - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax


def leaves(count, size=1, dtype=jnp.bfloat16):
    return [jnp.ones(size, dtype)] * count


def true_norm(tree):
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in tree)))


clip = optax.clip_by_global_norm(1.0)
clipped = true_norm(clip.update(leaves(1000), clip.init(leaves(1000)))[0])
one, some, many = (float(optax.tree.norm(tree)) for tree in (leaves(1, 1000), leaves(100), leaves(1000)))
single = float(optax.tree.norm(leaves(1000, dtype=jnp.float32)))
print(f"optax {optax.__version__}, jax {jax.__version__}: one leaf of 1000: {one:.1f}; 100 leaves: {some:.1f}; "
      f"1000 leaves: {many:.1f}, clipped to 1: {clipped:.2f}; 1000 float32 leaves: {single:.1f}")
held = abs(one - 31.6) < 0.2 and some == 10 and many == 16 and clipped > 1.9 and abs(single - 31.6) < 0.1
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

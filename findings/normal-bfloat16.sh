#!/usr/bin/env bash
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: jax.random.normal(key, shape, jnp.bfloat16) knows 128 values, none beyond 2.9 in size, and its mean is
# -0.012 instead of 0. The same draw in float32 and rounded to bfloat16 has mean 0 and the tails of a Gaussian.
#
# Why it defeats a good guess: bfloat16 reaches to 1e38 with 8 bits of precision, so one expects a Gaussian rounded to
# 8 bits. But the uniform number that goes through the inverse error function is itself drawn with 7 bits, and the
# tail of a Gaussian lies in the last bits of that number. A mean of -0.012 is twelve standard errors with 1e6
# numbers, and a sampler draws a thousand times.
#
# Do instead: jax.random.normal(key, shape).astype(jnp.bfloat16).
#
# Output seen:
#   drawn in bfloat16: 128 values, from -2.89 to 2.52, mean -0.0121, beyond 3: 0
#   rounded to bfloat16: mean 0.0002, beyond 3: more than 2,000 of 1,000,000
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

key, count = jax.random.key(0), 1_000_000
drawn = np.asarray(jax.random.normal(key, (count,), jnp.bfloat16)).astype(float)
rounded = np.asarray(jax.random.normal(key, (count,)).astype(jnp.bfloat16)).astype(float)
values = len(np.unique(drawn))
print(f"jax {jax.__version__}")
print(f"drawn in bfloat16: {values} values, from {drawn.min():.2f} to {drawn.max():.2f}, mean {drawn.mean():.4f}, "
      f"beyond 3: {(abs(drawn) > 3).sum()}")
print(f"rounded to bfloat16: {len(np.unique(rounded))} values, from {rounded.min():.2f} to {rounded.max():.2f}, "
      f"mean {rounded.mean():.4f}, beyond 3: {(abs(rounded) > 3).sum()}")
held = values == 128 and abs(drawn).max() < 3 and drawn.mean() < -0.01
held = held and abs(rounded.mean()) < 0.003 and (abs(rounded) > 3).sum() > 2000
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

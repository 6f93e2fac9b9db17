#!/usr/bin/env bash
# Versions: flax 0.12.8 with jax 0.10.2 (Python 3.11), flax 0.12.12 with jax 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: Linen's GroupNorm (and LayerNorm and BatchNorm, which share the code) computes the variance as the mean
# of squares less the square of the mean, in float32. Noise of variance 1 around 4096 leaves the norm with a standard
# deviation of several hundred instead of 1; around 1000 it is still off by more than 1 per cent.
#
# Why it defeats a good guess: a norm is the layer that makes the scale of its input irrelevant, and PyTorch's gives 1
# for all of these. Weights trained elsewhere and carried over can thus give other images, and fresh weights, whose
# activations are small, do not show it.
#
# Do instead: use_fast_variance=False, or a norm that takes the mean off first.
#
# Output seen, standard deviation after the norm:
#   mean 0: 1.000 and 1.000; mean 1000: 1.102 and 1.000; mean 4096: 492.730 and 1.000
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    'jax==0.10.2; python_version < "3.12"' 'jax==0.12.0.1; python_version >= "3.12"' numpy==2.4.6 \
    'flax==0.12.8; python_version < "3.12"' 'flax==0.12.12; python_version >= "3.12"'
JAX_PLATFORMS=cpu "$folder/bin/python" -I -W ignore - <<'EOF'
import sys

import flax
import flax.linen as nn
import jax
import numpy as np

noise = np.random.default_rng(0).normal(size=(1, 8, 8, 32)).astype(np.float32)


def deviation(x, **options):
    return float(nn.GroupNorm(4, **options).init_with_output(jax.random.key(0), x)[0].std())


print(f"flax {flax.__version__}, jax {jax.__version__}: standard deviation after the norm, default and two-pass")
seen = {mean: (deviation(noise + mean), deviation(noise + mean, use_fast_variance=False)) for mean in (0, 1000, 4096)}
for mean, (fast, exact) in seen.items():
    print(f"mean {mean}: {fast:.3f} and {exact:.3f}")
held = all(abs(exact - 1) < 0.001 for _, exact in seen.values())
held = held and abs(seen[0][0] - 1) < 0.001 and abs(seen[1000][0] - 1) > 0.01 and seen[4096][0] > 10
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

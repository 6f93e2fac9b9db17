#!/usr/bin/env bash
# Versions: flax 0.12.8 with jax 0.10.2 (Python 3.11), flax 0.12.12 with jax 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: flax.linen.GroupNorm takes an image (H, W, C) without a batch axis for H examples and normalises each row
# of pixels by itself. No error; the shape of the result is right.
#
# Why it defeats a good guess: Linen's Conv accepts an unbatched image and does the right thing, so a network written
# for one image and mapped by vmap runs with both layers. Only the values differ from the batched network's: every row
# has lost its mean and contrast.
#
# Do instead: GroupNorm(reduction_axes=(-3, -2, -1)), which is right with and without a batch axis.
#
# Output seen, for an image whose row r is r plus noise:
#   means of the rows after the norm: batched from -1.5 to 1.5, unbatched all 0.0, with reduction_axes as batched
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

rows = np.arange(8, dtype=np.float32)[:, None, None]
image = rows + np.random.default_rng(0).normal(size=(8, 8, 32), scale=0.1).astype(np.float32)


def norm(x, **options):
    return nn.GroupNorm(4, **options).init_with_output(jax.random.key(0), x)[0]


def row_means(x):
    return np.asarray(x).mean(axis=(1, 2))


batched, unbatched = norm(image[None])[0], norm(image)
named = norm(image, reduction_axes=(-3, -2, -1))
print(f"flax {flax.__version__}, jax {jax.__version__}: means of the rows")
for title, x in {"batched": batched, "unbatched": unbatched, "with reduction_axes": named}.items():
    print(f"{title:20}", np.round(row_means(x), 2) + 0.0)
held = np.ptp(row_means(batched)) > 2.5 and abs(row_means(unbatched)).max() < 1e-4
held = held and np.allclose(named, batched, atol=1e-5)
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

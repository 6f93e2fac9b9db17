#!/usr/bin/env bash
# Versions: safetensors 0.8.0, NumPy 2.4.6.
#
# Behaviour: safetensors.numpy.save writes a transposed array with the new shape and the values in the old order. What
# is read back has the right name, shape and type and the wrong entries.
#
# Why it defeats a good guess: everything around it respects strides: numpy.save does, and the same library's writer
# for JAX arrays and PyTorch's tensors is right or refuses. Transposing is just what a conversion of weights to
# PyTorch's layout consists of, so the file is wrong exactly where it matters, and nothing but the sampled images
# tells.
#
# Do instead: numpy.ascontiguousarray on every tensor before saving.
#
# Output seen:
#   written [[0, 3], [1, 4], [2, 5]], read [[0, 1], [2, 3], [4, 5]], after ascontiguousarray [[0, 3], [1, 4], [2,
#   5]]
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$folder/bin/python" -I -W ignore - <<'EOF'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3).T
read = load(save({"weight": weight}))["weight"]
copied = load(save({"weight": np.ascontiguousarray(weight)}))["weight"]
lists = [x.astype(int).tolist() for x in (weight, read, copied)]
print(f"safetensors {safetensors.__version__}: " + "written {}, read {}, after ascontiguousarray {}".format(*lists))
held = read.shape == weight.shape and read.ravel().tolist() == [0, 1, 2, 3, 4, 5] and np.array_equal(copied, weight)
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

#!/usr/bin/env bash
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: under jit on a CPU, the sum of squares of a matrix product is wrong if the second factor is a constant
# whose entries are all equal and which is built inside the compiled function. Here it comes out 16 times too small;
# other shapes give other factors, inf or NaN. Passed as an argument, the same matrix gives the right sum; so does the
# same code without jit. No warning is raised.
#
# Why it defeats a good guess: a constant inside a compiled function and the same constant as its argument are taken
# to be the same program. A product with ones is a favourite of unit tests and a way to sum over channels. (A related
# fault: jax-ml/jax issue 39103.)
#
# Do instead: pass such matrices as arguments, write the product as x.sum(-1, keepdims=True), or run with
# XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (right, but slower), and check compiled results against NumPy.
#
# Output seen:
#   true sum 16777216, constant inside jit 1048576, constant as argument 16777216, without the fusions 16777216
set -euo pipefail
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet \
    'jax==0.10.2; python_version < "3.12"' 'jax==0.12.0.1; python_version >= "3.12"' numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/bin/python" -I -W ignore - <<'EOF'
import os
import subprocess
import sys

import jax
import jax.numpy as jnp


@jax.jit
def inside(x):
    return jnp.square(x @ jnp.ones((4, 4))).sum(axis=(-2, -1))


@jax.jit
def argument(x, ones):
    return jnp.square(x @ ones).sum(axis=(-2, -1))


x = jnp.ones((2, 2**18, 4))
true = 2**18 * 4 * 4**2
wrong, right = int(inside(x)[0]), int(argument(x, jnp.ones((4, 4)))[0])
program = """
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.square(x @ jnp.ones((4, 4))).sum(axis=(-2, -1)))
print(int(f(jnp.ones((2, 2**18, 4)))[0]))
"""
flags = {**os.environ, "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type="}
plain = int(subprocess.run([sys.executable, "-I", "-c", program], env=flags, capture_output=True, check=True).stdout)
print(f"jax {jax.__version__}: true sum {true}, constant inside jit {wrong}, constant as argument {right}, "
      f"without the fusions {plain}")
held = wrong == true // 16 and right == plain == true
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

#!/usr/bin/env bash
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: compiled.cost_analysis()["flops"] counts the body of a lax.scan once, whatever the number of turns: a
# scan of 1,000 matrix products is said to cost what one costs.
#
# Why it defeats a good guess: the number of turns is a constant of the program, XLA itself knows it, and the same
# products written out one after another are all counted. Several training steps in one scan, accumulated gradients
# and a sampler's loop thus look 10 to 1,000 times cheaper than they are, and the share of the chip's peak comes out
# as many times too small.
#
# Do instead: compile the body alone and multiply by the number of turns.
#
# Output seen, in products of two 128 x 128 matrices:
#   scan of 1: 1.00, scan of 10: 1.00, scan of 1000: 1.00, ten written out: 10.00
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

weight = jnp.ones((128, 128))
one = 2 * 128**3


def scanned(turns):
    return lambda x: jax.lax.scan(lambda x, _: (x @ weight, None), x, length=turns)[0]


def written_out(x):
    for _ in range(10):
        x = x @ weight
    return x


def products(function):
    return jax.jit(function).lower(weight).compile().cost_analysis()["flops"] / one


counts = {turns: products(scanned(turns)) for turns in (1, 10, 1000)}
unrolled = products(written_out)
print(f"jax {jax.__version__}: scan of " + ", ".join(f"{n}: {count:.2f}" for n, count in counts.items())
      + f", ten written out: {unrolled:.2f}")
held = all(abs(count - 1) < 0.01 for count in counts.values()) and abs(unrolled - 10) < 0.01
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

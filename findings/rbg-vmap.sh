#!/usr/bin/env bash
# Versions: jax 0.10.2 (Python 3.11) and 0.12.0.1 (3.12 and later), CPU.
#
# Behaviour: with keys of the "rbg" generator, vmap(normal)(keys) takes its bits from the first key of the batch
# alone. Exchanging keys 1 and 2 of four changes nothing, another key 0 changes all four draws, and drawing with each
# key by itself gives other numbers.
#
# Why it defeats a good guess: one key per image is the way to make image i independent of the batch it is drawn in,
# vmap is supposed to equal the loop, and "rbg" is recommended as the fast generator on TPUs. With both, image 3
# depends on who sits at place 0.
#
# Do instead: the default generator (threefry) wherever draws are keyed by example.
#
# Output seen:
#   vmap equals the loop: threefry True, rbg False
#   rbg, keys 1 and 2 exchanged: same draws True; another key 0: draws of keys 1 to 3 the same False
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


def draw(keys):
    return jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


def alone(keys):
    return jnp.stack([jax.random.normal(key, (3,)) for key in keys])


sets = {name: jax.random.split(jax.random.key(0, impl=name), 4) for name in ("threefry2x32", "rbg")}
equal = {name: bool((draw(keys) == alone(keys)).all()) for name, keys in sets.items()}
keys = sets["rbg"]
exchanged = bool((draw(keys[jnp.array([0, 2, 1, 3])]) == draw(keys)).all())
other = keys.at[0].set(jax.random.key(7, impl="rbg"))
kept = bool((draw(other)[1:] == draw(keys)[1:]).any())
print(f"jax {jax.__version__}: vmap equals the loop: threefry {equal['threefry2x32']}, rbg {equal['rbg']}")
print(f"rbg, keys 1 and 2 exchanged: same draws {exchanged}; another key 0: draws of keys 1 to 3 the same {kept}")
held = equal["threefry2x32"] and not equal["rbg"] and exchanged and not kept
sys.exit(0 if held else "no longer as described at the top of this script")
EOF

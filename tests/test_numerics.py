"""Sums that a version of jaxlib is known to get wrong on a CPU come out right as soon as the package is imported."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ddpm_jax import environment
from ddpm_jax.run import checkpoint

# The sum of squares of each of n rows, of which the last is n - 1, after a product with the identity, as float64 has it
# (the reproduction of jax-ml/jax issue 39103).
SUMS = """
import ddpm_jax
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
for dtype, n in ((jnp.float64, 16_385), (jnp.float32, 32_769)):
    i = jnp.arange(n, dtype=dtype)
    rows = jnp.stack((i, 0 * i, 0 * i), 1)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3, dtype=dtype) @ row) ** 2)))(rows)
    assert found[-1] == (n - 1) ** 2, (dtype, found[-1], (n - 1) ** 2)
"""


def python(code, **variables):
    own = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=own | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_known_wrong_sums_are_right():
    done = python(SUMS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0.1"])
def test_sums_are_not_fused_in_the_version_that_gets_them_wrong(version, monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda name: version)
    monkeypatch.setattr(environment.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    environment._choose_fusions()
    off = "-individual_convolution" + (",-reduce" if version == "0.10.2" else "")
    assert os.environ["XLA_FLAGS"] == f"--xla_other=1 {environment.YNN_FLAG}={off}"


@pytest.mark.parametrize(
    ("variables", "plugin", "changed"),
    [
        ({"XLA_FLAGS": f"{environment.YNN_FLAG}=dot"}, None, False),  # the user's own
        ({}, "jax_cuda13_plugin", False),
        ({"JAX_PLATFORMS": "cpu"}, "jax_cuda13_plugin", True),
    ],
)
def test_flags_of_the_user_and_accelerators_are_left_alone(variables, plugin, changed, monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setattr(environment.util, "find_spec", lambda name: name == plugin or None)
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, variables.get(name, ""))
    before = os.environ["XLA_FLAGS"]
    environment._choose_fusions()
    assert (os.environ["XLA_FLAGS"] != before) == changed


def test_the_setting_is_recorded(monkeypatch):
    name = environment.YNN_FLAG.lstrip("-")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert name not in checkpoint.versions()
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {environment.YNN_FLAG}=-reduce --xla_b=2")
    assert checkpoint.versions()[name] == "-reduce"

"""What --dry-run compiles: for TPUs that are not here (-m tpu, with the extra `tpu`), and for a CPU in time."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import SMALL

from ddpm_jax import config as configs
from ddpm_jax import environment, errors, experiment, parallel
from ddpm_jax.commands import dry_run
from ddpm_jax.networks import convolutions

WITHOUT_TPU = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "ALLOW_MULTIPLE"))}


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu")


# The devices that JAX has on the real machines, and the GiB of each as published: docs.cloud.google.com/tpu/docs, the
# pages of each. A chip of v2, v3 and TPU7x has two devices, with half its memory each.
MACHINES = [
    ("v5e:2x4", "TPU v5 lite", 8, 16),
    ("v6e:2x4", "TPU v6 lite", 8, 32),
    ("tpu7x:2x2x1", "TPU7x", 8, 192 / 2),
    ("v5p:2x2x1", "TPU v5", 4, 95),
    ("v4:2x2x1", "TPU v4", 4, 32),
    ("TPU v4:2x2x2", "TPU v4", 8, 32),
    ("v3:2x2", "TPU v3", 8, 32 / 2),
    ("v2:2x2", "TPU v2", 8, 16 / 2),
]


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "kind", "number", "published"), MACHINES)
def test_devices_are_those_of_the_real_machine(libtpu, name, kind, number, published):
    """In number and in memory, which the compiler tells when it refuses a program."""
    devices = parallel.topology(name)
    assert (len(devices), devices[0].device_kind) == (number, kind)
    one = jax.sharding.SingleDeviceSharding(devices[0])
    large = jax.ShapeDtypeStruct((400_000, 400_000), jnp.float32, sharding=one)
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM") as caught:
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x), out_shardings=one).lower(large).compile()
    available = float(re.search(r"available HBM \(([\d.]+)G\)", str(caught.value))[1])
    assert 0.92 * published < available < 1.01 * published
    if kind in dry_run.PEAKS:
        chips = {tuple(device.coords) for device in devices}
        assert dry_run.PEAKS[kind][1] * len(chips) / number == pytest.approx(available, rel=1e-3)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:32x32", "v6e:8x32"])
def test_no_slice_is_larger_than_a_pod(libtpu, name):
    with pytest.raises(errors.ConfigError, match="has 16x16 chips at most"):
        parallel.topology(name)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v99:2x2", "v5e:3x3", "banana"])
def test_an_unknown_name_is_refused(libtpu, name):
    with pytest.raises(errors.ConfigError, match=f"--topology={name} is not known .*; try v5e:2x4"):
        parallel.topology(name)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("options", "name", "chips"),
    [
        (["--config=configs/digits.py"], "v5e:2x4", 8),
        ([*SMALL, "--config.data.image_size=8", "--config.data.channels=1"], "tpu7x:2x2x1", 4),
        ([*SMALL, "--config.data.image_size=8", "--config.data.channels=1"], "v4:2x2x2", 8),
    ],
)
def test_a_step_is_compiled_for_chips_that_are_not_here(libtpu, script, options, name, chips):
    """Every device gives the others its gradient, 4 bytes a parameter."""
    done = script("train.py", *options, "--dry-run", f"--topology={name}")
    assert done.returncode == 0, done.stderr
    parameters = int(re.search(r"U-Net of ([\d,]+) parameters", done.stdout)[1].replace(",", ""))
    sizes = re.findall(r"\d all-reduce of ([\d.]+) MB", done.stdout)
    assert len(sizes) == 1
    assert float(sizes[0]) == pytest.approx(4e-6 * parameters, abs=0.06)
    assert f"8 devices are {chips} chips" in done.stdout
    assert "no step is faster than" in done.stdout
    assert not done.stderr


@pytest.mark.tpu
@pytest.mark.skipif(environment.tpu_is_attached(), reason="there is a TPU")
def test_libtpu_is_quiet_without_a_tpu(libtpu):
    code = "import jax; from ddpm_jax import parallel; print(parallel.describe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=WITHOUT_TPU, check=True)
    assert "(cpu)" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("attached", [True, False])
def test_nothing_is_told_to_a_tpu_that_is_there(monkeypatch, attached):
    for name in environment.WITHOUT_TPU:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.setattr(environment.util, "find_spec", lambda name: name)
    monkeypatch.setattr(environment, "tpu_is_attached", lambda: attached)
    environment._quiet_libtpu()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert (environment.WITHOUT_TPU.keys() - os.environ.keys() == set()) != attached


@pytest.mark.parametrize(
    ("name", "shape", "slow"),
    [
        ("celebahq256", (256, 256, 3), True),
        pytest.param("lsun256", (256, 256, 3), True, marks=pytest.mark.slow),
        pytest.param("cifar10", (32, 32, 3), False, marks=pytest.mark.slow),
        ("digits", (8, 8, 1), False),
    ],
)
def test_large_images_have_no_minimal_filtering_in_a_dry_run_on_a_cpu(name, shape, slow):
    parts = experiment.make(configs.load(name), shape)
    assert dry_run.compiles_slowly(parts) == slow
    params, x = experiment.params_shape(parts), jax.ShapeDtypeStruct(shape, jnp.float32)
    made = str(jax.make_jaxpr(lambda *args: parts.net(*args))(params, x, 1))
    with convolutions.direct_only():
        other = str(jax.make_jaxpr(lambda *args: parts.net(*args))(params, x, 1))
    assert ("minimal_filtering" in made) == (name != "digits")
    assert "minimal_filtering" not in other
    assert math.isfinite(convolutions.MIN_CHANNELS)


@pytest.mark.slow
def test_a_dry_run_of_256x256_on_a_cpu_ends(script):
    done = script("train.py", "--config=configs/celebahq256.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "direct convolutions are compiled instead" in done.stdout
    assert "dry run done without a step, nothing written" in done.stdout

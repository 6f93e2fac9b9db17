"""What is compiled as in a real run against the same operations one by one, so that a wrong fusion is seen here first.

jaxlib 0.10.2 got the sum of squares wrong that a product with a 3x3 matrix makes of the last of 32,769 rows, on a CPU
(jax-ml/jax issue 39103). The rows are all pixels of a batch in a network, all images in the terms of a likelihood.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LEAST, random_params, small_experiment

from ddpm_jax import diffusion, likelihood
from ddpm_jax.evaluation import likelihood as reports
from ddpm_jax.evaluation.features import enl0, torchfile

AS_IN_A_RUN = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # unlike in conftest.py

MANY = 2**15 + 1
MANY_PIXELS = MANY // 16 + 1  # images of 4x4

PAPER = {"channels": 8, "groups": 4, "multipliers": (1, 2), "attention_resolutions": (4,)}
MODELS = {
    "as in the paper": (PAPER, {}),
    "with all options": (
        PAPER | {"num_classes": 3, "scale_shift": True, "symmetric_halving": True, "head_channels": 4, "remat": True},
        {"variance": "learned", "parameterization": "v", "weighting": "min_snr"},
    ),
}


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=AS_IN_A_RUN)(*args)


def assert_same(function, *args, rtol=1e-4):
    """rtol: of the largest value of each array, where that is not rounding of the largest of all (a gradient of 0)."""
    found = jax.tree.leaves(compiled(function, *args))
    with jax.disable_jit():
        wanted = jax.tree.leaves(function(*args))
    sizes = [np.abs(leaf).max() for leaf in wanted]
    for one, other, size in zip(found, wanted, sizes, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * size + 1e-7 * max(sizes))


def images(number, shape):
    return np.random.default_rng(0).integers(0, 256, (number, *shape), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", [3, MANY_PIXELS])
def test_loss_and_gradient(model, number):
    options, names = MODELS[model]
    parts = small_experiment(options, **names)
    process = parts.schedule, parts.parameterization
    extra = {"extra": likelihood.make_variance_loss(*process)} if "variance" in names else {}
    weighting = diffusion.WEIGHTINGS[names.get("weighting", "simple")]
    loss = diffusion.make_loss(parts.net, *process, weighting, **extra)
    label = np.arange(number) % 3 if "num_classes" in options else None
    keys = jax.random.split(jax.random.key(0), number)

    def mean_loss(params):
        x_0 = images(number, parts.shape) / np.float32(127.5) - 1
        return jnp.mean(jax.vmap(loss, (None, 0, 0, None if label is None else 0))(params, keys, x_0, label))

    assert_same(jax.value_and_grad(mean_loss), random_params(parts.init))


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, MANY_PIXELS])
def test_likelihood(number):
    parts = small_experiment(LEAST)
    plan = reports.make_plan(parts, ("nll", "ode", "mse"), steps=3, ode_steps=3, divergence="hutchinson")
    rows = {"index": np.arange(number), "image": images(number, parts.shape)}
    measure = jax.vmap(reports.make_measure(parts, plan), (None, None, 0))
    assert_same(measure, random_params(parts.init), jax.random.key(0), rows)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(enl0.PACKAGE) is None, reason="needs the extra kid")
@pytest.mark.parametrize("number", [2, 40])  # of 32 x 32 after the first layer
def test_features(number):
    params = enl0.params(torchfile.read(enl0.find()), "")
    assert_same(jax.vmap(enl0.apply, (None, 0)), params, images(number, (32, 32, 3)))


@pytest.mark.parametrize("rows", [1000, MANY])
def test_sums_of_squares_of_products(rows):
    """Of each row and of all, against float64 NumPy: what went wrong there."""
    x, matrix = (np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32) for n in (rows, 3))
    each = compiled(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)), x)
    wanted = np.sum((x @ np.float64(matrix).T) ** 2, 1)
    np.testing.assert_allclose(each, wanted, rtol=1e-4)
    np.testing.assert_allclose(compiled(lambda x: jnp.sum((x @ matrix.T) ** 2), x), wanted.sum(), rtol=1e-4)


def test_terms_of_the_bound_of_many_images():
    def terms(x_0, x_0_hat):
        decoded = likelihood.decoder_nll(x_0, x_0_hat, 0.01)
        return likelihood.prior_kl(x_0, -5.0), likelihood.step_kl(x_0, x_0_hat, -1.0, 1.0), decoded

    x_0 = images(MANY, (1, 1, 3)) / np.float32(127.5) - 1
    assert_same(jax.vmap(terms), x_0, 0.9 * x_0)

"""Parameters as one vector: no number is lost or moved, and training is that of the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_experiment
from train_steps import ROOT, batch_of, run

from ddpm_jax import training, vectors

TREE = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": [np.float32(7), np.zeros((0, 2), np.float32)]}


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("place", [jax.device_get, jax.device_put])
def test_packed_and_unpacked_is_the_same(place):
    packed = place(vectors.pack(TREE))
    np.testing.assert_array_equal(packed.values, [7, 0, 1, 2, 3, 4, 5])
    assert_equal(vectors.unpack({"x": packed, "y": np.ones(2)}), {"x": TREE, "y": np.ones(2)})


def test_members_come_first():
    members = jax.tree.map(lambda x: np.stack([x, 10 + x]), TREE)
    packed = vectors.pack(members, axes=1)
    assert packed.values.shape == (2, 7)
    assert_equal(packed.tree(), members)
    assert_equal(vectors.pack_like(packed, members).values, packed.values)
    assert_equal(jax.vmap(lambda one: one.tree())(packed), members)


def test_shapes_alone():
    packed = jax.eval_shape(vectors.pack, TREE)
    assert jax.tree.map(lambda leaf: leaf.shape, packed.tree()) == {"b": (2, 3), "a": [(), (0, 2)]}


def test_other_types_stay_a_tree():
    tree = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float16)}
    assert vectors.pack(tree) is tree


def test_a_gradient_is_one_concatenation():
    """The derivative of a slice would add a whole vector for every leaf."""
    packed = vectors.pack(TREE)
    text = str(jax.make_jaxpr(jax.grad(lambda v: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(v.tree()))))(packed))
    assert "concatenate" in text
    assert "pad" not in text
    assert "add_any" not in text


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_that_of_the_tree(accumulate):
    """Clipping, Adam and both kinds of averages, to the rounding of the norm, which is summed in another order."""
    parts, optimizer, lengths = small_experiment(), training.make_optimizer(1e-2, 0.1), (0.1,)
    step = training.make_train_step(parts.loss, optimizer, 0.9, accumulate=accumulate, lengths=lengths)
    params = jax.jit(parts.init)(ROOT)
    batch = batch_of(8) | {"image": np.random.default_rng(0).integers(0, 256, (8, *parts.shape), np.uint8)}
    ends = []
    for start in (params, vectors.pack(params)):
        state = training.init_state(start, optimizer, lengths=lengths)
        for _ in range(3):
            state, metrics = run(step, state, batch)
        ends.append((state, metrics))
    (tree, metrics), (packed, packed_metrics) = ends
    assert vectors.is_vector(packed.opt_state[1][0].mu)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(vectors.unpack(packed)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(packed_metrics[name], value, rtol=1e-5)


def test_a_whole_vector_would_mislead_an_optimiser_of_arrays():
    """Why only experiment.make, which knows its optimiser, packs: LAMB scales the update of each array by its norm."""
    params = {"a": np.ones(2, np.float32), "b": np.full(2, 10, np.float32)}
    optimizer = optax.lamb(0.1)

    def updated(params):
        return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]

    tree, packed = updated(params), vectors.unpack(updated(vectors.pack(params)))
    assert abs(tree["b"][0] / tree["a"][0]) > 5
    np.testing.assert_allclose(packed["a"], packed["b"])

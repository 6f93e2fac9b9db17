"""The transformer against published parameter counts, NumPy in float64, and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_experiment

from ddpm_jax.config import Model
from ddpm_jax.errors import ConfigError
from ddpm_jax.networks import NETWORKS, UNUSED, dit, make_network, unet

TINY = {"channels": 8, "depth": 2, "num_heads": 2, "patch": 2, "mlp_ratio": 2.0}
IMAGE = np.random.default_rng(0).normal(size=(4, 6, 1)).astype(np.float32)


def build(shape=IMAGE.shape, learned_variance=False, **changes):
    init, net = make_network(Model(network="dit", **TINY | changes), shape, learned_variance=learned_variance)
    return jax.jit(net), random_params(init)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("channels", "num_heads", "millions"), [(384, 6, 32.9), (768, 12, 130.3)])
def test_published_parameter_counts(channels, num_heads, millions):
    """DiT-S/2 and B/2: 33M and 130M in the paper's table 4, for 32x32x4, ImageNet's labels and a learned variance.

    The sum is by hand from its figure 3: D = channels, (inputs + 1) x outputs for each layer.
    """
    model = Model(network="dit", channels=channels, depth=12, num_heads=num_heads, patch=2, num_classes=1000)
    init, _ = make_network(model, (32, 32, 4), learned_variance=True)
    d = channels
    embeddings = (16 + 1) * d + (256 + 1) * d + (d + 1) * d + 1001 * d  # patches; time, two layers; labels and none
    block = (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d + (d + 1) * 6 * d
    last = (d + 1) * 2 * d + (d + 1) * 32
    found = count(jax.eval_shape(init, jax.random.key(0)))
    assert found == embeddings + 12 * block + last
    assert round(found / 1e6, 1) == millions


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def test_a_block_is_the_papers():
    """Figure 3 in NumPy float64, from the block's own parameters: six parts of the condition, two heads, GELU."""
    random = np.random.default_rng(0)
    x, condition = random.normal(size=(2, 3, 8)), random.normal(size=8)
    block = dit.Block(2, 2.0, jnp.float32)
    params = random_params(lambda key: block.init(key, jnp.float32(x), jnp.float32(condition))["params"])
    found, _ = block.apply({"params": params}, jnp.float32(x), jnp.float32(condition))

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers = {name: lambda h, w=w: h @ w["kernel"] + w["bias"] for name, w in p.items()}
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = layers["modulation"](condition).reshape(6, 8)
    x = x.reshape(6, 8)
    q, k, v = np.split(layers["qkv"](layer_norm(x) * (1 + scale_1) + shift_1), 3, -1)
    heads = []
    for at in (slice(0, 4), slice(4, 8)):
        weights = np.exp(q[:, at] @ k[:, at].T / 2)
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, at])
    x = x + gate_1 * layers["out"](np.concatenate(heads, 1))
    h = layers["mlp_1"](layer_norm(x) * (1 + scale_2) + shift_2)
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(found.reshape(6, 8), x + gate_2 * layers["mlp_2"](h), atol=1e-5)


def test_at_initialisation_blocks_are_the_identity_and_the_network_is_zero():
    random = np.random.default_rng(0)
    x, condition = jnp.float32(random.normal(size=(2, 3, 8))), jnp.float32(random.normal(size=8))
    (found, _), _ = dit.Block(2, 4.0, jnp.float32).init_with_output(jax.random.key(0), x, condition)
    np.testing.assert_array_equal(found, x)
    init, net = make_network(Model(network="dit", **TINY), IMAGE.shape)
    np.testing.assert_array_equal(jax.jit(net)(jax.jit(init)(jax.random.key(0)), IMAGE, 5), 0)


def test_the_scan_is_a_loop_over_the_blocks():
    """The whole network, written out with a Python loop over the blocks; two blocks in it differ."""
    net, params = build()
    waves = unet.time_embedding(7, 256, shift=0, cos_first=True)

    def layer(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"]

    condition = unet.swish(layer("time_2", unet.swish(layer("time_1", waves))))
    patches = np.stack([[IMAGE[i : i + 2, j : j + 2].ravel() for j in (0, 2, 4)] for i in (0, 2)])
    h = layer("embed", patches) + dit.positions(2, 3, 8)
    for i in range(2):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        h, _ = dit.Block(2, 2.0, jnp.float32).apply({"params": own}, h, condition)
    shift, scale = np.split(layer("modulation", condition), 2)
    h = layer("out", layer_norm(np.asarray(h)) * (1 + scale) + shift)
    wanted = np.concatenate([np.concatenate([h[i, j].reshape(2, 2, 1) for j in range(3)], 1) for i in range(2)], 0)
    np.testing.assert_allclose(net(params, IMAGE, 7), wanted, atol=2e-5)


def test_positions_tell_rows_from_columns():
    """In float64: the column at row 0 and the row at column 0, with frequencies 10000^(-i / 2) for 8 channels."""
    found = dit.positions(4, 5, 8)
    waves = np.array([[np.sin(3.0), np.sin(3 / 100), np.cos(3.0), np.cos(3 / 100)]])
    np.testing.assert_allclose(found[0, 3], np.concatenate([waves[0], [0, 0, 1, 1]]), atol=1e-6)
    np.testing.assert_allclose(found[3, 0], np.concatenate([[0, 0, 1, 1], waves[0]]), atol=1e-6)


def test_time_and_label_reach_the_output_and_every_parameter_has_a_gradient():
    net, params = build(num_classes=3)
    outputs = [net(params, IMAGE, t, label=label) for t in (1, 2) for label in (0, 1, 2, None)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert np.abs(a - b).max() > 1e-4
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(net(params, IMAGE, 7, label=1) ** 2)))(params)
    used = jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), gradient)
    assert all(jax.tree.leaves(used)), used


def test_the_other_choices():
    """Learned variance, and bfloat16 with parameters and output in float32."""
    net, params = build((4, 6, 3), learned_variance=True)
    assert jax.eval_shape(net, params, jnp.zeros((4, 6, 3)), 1).shape == (4, 6, 6)
    (half, params), (full, _) = build(dtype="bfloat16"), build()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    half, full = half(params, IMAGE, 7), full(params, IMAGE, 7)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.slow
def test_remat_changes_no_gradient():
    def gradient(remat):
        net, params = build(remat=remat)
        return jax.jit(jax.grad(lambda params: jnp.sum(net(params, IMAGE, 7) ** 2)))(params)

    for a, b in zip(*map(jax.tree.leaves, (gradient(False), gradient(True))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 4}, "model.patch=4 does not divide the sides of images of 4x6"),
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.channels=8"),
        ({"channels": 6}, "model.channels=6 must be a multiple of 4 for model.network=dit"),
        ({"multipliers": (1, 2)}, "model.network=dit has no use for model.multipliers; leave it at its default"),
        ({"dropout": 0.5}, "has no use for model.dropout"),
        ({"network": "unet", "depth": 3, "mlp_ratio": 4.0}, "model.network=unet has no use for model.depth"),
    ],
)
def test_choices_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_network(Model(**{"network": "dit"} | TINY | changes), IMAGE.shape)


def test_unused_fields_may_be_off():
    """dropout=0 says what a DiT does anyway, as does an empty list of resolutions."""
    make_network(Model(network="dit", dropout=0.0, attention_resolutions=(), **TINY), IMAGE.shape)


def test_each_network_has_its_fields():
    known = {name for name in vars(Model()) if name != "network"}
    for name, module in (("unet", unet.UNet), ("dit", dit.DiT)):
        assert known - set(UNUSED[name]) == known & set(module.__dataclass_fields__), name
    assert sorted(NETWORKS) == sorted(UNUSED)


def test_an_unknown_network_is_refused():
    with pytest.raises(ConfigError, match=r"network=u-net is not one of unet, dit"):
        small_experiment({"network": "u-net"})

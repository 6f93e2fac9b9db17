"""The network against published parameter counts, NumPy in float64, and identities."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params

from ddpm_jax.config import Model
from ddpm_jax.errors import ConfigError
from ddpm_jax.networks import make_network, unet

IMAGE = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)


def build(shape=(8, 8, 1), **changes):
    init, net = unet.make_unet(shape, **{**TINY, **changes})
    return net, random_params(init)


@pytest.mark.parametrize(
    ("shape", "multipliers", "count"),
    [((32, 32, 3), (1, 2, 2, 2), 35_746_307), ((256, 256, 3), (1, 1, 2, 2, 4, 4), 113_673_219)],
)
def test_published_parameter_counts(shape, multipliers, count):
    """Ho et al. 2020, appendix B: 35.7M for CIFAR-10, 114M for 256x256; the exact counts are those of their code."""
    init, _ = make_network(Model(multipliers=multipliers), shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))) == count


@pytest.mark.parametrize(
    ("side", "changes", "millions"),
    [
        (64, {"channels": 192, "multipliers": (1, 2, 3, 4), "num_res_blocks": 3}, 296),
        (256, {"channels": 256, "multipliers": (1, 1, 2, 2, 4, 4)}, 554),
    ],
)
def test_published_counts_with_residual_halving(side, changes, millions):
    """Dhariwal & Nichol 2021 (arXiv:2105.05233), ADM in the table of hyperparameters, with the labels of ImageNet."""
    model = Model(**changes, attention_resolutions=(32, 16, 8), scale_shift=True, num_classes=1000, resample="residual")
    init, _ = make_network(model, (side, side, 3), learned_variance=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("resample", ["halve", "double"])
def test_a_resampling_block_starts_as_means_or_nearest_neighbours(resample):
    """The last convolution is zero at initialisation, and the shortcut has no parameters."""
    image = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    block = unet.ResBlock(8, 4, 0.0, False, jnp.float32, resample=resample)
    found, params = block.init_with_output(jax.random.key(0), image, jnp.ones(4))
    means = [[image[i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2, 4)] for i in (0, 2)]
    np.testing.assert_allclose(found, means if resample == "halve" else np.kron(image, np.ones((2, 2, 1))), atol=1e-6)
    assert sorted(params["params"]) == ["conv_1", "conv_2", "norm_1", "norm_2", "time"]


def test_time_embedding_is_the_papers():
    """sin and cos of t - 1 times 10000^(-i / (half - 1)), in float64."""
    for t in (1, 2, 500, 1000):
        frequencies = 10000.0 ** (-np.arange(8) / 7)
        wanted = np.concatenate([np.sin((t - 1) * frequencies), np.cos((t - 1) * frequencies)])
        np.testing.assert_allclose(unet.time_embedding(t, 16), wanted, atol=1e-4)
    assert unet.time_embedding(3, 9).shape == (9,)


def test_group_norm_takes_one_image_as_a_whole():
    x = np.random.default_rng(0).normal(2, 3, size=(6, 4, 12))
    norm = unet.group_norm(3, 12)
    found = norm.apply(norm.init(jax.random.key(0), jnp.asarray(x, jnp.float32)), jnp.asarray(x, jnp.float32))
    parts = x.reshape(6, 4, 3, 4)
    wanted = (parts - parts.mean((0, 1, 3), keepdims=True)) / np.sqrt(parts.var((0, 1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, wanted.reshape(x.shape), atol=1e-5)


def test_group_norm_of_an_image_and_an_offset():
    """That of their sum, in float64; the image lies 100 standard deviations from 0."""
    random = np.random.default_rng(0)
    image, (offset, scale, bias) = random.normal(100, 1, (5, 6, 12)).astype(np.float32), random.normal(0, 30, (3, 12))
    found = unet.group_norm(4, 12).apply({"params": {"scale": scale, "bias": bias}}, image, np.float32(offset))
    total = (image.astype(np.float64) + np.float32(offset)).reshape(5, 6, 4, 3)
    total -= total.mean((0, 1, 3), keepdims=True)
    wanted = (total / np.sqrt((total**2).mean((0, 1, 3), keepdims=True) + 1e-6)).reshape(5, 6, 12) * scale + bias
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_moments_and_their_derivatives():
    """First and second ones against those of jnp.var, which is differentiated as written."""
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (3, 2, 2)), jnp.float32)

    def plain(x):
        return jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))

    def mixed(moments):
        return lambda x: sum(jnp.sum(jnp.sin(value)) for value in moments(x))

    for derivative in (lambda f: f, jax.grad, jax.hessian):
        one, other = derivative(mixed(unet.moments))(x), derivative(mixed(plain))(x)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_convolution_before_a_norm_is_that_of_flax():
    """The same random kernel and names; the bias is handed on."""
    image, key = IMAGE.repeat(4, -1), jax.random.key(3)
    module, flax = unet.ConvolutionAndBias(6, jnp.float32), unet.convolution(6, jnp.float32)
    params = module.init(key, image)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(key, image))
    bias = jnp.arange(6.0)
    params["params"]["bias"] = bias
    output, offset = module.apply(params, image)
    np.testing.assert_array_equal(offset, bias)
    np.testing.assert_allclose(output + offset, flax.apply(params, image), atol=1e-5)


def test_the_backward_pass_keeps_sums_and_products_alone():
    """No norm and no activation of the size of the image, among what a block hands to its gradient."""
    block = unet.nn.remat(unet.ResBlock, policy=unet.sums_and_products_saveable)(8, 4, 0.0, False, jnp.float32)
    plain = unet.ResBlock(8, 4, 0.0, False, jnp.float32)
    image, embedding = jnp.ones((8, 8, 8)), jnp.ones(4)
    params = plain.init(jax.random.key(0), image, embedding)

    def kept(module):
        _, backward = jax.vjp(lambda params, image: module.apply(params, image, embedding), params, image)
        return sum(leaf.size >= image.size for leaf in jax.tree.leaves(backward))

    assert kept(block) < kept(plain) / 2


def test_attention_is_softmax_of_scaled_products():
    """Two heads over twelve pixels, in NumPy float64 from the layer's own parameters."""
    x = np.random.default_rng(0).normal(size=(3, 4, 8))
    layer = unet.Attention(num_heads=2, groups=4, dtype=jnp.float32)
    params = random_params(lambda key: layer.init(key, jnp.asarray(x, jnp.float32))["params"])
    found = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    parts = x.reshape(3, 4, 4, 2)
    h = (parts - parts.mean((0, 1, 3), keepdims=True)) / np.sqrt(parts.var((0, 1, 3), keepdims=True) + 1e-6)
    h = h.reshape(12, 8) * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = (h @ p[name]["kernel"] + p[name]["bias"] for name in "qkv")
    heads = []
    for at in (slice(0, 4), slice(4, 8)):
        scores = q[:, at] @ k[:, at].T / np.sqrt(4)
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        heads.append(weights @ v[:, at])
    wanted = x + (np.concatenate(heads, 1) @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_strided_convolution_pads_below_and_right():
    """TF's SAME for an even side: output (i, j) is centred on input (2i + 1, 2j + 1)."""
    layer = unet.convolution(1, jnp.float32, stride=2)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    x = np.arange(36.0, dtype=np.float32).reshape(6, 6, 1)
    found = layer.apply({"params": {"kernel": kernel, "bias": np.zeros(1)}}, x)
    np.testing.assert_array_equal(found[..., 0], x[1::2, 1::2, 0])


def test_doubling_is_the_convolution_of_repeated_pixels():
    """The products written out in float64; every place of the result, so edges and corners too."""
    x = np.random.default_rng(0).normal(size=(3, 5, 2))
    layer = unet.convolution(4, jnp.float32, upsample=True)
    params = random_params(lambda key: layer.init(key, jnp.asarray(x, jnp.float32))["params"])
    found = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))

    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    large = np.pad(np.kron(x, np.ones((2, 2, 1))), ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(large, (3, 3), (0, 1))
    np.testing.assert_allclose(found, np.einsum("hwcij,ijcf->hwf", windows, kernel) + bias, atol=1e-5)


def test_output_is_zero_at_initialisation():
    init, net = unet.make_unet((8, 8, 1), **TINY)
    np.testing.assert_array_equal(jax.jit(net)(jax.jit(init)(jax.random.key(0)), IMAGE, 5), 0)


def test_attention_stands_where_the_paper_has_it():
    """After every block of the level, num_res_blocks + 1 of them on the way up, and between the middle blocks."""
    init, _ = make_network(Model(), (32, 32, 3))
    names = jax.eval_shape(init, jax.random.key(0))
    wanted = [f"down_1_attention_{i}" for i in range(2)] + [f"up_1_attention_{i}" for i in range(3)]
    assert sorted(name for name in names if "attention" in name) == sorted([*wanted, "middle_attention"])


def test_vmap_over_images_is_the_net_of_each(tiny):
    net, params = tiny
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
    t = np.array([1, 40, 1000])
    together, alone = jax.jit(jax.vmap(net, (None, 0, 0)))(params, x, t), jax.jit(net)
    for i in range(3):
        np.testing.assert_allclose(together[i], alone(params, x[i], t[i]), atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 12, 3), (16, 4, 1), (4, 4, 2)])
def test_any_height_width_and_channels(shape):
    net, params = build(shape)
    assert jax.eval_shape(net, params, jnp.zeros(shape), 1).shape == shape


def rearranged(image, patch):
    """Each patch as one pixel, written out; the channels by row, column and channel within the patch."""
    height, width, channels = image.shape
    result = np.zeros((height // patch, width // patch, patch * patch * channels), image.dtype)
    for i, j, c in np.ndindex(image.shape):
        result[i // patch, j // patch, (i % patch * patch + j % patch) * channels + c] = image[i, j, c]
    return result


def test_patches_are_pixels_of_a_smaller_image():
    """With the same parameters as a plain network whose images have the patches as pixels; the variance apart."""
    image = np.random.default_rng(0).normal(size=(8, 12, 2)).astype(np.float32)
    net, params = build(image.shape, patch=2, attention_resolutions=(2,), learned_variance=True)
    plain, same = build((4, 6, 8), attention_resolutions=(2,), learned_variance=True)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, same)
    found = jax.jit(net)(params, image, 5)
    assert found.shape == (8, 12, 4)
    np.testing.assert_allclose(rearranged(found, 2), jax.jit(plain)(params, rearranged(image, 2), 5), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((8, 9, 1), {"patch": 2}, "model.patch=2 does not divide the sides of images of 8x9"),
        ((10, 16, 1), {"patch": 2}, "10x16 in patches of 2x2 cannot be halved 1 times.*fit: 8x16 or 12x16"),
        ((30, 32, 3), {"multipliers": (1, 2, 2)}, "30x32 cannot be halved 2 times.*28x32 or 32x32"),
        ((1, 8, 1), {}, "sizes that fit: 2x8"),
        ((8, 8, 1), {"groups": 3}, "=3 does not divide the 8 channels of down_0_block_0;.*model.groups=auto"),
        ((8, 8, 1), {"channels": 12, "groups": 8}, "=8 does not divide the 12 channels of down_0_block_0"),
        ((8, 8, 1), {"multipliers": (1, 3), "groups": "auto", "num_heads": 16}, "=16 .* 24 .* of down_1_attention_0"),
    ],
    ids=["patch", "rows of patches", "fault_33 rows", "fault_33 one row", *["fault_34 groups"] * 2, "fault_34 heads"],
)
def test_sizes_that_do_not_fit_are_refused(shape, changes, message):
    with pytest.raises(ConfigError, match=message):
        unet.make_unet(shape, **{**TINY, **changes})


def test_auto_groups_take_the_largest_divisor():
    net, params = build(channels=14, groups="auto")
    assert jax.eval_shape(net, params, IMAGE, 1).shape == (8, 8, 1)
    assert unet.group_norm("auto", 14).groups == 14
    assert unet.group_norm("auto", 96).groups == 32
    assert unet.group_norm("auto", 70).groups == 14


def test_fault_35_an_attention_resolution_never_met_is_told():
    with pytest.warns(UserWarning, match=r"no level has the resolution 16; the levels have \[8, 4\]"):
        unet.make_unet((8, 8, 1), **{**TINY, "attention_resolutions": (16, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet.make_unet((8, 8, 1), **TINY)


def test_dropout_needs_a_key_and_follows_it():
    net, params = build(dropout=0.5)
    net = jax.jit(net)
    first, again = (net(params, IMAGE, 3, key=jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - net(params, IMAGE, 3, key=jax.random.key(2))).max() > 1e-3
    np.testing.assert_array_equal(net(params, IMAGE, 3), net(params, IMAGE, 3))
    assert np.abs(first - net(params, IMAGE, 3)).max() > 1e-3


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_and_label_reach_the_output(scale_shift):
    net, params = build(num_classes=3, scale_shift=scale_shift)
    net = jax.jit(net)
    outputs = [net(params, IMAGE, t, label=label) for t in (1, 2) for label in (0, 1, 2, None)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert np.abs(a - b).max() > 1e-4


def test_learned_variance_doubles_the_channels():
    init, net = unet.make_unet((8, 8, 3), learned_variance=True, **TINY)
    assert jax.eval_shape(net, jax.eval_shape(init, jax.random.key(0)), jnp.zeros((8, 8, 3)), 1).shape == (8, 8, 6)


def test_bfloat16_keeps_parameters_and_output_in_float32(tiny):
    net, params = build(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half, full = jax.jit(net)(params, IMAGE, 7), jax.jit(tiny[0])(params, IMAGE, 7)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.slow
def test_remat_changes_no_gradient(tiny):
    def gradient(net):
        return jax.jit(jax.grad(lambda params: jnp.sum(net(params, IMAGE, 7) ** 2)))(tiny[1])

    for a, b in zip(*map(jax.tree.leaves, (gradient(tiny[0]), gradient(build(remat=True)[0]))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_swish_and_its_derivatives():
    """Against x / (1 + exp(-x)) and its derivatives in float64."""
    x = np.linspace(-30, 30, 601)
    sigmoid = 1 / (1 + np.exp(-x))
    slope = sigmoid * (1 + x * (1 - sigmoid))
    curvature = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
    first = jax.grad(lambda x: unet.swish(x))
    forms = [(unet.swish, x * sigmoid), (first, slope), (jax.grad(first), curvature)]
    for function, expected in forms:
        found = jax.vmap(function)(jnp.float32(x))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)

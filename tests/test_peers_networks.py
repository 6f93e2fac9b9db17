"""Blocks and networks against those of diffusers, with the same random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from side_by_side import ours, theirs, torch

from ddpm_jax.config import Model
from ddpm_jax.networks import make_network, unet

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.peers


def fill(layer, ours):
    """Give a layer of theirs our kernel and bias."""
    kernel = np.asarray(ours["kernel"] if "kernel" in ours else ours["scale"])
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[kernel.ndim]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel.transpose(order).copy()).reshape(layer.weight.shape))
        layer.bias.copy_(torch.from_numpy(np.array(ours["bias"])))


@pytest.mark.parametrize("resample", ["halve", "double"])
def test_residual_blocks_that_halve_and_double(resample):
    from diffusers.models.resnet import ResnetBlock2D

    random = np.random.default_rng(0)
    image, embedding = random.normal(size=(6, 4, 8)).astype(np.float32), random.normal(size=16).astype(np.float32)
    block = unet.ResBlock(8, 4, 0.0, False, jnp.float32, resample=resample)
    params = random_params(lambda key: block.init(key, image, embedding)["params"])
    way = {"halve": "down", "double": "up"}[resample]
    other = ResnetBlock2D(in_channels=8, temb_channels=16, groups=4, eps=1e-6, **{way: True}).eval()
    for name, layer in (
        ("norm_1", other.norm1),
        ("conv_1", other.conv1),
        ("time", other.time_emb_proj),
        ("norm_2", other.norm2),
        ("conv_2", other.conv2),
    ):
        fill(layer, params[name])
    with torch.no_grad():
        wanted = ours(other(theirs(image), torch.from_numpy(embedding)[None]))
    np.testing.assert_allclose(block.apply({"params": params}, image, embedding), wanted, atol=2e-5)


def test_dit():
    """DiTTransformer2DModel, to float32's rounding.

    The frequencies of its times end at 1/10000 (downscale_freq_shift=1), those of the paper's code one before. Each of
    its blocks has its own embedding of time and label, all the same in the released weights.
    """
    model = Model(network="dit", channels=16, depth=2, num_heads=2, patch=2, num_classes=3)
    init, net = make_network(model, (8, 8, 4), learned_variance=True)
    params = random_params(init)
    other = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_eps=1e-6,
    ).eval()
    fill(other.pos_embed.proj, {**params["embed"], "kernel": params["embed"]["kernel"].reshape(2, 2, 4, 16)})
    fill(other.proj_out_1, params["modulation"])
    fill(other.proj_out_2, params["out"])
    for i, block in enumerate(other.transformer_blocks):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        embedding = block.norm1.emb
        embedding.time_proj.downscale_freq_shift = 0
        fill(embedding.timestep_embedder.linear_1, params["time_1"])
        fill(embedding.timestep_embedder.linear_2, params["time_2"])
        with torch.no_grad():
            embedding.class_embedder.embedding_table.weight.copy_(torch.from_numpy(params["label"]["embedding"]))
        fill(block.norm1.linear, own["modulation"])
        for name, layer in (("q", block.attn1.to_q), ("k", block.attn1.to_k), ("v", block.attn1.to_v)):
            part = slice(16 * "qkv".index(name), 16 * "qkv".index(name) + 16)
            fill(layer, {"kernel": own["qkv"]["kernel"][:, part], "bias": own["qkv"]["bias"][part]})
        fill(block.attn1.to_out[0], own["out"])
        fill(block.ff.net[0].proj, own["mlp_1"])
        fill(block.ff.net[2], own["mlp_2"])
    image = np.random.default_rng(1).normal(size=(8, 8, 4)).astype(np.float32)
    for t, label in ((1, 0), (400, 2), (1000, 3)):
        with torch.no_grad():
            wanted = ours(other(theirs(image), torch.tensor([t - 1]), torch.tensor([label])).sample)
        found = jax.jit(net)(params, image, t, label=label)
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())

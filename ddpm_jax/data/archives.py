"""Archives as untrusted input: read in memory, never unpacked to disk; truncated or unexpected ones are DataErrors."""

import contextlib
import gzip
import math
import posixpath
import struct
import tarfile
import zlib

import numpy as np

from ddpm_jax.errors import DataError, first_line

MAX_UNPACKED = 2**31  # bytes of all members of a tar; the largest known one has 0.35 GB


def find(folder, *names):
    """The path of the first of `names` that is a file in `folder`; DataError if none is."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"there is no {' nor '.join(dict.fromkeys(names))} in {folder}")


def read_idx(path, shape):
    """uint8 of `shape` from an idx file (big-endian: 0, 8 for uint8, rank, sizes; then the values), gzipped or not."""
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = len(header) + math.prod(shape)
    with _reading(path), _open(path) as file:
        data = file.read(size + 1)  # up to the end, so that gzip verifies its checksum, but not beyond
    if data[: len(header)] != header or len(data) != size:
        raise DataError(f"{path} is not an idx file of {' x '.join(map(str, shape))} bytes, or is truncated")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def read_members(folder, archive, prefix, names):
    """{name: bytes} of the files prefix + name in a tar in `folder`, gzipped or not, or unpacked."""
    for path in (folder / archive, folder / f"{archive.split('.')[0]}.tar"):
        if path.is_file():
            return _read_tar(path, {prefix + name: name for name in names})
    found = {}
    for name in names:
        path = find(folder, archive, prefix + name, name)
        with _reading(path):
            found[name] = path.read_bytes()
    return found


def _read_tar(path, names):
    """{names[member]: bytes} of the members of a tar that are in `names`."""
    found, size = {}, 0
    with _reading(path), _open(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            member_path, name = posixpath.normpath(member.name), names.get(posixpath.normpath(member.name))
            if not (member.isfile() or member.isdir()) or member_path.startswith(("/", "..")) or name in found:
                raise DataError(f"{path} has an unexpected member, {member.name!r}: it is another archive")
            size += member.size
            if size > MAX_UNPACKED:
                raise DataError(f"{path} unpacks to more than {MAX_UNPACKED / 1e9:.1f} GB: it is another archive")
            if name and member.isfile():
                found[name] = tar.extractfile(member).read()
        file.read(2**20)  # up to the end, so that gzip verifies its checksum
    missing = [member for member, name in names.items() if name not in found]
    if missing:
        raise DataError(f"{path} has no {missing[0]}: it is another archive, or truncated")
    return found


def _open(path):
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}; it is damaged or truncated") from error

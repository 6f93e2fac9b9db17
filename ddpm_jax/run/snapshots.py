"""Snapshots of the power-function averages (averages.py), of which one of any length is a sum."""

import io
import warnings
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.errors import CheckpointError
from ddpm_jax.run import trees
from ddpm_jax.run.files import write_atomic


def _path(folder, step):
    return Path(folder) / f"step_{step:09d}.npz"


def save(folder, step, averages):
    """Write {sigma_rel: tree} after `step` updates as one file of float32 arrays "sigma_rel/name" and a CRC-32 of all.

    Raises CheckpointError when it cannot be written; the other snapshots are untouched then.
    """
    step = int(step)
    assert step >= 1
    arrays = {
        f"{float(length)}/{trees.name(path)}": np.asarray(leaf, np.float32)
        for length, tree in averages.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    }
    buffer = io.BytesIO()
    np.savez(buffer, crc32=np.uint32(trees.digest([step, arrays])), **arrays)
    try:
        write_atomic(_path(folder, step), buffer.getbuffer())
    except OSError as error:
        raise CheckpointError(f"the averages of step {step} were not written to {folder} ({error})") from error


def load(folder, step):
    """{sigma_rel: {name: float32 array}} of one snapshot; CheckpointError if it is missing or damaged."""
    path = _path(folder, step)
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            arrays = dict(archive)
        if arrays.pop("crc32") != trees.digest([step, arrays]):
            raise ValueError("the checksum differs")
    except Exception as error:  # a damaged file can make zipfile raise anything
        raise CheckpointError(f"{path} cannot be used ({' '.join(str(error).split())[:200]})") from error
    averages = {}
    for key, array in arrays.items():
        length, name = key.split("/", 1)
        averages.setdefault(float(length), {})[name] = array
    return averages


def drop_after(folder, step):
    """Remove the snapshots after `step` updates, which a run that goes on from there writes again."""
    for number in _steps(folder):
        if number > step:
            _path(folder, number).unlink()


def _steps(folder):
    numbers = [path.stem.removeprefix("step_") for path in Path(folder).glob("step_*.npz")]
    return sorted(int(number) for number in numbers if number.isdigit())


def stored(folder):
    """The snapshots of a folder that are whole, as a list of (step, sigma_rel), oldest first; each file is read.

    A damaged one is left out with a warning. Raises CheckpointError when none is left.
    """
    snapshots, steps = [], _steps(folder)
    for step in steps:
        try:
            snapshots += [(step, length) for length in load(folder, step)]
        except CheckpointError as error:
            warnings.warn(f"averages left out: {error}", stacklevel=2)
    if not snapshots:
        raise CheckpointError(f"there are no averages in {folder}" + (" that can be used" if steps else ""))
    return snapshots


def combine(folder, coefficients, template):
    """The sum of stored averages times `coefficients` {(step, sigma_rel): number}, shaped and typed as `template`.

    One snapshot is in memory at a time; the sum is float64, as coefficients alternate in sign. Raises CheckpointError
    when a snapshot does not fit the template.
    """
    shapes = {trees.name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
    total = {name: np.zeros(shape) for name, shape in shapes.items()}
    for step in sorted({step for step, _ in coefficients}):
        for length, arrays in load(folder, step).items():
            found = {name: array.shape for name, array in arrays.items()}
            if found != shapes:
                name = min(name for name in found.keys() | shapes if found.get(name) != shapes.get(name))
                raise CheckpointError(
                    f"{_path(folder, step)} does not fit the model: {name} is {found.get(name, 'missing')}, "
                    f"the model has {shapes.get(name, 'none')}"
                )
            for name, array in arrays.items():
                total[name] += coefficients[step, length] * array
    return jax.tree_util.tree_map_with_path(lambda path, leaf: total[trees.name(path)].astype(leaf.dtype), template)

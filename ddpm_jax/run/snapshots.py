"""Snapshots of the power-function averages. A post-hoc average is a linear combination of them (see averages.py)."""

import io
import warnings
from pathlib import Path

import jax
import numpy as np

from ddpm_jax import vectors
from ddpm_jax.errors import CheckpointError
from ddpm_jax.run import trees
from ddpm_jax.run.files import write_atomic


def _path(folder, step):
    return Path(folder) / f"step_{step:09d}.npz"


def save(folder, step, averages):
    """Write {sigma_rel: tree} after `step` updates to one npz file: float32 arrays "sigma_rel/name" and their CRC-32.

    Raises CheckpointError when it cannot be written; the other snapshots stay as they are.
    """
    step = int(step)
    assert step >= 1
    arrays = {
        f"{float(length)}/{trees.name(path)}": np.asarray(leaf, np.float32)
        for length, tree in averages.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(vectors.unpack(jax.device_get(tree)))
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
    except Exception as error:  # zipfile can raise anything on a damaged file
        raise CheckpointError(f"{path} cannot be used ({' '.join(str(error).split())[:200]})") from error
    averages = {}
    for key, array in arrays.items():
        length, name = key.split("/", 1)
        averages.setdefault(float(length), {})[name] = array
    return averages


def drop_after(folder, step):
    """Delete the snapshots after `step` updates: a run that resumes there writes them again."""
    for number in _steps(folder):
        if number > step:
            _path(folder, number).unlink()


def _steps(folder):
    numbers = [path.stem.removeprefix("step_") for path in Path(folder).glob("step_*.npz")]
    return sorted(int(number) for number in numbers if number.isdigit())


def stored(folder):
    """[(step, sigma_rel)] of the intact snapshots in a folder, oldest first; reads every file.

    Warns about damaged ones and skips them. Raises CheckpointError when no intact one is left.
    """
    snapshots, steps = [], _steps(folder)
    for step in steps:
        try:
            snapshots += [(step, length) for length in load(folder, step)]
        except CheckpointError as error:
            warnings.warn(f"averages skipped: {error}", stacklevel=2)
    if not snapshots:
        raise CheckpointError(f"there are no averages in {folder}" + (" that can be used" if steps else ""))
    return snapshots


def combine(folder, coefficients, template):
    """The sum of stored averages times `coefficients` {(step, sigma_rel): number}, shaped and typed like `template`.

    Only one snapshot is in memory at a time. The sum is in float64, because the coefficients alternate in sign.
    Raises CheckpointError when a snapshot does not fit the template.
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

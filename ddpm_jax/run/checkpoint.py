"""Checkpoints; the only file that uses Orbax.

A step is a folder with an item for each tree of the TrainState (ARRAYS), and meta, in JSON: the counters, format,
versions and checksums, and what the caller adds. Training adds config, shape, classes, the fingerprint of the data,
devices, rollbacks, branch (the step that --step named) and window (the metrics that are not logged yet).

A step is valid once its commit marker is written, so a crash during a save leaves the previous step as the newest.
Orbax does not detect damaged array data, so each item has its own checksum; a damaged step is skipped on loading.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from ddpm_jax import __version__, parallel, vectors
from ddpm_jax.environment import YNN_FLAG
from ddpm_jax.errors import CheckpointError, Diverged, UserError
from ddpm_jax.run import trees
from ddpm_jax.run.log import hide_absl_warnings

ARRAYS = ("params", "ema_params", "opt_state", "times", "averages")  # empty ones are not saved
COUNTERS = ("step", "skipped", "skipped_in_row")
FORMAT = 2
MARKER = "commit_success.txt"
ASIDE = ".aside"
TRASH = "deleted"  # a step is moved here before it is deleted, so that no reader finds it half deleted


def open_manager(folder, keep=None, keep_every=0, read_only=False):
    """Open Orbax's manager of a run's checkpoints; unless read_only, first delete what a crash left behind.

    Checkpoint retention: the newest `keep` steps (None for all), and all multiples of `keep_every` (0 for none).
    """
    if not read_only and parallel.is_first():
        delete([*unfinished(folder), *trash(folder)])
    handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ARRAYS}
    policies = ocp.checkpoint_managers
    multiples = [policies.EveryNSteps(keep_every)] if keep_every else []
    with hide_absl_warnings():  # about read-only mode
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *multiples]),
            todelete_subdir=None if read_only else TRASH,
            read_only=read_only,
            cleanup_tmp_directories=False,  # it would delete every folder without a marker, also those of others
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        return ocp.CheckpointManager(
            Path(folder).resolve(), options=options, item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler()}
        )


def steps(folder: Path) -> list[int]:
    """The committed steps, oldest first."""
    return sorted(int(path.parent.name) for path in Path(folder).glob(f"*/{MARKER}") if path.parent.name.isdigit())


def unfinished(folder):
    """The remains of interrupted saves: folders named after a step, but without a commit marker."""
    found = [path for path in Path(folder).glob("*") if path.is_dir() and path.name.split(".")[0].isdigit()]
    return sorted(path for path in found if not path.suffix.startswith(ASIDE) and not (path / MARKER).exists())


def trash(folder):
    """Steps waiting to be deleted."""
    return list((Path(folder) / TRASH).glob("*"))


def leftovers(folder):
    """Folders that no run reads: steps set aside, and unfinished ones."""
    return sorted([*Path(folder).glob(f"*{ASIDE}*"), *unfinished(folder)])


def delete(paths):
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder, step):
    """Rename all steps after `step` to N.aside, because Orbax refuses to save a step older than its newest."""
    for newer in reversed(steps(folder)):
        if newer > step:
            names = (Path(folder) / f"{newer}{ASIDE}{i or ''}" for i in itertools.count())
            (Path(folder) / str(newer)).rename(next(name for name in names if not name.exists()))


def _digest_meta(meta):
    return zlib.crc32(json.dumps({**meta, "digests": None}, sort_keys=True).encode())


class _NoCopy(np.ndarray):
    """An array that Orbax saves in the background without a copy, which is safe because nothing else writes to it."""

    def __deepcopy__(self, memo):
        return self


def save(manager, state, **meta):
    """Start to save a TrainState and further entries of `meta`; the files are written in the background.

    Raises Diverged when an array is not finite, and CheckpointError when the disk is full or Orbax refuses. The steps
    saved before stay as they are.
    """
    step = int(np.max(state.step))  # the same for all members of an ensemble
    items = vectors.unpack(jax.device_get({name: getattr(state, name) for name in _nonempty(state)}))
    items = {name: trees.nested(tree) for name, tree in items.items()}
    with ThreadPoolExecutor() as pool:  # copies and checksums release the GIL
        leaves, structure = jax.tree.flatten(items)
        items = jax.tree.unflatten(structure, pool.map(lambda leaf: np.array(leaf).view(_NoCopy), leaves))
        digests = {name: trees.digest(tree, pool.map) for name, tree in items.items()}
    bad = trees.not_finite(items)
    if bad:
        raise Diverged(f"step {step} was not saved: {bad[0]} is not finite (one of {len(bad)} such arrays)")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    meta |= {name: np.asarray(getattr(state, name)).tolist() for name in COUNTERS} | {"step": step}
    meta |= {"format": FORMAT, "versions": versions()}
    meta = json.loads(json.dumps(meta))
    meta["digests"] = digests | {"meta": _digest_meta(meta)}
    if parallel.is_first():
        delete(trash(manager.directory))
    parallel.on_all_processes(lambda: _check_disk_space(manager.directory, step, 1.1 * size))
    arrays = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)
    parallel.on_all_processes(lambda: _start_save(manager, step, args))


def _start_save(manager, step, args):
    try:
        saved = manager.save(step, args=args)
    except Exception as error:  # Orbax passes on any error of its file layer
        raise _save_error(manager, error) from error
    if not saved:
        newest = steps(manager.directory)[-1]
        raise CheckpointError(f"step {step} was not saved: {manager.directory} already holds step {newest}")


def _check_disk_space(folder, step, size):
    free = shutil.disk_usage(folder).free
    if free < size:
        sizes = f"it needs {size / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free"
        raise CheckpointError(f"step {step} was not saved: {sizes}")


def _nonempty(state):
    return [name for name in ARRAYS if jax.tree.leaves(getattr(state, name))]


def finish(manager):
    """Wait for the save in progress; raise CheckpointError if it failed."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _save_error(manager, error) from error
    if parallel.is_first():
        delete(trash(manager.directory))


def finish_or_warn(manager):
    """Wait for the save in progress; warn if it failed."""
    try:
        finish(manager)
    except CheckpointError as error:
        warnings.warn(str(error), stacklevel=2)


def close(manager):
    """Wait for the save in progress, warn if it failed, and close the manager."""
    finish_or_warn(manager)
    manager.close()


def make_saver(manager, max_failures=3):
    """save_or_warn(state=None, last=False, **meta): save a checkpoint; a failed save is a warning and the run goes on.

    Call it after every step: without a state it only reports a save that has failed in the background. The `last` save,
    and any after `max_failures` failures in a row, is waited for and raises CheckpointError if it fails.
    """
    failures = []  # for each failure, the newest good step at that time

    def record(failure):
        failures.append(steps(manager.directory)[-1:])
        warnings.warn(f"{failure}; training goes on", stacklevel=3)

    def save_or_warn(state=None, last=False, **meta):
        try:
            manager.check_for_errors()
        except Exception as error:  # only the process that writes sees it
            record(_save_error(manager, error))
        if state is None:
            return
        in_row = failures.count(steps(manager.directory)[-1:])
        last = last or any(int(number) >= max_failures for number in parallel.gather(str(in_row)))
        try:
            save(manager, state, **meta)
            if last:
                parallel.on_all_processes(lambda: finish(manager))
        except CheckpointError as error:
            if last:
                raise
            record(error)

    return save_or_warn


def _save_error(manager, error):
    """The CheckpointError for a failed save. Deletes the remains of the save, which would keep the disk full."""
    with contextlib.suppress(Exception):  # known already; but the writing thread must have ended
        manager.wait_until_finished()
    delete(unfinished(manager.directory))
    manager.reload()
    free = f"{shutil.disk_usage(manager.directory).free / 1e6:,.1f} MB free"
    reason = " ".join(str(error).split())[:160]
    return CheckpointError(f"a checkpoint could not be written to {manager.directory}, {free} ({reason})")


def load(folder, items, expect=None, step=None, config=None):
    """(meta, {item: tree of NumPy arrays}) of the newest intact step, or of `step` alone.

    expect(meta) -> {item: tree of shapes} that the model needs. config: the model's, as nested dicts; the error for a
    step that does not fit names the fields that differ. Damaged steps are skipped with a warning.
    Raises CheckpointError when there is no step, when none is intact (with the reason for each), or when the newest
    intact one does not fit the model.
    """
    reasons, known = [], steps(folder)
    if step is not None and step not in known:
        raise CheckpointError(f"there is no step {step} in {folder}; there are {', '.join(map(str, known)) or 'none'}")
    with open_manager(folder, read_only=True) as manager:
        for candidate in [step] if step is not None else reversed(known):
            try:
                meta = _restore_meta(manager, candidate)
                _check_format(f"step {candidate} in {folder}", meta)
                shapes = {name: _shapes(manager, candidate, name) for name in items}
                if expect:
                    changed = trees.differences(meta["config"], config, "{} is {!r} there, {!r} here") if config else []
                    _check_shapes(f"step {candidate} in {folder}", shapes, expect(meta), changed)
                return meta, {name: _restore(manager, candidate, name, shapes[name], meta) for name in items}
            except UserError:
                raise
            except Exception as error:  # Orbax can raise anything on a damaged file
                reasons.append(f"step {candidate}: {' '.join(str(error).split())[:200]}")
                if step is None:
                    warnings.warn(f"damaged checkpoint skipped, {reasons[-1]}", stacklevel=2)
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {'; '.join(reasons)}")
    raise CheckpointError(f"there is no checkpoint in {folder}")


def _check_format(where, meta):
    if meta["format"] != FORMAT:
        theirs = meta["versions"]["ddpm_jax"]
        raise CheckpointError(
            f"{where} has format {meta['format']}; ddpm_jax {__version__} reads format {FORMAT}; use ddpm_jax {theirs}"
        )


def verify(folder):
    """(step, meta, fault) of every committed step, oldest first, each read in full; fault is None for an intact one."""
    with open_manager(folder, read_only=True) as manager:
        for step in steps(folder):
            meta, fault = {}, None
            try:
                meta = _restore_meta(manager, step)
                for name in meta["digests"].keys() - {"meta"}:
                    _restore(manager, step, name, _shapes(manager, step, name), meta)
            except Exception as error:  # see load
                fault = " ".join(str(error).split())[:200]
            yield step, meta, fault


def _restore_meta(manager, step):
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if _digest_meta(meta) != meta["digests"]["meta"]:
        raise ValueError("the checksum of meta differs")
    return meta


def _shapes(manager, step, name):
    if not (Path(manager.directory) / str(step) / name).is_dir():
        raise FileNotFoundError(f"it has no {name}")
    handler = ocp.PyTreeCheckpointHandler()  # the manager's handler would read the shapes of all items
    return handler.metadata(Path(manager.directory) / str(step) / name).tree


def _restore(manager, step, name, shapes, meta):
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes, is_leaf=lambda x: hasattr(x, "shape")
    )
    tree = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(restore_args=as_numpy)}))[name]
    with ThreadPoolExecutor() as pool:
        digest = trees.digest(tree, pool.map)
    if digest != meta["digests"][name]:
        raise ValueError(f"the checksum of {name} differs")
    return tree


def _check_shapes(where, found, expected, changed):
    """Raise CheckpointError naming up to ten arrays that differ in name, shape or type, and `changed` config fields."""

    def describe(items):
        leaves = trees.flat(trees.nested(items))
        return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in leaves.items()}

    differ = trees.differences(describe(found), describe(expected), "{}: {} there, {} in the model")
    if differ:
        more = f"; and {len(differ) - 10} more" if len(differ) > 10 else ""
        config = f"; of the config, {'; '.join(changed)}" if changed else ""
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(differ[:10])}{more}{config}")


def restore_state(folder, template, step=None, config=None):
    """(TrainState of trees of NumPy arrays, meta) of the newest intact step, or of `step`.

    template: a TrainState of the expected shapes; config: see load.
    """
    template = vectors.unpack(template)
    expected = {name: getattr(template, name) for name in _nonempty(template)}
    meta, items = load(folder, list(expected), lambda meta: expected, step, config)
    parts = {name: trees.like(tree, items[name]) for name, tree in expected.items()}
    counters = {name: np.int32(np.broadcast_to(meta[name], getattr(template, name).shape)) for name in COUNTERS}
    return template._replace(**parts, **counters), meta


def versions() -> dict[str, str]:
    """The versions and settings on which bit-exact results depend."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    flags = {name: str(getattr(jax.config, name)) for name in ("jax_default_prng_impl", "jax_threefry_partitionable")}
    fusions = re.search(rf"{YNN_FLAG}=(\S*)", os.environ.get("XLA_FLAGS", ""))
    if fusions:  # otherwise the default of this version of XLA
        flags[YNN_FLAG.lstrip("-")] = fusions[1]
    return {"ddpm_jax": __version__} | {name: metadata.version(name) for name in names} | flags

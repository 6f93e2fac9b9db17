"""Checkpoints; the only file that knows Orbax.

A step is a folder with an item for each part of the TrainState and meta (JSON: counters, config, digests, versions).
It counts once its commit marker is written, so a crash while saving leaves the step before. Orbax does not notice
damaged array data, so each item has a checksum of our own, and a damaged step gives way to the one before it.
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

from ddpm_jax import __version__, parallel
from ddpm_jax.environment import YNN_FLAG
from ddpm_jax.errors import CheckpointError, Diverged, UserError
from ddpm_jax.run import trees
from ddpm_jax.run.log import without_warnings_of_absl

ARRAYS = ("params", "ema_params", "opt_state", "times", "averages")  # those that are empty are left out
COUNTERS = ("step", "skipped", "skipped_in_row")
FORMAT = 2
MARKER = "commit_success.txt"
ASIDE = ".aside"
TRASH = "deleted"  # where a step is moved at once, so that no reader meets a half of it


def open_manager(folder, keep=None, keep_every=0, read_only=False):
    """Orbax's manager of a run's folder of checkpoints; one that may write first deletes what a crash has left.

    The newest `keep` steps are kept (None for all), and for good those that `keep_every` divides (0 for none).
    """
    if not read_only and parallel.is_first():
        delete([*unfinished(folder), *trash(folder)])
    handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ARRAYS}
    policies = ocp.checkpoint_managers
    for_good = [policies.EveryNSteps(keep_every)] if keep_every else []
    with without_warnings_of_absl():  # of what is read only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *for_good]),
            todelete_subdir=None if read_only else TRASH,
            read_only=read_only,
            cleanup_tmp_directories=False,  # it would take every folder without a marker, whosever it is
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        return ocp.CheckpointManager(
            Path(folder).resolve(), options=options, item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler()}
        )


def steps(folder: Path) -> list[int]:
    """The steps that have been committed, oldest first."""
    return sorted(int(path.parent.name) for path in Path(folder).glob(f"*/{MARKER}") if path.parent.name.isdigit())


def unfinished(folder):
    """What a save that was cut off has left: folders with the name of a step but without its marker."""
    found = [path for path in Path(folder).glob("*") if path.is_dir() and path.name.split(".")[0].isdigit()]
    return sorted(path for path in found if not path.suffix.startswith(ASIDE) and not (path / MARKER).exists())


def trash(folder):
    """Steps that are no longer kept."""
    return list((Path(folder) / TRASH).glob("*"))


def leftovers(folder):
    """What no run reads: steps set aside, and those whose writing was cut off."""
    return sorted([*Path(folder).glob(f"*{ASIDE}*"), *unfinished(folder)])


def delete(paths):
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder, step):
    """Rename the steps after `step`, damaged or not gone on from, to N.aside: Orbax saves none before its newest."""
    for newer in reversed(steps(folder)):
        if newer > step:
            names = (Path(folder) / f"{newer}{ASIDE}{i or ''}" for i in itertools.count())
            (Path(folder) / str(newer)).rename(next(name for name in names if not name.exists()))


def _digest_meta(meta):
    return zlib.crc32(json.dumps({**meta, "digests": None}, sort_keys=True).encode())


class _Own(np.ndarray):
    """An array that nobody else writes to: Orbax, which copies what it is given, need not."""

    def __deepcopy__(self, memo):
        return self


def save(manager, state, **meta):
    """Start to save a TrainState with further entries of `meta`; the writing goes on behind.

    Raises Diverged when an array is not finite, CheckpointError when the disk has no room or Orbax refuses; the steps
    already there are untouched then.
    """
    step = int(np.max(state.step))  # one for all members of an ensemble
    items = {name: trees.nested(getattr(state, name)) for name in _used(state)}
    with ThreadPoolExecutor() as pool:  # copies and checksums free the interpreter, so that the cores share them
        leaves, structure = jax.tree.flatten(jax.device_get(items))
        items = jax.tree.unflatten(structure, pool.map(lambda leaf: np.array(leaf).view(_Own), leaves))
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
    parallel.on_all_processes(lambda: _check_room(manager.directory, step, 1.1 * size))
    arrays = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    parallel.on_all_processes(lambda: _start(manager, step, ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)))


def _start(manager, step, args):
    try:
        saved = manager.save(step, args=args)
    except Exception as error:  # Orbax raises whatever its file layer raises
        raise _failed(manager, error) from error
    if not saved:
        raise CheckpointError(
            f"step {step} was not saved: {manager.directory} already holds step {steps(manager.directory)[-1]}"
        )


def _check_room(folder, step, size):
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"step {step} was not saved: it needs {size / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free"
        )


def _used(state):
    return [name for name in ARRAYS if jax.tree.leaves(getattr(state, name))]


def finish(manager):
    """Wait until all is written; raise CheckpointError if it was not."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _failed(manager, error) from error
    if parallel.is_first():
        delete(trash(manager.directory))


def settle(manager):
    """Wait until all is written; what could not be written is told as a warning."""
    try:
        finish(manager)
    except CheckpointError as error:
        warnings.warn(str(error), stacklevel=2)


def close(manager):
    """Settle, and let go of the folder."""
    settle(manager)
    manager.close()


def make_keeper(manager, patience=3):
    """keep(state=None, last=False, **meta): save a state now and then without ending the run when that fails.

    To be called at every step, so that a save that failed behind is told at once. A failure is a warning; but when the
    save is the `last`, or the last `patience` have failed, it is waited for and its failure is raised.
    """
    failures = []  # the newest good step at the time of each failure

    def count(failure):
        failures.append(steps(manager.directory)[-1:])
        warnings.warn(f"{failure}; training goes on", stacklevel=3)

    def keep(state=None, last=False, **meta):
        try:
            manager.check_for_errors()
        except Exception as error:  # of several processes only the one that writes comes to know
            count(_failed(manager, error))
        if state is None:
            return
        in_row = failures.count(steps(manager.directory)[-1:])
        last = last or any(int(number) >= patience for number in parallel.gather(str(in_row)))
        try:
            save(manager, state, **meta)
            if last:
                parallel.on_all_processes(lambda: finish(manager))
        except CheckpointError as error:
            if last:
                raise
            count(error)

    return keep


def _failed(manager, error):
    """The CheckpointError for a failed save, after its leftovers, which would keep the disk full, are gone."""
    with contextlib.suppress(Exception):  # it has been told already; the thread that writes must have ended
        manager.wait_until_finished()
    delete(unfinished(manager.directory))
    manager.reload()
    free = shutil.disk_usage(manager.directory).free
    reason = " ".join(str(error).split())[:160]
    return CheckpointError(
        f"a checkpoint could not be written to {manager.directory}, {free / 1e6:,.1f} MB free ({reason})"
    )


def load(folder, items, expect=None, step=None, config=None):
    """(meta, {item: tree of NumPy arrays}) of the newest step that is whole, or of `step` alone.

    expect(meta) -> {item: tree of shapes}: what the model needs; config: its own, as nested dicts, to name what may be
    why the step does not fit. Steps that are damaged are passed over with a warning.
    Raises CheckpointError when there is no step, when none is whole (each with its reason), or when the newest whole
    one does not fit the model.
    """
    reasons, there = [], steps(folder)
    if step is not None and step not in there:
        raise CheckpointError(f"there is no step {step} in {folder}; there are {', '.join(map(str, there)) or 'none'}")
    with open_manager(folder, read_only=True) as manager:
        for found in [step] if step is not None else reversed(there):
            try:
                meta = _restore_meta(manager, found)
                if meta["format"] != FORMAT:
                    raise CheckpointError(
                        f"step {found} in {folder} has format {meta['format']} of ddpm_jax "
                        f"{meta['versions']['ddpm_jax']}, this is {__version__} with format {FORMAT}; use the former"
                    )
                shapes = {name: _shapes(manager, found, name) for name in items}
                if expect:
                    why = trees.differences(meta["config"], config, "{} is {!r} there, {!r} here") if config else []
                    _compare(f"step {found} in {folder}", shapes, expect(meta), why)
                return meta, {name: _restore(manager, found, name, shapes[name], meta) for name in items}
            except UserError:
                raise
            except Exception as error:  # a damaged file can make Orbax raise anything
                reasons.append(f"step {found}: {' '.join(str(error).split())[:200]}")
                if step is None:
                    warnings.warn(f"damaged checkpoint passed over, {reasons[-1]}", stacklevel=2)
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} can be used: {'; '.join(reasons)}")
    raise CheckpointError(f"there is no checkpoint in {folder}")


def verify(folder):
    """(step, meta, fault) of every committed step, oldest first, all of it read; fault is None when it is whole."""
    with open_manager(folder, read_only=True) as manager:
        for step in steps(folder):
            meta, fault = {}, None
            try:
                meta = _restore_meta(manager, step)
                for name in meta["digests"].keys() - {"meta"}:
                    _restore(manager, step, name, _shapes(manager, step, name), meta)
            except Exception as error:  # a damaged file can make Orbax raise anything
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
    handler = ocp.PyTreeCheckpointHandler()  # the manager's would read the shapes of all items
    return handler.metadata(Path(manager.directory) / str(step) / name).tree


def _restore(manager, step, name, shapes, meta):
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes, is_leaf=lambda x: hasattr(x, "shape")
    )
    tree = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(restore_args=as_numpy)}))[name]
    with ThreadPoolExecutor() as pool:
        found = trees.digest(tree, pool.map)
    if found != meta["digests"][name]:
        raise ValueError(f"the checksum of {name} differs")
    return tree


def _compare(where, found, expected, why):
    """Raise CheckpointError naming up to ten arrays that differ in name, shape or type."""

    def described(items):
        leaves = trees.flat(trees.nested(items))
        return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in leaves.items()}

    differ = trees.differences(described(found), described(expected), "{}: {} there, {} in the model")
    if differ:
        more = f"; and {len(differ) - 10} more" if len(differ) > 10 else ""
        config = f"; of the config, {'; '.join(why)}" if why else ""
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(differ[:10])}{more}{config}")


def restore_state(folder, template, step=None, config=None):
    """(TrainState of NumPy arrays, meta) of the newest whole step, or of `step`.

    template: a TrainState of shapes, which it has to fit; config: see load.
    """
    expected = {name: getattr(template, name) for name in _used(template)}
    meta, items = load(folder, list(expected), lambda meta: expected, step, config)
    parts = {name: trees.like(tree, items[name]) for name, tree in expected.items()}
    counters = {name: np.int32(np.broadcast_to(meta[name], getattr(template, name).shape)) for name in COUNTERS}
    return template._replace(**parts, **counters), meta


def versions() -> dict[str, str]:
    """The versions and settings on which the bits of a run depend."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    flags = {name: str(getattr(jax.config, name)) for name in ("jax_default_prng_impl", "jax_threefry_partitionable")}
    fusions = re.search(rf"{YNN_FLAG}=(\S*)", os.environ.get("XLA_FLAGS", ""))
    if fusions:  # without it, XLA's default of that version
        flags[YNN_FLAG.lstrip("-")] = fusions[1]
    return {"ddpm_jax": __version__} | {name: metadata.version(name) for name in names} | flags

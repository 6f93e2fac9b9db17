"""Checkpoints; no other file knows Orbax.

A step is a folder with an item for each part of the TrainState and meta (JSON: counters, config, digests, versions).
It counts once its commit marker is written, so a crash while saving leaves the step before. Orbax does not notice
damaged array data, so each item has a checksum of our own, and a damaged step gives way to the one before it.

    python -m ddpm_jax.checkpoint runs/digits

lists the steps of a run, each read in full and compared with its checksums.
"""

import contextlib
import json
import logging
import shutil
import sys
import warnings
import zlib
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from ddpm_jax import __version__, trees
from ddpm_jax.errors import CheckpointError, ConfigError, run

ARRAYS = ("params", "ema_params", "opt_state", "times", "averages")  # those that are empty are left out
COUNTERS = ("step", "skipped", "skipped_in_row")
FORMAT = 1
MARKER = "commit_success.txt"


def quiet():
    """Keep Orbax's own pages of traceback off the terminal of a script; its failures reach the user as our errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    show = sys.unraisablehook

    def hook(unraisable):  # what its file layer says when a failed save has closed the event loop
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook


def open_manager(folder, keep=None, read_only=False):
    """Orbax's manager of a run's folder of checkpoints; one that may write clears away unfinished steps."""
    handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ARRAYS}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )
    return ocp.CheckpointManager(
        Path(folder).resolve(), options=options, item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler()}
    )


def steps(folder):
    """The steps that have been committed, oldest first."""
    return sorted(int(path.parent.name) for path in Path(folder).glob(f"*/{MARKER}") if path.parent.name.isdigit())


def set_aside(folder, step):
    """Rename the steps after `step`, which were passed over as damaged: Orbax saves none before its newest."""
    for newer in steps(folder):
        if newer > step:
            target = Path(folder) / f"{newer}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (Path(folder) / str(newer)).rename(target)


def _digest_meta(meta):
    return zlib.crc32(json.dumps({**meta, "digests": None}, sort_keys=True).encode())


def save(manager, state, **meta):
    """Start to save a TrainState with further entries of `meta`; the writing goes on behind.

    Raises CheckpointError when the disk has no room or Orbax refuses; the steps already there are untouched then.
    """
    state = jax.device_get(state)
    step = int(state.step)
    items = {name: serialization.to_state_dict(getattr(state, name)) for name in _used(state)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    meta |= {name: int(getattr(state, name)) for name in COUNTERS}
    meta |= {"format": FORMAT, "versions": versions()}
    meta = json.loads(json.dumps(meta))
    meta["digests"] = {name: trees.digest(tree) for name, tree in items.items()} | {"meta": _digest_meta(meta)}
    free = shutil.disk_usage(manager.directory).free
    if free < 1.1 * size:
        raise CheckpointError(
            f"step {step} was not saved: it needs {1.1 * size / 1e6:,.1f} MB and {manager.directory} "
            f"has {free / 1e6:,.1f} MB free"
        )
    try:
        saved = manager.save(
            step,
            args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta), **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
            ),
        )
    except Exception as error:  # Orbax raises whatever its file layer raises
        raise _failed(manager, error) from error
    if not saved:
        raise CheckpointError(
            f"step {step} was not saved: {manager.directory} already holds step {steps(manager.directory)[-1]}"
        )


def _used(state):
    return [name for name in ARRAYS if jax.tree.leaves(getattr(state, name))]


def finish(manager):
    """Wait until all is written; raise CheckpointError if it was not."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _failed(manager, error) from error


def make_keeper(manager, patience=3):
    """keep(state=None, last=False, **meta): save a state now and then without ending the run when that fails.

    To be called at every step, so that a save that failed behind is told at once. A failure is a warning; it is raised
    when it is the `patience`-th with no good step between, or when the save is the `last`, which is waited for.
    """
    failures = []  # the newest good step at the time of each failure in a row

    def keep(state=None, last=False, **meta):
        failure = None
        try:
            manager.check_for_errors()
        except Exception as error:
            failure = _failed(manager, error)
        if state is not None:
            try:
                save(manager, state, **meta)
                if last:
                    finish(manager)
            except CheckpointError as error:
                if last:
                    raise
                failure = error
        if failure:
            good = steps(manager.directory)[-1:]
            failures[:] = [*(step for step in failures if step == good), good]
            if len(failures) == patience:
                raise failure
            warnings.warn(f"{failure}; training goes on", stacklevel=2)

    return keep


def _failed(manager, error):
    """The CheckpointError for a failed save, after its leftovers, which would keep the disk full, are gone."""
    with contextlib.suppress(Exception):  # it has been told already; the thread that writes must have ended
        manager.wait_until_finished()
    for path in Path(manager.directory).iterdir():
        if path.is_dir() and not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)
    manager.reload()
    free = shutil.disk_usage(manager.directory).free
    reason = " ".join(str(error).split())[:160]
    return CheckpointError(
        f"a checkpoint could not be written to {manager.directory}, {free / 1e6:,.1f} MB free ({reason})"
    )


def load(folder, items, expect=None):
    """(meta, {item: tree of NumPy arrays}) of the newest step that is whole.

    expect(meta) -> {item: tree of shapes}: what the model needs. Steps that are damaged are passed over with a warning.
    Raises CheckpointError when there is no step, when none is whole (each with its reason), or when the newest whole
    one does not fit the model.
    """
    reasons = []
    with open_manager(folder, read_only=True) as manager:
        for step in reversed(steps(folder)):
            try:
                meta = _restore_meta(manager, step)
                shapes = {name: manager.item_metadata(step)[name].tree for name in items}
            except Exception as error:  # a damaged file can make Orbax raise anything
                reasons.append(_passed_over(step, error))
                continue
            if meta["format"] > FORMAT:
                raise CheckpointError(
                    f"step {step} in {folder} has format {meta['format']}, this version reads up to {FORMAT}; "
                    "update ddpm-jax"
                )
            if expect:
                _compare(f"step {step} in {folder}", shapes, expect(meta))
            try:
                return meta, {name: _restore(manager, step, name, shapes[name], meta) for name in items}
            except Exception as error:
                reasons.append(_passed_over(step, error))
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
                    _restore(manager, step, name, manager.item_metadata(step)[name].tree, meta)
            except Exception as error:  # a damaged file can make Orbax raise anything
                fault = " ".join(str(error).split())[:200]
            yield step, meta, fault


def _restore_meta(manager, step):
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if _digest_meta(meta) != meta["digests"]["meta"]:
        raise ValueError("the checksum of meta differs")
    return meta


def _passed_over(step, error):
    reason = f"step {step}: {' '.join(str(error).split())[:200]}"
    warnings.warn(f"damaged checkpoint passed over, {reason}", stacklevel=3)
    return reason


def _restore(manager, step, name, shapes, meta):
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes, is_leaf=lambda x: hasattr(x, "shape")
    )
    tree = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(restore_args=as_numpy)}))[name]
    if trees.digest(tree) != meta["digests"][name]:
        raise ValueError(f"the checksum of {name} differs")
    return tree


def _compare(where, found, expected):
    """Raise CheckpointError naming up to ten arrays that differ in name, shape or type."""

    def flat(items):
        items = serialization.to_state_dict(items)
        leaves = jax.tree_util.tree_leaves_with_path(items, is_leaf=lambda x: hasattr(x, "shape"))
        return {trees.name(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves}

    found, expected = flat(found), flat(expected)
    differ = [
        f"{name} is {found.get(name, 'missing')}, the model has {expected.get(name, 'none')}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - 10} more" if len(differ) > 10 else ""
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(differ[:10])}{more}")


def restore_state(folder, template):
    """(TrainState of NumPy arrays, meta) of the newest whole step that fits `template` (a TrainState of shapes)."""
    expected = {name: getattr(template, name) for name in _used(template)}
    meta, items = load(folder, list(expected), lambda meta: expected)
    parts = {name: serialization.from_state_dict(tree, items[name]) for name, tree in expected.items()}
    return template._replace(**parts, **{name: np.int32(meta[name]) for name in COUNTERS}), meta


def versions():
    """The versions and settings on which the bits of a run depend."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    flags = {name: str(getattr(jax.config, name)) for name in ("jax_default_prng_impl", "jax_threefry_partitionable")}
    return {"ddpm_jax": __version__} | {name: metadata.version(name) for name in names} | flags


def main():
    """List the steps of the run that the command line names; exit code 4 unless the newest is whole."""
    if len(sys.argv) != 2:
        raise ConfigError("name one folder of a run: python -m ddpm_jax.checkpoint runs/digits")
    folder = Path(sys.argv[1]).expanduser() / "checkpoints"
    quiet()
    fault, meta = "there is none", None
    for step, found, fault in verify(folder) if folder.is_dir() else ():
        size = sum(path.stat().st_size for path in (folder / str(step)).rglob("*") if path.is_file())
        print(f"step {step:>9,}  {size / 1e6:>10,.1f} MB  {'whole' if fault is None else 'DAMAGED: ' + fault}")
        meta = meta if fault else found
    if meta:
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        print(f"newest whole: step {meta['step']:,}, skipped {meta['skipped']:,}; images {meta['shape']}; {versions}")
    if fault:
        raise CheckpointError(f"the newest checkpoint in {folder} cannot be used: {fault}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

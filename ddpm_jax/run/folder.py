"""The folder of a run: which experiment it holds, a record of each start, and what has changed since the last one."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

from ddpm_jax import config as configs
from ddpm_jax import parallel
from ddpm_jax.errors import CheckpointError, ConfigError, writing
from ddpm_jax.options import closest
from ddpm_jax.run import checkpoint, trees
from ddpm_jax.run.files import lock, write_atomic

LOCATION = ("data.source", "data.split")  # may change for pictures and arrays, whose fingerprint identifies them


def recorded_steps(workdir, config):
    """`config` with the number of steps that train.minutes was found to be when the run began; else as it is.

    Raises ConfigError if the run began with other minutes, or with none.
    """
    minutes, file = config.train.minutes, workdir / "config.json"
    if not minutes or is_new(workdir) or not file.exists():
        return config
    old = configs.from_json(file.read_text(errors="replace"), str(file)).train
    if old.minutes != minutes:
        raise ConfigError(
            f"{workdir} holds a run of {old.steps:,} steps, not one of train.minutes={minutes:g}; to continue it give "
            "a number of steps, --config.train.minutes=0 --config.train.steps=N"
        )
    return configs.replace(config, {"train.steps": old.steps})


def is_new(workdir):
    """Whether the folder has no checkpoint of a training step (step 0 has imported parameters)."""
    return not any(checkpoint.steps(workdir / "checkpoints"))


def check(workdir, config, allowed=(), step=0):
    """Raise ConfigError for a folder with another experiment; fields in config.MAY_CHANGE and `allowed` may differ.

    train.steps may not once the learning rate decays at the newest step, or at `step`, from which the run continues.
    The location of pictures or arrays may differ too: `resume` compares their fingerprint. If there is only step 0,
    which means imported parameters and no training yet, the sections data and train may differ as well.
    """
    known = {name for name, _, _, _ in configs.leaves(configs.Config, config)}
    for name in allowed:
        if name not in known:
            meant = "".join(f"; did you mean {near}?" for near in closest(name, known))
            raise ConfigError(f"--allow-change={name} is no field of the config{meant}")
    steps = checkpoint.steps(workdir / "checkpoints")
    if not steps:
        return
    file, only_imported = workdir / "config.json", not any(steps)
    if not file.exists():
        raise ConfigError(f"{workdir} has checkpoints but no config.json; take another --workdir")
    old = configs.from_json(file.read_text(errors="replace"), str(file))
    movable = all(each.data.source.startswith(("folder:", "npz:")) for each in (old, config))
    may_differ = {*configs.MAY_CHANGE, *({*LOCATION} - {*allowed} if movable else ())}
    decaying = [each.train for each in (old, config) if each.train.decay != "constant"]
    decays_from = min((configs.decay_span(train)[0] for train in decaying), default=math.inf)
    if (step or steps[-1]) > decays_from:
        may_differ.remove("train.steps")
    changed = {
        name: f"{name} is {a!r} there, {b!r} here"
        for name, a, b in configs.differences(old, config)
        if name not in may_differ and not (only_imported and name.startswith(("data.", "train.")))
    }
    if "train.steps" in changed:
        changed["train.steps"] += f", and the learning rate decays from step {decays_from} on"
    refused = {name: text for name, text in changed.items() if name not in allowed}
    if refused:
        raise ConfigError(
            f"{workdir} holds another run ({'; '.join(refused.values())}); take another --workdir, or continue it as "
            f"another experiment with --allow-change={','.join(refused)}"
        )
    for text in changed.values():
        warnings.warn(f"continuing as another experiment: {text}", stacklevel=2)


def check_processes_agree(config, **others):
    """Raise ConfigError in all processes unless all were started with the same config, versions and `others`."""
    own = {"config": dataclasses.asdict(config), "versions": checkpoint.versions()} | others
    first, *rest = map(json.loads, parallel.gather(json.dumps(own)))
    for process, other in enumerate(rest, 1):
        differ = trees.differences(first, other, "{} is {!r} in process 0, {!r} in process " + str(process))
        if differ:
            raise ConfigError(f"the processes were not started alike: {'; '.join(differ[:10])}")


def create_and_lock(workdir):
    """Create the folder, and lock it against other runs until the returned file is closed (see files.lock)."""
    if found := re.search(r"[*?\[\]\\]", str(workdir.resolve())):
        raise ConfigError(
            f"--workdir={workdir} is in a path with {found[0]}, from which checkpoints cannot be read back; take one "
            "without * ? [ ] and \\"
        )
    with writing(f"--workdir={workdir}"):
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        return lock(workdir)


def check_shared(workdir):
    """Raise ConfigError in a process that does not see the folder that the first process has created."""
    if not (workdir / "lock").exists():
        raise ConfigError(f"--workdir={workdir} is not the same folder for all processes; take a shared one")


def record(workdir, config, argv=()):
    """Write config.json, and append this start to run.json: versions, devices, the command `argv`, git revision."""
    file = workdir / "run.json"
    this = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(argv),
        "devices": parallel.describe(),
        "versions": checkpoint.versions() | {"python": sys.version.split()[0]},
        "git": revision(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
    with writing(f"--workdir={workdir}"):
        try:
            starts = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):  # a power cut can leave an empty file
            starts = []
        write_atomic(workdir / "config.json", configs.to_json(config).encode())
        write_atomic(file, (json.dumps([*starts, this], indent=2) + "\n").encode())


def finished_step(workdir, steps, step=0):
    """The step of the newest intact checkpoint if the run has reached `steps`, else None; reads the checkpoint in full.

    With `step`, the run must have been continued from there.
    """
    folder = workdir / "checkpoints"
    if max(checkpoint.steps(folder), default=0) < steps:
        return None
    meta = checkpoint.load(folder, checkpoint.ARRAYS[:3])[0]
    return meta["step"] if meta["step"] >= steps and step in (0, meta.get("branch")) else None


def revision():
    """The git revision of this code, or None."""
    clone = Path(__file__).parents[2]
    if not shutil.which("git") or not (clone / ".git").exists():  # an installed package may be inside another clone
        return None
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def resume(parts, template, data, workdir, step=None, allowed=()):
    """(TrainState, meta, lines on what has changed since) of the newest intact checkpoint, or of `step`.

    The newest is also used if the run was continued from `step` already: the same command may be repeated.
    data: the fingerprint of the data. It must be the checkpoint's, unless a field of data is `allowed` to change or the
    checkpoint was imported and has none.
    Later steps are set aside.
    """
    folder = workdir / "checkpoints"
    if step is not None and parallel.on_all_processes(lambda: checkpoint.load(folder, [])[0]).get("branch") == step:
        step = None
    config = json.loads(configs.to_json(parts.config))
    state, meta = parallel.on_all_processes(lambda: checkpoint.restore_state(folder, template, step, config))
    restored = [json.loads(text) for text in parallel.gather(json.dumps([meta["step"], meta["digests"]]))]
    if any(other != restored[0] for other in restored):
        raise CheckpointError(
            f"the processes read different checkpoints, steps {', '.join(str(number) for number, _ in restored)}; "
            "--workdir must be the same folder for all"
        )
    lines = [f"resuming at step {meta['step']:,} from {folder}", *_changes(meta, parts, data, folder, allowed)]
    if parallel.is_first():
        checkpoint.set_aside(folder, meta["step"])
    parallel.gather("")  # no process lists the folder before that is done
    return state, meta, lines


def _changes(meta, parts, data, folder, allowed):
    """Lines on what differs from the checkpoint with this meta. Raises ConfigError for other data."""
    old = configs.from_json(json.dumps(meta["config"]), f"{folder}, meta")
    moved = [f"{name} was {a}, is now {b}" for name, a, b in configs.differences(old, parts.config) if name in LOCATION]
    if meta["data"] not in (None, data):
        changed = "; ".join([f"the run had {meta['data']}, the data now are {data}", *moved])
        if not any(name.startswith("data.") for name in allowed):
            raise ConfigError(
                f"{changed}: its batches would differ; restore the data, take another --workdir, or continue with "
                "other data by --allow-change=data.source"
            )
        yield f"continuing with other data: {changed}"
    elif moved and meta["data"]:
        yield f"the same data by their fingerprint: {'; '.join(moved)}"
    if meta.get("classes") and tuple(meta["classes"]) != parts.classes:
        yield f"the classes were {', '.join(meta['classes'])}, are now {', '.join(parts.classes or ())}"
    if tuple(meta["shape"]) != parts.shape:
        yield f"continuing with images of another size: {meta['shape']} is now {list(parts.shape)}"
    then = meta["versions"] | {"devices": meta["devices"]}
    now = checkpoint.versions() | {"devices": parallel.describe()}
    if changed := trees.differences(then, now, "{} {} is now {}"):
        yield f"not bit-exact from here on, only to rounding: {'; '.join(changed)}"

"""The folder of a run: whose it is, who started it when, and what has changed since its checkpoints were written."""

import dataclasses
import json
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

PLACE = ("data.source", "data.split")  # of pictures or arrays, which may be moved: their fingerprint tells


def check(workdir, config, allowed=()):
    """Refuse a folder that holds another experiment; fields in config.MAY_CHANGE and those `allowed` may differ.

    So may the place of pictures or arrays, which `resume` knows by their fingerprint.
    Where all there is is step 0, parameters that were imported, nothing has been trained on any data yet: those of the
    sections data and train may differ too.
    """
    known = {name for name, _, _, _ in configs.leaves(configs.Config, config)}
    for name in allowed:
        if name not in known:
            meant = "".join(f"; did you mean {near}?" for near in closest(name, known))
            raise ConfigError(f"--allow-change={name} is no field of the config{meant}")
    file = workdir / "config.json"
    steps = checkpoint.steps(workdir / "checkpoints")
    if not steps:
        return  # nothing has been trained there yet
    open_sections = () if any(steps) else ("data.", "train.")
    if not file.exists():
        raise ConfigError(f"{workdir} has checkpoints but no config.json; take another --workdir")
    old = configs.from_json(file.read_text(errors="replace"), str(file))
    movable = all(each.data.source.startswith(("folder:", "npz:")) for each in (old, config))
    may_differ = {*configs.MAY_CHANGE, *({*PLACE} - {*allowed} if movable else ())}
    changed = [
        (name, f"{name} is {a!r} there, {b!r} here")
        for name, a, b in configs.differences(old, config)
        if name not in may_differ and not name.startswith(open_sections)
    ]
    refused = {name: text for name, text in changed if name not in allowed}
    if refused:
        raise ConfigError(
            f"{workdir} holds another run ({'; '.join(refused.values())}); take another --workdir, or go on with it as "
            f"another experiment by --allow-change={','.join(refused)}"
        )
    for _, text in changed:
        warnings.warn(f"going on as another experiment: {text}", stacklevel=2)


def check_same(config, **others):
    """Raise ConfigError in all processes unless all were started with the same config, versions and `others`."""
    own = {"config": dataclasses.asdict(config), "versions": checkpoint.versions()} | others
    first, *others = map(json.loads, parallel.gather(json.dumps(own)))
    for process, other in enumerate(others, 1):
        differ = trees.differences(first, other, "{} is {!r} in process 0, {!r} in process " + str(process))
        if differ:
            raise ConfigError(f"the processes do not do the same: {'; '.join(differ[:10])}")


def claim(workdir):
    """Make the folder and keep other runs out of it until what is returned is closed: see files.lock."""
    if found := re.search(r"[*?\[\]\\]", str(workdir.resolve())):
        raise ConfigError(
            f"--workdir={workdir} lies in a path with {found[0]}, from which checkpoints cannot be read back; take one "
            "without * ? [ ] and \\"
        )
    with writing(f"--workdir={workdir}"):
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        return lock(workdir)


def check_seen(workdir):
    """Raise ConfigError in a process that does not see the folder which the first one has made."""
    if not (workdir / "lock").exists():
        raise ConfigError(f"--workdir={workdir} is not the same folder for all processes; take a shared one")


def record(workdir, config, argv=()):
    """Write config.json, and add this start to run.json: versions, devices, the command `argv`, git revision."""
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
        except (FileNotFoundError, ValueError):  # there is none, or a power cut has left nothing of it
            starts = []
        write_atomic(workdir / "config.json", configs.to_json(config).encode())
        write_atomic(file, (json.dumps([*starts, this], indent=2) + "\n").encode())


def last_step(workdir, steps, step=0):
    """The newest whole checkpoint's step when the run has come to `steps`, by way of `step`, else None.

    That checkpoint is read in full.
    """
    folder = workdir / "checkpoints"
    if max(checkpoint.steps(folder), default=0) < steps:
        return None
    meta = checkpoint.load(folder, checkpoint.ARRAYS[:3])[0]
    return meta["step"] if meta["step"] >= steps and step in (0, meta.get("branch")) else None


def revision():
    """The git revision of this code, if there is one."""
    clone = Path(__file__).parents[2]
    if not shutil.which("git") or not (clone / ".git").exists():  # an installed package may lie inside another's
        return None
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def resume(parts, template, data, workdir, step=None, allowed=()):
    """(TrainState, meta, lines) of the newest whole checkpoint, or of `step`: lines say what has changed since.

    When the newest already comes from `step`, it is the newest, so that the same command can be given again.
    data: the fingerprint of the data, which must be the checkpoint's unless a field of data is `allowed` to change, or
    the checkpoint has none, being an imported one.
    Later steps are set aside.
    """
    folder = workdir / "checkpoints"
    if step is not None and parallel.on_all_processes(lambda: checkpoint.load(folder, [])[0]).get("branch") == step:
        step = None
    config = json.loads(configs.to_json(parts.config))
    state, meta = parallel.on_all_processes(lambda: checkpoint.restore_state(folder, template, step, config))
    read = [json.loads(text) for text in parallel.gather(json.dumps([meta["step"], meta["digests"]]))]
    if any(other != read[0] for other in read):
        raise CheckpointError(
            f"the processes read different checkpoints, steps {', '.join(str(number) for number, _ in read)}; "
            "--workdir must be the same folder for all"
        )
    lines = [f"resuming at step {meta['step']:,} from {folder}"]
    old = configs.from_json(json.dumps(meta["config"]), f"{folder}, meta")
    moved = [f"{name} was {a}, is now {b}" for name, a, b in configs.differences(old, parts.config) if name in PLACE]
    if meta["data"] not in (None, data):
        changed = "; ".join([f"the run had {meta['data']}, the data now are {data}", *moved])
        if not any(name.startswith("data.") for name in allowed):
            raise ConfigError(
                f"{changed}: its batches would be others; put the data back, take another --workdir, or go on with "
                "other data by --allow-change=data.source"
            )
        lines.append(f"going on with other data: {changed}")
    elif moved and meta["data"]:
        lines.append(f"the same data by their fingerprint: {'; '.join(moved)}")
    if meta.get("classes") and tuple(meta["classes"]) != parts.classes:
        lines.append(f"the classes were {', '.join(meta['classes'])}, are now {', '.join(parts.classes or ())}")
    if tuple(meta["shape"]) != parts.shape:
        lines.append(f"going on with images of another size: {meta['shape']} is now {list(parts.shape)}")
    then = meta["versions"] | {"devices": meta["devices"]}
    now = checkpoint.versions() | {"devices": parallel.describe()}
    changed = trees.differences(then, now, "{} {} is now {}")
    if changed:
        lines.append(f"not bit-exact from here on, only to rounding: {'; '.join(changed)}")
    if parallel.is_first():
        checkpoint.set_aside(folder, meta["step"])
    parallel.gather("")  # no process lists the folder before that is done
    return state, meta, lines

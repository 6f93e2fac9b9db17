"""Import and export released weights.

    python -m ddpm_jax.interop import DIR --workdir=RUN
    python -m ddpm_jax.interop export RUN DIR

The first turns a DDPM in diffusers' layout into a run for sample.py, evaluate.py and train.py; the second writes such
a folder. Instead of DIR either takes a FILE.safetensors, our own format: the parameters and the config in one file.
"""

import dataclasses
import shutil
import sys

from ddpm_jax import commands, errors, options
from ddpm_jax.run import log
from ddpm_jax.run.files import expand

RUN = ("config.json", "checkpoints", "averages", "samples", "metrics.jsonl", "run.json")  # what training writes


@dataclasses.dataclass(frozen=True)
class Import(options.Arguments):
    path: str = options.option("", "folder in diffusers' layout, or FILE.safetensors; the first word")
    workdir: str = options.option("", "folder of the run to create")
    source: str = options.option("", "data to evaluate and train on, as in config.data.source")
    overwrite: bool = options.option(False, "replace the run in the folder")
    debug: bool = options.option(*options.DEBUG)


@dataclasses.dataclass(frozen=True)
class Export(options.Arguments):
    workdir: str = options.option("", "folder of the run, or of one step of it; the first word")
    path: str = options.option("", "folder or FILE.safetensors to write; the second word")
    weights: str = options.option(*options.WEIGHTS)
    member: int = options.option(*options.MEMBER)
    step: int = options.option(*options.STEP)
    overwrite: bool = options.option(False, "overwrite existing files")
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    command, *rest = words = options.command_line(argv) or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        raise errors.ConfigError(f"{command!r} is neither import nor export; see python -m ddpm_jax.interop --help")
    arguments, positional, function = COMMANDS[command]
    prog = f"-m ddpm_jax.interop {command}"
    args = options.parse(arguments, rest, prog, function.__doc__, positional=positional)
    if not args.path or not args.workdir:
        raise errors.ConfigError(f"{'--workdir' if args.path else '--path'} is missing; see python {prog} --help")
    return function(args, expand(args.path), ["-m", "ddpm_jax.interop", *words])


def import_run(args, path, argv):
    """Create a run from a DDPM in diffusers' layout, or from a FILE.safetensors that contains the config."""
    from ddpm_jax import config, experiment
    from ddpm_jax.interop import released, tensors
    from ddpm_jax.run import checkpoint

    workdir = expand(args.workdir)
    if not args.overwrite and ((workdir / RUN[0]).exists() or checkpoint.steps(workdir / "checkpoints")):
        raise errors.ConfigError(f"{workdir} already holds a run; use another --workdir, or add --overwrite")
    found = released.read(path)
    changes = {"data.source": args.source} if args.source else {}
    parts = experiment.make(config.replace(found.config, changes), found.shape)
    template = experiment.params_shape(parts)
    write_run(parts, tensors.to_params(found.arrays, template, found.format, path), workdir, argv)
    for note in found.notes:
        log.note(note)
    log.note(f"{path} is now step 0 of {workdir}: {experiment.parameter_count(parts):,} parameters")
    log.note(f"python {commands.prog_name('sample')} --workdir={workdir}{found.sampling}")
    source = "" if parts.config.data.source != "folder:" else " --config.data.source=folder:DIR"
    log.note(f"python {commands.prog_name('train')} --config={workdir}/config.json --workdir={workdir}{source}")
    return 0


def write_run(parts, params, workdir, argv=()):
    """Write a run with one checkpoint at step 0: `params`, also as their average, and a fresh optimiser."""
    from ddpm_jax import parallel
    from ddpm_jax.run import checkpoint
    from ddpm_jax.run import folder as run_folder

    with run_folder.create_and_lock(workdir):
        for path in (workdir / name for name in RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        state = parts.init_state(params)
        meta = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "data": None}
        meta |= {"devices": parallel.describe(), "window": [], "rollbacks": 0, "branch": None}
        with checkpoint.open_manager(workdir / "checkpoints") as manager:
            checkpoint.save(manager, state, **meta)
            checkpoint.finish(manager)
        # Last: a config without a checkpoint would train from scratch.
        run_folder.record(workdir, parts.config, argv)


def export_run(args, path, argv):
    """Export a run in diffusers' layout, or as a FILE.safetensors that contains the config."""
    from ddpm_jax import experiment
    from ddpm_jax.interop import released

    workdir, step = experiment.find_run(args.workdir, args.step)
    there = [name for name in released.names(path) if name.exists()]
    if there and not args.overwrite:
        raise errors.ConfigError(f"{there[0]} already exists; use another --path, or add --overwrite")
    parts, params, step = experiment.restore(workdir, args.weights, step, args.member)
    released.write(path, parts, params, step=str(step), weights=args.weights)
    if not released.is_file(path) and parts.config.model.dtype != "float32":
        log.note(f"model.dtype={parts.config.model.dtype} is not exported: diffusers computes in float32")
    log.note(f"wrote step {step:,} of {workdir}, {args.weights} weights, to {path}")
    return 0


COMMANDS = {"import": (Import, ("path",), import_run), "export": (Export, ("workdir", "path"), export_run)}

if __name__ == "__main__":
    sys.exit(errors.run(main))

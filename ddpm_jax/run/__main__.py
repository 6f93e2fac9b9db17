"""List the checkpoints of a run: python -m ddpm_jax.run runs/digits [--clean]

Each step is read in full and compared with its checksums.
"""

import dataclasses
import sys

from ddpm_jax import errors, options
from ddpm_jax.run import checkpoint, log
from ddpm_jax.run.files import expand, lock


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("", "folder of the run")
    clean: bool = options.option(False, "delete steps that were set aside (N.aside) or never finished")
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """List the steps of the run that the command line names; exit code 4 unless the newest is whole."""
    args = options.parse(Args, argv, "-m ddpm_jax.run RUN", __doc__, positional=["workdir"])
    workdir = expand(args.workdir)
    folder = workdir / "checkpoints"
    if not args.workdir or not folder.is_dir():
        raise errors.CheckpointError(f"there is no run in {args.workdir!r}; python -m ddpm_jax.run runs/digits")
    if args.clean:
        with errors.writing(f"{workdir}"):
            held = lock(workdir)  # not while a run is writing there
        with held:
            checkpoint.delete(checkpoint.leftovers(folder))
    fault, meta = "there is none", None
    for step, found, fault in checkpoint.verify(folder):
        print(f"step {step:>9,}  {_size(folder / str(step)):>10,.1f} MB  {f'DAMAGED: {fault}' if fault else 'whole'}")
        meta = meta if fault else found
    if meta:
        plain = {name: value for name, value in meta.items() if isinstance(value, (int, str))} | meta["versions"]
        print("newest whole: " + ", ".join(f"{name} {value}" for name, value in plain.items()))
    for path in checkpoint.leftovers(folder):
        print(f"left over: {path.name}, {_size(path):,.1f} MB; --clean deletes it")
    if fault:
        raise errors.CheckpointError(f"the newest checkpoint in {folder} cannot be used: {fault}")
    return 0


def _size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(errors.run(main))

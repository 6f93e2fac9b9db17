"""List the checkpoints of a run: python -m ddpm_jax.run runs/digits [--clean]

Reads every step in full and verifies its checksums.
"""

import dataclasses
import sys

from ddpm_jax import errors, options
from ddpm_jax.run import checkpoint, log
from ddpm_jax.run.files import expand, lock


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("", "folder of the run")
    clean: bool = options.option(False, "delete steps set aside (N.aside) and unfinished ones")
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """List the checkpoints of a run; exit code 4 unless the newest one is intact."""
    args = options.parse(Args, argv, "-m ddpm_jax.run RUN", __doc__, positional=["workdir"])
    workdir = expand(args.workdir)
    folder = workdir / "checkpoints"
    if not args.workdir or not folder.is_dir():
        raise errors.CheckpointError(f"there is no run in {args.workdir!r}; python -m ddpm_jax.run runs/digits")
    if args.clean:
        with errors.writing(f"{workdir}"):
            run_lock = lock(workdir)  # refuses while a run is writing there
        with run_lock:
            checkpoint.delete(checkpoint.leftovers(folder))
    fault, newest = "there is none", None
    for step, meta, fault in checkpoint.verify(folder):
        size = _megabytes(folder / str(step))
        print(f"step {step:>9,}  {size:>10,.1f} MB  {f'DAMAGED: {fault}' if fault else 'intact'}")
        newest = newest if fault else meta
    if newest:
        fields = {name: value for name, value in newest.items() if isinstance(value, (int, str))} | newest["versions"]
        print("newest intact: " + ", ".join(f"{name} {value}" for name, value in fields.items()))
    for path in checkpoint.leftovers(folder):
        print(f"left over: {path.name}, {_megabytes(path):,.1f} MB; --clean deletes it")
    if fault:
        raise errors.CheckpointError(f"the newest checkpoint in {folder} cannot be used: {fault}")
    return 0


def _megabytes(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(errors.run(main))

"""Train a diffusion model: python -m ddpm_jax train --config=configs/digits.py --workdir=runs/digits

The same command resumes the run. Everything about the run is in its folder; sampling needs nothing else.
"""

import contextlib
import dataclasses
import re
import time
from pathlib import Path

from ddpm_jax import commands, errors, options
from ddpm_jax import config as configs
from ddpm_jax.run import log
from ddpm_jax.run.files import expand


def is_span(text):
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    return not text or (found is not None and int(found[1]) < int(found[2]))


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    workdir: str = options.option("", "folder of the run; runs/NAME of the config file when empty")
    step: int = options.option(
        0,
        "step of the checkpoint to resume from, setting later ones aside and deleting later metrics; 0 for the newest",
        options.at_least(0),
    )
    allow_change: tuple[str, ...] = options.option(
        (), "fields, such as train.batch_size,data.source, that may differ from those of the run in the folder"
    )
    strict_data: bool = options.option(False, "refuse a folder with a picture that cannot be read")
    dry_run: bool = options.option(False, "build the network, compile, take one step on random images, and exit")
    topology: str = options.option("", "with --dry-run: compile for TPU chips that are not here, like v5e:2x4")
    platform: str = options.option(*options.PLATFORM)
    distributed: str = options.option("auto", "several processes: auto, off or HOST:PORT,ID,COUNT")
    heartbeat: int = options.option(
        100,
        "seconds without a sign of life after which a process counts as lost and the others exit",
        options.at_least(1),
        options.below(10**6),
    )
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    wandb: str = options.option("", "Weights & Biases project to log the run to (needs the extra wandb)")
    profile: str = options.option(
        "",
        "START:STOP, the steps to trace; the trace is written to WORKDIR/profile",
        ("START:STOP, two whole numbers, the second larger", is_span),
    )
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """Train with the options `argv` (default: those of the command line); the exit code."""
    began, argv = time.monotonic(), options.command_line(argv)
    args = commands.parse(Args, argv, "train", __doc__, configs.load)
    if args.strict_data:
        args = options.replace(args, {"config.data.max_unreadable": 0.0})
    workdir = expand(args.workdir or f"runs/{Path(args.config_file).stem}")

    from ddpm_jax import data, parallel
    from ddpm_jax.commands import loop
    from ddpm_jax.run import checkpoint, signals
    from ddpm_jax.run import folder as run_folder

    config = args.config.train
    if args.topology and not args.dry_run:
        raise errors.ConfigError(f"--topology={args.topology} only compiles; add --dry-run")
    parallel.start(
        config.batch_size,
        config.accumulate,
        "cpu" if args.topology else args.platform,
        args.distributed,
        args.cpu_devices,
        args.heartbeat,
        config.ensemble,
    )
    say = log.note if parallel.is_first() else lambda text: None
    say(f"ddpm_jax {checkpoint.versions()['ddpm_jax']} on {parallel.describe()}")
    advice = f"try a train.batch_size smaller than {config.batch_size}, train.accumulate=2 or more, or model.remat=true"
    with parallel.fail_fast(), signals.catch() as stop_requested, parallel.memory_advice(advice):
        if args.dry_run:
            return compile_only(args, say)
        recorded = parallel.on_all_processes(lambda: run_folder.recorded_steps(workdir, args.config))
        args = dataclasses.replace(args, config=recorded)
        parts, dataset = parallel.on_all_processes(lambda: prepare(args, workdir, say))
        fingerprint = data.fingerprint(dataset)
        steps = checkpoint.steps(workdir / "checkpoints")
        run_folder.check_processes_agree(
            args.config, data=fingerprint, step=args.step, allow_change=args.allow_change, checkpoints=steps
        )
        done = parallel.on_all_processes(lambda: run_folder.finished_step(workdir, args.config.train.steps, args.step))
        if done:
            again = "--config.train.minutes=0 " * bool(config.minutes) + f"--config.train.steps={2 * done}"
            say(f"already finished at step {done:,}" + f"; for more, {again}" * (config.decay == "constant"))
            return 0
        # From here on the run's folder is written.
        with parallel.on_all_processes(
            lambda: run_folder.create_and_lock(workdir) if parallel.is_first() else contextlib.nullcontext()
        ):
            parallel.on_all_processes(lambda: run_folder.check_shared(workdir))
            command = [*commands.prog_name("train").split(), *argv]
            return loop.train(
                args, span(args), parts, dataset, fingerprint, workdir, stop_requested, say, command, began
            )


def compile_only(args, say):
    """The exit code of a dry run."""
    from ddpm_jax import parallel
    from ddpm_jax.commands import dry_run

    config = args.config.train
    if config.ensemble > 1:
        raise errors.ConfigError("--dry-run needs a single run; add --config.train.ensemble=1")
    devices = parallel.topology(args.topology) if args.topology else None
    parallel.check_batch_size(config.batch_size, config.accumulate, devices)
    if devices:
        dry_run.compile_for_topology(args.config, devices, say)
    else:
        dry_run.dry_run(args.config, say)
    return 0


def prepare(args, workdir, say):
    """(Experiment, Dataset), after every check that does not need the checkpoint; calls marked "raises" only check."""
    from ddpm_jax import data, experiment, parallel
    from ddpm_jax.run import checkpoint
    from ddpm_jax.run import folder as run_folder

    config = args.config
    parallel.check_batch_size(config.train.batch_size, config.train.accumulate, members=config.train.ensemble)
    if args.step >= config.train.steps:
        raise errors.ConfigError(f"--step={args.step} must be less than train.steps={config.train.steps}")
    span(args)  # raises
    run_folder.check(workdir, config, args.allow_change, args.step)
    dataset = data.load(**vars(config.data))
    images = "x".join(map(str, dataset.images.shape[1:]))
    say(f"{config.data.source}: {len(dataset.images):,} images of {images}")
    dataset = data.with_labels(dataset, config.model.num_classes)
    if dataset.classes and checkpoint.steps(workdir / "checkpoints"):
        meta = checkpoint.load(workdir / "checkpoints", [])[0]
        dataset = data.match_labels_to_run(dataset, config.data.source, meta["data"], meta.get("classes"))
    data.batch(dataset, 0, 0, config.train.batch_size)  # raises for too few images
    if config.train.evaluate_every:
        from ddpm_jax.evaluation.features import enl0

        enl0.find()  # raises
    parts = experiment.make(config, dataset.images.shape[1:])._replace(classes=dataset.classes)
    new = config.train.minutes and run_folder.is_new(workdir)
    length = f"{config.train.minutes:g} minutes of steps" if new else f"{config.train.steps:,} steps"
    say(f"{experiment.describe_network(parts)}; {length} of {config.train.batch_size} images")
    return parts, dataset


def span(args):
    """(START, STOP) of --profile; (0, 0) without."""
    start, stop = map(int, (args.profile or "0:0").split(":"))
    train = args.config.train
    if start >= train.steps and not train.minutes:
        raise errors.ConfigError(f"--profile={args.profile} must begin before train.steps={train.steps}")
    if start % train.steps_per_call or stop % train.steps_per_call:
        raise errors.ConfigError(
            f"--profile={args.profile} must be multiples of train.steps_per_call={train.steps_per_call}"
        )
    return start, stop

"""Train a diffusion model: python -m ddpm_jax train --config=configs/digits.py --workdir=runs/digits

The same command resumes the run. Everything about the run is in its folder; sampling needs nothing else.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
        "checkpoint to resume from: later ones are set aside, later metrics and averages dropped; 0 for the newest",
        options.at_least(0),
    )
    allow_change: tuple[str, ...] = options.option(
        (), "fields, such as train.batch_size,data.source, that may differ from those of the run in the folder"
    )
    strict_data: bool = options.option(False, "refuse a folder with a picture that cannot be read")
    dry_run: bool = options.option(False, "build, count, compile, take one step on random data, and exit")
    topology: str = options.option("", "with --dry-run: compile for TPU chips that are not here, such as v5e:2x4")
    platform: str = options.option(*options.PLATFORM)
    distributed: str = options.option("auto", "several processes: auto, off or HOST:PORT,ID,COUNT")
    heartbeat: int = options.option(
        100,
        "seconds of silence after which a process counts as lost and the others end",
        options.at_least(1),
        options.below(10**6),
    )
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    wandb: str = options.option("", "Weights & Biases project to log the run to (needs the extra wandb)")
    profile: str = options.option(
        "",
        "START:STOP, the steps to trace, into WORKDIR/profile",
        ("START:STOP, two whole numbers of which the second is larger", is_span),
    )
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """The exit code of training with the options `argv`, those of the program when None."""
    argv = options.command_line(argv)
    args = commands.parse(Args, argv, "train", __doc__, configs.load)
    if args.strict_data:
        args = options.replace(args, {"config.data.max_unreadable": 0.0})
    workdir = expand(args.workdir or f"runs/{Path(args.config_file).stem}")

    from ddpm_jax import data, parallel
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
    with parallel.exit_with_others(), signals.catch() as stop_requested, parallel.memory_advice(advice):
        if args.dry_run:
            return compile_only(args, say)
        parts, dataset = parallel.on_all_processes(lambda: prepare(args, workdir, say))
        fingerprint = data.fingerprint(dataset)
        steps = checkpoint.steps(workdir / "checkpoints")
        run_folder.check_processes_agree(
            args.config, data=fingerprint, step=args.step, allow_change=args.allow_change, checkpoints=steps
        )
        done = parallel.on_all_processes(lambda: run_folder.finished_step(workdir, config.steps, args.step))
        if done:
            say(f"already finished at step {done:,}; for more, --config.train.steps={2 * done}")
            return 0
        # From here on the run's folder is written.
        with parallel.on_all_processes(
            lambda: run_folder.create_and_lock(workdir) if parallel.is_first() else contextlib.nullcontext()
        ):
            parallel.on_all_processes(lambda: run_folder.check_shared(workdir))
            command = [*commands.prog_name("train").split(), *argv]
            return train(args, parts, dataset, fingerprint, workdir, stop_requested, say, command)


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
    run_folder.check(workdir, config, args.allow_change)
    dataset = data.load(**vars(config.data))
    images = "x".join(map(str, dataset.images.shape[1:]))
    say(f"{config.data.source}: {len(dataset.images):,} images of {images}")
    dataset = data.with_labels(dataset, config.model.num_classes)
    if dataset.classes and checkpoint.steps(workdir / "checkpoints"):
        meta = checkpoint.load(workdir / "checkpoints", [])[0]
        dataset = data.with_labels_of_run(dataset, config.data.source, meta["data"], meta.get("classes"))
    data.batch(dataset, 0, 0, config.train.batch_size)  # raises for too few images
    if config.train.evaluate_every:
        from ddpm_jax.evaluation.features import enl0

        enl0.find()  # raises
    parts = experiment.make(config, dataset.images.shape[1:])._replace(classes=dataset.classes)
    say(
        f"U-Net of {experiment.parameter_count(parts):,} parameters; {config.train.steps:,} steps "
        f"of {config.train.batch_size} images"
    )
    return parts, dataset


def span(args):
    """(START, STOP) of --profile; (0, 0) without."""
    start, stop = map(int, (args.profile or "0:0").split(":"))
    train = args.config.train
    if start >= train.steps:
        raise errors.ConfigError(f"--profile={args.profile} must begin before train.steps={train.steps}")
    if start % train.steps_per_call or stop % train.steps_per_call:
        raise errors.ConfigError(
            f"--profile={args.profile} must be multiples of train.steps_per_call={train.steps_per_call}"
        )
    return start, stop


class Run(NamedTuple):
    """The parts of a run that do not change from step to step."""

    args: Args
    span: tuple[int, int]  # of the steps to trace
    parts: Any  # experiment.Experiment
    program: Any  # program.Program
    workdir: Path
    meta: dict  # entries of its checkpoints besides the state
    stop_requested: Callable  # () -> exit code or None
    keep_alive: Callable  # (), resets the watchdog
    write_grid: Callable  # (state, step) -> images
    evaluate: Callable  # (state, step) -> metrics
    say: Callable


def train(args, parts, dataset, fingerprint, workdir, stop_requested, say, argv):
    """Run Algorithm 1 from the newest checkpoint, that of --step, or the beginning to the last step; the exit code.

    argv: the command, for run.json.
    """
    from ddpm_jax import parallel, program
    from ddpm_jax.commands import progress, recovery
    from ddpm_jax.run import folder as run_folder
    from ddpm_jax.run import signals

    meta = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "classes": parts.classes}
    meta |= {"data": fingerprint, "devices": parallel.describe()}
    with signals.watchdog(parts.config.train.watchdog, parts.config.train.watchdog_abort) as keep_alive:
        write_grid = progress.make_grid_writer(parts, workdir, keep_alive)
        evaluate = progress.make_evaluator(parts, dataset, keep_alive, say)
        made = program.make(parts, dataset)
        run = Run(args, span(args), parts, made, workdir, meta, stop_requested, keep_alive, write_grid, evaluate, say)
        start = recovery.start(run, args.step or None)
        parallel.on_all_processes(lambda: parallel.is_first() and run_folder.record(workdir, parts.config, argv))
        say("compiling the training step")
        while True:
            try:
                return take_steps(run, start)
            except recovery.RollBack as failure:
                start = recovery.roll_back(run, start, failure)


def take_steps(run, start):
    """Every step of Algorithm 1 from `start` on, each followed by the actions due; the exit code."""
    import jax
    import numpy as np

    from ddpm_jax.commands import actions

    config, first = run.parts.config.train, int(np.max(start.state.step))
    state, step, code = run.program.place(start.state), first, None
    with actions.open_tools(run, start, first) as tools:
        started = time.monotonic()
        while step < config.steps and code is None:
            with tools.timer.working():
                with tools.timer.waiting():
                    num_steps, batch = next(tools.batches)
                tools.profile(step, state)
                state, metrics = run.program.step(state, batch, start.rollbacks)
                step += num_steps
                code = tools.agree(run.stop_requested())
                due = [action for action in tools.actions if action.is_due(step, config.steps, code is not None)]
                tools.metrics.add(metrics, read_all=bool(due))
            tools.writer.advance(step)
            if step == first + num_steps:
                jax.block_until_ready(metrics)
                run.say(f"first step, compilation included: {time.monotonic() - started:.1f} s")
                tools.timer.reset(step)
            run.keep_alive()
            tools.save_or_warn()  # reports a save that has failed in the background
            for action in due:
                action(step, state, ending=step == config.steps or code is not None)
    if code is not None:
        run.say(f"stopped by a signal; step {step:,} is saved and the same command resumes from it")
        return code
    took, loss = log.format_duration(time.monotonic() - started), tools.metrics.last["loss"]
    run.say(f"finished step {step:,} in {took}, loss {loss:.4f}; samples: {run.workdir / 'samples'}")
    run.say(f"more samples: python {commands.prog_name('sample')} --workdir={run.workdir}")
    return 0

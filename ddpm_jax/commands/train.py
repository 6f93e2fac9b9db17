"""Train a diffusion model: python -m ddpm_jax train --config=configs/digits.py --workdir=runs/digits

The same command again resumes. Everything of the run is in its folder; sampling needs nothing else.
"""

import contextlib
import dataclasses
import functools
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
        "checkpoint to go on from: later ones are set aside, later metrics and averages dropped; 0 for the newest",
        options.at_least(0),
    )
    allow_change: tuple[str, ...] = options.option(
        (), "fields, such as train.batch_size,data.source, that may differ from those of the run in the folder"
    )
    strict_data: bool = options.option(False, "take no folder with a picture that cannot be read")
    dry_run: bool = options.option(False, "build, count, compile, take one step on made-up data, and leave")
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
    wandb: str = options.option("", "project of Weights & Biases that is shown the run (needs the extra wandb)")
    profile: str = options.option(
        "",
        "START:STOP, the steps whose trace is written to WORKDIR/profile",
        ("START:STOP, two whole numbers of which the second is larger", is_span),
    )
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """The exit code of training with the options `argv`, those of the program when None."""
    argv = options.words(argv)
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
    less = f"try a train.batch_size smaller than {config.batch_size}, train.accumulate=2 or more, or model.remat=true"
    with parallel.exit_with_others(), signals.caught() as stop_requested, parallel.memory_for(less):
        if args.dry_run:
            return compile_only(args, say)
        parts, dataset = parallel.on_all_processes(lambda: prepare(args, workdir, say))
        fingerprint = data.fingerprint(dataset)
        there = checkpoint.steps(workdir / "checkpoints")
        run_folder.check_same(
            args.config, data=fingerprint, step=args.step, allow_change=args.allow_change, checkpoints=there
        )
        done = parallel.on_all_processes(lambda: run_folder.last_step(workdir, config.steps, args.step))
        if done:
            say(f"already finished at step {done:,}; for more, --config.train.steps={2 * done}")
            return 0
        # All is checked: from here on the folder of the run is written.
        with parallel.on_all_processes(
            lambda: run_folder.claim(workdir) if parallel.is_first() else contextlib.nullcontext()
        ):
            parallel.on_all_processes(lambda: run_folder.check_seen(workdir))
            command = [*commands.spelled("train").split(), *argv]
            return train(args, parts, dataset, fingerprint, workdir, stop_requested, say, command)


def compile_only(args, say):
    """The exit code of a dry run."""
    from ddpm_jax import parallel
    from ddpm_jax.commands import dry_run

    config = args.config.train
    if config.ensemble > 1:
        raise errors.ConfigError("--dry-run is of one run; add --config.train.ensemble=1")
    devices = parallel.topology(args.topology) if args.topology else None
    parallel.check_batch_size(config.batch_size, config.accumulate, devices)
    if devices:
        dry_run.for_topology(args.config, devices, say)
    else:
        dry_run.dry_run(args.config, say)
    return 0


def prepare(args, workdir, say):
    """(Experiment, Dataset), after all checks that need no device."""
    from ddpm_jax import data, experiment, parallel
    from ddpm_jax.run import checkpoint
    from ddpm_jax.run import folder as run_folder

    config = args.config
    parallel.check_batch_size(config.train.batch_size, config.train.accumulate, members=config.train.ensemble)
    if args.step >= config.train.steps:
        raise errors.ConfigError(f"--step={args.step} must be less than train.steps={config.train.steps}")
    span(args)  # refuses
    run_folder.check(workdir, config, args.allow_change)
    dataset = data.load(**vars(config.data))
    images = "x".join(map(str, dataset.images.shape[1:]))
    say(f"{config.data.source}: {len(dataset.images):,} images of {images}")
    dataset = data.with_labels(dataset, config.model.num_classes)
    if dataset.classes and checkpoint.steps(workdir / "checkpoints"):
        meta = checkpoint.load(workdir / "checkpoints", [])[0]
        dataset = data.with_labels_of_run(dataset, config.data.source, meta["data"], meta.get("classes"))
    data.batch(dataset, 0, 0, config.train.batch_size)  # refuses too few images
    if config.train.evaluate_every:
        from ddpm_jax.evaluation.features import enl0

        enl0.find()  # refuses
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
    """What a run is made of; none of it changes from step to step."""

    args: Args
    parts: Any  # experiment.Experiment
    program: Any  # program.Program
    workdir: Path
    meta: dict  # what its checkpoints say besides the state
    stop_requested: Callable  # () -> exit code or None
    keep_alive: Callable  # (), tells the watchdog that the run goes on
    write_grid: Callable  # (state, step) -> pictures
    evaluate: Callable  # (state, step) -> metrics
    say: Callable


def train(args, parts, dataset, fingerprint, workdir, stop_requested, say, argv):
    """Algorithm 1 from the newest checkpoint, or that of --step, or the beginning, to the last step; the exit code.

    argv: the command, to be recorded.
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
        run = Run(args, parts, made, workdir, meta, stop_requested, keep_alive, write_grid, evaluate, say)
        start = recovery.start(run, args.step or None)
        parallel.on_all_processes(lambda: parallel.is_first() and run_folder.record(workdir, parts.config, argv))
        say("compiling the training step")
        while True:
            try:
                return take_steps(run, start)
            except recovery.RollBack as failure:
                start = recovery.roll_back(run, start, failure)


def take_steps(run, start):
    """Every step of Algorithm 1 from `start` on, and the actions that are due after it; the exit code."""
    import jax
    import numpy as np

    from ddpm_jax import parallel
    from ddpm_jax.commands import actions, recovery
    from ddpm_jax.run import checkpoint, profiling

    config, begun = run.parts.config.train, time.monotonic()
    first, last, code = int(np.max(start.state.step)), config.steps, None
    state, step = run.program.place(start.state), first
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(open_log(run, start.state))
        manager = checkpoint.open_manager(run.workdir / "checkpoints", config.keep, config.keep_every)
        stack.callback(checkpoint.close, manager)
        batches = stack.enter_context(contextlib.closing(prefetched(run.program, config, first, start.rollbacks)))
        profile = stack.enter_context(profiling.profiler(span(run.args), run.workdir / "profile", run.say))
        stack.enter_context(parallel.exit_with_others())  # before the others are waited for in closing

        keep, agree = checkpoint.make_keeper(manager), parallel.make_agreement()
        timer = actions.StepTimer(first)
        check = functools.partial(recovery.check_finite, config=config, manager=manager)
        metrics = actions.Metrics(first, start.window, check)
        periodic = actions.make_actions(run, start, metrics, timer, writer, keep)
        while step < last and code is None:
            with timer.working():
                with timer.waiting():
                    taken, batch = next(batches)
                profile(step, state)
                state, found = run.program.step(state, batch, start.rollbacks)
                step += taken
                code = agree(run.stop_requested())
                due = [action for action in periodic if action.is_due(step, last, code is not None)]
                metrics.add(found, read_all=bool(due))
            writer.advance(step)
            if step == first + taken:
                jax.block_until_ready(found)
                run.say(f"first step, compilation included: {time.monotonic() - begun:.1f} s")
                timer.reset(step)
            run.keep_alive()
            keep()  # reports a save that has failed in the background
            for action in due:
                action(step, state, ending=step == last or code is not None)
    if code is not None:
        run.say(f"stopped by a signal; step {step:,} is saved and the same command goes on from it")
        return code
    took, samples = log.clock(time.monotonic() - begun), run.workdir / "samples"
    run.say(f"finished step {last:,} in {took}, loss {metrics.last['loss']:.4f}; samples: {samples}")
    run.say(f"more samples: python {commands.spelled('sample')} --workdir={run.workdir}")
    return 0


@contextlib.contextmanager
def open_log(run, state):
    """The Log of the first process, from the step of `state` on; the others say nothing."""
    import numpy as np

    from ddpm_jax import parallel
    from ddpm_jax.run import boards, snapshots

    writer, step = log.SILENT, int(np.max(state.step))
    if parallel.is_first():
        snapshots.drop_after(run.workdir / "averages", step - int(np.max(state.skipped)))
        with errors.writing(f"--workdir={run.workdir}"):
            shown = boards.open_boards(run.workdir, step, run.args.wandb, run.meta["config"])
            writer = log.open_log(run.workdir, step, run.parts.config.train.steps, shown)
    try:
        yield writer
    finally:
        writer.close()


def prefetched(program, config, first, rollbacks):
    """(number of steps, batches) of each call of the training step from the step `first` on, made ahead of it."""
    from ddpm_jax import data

    last, per_call = config.steps, config.steps_per_call

    def make_batches(call):
        steps = range(max(first, call * per_call), min(last, (call + 1) * per_call))
        return len(steps), program.batches(steps, rollbacks)

    return data.prefetch(make_batches, first // per_call, -(-last // per_call))

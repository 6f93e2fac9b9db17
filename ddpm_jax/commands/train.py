"""Train a diffusion model: python -m ddpm_jax train --config=configs/digits.py --workdir=runs/digits

The same command again resumes. Everything of the run is in its folder; sampling needs nothing else.
"""

import collections
import contextlib
import dataclasses
import re
import time
import warnings
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
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    distributed: str = options.option("auto", "several processes: auto, off or HOST:PORT,ID,COUNT")
    heartbeat: int = options.option(
        100,
        "seconds of silence after which a process counts as lost and the others end",
        options.at_least(1),
        options.below(10**6),
    )
    cpu_devices: int = options.option(
        0, "as how many devices a CPU is used; 0 for up to one a core", options.at_least(0)
    )
    wandb: str = options.option("", "project of Weights & Biases that is shown the run (needs the extra wandb)")
    profile: str = options.option(
        "",
        "START:STOP, the steps whose trace is written to WORKDIR/profile",
        ("START:STOP, two whole numbers of which the second is larger", is_span),
    )
    debug: bool = options.option(False, "show tracebacks")


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
    with parallel.among_others(), signals.caught() as asked, parallel.memory_for(less):
        if args.dry_run:
            if config.ensemble > 1:
                raise errors.ConfigError("--dry-run is of one run; add --config.train.ensemble=1")
            from ddpm_jax.commands import dry_run

            devices = parallel.topology(args.topology) if args.topology else None
            parallel.check_batch_size(config.batch_size, config.accumulate, devices)
            if devices:
                dry_run.for_topology(args.config, devices, say)
            else:
                dry_run.dry_run(args.config, say)
            return 0
        parts, dataset = parallel.together(lambda: prepare(args, workdir, say))
        fingerprint = data.fingerprint(dataset)
        there = checkpoint.steps(workdir / "checkpoints")
        run_folder.check_same(
            args.config, data=fingerprint, step=args.step, allow_change=args.allow_change, checkpoints=there
        )
        done = parallel.together(lambda: run_folder.last_step(workdir, config.steps, args.step))
        if done:
            say(f"already finished at step {done:,}; for more, --config.train.steps={2 * done}")
            return 0
        # All is checked: from here on the folder of the run is written.
        with parallel.together(lambda: run_folder.claim(workdir) if parallel.is_first() else contextlib.nullcontext()):
            parallel.together(lambda: run_folder.check_seen(workdir))
            shown = args.wandb, span(args), [*commands.spelled("train").split(), *argv]
            return train(parts, dataset, fingerprint, workdir, asked, say, args.step or None, args.allow_change, *shown)


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
    dataset = experiment.with_labels(dataset, config.model.num_classes)
    if dataset.classes and checkpoint.steps(workdir / "checkpoints"):
        meta = checkpoint.load(workdir / "checkpoints", [])[0]
        dataset = experiment.with_labels_of_run(dataset, config.data.source, meta["data"], meta.get("classes"))
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
    parts: Any  # experiment.Experiment
    program: Any  # program.Program
    workdir: Path
    entries: dict  # what the checkpoints' meta says besides the state
    write_grid: Callable
    evaluate: Callable
    asked: Callable  # () -> exit code or None
    feed: Callable  # the watchdog
    say: Callable
    project: str  # of Weights & Biases, or none
    span: tuple  # the steps to trace


class RollBack(BaseException):
    """A step was not finite; in all processes, so that none takes it for an error of its own."""


def train(parts, dataset, fingerprint, workdir, asked, say, step=None, allowed=(), project="", span=(0, 0), argv=()):
    """Algorithm 1 from the newest checkpoint, that of `step` or from the beginning to the last step; the exit code.

    argv: the command, to be recorded.
    """
    import jax

    from ddpm_jax import parallel, program
    from ddpm_jax.commands import progress
    from ddpm_jax.run import checkpoint, signals
    from ddpm_jax.run import folder as run_folder

    config, folder = parts.config.train, workdir / "checkpoints"
    made = program.make(parts, dataset)
    fixed = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "classes": parts.classes}
    fixed |= {"data": fingerprint, "devices": parallel.describe()}
    rollbacks, tries, failure, branch = 0, {}, None, step
    with signals.watchdog(config.watchdog, config.watchdog_abort) as feed:
        write_grid = progress.make_grid_writer(parts, workdir, feed)
        evaluate = progress.make_evaluator(parts, dataset, feed, say)
        while True:
            state, meta = None, {"window": [], "rollbacks": 0}
            if checkpoint.steps(folder) or step:
                template = jax.eval_shape(made.init_state)
                state, meta, told = run_folder.resume(parts, template, fingerprint, workdir, step, allowed)
                for line in told:
                    say(line)
            else:
                state = made.init_state()
            rollbacks, branch, step = max(rollbacks, meta["rollbacks"]), branch or meta.get("branch"), None
            if failure:
                begun, most = meta.get("step", 0), config.max_skipped
                tries[begun] = tries.get(begun, 0) + 1
                if tries[begun] > most:
                    raise errors.Diverged(f"{failure}, after {most} roll-backs to step {begun}")
                told = f"on from step {begun} with other batches and noise ({tries[begun]} of at most {most} times)"
                warnings.warn(f"{failure}; {told}", stacklevel=2)
            else:
                parallel.together(lambda: parallel.is_first() and run_folder.record(workdir, parts.config, argv))
                say("compiling the training step")
            entries = fixed | {"rollbacks": rollbacks, "branch": branch}
            run = Run(parts, made, workdir, entries, write_grid, evaluate, asked, feed, say, project, span)
            try:
                return follow(run, state, meta["window"])
            except RollBack as error:
                failure, rollbacks = error, rollbacks + 1


def follow(run, state, window):
    """Every step from `state` on, with all that is written on the way; the exit code.

    window: the metrics of the steps since the last line of the log.
    """
    import jax
    import numpy as np

    from ddpm_jax import averages, data, experiment, parallel, training
    from ddpm_jax.run import boards, checkpoint, profiling

    config, say, again = run.parts.config.train, run.say, run.entries["rollbacks"]
    first, last, at_once = int(np.max(state.step)), config.steps, config.steps_per_call
    if parallel.is_first():
        averages.drop_after(run.workdir / "averages", first - int(np.max(state.skipped)))
    state, learning_rate = run.program.place(state), experiment.learning_rate(run.parts)
    with contextlib.ExitStack() as stack:
        writer = log.SILENT
        if parallel.is_first():
            with errors.writing(f"--workdir={run.workdir}"):
                shown = boards.open_boards(run.workdir, first, run.project, run.entries["config"])
                writer = log.open_log(run.workdir, first, last, shown)
        stack.callback(writer.close)
        manager = checkpoint.open_manager(run.workdir / "checkpoints", config.keep, config.keep_every)
        stack.callback(checkpoint.close, manager)
        keep, agree = checkpoint.make_keeper(manager), parallel.make_agree()

        def make_batches(call):
            steps = range(max(first, call * at_once), min(last, (call + 1) * at_once))
            return len(steps), run.program.batches(steps, again)

        batches = data.prefetch(make_batches, first // at_once, -(-last // at_once))
        stack.enter_context(contextlib.closing(batches))
        profile = stack.enter_context(profiling.profiler(run.span, run.workdir / "profile", say))
        stack.enter_context(parallel.among_others())  # before the others are waited for in closing
        begun, busy, waited, logged, known = time.monotonic(), 0.0, 0.0, first, first
        step, unread = first, collections.deque()
        while step < last:
            clock = time.monotonic()
            taken, batch = next(batches)
            waited += time.monotonic() - clock
            profile(step, state)
            state, metrics = run.program.step(state, batch, again)
            step += taken
            writer.advance(step)
            unread.append(metrics)
            code = agree(run.asked())
            at_log, at_save = step % config.log_every == 0, step % config.checkpoint_every == 0
            ending = code is not None or step == last
            # Read the metrics one call late, while the device works on, except where they are needed now.
            while len(unread) > (not (at_log or at_save or ending)):
                for row in on_host(unread.popleft()):
                    known += 1
                    check_finite(row, known, config, manager)
                    window.append(row)
            busy += time.monotonic() - clock
            if step == first + taken:
                jax.block_until_ready(metrics)
                say(f"first step, compilation included: {time.monotonic() - clock:.1f} s")
                busy, waited, logged = 0.0, 0.0, step
            run.feed()

            if at_log or step == last:
                row = log.mean(window)
                updates = step - row["skipped"]
                rates = {"learning_rate": float(learning_rate(max(0, updates - 1)))}
                rates["ema_init_share"] = training.ema_init_share(config.ema_decay, updates)
                timed = step - logged
                timing = {
                    "images_per_second": config.batch_size * timed / busy if timed else None,
                    "seconds_per_step": busy / timed if timed else None,
                    "input_wait": waited / timed if timed else None,
                }
                writer.write({"step": step} | row | rates | timing | run.evaluate(state, step))
                window, busy, waited, logged = [], 0.0, 0.0, step
            if config.averages and (step % config.average_every == 0 or step == last) and parallel.is_first():
                store_averages(run.workdir, config.averages, state)
            if at_save or ending:
                keep(state, last=ending, window=window, **run.entries)
                run.feed()
            else:
                keep()
            if code is not None:
                say(f"stopped by a signal; step {step:,} is saved and the same command goes on from it")
                return code
            if step % config.sample_every == 0 or step == last:
                for name, picture in run.write_grid(state, step).items():
                    writer.picture(name, picture, step)
    took = log.clock(time.monotonic() - begun)
    say(f"finished step {last:,} in {took}, loss {row['loss']:.4f}; samples: {run.workdir / 'samples'}")
    say(f"more samples: python {commands.spelled('sample')} --workdir={run.workdir}")
    return 0


def store_averages(workdir, lengths, state):
    """Keep the power-function averages for good; one that cannot be written is missed with a warning."""
    from ddpm_jax import averages

    updates = int(state.step) - int(state.skipped)  # on the host: other processes do not come by here
    if updates:
        try:
            averages.save(workdir / "averages", updates, dict(zip(lengths, state.averages, strict=True)))
        except errors.CheckpointError as error:
            warnings.warn(f"{error}; training goes on", stacklevel=2)


def on_host(metrics):
    """The metrics of each step of a call, as plain numbers; waits until they are done."""
    import jax

    columns = {name: values.tolist() for name, values in jax.device_get(metrics).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_finite(row, step, config, manager):
    """Do as train.on_nan says when the gradient of the step with these metrics was not finite. It changed nothing."""
    from ddpm_jax.run import checkpoint

    in_row = row["skipped_in_row"]
    if in_row < (config.max_skipped if config.on_nan == "skip" else 1):
        return
    said = f"the gradient was not finite at step {step} ({in_row} in a row)"
    checkpoint.settle(manager)
    if config.on_nan == "rollback":
        raise RollBack(said)
    good = checkpoint.steps(manager.directory)
    where = f"the last good checkpoint is {manager.directory / str(good[-1])}" if good else "no checkpoint was written"
    raise errors.Diverged(f"{said}; {where}; try a lower train.learning_rate")

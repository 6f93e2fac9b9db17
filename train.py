"""Train a diffusion model: python train.py --config=configs/digits.py --workdir=runs/digits

The same command again resumes. Everything of the run is in its folder; sample.py needs nothing else.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

from ddpm_jax import config as configs
from ddpm_jax import errors, options
from ddpm_jax.files import lock, write_atomic


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    workdir: str = options.option("", "folder of the run; runs/NAME of the config file when empty")
    dry_run: bool = options.option(False, "build, count, compile, take one step on made-up data, and leave")
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    distributed: str = options.option("auto", "several processes: auto, off or HOST:PORT,ID,COUNT")
    cpu_devices: int = options.option(
        0, "as how many devices a CPU is used; 0 for up to one a core", options.at_least(0)
    )
    debug: bool = options.option(False, "show tracebacks")


def main():
    args = options.parse(Args, sys.argv[1:], "train.py", __doc__, configs.load)
    workdir = Path(args.workdir or f"runs/{Path(args.config_file).stem}").expanduser()

    from ddpm_jax import checkpoint, data, experiment, log, parallel

    check_folder(workdir, args.config)
    checkpoint.quiet()
    batch_size, accumulate = args.config.train.batch_size, args.config.train.accumulate
    parallel.start(batch_size, accumulate, args.platform, args.distributed, args.cpu_devices)
    parallel.check_batch_size(batch_size, accumulate)
    say = log.note if parallel.is_first() else lambda text: None
    say(f"ddpm_jax {checkpoint.versions()['ddpm_jax']} on {parallel.describe()}")
    if args.dry_run:
        return dry_run(args.config, say)

    dataset = data.load(**vars(args.config.data))
    images = "x".join(map(str, dataset.images.shape[1:]))
    say(f"{args.config.data.source}: {len(dataset.images):,} images of {images}")
    dataset = with_labels(dataset, args.config.model.num_classes)
    data.batch(dataset, 0, 0, args.config.train.batch_size)  # refuses too few images
    parts = experiment.make(args.config, dataset.images.shape[1:])
    say(
        f"U-Net of {experiment.parameter_count(parts):,} parameters; {args.config.train.steps:,} steps "
        f"of {args.config.train.batch_size} images"
    )
    done = max(checkpoint.steps(workdir / "checkpoints"), default=0)
    if done >= args.config.train.steps:
        say(f"already finished at step {done:,}; for more, --config.train.steps={2 * done}")
        return 0
    if parallel.is_first():  # all is checked: from here on the folder of the run is written
        start_folder(workdir, args.config)
    return train(parts, dataset, workdir, say)


def train(parts, dataset, workdir, say):
    """Algorithm 1 from the newest checkpoint, or from the beginning, to the last step; the exit code."""
    import jax

    from ddpm_jax import averages, checkpoint, data, experiment, keys, log, parallel, signals, training

    config, folder = parts.config.train, workdir / "checkpoints"
    init_state, train_step = experiment.make_training(parts)
    window = []  # metrics of the steps since the last line of the log
    if checkpoint.steps(folder):
        state, window = resume(folder, jax.eval_shape(init_state), len(dataset.images), say)
    else:
        state = init_state()
    first, last = int(state.step), config.steps
    if parallel.is_first():
        averages.drop_after(workdir / "averages", first - int(state.skipped))

    asked = signals.catch()
    manager = checkpoint.open_manager(folder, config.keep)
    keep = checkpoint.make_keeper(manager)
    writer = log.open_log(workdir, first, last) if parallel.is_first() else log.Log(lambda row: None, lambda: None)
    rows, root = parallel.local_rows(config.batch_size), keys.root(config.seed, "train")
    batches = data.prefetch(
        lambda step: parallel.shard(data.batch(dataset, config.seed, step, config.batch_size, rows)), first, last
    )
    write_grid = make_grid_writer(parts, workdir)
    train_step, state = parallel.pmap_step(train_step), parallel.replicate(state)
    learning_rate = experiment.learning_rate(parts)
    begun, busy, waited, logged = time.monotonic(), 0.0, 0.0, first
    try:
        for step in range(first + 1, last + 1):
            clock = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - clock
            state, metrics = train_step(state, batch, root)
            window.append(metrics)
            code = parallel.agree(asked())
            at_log, at_save = step % config.log_every == 0, step % config.checkpoint_every == 0
            ending = code is not None or step == last
            # Read the metrics one step late, while the device works on, except where they are needed now.
            if len(window) > 1:
                window[-2] = on_host(window[-2])
            if at_log or at_save or ending:
                window[-1] = on_host(window[-1])
            busy += time.monotonic() - clock
            if step == first + 1:
                on_host(metrics)
                say(f"first step, compilation included: {time.monotonic() - clock:.1f} s")
                busy, waited, logged = 0.0, 0.0, step
            check_finite(window, config.max_skipped, step, manager)

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
                writer.write({"step": step} | row | rates | timing)
                window, busy, waited, logged = [], 0.0, 0.0, step
            if step % config.sample_every == 0 or step == last:
                write_grid(state, step)
            if config.averages and (step % config.average_every == 0 or step == last) and parallel.is_first():
                store_averages(workdir, config.averages, state)
            if at_save or ending:
                entries = {"config": dataclasses.asdict(parts.config), "shape": parts.shape, "window": window}
                entries |= {"images": len(dataset.images), "devices": parallel.describe()}
                keep(state, last=ending, **entries)
            else:
                keep()
            if code is not None:
                say(f"stopped by a signal; step {step:,} is saved and the same command goes on from it")
                return code
    finally:
        manager.close()
        writer.close()
    took = log.clock(time.monotonic() - begun)
    say(f"finished step {last:,} in {took}, loss {row['loss']:.4f}; samples: {workdir / 'samples'}")
    say(f"more samples: python sample.py --workdir={workdir}")
    return 0


def resume(folder, template, images, say):
    """(state, metrics not yet logged) of the newest whole checkpoint, after a look at what has changed since."""
    from ddpm_jax import checkpoint, parallel

    state, meta = checkpoint.restore_state(folder, template)
    say(f"resuming at step {state.step:,} from {folder}")
    if meta["images"] != images:
        raise errors.ConfigError(
            f"the run had {meta['images']:,} images, the data now have {images:,}: its batches would be others; "
            "put the data back or take another --workdir"
        )
    then = meta["versions"] | {"devices": meta["devices"]}
    now = checkpoint.versions() | {"devices": parallel.describe()}
    changed = [f"{name} {then.get(name)} is now {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        say(f"not bit-exact from here on, only to rounding: {'; '.join(changed)}")
    if parallel.is_first():
        checkpoint.set_aside(folder, int(state.step))
    parallel.agree(None)  # no process lists the folder before that is done
    return state, meta["window"]


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
    """Metrics as plain numbers; waits until their step is done."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}


def check_finite(window, most, step, manager):
    """End the run after `most` steps in a row whose gradient was not finite. They changed nothing."""
    from ddpm_jax import checkpoint

    in_row = next((row["skipped_in_row"] for row in reversed(window) if isinstance(row["skipped_in_row"], int)), 0)
    if in_row >= most:
        checkpoint.finish(manager)
        good = checkpoint.steps(manager.directory)
        where = (
            f"the last good checkpoint is {manager.directory / str(good[-1])}" if good else "no checkpoint was written"
        )
        raise errors.Diverged(
            f"the gradient was not finite {in_row} steps in a row, up to step {step}; {where}; "
            "try a lower train.learning_rate"
        )


def make_grid_writer(parts, workdir):
    """write_grid(state, step): samples of the averaged parameters, always of the same keys, as one picture."""
    import jax
    import numpy as np

    from ddpm_jax import experiment, images, keys, parallel

    config, root = parts.config.train, keys.root(parts.config.train.seed, "sample")
    generate = parallel.pmap_generate(experiment.make_generate(parts, config.sampler, config.sample_steps))
    indices = np.arange(config.sample_num)
    labels = experiment.labels_in_turn(parts, indices)

    def write_grid(state, step):
        if parallel.is_first():
            params = parallel.replicate(jax.device_get(state.ema_params))
            batches = parallel.generate_batches(generate, params, root, indices, labels)
            page = images.grid(np.concatenate(list(batches))[:, -1])
            try:
                images.save_png(workdir / "samples" / f"step_{step:09}.png", page)
            except OSError as error:
                warnings.warn(f"the samples of step {step} could not be written: {error.strerror}", stacklevel=2)

    return write_grid


def dry_run(config, say):
    """Build and compile everything, take one step on made-up images, and report; nothing is written."""
    import numpy as np

    from ddpm_jax import data, experiment, keys, parallel

    size, channels = config.data.image_size, config.data.channels
    known = (*(size * 2)[:2], channels) if size and channels else None  # one number is a square
    shape = known or data.load(**vars(config.data)).images.shape[1:]
    parts = experiment.make(config, shape)
    say(f"U-Net of {experiment.parameter_count(parts):,} parameters for images of {'x'.join(map(str, shape))}")
    init_state, train_step = experiment.make_training(parts)
    state, root = parallel.replicate(init_state()), keys.root(config.train.seed, "train")
    made_up = np.random.default_rng(0).integers(0, 256, (config.train.batch_size, *shape), np.uint8)
    dataset = data.Dataset(made_up, np.zeros(len(made_up), np.int32) if config.model.num_classes else None)
    rows = parallel.local_rows(config.train.batch_size)
    batch = parallel.shard(data.batch(dataset, 0, 0, config.train.batch_size, rows))
    clock = time.monotonic()
    compiled = parallel.pmap_step(train_step).lower(state, batch, root).compile()
    memory = compiled.memory_analysis()
    held, used = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    say(f"compiled in {time.monotonic() - clock:.1f} s; a device holds {held:,.0f} MB, a step uses {used:,.0f} MB more")
    clock = time.monotonic()
    metrics = on_host(compiled(state, batch, root)[1])
    say(f"one step took {time.monotonic() - clock:.2f} s, loss {metrics['loss']:.4f}; dry run done, nothing written")
    return 0


def with_labels(dataset, num_classes):
    """The data set with labels if the model has classes, and without if not."""
    if not num_classes:
        return dataset._replace(labels=None)
    if dataset.labels is None:
        raise errors.ConfigError(f"model.num_classes={num_classes}, but the data have no labels; set it to 0")
    if dataset.labels.max() >= num_classes or dataset.labels.min() < 0:
        low, high = dataset.labels.min(), dataset.labels.max()
        raise errors.ConfigError(f"model.num_classes={num_classes}, but labels run from {low} to {high}")
    return dataset


def check_folder(workdir, config):
    """Refuse a folder that holds another experiment; some fields may differ (config.MAY_CHANGE)."""
    from ddpm_jax import checkpoint

    file = workdir / "config.json"
    if not checkpoint.steps(workdir / "checkpoints"):
        return  # nothing has been trained there yet
    if file.exists():
        changed = configs.differences(configs.from_json(file.read_text(), str(file)), config)
        changed = [f"{name} is {a!r} there, {b!r} here" for name, a, b in changed if name not in configs.MAY_CHANGE]
        if changed:
            raise errors.ConfigError(f"{workdir} holds another run ({'; '.join(changed)}); take another --workdir")
    else:
        raise errors.ConfigError(f"{workdir} has checkpoints but no config.json; take another --workdir")


def start_folder(workdir, config):
    """Write config.json and run.json (versions, devices, command, git revision of every start)."""
    from ddpm_jax import checkpoint, parallel

    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock(workdir)
        write_atomic(workdir / "config.json", configs.to_json(config).encode())
        file = workdir / "run.json"
        starts = json.loads(file.read_text()) if file.exists() else []
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": sys.argv,
            "devices": parallel.describe(),
            "versions": checkpoint.versions() | {"python": sys.version.split()[0]},
            "git": revision(),
            "xla_flags": os.environ.get("XLA_FLAGS"),
        }
        write_atomic(file, (json.dumps([*starts, start], indent=2) + "\n").encode())
    except OSError as error:
        raise errors.ConfigError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


def revision():
    """The git revision of this code, if there is one."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    sys.exit(errors.run(main))

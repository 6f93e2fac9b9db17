"""How fast is it? python -m benchmarks [--config=configs/digits.py] [--steps=600] [--rounds=8]

Compares the real training loop with the bare compiled step, and the real sampler with the bare network. The two
alternate, because the speed of a machine drifts; a lower --config.train.log_every makes the turns shorter. The table
shows medians (for wall-clock time the mean), with minimum and maximum in brackets. The table goes to stdout, the log of
the training run to stderr; no file is kept. Before a release, --check compares the ratios with those of --record.
"""

import contextlib
import dataclasses
import itertools
import operator
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from benchmarks import reference
from benchmarks.diffusers_worker import peak_memory
from ddpm_jax import config as configs
from ddpm_jax import errors, options

BLOCK = 20  # calls in a block, which is timed as a whole
IMAGES = 64  # in a batch of samples


@dataclasses.dataclass(frozen=True)
class BenchmarkArgs(options.Arguments):
    """The options of all benchmarks of a config."""

    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    steps: int = options.option(600, "training steps, at least twice train.log_every", options.at_least(1))
    rounds: int = options.option(8, "batches of samples, each between two bare measurements", options.at_least(1))
    sample_steps: int = options.option(100, "sampling steps, at most diffusion.T", options.at_least(1))
    check: bool = options.option(False, "compare the ratios with the reference; exit code 1 if any is slower")
    record: bool = options.option(False, "add the ratios to the reference, for this stack and config")
    compilations: int = options.option(3, "compilations of the step for --check and --record", options.at_least(1))
    reference: str = options.option("benchmarks/reference.json", "file of ratios that were measured before")
    platform: str = options.option(*options.PLATFORM)


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks", __doc__, configs.load)
    check(args)
    config = options.replace(args.config, {"train.steps": args.steps, "train.sample_every": 10**9})

    import jax

    from ddpm_jax import data, experiment, parallel
    from ddpm_jax.run import checkpoint, log

    jax.config.update("jax_enable_compilation_cache", False)
    accumulate = config.train.accumulate
    parallel.start(config.train.batch_size, accumulate, args.platform, "off", args.cpu_devices)
    parallel.check_batch_size(config.train.batch_size, config.train.accumulate)
    log.note(parallel.describe())
    versions = checkpoint.versions() | {"python": sys.version.split()[0]}
    log.note(", ".join(f"{name} {version}" for name, version in versions.items()))
    where = reference.describe_stack(), reference.describe_config(args)
    expected = reference.find(args.reference, *where) if args.check else {}
    dataset = data.with_labels(data.load(**vars(config.data)), config.model.num_classes)
    parts = experiment.make(config, dataset.images.shape[1:])
    log.note(
        f"{args.config_file}: {experiment.parameter_count(parts):,} parameters, "
        f"{config.train.batch_size} images of {'x'.join(map(str, parts.shape))} a step\n"
    )
    found = measure_training(parts, dataset) | measure_sampling(parts, args.rounds, args.sample_steps)
    if args.check or args.record:
        found |= measure_compilation(parts, dataset, args.compilations)
    verdicts = reference.compare(expected, found) if args.check else {}
    if args.record:
        reference.record(args.reference, *where, found)
    for name, verdict in verdicts.items():
        print_row(name, median_and_range(found[name]), verdict)
    return int(any(verdict.startswith(reference.SLOWER) for verdict in verdicts.values()))


def check(args):
    """Raise ConfigError for numbers of steps that leave nothing to measure."""
    every, most = args.config.train.log_every, args.config.diffusion.T
    if args.steps < 2 * every:
        raise errors.ConfigError(
            f"steps={args.steps} must be at least {2 * every}: two lines of the log, the first of which is warm-up; "
            "or lower --config.train.log_every"
        )
    if args.sample_steps > most:
        raise errors.ConfigError(f"sample_steps={args.sample_steps} must be at most diffusion.T={most}")


def print_row(name, value, target=""):
    """Print one row of the table."""
    from ddpm_jax.run import log

    log.note(f"{name:<44}{value:<36}{target}".rstrip())


def median_and_range(values, form="{:.3f}"):
    """The median, minimum and maximum of a few values, as text."""
    values = list(values)
    median, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def make_timer(call, carry, block=BLOCK, clock=time.perf_counter):
    """A function that returns the seconds of one `carry = call(carry)`, averaged over a block of calls."""
    import jax

    for _ in range(2):  # warm-up; the second call compiles anew if the output is placed differently on the devices
        carry = jax.block_until_ready(call(carry))

    def measure():
        nonlocal carry
        start = clock()
        for _ in range(block):
            carry = call(carry)
        jax.block_until_ready(carry)
        return (clock() - start) / block

    return measure


def alternate(ours, baseline, rounds):
    """The results of `rounds` calls of `ours`, and those of `baseline` before, between and after them."""
    found, baselines = [], [baseline()]
    for _ in range(rounds):
        found.append(ours())
        baselines.append(baseline())
    return found, baselines


def means_of_neighbours(values):
    """The mean of each value and the next: the baseline before and after a measurement."""
    return [(before + after) / 2 for before, after in itertools.pairwise(values)]


def measure_training(parts, dataset):
    """Print the rows about the compiled step, the training loop, and the data loader; {row: values} of the ratios."""
    from benchmarks.jax_worker import PRODUCT, matmul_flops

    config = parts.config.train
    step, (state, *rest) = compile_step(parts, dataset)
    time_bare_step, speeds = make_timer(lambda state: step(state, *rest)[0], state), []

    def time_step():
        speeds.append(matmul_flops(tries=3))
        return time_bare_step()

    bare, steps, logged, elapsed = run_loop(parts, dataset, time_step)
    baselines = means_of_neighbours(bare)
    print_row("bare training step", median_and_range([1e3 * seconds for seconds in bare], "{:.2f}") + " ms")
    products = "bare step / product of 2048x2048 matrices"
    loop = "training loop / bare step, as logged"
    found = {
        products: [seconds * speed / PRODUCT for seconds, speed in zip(bare, speeds, strict=True)],
        loop: list(map(operator.truediv, logged, baselines)),
    }
    print_row(products, median_and_range(found[products]))
    print_row(loop, median_and_range(found[loop]), "under 1.05")
    ratios = [seconds / n / baseline for seconds, n, baseline in zip(elapsed, steps, baselines, strict=True)]
    mean = sum(map(operator.mul, ratios, steps)) / sum(steps)
    saves = sum(n % config.checkpoint_every == 0 for n in range(config.log_every, config.steps))
    name = f"the same by wall clock, {saves} checkpoint{'s' * (saves != 1)}"
    print_row(name, f"{mean:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", "under 1.05")
    speed = loader_speed(dataset, config)
    print_row("loader alone", f"{speed:,.0f} images/s")
    print_row("loader / what the step consumes", f"{speed * statistics.median(bare) / config.batch_size:,.0f} times")
    print_row("peak resident memory after training", f"{peak_memory():,.0f} MB")
    return found


def step_inputs(parts, dataset):
    """What the train step takes beside the state: a batch for all devices, and the root key."""
    from ddpm_jax import data, keys, parallel

    config = parts.config.train
    batch = data.batch(dataset, config.seed, 0, config.batch_size)
    return parallel.shard(batch), keys.root(config.seed, "train")


def measure_compilation(parts, dataset, rounds):
    """Print the time to compile the step over that of a small program that never changes; {row: values} of it."""
    import jax

    from ddpm_jax import experiment, parallel

    def time_compilation():
        fresh = experiment.make(parts.config, parts.shape)  # new functions, so that JAX finds nothing in its caches
        step, state = parallel.pmap_step(fresh.train_step), jax.eval_shape(fresh.init_state)
        lowered, start = step.lower(state, *step_inputs(fresh, dataset)), time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    seconds, small = alternate(time_compilation, reference.time_small_compilation, rounds)
    name = "compilation, step / small program"
    found = {name: list(map(operator.truediv, seconds, means_of_neighbours(small)))}
    print_row(name, median_and_range(found[name]))
    return found


def compile_step(parts, dataset):
    """The pmapped train step and its arguments; prints its compilation time and memory."""
    from ddpm_jax import parallel

    arguments = parallel.replicate(parts.init_state()), *step_inputs(parts, dataset)
    step, start = parallel.pmap_step(parts.train_step), time.perf_counter()
    compiled = step.lower(*arguments).compile()
    print_row("compilation of the step, cold", f"{time.perf_counter() - start:.1f} s")
    memory = compiled.memory_analysis()
    held, used = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    print_row("memory of a step on each device", f"{held + used:,.1f} MB = {held:,.1f} held + {used:,.1f} used")
    return step, arguments


def run_loop(parts, dataset, time_step):
    """Run the real training loop; at each line of its log, pause it and time the bare step.

    Returns the bare step times and, for each interval between two of them, the number of steps, the logged seconds per
    step, and the elapsed seconds. The logged time excludes logging and checkpoints, the elapsed time includes both. The
    steps before the first line of the log are left out.
    """
    from ddpm_jax.commands import loop, progress, train
    from ddpm_jax.run import log

    bare, rows, elapsed, start = [], [], [], 0.0
    open_log = log.open_log

    def open_timed_log(*args):
        real = open_log(*args)

        def write(row):
            nonlocal start
            real.write(row)
            elapsed.append(time.perf_counter() - start)
            rows.append(row)
            bare.append(time_step())
            start = time.perf_counter()

        return real._replace(write=write)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(log, "open_log", open_timed_log))
        no_grids = mock.patch.object(progress, "make_grid_writer", return_value=lambda *_: {})  # even at the last step
        stack.enter_context(no_grids)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        args = train.Args(config=parts.config)
        quiet = Path(folder), lambda: None, lambda text: None
        loop.train(args, (0, 0), parts, dataset, "synthetic", *quiet, [], time.monotonic())
    steps = [after["step"] - before["step"] for before, after in itertools.pairwise(rows)]
    return bare, steps, [row["seconds_per_step"] for row in rows[1:]], elapsed[1:]


def loader_speed(dataset, config, seconds=2.0):
    """Images per second of the loader alone, over consecutive steps."""
    from ddpm_jax import data, parallel

    start, step = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        parallel.shard(data.batch(dataset, config.seed, step, config.batch_size))
        step += 1
    return step * config.batch_size / elapsed


def measure_sampling(parts, rounds, steps):
    """Print the rows about the sampler: one sampling step against one forward pass over the same images.

    Returns {row: values} of the ratio.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddpm_jax import experiment, keys, parallel

    indices = np.arange(-(-IMAGES // jax.device_count()) * jax.device_count())
    labels = experiment.cyclic_labels(parts, indices)
    index, label = parallel.shard((indices, labels))
    root = keys.root(parts.config.train.seed, "sample")
    params = parallel.replicate(jax.jit(parts.init)(root))
    generate = parallel.pmap_generate(experiment.make_generate(parts, parts.config.train.sampler, steps))

    def time_sampling_step():
        start = time.perf_counter()
        jax.block_until_ready(generate(params, root, index, label))
        return (time.perf_counter() - start) / steps

    forward = jax.vmap(lambda params, x, t, label: parts.net(params, x, t, label=label), (None, 0, None, 0))
    forward = jax.pmap(forward, axis_name=parallel.AXIS, in_axes=(None, 0, None, 0))
    x, t = jax.random.normal(root, (*index.shape, *parts.shape)), jnp.asarray(parts.schedule.times(steps)[0])
    time_forward = make_timer(lambda x: forward(params, x, t, label), x)
    time_sampling_step()  # compiles
    sampling, bare = alternate(time_sampling_step, time_forward, rounds)
    milliseconds = median_and_range([1e3 * seconds for seconds in bare], "{:.2f}")
    print_row(f"bare pass of the network, {len(indices)} images", f"{milliseconds} ms")
    name = f"sampling step / bare pass, {parts.config.train.sampler}, {steps} steps"
    ratios = list(map(operator.truediv, sampling, means_of_neighbours(bare)))
    print_row(name, median_and_range(ratios), "under 1.1")
    return {name: ratios}


if __name__ == "__main__":
    sys.exit(errors.run(main))

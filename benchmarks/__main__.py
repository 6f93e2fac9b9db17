"""How fast is it? python -m benchmarks [--config=configs/digits.py] [--steps=600] [--rounds=8]

Measures the real training loop against the bare compiled step, and the real sampler against the bare network, in turns,
because the speed of a machine drifts; a lower --config.train.log_every makes shorter turns. Of what was measured often
the table tells the median, on the clock the mean, and in brackets the least and the most. The table goes to stdout, the
lines of the training run to stderr; no file is kept.
"""

import contextlib
import dataclasses
import itertools
import operator
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from ddpm_jax import config as configs
from ddpm_jax import errors, options

BLOCK = 20  # calls of a bare time, waited for at their end
IMAGES = 64  # in a batch of samples


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    steps: int = options.option(600, "training steps, at least twice train.log_every", options.at_least(1))
    rounds: int = options.option(8, "batches of samples, each between two bare times", options.at_least(1))
    sample_steps: int = options.option(100, "sampling steps, at most diffusion.T", options.at_least(1))
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    cpu_devices: int = options.option(0, "as how many devices a CPU is used; 0 for one a core", options.at_least(0))
    debug: bool = options.option(False, "show tracebacks")


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
    dataset = data.with_labels(data.load(**vars(config.data)), config.model.num_classes)
    parts = experiment.make(config, dataset.images.shape[1:])
    log.note(
        f"{args.config_file}: {experiment.parameter_count(parts):,} parameters, "
        f"{config.train.batch_size} images of {'x'.join(map(str, parts.shape))} a step\n"
    )
    measure_training(parts, dataset)
    measure_sampling(parts, args.rounds, args.sample_steps)
    return 0


def check(args):
    """Refuse numbers of steps that leave nothing to measure."""
    every, most = args.config.train.log_every, args.config.diffusion.T
    if args.steps < 2 * every:
        raise errors.ConfigError(
            f"steps={args.steps} must be at least {2 * every}, two lines of the log, of which the first "
            "does not count; or lower --config.train.log_every"
        )
    if args.sample_steps > most:
        raise errors.ConfigError(f"sample_steps={args.sample_steps} must be at most diffusion.T={most}")


def line(name, value, aim=""):
    """Print one line of the table."""
    from ddpm_jax.run import log

    log.note(f"{name:<44}{value:<36}{aim}".rstrip())


def spread(values, form="{:.3f}"):
    """The median of a few values, and the smallest and largest of them."""
    values = list(values)
    median, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def repeated(call, carry):
    """A function that measures the seconds of one `carry = call(carry)`, over a block of them waited for at its end."""
    import jax

    for _ in range(2):  # compiles, and once more if what comes back lies otherwise on the devices
        carry = jax.block_until_ready(call(carry))

    def measure():
        nonlocal carry
        clock = time.perf_counter()
        for _ in range(BLOCK):
            carry = call(carry)
        jax.block_until_ready(carry)
        return (time.perf_counter() - clock) / BLOCK

    return measure


def around(values):
    """The mean of each two neighbours: what was measured before and after something."""
    return [(before + after) / 2 for before, after in itertools.pairwise(values)]


def measure_training(parts, dataset):
    """The lines about the compiled step, the loop around it, and the loader that feeds it."""
    config = parts.config.train
    step, (state, *rest) = compile_step(parts, dataset)
    bares, steps, logged, clocked = run_loop(parts, dataset, repeated(lambda state: step(state, *rest)[0], state))
    bare = statistics.median(bares)
    line("bare training step", spread([1e3 * seconds for seconds in bares], "{:.2f}") + " ms")
    line("training loop / bare step, as logged", spread(map(operator.truediv, logged, around(bares))), "under 1.05")
    ratios = [seconds / n / bare for seconds, n, bare in zip(clocked, steps, around(bares), strict=True)]
    whole = sum(map(operator.mul, ratios, steps)) / sum(steps)
    saves = sum(n % config.checkpoint_every == 0 for n in range(config.log_every, config.steps))
    name = f"the same on the clock, {saves} checkpoint{'s' * (saves != 1)}"
    line(name, f"{whole:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", "under 1.05")
    speed = loader_speed(dataset, config)
    line("loader alone", f"{speed:,.0f} images/s")
    line("loader / what the step consumes", f"{speed * bare / config.batch_size:,.0f} times")
    line("peak resident memory after training", f"{resident():,.0f} MB")


def compile_step(parts, dataset):
    """The pmapped train step and its arguments; prints how long it compiles and how much memory it takes."""
    from ddpm_jax import data, keys, parallel

    config = parts.config.train
    batch = parallel.shard(data.batch(dataset, config.seed, 0, config.batch_size))
    arguments = parallel.replicate(parts.init_state()), batch, keys.root(config.seed, "train")
    step, clock = parallel.pmap_step(parts.train_step), time.perf_counter()
    compiled = step.lower(*arguments).compile()
    line("compilation of the step, cold", f"{time.perf_counter() - clock:.1f} s")
    memory = compiled.memory_analysis()
    held, used = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    line("memory of a step on each device", f"{held + used:,.1f} MB = {held:,.1f} held + {used:,.1f} used")
    return step, arguments


def run_loop(parts, dataset, bare):
    """Run the real training loop and measure the bare step at each line of its log, while the loop waits.

    Returns the bare times, and of each stretch between two of them the number of steps, the seconds a step that the
    log tells, and the seconds of the whole stretch. The log counts neither its own writing nor the checkpoints, the
    clock counts both. What comes before the first line of the log is left out.
    """
    from ddpm_jax.commands import progress, train
    from ddpm_jax.run import log

    bares, rows, clocked, begun = [], [], [], 0.0
    open_log = log.open_log

    def open_watched(*args):
        real = open_log(*args)

        def write(row):
            nonlocal begun
            real.write(row)
            clocked.append(time.perf_counter() - begun)
            rows.append(row)
            bares.append(bare())
            begun = time.perf_counter()

        return real._replace(write=write)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(log, "open_log", open_watched))
        no_grids = mock.patch.object(progress, "make_grid_writer", return_value=lambda *_: {})  # even at the last step
        stack.enter_context(no_grids)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        args = train.Args(config=parts.config)
        train.train(args, parts, dataset, "made up", Path(folder), lambda: None, lambda text: None, [])
    steps = [after["step"] - before["step"] for before, after in itertools.pairwise(rows)]
    return bares, steps, [row["seconds_per_step"] for row in rows[1:]], clocked[1:]


def loader_speed(dataset, config, seconds=2.0):
    """Images a second of the loader alone, over consecutive steps."""
    from ddpm_jax import data, parallel

    begun, step = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds:
        parallel.shard(data.batch(dataset, config.seed, step, config.batch_size))
        step += 1
    return step * config.batch_size / took


def resident():
    """The most memory that the process has had so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def measure_sampling(parts, rounds, steps):
    """The lines about the sampler: one of its steps against one pass of the network over the same images."""
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

    def whole():
        clock = time.perf_counter()
        jax.block_until_ready(generate(params, root, index, label))
        return (time.perf_counter() - clock) / steps

    forward = jax.vmap(lambda params, x, t, label: parts.net(params, x, t, label=label), (None, 0, None, 0))
    forward = jax.pmap(forward, axis_name=parallel.AXIS, in_axes=(None, 0, None, 0))
    x, t = jax.random.normal(root, (*index.shape, *parts.shape)), jnp.asarray(parts.schedule.times(steps)[0])
    bare = repeated(lambda x: forward(params, x, t, label), x)
    whole()  # compiles
    bares, wholes = [bare()], []
    for _ in range(rounds):
        wholes.append(whole())
        bares.append(bare())
    line(
        f"bare pass of the network, {len(indices)} images",
        spread([1e3 * seconds for seconds in bares], "{:.2f}") + " ms",
    )
    name = f"sampling step / bare pass, {parts.config.train.sampler}, {steps} steps"
    line(name, spread(map(operator.truediv, wholes, around(bares))), "under 1.1")


if __name__ == "__main__":
    sys.exit(errors.run(main))

"""Memory against time: python -m benchmarks.variants [--config=configs/digits.py] [--rounds=5]

A Markdown table of the compiled training step with options that trade one for the other: each row changes one option of
the config. `held` is the memory that a device keeps from step to step, `used` what a step needs in addition. The rows
alternate in rounds; the ratio is to the first row of the same round. Medians, with minimum and maximum in brackets.
"""

import dataclasses
import statistics
import sys
import time

from benchmarks.__main__ import BenchmarkArgs, make_timer, median_and_range
from ddpm_jax import config as configs
from ddpm_jax import errors, options

CHANGES = [
    {},
    {"train.accumulate": 2},
    {"train.accumulate": 4},
    {"model.remat": True},
    {"model.dtype": "bfloat16"},
    {"train.steps_per_call": 5},
]


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    rounds: int = options.option(5, "measurements of each row", options.at_least(1))
    platform: str = options.option(*options.PLATFORM)


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.variants", __doc__, configs.load)

    import jax

    from ddpm_jax import parallel
    from ddpm_jax.run import log

    jax.config.update("jax_enable_compilation_cache", False)
    batch_size = args.config.train.batch_size
    parallel.start(batch_size, 4, args.platform, "off", args.cpu_devices)
    parallel.check_batch_size(batch_size, 4)
    log.note(f"{parallel.describe()}, jax {jax.__version__}, {args.config_file}, {batch_size} images a step\n")
    rows = [prepare(options.replace(args.config, change)) for change in CHANGES]
    seconds = [[time_step() for _, time_step in rows] for _ in range(args.rounds)]
    log.note("| change | compilation | held | used | ms a step | ratio |\n|---|---:|---:|---:|---:|---:|")
    for i, (change, (cells, _)) in enumerate(zip(CHANGES, rows, strict=True)):
        name = ", ".join(f"`{name}={value}`" for name, value in change.items()) or "none"
        milliseconds = median_and_range([1e3 * times[i] for times in seconds], "{:.0f}")
        ratio = statistics.median(times[i] / times[0] for times in seconds)
        log.note(f"| {name} | {cells} | {milliseconds} | {ratio:.2f} |")
    return 0


def prepare(config):
    """(cells about the compiled step, a function that makes one call and returns the seconds of a step)."""
    import jax
    import numpy as np

    from ddpm_jax import keys, parallel, training
    from ddpm_jax.commands.dry_run import synthetic_batch

    parts, batch = synthetic_batch(config)
    number = config.train.steps_per_call
    batch = jax.tree.map(lambda x: np.stack([x] * number, 1), parallel.shard(batch))
    state, root = parallel.replicate(parts.init_state()), keys.root(0, "train")
    lowered = parallel.pmap_step(training.scan_steps(parts.train_step)).lower(state, batch, root)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    time_call = make_timer(lambda state: compiled(state, batch, root)[0], state, 1)
    sizes = " | ".join(f"{n / 1e6:,.0f} MB" for n in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    return f"{seconds:.0f} s | {sizes}", lambda: time_call() / number


if __name__ == "__main__":
    sys.exit(errors.run(main))

"""Memory against time: python -m benchmarks.variants [--config=configs/digits.py] [--rounds=5]

A Markdown table of the compiled training step with options that trade one for the other: each row changes one option of
the config. `held` is what a device keeps from step to step, `used` what a step needs beside it; times are of rounds in
which all rows take turns, the ratio that to the first row of the same round: medians, least and most in brackets.
"""

import dataclasses
import statistics
import sys
import time

from benchmarks.__main__ import spread
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
class Args(options.Arguments):
    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    rounds: int = options.option(5, "turns of all rows", options.at_least(1))
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    cpu_devices: int = options.option(0, "as how many devices a CPU is used; 0 for one a core", options.at_least(0))
    debug: bool = options.option(False, "show tracebacks")


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
    seconds = [[step() for _, step in rows] for _ in range(args.rounds)]
    log.note("| change | compilation | held | used | ms a step | ratio |\n|---|---:|---:|---:|---:|---:|")
    for i, (change, (cells, _)) in enumerate(zip(CHANGES, rows, strict=True)):
        name = ", ".join(f"`{name}={value}`" for name, value in change.items()) or "none"
        times = spread([1e3 * turn[i] for turn in seconds], "{:.0f}")
        log.note(f"| {name} | {cells} | {times} | {statistics.median(turn[i] / turn[0] for turn in seconds):.2f} |")
    return 0


def prepare(config):
    """(cells of the table about the compiled step, a function that takes a call and gives the seconds of a step)."""
    import jax
    import numpy as np

    from ddpm_jax import keys, parallel, training
    from ddpm_jax.commands.dry_run import synthetic_batch

    parts, batch = synthetic_batch(config)
    number = config.train.steps_per_call
    batch = jax.tree.map(lambda x: np.stack([x] * number, 1), parallel.shard(batch))
    state, root = parallel.replicate(parts.init_state()), keys.root(0, "train")
    lowered, clock = (
        parallel.pmap_step(training.scan_steps(parts.train_step)).lower(state, batch, root),
        time.perf_counter(),
    )
    compiled = lowered.compile()
    took, memory = time.perf_counter() - clock, compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes

    def step():
        nonlocal state
        clock = time.perf_counter()
        state, metrics = compiled(state, batch, root)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - clock) / number

    step()
    return f"{took:.0f} s | " + " | ".join(f"{size / 1e6:,.0f} MB" for size in sizes), step


if __name__ == "__main__":
    sys.exit(errors.run(main))

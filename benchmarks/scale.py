"""Weak scaling: python -m benchmarks.scale [--config=configs/digits.py] [--share=16] [--rounds=8]

A Markdown table of the training step on 1, 2, 4 ... devices with `share` images each; all of them alternate. A CPU is
split into eight devices that share its cores. A step of d devices on c cores ideally takes d / min(c, d) times that of
one device; the last column is the measured time over this. On an accelerator it shows the cost of gradient exchange.
"""

import dataclasses
import os
import statistics
import sys

from benchmarks.__main__ import BenchmarkArgs, make_timer, median_and_range
from ddpm_jax import config as configs
from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    share: int = options.option(16, "images on each device", options.at_least(1))
    rounds: int = options.option(8, "measurements of each number of devices", options.at_least(1))
    block: int = options.option(5, "steps in a measurement", options.at_least(1))
    cpu_devices: int = options.option(8, "number of devices that a CPU is split into", options.at_least(1))


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.scale", __doc__, configs.load)

    import jax

    from ddpm_jax import parallel
    from ddpm_jax.run import log

    parallel.start(args.share, 1, "auto", "off", args.cpu_devices)
    cores = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else jax.device_count()
    log.note(f"{parallel.describe()}, {cores} cores or chips, {args.config_file}, {args.share} images a device\n")
    numbers = [2**i for i in range(jax.device_count().bit_length())]
    rows = [prepare(args, jax.devices()[:n]) for n in numbers]
    seconds = [[time_step() for _, time_step in rows] for _ in range(args.rounds)]
    log.note("| devices | exchange in the program | ms a step | over the share of the cores |\n|---:|---|---:|---:|")
    for i, (n, (exchange, _)) in enumerate(zip(numbers, rows, strict=True)):
        ideal = n / min(n, cores)
        ratio = statistics.median(times[i] / times[0] / ideal for times in seconds)
        milliseconds = median_and_range([1e3 * times[i] for times in seconds], "{:.0f}")
        log.note(f"| {n} | {exchange} | {milliseconds} | {ratio:.2f} |")
    return 0


def prepare(args, devices):
    """(the collectives of the compiled step as text, a function that returns the seconds of a step)."""
    import jax

    from ddpm_jax import keys, parallel
    from ddpm_jax.commands.dry_run import collectives, synthetic_batch

    parts, batch = synthetic_batch(options.replace(args.config, {"train.batch_size": args.share * len(devices)}))
    batch = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)
    state, root = parallel.replicate(parts.init_state(), devices), keys.root(0, "train")
    compiled = parallel.pmap_step(parts.train_step, devices).lower(state, batch, root).compile()
    found = collectives(compiled.as_text())
    text = ", ".join(f"{number} {name} of {size / 1e6:.1f} MB" for name, (number, size) in found.items()) or "none"
    return text, make_timer(lambda state: compiled(state, batch, root)[0], state, args.block)


if __name__ == "__main__":
    sys.exit(errors.run(main))

"""What do more devices cost? python -m benchmarks.scale [--config=configs/digits.py] [--share=16] [--rounds=8]

A Markdown table of the training step on 1, 2, 4 ... devices that each have `share` images, in turns. A CPU shows itself
as eight devices that share its cores: a step of d devices on c cores has to take d / min(c, d) times that of one; the
last column is how much longer it takes. On an accelerator the column says what is lost to the exchange of gradients.
"""

import dataclasses
import os
import statistics
import sys
import time

from benchmarks.__main__ import spread
from ddpm_jax import config as configs
from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    share: int = options.option(16, "images a device", options.at_least(1))
    rounds: int = options.option(8, "turns of all numbers of devices", options.at_least(1))
    block: int = options.option(5, "steps in a turn", options.at_least(1))
    cpu_devices: int = options.option(8, "as how many devices a CPU is used", options.at_least(1))
    debug: bool = options.option(False, "show tracebacks")


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
    seconds = [[step() for _, step in rows] for _ in range(args.rounds)]
    log.note("| devices | exchange in the program | ms a step | over the share of the cores |\n|---:|---|---:|---:|")
    for i, (n, (exchange, _)) in enumerate(zip(numbers, rows, strict=True)):
        work = n / min(n, cores)
        lost = statistics.median(turn[i] / turn[0] / work for turn in seconds)
        log.note(f"| {n} | {exchange} | {spread([1e3 * turn[i] for turn in seconds], '{:.0f}')} | {lost:.2f} |")
    return 0


def prepare(args, devices):
    """(the collectives of the compiled step in words, a function that gives the seconds of a step)."""
    import jax

    from ddpm_jax import keys, parallel
    from ddpm_jax.commands.dry_run import collectives, synthetic_batch

    parts, batch = synthetic_batch(options.replace(args.config, {"train.batch_size": args.share * len(devices)}))
    batch = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)
    state, root = parallel.replicate(parts.init_state(), devices), keys.root(0, "train")
    compiled = parallel.pmap_step(parts.train_step, devices).lower(state, batch, root).compile()
    found = collectives(compiled.as_text())
    words = ", ".join(f"{number} {name} of {size / 1e6:.1f} MB" for name, (number, size) in found.items()) or "none"

    def step():
        nonlocal state
        clock = time.perf_counter()
        for _ in range(args.block):
            state, metrics = compiled(state, batch, root)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - clock) / args.block

    step()
    return words, step


if __name__ == "__main__":
    sys.exit(errors.run(main))

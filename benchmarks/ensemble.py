"""Several runs at once against one after another: python -m benchmarks.ensemble [--config=FILE] [--members=2]

One call of the program that trains an ensemble, and as many calls of the program of a single run as there are members,
in turns: seconds for a step of all members, medians, with the least and the most in brackets. A CPU shows one device a
core to both: the single run divides its batch over them, the ensemble its members.
"""

import dataclasses
import operator
import sys
import time

from benchmarks.__main__ import around, line, spread
from ddpm_jax import config as configs
from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    config: configs.Config = dataclasses.field(default_factory=configs.Config)
    config_file: str = "configs/digits.py"
    members: int = options.option(2, "runs", options.at_least(2))
    rounds: int = options.option(
        8, "blocks of steps of the ensemble, each between two of single runs", options.at_least(1)
    )
    block: int = options.option(10, "steps in a block", options.at_least(1))
    cpu_devices: int = options.option(0, "as how many devices a CPU is used; 0 for one a core", options.at_least(0))
    debug: bool = options.option(False, "show tracebacks")


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.ensemble", __doc__, configs.load)

    import jax

    from ddpm_jax import data, parallel, program
    from ddpm_jax.commands.dry_run import synthetic_batch
    from ddpm_jax.run import log

    train = args.config.train
    parallel.start(train.batch_size, 1, "auto", "off", args.cpu_devices)
    log.note(
        f"{parallel.describe()}, jax {jax.__version__}, {args.config_file}, {train.batch_size} images a step each\n"
    )
    measures = []
    for members in (args.members, 1):
        parts, batch = synthetic_batch(options.replace(args.config, {"train.ensemble": members}))
        made = program.make(parts, data.Dataset(batch["image"], batch.get("label")))
        measures.append(repeated(made, args.block, args.members // members))
    together, apart = measures
    mine, others = [], [apart()]
    for _ in range(args.rounds):
        mine.append(together())
        others.append(apart())
    line(f"{args.members} members at once", spread([1e3 * s for s in mine], "{:.1f}") + " ms")
    line(f"{args.members} runs one after another", spread([1e3 * s for s in others], "{:.1f}") + " ms")
    line("at once / one after another", spread(map(operator.truediv, mine, around(others))))
    return 0


def repeated(made, block, times):
    """A function that measures the seconds of `times` steps of a Program, over a block of them."""
    import jax

    state, batches = made.place(made.init_state()), made.batches(range(1), 0)

    def measure():
        nonlocal state
        clock = time.perf_counter()
        for _ in range(block * times):
            state, metrics = made.step(state, batches, 0)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - clock) / block

    measure()
    return measure


if __name__ == "__main__":
    sys.exit(errors.run(main))

"""Training an ensemble against training its members one by one: python -m benchmarks.ensemble [--members=2]

Alternates one call of the ensemble's program with one call per member of a single run's program. The table shows the
time of one step of all members: medians, with minimum and maximum in brackets. On a CPU both see one device per core:
the single run divides its batch over them, the ensemble its members.
"""

import dataclasses
import operator
import sys

from benchmarks.__main__ import BenchmarkArgs, alternate, make_timer, means_of_neighbours, median_and_range, print_row
from ddpm_jax import config as configs
from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    members: int = options.option(2, "number of runs", options.at_least(2))
    rounds: int = options.option(8, "blocks of ensemble steps, each between two of single runs", options.at_least(1))
    block: int = options.option(10, "steps in a block", options.at_least(1))


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
    timers = []
    for members in (args.members, 1):
        parts, batch = synthetic_batch(options.replace(args.config, {"train.ensemble": members}))
        built = program.make(parts, data.Dataset(batch["image"], batch.get("label")))
        timers.append(time_steps(built, args.block, args.members // members))
    ensemble, single = alternate(*timers, args.rounds)
    print_row(f"{args.members} members at once", median_and_range([1e3 * s for s in ensemble], "{:.1f}") + " ms")
    print_row(f"{args.members} runs one after another", median_and_range([1e3 * s for s in single], "{:.1f}") + " ms")
    ratios = map(operator.truediv, ensemble, means_of_neighbours(single))
    print_row("at once / one after another", median_and_range(ratios))
    return 0


def time_steps(built, block, steps):
    """A function that returns the seconds of `steps` steps of a Program, averaged over a block."""
    batches = built.batches(range(1), 0)
    state = built.place(built.init_state())
    measure = make_timer(lambda state: built.step(state, batches, 0)[0], state, block * steps)
    return lambda: steps * measure()


if __name__ == "__main__":
    sys.exit(errors.run(main))

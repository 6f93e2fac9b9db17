"""Networks that nobody chose, compared with diffusers: python -m benchmarks.nets [--num=20] [--seed=0]

A Markdown table of the training step of random U-Nets, each measured as in benchmarks.peers: widths, sides (also those
that are no power of two), levels, blocks, colours and batch sizes are drawn. A network is drawn again if its step has
more than --most GFLOP, by an estimate. Ratios are ours / theirs: medians, with minimum and maximum in brackets; then
the ratio of the peak memory, and the difference of the outputs, relative to the largest.
"""

import dataclasses
import statistics
import sys

import numpy as np

from benchmarks.__main__ import median_and_range
from benchmarks.peers import THEIR_PYTHON, THREADS, difference, measure_training, processes
from ddpm_jax import config as configs
from ddpm_jax import errors, options

CHANNELS = range(24, 97, 8)
SIDES = range(16, 65, 4)
BATCHES = 8, 12, 16, 24, 32, 48, 64, 96, 128


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    num: int = options.option(20, "networks", options.at_least(1))
    seed: int = options.option(0, "seed of the choice of networks", options.at_least(0))
    most: float = options.option(100.0, "estimated GFLOP of a training step, at most", options.at_least(1))
    rounds: int = options.option(5, "blocks of ours, each between two of theirs", options.at_least(1))
    block: int = options.option(2, "training steps in a block", options.at_least(1))
    their_python: str = options.option(*THEIR_PYTHON)
    threads: int = options.option(*THREADS)
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.nets", __doc__)

    from ddpm_jax import parallel
    from ddpm_jax.commands.dry_run import synthetic_batch
    from ddpm_jax.run import log

    parallel.start(1, 1, "cpu", "off")
    random, ratios = np.random.default_rng(args.seed), []
    for i in range(args.num):
        config = random_net(random, 1e9 * args.most)
        parts, batch = synthetic_batch(config)
        with processes(parts, batch["image"], args) as pair:
            seconds, (ours, theirs) = measure_training(pair, args)
            cells = f"{ours / theirs:.2f} | {difference(pair, parts.shape):.0e}"
        if not i:
            log.note("\n".join(pair.about) + "\n\n" + HEADER)
        ratios.append(statistics.median(seconds.ratios()))
        milliseconds = " | ".join(f"{1e3 * statistics.median(s):,.0f}" for s in seconds)
        log.note(f"| {describe(config)} | {milliseconds} | {median_and_range(seconds.ratios(), '{:.2f}')} | {cells} |")
    log.note(
        f"\nours / theirs of {args.num} networks: median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}"
    )
    return 0


HEADER = """\
| channels | levels | blocks | attention | images | batch | ours, ms | theirs, ms | ours / theirs | memory | outputs |
|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"""


def describe(config):
    """The cells of a row that name the network."""
    model, (side,) = config.model, config.data.image_size
    levels, attention = (options.to_text(x) or "-" for x in (model.multipliers, model.attention_resolutions))
    images = f"{side}x{side}x{config.data.channels}"
    return f"{model.channels} | {levels} | {model.num_res_blocks} | {attention} | {images} | {config.train.batch_size}"


def random_net(random, most):
    """A Config with a random U-Net, image size and batch size that both libraries accept, of at most `most` FLOP."""
    batch = int(random.choice(BATCHES))
    while True:
        for _ in range(100):
            config = draw_net(random, batch)
            if training_flops(config) <= most:
                return config
        batch = max(min(BATCHES), batch // 2)  # few networks are small enough for this batch


def draw_net(random, batch):
    """A Config with a random U-Net and image size.

    The number of groups divides the channels, and so all widths: in diffusers it is the same in the whole network.
    """
    from ddpm_jax.networks.unet import largest_divisor

    levels, channels = int(random.integers(2, 5)), int(random.choice(CHANNELS))
    side = int(random.choice([side for side in SIDES if side % 2 ** (levels - 1) == 0]))
    lowest = side >> levels - 1
    drawn = {
        "data.image_size": (side,),
        "data.channels": int(random.choice([1, 3])),
        "model.channels": channels,
        "model.multipliers": (1, *sorted(random.integers(1, 5, levels - 1).tolist())),
        "model.num_res_blocks": int(random.integers(1, 3)),
        "model.attention_resolutions": (lowest,) if random.random() < 0.5 else (),  # one is always in the middle
        "model.groups": largest_divisor(channels),
        "model.dropout": 0.0,
        "diffusion.variance": "fixedsmall",
        "train.batch_size": batch,
    }
    return options.replace(configs.Config(), drawn)


def training_flops(config):
    """The FLOP of a training step of square images, to about a fifth: three passes of convolutions and attention."""
    model, (side,) = config.model, config.data.image_size
    total = 0
    for level, multiplier in enumerate(model.multipliers):
        width, pixels = model.channels * multiplier, (side >> level) ** 2
        lowest = level == len(model.multipliers) - 1
        # Two convolutions a block, of which the first has about twice the channels as input on the way up.
        convolutions = 2 * model.num_res_blocks + 3 * (model.num_res_blocks + 1) + 4 * lowest
        attentions = (2 * model.num_res_blocks + 1) * (side >> level in model.attention_resolutions) + lowest
        total += convolutions * 9 * width**2 * pixels + attentions * (4 * width**2 * pixels + 2 * width * pixels**2)
    return 3 * 2 * config.train.batch_size * total


if __name__ == "__main__":
    sys.exit(errors.run(main))

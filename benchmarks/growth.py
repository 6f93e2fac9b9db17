"""Growth of time and memory beside diffusers: python -m benchmarks.growth [--config=configs/digits.py]

Markdown tables of the training step and of the peak memory over the image's side, the batch and the width, one at a
time, for the config's network with attention in the middle only; each point is measured as in benchmarks.peers, in new
processes. The last rows are the exponent (the slope of a line through the logarithms) and the largest slope between
neighbours. A point is left out if, judging by the one before, its step would take more than --most seconds.
"""

import dataclasses
import itertools
import statistics
import sys

import numpy as np

from benchmarks.__main__ import BenchmarkArgs, median_and_range
from benchmarks.nets import training_flops
from benchmarks.peers import THEIR_PYTHON, THREADS, ProcessEnded, measure_training, processes
from ddpm_jax import config as configs
from ddpm_jax import errors, options


@dataclasses.dataclass(frozen=True)
class Args(BenchmarkArgs):
    side: int = options.option(16, "side of the images where it does not vary", options.at_least(2))
    batch: int = options.option(16, "images in a batch where it does not vary", options.at_least(1))
    sides: tuple[int, ...] = options.option(
        (8, 16, 32, 64, 128, 256), "sides of the images", options.all_of(options.at_least(2))
    )
    batches: tuple[int, ...] = options.option(
        (8, 16, 32, 64, 128, 256, 512), "images in a batch", options.all_of(options.at_least(1))
    )
    channels: tuple[int, ...] = options.option(
        (16, 32, 64, 128), "widths of the first level", options.all_of(options.at_least(2))
    )
    most: float = options.option(5.0, "seconds of a training step, at most", options.above(0))
    rounds: int = options.option(3, "blocks of ours, each between two of theirs", options.at_least(1))
    block: int = options.option(2, "training steps in a block", options.at_least(1))
    plot: str = options.option("", "file of the figure, such as growth.png; none if not given")
    their_python: str = options.option(*THEIR_PYTHON)
    threads: int = options.option(*THREADS)


def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.growth", __doc__, configs.load)

    from ddpm_jax import parallel
    from ddpm_jax.plots import figures

    if args.plot:
        figures.require_matplotlib()
    parallel.start(1, 1, "cpu", "off")
    axes = {
        "side of the images": [(side, args.batch, args.config.model.channels) for side in args.sides],
        "images in a batch": [(args.side, batch, args.config.model.channels) for batch in args.batches],
        "channels of the first level": [(args.side, args.batch, channels) for channels in args.channels],
    }
    found = {}
    for axis, (name, points) in enumerate(axes.items()):
        found[name] = measure_axis(args, name, axis, points)
    if args.plot:
        with errors.writing(f"--plot={args.plot}"), open(args.plot, "wb") as file:
            file.write(figures.png(draw(found)))
    return 0


def measure_axis(args, name, axis, points):
    """Print the table over one axis; the points that were measured as rows (x, our s, their s, our MB, their MB)."""
    from ddpm_jax.run import log

    log.note(f"| {name} | ours, ms | diffusers, ms | ours / theirs | ours, MB | diffusers, MB |\n|---:|{'---:|' * 5}")
    rows, before, about = [], None, ()
    for point in sorted(points):
        config, x = make_config(args.config, *point), point[axis]
        flops = training_flops(config)
        expected = max(rows[-1][1:3]) * flops / before if rows else 0
        if expected > args.most:
            log.note(f"| {x} | left out: about {expected:,.1f} s a step | | | | |")
            continue
        try:
            seconds, memory, about = measure_point(config, args)
        except ProcessEnded as error:
            log.note(f"| {x} | {error} | | | | |")
            break
        rows.append((x, *map(statistics.median, seconds), *memory))
        before = flops
        times = " | ".join(f"{1e3 * s:,.1f}" for s in rows[-1][1:3])
        ratios, sizes = median_and_range(seconds.ratios(), "{:.2f}"), " | ".join(f"{size:,.0f}" for size in memory)
        log.note(f"| {x} | {times} | {ratios} | {sizes} |")
    if len(rows) > 1:
        for title, slope in (("exponent", exponent), ("largest slope", largest_slope)):
            ours, theirs, *sizes = (f"{slope(*pair):.2f}" for pair in column_pairs(rows))
            log.note(f"| {title} | {ours} | {theirs} | | {' | '.join(sizes)} |")
    log.note("\n" + ", ".join(about) + "\n")
    return rows


def measure_point(config, args):
    """What `measure_training` returns, and the text about both, from new processes."""
    from ddpm_jax.commands.dry_run import synthetic_batch

    parts, batch = synthetic_batch(config)
    with processes(parts, batch["image"], args) as pair:
        return *measure_training(pair, args), pair.about


def make_config(config, side, batch, channels):
    """`config` for these images, batch and width; its network keeps its levels, with attention in the middle only."""
    from ddpm_jax.networks.unet import largest_divisor

    changes = {
        "data.image_size": (side,),
        "data.channels": config.data.channels or 1,
        "train.batch_size": batch,
        "model.channels": channels,
        "model.groups": largest_divisor(channels),
        "model.attention_resolutions": (),
    }
    return options.replace(config, changes)


def column_pairs(rows):
    """(x, y) of each column but the first of `rows`."""
    x, *columns = map(np.array, zip(*rows, strict=True))
    return [(x, y) for y in columns]


def exponent(x, y):
    """The p of the power law y = a x^p nearest to the points, by least squares of the logarithms."""
    return np.polyfit(np.log(x), np.log(y), 1)[0]


def largest_slope(x, y):
    """The largest exponent between two neighbours."""
    return max(np.log(d / c) / np.log(b / a) for (a, c), (b, d) in itertools.pairwise(zip(x, y, strict=True)))


def draw(found):
    """A Figure of `found`, {axis: rows}: time and memory of both, with logarithmic axes."""
    from ddpm_jax.plots import figures

    panels = []
    for name, rows in found.items():
        pairs = column_pairs(rows)
        for (x, ours), (_, theirs), label in ((*pairs[:2], "seconds a step"), (*pairs[2:], "peak memory (MB)")):
            panels.append((name, x, label, {"ours": ours, "diffusers": theirs}, "log"))
    figure = figures.curves(*panels)
    figure.set_size_inches(4 * len(panels), 3)
    for axes, (_, x, *_) in zip(figure.axes, panels, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, map(str, x))
    return figure


if __name__ == "__main__":
    sys.exit(errors.run(main))

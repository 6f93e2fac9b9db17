"""Which sampler in how many steps? python -m benchmarks.samplers --workdir=runs/digits [--num=1000] [--out=FILE.md]

A Markdown table of what a trained run gives with each sampler, and in few steps with other spacings of the times:

evaluations     of the network for an image, counted while the compiled sampler runs on a network that only counts
ms an image     the median over the batches, without compilation
KID x 1000      of the samples to the real images, on their pixels, with the standard error over tenths of the samples
sure            share of the samples of whose class a classifier trained on the real images is sure, if these have any

The first row judges real images: one half against the other, and by a classifier that has not seen them. Image i starts
from the same noise in every row. The table goes to stdout row by row, and to --out at the end; all else to stderr.
"""

import contextlib
import dataclasses
import functools
import statistics
import sys
import time

import numpy as np

from ddpm_jax import errors, options
from ddpm_jax.evaluation import metrics
from ddpm_jax.run import log
from ddpm_jax.run.files import expand, write_atomic

SAMPLERS = [("ddpm", {"variance": "fixedsmall"}), ("ddpm", {"variance": "fixedlarge"})]
SAMPLERS += [(name, {}) for name in ("ddim", "dpmpp_2m", "dpmpp_3m", "heun", "edm")]
SPACED, SPACINGS, FEW = ("dpmpp_2m", "dpmpp_3m", "heun"), ("logsnr", "karras"), 20  # tried in up to so many steps
SURE, TENTHS, REAL = 0.8, 10, 5000  # a probability; parts of the samples; the most real images that are looked at
HEAD = "sampler", "spacing", "steps", "evaluations", "ms an image", "KID x 1000", f"over {SURE:.0%} sure"


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run")
    num: int = options.option(1000, "samples a row", options.at_least(2 * TENTHS))
    steps: tuple[int, ...] = options.option((10, 20, 50, 1000), "numbers of steps", options.all_of(options.at_least(1)))
    weights: str = options.option("ema", "averaged or plain parameters", options.one_of("ema", "raw"))
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "a file for the table as well")
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    debug: bool = options.option(False, "show tracebacks")


@log.quiet()
def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.samplers", __doc__)
    with contextlib.redirect_stdout(sys.stderr):
        table = measure(args, functools.partial(print, file=sys.__stdout__, flush=True))
    if args.out:
        try:
            write_atomic(expand(args.out), table.encode())
        except OSError as error:
            raise errors.ConfigError(f"cannot write to --out={args.out}: {error.strerror}") from error
    return 0


def measure(args, say):
    """The table, of which each line is also said at once."""
    from ddpm_jax import data, experiment, keys, parallel
    from ddpm_jax.run import checkpoint

    parallel.start(args.batch_size, platform=args.platform, distributed="off")
    workdir, lines = expand(args.workdir), []
    parts, params, step = experiment.restore(workdir, args.weights)
    rows = list(choices(parts, sorted(set(args.steps))))
    machine = f"{parallel.describe()}, jax {checkpoint.versions()['jax']}"
    log.note(f"step {step:,} of {workdir}, {args.weights} weights, {args.num} samples a row; {machine}")
    real_cells, judge = make_judge(data.load(**vars(parts.config.data)), args.num // TENTHS)

    def add(*cells):
        lines.append(f"| {' | '.join(map(str, cells))} |")
        say(lines[-1])

    add(*HEAD[: 5 + len(real_cells)])
    add(*["---"] * 2, *["---:"] * (3 + len(real_cells)))
    add("real images", *[""] * 4, *real_cells)
    params, root, indices = parallel.replicate(params), keys.root(0, "sample"), np.arange(args.num)
    labels = experiment.cyclic_labels(parts, indices)
    for name, spacing, steps, make in rows:
        generate, seconds = timed(parallel.pmap_generate(make(parts)))
        batches = parallel.generate_batches(generate, params, root, indices, labels, args.batch_size)
        cells = judge(np.concatenate([batch[:, -1] for batch in batches]))
        took = f"{1e3 * statistics.median(seconds):.2f}"
        add(name, spacing, steps, evaluations(parts, make), took, *cells)
    return "".join(line + "\n" for line in lines)


def choices(parts, numbers):
    """(sampler, spacing, steps, parts -> generate) of each row; ConfigError for a number of steps that cannot be."""
    from ddpm_jax import experiment

    for steps in numbers:
        for name, own in SAMPLERS:
            for spacing in ("trailing", *(SPACINGS if name in SPACED and steps <= FEW else ())):
                make = functools.partial(experiment.make_generate, sampler=name, steps=steps, spacing=spacing, **own)
                make(parts)  # refuses
                yield " ".join([name, *own.values()]), spacing, steps, make


def timed(generate):
    """(generate, seconds): the pmapped `generate`, compiled beforehand; it notes the seconds an image of each batch."""
    import jax

    compiled, seconds = None, []

    def call(params, root, index, label):
        nonlocal compiled
        compiled = compiled or generate.lower(params, root, index, label).compile()
        clock = time.perf_counter()
        done = jax.block_until_ready(compiled(params, root, index, label))
        seconds.append((time.perf_counter() - clock) / index.size)
        return done

    return call, seconds


def evaluations(parts, make):
    """How often the compiled sampler asks the network for an image, told by a network that counts and puts out 0."""
    import jax
    import jax.numpy as jnp

    from ddpm_jax import experiment

    calls = []

    def net(params, x, t, key=None, label=None):
        jax.debug.callback(lambda: calls.append(1))  # once for the whole batch
        return jnp.zeros(jax.eval_shape(functools.partial(parts.net, label=label), params, x, t).shape)

    params = experiment.params_shape(parts)
    generate = jax.vmap(functools.partial(make(parts._replace(net=net)), params), (None, 0, None))
    jax.block_until_ready(jax.jit(generate)(jax.random.key(0), np.arange(2), 0))
    jax.effects_barrier()
    return len(calls)


def make_judge(dataset, size):
    """(cells of the real images, images -> cells): the KID of subsets of `size`; with labels, the share of the sure."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    chosen = np.random.default_rng(0).permutation(len(dataset.images))[:REAL]
    real = points(dataset.images[chosen])
    cells = [spread(*np.array_split(real, 2), size)]
    if dataset.labels is None:
        return cells, lambda images: [spread(points(images), real, size)]
    labels, model = dataset.labels[chosen], CalibratedClassifierCV(SVC(), ensemble=False)
    unseen = cross_val_predict(model, real, labels, method="predict_proba")
    model.fit(real, labels)

    def judge(images):
        return [spread(points(images), real, size), sure(model.predict_proba(points(images)))]

    return [*cells, sure(unseen)], judge


def sure(probabilities):
    return f"{np.mean(probabilities.max(1) > SURE):.1%}"


def points(images):
    """uint8 (N, H, W, C) as float64 (N, d) in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


def spread(x, y, size):
    """The mean KID of disjoint parts of x, each of about `size`, to all of y, and its standard error."""
    value, error, _ = metrics.kid_in_parts(x, y, size)
    return f"{1000 * value:.1f} ± {1000 * error:.1f}"


if __name__ == "__main__":
    sys.exit(errors.run(main))

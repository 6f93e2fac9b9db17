"""Which sampler in how many steps? python -m benchmarks.samplers --workdir=runs/digits [--num=1000] [--out=FILE.md]

A Markdown table of a trained run with each sampler, and for few steps with other spacings of the times:

evaluations     network evaluations per image, counted by running the compiled sampler on a network that only counts
ms an image     median over the batches, without compilation
KID x 1000      between samples and real images, on pixels, with the standard error over tenths of the samples
sure            share of samples that a classifier trained on the real images is sure of, if these have labels

The first row is for real images: one half against the other, classified by cross-validation. Image i starts from the
same noise in every row. The table goes to stdout row by row, and to --out at the end; everything else to stderr.
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
SPACED, SPACINGS, FEW = ("dpmpp_2m", "dpmpp_3m", "heun"), ("logsnr", "karras"), 20  # spacings tried up to FEW steps
SURE, TENTHS, REAL = 0.8, 10, 5000  # a probability; parts of the samples; largest number of real images
HEAD = "sampler", "spacing", "steps", "evaluations", "ms an image", "KID x 1000", f"over {SURE:.0%} sure"


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run")
    num: int = options.option(1000, "samples in a row", options.at_least(2 * TENTHS))
    steps: tuple[int, ...] = options.option((10, 20, 50, 1000), "numbers of steps", options.all_of(options.at_least(1)))
    weights: str = options.option("ema", "averaged or plain parameters", options.one_of("ema", "raw"))
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "file to write the table to as well")
    platform: str = options.option(*options.PLATFORM)
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.samplers", __doc__)
    with contextlib.redirect_stdout(sys.stderr):
        table = measure(args, functools.partial(print, file=sys.__stdout__, flush=True))
    if args.out:
        with errors.writing(f"--out={args.out}"):
            write_atomic(expand(args.out), table.encode())
    return 0


def measure(args, write):
    """The table as text; each line also goes to `write` as soon as it is known."""
    from ddpm_jax import data, experiment, keys, parallel
    from ddpm_jax.run import checkpoint

    parallel.start(args.batch_size, platform=args.platform, distributed="off")
    workdir, lines = expand(args.workdir), []
    parts, params, step = experiment.restore(workdir, args.weights)
    rows = list(choices(parts, sorted(set(args.steps))))
    machine = f"{parallel.describe()}, jax {checkpoint.versions()['jax']}"
    log.note(f"step {step:,} of {workdir}, {args.weights} weights, {args.num} samples a row; {machine}")
    real_cells, score = make_scorer(data.load(**vars(parts.config.data)), args.num // TENTHS)

    def add(*cells):
        lines.append(f"| {' | '.join(map(str, cells))} |")
        write(lines[-1])

    add(*HEAD[: 5 + len(real_cells)])
    add(*["---"] * 2, *["---:"] * (3 + len(real_cells)))
    add("real images", *[""] * 4, *real_cells)
    params, root, indices = parallel.replicate(params), keys.root(0, "sample"), np.arange(args.num)
    labels = experiment.cyclic_labels(parts, indices)
    for name, spacing, steps, make in rows:
        generate, seconds = timed(parallel.pmap_generate(make(parts)))
        batches = parallel.generate_batches(generate, params, root, indices, labels, args.batch_size)
        cells = score(np.concatenate([batch[:, -1] for batch in batches]))
        milliseconds = f"{1e3 * statistics.median(seconds):.2f}"
        add(name, spacing, steps, count_evaluations(parts, make), milliseconds, *cells)
    return "".join(line + "\n" for line in lines)


def choices(parts, numbers):
    """(sampler, spacing, steps, parts -> generate) of each row; ConfigError for an impossible number of steps."""
    from ddpm_jax import experiment

    for steps in numbers:
        for name, own in SAMPLERS:
            for spacing in ("trailing", *(SPACINGS if name in SPACED and steps <= FEW else ())):
                make = functools.partial(experiment.make_generate, sampler=name, steps=steps, spacing=spacing, **own)
                make(parts)  # checks the number of steps
                yield " ".join([name, *own.values()]), spacing, steps, make


def timed(generate):
    """(generate, seconds): the pmapped `generate`, which appends the seconds per image of each batch to the list."""
    import jax

    compiled, seconds = None, []

    def call(params, root, index, label):
        nonlocal compiled
        compiled = compiled or generate.lower(params, root, index, label).compile()
        start = time.perf_counter()
        images = jax.block_until_ready(compiled(params, root, index, label))
        seconds.append((time.perf_counter() - start) / index.size)
        return images

    return call, seconds


def count_evaluations(parts, make):
    """Network evaluations per image of the compiled sampler, counted by a network that returns 0."""
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


def make_scorer(dataset, size):
    """(cells of the real images, images -> cells): KID of subsets of `size`; with labels also the share above SURE."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    chosen = np.random.default_rng(0).permutation(len(dataset.images))[:REAL]
    real = flatten(dataset.images[chosen])
    cells = [kid(*np.array_split(real, 2), size)]
    if dataset.labels is None:
        return cells, lambda images: [kid(flatten(images), real, size)]
    labels, model = dataset.labels[chosen], CalibratedClassifierCV(SVC(), ensemble=False)
    held_out = cross_val_predict(model, real, labels, method="predict_proba")
    model.fit(real, labels)

    def score(images):
        return [kid(flatten(images), real, size), share_sure(model.predict_proba(flatten(images)))]

    return [*cells, share_sure(held_out)], score


def share_sure(probabilities):
    return f"{np.mean(probabilities.max(1) > SURE):.1%}"


def flatten(images):
    """uint8 (N, H, W, C) as float64 (N, d) in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


def kid(x, y, size):
    """The mean KID between disjoint parts of x, each of about `size`, and all of y, with its standard error."""
    value, error, _ = metrics.kid_of_subsets(x, y, size)
    return f"{1000 * value:.1f} ± {1000 * error:.1f}"


if __name__ == "__main__":
    sys.exit(errors.run(main))

"""Evaluate a trained run: python -m ddpm_jax evaluate --workdir=runs/digits --metrics=nll,kid,copies,moments --num=1000

Likelihood: nll, the variational bound in bits/dim; ode, bits/dim by the probability-flow ODE; mse, L_simple.
Samples: kid, fid, pr (precision and recall) on --features; copies of the data; moments of the colours. The samples are
those that sample.py draws with the same options, or those of --samples=FILE. The FID of the paper: --num=50000 samples
with --metrics=fid --features=inception against the whole training split, rounded to uint8, not mirrored.
The result is one JSON file, with everything that a number depends on beside it.
"""

import dataclasses
import json

from ddpm_jax import commands, errors, options
from ddpm_jax.run import log
from ddpm_jax.run.files import expand, write_atomic

LIKELIHOOD, SAMPLES = ("nll", "ode", "mse"), ("kid", "fid", "pr", "copies", "moments")
METRICS = LIKELIHOOD + SAMPLES


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run, or of one step of it")
    step: int = options.option(*options.STEP)
    metrics: tuple[str, ...] = options.option(
        ("nll",),
        "what to measure, of " + ",".join(METRICS),
        options.all_of(options.one_of(*METRICS)),
        ("at least one of " + ", ".join(METRICS), len),
    )
    num: int = options.option(1000, "number of samples; for nll, ode and mse of the first images", options.at_least(1))
    data: str = options.option("", "new location of the run's data, as in data.source; the old one when empty")
    other_data: bool = options.option(False, "accept data with another fingerprint than the run's")
    split: str = options.option("", "split of the data, as in data.split; the run's own when empty")
    weights: str = options.option(*options.WEIGHTS)
    member: int = options.option(*options.MEMBER)
    sampler: str = options.option("ddpm", "sampler of the samples, a name in ddpm_jax.samplers.SAMPLERS")
    steps: int = options.option(0, "number of steps for nll, mse and sampling; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "spacing of these steps, a name in ddpm_jax.schedules.SPACINGS")
    samples: str = options.option("", "npz file of images, or folder of shards, to evaluate instead of drawing samples")
    reference: str = options.option(
        "", "images to compare samples with, as in data.source; the run's own data when empty"
    )
    reference_num: int = options.option(0, "number of these images, evenly spaced; 0 for all", options.at_least(0))
    features: str = options.option(
        "enl0", "for kid, fid, pr and copies, a name in ddpm_jax.evaluation.features.EXTRACTORS"
    )
    inception: str = options.option("", "file of the weights of --features=inception (.pth, .safetensors, .npz)")
    ode_steps: int = options.option(100, "time steps of ode, at most T", options.at_least(2))
    decoder: str = options.option(
        "exact", "of nll's last step, a name in ddpm_jax.likelihood.DECODERS; tanh as in the paper's code"
    )
    divergence: str = options.option(
        "auto", "of ode, a name in ddpm_jax.likelihood.DIVERGENCES; auto is exact up to 16 dimensions"
    )
    seed: int = options.option(0, "seed of the noise and of the samples", options.at_least(0), options.below(2**32))
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "file to write; WORKDIR/evaluation.json, or beside --samples, when empty")
    overwrite: bool = options.option(False, "overwrite an existing file")
    platform: str = options.option(*options.PLATFORM)
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """Evaluate with the options `argv` (default: those of the command line); the exit code."""
    args = commands.parse(Args, argv, "evaluate", __doc__)

    from ddpm_jax import experiment, parallel
    from ddpm_jax.run import checkpoint, signals

    workdir, step = (None, None) if args.samples else experiment.find_run(args.workdir, args.step)
    samples = expand(args.samples)
    beside = samples.with_suffix(".json") if samples.is_file() else samples / "evaluation.json"
    out = expand(args.out or (beside if args.samples else workdir / "evaluation.json"))
    if out.exists() and not out.is_file():
        raise errors.ConfigError(f"--out={out} is a folder or a device; give the name of a file")
    if out.exists() and not args.overwrite:
        raise errors.ConfigError(f"{out} already exists; take another --out, or add --overwrite")
    parallel.start(args.batch_size, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    title, measure, record = prepare_samples(args) if args.samples else prepare_run(args, workdir, step)
    with errors.writing(f"--out={out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    record |= {"versions": checkpoint.versions(), "devices": parallel.describe()}
    log.note(f"{title}, {', '.join(args.metrics)}, {parallel.describe()}")
    with signals.catch(), parallel.memory_advice(f"try a --batch-size smaller than {args.batch_size}"):
        metrics = measure(log.rate_limited(log.note))
    for name, result in metrics.items():
        log.note(format_result(name, result))
    with errors.writing(f"--out={out}"):
        write_atomic(out, (json.dumps({"metrics": metrics} | record, indent=2, allow_nan=False) + "\n").encode())
    log.note(f"wrote {out}")
    return 0


def requested(args, kind):
    """The metrics of --metrics that are in `kind`."""
    return [name for name in dict.fromkeys(args.metrics) if name in kind]


def prepare_run(args, workdir, step):
    """(title, measure(say) -> metrics, entries for the result file) of the metrics of a run, after all checks."""
    from ddpm_jax import experiment

    parts, params, step = experiment.restore(workdir, args.weights, step, args.member)
    config, of_likelihood, of_samples = parts.config, requested(args, LIKELIHOOD), requested(args, SAMPLES)
    if args.data and args.reference and not of_likelihood:
        raise errors.ConfigError(f"--reference={args.reference} replaces --data={args.data}; leave one out")
    if args.data:
        config = dataclasses.replace(config, data=with_source(config.data, args.data))
    record = {"num": args.num, "split": args.split or config.data.split, "seed": args.seed, "weights": args.weights}
    record |= {"checkpoint_step": step}
    measures = [prepare_likelihood(args, config.data, parts, params, of_likelihood)] if of_likelihood else []
    measures += [prepare_drawn(args, config.data, parts, params, record)] if of_samples else []
    title = f"step {step:,} of {workdir}, {args.weights} weights, {args.num:,} images"
    record |= {"config": dataclasses.asdict(config)}
    return title, lambda say: {name: result for each in measures for name, result in each(say).items()}, record


def prepare_likelihood(args, config, parts, params, metrics):
    """measure(say) -> the metrics of the likelihood of images of a config.Data."""
    from ddpm_jax.evaluation import likelihood

    settings = args.steps, args.spacing, args.ode_steps, args.decoder, args.divergence
    plan, rows = likelihood.make_plan(parts, metrics, *settings), load_rows(args, parts, config)
    return lambda say: likelihood.report(parts, params, plan, rows, args.seed, args.batch_size, say)


def prepare_drawn(args, config, parts, params, record):
    """measure(say) -> the metrics of samples drawn from the run, against the images of a config.Data."""
    from ddpm_jax import program
    from ddpm_jax.evaluation import samples

    steps = args.steps or parts.config.diffusion.T
    draw = program.make_draw(parts, args.sampler, steps, args.spacing)
    measure_images = make_sample_metrics(args, config, args.num, parts.shape, parts)
    settings = record | {"sampler": args.sampler, "steps": steps, "spacing": args.spacing}

    def measure(say):
        batches = draw(params, args.num, args.seed, batch_size=args.batch_size)
        return measure_images(samples.collect(batches, args.num, parts.shape, say), settings, say)

    return measure


def prepare_samples(args):
    """prepare_run for the images of --samples."""
    from ddpm_jax import config as configs
    from ddpm_jax import data

    of_likelihood, record = requested(args, LIKELIHOOD), {"samples": args.samples}
    if of_likelihood:
        raise errors.ConfigError(f"--samples is for images, but {', '.join(of_likelihood)} is measured on a run")
    images = data.load(f"npz:{args.samples}").images
    if args.data:
        raise errors.ConfigError(f"--data={args.data} is for a run; --samples are compared with --reference")
    file, config = expand(args.workdir) / "config.json", configs.Data()
    if not args.reference:
        if not file.is_file():
            raise errors.ConfigError(f"--samples needs a --reference, or the --workdir of a run (no {file})")
        config = configs.from_json(file.read_text(errors="replace"), str(file)).data
    measure_images = make_sample_metrics(args, config, len(images), images.shape[1:])
    title = f"{args.samples}, {len(images):,} images"
    return title, lambda say: measure_images(images, record, say), record | {"num": len(images)}


def with_source(config, source):
    """The config.Data with another source; one of another kind resets the options for reading the old one."""
    from ddpm_jax.config import Data

    same_kind = source.partition(":")[0] == config.source.partition(":")[0]
    reset = {} if same_kind else {name: getattr(Data, name) for name in ("split", "range", "frames")}
    return dataclasses.replace(config, source=source, **reset)


def load(args, config, shape, parts=None):
    """The Dataset of a config.Data with --split, and with labels if the run of `parts` has classes.

    Raises ConfigError unless its images have that shape and, if there are `parts` and no --split, are the run's data.
    """
    from ddpm_jax import data

    if args.split not in ("", type(config).split) and config.source.startswith("npz:"):
        raise errors.ConfigError(f"--split={args.split}, but data.source={config.source} has no splits")
    dataset = data.load(**vars(dataclasses.replace(config, split=args.split or config.split)))
    if dataset.images.shape[1:] != shape:
        actual, expected = ("x".join(map(str, shape)) for shape in (dataset.images.shape[1:], shape))
        whose = "the samples have" if args.samples else "the run was trained on"
        raise errors.ConfigError(f"the data have images of {actual}, {whose} {expected}")
    if parts is None:
        return dataset
    dataset = data.with_labels(dataset, parts.config.model.num_classes)
    dataset = data.match_labels_to_run(dataset, config.source, parts.data, parts.classes)
    fingerprint = data.fingerprint(dataset)
    if parts.data not in (None, fingerprint) and not (args.split or args.other_data):
        raise errors.ConfigError(
            f"{config.source} is not the data of the run (which had {parts.data}, this is {fingerprint}); give the new "
            "location of the run's data by --data, or accept this by --other-data"
        )
    return dataset


def load_rows(args, parts, config):
    """{"index", "image", "label"?}: the first --num images of the run's training data, or of --split."""
    import numpy as np

    dataset = load(args, config, parts.shape, parts)
    num = len(dataset.images)
    if args.num > num:
        raise errors.ConfigError(f"--num={args.num}, but the data have {num:,} images; take --num={num} or fewer")
    rows = {"index": np.arange(args.num), "image": dataset.images[: args.num]}
    return rows if dataset.labels is None else rows | {"label": dataset.labels[: args.num].astype(np.int32)}


def make_sample_metrics(args, config, num, shape, parts=None):
    """measure(images, settings, say) -> metrics of `num` samples of that shape, against the images of a config.Data.

    Without --reference these must be the data of the run of `parts`.
    """
    import numpy as np

    from ddpm_jax.evaluation import features, samples

    metrics = requested(args, SAMPLES)
    if args.inception and args.features != "inception":
        raise errors.ConfigError(f"--inception needs --features=inception, not {args.features}")
    if args.reference:
        config = with_source(config, args.reference)
        config = dataclasses.replace(config, image_size=tuple(shape[:2]), channels=shape[2])
    images = load(args, config, tuple(shape), None if args.reference else parts).images
    if args.reference_num > len(images):
        raise errors.ConfigError(f"--reference-num={args.reference_num}, but the data have {len(images):,} images")
    if args.reference_num:
        images = images[np.linspace(0, len(images) - 1, args.reference_num).astype(int)]
    samples.check_sizes(num, len(images))
    extractor = features.load(args.features, args.inception) if {*metrics} & {*samples.NEED_FEATURES} else None
    where = {"source": config.source, "split": args.split or config.split}

    def measure(drawn, settings, say):
        return samples.measure(
            drawn, images, where, metrics, extractor, settings, config.cache_dir, args.batch_size, say
        )

    return measure


def format_result(name, result):
    """A metric as a line for the console."""

    def value(entry):
        error = "" if entry.get("standard_error") is None else f" +- {entry['standard_error']:.4f}"
        return f"{entry['value']:.4f}{error}"

    details = [f"{part} {value:.4f}" for part, value in result.get("parts", {}).items()]
    if "real" in result:
        of = f" of {result['real']['num']:,}" if "num" in result["real"] else ""
        details.append(f"real images {value(result['real'])}{of}")
    return f"{name} {value(result)} {result['unit']}" + (f" ({', '.join(details)})" if details else "")

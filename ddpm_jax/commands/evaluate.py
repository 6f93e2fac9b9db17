"""Evaluate a trained run: python -m ddpm_jax evaluate --workdir=runs/digits --metrics=nll,kid,copies,moments --num=1000

Of its likelihood: nll, the variational bound in bits/dim; ode, bits/dim of the probability-flow ODE; mse, L_simple.
Of its samples: kid, fid, pr (precision and recall) on --features; copies of the data; moments, the colours. The samples
are those that sampling gives for the same options, or those of --samples=FILE. The paper's FID: --num=50000 samples
with --metrics=fid --features=inception against the whole training split, rounded to uint8, not mirrored.
The result is one JSON file, in which beside each number stands all it depends on.
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
        options.each(options.one_of(*METRICS)),
        ("at least one of " + ", ".join(METRICS), len),
    )
    num: int = options.option(1000, "images: the first of the data for nll, ode, mse; samples", options.at_least(1))
    data: str = options.option("", "where the run's data lie now, spelled as data.source; where they lay when empty")
    other_data: bool = options.option(False, "take data that are not those of the run's fingerprint")
    split: str = options.option("", "split of the data, spelled as data.split; the run's own when empty")
    weights: str = options.option(*options.WEIGHTS)
    member: int = options.option(*options.MEMBER)
    sampler: str = options.option("ddpm", "of the samples, a name in ddpm_jax.samplers.SAMPLERS")
    steps: int = options.option(0, "steps of nll, mse and the samples; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "of these steps, a name in ddpm_jax.schedules.SPACINGS")
    samples: str = options.option("", "an npz file of images, or a folder of shards, to judge in place of the run's")
    reference: str = options.option(
        "", "what samples are held against, spelled as data.source; the run's own data when empty"
    )
    reference_num: int = options.option(0, "so many of these images, evenly spaced; 0 for all", options.at_least(0))
    features: str = options.option(
        "enl0", "on which kid, fid, pr and copies are measured, a name in ddpm_jax.evaluation.features.EXTRACTORS"
    )
    inception: str = options.option("", "file of the weights of --features=inception (.pth, .safetensors, .npz)")
    ode_steps: int = options.option(100, "times that ode visits, at most T", options.at_least(2))
    decoder: str = options.option(
        "exact", "of nll's last step, a name in ddpm_jax.likelihood.DECODERS; tanh as in the paper's code"
    )
    divergence: str = options.option(
        "auto", "of ode, a name in ddpm_jax.likelihood.DIVERGENCES; auto is exact up to 16 dimensions"
    )
    seed: int = options.option(0, "seed of the noise and of the samples", options.at_least(0), options.below(2**32))
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "file to write; WORKDIR/evaluation.json, or beside --samples, when empty")
    overwrite: bool = options.option(False, "write over a file that is there")
    platform: str = options.option(*options.PLATFORM)
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


@log.quiet()
def main(argv=None):
    """The exit code of evaluating with the options `argv`, those of the program when None."""
    args = commands.parse(Args, argv, "evaluate", __doc__)

    from ddpm_jax import experiment, parallel
    from ddpm_jax.run import checkpoint, signals

    workdir, step = (None, None) if args.samples else experiment.find(args.workdir, args.step)
    samples = expand(args.samples)
    beside = samples.with_suffix(".json") if samples.is_file() else samples / "evaluation.json"
    out = expand(args.out or (beside if args.samples else workdir / "evaluation.json"))
    if out.exists() and not out.is_file():
        raise errors.ConfigError(f"--out={out} is a folder or a device; give the name of a file")
    if out.exists() and not args.overwrite:
        raise errors.ConfigError(f"{out} already exists; take another --out, or say --overwrite")
    parallel.start(args.batch_size, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    what, work, report = on_samples(args) if args.samples else on_run(args, workdir, step)
    with errors.writing(f"--out={out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    report |= {"versions": checkpoint.versions(), "devices": parallel.describe()}
    log.note(f"{what}, {', '.join(args.metrics)}, {parallel.describe()}")
    with signals.caught(), parallel.memory_for(f"try a --batch-size smaller than {args.batch_size}"):
        metrics = work(log.now_and_then(log.note))
    for name, number in metrics.items():
        log.note(in_words(name, number))
    with errors.writing(f"--out={out}"):
        write_atomic(out, (json.dumps({"metrics": metrics} | report, indent=2, allow_nan=False) + "\n").encode())
    log.note(f"wrote {out}")
    return 0


def asked(args, kind):
    """The metrics of that kind that are asked for."""
    return [name for name in dict.fromkeys(args.metrics) if name in kind]


def on_run(args, workdir, step):
    """(what, work, report): what is measured in words, work(say) -> metrics, and what else is told of them.

    All that can be checked is checked before the work.
    """
    from ddpm_jax import experiment, program
    from ddpm_jax.evaluation import likelihood, samples

    parts, params, step = experiment.restore(workdir, args.weights, step, args.member)
    config, of_run, of_samples = parts.config, asked(args, LIKELIHOOD), asked(args, SAMPLES)
    if args.data and args.reference and not of_run:
        raise errors.ConfigError(f"--reference={args.reference} takes the place of --data={args.data}; leave one out")
    if args.data:
        config = dataclasses.replace(config, data=with_source(config.data, args.data))
    told = {"num": args.num, "split": args.split or config.data.split, "seed": args.seed, "weights": args.weights}
    told |= {"checkpoint_step": step}
    plan, rows, judge = None, None, None
    if of_run:
        settings = args.steps, args.spacing, args.ode_steps, args.decoder, args.divergence
        plan = likelihood.make_plan(parts, of_run, *settings)
        rows = load_rows(args, parts, config.data)
    if of_samples:
        steps = args.steps or config.diffusion.T
        draw = program.make_draw(parts, args.sampler, steps, args.spacing)
        judge = make_judge(args, config.data, args.num, parts.shape, parts)
        drawn = told | {"sampler": args.sampler, "steps": steps, "spacing": args.spacing}

    def work(say):
        found = likelihood.report(parts, params, plan, rows, args.seed, args.batch_size, say) if of_run else {}
        if of_samples:
            batches = draw(params, args.num, args.seed, batch_size=args.batch_size)
            images = samples.collect(batches, args.num, parts.shape, say)
            found |= judge(images, drawn, say)
        return found

    what = f"step {step:,} of {workdir}, {args.weights} weights, {args.num:,} images"
    return what, work, told | {"config": dataclasses.asdict(config)}


def on_samples(args):
    """The same for a file of images."""
    from ddpm_jax import config as configs
    from ddpm_jax import data

    of_run, told = asked(args, LIKELIHOOD), {"samples": args.samples}
    if of_run:
        raise errors.ConfigError(f"--samples is of images, but {', '.join(of_run)} is measured on a run")
    images = data.load(f"npz:{args.samples}").images
    if args.data:
        raise errors.ConfigError(f"--data={args.data} is of a run; what --samples are held against is --reference")
    file, config = expand(args.workdir) / "config.json", configs.Data()
    if not args.reference:
        if not file.is_file():
            raise errors.ConfigError(f"--samples needs a --reference, or the --workdir of a run (no {file})")
        config = configs.from_json(file.read_text(errors="replace"), str(file)).data
    judge = make_judge(args, config, len(images), images.shape[1:])
    what = f"{args.samples}, {len(images):,} images"
    return what, lambda say: judge(images, told, say), told | {"num": len(images)}


def with_source(config, source):
    """The config.Data with another source, and without how the old one is read where the new one is of another kind."""
    from ddpm_jax.config import Data

    if source.partition(":")[0] == config.source.partition(":")[0]:
        return dataclasses.replace(config, source=source)
    return dataclasses.replace(
        config, source=source, **{name: getattr(Data, name) for name in ("split", "range", "frames")}
    )


def load(args, config, shape, parts=None):
    """The Dataset of a config.Data, or of --split of it, with its labels if the run of `parts` has classes.

    Raises ConfigError unless its images have that shape, and are those of the run, if there is one and no --split.
    """
    from ddpm_jax import data

    if args.split not in ("", type(config).split) and config.source.startswith("npz:"):
        raise errors.ConfigError(f"--split={args.split}, but data.source={config.source} has no splits")
    dataset = data.load(**vars(dataclasses.replace(config, split=args.split or config.split)))
    if dataset.images.shape[1:] != shape:
        there, here = ("x".join(map(str, shape)) for shape in (dataset.images.shape[1:], shape))
        whose = "the samples have" if args.samples else "the run was trained on"
        raise errors.ConfigError(f"the data have images of {there}, {whose} {here}")
    if parts is None:
        return dataset
    dataset = data.with_labels(dataset, parts.config.model.num_classes)
    dataset = data.with_labels_of_run(dataset, config.source, parts.data, parts.classes)
    found = data.fingerprint(dataset)
    if parts.data not in (None, found) and not (args.split or args.other_data):
        raise errors.ConfigError(
            f"{config.source} has not the data of the run (which had {parts.data}, these are {found}); say by --data "
            "where those lie now, or --other-data to take these"
        )
    return dataset


def load_rows(args, parts, config):
    """{"index", "image", "label"?}: the first --num images of the data that the run was trained on, or of --split."""
    import numpy as np

    dataset = load(args, config, parts.shape, parts)
    there = len(dataset.images)
    if args.num > there:
        raise errors.ConfigError(f"--num={args.num}, but the data have {there:,} images; take --num={there} or fewer")
    rows = {"index": np.arange(args.num), "image": dataset.images[: args.num]}
    return rows if dataset.labels is None else rows | {"label": dataset.labels[: args.num].astype(np.int32)}


def make_judge(args, config, num, shape, parts=None):
    """judge(images, settings, say) -> metrics of `num` samples of that shape, against the images of a config.Data.

    Where there is no --reference, these are to be the data of the run of `parts`.
    """
    import numpy as np

    from ddpm_jax.evaluation import features, samples

    metrics = asked(args, SAMPLES)
    if args.inception and args.features != "inception":
        raise errors.ConfigError(f"--inception goes with --features=inception, not {args.features}")
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

    def judge(pictures, settings, say):
        return samples.measure(
            pictures, images, where, metrics, extractor, settings, config.cache_dir, args.batch_size, say
        )

    return judge


def in_words(name, number):
    """A line for the console."""

    def value(found):
        error = "" if found.get("standard_error") is None else f" +- {found['standard_error']:.4f}"
        return f"{found['value']:.4f}{error}"

    rest = [f"{part} {value:.4f}" for part, value in number.get("parts", {}).items()]
    if "real" in number:
        of = f" of {number['real']['num']:,}" if "num" in number["real"] else ""
        rest.append(f"real images {value(number['real'])}{of}")
    return f"{name} {value(number)} {number['unit']}" + (f" ({', '.join(rest)})" if rest else "")

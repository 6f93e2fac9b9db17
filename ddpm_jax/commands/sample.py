"""Sample from a trained run: python -m ddpm_jax sample --workdir=runs/digits --num=64 --seed=0

Needs the folder of the run and nothing else. Image i of a seed is the same picture in any batch.
"""

import dataclasses
import io
import time

from ddpm_jax import commands, errors, log, options
from ddpm_jax.files import expand, write_atomic

PAIR = "two values with a comma between", lambda value: len(value) in (0, 2)


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run, or of one step of it")
    step: int = options.option(0, "of the checkpoint; 0 for the newest", options.at_least(0))
    num: int = options.option(64, "images", options.at_least(1))
    seed: int = options.option(0, "seed of the images", options.at_least(0), options.below(2**32))
    sampler: str = options.option("ddpm", "a name in ddpm_jax.samplers.SAMPLERS")
    steps: int = options.option(0, "sampling steps; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "of the times, a name in ddpm_jax.schedules.SPACINGS")
    eta: float | None = options.option(None, "noise of the sampler ddim, from 0 to 1")
    churn: float | None = options.option(None, "by how much the sampler edm raises the noise before a step")
    variance: str | None = options.option(None, "of the sampler ddpm, a name in ddpm_jax.diffusion.VARIANCES")
    limit: str = options.option("clip", "on x_0_hat, a name in ddpm_jax.diffusion.LIMITS")
    weights: str = options.option(
        "ema", "averaged or plain parameters, or the length (sigma_rel) of a post-hoc average", options.which_weights
    )
    member: int = options.option(0, "of an ensemble, the run to take", options.at_least(0))
    label: int | None = options.option(None, "class of all images; without it each class in turn")
    guidance: float = options.option(1.0, "scale of classifier-free guidance; 1 for none", options.finite)
    interval: tuple[float, ...] = options.option((), "LOW,HIGH: the times with guidance; empty for all", PAIR)
    interpolate: tuple[str, ...] = options.option((), "two pictures, to be joined by --num images", PAIR)
    level: float = options.option(
        0.0, "the time at which --interpolate mixes; 0 for the middle one", options.at_least(0)
    )
    inpaint: str = options.option("", "a picture, to be painted anew where --mask is white")
    mask: str = options.option("", "a picture of the same shape, black where --inpaint is kept")
    jump: int = options.option(10, "steps that --inpaint goes back at a time", options.at_least(1))
    repeats: int = options.option(5, "how often --inpaint takes each step", options.at_least(1))
    reconstruct: str = options.option("", "a picture, to be encoded by the sampler ddim and decoded again")
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "folder to write to; WORKDIR/out when empty")
    png: bool = options.option(False, "also write each image as a PNG")
    gif: bool = options.option(False, "also write a GIF of the first batch being denoised")
    preview: bool = options.option(False, "let the GIF show x_0_hat instead of x_t")
    overwrite: bool = options.option(False, "write into a folder that already holds samples")
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    cpu_devices: int = options.option(
        0, "as how many devices a CPU is used; 0 for up to one a core", options.at_least(0)
    )
    debug: bool = options.option(False, "show tracebacks")


FRAMES = 40  # of the GIF


@log.quiet()
def main(argv=None):
    """The exit code of sampling with the options `argv`, those of the program when None."""
    args = commands.parse(Args, argv, "sample", __doc__)

    import numpy as np

    from ddpm_jax import experiment, images, keys, parallel, program, signals

    workdir, step = experiment.find(args.workdir, args.step)
    out, indices = expand(args.out or workdir / "out"), np.arange(1 if args.reconstruct else args.num)
    for name in () if args.overwrite else files(args, indices):
        if (out / name).exists():
            raise errors.ConfigError(f"{out} already holds samples ({name}); take another --out, or say --overwrite")
    parallel.start(args.batch_size, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    parts, params, step = experiment.restore(workdir, args.weights, step, args.member)
    steps, root = args.steps or parts.config.diffusion.T, keys.root(args.seed, "sample")
    labels = choose_labels(args.label, parts, indices)
    given = {name: getattr(args, name) for name in ("eta", "churn", "variance") if getattr(args, name) is not None}
    draw = program.make_draw(
        parts,
        args.sampler,
        steps,
        args.spacing,
        FRAMES if args.gif else 1,
        args.preview,
        args.limit,
        args.guidance,
        args.interval,
        choose_edit(args, parts, root),
        **given,
    )
    with errors.writing(f"--out={out}"):
        out.mkdir(parents=True, exist_ok=True)
    log.note(
        f"step {step:,} of {workdir}, {args.weights} weights, {args.sampler} with {steps} steps, {parallel.describe()}"
    )
    clock, batches = time.monotonic(), []
    with signals.caught(), parallel.memory_for(f"try a --batch-size smaller than {args.batch_size}"):
        for batch in draw(params, len(indices), args.seed, labels, args.batch_size):
            batches.append(batch)
            done, took = sum(map(len, batches)), time.monotonic() - clock
            log.note(f"{done}/{len(indices)} images, {done / took:.1f} a second")
    samples = np.concatenate([batch[:, -1] for batch in batches])

    buffer = io.BytesIO()
    np.savez(buffer, images=samples, **({} if labels is None else {"labels": labels}))
    with errors.writing(f"--out={out}"):
        write_atomic(out / "samples.npz", buffer.getvalue())
        images.save_png(out / "grid.png", images.grid(samples[:256]))
        if args.png:
            for index, image in zip(indices, samples, strict=True):
                images.save_png(out / f"image_{index:06}.png", image)
        if args.gif:
            images.save_gif(out / "denoising.gif", [images.grid(page) for page in batches[0][:64].swapaxes(0, 1)])
    also = ["samples.npz", *["denoising.gif"] * args.gif, *[f"{len(samples)} images alone"] * args.png]
    log.note(f"wrote {out / 'grid.png'}, {', '.join(also)}")
    return 0


def files(args, indices):
    """The names of the files that are written."""
    pictures = [f"image_{index:06}.png" for index in indices] if args.png else []
    return ["samples.npz", "grid.png", *pictures, *(["denoising.gif"] if args.gif else [])]


def choose_labels(label, parts, indices):
    """One label an image, or None for a model without classes."""
    from ddpm_jax import experiment

    if label is None:
        return experiment.labels_in_turn(parts, indices)
    classes = parts.config.model.num_classes
    if not 0 <= label < classes:
        what = f"labels 0 to {classes - 1}" if classes else "no labels"
        raise errors.ConfigError(f"label={label}, but the model has {what}")
    return indices * 0 + label


def choose_edit(args, parts, root):
    """What --interpolate, --inpaint or --reconstruct put in the place of pure noise; None for none of them."""
    from ddpm_jax import editing, keys, schedules

    asked = [name for name in ("interpolate", "inpaint", "reconstruct") if getattr(args, name)]
    if len(asked) > 1:
        raise errors.ConfigError(f"--{asked[0]} and --{asked[1]} exclude each other")
    if bool(args.inpaint) != bool(args.mask):
        raise errors.ConfigError("--inpaint and --mask go together")
    if asked and parts.config.model.num_classes and args.label is None:
        raise errors.ConfigError(f"--{asked[0]} with a model of classes needs one --label")
    for name, needs in (("level", "interpolate"), ("jump", "inpaint"), ("repeats", "inpaint")):
        if getattr(args, name) != getattr(Args, name) and not getattr(args, needs):
            raise errors.ConfigError(f"--{name} belongs to --{needs}")
    if args.inpaint and args.jump >= (args.steps or parts.config.diffusion.T):
        raise errors.ConfigError(f"--jump={args.jump} must be less than the steps; nothing would be repeated")
    if args.reconstruct and args.num not in (1, Args.num):
        raise errors.ConfigError(f"--reconstruct makes one image; leave --num={args.num} out")
    if args.interpolate:
        if args.level % 1 and isinstance(parts.schedule, schedules.DiscreteSchedule):
            raise errors.ConfigError(f"--level={args.level:g} must be a whole time, from 1 to {parts.schedule.T}")
        level = args.level or parts.schedule.T / 2
        if not 0 < level <= parts.schedule.T:
            raise errors.ConfigError(f"--level={level:g} must be above 0 and at most {parts.schedule.T}")
        pictures = [read(path, parts.shape) for path in args.interpolate]
        return editing.interpolate(parts.schedule, level, keys.named(root, "pair"), *pictures, args.num)
    if args.inpaint:
        known, mask = read(args.inpaint, parts.shape), read(args.mask, parts.shape) < 0
        return editing.inpaint(parts.schedule, known, mask, args.jump, args.repeats)
    if args.reconstruct:
        if args.sampler != "ddim" or args.eta:
            raise errors.ConfigError("--reconstruct follows the deterministic way: say --sampler=ddim, and no --eta")
        return editing.reconstruct(parts.schedule, read(args.reconstruct, parts.shape))
    return None


def read(path, shape):
    """A picture file in the shape of the model's images, in [-1, 1]."""
    from ddpm_jax import data, images

    try:
        return images.to_unit(data.read(expand(path), shape[:2], shape[-1]))
    except Exception as error:  # Pillow raises whatever a broken file brings about
        raise errors.DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error

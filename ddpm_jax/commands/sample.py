"""Sample from a trained run: python -m ddpm_jax sample --workdir=runs/digits --num=64 --seed=0

Needs the folder of the run and nothing else. Image i of a seed is the same picture in any batch.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
import warnings
import zlib
from pathlib import Path

from ddpm_jax import commands, diffusion, errors, options
from ddpm_jax.run import log
from ddpm_jax.run.files import expand, write_atomic

PAIR = "two values with a comma between", lambda value: len(value) in (0, 2)


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run, or of one step of it")
    step: int = options.option(*options.STEP)
    num: int = options.option(64, "images", options.at_least(1))
    seed: int = options.option(0, "seed of the images", options.at_least(0), options.below(2**32))
    sampler: str = options.option("ddpm", "a name in ddpm_jax.samplers.SAMPLERS")
    steps: int = options.option(0, "sampling steps; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "of the times, a name in ddpm_jax.schedules.SPACINGS")
    eta: float | None = options.option(None, "noise of the sampler ddim, from 0 to 1")
    churn: float | None = options.option(None, "by how much the sampler edm raises the noise before a step")
    variance: str | None = options.option(None, "of the sampler ddpm, a name in ddpm_jax.diffusion.VARIANCES")
    limit: str = options.option("clip", "on x_0_hat, a name in ddpm_jax.diffusion.LIMITS")
    weights: str = options.option(*options.WEIGHTS)
    member: int = options.option(*options.MEMBER)
    label: str | None = options.option(None, "class of all images, a number or a name; without it each in turn")
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
    shards: int = options.option(
        0, "leave files samples-00000.npz ... of so many images each in place of samples.npz", options.at_least(0)
    )
    overwrite: bool = options.option(False, "write into a folder that already holds samples")
    platform: str = options.option(*options.PLATFORM)
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


FRAMES = 40  # of the GIF
PLACES = ("workdir", "out", "png", "overwrite", "platform", "cpu_devices", "debug")  # change no image


@log.quiet()
def main(argv=None):
    """The exit code of sampling with the options `argv`, those of the program when None."""
    args = commands.parse(Args, argv, "sample", __doc__)

    import numpy as np

    from ddpm_jax import experiment, keys, parallel, program
    from ddpm_jax.run import shards

    workdir, step = experiment.find(args.workdir, args.step)
    out, indices = expand(args.out or workdir / "out"), np.arange(1 if args.reconstruct else args.num)
    begun = (out / shards.SETTINGS).exists()  # and perhaps to be gone on with, which is seen to below
    for name in () if args.overwrite or begun else [*files(args, indices), *(at.name for at in shards.files(out))]:
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
    title = f"step {step:,} of {workdir}, {args.weights} weights, {args.sampler} with {steps} steps"
    about = provenance(args, len(indices), params, step, steps)
    draw_from = functools.partial(draw, params, len(indices), args.seed, labels, args.batch_size)
    return draw_and_write(args, out, title, about, indices, labels, parts.shape, draw_from)


def draw_and_write(args, out, title, about, indices, labels, shape, draw_from):
    """Draw the images that `out` does not hold yet, and write all; the exit code.

    about: that of provenance; draw_from(first) -> batches (b, frames, H, W, C) from image `first` on.
    """
    from ddpm_jax import parallel
    from ddpm_jax.run import shards, signals

    size = args.shards or max(1, shards.BYTES // math.prod(shape))
    with errors.writing(f"--out={out}"):
        out.mkdir(parents=True, exist_ok=True)
        done, lines = shards.resume(out, *about.values(), size, args.overwrite)
    log.note(f"{title}, {parallel.describe()}")
    for line in [*lines, *([f"going on after {done:,} of {len(indices):,} images in {out}"] if done else [])]:
        log.note(line)
    frames = []  # those of the first batch, for the GIF

    def batches():
        clock, count = time.monotonic(), done
        for batch in draw_from(done) if done < len(indices) else ():
            if count == 0:
                frames.append(batch[:64].swapaxes(0, 1))
            count += len(batch)
            log.note(f"{count}/{len(indices)} images, {(count - done) / (time.monotonic() - clock):.1f} a second")
            yield batch[:, -1]

    def begin():
        write_atomic(out / shards.SETTINGS, (json.dumps(about, indent=2) + "\n").encode())
        save_gif(args, out, frames)

    with (
        signals.caught() as asked,
        parallel.memory_for(f"try a --batch-size smaller than {args.batch_size}"),
        errors.writing(f"--out={out}"),
    ):
        base, left, code = shards.write(out, batches(), shape, done, size, labels, begin, asked)
    there = base + len(left)
    if there < len(indices):
        log.note(f"kept {there:,} of {len(indices):,} images in {out}; the same command goes on from there")
        return code
    with errors.writing(f"--out={out}"):
        if args.shards:
            begin()
            shards.add(out, base, size, left, labels)
        finish(args, out, indices, labels, lambda: shards.chunks(out, base, size, left))
        save_gif(args, out, frames)
        if not args.shards:
            shards.remove(out)
    kind = f"{-(-len(indices) // size)} shards" if args.shards else "samples.npz"
    also = [kind, *["denoising.gif"] * args.gif, *[f"{len(indices)} images alone"] * args.png]
    log.note(f"wrote {out / 'grid.png'}, {', '.join(also)}")
    return 0


def files(args, indices):
    """The names of the files that are written."""
    from ddpm_jax.run import shards

    pictures = [f"image_{index:06}.png" for index in indices] if args.png else []
    samples = shards.path(Path(), 0).name if args.shards else "samples.npz"
    return [samples, "grid.png", *pictures, *(["denoising.gif"] if args.gif else [])]


def provenance(args, num, params, step, steps):
    """{"settings": all that the images depend on, "environment": what changes them by rounding at most}."""
    from ddpm_jax import parallel
    from ddpm_jax.run import checkpoint, trees

    settings = vars(args) | {"num": num, "step": step, "steps": steps}
    settings |= {"parameters": f"{trees.digest(params):08x}"}
    for name in ("inpaint", "mask", "reconstruct", "interpolate"):
        paths = [settings[name]] if isinstance(settings[name], str) else settings[name]
        settings[name] = [f"{zlib.crc32(expand(path).read_bytes()):08x}" for path in paths if path]
    environment = checkpoint.versions() | {"devices": parallel.describe()}
    environment |= {name: settings[name] for name in ("batch_size", "gif", "preview")}
    for name in (*PLACES, "batch_size", "gif", "preview"):
        del settings[name]
    return json.loads(json.dumps({"settings": settings, "environment": environment}))


def finish(args, out, indices, labels, chunks):
    """Write samples.npz, unless shards are to stay, and the pictures; chunks() -> the arrays of all images in turn."""
    import numpy as np

    from ddpm_jax import images
    from ddpm_jax.run import shards

    def each():
        return (image for chunk in chunks() for image in chunk)

    if not args.shards:
        others = {} if labels is None else {"labels": labels}
        shards.save(out / "samples.npz", len(indices), chunks(), **others)
    images.save_png(out / "grid.png", images.grid(np.stack(list(itertools.islice(each(), 256)))))
    for index, image in zip(indices, each(), strict=True) if args.png else ():
        images.save_png(out / f"image_{index:06}.png", image)


def save_gif(args, out, frames):
    """Write denoising.gif of the first batch; not where that was drawn by a command before this one."""
    from ddpm_jax import images

    if args.gif and frames:
        images.save_gif(out / "denoising.gif", [images.grid(page) for page in frames[0]])


def choose_labels(label, parts, indices):
    """One label an image, or None for a model without classes."""
    from ddpm_jax import experiment

    if label is None:
        return experiment.labels_in_turn(parts, indices)
    return indices * 0 + experiment.find_label(parts, label)


def choose_edit(args, parts, root):
    """What --interpolate, --inpaint or --reconstruct put in the place of pure noise; None for none of them."""
    from ddpm_jax import editing, keys, schedules

    look = parts.shape, parts.config.data.range
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
        pictures = [read(path, *look)[0] for path in args.interpolate]
        return editing.interpolate(parts.schedule, level, keys.named(root, "pair"), *pictures, args.num)
    if args.inpaint:
        known, size = read(args.inpaint, *look)
        mask = read_mask(args.mask, args.inpaint, size, parts.shape)
        return editing.inpaint(parts.schedule, known, mask, args.jump, args.repeats)
    if args.reconstruct:
        if args.sampler != "ddim" or args.eta:
            raise errors.ConfigError("--reconstruct follows the deterministic way: say --sampler=ddim, and no --eta")
        return editing.reconstruct(parts.schedule, read(args.reconstruct, *look)[0])
    return None


def read(path, shape, value_range=()):
    """(a picture file in the shape of the model's images, in [-1, 1]; its own height and width).

    value_range: that of the run's data.
    """
    from ddpm_jax import data

    try:
        height, width = data.read(expand(path), (), shape[-1], value_range).shape[:2]
        picture = diffusion.to_unit(data.read(expand(path), shape[:2], shape[-1], value_range))
    except Exception as error:  # Pillow raises whatever a broken file brings about
        raise errors.DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    scale = min(height / shape[0], width / shape[1])
    if (height, width) != (round(scale * shape[0]), round(scale * shape[1])):
        log.note(f"of {path}, {width}x{height}, the central {scale * shape[1]:.0f}x{scale * shape[0]:.0f} are taken")
    return picture, (height, width)


def read_mask(path, known, size, shape):
    """The mask of the picture `known` of that size in the model's shape, true where it is kept: more than half black.

    Raises ConfigError for one of other proportions than the picture, of which another part would be cut; for one that
    keeps all or nothing; and for transparent parts, which could mean either.
    """
    import numpy as np
    from PIL import Image

    mask, (down, across) = read(path, shape)
    levels, (height, width) = (mask + 1) / 2, size
    if abs(height * across - width * down) > max(height, width, down, across):  # by more than rounding
        raise errors.ConfigError(
            f"--inpaint={known} is {width}x{height}, --mask={path} {across}x{down}: other parts of them would be cut "
            f"for the model's {shape[1]}x{shape[0]}; give both the same size, or crop both to that one"
        )
    with Image.open(expand(path)) as picture:
        if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise errors.ConfigError(f"--mask={path} has transparent parts; save it as black (kept) and white, opaque")
    if np.all(levels < 0.5) or np.all(levels >= 0.5):
        what = "black, so that nothing is painted" if levels[0, 0, 0] < 0.5 else "white, so that nothing is kept"
        low, high = (255 * float(level) for level in (levels.min(), levels.max()))
        raise errors.ConfigError(f"--mask={path} is all {what} (levels {low:.0f} to {high:.0f} of 255)")
    gray = np.mean((levels > 0.25) & (levels < 0.75))
    if gray > 0.25:
        warnings.warn(
            f"--mask={path} is gray in {gray:.0%} of its pixels; what is more than half white is painted", stacklevel=2
        )
    return levels < 0.5

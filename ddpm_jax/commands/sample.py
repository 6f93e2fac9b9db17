"""Sample from a trained run: python -m ddpm_jax sample --workdir=runs/digits --num=64 --seed=0

Needs only the folder of the run. Image i of a seed is the same in any batch.
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

from ddpm_jax import commands, errors, options
from ddpm_jax.run import log
from ddpm_jax.run.files import expand, write_atomic

PAIR = "two values separated by a comma", lambda value: len(value) in (0, 2)


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run, or of one step of it")
    step: int = options.option(*options.STEP)
    num: int = options.option(64, "number of images", options.at_least(1))
    seed: int = options.option(0, "seed of the images", options.at_least(0), options.below(2**32))
    sampler: str = options.option("ddpm", "sampler, a name in ddpm_jax.samplers.SAMPLERS")
    steps: int = options.option(0, "sampling steps; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "spacing of the sampling times, a name in ddpm_jax.schedules.SPACINGS")
    eta: float | None = options.option(None, "noise of the sampler ddim, from 0 to 1")
    churn: float | None = options.option(None, "how much noise the sampler edm adds before a step")
    variance: str | None = options.option(None, "variance of the sampler ddpm, a name in ddpm_jax.diffusion.VARIANCES")
    limit: str = options.option("clip", "how x_0_hat is limited, a name in ddpm_jax.diffusion.LIMITS")
    weights: str = options.option(*options.WEIGHTS)
    member: int = options.option(*options.MEMBER)
    label: str | None = options.option(None, "class of all images, a number or a name; by default all in turn")
    guidance: float = options.option(1.0, "scale of the guidance; 1 for none (from 0 to 1 with cfg++)", options.finite)
    interval: tuple[float, ...] = options.option((), "LOW,HIGH: guide only at these times; at all when empty", PAIR)
    guidance_method: str = options.option("cfg", "how to guide, a name in ddpm_jax.conditioning.GUIDANCES")
    guidance_norm: float = options.option(0.0, "of apg: longest update of x_0_hat (L2); 0 for any", options.at_least(0))
    guidance_parallel: float = options.option(0.0, "of apg: factor of the update's part along x_0_hat", options.finite)
    guide: str = options.option("", "folder of a worse run to guide away from (autoguidance), or of one step of it")
    guide_weights: str = options.option("ema", "the same as --weights, of --guide", options.WEIGHTS[2])
    interpolate: tuple[str, ...] = options.option((), "FILE,FILE: two pictures; draw --num images between them", PAIR)
    level: float = options.option(0.0, "the time t at which --interpolate mixes them; 0 for T / 2", options.at_least(0))
    inpaint: str = options.option("", "a picture, to be repainted where --mask is white")
    mask: str = options.option("", "a picture of the same shape, black where --inpaint is kept")
    jump: int = options.option(10, "number of steps that --inpaint jumps back", options.at_least(1))
    repeats: int = options.option(5, "how often --inpaint repeats each step", options.at_least(1))
    reconstruct: str = options.option("", "a picture to encode to noise and decode, by the sampler ddim")
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "folder to write to; WORKDIR/out when empty")
    png: bool = options.option(False, "also write each image as a PNG")
    gif: bool = options.option(False, "also write a GIF of the first batch being denoised")
    preview: bool = options.option(False, "show x_0_hat instead of x_t in the GIF")
    shards: int = options.option(
        0, "write samples-00000.npz, ... of this many images each instead of samples.npz", options.at_least(0)
    )
    overwrite: bool = options.option(False, "write into a folder that already holds samples")
    platform: str = options.option(*options.PLATFORM)
    cpu_devices: int = options.option(*options.CPU_DEVICES)
    debug: bool = options.option(*options.DEBUG)


FRAMES = 40  # of the GIF
IRRELEVANT = ("workdir", "out", "png", "overwrite", "platform", "cpu_devices", "debug")  # options that change no image


@log.quiet()
def main(argv=None):
    """Draw samples with the options `argv` (default: those of the command line); the exit code."""
    args = commands.parse(Args, argv, "sample", __doc__)

    import numpy as np

    from ddpm_jax import experiment, parallel

    workdir, step = experiment.find_run(args.workdir, args.step)
    guide_at = find_guide(args)
    out, indices = expand(args.out or workdir / "out"), np.arange(1 if args.reconstruct else args.num)
    check_no_samples(args, out, indices)
    parallel.start(args.batch_size, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    parts, params, step = experiment.restore(workdir, args.weights, step, args.member)
    guide = experiment.restore(*guide_at, "--guide-weights") if guide_at else None
    given = (params, guide[1]) if guide else params
    steps, labels = args.steps or parts.config.diffusion.T, choose_labels(args.label, parts, indices)
    draw = make_draw(args, parts, steps, guide[0] if guide else None)
    draw = functools.partial(draw, given, len(indices), args.seed, labels, args.batch_size)
    title = f"step {step:,} of {workdir}, {args.weights} weights, {args.sampler} with {steps} steps"
    title += f", guided by step {guide[2]:,} of {guide_at[0]}, {args.guide_weights} weights" if guide else ""
    record = provenance(args, len(indices), params, step, steps, guide)
    return draw_and_write(args, out, title, record, indices, labels, parts.shape, draw)


def find_guide(args):
    """(folder of the run, weights, step or None for the newest, member) of --guide; None without it."""
    from ddpm_jax import experiment

    if not args.guide and args.guide_weights != Args.guide_weights:
        raise errors.ConfigError("--guide-weights needs --guide")
    if not args.guide:
        return None
    folder, step = experiment.find_run(args.guide, option="--guide")
    return folder, args.guide_weights, step, args.member


def check_no_samples(args, out, indices):
    """Raise ConfigError if `out` holds finished samples; shards.resume checks unfinished ones."""
    from ddpm_jax.run import shards

    if args.overwrite or (out / shards.SETTINGS).exists():
        return
    for name in [*files(args, indices), *(file.name for file in shards.files(out))]:
        if (out / name).exists():
            raise errors.ConfigError(f"{out} already holds samples ({name}); take another --out, or add --overwrite")


def make_draw(args, parts, steps, guide=None):
    """program.make_draw with the options of the command line; guide: the Experiment of --guide."""
    from ddpm_jax import keys, program

    frames, edit = FRAMES if args.gif else 1, choose_edit(args, parts, keys.root(args.seed, "sample"))
    arguments = args.spacing, frames, args.preview, args.limit, args.guidance, args.interval, edit
    given = {name: getattr(args, name) for name in ("eta", "churn", "variance") if getattr(args, name) is not None}
    guiding = {"norm": args.guidance_norm, "parallel": args.guidance_parallel}
    guiding = args.guidance_method, {name: value for name, value in guiding.items() if value}, guide
    return program.make_draw(parts, args.sampler, steps, *arguments, *guiding, **given)


def draw_and_write(args, out, title, record, indices, labels, shape, draw):
    """Draw the images that `out` does not hold yet, and write all of them; the exit code.

    record: that of provenance; draw(first) -> batches (b, frames, H, W, C) from image `first` on.
    """
    from ddpm_jax import parallel
    from ddpm_jax.run import shards, signals

    size = args.shards or max(1, shards.SHARD_BYTES // math.prod(shape))
    with errors.writing(f"--out={out}"):
        out.mkdir(parents=True, exist_ok=True)
        done, lines = shards.resume(out, *record.values(), size, args.overwrite)
    log.note(f"{title}, {parallel.describe()}")
    for line in [*lines, *([f"resuming after {done:,} of {len(indices):,} images in {out}"] if done else [])]:
        log.note(line)
    frames = []  # those of the first batch, for the GIF

    def batches():
        start, count = time.monotonic(), done
        for batch in draw(done) if done < len(indices) else ():
            if count == 0:
                frames.append(batch[:64].swapaxes(0, 1))
            count += len(batch)
            log.note(f"{count}/{len(indices)} images, {(count - done) / (time.monotonic() - start):.1f} per second")
            yield batch[:, -1]

    def before_write():
        write_atomic(out / shards.SETTINGS, (json.dumps(record, indent=2) + "\n").encode())
        save_gif(args, out, frames)

    with (
        signals.catch() as stop_requested,
        parallel.memory_advice(f"try a --batch-size smaller than {args.batch_size}"),
        errors.writing(f"--out={out}"),
    ):
        base, rest, code = shards.write(out, batches(), shape, done, size, labels, before_write, stop_requested)
    count = base + len(rest)
    if count < len(indices):
        log.note(f"kept {count:,} of {len(indices):,} images in {out}; the same command resumes from there")
        return code
    with errors.writing(f"--out={out}"):
        if args.shards:
            before_write()
            shards.add(out, base, size, rest, labels)
        write_files(args, out, indices, labels, lambda: shards.chunks(out, base, size, rest))
        save_gif(args, out, frames)
        if not args.shards:
            shards.remove(out)
    kind = f"{-(-len(indices) // size)} shards" if args.shards else "samples.npz"
    also = [kind, *["denoising.gif"] * args.gif, *[f"{len(indices)} single images"] * args.png]
    log.note(f"wrote {out / 'grid.png'}, {', '.join(also)}")
    return 0


def files(args, indices):
    """The names of the files to write; of shards only the first."""
    from ddpm_jax.run import shards

    pngs = [f"image_{index:06}.png" for index in indices] if args.png else []
    samples = shards.path(Path(), 0).name if args.shards else "samples.npz"
    return [samples, "grid.png", *pngs, *(["denoising.gif"] if args.gif else [])]


def provenance(args, num, params, step, steps, guide=None):
    """{"settings": everything that determines the images, "environment": what changes them at most by rounding}.

    guide: (Experiment, parameters, step) of --guide. Options of guidance at their defaults are left out, so that what
    older versions began can be continued.
    """
    from ddpm_jax import parallel
    from ddpm_jax.run import checkpoint, trees

    settings = vars(args) | {"num": num, "step": step, "steps": steps}
    settings |= {"parameters": f"{trees.digest(params):08x}"}
    for name in ("inpaint", "mask", "reconstruct", "interpolate"):
        paths = [settings[name]] if isinstance(settings[name], str) else settings[name]
        settings[name] = [f"{zlib.crc32(expand(path).read_bytes()):08x}" for path in paths if path]
    environment = checkpoint.versions() | {"devices": parallel.describe()}
    environment |= {name: settings[name] for name in ("batch_size", "gif", "preview")}
    if guide:
        settings["guide"] = {"step": guide[2], "parameters": f"{trees.digest(guide[1]):08x}"}
    unused = ("guidance_method", "guidance_norm", "guidance_parallel", "guide", "guide_weights")
    unused = [name for name in unused if settings[name] == getattr(Args, name)]
    for name in (*IRRELEVANT, "batch_size", "gif", "preview", *unused):
        del settings[name]
    return json.loads(json.dumps({"settings": settings, "environment": environment}))


def write_files(args, out, indices, labels, chunks):
    """Write samples.npz (unless --shards) and the PNGs; chunks() -> all images in order, as arrays (n, H, W, C)."""
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
    """Write denoising.gif of the first batch, unless an interrupted command has drawn that batch."""
    from ddpm_jax import images

    if args.gif and frames:
        images.save_gif(out / "denoising.gif", [images.grid(page) for page in frames[0]])


def choose_labels(label, parts, indices):
    """One label per image, or None for a model without classes."""
    from ddpm_jax import experiment

    if label is None:
        return experiment.cyclic_labels(parts, indices)
    return indices * 0 + experiment.find_label(parts, label)


def choose_edit(args, parts, root):
    """The edit of --interpolate, --inpaint or --reconstruct, which replaces sampling from pure noise; None for none."""
    from ddpm_jax import editing, keys, schedules

    check_edit(args, parts.config)
    shape_and_range = parts.shape, parts.config.data.range
    if args.interpolate:
        if args.level % 1 and isinstance(parts.schedule, schedules.DiscreteSchedule):
            raise errors.ConfigError(f"--level={args.level:g} must be a whole time, from 1 to {parts.schedule.T}")
        level = args.level or parts.schedule.T / 2
        if not 0 < level <= parts.schedule.T:
            raise errors.ConfigError(f"--level={level:g} must be above 0 and at most {parts.schedule.T}")
        pair = [read(path, *shape_and_range)[0] for path in args.interpolate]
        return editing.interpolate(parts.schedule, level, keys.named(root, "pair"), *pair, args.num)
    if args.inpaint:
        known, size = read(args.inpaint, *shape_and_range)
        mask = read_mask(args.mask, args.inpaint, size, parts.shape)
        return editing.inpaint(parts.schedule, known, mask, args.jump, args.repeats)
    if args.reconstruct:
        return editing.reconstruct(parts.schedule, read(args.reconstruct, *shape_and_range)[0])
    return None


def check_edit(args, config):
    """Raise ConfigError for editing options that do not go together, or not with the config of the run."""
    edits = [name for name in ("interpolate", "inpaint", "reconstruct") if getattr(args, name)]
    if len(edits) > 1:
        raise errors.ConfigError(f"--{edits[0]} and --{edits[1]} exclude each other")
    if bool(args.inpaint) != bool(args.mask):
        raise errors.ConfigError("--inpaint and --mask go together")
    if edits and config.model.num_classes and args.label is None:
        raise errors.ConfigError(f"--{edits[0]} with a class-conditional model needs one --label")
    for name, needs in (("level", "interpolate"), ("jump", "inpaint"), ("repeats", "inpaint")):
        if getattr(args, name) != getattr(Args, name) and not getattr(args, needs):
            raise errors.ConfigError(f"--{name} needs --{needs}")
    if args.inpaint and args.jump >= (args.steps or config.diffusion.T):
        raise errors.ConfigError(f"--jump={args.jump} must be less than the steps; nothing would be repeated")
    if args.reconstruct and args.num not in (1, Args.num):
        raise errors.ConfigError(f"--reconstruct makes one image; leave --num={args.num} out")
    if args.reconstruct and (args.sampler != "ddim" or args.eta):
        raise errors.ConfigError("--reconstruct needs the deterministic sampler: set --sampler=ddim and no --eta")
    if args.reconstruct and args.guidance_method == "cfg++":
        raise errors.ConfigError("--reconstruct cannot undo the steps of --guidance-method=cfg++; use cfg or apg")


def read(path, shape, value_range=()):
    """(a picture file in the model's shape, in [-1, 1]; its own height and width); value_range: the run's data.range"""
    from ddpm_jax import data, diffusion

    try:
        height, width = data.read(expand(path), (), shape[-1], value_range).shape[:2]
        picture = diffusion.to_unit(data.read(expand(path), shape[:2], shape[-1], value_range))
    except Exception as error:  # Pillow can raise anything on a damaged file
        raise errors.DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    scale = min(height / shape[0], width / shape[1])
    if (height, width) != (round(scale * shape[0]), round(scale * shape[1])):
        log.note(f"{path}, {width}x{height}, is cropped to its central {scale * shape[1]:.0f}x{scale * shape[0]:.0f}")
    return picture, (height, width)


def read_mask(path, known, size, shape):
    """The mask for the picture `known` of that size, in the model's shape: true (kept) where more than half black.

    Raises ConfigError for a mask of another aspect ratio, which would be cropped differently; for one that keeps all
    or nothing; and for transparent parts, which are ambiguous.
    """
    import numpy as np
    from PIL import Image

    mask, (mask_height, mask_width) = read(path, shape)
    levels, (height, width) = (mask + 1) / 2, size
    if abs(height * mask_width - width * mask_height) > max(
        height, width, mask_height, mask_width
    ):  # more than rounding
        raise errors.ConfigError(
            f"--inpaint={known} is {width}x{height}, --mask={path} {mask_width}x{mask_height}: they would be cropped "
            f"differently to the model's {shape[1]}x{shape[0]}; give both the same size, or crop both to that one"
        )
    with Image.open(expand(path)) as picture:
        if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise errors.ConfigError(f"--mask={path} has transparent parts; save it as black (kept) and white, opaque")
    if np.all(levels < 0.5) or np.all(levels >= 0.5):
        effect = "black, so that nothing is painted" if levels[0, 0, 0] < 0.5 else "white, so that nothing is kept"
        low, high = (255 * float(level) for level in (levels.min(), levels.max()))
        raise errors.ConfigError(f"--mask={path} is all {effect} (levels {low:.0f} to {high:.0f} of 255)")
    gray = np.mean((levels > 0.25) & (levels < 0.75))
    if gray > 0.25:
        warnings.warn(
            f"--mask={path} is gray in {gray:.0%} of its pixels; what is more than half white is painted", stacklevel=2
        )
    return levels < 0.5

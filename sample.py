"""Sample from a trained run: python sample.py --workdir=runs/digits --num=64 --seed=0

Needs the folder of the run and nothing else. Image i of a seed is the same picture in any batch.
"""

import dataclasses
import io
import sys
import time
from pathlib import Path

from ddpm_jax import errors, options
from ddpm_jax.files import write_atomic


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    workdir: str = options.option("runs/digits", "folder of the run")
    num: int = options.option(64, "images", options.at_least(1))
    seed: int = options.option(0, "seed of the images", options.at_least(0), options.below(2**32))
    sampler: str = options.option("ddpm", "a name in ddpm_jax.samplers.SAMPLERS")
    steps: int = options.option(0, "sampling steps; 0 for all T", options.at_least(0))
    spacing: str = options.option("trailing", "of the times, a name in ddpm_jax.schedules.SPACINGS")
    eta: float | None = options.option(None, "noise of the sampler ddim, from 0 to 1")
    weights: str = options.option("ema", "averaged or plain parameters", options.one_of("ema", "raw"))
    label: int | None = options.option(None, "class of all images; without it each class in turn")
    batch_size: int = options.option(64, "images at a time, over all devices", options.at_least(1))
    out: str = options.option("", "folder to write to; WORKDIR/out when empty")
    png: bool = options.option(False, "also write each image as a PNG")
    gif: bool = options.option(False, "also write a GIF of the first batch being denoised")
    overwrite: bool = options.option(False, "write into a folder that already holds samples")
    platform: str = options.option("auto", "what to run on", options.one_of("auto", "cpu", "gpu", "tpu"))
    cpu_devices: int = options.option(
        0, "as how many devices a CPU is used; 0 for up to one a core", options.at_least(0)
    )
    debug: bool = options.option(False, "show tracebacks")


FRAMES = 40  # of the GIF


def main():
    args = options.parse(Args, sys.argv[1:], "sample.py", __doc__)
    workdir = Path(args.workdir).expanduser()
    folder, out = workdir / "checkpoints", Path(args.out or workdir / "out").expanduser()
    if not folder.is_dir():
        raise errors.CheckpointError(
            f"there is no run in {workdir} (no folder checkpoints); train first, or see --workdir"
        )
    if (out / "samples.npz").exists() and not args.overwrite:
        raise errors.ConfigError(f"{out} already holds samples; take another --out, or say --overwrite")

    import numpy as np

    from ddpm_jax import checkpoint, experiment, images, keys, log, parallel

    checkpoint.quiet()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ConfigError(f"cannot write to --out={out}: {error.strerror}") from error
    parallel.start(args.batch_size, platform=args.platform, distributed="off", cpu_devices=args.cpu_devices)
    parts, params, step = restore(folder, args.weights)
    steps = args.steps or parts.config.diffusion.T
    log.note(
        f"step {step:,} of {workdir}, {args.weights} weights, {args.sampler} with {steps} steps, {parallel.describe()}"
    )
    indices, root = np.arange(args.num), keys.root(args.seed, "sample")
    labels = choose_labels(args.label, parts, indices)

    given = {} if args.eta is None else {"eta": args.eta}
    frames = FRAMES if args.gif else 1
    generate = experiment.make_generate(parts, args.sampler, steps, args.spacing, frames, **given)
    params = parallel.replicate(params)
    clock, batches = time.monotonic(), []
    for batch in parallel.generate_batches(
        parallel.pmap_generate(generate), params, root, indices, labels, args.batch_size
    ):
        batches.append(batch)
        done, took = sum(map(len, batches)), time.monotonic() - clock
        log.note(f"{done}/{args.num} images, {done / took:.1f} a second")
    samples = np.concatenate([batch[:, -1] for batch in batches])

    buffer = io.BytesIO()
    np.savez(buffer, images=samples, **({} if labels is None else {"labels": labels}))
    write_atomic(out / "samples.npz", buffer.getvalue())
    images.save_png(out / "grid.png", images.grid(samples[:256]))
    if args.png:
        for index, image in zip(indices, samples, strict=True):
            images.save_png(out / f"image_{index:06}.png", image)
    if args.gif:
        images.save_gif(out / "denoising.gif", [images.grid(page) for page in batches[0][:64].swapaxes(0, 1)])
    log.note(f"wrote {out / 'grid.png'} and samples.npz")
    return 0


def restore(folder, weights):
    """(Experiment, parameters, step) of the newest whole checkpoint of a run."""
    import json

    import jax

    from ddpm_jax import checkpoint, config, experiment

    item, parts = {"ema": "ema_params", "raw": "params"}[weights], None

    def expect(meta):
        nonlocal parts
        parts = experiment.make(config.from_json(json.dumps(meta["config"]), f"{folder}, meta"), meta["shape"])
        return {item: jax.eval_shape(parts.init, jax.random.key(0))}

    meta, trees = checkpoint.load(folder, [item], expect)
    return parts, trees[item], meta["step"]


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


if __name__ == "__main__":
    sys.exit(errors.run(main))

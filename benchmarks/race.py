"""Recipes at equal wall time: python -m benchmarks.race --data=digits --minutes=1 --recipes=digits,diffusers_small

Trains each recipe in a process of its own for the same time, from the start of the process to the last step, with
compilation and without sampling; draws the same number of samples with its own sampler and the same number of network
evaluations; and compares them with images that training has not seen. It repeats this for each seed. What is finished
is in OUT/NAME/RECIPE/seed-N/result.json and is not repeated, so that an interrupted race resumes. The page with tables
and grids of all races in OUT is written after each run; --report only writes it.

A recipe is the name of a config in configs/, or diffusers, diffusers_small, diffusers_best or ddpm_pytorch, which run
in --their-python. Changes follow a colon: "folder_cpu:train.learning_rate=1e-3;sample.sampler=ddim" has options of the
config and of sample.py; sample.guide=checkpoints/500 is a step of the run itself. folder_cpu@DIR is that of another
revision of this project, in the folder DIR. A config chooses its number of steps by train.minutes; one of a revision
without it is stopped by SIGTERM when the time is over. Recipes that differ only in how they draw share one training.
"""

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import race_report, recipes
from benchmarks.peers import THEIR_PYTHON
from ddpm_jax import config as configs
from ddpm_jax import errors, options
from ddpm_jax.run import log
from ddpm_jax.run.files import expand, write_atomic

HELD_OUT = 0.2  # share of the images that is held out where no number is given
SPLIT = 0  # seed of the split


@dataclasses.dataclass(frozen=True)
class Args(options.Arguments):
    data: str = options.option("digits", "the images, as in data.source")
    image_size: tuple[int, ...] = options.same_as(configs.Data, "image_size")
    channels: int = options.same_as(configs.Data, "channels")
    held_out: str = options.option(
        "", "the images to compare with, as in data.source, or a number of --data; a fifth of --data when empty"
    )
    name: str = options.option("", "name of the race; from --data and --minutes when empty")
    minutes: float = options.option(1.0, "minutes of training, compilation included", options.above(0), options.finite)
    recipes: tuple[str, ...] = options.option(("digits",), "the recipes, separated by commas", ("not empty", len))
    seeds: tuple[int, ...] = options.option((0,), "seeds of training and samples", options.all_of(options.at_least(0)))
    num: int = options.option(1000, "samples of each run", options.at_least(20))
    evaluations: int = options.option(50, "evaluations of the network for each sample", options.at_least(2))
    out: str = options.option("runs/race", "folder to write to")
    their_python: str = options.option(*THEIR_PYTHON)
    threads: int = options.option(2, "threads of PyTorch", options.at_least(1))
    report: bool = options.option(False, "only write the page with the tables and grids of all races in --out")
    page: str = options.option("", "the page to write; OUT/recipes.md when empty")
    debug: bool = options.option(*options.DEBUG)


class Images(NamedTuple):
    train: np.ndarray  # uint8 (N, H, W, C)
    held_out: np.ndarray


@log.quiet()
def main(argv=None):
    args = options.parse(Args, argv, "-m benchmarks.race", __doc__)
    out, chosen = expand(args.out), recipes.parse(args.recipes)
    page = expand(args.page or out / "recipes.md")
    failures = [] if args.report else race(args, chosen, out, page)
    for failure in failures:
        log.note(f"failed: {failure}")
    log.note(f"wrote {race_report.write(out, page)}")
    return int(bool(failures))


def race(args, chosen, out, page):
    """Run what is missing of a race in the folder `out`; a list of the errors of what has failed."""
    from ddpm_jax import parallel

    parallel.start(64, platform="cpu", distributed="off")
    images = load(args)
    name = args.name or f"{Path(args.data.rpartition(':')[2]).stem}-{args.minutes:g}min".replace(" ", "_")
    folder, shape = out / name, images.train.shape[1:]
    data = (folder / "train.npz").absolute()
    job = recipes.Job(args.minutes, args.num, args.evaluations, data, shape, args.their_python, args.threads)
    for recipe in chosen:
        recipes.check(recipe, job)
    recipes.check_peers(chosen, job)
    with errors.writing(f"--out={args.out}"):
        measure = prepare(args, images, folder)
    failures = []
    for seed, recipe in itertools.product(args.seeds, chosen):
        result = folder / recipe.slug / f"seed-{seed}" / "result.json"
        if result.exists():
            log.note(f"{recipe.text}, seed {seed}: already finished")
            continue
        try:
            run(recipe, job, seed, result, measure)
        except recipes.Failed as error:
            failures.append(error)
            log.note(str(error))
        race_report.write(out, page)
    return failures


def run(recipe, job, seed, result, measure):
    """Train, sample and measure a recipe, and write the file `result`, its samples and a grid of them beside it."""
    folder = result.parent
    if folder.exists():
        shutil.rmtree(folder)  # the remains of an interrupted run
    folder.mkdir(parents=True)
    log.note(f"{recipe.text}, seed {seed}: up to {job.minutes:g} minutes of training")
    record = describe(recipe, seed) | recipes.run(recipe, job, seed, folder)
    samples = np.load(folder / "samples.npz")["images"]
    record["metrics"] = measure(samples)
    save_grid(folder / "grid.png", samples)
    shutil.rmtree(folder / "out", ignore_errors=True)
    write_json(result, record)
    log.note(race_report.row(race_report.label(record), [record]))


def describe(recipe, seed):
    """The part of a record that says what was raced."""
    record = {"recipe": recipe.text, "name": recipe.name, "changes": recipe.changes, "peer": recipe.is_peer}
    return record | {"clone": bool(recipe.clone), "seed": seed}


def prepare(args, images, folder):
    """Write the images and the settings of the race to its folder; measure(samples) -> metrics.

    Raises ConfigError if the folder holds a race with other settings.
    """
    from ddpm_jax.evaluation.features import cache
    from ddpm_jax.run import checkpoint
    from ddpm_jax.run.folder import revision

    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("minutes", "num", "evaluations", "threads")}
    settings |= {name: cache.digest(part) for name, part in images._asdict().items()}
    file = folder / "race.json"
    if file.exists():
        before = json.loads(file.read_text())["settings"]
        changes = [f"{name}={before[name]}, now {new}" for name, new in settings.items() if before[name] != new]
        if changes:
            raise errors.ConfigError(f"{folder} holds a race with {'; '.join(changes)}; take another --name or --out")
    measure = make_measure(images, folder)
    if not file.exists():
        np.savez(folder / "train.npz", images=images.train)
        save_grid(folder / "held_out.png", images.held_out)
        record = {"settings": settings, "name": folder.name, "data": shorten(args.data)}
        record |= {"held_out": shorten(args.held_out), "image_size": args.image_size, "channels": args.channels}
        record |= {"numbers": {name: len(part) for name, part in images._asdict().items()}}
        record |= {"shape": images.train.shape[1:], "references": references(images, measure, args.num)}
        record |= {"machine": race_report.describe_machine(), "versions": checkpoint.versions()}
        record |= {"python": sys.version.split()[0], "revision": revision()}
        write_json(file, record)
    return measure


def shorten(source):
    """A data source without the folder of its file."""
    kind, colon, path = source.partition(":")
    return f"{kind}{colon}{Path(path).name}" if path else kind


def save_grid(file, pictures):
    from ddpm_jax import images

    images.save_png(file, images.grid(pictures[:64]))


def write_json(file, record):
    write_atomic(file, (json.dumps(record, indent=1) + "\n").encode())


def load(args):
    """The Images of --data and --held-out. No held-out image equals a training image."""
    from ddpm_jax import data
    from ddpm_jax.evaluation.samples import check_sizes

    size = {"image_size": args.image_size, "channels": args.channels}
    everything = data.load(args.data, **size).images
    if not args.held_out or args.held_out.isdigit():
        images = split(everything, int(args.held_out or HELD_OUT * len(everything)))
    else:
        images = Images(everything, data.load(args.held_out, **size).images)
        if images.train.shape[1:] != images.held_out.shape[1:]:
            shapes = " and ".join("x".join(map(str, part.shape[1:])) for part in images)
            raise errors.ConfigError(f"--data and --held-out have images of {shapes}; give an --image-size")
    known = {image.tobytes() for image in images.train}
    new = np.array([image.tobytes() not in known for image in images.held_out])
    if not new.all():
        log.note(f"{np.sum(~new)} held-out images are training images too and are left out")
    images = images._replace(held_out=images.held_out[new])
    check_sizes(len(images.train), len(images.held_out))
    return images


def split(images, number):
    """Images with `number` held out at random, always the same."""
    if not 0 < number < len(images):
        raise errors.ConfigError(f"--held-out={number} must be above 0 and below the {len(images):,} images of --data")
    order = np.random.default_rng(SPLIT).permutation(len(images))
    return Images(images[np.sort(order[number:])], images[np.sort(order[:number])])


def make_measure(images, folder):
    """measure(samples, real=held-out) -> metrics of uint8 (N, H, W, C) as plain numbers.

    KID, Frechet distance, precision and recall compare with `real`, copies with the training images. KID is the mean
    over ten or more random parts of the samples, each of at most 1000, against all of `real`.
    """
    from ddpm_jax.evaluation import features, metrics
    from ddpm_jax.evaluation.features import cache
    from ddpm_jax.evaluation.samples import MAX_SUBSET, MIN_SUBSETS

    extractor = features.load("enl0")

    def of_real(name):
        where = {"source": f"{folder.name} {name}", "split": ""}
        return cache.cached_features(extractor, getattr(images, name), where, folder / "features")[0]

    train, held_out = of_real("train"), of_real("held_out")

    def measure(samples, real=held_out):
        found = np.concatenate(list(features.extract(extractor, samples)))
        size = min(MAX_SUBSET, len(samples) // MIN_SUBSETS)
        kid, error, _ = metrics.kid_of_subsets(found, real, size)
        precision, recall = metrics.precision_recall(found, real)
        channels = metrics.channel_statistics(samples)
        pixels = (part.reshape(len(part), -1) for part in (samples, images.train))
        measured = {
            "kid": 1000 * kid,
            "kid_error": 1000 * error,
            "frechet": metrics.frechet(metrics.moments(found), metrics.moments(real)),
            "precision": precision,
            "recall": recall,
            "copies_pixels": metrics.copies(*pixels).share,
            "copies_features": metrics.copies(found, train).share,
        }
        measured = {name: float(value) for name, value in measured.items()}
        return measured | {"means": channels.mean.tolist(), "spreads": channels.spread.tolist()}

    return measure


def references(images, measure, num):
    """{row: metrics} of held-out images, one half against the other, and of training images."""
    from ddpm_jax.evaluation import features

    halves = np.random.default_rng(SPLIT).permutation(len(images.held_out))
    halves = [images.held_out[np.sort(half)] for half in np.array_split(halves, 2)]
    extractor = features.load("enl0")
    rest = np.concatenate(list(features.extract(extractor, halves[1])))
    chosen = np.random.default_rng(SPLIT).permutation(len(images.train))[:num]
    return {
        race_report.HELD_OUT: measure(halves[0][:num], rest),
        race_report.TRAINING: measure(images.train[np.sort(chosen)]),
    }


if __name__ == "__main__":
    sys.exit(errors.run(main))

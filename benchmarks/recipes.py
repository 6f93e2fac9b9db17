"""The recipes of race.py: which there are, and how one is trained and sampled in processes of its own.

A recipe is a config in configs/ or a peer in race_peers.PEERS, with changes:
folder_cpu, "folder_cpu:train.learning_rate=1e-3;sample.sampler=ddim", folder_cpu@DIR for the folder DIR of another
revision of this project, "diffusers_small:learning_rate=2e-4".
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import race_peers
from ddpm_jax import config as configs
from ddpm_jax import errors, options
from ddpm_jax.run.files import expand

ROOT = Path(__file__).absolute().parents[1]
SAMPLE = "sample."  # before the options of sample.py among the changes
CALLS = {"heun": 2, "edm": 2}  # network evaluations in a step of a sampler, where not one
LOG_EVERY, NEVER = 20, "10000000"  # steps
TRAINING_FIELDS = "steps", "seconds", "batch_size", "images_per_second", "curve", "revision"  # of a record
GRACE = 1.02  # a run that chooses its number of steps may take so much of its time


class Failed(errors.UserError):
    """A recipe has not been trained or sampled."""


class Recipe(NamedTuple):
    text: str  # as it was given
    name: str
    clone: str  # folder of another revision of this project; empty for this one
    changes: dict[str, str]

    @property
    def root(self):
        return expand(self.clone).absolute() if self.clone else ROOT

    @property
    def is_peer(self):
        return self.name in race_peers.PEERS

    @property
    def slug(self):
        """The recipe as the name of a folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.text).strip("_")


class Job(NamedTuple):
    """What all recipes of a race have in common."""

    minutes: float
    num: int
    evaluations: int
    data: Path  # npz file of the training images
    shape: tuple[int, int, int]
    their_python: str
    threads: int


def parse(parts):
    """The Recipes of --recipes, a list that was split at its commas: a part that begins with a digit is not one."""
    texts = []
    for part in parts:
        if texts and re.match(r"[-.\d]", part):
            texts[-1] += f",{part}"
        else:
            texts.append(part)
    return [_parse(text) for text in dict.fromkeys(texts)]


def _parse(text):
    where, _, rest = text.partition(":")
    name, _, clone = where.partition("@")
    pairs = [pair.partition("=") for pair in rest.split(";") if pair]
    recipe = Recipe(text, name, clone, {key: value for key, _, value in pairs})
    if recipe.is_peer and clone:
        raise errors.ConfigError(f"recipe {text}: {name} is no config of this project, so it has no @DIR")
    if not recipe.is_peer and not (recipe.root / "configs" / f"{name}.py").is_file():
        known = sorted([*race_peers.PEERS, *(path.stem for path in (recipe.root / "configs").glob("*.py"))])
        hint = "".join(f"; did you mean {near}?" for near in options.closest(name, known))
        raise errors.ConfigError(f"recipe {text}: {name} is not one of {', '.join(known)}{hint}")
    return recipe


def check(recipe, job):
    """Raise ConfigError for changes that cannot be made, and for a network that does not fit the images."""
    from ddpm_jax import experiment

    try:
        if recipe.is_peer:
            experiment.make(*layout(recipe, job)) if settings(recipe)["layout"] else None
        elif not recipe.clone:
            experiment.make(changed(recipe), job.shape)
        sampling(recipe, job, "ddpm")
    except errors.ConfigError as error:
        raise errors.ConfigError(f"recipe {recipe.text}: {error}") from error


def changed(recipe):
    """The Config of a recipe of this revision."""
    config = configs.load(recipe.name)
    kinds = {name: kind for name, _, kind, _ in options.leaves(configs.Config, config)}
    given = {name: text for name, text in recipe.changes.items() if not name.startswith(SAMPLE)}
    for name in given:
        if name not in kinds:
            hint = "".join(f"; did you mean {near}?" for near in options.closest(name, list(kinds)))
            raise errors.ConfigError(f"{name} is no option of the config{hint}")
    return options.replace(config, {name: options.from_text(kinds[name], text, name) for name, text in given.items()})


def settings(recipe):
    """The settings of a peer's recipe."""
    defaults = race_peers.PEERS[recipe.name]
    for name in recipe.changes:
        if name not in defaults:
            raise errors.ConfigError(f"{name} is not one of {', '.join(defaults)}")

    def read(name, text):
        default = defaults[name]
        return options.from_text(tuple[float, ...] if isinstance(default, tuple) else type(default), text, name)

    return defaults | {name: read(name, text) for name, text in recipe.changes.items()}


def layout(recipe, job):
    """(Config, shape) of our network whose layout a peer's recipe has."""
    config = configs.load(settings(recipe)["layout"])
    multiple = 2 ** (len(config.model.multipliers) - 1)
    return config, (*(side + -side % multiple for side in job.shape[:2]), job.shape[2])


def sampling(recipe, job, default):
    """The options of sample.py, {name: text}; `default`: the sampler where the recipe names none."""
    given = {name.removeprefix(SAMPLE): text for name, text in recipe.changes.items() if name.startswith(SAMPLE)}
    found = {"sampler": default} | given
    calls = CALLS.get(found["sampler"], 1) * (2 if float(found.get("guidance", 1)) != 1 else 1)
    found.setdefault("steps", str(job.evaluations // calls))
    if not recipe.is_peer and int(found["steps"]) * calls > job.evaluations:
        raise errors.ConfigError(
            f"{SAMPLE}steps={found['steps']} of {found['sampler']} evaluate the network {int(found['steps']) * calls} "
            f"times; at most {job.evaluations}"
        )
    return found


def has_minutes(root):
    """Whether the configs of the revision in the folder `root` have train.minutes."""
    return re.search(r"(?m)^    minutes:", (root / "ddpm_jax" / "config.py").read_text()) is not None


def run(recipe, job, seed, folder):
    """Train and sample a recipe in `folder`: its record for the report, and samples.npz. Raises Failed."""
    if recipe.is_peer:
        return run_peer(recipe, job, seed, folder)
    return (reuse_training(recipe, folder) or train(recipe, job, seed, folder)) | draw(recipe, job, seed, folder)


def training_key(text, changes):
    """What decides the training of the recipe `text`: config, revision, and changes other than those of sample.py."""
    return text.partition(":")[0], {name: value for name, value in changes.items() if not name.startswith(SAMPLE)}


def reuse_training(recipe, folder):
    """Copy the run of the same seed of a recipe that differs only in how it draws: what `train` gave; None without one.

    folder: RACE/RECIPE/seed-N, where `train` would write.
    """
    for file in sorted(folder.parents[1].glob(f"*/{folder.name}/result.json")):
        record, workdir = json.loads(file.read_text()), file.parent / "run"
        same = training_key(record["recipe"], record["changes"]) == training_key(recipe.text, recipe.changes)
        if same and workdir.is_dir():
            shutil.copytree(workdir, folder / "run")
            return {name: record[name] for name in TRAINING_FIELDS}
    return None


def train(recipe, job, seed, folder):
    """Train a config by train.py in `folder`/run: the TRAINING_FIELDS of its record."""
    from ddpm_jax.run import checkpoint

    root, workdir, seconds = recipe.root, folder / "run", 60 * job.minutes
    options_ = {"data.source": f"npz:{job.data}", "data.image_size": "", "data.channels": "0", "train.seed": str(seed)}
    options_ |= {"train.sample_every": NEVER, "train.log_every": str(LOG_EVERY)}
    options_ |= {"train.sample_num": "1", "train.sample_steps": "2"}  # of the grid after the last step
    if has_minutes(root) and "train.steps" not in recipe.changes:
        options_["train.minutes"], limit = f"{job.minutes:g}", GRACE * seconds
    else:
        options_["train.steps"], limit = NEVER, seconds
        options_ |= {"train.minutes": "0"} if has_minutes(root) else {}
    options_ |= {name: text for name, text in recipe.changes.items() if not name.startswith(SAMPLE)}
    command = [f"--config=configs/{recipe.name}.py", *(f"--config.{name}={text}" for name, text in options_.items())]
    cold = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # compilation is a part of the time
    start = time.time()
    ours(root, folder / "train.log", ["train.py", *command, f"--workdir={workdir}"], limit, **cold)
    steps = checkpoint.steps(workdir / "checkpoints")
    if not steps:
        raise Failed(f"{recipe.text}: no training step within {job.minutes:g} minutes; see {folder / 'train.log'}")
    rows = [json.loads(line) for line in read(workdir / "metrics.jsonl").splitlines()]
    ended = rows and rows[-1]["step"] == max(steps)  # by itself; what follows the last row is a save and a grid
    took = (workdir / "metrics.jsonl").stat().st_mtime - start if ended else limit
    config, started = read_config(workdir), json.loads(read(workdir / "run.json"))
    speeds = [row["images_per_second"] for row in rows if row["images_per_second"]]
    last = started[-1] if isinstance(started, list) else started
    speed = statistics.median(speeds) if speeds else None
    curve = smooth([(row["step"], row["loss"]) for row in rows])
    values = max(steps), took, config["train"]["batch_size"], speed, curve, last.get("git")
    return dict(zip(TRAINING_FIELDS, values, strict=True))


def draw(recipe, job, seed, folder):
    """Sample from `folder`/run by sample.py: the rest of the record."""
    workdir = folder / "run"
    choices = sampling(recipe, job, read_config(workdir)["train"]["sampler"])
    given = choices | ({"guide": workdir / choices["guide"]} if "guide" in choices else {})
    command = [f"--workdir={workdir}", f"--num={job.num}", f"--seed={seed}", f"--out={folder / 'out'}", "--overwrite"]
    command += [f"--{name}={value}" for name, value in given.items()]
    ours(recipe.root, folder / "sample.log", ["sample.py", *command])
    os.replace(folder / "out" / "samples.npz", folder / "samples.npz")
    return {"sampling": " ".join(f"{name}={text}" for name, text in choices.items())}


def read_config(workdir):
    """The config.json of a run, as plain dicts: that of another revision may have other fields."""
    return json.loads(read(workdir / "config.json"))


def smooth(points, window=race_peers.WINDOW):
    """[[step, mean loss of the `window` steps before]] of (step, loss): for each `window` steps, and for the last."""
    last = points[-1][0] if points else 0
    ends = [*range(window, last, window), last]
    losses = {end: [loss for step, loss in points if end - window < step <= end] for end in ends}
    return [[end, statistics.mean(found)] for end, found in losses.items() if found]


def ours(root, log, command, limit=None, **variables):
    """Run a script of the revision in `root`; stop it after `limit` seconds, which is no failure."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = run_process([sys.executable, *command], root, log, limit, PYTHONPATH=path, **variables)
    if code not in (0, errors.PREEMPTED):
        raise Failed(f"{' '.join(command[:2])} ended with exit code {code}: {last_line(log)}; see {log}")


def run_peer(recipe, job, seed, folder):
    """`run` for another project's recipe, by race_peers.py in its own Python."""
    chosen, unet = settings(recipe), None
    multiple = 2 ** (race_peers.LEVELS[chosen["library"]] - 1)
    if chosen["layout"]:
        from ddpm_jax import experiment
        from ddpm_jax.interop import layout as layouts

        config, shape = layout(recipe, job)
        unet, _ = layouts.to_diffusers(experiment.make(config, shape))
        multiple = 2 ** (len(config.model.multipliers) - 1)
    given = {name: getattr(job, name) for name in ("minutes", "threads", "num", "evaluations")}
    given |= {"out": str(folder), "data": str(job.data), "seed": seed, "multiple": multiple, "unet": unet}
    command = [their_python(job), str(Path(race_peers.__file__).absolute())]
    log = folder / "train.log"
    code = run_process([*command, json.dumps(given | {"settings": chosen, "start": time.time()})], folder, log)
    if code or not (folder / "samples.npz").is_file():
        raise Failed(f"{recipe.text} ended with exit code {code}: {last_line(log)}; see {log}")
    sampler = chosen.get("sampler", "ddim")
    return json.loads(read(folder / "training.json")) | {"sampling": f"sampler={sampler} steps={job.evaluations}"}


def their_python(job):
    return str(expand(job.their_python or sys.executable))


def check_peers(chosen, job):
    """Raise ConfigError unless their Python has the modules of the peers among the recipes."""
    for library in {settings(recipe)["library"] for recipe in chosen if recipe.is_peer}:
        code = f"import torch, {library}"
        try:
            done = subprocess.run([their_python(job), "-c", code], capture_output=True, text=True, check=False)
        except OSError as error:
            raise errors.ConfigError(f"cannot run --their-python={job.their_python}: {error.strerror}") from error
        if done.returncode:
            raise errors.ConfigError(
                f"{their_python(job)} cannot import {library} ({done.stderr.strip().splitlines()[-1]}); give a Python "
                "that has it and torch as --their-python=PATH"
            )


def run_process(command, folder, log, limit=None, **variables):
    """The exit code of a process in `folder` with its output in the file `log`; SIGTERM after `limit` seconds."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=file, stderr=file)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(limit)
            process.terminate()
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def last_line(file):
    """The last line of a log that says something."""
    return next((line.strip() for line in reversed(read(file).splitlines()) if line.strip()), "no output")


def read(file):
    """The text of a file; empty if there is none."""
    try:
        return Path(file).read_text(errors="replace")
    except FileNotFoundError:
        return ""

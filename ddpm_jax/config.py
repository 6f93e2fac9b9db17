"""What can be chosen: nested frozen dataclasses. Where data do not decide, the defaults are the paper's CIFAR-10.

Values come from a config file (`--config=configs/digits.py`), from the command line (`--config.train.steps=500`) and
from the JSON stored with a run; options.py says how they are read and checked.
"""

import dataclasses
import json
import runpy
import traceback
from pathlib import Path
from typing import Any

from ddpm_jax.errors import ConfigError
from ddpm_jax.options import (
    Section,
    above,
    all_of,
    at_least,
    below,
    closest,
    finite,
    leaves,
    one_of,
    option,
    replace,
)
from ddpm_jax.run.files import CACHE, expand


@dataclasses.dataclass(frozen=True)
class Data(Section):
    source: str = option("tfds:cifar10", "digits, tfds:NAME, folder:DIR or npz:FILE")
    split: str = option(
        "train",
        "split of a tfds source, in the spelling of TFDS; of a folder its subfolder, or all for the whole of it",
    )
    image_size: tuple[int, ...] = option(
        (),
        "height,width in pixels; one number for a square; empty for the data's own",
        all_of(at_least(1)),
        ("one or two numbers", lambda v: len(v) <= 2),
    )
    channels: int = option(0, "1 gray, 3 RGB, 0 for the data's own", one_of(0, 1, 3))
    flip: bool = option(False, "mirror images at random, left to right")
    max_unreadable: float = option(
        0.1, "share of a folder's files that may be unreadable", at_least(0), ("at most 1", lambda v: v <= 1)
    )
    data_dir: str = option("", "folder of prepared TFDS data sets; empty for TFDS's own default")
    cache_dir: str = option(CACHE, "folder of decoded images")
    range: tuple[float, ...] = option(
        (),
        "LOW,HIGH: the values of more than 8 bits that become black and white, in all files; 0,65535 when empty",
        all_of(finite),
        ("two rising numbers", lambda v: len(v) in (0, 2) and list(v) == sorted(set(v))),
    )
    frames: str = option("first", "of a folder's files with several: first or all", one_of("first", "all"))


@dataclasses.dataclass(frozen=True)
class Model(Section):
    channels: int = option(128, "width at full resolution", at_least(4))
    multipliers: tuple[int, ...] = option(
        (1, 2, 2, 2),
        "width of each level over `channels`; each further level halves the image",
        all_of(at_least(1)),
        ("at least one number", len),
    )
    num_res_blocks: int = option(2, "residual blocks a level on the way down; one more on the way up", at_least(1))
    attention_resolutions: tuple[int, ...] = option(
        (16,), "shorter side of the images at which every block is followed by attention", all_of(at_least(1))
    )
    num_heads: int = option(1, "attention heads", at_least(1))
    dropout: float = option(0.1, "share of activations dropped in training", at_least(0), below(1))
    num_classes: int = option(0, "number of class labels; 0 trains without labels", at_least(0))
    scale_shift: bool = option(False, "the time embedding scales and shifts the second norm (Nichol & Dhariwal 2021)")
    groups: int | str = option(
        32,
        "groups of the group norms; auto for the largest divisor of the channels up to 32",
        ("a number above 0 or auto", lambda value: value == "auto" or (isinstance(value, int) and value > 0)),
    )
    dtype: str = option("float32", "type of the convolutions' arithmetic", one_of("float32", "bfloat16"))
    remat: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    # What other codebases do differently (docs/interop.md); the defaults are the paper's.
    norm_eps: float = option(1e-6, "epsilon of the group norms", above(0), finite)
    head_channels: int = option(0, "channels of an attention head; 0 for num_heads heads at every width", at_least(0))
    symmetric_halving: bool = option(False, "pad the halving convolutions on all sides, not only below and right")
    cos_first: bool = option(False, "the time embedding is cos before sin")
    frequency_shift: int = option(
        1, "the time embedding's frequencies are 10000^(-i / (channels / 2 - this)), i from 0", one_of(0, 1)
    )


@dataclasses.dataclass(frozen=True)
class Diffusion(Section):
    schedule: str = option("linear", "noise schedule, a name in ddpm_jax.schedules.SCHEDULES or CURVES")
    T: int = option(
        1000, "number of diffusion steps; of a continuous schedule, how many sampling takes when not told", at_least(1)
    )
    parameterization: str = option("eps", "what the network outputs, a name in ddpm_jax.diffusion.PARAMETERIZATIONS")
    weighting: str = option("simple", "weight of the loss over time, a name in ddpm_jax.diffusion.WEIGHTINGS")
    variance: str = option(
        "fixedlarge", "variance of a reverse step, a name in ddpm_jax.diffusion.VARIANCES; learned by the hybrid loss"
    )
    betas: tuple[float, ...] = option(
        (),
        "own betas, beta_1 to beta_T, in place of a discrete schedule's",
        all_of(("above 0 and at most 1", lambda v: 0 < v <= 1)),
    )
    zero_terminal_snr: bool = option(False, "rescale the schedule to leave no signal at T (Lin et al. 2023)")
    base_resolution: int = option(
        0, "side of the images that the schedule is meant for: larger ones get more noise; 0 for any", at_least(0)
    )
    error: str = option("eps", "where the loss measures the error, a name in ddpm_jax.diffusion.ERRORS")
    distance: str = option("l2", "of each pixel's error, a name in ddpm_jax.diffusion.DISTANCES")
    time_sampling: str = option("uniform", "how t is drawn in training, a name in ddpm_jax.training.TIME_SAMPLINGS")
    self_conditioning: bool = option(False, "show the network its own last x_0_hat (Chen et al. 2023)")
    label_dropout: float = option(
        0.0, "share of labels hidden in training, for classifier-free guidance", at_least(0), below(1)
    )


@dataclasses.dataclass(frozen=True)
class Train(Section):
    steps: int = option(800_000, "optimiser steps in the whole run", at_least(1))
    batch_size: int = option(128, "images a step, over all devices", at_least(1))
    accumulate: int = option(1, "micro-batches that a device's share of a step is cut into", at_least(1))
    learning_rate: float = option(2e-4, "Adam's learning rate after the warm-up", above(0), finite)
    warmup_steps: int = option(5000, "steps over which the learning rate grows from 0", at_least(0))
    grad_clip: float = option(1.0, "largest global norm of the gradient; inf for no limit", above(0))
    ema_decay: float = option(0.9999, "decay of the averaged parameters after their warm-up", at_least(0), below(1))
    averages: tuple[float, ...] = option(
        (), "lengths (sigma_rel) of averages stored for post-hoc EMA, like 0.05,0.1; none when empty", all_of(above(0))
    )
    average_every: int = option(10_000, "steps between two stored averages", at_least(1))
    on_nan: str = option(
        "skip",
        "a step that is not finite is left out (skip), ends the run (abort), or sends it back to the newest "
        "checkpoint, on to other batches and noise (rollback)",
        one_of("skip", "abort", "rollback"),
    )
    max_skipped: int = option(
        10, "non-finite steps in a row, or roll-backs to one checkpoint, after which the run ends", at_least(1)
    )
    watchdog: int = option(
        1800, "seconds without a finished step after which all stacks are shown; 0 for never", at_least(0), below(10**6)
    )
    watchdog_abort: bool = option(False, "then also end the process, for a supervisor to start it again")
    steps_per_call: int = option(
        1, "steps that the devices take without asking the host; the numbers of steps below are multiples", at_least(1)
    )
    ensemble: int = option(
        1, "runs trained at once, with the seeds `seed`, `seed` + 1 and so on, one or more a device", at_least(1)
    )
    learning_rates: tuple[float, ...] = option(
        (), "a learning rate for each run of an ensemble, all with the same seed", all_of(above(0)), all_of(finite)
    )
    seed: int = option(0, "seed of everything random", at_least(0), ("below 2**32", lambda v: v < 2**32))
    log_every: int = option(100, "steps between two lines of metrics", at_least(1))
    checkpoint_every: int = option(5000, "steps between two checkpoints", at_least(1))
    keep: int = option(3, "newest checkpoints kept", at_least(1))
    keep_every: int = option(0, "steps between two checkpoints kept for good; 0 for none", at_least(0))
    sample_every: int = option(5000, "steps between two grids of samples", at_least(1))
    sample_num: int = option(64, "images in a grid", at_least(1))
    sample_steps: int = option(100, "sampling steps of a grid's images", at_least(1))
    sampler: str = option("ddpm", "sampler of the grids, a name in ddpm_jax.samplers.SAMPLERS")
    evaluate_every: int = option(
        0, "steps between two KIDs of a few samples in metrics.jsonl (needs the extra kid); 0 for never", at_least(0)
    )
    evaluate_num: int = option(1000, "samples of such a KID", at_least(20))
    evaluate_steps: int = option(20, "sampling steps of these", at_least(1))
    evaluate_sampler: str = option("dpmpp_2m", "their sampler, a name in ddpm_jax.samplers.SAMPLERS")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. `config.json` in the run's folder and `meta` in its checkpoints hold it as JSON."""

    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()

    def __post_init__(self):
        for name in ("sample_steps", *(["evaluate_steps"] if self.train.evaluate_every else [])):
            steps = getattr(self.train, name)
            if steps > self.diffusion.T:
                raise ConfigError(f"train.{name}={steps} must be at most diffusion.T={self.diffusion.T}")
        train = self.train
        if train.learning_rates and len(train.learning_rates) != train.ensemble:
            raise ConfigError(
                f"train.learning_rates has {len(train.learning_rates)} numbers for train.ensemble={train.ensemble} runs"
            )
        for name in ("averages", "evaluate_every"):
            if train.ensemble > 1 and getattr(train, name):
                raise ConfigError(f"train.{name} does not go with train.ensemble={train.ensemble}")
        units = [("evaluate_every", "log_every"), ("keep_every", "checkpoint_every")]
        often = "log_every", "checkpoint_every", "sample_every", "average_every"
        for name, unit in (*units, *((name, "steps_per_call") for name in often)):
            steps, each_of = getattr(self.train, name), getattr(self.train, unit)
            if steps % each_of:
                raise ConfigError(f"train.{name}={steps} must be a multiple of train.{unit}={each_of}")


# What may differ when a run is taken up again: how long, and how often something is written, not what is computed.
MAY_CHANGE = {
    "data.cache_dir",
    "data.data_dir",
    "data.max_unreadable",
    "train.average_every",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.evaluate_num",
    "train.evaluate_sampler",
    "train.evaluate_steps",
    "train.keep",
    "train.keep_every",
    "train.log_every",
    "train.max_skipped",
    "train.on_nan",
    "train.sample_every",
    "train.sample_num",
    "train.sample_steps",
    "train.sampler",
    "train.steps",
    "train.watchdog",
    "train.watchdog_abort",
}


def to_json(config: Config) -> str:
    """The config as the text of config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """The Config in a JSON text. Plain data: nothing in it is executed; unknown names are refused."""
    try:
        sections = json.loads(text)
        given = {
            f"{a}.{b}": tuple(value) if isinstance(value, list) else value
            for a, section in sections.items()
            for b, value in section.items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} does not hold a config ({error})") from error
    known = [name for name, _, _, _ in leaves(Config, Config())]
    for name in given:
        if name not in known:
            meant = "".join(f"; did you mean {near}?" for near in closest(name, known))
            raise ConfigError(f"unknown key {name} in {where}{meant}")
    try:
        return replace(Config(), given)
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{error} (in {where})") from error


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of every field in which two configs differ."""
    pairs = zip(leaves(Config, old), leaves(Config, new), strict=True)
    return [(name, a, b) for (name, _, _, a), (_, _, _, b) in pairs if a != b]


def find(path: str | Path) -> Path:
    """The file `path`, or the one of ours that it names where there is no such file: configs/digits.py, or digits."""
    if Path(path).is_file():
        return Path(path)
    package = Path(__file__).parent
    inside = package / "configs"  # where the wheel has them; in a clone they lie beside the package
    ours = list((inside if inside.is_dir() else package.parent / "configs").glob("*.py"))
    for file in ours:
        if file.stem == str(path).removeprefix("configs/").removesuffix(".py"):
            return file
    known = sorted({f"configs/{file.name}" for file in (*ours, *Path("configs").glob("*.py"))})
    raise ConfigError(f"no config file {path}; there are {', '.join(known)}")


def load(name: str | Path) -> Config:
    """The Config that `get_config()` of the file returns, or that a run's config.json holds; its name is as in `find`.

    A Python file is code: run only your own.
    """
    path = find(expand(name))
    if path.suffix == ".json":
        return from_json(path.read_text(errors="replace"), str(path))
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from error
    except Exception as error:
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
        line = lines[-1] if lines else None
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        what = "it has no get_config()" if isinstance(error, KeyError) and error.args == ("get_config",) else error
        where = f"{path}, line {line}" if line else path
        raise ConfigError(f"the config file fails ({where}): {type(error).__name__}: {what}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() must return a ddpm_jax.config.Config, not {type(config).__name__} ({path})")
    return config

"""The config: nested frozen dataclasses. Defaults are those of the paper's CIFAR-10 run, unless the data set decides.

Values come from a config file (`--config=configs/digits.py`), from the command line (`--config.train.steps=500`) and
from the JSON stored with a run; options.py reads and checks them.
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
        "split of a tfds source, as TFDS spells it; for a folder, one of its subfolders, or all for the whole folder",
    )
    image_size: tuple[int, ...] = option(
        (),
        "height,width in pixels; one number for a square; empty for the size of the data",
        all_of(at_least(1)),
        ("one or two numbers", lambda v: len(v) <= 2),
    )
    channels: int = option(0, "1 gray, 3 RGB, 0 for the channels of the data", one_of(0, 1, 3))
    flip: bool = option(False, "flip images horizontally at random, also in the samples")
    augment: float = option(
        0.0,
        "probability of each random transformation of an image, which the network is told of, so that samples do not "
        "show them (Karras et al. 2022); 0 for none, 0.12 in EDM for CIFAR-10",
        at_least(0),
        ("at most 1", lambda v: v <= 1),
    )
    max_unreadable: float = option(
        0.1, "fraction of a folder's files that may be unreadable", at_least(0), ("at most 1", lambda v: v <= 1)
    )
    data_dir: str = option("", "folder of prepared TFDS data sets; empty for the default of TFDS")
    cache_dir: str = option(CACHE, "folder of decoded images")
    range: tuple[float, ...] = option(
        (),
        "LOW,HIGH: the values that become black and white in all images of more than 8 bits; 0,65535 when empty",
        all_of(finite),
        ("two increasing numbers", lambda v: len(v) in (0, 2) and list(v) == sorted(set(v))),
    )
    frames: str = option("first", "frames used of multi-frame files in a folder: first or all", one_of("first", "all"))


@dataclasses.dataclass(frozen=True)
class Model(Section):
    channels: int = option(128, "width at full resolution", at_least(4))
    multipliers: tuple[int, ...] = option(
        (1, 2, 2, 2),
        "width of each level as a multiple of `channels`; each level but the first halves the image",
        all_of(at_least(1)),
        ("at least one number", len),
    )
    num_res_blocks: int = option(2, "residual blocks per level on the way down; one more on the way up", at_least(1))
    attention_resolutions: tuple[int, ...] = option(
        (16,), "resolutions (shorter side) at which attention follows every block", all_of(at_least(1))
    )
    num_heads: int = option(1, "attention heads", at_least(1))
    dropout: float = option(0.1, "dropout rate in training", at_least(0), below(1))
    num_classes: int = option(0, "number of class labels; 0 trains without labels", at_least(0))
    scale_shift: bool = option(False, "the time embedding scales and shifts the second norm (Nichol & Dhariwal 2021)")
    groups: int | str = option(
        32,
        "groups in group normalisation; auto for the largest divisor of the channels up to 32",
        ("a number above 0 or auto", lambda value: value == "auto" or (isinstance(value, int) and value > 0)),
    )
    dtype: str = option("float32", "dtype that the layers compute in", one_of("float32", "bfloat16"))
    remat: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    # Variants that other codebases use (docs/interop.md); the defaults are the paper's.
    norm_eps: float = option(1e-6, "epsilon in group normalisation", above(0), finite)
    head_channels: int = option(0, "channels per attention head; 0 for num_heads heads at every width", at_least(0))
    symmetric_halving: bool = option(False, "pad downsampling convolutions on all sides, not only below and right")
    cos_first: bool = option(False, "put cos before sin in the time embedding")
    frequency_shift: int = option(
        1, "the time embedding's frequencies are 10000^(-i / (channels / 2 - this)), i from 0", one_of(0, 1)
    )
    # How the network sees the image.
    patch: int = option(
        1, "side of the squares that are one pixel for the network; its levels and resolutions count these", at_least(1)
    )
    resample: str = option(
        "conv", "what halves and doubles the image: conv, or residual for residual blocks", one_of("conv", "residual")
    )
    network: str = option("unet", "the network, a name in ddpm_jax.networks.NETWORKS")
    depth: int = option(12, "blocks of a dit", at_least(1))
    mlp_ratio: float = option(4.0, "width of a dit's MLPs as a multiple of `channels`", above(0), finite)


@dataclasses.dataclass(frozen=True)
class Diffusion(Section):
    schedule: str = option("linear", "noise schedule, a name in ddpm_jax.schedules.SCHEDULES or CURVES")
    T: int = option(
        1000, "number of diffusion steps; for a continuous schedule, the default number of sampling steps", at_least(1)
    )
    parameterization: str = option(
        "eps", "what the network outputs, a name in ddpm_jax.diffusion.PARAMETERIZATIONS, or mean for that of x_{t-1}"
    )
    weighting: str = option("simple", "loss weight as a function of time, a name in ddpm_jax.diffusion.WEIGHTINGS")
    variance: str = option(
        "fixedlarge", "variance of a reverse step, a name in ddpm_jax.diffusion.VARIANCES; learned uses the hybrid loss"
    )
    betas: tuple[float, ...] = option(
        (),
        "custom betas, beta_1 to beta_T, for a discrete schedule",
        all_of(("above 0 and at most 1", lambda v: 0 < v <= 1)),
    )
    zero_terminal_snr: bool = option(False, "rescale the schedule so that no signal is left at T (Lin et al. 2023)")
    base_resolution: int = option(
        0, "image side that the schedule is designed for; larger images get more noise; 0 turns this off", at_least(0)
    )
    error: str = option("eps", "space in which the loss measures the error, a name in ddpm_jax.diffusion.ERRORS")
    distance: str = option("l2", "loss function of each pixel's error, a name in ddpm_jax.diffusion.DISTANCES")
    time_sampling: str = option("uniform", "how t is drawn in training, a name in ddpm_jax.training.TIME_SAMPLINGS")
    self_conditioning: bool = option(False, "feed the network its previous x_0_hat (Chen et al. 2023)")
    label_dropout: float = option(
        0.0, "fraction of labels dropped in training, for classifier-free guidance", at_least(0), below(1)
    )
    sigma_data: float = option(
        0.5, "standard deviation of the data in [-1, 1], for the parameterization edm", above(0), finite
    )
    sigmoid_bias: float = option(
        2.0, "the weighting sigmoid falls where the log-SNR is above this; smaller for larger images", finite
    )
    noise_levels: str = option(
        "schedule",
        "distribution of the noise levels in training: schedule for uniform t, or a name in "
        "ddpm_jax.schedules.DISTRIBUTIONS",
    )
    logsnr_normal: tuple[float, ...] = option(
        (), "mean,deviation of the log-SNR, instead of those of log_normal or logit_normal", all_of(finite)
    )
    importance_weights: bool = option(
        False, "weight the loss by 1 / density of noise_levels, so that its mean is that of uniform t"
    )
    noises: int = option(
        1, "noises per image and step, of which one is learned; more than one biases the loss", at_least(1)
    )
    noise_choice: str = option(
        "nearest", "which of them: nearest to the image or lowest_loss, a name in ddpm_jax.diffusion.NOISE_CHOICES"
    )


@dataclasses.dataclass(frozen=True)
class Train(Section):
    steps: int = option(800_000, "total number of optimiser steps", at_least(1))
    minutes: float = option(
        0.0,
        "if not 0, replaces train.steps by the number that takes so long, measured before the first step and recorded",
        at_least(0),
        finite,
    )
    batch_size: int = option(128, "images per step, over all devices", at_least(1))
    accumulate: int = option(1, "gradient accumulation: micro-batches per step on each device", at_least(1))
    optimizer: str = option("adam", "a name in ddpm_jax.training.OPTIMIZERS")
    learning_rate: float = option(2e-4, "learning rate after the warm-up", above(0), finite)
    warmup_steps: int = option(5000, "steps over which the learning rate grows from 0", at_least(0))
    decay: str = option(
        "constant", "how the learning rate falls to 0 at train.steps, a name in ddpm_jax.training.DECAYS"
    )
    decay_fraction: float = option(
        0.2, "fraction of the steps over which wsd decays", above(0), ("at most 1", lambda v: v <= 1)
    )
    b1: float = option(0.9, "Adam's decay of the mean of the gradient", at_least(0), below(1))
    b2: float = option(0.999, "Adam's decay of the mean of its square", at_least(0), below(1))
    weight_decay: float = option(
        0.0, "with adamw and muon, the part of a kernel lost per step, as a multiple of the rate", at_least(0), finite
    )
    grad_clip: float = option(1.0, "maximum global norm of the gradient; inf for no limit", above(0))
    ema_decay: float = option(0.9999, "decay of the EMA of the parameters after its warm-up", at_least(0), below(1))
    averages: tuple[float, ...] = option(
        (), "lengths (sigma_rel) of averages stored for post-hoc EMA, like 0.05,0.1; none when empty", all_of(above(0))
    )
    average_every: int = option(10_000, "steps between stored averages", at_least(1))
    on_nan: str = option(
        "skip",
        "what a non-finite gradient does: skip the step (skip), end the run (abort), or continue from the newest "
        "checkpoint with other batches and noise (rollback)",
        one_of("skip", "abort", "rollback"),
    )
    max_skipped: int = option(
        10, "end the run after so many non-finite steps in a row, or roll-backs to one checkpoint", at_least(1)
    )
    watchdog: int = option(
        1800, "seconds without a finished step before all stacks are printed; 0 for never", at_least(0), below(10**6)
    )
    watchdog_abort: bool = option(False, "then also end the process, so that a supervisor can restart it")
    steps_per_call: int = option(
        1, "steps in one call to the devices; the intervals below must be multiples of it", at_least(1)
    )
    ensemble: int = option(
        1, "runs trained in parallel, with the seeds `seed`, `seed` + 1, ..., one or more per device", at_least(1)
    )
    learning_rates: tuple[float, ...] = option(
        (), "a learning rate for each run of an ensemble, all with the same seed", all_of(above(0)), all_of(finite)
    )
    seed: int = option(0, "seed of all random numbers", at_least(0), ("below 2**32", lambda v: v < 2**32))
    log_every: int = option(100, "steps between lines of metrics", at_least(1))
    checkpoint_every: int = option(5000, "steps between checkpoints", at_least(1))
    keep: int = option(3, "number of newest checkpoints to keep", at_least(1))
    keep_every: int = option(0, "steps between checkpoints that are kept permanently; 0 for none", at_least(0))
    sample_every: int = option(5000, "steps between grids of samples", at_least(1))
    sample_num: int = option(64, "images in a grid", at_least(1))
    sample_steps: int = option(100, "sampling steps for a grid", at_least(1))
    sampler: str = option("ddpm", "sampler for the grids, a name in ddpm_jax.samplers.SAMPLERS")
    evaluate_every: int = option(
        0, "steps between KID evaluations, logged in metrics.jsonl (needs the extra kid); 0 for never", at_least(0)
    )
    evaluate_num: int = option(1000, "samples per KID evaluation", at_least(20))
    evaluate_steps: int = option(20, "sampling steps for these samples", at_least(1))
    evaluate_sampler: str = option("dpmpp_2m", "sampler for these samples, a name in ddpm_jax.samplers.SAMPLERS")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment, stored as JSON in the run's `config.json` and in the `meta` of its checkpoints."""

    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()

    def __post_init__(self):
        train = self.train
        for name in ("sample_steps", *(["evaluate_steps"] if train.evaluate_every else [])):
            steps = getattr(train, name)
            if steps > self.diffusion.T:
                raise ConfigError(f"train.{name}={steps} must be at most diffusion.T={self.diffusion.T}")
        if train.learning_rates and len(train.learning_rates) != train.ensemble:
            raise ConfigError(
                f"train.learning_rates has {len(train.learning_rates)} numbers for train.ensemble={train.ensemble} runs"
            )
        for name in ("averages", "evaluate_every"):
            if train.ensemble > 1 and getattr(train, name):
                raise ConfigError(f"train.{name} cannot be combined with train.ensemble={train.ensemble}")
        pairs = [("evaluate_every", "log_every"), ("keep_every", "checkpoint_every")]
        intervals = "log_every", "checkpoint_every", "sample_every", "average_every"
        for name, divisor_name in (*pairs, *((name, "steps_per_call") for name in intervals)):
            steps, divisor = getattr(train, name), getattr(train, divisor_name)
            if steps % divisor:
                raise ConfigError(f"train.{name}={steps} must be a multiple of train.{divisor_name}={divisor}")
        start, end = decay_span(train)
        if train.decay != "constant" and start >= end:
            raise ConfigError(
                f"train.decay={train.decay} needs train.warmup_steps={train.warmup_steps} below train.steps={end}"
            )


def decay_span(train: Train) -> tuple[int, int]:
    """(first, last) step between which the learning rate decays."""
    stable = min(round((1 - train.decay_fraction) * train.steps), train.steps - 1) if train.decay == "wsd" else 0
    return max(train.warmup_steps, stable), train.steps


# What may change when a run resumes: its length and how often something is written, but not what is computed.
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
    "train.minutes",
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
    """The text of config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """The Config in a JSON text. Nothing in it is executed; unknown names raise ConfigError."""
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
            hint = "".join(f"; did you mean {near}?" for near in closest(name, known))
            raise ConfigError(f"unknown key {name} in {where}{hint}")
    try:
        return replace(Config(), given)
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{error} (in {where})") from error


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of every field that differs between two configs."""
    pairs = zip(leaves(Config, old), leaves(Config, new), strict=True)
    return [(name, a, b) for (name, _, _, a), (_, _, _, b) in pairs if a != b]


def find(path: str | Path) -> Path:
    """The file `path` if it exists, or the bundled config of that name: configs/digits.py, or just digits."""
    if Path(path).is_file():
        return Path(path)
    package = Path(__file__).parent
    inside = package / "configs"  # their place in a wheel; in a clone they are beside the package
    bundled = list((inside if inside.is_dir() else package.parent / "configs").glob("*.py"))
    for file in bundled:
        if file.stem == str(path).removeprefix("configs/").removesuffix(".py"):
            return file
    known = sorted({f"configs/{file.name}" for file in (*bundled, *Path("configs").glob("*.py"))})
    raise ConfigError(f"no config file {path}; there are {', '.join(known)}")


def load(name: str | Path) -> Config:
    """The Config from `get_config()` in a Python file, or from a config.json; `name` is resolved by `find`.

    A Python file is executed: load only files that you trust.
    """
    path = find(expand(name))
    if path.suffix == ".json":
        return from_json(path.read_text(errors="replace"), str(path))
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        reason = "it has no get_config()" if isinstance(error, KeyError) and error.args == ("get_config",) else error
        where = f"{path}, line {line}" if line else path
        raise ConfigError(f"the config file fails ({where}): {type(error).__name__}: {reason}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() must return a ddpm_jax.config.Config, not {type(config).__name__} ({path})")
    return config

"""Options from the command line, and what is said when they are wrong."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest
from command_line import EVERY, parse
from conftest import ROOT

from ddpm_jax import config as configs
from ddpm_jax.config import Config, Train
from ddpm_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("at_root")


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        (["--config.train.steps=7"], "train", "steps", 7),
        (["--config.train.steps", "7"], "train", "steps", 7),
        (["--config.train.learning_rate=3"], "train", "learning_rate", 3.0),
        (["--config.train.learning-rate=1e-3"], "train", "learning_rate", 1e-3),
        (["--config.train.learning_rate", "1e-3"], "train", "learning_rate", 1e-3),
        (["--config.train.grad_clip=inf"], "train", "grad_clip", math.inf),
        (["--config.data.flip=true"], "data", "flip", True),
        (["--config.data.flip"], "data", "flip", True),
        (["--config.data.flip", "--config.data.flip=False"], "data", "flip", False),
        (["--config.data.source=folder:my-own_pictures"], "data", "source", "folder:my-own_pictures"),
        (["--config.data.source=npz:a=b.npz"], "data", "source", "npz:a=b.npz"),
        (["--config.data.image_size=64"], "data", "image_size", (64,)),
        (["--config.data.image-size=64,48"], "data", "image_size", (64, 48)),
        (["--config.data.image_size="], "data", "image_size", ()),
        (["--config.model.multipliers=1,2,2"], "model", "multipliers", (1, 2, 2)),
        (["--config.model.groups=auto"], "model", "groups", "auto"),
        (["--config.model.groups=8"], "model", "groups", 8),
        (["--config.diffusion.T=250"], "diffusion", "T", 250),
        (["--config.train.steps=7", "--config.train.steps=8"], "train", "steps", 8),
    ],
)
def test_one_value_changes_and_the_rest_stays(argv, section, name, value):
    """The rest is that of the config file; the type is right too, not only what compares equal."""
    before, after = dataclasses.asdict(configs.load("configs/digits.py")), dataclasses.asdict(parse(*argv).config)
    assert repr(after[section].pop(name)) == repr(value)
    before[section].pop(name)
    assert after == before


def test_options_beside_the_config():
    assert parse("--workdir=runs/a-b_c", "--dry-run") == parse("--workdir", "runs/a-b_c", "--dry_run=true")
    args = parse("--workdir=runs/a-b_c", "--dry-run")
    assert (args.workdir, args.dry_run) == ("runs/a-b_c", True)
    assert args.config == configs.load("configs/digits.py")


def test_another_config_file(tmp_path):
    text = (
        "from ddpm_jax.config import Config, Train\n\n\ndef get_config():\n    return Config(train=Train(steps=123))\n"
    )
    (tmp_path / "my-own_file.py").write_text(text)
    for argv in ([f"--config={tmp_path}/my-own_file.py"], ["--config", f"{tmp_path}/my-own_file.py"]):
        args = parse(*argv, "--config.train.seed=4")
        assert args.config == Config(train=Train(steps=123, seed=4))
        assert args.config_file == f"{tmp_path}/my-own_file.py"


# --- faults


def assert_refused(argv, fragment):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config.train.lrr=3"], "unknown option --config.train.lrr; did you mean --config.train.learning_rate?"),
        (["--config.train.step=3"], "--config.train.step; did you mean --config.train.steps?"),
        (["--config.train.stepz=3"], "--config.train.stepz; did you mean --config.train.steps?"),  # and not --step
        (["--config.train.learning_rat", "3"], "did you mean --config.train.learning_rate?"),
        (["--config.trian.batch-size=3"], "did you mean --config.train.batch_size?"),
        (["--train.steps=3"], "did you mean --config.train.steps?"),
        (["--bogus"], "unknown option --bogus"),
    ],
)
def test_fault_28_names_that_do_not_exist(argv, fragment):
    assert_refused(argv, fragment)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config.train.steps=abc"], "--config.train.steps=abc is not a whole number"),
        (["--config.train.steps=1.5"], "--config.train.steps=1.5 is not a whole number"),
        (["--config.train.steps="], "--config.train.steps= is not a whole number"),
        (["--config.train.steps"], "--config.train.steps: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--config.train.learning_rate=fast"], "--config.train.learning_rate=fast is not a number"),
        (["--config.data.flip=maybe"], "--config.data.flip=maybe is not true or false"),
        (["--dry-run=maybe"], "=maybe is not true or false"),
        (["--config.model.multipliers=1,x"], "--config.model.multipliers=1,x is not a list like 16,8"),
    ],
)
def test_fault_29_values_of_the_wrong_type(argv, fragment):
    assert_refused(argv, fragment)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config.train.learning_rate=nan"], "train.learning_rate=nan must be a number above 0"),
        (["--config.train.learning_rate=inf"], "train.learning_rate=inf must be finite"),
        (["--config.train.learning_rate=0"], "train.learning_rate=0.0 must be a number above 0"),
        (["--config.train.learning_rate", "-1"], "train.learning_rate=-1.0 must be a number above 0"),
        (["--config.train.steps=0"], "train.steps=0 must be at least 1"),
        (["--config.train.steps=-5"], "train.steps=-5 must be at least 1"),
        (["--config.train.ema_decay=1"], "train.ema_decay=1.0 must be below 1"),
        (["--config.train.ema_decay=nan"], "train.ema_decay=nan must be"),
        (["--config.diffusion.T=0"], "diffusion.T=0 must be at least 1"),
        (["--config.train.learning_rate=-inf"], "train.learning_rate=-inf must be a number above 0"),
        (["--config.train.ema_decay=-0.1"], "train.ema_decay=-0.1 must be at least 0"),
        (["--config.diffusion.T=-3"], "diffusion.T=-3 must be at least 1"),
        (["--config.diffusion.betas=0.1,0"], "diffusion.betas=0.1,0.0 must be a list, each above 0 and at most 1"),
        (["--config.diffusion.betas=0.1,1.5"], "diffusion.betas=0.1,1.5 must be a list, each above 0 and at most 1"),
        (["--config.diffusion.betas=-0.1,1"], "diffusion.betas=-0.1,1.0 must be"),
        (["--config.diffusion.betas=nan,1"], "diffusion.betas=nan,1.0 must be"),
    ],
)
def test_fault_30_values_out_of_range(argv, fragment):
    assert_refused(argv, fragment)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config.model.multipliers="], "model.multipliers= must be at least one number"),
        (["--config.model.multipliers=1,0"], "model.multipliers=1,0 must be a list, each at least 1"),
        (["--config.model.groups=many"], "model.groups=many must be a number above 0 or auto"),
        (["--config.model.dtype=float16"], "model.dtype=float16 must be one of float32, bfloat16"),
        (["--config.model.dropout=1"], "model.dropout=1.0 must be below 1"),
        (["--config.data.image_size=1,2,3"], "data.image_size=1,2,3 must be one or two numbers"),
        (["--config.data.channels=2"], "data.channels=2 must be one of 0, 1, 3"),
        (["--config.data.max_unreadable=1.5"], "data.max_unreadable=1.5 must be at most 1"),
        (["--config.data.augment=12"], "data.augment=12.0 must be at most 1"),
        (["--config.train.grad_clip=0"], "train.grad_clip=0.0 must be a number above 0"),
        (["--config.train.seed=-1"], "train.seed=-1 must be at least 0"),
        (["--config.train.seed=4294967296"], "train.seed=4294967296 must be below 2**32"),
        (["--config.train.keep_every=70"], "train.keep_every=70 must be a multiple of train.checkpoint_every=500"),
        (["--config.train.on_nan=hope"], "train.on_nan=hope must be one of skip, abort, rollback"),
        (["--config.diffusion.T=50"], "train.sample_steps=100 must be at most diffusion.T=50"),
    ],
)
def test_other_values_out_of_range(argv, fragment):
    assert_refused(argv, fragment)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config=configs/none.py"], "no config file configs/none.py; there are configs/"),
        (["--config=configs"], "no config file configs; there are configs/"),
    ],
)
def test_fault_36_a_config_file_that_is_missing(argv, fragment):
    assert_refused(argv, fragment)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["train"], "unexpected argument 'train'; options are written --name=value"),
        (["--config.train.steps=3", "4"], "unexpected argument '4'"),
        (["-x"], "unexpected argument '-x'"),
    ],
)
def test_fault_38_stray_arguments(argv, fragment):
    assert_refused(argv, fragment)


# --- the script


def script(*argv):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_lists_every_field_and_answers_before_jax_is_loaded():
    done = script("-X", "importtime", "train.py", "--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  --config\.(\S+) ", done.stdout, re.MULTILINE)) == EVERY
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "ddpm_jax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "tensorflow_datasets"}


@pytest.mark.parametrize(
    ("argument", "fragment"),
    [
        ("--config.train.lrr=3", "unknown option --config.train.lrr; did you mean --config.train.learning_rate?"),
        ("--config.train.steps=1.5", "--config.train.steps=1.5 is not a whole number"),
        ("--config", "--config: expected one argument"),
        ("--platform=abacus", "error: --platform=abacus must be one of auto, cpu, gpu, tpu"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(argument, fragment):
    done = script("train.py", argument)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert fragment in done.stderr

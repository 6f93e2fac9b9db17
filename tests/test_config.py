"""Configs in Python, in files and in JSON, and what is said when they are wrong."""

import ast
import json
import math
import pickle
import re
from pathlib import Path

import pytest
from command_line import EVERY, parse
from conftest import ROOT

from ddpm_jax import config as configs
from ddpm_jax.config import Config, Data, Diffusion, Model, Train
from ddpm_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("at_root")

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_defaults_are_the_papers_cifar10_run():
    """Ho et al. 2020, appendix B, and their run_cifar.py."""
    config = Config()
    assert config.data.source == "tfds:cifar10"
    assert (config.model.channels, config.model.multipliers, config.model.num_res_blocks) == (128, (1, 2, 2, 2), 2)
    assert (config.model.attention_resolutions, config.model.num_heads) == ((16,), 1)
    assert (config.model.groups, config.model.dropout, config.model.num_classes) == (32, 0.1, 0)
    assert (config.diffusion.T, config.diffusion.schedule, config.diffusion.variance) == (1000, "linear", "fixedlarge")
    assert (config.diffusion.parameterization, config.diffusion.weighting) == ("eps", "simple")
    assert (config.train.steps, config.train.batch_size) == (800_000, 128)
    assert (config.train.learning_rate, config.train.warmup_steps, config.train.grad_clip) == (2e-4, 5000, 1.0)
    assert config.train.ema_decay == 0.9999


def test_a_long_value_is_told_in_part():
    with pytest.raises(ConfigError, match=r"^diffusion\.betas=2\.0,2\.0,.{,80}\.\.\. must be a list"):
        Diffusion(betas=(2.0,) * 1000)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: Train(steps="7"), "train.steps=7 is not a whole number"),
        (lambda: Train(steps=7.0), "train.steps=7.0 is not a whole number"),
        (lambda: Train(steps=True), "train.steps=true is not a whole number"),
        (lambda: Train(learning_rate="fast"), "train.learning_rate=fast is not a number"),
        (lambda: Data(flip=1), "data.flip=1 is not true or false"),
        (lambda: Data(source=None), "data.source= is not text"),
        (lambda: Model(multipliers=[1, 2]), "model.multipliers=1,2 is not a list"),
        (lambda: Model(multipliers=2), "model.multipliers=2 is not a list"),
        (lambda: Model(groups=0), "model.groups=0 must be a number above 0 or auto"),
    ],
)
def test_python_values_pass_the_same_checks(make, fragment):
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        make()


def test_differences():
    old = Config(data=Data(flip=True), train=Train(steps=10))
    new = Config(model=Model(multipliers=(1, 2)), train=Train(steps=20))
    found = configs.differences(old, new)
    assert sorted(found) == [
        ("data.flip", True, False),
        ("model.multipliers", (1, 2, 2, 2), (1, 2)),
        ("train.steps", 10, 20),
    ]
    assert configs.differences(old, old) == []


# --- config files


def test_fault_36_a_missing_config_file_lists_those_that_exist():
    with pytest.raises(ConfigError) as caught:
        configs.load("none.py")
    assert re.findall(r"configs/\w+\.py", str(caught.value)) == [str(file.relative_to(ROOT)) for file in CONFIGS]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("x = 1\n", "it has no get_config()"),
        ("\n\ndef get_config():\n    return 1 / 0\n", "line 4): ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "line 1): ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\ndef get_config(:\n", "line 2): SyntaxError"),
        ("import json\n\n\ndef get_config():\n    return json.loads('{')\n", "line 5): JSONDecodeError"),
        ("x = 1\ny = 2\nz = compile('(', 'other.py', 'exec')\n", "line 3): SyntaxError"),
        ("def get_config():\n    return {'a': {}}['steps']\n", "line 2): KeyError: 'steps'"),
        ("def get_config():\n    return {'train': {}}\n", "must return a ddpm_jax.config.Config, not dict"),
        ("def get_config():\n    pass\n", "must return a ddpm_jax.config.Config, not NoneType"),
        ("from ddpm_jax.config import *\nget_config = lambda: Train(steps=0)\n", "train.steps=0 must be at least 1"),
        ("from ddpm_jax.config import *\nget_config = lambda: Train(stepz=1)\n", "argument 'stepz'"),
    ],
)
def test_fault_36_a_config_file_that_fails(tmp_path, text, fragment):
    """The message has the file's name, and the line where there is one."""
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={file}")
    assert fragment in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- JSON


ODD = Config(
    data=Data("folder:/srv/\u00fc b", "test", (8, 16), 3, True, 0.25, 0.5, "~/data", "", (0.0, 4095.0), "all"),
    model=Model(
        8,
        (1,),
        1,
        (),
        2,
        0.0,
        10,
        True,
        "auto",
        "bfloat16",
        True,
        1e-30,
        4,
        True,
        True,
        0,
        2,
        "residual",
        "dit",
        3,
        2.5,
    ),
    diffusion=Diffusion(
        *("cosine", 4000, "v", "vlb", "learned", (1e-30, 0.1 + 0.2), True, 64, "output", "huber", "stratified"),
        *(True, 0.1, 0.3, -1e-30, "log_normal", (-0.1, 1e-30), True, 2, "lowest_loss"),
    ),
    train=Train(
        1,
        2.5,
        1,
        2,
        "adamw",
        1e-30,
        0,
        "linear",
        1.0,
        0.5,
        0.0,
        0.01,
        math.inf,
        0.0,
        (0.05, 0.1),
        6,
        "abort",
        1,
        5,
        True,
        2,
        1,
        (),
        2**32 - 1,
        2,
        2,
        1,
        4,
        2,
        1,
        1,
        "ddim",
        6,
        20,
        7,
        "edm",
    ),
)
ENSEMBLE = Config(train=Train(ensemble=2, learning_rates=(1e-30, 0.1 + 0.2)))  # which does not go with all of these


@pytest.mark.parametrize(
    "config", [Config(), ODD, ENSEMBLE, *map(configs.load, CONFIGS)], ids=lambda config: config.data.source
)
def test_json_round_trip(config):
    text = configs.to_json(config)
    assert configs.from_json(text) == config
    assert repr(configs.from_json(text)) == repr(config)  # 1 is not 1.0
    assert json.loads(text)["model"]["multipliers"] == list(config.model.multipliers)


def test_a_runs_config_json_is_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(ODD))
    assert configs.load(tmp_path / "config.json") == ODD
    (tmp_path / "config.json").write_text('{"model": {"chanels": 64}}')
    with pytest.raises(ConfigError, match=r"unknown key model.chanels in .*config.json; did you mean model.channels\?"):
        configs.load(tmp_path / "config.json")


def test_odd_config_leaves_no_default():
    """So that the round trip of each field is seen."""
    assert {name for odd in (ODD, ENSEMBLE) for name, _, _ in configs.differences(Config(), odd)} == EVERY


def test_what_may_change_exists():
    assert configs.MAY_CHANGE <= EVERY


def test_json_of_some_fields_has_the_defaults_of_the_rest():
    assert configs.from_json('{"train": {"steps": 5}}') == Config(train=Train(steps=5))


class Canary:
    """Unpickled, it makes the folder `canary`."""

    def __reduce__(self):
        return Path.mkdir, (Path("canary"),)


PYTHON = "import os\nos.mkdir('canary')\ndef get_config():\n    os.mkdir('canary')\n"


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"train": {"stepz": 5}}', "unknown key train.stepz in run/config.json; did you mean train.steps?"),
        ('{"trian": {"steps": 5}}', "unknown key trian.steps in run/config.json; did you mean train.steps?"),
        ('{"train": {"__class__": 5}}', "unknown key train.__class__ in run/config.json"),
        ('{"train": {"steps": 0}}', "train.steps=0 must be at least 1"),
        ('{"train": {"steps": "abc"}}', "train.steps=abc is not a whole number (in"),
        ('{"train": {"steps": 1.5}}', "train.steps=1.5 is not a whole number (in"),
        ('{"train": {"steps": true}}', "train.steps=true is not a whole number (in"),
        ('{"train": 5}', "run/config.json does not hold a config"),
        ("[]", "run/config.json does not hold a config"),
        ("", "run/config.json does not hold a config"),
        ('{"train": {"steps": 5}', "run/config.json does not hold a config"),
        pytest.param("[" * 100_000, "run/config.json does not hold a config", id="deep"),
        pytest.param(PYTHON, "run/config.json does not hold a config", id="python"),
        ('!!python/object/apply:os.mkdir ["canary"]', "run/config.json does not hold a config"),
        pytest.param(pickle.dumps(Canary()).decode("latin1"), "run/config.json does not hold a config", id="pickle"),
    ],
)
def test_fault_37_json_that_is_no_config(tmp_path, monkeypatch, text, fragment):
    """Refused in one line, and nothing in it is executed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        configs.from_json(text, "run/config.json")
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("canary").exists()


def test_fault_37_text_in_json_stays_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "__import__('os').mkdir('canary')"
    assert configs.from_json(json.dumps({"data": {"source": text}})).data.source == text
    assert not Path("canary").exists()


def test_fault_37_a_pickle_is_no_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(ConfigError, match=r"mine\.py"):
        configs.load("mine.py")
    assert not Path("canary").exists()
    pickle.loads(Path("mine.py").read_bytes())  # the canary does sing
    assert Path("canary").exists()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_each_config_says_whether_it_was_trained_here_as_the_pages_do(file):
    text = " ".join(ast.get_docstring(ast.parse(file.read_text())).split())
    status = re.search(rf"\| .*`{file.name}`.*\| (.*) \|\n", (ROOT / "README.md").read_text())[1]
    if "Not trained here" in text:
        assert "not trained here" in status
    else:
        time, loss = re.search(r"Trained here.* (\d:\d\d:\d\d) on .* (0\.\d{4}) over", text).groups()
        row = re.search(rf"(?m)^\| .*\| {time} \|.*", (ROOT / "docs/results.md").read_text())[0]
        assert f"| {loss} " in row
        assert "trained" in status
        assert "not trained" not in status

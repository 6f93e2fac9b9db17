"""The commands of an installed package, in a folder that is no clone: what is asked of them reaches the same code."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line

from ddpm_jax import config as configs
from ddpm_jax.commands import COMMANDS
from ddpm_jax.errors import ConfigError
from ddpm_jax.run import folder as run_folder


@pytest.fixture
def package(environment, tmp_path):
    """package(word, ...) -> the finished process python -m ddpm_jax, in an empty folder."""

    def run(*words):
        command = [sys.executable, "-X", "importtime", "-m", "ddpm_jax", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_that_of_the_script_and_comes_before_jax(script, package, command):
    def told(done, name):
        return re.sub(r"\s+", " ", done.stdout).replace(name, "NAME")

    done = package(command, "--help")
    assert done.returncode == 0
    assert told(done, f"-m ddpm_jax {command}") == told(script(f"{command}.py", "--help"), f"{command}.py")
    assert "python NAME --" in told(done, f"-m ddpm_jax {command}")
    assert not re.search(r"\| +(jax|numpy|flax|orbax)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ([], "'' is not one of train, sample, evaluate"),
        (["trian"], "'trian' is not one of train, sample, evaluate"),
        (["--config=digits"], "'--config=digits' is not one of"),
        (["train", "sample"], "unexpected argument 'sample'"),
        (["train", "--workdir"], "expected one argument; see python -m ddpm_jax train --help"),
        (["train", "--config=cifar100"], "no config file cifar100; there are configs/"),
        (["sample", "--workdir=nowhere"], "there is no run in nowhere"),
    ],
)
def test_a_mistake_gets_one_line(package, words, fragment):
    done = package(*words)
    done.stderr = re.sub("^import time.*\n", "", done.stderr, flags=re.MULTILINE)
    assert done.returncode == (4 if words[:1] == ["sample"] else 2)
    assert_one_line(done)
    assert fragment in done.stderr


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py"])
def test_our_configs_are_found_by_name(tmp_path, monkeypatch, name):
    """In any folder, unless it has a file of that name itself."""
    monkeypatch.chdir(tmp_path)
    assert configs.load(name) == configs.load(ROOT / "configs" / "digits.py")
    (tmp_path / "configs").mkdir()
    for file in ("digits.py", "configs/digits.py", "digits"):
        (tmp_path / file).write_text("from ddpm_jax.config import Config as get_config")
    assert configs.load(name) == configs.Config()
    with pytest.raises(ConfigError, match=r"no config file elsewhere/digits\.py"):
        configs.load("elsewhere/digits.py")


def test_the_configs_of_a_wheel_lie_inside_the_package(tmp_path, monkeypatch):
    """They come before what may lie beside it; those of the working folder are told too."""
    for folder in ("site/ddpm_jax/configs", "site/configs", "configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"of_{folder.replace('/', '_')}.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "site" / "ddpm_jax" / "config.py"))
    with pytest.raises(ConfigError, match=r"there are configs/of_configs\.py, configs/of_site_ddpm_jax_configs\.py$"):
        configs.find("digits")


def test_the_revision_is_that_of_a_clone_alone(tmp_path, monkeypatch):
    """Not that of a project whose virtual environment the package is installed in."""
    assert run_folder.revision()
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init"], [*who, "commit", "--allow-empty", "--message=theirs"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    (tmp_path / "site" / "ddpm_jax").mkdir(parents=True)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "site" / "ddpm_jax" / "run" / "folder.py"))
    assert run_folder.revision() is None

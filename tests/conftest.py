"""Eight virtual devices for all tests, a net small enough to compile in seconds, and what several files share."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time; whole runs use the real settings
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # in the user's home, where whole runs have one of their own

import jax
import numpy as np
import pytest
from PIL import Image
from published import RELEASED

from ddpm_jax import errors, experiment, schedules
from ddpm_jax.config import Config, Data, Diffusion, Model
from ddpm_jax.data import load
from ddpm_jax.interop import __main__ as interop
from ddpm_jax.interop import released, tensors
from ddpm_jax.networks import unet
from ddpm_jax.run import checkpoint, trees

ROOT = Path(__file__).parent.parent
STARTUP = ROOT / "tests" / "startup"  # what its file does, it does here and in every Python that a test starts
PYTHONPATH = os.environ["PYTHONPATH"] = f"{ROOT}:{STARTUP}"

# A job in the background of a script is started with Ctrl-C ignored, one of nohup with SIGHUP, and so would be what the
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

runpy.run_path(str(STARTUP / "sitecustomize.py"))

COLLECTED: set[str] = set()  # the names of all tests that were found, also of those that will not be run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    COLLECTED.update(item.nodeid for item in items)


TINY = {
    "channels": 8,
    "multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_heads": 2,
    "dropout": 0.0,
    "num_classes": 0,
    "scale_shift": False,
    "groups": 4,
    "dtype": "float32",
    "remat": False,
}


def random_params(init, seed=0):
    """Random parameters as NumPy arrays, also where the real ones start at zero, so that every layer takes part."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        return (0.1 * random.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="session")
def tiny():
    """(net, params) of a small U-Net for 8x8 gray images."""
    init, net = unet.make_unet((8, 8, 1), **TINY)
    return net, random_params(init)


@pytest.fixture(scope="session")
def linear():
    return schedules.from_betas(schedules.linear_betas())


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One folder for prepared data, decoded images and compiled programs, so that only the first run pays."""
    folder = tmp_path_factory.mktemp("shared")
    names = {"TFDS_DATA_DIR": "tfds", "HOME": "home", "JAX_COMPILATION_CACHE_DIR": "compiled"}
    own = {name: str(folder / sub) for name, sub in names.items()}
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return kept | own | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="session")
def script(environment):
    """script("train.py", option, ...) -> the finished process."""

    def run(*command, shell="", **variables):
        return subprocess.run(
            ["sh", "-c", shell + ' exec "$@"', "sh", sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


SMALL = [  # a run of a few seconds
    "--config.model.channels=8",
    "--config.model.multipliers=1",
    "--config.model.num_res_blocks=1",
    "--config.model.attention_resolutions=8",
    "--config.model.groups=4",
    "--config.train.batch_size=16",
    "--config.train.warmup_steps=5",
    "--config.train.log_every=7",
    "--config.train.checkpoint_every=10",
    "--config.train.sample_every=1000",
    "--config.train.sample_num=3",
    "--config.train.sample_steps=3",
]


@pytest.fixture(scope="session")
def trained(script, environment, tmp_path_factory):
    """The folder of a run of 60 steps that nothing interrupted, on one device.

    The first worker of pytest-xdist trains; all take copies of the run and of the programs compiled for it.
    """
    own, compiled = tmp_path_factory.mktemp("unbroken") / "run", environment["JAX_COMPILATION_CACHE_DIR"]
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "run").exists():
            done = script("train.py", *SMALL, "--config.train.steps=60", f"--workdir={own}", "--cpu-devices=1")
            assert done.returncode == 0, done.stderr
            shutil.copytree(compiled, shared / "compiled")
            shutil.copytree(own, shared / "run")
            return own
    shutil.copytree(shared / "compiled", compiled, dirs_exist_ok=True)
    return shutil.copytree(shared / "run", own)


def fingerprint(workdir):
    """SHA-256 over parameters, average, optimiser state and counters of the newest step."""
    meta, trees = checkpoint.load(workdir / "checkpoints", checkpoint.ARRAYS[:3])
    sha = hashlib.sha256(json.dumps([meta[name] for name in checkpoint.COUNTERS]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        sha.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def logged_metrics(workdir):
    """The rows of metrics.jsonl without what the clock gave."""
    clock = ("images_per_second", "seconds_per_step", "input_wait")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


@pytest.fixture
def start(environment):
    """start(option, ..., patch=code) -> train.py as a process, after `code`, its stdout to be read line by line."""
    processes = []

    def run(*options, patch=""):
        code = f"import sys, runpy, time\n{patch}\nsys.argv[0] = 'train.py'\n"
        code += "runpy.run_path('train.py', run_name='__main__')"
        command = [sys.executable, "-c", code, *SMALL, "--cpu-devices=1", *map(str, options)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def mount(tmp_path):
    """mount(option, ...) -> an empty folder that is a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def run(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield run
    subprocess.run(["umount", folder], capture_output=True, check=False)


def assert_same_end(workdir, other):
    """The same bits in the state, and each step's metrics once."""
    assert fingerprint(workdir) == fingerprint(other)
    assert logged_metrics(workdir) == logged_metrics(other)


def assert_one_line(done):
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def assert_same_trees(one, other):
    one, other = trees.flat(one), trees.flat(other)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


T, NUM = 12, 11
LEAST = {"channels": 4, "multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (), "groups": 2}


def small_experiment(model=None, **diffusion):
    """The Experiment of make_run with other options, without a run."""
    config = Config(
        model=Model(**LEAST | (model or {})), diffusion=Diffusion(**{"schedule": "cosine", "T": 100} | diffusion)
    )
    return experiment.make(config, (4, 4, 1))


def make_run(folder, steps=(5,), scale=1.0, **changes):
    """A run's folder with checkpoints of random parameters times `scale`, for 11 images of 4x4 with labels.

    Returns the folder, the Experiment, the averaged parameters of the last step and the images.
    """
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUM, 4, 4, 1), np.uint8)
    np.savez(folder / "data.npz", images=images, labels=random.permutation(NUM) % 3)
    config = Config(
        data=Data(source=f"npz:{folder / 'data.npz'}"),
        model=Model(**LEAST | changes.pop("model", {})),
        diffusion=Diffusion(**{"schedule": "cosine", "T": T} | changes),
        train=dataclasses.replace(Config().train, sample_steps=T),
    )
    parts = experiment.make(config, (4, 4, 1))
    init_state = parts.init_state
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init_state))
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        for step in steps:
            drawn = [random_params(parts.init, seed + 2 * (steps[-1] - step)) for seed in (1, 2)]
            params, ema_params = jax.tree.map(lambda leaf: np.float32(scale) * leaf, drawn)
            state = state._replace(step=np.int32(step), params=params, ema_params=ema_params)
            checkpoint.save(manager, state, config=dataclasses.asdict(config), shape=parts.shape)
        checkpoint.finish(manager)
    return folder, parts, state.ema_params, images


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """{name: folder of the run} of the two released folders."""
    made = {}
    for name in ("old", "new"):
        found = released.read(RELEASED / name)
        parts = experiment.make(found.config, found.shape)
        template = experiment.params_shape(parts)
        made[name] = tmp_path_factory.mktemp("imported") / name
        interop.write_run(parts, tensors.to_params(found.arrays, template, found.format, name), made[name])
    return made


def paint(path, level, size=(8, 8)):
    """Write a picture of one gray level."""
    Image.new("RGB", size, (level,) * 3).save(path)


def levels(dataset):
    """The level of each image, all of whose pixels must have it."""
    first = dataset.images[:, :1, :1, :1]
    assert (dataset.images == first).all()
    return first.ravel().tolist()


@pytest.fixture
def album(tmp_path):
    """An empty folder and a function that loads it as 8x8 pictures."""
    folder = tmp_path / "album"
    folder.mkdir()

    def load_album(**options):
        return load(f"folder:{folder}", **({"image_size": (8,), "cache_dir": tmp_path / "cache"} | options))

    return folder, load_album


@pytest.fixture
def call(capsys):
    """call(module, option, ...) -> exit code, stdout, stderr of that command in this process, on its eight devices."""

    def run(module, *arguments):
        return errors.run(module.main, arguments), *capsys.readouterr()

    return run


@pytest.fixture
def compilations():
    """A context manager whose value tells how many programs were compiled inside it."""
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)

    @contextlib.contextmanager
    def count():
        before = len(compiled)
        yield lambda: len(compiled) - before

    yield count
    jax.monitoring.unregister_event_duration_listener(listen)

"""What holds for any value: configs are read as they were written, junk is refused, pictures and batches keep shape."""

import contextlib
import gc
import io
import json
import math
import signal
import typing

import numpy as np
import pytest
from command_line import Args
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import options
from ddpm_jax.config import Config
from ddpm_jax.data import Dataset, batch, read
from ddpm_jax.errors import ConfigError

settings.register_profile("reproducible", derandomize=True, deadline=None, database=None, max_examples=200)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def no_garbage_collection():
    """It would call finalisers of other tests' objects while a test is deep in recursion, and these would complain."""
    gc.disable()
    yield
    gc.enable()


# --- configs

ODD = ["--", "-", "-1", " a ", "a\nb", "1,2", ",", "=", "a=b", "None", "true", "\udcff", "\x00", "\u2028", "nan"]
TEXT = st.text(st.characters(exclude_categories=[]), max_size=20) | st.sampled_from(ODD)
PLAIN = {
    int: st.integers(0, 5) | st.integers(),
    float: st.floats(0, 1) | st.floats(0) | st.floats() | st.integers(0, 5) | st.sampled_from([0.1 + 0.2, math.nan]),
    bool: st.booleans(),
    str: TEXT,
    int | str: st.integers() | TEXT,
}


def values(field, kind):
    """The default of a field, and whatever of its type keeps its rules."""
    rules = field.metadata["rules"]

    def allowed(value):
        return all(holds(value) for _, holds in rules)

    choices = [text.removeprefix("one of ").split(", ") for text, _ in rules if text.startswith("one of")]
    if choices:
        return st.sampled_from([options.from_text(kind, word, field.name) for word in choices[0]])
    if typing.get_origin(kind) is tuple:
        part = PLAIN[typing.get_args(kind)[0]].filter(lambda value: allowed((value,)))
        few, many = st.lists(part, max_size=3), st.lists(part, min_size=30, max_size=60)
        return st.just(field.default) | (few | many).map(tuple).filter(allowed)
    return st.just(field.default) | PLAIN[kind].filter(allowed)


VALUES = {name: values(field, kind) for name, field, kind, _ in options.leaves(Config, Config())}


def changed(changes):
    """The default with these changes, and with the rules between fields kept."""
    often = {"log_every": 100, "checkpoint_every": 5000, "sample_every": 5000, "average_every": 10_000}
    units = {"diffusion.T": 1000, "train.steps_per_call": 1, "train.learning_rates": (), "train.ensemble": 1}
    changes = {f"train.{name}": every for name, every in often.items()} | units | changes
    for name in often:
        changes[f"train.{name}"] *= changes["train.steps_per_call"]
    for name, default in (("train.sample_steps", 100), ("train.evaluate_steps", 20)):
        changes[name] = min(changes.get(name, default), changes["diffusion.T"])
    for name, unit in (("train.keep_every", "train.checkpoint_every"), ("train.evaluate_every", "train.log_every")):
        changes[name] = changes.get(name, 0) // changes[unit] * changes[unit]
    steps, warm_up = changes.get("train.steps", 800_000), changes.get("train.warmup_steps", 5000)
    changes["train.warmup_steps"] = min(warm_up, steps - 1)
    changes["train.ensemble"] = len(changes["train.learning_rates"]) or changes["train.ensemble"]
    if changes["train.ensemble"] > 1:
        changes |= {"train.averages": (), "train.evaluate_every": 0}
    return options.replace(Config(), changes)


CONFIGS = st.fixed_dictionaries({}, optional=VALUES).map(changed)


@given(CONFIGS)
def test_any_config_survives_json(config):
    """In value, and as it is printed, where 1 is not 1.0."""
    again = configs.from_json(configs.to_json(config))
    assert again == config
    assert repr(again) == repr(config)


@given(CONFIGS, TEXT, st.booleans(), st.sampled_from("-_"))
def test_any_config_survives_the_command_line(config, workdir, dry_run, dash):
    given = [(f"config.{name}", new) for name, _, new in configs.differences(Config(), config)]
    given += [("workdir", workdir), ("dry_run", dry_run)]
    words = [f"--{name.replace('_', dash)}={options.to_text(value)}" for name, value in given]
    assert options.parse(Args, words, "train.py", "Train.") == Args(config, workdir=workdir, dry_run=dry_run)


NUMBERS = st.integers() | st.floats() | st.just(10**400)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def nearly_json(draw):
    """Values of some type under names of which some are right; or a good text with some of it cut out."""
    sections = {}
    for name in draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3)):
        a, b = name.split(".")
        sections.setdefault(a, {})[draw(st.just(b) | TEXT)] = draw(JUNK)
    text = draw(st.sampled_from([json.dumps(sections), configs.to_json(Config())]))
    start = draw(st.integers(0, len(text)))
    return text if draw(st.booleans()) else text[:start] + text[start + draw(st.integers(0, 9)) :]


def config_or_error(make):
    """What `make` returns, or its ConfigError, which must be of one line; nothing may be printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            made = make()
        except ConfigError as error:
            made = error
    assert said.getvalue() == ""
    assert not isinstance(made, ConfigError) or len(str(made).splitlines()) == 1
    return made


DEEP = st.integers(1, 20_000).map(lambda depth: '{"data": {"source": ' + "[" * depth + "]" * depth + "}}")


@given(nearly_json() | JUNK.map(json.dumps) | TEXT | DEEP)
def test_junk_for_json_is_a_config_or_refused(text):
    assert isinstance(config_or_error(lambda: configs.from_json(text)), Config | ConfigError)


OPTIONS = st.sampled_from(["config", "workdir", "dry-run", *(f"config.{name}" for name in VALUES)])
WORDS = TEXT | st.builds("--{}={}".format, OPTIONS, TEXT | JUNK) | OPTIONS.map("--{}".format) | TEXT.map("--{}".format)


@given(st.lists(WORDS.filter(lambda word: not word.startswith(("-h", "--help"))), max_size=4))
def test_junk_on_the_command_line_is_parsed_or_refused(words):
    """Help aside, which is printed."""

    def load(path):
        if path == Args.config_file:
            return Config()
        raise ConfigError(f"no config file {path}")

    made = config_or_error(lambda: options.parse(Args, words, "train.py", "Train.", load))
    assert isinstance(made, Args | ConfigError)


# --- pictures

SAVED = [  # format, options, modes that it keeps
    ("PNG", {}, ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    ("JPEG", {}, ["L", "RGB", "CMYK"]),
    ("GIF", {}, ["1", "L", "P", "RGB", "RGBA"]),
    ("WEBP", {"lossless": True}, ["L", "RGB", "RGBA"]),
    ("BMP", {}, ["1", "L", "P", "RGB"]),
    ("TIFF", {}, ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    ("TIFF", {"compression": "tiff_lzw"}, ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    ("PPM", {}, ["1", "L", "RGB", "I;16"]),
]
FORMS = st.sampled_from([(form, kept, mode) for form, kept, modes in SAVED for mode in modes])
SIDES = st.tuples(st.integers(1, 64), st.integers(1, 64))
BYTES = st.integers(0, 255)


def encode(picture, form, kept):
    buffer = io.BytesIO()
    picture.save(buffer, form, **kept)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures") / "a.png"


@contextlib.contextmanager
def seconds(limit):
    """Fail what takes longer, by a kind of exception that is no Exception."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"took more than {limit} s"))
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


WHERE = st.floats(0, 1) | st.floats(0, 0.1)  # as a share of the file, often in its header
DAMAGE = st.tuples(WHERE | st.just(1.0), st.lists(st.tuples(WHERE, st.integers(1, 255)), max_size=4))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damage
@given(FORMS, SIDES, st.integers(0, 2**32 - 1), st.none() | DAMAGE, SIDES, st.sampled_from([1, 3]))
def test_a_damaged_picture_has_the_wanted_shape_or_is_refused(file, form, size, seed, damage, wanted, channels):
    """Noise in any mode and format, cut off somewhere and with some bytes changed."""
    form, kept, mode = form
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 4), np.uint8)
    deep = Image.fromarray(noise[..., :2].copy().view("<u2")[..., 0])
    data = bytearray(encode(deep if mode == "I;16" else Image.fromarray(noise).convert(mode), form, kept))
    cut, flips = damage or (1, [])
    for at, change in flips:
        data[int(at * (len(data) - 1))] ^= change
    file.write_bytes(data[: int(cut * len(data))])
    found = None
    with seconds(5), contextlib.suppress(Exception):  # any of them counts as unreadable
        found = read(file, wanted, channels)
    assert found is None or (found.dtype == np.uint8 and found.shape == (*wanted, channels))
    sides = size[0] * wanted[1], size[1] * wanted[0]  # the one over the other is the part that is kept
    assert found is not None or damage or max(sides) > 50 * min(sides)


@given(FORMS, SIDES, st.tuples(BYTES, BYTES, BYTES), st.booleans(), SIDES)
def test_one_colour_is_kept(file, form, size, colour, clear, wanted):
    """In any mode and format and size; what is transparent is white. JPEG rounds, by a few levels."""
    (form, kept, mode), level = form, colour[0]
    values = {
        "1": (level % 2 * 255, (level % 2 * 255,) * 3),
        "L": (level, (level,) * 3),
        "LA": ((level, 0 if clear else 255), (255 if clear else level,) * 3),
        "P": (0, colour),
        "RGB": (colour, colour),
        "RGBA": ((*colour, 0 if clear else 255), (255, 255, 255) if clear else colour),
        "CMYK": ((*(255 - part for part in colour), 0), colour),
        "I;16": (level * 257, (level,) * 3),
    }
    value, expected = values[mode]
    sides = size[0] * wanted[0], size[1] * wanted[1]
    assume(max(sides) <= 50 * min(sides))  # else too little would be kept
    picture = Image.new(mode, size, value)
    if mode == "P":
        picture.putpalette(colour)
    file.write_bytes(encode(picture, form, kept))
    found = read(file, wanted, 3)
    assert found.shape == (*wanted, 3)
    assert np.abs(found.astype(int) - expected).max() <= (4 if form == "JPEG" else 0)


# --- epochs


def epoch(n, batch_size, hosts, seed, number):
    """The indices that each host is given in one epoch, int (steps, hosts, rows); their images and labels fit."""
    dataset = Dataset(np.arange(n, dtype=np.uint8)[:, None, None, None], np.arange(n) + 1000)
    share, steps = batch_size // hosts, n // batch_size
    rows = [slice(host * share, (host + 1) * share) for host in range(hosts)]
    parts = [[batch(dataset, seed, number * steps + i, batch_size, part) for part in rows] for i in range(steps)]
    for part in (part for step in parts for part in step):
        np.testing.assert_array_equal(part["image"].ravel(), part["index"])
        np.testing.assert_array_equal(part["label"], part["index"] + 1000)
    return np.array([[part["index"] for part in step] for step in parts])


HOSTS = st.sampled_from([1, 2, 3, 4])
SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(1, 255), st.integers(1, 16), HOSTS, SEEDS, st.integers(0, 10**6))
def test_an_epoch_is_a_permutation_without_what_fills_no_batch(n, share, hosts, seed, number):
    """Over all hosts together no image twice; another epoch and another seed have another order."""
    batch_size = min(share, n // hosts or 1) * hosts
    n = max(n, batch_size)
    seen = epoch(n, batch_size, hosts, seed, number).ravel()
    assert len(seen) == n // batch_size * batch_size
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(n))
    if len(seen) > 16:  # of fewer, two orders may be the same by chance
        assert seen.tolist() != epoch(n, batch_size, hosts, seed, number + 1).ravel().tolist()
        assert seen.tolist() != epoch(n, batch_size, hosts, (seed + 1) % 2**32, number).ravel().tolist()


@given(st.integers(1, 64), st.integers(1, 8), HOSTS, SEEDS, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_batch_follows_from_seed_and_step(n, share, hosts, seed, number, random):
    """Whatever was asked before, and into however many hosts it is cut."""
    batch_size = 12 * share
    n += batch_size
    once = epoch(n, batch_size, hosts, seed, number)
    for _ in range(3):
        epoch(n, batch_size, 1, random.randrange(2**32), random.randrange(9))
    again = epoch(n, batch_size, random.choice([1, 2, 3, 4]), seed, number)
    np.testing.assert_array_equal(once.reshape(len(once), -1), again.reshape(len(once), -1))


@settings(max_examples=50)
@given(st.integers(2, 30), st.integers(1, 30), SEEDS)
def test_over_many_epochs_each_image_is_seen(batch_size, more, seed):
    """An image is left out of an epoch with a chance below 1/2; of 100 epochs with one below 1e-30."""
    n = batch_size + more
    seen = np.concatenate([epoch(n, batch_size, 1, seed, number).ravel() for number in range(100)])
    assert set(seen.tolist()) == set(range(n))

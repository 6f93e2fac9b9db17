"""Several runs in one program: each is the run that it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL, assert_one_line, fingerprint, logged_metrics
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import experiment, options, training
from ddpm_jax.errors import ConfigError

TWO = [*SMALL, "--config.train.ensemble=2", "--cpu-devices=2"]


def trained(script, workdir, *command):
    done = script("train.py", *command, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def same(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_members_are_the_runs_of_their_seeds(script, tmp_path):
    """Parameters, averages, losses; and stopped and resumed, the same bits as without."""
    steps = "--config.train.steps=14"
    both = trained(script, tmp_path / "both", *TWO, steps)
    for i in range(2):
        alone = trained(script, tmp_path / f"{i}", *SMALL, steps, "--cpu-devices=1", f"--config.train.seed={i}")
        for weights in ("ema", "raw"):
            same(experiment.restore(both, weights, member=i)[1], experiment.restore(alone, weights)[1])
        for row, own in zip(logged_metrics(both), logged_metrics(alone), strict=True):
            assert row[f"loss_member_{i}"] == pytest.approx(own["loss"], rel=1e-5)
        grids = both / "samples" / f"step_000000014_member_{i}.png", alone / "samples" / "step_000000014.png"
        np.testing.assert_allclose(*(np.asarray(Image.open(grid)).astype(int) for grid in grids), atol=1)
    row = logged_metrics(both)[-1]
    assert row["loss"] == pytest.approx((row["loss_member_0"] + row["loss_member_1"]) / 2, rel=1e-6)
    trained(script, tmp_path / "parts", *TWO, "--config.train.steps=9")
    assert fingerprint(trained(script, tmp_path / "parts", *TWO, steps)) == fingerprint(both)

    done = script("sample.py", f"--workdir={both}", "--num=4", "--steps=3", "--member=1")
    assert done.returncode == 0, done.stderr
    done = script("sample.py", f"--workdir={both}", "--num=4", "--steps=3", "--member=2", "--overwrite")
    assert done.returncode == 2
    assert_one_line(done)
    assert "--member=2, but" in done.stderr


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_members_with_their_own_scale_of_the_update(monkeypatch, platform):
    """SGD on (w - 1)^2 / 2 goes from w to w - scale (w - 1); two steps, three members, two of them on one device."""

    def towards_one(params, key, x_0, label, u):
        return 0.5 * (params["w"] - 1) ** 2

    optimizer, start, scales = optax.sgd(1.0), np.float32([3, -2, 5]), np.float32([0.5, 0.1, 0.25])
    step = training.make_train_step(towards_one, optimizer, 0.5)
    states = jax.vmap(lambda w: training.init_state({"w": w}, optimizer))(start)
    batches = {"index": np.zeros((3, 2, 4), np.int32), "image": np.zeros((3, 2, 4, 2, 2, 1), np.uint8)}
    roots = jnp.stack([jax.random.key(i) for i in range(3)])
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **forms: forms[platform](*args))
    states, found = jax.jit(training.ensemble_steps(step))(states, batches, roots, scales)
    np.testing.assert_allclose(states.params["w"], 1 + (1 - scales) ** 2 * (start - 1), rtol=1e-6)
    np.testing.assert_allclose(found["loss"][:, 1], 0.5 * ((1 - scales) * (start - 1)) ** 2, rtol=1e-5)
    assert states.step.tolist() == [2, 2, 2]


def test_a_member_is_a_config_of_its_own():
    config = options.replace(configs.Config(), {"train.ensemble": 2, "train.learning_rates": (1e-3, 1e-4)})
    parts = experiment.Experiment(config, *[None] * (len(experiment.Experiment._fields) - 1))
    assert experiment.member_config(parts.config, 1) == options.replace(configs.Config(), {"train.learning_rate": 1e-4})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rates=(), seed=5))
    assert experiment.member_config(config, 1).train.seed == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.learning_rates": (1e-3,)}, "has 1 numbers for train.ensemble=2 runs"),
        ({"train.averages": (0.1,)}, "train.averages cannot be combined with train.ensemble=2"),
        ({"train.evaluate_every": 100}, "train.evaluate_every cannot be combined with train.ensemble=2"),
    ],
)
def test_what_does_not_go_with_an_ensemble_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        options.replace(configs.Config(), {"train.ensemble": 2, **changes})

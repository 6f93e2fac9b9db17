"""What a config may and may not combine, and that each choice reaches the network and the sampler."""

import jax
import numpy as np
import pytest
from conftest import TINY

from ddpm_jax import config, editing, experiment, schedules, vectors
from ddpm_jax.errors import ConfigError
from ddpm_jax.evaluation import likelihood

SHAPE = (8, 8, 1)


def made(train=None, model=None, **names):
    """The Experiment of a tiny network with changes `model`; `names` are fields of config.Diffusion."""
    model = config.Model(**TINY | (model or {}))
    return experiment.make(
        config.Config(model=model, diffusion=config.Diffusion(**names), train=config.Train(**train or {})), SHAPE
    )


MISTAKES = {
    "a name": ({"distance": "l3"}, r"diffusion\.distance=l3 is not one of l2, l1, huber"),
    "weighted output": ({"weighting": "vlb", "error": "output"}, "vlb weights the error in eps"),
    "learned on a curve": ({"variance": "learned", "schedule": "vp"}, "vp is continuous"),
    "weighted v": ({"weighting": "p2", "error": "v"}, "p2 weights the error in eps; use simple with diffusion.error=v"),
    "a mean on a curve": ({"parameterization": "mean", "schedule": "vp"}, "mean needs a discrete schedule, vp is"),
    "a parameterization": ({"parameterization": "x0"}, "x0 is not one of eps, x_0, v, flow, edm, mean"),
    "levels": ({"noise_levels": "normal"}, "normal is not one of schedule, log_normal, logit_normal, cosine, uniform"),
    "a normal of others": ({"noise_levels": "cosine", "logsnr_normal": (0.0, 1.0)}, "cosine is not normal"),
    "a normal of uniform t": ({"logsnr_normal": (0.0, 1.0)}, "noise_levels=schedule is not normal"),
    "half a normal": (
        {"noise_levels": "log_normal", "logsnr_normal": (2.5,)},
        r"logsnr_normal=2\.5 must be a mean and",
    ),
    "no deviation": ({"noise_levels": "log_normal", "logsnr_normal": (0.0, 0.0)}, "logsnr_normal=0,0 must be a mean"),
    "the bound elsewhere": ({"weighting": "vlb", "noise_levels": "uniform"}, "add diffusion.importance_weights=true"),
    "a noise": ({"noise_choice": "best"}, "best is not one of nearest, lowest_loss"),
    "dropped labels": ({"label_dropout": 0.1}, r"model\.num_classes=0"),
    "eps of nothing": ({"zero_terminal_snr": True}, "leaves no signal at T"),
    "error in eps of nothing": (
        {"schedule": "jsd", "parameterization": "v"},
        r"use v or x_0 with diffusion\.error=output",
    ),
    "fault_30 a beta that leaves nothing": (
        {"T": 3, "betas": (0.1, 1.0, 0.2), "train": {"sample_steps": 3}},
        "betas must lie between 0 and 1",
    ),
    "betas": ({"T": 3, "betas": (0.1, 0.2), "train": {"sample_steps": 3}}, "betas has 2 numbers"),
    "a length": ({"train": {"averages": (0.5,)}}, r"sigma_rel=0\.5 is not the length of an average"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_go_together_is_refused(mistake):
    names, fragment = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=fragment):
        made(**names)


def test_what_needs_training_is_refused_in_sampling():
    parts = made()
    for options, fragment in [
        ({"guidance": 2.0}, r"guidance=2 needs a model trained with diffusion\.label_dropout"),
        ({"variance": "learned"}, "the model was trained without a learned variance"),
        ({"variance": "large"}, "variance=large is not one of fixedsmall, fixedlarge, learned"),
        ({"limit": "hard"}, "limit=hard is not one of clip, dynamic, none"),
    ]:
        with pytest.raises(ConfigError, match=fragment):
            experiment.make_generate(parts, "ddpm", 10, **options)


def test_no_signal_at_T_is_not_warned_of(recwarn):
    made(schedule="jsd", parameterization="v", error="output")
    made(zero_terminal_snr=True, parameterization="x_0", error="output")
    assert not [w for w in recwarn if "x_T keeps" in str(w.message)]
    with pytest.warns(UserWarning, match="x_T keeps"):
        made(T=2, betas=(0.1, 0.2), train={"sample_steps": 2})


def test_large_images_get_more_noise():
    parts = made(base_resolution=4)
    plain = schedules.make_schedule("linear")
    np.testing.assert_allclose(np.exp(plain.logsnr(500)) / np.exp(parts.schedule.logsnr(500)), 4, rtol=1e-5)


EVERYTHING = {
    "variance": "learned",
    "self_conditioning": True,
    "label_dropout": 0.5,
    "time_sampling": "loss_aware",
    "distance": "huber",
    "weighting": "min_snr",
    "parameterization": "v",
}


@pytest.mark.slow
def test_one_step_reaches_every_parameter():
    """The labels', the variance's and those behind zeros too, after three steps; and the average's."""
    train = {"batch_size": 8, "averages": (0.1,), "warmup_steps": 0}
    parts = made(train, {"num_classes": 3}, **EVERYTHING)
    init_state, step = parts.init_state, parts.train_step
    state = init_state()
    images = np.random.default_rng(0).integers(0, 256, (8, *SHAPE), np.uint8)
    batch = {"index": np.arange(8), "image": images, "label": np.arange(8) % 3}
    mapped = jax.pmap(step, "batch", in_axes=(None, 0, None), out_axes=None, devices=jax.devices()[:1])
    for _ in range(3):  # layers behind zeros move when those have
        state, metrics = mapped(state, jax.tree.map(lambda x: x[None], batch), jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    start, *ends = (vectors.unpack(jax.device_get(x)) for x in (init_state().params, state.params, state.averages[0]))
    for tree in ends:
        moved = jax.tree.map(lambda a, b: np.any(a != b), tree, start)
        assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
def test_a_picture_of_a_continuous_schedule():
    """An untrained network answers 0: with v, x_0_hat = alpha_t x_t, and the preview ends with the picture."""
    parts = made(schedule="vp", parameterization="v")
    generate = jax.jit(experiment.make_generate(parts, "ddim", 5, frames=5, preview=True))
    picture, finite = generate(jax.jit(parts.init)(jax.random.key(0)), jax.random.key(0), 0)
    assert picture.shape == (5, *SHAPE)
    assert finite
    assert picture[0].astype(float).std() < picture[-1].astype(float).std()


def test_json_keeps_own_betas():
    given = config.Config(diffusion=config.Diffusion(T=100, betas=tuple(np.geomspace(1e-4, 0.1, 100))))
    assert config.from_json(config.to_json(given)) == given


def test_a_start_from_noise_below_T_is_warned_of_wherever_it_can_be_chosen(recwarn):
    """In 2 steps of spacing leading at t = 501; not of an edit that begins there on purpose, nor of mse."""
    parts, x = made(), jax.numpy.zeros(SHAPE)
    pair = editing.interpolate(parts.schedule, 300, jax.random.key(0), x, x, 3)
    experiment.make_generate(parts, "ddim", 2, "leading", edit=pair)
    experiment.make_generate(parts, "ddim", 2, "leading", edit=editing.reconstruct(parts.schedule, x))
    experiment.make_generate(parts, "ddim", 501, "leading")
    likelihood.make_plan(parts, ["mse"], 2, "leading")
    assert not recwarn
    for start in (
        lambda: experiment.make_generate(parts, "ddim", 2, "leading"),
        lambda: experiment.make_generate(
            parts, "ddim", 2, "leading", edit=editing.inpaint(parts.schedule, x, x < 1, 1, 2)
        ),
        lambda: likelihood.make_plan(parts, ["nll"], 2, "leading"),
    ):
        with pytest.warns(UserWarning, match=r"pure noise is used for x_t at t = 501 of 1000, which keeps 7\.8%"):
            start()

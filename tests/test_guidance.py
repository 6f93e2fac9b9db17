"""Autoguidance, CFG++ and adaptive projected guidance against Gaussian data, identities and published steps."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import T, make_run, small_experiment
from gaussian import BAR, exact

from ddpm_jax import conditioning, config, diffusion, experiment, keys, samplers, schedules
from ddpm_jax.commands import sample
from ddpm_jax.errors import ConfigError

GUIDANCES = conditioning.GUIDANCES
GOOD, BASE = (0.3, 0.4), (-0.1, 0.6)  # mean and spread of the data of both denoisers


def guided(schedule, name, scale, good=GOOD, base=BASE, **options):
    """The guided denoiser of two Gaussians."""
    denoisers = (exact(schedule, spread, mean) for mean, spread in (good, base))
    return conditioning.guided_denoiser(*denoisers, GUIDANCES[name], scale, **options)


def gain_and_offset(mean, spread, bar):
    """E[x_0 | x_t] = gain x_t + offset for data N(mean, spread^2), float64."""
    gain = np.sqrt(bar) * spread**2 / (bar * spread**2 + 1 - bar)
    return np.array([gain, mean - gain * np.sqrt(bar) * mean])


def expected(times, scale, renoise, bars=BAR):
    """(gain, offset) of x_0 as a function of x_T: DDIM with two Gaussian denoisers, by a recursion in float64."""
    whole = np.array([1.0, 0.0])
    for t, s in itertools.pairwise(times):
        good, base = (gain_and_offset(*each, bars[t]) for each in (GOOD, BASE))
        x_0_hat = base + scale * (good - base)
        eps_hat = (np.array([1, 0]) - np.sqrt(bars[t]) * (base if renoise else x_0_hat)) / np.sqrt(1 - bars[t])
        gain, offset = np.sqrt(bars[s]) * x_0_hat + np.sqrt(1 - bars[s]) * eps_hat
        whole = np.array([gain * whole[0], gain * whole[1] + offset])
    return whole


@pytest.mark.parametrize(("name", "scale"), [("cfg", 2.5), ("cfg", 0.0), ("cfg++", 0.6), ("cfg++", 1.0)])
def test_ddim_guided_by_gaussians_is_affine(linear, name, scale):
    sampler, renoise = samplers.ddim(linear), GUIDANCES[name].renoise
    sampler = samplers.renoised(sampler, linear) if renoise else sampler
    times, x_T = linear.times(20), np.random.default_rng(0).normal(size=200)
    args = guided(linear, name, scale), sampler, times, jax.random.key(0), jnp.asarray(x_T, jnp.float32)
    gain, offset = expected(times, scale, renoise)
    np.testing.assert_allclose(samplers.run_sampler(*args)[0][-1], gain * x_T + offset, atol=3e-5)


def test_cfgpp_with_lambda_0_is_ddim_without_the_label(linear):
    predict, sampler = guided(linear, "cfg++", 0.0), samplers.renoised(samplers.ddim(linear), linear)
    args = linear.times(10), jax.random.key(0), (64,)
    plain = samplers.sample(exact(linear, BASE[1], BASE[0]), samplers.ddim(linear), *args)
    np.testing.assert_array_equal(samplers.sample(predict, sampler, *args), plain)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_step_of_cfgpp_is_the_published_one(linear, scale):
    """Chung et al. 2024, algorithm 2: x_0_hat between the two, noise of the one without the label."""
    x_t, t, s = np.random.default_rng(0).normal(size=64), 700, 400
    (a, b), (c, d) = (gain_and_offset(*each, BAR[t]) for each in (GOOD, BASE))
    x_0_hat, base = scale * (a * x_t + b) + (1 - scale) * (c * x_t + d), c * x_t + d
    eps_hat = (x_t - np.sqrt(BAR[t]) * base) / np.sqrt(1 - BAR[t])
    sampler = samplers.renoised(samplers.ddim(linear), linear)
    x_s, _ = sampler.step(guided(linear, "cfg++", scale), jax.random.key(0), jnp.float32(x_t), t, s, ())
    np.testing.assert_allclose(x_s, np.sqrt(BAR[s]) * x_0_hat + np.sqrt(1 - BAR[s]) * eps_hat, atol=1e-5)


def test_cfgpp_moves_the_mean_in_proportion_to_the_number_of_steps(linear):
    """Of two Gaussians of one spread. Guidance by cfg moves it by scale times their distance, with any number."""
    good, base, found = (0.2, 0.5), (0.0, 0.5), {}
    for n, name in itertools.product((100, 200), ("cfg", "cfg++")):
        sampler = samplers.renoised(samplers.ddim(linear), linear) if name == "cfg++" else samplers.ddim(linear)
        predict = guided(linear, name, 1.0 if name == "cfg++" else 2.0, good, base)
        x_0 = samplers.run_sampler(predict, sampler, linear.times(n), jax.random.key(0), jnp.zeros(1))[0][-1]
        found[n, name] = x_0.item()
    assert found[200, "cfg++"] / found[100, "cfg++"] == pytest.approx(2, rel=0.05)
    assert found[100, "cfg++"] > 5 * good[0]
    assert [found[n, "cfg"] for n in (100, 200)] == pytest.approx([2 * good[0]] * 2, abs=5e-3)


def test_cfgpp_of_ddpm_is_that_of_ddim_with_eta_1(linear):
    x_t, key = jax.random.normal(jax.random.key(0), (64,)), jax.random.key(1)
    for t, s in [(1000, 500), (500, 20), (2, 1), (1, 0)]:
        steps = [
            samplers.renoised(sampler, linear).step(guided(linear, "cfg++", 0.7), key, x_t, t, s, ())[0]
            for sampler in (samplers.ddpm(linear, "fixedsmall"), samplers.ddim(linear, 1.0))
        ]
        np.testing.assert_allclose(*steps, atol=2e-4)


def test_cfgpp_refuses_samplers_that_do_not_renoise_once(linear):
    for name in ("heun", "edm", "dpmpp_2m", "dpmpp_3m"):
        with pytest.raises(ConfigError, match=r"CFG\+\+ does not work with this sampler; use ddpm or ddim"):
            samplers.renoised(samplers.make_sampler(name, linear), linear)


def test_apg_that_keeps_everything_is_cfg(linear):
    x_t = jax.random.normal(jax.random.key(0), (8, 8, 1))
    found = guided(linear, "apg", 3.0, parallel=1.0)(x_t, 500)
    np.testing.assert_array_equal(found, guided(linear, "cfg", 3.0)(x_t, 500))


@pytest.mark.parametrize("norm", [0.25, np.inf])
def test_the_update_of_apg_is_orthogonal_and_bounded(norm):
    """A right angle at x_0_hat, in the plane of x_0_hat and base: lengths by the cosine between them."""
    x_0_hat, base = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    update = conditioning.project(jnp.float32(x_0_hat), jnp.float32(base), 3.0, norm=norm) - x_0_hat
    assert abs(np.sum(update * x_0_hat)) < 1e-4 * np.linalg.norm(update) * np.linalg.norm(x_0_hat)
    difference = x_0_hat - base
    length = np.linalg.norm(difference)
    cosine = np.sum(difference * x_0_hat) / length / np.linalg.norm(x_0_hat)
    assert np.linalg.norm(update) == pytest.approx(2 * min(norm, length) * np.sqrt(1 - cosine**2), rel=1e-5)
    along = conditioning.project(jnp.float32(x_0_hat), jnp.float32(base), 3.0, parallel=1.0, norm=norm) - x_0_hat
    np.testing.assert_allclose(along, 2 * min(norm, length) / length * difference, rtol=1e-4, atol=1e-6)


def test_apg_has_nothing_to_add_along_x_0_hat(linear):
    """An image of one pixel has no other direction; and equal denoisers give an update of zero, not of NaN."""
    x_t = jnp.full((1, 1, 1), 0.4)
    wanted = exact(linear, GOOD[1], GOOD[0])(x_t, 300)
    np.testing.assert_allclose(guided(linear, "apg", 5.0)(x_t, 300), wanted, atol=1e-6)
    np.testing.assert_array_equal(guided(linear, "apg", 5.0, base=GOOD, norm=1.0)(x_t, 300), wanted)


@pytest.mark.parametrize("name", GUIDANCES)
def test_scale_1_and_times_outside_the_interval_are_not_guided(linear, name):
    x_t, renoise = jax.random.normal(jax.random.key(0), (4, 4, 1)), GUIDANCES[name].renoise
    for scale, t, kept in ((1.0, 500, not renoise), (0.5, 199, True), (0.5, 601, True), (0.5, 600, False)):
        wanted = exact(linear, GOOD[1], GOOD[0])(x_t, t)
        found = guided(linear, name, scale, low=200, high=600)(x_t, t)
        for x_0_hat in found if renoise else [found]:
            assert np.array_equal(x_0_hat, wanted) == kept or scale == 1


def test_limit_is_applied_to_what_is_guided(linear):
    """And to the base, from which CFG++ has its noise: with lambda 0 it is DDIM with a clipped x_0_hat."""
    x_t = jnp.float32([-4.0, 4.0])
    found = guided(linear, "cfg", 3.0, limit=diffusion.clip)(x_t, 50)
    np.testing.assert_array_equal(found, [-1, 1])
    for each in guided(linear, "cfg++", 0.0, limit=diffusion.clip)(x_t, 50):
        np.testing.assert_array_equal(each, diffusion.clip(exact(linear, BASE[1], BASE[0])(x_t, 50)))


# --- two experiments


def gaussian_experiment(parameterization, schedule="linear", shape=(4, 4, 1)):
    """An Experiment whose network knows the Gaussian data with mean and spread `params`."""
    choices = config.Diffusion(parameterization=parameterization, schedule=schedule)
    levels = schedules.make_schedule(schedule)

    def net(params, x_t, t, key=None, label=None):
        mean, spread = params
        x_0_hat, logsnr = exact(levels, spread, mean)(x_t, t), levels.logsnr(t)
        alpha, sigma = diffusion.alpha_sigma(logsnr)
        eps_hat = (x_t - alpha * x_0_hat) / sigma
        return diffusion.PARAMETERIZATIONS[parameterization].target(x_0_hat, eps_hat, logsnr)

    return experiment.make(config.Config(diffusion=choices), shape, (lambda key: (jnp.zeros(()),) * 2, net))


GUIDES = [("v", "linear"), ("x_0", "vp"), ("v", "cosine")]


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_of_another_kind_and_schedule_gives_the_same_samples(guide):
    """The recursion of the two Gaussians in uint8, whatever the guide's output and its times."""
    parts, other = gaussian_experiment("eps"), gaussian_experiment(*guide)
    options = {"limit": "none", "guidance": 2.0, "guide": other}
    generate = experiment.make_generate(parts, "ddim", 20, **options)
    root, params = keys.root(0, "sample"), (tuple(map(jnp.float32, GOOD)), tuple(map(jnp.float32, BASE)))
    found = jax.jit(generate)(params, root, 3)[0][-1]
    gain, offset = expected(parts.schedule.times(20), 2.0, False)
    x_0 = gain * np.float64(samplers.pure_noise(jax.random.fold_in(root, 3), parts.shape)) + offset
    assert np.abs(np.float64(found) - np.clip(np.round((x_0 + 1) * 127.5), 0, 255)).max() <= 1
    unguided = jax.jit(experiment.make_generate(parts, "ddim", 20, limit="none"))(params[0], root, 3)[0][-1]
    assert np.abs(np.float64(found) - np.float64(unguided)).max() > 5


def test_many_steps_of_cfgpp_are_warned_of(recwarn):
    parts = small_experiment({"num_classes": 3}, T=200, label_dropout=0.1)
    experiment.make_generate(parts, "ddim", 100, guidance_method="cfg++", guidance=0.5)
    assert not recwarn
    with pytest.warns(UserWarning, match="101 are far more than the 50 of its paper"):
        experiment.make_generate(parts, "ddim", 101, guidance_method="cfg++", guidance=0.5)


def test_what_cannot_guide_is_refused():
    plain, classes = small_experiment(), small_experiment({"num_classes": 3}, label_dropout=0.1)
    other = experiment.make(plain.config, (8, 8, 1))
    for parts, options, fragment in (
        (plain, {"guide": other, "guidance": 2}, r"the shape of the guide is \(8, 8, 1\), of the model"),
        (plain, {"guide": classes, "guidance": 2}, "number of classes of the guide is 3, of the model 0"),
        (
            classes._replace(classes=("a", "b", "c")),
            {"guide": classes._replace(classes=("a", "c", "b")), "guidance": 2},
            "the name of class 1 of the guide is c, of the model b",
        ),
        (plain, {"guide": plain}, "a guide has no effect with guidance=1"),
        (classes, {"guidance_method": "apg"}, "guidance_method=apg has no effect"),
        (classes, {"guidance_method": "pag"}, r"guidance_method=pag is not one of cfg, cfg\+\+, apg"),
        (classes, {"guidance_method": "cfg++", "guidance": 2}, "guidance=2 must be from 0 to 1 with"),
        (plain, {"guidance_method": "cfg++"}, "needs a model trained with diffusion.label_dropout, or a"),
        (
            classes,
            {"guidance": 2, "guidance_options": {"norm": 1.0}},
            "guidance_method=cfg has no option norm; it has none",
        ),
        (
            plain,
            {"guide": small_experiment(schedule="linear", base_resolution=64), "guidance": 2},
            "the guide's schedule has no time with the noise of t=",
        ),
    ):
        with pytest.raises(ConfigError, match=fragment):
            experiment.make_generate(parts, "ddim", 10, **options)


@pytest.mark.slow
def test_guidance_passes_on_all_that_a_prediction_can_carry(tmp_path):
    """A learned variance and the previous estimate: of a network that guides itself, and of CFG++ with lambda 0."""
    _, parts, params, _ = make_run(
        tmp_path, scale=4, model={"num_classes": 3}, self_conditioning=True, variance="learned", label_dropout=0.1
    )
    root, null = keys.root(0, "sample"), 3

    def draw(sampler, label, params=params, **options):
        generate = experiment.make_generate(parts, sampler, 4, preview=True, frames=4, **options)
        return jax.jit(generate)(params, root, 1, label)[0].astype(int)

    guided = draw("ddpm", 1, (params, params), guide=parts, guidance=4.0)
    assert np.abs(guided - draw("ddpm", 1)).max() <= 1
    unlabelled = draw("ddim", null)
    assert np.abs(draw("ddim", 1, guidance_method="cfg++", guidance=0.0) - unlabelled).max() <= 1
    assert np.abs(draw("ddim", 1, guidance_method="cfg++", guidance=1.0) - unlabelled).max() > 5


# --- the command


def drawn(call, out, *given):
    code, _, err = call(sample, f"--out={out}", "--steps=3", "--num=4", *given)
    assert (code, err) == (0, "")
    return np.load(out / "samples.npz")["images"].astype(int)


def test_a_run_is_guided_by_itself_or_by_an_earlier_step_of_another(run, call, tmp_path):
    """Itself as the guide changes nothing; the other one has another width and parameterization."""
    other = make_run(tmp_path, steps=(3, 5), parameterization="v", model={"channels": 8})[0]
    wanted, same, guided = (
        drawn(call, tmp_path / name, f"--workdir={run[0]}", *given)
        for name, given in {
            "plain": [],
            "same": [f"--guide={run[0]}/checkpoints/5", "--guidance=3"],
            "guided": [f"--guide={other}/checkpoints/3", "--guidance=3"],
        }.items()
    )
    np.testing.assert_array_equal(same, wanted)
    assert np.any(guided != wanted)


@pytest.mark.slow
def test_options_of_a_method_reach_it(call, tmp_path):
    """apg that keeps all of the update is cfg; with a short norm it is nearly the network itself."""
    folder = make_run(tmp_path, scale=4, model={"num_classes": 3}, label_dropout=0.1)[0]
    apg, given = "--guidance-method=apg", (f"--workdir={folder}", "--guidance=4")
    cfg, whole, short = (
        drawn(call, tmp_path / str(i), *given, *more)
        for i, more in enumerate(([], [apg, "--guidance-parallel=1"], [apg, "--guidance-norm=1e-4"]))
    )
    assert np.abs(whole - cfg).max() <= 1
    assert np.abs(short - drawn(call, tmp_path / "plain", given[0])).max() <= 1
    assert np.abs(short - cfg).max() > 5


def test_the_guide_is_recorded_and_another_one_is_not_mixed_in(run, call, tmp_path):
    given = f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", "--steps=3", "--num=4", "--shards=2", "--guidance=3"
    code, told, _ = call(sample, *given, f"--guide={run[0]}")
    assert code == 0
    assert f"guided by step 5 of {run[0]}, ema weights" in told
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
    assert settings["guide"] == {"step": 5, "parameters": settings["parameters"]}
    assert call(sample, *given, f"--guide={run[0]}/checkpoints")[0] == 0  # the same step by another name
    code, _, err = call(sample, *given, f"--guide={run[0]}", "--guide-weights=raw")
    assert code == 2
    assert "holds samples of other settings (guide/parameters is" in err


def test_without_guidance_the_record_is_that_of_older_versions():
    """So that a sampling that one of them began can be continued."""
    settings = sample.provenance(sample.Args(), 4, {}, 5, T)["settings"]
    assert {name for name in settings if name.startswith("guid")} == {"guidance"}


@pytest.mark.parametrize(
    ("given", "code", "fragment"),
    [
        (["--guide=nowhere", "--guidance=2"], 4, "there is no run in nowhere (no folder checkpoints); train first, or"),
        (["--guide-weights=raw"], 2, "--guide-weights needs --guide"),
        (["--guidance-norm=-1"], 2, "--guidance-norm=-1.0 must be at least 0"),
        (["--reconstruct=a.png", "--sampler=ddim", "--guidance-method=cfg++"], 2, "cannot undo the steps of"),
        (["--guide=RUN", "--guidance-method=cfg++", "--sampler=heun"], 2, "CFG++ does not work with this sampler"),
    ],
)
def test_mistakes_of_guidance_get_one_line(run, call, tmp_path, given, code, fragment):
    given = [option.replace("RUN", str(run[0])) for option in given]
    found, _, err = call(sample, f"--workdir={run[0]}", f"--out={tmp_path / 'out'}", *given)
    assert (found, err.count("\n")) == (code, 1)
    assert fragment in err

"""The steps of samplers against identities; paths, previews, and images by the batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from gaussian import BAR, MEAN, exact

from ddpm_jax import diffusion, parallel, samplers, schedules
from ddpm_jax.errors import ConfigError, Diverged


def test_edm_without_churn_is_heun(linear):
    args = linear.times(10), jax.random.key(0), (16,)
    found = samplers.sample(exact(linear, 0.5), samplers.edm(linear, churn=0.0), *args)
    np.testing.assert_allclose(found, samplers.sample(exact(linear, 0.5), samplers.heun(linear), *args), atol=1e-5)


NAN_CASES = [(name, {}) for name in samplers.SAMPLERS if name != "ddpm"]
NAN_CASES += [("ddpm", {"variance": variance}) for variance in diffusion.VARIANCES]
TABLES = [schedules.make_schedule(name).table for name in ("linear", "cosine")]
NO_SIGNAL = schedules.make_schedule("linear", zero_terminal_snr=True).table


@pytest.mark.parametrize("parameterization", diffusion.PARAMETERIZATIONS)
@pytest.mark.parametrize(("name", "options"), NAN_CASES, ids=lambda case: str(case))
def test_no_step_gives_nan(name, options, parameterization):
    """At t = 1, t = T and s = 0, alone and in a row, for a network that answers with what it is shown.

    Also where no signal is left at T; there eps tells nothing of the image, and experiment.make refuses it.
    """
    way, x = diffusion.PARAMETERIZATIONS[parameterization], jnp.linspace(-2, 2, 8)

    def walk(schedule, times):
        sampler = samplers.make_sampler(name, schedule, **options)
        make = diffusion.make_denoiser_with_variance if sampler.needs_variance else diffusion.make_denoiser
        predict = make(lambda params, x, t, label: jnp.tile(x, 2), schedule, way, None, None, diffusion.clip)
        return samplers.run_sampler(predict, sampler, times, jax.random.key(0), x)[0]

    over = jax.jit(jax.vmap(lambda table, times: walk(schedules.DiscreteSchedule(table), times), (None, 0)))
    for table in TABLES if parameterization == "eps" else [*TABLES, NO_SIGNAL]:
        assert np.isfinite(over(table, np.array([[1000, 500, 1, 0], [1000, 999, 1, 0], [1000, 2, 1, 0]]))).all()
        assert np.isfinite(over(table, np.array([[1, 0], [1000, 0], [1000, 1]]))).all()
    vp = schedules.make_schedule("vp")
    assert np.isfinite(walk(vp, np.array([1.0, 0.5, vp.t_min, 0.0], np.float32))).all()


def test_ddim_with_eta_1_is_the_ancestral_sampler(linear):
    predict, x_t, key = exact(linear, 0.5), jax.random.normal(jax.random.key(0), (64,)), jax.random.key(1)
    for t, s in [(1000, 999), (1000, 500), (500, 20), (2, 1), (1, 0), (300, 0)]:
        a, _ = samplers.ddpm(linear, "fixedsmall").step(predict, key, x_t, t, s, ())
        b, _ = samplers.ddim(linear, 1.0).step(predict, key, x_t, t, s, ())
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "heun"])
def test_a_perfect_prediction_lands_on_the_marginal(linear, name):
    """x_t = alpha_t x_0 + sigma_t eps goes to alpha_s x_0 + sigma_s eps, for every pair of times."""
    sampler = samplers.make_sampler(name, linear)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 64))
    for t, s in [(1000, 700), (700, 10), (10, 9), (1, 0), (1000, 0)]:
        x_t = np.sqrt(BAR[t]) * x_0 + np.sqrt(1 - BAR[t]) * eps
        memory = sampler.init(jnp.asarray(x_t))
        x_s, _ = sampler.step(lambda x, t: jnp.asarray(x_0), jax.random.key(0), x_t, t, s, memory)
        np.testing.assert_allclose(
            x_s,
            np.sqrt(BAR[s]) * x_0 + np.sqrt(1 - BAR[s]) * eps,
            atol=2e-3 if t == 1 else 5e-4 if name == "heun" else 1e-4,
        )


@pytest.mark.parametrize(
    ("name", "options"), [("ddpm", {}), ("ddim", {"eta": 0.7}), ("edm", {"churn": 0.3, "noise": 1.0})]
)
def test_a_perfect_prediction_keeps_the_marginal_of_random_steps(linear, name, options):
    """x_t drawn from q(x_t | x_0) goes to x_s with the mean and the variance of q(x_s | x_0)."""
    sampler, x_0 = samplers.make_sampler(name, linear, **options), 0.6
    for t, s in [(900, 500), (300, 20), (20, 19)]:
        x_t = np.sqrt(BAR[t]) * x_0 + np.sqrt(1 - BAR[t]) * np.random.default_rng(0).normal(size=90_000)
        x_s, _ = sampler.step(lambda x, t: x_0 + 0 * x, jax.random.key(1), jnp.asarray(x_t, jnp.float32), t, s, ())
        assert x_s.mean() == pytest.approx(np.sqrt(BAR[s]) * x_0, abs=5 * np.sqrt(1 - BAR[s]) / 300)
        assert x_s.var() == pytest.approx(1 - BAR[s], rel=5 * np.sqrt(2) / 300)


NAMES = [*diffusion.PARAMETERIZATIONS, "mean"]
DISCRETE = [*(schedules.make_schedule(name).table for name in schedules.SCHEDULES), NO_SIGNAL]


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize(
    "where",
    ["discrete", "vp", *(pytest.param(name, marks=pytest.mark.slow) for name in schedules.CURVES if name != "vp")],
)
def test_one_denoiser_gives_the_same_samples_whatever_its_output(where, sampler):
    """Every parameterization, schedule and sampler, with the exact denoiser of Gaussian data, in float64.

    One program runs all parameterizations, and all discrete schedules: lax.switch under vmap.
    """
    with jax.enable_x64(True):
        discrete = where == "discrete"
        names = [name for name in NAMES if name != "mean" or discrete]

        def run(schedule):
            denoise = exact(schedule, 0.5)

            def denoiser(name):
                way = diffusion.make_parameterization(name, schedule)

                def net(params, x_t, t, label):
                    (alpha, sigma), x_0_hat = diffusion.alpha_sigma(schedule.logsnr(t)), denoise(x_t, t)
                    return way.target(x_0_hat, (x_t - alpha * x_0_hat) / sigma, schedule.logsnr(t))

                return diffusion.make_denoiser(net, schedule, way, None)

            branches, times = [denoise, *map(denoiser, names)], schedule.times(8)

            def end(i):
                def predict(x_t, t):
                    return jax.lax.switch(i, branches, x_t, t)

                made = samplers.make_sampler(sampler, schedule)
                return samplers.sample(predict, made, times, jax.random.key(0), (16,))

            return jax.vmap(end)(jnp.arange(len(branches)))

        if discrete:
            ends = jax.jit(jax.vmap(lambda table: run(schedules.DiscreteSchedule(table))))(np.float64(DISCRETE))
        else:
            ends = jax.jit(lambda: run(schedules.make_schedule(where)))()[None]
        signal = np.isfinite([table[-1] for table in DISCRETE]) if discrete else np.array([True])
        for name, end in zip(names, np.moveaxis(ends, 1, 0)[1:], strict=True):
            told = (
                signal if name == "eps" else slice(None)
            )  # eps of pure noise tells nothing; experiment.make refuses it
            np.testing.assert_allclose(end[told], ends[told, 0], atol=1e-6, err_msg=name)


def test_wrong_names_and_options_are_refused(linear):
    with pytest.raises(ConfigError, match="sampler=dpm is not one of ddpm, ddim, dpmpp_2m, dpmpp_3m, heun, edm"):
        samplers.make_sampler("dpm", linear)
    with pytest.raises(ConfigError, match="ddpm has no option eta"):
        samplers.make_sampler("ddpm", linear, eta=0.5)
    with pytest.raises(ConfigError, match=r"eta=1\.5"):
        samplers.make_sampler("ddim", linear, eta=1.5)
    samplers.make_sampler("ddim", linear, {"variance": "fixedlarge"}, eta=0.5)  # a default that it lacks is no fault


def test_path_ends_with_the_sample(linear):
    args = exact(linear, 0.5), samplers.ddpm(linear), linear.times(20), jax.random.key(0)
    x_T = samplers.pure_noise(args[-1], (4, 4, 1))
    path, _ = samplers.run_sampler(*args, x_T, frames=7)
    assert path.shape == (7, 4, 4, 1)
    np.testing.assert_array_equal(path[-1], samplers.sample(*args, x_T.shape))
    assert len(np.unique(np.asarray(path)[:, 0, 0, 0])) == 7
    assert samplers.run_sampler(*args, x_T, frames=40)[0].shape == (20, 4, 4, 1)


@pytest.fixture(scope="module")
def generate(tiny, linear):
    way = diffusion.PARAMETERIZATIONS["eps"]

    def denoiser(params, label):
        return diffusion.make_denoiser(tiny[0], linear, way, params, label, diffusion.clip)

    def start(predict, key, index):
        return samplers.pure_noise(key, (8, 8, 1))

    make = samplers.make_generate(denoiser, samplers.ddpm(linear, "fixedlarge"), linear.times(20), start)
    return parallel.pmap_generate(make)


def pictures(generate, params, num, batch_size):
    root = jax.random.key(9)
    return np.concatenate(
        list(parallel.generate_batches(generate, params, root, np.arange(num), batch_size=batch_size))
    )


def test_image_i_is_the_same_in_any_batch(tiny, generate):
    wanted = pictures(generate, tiny[1], 100, 64).astype(int)
    assert len(np.unique(wanted.reshape(100, -1), axis=0)) == 100
    for num, batch_size in [(7, 1), (7, 7), (7, 64), (64, 64), (100, 7), (64, 7)]:
        found = pictures(generate, tiny[1], num, batch_size)
        assert len(found) == num
        assert np.abs(found.astype(int) - wanted[:num]).max() <= 1


@pytest.mark.slow
def test_ten_calls_compile_once(tiny, generate, compilations):
    pictures(generate, tiny[1], 16, 16)
    with compilations() as count:
        for _ in range(10):
            pictures(generate, tiny[1], 16, 16)
    assert count() == 0


def test_a_sample_that_is_not_finite_is_refused(tiny, generate):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny[1])
    with pytest.raises(Diverged, match="sample 0 is not finite"):
        pictures(generate, broken, 8, 8)


def test_the_readmes_own_sampler_works(linear):
    """Its example is DDIM at eta 0, added to the table from outside."""
    readme = (ROOT / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def straight" in block]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
        exec(code, {})
        sampler = samplers.make_sampler("straight", linear)
    args = linear.times(10), jax.random.key(0), (16,)
    found = samplers.sample(exact(linear, 0.5), sampler, *args)
    np.testing.assert_allclose(found, samplers.sample(exact(linear, 0.5), samplers.ddim(linear), *args), atol=1e-5)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_preview_ends_with_the_sample_itself(linear, name):
    """Whatever the frames before it show; and no sample is changed by it."""
    sampler, key = samplers.make_sampler(name, linear), jax.random.key(0)
    args, x_T = (linear.times(6), key), samplers.pure_noise(key, (4,))
    path, _ = samplers.run_sampler(
        exact(linear, 0.5), samplers.with_preview(sampler), *args, x_T, frames=6, view=lambda x, memory: memory[1]
    )
    np.testing.assert_allclose(path[-1], samplers.sample(exact(linear, 0.5), sampler, *args, (4,)), atol=1e-6)
    assert np.abs(path[0] - MEAN).max() < 0.2  # x_0_hat from pure noise is nearly the mean of the data


def test_ddim_goes_up_to_where_no_signal_is_left():
    """From t = 500 to T of a schedule with alphas_bar_T = 0: what arrives is eps_hat alone."""
    schedule = schedules.make_schedule("linear", zero_terminal_snr=True)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 16))
    x_t = diffusion.q_sample(x_0, eps, schedule.logsnr(500))
    x_s, _ = samplers.ddim(schedule).step(lambda x, t: jnp.asarray(x_0), jax.random.key(0), x_t, 500, 1000, ())
    np.testing.assert_allclose(x_s, eps, atol=1e-4)

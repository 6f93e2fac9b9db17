"""Agreement with diffusers' DDPM, DDIM and RePaint, step by step as side_by_side.py has it.

Differences of convention, each of which a test here states:

- Variance: "fixed_small", "fixed_large" and "learned_range" are our fixedsmall, fixedlarge and learned. Their DDPM adds
  noise in the step to clean data when that starts above t = 1 (spacing "trailing") and the variance is not
  "fixed_small"; ours never does.
- Clipping in DDIM: we always take eps_hat from the clipped x_0_hat, they only with use_clipped_model_output=True.
- DDIM's steps: theirs always go T // n down, ours to the next time; the same where n divides T. Their
  set_alpha_to_one=True ends at clean data, as ours always does.
- Spacings: "leading" is the same table where n divides T, elsewhere theirs begins lower; "trailing" and "linspace" are
  the same but for times halfway between two whole ones, which are rounded to either side. For some n (61, 103 ...)
  their "trailing" has n + 1 times.
- Dynamic thresholding: their sample_max_value caps the threshold, by default at 1, which is plain clipping.
- RePaint: the same times with spacing "leading". They draw one noise for the known part and the painted one, and go up
  in single steps, each with the beta of the time below; we draw two, and go up at once with the betas of those steps.
- DDIM upwards: their DDIMInverseScheduler goes from a time to the next with the output asked for at the higher of the
  two, ours with that of the lower.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from side_by_side import (
    COSINE,
    SHAPE,
    WAYS,
    ZERO,
    network,
    noise_of,
    noise_up_to,
    our_step,
    ours,
    theirs,
    together,
    torch,
    walk,
    worst,
)

from ddpm_jax import diffusion, editing, samplers, schedules

diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # theirs


BETAS = {
    "linear": ("linear", {}, schedules.linear_betas()),
    "cosine": ("squaredcos_cap_v2", {}, schedules.cosine_betas()),
    "quadratic": ("scaled_linear", {}, schedules.quadratic_betas()),
    "linear, no signal left": (
        "linear",
        {"rescale_betas_zero_snr": True},
        schedules.zero_terminal(schedules.linear_betas()),
    ),
}


@pytest.mark.parametrize("name", BETAS)
def test_betas_and_their_products(name):
    """To float32's rounding: of the numbers themselves, and of 1000 factors."""
    beta_schedule, options, betas = BETAS[name]
    scheduler = diffusers.DDPMScheduler(beta_schedule=beta_schedule, **options)
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-5, atol=3e-7)
    logsnr = np.asarray(schedules.from_betas(betas).logsnr(np.arange(1, 1001)), np.float64)
    np.testing.assert_allclose(scheduler.alphas_cumprod, 1 / (1 + np.exp(-logsnr)), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_noising_and_velocity(linear, schedule):
    scheduler, ours_of = diffusers.DDPMScheduler(beta_schedule=schedule), {"linear": linear}.get(schedule, COSINE)
    x_0, eps = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    for t in (1, 2, 10, 100, 500, 999, 1000):
        logsnr, their_t = ours_of.logsnr(t), torch.tensor([t - 1])
        x_t = diffusion.q_sample(x_0, eps, logsnr)
        np.testing.assert_allclose(x_t, ours(scheduler.add_noise(theirs(x_0), theirs(eps), their_t)), atol=1e-5)
        v = diffusion.PARAMETERIZATIONS["v"].target(x_0, eps, logsnr)
        np.testing.assert_allclose(v, ours(scheduler.get_velocity(theirs(x_0), theirs(eps), their_t)), atol=1e-5)


def is_half(number):
    return abs(number % 1 - 0.5) < 1e-6


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_differ_only_in_how_halves_are_rounded(linear, spacing):
    """For all numbers of steps but those for which their "trailing" has one time too many, by a rounding error.

    Their "linspace" of one step stands at the least noise, ours at the most. Their "leading" has a whole stride, so
    that it begins far below T where the number of steps does not divide T.
    """
    scheduler, too_many = diffusers.DDPMScheduler(timestep_spacing=spacing), 0
    for n in range(2, 1001):
        scheduler.set_timesteps(n)
        his, mine = scheduler.timesteps.numpy() + 1, linear.times(n, spacing)[:-1]
        if len(his) > n:
            too_many += 1
            continue
        if spacing == "leading" and 1000 % n:
            assert his[0] == 1 + (n - 1) * (1000 // n) <= mine[0]
            continue
        unrounded = {
            "leading": mine,
            "trailing": 1000 - np.arange(n) * 1000 / n,
            "linspace": 1000 - np.arange(n) * 999 / (n - 1),
        }
        for i in np.flatnonzero(his != mine):
            assert abs(his[i] - mine[i]) == 1
            assert is_half(unrounded[spacing][i])
    assert too_many == 0 or (spacing == "trailing" and too_many < 100)


VARIANCES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned_range"}


@pytest.mark.parametrize(
    ("steps", "spacing"), [(1000, "trailing"), (50, "trailing"), (300, "trailing"), (40, "leading")]
)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_steps(linear, variance, steps, spacing):
    """All but one convention: to clean data they add noise, unless from t = 1 or with the small variance, we never."""
    scheduler = diffusers.DDPMScheduler(variance_type=VARIANCES[variance], clip_sample=True, timestep_spacing=spacing)
    channels = 6 if variance == "learned" else 3
    # Near clean data their float32 table of alphas_bar has lost digits of 1 - alphas_bar; in float64 it has them.
    for bound in (1e-4, 1e-5):
        *found, last = together(
            scheduler, samplers.ddpm(linear, variance), linear, steps, spacing, limit="clip", channels=channels
        )
        assert worst(found) < bound
        scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - schedules.linear_betas()))
    np.testing.assert_allclose(last.mine, last.his_x_0_hat, atol=1e-5)
    if last.t == 1 or variance == "fixedsmall":
        assert last.difference < 1e-5
    elif variance == "fixedlarge":
        assert np.std(last.his - last.mine) == pytest.approx(np.sqrt(noise_up_to(last.t)), rel=0.3)
    else:
        assert last.difference > 1e-2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("schedule", "clipped"), [("linear", True), ("linear", False), ("squaredcos_cap_v2", True)])
def test_ancestral_steps_of_other_outputs(linear, way, schedule, clipped):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=schedule, prediction_type=WAYS[way], clip_sample=clipped, timestep_spacing="leading"
    )
    own = {"linear": linear}.get(schedule, COSINE)
    limit = "clip" if clipped else "none"
    found = together(scheduler, samplers.ddpm(own), own, 50, "leading", way=way, limit=limit)
    assert worst(found) < 2e-5


def test_dynamic_thresholding(linear):
    """Theirs without its cap, which at its default of 1 makes plain clipping of it."""
    for largest, limit in ((1e6, "dynamic"), (1.0, "clip")):
        scheduler = diffusers.DDPMScheduler(
            thresholding=True,
            dynamic_thresholding_ratio=0.995,
            sample_max_value=largest,
            timestep_spacing="leading",
        )
        assert worst(together(scheduler, samplers.ddpm(linear), linear, 50, "leading", limit=limit)) < 2e-5


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps(linear, eta, way, clipped):
    for schedule, own, steps, spacing in (
        ("linear", linear, 50, "trailing"),
        ("linear", linear, 40, "leading"),
        ("squaredcos_cap_v2", COSINE, 50, "trailing"),
    ):
        scheduler = diffusers.DDIMScheduler(
            beta_schedule=schedule,
            prediction_type=WAYS[way],
            clip_sample=clipped,
            set_alpha_to_one=True,
            timestep_spacing=spacing,
        )
        limit = "clip" if clipped else "none"
        options = {"eta": eta, "use_clipped_model_output": clipped}
        found = together(scheduler, samplers.ddim(own, eta), own, steps, spacing, way=way, limit=limit, **options)
        assert worst(found) < 2e-5


def test_ddim_takes_eps_from_the_clipped_prediction(linear):
    """Their default does not: it goes on with the network's own eps, and differs wherever clipping was active."""
    scheduler = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    for step in together(scheduler, samplers.ddim(linear), linear, 50, limit="clip"):
        unclipped = np.abs(step.his_x_0_hat) < 1
        np.testing.assert_allclose(step.mine[unclipped], step.his[unclipped], atol=2e-5)
        if step.s > 0 and not np.all(unclipped):
            assert step.difference > 1e-2


def test_ddim_steps_where_n_does_not_divide_T(linear):
    """Their steps lead T // n down, past or short of the time the network is asked at next; ours lead to that time."""
    scheduler = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    scheduler.set_timesteps(300)
    times = linear.times(300)
    options = {"limit": "clip", "use_clipped_model_output": True}
    for step in walk(scheduler, samplers.ddim(linear), linear, times, **options):
        if step.t - step.s == 3:
            assert step.difference < 2e-5
        elif step.t < 500:
            assert step.difference > 2e-4
    assert set(-np.diff(times)) == {3, 4}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_schedule_without_signal_at_T(eta):
    """With v, which says x_0 there; theirs as ours from alphas_bar_T = 0."""
    scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing"
    )
    options = {"way": "v", "limit": "clip", "eta": eta, "use_clipped_model_output": True}
    found = together(scheduler, samplers.ddim(ZERO, eta), ZERO, 50, **options)
    assert worst(found) < 5e-6


def test_ddim_upwards(linear):
    """Their step to a time from the one below, given the same output; ours takes it at the lower one of the two."""
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    step, x = our_step(samplers.ddim(linear), linear), np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    up = linear.times(50, "leading")[-2::-1]
    np.testing.assert_array_equal(scheduler.timesteps.numpy() + 1, up)
    for t, s in itertools.pairwise(up.tolist()):
        output = network(x, t)
        mine, _ = step(output, x, x, t, s, ())
        his = ours(scheduler.step(theirs(output), s - 1, theirs(x)).prev_sample)
        np.testing.assert_allclose(mine, his, atol=2e-5 * max(1, np.abs(his).max()))
        x = his


@pytest.mark.parametrize(("steps", "jump", "repeats"), [(50, 10, 3), (50, 7, 2), (100, 1, 4), (20, 20, 5)])
def test_the_times_of_repaint(linear, steps, jump, repeats):
    """Theirs with the single steps up taken as one, and clean data at the end."""
    scheduler = diffusers.RePaintScheduler()
    scheduler.set_timesteps(steps, jump_length=jump, jump_n_sample=repeats)
    times = scheduler.timesteps.numpy() + 1
    rising = np.diff(times) > 0
    within = np.insert(rising[1:] & rising[:-1], 0, False)  # neither the foot nor the top of a way up
    his = np.append(times[np.append(~within, True)], 0)
    np.testing.assert_array_equal(editing.resampling_times(linear.times(steps, "leading"), jump, repeats), his)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_of_repaint(linear, eta):
    """With one noise for both parts, as they draw it, and for a way up of one step, whose beta they index one lower."""
    scheduler = diffusers.RePaintScheduler(eta=eta, clip_sample=False)
    scheduler.set_timesteps(50, jump_length=10, jump_n_sample=1)
    random = np.random.default_rng(1)
    known, mask = random.normal(size=SHAPE).astype(np.float32), random.random(SHAPE) < 0.5
    sampler = editing.inpainted(samplers.ddim(linear, eta), linear, jnp.asarray(known), jnp.asarray(mask))
    given = {"original_image": lambda _: theirs(known), "mask": lambda _: theirs(mask)}
    assert worst(walk(scheduler, sampler, linear, linear.times(50, "leading"), **given)) < 2e-5
    scheduler.set_timesteps(1000)
    for t in (1, 100, 999):
        noise, generator = noise_of(t)
        mine, _ = our_step(sampler, linear)(known, noise, known, t, t + 1, ())
        np.testing.assert_allclose(mine, ours(scheduler.undo_step(theirs(known), t, generator)), atol=1e-5)

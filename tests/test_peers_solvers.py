"""Agreement with diffusers' DPM-Solver++, step by step as side_by_side.py has it, with these differences of convention.

- Their DPM-Solver has other tables under "leading" and "linspace", so only "trailing" is compared.
- Our dpmpp_2m is theirs of order 2 with solver_type="midpoint". Our dpmpp_3m integrates the parabola through three
  x_0_hat exactly, theirs of order 3 counts its curvature half; the second step, of second order, is that of
  solver_type="heun". With fewer than 15 steps they take the last step but one at second order.
- A schedule without signal at T: their DPM-Solver puts alphas_bar_T = 2^-24 there, ours is 0, which the first two steps
  feel by some 1e-4.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from side_by_side import COSINE, SHAPE, WAYS, ZERO, noise_up_to, our_step, ours, theirs, together, torch, worst

from ddpm_jax import samplers

diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # theirs


def solver(order, kind, schedule="linear", way="eps", **options):
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule=schedule,
        prediction_type=WAYS[way],
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type=kind,
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        **options,
    )


def half_logsnr(t):
    bar = 1 - noise_up_to(t)
    return np.log(bar / (1 - bar)) / 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [10, 20, 100])
def test_multistep_steps_of_second_order(linear, way, steps):
    for schedule, own in (("linear", linear), ("squaredcos_cap_v2", COSINE)):
        scheduler = solver(2, "midpoint", schedule, way)
        found = together(scheduler, samplers.dpmpp_2m(own), own, steps, way=way)
        assert worst(found) < 2e-5


@pytest.mark.parametrize("steps", [20, 100])
def test_multistep_steps_of_third_order_but_for_the_curvature(linear, steps):
    """Ours less theirs is half of what the curvature adds to a step, the integral of alpha_s x_0_hat exp(u - h) du.

    That is the parabola's second divided difference times the integral of u^2; in float64, by quadrature.
    """
    found = together(solver(3, "heun", way="x_0"), samplers.dpmpp_3m(linear), linear, steps, way="x_0")
    for step in (*found[:2], found[-1]):
        assert step.difference < 5e-6
    for before, last, here in zip(found, found[1:], found[2:-1], strict=False):
        times, x_0_hats = zip(*((step.t, step.output.astype(float)) for step in (here, last, before)), strict=True)
        (l_0, l_1, l_2), l_s = map(half_logsnr, times), half_logsnr(here.s)
        slopes = (x_0_hats[0] - x_0_hats[1]) / (l_0 - l_1), (x_0_hats[1] - x_0_hats[2]) / (l_1 - l_2)
        divided = (slopes[0] - slopes[1]) / (l_0 - l_2)
        h = l_s - l_0
        integral, _ = scipy.integrate.quad(lambda u, h=h: np.exp(u - h) * u**2, 0, h)
        share = np.sqrt(1 - noise_up_to(here.s)) * divided * integral
        np.testing.assert_allclose(here.mine - here.his, share / 2, atol=1e-5 + 1e-3 * np.abs(share).max())


def test_few_steps_end_at_lower_order(linear):
    """With fewer than 15 steps their last but one is of second order, that of our dpmpp_2m; ours of third."""
    *_, second, last = together(solver(3, "midpoint", way="x_0"), samplers.dpmpp_2m(linear), linear, 10, way="x_0")
    assert second.difference < 5e-6
    assert last.difference < 5e-6
    *_, second, _ = together(solver(3, "midpoint", way="x_0"), samplers.dpmpp_3m(linear), linear, 10, way="x_0")
    assert second.difference > 1e-2


def test_both_solvers_of_third_order_reach_the_solution(linear):
    """Of the flow of N(0, 1/4) from t = 1000 to 200, where ours with the whole curvature is the nearer one."""
    bar = {t: 1 - noise_up_to(t) for t in range(1, 1001)}
    x_T = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    sd_T, sd = (np.sqrt(bar[t] / 4 + 1 - bar[t]) for t in (1000, 200))
    wanted, errors = x_T * sd / sd_T, {"mine": [], "his": []}
    for n in (10, 20, 40, 80):
        times = np.linspace(1000, 200, n + 1).astype(int)
        scheduler, sampler = solver(3, "heun", way="x_0"), samplers.dpmpp_3m(linear)
        scheduler.set_timesteps(timesteps=(times - 1).tolist())
        step, mine, his = our_step(sampler, linear, "x_0"), x_T, x_T
        memory = sampler.init(jnp.asarray(x_T))
        for t, s in itertools.pairwise(times.tolist()):
            gain = np.float32(np.sqrt(bar[t]) / 4 / (bar[t] / 4 + 1 - bar[t]))
            mine, memory = step(gain * mine, x_T, mine, t, s, memory)
            his = ours(scheduler.step(theirs(gain * his), torch.tensor(t - 1), theirs(his)).prev_sample)
        errors["mine"].append(np.abs(mine - wanted).mean())
        errors["his"].append(np.abs(his - wanted).mean())
    assert all(mine < his / 2 for mine, his in zip(*errors.values(), strict=True))
    for found in errors.values():
        assert found[-1] < min(3e-5, found[0] / 100)


def test_multistep_without_signal_at_T():
    """Only the first two steps feel that their alphas_bar_T is 2^-24."""
    scheduler = solver(2, "midpoint", way="v", rescale_betas_zero_snr=True)
    found = together(scheduler, samplers.dpmpp_2m(ZERO), ZERO, 50, way="v")
    assert worst(found[:2]) < 5e-4
    assert worst(found[2:]) < 5e-6

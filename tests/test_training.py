"""The train step against closed forms: gradients, averages, and the draws of times."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from train_steps import ROOT, batch_of, one_parameter, pull, run

from ddpm_jax import training


def test_micro_batches_change_no_gradient():
    """Also not the draws, which belong to the images: this loss depends on where t lies."""

    def drawn(params, key, x_0, label, u):
        return 0.5 * (params["w"] - jnp.mean(x_0) - u) ** 2

    start = one_parameter(optax.sgd(1.0), 3.0)
    whole, _ = run(training.make_train_step(drawn, optax.sgd(1.0), 0.9), start, batch_of(8))
    parts, _ = run(training.make_train_step(drawn, optax.sgd(1.0), 0.9, accumulate=4), start, batch_of(8))
    assert parts.params["w"] == pytest.approx(float(whole.params["w"]), abs=1e-6)
    assert whole.params["w"] != 3


def test_micro_batches_bound_the_memory():
    """Of what the backward pass needs of 8 layers, those of one part in eight are there at a time."""

    def deep(w, x):
        for _ in range(8):
            x = jnp.tanh(x @ w)
        return jnp.mean(x)

    def used(parts):
        mean = jax.jit(lambda w, x: training._mean_over_microbatches(jax.value_and_grad(deep), parts, w, x))
        compiled = mean.lower(jnp.ones((16, 16)), jnp.ones((4096, 16))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert used(8) < used(1) / 4


def test_gradient_is_that_of_the_mean_over_images():
    """d/dw of the mean of (w - m_i)^2 / 2 is w - mean(m_i), where m_i is an image's mean in [-1, 1]."""
    batch = batch_of(8)
    state, metrics = run(training.make_train_step(pull, optax.sgd(1.0), 0.0), one_parameter(optax.sgd(1.0), 3.0), batch)
    means = batch["image"].reshape(8, -1).mean(1) / 127.5 - 1
    assert state.params["w"] == pytest.approx(means.mean(), abs=1e-5)
    assert metrics["loss"] == pytest.approx(0.5 * np.mean((3.0 - means) ** 2), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(3.0 - means.mean(), rel=1e-5)
    assert metrics["param_norm"] == pytest.approx(abs(means.mean()), abs=1e-5)


def test_first_quartile_holds_the_early_times():
    """A loss that is 1 for t in the first quarter and 0 elsewhere shows in loss_q1 alone."""

    def early(params, key, x_0, label, u):
        return params["w"] * 0 + (u < 0.25)

    _, metrics = run(training.make_train_step(early, optax.sgd(0.0), 0.0), one_parameter(optax.sgd(0.0)), batch_of(400))
    assert metrics["loss_q1"] == pytest.approx(4 * metrics["loss"])
    assert metrics["loss"] == pytest.approx(0.25, abs=0.08)
    assert metrics["loss_q2"] == metrics["loss_q3"] == metrics["loss_q4"] == 0


def test_warm_up_grows_from_zero_to_the_learning_rate():
    rate = training.warm_up(2e-4, 5000)
    assert [float(rate(n)) for n in (0, 2500, 5000, 90_000)] == pytest.approx([0, 1e-4, 2e-4, 2e-4])
    assert training.warm_up(2e-4, 0)(0) == 2e-4


def test_adams_first_update_has_the_size_of_the_learning_rate():
    """m / sqrt(v) is 1 after one gradient, whatever its size; with a warm-up the first update is none."""
    optimizer = training.make_optimizer(0.01, 1.0)
    state, _ = run(training.make_train_step(pull, optimizer, 0.0), one_parameter(optimizer, 3.0), batch_of(8))
    assert state.params["w"] == pytest.approx(2.99, abs=1e-6)
    optimizer = training.make_optimizer(training.warm_up(0.01, 10), 1.0)
    state, _ = run(training.make_train_step(pull, optimizer, 0.0), one_parameter(optimizer, 3.0), batch_of(8))
    assert state.params["w"] == 3.0


def test_gradient_is_clipped_to_the_global_norm():
    """Adam's first moment is 0.1 times the gradient it was given; the metric is the norm before the clipping."""
    optimizer = training.make_optimizer(1e-3, 0.5)
    state, metrics = run(training.make_train_step(pull, optimizer, 0.0), one_parameter(optimizer, 30.0), batch_of(8))
    assert optax.tree.get(state.opt_state, "mu")["w"] == pytest.approx(0.1 * 0.5)
    assert metrics["grad_norm"] > 29


def test_share_of_the_initialisation_left_in_the_average():
    """While it warms up the share is the product of (1 + i) / (10 + i), that is 9! n! / (n + 9)!."""
    for n in (0, 1, 5, 40):
        wanted = math.factorial(9) * math.factorial(n) / math.factorial(n + 9)
        assert training.ema_init_share(0.9999, n) == pytest.approx(wanted)
    assert training.ema_init_share(0.5, 100) == pytest.approx(
        math.prod((1 + i) / (10 + i) for i in range(8)) * 0.5**92, rel=1e-9
    )


def test_average_follows_the_parameters():
    """Parameters that jump to 1 at the first step and stay: what is missing from 1 in the average is that share."""
    optimizer = optax.stateless(lambda updates, params: {"w": 1.0 - params["w"]})
    step = training.make_train_step(pull, optimizer, 0.9)
    mapped = jax.jit(jax.vmap(step, (None, 0, None), axis_name="batch", out_axes=None))
    state, batch = one_parameter(optimizer), jax.tree.map(lambda x: x[None], batch_of(2))
    for n in range(1, 30):
        state, _ = mapped(state, batch, ROOT)
        assert 1 - state.ema_params["w"] == pytest.approx(training.ema_init_share(0.9, n), abs=1e-6)


def test_fault_59_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    """Bad steps among good ones: the end is that of a run without them."""

    def sometimes(params, key, x_0, label, u):
        return pull(params, key, x_0) * jnp.where(x_0[0, 0, 0] > 0.99, jnp.nan, 1.0)

    optimizer = training.make_optimizer(training.warm_up(0.1, 3), 1.0)
    step = training.make_train_step(sometimes, optimizer, 0.9)
    good, bad = batch_of(4), batch_of(4)
    good["image"][:, 0, 0], bad["image"][:, 0, 0] = 0, 255
    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0, None), out_axes=None, devices=jax.devices()[:1])
    ends, rows = [], []
    for plan in ("gbbgbgg", "gggg"):
        state = one_parameter(optimizer, 3.0)
        for kind in plan:
            batch = jax.tree.map(lambda x: x[None], good if kind == "g" else bad)
            state, metrics = mapped(state, batch, ROOT)
            rows.append((int(metrics["skipped"]), int(metrics["skipped_in_row"])))
        ends.append(state)
    assert rows[:7] == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0), (3, 0)]
    assert (int(ends[0].step), int(ends[1].step)) == (7, 4)
    for a, b in zip(*(jax.tree.leaves((e.params, e.ema_params, e.opt_state)) for e in ends), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_of_the_images_are_mirrored_and_none_without_flip():
    """The loss is the first column's mean: 1 for an image that is bright on the left, -1 once mirrored."""

    def left(params, key, x_0, label, u):
        return params["w"] * 0 + jnp.mean(x_0[:, 0])

    batch = batch_of(400)
    batch["image"][:, :, :4], batch["image"][:, :, 4:] = 255, 0
    state = one_parameter(optax.sgd(0.0))
    _, plain = run(training.make_train_step(left, optax.sgd(0.0), 0.0), state, batch)
    _, flipped = run(training.make_train_step(left, optax.sgd(0.0), 0.0, flip=True), state, batch)
    assert plain["loss"] == 1
    assert abs(flipped["loss"]) < 0.2


def test_each_step_and_image_has_draws_of_its_own():
    """The same image twice in a batch, and again in the next step, meets four different times."""

    def where(params, key, x_0, label, u):
        return params["w"] * 0 + u

    step = training.make_train_step(where, optax.sgd(0.0), 0.0)
    mapped = jax.vmap(step, (None, 0, None), axis_name="batch", out_axes=None)
    seen = []
    for number in (0, 1):
        for index in (3, 4):
            state = one_parameter(optax.sgd(0.0))._replace(step=jnp.int32(number))
            batch = {"index": np.array([[index]], np.int32), "image": np.zeros((1, 1, 2, 2, 1), np.uint8)}
            seen.append(float(mapped(state, batch, ROOT)[1]["loss"]))
    assert len(set(seen)) == 4


def drawn_us(sampling, n, memory=None, seed=0):
    """u and weight of one batch of n images on one device, as the train step draws them."""
    key = jax.random.key(seed)
    images = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
    return sampling.draw(sampling.init() if memory is None else memory, key, images, jnp.arange(n), n)


def test_stratified_times_lie_one_in_each_part():
    u, weight = drawn_us(training.TIME_SAMPLINGS["stratified"], 64)
    assert sorted(np.floor(np.asarray(u) * 64).astype(int)) == list(range(64))
    assert np.all(weight == 1)
    firsts = [float(drawn_us(training.TIME_SAMPLINGS["stratified"], 1, seed=seed)[0][0]) for seed in range(300)]
    assert scipy.stats.kstest(firsts, "uniform").pvalue > 1e-3


def test_loss_aware_times_follow_the_loss_and_leave_its_mean():
    """For E[loss^2] = (1 + 9 u)^2 the density is (1 + 9 u) / 5.5, and the weighted mean of any f is its integral."""
    sampling, bins = training.loss_aware(bins=50, floor=0.0), (np.arange(50) + 0.5) / 50
    u, weight = drawn_us(sampling, 40_000, ((1 + 9 * bins) ** 2, np.full(50, 99.0)))
    assert scipy.stats.kstest(u, lambda x: (x + 4.5 * x**2) / 5.5).pvalue > 1e-3
    for function, integral in [(np.ones_like, 1.0), (np.square, 1 / 3), (np.cos, np.sin(1.0))]:
        assert np.mean(np.asarray(weight, float) * function(np.asarray(u))) == pytest.approx(integral, rel=0.02)
    u, weight = drawn_us(sampling, 2_000, ((1 + 9 * bins) ** 2, np.full(50, 9.0)))  # one visit short of its patience
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    np.testing.assert_allclose(weight, 1, rtol=1e-5)


def test_loss_aware_times_stay_below_1():
    """Also for a draw at the very end of the last bin, where rounding could leave [0, 1) and with it 1..T."""
    sampling, last = training.loss_aware(floor=0.0), np.nextafter(np.float32(1), np.float32(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_u", lambda key: last)
        for seed in range(20):
            square = np.random.default_rng(seed).uniform(0.1, 10, 64)
            u, _ = drawn_us(sampling, 2, (jnp.asarray(square), jnp.full(64, 99.0)))
            assert np.all(u < 1)


def test_loss_aware_memory_learns_the_square_of_the_loss():
    def known(params, key, x_0, label, u):
        return params["w"] * 0 + 1 + 3 * (u > 0.5)

    sampling = training.loss_aware(bins=4)
    state = training.init_state({"w": jnp.float32(0)}, optax.sgd(0.0), sampling)
    step = training.make_train_step(known, optax.sgd(0.0), 0.9, time_sampling=sampling)
    state, metrics = run(step, state, batch_of(64), 2, 20)
    square, count = state.times
    np.testing.assert_allclose(square, [1, 1, 16, 16], rtol=1e-3)
    assert count.sum() == 20 * 64
    assert metrics["loss"] == pytest.approx(2.5, rel=0.35)  # by importance weights, though half the loss is drawn more


def test_power_averages_are_means_of_all_parameters():
    """gamma = 0, of length 12^(-1/2), is the plain mean of the parameters after each update."""

    def steady(params, key, x_0, label, u):
        return -params["w"]

    lengths, optimizer = (12**-0.5, 0.1), optax.sgd(1.0)
    state = training.init_state({"w": jnp.float32(0)}, optimizer, lengths=lengths)
    step = training.make_train_step(steady, optimizer, 0.9, lengths=lengths)
    state, _ = run(step, state, batch_of(2), 1, 9)  # w = 1, 2, ... 9
    assert state.averages[0]["w"] == pytest.approx(5.0, rel=1e-5)
    assert 5 < state.averages[1]["w"] < 9

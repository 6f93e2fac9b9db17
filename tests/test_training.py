"""The train step against closed forms, and against itself on other numbers of devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from conftest import assert_one_line, make_run

from ddpm_jax import checkpoint, experiment, parallel, training
from ddpm_jax import config as configs
from ddpm_jax.commands import evaluate, sample
from ddpm_jax.reports import dry_run

ROOT = jax.random.key(0)


def batch_of(n, shape=(8, 8, 1), seed=0):
    random = np.random.default_rng(seed)
    return {"index": np.arange(n, dtype=np.int32), "image": random.integers(0, 256, (n, *shape), np.uint8)}


def run(step, state, batch, devices=1, times=1):
    """`times` steps over the first `devices` devices; (state, metrics) with every replica of every array compared."""
    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0, None), out_axes=None, devices=jax.devices()[:devices])
    shards = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    for _ in range(times):
        state, metrics = mapped(state, shards, ROOT)
    return state, metrics


def replicas_agree(state):
    return all(
        np.array_equal(np.asarray(shard.data), np.asarray(leaf.addressable_shards[0].data))
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
    )


def pull(params, key, x_0, label=None, u=None):
    """A loss with a known gradient: half the squared distance of the one parameter from the image's mean."""
    return 0.5 * (params["w"] - jnp.mean(x_0)) ** 2


def one_parameter(optimizer, w=0.0):
    return training.init_state({"w": jnp.float32(w)}, optimizer)


def test_fault_62_sgd_gradient_and_all_replicas_are_the_same_on_1_2_and_8_devices(tiny, tiny_loss):
    optimizer = optax.sgd(1.0)
    step = training.make_train_step(tiny_loss, optimizer, 0.9)
    batch, start = batch_of(16), training.init_state(tiny[1], optimizer)
    results = {n: run(step, start, batch, n) for n in (1, 2, 8)}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), results[1][0].params, tiny[1])
    scale = max(jax.tree.leaves(moved))
    assert scale > 0.1
    for n in (2, 8):
        assert replicas_agree(results[n][0])
        quartiles = [results[n][1][f"loss_q{q}"] for q in range(1, 5)]
        assert np.mean(quartiles) == pytest.approx(float(results[n][1]["loss"]), rel=1e-5)
        assert results[n][1]["loss"] == pytest.approx(float(results[1][1]["loss"]), rel=1e-6)
        for a, b in zip(*(jax.tree.leaves(results[k][0].params) for k in (1, n)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * max(1, scale))


def test_fault_61_the_replica_check_sees_a_forgotten_pmean(monkeypatch):
    monkeypatch.setattr(training.lax, "pmean", lambda tree, axis: tree)
    step = training.make_train_step(pull, optax.sgd(1.0), 0.9)
    state, _ = run(step, one_parameter(optax.sgd(1.0)), batch_of(4), 2)
    assert not replicas_agree(state)


def test_micro_batches_change_no_gradient():
    """Also not the draws, which belong to the images: this loss depends on where t lies."""

    def drawn(params, key, x_0, label, u):
        return 0.5 * (params["w"] - jnp.mean(x_0) - u) ** 2

    start = one_parameter(optax.sgd(1.0), 3.0)
    whole, _ = run(training.make_train_step(drawn, optax.sgd(1.0), 0.9), start, batch_of(8))
    parts, _ = run(training.make_train_step(drawn, optax.sgd(1.0), 0.9, accumulate=4), start, batch_of(8))
    assert parts.params["w"] == pytest.approx(float(whole.params["w"]), abs=1e-6)
    assert whole.params["w"] != 3


def test_micro_batches_in_a_loop_give_the_mean():
    """The form that accelerators use, with its loop not unrolled."""
    data = jnp.arange(12.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        found = jax.jit(lambda x: training._mean_over_parts(lambda p, x: {"m": p * x.mean()}, 3, 2.0, x))(data)
    assert found["m"] == pytest.approx(11.0)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_several_steps_in_a_call_are_the_steps_one_by_one(monkeypatch, backend):
    """Each with its own batch and draws; written out, as on a CPU, and in a loop, as on accelerators."""

    def drawn(params, key, x_0, label, u):
        return 0.5 * (params["w"] - jnp.mean(x_0) - u) ** 2

    optimizer = optax.adam(0.1)
    step, start = training.make_train_step(drawn, optimizer, 0.9), one_parameter(optimizer, 3.0)
    batches, state, losses = [batch_of(8, seed=seed) for seed in range(3)], start, []
    for batch in batches:
        state, metrics = run(step, state, batch, 2)
        losses.append(float(metrics["loss"]))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    stacked = jax.tree.map(lambda *x: np.stack([part.reshape(2, 4, *part.shape[1:]) for part in x], 1), *batches)
    mapped = parallel.pmap_step(training.several_steps(step), jax.devices()[:2])
    found, metrics = mapped(start, stacked, ROOT)
    assert int(found.step) == 3
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    assert float(found.params["w"]) == pytest.approx(float(state.params["w"]), rel=1e-6)
    assert float(found.ema_params["w"]) == pytest.approx(float(state.ema_params["w"]), rel=1e-6)


def test_one_exchange_a_step_of_the_gradient_and_the_metrics(tiny, tiny_loss):
    """In the compiled program for 8 devices: a single all-reduce, of no more than the parameters and a few numbers."""
    optimizer = training.make_optimizer(1e-3, 1.0)
    step, start = training.make_train_step(tiny_loss, optimizer, 0.9), training.init_state(tiny[1], optimizer)
    lowered = parallel.pmap_step(step).lower(parallel.replicate(start), parallel.shard(batch_of(16)), ROOT)
    found = dry_run.collectives(lowered.compile().as_text())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny[1]))
    assert list(found) == ["all-reduce"]
    number, exchanged = found["all-reduce"]
    assert number == 1
    assert 0.95 * size < exchanged <= size + 32


def test_the_table_of_parameters_counts_each_part():
    """The paper's CIFAR-10 network (appendix B), by the sizes of its layers; the whole is the published count."""
    parts = experiment.make(configs.load("cifar10"), (32, 32, 3))
    said, counts = [], dry_run.counts(experiment.params_shape(parts))
    block = 2 * (2 * 256) + 2 * (9 * 256 * 256 + 256) + 512 * 256 + 256  # norms, convolutions, time
    attention = 2 * 256 + 4 * (256 * 256 + 256)
    assert sum(counts.values()) == 35_746_307
    assert counts["conv_in"] == 9 * 3 * 128 + 128
    assert counts["time"] == 128 * 512 + 512 + 512 * 512 + 512
    assert counts["down_3"] == 2 * block
    assert counts["middle"] == 2 * block + attention
    dry_run.describe(parts, said.append)
    assert "      middle     2,888,704    8.1%" in said
    assert sum(float(line.split()[-1].rstrip("%")) for line in said[1:]) == pytest.approx(100, abs=0.05 * len(said))


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
    state = one_parameter(optimizer)
    for n in range(1, 30):
        state, _ = jax.vmap(step, (None, 0, None), axis_name="batch", out_axes=None)(
            state, jax.tree.map(lambda x: x[None], batch_of(2)), ROOT
        )
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


def test_fault_63_the_step_compiles_once_and_uses_up_its_state(tiny, tiny_loss, compilations, tmp_path):
    """Once also after a resume, whose arrays come from a file."""
    optimizer = training.make_optimizer(1e-3, 1.0)
    step = parallel.pmap_step(training.make_train_step(tiny_loss, optimizer, 0.9))
    start, batch = jax.jit(lambda: training.init_state(tiny[1], optimizer)), batch_of(16)
    state = parallel.replicate(start())
    with compilations() as count:
        for _ in range(3):
            before = state
            state, _ = step(state, parallel.shard(batch), ROOT)
        assert count() == 1
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state)
        checkpoint.finish(manager)
    restored, _ = checkpoint.restore_state(tmp_path, jax.eval_shape(start))
    assert all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(restored))
    with compilations() as count:
        state = parallel.replicate(restored)
        for _ in range(3):
            state, _ = step(state, parallel.shard(batch), ROOT)
        assert (count(), int(state.step)) == (0, 6)


def test_fault_64_training_out_of_memory(script, tmp_path):
    """Batches whose activations take terabytes: one line that says what takes less, and nothing is written."""
    options = ["--config.data.image_size=64", "--config.data.channels=1", "--config.model.channels=32"]
    options += ["--config.model.multipliers=1", "--config.model.num_res_blocks=1", "--config.train.batch_size=16384"]
    options += ["--config.model.attention_resolutions=64", "--cpu-devices=1", f"--workdir={tmp_path}/run"]
    limit, quick = "ulimit -v 100000000;", {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = script("train.py", "--dry-run", *options, shell=limit, **quick)
    assert done.returncode == 1
    assert_one_line(done)
    assert "a device has too little memory (RESOURCE_EXHAUSTED" in done.stderr
    assert "try a train.batch_size smaller than 16384, train.accumulate=2 or more, or model.remat=true" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [sample, evaluate])
def test_fault_64_sampling_and_evaluating_out_of_memory(call, tmp_path, monkeypatch, script):
    """256 TiB, more than an address can name."""
    make_run(tmp_path)
    monkeypatch.setattr(parallel, "replicate", lambda tree: jnp.zeros(2**46))
    code, _, err = call(script, f"--workdir={tmp_path}", "--num=8", "--batch-size=8", f"--out={tmp_path / 'out'}")
    assert code == 1
    assert err.startswith("error: a device has too little memory (RESOURCE_EXHAUSTED")
    assert err.endswith("; try a --batch-size smaller than 8\n")
    assert err.count("\n") == 1


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


@pytest.mark.parametrize("name", training.TIME_SAMPLINGS)
def test_times_are_the_same_on_1_2_and_8_devices(name):
    """The gradient of w u is u, so that one step of SGD tells the mean of all u."""

    def told(params, key, x_0, label, u):
        return params["w"] * u

    sampling, ends = training.TIME_SAMPLINGS[name], []
    for devices in (1, 2, 8):
        state = training.init_state({"w": jnp.float32(0)}, optax.sgd(1.0), sampling)
        step = training.make_train_step(told, optax.sgd(1.0), 0.9, time_sampling=sampling)
        ends.append(float(run(step, state, batch_of(16), devices, 3)[0].params["w"]))
    np.testing.assert_allclose(ends, ends[0], rtol=1e-5)
    assert 0.5 < -ends[0] < 2.5


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

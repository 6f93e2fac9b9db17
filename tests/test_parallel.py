"""The train step over devices: the same numbers on any number of them, one exchange, one compilation, and no memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, assert_one_line, make_run, random_params
from train_steps import ROOT, batch_of, one_parameter, pull, run

from ddpm_jax import config as configs
from ddpm_jax import diffusion, experiment, parallel, training
from ddpm_jax.commands import dry_run, evaluate, sample
from ddpm_jax.networks import unet
from ddpm_jax.run import checkpoint


@pytest.fixture(scope="module")
def one_level(linear):
    """(parameters, loss) of a U-Net without a second resolution and attention, whose step compiles in seconds."""
    init, net = unet.make_unet((8, 8, 1), **TINY | {"multipliers": (1,), "attention_resolutions": ()})
    loss = diffusion.make_loss(net, linear, diffusion.PARAMETERIZATIONS["eps"], diffusion.WEIGHTINGS["simple"])
    return random_params(init), loss


def replicas_agree(state):
    return all(
        np.array_equal(np.asarray(shard.data), np.asarray(leaf.addressable_shards[0].data))
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
    )


def test_fault_62_sgd_gradient_and_all_replicas_are_the_same_on_1_2_and_8_devices(one_level):
    optimizer = optax.sgd(1.0)
    step = training.make_train_step(one_level[1], optimizer, 0.9)
    batch, start = batch_of(16), training.init_state(one_level[0], optimizer)
    results = {n: run(step, start, batch, n) for n in (1, 2, 8)}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), results[1][0].params, one_level[0])
    scale = max(jax.tree.leaves(moved))
    assert scale > 0.1
    for n in (2, 8):
        assert replicas_agree(results[n][0])
        quartiles = [results[n][1][f"loss_q{q}"] for q in range(1, 5)]
        assert np.mean(quartiles) == pytest.approx(float(results[n][1]["loss"]), rel=1e-5)
        assert results[n][1]["loss"] == pytest.approx(float(results[1][1]["loss"]), rel=1e-6)
        for a, b in zip(*(jax.tree.leaves(results[k][0].params) for k in (1, n)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * max(1, scale))


@pytest.mark.slow
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


def test_fault_61_the_replica_check_sees_a_forgotten_pmean(monkeypatch):
    monkeypatch.setattr(training.lax, "pmean", lambda tree, axis: tree)
    step = training.make_train_step(pull, optax.sgd(1.0), 0.9)
    state, _ = run(step, one_parameter(optax.sgd(1.0)), batch_of(4), 2)
    assert not replicas_agree(state)


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
    mapped = parallel.pmap_step(training.scan_steps(step), jax.devices()[:2])
    found, metrics = mapped(start, stacked, ROOT)
    assert int(found.step) == 3
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    assert float(found.params["w"]) == pytest.approx(float(state.params["w"]), rel=1e-6)
    assert float(found.ema_params["w"]) == pytest.approx(float(state.ema_params["w"]), rel=1e-6)


@pytest.mark.slow
def test_one_exchange_a_step_of_the_gradient_and_the_metrics(one_level):
    """In the compiled program for 8 devices: a single all-reduce, of no more than the parameters and a few numbers."""
    optimizer = training.make_optimizer(1e-3, 1.0)
    step, start = training.make_train_step(one_level[1], optimizer, 0.9), training.init_state(one_level[0], optimizer)
    lowered = parallel.pmap_step(step).lower(parallel.replicate(start), parallel.shard(batch_of(16)), ROOT)
    found = dry_run.collectives(lowered.compile().as_text())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one_level[0]))
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


def test_fault_63_the_step_compiles_once_and_uses_up_its_state(one_level, compilations, tmp_path):
    """Once also after a resume, whose arrays come from a file."""
    optimizer = training.make_optimizer(1e-3, 1.0)
    step = parallel.pmap_step(training.make_train_step(one_level[1], optimizer, 0.9))
    start, batch = jax.jit(lambda: training.init_state(one_level[0], optimizer)), batch_of(16)
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


@pytest.mark.slow
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

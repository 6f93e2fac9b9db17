"""Optimisers and the decay of the learning rate: closed forms in float64, the split of the U-Net, and resuming."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL, TINY, assert_same_end, logged_metrics
from train_steps import ROOT, batch_of, one_parameter

from ddpm_jax import config as configs
from ddpm_jax import data, experiment, program, training, vectors
from ddpm_jax.errors import ConfigError
from ddpm_jax.networks import unet
from ddpm_jax.run import trees

RANDOM = np.random.default_rng(0)
PARAMS = {
    "conv_in": {"kernel": RANDOM.normal(size=(3, 3, 2, 4)), "bias": RANDOM.normal(size=4)},
    "block": {"kernel": RANDOM.normal(size=(3, 3, 4, 6)), "bias": RANDOM.normal(size=6)},
    "label": {"embedding": RANDOM.normal(size=(5, 7))},
    "q": {"kernel": RANDOM.normal(size=(20, 8))},
    "blocks": {"kernel": RANDOM.normal(size=(3, 4, 9)), "bias": RANDOM.normal(size=(3, 9))},  # of a scan
}
PARAMS = jax.tree.map(np.float32, PARAMS)
GRADIENTS = [jax.tree.map(lambda x: np.float32(RANDOM.normal(size=x.shape)), PARAMS) for _ in range(3)]
EVERY = {"adam": {}, "adamw": {"weight_decay": 0.1}, "muon": {"weight_decay": 0.1}}


def updates(optimizer, params=PARAMS, gradients=GRADIENTS):
    """The update for each gradient, applied one after another."""
    state, found = optimizer.init(params), []
    for gradient in gradients:
        update, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, update)
        found.append(update)
    return found


@pytest.mark.parametrize("name", EVERY)
def test_an_update_is_the_same_for_a_vector_and_a_tree(name):
    optimizer = training.make_optimizer(0.1, 2.0, name, **EVERY[name])
    packed = updates(optimizer, vectors.pack(PARAMS), list(map(vectors.pack, GRADIENTS)))
    for one, other in zip(updates(optimizer), packed, strict=True):
        assert vectors.is_vector(other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other.tree())


def test_adams_updates():
    """Kingma & Ba 2015, Algorithm 1, in float64, with betas of its own."""
    b1, b2, rate, m, v = 0.8, 0.95, 0.1, 0.0, 0.0
    found = updates(training.make_optimizer(rate, np.inf, b1=b1, b2=b2))
    for t, (gradient, update) in enumerate(zip(GRADIENTS, found, strict=True), 1):
        g = np.float64(gradient["q"]["kernel"])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        wanted = -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        np.testing.assert_allclose(update["q"]["kernel"], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_kernels_without_gradient_shrink_and_nothing_else_does(name):
    """By (1 - rate * weight_decay) a step; Muon leaves also the first and last layers alone."""
    optimizer, n, params = training.make_optimizer(0.5, 1.0, name, weight_decay=0.2), 4, PARAMS
    for update in updates(optimizer, gradients=[jax.tree.map(np.zeros_like, PARAMS)] * n):
        params = optax.apply_updates(params, update)
    shares = jax.tree.map(lambda new, old: np.mean(new / old), params, PARAMS)
    shrunk, first = pytest.approx((1 - 0.5 * 0.2) ** n, rel=1e-5), pytest.approx(1)
    assert shares == {
        "conv_in": {"kernel": shrunk if name == "adamw" else first, "bias": first},
        "block": {"kernel": shrunk, "bias": first},
        "label": {"embedding": first},
        "q": {"kernel": shrunk},
        "blocks": {"kernel": shrunk, "bias": first},
    }


def test_muons_update_of_a_kernel_is_orthogonal():
    """U V^T of the momentum U S V^T, by a singular value decomposition in float64; its values are near 1, not exactly.

    The quintic iteration of Jordan et al. 2024 takes them to 0.68 to 1.13. The root mean square is 0.2 of the rate.
    """
    rate, momentum = 0.3, 0.0
    found = updates(training.make_optimizer(rate, np.inf, "muon"))
    shapes = {"block": (1, 36, 6), "q": (1, 20, 8), "blocks": (3, 4, 9)}
    for t, (gradient, update) in enumerate(zip(GRADIENTS, found, strict=True), 1):
        g = np.concatenate([np.float64(gradient[name]["kernel"]).ravel() for name in shapes])
        momentum = 0.95 * momentum + 0.05 * g
        nesterov = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
        for (name, shape), part in zip(shapes.items(), np.split(nesterov, ends[:-1]), strict=True):
            for m, o in zip(part.reshape(shape), np.asarray(update[name]["kernel"]).reshape(shape), strict=True):
                u, _, v = np.linalg.svd(m, full_matrices=False)
                inner = -u.T @ (o / (0.2 * rate * np.sqrt(max(m.shape)))) @ v.T
                assert np.all((np.diag(inner) > 0.65) & (np.diag(inner) < 1.16))
                np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
                assert 0.65 < np.sqrt(np.mean(o**2)) / (0.2 * rate) < 1.16


def test_the_split_of_the_unet():
    """Kernels of hidden layers, listed by hand; the first and last layers, norms, biases and embeddings are Adam's."""
    init, _ = unet.make_unet((8, 8, 1), **TINY | {"num_classes": 3})
    blocks = ["down_0_block_0", "down_1_block_0", "middle_block_0", "middle_block_1"]
    blocks += [f"up_{level}_block_{i}" for level in (0, 1) for i in (0, 1)]
    layers = [f"{block}/{layer}" for block in blocks for layer in ("conv_1", "conv_2", "time")]
    layers += [f"{block}/shortcut" for block in blocks if block.startswith("up") or block == "down_1_block_0"]
    attentions = ["down_1_attention_0", "middle_attention", "up_1_attention_0", "up_1_attention_1"]
    layers += [f"{attention}/{layer}" for attention in attentions for layer in ("q", "k", "v", "out")]
    layers += ["down_0_halve", "up_1_double", "time_2"]
    params = jax.eval_shape(init, jax.random.key(0))
    found = trees.flat(trees.nested(training.muon_dimension_numbers(params)))
    assert {name.rpartition("/kernel")[0] for name in found} == set(layers)
    others = {name.rpartition("/")[0] for name, leaf in trees.flat(params).items() if leaf.ndim > 1} - set(layers)
    assert others == {"conv_in", "time_1", "label", "conv_out"}


def test_what_muon_leaves_is_adams_with_nesterovs_momentum():
    """Dozat 2016 in float64."""
    rate, m, v = 0.1, 0.0, 0.0
    for t, (gradient, update) in enumerate(
        zip(GRADIENTS, updates(training.make_optimizer(rate, np.inf, "muon")), strict=True), 1
    ):
        g = np.float64(gradient["label"]["embedding"])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        mean = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        wanted = -rate * mean / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(update["label"]["embedding"], wanted, rtol=1e-4, atol=1e-6)


# --- the decay of the learning rate

RATES = {  # of 1000 steps after 100 of warm-up, by hand
    "constant": {0: 0, 50: 0.5, 100: 1, 999: 1, 1000: 1, 5000: 1},
    "linear": {0: 0, 50: 0.5, 100: 1, 550: 0.5, 910: 0.1, 1000: 0, 1001: 0},
    "cosine": {0: 0, 50: 0.5, 100: 1, 400: 0.75, 550: 0.5, 700: 0.25, 1000: 0, 1001: 0},
    "wsd": {0: 0, 50: 0.5, 100: 1, 800: 1, 850: 0.5, 882: 1 - 0.41**0.5, 1000: 0, 1001: 0},
}


def made(network=None, **train):
    train = {"learning_rate": 2.0, "warmup_steps": 100, "steps": 1000} | train
    return experiment.make(
        configs.Config(model=configs.Model(**TINY), train=configs.Train(**train)), (8, 8, 1), network
    )


@pytest.mark.parametrize("decay", RATES)
def test_the_learning_rate_at_each_step(decay):
    rate = made(decay=decay).learning_rate
    assert [float(rate(n)) / 2 for n in RATES[decay]] == pytest.approx(list(RATES[decay].values()), abs=2e-6)


@pytest.mark.parametrize("steps", [50, 100])
def test_a_constant_rate_may_warm_up_all_the_time(steps):
    assert float(made(steps=steps).learning_rate(50)) == 1


def test_wsd_decays_over_the_fraction_but_never_during_the_warm_up():
    rate = made(decay="wsd", decay_fraction=0.5).learning_rate
    assert [float(rate(n)) for n in (100, 500, 625, 1000)] == pytest.approx([2, 2, 1, 0])
    rate = made(decay="wsd", decay_fraction=1.0).learning_rate
    assert [float(rate(n)) for n in (50, 100, 325, 1000)] == pytest.approx([1, 2, 1, 0])


@pytest.mark.parametrize("told", [True, False], ids=["as an argument", "as a constant"])
def test_a_step_is_taken_at_the_decayed_rate(told):
    """By SGD on a gradient of 1: the parameter falls by the rate, update after update."""

    def slope(params, key, x_0, label, u):
        return params["w"]

    optimizer, span = optax.sgd(1.0), (2, 6)
    step = training.make_train_step(
        slope, optimizer, 0.9, decay=training.DECAYS["linear"], span=(0, 1) if told else span
    )
    mapped = jax.vmap(step, (None, 0, None, None, None) if told else (None, 0, None), axis_name="batch", out_axes=None)
    state, batch, seen = one_parameter(optimizer), jax.tree.map(lambda x: x[None], batch_of(2)), [0.0]
    for _ in range(8):
        state, _ = mapped(state, batch, ROOT, *([1.0, jnp.float32(span)] if told else []))
        seen.append(float(state.params["w"]))
    np.testing.assert_allclose(-np.diff(seen), [1, 1, 1, 0.75, 0.5, 0.25, 0, 0], atol=1e-6)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_another_number_of_steps_needs_no_other_program(compilations, ensemble):
    """A program made for a million steps, told of 20, takes the steps of one made for 20."""
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8)
    network = lambda key: {"w": jax.random.normal(key)}, lambda params, x_t, t, key, label: params["w"] * x_t
    ends = []
    for steps in (20, 10**6):
        parts = made(steps=steps, warmup_steps=0, batch_size=16, decay="linear", ensemble=ensemble, network=network)
        built = program.make(parts, data.Dataset(images, None))
        state, losses = built.place(built.init_state()), []
        for step in range(3):
            with compilations() as count:
                state, metrics = built.step(state, built.batches(range(step, step + 1)), steps=20)
                losses.append(metrics["loss"])
            assert not step or count() == 0
        assert [float(experiment.with_steps(parts, 20).learning_rate(n)) for n in (0, 10)] == [2.0, 1.0]
        ends.append(losses)
    np.testing.assert_array_equal(*ends)


MISTAKES = [
    ({"optimizer": "sgd"}, r"train\.optimizer=sgd is not one of adam, adamw, muon"),
    ({"decay": "step"}, r"train\.decay=step is not one of constant, cosine, linear, wsd"),
    ({"optimizer": "adamw"}, r"adamw needs train\.weight_decay above 0"),
    ({"weight_decay": 0.1}, r"train\.weight_decay=0\.1 needs train\.optimizer=adamw or muon"),
    ({"decay": "wsd", "steps": 100}, r"wsd needs train\.warmup_steps=100 below train\.steps=100"),
]


@pytest.mark.parametrize(("train", "message"), MISTAKES)
def test_what_does_not_go_together_is_refused(train, message):
    with pytest.raises(ConfigError, match=message):
        made(**train)


RUNS = {
    "adamw": ["--config.train.optimizer=adamw", "--config.train.weight_decay=0.1", "--config.train.decay=cosine"],
    "muon": ["--config.train.optimizer=muon", "--config.train.decay=wsd", "--config.train.decay_fraction=0.7"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_continued_from_the_middle_of_the_decay_has_the_same_end(script, tmp_path, name):
    """Bit by bit; and an ensemble of two rates is the run of each of them."""
    command = ["train.py", *SMALL, *RUNS[name], "--config.train.steps=20", "--cpu-devices=1"]
    run, copy = tmp_path / "run", tmp_path / "copy"
    for options in ([f"--workdir={run}"], [f"--workdir={copy}", "--step=10"]):
        done = script(*command, *options, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        assert done.returncode == 0, done.stderr
        if not copy.exists():
            shutil.copytree(run, copy)
    assert (copy / "checkpoints" / "20.aside").is_dir()
    assert_same_end(run, copy)
    assert logged_metrics(run)[-1]["learning_rate"] < 1e-4
    done = script(*command, f"--workdir={run}", "--config.train.steps=40")
    assert done.returncode == 2
    assert "train.steps is 20 there, 40 here, and the learning rate decays" in done.stderr
    rates = ["--config.train.ensemble=2", "--config.train.learning_rates=2e-3,1e-3", f"--workdir={tmp_path / 'both'}"]
    done = script(*command, *rates, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    own, other = (experiment.restore(path, "raw")[1] for path in (run, tmp_path / "both"))
    for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)

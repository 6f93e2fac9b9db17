"""Labels, guidance and self-conditioning against Gaussian data and networks whose answers are known by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import BAR

from ddpm_jax import conditioning, diffusion, samplers

NULL = 2
MEANS, SPREAD = np.array([-0.4, 0.7, 0.1]), 0.5  # of the classes 0 and 1, and of what the label NULL stands for


def expected(mean, x_t, t, spread=SPREAD):
    """E[x_0 | x_t] for data N(mean, spread^2), by the rule for jointly normal variables."""
    cov, var = jnp.sqrt(BAR[t]) * spread**2, BAR[t] * spread**2 + 1 - BAR[t]
    return mean + cov / var * (x_t - jnp.sqrt(BAR[t]) * mean)


# The three outputs by which a network can say x_0, from x_t = sqrt(bar) x_0 + sqrt(1 - bar) eps.
OUTPUTS = {
    "eps": lambda x_0, x_t, bar: (x_t - jnp.sqrt(bar) * x_0) / jnp.sqrt(1 - bar),
    "x_0": lambda x_0, x_t, bar: x_0,
    "v": lambda x_0, x_t, bar: (jnp.sqrt(bar) * x_t - x_0) / jnp.sqrt(1 - bar),
}


def exact_net(kind):
    """The network that has learned the Gaussian of each label."""
    bars = jnp.asarray(BAR, jnp.float32)

    def net(params, x_t, t, key=None, label=None):
        mean, bar = jnp.asarray(MEANS, jnp.float32)[label], bars[t]
        gain = jnp.sqrt(bar) * SPREAD**2 / (bar * SPREAD**2 + 1 - bar)
        return OUTPUTS[kind](mean + gain * (x_t - jnp.sqrt(bar) * mean), x_t, bar)

    return net


def seen(params, x_t, t, key=None, label=None):
    """A network that tells which label reached it."""
    return jnp.asarray(label)


def keys_of(num, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_images_without_a_label(share):
    net, num = conditioning.label_dropout(seen, share, NULL), 20_000
    labels = jnp.arange(num) % 2
    found = jax.vmap(lambda key, label: net(None, jnp.zeros(()), 5, key, label))(keys_of(num), labels)
    dropped = np.asarray(found == NULL)
    assert np.all(dropped | (found == labels))
    for part in (dropped[::2], dropped[1::2]):  # five standard deviations, for each class by itself
        assert abs(part.mean() - share) < 5 * np.sqrt(share * (1 - share) / len(part))


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 1), (1.0, NULL)])
def test_none_and_all_labels_dropped(share, wanted):
    net = conditioning.label_dropout(seen, share, NULL)
    assert np.all(jax.vmap(lambda key: net(None, jnp.zeros(()), 5, key, 1))(keys_of(1000)) == wanted)


def test_evaluation_sees_every_label():
    net = conditioning.label_dropout(seen, 1.0, NULL)
    assert net(None, jnp.zeros(()), 5, None, 1) == 1
    assert net(None, jnp.zeros(()), 5, label=0) == 0


def test_which_images_lose_their_label_depends_on_their_keys_alone():
    net, keys = conditioning.label_dropout(seen, 0.5, NULL), keys_of(64)

    def dropped(keys, x_t, t, label):
        return np.asarray(jax.vmap(lambda key: net(None, x_t, t, key, label))(keys) == NULL)

    whole = dropped(keys, jnp.zeros(()), 5, 0)
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(dropped(keys[order], jnp.ones(()), 700, 1), whole[order])
    np.testing.assert_array_equal([dropped(keys[i : i + 1], jnp.zeros(()), 5, 0)[0] for i in range(8)], whole[:8])
    assert np.any(dropped(keys_of(64, seed=1), jnp.zeros(()), 5, 0) != whole)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_guidance_of_gaussians_is_another_gaussian(linear, kind):
    """Scores combine: with one spread the guided denoiser is that of mean m_null + scale (m - m_null), in any output.

    Scale 1 is then the class itself and scale 0 what NULL stands for.
    """
    x_t = jax.random.normal(jax.random.key(0), (200,))
    for scale, t in itertools.product((0.0, 1.0, 3.5), (1, 30, 300, 1000)):
        net = conditioning.guided(exact_net(kind), scale, NULL)
        predict = diffusion.make_denoiser(net, linear, diffusion.PARAMETERIZATIONS[kind], None, jnp.array(1))
        wanted = expected(MEANS[NULL] + scale * (MEANS[1] - MEANS[NULL]), x_t, t)
        # eps and v lose x_0 where there is little signal: float32's rounding is divided by sqrt(alphas_bar).
        np.testing.assert_allclose(predict(x_t, t), wanted, atol=2e-6 + 3e-6 / np.sqrt(BAR[t]) * (kind != "x_0"))


def test_guided_score_is_the_affine_combination_of_scores(linear):
    """Ho & Salimans 2022, eq. 6, in scores: with NULL standing for the mixture of the classes, nothing is Gaussian."""
    scale, t, weight = 2.5, 300, np.array([0.3, 0.7])
    x_t = np.linspace(-3, 3, 101)

    def score(log_density, step=1e-4):
        return (log_density(x_t + step) - log_density(x_t - step)) / (2 * step)

    def log_density(mean):
        variance = BAR[t] * SPREAD**2 + 1 - BAR[t]
        return lambda x: -((x - np.sqrt(BAR[t]) * mean) ** 2) / (2 * variance)

    def mixture(x):
        return np.log(sum(w * np.exp(log_density(mean)(x)) for w, mean in zip(weight, MEANS[:2], strict=True)))

    def tweedie(score):
        return (x_t + (1 - BAR[t]) * score) / np.sqrt(BAR[t])

    of_all, of_one = score(mixture), score(log_density(MEANS[1]))

    def net(params, x, t, key=None, label=None):
        return jnp.where(label == NULL, *(jnp.asarray(tweedie(s), jnp.float32) for s in (of_all, of_one)))

    guided = conditioning.guided(net, scale, NULL)
    predict = diffusion.make_denoiser(guided, linear, diffusion.PARAMETERIZATIONS["x_0"], None, 1)
    np.testing.assert_allclose(predict(x_t, t), tweedie(of_all + scale * (of_one - of_all)), atol=1e-5)


def test_guided_samples_have_the_guided_mean(linear):
    """Through a whole sampler: the mean and spread of N(m_null + scale (m - m_null), SPREAD^2)."""
    scale = 2.0
    net = conditioning.guided(exact_net("eps"), scale, NULL)
    predict = diffusion.make_denoiser(net, linear, diffusion.PARAMETERIZATIONS["eps"], None, jnp.array(0))
    args = samplers.dpmpp_2m(linear), linear.times(100), jax.random.key(0), (200, 200, 1)
    x_0 = samplers.sample(predict, *args)
    # The sample scatters by SPREAD / 200; what 100 steps of second order leave is less than that.
    assert x_0.mean() == pytest.approx(MEANS[NULL] + scale * (MEANS[0] - MEANS[NULL]), abs=5 * SPREAD / 200)
    assert x_0.std() == pytest.approx(SPREAD, rel=0.03)


def test_guidance_leaves_a_learned_variance_alone():
    """2 - 3 (label) for the prediction, guided to 2 - 3 (2 x 5 - 4); the second half is the label's own."""

    def net(params, x, t, key=None, label=None):
        return jnp.stack([2 - 3.0 * label, 7.0 * label])

    found = conditioning.guided(net, 2.0, 4, channels=1)(None, jnp.zeros(1), 10, label=5)
    np.testing.assert_allclose(found, [2 - 3 * 6, 35])


def test_outside_the_interval_guidance_does_nothing():
    plain, x_t = exact_net("eps"), jax.random.normal(jax.random.key(0), (50,))
    inside = conditioning.guided(plain, 4.0, NULL)
    limited = conditioning.guided(plain, 4.0, NULL, 200, 600)
    for t in (1, 199, 601, 1000):
        np.testing.assert_allclose(limited(None, x_t, t, label=1), plain(None, x_t, t, label=1), atol=1e-6)
    for t in (200, 400, 600):  # both ends belong to it
        np.testing.assert_array_equal(limited(None, x_t, t, label=1), inside(None, x_t, t, label=1))
        assert np.abs(limited(None, x_t, t, label=1) - plain(None, x_t, t, label=1)).max() > 0.1


def affine(params, pair, t, key=None, label=None):
    """w x_t + u estimate, the simplest network of a pair; an image is (H, W, 1)."""
    x_t, estimate = jnp.split(pair, 2, -1)
    w, u = params
    return w * x_t + u * estimate


def image(value):
    return jnp.full((1, 1, 1), value, jnp.float32)


def test_evaluation_always_shows_the_own_estimate(linear):
    """With x_0 as the output the estimate is w x_t, so that the answer is w x_t + u w x_t; clipped, it is u times 1."""
    net = conditioning.self_conditioning(affine, linear, diffusion.PARAMETERIZATIONS["x_0"])
    assert net((0.5, 0.25), image(0.8), 7).item() == pytest.approx(0.5 * 0.8 + 0.25 * 0.5 * 0.8)
    assert net((2.0, 0.25), image(3.0), 7).item() == pytest.approx(2.0 * 3.0 + 0.25 * 1.0)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_the_estimate_shown_is_an_image_whatever_the_output(linear, kind):
    """Of the network that puts out the truth about x_0 = 0.3 as eps or v; beside x_t it is to see 0.3."""
    x_0, t = 0.3, 400

    def truth(params, pair, t, key=None, label=None):
        x_t, estimate = jnp.split(pair, 2, -1)
        return OUTPUTS[kind](x_0, x_t, BAR[t]) + 10 * estimate

    net = conditioning.self_conditioning(truth, linear, diffusion.PARAMETERIZATIONS[kind])
    shown = (net(None, image(0.6), t) - OUTPUTS[kind](x_0, 0.6, BAR[t])) / 10
    assert shown.item() == pytest.approx(x_0, abs=1e-5)


def test_the_gradient_takes_the_estimate_as_given(linear):
    """d/dw of w x + u (w x), the bracket held constant, is x; to let it flow would add u x. And d/du is w x.

    So in training, where half of the images have no bracket; the derivative of an evaluation is the whole one.
    """
    net = conditioning.self_conditioning(affine, linear, diffusion.PARAMETERIZATIONS["x_0"])
    slopes = jax.grad(lambda params, key: net(params, image(0.8), 7, key)[0, 0, 0])
    of_w, of_u = jax.vmap(slopes, (None, 0))((0.5, 0.25), keys_of(50))
    np.testing.assert_allclose(of_w, 0.8, rtol=1e-6)
    np.testing.assert_allclose(np.unique(np.asarray(of_u)), [0, 0.4], rtol=1e-6)
    assert slopes((0.5, 0.25), None)[0] == pytest.approx(0.8 + 0.25 * 0.8)


def test_half_of_the_training_images_see_an_estimate(linear):
    net, num = conditioning.self_conditioning(affine, linear, diffusion.PARAMETERIZATIONS["x_0"]), 4000
    found = jax.vmap(lambda key: net((0.5, 1.0), image(0.8), 7, key))(keys_of(num)).ravel()
    shown = np.isclose(found, 0.8)
    assert np.all(shown | np.isclose(found, 0.4))
    assert abs(shown.mean() - 0.5) < 5 * 0.5 / np.sqrt(num)


def test_labels_and_estimates_are_dropped_independently(linear):
    """All four combinations come up equally often when both shares are a half."""

    def net(params, pair, t, key=None, label=None):
        x_t, estimate = jnp.split(pair, 2, -1)
        return x_t + estimate + 10.0 * (label == NULL)

    both = conditioning.self_conditioning(net, linear, diffusion.PARAMETERIZATIONS["x_0"])
    both, num = conditioning.label_dropout(both, 0.5, NULL), 4000
    found = np.asarray(jax.vmap(lambda key: both(None, image(0.25), 7, key, 0))(keys_of(num))).ravel()
    # Without estimate 0.25, with it 0.5; with NULL the estimate is 10.25 clipped to 1, and 10 more is put out.
    counts = [np.isclose(found, value).sum() for value in (0.25, 0.5, 10.25, 11.25)]
    assert sum(counts) == num
    np.testing.assert_allclose(counts, num / 4, atol=5 * np.sqrt(num * 3 / 16))


WITH_MEMORY = ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "heun", "edm"]


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_self_conditioned_sampler_shows_its_last_prediction(linear, name):
    """Of a network that answers 1 + estimate / 2 the predictions are 1, 3/2, 7/4 ...: 2 - 2^-i after i + 1 steps.

    Heun's and EDM's other questions of a step see the same estimate, so their answers make no difference.
    """
    sampler = samplers.self_conditioned(samplers.make_sampler(name, linear))
    times = linear.times(6)

    def predict(x_t, t, estimate):
        return jnp.ones_like(x_t) + estimate / 2

    x = samplers.pure_noise(jax.random.key(0), (2, 2, 1))
    path, (_, last) = samplers.run_sampler(predict, sampler, times, jax.random.key(0), x, 6, lambda x, m: m[1])
    wanted = 2 - 0.5 ** np.arange(6)
    np.testing.assert_allclose(path[:, 0, 0, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(last, wanted[-1], rtol=1e-6)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_what_a_self_conditioned_network_is_shown(linear, name):
    """Every question of a step is asked with the answer to the first question of the step before, zeros at first."""
    asked, at = [], []

    def predict(x_t, t, estimate):
        answer = jnp.tanh(x_t + t / 1000)
        at[-1].append(answer)
        asked.append((len(at) - 1, estimate))
        return answer

    sampler, times = samplers.self_conditioned(samplers.make_sampler(name, linear)), linear.times(4)
    x = samplers.pure_noise(jax.random.key(0), (2, 2, 1))
    memory = sampler.init(x)
    with jax.disable_jit():  # so that the branches of a step see numbers, and only the one taken is run
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            at.append([])
            x, memory = sampler.step(predict, jax.random.key(i), x, t, s, memory)
    for i, estimate in asked:
        np.testing.assert_array_equal(estimate, np.zeros_like(estimate) if i == 0 else at[i - 1][0])
    if name != "edm":  # where it raises the noise depends on the levels
        assert [len(answers) for answers in at] == ([2, 2, 2, 1] if name == "heun" else [1, 1, 1, 1])


@pytest.mark.parametrize("name", [*WITH_MEMORY, "learned"])
def test_keeping_the_prediction_changes_no_sample(linear, name):
    """Beyond rounding; and what is kept is the prediction at the last time, which the step to clean data returns."""
    sampler = samplers.ddpm(linear, "learned") if name == "learned" else samplers.make_sampler(name, linear)
    times, x = linear.times(6), samplers.pure_noise(jax.random.key(0), (8, 8, 1))

    def predict(x_t, t):
        x_0_hat = jnp.tanh(x_t + t / 1000)
        return (x_0_hat, jnp.full_like(x_t, 0.5)) if name == "learned" else x_0_hat

    def run(sampler):
        return samplers.run_sampler(predict, sampler, times, jax.random.key(1), x)

    (wanted, _), (found, (_, last)) = run(sampler), run(samplers.with_preview(sampler))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    if name != "edm":  # it asks at a raised time, and what is kept is the answer at the time itself
        np.testing.assert_allclose(last, wanted[-1], atol=1e-6)


def test_a_preview_asks_the_network_no_more_often(linear):
    """Ancestral and multistep steps ask once, and with_preview passes that answer on."""
    for name in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "heun"):
        counts = []
        for wrap in (lambda sampler: sampler, samplers.with_preview):
            sampler, calls = wrap(samplers.make_sampler(name, linear)), []

            def predict(x_t, t, calls=calls):
                calls.append(t)
                return jnp.tanh(x_t)

            x = jnp.ones((2, 2, 1))
            with jax.disable_jit():
                sampler.step(predict, jax.random.key(0), x, 500, 400, sampler.init(x))
            counts.append(len(calls))
        assert counts == ([2, 2] if name == "heun" else [1, 1])

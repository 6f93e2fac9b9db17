"""EDM's preconditioning against table 1 of Karras et al. 2022 in float64, and the mean of x_{t-1} against eq. 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from gaussian import BAR, exact

from ddpm_jax import conditioning, config, diffusion, experiment, schedules
from ddpm_jax.evaluation import likelihood

LINEAR = schedules.make_schedule("linear")


def table_1(n, data):
    """c_skip, c_out, c_in of the noise level n for data of that standard deviation."""
    return data**2 / (n**2 + data**2), n * data / (n**2 + data**2) ** 0.5, 1 / (n**2 + data**2) ** 0.5


@pytest.mark.parametrize("data", [0.5, 0.2, 1.0, 2.0])
def test_the_denoiser_is_eq_7(data):
    """D(y) = c_skip y + c_out F(c_in y) of an arbitrary network F, for y = x_0 + n eps; and the target of F, eq. 8."""
    way = diffusion.make_parameterization("edm", LINEAR, data)
    net = conditioning.scaled_input(lambda params, x, t, key, label: jnp.tanh(3 * x), LINEAR, way, 1)
    predict = diffusion.make_denoiser(net, LINEAR, way, None)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 5, 5, 1))
    for t in (1, 30, 400, 1000):
        n = np.sqrt(1 / BAR[t] - 1)
        y = x_0 + n * eps
        skip, out, scale = table_1(n, data)
        wanted = skip * y + out * np.tanh(3 * scale * y)
        np.testing.assert_allclose(predict(jnp.float32(np.sqrt(BAR[t]) * y), t), wanted, atol=2e-5)
        target = way.target(jnp.float32(x_0), jnp.float32(eps), LINEAR.logsnr(t))
        np.testing.assert_allclose(target, (x_0 - skip * y) / out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("t", [1, 100, 500, 1000])
def test_inputs_and_targets_have_unit_variance(t):
    """Karras et al. 2022, appendix B.6, for data of the assumed deviation."""
    way = diffusion.edm(0.3)
    x_0, eps = np.random.default_rng(t).normal(size=(2, 100_000)).astype(np.float32) * np.float32([[0.3], [1]])
    x_t = diffusion.q_sample(x_0, eps, LINEAR.logsnr(t))
    assert np.var(way.input_scale(LINEAR.logsnr(t)) * x_t) == pytest.approx(1, rel=0.03)
    assert np.var(way.target(x_0, eps, LINEAR.logsnr(t))) == pytest.approx(1, rel=0.03)


def test_unit_data_make_it_minus_v():
    edm, v = diffusion.edm(1.0), diffusion.PARAMETERIZATIONS["v"]
    x_0, eps = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    for t in (1, 500, 1000):
        logsnr = LINEAR.logsnr(t)
        np.testing.assert_allclose(edm.target(x_0, eps, logsnr), -v.target(x_0, eps, logsnr), atol=1e-6)
        np.testing.assert_allclose(edm.x_0(-eps, x_0, logsnr), v.x_0(eps, x_0, logsnr), atol=1e-6)
        assert edm.input_scale(logsnr) == pytest.approx(1)


def test_clean_data_and_pure_noise():
    """Without noise x_0_hat is x_t whatever the network says; without signal it is sigma_data F."""
    way, x, output = diffusion.edm(0.3), jnp.linspace(-2, 2, 5), jnp.linspace(5, 6, 5)
    np.testing.assert_allclose(way.x_0(output, x, jnp.inf), x, rtol=1e-6)
    np.testing.assert_allclose(way.x_0(output, x, -jnp.inf), 0.3 * output, rtol=1e-6)
    np.testing.assert_allclose(way.target(x, output, -jnp.inf), x / 0.3, rtol=1e-6)
    np.testing.assert_allclose([way.input_scale(jnp.inf), way.input_scale(-jnp.inf)], [1 / 0.3, 1], rtol=1e-6)


MEANS = jnp.array([0.1, -0.4, 0.3])  # of the labels 0 and 1, and without a label


def denoiser(x_t, t, estimate, label):
    """The best one for Gaussian data, pulled towards the estimate of self-conditioning."""
    return exact(LINEAR, 0.4, MEANS[2 if label is None else label])(x_t, t) + 0.2 * estimate


def plain_network(params, x, t, key=None, label=None):
    x_t, estimate = x[..., :1], x[..., 1:].sum(-1, keepdims=True)
    return denoiser(x_t, t, estimate, label)


def edm_network(params, x, t, key=None, label=None):
    """F of the same denoiser, from c_in y."""
    n = jnp.exp(-LINEAR.logsnr(t) / 2)
    skip, out, scale = table_1(n, 0.6)
    y = x[..., :1] / scale
    x_0_hat = denoiser(y / jnp.sqrt(1 + n**2), t, x[..., 1:].sum(-1, keepdims=True), label)
    return (x_0_hat - skip * y) / out


def with_variance(net):
    return lambda params, x, *args, **kwargs: jnp.concatenate(
        [net(params, x, *args, **kwargs), x[..., :1] * 0 + 0.2], -1
    )


EVERYTHING = {"self_conditioning": True, "variance": "learned", "label_dropout": 0.5}


@pytest.mark.parametrize("choices", [{}, EVERYTHING], ids=["plain", "everything"])
def test_an_experiment_is_the_same_in_edm_and_in_x_0(choices):
    """Loss, a guided sample and the likelihood of one denoiser, seen as EDM's F and as x_0_hat."""
    classes, found = 2 if choices else 0, []
    label, guidance = (1, {"guidance": 2.0, "interval": (100, 900)}) if choices else (None, {})
    row = {"index": 0, "image": np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)}
    for name, net in (("x_0", plain_network), ("edm", edm_network)):
        made = config.Config(
            model=config.Model(**TINY | {"num_classes": classes}),
            diffusion=config.Diffusion(parameterization=name, sigma_data=0.6, error="x_0", **choices),
        )
        parts = experiment.make(made, (8, 8, 1), (lambda key: {}, with_variance(net) if choices else net))
        generate = experiment.make_generate(parts, "dpmpp_2m", 6, limit="none", **guidance)
        measure = likelihood.make_measure(parts, likelihood.make_plan(parts, ("nll",), 4))

        @jax.jit
        def run(parts=parts, generate=generate, measure=measure):
            loss = parts.loss({}, jax.random.key(2), diffusion.to_unit(row["image"]), label, 0.3)
            labels = {"label": label} if choices else {}
            return loss, generate({}, jax.random.key(0), 0, label)[0], measure({}, jax.random.key(1), row | labels)

        found.append(run())
    (loss, picture, values), (other_loss, other_picture, other_values) = found
    assert loss == pytest.approx(float(other_loss), rel=1e-3)
    assert np.abs(np.int32(picture) - np.int32(other_picture)).max() <= 1
    for name, value in values.items():
        np.testing.assert_allclose(value, other_values[name], rtol=2e-3, err_msg=name)


def test_the_mean_is_that_of_eq_7():
    """Eq. 7 with the betas, in float64; at t = 1 it is x_0."""
    way = diffusion.make_parameterization("mean", LINEAR)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 9))
    for t in (1, 2, 500, 1000):
        beta = 1 - BAR[t] / BAR[t - 1]
        x_t = np.sqrt(BAR[t]) * x_0 + np.sqrt(1 - BAR[t]) * eps
        mean = np.sqrt(BAR[t - 1]) * beta / (1 - BAR[t]) * x_0
        mean = mean + np.sqrt(1 - beta) * (1 - BAR[t - 1]) / (1 - BAR[t]) * x_t
        logsnr = LINEAR.logsnr(t)
        np.testing.assert_allclose(way.target(jnp.float32(x_0), jnp.float32(eps), logsnr), mean, atol=1e-4)
        found = way.x_0(jnp.float32(mean), jnp.float32(x_t), logsnr)
        np.testing.assert_allclose(found, x_0, atol=2e-2 if t == 1000 else 1e-3)
        # An error of 1 in the mean is one of 1 / coefficient in x_0, and -alpha / sigma times that in eps.
        wanted = -np.sqrt(BAR[t] / (1 - BAR[t])) / (np.sqrt(BAR[t - 1]) * beta / (1 - BAR[t]))
        assert way.eps_error(1.0, logsnr) == pytest.approx(wanted, rel=1e-3)


def test_the_mean_without_signal_at_T():
    """At T it is sqrt(alphas_bar_{T-1}) times the image, which is still taught; mean 0 is x_0 = 0."""
    schedule = schedules.make_schedule("linear", zero_terminal_snr=True)
    way, T = diffusion.make_parameterization("mean", schedule), schedule.T
    alpha = np.sqrt(1 / (1 + np.exp(-np.float64(schedule.logsnr(T - 1)))))
    x_0, x_t = jnp.float32([0.5, -1.0]), jnp.float32([3.0, 4.0])
    np.testing.assert_allclose(way.target(x_0, x_t, schedule.logsnr(T)), alpha * x_0, rtol=1e-3)
    np.testing.assert_allclose(way.x_0(alpha * x_0, x_t, schedule.logsnr(T)), x_0, rtol=1e-3)

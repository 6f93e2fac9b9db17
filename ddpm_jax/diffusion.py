"""The diffusion process and its loss, for one image and scalar times; batches come from `vmap`.

Every formula takes log-SNRs (see schedules/). With alpha and sigma derived from them:

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),  alpha_t = sqrt(alphas_bar_t),  sigma_t = sqrt(1 - alphas_bar_t)

The paper's alpha_t is something else, 1 - beta_t, and is not used in this code. Equation numbers are those of Ho, Jain
& Abbeel 2020.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.keys import named


def to_unit(image) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1] (Ho et al. 2020, section 3.3)."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1


def to_uint8(x) -> jax.Array:
    """[-1, 1] to uint8, rounded to the nearest level. Values outside the range are clipped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def alpha_sigma(logsnr) -> tuple[jax.Array, jax.Array]:
    """Signal and noise level: alpha = sqrt(alphas_bar), sigma = sqrt(1 - alphas_bar). Clean data (+inf) give 1, 0."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


@jax.jit
def q_sample(x_0, eps, logsnr) -> jax.Array:
    """A sample x_t of q(x_t | x_0) made with standard normal noise eps (eq. 4). x_0, eps: the same shape."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x_0 + sigma * eps


def q_posterior(x_0, x_t, logsnr_t, logsnr_s) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of q(x_s | x_t, x_0) for any s < t; s = t-1 gives eqs. 6 and 7.

    `share` = 1 - SNR_t / SNR_s is the fraction of x_t's noise added after s: beta_t / (1 - alphas_bar_t) for s = t-1.
    At s = 0 it is 1: the mean is x_0 and the variance 0, with no special case.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    share = -jnp.expm1(logsnr_t - logsnr_s)
    mean = alpha_s * share * x_0 + alpha_t * sigma_s**2 / (alpha_s * sigma_t**2) * x_t
    return mean, share * sigma_s**2


def reverse_variance(logsnr_t, logsnr_s, nu) -> jax.Array:
    """Variance of p(x_s | x_t): share sigma_s^(2 - 2 nu) sigma_t^(2 nu), 0 for the step to clean data.

    nu = 0 gives the lower bound, the variance of q_posterior (beta-tilde_t when s = t-1), and nu = 1 the upper bound
    (beta_t). Values between interpolate their logarithms linearly (Nichol & Dhariwal 2021, eq. 15).
    """
    small, large = (jax.nn.sigmoid(-logsnr) for logsnr in (logsnr_s, logsnr_t))
    variance = -jnp.expm1(logsnr_t - logsnr_s) * small ** (1 - nu) * large**nu
    return jnp.where(logsnr_s < jnp.inf, variance, 0.0)


# Variance of a reverse step: (prediction, whether s is clean data) -> x_0_hat, nu. The paper uses fixedlarge for
# CIFAR-10 and fixedsmall for CelebA-HQ and LSUN (section 3.2). The last step's variance matters only to the decoder of
# the likelihood; the paper's code uses the small one there for both.
VARIANCES = {
    "fixedsmall": lambda x_0_hat, last: (x_0_hat, 0.0),
    "fixedlarge": lambda x_0_hat, last: (x_0_hat, jnp.where(last, 0.0, 1.0)),
    "learned": lambda prediction, last: prediction,  # of make_denoiser_with_variance
}


class Parameterization(NamedTuple):
    """What the network's output means. `target` is linear in (x_0, eps) and `x_0` in (output, x_t)."""

    target: Callable  # (x_0, eps, logsnr) -> what the output should be
    x_0: Callable  # (output, x_t, logsnr) -> x_0_hat
    eps_error: Callable  # (output - target, logsnr) -> eps_hat - eps, which L_simple squares; ERRORS replace it
    input_scale: Callable | None = None  # logsnr -> factor of x_t in the network's input: conditioning.scaled_input


def _alpha(logsnr):
    return alpha_sigma(logsnr)[0]


def _sigma(logsnr):
    return alpha_sigma(logsnr)[1]


def edm(sigma_data=0.5) -> Parameterization:
    """EDM's preconditioning (Karras et al. 2022, table 1 and eq. 7) for data of standard deviation `sigma_data`.

    x_0_hat = c_skip y + c_out F(c_in y), where F is the network, y = x_t / alpha and the noise level sigma / alpha.
    With the standard deviation of x_t, d = sqrt(sigma^2 + sigma_data^2 alpha^2), this is

        x_0_hat = sigma_data^2 alpha / d^2 x_t + sigma_data sigma / d F(x_t / d)

    which is finite without signal and without noise. Input and target have a variance of 1 at all times; sigma_data = 1
    is -v. The error in the output has EDM's weight, 1 / c_out^2. The time given to the network remains t instead of
    c_noise = ln(sigma / alpha) / 4: it is a function of the noise level too, spread over the 1..1000 that the embedding
    resolves.
    """

    def deviation(logsnr):
        alpha, sigma = alpha_sigma(logsnr)
        return jnp.sqrt(sigma**2 + (sigma_data * alpha) ** 2)

    def target(x_0, eps, logsnr):
        alpha, sigma = alpha_sigma(logsnr)
        return (sigma * x_0 - sigma_data**2 * alpha * eps) / (sigma_data * deviation(logsnr))

    def x_0(output, x_t, logsnr):
        (alpha, sigma), d = alpha_sigma(logsnr), deviation(logsnr)
        return sigma_data**2 * alpha / d**2 * x_t + sigma_data * sigma / d * output

    def eps_error(error, logsnr):
        return -sigma_data * _alpha(logsnr) / deviation(logsnr) * error

    return Parameterization(target, x_0, eps_error, lambda logsnr: 1 / deviation(logsnr))


PARAMETERIZATIONS = {
    "eps": Parameterization(  # eq. 14, and eq. 15 solved for x_0
        target=lambda x_0, eps, logsnr: eps,
        x_0=lambda output, x_t, logsnr: (x_t - _sigma(logsnr) * output) / _alpha(logsnr),
        eps_error=lambda error, logsnr: error,
    ),
    "x_0": Parameterization(
        target=lambda x_0, eps, logsnr: x_0,
        x_0=lambda output, x_t, logsnr: output,
        eps_error=lambda error, logsnr: -jnp.exp(logsnr / 2) * error,
    ),
    "v": Parameterization(  # Salimans & Ho 2022, appendix D
        target=lambda x_0, eps, logsnr: _alpha(logsnr) * eps - _sigma(logsnr) * x_0,
        x_0=lambda output, x_t, logsnr: _alpha(logsnr) * x_t - _sigma(logsnr) * output,
        eps_error=lambda error, logsnr: _alpha(logsnr) * error,
    ),
    "flow": Parameterization(  # the velocity of rectified flow, whose x_t is ours / (alpha + sigma): Liu et al. 2022
        target=lambda x_0, eps, logsnr: eps - x_0,
        x_0=lambda output, x_t, logsnr: (x_t - _sigma(logsnr) * output) / sum(alpha_sigma(logsnr)),
        eps_error=lambda error, logsnr: _alpha(logsnr) / sum(alpha_sigma(logsnr)) * error,
    ),
    "edm": edm(),
}


def mean_of_previous(schedule) -> Parameterization:
    """The mean of q(x_{t-1} | x_t, x_0), eq. 7: Ho et al. 2020, section 3.2 and table 2. For a DiscreteSchedule."""

    def posterior_mean(x_0, x_t, logsnr):
        return q_posterior(x_0, x_t, logsnr, schedule.logsnr(schedule.t_from_logsnr(logsnr) - 1))[0]

    def x_0(output, x_t, logsnr):
        return (output - posterior_mean(0.0, x_t, logsnr)) / posterior_mean(1.0, 0.0, logsnr)

    return Parameterization(
        target=lambda x_0, eps, logsnr: posterior_mean(x_0, q_sample(x_0, eps, logsnr), logsnr),
        x_0=x_0,
        eps_error=lambda error, logsnr: -jnp.exp(logsnr / 2) * x_0(error, 0.0, logsnr),
    )


def make_parameterization(name, schedule, sigma_data=0.5) -> Parameterization:
    """The entry `name` of PARAMETERIZATIONS, edm for data of that standard deviation; or mean, of this schedule."""
    made = {"edm": lambda: edm(sigma_data), "mean": lambda: mean_of_previous(schedule)}
    return made[name]() if name in made else PARAMETERIZATIONS[name]


def error_in(name):
    """Parameterization -> the same one with the error measured in the output of the parameterization `name`.

    Targets are linear in (x_0, eps), so the error in a target is the target of the errors in x_0 and eps.
    """

    def change(parameterization):
        def error_in_target(error, logsnr):
            x_0_error = parameterization.x_0(error, 0.0, logsnr)
            return PARAMETERIZATIONS[name].target(x_0_error, parameterization.eps_error(error, logsnr), logsnr)

        return parameterization._replace(eps_error=error_in_target)

    return change


# The space in which the error is measured. In a space other than the output, the loss of a denoiser does not depend on
# its parameterization. In output space the loss is plain regression. Errors in eps train nothing where no signal is
# left. The parameterization x_0 with an error in flow is the loss of JiT (Li & He 2025, arXiv:2511.13720).
ERRORS = {
    "eps": lambda parameterization: parameterization,
    "output": lambda parameterization: parameterization._replace(eps_error=lambda error, logsnr: error),
    "x_0": error_in("x_0"),
    "v": error_in("v"),
    "flow": error_in("flow"),
}


def simple(schedule, t):
    """L_simple (eq. 14): all times have the same weight."""
    return 1.0


def vlb(schedule, t):
    """The variational bound (eq. 12, fixedsmall) in nats per dimension; the VDM objective on a continuous schedule."""
    return schedule.rate(t) / 2


def min_snr(schedule, t, gamma=5.0):
    """Hang et al. 2023: min(SNR, gamma) / SNR, which limits the weight of easy times with little noise."""
    return jnp.minimum(1.0, gamma * jnp.exp(-schedule.logsnr(t)))


def p2(schedule, t, k=1.0, gamma=1.0):
    """Choi et al. 2022, eq. 8 over L_simple: 1 / (k + SNR)^gamma, which emphasises times that decide content."""
    return (k + jnp.exp(schedule.logsnr(t))) ** -gamma


def sigmoid(schedule, t, bias=2.0):
    """Kingma & Gao 2023; SiD2 (Hoogeboom et al. 2024): sigmoid(bias - logsnr) times the bound's weight.

    As a weight of the error in x_0 it is exp(bias) sigmoid(logsnr - bias) times -d logsnr / dt / 2. The loss does not
    depend on the schedule between its ends. A larger bias includes levels with less noise.
    """
    return vlb(schedule, t) * jax.nn.sigmoid(bias - schedule.logsnr(t))


WEIGHTINGS = {  # (schedule, t) -> weight of the error
    "simple": simple,
    "vlb": vlb,
    "min_snr": min_snr,
    "p2": p2,
    "sigmoid": sigmoid,
}


def huber(error):
    """error^2 / 2 up to 1, linear beyond."""
    absolute = jnp.abs(error)
    return jnp.where(absolute < 1, error**2 / 2, absolute - 0.5)


DISTANCES = {"l2": jnp.square, "l1": jnp.abs, "huber": huber}  # applied to each pixel's error


def make_loss(
    net,
    schedule,
    parameterization,
    weight,
    distance=jnp.square,
    extra=lambda *_: 0.0,
    noise_levels=lambda u: (u, 1.0),
) -> Callable:
    """Algorithm 1, lines 2 to 5, for one image: loss(params, key, x_0, label=None, u=None, eps=None, **others).

    The result is a scalar. net: (params, x_t, t, key, label, **others) -> output; parameterization: an entry of
    PARAMETERIZATIONS; weight: an entry of WEIGHTINGS; distance: an entry of DISTANCES; extra(output, x_0, x_t, t) is
    added to the loss. x_0 is (H, W, C) in [-1, 1]. u in [0, 1) determines t (schedule.t_from_u) and is drawn from `key`
    when not given, as is eps; noise_levels: from schedules.make_noise_levels. If the output has more channels than the
    image, the first C are the prediction.
    """

    def loss(params, key, x_0, label=None, u=None, eps=None, **others):
        v, level_weight = noise_levels(draw_u(key) if u is None else u)
        t = schedule.t_from_u(v)
        logsnr = schedule.logsnr(t)
        eps = jax.random.normal(named(key, "eps"), x_0.shape) if eps is None else eps
        x_t = q_sample(x_0, eps, logsnr)
        output = net(params, x_t, t, named(key, "dropout"), label, **others)
        error = output[..., : x_0.shape[-1]] - parameterization.target(x_0, eps, logsnr)
        main = weight(schedule, t) * jnp.mean(distance(parameterization.eps_error(error, logsnr)))
        return level_weight * (main + extra(output, x_0, x_t, t))

    return loss


def draw_u(key):
    """The uniform u in [0, 1) that determines t, for the image with this `key`."""
    return jax.random.uniform(named(key, "t"))


def distance_to_image(loss, x_0, eps):
    """The noise nearest to the image: immiscible diffusion by nearest neighbours (Li et al. 2025, arXiv:2505.18521)."""
    return jnp.sum((eps - x_0) ** 2)


def own_loss(loss, x_0, eps):
    """The noise with the smallest loss (explorative modelling, arXiv:2607.27372); one more forward pass for each."""
    return loss()


NOISE_CHOICES = {"nearest": distance_to_image, "lowest_loss": own_loss}  # the noise with the smallest value is learned


def choose_noise(loss, num, choice):
    """`loss` of one of `num` noises of the image, chosen by an entry of NOISE_CHOICES.

    The chosen noise is not standard normal, so the loss is smaller and its minimum is no longer E[x_0 | x_t].
    """

    def chosen(params, key, x_0, label=None, u=None, **others):
        def loss_of(params, eps):
            return loss(params, key, x_0, label, u, eps, **others)

        noises, fixed = jax.random.normal(named(key, "eps"), (num, *x_0.shape)), lax.stop_gradient(params)
        values = jax.vmap(lambda eps: NOISE_CHOICES[choice](lambda: loss_of(fixed, eps), x_0, eps))(noises)
        return loss_of(params, noises[jnp.argmin(values)])

    return chosen


# Limits: functions that bring x_0_hat into the range of images.


def clip(x_0_hat):
    """Clip to [-1, 1], as in the paper's code."""
    return jnp.clip(x_0_hat, -1.0, 1.0)


def dynamic_threshold(x_0_hat, percentile=99.5) -> jax.Array:
    """Saharia et al. 2022, section 2.3: clip at the percentile of |x_0_hat| (at least 1), then divide by it."""
    threshold = jnp.maximum(1.0, jnp.percentile(jnp.abs(x_0_hat), percentile))
    return jnp.clip(x_0_hat, -threshold, threshold) / threshold


LIMITS = {"clip": clip, "dynamic": dynamic_threshold, "none": lambda x_0_hat: x_0_hat}


def make_denoiser_with_variance(net, schedule, parameterization, params, label=None, limit=LIMITS["none"]):
    """predict(x_t, t) -> x_0_hat, nu, from an output of 2C channels whose second half is v = 2 nu - 1.

    For nu see reverse_variance (Nichol & Dhariwal 2021). A third argument, an estimate of x_0, is concatenated with x_t
    (self-conditioning).
    """

    def predict(x_t, t, *estimate):
        output = net(params, jnp.concatenate([x_t, *estimate], -1), t, label=label)
        output, v = jnp.split(output, [x_t.shape[-1]], -1)
        return limit(parameterization.x_0(output, x_t, schedule.logsnr(t))), (v + 1) / 2

    return predict


def make_denoiser(net, schedule, parameterization, params, label=None, limit=LIMITS["none"]):
    """predict(x_t, t) -> x_0_hat (eq. 15), as the samplers need it; see make_denoiser_with_variance."""
    predict = make_denoiser_with_variance(net, schedule, parameterization, params, label, limit)
    return lambda x_t, t, *estimate: predict(x_t, t, *estimate)[0]

"""Averages of the parameters whose length is chosen after training (Karras et al. 2024, section 3 and appendix C).

The average at step t gives the parameters of step tau the weight p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), tau in
[0, t]. Its length `sigma_rel`, the standard deviation of p over t, is the same at every t: the average forgets its
beginning by itself and needs no warm-up. Training tracks two lengths and stores snapshots of them; any other length is
a linear combination of the snapshots, whose coefficients fit its p by theirs.

A step here is a number of updates taken, n = 1, 2, ...; training steps that were skipped do not count.
"""

import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import ConfigError

MAX_SIGMA_REL = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all steps


def sigma_rel(gamma):
    """The standard deviation of p over t: (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def gamma(sigma_rel):
    """The exponent gamma >= 0 of that length: the largest root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1.

    Raises ConfigError unless 0 < sigma_rel <= 12^(-1/2).
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ConfigError(
            f"sigma_rel={sigma_rel} is not the length of an average: it must be above 0 and at most "
            f"{MAX_SIGMA_REL:.4f}, the mean of all steps"
        )
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def update_rate(gamma, n):
    """1 - beta for average = beta average + (1 - beta) params at the n-th update, beta = (1 - 1/n)^(gamma + 1).

    It is 1 for n = 1, so the initialisation has no share. The weight of update i is then the integral of p from i - 1
    to i, exactly. beta is too near to 1 for float32 (1 - beta is about (gamma + 1) / n), hence not formed.
    """
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / n))


def _inner(t_a, gamma_a, t_b, gamma_b):
    """The integral of p_a p_b (appendix C), from the ratio of the two steps so that no power overflows."""
    later = np.maximum(t_a, t_b)
    ratio = (np.minimum(t_a, t_b) / later) ** np.where(t_a > t_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / later


def posthoc_coefficients(snapshots, target_step, target_sigma_rel):
    """(coefficients, error): the combination of `snapshots` nearest to the target's profile, float64, in their order.

    snapshots: list of (step, sigma_rel), no two the same. error: the L2 distance of the two profiles over the norm of
    the target's; at most 1e-7 for a snapshot itself. Raises ConfigError for a step that the snapshots do not reach.

    Unlike the paper's, the coefficients are held to the sum 1 (by a Lagrange multiplier). Its nets normalise their
    weights, so that a common factor changes nothing; ours would be multiplied by the sum, which is 0.9 for sigma_rel
    0.28 from ten snapshots each of 0.05 and 0.10.
    """
    last = max(step for step, _ in snapshots)
    if not 0 < target_step <= last:
        raise ConfigError(f"step={target_step} is not covered by the averages; take one from 1 to {last}")
    t = np.array([step for step, _ in snapshots], np.float64) / target_step
    g, g_0 = np.array([gamma(length) for _, length in snapshots]), gamma(target_sigma_rel)
    gram, right = _inner(t[:, None], g[:, None], t, g), _inner(t, g, 1.0, g_0)

    norm = np.sqrt(np.diag(gram))  # profiles of unit norm: early steps' are narrow and high
    system = np.block([[gram / norm / norm[:, None], 1 / norm[:, None]], [1 / norm, 0.0]])
    coefficients = np.linalg.solve(system, np.append(right / norm, 1.0))[:-1] / norm

    square = _inner(1.0, g_0, 1.0, g_0)
    distance = square - 2 * coefficients @ right + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(0.0, distance / square)))

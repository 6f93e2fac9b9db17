"""Post-hoc EMA: averages of the parameters with a length chosen after training (Karras et al. 2024, section 3, app. C).

The average at step t weights the parameters of step tau in [0, t] by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).
Its length `sigma_rel`, the standard deviation of p divided by t, is the same at every t, so the average forgets the
initialisation and needs no warm-up. Training stores snapshots of a few lengths. Any other length is approximated by a
linear combination of the snapshots, by a least-squares fit of their p.

Steps here count parameter updates, n = 1, 2, ...; skipped training steps do not count.
"""

import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import ConfigError

MAX_SIGMA_REL = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all steps


def sigma_rel(gamma):
    """The standard deviation of p, divided by t: (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def gamma(sigma_rel):
    """The exponent gamma >= 0 for a length: the largest root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1.

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

    It is 1 for n = 1, which discards the initialisation. The weight of update i is then exactly the integral of p from
    i - 1 to i. 1 - beta is computed directly, since beta itself is too close to 1 for float32.
    """
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / n))


def _inner(t_a, gamma_a, t_b, gamma_b):
    """The inner product of p_a and p_b (appendix C). It uses the ratio of the two steps, so no power overflows."""
    later = np.maximum(t_a, t_b)
    ratio = (np.minimum(t_a, t_b) / later) ** np.where(t_a > t_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / later


def posthoc_coefficients(snapshots, target_step, target_sigma_rel):
    """(coefficients, error): the linear combination of `snapshots` closest to the target profile, float64.

    snapshots: list of distinct (step, sigma_rel), in the order of the coefficients. error: the L2 distance of the two
    profiles relative to the target's norm; at most 1e-7 if the target is a snapshot. Raises ConfigError for a step
    beyond the snapshots.

    Unlike the paper's, the coefficients sum to 1 (by a Lagrange multiplier), as our networks do not normalise their
    weights. Without the constraint the sum is 0.9 for sigma_rel 0.28 from ten snapshots each of 0.05 and 0.10.
    """
    last = max(step for step, _ in snapshots)
    if not 0 < target_step <= last:
        raise ConfigError(f"step={target_step} is not covered by the averages; choose one from 1 to {last}")
    t = np.array([step for step, _ in snapshots], np.float64) / target_step
    g, g_0 = np.array([gamma(length) for _, length in snapshots]), gamma(target_sigma_rel)
    gram, target = _inner(t[:, None], g[:, None], t, g), _inner(t, g, 1.0, g_0)

    norm = np.sqrt(np.diag(gram))  # scale the profiles to unit norm: those of early steps are narrow and high
    system = np.block([[gram / norm / norm[:, None], 1 / norm[:, None]], [1 / norm, 0.0]])
    coefficients = np.linalg.solve(system, np.append(target / norm, 1.0))[:-1] / norm

    target_square = _inner(1.0, g_0, 1.0, g_0)
    distance = target_square - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(0.0, distance / target_square)))

"""Averages of chosen length against integrals by quadrature and against sums over a stored trajectory."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

from ddpm_jax import averages, experiment, training
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.run import snapshots

TRACKED = (0.05, 0.10)
STEPS, EVERY = 6000, 200  # thirty snapshots


def profile(tau, t, gamma):
    """The paper's p: tau^gamma on [0, t], scaled to the integral 1 by quadrature."""
    area = integrate.quad(lambda x: (x / t) ** gamma, 0, t, epsabs=0, epsrel=1e-12)[0]
    return np.where(tau <= t, (tau / t) ** gamma, 0) / area


def quad(function, end, *breaks):
    return integrate.quad(function, 0, end, points=breaks or None, epsabs=0, epsrel=1e-11, limit=400)[0]


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_published_exponents(length, exponent):
    assert averages.gamma(length) == pytest.approx(exponent, abs=0.005)


def test_the_warm_up_of_the_ema_is_an_average_of_relative_length():
    """Of gamma = 8: a share of 9 / (10 + n) at each update, which a decay near 1 never ends."""
    rates = np.array([training.ema_rate(0.999999, n) for n in range(2000)], float)
    weights = rates * np.append(np.cumprod((1 - rates)[:0:-1])[::-1], 1)
    steps = np.arange(2000) + 1
    spread = np.sqrt(weights @ steps**2 - (weights @ steps) ** 2) / 2000
    assert spread == pytest.approx(averages.sigma_rel(8), rel=0.01)
    assert averages.sigma_rel(8) == pytest.approx(0.09, abs=0.001)


@pytest.mark.parametrize("length", [0.002, 0.01, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_the_profile_has_the_length_asked_for(length):
    exponent, t = averages.gamma(length), 3.0
    mean = quad(lambda x: x * profile(x, t, exponent), t)
    spread = quad(lambda x: (x - mean) ** 2 * profile(x, t, exponent), t)
    assert spread**0.5 / t == pytest.approx(length, rel=1e-8)
    assert averages.sigma_rel(exponent) == pytest.approx(length, rel=1e-12)


def test_the_longest_is_the_plain_mean():
    assert averages.gamma(12**-0.5) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, 0.3, float("nan"), float("inf")])
def test_a_length_that_no_profile_has_is_refused(length):
    with pytest.raises(ConfigError, match=f"sigma_rel={length} .* above 0 and at most 0.2887"):
        averages.gamma(length)


def test_the_update_rate_in_float32():
    """1 - (1 - 1/n)^(gamma + 1) by quadrature of p over the last step, up to a million steps."""
    for length in (0.01, 0.05, 0.1, 0.28):
        exponent = averages.gamma(length)
        n = np.array([1, 2, 3, 10, 1000, 12345, 1_000_000], np.int32)
        wanted = [
            integrate.quad(lambda x, g=exponent, n=n: (g + 1) * x**g, 1 - 1 / n, 1, epsabs=0, epsrel=1e-12)[0]
            for n in n.tolist()
        ]
        rate = jax.jit(lambda n, g=exponent: averages.update_rate(g, n))(n)
        assert rate.dtype == jnp.float32
        np.testing.assert_allclose(rate, wanted, rtol=1e-6)
        assert rate[0] == 1


def test_inner_products_by_quadrature():
    cases = [
        (1.0, 17.0, 1.0, 7.0),
        (0.3, 17.0, 1.0, 7.0),
        (1.0, 17.0, 0.3, 7.0),
        (0.9, 0.0, 1.0, 2.5),
        (2.0, 7.0, 1.9, 7.0),
    ]
    for t_a, gamma_a, t_b, gamma_b in cases:
        wanted = quad(lambda x, c=(t_a, gamma_a, t_b, gamma_b): profile(x, *c[:2]) * profile(x, *c[2:]), min(t_a, t_b))
        assert averages._inner(t_a, gamma_a, t_b, gamma_b) == pytest.approx(wanted, rel=1e-8)


def profiles(snapshots, grid):
    return np.stack([profile(grid, t, averages.gamma(length)) for t, length in snapshots])


@pytest.mark.parametrize("target", [(100, 0.15), (100, 0.07), (93, 0.1), (50, 0.25)])
def test_the_fit_is_the_best_one_with_sum_one(target):
    """No step from one snapshot to another brings the profile nearer; distances are sums over a fine grid."""
    snapshots = [(t, length) for t in range(10, 101, 10) for length in TRACKED]
    coefficients, error = averages.posthoc_coefficients(snapshots, *target)
    assert coefficients.dtype == np.float64
    assert coefficients.sum() == pytest.approx(1, abs=1e-12)

    grid = (np.arange(200_000) + 0.5) / 2000
    basis, wanted = profiles(snapshots, grid), profiles([target], grid)[0]
    rest = coefficients @ basis - wanted
    assert np.linalg.norm(rest) / np.linalg.norm(wanted) == pytest.approx(error, rel=2e-3)
    slopes = basis @ rest
    assert np.ptp(slopes) < 1e-4 * np.abs(basis @ wanted).max()


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_a_snapshot_is_its_own_fit(count):
    snapshots = [(1000 * (n + 1), length) for n in range(count) for length in TRACKED]
    for target in (snapshots[-1], snapshots[len(snapshots) // 2]):
        coefficients, error = averages.posthoc_coefficients(snapshots, *target)
        assert error < 1e-7
        np.testing.assert_allclose(coefficients, [s == target for s in snapshots], rtol=0, atol=1e-6)


def test_more_snapshots_fit_better_and_close_ones_do_no_harm():
    errors = []
    for count in (2, 8, 32):
        snapshots = [(96_000 // count * (n + 1), length) for n in range(count) for length in TRACKED]
        errors.append(averages.posthoc_coefficients(snapshots, 96_000, 0.15)[1])
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    coefficients, error = averages.posthoc_coefficients([*snapshots, (96_001, 0.05), (96_001, 0.1)], 96_001, 0.15)
    assert error < 1.1 * errors[2]
    assert np.abs(coefficients).sum() < 5


@pytest.mark.parametrize("step", [0, -5, 101])
def test_a_step_beyond_the_snapshots_is_refused(step):
    with pytest.raises(ConfigError, match=f"step={step} .* from 1 to 100"):
        averages.posthoc_coefficients([(100, 0.05), (50, 0.1)], step, 0.07)


def definition(trajectory, t, length):
    """The average at t, float64: update i has the weight of p from i - 1 to i (p's integral is tau^(gamma+1))."""
    cumulative = (np.arange(t + 1) / t) ** (averages.gamma(length) + 1)
    return np.tensordot(np.diff(cumulative), trajectory[:t].astype(np.float64), 1)


def as_tree(flat):
    return {"dense": {"kernel": flat[:6].reshape(2, 3), "bias": flat[6:8]}, "scale": flat[8]}


TEMPLATE = jax.eval_shape(as_tree, jax.ShapeDtypeStruct((9,), jnp.float32))


@pytest.fixture(scope="module")
def trajectory():
    """A random walk of nine parameters that starts at ten times its reach: (STEPS, 9), float32."""
    random = np.random.default_rng(0)
    return (10 + np.cumsum(random.normal(size=(STEPS, 9)), 0) / STEPS**0.5).astype(np.float32)


@pytest.fixture(scope="module")
def tracked(trajectory):
    """The averages of all TRACKED lengths after every step, as training forms them: (STEPS, 2, 9), float32."""
    exponents = [averages.gamma(length) for length in TRACKED]

    def update(state, params):
        n, old = state[0] + 1, state[1]
        new = [
            optax.incremental_update(params, average, averages.update_rate(g, n))
            for g, average in zip(exponents, old, strict=True)
        ]
        return (n, jnp.stack(new)), jnp.stack(new)

    start = jnp.int32(0), jnp.full((2, 9), 1e6)  # an initialisation that would show
    return np.asarray(jax.jit(lambda x: jax.lax.scan(update, start, x)[1])(trajectory))


def snapshot(tracked, step):
    return {length: as_tree(tracked[step - 1, k]) for k, length in enumerate(TRACKED)}


@pytest.fixture(scope="module")
def saved(tracked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "averages"
    for step in range(EVERY, STEPS + 1, EVERY):
        snapshots.save(folder, step, snapshot(tracked, step))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "averages")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in (tree["dense"]["kernel"], tree["dense"]["bias"], tree["scale"])])


def test_the_tracked_average_is_the_weighted_sum(trajectory, tracked):
    """To float32 rounding of numbers near 10, over six thousand updates."""
    for k, length in enumerate(TRACKED):
        for t in (1, 2, 10, 777, STEPS):
            np.testing.assert_allclose(tracked[t - 1, k], definition(trajectory, t, length), rtol=2e-6)


def test_an_untracked_average_is_reconstructed(trajectory, saved):
    """Off by at most this share of its own distance from the last parameters; 0.03 is beyond the tracked lengths."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length, bound in ((0.03, 5e-3), (0.07, 3e-4), (0.15, 3e-4), (0.20, 2e-3), (0.25, 2e-2)):
            got, wanted = flat(experiment.posthoc_ema(saved, TEMPLATE, length)), definition(trajectory, STEPS, length)
            off = np.linalg.norm(got - wanted) / np.linalg.norm(trajectory[-1] - wanted)
            assert off < bound


@pytest.mark.parametrize("step", [None, 4000])
def test_a_tracked_average_comes_back(tracked, saved, step):
    for k, length in enumerate(TRACKED):
        tree = experiment.posthoc_ema(saved, TEMPLATE, length, step)
        np.testing.assert_allclose(flat(tree), tracked[(step or STEPS) - 1, k], rtol=1.2e-7)
        assert jax.tree.structure(tree) == jax.tree.structure(TEMPLATE)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), TEMPLATE)


def test_a_step_between_two_snapshots(trajectory, saved):
    """Its profile ends where no snapshot's does, which is told; a random walk hardly shows it."""
    with pytest.warns(UserWarning, match="only approximate"):
        got = flat(experiment.posthoc_ema(saved, TEMPLATE, 0.10, 3900))
    wanted = definition(trajectory, 3900, 0.10)
    assert np.linalg.norm(got - wanted) < 0.01 * np.linalg.norm(trajectory[3899] - wanted)


def test_parameters_that_stand_still_keep_their_value_however_rough_the_fit(tmp_path):
    for step in (500, 1000):
        snapshots.save(tmp_path, step, {length: as_tree(np.full(9, 3, np.float32)) for length in TRACKED})
    with pytest.warns(UserWarning, match=r"sigma_rel=0.25 at step 1000 .* 4 snapshots .* error of \d\d%"):
        tree = experiment.posthoc_ema(tmp_path, TEMPLATE, 0.25)
    np.testing.assert_allclose(flat(tree), 3, rtol=1e-6)


def test_a_snapshot_is_stored_bit_for_bit(tracked, tmp_path):
    snapshots.save(tmp_path, jnp.int32(7), snapshot(tracked, 7))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000007.npz"]
    found = snapshots.load(tmp_path, 7)
    assert set(found) == set(TRACKED)
    for k, length in enumerate(TRACKED):
        assert set(found[length]) == {"dense/kernel", "dense/bias", "scale"}
        np.testing.assert_array_equal(found[length]["dense/kernel"].ravel(), tracked[6, k, :6])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 4
    path.write_bytes(data)


def test_no_flipped_bit_changes_a_snapshot_in_silence(saved, tmp_path):
    """A bit of every third byte of a file in turn: it is refused, or (padding, time stamps) reads as it was written."""
    source = snapshots._path(saved, EVERY)
    wanted, refused = snapshots.load(saved, EVERY), 0
    for at in range(0, len(source.read_bytes()), 3):
        shutil.copy(source, tmp_path)
        flip(tmp_path / source.name, at)
        try:
            found = snapshots.load(tmp_path, EVERY)
        except CheckpointError:
            refused += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert refused > 300


def test_damaged_and_missing_snapshots_are_left_out(trajectory, tracked, folder):
    names = sorted(path.name for path in folder.iterdir())
    flip(folder / names[3], (folder / names[3]).read_bytes().index(tracked[4 * EVERY - 1, 0, :6].tobytes()))
    (folder / names[5]).write_bytes((folder / names[5]).read_bytes()[:-100])
    (folder / names[7]).write_bytes(b"")
    (folder / names[9]).unlink()
    shutil.copy(folder / names[10], folder / names[11])  # whole, but of another step
    with pytest.warns(UserWarning, match="averages skipped") as told:
        stored = snapshots.stored(folder)
    for k, warning in zip((3, 5, 7, 11), told, strict=True):
        assert names[k] in str(warning.message)
    gone = [(k + 1) * EVERY for k in (3, 5, 7, 9, 11)]
    assert stored == [(n, s) for n in range(EVERY, STEPS + 1, EVERY) if n not in gone for s in TRACKED]
    with pytest.warns(UserWarning, match="averages skipped"):
        got = flat(experiment.posthoc_ema(folder, TEMPLATE, 0.15))
    wanted = definition(trajectory, STEPS, 0.15)
    assert np.linalg.norm(got - wanted) < 0.005 * np.linalg.norm(trajectory[-1] - wanted)


def test_nothing_to_use_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there are no averages in"):
        snapshots.stored(tmp_path / "none")
    (tmp_path / "step_000000100.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="that can be used"), pytest.warns(UserWarning, match="averages skipped"):
        experiment.posthoc_ema(tmp_path, TEMPLATE, 0.05)


def test_another_models_snapshots_are_refused(saved):
    template = TEMPLATE | {"scale": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"step_000000200.npz .* scale is \(\), the model has \(2,\)"):
        experiment.posthoc_ema(saved, template, 0.05)
    with pytest.raises(CheckpointError, match=r"more is missing, the model has \(2,\)"):
        experiment.posthoc_ema(saved, TEMPLATE | {"more": template["scale"]}, 0.05)


def test_a_snapshot_that_cannot_be_written_is_an_error(tracked, tmp_path):
    (tmp_path / "averages").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="step 7 were not written"):
        snapshots.save(tmp_path / "averages", 7, snapshot(tracked, 7))


def test_a_run_that_goes_back_drops_what_came_after(folder):
    snapshots.drop_after(folder, STEPS - 2 * EVERY)
    assert snapshots.stored(folder)[-1][0] == STEPS - 2 * EVERY
    snapshots.drop_after(folder, 0)
    assert not list(folder.iterdir())
    snapshots.drop_after(folder / "nowhere", 0)

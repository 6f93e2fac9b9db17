"""What must never move: the keys, random bits and noise of (seed, index), by the definition of Threefry and to the bit.

Keys, bits and uniform numbers are integer arithmetic, the same everywhere. The normal numbers made of them go through
XLA's erf_inv, whose last bits depend on how it was compiled: with the optimisations of a real run they differ between
jaxlib 0.10.2 and 0.12.0 in 3 % of the values, by at most 3 units in the last place (on a CPU). Without these, as here,
they are the same. A checkpoint names the versions that made it, and resuming under others says "not bit-exact".
"""

import math
import zlib

import jax
import numpy as np
import pytest
from scipy import special

from ddpm_jax import diffusion, keys, samplers, schedules

INDEX, SHAPE = 7, (8, 8, 3)


def threefry(key, high, low):
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011, section 3.3): two uint32 arrays for two."""
    ks = [*np.uint32(key), np.uint32(key[0]) ^ np.uint32(key[1]) ^ np.uint32(0x1BD11BDA)]
    x, y = (np.asarray(words, np.uint32) + k for words, k in ((high, ks[0]), (low, ks[1])))
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x = x + y
            y = (y << np.uint32(turn) | y >> np.uint32(32 - turn)) ^ x
        x, y = x + ks[(block + 1) % 3], y + ks[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def fold_in(key, number):
    return np.stack(threefry(key, [0], [number]), -1)[0]


def bits(key, shape):
    """One uint32 for each place, from its number; a function of no other place (`jax_threefry_partitionable`)."""
    places = np.arange(math.prod(shape))
    x, y = threefry(key, np.zeros_like(places), places)
    return (x ^ y).reshape(shape)


def test_threefry_is_the_papers():
    """The known answers that its authors publish with it (Random123, kat_vectors)."""
    known = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, (high, low), wanted in known:
        assert tuple(int(*word) for word in threefry(key, [high], [low])) == wanted


@pytest.mark.parametrize("seed", [0, 12345])
@pytest.mark.parametrize("name", ["init", "train", "train 1", "sample", "evaluate", "forward"])
def test_keys_and_bits_are_threefrys(seed, name):
    root = fold_in((0, seed), zlib.crc32(name.encode()))
    key, found = fold_in(root, INDEX), jax.random.fold_in(keys.root(seed, name), INDEX)
    np.testing.assert_array_equal(jax.random.key_data(keys.root(seed, name)), root)
    np.testing.assert_array_equal(jax.random.key_data(found), key)
    np.testing.assert_array_equal(jax.random.bits(found, SHAPE), bits(key, SHAPE))
    time = bits(fold_in(key, zlib.crc32(b"t")), ())
    assert float(diffusion.draw_u(found)) == (time >> 9) / 2**23


def x_T(seed):
    return samplers.pure_noise(jax.random.fold_in(keys.root(seed, "sample"), INDEX), SHAPE)


def eps(seed):
    """What the loss adds to image INDEX in the first step of training."""
    seen, schedule = [], schedules.from_betas(schedules.linear_betas())

    def target(x_0, eps, logsnr):
        seen.append(eps)
        return eps

    kind = diffusion.PARAMETERIZATIONS["eps"]._replace(target=target)
    loss = diffusion.make_loss(lambda params, x_t, *_: x_t, schedule, kind, diffusion.WEIGHTINGS["simple"])
    loss({}, jax.random.fold_in(jax.random.fold_in(keys.root(seed, "train"), 0), INDEX), np.zeros(SHAPE, np.float32))
    return seen[0]


STREAMS = {x_T: ("sample", "x_T"), eps: ("train", "eps")}


@pytest.mark.parametrize("seed", [0, 12345])
@pytest.mark.parametrize("draw", STREAMS)
def test_noise_is_the_inverse_distribution_function_of_the_bits(seed, draw):
    """sqrt(2) erf^-1(u) in float64, u even in (-1, 1); that of float32 (Giles 2012) was off by 6e-6 at most."""
    root, name = STREAMS[draw]
    key = fold_in((0, seed), zlib.crc32(root.encode()))
    for number in ([0] if root == "train" else []) + [INDEX, zlib.crc32(name.encode())]:
        key = fold_in(key, number)
    least = np.nextafter(np.float32(-1), np.float32(0))
    u = np.float32(bits(key, SHAPE) >> 9) / np.float32(2**22) + least
    np.testing.assert_allclose(draw(seed), np.sqrt(2) * special.erfinv(u.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize(
    ("draw", "seed", "first", "crc"),
    [
        (x_T, 0, [0xBF3A460F, 0x3F28BF46, 0xBE5F0CA1, 0x3FBC978E], 0xC664A6F3),
        (x_T, 12345, [0xBF8C75A8, 0x3F620151, 0xBFA109F9, 0xBC4B6AF9], 0x35492D0D),
        (eps, 0, [0xBF6AFAC4, 0xBC462C92, 0xBF08BDE2, 0xBF76756B], 0x00F0C568),
        (eps, 12345, [0x3F4664B5, 0x3ED9995C, 0xBC901445, 0x3FBC478A], 0x7DB7FA66),
    ],
)
def test_noise_is_what_it_has_always_been(draw, seed, first, crc):
    """To the bit, under jaxlib 0.10.2 and 0.12.0; the CRC-32 is of all values."""
    found = np.asarray(draw(seed)).view(np.uint32)
    assert found.ravel()[:4].tolist() == first
    assert zlib.crc32(found) == crc

"""Transformations against NumPy and closed forms, draws against their distributions, and what a network is told."""

import jax
import jax.image
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from conftest import LEAST, TINY, assert_same_trees, random_params
from train_steps import batch_of, run

from ddpm_jax import augmentation, config, diffusion, experiment, training
from ddpm_jax.interop import released, tensors
from ddpm_jax.keys import named
from ddpm_jax.networks import unet

transform = jax.jit(augmentation.transform)
draw = jax.jit(jax.vmap(augmentation.draw_parameters, (0, None)))
NAMES = "x_flip", "y_flip", "scale", "cos_minus_1", "sin", "stretch_cos", "stretch_sin", "shift_x", "shift_y"
N, P = 20_000, 0.12  # number of draws; probability
SHAPES = [(8, 8, 1), (8, 8, 3), (8, 12, 3), (7, 5, 1)]


def parameters(**given):
    return np.float32([given.get(name, 0) for name in NAMES])


def turned(angle):
    return {"cos_minus_1": np.cos(angle) - 1, "sin": np.sin(angle)}


def stretched(stretch, axis):
    return {"stretch_cos": stretch * np.cos(2 * axis), "stretch_sin": stretch * np.sin(2 * axis)}


def random_image(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def shifted(image, right, down):
    """By whole pixels; what comes in is the image reflected about its outer pixels."""
    (height, width, _), pad = image.shape, 4
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    return padded[pad - down :, pad - right :][:height, :width]


EXACT = {
    "x_flip": ({"x_flip": 1}, lambda x: x[:, ::-1]),
    "y_flip": ({"y_flip": 1}, lambda x: x[::-1]),
    "both flips": ({"x_flip": 1, "y_flip": 1}, lambda x: x[::-1, ::-1]),
    "half turn": ({"cos_minus_1": -2}, lambda x: x[::-1, ::-1]),
    "right": ({"shift_x": 2}, lambda x: shifted(x, x.shape[1] // 4, 0)),
    "up": ({"shift_y": -1}, lambda x: shifted(x, 0, -1)),
    "flip, then shift": ({"x_flip": 1, "shift_y": 2}, lambda x: shifted(x[:, ::-1], 0, 2)),
}
TURNS = {  # of squares
    "quarter turn": ({"cos_minus_1": -1, "sin": 1}, lambda x: np.rot90(x, -1)),  # clockwise: y points down
    "quarter turn back": ({"cos_minus_1": -1, "sin": -1}, np.rot90),
    "flip, then turn": ({"x_flip": 1, "cos_minus_1": -1, "sin": 1}, lambda x: np.rot90(x[:, ::-1], -1)),
    "turn, then shift": ({"cos_minus_1": -1, "sin": 1, "shift_x": 2}, lambda x: shifted(np.rot90(x, -1), 2, 0)),
}


@pytest.mark.parametrize(
    ("shape", "name"), [((8, 8, 1), name) for name in EXACT | TURNS] + [((8, 16, 3), name) for name in EXACT]
)
def test_what_maps_pixels_to_pixels_is_exact(shape, name):
    (given, wanted), image = (EXACT | TURNS)[name], random_image(shape)
    np.testing.assert_array_equal(transform(image, parameters(**given)), wanted(image))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 6, 1), (1, 1, 3)])
def test_an_image_with_zeros_keeps_its_bits(shape):
    image = random_image(shape)
    np.testing.assert_array_equal(transform(image, np.zeros(9, np.float32)), image)


def forward(x_flip=0, y_flip=0, scale=0, angle=0, stretch=0, axis=0):
    """The matrix that flips, scales, rotates and stretches (x, y), as a product of five in float64."""

    def rotation(angle):
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    along = rotation(axis) @ np.diag([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)]) @ rotation(-axis)
    return along @ rotation(angle) @ np.diag([2 ** (0.2 * scale)] * 2) @ np.diag([1 - 2 * x_flip, 1 - 2 * y_flip])


MAPS = {
    "scale by 2": {"scale": 5},
    "scale by 0.8": {"scale": np.log2(0.8) / 0.2},
    "rotate": {"angle": 0.7},
    "stretch": {"stretch": 1.3},
    "squeeze": {"stretch": -1.3},
    "stretch across": {"stretch": 1.1, "axis": 2.0},
    "all": {"x_flip": 1, "y_flip": 1, "scale": 1.2, "angle": -2.5, "stretch": 0.9, "axis": -1.0},
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(16, 16, 1), (12, 20, 3)])
@pytest.mark.parametrize("shift", [(0, 0), (0.37, -0.61)])
def test_a_parabola_stays_the_parabola_under_the_inverse_map(name, shape, shift):
    """Cubic convolution is exact for polynomials up to the second degree, where no neighbour is reflected."""
    given, size = MAPS[name], np.array(shape[1::-1])
    y, x = np.mgrid[: shape[0], : shape[1]]
    places = np.stack([x, y], -1) - (size - 1) / 2

    def parabola(p):
        x, y = p[..., 0], p[..., 1]
        channels = np.arange(1, shape[2] + 1)
        return ((4 + 5 * x - 3 * y + 0.2 * x**2 - 0.4 * x * y + 0.3 * y**2) / 200)[..., None] / channels

    told = {k: v for k, v in given.items() if k in ("x_flip", "y_flip", "scale")}
    told |= turned(given.get("angle", 0)) | stretched(given.get("stretch", 0), given.get("axis", 0))
    told |= {"shift_x": shift[0], "shift_y": shift[1]}
    found = transform(parabola(places).astype(np.float32), parameters(**told))
    source = (places - np.array(shift) * size / 8) @ np.linalg.inv(forward(**given)).T
    inside = np.all(np.abs(source) <= (size - 1) / 2 - 1, -1)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(found[inside], parabola(source)[inside], atol=3e-6)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.3), (1.7, 0.0), (0.8, -0.45)])
def test_cubic_convolution_is_that_of_jax(scale, shift):
    """jax.image has no rotation, and other edges."""
    image, (height, width) = random_image((16, 24, 3)), (16, 24)
    found = transform(image, parameters(scale=np.log2(scale) / 0.2, shift_x=shift, shift_y=-shift))
    centre, move = np.array([height, width]) / 2, np.array([-shift * height, shift * width]) / 8
    wanted = jax.image.scale_and_translate(
        image, image.shape, (0, 1), np.full(2, scale), centre * (1 - scale) + move, "cubic", antialias=False
    )
    offsets = (np.arange(n) + 0.5 - c - m for n, c, m in zip((height, width), centre, move, strict=True))
    y, x = (np.abs(offset / scale) < c - 2 for offset, c in zip(offsets, centre, strict=True))
    assert y.sum() > 6 < x.sum()
    np.testing.assert_allclose(found[y][:, x], np.clip(wanted, -1, 1)[y][:, x], atol=2e-5)


def test_outside_the_image_is_its_reflection():
    """NumPy's, so that a padded image under the same map has the same middle."""
    image, given = random_image((8, 10, 3)), parameters(scale=-1.5, **turned(0.8), **stretched(1.0, 0.5))
    padded = np.pad(image, ((7, 7), (9, 9), (0, 0)), mode="reflect")
    np.testing.assert_allclose(transform(image, given), transform(padded, given)[7:-7, 9:-9], atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_stay_in_range(shape):
    """Cubic convolution overshoots at black-and-white edges."""
    image = np.where(random_image(shape) > 0, 1, -1).astype(np.float32)
    drawn = draw(jax.random.split(jax.random.key(1), N), 1.0)[:20]
    found = np.stack([transform(image, given) for given in drawn])
    assert np.isfinite(found).all()
    assert np.abs(found).max() == 1


@pytest.fixture(scope="module")
def drawn():
    return np.asarray(draw(jax.random.split(jax.random.key(0), N), P), np.float64)


def test_the_share_of_each_transformation(drawn):
    """Five standard deviations; together they are independent."""
    on = drawn != 0
    shares = [(on[:, 0], 0.5), (on[:, 1], P / 2), (on[:, 2], P), (on[:, 4], P), (on[:, 5], P), (on[:, 7], P)]
    shares += [
        (~on[:, 1:].any(1), (1 - P) ** 4 * (1 - P / 2)),
        (on[:, 2] & on[:, 7], P**2),
        (on[:, 0] & on[:, 2], P / 2),
    ]
    for found, wanted in shares:
        assert abs(found.mean() - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / N)
    np.testing.assert_array_equal(on[:, [5, 7]], on[:, [6, 8]])


def test_the_distributions_of_the_parameters(drawn):
    """Two-dimensional ones by direction and length: the amount of the stretch has both signs, and so any direction."""

    def p_value(values, name, *args):
        return scipy.stats.kstest(values, name, args).pvalue

    assert set(drawn[:, :2].ravel()) == {0, 1}
    for column in (2, 7, 8):
        assert p_value(drawn[drawn[:, column] != 0, column], "norm") > 1e-3
    shift = drawn[drawn[:, 7] != 0, 7:]
    assert abs(np.corrcoef(shift.T)[0, 1]) < 5 / np.sqrt(len(shift))
    for columns, offset in ((slice(3, 5), [1, 0]), (slice(5, 7), [0, 0])):
        x, y = (drawn[drawn[:, columns].any(1), columns] + offset).T
        assert p_value(np.arctan2(y, x), "uniform", -np.pi, 2 * np.pi) > 1e-3
        if columns.start == 3:
            np.testing.assert_allclose(np.hypot(x, y), 1, atol=1e-6)
        else:
            assert p_value(np.hypot(x, y), "halfnorm") > 1e-3


def test_probabilities_of_0_and_1():
    keys = jax.random.split(jax.random.key(2), N)
    never, always = np.asarray(draw(keys, 0.0)), np.asarray(draw(keys, 1.0))
    assert not never[:, 1:].any()
    np.testing.assert_array_equal(never[:, 0], always[:, 0])
    assert always[:, [2, 4, 6, 8]].all()  # the cosine of a small angle is 1


def told(params, key, x_0, label=None, u=None, augmentation=None):
    """A loss whose gradient tells all pixels and parameters of a batch."""
    ramp = jnp.arange(x_0.size).reshape(x_0.shape) / x_0.size
    return params["w"] * (jnp.mean(ramp * x_0) + jnp.sum(jnp.arange(1, 10) * augmentation))


def test_images_and_parameters_are_the_same_on_one_and_two_devices():
    step, ends = training.make_train_step(augmentation.augmented(told, 0.5), optax.sgd(1.0), 0.9), []
    for devices in (1, 2):
        state = training.init_state({"w": jnp.float32(0)}, optax.sgd(1.0))
        ends.append(float(run(step, state, batch_of(16), devices, 2)[0].params["w"]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


SHAPE = (8, 8, 1)


def made(augment, model=None, **names):
    """The Experiment, and what its network is told at each call: the network answers 0."""
    calls = []

    def net(params, x_t, t, key=None, label=None, **others):
        calls.append(others)
        return jnp.zeros(SHAPE)

    settings = config.Config(
        data=config.Data(augment=augment),
        model=config.Model(**TINY | (model or {})),
        diffusion=config.Diffusion(**names),
    )
    return experiment.make(settings, SHAPE, (lambda key: {}, net)), calls


def test_the_network_is_told_what_happened_to_the_image():
    """Through label dropout and self-conditioning; with x_0 as output the loss is the mean square of the image."""
    names = {"self_conditioning": True, "label_dropout": 0.5, "parameterization": "x_0", "error": "output"}
    parts, calls = made(0.5, {"num_classes": 3}, **names)
    image = random_image(SHAPE)

    @jax.jit
    def loss_and_told(key):
        loss = parts.loss({}, key, image, 1, 0.5)
        return loss, *(call["augmentation"] for call in calls)

    for i in range(4):
        loss, first, second = loss_and_told(jax.random.key(i))
        np.testing.assert_array_equal(first, second)
        assert loss == pytest.approx(np.mean(np.square(transform(image, first))), rel=1e-5)
        keys = named(jax.random.key(i), "augmentation")[None]
        np.testing.assert_allclose(first, draw(keys, 0.5)[0], atol=1e-6)


def test_nothing_is_told_without_augmentation_in_sampling_and_in_evaluation():
    for parts, calls in (made(0.0), made(0.5)):
        if not parts.config.data.augment:
            parts.loss({}, jax.random.key(0), random_image(SHAPE), None, 0.5)
        jax.eval_shape(experiment.make_generate(parts, "ddim", 3), {}, jax.random.key(0), 0)
        predict = diffusion.make_denoiser(parts.image_net, parts.schedule, parts.parameterization, {})
        predict(jnp.zeros(SHAPE), 5)
        assert len(calls) >= 2
        assert not any(calls)


@pytest.fixture(scope="module")
def networks():
    """(init, net) of a small U-Net without and with augmentation."""
    return [unet.make_unet(SHAPE, augmented=augmented, **TINY | LEAST) for augmented in (False, True)]


def test_only_an_augmented_network_has_the_new_parameters(networks):
    (plain, _), (augmented, _) = networks
    params = jax.jit(augmented)(jax.random.key(0))
    kernel = params.pop("augmentation")["kernel"]
    assert kernel.shape == (9, LEAST["channels"])
    assert not kernel.any()
    shapes = jax.eval_shape(plain, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def test_no_parameters_are_zeros_and_the_network_without_augmentation(networks):
    (_, plain), (init, net) = networks
    params, x_t, given = random_params(init), random_image(SHAPE), parameters(scale=1.0, shift_x=-0.5)
    rest = {name: part for name, part in params.items() if name != "augmentation"}
    outputs = [net(params, x_t, 5, augmentation=told) for told in (None, np.zeros(9, np.float32), given)]
    np.testing.assert_array_equal(outputs[0], plain(rest, x_t, 5))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_the_gradient_reaches_weights_of_zero(networks):
    """Only those of parameters that are not 0."""
    init, net = networks[1]
    params, given = random_params(init), parameters(scale=1.0, shift_x=-0.5)
    params["augmentation"]["kernel"][:] = 0

    @jax.jit
    @jax.grad
    def gradient(kernel):
        return jnp.sum(
            net(params | {"augmentation": {"kernel": kernel}}, random_image(SHAPE), 5, augmentation=given) ** 2
        )

    rows = np.abs(gradient(params["augmentation"]["kernel"])).max(1)
    np.testing.assert_array_equal(rows > 0, given != 0)


def test_a_network_is_exported_to_diffusers_without_them(tmp_path):
    model = config.Model(**TINY | {"num_heads": 1})
    parts = experiment.make(config.Config(data=config.Data(augment=0.1), model=model), SHAPE)
    params = random_params(parts.init)
    released.write(tmp_path, parts, params)
    found = released.read(tmp_path)
    template = experiment.params_shape(experiment.make(found.config, found.shape))
    del params["augmentation"]
    assert_same_trees(tensors.to_params(found.arrays, template, found.format, "here"), params)

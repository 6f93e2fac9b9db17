"""The feature extractors against the torch implementations they must agree with, on the same weights.

torch-fidelity 0.4.0's Inception is asked from uint8 on, resize and scaling included; pytorch-fid 0.3.0's from the
scaled image on, as its own preparation (half-pixel resize, 2 x / 255 - 1) is not that of the TensorFlow graph.
"""

import jax
import numpy as np
import pytest

from ddpm_jax.evaluation import features, metrics
from ddpm_jax.evaluation.features import enl0, inception, torchfile

pytestmark = pytest.mark.peers

torch = pytest.importorskip("torch")


def randomize(model):
    """Weights that keep the size of activations, and running statistics that are not those of the start."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
            elif tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=random) * (2 / tensor[0].numel()) ** 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
    return model.eval()


@pytest.fixture(scope="module")
def fidelity(tmp_path_factory):
    """(torch-fidelity's Inception, the file of its random weights)."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        model = module.FeatureExtractorInceptionV3("a", ["2048"], str(file))
    torch.save(randomize(model).state_dict(), file)
    return model, file


def planes(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def test_inception_is_torch_fidelitys(fidelity):
    model, file = fidelity
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    (theirs,) = model(planes(images))
    extractor = features.load("inception", str(file))
    assert not extractor.published
    ours = np.stack([jax.jit(extractor.apply)(extractor.params, image) for image in images])
    assert ours.shape == (2, 2048)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(28, 28, 1), (310, 401, 3), (64, 48, 3), (299, 299, 3)])
def test_images_of_any_size_are_resized_as_in_torch_fidelity(shape):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rgb = planes(np.repeat(image[None], 3 if shape[-1] == 1 else 1, -1)).float()
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(rgb, size=(299, 299), align_corners=False)
    np.testing.assert_allclose(
        128 * inception.preprocess(image) + 128, np.moveaxis(theirs[0].numpy(), 0, -1), atol=1e-3
    )


@pytest.mark.parametrize("d", [3, 40])
def test_metrics_are_torch_fidelitys(d):
    kid, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("kid", "prc"))
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(300, d)), 0.1 + 1.1 * random.normal(size=(400, d))
    theirs = kid.kernel_mmd(x[:200], y[:200], kid_kernel="poly", kid_kernel_poly_degree=3)
    assert metrics.kid(x[:200], y[:200]) == pytest.approx(theirs, rel=1e-9)
    found = prc.calculate_precision_recall_full(torch.from_numpy(x), torch.from_numpy(y), 3)
    assert metrics.precision_recall(x, y) == pytest.approx(found)
    moments = [fid.fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
    theirs = fid.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
    assert metrics.frechet(metrics.moments(x), metrics.moments(y)) == pytest.approx(theirs, rel=1e-6)


def test_inception_is_pytorch_fids(fidelity):
    module = pytest.importorskip("pytorch_fid.inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: fidelity[0].state_dict())
        model = module.InceptionV3(resize_input=False, normalize_input=False).eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(planes(x))[0][:, :, 0, 0]
    params = inception.params(torchfile.read(fidelity[1]), "")
    ours = np.stack([jax.jit(inception.features)(params, image) for image in x])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [64, 97, 224])
def test_enl0_is_the_torch_model_of_its_package(side):
    module = pytest.importorskip("efficientnet_lite_pytorch")
    model = module.EfficientNet.from_name("efficientnet-lite0", image_size=side)  # which fixes its padding
    model.load_state_dict(torch.load(enl0.find(), weights_only=True))
    x = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model.eval().extract_features(planes(x)).mean((2, 3))
    params = features.load("enl0").params
    ours = np.stack([jax.jit(enl0.features)(params, image) for image in x])
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_both_formats(tmp_path, zipped):
    """Views, shared storages, scalars and four types, as torch itself writes and reads them."""
    x = torch.arange(24.0).reshape(2, 3, 4)
    saved = {"turned": x.permute(2, 0, 1), "part": x[1, :2, 1:3], "scalar": x[1, 1, 1], "empty": x[:, :0]}
    saved |= {"half": x.half(), "double": x.double(), "long": x.long()}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = torchfile.read(tmp_path / "a.pth")
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)

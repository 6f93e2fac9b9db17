"""The weights of released networks give in ours what they give in diffusers, and back.

Their UNet2DModel is built from each published config with random weights, also where training starts at zero, and goes
through our import. float32 on both sides: outputs agree to about 1e-6 of their largest value, with inputs of size 1e-3,
where the norms divide by less, to about 1e-5.

The published networks of 256x256 are compared at smaller sides, their levels being given by the kind of each block, and
once at 256 (slow).
"""

import itertools

import jax
import numpy as np
import pytest
from published import CIFAR10, OLD_SCHEDULER, PAPER_256, RELEASED, TRAIN_UNCONDITIONAL

from ddpm_jax import diffusion, experiment, samplers
from ddpm_jax.interop import __main__ as interop
from ddpm_jax.interop import layout, released, tensors

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # theirs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}


def plain(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def their_net(config, seed=0):
    """Their network with random weights in all layers."""
    net, generator = diffusers.UNet2DModel(**plain(config)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in net.named_parameters():
            drawn = torch.randn(leaf.shape, generator=generator)
            if leaf.ndim > 1:
                leaf.copy_(drawn / np.sqrt(leaf[0].numel()))
            else:
                leaf.copy_(0.2 * drawn + float("norm" in name and name.endswith("weight")))
    return net


def our_net(net, config, scheduler=OLD_SCHEDULER):
    """(Experiment, parameters) of theirs, by way of our import."""
    parts = experiment.make(*layout.from_diffusers(config, scheduler))
    arrays = {name: leaf.numpy() for name, leaf in net.state_dict().items()}
    spelling = tensors.diffusers_format(len(config["block_out_channels"]))
    return parts, tensors.to_params(arrays, experiment.params_shape(parts), spelling, "theirs")


def compare(net, parts, params, times, batch=2):
    """The greatest difference of outputs over the greatest output, at inputs of size 1 and of size 1e-3."""
    x = np.random.default_rng(0).normal(size=(batch, *parts.shape)).astype(np.float32)
    forward, found = jax.jit(jax.vmap(parts.net, (None, 0, 0))), []
    for scale in (1.0, 1e-3):
        for some in np.reshape(times, (-1, batch)):
            mine = np.asarray(forward(params, scale * x, some))
            with torch.no_grad():
                his = net(torch.from_numpy(np.moveaxis(scale * x, -1, 1).copy()), torch.from_numpy(some - 1)).sample
            his = np.moveaxis(his.numpy(), 1, -1)
            found.append(np.abs(mine - his).max() / np.abs(his).max())
    half = len(found) // 2
    return max(found[:half]), max(found[half:])


def assert_close(differences):
    assert differences[0] < 1e-5
    assert differences[1] < 2e-5


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("config", [CIFAR10, PAPER_256, TRAIN_UNCONDITIONAL], ids=["cifar10", "256", "unconditional"])
def test_published_networks(config, size):
    config = config | {"sample_size": size}
    net = their_net(config)
    assert_close(compare(net, *our_net(net, config), [1, 1000, 500, 37]))


@pytest.mark.slow
def test_the_papers_network_at_its_own_size():
    net = their_net(PAPER_256)
    assert_close(compare(net, *our_net(net, PAPER_256), [1000], batch=1))


OPTIONS = {
    "padding": {"downsample_padding": 1},
    "order": {"flip_sin_to_cos": True},
    "shift": {"freq_shift": 0},
    "heads": {"attention_head_dim": 4},
    "one head": {"attention_head_dim": None},
    "eps": {"norm_eps": 1e-3},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "oblong": {"sample_size": [8, 12]},
    "gray": {"in_channels": 1, "out_channels": 1},
    "odd": {"sample_size": 12, "downsample_padding": 1},  # its lowest level has 3x3 pixels
    "widths": {"block_out_channels": [12, 24, 60], "attention_head_dim": 12},
    "layers": {"layers_per_block": 3},
    "one level": {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(name):
    config = CIFAR10 | TINY | OPTIONS[name]
    net = their_net(config)
    assert_close(compare(net, *our_net(net, config), [1, 1000, 500, 37, 2, 999], batch=3))


@pytest.mark.parametrize("name", ["old", "new"])
def test_the_stored_folders_are_theirs(name):
    """What test_interop.py compares with: their own reader on the same files, in float64."""
    folder = RELEASED / name
    net = diffusers.UNet2DModel.from_pretrained(folder / ("unet" if name == "new" else "")).eval().double()
    wanted = np.load(folder / "expected.npz")
    with torch.no_grad():
        found = net(torch.from_numpy(wanted["x"]).double(), torch.from_numpy(wanted["t"])).sample
    np.testing.assert_allclose(found.numpy(), wanted["output"], rtol=1e-5, atol=1e-7)


SCHEDULERS = [
    {},
    {"num_train_timesteps": 200},
    {"beta_end": 0.03, "variance_type": "fixed_large"},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    {"beta_schedule": "sigmoid", "beta_end": 0.05},
    {"trained_betas": list(np.linspace(0.001, 0.2, 50)), "num_train_timesteps": 50},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"beta_end": 0.03, "rescale_betas_zero_snr": True, "prediction_type": "sample"},
]


@pytest.mark.filterwarnings("ignore:x_T keeps")
@pytest.mark.parametrize("options", SCHEDULERS, ids=[",".join(options) for options in SCHEDULERS])
def test_noise_levels(options):
    """Theirs are products in float32; and what we export of each makes the same of them again."""
    his = diffusers.DDPMScheduler(**options)
    parts = experiment.make(*layout.from_diffusers(CIFAR10 | TINY, dict(his.config)))
    again = diffusers.DDPMScheduler(**plain(layout.to_diffusers(parts)[1]))
    for scheduler in (his, again):
        found = jax.nn.sigmoid(parts.schedule.table[1:])
        np.testing.assert_allclose(found, scheduler.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-7)
    for name in ("variance_type", "prediction_type", "num_train_timesteps"):
        assert his.config[name] == again.config[name]


PIPELINES = [
    ({}, {}, "clip"),
    ({"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, {}, "clip"),
    ({"variance_type": "learned_range"}, {"out_channels": 6}, "clip"),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"attention_head_dim": 4}, "clip"),
    ({"prediction_type": "sample", "clip_sample": False}, {"norm_eps": 1e-5, "downsample_padding": 1}, "none"),
]


@pytest.mark.parametrize(("options", "changes", "limit"), PIPELINES, ids=["small", "large", "learned", "v", "x_0"])
def test_a_pipeline_and_our_sampler_make_the_same_pictures(call, tmp_path, options, changes, limit):
    """Their folder, our run, our export, their DDPMPipeline and our sampler with its noise: within one grey level."""
    config = CIFAR10 | TINY | changes
    first = diffusers.DDPMPipeline(their_net(config), diffusers.DDPMScheduler(**options))
    first.save_pretrained(tmp_path / "theirs")
    code, said, _ = call(interop, "import", tmp_path / "theirs", f"--workdir={tmp_path / 'run'}")
    assert code == 0
    assert f"--workdir={tmp_path / 'run'} --spacing=leading{' --limit=none' if limit == 'none' else ''}\n" in said
    assert call(interop, "export", tmp_path / "run", tmp_path / "ours")[0] == 0
    before, after = (released.read(tmp_path / name).arrays for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)  # bit for bit
    pipelines = [diffusers.DDPMPipeline.from_pretrained(tmp_path / name) for name in ("theirs", "ours")]
    steps, (parts, params, _) = 10, experiment.restore(tmp_path / "run", "ema")
    if limit == "none":  # which is no part of a run, so not of its export
        pipelines[1].scheduler.register_to_config(clip_sample=False)
    made = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        result = pipeline(batch_size=2, generator=torch.Generator().manual_seed(5), num_inference_steps=steps)
        made.append(np.stack([np.asarray(image) for image in result.images]).astype(int))
    np.testing.assert_array_equal(made[0], made[1])
    assert np.mean((made[0] > 0) & (made[0] < 255)) > 0.2  # not all black or white

    generator = torch.Generator().manual_seed(5)
    noises = [np.moveaxis(torch.randn((2, 3, 8, 8), generator=generator).numpy(), 1, -1) for _ in range(steps)]
    noises.append(0 * noises[0])  # the step to clean data has none
    sampler = samplers.make_sampler("ddpm", parts.schedule, {"variance": parts.config.diffusion.variance})
    make = diffusion.make_denoiser_with_variance if sampler.needs_variance else diffusion.make_denoiser
    predict = make(parts.net, parts.schedule, parts.parameterization, params, limit=diffusion.LIMITS[limit])

    @jax.jit
    def step(x, t, s, noise):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samplers.jax.random, "normal", lambda key, shape: noise)
            return sampler.step(predict, jax.random.key(0), x, t, s, None)[0]

    times = parts.schedule.times(steps, "leading")
    for i in range(2):
        x = noises[0][i]
        for (t, s), noise in zip(itertools.pairwise(times), noises[1:], strict=True):
            x = step(x, t, s, noise[i])
        assert np.abs(np.asarray(diffusion.to_uint8(x)).astype(int) - made[0][i]).max() <= 1


def test_an_average_that_their_training_saved(tmp_path):
    """EMAModel.save_pretrained after some updates: our import has the averaged parameters, bit for bit."""
    from diffusers.training_utils import EMAModel

    net = their_net(CIFAR10 | TINY)
    average = EMAModel(net.parameters(), use_ema_warmup=True, model_cls=diffusers.UNet2DModel, model_config=net.config)
    for seed in (1, 2):
        average.step(their_net(CIFAR10 | TINY, seed).parameters())
    average.save_pretrained(tmp_path / "unet_ema")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    found = released.read(tmp_path / "unet_ema")
    assert found.config == layout.from_diffusers(CIFAR10 | TINY, OLD_SCHEDULER)[0]
    names = [name for name, _ in net.named_parameters()]
    assert set(names) == found.arrays.keys()
    for name, leaf in zip(names, average.shadow_params, strict=True):
        np.testing.assert_array_equal(found.arrays[name], leaf.numpy())

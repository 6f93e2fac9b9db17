"""Weights in and out, held against two folders that diffusers 0.42.1 has written, with what its network puts out.

tests/released/old is flat, with the attention's names of before 0.15 and the conventions of the paper's code; new is
what DDPMPipeline.save_pretrained makes of the options of diffusers' own training script, but for an epsilon of 1e-3,
which shows in every norm. The weights are random, also where training starts at zero. expected.npz has four x, two of
them of size 1e-3, diffusers' t and its output in float64. test_peers_interop.py asks diffusers itself.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import make_run, random_params
from published import CIFAR10, OLD_SCHEDULER, PAPER_256, TRAIN_UNCONDITIONAL
from safetensors.numpy import load_file, save_file

from configs import celebahq256, cifar10
from ddpm_jax import checkpoint, experiment, runs, schedules, trees
from ddpm_jax import config as configs
from ddpm_jax.commands import evaluate, sample
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.interop import __main__ as interop
from ddpm_jax.interop import layout, released, tensors

RELEASED = Path(__file__).parent / "released"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """{name: folder of the run} of the two released folders."""
    made = {}
    for name in ("old", "new"):
        found = released.read(RELEASED / name)
        parts = experiment.make(found.config, found.shape)
        template = experiment.params_shape(parts)
        made[name] = tmp_path_factory.mktemp("imported") / name
        interop.write_run(parts, tensors.fit(found.arrays, template, found.spelling, name), made[name])
    return made


@pytest.fixture
def folder(tmp_path):
    """A copy of the old folder, to be broken."""
    return Path(shutil.copytree(RELEASED / "old", tmp_path / "ddpm"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def same(one, other):
    one, other = trees.flat(one), trees.flat(other)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])


@pytest.mark.parametrize("name", ["old", "new"])
def test_an_imported_network_puts_out_what_diffusers_does(imported, name):
    parts, params, step = experiment.restore(imported[name], "ema")
    assert step == 0
    same(params, experiment.restore(imported[name], "raw")[1])
    wanted = np.load(RELEASED / name / "expected.npz")
    x, output = (np.moveaxis(wanted[key], 1, -1) for key in ("x", "output"))
    found = jax.jit(jax.vmap(parts.net, (None, 0, 0)))(params, x, wanted["t"] + 1)
    for mine, his in zip(found, output, strict=True):
        assert np.abs(mine - his).max() < 1e-5 * np.abs(his).max()


def test_published_networks_have_the_papers_size_and_options():
    for unet, count in ((CIFAR10, 35_746_307), (PAPER_256, 113_673_219), (TRAIN_UNCONDITIONAL, 113_673_219)):
        config, shape = layout.from_diffusers(unet, OLD_SCHEDULER)
        assert shape == (unet["sample_size"], unet["sample_size"], 3)
        assert experiment.parameter_count(experiment.make(config, shape)) == count
    for unet, variance, paper in ((CIFAR10, "fixed_large", cifar10), (PAPER_256, "fixed_small", celebahq256)):
        config, _ = layout.from_diffusers(unet, OLD_SCHEDULER | {"variance_type": variance})
        own = paper.get_config()
        assert dataclasses.replace(config.model, dropout=own.model.dropout) == own.model
        assert config.diffusion == own.diffusion


def test_an_imported_run_is_sampled_evaluated_and_trained_on(call, script, run, tmp_path):
    """Each by one command. The first step of the warm-up moves nothing: its checkpoint has the imported bits."""
    trained, _, params, images = run
    np.savez(tmp_path / "images.npz", images=images)
    source, workdir = f"npz:{tmp_path / 'images.npz'}", tmp_path / "run"
    assert call(interop, "export", trained, tmp_path / "ddpm")[0] == 0
    assert call(interop, "import", tmp_path / "ddpm", f"--workdir={tmp_path / 'other'}", f"--source={source}")[0] == 0
    assert call(evaluate, f"--workdir={tmp_path / 'other'}", "--metrics=mse", "--num=8", "--steps=2")[0] == 0
    assert json.loads((tmp_path / "other" / "evaluation.json").read_text())["checkpoint_step"] == 0

    code, said, _ = call(interop, "import", tmp_path / "ddpm", f"--workdir={workdir}")
    assert code == 0
    assert f"python -m ddpm_jax sample --workdir={workdir} --spacing=leading\n" in said
    assert call(sample, f"--workdir={workdir}", "--num=8", "--steps=2")[0] == 0
    assert np.load(workdir / "out" / "samples.npz")["images"].shape == (8, 4, 4, 1)
    command = [*said.splitlines()[-1].replace("folder:DIR", source).split()[1:], "--cpu-devices=1"]
    for name, value in {"batch_size": 4, "warmup_steps": 2, "learning_rate": 0.01, "checkpoint_every": 1}.items():
        command.append(f"--config.train.{name}={value}")
    command += ["--config.train.steps=3", "--config.train.sample_num=1", "--config.train.sample_steps=1"]
    done = script(*command, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 0" in done.stdout
    same(params, experiment.restore(workdir, "raw", 1)[1])
    for weights in ("raw", "ema"):
        found = trees.flat(experiment.restore(workdir, weights, 3)[1])
        assert all(np.any(found[name] != leaf) for name, leaf in trees.flat(params).items())
    config = configs.load(workdir / "config.json")
    assert config.data.source == source
    with pytest.raises(ConfigError, match=r"train.seed is 0 there, 1 here"):
        runs.check(workdir, configs.replace(config, {"train.seed": 1}))


def test_what_may_change_before_anything_is_trained(imported):
    """Data and training, without --allow-change; but never the network or the process that was imported."""
    config = configs.load(imported["old"] / "config.json")
    runs.check(imported["old"], configs.replace(config, {"data.source": "digits", "train.batch_size": 3}))
    for name, value in (("model.norm_eps", 1e-5), ("model.cos_first", True), ("diffusion.variance", "fixedsmall")):
        with pytest.raises(ConfigError, match=f"{name} is .* there"):
            runs.check(imported["old"], configs.replace(config, {name: value}))


def test_import_and_export_of_a_folder_are_the_identity(imported, call, tmp_path):
    for name, weights, part in (("old", WEIGHTS, ""), ("new", f"unet/{WEIGHTS}", "unet")):
        assert call(interop, "export", imported[name], tmp_path / name)[0] == 0
        before = tensors.newer(load_file(RELEASED / name / weights))
        after = load_file(tmp_path / name / "unet" / WEIGHTS)
        same(before, after)
        for file, there in (("config.json", part), ("scheduler_config.json", "scheduler" if part else "")):
            old = json.loads((RELEASED / name / there / file).read_text())
            new = json.loads((tmp_path / name / ("unet" if file == "config.json" else "scheduler") / file).read_text())
            meant = {"attn_norm_num_groups": old.get("norm_num_groups"), "_diffusers_version": None}  # None means that
            assert {key: meant.get(key, new[key]) for key in old if key not in meant} == {
                key: value for key, value in old.items() if key not in meant
            }
    assert (tmp_path / "new" / "model_index.json").exists()


def small(model=None, **diffusion):
    """The Experiment of make_run with other options, without a run."""
    options = {"channels": 4, "multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (), "groups": 2}
    config = configs.Config(
        model=configs.Model(**options | (model or {})),
        diffusion=configs.Diffusion(**{"schedule": "cosine", "T": 100} | diffusion),
    )
    return experiment.make(config, (4, 4, 1))


def test_export_and_import_of_a_run_are_the_identity(call, run, tmp_path):
    workdir, parts, params, _ = run
    for there in ("folder", "file.safetensors"):
        code, said, _ = call(interop, "export", workdir, tmp_path / there)
        assert code == 0
        assert said == f"wrote step 5 of {workdir}, ema weights, to {tmp_path / there}\n"
        assert call(interop, "import", tmp_path / there, f"--workdir={tmp_path / there}_run")[0] == 0
        again, found, _ = experiment.restore(Path(f"{tmp_path / there}_run"), "ema")
        same(params, found)
        assert again.shape == parts.shape
        assert again.config.model == parts.config.model
        assert again.config.diffusion == parts.config.diffusion
    assert again.config == parts.config  # of the single file


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"parameterization": "v", "error": "output", "zero_terminal_snr": True}, {}),
        ({"parameterization": "x_0", "error": "output", "schedule": "quadratic"}, {}),
        ({"schedule": "linear", "betas": tuple(np.linspace(0.1, 0.6, 100) ** 3)}, {}),
        ({"schedule": "linear", "variance": "learned", "model": {"scale_shift": True}}, {}),
        ({"variance": "fixedsmall", "model": {"num_heads": 2}}, {"num_heads": 1, "head_channels": 2}),
        (
            {"model": {"head_channels": 4, "attention_resolutions": (4,), "norm_eps": 1e-3, "symmetric_halving": True}},
            {},
        ),
        ({"model": {"frequency_shift": 0, "multipliers": (1, 3), "attention_resolutions": (2,)}}, {}),
        ({"model": {"cos_first": True, "dropout": 0.3, "num_res_blocks": 3}}, {}),
    ],
)
def test_options_come_back_from_diffusers_configs(options, model):
    """Heads of a number as heads of a size."""
    parts = small(**options)
    config, shape = layout.from_diffusers(*json.loads(json.dumps(layout.to_diffusers(parts))))
    assert shape == parts.shape
    assert config.diffusion == parts.config.diffusion
    assert config.model == dataclasses.replace(parts.config.model, **model)


def test_automatic_groups_are_exported_where_all_norms_have_the_same():
    config = configs.Config(model=configs.Model(channels=32, multipliers=(1, 2), groups="auto"))
    assert layout.to_diffusers(experiment.make(config, (16, 16, 3)))[0]["norm_num_groups"] == 32


@pytest.mark.parametrize(
    ("scheduler", "schedule", "signal"),
    [
        ({"num_train_timesteps": 1000}, "linear", 4.0358e-5),  # published: Ho et al. 2020
        ({"beta_schedule": "squaredcos_cap_v2"}, "cosine", None),
        ({"beta_schedule": "scaled_linear"}, "quadratic", None),
        ({"beta_schedule": "linear", "num_train_timesteps": 100}, "", np.prod(1 - np.linspace(1e-4, 0.02, 100))),
        ({"beta_end": 0.03}, "", np.prod(1 - np.linspace(1e-4, 0.03, 1000))),
        ({"beta_schedule": "sigmoid", "beta_end": 0.05}, "", None),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.5, 0.9]}, "", 0.9 * 0.5 * 0.1),
    ],
)
def test_schedules(scheduler, schedule, signal):
    """By our name where the betas are ours (linear is not at T=100, which ours scales), else as they are."""
    config, _ = layout.from_diffusers(CIFAR10, scheduler)
    names = config.diffusion
    assert bool(names.betas) == (not schedule)
    assert names.schedule == schedule or names.betas
    table = schedules.make_schedule(names.schedule, names.T, names.betas)
    assert scheduler.get("num_train_timesteps", 1000) == table.T
    if signal:
        assert jax.nn.sigmoid(table.logsnr(table.T)) == pytest.approx(signal, rel=1e-4)


UNET_REFUSALS = [
    ({"act_fn": "mish"}, 'UNet2DModel with act_fn="mish" cannot be taken; only "silu" or "swish" can'),
    ({"center_input_sample": True}, "center_input_sample=true cannot be taken; only false can"),
    ({"time_embedding_type": "fourier"}, 'time_embedding_type="fourier" .* only "positional" can'),
    ({"freq_shift": 2}, "freq_shift=2 cannot be taken; only 0 or 1 can"),
    ({"downsample_padding": 2}, "downsample_padding=2 .* only 0 or 1 can"),
    ({"downsample_type": "resnet"}, 'downsample_type="resnet"'),
    ({"upsample_type": "resnet"}, 'upsample_type="resnet"'),
    ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor=1.4 cannot be taken; only 1 can"),
    ({"mid_block_type": None}, "mid_block_type=null"),
    ({"add_attention": False}, "add_attention=false"),
    ({"class_embed_type": "timestep"}, 'class_embed_type="timestep"'),
    ({"num_class_embeds": 10}, "num_class_embeds=10 cannot be taken; only null can"),
    ({"resnet_time_scale_shift": "spatial"}, 'resnet_time_scale_shift="spatial" .* only "default" or "scale_shift"'),
    ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=null cannot be taken; only 2 can"),
    ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4 cannot be taken; only 2 can"),
    ({"time_embedding_dim": 99}, "time_embedding_dim=99 cannot be taken; only 16 can"),
    ({"block_out_channels": [4, 10]}, r"block_out_channels=\[4, 10\] .* multiple of the first"),
    ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types=.* only 2 of DownBlock2D or Attn"),
    ({"up_block_types": ["AttnUpBlock2D"]}, "up_block_types=.* only 2 of UpBlock2D or AttnUpBlock2D can"),
    (
        {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
        r"at the levels \[1\] on the way down and \[0\] on the way up",
    ),
    ({"sample_size": None}, "sample_size=null: write the side"),
    ({"sample_size": "8"}, "sample_size=8 with in_channels=3 cannot be taken"),
    ({"in_channels": 4, "out_channels": 4}, "in_channels=4 cannot be taken; only 1 or 3 channels can"),
    ({"out_channels": 6}, "out_channels=6 does not go with in_channels=3 and variance_type=fixed_large, .* need 3"),
    ({"attention_head_dim": 3}, "head_channels=3 does not divide the 8 channels"),
    ({"layers_per_block": "two"}, "model.num_res_blocks=two is not a whole number"),
    ({"block_out_channels": ["a", "b"]}, "the configs hold a value of the wrong kind"),
    ({"block_out_channels": []}, "the configs hold a value of the wrong kind"),
    ({"resnet_skip": True, "other": 1}, "UNet2DModel with resnet_skip=true, other=1 cannot be taken: no such key is"),
    ({"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel cannot be taken; only a UNet2DModel"),
]
SCHEDULER_REFUSALS = [
    ({"variance_type": "learned"}, 'variance_type="learned" cannot be taken; only "fixed_small"'),
    ({"variance_type": "learned_range"}, "out_channels=3 does not go with .*variance_type=learned_range, .* need 6"),
    ({"prediction_type": "flow"}, 'prediction_type="flow"'),
    ({"thresholding": True}, "thresholding=true"),
    ({"clip_sample_range": 2.0}, "clip_sample_range=2.0"),
    ({"beta_schedule": "laplace"}, 'beta_schedule="laplace"'),
    ({"steps_offset": 1}, "steps_offset=1"),
    ({"timestep_spacing": "karras"}, 'timestep_spacing="karras"'),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 numbers, but num_train_timesteps=1000"),
    ({"beta_end": 1.5}, "diffusion.betas=.* must be a list, each above 0 and at most 1"),
    ({"beta_start": "small"}, "the configs hold a value of the wrong kind"),
    ({"rescale_betas_zero_snr": True}, "leaves no signal at T, where diffusion.parameterization=eps"),
    ({"predict_epsilon": False}, "DDPMScheduler with predict_epsilon=false cannot be taken: no such key is known"),
    ({"_class_name": "PNDMScheduler"}, "_class_name=PNDMScheduler cannot be taken; only a DDPMScheduler can"),
]


@pytest.mark.filterwarnings("ignore:x_T keeps")
@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [("config.json", *row) for row in UNET_REFUSALS] + [("scheduler_config.json", *row) for row in SCHEDULER_REFUSALS],
    ids=[",".join(changes) for changes, _ in UNET_REFUSALS + SCHEDULER_REFUSALS],
)
def test_what_differs_is_refused_by_name(call, folder, tmp_path, file, changes, message):
    edit(folder / file, **changes)
    code, _, said = call(interop, "import", folder, f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert said.count("\n") == 1
    assert_matches(message, said)
    assert not (tmp_path / "run").exists()


def assert_matches(message, said):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_harmless_keys_are_taken(folder):
    config = released.read(folder).config
    edit(folder / "config.json", _name_or_path="x", num_train_timesteps=5, act_fn="swish", attn_norm_num_groups=2)
    edit(folder / "scheduler_config.json", _anything=[1], dynamic_thresholding_ratio=0.5, sample_max_value=3)
    assert released.read(folder).config == config


def test_what_belongs_to_sampling_is_said(folder):
    edit(folder / "scheduler_config.json", clip_sample=False, timestep_spacing="trailing")
    assert released.read(folder).sampling == " --spacing=trailing --limit=none"


def broken(folder, change):
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS)


def test_tensors_that_do_not_fit_are_named(call, folder, tmp_path):
    def change(arrays):
        arrays["conv_in.weight"] = arrays["conv_in.weight"].transpose(0, 1, 3, 2)[..., :2].copy()
        arrays["extra.weight"] = arrays.pop("mid_block.attentions.0.query.bias")

    broken(folder, change)
    code, _, said = call(interop, "import", folder, f"--workdir={tmp_path / 'run'}")
    assert code == 4
    assert "conv_in.weight is [4, 3, 3, 2] there, [4, 3, 3, 3] in the network" in said
    assert "extra.weight is no part of the network" in said
    assert "mid_block.attentions.0.to_q.bias is missing" in said
    edit(folder / "config.json", layers_per_block=2)
    assert_matches("(is missing; .*){5}; and [0-9]+ more$", call(interop, "import", folder, "--workdir=x")[2].strip())
    broken(folder, lambda arrays: arrays.update({"mid_block.attentions.0.to_k.bias": np.zeros(8, np.float32)}))
    edit(folder / "config.json", layers_per_block=1)
    said = call(interop, "import", folder, "--workdir=x")[2]
    assert "mid_block.attentions.0.key.bias is no part of the network" in said


def test_matrices_may_be_convolutions_of_one_pixel(folder, imported):
    def change(arrays):
        for name in [name for name in arrays if name.endswith(("query.weight", "proj_attn.weight"))]:
            arrays[name] = arrays[name][..., None, None]

    broken(folder, change)
    found = released.read(folder)
    parts = experiment.make(found.config, found.shape)
    template = experiment.params_shape(parts)
    same(tensors.fit(found.arrays, template, found.spelling, ""), experiment.restore(imported["old"], "ema")[1])


def test_half_precision_becomes_float32_with_a_note(folder):
    whole = load_file(folder / WEIGHTS)["conv_in.weight"]
    for kind, name in ((np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")):
        half = whole.astype(kind)
        broken(folder, lambda arrays, half=half: arrays.update({"conv_in.weight": half}))
        found = released.read(folder)
        assert found.notes == [f"1 tensors of {name} became float32"]
        assert found.arrays["conv_in.weight"].dtype == np.float32
        np.testing.assert_array_equal(found.arrays["conv_in.weight"], half.astype(np.float32))
        shutil.copy(RELEASED / "old" / WEIGHTS, folder)
    broken(folder, lambda arrays: arrays.update({"conv_in.bias": np.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"holds other than F32, F16, BF16: conv_in\.bias is F64"):
        released.read(folder)


def test_values_that_are_not_finite_are_refused(call, folder):
    def change(arrays):
        arrays["conv_in.bias"][1], arrays["conv_out.bias"][0] = np.nan, np.inf

    broken(folder, change)
    code, _, said = call(interop, "import", folder, "--workdir=x")
    assert code == 4
    assert_matches("not finite, in conv_(in|out).bias, conv_(in|out).bias\n", said)


def test_files_that_cannot_be_read(call, folder, tmp_path):
    def said(code, path=folder):
        got, _, text = call(interop, "import", path, f"--workdir={tmp_path / 'run'}")
        assert got == code
        assert text.count("\n") == 1
        return text

    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    assert f"cannot read {folder / WEIGHTS}: " in said(4)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert f"there is no {WEIGHTS} in {folder}; there is diffusion_pytorch_model.fp16.safetensors" in said(4)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "diffusion_pytorch_model.bin is a pickle, which can run code and is not read; convert it" in said(4)
    assert "model.ckpt is a pickle" in said(4, folder / "model.ckpt")
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    assert "are in several files; save them as one" in said(4)
    (folder / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    assert "tells of a LDMPipeline; only a DDPMPipeline can be taken" in said(2)
    (folder / "model_index.json").unlink()
    (folder / "config.json").write_text("{")
    assert f"cannot read {folder / 'config.json'}: " in said(2)
    (folder / "config.json").write_text("[]")
    assert "config.json does not hold a config" in said(2)
    (folder / "config.json").unlink()
    assert f"there is no {folder / 'config.json'}" in said(2)
    assert f"there is no {tmp_path / 'nowhere'}" in said(4, tmp_path / "nowhere")


def test_a_single_file_is_checked(call, run, tmp_path):
    file = tmp_path / "digits.safetensors"
    assert call(interop, "export", run[0], file, "--weights=raw")[0] == 0
    whole = file.read_bytes()
    for wrong in (
        whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:],  # in the last tensor
        whole.replace(b'\\"T\\": 12', b'\\"T\\": 13'),
        whole.replace(b'"[4, 4, 1]"', b'"[8, 8, 1]"'),
    ):
        assert wrong != whole
        file.write_bytes(wrong)
        code, _, said = call(interop, "import", file, "--workdir=x")
        assert code == 4
        assert "is damaged: its checksum differs" in said
    code, _, said = call(interop, "import", RELEASED / "old" / WEIGHTS, "--workdir=x")
    assert code == 2
    assert "has no ddpm_jax config inside; of diffusers' layout give the folder" in said


EXPORT_REFUSALS = [
    ({"model": {"num_classes": 3}}, "model.num_classes=3: its DDPMPipeline gives no labels"),
    ({"self_conditioning": True}, "diffusion.self_conditioning"),
    ({"schedule": "cosine_logsnr"}, "diffusion.schedule=cosine_logsnr, a continuous one"),
    ({"base_resolution": 8}, "diffusion.base_resolution=8"),
    ({"model": {"multipliers": (2, 2)}}, "model.multipliers=2,2, the first not being 1"),
    ({"model": {"multipliers": (1, 2), "num_heads": 2, "attention_resolutions": (4,)}}, "model.num_heads=2 where"),
    ({"model": {"multipliers": (1, 9), "groups": "auto"}}, "model.groups=auto, which here means 4, 8, 18, 20, 24"),
]


@pytest.mark.filterwarnings("ignore:x_T keeps")
@pytest.mark.parametrize(("options", "message"), EXPORT_REFUSALS, ids=[message for _, message in EXPORT_REFUSALS])
def test_what_diffusers_cannot_say_is_not_exported(tmp_path, options, message):
    parts = small(**options)
    refusal = f"diffusers' layout has no word for {message}.*; export to a FILE.safetensors"
    with pytest.raises(ConfigError, match=refusal):
        released.write(tmp_path / "out", parts, random_params(parts.init))
    assert not (tmp_path / "out").exists()


def test_an_arithmetic_that_stays_behind_is_said(call, tmp_path):
    workdir, *_ = make_run(tmp_path, model={"dtype": "bfloat16"})
    for out, told in (("out", True), ("out.safetensors", False)):
        code, said, _ = call(interop, "export", workdir, tmp_path / out)
        assert code == 0
        assert ("model.dtype=bfloat16 stays behind: diffusers computes in float32\n" in said) == told


def test_nothing_is_overwritten_unasked(call, imported, tmp_path):
    workdir, other = Path(shutil.copytree(imported["old"], tmp_path / "run")), RELEASED / "new"
    (workdir / "metrics.jsonl").write_text('{"step": 5}\n')
    code, _, said = call(interop, "import", other, f"--workdir={workdir}")
    assert code == 2
    assert "already holds a run; take another --workdir, or say --overwrite" in said
    assert call(interop, "import", other, f"--workdir={workdir}", "--overwrite")[0] == 0
    assert not (workdir / "metrics.jsonl").exists()
    assert checkpoint.steps(workdir / "checkpoints") == [0]
    same(experiment.restore(workdir, "ema")[1], experiment.restore(imported["new"], "ema")[1])
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert call(interop, "export", workdir, out)[0] == 0
        code, _, said = call(interop, "export", workdir, out)
        assert code == 2
        assert "already exists; take another --path, or say --overwrite" in said
        assert call(interop, "export", workdir, out, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "'' is neither import nor export"),
        (("improt",), "'improt' is neither import nor export"),
        (("import",), "--path is missing"),
        (("import", "there"), "--workdir is missing"),
        (("export", "there"), "--path is missing"),
        (("import", "there", "other"), "unexpected argument 'other'"),
        (("export", "there", "other", "--wieghts=raw"), "unknown option --wieghts; did you mean --weights"),
    ],
)
def test_the_command_line(call, words, message):
    code, _, said = call(interop, *words)
    assert code == 2
    assert message in said

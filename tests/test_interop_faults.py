"""What in files from elsewhere differs: refused by name, taken with a note, or harmless; and nothing is overwritten."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_trees, random_params, small_experiment
from published import RELEASED, WEIGHTS
from safetensors.numpy import load_file, save_file

from ddpm_jax import experiment
from ddpm_jax.errors import CheckpointError, ConfigError
from ddpm_jax.interop import __main__ as interop
from ddpm_jax.interop import released, tensors
from ddpm_jax.run import checkpoint


@pytest.fixture
def folder(tmp_path):
    """A copy of the old folder, to be broken."""
    return Path(shutil.copytree(RELEASED / "old", tmp_path / "ddpm"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


UNET_REFUSALS = [
    ({"act_fn": "mish"}, 'UNet2DModel with act_fn="mish" is not supported; only "silu" or "swish" is'),
    ({"center_input_sample": True}, "center_input_sample=true is not supported; only false is"),
    ({"time_embedding_type": "fourier"}, 'time_embedding_type="fourier" .* only "positional" is'),
    ({"freq_shift": 2}, "freq_shift=2 is not supported; only 0 or 1 is"),
    ({"downsample_padding": 2}, "downsample_padding=2 .* only 0 or 1 is"),
    ({"downsample_type": "resnet"}, 'downsample_type="resnet"'),
    ({"upsample_type": "resnet"}, 'upsample_type="resnet"'),
    ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor=1.4 is not supported; only 1 is"),
    ({"mid_block_type": None}, "mid_block_type=null"),
    ({"add_attention": False}, "add_attention=false"),
    ({"class_embed_type": "timestep"}, 'class_embed_type="timestep"'),
    ({"num_class_embeds": 10}, "num_class_embeds=10 is not supported; only null is"),
    ({"resnet_time_scale_shift": "spatial"}, 'resnet_time_scale_shift="spatial" .* only "default" or "scale_shift"'),
    ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=null is not supported; only 2 is"),
    ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4 is not supported; only 2 is"),
    ({"time_embedding_dim": 99}, "time_embedding_dim=99 is not supported; only 16 is"),
    ({"block_out_channels": [4, 10]}, r"block_out_channels=\[4, 10\] .* multiple of the first"),
    ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types=.* needs 2 of DownBlock2D or Attn"),
    ({"up_block_types": ["AttnUpBlock2D"]}, "up_block_types=.* needs 2 of UpBlock2D or AttnUpBlock2D"),
    (
        {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
        r"attention at levels \[1\] on the way down and \[0\] on the way up",
    ),
    ({"sample_size": None}, "sample_size=null: write the side"),
    ({"sample_size": "8"}, "sample_size=8 with in_channels=3 is not supported"),
    ({"in_channels": 4, "out_channels": 4}, "in_channels=4 is not supported; only 1 or 3 channels are"),
    ({"out_channels": 6}, "out_channels=6 does not go with in_channels=3 and variance_type=fixed_large, .* need 3"),
    ({"attention_head_dim": 3}, "head_channels=3 does not divide the 8 channels"),
    ({"layers_per_block": "two"}, "model.num_res_blocks=two is not a whole number"),
    ({"block_out_channels": ["a", "b"]}, "the configs hold a value of the wrong kind"),
    ({"block_out_channels": []}, "the configs hold a value of the wrong kind"),
    ({"resnet_skip": True, "other": 1}, "UNet2DModel with resnet_skip=true, other=1 is not supported: unknown key"),
    ({"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel is not supported; only a UNet2DModel"),
]


SCHEDULER_REFUSALS = [
    ({"variance_type": "learned"}, 'variance_type="learned" is not supported; only "fixed_small"'),
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
    ({"predict_epsilon": False}, "DDPMScheduler with predict_epsilon=false is not supported: unknown key"),
    ({"_class_name": "PNDMScheduler"}, "_class_name=PNDMScheduler is not supported; only a DDPMScheduler is"),
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


EMA = {  # as EMAModel.save_pretrained of diffusers 0.42 writes them into config.json
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 500,
    "power": 0.75,
    "update_after_step": 0,
    "use_ema_warmup": True,
}


def test_an_average_in_the_folders_of_a_training_run(folder, tmp_path):
    """RUN/checkpoint-500 has unet, unet_ema and no scheduler; RUN/scheduler is written at the end, beside them."""
    wanted, checkpoint = released.read(folder), tmp_path / "theirs" / "checkpoint-500"
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder, checkpoint / name, ignore=lambda *_: ["scheduler_config.json"])
    edit(checkpoint / "unet_ema" / "config.json", **EMA)
    with pytest.raises(ConfigError, match=f"there is no {checkpoint}/unet_ema/scheduler_config.json"):
        released.read(checkpoint / "unet_ema")
    (tmp_path / "theirs" / "scheduler").mkdir()
    noise = shutil.copy(folder / "scheduler_config.json", tmp_path / "theirs" / "scheduler")
    found = released.read(checkpoint / "unet_ema")
    assert found.config == wanted.config
    assert found.notes == [f"the noise schedule is from {noise}"]
    average = f"{checkpoint}/unet_ema, an average of the parameters, is ignored; import that folder to use it instead"
    assert released.read(checkpoint).notes == [*found.notes, average]


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
    assert "conv_in.weight has shape [4, 3, 3, 2] in the file, [4, 3, 3, 3] in the network" in said
    assert "extra.weight is not in the network" in said
    assert "mid_block.attentions.0.to_q.bias is missing" in said
    edit(folder / "config.json", layers_per_block=2)
    assert_matches("(is missing; .*){5}; and [0-9]+ more$", call(interop, "import", folder, "--workdir=x")[2].strip())
    broken(folder, lambda arrays: arrays.update({"mid_block.attentions.0.to_k.bias": np.zeros(8, np.float32)}))
    edit(folder / "config.json", layers_per_block=1)
    said = call(interop, "import", folder, "--workdir=x")[2]
    assert "mid_block.attentions.0.key.bias is not in the network" in said


def test_matrices_may_be_convolutions_of_one_pixel(folder, imported):
    def change(arrays):
        for name in [name for name in arrays if name.endswith(("query.weight", "proj_attn.weight"))]:
            arrays[name] = arrays[name][..., None, None]

    broken(folder, change)
    found = released.read(folder)
    parts = experiment.make(found.config, found.shape)
    params = tensors.to_params(found.arrays, experiment.params_shape(parts), found.format, "")
    assert_same_trees(params, experiment.restore(imported["old"], "ema")[1])


def test_half_precision_becomes_float32_with_a_note(folder):
    whole = load_file(folder / WEIGHTS)["conv_in.weight"]
    for kind, name in ((np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")):
        half = whole.astype(kind)
        broken(folder, lambda arrays, half=half: arrays.update({"conv_in.weight": half}))
        found = released.read(folder)
        assert found.notes == [f"1 tensors converted from {name} to float32"]
        assert found.arrays["conv_in.weight"].dtype == np.float32
        np.testing.assert_array_equal(found.arrays["conv_in.weight"], half.astype(np.float32))
        shutil.copy(RELEASED / "old" / WEIGHTS, folder)
    broken(folder, lambda arrays: arrays.update({"conv_in.bias": np.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"has types other than F32, F16, BF16: conv_in\.bias is F64"):
        released.read(folder)


def test_values_that_are_not_finite_are_refused(call, folder):
    def change(arrays):
        arrays["conv_in.bias"][1], arrays["conv_out.bias"][0] = np.nan, np.inf

    broken(folder, change)
    code, _, said = call(interop, "import", folder, "--workdir=x")
    assert code == 4
    assert_matches("non-finite values in conv_(in|out).bias, conv_(in|out).bias\n", said)


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
    assert (
        "diffusion_pytorch_model.bin is a pickle, which can run code, and is not read; if you trust it, convert it"
        in said(4)
    )
    assert "model.ckpt is a pickle" in said(4, folder / "model.ckpt")
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    assert "are sharded; save them as one file" in said(4)
    (folder / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    assert "describes a LDMPipeline; only a DDPMPipeline is supported" in said(2)
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
    assert "contains no ddpm_jax config; for diffusers' layout give the folder" in said


EXPORT_REFUSALS = [
    (
        {"model": {"network": "dit", "multipliers": (1, 2, 2, 2), "num_res_blocks": 2, "groups": 32}},
        "model.network=dit",
    ),
    ({"model": {"patch": 2}}, "model.patch=2"),
    ({"model": {"resample": "residual"}}, "model.resample=residual"),
    ({"model": {"num_classes": 3}}, "model.num_classes=3: its DDPMPipeline gives no labels"),
    ({"self_conditioning": True}, "diffusion.self_conditioning"),
    ({"schedule": "cosine_logsnr"}, "diffusion.schedule=cosine_logsnr, a continuous one"),
    ({"parameterization": "edm"}, "diffusion.parameterization=edm"),
    ({"base_resolution": 8}, "diffusion.base_resolution=8"),
    ({"model": {"multipliers": (2, 2)}}, "model.multipliers=2,2, whose first is not 1"),
    ({"model": {"multipliers": (1, 2), "num_heads": 2, "attention_resolutions": (4,)}}, "model.num_heads=2 where"),
    ({"model": {"multipliers": (1, 9), "groups": "auto"}}, "model.groups=auto, which here means 4, 8, 18, 20, 24"),
]


@pytest.mark.filterwarnings("ignore:x_T keeps")
@pytest.mark.parametrize(("options", "message"), EXPORT_REFUSALS, ids=[message for _, message in EXPORT_REFUSALS])
def test_what_diffusers_cannot_say_is_not_exported(tmp_path, options, message):
    parts = small_experiment(**options)
    refusal = f"diffusers' layout cannot express {message}.*; export to a FILE.safetensors"
    with pytest.raises(ConfigError, match=refusal):
        released.write(tmp_path / "out", parts, random_params(parts.init))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(call, imported, tmp_path):
    workdir, other = Path(shutil.copytree(imported["old"], tmp_path / "run")), RELEASED / "new"
    (workdir / "metrics.jsonl").write_text('{"step": 5}\n')
    code, _, said = call(interop, "import", other, f"--workdir={workdir}")
    assert code == 2
    assert "already holds a run; use another --workdir, or add --overwrite" in said
    assert call(interop, "import", other, f"--workdir={workdir}", "--overwrite")[0] == 0
    assert not (workdir / "metrics.jsonl").exists()
    assert checkpoint.steps(workdir / "checkpoints") == [0]
    assert_same_trees(experiment.restore(workdir, "ema")[1], experiment.restore(imported["new"], "ema")[1])
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert call(interop, "export", workdir, out)[0] == 0
        code, _, said = call(interop, "export", workdir, out)
        assert code == 2
        assert "already exists; use another --path, or add --overwrite" in said
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

"""Weights in and out, held against two folders that diffusers 0.42.1 has written, with what its network puts out.

tests/released/old is flat, with the attention's names of before 0.15 and the conventions of the paper's code; new is
what DDPMPipeline.save_pretrained makes of the options of diffusers' own training script, but for an epsilon of 1e-3,
which shows in every norm. The weights are random, also where training starts at zero. expected.npz has four x, two of
them of size 1e-3, diffusers' t and its output in float64. test_peers_interop.py asks diffusers itself.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import assert_same_trees, make_run, small_experiment
from published import CIFAR10, OLD_SCHEDULER, PAPER_256, RELEASED, TRAIN_UNCONDITIONAL, WEIGHTS
from safetensors.numpy import load_file

from configs import celebahq256, cifar10
from ddpm_jax import config as configs
from ddpm_jax import experiment, schedules
from ddpm_jax.commands import evaluate, sample
from ddpm_jax.errors import ConfigError
from ddpm_jax.interop import __main__ as interop
from ddpm_jax.interop import layout, tensors
from ddpm_jax.run import folder as run_folder
from ddpm_jax.run import trees


@pytest.mark.parametrize("name", ["old", "new"])
def test_an_imported_network_puts_out_what_diffusers_does(imported, name):
    parts, params, step = experiment.restore(imported[name], "ema")
    assert step == 0
    assert_same_trees(params, experiment.restore(imported[name], "raw")[1])
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


@pytest.mark.slow
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
    assert_same_trees(params, experiment.restore(workdir, "raw", 1)[1])
    for weights in ("raw", "ema"):
        found = trees.flat(experiment.restore(workdir, weights, 3)[1])
        assert all(np.any(found[name] != leaf) for name, leaf in trees.flat(params).items())
    config = configs.load(workdir / "config.json")
    assert config.data.source == source
    with pytest.raises(ConfigError, match=r"train.seed is 0 there, 1 here"):
        run_folder.check(workdir, configs.replace(config, {"train.seed": 1}))


def test_what_may_change_before_anything_is_trained(imported):
    """Data and training, without --allow-change; but never the network or the process that was imported."""
    config = configs.load(imported["old"] / "config.json")
    run_folder.check(imported["old"], configs.replace(config, {"data.source": "digits", "train.batch_size": 3}))
    for name, value in (("model.norm_eps", 1e-5), ("model.cos_first", True), ("diffusion.variance", "fixedsmall")):
        with pytest.raises(ConfigError, match=f"{name} is .* there"):
            run_folder.check(imported["old"], configs.replace(config, {name: value}))


def test_import_and_export_of_a_folder_are_the_identity(imported, call, tmp_path):
    for name, weights, part in (("old", WEIGHTS, ""), ("new", f"unet/{WEIGHTS}", "unet")):
        assert call(interop, "export", imported[name], tmp_path / name)[0] == 0
        before = tensors.rename_old_attention(load_file(RELEASED / name / weights))
        after = load_file(tmp_path / name / "unet" / WEIGHTS)
        assert_same_trees(before, after)
        for file, there in (("config.json", part), ("scheduler_config.json", "scheduler" if part else "")):
            old = json.loads((RELEASED / name / there / file).read_text())
            new = json.loads((tmp_path / name / ("unet" if file == "config.json" else "scheduler") / file).read_text())
            meant = {"attn_norm_num_groups": old.get("norm_num_groups"), "_diffusers_version": None}  # None means that
            assert {key: meant.get(key, new[key]) for key in old if key not in meant} == {
                key: value for key, value in old.items() if key not in meant
            }
    assert (tmp_path / "new" / "model_index.json").exists()


def test_export_and_import_of_a_run_are_the_identity(call, run, tmp_path):
    workdir, parts, params, _ = run
    for there in ("folder", "file.safetensors"):
        code, said, _ = call(interop, "export", workdir, tmp_path / there)
        assert code == 0
        assert said == f"wrote step 5 of {workdir}, ema weights, to {tmp_path / there}\n"
        assert call(interop, "import", tmp_path / there, f"--workdir={tmp_path / there}_run")[0] == 0
        again, found, _ = experiment.restore(Path(f"{tmp_path / there}_run"), "ema")
        assert_same_trees(params, found)
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
    parts = small_experiment(**options)
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


def test_an_arithmetic_that_stays_behind_is_said(call, tmp_path):
    workdir, *_ = make_run(tmp_path, model={"dtype": "bfloat16"})
    for out, told in (("out", True), ("out.safetensors", False)):
        code, said, _ = call(interop, "export", workdir, tmp_path / out)
        assert code == 0
        assert ("model.dtype=bfloat16 is not exported: diffusers computes in float32\n" in said) == told

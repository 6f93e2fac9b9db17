"""Read and write released weights: a folder in diffusers' layout, or one safetensors file that contains the config."""

import json
import zlib
from typing import NamedTuple

from ddpm_jax import config as configs
from ddpm_jax.config import Config
from ddpm_jax.errors import CheckpointError, ConfigError, writing
from ddpm_jax.interop import layout, tensors
from ddpm_jax.run import trees
from ddpm_jax.run.files import write_atomic

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Released(NamedTuple):
    config: Config
    shape: tuple[int, int, int]  # of an image
    arrays: dict  # name -> float32 array
    format: tensors.TensorFormat  # of the arrays
    notes: list[str]  # messages for the user
    sampling: str  # the options of sample.py that match its own pipeline


def is_file(path):
    return path.suffix == ".safetensors"


def names(path):
    """The files that `write` creates for `path`."""
    if is_file(path):
        return [path]
    return [
        path / "unet" / WEIGHTS,
        path / "unet" / "config.json",
        path / "scheduler" / "scheduler_config.json",
        path / "model_index.json",
    ]


def write(path, parts, params, **metadata):
    """Write an Experiment's parameters; the `metadata`, all text, is only in a single file."""
    if is_file(path):
        arrays = tensors.from_params(params, tensors.OURS)
        metadata |= {"config": configs.to_json(parts.config), "shape": json.dumps(parts.shape)}
        tensors.write(path, arrays, metadata | {"crc32": _digest(arrays, metadata)})
        return
    unet, scheduler = layout.to_diffusers(parts)
    weights, *files = names(path)
    format = tensors.diffusers_format(len(parts.config.model.multipliers))
    params = {name: part for name, part in params.items() if name != "augmentation"}  # adds nothing outside training
    tensors.write(weights, tensors.from_params(params, format), {"format": "pt"})
    for file, content in zip(files, (unet, scheduler, PIPELINE), strict=True):
        with writing(file):
            write_atomic(file, (json.dumps(content, indent=2) + "\n").encode())


def read(path):
    """The Released at `path`. Raises ConfigError or CheckpointError naming what is not supported."""
    if path.suffix in PICKLES:
        raise _pickle(path)
    if not path.exists():
        raise CheckpointError(f"there is no {path}")
    return _read_file(path) if is_file(path) else _read_folder(path)


def _digest(arrays, metadata):
    """CRC-32 of the arrays, the config and the shape."""
    return str(zlib.crc32((metadata["config"] + metadata["shape"]).encode(), trees.digest(arrays)))


def _read_file(path):
    arrays, metadata, notes = tensors.read(path)
    if not {"config", "shape", "crc32"} <= metadata.keys():
        raise ConfigError(f"{path} contains no ddpm_jax config; for diffusers' layout give the folder")
    if metadata["crc32"] != _digest(arrays, metadata):
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    config, shape = configs.from_json(metadata["config"], path), tuple(json.loads(metadata["shape"]))
    return Released(config, shape, arrays, tensors.OURS, notes, "")


def _read_folder(path):
    index = path / "model_index.json"
    kind = _json(index).get("_class_name") if index.exists() else PIPELINE["_class_name"]
    if kind != PIPELINE["_class_name"]:
        raise ConfigError(f"{index} describes a {kind}; only a {PIPELINE['_class_name']} is supported")
    unet, average = (path / part if (path / part).is_dir() else path for part in ("unet", "unet_ema"))
    file = _scheduler_file(path)
    scheduler = _json(file)
    try:
        config, shape = layout.from_diffusers(_json(unet / "config.json"), scheduler)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from error
    arrays, _, notes = tensors.read(_weights(unet))
    if path not in file.parents:
        notes = [*notes, f"the noise schedule is from {file}"]
    if average != path:
        notes = [*notes, f"{average}, an average of the parameters, is ignored; import that folder to use it instead"]
    format = tensors.diffusers_format(len(config.model.multipliers))
    return Released(config, shape, tensors.rename_old_attention(arrays), format, notes, layout.sampling(scheduler))


def _scheduler_file(path):
    """The scheduler's config in `path`, or above it: train_unconditional.py writes none into checkpoint-N/unet_ema."""
    name = "scheduler_config.json"
    places = [folder / part / name for folder in (path, *path.absolute().parents[:2]) for part in ("scheduler", "")]
    return next((file for file in places if file.exists()), path / name)


def _weights(folder):
    """The safetensors file of a folder; CheckpointError names what the folder contains instead."""
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    if (folder / f"{WEIGHTS}.index.json").exists():
        raise CheckpointError(
            f"the weights in {folder} are sharded; save them as one file: "
            f"UNet2DModel.from_pretrained({str(folder)!r}).save_pretrained(DIR, max_shard_size='99GB')"
        )
    for file in sorted(folder.glob("*")):
        if file.suffix in PICKLES:
            raise _pickle(file)
    others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
    raise CheckpointError(f"there is no {WEIGHTS} in {folder}" + (f"; there is {others}" if others else ""))


def _pickle(file):
    return CheckpointError(
        f"{file} is a pickle, which can run code, and is not read; if you trust it, convert it to safetensors with "
        f"diffusers: UNet2DModel.from_pretrained({str(file.parent)!r}).save_pretrained(DIR, safe_serialization=True)"
    )


def _json(path):
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a config")
    return content

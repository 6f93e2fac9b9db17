"""Convert configs: diffusers' UNet2DModel and DDPMScheduler <-> Config and the shape of an image.

A setting that the other side does not support is an error that names it; nothing is approximated. Names and defaults
are those of diffusers 0.35 to 0.42, which also reads older files without the newer keys.
"""

import json

import numpy as np

from ddpm_jax import experiment, schedules
from ddpm_jax.config import Config, Data, Diffusion, Model, Train
from ddpm_jax.errors import ConfigError
from ddpm_jax.networks.unet import largest_divisor
from ddpm_jax.run import trees

UNET = {  # UNet2DModel's options and their defaults
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
UNET_SUPPORTED = {  # the values that our network supports
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
EMA_KEYS = (  # added to the network's config by EMAModel.save_pretrained; the network does not need them
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)
SCHEDULER = {  # DDPMScheduler's options and their defaults
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
VARIANCES = {"fixed_small": "fixedsmall", "fixed_large": "fixedlarge", "learned_range": "learned"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
BETAS = {  # beta_schedule: (T, beta_start, beta_end) -> betas
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "scaled_linear": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "squaredcos_cap_v2": lambda T, start, end: schedules.cosine_betas(T),
    "sigmoid": lambda T, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))),
}
SCHEDULER_SUPPORTED = {
    "beta_schedule": tuple(BETAS),
    "variance_type": tuple(VARIANCES),
    "clip_sample": (True, False),
    "prediction_type": tuple(PREDICTIONS),
    "thresholding": (False,),
    "clip_sample_range": (1.0,),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0,),
    "rescale_betas_zero_snr": (False, True),
}
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")  # without and with attention
FINE_TUNING_RATE = 2e-5  # the smaller of the paper's two learning rates


def from_diffusers(unet, scheduler, source="folder:"):
    """(Config, shape of an image) from the two configs as dicts; `source` becomes config.data.source.

    Raises ConfigError for a key that diffusers does not have, and for a value that our network does not support.
    """
    unet = _with_defaults(unet, "UNet2DModel", UNET, UNET_SUPPORTED, EMA_KEYS)
    scheduler = _with_defaults(scheduler, "DDPMScheduler", SCHEDULER, SCHEDULER_SUPPORTED)
    try:
        model, shape = _model(unet)
        diffusion = _diffusion(scheduler)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"the configs hold a value of the wrong kind ({error})") from error
    outputs = shape[-1] * (2 if diffusion.variance == "learned" else 1)
    if unet["out_channels"] != outputs:
        raise ConfigError(
            f"out_channels={unet['out_channels']} does not go with in_channels={shape[-1]} and "
            f"variance_type={scheduler['variance_type']}, which need {outputs}"
        )
    size = shape[:1] if shape[0] == shape[1] else shape[:2]
    data = Data(source=source, image_size=size, channels=shape[-1])
    train = Train(learning_rate=FINE_TUNING_RATE, sample_steps=min(Train.sample_steps, diffusion.T))
    return Config(data=data, model=model, diffusion=diffusion, train=train), shape


def _with_defaults(given, kind, defaults, supported, ignored=()):
    """The config `given` with the missing keys from the `defaults` of the class `kind`.

    Drops keys that are `ignored` or begin with _, which do not describe the object.
    """
    if not isinstance(given, dict) or given.get("_class_name", kind) != kind:
        name = given.get("_class_name") if isinstance(given, dict) else given
        raise ConfigError(f"_class_name={name} is not supported; only a {kind} is")
    given = {name: value for name, value in given.items() if not name.startswith("_") and name not in ignored}
    unknown = [f"{name}={json.dumps(value)}" for name, value in given.items() if name not in defaults]
    if unknown:
        raise ConfigError(f"{kind} with {', '.join(unknown)} is not supported: unknown key")
    for name, values in supported.items():
        if given.get(name, defaults[name]) not in values:
            choices = " or ".join(map(json.dumps, values))
            raise ConfigError(f"{kind} with {name}={json.dumps(given[name])} is not supported; only {choices} is")
    return defaults | given


def _model(unet):
    """(Model, shape of an image) of a complete U-Net config."""
    size, widths = unet["sample_size"], unet["block_out_channels"]
    if size is None:
        raise ConfigError("sample_size=null: write the side of the images into the U-Net's config.json")
    shape = (*(size if isinstance(size, list) else (size, size)), unet["in_channels"])
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape) or shape[-1] not in (1, 3):
        raise ConfigError(f"sample_size={size} with in_channels={shape[-1]} is not supported; only 1 or 3 channels are")
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"block_out_channels={widths} is not supported; each must be a multiple of the first")
    if unet["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise ConfigError(f"time_embedding_dim={unet['time_embedding_dim']} is not supported; only {4 * widths[0]} is")
    scale_shift, groups = unet["resnet_time_scale_shift"] == "scale_shift", unet["norm_num_groups"]
    middle = unet["attn_norm_num_groups"] or (None if scale_shift else groups)  # None: no norm
    if middle != groups:
        raise ConfigError(f"attn_norm_num_groups={json.dumps(middle)} is not supported; only {groups} is")
    model = Model(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=unet["layers_per_block"],
        attention_resolutions=tuple(min(shape[:2]) >> level for level in _attention_levels(unet, len(widths))),
        head_channels=unet["attention_head_dim"] or 0,
        dropout=unet["dropout"],
        scale_shift=scale_shift,
        groups=groups,
        norm_eps=unet["norm_eps"],
        symmetric_halving=unet["downsample_padding"] == 1,
        cos_first=bool(unet["flip_sin_to_cos"]),
        frequency_shift=int(unet["freq_shift"]),
    )
    return model, shape


def _attention_levels(unet, levels):
    """The levels with attention; level 0 has full resolution."""
    for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
        if len(unet[name]) != levels or any(kind not in known for kind in unet[name]):
            raise ConfigError(f"{name}={unet[name]} is not supported; it needs {levels} of {' or '.join(known)}")
    down = [level for level, kind in enumerate(unet["down_block_types"]) if kind == DOWN[1]]
    up = [level for level, kind in enumerate(reversed(unet["up_block_types"])) if kind == UP[1]]
    if down != up:
        raise ConfigError(
            f"attention at levels {down} on the way down and {up} on the way up is not supported; they must be equal"
        )
    return down


def _diffusion(scheduler):
    T, own = scheduler["num_train_timesteps"], scheduler["trained_betas"]
    betas = BETAS[scheduler["beta_schedule"]](T, scheduler["beta_start"], scheduler["beta_end"]) if own is None else own
    if len(betas) != T:
        raise ConfigError(f"trained_betas has {len(betas)} numbers, but num_train_timesteps={T}")
    named = [name for name, make in schedules.SCHEDULES.items() if _close(make(T), betas)]
    parameterization = PREDICTIONS[scheduler["prediction_type"]]
    return Diffusion(
        schedule=named[0] if named else "linear",
        T=T,
        betas=() if named else tuple(float(beta) for beta in betas),
        parameterization=parameterization,
        error="eps" if parameterization == "eps" else "output",  # what diffusers' training scripts do
        variance=VARIANCES[scheduler["variance_type"]],
        zero_terminal_snr=bool(scheduler["rescale_betas_zero_snr"]),
    )


def sampling(scheduler):
    """The options of sample.py for a scheduler config: settings that are not part of a run."""
    scheduler = SCHEDULER | scheduler
    return f" --spacing={scheduler['timestep_spacing']}" + ("" if scheduler["clip_sample"] else " --limit=none")


def _close(one, other):
    return np.allclose(one, other, rtol=1e-9, atol=0)


def to_diffusers(parts):
    """(U-Net config, scheduler config) of an Experiment, with all keys; ConfigError for what they cannot express."""
    model, diffusion = parts.config.model, parts.config.diffusion
    unsupported = {
        f"model.multipliers={','.join(map(str, model.multipliers))}, whose first is not 1": model.multipliers[0] != 1,
        f"model.network={model.network}; it is for the U-Net only": model.network != "unet",
        f"model.patch={model.patch}": model.patch != 1,
        f"model.resample={model.resample}": model.resample != "conv",
        f"model.num_classes={model.num_classes}: its DDPMPipeline gives no labels": model.num_classes,
        "diffusion.self_conditioning": diffusion.self_conditioning,
        f"diffusion.schedule={diffusion.schedule}, a continuous one": diffusion.schedule in schedules.CURVES,
        f"diffusion.base_resolution={diffusion.base_resolution}": diffusion.base_resolution,
        f"diffusion.parameterization={diffusion.parameterization}": (
            diffusion.parameterization not in PREDICTIONS.values()
        ),
    }
    for what, applies in unsupported.items():
        if applies:
            raise _not_expressible(what)
    height, width, channels = parts.shape
    sides = [min(height, width) >> level for level in range(len(model.multipliers))]
    attends = [side in model.attention_resolutions for side in sides]
    groups = _groups(parts)
    unet = UNET | {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * (2 if diffusion.variance == "learned" else 1),
        "freq_shift": model.frequency_shift,
        "flip_sin_to_cos": model.cos_first,
        "down_block_types": [DOWN[here] for here in attends],
        "up_block_types": [UP[here] for here in reversed(attends)],
        "block_out_channels": [model.channels * multiplier for multiplier in model.multipliers],
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": int(model.symmetric_halving),
        "dropout": model.dropout,
        "attention_head_dim": _head_channels(model, attends),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
    }
    theirs = [{ours: name for name, ours in table.items()} for table in (VARIANCES, PREDICTIONS)]
    scheduler = SCHEDULER | {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.T,
        **_beta_options(diffusion.betas or schedules.SCHEDULES[diffusion.schedule](diffusion.T)),
        "variance_type": theirs[0][diffusion.variance],
        "prediction_type": theirs[1][diffusion.parameterization],
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
    }
    return unet, scheduler


def _not_expressible(what):
    return ConfigError(f"diffusers' layout cannot express {what}; export to a FILE.safetensors instead")


def _head_channels(model, attends):
    """Channels of a head, which diffusers has equal at every width; None for one head."""
    if model.head_channels or model.num_heads == 1:
        return model.head_channels or None
    widths = [m * model.channels for m, here in zip(model.multipliers, attends, strict=True) if here]
    sizes = {width // model.num_heads for width in [*widths, model.multipliers[-1] * model.channels]}
    if len(sizes) > 1:
        raise _not_expressible(f"model.num_heads={model.num_heads} where the attention has several widths")
    return sizes.pop()


def _groups(parts):
    """The number of groups, which diffusers has equal in all norms."""
    if parts.config.model.groups != "auto":
        return parts.config.model.groups
    leaves = trees.flat(experiment.params_shape(parts))
    groups = {largest_divisor(leaf.size) for name, leaf in leaves.items() if name.endswith("/scale")}
    if len(groups) > 1:
        raise _not_expressible(f"model.groups=auto, which here means {', '.join(map(str, sorted(groups)))}")
    return groups.pop()


def _beta_options(betas):
    """beta_schedule with its ends if diffusers has a name for it, else trained_betas."""
    ends = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        if _close(BETAS[name](len(betas), *ends.values()), betas):
            return {"beta_schedule": name} | ends
    return {"trained_betas": [float(beta) for beta in betas]}

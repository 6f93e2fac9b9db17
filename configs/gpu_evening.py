"""Your own pictures at 64x64, in colour, in four hours on one GPU: --config.data.source=folder:DIR.

The network of folder.py, trained as laptop_ten_minutes.py trains. Not trained here, nor run on a GPU: what to expect is
not known.
"""

from ddpm_jax.config import load, replace


def get_config():
    laptop = load("laptop_ten_minutes")
    return replace(
        load("folder"),
        {
            "model.scale_shift": laptop.model.scale_shift,
            "diffusion.parameterization": laptop.diffusion.parameterization,
            "diffusion.error": laptop.diffusion.error,
            "diffusion.noise_levels": laptop.diffusion.noise_levels,
            "diffusion.time_sampling": laptop.diffusion.time_sampling,
            "train.minutes": 240.0,
            "train.optimizer": laptop.train.optimizer,
            "train.learning_rate": 1e-3,
            "train.warmup_steps": 500,
            "train.decay": laptop.train.decay,
            "train.ema_decay": laptop.train.ema_decay,
            "train.keep_every": 10_000,  # for guidance by the same run at an earlier time
        },
    )

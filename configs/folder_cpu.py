"""Your own pictures at 32x32, in colour, on a CPU: --config.data.source=folder:DIR. A smaller network than folder.py's.

The network outputs v, and the loss measures the error of v: after so few steps, eps gets the colours of whole pictures
wrong. Trained here on 3,786 emoji: 1:26:41 on two CPU cores beside other work, 42 minutes at its median speed (jax
0.10.2), loss (of v) 0.1721 over the last 100 of 5000 steps (docs/results.md).
"""

from ddpm_jax.config import load, replace


def get_config():
    return replace(
        load("folder"),
        {
            "data.image_size": (32,),
            "data.flip": False,
            "model.channels": 32,
            "model.multipliers": (1, 2, 2, 2),
            "model.num_res_blocks": 1,
            "model.attention_resolutions": (8, 4),
            "model.dropout": 0.0,
            "diffusion.parameterization": "v",
            "diffusion.error": "output",
            "train.steps": 5000,
            "train.learning_rate": 1e-3,
            "train.warmup_steps": 200,
            "train.ema_decay": 0.999,
            "train.checkpoint_every": 1000,
            "train.sample_every": 1000,
        },
    )

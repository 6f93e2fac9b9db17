"""Real handwritten digits, 8x8 gray, inside scikit-learn: nothing to download, minutes on a laptop.

Trained here: 0:02:31 on two CPU cores (jax 0.10.2), loss 0.0857 over the last 100 of 2000 steps; samples that read as
digits (docs/results.md).
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(source="digits"),
        model=Model(channels=32, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), dropout=0.0),
        diffusion=Diffusion(variance="fixedsmall"),
        train=Train(
            steps=2000,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=100,
            ema_decay=0.995,
            checkpoint_every=500,
            sample_every=500,
        ),
    )

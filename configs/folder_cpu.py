"""Your own pictures at 32x32, in colour, on a CPU: --config.data.source=folder:DIR.

The network outputs v, and the loss measures the error of v: after so few steps, eps gets the colours of whole pictures
wrong. Trained here on 3,786 emoji: 1:26:41 on two CPU cores beside other work, 42 minutes at its median speed (jax
0.10.2), loss (of v) 0.1721 over the last 100 of 5000 steps (docs/results.md).
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(source="folder:", image_size=(32,), channels=3),
        model=Model(
            channels=32,
            multipliers=(1, 2, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(8, 4),
            dropout=0.0,
            groups="auto",
        ),
        diffusion=Diffusion(parameterization="v", error="output", variance="fixedsmall"),
        train=Train(
            steps=5000,
            batch_size=32,
            learning_rate=1e-3,
            warmup_steps=200,
            ema_decay=0.999,
            checkpoint_every=1000,
            sample_every=1000,
        ),
    )

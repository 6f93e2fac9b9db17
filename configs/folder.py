"""Your own pictures at 64x64, in colour: --config.data.source=folder:DIR. For one GPU; smaller sizes train faster.

The group norms take any width, so --config.model.channels is free. Not trained here, nor run on a GPU.
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(source="folder:", image_size=(64,), channels=3, flip=True),
        model=Model(channels=64, multipliers=(1, 2, 2, 4), groups="auto"),
        diffusion=Diffusion(variance="fixedsmall"),
        train=Train(steps=100_000, batch_size=32, warmup_steps=1000, ema_decay=0.9995),
    )

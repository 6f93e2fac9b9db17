"""MNIST at its own 28x28, gray, 60,000 digits. For one GPU; on a CPU use configs/digits.py.

Not trained here, nor run on a GPU: what to expect is not known.
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(source="tfds:mnist", image_size=(28,), channels=1),
        model=Model(channels=64, multipliers=(1, 2, 2), attention_resolutions=(14,)),
        diffusion=Diffusion(variance="fixedsmall"),
        train=Train(steps=50_000, warmup_steps=1000, ema_decay=0.999),
    )

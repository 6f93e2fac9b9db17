"""LSUN bedroom at 256x256 exactly as in Ho et al. 2020: 113.7M parameters, 2.4 million steps of 64 images.

Published: FID 6.36. Church (tfds:lsun/church_outdoor) ran for 1.2 million steps, cat (tfds:lsun/cat) for 1.8 million
and without mirroring.

Not trained here, nor run on a GPU; its step was compiled for a TPU v5e:8x8 (docs/performance.md).

One thing differs from their code: the average of the parameters warms up (training.ema_rate).
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(source="tfds:lsun/bedroom", image_size=(256,), channels=3, flip=True),
        model=Model(multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
        diffusion=Diffusion(variance="fixedsmall"),
        train=Train(steps=2_400_000, batch_size=64, learning_rate=2e-5),
    )

"""CelebA-HQ at 256x256 exactly as in Ho et al. 2020: 113.7M parameters, 500,000 steps of 64 images.

Published speed: 2.2 steps a second on a TPU v3-8 (appendix B). The data set must be prepared manually (see TFDS).

Not trained here, nor run on a GPU or TPU.

One thing differs from their code: the average of the parameters warms up (training.ema_rate).
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(source="tfds:celeb_a_hq/256", image_size=(256,), channels=3, flip=True),
        model=Model(multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
        diffusion=Diffusion(variance="fixedsmall"),
        train=Train(steps=500_000, batch_size=64, learning_rate=2e-5),
    )

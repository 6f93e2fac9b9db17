"""Oxford Flowers 102 at 64x64, the set that many tutorials use. For one GPU.

The test split is the largest (6,149 of 8,189), so training uses all three.
Not trained here, nor run on a GPU: what to expect is not known.
"""

from ddpm_jax.config import Config, Data, Diffusion, Model, Train


def get_config():
    return Config(
        data=Data(
            source="tfds:oxford_flowers102", split="train+validation+test", image_size=(64,), channels=3, flip=True
        ),
        model=Model(multipliers=(1, 2, 2, 2)),
        diffusion=Diffusion(variance="fixedsmall"),
        train=Train(steps=200_000, batch_size=64),
    )

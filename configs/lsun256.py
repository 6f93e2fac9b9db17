"""LSUN bedroom at 256x256 exactly as in Ho et al. 2020: 113.7M parameters, 2.4 million steps of 64 images.

The config of CelebA-HQ on other data. Published: FID 6.36. Church (tfds:lsun/church_outdoor) ran for 1.2 million
steps, cat (tfds:lsun/cat) for 1.8 million and without mirroring.

Not trained here, nor run on a GPU; its step was compiled for a TPU v5e:8x8 (docs/performance.md).

One thing differs from their code: the average of the parameters warms up (training.ema_rate).
"""

from ddpm_jax.config import load, replace


def get_config():
    return replace(load("celebahq256"), {"data.source": "tfds:lsun/bedroom", "train.steps": 2_400_000})

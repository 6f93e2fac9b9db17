"""CIFAR-10 exactly as in Ho et al. 2020: 35.7M parameters, 800,000 steps, about 10.6 hours on a TPU v3-8 (appendix B).

Published: FID 3.17 against the training set and 3.75 bits/dim (Table 1). A re-run in PyTorch (tqch/ddpm-torch) had the
training loss .0295 and FID 9.16 after 46,800 steps: a check long before the end.

Not trained here, nor run on a GPU; its step was compiled for a TPU v5e:2x4 (docs/performance.md).

One thing differs from their code: the average of the parameters warms up (training.ema_rate).
"""

from ddpm_jax.config import Config, Data


def get_config():
    return Config(data=Data(source="tfds:cifar10", image_size=(32,), channels=3, flip=True))

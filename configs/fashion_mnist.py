"""Fashion-MNIST at its own 28x28, gray, 60,000 pieces of clothing: the config of MNIST on other data. For one GPU.

Not trained here, nor run on a GPU: what to expect is not known.
"""

from ddpm_jax.config import load, replace


def get_config():
    return replace(load("mnist"), {"data.source": "tfds:fashion_mnist"})

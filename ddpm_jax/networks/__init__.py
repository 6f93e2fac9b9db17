"""Networks for one image, as (init, net); see unet.make_unet for what these take and return.

The only package that uses Flax.
"""

from ddpm_jax.errors import ConfigError
from ddpm_jax.networks.dit import make_dit
from ddpm_jax.networks.unet import make_unet

NETWORKS = {"unet": make_unet, "dit": make_dit}
TITLES = {"unet": "U-Net", "dit": "DiT"}

# Fields of config.Model that a network has no use for.
UNUSED = {
    "unet": ("depth", "mlp_ratio"),
    "dit": (
        "multipliers",
        "num_res_blocks",
        "attention_resolutions",
        "dropout",
        "scale_shift",
        "groups",
        "norm_eps",
        "head_channels",
        "symmetric_halving",
        "cos_first",
        "frequency_shift",
        "resample",
    ),
}


def make_network(model, shape, **options):
    """(init, net) of the network that `model`, a config.Model, describes; `options` as in `make_unet`.

    Raises ConfigError for a field that the network has no use for, unless it has its default or is off (0, empty).
    """
    fields = {name: value for name, value in vars(model).items() if name != "network"}
    for name in UNUSED.get(model.network, ()):
        value, default = fields.pop(name), getattr(type(model)(), name)
        if value and value != default:
            raise ConfigError(f"model.network={model.network} has no use for model.{name}; leave it at its default")
    return NETWORKS[model.network](shape, **options, **fields)

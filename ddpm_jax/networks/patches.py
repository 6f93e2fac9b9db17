"""Images as images of patches: fewer pixels with more channels. Exact rearrangements, inverse to each other.

The channels of a patch are ordered by row, column and channel, as in the code of Peebles & Xie 2023 (arXiv:2212.09748).
"""

from ddpm_jax.errors import ConfigError


def space_to_depth(x, patch):
    """(H, W, C) -> (H / patch, W / patch, patch * patch * C)."""
    height, width, channels = x.shape
    parts = x.reshape(height // patch, patch, width // patch, patch, channels)
    return parts.swapaxes(1, 2).reshape(height // patch, width // patch, -1)


def depth_to_space(x, patch):
    """(H, W, patch * patch * C) -> (patch * H, patch * W, C)."""
    height, width, channels = x.shape
    parts = x.reshape(height, width, patch, patch, channels // patch**2)
    return parts.swapaxes(1, 2).reshape(height * patch, width * patch, -1)


def check_patch(shape, patch):
    """ConfigError if patches of patch x patch pixels do not cover images of `shape` (H, W, C)."""
    height, width, _ = shape
    if height % patch or width % patch:
        raise ConfigError(f"model.patch={patch} does not divide the sides of images of {height}x{width}")

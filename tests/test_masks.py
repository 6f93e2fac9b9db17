"""Masks of --inpaint: of the picture's own proportions, black and white, opaque; all else is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.commands import sample
from ddpm_jax.errors import ConfigError


def half(size, color="white"):
    """A picture of (width, height), black on the left and `color` on the right."""
    picture = Image.new("L", size)
    picture.paste(color, (size[0] // 2, 0, *size))
    return picture


def test_fault_86_a_mask_that_does_not_fit_is_refused(tmp_path, capsys):
    """Each is cut to the model's shape by itself, so that with other proportions the mask would lie elsewhere."""
    half((12, 8)).save(tmp_path / "a.png")
    known, path, shape = str(tmp_path / "a.png"), str(tmp_path / "m.png"), (4, 4, 1)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn, after which 8x12 is 12x8
    clear = half((12, 8)).convert("RGBA")
    clear.putalpha(half((12, 8)))
    deep = Image.fromarray(np.asarray(half((12, 8)), np.uint16))  # 0 and 255 of 65535
    for mask, options, told in (
        (half((8, 12)), {}, f"--inpaint={known} is 12x8, --mask={path} 8x12: they would"),
        (
            half((12, 8)),
            {"exif": turned},
            "8x12: they would be cropped differently to the model's 4x4",
        ),
        (clear, {}, "has transparent parts; save it as black (kept) and white, opaque"),
        (half((12, 8), 1), {}, "is all black, so that nothing is painted (levels 0 to 1 of 255)"),
        (deep, {}, "is all black, so that nothing is painted (levels 0 to 1 of 255)"),
        (Image.new("L", (12, 8), 255), {}, "is all white, so that nothing is kept (levels 255 to 255 of 255)"),
    ):
        mask.save(path, **options)
        with pytest.raises(ConfigError) as caught:
            sample.read_mask(path, known, (8, 12), shape)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    half((24, 16)).save(path)  # the same shape at another scale
    np.testing.assert_array_equal(
        sample.read_mask(path, known, (8, 12), shape)[..., 0], [[True, True, False, False]] * 4
    )
    Image.fromarray(np.uint8(np.linspace(0, 255, 96)).reshape(8, 12)).save(path)
    with pytest.warns(UserWarning, match="is gray in 50% of its pixels; what is more than half white is painted"):
        sample.read_mask(path, known, (8, 12), shape)
    capsys.readouterr()
    sample.read(known, shape)
    assert capsys.readouterr().out == f"{known}, 12x8, is cropped to its central 8x8\n"

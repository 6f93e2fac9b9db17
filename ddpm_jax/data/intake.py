"""Picture files as untrusted input: any mode, size or damage ends as uint8 (H, W, C) or as a reason why not."""

import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow has more, one of which runs programs (EPS)
MAX_PIXELS = 64_000_000  # of the file; Pillow itself only warns up to 179 million
MAX_ASPECT = 50


def find(folder):
    """The picture files below a folder as (path, size, mtime), in byte order of the names; hidden ones left out."""
    found = []

    def fail(error):
        raise error  # a subfolder that cannot be listed is not an empty one

    for directory, folders, names in os.walk(os.fsencode(folder), onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        for name in names:
            if os.fsdecode(name).lower().endswith(SUFFIXES) and not name.startswith(b"."):
                path = os.path.join(directory, name)
                found.append((os.fsdecode(path), *_size_and_time(path)))
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def _size_and_time(path):
    try:
        at = os.stat(path)
    except OSError:  # a link to nothing, or gone since it was listed: reading it will say so
        return 0, 0
    return at.st_size, at.st_mtime_ns


def read(path: str | Path, image_size: tuple[int, ...], channels: int) -> np.ndarray:
    """A picture file as uint8 (H, W, C) of the wanted size.

    Turned upright (EXIF), transparency put on white, 16 bits scaled to 8, the first frame of an animation. Raises
    ValueError or what Pillow raises when the file cannot be used.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width}x{height} is too long for its width")
        ImageOps.exif_transpose(picture, in_place=True)
        return fit(picture, image_size, channels)


def fit(picture, image_size, channels):
    """A Pillow image as uint8 (H, W, C): the largest centred part of the wanted shape, resized with antialiasing."""
    picture = _to_8_bits(picture)
    if (channels or (1 if picture.mode == "L" else 3)) != len(picture.getbands()):
        picture = picture.convert("L" if channels == 1 else "RGB")
    width, height = picture.size
    wanted_height, wanted_width = image_size or (height, width)
    scale = min(width / wanted_width, height / wanted_height)
    if scale != 1 or picture.size != (wanted_width, wanted_height):
        across, down = min(width, wanted_width * scale), min(height, wanted_height * scale)  # Pillow minds rounding
        left, top = (width - across) / 2, (height - down) / 2
        box = (left, top, left + across, top + down)
        picture = picture.resize((wanted_width, wanted_height), _filter(scale), box)
    array = np.asarray(picture, np.uint8)
    return array[..., None] if array.ndim == 2 else array


def fit_array(image, image_size, channels):
    """uint8 (H, W, C) of the wanted size, as `fit` makes it."""
    height, width, bands = image.shape
    if (height, width, bands) == (*(image_size or (height, width)), channels or bands):
        return image
    return fit(Image.fromarray(image[..., 0] if bands == 1 else image), image_size, channels)


def _filter(scale):
    """The mean of whole blocks where it can be; otherwise smooth filters, as BOX would weigh pixels unevenly."""
    if scale < 1:
        return Image.Resampling.BICUBIC
    return Image.Resampling.BOX if scale == int(scale) else Image.Resampling.HAMMING


def _to_8_bits(picture):
    """The picture as L or RGB. Plain conversion turns 16 bits to white, floats to black, and shows hidden colours."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture, np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {picture.mode} with values from {values.min()} to {values.max()}")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating point pixels; convert it to 8 bits first")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)

"""Picture files as untrusted input: any mode, size or damage ends as uint8 (H, W, C) or as a reason why not."""

import math
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow has more, one of which runs programs (EPS)
WITH_FRAMES = ("GIF", "PNG", "TIFF", "WEBP")  # of a JPEG the further pictures are previews and maps of depth
MAX_PIXELS = 64_000_000  # of a frame; Pillow itself only warns up to 179 million
MAX_PIXELS_OF_FRAMES = 8 * MAX_PIXELS  # of all that are taken of one file
MAX_ASPECT = 50
LEVELS = 0, 65535  # of values that have more than 8 bits, where nothing else is said


class Frames(NamedTuple):
    """What is taken of one item of a source."""

    images: np.ndarray  # uint8 (K, H, W, C)
    left_out: int = 0  # further frames
    values: tuple | None = None  # lowest and highest, where they have more than 8 bits


def find(folder):
    """The picture files below a folder as (path, size, mtime), in byte order of the names; hidden ones left out.

    Links are followed, except to a folder that they lie in. One that leads nowhere counts as a file, which cannot be
    read then: it may be a class whose disk is missing.
    """
    found, waiting = [], [(os.fsencode(folder), frozenset())]
    while waiting:
        directory, above = waiting.pop()
        at = os.stat(directory)
        if (at.st_dev, at.st_ino) in above:
            continue
        above |= {(at.st_dev, at.st_ino)}
        with os.scandir(directory) as entries:  # a subfolder that cannot be listed is not an empty one
            for entry in entries:
                path = os.path.join(directory, entry.name)
                if entry.name.startswith(b"."):
                    continue
                if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                    waiting.append((path, above))
                elif is_picture(os.fsdecode(path)) or (entry.is_symlink() and not os.path.exists(path)):
                    found.append((os.fsdecode(path), *_size_and_time(path)))
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def is_picture(name):
    """Whether a file of that name is taken for a picture."""
    return name.lower().endswith(SUFFIXES)


def _size_and_time(path):
    try:
        at = os.stat(path)
    except OSError:  # a link to nothing, or gone since it was listed: reading it will say so
        return 0, 0
    return at.st_size, at.st_mtime_ns


def read(path: str | Path, image_size: tuple[int, ...], channels: int, levels: tuple[float, ...] = ()) -> np.ndarray:
    """A picture file as uint8 (H, W, C) of the wanted size.

    Turned upright (EXIF), transparency put on white, the first frame of an animation. Values of more than 8 bits are
    scaled from `levels`, the two that become 0 and 255 (0 and 65535 when empty). Raises ValueError or what Pillow
    raises when the file cannot be used.
    """
    return read_frames(path, image_size, channels, levels).images[0]


def read_frames(path, image_size, channels, levels=(), every=False) -> Frames:
    """The Frames of a picture file: the first, or `every` one; each is as in `read`."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path, formats=FORMATS) as picture:
        images, values, pixels = [], [], 0
        for index in _pages(picture) if every else [0]:
            if index:
                picture.seek(index)
            _check_size(*picture.size, image_size)
            pixels += max(math.prod(picture.size), math.prod(image_size))
            if pixels > MAX_PIXELS_OF_FRAMES:
                raise ValueError(f"its frames have more than {MAX_PIXELS_OF_FRAMES:,} pixels")
            upright = ImageOps.exif_transpose(picture)
            _check_aspect(*upright.size, image_size)
            images.append(fit(upright, image_size, channels, levels))
            values += _values(upright)
        return Frames(
            np.stack(images), 0 if every else _further(picture), (min(values), max(values)) if values else None
        )


def _pages(picture):
    """The indices of the frames; smaller copies and masks, which a TIFF may have too, are none."""
    for index in range(picture.n_frames if picture.format in WITH_FRAMES else 1):
        if picture.format == "TIFF":
            picture.seek(index)
            if picture.tag_v2.get(254, 0) & 5:  # NewSubfileType: bit 0 a reduced copy, bit 2 a mask
                continue
        yield index


def _further(picture):
    """How many frames come after the first; 0 where that cannot be told, the first being whole all the same."""
    try:
        return max(0, sum(1 for _ in _pages(picture)) - 1)
    except Exception:  # whatever a damaged file makes Pillow raise
        return 0


def _check_size(width, height, image_size):
    """Refuse a bomb by its header, and what is too long whichever way it will be turned."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
    if _kept(height, width, image_size) * MAX_ASPECT < 1:
        _check_aspect(width, height, image_size)


def _check_aspect(width, height, image_size):
    """Refuse what would be cut to less than a part in MAX_ASPECT."""
    if _kept(width, height, image_size) * MAX_ASPECT < 1:
        raise ValueError(f"{width}x{height} is too long: {image_size[1]}x{image_size[0]} would keep too little of it")


def _kept(width, height, image_size):
    """The share of the pixels that is in the largest part of the wanted shape."""
    wanted_height, wanted_width = image_size or (height, width)
    ratio = width * wanted_height / (height * wanted_width)
    return min(ratio, 1 / ratio)


def fit(picture, image_size, channels, levels=()):
    """A Pillow image as uint8 (H, W, C): the largest centred part of the wanted shape, resized with antialiasing."""
    picture = _to_8_bits(picture, levels)
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


def fit_array(image, image_size, channels, levels=()) -> Frames:
    """The Frames of an array (H, W, C), uint8 or uint16, as `fit` makes it."""
    height, width, bands = image.shape
    if image.dtype == np.uint8 and image.shape == (*(image_size or (height, width)), channels or bands):
        return Frames(image[None])
    picture = Image.fromarray(image[..., 0] if bands == 1 else image)
    values = _values(picture)
    return Frames(fit(picture, image_size, channels, levels)[None], values=values and tuple(values))


def _filter(scale):
    """The mean of whole blocks where it can be; otherwise smooth filters, as BOX would weigh pixels unevenly."""
    if scale < 1:
        return Image.Resampling.BICUBIC
    return Image.Resampling.BOX if scale == int(scale) else Image.Resampling.HAMMING


def _values(picture):
    """[lowest, highest] of the values where they have more than 8 bits; [] otherwise."""
    if not _is_deep(picture):
        return []
    values = np.asarray(picture)
    return [values.min().item(), values.max().item()]


def _is_deep(picture):
    return picture.mode.startswith(("I", "F"))


def _to_8_bits(picture, levels=()):
    """The picture as L or RGB. Plain conversion turns 16 bits to white, floats to black, and shows hidden colours."""
    if _is_deep(picture):
        lowest, highest = _values(picture)
        if picture.mode == "F" and not levels:
            raise ValueError("floating point pixels; say which become black and white by data.range=LOW,HIGH")
        if not math.isfinite(highest - lowest):
            raise ValueError("pixels that are not finite")
        low, high = levels or LEVELS
        if not levels and (lowest < low or highest > high):
            raise ValueError(f"mode {picture.mode} with values from {lowest} to {highest}; say data.range=LOW,HIGH")
        share = (np.asarray(picture, np.float64) - low) / (high - low)
        return Image.fromarray(np.round(255 * share.clip(0, 1)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)

"""Picture files as untrusted input: of any mode and size, decoded to uint8 (H, W, C) or refused with a reason."""

import math
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, for which Pillow runs another program
WITH_FRAMES = ("GIF", "PNG", "TIFF", "WEBP")  # further pictures in a JPEG are previews and depth maps
MAX_PIXELS = 64_000_000  # of a frame; Pillow itself only warns up to 179 million
MAX_PIXELS_OF_FRAMES = 8 * MAX_PIXELS  # of all frames read from one file
MAX_ASPECT = 50
LEVELS = 0, 65535  # default range of values of more than 8 bits


class Frames(NamedTuple):
    """The images decoded from one item of a source."""

    images: np.ndarray  # uint8 (K, H, W, C)
    left_out: int = 0  # number of frames not read
    values: tuple | None = None  # lowest and highest value, if they have more than 8 bits


def find(folder):
    """The picture files below a folder as (path, size, mtime), in byte order of the names, without hidden ones.

    Symbolic links are followed, unless they lead to a parent folder. A broken link counts as an unreadable file,
    because it may be a class on a missing disk.
    """
    found, pending = [], [(os.fsencode(folder), frozenset())]
    while pending:
        directory, parents = pending.pop()
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in parents:
            continue
        parents |= {(status.st_dev, status.st_ino)}
        with os.scandir(directory) as entries:  # raises for a subfolder that cannot be listed
            for entry in entries:
                path = os.path.join(directory, entry.name)
                if entry.name.startswith(b"."):
                    continue
                if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                    pending.append((path, parents))
                elif is_picture(os.fsdecode(path)) or (entry.is_symlink() and not os.path.exists(path)):
                    found.append((os.fsdecode(path), *_size_and_time(path)))
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def is_picture(name):
    """Whether a file name has the suffix of a picture."""
    return name.lower().endswith(SUFFIXES)


def _size_and_time(path):
    try:
        status = os.stat(path)
    except OSError:  # a broken link, or deleted since it was listed: reading it will fail
        return 0, 0
    return status.st_size, status.st_mtime_ns


def read(path: str | Path, image_size: tuple[int, ...], channels: int, levels: tuple[float, ...] = ()) -> np.ndarray:
    """A picture file as uint8 (H, W, C) of the given size.

    It is rotated upright (EXIF) and put on white where it is transparent; of an animation it is the first frame.
    Values of more than 8 bits are scaled such that `levels` (0 and 65535 when empty) become 0 and 255. Raises
    ValueError or any error of Pillow when the file cannot be used.
    """
    return read_frames(path, image_size, channels, levels).images[0]


def read_frames(path, image_size, channels, levels=(), every=False) -> Frames:
    """The Frames of a picture file: the first, or `every` one, each decoded as in `read`."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path, formats=FORMATS) as picture:
        images, values, pixels = [], [], 0
        for index in _frame_indices(picture) if every else [0]:
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
        left_out = 0 if every else _count_further(picture)
        return Frames(np.stack(images), left_out, (min(values), max(values)) if values else None)


def _frame_indices(picture):
    """The indices of the frames, without the reduced copies and masks that a TIFF may contain."""
    for index in range(picture.n_frames if picture.format in WITH_FRAMES else 1):
        if picture.format == "TIFF":
            picture.seek(index)
            if picture.tag_v2.get(254, 0) & 5:  # NewSubfileType: bit 0 a reduced copy, bit 2 a mask
                continue
        yield index


def _count_further(picture):
    """The number of frames after the first; 0 if they are damaged, since the first one is intact."""
    try:
        return max(0, sum(1 for _ in _frame_indices(picture)) - 1)
    except Exception:  # Pillow can raise anything on a damaged file
        return 0


def _check_size(width, height, image_size):
    """Refuse a decompression bomb by its header, and a picture that is too long both as it is and rotated."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
    if _cropped_share(height, width, image_size) * MAX_ASPECT < 1:
        _check_aspect(width, height, image_size)


def _check_aspect(width, height, image_size):
    """Refuse a picture if cropping would keep less than 1 / MAX_ASPECT of it."""
    if _cropped_share(width, height, image_size) * MAX_ASPECT < 1:
        raise ValueError(f"{width}x{height} is too long: {image_size[1]}x{image_size[0]} would keep too little of it")


def _cropped_share(width, height, image_size):
    """The share of the pixels that remains after cropping to the aspect ratio of `image_size`."""
    target_height, target_width = image_size or (height, width)
    ratio = width * target_height / (height * target_width)
    return min(ratio, 1 / ratio)


def fit(picture, image_size, channels, levels=()):
    """A Pillow image as uint8 (H, W, C): cropped around the centre to the aspect ratio, then resized (antialiased)."""
    picture = _to_8_bits(picture, levels)
    if (channels or (1 if picture.mode == "L" else 3)) != len(picture.getbands()):
        picture = picture.convert("L" if channels == 1 else "RGB")
    width, height = picture.size
    target_height, target_width = image_size or (height, width)
    scale = min(width / target_width, height / target_height)
    if scale != 1 or picture.size != (target_width, target_height):
        crop_width, crop_height = min(width, target_width * scale), min(height, target_height * scale)  # rounding
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        box = (left, top, left + crop_width, top + crop_height)
        picture = picture.resize((target_width, target_height), _filter(scale), box)
    array = np.asarray(picture, np.uint8)
    return array[..., None] if array.ndim == 2 else array


def fit_array(image, image_size, channels, levels=()) -> Frames:
    """The Frames of an array (H, W, C), uint8 or uint16, processed by `fit`."""
    height, width, bands = image.shape
    if image.dtype == np.uint8 and image.shape == (*(image_size or (height, width)), channels or bands):
        return Frames(image[None])
    picture = Image.fromarray(image[..., 0] if bands == 1 else image)
    values = _values(picture)
    return Frames(fit(picture, image_size, channels, levels)[None], values=values and tuple(values))


def _filter(scale):
    """BOX (block means) for whole factors; smooth filters otherwise, where BOX would weight pixels unevenly."""
    if scale < 1:
        return Image.Resampling.BICUBIC
    return Image.Resampling.BOX if scale == int(scale) else Image.Resampling.HAMMING


def _values(picture):
    """[lowest, highest] value of a picture of more than 8 bits; [] otherwise."""
    if not _is_deep(picture):
        return []
    values = np.asarray(picture)
    return [values.min().item(), values.max().item()]


def _is_deep(picture):
    return picture.mode.startswith(("I", "F"))


def _to_8_bits(picture, levels=()):
    """The picture as L or RGB. Pillow would make 16 bits white, floats black and hidden colours visible."""
    if _is_deep(picture):
        lowest, highest = _values(picture)
        if picture.mode == "F" and not levels:
            raise ValueError("floating point pixels; set the values of black and white by data.range=LOW,HIGH")
        if not math.isfinite(highest - lowest):
            raise ValueError("pixels that are not finite")
        low, high = levels or LEVELS
        if not levels and (lowest < low or highest > high):
            raise ValueError(f"mode {picture.mode} with values from {lowest} to {highest}; set data.range=LOW,HIGH")
        scaled = (np.asarray(picture, np.float64) - low) / (high - low)
        return Image.fromarray(np.round(255 * scaled.clip(0, 1)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)

"""uint8 arrays as image grids, PNG and GIF."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.run.files import write_atomic


def evenly_spaced(count: int, num: int) -> np.ndarray:
    """Indices of at most `num` of `count` items, evenly spaced, with the first and last."""
    return np.linspace(0, count - 1, min(count, num)).astype(int)


def grid(images, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 (N, H, W, C) as one grid (H', W', C), filled row by row. Small images are enlarged by an integer factor."""
    images = np.asarray(images)
    n, height, width, channels = images.shape
    zoom = max(1, 64 // max(height, width))
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = np.full((rows * columns, height * zoom + gap, width * zoom + gap, channels), 255, np.uint8)
    cells[:n, gap:, gap:] = images
    page = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2).reshape(-1, columns * cells.shape[2], channels)
    return np.pad(page, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def to_pillow(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, C), C = 1 or 3, as a Pillow image, which notebooks display."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, C), C = 1 or 3, as PNG."""
    buffer = io.BytesIO()
    to_pillow(image).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def encode_gif(frames, seconds=3.0, hold=1.5) -> bytes:
    """The bytes of a looping GIF of uint8 (F, H, W, C): `seconds` long, plus `hold` seconds on the last frame."""
    pictures = [to_pillow(frame) for frame in frames]
    frame_ms = int(1000 * seconds / len(pictures))
    buffer = io.BytesIO()
    durations = [frame_ms] * (len(pictures) - 1) + [frame_ms + int(1000 * hold)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def save_gif(path: str | Path, frames, seconds=3.0, hold=1.5) -> None:
    """Write the GIF of encode_gif."""
    write_atomic(path, encode_gif(frames, seconds, hold))

"""Images of a load: the user's own, or synthetic photographs.

Legend: N images, H = W = the side of the encoder's input in pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from clipship.core.images.files import some_image_files

SIZE_PX = (500, 375)
"""Width and height of synthetic images, a usual size of web photographs."""

COUNT = 32


def files_from_folder(folder: Path, count: int = COUNT) -> list[bytes]:
    """The bytes of up to ``count`` image files spread evenly over ``folder`` and its subfolders.

    Raises:
        DataError: the folder is missing, or has no image file.
    """
    return [path.read_bytes() for path in some_image_files(folder, count)]


def made_up_files(count: int = COUNT) -> list[bytes]:
    """Deterministic JPEG files of 500 x 375 pixels at quality 90, about 60 KB each."""
    return [_jpeg(np.random.default_rng(seed)) for seed in range(count)]


def _jpeg(rng: np.random.Generator) -> bytes:
    """Noise at every scale, finer noise weaker, which compresses like a photograph."""
    pixels = np.zeros((SIZE_PX[1], SIZE_PX[0], 3))
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8))
        grown = np.asarray(noise.resize(SIZE_PX, Image.Resampling.BICUBIC), dtype=np.float64)
        pixels += (grown - 127.5) * 4 / cells**0.5
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels / 2 + 127.5, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

"""The images that a bundle is verified with: the user's own, or else the built-in world's.

Legend: N images, H0 x W0 their size, S = side of the encoder's input in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images.decoding import ImageDecodeError, ImageSpec, decode_image, pixels_from_image
from clipship.core.images.files import some_image_files

VERIFY_COUNT = 128
"""Images PyTorch and ONNX Runtime are compared on before the bundle is written."""

SAMPLES = 16
"""Images that a form for one source size is compared on; a camera's are large."""

_WORLD_STREAM = 7_001  # a seed that none of the data sets has


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that a bundle is verified with."""

    name: str
    """The file's name, for messages and for its suffix."""
    data: bytes
    """The file as it came."""


def pictures_from_folder(folder: Path, count: int = VERIFY_COUNT) -> list[Picture]:
    """``count`` image files spread evenly over ``folder`` and its subfolders (all of them when there are fewer).

    Raises:
        DataError: no such folder, or no image file in it.
    """
    return [Picture(name=path.name, data=path.read_bytes()) for path in some_image_files(folder, count)]


def pictures_from_world(count: int = VERIFY_COUNT) -> list[Picture]:
    """``count`` scenes of the built-in world as PNG files."""
    from clipship.world.drawing.render import render_scene
    from clipship.world.drawing.scenes import sample_scene

    pictures = []
    for position in range(count):
        rng = np.random.Generator(np.random.PCG64([_WORLD_STREAM, position]))
        buffer = io.BytesIO()
        Image.fromarray(render_scene(sample_scene(rng), rng)).save(buffer, "PNG")
        pictures.append(Picture(name=f"{position}.png", data=buffer.getvalue()))
    return pictures


def pictures_for(folder: Path | None) -> list[Picture]:
    """Those of ``folder``, or the built-in world's when it is None."""
    return pictures_from_folder(folder) if folder else pictures_from_world()


def sources_of(pictures: Sequence[Picture], source_size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [N, H0, W0, 3]: up to 16 of ``pictures``, evenly, resized to ``source_size`` = (width, height).

    Raises:
        DataError: one cannot be decoded.
    """
    step = max(1, len(pictures) // SAMPLES)
    return np.stack([_source(picture, source_size) for picture in pictures[::step][:SAMPLES]])


def _source(picture: Picture, source_size: tuple[int, int]) -> NDArray[np.uint8]:
    try:
        return np.asarray(decode_image(picture.data).resize(source_size, Image.Resampling.BILINEAR))
    except ImageDecodeError as error:
        raise DataError(f"{picture.name}: {error}: verify with images that can be read") from error


def pixels_of_sources(sources: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """Pillow's pixels [N, S, S, 3] of ``sources`` [N, H0, W0, 3]."""
    return np.stack([pixels_from_image(Image.fromarray(source), spec) for source in sources])

"""The images that a bundle is verified with: the user's own, or else the built-in world's."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipship.core.images.files import some_image_files

VERIFY_COUNT = 128
"""Images PyTorch and ONNX Runtime are compared on before the bundle is written."""

_WORLD_STREAM = 7_001  # a seed that none of the data sets has


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that a bundle is verified with."""

    name: str
    """The file's name, for messages and for its suffix."""
    data: bytes
    """The file as it came."""


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
    """Up to 128 image files spread evenly over ``folder`` and its subfolders; the built-in world's without a folder.

    Raises:
        DataError: no such folder, or no image file in it.
    """
    if folder is None:
        return pictures_from_world()
    return [Picture(name=path.name, data=path.read_bytes()) for path in some_image_files(folder, VERIFY_COUNT)]

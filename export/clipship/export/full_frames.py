"""Whole images of one size, as a variant with a source size takes them: for its comparisons.

Legend: N images, H0 x W0 their size, S = side of the encoder's input in pixels, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images.decoding import ImageDecodeError, ImageSpec, decode_image, pixels_from_image

SAMPLES = 16
"""Images that a variant is compared on; those of a camera are large."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that a bundle is verified with."""

    name: str
    """The file's name, for messages and for its suffix."""
    data: bytes
    """The file as it came."""


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

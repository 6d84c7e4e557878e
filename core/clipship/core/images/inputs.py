"""What a caller may hand over as an image, here and over gRPC, and the encoder's pixels of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images.decoding import (
    ImageSpec,
    Resample,
    pixels_from_array,
    pixels_from_bytes,
    pixels_from_image,
)

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path, an image file's bytes, a PIL image, or RGB pixels uint8 [height, width, 3] of any size."""


def bytes_or_image(image: ImageLike) -> bytes | Image.Image:
    """An image file's bytes, read where ``image`` is a path; or a PIL image, made where it is an array.

    Raises:
        UsageError: nothing an image can come from, or an array of another type or shape.
        OSError: the path cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        return image_from_array(image)
    if not isinstance(image, bytes | Image.Image):
        raise UsageError(f"an image is a {type(image).__name__}: give a path, bytes, a PIL image or an array")
    return image


def image_from_array(array: NDArray[Any]) -> Image.Image:
    """A PIL image of RGB pixels uint8 [height, width, 3].

    Raises:
        UsageError: another type or shape. Floating-point pixels are refused as in files: nothing states their range.
    """
    return Image.fromarray(_checked(array))


def _checked(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise UsageError(f"an array is {array.dtype} {list(array.shape)}: give RGB pixels, uint8 [height, width, 3]")
    return array


def pixels_from_any(image: ImageLike, spec: ImageSpec, resample: Resample = "exact") -> NDArray[np.uint8]:
    """The encoder's input: uint8 [H, W, 3], H = W = ``spec.size_px``; ``resample`` as in ``pixels_from_image``.

    Raises:
        UsageError: as :func:`bytes_or_image`.
        OSError: as :func:`bytes_or_image`.
        ImageDecodeError: the image cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return pixels_from_array(_checked(image), spec, resample)
    given = bytes_or_image(image)
    if isinstance(given, bytes):
        return pixels_from_bytes(given, spec, resample)
    return pixels_from_image(given, spec, resample)

"""From image bytes to the uint8 pixels the exported encoder takes: one for training, client and server.

This file imports nothing but NumPy and Pillow, because the Triton repository carries a copy of it for its
``preprocess`` model: the server runs the very lines the client runs.

Two steps, kept apart:

1. :func:`decode_image`: bytes -> upright 8-bit RGB. EXIF orientation is applied, 16-bit grey is scaled to 8 bits
   (Pillow's own conversion would clip it to white), CMYK/palette/grey become RGB by Pillow's ``convert``, alpha is
   dropped, the first frame of an animation is taken.
2. :func:`pixels_from_image`: Pillow's bicubic resize of the shorter side, then the centre crop, exactly as open_clip's
   evaluation transform (torchvision ``Resize`` + ``CenterCrop``) does it, bit for bit.

Shapes: H, W = ``size_px`` of the :class:`ImageSpec`.
"""

from __future__ import annotations

import io
import threading
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""What a file's name ends in, in lower case, where a folder is searched for images."""

MAX_PIXELS = 400_000_000
"""Images with more pixels are refused before they are decoded (a 20,000 x 20,000 image just passes)."""

WEIGHT_BITS = 22
"""Fractional bits that Pillow rounds the weights of its resizing to."""

_MAX_RESIZED_PIXELS = 32_000_000


class ImageDecodeError(ValueError):
    """The bytes are no image that can be classified; the message says why in a few words."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How an image becomes the encoder's input. Read from the model, stored in the bundle, never chosen by a client."""

    size_px: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float]
    """Channel means (RGB), subtracted in the graph after scaling to 0..1."""
    std: tuple[float, float, float]
    """Channel standard deviations (RGB), divided by in the graph."""
    interpolation: str = "bicubic"
    """Only Pillow's bicubic (antialiased, a = -0.5) is defined in format version 1."""
    resize_mode: str = "shortest"
    """Only open_clip's "shortest" (shorter side to ``size_px``, then the centre crop) is defined in version 1."""

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}: give a positive number of pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std}: give three numbers each, std positive")
        if (self.interpolation, self.resize_mode) != ("bicubic", "shortest"):
            raise ValueError(
                f"preprocessing {self.interpolation}/{self.resize_mode} is not supported: only bicubic/shortest is"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ImageSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        try:
            triples = {key: tuple(float(value) for value in content[key]) for key in ("mean", "std")}
            return cls(**{**content, **triples})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not an ImageSpec: {error}") from error


def decode_image(data: bytes) -> Image.Image:
    """The image in ``data`` (any format Pillow reads), upright, 8-bit RGB.

    Raises:
        ImageDecodeError: empty, truncated, corrupt, of an unknown format, or larger than :data:`MAX_PIXELS`.
    """
    if not data:
        raise ImageDecodeError("empty file (0 bytes)")
    try:
        with _QUIET_PILLOW, Image.open(io.BytesIO(data)) as image:
            _refuse_huge(image)
            image.load()
            return rgb_from_image(image)
    except ImageDecodeError:
        raise
    except UnidentifiedImageError as error:
        raise ImageDecodeError(f"not an image in a known format ({len(data)} bytes)") from error
    except MemoryError as error:
        raise ImageDecodeError("too large for this machine's memory") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise ImageDecodeError(f"corrupt or truncated: {error}") from error


class _QuietPillow:
    """While any thread is inside: no warnings, and no size limit but :data:`MAX_PIXELS`.

    Both are settings of the whole process, so the first thread in changes them and the last one out restores them;
    ``warnings.catch_warnings`` by itself, used in several threads, would leave the warnings switched off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                self._before.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._before.close()


_QUIET_PILLOW = _QuietPillow()


def _refuse_huge(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageDecodeError(f"too large: {image.width} x {image.height}, at most {MAX_PIXELS:,} pixels")


def rgb_from_image(image: Image.Image) -> Image.Image:
    """``image`` turned upright by its EXIF orientation and converted to 8-bit RGB.

    Raises:
        ImageDecodeError: floating-point pixels, whose range nothing states.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ImageDecodeError("floating-point pixels: save the image with 8 or 16 bits a channel")
    if upright.mode.startswith("I"):  # "I;16", "I;16B", "I": 16-bit grey as PNG and TIFF hold it
        upright = _grey_from_16_bit(upright)
    return upright.convert("RGB")


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageDecodeError("32-bit pixels: save the image with 8 or 16 bits a channel")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def resized_size(width: int, height: int, size_px: int) -> tuple[int, int]:
    """(width, height) after the shorter side has become ``size_px``, rounded down as torchvision does."""
    if width <= height:
        return size_px, int(size_px * height / width)
    return int(size_px * width / height), size_px


def centred_corner(width: int, height: int, size_px: int) -> tuple[int, int]:
    """(left, top) of the centred square of ``size_px``, rounded half to even as torchvision does."""
    return round((width - size_px) / 2.0), round((height - size_px) / 2.0)


def vertical_pass_first(width: int, height: int, resized_height: int) -> bool:
    """Whether Pillow resizes an image of ``width`` x ``height`` along its height before its width."""
    return height > 2 * width and resized_height < height


def pixels_from_image(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """The encoder's input: uint8 [H, W, 3].

    Equal to open_clip's evaluation transform before its ``ToTensor``, bit for bit. Only where the resized image would
    have more than 32 million pixels (an aspect ratio in the hundreds) is only the cropped window computed, here, in
    Pillow's arithmetic.
    """
    rgb = rgb_from_image(image)
    width, height = resized_size(rgb.width, rgb.height, spec.size_px)
    left, top = centred_corner(width, height, spec.size_px)
    if width * height > _MAX_RESIZED_PIXELS:
        return _resized_window(rgb, (width, height), (left, top), spec.size_px)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(rgb.crop((left, top, left + spec.size_px, top + spec.size_px)))


def _resized_window(
    image: Image.Image, resized: tuple[int, int], corner: tuple[int, int], size_px: int
) -> NDArray[np.uint8]:
    """The square window at ``corner`` of ``image`` resized to ``resized``, without making the rest of it."""
    pixels = np.asarray(image)
    for axis in (0, 1) if vertical_pass_first(*image.size, resized[1]) else (1, 0):
        turned = _resampled(pixels.swapaxes(0, axis), resized[1 - axis], corner[1 - axis], size_px)
        pixels = turned.swapaxes(0, axis)
    window: NDArray[np.uint8] = np.ascontiguousarray(pixels)
    return window


def _resampled(pixels: NDArray[np.uint8], resized: int, first: int, count: int) -> NDArray[np.uint8]:
    """Rows ``first`` to ``first + count`` of ``pixels`` resampled along axis 0 to ``resized`` rows.

    Pillow's ImagingResample in its own arithmetic: an 8-bit result of each pass.
    """
    size = pixels.shape[0]
    if size == resized:
        return pixels[first : first + count]
    taps, fixed = resampling_taps(size, resized, first, count)
    gathered = pixels[np.minimum(taps, size - 1)].astype(np.int64)  # [count, taps, other axis, 3]
    sums = np.einsum("ct,ct...->c...", fixed, gathered) + (1 << (WEIGHT_BITS - 1))
    rounded: NDArray[np.uint8] = np.clip(sums >> WEIGHT_BITS, 0, 255).astype(np.uint8)
    return rounded


def resampling_taps(size: int, resized: int, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of ``size`` rows make the rows ``first`` to ``first + count`` of ``resized`` ones, and their weights.

    Pillow's: bicubic (a = -0.5), widened when shrinking, rounded to :data:`WEIGHT_BITS` fractional bits. Both int64
    [count, taps]; the weight of a tap that is out of range is 0.
    """
    step = size / resized
    widening = max(step, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * step
    begins = np.maximum((centres - 2 * widening + 0.5).astype(int), 0)
    ends = np.minimum((centres + 2 * widening + 0.5).astype(int), size)
    taps = begins[:, None] + np.arange((ends - begins).max())
    weights = _bicubic((taps + 0.5 - centres[:, None]) / widening) * (taps < ends[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return taps, np.trunc(weights * (1 << WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int64)


def _bicubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def pixels_from_bytes(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """:func:`decode_image`, then :func:`pixels_from_image`: uint8 [H, W, 3].

    Raises:
        ImageDecodeError: as :func:`decode_image`.
    """
    return pixels_from_image(decode_image(data), spec)

"""From a caller's image to what is sent: the encoder's pixels, or the file's bytes. Runs in threads."""

from __future__ import annotations

import io
import os
import re
import stat
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images.decoding import ImageDecodeError, ImageSpec, Resample, rgb_from_image
from clipship.core.images.inputs import ImageLike, bytes_or_image, pixels_from_any
from clipship.serving.client.results import Result

MAX_IMAGE_BYTES = 2**30
"""Larger files are not sent: they get a result with an error."""

Decode = Literal["auto", "client", "server"]
"""Who decodes. With "auto" a server on another machine gets the bytes of a file that is smaller than its pixels, which
saves network and CPU here. A server on this machine shares our CPU, and passing files through its decoder costs more
than it saves, so the client decodes; also arrays and PIL images, which would have to be encoded first."""

_URL = re.compile(r"(https?|ftp|s3|gs|az|abfss?|wasbs?|hdfs|data|file):", re.IGNORECASE)


Payload = NDArray[np.uint8] | bytes
"""What is sent for an image: pixels [H, W, 3], or the file's bytes."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Loads images for a model of ``spec``."""

    spec: ImageSpec
    decode: Decode
    on_this_machine: bool
    """Whether the server runs on this machine."""
    resample: Resample = "exact"
    """How images decoded here are resized."""

    def load(self, image: ImageLike) -> Payload | Result:
        """What is sent for ``image``, or a result with an error.

        Raises:
            UsageError: it is not an image, or a URL.
        """
        try:
            return self._payload(given_bytes(image) if isinstance(image, str | os.PathLike) else image)
        except ImageDecodeError as error:
            return Result(error=str(error))
        except OSError as error:
            return Result(error=f"cannot be read: {error.strerror or error}")
        except (ValueError, MemoryError) as error:
            if isinstance(error, UsageError):
                raise
            return Result(error=f"cannot be read: {error or type(error).__name__}")  # a path with a NUL in it

    def is_ready(self, array: NDArray[Any]) -> bool:
        """Whether ``array`` already has the encoder's shape and type, so needs no loading."""
        size_px = self.spec.size_px
        return self.decode != "server" and array.dtype == np.uint8 and array.shape == (size_px, size_px, 3)

    def _payload(self, image: bytes | Image.Image | NDArray[np.uint8]) -> Payload:
        if isinstance(image, bytes) and len(image) > MAX_IMAGE_BYTES:
            raise _too_large(len(image))
        if self.decode == "server":
            given = bytes_or_image(image)
            return given if isinstance(given, bytes) else _png_bytes(given)
        if self.decode == "auto" and isinstance(image, bytes) and self._is_cheaper_encoded(image):
            return image
        return pixels_from_any(image, self.spec, self.resample)

    def _is_cheaper_encoded(self, data: bytes) -> bool:
        return not self.on_this_machine and 0 < len(data) < 3 * self.spec.size_px**2


def given_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of the file at ``path``.

    Raises:
        UsageError: it is a URL.
        ImageDecodeError: it is too large, or not a regular file: reading a pipe or a device might never end.
        OSError: it cannot be read.
    """
    if _URL.match(os.fspath(path)) and not os.path.exists(path):
        text = os.fspath(path)
        raise UsageError(f"{text[:80]!r} is a URL: fetch it, and give the image's bytes or a path")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, "Is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise ImageDecodeError("cannot be read: not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise _too_large(status.st_size)
        return file.read(MAX_IMAGE_BYTES + 1)


def _too_large(size_bytes: int) -> ImageDecodeError:
    return ImageDecodeError(f"too large to send: {size_bytes} bytes, at most {MAX_IMAGE_BYTES}")


def _png_bytes(image: Image.Image) -> bytes:
    """The image, upright and RGB, lossless."""
    buffer = io.BytesIO()
    rgb_from_image(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def stacked(payloads: list[Any], spec: ImageSpec) -> NDArray[Any]:
    """A request's input: pixels [N, H, W, 3], or files' bytes [N, 1]."""
    if isinstance(payloads[0], bytes):
        elements = np.empty((len(payloads), 1), dtype=np.object_)
        elements[:, 0] = payloads
        return elements
    pixels = np.empty((len(payloads), spec.size_px, spec.size_px, 3), dtype=np.uint8)
    for row, payload in zip(pixels, payloads, strict=True):
        row[...] = payload
    return pixels

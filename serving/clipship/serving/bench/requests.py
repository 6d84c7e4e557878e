"""The requests of a load, prepared in advance so that preparing them is not measured.

Legend: N images of a request, H = W = the side of the encoder's input in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipship.core.images.decoding import ImageSpec, pixels_from_bytes
from clipship.core.tensors import ENCODED, ERROR, image_tensor, indices_tensor, labels_tensor, scores_tensor
from clipship.serving.errors import RequestRejected
from clipship.serving.model_names import CLASSIFY, CLASSIFY_ENCODED
from clipship.serving.transport.base import Tensors, Transport

Mode = Literal["pixels", "encoded", "shm"]
"""How images travel: uint8 pixels, files' bytes, or uint8 pixels in shared memory."""

MODES: tuple[Mode, ...] = ("pixels", "encoded", "shm")
REQUESTS = 4
"""Number of different requests, sent in turn."""

_OUTPUTS = tuple(tensor(1).name for tensor in (scores_tensor, indices_tensor, labels_tensor))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to an ensemble, for the outputs that a client needs."""

    model: str
    inputs: Tensors
    outputs: tuple[str, ...] = _OUTPUTS

    def sent(self, transport: Transport, timeout_s: float) -> Future[Tensors]:
        """Send it; returns the future answer."""
        return transport.infer(self.model, self.inputs, self.outputs, timeout_s=timeout_s)


def model_of(mode: Mode) -> str:
    """The ensemble that takes what ``mode`` sends."""
    return CLASSIFY_ENCODED if mode == "encoded" else CLASSIFY


def pixels_request(pixels: NDArray[np.uint8]) -> Request:
    """To ``classify``, with ``pixels`` uint8 [N, H, W, 3]."""
    return Request(model=CLASSIFY, inputs={image_tensor(pixels.shape[1]).name: pixels})


def encoded_request(files: Sequence[bytes]) -> Request:
    """To ``classify_encoded``, with N files."""
    array = np.array([*files, None], dtype=np.object_)[:-1].reshape(-1, 1)
    return Request(model=CLASSIFY_ENCODED, inputs={ENCODED.name: array}, outputs=(*_OUTPUTS, ERROR.name))


def validate_answer(request: Request, transport: Transport, timeout_s: float) -> None:
    """Send ``request`` once and validate its answer, which a load does not.

    Raises:
        ServingError: it failed, has the wrong number of rows, or an image could not be decoded.
    """
    answer, (images,) = request.sent(transport, timeout_s).result(), request.inputs.values()
    for name, rows in answer.items():
        if len(rows) != len(images):
            raise RequestRejected(f"{transport.url}: {name} has {len(rows)} rows for {len(images)} images")
    errors = [text for text in answer[ERROR.name].ravel() if text] if ERROR.name in request.outputs else []
    if errors:
        raise RequestRejected(f"{transport.url}: an image of the load cannot be decoded: {errors[0].decode()}")


class BenchImages:
    """The images of a load, encoded and as the encoder's pixels.

    Raises:
        ImageDecodeError: one of ``files`` is not an image.
    """

    def __init__(self, files: Sequence[bytes], spec: ImageSpec) -> None:
        self.files = list(files)
        self.spec = spec
        self.pixels = np.stack([pixels_from_bytes(data, spec) for data in files])
        """Uint8 [images, H, W, 3]."""

    def batches(self, batch: int) -> list[list[int]]:
        """Indices of the images of a few requests of ``batch`` images, in turn."""
        turn = itertools.cycle(range(len(self.files)))
        return [list(itertools.islice(turn, batch)) for _ in range(REQUESTS)]

    def requests(self, mode: Mode, batch: int) -> list[Request]:
        """A few requests of ``batch`` images."""
        if mode == "encoded":
            return [encoded_request([self.files[index] for index in indices]) for indices in self.batches(batch)]
        return [pixels_request(self.pixels[indices]) for indices in self.batches(batch)]

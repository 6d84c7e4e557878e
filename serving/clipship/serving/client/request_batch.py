"""Requests: the images of one, its state between attempts, and how many may be in flight."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from numpy.typing import NDArray

from clipship.core.tensors import ENCODED, ERROR, image_tensor
from clipship.serving.client.results import EMBEDDING, INDICES, LABELS, SCORES, Result
from clipship.serving.errors import RequestRejected
from clipship.serving.model_names import CLASSIFY, CLASSIFY_ENCODED, EMBED, of_vocabulary
from clipship.serving.transport.base import Tensors

Purpose: TypeAlias = Literal["classify", "embed"]

Kind: TypeAlias = Literal["pixels", "encoded"]
"""Images of one request are all pixels, or all files' bytes: they go to different models."""


class Window:
    """How many requests may be in flight: halved when the server is overloaded, then one more per round trip.

    Additive increase, multiplicative decrease, as TCP's congestion control (RFC 5681). A client's streams share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._size = float(limit)
        self._lock = threading.Lock()
        self._cut_at_s = float("-inf")

    @property
    def size(self) -> int:
        """Requests, from 1 to ``limit``."""
        return int(self._size)

    def succeeded(self) -> None:
        """Grow: a request was answered."""
        with self._lock:
            self._size = min(float(self.limit), self._size + 1 / self._size)

    def overloaded(self, sent_s: float) -> None:
        """Shrink: a request sent at ``sent_s`` met a busy server. One sent before the last cut does not cut again."""
        with self._lock:
            if sent_s >= self._cut_at_s:
                self._size = max(1.0, self._size / 2)
                self._cut_at_s = time.monotonic()


@dataclass(eq=False)
class PendingImage:
    """One image of a stream."""

    payload: Any = None
    """Pixels or bytes, until they are copied into a request."""
    size_bytes: int = 0
    result: Result | None = None


@dataclass(eq=False)
class Refusals:
    """What is known of the images of a refused request, which is retried in halves."""

    pending: int
    refused: list[tuple[PendingImage, RequestRejected]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class RequestBatch:
    """The images of one request."""

    images: list[PendingImage]
    kind: Kind
    purpose: Purpose
    array: NDArray[Any]
    """The images: pixels [N, H, W, 3], or files' bytes [N, 1]."""
    with_embedding: bool
    vocabulary: str | None
    request_id: str
    trace_context: Any = None
    """OpenTelemetry's, current when the stream began."""
    started_s: float = field(default_factory=time.monotonic)
    attempt: int = 0
    failures: int = 0
    """Attempts that failed while the model ran."""
    sent_s: float = 0.0
    refusals: Refusals | None = None
    answer: Future[Tensors] = field(default_factory=Future)

    @property
    def model(self) -> str:
        """The model that answers it."""
        if self.kind == "encoded":
            return of_vocabulary(CLASSIFY_ENCODED, self.vocabulary)
        return EMBED if self.purpose == "embed" else of_vocabulary(CLASSIFY, self.vocabulary)

    @property
    def inputs(self) -> Tensors:
        """The model's one input."""
        return {ENCODED.name if self.kind == "encoded" else image_tensor(1).name: self.array}

    @property
    def outputs(self) -> list[str]:
        """The outputs to request."""
        classes = [] if self.purpose == "embed" else [SCORES, INDICES, LABELS]
        errors = [ERROR.name] if self.kind == "encoded" else []
        return [*classes, *([EMBEDDING] if self.with_embedding else []), *errors]

    def halves(self) -> list[RequestBatch]:
        """Two requests of half the images each."""
        middle = len(self.images) // 2
        return [
            replace(
                self,
                images=self.images[part],
                array=self.array[part],
                request_id=f"{self.request_id}.{number}",
                attempt=0,
                failures=0,
            )
            for number, part in enumerate((slice(None, middle), slice(middle, None)))
        ]

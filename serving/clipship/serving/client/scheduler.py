"""Schedules the requests of an image stream: load ahead, batch, send, retry, return results in order.

:class:`RequestScheduler` never blocks and starts no thread, so the sync and the asyncio client differ only in the
few lines that wait (``classifier.py``, ``async_classifier.py``)::

    images -> loading (threads) -> batched by kind -> in flight, at most a window -> results -> in the images' order
                                         ^                    |
                                         '-- again, or in halves, when a request fails

It holds at most the images of a window of requests, of one more, and two a worker; fewer if they are large.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np

from clipship.core.images.inputs import ImageLike
from clipship.serving.client.core import ClientCore
from clipship.serving.client.inputs import Payload
from clipship.serving.client.request_batch import Kind, PendingImage, Purpose, Refusals, RequestBatch
from clipship.serving.client.results import Result
from clipship.serving.errors import RETRYABLE, BadAnswer, ModelsMissing, RequestFailed, RequestRejected, ServingError

MAX_REQUEST_BYTES = 64 * 2**20
"""Of the images of one request; a larger image is sent alone."""

_MAX_REFUSALS = 32
"""Consecutive refused images after which the server is at fault, not the images."""
_MAX_REFUSALS_AT_FIRST = 4
"""The same, before the server has accepted any."""
_ATTEMPTS = 3
"""Of a request that fails while the model runs, before it is halved: such a failure may be transient."""
_ATTEMPTS_AT_ONE_IMAGE = 6
"""The same, before the one image is to blame."""


@dataclass(eq=False)
class _Queue:
    """Loaded images of one kind, waiting for a batch."""

    images: deque[PendingImage] = field(default_factory=deque)
    size_bytes: int = 0

    def add(self, image: PendingImage) -> None:
        self.images.append(image)
        self.size_bytes += image.size_bytes

    def take(self, limit: int) -> list[PendingImage]:
        """The first images, as many as one request may hold."""
        batch, size_bytes = list[PendingImage](), 0
        while self.images and len(batch) < limit:
            size_bytes += self.images[0].size_bytes
            if batch and size_bytes > MAX_REQUEST_BYTES:
                break
            batch.append(self.images.popleft())
        self.size_bytes -= sum(image.size_bytes for image in batch)
        return batch


class RequestScheduler:
    """One stream of images. For one thread; only ``wake`` is called by others.

    The caller calls :meth:`advance` and takes the results it returns; adds an image, or calls :meth:`end`, if
    :attr:`wants_image`; else waits until ``wake`` is called, for at most :meth:`wait_s`.
    """

    def __init__(self, client: ClientCore, purpose: Purpose, wake: Callable[[], None]) -> None:
        self._client = client
        self._purpose = purpose
        self._wake = wake
        self._loader = client.loader()
        self._trace_context = client.trace_context()
        self._images: deque[PendingImage] = deque()
        """All without a delivered result, in order."""
        self._loading: deque[tuple[PendingImage, Future[Payload | Result]]] = deque()
        self._queues: dict[Kind, _Queue] = {"pixels": _Queue(), "encoded": _Queue()}
        self._in_flight: set[RequestBatch] = set()
        self._completed: deque[RequestBatch] = deque()
        self._resend: deque[RequestBatch] = deque()
        """To be sent again at once."""
        self._backing_off: list[tuple[float, int, RequestBatch]] = []
        """A heap: when to send it again, a tie-breaker, the request."""
        self._order = itertools.count()
        self._held_bytes = 0
        """Of all loaded images without a result."""
        self._watched: Future[Payload | Result] | None = None
        self._ended = False
        self._accepted = False
        self._refusals = 0
        """Consecutive ones."""
        self._max_images = (client.window.limit + 1) * client.batch_size + 2 * client.workers
        self._max_loading = client.batch_size + 2 * client.workers
        self._max_bytes = (client.window.limit + 1) * MAX_REQUEST_BYTES

    @property
    def wants_image(self) -> bool:
        """Whether there is room for one more."""
        has_room = len(self._images) < self._max_images and len(self._loading) < self._max_loading
        return has_room and not self._ended and self._held_bytes < self._max_bytes

    @property
    def finished(self) -> bool:
        """Whether all results have been returned."""
        return self._ended and not self._images

    @property
    def batch_is_partial(self) -> bool:
        """Whether the images that are loading or loaded do not fill a request, so :meth:`advance` would send none."""
        loaded = sum(len(queue.images) for queue in self._queues.values())
        return len(self._loading) + loaded < self._client.batch_size

    @property
    def is_idle(self) -> bool:
        """Whether loaded images wait for a full batch with nothing in flight: ``advance(flush=True)`` sends them."""
        return not self._in_flight and not self._backing_off and any(each.images for each in self._queues.values())

    def add(self, image: ImageLike) -> None:
        """Take one image. An array is copied now: its owner may reuse it for the next image."""
        pending = PendingImage()
        if isinstance(image, np.ndarray):
            image = np.array(image)
            if self._loader.is_ready(image):
                self._images.append(pending)
                self._enqueue(pending, image)
                return
        self._loading.append((pending, self._client.in_thread(self._loader.load, image)))
        self._images.append(pending)

    def end(self) -> None:
        """There are no more images."""
        self._ended = True

    def wait_s(self) -> float | None:
        """The time until a request is due again; None if only ``wake`` ends the wait."""
        if not self._backing_off or len(self._in_flight) >= self._client.window.size:
            return None
        return max(0.0, self._backing_off[0][0] - time.monotonic())

    def cancel(self) -> None:
        """Cancel everything that is running."""
        for _, loading in self._loading:
            loading.cancel()
        for batch in list(self._in_flight):
            batch.answer.cancel()

    def advance(self, *, flush: bool = False) -> list[Result]:
        """Do all that can be done now, and return the next results in order. ``flush`` sends partial batches too.

        Raises:
            UsageError: an element of the stream is not an image.
            ServingError: a request failed for good, or for longer than the retry deadline.
        """
        while self._completed:
            self._settle(self._completed.popleft())
        while self._loading and self._loading[0][1].done():
            image, loading = self._loading.popleft()
            self._enqueue(image, loading.result())
        while len(self._in_flight) < self._client.window.size:
            batch = self._next_batch(flush)
            if batch is None:
                break
            self._send(batch)
        self._watch_loading()
        results: list[Result] = []
        while self._images and self._images[0].result is not None:
            results.append(self._images[0].result)
            self._images.popleft()
        self._client.count(results)
        return results

    def _enqueue(self, image: PendingImage, loaded: Payload | Result) -> None:
        if isinstance(loaded, Result):
            image.result = loaded
            return
        image.payload = loaded
        image.size_bytes = len(loaded) if isinstance(loaded, bytes) else loaded.nbytes
        self._queues["encoded" if isinstance(loaded, bytes) else "pixels"].add(image)
        self._held_bytes += image.size_bytes

    def _watch_loading(self) -> None:
        """Have ``wake`` called when the next batch is loaded, rather than at every image."""
        if not self._loading or (self._watched is not None and not self._watched.done()):
            return
        missing = max(1, self._client.batch_size - max(len(queue.images) for queue in self._queues.values()))
        last = self._loading[min(missing, len(self._loading)) - 1][1]
        self._watched = self._loading[0][1] if last.done() else last  # the first is slower than those behind it
        self._watched.add_done_callback(lambda _: self._wake())

    def _next_batch(self, flush: bool) -> RequestBatch | None:
        """A request that is due again, or new images."""
        if self._backing_off and self._backing_off[0][0] <= time.monotonic():
            return heapq.heappop(self._backing_off)[2]
        if self._resend:
            return self._resend.popleft()
        if len(self._in_flight) + len(self._backing_off) >= self._client.window.size:
            return None
        kind = self._kind_to_send(flush)
        if kind is None:
            return None
        images = self._queues[kind].take(self._client.batch_size)
        return self._client.batch(images, kind, self._purpose, loader=self._loader, trace_context=self._trace_context)

    def _kind_to_send(self, flush: bool) -> Kind | None:
        """That of a full batch; that of the larger partial one if no image can join it."""
        for kind, queue in self._queues.items():
            if len(queue.images) >= self._client.batch_size or queue.size_bytes > MAX_REQUEST_BYTES:
                return kind
        is_last = self._ended and not self._loading
        is_stuck = not (self.wants_image or self._loading or self._in_flight or self._backing_off)
        if not (flush or is_last or is_stuck):
            return None
        larger = max(self._queues, key=lambda kind: len(self._queues[kind].images))
        return larger if self._queues[larger].images else None

    def _send(self, batch: RequestBatch) -> None:
        batch.sent_s = time.monotonic()
        self._in_flight.add(batch)
        batch.answer = self._client.send(batch)
        batch.answer.add_done_callback(lambda _: self._complete(batch))

    def _complete(self, batch: RequestBatch) -> None:
        """Runs in any thread."""
        self._completed.append(batch)
        self._wake()

    def _settle(self, batch: RequestBatch) -> None:
        """Give the images of a completed request their results, or handle its failure."""
        self._in_flight.discard(batch)
        try:
            results = self._client.results(batch)
        except CancelledError:
            return
        except RETRYABLE as error:
            self._client.window.overloaded(batch.sent_s)
            self._back_off(batch, error)
        except RequestRejected as error:
            self._handle_refusal(batch, error)
        except ModelsMissing:
            if not self._client.drop_canary(batch):
                raise
            self._resend.append(batch)
        else:
            self._take_results(batch, results)

    def _take_results(self, batch: RequestBatch, results: list[Result]) -> None:
        self._client.window.succeeded()
        self._accepted, self._refusals = True, 0
        for image, result in zip(batch.images, results, strict=True):
            self._finish(image, result)
        if batch.refusals is not None:
            self._conclude(batch.refusals, len(batch.images))

    def _back_off(self, batch: RequestBatch, error: ServingError) -> None:
        pause_s = self._client.retry.pause_s(batch.attempt, random.random())
        batch.attempt += 1
        now_s = time.monotonic()
        if now_s + pause_s - batch.started_s > self._client.retry.deadline_s:
            raise type(error)(f"{error} [request {batch.request_id}, {batch.attempt} attempts]") from error
        heapq.heappush(self._backing_off, (now_s + pause_s, next(self._order), batch))

    def _handle_refusal(self, batch: RequestBatch, error: RequestRejected) -> None:
        """Retry in halves, to find the images that the server refuses and keep the results of the others."""
        batch.failures += 1
        attempts = _ATTEMPTS if len(batch.images) > 1 else _ATTEMPTS_AT_ONE_IMAGE
        if isinstance(error, RequestFailed | BadAnswer) and batch.failures < attempts:
            self._back_off(batch, error)
            return
        batch.refusals = batch.refusals or Refusals(pending=len(batch.images))
        if len(batch.images) > 1:
            self._resend += batch.halves()
            return
        self._refusals += 1
        batch.refusals.refused.append((batch.images[0], error))
        if self._refusals >= (_MAX_REFUSALS if self._accepted else _MAX_REFUSALS_AT_FIRST):
            raise _with_request(error, batch)
        self._conclude(batch.refusals, 1)
        if not batch.refusals.pending and not self._accepted:
            raise _with_request(error, batch)

    def _conclude(self, refusals: Refusals, images: int) -> None:
        refusals.pending -= images
        if not refusals.pending:
            for image, error in refusals.refused:
                self._finish(image, Result(error=str(error)))

    def _finish(self, image: PendingImage, result: Result) -> None:
        image.result = result
        self._held_bytes -= image.size_bytes


def _with_request(error: RequestRejected, batch: RequestBatch) -> RequestRejected:
    named = type(error)(f"{error} [request {batch.request_id}]")
    named.__cause__ = error
    return named

"""Schedules the requests of an image stream: load ahead, pack, send, retry, return results in order.

:class:`RequestScheduler` never blocks and starts no thread, so the sync and the asyncio client differ only in the
few lines that wait (``classifier.py``, ``async_classifier.py``)::

    images -> loading (threads) -> packed by kind -> in flight, at most a window -> results -> in the images' order
                                        ^                    |
                                        '-- again, or in halves, when a request fails

However many images there are, it holds at most those of the window, one batch more and two a worker; and where they are
large, it takes no more in when they fill as many of the largest requests.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from clipship.core.images.inputs import ImageLike
from clipship.serving.client.inputs import Loaded
from clipship.serving.client.results import Result
from clipship.serving.errors import (
    RETRYABLE,
    BadAnswer,
    ModelsMissing,
    RequestFailed,
    RequestRejected,
    ServingError,
)
from clipship.serving.transport.base import Tensors

MAX_REQUEST_BYTES = 64 * 2**20
"""Images of one request together; a larger one travels alone."""

_REFUSED_IN_A_ROW = 32
"""Images refused one after the other, after which it is the server that is wrong, not the images."""
_REFUSED_AT_FIRST = 4
"""The same, as long as the server has accepted none."""
_ATTEMPTS = 3
"""At a request that fails while it runs, which may pass, before it is tried in halves."""
_ATTEMPTS_AT_ONE_IMAGE = 6
"""The same, before the image is the one to blame."""

Kind: TypeAlias = Literal["pixels", "encoded"]
"""Images of one request are all pixels, or all files' bytes: they go to different models."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How a request that met a busy, restarting or absent server is sent again: pauses double, with jitter."""

    deadline_s: float = 120.0
    """All attempts of one request together."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int, chance: float) -> float:
        """The pause after attempt ``attempt`` (from 0): half of it fixed, half times ``chance`` (0..1)."""
        full = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(attempt, 30))
        return full * (1 + chance) / 2


class Window:
    """How many requests may be in flight: halved when the server is overloaded, then one more a round trip.

    Additive increase, multiplicative decrease, as TCP's congestion control (RFC 5681). A client's streams share it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(most)
        self._lock = threading.Lock()
        self._cut_at_s = float("-inf")

    @property
    def size(self) -> int:
        """Requests, at least 1."""
        return int(self._size)

    @property
    def most(self) -> int:
        """What it never exceeds."""
        return self._most

    def succeeded(self) -> None:
        """A request was answered."""
        with self._lock:
            self._size = min(float(self._most), self._size + 1 / self._size)

    def overloaded(self, sent_s: float) -> None:
        """A request sent at ``sent_s`` met a busy server; those sent before the last cut say nothing about the cut."""
        with self._lock:
            if sent_s >= self._cut_at_s:
                self._size = max(1.0, self._size / 2)
                self._cut_at_s = time.monotonic()


@dataclass(eq=False)
class PendingImage:
    """One image on its way."""

    payload: Any = None
    size_bytes: int = 0
    result: Result | None = None


@dataclass(eq=False)
class _Refusals:
    """What became of the images of a request that was refused and is tried in parts."""

    pending: int
    accepted: int = 0
    refused: list[tuple[PendingImage, RequestRejected]] = field(default_factory=list)


@dataclass(eq=False)
class RequestBatch:
    """The images of one request."""

    items: list[PendingImage]
    kind: Kind
    inputs: Tensors
    vocabulary: str | None
    request_id: str
    started_s: float
    attempt: int = 0
    failures: int = 0
    """How often it failed while it ran."""
    sent_s: float = 0.0
    refusals: _Refusals | None = None
    answer: Future[Tensors] = field(default_factory=Future)


class Desk(Protocol):
    """What a flow asks of the client."""

    batch_size: int
    workers: int
    window: Window
    retry: Retry

    def load(self, image: ImageLike) -> Future[Loaded] | Loaded:
        """Begin to load an image; one that needs no loading is there at once."""

    def packed(self, items: Sequence[PendingImage], kind: Kind) -> RequestBatch:
        """A request of loaded images."""

    def send(self, batch: RequestBatch) -> Future[Tensors]:
        """Begin an attempt."""

    def results(self, batch: RequestBatch, outputs: Tensors) -> list[Result]:
        """One result an image.

        Raises:
            BadAnswer: the outputs are not what was asked for.
        """

    def other_vocabulary(self, batch: RequestBatch) -> bool:
        """Whether ``batch``, whose models are missing, was given others."""

    def count(self, results: Sequence[Result]) -> None:
        """Results are given to the caller."""


class RequestScheduler:
    """One stream of images. Not for use by several threads, but for ``wake``, which any thread may call.

    The caller calls :meth:`advance` and takes the results it gives; hands over an image, or :meth:`end`, when
    :attr:`wants_image`; else waits until ``wake`` is called, for at most :meth:`wait_s`.
    """

    def __init__(self, desk: Desk, wake: Callable[[], None]) -> None:
        self._desk = desk
        self._wake = wake
        self._items: deque[PendingImage] = deque()
        self._loading: deque[tuple[PendingImage, Future[Loaded]]] = deque()
        self._open: dict[Kind, deque[PendingImage]] = {"pixels": deque(), "encoded": deque()}
        self._flying: set[RequestBatch] = set()
        self._landed: deque[RequestBatch] = deque()
        self._parts: deque[RequestBatch] = deque()
        self._waiting: list[tuple[float, int, RequestBatch]] = []
        self._order = itertools.count()
        self._open_bytes: dict[Kind, int] = {"pixels": 0, "encoded": 0}
        self._held_bytes = 0
        """Of all images that are loaded and have no result."""
        self._watched: Future[Loaded] | None = None
        self._ended = False
        self._accepted = False
        self._refused_in_a_row = 0
        self._most_items = (desk.window.most + 1) * desk.batch_size + 2 * desk.workers
        self._most_loading = desk.batch_size + 2 * desk.workers
        self._most_bytes = (desk.window.most + 1) * MAX_REQUEST_BYTES

    @property
    def wants_image(self) -> bool:
        """Whether there is room for one more."""
        has_room = len(self._items) < self._most_items and len(self._loading) < self._most_loading
        return has_room and not self._ended and self._held_bytes < self._most_bytes

    @property
    def finished(self) -> bool:
        """Whether every image has had its result."""
        return self._ended and not self._items

    @property
    def lacks_company(self) -> bool:
        """Whether all images that are loading or loaded make no full request: :meth:`advance` would send nothing."""
        return len(self._loading) + sum(map(len, self._open.values())) < self._desk.batch_size

    def add(self, image: ImageLike) -> None:
        """Take in one image."""
        item, loading = PendingImage(), self._desk.load(image)
        self._items.append(item)
        if isinstance(loading, Loaded):
            self._open_up(item, loading)
        else:
            self._loading.append((item, loading))

    def end(self) -> None:
        """There are no more images."""
        self._ended = True

    def wait_s(self) -> float | None:
        """The time until something is to be sent again; None where there is nothing to wait for but ``wake``."""
        if not self._waiting or len(self._flying) >= self._desk.window.size:
            return None
        return max(0.0, self._waiting[0][0] - time.monotonic())

    def cancel(self) -> None:
        """Leave nothing running."""
        for _, loading in self._loading:
            loading.cancel()
        for batch in list(self._flying):
            batch.answer.cancel()

    @property
    def idle(self) -> bool:
        """Whether loaded images wait for company with nothing in flight: :meth:`advance` in a hurry would send them."""
        return not self._flying and not self._waiting and any(self._open.values())

    def advance(self, *, hurry: bool = False) -> list[Result]:
        """Do all that can be done now; the results that are next in order. In a ``hurry`` requests need not be full.

        Raises:
            UsageError: an image is nothing an image can come from.
            ServingError: a request failed for good, or for longer than the retry deadline.
        """
        while self._landed:
            self._settle(self._landed.popleft())
        while self._loading and self._loading[0][1].done():
            item, loading = self._loading.popleft()
            self._open_up(item, loading.result())
        self._send_all(hurry)
        self._watch()
        results: list[Result] = []
        while self._items and self._items[0].result is not None:
            results.append(self._items[0].result)
            self._items.popleft()
        self._desk.count(results)
        return results

    def _open_up(self, item: PendingImage, loaded: Loaded) -> None:
        """An image has been loaded: it waits for the company of a request."""
        if loaded.error is not None:
            item.result = Result(error=loaded.error)
            return
        item.payload, item.size_bytes = loaded.payload, loaded.size_bytes
        kind: Kind = "encoded" if isinstance(loaded.payload, bytes) else "pixels"
        self._open[kind].append(item)
        self._open_bytes[kind] += item.size_bytes
        self._held_bytes += item.size_bytes

    def _watch(self) -> None:
        """Ask to be woken when the next batch is loaded, rather than at every image."""
        if not self._loading or (self._watched is not None and not self._watched.done()):
            return
        missing = max(1, self._desk.batch_size - max(map(len, self._open.values())))
        last = self._loading[min(missing, len(self._loading)) - 1][1]
        self._watched = self._loading[0][1] if last.done() else last  # the front one is slower than those behind it
        self._watched.add_done_callback(lambda _: self._wake())

    def _send_all(self, hurry: bool) -> None:
        now_s = time.monotonic()
        while len(self._flying) < self._desk.window.size:
            batch = self._next_batch(now_s, hurry)
            if batch is None:
                return
            self._send(batch)

    def _next_batch(self, now_s: float, hurry: bool) -> RequestBatch | None:
        """What is due again, then parts of what was refused, then new images."""
        if self._waiting and self._waiting[0][0] <= now_s:
            return heapq.heappop(self._waiting)[2]
        if self._parts:
            return self._parts.popleft()
        if len(self._flying) + len(self._waiting) >= self._desk.window.size:
            return None
        kind = self._kind_to_send(hurry)
        return None if kind is None else self._desk.packed(self._taken(kind), kind)

    def _kind_to_send(self, hurry: bool) -> Kind | None:
        """That of a full batch; the fuller of both when nothing more comes, or can come before results go out."""
        for kind, queue in self._open.items():
            if len(queue) >= self._desk.batch_size or self._open_bytes[kind] > MAX_REQUEST_BYTES:
                return kind
        is_last = self._ended and not self._loading
        is_stuck = not (self.wants_image or self._loading or self._flying or self._waiting)
        if not (hurry or is_last or is_stuck):
            return None
        fuller = max(self._open, key=lambda kind: len(self._open[kind]))
        return fuller if self._open[fuller] else None

    def _taken(self, kind: Kind) -> list[PendingImage]:
        """Images from the front of a queue, as many as one request may hold."""
        queue, batch, size_bytes = self._open[kind], list[PendingImage](), 0
        while queue and len(batch) < self._desk.batch_size:
            size_bytes += queue[0].size_bytes
            if batch and size_bytes > MAX_REQUEST_BYTES:
                break
            batch.append(queue.popleft())
        self._open_bytes[kind] -= sum(item.size_bytes for item in batch)
        return batch

    def _send(self, batch: RequestBatch) -> None:
        batch.sent_s = time.monotonic()
        self._flying.add(batch)
        batch.answer = self._desk.send(batch)
        batch.answer.add_done_callback(lambda _: self._note_landing(batch))

    def _note_landing(self, batch: RequestBatch) -> None:
        """Runs in any thread."""
        self._landed.append(batch)
        self._wake()

    def _settle(self, batch: RequestBatch) -> None:
        """Give a landed request's images their results, or see what to do about its failure."""
        self._flying.discard(batch)
        try:
            results = self._desk.results(batch, batch.answer.result())
        except CancelledError:
            return
        except RETRYABLE as error:
            self._desk.window.overloaded(batch.sent_s)
            self._send_later(batch, error)
        except RequestRejected as error:
            self._refused(batch, error)
        except ModelsMissing:
            if not self._desk.other_vocabulary(batch):
                raise
            self._parts.append(batch)
        else:
            self._take_results(batch, results)

    def _take_results(self, batch: RequestBatch, results: list[Result]) -> None:
        self._desk.window.succeeded()
        self._accepted, self._refused_in_a_row = True, 0
        for item, result in zip(batch.items, results, strict=True):
            self._finish(item, result)
        if batch.refusals is not None:
            batch.refusals.accepted += len(batch.items)
            self._conclude(batch.refusals, len(batch.items))

    def _send_later(self, batch: RequestBatch, error: ServingError) -> None:
        pause_s = self._desk.retry.pause_s(batch.attempt, random.random())
        batch.attempt += 1
        now_s = time.monotonic()
        if now_s + pause_s - batch.started_s > self._desk.retry.deadline_s:
            raise type(error)(f"{error} [request {batch.request_id}, {batch.attempt} attempts]") from error
        heapq.heappush(self._waiting, (now_s + pause_s, next(self._order), batch))

    def _refused(self, batch: RequestBatch, error: RequestRejected) -> None:
        """Find the images that a server refuses, so that they do not take their neighbours with them."""
        batch.failures += 1
        attempts = _ATTEMPTS if len(batch.items) > 1 else _ATTEMPTS_AT_ONE_IMAGE
        if isinstance(error, RequestFailed | BadAnswer) and batch.failures < attempts:
            self._send_later(batch, error)
            return
        batch.refusals = batch.refusals or _Refusals(pending=len(batch.items))
        if len(batch.items) > 1:
            self._parts += _halves(batch)
            return
        self._refused_in_a_row += 1
        batch.refusals.refused.append((batch.items[0], error))
        if self._refused_in_a_row >= (_REFUSED_IN_A_ROW if self._accepted else _REFUSED_AT_FIRST):
            raise _with_request(error, batch)
        self._conclude(batch.refusals, 1)
        if not batch.refusals.pending and not self._accepted:
            raise _with_request(error, batch)

    def _conclude(self, refusals: _Refusals, images: int) -> None:
        refusals.pending -= images
        if not refusals.pending:
            for item, error in refusals.refused:
                self._finish(item, Result(error=str(error)))

    def _finish(self, item: PendingImage, result: Result) -> None:
        item.result = result
        self._held_bytes -= item.size_bytes


def _with_request(error: RequestRejected, batch: RequestBatch) -> RequestRejected:
    named = type(error)(f"{error} [request {batch.request_id}]")
    named.__cause__ = error
    return named


def _halves(batch: RequestBatch) -> list[RequestBatch]:
    middle = len(batch.items) // 2
    return [
        RequestBatch(
            items=batch.items[part],
            kind=batch.kind,
            inputs={name: array[part] for name, array in batch.inputs.items()},
            vocabulary=batch.vocabulary,
            request_id=f"{batch.request_id}.{number}",
            started_s=batch.started_s,
            refusals=batch.refusals,
        )
        for number, part in enumerate((slice(None, middle), slice(middle, None)))
    ]

"""The client for asyncio: :class:`~clipship.serving.client.classifier.Classifier` with methods to await.

>>> async with AsyncClassifier("127.0.0.1:8001") as classifier:
...     async for result in classifier.classify_iter(paths):
...         print(result.label, result.score)

gRPC calls back from a thread of its own, and images are decoded in threads, so nothing here blocks the event loop. A
cancelled coroutine cancels its requests and what it was loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any

from clipship.core.images.inputs import ImageLike
from clipship.serving.client.core import ClientCore, ConnectedClient
from clipship.serving.client.metadata import ServerMetadata
from clipship.serving.client.request_batch import Purpose
from clipship.serving.client.results import Embeddings, Result, embeddings_from_results
from clipship.serving.client.scheduler import RequestScheduler
from clipship.serving.client.settings import ClientSettings, ServerLike, settings_as_keywords

Images = Iterable[ImageLike] | AsyncIterable[ImageLike]

_MAX_BATCHING_DELAY_S = 0.01
"""How long images of a slow source wait for a full batch while nothing is in flight."""
_END: Any = object()


class AsyncClassifier(ConnectedClient):
    """An asyncio client; arguments and errors as :class:`~clipship.serving.client.classifier.Classifier`.

    It connects in ``async with``, or at :meth:`connect`. For one event loop, whose tasks may share it.
    """

    @settings_as_keywords
    def __init__(self, server: ServerLike, settings: ClientSettings) -> None:
        self._server = server
        self._settings = settings

    async def __aenter__(self) -> AsyncClassifier:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> ServerMetadata:
        """Connect, unless connected, and return the server's metadata.

        Raises:
            ServingError: as the constructor of the blocking client.
        """
        if self._connected is None:
            self._connected = await asyncio.to_thread(ClientCore, self._server, self._settings)
        return self._connected.metadata

    async def close(self) -> None:
        """Close the connection and end the threads that load images."""
        if self._connected is not None:
            await asyncio.to_thread(self._connected.close)

    async def refresh(self) -> ServerMetadata:
        """See :meth:`Classifier.refresh`."""
        return await asyncio.to_thread(self._core.refresh)

    async def classify(self, images: Images) -> list[Result]:
        """One result per image, in order."""
        return [result async for result in self.classify_iter(images)]

    def classify_iter(self, images: Images) -> AsyncGenerator[Result, None]:
        """One result per image, in order, while ``images`` is being consumed, which may be an asynchronous iterable.

        See :meth:`Classifier.classify_iter`. If the source is slow, images do not wait for a full batch.
        """
        return self._stream(images, "classify")

    async def embed(self, images: Images) -> Embeddings:
        """The images' embeddings, float32 [N, D], rows of unit length."""
        results = [result async for result in self.embed_iter(images)]
        return embeddings_from_results(results, self.metadata.embed_dim)

    def embed_iter(self, images: Images) -> AsyncGenerator[Result, None]:
        """One result per image, in order, with its embedding and no classes."""
        return self._stream(images, "embed")

    async def _stream(self, images: Images, purpose: Purpose) -> AsyncGenerator[Result, None]:
        awake, loop = asyncio.Event(), asyncio.get_running_loop()
        scheduler = RequestScheduler(self._core, purpose, lambda: _set_in_loop(loop, awake))
        source = _Source(images)
        try:
            while not scheduler.finished:
                awake.clear()
                results = scheduler.advance(flush=source.is_slow)
                for result in results:
                    yield result
                if results:
                    continue
                if not (scheduler.wants_image and source.add_next(scheduler)):
                    await source.wait(awake, scheduler)
        finally:
            scheduler.cancel()
            await source.close()


class _Source:
    """The images, of either kind of iterable. The next one of an asynchronous source is fetched in a task."""

    def __init__(self, images: Images) -> None:
        self._sync = iter(images) if isinstance(images, Iterable) else None
        self._async: AsyncIterator[ImageLike] | None = None if isinstance(images, Iterable) else aiter(images)
        self._next: asyncio.Task[Any] | None = None
        self.is_slow = False

    def add_next(self, scheduler: RequestScheduler) -> bool:
        """Add the next image, or end the stream; False while the source has not produced it."""
        if self._sync is not None:
            image = next(self._sync, _END)
        else:
            if self._next is None:
                self._next = asyncio.ensure_future(self._fetched())
            if not self._next.done():
                return False
            image, self._next = self._next.result(), None
            self.is_slow = False
        if image is _END:
            scheduler.end()
        else:
            scheduler.add(image)
        return True

    async def wait(self, awake: asyncio.Event, scheduler: RequestScheduler) -> None:
        """Wait until ``awake`` is set, the next image has arrived, or a request is due."""
        delay_s = _MAX_BATCHING_DELAY_S if self._next is not None and scheduler.is_idle else None
        limit_s = min((each for each in (scheduler.wait_s(), delay_s) if each is not None), default=None)
        event: asyncio.Task[Any] = asyncio.ensure_future(awake.wait())
        awaited = {event, self._next} if self._next is not None else {event}
        try:
            done, _ = await asyncio.wait(awaited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            event.cancel()
        self.is_slow = not done and scheduler.is_idle

    async def close(self) -> None:
        """Stop fetching."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])
            if not self._next.cancelled():
                self._next.exception()  # retrieved, or asyncio would log it

    async def _fetched(self) -> Any:
        assert self._async is not None
        return await anext(self._async, _END)


def _set_in_loop(loop: asyncio.AbstractEventLoop, awake: asyncio.Event) -> None:
    """Set ``awake`` from any thread, unless the loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(awake.set)

"""The client for asyncio: the methods of :class:`~clipship.serving.client.classifier.Classifier`, to be awaited.

>>> async with AsyncClassifier("127.0.0.1:8001") as classifier:
...     async for result in classifier.classify_iter(paths):
...         print(result.label, result.score)

It is the blocking client's engine with other waiting: gRPC calls back from a thread of its own, and images are decoded
in threads, so nothing here keeps the event loop from its work. A coroutine that is cancelled cancels its requests and
what it was loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any

from clipship.core.images.decoding import Resample
from clipship.core.images.inputs import ImageLike
from clipship.serving.client.core import Canary, ClientCore, Purpose, Settings
from clipship.serving.client.inputs import Decode
from clipship.serving.client.results import Embeddings, Result, ServerMetadata, embeddings_from_results
from clipship.serving.client.scheduler import RequestScheduler, Retry
from clipship.serving.errors import ServingError
from clipship.serving.transport.base import Transport
from clipship.serving.transport.connection import Connection

Images = Iterable[ImageLike] | AsyncIterable[ImageLike]

_COMPANY_S = 0.01
"""How long images of a slow source wait for others, while nothing is in flight, until they are sent without."""
_END: Any = object()


class AsyncClassifier:
    """An asyncio client; arguments and errors as :class:`~clipship.serving.client.classifier.Classifier`.

    It connects in ``async with``, or at :meth:`connect`. For one event loop; tasks of it may share it.
    """

    def __init__(
        self,
        server: str | Connection | Transport,
        *,
        decode: Decode = "auto",
        resample: Resample = "exact",
        embeddings: bool = False,
        vocabulary: str | None = None,
        canary: Canary | None = None,
        timeout_s: float = 60.0,
        window: int = 4,
        batch_size: int | None = None,
        workers: int | None = None,
        retry: Retry | None = None,
        telemetry: bool = False,
    ) -> None:
        self._server = server
        self._settings = Settings(
            decode=decode,
            resample=resample,
            embeddings=embeddings,
            vocabulary=vocabulary,
            canary=canary,
            timeout_s=timeout_s,
            window=window,
            batch_size=batch_size,
            workers=workers,
            retry=retry,
            telemetry=telemetry,
        )
        self._connected: ClientCore | None = None

    async def __aenter__(self) -> AsyncClassifier:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> ServerMetadata:
        """Connect, unless this has been done; what the server says about its models.

        Raises:
            ServingError: as the constructor of the blocking client.
        """
        if self._connected is None:
            self._connected = await asyncio.to_thread(ClientCore, self._server, self._settings)
        return self._connected.facts

    async def close(self) -> None:
        """End the connection and the threads that load images."""
        if self._connected is not None:
            await asyncio.to_thread(self._connected.close)

    @property
    def facts(self) -> ServerMetadata:
        """What the server said about its models when the client connected, or at the last :meth:`refresh`."""
        return self._engine.facts

    @property
    def batch_size(self) -> int:
        """Images a request."""
        return self._engine.batch_size

    @property
    def window(self) -> int:
        """Requests that may be in flight now: at most those asked for, fewer while the server is overloaded."""
        return self._engine.window.size

    async def refresh(self) -> ServerMetadata:
        """See :meth:`Classifier.refresh`."""
        return await asyncio.to_thread(self._engine.refresh)

    async def classify(self, images: Images) -> list[Result]:
        """One result an image, in order."""
        return [result async for result in self.classify_iter(images)]

    def classify_iter(self, images: Images) -> AsyncGenerator[Result, None]:
        """One result an image, in order, while ``images`` is being consumed, which may be an asynchronous iterable.

        See :meth:`Classifier.classify_iter`. Where the source is slow, images do not wait for full requests.
        """
        return self._stream(images, "classify")

    async def embed(self, images: Images) -> Embeddings:
        """The images' embeddings, float32 [N, D], rows of unit length."""
        results = [result async for result in self.embed_iter(images)]
        return embeddings_from_results(results, self.facts.embed_dim)

    def embed_iter(self, images: Images) -> AsyncGenerator[Result, None]:
        """One result an image, in order, with its embedding and no classes."""
        return self._stream(images, "embed")

    @property
    def _engine(self) -> ClientCore:
        if self._connected is None:
            raise ServingError("the client is not connected: use it in async with, or await connect() first")
        return self._connected

    async def _stream(self, images: Images, purpose: Purpose) -> AsyncGenerator[Result, None]:
        awake, loop = asyncio.Event(), asyncio.get_running_loop()
        flow = self._engine.flow(purpose, lambda: _call_in(loop, awake))
        source = _Source(images)
        try:
            while not flow.finished:
                awake.clear()
                results = flow.advance(hurry=source.is_slow)
                for result in results:
                    yield result
                if results:
                    continue
                if not (flow.wants_image and source.hand_over(flow)):
                    await source.wait(awake, flow)
        finally:
            flow.cancel()
            await source.close()


class _Source:
    """The images, of either kind of iterable; the next of an asynchronous one is fetched while answers are awaited."""

    def __init__(self, images: Images) -> None:
        self._sync = iter(images) if isinstance(images, Iterable) else None
        self._later: AsyncIterator[ImageLike] | None = None if isinstance(images, Iterable) else aiter(images)
        self._next: asyncio.Task[Any] | None = None
        self.is_slow = False

    def hand_over(self, flow: RequestScheduler) -> bool:
        """Give ``flow`` the next image or the end; False where that is still awaited."""
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
            flow.end()
        else:
            flow.add(image)
        return True

    async def wait(self, awake: asyncio.Event, flow: RequestScheduler) -> None:
        """Until ``awake`` is set, the next image is there, or something is to be sent."""
        company_s = _COMPANY_S if self._next is not None and flow.idle else None
        limit_s = min((each for each in (flow.wait_s(), company_s) if each is not None), default=None)
        event: asyncio.Task[Any] = asyncio.ensure_future(awake.wait())
        awaited = {event, self._next} if self._next is not None else {event}
        try:
            done, _ = await asyncio.wait(awaited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            event.cancel()
        self.is_slow = not done and flow.idle

    async def close(self) -> None:
        """Stop fetching."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])
            if not self._next.cancelled():
                self._next.exception()  # looked at, or asyncio would report it as forgotten

    async def _fetched(self) -> Any:
        assert self._later is not None
        return await anext(self._later, _END)


def _call_in(loop: asyncio.AbstractEventLoop, awake: asyncio.Event) -> None:
    """Set ``awake`` from any thread; a loop that has ended has nobody to wake."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(awake.set)

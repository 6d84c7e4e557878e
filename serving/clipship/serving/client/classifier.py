"""Classify images over gRPC: any number of them, in order, with bounded memory.

>>> with Classifier("127.0.0.1:8001") as classifier:
...     for result in classifier.classify_iter(paths):
...         print(result.label, result.score)

The preprocessing is read from the server's model configuration, never chosen here. ``async_classifier.py`` is the
asyncio version; both share the client core (``core.py``) and the request scheduler (``scheduler.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from clipship.core.images.decoding import Resample
from clipship.core.images.inputs import ImageLike
from clipship.serving.client.core import Canary, ClientCore, Purpose, Settings
from clipship.serving.client.inputs import Decode
from clipship.serving.client.results import Embeddings, Result, ServerMetadata, embeddings_from_results, read_facts
from clipship.serving.client.scheduler import RequestScheduler, Retry
from clipship.serving.transport.base import Transport
from clipship.serving.transport.connection import Connection

__all__ = [
    "Canary",
    "Classifier",
    "Connection",
    "Embeddings",
    "Result",
    "Retry",
    "ServerMetadata",
    "read_facts",
]

_Self = TypeVar("_Self", bound="Classifier")


class Classifier:
    """A client of the models that ``clipship repository`` writes. May be shared by threads.

    Args:
        server: HOST:PORT of Triton's gRPC endpoint (several with commas between), a :class:`Connection` for TLS, tokens
            and the like, or a transport.
        decode: "client" decodes and resizes here and sends pixels; "server" sends the files' bytes; "auto" takes for
            each image what is cheaper (see :data:`~clipship.serving.client.inputs.Decode`). The results are the same.
        resample: how images that are decoded here are resized: "exact" as open_clip to the bit, "fast" at most 2 of 255
            off.
        embeddings: give each result its image's embedding, too.
        vocabulary: a further vocabulary of the server, by name; None: its first.
        canary: another vocabulary that answers a share of the requests.
        timeout_s: how long one attempt of a request may take.
        window: requests in flight at the same time, at most; fewer while the server is overloaded.
        batch_size: images a request, at most what the server takes (the default).
        workers: threads that read and decode, by default one a processor.
        retry: how long, and how often, failed requests are sent again.
        telemetry: report spans and counters to the application's OpenTelemetry providers.

    Raises:
        ServerUnreachable: nobody answers.
        ModelsMissing: a server without our models answers; says which it has.
        AccessDenied: it asks for a token or certificate that was not given.
        UsageError: a setting is out of range.
        MissingExtraError: opentelemetry-api is not installed.
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
        settings = Settings(
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
        self._engine = ClientCore(server, settings)

    @property
    def facts(self) -> ServerMetadata:
        """What the server said about its models when the client was made, or at the last :meth:`refresh`."""
        return self._engine.facts

    @property
    def batch_size(self) -> int:
        """Images a request."""
        return self._engine.batch_size

    @property
    def window(self) -> int:
        """Requests that may be in flight now: at most those asked for, fewer while the server is overloaded."""
        return self._engine.window.size

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and the threads that load images."""
        self._engine.close()

    def refresh(self) -> ServerMetadata:
        """Read again what the server says about its models, after a vocabulary was published.

        Raises:
            ServingError: as the constructor.
        """
        return self._engine.refresh()

    def classify(self, images: Iterable[ImageLike]) -> list[Result]:
        """One result an image, in order. See :meth:`classify_iter`."""
        return list(self.classify_iter(images))

    def classify_iter(self, images: Iterable[ImageLike]) -> Iterator[Result]:
        """One result an image, in order, while ``images`` is being consumed.

        At most ``window`` requests are in flight, and the images of as many requests and of one more are held, however
        many images there are. An image that cannot be read or decoded, or that the server refuses by itself, gives a
        result with an error; the others are not affected.

        Raises:
            UsageError: an element of ``images`` is nothing an image can come from.
            ServingError: requests failed for longer than the retry deadline, or the server refuses whatever it is sent.
        """
        return self._stream(images, "classify")

    def embed(self, images: Iterable[ImageLike]) -> Embeddings:
        """The images' embeddings, float32 [N, D], rows of unit length. See :meth:`embed_iter`."""
        return embeddings_from_results(list(self.embed_iter(images)), self.facts.embed_dim)

    def embed_iter(self, images: Iterable[ImageLike]) -> Iterator[Result]:
        """One result an image, in order, with its embedding and no classes. As :meth:`classify_iter`."""
        return self._stream(images, "embed")

    def _stream(self, images: Iterable[ImageLike], purpose: Purpose) -> Iterator[Result]:
        awake = threading.Event()
        flow = self._engine.flow(purpose, awake.set)
        source = iter(images)
        try:
            while not flow.finished:
                awake.clear()
                results = flow.advance()
                if results:
                    yield from results
                elif flow.wants_image:
                    _take_some(flow, source, awake)
                else:
                    awake.wait(flow.wait_s())
        finally:
            flow.cancel()


def _take_some(flow: RequestScheduler, source: Iterator[ImageLike], awake: threading.Event) -> None:
    """One image, and more as long as there is nothing else to do."""
    for image in source:
        flow.add(image)
        if awake.is_set() or not (flow.wants_image and flow.lacks_company):
            return
    flow.end()

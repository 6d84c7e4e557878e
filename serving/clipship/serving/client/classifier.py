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

from clipship.core.images.inputs import ImageLike
from clipship.serving.client.core import ClientCore, ConnectedClient
from clipship.serving.client.metadata import ServerMetadata
from clipship.serving.client.request_batch import Purpose
from clipship.serving.client.results import Embeddings, Result, embeddings_from_results
from clipship.serving.client.scheduler import RequestScheduler
from clipship.serving.client.settings import ClientSettings, ServerLike, settings_as_keywords

_Self = TypeVar("_Self", bound="Classifier")


class Classifier(ConnectedClient):
    """A client of the models that ``clipship repository`` writes. May be shared by threads.

    Args:
        server: HOST:PORT of Triton's gRPC endpoint (several, separated by commas), a ``Connection`` for TLS, tokens and
            the like, or a transport.
        settings: the keyword arguments; :class:`~clipship.serving.client.settings.ClientSettings` describes them.

    Raises:
        ServerUnreachable: no server answers.
        ModelsMissing: a server without our models answers; lists those it has.
        AccessDenied: the server requires a token or certificate.
        UsageError: a setting is out of range.
        MissingExtraError: opentelemetry-api is not installed.
    """

    @settings_as_keywords
    def __init__(self, server: ServerLike, settings: ClientSettings) -> None:
        self._connected = ClientCore(server, settings)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the threads that load images."""
        self._core.close()

    def refresh(self) -> ServerMetadata:
        """Read the server's metadata again, after a vocabulary was published.

        Raises:
            ServingError: as the constructor.
        """
        return self._core.refresh()

    def classify(self, images: Iterable[ImageLike]) -> list[Result]:
        """One result per image, in order. See :meth:`classify_iter`."""
        return list(self.classify_iter(images))

    def classify_iter(self, images: Iterable[ImageLike]) -> Iterator[Result]:
        """One result per image, in order, while ``images`` is being consumed.

        At most ``window`` requests are in flight, and only the images of these and of one more request are held. An
        image that cannot be read or decoded, or that the server refuses, gives a result with an error; the others are
        not affected.

        Raises:
            UsageError: an element of ``images`` is not an image.
            ServingError: requests failed for longer than the retry deadline, or the server refuses every request.
        """
        return self._stream(images, "classify")

    def embed(self, images: Iterable[ImageLike]) -> Embeddings:
        """The images' embeddings, float32 [N, D], rows of unit length. See :meth:`embed_iter`."""
        return embeddings_from_results(list(self.embed_iter(images)), self.metadata.embed_dim)

    def embed_iter(self, images: Iterable[ImageLike]) -> Iterator[Result]:
        """One result per image, in order, with its embedding and no classes. Like :meth:`classify_iter`."""
        return self._stream(images, "embed")

    def _stream(self, images: Iterable[ImageLike], purpose: Purpose) -> Iterator[Result]:
        awake = threading.Event()
        scheduler = RequestScheduler(self._core, purpose, awake.set)
        source = iter(images)
        try:
            while not scheduler.finished:
                awake.clear()
                results = scheduler.advance()
                if results:
                    yield from results
                elif scheduler.wants_image:
                    _add_some(scheduler, source, awake)
                else:
                    awake.wait(scheduler.wait_s())
        finally:
            scheduler.cancel()


def _add_some(scheduler: RequestScheduler, source: Iterator[ImageLike], awake: threading.Event) -> None:
    """Add one image, and more while there is nothing else to do."""
    for image in source:
        scheduler.add(image)
        if awake.is_set() or not (scheduler.wants_image and scheduler.batch_is_partial):
            return
    scheduler.end()

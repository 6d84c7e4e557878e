"""What the sync and the asyncio client share: the connection, the loading threads, sending requests."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from clipship.core.errors import UsageError
from clipship.core.machine.runtimes import available_cores
from clipship.serving.client.inputs import Loader, stacked
from clipship.serving.client.metadata import ServerMetadata, read_identity, read_server_metadata
from clipship.serving.client.pool import ServerPool
from clipship.serving.client.request_batch import Kind, PendingImage, Purpose, RequestBatch, Window
from clipship.serving.client.results import Result, results_from_outputs
from clipship.serving.client.settings import ClientSettings, Retry, ServerLike
from clipship.serving.errors import ModelsMissing, ServingError
from clipship.serving.transport.base import CallOptions, Tensors, Transport
from clipship.serving.transport.connection import Connection, connection_from_text
from clipship.serving.transport.grpc import TritonTransport

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ClientCore:
    """A connected client. May be shared by threads.

    Raises:
        ServingError: as :func:`read_server_metadata`.
        UsageError: a setting does not fit the server's models.
    """

    def __init__(self, server: ServerLike, settings: ClientSettings) -> None:
        self.settings = settings
        self.retry = settings.retry or Retry()
        self.window = Window(settings.window)
        self.workers = settings.workers or available_cores()
        self._canary = settings.canary
        self._canary_due = random.random()
        self._lock = threading.Lock()
        self._prefix, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self._telemetry = _telemetry() if settings.telemetry else None
        self._pool = ServerPool(_transports(server), lambda transport: read_identity(transport, settings.vocabulary))
        try:
            self.metadata = self._pool.ask(self._read_metadata)
            self.batch_size = _validated_batch_size(settings.batch_size, self.metadata.max_batch_size)
        except BaseException:
            self._pool.close()
            raise
        self._loading = ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="clipship-load")

    def close(self) -> None:
        """Close the connection and end the threads."""
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._pool.close()

    def refresh(self) -> ServerMetadata:
        """Read the server's metadata again, and require its identity of all servers from now on."""
        self.metadata = self._pool.ask(self._read_metadata)
        self._pool.accept(self.metadata.identity)
        return self.metadata

    def loader(self) -> Loader:
        """What turns a stream's images into pixels, or into bytes for the server to decode."""
        return Loader(
            spec=self.metadata.image_spec,
            decode=self.settings.decode,
            on_this_machine=self._pool.on_this_machine,
            resample=self.settings.resample,
        )

    def in_thread(self, load: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Run ``load`` in one of the loading threads."""
        try:
            return self._loading.submit(load, *arguments)
        except RuntimeError as error:
            raise ServingError("the client is closed: make a new one") from error

    def trace_context(self) -> Any:
        """The current OpenTelemetry context, to which a stream's requests belong."""
        return self._telemetry.current() if self._telemetry is not None else None

    def batch(
        self, images: list[PendingImage], kind: Kind, purpose: Purpose, *, loader: Loader, trace_context: Any
    ) -> RequestBatch:
        """A request of loaded images, which give up their payloads to it."""
        array = stacked([image.payload for image in images], loader.spec)
        for image in images:
            image.payload = None
        return RequestBatch(
            images=images,
            kind=kind,
            purpose=purpose,
            array=array,
            with_embedding=purpose == "embed" or self.settings.embeddings,
            vocabulary=self._route() if purpose == "classify" else None,
            request_id=f"{self._prefix}-{next(self._numbers)}",
            trace_context=trace_context,
        )

    def send(self, batch: RequestBatch) -> Future[Tensors]:
        """Start an attempt."""
        left_s = self.retry.deadline_s - (time.monotonic() - batch.started_s)
        timeout_s = max(min(self.settings.timeout_s, left_s), 1e-3)
        options: CallOptions = {"timeout_s": timeout_s, "request_id": batch.request_id}
        if self._telemetry is None:
            return self._pool.infer(batch.model, batch.inputs, batch.outputs, **options)
        options["headers"], end = self._telemetry.begin(batch, self._pool.url)
        answer = self._pool.infer(batch.model, batch.inputs, batch.outputs, **options)
        answer.add_done_callback(end)
        return answer

    def results(self, batch: RequestBatch) -> list[Result]:
        """One result per image of an answered request.

        Raises:
            BadAnswer: the outputs do not fit the request.
            ServingError: the attempt failed.
        """
        outputs, names = batch.answer.result(), batch.outputs
        url, vocabulary = self._pool.url, batch.vocabulary
        return results_from_outputs(outputs, names, len(batch.images), url=url, vocabulary=vocabulary)

    def drop_canary(self, batch: RequestBatch) -> bool:
        """If the canary's models were unloaded, send no more requests to it; False if ``batch`` was not for them."""
        if self.settings.canary is None or batch.vocabulary in (None, self.settings.vocabulary):
            return False
        self._canary = None
        batch.vocabulary = self.settings.vocabulary
        _log.warning("the server no longer serves the canary's vocabulary %r", self.settings.canary.vocabulary)
        return True

    def count(self, results: Sequence[Result]) -> None:
        """Report that the caller has received ``results``."""
        if self._telemetry is not None and results:
            self._telemetry.count(results)

    def _route(self) -> str | None:
        """The vocabulary of the next request: a share of them goes to the canary's, evenly spaced."""
        with self._lock:
            canary = self._canary
            if canary is None:
                return self.settings.vocabulary
            self._canary_due += canary.share
            if self._canary_due < 1:
                return self.settings.vocabulary
            self._canary_due -= 1
            return canary.vocabulary

    def _read_metadata(self, transport: Transport) -> ServerMetadata:
        metadata = read_server_metadata(transport, self.settings.vocabulary)
        if self._canary is not None:
            read_identity(transport, self._canary.vocabulary)  # raises if it is not served
        if self.settings.embeddings and metadata.embed_dim is None:
            raise ModelsMissing(
                f"the Triton at {transport.url} gives no embeddings: write its repository again with "
                "clipship repository"
            )
        return metadata


def _transports(server: ServerLike) -> list[Transport]:
    if isinstance(server, str):
        server = connection_from_text(server)
    if not isinstance(server, Connection):
        return [server]
    return [TritonTransport(url, server) for url in server.addresses]


def _validated_batch_size(given: int | None, largest: int) -> int:
    if given is None:
        return largest
    if not 1 <= given <= largest:
        raise UsageError(f"batch size {given}: the server takes 1 to {largest}")
    return given


def _telemetry() -> Any:
    from clipship.serving.client.telemetry import Telemetry

    return Telemetry()


class ConnectedClient:
    """What the sync and the asyncio client say about their connection."""

    _connected: ClientCore | None = None

    @property
    def metadata(self) -> ServerMetadata:
        """What the server reported about its models when the client connected, or at the last :meth:`refresh`."""
        return self._core.metadata

    @property
    def batch_size(self) -> int:
        """Images a request."""
        return self._core.batch_size

    @property
    def window(self) -> int:
        """Requests that may be in flight now: the setting, or fewer while the server is overloaded."""
        return self._core.window.size

    @property
    def _core(self) -> ClientCore:
        if self._connected is None:
            raise ServingError("the client is not connected: use it in async with, or await connect() first")
        return self._connected

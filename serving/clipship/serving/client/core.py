"""What the blocking and the asyncio client share: settings, the connection, loading threads, requests and answers."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from clipship.core.errors import UsageError
from clipship.core.images.decoding import Resample
from clipship.core.images.inputs import ImageLike
from clipship.core.machine.runtimes import available_cores
from clipship.core.tensors import ENCODED, ERROR, image_tensor
from clipship.serving.client.inputs import Decode, Loaded, Loader, stacked
from clipship.serving.client.pool import Identity, ServerPool
from clipship.serving.client.results import (
    EMBEDDING,
    INDICES,
    LABELS,
    SCORES,
    Result,
    ServerMetadata,
    read_facts,
    results_from_outputs,
)
from clipship.serving.client.scheduler import Kind, PendingImage, RequestBatch, RequestScheduler, Retry, Window
from clipship.serving.errors import ModelsMissing, ServingError
from clipship.serving.model_names import CLASSIFY, CLASSIFY_ENCODED, EMBED, of_vocabulary
from clipship.serving.transport.base import Tensors, Transport
from clipship.serving.transport.connection import Connection, connection_from_text
from clipship.serving.transport.grpc import TritonTransport

if TYPE_CHECKING:
    from clipship.serving.client.telemetry import Telemetry

_log = logging.getLogger(__name__)

Purpose = Literal["classify", "embed"]


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Send ``share`` (0..1) of the requests to another vocabulary's models; ``Result.vocabulary`` says which answered.

    Where those models are taken away while the client runs, the first vocabulary answers all requests again.
    """

    vocabulary: str
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"a canary's share is {self.share:g}: give a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a client works; see :class:`~clipship.serving.client.classifier.Classifier`.

    Raises:
        UsageError: a number is out of range.
    """

    decode: Decode = "auto"
    resample: Resample = "exact"
    embeddings: bool = False
    vocabulary: str | None = None
    canary: Canary | None = None
    timeout_s: float = 60.0
    window: int = 4
    batch_size: int | None = None
    workers: int | None = None
    retry: Retry | None = None
    telemetry: bool = False

    def __post_init__(self) -> None:
        if self.decode not in ("auto", "client", "server"):
            raise UsageError(f"decode is {self.decode!r}: give auto, client or server")
        if self.resample not in ("exact", "fast"):
            raise UsageError(f"resample is {self.resample!r}: give exact or fast")
        if self.window < 1 or not self.timeout_s > 0 or (self.workers is not None and self.workers < 1):
            raise UsageError(
                f"window {self.window}, timeout_s {self.timeout_s:g}, workers {self.workers}: give positive numbers"
            )


class ClientCore:
    """A connected client. May be shared by threads.

    Raises:
        ServingError: as :func:`read_facts`.
        UsageError: a number does not fit the server's models.
    """

    def __init__(self, server: str | Connection | Transport, settings: Settings) -> None:
        self.settings = settings
        self.retry = settings.retry or Retry()
        self.window = Window(settings.window)
        self.workers = settings.workers or available_cores()
        self.canary = settings.canary
        self._telemetry = _telemetry() if settings.telemetry else None
        self._lock = threading.Lock()
        self._canary_due = random.random()
        self._prefix, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self.transport = ServerPool(_transports(server), self._identity)
        try:
            self.facts = self._read_facts()
            self.batch_size = _validated_batch_size(settings.batch_size, self.facts.max_batch_size)
        except BaseException:
            self.transport.close()
            raise
        self.pool = ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="clipship-load")

    def close(self) -> None:
        """End the connection and the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.transport.close()

    def refresh(self) -> ServerMetadata:
        """Read again what the server says about its models, and from now on ask that of all endpoints."""
        self.facts = self._read_facts()
        self.transport.accept(identity_of(self.facts))
        return self.facts

    def flow(self, purpose: Purpose, wake: Callable[[], None]) -> RequestScheduler:
        """One stream of images."""
        return RequestScheduler(Desk(self, purpose), wake)

    def request_id(self) -> str:
        """A new one: which client, and a number."""
        return f"{self._prefix}-{next(self._numbers)}"

    def route(self) -> str | None:
        """The vocabulary of the next request: every so many-th is the canary's."""
        canary = self.canary
        if canary is None:
            return self.settings.vocabulary
        with self._lock:
            self._canary_due += canary.share
            if self._canary_due < 1:
                return self.settings.vocabulary
            self._canary_due -= 1
        return canary.vocabulary

    def _identity(self, transport: Transport) -> Identity:
        return identity_of(read_facts(transport, self.settings.vocabulary))

    def _read_facts(self) -> ServerMetadata:
        facts = read_facts(self.transport, self.settings.vocabulary)
        if self.canary is not None:
            read_facts(self.transport, self.canary.vocabulary)  # which refuses one that is not served
        if self.settings.embeddings and facts.embed_dim is None:
            raise ModelsMissing(
                f"the Triton at {self.transport.url} gives no embeddings: write its repository again with "
                "clipship repository"
            )
        return facts


class Desk:
    """What a :class:`~clipship.serving.client.scheduler.RequestScheduler` asks of the client."""

    def __init__(self, engine: ClientCore, purpose: Purpose) -> None:
        self.batch_size, self.workers = engine.batch_size, engine.workers
        self.window, self.retry = engine.window, engine.retry
        self._engine = engine
        self._purpose = purpose
        self._spec = engine.facts.image_spec
        here = engine.transport.on_this_machine
        decode, resample = engine.settings.decode, engine.settings.resample
        self._loader = Loader(spec=self._spec, decode=decode, on_this_machine=here, resample=resample)
        self._telemetry = engine._telemetry
        self._parent = self._telemetry.current() if self._telemetry is not None else None

    def load(self, image: ImageLike) -> Future[Loaded] | Loaded:
        """See :meth:`flow.Desk.load`. An array is copied now: its owner may use it again for the next image."""
        if isinstance(image, np.ndarray):
            image = np.array(image)
            if self._loader.is_ready(image):
                return Loaded(image)
        try:
            return self._engine.pool.submit(self._loader.load, image)
        except RuntimeError as error:
            raise ServingError("the client is closed: make a new one") from error

    def packed(self, items: Sequence[PendingImage], kind: Kind) -> RequestBatch:
        """See :meth:`flow.Desk.packed`."""
        array = stacked([item.payload for item in items], self._spec)
        for item in items:
            item.payload = None
        return RequestBatch(
            items=list(items),
            kind=kind,
            inputs={ENCODED.name if kind == "encoded" else image_tensor(self._spec.size_px).name: array},
            vocabulary=self._engine.route() if self._purpose == "classify" else None,
            request_id=self._engine.request_id(),
            started_s=time.monotonic(),
        )

    def send(self, batch: RequestBatch) -> Future[Tensors]:
        """See :meth:`flow.Desk.send`."""
        model, outputs = self._model(batch), self._outputs(batch.kind)
        left_s = self.retry.deadline_s - (time.monotonic() - batch.started_s)
        timeout_s = max(min(self._engine.settings.timeout_s, left_s), 1e-3)
        transport, telemetry = self._engine.transport, self._telemetry
        if telemetry is None:
            return transport.infer(model, batch.inputs, outputs, timeout_s=timeout_s, request_id=batch.request_id)
        attempt = telemetry.begin(batch, model, transport.url, self._parent)
        answer = transport.infer(
            model, batch.inputs, outputs, timeout_s=timeout_s, request_id=batch.request_id, headers=attempt.headers
        )
        answer.add_done_callback(lambda done: telemetry.end(attempt, done))
        return answer

    def results(self, batch: RequestBatch, outputs: Tensors) -> list[Result]:
        """See :meth:`flow.Desk.results`."""
        names = self._outputs(batch.kind)
        url = self._engine.transport.url
        return results_from_outputs(outputs, names, len(batch.items), url=url, vocabulary=batch.vocabulary)

    def other_vocabulary(self, batch: RequestBatch) -> bool:
        """See :meth:`flow.Desk.other_vocabulary`: a canary that was taken away gives its requests back."""
        settings = self._engine.settings
        if settings.canary is None or batch.vocabulary in (None, settings.vocabulary):
            return False
        self._engine.canary = None
        batch.vocabulary = settings.vocabulary
        _log.warning("the vocabulary %r is not served any more: no canary", settings.canary.vocabulary)
        return True

    def count(self, results: Sequence[Result]) -> None:
        """See :meth:`flow.Desk.count`."""
        if self._telemetry is not None and results:
            self._telemetry.count(results)

    def _model(self, batch: RequestBatch) -> str:
        if batch.kind == "encoded":
            return of_vocabulary(CLASSIFY_ENCODED, batch.vocabulary)
        return EMBED if self._purpose == "embed" else of_vocabulary(CLASSIFY, batch.vocabulary)

    def _outputs(self, kind: Kind) -> list[str]:
        classes = [] if self._purpose == "embed" else [SCORES, INDICES, LABELS]
        wants_embedding = self._purpose == "embed" or self._engine.settings.embeddings
        return [*classes, *([EMBEDDING] if wants_embedding else []), *([ERROR.name] if kind == "encoded" else [])]


def _transports(server: str | Connection | Transport) -> list[Transport]:
    if isinstance(server, str):
        server = connection_from_text(server)
    if not isinstance(server, Connection):
        return [server]
    return [TritonTransport(url, server) for url in server.addresses]


def identity_of(facts: ServerMetadata) -> Identity:
    """A vocabulary that is published may be of another bundle, with the same encoder."""
    return Identity(facts.encoder_digest or facts.bundle_digest, facts.vocabulary_digest)


def _validated_batch_size(given: int | None, largest: int) -> int:
    if given is None:
        return largest
    if not 1 <= given <= largest:
        raise UsageError(f"batch size {given}: the server takes 1 to {largest}")
    return given


def _telemetry() -> Telemetry:
    from clipship.serving.client.telemetry import Telemetry

    return Telemetry()

"""Classify images over gRPC: any number of them, in order, with bounded memory.

>>> with Classifier("127.0.0.1:8001") as classifier:
...     for result in classifier.classify_iter(paths):
...         print(result.label, result.score)

What the images must look like is read from the server's model configuration, never chosen here.
Legend: N images of a request, H = W = the side of the encoder's input in pixels, k classes reported an image.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import UsageError
from clipship.core.images import ImageDecodeError, ImageSpec, rgb_from_image
from clipship.core.pictures import ImageLike, bytes_or_image, pixels_from_any
from clipship.core.tensors import ENCODED, ERROR, image_tensor, indices_tensor, labels_tensor, scores_tensor
from clipship.serving.errors import RETRYABLE, ModelsMissing
from clipship.serving.names import (
    BUNDLE_DIGEST,
    CLASSIFIER,
    CLASSIFY,
    CLASSIFY_ENCODED,
    IMAGE_SPEC,
    TOP_K,
    VOCABULARY_DIGEST,
)
from clipship.serving.transport import Tensors, Transport, TritonTransport, parameters_of

MAX_REQUEST_BYTES = 64 * 2**20
"""Encoded images of one request together; a larger one travels alone."""
MAX_IMAGE_BYTES = 2**30
"""A larger file is not sent: it gets a result with an error."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an image shows, best first; with ``error`` set, why it could not be classified, and nothing else."""

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    """Probabilities over the whole vocabulary."""
    indices: tuple[int, ...] = ()
    """Positions in the vocabulary."""
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The best class, None for an image that could not be classified."""
        return self.labels[0] if self.labels else None

    @property
    def score(self) -> float | None:
        """The best class's probability, None for an image that could not be classified."""
        return self.scores[0] if self.scores else None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the server says about its models."""

    bundle_digest: str
    vocabulary_digest: str
    image_spec: ImageSpec
    max_batch_size: int
    top_k: int
    """Classes reported an image."""


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


@dataclass(frozen=True)
class _Loaded:
    """An image ready to be sent (pixels, or encoded bytes), or why it is not."""

    payload: NDArray[np.uint8] | bytes | None
    error: str | None = None

    @property
    def size_bytes(self) -> int:
        return len(self.payload) if isinstance(self.payload, bytes) else 0


@dataclass
class _Batch:
    """Images of one request, those that could not be loaded among them."""

    images: list[_Loaded]
    inputs: Tensors
    answer: Future[Tensors] | None
    """None when there is nothing to send."""
    started_s: float = field(default_factory=time.monotonic)


class Classifier:
    """A client of the models that ``clipship repository`` writes. May be shared by threads.

    Args:
        server: HOST:PORT of Triton's gRPC endpoint, or a transport.
        decode: "client" decodes and resizes here and sends pixels; "server" sends the files' bytes; same results.
        timeout_s: how long one attempt of a request may take.
        window: requests in flight at the same time.
        batch_size: images a request, at most what the server takes (the default).
        workers: threads that read and decode, by default one a processor.

    Raises:
        ServerUnreachable: nobody answers.
        ModelsMissing: a server without our models answers; says which it has.
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        server: str | Transport,
        *,
        decode: Literal["client", "server"] = "client",
        timeout_s: float = 60.0,
        window: int = 4,
        batch_size: int | None = None,
        workers: int | None = None,
        retry: Retry | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if decode not in ("client", "server"):
            raise UsageError(f"decode is {decode!r}: give client or server")
        if window < 1 or timeout_s <= 0:
            raise UsageError(f"window {window}, timeout_s {timeout_s:g}: give positive numbers")
        self._transport = TritonTransport(server) if isinstance(server, str) else server
        self.facts = read_facts(self._transport)
        self.batch_size = _checked_batch_size(batch_size, self.facts.max_batch_size)
        self._decode = decode
        self._timeout_s = timeout_s
        self._window = window
        self._workers = workers or len(os.sched_getaffinity(0))
        self._retry = retry or Retry()
        self._sleep = sleep

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def classify(self, images: Iterable[ImageLike]) -> list[Result]:
        """One result an image, in order. See :meth:`classify_iter`."""
        return list(self.classify_iter(images))

    def classify_iter(self, images: Iterable[ImageLike]) -> Iterator[Result]:
        """One result an image, in order, while ``images`` is being consumed.

        At most ``window`` requests are in flight and one batch is being loaded, however many images there are. An image
        that cannot be read or decoded gives a result with an error; the others are not affected.

        Raises:
            UsageError: an element of ``images`` is nothing an image can come from.
            ServingError: a request failed for good, or for longer than the retry deadline.
        """
        pool = ThreadPoolExecutor(max_workers=self._workers, thread_name_prefix="clipship-load")
        try:
            yield from self._run(iter(images), pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, images: Iterator[ImageLike], pool: ThreadPoolExecutor) -> Iterator[Result]:
        """Load ahead, keep the window full, give results from its front."""
        ahead = self.batch_size + 2 * self._workers
        loading: deque[Future[_Loaded]] = deque()
        flying: deque[_Batch] = deque()
        while True:
            for image in itertools.islice(images, ahead - len(loading)):
                loading.append(pool.submit(self._load, image))
            if loading and len(flying) < self._window:
                flying.append(self._send(self._take_batch(loading)))
            elif flying:
                yield from self._results(flying.popleft())
            else:
                return
            while flying and _is_done(flying[0]):
                yield from self._results(flying.popleft())

    def _take_batch(self, loading: deque[Future[_Loaded]]) -> list[_Loaded]:
        """Images from the front of the queue, as many as one request may hold."""
        batch: list[_Loaded] = []
        size_bytes = 0
        while loading and len(batch) < self.batch_size:
            size_bytes += loading[0].result().size_bytes
            if batch and size_bytes > MAX_REQUEST_BYTES:
                break
            batch.append(loading.popleft().result())
        return batch

    def _load(self, image: ImageLike) -> _Loaded:
        """What is sent for ``image``; runs in a thread."""
        try:
            payload = self._payload(image)
        except ImageDecodeError as error:
            return _Loaded(None, str(error))
        except OSError as error:
            return _Loaded(None, f"cannot be read: {error.strerror or error}")
        if isinstance(payload, bytes) and len(payload) > MAX_IMAGE_BYTES:
            return _Loaded(None, f"too large to send: {len(payload)} bytes, at most {MAX_IMAGE_BYTES}")
        return _Loaded(payload)

    def _payload(self, image: ImageLike) -> NDArray[np.uint8] | bytes:
        """Pixels uint8 [H, W, 3], or encoded bytes when the server decodes."""
        if self._decode == "client":
            return pixels_from_any(image, self.facts.image_spec)
        given = bytes_or_image(image)
        return given if isinstance(given, bytes) else _png_bytes(given)

    def _send(self, images: list[_Loaded]) -> _Batch:
        payloads = [image.payload for image in images if image.payload is not None]
        inputs = self._inputs(payloads)
        return _Batch(images, inputs, self._infer(inputs) if payloads else None)

    def _inputs(self, payloads: Sequence[NDArray[np.uint8] | bytes]) -> Tensors:
        """The request's one input: pixels [N, H, W, 3], or files' bytes [N, 1]."""
        if self._decode == "server":
            return {ENCODED.name: np.array(payloads, dtype=np.object_).reshape(-1, 1)}
        size_px = self.facts.image_spec.size_px
        return {image_tensor(size_px).name: np.array(payloads, dtype=np.uint8).reshape(-1, size_px, size_px, 3)}

    def _infer(self, inputs: Tensors) -> Future[Tensors]:
        outputs = [tensor(self.facts.top_k).name for tensor in (scores_tensor, indices_tensor, labels_tensor)]
        if self._decode == "server":
            outputs.append(ERROR.name)
        model = CLASSIFY_ENCODED if self._decode == "server" else CLASSIFY
        return self._transport.infer(model, inputs, outputs, timeout_s=self._timeout_s)

    def _answer(self, batch: _Batch) -> Tensors:
        """The batch's outputs; a request that met a busy or absent server is sent again until the deadline."""
        assert batch.answer is not None
        for attempt in itertools.count():
            try:
                return batch.answer.result()
            except RETRYABLE:
                pause_s = self._retry.pause_s(attempt, random.random())
                if time.monotonic() + pause_s - batch.started_s > self._retry.deadline_s:
                    raise
                self._sleep(pause_s)
                batch.answer = self._infer(batch.inputs)
        raise AssertionError("unreachable")

    def _results(self, batch: _Batch) -> list[Result]:
        """One result an image of the batch, in order."""
        rows = _result_rows(self._answer(batch)) if batch.answer is not None else iter(())
        return [Result(error=image.error) if image.error is not None else next(rows) for image in batch.images]


def read_facts(transport: Transport) -> ModelFacts:
    """What the server says about its models.

    Raises:
        ModelsMissing: it does not serve ours; says which it has.
        ServingError: as the transport.
    """
    try:
        ensemble, classifier = transport.model_config(CLASSIFY), transport.model_config(CLASSIFIER)
        told = {**parameters_of(ensemble), **parameters_of(classifier)}
        return ModelFacts(
            bundle_digest=told[BUNDLE_DIGEST],
            vocabulary_digest=told[VOCABULARY_DIGEST],
            image_spec=ImageSpec.from_json(json.loads(told[IMAGE_SPEC])),
            max_batch_size=int(ensemble["max_batch_size"]),
            top_k=int(told[TOP_K]),
        )
    except (ModelsMissing, KeyError, ValueError) as error:
        names = ", ".join(transport.model_names()) or "no model at all"
        raise ModelsMissing(
            f"the Triton at {transport.url} does not serve clipship's models; it has {names}: "
            "write a repository with clipship repository and start it with clipship serve"
        ) from error


def _checked_batch_size(given: int | None, largest: int) -> int:
    if given is None:
        return largest
    if not 1 <= given <= largest:
        raise UsageError(f"batch size {given}: the server takes 1 to {largest}")
    return given


def _is_done(batch: _Batch) -> bool:
    return batch.answer is None or batch.answer.done()


def _png_bytes(image: Image.Image) -> bytes:
    """The image, upright and RGB, without loss."""
    buffer = io.BytesIO()
    rgb_from_image(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _result_rows(outputs: Tensors) -> Iterator[Result]:
    """One result a row of the outputs [N, k]."""
    names = (labels_tensor(1).name, scores_tensor(1).name, indices_tensor(1).name)
    labels, scores, indices = (outputs[name] for name in names)
    errors = outputs[ERROR.name][:, 0] if ERROR.name in outputs else [b""] * len(labels)
    for label_row, score_row, index_row, error in zip(labels, scores, indices, errors, strict=True):
        if error:
            yield Result(error=error.decode())
        else:
            yield Result(
                labels=tuple(label.decode() for label in label_row),
                scores=tuple(score_row.tolist()),
                indices=tuple(index_row.tolist()),
            )

"""OpenTelemetry spans and counters of a client. Imported on demand; needs ``opentelemetry-api`` alone.

A span ``clipship.infer`` for each attempt of a request, child of the span that was current when the stream began, with
the attributes of OpenTelemetry's RPC conventions; its context travels to the server in ``traceparent``, which Triton's
own OpenTelemetry mode continues. Counters ``clipship.client.images`` and ``clipship.client.requests``, by outcome, and
a histogram ``clipship.client.request.duration`` in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from clipship.core.errors import MissingExtraError
from clipship.serving.client.request_batch import RequestBatch
from clipship.serving.client.results import Result


class Telemetry:
    """What a client reports to the application's OpenTelemetry providers.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry import context, metrics, propagate, trace
        except ImportError as error:
            raise MissingExtraError("opentelemetry-api", "telemetry") from error
        self._trace, self._propagate, self._context = trace, propagate, context
        self._tracer = trace.get_tracer("clipship")
        meter = metrics.get_meter("clipship")
        self._images = meter.create_counter("clipship.client.images", unit="{image}")
        self._requests = meter.create_counter("clipship.client.requests", unit="{request}")
        self._duration = meter.create_histogram("clipship.client.request.duration", unit="s")

    def current(self) -> Any:
        """The context that a stream's requests belong to."""
        return self._context.get_current()

    def begin(self, batch: RequestBatch, url: str) -> tuple[dict[str, str], Callable[[Future[Any]], None]]:
        """Start the span of an attempt: the headers that carry its context, and what ends it, given the answer."""
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": "inference.GRPCInferenceService",
            "rpc.method": "ModelInfer",
            "server.address": url,
            "clipship.model": batch.model,
            "clipship.images": len(batch.images),
            "clipship.request_id": batch.request_id,
            "clipship.attempt": batch.attempt,
        }
        kind, parent = self._trace.SpanKind.CLIENT, batch.trace_context
        span = self._tracer.start_span("clipship.infer", context=parent, kind=kind, attributes=attributes)
        headers: dict[str, str] = {}
        self._propagate.inject(headers, context=self._trace.set_span_in_context(span, parent))
        started_s = time.monotonic()
        return headers, lambda answer: self._end(span, started_s, answer)

    def _end(self, span: Any, started_s: float, answer: Future[Any]) -> None:
        error = None if answer.cancelled() else answer.exception()
        outcome = "cancelled" if answer.cancelled() else type(error).__name__ if error else "ok"
        if error is not None:
            span.set_attribute("error.type", outcome)
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
        span.end()
        self._requests.add(1, {"outcome": outcome})
        self._duration.record(time.monotonic() - started_s, {"outcome": outcome})

    def count(self, results: Iterable[Result]) -> None:
        """Count images by outcome."""
        outcomes = [result.error is None for result in results]
        for outcome, number in (("ok", sum(outcomes)), ("error", len(outcomes) - sum(outcomes))):
            if number:
                self._images.add(number, {"outcome": outcome})

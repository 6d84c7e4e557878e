"""OpenTelemetry spans and counters of a client. Imported only when asked for; needs ``opentelemetry-api`` alone.

A span ``clipship.infer`` for each attempt of a request, child of the span that was current when the stream began, with
the attributes of OpenTelemetry's RPC conventions; its context travels to the server in ``traceparent``, which Triton's
own OpenTelemetry mode continues. Counters ``clipship.client.images`` and ``clipship.client.requests``, by outcome, and
a histogram ``clipship.client.request.duration`` in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from clipship.core.errors import MissingExtraError
from clipship.serving.client.results import Result
from clipship.serving.client.scheduler import RequestBatch


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt of a request: its span, and the headers that tell the server of it."""

    span: Any
    headers: dict[str, str]
    started_s: float


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

    def begin(self, batch: RequestBatch, model: str, url: str, parent: Any) -> Attempt:
        """An attempt at ``batch`` starts."""
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": "inference.GRPCInferenceService",
            "rpc.method": "ModelInfer",
            "server.address": url,
            "clipship.model": model,
            "clipship.images": len(batch.items),
            "clipship.request_id": batch.request_id,
            "clipship.attempt": batch.attempt,
        }
        kind = self._trace.SpanKind.CLIENT
        span = self._tracer.start_span("clipship.infer", context=parent, kind=kind, attributes=attributes)
        headers: dict[str, str] = {}
        self._propagate.inject(headers, context=self._trace.set_span_in_context(span, parent))
        return Attempt(span=span, headers=headers, started_s=time.monotonic())

    def end(self, attempt: Attempt, answer: Future[Any]) -> None:
        """The attempt has landed."""
        error = None if answer.cancelled() else answer.exception()
        outcome = "cancelled" if answer.cancelled() else type(error).__name__ if error else "ok"
        if error is not None:
            attempt.span.set_attribute("error.type", outcome)
            attempt.span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
        attempt.span.end()
        self._requests.add(1, {"outcome": outcome})
        self._duration.record(time.monotonic() - attempt.started_s, {"outcome": outcome})

    def count(self, results: Iterable[Result]) -> None:
        """Images have had their results."""
        outcomes = [result.error is None for result in results]
        for outcome, number in (("ok", sum(outcomes)), ("error", len(outcomes) - sum(outcomes))):
            if number:
                self._images.add(number, {"outcome": outcome})

"""Spans and counters, on OpenTelemetry's own SDK."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from clipship.core.errors import MissingExtraError
from clipship.serving import Classifier, Retry
from clipship.serving.errors import RequestRejected, ServerOverloaded
from clipship.serving.transport.base import Tensors
from tests.serving.fake_server import answer, fake, flat
from tests.serving.processes import python

sdk = pytest.importorskip("opentelemetry.sdk")


@pytest.fixture(scope="module")
def exporters() -> tuple[Any, Any]:
    """The in-memory exporters of this process' one tracer provider and meter provider."""
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader]))
    return spans, reader


@pytest.fixture
def spans(exporters: tuple[Any, Any]) -> Any:
    exporters[0].clear()
    return exporters[0]


def counts(reader: Any) -> dict[tuple[str, str], int]:
    """The counters by name and outcome."""
    data = reader.get_metrics_data()
    return {
        (metric.name, point.attributes["outcome"]): point.value
        for resource in (data.resource_metrics if data else [])
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if hasattr(point, "value")
    }


def test_each_attempt_is_a_span_below_the_callers(spans: Any) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import StatusCode

    attempts = 0

    def busy_once(model: str, inputs: Tensors) -> Tensors:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ServerOverloaded("busy")
        return answer(model, inputs)

    transport = fake(busy_once)
    retry = Retry(first_pause_s=0.001)
    with (
        Classifier(transport, telemetry=True, window=1, retry=retry) as classifier,
        trace.get_tracer("test").start_as_current_span("job") as job,
    ):
        classifier.classify(flat(value) for value in range(6))
    ours = [span for span in spans.get_finished_spans() if span.name == "clipship.infer"]
    assert [span.attributes["clipship.images"] for span in ours] == [4, 4, 2]
    assert [span.attributes["clipship.attempt"] for span in ours] == [0, 1, 0]
    assert [span.attributes["clipship.model"] for span in ours] == ["classify"] * 3
    assert [span.attributes["clipship.request_id"] for span in ours] == transport.request_ids
    assert [span.status.status_code for span in ours] == [StatusCode.ERROR, StatusCode.UNSET, StatusCode.UNSET]
    assert ours[0].attributes["error.type"] == "ServerOverloaded"
    assert {span.parent.span_id for span in ours} == {job.get_span_context().span_id}
    told = [headers["traceparent"].split("-")[2] for headers in transport.headers]
    assert told == [f"{span.context.span_id:016x}" for span in ours], "the server's spans hang below ours"


def test_images_and_requests_are_counted(exporters: tuple[Any, Any]) -> None:
    before = counts(exporters[1])
    with Classifier(fake(), telemetry=True) as classifier:
        classifier.classify([flat(1), b"", flat(2), flat(3), flat(4), flat(5), b"x"])
    after = counts(exporters[1])
    assert {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)} == {
        ("clipship.client.images", "ok"): 5,
        ("clipship.client.images", "error"): 2,
        ("clipship.client.requests", "ok"): 2,
    }


def test_a_failure_ends_its_span(spans: Any) -> None:
    def refuse(model: str, inputs: Tensors) -> Tensors:
        raise RequestRejected("no")

    with Classifier(fake(refuse), telemetry=True) as classifier, pytest.raises(RequestRejected):
        classifier.classify([flat(0)])
    assert [span.attributes["error.type"] for span in spans.get_finished_spans()] == ["RequestRejected"]


def test_nothing_is_reported_and_nothing_imported_when_it_is_off(spans: Any) -> None:
    transport = fake()
    Classifier(transport).classify([flat(0)])
    assert spans.get_finished_spans() == ()
    assert transport.headers == [{}]
    program = (
        "import sys\n"
        "from tests.serving.fake_server import fake, flat\n"
        "from clipship.serving.client.classifier import Classifier\n"
        "Classifier(fake()).classify([flat(0)])\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert python(program).strip() == "[]"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(MissingExtraError, match=r"opentelemetry-api is not installed: .*clipship\[telemetry\]"):
        Classifier(fake(), telemetry=True)

"""What Triton's statistics say about a request, on numbers made up so that the sums are known."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from clipship.serving.bench.steps import PHASES, breakdown


def statistics(name: str, *, requests: int, images: int, runs: int, ms: tuple[float, ...], success_ms: float) -> Any:
    """After ``requests`` requests that took ``ms`` (queue, input, infer, output) each on average."""
    message = service_pb2.ModelStatistics(name=name, version="1", inference_count=images, execution_count=runs)
    for phase, value in zip(PHASES, ms, strict=True):
        duration = getattr(message.inference_stats, phase)
        duration.count, duration.ns = requests, int(requests * value * 1e6)
    message.inference_stats.cache_hit.count = requests // 2
    message.inference_stats.success.count = requests
    message.inference_stats.success.ns = int(requests * success_ms * 1e6)
    return message


def both(factor: int) -> dict[str, Any]:
    """Statistics after ``factor`` equal loads of 10 requests with 8 images."""
    many: dict[str, Any] = {"requests": 10 * factor, "images": 80 * factor}
    encoder = statistics("image_encoder", runs=4 * factor, ms=(20.0, 1.0, 60.0, 1.0), success_ms=82.0, **many)
    classifier = statistics("classifier", runs=10 * factor, ms=(2.0, 0.5, 3.0, 0.5), success_ms=6.0, **many)
    ensemble = statistics("classify", runs=10 * factor, ms=(0.0,) * 4, success_ms=92.0, **many)
    return {each.name: each for each in (encoder, classifier, ensemble)}


def test_the_parts_of_a_request_add_up_to_its_latency() -> None:
    parts = breakdown(both(3), both(5), "classify", ("image_encoder", "classifier"), latency_ms=100.0)
    encoder, classifier = parts.steps
    assert (encoder.queue_ms, encoder.compute_input_ms, encoder.compute_infer_ms) == pytest.approx((20.0, 1.0, 60.0))
    assert (encoder.total_ms, classifier.total_ms) == pytest.approx((82.0, 6.0))
    assert encoder.cached == 0.5
    assert (encoder.images_a_run, classifier.images_a_run) == (20.0, 8.0)
    assert (parts.between_ms, parts.outside_ms) == pytest.approx((4.0, 8.0))
    shares = parts.shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["image_encoder.compute_infer"] == pytest.approx(0.6)
    assert shares["outside"] == pytest.approx(0.08)
    assert parts.to_json()["steps"][0]["model"] == "image_encoder"


def test_without_a_request_in_between_there_is_nothing_to_say() -> None:
    with pytest.raises(ValueError, match="no request was answered"):
        breakdown(both(1), both(1), "classify", ("image_encoder",), latency_ms=1.0)

"""Where a request's time goes, by the server's statistics before and after a load.

For every model Triton counts the nanoseconds of requests in its queue, input, infer and output phases. A request in a
batch is charged with the time of the whole batch, so the steps of a request add up to its latency; the rest is between
the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipship.serving.transport.grpc import TritonTransport

PHASES = ("queue", "compute_input", "compute_infer", "compute_output")
"""Triton's names of a request's phases in a model."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model's part of a request; milliseconds are means over requests."""

    model: str
    queue_ms: float
    compute_input_ms: float
    compute_infer_ms: float
    compute_output_ms: float
    images_a_run: float
    """Mean batch size of the model's executions, after dynamic batching."""
    cached: float = 0.0
    """The share of requests answered from the response cache: a load repeats its images."""

    @property
    def total_ms(self) -> float:
        """All four together."""
        return self.queue_ms + self.compute_input_ms + self.compute_infer_ms + self.compute_output_ms


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """A request's mean latency by where it was spent; parts that Triton counts twice make the sum larger."""

    latency_ms: float
    steps: tuple[Step, ...]
    between_ms: float
    """In the server, between the steps."""
    outside_ms: float
    """Outside the server's models: network, client, and the server's reading and writing."""

    def shares(self) -> dict[str, float]:
        """Shares of the latency, from 0 to 1: each step's phases as ``model.phase``, ``between`` and ``outside``."""
        parts = {f"{step.model}.{phase}": getattr(step, f"{phase}_ms") for step in self.steps for phase in PHASES}
        parts |= {"between": self.between_ms, "outside": self.outside_ms}
        return {name: value / self.latency_ms for name, value in parts.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field, and the shares."""
        return {**asdict(self), "shares": self.shares()}


def statistics_of(transport: TritonTransport) -> dict[str, Any]:
    """Triton's ``ModelStatistics`` message of every model, the newest version's.

    Raises:
        ServingError: as the transport.
    """
    reply = transport.call("ModelStatistics")
    return {each.name: each for each in sorted(reply.model_stats, key=lambda each: int(each.version))}


def breakdown(
    before: Mapping[str, Any], after: Mapping[str, Any], ensemble: str, models: Sequence[str], latency_ms: float
) -> Breakdown:
    """Where the requests to ``ensemble`` between two statistics spent their time.

    Args:
        before: ``ModelStatistics`` messages by model, and the same after the load.
        models: the ensemble's steps, in their order.
        latency_ms: the requests' mean latency where they were sent.

    Raises:
        ValueError: no request to the ensemble succeeded in between.
    """
    steps = tuple(_step(before[model], after[model]) for model in models)
    inside_ms = _mean_ms(before[ensemble], after[ensemble], "success")
    if inside_ms is None:
        raise ValueError(f"{ensemble}: no request was answered between the two statistics")
    between_ms = max(0.0, inside_ms - sum(step.total_ms for step in steps))
    outside_ms = max(0.0, latency_ms - inside_ms)
    return Breakdown(latency_ms=latency_ms, steps=steps, between_ms=between_ms, outside_ms=outside_ms)


def _step(before: Any, after: Any) -> Step:
    runs = after.execution_count - before.execution_count
    images = after.inference_count - before.inference_count
    hits, requests = (
        getattr(after.inference_stats, name).count - getattr(before.inference_stats, name).count
        for name in ("cache_hit", "success")
    )
    means = {f"{phase}_ms": _mean_ms(before, after, phase) or 0.0 for phase in PHASES}
    return Step(model=after.name, images_a_run=images / (runs or 1), cached=hits / (requests or 1), **means)


def _mean_ms(before: Any, after: Any, what: str) -> float | None:
    """Milliseconds a request; None if there was none."""
    first, last = (getattr(each.inference_stats, what) for each in (before, after))
    count = last.count - first.count
    return (last.ns - first.ns) / count / 1e6 if count else None

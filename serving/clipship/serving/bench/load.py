"""A closed loop: a fixed number of requests is in flight, and each answer sends the next one.

Throughput and latency are linked: latency = concurrency / requests per second (Little's law).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipship.serving.bench.steps import Breakdown

PERCENTILES = (50, 90, 95, 99)

Send = Callable[[], object]
"""Sends one request and returns when it is answered."""

_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One measurement of a running load."""

    images_per_s: float
    latencies_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds from sending a request to its answer, by name: mean, p50, p90, p95, p99. Empty: unknown."""
    whole_mean_ms: float = math.nan
    """Mean latency of all requests, also those before and after the measured span, as the server's counters have it."""
    steps: Breakdown | None = None
    """Where a request's time went, for a load on a server."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        steps = self.steps and self.steps.to_json()
        return {"images_per_s": self.images_per_s, "latencies_ms": dict(self.latencies_ms), "steps": steps}


def counted(
    finished_s: Sequence[float], latencies_s: Sequence[float], span: tuple[float, float], batch: int
) -> Reading:
    """The rate and latencies within ``span`` (start and end) of a loop, given all of its answers in order.

    Answers come in bursts, one per batch of the server. The clock therefore runs from the last answer before the span
    to the last one within it: from the end of a burst to the end of a burst.

    Raises:
        ValueError: no answer came before the span, or none within it.
    """
    times, latencies_ms = np.asarray(finished_s), np.asarray(latencies_s) * 1e3
    first, last = np.searchsorted(times, span, side="right")
    if first == 0 or first == last:
        raise ValueError(f"{first} answers before the measured span and {last - first} within it: one each is needed")
    measured = latencies_ms[first:last]
    ranks = {f"p{rank}": float(np.percentile(measured, rank)) for rank in PERCENTILES}
    return Reading(
        images_per_s=float((last - first) * batch / (times[last - 1] - times[first - 1])),
        latencies_ms={"mean": float(measured.mean()), **ranks},
        whole_mean_ms=float(latencies_ms.mean()),
    )


def measure(send: Send, *, concurrency: int, batch: int, seconds: float, warm_up_s: float) -> Reading:
    """Run a closed loop and measure it for ``seconds``, or longer until ``concurrency`` answers came.

    Raises:
        Exception: of the first request that failed.
    """
    finished_s: list[float] = []
    latencies_s: list[float] = []
    lock, stopping = threading.Lock(), threading.Event()

    def client() -> None:
        while not stopping.is_set():
            sent_s = time.perf_counter()
            send()
            with lock:
                finished_s.append(time.perf_counter())
                latencies_s.append(finished_s[-1] - sent_s)

    with ThreadPoolExecutor(concurrency, thread_name_prefix="clipship-bench") as threads:
        clients = [threads.submit(client) for _ in range(concurrency)]

        def wait_until(moment_s: float, answers: int) -> float:
            """Wait for both. Polling the clock keeps the moment independent of the server's bursts."""
            while (now_s := time.perf_counter()) < moment_s or len(finished_s) < answers:
                failed, _ = wait(clients, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for each in failed:
                    each.result()
            return now_s

        try:
            begin_s = wait_until(time.perf_counter() + warm_up_s, concurrency)
            end_s = wait_until(begin_s + seconds, len(finished_s) + concurrency)
        finally:
            stopping.set()
    return counted(finished_s, latencies_s, (begin_s, end_s), batch)

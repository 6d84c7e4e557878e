"""A closed loop: a fixed number of requests is in flight, and each answer sends the next one.

The server is never asked for more than ``concurrency`` requests at once, so throughput and latency belong together:
latency = concurrency / requests a second (Little's law). What waits for such a loop in a client's own queue is not
part of any latency here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99)

Done = Callable[[Exception | None], None]
"""Called when a request has been answered (None) or has failed, from any thread."""

Send = Callable[[Done], None]
"""Starts one request and returns at once."""

_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was counted between two moments of a loop that was running before and after them."""

    batch: int
    """Images a request."""
    requests: int
    seconds: float
    latencies_s: NDArray[np.float64]
    """Float64 [requests]: from the sending of each counted request to its answer."""
    whole_mean_ms: float
    """The mean latency of all of the loop's requests, those before and after too: what a server's counters count."""

    @property
    def images_per_s(self) -> float:
        """Images answered a second."""
        return self.requests * self.batch / self.seconds

    def latencies_ms(self) -> dict[str, float]:
        """Latencies in milliseconds by name: mean, p50, p90, p95, p99."""
        values = np.percentile(self.latencies_s, PERCENTILES) * 1e3
        ranks = {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, values, strict=True)}
        return {"mean": float(self.latencies_s.mean() * 1e3), **ranks}


def counted(finished_s: Sequence[float], latencies_s: Sequence[float], span: tuple[float, float], batch: int) -> Load:
    """The answers of a loop that came within ``span`` (two moments), given all of them in order.

    Answers come in bursts, as many as the server had put into one batch. The clock therefore runs from the last answer
    before the span to the last one within it: from the end of a burst to the end of a burst.

    Raises:
        ValueError: no answer came before the span, or none within it.
    """
    times = np.asarray(finished_s)
    first, last = np.searchsorted(times, span, side="right")
    if first == 0 or first == last:
        raise ValueError(f"{first} answers before the measured span and {last - first} within it: one each is needed")
    seconds = float(times[last - 1] - times[first - 1])
    latencies = np.asarray(latencies_s)[first:last]
    whole_mean_ms = float(np.mean(latencies_s) * 1e3)
    numbers = {"batch": batch, "requests": int(last - first)}
    return Load(seconds=seconds, latencies_s=latencies, whole_mean_ms=whole_mean_ms, **numbers)


class ClosedLoop:
    """Keeps ``concurrency`` requests in flight while its ``with`` block runs."""

    def __init__(self, send: Send, concurrency: int) -> None:
        self._send = send
        self._concurrency = concurrency
        self._lock = threading.Condition()
        self._flying = 0
        self._stopping = False
        self._error: Exception | None = None
        self.finished_s: list[float] = []
        self.latencies_s: list[float] = []

    def __enter__(self) -> ClosedLoop:
        for _ in range(self._concurrency):
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        """Send nothing more, and wait for what is in flight."""
        with self._lock:
            self._stopping = True
            self._lock.wait_for(lambda: self._flying == 0)

    def wait_until(self, moment_s: float, answers: int) -> float:
        """Wait for ``moment_s`` and for so many answers in all; the time it is then.

        Raises:
            Exception: what a request failed with, as soon as one did.
        """
        while True:  # by the clock, not woken by an answer: a moment that has nothing to do with the server's bursts
            time.sleep(_POLL_S)
            if self._error is not None:
                raise self._error
            if (now_s := time.perf_counter()) >= moment_s and len(self.finished_s) >= answers:
                return now_s

    def _start(self) -> None:
        with self._lock:
            if self._stopping:
                return
            self._flying += 1
        sent_s = time.perf_counter()
        self._send(lambda error: self._finish(sent_s, error))

    def _finish(self, sent_s: float, error: Exception | None) -> None:
        with self._lock:
            now_s = time.perf_counter()
            if error is None:
                self.finished_s.append(now_s)
                self.latencies_s.append(now_s - sent_s)
            else:
                self._error = self._error or error
                self._stopping = True
        self._start()
        with self._lock:  # only now, so that the loop is not taken for empty between an answer and the next request
            self._flying -= 1
            self._lock.notify_all()


def measure(send: Send, *, concurrency: int, batch: int, seconds: float, warm_up_s: float) -> Load:
    """Run a closed loop and count it for ``seconds``, or for longer until ``concurrency`` answers came.

    Raises:
        Exception: what a request failed with; a loop with failures has no figures.
    """
    with ClosedLoop(send, concurrency) as loop:
        begin_s = loop.wait_until(time.perf_counter() + warm_up_s, answers=concurrency)
        seen = len(loop.finished_s)
        end_s = loop.wait_until(begin_s + seconds, answers=seen + concurrency)
    return counted(loop.finished_s, loop.latencies_s, (begin_s, end_s), batch)

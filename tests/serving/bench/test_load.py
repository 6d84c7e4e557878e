"""The closed loop against a made-up server whose speed is known, and what is counted of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future

import pytest

from clipship.serving.bench.load import counted, measure
from clipship.serving.errors import ServerOverloaded


class Batcher:
    """Answers all the requests that wait, together, every ``period_s``."""

    def __init__(self, period_s: float, *, fail_after: int | None = None) -> None:
        self.most_waiting = 0
        self.answered = 0
        self._period_s = period_s
        self._fail_after = fail_after
        self._waiting: deque[Future[None]] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def send(self) -> None:
        answer: Future[None] = Future()
        self._waiting.append(answer)
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        answer.result()

    def _serve(self) -> None:
        while not self._stopping.wait(self._period_s):
            for _ in range(len(self._waiting)):
                answer = self._waiting.popleft()
                self.answered += 1
                if self._fail_after is not None and self.answered > self._fail_after:
                    answer.set_exception(ServerOverloaded("the queue is full"))
                else:
                    answer.set_result(None)


def test_as_many_requests_are_in_flight_as_asked_for_and_none_is_left_behind() -> None:
    with Batcher(0.01) as server:
        measure(server.send, concurrency=5, batch=1, seconds=0.1, warm_up_s=0)
        assert server.most_waiting == 5
        answers = server.answered
        time.sleep(0.05)
        assert server.answered == answers >= 10  # nothing was in flight any more, and nothing is sent again


def test_throughput_and_latency_obey_littles_law() -> None:
    with Batcher(0.01) as server:
        reading = measure(server.send, concurrency=4, batch=8, seconds=0.5, warm_up_s=0.1)
    in_flight = reading.images_per_s / 8 * reading.latencies_ms["mean"] / 1e3
    assert in_flight == pytest.approx(4, rel=0.25)


def test_a_slow_server_is_counted_for_longer_so_that_every_place_gets_an_answer() -> None:
    with Batcher(0.2) as server:
        reading = measure(server.send, concurrency=3, batch=1, seconds=0.01, warm_up_s=0.0)
        assert server.answered >= 6
    assert reading.latencies_ms["p50"] > 100


def test_the_first_failure_ends_the_loop() -> None:
    with Batcher(0.005, fail_after=20) as server, pytest.raises(ServerOverloaded, match="the queue is full"):
        measure(server.send, concurrency=4, batch=1, seconds=60, warm_up_s=0)


def test_a_request_that_cannot_even_be_sent_ends_the_loop() -> None:
    def send() -> None:
        raise ServerOverloaded("no")

    with pytest.raises(ServerOverloaded, match="no"):
        measure(send, concurrency=2, batch=1, seconds=60, warm_up_s=0)


def test_bursts_are_counted_from_the_end_of_one_to_the_end_of_another() -> None:
    finished_s = [burst + 0.001 * position for burst in range(10) for position in range(4)]
    latencies_s = [1.0] * 36 + [3.0] * 4
    reading = counted(finished_s, latencies_s, (2.5, 7.5), 8)
    # five bursts of four requests, in five seconds: where the span begins between two bursts makes no difference
    assert reading.images_per_s == pytest.approx(32.0)
    assert reading.latencies_ms == {"mean": 1000.0, "p50": 1000.0, "p90": 1000.0, "p95": 1000.0, "p99": 1000.0}
    later = counted(finished_s, latencies_s, (4.5, 9.5), 8)
    assert later.images_per_s == pytest.approx(32.0)
    assert later.latencies_ms == {"mean": 1400.0, "p50": 1000.0, "p90": 3000.0, "p95": 3000.0, "p99": 3000.0}
    assert later.whole_mean_ms == reading.whole_mean_ms == pytest.approx(1200.0)


@pytest.mark.parametrize("span", [(0.0, 1.5), (3.0, 4.0)])
def test_a_span_without_answers_around_it_has_no_rate(span: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="answers"):
        counted([1.0, 2.0], [0.5, 0.5], span, 1)

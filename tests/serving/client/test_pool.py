"""Several servers: load is spread, those that fail are ejected and readmitted, strangers are refused."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import grpc
import pytest

from clipship.serving import Classifier, Connection, Retry
from clipship.serving.client.metadata import read_identity
from clipship.serving.client.pool import ServerPool
from clipship.serving.errors import DeadlineExceeded, ModelsMissing, ServerChanged, ServerOverloaded, ServerUnreachable
from clipship.serving.transport.base import Tensors
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.fake_server import FakeTransport, answer, configs, flat, grey
from tests.serving.grpc_servers import Triton, serving

QUICK = Retry(deadline_s=30.0, first_pause_s=0.01, longest_pause_s=0.05)
IMAGE = {"image": flat(0)[None]}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Server(FakeTransport):
    """A server that can be switched off, made busy, or replaced by one of another repository."""

    def __init__(self, name: str, **told: str) -> None:
        super().__init__(self._infer, configs(**told), url=name)
        self.error: Exception | None = None
        self.asked = 0

    def _infer(self, model: str, inputs: Tensors) -> Tensors | Future[Tensors]:
        if self.error is not None:
            raise self.error
        return answer(model, inputs)

    def model_config(self, model: str) -> dict[str, Any]:
        self.asked += 1
        if isinstance(self.error, ServerUnreachable):
            raise self.error
        return super().model_config(model)


def pool(*servers: Server) -> tuple[ServerPool, Clock]:
    clock = Clock()
    return ServerPool(servers, read_identity, clock=clock), clock


def ask(endpoints: ServerPool, times: int = 1) -> None:
    for _ in range(times):
        endpoints.infer("classify", IMAGE, ["scores"], timeout_s=5).result(timeout=20)


def until(condition: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def checked(endpoints: ServerPool, position: int) -> bool:
    check = endpoints._servers[position].check
    return check is None or check.done()


def all_healthy(endpoints: ServerPool, count: int) -> None:
    ask(endpoints)
    until(lambda: len(endpoints.healthy()) == count)


def test_load_is_spread() -> None:
    servers = [Server(name) for name in "abc"]
    endpoints, _ = pool(*servers)
    all_healthy(endpoints, 3)
    before = [len(server.requests) for server in servers]
    ask(endpoints, 30)
    assert [len(server.requests) - count for server, count in zip(servers, before, strict=True)] == [10, 10, 10]
    endpoints.close()


def test_a_server_that_fails_is_ejected_and_readmitted() -> None:
    a, b = Server("a"), Server("b")
    endpoints, clock = pool(a, b)
    all_healthy(endpoints, 2)
    b.error = ServerUnreachable("b is gone")
    ask(endpoints, 10)
    assert endpoints.healthy() == ["a"]
    tried = len(b.requests)
    ask(endpoints, 10)
    assert len(b.requests) == tried, "ejected"
    clock.now_s += 1
    ask(endpoints)
    until(lambda: checked(endpoints, 1))
    assert endpoints.healthy() == ["a"], "its health check failed"
    b.error = None
    ask(endpoints)
    assert len(b.requests) == tried, "it is ejected for longer now"
    clock.now_s += 60
    all_healthy(endpoints, 2)
    ask(endpoints, 4)
    assert len(b.requests) > tried
    endpoints.close()


def test_a_busy_server_is_not_ejected_but_its_request_goes_elsewhere() -> None:
    a, b = Server("a"), Server("b")
    endpoints, _ = pool(a, b)
    all_healthy(endpoints, 2)
    b.error = ServerOverloaded("busy")
    ask(endpoints, 10)
    assert endpoints.healthy() == ["a", "b"]
    endpoints.close()


def test_none_left_is_the_servers_error() -> None:
    a, b = Server("a"), Server("b")
    endpoints, _ = pool(a, b)
    a.error = b.error = ServerUnreachable("gone")
    with pytest.raises(ServerUnreachable, match="gone"):
        ask(endpoints)
    a.error = DeadlineExceeded("slow")
    with pytest.raises(DeadlineExceeded):
        ask(endpoints)
    a.error = None
    ask(endpoints)
    endpoints.close()


def test_at_the_start_one_that_answers_is_enough() -> None:
    a, b = Server("a"), Server("b")
    a.error = ServerUnreachable("gone")
    endpoints, _ = pool(a, b)
    ask(endpoints, 3)
    assert endpoints.healthy() == ["b"]
    endpoints.close()
    b.error = ServerUnreachable("gone too")
    with pytest.raises(ServerUnreachable, match="gone too"):
        pool(a, b)
    assert a.closed
    assert b.closed


def test_a_stranger_at_the_start_is_an_error() -> None:
    stranger = FakeTransport(answer, {"resnet": {}})
    with pytest.raises(ModelsMissing, match="it has resnet"):
        Classifier(stranger)


@pytest.mark.parametrize("other", [{"bundle": "c" * 64}, {"digest": "w" * 64}])
def test_a_server_of_another_repository_is_ejected(other: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    a, b = Server("a"), Server("b", **other)
    endpoints, clock = pool(a, b)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ask(endpoints, 5)
            until(lambda: checked(endpoints, 1))
            clock.now_s += 60
    assert len(b.requests) == 0
    assert sum("ejected" in record.getMessage() for record in caplog.records) == 1
    endpoints.close()


def test_a_server_that_comes_back_with_another_bundle_is_refused() -> None:
    """Else its answers would stand among the old one's."""
    a = Server("a")
    endpoints, _ = pool(a)
    ask(endpoints)
    a.error = ServerUnreachable("gone")
    with pytest.raises(ServerUnreachable):
        ask(endpoints)
    a.error, a.configs = None, configs(bundle="c" * 64)
    sent = len(a.requests)
    with pytest.raises(ServerChanged, match=r"a serves another bundle \(cccccccccccc, not bbbbbbbbbbbb\)"):
        ask(endpoints)
    assert len(a.requests) == sent
    endpoints.close()


def test_a_silent_server_may_have_been_started_anew() -> None:
    """No request failed, so nothing but its identity tells."""
    a = Server("a")
    endpoints, clock = pool(a)
    ask(endpoints)
    clock.now_s += 1
    ask(endpoints)
    asked = a.asked
    clock.now_s += 3
    ask(endpoints)
    assert a.asked == asked + 2, "the digests of the encoder and of the vocabulary"
    a.configs = configs(bundle="c" * 64)
    clock.now_s += 3
    with pytest.raises(ServerChanged, match="a serves another bundle"):
        ask(endpoints)
    endpoints.close()


def test_a_vocabulary_of_another_bundle_with_the_same_encoder_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    a = Server("a", encoder="e" * 64)
    endpoints, _ = pool(a)
    ask(endpoints)
    a.error = ServerUnreachable("gone")
    with pytest.raises(ServerUnreachable):
        ask(endpoints)
    a.error, a.configs = None, configs(bundle="c" * 64, digest="w" * 64, encoder="e" * 64)
    with caplog.at_level(logging.WARNING):
        ask(endpoints)
    assert "now serves the vocabulary wwwwwwwwwwww" in caplog.text
    a.error = ServerUnreachable("gone")
    with pytest.raises(ServerUnreachable):
        ask(endpoints)
    a.error, a.configs = None, configs(encoder="f" * 64)
    with pytest.raises(ServerChanged, match=r"another bundle \(ffffffffffff, not eeeeeeeeeeee\)"):
        ask(endpoints)
    endpoints.close()


def test_a_vocabulary_published_meanwhile_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    a, b = Server("a"), Server("b")
    endpoints, clock = pool(a, b)
    all_healthy(endpoints, 2)
    for server in (a, b):
        server.configs = configs(digest="w" * 64)
    b.error = ServerUnreachable("gone")
    ask(endpoints, 4)
    assert endpoints.healthy() == ["a"]
    b.error = None
    clock.now_s += 60
    with caplog.at_level(logging.WARNING):
        all_healthy(endpoints, 2)
    assert "now serves the vocabulary wwwwwwwwwwww" in caplog.text
    endpoints.close()


def test_cancelling_reaches_the_server() -> None:
    flying: Future[Tensors] = Future()
    server = FakeTransport(lambda model, inputs: flying, configs())
    endpoints = ServerPool([server], read_identity)
    endpoints.infer("classify", IMAGE, ["scores"], timeout_s=5).cancel()
    assert flying.cancelled()
    endpoints.close()


def test_closing_ends_a_check_that_hangs_and_the_request_that_waits_for_it() -> None:
    """Nobody who waits for an answer waits for ever."""

    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        over = threading.Event()
        context.add_callback(over.set)
        over.wait(30)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    triton = Triton(hang)
    with serving(triton) as url:
        endpoints = ServerPool([TritonTransport(url, Connection(urls=(url,), connect_timeout_s=60))], read_identity)
        endpoints.infer("classify", IMAGE, ["scores"], timeout_s=0.1).exception(timeout=20)
        triton.told = hang
        waiting = [endpoints.infer("classify", IMAGE, ["scores"], timeout_s=30) for _ in range(3)]
        until(lambda: triton.asked > 2)
        endpoints.close()
        assert [type(future.exception(timeout=20)) for future in waiting] == [ServerUnreachable] * 3


def numbers(connection: Connection, count: int) -> list[int]:
    with Classifier(connection, retry=QUICK) as classifier:
        return [grey(result) for result in classifier.classify(flat(value % 256) for value in range(count))]


def test_real_servers_share_the_load_and_one_may_go() -> None:
    stays, goes = Triton(), Triton()
    with serving(stays) as first:
        with serving(goes) as second:
            assert numbers(Connection(urls=(first, second)), 400) == [value % 256 for value in range(400)]
            counts = Counter({"stays": len(stays.requests), "goes": len(goes.requests)})
            assert min(counts.values()) > 25, counts
            classifier = Classifier(Connection(urls=(second, first)), retry=QUICK)
            stream = classifier.classify_iter(flat(value % 256) for value in range(400))
            taken = [next(stream) for _ in range(50)]
        taken += stream
        classifier.close()
        assert [grey(result) for result in taken] == [value % 256 for value in range(400)]
        assert numbers(Connection(urls=(second, first)), 20) == list(range(20)), "the first address is dead"

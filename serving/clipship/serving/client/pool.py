"""Several servers as one: requests are balanced, failing servers are ejected, then readmitted.

A server is *healthy* while it answers. One that fails is ejected for a time that doubles with every failure. It is
readmitted when it answers again and its identity (the digests of its bundle and vocabulary) is still that of the pool.
A server that has been idle for a while is checked the same way before its next request. So a server that was restarted
with another bundle cannot mix its answers with the others', not even as the only one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar, Unpack

from clipship.core.errors import ClipshipError
from clipship.serving.client.metadata import Identity
from clipship.serving.errors import (
    RETRYABLE,
    AccessDenied,
    BadAnswer,
    ModelsMissing,
    RequestFailed,
    ServerChanged,
    ServerOverloaded,
    ServerUnreachable,
    ServingError,
)
from clipship.serving.transport.base import CallOptions, Tensors, Transport, settle

_FIRST_EJECTION_S = 0.5
_LONGEST_EJECTION_S = 30.0
_MAX_IDLE_S = 2.0
"""Less than a Triton needs to stop, start and load its models: a longer silence may hide a restart."""
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Server:
    """One server's state. The pool's lock guards every field but the transport."""

    transport: Transport
    healthy: bool = False
    in_flight: int = 0
    failures: int = 0
    """Consecutive ones."""
    answered_at_s: float = 0.0
    ejected_until_s: float = 0.0
    check: Future[ClipshipError | None] | None = None
    """The last check of its identity; running, or done."""
    refusal: ServerChanged | None = None
    """Why it gets no requests although it answers."""


@dataclass(eq=False)
class _Request:
    """A call of :meth:`ServerPool.infer`."""

    arguments: tuple[str, Tensors, Sequence[str]]
    options: CallOptions
    answer: Future[Tensors]
    retries_left: int
    """At other servers, at once."""


class ServerPool:
    """The servers at ``transports``, all with one identity: that which ``read_identity`` finds at the first to answer.

    Raises:
        ServerUnreachable: none of them answers.
        ServingError: the first that answers cannot be used.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        read_identity: Callable[[Transport], Identity],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = ",".join(transport.url for transport in transports)
        self.on_this_machine = all(transport.on_this_machine for transport in transports)
        self._servers = [_Server(transport) for transport in transports]
        self._read_identity = read_identity
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = 0
        self._identity: Identity | None = None
        self._checks = ThreadPoolExecutor(max_workers=len(transports), thread_name_prefix="clipship-check")
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def infer(
        self, model: str, inputs: Tensors, outputs: Sequence[str], **options: Unpack[CallOptions]
    ) -> Future[Tensors]:
        """See :meth:`Transport.infer`. A request that fails at one server is retried once at each other healthy one."""
        request = _Request((model, inputs, outputs), options, Future(), retries_left=len(self._servers) - 1)
        self._send(request)
        return request.answer

    def ask(self, question: Callable[[Transport], _T]) -> _T:
        """The answer of the first server that can be reached, the healthy ones first."""
        with self._lock:
            usable = [server for server in self._servers if server.refusal is None]
            usable.sort(key=lambda server: not server.healthy)
        last: ServingError | None = None
        for server in usable:
            try:
                return question(server.transport)
            except RETRYABLE as error:
                last = error
        raise last or ServerUnreachable(f"no server left of {self.url}")

    def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            server.transport.close()  # which ends the running checks
        self._checks.shutdown(wait=True, cancel_futures=True)

    def accept(self, identity: Identity) -> None:
        """Require ``identity`` of all servers from now on: a vocabulary has been published on purpose."""
        with self._lock:
            self._identity = identity
            for server in self._servers:
                server.refusal, server.ejected_until_s, server.healthy = None, 0.0, False

    def healthy(self) -> list[str]:
        """The addresses of the servers that get requests now."""
        with self._lock:
            return [server.transport.url for server in self._servers if server.healthy]

    def _connect(self) -> None:
        """Take the identity of the first server that answers."""
        error: ClipshipError | None = None
        for server in self._servers:
            error = self._checked(server)
            if not isinstance(error, RETRYABLE):
                break
        if error is not None:
            raise error

    def _send(self, request: _Request) -> None:
        """To the healthy server with the fewest requests; if there is none, to the first that passes a check."""
        server = self._pick()
        if server is None:
            with self._lock:
                candidates = sorted(self._servers, key=lambda each: each.ejected_until_s)
            self._send_to_first(request, candidates, [])
        else:
            self._send_to(server, request)
            self._check_ejected()

    def _pick(self) -> _Server | None:
        with self._lock:
            idle_since_s = self._clock() - _MAX_IDLE_S
            for server in self._servers:
                if not server.in_flight and server.answered_at_s < idle_since_s:
                    server.healthy = False  # it may have been restarted
            healthy = [server for server in self._servers if server.healthy]
            if not healthy:
                return None
            self._turn += 1
            shift = self._turn % len(healthy)
            chosen = min(healthy[shift:] + healthy[:shift], key=lambda server: server.in_flight)
            chosen.in_flight += 1
            return chosen

    def _check_ejected(self) -> None:
        """Start to check the servers whose ejection has ended."""
        with self._lock:
            now_s = self._clock()
            due = [server for server in self._servers if not server.healthy and server.ejected_until_s <= now_s]
        for server in due:
            with suppress(RuntimeError):  # closed meanwhile
                self._start_check(server)

    def _send_to(self, server: _Server, request: _Request) -> None:
        call = server.transport.infer(*request.arguments, **request.options)
        request.answer.add_done_callback(lambda answer: call.cancel() if answer.cancelled() else None)
        call.add_done_callback(lambda done: self._complete(server, request, done))

    def _complete(self, server: _Server, request: _Request, call: Future[Tensors]) -> None:
        error = CancelledError() if call.cancelled() else call.exception()
        with self._lock:
            server.in_flight -= 1
            if error is None:
                server.failures, server.answered_at_s = 0, self._clock()
        if isinstance(error, (*RETRYABLE, BadAnswer, RequestFailed, AccessDenied)):
            if not isinstance(error, ServerOverloaded):  # a busy server is healthy
                self._eject(server)
            if request.retries_left and self._has_other(server):
                request.retries_left -= 1
                self._send(request)
                return
        settle(request.answer, call.result() if error is None else error)

    def _has_other(self, server: _Server) -> bool:
        with self._lock:
            return any(other.healthy and other is not server for other in self._servers)

    def _eject(self, server: _Server, *, by_check: bool = False) -> None:
        """Send it no requests for a while. Further failures of requests already in flight do not prolong that."""
        with self._lock:
            if not server.healthy and not by_check:
                return
            pause_s = min(_LONGEST_EJECTION_S, _FIRST_EJECTION_S * 2.0 ** min(server.failures, 20))
            server.healthy = False
            server.failures += 1
            server.ejected_until_s = self._clock() + pause_s

    def _send_to_first(self, request: _Request, candidates: Sequence[_Server], errors: list[ClipshipError]) -> None:
        """Check ``candidates`` one after the other, and send the request to the first that passes."""
        if request.answer.cancelled():
            return
        if not candidates:
            passing = [error for error in errors if isinstance(error, RETRYABLE)]
            settle(request.answer, (passing or errors)[0])
            return
        server, *others = candidates

        def checked(check: Future[ClipshipError | None]) -> None:
            """Runs in the check's thread, which would swallow an exception and leave the caller waiting."""
            try:
                error = check.result()
                if error is not None:
                    self._send_to_first(request, others, [*errors, error])
                else:
                    with self._lock:
                        server.in_flight += 1
                    self._send_to(server, request)
                    self._check_ejected()
            except CancelledError:
                settle(request.answer, self._closed())
            except Exception as error:  # noqa: BLE001
                settle(request.answer, error)

        try:
            self._start_check(server).add_done_callback(checked)
        except RuntimeError:  # closed meanwhile
            settle(request.answer, self._closed())

    def _closed(self) -> ServerUnreachable:
        return ServerUnreachable(f"{self.url}: the connection was closed")

    def _start_check(self, server: _Server) -> Future[ClipshipError | None]:
        """Check the server in another thread, or join the check that is running."""
        with self._lock:
            if server.check is None or server.check.done():
                server.check = self._checks.submit(self._checked, server)
            return server.check

    def _checked(self, server: _Server) -> ClipshipError | None:
        """Readmit ``server`` if its identity is right, else eject it; what was wrong."""
        try:
            self._validate_identity(server, self._read_identity(server.transport))
        except ClipshipError as error:
            self._eject(server, by_check=True)
            with self._lock:
                is_news = isinstance(error, ServerChanged) and server.refusal is None
                server.refusal = error if isinstance(error, ServerChanged) else None
            if is_news and len(self._servers) > 1:
                _log.warning("%s: it is ejected", error)
            return error
        with self._lock:
            server.healthy, server.failures, server.refusal = True, 0, None
            server.answered_at_s = self._clock()
        return None

    def _validate_identity(self, server: _Server, identity: Identity) -> None:
        """Raise ServerChanged unless the server is what the others are.

        A vocabulary may be published while a client runs: it becomes the pool's if no other healthy server still has
        the former one.
        """
        with self._lock:
            expected = self._identity = self._identity or identity
            others = [other for other in self._servers if other.healthy and other is not server]
        url = server.transport.url
        if identity.bundle != expected.bundle:
            raise ServerChanged(_difference(url, "bundle", identity.bundle, expected.bundle))
        if identity.vocabulary == expected.vocabulary:
            return
        if any(self._vocabulary_of(other) not in (None, identity.vocabulary) for other in others):
            raise ServerChanged(_difference(url, "vocabulary", identity.vocabulary, expected.vocabulary))
        _log.warning("%s now serves the vocabulary %s", url, identity.vocabulary[:12])
        with self._lock:
            self._identity = identity

    def _vocabulary_of(self, server: _Server) -> str | None:
        try:
            return self._read_identity(server.transport).vocabulary
        except (*RETRYABLE, ModelsMissing):
            return None


def _difference(url: str, what: str, found: str, expected: str) -> str:
    return (
        f"{url} serves another {what} ({found[:12]}, not {expected[:12]}): "
        "give endpoints of the same repository, or start again"
    )

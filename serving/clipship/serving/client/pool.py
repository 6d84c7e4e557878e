"""Several servers as one transport: load is spread, a server that fails is left alone and taken back when it is well.

A server is *trusted* while it answers. One that failed is left alone for a while that doubles; then its identity (the
digests of its bundle and vocabulary) is read again, which is the health check too, and only then it gets requests; and
so it is with one that was not asked for anything for some time. Thus a server that was started anew with another bundle
cannot mix its answers with the others', not even as the only one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from clipship.core.errors import ClipshipError
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
from clipship.serving.transport.grpc import Tensors, Transport, settle

_FIRST_REST_S = 0.5
_LONGEST_REST_S = 30.0
_SILENCE_S = 2.0
"""Less than a Triton needs to end, start and load its models; a longer silence may hide that."""
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What must be the same at all servers for their answers to be."""

    bundle: str
    """The digest of its image encoder, of the whole of it where that is not told."""
    vocabulary: str
    """The vocabulary's digest."""


@dataclass(eq=False)
class _Endpoint:
    """A server and how it fares. All fields but the transport are guarded by the pool's lock."""

    transport: Transport
    trusted: bool = False
    flying: int = 0
    failures: int = 0
    """In a row."""
    heard_at_s: float = 0.0
    """When it last answered."""
    rests_until_s: float = 0.0
    is_checked: bool = False
    """Whether its identity is being read."""
    refusal: ServerChanged | None = None
    """Why it gets no requests though it answers."""
    checked_at_s: float = float("-inf")
    last_error: ClipshipError | None = None
    """What the last check of its identity met, which ended at ``checked_at_s``."""


@dataclass(eq=False)
class _Request:
    """A call of :meth:`ServerPool.infer`."""

    arguments: tuple[str, Tensors, Sequence[str]]
    settings: Mapping[str, Any]
    answer: Future[Tensors]
    tries_left: int
    """At other servers, without a pause."""
    begun_s: float


class ServerPool:
    """A :class:`~clipship.serving.transport.grpc.Transport` over the servers ``transports``.

    ``identity`` reads a server's identity; the first that answers says what the others must be.

    Raises:
        ServerUnreachable: none of them answers.
        ServingError: the first that answers cannot be used.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        identity: Callable[[Transport], Identity],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = ",".join(transport.url for transport in transports)
        self.on_this_machine = all(transport.on_this_machine for transport in transports)
        self._endpoints = [_Endpoint(transport) for transport in transports]
        self._read_identity = identity
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = 0
        self._checks = ThreadPoolExecutor(max_workers=len(transports), thread_name_prefix="clipship-check")
        try:
            self._identity = self._first_identity()
        except ClipshipError:
            self.close()
            raise

    def infer(
        self,
        model: str,
        inputs: Tensors,
        outputs: Sequence[str],
        *,
        timeout_s: float,
        request_id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Future[Tensors]:
        """See :meth:`Transport.infer`. A request that one server fails goes to the next that is well, once to each."""
        settings = {"timeout_s": timeout_s, "request_id": request_id, "headers": headers}
        request = _Request((model, inputs, outputs), settings, Future(), len(self._endpoints) - 1, self._clock())
        self._send(request)
        return request.answer

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        return self._of_any(lambda transport: transport.model_config(model))

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        return self._of_any(lambda transport: transport.model_names())

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        for endpoint in self._endpoints:
            endpoint.transport.close()  # which ends the checks that are running
        self._checks.shutdown(wait=True, cancel_futures=True)

    def accept(self, identity: Identity) -> None:
        """From now on the servers must be ``identity``: a vocabulary has been published on purpose."""
        with self._lock:
            self._identity = identity
            for endpoint in self._endpoints:
                endpoint.refusal, endpoint.rests_until_s, endpoint.trusted = None, 0.0, False

    def trusted(self) -> list[str]:
        """The addresses of the servers that get requests now."""
        with self._lock:
            return [endpoint.transport.url for endpoint in self._endpoints if endpoint.trusted]

    def _first_identity(self) -> Identity:
        last: ServingError | None = None
        for endpoint in self._endpoints:
            try:
                identity = self._read_identity(endpoint.transport)
            except RETRYABLE as error:
                self._rest(endpoint, was_checked=True)
                last = error
            else:
                endpoint.trusted, endpoint.heard_at_s = True, self._clock()
                return identity
        assert last is not None
        raise last

    def _of_any(self, question: Callable[[Transport], _T]) -> _T:
        """The answer of the first server that has one, the trusted ones first."""
        last: ServingError | None = None
        for endpoint in sorted(self._endpoints, key=lambda each: not each.trusted):
            if endpoint.refusal is None:
                try:
                    return question(endpoint.transport)
                except RETRYABLE as error:
                    last = error
        raise last or ServerUnreachable(f"no server left of {self.url}")

    def _send(self, request: _Request) -> None:
        """To the trusted server with the least to do; where none is trusted, to one after its identity was read."""
        self._doubt_the_silent()
        self._check_the_rested()
        endpoint = self._pick()
        if endpoint is None:
            self._submit_request(request)
        else:
            self._send_to(endpoint, request)

    def _pick(self) -> _Endpoint | None:
        with self._lock:
            well = [endpoint for endpoint in self._endpoints if endpoint.trusted]
            if not well:
                return None
            self._turn += 1
            shift = self._turn % len(well)
            chosen = min(well[shift:] + well[:shift], key=lambda endpoint: endpoint.flying)
            chosen.flying += 1
            return chosen

    def _send_to(self, endpoint: _Endpoint, request: _Request) -> None:
        flying = endpoint.transport.infer(*request.arguments, **request.settings)
        request.answer.add_done_callback(lambda answer: flying.cancel() if answer.cancelled() else None)
        flying.add_done_callback(lambda done: self._land(endpoint, request, done))

    def _land(self, endpoint: _Endpoint, request: _Request, flying: Future[Tensors]) -> None:
        with self._lock:
            endpoint.flying -= 1
        if flying.cancelled():
            return
        error = flying.exception()
        if error is None:
            endpoint.failures, endpoint.heard_at_s = 0, self._clock()
            settle(request.answer, flying.result())
            return
        if isinstance(error, (*RETRYABLE, BadAnswer, RequestFailed, AccessDenied)):
            if not isinstance(error, ServerOverloaded):  # a busy server is well
                self._rest(endpoint)
            if request.tries_left and self._has_other(endpoint):
                request.tries_left -= 1
                self._send(request)
                return
        settle(request.answer, error if isinstance(error, Exception) else ServerUnreachable(str(error)))

    def _has_other(self, endpoint: _Endpoint) -> bool:
        with self._lock:
            return any(other.trusted and other is not endpoint for other in self._endpoints)

    def _rest(self, endpoint: _Endpoint, *, was_checked: bool = False) -> None:
        """Leave it alone for a while; requests that fail after the first one of its fall say nothing new."""
        with self._lock:
            if not endpoint.trusted and not was_checked:
                return
            pause_s = min(_LONGEST_REST_S, _FIRST_REST_S * 2.0 ** min(endpoint.failures, 20))
            endpoint.trusted = False
            endpoint.failures += 1
            endpoint.rests_until_s = self._clock() + pause_s

    def _doubt_the_silent(self) -> None:
        """Take the trust from those that have not been asked for long: they may have been started anew meanwhile."""
        heard_after_s = self._clock() - _SILENCE_S
        with self._lock:
            for endpoint in self._endpoints:
                if endpoint.trusted and not endpoint.flying and endpoint.heard_at_s < heard_after_s:
                    endpoint.trusted = False

    def _check_the_rested(self) -> None:
        """Begin to read the identity of those that have rested; nobody waits for it."""
        if all(endpoint.trusted for endpoint in self._endpoints):
            return
        with self._lock:
            if not any(endpoint.trusted for endpoint in self._endpoints):
                return  # the request itself sees to it
            due = [each for each in self._endpoints if not (each.trusted or each.is_checked)]
            due = [endpoint for endpoint in due if endpoint.rests_until_s <= self._clock()]
            for endpoint in due:
                endpoint.is_checked = True
        for endpoint in due:
            with suppress(RuntimeError):  # closed meanwhile
                self._checks.submit(self._check, endpoint)

    def _submit_request(self, request: _Request) -> None:
        """Check and send in another thread: a check takes its time."""
        closed = ServerUnreachable(f"{self.url}: the connection was closed")
        try:
            work = self._checks.submit(self._check_and_send_or_fail, request)
        except RuntimeError:  # closed meanwhile
            settle(request.answer, closed)
        else:
            work.add_done_callback(lambda done: settle(request.answer, closed) if done.cancelled() else None)

    def _check(self, endpoint: _Endpoint) -> ClipshipError | None:
        """Trust ``endpoint``, or let it rest; what was wrong."""
        error = endpoint.last_error = self._check_identity(endpoint)
        endpoint.checked_at_s, endpoint.is_checked = self._clock(), False
        return error

    def _check_identity(self, endpoint: _Endpoint) -> ClipshipError | None:
        try:
            identity = self._read_identity(endpoint.transport)
            self._validate_identity(endpoint, identity)
        except ClipshipError as error:
            self._rest(endpoint, was_checked=True)
            with self._lock:
                is_news = isinstance(error, ServerChanged) and endpoint.refusal is None
                endpoint.refusal = error if isinstance(error, ServerChanged) else None
            if is_news and len(self._endpoints) > 1:
                _log.warning("%s: it is left out", error)
            return error
        else:
            with self._lock:
                endpoint.trusted, endpoint.failures, endpoint.refusal = True, 0, None
                endpoint.heard_at_s = self._clock()
            return None

    def _check_and_send_or_fail(self, request: _Request) -> None:
        try:
            self._check_and_send(request)
        except Exception as error:  # noqa: BLE001  in this thread it would be lost, and the caller wait for ever
            settle(request.answer, error)

    def _check_and_send(self, request: _Request) -> None:
        """Ask the servers in the order in which they have rested, until one can be trusted."""
        errors: list[ClipshipError] = []
        for endpoint in sorted(self._endpoints, key=lambda each: each.rests_until_s):
            if request.answer.cancelled():
                return
            if endpoint.trusted:
                error = None
            elif endpoint.last_error is not None and endpoint.checked_at_s > request.begun_s:
                error = endpoint.last_error  # found for another request while this one waited for its turn
            else:
                error = self._check(endpoint)
            if error is None:
                with self._lock:
                    endpoint.flying += 1
                self._send_to(endpoint, request)
                self._check_the_rested()
                return
            errors.append(error)
        passing = [error for error in errors if isinstance(error, RETRYABLE)]
        settle(request.answer, (passing or errors)[0])

    def _validate_identity(self, endpoint: _Endpoint, identity: Identity) -> None:
        """Raise ServerChanged unless the server is what the others are.

        A vocabulary may be published while a client runs: where no other server is left, or the others have moved on
        to it too, it is the new one.
        """
        known, url = self._identity, endpoint.transport.url
        if identity.bundle != known.bundle:
            raise ServerChanged(_difference(url, "bundle", identity.bundle, known.bundle))
        if identity.vocabulary == known.vocabulary:
            return
        for other in self._endpoints:
            if (
                other is not endpoint
                and other.trusted
                and self._vocabulary_of(other) not in (None, identity.vocabulary)
            ):
                raise ServerChanged(_difference(url, "vocabulary", identity.vocabulary, known.vocabulary))
        _log.warning("%s now serves the vocabulary %s", url, identity.vocabulary[:12])
        self._identity = identity

    def _vocabulary_of(self, endpoint: _Endpoint) -> str | None:
        try:
            return self._read_identity(endpoint.transport).vocabulary
        except (*RETRYABLE, ModelsMissing):
            return None


def _difference(url: str, what: str, found: str, expected: str) -> str:
    return (
        f"{url} serves another {what} ({found[:12]}, not {expected[:12]}): "
        "give endpoints of the same repository, or start again"
    )

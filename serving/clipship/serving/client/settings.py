"""How a client works: the keyword arguments that the sync and the asyncio client share, declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from clipship.core.errors import UsageError
from clipship.core.images.decoding import Resample
from clipship.serving.client.inputs import Decode
from clipship.serving.transport.base import Transport
from clipship.serving.transport.connection import Connection

ServerLike: TypeAlias = str | Connection | Transport
"""HOST:PORT of a gRPC endpoint (or several, separated by commas), a connection, or a transport."""

_P = ParamSpec("_P")
_ClientT = TypeVar("_ClientT")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How a request is retried when the server is busy, restarting or down: exponential backoff with jitter."""

    deadline_s: float = 120.0
    """Of all attempts of one request together."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int, chance: float) -> float:
        """The pause after attempt ``attempt`` (from 0): half of it fixed, half times ``chance`` (0..1)."""
        full = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(attempt, 30))
        return full * (1 + chance) / 2


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Send ``share`` (0..1) of the requests to another vocabulary's models; ``Result.vocabulary`` says which answered.

    If the server unloads those models while the client runs, the client's own vocabulary answers all requests again.
    """

    vocabulary: str
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"a canary's share is {self.share:g}: give a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """The keyword arguments of ``Classifier`` and ``AsyncClassifier``.

    Raises:
        UsageError: a setting is out of range.
    """

    decode: Decode = "auto"
    """Who decodes and resizes: "client" sends pixels, "server" the files' bytes, "auto" whichever is cheaper for each
    image (:data:`~clipship.serving.client.inputs.Decode`). The results are the same."""
    resample: Resample = "exact"
    """How images decoded here are resized: "exact" as open_clip to the bit, "fast" at most 2 of 255 off."""
    embeddings: bool = False
    """Return each image's embedding too."""
    vocabulary: str | None = None
    """A further vocabulary of the server, by name; None: its first."""
    canary: Canary | None = None
    """Another vocabulary that answers a share of the requests."""
    timeout_s: float = 60.0
    """Of one attempt of a request."""
    window: int = 4
    """Most requests in flight; fewer while the server is overloaded."""
    batch_size: int | None = None
    """Images a request; None: the server's maximum."""
    workers: int | None = None
    """Threads that read and decode; None: one a core."""
    retry: Retry | None = None
    """How failed requests are retried; None: the defaults of :class:`Retry`."""
    telemetry: bool = False
    """Report spans and counters to the application's OpenTelemetry providers."""

    def __post_init__(self) -> None:
        if self.decode not in ("auto", "client", "server"):
            raise UsageError(f"decode is {self.decode!r}: give auto, client or server")
        if self.resample not in ("exact", "fast"):
            raise UsageError(f"resample is {self.resample!r}: give exact or fast")
        if self.window < 1 or not self.timeout_s > 0 or (self.workers is not None and self.workers < 1):
            raise UsageError(
                f"window {self.window}, timeout_s {self.timeout_s:g}, workers {self.workers}: give positive numbers"
            )


def _keywords_of(
    settings: Callable[_P, ClientSettings],
) -> Callable[
    [Callable[[_ClientT, ServerLike, ClientSettings], None]], Callable[Concatenate[_ClientT, ServerLike, _P], None]
]:
    def decorate(
        init: Callable[[_ClientT, ServerLike, ClientSettings], None],
    ) -> Callable[Concatenate[_ClientT, ServerLike, _P], None]:
        @functools.wraps(init)
        def with_keywords(client: _ClientT, server: ServerLike, /, *args: _P.args, **keywords: _P.kwargs) -> None:
            init(client, server, settings(*args, **keywords))

        client, server, _ = inspect.signature(init).parameters.values()
        keywords: Any = inspect.signature(settings).parameters.values()
        with_keywords.__signature__ = inspect.Signature([client, server, *keywords])  # type: ignore[attr-defined]
        return with_keywords

    return decorate


settings_as_keywords = _keywords_of(ClientSettings)
"""Decorates ``__init__(self, server, settings)``: callers give the settings as keyword arguments."""

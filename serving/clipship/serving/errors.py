"""What can go wrong between a model repository, a server and its clients.

::

    ClipshipError
    |-- ServingError              exit 1
    |   |-- ServerUnreachable     nobody answers at the address, or the connection broke
    |   |-- ServerOverloaded      the server's queue is full, or the request waited in it for too long
    |   |-- DeadlineExceeded      no answer within the time limit
    |   |-- RequestRejected       the server refused the request
    |   |   |-- RequestFailed     it took the request and failed while it ran
    |   |   `-- BadAnswer         it answered something that does not fit the request
    |   |-- AccessDenied          the token, certificate or header does not suffice
    |   |-- ModelsMissing         a Triton answers, but it does not serve our models
    |   |-- ServerChanged         a server that came back serves another bundle
    |   |-- ServerFailed          Triton did not start, or died
    |   `-- JobStopped            a batch job ended before its end; what it finished is kept
    `-- UsageError                exit 2
        `-- RepositoryError       a model repository that Triton would not load

The gRPC status codes are translated in one place, ``transport/grpc.py``. The first three are worth another try.
"""

from __future__ import annotations

from clipship.core.errors import ClipshipError, UsageError


class ServingError(ClipshipError):
    """A server, or the way to it, failed."""


class ServerUnreachable(ServingError):
    """Nobody answers at the address, or the connection broke."""


class ServerOverloaded(ServingError):
    """The server's queue is full, or the request waited in it for too long."""


class DeadlineExceeded(ServingError):
    """No answer within the time limit."""


class RequestRejected(ServingError):
    """The server refused the request."""


class RequestFailed(RequestRejected):
    """The server took the request and failed while it ran."""


class BadAnswer(RequestRejected):
    """The server answered something that does not fit the request."""


class AccessDenied(ServingError):
    """The server knows the client too little: its token, certificate or header does not suffice."""


class ModelsMissing(ServingError):
    """A Triton answers, but it does not serve our models."""


class ServerChanged(ServingError):
    """A server that came back serves another bundle than before."""


class ServerFailed(ServingError):
    """Triton did not start, or died."""


class JobStopped(ServingError):
    """A batch job ended before its end; what it finished is kept, and the same job goes on from there."""


class RepositoryError(UsageError):
    """A model repository that Triton would not load."""


RETRYABLE = (ServerUnreachable, ServerOverloaded, DeadlineExceeded)
"""What may pass: all our requests are idempotent, so they are simply sent again."""

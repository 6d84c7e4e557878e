"""The errors of repositories, servers and clients.

::

    ClipshipError
    |-- ServingError              exit 1
    |   |-- ServerUnreachable     no server answers at the address, or the connection broke
    |   |-- ServerOverloaded      the server's queue is full, or the request waited in it for too long
    |   |-- DeadlineExceeded      no answer within the time limit
    |   |-- RequestRejected       the server refused the request
    |   |   |-- RequestFailed     the model failed while it ran
    |   |   `-- BadAnswer         the answer does not fit the request
    |   |-- AccessDenied          authentication failed
    |   |-- ModelsMissing         a Triton answers, but it does not serve our models
    |   |-- ServerChanged         a restarted server serves another bundle
    |   |-- ServerFailed          Triton did not start, or died
    |   `-- JobStopped            a batch job was interrupted; finished results are kept
    `-- UsageError                exit 2
        `-- RepositoryError       a model repository that Triton would not load

``transport/grpc.py`` translates gRPC's status codes. Requests that meet one of the first three are retried.
"""

from __future__ import annotations

from clipship.core.errors import ClipshipError, UsageError


class ServingError(ClipshipError):
    """A server, or the connection to it, failed."""


class ServerUnreachable(ServingError):
    """No server answers at the address, or the connection broke."""


class ServerOverloaded(ServingError):
    """The server's queue is full, or the request waited in it for too long."""


class DeadlineExceeded(ServingError):
    """No answer within the time limit."""


class RequestRejected(ServingError):
    """The server refused the request."""


class RequestFailed(RequestRejected):
    """The model failed while it ran."""


class BadAnswer(RequestRejected):
    """The answer does not fit the request."""


class AccessDenied(ServingError):
    """Authentication failed: the token, certificate or header is missing or wrong."""


class ModelsMissing(ServingError):
    """A Triton answers, but it does not serve our models."""


class ServerChanged(ServingError):
    """A restarted server serves another bundle than before."""


class ServerFailed(ServingError):
    """Triton did not start, or died."""


class JobStopped(ServingError):
    """A batch job was interrupted; finished results are kept, and the same command resumes it."""


class RepositoryError(UsageError):
    """A model repository that Triton would not load."""


RETRYABLE = (ServerUnreachable, ServerOverloaded, DeadlineExceeded)
"""Transient failures: all our requests are idempotent, so they are sent again."""

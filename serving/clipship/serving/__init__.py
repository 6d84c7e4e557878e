"""From a bundle to a Triton repository, a server, a client and batch jobs. Imports ``clipship.core`` only.

The client's names can be imported from here: ``from clipship.serving import Classifier, RequestRejected``. Their
modules are imported when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipship.serving.client.async_classifier import AsyncClassifier as AsyncClassifier
    from clipship.serving.client.classifier import Classifier as Classifier
    from clipship.serving.client.in_process import LocalTransport as LocalTransport
    from clipship.serving.client.metadata import ServerMetadata as ServerMetadata
    from clipship.serving.client.results import Embeddings as Embeddings
    from clipship.serving.client.results import Result as Result
    from clipship.serving.client.settings import Canary as Canary
    from clipship.serving.client.settings import ClientSettings as ClientSettings
    from clipship.serving.client.settings import Retry as Retry
    from clipship.serving.errors import AccessDenied as AccessDenied
    from clipship.serving.errors import BadAnswer as BadAnswer
    from clipship.serving.errors import DeadlineExceeded as DeadlineExceeded
    from clipship.serving.errors import JobStopped as JobStopped
    from clipship.serving.errors import ModelsMissing as ModelsMissing
    from clipship.serving.errors import RepositoryError as RepositoryError
    from clipship.serving.errors import RequestFailed as RequestFailed
    from clipship.serving.errors import RequestRejected as RequestRejected
    from clipship.serving.errors import ServerChanged as ServerChanged
    from clipship.serving.errors import ServerFailed as ServerFailed
    from clipship.serving.errors import ServerOverloaded as ServerOverloaded
    from clipship.serving.errors import ServerUnreachable as ServerUnreachable
    from clipship.serving.errors import ServingError as ServingError
    from clipship.serving.transport.connection import Connection as Connection
else:
    _ERRORS = (
        *("AccessDenied", "BadAnswer", "DeadlineExceeded", "JobStopped", "ModelsMissing", "RepositoryError"),
        *("RequestFailed", "RequestRejected", "ServerChanged", "ServerFailed", "ServerOverloaded"),
        *("ServerUnreachable", "ServingError"),
    )
    _MODULES = {
        "AsyncClassifier": "client.async_classifier",
        "Canary": "client.settings",
        "Classifier": "client.classifier",
        "ClientSettings": "client.settings",
        "Connection": "transport.connection",
        "Embeddings": "client.results",
        "LocalTransport": "client.in_process",
        "Result": "client.results",
        "Retry": "client.settings",
        "ServerMetadata": "client.metadata",
        **dict.fromkeys(_ERRORS, "errors"),
    }
    __all__ = sorted(_MODULES)

    def __getattr__(name: str) -> type:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

"""From a bundle to a Triton repository, a server, a client and batch jobs. Imports ``clipship.core`` only.

The client's names and all errors can be imported from here: ``from clipship.serving import Classifier, BadAnswer``.
Their modules are imported when a name is first used; those of the errors are light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from clipship.serving.errors import *  # noqa: F403

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
    from clipship.serving.transport.connection import Connection as Connection
else:
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
    }

    def __getattr__(name: str) -> type:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})

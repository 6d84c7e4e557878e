"""The seam to a server: tensors in, tensors out, errors of ``errors.py``. Nothing here knows gRPC.

``grpc.py`` talks to a Triton, ``client/pool.py`` makes one transport of several servers, ``client/in_process.py``
answers in this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol, Required, TypedDict, TypeVar, Unpack

from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]
"""Arrays by tensor name; strings as arrays of ``bytes`` objects."""

_T = TypeVar("_T")


class CallOptions(TypedDict, total=False):
    """What a request carries besides its tensors."""

    timeout_s: Required[float]
    request_id: str
    headers: Mapping[str, str]
    """Added to the connection's own headers."""


class Transport(Protocol):
    """A connection to a server."""

    url: str
    on_this_machine: bool
    """Whether the server shares this machine's processors."""

    def infer(
        self, model: str, inputs: Tensors, outputs: Sequence[str], **options: Unpack[CallOptions]
    ) -> Future[Tensors]:
        """Send a request. The future returns the outputs by name, or raises a :class:`ServingError`.

        Cancelling the future cancels the request.
        """

    def model_config(self, model: str) -> dict[str, Any]:
        """The model's configuration as JSON.

        Raises:
            ModelsMissing: the server has no such model.
            ServingError: the server cannot be reached, or refuses.
        """

    def model_names(self) -> list[str]:
        """The models in the server's repository."""

    def close(self) -> None:
        """Close the connection."""


def settle(future: Future[_T], outcome: _T | BaseException) -> None:
    """Set the result or the exception of ``future``, unless it was cancelled meanwhile."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass  # cancelled


def parameters_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The string parameters of a model's configuration in JSON."""
    return {
        key: value["string_value"] for key, value in config.get("parameters", {}).items() if "string_value" in value
    }


def config_json(message: Any) -> dict[str, Any]:
    """A ``ModelConfig`` message as :meth:`Transport.model_config` returns it."""
    from google.protobuf import json_format

    content: dict[str, Any] = json.loads(json_format.MessageToJson(message, preserving_proto_field_name=True))
    return content

"""The one seam to the network: tensors in, tensors out, and errors of ``errors.py``.

:class:`TritonTransport` speaks gRPC to a Triton, :class:`FakeTransport` calls a function. Nothing else in the package
knows gRPC.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipship.serving.errors import (
    DeadlineExceeded,
    ModelsMissing,
    RequestRejected,
    ServerOverloaded,
    ServerUnreachable,
    ServingError,
)

Tensors = Mapping[str, NDArray[Any]]
"""Arrays by tensor name; strings as arrays of ``bytes`` objects."""

MAX_MESSAGE_BYTES = 2**31 - 1
"""gRPC's own limit of a message; must be stated, because gRPC's default is 4 MB."""

_CONNECT_TIMEOUT_S = 5.0
_OVERLOAD_SIGNS = ("maximum queue size", "Request timeout expired", "inflight")


class Transport(Protocol):
    """What a client needs of a server."""

    url: str

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str], *, timeout_s: float) -> Future[Tensors]:
        """Send a request; the future gives the outputs by name, or raises a :class:`ServingError`."""

    def model_config(self, model: str) -> dict[str, Any]:
        """The model's configuration as JSON.

        Raises:
            ModelsMissing: the server has no such model.
            ServingError: as translated from gRPC.
        """

    def model_names(self) -> list[str]:
        """The models the server knows."""

    def close(self) -> None:
        """End the connection."""


class TritonTransport:
    """gRPC to a Triton at ``url`` (HOST:PORT). The connection is made by the first call."""

    def __init__(self, url: str) -> None:
        from tritonclient import grpc

        # Options given here replace all of tritonclient's own, message limits included.
        options = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 2),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]
        self.url = url.removeprefix("grpc://")
        self._client = grpc.InferenceServerClient(url=self.url, channel_args=options)

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str], *, timeout_s: float) -> Future[Tensors]:
        """See :meth:`Transport.infer`."""
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException

        future: Future[Tensors] = Future()

        def finish(result: Any, error: Any) -> None:
            if error is not None:
                future.set_exception(serving_error(error, self.url))
            else:
                future.set_result({name: result.as_numpy(name) for name in outputs})

        try:
            self._client.async_infer(
                model,
                [_infer_input(name, array) for name, array in inputs.items()],
                finish,
                outputs=[grpc.InferRequestedOutput(name) for name in outputs],
                client_timeout=timeout_s,
            )
        except InferenceServerException as error:  # a message too large to be serialised, a closed channel
            finish(None, error)
        return future

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        reply = self._call(self._client.get_model_config, model)
        config: dict[str, Any] = reply["config"]
        return config

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        reply = self._call(self._client.get_model_repository_index)
        return sorted(model["name"] for model in reply.get("models", []))

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._client.close()

    def _call(self, method: Callable[..., Any], *arguments: str) -> dict[str, Any]:
        from tritonclient.utils import InferenceServerException

        try:
            reply: dict[str, Any] = method(*arguments, as_json=True, client_timeout=_CONNECT_TIMEOUT_S)
        except InferenceServerException as error:
            translated = serving_error(error, self.url)
            if isinstance(translated, DeadlineExceeded):
                translated = ServerUnreachable(f"no Triton answers at {self.url} within {_CONNECT_TIMEOUT_S:g} s")
            raise translated from error
        return reply


class FakeTransport:
    """A transport for tests: ``function(model, inputs)`` gives the outputs, or a future of them, or raises."""

    def __init__(
        self,
        function: Callable[[str, Tensors], Tensors | Future[Tensors]],
        configs: Mapping[str, dict[str, Any]],
    ) -> None:
        self.url = "fake"
        self.requests: list[tuple[str, Tensors]] = []
        """Every request that was sent, in order."""
        self._function = function
        self._configs = configs

    def infer(self, model: str, inputs: Tensors, outputs: Sequence[str], *, timeout_s: float) -> Future[Tensors]:
        """See :meth:`Transport.infer`."""
        self.requests.append((model, inputs))
        future: Future[Tensors] = Future()
        try:
            answer = self._function(model, inputs)
        except ServingError as error:
            future.set_exception(error)
            return future
        if isinstance(answer, Future):
            return answer
        future.set_result(answer)
        return future

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        if model not in self._configs:
            raise ModelsMissing(f"{self.url}: no model {model!r}")
        return self._configs[model]

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        return sorted(self._configs)

    def close(self) -> None:
        """See :meth:`Transport.close`."""


def parameters_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The string parameters of a model's configuration in JSON."""
    return {
        key: value["string_value"] for key, value in config.get("parameters", {}).items() if "string_value" in value
    }


def config_json(message: Any) -> dict[str, Any]:
    """A configuration message in the JSON form :meth:`Transport.model_config` gives."""
    from google.protobuf import json_format

    content: dict[str, Any] = json.loads(json_format.MessageToJson(message, preserving_proto_field_name=True))
    return content


def serving_error(error: Any, url: str) -> ServingError:
    """The error of ours for a ``tritonclient`` exception."""
    status = str(error.status() or "").rpartition(".")[2]
    message = " ".join((error.message() or str(error)).split())
    if "no available versions" in message:  # while Triton loads or unloads: it starts, stops, or takes a new version
        return ServerUnreachable(f"{url}: the server has not loaded the model ({message}): wait, or look at its log")
    if "unknown model" in message or (status == "NOT_FOUND" and "model" in message):
        return ModelsMissing(f"{url}: {message}")
    if status == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"{url}: no answer in time ({message}): give a longer time limit, or smaller batches")
    if status == "UNAVAILABLE" and any(sign in message for sign in _OVERLOAD_SIGNS):
        return ServerOverloaded(f"{url}: the server is overloaded ({message}): send fewer requests at once")
    if status in ("UNAVAILABLE", "CANCELLED"):
        return ServerUnreachable(
            f"no Triton answers at {url} ({message}): start one with clipship serve, or give its gRPC HOST:PORT"
        )
    return RequestRejected(f"{url}: the server refused the request or failed ({status or 'no status'}: {message})")


def _infer_input(name: str, array: NDArray[Any]) -> Any:
    from tritonclient import grpc
    from tritonclient.utils import np_to_triton_dtype

    tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor

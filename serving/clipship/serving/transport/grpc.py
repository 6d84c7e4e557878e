"""The one seam to the network: tensors in, tensors out, and errors of ``errors.py``.

:class:`TritonTransport` speaks gRPC to a Triton, :class:`FakeTransport` calls a function; ``client/pool.py`` makes one
transport of several. Nothing else in the package knows gRPC. The messages are those of Triton's protocol as
``tritonclient`` carries them (the KServe predict protocol, version 2, with Triton's extensions).
"""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import ClipshipError, UsageError
from clipship.serving.errors import (
    AccessDenied,
    BadAnswer,
    DeadlineExceeded,
    ModelsMissing,
    RequestFailed,
    RequestRejected,
    ServerOverloaded,
    ServerUnreachable,
    ServingError,
)
from clipship.serving.transport.connection import (
    MAX_MESSAGE_BYTES,
    Connection,
    address_of,
    is_loopback,
    validate_token,
)
from clipship.serving.transport.shared_memory import SharedSlots, Slot

__all__ = ["MAX_MESSAGE_BYTES", "FakeTransport", "Tensors", "Transport", "TritonTransport"]

Tensors = Mapping[str, NDArray[Any]]
"""Arrays by tensor name; strings as arrays of ``bytes`` objects."""

_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where Debian, Fedora and Alpine keep the authorities they trust."""

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
"""The method of inference, for calls whose messages are bytes."""
_RAW_INPUT_CONTENTS = 7
"""The number of that field in ModelInferRequest."""
_OVERLOAD_SIGNS = ("maximum queue size", "Request timeout expired", "inflight")
_TLS_SIGNS = (
    *("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "WRONG_VERSION_NUMBER", "CERTIFICATE_REQUIRED"),
    "not in peer certificate",  # gRPC before 1.68
)
_FAILED_WHILE_RUNNING = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED")
_T = TypeVar("_T")


class Transport(Protocol):
    """What a client needs of a server."""

    url: str
    on_this_machine: bool
    """Whether the server shares this machine's processors."""

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
        """Send a request; the future gives the outputs by name, or raises a :class:`ServingError`.

        To cancel the future is to cancel the request.
        """

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
    """gRPC to one Triton. The connection is made by the first call.

    Args:
        url: HOST:PORT.
        connection: TLS, token, headers and so on; its own addresses are not looked at.
    """

    def __init__(self, url: str, connection: Connection | None = None) -> None:
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self.url = address_of(url)
        self.on_this_machine = is_loopback(self.url)
        self._settings = connection or Connection(urls=(url,))
        self._token = _Token(self._settings)
        self._channel = open_channel(self.url, self._settings)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        answers = service_pb2.ModelInferResponse.FromString
        self._infer = self._channel.unary_unary(MODEL_INFER, response_deserializer=answers)  # requests are bytes
        self._infer_bytes = self._channel.unary_unary(MODEL_INFER)  # answers are, too
        self._slots = SharedSlots(self) if self._settings.shared_memory and self.on_this_machine else None

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
        """See :meth:`Transport.infer`."""
        import grpc

        answer: Future[Tensors] = Future()
        slots: list[Slot] = []
        try:
            request = self._request(model, inputs, outputs, request_id, slots)
            call = self._infer.future(request, timeout=timeout_s, metadata=self._metadata(headers))
        except (grpc.RpcError, ValueError) as error:  # a closed channel, no token
            self._give_back(slots)
            settle(answer, error if isinstance(error, ClipshipError) else serving_error(error, self.url))
            return answer
        answer.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)
        call.add_done_callback(lambda done: self._land(done, answer, outputs, slots))
        return answer

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        from tritonclient.grpc import service_pb2

        return config_json(self.call("ModelConfig", service_pb2.ModelConfigRequest(name=model)).config)

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        from tritonclient.grpc import service_pb2

        return sorted(model.name for model in self.call("RepositoryIndex", service_pb2.RepositoryIndexRequest()).models)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        if self._slots is not None:
            self._slots.close()
        self._channel.close()

    def call(self, method: str, request: Any) -> Any:
        """Triton's answer to one of its protocol's methods other than inference.

        Raises:
            ServingError: as translated from gRPC; :class:`ServerUnreachable` where no answer comes in time.
        """
        import grpc

        timeout_s = self._settings.connect_timeout_s
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata(None))
        except grpc.RpcError as error:
            translated = serving_error(error, self.url)
            if isinstance(translated, DeadlineExceeded):
                translated = ServerUnreachable(f"no Triton answers at {self.url} within {timeout_s:g} s")
            raise translated from error
        except ValueError as error:
            if isinstance(error, ClipshipError):
                raise
            raise serving_error(error, self.url) from error

    def send(self, request: bytes, *, timeout_s: float) -> Any:
        """A gRPC call that sends a message of :func:`request_bytes` as it is; its result is the answer's bytes.

        Raises:
            UsageError: the token's file cannot be read.
        """
        return self._infer_bytes.future(request, timeout=timeout_s, metadata=self._metadata(None))

    def _metadata(self, headers: Mapping[str, str] | None) -> list[tuple[str, str]]:
        token = self._token.value()
        secret = [("authorization", f"Bearer {token}")] if token else []
        return [*self._settings.headers.items(), *(headers or {}).items(), *secret]

    def _request(
        self, model: str, inputs: Tensors, outputs: Sequence[str], request_id: str, slots: list[Slot]
    ) -> bytes:
        """The serialised message; slots of shared memory that it points to are added to ``slots``."""
        regions: dict[str, str] = {}
        for name, array in inputs.items():
            slot = self._slots.lend(array) if self._slots is not None and array.dtype != np.object_ else None
            if slot is not None:
                slots.append(slot)
                regions[name] = slot.name
        return request_bytes(model, inputs, outputs, request_id=request_id, regions=regions)

    def _land(self, call: Any, answer: Future[Tensors], outputs: Sequence[str], slots: list[Slot]) -> None:
        """Settle ``answer``; runs in gRPC's thread, where an exception would be lost and the client wait for ever."""
        import grpc

        self._give_back(slots)
        try:
            error = call.exception()
        except grpc.FutureCancelledError:
            settle(answer, ServerUnreachable(f"{self.url}: the connection was closed with requests in flight"))
            return
        if error is None:
            settle(answer, _outputs(call.result(), outputs, self.url))
        elif slots and self._slots is not None and "shared memory" in str(error.details()):
            self._slots.forget(slots)
            settle(answer, ServerUnreachable(f"{self.url}: the server has lost its shared memory: sent again"))
        else:
            settle(answer, serving_error(error, self.url))

    def _give_back(self, slots: list[Slot]) -> None:
        if self._slots is not None:
            self._slots.give_back(slots)


def request_bytes(
    model: str,
    inputs: Tensors,
    outputs: Sequence[str],
    *,
    request_id: str = "",
    regions: Mapping[str, str] | None = None,
) -> bytes:
    """A serialised ModelInferRequest, for :meth:`TritonTransport.send`; ``regions``: which inputs lie in shared memory.

    The arrays' bytes are put behind the rest of the message as its fields, which protobuf's encoding allows: protobuf
    itself would copy them three times.
    """
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    contents: list[bytes | memoryview] = []
    for name, array in inputs.items():
        tensor = request.inputs.add(name=name, shape=array.shape, datatype=np_to_triton_dtype(array.dtype))
        if name in (regions or {}):
            tensor.parameters["shared_memory_region"].string_param = (regions or {})[name]
            tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        elif array.dtype == np.object_:
            contents.append(serialize_byte_tensor(array).item() if array.size else b"")
        else:
            contents.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    request.outputs.extend(service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs)
    fields = [part for content in contents for part in (_field_head(_RAW_INPUT_CONTENTS, len(content)), content)]
    return b"".join([request.SerializeToString(), *fields])


class _Token:
    """The bearer token; one in a file is read again when the file changes."""

    def __init__(self, connection: Connection) -> None:
        self._value = connection.token
        self._file = connection.token_file
        self._seen: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def value(self) -> str | None:
        """The token, None where none was given.

        Raises:
            UsageError: the file cannot be read, or holds no token.
        """
        if self._file is None:
            return self._value
        with self._lock:
            try:
                stat = Path(self._file).stat()
                if self._seen != (stat.st_mtime_ns, stat.st_ino):
                    text = Path(self._file).read_text(encoding="utf-8").strip()
                    validate_token(text, f"{self._file}: the token")
                    self._value, self._seen = text, (stat.st_mtime_ns, stat.st_ino)
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{self._file}: the token cannot be read ({type(error).__name__})") from error
            return self._value


def open_channel(address: str, connection: Connection) -> Any:
    """A gRPC channel to ``address`` (HOST:PORT) with the limits, the compression and the TLS of ``connection``.

    Raises:
        UsageError: a PEM file cannot be read.
    """
    import grpc

    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", connection.max_message_bytes),
        ("grpc.max_receive_message_length", connection.max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 2),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A new client must not inherit the pause of one that has just met an absent server.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    methods = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
    compression = methods.get(connection.compression, grpc.Compression.NoCompression)
    if not connection.secure:
        return grpc.insecure_channel(address, options=options, compression=compression)
    if connection.server_name is not None:
        options.append(("grpc.ssl_target_name_override", connection.server_name))
    files = (connection.ca_file or _system_authorities(), connection.key_file, connection.certificate_file)
    credentials = grpc.ssl_channel_credentials(*(None if file is None else _pem(file) for file in files))
    return grpc.secure_channel(address, credentials, options=options, compression=compression)


def _system_authorities() -> Path | None:
    """The certificates this machine trusts (``SSL_CERT_FILE`` names others); None: those that gRPC brings along.

    gRPC would take its own by itself, and know nothing of an organisation's authority that is installed here.
    """
    if "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH" in os.environ:  # which gRPC reads
        return None
    candidates = (ssl.get_default_verify_paths().cafile, *_AUTHORITIES)
    return next((Path(file) for file in candidates if file is not None and Path(file).is_file()), None)


def _pem(file: Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}): give a PEM file") from error


class FakeTransport:
    """A transport for tests: ``function(model, inputs)`` gives the outputs, or a future of them, or raises."""

    def __init__(
        self,
        function: Callable[[str, Tensors], Tensors | Future[Tensors]],
        configs: Mapping[str, dict[str, Any]],
        *,
        url: str = "fake",
        on_this_machine: bool = True,
    ) -> None:
        self.url = url
        self.on_this_machine = on_this_machine
        self.requests: list[tuple[str, Tensors]] = []
        """Every request that was sent, in order."""
        self.request_ids: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.function = function
        self.configs = dict(configs)
        self.closed = False

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
        """See :meth:`Transport.infer`."""
        self.requests.append((model, inputs))
        self.request_ids.append(request_id)
        self.headers.append(headers or {})
        future: Future[Tensors] = Future()
        try:
            answer = self.function(model, inputs)
        except ServingError as error:
            future.set_exception(error)
            return future
        if isinstance(answer, Future):
            return answer
        future.set_result(answer)
        return future

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        if model not in self.configs:
            raise ModelsMissing(f"{self.url}: no model {model!r}")
        return self.configs[model]

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        return sorted(self.configs)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self.closed = True


def settle(future: Future[_T], outcome: _T | Exception) -> None:
    """Give ``future`` its result, or the exception; one that was cancelled meanwhile stays so."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass  # nobody waits for it any more


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
    """The error of ours for one of gRPC (``grpc.RpcError``), of ``tritonclient``, or a closed channel's ValueError."""
    status, message = _status_and_message(error)
    if "no available versions" in message:  # while Triton loads or unloads: it starts, stops, or takes a new version
        return ServerUnreachable(f"{url}: the server has not loaded the model ({message}): wait, or look at its log")
    if "unknown model" in message or (status == "NOT_FOUND" and "model" in message):
        return ModelsMissing(f"{url}: {message}")
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "protocol is restricted" in message:
        return AccessDenied(f"{url}: access denied ({message}): give the token, certificate or header it asks for")
    if any(sign in message for sign in _TLS_SIGNS):
        return AccessDenied(
            f"{url}: no TLS connection ({message}): check the authorities, the name and the certificates"
        )
    if status == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"{url}: no answer in time ({message}): give a longer time limit, or smaller batches")
    if status == "UNAVAILABLE" and any(sign in message for sign in _OVERLOAD_SIGNS):
        return ServerOverloaded(f"{url}: the server is overloaded ({message}): send fewer requests at once")
    if status in ("UNAVAILABLE", "CANCELLED"):
        return ServerUnreachable(
            f"no Triton answers at {url} ({message}): start one with clipship serve, or give its gRPC HOST:PORT"
        )
    kind = RequestFailed if status in _FAILED_WHILE_RUNNING else RequestRejected
    return kind(f"{url}: the server refused the request or failed ({status or 'no status'}: {message})")


def _status_and_message(error: Any) -> tuple[str, str]:
    """The gRPC status' name, empty where there is none, and the message in one line."""
    if hasattr(error, "code"):
        status, message = getattr(error.code(), "name", ""), error.details()
    elif hasattr(error, "status"):
        status, message = str(error.status() or "").rpartition(".")[2], error.message()
    else:
        status, message = "", str(error)
    return status, " ".join((message or str(error)).split())


def _field_head(number: int, size_bytes: int) -> bytes:
    """What stands before a field of bytes: its number and type, and its length, as protobuf's base-128 varints."""
    head = bytearray()
    for value in (number << 3 | 2, size_bytes):
        while value > 0x7F:
            head.append(value & 0x7F | 0x80)
            value >>= 7
        head.append(value)
    return bytes(head)


def _outputs(response: Any, names: Sequence[str], url: str) -> Tensors | BadAnswer:
    """The named arrays of an answer, as far as it has them."""
    from tritonclient.grpc import InferResult

    try:
        parsed = InferResult(response)
        return {name: array for name in names if (array := parsed.as_numpy(name)) is not None}
    except Exception as error:  # noqa: BLE001  whatever tritonclient's parser makes of an answer that is none
        return BadAnswer(f"{url}: the answer cannot be read ({type(error).__name__}: {error})")

"""gRPC to a Triton: the only module that knows it. Errors become those of ``errors.py`` here.

The messages are those of the KServe predict protocol, version 2, with Triton's extensions, from ``tritonclient``.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Unpack

import numpy as np

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
from clipship.serving.transport.base import CallOptions, Tensors, config_json, settle
from clipship.serving.transport.connection import Connection, address_of, is_loopback, validate_token
from clipship.serving.transport.shared_memory import SharedSlots, Slot

_CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""The system's CA bundle on Debian, Fedora and Alpine."""

_MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
_RAW_INPUT_CONTENTS = 7
"""The number of that field in ModelInferRequest."""
_OVERLOAD_SIGNS = ("maximum queue size", "Request timeout expired", "inflight")
_TLS_SIGNS = (
    *("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "WRONG_VERSION_NUMBER", "CERTIFICATE_REQUIRED"),
    "not in peer certificate",  # gRPC before 1.68
)
_FAILED_WHILE_RUNNING = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED")


class TritonTransport:
    """A :class:`~clipship.serving.transport.base.Transport` to one Triton. The first call connects.

    Args:
        url: HOST:PORT.
        connection: TLS, token, headers and so on; its own addresses are ignored.
    """

    def __init__(self, url: str, connection: Connection | None = None) -> None:
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self.url = address_of(url)
        self.on_this_machine = is_loopback(self.url)
        self._connection = connection or Connection(urls=(url,))
        self._channel = _open_channel(self.url, self._connection)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        parse = service_pb2.ModelInferResponse.FromString
        self._infer = self._channel.unary_unary(_MODEL_INFER, response_deserializer=parse)  # requests are bytes
        self._slots = SharedSlots(self) if self._connection.shared_memory and self.on_this_machine else None

    def infer(
        self, model: str, inputs: Tensors, outputs: Sequence[str], **options: Unpack[CallOptions]
    ) -> Future[Tensors]:
        """See :meth:`Transport.infer`."""
        import grpc

        answer: Future[Tensors] = Future()
        slots: list[Slot] = []
        try:
            request = self._request(model, inputs, outputs, options.get("request_id", ""), slots)
            metadata = self._metadata(options.get("headers", {}))
            call = self._infer.future(request, timeout=options["timeout_s"], metadata=metadata)
        except (grpc.RpcError, ValueError) as error:  # a closed channel, no token
            self._release(slots)
            settle(answer, error if isinstance(error, ClipshipError) else serving_error(error, self.url))
            return answer
        answer.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)
        call.add_done_callback(lambda done: self._complete(done, answer, outputs, slots))
        return answer

    def model_config(self, model: str) -> dict[str, Any]:
        """See :meth:`Transport.model_config`."""
        return config_json(self.call("ModelConfig", name=model).config)

    def model_names(self) -> list[str]:
        """See :meth:`Transport.model_names`."""
        return sorted(model.name for model in self.call("RepositoryIndex").models)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        if self._slots is not None:
            self._slots.close()
        self._channel.close()

    def call(self, method: str, **fields: Any) -> Any:
        """The response of one of the protocol's other methods to a request with these ``fields``.

        Raises:
            ServingError: translated from gRPC; after the connect timeout a :class:`ServerUnreachable`.
        """
        import grpc
        from tritonclient.grpc import service_pb2

        timeout_s = self._connection.connect_timeout_s
        request = getattr(service_pb2, f"{method}Request")(**fields)
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata({}))
        except grpc.RpcError as error:
            translated = serving_error(error, self.url)
            if isinstance(translated, DeadlineExceeded):
                translated = ServerUnreachable(f"no Triton answers at {self.url} within {timeout_s:g} s")
            raise translated from error
        except ValueError as error:
            if isinstance(error, ClipshipError):
                raise
            raise serving_error(error, self.url) from error

    def _metadata(self, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        token = self._token()
        secret = [("authorization", f"Bearer {token}")] if token else []
        return [*self._connection.headers.items(), *headers.items(), *secret]

    def _token(self) -> str | None:
        """The bearer token. A token file is read for every call: it may be replaced at any time."""
        file = self._connection.token_file
        if file is None:
            return self._connection.token
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: the token cannot be read ({type(error).__name__})") from error
        validate_token(token, f"{file}: the token")
        return token

    def _request(
        self, model: str, inputs: Tensors, outputs: Sequence[str], request_id: str, slots: list[Slot]
    ) -> bytes:
        """The serialised message; the shared-memory slots that hold its inputs are added to ``slots``."""
        regions: dict[str, str] = {}
        for name, array in inputs.items():
            slot = self._slots.lend(array) if self._slots is not None and array.dtype != np.object_ else None
            if slot is not None:
                slots.append(slot)
                regions[name] = slot.name
        return _request_bytes(model, inputs, outputs, request_id, regions)

    def _complete(self, call: Any, answer: Future[Tensors], outputs: Sequence[str], slots: list[Slot]) -> None:
        """Settle ``answer``. Runs in gRPC's thread, which would swallow an exception and leave the client waiting."""
        import grpc

        self._release(slots)
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

    def _release(self, slots: list[Slot]) -> None:
        if self._slots is not None:
            self._slots.give_back(slots)


def _request_bytes(
    model: str, inputs: Tensors, outputs: Sequence[str], request_id: str, regions: Mapping[str, str]
) -> bytes:
    """A serialised ModelInferRequest.

    The arrays' bytes are appended to the serialised message as fields of their own, as protobuf's encoding allows:
    protobuf itself would copy them three times.

    Args:
        regions: by input, the shared-memory region that holds it.
    """
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    contents: list[bytes | memoryview] = []
    for name, array in inputs.items():
        tensor = request.inputs.add(name=name, shape=array.shape, datatype=np_to_triton_dtype(array.dtype))
        if name in regions:
            tensor.parameters["shared_memory_region"].string_param = regions[name]
            tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        elif array.dtype == np.object_:
            contents.append(serialize_byte_tensor(array).item() if array.size else b"")
        else:
            contents.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    request.outputs.extend(service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs)
    fields = [part for content in contents for part in (_field_header(_RAW_INPUT_CONTENTS, len(content)), content)]
    return b"".join([request.SerializeToString(), *fields])


def _field_header(number: int, size_bytes: int) -> bytes:
    """The tag and the length before a length-delimited field, as protobuf's base-128 varints."""
    header = bytearray()
    for value in (number << 3 | 2, size_bytes):
        while value > 0x7F:
            header.append(value & 0x7F | 0x80)
            value >>= 7
        header.append(value)
    return bytes(header)


def _open_channel(address: str, connection: Connection) -> Any:
    """A gRPC channel to ``address`` (HOST:PORT) with the limits, compression and TLS of ``connection``.

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
        # Channels of one process share their connections, and with them the backoff after a failure: not ours.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    methods = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
    compression = methods.get(connection.compression, grpc.Compression.NoCompression)
    if not connection.secure:
        return grpc.insecure_channel(address, options=options, compression=compression)
    if connection.server_name is not None:
        options.append(("grpc.ssl_target_name_override", connection.server_name))
    files = (connection.ca_file or _system_ca_bundle(), connection.key_file, connection.certificate_file)
    credentials = grpc.ssl_channel_credentials(*(None if file is None else _pem(file) for file in files))
    return grpc.secure_channel(address, credentials, options=options, compression=compression)


def _system_ca_bundle() -> Path | None:
    """The CA bundle of this machine (``SSL_CERT_FILE`` overrides it); None: the one that gRPC ships.

    gRPC by itself would use its own, which lacks an organisation's own CA.
    """
    if "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH" in os.environ:  # which gRPC reads
        return None
    candidates = (ssl.get_default_verify_paths().cafile, *_CA_BUNDLES)
    return next((Path(file) for file in candidates if file is not None and Path(file).is_file()), None)


def _pem(file: Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}): give a PEM file") from error


def serving_error(error: Any, url: str) -> ServingError:
    """Our error for ``grpc.RpcError``, or for the ValueError of a closed channel."""
    status, message = _status_and_message(error)
    if "no available versions" in message:  # while Triton loads or unloads the model, or stops
        return ServerUnreachable(f"{url}: the server has not loaded the model ({message}): wait, or read its log")
    if "unknown model" in message or (status == "NOT_FOUND" and "model" in message):
        return ModelsMissing(f"{url}: {message}")
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "protocol is restricted" in message:
        return AccessDenied(f"{url}: access denied ({message}): give the token, certificate or header it requires")
    if any(sign in message for sign in _TLS_SIGNS):
        return AccessDenied(
            f"{url}: TLS handshake failed ({message}): check the CA, the server's name and the certificates"
        )
    if status == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"{url}: no answer in time ({message}): give a longer timeout, or smaller batches")
    if status == "UNAVAILABLE" and any(sign in message for sign in _OVERLOAD_SIGNS):
        return ServerOverloaded(f"{url}: the server is overloaded ({message}): send fewer requests at once")
    if status in ("UNAVAILABLE", "CANCELLED"):
        return ServerUnreachable(
            f"no Triton answers at {url} ({message}): start one with clipship serve, or give its gRPC HOST:PORT"
        )
    kind = RequestFailed if status in _FAILED_WHILE_RUNNING else RequestRejected
    return kind(f"{url}: the server refused the request or failed ({status or 'no status'}: {message})")


def _status_and_message(error: Any) -> tuple[str, str]:
    """The gRPC status' name, or an empty one, and the message on one line."""
    is_rpc = hasattr(error, "code")
    status = getattr(error.code(), "name", "") if is_rpc else ""
    return status, " ".join(((is_rpc and error.details()) or str(error)).split())


def _outputs(response: Any, names: Sequence[str], url: str) -> Tensors | BadAnswer:
    """The named outputs that the response has."""
    from tritonclient.grpc import InferResult

    try:
        parsed = InferResult(response)
        return {name: array for name in names if (array := parsed.as_numpy(name)) is not None}
    except Exception as error:  # noqa: BLE001  tritonclient raises anything on a malformed response
        return BadAnswer(f"{url}: the answer cannot be read ({type(error).__name__}: {error})")

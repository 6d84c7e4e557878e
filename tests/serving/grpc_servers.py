"""Small gRPC servers that speak Triton's protocol, well or badly."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

from clipship.serving.transport.base import Tensors
from tests.serving.fake_server import answer, configs

Infer = Callable[[Any, grpc.ServicerContext], Any]
"""A handler of ModelInfer: the request and its context -> the answer's message."""


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Serves the function of ``fake_server.py`` under its models' names; what it was sent is kept."""

    def __init__(self, infer: Infer | None = None, told: dict[str, dict[str, Any]] | None = None) -> None:
        self.infer = infer or good_answer
        self.configs = told or configs()
        self.told: Infer | None = None
        """What is done for a question about a model instead of answering it."""
        self.asked = 0
        self.metadata: list[dict[str, str]] = []
        self.requests: list[Any] = []
        self.lock = threading.Lock()

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(context)
        self.asked += 1
        if self.told is not None:
            return self.told(request, context)
        if request.name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        config = json_format.ParseDict(self.configs[request.name], model_config_pb2.ModelConfig())
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(context)
        with self.lock:
            self.requests.append(request)
        return self.infer(request, context)

    def _note(self, context: grpc.ServicerContext) -> None:
        with self.lock:
            self.metadata.append({each.key: each.value for each in context.invocation_metadata()})


def inputs_of(request: Any) -> Tensors:
    """The request's arrays."""
    arrays = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            elements = []
            while raw:
                size = int.from_bytes(raw[:4], "little")
                elements.append(raw[4 : 4 + size])
                raw = raw[4 + size :]
            arrays[tensor.name] = np.array([*elements, None], np.object_)[:-1].reshape(tensor.shape)
        else:
            arrays[tensor.name] = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
    return arrays


def message_from(outputs: Tensors, request: Any) -> Any:
    """An answer's message, of the outputs that were asked for."""
    response = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    for asked in request.outputs:
        array = outputs[asked.name]
        response.outputs.add(name=asked.name, shape=array.shape, datatype=np_to_triton_dtype(array.dtype))
        is_text = array.dtype == np.object_
        response.raw_output_contents.append(serialize_byte_tensor(array).item() if is_text else array.tobytes())
    return response


def good_answer(request: Any, context: grpc.ServicerContext) -> Any:
    """What a Triton would say."""
    return message_from(answer(request.model_name, inputs_of(request)), request)


@contextmanager
def serving(
    triton: Triton, *, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """``triton`` behind gRPC for the length of the block; its HOST:PORT."""
    server = grpc.server(ThreadPoolExecutor(max_workers=16), options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


class Relay:
    """Hands bytes to and fro between its own port and a server's."""

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.sent_bytes = 0
        """From the client to the server."""
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join()

    def cut(self) -> None:
        """Break all connections."""
        for end in self._open[:]:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # broken before
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target, source is near), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_sent: bool) -> None:
        try:
            while data := source.recv(65536):
                self.sent_bytes += len(data) if is_sent else 0
                target.sendall(data)
        except OSError:
            pass  # cut
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
            source.close()

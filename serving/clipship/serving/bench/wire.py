"""Requests made beforehand and sent as they are, so that what is measured is the server and the way to it.

A request is turned into its bytes once; sending it costs one call of gRPC, and an answer is not even parsed, except for
the first one, which is checked. No client that does anything with its images can be faster.

Legend: N images of a request, H = W = the side of the encoder's input in pixels.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipship.core.tensors import ENCODED, ERROR, image_tensor, indices_tensor, labels_tensor, scores_tensor
from clipship.serving.bench.load import Done, Send
from clipship.serving.connection import Connection
from clipship.serving.errors import RequestRejected, ServingError
from clipship.serving.names import CLASSIFY, CLASSIFY_ENCODED
from clipship.serving.transport import MODEL_INFER, TritonTransport, open_channel, serving_error

Mode = Literal["pixels", "encoded", "shm"]
"""How images travel: uint8 pixels, files' bytes, or uint8 pixels in memory that the server shares."""

MODES: tuple[Mode, ...] = ("pixels", "encoded", "shm")

_UNREGISTER_S = 5.0


def model_of(mode: Mode) -> str:
    """The ensemble that takes what ``mode`` sends."""
    return CLASSIFY_ENCODED if mode == "encoded" else CLASSIFY


def outputs_of(mode: Mode) -> tuple[str, ...]:
    """What is asked for: what a client asks for."""
    names = tuple(tensor(1).name for tensor in (scores_tensor, indices_tensor, labels_tensor))
    return (*names, ERROR.name) if mode == "encoded" else names


def pixels_request(pixels: NDArray[np.uint8]) -> bytes:
    """A request to ``classify`` with ``pixels`` uint8 [N, H, W, 3] inside."""
    message = _request("pixels", image_tensor(pixels.shape[1]).name, "UINT8", pixels.shape)
    message.raw_input_contents.append(pixels.tobytes())
    return _bytes_of(message)


def encoded_request(files: Sequence[bytes]) -> bytes:
    """A request to ``classify_encoded`` with N files inside."""
    from tritonclient.utils import serialize_byte_tensor

    message = _request("encoded", ENCODED.name, "BYTES", (len(files), 1))
    message.raw_input_contents.append(serialize_byte_tensor(np.array(files, dtype=np.object_)).item())
    return _bytes_of(message)


def shm_request(pixels: NDArray[np.uint8], region: str) -> bytes:
    """A request to ``classify`` whose pixels uint8 [N, H, W, 3] lie in the registered ``region``."""
    message = _request("shm", image_tensor(pixels.shape[1]).name, "UINT8", pixels.shape)
    message.inputs[0].parameters["shared_memory_region"].string_param = region
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = pixels.nbytes
    return _bytes_of(message)


def _request(mode: Mode, name: str, datatype: str, shape: Sequence[int]) -> Any:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=model_of(mode))
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    for output in outputs_of(mode):
        message.outputs.add(name=output)
    return message


def _bytes_of(message: Any) -> bytes:
    serialised: bytes = message.SerializeToString()
    return serialised


class Wire:
    """The Triton at ``url`` (HOST:PORT), and a gRPC connection to it for prepared requests."""

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        self.transport = TritonTransport(url)
        self.url = self.transport.url
        self._channel = open_channel(self.url, Connection(urls=(url,)))
        self._infer = self._channel.unary_unary(MODEL_INFER)  # without serialisers: bytes there, bytes back
        self._timeout_s = timeout_s

    def close(self) -> None:
        """End the connections."""
        self._channel.close()
        self.transport.close()

    def sender(self, requests: Sequence[bytes]) -> Send:
        """Sends ``requests`` in turn, over and over."""
        turn = itertools.cycle(requests)

        def send(done: Done) -> None:
            future = self._infer.future(next(turn), timeout=self._timeout_s)
            future.add_done_callback(lambda call: done(self._error_of(call)))

        return send

    def check(self, request: bytes, batch: int) -> None:
        """Send one request and look at its answer, which the measured ones are not.

        Raises:
            ServingError: it failed, has not ``batch`` rows, or an image could not be decoded.
        """
        import grpc
        from tritonclient.grpc import service_pb2
        from tritonclient.utils import deserialize_bytes_tensor

        try:
            reply = service_pb2.ModelInferResponse.FromString(self._infer(request, timeout=self._timeout_s))
        except grpc.RpcError as error:
            raise serving_error(error, self.url) from error
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
            if output.shape[0] != batch:
                raise RequestRejected(f"{self.url}: {output.name} has {output.shape[0]} rows for {batch} images")
            errors = [text for text in deserialize_bytes_tensor(raw) if text] if output.name == ERROR.name else []
            if errors:
                raise RequestRejected(f"{self.url}: an image of the load cannot be decoded: {errors[0].decode()}")

    def statistics(self) -> dict[str, Any]:
        """Triton's ``ModelStatistics`` message of every model, the newest version's.

        Raises:
            ServingError: as translated from gRPC.
        """
        from tritonclient.grpc import service_pb2

        reply = self.transport.call("ModelStatistics", service_pb2.ModelStatisticsRequest())
        return {each.name: each for each in sorted(reply.model_stats, key=lambda each: int(each.version))}

    @contextmanager
    def shared(self, arrays: Sequence[NDArray[np.uint8]]) -> Iterator[list[str]]:
        """The names of regions of shared memory with ``arrays`` in them, which the server knows in the block.

        Raises:
            ServingError: the server cannot open them: it runs on another machine, or in a container of its own.
        """
        with ExitStack() as stack:
            yield [stack.enter_context(self._region(array)) for array in arrays]

    @contextmanager
    def _region(self, array: NDArray[np.uint8]) -> Iterator[str]:
        from tritonclient.grpc import service_pb2

        name = f"clipship_bench_{uuid.uuid4().hex}"
        memory = SharedMemory(name, create=True, size=array.nbytes)
        region = service_pb2.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", byte_size=array.nbytes)
        try:
            np.copyto(np.ndarray(array.shape, array.dtype, buffer=memory.buf), array)
            try:
                self.transport.call("SystemSharedMemoryRegister", region)
            except RequestRejected as error:
                raise ServingError(
                    f"{self.url}: the server cannot open this process's shared memory: "
                    f"run it on this machine outside containers, or give --mode pixels ({error})"
                ) from error
            try:
                yield name
            finally:
                self._unregister(name)
        finally:
            memory.close()
            memory.unlink()

    def _unregister(self, name: str) -> None:
        """Triton holds on to a region for a moment after the answer that used it."""
        from tritonclient.grpc import service_pb2

        deadline_s = time.monotonic() + _UNREGISTER_S
        while True:
            try:
                self.transport.call(
                    "SystemSharedMemoryUnregister", service_pb2.SystemSharedMemoryUnregisterRequest(name=name)
                )
                return
            except RequestRejected:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)

    def _error_of(self, call: Any) -> Exception | None:
        error = call.exception()
        return None if error is None else serving_error(error, self.url)

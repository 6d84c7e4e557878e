"""Requests made beforehand and sent as they are, so that what is measured is the server and the way to it.

A request is turned into its bytes once; sending it costs one call of gRPC, and an answer is not even parsed, except for
the first one, which is checked. No client that does anything with its images can be faster.

Legend: N images of a request, H = W = the side of the encoder's input in pixels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import UsageError
from clipship.core.tensors import ENCODED, ERROR, image_tensor, indices_tensor, labels_tensor, scores_tensor
from clipship.serving.bench.load import Done, Send
from clipship.serving.errors import RequestRejected, ServingError
from clipship.serving.model_names import CLASSIFY, CLASSIFY_ENCODED
from clipship.serving.transport.connection import Connection, connection_from_text
from clipship.serving.transport.grpc import TritonTransport, request_bytes, serving_error
from clipship.serving.transport.shared_memory import registered, unregister

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


def pixels_request(pixels: NDArray[np.uint8], region: str | None = None) -> bytes:
    """A request to ``classify`` with ``pixels`` uint8 [N, H, W, 3] inside, or in the registered ``region``."""
    name = image_tensor(pixels.shape[1]).name
    regions = {} if region is None else {name: region}
    return request_bytes(CLASSIFY, {name: pixels}, outputs_of("pixels"), regions=regions)


def encoded_request(files: Sequence[bytes]) -> bytes:
    """A request to ``classify_encoded`` with N files inside."""
    array = np.array(files, dtype=np.object_).reshape(-1, 1)
    return request_bytes(CLASSIFY_ENCODED, {ENCODED.name: array}, outputs_of("encoded"))


class Wire:
    """A gRPC connection for prepared requests to the Triton of ``server`` (HOST:PORT, or a connection to one).

    Raises:
        UsageError: ``server`` is several servers.
    """

    def __init__(self, server: str | Connection, *, timeout_s: float = 120.0) -> None:
        self.connection = connection_from_text(server) if isinstance(server, str) else server
        if len(self.connection.addresses) != 1:
            raise UsageError(f"{', '.join(self.connection.addresses)}: give one server, its rate is what is measured")
        self.transport = TritonTransport(self.connection.urls[0], self.connection)
        self.url = self.transport.url
        self._timeout_s = timeout_s

    def close(self) -> None:
        """End the connection."""
        self.transport.close()

    def sender(self, requests: Sequence[bytes]) -> Send:
        """Sends ``requests`` in turn, over and over."""
        turn = itertools.cycle(requests)

        def send(done: Done) -> None:
            try:
                future = self.transport.send(next(turn), timeout_s=self._timeout_s)
            except ValueError as error:  # a closed channel, a token that is gone; gRPC's thread would lose it
                done(error)
                return
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
            answer = self.transport.send(request, timeout_s=self._timeout_s).result()
        except grpc.RpcError as error:
            raise serving_error(error, self.url) from error
        reply = service_pb2.ModelInferResponse.FromString(answer)
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
        reply = self.transport.call("ModelStatistics")
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
        try:
            slot = registered(self.transport, array.nbytes)
        except RequestRejected as error:
            raise ServingError(
                f"{self.url}: the server cannot open this process's shared memory: "
                f"run it on this machine outside containers, or give --mode pixels ({error})"
            ) from error
        try:
            slot.hold(array)
            yield slot.name
        finally:
            self._unregister(slot.name)

    def _unregister(self, name: str) -> None:
        """Triton holds on to a region for a moment after the answer that used it."""
        deadline_s = time.monotonic() + _UNREGISTER_S
        while True:
            try:
                unregister(self.transport, name)
                return
            except RequestRejected:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)

    def _error_of(self, call: Any) -> Exception | None:
        error = call.exception()
        return None if error is None else serving_error(error, self.url)

"""What a server is compared with: the same engine in this process, and clipship's own client."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from clipship.core.images.decoding import pixels_from_bytes
from clipship.core.machine.runtimes import available_cores
from clipship.core.tensors import ENCODED
from clipship.serving.bench.load import Reading, measure
from clipship.serving.bench.requests import BenchImages, Mode, Request, pixels_request
from clipship.serving.transport.base import Transport
from clipship.serving.transport.connection import Connection

_TIMEOUT_S = 60.0


class InProcess:
    """The engine without a server: decoding on all cores, then the encoder and the classifier on all cores.

    It runs one batch at a time: each part uses every core, so two at once would not be faster.
    """

    def __init__(self, engine: Transport, samples: BenchImages) -> None:
        self._engine = engine
        self._spec = samples.spec
        self._decoders = ThreadPoolExecutor(available_cores(), thread_name_prefix="clipship-decode")

    def close(self) -> None:
        """End the threads and the engine."""
        self._decoders.shutdown()
        self._engine.close()

    def run(self, request: Request) -> None:
        """Compute the answer to ``request``."""
        files = request.inputs.get(ENCODED.name)
        if files is not None:
            decoded = self._decoders.map(lambda data: pixels_from_bytes(data, self._spec), files.ravel())
            request = pixels_request(np.stack(list(decoded)))
        request.sent(self._engine, _TIMEOUT_S).result()


def measure_client(
    server: Connection, samples: BenchImages, mode: Mode, *, concurrency: int, batch: int, **times: float
) -> Reading:
    """The rate of clipship's client for arrays of the right size, or for files that the server decodes.

    Its requests are not visible from outside, so it has no latencies.

    Raises:
        RuntimeError: an image was answered with an error.
        ServingError: a request failed for good.
    """
    from clipship.serving.client.classifier import Classifier

    images = itertools.cycle(samples.files if mode == "encoded" else list(samples.pixels))
    settings: dict[str, Any] = {"decode": "server" if mode == "encoded" else "client", "window": concurrency}
    with Classifier(server, batch_size=batch, **settings) as classifier:
        results = classifier.classify_iter(images)

        def take_one() -> None:
            if (error := next(results).error) is not None:
                raise RuntimeError(f"the server could not classify an image of the load: {error}")

        for _ in range(concurrency * batch):
            take_one()
        reading = measure(take_one, concurrency=1, batch=1, **times)
        results.close()  # type: ignore[attr-defined]
    return replace(reading, latencies_ms={})

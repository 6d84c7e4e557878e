"""The three ways to the same answers that are measured side by side: a server, this process, and our client.

Legend: N images of a request, H = W = the side of the encoder's input in pixels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.images.decoding import ImageSpec, pixels_from_bytes
from clipship.core.machine.runtimes import available_cores
from clipship.core.tensors import image_tensor
from clipship.serving.bench.load import Done, Load, Send, counted
from clipship.serving.bench.wire import Mode, Wire, encoded_request, outputs_of, pixels_request
from clipship.serving.model_names import CLASSIFY
from clipship.serving.transport.base import Transport
from clipship.serving.transport.connection import Connection

REQUESTS = 4
"""Different requests that are sent in turn."""


class BenchImages:
    """The images of a load, encoded and as the encoder's pixels; any number of them, over and over.

    Raises:
        ImageDecodeError: one of ``files`` is no image.
    """

    def __init__(self, files: Sequence[bytes], spec: ImageSpec) -> None:
        self.files = list(files)
        self.spec = spec
        self.pixels = np.stack([pixels_from_bytes(data, spec) for data in files])
        """Uint8 [images, H, W, 3]."""

    def batches(self, batch: int) -> list[list[int]]:
        """Indices of the images of a few requests of ``batch`` images."""
        turn = itertools.cycle(range(len(self.files)))
        return [list(itertools.islice(turn, batch)) for _ in range(REQUESTS)]

    def pixel_batches(self, batch: int) -> list[NDArray[np.uint8]]:
        """The pixels of a few requests: uint8 [N, H, W, 3] each."""
        return [self.pixels[indices] for indices in self.batches(batch)]

    def file_batches(self, batch: int) -> list[list[bytes]]:
        """The files of a few requests."""
        return [[self.files[index] for index in indices] for indices in self.batches(batch)]


@contextmanager
def prepared(wire: Wire, samples: BenchImages, mode: Mode, batch: int) -> Iterator[list[bytes]]:
    """The bytes of a few requests, valid in the block."""
    if mode == "encoded":
        yield [encoded_request(files) for files in samples.file_batches(batch)]
    elif mode == "pixels":
        yield [pixels_request(pixels) for pixels in samples.pixel_batches(batch)]
    else:
        batches = samples.pixel_batches(batch)
        with wire.shared(batches) as regions:
            yield [pixels_request(pixels, region) for pixels, region in zip(batches, regions, strict=True)]


class InProcess:
    """The engine without a server: decoding on all cores, then the encoder and the classifier on all cores.

    One batch after the other: with every core at work in each of its parts there is nothing to gain from two at once.
    """

    def __init__(self, engine: Transport, samples: BenchImages) -> None:
        self._engine = engine
        self._samples = samples
        self._decoders = ThreadPoolExecutor(available_cores(), thread_name_prefix="clipship-decode")
        self._one = ThreadPoolExecutor(1, thread_name_prefix="clipship-in-process")

    def close(self) -> None:
        """End the threads and the engine."""
        self._one.shutdown()
        self._decoders.shutdown()
        self._engine.close()

    def sender(self, mode: Mode, batch: int) -> Send:
        """A closed loop's way in; more than one request at once wait for each other."""
        run: Callable[[Any], Any] = self._decode_and_classify if mode == "encoded" else self._classify
        samples = self._samples
        turn = itertools.cycle(samples.file_batches(batch) if mode == "encoded" else samples.pixel_batches(batch))

        def send(done: Done) -> None:
            def finish(future: Future[Any]) -> None:
                error = future.exception()
                done(error if error is None or isinstance(error, Exception) else RuntimeError(str(error)))

            self._one.submit(run, next(turn)).add_done_callback(finish)

        return send

    def _decode_and_classify(self, files: Sequence[bytes]) -> None:
        spec = self._samples.spec
        self._classify(np.stack(list(self._decoders.map(lambda data: pixels_from_bytes(data, spec), files))))

    def _classify(self, pixels: NDArray[np.uint8]) -> None:
        """Pixels uint8 [N, H, W, 3] to the outputs that a client asks for."""
        inputs = {image_tensor(self._samples.spec.size_px).name: pixels}
        self._engine.infer(CLASSIFY, inputs, outputs_of("pixels"), timeout_s=60.0).result()


def measure_client(
    server: Connection,
    samples: BenchImages,
    mode: Mode,
    *,
    concurrency: int,
    batch: int,
    seconds: float,
    warm_up_s: float,
) -> Load:
    """The rate of our own client, fed with images that need no decoding: arrays of the right size, or files' bytes.

    Its latencies are those between results, which say nothing: only the rate is of use.

    Raises:
        RuntimeError: an image was answered with an error.
        ServingError: a request failed for good.
    """
    from clipship.serving.client.classifier import Classifier

    images = itertools.cycle(samples.files if mode == "encoded" else list(samples.pixels))
    settings: dict[str, Any] = {"decode": "server" if mode == "encoded" else "client", "window": concurrency}
    times: list[float] = []
    with Classifier(server, batch_size=batch, **settings) as classifier:
        results = classifier.classify_iter(images)
        begin_s = end_s = 0.0
        for result in results:
            if result.error is not None:
                raise RuntimeError(f"the server could not classify an image of the load: {result.error}")
            times.append(now_s := time.perf_counter())
            if not begin_s and len(times) >= concurrency * batch and now_s >= times[0] + warm_up_s:
                begin_s, end_s = now_s, now_s + seconds
            if begin_s and now_s >= end_s:
                break
        results.close()  # type: ignore[attr-defined]
    return counted(times, [0.0] * len(times), (begin_s, now_s), 1)

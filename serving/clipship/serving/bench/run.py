"""Measures every point in interleaved rounds, so that disturbances affect all paths equally."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from clipship.core.bundle import Bundle
from clipship.core.errors import UsageError
from clipship.core.machine.runtimes import available_cores
from clipship.core.progress import progress
from clipship.serving.bench.load import Reading, measure
from clipship.serving.bench.paths import InProcess, measure_client
from clipship.serving.bench.perf_analyzer import Analyzer, analyze
from clipship.serving.bench.requests import MODES, BenchImages, Mode, Request, model_of, validate_answer
from clipship.serving.bench.steps import breakdown, statistics_of
from clipship.serving.client.in_process import LocalTransport
from clipship.serving.client.metadata import ServerMetadata, read_server_metadata
from clipship.serving.errors import RequestRejected, ServingError
from clipship.serving.model_names import ENCODER, PRECISION, RUNTIME
from clipship.serving.transport.base import parameters_of
from clipship.serving.transport.connection import Connection, connection_from_text
from clipship.serving.transport.grpc import TritonTransport
from clipship.serving.transport.shared_memory import registered, unregister

_WARM_UP_S = 0.5
_TIMEOUT_S = 120.0

Where = Literal["server", "in process", "client"]
"""Bare requests to the server, the same engine without one, and our client to the server."""


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure."""

    modes: tuple[Mode, ...] = ("pixels",)
    batches: tuple[int, ...] = (1, 8, 32)
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16)
    seconds: float = 10.0
    """Duration of a reading; longer if some request in flight is not answered by then."""
    rounds: int = 3
    client: bool = True
    """Whether to measure clipship's client too, at the largest concurrency."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A combination of settings that is measured in every round."""

    where: Where
    mode: Mode
    batch: int
    """Images per request."""
    concurrency: int
    """Requests in flight."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """A point and its readings, one per round."""

    point: Point
    readings: tuple[Reading, ...]

    @property
    def rates(self) -> list[float]:
        """Images per second, by round."""
        return [reading.images_per_s for reading in self.readings]

    def latency_ms(self, name: str) -> float | None:
        """The median over the rounds of "mean", "p50", "p90", "p95" or "p99"; None for the client."""
        values = [reading.latencies_ms[name] for reading in self.readings if reading.latencies_ms]
        return statistics.median(values) if values else None

    def middle(self) -> Reading:
        """The reading with the median rate (of an even number the lower one)."""
        return sorted(self.readings, key=lambda reading: reading.images_per_s)[(len(self.readings) - 1) // 2]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every reading."""
        return {
            **asdict(self.point),
            "images_per_s": statistics.median(self.rates),
            "readings": [each.to_json() for each in self.readings],
        }


class Bench:
    """Measures a server and, where a bundle is given, the same engine in this process.

    Args:
        server: HOST:PORT of Triton's gRPC endpoint, or a connection for TLS, a token and headers.
        bundle: the served bundle; its engine runs in this process with one thread per core.
        analyzer: generates the load, unless the connection has TLS, a token or headers.

    Raises:
        ServerUnreachable: the server does not answer.
        ModelsMissing: the server does not have our models.
        UsageError: the bundle is not the one that is served, or has no encoder for this process; several servers.
    """

    def __init__(
        self,
        server: str | Connection,
        files: Sequence[bytes],
        *,
        bundle: Bundle | None = None,
        analyzer: Analyzer | None = None,
    ) -> None:
        self.connection = connection = connection_from_text(server) if isinstance(server, str) else server
        if len(connection.addresses) != 1:
            raise UsageError(f"{', '.join(connection.addresses)}: give one server to measure")
        guarded = connection.secure or connection.token or connection.token_file or connection.headers
        self.analyzer = None if guarded else analyzer  # a token would be visible in its command line
        self.transport = TritonTransport(connection.urls[0], connection)
        self._shared = TritonTransport(connection.urls[0], replace(connection, shared_memory=True))
        self.in_process: InProcess | None = None
        self._checked: set[tuple[Mode, int]] = set()
        try:
            self.metadata: ServerMetadata = read_server_metadata(self.transport)
            self._encoder = parameters_of(self.transport.model_config(ENCODER))
            ensembles = {mode: self.transport.model_config(model_of(mode))["ensemble_scheduling"] for mode in MODES}
            self._steps = {mode: [step["model_name"] for step in each["step"]] for mode, each in ensembles.items()}
            self.samples = BenchImages(files, self.metadata.image_spec)
            if bundle is not None:
                self.in_process = _in_process(bundle, self.metadata, self._encoder, self.samples)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connections and the engine."""
        self.transport.close()
        self._shared.close()
        if self.in_process is not None:
            self.in_process.close()

    def described(self) -> dict[str, Any]:
        """The server's models and the load's images, for a report."""
        encoder = {name: self._encoder[name] for name in (RUNTIME, PRECISION) if name in self._encoder}
        return {
            "cores": available_cores(),
            "load": "clipship" if self.analyzer is None else "perf_analyzer",
            "bundle_digest": self.metadata.bundle_digest,
            "vocabulary_digest": self.metadata.vocabulary_digest,
            "size_px": self.metadata.image_spec.size_px,
            "max_batch_size": self.metadata.max_batch_size,
            "encoder": encoder,
            "images": len(self.samples.files),
            "mean_file_bytes": round(statistics.fmean(map(len, self.samples.files))),
        }

    def points(self, plan: BenchPlan) -> list[Point]:
        """Every point of ``plan``, in order of comparison.

        Raises:
            UsageError: a batch is larger than the server takes.
        """
        largest = self.metadata.max_batch_size
        if max(plan.batches) > largest:
            raise UsageError(f"batch {max(plan.batches)}: the server takes 1 to {largest} images a request")
        points: list[Point] = []
        for mode, batch in itertools.product(plan.modes, plan.batches):
            same: dict[str, Any] = {"mode": mode, "batch": batch}
            points += [Point(where="server", concurrency=each, **same) for each in plan.concurrencies]
            if self.in_process is not None and mode != "shm":
                points.append(Point(where="in process", concurrency=1, **same))
            if plan.client and mode != "shm":
                points.append(Point(where="client", concurrency=max(plan.concurrencies), **same))
        return points

    def run(self, plan: BenchPlan) -> list[BenchRow]:
        """Measure every point once per round.

        Raises:
            UsageError: as :meth:`points`.
            ServingError: a request failed.
        """
        points = self.points(plan)
        readings: dict[Point, list[Reading]] = defaultdict(list)
        with progress("measuring", plan.rounds * len(points)) as report:
            for done in range(plan.rounds * len(points)):
                point = points[done % len(points)]
                report(done, f"{point.where}, {point.mode}, batch {point.batch}, {point.concurrency} in flight")
                readings[point].append(self.read(point, plan.seconds))
        return [BenchRow(point=point, readings=tuple(readings[point])) for point in points]

    def read(self, point: Point, seconds: float) -> Reading:
        """Measure ``point`` for ``seconds``, after a warm-up of at most half a second."""
        numbers: dict[str, Any] = {"concurrency": point.concurrency, "batch": point.batch}
        numbers |= {"seconds": seconds, "warm_up_s": min(_WARM_UP_S, seconds)}
        if point.where == "client":
            return measure_client(self.connection, self.samples, point.mode, **numbers)
        requests = itertools.cycle(self.samples.requests(point.mode, point.batch))
        if point.where == "in process":
            engine = self.in_process
            assert engine is not None
            return measure(lambda: engine.run(next(requests)), **numbers)
        self._validate(next(requests), point)
        before = statistics_of(self.transport)
        reading = self._read_server(point, requests, numbers)
        parts = (model_of(point.mode), self._steps[point.mode], reading.whole_mean_ms)
        return replace(reading, steps=breakdown(before, statistics_of(self.transport), *parts))

    def _read_server(self, point: Point, requests: Iterator[Request], numbers: dict[str, Any]) -> Reading:
        if self.analyzer is None or point.mode == "shm":  # perf_analyzer leaves regions registered
            transport = self._shared if point.mode == "shm" else self.transport
            return measure(lambda: next(requests).sent(transport, _TIMEOUT_S).result(), **numbers)
        (name,) = next(requests).inputs
        images = self.samples.files if point.mode == "encoded" else list(self.samples.pixels)
        del numbers["warm_up_s"]
        return analyze(self.analyzer, self.transport.url, model_of(point.mode), (name, images), **numbers)

    def _validate(self, request: Request, point: Point) -> None:
        """Validate an answer, and for shm that the server maps shared memory, before measuring."""
        if (point.mode, point.batch) in self._checked:
            return
        validate_answer(request, self.transport, _TIMEOUT_S)
        if point.mode == "shm":
            (pixels,) = request.inputs.values()
            try:
                unregister(self.transport, registered(self.transport, pixels.nbytes).name)
            except RequestRejected as error:
                raise ServingError(
                    f"{self.transport.url}: the server cannot open this process's shared memory: "
                    f"run it on this machine outside containers, or give --mode pixels ({error})"
                ) from error
        self._checked.add((point.mode, point.batch))


def _in_process(bundle: Bundle, metadata: ServerMetadata, encoder: dict[str, str], samples: BenchImages) -> InProcess:
    if bundle.digest != metadata.bundle_digest:
        raise UsageError(
            f"{bundle.path}: its digest is {bundle.digest[:12]}, the server's is {metadata.bundle_digest[:12]}: "
            "give the bundle that is served"
        )
    precision: Any = encoder.get(PRECISION, "fp32")
    engine = LocalTransport(bundle, precision=precision, max_batch_size=metadata.max_batch_size, top_k=metadata.top_k)
    return InProcess(engine, samples)

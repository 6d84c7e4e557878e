"""A real Triton beside the same engine without one, perf_analyzer beside our load, and our client beside both.

    python -m benchmarks.serving --out runs/serving

One server for each model, on this machine, with clients on the same processors. The paths take turns in every round, so
that noise meets all alike; a ratio is that of two paths in the same round, and the table has the rounds' median and
range. Beside every reading of the server stands what the server itself has counted meanwhile, which is the judge where
two readings differ: the machine may have been slower under one of them. In process means: the same encoder and
classifier with the same threads on batches of 32, and for files the same decoding on all cores before it. Weights are
random, which does not change the time; images are JPEG files of 500 x 375.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import perf_analyzer
from benchmarks.encoder import bundle_of
from clipship.core.bundle import read_bundle
from clipship.core.files import write_json_atomic, write_text_atomic
from clipship.core.precisions import Precision
from clipship.core.progress import log
from clipship.core.tables import Table, machine, with_spread
from clipship.serving.bench.load import PERCENTILES, Reading
from clipship.serving.bench.photographs import files_from_folder, made_up_files
from clipship.serving.bench.report import steps_table
from clipship.serving.bench.requests import Mode, model_of
from clipship.serving.bench.run import Bench, BenchRow, Point
from clipship.serving.bench.steps import statistics_of
from clipship.serving.repository.write import repository_from_bundle
from clipship.serving.server.process import start_server

MODELS = ("ViT-B-32/random", "clipship-tiny")
LARGEST_BATCH = 32
"""Of the server's dynamic batches, and what the engine in process is given."""

Benches = Mapping[str, Bench]
"""By the first word of a path; "": of all others."""

_PEER = "perf_analyzer"
_RANKS = tuple(f"p{rank}" for rank in PERCENTILES)
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio of two paths, and what it must reach: at least ``low``, at most ``high``."""

    what: str
    path: str
    beside: str
    low: float
    high: float = float("inf")


TARGETS = (
    Target(what="classify", path="server, pixels", beside="in process, pixels", low=0.95),
    Target(what="classify, shared memory", path="server, shm", beside="in process, pixels", low=0.95),
    Target(what="classify_encoded", path="server, encoded", beside="in process, encoded", low=0.90),
    *(
        Target(
            what=f"{who}'s reading, {mode}",
            path=f"{who}, {mode}",
            beside=f"{who}, {mode}, counted",
            low=0.85,
            high=1.15,
        )
        for mode in ("pixels", "encoded")
        for who in ("server", _PEER)
    ),
    Target(what="bench agrees, pixels", path="server, pixels", beside="perf_analyzer, pixels", low=0.85, high=1.15),
    Target(what="bench agrees, encoded", path="server, encoded", beside="perf_analyzer, encoded", low=0.85, high=1.15),
    Target(what="client, pixels", path="client, pixels", beside="perf_analyzer, pixels", low=0.95),
    Target(what="client, encoded", path="client, encoded", beside="perf_analyzer, encoded", low=0.95),
)


@contextmanager
def served(model: str, bundles: Path, precision: Precision, images: Path | None, peer: bool) -> Iterator[Benches]:
    """A server of ``model``, and what measures it: with clipship's load, and where asked for with perf_analyzer's."""
    bundle = read_bundle(bundle_of(model, bundles / model.split("/")[0] / "bundle", None))
    files = files_from_folder(images) if images else made_up_files()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings: dict[str, Any] = {"precision": precision, "max_batch_size": LARGEST_BATCH}
        repository = repository_from_bundle(bundle, Path(folder) / "repository", backend="python", **settings)
        url = stack.enter_context(start_server(repository)).endpoints.url
        ours = stack.enter_context(closing(Bench(url, files, bundle=bundle)))
        theirs = Bench(url, files, analyzer=perf_analyzer.found()) if peer else None
        yield {"": ours, **({_PEER: stack.enter_context(closing(theirs))} if theirs else {})}


class ServerCount:
    """How many images the server says it has answered, asked several times a second while the ``with`` block runs."""

    def __init__(self, bench: Bench, model: str) -> None:
        self._bench = bench
        self._model = model
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._seen: list[tuple[float, int]] = []

    def __enter__(self) -> ServerCount:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def images_per_s(self) -> float:
        """From the second time that the count has grown to the last one: neither the start nor the end of the load."""
        grown = [after for before, after in pairwise(self._seen) if after[1] > before[1]][1:]
        if len(grown) < 2:
            return float("nan")
        (first_s, first), (last_s, last) = grown[0], grown[-1]
        return (last - first) / (last_s - first_s)

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            statistics = statistics_of(self._bench.transport)[self._model]
            self._seen.append((time.perf_counter(), statistics.inference_count))


def race(benches: Benches, given: argparse.Namespace) -> dict[str, BenchRow]:
    """Every path once a round; rows by path."""
    points = dict(_points(given.batch, given.concurrency, given.without))
    readings: dict[str, list[Reading]] = {name: [] for name in points}
    for number in range(given.rounds):
        for name, point in points.items():
            bench = benches.get(name.partition(",")[0], benches[""])
            with ServerCount(bench, model_of(point.mode)) as count:
                readings[name].append(bench.read(point, given.seconds))
            log(f"round {number + 1}, {name}: {readings[name][-1].images_per_s:.1f} images/s")
            if point.where == "server":
                readings.setdefault(f"{name}, counted", []).append(Reading(images_per_s=count.images_per_s()))
    points |= {name: points[name.removesuffix(", counted")] for name in readings}
    return {name: BenchRow(point=point, readings=tuple(readings[name])) for name, point in points.items()}


def _points(batch: int, concurrency: int, without: Sequence[str]) -> Iterator[tuple[str, Point]]:
    """The paths in the order of a round: those to be compared beside each other."""
    same: dict[str, Any] = {"batch": batch, "concurrency": concurrency}
    modes: tuple[Mode, ...] = ("pixels", "shm", "encoded")
    for mode in modes:
        paths = {"server": Point(where="server", mode=mode, **same)}
        if mode != "shm":
            paths["in process"] = Point(where="in process", mode=mode, batch=LARGEST_BATCH, concurrency=1)
            paths[_PEER] = paths["server"]
            paths["client"] = Point(where="client", mode=mode, **same)
        for path, point in paths.items():
            name = f"{path}, {mode}"
            if not any(word in name for word in without):
                yield name, point


def rates_table(rows: dict[str, BenchRow], title: str) -> Table:
    """A row a path: images a second, latencies."""
    cells = []
    for name, row in rows.items():
        latencies = [row.latency_ms(rank) for rank in _RANKS]
        texts = ["" if value is None else f"{value:.1f}" for value in latencies]
        cells.append((name, str(row.point.batch), str(row.point.concurrency), with_spread(row.rates, ".1f"), *texts))
    header = ("path", "batch", "in flight", "images/s", *(f"{rank} ms" for rank in _RANKS))
    return Table(title=title, header=header, rows=tuple(cells), text_columns=1)


def targets_table(rows: dict[str, BenchRow]) -> Table:
    """A row a target of which both paths were measured: the ratio of each round, what is wanted, whether it is met."""
    cells = []
    for target in TARGETS:
        if target.path in rows and target.beside in rows:
            pairs = zip(rows[target.path].rates, rows[target.beside].rates, strict=True)
            ratios = [rate / other for rate, other in pairs]
            met = target.low <= median(ratios) <= target.high
            wanted = f"{target.low:.2f}" + (f"-{target.high:.2f}" if target.high < float("inf") else " or more")
            names = (target.what, f"{target.path} / {target.beside}")
            cells.append((*names, with_spread(ratios), wanted, "yes" if met else "no"))
    return Table(header=("target", "ratio of", "ratio", "wanted", "met"), rows=tuple(cells))


def main() -> None:
    """Measure every model and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/serving"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--bundles", type=Path, default=Path("runs/encoder"), help="where bundles are, or are made")
    parser.add_argument("--precision", default="int8", help="the faster the encoder, the more the way to it counts")
    parser.add_argument("--images", type=Path, help="images to send [default: made-up JPEG files of 500 x 375]")
    parser.add_argument("--batch", type=int, default=8, help="images a request")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", nargs="+", default=[], help="leave out paths with one of these words, e.g. shm")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        peer = not {_PEER} & set(given.without)
        with served(model, given.bundles, given.precision, given.images, peer) as benches:
            rows, described = race(benches, given), benches[""].described()
        name = model.split("/")[0]
        made = rates_table(rows, f"{model}, {given.precision}, {machine()}")
        targets, steps = targets_table(rows), steps_table(list(rows.values()))
        found = [{"path": path, **described, **row.to_json()} for path, row in rows.items()]
        write_json_atomic(given.out / f"{name}.json", found)
        text = "\n".join(table.to_markdown() for table in (made, targets, steps))
        write_text_atomic(given.out / f"{name}.md", text)
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

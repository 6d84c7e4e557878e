"""A crowd whose deadlines pass: how soon the next request is answered, and what that costs when there is no crowd.

    python -m benchmarks.storm --out runs/storm

Every way to run the queues gets real Tritons of its own on this machine, with clipship-tiny and the python backend. In
a storm, 64 clients send for some seconds, each with a deadline of 1 second, again as soon as the last request has
ended: single photographs of 6 megapixels, or 64 images as pixels. They are bare gRPC clients, which tell the server
nothing but by leaving. Then one request of somebody who waits is timed. Without a storm, closed loops of pixels and of
files are counted, and bursts, many requests at once and nothing after them, in short turns with a second server.
Triton's trace tells of every batch how much later it started than it could have: its oldest request had come and waited
for company, and the batch before was done.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.encoder import bundle_of
from clipship.core.bundle import Bundle, read_bundle
from clipship.core.images.decoding import pixels_from_bytes
from clipship.core.progress import log
from clipship.core.tables import Table, with_spread, write_table
from clipship.serving.bench.load import measure
from clipship.serving.bench.photographs import made_up_files
from clipship.serving.bench.requests import Request, encoded_request, pixels_request
from clipship.serving.bench.steps import statistics_of
from clipship.serving.errors import ServerOverloaded, ServerUnreachable
from clipship.serving.model_names import ADMISSION, CLASSIFY, PREPROCESS
from clipship.serving.repository.config_pbtxt import config_from_text, text_from_config
from clipship.serving.repository.tuning import DEFAULT_TUNING, Tuning
from clipship.serving.repository.write import DOORS_COPY, repository_from_bundle
from clipship.serving.server.process import Server, start_server
from clipship.serving.server.server_args import DEFAULT_OPTIONS, ServerOptions
from clipship.serving.transport.grpc import TritonTransport

CLIENTS = 64
DEADLINE_S = 1.0
LATE_S = 0.1
_PHOTO_PX = (3000, 2000)
_BATCH, _IN_FLIGHT, _BURST, _CROWDED = 8, 16, 32, 64
_TURNS = 3
_PATIENT_S = 60.0
_QUIET_S = 2.0


def _policy(**settings: Any) -> Callable[[Path], None]:
    """Gives the queue of ``preprocess`` alone a policy, as it was before."""

    def change(repository: Path) -> None:
        _without_admission(repository)
        path = repository / PREPROCESS / "config.pbtxt"
        config = config_from_text(path.read_text(encoding="utf-8"))
        policy = config.dynamic_batching.default_queue_policy
        for name, value in settings.items():
            setattr(policy, name, getattr(policy, value) if isinstance(value, str) else value)
        path.write_text(text_from_config(config), encoding="utf-8")

    return change


def _without_admission(repository: Path) -> None:
    """What clipship wrote before: requests wait in the queues of the models that work on them."""
    for folder in repository.glob(f"{ADMISSION}*"):
        shutil.rmtree(folder)
    for path in repository.glob("*/config.pbtxt"):
        config = config_from_text(path.read_text(encoding="utf-8"))
        steps = config.ensemble_scheduling.step
        if steps and steps[0].model_name.startswith(ADMISSION):
            (source,) = steps[0].input_map.values()
            (name,) = steps[1].input_map
            steps[1].input_map[name] = source
            del steps[0]
            path.write_text(text_from_config(config), encoding="utf-8")
    for copy in repository.glob(f"*/1/{DOORS_COPY}"):
        copy.write_text(copy.read_text(encoding="utf-8").replace("self._look() and", "False and"), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a repository's queues are run."""

    tuning: Tuning = DEFAULT_TUNING
    change: Callable[[Path], None] = lambda repository: None
    """Of the written repository."""


BESIDE = "first come, first served"
WAYS: Mapping[str, Way] = {
    BESIDE: Way(change=_without_admission),
    "as clipship writes it": Way(),
    "time limit 1 s": Way(tuning=Tuning(queue_timeout_s=1.0), change=_without_admission),
    "time limit 1 s, preprocess": Way(change=_policy(timeout_action="REJECT", default_timeout_microseconds=1_000_000)),
    "DELAY after 1 s, preprocess": Way(change=_policy(timeout_action="DELAY", default_timeout_microseconds=1_000_000)),
}


@dataclass(kw_only=True)
class Figures:
    """What was measured of one way; a value a round where nothing else is said."""

    next_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind of storm, from its end: the answer of somebody who waits."""
    idle_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind of storm, from its end: the server has nothing more to do."""
    ratios: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind of load: images a second beside those of the first way, a value a turn."""
    late: list[float] = field(default_factory=list)
    """The share of batches that started more than 0.1 s late."""
    latest_s: list[float] = field(default_factory=list)
    """The latest start."""


class Traffic:
    """The requests of all loads."""

    def __init__(self, bundle: Bundle) -> None:
        files = made_up_files(_BATCH)
        pixels = np.stack([pixels_from_bytes(file, bundle.image_spec) for file in files])
        crowded = np.concatenate([pixels] * (_CROWDED // _BATCH))
        self.storms = {"files": encoded_request([_photo(files[0])]), "pixels": pixels_request(crowded)}
        self.steady = {"pixels": pixels_request(pixels), "files": encoded_request(files)}


def _photo(small: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(small)).resize(_PHOTO_PX).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@contextmanager
def served(way: Way, bundle: Bundle, options: ServerOptions = DEFAULT_OPTIONS) -> Iterator[TritonTransport]:
    """A Triton whose queues are run that way, and a connection to it."""
    with tempfile.TemporaryDirectory() as folder:
        repository = repository_from_bundle(bundle, Path(folder) / "repository", backend="python", tuning=way.tuning)
        way.change(repository)
        with start_server(repository, options=options) as running, closing(_transport_to(running)) as server:
            yield server


def _transport_to(running: Server) -> TritonTransport:
    return TritonTransport(running.endpoints.url)


def answer(server: TritonTransport, request: Request) -> None:
    """Send ``request`` until it is answered, as clipship's client does with what a server refuses to keep waiting."""
    ends_s = time.monotonic() + _PATIENT_S
    while True:
        try:
            request.sent(server, _PATIENT_S).result()
            return
        except (ServerOverloaded, ServerUnreachable):
            if time.monotonic() >= ends_s:
                raise
            time.sleep(0.01)


def answers_s(server: TritonTransport, request: Request, count: int = 1) -> float:
    """How long ``count`` requests take that are sent at once."""
    with ThreadPoolExecutor(count) as threads:
        began_s = time.perf_counter()
        list(threads.map(lambda _: answer(server, request), range(count)))
        return time.perf_counter() - began_s


def storm(server: TritonTransport, request: Request, seconds: float) -> None:
    """The crowd comes and goes."""
    ends_s = time.monotonic() + seconds

    def client() -> None:
        while time.monotonic() < ends_s:
            request.sent(server, DEADLINE_S).exception()

    crowd = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()


def measure_storms(way: Way, bundle: Bundle, traffic: Traffic, figures: Figures, seconds: float) -> None:
    """A storm of each kind, and what comes after it."""
    with served(way, bundle) as server:
        for kind, request in traffic.storms.items():
            answers_s(server, request)
            storm(server, request, seconds)
            began_s = time.perf_counter()
            figures.next_s[kind].append(answers_s(server, request))
            figures.idle_s[kind].append(_idle_s(server) - began_s)


def _idle_s(server: TritonTransport) -> float:
    """The moment when the last request had been answered or dropped, to half a second."""
    seen, since_s = -1, time.perf_counter()
    while True:
        ended = [each.inference_stats for name, each in statistics_of(server).items() if name.startswith(CLASSIFY)]
        if (count := sum(each.success.count + each.fail.count for each in ended)) != seen:
            seen, since_s = count, time.perf_counter()
        elif time.perf_counter() - since_s > _QUIET_S:
            return since_s
        time.sleep(0.5)


def measure_calm(way: Way, bundle: Bundle, traffic: Traffic, figures: Figures, seconds: float) -> None:
    """Rates beside those of a server that waits meanwhile, in short turns, and how late batches start."""
    with tempfile.TemporaryDirectory() as folder:
        trace, other = (Path(folder) / name for name in ("trace.json", "beside.json"))
        options = ServerOptions(trace_file=trace, trace_rate=1)
        same = replace(options, trace_file=other)  # tracing costs time
        with served(WAYS[BESIDE], bundle, same) as beside, served(way, bundle, options) as server:
            for kind, request in traffic.steady.items():
                pairs = [[_rate(each, request, seconds) for each in (beside, server)] for _ in range(_TURNS)]
                figures.ratios[kind] += [rate / beside_rate for beside_rate, rate in pairs]
            bursts = [[answers_s(each, request, _BURST) for each in (beside, server)] for _ in range(_TURNS)]
            figures.ratios["bursts of files"] += [beside_s / burst_s for beside_s, burst_s in bursts]
        starts = list(late_starts(json.loads(trace.read_text(encoding="utf-8")), way.tuning.max_queue_delay_us * 1e-6))
    figures.late.append(sum(late_s > LATE_S for late_s in starts) / len(starts))
    figures.latest_s.append(max(starts))


def _rate(server: TritonTransport, request: Request, seconds: float) -> float:
    """Images a second."""
    times = {"seconds": seconds / _TURNS, "warm_up_s": 0.2}
    return measure(partial(answer, server, request), concurrency=_IN_FLIGHT, batch=_BATCH, **times).images_per_s


def late_starts(trace: Sequence[Mapping[str, Any]], delay_s: float) -> Iterator[float]:
    """For every batch of Triton's trace: seconds from when it could have started until it did."""
    models = {entry["id"]: entry["model_name"] for entry in trace if "model_name" in entry}
    moments: dict[int, dict[str, float]] = defaultdict(dict)
    for entry in trace:
        moments[entry["id"]] |= {each["name"]: each["ns"] / 1e9 for each in entry.get("timestamps", ())}
    batches: dict[str, dict[float, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for number, each in moments.items():
        if "COMPUTE_START" in each and "QUEUE_START" in each:
            batches[models[number]][each["COMPUTE_START"]].append(each)
    for by_start in batches.values():
        for (_, before), (start_s, batch) in pairwise(sorted(by_start.items())):
            idle_s = max(each["COMPUTE_END"] for each in before)
            came_s = min(each["QUEUE_START"] for each in batch)
            yield start_s - max(idle_s, came_s + delay_s)


def table_of(figures: Mapping[str, Figures]) -> Table:
    """A row a way; rates beside those of the first."""
    beside = figures[BESIDE]
    rows = []
    for name, each in figures.items():
        storms = [with_spread(seconds) for kind in each.next_s for seconds in (each.next_s[kind], each.idle_s[kind])]
        ratios = [with_spread(values) for values in each.ratios.values()]
        late = with_spread([100 * share for share in each.late], ".1f")
        rows.append((name, *storms, *ratios, late, with_spread(each.latest_s)))
    storms = [f"{kind}: {what}, s" for kind in beside.next_s for what in ("next answer", "idle")]
    notes = (
        f"After {CLIENTS} clients with deadlines of {DEADLINE_S:g} s: when a request sent then was answered, and when"
        " all that the crowd had left behind was answered or dropped.",
        f"Without them: images a second beside those of '{BESIDE}' in turns, in closed loops of {_IN_FLIGHT} requests"
        f" of {_BATCH} images and in bursts of {_BURST}; late: batches that started over {LATE_S:g} s late.",
    )
    header = ("queues", *storms, *beside.ratios, "late, %", "latest, s")
    return Table(header=header, rows=tuple(rows), notes=notes, text_columns=1)


def main() -> int:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="clipship-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of every load")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    bundle = read_bundle(bundle_of(given.model, given.out / given.model.split("/")[0] / "bundle", None))
    traffic = Traffic(bundle)
    figures = {name: Figures() for name in dict.fromkeys((BESIDE, *given.ways))}
    for number in range(given.rounds):
        for name, each in figures.items():
            measure_storms(WAYS[name], bundle, traffic, each, given.seconds)
            measure_calm(WAYS[name], bundle, traffic, each, given.seconds)
            log(f"round {number + 1}, {name}: latest start {each.latest_s[-1]:.2f} s, {dict(each.next_s)}")
        table = table_of(figures)
        write_table(given.out, "storm", [{"queues": name, **vars(each)} for name, each in figures.items()], table)
    sys.stdout.write(table.to_markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""perf_analyzer and our load on the same server: the same images, the same units. How fast either is, is not asked."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from benchmarks import perf_analyzer
from benchmarks.serving import ServerCount

from clipship.serving.bench.perf_analyzer import FOLDER, Analyzer, analyze, installed, reading_from_csv
from clipship.serving.bench.run import Bench, Point
from clipship.serving.bench.steps import statistics_of
from clipship.serving.errors import ServingError
from clipship.serving.server.process import Server
from clipship.serving.transport.connection import Connection
from tests.serving.bundles import jpeg_bytes
from tests.serving.grpc_servers import Triton, serving

CSV = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,"
    "Avg latency\n"
    "4,1234.5,10,20,30,40,50,60,0,8000,9000,9500,12000,8500\n"
)


def test_its_csv_is_read_in_our_units() -> None:
    report = reading_from_csv(CSV)
    assert report.images_per_s == 1234.5
    assert report.latencies_ms == {"mean": 8.5, "p50": 8.0, "p90": 9.0, "p95": 9.5, "p99": 12.0}


def test_the_servers_count_is_taken_between_two_moments_of_a_running_load() -> None:
    count = ServerCount(None, "classify")  # type: ignore[arg-type]
    count._seen = [(0.0, 5), (1.0, 5), (2.0, 13), (3.0, 13), (4.0, 37), (5.0, 61), (6.0, 69), (7.0, 69)]
    assert count.images_per_s() == (69 - 37) / (6.0 - 4.0)
    count._seen = count._seen[:5]
    assert math.isnan(count.images_per_s())


@pytest.mark.triton
@pytest.mark.parametrize(("mode", "model"), [("pixels", "classify"), ("encoded", "classify_encoded")])
def test_it_takes_our_images_and_its_figures_obey_the_same_law(server: Server, mode: str, model: str) -> None:
    files = [jpeg_bytes(seed) for seed in range(4)]
    point = Point(where="server", mode=mode, batch=2, concurrency=2)  # type: ignore[arg-type]
    url = server.endpoints.url
    with closing(Bench(url, files, analyzer=perf_analyzer.found())) as theirs, closing(Bench(url, files)) as ours:
        before = statistics_of(ours.transport)[model].inference_stats
        readings = [theirs.read(point, 1.2)]
        after = statistics_of(ours.transport)[model].inference_stats
        readings.append(ours.read(point, 0.3))
    assert after.success.count > before.success.count + 1
    assert after.fail.count == before.fail.count
    assert set(readings[0].latencies_ms) == set(readings[1].latencies_ms) == {"mean", "p50", "p90", "p95", "p99"}
    for reading in readings:
        assert reading.steps is not None
        assert sum(reading.steps.shares().values()) == pytest.approx(1.0, abs=0.2)
        in_flight = reading.images_per_s / 2 * reading.latencies_ms["p50"] / 1e3
        assert (
            0.05 < in_flight < 80
        )  # two, if these are images a second and milliseconds; a thousand times off otherwise


def test_one_that_ends_without_a_report_is_told_in_one_line(tmp_path: Path) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text("#!/bin/sh\necho one >&2\necho 'failed to connect' >&2\nexit 3\n")
    program.chmod(0o755)
    numbers: dict[str, Any] = {"batch": 1, "concurrency": 1, "seconds": 0.1}
    with pytest.raises(ServingError, match=r"^a:1: perf_analyzer ended with code 3 and no report: failed to connect$"):
        analyze(Analyzer(program=program), "a:1", "classify", ("encoded", [b"x"]), **numbers)


def test_a_secret_never_gets_into_a_command_line(tmp_path: Path) -> None:
    with serving(Triton()) as url:
        analyzer = Analyzer(program=tmp_path / "none")
        for settings, used in (({}, analyzer), ({"headers": {"x-team": "birds"}}, None), ({"token": "s3cret"}, None)):
            with closing(Bench(Connection(urls=(url,), **settings), [jpeg_bytes(0)], analyzer=analyzer)) as bench:
                assert bench.analyzer is used


def test_one_on_the_path_that_does_not_start_does_not_hide_the_one_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, works = tmp_path / "path" / "perf_analyzer", tmp_path / FOLDER / "bin" / "perf_analyzer"
    for program, code in ((broken, 127), (works, 0)):
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    monkeypatch.setattr("clipship.serving.bench.perf_analyzer.cache_places", lambda: [tmp_path])
    found = installed()
    assert found is not None
    assert found.program == works
    works.unlink()
    assert installed() is None

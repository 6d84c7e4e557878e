"""perf_analyzer and our load on the same server: the same images, the same units. How fast either is, is not asked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks import perf_analyzer
from benchmarks.serving import ServerCount

from clipship.core.tensors import ENCODED
from clipship.serving.bench.run import Point, opened
from clipship.serving.server.process import Server
from tests.serving.bundles import jpeg_bytes

CSV = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
    "4,1234.5,10,20,30,40,50,60,0,8000,9000,9500,12000\n"
)


def test_its_csv_is_read_in_our_units() -> None:
    report = perf_analyzer.report_from_csv(CSV)
    assert report.images_per_s == 1234.5
    assert report.latencies_ms == {"p50": 8.0, "p90": 9.0, "p95": 9.5, "p99": 12.0}


def test_the_servers_count_is_taken_between_two_moments_of_a_running_load() -> None:
    count = ServerCount(None, "classify")  # type: ignore[arg-type]
    count._seen = [(0.0, 5), (1.0, 5), (2.0, 13), (3.0, 13), (4.0, 37), (5.0, 61), (6.0, 69), (7.0, 69)]
    assert count.images_per_s() == (69 - 37) / (6.0 - 4.0)
    count._seen = count._seen[:5]
    assert math.isnan(count.images_per_s())


@pytest.mark.triton
@pytest.mark.parametrize(("mode", "model"), [("pixels", "classify"), ("encoded", "classify_encoded")])
def test_it_takes_our_images_and_its_figures_obey_the_same_law(
    server: Server, tmp_path: Path, mode: str, model: str
) -> None:
    analyzer = perf_analyzer.found()
    files = [jpeg_bytes(seed) for seed in range(4)]
    with opened(server.endpoints.url, files) as bench:
        images = list(bench.samples.pixels) if mode == "pixels" else files
        name = "image" if mode == "pixels" else ENCODED.name
        given = perf_analyzer.write_input(tmp_path / "images.json", name, images)
        before = bench.wire.statistics()[model].inference_stats
        theirs = perf_analyzer.analyze(
            analyzer, bench.wire.url, model, given, batch=2, concurrency=2, seconds=0.4, folder=tmp_path
        )
        after = bench.wire.statistics()[model].inference_stats
        ours = bench.read(Point(where="server", mode=mode, batch=2, concurrency=2), 0.3)  # type: ignore[arg-type]
    assert after.success.count > before.success.count
    assert after.fail.count == before.fail.count
    assert set(theirs.latencies_ms) == set(ours.latencies_ms) - {"mean"}
    for reading in (theirs, ours):
        in_flight = reading.images_per_s / 2 * reading.latencies_ms["p50"] / 1e3
        assert (
            0.05 < in_flight < 80
        )  # two, if these are images a second and milliseconds; a thousand times off otherwise

"""``clipship bench serve`` against a real Triton, as a user runs it and from Python."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipship.core.bundle import Bundle
from clipship.core.cli.main import main
from clipship.core.errors import DataError, UsageError
from clipship.core.images.decoding import ImageSpec, decode_image
from clipship.core.tables import Table
from clipship.serving.bench.load import Reading, measure
from clipship.serving.bench.photographs import SIZE_PX, files_from_folder, made_up_files
from clipship.serving.bench.report import steps_table, throughput_table, write_report
from clipship.serving.bench.requests import BenchImages, encoded_request, validate_answer
from clipship.serving.bench.run import Bench, BenchPlan, BenchRow, Point
from clipship.serving.bench.steps import statistics_of
from clipship.serving.errors import ModelsMissing, RequestRejected, ServerUnreachable, ServingError
from clipship.serving.server.process import Server, start_server
from clipship.serving.server.server_args import ServerOptions
from clipship.serving.transport.connection import Connection
from clipship.serving.transport.grpc import TritonTransport
from tests.serving.bundles import SPEC, jpeg_bytes, write_bundle
from tests.serving.fake_server import answer
from tests.serving.grpc_servers import Triton, inputs_of, message_from, serving
from tests.serving.processes import clipship
from tests.serving.server.test_process import write_certificates

FILES = [jpeg_bytes(seed) for seed in range(6)]
QUICK: dict[str, Any] = {"seconds": 0.2, "rounds": 2}


@pytest.fixture(scope="module")
def bench(server: Server, bundle: Bundle) -> Iterator[Bench]:
    with closing(Bench(server.endpoints.url, FILES, bundle=bundle)) as ready:
        yield ready


@pytest.fixture(scope="module")
def rows(bench: Bench) -> list[BenchRow]:
    plan = BenchPlan(modes=("pixels", "encoded", "shm"), batches=(1, 4), concurrencies=(1, 3), **QUICK)
    return bench.run(plan)


@pytest.mark.triton
def test_every_point_is_read_once_a_round(rows: list[BenchRow]) -> None:
    points = [row.point for row in rows]
    assert len(set(points)) == len(points)
    server = [(point.mode, point.batch, point.concurrency) for point in points if point.where == "server"]
    assert server == [(mode, n, c) for mode in ("pixels", "encoded", "shm") for n in (1, 4) for c in (1, 3)]
    for where, concurrency in (("in process", 1), ("client", 3)):
        others = [(point.mode, point.batch, point.concurrency) for point in points if point.where == where]
        assert others == [(mode, n, concurrency) for mode in ("pixels", "encoded") for n in (1, 4)]
    assert all(len(row.readings) == 2 and min(row.rates) > 0 for row in rows)


@pytest.mark.triton
def test_percentiles_are_ordered(rows: list[BenchRow]) -> None:
    for row in rows:
        for reading in row.readings:
            if row.point.where == "client":
                assert reading.latencies_ms == {}
                continue
            latencies = [reading.latencies_ms[name] for name in ("p50", "p90", "p95", "p99")]
            assert latencies == sorted(latencies)
            assert latencies[0] > 0


@pytest.mark.triton
def test_each_step_of_the_ensemble_has_its_share(rows: list[BenchRow]) -> None:
    for row in rows:
        for reading in row.readings:
            if row.point.where != "server":
                assert reading.steps is None
                continue
            assert reading.steps is not None
            names = [step.model for step in reading.steps.steps]
            first = ["admission", "preprocess"] if row.point.mode == "encoded" else ["admission_pixels"]
            assert names == [*first, "image_encoder", "classifier"]
            assert all(step.compute_infer_ms > 0 for step in reading.steps.steps)
            assert all(1 <= step.images_a_run <= 8 for step in reading.steps.steps)
            assert all(0 <= share <= 1 for share in reading.steps.shares().values())


@pytest.mark.triton
def test_no_shared_memory_is_left_behind(server: Server) -> None:
    with closing(TritonTransport(server.endpoints.url)) as transport:

        def held() -> set[str]:
            return set(transport.call("SystemSharedMemoryStatus").regions)

        before, during = held(), set[str]()
        with closing(Bench(server.endpoints.url, FILES)) as bench:
            sent = bench._shared.infer

            def infer(*arguments: Any, **settings: Any) -> Any:
                during.update(held() - before)
                return sent(*arguments, **settings)

            bench._shared.infer = infer  # type: ignore[method-assign]
            bench.read(Point(where="server", mode="shm", batch=2, concurrency=2), 0.2)
            assert during, "the pixels were sent as messages"
            assert not any(Path("/dev/shm", name).exists() for name in during), "a killed bench would leave it"
        assert held() == before


def test_a_server_that_cannot_map_shared_memory_is_not_measured() -> None:
    """This one does not have the extension; one on another machine finds no such region."""
    with serving(Triton()) as url, closing(Bench(url, FILES)) as bench:
        point = Point(where="server", mode="shm", batch=2, concurrency=1)
        with pytest.raises(ServingError, match=r"cannot open this process's shared memory.*give --mode pixels"):
            bench.read(point, 0.1)


@pytest.mark.triton
def test_an_image_of_the_load_that_the_server_cannot_decode_is_told_and_not_measured(bench: Bench) -> None:
    with pytest.raises(RequestRejected, match=r"an image of the load cannot be decoded: empty file"):
        validate_answer(encoded_request([FILES[0], b""]), bench.transport, 60)
    validate_answer(encoded_request(FILES[:2]), bench.transport, 60)


def test_an_answer_with_another_number_of_rows_is_refused() -> None:
    triton = Triton()
    triton.infer = lambda request, context: message_from(
        {name: rows[:2] for name, rows in answer(request.model_name, inputs_of(request)).items()}, request
    )
    with serving(triton) as url, closing(TritonTransport(url)) as transport:
        request = encoded_request(FILES[:3])
        with pytest.raises(RequestRejected, match=r"has 2 rows for 3 images"):
            validate_answer(request, transport, 60)


@pytest.mark.triton
def test_a_server_that_goes_away_in_the_middle_ends_the_load(repository: Path) -> None:
    with start_server(repository) as server, closing(TritonTransport(server.endpoints.url)) as transport:
        request = encoded_request(FILES[:2])
        validate_answer(request, transport, 60)

        def send() -> None:
            if server.running and statistics_of(transport)["classify_encoded"].inference_count > 20:
                server.stop()
            request.sent(transport, 60).result()

        with pytest.raises(ServingError) as caught:
            measure(send, concurrency=1, batch=2, seconds=60, warm_up_s=0)
    assert "\n" not in str(caught.value)


@pytest.mark.triton
def test_the_verb_prints_tables_and_writes_json_markdown_and_a_plot(
    server: Server, bundle: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.endpoints.url
    options = ["--concurrency", "1", "2", "--batch", "2", "--mode", "pixels", "encoded", "--seconds", "0.2"]
    arguments = ["bench", "serve", "--url", url, *options, "--rounds", "2", "--images", str(photos)]
    arguments += ["--bundle", str(bundle.path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "serve.md").read_text(encoding="utf-8")
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| in process")]
    assert [line[2].strip() for line in lines] == ["pixels", "encoded"]
    assert "Where a request's time goes" in table
    assert "% run" in table
    written = json.loads((tmp_path / "out" / "serve.json").read_text(encoding="utf-8"))
    assert len(written) == 2 * (2 + 1 + 1)
    assert {row["bundle_digest"] for row in written} == {bundle.digest}
    assert {row["size_px"] for row in written} == {32}
    assert sum(written[0]["readings"][0]["steps"]["shares"].values()) == pytest.approx(1.0, abs=0.1)
    svg = ET.parse(tmp_path / "out" / "serve.svg").getroot()
    assert svg.tag.endswith("svg")


@pytest.mark.triton
def test_json_is_one_object_and_points_without_a_bundle_have_no_peer(server: Server) -> None:
    options = ("--concurrency", "1", "--batch", "1", "--seconds", "0.1", "--rounds", "1", "--no-client", "--json")
    done = clipship("bench", "serve", "--url", server.endpoints.url, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["where"] for row in result["rows"]] == ["server"]
    assert result["written"] == []
    assert set(result["rows"][0]["readings"][0]["latencies_ms"]) == {"mean", "p50", "p90", "p95", "p99"}


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--concurrency", "0"), 2, "'--concurrency': 0 is not in the range x>=1"),
        (("--batch", "4", "9"), 2, "batch 9: the server takes 1 to 8 images a request"),
        (("--seconds", "0"), 2, "'--seconds'"),
        (("--rounds", "0"), 2, "'--rounds'"),
        (("--mode", "jpeg"), 2, "'--mode': 'jpeg' is not one of"),
        (("--images", "/no/such/folder"), 2, "give --images a folder of images"),
        (("--bundle", "/no/such/bundle"), 2, "no such folder: give the bundle that is served"),
    ],
)
def test_bad_input_is_one_line(
    server: Server, options: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", server.endpoints.url, "--seconds", "0.1", *options]) == code
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


@pytest.mark.triton
def test_a_server_behind_mutual_tls_is_measured_with_the_options_of_classify(
    bundle: Bundle, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine's client and the prepared requests both have to show the certificate."""
    files = write_certificates(tmp_path)
    options = ServerOptions(tls_cert=files["server_cert"], tls_key=files["server_key"], tls_ca=files["ca"])
    quick = ["--concurrency", "1", "--batch", "2", "--mode", "pixels", "encoded", "--seconds", "0.1", "--rounds", "1"]
    trusted = ["--tls-ca", str(files["ca"])]
    known = [*trusted, "--tls-cert", str(files["client_cert"]), "--tls-key", str(files["client_key"])]
    with start_server(repository, options=options) as running:
        command = ["bench", "serve", "--url", running.endpoints.url, *quick, "--json"]
        assert main([*command, *known]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [(row["where"], row["mode"]) for row in rows] == [
            (where, mode) for mode in ("pixels", "encoded") for where in ("server", "client")
        ]
        assert all(row["images_per_s"] > 0 for row in rows)
        assert main([*command, *trusted]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_token_and_headers_go_with_every_request(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    triton = Triton()
    connection: dict[str, Any] = {"token_file": tmp_path / "token", "headers": {"x-team": "birds"}}
    with serving(triton) as url, closing(Bench(Connection(urls=(url,), **connection), FILES)) as bench:
        request = encoded_request(FILES[:1])
        measure(lambda: request.sent(bench.transport, 60).result(), concurrency=2, batch=1, seconds=0.1, warm_up_s=0)
    assert len(triton.metadata) > 3
    assert {(each["authorization"], each["x-team"]) for each in triton.metadata} == {("Bearer s3cret", "birds")}


def test_a_token_that_is_gone_ends_the_load_and_not_only_its_thread(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret")
    with closing(TritonTransport("127.0.0.1:9", Connection(urls=("127.0.0.1:9",), token_file=token))) as transport:
        token.unlink()
        request = encoded_request(FILES[:1])
        with pytest.raises(UsageError, match="the token cannot be read"):
            measure(lambda: request.sent(transport, 60).result(), concurrency=2, batch=1, seconds=60, warm_up_s=0)


def test_several_servers_are_refused() -> None:
    with pytest.raises(UsageError, match="give one server"):
        Bench("127.0.0.1:1,127.0.0.1:2", FILES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--header", "SECRET"), "--header: give 'NAME: VALUE'"),
        (("--tls-cert", __file__), "go together"),
        (("--tls-ca", "/no/such.pem"), "no such file"),
        (("--url", "a.example:1", "--token-file", __file__), "plain text"),
    ],
)
def test_options_that_lead_nowhere_are_one_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", "127.0.0.1:9", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "SECRET" not in error


def test_nobody_at_the_address_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("clipship: no Triton answers at 127.0.0.1:9")


@pytest.mark.triton
def test_a_server_without_our_models_and_another_bundle_are_refused(
    repository: Path, server: Server, tmp_path: Path
) -> None:
    other = write_bundle(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="give the bundle that is served"):
        Bench(server.endpoints.url, FILES, bundle=other)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "preprocess").symlink_to(repository / "preprocess")
    with start_server(foreign) as running, pytest.raises(ModelsMissing, match="does not serve clipship's models"):
        Bench(running.endpoints.url, FILES)
    with pytest.raises(ServerUnreachable):
        Bench(running.endpoints.url, FILES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0", "1"), "0 is not in the range x>=1"),
        (("--concurrency", "0"), "0 is not in the range x>=1"),
        (("--rounds", "0"), "0 is not in the range x>=1"),
        (("--seconds", "0"), "0.0 is not in the range x>0"),
        (("--mode", "jpeg"), "'jpeg' is not one of 'pixels', 'encoded', 'shm'"),
    ],
)
def test_numbers_out_of_range_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", "127.0.0.1:9", *options]) == 2
    assert message in capsys.readouterr().err


def test_made_up_images_are_always_the_same_photographs() -> None:
    files = made_up_files(3)
    assert files == made_up_files(3)
    assert len(set(files)) == 3
    assert {decode_image(data).size for data in files} == {SIZE_PX}
    assert all(30_000 < len(data) < 100_000 for data in files)


def test_images_of_a_folder_are_spread_evenly(photos: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in photos.rglob("*") if path.is_file())
    assert files_from_folder(photos, 3) == [paths[position].read_bytes() for position in (0, 10, 20)]
    assert len(files_from_folder(photos, 500)) == 30
    with pytest.raises(DataError, match="no images in it"):
        files_from_folder(tmp_path)


def test_requests_take_the_images_in_turn() -> None:
    samples = BenchImages(FILES[:3], SPEC)
    assert samples.batches(2) == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert samples.requests("encoded", 2)[1].inputs["encoded"].tolist() == [[FILES[2]], [FILES[0]]]
    assert samples.requests("pixels", 4)[0].inputs["image"].shape == (4, 32, 32, 3)
    assert (samples.requests("shm", 2)[2].inputs["image"] == samples.pixels[[1, 2]]).all()
    assert isinstance(samples.spec, ImageSpec)


def made_up_rows() -> list[BenchRow]:
    """Two rounds: the server has 80 and 90 percent of the engine's rate, the client 40 percent of the server's."""
    rates = {"server": (80.0, 180.0), "in process": (100.0, 200.0), "client": (32.0, 72.0)}
    latencies = {"p50": 1.0, "p90": 2.0, "p95": 3.0, "p99": 4.0}
    return [
        BenchRow(
            point=Point(where=where, mode="pixels", batch=8, concurrency=1 if where == "in process" else 4),  # type: ignore[arg-type]
            readings=tuple(
                Reading(images_per_s=rate, latencies_ms={} if where == "client" else latencies, steps=None)
                for rate in of_rounds
            ),
        )
        for where, of_rounds in rates.items()
    ]


def test_shares_are_of_the_same_round() -> None:
    table = throughput_table(made_up_rows(), "title")
    by_where = {row[0]: row for row in table.rows}
    assert by_where["server"][4] == "130.0 (80.0-180.0)"
    assert by_where["server"][-2:] == ("0.85 (0.80-0.90)", "")
    assert by_where["client"][-2:] == ("0.34 (0.32-0.36)", "0.40 (0.40-0.40)")
    assert by_where["in process"][-2:] == ("", "")
    assert by_where["client"][5:9] == ("", "", "", "")


def test_without_matplotlib_everything_but_the_plot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = made_up_rows()[1:]
    tables = (throughput_table(rows, ""), Table(header=("a",), rows=()))
    written = write_report(tmp_path / "new", rows, tables, {"url": "u"})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["serve.json", "serve.md"]
    assert [path.name for path in written] == ["serve.json", "serve.md"]
    assert np.isclose(json.loads(written[0].read_text())[0]["images_per_s"], 150.0)
    assert steps_table(made_up_rows()).rows == ()  # nobody has seen their steps

"""The verb ``bench``."""

from __future__ import annotations

import platform
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click

from clipship.core.cli.main import VerbGroup, emit, existing_folder, json_option
from clipship.core.cli.multi_value_option import MultiValueCommand
from clipship.serving.connection_cli import connection_from_options, connection_options

_PATH = click.Path(path_type=Path)


@click.group(cls=VerbGroup)
def bench() -> None:
    """Throughput and latency of a server, compared with the same engine in process. Every command takes --json.

    Example: clipship bench serve --url 127.0.0.1:8001 --bundle bundles/prints --out bench
    """


_option = partial(click.option, show_default=True)
_at_least_one = click.IntRange(min=1)
_modes = click.Choice(["pixels", "encoded", "shm"])


@bench.command(cls=MultiValueCommand)
@_option("--url", required=True, metavar="HOST:PORT", help="Triton's gRPC endpoint.")
@connection_options
@_option("--bundle", type=_PATH, help="The served bundle; its engine is also measured in this process.")
@_option(
    "--concurrency",
    multiple=True,
    type=_at_least_one,
    default=(1, 2, 4, 8, 16),
    show_default="1 2 4 8 16",
    metavar="INT...",
    help="Requests in flight (closed loop).",
)
@_option("--batch", multiple=True, type=_at_least_one, metavar="INT...", help="Images per request. [default: 1 8 32]")
@_option(
    "--mode",
    multiple=True,
    type=_modes,
    default=("pixels",),
    show_default="pixels",
    metavar="[pixels|encoded|shm]...",
    help="Payload: uint8 pixels, encoded files, or pixels in shared memory.",
)
@_option("--images", type=_PATH, help="Folder of images to send. [default: synthetic JPEG files of 500 x 375]")
@_option("--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, help="Duration of a measurement.")
@_option("--rounds", type=_at_least_one, default=3, help="Measurements of every combination.")
@_option("--client/--no-client", default=True, help="Also measure clipship's own client.")
@_option("--out", type=_PATH, help="Output folder for serve.json, serve.md and serve.svg.")
@json_option
def serve(
    url: str,
    bundle: Path | None,
    concurrency: tuple[int, ...],
    batch: tuple[int, ...],
    mode: tuple[Any, ...],
    images: Path | None,
    seconds: float,
    rounds: int,
    client: bool,
    out: Path | None,
    as_json: bool,
    **connection: Any,
) -> None:
    """Measure a running server: images per second, latencies, and where the time goes.

    perf_analyzer generates the load if it is installed and the server needs neither TLS nor a token.

    Example: clipship bench serve --url 127.0.0.1:8001 --concurrency 1 4 16 --batch 1 8 --mode pixels encoded
    """
    from clipship.core.bundle import read_bundle
    from clipship.core.progress import log
    from clipship.serving.bench.perf_analyzer import installed
    from clipship.serving.bench.photographs import files_from_folder, made_up_files
    from clipship.serving.bench.report import steps_table, throughput_table, write_report
    from clipship.serving.bench.run import Bench, BenchPlan

    read = read_bundle(existing_folder(bundle, "the bundle that is served")) if bundle else None
    files = files_from_folder(images) if images else made_up_files()
    server = connection_from_options((url,), **connection)
    with closing(Bench(server, files, bundle=read, analyzer=installed())) as ready:
        largest = ready.metadata.max_batch_size
        sizes = batch or tuple(size for size in (1, 8, 32) if size <= largest)
        numbers: dict[str, Any] = {"batches": sizes, "concurrencies": concurrency, "rounds": rounds}
        rows = ready.run(BenchPlan(modes=mode, seconds=seconds, client=client, **numbers))
        about = {"url": url, "machine": platform.machine(), **ready.described()}
    tables = (throughput_table(rows, f"{url}, load by {about['load']}, {about['cores']} cores here"), steps_table(rows))
    written = write_report(out, rows, tables, about) if out else []
    if out and len(written) < 3:
        log("no plot: matplotlib is not installed (pip install matplotlib)")
    result = {**about, "rows": [row.to_json() for row in rows], "written": [str(path) for path in written]}
    emit(result, "\n".join(table.to_markdown() for table in tables).rstrip(), as_json=as_json)

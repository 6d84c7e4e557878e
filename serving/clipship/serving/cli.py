"""The verbs ``repository``, ``serve`` and ``classify``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipship.core.cli import emit, existing_folder, json_option
from clipship.core.errors import CheckFailed
from clipship.core.progress import log

if TYPE_CHECKING:
    from clipship.serving.client import ModelFacts
    from clipship.serving.results import Sink


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The repository's folder, replaced as a whole."
)
@click.option(
    "--backend",
    type=click.Choice(["python", "onnxruntime", "tensorrt"]),
    default="python",
    show_default=True,
    help="Who runs the image encoder: Triton's Python backend (the embedded server has it), ONNX Runtime, or TensorRT.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the image encoder, one that the bundle was packed with; plans have their own.",
)
@click.option(
    "--plan",
    "plans",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A plan that clipship engine built, with --backend tensorrt; one for each kind of GPU.",
)
@click.option("--tensorrt-version", help="The server's TensorRT, e.g. 10.14.1. [default: that of the plans]")
@click.option("--max-batch-size", type=int, help="Images a request, at most. [default: 64, or what the plans take]")
@click.option("--top-k", default=5, show_default=True, help="Classes reported an image.")
@json_option
def repository(
    bundle: Path,
    out: Path,
    backend: Literal["python", "onnxruntime", "tensorrt"],
    precision: Literal["fp32", "fp16", "bf16", "int8"],
    plans: tuple[Path, ...],
    tensorrt_version: str | None,
    max_batch_size: int | None,
    top_k: int,
    as_json: bool,
) -> None:
    """Write the Triton model repository of a verified BUNDLE.

    Example: clipship repository runs/prints/bundle --out runs/prints/repository
    """
    from clipship.core.bundle import read_bundle
    from clipship.core.plan import read_plan
    from clipship.serving.check import model_names
    from clipship.serving.repository import repository_from_bundle

    opened = read_bundle(existing_folder(bundle, "a bundle that clipship pack wrote"))
    read = [read_plan(path) for path in plans]
    most = min([64, *(plan.info.profile.most for plan in read)]) if max_batch_size is None else max_batch_size
    settings: dict[str, Any] = {"backend": backend, "precision": precision, "max_batch_size": most, "top_k": top_k}
    repository_from_bundle(opened, out, plans=read, tensorrt_version=tensorrt_version, **settings)
    models = model_names(out)
    result = {"repository": str(out), "backend": backend, "models": models, "bundle_digest": opened.digest}
    emit(result, f"{out}: {len(models)} models for Triton's {backend} backend", as_json=as_json)


@click.command()
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--grpc-port", default=8001, show_default=True, help="Port of gRPC; 0 takes a free one.")
@click.option("--http-port", default=8000, show_default=True, help="Port of HTTP; 0 takes a free one.")
@click.option("--metrics-port", default=8002, show_default=True, help="Port of the metrics; 0 takes a free one.")
@click.option("--log-file", type=click.Path(path_type=Path), help="Where Triton logs to (default: a temporary file).")
@click.option("--timeout-s", default=300.0, show_default=True, help="How long loading may take.")
@click.option("--container", is_flag=True, help="Only print the command for NVIDIA's container.")
@json_option
def serve(
    repository: Path,
    host: str,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    log_file: Path | None,
    timeout_s: float,
    container: bool,
    as_json: bool,
) -> None:
    """Run a real Triton on a model REPOSITORY until Ctrl-C.

    Example: clipship serve runs/prints/repository
    """
    from clipship.serving.check import refuse_bad_repository
    from clipship.serving.environment import container_command
    from clipship.serving.server import signals_as_interrupt, start_server

    folder = existing_folder(repository, "a repository that clipship repository wrote")
    ports: dict[str, Any] = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    if container:
        refuse_bad_repository(folder)
        command = container_command(folder, **ports)
        emit({"command": command}, command, as_json=as_json)
        return
    with (
        signals_as_interrupt(),
        start_server(folder, host=host, log_file=log_file, timeout_s=timeout_s, **ports) as server,
    ):
        endpoints = asdict(server.endpoints)
        listening = "  ".join(f"{name.removesuffix('_port')} {host}:{endpoints[name]}" for name in ports)
        emit(endpoints, f"ready: {listening}", as_json=as_json)
        try:
            server.wait()
        except KeyboardInterrupt:
            log("stopping")
            return
        raise server.failure()


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--url", default="127.0.0.1:8001", show_default=True, help="Triton's gRPC endpoint, HOST:PORT.")
@click.option("--out", type=click.Path(path_type=Path), help="A .parquet, .jsonl or .csv file (default: stdout).")
@click.option(
    "--decode",
    type=click.Choice(["client", "server"]),
    default="client",
    show_default=True,
    help="Who decodes and resizes. The results are the same.",
)
@click.option("--batch-size", type=int, help="Images a request (default: what the server takes).")
@click.option("--window", default=4, show_default=True, help="Requests in flight at the same time.")
@click.option("--workers", type=int, help="Threads that read and decode (default: one a processor).")
@click.option("--timeout-s", default=60.0, show_default=True, help="How long one attempt of a request may take.")
@json_option
def classify(
    images: tuple[str, ...],
    url: str,
    out: Path | None,
    decode: Literal["client", "server"],
    batch_size: int | None,
    window: int,
    workers: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Classify IMAGES (files, folders, globs) on a running Triton.

    An image that cannot be read becomes a row with an error and makes the exit code 1; all others are classified.
    Without --out, --json prints one object an image; with it, the summary.

    Example: clipship classify photos/ --out results.parquet
    """
    from clipship.serving.client import Classifier
    from clipship.serving.job import classify_files, image_paths

    paths = image_paths(images)
    settings: dict[str, Any] = {"decode": decode, "batch_size": batch_size, "window": window, "workers": workers}
    with (
        Classifier(url, timeout_s=timeout_s, **settings) as classifier,
        _sink(out, classifier.facts, as_json=as_json) as sink,
    ):
        summary = classify_files(classifier, paths, sink)
    if out is not None:
        emit({**summary.to_json(), "out": str(out)}, f"{out}: {summary}", as_json=as_json)
    else:
        log(str(summary))
    if summary.errors:
        raise CheckFailed(f"{summary.errors} of {summary.images} images could not be classified: see their errors")


@contextmanager
def _sink(out: Path | None, facts: ModelFacts, *, as_json: bool) -> Iterator[Sink]:
    """The file ``out``, or stdout."""
    from clipship.serving.results import JsonLinesSink, TableSink, results_file

    if out is None:
        yield JsonLinesSink(sys.stdout) if as_json else TableSink(sys.stdout)
        sys.stdout.flush()
        return
    with results_file(out, facts) as sink:
        yield sink

"""The verbs ``repository`` and ``serve``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from clipship.core.cli.main import emit, existing_folder, json_option, option_group
from clipship.core.errors import UsageError
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.progress import log
from clipship.serving.repository.backends import ACCELERATORS, BACKENDS, PYTHON

_FILE = click.Path(path_type=Path)


_option = partial(click.option, show_default=True)
_sizes: dict[str, Any] = {"type": int, "multiple": True}
_precisions = click.Choice(list(PRECISIONS))

_tuning_options = option_group(
    _option("--instances", default=1, help="Model instances of the image encoder, on each GPU."),
    _option("--decoders", default=1, help="Model instances of preprocess."),
    _option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", help="Device of the image encoder."),
    _option("--gpu", "gpus", type=int, multiple=True, help="GPU number; repeat for several GPUs."),
    _option("--threads", type=int, help="Intra-op threads of the encoder on the CPU. [default: one per core]"),
    _option("--max-queue-delay-us", default=1000, help="Maximum batching delay in microseconds."),
    _option("--max-queue-size", default=0, help="Maximum number of queued requests; 0: no limit."),
    _option("--queue-timeout-s", default=0.0, help="Maximum queueing time in seconds; 0: no limit."),
    _option("--preferred-batch-size", "preferred_batch_sizes", **_sizes, help="Preferred batch size; repeatable."),
    _option("--warmup-batch-size", "warmup_batch_sizes", **_sizes, help="Repeatable. [default: 1 and the maximum]"),
    _option("--cuda-graphs", is_flag=True, help="With --backend tensorrt: capture CUDA graphs."),
    _option("--accelerator", type=click.Choice(ACCELERATORS), help="Execution accelerator of --backend onnxruntime."),
    _option("--response-cache", is_flag=True, help="Cache responses of the image encoder and of preprocess."),
)


@click.command()
@click.argument("bundle", type=_FILE)
@_option("--out", required=True, type=_FILE, help="Output folder; an existing repository is replaced atomically.")
@_option(
    "--vocabulary",
    "vocabularies",
    multiple=True,
    metavar="NAME=BUNDLE",
    help="Another bundle with the same encoder; its vocabulary is served too, as NAME.",
)
@_option("--backend", type=click.Choice(list(BACKENDS)), default=PYTHON.name, help="Triton backend of the encoder.")
@_option("--precision", type=_precisions, default="fp32", help="Precision of the encoder; plans have their own.")
@_option("--plan", "plans", type=_FILE, multiple=True, help="With --backend tensorrt: a plan, one per kind of GPU.")
@_option("--tensorrt-version", help="TensorRT version of the server, e.g. 10.14.1. [default: that of the plans]")
@_option("--max-batch-size", type=int, help="Maximum batch size. [default: 64, or that of the plans]")
@_option("--top-k", default=5, help="Number of classes returned per image.")
@_tuning_options
@json_option
def repository(
    bundle: Path,
    out: Path,
    vocabularies: tuple[str, ...],
    backend: str,
    precision: Precision,
    plans: tuple[Path, ...],
    tensorrt_version: str | None,
    max_batch_size: int | None,
    top_k: int,
    warmup_batch_sizes: tuple[int, ...],
    as_json: bool,
    **tuning: Any,
) -> None:
    """Write the Triton model repository of a verified BUNDLE.

    Example: clipship repository bundles/prints --out triton
    """
    from clipship.core.bundle import read_bundle
    from clipship.core.tensorrt_plan import read_plan
    from clipship.serving.repository.requirements import model_names
    from clipship.serving.repository.tuning import Tuning
    from clipship.serving.repository.write import repository_from_bundle

    opened = read_bundle(existing_folder(bundle, "a bundle that clipship pack wrote"))
    others = {name: read_bundle(path) for name, path in map(named_bundle, vocabularies)}
    if len(others) < len(vocabularies):
        raise UsageError("two vocabularies have the same name: give each --vocabulary a name of its own")
    read = [read_plan(path) for path in plans]
    most = min([64, *(plan.info.profile.max for plan in read)]) if max_batch_size is None else max_batch_size
    settings: dict[str, Any] = {"backend": backend, "precision": precision, "max_batch_size": most, "top_k": top_k}
    settings["tuning"] = Tuning(**tuning, warmup_batch_sizes=warmup_batch_sizes or None)
    repository_from_bundle(opened, out, plans=read, tensorrt_version=tensorrt_version, others=others, **settings)
    models = model_names(out)
    result = {"repository": str(out), "backend": backend, "models": models, "bundle_digest": opened.digest}
    emit(result, f"{out}: {len(models)} models for Triton's {backend} backend", as_json=as_json)


def named_bundle(given: str) -> tuple[str, Path]:
    """Name and folder of a ``--vocabulary NAME=BUNDLE``.

    Raises:
        UsageError: it is not of that form, or there is no such folder.
    """
    name, equals, path = given.partition("=")
    if not equals or not name or not path:
        raise UsageError(f"--vocabulary {given!r}: give NAME=BUNDLE")
    return name, existing_folder(path, "a bundle that clipship pack or clipship vocab add wrote")


_server_options = option_group(
    _option("--open-admin", is_flag=True, help="Leave the admin protocols (load, trace, log) unrestricted."),
    _option("--admin-secret", type=_FILE, help="File for the new admin secret. [default: in the cache folder]"),
    _option("--tls-cert", type=_FILE, help="Server certificate (PEM); enables TLS for gRPC."),
    _option("--tls-key", type=_FILE, help="Private key of the server certificate (PEM)."),
    _option("--tls-ca", type=_FILE, help="CA of client certificates (PEM); enables mutual TLS."),
    _option("--trace-file", type=_FILE, help="Write timestamps of traced requests to this file at exit."),
    _option("--trace-url", help="Send traces to this OpenTelemetry collector (OTLP over HTTP)."),
    _option("--trace-rate", default=1000, help="Trace one request in this many."),
    _option("--cache-mb", default=256, help="Size of the response cache in MiB, if it is used."),
    _option("--pinned-memory-mb", default=256, help="Pinned memory pool in MiB."),
    _option("--cuda-memory-mb", default=64, help="CUDA memory pool per GPU in MiB."),
)


@click.command()
@click.argument("repository", type=_FILE)
@_option("--host", default="127.0.0.1", help="Address to listen on.")
@_option("--grpc-port", default=8001, help="gRPC port; 0 picks a free one.")
@_option("--http-port", default=8000, help="HTTP port; 0 picks a free one.")
@_option("--metrics-port", default=8002, help="Metrics port; 0 picks a free one.")
@_option("--log-file", type=_FILE, help="Triton's log. [default: a temporary file]")
@_option("--timeout-s", default=300.0, help="Maximum time to load the models.")
@_server_options
@_option("--container", is_flag=True, help="Print the command for NVIDIA's container instead.")
@_option("--compose", type=_FILE, help="With --container: write a Docker Compose file.")
@_option("--image", help="Container image. [default: a suitable NVIDIA release]")
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
    compose: Path | None,
    image: str | None,
    as_json: bool,
    **server: Any,
) -> None:
    """Serve a model REPOSITORY with Triton until Ctrl-C.

    Example: clipship serve triton
    """
    from clipship.serving.server.server_args import ServerOptions

    folder = existing_folder(repository, "a repository that clipship repository wrote")
    options = ServerOptions(**server)
    ports: dict[str, int] = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    if container:
        _print_container(folder, ports, compose, image, options.cache_mb, as_json=as_json)
        return
    if compose is not None or image is not None:
        raise UsageError("--compose and --image need --container")
    _serve(folder, host, ports, as_json=as_json, log_file=log_file, timeout_s=timeout_s, options=options)


def _serve(folder: Path, host: str, ports: dict[str, Any], *, as_json: bool, **settings: Any) -> None:
    from clipship.serving.server.process import signals_as_interrupt, start_server
    from clipship.serving.transport.connection import is_loopback

    options = settings["options"]
    if not is_loopback(f"{host}:0") and not options.secure:
        log(f"{host} is reachable from other machines without encryption: give --tls-cert and --tls-key")
    with signals_as_interrupt(), start_server(folder, host=host, **ports, **settings) as server:
        endpoints = asdict(server.endpoints)
        listening = "  ".join(f"{name.removesuffix('_port')} {host}:{endpoints[name]}" for name in ports)
        secret = str(server.secret_file) if server.secret_file else None
        try:  # readers of this line may stop the server at once
            emit({**endpoints, "admin_secret": secret}, f"ready: {listening}", as_json=as_json)
            server.wait()
        except KeyboardInterrupt:
            log("stopping")
            return
        raise server.failure()


def _print_container(
    folder: Path, given: dict[str, int], compose: Path | None, image: str | None, cache_mb: int, *, as_json: bool
) -> None:
    """The command on stdout, or the compose file on disk."""
    from clipship.core.files import write_text_atomic
    from clipship.serving.repository.validate import validate_repository
    from clipship.serving.server.container import Ports, compose_file, container_command, gpu_remark

    validate_repository(folder)
    ports = Ports(**{name.removesuffix("_port"): port for name, port in given.items()})
    if compose is None:
        command = container_command(folder, ports, image=image, cache_mb=cache_mb)
        if remark := gpu_remark(folder):
            log(remark)
        emit({"command": command}, command, as_json=as_json)
        return
    write_text_atomic(compose, compose_file(folder, ports, image=image, cache_mb=cache_mb))
    emit({"compose": str(compose)}, f"{compose}: start it with docker compose -f {compose} up", as_json=as_json)

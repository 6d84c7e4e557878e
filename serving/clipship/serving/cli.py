"""The verbs ``repository`` and ``serve``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from clipship.core.cli.main import emit, existing_folder, json_option, option_group
from clipship.core.errors import UsageError
from clipship.core.progress import log
from clipship.serving.repository.backends import BACKENDS, PYTHON

_FILE = click.Path(path_type=Path)


_tuning_options = option_group(
    click.option("--instances", default=1, show_default=True, help="Copies of the image encoder, on each GPU."),
    click.option("--decoders", default=1, show_default=True, help="Copies of preprocess."),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "gpu"]),
        default="auto",
        show_default=True,
        help="Of the image encoder; auto: a GPU where there is one and the backend can use it.",
    ),
    click.option("--gpu", "gpus", type=int, multiple=True, help="A GPU's number; several times for several."),
    click.option("--threads", type=int, help="Cores that share the encoder's products on the CPU. [default: all]"),
    click.option("--max-queue-delay-us", default=1000, show_default=True, help="How long a request waits for company."),
    click.option("--max-queue-size", default=0, show_default=True, help="Requests waiting, at most; 0: no limit."),
    click.option("--queue-timeout-s", default=0.0, show_default=True, help="How long a request may wait; 0: no limit."),
    click.option(
        "--preferred-batch-size", "preferred_batch_sizes", type=int, multiple=True, help="A batch sent on at once."
    ),
    click.option(
        "--warmup-batch-size",
        "warmup_batch_sizes",
        type=int,
        multiple=True,
        help="A batch that runs while the model loads. [default: one image, and the largest batch]",
    ),
    click.option("--cuda-graphs", is_flag=True, help="With --backend tensorrt: launch small batches as one graph."),
    click.option(
        "--accelerator",
        type=click.Choice(["tensorrt"]),
        help="With --backend onnxruntime: build TensorRT engines from the ONNX file, on the server's own GPU.",
    ),
    click.option("--response-cache", is_flag=True, help="Answer pixels and files that came before from memory."),
)


@click.command()
@click.argument("bundle", type=_FILE)
@click.option("--out", required=True, type=_FILE, help="The repository's folder, replaced as a whole.")
@click.option(
    "--vocabulary",
    "vocabularies",
    multiple=True,
    metavar="NAME=BUNDLE",
    help="A further bundle with the same encoder; its vocabulary is served beside the first, under NAME.",
)
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default=PYTHON.name,
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
    type=_FILE,
    multiple=True,
    help="A plan that clipship engine built, with --backend tensorrt; one for each kind of GPU.",
)
@click.option("--tensorrt-version", help="The server's TensorRT, e.g. 10.14.1. [default: that of the plans]")
@click.option("--max-batch-size", type=int, help="Images a request, at most. [default: 64, or what the plans take]")
@click.option("--top-k", default=5, show_default=True, help="Classes reported an image.")
@_tuning_options
@json_option
def repository(
    bundle: Path,
    out: Path,
    vocabularies: tuple[str, ...],
    backend: str,
    precision: Literal["fp32", "fp16", "bf16", "int8"],
    plans: tuple[Path, ...],
    tensorrt_version: str | None,
    max_batch_size: int | None,
    top_k: int,
    warmup_batch_sizes: tuple[int, ...],
    as_json: bool,
    **tuning: Any,
) -> None:
    """Write the Triton model repository of a verified BUNDLE.

    Example: clipship repository runs/prints/bundle --out runs/prints/repository
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
    most = min([64, *(plan.info.profile.most for plan in read)]) if max_batch_size is None else max_batch_size
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
    click.option("--open-admin", is_flag=True, help="Let everybody load models and change tracing and logging."),
    click.option("--admin-secret", type=_FILE, help="Where the admin protocols' new secret goes. [default: the cache]"),
    click.option("--tls-cert", type=_FILE, help="The server's certificate (PEM): encrypts gRPC."),
    click.option("--tls-key", type=_FILE, help="Its private key (PEM)."),
    click.option("--tls-ca", type=_FILE, help="Answer only clients with a certificate of these authorities (mTLS)."),
    click.option("--trace-file", type=_FILE, help="Timestamps of traced requests, written when the server ends."),
    click.option("--trace-url", help="An OpenTelemetry collector (OTLP over HTTP) that gets the traces instead."),
    click.option("--trace-rate", default=1000, show_default=True, help="One request in so many is traced."),
    click.option("--cache-mb", default=256, show_default=True, help="The response cache, where it is used."),
    click.option("--pinned-memory-mb", default=256, show_default=True, help="Page-locked memory for copies to GPUs."),
    click.option("--cuda-memory-mb", default=64, show_default=True, help="GPU memory for tensors between models."),
)


@click.command()
@click.argument("repository", type=_FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--grpc-port", default=8001, show_default=True, help="Port of gRPC; 0 takes a free one.")
@click.option("--http-port", default=8000, show_default=True, help="Port of HTTP; 0 takes a free one.")
@click.option("--metrics-port", default=8002, show_default=True, help="Port of the metrics; 0 takes a free one.")
@click.option("--log-file", type=_FILE, help="Where Triton logs to (default: a temporary file).")
@click.option("--timeout-s", default=300.0, show_default=True, help="How long loading may take.")
@_server_options
@click.option("--container", is_flag=True, help="Only print the command for NVIDIA's container.")
@click.option("--compose", type=_FILE, help="With --container: write a compose file instead.")
@click.option("--image", help="The container's image. [default: a release of NVIDIA's that can serve it]")
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
    """Run a real Triton on a model REPOSITORY until Ctrl-C.

    Example: clipship serve runs/prints/repository
    """
    from clipship.serving.server.server_args import ServerOptions

    folder = existing_folder(repository, "a repository that clipship repository wrote")
    options = ServerOptions(**server)
    ports: dict[str, int] = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    if container:
        _print_container(folder, ports, compose, image, options.cache_mb, as_json=as_json)
        return
    if compose is not None or image is not None:
        raise UsageError("--compose and --image are of a container: give --container, too")
    _serve(folder, host, ports, as_json=as_json, log_file=log_file, timeout_s=timeout_s, options=options)


def _serve(folder: Path, host: str, ports: dict[str, Any], *, as_json: bool, **settings: Any) -> None:
    from clipship.serving.server.process import signals_as_interrupt, start_server
    from clipship.serving.transport.connection import is_loopback

    options = settings["options"]
    if not is_loopback(f"{host}:0") and not options.secure:
        log(f"{host} can be reached from other machines, in plain text: give --tls-cert and --tls-key to encrypt gRPC")
    with signals_as_interrupt(), start_server(folder, host=host, **ports, **settings) as server:
        endpoints = asdict(server.endpoints)
        listening = "  ".join(f"{name.removesuffix('_port')} {host}:{endpoints[name]}" for name in ports)
        secret = str(server.secret_file) if server.secret_file else None
        try:  # whoever reads that it is ready may stop it at once
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

"""The verb ``classify``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipship.core.cli.main import emit, json_option, option_group
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.progress import log
from clipship.serving.connection_cli import connection_from_options, connection_options

if TYPE_CHECKING:
    from clipship.serving.client.classifier import Classifier
    from clipship.serving.client.in_process import LocalTransport
    from clipship.serving.client.settings import Retry
    from clipship.serving.jobs.run import JobOutput, JobSummary

_PATH = click.Path(path_type=Path)
_option = partial(click.option, show_default=True)
_OUTPUT_NAMES = ("out", "shard_format", "shard_size", "restart", "embeddings", "top_k")
_CLIENT_NAMES = ("decode", "resample", "timeout_s", "window", "batch_size", "workers")

_server_options = option_group(
    _option(
        "--url",
        "urls",
        multiple=True,
        help="Triton's gRPC endpoint, HOST:PORT; may be repeated. [default: 127.0.0.1:8001]",
    ),
    _option("--bundle", type=_PATH, help="Classify with this bundle in this process, without a server."),
    _option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="With --bundle: the image encoder's precision, one that the bundle was packed with. [default: fp32]",
    ),
    _option(
        "--vocabulary",
        metavar="NAME[=BUNDLE]",
        help="Another vocabulary: its name on the server; with --bundle, its name and its bundle.",
    ),
    connection_options,
    _option("--compression", type=click.Choice(["none", "gzip", "deflate"]), default="none"),
    _option("--shared-memory", is_flag=True, help="Hand pixels to a server on this machine in shared memory."),
    _option(
        "--decode",
        type=click.Choice(["auto", "client", "server"]),
        default="auto",
        help="Where to decode and resize; auto takes the cheaper. The results are the same.",
    ),
    _option(
        "--resample",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        help="How to resize images decoded here: equal to open_clip, or faster and at most 2 of 255 off.",
    ),
    _option("--batch-size", type=int, help="Images a request. [default: the server's maximum]"),
    _option("--window", default=4, help="Requests in flight."),
    _option("--workers", type=int, help="Threads that read and decode. [default: one a processor]"),
    _option("--timeout-s", default=60.0, help="Time limit of one attempt of a request."),
    _option("--retry-s", default=120.0, help="How long to retry a request while no server answers."),
)

_output_options = option_group(
    _option("--out", type=_PATH, help="A .parquet, .jsonl or .csv file, or a folder of shards. [default: stdout]"),
    _option(
        "--format",
        "shard_format",
        type=click.Choice(["parquet", "jsonl", "csv"]),
        help="Format of the shards. [default: parquet]",
    ),
    _option("--shard-size", type=int, help="Rows a shard. [default: 50000]"),
    _option("--restart", is_flag=True, help="Delete the shards of an earlier run instead of resuming."),
    _option("--embeddings", is_flag=True, help="Store the images' features too."),
    _option("--top-k", type=int, help="Classes a row. [default: as many as the server reports]"),
)


@click.command()
@click.argument("images", nargs=-1)
@_option("--list", "lists", multiple=True, help="A file with one path a line, or NUL between them; - is stdin.")
@_option("--image-column", help="The column of images in Parquet files. [default: the one of bytes]")
@_option("--watch", is_flag=True, help="Classify images that arrive in the folders IMAGES, until Ctrl-C.")
@_option("--settle-s", default=2.0, help="With --watch: how long a file must stay unchanged.")
@_output_options
@_server_options
@json_option
def classify(
    images: tuple[str, ...],
    lists: tuple[str, ...],
    image_column: str | None,
    watch: bool,
    settle_s: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Classify IMAGES, with a running Triton or with a bundle in this process.

    IMAGES are files, folders, globs, tar archives (webdataset shards, also as name-{000..099}.tar), Parquet files with
    a column of image bytes, and @LIST files. An image that cannot be read becomes a row with an error and makes the
    exit code 1; all others are classified. Without --out, --json prints one object an image; with it, the summary.

    With a folder as --out, a stopped job resumes when the same command is given again.

    Examples:

    \b
      clipship classify photos/ --out results.parquet
      clipship classify 'shards/*.tar' --out results --format parquet --shard-size 50000
    """
    from clipship.serving.client.settings import Retry
    from clipship.serving.jobs.inputs import inputs_from_arguments, text_of_path
    from clipship.serving.jobs.run import JobOutput, run_job, validate_watch, watch_job
    from clipship.serving.jobs.watch import stopped_by_signals
    from clipship.serving.server.process import signals_as_interrupt

    output = JobOutput(as_json=as_json, **{name: options.pop(name) for name in _OUTPUT_NAMES})
    if watch and lists:
        raise UsageError("--watch: give folders, and no --list")
    if watch:
        validate_watch(images, output, settle_s)
    inputs = None if watch else inputs_from_arguments(images, lists=lists, image_column=image_column)
    retry = Retry(deadline_s=options.pop("retry_s"))
    told: dict[str, Any] = {
        "inputs": list(map(text_of_path, images)),
        "lists": list(map(text_of_path, lists)),
        "image_column": image_column,
        "vocabulary": _vocabulary_name(options["vocabulary"]),
        **{name: options[name] for name in ("precision", "resample")},
    }
    with signals_as_interrupt(), _classifier(output, retry=retry, **options) as classifier:
        if inputs is not None:
            summary = run_job(inputs, classifier, output, settings=told, retry=retry)
        else:
            with stopped_by_signals() as stop:
                summary = watch_job(
                    images, classifier, output, stop=stop, settle_s=settle_s, settings=told, retry=retry
                )
    _report(summary, output)


@contextmanager
def _classifier(
    output: JobOutput,
    *,
    urls: tuple[str, ...],
    bundle: Path | None,
    precision: Precision | None,
    vocabulary: str | None,
    retry: Retry,
    **options: Any,
) -> Iterator[Classifier]:
    """A client of the servers at ``urls``, or of ``bundle`` in this process."""
    from clipship.serving.client.classifier import Classifier

    client = {name: options.pop(name) for name in _CLIENT_NAMES}
    if bundle is not None and (urls or any(value not in (None, (), False, "none") for value in options.values())):
        raise UsageError("--bundle runs in this process: give no --url, --tls or other option of a connection with it")
    if bundle is None and precision is not None:
        raise UsageError(
            f"--precision {precision}: a server's repository sets it: give it to clipship repository, or give --bundle"
        )
    server = (
        connection_from_options(urls or ("127.0.0.1:8001",), **options)
        if bundle is None
        else _local(bundle, precision=precision, vocabulary=vocabulary, top_k=output.top_k)
    )
    with Classifier(
        server,
        embeddings=output.embeddings,
        vocabulary=vocabulary if bundle is None else _vocabulary_name(vocabulary),
        retry=retry,
        **client,
    ) as classifier:
        yield classifier


def _vocabulary_name(given: str | None) -> str | None:
    """NAME of NAME[=BUNDLE]."""
    return given.partition("=")[0] if given else None


def _local(bundle: Path, *, vocabulary: str | None, **given: Any) -> LocalTransport:
    """``bundle``, and ``vocabulary`` (NAME=BUNDLE), in this process; of ``given``, what is None has its default."""
    from clipship.core.bundle import read_bundle
    from clipship.core.cli.main import existing_folder
    from clipship.serving.cli import named_bundle
    from clipship.serving.client.in_process import LocalTransport

    opened = read_bundle(existing_folder(bundle, "a bundle that clipship pack wrote"))
    others = {name: read_bundle(path) for name, path in map(named_bundle, [vocabulary] if vocabulary else [])}
    return LocalTransport(opened, others=others, **{name: value for name, value in given.items() if value is not None})


def _report(summary: JobSummary, output: JobOutput) -> None:
    """Print the summary and end the command.

    Raises:
        CheckFailed: images could not be classified.
    """
    if output.out is None:
        log(f"{summary}\n{summary.table()}")
    else:
        result = {**asdict(summary), "out": str(output.out)}
        emit(result, f"{output.out}: {summary}\n{summary.table()}", as_json=output.as_json)
    if summary.errors:
        raise CheckFailed(f"{summary.errors} of {summary.images} images could not be classified: see their errors")

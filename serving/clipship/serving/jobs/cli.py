"""The verb ``classify``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipship.core.cli.main import emit, json_option, option_group
from clipship.core.errors import CheckFailed, UsageError
from clipship.core.precisions import PRECISIONS, Precision
from clipship.core.progress import log
from clipship.serving.connection_cli import connection_from_options, connection_options

if TYPE_CHECKING:
    from clipship.serving.client.classifier import Classifier, Result, Retry
    from clipship.serving.client.in_process import LocalTransport
    from clipship.serving.jobs.inputs import Inputs, JobImage
    from clipship.serving.jobs.job import Job, JobSummary, Write
    from clipship.serving.jobs.results import Header, Sink
    from clipship.serving.jobs.shards import Progress, ResultsFolder
    from clipship.serving.jobs.watch import Watch

_PATH = click.Path(path_type=Path)
_SHARD_SIZE = 50_000


_server_options = option_group(
    click.option(
        "--url",
        "urls",
        multiple=True,
        help="Triton's gRPC endpoint, HOST:PORT; may be repeated. [default: 127.0.0.1:8001]",
    ),
    click.option("--bundle", type=_PATH, help="Classify with this bundle in this process, without a server."),
    click.option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="With --bundle: of the image encoder, one that the bundle was packed with. [default: fp32]",
    ),
    click.option(
        "--vocabulary",
        metavar="NAME[=BUNDLE]",
        help="A further vocabulary that the server has, by its name; with --bundle, and the bundle that it is of.",
    ),
    connection_options,
    click.option("--compression", type=click.Choice(["none", "gzip", "deflate"]), default="none", show_default=True),
    click.option("--shared-memory", is_flag=True, help="Hand pixels to a server on this machine in shared memory."),
    click.option(
        "--decode",
        type=click.Choice(["auto", "client", "server"]),
        default="auto",
        show_default=True,
        help="Who decodes and resizes: what is cheaper, or always the one. The results are the same.",
    ),
    click.option(
        "--resample",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        show_default=True,
        help="How images decoded here are resized: as open_clip to the bit, or sooner and at most 2 of 255 off.",
    ),
    click.option("--batch-size", type=int, help="Images a request. [default: what the server takes]"),
    click.option("--window", default=4, show_default=True, help="Requests in flight at the same time."),
    click.option("--workers", type=int, help="Threads that read and decode. [default: one a processor]"),
    click.option("--timeout-s", default=60.0, show_default=True, help="How long one attempt of a request may take."),
    click.option(
        "--retry-s", default=120.0, show_default=True, help="How long a request is tried while no server is there."
    ),
)

_output_options = option_group(
    click.option("--out", type=_PATH, help="A .parquet, .jsonl or .csv file, or a folder of shards. [default: stdout]"),
    click.option(
        "--format", "kind", type=click.Choice(["parquet", "jsonl", "csv"]), help="Of shards. [default: parquet]"
    ),
    click.option("--shard-size", type=int, help=f"Rows a shard. [default: {_SHARD_SIZE}]"),
    click.option("--restart", is_flag=True, help="Delete the shards of an earlier run instead of going on from them."),
    click.option("--embeddings", is_flag=True, help="Store the images' features too."),
    click.option("--top-k", type=int, help="Classes a row. [default: what the server reports]"),
)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What is to become of the rows."""

    out: Path | None
    kind: Literal["parquet", "jsonl", "csv"] | None
    shard_size: int | None
    restart: bool
    embeddings: bool
    top_k: int | None
    as_json: bool

    @property
    def is_folder(self) -> bool:
        """Whether ``out`` is a folder of shards: it is a folder, its name has no ending, or ``kind`` was given."""
        return self.out is not None and (self.kind is not None or not self.out.suffix or self.out.is_dir())


_OUTPUT = tuple(each.name for each in fields(_Output) if each.name != "as_json")
"""The names of its options."""


@click.command()
@click.argument("images", nargs=-1)
@click.option("--list", "lists", multiple=True, help="A file with one path a line, or NUL between them; - is stdin.")
@click.option("--image-column", help="The column of images in Parquet files. [default: the one of bytes]")
@click.option("--watch", is_flag=True, help="Classify what comes into the folders IMAGES, until Ctrl-C.")
@click.option("--settle-s", default=2.0, show_default=True, help="With --watch: how long a file must stay unchanged.")
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

    With a folder as --out, a job that was stopped, by whatever, goes on when the same command is given again.

    Examples:

    \b
      clipship classify photos/ --out results.parquet
      clipship classify 'shards/*.tar' --out results --format parquet --shard-size 50000
    """
    from clipship.serving.client.classifier import Retry
    from clipship.serving.jobs.inputs import inputs_from_arguments, text_of_path
    from clipship.serving.jobs.job import Job
    from clipship.serving.jobs.watch import Watch
    from clipship.serving.server.process import signals_as_interrupt

    output = _Output(as_json=as_json, **{name: options.pop(name) for name in _OUTPUT})
    _validate_options(output, watch=watch, settle_s=settle_s, lists=lists, images=images)
    source = (
        Watch(folders=images, settle_s=settle_s)
        if watch
        else inputs_from_arguments(images, lists=lists, image_column=image_column)
    )
    settings = {
        "inputs": list(map(text_of_path, images)),
        "lists": list(map(text_of_path, lists)),
        "image_column": image_column,
        "watch": watch,
        "vocabulary": _vocabulary_name(options["vocabulary"]),
        "precision": options["precision"],
        "resample": options["resample"],
    }
    retry = Retry(deadline_s=options.pop("retry_s"))
    with signals_as_interrupt(), _classifier(output, retry=retry, **options) as classifier:
        job = Job(classifier, top_k=output.top_k, retry=retry)
        summary = _run_into_folder(job, source, output, settings) if output.is_folder else _run(job, source, output)
    _report(summary, output)


def _validate_options(
    output: _Output, *, watch: bool, settle_s: float, lists: tuple[str, ...], images: tuple[str, ...]
) -> None:
    """Raise :class:`UsageError` for options that do not go together."""
    if not output.is_folder and (output.restart or output.shard_size is not None or output.kind is not None):
        raise UsageError("--shard-size, --format and --restart are for shards: give a folder as --out")
    if watch and output.out is not None and not output.is_folder:
        raise UsageError(
            f"{output.out}: a watch has no end, and a file would never be finished: give a folder as --out"
        )
    if watch and (lists or not all(Path(text).is_dir() for text in images)):
        raise UsageError("--watch: give folders that exist, and nothing else")
    if settle_s <= 0:
        raise UsageError(f"--settle-s {settle_s:g}: give a positive number of seconds")


@contextmanager
def _classifier(
    output: _Output,
    *,
    urls: tuple[str, ...],
    bundle: Path | None,
    precision: Precision | None,
    vocabulary: str | None,
    decode: Literal["auto", "client", "server"],
    resample: Literal["exact", "fast"],
    retry: Retry,
    batch_size: int | None,
    window: int,
    workers: int | None,
    timeout_s: float,
    **connection: Any,
) -> Iterator[Classifier]:
    """A client of the servers at ``urls``, or of ``bundle`` in this process."""
    from clipship.serving.client.classifier import Classifier

    if bundle is not None and (urls or any(value not in (None, (), False, "none") for value in connection.values())):
        raise UsageError(
            "--bundle runs in this process: it goes with none of --url, --tls and what else leads to a server"
        )
    if bundle is None and precision is not None:
        raise UsageError(
            f"--precision {precision}: a server has its repository's: give it to clipship repository, or give --bundle"
        )
    server = (
        connection_from_options(urls or ("127.0.0.1:8001",), **connection)
        if bundle is None
        else _local(bundle, precision=precision, vocabulary=vocabulary, top_k=output.top_k)
    )
    with Classifier(
        server,
        decode=decode,
        resample=resample,
        embeddings=output.embeddings,
        vocabulary=vocabulary if bundle is None else _vocabulary_name(vocabulary),
        timeout_s=timeout_s,
        window=window,
        batch_size=batch_size,
        workers=workers,
        retry=retry,
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


def _run(job: Job, source: Inputs | Watch, output: _Output) -> JobSummary:
    """Classify ``source`` into one file, or onto stdout."""
    from clipship.serving.jobs.job import Tally

    tally = Tally()
    with _sink(output, job.header(embeddings=output.embeddings)) as sink:

        def write(item: JobImage, result: Result) -> None:
            sink.write(item.name, result)
            tally.add(result)

        _feed(job, source, write, flush=sys.stdout.flush, wait_s=0.0, done=set())
    return job.summary(tally.progress)


def _run_into_folder(job: Job, source: Inputs | Watch, output: _Output, settings: Mapping[str, Any]) -> JobSummary:
    """Classify what the folder of shards does not hold yet of ``source`` into it.

    Raises:
        JobStopped: the server failed for good, or the disk is full.
        UsageError: the folder is of another job, or the inputs have changed.
    """
    from clipship.serving.jobs.inputs import Inputs
    from clipship.serving.jobs.shards import results_folder
    from clipship.serving.jobs.watch import LONGEST_WAIT_S, Watch

    assert output.out is not None
    asked = {
        "shard_format": output.kind or "parquet",
        "shard_size": _SHARD_SIZE if output.shard_size is None else output.shard_size,
        "top_k": job.top_k,
    }
    told = {**settings, **asked, "embeddings": output.embeddings}
    header = job.header(embeddings=output.embeddings)
    with results_folder(
        output.out,
        settings=told,
        header=header,
        shard_size=told["shard_size"],
        restart=output.restart,
        check=job.validate_server_identity,
    ) as results:
        before = results.progress
        done = set(results.names()) if isinstance(source, Watch) else set()
        with _kept(results, output.out):
            _feed(
                job, source, results.write, flush=results.finish_shard, wait_s=LONGEST_WAIT_S, done=done, after=before
            )
            if isinstance(source, Inputs):
                results.complete()
    return job.summary(results.progress, resumed_at=before.images)


def _feed(
    job: Job,
    source: Inputs | Watch,
    write: Write,
    *,
    flush: Callable[[], None],
    wait_s: float,
    done: set[str],
    after: Progress | None = None,
) -> None:
    """Run ``job`` on the images of ``source`` that earlier runs, which came to ``after`` or did ``done``, have left."""
    from clipship.serving.jobs.inputs import Inputs
    from clipship.serving.jobs.watch import stopped_by_signals, watch_into

    if isinstance(source, Inputs):
        place, images = (after.place, after.images) if after is not None else (None, 0)
        job.run(source.items(place), write, total=source.total(), done=images)
        return
    log(f"watching {', '.join(map(str, source.folders))} until Ctrl-C")
    with stopped_by_signals() as stop:
        watch_into(job, source.watcher(done), write, flush=flush, stop=stop, wait_s=wait_s)


@contextmanager
def _kept(results: ResultsFolder, out: Path) -> Iterator[None]:
    """Say, when the block ends early, what is kept and how to go on."""
    from clipship.serving.errors import JobStopped, ServingError

    try:
        yield
    except KeyboardInterrupt:
        log(f"{out}: {results.progress.images} images are kept: give the same command again to go on")
        raise
    except (ServingError, CheckFailed, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JobStopped(
            f"{reason}; {results.progress.images} images are kept in {out}: give the same command again to go on"
        ) from error


@contextmanager
def _sink(output: _Output, header: Header) -> Iterator[Sink]:
    """The one file of ``output``, or stdout."""
    from clipship.serving.jobs.results import JsonLinesSink, TableSink, results_file

    if output.out is None:
        yield JsonLinesSink(sys.stdout, header) if output.as_json else TableSink(sys.stdout)
        sys.stdout.flush()
        return
    with results_file(output.out, header) as sink:
        yield sink


def _report(summary: JobSummary, output: _Output) -> None:
    """Print the summary and end the command.

    Raises:
        CheckFailed: images could not be classified.
    """
    if output.out is None:
        log(f"{summary}\n{summary.table()}")
    else:
        result = {**summary.to_json(), "out": str(output.out)}
        emit(result, f"{output.out}: {summary}\n{summary.table()}", as_json=output.as_json)
    if summary.errors:
        raise CheckFailed(f"{summary.errors} of {summary.images} images could not be classified: see their errors")

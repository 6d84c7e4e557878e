"""Runs a batch job: images in, one row an image out, with a summary by class.

    with Classifier("127.0.0.1:8001") as classifier:
        summary = run_job(inputs_from_arguments(["photos"]), classifier, JobOutput(out=Path("results")))

A stopped job with a folder of shards resumes when it is run again.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from clipship.core.errors import CheckFailed, UsageError
from clipship.core.progress import log, progress
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.metadata import ServerMetadata
from clipship.serving.client.results import Result
from clipship.serving.client.settings import Retry
from clipship.serving.errors import RETRYABLE, JobStopped, ServingError
from clipship.serving.jobs.inputs import Inputs, JobImage
from clipship.serving.jobs.results import Header, WriteRow, json_lines, results_file, table_lines, validate_format
from clipship.serving.jobs.shards import Progress, ResultsFolder, Tally, results_folder
from clipship.serving.jobs.watch import Watcher

_CLASSES_SHOWN = 10
_SHARD_SIZE = 50_000


@dataclass(frozen=True, kw_only=True)
class JobSummary:
    """What a job did."""

    images: int
    """Of all runs of the job together, as are the errors and classes."""
    errors: int
    """Images that could not be read or decoded."""
    classes: Mapping[str, int]
    """Images by their best class, the most frequent first."""
    resumed_at: int
    """Images that earlier runs classified."""
    seconds: float
    """Of this run."""
    images_per_s: float
    bundle_digest: str
    vocabulary_digest: str

    def __str__(self) -> str:
        classified = self.images - self.errors
        failed = f", {self.errors} could not be" if self.errors else ""
        earlier = f", {self.resumed_at} of them before" if self.resumed_at else ""
        return (
            f"{classified} {'image' if classified == 1 else 'images'} classified{failed}{earlier}, "
            f"in {self.seconds:.1f} s ({self.images_per_s:.1f} images/s)"
        )

    def table(self) -> str:
        """The most frequent classes with their counts and shares, a line each."""
        shown = list(self.classes.items())[:_CLASSES_SHOWN]
        width = max((len(str(count)) for _, count in shown), default=0)
        total = max(1, sum(self.classes.values()))
        lines = [f"{count:{width}}  {count / total:6.1%}  {name}" for name, count in shown]
        others = len(self.classes) - len(shown)
        return "\n".join([*lines, *([f"and {others} more {'class' if others == 1 else 'classes'}"] if others else [])])


@dataclass(frozen=True, kw_only=True)
class JobOutput:
    """Where a job's rows go, and what they hold.

    Raises:
        UsageError: settings of shards without a folder to write them into, or an unknown format.
    """

    out: Path | None = None
    """A .parquet, .jsonl or .csv file, or a folder of shards; None is stdout."""
    as_json: bool = False
    """On stdout, one JSON object an image instead of a line for people."""
    shard_format: str | None = None
    """None is Parquet; a value makes ``out`` a folder whatever it is called."""
    shard_size: int | None = None
    """Rows a shard; None is 50,000."""
    restart: bool = False
    """Delete the shards of an earlier run instead of resuming."""
    embeddings: bool = False
    """Store the images' features too."""
    top_k: int | None = None
    """Classes a row; None is as many as the server reports."""

    def __post_init__(self) -> None:
        if self.folder is None and (self.restart or self.shard_size is not None or self.shard_format is not None):
            raise UsageError("--shard-size, --format and --restart are for shards: give a folder as --out")
        if self.shard_format is not None:
            validate_format(Path(f"shard.{self.shard_format}"))

    @property
    def folder(self) -> Path | None:
        """``out`` as a folder of shards: it is a folder, its name has no suffix, or a shard format was given."""
        named = self.out is not None and (self.shard_format is not None or not self.out.suffix or self.out.is_dir())
        return self.out if named else None


class _StreamResults:
    """Rows in one file, or on stdout: what :class:`ResultsFolder` is for shards."""

    flush_every_s = 0.0

    def __init__(self, write_row: WriteRow) -> None:
        self._write_row = write_row
        self._tally = Tally()

    @property
    def progress(self) -> Progress:
        return Progress().after(self._tally)

    def write(self, image: JobImage, result: Result) -> None:
        self._write_row(image.name, result)
        self._tally.add(result)

    def flush(self) -> None:
        sys.stdout.flush()

    complete = flush

    def names(self) -> Iterator[str]:
        return iter(())


_Results = _StreamResults | ResultsFolder


class Job:
    """One classifier at work on the images of a job.

    Args:
        top_k: classes a row, at most those that the server reports (the default).
        retry: how long to wait for the server when a shard is finished; requests have the classifier's own.

    Raises:
        UsageError: ``top_k`` is out of range.
    """

    def __init__(self, classifier: Classifier, *, top_k: int | None = None, retry: Retry | None = None) -> None:
        self._facts = classifier.metadata
        self._retry = retry or Retry()
        most = self._facts.top_k
        if top_k is not None and not 1 <= top_k <= most:
            raise UsageError(f"top k {top_k}: the server reports 1 to {most}; more need clipship repository --top-k")
        self.classifier = classifier
        self.top_k = most if top_k is None else top_k
        self._started_s = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.monotonic() - self._started_s

    def header(self, *, embeddings: bool = False) -> Header:
        """What the rows of this job have in common.

        Raises:
            UsageError: ``embeddings`` without a repository that gives them.
        """
        facts = self._facts
        if embeddings and facts.embed_dim is None:
            raise UsageError("the server gives no embeddings: write its repository again with clipship repository")
        return Header(
            bundle_digest=facts.bundle_digest,
            vocabulary_digest=facts.vocabulary_digest,
            embed_dim=facts.embed_dim if embeddings else None,
        )

    def results(self, images: Iterable[JobImage]) -> Generator[tuple[JobImage, Result], None, None]:
        """Every image with its result, in order, while ``images`` is being consumed.

        Raises:
            ServingError: as :meth:`Classifier.classify_iter`.
        """
        waiting: deque[JobImage] = deque()

        def contents() -> Iterator[bytes | Path]:
            for image in images:
                waiting.append(image)
                yield image.image

        for result in self.classifier.classify_iter(contents()):
            image = waiting.popleft()
            yield image, self._row(image, result)

    def _row(self, image: JobImage, result: Result) -> Result:
        if image.error is not None:
            return Result(error=image.error)
        if len(result.labels) <= self.top_k:
            return result
        names = ("labels", "scores", "indices")
        return replace(result, **{name: getattr(result, name)[: self.top_k] for name in names})

    def validate_server_identity(self) -> None:
        """Ask the server which bundle and vocabulary it has.

        Raises:
            CheckFailed: they have changed since the job began.
            ServingError: it did not answer within the retry deadline.
        """
        now = self._facts_now()
        before = self._facts
        if (before.bundle_digest, before.vocabulary_digest) != (now.bundle_digest, now.vocabulary_digest):
            raise CheckFailed(
                "the server loaded another bundle or vocabulary during the job: restore the former one, or --restart"
            )

    def _facts_now(self) -> ServerMetadata:
        began_s = time.monotonic()
        for attempt in itertools.count():
            try:
                return self.classifier.refresh()
            except RETRYABLE:
                pause_s = self._retry.pause_s(attempt, random.random())
                if time.monotonic() + pause_s - began_s > self._retry.deadline_s:
                    raise
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def summary(self, result: Progress, *, resumed_at: int = 0) -> JobSummary:
        """A summary of ``result``; earlier runs classified the first ``resumed_at`` images."""
        seconds = self.seconds
        return JobSummary(
            images=result.images,
            errors=result.errors,
            classes=dict(sorted(result.classes.items(), key=lambda entry: (-entry[1], entry[0]))),
            resumed_at=resumed_at,
            seconds=seconds,
            images_per_s=(result.images - resumed_at) / seconds,
            bundle_digest=self._facts.bundle_digest,
            vocabulary_digest=self._facts.vocabulary_digest,
        )


def run_job(
    inputs: Inputs,
    classifier: Classifier,
    output: JobOutput | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    retry: Retry | None = None,
) -> JobSummary:
    """Classify the images of ``inputs``; with a folder of shards, those that it does not hold yet.

    Args:
        settings: what else the rows depend on, as JSON; a folder of shards resumes with the same settings only.
        retry: as :class:`Job`.

    Raises:
        JobStopped: the server failed for good, or the disk is full; the finished shards are kept.
        UsageError: the folder is of another job, or as :class:`Job`.
        DataError: the inputs have changed.
    """
    output = output or JobOutput()
    job = Job(classifier, top_k=output.top_k, retry=retry)
    with _opened(output, job, {**(settings or {}), "watch": False}) as results:
        before = results.progress
        with progress("classifying", inputs.total()) as report:
            for count, (image, result) in enumerate(job.results(inputs.images(before.place)), start=1):
                results.write(image, result)
                report(before.images + count, f"{count / job.seconds:.1f} images/s")
        results.complete()
    return job.summary(results.progress, resumed_at=before.images)


def watch_job(
    folders: Sequence[str],
    classifier: Classifier,
    output: JobOutput | None = None,
    *,
    stop: Event,
    settle_s: float = 2.0,
    settings: Mapping[str, Any] | None = None,
    retry: Retry | None = None,
) -> JobSummary:
    """Classify the images that arrive in ``folders`` until ``stop`` is set; then finish the last shard.

    Args:
        settle_s: how long a file must stay unchanged.

    Raises:
        UsageError: a folder does not exist, ``output`` is a single file, or as :func:`run_job`.
        JobStopped: as :func:`run_job`; the rows of the last shard are kept too.
    """
    output = output or JobOutput()
    validate_watch(folders, output, settle_s)
    job = Job(classifier, top_k=output.top_k, retry=retry)
    with _opened(output, job, {**(settings or {}), "watch": True}) as results:
        before = results.progress
        watcher = Watcher(folders, settle_s=settle_s, done=set(results.names()))
        log(f"watching {', '.join(folders)} until Ctrl-C")
        try:
            _watch(job, watcher, results, stop)
        except ServingError:  # raised between two rows, so the written ones are whole
            results.flush()
            raise
        results.flush()
    return job.summary(results.progress, resumed_at=before.images)


def validate_watch(folders: Sequence[str], output: JobOutput, settle_s: float) -> None:
    """Raise :class:`UsageError` for what cannot be watched."""
    if output.out is not None and output.folder is None:
        raise UsageError(f"{output.out}: a watch has no end, so a file would never be finished: give a folder as --out")
    if not all(map(os.path.isdir, folders)):
        raise UsageError("--watch: give folders that exist, and nothing else")
    if settle_s <= 0:
        raise UsageError(f"--settle-s {settle_s:g}: give a positive number of seconds")


def _watch(job: Job, watcher: Watcher, results: _Results, stop: Event) -> None:
    """Look into the folders until ``stop`` is set."""
    flushed_s = time.monotonic()
    while not stop.is_set():
        with closing(job.results(watcher.images())) as rows:
            for image, result in rows:
                results.write(image, result)
                if stop.is_set():
                    break
        if time.monotonic() - flushed_s >= results.flush_every_s:
            results.flush()
            flushed_s = time.monotonic()
        stop.wait(watcher.pause_s)


@contextmanager
def _opened(output: JobOutput, job: Job, settings: Mapping[str, Any]) -> Iterator[_Results]:
    """The results that ``output`` describes, open for writing."""
    header = job.header(embeddings=output.embeddings)
    if output.folder is None:
        with _one_file(output, header) as write_row:
            yield _StreamResults(write_row)
        return
    with (
        results_folder(
            output.folder,
            settings={**settings, "top_k": job.top_k, "embeddings": output.embeddings},
            header=header,
            shard_format=output.shard_format or "parquet",
            shard_size=_SHARD_SIZE if output.shard_size is None else output.shard_size,
            restart=output.restart,
            check=job.validate_server_identity,
        ) as results,
        _kept(results, output.folder),
    ):
        yield results


@contextmanager
def _one_file(output: JobOutput, header: Header) -> Iterator[WriteRow]:
    """The one file of ``output``, or stdout."""
    if output.out is None:
        yield json_lines(sys.stdout, header) if output.as_json else table_lines(sys.stdout)
        return
    with results_file(output.out, header) as write_row:
        yield write_row


@contextmanager
def _kept(results: _Results, folder: Path) -> Iterator[None]:
    """If the block fails, say how many images are kept and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        log(f"{folder}: {results.progress.images} images are kept: give the same command again to resume")
        raise
    except (ServingError, CheckFailed, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JobStopped(
            f"{reason}; {results.progress.images} images are kept in {folder}: give the same command again to resume"
        ) from error

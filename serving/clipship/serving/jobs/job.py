"""A batch job: images in, one row an image out, with a summary by class."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from clipship.core.errors import CheckFailed, UsageError
from clipship.core.progress import progress
from clipship.serving.client.classifier import Classifier
from clipship.serving.client.metadata import ServerMetadata
from clipship.serving.client.results import Result
from clipship.serving.client.settings import Retry
from clipship.serving.errors import RETRYABLE
from clipship.serving.jobs.inputs import JobImage
from clipship.serving.jobs.results import Header
from clipship.serving.jobs.shards import Progress

_CLASSES_SHOWN = 10

Write = Callable[[JobImage, Result], None]
"""Takes one image's result."""


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
    """Images that earlier runs had done."""
    seconds: float
    """Of this run."""
    images_per_s: float
    bundle_digest: str
    vocabulary_digest: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return asdict(self)

    def __str__(self) -> str:
        failed = f", {self.errors} could not be" if self.errors else ""
        earlier = f", {self.resumed_at} of them before" if self.resumed_at else ""
        return (
            f"{self.images - self.errors} images classified{failed}{earlier}, "
            f"in {self.seconds:.1f} s ({self.images_per_s:.1f} images/s)"
        )

    def table(self) -> str:
        """The most frequent classes with their counts and shares, a line each."""
        shown = list(self.classes.items())[:_CLASSES_SHOWN]
        width = max((len(str(count)) for _, count in shown), default=0)
        total = max(1, sum(self.classes.values()))
        lines = [f"{count:{width}}  {count / total:6.1%}  {name}" for name, count in shown]
        others = len(self.classes) - len(shown)
        return "\n".join([*lines, *([f"and {others} more classes"] if others else [])])


class Tally:
    """Counts of a run that writes no shards."""

    def __init__(self) -> None:
        self.images = self.errors = 0
        self.classes: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        """Count one image."""
        self.images += 1
        self.errors += result.error is not None
        if result.label is not None:
            self.classes[result.label] += 1

    @property
    def progress(self) -> Progress:
        """What was counted."""
        return Progress(images=self.images, errors=self.errors, classes=self.classes)


class Job:
    """One classifier at work on the images of a job.

    Args:
        top_k: classes a row, at most those that the server reports (the default).
        retry: how long the server is waited for when a shard is finished; requests have the classifier's own.

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

    def header(self, *, embeddings: bool = False) -> Header:
        """What the rows of this job have in common.

        Raises:
            UsageError: features are wanted, and the server's repository does not give them.
        """
        facts = self._facts
        if embeddings and facts.embed_dim is None:
            raise UsageError("the server gives no embeddings: write its repository again with clipship repository")
        return Header(
            bundle_digest=facts.bundle_digest,
            vocabulary_digest=facts.vocabulary_digest,
            embed_dim=facts.embed_dim if embeddings else None,
        )

    def results(self, items: Iterable[JobImage]) -> Generator[tuple[JobImage, Result], None, None]:
        """Every item with its result, in order, while ``items`` is being consumed.

        Raises:
            ServingError: as :meth:`Classifier.classify_iter`.
        """
        waiting: deque[JobImage] = deque()

        def images() -> Iterator[Any]:
            for item in items:
                waiting.append(item)
                yield item.image

        for result in self.classifier.classify_iter(images()):
            item = waiting.popleft()
            yield item, self._row(item, result)

    def _row(self, item: JobImage, result: Result) -> Result:
        if item.error is not None:
            return Result(error=item.error)
        if len(result.labels) <= self.top_k:
            return result
        names = ("labels", "scores", "indices")
        return replace(result, **{name: getattr(result, name)[: self.top_k] for name in names})

    def run(self, items: Iterable[JobImage], write: Write, *, total: int | None, done: int = 0) -> None:
        """Classify ``items`` and ``write`` each with its result, in order, with a progress bar from ``done`` on.

        Raises:
            ServingError: as :meth:`Classifier.classify_iter`.
            OSError: ``write`` met a full disk.
        """
        with progress("classifying", total) as report:
            for count, (item, result) in enumerate(self.results(items), start=1):
                write(item, result)
                report(done + count, f"{count / (time.monotonic() - self._started_s):.1f} images/s")

    def validate_server_identity(self) -> None:
        """Ask the server, for as long as a request is tried, which bundle and vocabulary it has.

        Raises:
            CheckFailed: it has taken up others since the job began.
            ServingError: it does not answer.
        """
        now = self._facts_now()
        before = self._facts
        if (before.bundle_digest, before.vocabulary_digest) != (now.bundle_digest, now.vocabulary_digest):
            raise CheckFailed(
                "the server has taken up another bundle or vocabulary in mid-job: put the former one back, or --restart"
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
        """What has been done so far, ``resumed_at`` of it by earlier runs."""
        seconds = time.monotonic() - self._started_s
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

"""A batch job: files, folders and globs in, one row an image out."""

from __future__ import annotations

import glob
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.images import IMAGE_SUFFIXES
from clipship.core.progress import progress
from clipship.serving.client import Classifier
from clipship.serving.results import Sink


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job did."""

    images: int
    errors: int
    """Images that could not be read or decoded."""
    seconds: float
    images_per_s: float
    bundle_digest: str
    vocabulary_digest: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return asdict(self)

    def __str__(self) -> str:
        failed = f", {self.errors} could not be" if self.errors else ""
        return (
            f"{self.images - self.errors} images classified{failed}, "
            f"in {self.seconds:.1f} s ({self.images_per_s:.1f} images/s)"
        )


def image_paths(given: Sequence[str]) -> list[Path]:
    """The image files that ``given`` names, each once: files as given, folders recursively and sorted, globs sorted.

    Raises:
        DataError: a path does not exist, a glob matches nothing, or a folder holds no image.
    """
    return list(dict.fromkeys(path for name in given for path in _paths_of(name)))


def _paths_of(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _images_in(path)
    found = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    if not found:
        raise DataError(f"{name}: no such file or folder, and no glob that matches: give images or a folder of them")
    return [image for match in found for image in (_images_in(match) if match.is_dir() else [match])]


def _images_in(folder: Path) -> list[Path]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not images:
        raise DataError(f"{folder}: no images in this folder (names ending in {', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


def classify_files(classifier: Classifier, paths: Sequence[Path], sink: Sink) -> Summary:
    """Classify the image files ``paths`` into ``sink``, in order, with a progress bar.

    Raises:
        ServingError: as :meth:`Classifier.classify_iter`.
        OSError: the sink's disk is full.
    """
    started_s = time.monotonic()
    done = errors = 0
    with progress("classifying", len(paths)) as report:
        for path, result in zip(paths, classifier.classify_iter(paths), strict=True):
            sink.write(path, result)
            done += 1
            errors += result.error is not None
            report(done, f"{done / (time.monotonic() - started_s):.1f} images/s")
    seconds = time.monotonic() - started_s
    return Summary(
        images=done,
        errors=errors,
        seconds=seconds,
        images_per_s=done / seconds,
        bundle_digest=classifier.facts.bundle_digest,
        vocabulary_digest=classifier.facts.vocabulary_digest,
    )

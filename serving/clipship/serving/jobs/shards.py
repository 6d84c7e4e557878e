"""Results in a folder of shards, with a manifest that says which of them count.

::

    results/
      manifest.json          what was asked for, the digests, the counts, and every shard with its rows and SHA-256
      part-000000.parquet    rows 0 to 49,999, and so on

A shard is written under a temporary name, flushed to disk and renamed, and only then named in the manifest, which is
replaced atomically. So after a kill at any moment the manifest names whole shards only, and the place in the inputs
where the last one ends. The same job resumes there; the images of an unnamed shard are classified again. The folder
ends up as if the job had not been killed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError, UsageError
from clipship.core.files import locked_folder, read_record, sha256_of, write_json_atomic
from clipship.serving.client.results import Result
from clipship.serving.jobs.inputs import JobImage, Place
from clipship.serving.jobs.results import Header, names_in, results_file

MANIFEST = "manifest.json"
_FORMAT = "clipship-results"
_VERSION = 1
_PARTS = re.compile(r"part-\d{6,}\.\w+|\.(?:part-\d{6,}\.\w+|manifest\.json)\.\d+-[0-9a-f]+\.part")
_BEGIN_ANEW = "run the folder's own job, give another folder, or --restart to delete these results"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file of results."""

    file: str
    first_row: int
    rows: int
    errors: int
    size_bytes: int
    sha256: str


class Tally:
    """Counts of images, as they come."""

    def __init__(self) -> None:
        self.images = self.errors = 0
        self.classes: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        """Count one image."""
        self.images += 1
        self.errors += result.error is not None
        if result.label is not None:
            self.classes[result.label] += 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job has come: what its shards hold."""

    images: int = 0
    errors: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    """Images by their best class."""
    place: Place | None = None
    """Of the last of them in the inputs; None before the first, and for a watch, which resumes by names."""
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    """Whether all inputs are done."""

    def after(self, tally: Tally, **changes: Any) -> Progress:
        """After the images of ``tally``."""
        return replace(
            self,
            images=self.images + tally.images,
            errors=self.errors + tally.errors,
            classes=Counter(self.classes) + tally.classes,
            **changes,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field; the classes by name."""
        return {**asdict(self), "classes": dict(sorted(self.classes.items()))}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """The inverse of :meth:`to_json`; other keys of ``content`` are ignored."""
        known = {each.name: content[each.name] for each in fields(cls)}
        place = None if known["place"] is None else Place(**known["place"])
        return cls(**{**known, "place": place, "shards": tuple(Shard(**shard) for shard in known["shards"])})


class ResultsFolder:
    """The results of one job in shards; :func:`results_folder` opens it."""

    flush_every_s = 60.0
    """How long a watch lets rows wait for their shard."""

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        header: Header,
        progress: Progress,
        check: Callable[[], None],
    ) -> None:
        self.progress = progress
        self._folder = folder
        self._settings = settings
        self._header = header
        self._check = check
        self._shard: _OpenShard | None = None

    def write(self, image: JobImage, result: Result) -> None:
        """Add the result of ``image``; every ``shard_size`` rows a shard is finished.

        Raises:
            OSError: the disk is full; the finished shards are kept.
        """
        if self._shard is None:
            name = f"part-{len(self.progress.shards):06d}.{self._settings['shard_format']}"
            self._shard = _OpenShard(self._folder / name, self._header)
        self._shard.write(image, result)
        if self._shard.tally.images >= self._settings["shard_size"]:
            self.flush()

    def flush(self) -> None:
        """Finish the open shard: flush it to disk, then name it in the manifest."""
        if self._shard is None:
            return
        shard, self._shard = self._shard, None
        shard.close()
        self._check()
        done = Shard(
            file=shard.path.name,
            first_row=self.progress.images,
            rows=shard.tally.images,
            errors=shard.tally.errors,
            size_bytes=shard.path.stat().st_size,
            sha256=sha256_of(shard.path),
        )
        self.progress = self.progress.after(shard.tally, place=shard.place, shards=(*self.progress.shards, done))
        self.write_manifest()

    def complete(self) -> None:
        """Finish the last shard and mark the job complete."""
        self.flush()
        self.progress = replace(self.progress, complete=True)
        self.write_manifest()

    def drop_shard(self) -> None:
        """Delete the open shard."""
        if self._shard is not None:
            self._shard.drop()

    def write_manifest(self) -> None:
        """Replace the manifest by one of the present state."""
        head = {"format": _FORMAT, "format_version": _VERSION, **self._settings}
        write_json_atomic(self._folder / MANIFEST, {**head, **self.progress.to_json()})

    def names(self) -> Iterator[str]:
        """The names of all images that the shards hold."""
        for shard in self.progress.shards:
            yield from names_in(self._folder / shard.file)


class _OpenShard:
    """A shard that is being written under a temporary name."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.tally = Tally()
        self.place: Place | None = None
        self._file = ExitStack()
        self._write_row = self._file.enter_context(results_file(path, header))

    def write(self, image: JobImage, result: Result) -> None:
        self._write_row(image.name, result)
        self.tally.add(result)
        self.place = image.place

    def close(self) -> None:
        """Flush it to disk and give it its name."""
        self._file.close()

    def drop(self) -> None:
        """Delete it."""
        with suppress(_Dropped, OSError):  # on a full disk the end of a Parquet file cannot be written either
            self._file.__exit__(_Dropped, _Dropped(), None)


class _Dropped(Exception):
    """Makes :func:`results_file` discard its file."""


@contextmanager
def results_folder(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    header: Header,
    shard_size: int,
    shard_format: str = "parquet",
    restart: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Iterator[ResultsFolder]:
    """Open the folder of a job's results, new or as an earlier run of the same job left it.

    Args:
        settings: what the rows depend on, as JSON; an earlier run must have had the same.
        check: called before a shard is named in the manifest; an exception keeps the shard out.

    Raises:
        UsageError: ``folder`` has other files, the results of another job or damaged ones, or another process writes
            to it.
        OSError: the disk is full.
    """
    if shard_size < 1:
        raise UsageError(f"shard size {shard_size}: give a positive number of rows")
    folder.mkdir(parents=True, exist_ok=True)
    told = {**settings, "shard_format": shard_format, "shard_size": shard_size, **header.digests}
    with locked_folder(folder, "another process writes its results there: wait for it, or stop it"):
        progress = _read_progress(folder, told, restart=restart)
        results = ResultsFolder(folder, settings=told, header=header, progress=progress, check=check)
        results.write_manifest()
        _delete_unnamed(folder, progress)
        try:
            yield results
        finally:
            results.drop_shard()


def _read_progress(folder: Path, settings: Mapping[str, Any], *, restart: bool) -> Progress:
    """The progress of an earlier run with these ``settings``; none if there was no run, or on ``restart``."""
    path = folder / MANIFEST
    if not path.exists():
        _validate_files(folder, restart=restart)
    if restart or not path.exists():
        return Progress()
    record = read_record(path, record_format=_FORMAT, version=_VERSION, error=DataError, advice=_BEGIN_ANEW)
    for key, value in settings.items():
        if record.get(key) != value:
            raise UsageError(f"{folder}: {key} was {_shown(record.get(key))}, is {_shown(value)}: {_BEGIN_ANEW}")
    try:
        progress = Progress.from_json(record)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: {error} is missing or of the wrong type: {_BEGIN_ANEW}") from error
    for shard in progress.shards:
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.size_bytes:
            raise DataError(f"{file}: is missing or was changed: {_BEGIN_ANEW}")
    return replace(progress, complete=False)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _validate_files(folder: Path, *, restart: bool) -> None:
    """Raise :class:`UsageError` for files in a folder without a manifest; ``restart`` accepts shards."""
    for name in os.listdir(folder):
        if not _PARTS.fullmatch(name):
            raise UsageError(f"{folder}: holds {name}, which is not a result: give a new or empty folder")
        if not restart and not name.startswith("."):
            raise UsageError(f"{folder}: has shards and no {MANIFEST}: {_BEGIN_ANEW}")


def _delete_unnamed(folder: Path, progress: Progress) -> None:
    """Delete shards that the manifest does not name and temporary files of killed runs; the lock excludes live ones."""
    named = {shard.file for shard in progress.shards}
    for name in os.listdir(folder):
        if _PARTS.fullmatch(name) and name not in named:
            (folder / name).unlink()

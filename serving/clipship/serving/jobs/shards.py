"""Results of very many images: shards in a folder, and a manifest that says which of them count.

::

    results/
      manifest.json          what was asked for, the digests, the counts, and every shard with its rows and SHA-256
      part-000000.parquet    rows 0 to 49,999, and so on

A shard is written beside its place, flushed to disk and renamed, and only then named in the manifest, which is replaced
as a whole. So after a kill at any moment the manifest names whole shards only, together with the place in the inputs
that the last one ends at. The same job goes on from there; what an unnamed shard held is classified again. Its folder
is then the one that a job without a kill would have left.
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
from clipship.serving.jobs.results import Header, Sink, names_in, results_file

MANIFEST = "manifest.json"
_FORMAT = "clipship-results"
_VERSION = 1
_PARTS = re.compile(r"part-\d{6,}\.\w+|\.(?:part-\d{6,}\.\w+|manifest\.json)\.\d+-[0-9a-f]+\.part")
_BEGIN_ANEW = "run the job that the folder is of, give another folder, or --restart to delete these results"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of results that is whole and on disk."""

    file: str
    first_row: int
    rows: int
    errors: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job has come: what its shards hold."""

    images: int = 0
    errors: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    """Images by their best class."""
    place: Place | None = None
    """Of the last of them in the inputs; None before the first, and for a watch, which goes by names."""
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    """Whether the inputs came to their end."""

    def with_shard(self, shard: Shard, classes: Mapping[str, int], place: Place | None) -> Progress:
        """After one more shard, whose images are of ``classes`` and end at ``place``."""
        return Progress(
            images=self.images + shard.rows,
            errors=self.errors + shard.errors,
            classes=Counter(self.classes) + Counter(classes),
            place=place,
            shards=(*self.shards, shard),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field; the classes by name."""
        return {**asdict(self), "classes": dict(sorted(self.classes.items()))}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """The inverse of :meth:`to_json`; what else ``content`` holds is passed over."""
        known = {each.name: content[each.name] for each in fields(cls)}
        place = None if known["place"] is None else Place(**known["place"])
        return cls(**{**known, "place": place, "shards": tuple(Shard(**shard) for shard in known["shards"])})


class ResultsFolder:
    """The results of one job in shards; :func:`results_folder` opens it."""

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        header: Header,
        progress: Progress,
        shard_size: int,
        check: Callable[[], None],
    ) -> None:
        self.progress = progress
        self._folder = folder
        self._settings = settings
        self._header = header
        self._shard_size = shard_size
        self._check = check
        self._shard: _OpenShard | None = None

    @property
    def rows_waiting(self) -> int:
        """Rows that no finished shard holds yet."""
        return self._shard.rows if self._shard is not None else 0

    def write(self, item: JobImage, result: Result) -> None:
        """Add the result of ``item``; every ``shard_size`` rows a shard is finished.

        Raises:
            OSError: the disk is full; the finished shards are kept.
        """
        if self._shard is None:
            name = f"part-{len(self.progress.shards):06d}.{self._settings['shard_format']}"
            self._shard = _OpenShard(self._folder / name, self._header)
        self._shard.write(item, result)
        if self._shard.rows >= self._shard_size:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Put the rows that wait on disk as a shard, and then name it in the manifest."""
        if self._shard is None:
            return
        shard, self._shard = self._shard, None
        shard.close()
        self._check()
        done = Shard(
            file=shard.path.name,
            first_row=self.progress.images,
            rows=shard.rows,
            errors=shard.errors,
            size_bytes=shard.path.stat().st_size,
            sha256=sha256_of(shard.path),
        )
        self.progress = self.progress.with_shard(done, shard.classes, shard.place)
        self.write_manifest()

    def complete(self) -> None:
        """Finish the last shard, and say in the manifest that there is no more."""
        self.finish_shard()
        self.progress = replace(self.progress, complete=True)
        self.write_manifest()

    def drop_shard(self) -> None:
        """Forget the rows that wait."""
        if self._shard is not None:
            self._shard.drop()
            self._shard = None

    def write_manifest(self) -> None:
        """Replace the manifest by one that tells the present state."""
        head = {"format": _FORMAT, "format_version": _VERSION, **self._settings}
        write_json_atomic(self._folder / MANIFEST, {**head, **self.progress.to_json()})

    def names(self) -> Iterator[str]:
        """The names of all images that the shards hold."""
        for shard in self.progress.shards:
            yield from names_in(self._folder / shard.file)


class _OpenShard:
    """A shard that is being written beside its place."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.rows = self.errors = 0
        self.classes: Counter[str] = Counter()
        self.place: Place | None = None
        self._file = ExitStack()
        self._sink: Sink = self._file.enter_context(results_file(path, header))

    def write(self, item: JobImage, result: Result) -> None:
        self._sink.write(item.name, result)
        self.rows += 1
        self.place = item.place
        if result.label is not None:
            self.classes[result.label] += 1
        self.errors += result.error is not None

    def close(self) -> None:
        """Flush it to disk and give it its name."""
        self._file.close()

    def drop(self) -> None:
        """Delete it."""
        with suppress(_Dropped, OSError):  # on a full disk the end of a Parquet file cannot be written either
            self._file.__exit__(_Dropped, _Dropped(), None)


class _Dropped(Exception):
    """Passes through :func:`results_file`, which keeps nothing of a block that an exception left."""


@contextmanager
def results_folder(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    header: Header,
    shard_size: int,
    restart: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Iterator[ResultsFolder]:
    """The folder of a job's results, new or as an earlier run of the same job left it.

    Args:
        settings: what the job is told to do, as JSON; the key "shard_format" is their suffix.
        shard_size: rows a shard.
        restart: delete the results of an earlier run.
        check: called before a shard is named in the manifest; what it raises keeps the shard out.

    Raises:
        UsageError: ``folder`` has other files, the results of another job or damaged ones, or another process writes
            to it.
        OSError: the disk is full.
    """
    if shard_size < 1:
        raise UsageError(f"shard size {shard_size}: give a positive number of rows")
    folder.mkdir(parents=True, exist_ok=True)
    told = {**settings, "bundle_digest": header.bundle_digest, "vocabulary_digest": header.vocabulary_digest}
    with locked_folder(folder, "another process writes its results there: wait for it, or stop it"):
        progress = _read_progress(folder, told, restart=restart)
        results = ResultsFolder(
            folder, settings=told, header=header, progress=progress, shard_size=shard_size, check=check
        )
        results.write_manifest()
        _delete_unnamed(folder, progress)
        try:
            yield results
        finally:
            results.drop_shard()


def _read_progress(folder: Path, settings: Mapping[str, Any], *, restart: bool) -> Progress:
    """What an earlier run of the job of ``settings`` left; nothing where there was none, or it is not wanted."""
    path = folder / MANIFEST
    if not path.exists():
        _validate_files(folder, restart=restart)
    if restart or not path.exists():
        return Progress()
    record = read_record(path, record_format=_FORMAT, version=_VERSION, error=DataError, advice=_BEGIN_ANEW)
    for key, value in settings.items():
        if record.get(key) != value:
            raise UsageError(f"{folder}: {key} was {_shown(record.get(key))}, is {_shown(value)}: {_BEGIN_ANEW}")
    progress = _progress_from_record(path, record)
    for shard in progress.shards:
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.size_bytes:
            raise DataError(f"{file}: is missing or not as the job wrote it: {_BEGIN_ANEW}")
    return replace(progress, complete=False)


def _progress_from_record(path: Path, record: Mapping[str, Any]) -> Progress:
    try:
        return Progress.from_json(record)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: {error} is missing or of another kind: {_BEGIN_ANEW}") from error


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _validate_files(folder: Path, *, restart: bool) -> None:
    """Raise :class:`UsageError` for files in a folder that no manifest explains; ``restart`` may delete shards."""
    for name in os.listdir(folder):
        if not _PARTS.fullmatch(name):
            raise UsageError(f"{folder}: holds {name}, which is no result: give a new or empty folder")
        if not restart and not name.startswith("."):
            raise UsageError(f"{folder}: has shards and no {MANIFEST}: {_BEGIN_ANEW}")


def _delete_unnamed(folder: Path, progress: Progress) -> None:
    """Delete shards that the manifest does not name, and what killed runs were writing; the lock keeps theirs out."""
    named = {shard.file for shard in progress.shards}
    for name in os.listdir(folder):
        if _PARTS.fullmatch(name) and name not in named:
            (folder / name).unlink()

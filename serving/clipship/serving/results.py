"""Results of many images in one file: Parquet, JSON lines or CSV.

One row an image: its path and best class, the top k, or an error.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from clipship.core.errors import UsageError
from clipship.core.files import replace_file
from clipship.serving.client import ModelFacts, Result

COLUMNS = ("path", "label", "score", "labels", "scores", "indices", "error")

_ROWS_A_GROUP = 4096
_LISTS = ("labels", "scores", "indices")


class Sink(Protocol):
    """Where results go, one at a time."""

    def write(self, path: Path, result: Result) -> None:
        """Add the result of the image at ``path``."""


@contextmanager
def results_file(out: Path, facts: ModelFacts) -> Iterator[Sink]:
    """A sink that writes ``out``, in the format its suffix names; the file appears when the block ends well.

    Parquet files carry the digests of bundle and vocabulary in their schema's metadata.

    Raises:
        UsageError: an unknown suffix, or ``out`` is a folder.
        OSError: the disk is full, or ``out`` cannot be written; nothing is left under its name.
    """
    writer = _WRITERS.get(out.suffix.lower())
    if writer is None:
        raise UsageError(f"{out}: unknown kind of file: give a name that ends in {', '.join(_WRITERS)}")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder: give a file name")
    with replace_file(out) as temporary, writer(temporary, facts) as sink:
        yield sink


class JsonLinesSink:
    """One JSON object a line."""

    def __init__(self, handle: TextIO) -> None:
        self._handle = handle

    def write(self, path: Path, result: Result) -> None:
        """See :meth:`Sink.write`."""
        self._handle.write(json.dumps(row_from_result(path, result), ensure_ascii=False) + "\n")


class TableSink:
    """Score, class and path in columns, for people."""

    def __init__(self, handle: TextIO) -> None:
        self._handle = handle

    def write(self, path: Path, result: Result) -> None:
        """See :meth:`Sink.write`."""
        name = _text_of_path(path)
        if result.error is not None:
            self._handle.write(f" error  {name}: {result.error}\n")
        else:
            self._handle.write(f"{result.score:6.4f}  {result.label}  {name}\n")


class CsvSink:
    """A header and one line an image; the lists of the top k as JSON."""

    def __init__(self, handle: TextIO) -> None:
        self._rows = csv.writer(handle)
        self._rows.writerow(COLUMNS)

    def write(self, path: Path, result: Result) -> None:
        """See :meth:`Sink.write`."""
        row = row_from_result(path, result)
        for name in _LISTS:
            row[name] = None if row[name] is None else json.dumps(row[name], ensure_ascii=False)
        self._rows.writerow(row.values())


class ParquetSink:
    """Rows gathered into row groups, so that memory stays bounded."""

    def __init__(self, write_rows: Callable[[Mapping[str, list[Any]]], None]) -> None:
        self._write_rows = write_rows
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def write(self, path: Path, result: Result) -> None:
        """See :meth:`Sink.write`."""
        for name, value in row_from_result(path, result).items():
            self._columns[name].append(value)
        if len(self._columns["path"]) >= _ROWS_A_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows gathered so far as one row group."""
        if self._columns["path"]:
            self._write_rows(self._columns)
            self._columns = {name: [] for name in COLUMNS}


def row_from_result(path: Path, result: Result) -> dict[str, Any]:
    """The columns of one image. All but path and error are None for an image that could not be classified."""
    classified = result.error is None
    return {
        "path": _text_of_path(path),
        "label": result.label,
        "score": result.score,
        "labels": list(result.labels) if classified else None,
        "scores": list(result.scores) if classified else None,
        "indices": list(result.indices) if classified else None,
        "error": result.error,
    }


def _text_of_path(path: Path) -> str:
    """The path as text; bytes that are not UTF-8 as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextmanager
def _json_lines(path: Path, facts: ModelFacts) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8") as handle:
        yield JsonLinesSink(handle)


@contextmanager
def _csv(path: Path, facts: ModelFacts) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        yield CsvSink(handle)


@contextmanager
def _parquet(path: Path, facts: ModelFacts) -> Iterator[Sink]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    digests = {"clipship.bundle_digest": facts.bundle_digest, "clipship.vocabulary_digest": facts.vocabulary_digest}
    best = (pa.string(), pa.string(), pa.float32())
    top_k = (pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.int64()))
    schema = pa.schema(list(zip(COLUMNS, (*best, *top_k, pa.string()), strict=True)), metadata=digests)
    with pq.ParquetWriter(path, schema) as writer:
        sink = ParquetSink(lambda columns: writer.write_table(pa.table(columns, schema=schema)))
        yield sink
        sink.flush()


_WRITERS: dict[str, Callable[[Path, ModelFacts], AbstractContextManager[Sink]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".csv": _csv,
}

"""Results of many images in one file: Parquet, JSON lines or CSV.

One row an image: its name and best class, the top k, its features where they are wanted, or an error.
Legend: D values of an image's features.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import UsageError
from clipship.core.files import replace_file
from clipship.serving.client.results import Result

COLUMNS = ("path", "label", "score", "labels", "scores", "indices", "error")
EMBEDDING = "embedding"
"""The column of features, the last where there is one."""

_ROWS_A_GROUP = 4096
_LISTS = ("labels", "scores", "indices", EMBEDDING)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all rows of a file have in common."""

    bundle_digest: str
    vocabulary_digest: str
    embed_dim: int | None = None
    """D; None where features are not stored."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return COLUMNS if self.embed_dim is None else (*COLUMNS, EMBEDDING)


class Sink(Protocol):
    """Where results go, one at a time."""

    def write(self, name: str, result: Result) -> None:
        """Add the result of the image called ``name``."""


@contextmanager
def results_file(out: Path, header: Header) -> Iterator[Sink]:
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
        raise UsageError(f"{out}: is a folder: give a file name, or --format to write shards into it")
    with replace_file(out) as temporary, writer(temporary, header) as sink:
        yield sink


class JsonLinesSink:
    """One JSON object a line."""

    def __init__(self, handle: TextIO, header: Header) -> None:
        self._handle = handle
        self._columns = header.columns

    def write(self, name: str, result: Result) -> None:
        """See :meth:`Sink.write`."""
        row = _json_row(row_from_result(name, result), self._columns)
        self._handle.write(json.dumps(row, ensure_ascii=False) + "\n")


class TableSink:
    """Score, class and name in columns, for people."""

    def __init__(self, handle: TextIO) -> None:
        self._handle = handle

    def write(self, name: str, result: Result) -> None:
        """See :meth:`Sink.write`."""
        shown = _printable(name)
        if result.error is not None:
            self._handle.write(f" error  {shown}: {_printable(result.error)}\n")
        else:
            self._handle.write(f"{result.score:6.4f}  {result.label}  {shown}\n")


class CsvSink:
    """A header and one line an image; lists as JSON."""

    def __init__(self, handle: TextIO, header: Header) -> None:
        self._columns = header.columns
        self._rows = csv.writer(handle)
        self._rows.writerow(self._columns)

    def write(self, name: str, result: Result) -> None:
        """See :meth:`Sink.write`."""
        row = _json_row(row_from_result(name, result), self._columns)
        lists = {
            column: json.dumps(row[column], ensure_ascii=False) for column in _LISTS if row.get(column) is not None
        }
        self._rows.writerow({**row, **lists}.values())


class ParquetSink:
    """Rows gathered into row groups, so that memory stays bounded."""

    def __init__(self, columns: tuple[str, ...], write_rows: Callable[[Mapping[str, list[Any]]], None]) -> None:
        self._write_rows = write_rows
        self._columns: dict[str, list[Any]] = {name: [] for name in columns}

    def write(self, name: str, result: Result) -> None:
        """See :meth:`Sink.write`."""
        row = row_from_result(name, result)
        for column, values in self._columns.items():
            values.append(row[column])
        if len(self._columns["path"]) >= _ROWS_A_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows gathered so far as one row group."""
        if self._columns["path"]:
            self._write_rows(self._columns)
            self._columns = {name: [] for name in self._columns}


def row_from_result(name: str, result: Result) -> dict[str, Any]:
    """The columns of one image. All but path and error are None for an image that could not be classified."""
    classified = result.error is None
    return {
        "path": name,
        "label": result.label,
        "score": result.score,
        "labels": list(result.labels) if classified else None,
        "scores": list(result.scores) if classified else None,
        "indices": list(result.indices) if classified else None,
        "error": result.error,
        EMBEDDING: result.embedding if classified else None,
    }


def _json_row(row: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """The ``columns`` of a row, arrays as lists."""
    return {name: row[name].tolist() if isinstance(row[name], np.ndarray) else row[name] for name in columns}


def _printable(text: str) -> str:
    """``text`` on one line, without what a terminal would obey."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def names_in(file: Path) -> Iterator[str]:
    """The names of the images in a file of results, in its order.

    Raises:
        UsageError: an unknown suffix.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(columns=["path"]):
                yield from batch.column(0).to_pylist()
        return
    with file.open(encoding="utf-8", newline="") as handle:
        rows = csv.DictReader(handle) if suffix == ".csv" else map(json.loads, handle)
        yield from (row["path"] for row in rows)


@contextmanager
def _json_lines(path: Path, header: Header) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8") as handle:
        yield JsonLinesSink(handle, header)


@contextmanager
def _csv(path: Path, header: Header) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        yield CsvSink(handle, header)


@contextmanager
def _parquet(path: Path, header: Header) -> Iterator[Sink]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    digests = {"clipship.bundle_digest": header.bundle_digest, "clipship.vocabulary_digest": header.vocabulary_digest}
    best = (pa.string(), pa.string(), pa.float32())
    top_k = (pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.int64()))
    features = () if header.embed_dim is None else (pa.list_(pa.float32()),)
    types = (*best, *top_k, pa.string(), *features)
    schema = pa.schema(list(zip(header.columns, types, strict=True)), metadata=digests)

    def write_rows(columns: Mapping[str, list[Any]]) -> None:
        arrays = [
            _embedding_array(columns[name]) if name == EMBEDDING else pa.array(columns[name], schema.field(name).type)
            for name in header.columns
        ]
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    with pq.ParquetWriter(path, schema) as writer:
        sink = ParquetSink(header.columns, write_rows)
        yield sink
        sink.flush()


def _embedding_array(rows: Sequence[NDArray[np.float32] | None]) -> Any:
    """Features as an Arrow array of lists of float32, null for images that have none.

    No fixed-size lists: with nulls among them pyarrow writes and reads them from version 25 on only.
    """
    import pyarrow as pa

    known = [row for row in rows if row is not None]
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int32)
    values = np.concatenate([np.empty(0, np.float32), *known])
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values, pa.float32()), mask=missing)


_WRITERS: dict[str, Callable[[Path, Header], AbstractContextManager[Sink]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".csv": _csv,
}
FORMATS = tuple(suffix.removeprefix(".") for suffix in _WRITERS)
"""What results can be written as."""

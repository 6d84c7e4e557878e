"""Results of many images in one file: Parquet, JSON lines or CSV.

One row an image: its name and best class, the top k, its features where they are wanted, or an error.
Legend: D values of an image's features.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clipship.core.errors import UsageError
from clipship.core.files import replace_file
from clipship.serving.client.results import Result

COLUMNS = ("path", "label", "score", "labels", "scores", "indices", "error")
EMBEDDING = "embedding"
"""The column of features, the last where there is one."""

_ROWS_A_GROUP = 4096


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all rows of a file have in common."""

    bundle_digest: str
    vocabulary_digest: str
    embed_dim: int | None = None
    """D; None where features are not stored."""

    @property
    def digests(self) -> dict[str, str]:
        """Of bundle and vocabulary, by name."""
        return {"bundle_digest": self.bundle_digest, "vocabulary_digest": self.vocabulary_digest}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return COLUMNS if self.embed_dim is None else (*COLUMNS, EMBEDDING)


WriteRow = Callable[[str, Result], None]
"""Adds the result of the image of this name."""


def validate_format(out: Path) -> None:
    """Validate that the suffix of ``out`` names a format of results.

    Raises:
        UsageError: it does not.
    """
    if out.suffix.lower() not in _WRITERS:
        raise UsageError(f"{out}: unknown format: give a name that ends in {', '.join(_WRITERS)}")


@contextmanager
def results_file(out: Path, header: Header) -> Iterator[WriteRow]:
    """Write ``out``, in the format that its suffix names; the file appears when the block ends well.

    Parquet files carry the digests of bundle and vocabulary in their schema's metadata.

    Raises:
        UsageError: an unknown suffix, or ``out`` is a folder.
        OSError: the disk is full, or ``out`` cannot be written; nothing is left under its name.
    """
    validate_format(out)
    if out.is_dir():
        raise UsageError(f"{out}: is a folder: give a file name, or --format to write shards into it")
    with replace_file(out) as temporary, _WRITERS[out.suffix.lower()](temporary, header) as write:
        yield write


def json_lines(handle: TextIO, header: Header) -> WriteRow:
    """Writes one JSON object a line."""

    def write(name: str, result: Result) -> None:
        row = _json_row(row_from_result(name, result), header.columns)
        handle.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write


def table_lines(handle: TextIO) -> WriteRow:
    """Writes score, class and name in columns, for people."""

    def write(name: str, result: Result) -> None:
        shown = _printable(name)
        if result.error is not None:
            handle.write(f" error  {shown}: {_printable(result.error)}\n")
        else:
            handle.write(f"{result.score:6.4f}  {result.label}  {shown}\n")

    return write


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
    """``text`` on one line, without a terminal's control characters."""
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
def _json_lines_file(path: Path, header: Header) -> Iterator[WriteRow]:
    with path.open("w", encoding="utf-8") as handle:
        yield json_lines(handle, header)


@contextmanager
def _csv_file(path: Path, header: Header) -> Iterator[WriteRow]:
    """A header and one line an image; lists as JSON."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(header.columns)

        def write(name: str, result: Result) -> None:
            row = _json_row(row_from_result(name, result), header.columns)
            rows.writerow(
                json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in row.values()
            )

        yield write


@contextmanager
def _parquet_file(path: Path, header: Header) -> Iterator[WriteRow]:
    """Row groups of a bounded number of rows, so that memory stays bounded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    best = (pa.string(), pa.string(), pa.float32())
    top_k = (pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.int64()))
    # No fixed-size lists of features: with nulls among them pyarrow writes and reads them from version 25 on only.
    features = () if header.embed_dim is None else (pa.list_(pa.float32()),)
    types = (*best, *top_k, pa.string(), *features)
    digests = {f"clipship.{name}": digest for name, digest in header.digests.items()}
    schema = pa.schema(list(zip(header.columns, types, strict=True)), metadata=digests)
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema))
        rows.clear()

    def write(name: str, result: Result) -> None:
        rows.append(row_from_result(name, result))
        if len(rows) >= _ROWS_A_GROUP:
            flush()

    with pq.ParquetWriter(path, schema) as writer:
        yield write
        if rows:
            flush()


_WRITERS: dict[str, Callable[[Path, Header], AbstractContextManager[WriteRow]]] = {
    ".parquet": _parquet_file,
    ".jsonl": _json_lines_file,
    ".csv": _csv_file,
}

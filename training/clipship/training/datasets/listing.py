"""A CSV or Parquet file that lists images: columns ``path``, ``label`` and, optionally, ``split``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.training.datasets.base import SPLITS, Dataset, DatasetRecord, dataset_from_rows, validate_images
from clipship.training.datasets.folders import split_rows

LIST_SUFFIXES = (".csv", ".parquet")
_NEEDED = ("path", "label")
_TEXT_COLUMNS = (*_NEEDED, "split")

Row = tuple[str, ...]
"""Path, class name and, where the file has that column, split."""


def read_list(path: Path, record: DatasetRecord) -> Dataset:
    """Read a list of images; ``label`` is the class name, paths start from the file's folder or are absolute.

    Without the column ``split`` (train, val or test) the images are split as those of a tree of class folders.
    Classes are in the order of their sorted names, images in that of the rows.

    Raises:
        DataError: not such a file, a missing column, an empty cell, an unknown split, an image that is listed twice or
        is not there; rows are counted from 1, without the header.
    """
    rows = _rows(path)
    _validate_rows(path, rows)
    items = [(path.parent / row[0], row[1]) for row in rows]
    has_split = bool(rows) and len(rows[0]) > len(_NEEDED)
    pairs = list(zip(items, rows, strict=True))
    by_split = {split: [item for item, row in pairs if row[2:] == (split,)] for split in SPLITS}
    names = sorted({name for _, name in items})
    dataset = dataset_from_rows(path, record, by_split if has_split else split_rows(items), names)
    return validate_images(dataset, path.parent, path.name)


def _rows(path: Path) -> list[Row]:
    import pyarrow

    try:
        table = _table(path)
        names = _used_columns(path, table.column_names)
        columns = [table[name].cast(pyarrow.string()).to_pylist() for name in names]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix} ({error}): give a CSV or Parquet file") from error
    return list(zip(*([(cell or "").strip() for cell in column] for column in columns), strict=True))


def _used_columns(path: Path, given: list[str]) -> list[str]:
    absent = [name for name in _NEEDED if name not in given]
    if absent:
        raise DataError(
            f"{path}: no column {absent[0]!r} among {', '.join(given)[:200]}: give path, label, perhaps split"
        )
    twice = [name for name in _TEXT_COLUMNS if given.count(name) > 1]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}: remove one")
    return [name for name in _TEXT_COLUMNS if name in given]


def _table(path: Path) -> Any:
    import pyarrow
    from pyarrow import csv, parquet

    if path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(path) as file:
            return file.read(columns=[name for name in file.schema_arrow.names if name in _TEXT_COLUMNS])
    types = dict.fromkeys(_TEXT_COLUMNS, pyarrow.string())  # a class may be named 007
    return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False))


def _validate_rows(path: Path, rows: list[Row]) -> None:
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        for column, cell in zip(_TEXT_COLUMNS, row, strict=False):
            if not cell:
                raise DataError(f"{path}: row {number} has no {column}: fill the cell or remove the row")
        if len(row) > len(_NEEDED) and row[2] not in SPLITS:
            raise DataError(f"{path}: row {number} has split {row[2]!r}: give {', '.join(SPLITS)}")
        if first_row.setdefault(row[0], number) != number:
            raise DataError(f"{path}: row {number} lists {row[0]} again, as row {first_row[row[0]]}: remove one")

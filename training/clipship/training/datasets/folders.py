"""Any tree with a folder for each class."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from clipship.core.errors import DataError
from clipship.training.datasets.base import SPLITS, Dataset, DatasetRecord, dataset_from_rows, folders_in, images_in
from clipship.training.synthetic_set import TABLE_FILE, UNFINISHED_FILE

SPLIT_SEED = 1
"""Of the split that data without one get; part of what a run has learned from, so never to change."""


def read_tree(folder: Path, record: DatasetRecord) -> Dataset:
    """Read ``CLASS/*.jpg``, split as :func:`split_rows` does, or ``{train,val,test}/CLASS/*.jpg``, val being optional.

    Classes are in the order of their sorted names, ``test`` need not have all that ``train`` has. Hidden files and
    those that are no images are ignored.

    Raises:
        DataError: no class folders, or fewer than two; one without images; ``train`` without ``test``.
    """
    names = _class_folders(folder)
    if not set(names) & {"train", "test"}:
        rows = split_rows(_rows(folder, names))
        return dataset_from_rows(folder, record, rows, names)
    _validate_splits(folder, names)
    given = {split: _rows(folder / split, folders_in(folder / split)) for split in names}
    classes = sorted({name for rows in given.values() for _, name in rows})
    return dataset_from_rows(folder, record, given, classes)


def _class_folders(folder: Path) -> list[str]:
    """Without the synthetic images that clipship writes beside a data set, or is writing."""
    signs = (TABLE_FILE, UNFINISHED_FILE)
    return [name for name in folders_in(folder) if not any((folder / name / sign).is_file() for sign in signs)]


def _validate_splits(folder: Path, names: Iterable[str]) -> None:
    others = sorted(set(names) - set(SPLITS))
    if others:
        raise DataError(f"{folder}: folder {others[0]!r} is beside train or test: give either splits or class folders")
    if "test" not in names:
        raise DataError(f"{folder}: has train but no test: name the folder with the test images test")


def _rows(folder: Path, names: Iterable[str]) -> list[tuple[Path, str]]:
    return [(path, name) for name in names for path in images_in(folder / name)]


def split_rows(rows: Iterable[tuple[Path, str]]) -> dict[str, list[tuple[Path, str]]]:
    """Half of each class to train, a fifth to validate (both rounded down), the rest to test, as the CoOp splits.

    A class is shuffled with a generator of its own, seeded with its name: the split depends on nothing but the class's
    name and the sorted names of its images.
    """
    classes: dict[str, list[Path]] = {}
    for path, name in rows:
        classes.setdefault(name, []).append(path)
    split: dict[str, list[tuple[Path, str]]] = {one: [] for one in SPLITS}
    for name in sorted(classes):
        paths = sorted(classes[name], key=Path.as_posix)
        random.Random(f"{SPLIT_SEED} {name}").shuffle(paths)
        first, second = len(paths) // 2, len(paths) // 2 + len(paths) // 5
        for one, part in zip(SPLITS, (paths[:first], paths[first:second], paths[second:]), strict=True):
            split[one] += [(path, name) for path in sorted(part, key=Path.as_posix)]
    return split

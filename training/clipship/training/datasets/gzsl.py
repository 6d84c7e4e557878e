"""Generalised zero-shot learning on the splits that Xian et al. proposed, as they pack them (xlsa17).

A folder ``awa2``, ``cub`` or ``sun`` holds ``att_splits.mat`` and ``res101.mat`` of that data set, and its images
below ``JPEGImages`` (AWA2) or ``images`` (CUB, SUN), all as their authors pack them::

    awa2/att_splits.mat  res101.mat  JPEGImages/antelope/antelope_10001.jpg
    cub/att_splits.mat   res101.mat  images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg
    sun/att_splits.mat   res101.mat  images/a/abbey/sun_aakbdcgfpksytcwj.jpg
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.errors import DataError, MissingExtraError
from clipship.training.datasets.base import (
    Dataset,
    DatasetRecord,
    LabelledImage,
    needed,
    validate_class_names,
    validate_images,
)

SPLIT_FILE = "att_splits.mat"
IMAGE_FILE = "res101.mat"
_LISTS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")

Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What the two files of a data set hold, numbered from 0."""

    names: list[str]
    """All classes, in the order of the authors."""
    paths: list[Path]
    labels: Positions
    lists: tuple[Positions, ...]
    """Images of trainval_loc, test_seen_loc and test_unseen_loc."""


def read_gzsl(folder: Path, record: DatasetRecord) -> Dataset:
    """Train on trainval_loc, test on test_seen_loc and then test_unseen_loc; there is no validation list.

    Classes get new numbers: the seen ones first, then the unseen ones, each in the order of the authors. Those that
    no list uses are left out.

    Raises:
        DataError: a file or image is missing, or lists that contradict each other.
        MissingExtraError: scipy is not installed.
    """
    files = _files_in(folder, record)
    order, num_seen = _class_order(folder, files)
    class_names = tuple(files.names[label] for label in order)
    validate_class_names(folder / SPLIT_FILE, class_names)
    train, test_seen, test_unseen = (_items(files, one, order) for one in files.lists)
    dataset = Dataset(
        record=record,
        train=train,
        val=(),
        test=test_seen + test_unseen,
        class_names=class_names,
        base_classes=num_seen,
        generalised=True,
    )
    return validate_images(dataset, folder, IMAGE_FILE)


def clean_class_name(name: str) -> str:
    """As a prompt can take it: "grizzly+bear" -> "grizzly bear", "001.Laysan_Albatross" -> "Laysan_Albatross"."""
    return re.sub(r"^\d+\.", "", name).replace("+", " ").strip()


def _files_in(folder: Path, record: DatasetRecord) -> _Files:
    split_path, image_path = folder / SPLIT_FILE, folder / IMAGE_FILE
    splits = _variables(split_path, (*_LISTS, "allclasses_names"), record)
    images = _variables(image_path, ("image_files", "labels"), record)
    names = [clean_class_name(text) for text in _texts(splits["allclasses_names"])]
    paths = [_image_path(image_path, record, text) for text in _texts(images["image_files"])]
    labels = _positions(image_path, "labels", images["labels"], len(names))
    if len(labels) != len(paths):
        raise DataError(f"{image_path}: {len(paths)} image_files but {len(labels)} labels: get it again")
    lists = tuple(_positions(split_path, name, splits[name], len(paths)) for name in _LISTS)
    _validate_lists(split_path, lists)
    return _Files(names=names, paths=paths, labels=labels, lists=lists)


def _items(files: _Files, positions: Positions, order: Sequence[int]) -> tuple[LabelledImage, ...]:
    new_labels = {old: new for new, old in enumerate(order)}
    labelled = ((files.paths[position], int(files.labels[position])) for position in positions)
    return tuple(LabelledImage(path, new_labels[label], files.names[label]) for path, label in labelled)


def _variables(path: Path, names: Sequence[str], record: DatasetRecord) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise MissingExtraError("scipy", "training") from error
    needed(path, record)
    try:
        content = loadmat(path, variable_names=names)  # not the features, which are most of the file
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise DataError(f"{path}: not a MATLAB file ({error}): get it again from {record.source}") from error
    absent = [name for name in names if name not in content]
    if absent:
        raise DataError(f"{path}: no variable {absent[0]}: get it again from {record.source}")
    return dict(content)


def _texts(cells: Any) -> list[str]:
    """A MATLAB cell array of texts, which loads as arrays in an array."""
    return ["".join(str(part) for part in np.ravel(cell)) for cell in np.ravel(cells)]


def _positions(path: Path, name: str, numbers: Any, count: int) -> Positions:
    """MATLAB's numbers from 1 to ``count`` -> int64 from 0."""
    given = np.ravel(numbers)
    is_number = given.dtype.kind in "iuf"
    bad = given[(given < 1) | (given > count) | (given % 1 != 0)] if is_number else given
    if len(bad):
        raise DataError(f"{path}: {name} holds {bad[0]}: it must hold whole numbers from 1 to {count}")
    return given.astype(np.int64) - 1


def _image_path(image_path: Path, record: DatasetRecord, text: str) -> Path:
    """The file of an absolute path on the authors' machine."""
    _, found, relative = text.rpartition(f"/{record.image_dir}/")
    if not found or not relative:
        raise DataError(
            f"{image_path}: {text!r} is no path below {record.image_dir}/: is the file that of {record.name}?"
        )
    return image_path.parent / record.image_dir / relative


def _validate_lists(split_path: Path, lists: Sequence[Positions]) -> None:
    images, times = np.unique(np.concatenate(lists), return_counts=True)
    if len(images) and times.max() > 1:
        twice = int(images[times.argmax()]) + 1
        raise DataError(f"{split_path}: image {twice} is in {', '.join(_LISTS)} more than once: get the file again")


def _class_order(folder: Path, files: _Files) -> tuple[list[int], int]:
    """The authors' labels in their new order, and how many of them are seen."""
    seen, tested, unseen = (set(files.labels[one].tolist()) for one in files.lists)
    astray = sorted((seen & unseen) | (tested - seen))
    if astray:
        raise DataError(
            f"{folder / SPLIT_FILE}: class {files.names[astray[0]]!r} is both seen and unseen: get the file again"
        )
    return [*sorted(seen), *sorted(unseen)], len(seen)

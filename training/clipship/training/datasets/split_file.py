"""The CoOp layout: a ``split_zhou_NAME.json`` with lists "train", "val" and "test" of [path, label, class name]."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.training.datasets.base import (
    SPLITS,
    Dataset,
    DatasetRecord,
    LabelledImage,
    needed,
    validate_class_names,
    validate_images,
)


def read_split_file(folder: Path, record: DatasetRecord) -> Dataset:
    """Read the data set whose split file is in ``folder``.

    Raises:
        DataError: the split file is missing, as :func:`read_split`, or images that are not there.
    """
    split_path = needed(folder / record.split_file, record)
    return validate_images(read_split(split_path, record), folder, record.split_file)


def read_split(split_path: Path, record: DatasetRecord) -> Dataset:
    """Read a split file without looking for its images.

    Raises:
        DataError: not JSON, a list or entry that is not as it should be, or labels and names that contradict each
        other.
    """
    try:
        content = json.loads(split_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{split_path}: not JSON ({error}): get the split file again") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(split), list) for split in SPLITS):
        raise DataError(f"{split_path}: must be an object with the lists train, val and test")
    images = split_path.parent / record.image_dir
    train, val, test = (
        tuple(_item_from_entry(split_path, split, images, entry) for entry in content[split]) for split in SPLITS
    )
    names = _class_names_of(split_path, (*train, *val, *test))
    return Dataset(record=record, train=train, val=val, test=test, class_names=names)


def _item_from_entry(split_path: Path, split: str, images: Path, entry: Any) -> LabelledImage:
    match entry:
        case [str(path), int(label), str(name)] if path and label >= 0 and name.strip():
            return LabelledImage(images / path, label, name)
    raise DataError(
        f"{split_path}: {split} holds {str(entry)[:80]}: each entry must be [path, label from 0, class name]"
    )


def _class_names_of(split_path: Path, items: Sequence[LabelledImage]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for item in items:
        if names.setdefault(item.label, item.class_name) != item.class_name:
            raise DataError(
                f"{split_path}: label {item.label} is both {names[item.label]!r} and {item.class_name!r}: give one name"
            )
    unused = next((label for label in range(len(names)) if label not in names), None)
    if unused is not None:
        raise DataError(
            f"{split_path}: no entry has label {unused}, though the labels go to {max(names)}: "
            "they must be 0, 1, 2, ... without gaps"
        )
    ordered = tuple(names[label] for label in range(len(names)))
    validate_class_names(split_path, ordered)
    return ordered

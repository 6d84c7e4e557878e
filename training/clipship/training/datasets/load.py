"""Data sets: what is published, and a user's own; few-shot samples, base and new classes.

:func:`load_dataset` reads the CoOp layout (KaiyangZhou/CoOp, Dassl.pytorch), the proposed splits of generalised
zero-shot learning, any tree with a folder for each class, and CSV or Parquet lists. The sampling and the halves of
classes are those of the CoOp code base.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from clipship.core.errors import DataError
from clipship.core.files import sha256_of_text
from clipship.training.datasets.aircraft import read_aircraft
from clipship.training.datasets.base import Dataset, DatasetRecord, LabelledImage, Reader, folders_in
from clipship.training.datasets.folders import read_tree
from clipship.training.datasets.gzsl import SPLIT_FILE, read_gzsl
from clipship.training.datasets.imagenet import (
    read_imagenet,
    read_imagenet_numbered,
    read_imagenet_part,
    read_imagenet_test,
)
from clipship.training.datasets.listing import LIST_SUFFIXES, read_list
from clipship.training.datasets.records import PUBLISHED_DATASETS
from clipship.training.datasets.split_file import read_split_file

VAL_SHOTS = 4
"""At most this many validation images a class go with a few-shot sample."""

READERS: dict[Reader, Callable[[Path, DatasetRecord], Dataset]] = {
    "split-file": read_split_file,
    "aircraft": read_aircraft,
    "imagenet": read_imagenet,
    "imagenet-test": read_imagenet_test,
    "imagenet-part": read_imagenet_part,
    "imagenet-numbered": read_imagenet_numbered,
    "gzsl": read_gzsl,
    "tree": read_tree,
    "list": read_list,
}


WORLD_FILE = "world.json"
"""In the folder of a built-in data set: its description, with the prompt template."""
_WORLD_KEYS = ("name", "split_file", "image_dir", "template")


def known_records() -> dict[str, DatasetRecord]:
    """The published data sets that have a split file, by split file."""
    return {record.split_file: record for record in PUBLISHED_DATASETS if record.split_file}


def load_dataset(path: Path) -> Dataset:
    """Read a data set: a folder, or a CSV or Parquet list.

    A folder with a ``split_zhou_NAME.json`` is in the CoOp layout. One without is a published data set if it has the
    name that the CoOp code base gives it (``dtd``, ``fgvc_aircraft``, ``imagenet-sketch``; ``awa2``, ``cub`` and
    ``sun`` for the proposed zero-shot splits), or the files that identify it. Anything else is a tree with a folder for
    each class. What is not published has the template "a photo of a {}.". ``train`` may be empty.

    Raises:
        DataError: nothing there, a file or folder that is missing (with where to get it), or a malformed one.
        MissingExtraError: a package that the layout needs is not installed.
    """
    record = _record_of_folder(path) if path.is_dir() else _record_of_list(path)
    return READERS[record.reader](path, record)


def _record_of_list(path: Path) -> DatasetRecord:
    if not path.exists():
        raise DataError(f"{path}: no such folder or file: give a data set, or write the built-in ones: clipship world")
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise DataError(
            f"{path}: not a list of images: give a folder or a file that ends in {', '.join(LIST_SUFFIXES)}"
        )
    return DatasetRecord(name=path.stem, reader="list")


def _record_of_folder(folder: Path) -> DatasetRecord:
    split_file = _split_file_in(folder)
    if split_file is not None:
        return known_records().get(split_file.name) or _world_record(split_file) or _unknown_record(split_file)
    name = folder.absolute().name
    for record in PUBLISHED_DATASETS:
        if name in record.folders:
            return record
    for record in PUBLISHED_DATASETS:
        if record.marks and all((folder / mark).exists() for mark in record.marks):
            return record
    _validate_tree(folder)
    return DatasetRecord(name=name, reader="tree")


def _validate_tree(folder: Path) -> None:
    if (folder / SPLIT_FILE).exists():
        names = ", ".join(record.folders[0] for record in PUBLISHED_DATASETS if record.reader == "gzsl")
        raise DataError(
            f"{folder}: has {SPLIT_FILE}, but which data set it is of is not known: name the folder {names}"
        )
    if not folders_in(folder):
        raise DataError(
            f"{folder}: no split_zhou_*.json and no class folders in it: "
            "give the folder of one data set, or a CSV or Parquet list of images"
        )


def _split_file_in(folder: Path) -> Path | None:
    found = sorted(folder.glob("split_zhou_*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: several split files ({names}): keep one")
    return found[0] if found else None


def _world_record(split_path: Path) -> DatasetRecord | None:
    """The built-in data set that :data:`WORLD_FILE` beside the split file describes; None where there is no such file.

    Raises:
        DataError: the file does not describe this data set.
    """
    path = split_path.parent / WORLD_FILE
    if not path.is_file():
        return None
    try:
        given = json.loads(path.read_text(encoding="utf-8"))["dataset"]
        name, split_file, image_dir, template = (str(given[key]) for key in _WORLD_KEYS)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: describes no built-in data set: write it again with clipship world") from error
    if split_file != split_path.name:
        raise DataError(f"{path}: names {split_file}, not {split_path.name}: write it again with clipship world")
    return DatasetRecord(name=name, split_file=split_file, image_dir=image_dir, template=template)


def _unknown_record(split_path: Path) -> DatasetRecord:
    has_images = (split_path.parent / "images").is_dir()
    return DatasetRecord(
        name=split_path.stem.removeprefix("split_zhou_"),
        split_file=split_path.name,
        image_dir="images" if has_images else ".",
    )


def few_shot(dataset: Dataset, shots: int, seed: int) -> tuple[tuple[LabelledImage, ...], tuple[LabelledImage, ...]]:
    """``shots`` training and at most 4 validation images a class, equal to the lists published for CoOp.

    Python's generator is seeded with ``seed``; classes are taken in the order in which they first occur; train comes
    before val. The sample covers base and new classes, though only base classes are learned from; a new class may have
    fewer images, or none. 0 shots are all images, to train and to validate, in the order of the lists.

    Raises:
        DataError: no training images, or a base class has fewer than ``shots``, or none.
    """
    if not dataset.train:
        raise DataError(f"{dataset.record.name} has no training images: it is for testing only, learn from another")
    counts = Counter(item.label for item in dataset.train)
    for label, name in enumerate(dataset.class_names[: dataset.num_base]):
        if counts[label] < max(shots, 1):
            raise DataError(f"class {name!r} has {counts[label]} training images, {shots} are needed: lower --shots")
    if not shots:
        return dataset.train, dataset.val
    generator = random.Random(seed)
    train = _sampled(dataset.train, shots, generator)
    return train, _sampled(dataset.val, min(shots, VAL_SHOTS), generator)


def _sampled(items: Sequence[LabelledImage], count: int, generator: random.Random) -> tuple[LabelledImage, ...]:
    groups: dict[int, list[LabelledImage]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    picked = (generator.sample(group, count) if len(group) >= count else group for group in groups.values())
    return tuple(item for group in picked for item in group)


def digest_of_items(items: Sequence[LabelledImage]) -> str:
    """SHA-256 over the items' file names, labels and class names in order: what a run has learned from."""
    return sha256_of_text(json.dumps([[item.path.name, item.label, item.class_name] for item in items]))

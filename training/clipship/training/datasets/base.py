"""A data set, the record of a published one, and what the readers share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipship.core.errors import DataError
from clipship.core.images.files import IMAGE_SUFFIXES, is_image_name
from clipship.core.vocabulary import DEFAULT_TEMPLATES
from clipship.training.methods.base import Task

SPLITS = ("train", "val", "test")

Reader = Literal[
    "split-file", "aircraft", "imagenet", "imagenet-test", "imagenet-part", "imagenet-numbered", "gzsl", "tree", "list"
]


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What is known of a data set beyond its files."""

    name: str
    reader: Reader = "split-file"
    split_file: str = ""
    """For the reader "split-file"."""
    folders: tuple[str, ...] = ()
    """Folder names that identify this data set."""
    marks: tuple[str, ...] = ()
    """Paths that together identify this data set in a folder of another name."""
    image_dir: str = "."
    """Folder below the data set's that paths and class folders start from."""
    template: str = DEFAULT_TEMPLATES[0]
    source: str = ""
    """Where to get it, for error messages."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One labelled image."""

    path: Path
    label: int
    class_name: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set on disk.

    Raises:
        DataError: ``base_classes`` is not a number from 1 to the number of classes.
    """

    record: DatasetRecord
    train: tuple[LabelledImage, ...]
    """Empty where a data set is for testing only."""
    val: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    class_names: tuple[str, ...]
    """In the order of the labels, underscores as on disk."""
    base_classes: int | None = None
    """How many classes, from the first, are base classes; None for the first half, rounded up."""
    generalised: bool = False
    """Generalised zero-shot: scored a class at a time among all names, base being seen and new unseen."""

    def __post_init__(self) -> None:
        if self.base_classes is not None and not 1 <= self.base_classes <= len(self.class_names):
            raise DataError(
                f"{self.record.name}: {self.base_classes} base classes requested: "
                f"give 1 to {len(self.class_names)}, the number of its classes"
            )

    @property
    def num_base(self) -> int:
        """How many classes, from the first, are base classes."""
        return base_new_split(len(self.class_names)) if self.base_classes is None else self.base_classes

    @property
    def task(self) -> Task:
        """What a method is built for."""
        return Task(class_names=self.class_names, num_base=self.num_base, templates=(self.record.template,))

    def items(self, split: str) -> tuple[LabelledImage, ...]:
        """The items of "train", "val" or "test"."""
        assert split in SPLITS
        found: tuple[LabelledImage, ...] = getattr(self, split)
        return found


def base_new_split(num_classes: int) -> int:
    """How many of ``num_classes`` are base classes: the first half, rounded up."""
    return (num_classes + 1) // 2


Rows = Mapping[str, Sequence[tuple[Path, str]]]
"""By split: path and class name."""


def dataset_from_rows(where: Path, record: DatasetRecord, rows: Rows, class_names: Sequence[str]) -> Dataset:
    """Number the classes in the order of ``class_names``; ``where`` is named in errors.

    Raises:
        DataError: as :func:`validate_class_names`.
    """
    validate_class_names(where, class_names)
    labels = {name: label for label, name in enumerate(class_names)}
    train, val, test = (
        tuple(LabelledImage(path, labels[name], name) for path, name in rows.get(one, ())) for one in SPLITS
    )
    return Dataset(record=record, train=train, val=val, test=test, class_names=tuple(class_names))


def validate_class_names(where: Path, names: Sequence[str]) -> None:
    """Validate the class names of a data set.

    Raises:
        DataError: fewer than two names, an empty one, or two that give the same prompt (CLIP reads lower case).
    """
    if len(names) < 2:
        raise DataError(f"{where}: {len(names)} classes ({', '.join(names) or 'none'}): there must be at least 2")
    seen: dict[str, str] = {}
    for name in names:
        words = " ".join(name.replace("_", " ").split()).casefold()
        if not words:
            raise DataError(f"{where}: a class name is {name!r}: give each class a name")
        if words in seen:
            raise DataError(
                f"{where}: the class names {seen[words]!r} and {name!r} give the same prompt: rename one of them"
            )
        seen[words] = name


def needed(path: Path, record: DatasetRecord) -> Path:
    """``path``, which the data set requires.

    Raises:
        DataError: it does not exist.
    """
    if path.exists():
        return path
    rename = f"; if this is other data, give its folder another name than {', '.join(record.folders)}"
    raise DataError(
        f"{path} is missing, {record.name} needs it: get it from {record.source}{rename if record.folders else ''}"
    )


def lines_of(path: Path, record: DatasetRecord) -> list[str]:
    """The lines of a text file that the data set needs, stripped, without blank ones.

    Raises:
        DataError: it is missing or no text.
    """
    try:
        content = needed(path, record).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}): get it again from {record.source}") from error
    return [line.strip() for line in content.splitlines() if line.strip()]


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def images_in(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, sorted by name, without hidden ones.

    Raises:
        DataError: there are none.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _is_image(entry))
    if not names:
        raise DataError(
            f"{folder}: no images directly in this class folder (names ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}): put some there or remove it"
        )
    return [folder / name for name in names]


def _is_image(entry: os.DirEntry[str]) -> bool:
    return is_image_name(entry.name) and not entry.name.startswith(".") and entry.is_file()


def validate_images(dataset: Dataset, folder: Path, listing: str) -> Dataset:
    """``dataset``, after checking that the images named by the file ``listing`` in ``folder`` exist.

    Raises:
        DataError: images that are not there.
    """
    missing = _missing([item.path for split in SPLITS for item in dataset.items(split)])
    if missing:
        source = f", from {dataset.record.source}" if dataset.record.source else ""
        raise DataError(
            f"{folder}: {len(missing)} of the images named in {listing} are not there, "
            f"the first is {missing[0]}: put the images where {listing} names them{source}"
        )
    return dataset


def _missing(paths: Iterable[Path]) -> list[Path]:
    """Those that are no files. Listing every folder once is far quicker than a stat of every file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder] and not path.is_file():  # a disk may hold several spellings of one name
            missing.append(path)
    return missing

"""Data sets in the CoOp layout: split files, few-shot samples, base and new classes.

The layout, the sampling and the splits are those of the CoOp code base (KaiyangZhou/CoOp, Dassl.pytorch): a
``split_zhou_NAME.json`` with the lists "train", "val" and "test" of ``[path, label, class name]``.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipship.core.errors import DataError
from clipship.core.files import sha256_of_text
from clipship.core.vocabulary import DEFAULT_TEMPLATES
from clipship.training.methods.base import Task

SPLITS = ("train", "val", "test")
VAL_SHOTS = 4
"""At most this many validation images a class go with a few-shot sample."""


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What a split file does not say about its data set."""

    name: str
    split_file: str
    image_dir: str
    """Folder below the data set's that the paths in the split file start from."""
    template: str = "a photo of a {}."


PUBLISHED_DATASETS = (
    DatasetRecord(name="Caltech101", split_file="split_zhou_Caltech101.json", image_dir="101_ObjectCategories"),
    DatasetRecord(
        name="OxfordPets",
        split_file="split_zhou_OxfordPets.json",
        image_dir="images",
        template="a photo of a {}, a type of pet.",
    ),
    DatasetRecord(name="StanfordCars", split_file="split_zhou_StanfordCars.json", image_dir="."),
    DatasetRecord(
        name="OxfordFlowers",
        split_file="split_zhou_OxfordFlowers.json",
        image_dir="jpg",
        template="a photo of a {}, a type of flower.",
    ),
    DatasetRecord(
        name="Food101",
        split_file="split_zhou_Food101.json",
        image_dir="images",
        template="a photo of {}, a type of food.",
    ),
    DatasetRecord(name="SUN397", split_file="split_zhou_SUN397.json", image_dir="SUN397"),
    DatasetRecord(
        name="DescribableTextures",
        split_file="split_zhou_DescribableTextures.json",
        image_dir="images",
        template="{} texture.",
    ),
    DatasetRecord(
        name="EuroSAT",
        split_file="split_zhou_EuroSAT.json",
        image_dir="2750",
        template="a centered satellite photo of {}.",
    ),
    DatasetRecord(
        name="UCF101",
        split_file="split_zhou_UCF101.json",
        image_dir="UCF-101-midframes",
        template="a photo of a person doing {}.",
    ),
)


@dataclass(frozen=True)
class Item:
    """One labelled image."""

    path: Path
    label: int
    class_name: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set on disk."""

    record: DatasetRecord
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    class_names: tuple[str, ...]
    """In the order of the labels, underscores as in the split file."""

    @property
    def num_base(self) -> int:
        """How many classes, from the first, are base classes."""
        return base_new_split(len(self.class_names))

    @property
    def task(self) -> Task:
        """What a method is built for."""
        return Task(class_names=self.class_names, num_base=self.num_base, templates=(self.record.template,))

    def items(self, split: str) -> tuple[Item, ...]:
        """The items of "train", "val" or "test"."""
        assert split in SPLITS
        found: tuple[Item, ...] = getattr(self, split)
        return found


def base_new_split(num_classes: int) -> int:
    """How many of ``num_classes`` are base classes: the first half, rounded up."""
    return (num_classes + 1) // 2


def known_records() -> dict[str, DatasetRecord]:
    """The published data sets and the built-in ones, by split file."""
    from clipship.training.world.datasets import WORLD_DATASETS

    world = (
        DatasetRecord(name=one.name, split_file=one.split_file, image_dir=one.image_dir, template=one.template)
        for one in WORLD_DATASETS
    )
    return {record.split_file: record for record in (*PUBLISHED_DATASETS, *world)}


def load_dataset(folder: Path) -> Dataset:
    """Read the data set in ``folder``; an unknown split file gets the template "a photo of a {}.".

    Raises:
        DataError: no folder, no or several split files, a malformed one, or images that are not there.
    """
    split_path = _split_file_in(folder)
    record = known_records().get(split_path.name) or _unknown_record(split_path)
    dataset = read_split(split_path, record)
    missing = [item.path for split in SPLITS for item in dataset.items(split) if not item.path.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of the images named in {split_path.name} are not there, "
            f"the first is {missing[0]}: put the images where the split file names them"
        )
    return dataset


def _split_file_in(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: give a data set, or write the built-in ones with clipship world")
    found = sorted(folder.glob("split_zhou_*.json"))
    if not found:
        raise DataError(f"{folder}: no split_zhou_*.json in it: give the folder of one data set in the CoOp layout")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: several split files ({names}): keep one")
    return found[0]


def _unknown_record(split_path: Path) -> DatasetRecord:
    has_images = (split_path.parent / "images").is_dir()
    return DatasetRecord(
        name=split_path.stem.removeprefix("split_zhou_"),
        split_file=split_path.name,
        image_dir="images" if has_images else ".",
        template=DEFAULT_TEMPLATES[0],
    )


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
    lists = {
        split: tuple(_item_from_entry(split_path, split, images, one) for one in content[split]) for split in SPLITS
    }
    if not lists["train"]:
        raise DataError(f"{split_path}: the list train is empty: give a split with training images")
    names = _class_names_of(split_path, [item for split in SPLITS for item in lists[split]])
    return Dataset(record=record, train=lists["train"], val=lists["val"], test=lists["test"], class_names=names)


def _item_from_entry(split_path: Path, split: str, images: Path, entry: Any) -> Item:
    match entry:
        case [str(path), int(label), str(name)] if path and label >= 0 and name.strip():
            return Item(images / path, label, name)
    raise DataError(
        f"{split_path}: {split} holds {str(entry)[:80]}: each entry must be [path, label from 0, class name]"
    )


def _class_names_of(split_path: Path, items: Sequence[Item]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for item in items:
        if names.setdefault(item.label, item.class_name) != item.class_name:
            raise DataError(
                f"{split_path}: label {item.label} is both {names[item.label]!r} and {item.class_name!r}: give one name"
            )
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise DataError(f"{split_path}: labels are {sorted(names)[:5]}...: they must be 0, 1, 2, ... without gaps")
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise DataError(f"{split_path}: class name {repeated[0]!r} has several labels: give each class its own name")
    return tuple(names[label] for label in range(len(names)))


def few_shot(dataset: Dataset, shots: int, seed: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """``shots`` training and at most 4 validation images a class, equal to the lists published for CoOp.

    Python's generator is seeded with ``seed``; classes are taken in the order in which they first occur; train comes
    before val. The sample covers base and new classes, though only base classes are learned from; a new class may have
    fewer images, or none.

    Raises:
        DataError: a base class has fewer training images than ``shots``.
    """
    counts = Counter(item.label for item in dataset.train)
    for label, name in enumerate(dataset.class_names[: dataset.num_base]):
        if counts[label] < shots:
            raise DataError(f"class {name!r} has {counts[label]} training images, {shots} are asked for: lower --shots")
    generator = random.Random(seed)
    train = _sampled(dataset.train, shots, generator)
    return train, _sampled(dataset.val, min(shots, VAL_SHOTS), generator)


def _sampled(items: Sequence[Item], count: int, generator: random.Random) -> tuple[Item, ...]:
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    picked = (generator.sample(group, count) if len(group) >= count else group for group in groups.values())
    return tuple(item for group in picked for item in group)


def digest_of_items(items: Sequence[Item]) -> str:
    """SHA-256 over the items' file names and labels in order: what a run has learned from."""
    return sha256_of_text(json.dumps([[item.path.name, item.label] for item in items]))

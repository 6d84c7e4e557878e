"""ImageNet and its four variants: class folders named by WordNet IDs, and ``classnames.txt`` with a name for each.

Images are taken in the order of their sorted names. CoOp takes them as the directory lists them, which differs from
machine to machine, so its few-shot samples of ImageNet cannot be reproduced; these are the same everywhere.

The published ``classnames.txt`` has two names twice (missile, sunglasses). From the second time on a name gets an
underscore at its end: names become distinct, and prompts keep the very tokens they have in CoOp, because an underscore
is a space in a prompt and CLIP's tokenizer drops spaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from clipship.core.errors import DataError
from clipship.training.datasets.base import (
    Dataset,
    DatasetRecord,
    LabelledImage,
    folders_in,
    images_in,
    lines_of,
    needed,
)

CLASS_NAMES = "classnames.txt"

Classes = Mapping[str, str]
"""Folder -> class name, in the order of the labels."""


def read_imagenet(folder: Path, record: DatasetRecord) -> Dataset:
    """Read ImageNet: ``images/{train,val}/WNID/``, all classes of ``classnames.txt`` ordered by WordNet ID.

    It is tested on ``images/val``, which is its validation list too, as in CoOp. Without ``images/train`` it is for
    testing only.

    Raises:
        DataError: a file or folder is missing or empty, or a folder is not in ``classnames.txt``.
    """
    known, images = _known_classes(folder, record), folder / record.image_dir
    classes = {wnid: known[wnid] for wnid in sorted(known)}
    test = _items(images / "val", classes, record)
    train = _items(images / "train", classes, record) if (images / "train").is_dir() else ()
    return Dataset(record=record, train=train, val=test, test=test, class_names=tuple(classes.values()))


def read_imagenet_test(folder: Path, record: DatasetRecord) -> Dataset:
    """Read ImageNet-Sketch, for testing only: ``images/WNID/``, classes as those of ImageNet.

    Raises:
        DataError: as :func:`read_imagenet`.
    """
    known = _known_classes(folder, record)
    return _test_only(folder, record, {wnid: known[wnid] for wnid in sorted(known)})


def read_imagenet_part(folder: Path, record: DatasetRecord) -> Dataset:
    """Read ImageNet-A or ImageNet-R, for testing only: the classes are those that have a folder ``imagenet-a/WNID/``.

    Raises:
        DataError: as :func:`read_imagenet`.
    """
    known, images = _known_classes(folder, record), needed(folder / record.image_dir, record)
    wnids = folders_in(images)
    _validate_folders(images, wnids, known)
    return _test_only(folder, record, {wnid: known[wnid] for wnid in wnids})


def read_imagenet_numbered(folder: Path, record: DatasetRecord) -> Dataset:
    """Read ImageNetV2, for testing only: folder K holds the images of line K + 1 of ``classnames.txt``.

    Raises:
        DataError: as :func:`read_imagenet`.
    """
    names = _known_classes(folder, record).values()
    return _test_only(folder, record, {str(number): name for number, name in enumerate(names)})


def _test_only(folder: Path, record: DatasetRecord, classes: Classes) -> Dataset:
    items = _items(folder / record.image_dir, classes, record)
    return Dataset(record=record, train=(), val=(), test=items, class_names=tuple(classes.values()))


def _known_classes(folder: Path, record: DatasetRecord) -> dict[str, str]:
    """The lines of ``classnames.txt``."""
    path, classes = folder / CLASS_NAMES, dict[str, str]()
    times: Counter[str] = Counter()
    for line in lines_of(path, record):
        wnid, _, name = line.partition(" ")
        if not name.strip() or wnid in classes:
            raise DataError(f"{path}: {line[:80]!r} has no name or comes twice: a line must be WNID CLASS NAME")
        classes[wnid] = name.strip() + "_" * times[name.strip()]
        times[name.strip()] += 1
    return classes


def _items(images: Path, classes: Classes, record: DatasetRecord) -> tuple[LabelledImage, ...]:
    """The images of all ``classes``, numbered in their order."""
    _validate_folders(images, folders_in(needed(images, record)), classes)
    if len(classes) < 2:
        raise DataError(f"{images}: {len(classes)} classes: there must be at least 2")
    return tuple(
        LabelledImage(path, label, name)
        for label, (folder, name) in enumerate(classes.items())
        for path in images_in(needed(images / folder, record))
    )


def _validate_folders(images: Path, folders: Iterable[str], known: Classes) -> None:
    unknown = [name for name in folders if name not in known]
    if unknown:
        raise DataError(f"{images / unknown[0]} has no line in {CLASS_NAMES}: remove the folder or add the line")

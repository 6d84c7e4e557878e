"""FGVC Aircraft as its authors pack it: class names in variants.txt, a text file for each list."""

from __future__ import annotations

from pathlib import Path

from clipship.core.errors import DataError
from clipship.training.datasets.base import SPLITS, Dataset, DatasetRecord, dataset_from_rows, lines_of, validate_images


def read_aircraft(folder: Path, record: DatasetRecord) -> Dataset:
    """Read "ID CLASS NAME" lines of ``images_variant_{train,val,test}.txt``; the images are ``images/ID.jpg``.

    Labels follow the lines of ``variants.txt``.

    Raises:
        DataError: a file or image is missing, or a line that is not as it should be.
    """
    names = lines_of(folder / "variants.txt", record)
    images = folder / record.image_dir
    rows = {split: _rows(folder / f"images_variant_{split}.txt", images, names, record) for split in SPLITS}
    dataset = dataset_from_rows(folder / "variants.txt", record, rows, names)
    return validate_images(dataset, folder, "images_variant_{train,val,test}.txt")


def _rows(path: Path, images: Path, names: list[str], record: DatasetRecord) -> list[tuple[Path, str]]:
    known, rows = set(names), []
    for line in lines_of(path, record):
        image, _, name = line.partition(" ")
        if name not in known:
            raise DataError(f"{path}: {line[:80]!r} names no class of variants.txt: a line must be ID CLASS NAME")
        rows.append((images / f"{image}.jpg", name))
    return rows

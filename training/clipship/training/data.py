"""Data sets in the CoOp layout: split files, few-shot samples, base and new classes, training batches.

The layout, the sampling and the splits are those of the CoOp code base (KaiyangZhou/CoOp, Dassl.pytorch): a
``split_zhou_NAME.json`` with the lists "train", "val" and "test" of ``[path, label, class name]``.

Shapes: B images of a batch, H = W pixels.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.files import sha256_of_text
from clipship.core.images import ImageDecodeError, ImageSpec, decode_image, pixels_from_image
from clipship.core.progress import progress
from clipship.core.vocabulary import DEFAULT_TEMPLATES
from clipship.training.config import TrainConfig
from clipship.training.methods.base import Batch, Task

if TYPE_CHECKING:
    from clipship.training.synthetic import SyntheticSet

SPLITS = ("train", "val", "test")
VAL_SHOTS = 4
"""At most this many validation images a class go with a few-shot sample."""

_CACHE_BYTES = 1 << 30
_ASPECT = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


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


def synthetic_paths(synthetic: SyntheticSet, class_names: Sequence[str]) -> tuple[tuple[Path, ...], ...]:
    """The kept images of each class, in the order of ``class_names``.

    Raises:
        DataError: a class has none.
    """
    missing = [name for name in class_names if name not in synthetic.class_names or not synthetic.kept(name)]
    if missing:
        raise DataError(
            f"the synthetic set has no images of {len(missing)} classes, the first is {missing[0]!r}: "
            "write it for all class names of the data set, base and new"
        )
    return tuple(tuple(image.path for image in synthetic.kept(name)) for name in class_names)


def decoded(path: Path) -> Image.Image:
    """The image at ``path``, upright RGB.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        return decode_image(path.read_bytes())
    except ImageDecodeError as error:
        raise DataError(f"{path}: {error}: replace the image, or take it out of the split file") from error


def evaluation_pixels(paths: Sequence[Path], spec: ImageSpec) -> torch.Tensor:
    """uint8 [B, H, W, 3]: resize and centre crop, as the server does it.

    Raises:
        DataError: an image cannot be decoded.
    """
    return torch.from_numpy(np.stack([pixels_from_image(decoded(path), spec) for path in paths]))


class ImageCache:
    """Decoded images, kept until a gigabyte is full."""

    def __init__(self, limit_bytes: int = _CACHE_BYTES) -> None:
        self._left = limit_bytes
        self._images: dict[Path, Image.Image] = {}

    def preload(self, paths: Sequence[Path]) -> None:
        """Decode every image once, so that a bad file stops a run before it starts.

        Raises:
            DataError: an image cannot be decoded.
        """
        with ThreadPoolExecutor() as pool, progress("reading images", len(paths)) as report:
            for done, (path, image) in enumerate(zip(paths, pool.map(decoded, paths), strict=True), start=1):
                self._keep(path, image)
                report(done, "")

    def image(self, path: Path) -> Image.Image:
        """The image at ``path``, upright RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        return self._images.get(path) or decoded(path)

    def _keep(self, path: Path, image: Image.Image) -> None:
        size = image.width * image.height * 3
        if path not in self._images and size <= self._left:
            self._left -= size
            self._images[path] = image


def crop_box(width: int, height: int, min_share: float, generator: random.Random) -> tuple[int, int, int, int]:
    """A random (left, top, right, bottom) as torchvision's ``RandomResizedCrop`` draws it.

    The area is uniform between ``min_share`` and all of the image's, the aspect ratio log-uniform between 3:4 and 4:3;
    after ten boxes that do not fit, the largest central one of an allowed ratio.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * generator.uniform(min_share, 1.0)
        ratio = math.exp(generator.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = generator.randint(0, width - crop_width), generator.randint(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    ratio = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def training_pixels(image: Image.Image, size_px: int, config: TrainConfig, key: str) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: a random crop, resized, perhaps mirrored; equal keys give equal pixels."""
    generator = random.Random(key)
    box = crop_box(image.width, image.height, config.min_crop, generator)
    cropped = image.crop(box).resize((size_px, size_px), Image.Resampling.BICUBIC)
    if config.flip and generator.random() < 0.5:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(cropped)


class Epoch(torch.utils.data.Dataset[Batch]):
    """The batches of one epoch, uint8 pixels [B, H, W, 3]. Every draw is keyed by seed, epoch and position.

    With synthetic images each real one comes with a synthetic one of its class, and with one of a random new class.
    """

    def __init__(
        self,
        items: Sequence[Item],
        synthetic: Sequence[Sequence[Path]],
        *,
        num_base: int,
        config: TrainConfig,
        size_px: int,
        cache: ImageCache,
        epoch: int,
    ) -> None:
        self._items = list(items)
        self._synthetic = synthetic
        self._num_base = num_base
        self._config = config
        self._size_px = size_px
        self._cache = cache
        self._key = f"{config.seed} {epoch}"
        random.Random(f"{self._key} order").shuffle(self._items)

    def __len__(self) -> int:
        return max(1, len(self._items) // self._config.batch_size)

    def __getitem__(self, step: int) -> Batch:
        size = self._config.batch_size
        items = self._items[step * size : (step + 1) * size]
        generator = random.Random(f"{self._key} step {step}")
        seen = [generator.choice(self._synthetic[item.label]) for item in items] if self._synthetic else []
        new = range(self._num_base, len(self._synthetic))
        labels = [generator.choice(new) for _ in items] if new else []
        unseen = [generator.choice(self._synthetic[label]) for label in labels]
        paths = [item.path for item in items]
        return Batch(
            pixels=self._pixels(paths, f"{self._key} {step} real"),
            labels=torch.tensor([item.label for item in items]),
            files=tuple(str(path) for path in (*paths, *seen, *unseen)),
            seen=self._synthetic_pixels(seen, f"{step} seen") if seen else None,
            unseen=self._synthetic_pixels(unseen, f"{step} unseen") if unseen else None,
            unseen_labels=torch.tensor(labels) if unseen else None,
        )

    def _synthetic_pixels(self, paths: Sequence[Path], draw: str) -> torch.Tensor:
        """Unless the recipe redraws them, a synthetic image has one crop for the whole run."""
        if self._config.redraw_synthetic:
            return self._pixels(paths, f"{self._key} {draw}")
        key = f"{self._config.seed} once"
        return torch.from_numpy(np.stack([self._one(path, f"{key} {path.name}") for path in paths]))

    def _pixels(self, paths: Sequence[Path], key: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._one(path, f"{key} {place}") for place, path in enumerate(paths)]))

    def _one(self, path: Path, key: str) -> NDArray[np.uint8]:
        return training_pixels(self._cache.image(path), self._size_px, self._config, key)

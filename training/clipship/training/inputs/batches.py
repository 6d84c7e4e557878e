"""Training batches: decoded images, random crops, the order of an epoch. Every draw is keyed, none is global.

Shapes: B images of a batch, H = W pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipship.core.errors import DataError
from clipship.core.images.decoding import ImageDecodeError, ImageSpec, decode_image, pixels_from_image
from clipship.core.progress import progress
from clipship.training.config import TrainConfig
from clipship.training.datasets.base import LabelledImage
from clipship.training.methods.base import Batch, ImageSet, Partners

_CACHE_BYTES = 1 << 30
_ASPECT = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


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
        if path not in self._images:
            image = decoded(path)
            self._keep(path, image)
            return image
        return self._images[path]

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


def training_view(
    images: ImageCache, path: Path, position: int, size_px: int, config: TrainConfig, epoch: int
) -> torch.Tensor:
    """uint8 [H, W, 3]: the crop that the few-shot image at ``position`` has in ``epoch``."""
    key = f"{config.seed} {epoch} {position} real"
    return torch.from_numpy(training_pixels(images.image(path), size_px, config, key))


def views_of(config: TrainConfig, epoch: int) -> int:
    """The epoch whose crops ``epoch`` learns from: its own, or one of the first ``feature_views``."""
    return epoch if config.feature_views == 0 else 1 + (epoch - 1) % config.feature_views


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a step learns from, before any image is read."""

    positions: tuple[int, ...]
    """Of real images in the few-shot list."""
    rows: tuple[int, ...] = ()
    """Which of them have a synthetic partner."""
    partners: tuple[Path, ...] = ()
    new: tuple[Path, ...] = ()
    """Synthetic images of classes that have no real ones."""
    new_labels: tuple[int, ...] = ()


@dataclass(eq=False)
class Epoch(torch.utils.data.Dataset[Batch]):
    """The batches of one epoch. Every draw is keyed by seed, epoch and position, so any step can be made again.

    With synthetic images each real one comes with a synthetic one of its class, if there is any, and with one of a
    random new class of those that have some.
    """

    items: Sequence[LabelledImage]
    synthetic: Sequence[Sequence[Path]]
    """By class; empty: no synthetic images."""
    _: KW_ONLY
    num_base: int
    config: TrainConfig
    size_px: int
    cache: ImageCache
    epoch: int
    features: torch.Tensor | None = None
    """[N, D] of the items in this epoch; None: batches hold uint8 pixels [B, H, W, 3]."""
    num_classes: int = 0

    def __post_init__(self) -> None:
        self._new = [label for label in range(self.num_base, len(self.synthetic)) if self.synthetic[label]]
        self._key = f"{self.config.seed} {self.epoch}"
        self._order = list(range(len(self.items)))
        random.Random(f"{self._key} order").shuffle(self._order)

    def __len__(self) -> int:
        images = len(self.items) or self.num_classes * self.config.shots  # as many where all features are generated
        return max(1, images // self.config.batch_size)

    def __getitem__(self, step: int) -> Batch:
        draw = self.draw(step)
        items = [self.items[position] for position in draw.positions]
        paths = (*(item.path for item in items), *draw.partners, *draw.new)
        labels = torch.tensor([item.label for item in items], dtype=torch.long)
        return Batch(
            real=ImageSet(images=self._real_images(draw.positions), labels=labels),
            files=tuple(map(str, paths)),
            synthetic_base=self._partners(draw, labels, f"{step} seen") if draw.partners else None,
            synthetic_new=self._new_images(draw, f"{step} unseen") if draw.new else None,
        )

    def draw(self, step: int) -> Draw:
        """The images of ``step`` (from 0)."""
        size = self.config.batch_size
        positions = tuple(self._order[step * size : (step + 1) * size])
        if not self.synthetic:
            return Draw(positions=positions)
        generator = random.Random(f"{self._key} step {step}")
        partners = [self.synthetic[self.items[position].label] for position in positions]
        rows = tuple(row for row, images in enumerate(partners) if images)
        chosen = tuple(generator.choice(partners[row]) for row in rows)
        labels = tuple(generator.choice(self._new) for _ in positions) if self._new else ()
        new = tuple(generator.choice(self.synthetic[label]) for label in labels)
        return Draw(positions=positions, rows=rows, partners=chosen, new=new, new_labels=labels)

    def _real_images(self, positions: Sequence[int]) -> torch.Tensor:
        if self.features is not None:
            return self.features[list(positions)]
        views = [
            training_view(self.cache, self.items[i].path, i, self.size_px, self.config, self.epoch) for i in positions
        ]
        return torch.stack(views) if views else torch.empty(0)

    def _partners(self, draw: Draw, labels: torch.Tensor, key: str) -> Partners:
        rows = torch.tensor(draw.rows)
        images = self._synthetic_pixels(draw.partners, key)
        return Partners(images=images, labels=labels[rows], rows=rows, share=len(rows) / len(labels))

    def _new_images(self, draw: Draw, key: str) -> ImageSet:
        return ImageSet(images=self._synthetic_pixels(draw.new, key), labels=torch.tensor(draw.new_labels))

    def _synthetic_pixels(self, paths: Sequence[Path], draw: str) -> torch.Tensor:
        """Unless the recipe redraws them, a synthetic image has one crop for the whole run."""
        if self.config.redraw_synthetic:
            keys = [f"{self._key} {draw} {place}" for place in range(len(paths))]
        else:
            keys = [f"{self.config.seed} once {path.name}" for path in paths]
        return torch.from_numpy(np.stack([self._one(path, key) for path, key in zip(paths, keys, strict=True)]))

    def _one(self, path: Path, key: str) -> NDArray[np.uint8]:
        return training_pixels(self.cache.image(path), self.size_px, self.config, key)

"""The few-shot sample that a run learns from: images or kept features, epoch by epoch, and generated features.

Shapes: N images, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from clipship.training.config import TrainConfig
from clipship.training.datasets.base import Dataset, LabelledImage
from clipship.training.datasets.load import digest_of_items, few_shot
from clipship.training.inputs.batches import Epoch, ImageCache, views_of
from clipship.training.inputs.features import evaluation_features, view_features
from clipship.training.loop.feature_generator import Generation
from clipship.training.methods import Batch, ImageSet, Task, method_named
from clipship.training.model.clip import Clip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The images of the classes that a run learns."""

    task: Task
    train: tuple[LabelledImage, ...]
    validation: tuple[LabelledImage, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and labels of the training images."""
        return digest_of_items(self.train)


def sample_of(dataset: Dataset, config: TrainConfig) -> Sample:
    """The few-shot sample that a run with these settings learns from.

    Raises:
        DataError: too few images.
    """
    learned = {"base": dataset.num_base, "all": len(dataset.class_names), "none": 0}[config.classes]
    lists: tuple[tuple[LabelledImage, ...], ...] = ((), ())
    if learned:
        lists = few_shot(replace(dataset, base_classes=learned), config.shots, config.seed)
    train, validation = (tuple(item for item in items if item.label < learned) for items in lists)
    return Sample(task=replace(dataset.task, num_base=learned), train=train, validation=validation)


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """What a run learns from; a :class:`clipship.training.methods.Source`."""

    sample: Sample
    config: TrainConfig
    clip: Clip
    """The model that images are for."""
    generation: Generation | None
    """Makes features of classes without images."""
    cache: Path | None
    """A folder for features of the frozen image tower."""
    _images: ImageCache = field(default_factory=ImageCache)
    _views: dict[int, Tensor] = field(default_factory=dict)

    def preload(self, synthetic: Sequence[Path]) -> None:
        """Read every image, or encode every view, so that a bad file stops a run before it starts.

        Raises:
            DataError: an image cannot be decoded.
        """
        paths = [item.path for item in self.sample.train]
        if not self._keeps_features:
            self._images.preload([*paths, *synthetic])
            return
        for view in range(1, min(self.config.feature_views, self.config.epochs) + 1):
            self._view(view)

    def epoch(self, number: int, synthetic: Sequence[Sequence[Path]]) -> Epoch:
        """The batches of epoch ``number`` (from 1)."""
        return Epoch(
            self.sample.train,
            synthetic,
            num_base=self.sample.task.num_base,
            config=self.config,
            size_px=self.clip.image_spec.size_px,
            cache=self._images,
            epoch=number,
            features=self._view(views_of(self.config, number)) if self._keeps_features else None,
            num_classes=len(self.sample.task.class_names),
        )

    def with_generated(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``batch`` with as many generated features as it has images, where the run has a generator."""
        if self.generation is None:
            return batch
        count = len(batch.real) or self.config.batch_size
        made = self.generation.features(count, f"{self.config.seed} {epoch} {step} generated")
        return replace(batch, generated=made)

    def train(self, views: int) -> ImageSet:
        """The few-shot images: the renormalised mean over the first ``views`` augmented views of each."""
        mean = torch.stack([self._view(view) for view in range(1, views + 1)]).mean(dim=0)
        return ImageSet(images=functional.normalize(mean, dim=-1), labels=_labels(self.sample.train))

    def validation(self) -> ImageSet:
        """The few-shot validation images of the learned classes, as at test time."""
        paths = [item.path for item in self.sample.validation]
        features = evaluation_features(self.clip, paths, cache=self.cache)
        return ImageSet(images=features, labels=_labels(self.sample.validation))

    def generated(self, per_class: int) -> ImageSet | None:
        """``per_class`` generated features of every class without images; None without a generator."""
        if self.generation is None:
            return None
        return self.generation.per_class(per_class, f"{self.config.seed} generated")

    @property
    def _keeps_features(self) -> bool:
        return method_named(self.config.method).image_side_frozen and self.config.feature_views > 0

    def _view(self, epoch: int) -> Tensor:
        """Features [N, D] under the crops of ``epoch``."""
        if epoch not in self._views:
            paths = [item.path for item in self.sample.train]
            self._views[epoch] = view_features(self.clip, paths, self.config, epoch, self._images, cache=self.cache)
        return self._views[epoch]


def _labels(items: Sequence[LabelledImage]) -> Tensor:
    return torch.tensor([item.label for item in items], dtype=torch.long)

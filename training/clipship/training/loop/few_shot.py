"""The few-shot sample that a run learns from: images or kept features, epoch by epoch, and generated features.

Shapes: N images, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipship.training.config import TrainConfig
from clipship.training.datasets.load import Dataset, LabelledImage, digest_of_items, few_shot
from clipship.training.inputs.batches import Epoch, ImageCache, views_of
from clipship.training.inputs.features import evaluation_features, view_features
from clipship.training.loop.feature_generator import Generation
from clipship.training.methods import Batch, FeatureGenerator, ImageSet, Method, Task, method_named
from clipship.training.model.clip import Clip


class FewShot:
    """What a run learns from; a :class:`clipship.training.methods.Source`."""

    def __init__(self, dataset: Dataset, config: TrainConfig, *, cache: Path | None) -> None:
        learned = {"base": dataset.num_base, "all": len(dataset.class_names), "none": 0}[config.classes]
        self.task: Task = replace(dataset.task, num_base=learned)
        train: tuple[LabelledImage, ...] = ()
        validation: tuple[LabelledImage, ...] = ()
        if learned:
            train, validation = few_shot(replace(dataset, base_classes=learned), config.shots, config.seed)
        self.items: tuple[LabelledImage, ...] = tuple(item for item in train if item.label < learned)
        self.validation_items: tuple[LabelledImage, ...] = tuple(item for item in validation if item.label < learned)
        self.digest: str = digest_of_items(self.items)
        self._config = config
        self._cache = cache
        self._images = ImageCache()
        self._views: dict[int, Tensor] = {}
        self._clip: Clip | None = None
        self._generation: Generation | None = None

    def use(self, clip: Clip, generation: Generation | None) -> None:
        """Name the model that images are for, and what makes features of classes without images."""
        self._clip = clip
        self._generation = generation

    @property
    def clip(self) -> Clip:
        """The model that images are for."""
        assert self._clip is not None
        return self._clip

    @property
    def generator_digest(self) -> str:
        """SHA-256 of the feature generator; empty where there is none."""
        return "" if self._generation is None else self._generation.digest

    def preload(self, synthetic: Sequence[Path]) -> None:
        """Read every image, or encode every view, so that a bad file stops a run before it starts.

        Raises:
            DataError: an image cannot be decoded.
        """
        paths = [item.path for item in self.items]
        if not self._keeps_features:
            self._images.preload([*paths, *synthetic])
            return
        for view in range(1, min(self._config.feature_views, self._config.epochs) + 1):
            self._view(view)

    def epoch(self, number: int, synthetic: Sequence[Sequence[Path]]) -> Epoch:
        """The batches of epoch ``number`` (from 1)."""
        return Epoch(
            self.items,
            synthetic,
            num_base=self.task.num_base,
            config=self._config,
            size_px=self.clip.image_spec.size_px,
            cache=self._images,
            epoch=number,
            features=self._view(views_of(self._config, number)) if self._keeps_features else None,
            num_classes=len(self.task.class_names),
        )

    def with_generated(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``batch`` with as many generated features as it has images, where the run has a generator."""
        if self._generation is None:
            return batch
        count = len(batch.real) or self._config.batch_size
        made = self._generation.features(count, f"{self._config.seed} {epoch} {step} generated")
        return replace(batch, generated=made)

    def train(self, views: int) -> ImageSet:
        """The few-shot images: the renormalised mean over the first ``views`` augmented views of each."""
        mean = torch.stack([self._view(view) for view in range(1, views + 1)]).mean(dim=0)
        return ImageSet(images=functional.normalize(mean, dim=-1), labels=_labels(self.items))

    def validation(self) -> ImageSet:
        """The few-shot validation images of the learned classes, as at test time."""
        paths = [item.path for item in self.validation_items]
        features = evaluation_features(self.clip, paths, cache=self._cache)
        return ImageSet(images=features, labels=_labels(self.validation_items))

    def generated(self, per_class: int) -> ImageSet | None:
        """``per_class`` generated features of every class without images; None without a generator."""
        if self._generation is None:
            return None
        return self._generation.per_class(per_class, f"{self._config.seed} generated")

    def calibration_of(self, method: Method) -> Mapping[str, Any] | None:
        """The temperature of ``method`` on the validation images; None where it classifies nothing."""
        if isinstance(method, FeatureGenerator):
            return None
        from clipship.training.evaluation.temperature import calibrate

        found: Mapping[str, Any] = calibrate(method, self.validation_items, cache=self._cache).to_json()
        return found

    @property
    def _keeps_features(self) -> bool:
        return method_named(self._config.method).image_side_frozen and self._config.feature_views > 0

    def _view(self, epoch: int) -> Tensor:
        """Features [N, D] under the crops of ``epoch``."""
        if epoch not in self._views:
            paths = [item.path for item in self.items]
            self._views[epoch] = view_features(self.clip, paths, self._config, epoch, self._images, cache=self._cache)
        return self._views[epoch]


def _labels(items: Sequence[LabelledImage]) -> Tensor:
    return torch.tensor([item.label for item in items], dtype=torch.long)

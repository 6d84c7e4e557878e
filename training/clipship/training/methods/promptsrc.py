"""PromptSRC: IVLP that is held to the frozen model in features and logits (arXiv 2307.06948).

Its third part, the Gaussian average of the weights over epochs, is the training loop's (``average_mean``,
``average_std``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clipship.training.config import TrainConfig, at_least
from clipship.training.losses import absolute_distance, cross_entropy, divergence
from clipship.training.methods.base import Batch, Task
from clipship.training.methods.ivlp import Ivlp, IvlpSettings
from clipship.training.methods.reference import Reference, ReferenceSettings
from clipship.training.model.clip import Clip
from clipship.training.model.prompts import image_features


@dataclass(frozen=True, kw_only=True)
class PromptSrcSettings(ReferenceSettings, IvlpSettings):
    """Prompts of both towers, and how closely they are held to the frozen model."""

    image_consistency: float = at_least(0, 0.0)
    """The weight of the distance between prompted and frozen image features."""
    logit_consistency: float = at_least(0, 0.0)
    """The weight of the divergence between prompted and frozen class probabilities."""


class PromptSrc(Ivlp):
    """The prompts of IVLP; the frozen class features are those of the reference templates."""

    name = "promptsrc"
    settings_type = PromptSrcSettings
    settings: PromptSrcSettings

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        self.reference = Reference(clip, config, task)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``CE + a |text - frozen text| + b |image - frozen image| + c KL(frozen || learned)``, each a mean."""
        names = self.task.base_names
        classes, frozen_classes = self.class_features(names), self.reference.class_features(names)
        images = self.image_features(batch.real.images)
        with torch.no_grad():
            frozen_images = functional.normalize(image_features(self.clip, batch.real.images), dim=-1)
        logits, frozen_logits = self.logits(images, classes), self.logits(frozen_images, frozen_classes)
        parts = {
            "real": cross_entropy(logits, batch.real.labels),
            "text": absolute_distance(classes, frozen_classes),
            "image": absolute_distance(images, frozen_images),
            "logits": divergence(logits, frozen_logits),
        }
        settings = self.settings
        weights = {
            "text": settings.text_consistency,
            "image": settings.image_consistency,
            "logits": settings.logit_consistency,
        }
        total = parts["real"] + torch.stack([weight * parts[part] for part, weight in weights.items()]).sum()
        return {"total": total, **{part: value.detach() for part, value in parts.items()}}

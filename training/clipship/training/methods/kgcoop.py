"""KgCoOp: CoOp whose class features stay near those of hand-written prompts (arXiv 2303.13283)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clipship.training.config import TrainConfig
from clipship.training.losses import cosine_distance, cross_entropy
from clipship.training.methods.base import Batch, Task
from clipship.training.methods.prompted import ContextSettings, LearnedContext
from clipship.training.methods.reference import Reference, ReferenceSettings
from clipship.training.model.clip import Clip


@dataclass(frozen=True, kw_only=True)
class KgCoOpSettings(ReferenceSettings, ContextSettings):
    """Those of the context and of the frozen side."""


class KgCoOp(LearnedContext):
    """Context [1, M, text width], held to the frozen features of the reference templates."""

    name = "kgcoop"
    settings_type = KgCoOpSettings
    settings: KgCoOpSettings

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        self.reference = Reference(clip, config, task)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``CE + W (1 - mean cosine of learned and frozen class features)`` over the classes of the batch."""
        features, labels, names = self.examples(batch)
        classes = self.class_features(names)
        real = cross_entropy(self.logits(features, classes), labels)
        text = cosine_distance(classes, self.reference.class_features(names))
        total = real + self.settings.text_consistency * text
        return {"total": total, "real": real.detach(), "text": text.detach()}

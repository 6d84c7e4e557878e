"""IVLP on real and synthetic images together: the plain baseline that SYNC-CLIP is measured against.

One path for both domains, cross entropy alone, as DISEF (arXiv 2312.03046) and DataDream (arXiv 2407.10910) train their
adapters on real and synthetic images, 0.8 to 0.2.

Shapes: B real images, S and U synthetic images of classes with and without real ones, D joint dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipship.training.config import at_least
from clipship.training.losses import classification_loss
from clipship.training.methods.base import Batch
from clipship.training.methods.ivlp import Ivlp, IvlpSettings
from clipship.training.methods.prompted import synthetic_losses
from clipship.training.model.prompts import image_features


@dataclass(frozen=True, kw_only=True)
class IvlpSyntheticSettings(IvlpSettings):
    """Prompts of both towers, and the synthetic images' weight."""

    method = "ivlp-synthetic"
    synthetic_weight: float = at_least(0, 0.0)
    """w: the weight of the synthetic images' classification loss."""


class IvlpSynthetic(Ivlp):
    """The prompts of IVLP, which all images share, real or not."""

    Settings = IvlpSyntheticSettings
    settings: IvlpSyntheticSettings
    needs_synthetic = True

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``real + w synthetic``: the mean over B among base classes, and over S + U among all classes."""
        assert batch.pixels is not None
        images = batch.pixels if batch.synthetic is None else torch.cat([batch.pixels, batch.synthetic])
        features = image_features(self.clip, images, self.image_prompts())
        num_real = len(batch.pixels)
        classes = self.class_features(self.task.class_names)
        scale = self.clip.logit_scale
        real = classification_loss(features[:num_real], classes[: self.task.num_base], batch.labels, scale)
        seen, unseen = synthetic_losses(features[num_real:], classes, batch, scale)
        synthetic = _mean_over_all(seen, unseen, batch)
        total = real + self.settings.synthetic_weight * synthetic
        return {"total": total, "real": real.detach(), "synthetic": synthetic.detach()}


def _mean_over_all(seen: Tensor, unseen: Tensor, batch: Batch) -> Tensor:
    """The mean over S + U of the whole batch from the means over S and over U, which is B or 0; 0 without any."""
    shares = batch.seen_share, 0.0 if batch.unseen is None else 1.0
    return (shares[0] * seen + shares[1] * unseen) / (sum(shares) or 1.0)

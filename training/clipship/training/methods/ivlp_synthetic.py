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

    synthetic_weight: float = at_least(0, 0.0)
    """w: the weight of the synthetic images' classification loss."""


class IvlpSynthetic(Ivlp):
    """The prompts of IVLP, which all images share, real or not."""

    name = "ivlp-synthetic"
    settings_type = IvlpSyntheticSettings
    settings: IvlpSyntheticSettings
    needs_synthetic = True

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``real + w synthetic``: the mean over B among base classes, and over S + U among all classes."""
        real_images, num_real = batch.real.images, len(batch.real)
        images = real_images if batch.synthetic is None else torch.cat([real_images, batch.synthetic])
        features = image_features(self.clip, images, self.image_prompts())
        classes = self.class_features(self.task.class_names)
        scale = self.clip.logit_scale
        real = classification_loss(features[:num_real], classes[: self.task.num_base], batch.real.labels, scale)
        base, new = synthetic_losses(features[num_real:], classes, batch, scale)
        synthetic = _mean_over_all(base, new, batch)
        total = real + self.settings.synthetic_weight * synthetic
        return {"total": total, "real": real.detach(), "synthetic": synthetic.detach()}


def _mean_over_all(base: Tensor, new: Tensor, batch: Batch) -> Tensor:
    """The mean over S + U of the whole batch from the means over S and over U, which is B or 0; 0 without any."""
    base_share = 0.0 if batch.synthetic_base is None else batch.synthetic_base.share
    new_share = 0.0 if batch.synthetic_new is None else 1.0
    return (base_share * base + new_share * new) / (base_share + new_share or 1.0)

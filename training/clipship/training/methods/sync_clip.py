"""SYNC-CLIP: deep prompts in both towers, learned from real and synthetic images together (arXiv 2312.03805).

Shapes: B real images a batch, C classes, D joint dimensions, J prompted layers, M tokens a layer of which the first K
are the domain's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipship.training.config import at_least
from clipship.training.losses import alignment_loss, classification_loss
from clipship.training.methods.base import Batch
from clipship.training.methods.prompted import (
    ContextSettings,
    ImagePromptSettings,
    LearnedContext,
    PromptedImages,
    synthetic_losses,
)
from clipship.training.model.prompts import image_features, random_prompts


@dataclass(frozen=True, kw_only=True)
class SyncClipSettings(ImagePromptSettings, ContextSettings):
    """Prompts of both towers, and the weights of the synthetic images."""

    domain_tokens: int = at_least(0, 0)
    """How many of ``image_tokens`` belong to the domain (real or synthetic) instead of being shared."""
    synthetic_weight: float = at_least(0, 0.0)
    """w: the weight of the synthetic images' classification loss."""
    align_weight: float = at_least(0, 0.0)
    """lambda: the weight of the cross-domain alignment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.domain_tokens <= self.image_tokens, "in 0..image_tokens", "domain_tokens")


class SyncClip(PromptedImages, LearnedContext):
    """Real and synthetic images share all prompts but the first K tokens of every prompted image layer.

    At inference only the real path is used.
    """

    name = "sync-clip"
    settings_type = SyncClipSettings
    settings: SyncClipSettings
    needs_synthetic = True

    def draw(self, generator: torch.Generator) -> None:
        """The image prompts of the real path, then the synthetic domain's own tokens."""
        settings = self.settings
        self.real_tokens = self.drawn_image_prompts(generator)
        self.synthetic_tokens = random_prompts(
            settings.image_depth, settings.domain_tokens, self.clip.image_width, generator
        )

    def image_prompts(self) -> Tensor:
        """[J, M, image width] of the real path."""
        return self.real_tokens

    def synthetic_image_prompts(self) -> Tensor:
        """[J, M, image width]: the real path's, the first K tokens of each layer replaced by the synthetic domain's."""
        return torch.cat([self.synthetic_tokens, self.real_tokens[:, self.settings.domain_tokens :]], dim=1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``real + w synthetic + lambda align``: real over base classes, synthetic over all, align on raw features.

        Real images without a synthetic partner have no part in the other two, which are means over the partners there
        are, and 0 without any.
        """
        real = image_features(self.clip, batch.real.images, self.image_prompts())
        images = batch.synthetic
        synthetic = None if images is None else image_features(self.clip, images, self.synthetic_image_prompts())
        classes = self.class_features(self.task.class_names)
        scale = self.clip.logit_scale
        classified = classification_loss(real, classes[: self.task.num_base], batch.real.labels, scale)
        parts = {"real": classified, "synthetic": torch.zeros_like(classified), "align": torch.zeros_like(classified)}
        if synthetic is not None:
            parts["synthetic"] = torch.stack(synthetic_losses(synthetic, classes, batch, scale)).sum()
        partners = batch.synthetic_base
        if synthetic is not None and partners is not None and len(partners):
            alignment = alignment_loss(synthetic[: len(partners)], real, batch.real.labels, rows=partners.rows)
            parts["align"] = alignment * batch.partner_weight
        weights = {"real": 1.0, "synthetic": self.settings.synthetic_weight, "align": self.settings.align_weight}
        total = torch.stack([weights[part] * value for part, value in parts.items()]).sum()
        return {"total": total, **{part: value.detach() for part, value in parts.items()}}

"""SYNC-CLIP: deep prompts in both towers, learned from real and synthetic images together (arXiv 2312.03805).

Shapes: B real images a batch, D joint dimensions, J prompted layers, M tokens a layer of which the first S are the
domain's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipship.training.losses import alignment_loss, classification_loss
from clipship.training.methods.base import Batch
from clipship.training.methods.prompted import LearnedContext, PromptedImages
from clipship.training.prompts import image_features, random_prompts


class SyncClip(PromptedImages, LearnedContext):
    """Real and synthetic images share all prompts but the first S tokens of every prompted image layer.

    At inference only the real path is used.
    """

    name = "sync-clip"
    needs_synthetic = True

    def draw(self, generator: torch.Generator) -> None:
        """The image prompts of the real path, then the synthetic domain's own tokens."""
        config = self.config
        self.real_tokens = self.drawn_image_prompts(generator)
        self.synthetic_tokens = random_prompts(
            config.image_depth, config.domain_tokens, self.clip.image_width, generator
        )

    def image_prompts(self) -> Tensor:
        """[J, M, image width] of the real path."""
        return self.real_tokens

    def synthetic_image_prompts(self) -> Tensor:
        """[J, M, image width]: the real path's, the first S tokens of each layer replaced by the synthetic domain's."""
        return torch.cat([self.synthetic_tokens, self.real_tokens[:, self.config.domain_tokens :]], dim=1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``real + w synthetic + lambda align``: real over base classes, synthetic over all, align on raw features."""
        assert batch.pixels is not None
        assert batch.seen is not None
        num_seen = len(batch.seen)
        images = batch.seen if batch.unseen is None else torch.cat([batch.seen, batch.unseen])
        real = image_features(self.clip, batch.pixels, self.image_prompts())
        synthetic = image_features(self.clip, images, self.synthetic_image_prompts())
        classes = self.class_features(self.task.class_names)
        scale = self.clip.logit_scale
        parts = {
            "real": classification_loss(real, classes[: self.task.num_base], batch.labels, scale),
            "synthetic": classification_loss(synthetic[:num_seen], classes, batch.labels, scale),
            "align": alignment_loss(synthetic[:num_seen], real, batch.labels),
        }
        if batch.unseen_labels is not None:
            unseen = classification_loss(synthetic[num_seen:], classes, batch.unseen_labels, scale)
            parts["synthetic"] = parts["synthetic"] + unseen
        weights = {"real": 1.0, "synthetic": self.config.synthetic_weight, "align": self.config.align_weight}
        total = torch.stack([weights[part] * value for part, value in parts.items()]).sum()
        return {"total": total, **{part: value.detach() for part, value in parts.items()}}

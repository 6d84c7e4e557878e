"""Shared by methods with learned prompts: a context for the text tower, prompts for the image tower.

Shapes: J prompted layers, M tokens a layer, S and U synthetic images of classes with and without real ones, C classes,
D joint dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipship.training.config import Settings, TrainConfig, at_least
from clipship.training.losses import classification_loss, raised
from clipship.training.methods.base import Batch, Method, Task
from clipship.training.model.clip import Clip
from clipship.training.model.prompts import (
    context_prompts,
    image_features,
    placeholder_template,
    random_prompts,
    validate_depth,
)


@dataclass(frozen=True, kw_only=True)
class ContextSettings(Settings):
    """The learned tokens of the text tower."""

    text_tokens: int = at_least(1, 4)
    """Learned tokens a layer."""
    text_depth: int = at_least(1, 1)
    """Layers that get their own tokens."""
    context_init: str = "a photo of a"
    """Words whose embeddings start the first layer; those beyond ``text_tokens`` stay fixed; empty: random."""


@dataclass(frozen=True, kw_only=True)
class ImagePromptSettings(Settings):
    """The learned tokens of the image tower."""

    image_tokens: int = at_least(1, 4)
    """Learned tokens a layer."""
    image_depth: int = at_least(1, 1)
    """Layers that get their own tokens."""


class LearnedContext(Method):
    """Learned tokens in the place of the first words of the prompt, in one or more layers of the text tower.

    The first ``text_tokens`` words of ``context_init`` are learned, those after them stay fixed.
    """

    settings: ContextSettings

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        depth, tokens = self.settings.text_depth, self.settings.text_tokens
        validate_depth(clip, "text", depth)
        generator = torch.Generator().manual_seed(config.seed)
        words = self.settings.context_init.split()
        learned, fixed = words[:tokens], words[tokens:]
        template = placeholder_template(clip, tokens)
        self.templates = (template.replace("{}", " ".join([*fixed, "{}"])),)
        self.context = context_prompts(clip, depth, tokens, " ".join(learned), generator)
        self.draw(generator)

    def draw(self, generator: torch.Generator) -> None:
        """Make the other learned tensors, after the context and from the same generator."""

    def text_prompts(self) -> Tensor:
        """[J, M, text width]."""
        return self.context


class PromptedImages(Method):
    """Images pass the tower together with learned tokens, so every step encodes pixels."""

    image_side_frozen = False

    def drawn_image_prompts(self, generator: torch.Generator) -> nn.Parameter:
        """[image depth, image tokens, image width] from N(0, 0.02).

        Raises:
            RecipeError: the settings ask for more layers than the tower has.
        """
        settings: ImagePromptSettings = self.settings
        validate_depth(self.clip, "image", settings.image_depth)
        return random_prompts(settings.image_depth, settings.image_tokens, self.clip.image_width, generator)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy over the classes with real images."""
        features = image_features(self.clip, batch.real.images, self.image_prompts())
        classes = self.class_features(self.task.base_names)
        total = classification_loss(features, classes, batch.real.labels, self.clip.logit_scale)
        return {"total": total, "real": total.detach()}


def synthetic_losses(features: Tensor, classes: Tensor, batch: Batch, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Cross entropy over all classes of the S and of the U synthetic images of ``batch``; 0 where there are none.

    Features [S + U, D] as they leave the tower, class features [C, D] of unit length. The first is a mean over the S
    partners of the whole batch: see :attr:`Batch.partner_weight`.
    """
    partners, images = batch.synthetic_base, batch.synthetic_new
    base = new = raised(features).new_zeros(())
    if partners is not None and len(partners):
        own = features[: len(partners)]
        base = classification_loss(own, classes, partners.labels, logit_scale) * batch.partner_weight
    if images is not None:
        new = classification_loss(features[len(features) - len(images) :], classes, images.labels, logit_scale)
    return base, new

"""IVLP: deep prompts in both towers, independent of each other (the baseline of arXiv 2210.03117 and 2307.06948)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipship.training.methods.prompted import ContextSettings, ImagePromptSettings, LearnedContext, PromptedImages


@dataclass(frozen=True, kw_only=True)
class IvlpSettings(ImagePromptSettings, ContextSettings):
    """Prompts of both towers."""


class Ivlp(PromptedImages, LearnedContext):
    """Text context [J, M, text width] and image prompts [J', M', image width]."""

    name = "ivlp"
    settings_type = IvlpSettings
    settings: IvlpSettings

    def draw(self, generator: torch.Generator) -> None:
        """The image prompts."""
        self.image_context = self.drawn_image_prompts(generator)

    def image_prompts(self) -> Tensor:
        """[J', M', image width]."""
        return self.image_context

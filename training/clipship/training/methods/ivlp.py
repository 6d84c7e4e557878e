"""IVLP: deep prompts in both towers, independent of each other (the baseline of arXiv 2210.03117 and 2307.06948)."""

from __future__ import annotations

import torch
from torch import Tensor

from clipship.training.methods.prompted import LearnedContext, PromptedImages


class Ivlp(PromptedImages, LearnedContext):
    """Text context [J, M, text width] and image prompts [J', M', image width]."""

    name = "ivlp"

    def draw(self, generator: torch.Generator) -> None:
        """The image prompts."""
        self.image_context = self.drawn_image_prompts(generator)

    def image_prompts(self) -> Tensor:
        """[J', M', image width]."""
        return self.image_context

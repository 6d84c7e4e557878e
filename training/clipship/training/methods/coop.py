"""CoOp: learned context words, one set for all classes, class name at the end (arXiv 2109.01134)."""

from __future__ import annotations

import torch
from torch import Tensor

from clipship.training.clip import Clip
from clipship.training.config import TrainConfig
from clipship.training.methods.base import Method, Task
from clipship.training.prompts import context_prompts, placeholder_template


class CoOp(Method):
    """Context [1, M, text width] in the place of "a photo of a"."""

    name = "coop"

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        self.templates = (placeholder_template(clip, config.text_tokens),)
        generator = torch.Generator().manual_seed(config.seed)
        self.context = context_prompts(clip, 1, config.text_tokens, config.context_init, generator)

    def text_prompts(self) -> Tensor:
        """[1, M, text width]."""
        return self.context

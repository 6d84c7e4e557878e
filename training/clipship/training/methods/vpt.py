"""VPT: learned tokens in the image tower only, classes by hand-written prompts (arXiv 2203.12119)."""

from __future__ import annotations

import torch
from torch import Tensor

from clipship.training.config import TrainConfig
from clipship.training.methods.base import Task
from clipship.training.methods.prompted import ImagePromptSettings, PromptedImages
from clipship.training.model.clip import Clip


class Vpt(PromptedImages):
    """Image prompts [J, M, image width]: shallow with J = 1, deep with more."""

    name = "vpt"
    settings_type = ImagePromptSettings

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        self.image_context = self.drawn_image_prompts(torch.Generator().manual_seed(config.seed))

    def image_prompts(self) -> Tensor:
        """[J, M, image width]."""
        return self.image_context

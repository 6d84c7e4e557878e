"""MaPLe: deep prompts in the text tower, and the image tower's as a linear map of them (arXiv 2210.03117).

Shapes: J prompted layers, M tokens a layer, W and V the widths of the text and the image tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipship.training.config import TrainConfig
from clipship.training.methods.base import Task
from clipship.training.methods.layers import uniform
from clipship.training.methods.prompted import ContextSettings, LearnedContext, PromptedImages
from clipship.training.model.clip import Clip
from clipship.training.model.prompts import validate_depth


class Maple(PromptedImages, LearnedContext):
    """Text context [J, M, W], and for each layer a linear map with bias from W to V.

    The maps of layers 1..J-1 start equal, as in the authors' code.
    """

    name = "maple"
    settings_type = ContextSettings

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        validate_depth(clip, "image", self.settings.text_depth)

    def draw(self, generator: torch.Generator) -> None:
        """The maps: weights [J, W, V], biases [J, V]."""
        width, image_width, depth = self.clip.text_width, self.clip.image_width, self.settings.text_depth
        maps = [uniform((width + 1, image_width), width, generator) for _ in range(min(depth, 2))]
        maps_JWV = torch.stack(maps + maps[1:] * (depth - 2))
        self.coupling_weight = nn.Parameter(maps_JWV[:, :-1].clone())
        self.coupling_bias = nn.Parameter(maps_JWV[:, -1].clone())

    def image_prompts(self) -> Tensor:
        """[J, M, V]."""
        return torch.baddbmm(self.coupling_bias[:, None], self.context, self.coupling_weight)

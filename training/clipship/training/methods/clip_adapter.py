"""CLIP-Adapter: a small bottleneck after the image tower, text side as it is (arXiv 2110.04544).

Shapes: N images, D joint dimensions, H hidden dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipship.core.errors import RecipeError
from clipship.training.config import TrainConfig
from clipship.training.losses import raised
from clipship.training.methods.base import Method, Task
from clipship.training.methods.layers import uniform
from clipship.training.model.clip import Clip


class ClipAdapter(Method):
    """A share ``adapter_ratio`` of each image feature is replaced by what the bottleneck makes of it.

    The authors' code feeds the bottleneck features that are not normalised. Without biases it is positively
    homogeneous, so the normalised result is the same.
    """

    name = "clip-adapter"

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        hidden = clip.embed_dim // config.adapter_reduction
        if hidden < 1:
            raise RecipeError(
                f"recipe {config.recipe}: adapter_reduction={config.adapter_reduction}: {clip.name} has "
                f"{clip.embed_dim} joint dimensions: give at most as many"
            )
        generator = torch.Generator().manual_seed(config.seed)
        self.down = nn.Parameter(uniform((hidden, clip.embed_dim), clip.embed_dim, generator))
        self.up = nn.Parameter(uniform((clip.embed_dim, hidden), hidden, generator))

    def adapted(self, features: Tensor) -> Tensor:
        """Unit [N, D] -> unit [N, D]."""
        hidden_NH = functional.relu(features @ self.down.T)
        learned_ND = functional.relu(hidden_NH @ self.up.T)
        ratio = self.config.adapter_ratio
        return functional.normalize(raised(ratio * learned_ND + (1 - ratio) * features), dim=-1)

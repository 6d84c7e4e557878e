"""CLIP-Adapter: a small bottleneck after the image tower, an unchanged text side (arXiv 2110.04544).

Shapes: N images, D joint dimensions, H hidden dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipship.core.errors import RecipeError
from clipship.training.config import Settings, TrainConfig, at_least
from clipship.training.losses import raised
from clipship.training.methods.base import Method, Task
from clipship.training.methods.layers import uniform
from clipship.training.model.clip import Clip


@dataclass(frozen=True, kw_only=True)
class ClipAdapterSettings(Settings):
    """The adapter's shape and share."""

    adapter_reduction: int = at_least(1, 4)
    """Joint dimensions over the width of the hidden layer."""
    adapter_ratio: float = 0.2
    """The adapter's share in the adapted feature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.adapter_ratio <= 1, "in [0, 1]", "adapter_ratio")


class ClipAdapter(Method):
    """A share ``adapter_ratio`` of each image feature is replaced by what the bottleneck makes of it.

    The authors' code feeds the bottleneck features that are not normalised. Without biases it is positively
    homogeneous, so the normalised result is the same.
    """

    name = "clip-adapter"
    settings_type = ClipAdapterSettings
    settings: ClipAdapterSettings

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        reduction = self.settings.adapter_reduction
        hidden = clip.embed_dim // reduction
        if hidden < 1:
            raise RecipeError(
                f"recipe {config.recipe}: adapter_reduction={reduction}: {clip.name} has "
                f"{clip.embed_dim} joint dimensions: give at most as many"
            )
        generator = torch.Generator().manual_seed(config.seed)
        self.down = nn.Parameter(uniform((hidden, clip.embed_dim), clip.embed_dim, generator))
        self.up = nn.Parameter(uniform((clip.embed_dim, hidden), hidden, generator))

    def adapted(self, features: Tensor) -> Tensor:
        """Unit [N, D] -> unit [N, D]."""
        hidden_NH = functional.relu(features @ self.down.T)
        learned_ND = functional.relu(hidden_NH @ self.up.T)
        ratio = self.settings.adapter_ratio
        return functional.normalize(raised(ratio * learned_ND + (1 - ratio) * features), dim=-1)

"""The frozen text features that regularise learned ones.

Shapes: C classes, L tokens, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from clipship.training.config import Settings, TrainConfig, at_least
from clipship.training.methods.base import Method, Task
from clipship.training.model import prompts
from clipship.training.model.clip import Clip


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings(Settings):
    """The frozen class features and the weight of the distance to them."""

    reference_templates: tuple[str, ...] = ()
    """Prompts of the frozen model; empty: the data set's own."""
    text_consistency: float = at_least(0, 0.0)
    """The weight of the distance between learned and frozen class features."""


class Reference(Method):
    """Plain CLIP under ``reference_templates``, without learned tensors or state.

    Templates are averaged before the features are normalised, as in PromptSRC (arXiv 2307.06948); zero-shot ensembles
    normalise each one first.
    """

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        assert isinstance(config.settings, ReferenceSettings)
        super().__init__(clip, replace(config, templates=config.settings.reference_templates), task)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [C, L] -> features [C, D], not normalised."""
        return prompts.text_features(self.clip, tokens)

    def class_features(self, names: Sequence[str]) -> Tensor:
        """Unit features [C, D]."""
        return functional.normalize(super().class_features(names), dim=-1)

"""Linear probe: a linear classifier on frozen image features (arXiv 2103.00020, section 3.2).

Shapes: N images, C classes, R classes learned from, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipship.core.classification import VocabularyFeatures
from clipship.core.errors import DataError, near
from clipship.training.config import TrainConfig
from clipship.training.methods.base import Classify, Method, Task
from clipship.training.model.clip import Clip


class LinearProbe(Method):
    """Logits ``s (f W^T + b)``, W [R, D] and b [R] from zero: no text takes part, as in the published baseline.

    That baseline is logistic regression; its optimum does not depend on the start. s is CLIP's logit scale: with it,
    learning rates compare with those of the other methods.
    """

    name = "linear-probe"
    closed_vocabulary = True

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__(clip, config, task)
        self._names = task.base_names if config.generator is None else task.class_names
        self.weight = nn.Parameter(torch.zeros(len(self._names), clip.embed_dim))
        self.bias = nn.Parameter(torch.zeros(len(self._names)))

    def classifier(self, names: Sequence[str]) -> Classify:
        """Logits of learned classes.

        Raises:
            DataError: a name that is not one of them.
        """
        rows = self._rows(names)

        def classify(features: Tensor) -> Tensor:
            return self.clip.logit_scale * (features @ self.weight[rows].T + self.bias[rows])

        return classify

    @torch.no_grad()
    def exported_classifier(self, names: Sequence[str]) -> VocabularyFeatures:
        """The weights and biases of learned classes.

        Raises:
            DataError: as :meth:`classifier`.
        """
        rows = self._rows(names)
        return VocabularyFeatures(
            features=self.weight[rows].float().cpu().numpy(),
            logit_scale=self.clip.logit_scale,
            bias=self.bias[rows].float().cpu().numpy(),
        )

    def _rows(self, names: Sequence[str]) -> list[int]:
        row = {name: place for place, name in enumerate(self._names)}
        unknown = [name for name in names if name not in row]
        if unknown:
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            raise DataError(
                f"class {', '.join(map(repr, unknown[:_SHOWN]))}{more}: a linear probe knows the {len(row)} classes it "
                f"was trained on: {near(unknown[0], row)}, or take a method that learns from names"
            )
        return [row[name] for name in names]


_SHOWN = 10
"""Unknown names that a message lists."""

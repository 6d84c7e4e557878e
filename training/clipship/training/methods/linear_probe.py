"""Linear probe: a linear classifier on frozen image features (arXiv 2103.00020, section 3.2).

Shapes: N images, C classes, R classes learned from, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipship.core.errors import DataError, near
from clipship.training.clip import Clip
from clipship.training.config import TrainConfig
from clipship.training.methods.base import Classify, Method, Task


class LinearProbe(Method):
    """Logits ``s (f W^T + b)``, W [R, D] and b [R] from zero: no text takes part, as in the published baseline.

    That baseline is logistic regression, whose one optimum does not depend on the start; zero is where it starts. s is
    CLIP's logit scale: it makes a learning rate mean here what it means for the other methods.
    """

    name = "linear-probe"
    closed_vocabulary = True
    not_exportable = "its weights belong into the classifier's graph, which a bundle cannot hold yet"

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
        rows = [self._row(name) for name in names]

        def classify(features: Tensor) -> Tensor:
            return self.clip.logit_scale * (features @ self.weight[rows].T + self.bias[rows])

        return classify

    def _row(self, name: str) -> int:
        if name not in self._names:
            raise DataError(
                f"class {name!r}: a linear probe knows the {len(self._names)} classes it was trained on: "
                f"{near(name, self._names)}, or take a method that learns from names"
            )
        return self._names.index(name)

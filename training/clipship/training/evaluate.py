"""Scores of a method on a data set: base-to-new and open-vocabulary accuracy.

Shapes: N images, C classes, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clipship.core.errors import DataError
from clipship.core.progress import progress
from clipship.training.batches import evaluation_pixels
from clipship.training.data import Dataset, Item
from clipship.training.methods import Method

_CHUNK = 100
"""Images that pass the encoder at once."""


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Top-1 accuracies in percent, each over all images of its half."""

    dataset: str
    split: str
    """Which list of the split file was classified."""
    base: float
    """Images of base classes among the base class names."""
    new: float
    """Images of new classes among the new class names."""
    open_base: float
    """Images of base classes among all class names."""
    open_new: float
    """Images of new classes among all class names."""
    all: float
    """All images among all class names."""
    num_base_images: int
    num_new_images: int
    num_base_classes: int
    num_new_classes: int

    @property
    def harmonic_mean(self) -> float:
        """Of base and new."""
        return harmonic_mean(self.base, self.new)

    @property
    def open_harmonic_mean(self) -> float:
        """Of base and new among all class names."""
        return harmonic_mean(self.open_base, self.open_new)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field and both harmonic means."""
        means = {"harmonic_mean": self.harmonic_mean, "open_harmonic_mean": self.open_harmonic_mean}
        return {**asdict(self), **means}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scores:
        """The inverse of :meth:`to_json`."""
        means = ("harmonic_mean", "open_harmonic_mean")
        return cls(**{key: value for key, value in content.items() if key not in means})


def evaluate(method: Method, dataset: Dataset, split: str = "test") -> Scores:
    """Classify the images of ``split``; all features are computed once.

    Raises:
        DataError: the method was made for other classes, the split has no images of a half, or one cannot be decoded.
    """
    if method.task.class_names != dataset.class_names:
        raise DataError(
            f"the checkpoint knows {len(method.task.class_names)} classes from {method.task.class_names[0]!r} on, "
            f"{dataset.record.name} has {len(dataset.class_names)} from {dataset.class_names[0]!r} on: "
            "give the data set it was trained on"
        )
    items = dataset.items(split)
    labels = torch.tensor([item.label for item in items])
    is_base = labels < dataset.num_base
    if is_base.all() or not is_base.any():
        raise DataError(f"{dataset.record.name}: the list {split} lacks images of base or new classes: give both")
    logits = _logits_of(method, items, dataset.class_names)
    return _scores_from_logits(logits, labels, dataset, split)


def _scores_from_logits(logits: Tensor, labels: Tensor, dataset: Dataset, split: str) -> Scores:
    """[N, C] and [N] -> scores."""
    num_base = dataset.num_base
    is_base = labels < num_base
    return Scores(
        dataset=dataset.record.name,
        split=split,
        base=_accuracy(logits[is_base, :num_base], labels[is_base]),
        new=_accuracy(logits[~is_base, num_base:], labels[~is_base] - num_base),
        open_base=_accuracy(logits[is_base], labels[is_base]),
        open_new=_accuracy(logits[~is_base], labels[~is_base]),
        all=_accuracy(logits, labels),
        num_base_images=int(is_base.sum()),
        num_new_images=int((~is_base).sum()),
        num_base_classes=num_base,
        num_new_classes=len(dataset.class_names) - num_base,
    )


@torch.no_grad()
def _logits_of(method: Method, items: Sequence[Item], class_names: Sequence[str]) -> Tensor:
    """[N, C] on the CPU."""
    method.eval()
    clip = method.clip
    classes = method.class_features(class_names)
    logits = []
    with progress("evaluate", len(items)) as report:
        for start in range(0, len(items), _CHUNK):
            paths = [item.path for item in items[start : start + _CHUNK]]
            pixels = clip.normalize(evaluation_pixels(paths, clip.image_spec).to(clip.device))
            logits.append(method.logits(method.image_features(pixels), classes).cpu())
            report(start + len(paths), "")
    return torch.cat(logits)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows whose greatest logit is at the label."""
    return 100.0 * float((logits.argmax(dim=1) == labels).double().mean())

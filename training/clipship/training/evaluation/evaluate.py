"""Scores of a method on a data set, under the protocol that the two allow.

==========================  ==================================================================================
base-to-new                 the halves of the data set learned from, each among its own names and among all
generalised zero-shot       seen and unseen classes among all names, the mean over classes (arXiv 1707.00600)
all classes                 every class had real images
domain generalisation       another data set with the same names or some of them
cross-dataset               another data set with other names
==========================  ==================================================================================

The first row is that of CoOp and CoCoOp (arXiv 2203.05557), with the open vocabulary of SYNC-CLIP (arXiv 2312.03805).
Shapes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipship.core.errors import DataError
from clipship.training.datasets.base import Dataset
from clipship.training.evaluation.inference import distinguishable_names, features_of_files, logits_over
from clipship.training.evaluation.temperature import ReliabilityBin, expected_calibration_error, reliability_bins
from clipship.training.methods import Method, build_method

BASE_TO_NEW = "base-to-new"
GENERALISED = "generalised zero-shot"
ALL_CLASSES = "all classes"
CROSS_DATASET = "cross-dataset"
DOMAINS = "domain generalisation"
PROTOCOLS = (BASE_TO_NEW, GENERALISED, ALL_CLASSES, CROSS_DATASET, DOMAINS)

_MEANS = ("harmonic_mean", "open_harmonic_mean", "generalised_harmonic_mean")


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * first * second / (first + second) if first + second else 0.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Top-1 accuracies in percent, over all images of a half unless stated otherwise.

    None if the protocol has no such score, a half has no images, or the method does not know its classes.
    """

    dataset: str
    split: str
    """Which list of the data set was classified."""
    protocol: str
    """One of :data:`PROTOCOLS`."""
    selection: str
    """The rule by which the weights were kept."""
    base: float | None = None
    """Images of base classes among the base class names."""
    new: float | None = None
    """Images of new classes among the new class names."""
    open_base: float | None = None
    """Images of base classes among all class names."""
    open_new: float | None = None
    """Images of new classes among all class names."""
    all: float | None = None
    """All images among all class names."""
    seen: float | None = None
    """S of generalised zero-shot: the mean over base classes of each one's accuracy among all class names."""
    unseen: float | None = None
    """U of generalised zero-shot: the same over new classes."""
    num_images: int
    num_classes: int
    num_base_images: int = 0
    """0, as the next three, where the protocol has no halves."""
    num_new_images: int = 0
    num_base_classes: int = 0
    num_new_classes: int = 0
    temperature: float | None = None
    """What logits were divided by for ``ece_after`` and ``reliability``; None: they are the method's own."""
    ece_before: float | None = None
    """Expected calibration error of the method's own probabilities over all names that it knows."""
    ece_after: float | None = None
    """The same with the temperature."""
    reliability: tuple[ReliabilityBin, ...] = ()
    """The reliability diagram over the same names, with the temperature where there is one."""

    @property
    def harmonic_mean(self) -> float | None:
        """Of base and new."""
        return _mean_of(self.base, self.new)

    @property
    def open_harmonic_mean(self) -> float | None:
        """Of base and new among all class names."""
        return _mean_of(self.open_base, self.open_new)

    @property
    def generalised_harmonic_mean(self) -> float | None:
        """H of generalised zero-shot: of seen and unseen."""
        return _mean_of(self.seen, self.unseen)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field and the harmonic means."""
        means = {name: getattr(self, name) for name in _MEANS}
        return {**asdict(self), "reliability": [asdict(one) for one in self.reliability], **means}


def _mean_of(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else harmonic_mean(first, second)


def evaluate(
    method: Method,
    dataset: Dataset,
    split: str = "test",
    *,
    selection: str = "last step",
    trained_on: str | None = None,
    temperature: float | None = None,
    cache: Path | None = None,
) -> Scores:
    """Classify the images of ``split``; every image is encoded once.

    ``trained_on`` is the name of the data set the method was trained on: one of another name is another one even where
    all class names are equal. ``temperature`` comes from a
    :class:`~clipship.training.evaluation.temperature.Calibration`; it changes no accuracy. ``cache`` is a folder for
    features of the frozen image tower.

    Raises:
        DataError: no images to classify, one that cannot be decoded, or classes that the method does not know.
    """
    protocol = protocol_of(method, dataset, trained_on)
    method = method_for(method, dataset)
    is_other = protocol in (CROSS_DATASET, DOMAINS)
    names = dataset.class_names if is_other else distinguishable_names(method)
    logits_of = logits_over(method, names)
    items = [item for item in dataset.items(split) if item.label < len(names)]
    if not items:
        known = f"the {len(names)} classes that {method.name} knows"
        raise DataError(f"{dataset.record.name}: the list {split} has no images of {known}: give another list")
    labels = torch.tensor([item.label for item in items])
    logits = logits_of(features_of_files(method, [item.path for item in items], cache=cache))
    return Scores(
        dataset=dataset.record.name,
        split=split,
        protocol=protocol,
        selection=selection,
        **_accuracies(logits, labels, dataset, protocol),
        **_counts(dataset, split, protocol),
        **_reliability(logits, labels, temperature),
    )


def protocol_of(method: Method, dataset: Dataset, trained_on: str | None = None) -> str:
    """Which of :data:`PROTOCOLS` scores ``method`` on ``dataset``; ``trained_on`` is as for :func:`evaluate`."""
    task = method.task
    if dataset.class_names == task.class_names and trained_on in (None, dataset.record.name):
        if task.num_base == len(task.class_names):
            return ALL_CLASSES
        return GENERALISED if dataset.generalised else BASE_TO_NEW
    return DOMAINS if set(dataset.class_names) <= set(task.class_names) else CROSS_DATASET


def method_for(method: Method, dataset: Dataset) -> Method:
    """The same learned tensors, asking with the templates of ``dataset`` where the method asks with a data set's.

    Its task keeps its own classes, to which a cache of features belongs; ``classifier`` takes any others.
    """
    templates = dataset.task.templates
    if templates == method.task.templates:
        return method
    other = build_method(method.clip, method.config, replace(method.task, templates=templates))
    other.load_state_dict(method.state_dict())
    return other.eval()


def _accuracies(logits: Tensor, labels: Tensor, dataset: Dataset, protocol: str) -> dict[str, Any]:
    """Logits [N, C] over all names or, from a closed vocabulary, over those of the base classes; labels [N]."""
    is_open = logits.shape[1] == len(dataset.class_names)
    scores: dict[str, Any] = {"all": _accuracy(logits, labels)} if is_open else {}
    if protocol not in (BASE_TO_NEW, GENERALISED):
        return scores
    num_base = dataset.num_base
    is_base = labels < num_base
    scores["base"] = _accuracy(logits[is_base, :num_base], labels[is_base])
    if is_open:
        scores["new"] = _accuracy(logits[~is_base, num_base:], labels[~is_base] - num_base)
        scores["open_base"] = _accuracy(logits[is_base], labels[is_base])
        scores["open_new"] = _accuracy(logits[~is_base], labels[~is_base])
    if is_open and protocol == GENERALISED:
        scores["seen"] = _class_mean(logits[is_base], labels[is_base])
        scores["unseen"] = _class_mean(logits[~is_base], labels[~is_base])
    return scores


def _accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """Percent of rows whose greatest logit is at the label; None without rows."""
    return 100.0 * float((logits.argmax(dim=1) == labels).double().mean()) if len(labels) else None


def _class_mean(logits: Tensor, labels: Tensor) -> float | None:
    """The mean of the accuracies of the classes that have rows; None without rows."""
    if not len(labels):
        return None
    images_C = torch.bincount(labels)
    right_C = torch.bincount(labels, weights=(logits.argmax(dim=1) == labels).double())
    return 100.0 * float((right_C / images_C)[images_C > 0].mean())


def _counts(dataset: Dataset, split: str, protocol: str) -> dict[str, Any]:
    items, num_base = dataset.items(split), dataset.num_base
    counts = {"num_images": len(items), "num_classes": len(dataset.class_names)}
    if protocol not in (BASE_TO_NEW, GENERALISED):
        return counts
    num_base_images = sum(item.label < num_base for item in items)
    base = {"num_base_images": num_base_images, "num_base_classes": num_base}
    new = {"num_new_images": len(items) - num_base_images, "num_new_classes": len(dataset.class_names) - num_base}
    return counts | base | new


def _reliability(logits: Tensor, labels: Tensor, temperature: float | None) -> dict[str, Any]:
    before = reliability_bins(logits, labels)
    after = None if temperature is None else reliability_bins(logits, labels, temperature)
    return {
        "temperature": temperature,
        "ece_before": expected_calibration_error(before),
        "ece_after": None if after is None else expected_calibration_error(after),
        "reliability": after or before,
    }

"""Calibrated probabilities: temperature scaling and its measures (Guo et al., arXiv 1706.04599).

A confidence is the greatest probability of an image. Over many images it should be the share of them that are right.

Shapes: N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipship.core.errors import DataError
from clipship.training.datasets.base import LabelledImage
from clipship.training.evaluation.inference import distinguishable_names, features_of_files, logits_over
from clipship.training.methods.base import Method

BINS = 15
"""Equal parts of the confidences between 0 and 1, as published."""
TEMPERATURES = (0.05, 20.0)
"""The least and the greatest temperature."""
MIN_IMAGES = 20
"""With fewer validation images no temperature is fitted."""

_HALVINGS = 48
"""Of the logarithm's interval, 6 wide: more than float64 resolves in the gradient."""


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """The images whose confidence lies in one of the equal parts, its upper end included."""

    confidence: float | None
    """Their mean confidence in percent; None where there are none."""
    accuracy: float | None
    """How many percent of them are right; None where there are none."""
    count: int

    @property
    def gap(self) -> float:
        """Between confidence and accuracy, in percent; 0 without images."""
        return 0.0 if self.confidence is None or self.accuracy is None else abs(self.confidence - self.accuracy)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature for the logits, and what it was fitted on.

    Raises:
        DataError: a temperature that is not in :data:`TEMPERATURES`.
    """

    temperature: float
    """What logits are divided by before the softmax."""
    num_images: int
    """Validation images of classes with real images."""
    classes: str
    """Which classes those are: the "base" half, or "all"."""
    ece_before: float | None = None
    """Expected calibration error in percent over the images it was fitted on; None where it was not fitted."""
    ece_after: float | None = None
    """The same with the temperature."""
    reason: str = ""
    """Why the temperature is 1 without having been fitted; empty: it was fitted."""

    def __post_init__(self) -> None:
        least, greatest = TEMPERATURES
        if not least <= self.temperature <= greatest:
            raise DataError(f"temperature {self.temperature}: must be {least} to {greatest}: calibrate again")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Calibration:
        """The inverse of :func:`dataclasses.asdict`.

        Raises:
            DataError: a field is missing, unknown or of another type.
        """
        try:
            odd = set(content) ^ {field.name for field in fields(cls)}
            if odd:
                raise KeyError(*sorted(odd))
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise DataError(f"not a calibration ({error}): train again with this version") from error


def calibrate(
    method: Method, items: Sequence[LabelledImage], names: Sequence[str] | None = None, *, cache: Path | None = None
) -> Calibration:
    """Fit the temperature on those of ``items`` that show classes with real images, classified among ``names``.

    ``items`` are few-shot validation images, labelled into the task's classes; ``names`` are by default all classes
    that the method knows. ``cache`` is that of
    :func:`~clipship.training.evaluation.inference.features_of_files`.

    Raises:
        DataError: an image cannot be decoded.
    """
    names = names or distinguishable_names(method)
    known = [item for item in items if item.label < method.task.num_base]
    classes = "all" if method.task.num_base == len(method.task.class_names) else "base"
    if len(known) < MIN_IMAGES:
        reason = f"{len(known)} validation images of classes with real images, {MIN_IMAGES} are needed"
        return Calibration(temperature=1.0, num_images=len(known), classes=classes, reason=reason)
    features = features_of_files(method, [item.path for item in known], cache=cache)
    logits, labels = logits_over(method, names)(features), torch.tensor([item.label for item in known])
    temperature = fit_temperature(logits, labels)
    return Calibration(
        temperature=temperature,
        ece_before=expected_calibration_error(reliability_bins(logits, labels)),
        ece_after=expected_calibration_error(reliability_bins(logits, labels, temperature)),
        num_images=len(known),
        classes=classes,
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in :data:`TEMPERATURES` that makes ``labels`` int64 [N] most probable, given ``logits`` [N, C].

    The N images are joined by one more of unknown class with their mean loss, as in Laplace's rule of succession: where
    all N are right, by a hair or by far, their own likelihood would be greatest at temperature 0. The loss is convex in
    the inverse temperature, so halving an interval by the sign of its slope finds the one minimum.

    Raises:
        DataError: no images, logits that are not finite, or labels that do not belong to them.
    """
    _check(logits, labels)
    values = logits.detach().cpu().double()
    if bool((values == values[:, :1]).all()):
        return 1.0  # no temperature changes anything
    own = values.gather(1, labels.cpu()[:, None])[:, 0]
    wanted = (own * len(values) + values.mean(dim=1)) / (len(values) + 1)
    low, high = map(math.log, TEMPERATURES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = (torch.softmax(values / math.exp(middle), dim=1) * values).sum(dim=1)
        # expected - wanted is the slope over the inverse temperature: positive where probabilities are too sharp
        low, high = (middle, high) if float((expected - wanted).mean()) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def reliability_bins(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """The reliability diagram of ``logits`` [N, C] divided by ``temperature``, against ``labels`` int64 [N].

    Raises:
        DataError: as :func:`fit_temperature`.
    """
    _check(logits, labels)
    confidence, found = torch.softmax(logits.detach().cpu().double() / temperature, dim=1).max(dim=1)
    right = (found == labels.cpu()).double()
    place = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
    members = (place == number for number in range(bins))
    return tuple(
        ReliabilityBin(confidence=_percent(confidence[those]), accuracy=_percent(right[those]), count=int(those.sum()))
        for those in members
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Percent: the mean over all images of the gap between confidence and accuracy in their bin."""
    return sum(one.count * one.gap for one in bins) / sum(one.count for one in bins)


def _percent(shares: Tensor) -> float | None:
    return 100.0 * float(shares.mean()) if len(shares) else None


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        raise DataError(f"logits {list(logits.shape)}, labels {list(labels.shape)}: give [N, C] and [N], N at least 1")
    if not bool(logits.isfinite().all()):
        raise DataError("logits that are not finite: look at the images, or take fp32 instead of fp16")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(f"labels {int(labels.min())} to {int(labels.max())}: must be 0 to {logits.shape[1] - 1}")

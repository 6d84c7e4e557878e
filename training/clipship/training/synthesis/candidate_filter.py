"""Which candidates are kept: the best N by CLIP score, without near-duplicates.

Near-duplicates are found by the features that are computed for the score anyway. A perceptual hash would take different
small pictures of one thing on a plain background for equal.

Shapes: N candidates of a class, C classes, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from clipship.training.inputs.features import evaluation_features
from clipship.training.model import prompts
from clipship.training.model.clip import Clip, load_clip
from clipship.training.synthesis.class_prompts import ClassPrompts
from clipship.training.synthesis.config import SynthesisConfig


@dataclass(frozen=True, kw_only=True)
class FilterDecision:
    """Whether a candidate is kept, and why not."""

    score: float | None
    reason: str | None
    """Why it is dropped; None if it is kept."""


class Scorer:
    """The CLIP that scores, with the features of the classes.

    Raises:
        RecipeError: an unknown CLIP.
        DataError: a class name is too long for it.
    """

    def __init__(self, name: str, class_prompts: ClassPrompts) -> None:
        self.clip: Clip = load_clip(name)
        self.class_names = class_prompts.class_names
        texts = [class_feature(self.clip, class_prompts.plain_prompts[one]) for one in class_prompts.class_names]
        self._texts_CD = torch.stack(texts)

    def features(self, paths: Sequence[Path], device: torch.device) -> Tensor:
        """Unit features float32 [N, D] of image files, as training sees them.

        Raises:
            DataError: an image cannot be decoded.
        """
        self.clip.to(device)
        return evaluation_features(self.clip, paths)

    def decisions(
        self, config: SynthesisConfig, class_name: str, seeds: Sequence[int], features_ND: Tensor
    ) -> list[FilterDecision]:
        """The decisions on the candidates of a class; see :func:`choose`."""
        label = self.class_names.index(class_name)
        scores_NC = features_ND @ self._texts_CD.T
        others = [None if best == label else self.class_names[best] for best in scores_NC.argmax(dim=1).tolist()]
        taken_for = others if config.filter == "class" else [None] * len(seeds)
        return choose(config, seeds, scores_NC[:, label], features_ND, taken_for)


@torch.no_grad()
def class_feature(clip: Clip, texts: Sequence[str]) -> Tensor:
    """The unit feature float32 [D] of a class: the mean over its prompts, on the CPU.

    Raises:
        DataError: a prompt is too long for the text tower.
    """
    tokens = clip.tokenize(texts).to(clip.device)
    features = functional.normalize(prompts.text_features(clip, tokens).float(), dim=-1)
    return functional.normalize(features.mean(dim=0), dim=-1).cpu()


def choose(
    config: SynthesisConfig,
    seeds: Sequence[int],
    scores_N: Tensor,
    features_ND: Tensor,
    taken_for: Sequence[str | None],
) -> list[FilterDecision]:
    """Keep the best ``config.keep`` of a class; of near-duplicates the one with the best score.

    Args:
        config: how many, and from which cosine two images are near-duplicates.
        seeds: of the candidates, to name the original of a duplicate.
        scores_N: their cosines with the class.
        features_ND: their unit features.
        taken_for: by candidate, another class that CLIP takes it for; None if it passes.
    """
    decisions: dict[int, FilterDecision] = {}
    kept: list[int] = []
    for place in torch.argsort(scores_N, descending=True, stable=True).tolist():
        reason = f"taken for {taken_for[place]}" if taken_for[place] is not None else None
        reason = reason or _too_like(config, place, kept, seeds, features_ND)
        if reason is None and len(kept) == config.keep:
            reason = f"not among the {config.keep} best scores"
        if reason is None:
            kept.append(place)
        decisions[place] = FilterDecision(score=float(scores_N[place]), reason=reason)
    return [decisions[place] for place in range(len(seeds))]


def first_ones(config: SynthesisConfig, count: int) -> list[FilterDecision]:
    """Without a filter: the first ``config.keep`` of ``count`` candidates."""
    late = f"not among the first {config.keep}"
    return [FilterDecision(score=None, reason=None if place < config.keep else late) for place in range(count)]


def _too_like(
    config: SynthesisConfig, place: int, kept: Sequence[int], seeds: Sequence[int], features_ND: Tensor
) -> str | None:
    if not kept or config.duplicates == 1:
        return None
    cosines = features_ND[list(kept)] @ features_ND[place]
    nearest = int(cosines.argmax())
    if cosines[nearest] < config.duplicates:
        return None
    return f"near-duplicate of {seeds[kept[nearest]]} (cosine {float(cosines[nearest]):.3f})"

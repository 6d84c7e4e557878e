"""Losses, each a function of features or logits. B images of a batch, S synthetic ones, C classes, D joint dimensions.

float16 and bfloat16 are cast to float32 first; float64 is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def raised(values: Tensor) -> Tensor:
    """``values`` as float32; float64 is kept."""
    return values if values.dtype == torch.float64 else values.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over B of minus the log-probability of the label: logits [B, C], labels [B]."""
    return functional.cross_entropy(raised(logits), labels)


def classification_loss(features: Tensor, class_features: Tensor, labels: Tensor, logit_scale: float) -> Tensor:
    """Cross entropy of ``logit_scale`` x cosine: features [B, D], class features [C, D] of unit length, labels [B]."""
    with torch.autocast(features.device.type, enabled=False):  # times 100, bfloat16's steps are 0.1 of a logit
        cosine = functional.normalize(raised(features), dim=-1) @ raised(class_features).T
    return cross_entropy(logit_scale * cosine, labels)


def alignment_loss(
    synthetic: Tensor, real: Tensor, labels: Tensor, margin: float = 0.0, *, rows: Tensor | None = None
) -> Tensor:
    """Pull each synthetic feature to the real one of its pair, and closer to it than to real ones of other classes.

    Features, real [B, D] and synthetic [S, D], are as they leave the encoder, not normalised. Synthetic i is the
    partner of real ``rows[i]`` (``rows`` int64 [S]; None: of real i, S = B) and of its class, ``labels`` [B]. With d_ij
    the mean absolute difference over D of synthetic i and real j, the loss is the mean over the S pairs (i, p) of
    ``max(0, d_ip - min over j of another class of d_ij + margin) + d_ip``; where the batch holds one class only, the
    first term is 0. The cross-domain alignment of SYNC-CLIP (arXiv 2312.03805).
    """
    distance_SB = (raised(synthetic)[:, None] - raised(real)[None]).abs().mean(dim=-1)
    labels_S = labels if rows is None else labels[rows]
    nearest_other_S = distance_SB.masked_fill(labels_S[:, None] == labels[None], torch.inf).amin(dim=1)
    paired_S = distance_SB.diagonal() if rows is None else distance_SB.gather(1, rows[:, None])[:, 0]
    return (functional.relu(paired_S - nearest_other_S + margin) + paired_S).mean()


def cosine_distance(learned: Tensor, frozen: Tensor) -> Tensor:
    """1 minus the mean cosine of unit features [C, D], row by row: KgCoOp's knowledge loss (arXiv 2303.13283)."""
    return 1 - (raised(learned) * raised(frozen)).sum(dim=-1).mean()


def absolute_distance(learned: Tensor, frozen: Tensor) -> Tensor:
    """The mean absolute difference over rows and dimensions: PromptSRC's for features (arXiv 2307.06948)."""
    return (raised(learned) - raised(frozen)).abs().mean()


def divergence(logits: Tensor, frozen_logits: Tensor) -> Tensor:
    """KL(frozen || learned) of the class probabilities, logits [B, C]; the mean over B x C, not over B.

    PromptSRC's for logits (arXiv 2307.06948).
    """
    learned, frozen = (functional.log_softmax(raised(one), dim=-1) for one in (logits, frozen_logits))
    return (frozen.exp() * (frozen - learned)).mean()

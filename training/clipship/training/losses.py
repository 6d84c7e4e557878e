"""Losses, each a function of features. B images of a batch, C classes, D joint dimensions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def classification_loss(features: Tensor, class_features: Tensor, labels: Tensor, logit_scale: float) -> Tensor:
    """Cross entropy of ``logit_scale`` x cosine: features [B, D], class features [C, D] of unit length, labels [B]."""
    cosine = functional.normalize(features.float(), dim=-1) @ class_features.float().T
    return functional.cross_entropy(logit_scale * cosine, labels)


def alignment_loss(synthetic: Tensor, real: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
    """Pull each synthetic feature to the real one of its pair, and closer to it than to real ones of other classes.

    Features [B, D] are as they leave the encoder, not normalised; pair i has class ``labels[i]`` on both sides. With
    d_ij the mean absolute difference over D of synthetic i and real j, the loss is the mean over i of
    ``max(0, d_ii - min over j of another class of d_ij + margin) + d_ii``; where the batch holds one class only, the
    first term is 0. The cross-domain alignment of SYNC-CLIP (arXiv 2312.03805).
    """
    distance_BB = (synthetic.float()[:, None] - real.float()[None]).abs().mean(dim=-1)
    same_BB = labels[:, None] == labels[None]
    nearest_other_B = distance_BB.masked_fill(same_BB, torch.inf).amin(dim=1)
    paired_B = distance_BB.diagonal()
    return (functional.relu(paired_B - nearest_other_B + margin) + paired_B).mean()

"""CoCoOp: a context that every image shifts (arXiv 2203.05557).

Shapes: N images, C classes, L tokens, J = 1 layer, M tokens, W width of the text tower, D joint dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clipship.core.errors import UsageError
from clipship.training.config import at_least
from clipship.training.methods.base import Classify
from clipship.training.methods.layers import linear
from clipship.training.methods.prompted import ContextSettings, LearnedContext
from clipship.training.model import prompts


@dataclass(frozen=True, kw_only=True)
class CoCoOpSettings(ContextSettings):
    """A context of one layer, and the net that shifts it."""

    meta_reduction: int = at_least(1, 16)
    """Joint dimensions over the width of the net's hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.text_depth == 1, "1: cocoop has prompts in one layer", "text_depth")


class CoCoOp(LearnedContext):
    """Context [1, M, W] plus ``meta_net`` of the image's feature, one shift [W] for all M tokens."""

    name = "cocoop"
    settings_type = CoCoOpSettings
    settings: CoCoOpSettings
    not_exportable = "it computes other class features for every image, so there is no vocabulary to pack"

    def draw(self, generator: torch.Generator) -> None:
        """The net from features to shifts: D -> D / reduction -> W."""
        inputs = self.clip.embed_dim
        hidden = max(1, inputs // self.settings.meta_reduction)
        first, second = linear(inputs, hidden, generator), linear(hidden, self.clip.text_width, generator)
        self.meta_net = nn.Sequential(first, nn.ReLU(), second)

    def contexts(self, features: Tensor) -> Tensor:
        """Unit image features [N, D] -> the context of each image [N, 1, M, W]."""
        shift_NW: Tensor = self.meta_net(features.to(self.context.dtype))
        return self.context + shift_NW[:, None, None]

    def text_features(self, tokens: Tensor) -> Tensor:
        """Refused: the text side depends on the image.

        Raises:
            UsageError: always.
        """
        raise UsageError("cocoop has class features only together with an image: take its classifier(names)")

    def class_features(self, names: Sequence[str]) -> Tensor:
        """Refused, as :meth:`text_features` is.

        Raises:
            UsageError: always.
        """
        return self.text_features(torch.empty(0))

    def classifier(self, names: Sequence[str]) -> Classify:
        """Unit features [N, D] -> logits [N, C]; at most ``text_chunk`` pairs of image and class are computed at once.

        Raises:
            DataError: a prompt is too long for the text tower.
        """
        (tokens,) = self._tokens_of(tuple(names))
        return lambda features: self._chunked_logits(features, tokens)

    def _chunked_logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        classes = torch.split(tokens, self.config.text_chunk)
        images = torch.split(features, max(1, self.config.text_chunk // len(tokens)))
        keeps_all = len(classes) * len(images) == 1 or not torch.is_grad_enabled()

        def logits(some: Tensor, these: Tensor) -> Tensor:
            if keeps_all:
                return self._pair_logits(some, these)
            result: Tensor = checkpoint(self._pair_logits, some, these, use_reentrant=False)
            return result

        return torch.cat([torch.cat([logits(some, these) for these in classes], dim=1) for some in images])

    def _pair_logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        """[N, D] and int64 [C, L] -> [N, C]."""
        contexts = self.contexts(features)
        if prompts.can_share_context(self.clip):
            raw_NCD = prompts.contextual_text_features(self.clip, tokens, contexts)
        else:
            pairs = contexts.transpose(0, 1).repeat_interleave(len(tokens), dim=1)  # [1, N x C, M, W]
            raw_NCD = prompts.text_features(self.clip, tokens.repeat(len(features), 1), pairs)
            raw_NCD = raw_NCD.view(len(features), len(tokens), -1)
        cosine_NC = (functional.normalize(raw_NCD, dim=-1) * features[:, None]).sum(dim=-1)
        return self.clip.logit_scale * cosine_NC

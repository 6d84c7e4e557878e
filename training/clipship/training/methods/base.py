"""What every method is: a few learned tensors, features for images and for classes, and a loss.

Shapes: N images, C classes, L tokens, H = W pixels, D joint dimensions, B images of a batch, J prompted layers, M
tokens a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clipship.core.vocabulary import prompt_of
from clipship.training import prompts
from clipship.training.clip import Clip
from clipship.training.config import TrainConfig
from clipship.training.losses import classification_loss

_CHUNK = 128
"""Prompts that pass the text tower at once, so that a thousand classes fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be told apart."""

    class_names: tuple[str, ...]
    """All classes, base ones first."""
    num_base: int
    """How many of them have real training images."""
    templates: tuple[str, ...]
    """The data set's own templates, ``{}`` for the class name."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step learns from: normalised float32 pixels [B, 3, H, W], int64 labels [B] into the task's classes."""

    pixels: Tensor
    labels: Tensor
    files: tuple[str, ...]
    """Where the images came from, for error messages."""
    seen: Tensor | None = None
    """Synthetic images of the very classes in ``labels``, in the same order."""
    unseen: Tensor | None = None
    """Synthetic images of classes that have no real ones."""
    unseen_labels: Tensor | None = None

    def on(self, clip: Clip) -> Batch:
        """The batch where ``clip`` lives, with uint8 pixels [B, H, W, 3] normalised."""
        return Batch(
            pixels=clip.normalize(self.pixels.to(clip.device)),
            labels=self.labels.to(clip.device),
            files=self.files,
            seen=None if self.seen is None else clip.normalize(self.seen.to(clip.device)),
            unseen=None if self.unseen is None else clip.normalize(self.unseen.to(clip.device)),
            unseen_labels=None if self.unseen_labels is None else self.unseen_labels.to(clip.device),
        )


class Method(nn.Module):
    """The plain CLIP; a method overrides the prompts it learns and, where it must, the loss.

    The frozen model is no submodule, so parameters and state hold learned tensors only.
    """

    name = "zero-shot"
    image_side_frozen = True
    """Whether images pass the image tower without gradients."""
    needs_synthetic = False
    """Whether a batch must hold synthetic images."""

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.clip = clip
        self.config = config
        self.task = task
        self.templates: tuple[str, ...] = config.templates or task.templates
        self._tokens: dict[tuple[str, ...], list[Tensor]] = {}

    def text_prompts(self) -> Tensor | None:
        """Deep prompts [J, M, text width] of the text tower."""
        return None

    def image_prompts(self) -> Tensor | None:
        """Deep prompts [J, M, image width] of the image tower, as used at inference."""
        return None

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] -> unit features [N, D]."""
        return functional.normalize(prompts.image_features(self.clip, pixels, self.image_prompts()), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [C, L] of prompts from :attr:`templates` -> unit features [C, D]."""
        return functional.normalize(prompts.text_features(self.clip, tokens, self.text_prompts()), dim=-1)

    def class_features(self, names: Sequence[str]) -> Tensor:
        """Unit features [C, D] of classes by name: the mean over :attr:`templates`, renormalised.

        Raises:
            DataError: a prompt is too long for the text tower.
        """
        each = [self._chunked_text_features(tokens) for tokens in self._tokens_of(tuple(names))]
        if len(each) == 1:
            return each[0]
        return functional.normalize(torch.stack(each).mean(dim=0), dim=-1)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[N, D] and [C, D] of unit length -> [N, C]."""
        return self.clip.logit_scale * image_features @ class_features.T

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The scalar to minimise under "total", and its parts; here cross entropy of real images over base classes."""
        with torch.no_grad() if self.image_side_frozen else contextlib.nullcontext():
            features = self.image_features(batch.pixels)
        base = self.class_features(self.task.class_names[: self.task.num_base])
        real = classification_loss(features, base, batch.labels, self.clip.logit_scale)
        return {"total": real, "real": real.detach()}

    def learned(self) -> dict[str, Tensor]:
        """The learned tensors by name, detached, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.state_dict().items()}

    def _tokens_of(self, names: tuple[str, ...]) -> list[Tensor]:
        """Tokens [C, L'] a template, cut after the last end token; kept, as training asks for the same names again."""
        if names not in self._tokens:
            tokens = [self.clip.tokenize([prompt_of(name, form) for name in names]) for form in self.templates]
            self._tokens = {names: [_without_padding(self.clip, one).to(self.clip.device) for one in tokens]}
        return self._tokens[names]

    def _chunked_text_features(self, tokens: Tensor) -> Tensor:
        chunks = torch.split(tokens, _CHUNK)
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([self.text_features(chunk) for chunk in chunks])
        return torch.cat([checkpoint(self.text_features, chunk, use_reentrant=False) for chunk in chunks])


def _without_padding(clip: Clip, tokens: Tensor) -> Tensor:
    """Under a causal mask nothing after the end token reaches it, so those columns are not computed."""
    if clip.text.attn_mask is None or prompts.text_pool_of(clip.text)[0] not in ("argmax", "eos"):
        return tokens
    is_end = tokens == clip.tokenizer.eot_token_id
    return tokens[:, : int(is_end.int().argmax(dim=1).max()) + 1].contiguous()

"""What every method is: a few learned tensors, features for images and for classes, and a loss.

Shapes: N images, C classes, L tokens, H = W pixels, D joint dimensions, B images of a batch, G generated features, J
prompted layers, M tokens a layer, S of the real images with a synthetic partner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clipship.core.classification import VocabularyFeatures
from clipship.core.vocabulary import prompt_of
from clipship.training.config import MethodSettings, TrainConfig
from clipship.training.losses import cross_entropy, raised
from clipship.training.model import prompts
from clipship.training.model.clip import Clip

Classify = Callable[[Tensor], Tensor]
"""Unit image features [N, D] -> logits [N, C]."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be told apart."""

    class_names: tuple[str, ...]
    """All classes, base ones first."""
    num_base: int
    """How many of them have real training images."""
    templates: tuple[str, ...]
    """The data set's own templates, ``{}`` for the class name."""

    @property
    def base_names(self) -> tuple[str, ...]:
        """The classes with real training images."""
        return self.class_names[: self.num_base]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step learns from: images as normalised float32 pixels [B, 3, H, W], or as features where that is enough.

    A method whose image tower is frozen gets ``features``; the others get ``pixels``.
    """

    labels: Tensor
    """int64 [B] into the task's classes."""
    files: tuple[str, ...]
    """Where the images came from, for error messages."""
    pixels: Tensor | None = None
    features: Tensor | None = None
    """Unit features [B, D] of the frozen image tower."""
    seen: Tensor | None = None
    """Synthetic images of the very classes in ``labels``, in the same order; [S, 3, H, W], None where S is 0."""
    seen_rows: Tensor | None = None
    """int64 [S], ascending: which real images they are the partners of; None: of all (S = B)."""
    seen_share: float = 1.0
    """S / B of the whole batch; its parts keep it."""
    unseen: Tensor | None = None
    """Synthetic images of classes that have no real ones."""
    unseen_labels: Tensor | None = None
    generated: Tensor | None = None
    """Unit features [G, D] that a generator made for classes without images."""
    generated_labels: Tensor | None = None

    def __len__(self) -> int:
        return max(len(self.labels), 0 if self.generated_labels is None else len(self.generated_labels))

    @property
    def synthetic(self) -> Tensor | None:
        """``seen``, then ``unseen``; None where there is neither."""
        images = [one for one in (self.seen, self.unseen) if one is not None]
        return torch.cat(images) if images else None

    @property
    def seen_labels(self) -> Tensor:
        """int64 [S]: the classes of ``seen``."""
        return self.labels if self.seen_rows is None else self.labels[self.seen_rows]

    @property
    def seen_weight(self) -> float:
        """What a mean over ``seen`` is multiplied by.

        The parts of a batch are weighted by their real images. Where these have unequal numbers of synthetic partners,
        this makes the weighted sum over the parts the mean over all S partners; for a whole batch it is 1.
        """
        assert self.seen is not None
        return len(self.seen) / (len(self.labels) * self.seen_share)

    def part(self, number: int, count: int) -> Batch:
        """Part ``number`` (from 0) of ``count`` nearly equal ones: an image stays with its synthetic partners."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[_bounds(len(value), number, count)]

        if count == 1:
            return self
        tensors: dict[str, Any] = {name: cut(getattr(self, name)) for name in ("labels", *_TENSORS)}
        if self.seen_rows is not None:
            tensors |= self._partners(_bounds(len(self.labels), number, count))
        return replace(self, **tensors)

    def _partners(self, real: slice) -> dict[str, Tensor | None]:
        """The synthetic partners of the images in ``real``, with their rows among these."""
        assert self.seen is not None
        assert self.seen_rows is not None
        chosen = (self.seen_rows >= real.start) & (self.seen_rows < real.stop)
        if not chosen.any():
            return {"seen": None, "seen_rows": None}
        return {"seen": self.seen[chosen], "seen_rows": self.seen_rows[chosen] - real.start}

    def on(self, clip: Clip) -> Batch:
        """The batch where ``clip`` lives, with uint8 pixels [B, H, W, 3] normalised."""

        def moved(name: str) -> Tensor | None:
            value: Tensor | None = getattr(self, name)
            if value is None:
                return None
            return clip.normalize(value.to(clip.device)) if name in _IMAGES else value.to(clip.device)

        tensors: dict[str, Any] = {name: moved(name) for name in ("labels", *_TENSORS)}
        return replace(self, **tensors)


def _bounds(size: int, number: int, count: int) -> slice:
    """Part ``number`` (from 0) of ``count`` nearly equal ones of ``size`` rows."""
    return slice(size * number // count, size * (number + 1) // count)


_IMAGES = ("pixels", "seen", "unseen")
_TENSORS = (*_IMAGES, "seen_rows", "features", "unseen_labels", "generated", "generated_labels")


@dataclass(frozen=True, kw_only=True)
class FeatureSamples:
    """Unit features [N, D] of the frozen image tower, and their labels [N] into the task's classes."""

    features: Tensor
    labels: Tensor


class Source(Protocol):
    """What a method can ask for before its first step and after its last one."""

    def train(self, views: int) -> FeatureSamples:
        """The few-shot images of the learned classes: the renormalised mean over ``views`` augmented views of each."""

    def validation(self) -> FeatureSamples:
        """The few-shot validation images of the learned classes, as at test time; may be empty (N = 0)."""

    def generated(self, per_class: int) -> FeatureSamples | None:
        """Generated features of the classes without images; None where the run has no generator."""


@runtime_checkable
class FeatureGenerator(Protocol):
    """A method that makes image features from class names."""

    def generate(self, labels: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
        """Unit features [G, D] of the classes ``names[label]``, labels int64 [G]; equal generators give equal ones."""


class Method(nn.Module):
    """The plain CLIP; a method overrides the prompts it learns and, where it must, the loss.

    A module of this package defines a method by a subclass with its own ``Settings``; nothing lists it by hand.

    The frozen model is no submodule, so parameters and state hold learned tensors only.
    """

    Settings: ClassVar[type[MethodSettings]]
    """The settings that only this method has; a class without is no method but shares code with some."""
    settings: MethodSettings
    image_side_frozen = True
    """Whether images pass the image tower as it is, so that their features can be kept."""
    needs_synthetic = False
    """Whether a batch must hold synthetic images."""
    closed_vocabulary = False
    """Whether only classes with real images can be told apart."""
    selection = ""
    """What is chosen on validation images besides the weights, in a few words; empty: nothing."""
    not_exportable = ""
    """Why ``clipship pack`` cannot take the method; empty: it can."""

    def __init__(self, clip: Clip, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.clip = clip
        self.config = config
        self.settings = config.settings
        self.task = task
        self.templates: tuple[str, ...] = config.templates or task.templates
        self.notes: dict[str, float] = {}
        """What a run has measured besides its losses; stored in the checkpoint's record."""
        self._tokens: dict[tuple[str, ...], list[Tensor]] = {}
        self._constant: dict[tuple[str, ...], Tensor] = {}

    @property
    def name(self) -> str:
        """A name of :data:`clipship.training.methods.METHODS`."""
        return self.settings.method

    def begin(self, source: Source) -> None:
        """Called once, before the first step of a run."""

    def end(self, source: Source) -> None:
        """Called once, after the last step of a run."""

    def text_prompts(self) -> Tensor | None:
        """Deep prompts [J, M, text width] of the text tower."""
        return None

    def image_prompts(self) -> Tensor | None:
        """Deep prompts [J, M, image width] of the image tower, as used at inference."""
        return None

    def adapted(self, features: Tensor) -> Tensor:
        """Unit features [N, D] of the image tower -> unit features [N, D] that are compared with classes."""
        return features

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] -> unit features [N, D]."""
        raw = prompts.image_features(self.clip, pixels, self.image_prompts())
        return self.adapted(functional.normalize(raw, dim=-1))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [C, L] of prompts from :attr:`templates` -> unit features [C, D]."""
        return functional.normalize(prompts.text_features(self.clip, tokens, self.text_prompts()), dim=-1)

    def class_features(self, names: Sequence[str]) -> Tensor:
        """Unit features [C, D] of classes by name: the mean over :attr:`templates`, renormalised.

        Raises:
            DataError: a prompt is too long for the text tower.
        """
        key = tuple(names)
        if self.text_prompts() is not None:
            return self._fresh_class_features(key)
        if key not in self._constant:
            with torch.no_grad():
                self._constant = {key: self._fresh_class_features(key)}
        return self._constant[key]

    def classifier(self, names: Sequence[str]) -> Classify:
        """What tells classes apart by name; made once, then given the features of any number of images."""
        classes = self.class_features(names)
        return lambda features: self.logits(features, classes)

    @torch.no_grad()
    def exported_classifier(self, names: Sequence[str]) -> VocabularyFeatures:
        """:meth:`classifier` as arrays, one row a name: what ``clipship pack`` writes.

        Raises:
            DataError: a prompt is too long for the text tower, or the method cannot tell these classes apart.
        """
        features = self.class_features(names).float().cpu().numpy()
        return VocabularyFeatures(features=features, logit_scale=self.clip.logit_scale)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[N, D] and [C, D] of unit length -> [N, C]."""
        with torch.autocast(image_features.device.type, enabled=False):  # times 100, bfloat16's steps are 0.1
            return self.clip.logit_scale * raised(image_features) @ raised(class_features).T

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The scalar to minimise under "total", and its parts; here cross entropy over the classes of the batch."""
        features, labels, names = self.examples(batch)
        classification = cross_entropy(self.classifier(names)(self.adapted(features)), labels)
        return {"total": classification, "real": classification.detach()}

    def examples(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Frozen features [B + G, D], labels [B + G], and the names they are told apart among.

        Real images among the base classes; with generated features both among all classes, as SHIP does.
        """
        if batch.generated is None:
            assert batch.features is not None
            return batch.features, batch.labels, self.task.base_names
        assert batch.generated_labels is not None
        features = batch.generated if batch.features is None else torch.cat([batch.features, batch.generated])
        return features, torch.cat([batch.labels, batch.generated_labels]), self.task.class_names

    def learned(self) -> dict[str, Tensor]:
        """The learned tensors by name, detached, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.state_dict().items()}

    def _fresh_class_features(self, names: tuple[str, ...]) -> Tensor:
        each = [self._chunked_text_features(tokens) for tokens in self._tokens_of(names)]
        if len(each) == 1:
            return each[0]
        return functional.normalize(torch.stack(each).mean(dim=0), dim=-1)

    def _tokens_of(self, names: tuple[str, ...]) -> list[Tensor]:
        """Tokens [C, L'] a template, cut after the last end token; kept, as training asks for the same names again."""
        if names not in self._tokens:
            tokens = [self.clip.tokenize([prompt_of(name, form) for name in names]) for form in self.templates]
            self._tokens = {names: [prompts.without_padding(self.clip, one).to(self.clip.device) for one in tokens]}
        return self._tokens[names]

    def _chunked_text_features(self, tokens: Tensor) -> Tensor:
        chunks = torch.split(tokens, self.config.text_chunk)
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._shared_text_features(chunk) for chunk in chunks])
        return torch.cat([checkpoint(self._shared_text_features, chunk, use_reentrant=False) for chunk in chunks])

    def _shared_text_features(self, tokens: Tensor) -> Tensor:
        """As :meth:`text_features`, but what all classes have in common, the context, is computed once."""
        context = self.text_prompts()
        if context is None or not prompts.can_share_context(self.clip):
            return self.text_features(tokens)
        return functional.normalize(prompts.contextual_text_features(self.clip, tokens, context[None])[0], dim=-1)

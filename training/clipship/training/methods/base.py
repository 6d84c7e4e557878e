"""What every method is: a few learned tensors, features for images and for classes, and a loss.

Shapes: N images, C classes, L tokens, H = W pixels, D joint dimensions, B images of a batch, G generated features, J
prompted layers, M tokens a layer, S of the real images with a synthetic partner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clipship.core.classification import VocabularyFeatures
from clipship.core.vocabulary import prompt_of
from clipship.training.config import Settings, TrainConfig
from clipship.training.losses import cross_entropy, raised
from clipship.training.model import prompts
from clipship.training.model.clip import Clip

Classify = Callable[[Tensor], Tensor]
"""Unit image features [N, D] -> logits [N, C]."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The classes to distinguish."""

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
class ImageSet:
    """N images or their features, and their classes."""

    images: Tensor
    """uint8 pixels [N, H, W, 3], normalised ones [N, 3, H, W], or unit features [N, D] of the frozen image tower."""
    labels: Tensor
    """int64 [N] into the task's classes."""

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, number: int, count: int) -> Self:
        """Part ``number`` (from 0) of ``count`` nearly equal ones."""
        part = _bounds(len(self), number, count)
        return replace(self, images=self.images[part], labels=self.labels[part])

    def on(self, clip: Clip) -> Self:
        """The same on the device of ``clip``, uint8 pixels normalised."""
        images = self.images.to(clip.device)
        images = clip.normalize(images) if images.dtype == torch.uint8 else images
        return replace(self, images=images, labels=self.labels.to(clip.device))


@dataclass(frozen=True, kw_only=True)
class Partners(ImageSet):
    """S synthetic images, each of the class of one real image of the batch."""

    rows: Tensor
    """int64 [S], ascending: the real images."""
    share: float
    """S / B of the whole batch; its parts keep it, and may have no partner."""

    def of(self, real: slice) -> Partners:
        """The partners of the images in ``real``, with their rows among these."""
        chosen = (self.rows >= real.start) & (self.rows < real.stop)
        rows = self.rows[chosen] - real.start
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], rows=rows)

    def on(self, clip: Clip) -> Partners:
        """The same on the device of ``clip``, uint8 pixels normalised."""
        return replace(super().on(clip), rows=self.rows.to(clip.device))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step learns from. A method whose image tower is frozen gets features, the others pixels."""

    real: ImageSet
    """B real images; none where all features are generated."""
    files: tuple[str, ...] = ()
    """Paths of the images, for error messages."""
    synthetic_base: Partners | None = None
    """Synthetic images of the classes of ``real``."""
    synthetic_new: ImageSet | None = None
    """Synthetic images of classes that have no real ones."""
    generated: ImageSet | None = None
    """G features that a generator made for classes without images."""

    def __len__(self) -> int:
        return max(len(self.real), 0 if self.generated is None else len(self.generated))

    @property
    def synthetic(self) -> Tensor | None:
        """The images of ``synthetic_base``, then those of ``synthetic_new``; None where there is neither."""
        images = [one.images for one in (self.synthetic_base, self.synthetic_new) if one is not None and len(one)]
        return torch.cat(images) if images else None

    @property
    def partner_weight(self) -> float:
        """What a mean over ``synthetic_base`` is multiplied by.

        The parts of a batch are weighted by their real images. Where these have unequal numbers of synthetic partners,
        this makes the weighted sum over the parts the mean over all S partners; for a whole batch it is 1.
        """
        assert self.synthetic_base is not None
        return len(self.synthetic_base) / (len(self.real) * self.synthetic_base.share)

    def part(self, number: int, count: int) -> Batch:
        """Part ``number`` (from 0) of ``count`` nearly equal ones: an image stays with its synthetic partners."""
        if count == 1:
            return self
        parts: dict[str, Any] = {name: images.part(number, count) for name, images in self._sets.items()}
        if self.synthetic_base is not None:
            parts["synthetic_base"] = self.synthetic_base.of(_bounds(len(self.real), number, count))
        return replace(self, **parts)

    def on(self, clip: Clip) -> Batch:
        """The batch on the device of ``clip``, uint8 pixels normalised."""
        moved: dict[str, Any] = {name: images.on(clip) for name, images in self._sets.items()}
        return replace(self, **moved)

    @property
    def _sets(self) -> dict[str, ImageSet]:
        """By field: what the batch has."""
        return {name: value for name, value in vars(self).items() if isinstance(value, ImageSet)}


def _bounds(size: int, number: int, count: int) -> slice:
    """Part ``number`` (from 0) of ``count`` nearly equal ones of ``size`` rows."""
    return slice(size * number // count, size * (number + 1) // count)


class Source(Protocol):
    """Data for a method before its first step and after its last one."""

    def train(self, views: int) -> ImageSet:
        """The few-shot images of the learned classes: the renormalised mean over ``views`` augmented views of each."""

    def validation(self) -> ImageSet:
        """The few-shot validation images of the learned classes, as at test time; may be empty (N = 0)."""

    def generated(self, per_class: int) -> ImageSet | None:
        """Generated features of the classes without images; None where the run has no generator."""


@runtime_checkable
class FeatureGenerator(Protocol):
    """A method that makes image features from class names."""

    def generate(self, labels: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
        """Unit features [G, D] of the classes ``names[label]``, labels int64 [G]; equal generators give equal ones."""


def chunked(function: Callable[..., Tensor], *rows: Tensor, size: int) -> Tensor:
    """``function`` of ``rows``, ``size`` at once; several chunks recompute their activations in the backward pass."""
    chunks = list(zip(*(torch.split(one, size) for one in rows), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([function(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


class Method(nn.Module):
    """Plain CLIP; a method overrides the prompts it learns and, if needed, the loss.

    A module of this package defines a method by a subclass with a ``name``; there is no list to add it to.

    The frozen model is no submodule, so parameters and state hold learned tensors only.
    """

    name: ClassVar[str]
    """A class without a name of its own is no method but shares code with some."""
    settings_type: ClassVar[type[Settings]] = Settings
    """The settings that are the method's own."""
    settings: Any
    """Of that type."""
    image_side_frozen = True
    """Whether the image tower has no learned tensors, so that its features can be cached."""
    needs_synthetic = False
    """Whether a batch must hold synthetic images."""
    closed_vocabulary = False
    """Whether the method knows only classes with real images."""
    selection = ""
    """What else is chosen on validation images, in a few words; empty: nothing."""
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
        """Measurements of a run besides its losses; stored in the checkpoint."""
        self._tokens: dict[tuple[str, ...], list[Tensor]] = {}
        self._constant: dict[tuple[str, ...], Tensor] = {}

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
        """A classifier over ``names``, made once for any number of images."""
        classes = self.class_features(names)
        return lambda features: self.logits(features, classes)

    @torch.no_grad()
    def exported_classifier(self, names: Sequence[str]) -> VocabularyFeatures:
        """:meth:`classifier` as arrays, one row a name: what ``clipship pack`` writes.

        Raises:
            DataError: a prompt is too long for the text tower, or the method does not know a class.
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
        """Frozen features [B + G, D], labels [B + G], and the candidate class names.

        Real images among the base classes; with generated features both among all classes, as SHIP does.
        """
        real, generated = batch.real, batch.generated
        if generated is None:
            return real.images, real.labels, self.task.base_names
        features = torch.cat([real.images, generated.images])
        return features, torch.cat([real.labels, generated.labels]), self.task.class_names

    def learned(self) -> dict[str, Tensor]:
        """The learned tensors by name, detached, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.state_dict().items()}

    def _fresh_class_features(self, names: tuple[str, ...]) -> Tensor:
        each = [self._chunked_text_features(tokens) for tokens in self._tokens_of(names)]
        if len(each) == 1:
            return each[0]
        return functional.normalize(torch.stack(each).mean(dim=0), dim=-1)

    def _tokens_of(self, names: tuple[str, ...]) -> list[Tensor]:
        """Tokens [C, L'] per template, cut after the last end token; cached, since training repeats the names."""
        if names not in self._tokens:
            tokens = [self.clip.tokenize([prompt_of(name, form) for name in names]) for form in self.templates]
            self._tokens = {names: [prompts.without_padding(self.clip, one).to(self.clip.device) for one in tokens]}
        return self._tokens[names]

    def _chunked_text_features(self, tokens: Tensor) -> Tensor:
        return chunked(self._shared_text_features, tokens, size=self.config.text_chunk)

    def _shared_text_features(self, tokens: Tensor) -> Tensor:
        """As :meth:`text_features`, but the context that all classes share is computed once."""
        context = self.text_prompts()
        if context is None or not prompts.can_share_context(self.clip):
            return self.text_features(tokens)
        return functional.normalize(prompts.contextual_text_features(self.clip, tokens, context[None])[0], dim=-1)

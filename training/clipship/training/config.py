"""Everything a training run is: one frozen record, checked when it is made, stored whole in the checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipship.core.errors import RecipeError

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Raises:
        RecipeError: a setting out of range, or two that contradict each other.
    """

    recipe: str
    """The recipe these settings came from."""
    method: str
    """A name of :data:`clipship.training.methods.METHODS`."""
    base_model: str
    """As :func:`clipship.training.clip.load_clip` takes it."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` for the class name; empty: the data set's own. Methods that learn a context ignore it."""

    shots: int = 16
    """Real images a class."""
    epochs: int = 0
    """Passes over the few-shot set; 0 where nothing is learned."""
    batch_size: int = 8
    """Real images a step (synthetic ones come on top)."""
    learning_rate: float = 0.0025
    """From epoch 2 on, before the cosine."""
    warmup_learning_rate: float = 1e-5
    """In epoch 1."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of SGD, on every learned tensor."""

    text_tokens: int = 4
    """Learned tokens a layer of the text tower."""
    text_depth: int = 1
    """Layers of the text tower that get their own tokens."""
    context_init: str = "a photo of a"
    """Words whose embeddings start the first text layer; empty: random."""
    image_tokens: int = 0
    """Learned tokens a layer of the image tower."""
    image_depth: int = 0
    """Layers of the image tower that get their own tokens."""
    domain_tokens: int = 0
    """How many of ``image_tokens`` belong to the domain (real or synthetic) instead of being shared."""

    synthetic_weight: float = 0.0
    """w: the weight of the synthetic images' classification loss."""
    align_weight: float = 0.0
    """lambda: the weight of the cross-domain alignment."""
    redraw_synthetic: bool = False
    """Whether synthetic images get a new crop each time; the published method draws it once."""

    min_crop: float = 0.08
    """Smallest share of an image's area that a training crop keeps."""
    flip: bool = True
    """Whether half of the training images are mirrored."""
    seed: int = 1
    """Of the few-shot sample, the initial prompts, the order and the crops."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast; learned tensors stay float32)."""

    def __post_init__(self) -> None:
        at_least_1 = ("shots", "batch_size", "text_tokens", "text_depth")
        at_least_0 = (
            *("epochs", "learning_rate", "warmup_learning_rate", "weight_decay"),
            *("image_tokens", "image_depth", "synthetic_weight", "align_weight"),
        )
        for name in at_least_1:
            self._require(getattr(self, name) >= 1, "at least 1", name)
        for name in at_least_0:
            self._require(getattr(self, name) >= 0, "at least 0", name)
        self._require(0 <= self.momentum < 1, "in [0, 1)", "momentum")
        self._require(0 < self.min_crop <= 1, "in (0, 1]", "min_crop")
        self._require(self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}", "precision")
        self._require(0 <= self.domain_tokens <= self.image_tokens, "in 0..image_tokens", "domain_tokens")
        both = (self.image_depth > 0) == (self.image_tokens > 0)
        self._require(both, "both 0 or both at least 1", "image_depth", "image_tokens")

    def _require(self, fine: bool, accepted: str, *names: str) -> None:
        if not fine:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise RecipeError(f"recipe {self.recipe}: {given}: must be {accepted}")

    @property
    def digest(self) -> str:
        """SHA-256 of all settings: equal digests mean equal runs on equal data."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {**asdict(self), "templates": list(self.templates)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            RecipeError: a field is missing or unknown, or as the constructor.
        """
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            odd = ", ".join(sorted(set(content) ^ names))
            raise RecipeError(f"not the settings of a run: {odd} missing or unknown: train again with this version")
        return cls(**{**content, "templates": tuple(content["templates"])})

"""The settings of a training run: frozen, validated on creation, stored in the checkpoint.

:class:`TrainConfig` holds what every run has. What only some methods have is in a :class:`Settings` beside the method.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from clipship.core.errors import RecipeError


def at_least(minimum: float, default: Any) -> Any:
    """A field of :class:`Settings` whose values are None or at least ``minimum``."""
    return field(default=default, metadata={"minimum": minimum})


def one_of(*choices: str) -> Any:
    """A field of :class:`Settings` that takes one of ``choices``, by default the first."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that validate themselves on creation.

    Raises:
        RecipeError: a setting is out of range, or two contradict each other.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value, minimum = getattr(self, one.name), one.metadata.get("minimum")
            if value is not None and minimum is not None:
                self._require(value >= minimum, f"at least {minimum}", one.name)
            choices = one.metadata.get("choices", (value,))
            self._require(value in choices, f"one of {', '.join(map(str, choices))}", one.name)

    def _require(self, fine: bool, accepted: str, *names: str) -> None:
        if not fine:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise RecipeError(f"{given}: must be {accepted}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of one run; :func:`clipship.training.methods.config_of` makes them from names and values."""

    recipe: str
    """The recipe these settings came from."""
    method: str
    """A name of :data:`clipship.training.methods.METHODS`."""
    settings: Settings
    """The method's own, of its ``settings_type``."""
    base_model: str
    """As :func:`clipship.training.model.clip.load_clip` takes it."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` for the class name; empty: the data set's own. Methods that learn a context ignore it."""
    generator: TrainConfig | None = None
    """The run that first learns a generator of features for classes that have only a name."""

    classes: str = one_of("base", "all", "none")
    """Which classes have real images: the "base" half, "all", or "none" (a generator makes every feature)."""
    shots: int = at_least(0, 16)
    """Real images a class; 0: all."""
    synthetic_shots: int | None = at_least(0, None)
    """Synthetic images a class, where a class has as many; None: all that the set kept; 0: none."""
    synthetic_filter: bool = True
    """Whether to take those with CLIP's best scores, or the first by seed."""
    redraw_synthetic: bool = False
    """Whether synthetic images get a new crop each time; the published method draws it once."""

    epochs: int = at_least(0, 0)
    """Passes over the few-shot set; 0 if no step is learned."""
    batch_size: int = at_least(1, 8)
    """Real images a step (synthetic ones and generated features come on top)."""
    accumulate: int = at_least(1, 1)
    """Parts that a batch is split into; their gradients add up to those of the mean loss."""
    optimizer: str = one_of("sgd", "adamw")
    """Of the learned tensors."""
    learning_rate: float = at_least(0, 0.0025)
    """After the warm-up, before the cosine."""
    schedule: str = one_of("epoch-cosine", "step-cosine", "constant")
    """The rate falls epoch by epoch as in Dassl, step by step to 0, or is constant."""
    warmup_epochs: int = at_least(0, 1)
    """Epochs at the warm-up's rate."""
    warmup_learning_rate: float = at_least(0, 1e-5)
    """In the warm-up epochs."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = at_least(0, 5e-4)
    """On every learned tensor."""
    adam_epsilon: float = 1e-8
    """Of AdamW."""
    average_mean: float = at_least(0, 0.0)
    """With ``average_std``: the epoch with the largest weight in the Gaussian average of the parameters."""
    average_std: float = at_least(0, 0.0)
    """The standard deviation of that average, in epochs; 0: keep the weights of the last step."""

    min_crop: float = 0.08
    """Smallest share of an image's area that a training crop keeps."""
    flip: bool = True
    """Whether half of the training images are mirrored."""
    feature_views: int = at_least(0, 0)
    """With a frozen image tower: augmented views of the training set that are encoded once and cached on disk; epoch e
    uses view e modulo this number. 0: every epoch encodes its own."""
    text_chunk: int = at_least(1, 128)
    """Prompts per pass through the text tower; activations are recomputed in the backward pass."""
    seed: int = 1
    """Of the few-shot sample, the initial tensors, the order of images and the crops."""
    precision: str = one_of("fp32", "bf16", "fp16")
    """Of autocast; learned tensors stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.momentum < 1, "in [0, 1)", "momentum")
        self._require(self.adam_epsilon > 0, "greater than 0", "adam_epsilon")
        self._require(0 < self.min_crop <= 1, "in (0, 1]", "min_crop")
        self._require(self.accumulate <= self.batch_size, "at most batch_size", "accumulate", "batch_size")
        from_names = self.classes != "none" or self.generator is not None
        self._require(from_names, "base or all where no generator makes features", "classes")

    def with_settings(self, **changes: Any) -> TrainConfig:
        """:func:`dataclasses.replace` for the settings of the run and of its method alike."""
        names = {one.name for one in fields(self.settings)}
        own = {name: value for name, value in changes.items() if name in names}
        common = {name: value for name, value in changes.items() if name not in names}
        return replace(self, settings=replace(self.settings, **own), **common)

    @property
    def digest(self) -> str:
        """SHA-256 of all settings: equal digests mean equal runs on equal data."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object: the settings of the run and the method's own.

        :func:`clipship.training.checkpoint.config_from_json` is the inverse.
        """
        common = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "settings"}
        content = {**common, **asdict(self.settings)}
        lists = {name: list(value) for name, value in content.items() if isinstance(value, tuple)}
        generator = None if self.generator is None else self.generator.to_json()
        return {**content, **lists, "generator": generator}

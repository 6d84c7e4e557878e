"""Everything a training run is: one frozen record, checked when it is made, stored whole in the checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipship.core.errors import RecipeError

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("epoch-cosine", "step-cosine", "constant")
CLASSES = ("base", "all", "none")


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
    """As :func:`clipship.training.model.clip.load_clip` takes it."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` for the class name; empty: the data set's own. Methods that learn a context ignore it."""
    reference_templates: tuple[str, ...] = ()
    """Prompts of the frozen model that learned ones are held to; empty: the data set's own."""
    generator: TrainConfig | None = None
    """The run that first learns a generator of features for classes that have only a name."""

    classes: str = "base"
    """Which classes have real images: the "base" half, "all", or "none" (a generator makes every feature)."""
    shots: int = 16
    """Real images a class; 0: all there are."""
    epochs: int = 0
    """Passes over the few-shot set; 0 where nothing is learned step by step."""
    batch_size: int = 8
    """Real images a step (synthetic ones and generated features come on top)."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other; the gradients are those of their mean loss."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    learning_rate: float = 0.0025
    """After the warm-up, before the cosine."""
    schedule: str = "epoch-cosine"
    """The rate falls epoch by epoch as in Dassl, step by step to 0, or is constant."""
    warmup_epochs: int = 1
    """Epochs at the warm-up's rate."""
    warmup_learning_rate: float = 1e-5
    """In the warm-up epochs."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """On every learned tensor."""
    adam_epsilon: float = 1e-8
    """Of AdamW."""
    average_mean: float = 0.0
    """With ``average_std``: the epoch that weighs most in the Gaussian average of the weights."""
    average_std: float = 0.0
    """The spread of that average, in epochs; 0: the weights of the last step are kept."""

    text_tokens: int = 4
    """Learned tokens a layer of the text tower."""
    text_depth: int = 1
    """Layers of the text tower that get their own tokens."""
    context_init: str = "a photo of a"
    """Words whose embeddings start the first text layer; those beyond ``text_tokens`` stay fixed; empty: random."""
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
    synthetic_shots: int | None = None
    """Synthetic images a class, where a class has as many; None: all that the set kept; 0: none."""
    synthetic_filter: bool = True
    """Whether they are those with CLIP's best scores, or the first by seed, whatever their score."""
    redraw_synthetic: bool = False
    """Whether synthetic images get a new crop each time; the published method draws it once."""
    text_consistency: float = 0.0
    """The weight of the distance between learned and frozen class features."""
    image_consistency: float = 0.0
    """The weight of the distance between prompted and frozen image features."""
    logit_consistency: float = 0.0
    """The weight of the divergence between prompted and frozen class probabilities."""

    meta_reduction: int = 16
    """Joint dimensions over the width of CoCoOp's hidden layer."""
    adapter_reduction: int = 4
    """Joint dimensions over the width of an adapter's hidden layer."""
    adapter_ratio: float = 0.2
    """The adapter's share in the adapted feature."""
    cache_alpha: float = 1.0
    """The weight of a cache's votes beside CLIP's logits; where the search starts."""
    cache_beta: float = 5.5
    """How fast a vote falls with the distance to the key; where the search starts."""
    cache_views: int = 10
    """Augmented views of an image whose mean feature is its key."""
    generated_shots: int = 16
    """Generated keys of a cache for each class without images."""

    encoder_width: int = 2048
    """Hidden width of the feature generator's encoder."""
    decoder_width: int = 4096
    """Hidden width of its decoder, before the text tower."""
    decoder_slope: float = 0.0
    """Negative slope of the decoder's ReLU."""
    kl_weight: float = 1.0
    """The weight of the posterior's divergence from N(0, I)."""

    min_crop: float = 0.08
    """Smallest share of an image's area that a training crop keeps."""
    flip: bool = True
    """Whether half of the training images are mirrored."""
    feature_views: int = 0
    """Where the image tower is frozen: augmented views of the training set that are encoded once and kept on disk;
    epoch e learns from view e modulo their number. 0: every epoch is encoded anew."""
    text_chunk: int = 128
    """Prompts that pass the text tower at once; its activations are computed again on the way back."""
    seed: int = 1
    """Of the few-shot sample, the initial tensors, the order and the crops."""
    precision: str = "fp32"
    """fp32, bf16 or fp16 (autocast; learned tensors stay float32)."""

    def __post_init__(self) -> None:
        at_least_1 = (
            *("batch_size", "accumulate", "text_tokens", "text_depth", "text_chunk"),
            *("meta_reduction", "adapter_reduction", "cache_views", "encoder_width", "decoder_width"),
        )
        at_least_0 = (
            *(
                "shots",
                "epochs",
                "learning_rate",
                "warmup_epochs",
                "warmup_learning_rate",
                "weight_decay",
                "average_std",
            ),
            *("image_tokens", "image_depth", "synthetic_weight", "align_weight", "feature_views", "generated_shots"),
            *("text_consistency", "image_consistency", "logit_consistency", "cache_alpha", "cache_beta", "kl_weight"),
        )
        synthetic_shots = 0 if self.synthetic_shots is None else self.synthetic_shots
        self._require(synthetic_shots >= 0, "at least 0", "synthetic_shots")
        for name in at_least_1:
            self._require(getattr(self, name) >= 1, "at least 1", name)
        for name in at_least_0:
            self._require(getattr(self, name) >= 0, "at least 0", name)
        for name, accepted in _CHOICES.items():
            self._require(getattr(self, name) in accepted, f"one of {', '.join(accepted)}", name)
        self._require(0 <= self.momentum < 1, "in [0, 1)", "momentum")
        self._require(self.adam_epsilon > 0, "greater than 0", "adam_epsilon")
        self._require(0 <= self.adapter_ratio <= 1, "in [0, 1]", "adapter_ratio")
        self._require(0 < self.min_crop <= 1, "in (0, 1]", "min_crop")
        self._require(0 <= self.domain_tokens <= self.image_tokens, "in 0..image_tokens", "domain_tokens")
        self._require(self.accumulate <= self.batch_size, "at most batch_size", "accumulate", "batch_size")
        both = (self.image_depth > 0) == (self.image_tokens > 0)
        self._require(both, "both 0 or both at least 1", "image_depth", "image_tokens")
        from_names = self.classes != "none" or self.generator is not None
        self._require(from_names, "base or all where no generator makes features", "classes")

    def _require(self, fine: bool, accepted: str, *names: str) -> None:
        if not fine:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise RecipeError(f"recipe {self.recipe}: {given}: must be {accepted}")

    @property
    def digest(self) -> str:
        """SHA-256 of all settings: equal digests mean equal runs on equal data.

        Settings that checkpoints have not always had count only where they differ from what they were before, so that a
        run of an older version can still be found finished, or gone on with.
        """
        return hashlib.sha256(json.dumps(_without_defaults(self.to_json()), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        generator = None if self.generator is None else self.generator.to_json()
        return {**asdict(self), **lists, "generator": generator}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_json`; settings that were added later may be missing, as in older checkpoints.

        Raises:
            RecipeError: a field is missing or unknown, or as the constructor.
        """
        names = {field.name for field in fields(cls)}
        content = {**_ADDED_LATER, **content}
        if set(content) != names:
            odd = ", ".join(sorted(set(content) ^ names))
            raise RecipeError(f"not the settings of a run: {odd} missing or unknown: train again with this version")
        lists = {name: tuple(content[name]) for name in _LISTS}
        generator = None if content["generator"] is None else cls.from_json(content["generator"])
        return cls(**{**content, **lists, "generator": generator})


_ADDED_LATER: dict[str, Any] = {"synthetic_shots": None, "synthetic_filter": True}
"""Settings that older checkpoints lack, with what they were then."""
_LISTS = ("templates", "reference_templates")
_CHOICES = {"precision": PRECISIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "classes": CLASSES}


def _without_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` without the settings of :data:`_ADDED_LATER` that are as they were before there was a choice."""
    kept = {name: value for name, value in content.items() if name not in _ADDED_LATER or value != _ADDED_LATER[name]}
    generator = content["generator"]
    return {**kept, "generator": None if generator is None else _without_defaults(generator)}

"""The settings of a synthetic set: one frozen dataclass, validated when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from clipship.core.errors import RecipeError
from clipship.training.config import Settings, at_least, one_of

AUTO = "auto"
MAX_TRIES = 16
"""Maximum of seeds tried for one candidate; see :func:`clipship.training.synthesis.candidates.seed_of`."""


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig(Settings):
    """Settings of one synthetic set.

    Raises:
        RecipeError: a setting is out of range, or two contradict each other.
    """

    recipe: str
    """The recipe these settings came from."""
    pipeline: str
    """A folder in diffusers' format, "clipship-tiny-diffusion", or a model id of the Hugging Face hub."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty: its main branch."""
    variant: str = ""
    """Variant of the weight files such as "fp16", used if it exists."""
    scheduler: str = ""
    """A scheduler class of diffusers; empty: the pipeline's own."""
    steps: int = at_least(1, 50)
    """Denoising steps; image-to-image does the last ``strength`` of them."""
    guidance: float = at_least(0, 7.5)
    """Classifier-free guidance scale; at most 1 is none."""
    negative_prompt: str = ""
    """What images should not show."""
    max_tokens: int = at_least(0, 0)
    """Maximum tokens of a T5 text encoder; 0: the pipeline's own."""
    size_px: int = 0
    """Side of the square images; 0: the pipeline's own."""

    candidates: int = 64
    """Images made of a class (M)."""
    keep: int = at_least(1, 16)
    """Images kept of a class (N)."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` for the class name; empty: those of the vocabulary."""
    contexts: tuple[str, ...] = ()
    """Words added to the prompt, such as "in the snow"."""
    strength: float = 0.0
    """Noise added to real images, for image-to-image; 0: text-to-image."""
    shots: int = at_least(0, 16)
    """Real images a class that image-to-image starts from; 0: all there are."""

    precision: str = one_of(AUTO, "fp32", "bf16", "fp16")
    """Of the pipeline: fp32, bf16, fp16, or auto for what the device runs best."""
    batch_size: int = at_least(1, 8)
    """Images a batch."""
    scorer: str = "ViT-B-16/openai"
    """The CLIP that scores, as :func:`clipship.training.model.clip.load_clip` takes it."""
    filter: str = one_of("similarity", "class", "none")
    """Keep the best by "similarity", the best that CLIP also takes for their own "class", or the first ("none")."""
    duplicates: float = 0.98
    """CLIP cosine from which two images of a class count as near-duplicates; 1: never."""
    tries: int = 4
    """Seeds tried for an image until one is neither flagged nor blank."""
    image_format: str = one_of("webp", "jpeg")
    quality: int = 92
    """Of the image files, 1 to 100."""
    seed: int = at_least(0, 1)
    """Images depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.pipeline.strip() != "", "a folder or a hub id", "pipeline")
        self._require(self.candidates >= self.keep, "at least keep", "candidates", "keep")
        self._require(self.size_px >= 0 and self.size_px % 8 == 0, "a multiple of 8", "size_px")
        self._require(0 <= self.strength <= 1, "in [0, 1]", "strength")
        self._require(0 < self.duplicates <= 1, "in (0, 1]", "duplicates")
        self._require(1 <= self.tries <= MAX_TRIES, f"in 1..{MAX_TRIES}", "tries")
        self._require(1 <= self.quality <= 100, "in 1..100", "quality")
        done = int(self.steps * self.strength)  # diffusers rounds down, and fails at none
        self._require(not self.strength or done >= 1, "at least one step together", "steps", "strength")
        for template in self.templates:
            self._require(template.count("{}") == 1, "prompts with {} once, where the class name goes", "templates")
        self._require(all(map(str.strip, self.contexts)), "words, not empty lines", "contexts")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {**asdict(self), **{name: list(getattr(self, name)) for name in _LISTS}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SynthesisConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            RecipeError: a field is missing or unknown, or as the constructor.
        """
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            odd = ", ".join(sorted(set(content) ^ names))
            raise RecipeError(f"not the settings of a synthetic set: {odd} missing or unknown: make the set again")
        return cls(**{**content, **{name: tuple(content[name]) for name in _LISTS}})


_LISTS = ("templates", "contexts")

"""A loaded text-to-image pipeline that generates batches of candidates, each from its own seed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from clipship.core.errors import DataError, RecipeError, near
from clipship.core.progress import log
from clipship.training.inputs.batches import decoded
from clipship.training.synthesis.candidates import Candidate
from clipship.training.synthesis.class_prompts import ClassPrompts
from clipship.training.synthesis.config import AUTO, SynthesisConfig
from clipship.training.synthesis.pipelines import PipelineFolder

BYTES_PER_PIXEL = 4096
"""Estimated working memory in half precision: about 1 GiB for an image of 512 x 512."""
FLAGGED = "flagged by the pipeline's safety checker"
BLANK = "blank: one colour everywhere"

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the weights are, and whether work is split to save memory."""

    offload: bool = False
    """Move each part to the GPU for its turn: slower, but only the largest part has to fit."""
    slicing: bool = False
    """Attention head by head, decoder image by image: slightly slower, with much less memory."""


def placement_of(*, free_bytes: int | None, weights_bytes: int, batch_size: int, size_px: int) -> Placement:
    """The fastest placement of a pipeline that fits into the ``free_bytes`` of the GPU (None: a CPU)."""
    if free_bytes is None:
        return Placement()
    image_bytes = BYTES_PER_PIXEL * size_px**2
    if weights_bytes + batch_size * image_bytes <= free_bytes:
        return Placement()
    return Placement(slicing=True, offload=weights_bytes + image_bytes > free_bytes)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """An image, or the reason why there is none."""

    image: Image.Image | None
    reason: str | None


def precision_for(precision: str, device: torch.device) -> str:
    """``precision``; for "auto" the one that ``device`` runs best."""
    if precision != AUTO:
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class ImageGenerator:
    """A loaded pipeline with the settings of a set.

    Raises:
        RecipeError: the pipeline cannot be loaded, or does not support the scheduler or the negative prompt.
    """

    def __init__(self, folder: PipelineFolder, config: SynthesisConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._name = folder.name
        self._text = _loaded(folder, config)
        self._image: Any = None
        if config.scheduler:
            self._text.scheduler = _scheduler(config.scheduler, self._text.scheduler)
        self.size_px: int = config.size_px or _own_size_px(self._text, folder.name)
        if config.negative_prompt and "negative_prompt" not in _parameters(self._text):
            raise RecipeError(f"pipeline {folder.name} takes no negative prompt: leave it out")
        self.placement = self._placed(self._text)
        self._text.set_progress_bar_config(disable=True)

    @property
    def scheduler(self) -> str:
        """The class of the scheduler."""
        return type(self._text.scheduler).__name__

    def validate_prompts(self, class_prompts: ClassPrompts) -> None:
        """Validate that the pipeline would not silently truncate a prompt.

        Raises:
            DataError: a prompt has more tokens than any of the text encoders takes.
        """
        limits = self._limits
        for name, prompts in class_prompts.prompts.items() if limits else ():
            for prompt in dict.fromkeys(prompts):
                counts = [(len(tokenizer(prompt)["input_ids"]), limit) for tokenizer, limit in limits]
                if all(count > limit for count, limit in counts):
                    count, limit = max(counts, key=lambda one: one[1])
                    raise DataError(
                        f"class {name!r}: prompt {prompt!r} has {count} tokens, {self._name} takes {limit}: shorten it"
                    )

    def make(self, batch: Sequence[Candidate]) -> list[GeneratedImage]:
        """The images of ``batch``, whose candidates all have a source or all have none.

        The initial noise of each image is drawn on the CPU by its own generator: it depends on the seed only, not on
        the device or the rest of the batch.

        Raises:
            torch.OutOfMemoryError: the batch is too large for the GPU.
            DataError: a real image cannot be decoded.
        """
        pipeline = self._image_pipeline if batch[0].source else self._text
        with torch.inference_mode():
            output = pipeline(**self._arguments(pipeline, batch))
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
        return [_checked(image, flagged) for image, flagged in zip(output.images, flags, strict=True)]

    def _arguments(self, pipeline: Any, batch: Sequence[Candidate]) -> dict[str, Any]:
        config = self.config
        given: dict[str, Any] = {
            "prompt": [one.prompt for one in batch],
            "num_inference_steps": config.steps,
            "guidance_scale": config.guidance,
            "generator": [torch.Generator("cpu").manual_seed(one.seed) for one in batch],
            "output_type": "pil",
        }
        if config.negative_prompt:
            given["negative_prompt"] = [config.negative_prompt] * len(batch)
        if config.max_tokens:
            given["max_sequence_length"] = config.max_tokens
        if batch[0].source:
            given |= {"image": [self._source(one) for one in batch], "strength": config.strength}
        sizes = {"height": self.size_px, "width": self.size_px}
        accepted = _parameters(pipeline)
        return given | {name: size for name, size in sizes.items() if name in accepted}

    def _source(self, candidate: Candidate) -> Image.Image:
        assert candidate.source is not None
        size = (self.size_px, self.size_px)
        return ImageOps.fit(decoded(Path(candidate.source)), size, Image.Resampling.BICUBIC)

    @cached_property
    def _image_pipeline(self) -> Any:
        """The same modules as an image-to-image pipeline."""
        from diffusers import AutoPipelineForImage2Image

        try:
            pipeline = AutoPipelineForImage2Image.from_pipe(self._text)
        except ValueError as error:
            raise RecipeError(
                f"pipeline {self._name}: {type(self._text).__name__} has no image-to-image form: leave --images out"
            ) from error
        if self.placement.offload:
            pipeline.enable_model_cpu_offload(device=self._device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def _limits(self) -> list[tuple[Any, int]]:
        """Each tokenizer with the maximum number of tokens of its encoder, start and end included."""
        own = _parameters(self._text).get("max_sequence_length")
        t5_tokens = self.config.max_tokens or (own.default if own is not None else 0)
        found = []
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self._text, name, None)
            if tokenizer is not None:
                is_t5 = "CLIP" not in type(tokenizer).__name__ and t5_tokens
                limit = min(tokenizer.model_max_length, t5_tokens) if is_t5 else tokenizer.model_max_length
                found.append((tokenizer, limit))
        return found

    def _placed(self, pipeline: Any) -> Placement:
        """Move the pipeline to the device as memory allows."""
        modules = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
        weights = sum(value.nbytes for module in modules for value in module.parameters())
        free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None
        placement = placement_of(
            free_bytes=free, weights_bytes=weights, batch_size=self.config.batch_size, size_px=self.size_px
        )
        if placement.slicing:
            turns = ", the parts take turns" if placement.offload else ""
            log(f"little memory on {self._device}: attention and decoder work in slices{turns}")
            pipeline.enable_attention_slicing()
            if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
                pipeline.vae.enable_slicing()
        if placement.offload:
            pipeline.enable_model_cpu_offload(device=self._device)
        else:
            pipeline.to(self._device)
        return placement


def _loaded(folder: PipelineFolder, config: SynthesisConfig) -> Any:
    """The pipeline on the CPU, in the precision of ``config``."""
    from diffusers import AutoPipelineForText2Image

    dtype = _TYPES[config.precision]
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(
            folder.path, dtype=dtype, variant=folder.variant, use_safetensors=True, local_files_only=True
        )
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        problem = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"pipeline {folder.name}: {folder.class_name} cannot be loaded ({problem}): "
            "give a text-to-image pipeline that this diffusers knows"
        ) from error
    return pipeline.to(dtype=dtype)  # older versions of diffusers ignore the argument


def _scheduler(name: str, own: Any) -> Any:
    import diffusers

    known = [one for one in dir(diffusers) if one.endswith("Scheduler")]
    if name not in known:
        raise RecipeError(f"diffusers has no scheduler {name!r}: {near(name, known)}")
    return getattr(diffusers, name).from_config(own.config)


def _own_size_px(pipeline: Any, name: str) -> int:
    """The side of the images that the pipeline was trained on."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    sample = getattr(pipeline, "default_sample_size", None) or getattr(
        getattr(denoiser, "config", None), "sample_size", 0
    )
    scale = getattr(pipeline, "vae_scale_factor", 0)
    if not isinstance(sample, int) or not sample * scale:
        raise RecipeError(f"pipeline {name} does not say how large its images are: give --size")
    return sample * scale


def _parameters(pipeline: Any) -> Any:
    return inspect.signature(pipeline.__call__).parameters


def _checked(image: Image.Image, flagged: bool) -> GeneratedImage:
    if flagged:
        return GeneratedImage(image=None, reason=FLAGGED)
    image = image.convert("RGB")
    extrema: Any = image.getextrema()
    if all(low == high for low, high in extrema):  # values that are not finite come out black
        return GeneratedImage(image=None, reason=BLANK)
    return GeneratedImage(image=image, reason=None)

"""Assembles the pipeline from its parts and writes it in diffusers' folder format."""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipship.core.files import replace_file, replace_folder, write_json_atomic
from clipship.training.model.builtin import TINY
from clipship.training.model.clip import load_clip
from clipship.training.synthesis.recipes import TINY_GUIDANCE, TINY_STEPS
from clipship.world.diffusion.text import (
    text_encoder_from_clip,
    tokenizer_from_vocabulary,
    world_vocabulary,
    write_tokenizer,
)

_GENERATED_AT_ONCE = 32
_PREFIX = "text_model."


def new_scheduler() -> Any:
    """Return the noise schedule: cosine (arXiv 2102.09672), velocity prediction (arXiv 2202.00512)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # the first step starts from pure noise (arXiv 2305.08891)
        clip_sample=False,
        steps_offset=1,  # of no effect with this spacing, but diffusers warns without it
    )


def text_parts() -> tuple[Any, Any]:
    """Return the text encoder and the tokenizer, both from `clipship-tiny`."""
    clip = load_clip(TINY)
    vocabulary = world_vocabulary(clip)
    return text_encoder_from_clip(clip, vocabulary), tokenizer_from_vocabulary(vocabulary, clip.context_length)


def pipeline_of(autoencoder: Any, denoiser: Any, text_encoder: Any, tokenizer: Any) -> Any:
    """Return a diffusers `StableDiffusionPipeline` of the parts, which shows no progress bar."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        unet=denoiser,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hide_progress_bars() -> None:
    """Hide the progress bars of diffusers and transformers if stderr is not a terminal."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    if not sys.stderr.isatty():
        of_diffusers.disable_progress_bar()
        of_transformers.disable_progress_bar()


def load_pipeline(folder: Path) -> Any:
    """Load a pipeline with diffusers' own loader; it shows no progress bar."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_pipeline(folder: Path, pipeline: Any, *, extra_files: Sequence[Path] = ()) -> None:
    """Write a pipeline with float16 weights, whole or not at all; `extra_files` are copied into its folder.

    Its weights must be rounded to float16 already (`training_run.round_to_half`): the folder makes the same images.
    """
    clip = load_clip(TINY)
    halves = {name: copy.deepcopy(getattr(pipeline, name)).half() for name in ("vae", "unet", "text_encoder")}
    with replace_folder(folder) as temporary:
        type(pipeline)(**{**pipeline.components, **halves}, requires_safety_checker=False).save_pretrained(temporary)
        write_tokenizer(temporary / "tokenizer", world_vocabulary(clip), clip.context_length)
        _fit_every_transformers(temporary / "text_encoder")
        for path in temporary.rglob("config.json"):
            _change_config(path, _name_or_path=None)  # the folder of this machine that it was loaded from
        for path in extra_files:
            (temporary / path.name).write_bytes(path.read_bytes())
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors makes files that only their owner can read


def _fit_every_transformers(folder: Path) -> None:
    # transformers 5 loads a model in the type that its config names, diffusers in float32: the two must agree.
    _change_config(folder / "config.json", dtype="float32")
    weights_file = folder / "model.safetensors"
    # transformers 5 reads names with and without the prefix that transformers 4 cannot do without.
    weights = {f"{_PREFIX}{name.removeprefix(_PREFIX)}": tensor for name, tensor in load_file(weights_file).items()}
    with replace_file(weights_file) as another:  # the tensors may be views of the file they came from
        save_file(weights, another, metadata={"format": "pt"})


def _change_config(path: Path, **changes: str | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json_atomic(path, {name: value for name, value in config.items() if name not in changes or value is not None})


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = TINY_STEPS,
    guidance: float = TINY_GUIDANCE,
) -> list[Image.Image]:
    """Return an image of every prompt, 64 x 64 pixels; each starts from the noise of its seed."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), _GENERATED_AT_ONCE):
        part = slice(start, start + _GENERATED_AT_ONCE)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        made = pipeline(
            list(prompts[part]), generator=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="pil"
        )
        images += made.images
    return images

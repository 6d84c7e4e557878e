"""The recipes of synthesis: functions that return a :class:`SynthesisConfig`. A variant is ``dataclasses.replace``.

A recipe named after a paper has its published settings. The docstring says what was not published, or was made with a
generator that is not available.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from clipship.core.errors import RecipeError, near
from clipship.training.model.builtin import TINY, TINY_DIFFUSION
from clipship.training.synthesis.config import SynthesisConfig

TINY_STEPS, TINY_GUIDANCE = 20, 3.0
"""Denoising steps and classifier-free guidance (arXiv 2207.12598) of the built-in pipeline."""

SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_2_1 = "stabilityai/stable-diffusion-2-1"
SD_3 = "stabilityai/stable-diffusion-3-medium-diffusers"


def tiny() -> SynthesisConfig:
    """The built-in pipeline and the built-in CLIP: 64 px, nothing to download."""
    return SynthesisConfig(
        recipe="tiny",
        pipeline=TINY_DIFFUSION,
        steps=TINY_STEPS,
        guidance=TINY_GUIDANCE,
        candidates=24,
        keep=16,
        scorer=TINY,
        duplicates=0.999,  # pictures of one pattern reach 0.99 in the small CLIP
        batch_size=16,
    )


def sync_clip() -> SynthesisConfig:
    """For SYNC-CLIP: 16 of 64 images, data set templates; Stable Diffusion instead of the authors' images."""
    return SynthesisConfig(recipe="sync-clip", pipeline="stabilityai/stable-diffusion-2-1-base")


def sus_x() -> SynthesisConfig:
    """SuS-X's support sets: Stable Diffusion 1.4, 85 steps, guidance 9.5, 100 images a class, all kept."""
    pipeline = "CompVis/stable-diffusion-v1-4"
    return replace(_unfiltered(100), recipe="sus-x", pipeline=pipeline, steps=85, guidance=9.5, batch_size=5)


def datadream() -> SynthesisConfig:
    """DataDream's amount and low guidance: 500 images a class, guidance 2; give its tuned weights with --pipeline."""
    return replace(_unfiltered(500), recipe="datadream", pipeline=SD_2_1, guidance=2.0)


def disef() -> SynthesisConfig:
    """DISEF: image-to-image from the real shots, 15 of 20 DPM-Solver++ steps, filtered by class."""
    return SynthesisConfig(
        recipe="disef",
        pipeline="SG161222/Realistic_Vision_V2.0",
        scheduler="DPMSolverMultistepScheduler",
        steps=20,
        strength=0.75,
        guidance=8.0,
        candidates=128,
        keep=64,
        filter="class",
        scorer="ViT-H-14/laion2b_s32b_b79k",
    )


def real_guidance() -> SynthesisConfig:
    """The real guidance of He et al. for 16 shots: 15 of 100 steps, 800 images; Stable Diffusion instead of GLIDE."""
    return SynthesisConfig(
        recipe="real-guidance",
        pipeline=SD_1_5,
        steps=100,
        strength=0.15,
        guidance=3.0,
        candidates=800,
        keep=800,
        filter="class",
    )


def imagine_fsl() -> SynthesisConfig:
    """ImagineFSL's generator, Stable Diffusion 3 medium; give its captions with --prompt-file."""
    return replace(sd3(), recipe="imagine-fsl", candidates=300, keep=300, filter="none", duplicates=1.0)


def sd15() -> SynthesisConfig:
    """Stable Diffusion 1.5, 512 px: 50 steps, guidance 7.5."""
    return SynthesisConfig(recipe="sd15", pipeline=SD_1_5)


def sd21() -> SynthesisConfig:
    """Stable Diffusion 2.1, 768 px: 50 steps, guidance 7.5."""
    return SynthesisConfig(recipe="sd21", pipeline=SD_2_1, batch_size=4)


def sdxl() -> SynthesisConfig:
    """Stable Diffusion XL, 1024 px: 50 steps, guidance 5."""
    pipeline = "stabilityai/stable-diffusion-xl-base-1.0"
    return SynthesisConfig(recipe="sdxl", pipeline=pipeline, variant="fp16", guidance=5.0, batch_size=4)


def sdxl_turbo() -> SynthesisConfig:
    """SDXL-Turbo, 512 px: one step, no guidance; by far the cheapest of the large pipelines."""
    half = replace(sdxl(), recipe="sdxl-turbo", pipeline="stabilityai/sdxl-turbo", batch_size=16)
    return replace(half, steps=1, guidance=0.0, size_px=512)


def sd3() -> SynthesisConfig:
    """Stable Diffusion 3 medium, 1024 px: 28 steps, guidance 7."""
    return SynthesisConfig(recipe="sd3", pipeline=SD_3, steps=28, guidance=7.0, batch_size=4)


def flux_schnell() -> SynthesisConfig:
    """FLUX.1-schnell, 1024 px: 4 steps, no guidance, bf16."""
    return SynthesisConfig(
        recipe="flux-schnell",
        pipeline="black-forest-labs/FLUX.1-schnell",
        steps=4,
        guidance=0.0,
        max_tokens=256,
        precision="bf16",
        batch_size=4,
    )


def _unfiltered(count: int) -> SynthesisConfig:
    return SynthesisConfig(
        recipe="unfiltered", pipeline=SD_1_5, candidates=count, keep=count, filter="none", duplicates=1.0
    )


_RECIPES: tuple[Callable[[], SynthesisConfig], ...] = (
    *(tiny, sync_clip, sus_x, datadream, disef, real_guidance, imagine_fsl),
    *(sd15, sd21, sdxl, sdxl_turbo, sd3, flux_schnell),
)
SYNTHESIS_RECIPES = {config().recipe: config for config in _RECIPES}


def synthesis_config(name: str) -> SynthesisConfig:
    """The settings of recipe ``name``.

    Raises:
        RecipeError: the recipe is unknown.
    """
    if name not in SYNTHESIS_RECIPES:
        raise RecipeError(f"unknown recipe of synthesis {name!r}: {near(name, SYNTHESIS_RECIPES)}")
    return SYNTHESIS_RECIPES[name]()

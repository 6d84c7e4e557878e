"""The recipes: functions that return a :class:`TrainConfig`. A variant is ``dataclasses.replace`` of another.

The published ones are for ViT-B/16 with OpenAI's weights and use the settings of the authors' code. Those that end in
``-tiny`` run on the built-in model and data sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from clipship.core.errors import RecipeError, near
from clipship.training.clip import TINY
from clipship.training.config import TrainConfig

Recipe = Callable[[str], TrainConfig]
"""From the data set's name; only recipes with settings of their own per data set look at it."""

PUBLISHED_MODEL = "ViT-B-16/openai"

SYNC_CLIP_PUBLISHED: dict[str, tuple[int, float, float]] = {
    "ImageNet": (5, 0.5, 0.5),
    "Caltech101": (20, 0.2, 0.5),
    "OxfordPets": (10, 0.1, 0.5),
    "StanfordCars": (20, 0.2, 0.5),
    "OxfordFlowers": (20, 1.0, 0.5),
    "Food101": (5, 0.2, 0.5),
    "FGVCAircraft": (10, 0.2, 2.0),
    "SUN397": (5, 0.1, 0.1),
    "DescribableTextures": (10, 0.1, 1.0),
    "EuroSAT": (10, 0.1, 3.5),
    "UCF101": (10, 0.1, 0.5),
}
"""Epochs, w, lambda of the authors' released configuration, by data set."""


def zero_shot(dataset: str) -> TrainConfig:
    """CLIP as it is, with the data set's template."""
    return TrainConfig(recipe="zero-shot", method="zero-shot", base_model=PUBLISHED_MODEL)


def coop(dataset: str) -> TrainConfig:
    """CoOp as run for base-to-new generalisation: 4 context words from "a photo of a"."""
    return TrainConfig(
        recipe="coop", method="coop", base_model=PUBLISHED_MODEL, epochs=200, batch_size=32, learning_rate=2e-3
    )


def sync_clip(dataset: str) -> TrainConfig:
    """SYNC-CLIP with one setting for all data sets: w = 0.2, lambda = 0.5, 10 epochs."""
    return TrainConfig(
        recipe="sync-clip",
        method="sync-clip",
        base_model=PUBLISHED_MODEL,
        epochs=10,
        text_depth=9,
        image_tokens=4,
        image_depth=9,
        domain_tokens=2,
        synthetic_weight=0.2,
        align_weight=0.5,
    )


def sync_clip_published(dataset: str) -> TrainConfig:
    """SYNC-CLIP with the epochs, w and lambda that its authors released for each data set.

    Raises:
        RecipeError: they released none for this data set.
    """
    if dataset not in SYNC_CLIP_PUBLISHED:
        raise RecipeError(
            f"recipe sync-clip-published has no settings for {dataset!r}: {near(dataset, SYNC_CLIP_PUBLISHED)}; "
            "take sync-clip, which has one setting for all"
        )
    epochs, synthetic_weight, align_weight = SYNC_CLIP_PUBLISHED[dataset]
    return replace(
        sync_clip(dataset),
        recipe="sync-clip-published",
        epochs=epochs,
        synthetic_weight=synthetic_weight,
        align_weight=align_weight,
    )


def zero_shot_tiny(dataset: str) -> TrainConfig:
    """Zero-shot on the built-in model."""
    return replace(zero_shot(dataset), recipe="zero-shot-tiny", base_model=TINY)


def coop_tiny(dataset: str) -> TrainConfig:
    """CoOp on the built-in model, for its published 200 epochs."""
    return replace(coop(dataset), recipe="coop-tiny", base_model=TINY, min_crop=0.6, flip=False)


def sync_clip_tiny(dataset: str) -> TrainConfig:
    """SYNC-CLIP on the built-in model, prompts in every layer of its towers.

    Features of two images differ by 1.6 a dimension in this model, and the alignment loss is of that size: with the
    published lambda of 0.5 it outweighs the others and pulls all features together.
    """
    return replace(
        sync_clip(dataset),
        recipe="sync-clip-tiny",
        base_model=TINY,
        epochs=20,
        text_depth=3,
        image_depth=4,
        synthetic_weight=0.5,
        align_weight=0.05,
        min_crop=0.6,
        flip=False,
    )


RECIPES: dict[str, Recipe] = {
    "zero-shot": zero_shot,
    "coop": coop,
    "sync-clip": sync_clip,
    "sync-clip-published": sync_clip_published,
    "zero-shot-tiny": zero_shot_tiny,
    "coop-tiny": coop_tiny,
    "sync-clip-tiny": sync_clip_tiny,
}


def config_from_recipe(name: str, dataset: str = "") -> TrainConfig:
    """The settings of recipe ``name`` for the data set of that name.

    Raises:
        RecipeError: unknown recipe, or one that has no settings for the data set.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}: {near(name, RECIPES)}")
    return RECIPES[name](dataset)

"""Settings and recipes: what is refused, and that every recipe stands."""

import inspect
from dataclasses import replace
from typing import Any

import pytest

from clipship.core.errors import RecipeError
from clipship.training.synthesis.config import SynthesisConfig
from clipship.training.synthesis.recipes import SYNTHESIS_RECIPES, synthesis_config


@pytest.mark.parametrize("name", SYNTHESIS_RECIPES)
def test_every_recipe_stands_under_its_name_and_survives_json(name: str) -> None:
    config = synthesis_config(name)
    assert config.recipe == name
    assert SynthesisConfig.from_json(config.to_json()) == config
    line = inspect.getdoc(SYNTHESIS_RECIPES[name]) or ""
    assert line.endswith(".")


def test_published_settings() -> None:
    sync_clip, sus_x, datadream, disef = map(synthesis_config, ("sync-clip", "sus-x", "datadream", "disef"))
    assert (sync_clip.steps, sync_clip.guidance, sync_clip.candidates, sync_clip.keep) == (50, 7.5, 64, 16)
    assert (sus_x.steps, sus_x.guidance, sus_x.keep, sus_x.filter) == (85, 9.5, 100, "none")
    assert (datadream.guidance, datadream.keep) == (2.0, 500)
    assert (disef.steps, disef.strength, disef.guidance, disef.filter) == (20, 0.75, 8.0, "class")
    assert (synthesis_config("sdxl-turbo").steps, synthesis_config("sdxl-turbo").guidance) == (1, 0.0)


def test_an_unknown_recipe_names_the_near_ones() -> None:
    with pytest.raises(RecipeError, match="did you mean sdxl-turbo"):
        synthesis_config("sdxl-turb")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"keep": 9}, "candidates=5, keep=9: must be at least keep"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"guidance": -1.0}, "guidance=-1.0: must be at least 0"),
        ({"size_px": 30}, "size_px=30: must be a multiple of 8"),
        ({"strength": 1.5}, r"strength=1.5: must be in \[0, 1\]"),
        ({"strength": 0.3}, "steps=2, strength=0.3: must be at least one step together"),
        ({"duplicates": 0.0}, r"duplicates=0.0: must be in \(0, 1\]"),
        ({"tries": 17}, "tries=17: must be in 1..16"),
        ({"quality": 0}, "quality=0: must be in 1..100"),
        ({"filter": "best"}, "filter='best': must be one of similarity, class, none"),
        ({"image_format": "png"}, "image_format='png': must be one of webp, jpeg"),
        ({"templates": ("a photo",)}, "must be prompts with {} once"),
        ({"contexts": ("in snow", " ")}, "must be words"),
        ({"pipeline": " "}, "must be a folder or a hub id"),
    ],
)
def test_what_cannot_be_is_refused(config: SynthesisConfig, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        replace(config, **changes)


def test_settings_of_another_version_are_refused(config: SynthesisConfig) -> None:
    content = config.to_json() | {"colour": "red"}
    del content["steps"]
    with pytest.raises(RecipeError, match="colour, steps missing or unknown"):
        SynthesisConfig.from_json(content)

"""Recipes, and the checks of their settings."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from clipship.core.errors import RecipeError
from clipship.training.config import TrainConfig
from clipship.training.recipes import RECIPES, SYNC_CLIP_PUBLISHED, config_from_recipe


def test_every_recipe_is_named_after_itself_and_says_what_it_is() -> None:
    for name, recipe in RECIPES.items():
        assert config_from_recipe(name, "EuroSAT").recipe == name
        assert (recipe.__doc__ or "").strip().splitlines()[0].endswith(".")


def test_published_settings() -> None:
    coop, sync = config_from_recipe("coop"), config_from_recipe("sync-clip")
    assert (coop.learning_rate, coop.batch_size, coop.epochs, coop.text_tokens) == (0.002, 32, 200, 4)
    assert (sync.learning_rate, sync.batch_size, sync.image_depth, sync.text_depth) == (0.0025, 8, 9, 9)
    assert (sync.image_tokens, sync.domain_tokens, sync.text_tokens) == (4, 2, 4)
    assert (sync.epochs, sync.synthetic_weight, sync.align_weight) == (10, 0.2, 0.5)
    for config in (coop, sync):
        assert (config.momentum, config.weight_decay, config.warmup_learning_rate) == (0.9, 5e-4, 1e-5)
        assert (config.min_crop, config.flip, config.shots) == (0.08, True, 16)


def test_settings_by_data_set_are_only_in_the_recipe_that_says_so() -> None:
    eurosat = config_from_recipe("sync-clip-published", "EuroSAT")
    assert (eurosat.epochs, eurosat.synthetic_weight, eurosat.align_weight) == (10, 0.1, 3.5)
    assert config_from_recipe("sync-clip", "EuroSAT") == config_from_recipe("sync-clip", "Food101")
    assert len(SYNC_CLIP_PUBLISHED) == 11
    with pytest.raises(RecipeError, match=r"no settings for 'prints'.*take sync-clip"):
        config_from_recipe("sync-clip-published", "prints")


def test_unknown_recipes_get_the_near_names() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'sink-clip': did you mean sync-clip"):
        config_from_recipe("sink-clip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots=0: must be at least 1"),
        ({"epochs": -1}, "epochs=-1: must be at least 0"),
        ({"momentum": 1.0}, "momentum=1.0: must be in"),
        ({"min_crop": 0.0}, "min_crop=0.0: must be in"),
        ({"precision": "fp16"}, "precision='fp16': must be one of fp32, bf16"),
        ({"domain_tokens": 5}, "domain_tokens=5: must be in 0..image_tokens"),
        ({"image_depth": 0}, "image_depth=0, image_tokens=4: must be both 0 or both at least 1"),
        ({"align_weight": -0.5}, "align_weight=-0.5: must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(config_from_recipe("sync-clip"), **changes)  # type: ignore[arg-type]


def _other(value: Any) -> Any:
    """A value of the same kind that is not ``value``."""
    match value:
        case bool():
            return not value
        case str():
            return "bf16" if value == "fp32" else value + "x"
        case tuple():
            return ()
        case float():
            return value / 2
    return value + 1


def test_settings_round_trip_and_their_digest_is_of_all_of_them() -> None:
    config = replace(config_from_recipe("sync-clip"), templates=("a {}.", "the {}."))
    assert TrainConfig.from_json(config.to_json()) == config
    for name, value in asdict(config).items():
        assert replace(config, **{name: _other(value)}).digest != config.digest, name


def test_settings_with_odd_fields_are_refused() -> None:
    content = config_from_recipe("coop").to_json()
    with pytest.raises(RecipeError, match="warp missing or unknown"):
        TrainConfig.from_json({**content, "warp": 1})
    del content["seed"]
    with pytest.raises(RecipeError, match="seed missing or unknown"):
        TrainConfig.from_json(content)

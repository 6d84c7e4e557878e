"""Recipes, and the checks of their settings."""

from dataclasses import fields, replace
from typing import Any

import pytest

from clipship.core.errors import RecipeError
from clipship.training.config import TrainConfig
from clipship.training.datasets.load import PUBLISHED_DATASETS
from clipship.training.recipes import PROMPTSRC_LATE_AVERAGE, RECIPES, SYNC_CLIP_PUBLISHED, config_from_recipe


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


PUBLISHED: dict[str, dict[str, object]] = {
    "cocoop": {
        "epochs": 10,
        "batch_size": 1,
        "learning_rate": 2e-3,
        "text_tokens": 4,
        "text_depth": 1,
        "meta_reduction": 16,
    },
    "kgcoop": {"epochs": 100, "batch_size": 128, "learning_rate": 2e-3, "text_tokens": 4, "text_consistency": 8.0},
    "vpt-deep": {"epochs": 5, "batch_size": 4, "learning_rate": 2.5e-3, "image_tokens": 8, "image_depth": 12},
    "vpt-shallow": {"epochs": 5, "batch_size": 4, "learning_rate": 2.5e-3, "image_tokens": 8, "image_depth": 1},
    "ivlp": {
        "epochs": 20,
        "batch_size": 4,
        "learning_rate": 2.5e-3,
        "text_tokens": 4,
        "text_depth": 9,
        "image_tokens": 4,
        "image_depth": 9,
    },
    "ivlp-maple": {
        "epochs": 5,
        "batch_size": 4,
        "learning_rate": 3.5e-3,
        "text_tokens": 2,
        "text_depth": 12,
        "image_tokens": 2,
        "image_depth": 12,
    },
    "maple": {
        "epochs": 5,
        "batch_size": 4,
        "learning_rate": 3.5e-3,
        "text_tokens": 2,
        "text_depth": 9,
        "classes": "base",
    },
    "maple-cross": {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 2.6e-3,
        "text_tokens": 2,
        "text_depth": 3,
        "classes": "all",
    },
    "promptsrc": {
        "epochs": 20,
        "batch_size": 4,
        "learning_rate": 2.5e-3,
        "text_tokens": 4,
        "text_depth": 9,
        "image_tokens": 4,
        "image_depth": 9,
        "text_consistency": 25.0,
        "image_consistency": 10.0,
        "logit_consistency": 1.0,
        "average_mean": 15.0,
        "average_std": 1.0,
    },
    "promptsrc-cross": {
        "epochs": 20,
        "text_depth": 3,
        "image_depth": 3,
        "average_mean": 6.0,
        "average_std": 10.0,
        "classes": "all",
        "text_consistency": 25.0,
    },
    "sync-clip-cross": {"epochs": 5, "text_depth": 3, "image_depth": 3, "classes": "all", "domain_tokens": 2},
    "coop-cross": {"epochs": 50, "batch_size": 32, "classes": "all"},
    "cocoop-cross": {"epochs": 10, "batch_size": 1, "classes": "all"},
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_settings_of_the_family(name: str) -> None:
    config = config_from_recipe(name)
    assert {field: getattr(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert (config.base_model, config.optimizer, config.schedule) == ("ViT-B-16/openai", "sgd", "epoch-cosine")
    assert (config.momentum, config.weight_decay, config.warmup_epochs) == (0.9, 5e-4, 1)
    assert (config.min_crop, config.flip, config.shots, config.context_init) == (0.08, True, 16, "a photo of a")


def test_prompt_ensembles_are_the_published_ones() -> None:
    ensemble = config_from_recipe("zero-shot-ensemble").templates
    assert ensemble == (
        *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."),
        *("a {} in a video game.", "art of the {}.", "a photo of the small {}."),
    )
    sixty = config_from_recipe("promptsrc").reference_templates
    assert len({*sixty}) == 60
    assert (sixty[0], sixty[39], sixty[-1]) == ("a bad photo of a {}.", "a photo of a {}.", "itap of the {}.")
    assert "a jpeg corrupted photo of the {}." not in sixty
    assert all(form.count("{}") == 1 for form in (*ensemble, *sixty))


def test_the_baseline_has_the_settings_of_sync_clip_without_its_own_parts() -> None:
    for end in ("", "-tiny"):
        baseline, sync = config_from_recipe(f"ivlp-synthetic{end}"), config_from_recipe(f"sync-clip{end}")
        assert (baseline.domain_tokens, baseline.align_weight) == (0, 0.0)
        assert baseline.synthetic_weight == 0.2 / 0.8
        own = ("recipe", "method", "domain_tokens", "align_weight", "synthetic_weight")
        assert replace(baseline, **{name: getattr(sync, name) for name in own}) == sync


def test_settings_that_the_authors_vary_by_data_set() -> None:
    assert [config_from_recipe("coop", name).epochs for name in ("ImageNet", "EuroSAT")] == [50, 200]
    averages = [config_from_recipe("promptsrc-few-shot", name) for name in ("OxfordFlowers", "Food101")]
    assert [(one.average_mean, one.average_std, one.epochs) for one in averages] == [(45, 5, 50), (30, 30, 50)]
    textures = config_from_recipe("kgcoop", "DescribableTextures").reference_templates
    assert textures == ("a photo of a {}, a type of texture.",)
    assert config_from_recipe("kgcoop", "EuroSAT").reference_templates == ()


def test_names_of_data_sets_in_recipes_are_known() -> None:
    known = {record.name for record in PUBLISHED_DATASETS}
    assert {*SYNC_CLIP_PUBLISHED, *PROMPTSRC_LATE_AVERAGE, "DescribableTextures", "ImageNet"} <= known


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if name.endswith("-tiny")))
def test_tiny_recipes_fit_the_built_in_model(name: str) -> None:
    config = config_from_recipe(name, "prints")
    assert (config.base_model, config.flip) == ("clipship-tiny", False)
    assert config.text_depth <= 3
    assert config.image_depth <= 4
    published = config_from_recipe(name.removesuffix("-tiny"), "prints")
    assert config.method == published.method
    if published.text_depth > 1:
        assert config.text_depth == 3
    assert all(form.count("{}") == 1 for form in (*config.templates, *config.reference_templates))


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
        ({"shots": -1}, "shots=-1: must be at least 0"),
        ({"epochs": -1}, "epochs=-1: must be at least 0"),
        ({"momentum": 1.0}, "momentum=1.0: must be in"),
        ({"min_crop": 0.0}, "min_crop=0.0: must be in"),
        ({"precision": "fp8"}, "precision='fp8': must be one of fp32, bf16, fp16"),
        ({"optimizer": "lion"}, "optimizer='lion': must be one of sgd, adamw"),
        ({"schedule": "linear"}, "schedule='linear': must be one of epoch-cosine, step-cosine, constant"),
        ({"classes": "new"}, "classes='new': must be one of base, all, none"),
        ({"classes": "none"}, "classes='none': must be base or all where no generator makes features"),
        ({"text_consistency": -1.0}, "text_consistency=-1.0: must be at least 0"),
        ({"average_std": -1.0}, "average_std=-1.0: must be at least 0"),
        ({"adapter_ratio": 1.5}, "adapter_ratio=1.5: must be in"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0: must be greater than 0"),
        ({"accumulate": 9}, "accumulate=9, batch_size=8: must be at most batch_size"),
        ({"domain_tokens": 5}, "domain_tokens=5: must be in 0..image_tokens"),
        ({"image_depth": 0}, "image_depth=0, image_tokens=4: must be both 0 or both at least 1"),
        ({"align_weight": -0.5}, "align_weight=-0.5: must be at least 0"),
        ({"synthetic_shots": -1}, "synthetic_shots=-1: must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(config_from_recipe("sync-clip"), **changes)  # type: ignore[arg-type]


CHANGED = {
    "precision": "bf16",
    "optimizer": "adamw",
    "schedule": "constant",
    "classes": "all",
    "generator": TrainConfig(recipe="other", method="ship", base_model="small"),
    "synthetic_shots": 4,
}


def _other(name: str, value: Any) -> Any:
    """A value of the same kind that is not ``value``."""
    match value:
        case _ if name in CHANGED:
            return CHANGED[name]
        case bool():
            return not value
        case str():
            return value + "x"
        case tuple():
            return (*value, "one more {}.")
        case float():
            return value / 2 or 0.25
    return value + 1


def test_settings_round_trip_and_their_digest_is_of_all_of_them() -> None:
    config = replace(config_from_recipe("sync-clip"), templates=("a {}.", "the {}."))
    assert TrainConfig.from_json(config.to_json()) == config
    for field in fields(config):
        changed = replace(config, **{field.name: _other(field.name, getattr(config, field.name))})
        assert changed.digest != config.digest, field.name
        assert TrainConfig.from_json(changed.to_json()) == changed, field.name


def test_settings_with_odd_fields_are_refused() -> None:
    content = config_from_recipe("coop").to_json()
    with pytest.raises(RecipeError, match="warp missing or unknown"):
        TrainConfig.from_json({**content, "warp": 1})
    del content["seed"]
    with pytest.raises(RecipeError, match="seed missing or unknown"):
        TrainConfig.from_json(content)


def test_settings_of_older_checkpoints_have_what_was_then_and_their_digest() -> None:
    config = config_from_recipe("sync-clip-tiny")
    generated = config_from_recipe("ship-coop-tiny")
    old = generated.to_json()
    for content in (old, old["generator"]):
        del content["synthetic_shots"], content["synthetic_filter"]
    assert TrainConfig.from_json(old) == generated
    # as the versions before these settings had them: runs of theirs are found finished, and gone on with
    assert config.digest == "65c5db52ef5db1475594551d91a179d8a0cb7de0e2263394ed773754f07b1a60"
    assert generated.digest == "99c036b514231a5c8b6f3ce5e8b74edb0aba76483b7092d0eca3fd51bd09c6bc"
    assert replace(config, synthetic_shots=16).digest != config.digest
    assert replace(config, synthetic_filter=False).digest != config.digest

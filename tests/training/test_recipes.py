"""Recipes, and the checks of their settings."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from clipship.core.errors import RecipeError
from clipship.training.checkpoint import config_from_json
from clipship.training.config import TrainConfig
from clipship.training.datasets.records import PUBLISHED_DATASETS
from clipship.training.methods import METHODS, config_of
from clipship.training.methods.prompted import ContextSettings
from clipship.training.methods.sync_clip import SyncClipSettings
from clipship.training.recipes import PROMPTSRC_LATE_AVERAGE, RECIPES, SYNC_CLIP_PUBLISHED, config_from_recipe


def test_every_recipe_is_named_after_itself_and_says_what_it_is() -> None:
    for name, recipe in RECIPES.items():
        assert config_from_recipe(name, "EuroSAT").recipe == name
        assert (recipe.__doc__ or "").strip().splitlines()[0].endswith(".")


GOLDEN = json.loads((Path(__file__).parent / "recipes-0.5.json").read_text(encoding="utf-8"))
"""Every recipe's settings as version 0.5 wrote them into checkpoints: one flat object with the settings of all methods.

``recipes`` has only what differs from ``defaults``; "" is any data set but those that are listed, null no settings.
"""


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    whole = {**GOLDEN["defaults"], **settings}
    return {**whole, "generator": whole["generator"] and _flat(whole["generator"])}


@pytest.mark.parametrize("name", sorted(GOLDEN["recipes"]))
def test_recipes_have_the_settings_of_version_0_5(name: str) -> None:
    """Also: checkpoints of 0.5 are read."""
    golden = GOLDEN["recipes"][name]
    for dataset in ("", "prints", *(record.name for record in PUBLISHED_DATASETS)):
        want = golden.get(dataset, golden[""])
        if want is None:
            with pytest.raises(RecipeError, match="no settings"):
                config_from_recipe(name, dataset)
        else:
            assert config_from_recipe(name, dataset) == config_from_json(_flat(want)), dataset


def test_published_settings() -> None:
    coop, sync = config_from_recipe("coop"), config_from_recipe("sync-clip")
    assert (coop.learning_rate, coop.batch_size, coop.epochs) == (0.002, 32, 200)
    assert coop.settings == ContextSettings(text_tokens=4)
    assert (sync.learning_rate, sync.batch_size, sync.epochs) == (0.0025, 8, 10)
    assert sync.settings == SyncClipSettings(
        text_tokens=4, text_depth=9, image_tokens=4, image_depth=9, domain_tokens=2, synthetic_weight=0.2,
        align_weight=0.5,
    )  # fmt: skip
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
    content = config.to_json()
    assert {field: content[field] for field in PUBLISHED[name]} == PUBLISHED[name]
    assert (config.base_model, config.optimizer, config.schedule) == ("ViT-B-16/openai", "sgd", "epoch-cosine")
    assert (config.momentum, config.weight_decay, config.warmup_epochs) == (0.9, 5e-4, 1)
    assert (config.min_crop, config.flip, config.shots) == (0.08, True, 16)
    assert content.get("context_init", "a photo of a") == "a photo of a"


def test_prompt_ensembles_are_the_published_ones() -> None:
    ensemble = config_from_recipe("zero-shot-ensemble").templates
    assert ensemble == (
        *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."),
        *("a {} in a video game.", "art of the {}.", "a photo of the small {}."),
    )
    sixty = config_from_recipe("promptsrc").to_json()["reference_templates"]
    assert len({*sixty}) == 60
    assert (sixty[0], sixty[39], sixty[-1]) == ("a bad photo of a {}.", "a photo of a {}.", "itap of the {}.")
    assert "a jpeg corrupted photo of the {}." not in sixty
    assert all(form.count("{}") == 1 for form in (*ensemble, *sixty))


def test_the_baseline_has_the_settings_of_sync_clip_without_its_own_parts() -> None:
    for end in ("", "-tiny"):
        recipes = config_from_recipe(f"ivlp-synthetic{end}"), config_from_recipe(f"sync-clip{end}")
        baseline, sync = (config.to_json() for config in recipes)
        assert baseline["synthetic_weight"] == 0.2 / 0.8
        own = ("recipe", "method", "domain_tokens", "align_weight", "synthetic_weight")
        assert {**baseline, **{name: sync[name] for name in own}} == sync


def test_settings_that_the_authors_vary_by_data_set() -> None:
    assert [config_from_recipe("coop", name).epochs for name in ("ImageNet", "EuroSAT")] == [50, 200]
    averages = [config_from_recipe("promptsrc-few-shot", name) for name in ("OxfordFlowers", "Food101")]
    assert [(one.average_mean, one.average_std, one.epochs) for one in averages] == [(45, 5, 50), (30, 30, 50)]
    textures = config_from_recipe("kgcoop", "DescribableTextures").to_json()["reference_templates"]
    assert textures == ["a photo of a {}, a type of texture."]
    assert config_from_recipe("kgcoop", "EuroSAT").to_json()["reference_templates"] == []


def test_names_of_data_sets_in_recipes_are_known() -> None:
    known = {record.name for record in PUBLISHED_DATASETS}
    assert {*SYNC_CLIP_PUBLISHED, *PROMPTSRC_LATE_AVERAGE, "DescribableTextures", "ImageNet"} <= known


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if name.endswith("-tiny")))
def test_tiny_recipes_fit_the_built_in_model(name: str) -> None:
    config = config_from_recipe(name, "prints")
    assert (config.base_model, config.flip) == ("clipship-tiny", False)
    content, published = config.to_json(), config_from_recipe(name.removesuffix("-tiny"), "prints").to_json()
    assert content.get("text_depth", 0) <= 3
    assert content.get("image_depth", 0) <= 4
    assert content["method"] == published["method"]
    if published.get("text_depth", 0) > 1:
        assert content["text_depth"] == 3
    assert all(form.count("{}") == 1 for form in (*config.templates, *content.get("reference_templates", ())))


def test_settings_by_data_set_are_only_in_the_recipe_that_says_so() -> None:
    eurosat = config_from_recipe("sync-clip-published", "EuroSAT")
    content = eurosat.to_json()
    assert (content["epochs"], content["synthetic_weight"], content["align_weight"]) == (10, 0.1, 3.5)
    assert config_from_recipe("sync-clip", "EuroSAT") == config_from_recipe("sync-clip", "Food101")
    assert len(SYNC_CLIP_PUBLISHED) == 11
    with pytest.raises(RecipeError, match=r"no settings for 'prints'.*take sync-clip"):
        config_from_recipe("sync-clip-published", "prints")


def test_unknown_recipes_get_the_near_names() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'sink-clip': did you mean sync-clip"):
        config_from_recipe("sink-clip")


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("sync-clip", {"shots": -1}, "shots=-1: must be at least 0"),
        ("sync-clip", {"epochs": -1}, "epochs=-1: must be at least 0"),
        ("sync-clip", {"momentum": 1.0}, "momentum=1.0: must be in"),
        ("sync-clip", {"min_crop": 0.0}, "min_crop=0.0: must be in"),
        ("sync-clip", {"precision": "fp8"}, "precision='fp8': must be one of fp32, bf16, fp16"),
        ("sync-clip", {"optimizer": "lion"}, "optimizer='lion': must be one of sgd, adamw"),
        ("sync-clip", {"schedule": "linear"}, "schedule='linear': must be one of epoch-cosine, step-cosine, constant"),
        ("sync-clip", {"classes": "new"}, "classes='new': must be one of base, all, none"),
        ("sync-clip", {"classes": "none"}, "classes='none': must be base or all where no generator makes features"),
        ("kgcoop", {"text_consistency": -1.0}, "text_consistency=-1.0: must be at least 0"),
        ("promptsrc", {"average_std": -1.0}, "average_std=-1.0: must be at least 0"),
        ("promptsrc", {"average_mean": -1.0}, "average_mean=-1.0: must be at least 0"),
        ("clip-adapter", {"adapter_ratio": 1.5}, "adapter_ratio=1.5: must be in"),
        ("sync-clip", {"adam_epsilon": 0.0}, "adam_epsilon=0.0: must be greater than 0"),
        ("sync-clip", {"accumulate": 9}, "accumulate=9, batch_size=8: must be at most batch_size"),
        ("sync-clip", {"domain_tokens": 5}, "domain_tokens=5: must be in 0..image_tokens"),
        ("sync-clip", {"image_depth": 0}, "image_depth=0: must be at least 1"),
        ("sync-clip", {"align_weight": -0.5}, "align_weight=-0.5: must be at least 0"),
        ("sync-clip", {"synthetic_shots": -1}, "synthetic_shots=-1: must be at least 0"),
        ("sync-clip", {"learning_rate": float("nan")}, "learning_rate=nan"),
        ("tip-adapter", {"cache_beta": -1.0}, "cache_beta=-1.0: must be at least 0"),
        ("ship", {"decoder_slope": -0.1}, "decoder_slope=-0.1: must be at least 0"),
        ("cocoop", {"text_depth": 2}, "text_depth=2: must be 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config_from_recipe(recipe).with_settings(**changes)


def test_no_setting_of_a_method_is_called_as_one_of_the_run() -> None:
    """They stand side by side in a checkpoint's record."""
    common = {field.name for field in fields(TrainConfig)}
    for method in METHODS.values():
        assert common.isdisjoint(field.name for field in fields(method.settings_type)), method


CHANGED = {
    "precision": "bf16",
    "optimizer": "adamw",
    "schedule": "constant",
    "classes": "all",
    "generator": config_of("ship", recipe="other", base_model="small"),
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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_settings_round_trip_and_their_digest_is_of_all_of_them(method: str) -> None:
    config = config_of(method, recipe="test", base_model="small", templates=("a {}.", "the {}."))
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config
    common = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in ("settings", "method")
    }
    own = {field.name: getattr(config.settings, field.name) for field in fields(config.settings)}
    for name, value in {**common, **own}.items():
        if (method, name) == ("cocoop", "text_depth"):  # is 1
            continue
        changed = config.with_settings(**{name: _other(name, value)})
        assert changed.digest != config.digest, name
        assert config_from_json(changed.to_json()) == changed, name


def test_digests_tell_methods_apart() -> None:
    assert len({config_of(one, recipe="test", base_model="small").digest for one in METHODS}) == len(METHODS)


def test_settings_with_odd_fields_are_refused() -> None:
    content = config_from_recipe("coop").to_json()
    with pytest.raises(RecipeError, match="warp missing or unknown"):
        config_from_json({**content, "warp": 1})
    with pytest.raises(RecipeError, match="unknown method 'cop': did you mean coop"):
        config_from_json({**content, "method": "cop"})
    for name in ("seed", "text_depth"):
        with pytest.raises(RecipeError, match=f"{name} missing or unknown"):
            config_from_json({key: value for key, value in content.items() if key != name})


def test_settings_of_the_oldest_checkpoints_have_what_was_then() -> None:
    for name in ("sync-clip-tiny", "ship-coop-tiny"):
        config = config_from_recipe(name)
        old = _flat(GOLDEN["recipes"][name][""])
        for content in (old, old["generator"] or old):
            content.pop("synthetic_shots", None)
            content.pop("synthetic_filter", None)
        assert config_from_json(old) == config
        assert config.with_settings(synthetic_shots=16).digest != config.digest
        assert config.with_settings(synthetic_filter=False).digest != config.digest

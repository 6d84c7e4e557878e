"""Loading CLIP: what is accepted, what is refused, and that its pixels and features are open_clip's."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipship.core.errors import DataError, RecipeError
from clipship.training.model import prompts
from clipship.training.model.clip import Clip, load_clip
from tests.training.conftest import MODEL, coloured, write_model


def test_the_model_is_frozen_and_described(clip: Clip, model_folder: Path) -> None:
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert (clip.embed_dim, clip.context_length, clip.image_layers, clip.text_layers) == (24, 16, 3, 2)
    assert (clip.image_width, clip.text_width, clip.image_spec.size_px) == (32, 48, 32)
    assert clip.logit_scale == pytest.approx(1 / 0.07)


def test_the_digest_is_of_the_weights(clip: Clip, model_folder: Path, tmp_path: Path) -> None:
    assert clip.digest == load_clip(str(model_folder)).digest
    assert clip.digest != load_clip(str(write_model(tmp_path / "other", seed=1))).digest


def test_pixels_enter_as_open_clip_makes_them(clip: Clip) -> None:
    image = coloured((200, 90, 30), 0)
    transform = open_clip.image_transform(32, is_train=False)
    assert torch.equal(clip.preprocess(image), transform(image))


def test_features_without_prompts_are_open_clips_to_the_bit(clip: Clip) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(["a photo of a red star.", "x", "two blue rings on grass"])
    with torch.no_grad():
        assert torch.equal(prompts.image_features(clip, pixels), clip.model.encode_image(pixels))
        assert torch.equal(prompts.text_features(clip, tokens), clip.model.encode_text(tokens))


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_text": True},
        {"vision_cfg": {**MODEL["vision_cfg"], "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}},  # type: ignore[dict-item]
        {"custom_text": True, "text_cfg": {**MODEL["text_cfg"], "proj_bias": True, "no_causal_mask": True}},  # type: ignore[dict-item]
    ],
)
def test_variants_of_the_towers_give_open_clips_features(changes: dict[str, object], tmp_path: Path) -> None:
    clip = load_clip(str(write_model(tmp_path / "variant", {**MODEL, **changes})))
    pixels, tokens = torch.randn(2, 3, 32, 32), clip.tokenize(["red", "a blue star"])
    with torch.no_grad():
        assert torch.equal(prompts.image_features(clip, pixels), clip.model.encode_image(pixels))
        assert torch.equal(prompts.text_features(clip, tokens), clip.model.encode_text(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}}, "not a VisionTransformer"),
        ({"vision_cfg": {**MODEL["vision_cfg"], "attentional_pool": True}}, "pools by attention"),  # type: ignore[dict-item]
        ({"custom_text": True, "text_cfg": {**MODEL["text_cfg"], "embed_cls": True}}, "class token"),  # type: ignore[dict-item]
    ],
)
def test_towers_that_prompts_cannot_enter_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "foreign", {**MODEL, **changes})
    with pytest.raises(RecipeError, match=message):
        load_clip(str(folder))


def test_weights_are_never_missing_in_silence(model_folder: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "empty").mkdir()
    (folder / "open_clip_config.json").write_bytes((model_folder / "open_clip_config.json").read_bytes())
    with pytest.raises(RecipeError, match="could not be loaded"):
        load_clip(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-61/openai", "unknown model 'ViT-B-61/openai': did you mean ViT-B-16"),
        ("clipship-tyni", "did you mean clipship-tiny"),
        ("ViT-B-16", "no weights ''"),
        ("ViT-B-16/opanai", "did you mean openai"),
        ("RN50/openai", "not a VisionTransformer"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "not a TextTransformer"),
        ("ViT-B-16-SigLIP/webli", "not a VisionTransformer"),
        ("coca_ViT-B-32/random", "pools by attention|class token"),
    ],
)
def test_unknown_models_get_the_near_names(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_clip(name)


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = load_clip("ViT-S-32-alt/random").digest
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert load_clip("ViT-S-32-alt/random").digest == first


def test_prompts_that_open_clip_would_cut_are_refused(clip: Clip) -> None:
    assert clip.tokenize(["a " * 14]).shape == (1, 16)
    with pytest.raises(DataError, match="start or end token"):
        clip.tokenize(["red <end_of_text> star"])
    with pytest.raises(DataError, match=r"has 17 tokens, .* takes 16"):
        clip.tokenize(["ok", "a " * 15])


def test_normalised_pixels_are_exact(clip: Clip) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    normalise = open_clip.image_transform(32, is_train=False).transforms[-2:]
    want = [normalise[1](normalise[0](Image.fromarray(one))) for one in pixels]
    assert torch.equal(clip.normalize(torch.from_numpy(pixels)), torch.stack(want))

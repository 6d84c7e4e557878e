"""Where learned tokens enter the towers, against a slow reference made of open_clip's own blocks."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from clipship.core.errors import RecipeError
from clipship.training.model import prompts
from clipship.training.model.clip import Clip


def _reference_image(clip: Clip, pixels: Tensor, deep: Tensor) -> Tensor:
    """One image at a time, prompts appended before ``ln_pre`` as the papers say, tokens listed one by one."""
    visual = clip.visual
    rows = []
    for pixel in pixels:
        patches = visual.conv1(pixel[None]).flatten(2)[0].T
        tokens = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding
        x = visual.ln_pre(torch.cat([tokens, deep[0]]))
        for layer, block in enumerate(visual.transformer.resblocks):
            if 1 <= layer < len(deep):
                x = torch.cat([x[: len(tokens)], deep[layer]])
            x = block(x[None])[0]
        rows.append(visual.ln_post(x)[0] @ visual.proj)
    return torch.stack(rows)


def _reference_text(clip: Clip, tokens: Tensor, deep: Tensor) -> Tensor:
    text = clip.text
    rows = []
    for ids in tokens:
        x = text.token_embedding(ids)
        x = torch.stack([deep[0, place - 1] if 1 <= place <= deep.shape[1] else row for place, row in enumerate(x)])
        x = x + text.positional_embedding
        for layer, block in enumerate(text.transformer.resblocks):
            if 1 <= layer < len(deep):
                x = torch.cat([x[:1], deep[layer], x[1 + deep.shape[1] :]])
            x = block(x[None], attn_mask=text.attn_mask)[0]
        end = int((ids == clip.tokenizer.eot_token_id).nonzero()[0])
        rows.append(text.ln_final(x)[end] @ text.text_projection)
    return torch.stack(rows)


def _deep(depth: int, tokens: int, width: int) -> Tensor:
    return torch.randn(depth, tokens, width, generator=torch.Generator().manual_seed(depth))


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_image_prompts(clip: Clip, depth: int) -> None:
    pixels, deep = torch.randn(3, 3, 32, 32), _deep(depth, 4, clip.image_width)
    got = prompts.image_features(clip, pixels, deep)
    torch.testing.assert_close(got, _reference_image(clip, pixels, deep), rtol=1e-4, atol=1e-5)
    assert (got - prompts.image_features(clip, pixels)).abs().max() > 0.01


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_text_prompts(clip: Clip, depth: int) -> None:
    tokens, deep = clip.tokenize(["X X X red star.", "X X X blue."]), _deep(depth, 3, clip.text_width)
    got = prompts.text_features(clip, tokens, deep)
    torch.testing.assert_close(got, _reference_text(clip, tokens, deep), rtol=1e-4, atol=1e-5)
    assert (got - prompts.text_features(clip, tokens)).abs().max() > 0.01


@torch.no_grad()
def test_prompts_that_repeat_the_words_change_nothing(clip: Clip) -> None:
    words = prompts.context_prompts(clip, 1, 4, "a photo of a", torch.Generator())
    learned = prompts.text_features(clip, clip.tokenize(["X X X X red star."]), words)
    spoken = prompts.text_features(clip, clip.tokenize(["a photo of a red star."]))
    torch.testing.assert_close(learned, spoken, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_padding_can_be_cut(clip: Clip) -> None:
    tokens, deep = clip.tokenize(["X X red star.", "X X blue."]), _deep(2, 2, clip.text_width)
    short = prompts.text_features(clip, tokens[:, :7], deep)
    torch.testing.assert_close(short, prompts.text_features(clip, tokens, deep), rtol=1e-5, atol=1e-6)


def test_context_words_must_be_as_many_as_the_tokens(clip: Clip) -> None:
    with pytest.raises(RecipeError, match="'a photo' has 2 tokens, the recipe 4"):
        prompts.context_prompts(clip, 1, 4, "a photo", torch.Generator())
    assert prompts.context_prompts(clip, 2, 3, "", torch.Generator()).shape == (2, 3, clip.text_width)


def test_placeholders_take_one_position_each(clip: Clip) -> None:
    assert prompts.placeholder_template(clip, 4) == "X X X X {}."
    ids = clip.tokenize(["X X X X red."])[0]
    assert len(set(ids[1:5].tolist())) == 1
    assert ids[5] == clip.token_ids("red")[0]


def test_placeholders_of_a_tokenizer_that_merges_them_are_refused(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(clip), "token_ids", lambda self, text: [7, 7, 7])
    with pytest.raises(RecipeError, match=r"3 tokens in .*, not 4"):
        prompts.placeholder_template(clip, 4)


@pytest.mark.parametrize(("tower", "layers"), [("image", 3), ("text", 2)])
def test_depth_is_never_capped_in_silence(clip: Clip, tower: Literal["image", "text"], layers: int) -> None:
    prompts.validate_depth(clip, tower, layers)
    with pytest.raises(RecipeError, match=f"the {tower} tower of .* set the depth to at most {layers}"):
        prompts.validate_depth(clip, tower, layers + 1)

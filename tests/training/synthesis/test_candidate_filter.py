"""The filter: scores are CLIP's, the best are kept, near-duplicates are not."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clipship.core.errors import DataError, RecipeError
from clipship.training.model.clip import load_clip
from clipship.training.synthesis.candidate_filter import Scorer, choose, class_feature, first_ones
from clipship.training.synthesis.class_prompts import ClassPrompts
from clipship.training.synthesis.config import SynthesisConfig

from ..conftest import COLOURS, coloured

Variant = Callable[..., SynthesisConfig]


def directions(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane: their cosines are easy to tell."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_the_best_are_kept_and_the_others_say_why(smaller: Variant) -> None:
    scores = torch.tensor([0.1, 0.5, 0.3, 0.4])
    found = choose(smaller(keep=2), [10, 11, 12, 13], scores, directions(0, 30, 60, 90), [None] * 4)
    late = "not among the 2 best scores"
    assert [one.reason for one in found] == [late, None, late, None]
    assert [one.score for one in found] == pytest.approx(scores.tolist())


def test_of_near_duplicates_the_best_stays_and_the_next_takes_the_place(smaller: Variant) -> None:
    features, scores = directions(0, 5, 60, 90), torch.tensor([0.3, 0.5, 0.2, 0.1])
    found = choose(smaller(keep=2, duplicates=0.99), [10, 11, 12, 13], scores, features, [None] * 4)
    assert found[0].reason == "near-duplicate of 11 (cosine 0.996)"
    assert [one.reason is None for one in found] == [False, True, True, False]
    assert choose(smaller(keep=2, duplicates=1.0), [10, 11, 12, 13], scores, features, [None] * 4)[0].reason is None
    same = directions(0, 0, 0)
    only = choose(smaller(keep=2, duplicates=0.99), [1, 2, 3], torch.tensor([0.3, 0.5, 0.2]), same, [None] * 3)
    assert [one.reason is None for one in only] == [False, True, False], "a class may end with fewer than asked for"


def test_what_is_taken_for_another_class_is_dropped(smaller: Variant) -> None:
    found = choose(
        smaller(keep=2), [1, 2, 3], torch.tensor([0.3, 0.5, 0.2]), directions(0, 40, 80), [None, "cat", None]
    )
    assert [one.reason for one in found] == [None, "taken for cat", None]


def test_without_a_filter_the_first_are_kept(smaller: Variant) -> None:
    assert [one.reason for one in first_ones(smaller(keep=2), 3)] == [None, None, "not among the first 2"]


def test_scores_are_those_of_open_clip(
    model_folder: Path, class_prompts: ClassPrompts, smaller: Variant, tmp_path: Path
) -> None:
    paths = []
    for number, colour in enumerate(COLOURS.values()):
        coloured(colour, number).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    scorer = Scorer(str(model_folder), class_prompts)
    config = smaller(keep=5, candidates=5)
    decisions = scorer.decisions(config, "green", range(5), scorer.features(paths, torch.device("cpu")))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{model_folder}")([*(class_prompts.plain_prompts["green"])])
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        expected = model.encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T
    assert [one.score for one in decisions] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)


def test_the_class_filter_names_the_class_that_won(
    model_folder: Path, class_prompts: ClassPrompts, smaller: Variant
) -> None:
    scorer = Scorer(str(model_folder), class_prompts)
    other = scorer._texts_CD[2:3]
    own = scorer._texts_CD[0:1]
    found = scorer.decisions(smaller(filter="class"), "red", [1, 2], torch.cat([other, own]))
    assert [one.reason for one in found] == ["taken for blue sky", None]
    assert all(one.reason is None for one in scorer.decisions(smaller(), "red", [1, 2], torch.cat([other, own])))


def test_a_class_is_the_mean_over_its_prompts(model_folder: Path) -> None:
    clip = load_clip(str(model_folder))
    one, two = class_feature(clip, ["a cat"]), class_feature(clip, ["the dog"])
    assert class_feature(clip, ["a cat", "the dog"]) == pytest.approx(functional.normalize(one + two, dim=0), abs=1e-6)


def test_what_clip_cannot_score_is_refused_before_anything_is_made(
    model_folder: Path, class_prompts: ClassPrompts
) -> None:
    from dataclasses import replace

    long = replace(class_prompts, plain_prompts={**class_prompts.plain_prompts, "red": ("very " * 20 + "red",)})
    with pytest.raises(DataError, match="takes 16: shorten the name"):
        Scorer(str(model_folder), long)
    with pytest.raises(RecipeError, match="unknown model"):
        Scorer("ViT-B-61", class_prompts)

"""Scores: the protocols, worked out by hand and through the whole path."""

import json
from dataclasses import replace

import pytest
import torch

from clipship.core.errors import DataError
from clipship.training.clip import Clip
from clipship.training.config import TrainConfig
from clipship.training.data import Dataset, Item
from clipship.training.evaluate import Scores, _scores_from_logits, evaluate, harmonic_mean
from clipship.training.methods import Method, build_method


@pytest.fixture
def method(clip: Clip, dataset: Dataset) -> Method:
    config = TrainConfig(recipe="test", method="zero-shot", base_model=clip.name)
    return build_method(clip, config, dataset.task)


def test_the_harmonic_mean() -> None:
    assert harmonic_mean(80.03, 73.69) == pytest.approx(76.73, abs=0.005)
    assert harmonic_mean(0, 50) == 0
    assert harmonic_mean(0, 0) == 0


def test_protocols_by_hand(dataset: Dataset) -> None:
    """Five classes, three of them base. Rows: right; right among base only; wrong; right; right among new only."""
    logits = torch.tensor(
        [
            [9.0, 1, 1, 1, 1],
            [1.0, 5, 1, 9, 1],
            [7.0, 1, 5, 1, 1],
            [1.0, 1, 1, 9, 1],
            [9.0, 1, 1, 1, 5],
        ]
    )
    scores = _scores_from_logits(logits, torch.tensor([0, 1, 2, 3, 4]), dataset, "test")
    assert [scores.base, scores.new] == pytest.approx([200 / 3, 100])
    assert [scores.open_base, scores.open_new, scores.all] == pytest.approx([100 / 3, 50, 40])
    assert scores.harmonic_mean == pytest.approx(80)
    assert scores.open_harmonic_mean == pytest.approx(40)
    assert (scores.num_base_images, scores.num_new_images) == (3, 2)
    assert (scores.num_base_classes, scores.num_new_classes) == (3, 2)


def test_scores_of_a_method_are_those_of_its_logits(method: Method, dataset: Dataset) -> None:
    scores = evaluate(method, dataset)
    assert (scores.num_base_images, scores.num_new_images) == (12, 8)
    with torch.no_grad():
        right = 0
        for item in dataset.test:
            from PIL import Image

            pixels = method.clip.preprocess(Image.open(item.path))[None]
            features = method.image_features(pixels)
            right += int(method.logits(features, method.class_features(dataset.class_names)).argmax()) == item.label
    assert scores.all == pytest.approx(100 * right / len(dataset.test))


def test_scores_round_trip_through_json(method: Method, dataset: Dataset) -> None:
    scores = evaluate(method, dataset, "val")
    assert scores.split == "val"
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores


def test_another_data_set_is_refused(method: Method, dataset: Dataset) -> None:
    other = replace(dataset, class_names=("cat", "dog", "fox", "owl", "bee"))
    with pytest.raises(DataError, match="5 classes from 'red' on, Colours has 5 from 'cat' on"):
        evaluate(method, other)


def test_broken_or_missing_images_are_named(
    method: Method, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (broken := tmp_path_factory.mktemp("broken") / "bad.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"bad.png"):
        evaluate(method, replace(dataset, test=(*dataset.test, Item(broken, 0, "red"))))
    with pytest.raises(DataError, match="lacks images of base or new classes"):
        evaluate(method, replace(dataset, test=dataset.test[:2]))

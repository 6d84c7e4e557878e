"""Scores: the protocols, worked out by hand and through the whole path."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipship.core.errors import DataError
from clipship.training.datasets.base import Dataset, LabelledImage
from clipship.training.evaluation.evaluate import (
    Scores,
    _accuracies,
    evaluate,
    harmonic_mean,
    method_for,
    protocol_of,
)
from clipship.training.evaluation.temperature import ReliabilityBin, expected_calibration_error
from clipship.training.methods import Method, build_method, config_of
from clipship.training.model.clip import Clip

DEEP = {"image_tokens": 2, "image_depth": 2}


def _method(clip: Clip, dataset: Dataset, name: str = "zero-shot", **settings: object) -> Method:
    config = config_of(name, recipe="test", base_model=clip.name, **settings)
    return build_method(clip, config, dataset.task)


@pytest.fixture
def method(clip: Clip, dataset: Dataset) -> Method:
    return _method(clip, dataset)


@pytest.fixture
def animals(dataset: Dataset) -> Dataset:
    """The same images as another data set, with other names and its own template."""
    names = ("cat", "dog", "fox", "owl", "bee")
    record = replace(dataset.record, name="Animals", template="a drawing of the {}.")
    return replace(dataset, record=record, class_names=names)


@pytest.fixture
def dusk(dataset: Dataset) -> Dataset:
    """Another data set with the same names."""
    return replace(dataset, record=replace(dataset.record, name="ColoursAtDusk"), train=(), val=())


def _by_hand(method: Method, dataset: Dataset, items: tuple[LabelledImage, ...]) -> Tensor:
    """Logits [N, C], one image at a time."""
    with torch.no_grad():
        classify = method.classifier(dataset.class_names)
        pixels = [method.clip.preprocess(Image.open(item.path))[None] for item in items]
        return torch.cat([classify(method.image_features(one)) for one in pixels])


def _percent_right(logits: Tensor, items: tuple[LabelledImage, ...]) -> float:
    return 100 * sum(int(row.argmax()) == item.label for row, item in zip(logits, items, strict=True)) / len(items)


def test_the_harmonic_mean() -> None:
    assert harmonic_mean(80.03, 73.69) == pytest.approx(76.73, abs=0.005)
    assert harmonic_mean(0, 50) == 0
    assert harmonic_mean(0, 0) == 0


def _scores(logits: Tensor, labels: Tensor, dataset: Dataset, protocol: str) -> Scores:
    parts = _accuracies(logits, labels, dataset, protocol)
    return Scores(dataset="D", split="test", protocol=protocol, selection="", num_images=1, num_classes=5, **parts)


def test_base_to_new_by_hand(dataset: Dataset) -> None:
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
    scores = _scores(logits, torch.arange(5), dataset, "base-to-new")
    assert [scores.base, scores.new] == pytest.approx([200 / 3, 100])
    assert [scores.open_base, scores.open_new, scores.all] == pytest.approx([100 / 3, 50, 40])
    assert scores.harmonic_mean == pytest.approx(80)
    assert scores.open_harmonic_mean == pytest.approx(40)
    assert (scores.seen, scores.unseen, scores.generalised_harmonic_mean) == (None, None, None)


def test_generalised_zero_shot_is_the_mean_over_classes_of_unequal_size(dataset: Dataset) -> None:
    """Right of images by class: 4 of 4, 0 of 1, none at all; 1 of 2, 0 of 6."""
    found = {0: [0, 0, 0, 0], 1: [3], 3: [3, 4], 4: [3, 3, 0, 0, 1, 2]}
    labels = torch.tensor([label for label, answers in found.items() for _ in answers])
    logits = torch.nn.functional.one_hot(
        torch.tensor([one for answers in found.values() for one in answers]), 5
    ).float()
    scores = _scores(logits, labels, dataset, "generalised zero-shot")
    assert [scores.seen, scores.unseen] == pytest.approx([(100 + 0) / 2, (50 + 0) / 2])
    assert scores.generalised_harmonic_mean == pytest.approx(2 * 50 * 25 / 75)
    assert [scores.open_base, scores.open_new, scores.all] == pytest.approx([80, 100 / 8, 500 / 13])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("zero-shot", {}), ("clip-adapter", {"adapter_ratio": 0.6}), ("cocoop", {}), ("vpt", DEEP), ("tip-adapter", {})],
)
def test_scores_are_those_of_a_methods_logits(
    clip: Clip, dataset: Dataset, name: str, settings: dict[str, object]
) -> None:
    method = _method(clip, dataset, name, **settings)
    scores = evaluate(method, dataset)
    logits = _by_hand(method, dataset, dataset.test)
    base, new = dataset.test[:12], dataset.test[12:]
    assert [item.label for item in base] == sorted([0, 1, 2] * 4)
    assert scores.base == pytest.approx(_percent_right(logits[:12, :3], base))
    assert scores.open_base == pytest.approx(_percent_right(logits[:12], base))
    assert scores.open_new == pytest.approx(_percent_right(logits[12:], new))
    assert scores.all == pytest.approx(_percent_right(logits, dataset.test))
    assert (scores.protocol, scores.split, scores.selection) == ("base-to-new", "test", "last step")
    assert (scores.num_images, scores.num_base_images, scores.num_new_images) == (20, 12, 8)
    assert (scores.num_classes, scores.num_base_classes, scores.num_new_classes) == (5, 3, 2)


def test_a_half_without_images_has_no_scores(method: Method, dataset: Dataset) -> None:
    scores = evaluate(method, replace(dataset, test=dataset.test[:12]))
    assert None not in (scores.base, scores.open_base, scores.all)
    assert (scores.new, scores.open_new) == (None, None)
    assert (scores.harmonic_mean, scores.open_harmonic_mean) == (None, None)


def test_where_every_class_had_real_images_there_are_no_halves(clip: Clip, dataset: Dataset) -> None:
    scores = evaluate(_method(clip, replace(dataset, base_classes=5)), dataset)
    assert scores.protocol == "all classes"
    assert scores.all is not None
    assert (scores.base, scores.new, scores.open_base, scores.num_base_images) == (None, None, None, 0)


def test_a_generalised_data_set_gets_means_over_classes(clip: Clip, dataset: Dataset) -> None:
    generalised = replace(dataset, generalised=True, base_classes=4, test=dataset.test[2:])
    method = _method(clip, generalised)
    scores = evaluate(method, generalised)
    right = _by_hand(method, generalised, generalised.test).argmax(dim=1)
    each = []
    for label in range(5):
        mine = [int(found) == label for found, item in zip(right, generalised.test, strict=True) if item.label == label]
        each.append(100 * sum(mine) / len(mine))
    assert scores.protocol == "generalised zero-shot"
    assert [scores.seen, scores.unseen] == pytest.approx([sum(each[:4]) / 4, each[4]])
    assert (scores.num_base_images, scores.num_base_classes) == (14, 4)


def test_another_data_set_is_classified_among_its_own_names_with_its_own_template(
    clip: Clip, method: Method, animals: Dataset
) -> None:
    scores = evaluate(method, animals)
    want = _by_hand(_method(clip, animals), animals, animals.test)
    assert (scores.dataset, scores.protocol) == ("Animals", "cross-dataset")
    assert scores.all == pytest.approx(_percent_right(want, animals.test))
    assert (scores.base, scores.new, scores.open_base, scores.seen) == (None,) * 4
    assert (scores.num_images, scores.num_classes, scores.num_base_classes) == (20, 5, 0)
    confidence = 100 * float(want.softmax(dim=1).max(dim=1).values.mean())
    assert _mean_confidence(scores) == pytest.approx(confidence, abs=1e-3)


def _mean_confidence(scores: Scores) -> float:
    return sum(one.count * one.confidence for one in scores.reliability if one.confidence is not None) / 20


def test_learned_tensors_go_along_to_another_data_set(clip: Clip, dataset: Dataset, animals: Dataset) -> None:
    method = _method(clip, dataset, "coop")
    with torch.no_grad():
        next(method.parameters()).normal_(generator=torch.Generator().manual_seed(3))
    other = method_for(method, animals)
    assert other.templates == method.templates == ("X X X X {}.",)
    assert torch.equal(other.class_features(("cat",)), method.class_features(("cat",)))


def test_templates_of_the_settings_stay_and_those_of_the_data_set_change(
    clip: Clip, dataset: Dataset, animals: Dataset
) -> None:
    assert method_for(_method(clip, dataset), animals).templates == ("a drawing of the {}.",)
    assert method_for(_method(clip, dataset, templates=("a {}!",)), animals).templates == ("a {}!",)
    same = _method(clip, dataset)
    assert method_for(same, dataset) is same


def test_a_cache_keeps_its_votes_on_another_data_set(clip: Clip, dataset: Dataset, animals: Dataset) -> None:
    """Its keys belong to its own classes; names that it does not know get CLIP's logits alone."""
    method = _method(clip, dataset, "tip-adapter", shots=2)
    with torch.no_grad():
        method.get_buffer("keys").normal_(generator=torch.Generator().manual_seed(4))
    other = method_for(method, animals)
    features = torch.nn.functional.normalize(torch.ones(1, 24), dim=1)
    with torch.no_grad():
        plain = _method(clip, animals).classifier(("red", "cat"))(features)
        votes = other.classifier(("red", "cat"))(features) - plain
    assert votes[0, 0] > 0
    assert votes[0, 1] == 0


def test_which_protocol_it_is(clip: Clip, dataset: Dataset, dusk: Dataset, animals: Dataset) -> None:
    method = _method(clip, dataset)
    shuffled = replace(dusk, class_names=tuple(reversed(dusk.class_names)))
    few = replace(dusk, class_names=dusk.class_names[1:3], test=())
    more = replace(dusk, class_names=(*dusk.class_names, "cat"))
    own = dataset.record.name
    assert protocol_of(method, dataset, own) == protocol_of(method, dataset) == "base-to-new"
    assert protocol_of(method, dusk, own) == "domain generalisation"
    assert protocol_of(method, dusk) == "base-to-new"  # nobody said what it was trained on
    assert protocol_of(method, shuffled) == protocol_of(method, few) == "domain generalisation"
    assert protocol_of(method, more) == protocol_of(method, animals, own) == "cross-dataset"


def test_other_domains_are_classified_among_their_names_only(clip: Clip, dataset: Dataset, dusk: Dataset) -> None:
    """Two of the five classes, in another order."""
    items = tuple(LabelledImage(item.path, 4 - item.label, item.class_name) for item in dusk.test if item.label >= 3)
    target = replace(dusk, class_names=("black", "white"), test=items)
    method = _method(clip, dataset)
    scores = evaluate(method, target, trained_on=dataset.record.name)
    assert scores.protocol == "domain generalisation"
    assert scores.all == pytest.approx(_percent_right(_by_hand(method, target, items), items))
    assert (scores.num_images, scores.num_classes) == (8, 2)


def test_a_closed_vocabulary_is_scored_on_its_own_classes_only(clip: Clip, dataset: Dataset, animals: Dataset) -> None:
    method = _method(clip, dataset, "linear-probe")
    with torch.no_grad():
        method.get_parameter("weight").normal_(generator=torch.Generator().manual_seed(5))
    scores = evaluate(method, dataset)
    logits = _by_hand(method, replace(dataset, class_names=dataset.class_names[:3]), dataset.test[:12])
    assert scores.base == pytest.approx(_percent_right(logits, dataset.test[:12]))
    assert (scores.new, scores.open_base, scores.open_new, scores.all) == (None,) * 4
    assert sum(one.count for one in scores.reliability) == 12
    assert scores.num_new_images == 8
    with pytest.raises(DataError, match="class 'cat'"):
        evaluate(method, animals)
    with pytest.raises(DataError, match="no images of the 3 classes that linear-probe knows"):
        evaluate(method, replace(dataset, test=dataset.test[12:]))


def test_a_temperature_changes_probabilities_and_no_accuracy(method: Method, dataset: Dataset) -> None:
    plain, warm = evaluate(method, dataset), evaluate(method, dataset, temperature=3.0)
    logits = _by_hand(method, dataset, dataset.test)
    for scores, temperature in ((plain, 1.0), (warm, 3.0)):
        confidence = 100 * float((logits / temperature).softmax(dim=1).max(dim=1).values.mean())
        assert _mean_confidence(scores) == pytest.approx(confidence, abs=1e-3)
    assert plain.ece_before == warm.ece_before == pytest.approx(expected_calibration_error(plain.reliability))
    assert (plain.temperature, plain.ece_after) == (None, None)
    assert warm.ece_after == pytest.approx(expected_calibration_error(warm.reliability))
    assert replace(warm, temperature=None, ece_after=None, reliability=plain.reliability) == plain


def test_features_of_a_frozen_tower_are_kept(clip: Clip, method: Method, dataset: Dataset, tmp_path: Path) -> None:
    first = evaluate(method, dataset, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert evaluate(method, dataset, cache=tmp_path) == first == evaluate(method, dataset)
    evaluate(_method(clip, dataset, "vpt", **DEEP), dataset, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_scores_become_json(method: Method, dataset: Dataset) -> None:
    scores = evaluate(method, dataset, "val", selection="best on validation images", temperature=2.0)
    assert (scores.split, scores.selection) == ("val", "best on validation images")
    assert len(scores.reliability) == 15
    content = json.loads(json.dumps(scores.to_json()))
    means = ("harmonic_mean", "open_harmonic_mean", "generalised_harmonic_mean")
    assert {name: content.pop(name) for name in means} == {name: getattr(scores, name) for name in means}
    bins = tuple(ReliabilityBin(**one) for one in content.pop("reliability"))
    assert Scores(**content, reliability=bins) == scores


def test_broken_or_missing_images_are_named(method: Method, dataset: Dataset, tmp_path: Path) -> None:
    (broken := tmp_path / "bad.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"bad.png"):
        evaluate(method, replace(dataset, test=(*dataset.test, LabelledImage(broken, 0, "red"))))
    with pytest.raises(DataError, match="the list test has no images of the 5 classes"):
        evaluate(method, replace(dataset, test=()))

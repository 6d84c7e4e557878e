"""Temperatures and reliability, against NumPy, closed forms and a model whose temperature is known."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipship.core.errors import DataError
from clipship.training.datasets.base import Dataset, LabelledImage
from clipship.training.evaluation.temperature import (
    BINS,
    MIN_IMAGES,
    TEMPERATURES,
    Calibration,
    ReliabilityBin,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from clipship.training.methods import Method, build_method, config_of
from clipship.training.model.clip import Clip


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _drawn(rows: int, classes: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from the very probabilities they state."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def _method(clip: Clip, dataset: Dataset, name: str = "zero-shot") -> Method:
    return build_method(clip, config_of(name, recipe="test", base_model=clip.name), dataset.task)


@pytest.mark.parametrize("factor", [0.25, 1.0, 5.0])
def test_a_known_temperature_is_recovered(factor: float) -> None:
    logits, labels = _drawn(20_000, 10, seed=1)
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.03)


def test_the_temperature_is_the_minimum_that_a_fine_search_finds() -> None:
    logits, labels = _drawn(60, 5, seed=2)
    values, rows = 3 * logits.numpy(), np.arange(60)

    def loss(temperature: float) -> float:
        negative = -np.log(_softmax(values / temperature))
        return float(negative[rows, labels.numpy()].sum() + negative.mean())  # one more image, of unknown class

    grid = np.geomspace(*TEMPERATURES, 40_001)
    best = grid[np.argmin([loss(one) for one in grid])]
    assert fit_temperature(3 * logits, labels) == pytest.approx(best, rel=3e-4)


@pytest.mark.parametrize("count", [1, 30])
def test_where_all_images_are_right_succession_is_the_limit(count: int) -> None:
    """Two classes, every margin 6: p = (N + 1/2) / (N + 1), so T = 6 / logit(p)."""
    logits, labels = torch.tensor([[6.0, 0.0]]).repeat(count, 1), torch.zeros(count, dtype=torch.long)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(6 / math.log(2 * count + 1))
    (full,) = [one for one in reliability_bins(logits, labels, temperature) if one.count]
    assert full.confidence == pytest.approx(100 * (count + 0.5) / (count + 1))


def test_the_temperature_stays_in_its_range() -> None:
    labels = torch.zeros(50, dtype=torch.long)
    always_wrong = torch.tensor([[0.0, 9.0]]).repeat(50, 1)
    barely_right = torch.tensor([[1e-6, 0.0]]).repeat(50, 1)
    assert fit_temperature(always_wrong, labels) == pytest.approx(TEMPERATURES[1])
    assert fit_temperature(barely_right, labels) == pytest.approx(TEMPERATURES[0])
    assert fit_temperature(torch.full((50, 3), 7.0), labels) == 1.0


def test_temperatures_are_deterministic_and_ignore_the_type() -> None:
    logits, labels = _drawn(200, 4, seed=3)
    single = logits.float()
    assert fit_temperature(single, labels) == fit_temperature(single.double(), labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "N at least 1"),
        (torch.zeros(2, 3), torch.tensor([0]), r"logits \[2, 3\], labels \[1\]"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "not finite"),
        (torch.zeros(1, 3), torch.tensor([3]), "labels 3 to 3: must be 0 to 2"),
        (torch.zeros(1, 3), torch.tensor([-1]), "labels -1 to -1"),
    ],
)
def test_odd_input_is_refused(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_temperature(logits, labels)
    with pytest.raises(DataError, match=message):
        reliability_bins(logits, labels)


def test_bins_and_error_are_those_of_numpy() -> None:
    logits, labels = _drawn(500, 4, seed=4)
    sharp = 3 * logits
    probabilities = _softmax(sharp.numpy() / 1.5)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels.numpy()
    edges = np.linspace(0, 1, BINS + 1)
    error = 0.0
    bins = reliability_bins(sharp, labels, 1.5)
    assert len(bins) == BINS
    for low, high, found in zip(edges[:-1], edges[1:], bins, strict=True):
        inside = (confidence > low) & (confidence <= high)
        assert found.count == inside.sum()
        if found.count:
            assert found.confidence == pytest.approx(100 * confidence[inside].mean())
            assert found.accuracy == pytest.approx(100 * right[inside].mean())
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        else:
            assert (found.confidence, found.accuracy, found.gap) == (None, None, 0)
    assert expected_calibration_error(bins) == pytest.approx(100 * error)


def test_a_reliability_diagram_by_hand() -> None:
    """Confidences 3/4, 3/4 and 1 of two classes; the second is wrong: gaps 25 in bin 12 and 0 in the last."""
    odds = math.log(3)
    logits = torch.tensor([[odds, 0.0], [odds, 0.0], [0.0, 1e9]])
    bins = reliability_bins(logits, torch.tensor([0, 1, 1]))
    filled = {place: one for place, one in enumerate(bins) if one.count}
    assert sorted(filled) == [11, 14]
    assert filled[11].confidence == pytest.approx(75)
    assert (filled[11].accuracy, filled[11].count) == (50, 2)
    assert filled[14] == ReliabilityBin(confidence=100.0, accuracy=100.0, count=1)
    assert expected_calibration_error(bins) == pytest.approx(25 * 2 / 3)


def test_the_upper_end_belongs_to_a_bin() -> None:
    assert [one.count for one in reliability_bins(torch.zeros(3, 2), torch.tensor([0, 1, 1]), bins=2)] == [3, 0]


def test_the_right_temperature_calibrates() -> None:
    logits, labels = _drawn(20_000, 10, seed=5)
    sharp = 4 * logits
    before = expected_calibration_error(reliability_bins(sharp, labels))
    after = expected_calibration_error(reliability_bins(sharp, labels, fit_temperature(sharp, labels)))
    assert before > 10
    assert after < 1.5


def test_a_method_is_calibrated_on_images_of_classes_with_real_ones(clip: Clip, dataset: Dataset) -> None:
    method = _method(clip, dataset)
    items = (*dataset.val, *dataset.test)
    found = calibrate(method, items)
    known = [item for item in items if item.label < 3]
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(_opened(item)) for item in known])
        logits = method.classifier(dataset.class_names)(method.image_features(pixels))
    labels = torch.tensor([item.label for item in known])
    assert (found.num_images, found.classes, found.reason) == (21, "base", "")
    assert found.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    assert found.ece_before == pytest.approx(expected_calibration_error(reliability_bins(logits, labels)), abs=1e-3)
    after = expected_calibration_error(reliability_bins(logits, labels, found.temperature))
    assert found.ece_after == pytest.approx(after, abs=1e-3)


def _opened(item: LabelledImage) -> Image.Image:
    return Image.open(item.path)


def test_names_can_be_chosen(clip: Clip, dataset: Dataset, tmp_path: Path) -> None:
    method, items = _method(clip, dataset), (*dataset.val, *dataset.test)
    among_base = calibrate(method, items, dataset.class_names[:3], cache=tmp_path)
    assert among_base.ece_before != calibrate(method, items, cache=tmp_path).ece_before
    assert len(list(tmp_path.iterdir())) == 1, "the images are encoded once"


def test_all_classes_with_real_images_are_said_to_be_all(clip: Clip, dataset: Dataset) -> None:
    found = calibrate(_method(clip, replace(dataset, base_classes=5)), dataset.test)
    assert (found.num_images, found.classes) == (20, "all")


def test_a_closed_vocabulary_is_calibrated_among_its_own_classes(clip: Clip, dataset: Dataset) -> None:
    """Its weights start at zero, so every class has one third of the probability, whatever the temperature."""
    found = calibrate(_method(clip, dataset, "linear-probe"), (*dataset.val, *dataset.test))
    assert found.temperature == 1.0
    assert found.ece_before == found.ece_after == pytest.approx(0, abs=1e-4)


def test_too_few_images_give_no_temperature_and_the_reason(clip: Clip, dataset: Dataset) -> None:
    method = _method(clip, dataset)
    few = calibrate(method, dataset.val)
    reason = f"9 validation images of classes with real images, {MIN_IMAGES} are needed"
    assert few == Calibration(temperature=1.0, num_images=9, classes="base", reason=reason)
    new_only = [item for item in dataset.test if item.label >= 3]
    assert calibrate(method, new_only * 20).num_images == 0


def test_calibrations_round_trip_through_json_and_are_read_strictly() -> None:
    given = Calibration(temperature=1.25, num_images=40, classes="all", ece_before=8.5, ece_after=2.25)
    content = json.loads(json.dumps(asdict(given)))
    assert Calibration.from_json(content) == given
    for odd in ({**content, "extra": 1}, {key: content[key] for key in content if key != "classes"}):
        with pytest.raises(DataError, match="not a calibration"):
            Calibration.from_json(odd)
    for temperature in (0.0, 21.0, math.nan, "1"):
        with pytest.raises(DataError):
            Calibration.from_json({**content, "temperature": temperature})

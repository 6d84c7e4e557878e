"""The classification rule against its formula in float64, and what happens to it when classes come and go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from clipship.core.classification import Cache, VocabularyFeatures
from clipship.core.errors import BundleError, UsageError

CLASSES, DIM, IMAGES = 5, 8, 6


def unit(rows: int, seed: int) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(size=(rows, DIM))
    unit_length: NDArray[np.float32] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return unit_length


CACHE = Cache(keys=1.3 * unit(7, 2), labels=np.array([0, 0, 0, 3, 3, 1, 0]), alpha=1.7, beta=3.5)
BIAS = np.random.default_rng(4).normal(size=CLASSES).astype(np.float32)
PLAIN = VocabularyFeatures(features=unit(CLASSES, 1), logit_scale=20.0)
KINDS = {
    "plain": PLAIN,
    "probe": replace(PLAIN, bias=BIAS),
    "cache": replace(PLAIN, cache=CACHE),
    "both": replace(PLAIN, bias=BIAS, cache=CACHE),
}


def softmax_of_the_formula(given: VocabularyFeatures, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    logits = np.zeros((len(embedding), len(given.features)))
    for image, row in enumerate(embedding.astype(np.float64)):
        for label, weights in enumerate(given.features.astype(np.float64)):
            logits[image, label] = given.logit_scale * (
                row @ weights + (0 if given.bias is None else given.bias[label])
            )
        if given.cache is not None:
            for key, label in zip(given.cache.keys.astype(np.float64), given.cache.labels, strict=True):
                logits[image, label] += given.cache.alpha * np.exp(-given.cache.beta * (1 - row @ key))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_formula(kind: str) -> None:
    embedding = unit(IMAGES, 3)
    expected = softmax_of_the_formula(KINDS[kind], embedding)
    np.testing.assert_allclose(KINDS[kind].probabilities(embedding), expected, rtol=1e-5, atol=1e-7)
    if kind != "plain":
        assert np.abs(expected - softmax_of_the_formula(PLAIN, embedding)).max() > 0.01, "the parts do not matter"


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_divides_all_logits(kind: str) -> None:
    embedding = unit(IMAGES, 3)
    whole = KINDS[kind].logits(embedding)
    np.testing.assert_allclose(KINDS[kind].tempered(2.5).logits(embedding), whole / 2.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_round_trip(kind: str) -> None:
    again = VocabularyFeatures.from_tensors(KINDS[kind].tensors())
    assert again.parts == KINDS[kind].parts
    np.testing.assert_array_equal(again.logits(unit(IMAGES, 3)), KINDS[kind].logits(unit(IMAGES, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_and_fewer_classes_are_columns_of_the_same_logits(kind: str) -> None:
    embedding, order = unit(IMAGES, 3), [3, 0, 4]
    fewer = KINDS[kind].merged([[place] for place in order])
    np.testing.assert_allclose(fewer.logits(embedding), KINDS[kind].logits(embedding)[:, order], rtol=1e-5, atol=1e-5)
    if fewer.cache is not None:
        assert fewer.cache.labels.tolist() == [1, 1, 1, 0, 0, 1], "the key of class 1 went with it"


def test_synonyms_become_the_normalised_mean_and_keep_all_their_keys() -> None:
    embedding = unit(IMAGES, 3)
    merged = KINDS["cache"].merged([[0, 3], [1], [2, 4]])
    mean = PLAIN.features[[0, 3]].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(merged.features[0], mean / np.linalg.norm(mean), atol=1e-7)
    np.testing.assert_array_equal(merged.features[1], PLAIN.features[1])
    votes = CACHE.votes(embedding, CLASSES)
    assert merged.cache is not None
    together = np.stack([votes[:, 0] + votes[:, 3], votes[:, 1], votes[:, 2] + votes[:, 4]], axis=1)
    np.testing.assert_allclose(merged.cache.votes(embedding, 3), together, rtol=1e-5)


def test_new_classes_get_no_votes() -> None:
    embedding, more = unit(IMAGES, 3), unit(2, 9)
    longer = KINDS["cache"].extended(more)
    np.testing.assert_allclose(longer.logits(embedding)[:, :CLASSES], KINDS["cache"].logits(embedding), rtol=1e-5)
    np.testing.assert_allclose(longer.logits(embedding)[:, CLASSES:], 20 * embedding @ more.T, rtol=1e-4, atol=1e-5)


def test_a_linear_probe_takes_no_names() -> None:
    with pytest.raises(UsageError, match="knows the classes it was trained on only"):
        KINDS["probe"].extended(unit(1, 9))
    with pytest.raises(UsageError, match="one weight a class"):
        KINDS["probe"].merged([[0, 1], [2]])


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(BundleError, match=r"bias \[4\] for 5 classes"):
        replace(PLAIN, bias=BIAS[:4])
    with pytest.raises(BundleError, match="labels 0 to 5 for 5 classes"):
        replace(PLAIN, cache=replace(CACHE, labels=np.array([0, 1, 2, 3, 4, 5, 0])))
    with pytest.raises(BundleError, match=r"keys \[7, 8\], labels \[2\]"):
        replace(PLAIN, cache=replace(CACHE, labels=np.array([0, 1])))
    with pytest.raises(BundleError, match="no number"):
        replace(PLAIN, cache=replace(CACHE, beta=float("nan")))
    tensors = KINDS["cache"].tensors()
    del tensors["cache_beta"]
    with pytest.raises(BundleError, match="'cache_beta' is missing"):
        VocabularyFeatures.from_tensors(tensors)

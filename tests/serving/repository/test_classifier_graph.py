from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from clipship.core.classification import Cache, VocabularyFeatures
from clipship.core.vocabulary import Vocabulary
from clipship.serving.repository.classifier_graph import classifier_graph
from tests.serving.bundles import LOGIT_SCALE, NAMES, VOCABULARY, text_features

FEATURES = VocabularyFeatures(features=text_features(), logit_scale=LOGIT_SCALE)


def embeddings(count: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(7).normal(size=(count, FEATURES.features.shape[1])).astype(np.float32)
    lengths: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths


def run(graph: bytes, rows: NDArray[np.float32]) -> Any:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(["scores", "indices", "labels"], {"embedding": rows})


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_scores_are_the_softmax_in_double_precision(count: int) -> None:
    rows = embeddings(count)
    scores, indices, _ = run(classifier_graph(VOCABULARY, FEATURES, 5), rows)
    logits = LOGIT_SCALE * rows.astype(np.float64) @ FEATURES.features.astype(np.float64).T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), rtol=1e-5, atol=1e-7)
    assert scores.dtype == np.float32
    assert indices.dtype == np.int64


def test_labels_are_the_names_at_the_indices() -> None:
    _, indices, labels = run(classifier_graph(VOCABULARY, FEATURES, 5), embeddings(20))
    assert labels.tolist() == [[NAMES[index] for index in row] for row in indices]
    assert {"猫", "🦊", "Häuser"} & set(labels.flat), "the sample shows no name outside ASCII"


def test_k_is_at_most_the_vocabulary() -> None:
    scores, _, _ = run(classifier_graph(VOCABULARY, FEATURES, 100), embeddings(2))
    assert scores.shape == (2, len(NAMES))
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-6)


def test_a_tie_goes_to_the_first_class() -> None:
    twins = VocabularyFeatures(features=np.ones((3, 1), dtype=np.float32), logit_scale=1.0)
    scores, indices, labels = run(classifier_graph(Vocabulary(names=("a", "b", "c")), twins, 3), np.ones((1, 1), "f4"))
    assert indices.tolist() == [[0, 1, 2]]
    assert labels.tolist() == [["a", "b", "c"]]
    np.testing.assert_allclose(scores, 1 / 3, rtol=1e-6)


def test_equal_arguments_give_equal_bytes() -> None:
    assert classifier_graph(VOCABULARY, FEATURES, 5) == classifier_graph(VOCABULARY, FEATURES, 5)
    assert classifier_graph(VOCABULARY, FEATURES, 5) != classifier_graph(VOCABULARY, FEATURES, 4)


def with_parts(kind: str) -> VocabularyFeatures:
    """The vocabulary with a bias, with a cache (two classes without keys), or with one that is left without keys."""
    rng = np.random.default_rng(9)
    if kind == "bias":
        return replace(FEATURES, bias=rng.normal(size=len(NAMES)).astype(np.float32))
    keys = 1.1 * embeddings(0 if kind == "no keys" else 40)
    return replace(FEATURES, cache=Cache(keys=keys, labels=rng.integers(1, len(NAMES) - 1, len(keys)), alpha=4, beta=3))


@pytest.mark.parametrize("kind", ["bias", "cache", "no keys"])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_bias_and_a_cache_are_in_the_graph(kind: str, count: int) -> None:
    features, rows = with_parts(kind), embeddings(count)
    scores, indices, labels = run(classifier_graph(VOCABULARY, features, len(NAMES)), rows)
    expected = features.probabilities(rows)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, indices, axis=1), atol=1e-6)
    assert labels.tolist() == [[NAMES[index] for index in row] for row in indices]
    changed = np.abs(expected - FEATURES.probabilities(rows)).max()
    assert changed > 0.01 if kind != "no keys" else changed == 0


def test_the_embedding_is_handed_on() -> None:
    rows = embeddings(3)
    session = onnxruntime.InferenceSession(classifier_graph(VOCABULARY, FEATURES, 5))
    (passed,) = session.run(["embedding_passthrough"], {"embedding": rows})
    np.testing.assert_array_equal(passed, rows)


def test_the_plain_graph_has_nothing_of_the_parts() -> None:
    import onnx

    model = onnx.load_from_string(classifier_graph(VOCABULARY, FEATURES, 5))
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Mul", "Softmax", "TopK", "Gather", "Identity"]
    kinds = [
        node.op_type for node in onnx.load_from_string(classifier_graph(VOCABULARY, with_parts("cache"), 5)).graph.node
    ]
    assert "ScatterElements" in kinds

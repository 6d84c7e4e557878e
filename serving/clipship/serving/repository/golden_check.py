"""Validates a vocabulary by its golden images: through a server, and through its graph in this process.

Legend: N images, D embedding size, k classes reported an image, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.bundle import Bundle
from clipship.core.errors import CheckFailed, MissingExtraError
from clipship.core.tensors import (
    embedding_tensor,
    image_tensor,
    indices_tensor,
    labels_tensor,
    passthrough_tensor,
    scores_tensor,
)
from clipship.core.tolerances import RULE_ATOL, TOLERANCES, classes_problem, golden_problem, tolerance_of
from clipship.serving.repository.backends import ONNXRUNTIME
from clipship.serving.repository.golden_samples import Truth, truth_from_bundle

Answers = Mapping[str, NDArray[Any]]

Ask = Callable[[str, str, NDArray[Any], Sequence[str]], Answers]
"""``ask(model, input, rows, outputs)``: the model's outputs by name for any number of rows of its one input."""

_CLASSES = tuple(tensor(1).name for tensor in (scores_tensor, indices_tensor, labels_tensor))
_EMBEDDING, _PASSED = embedding_tensor(1).name, passthrough_tensor(1).name
_OUTPUTS = (*_CLASSES, _EMBEDDING)


def in_batches(infer: Callable[[NDArray[Any]], Answers], rows: NDArray[Any], largest: int) -> Answers:
    """Run ``infer`` on ``rows`` [N, ...] in batches of at most ``largest``."""
    parts = [infer(rows[at : at + largest]) for at in range(0, len(rows), largest)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def validate_graph(bundle: Bundle, version: Path) -> None:
    """The graph in the folder ``version`` must classify the bundle's golden embeddings as the bundle says.

    Raises:
        CheckFailed: it does not; says what differs.
        MissingExtraError: onnxruntime is not installed.
    """
    golden, truth = bundle.golden(), truth_from_bundle(bundle)
    difference = _largest(np.take_along_axis(truth.scores, golden.indices, axis=1) - golden.scores)
    if not difference <= TOLERANCES["fp32"].max_score:
        raise CheckFailed(f"{bundle.path}: its golden scores differ from its classifier's by {difference:.2g}")
    validate_classifier_model(lambda model, name, rows, outputs: _graph_answers(version, rows), str(version), truth)


def validate_classifier_model(ask: Ask, model: str, truth: Truth) -> None:
    """``model`` must classify the golden embeddings as the classification rule does, to 1e-4, and return them.

    Raises:
        CheckFailed: it does not; says what differs.
        ServingError: it does not answer.
    """
    answers = ask(model, _EMBEDDING, truth.embedding, (*_CLASSES, _PASSED))
    scores, indices, labels = (answers[name] for name in _CLASSES)
    problem = classes_problem(truth.scores, truth.names, scores, indices, labels, RULE_ATOL)
    if not problem and not np.array_equal(answers[_PASSED], truth.embedding):
        problem = "it returns another embedding than it received"
    if problem:
        raise CheckFailed(f"{model}: {problem}")


def validate_answers(
    ask: Ask, model: str, name: str, rows: NDArray[Any], expected: NDArray[np.float32], truth: Truth, precision: str
) -> None:
    """``model`` must answer ``rows`` of its input ``name`` within ``precision``'s tolerance.

    Args:
        rows: the first n golden images, as pixels or as files.
        expected: the features [N, D] of all golden images by PyTorch.
        truth: scores are compared where it is of the same images; labels always.

    Raises:
        CheckFailed: it does not; says what differs.
        ServingError: it does not answer.
    """
    answers, count = ask(model, name, rows, _OUTPUTS), len(rows)
    scores, indices, labels, embedding = (answers[output] for output in _OUTPUTS)
    same = np.array_equal(truth.embedding, expected)  # a further vocabulary's bundle may have other images
    limit = tolerance_of(precision).max_score if same else math.inf
    problem = golden_problem(expected, embedding, precision) or classes_problem(
        truth.scores[:count], truth.names, scores, indices, labels, limit
    )
    if problem:
        raise CheckFailed(f"{model}: {problem}")


def validate_vocabulary(ask: Ask, classifier: str, ensemble: str, bundle: Bundle, precision: str) -> None:
    """A server's models of one vocabulary must answer the bundle's golden images as the bundle says.

    Raises:
        CheckFailed: they do not; says what differs.
        ServingError: they do not answer.
    """
    truth, golden = truth_from_bundle(bundle), bundle.golden()
    validate_classifier_model(ask, classifier, truth)
    validate_answers(ask, ensemble, image_tensor(1).name, golden.pixels, golden.embedding, truth, precision)


def validate_same_answers(ask: Ask, model: str, version: Path, pixels: NDArray[np.uint8]) -> None:
    """A server's ``model`` must answer what the graph in the folder ``version`` makes of the served embedding.

    Raises:
        CheckFailed: it does not.
        ServingError: it does not answer.
    """
    answers = ask(model, image_tensor(1).name, pixels, _OUTPUTS)
    expected = _graph_answers(version, answers[_EMBEDDING])
    scores, labels = scores_tensor(1).name, labels_tensor(1).name
    names = [name.encode() for name in expected[labels].flat]
    if names != answers[labels].ravel().tolist() or _largest(expected[scores] - answers[scores]) > RULE_ATOL:
        raise CheckFailed(f"{model} answers otherwise than {version}")


def _largest(differences: NDArray[Any]) -> float:
    return float(np.abs(differences).max())


def _graph_answers(version: Path, embedding: NDArray[np.float32]) -> Answers:
    """Scores, indices, labels and the embedding that the graph passes through."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "serving") from error
    session = onnxruntime.InferenceSession(version / ONNXRUNTIME.model_file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {embedding_tensor(1).name: embedding}), strict=True))

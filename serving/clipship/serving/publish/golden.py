"""Whether a vocabulary answers right: its golden images through the server, and through its graph in this process.

Legend: N images, D embedding size, k classes reported an image, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from clipship.serving.config import MODEL_FILES
from clipship.serving.publish.control import Control

_OUTPUTS = tuple(tensor(1).name for tensor in (scores_tensor, indices_tensor, labels_tensor, embedding_tensor))
_RULE_ATOL = 1e-4
"""Of a score against the classification rule on the embedding that was served: float32 against float32."""

Answers = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a served encoder may be from PyTorch's golden answers."""

    min_cosine: float
    max_score: float


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(min_cosine=0.9999, max_score=0.005),
    "fp16": Tolerance(min_cosine=0.9995, max_score=0.02),
    "bf16": Tolerance(min_cosine=0.999, max_score=0.05),
    "int8": Tolerance(min_cosine=0.995, max_score=0.1),
}
"""By the served encoder's precision; as ``clipship verify`` has them for one image."""


def refuse_wrong_graph(bundle: Bundle, version: Path) -> None:
    """The graph in the folder ``version`` must classify the bundle's golden embeddings as the bundle says.

    Raises:
        CheckFailed: it does not; says what differs.
        MissingExtraError: onnxruntime is not installed.
    """
    golden = bundle.golden()
    answers = dict(_graph_answers(version, golden.embedding))
    answers[embedding_tensor(1).name] = answers.pop(passthrough_tensor(1).name)
    _refuse_differences(bundle, answers, TOLERANCES["fp32"], f"{version}")


def refuse_wrong_answers(control: Control, model: str, bundle: Bundle, precision: str) -> None:
    """The server's ``model`` must answer the bundle's golden images as the bundle says.

    Scores and labels must be what the classification rule makes of the embedding that was served, to 1e-4; embedding
    and scores must be PyTorch's within the tolerance of the encoder's ``precision``.

    Raises:
        CheckFailed: it does not; says what differs.
        ServingError: it does not answer.
    """
    golden = bundle.golden()
    image = image_tensor(bundle.image_spec.size_px).name
    answers = control.answers(model, image, golden.pixels, _OUTPUTS)
    where = f"{model} at {control.url}"
    _refuse_differences(bundle, answers, _tolerance(precision), where)


def refuse_other_answers(control: Control, model: str, version: Path, pixels: NDArray[np.uint8]) -> None:
    """The server's ``model`` must answer what the graph in the folder ``version`` makes of the served embedding.

    Raises:
        CheckFailed: it does not.
        ServingError: it does not answer.
    """
    answers = control.answers(model, image_tensor(1).name, pixels, _OUTPUTS)
    expected = _graph_answers(version, answers[embedding_tensor(1).name])
    scores, labels = scores_tensor(1).name, labels_tensor(1).name
    names = np.array([name.encode() for name in expected[labels].flat], dtype=np.object_).reshape(answers[labels].shape)
    if not (names == answers[labels]).all() or _largest(expected[scores] - answers[scores]) > _RULE_ATOL:
        raise CheckFailed(f"{model} at {control.url} answers otherwise than {version}")


def _tolerance(precision: str) -> Tolerance:
    """The widest of the plans' precisions ("bf16, fp16"), or that of the one form."""
    known = [TOLERANCES[name] for name in precision.split(", ") if name in TOLERANCES]
    return min(known, key=lambda tolerance: tolerance.min_cosine) if known else TOLERANCES["fp32"]


def _refuse_differences(bundle: Bundle, answers: Answers, tolerance: Tolerance, where: str) -> None:
    """Nothing when the answers are the golden ones; of equal scores either class may come first."""
    scores, indices, labels, embedding = (answers[name] for name in _OUTPUTS)
    golden, features = bundle.golden(), bundle.vocabulary_features()
    _refuse_wrong_names(bundle, indices, labels, where)
    cosine = float((embedding * golden.embedding).sum(axis=1).min())
    if not cosine >= tolerance.min_cosine:
        raise CheckFailed(f"{where}: a golden embedding has a cosine of {cosine:.6f}, below {tolerance.min_cosine}")
    k = min(scores.shape[1], golden.scores.shape[1])
    served, truth = features.probabilities(embedding), features.probabilities(golden.embedding)  # [N, C]
    differences = {
        "the classification rule's": (_at(served, indices) - scores, _RULE_ATOL),
        "PyTorch's": (_at(truth, indices) - scores, tolerance.max_score),
        "the golden ones": (golden.scores[:, :k] - scores[:, :k], tolerance.max_score),
        "those of the golden classes": (_at(truth, golden.indices) - golden.scores, TOLERANCES["fp32"].max_score),
    }
    for what, (difference, limit) in differences.items():
        if not _largest(difference) <= limit:
            raise CheckFailed(f"{where}: scores differ from {what} by {_largest(difference):.2g}, above {limit:g}")


def _refuse_wrong_names(bundle: Bundle, indices: NDArray[np.int64], labels: NDArray[Any], where: str) -> None:
    names = [name.encode() for name in bundle.vocabulary]
    if indices.min() < 0 or indices.max() >= len(names):
        raise CheckFailed(f"{where}: answers with classes that the vocabulary does not have")
    told = [label.encode() if isinstance(label, str) else label for label in labels.flat]
    if told != [names[index] for index in indices.flat]:
        raise CheckFailed(f"{where}: labels are not the vocabulary's names at the indices")


def _at(probabilities_NC: NDArray[np.float32], indices_Nk: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.take_along_axis(probabilities_NC, indices_Nk, axis=1)


def _largest(differences: NDArray[Any]) -> float:
    return float(np.abs(differences).max())


def _graph_answers(version: Path, embedding: NDArray[np.float32]) -> Answers:
    """Scores, indices, labels and the embedding that the graph hands on."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    session = onnxruntime.InferenceSession(version / MODEL_FILES["onnxruntime"], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {embedding_tensor(1).name: embedding}), strict=True))

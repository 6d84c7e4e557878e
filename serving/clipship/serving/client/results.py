"""The results of images, from a server's outputs.

Legend: N images of a request, k classes reported per image, D the size of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.tensors import ERROR, embedding_tensor, indices_tensor, labels_tensor, scores_tensor
from clipship.serving.errors import BadAnswer
from clipship.serving.transport.base import Tensors

SCORES, INDICES, LABELS = (tensor(1).name for tensor in (scores_tensor, indices_tensor, labels_tensor))
EMBEDDING = embedding_tensor(1).name


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best classes of an image, best first; or ``error``, why it could not be classified."""

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    """Probabilities over the whole vocabulary."""
    indices: tuple[int, ...] = ()
    """Positions in the vocabulary."""
    error: str | None = None
    embedding: NDArray[np.float32] | None = field(default=None, compare=False)
    """Features of unit length [D], if they were requested."""
    vocabulary: str | None = None
    """The further vocabulary that answered; None: the server's first."""

    @property
    def label(self) -> str | None:
        """The best class, or None."""
        return self.labels[0] if self.labels else None

    @property
    def score(self) -> float | None:
        """The best class's probability, or None."""
        return self.scores[0] if self.scores else None


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The features of images, in their order; ``numpy.asarray`` gives the vectors."""

    vectors: NDArray[np.float32]
    """[N, D], rows of unit length; the row of an image without features is NaN."""
    errors: tuple[str | None, ...]
    """For each image None, or why it has no features."""

    def __len__(self) -> int:
        return len(self.errors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype) if copy else np.asarray(self.vectors, dtype=dtype)


def embeddings_from_results(results: Sequence[Result], embed_dim: int | None) -> Embeddings:
    """The vectors [N, D] and errors of ``results``; without any vector, D is ``embed_dim``."""
    size = next((len(result.embedding) for result in results if result.embedding is not None), embed_dim or 0)
    vectors = np.full((len(results), size), np.nan, dtype=np.float32)
    for row, result in zip(vectors, results, strict=True):
        if result.embedding is not None:
            row[...] = result.embedding
    return Embeddings(vectors=vectors, errors=tuple(result.error for result in results))


def results_from_outputs(
    outputs: Tensors, names: Sequence[str], count: int, *, url: str, vocabulary: str | None = None
) -> list[Result]:
    """One result for each of ``count`` images, in order, from the requested outputs ``names``.

    Raises:
        BadAnswer: an output is missing, or of the wrong type or shape.
    """
    try:
        return list(_rows(_validated(outputs, names, count), count, vocabulary))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadAnswer(f"{url}: the answer does not fit the request ({error})") from error


def _validated(outputs: Tensors, names: Sequence[str], count: int) -> Tensors:
    """The requested ones of ``outputs``, if they fit; else ValueError or KeyError.

    A published vocabulary may have changed the number of classes: it must be the same in all three outputs.
    """
    kinds = {SCORES: "f", INDICES: "i", LABELS: "OS", EMBEDDING: "f", ERROR.name: "OS"}
    widths = set()
    for name in names:
        array = outputs[name]
        if array.ndim != 2 or len(array) != count or array.dtype.kind not in kinds[name] or array.shape[1] < 1:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)} for {count} images")
        if name in (SCORES, INDICES, LABELS):
            widths.add(array.shape[1])
    if len(widths) > 1:
        raise ValueError(f"scores, indices and labels of {sorted(widths)} classes")
    return {name: outputs[name] for name in names}


def _rows(outputs: Tensors, count: int, vocabulary: str | None) -> Iterator[Result]:
    """One result per row of the outputs [N, k], [N, D] and [N, 1]."""
    errors = outputs[ERROR.name][:, 0].tolist() if ERROR.name in outputs else [b""] * count
    columns = (outputs[name].tolist() if name in outputs else [()] * count for name in (LABELS, SCORES, INDICES))
    embeddings = outputs.get(EMBEDDING, [None] * count)
    are_finite = _are_finite(outputs, count)
    for error, labels, scores, indices, embedding, is_finite in zip(
        errors, *columns, embeddings, are_finite, strict=True
    ):
        if error:
            yield Result(error=error.decode(), vocabulary=vocabulary)
        elif not is_finite:
            yield Result(error="the model's answer is not a number", vocabulary=vocabulary)
        else:
            yield Result(
                labels=tuple([label.decode() for label in labels]),
                scores=tuple(scores),
                indices=tuple(indices),
                embedding=None if embedding is None else np.array(embedding),  # not a view that keeps the batch alive
                vocabulary=vocabulary,
            )


def _are_finite(outputs: Tensors, count: int) -> list[bool]:
    """For each row, whether its scores and its embedding are finite."""
    finite = np.ones(count, dtype=bool)
    for name in (SCORES, EMBEDDING):
        if name in outputs:
            finite &= np.isfinite(outputs[name]).all(axis=1)
    flags: list[bool] = finite.tolist()
    return flags

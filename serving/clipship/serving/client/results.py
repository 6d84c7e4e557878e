"""What a client gets: results of images, and what the server says about its models.

Legend: N images of a request, H = W = the side of the encoder's input in pixels, k classes reported an image, D the
size of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipship.core.images.decoding import ImageSpec
from clipship.core.tensors import ERROR, embedding_tensor, indices_tensor, labels_tensor, scores_tensor
from clipship.serving.errors import BadAnswer, ModelsMissing, ServingError
from clipship.serving.model_names import (
    BUNDLE_DIGEST,
    CLASSIFIER,
    CLASSIFY,
    ENCODER,
    ENCODER_DIGEST,
    IMAGE_SPEC,
    TOP_K,
    VOCABULARY_DIGEST,
    of_vocabulary,
)
from clipship.serving.transport.base import Tensors, Transport, parameters_of

SCORES, INDICES, LABELS = (tensor(1).name for tensor in (scores_tensor, indices_tensor, labels_tensor))
EMBEDDING = embedding_tensor(1).name


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an image shows, best first; with ``error`` set, why it could not be classified, and nothing else."""

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    """Probabilities over the whole vocabulary."""
    indices: tuple[int, ...] = ()
    """Positions in the vocabulary."""
    error: str | None = None
    embedding: NDArray[np.float32] | None = field(default=None, compare=False)
    """Features of unit length [D], where they were asked for."""
    vocabulary: str | None = None
    """The further vocabulary that answered; None: the server's first."""

    @property
    def label(self) -> str | None:
        """The best class, None for an image that could not be classified."""
        return self.labels[0] if self.labels else None

    @property
    def score(self) -> float | None:
        """The best class's probability, None for an image that could not be classified."""
        return self.scores[0] if self.scores else None


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The features of some images, in their order; ``numpy.asarray`` gives the vectors."""

    vectors: NDArray[np.float32]
    """[N, D], rows of unit length; the row of an image without features is NaN."""
    errors: tuple[str | None, ...]
    """For each image None, or why it has no features."""

    def __len__(self) -> int:
        return len(self.errors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype) if copy else np.asarray(self.vectors, dtype=dtype)


def embeddings_from_results(results: Sequence[Result], embed_dim: int | None) -> Embeddings:
    """The vectors [N, D] and errors of ``results``; D of the vectors, or ``embed_dim`` where there are none."""
    size = next((len(result.embedding) for result in results if result.embedding is not None), embed_dim or 0)
    vectors = np.full((len(results), size), np.nan, dtype=np.float32)
    for row, result in zip(vectors, results, strict=True):
        if result.embedding is not None:
            row[...] = result.embedding
    return Embeddings(vectors=vectors, errors=tuple(result.error for result in results))


@dataclass(frozen=True, kw_only=True)
class ServerMetadata:
    """What the server says about its models."""

    bundle_digest: str
    vocabulary_digest: str
    image_spec: ImageSpec
    max_batch_size: int
    top_k: int
    """Classes reported an image."""
    encoder_digest: str | None = None
    """Of the image encoder's file; None for a repository that does not say."""
    embed_dim: int | None = None
    """The size of an embedding; None for a repository whose ensembles do not give it."""


def read_facts(transport: Transport, vocabulary: str | None = None) -> ServerMetadata:
    """What the server says about its models, those of a further ``vocabulary`` where one is named.

    Raises:
        ModelsMissing: it does not serve ours; says which it has.
        ServingError: as the transport.
    """
    names = [of_vocabulary(model, vocabulary) for model in (CLASSIFY, CLASSIFIER)]
    try:
        ensemble, classifier = (transport.model_config(name) for name in names)
        told = {**parameters_of(ensemble), **parameters_of(classifier)}
        return ServerMetadata(
            bundle_digest=told[BUNDLE_DIGEST],
            vocabulary_digest=told[VOCABULARY_DIGEST],
            image_spec=ImageSpec.from_json(json.loads(told[IMAGE_SPEC])),
            max_batch_size=int(ensemble["max_batch_size"]),
            top_k=int(told[TOP_K]),
            encoder_digest=_encoder_digest(transport),
            embed_dim=_embed_dim(ensemble),
        )
    except (ModelsMissing, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        wanted = "clipship's models" if vocabulary is None else f"the vocabulary {vocabulary!r}"
        raise ModelsMissing(
            f"the Triton at {transport.url} does not serve {wanted}; {_what_it_has(transport)}: "
            "write a repository with clipship repository and start it with clipship serve"
        ) from error


def _what_it_has(transport: Transport) -> str:
    """For a message; a server may keep the list of its models to its administrators."""
    try:
        return f"it has {', '.join(transport.model_names()) or 'no model at all'}"
    except ServingError:
        return "which it has, it does not tell"


def _encoder_digest(transport: Transport) -> str | None:
    try:
        return parameters_of(transport.model_config(ENCODER)).get(ENCODER_DIGEST) or None
    except ModelsMissing:
        return None


def _embed_dim(ensemble: dict[str, Any]) -> int | None:
    dims = [output["dims"] for output in ensemble.get("output", []) if output["name"] == EMBEDDING]
    return int(dims[0][-1]) if dims else None


def results_from_outputs(
    outputs: Tensors, names: Sequence[str], count: int, *, url: str, vocabulary: str | None = None
) -> list[Result]:
    """One result for each of ``count`` images, in order, from the outputs ``names`` that were asked for.

    Raises:
        BadAnswer: an output is missing, or of another type or shape.
    """
    try:
        return list(_rows(_checked(outputs, names, count), count, vocabulary))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadAnswer(f"{url}: the answer does not fit the request ({error})") from error


def _checked(outputs: Tensors, names: Sequence[str], count: int) -> Tensors:
    """Those of ``outputs`` that were asked for, if they fit; else ValueError or KeyError.

    The number of classes may have changed since the server was asked for its facts, when a vocabulary was published: it
    must be the same in all three outputs.
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
    """One result a row of the outputs [N, k], [N, D] and [N, 1]."""
    errors = outputs[ERROR.name][:, 0].tolist() if ERROR.name in outputs else [b""] * count
    columns = (_column(outputs, name, count) for name in (LABELS, SCORES, INDICES))
    embeddings = outputs.get(EMBEDDING, [None] * count)
    are_numbers = _are_numbers(outputs, count)
    for error, labels, scores, indices, embedding, is_number in zip(
        errors, *columns, embeddings, are_numbers, strict=True
    ):
        if error:
            yield Result(error=error.decode(), vocabulary=vocabulary)
        elif not is_number:
            yield Result(error="the model's answer is not a number", vocabulary=vocabulary)
        else:
            yield Result(
                labels=tuple([label.decode() for label in labels]),
                scores=tuple(scores),
                indices=tuple(indices),
                embedding=None if embedding is None else np.array(embedding),  # not a view that keeps the batch alive
                vocabulary=vocabulary,
            )


def _column(outputs: Tensors, name: str, count: int) -> list[Any]:
    """The output's rows as lists; empty rows where it was not asked for."""
    return outputs[name].tolist() if name in outputs else [()] * count


def _are_numbers(outputs: Tensors, count: int) -> list[bool]:
    """For each row whether its scores and its embedding are."""
    finite = np.ones(count, dtype=bool)
    for name in (SCORES, EMBEDDING):
        if name in outputs:
            finite &= np.isfinite(outputs[name]).all(axis=1)
    flags: list[bool] = finite.tolist()
    return flags
